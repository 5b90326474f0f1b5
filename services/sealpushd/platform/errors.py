"""Errors that cross a service's border, and how they look on the wire.

Every error carries its gRPC code, a stable reason, and whether repeating the call helps. `render` turns one into the code,
message and `google.rpc.Status` details that clients branch on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from sealpush.v1 import publish_pb2

DOMAIN = "sealpush"
DETAILS_KEY = "grpc-status-details-bin"


class ServiceError(Exception):
    """Base of all errors a caller may see. The message says what happened and what to do about it."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})


class InvalidRequest(ServiceError):
    """The request cannot be right; the field says where."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class Unauthenticated(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(ServiceError):
    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class NotFound(ServiceError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class AlreadyExists(ServiceError):
    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class FailedPrecondition(ServiceError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class Aborted(ServiceError):
    """Another call was faster; start again from the present state."""

    code = grpc.StatusCode.ABORTED
    reason = "ABORTED"
    retryable = True


class LimitExceeded(ServiceError):
    """A rate or a quota is used up; `retry_after` says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "LIMIT_EXCEEDED"
    retryable = True


class Overloaded(ServiceError):
    """More work than is finished in time: refused before any was done."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after=timedelta(seconds=retry_after_s))


class Unavailable(ServiceError):
    """Something this service needs does not answer. Repeat the call, with the same request id."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"
    retryable = True


class StoreUnavailable(Unavailable):
    """PostgreSQL does not answer, or lost the connection before its answer."""

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"
    retryable = True


def wait_in_words(wait: timedelta) -> str:
    """How long to wait, for people: never shorter than it is."""
    seconds = max(1, math.ceil(wait.total_seconds()))
    for unit, size, least in (("hour", 3600, 2 * 3600), ("minute", 60, 2 * 60)):
        if seconds >= least:
            return f"{-(-seconds // size)} {unit}s"
    return f"{seconds} second{'' if seconds == 1 else 's'}"


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


# Code, message and trailing metadata.
Rendered = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]


def render(error: ServiceError) -> Rendered:
    """Code, message and trailing metadata for an error, as `google.rpc.Status` with one ErrorInfo."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromTimedelta(error.retry_after)
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    number: int = error.code.value[0]
    status = status_pb2.Status(code=number, message=error.message, details=details)
    return error.code, error.message, ((DETAILS_KEY, status.SerializeToString()),)


def to_refusal(error: ServiceError) -> publish_pb2.Refusal:
    """How an error looks where it is the result of one item."""
    refusal = publish_pb2.Refusal(code=error.code.value[0], reason=error.reason, message=error.message, field=error.field or "")
    if error.retryable:
        refusal.retry_after.FromTimedelta(error.retry_after or timedelta(0))
    return refusal


def from_refusal(refusal: publish_pb2.Refusal) -> ServiceError:
    """The error to give on for an item that a peer refused."""
    kind = next((kind for code, kind in _BY_CODE.items() if code.value[0] == refusal.code), None)
    if refusal.reason == Overloaded.reason:
        return Overloaded(refusal.message)
    if kind is None or kind in (Unauthenticated, PermissionDenied):
        return Unavailable(refusal.message)
    retry_after = refusal.retry_after.ToTimedelta() if refusal.HasField("retry_after") else None
    return kind(refusal.message, field=refusal.field or None, retry_after=retry_after or None)


_BY_CODE: dict[grpc.StatusCode, type[ServiceError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Aborted,
        LimitExceeded,
        DeadlineExceeded,
    )
}


def in_words(error: BaseException) -> str:
    """What an error says, for logs and texts; its kind where it says nothing, as time-outs and broken connections do."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details() or 'no details'}"
    said = error.message if isinstance(error, ServiceError) else str(error)
    return said.strip() or type(error).__name__


def _is_peers_word(error: grpc.aio.AioRpcError) -> bool:
    """Whether the peer's service answered, and not gRPC for it."""
    info = error_details_pb2.ErrorInfo()
    return any(
        detail.Unpack(info) and info.domain == DOMAIN
        for key, value in error.trailing_metadata() or ()
        if key == DETAILS_KEY and isinstance(value, bytes)
        for detail in status_pb2.Status.FromString(value).details
    )


def from_mesh(error: grpc.aio.AioRpcError, peer: str) -> ServiceError:
    """The error to give on when a call to another service failed.

    What the peer decided about the request passes through with its details; everything else becomes UNAVAILABLE: whether the peer did what
    it was asked is unknown. So does what gRPC says by itself, such as RESOURCE_EXHAUSTED for an answer that is too large: the work is done.
    """
    kind = _BY_CODE.get(error.code())
    if not _is_peers_word(error) and kind is not DeadlineExceeded:
        kind = None
    if kind is None or kind in (Unauthenticated, PermissionDenied):
        # A peer that does not trust this service is a fault of the installation, never of the outside caller.
        return Unavailable(f"the {peer} service does not answer properly ({error.code().name}); try again")
    field: str | None = None
    retry_after: timedelta | None = None
    metadata: dict[str, str] = {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info, bad, retry = (
                    error_details_pb2.ErrorInfo(),
                    error_details_pb2.BadRequest(),
                    error_details_pb2.RetryInfo(),
                )
                if detail.Unpack(info):
                    metadata = dict(info.metadata)
                    if info.reason == Overloaded.reason:
                        return Overloaded(error.details() or Overloaded.reason)
                elif detail.Unpack(bad) and bad.field_violations:
                    field = bad.field_violations[0].field
                elif detail.Unpack(retry):
                    retry_after = retry.retry_delay.ToTimedelta()
    return kind(error.details() or kind.reason, field=field, retry_after=retry_after, metadata=metadata)
