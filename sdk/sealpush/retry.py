"""When to try again: time as a collaborator, deadlines, full jitter, and the loop that uses them.

Full jitter (AWS, "Exponential Backoff And Jitter"): the n-th pause is a random part of base × 2ⁿ, at most the cap, so that a
thousand phones that lost the same server do not come back in step. A pause that the service asked for is kept, and the
random part comes on top.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from sealpush.errors import CallFailed, DeadlineExceeded

Answer = TypeVar("Answer")
Random = Callable[[], float]  # uniform in [0, 1)

jitter: Final[Random] = random.SystemRandom().random


class Clock(Protocol):
    """Time, so that tests move it."""

    def now_ms(self) -> int:
        """This machine's wall clock in Unix milliseconds; it may be wrong."""
        ...

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""
        ...


class SystemClock:
    """The machine's own time."""

    __slots__ = ()

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient to be. `attempts_max` bounds one call together with its deadline; long-lived streams go on for ever."""

    base_s: float = 0.2
    cap_s: float = 30.0
    attempts_max: int = 8

    def __post_init__(self) -> None:
        if not (0 < self.base_s <= self.cap_s and self.attempts_max >= 1):
            raise ValueError("base_s must be positive and at most cap_s, and attempts_max 1 or more")

    def delay_s(self, attempt: int, random: Random = jitter, retry_after_s: float | None = None) -> float:
        """The pause after the attempt with this number, counted from 0."""
        ceiling = min(self.cap_s, self.base_s * 2.0 ** min(attempt, 32))
        return max(retry_after_s or 0.0, 0.0) + random() * ceiling


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of a clock by which something must be done."""

    clock: Clock
    at: float  # of clock.monotonic()

    @classmethod
    def after(cls, clock: Clock, seconds: float) -> "Deadline":
        """The deadline so many seconds from now."""
        return cls(clock, clock.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - self.clock.monotonic())

    def timeout_s(self, longest_s: float) -> float:
        """Seconds left, at most so many. Raises DeadlineExceeded if none are."""
        remaining_s = self.remaining_s()
        if remaining_s <= 0:
            raise DeadlineExceeded("the time given for this is over; try again with more", code="DEADLINE_EXCEEDED")
        return min(remaining_s, longest_s)


async def retrying(
    attempt: Callable[[], Awaitable[Answer]],
    *,
    deadline: Deadline,
    policy: RetryPolicy,
    random: Random = jitter,
) -> Answer:
    """The first answer of `attempt`, called again after each retryable CallFailed while attempts and deadline allow.

    Raises the last error when the next attempt would begin after the deadline.
    """
    clock = deadline.clock
    for number in range(policy.attempts_max):
        try:
            return await attempt()
        except CallFailed as error:
            delay_s = policy.delay_s(number, random, error.retry_after_s)
            if not error.retryable or number + 1 == policy.attempts_max or delay_s >= deadline.remaining_s():
                raise
        await clock.sleep(delay_s)
    raise AssertionError("unreachable: the last attempt returns or raises")
