"""What a device keeps: identity, private prekeys, pinned root, inbox, the device log, and what it still owes the server.

`Keystore` is the contract; `MemoryKeystore` (memory_keystore.py) and `SqliteKeystore` (sqlite_keystore.py) are its
implementations. All calls are synchronous and short; run them in a thread where blocking matters. Every call is atomic: it happens
completely or raises KeystoreError and changes nothing. Times are Unix milliseconds by the server's clock.

The order that keeps a message from being lost or shown twice: open the envelope, `commit_message()`, then send what
`pending_acknowledgements()` gives, then `confirm_acknowledgements()`. A crash in between repeats a step, harmlessly.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from sealpush.devicelog import DeviceNotice
from sealpush.errors import KeystoreError, RootMismatch
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, SenderId, SubscriberId
from sealpush.keys import DAY_MS, PREKEY_RETENTION_MS, EntryRole, IdentityKey, PrekeyKind, PrekeyPrivate
from sealpush.proofs import NO_DIGEST, AckOutcome

# A record of what was seen outlives its message: a clock that is wrong by days must not bring the message back.
DEDUP_MARGIN_MS: Final = 7 * DAY_MS
PAGE_MAX: Final = 500  # acknowledgements and inbox pages: one page fits memory and one request of the server's API
FACT_BYTES_MAX: Final = 4096  # facts are addresses and numbers, not documents

# More than a person reads; the oldest go.
NOTICES_MAX: Final = 1000


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
    """What became of the message. True exactly when it is new and to be shown."""

    outcome: CommitOutcome

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
    own rising number, 0 before the message is stored. `shown_at_ms` and `read_at_ms` are None until it happens. `replaces` is filled by
    the store: messages that were shown and that this one took the place of, directly or by a message that was never shown.
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
    replaces: tuple[MessageId, ...] = ()
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

    def raise_proven_time(self, at_ms: int) -> int:
        """Keep the latest time that is proven (sealpush/proven.py), and give it; an earlier one changes nothing."""
        ...

    def proven_time_ms(self) -> int:
        """The latest time kept by `raise_proven_time()`, 0 before the first one."""
        ...

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        """Pin the platform's root. Another root than the pinned one raises RootMismatch unless `replace` is given; then goes what was
        kept because the old one had signed it: entries, the revocation list, the proven time."""
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

    def highest_prekey_id(self) -> int:
        """The highest id that `reserve_prekey_ids()` gave, or that was raised to; 0 before the first."""
        ...

    def raise_prekey_id(self, used: int) -> None:
        """Never give `used` or a lower id again: for a store restored from a backup, told by the server."""
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

    def inbox(self, *, alive_at_ms: int = 0, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        """Stored messages that end later than `alive_at_ms`, newest first; `before` is the `local_id` of the last one of the page before.

        A page with fewer than `limit` messages, or PAGE_MAX if that is less, is the last.
        """
        ...

    def message(self, message_id: MessageId) -> InboxMessage | None:
        """The stored message with this id, or None."""
        ...

    def unshown(self, *, alive_at_ms: int, after: int = 0, limit: int = PAGE_MAX) -> list[InboxMessage]:
        """Stored messages that were not shown yet and end later than `alive_at_ms`, oldest first; `after` is the `local_id` of the last
        one of the page before."""
        ...

    def mark_shown(self, local_ids: Sequence[int], at_ms: int) -> frozenset[int]:
        """Note that messages are shown: those of them that were not before and are here. Whoever gets one shows it, nobody else."""
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


# --- what every implementation goes by ---

# Dropped where the envelope was committed meanwhile.
NEGATIVE_OUTCOMES: Final = frozenset({AckOutcome.UNDELIVERED, AckOutcome.BLOCKED})


def check_fact(name: str, value: bytes | None) -> None:
    """Raises KeystoreError for a name or value that no store takes."""
    if not 1 <= len(name) <= 64 or (value is not None and len(value) > FACT_BYTES_MAX):
        raise KeystoreError(f"a fact has a name of 1 to 64 characters and at most {FACT_BYTES_MAX} bytes")


def check_page(limit: int) -> int:
    """How many rows a page has. Raises KeystoreError for none."""
    if limit < 1:
        raise KeystoreError(f"limit must be 1 to {PAGE_MAX}")
    return min(limit, PAGE_MAX)


def check_commit(message: InboxMessage, acknowledgement: PendingAcknowledgement) -> None:
    """Raises KeystoreError where the acknowledgement is not that of the message, or an id or digest has a wrong length."""
    named = (acknowledgement.message_id, acknowledgement.content_id, acknowledgement.envelope_digest)
    if named != (message.message_id, message.content_id, message.envelope_digest):
        raise KeystoreError("the acknowledgement is for another message; build it from the one that is committed")
    if len(message.content_id) != 16 or len(message.sender_id) != 16 or len(message.message_id) != 16:
        raise KeystoreError("message_id, content_id and sender_id must be 16 raw bytes")
    if len(message.envelope_digest) != 32 or message.envelope_digest == NO_DIGEST:
        raise KeystoreError("envelope_digest must be the 32 bytes of Envelope.digest")


def replaces(rivals: Iterable[tuple[MessageId, int | None, tuple[MessageId, ...]]]) -> tuple[MessageId, ...]:
    """What a message replaces that takes the place of these: (id, shown at, what it replaced itself). What was never shown hands on what it
    replaced; what was shown has told it."""
    found: list[MessageId] = []
    for message_id, shown_at_ms, replaced in rivals:
        found += replaced if shown_at_ms is None else (message_id,)
    return tuple(found)


def read_acknowledgement(message_id: MessageId, content_id: ContentId, envelope_digest: bytes, at_ms: int) -> PendingAcknowledgement:
    """That the user read a message."""
    return PendingAcknowledgement(message_id, content_id, envelope_digest, AckOutcome.READ, 0, at_ms)


def seen_as(known: bytes | None, envelope_digest: bytes) -> Seen:
    """What a record of seen content, by the digest in it, says of an envelope with that content id."""
    if known is None:
        return Seen.NEVER
    # A record of schema 1 does not say which envelope it was.
    return Seen.THIS if known in (envelope_digest, NO_DIGEST) else Seen.OTHER


def check_root(pinned: bytes | None, root_public_key: bytes, *, replace: bool) -> None:
    """Raises RootMismatch where another root is pinned, unless it is to be replaced; KeystoreError for what is no root."""
    if len(root_public_key) != 32:
        raise KeystoreError("a root public key is 32 bytes")
    if pinned is not None and pinned != root_public_key and not replace:
        raise RootMismatch("another platform root is pinned here; pass replace=True only for a root shipped in the app")


def check_prekey_ids(first: int, count: int) -> int:
    """The count, where so many ids from `first` on are left. Raises KeystoreError."""
    if count < 1 or first + count - 1 > 0xFFFF_FFFF:
        raise KeystoreError("prekey ids are 32 bits; reserve 1 or more, and register the device anew when they run out")
    return count


def prekey_deleted_at_ms(prekey: PrekeyPrivate) -> int:
    """When a private half goes if nothing else happens: no message sealed to it in time can still be alive."""
    return prekey.expires_at_ms + PREKEY_RETENTION_MS
