"""Lanes: one a platform of an app, each with a provider, a bound on what it holds, a breaker and an operator's switch.

A lane knows how many more wake-ups it can take (`take_credit`) and whether the next one may be sent (`admit`). It does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from sealpush.v1 import common_pb2
from sealpushd.dispatch.providers.base import Misconfigured, Outcome, Provider, RefreshAuth
from sealpushd.dispatch.rules import Breaker, Circuit, Decision, Pushed, Quarantine, Retry, StopLane, TokenDead, fails_lane
from sealpushd.dispatch.store import LaneRow
from sealpushd.platform.clock import Clock
from sealpushd.platform.metrics import WAKE_UPS

log = structlog.get_logger()

LaneKey = tuple[str, int]
"""App id and platform number."""

# A paused lane hands wake-ups back that the mailbox had sent on old credit; they come again after this.
PAUSED_RETRY: Final = timedelta(seconds=2)
# While the one try of a half-open lane runs, others wait this long.
PROBING_RETRY: Final = timedelta(seconds=1)

# Credit is given back by this part of the capacity at the least.
CREDIT_SHARE: Final = 4

_HELD = Gauge("sealpush_lane_held", "Wake-ups that dispatch holds, by lane.", ["app", "platform"])
_SENDING = Gauge("sealpush_lane_in_flight", "Wake-ups on the way to the push service, by lane.", ["app", "platform"])
_OPEN = Gauge("sealpush_lane_open", "1: the lane takes wake-ups; 0: paused, broken or misconfigured.", ["app", "platform"])


def platform_label(platform: int) -> str:
    """The platform as metrics name it, "ios"; its number when it is newer than this program."""
    try:
        return common_pb2.Platform.Name(common_pb2.Platform.ValueType(platform)).removeprefix("PLATFORM_").lower()
    except ValueError:
        return str(platform)


class LaneState(Enum):
    """As in the proto."""

    OPEN = 1
    PAUSED = 2
    BROKEN = 3
    MISCONFIGURED = 4


@dataclass(frozen=True, slots=True)
class Send:
    """Send it. `probe`: it is the one try of a half-open lane."""

    probe: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Give it back untried, to come again at this time."""

    retry_at: datetime
    reason: str


@dataclass(slots=True)
class Counts:
    """Since the process started."""

    accepted: int = 0
    retried: int = 0
    dead_tokens: int = 0
    quarantined: int = 0


class Lane:
    """One lane. `topic` is where installations without one of their own belong; `capacity` bounds what it holds."""

    def __init__(
        self,
        app_id: str,
        platform: int,
        provider: Provider,
        *,
        topic: str,
        capacity: int,
        clock: Clock,
        random: Callable[[], float],
    ) -> None:
        self.key: LaneKey = (app_id, platform)
        self.app_id = app_id
        self.platform = platform
        self.provider = provider
        self.topic = topic
        self.counts = Counts()
        # Received and not yet reported, and of those: being sent.
        self.held = 0
        self.sending = 0
        self._capacity = capacity
        self._clock = clock
        self._random = random
        # Credit that the mailbox has and did not use.
        self._granted = 0
        self._breaker = Breaker()
        self._probing = False
        self._paused = False
        self._pause_detail = ""
        self._resumed_at: datetime | None = None
        # The last word of whatever broke the lane or stopped it.
        self._broken_by = ""
        self._misconfigured = False
        self._labels = labels = (app_id, platform_label(platform))
        # Label look-ups cost more than counting: remember the children.
        self._wake_ups: dict[str, Counter] = {}
        _HELD.labels(*labels).set_function(lambda: self.held)
        _SENDING.labels(*labels).set_function(lambda: self.sending)
        _OPEN.labels(*labels).set_function(lambda: self.state is LaneState.OPEN)

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
        if self._paused:
            return 0
        match self._breaker.circuit(self._clock.now()):
            case Circuit.CLOSED:
                return self._capacity
            case Circuit.HALF_OPEN:
                return 1
            case Circuit.OPEN:
                return 0

    # Sending

    def refusal(self) -> Release | None:
        """Why nothing can be sent now; None: it can."""
        now = self._clock.now()
        if self._paused:
            return Release(now + PAUSED_RETRY, "lane-paused")
        circuit = self._breaker.circuit(now)
        if circuit is Circuit.OPEN:
            assert self._breaker.open_until is not None  # noqa: S101 - that is what open means
            return Release(self._breaker.open_until, "lane-broken")
        if circuit is Circuit.HALF_OPEN and self._probing:
            return Release(now + PROBING_RETRY, "lane-broken")
        return None

    def admit(self) -> Send | Release:
        """Whether the next one is sent. After Send, exactly one of `observe` and `abandon` must follow."""
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        probe = self._breaker.circuit(self._clock.now()) is Circuit.HALF_OPEN
        self._probing = self._probing or probe
        self.sending += 1
        return Send(probe)

    def abandon(self, send: Send) -> None:
        """The send ended without an outcome."""
        self.sending -= 1
        if send.probe:
            self._probing = False

    def observe(self, send: Send, outcome: Outcome, decision: Decision, *, topic_of_lane: bool) -> None:
        """Take the outcome of a send into account."""
        self.abandon(send)
        before = self._breaker
        now = self._clock.now()
        if isinstance(decision, StopLane):
            self._breaker = before.stopped(decision.retry_at)
            self._misconfigured = True
        elif fails_lane(outcome, topic_of_lane=topic_of_lane):
            self._breaker = before.failed(now, self._random, probe=send.probe)
            if self._breaker.open_until != before.open_until:
                self._misconfigured = False
        elif not isinstance(outcome, Misconfigured | RefreshAuth):
            # (Those two were quarantined after the last attempt: neither for nor against the lane.)
            self._breaker = before.succeeded(probe=send.probe)
        if self._breaker.open_until is not None and self._breaker.open_until != before.open_until:
            self._broken_by = outcome.reason
            if before.open_until is None:
                kind = "stopped: credentials or settings are wrong" if self._misconfigured else "broken: failures in a row"
                log.error(f"a lane is {kind}", app=self.app_id, platform=self.platform, reason=outcome.reason)  # noqa: G004 - two fixed texts
        elif before.open_until is not None and self._breaker.open_until is None:
            self._broken_by, self._misconfigured = "", False
            log.info("a lane works again", app=self.app_id, platform=self.platform)
        match decision:
            case Pushed():
                self.counts.accepted += 1
            case Retry() | StopLane():
                self.counts.retried += 1
            case TokenDead(certain=True):
                self.counts.dead_tokens += 1
            case Quarantine() | TokenDead():
                self.counts.quarantined += 1

    # The operator's switch

    def apply(self, row: LaneRow) -> bool:
        """Take over what operators decided; returns whether that changed something."""
        changed = False
        if row.resumed_at is not None and (self._resumed_at is None or row.resumed_at > self._resumed_at):
            # The first row seen is history: nothing is broken yet that it could repair.
            self._resumed_at = row.resumed_at
            self._breaker, self._misconfigured, self._broken_by = Breaker(), False, ""
            changed = True
        if row.paused != self._paused:
            self._paused = row.paused
            changed = True
            log.info("a lane was paused" if row.paused else "a lane was resumed", app=self.app_id, platform=self.platform)
        self._pause_detail = row.detail
        return changed

    # What operators see

    @property
    def closed_until(self) -> datetime | None:
        """When a broken or stopped lane tries again; None: it is not, or it is paused."""
        return None if self._paused else self._breaker.open_until

    @property
    def state(self) -> LaneState:
        if self._paused:
            return LaneState.PAUSED
        if self._breaker.open_until is None:
            return LaneState.OPEN
        return LaneState.MISCONFIGURED if self._misconfigured else LaneState.BROKEN

    @property
    def detail(self) -> str:
        """What the state means and what to do."""
        match self.state:
            case LaneState.OPEN:
                return "takes wake-ups"
            case LaneState.PAUSED:
                return f"{self._pause_detail or 'paused'}; wake-ups stay queued until the lane is resumed"
            case LaneState.BROKEN:
                return (
                    f"{self.provider.name} fails ({self._broken_by}); one wake-up is tried from time to time, the rest stay queued. "
                    "Check the network and the push service's status page"
                )
            case LaneState.MISCONFIGURED:
                return (
                    f"{self.provider.name} refuses this installation's credentials or topic ({self._broken_by}); "
                    "correct the settings, restart or resume the lane"
                )


class LaneSet:
    """The lanes of this process. Calls `on_change` when a lane was paused or resumed."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self._lanes = {lane.key: lane for lane in lanes}
        self.on_change: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, app_id: str, platform: int) -> Lane | None:
        return self._lanes.get((app_id, platform))

    def apply(self, rows: Iterable[LaneRow]) -> None:
        """Take over what operators decided, at once."""
        changed = False
        for row in rows:
            lane = self._lanes.get((row.app_id, row.platform))
            if lane is not None:
                changed = lane.apply(row) or changed
        if changed:
            self.on_change()
