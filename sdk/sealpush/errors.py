"""The errors of the SDK: one base, with what a caller branches on as class attributes.

`reason` is a stable word for programs, `retryable` says whether the same call may succeed later without a change.
The text is for people: what happened and what to do. No text ever holds content, keys or tokens.
"""

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
