"""sealpush.doubt: whatever a service answers, what is stored is never told as not stored."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush import errors
from sealpush.doubt import Doubts, Said, said_by_batch_failure, said_by_code, said_by_failure, said_by_result
from sealpush.failover import AlternativeChannel, ClientMemory, FailoverPolicy, after_publish
from sealpush.ids import RequestId
from sealpush.model import Reason
from sealpush.publication import Accepted, NotRegistered, Refused, Unanswered, outcome_of, outcome_of_failure
from sealpush.v1 import common_pb2, publish_pb2

R = RequestId("r")
# What a call ends with when nobody knows how far it came, and what a service says at its door.
LOST = [errors.Unavailable, errors.DeadlineExceeded, errors.ServerFault, errors.Aborted]
CODES = {errors.Unavailable: "UNAVAILABLE", errors.DeadlineExceeded: "DEADLINE_EXCEEDED", errors.ServerFault: "INTERNAL"}


@dataclass(frozen=True)
class Attempt:
    """One attempt: whether the service took it in, and which failure came back instead of its answer, if one did."""

    taken: bool
    failure: errors.CallFailed | None


def lost(kind: type[errors.CallFailed], reason: str) -> errors.CallFailed:
    return kind("no answer", code=CODES.get(kind, "ABORTED"), server_reason=reason)


losses = st.builds(lost, st.sampled_from(LOST), st.sampled_from(["", "UNAVAILABLE", "STORE_UNAVAILABLE"]))
doors = st.sampled_from(
    [
        errors.Overloaded("full", code="RESOURCE_EXHAUSTED", server_reason="OVERLOADED", retry_after_s=1),
        errors.Overloaded("too much", code="RESOURCE_EXHAUSTED", server_reason="LIMIT_EXCEEDED"),
        errors.Unauthenticated("who?", code="UNAUTHENTICATED", server_reason="UNAUTHENTICATED"),
        errors.Unauthenticated("who?", code="UNAUTHENTICATED"),
        errors.PermissionDenied("no", code="PERMISSION_DENIED", server_reason="PERMISSION_DENIED"),
    ]
)
# An answer of gRPC's own that was too large comes after the work.
foreign = st.just(errors.Overloaded("CLIENT: Received message larger than max", code="RESOURCE_EXHAUSTED"))
attempts = st.one_of(
    st.builds(Attempt, st.booleans(), losses | foreign),
    st.builds(Attempt, st.just(False), doors),
    st.builds(Attempt, st.just(True), st.none()),
)


@given(st.lists(attempts, min_size=1, max_size=12), st.booleans())
def test_what_an_attempt_stored_is_never_told_as_not_stored(course: list[Attempt], registered: bool) -> None:
    """A service that stores by request id and looks the id up first; while nobody is registered, it stores nothing."""
    doubts, stored = Doubts(), False
    for number, attempt in enumerate(course):
        registered_now = registered or number % 3 == 0
        result = publish_pb2.PublishResult(request_id=R)
        if attempt.taken and (stored or registered_now):
            stored = True
            result.accepted.message_id = b"m" * 16
        elif attempt.taken:
            result.not_registered.reason_code = common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND
        if attempt.failure is None:
            doubts.hear((R,), said_by_result(result))
            outcome = doubts.weigh(outcome_of(R, result))
        else:
            doubts.hear((R,), said_by_failure(attempt.failure))
            outcome = doubts.weigh(outcome_of_failure(R, attempt.failure, ambiguous=True))
        if stored:
            assert not isinstance(outcome, Refused | NotRegistered)
            if isinstance(outcome, Accepted):
                return  # who publishes knows, and has no reason to ask again
        elif attempt.failure is None and attempt.taken:
            # The doubt ends with an answer: "not registered" is told at once, as the first attempt would be.
            assert isinstance(outcome, NotRegistered)
            assert R not in doubts


@given(st.lists(st.sampled_from(list(Said)), max_size=20))
def test_only_an_answer_about_the_request_ends_a_doubt(heard: list[Said]) -> None:
    doubts = Doubts()
    for said in heard:
        doubts.hear((R,), said)
    about = [said for said in heard if said is not Said.ATTEMPT]
    assert (R in doubts) is (bool(about) and about[-1] is Said.NOTHING)
    refused = Refused(R, "RESOURCE_EXHAUSTED", "OVERLOADED", "full")
    assert isinstance(doubts.weigh(refused), Unanswered if R in doubts else Refused)
    assert isinstance(doubts.weigh(NotRegistered(R, Reason.CONSUMER_PHONE_NOT_FOUND)), Unanswered if R in doubts else NotRegistered)


def test_a_sender_that_falls_back_cancels_what_is_in_doubt_first() -> None:
    doubts = Doubts()
    doubts.hear((R,), Said.NOTHING)
    outcome = doubts.weigh(Refused(R, "RESOURCE_EXHAUSTED", "OVERLOADED", "full"))
    decision, _ = after_publish(FailoverPolicy(), ClientMemory(), outcome, datetime(2026, 1, 1, tzinfo=UTC))
    assert isinstance(decision, AlternativeChannel)
    assert decision.close_push


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_the_code_of_a_refused_item_and_of_a_failed_call_say_the_same(code: grpc.StatusCode) -> None:
    result = publish_pb2.PublishResult(request_id=R, refusal=publish_pb2.Refusal(code=code.value[0], reason="WHY"))
    assert said_by_result(result) is said_by_code(code.name)
    unknown = isinstance(outcome_of(R, result), Unanswered)
    if unknown:
        assert said_by_code(code.name) is Said.NOTHING


def test_a_batch_refused_as_a_whole_says_nothing_of_its_items_attempts_before() -> None:
    wrong = errors.InvalidRequest("split it", code="INVALID_ARGUMENT", server_reason="INVALID_REQUEST")
    assert said_by_failure(wrong) is Said.REQUEST
    assert said_by_batch_failure(wrong) is Said.ATTEMPT
    assert said_by_batch_failure(lost(errors.Unavailable, "")) is Said.NOTHING


def test_more_than_a_process_remembers_push_out_the_oldest() -> None:
    doubts = Doubts(in_doubt_max=2)
    for number in range(3):
        doubts.hear((RequestId(str(number)),), Said.NOTHING)
    assert [RequestId(str(number)) in doubts for number in range(3)] == [False, True, True]
