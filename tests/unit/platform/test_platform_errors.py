"""Errors on the wire, and back from another service."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from sealpushd.platform import errors
from sealpushd.platform.errors import (
    DETAILS_KEY,
    DOMAIN,
    PermissionDenied,
    ServiceError,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
    from_mesh,
    from_refusal,
    render,
    to_refusal,
)

# The codes that STYLE.md names, and what a deadline and a bug answer.
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError) and kind is not ServiceError]


def over_the_wire(error: ServiceError) -> AioRpcError:
    code, message, trailing = render(error)
    return AioRpcError(code, Metadata(), Metadata(*trailing), message)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_code_in_use_and_exactly_one_error_info(kind: type[ServiceError]) -> None:
    code, message, trailing = render(kind("what happened"))
    assert code in CODES
    assert message == "what happened"
    status = status_pb2.Status.FromString(dict(trailing)[DETAILS_KEY])
    assert (status.code, status.message) == (code.value[0], "what happened")
    info = error_details_pb2.ErrorInfo()
    infos = [detail for detail in status.details if detail.Unpack(info)]
    assert len(infos) == 1
    assert (info.reason, info.domain) == (kind.reason, DOMAIN)


@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.AlreadyExists, errors.FailedPrecondition, errors.NotFound, errors.Aborted])
def test_what_a_peer_decided_about_the_request_passes_through_with_its_details(kind: type[ServiceError]) -> None:
    passed = from_mesh(over_the_wire(kind("it is so", field="a.b", metadata={"cause": "X"})), "fetch")
    assert type(passed) is kind
    assert (passed.message, passed.field, passed.metadata) == ("it is so", "a.b", {"cause": "X"})


def test_a_limit_passes_through_with_the_time_to_wait() -> None:
    passed = from_mesh(over_the_wire(errors.LimitExceeded("too much", retry_after=timedelta(seconds=7))), "registration")
    assert type(passed) is errors.LimitExceeded
    assert passed.retry_after == timedelta(seconds=7)


def test_an_overloaded_peer_is_told_as_overload_and_not_as_a_quota() -> None:
    passed = from_mesh(over_the_wire(errors.Overloaded("too much waits")), "keys")
    assert type(passed) is errors.Overloaded
    assert passed.retry_after == timedelta(seconds=1)


@pytest.mark.parametrize("kind", [errors.Unauthenticated, errors.PermissionDenied, errors.StoreUnavailable, ServiceError])
def test_a_fault_of_the_installation_is_unavailable_and_hides_the_peers_words(kind: type[ServiceError]) -> None:
    passed = from_mesh(over_the_wire(kind("SECRET inner words")), "keys")
    assert passed.code is grpc.StatusCode.UNAVAILABLE
    assert passed.retryable
    assert "SECRET" not in passed.message
    assert "keys" in passed.message


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_without_details_becomes_a_service_error(code: grpc.StatusCode) -> None:
    assert isinstance(from_mesh(AioRpcError(code, Metadata(), Metadata(), None), "fetch"), ServiceError)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)])
def test_what_grpc_says_by_itself_leaves_unknown_what_the_peer_did(code: grpc.StatusCode) -> None:
    """A RESOURCE_EXHAUSTED of gRPC's own may be about an answer that was too large, after the peer stored what it was given."""
    assert from_mesh(AioRpcError(code, Metadata(), Metadata(), "CLIENT: Received message larger than max"), "fetch").code is (
        grpc.StatusCode.UNAVAILABLE
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_of_one_item_says_to_the_caller_what_a_call_would(kind: type[ServiceError]) -> None:
    error = kind("what happened")
    error.field = "tag"
    if kind.retryable:
        error.retry_after = timedelta(seconds=3)
    back = from_refusal(to_refusal(error))
    of_a_call = from_mesh(over_the_wire(error), "peer")
    assert (type(back), back.retryable) == (type(of_a_call), of_a_call.retryable)
    assert back.message == "what happened"
    if kind in (Unauthenticated, PermissionDenied, Unavailable, StoreUnavailable):
        assert isinstance(back, Unavailable)
    elif not isinstance(back, errors.Overloaded):
        assert (back.field, back.retry_after) == (error.field, error.retry_after)


def test_a_bug_of_the_peer_is_never_a_refusal_of_the_item() -> None:
    assert isinstance(from_refusal(to_refusal(ServiceError("internal error"))), Unavailable)
