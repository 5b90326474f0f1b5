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

from sealpush.errors import CallFailed, DeadlineExceeded, Overloaded, ServerFault, Unavailable

Answer = TypeVar("Answer")
Random = Callable[[], float]  # uniform in [0, 1)

jitter: Final[Random] = random.SystemRandom().random

# What is left of a deadline for its last attempt: an answer takes milliseconds, from a machine that is busy some hundred.
LAST_ATTEMPT_S: Final = 0.5
# With less than this no further attempt is worth its way.
ATTEMPT_S_MIN: Final = 0.2


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
    """How patient to be. A call's deadline ends its attempts; `attempts_max` is a bound on accidents, such as a dice that only shows
    zeros. Long-lived streams go on for ever."""

    base_s: float = 0.2
    cap_s: float = 30.0
    attempts_max: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.base_s <= self.cap_s and self.attempts_max >= 1):
            raise ValueError("base_s must be positive and at most cap_s, and attempts_max 1 or more")

    def delay_s(self, attempt: int, random: Random = jitter, retry_after_s: float | None = None) -> float:
        """The pause after the attempt with this number, counted from 0."""
        ceiling = min(self.cap_s, self.base_s * 2.0 ** min(attempt, 32))
        return max(retry_after_s or 0.0, 0.0) + random() * ceiling

    def fitting_delay_s(
        self, attempt: int, remaining_s: float, random: Random = jitter, retry_after_s: float | None = None
    ) -> float | None:
        """As `delay_s()`, cut so that the next attempt comes before the end of what remains, with time to be answered; None: there is
        no next attempt. What the service asked for is never cut: an attempt before that would be refused again."""
        longest_s = max(remaining_s - LAST_ATTEMPT_S, remaining_s / 2)
        if attempt + 1 >= self.attempts_max or remaining_s < ATTEMPT_S_MIN or (retry_after_s or 0.0) > longest_s:
            return None
        return min(self.delay_s(attempt, random, retry_after_s), longest_s)


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


class Attempts:
    """The attempts of one call that failed so far: when there is another, and what they say together when there is none."""

    __slots__ = ("_deadline", "_failed", "_policy", "_random", "_unknown")

    def __init__(self, deadline: Deadline, policy: RetryPolicy, random: Random = jitter) -> None:
        self._deadline = deadline
        self._policy = policy
        self._random = random
        self._failed = 0
        self._unknown: CallFailed | None = None

    async def failed(self, error: CallFailed) -> None:
        """Return after the pause before the next attempt. Raises the error if there is none; where that says that nothing was done, and an
        attempt before it may have done something, the error of that one."""
        if isinstance(error, Unavailable | DeadlineExceeded | ServerFault):
            self._unknown = error
        delay_s = None
        if error.retryable:
            delay_s = self._policy.fitting_delay_s(self._failed, self._deadline.remaining_s(), self._random, error.retry_after_s)
        if delay_s is None:
            if isinstance(error, Overloaded) and self._unknown is not None:
                unknown = self._unknown
                raise type(unknown)(
                    str(unknown), code=unknown.code, server_reason=unknown.server_reason, retry_after_s=error.retry_after_s
                ) from error
            raise error
        self._failed += 1
        await self._deadline.clock.sleep(delay_s)


async def retrying(
    attempt: Callable[[], Awaitable[Answer]],
    *,
    deadline: Deadline,
    policy: RetryPolicy,
    random: Random = jitter,
) -> Answer:
    """The first answer of `attempt`, called again after each retryable CallFailed while attempts and deadline allow.

    Raises as `Attempts.failed()` when there is no time for another.
    """
    attempts = Attempts(deadline, policy, random)
    while True:
        try:
            return await attempt()
        except CallFailed as error:
            await attempts.failed(error)
