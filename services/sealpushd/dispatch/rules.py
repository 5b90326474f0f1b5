"""What follows from a push service's answer: pure functions, `now` and the dice are arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import assert_never

from sealpushd.dispatch.providers.base import (
    Accepted,
    Bug,
    Misconfigured,
    Outcome,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
)

# After so many sends a delivery is quarantined for push; it stays fetchable (DELIVERY, "Dispatch").
ATTEMPTS_MAX = 8
# Full jitter between 0 and 5 s · 2^(attempt-1), so the eighth attempt comes within about ten minutes. An outage longer
# than that is the circuit breaker's business: while a lane is broken, no attempts are spent.
BACKOFF_BASE = timedelta(seconds=5)
BACKOFF_MAX = timedelta(minutes=15)
# A stopped lane tries one delivery again after this; whoever repairs the settings resumes it by hand earlier.
LANE_RETRY = timedelta(minutes=5)
# So many failures in a row open a lane's breaker: more than a dropped connection under a few sends, less than a frame.
FAILURES_MAX = 10
# Full jitter between 0 and 1 s · 2^(openings-1) until one wake-up is tried again.
REOPEN_BASE = timedelta(seconds=1)
REOPEN_MAX = timedelta(minutes=1)
# Answers that ask for patience with one device and say nothing of the lane.
OF_ONE_DEVICE = frozenset({"TooManyRequests", "gone-before-registration"})


@dataclass(frozen=True, slots=True)
class Pushed:
    """The push service has it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Send again, not earlier than this."""

    next_attempt_at: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class TokenDead:
    """The push leg ends. Report the token for compare-and-clear.

    `certain`: clear it if it is still the stored one and was registered before `gone_at` (None: before the answer).
    Not `certain`: set it aside until the device registers again, but keep it.
    """

    certain: bool
    gone_at: datetime | None
    reason: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """No more pushes for this delivery until an operator requeues it."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopLane:
    """Alarm, and send nothing for this app and push service until `retry_at`; the delivery goes back to the queue."""

    reason: str
    retry_at: datetime


Decision = Pushed | Retry | TokenDead | Quarantine | StopLane


def decide(outcome: Outcome, attempt: int, now: datetime, random: Callable[[], float]) -> Decision:
    """What to do after the `attempt`-th send (the first is 1) of one wake-up. `random` gives [0, 1).

    After the eighth attempt nothing is tried again, also not what stops a lane: otherwise one installation with a
    senseless topic would stop the lane of its app for ever.
    """
    match outcome:
        case Accepted():
            return Pushed()
        case TokenGone(reason=reason, at=at):
            return TokenDead(certain=True, gone_at=at, reason=reason)
        case TokenSuspect(reason=reason):
            return TokenDead(certain=False, gone_at=None, reason=reason)
        case Bug(reason=reason):
            return Quarantine(reason)
        case RetryAt() | RefreshAuth() | Misconfigured() if attempt >= ATTEMPTS_MAX:
            return Quarantine(outcome.reason)
        case RetryAt(reason=reason, retry_after=retry_after):
            return Retry(now + (retry_after or timedelta(0)) + backoff(attempt, random), reason)
        case RefreshAuth(reason=reason) | Misconfigured(reason=reason):
            return StopLane(reason, retry_at=now + LANE_RETRY)
        case _:
            assert_never(outcome)


def backoff(attempt: int, random: Callable[[], float]) -> timedelta:
    """Full jitter: uniform between nothing and a ceiling that doubles with each attempt, at most 15 minutes."""
    doublings = min(max(attempt - 1, 0), 16)
    return min(BACKOFF_BASE * (1 << doublings), BACKOFF_MAX) * random()


def excuse_lane(outcome: Outcome, *, topic_of_lane: bool) -> Outcome:
    """The outcome, except that an installation which names a topic of its own cannot stop its app's lane.

    A registration carries the topic, so anybody's phone could; what is wrong with such a topic is tried again a few times
    and then quarantined, for this delivery only.
    """
    if isinstance(outcome, Misconfigured) and not topic_of_lane:
        return RetryAt(outcome.reason)
    return outcome


def fails_lane(outcome: Outcome, *, topic_of_lane: bool) -> bool:
    """Whether the outcome speaks against the push service or the way to it, and not only of one device."""
    match outcome:
        case RetryAt(reason=reason):
            return topic_of_lane and reason not in OF_ONE_DEVICE
        case _:
            return False


# Circuit breaker


class Circuit(Enum):
    """Whether a lane may send."""

    CLOSED = "closed"
    OPEN = "open"
    # One wake-up may be tried; its outcome decides.
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """The circuit breaker of one lane. `openings` counts those since the last success and spaces out the tries."""

    failures: int = 0
    openings: int = 0
    open_until: datetime | None = None

    def circuit(self, now: datetime) -> Circuit:
        if self.open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self.open_until else Circuit.HALF_OPEN

    def succeeded(self, *, probe: bool) -> Breaker:
        """After an answer that shows the push service at work. `probe`: it was the one try of a half-open circuit.

        While the circuit is not closed, only the probe counts: what was sent before it opened says nothing about now.
        """
        return Breaker() if probe or self.open_until is None else self

    def failed(self, now: datetime, random: Callable[[], float], *, probe: bool) -> Breaker:
        """After a failure of the lane; see `succeeded`. `random` gives [0, 1)."""
        if self.open_until is not None and not probe:
            return self
        if not probe and self.failures + 1 < FAILURES_MAX:
            return replace(self, failures=self.failures + 1)
        openings = self.openings + 1
        ceiling = min(REOPEN_BASE * (1 << min(openings - 1, 16)), REOPEN_MAX)
        return Breaker(0, openings, now + ceiling * random())

    def stopped(self, until: datetime) -> Breaker:
        """Opened for a known time, whatever went before."""
        return Breaker(0, self.openings, until)
