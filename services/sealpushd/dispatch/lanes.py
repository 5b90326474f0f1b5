"""Lanes: one a platform of an app, each with a provider, a bound on what it holds, a breaker, a window and an operator's switch.

A lane knows how many more wake-ups it can take (`take_credit`) and whether the next one may be sent (`admit`). It does no I/O.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from sealpushd.dispatch.providers.base import COMMON_ADVICE, Outcome, Provider, RetryAt
from sealpushd.dispatch.rules import (
    STRANGERS_MAX,
    Breaker,
    Circuit,
    Decision,
    Evidence,
    Pushed,
    StopLane,
    Window,
    evidence,
)
from sealpushd.dispatch.store import LaneRow
from sealpushd.dispatch.tally import Tally
from sealpushd.platform.clock import Clock, Reading
from sealpushd.platform.metrics import WAKE_UPS, platform_label

log = structlog.get_logger()

LaneKey = tuple[str, int]
"""App id and platform number."""

# A lane that does not send hands wake-ups back that the mailbox had sent on old credit; they may come again after this, and do not as
# long as the lane gives no credit. So whoever repairs or resumes it need not wait for them.
PAUSED_RETRY: Final = timedelta(seconds=2)
# While the one try of a half-open lane runs, others wait this long.
PROBING_RETRY: Final = timedelta(seconds=1)

# Tokens set aside by "forget with care": a wrong environment hits some phones, not all. About 100 bytes each.
SUSPECTS_MAX: Final = 100_000
# Credit is given back by this part of the capacity at the least.
CREDIT_SHARE: Final = 4

_HELD = Gauge("sealpush_lane_held", "Wake-ups that dispatch holds, by lane.", ["app", "platform"])
_SENDING = Gauge("sealpush_lane_in_flight", "Wake-ups on the way to the push service, by lane.", ["app", "platform"])
_OPEN = Gauge("sealpush_lane_open", "1: the lane takes wake-ups; 0: paused, broken or misconfigured.", ["app", "platform"])


class LaneState(Enum):
    """As in the proto."""

    OPEN = 1
    PAUSED = 2
    BROKEN = 3
    MISCONFIGURED = 4


@dataclass(frozen=True, slots=True)
class Send:
    """Send it with this provider. `probe`: it is the one try of a half-open lane."""

    probe: bool
    provider: Provider


@dataclass(frozen=True, slots=True)
class Release:
    """Give it back untried, to come again after this."""

    delay: timedelta
    reason: str


class Lane:
    """One lane; `capacity` bounds what it holds. It pushes with a provider, and waits while it has none (`problem` says why)."""

    def __init__(self, app_id: str, platform: int, *, capacity: int, clock: Clock, random: Callable[[], float]) -> None:
        self.key: LaneKey = (app_id, platform)
        self.app_id = app_id
        self.platform = platform
        self.provider: Provider | None = None
        # Why the stored credential is not used; it may be that an older one still is.
        self.problem = ""
        # Received and not yet reported, and of those: being sent.
        self.held = 0
        self.sending = 0
        self._clock = clock
        self._random = random
        # Credit that the mailbox has and did not use.
        self._granted = 0
        self._breaker = Breaker()
        self._window = Window.whole(capacity)
        self._probing = False
        self._paused = False
        self._pause_detail = ""
        self._resumed_at: datetime | None = None
        # The last word of whatever broke the lane or stopped it.
        self._broken_by = ""
        self._misconfigured = False
        # Registrations whose token is not of this app or environment: (device, registered at). A new registration is another entry.
        self._suspects: OrderedDict[tuple[bytes, datetime], str] = OrderedDict()
        # Devices whose tokens the push service did not take, since the last one that it took, and its last reason.
        self._strangers: set[bytes] = set()
        self._estranged_by = ""
        self._labels = (app_id, platform_label(platform))
        self.counts = Tally(self._labels)
        # Label look-ups cost more than counting: remember the children.
        self._wake_ups: dict[str, Counter] = {}
        self.show_metrics()

    # The credential

    def use(self, provider: Provider) -> Provider | None:
        """Push with this from now on; gives the one before, whose sends may still be under way."""
        before, self.provider, self.problem = self.provider, provider, ""
        self._forgive()
        return before

    def lose(self, problem: str) -> Provider | None:
        """Push no more, for want of a credential; gives the one that was used."""
        before, self.provider, self.problem = self.provider, None, problem
        return before

    @property
    def topic(self) -> str:
        """Where installations without a topic of their own belong."""
        return self.provider.topic if self.provider is not None else ""

    def show_metrics(self) -> None:
        """The lane is there, or there again."""
        _HELD.labels(*self._labels).set_function(lambda: self.held)
        _SENDING.labels(*self._labels).set_function(lambda: self.sending)
        _OPEN.labels(*self._labels).set_function(lambda: self.state is LaneState.OPEN)

    def forget_metrics(self) -> None:
        """The lane is no more."""
        for gauge in (_HELD, _SENDING, _OPEN):
            with contextlib.suppress(KeyError):
                gauge.remove(*self._labels)

    # Tokens that are set aside

    def set_aside(self, device_id: bytes, registered_at: datetime, reason: str, *, asked: bool) -> None:
        """Send nothing more to this registration until the device registers again. `asked`: the push service said so, not we."""
        self._suspects[device_id, registered_at] = reason
        while len(self._suspects) > SUSPECTS_MAX:
            self._suspects.popitem(last=False)
        if not asked or self._is_estranged:
            return
        self._strangers.add(device_id)
        self._estranged_by = reason
        if self._is_estranged:
            log.error("no token of a lane belongs to its credential", app=self.app_id, platform=self.platform, reason=reason)

    def set_aside_for(self, device_id: bytes, registered_at: datetime) -> str | None:
        """Why this registration is set aside; None: it is not."""
        return self._suspects.get((device_id, registered_at))

    def take_back(self) -> None:
        """Try again what was set aside: somebody repaired something."""
        self._suspects.clear()
        self._strangers.clear()

    def try_now(self) -> None:
        """Begin anew, whatever broke the lane or stopped it: somebody repaired something, or the clock was set."""
        if self.provider is not None:
            self.provider.forget_failures()
        self._forgive()

    def _forgive(self) -> None:
        self._probing = False
        self._breaker, self._misconfigured, self._broken_by = Breaker(), False, ""
        self._window = Window.whole(self._window.capacity)
        self.take_back()

    # Credit

    def session_began(self) -> None:
        """A new session knows nothing of credit given before."""
        self._granted = 0

    def take_credit(self) -> int:
        """How many more wake-ups the mailbox may hand out now; they count as given.

        Small amounts gather first: a frame costs the same whether it carries one wake-up or a hundred.
        """
        room = self._room()
        more = room - self.held - self._granted
        if more < max(room // CREDIT_SHARE, 1):
            return 0
        self._granted += more
        return more

    def took(self) -> None:
        """The mailbox handed one out."""
        self._granted = max(self._granted - 1, 0)
        self.held += 1

    def reported(self, outcome: str) -> None:
        """Count an outcome, one of the proto's words in lower case."""
        counter = self._wake_ups.get(outcome)
        if counter is None:
            counter = self._wake_ups[outcome] = WAKE_UPS.labels(*self._labels, outcome)
        counter.inc()

    def settled(self) -> None:
        """One that was held is reported, or its session is over."""
        self.held -= 1

    def _room(self) -> int:
        if self._paused or self.provider is None:
            return 0
        match self._breaker.circuit(self._clock.monotonic()):
            case Circuit.CLOSED:
                return self._window.size
            case Circuit.HALF_OPEN:
                return 1
            case Circuit.OPEN:
                return 0

    # Sending

    def refusal(self) -> Release | None:
        """Why nothing can be sent now; None: it can."""
        now = self._clock.monotonic()
        if self._paused:
            return Release(PAUSED_RETRY, "lane-paused")
        if self.provider is None:
            return Release(PAUSED_RETRY, "lane-without-credential")
        circuit = self._breaker.circuit(now)
        if circuit is Circuit.OPEN:
            assert self._breaker.open_until is not None  # noqa: S101 - that is what open means
            return Release(min(timedelta(seconds=self._breaker.open_until - now), PAUSED_RETRY), "lane-broken")
        if circuit is Circuit.HALF_OPEN and self._probing:
            return Release(PROBING_RETRY, "lane-broken")
        return None

    def admit(self) -> Send | Release:
        """Whether the next one is sent. After Send, exactly one of `observe` and `abandon` must follow."""
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        probe = self._breaker.circuit(self._clock.monotonic()) is Circuit.HALF_OPEN
        self._probing = self._probing or probe
        self.sending += 1
        assert self.provider is not None  # noqa: S101 - without one there is a refusal
        return Send(probe, self.provider)

    def abandon(self, send: Send) -> None:
        """The send ended without an outcome."""
        self.sending -= 1
        if send.probe and send.provider is self.provider:
            self._probing = False

    def observe(self, send: Send, outcome: Outcome, decision: Decision) -> None:
        """Take the outcome of a send, as the provider gave it, into account."""
        self.abandon(send)
        before = self._breaker
        now = self._clock.monotonic()
        if send.provider is not self.provider:
            # The credential was replaced meanwhile: what the old one brought says nothing of the new one.
            pass
        elif isinstance(decision, StopLane):
            self._breaker = before.stopped(now, decision.pause)
            self._misconfigured = True
        else:
            self._weigh(send, outcome, now)
        if self._breaker.open_until is not None and self._breaker.open_until != before.open_until:
            self._broken_by = outcome.reason
            if before.open_until is None:
                kind = "stopped: credentials or settings are wrong" if self._misconfigured else "broken: failures in a row"
                log.error(f"a lane is {kind}", app=self.app_id, platform=self.platform, reason=outcome.reason)  # noqa: G004 - two fixed texts
        elif before.open_until is not None and self._breaker.open_until is None:
            self._broken_by, self._misconfigured = "", False
            log.info("a lane works again", app=self.app_id, platform=self.platform)
        if isinstance(decision, Pushed):
            self._strangers.clear()
        self.counts.take(decision, outcome.reason, Reading(self._clock.now(), now))

    def _weigh(self, send: Send, outcome: Outcome, now: float) -> None:
        """What the outcome says for or against the push service."""
        before = self._breaker
        match evidence(outcome):
            case Evidence.FAILS:
                retry_after = outcome.retry_after if isinstance(outcome, RetryAt) else None
                self._breaker = before.failed(now, self._random, probe=send.probe, retry_after=retry_after)
                self._window = self._window.halved(now)
                if self._breaker.open_until != before.open_until:
                    self._misconfigured = False
                    self._window = self._window.shut()
            case Evidence.WORKS:
                self._breaker = before.succeeded(probe=send.probe)
                self._window = self._window.grown()
            case Evidence.NOTHING:
                # A half-open lane tries another one.
                pass

    # The operator's switch

    def apply(self, row: LaneRow) -> bool:
        """Take over what operators decided; returns whether that changed something."""
        changed = False
        # Another time and not a later one: it is the clock of whichever process was asked.
        if row.resumed_at is not None and row.resumed_at != self._resumed_at:
            # The first row seen is history: nothing is broken yet that it could repair.
            self._resumed_at = row.resumed_at
            self.try_now()
            changed = True
        if row.paused != self._paused:
            self._paused = row.paused
            changed = True
            log.info("a lane was paused" if row.paused else "a lane was resumed", app=self.app_id, platform=self.platform)
        self._pause_detail = row.detail
        return changed

    # What operators see

    @property
    def closed_for(self) -> timedelta | None:
        """In how long a broken or stopped lane tries again; None: it is not, or it is paused."""
        if self._paused or self._breaker.open_until is None:
            return None
        return max(timedelta(seconds=self._breaker.open_until - self._clock.monotonic()), timedelta(0))

    @property
    def failures_in_a_row(self) -> int:
        return self._breaker.failures

    @property
    def window(self) -> int:
        """How many may be on the way at once now."""
        return self._window.size

    @property
    def state(self) -> LaneState:
        if self._paused:
            return LaneState.PAUSED
        if self.provider is None:
            return LaneState.MISCONFIGURED
        if self._breaker.open_until is None:
            return LaneState.OPEN
        return LaneState.MISCONFIGURED if self._misconfigured else LaneState.BROKEN

    @property
    def is_suspicious(self) -> bool:
        """It takes wake-ups, and something is wrong nevertheless."""
        return self.state is LaneState.OPEN and (self._is_estranged or bool(self.problem))

    @property
    def _is_estranged(self) -> bool:
        return len(self._strangers) >= STRANGERS_MAX

    @property
    def detail(self) -> str:
        """What the state means and what to do."""
        if self._paused:
            return f"{self._pause_detail or 'paused'}; wake-ups stay queued until the lane is resumed"
        if self.provider is None:
            return f"there is no credential that can be used: {self.problem}. Wake-ups stay queued until there is one"
        match self.state:
            case LaneState.BROKEN:
                text = (
                    f"{self.provider.name} fails ({self._broken_by}): {self.advise(self._broken_by)}. "
                    "One wake-up is tried from time to time, the rest stay queued"
                )
            case LaneState.MISCONFIGURED:
                text = (
                    f"{self.provider.name} refuses ({self._broken_by}): {self.advise(self._broken_by)}. "
                    "Wake-ups stay queued; repair it, then `sealpush providers rotate` or `sealpush lanes resume`"
                )
            case _ if self._is_estranged:
                text = (
                    f"takes wake-ups, but the tokens of the last {len(self._strangers)} devices were none of this credential's "
                    f"({self._estranged_by}): "
                    f"{self.advise(self._estranged_by)}. Nothing was forgotten; repair it, then `sealpush lanes requeue`"
                )
            case _:
                text = "takes wake-ups"
        return (
            f"{text}. It pushes with the credential before, until its next restart; the stored one: {self.problem}"
            if self.problem
            else text
        )

    def advise(self, reason: str) -> str:
        """What a reason means and what to do about it."""
        return self.provider.advise(reason) if self.provider is not None else COMMON_ADVICE.get(reason, "")


class LaneSet:
    """The lanes of this process, by credential. Calls `on_change` when one was put, removed, paused or resumed."""

    def __init__(self, capacity: int, clock: Clock, random: Callable[[], float]) -> None:
        """`capacity`: wake-ups that one lane may hold."""
        self._capacity = capacity
        self._clock = clock
        self._random = random
        self._lanes: dict[LaneKey, Lane] = {}
        # Removed, but the mailbox may still hand out for them on old credit.
        self._removed: dict[LaneKey, Lane] = {}
        self.on_change: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def __len__(self) -> int:
        return len(self._lanes)

    def get(self, app_id: str, platform: int) -> Lane | None:
        return self._lanes.get((app_id, platform))

    def session_began(self) -> None:
        """As for each lane, also those that were removed: they may come back."""
        for lane in (*self._lanes.values(), *self._removed.values()):
            lane.session_began()

    def for_wake_up(self, app_id: str, platform: int) -> Lane | None:
        """The lane that takes back what the mailbox hands out, also when it was removed meanwhile."""
        key = (app_id, platform)
        return self._lanes.get(key) or self._removed.get(key)

    def put(self, app_id: str, platform: int) -> Lane:
        """The lane, made if there is none. It has no provider yet: see `Lane.use`."""
        key = (app_id, platform)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._removed.pop(key, None)
            if lane is None:
                lane = Lane(app_id, platform, capacity=self._capacity, clock=self._clock, random=self._random)
            else:
                lane.show_metrics()
            self._lanes[key] = lane
        return lane

    def remove(self, lane: Lane) -> Provider | None:
        """Push no more in this lane; gives the provider it used."""
        self._removed[lane.key] = self._lanes.pop(lane.key)
        lane.forget_metrics()
        provider = lane.lose("the credential was removed: put one with `sealpush providers add`")
        self.on_change()
        return provider

    def clock_moved(self, by: timedelta) -> None:
        """The wall clock was set: a lane that is stopped may have been stopped by nothing else, so it tries again at once."""
        closed = [lane for lane in self._lanes.values() if lane.closed_for is not None]
        for lane in closed:
            log.info("a stopped lane tries again, because the clock was set", app=lane.app_id, platform=lane.platform)
            lane.try_now()
        if closed:
            self.on_change()

    def apply(self, rows: Iterable[LaneRow]) -> None:
        """Take over what operators decided, at once."""
        changed = False
        for row in rows:
            lane = self._lanes.get((row.app_id, row.platform))
            if lane is not None:
                changed = lane.apply(row) or changed
        if changed:
            self.on_change()
