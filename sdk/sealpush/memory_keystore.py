"""A keystore that is gone with its process: for tests, and for phones that are simulated by the thousand."""

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from sealpush.devicelog import DeviceNotice
from sealpush.errors import KeystoreError
from sealpush.ids import ContentId, MessageId, SenderId
from sealpush.keys import PREKEY_RETENTION_MS, EntryRole, IdentityKey, PrekeyKind, PrekeyPrivate
from sealpush.keystore import (
    DEDUP_MARGIN_MS,
    NEGATIVE_OUTCOMES,
    NOTICES_MAX,
    PAGE_MAX,
    CommitOutcome,
    CommitResult,
    DeviceRegistration,
    InboxMessage,
    KeptLog,
    PendingAcknowledgement,
    Seen,
    check_commit,
    check_fact,
    check_page,
    check_prekey_ids,
    check_root,
    prekey_deleted_at_ms,
    read_acknowledgement,
    replaces,
    seen_as,
)
from sealpush.proofs import AckOutcome


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
        "_proven_ms",
        "_registration",
        "_revocations",
        "_root_public_key",
        "_seen",
        "_unshown",
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
        self._proven_ms = 0
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
        # local_ids of those that were not shown, in rising order: what was shown may be many times more
        self._unshown: dict[int, None] = {}
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
        check_fact(name, value)
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

    def raise_proven_time(self, at_ms: int) -> int:
        with self._open():
            self._proven_ms = max(self._proven_ms, at_ms)
            return self._proven_ms

    def proven_time_ms(self) -> int:
        with self._open():
            return self._proven_ms

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        with self._open():
            check_root(self._root_public_key, root_public_key, replace=replace)
            if self._root_public_key not in (None, root_public_key):
                self._entries.clear()
                self._revocations = None
                self._proven_ms = 0
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
            self._next_prekey_id += check_prekey_ids(first, count)
            return first

    def highest_prekey_id(self) -> int:
        with self._open():
            return self._next_prekey_id - 1

    def raise_prekey_id(self, used: int) -> None:
        with self._open():
            self._next_prekey_id = max(self._next_prekey_id, used + 1)

    def add_prekeys(self, prekeys: Sequence[PrekeyPrivate]) -> None:
        added = {(each.suite, each.prekey_id, each.kind): (each, prekey_deleted_at_ms(each)) for each in prekeys}
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
        return seen_as(None if known is None else known[0], envelope_digest)

    def commit_message(
        self,
        message: InboxMessage,
        *,
        acknowledgement: PendingAcknowledgement,
        used_prekey: tuple[int, int, PrekeyKind] | None = None,
    ) -> CommitResult:
        check_commit(message, acknowledgement)
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
                self._delete(each)
            self._last_local_id += 1
            replaced = replaces((each.message_id, each.shown_at_ms, each.replaces) for each in rivals)
            self._messages[self._last_local_id] = replace(message, replaces=replaced, local_id=self._last_local_id)
            if message.shown_at_ms is None:
                self._unshown[self._last_local_id] = None
            return CommitResult(CommitOutcome.STORED)

    def _delete(self, message: InboxMessage) -> None:
        del self._messages[message.local_id]
        self._unshown.pop(message.local_id, None)

    def queue_acknowledgement(self, acknowledgement: PendingAcknowledgement, *, sender_id: SenderId | None = None) -> bool:
        with self._open():
            if sender_id is not None and acknowledgement.outcome in NEGATIVE_OUTCOMES:
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
            return list(self._acknowledgements.values())[: check_page(limit)]

    def confirm_acknowledgements(self, acknowledgements: Iterable[PendingAcknowledgement]) -> None:
        with self._open():
            for each in acknowledgements:
                self._acknowledgements.pop((each.message_id, each.content_id, each.outcome == AckOutcome.READ), None)

    def inbox(self, *, alive_at_ms: int = 0, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._open():
            newest_first = reversed(self._messages.values())
            found = (each for each in newest_first if each.expires_at_ms > alive_at_ms and (before is None or each.local_id < before))
            return list(itertools.islice(found, check_page(limit)))

    def message(self, message_id: MessageId) -> InboxMessage | None:
        with self._open():
            return self._find(message_id)

    def _find(self, message_id: MessageId) -> InboxMessage | None:
        return next((each for each in reversed(self._messages.values()) if each.message_id == message_id), None)

    def unshown(self, *, alive_at_ms: int, after: int = 0, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._open():
            oldest_first = (self._messages[local_id] for local_id in self._unshown if local_id > after)
            return list(itertools.islice((each for each in oldest_first if each.expires_at_ms > alive_at_ms), check_page(limit)))

    def mark_shown(self, local_ids: Sequence[int], at_ms: int) -> frozenset[int]:
        with self._open():
            marked = frozenset(each for each in local_ids if each in self._unshown)
            for local_id in marked:
                self._messages[local_id] = replace(self._messages[local_id], shown_at_ms=at_ms)
                del self._unshown[local_id]
            return marked

    def mark_read(self, message_id: MessageId, at_ms: int, *, acknowledge: bool) -> bool:
        with self._open():
            message = self._find(message_id)
            if message is None or message.read_at_ms is not None:
                return False
            self._messages[message.local_id] = replace(message, read_at_ms=at_ms)
            if acknowledge:
                self._queue(read_acknowledgement(message_id, message.content_id, message.envelope_digest, at_ms))
            return True

    def delete_message(self, message_id: MessageId) -> bool:
        with self._open():
            message = self._find(message_id)
            if message is None:
                return False
            self._delete(message)
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
