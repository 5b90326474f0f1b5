"""What a device keeps: identity, private prekeys, pinned root, inbox, the device log, and what it still owes the server.

`Keystore` is the contract, `MemoryKeystore` and `SqliteKeystore` are its implementations.
All calls are synchronous and short; run them in a thread where blocking matters. Every call is atomic: it happens
completely or raises KeystoreError and changes nothing. Times are Unix milliseconds by the server's clock.

The order that keeps a message from being lost or shown twice: open the envelope, `commit_message()`, then send what
`pending_acknowledgements()` gives, then `confirm_acknowledgements()`. A crash in between repeats a step, harmlessly.
"""

import contextlib
import enum
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from sealpush.devicelog import DeviceNotice, NoticeKind
from sealpush.errors import KeystoreBusy, KeystoreError, KeystoreTooNew, RootMismatch
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, SenderId, SubscriberId
from sealpush.keys import DAY_MS, PREKEY_RETENTION_MS, EntryRole, IdentityKey, PrekeyKind, PrekeyPrivate
from sealpush.proofs import NO_DIGEST, AckOutcome

# A record of what was seen outlives its message: a clock that is wrong by days must not bring the message back.
DEDUP_MARGIN_MS: Final = 7 * DAY_MS
PAGE_MAX: Final = 500  # acknowledgements and inbox pages: one page fits memory and one request of the server's API
FACT_BYTES_MAX: Final = 4096  # facts are addresses and numbers, not documents
BUSY_TIMEOUT_S: Final = 10.0  # a commit takes milliseconds; a notification extension lives about 30 s

# More than a person reads; the oldest go.
NOTICES_MAX: Final = 1000

SCHEMA_VERSION: Final = 2
_APPLICATION_ID: Final = 0x53504B31  # "SPK1": tells this file from any other SQLite file
_I64_MAX: Final = (1 << 63) - 1


class Seen(enum.Enum):
    """What a store knows of an envelope by its sender, content id and digest. Who seals chooses the id, and may choose one twice."""

    NEVER = "never"
    THIS = "this envelope"
    OTHER = "another envelope under the same content id"


class CommitOutcome(enum.Enum):
    """What became of a message given to the store."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # its envelope was committed before
    CONFLICT = "conflict"  # another envelope with its content id was committed before; nothing was changed
    SUPERSEDED = "superseded"  # a later message with the same replace key is already here


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The outcome, and the messages that the new one replaced (take their notifications away).

    True exactly when the message is new and to be shown.
    """

    outcome: CommitOutcome
    replaced: tuple[MessageId, ...] = ()

    def __bool__(self) -> bool:
        return self.outcome is CommitOutcome.STORED


@dataclass(frozen=True, slots=True)
class DeviceRegistration:
    """Who this device is to the server, once it has answered a registration."""

    device_id: DeviceId
    subscriber_id: SubscriberId
    app_id: AppId
    registered_at_ms: int


@dataclass(frozen=True, slots=True)
class InboxMessage:
    """An opened message. `content` is the plaintext; it and the replace key never appear in a repr.

    `envelope_digest` is that of the envelope which brought it, for the acknowledgement that it was read. `local_id` is the store's
    own rising number, 0 before the message is stored. `shown_at_ms` and `read_at_ms` are None until it happens.
    """

    message_id: MessageId
    content_id: ContentId
    envelope_digest: bytes
    sender_id: SenderId
    created_at_ms: int
    expires_at_ms: int
    received_at_ms: int
    content: bytes = field(repr=False)
    replace_key: bytes | None = field(default=None, repr=False)
    flags: int = 0
    shown_at_ms: int | None = None
    read_at_ms: int | None = None
    local_id: int = 0


@dataclass(frozen=True, slots=True)
class PendingAcknowledgement:
    """An acknowledgement that the server has not confirmed yet; sign it when sending, the bytes do not change.

    `envelope_digest` is `NO_DIGEST` where what came could not be read so far.
    """

    message_id: MessageId
    content_id: ContentId
    envelope_digest: bytes
    outcome: AckOutcome
    reason_code: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class KeptLog:
    """The device log as far as it was followed: its entries, oldest first, and the head after the last of them."""

    entries: tuple[bytes, ...] = ()
    head: bytes = b""


class Keystore(Protocol):
    """The contract of a device's store. Implementations are safe for threads; all raise KeystoreError only."""

    def create_identity(self) -> IdentityKey:
        """The identity, made on the first call and the same ever after, whoever calls first."""
        ...

    def identity(self) -> IdentityKey | None:
        """The identity, or None before `create_identity()`."""
        ...

    def set_registration(self, registration: DeviceRegistration) -> None:
        """Keep the answer to a registration; a later one takes its place."""
        ...

    def registration(self) -> DeviceRegistration | None:
        """The last registration, or None."""
        ...

    def set_fact(self, name: str, value: bytes | None) -> None:
        """Keep a small value for the caller (server address, phone number …), or forget it with None."""
        ...

    def fact(self, name: str) -> bytes | None:
        """A value kept by `set_fact()`, or None."""
        ...

    def next_counter(self) -> int:
        """The next change counter: 1, 2, 3 … never the same twice, over threads, processes and crashes."""
        ...

    def raise_counter(self, used: int) -> None:
        """Never give `used` or less again: for a store restored from a backup, told by the server."""
        ...

    def set_clock_offset_ms(self, offset_ms: int) -> None:
        """Keep the authenticated difference: server time minus local time."""
        ...

    def clock_offset_ms(self) -> int | None:
        """The kept difference, or None before the first one."""
        ...

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        """Pin the platform's root. Another root than the pinned one raises RootMismatch unless `replace` is given."""
        ...

    def pinned_root(self) -> bytes | None:
        """The pinned root's public key, or None."""
        ...

    def put_sender_entry(self, sender_id: SenderId, role: EntryRole, serial: int, not_after_ms: int, blob: bytes) -> bool:
        """Cache a verified entry; False, and nothing kept, if one with a higher serial is here, or was before it ran out."""
        ...

    def sender_entry(self, sender_id: SenderId, role: EntryRole) -> bytes | None:
        """The cached signed blob, or None. Verify it again before use: it may have run out."""
        ...

    def put_revocations(self, serial: int, blob: bytes) -> bool:
        """Keep a verified revocation list of the pinned root; False, and nothing kept, if one with a higher serial is here."""
        ...

    def revocations(self) -> bytes | None:
        """The kept signed list, or None."""
        ...

    def reserve_prekey_ids(self, count: int) -> int:
        """The first of `count` consecutive prekey ids that are given to nobody else."""
        ...

    def add_prekeys(self, prekeys: Sequence[PrekeyPrivate]) -> None:
        """Keep private halves, all or none; do this before uploading the public ones."""
        ...

    def prekey(self, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        """A private half, or None once it was used, retired or never here. Fits `open_envelope()`."""
        ...

    def newest_signed_prekey(self) -> PrekeyPrivate | None:
        """The signed prekey made last: its age says when to rotate."""
        ...

    def prekey_count(self, kind: PrekeyKind) -> int:
        """How many private halves of a kind are kept."""
        ...

    def retire_signed_prekeys(self, keep_prekey_id: int, now_ms: int) -> None:
        """Start the last 28 + 7 days of every signed prekey but this one; call it once the server has the new one."""
        ...

    def seen(self, sender_id: SenderId, content_id: ContentId, envelope_digest: bytes) -> Seen:
        """Whether this envelope, or another one with its content id, was committed before, even if its message was deleted since."""
        ...

    def commit_message(
        self,
        message: InboxMessage,
        *,
        acknowledgement: PendingAcknowledgement,
        used_prekey: tuple[int, int, PrekeyKind] | None = None,
    ) -> CommitResult:
        """Take in an opened message, in one transaction.

        New content is recorded as seen and stored, and stored messages of the sender with the same replace key and no
        later creation time go. In every case but CONFLICT a one-time `used_prekey` (suite, prekey_id, kind) is destroyed and the
        acknowledgement queued, unless one for this message and content is queued already. Repeating is harmless.
        """
        ...

    def queue_acknowledgement(self, acknowledgement: PendingAcknowledgement, *, sender_id: SenderId | None = None) -> bool:
        """Queue an acknowledgement without a message (undelivered, blocked, read); False if it is not needed.

        The first outcome of a message stays; READ stands beside it. With `sender_id`, a negative outcome for an envelope
        that was committed meanwhile (by the other process) is dropped.
        """
        ...

    def pending_acknowledgements(self, limit: int = PAGE_MAX) -> list[PendingAcknowledgement]:
        """What the server has not confirmed, oldest first. Stays until confirmed."""
        ...

    def confirm_acknowledgements(self, acknowledgements: Iterable[PendingAcknowledgement]) -> None:
        """Forget acknowledgements that the server has answered."""
        ...

    def inbox(self, *, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        """Stored messages, newest first; `before` is the `local_id` of the last one of the page before."""
        ...

    def message(self, message_id: MessageId) -> InboxMessage | None:
        """The stored message with this id, or None."""
        ...

    def mark_shown(self, message_id: MessageId, at_ms: int) -> bool:
        """Note that a message was shown; False if it was before or is not here. The first time stays."""
        ...

    def mark_read(self, message_id: MessageId, at_ms: int, *, acknowledge: bool) -> bool:
        """Note that a message was read and, if asked, queue READ with it; False if it was before or is not here."""
        ...

    def delete_message(self, message_id: MessageId) -> bool:
        """Delete a message; what was seen stays known. False if it is not here."""
        ...

    def device_log(self) -> KeptLog:
        """The device log that is kept; an empty one before the first."""
        ...

    def put_device_log(self, known: KeptLog, log: KeptLog, notices: Sequence[DeviceNotice]) -> list[DeviceNotice] | None:
        """Keep a log in the place of the one that was known, with what is to be told of it, in one transaction.

        None, and nothing changed, if another process has kept something else meanwhile. Else the notices that are new, numbered: one
        about the log, and no device, is not while one of its kind is kept.
        """
        ...

    def notices(self) -> list[DeviceNotice]:
        """What was not dismissed yet, oldest first."""
        ...

    def dismiss_notices(self, numbers: Iterable[int]) -> None:
        """Forget these notices."""
        ...

    def purge(self, now_ms: int) -> None:
        """Forget what has run out: private prekeys, records of seen content, cached entries but for their serials. Call it daily."""
        ...

    def erase(self) -> None:
        """Forget everything, the identity too: the user has left."""
        ...

    def close(self) -> None:
        """Release the store; any later call raises KeystoreError."""
        ...


def _check_fact(name: str, value: bytes | None) -> None:
    if not 1 <= len(name) <= 64 or (value is not None and len(value) > FACT_BYTES_MAX):
        raise KeystoreError(f"a fact has a name of 1 to 64 characters and at most {FACT_BYTES_MAX} bytes")


def _check_page(limit: int) -> int:
    if limit < 1:
        raise KeystoreError(f"limit must be 1 to {PAGE_MAX}")
    return min(limit, PAGE_MAX)


def _check_commit(message: InboxMessage, acknowledgement: PendingAcknowledgement) -> None:
    named = (acknowledgement.message_id, acknowledgement.content_id, acknowledgement.envelope_digest)
    if named != (message.message_id, message.content_id, message.envelope_digest):
        raise KeystoreError("the acknowledgement is for another message; build it from the one that is committed")
    if len(message.content_id) != 16 or len(message.sender_id) != 16 or len(message.message_id) != 16:
        raise KeystoreError("message_id, content_id and sender_id must be 16 raw bytes")
    if len(message.envelope_digest) != 32 or message.envelope_digest == NO_DIGEST:
        raise KeystoreError("envelope_digest must be the 32 bytes of Envelope.digest")


def _read_acknowledgement(message_id: MessageId, content_id: ContentId, envelope_digest: bytes, at_ms: int) -> PendingAcknowledgement:
    return PendingAcknowledgement(message_id, content_id, envelope_digest, AckOutcome.READ, 0, at_ms)


def _seen_as(known: bytes | None, envelope_digest: bytes) -> Seen:
    """What a record of seen content, by the digest in it, says of an envelope with that content id."""
    if known is None:
        return Seen.NEVER
    # A record of schema 1 does not say which envelope it was.
    return Seen.THIS if known in (envelope_digest, NO_DIGEST) else Seen.OTHER


class MemoryKeystore:
    """A keystore for tests and simulated phones: gone with the process, and a few hundred bytes when empty."""

    __slots__ = (
        "_acknowledgements",
        "_clock_offset_ms",
        "_closed",
        "_counter",
        "_entries",
        "_facts",
        "_identity",
        "_last_local_id",
        "_last_notice",
        "_lock",
        "_log",
        "_messages",
        "_next_prekey_id",
        "_notices",
        "_prekeys",
        "_registration",
        "_revocations",
        "_root_public_key",
        "_seen",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._forget()

    def _forget(self) -> None:
        self._identity: IdentityKey | None = None
        self._registration: DeviceRegistration | None = None
        self._facts: dict[str, bytes] = {}
        self._counter = 0
        self._clock_offset_ms: int | None = None
        self._root_public_key: bytes | None = None
        self._next_prekey_id = 1
        self._last_local_id = 0
        # (sender, role) → (serial, not_after_ms, blob); no blob once that has run out, while the serial stays
        self._entries: dict[tuple[SenderId, EntryRole], tuple[int, int, bytes]] = {}
        # (serial, blob)
        self._revocations: tuple[int, bytes] | None = None
        # (suite, id, kind) → (private half, time of deletion)
        self._prekeys: dict[tuple[int, int, PrekeyKind], tuple[PrekeyPrivate, int]] = {}
        # (sender, content) → (digest of its envelope, time until which it is known)
        self._seen: dict[tuple[SenderId, ContentId], tuple[bytes, int]] = {}
        # local_id → message, in rising order
        self._messages: dict[int, InboxMessage] = {}
        # (message, content, is it READ) → acknowledgement, in the order queued
        self._acknowledgements: dict[tuple[MessageId, ContentId, bool], PendingAcknowledgement] = {}
        self._log = KeptLog()
        self._notices: list[DeviceNotice] = []
        self._last_notice = 0

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise KeystoreError("the keystore is closed; open it again")
            yield

    def create_identity(self) -> IdentityKey:
        with self._open():
            if self._identity is None:
                self._identity = IdentityKey.generate()
            return self._identity

    def identity(self) -> IdentityKey | None:
        with self._open():
            return self._identity

    def set_registration(self, registration: DeviceRegistration) -> None:
        with self._open():
            self._registration = registration

    def registration(self) -> DeviceRegistration | None:
        with self._open():
            return self._registration

    def set_fact(self, name: str, value: bytes | None) -> None:
        _check_fact(name, value)
        with self._open():
            if value is None:
                self._facts.pop(name, None)
            else:
                self._facts[name] = value

    def fact(self, name: str) -> bytes | None:
        with self._open():
            return self._facts.get(name)

    def next_counter(self) -> int:
        with self._open():
            self._counter += 1
            return self._counter

    def raise_counter(self, used: int) -> None:
        with self._open():
            self._counter = max(self._counter, used)

    def set_clock_offset_ms(self, offset_ms: int) -> None:
        with self._open():
            self._clock_offset_ms = offset_ms

    def clock_offset_ms(self) -> int | None:
        with self._open():
            return self._clock_offset_ms

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        with self._open():
            _check_root(self._root_public_key, root_public_key, replace=replace)
            if self._root_public_key not in (None, root_public_key):
                self._entries.clear()
                self._revocations = None
            self._root_public_key = root_public_key

    def pinned_root(self) -> bytes | None:
        with self._open():
            return self._root_public_key

    def put_sender_entry(self, sender_id: SenderId, role: EntryRole, serial: int, not_after_ms: int, blob: bytes) -> bool:
        with self._open():
            known = self._entries.get((sender_id, role))
            if known is not None and known[0] > serial:
                return False
            self._entries[sender_id, role] = (serial, not_after_ms, blob)
            return True

    def sender_entry(self, sender_id: SenderId, role: EntryRole) -> bytes | None:
        with self._open():
            known = self._entries.get((sender_id, role))
            return None if known is None else known[2] or None

    def put_revocations(self, serial: int, blob: bytes) -> bool:
        with self._open():
            if self._revocations is not None and self._revocations[0] > serial:
                return False
            self._revocations = (serial, blob)
            return True

    def revocations(self) -> bytes | None:
        with self._open():
            return None if self._revocations is None else self._revocations[1]

    def reserve_prekey_ids(self, count: int) -> int:
        with self._open():
            first = self._next_prekey_id
            self._next_prekey_id += _check_count(first, count)
            return first

    def add_prekeys(self, prekeys: Sequence[PrekeyPrivate]) -> None:
        added = {(each.suite, each.prekey_id, each.kind): (each, _deleted_at_ms(each)) for each in prekeys}
        with self._open():
            if len(added) != len(prekeys) or not self._prekeys.keys().isdisjoint(added):
                raise KeystoreError("a prekey id was used twice; take ids from reserve_prekey_ids()")
            self._prekeys.update(added)

    def prekey(self, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        with self._open():
            known = self._prekeys.get((suite, prekey_id, kind))
            return None if known is None else known[0]

    def newest_signed_prekey(self) -> PrekeyPrivate | None:
        with self._open():
            signed = [each for each, _ in self._prekeys.values() if each.kind == PrekeyKind.SIGNED]
            return max(signed, key=lambda each: (each.created_at_ms, each.prekey_id), default=None)

    def prekey_count(self, kind: PrekeyKind) -> int:
        with self._open():
            return sum(each.kind == kind for each, _ in self._prekeys.values())

    def retire_signed_prekeys(self, keep_prekey_id: int, now_ms: int) -> None:
        with self._open():
            for name, (each, deleted_at_ms) in self._prekeys.items():
                if each.kind == PrekeyKind.SIGNED and each.prekey_id != keep_prekey_id:
                    self._prekeys[name] = (each, min(deleted_at_ms, now_ms + PREKEY_RETENTION_MS))

    def seen(self, sender_id: SenderId, content_id: ContentId, envelope_digest: bytes) -> Seen:
        with self._open():
            return self._seen_as(sender_id, content_id, envelope_digest)

    def _seen_as(self, sender_id: SenderId, content_id: ContentId, envelope_digest: bytes) -> Seen:
        known = self._seen.get((sender_id, content_id))
        return _seen_as(None if known is None else known[0], envelope_digest)

    def commit_message(
        self,
        message: InboxMessage,
        *,
        acknowledgement: PendingAcknowledgement,
        used_prekey: tuple[int, int, PrekeyKind] | None = None,
    ) -> CommitResult:
        _check_commit(message, acknowledgement)
        with self._open():
            seen = self._seen_as(message.sender_id, message.content_id, message.envelope_digest)
            if seen is Seen.OTHER:
                return CommitResult(CommitOutcome.CONFLICT)
            if used_prekey is not None and used_prekey[2] == PrekeyKind.ONE_TIME:
                self._prekeys.pop(used_prekey, None)
            self._queue(acknowledgement)
            if seen is Seen.THIS:
                return CommitResult(CommitOutcome.DUPLICATE)
            self._seen[message.sender_id, message.content_id] = (message.envelope_digest, message.expires_at_ms + DEDUP_MARGIN_MS)
            rivals = [
                each
                for each in self._messages.values()
                if message.replace_key is not None and each.sender_id == message.sender_id and each.replace_key == message.replace_key
            ]
            if any(each.created_at_ms > message.created_at_ms for each in rivals):
                return CommitResult(CommitOutcome.SUPERSEDED)
            for each in rivals:
                del self._messages[each.local_id]
            self._last_local_id += 1
            self._messages[self._last_local_id] = replace(message, local_id=self._last_local_id)
            return CommitResult(CommitOutcome.STORED, tuple(each.message_id for each in rivals))

    def queue_acknowledgement(self, acknowledgement: PendingAcknowledgement, *, sender_id: SenderId | None = None) -> bool:
        with self._open():
            if sender_id is not None and acknowledgement.outcome in _NEGATIVE:
                seen = self._seen_as(sender_id, acknowledgement.content_id, acknowledgement.envelope_digest)
                if seen is Seen.THIS:
                    return False
            return self._queue(acknowledgement)

    def _queue(self, acknowledgement: PendingAcknowledgement) -> bool:
        is_read = acknowledgement.outcome == AckOutcome.READ
        name = (acknowledgement.message_id, acknowledgement.content_id, is_read)
        return self._acknowledgements.setdefault(name, acknowledgement) is acknowledgement

    def pending_acknowledgements(self, limit: int = PAGE_MAX) -> list[PendingAcknowledgement]:
        with self._open():
            return list(self._acknowledgements.values())[: _check_page(limit)]

    def confirm_acknowledgements(self, acknowledgements: Iterable[PendingAcknowledgement]) -> None:
        with self._open():
            for each in acknowledgements:
                self._acknowledgements.pop((each.message_id, each.content_id, each.outcome == AckOutcome.READ), None)

    def inbox(self, *, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._open():
            newest_first = reversed(self._messages.values())
            page = [each for each in newest_first if before is None or each.local_id < before]
            return page[: _check_page(limit)]

    def message(self, message_id: MessageId) -> InboxMessage | None:
        with self._open():
            return self._find(message_id)

    def _find(self, message_id: MessageId) -> InboxMessage | None:
        return next((each for each in reversed(self._messages.values()) if each.message_id == message_id), None)

    def mark_shown(self, message_id: MessageId, at_ms: int) -> bool:
        with self._open():
            message = self._find(message_id)
            if message is None or message.shown_at_ms is not None:
                return False
            self._messages[message.local_id] = replace(message, shown_at_ms=at_ms)
            return True

    def mark_read(self, message_id: MessageId, at_ms: int, *, acknowledge: bool) -> bool:
        with self._open():
            message = self._find(message_id)
            if message is None or message.read_at_ms is not None:
                return False
            self._messages[message.local_id] = replace(message, read_at_ms=at_ms)
            if acknowledge:
                self._queue(_read_acknowledgement(message_id, message.content_id, message.envelope_digest, at_ms))
            return True

    def delete_message(self, message_id: MessageId) -> bool:
        with self._open():
            message = self._find(message_id)
            if message is None:
                return False
            del self._messages[message.local_id]
            return True

    def device_log(self) -> KeptLog:
        with self._open():
            return self._log

    def put_device_log(self, known: KeptLog, log: KeptLog, notices: Sequence[DeviceNotice]) -> list[DeviceNotice] | None:
        with self._open():
            if self._log.head != known.head:
                return None
            self._log = log
            added = []
            for each in notices:
                if each.device_id is None and any(other.kind is each.kind for other in self._notices):
                    continue
                self._last_notice += 1
                added.append(replace(each, number=self._last_notice))
                self._notices.append(added[-1])
            del self._notices[:-NOTICES_MAX]
            return added

    def notices(self) -> list[DeviceNotice]:
        with self._open():
            return list(self._notices)

    def dismiss_notices(self, numbers: Iterable[int]) -> None:
        gone = set(numbers)
        with self._open():
            self._notices = [each for each in self._notices if each.number not in gone]

    def purge(self, now_ms: int) -> None:
        with self._open():
            self._prekeys = {name: each for name, each in self._prekeys.items() if each[1] > now_ms}
            self._seen = {name: each for name, each in self._seen.items() if each[1] > now_ms}
            for name, (serial, not_after_ms, _) in self._entries.items():
                if not_after_ms <= now_ms:
                    self._entries[name] = (serial, not_after_ms, b"")

    def erase(self) -> None:
        with self._open():
            self._forget()

    def close(self) -> None:
        with self._lock:
            self._closed = True


_NEGATIVE: Final = frozenset({AckOutcome.UNDELIVERED, AckOutcome.BLOCKED})


def _check_root(pinned: bytes | None, root_public_key: bytes, *, replace: bool) -> None:
    if len(root_public_key) != 32:
        raise KeystoreError("a root public key is 32 bytes")
    if pinned is not None and pinned != root_public_key and not replace:
        raise RootMismatch("another platform root is pinned here; pass replace=True only for a root shipped in the app")


def _check_count(first: int, count: int) -> int:
    if count < 1 or first + count - 1 > 0xFFFF_FFFF:
        raise KeystoreError("prekey ids are 32 bits; reserve 1 or more, and register the device anew when they run out")
    return count


def _deleted_at_ms(prekey: PrekeyPrivate) -> int:
    """When a private half goes if nothing else happens: no message sealed to it in time can still be alive."""
    return prekey.expires_at_ms + PREKEY_RETENTION_MS


_SCHEMA = """
-- One value per name: identity_seed, root_public_key, clock_offset_ms, counter, next_prekey_id, log_head, the registration,
-- the revocation list with its serial, and "fact:…" for the caller's own.
CREATE TABLE facts (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;

-- Private prekeys; deleted_at_ms is when purge() takes them.
CREATE TABLE prekeys (
    suite INTEGER NOT NULL, prekey_id INTEGER NOT NULL, kind INTEGER NOT NULL,
    public_key BLOB NOT NULL, private_key BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, deleted_at_ms INTEGER NOT NULL,
    PRIMARY KEY (suite, prekey_id, kind)
) WITHOUT ROWID;

-- Verified sender entries; serial is 8 bytes big-endian, since it may exceed SQLite's signed integers. The blob of one that has run
-- out is emptied, while its serial stays: no older entry that ends later takes its place.
CREATE TABLE entries (
    sender_id BLOB NOT NULL, role INTEGER NOT NULL, serial BLOB NOT NULL,
    not_after_ms INTEGER NOT NULL, blob BLOB NOT NULL,
    PRIMARY KEY (sender_id, role)
) WITHOUT ROWID;

-- Content that was committed once; outlives the message.
CREATE TABLE seen (
    sender_id BLOB NOT NULL, content_id BLOB NOT NULL, until_ms INTEGER NOT NULL,
    PRIMARY KEY (sender_id, content_id)
) WITHOUT ROWID;

CREATE TABLE messages (
    local_id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id BLOB NOT NULL, content_id BLOB NOT NULL, sender_id BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, received_at_ms INTEGER NOT NULL,
    content BLOB NOT NULL, replace_key BLOB, flags INTEGER NOT NULL,
    shown_at_ms INTEGER, read_at_ms INTEGER
);
CREATE INDEX messages_by_id ON messages (message_id);
CREATE INDEX messages_by_replace_key ON messages (sender_id, replace_key) WHERE replace_key IS NOT NULL;

-- What the server has not confirmed, in the order queued.
CREATE TABLE acknowledgements (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id BLOB NOT NULL, content_id BLOB NOT NULL, is_read INTEGER NOT NULL,
    outcome INTEGER NOT NULL, reason_code INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    UNIQUE (message_id, content_id, is_read)
);
"""
# What each later version adds to the one before it.
_UPGRADES: Final = {
    2: f"""
-- The device log as far as it was followed; fact "log_head" is the head after its last entry.
CREATE TABLE device_log (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL);

-- What the person was not told yet, or has not dismissed.
CREATE TABLE notices (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind INTEGER NOT NULL, at_ms INTEGER NOT NULL, device_id BLOB, identity_public_key BLOB NOT NULL
);

-- Which envelope it was; zeros: taken in before this column, and not known any more.
ALTER TABLE seen ADD COLUMN envelope_digest BLOB NOT NULL DEFAULT x'{NO_DIGEST.hex()}';
ALTER TABLE messages ADD COLUMN envelope_digest BLOB NOT NULL DEFAULT x'{NO_DIGEST.hex()}';
ALTER TABLE acknowledgements ADD COLUMN envelope_digest BLOB NOT NULL DEFAULT x'{NO_DIGEST.hex()}';

-- These cannot be signed without it. The service sends what is not acknowledged again, and finds it seen; that it was read is lost.
DELETE FROM acknowledgements
""",  # noqa: S608 - a constant
}
_TABLES: Final = ("facts", "prekeys", "entries", "seen", "messages", "acknowledgements", "device_log", "notices")
_MESSAGE_COLUMNS: Final = (
    "message_id, content_id, envelope_digest, sender_id, created_at_ms, expires_at_ms, received_at_ms, content, replace_key, flags,"
    " shown_at_ms, read_at_ms"
)


class SqliteKeystore:
    """A keystore in one SQLite file, safe for several threads and processes at once, durable at every return.

    The file and its companions are readable by their owner only. Contents are not encrypted: on a phone the system's
    file protection does that. Deleted keys are overwritten in the file; a copy can stay in the write-ahead log until
    the next `purge()` or the last `close()`.
    """

    __slots__ = ("_connection", "_lock")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the store, or make it if the file does not exist; its directory must exist.

        Raises KeystoreTooNew for a file written by a newer release, KeystoreError for one that is not a keystore.
        """
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        file = Path(path)
        with _creating, _translated():
            _create_private(file)
            connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with self._lock, _translated():
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated():
            if self._connection is None:
                raise KeystoreError("the keystore is closed; open it again")
            yield self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start, so what it reads stays true until it commits."""
        with self._reading() as connection, _transaction(connection):
            yield connection

    def create_identity(self) -> IdentityKey:
        with self._writing() as connection:
            seed = _value(connection, "identity_seed")
            if seed is None:
                seed = IdentityKey.generate().seed
                _set_value(connection, "identity_seed", seed)
            return IdentityKey.from_seed(seed)

    def identity(self) -> IdentityKey | None:
        with self._reading() as connection:
            seed = _value(connection, "identity_seed")
            return None if seed is None else IdentityKey.from_seed(seed)

    def set_registration(self, registration: DeviceRegistration) -> None:
        with self._writing() as connection:
            _set_value(connection, "device_id", registration.device_id)
            _set_value(connection, "subscriber_id", registration.subscriber_id)
            _set_value(connection, "app_id", registration.app_id.encode())
            _set_number(connection, "registered_at_ms", registration.registered_at_ms)

    def registration(self) -> DeviceRegistration | None:
        with self._reading() as connection:
            rows: dict[str, bytes] = dict(
                connection.execute(
                    "SELECT name, value FROM facts WHERE name IN ('device_id', 'subscriber_id', 'app_id', 'registered_at_ms')"
                )
            )
            if len(rows) != 4:
                return None
            return DeviceRegistration(
                DeviceId(rows["device_id"]),
                SubscriberId(rows["subscriber_id"]),
                AppId(rows["app_id"].decode()),
                int.from_bytes(rows["registered_at_ms"], "big", signed=True),
            )

    def set_fact(self, name: str, value: bytes | None) -> None:
        _check_fact(name, value)
        with self._writing() as connection:
            _set_value(connection, f"fact:{name}", value)

    def fact(self, name: str) -> bytes | None:
        with self._reading() as connection:
            return _value(connection, f"fact:{name}")

    def next_counter(self) -> int:
        with self._writing() as connection:
            counter = (_number(connection, "counter") or 0) + 1
            _set_number(connection, "counter", counter)
            return counter

    def raise_counter(self, used: int) -> None:
        with self._writing() as connection:
            _set_number(connection, "counter", max(_number(connection, "counter") or 0, used))

    def set_clock_offset_ms(self, offset_ms: int) -> None:
        with self._writing() as connection:
            _set_number(connection, "clock_offset_ms", offset_ms)

    def clock_offset_ms(self) -> int | None:
        with self._reading() as connection:
            return _number(connection, "clock_offset_ms")

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        with self._writing() as connection:
            pinned = _value(connection, "root_public_key")
            _check_root(pinned, root_public_key, replace=replace)
            if pinned not in (None, root_public_key):
                connection.execute("DELETE FROM entries")
                _set_value(connection, "revocations", None)
                _set_value(connection, "revocations_serial", None)
            _set_value(connection, "root_public_key", root_public_key)

    def pinned_root(self) -> bytes | None:
        with self._reading() as connection:
            return _value(connection, "root_public_key")

    def put_sender_entry(self, sender_id: SenderId, role: EntryRole, serial: int, not_after_ms: int, blob: bytes) -> bool:
        with self._writing() as connection:
            done = connection.execute(
                "INSERT INTO entries (sender_id, role, serial, not_after_ms, blob) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (sender_id, role) DO UPDATE"
                " SET serial = excluded.serial, not_after_ms = excluded.not_after_ms, blob = excluded.blob"
                " WHERE excluded.serial >= entries.serial",
                (sender_id, int(role), serial.to_bytes(8, "big"), min(not_after_ms, _I64_MAX), blob),
            )
            return done.rowcount == 1

    def sender_entry(self, sender_id: SenderId, role: EntryRole) -> bytes | None:
        with self._reading() as connection:
            row: tuple[bytes] | None = connection.execute(
                "SELECT blob FROM entries WHERE sender_id = ? AND role = ?", (sender_id, int(role))
            ).fetchone()
            return None if row is None else row[0] or None

    def put_revocations(self, serial: int, blob: bytes) -> bool:
        with self._writing() as connection:
            if (_number(connection, "revocations_serial") or 0) > serial:
                return False
            _set_number(connection, "revocations_serial", serial)
            _set_value(connection, "revocations", blob)
            return True

    def revocations(self) -> bytes | None:
        with self._reading() as connection:
            return _value(connection, "revocations")

    def reserve_prekey_ids(self, count: int) -> int:
        with self._writing() as connection:
            first = _number(connection, "next_prekey_id") or 1
            _set_number(connection, "next_prekey_id", first + _check_count(first, count))
            return first

    def add_prekeys(self, prekeys: Sequence[PrekeyPrivate]) -> None:
        rows = [
            (
                each.suite,
                each.prekey_id,
                int(each.kind),
                each.public_key,
                each.private_key,
                each.created_at_ms,
                each.expires_at_ms,
                _deleted_at_ms(each),
            )
            for each in prekeys
        ]
        with self._writing() as connection:
            try:
                connection.executemany("INSERT INTO prekeys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            except sqlite3.IntegrityError:
                raise KeystoreError("a prekey id was used twice; take ids from reserve_prekey_ids()") from None

    def prekey(self, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        with self._reading() as connection:
            return _prekey(
                connection.execute(
                    "SELECT suite, prekey_id, kind, public_key, private_key, created_at_ms, expires_at_ms"
                    " FROM prekeys WHERE suite = ? AND prekey_id = ? AND kind = ?",
                    (suite, prekey_id, int(kind)),
                )
            )

    def newest_signed_prekey(self) -> PrekeyPrivate | None:
        with self._reading() as connection:
            return _prekey(
                connection.execute(
                    "SELECT suite, prekey_id, kind, public_key, private_key, created_at_ms, expires_at_ms"
                    " FROM prekeys WHERE kind = ? ORDER BY created_at_ms DESC, prekey_id DESC LIMIT 1",
                    (int(PrekeyKind.SIGNED),),
                )
            )

    def prekey_count(self, kind: PrekeyKind) -> int:
        with self._reading() as connection:
            row: tuple[int] = connection.execute("SELECT count(*) FROM prekeys WHERE kind = ?", (int(kind),)).fetchone()
            return row[0]

    def retire_signed_prekeys(self, keep_prekey_id: int, now_ms: int) -> None:
        with self._writing() as connection:
            connection.execute(
                "UPDATE prekeys SET deleted_at_ms = min(deleted_at_ms, ?) WHERE kind = ? AND prekey_id <> ?",
                (now_ms + PREKEY_RETENTION_MS, int(PrekeyKind.SIGNED), keep_prekey_id),
            )

    def seen(self, sender_id: SenderId, content_id: ContentId, envelope_digest: bytes) -> Seen:
        with self._reading() as connection:
            return _seen(connection, sender_id, content_id, envelope_digest)

    def commit_message(
        self,
        message: InboxMessage,
        *,
        acknowledgement: PendingAcknowledgement,
        used_prekey: tuple[int, int, PrekeyKind] | None = None,
    ) -> CommitResult:
        _check_commit(message, acknowledgement)
        with self._writing() as connection:
            seen = _seen(connection, message.sender_id, message.content_id, message.envelope_digest)
            if seen is Seen.OTHER:
                return CommitResult(CommitOutcome.CONFLICT)
            if used_prekey is not None and used_prekey[2] == PrekeyKind.ONE_TIME:
                connection.execute(
                    "DELETE FROM prekeys WHERE suite = ? AND prekey_id = ? AND kind = ?",
                    (used_prekey[0], used_prekey[1], int(used_prekey[2])),
                )
            _queue(connection, acknowledgement)
            if seen is Seen.THIS:
                return CommitResult(CommitOutcome.DUPLICATE)
            connection.execute(
                "INSERT INTO seen (sender_id, content_id, envelope_digest, until_ms) VALUES (?, ?, ?, ?)",
                (message.sender_id, message.content_id, message.envelope_digest, message.expires_at_ms + DEDUP_MARGIN_MS),
            )
            # A replace key of NULL equals nothing, so such a message has no rivals.
            rivals = connection.execute(
                "SELECT local_id, message_id, created_at_ms FROM messages WHERE sender_id = ? AND replace_key = ? ORDER BY local_id",
                (message.sender_id, message.replace_key),
            ).fetchall()
            if any(created_at_ms > message.created_at_ms for _, _, created_at_ms in rivals):
                return CommitResult(CommitOutcome.SUPERSEDED)
            connection.executemany("DELETE FROM messages WHERE local_id = ?", [(rival[0],) for rival in rivals])
            connection.execute(
                f"INSERT INTO messages ({_MESSAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
                (
                    message.message_id,
                    message.content_id,
                    message.envelope_digest,
                    message.sender_id,
                    message.created_at_ms,
                    message.expires_at_ms,
                    message.received_at_ms,
                    message.content,
                    message.replace_key,
                    message.flags,
                    message.shown_at_ms,
                    message.read_at_ms,
                ),
            )
            return CommitResult(CommitOutcome.STORED, tuple(MessageId(rival[1]) for rival in rivals))

    def queue_acknowledgement(self, acknowledgement: PendingAcknowledgement, *, sender_id: SenderId | None = None) -> bool:
        with self._writing() as connection:
            if sender_id is not None and acknowledgement.outcome in _NEGATIVE:
                seen = _seen(connection, sender_id, acknowledgement.content_id, acknowledgement.envelope_digest)
                if seen is Seen.THIS:
                    return False
            return _queue(connection, acknowledgement)

    def pending_acknowledgements(self, limit: int = PAGE_MAX) -> list[PendingAcknowledgement]:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT message_id, content_id, envelope_digest, outcome, reason_code, at_ms FROM acknowledgements"
                " ORDER BY position LIMIT ?",
                (_check_page(limit),),
            )
            return [
                PendingAcknowledgement(MessageId(message_id), ContentId(content_id), envelope_digest, AckOutcome(outcome), reason, at_ms)
                for message_id, content_id, envelope_digest, outcome, reason, at_ms in rows
            ]

    def confirm_acknowledgements(self, acknowledgements: Iterable[PendingAcknowledgement]) -> None:
        names = [(each.message_id, each.content_id, each.outcome == AckOutcome.READ) for each in acknowledgements]
        with self._writing() as connection:
            connection.executemany("DELETE FROM acknowledgements WHERE message_id = ? AND content_id = ? AND is_read = ?", names)

    def inbox(self, *, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS}, local_id FROM messages WHERE local_id < ?"  # noqa: S608 - constants
                " ORDER BY local_id DESC LIMIT ?",
                (_I64_MAX if before is None else before, _check_page(limit)),
            )
            return [InboxMessage(*row) for row in rows]

    def message(self, message_id: MessageId) -> InboxMessage | None:
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS}, local_id FROM messages WHERE message_id = ?"  # noqa: S608 - constants
                " ORDER BY local_id DESC LIMIT 1",
                (message_id,),
            ).fetchone()
            return None if row is None else InboxMessage(*row)

    def mark_shown(self, message_id: MessageId, at_ms: int) -> bool:
        with self._writing() as connection:
            done = connection.execute(
                "UPDATE messages SET shown_at_ms = ? WHERE shown_at_ms IS NULL"
                " AND local_id = (SELECT max(local_id) FROM messages WHERE message_id = ?)",
                (at_ms, message_id),
            )
            return done.rowcount == 1

    def mark_read(self, message_id: MessageId, at_ms: int, *, acknowledge: bool) -> bool:
        with self._writing() as connection:
            row: tuple[bytes, bytes] | None = connection.execute(
                "UPDATE messages SET read_at_ms = ? WHERE read_at_ms IS NULL"
                " AND local_id = (SELECT max(local_id) FROM messages WHERE message_id = ?) RETURNING content_id, envelope_digest",
                (at_ms, message_id),
            ).fetchone()
            if row is None:
                return False
            if acknowledge:
                _queue(connection, _read_acknowledgement(message_id, ContentId(row[0]), row[1], at_ms))
            return True

    def delete_message(self, message_id: MessageId) -> bool:
        with self._writing() as connection:
            done = connection.execute(
                "DELETE FROM messages WHERE local_id = (SELECT max(local_id) FROM messages WHERE message_id = ?)",
                (message_id,),
            )
            return done.rowcount == 1

    def device_log(self) -> KeptLog:
        # One transaction: entries and head belong together.
        with self._reading() as connection, _transaction(connection, "DEFERRED"):
            entries = tuple(entry for (entry,) in connection.execute("SELECT entry FROM device_log ORDER BY seq"))
            return KeptLog(entries, _value(connection, "log_head") or b"")

    def put_device_log(self, known: KeptLog, log: KeptLog, notices: Sequence[DeviceNotice]) -> list[DeviceNotice] | None:
        with self._writing() as connection:
            if (_value(connection, "log_head") or b"") != known.head:
                return None
            kept = len(known.entries) if log.entries[: len(known.entries)] == known.entries else 0
            connection.execute("DELETE FROM device_log WHERE seq > ?", (kept,))
            rows = list(enumerate(log.entries[kept:], start=kept + 1))
            connection.executemany("INSERT INTO device_log (seq, entry) VALUES (?, ?)", rows)
            _set_value(connection, "log_head", log.head)
            added = [each for each in notices if _add_notice(connection, each)]
            # Numbers follow each other: nobody else writes meanwhile.
            (last,) = connection.execute("SELECT coalesce(max(number), 0) FROM notices").fetchone()
            connection.execute("DELETE FROM notices WHERE number <= ?", (last - NOTICES_MAX,))
            return [replace(each, number=last - len(added) + n) for n, each in enumerate(added, start=1)]

    def notices(self) -> list[DeviceNotice]:
        with self._reading() as connection:
            return [
                DeviceNotice(NoticeKind(kind), at_ms, None if device_id is None else DeviceId(device_id), identity_public_key, number)
                for kind, at_ms, device_id, identity_public_key, number in connection.execute(
                    "SELECT kind, at_ms, device_id, identity_public_key, number FROM notices ORDER BY number"
                )
            ]

    def dismiss_notices(self, numbers: Iterable[int]) -> None:
        with self._writing() as connection:
            connection.executemany("DELETE FROM notices WHERE number = ?", [(number,) for number in numbers])

    def purge(self, now_ms: int) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM prekeys WHERE deleted_at_ms <= ?", (now_ms,))
            connection.execute("DELETE FROM seen WHERE until_ms <= ?", (now_ms,))
            connection.execute("UPDATE entries SET blob = x'' WHERE not_after_ms <= ?", (now_ms,))
        self._empty_log()

    def erase(self) -> None:
        with self._writing() as connection:
            for table in _TABLES:
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
        self._empty_log()

    def _empty_log(self) -> None:
        """Move the write-ahead log into the file and cut it, so that no deleted key stays in it.

        SQLite answers "busy" in a row, not by an error, when another process is reading; the next call does it then.
        """
        with self._reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


_creating = threading.Lock()


def _create_private(file: Path) -> None:
    """Make the file, empty and for its owner only, or narrow the mode of the one that is there.

    SQLite gives its log files the mode of the database, so the mode has to be right from the start. A file that exists
    is never opened here: closing it again would drop the locks that SQLite holds on it in this process.
    """
    try:
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            found = file.lstat().st_mode
            if not stat.S_ISREG(found):
                raise KeystoreError("the keystore is not a regular file; give it a path of its own") from None
            if stat.S_IMODE(found) != 0o600:
                file.chmod(0o600)
    except OSError as error:
        raise KeystoreError(f"the keystore file cannot be opened ({error.strerror}); check its directory") from error


def _prepare(connection: sqlite3.Connection) -> None:
    """Settings of a connection, then the schema if the file is empty; safe against another process doing the same."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError:
            # The switch to WAL does not wait for locks as everything else does.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    with _transaction(connection):
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application_id != _APPLICATION_ID and tables:
            raise KeystoreError("the file is a database of something else; give the keystore a file of its own")
        if version > SCHEMA_VERSION:
            raise KeystoreTooNew(f"the keystore has schema {version} and this release knows {SCHEMA_VERSION}; upgrade the app")
        if version == 0:
            _execute_each(connection, _SCHEMA)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        if version < SCHEMA_VERSION:
            for upgrade in range(max(version, 1) + 1, SCHEMA_VERSION + 1):
                _execute_each(connection, _UPGRADES[upgrade])
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _execute_each(connection: sqlite3.Connection, script: str) -> None:
    """One by one: executescript() would commit the transaction."""
    for statement in script.split(";\n"):
        connection.execute(statement)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """SQLite's errors as ours. Its texts name tables and files, never values."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise KeystoreBusy("another process holds the keystore; try again") from error
        raise KeystoreError(
            f"the keystore file cannot be used ({error}); check free space and the file, restore or register anew"
        ) from error
    except OverflowError as error:
        raise KeystoreError("a number exceeds 63 bits; times are Unix milliseconds") from error


def _value(connection: sqlite3.Connection, name: str) -> bytes | None:
    row: tuple[bytes] | None = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _set_value(connection: sqlite3.Connection, name: str, value: bytes | None) -> None:
    if value is None:
        connection.execute("DELETE FROM facts WHERE name = ?", (name,))
    else:
        connection.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))


def _number(connection: sqlite3.Connection, name: str) -> int | None:
    value = _value(connection, name)
    return None if value is None else int.from_bytes(value, "big", signed=True)


def _set_number(connection: sqlite3.Connection, name: str, number: int) -> None:
    """Numbers are kept as 16 bytes, since a counter of 64 unsigned bits exceeds SQLite's integers."""
    _set_value(connection, name, number.to_bytes(16, "big", signed=True))


def _prekey(rows: sqlite3.Cursor) -> PrekeyPrivate | None:
    row = rows.fetchone()
    if row is None:
        return None
    suite, prekey_id, kind, public_key, private_key, created_at_ms, expires_at_ms = row
    return PrekeyPrivate(suite, prekey_id, PrekeyKind(kind), public_key, private_key, created_at_ms, expires_at_ms)


def _seen(connection: sqlite3.Connection, sender_id: SenderId, content_id: ContentId, envelope_digest: bytes) -> Seen:
    row: tuple[bytes] | None = connection.execute(
        "SELECT envelope_digest FROM seen WHERE sender_id = ? AND content_id = ?", (sender_id, content_id)
    ).fetchone()
    return _seen_as(None if row is None else row[0], envelope_digest)


def _add_notice(connection: sqlite3.Connection, notice: DeviceNotice) -> bool:
    done = connection.execute(
        "INSERT INTO notices (kind, at_ms, device_id, identity_public_key) SELECT ?1, ?2, ?3, ?4"
        " WHERE ?3 IS NOT NULL OR NOT EXISTS (SELECT 1 FROM notices WHERE kind = ?1)",
        (int(notice.kind), notice.at_ms, notice.device_id, notice.identity_public_key),
    )
    return done.rowcount == 1


def _queue(connection: sqlite3.Connection, acknowledgement: PendingAcknowledgement) -> bool:
    done = connection.execute(
        "INSERT INTO acknowledgements (message_id, content_id, envelope_digest, is_read, outcome, reason_code, at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            acknowledgement.message_id,
            acknowledgement.content_id,
            acknowledgement.envelope_digest,
            acknowledgement.outcome == AckOutcome.READ,
            int(acknowledgement.outcome),
            acknowledgement.reason_code,
            acknowledgement.at_ms,
        ),
    )
    return done.rowcount == 1
