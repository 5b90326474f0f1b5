"""Time as a collaborator, so that tests move it.

Two clocks, and one rule. The wall clock says what time it is; whoever sets it moves it, also backwards. The steady clock only counts
seconds. How long something lasts is measured by the steady clock. What is stored or sent is a moment of the wall clock, and whoever
reads it bounds how far ahead it can honestly be. Every use of the wall clock stands in `platform/timers.py`, and a test looks for others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, Self

# A wall clock that differs from the steady one by more was set. NTP turns a clock by half a second in 17 minutes at the most, and tokens
# allow for as much between two machines.
CLOCK_MOVED: Final = timedelta(seconds=30)
_CLOCK_MOVED_S: Final = CLOCK_MOVED.total_seconds()
# Two machines' clocks that differ by more are to be set, before it hurts: tokens allow for 30 s.
CLOCK_SKEW_MAX: Final = timedelta(seconds=10)
# A stored moment that one machine wrote and another reads lies further ahead than this only because a clock was wrong.
MOMENT_AHEAD_MAX: Final = timedelta(minutes=5)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class Clock(Protocol):
    def now(self) -> datetime:
        """The present moment, aware, in UTC. Whoever sets the clock moves it."""
        ...

    def epoch_s(self) -> float:
        """`now` in seconds since 1970: cheaper, for what every call asks."""
        ...

    def monotonic(self) -> float:
        """Seconds since some moment, which no setting of the clock changes: the only measure of how long something lasts."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def epoch_s(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Reading:
    """What both clocks said at one moment."""

    wall: datetime
    steady: float

    @classmethod
    def of(cls, clock: Clock) -> Self:
        return cls(clock.now(), clock.monotonic())

    def moved(self, clock: Clock) -> timedelta:
        """By how much the wall clock was set since; negative: back."""
        return timedelta(seconds=self._moved_s(clock))

    def was_set(self, clock: Clock) -> bool:
        """Whether the wall clock was set since: what was reckoned from it does not hold any more."""
        return abs(self._moved_s(clock)) > _CLOCK_MOVED_S

    def _moved_s(self, clock: Clock) -> float:
        return clock.epoch_s() - self.wall.timestamp() - (clock.monotonic() - self.steady)


def to_ms(moment: datetime) -> int:
    """Milliseconds since 1970-01-01 UTC."""
    # In whole numbers: a float's product may lie just below the millisecond that it stands for.
    return (moment - _EPOCH) // _MILLISECOND


def from_ms(milliseconds: int) -> datetime:
    """The moment for milliseconds since 1970-01-01 UTC; raises ValueError beyond the year 9999."""
    try:
        return _EPOCH + milliseconds * _MILLISECOND
    except OverflowError as e:
        raise ValueError(f"{milliseconds} ms is not a moment") from e
