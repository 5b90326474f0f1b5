"""What is let in: as much as is finished in time, shared out between callers. The rest is refused at the door, early and cheaply.

Three rules, each a few lines of arithmetic without time or network of their own:

- **How much**: the limit follows how long work takes. Work that takes longer than it may makes the limit smaller; while it is in time
  and the limit is what holds it up, the limit grows. Nobody sets a number for a machine.
- **Whose**: a caller holds at most a multiple of what is free (the dynamic threshold of shared switch buffers, Choudhury and Hahne,
  1998). Alone it gets nearly everything; the more is taken, the less each may hold; a newcomer always finds room.
- **Until when**: a place is given back when the work has ended, which may be later than the call, and not before a call that its
  caller reset could have ended by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from prometheus_client import Counter

from sealpushd.platform.addresses import address_subject
from sealpushd.platform.errors import DeadlineExceeded, Overloaded, Rendered, render
from sealpushd.platform.metrics import ADMISSION_ADMITTED, ADMISSION_IN_FLIGHT, ADMISSION_LIMIT, ADMISSION_REFUSED
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller

# What a call may take before it counts as late: a tenth of the longest deadline, so that one that goes through several services, each
# with its own door, is still in time; and far more than a call takes on a machine that has nothing else to do.
IN_TIME_S: Final = 0.75
# A large request may take longer, as many small ones would, up to this.
IN_TIME_UNIT_S: Final = 0.04
IN_TIME_S_MAX: Final = 2.0
# Requests are weighed in units of so many bytes, one at the least: a batch of 256 messages is about 15, and takes about as long as 60
# messages one by one.
UNIT_BYTES: Final = 4_096
# Where the limit begins: above what any machine needs that was measured, because one that is too high is corrected within a second.
LIMIT_START: Final = 2_048
# Enough for natural batches to form, and for a few callers to have a place beside one that takes all it can.
LIMIT_MIN: Final = 32
# 32 MiB of requests, as units are weighed: a bound on memory.
LIMIT_MAX: Final = 8_192
# How often the limit moves, and by how much at once: a stall of a second halves it a few times, and it is back within five.
WINDOW_S: Final = 0.25
WINDOW_CALLS_MIN: Final = 8
SHRINK: Final = 0.7
GROW: Final = 1.25
# How soon what a call usually takes is half forgotten, unless it is measured again.
PACE_HALVED_S: Final = 1.0
# A call whose caller gave it less than this says nothing about the service when it is late.
FAIR_DEADLINE_S: Final = 0.1
# The part of the limit that callers from outside may fill: the rest is for the other services, whose calls carry work that was let in.
OUTSIDE_PART: Final = 0.75
# A caller holds at most so many times what is free. Alone it gets eight ninths, with another as greedy one eight seventeenths each.
SHARE: Final = 8
# A phone has a handful of calls on the way; an address may be a mobile gateway with thousands of them.
DEVICE_IN_FLIGHT_MAX: Final = 32
ADDRESS_IN_FLIGHT_MAX: Final = 128
# A call that was reset keeps its place for as long as it might have taken: resetting gives nobody more than waiting for the answer would.
RESET_HOLD_S: Final = 1.0
# Those refused together are asked to come back spread over a second.
_RETRY_AFTER_S: Final = (1.0, 2.0)
_RENDERED: Final = 32

_FULL: Final = "full"
_SHARE: Final = "share"
_DEADLINE: Final = "deadline"
_REFUSALS: Final = {
    _FULL: "more is being worked on here than can be finished in time; try again after the time in RetryInfo",
    _SHARE: "this caller's share of the work that can be finished in time is used up; wait for answers, or try again after the time "
    "in RetryInfo",
    _DEADLINE: "the deadline would end before the work; try again after the time in RetryInfo, or give the call more time",
}


class Refused(Overloaded):
    """Not let in. Most of an overload is refusals, so they are rendered beforehand."""

    def __init__(self, reason: str) -> None:
        super().__init__(_REFUSALS[reason])
        self.rendered = random.choice(_rendered(reason))  # noqa: S311 - spreads retries


_kept: dict[str, list[Rendered]] = {}


def _rendered(reason: str) -> list[Rendered]:
    kept = _kept.get(reason)
    if kept is None:
        shortest, longest = _RETRY_AFTER_S
        step = (longest - shortest) / _RENDERED
        kept = _kept[reason] = [render(Overloaded(_REFUSALS[reason], retry_after_s=shortest + n * step)) for n in range(_RENDERED)]
    return kept


@dataclass(frozen=True, slots=True)
class Party:
    """Whom a call is counted for. `most` bounds a kind of caller whatever is free; the mesh is bounded by the limit alone."""

    key: Hashable
    kind: str
    most: float
    is_mesh: bool = False


def party_of(caller: Caller | None, address: str) -> Party:
    """Whom to count a call for: the device, sender or service that makes it; a stranger by the address."""
    match caller:
        case SenderCaller():
            return _party(caller.sender_id, "sender", LIMIT_MAX)
        case DeviceCaller():
            return _party(caller.device_id, "device", DEVICE_IN_FLIGHT_MAX)
        case ServiceCaller():
            return _party(caller.name, "service", LIMIT_MAX, is_mesh=True)
    return _party(address_subject(address), "address", ADDRESS_IN_FLIGHT_MAX)


# Made for each call anew they are a tenth of what the door costs.
_party = lru_cache(maxsize=4_096)(Party)


def allowance_s(cost: int) -> float:
    """How long work of so many units may take to be in time."""
    return min(IN_TIME_S_MAX, IN_TIME_S + IN_TIME_UNIT_S * (cost - 1))


class End(enum.Enum):
    """How a call ended, as far as it says something about the load."""

    DONE = enum.auto()
    # Refused for what it asked, or by a fault: quick or slow, that is no measure of the work.
    FAILED = enum.auto()
    LATE = enum.auto()
    # A service behind this one refused it as overloaded: what is let in here is too much there.
    SHED = enum.auto()
    # Its caller went away.
    RESET = enum.auto()

    @classmethod
    def by(cls, error: BaseException) -> End:
        """How work ended that raised this."""
        match error:
            case TimeoutError() | DeadlineExceeded():
                return cls.LATE
            case Overloaded():
                return cls.SHED
            case asyncio.CancelledError() | GeneratorExit():
                return cls.RESET
            case _:
                return cls.FAILED


class AdaptiveLimit:
    """How many units may be in flight. `now` is any clock's seconds that only go forward."""

    def __init__(self, start: float = LIMIT_START) -> None:
        self.units = float(start)
        self._since: float | None = None
        self._lateness = 0.0
        self._calls = 0
        self._most = 0.0

    def filled(self, in_flight: float) -> None:
        """So much was in flight."""
        self._most = max(self._most, in_flight)

    def ended(self, lateness: float, now: float) -> None:
        """A piece of work took `lateness` times what it may."""
        if self._since is None:
            self._since = now
        self._lateness += lateness
        self._calls += 1
        if self._calls < WINDOW_CALLS_MIN or now - self._since < WINDOW_S:
            return
        # Where less than half of it is taken, the limit is not what makes work late, nor what holds it up: a database or a vendor is.
        if self._most >= self.units / 2:
            factor = 1 / max(self._lateness / self._calls, 1e-9)
            self.units = min(LIMIT_MAX, max(LIMIT_MIN, self.units * min(GROW, max(SHRINK, factor))))
        self._since, self._lateness, self._calls, self._most = now, 0.0, 0, 0.0


class Pace:
    """How long calls of one method take at present. What was measured is forgotten, and not by the number of refusals: what is always
    refused is never measured, and those who hold back after refusals would not come often enough."""

    def __init__(self) -> None:
        self._usual_s = 0.0
        self._at = 0.0

    def usual_s(self, now: float) -> float:
        return self._usual_s * math.exp2((self._at - now) / PACE_HALVED_S)

    def took(self, seconds: float, now: float) -> None:
        usual_s = self.usual_s(now)
        self._usual_s, self._at = usual_s + (seconds - usual_s) / 16, now

    def allows(self, remaining_s: float, now: float) -> bool:
        """Whether there is hope to be done in so many seconds."""
        return remaining_s >= self.usual_s(now) / 2


class Place:
    """A caller's place among the work in flight, from being let in until the last work for it has ended."""

    __slots__ = ("_began", "_cost", "_door", "_holds", "_pace", "_resting", "_token", "party")

    def __init__(self, door: Door, party: Party, cost: int, pace: Pace | None, began: float) -> None:
        self.party = party
        self._door = door
        self._cost = cost
        self._pace = pace
        self._began = began
        self._holds = 1
        self._resting = False

    def weigh(self, size: int) -> None:
        """The request turned out to have so many bytes. Never more than a quarter of the limit: the largest must get in, too."""
        if self._holds:
            more = int(min(max(1, size // UNIT_BYTES), self._door.limit.units / 4)) - self._cost
            if more:
                self._cost += more
                self._door.count(self.party, more)

    def hold(self) -> bool:
        """Work for this call begins that may outlast it: its place is kept until `release`. False: it has given its place back."""
        if self._holds:
            self._holds += 1
        return self._holds > 0

    def release(self) -> None:
        """Work that held the place has ended."""
        self._holds -= 1
        if not self._holds:
            self._door.count(self.party, -self._cost)
            self._door.wake()

    def rest(self) -> None:
        """From here on the call waits for something to happen and does no work: its place is given back, its time says nothing."""
        if not self._resting:
            self._resting = True
            self.release()

    def leave(self, end: End) -> None:
        """The call has ended."""
        if self._resting:
            return
        self._resting = True
        self._door.left(self._began, self._cost, self._pace, end)
        if end is End.RESET:
            self._door.later(RESET_HOLD_S, self.release)
        else:
            self.release()


# Callers who wait, whose turn it is first; and of each its turns with the sizes of the requests, in the order they came.
_Waiting = dict[Hashable, tuple[Party, deque[tuple[asyncio.Future[Place], int]]]]


class Door:
    """Lets calls in, or refuses them. One a process: whatever listens there shares its event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], Any] | None = None,
        limit: AdaptiveLimit | None = None,
    ) -> None:
        self.limit = limit or AdaptiveLimit()
        self.in_flight = 0
        self._clock = clock
        self._later = later
        self._held: dict[Hashable, int] = {}
        # Of the mesh and of others, who may fill less.
        self._waiting: dict[bool, _Waiting] = {True: {}, False: {}}
        # Asked when somebody looks: setting them cost more than all else here.
        ADMISSION_LIMIT.set_function(lambda: self.limit.units)
        ADMISSION_IN_FLIGHT.set_function(lambda: self.in_flight)
        # Label look-ups cost more than the counting.
        self._refusals: dict[tuple[str, str], Counter] = {}

    def later(self, seconds: float, then: Callable[[], None]) -> None:
        (self._later or asyncio.get_running_loop().call_later)(seconds, then)

    def held(self, party: Party) -> int:
        """Units that the caller has in flight."""
        return self._held.get(party.key, 0)

    def check_full(self, *, is_mesh: bool) -> None:
        """Raises Refused where nobody gets in: before a token, which may be anybody's, is looked at."""
        if self._free(is_mesh) < 1:
            raise self._refused(_FULL, "service" if is_mesh else "unknown")

    def check(self, party: Party) -> None:
        """Raises Refused when this caller does not get in at present."""
        reason = self._reason(party)
        if reason is not None:
            raise self._refused(reason, party.kind)

    def enter(self, party: Party, remaining_s: float | None = None, pace: Pace | None = None) -> Place:
        """A place for a call; raises Refused, or DeadlineExceeded when nobody waits for it any more."""
        if remaining_s is not None:
            if remaining_s <= 0:
                raise DeadlineExceeded("the deadline ended before the work began; try again with the same request id")
            if pace is not None and not pace.allows(remaining_s, self._clock()):
                raise self._refused(_DEADLINE, party.kind)
        self.check(party)
        return self._take(party, 1, pace)

    async def wait(self, party: Party, size: int = 0) -> Place:
        """A place for a piece of a stream's work, as soon as there is one: who streams is slowed down and not refused."""
        if self._reason(party) is None:
            return self._take(party, 1, None, size)
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        _, turns = self._waiting[party.is_mesh].setdefault(party.key, (party, deque()))
        turns.append((turn, size))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It was this one's turn: the next one's, then.
                turn.result().release()
            raise

    def wake(self) -> None:
        """There may be room: give it to those who wait, a place each in turn. Whose share is used up holds up nobody behind it."""
        for is_mesh, waiting in self._waiting.items():
            while waiting and self._free(is_mesh) >= 1 and self._give_one(waiting):
                pass

    def _give_one(self, waiting: _Waiting) -> bool:
        first = next((each for each in waiting.values() if self._reason(each[0]) is None), None)
        if first is None:
            return False
        party, turns = first
        # To the end: so callers take turns.
        del waiting[party.key]
        while turns:
            turn, size = turns.popleft()
            if not turn.done():  # else cancelled
                # Now, and not when it runs: who comes meanwhile would take it.
                turn.set_result(self._take(party, 1, None, size))
                break
        if turns:
            waiting[party.key] = party, turns
        return True

    def count(self, party: Party, units: int) -> None:
        """The caller has so many more in flight."""
        self.in_flight += units
        held = self._held.get(party.key, 0) + units
        if held:
            self._held[party.key] = held
        else:
            self._held.pop(party.key, None)
        self.limit.filled(self.in_flight)

    def left(self, began: float, cost: int, pace: Pace | None, end: End) -> None:
        """Learn from a call that ended."""
        now = self._clock()
        took_s = now - began
        if end in (End.FAILED, End.RESET) or (end is End.LATE and took_s < FAIR_DEADLINE_S):
            return
        lateness = took_s / allowance_s(cost)
        if end is not End.DONE:
            # Nobody has anything of it, whatever is usual.
            lateness = max(2.0, lateness)
        if end is not End.SHED and pace is not None:
            pace.took(took_s, now)
        self.limit.ended(lateness, now)

    def _take(self, party: Party, cost: int, pace: Pace | None, size: int = 0) -> Place:
        self.count(party, cost)
        ADMISSION_ADMITTED.inc()
        place = Place(self, party, cost, pace, self._clock())
        place.weigh(size)
        return place

    def _free(self, is_mesh: bool) -> float:
        return self.limit.units * (1.0 if is_mesh else OUTSIDE_PART) - self.in_flight

    def _reason(self, party: Party) -> str | None:
        free = self._free(party.is_mesh)
        if free < 1:
            return _FULL
        held = self._held.get(party.key, 0)
        return None if party.is_mesh or held < min(party.most, SHARE * free) else _SHARE

    def _refused(self, reason: str, kind: str) -> Refused:
        counter = self._refusals.get((reason, kind))
        if counter is None:
            counter = self._refusals[reason, kind] = ADMISSION_REFUSED.labels(reason, kind)
        counter.inc()
        return Refused(reason)


# Where the present stream came in, and for whom.
_visit: ContextVar[tuple[Door, Party]] = ContextVar("visit")
# The present call's, or that of the present piece of a stream. None outside of calls: what runs beside them bounds itself.
_place: ContextVar[Place | None] = ContextVar("place", default=None)
# When the present work is of no use any more, in seconds of `time.monotonic`.
_deadline_at: ContextVar[float | None] = ContextVar("deadline_at", default=None)


def place() -> Place | None:
    return _place.get()


def deadline_at() -> float | None:
    return _deadline_at.get()


def visiting(door: Door, party: Party) -> None:
    """The present task answers a stream of this caller."""
    _visit.set((door, party))


def working(place: Place | None, deadline_at: float | None) -> None:
    """What the present task does from now on it does for this place, until this time."""
    _place.set(place)
    _deadline_at.set(deadline_at)


def remaining_s(longest_s: float) -> float:
    """Seconds that the present work has left, at most so many. Raises DeadlineExceeded when there are none."""
    ends_at = _deadline_at.get()
    if ends_at is None:
        return longest_s
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline ended before the work; try again with the same request id")
    return min(left_s, longest_s)


def rest() -> None:
    """The present call only waits from here on, as `Place.rest`."""
    held = _place.get()
    if held is not None:
        held.rest()


def hold_until_done(work: asyncio.Future[Any]) -> None:
    """This work goes on also when the present call is reset: the caller's place is kept until it has ended."""
    held = _place.get()
    if held is not None and held.hold():
        work.add_done_callback(lambda _: held.release())


@contextlib.asynccontextmanager
async def turn(size: int = 0) -> AsyncIterator[None]:
    """A piece of this stream's work, of a request of so many bytes: begins when there is a place for it.

    A stream that only waits takes no place, so that any number may be open; what it makes the service do takes one as a call does.
    """
    door, party = _visit.get()
    held = await door.wait(party, size)
    _place.set(held)
    end = End.DONE
    try:
        yield
    except BaseException as e:
        end = End.by(e)
        raise
    finally:
        held.leave(end)
        _place.set(None)
