"""When a sender falls back to another channel (an SMS, say): the rules V18 to V22, pure. Times are aware datetimes.

The course of one message:

    before_publish(memory, now)                    → Push, or AlternativeChannel at once
    … publish, waiting at most policy.response_timeout …
    after_publish(policy, answer, now)             → Push with the moment to ask for the status, AlternativeChannel, or HoldBack
    … at that moment ask for the status, waiting at most policy.response_timeout …
    after_status(policy, state, now)               → Delivered, or AlternativeChannel
    … before sending over the alternative channel, if `close_push` says so: cancel the message …
    after_cancel(state, fallback)                  → Delivered after all, or the same AlternativeChannel

`memory` is what is known of one client (a phone number, say): keep it beside the client, in any store, for as long as it
names a time. It is a value; each step returns the next one.
"""

import enum
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never

from sealpush.model import State
from sealpush.publication import Accepted, IdentityChanged, NotRegistered, PublishOutcome, Refused, Unanswered

_ZERO: Final = timedelta(0)


class FallbackReason(enum.Enum):
    """Why the alternative channel is used."""

    NOT_DELIVERED = "not_delivered"  # V18: the status was something else
    RECENTLY_NOT_DELIVERED = "recently_not_delivered"  # V19: a message before this one
    RECENTLY_NOT_REGISTERED = "recently_not_registered"  # V20: a message before this one
    NO_ANSWER = "no_answer"  # V21: the service did not answer in time
    NOT_REGISTERED = "not_registered"  # V22: the answer to this publish
    REFUSED = "refused"  # the service will not take this message as it is


@dataclass(frozen=True, slots=True)
class FailoverPolicy:
    """The parameters of the rules, as recommended. Raises ValueError for one out of bounds.

    A `status_delay` of 0 asks for the status at once with a waiting interval of 0 (V17): the answer is assumed. A
    lifetime of 0 keeps using push.
    """

    status_delay: timedelta = timedelta(seconds=10)
    negative_status_lifetime: timedelta = _ZERO
    not_registered_lifetime: timedelta = timedelta(hours=1)
    response_timeout: timedelta = timedelta(seconds=10)

    def __post_init__(self) -> None:
        for name in ("status_delay", "negative_status_lifetime", "not_registered_lifetime"):
            if getattr(self, name) < _ZERO:
                raise ValueError(f"{name} must not be negative; 0 switches it off")
        if self.response_timeout <= _ZERO:
            raise ValueError("response_timeout must be more than 0: without it a silent service stops everything")

    @property
    def status_wait(self) -> timedelta | None:
        """The waiting interval for `Sender.status()`: 0 (V17) for a `status_delay` of 0, else none (the true state)."""
        return _ZERO if self.status_delay == _ZERO else None


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """What earlier messages taught about one client: everything goes over the alternative channel before these times."""

    not_delivered_until: datetime | None = None
    not_registered_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Push:
    """Use push. `ask_status_at` is None before the publish was answered."""

    ask_status_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """It arrived, or counts as arrived; nothing is left to do."""


@dataclass(frozen=True, slots=True)
class AlternativeChannel:
    """Send over the alternative channel. With `close_push` cancel the message first: it may be arriving just now."""

    reason: FallbackReason
    close_push: bool = False


@dataclass(frozen=True, slots=True)
class HoldBack:
    """Send it over no channel for now: the number may have been taken over, and an SMS would reach whoever did."""


def before_publish(memory: ClientMemory, now: datetime) -> Push | AlternativeChannel:
    """Which channel a new message to this client takes (V19, V20)."""
    if memory.not_registered_until is not None and now < memory.not_registered_until:
        return AlternativeChannel(FallbackReason.RECENTLY_NOT_REGISTERED)
    if memory.not_delivered_until is not None and now < memory.not_delivered_until:
        return AlternativeChannel(FallbackReason.RECENTLY_NOT_DELIVERED)
    return Push()


def after_publish(
    policy: FailoverPolicy, memory: ClientMemory, answer: PublishOutcome | None, now: datetime
) -> tuple[Push | AlternativeChannel | HoldBack, ClientMemory]:
    """What follows from the answer to the publish (V18, V20, V21, V22); None: no answer in `response_timeout`.

    Without an answer the message may have been stored: publish it again with the same request id to learn its message
    id, then cancel it.
    """
    match answer:
        case Accepted():
            return Push(now + policy.status_delay), ClientMemory(memory.not_delivered_until, None)
        case NotRegistered():
            until = now + policy.not_registered_lifetime if policy.not_registered_lifetime else None
            return AlternativeChannel(FallbackReason.NOT_REGISTERED), ClientMemory(memory.not_delivered_until, until)
        case Refused():
            return AlternativeChannel(FallbackReason.REFUSED), memory
        case IdentityChanged():
            return HoldBack(), memory
        case Unanswered() | None:
            return AlternativeChannel(FallbackReason.NO_ANSWER, close_push=True), memory
    assert_never(answer)


def after_status(
    policy: FailoverPolicy, memory: ClientMemory, state: State | None, now: datetime
) -> tuple[Delivered | AlternativeChannel, ClientMemory]:
    """What follows from the status (V18, V19, V21); None: no answer in `response_timeout`."""
    if state is None:
        return AlternativeChannel(FallbackReason.NO_ANSWER, close_push=True), memory
    if state == State.DELIVERED:
        return Delivered(), ClientMemory(None, memory.not_registered_until)
    until = now + policy.negative_status_lifetime if policy.negative_status_lifetime else memory.not_delivered_until
    fallback = AlternativeChannel(FallbackReason.NOT_DELIVERED, close_push=not state.terminal)
    return fallback, ClientMemory(until, memory.not_registered_until)


def after_cancel(state: State | None, fallback: AlternativeChannel) -> Delivered | AlternativeChannel:
    """Whether the fallback is still needed once the push leg was closed; `state` is the one that won, None: no answer."""
    if state == State.DELIVERED:
        return Delivered()
    return AlternativeChannel(fallback.reason)
