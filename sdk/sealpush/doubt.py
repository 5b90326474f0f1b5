"""Whether a request may be stored although its last answer is a refusal: what each answer says about the attempts before it. Pure.

A service that looked a request id up speaks for all attempts under this id. One that refused at its door (a limit, a token) speaks for
that attempt only: an earlier one, whose answer was lost, may be stored all the same. Who took such a refusal for the last word
would send an SMS beside the push.
"""

import enum
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, TypeVar

import grpc

from sealpush.errors import CallFailed
from sealpush.ids import RequestId
from sealpush.publication import Accepted, IdentityChanged, NotRegistered, Outdated, Refused, Unanswered
from sealpush.v1 import publish_pb2

IN_DOUBT_MAX: Final = 65_536  # request ids without an answer, 10 MB; a sender with more of them at once forgets the oldest

AnyOutcome = TypeVar("AnyOutcome", bound=Accepted | NotRegistered | Refused | Unanswered | IdentityChanged | Outdated)


class Said(enum.Enum):
    """What an answer is about."""

    REQUEST = "request"  # the service looked the id up: the answer holds for every attempt so far
    ATTEMPT = "attempt"  # this attempt was not taken; nothing about those before
    NOTHING = "nothing"  # this attempt may be stored


# The service gives these after it looked the id up, or because of something that no attempt can have been stored with.
_ABOUT_THE_REQUEST: Final = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"})
# ALREADY_EXISTS: something is stored under this id, and it may be what another attempt sealed.
_ABOUT_THE_ATTEMPT: Final = frozenset({"RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED", "ALREADY_EXISTS"})
# Whoever answers these, also a proxy, has not passed the request on.
_AT_THE_DOOR: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})
_CODE_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


def said_by_code(code: str) -> Said:
    """What a refusal by the service with this code is about."""
    if code in _ABOUT_THE_REQUEST:
        return Said.REQUEST
    return Said.ATTEMPT if code in _ABOUT_THE_ATTEMPT else Said.NOTHING


def said_by_failure(error: CallFailed) -> Said:
    """What a failed call is about. Without the service's own word the answer is gRPC's or a proxy's, which know nothing of requests."""
    if not error.server_reason and error.code not in _AT_THE_DOOR:
        return Said.NOTHING
    return said_by_code(error.code)


def said_by_batch_failure(error: CallFailed) -> Said:
    """As `said_by_failure()`, of a call with many requests: it was refused as a whole, before any of them was looked up."""
    return Said.NOTHING if said_by_failure(error) is Said.NOTHING else Said.ATTEMPT


def said_by_result(result: publish_pb2.PublishResult) -> Said:
    """What the answer to one request of a call is about."""
    match result.WhichOneof("outcome"):
        case None:
            return Said.NOTHING
        case "refusal":
            return said_by_code(_CODE_NAMES.get(result.refusal.code, "UNKNOWN"))
    return Said.REQUEST


class Doubts:
    """The request ids of which an attempt may be stored, until an answer is about the request."""

    def __init__(self, in_doubt_max: int = IN_DOUBT_MAX) -> None:
        self._ids: OrderedDict[RequestId, None] = OrderedDict()
        self._max = in_doubt_max

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._ids

    def hear(self, request_ids: Iterable[RequestId], said: Said) -> None:
        """Learn from one answer to these requests."""
        for request_id in request_ids:
            if said is Said.REQUEST:
                self._ids.pop(request_id, None)
            elif said is Said.NOTHING:
                self._ids[request_id] = None
                self._ids.move_to_end(request_id)
        while len(self._ids) > self._max:
            self._ids.popitem(last=False)

    def weigh(self, outcome: AnyOutcome) -> AnyOutcome | Unanswered:
        """The outcome, unless it says that nothing is stored and that is in doubt."""
        if outcome.request_id not in self._ids or not isinstance(outcome, Refused | NotRegistered):
            return outcome
        reason = outcome.reason.name if isinstance(outcome, NotRegistered) else outcome.reason
        return Unanswered(
            outcome.request_id, reason, "an earlier attempt had no answer and may be stored; publish again with the same request id to know"
        )
