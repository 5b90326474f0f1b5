"""What follows from a push service's answer: pure functions, `now` and the dice are arguments.

`now` is of the steady clock, in seconds, and what is to come is a delay: nothing here waits longer because somebody set the clock.
"""

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

# After so many sends a delivery is quarantined for push; it stays fetchable.
ATTEMPTS_MAX = 8
# Full jitter between 0 and 5 s · 2^(attempt-1), so the eighth attempt comes within about ten minutes. An outage longer
# than that is the circuit breaker's business: while a lane is broken, no attempts are spent.
BACKOFF_BASE = timedelta(seconds=5)
# A stopped lane tries one delivery again after this; whoever repairs the settings resumes it by hand earlier.
LANE_RETRY = timedelta(minutes=5)
# So many failures in a row open a lane's breaker: more than a dropped connection under a few sends, less than a frame.
FAILURES_MAX = 10
# Full jitter between 0 and 1 s · 2^(openings-1) until one wake-up is tried again.
REOPEN_BASE = timedelta(seconds=1)
REOPEN_MAX = timedelta(minutes=1)
# What is on the way at once is halved so often at the most: what was sent together fails together.
HALVING_PERIOD = timedelta(seconds=1)
# So many tokens in a row that are not of this app, and none that is, are more likely one wrong credential than many wrong phones.
STRANGERS_MAX = 20


@dataclass(frozen=True, slots=True)
class Pushed:
    """The push service has it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Send again, not earlier than after this."""

    delay: timedelta
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
    """Alarm, and send nothing for this app and push service for `pause`; the delivery goes back to the queue."""

    reason: str
    pause: timedelta


Decision = Pushed | Retry | TokenDead | Quarantine | StopLane


def decide(outcome: Outcome, attempt: int, random: Callable[[], float]) -> Decision:
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
            return Retry((retry_after or timedelta(0)) + backoff(attempt, random), reason)
        case RefreshAuth(reason=reason) | Misconfigured(reason=reason):
            return StopLane(reason, LANE_RETRY)
        case _:
            assert_never(outcome)


def backoff(attempt: int, random: Callable[[], float]) -> timedelta:
    """Full jitter: uniform between nothing and a ceiling that doubles with each attempt, about 11 minutes before the last."""
    doublings = min(max(attempt - 1, 0), ATTEMPTS_MAX - 1)
    return BACKOFF_BASE * (1 << doublings) * random()


def excuse_lane(outcome: Outcome, *, topic_of_lane: bool) -> Outcome:
    """The outcome, except that an installation which names a topic of its own cannot stop its app's lane.

    A registration carries the topic, so anybody's phone could; what is wrong with such a topic is tried again a few times
    and then quarantined, for this delivery only.
    """
    if isinstance(outcome, Misconfigured) and not topic_of_lane:
        return RetryAt(outcome.reason)
    return outcome


def excuse_new_credential(decision: Decision, attempt: int) -> Decision:
    """The decision, when the credential was replaced while the send was under way.

    That the old one was refused, or that a token is not the old one's, says nothing of the new one: it tries at once.
    """
    match decision:
        case StopLane(reason=reason) | TokenDead(certain=False, reason=reason) if attempt < ATTEMPTS_MAX:
            return Retry(timedelta(0), reason)
        case _:
            return decision


class Evidence(Enum):
    """What an outcome says of the push service and the way to it."""

    WORKS = "works"
    FAILS = "fails"
    NOTHING = "nothing"


def evidence(outcome: Outcome) -> Evidence:
    """What an outcome, as the provider gave it, says of the push service.

    Nothing, where the push service was not asked or where credentials or a topic are at fault: what a registration can bring
    about must neither break a lane nor make a broken one look well.
    """
    if not outcome.asked:
        return Evidence.NOTHING
    match outcome:
        case RetryAt(of_device=False):
            return Evidence.FAILS
        case Misconfigured() | RefreshAuth():
            return Evidence.NOTHING
        case _:
            return Evidence.WORKS


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
    # Of the steady clock.
    open_until: float | None = None

    def circuit(self, now: float) -> Circuit:
        if self.open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self.open_until else Circuit.HALF_OPEN

    def succeeded(self, *, probe: bool) -> Breaker:
        """After an answer that shows the push service at work. `probe`: it was the one try of a half-open circuit.

        While the circuit is not closed, only the probe counts: what was sent before it opened says nothing about now.
        """
        return Breaker() if probe or self.open_until is None else self

    def failed(self, now: float, random: Callable[[], float], *, probe: bool, retry_after: timedelta | None = None) -> Breaker:
        """After a failure of the lane; see `succeeded`. `random` gives [0, 1).

        The breaker does not close before `retry_after`, what the push service asked for with this failure.
        """
        if self.open_until is not None and not probe:
            return self
        if not probe and self.failures + 1 < FAILURES_MAX:
            return replace(self, failures=self.failures + 1)
        openings = self.openings + 1
        ceiling = min(REOPEN_BASE * (1 << min(openings - 1, 16)), REOPEN_MAX)
        return Breaker(0, openings, now + ((retry_after or timedelta(0)) + ceiling * random()).total_seconds())

    def stopped(self, now: float, pause: timedelta) -> Breaker:
        """Opened for a known time, whatever went before."""
        return Breaker(0, self.openings, now + pause.total_seconds())


# Slowing down


@dataclass(frozen=True, slots=True)
class Window:
    """How many wake-ups may be on the way at once: all of the capacity, less when the push service cannot take them.

    As TCP does it: one more with every success, half with a failure, one after the breaker opened. So a push service that
    answers 429 or 503 is not asked in bursts.
    """

    size: int
    capacity: int
    # Of the steady clock.
    halved_at: float | None = None

    @classmethod
    def whole(cls, capacity: int) -> Window:
        return cls(capacity, capacity)

    def grown(self) -> Window:
        """After a success."""
        return self if self.size == self.capacity else replace(self, size=self.size + 1)

    def halved(self, now: float) -> Window:
        """After a failure of the lane."""
        if self.halved_at is not None and now - self.halved_at < HALVING_PERIOD.total_seconds():
            return self
        return replace(self, size=max(self.size // 2, 1), halved_at=now)

    def shut(self) -> Window:
        """After the breaker opened."""
        return replace(self, size=1)
