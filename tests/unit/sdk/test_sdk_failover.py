"""sealpush.failover: rules V18 to V22."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.failover import (
    AlternativeChannel,
    ClientMemory,
    Delivered,
    FailoverPolicy,
    FallbackReason,
    HoldBack,
    Push,
    after_cancel,
    after_publish,
    after_status,
    before_publish,
)
from sealpush.ids import DeviceId, MessageId, RequestId
from sealpush.model import Reason, State
from sealpush.publication import Accepted, IdentityChanged, NotRegistered, Refused, Unanswered

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOTHING = ClientMemory()
R = RequestId("r")
ACCEPTED = Accepted(R, MessageId(b"m" * 16), NOW + timedelta(days=14), 1)
NOBODY = NotRegistered(R, Reason.CONSUMER_PHONE_NOT_FOUND)
UNANSWERED = Unanswered(R, "UNAVAILABLE", "no answer")
REFUSED = Refused(R, "INVALID_ARGUMENT", "INVALID_REQUEST", "wrong")

moments = st.timedeltas(timedelta(0), timedelta(days=365)).map(NOW.__add__)
lengths = st.timedeltas(timedelta(0), timedelta(days=2))
policies = st.builds(
    FailoverPolicy,
    status_delay=lengths,
    negative_status_lifetime=lengths,
    not_registered_lifetime=lengths,
    response_timeout=st.timedeltas(timedelta(microseconds=1), timedelta(minutes=1)),
)
memories = st.builds(ClientMemory, st.none() | moments, st.none() | moments)
states = st.sampled_from(State)


def test_the_defaults_are_the_recommended_ones() -> None:
    assert FailoverPolicy() == FailoverPolicy(timedelta(seconds=10), timedelta(0), timedelta(seconds=3600), timedelta(seconds=10))


@pytest.mark.parametrize("name", ["status_delay", "negative_status_lifetime", "not_registered_lifetime"])
def test_parameters_may_be_zero_and_not_negative(name: str) -> None:
    FailoverPolicy(**{name: timedelta(0)})
    with pytest.raises(ValueError, match=name):
        FailoverPolicy(**{name: timedelta(microseconds=-1)})


def test_the_response_timeout_is_strictly_positive() -> None:
    with pytest.raises(ValueError, match="response_timeout"):
        FailoverPolicy(response_timeout=timedelta(0))


@given(policies, memories)
def test_a_number_that_may_have_been_taken_over_is_sent_nothing_over_any_channel(policy: FailoverPolicy, memory: ClientMemory) -> None:
    changed = IdentityChanged(R, (DeviceId(b"d" * 16),), NOW)
    assert after_publish(policy, memory, changed, NOW) == (HoldBack(), memory)


def test_v18_anything_but_delivered_takes_the_alternative_channel() -> None:
    for state in State:
        decision, _ = after_status(FailoverPolicy(), NOTHING, state, NOW)
        if state is State.DELIVERED:
            assert decision == Delivered()
        else:
            assert decision == AlternativeChannel(FallbackReason.NOT_DELIVERED, close_push=not state.terminal)


def test_v18_the_status_is_asked_for_after_the_delay() -> None:
    decision, memory = after_publish(FailoverPolicy(status_delay=timedelta(seconds=7)), NOTHING, ACCEPTED, NOW)
    assert decision == Push(NOW + timedelta(seconds=7))
    assert memory == NOTHING


def test_v17_a_delay_of_zero_asks_at_once_for_the_assumed_answer() -> None:
    policy = FailoverPolicy(status_delay=timedelta(0))
    assert after_publish(policy, NOTHING, ACCEPTED, NOW)[0] == Push(NOW)
    assert policy.status_wait == timedelta(0)
    assert FailoverPolicy().status_wait is None


@given(policies, memories, states, moments, lengths)
def test_v19_after_a_negative_status_everything_takes_the_alternative_channel_for_its_lifetime(
    policy: FailoverPolicy, memory: ClientMemory, state: State, now: datetime, later: timedelta
) -> None:
    _, after = after_status(policy, ClientMemory(), state, now)
    negative = state is not State.DELIVERED and later < policy.negative_status_lifetime
    expected = AlternativeChannel(FallbackReason.RECENTLY_NOT_DELIVERED) if negative else Push()
    assert before_publish(after, now + later) == expected


@given(policies, moments, lengths)
def test_v20_after_not_registered_everything_takes_the_alternative_channel_for_its_lifetime(
    policy: FailoverPolicy, now: datetime, later: timedelta
) -> None:
    decision, after = after_publish(policy, NOTHING, NOBODY, now)
    assert decision == AlternativeChannel(FallbackReason.NOT_REGISTERED)  # V22: at once
    still = later < policy.not_registered_lifetime
    expected = AlternativeChannel(FallbackReason.RECENTLY_NOT_REGISTERED) if still else Push()
    assert before_publish(after, now + later) == expected


@given(policies, memories, moments)
def test_v21_no_answer_takes_the_alternative_channel_and_teaches_nothing(
    policy: FailoverPolicy, memory: ClientMemory, now: datetime
) -> None:
    fallback = AlternativeChannel(FallbackReason.NO_ANSWER, close_push=True)
    assert after_publish(policy, memory, None, now) == (fallback, memory)
    assert after_publish(policy, memory, UNANSWERED, now) == (fallback, memory)
    assert after_status(policy, memory, None, now) == (fallback, memory)


@given(policies, memories, moments)
def test_a_refusal_takes_the_alternative_channel_and_teaches_nothing(policy: FailoverPolicy, memory: ClientMemory, now: datetime) -> None:
    assert after_publish(policy, memory, REFUSED, now) == (AlternativeChannel(FallbackReason.REFUSED), memory)


@given(policies, memories, moments)
def test_success_ends_what_was_held_against_a_client(policy: FailoverPolicy, memory: ClientMemory, now: datetime) -> None:
    _, accepted = after_publish(policy, memory, ACCEPTED, now)
    assert accepted.not_registered_until is None
    _, delivered = after_status(policy, accepted, State.DELIVERED, now)
    assert delivered == NOTHING
    assert before_publish(delivered, now) == Push()


@given(policies, memories, states, moments)
def test_the_alternative_channel_is_used_unless_delivered(
    policy: FailoverPolicy, memory: ClientMemory, state: State, now: datetime
) -> None:
    decision, _ = after_status(policy, memory, state, now)
    assert isinstance(decision, Delivered) == (state is State.DELIVERED)


def test_what_turns_out_delivered_on_closing_needs_no_sms() -> None:
    fallback = AlternativeChannel(FallbackReason.NOT_DELIVERED, close_push=True)
    assert after_cancel(State.DELIVERED, fallback) == Delivered()
    for state in (State.CANCELLED, State.EXPIRED, None):
        assert after_cancel(state, fallback) == AlternativeChannel(FallbackReason.NOT_DELIVERED)
