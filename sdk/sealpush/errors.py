"""The errors of the SDK: one base, with what a caller branches on as class attributes.

`reason` is a stable word for programs, `retryable` says whether the same call may succeed later without a change.
The text is for people: what happened and what to do. No text ever holds content, keys or tokens.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar


class SealpushError(Exception):
    """Base of everything the SDK raises on purpose."""

    reason: ClassVar[str] = "SEALPUSH_ERROR"
    retryable: ClassVar[bool] = False


class EnvelopeRefused(SealpushError):
    """The envelope cannot be trusted or read here.

    Deliberately one error without detail: a sender of forged envelopes must not learn which check stopped them.
    """

    reason = "ENVELOPE_REFUSED"

    def __init__(self) -> None:
        super().__init__("the envelope was refused; acknowledge it as undelivered and do not open it again")


class ContentTooLarge(SealpushError):
    """The content does not fit the largest padding bucket."""

    reason = "CONTENT_TOO_LARGE"


class SuiteUnsupported(SealpushError):
    """The suite is known to the format but this release cannot use it."""

    reason = "SUITE_UNSUPPORTED"


class KeyRefused(SealpushError):
    """A public key or its signature is not acceptable."""

    reason = "KEY_REFUSED"


class EntryRefused(SealpushError):
    """A sender entry is malformed, not signed by the pinned root, or outside its time."""

    reason = "ENTRY_REFUSED"


class ReceiptRefused(SealpushError):
    """This is not a receipt, or not one that this release reads."""

    reason = "RECEIPT_REFUSED"


class DeviceLogBroken(SealpushError):
    """A log of devices says what it cannot say, or does not go on from what was known of it."""

    reason = "DEVICE_LOG_BROKEN"


class RevocationsRefused(SealpushError):
    """A revocation list is malformed or not signed by the pinned root."""

    reason = "REVOCATIONS_REFUSED"


class KeystoreError(SealpushError):
    """The local store failed; nothing of the attempted change was kept."""

    reason = "KEYSTORE_ERROR"


class KeystoreBusy(KeystoreError):
    """Another process held the store for too long; nothing was changed, try again."""

    reason = "KEYSTORE_BUSY"
    retryable = True


class KeystoreTooNew(KeystoreError):
    """The store was written by a newer release."""

    reason = "KEYSTORE_TOO_NEW"


class RootMismatch(KeystoreError):
    """Another platform root is already pinned in this store."""

    reason = "ROOT_MISMATCH"


class NotRegisteredHere(SealpushError):
    """This device has no registration yet, or its registration ended."""

    reason = "NOT_REGISTERED_HERE"


class StreamTakenOver(SealpushError):
    """Another stream of this device took over; this one has ended for good."""

    reason = "STREAM_TAKEN_OVER"


class CallFailed(SealpushError):
    """A service answered with an error, or did not answer. The subclass says which kind.

    `code` is the gRPC code's name, `server_reason` the service's stable word for programs ("" if it gave none), `field`
    the request's field at fault, `retry_after_s` when to come back, `metadata` what else the service said.
    """

    reason = "CALL_FAILED"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        server_reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.server_reason = server_reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidRequest(CallFailed):
    """The request cannot be right; `field` says where."""

    reason = "INVALID_REQUEST"


class WrongCode(InvalidRequest):
    """The one-time code is wrong; `attempts_left` says how many more may be tried."""

    reason = "WRONG_CODE"

    @property
    def attempts_left(self) -> int:
        """Tries that are left with the present code."""
        return _attempts_left(self)


class Unauthenticated(CallFailed):
    """Login, password, token or device is not known to the service."""

    reason = "UNAUTHENTICATED"


class RegistrationEnded(Unauthenticated):
    """The service does not know this device any more: another phone of its person removed it, its number passed to somebody else, or
    the service lost its record. Tell the person; to go on, call `unregister()`, which forgets what is kept here, and register again."""

    reason = "REGISTRATION_ENDED"


class PermissionDenied(CallFailed):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"


class NotFound(CallFailed):
    """There is no such thing for this caller."""

    reason = "NOT_FOUND"


class AlreadyExists(CallFailed):
    """The id is taken by something else."""

    reason = "ALREADY_EXISTS"


class FailedPrecondition(CallFailed):
    """Something has to be done first; the message says what."""

    reason = "FAILED_PRECONDITION"


class RegistrationLocked(FailedPrecondition):
    """The number has a registration lock: ask for its PIN and confirm again with the same code. The PIN was missing or wrong.

    With no attempts left, `retry_after_s` says when there are some again.
    """

    reason = "REGISTRATION_LOCKED"

    @property
    def attempts_left(self) -> int:
        """Wrong PINs that are left before the service stops looking at any for a day."""
        return _attempts_left(self)

    @property
    def lapses_at(self) -> datetime | None:
        """When the lock ends should none of the recipient's devices be used until then; None: the service did not say."""
        try:
            at = datetime.fromisoformat(self.metadata.get("lock_lapses_at", ""))
        except ValueError:
            return None
        return at if at.tzinfo is not None else None


def _attempts_left(error: CallFailed) -> int:
    text = error.metadata.get("attempts_left", "")
    return int(text) if text.isascii() and text.isdigit() else 0


class Aborted(CallFailed):
    """Another call was faster."""

    reason = "ABORTED"


class Overloaded(CallFailed):
    """A limit is used up; `retry_after_s` says when to come back. Nothing was done."""

    reason = "OVERLOADED"
    retryable = True


class Unavailable(CallFailed):
    """The service cannot be reached, or cannot answer now. What was asked may or may not have happened."""

    reason = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(CallFailed):
    """No answer in time. What was asked may or may not have happened."""

    reason = "DEADLINE_EXCEEDED"
    retryable = True


class ServerFault(CallFailed):
    """The service failed by a fault of its own; report it with the request id."""

    reason = "SERVER_FAULT"
