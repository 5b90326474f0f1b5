"""A keystore in one SQLite file: what it reads and writes. How the file is made and opened stands in sqlite_file.py."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sealpush.devicelog import DeviceNotice, NoticeKind
from sealpush.errors import KeystoreError
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, SenderId, SubscriberId
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
from sealpush.sqlite_file import TABLES, open_file, transaction, translated

_I64_MAX: Final = (1 << 63) - 1
_MESSAGE_COLUMNS: Final = (
    "message_id, content_id, envelope_digest, sender_id, created_at_ms, expires_at_ms, received_at_ms, content, replace_key, flags,"
    " shown_at_ms, read_at_ms, replaces"
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
        self._connection: sqlite3.Connection | None = open_file(Path(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with self._lock, translated():
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, translated():
            if self._connection is None:
                raise KeystoreError("the keystore is closed; open it again")
            yield self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start, so what it reads stays true until it commits."""
        with self._reading() as connection, transaction(connection):
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
        check_fact(name, value)
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

    def raise_proven_time(self, at_ms: int) -> int:
        with self._writing() as connection:
            proven_ms = max(_number(connection, "proven_time_ms") or 0, at_ms)
            _set_number(connection, "proven_time_ms", proven_ms)
            return proven_ms

    def proven_time_ms(self) -> int:
        with self._reading() as connection:
            return _number(connection, "proven_time_ms") or 0

    def pin_root(self, root_public_key: bytes, *, replace: bool = False) -> None:
        with self._writing() as connection:
            pinned = _value(connection, "root_public_key")
            check_root(pinned, root_public_key, replace=replace)
            if pinned not in (None, root_public_key):
                connection.execute("DELETE FROM entries")
                _set_value(connection, "revocations", None)
                _set_value(connection, "revocations_serial", None)
                _set_value(connection, "proven_time_ms", None)
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
            _set_number(connection, "next_prekey_id", first + check_prekey_ids(first, count))
            return first

    def highest_prekey_id(self) -> int:
        with self._reading() as connection:
            return (_number(connection, "next_prekey_id") or 1) - 1

    def raise_prekey_id(self, used: int) -> None:
        with self._writing() as connection:
            _set_number(connection, "next_prekey_id", max(_number(connection, "next_prekey_id") or 1, used + 1))

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
                prekey_deleted_at_ms(each),
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
        check_commit(message, acknowledgement)
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
                "SELECT local_id, created_at_ms, message_id, shown_at_ms, replaces FROM messages"
                " WHERE sender_id = ? AND replace_key = ? ORDER BY local_id",
                (message.sender_id, message.replace_key),
            ).fetchall()
            if any(created_at_ms > message.created_at_ms for _, created_at_ms, *_ in rivals):
                return CommitResult(CommitOutcome.SUPERSEDED)
            connection.executemany("DELETE FROM messages WHERE local_id = ?", [(rival[0],) for rival in rivals])
            connection.execute(
                f"INSERT INTO messages ({_MESSAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
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
                    b"".join(replaces((message_id, shown_at_ms, _ids(replaced)) for _, _, message_id, shown_at_ms, replaced in rivals)),
                ),
            )
            return CommitResult(CommitOutcome.STORED)

    def queue_acknowledgement(self, acknowledgement: PendingAcknowledgement, *, sender_id: SenderId | None = None) -> bool:
        with self._writing() as connection:
            if sender_id is not None and acknowledgement.outcome in NEGATIVE_OUTCOMES:
                seen = _seen(connection, sender_id, acknowledgement.content_id, acknowledgement.envelope_digest)
                if seen is Seen.THIS:
                    return False
            return _queue(connection, acknowledgement)

    def pending_acknowledgements(self, limit: int = PAGE_MAX) -> list[PendingAcknowledgement]:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT message_id, content_id, envelope_digest, outcome, reason_code, at_ms FROM acknowledgements"
                " ORDER BY position LIMIT ?",
                (check_page(limit),),
            )
            return [
                PendingAcknowledgement(MessageId(message_id), ContentId(content_id), envelope_digest, AckOutcome(outcome), reason, at_ms)
                for message_id, content_id, envelope_digest, outcome, reason, at_ms in rows
            ]

    def confirm_acknowledgements(self, acknowledgements: Iterable[PendingAcknowledgement]) -> None:
        names = [(each.message_id, each.content_id, each.outcome == AckOutcome.READ) for each in acknowledgements]
        with self._writing() as connection:
            connection.executemany("DELETE FROM acknowledgements WHERE message_id = ? AND content_id = ? AND is_read = ?", names)

    def inbox(self, *, alive_at_ms: int = 0, before: int | None = None, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS}, local_id FROM messages WHERE expires_at_ms > ? AND local_id < ?"  # noqa: S608 - constants
                " ORDER BY local_id DESC LIMIT ?",
                (alive_at_ms, _I64_MAX if before is None else before, check_page(limit)),
            )
            return [_message(row) for row in rows]

    def message(self, message_id: MessageId) -> InboxMessage | None:
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS}, local_id FROM messages WHERE message_id = ?"  # noqa: S608 - constants
                " ORDER BY local_id DESC LIMIT 1",
                (message_id,),
            ).fetchone()
            return None if row is None else _message(row)

    def unshown(self, *, alive_at_ms: int, after: int = 0, limit: int = PAGE_MAX) -> list[InboxMessage]:
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS}, local_id FROM messages WHERE shown_at_ms IS NULL"  # noqa: S608 - constants
                " AND expires_at_ms > ? AND local_id > ? ORDER BY local_id LIMIT ?",
                (alive_at_ms, after, check_page(limit)),
            )
            return [_message(row) for row in rows]

    def mark_shown(self, local_ids: Sequence[int], at_ms: int) -> frozenset[int]:
        with self._writing() as connection:
            return frozenset(
                local_id
                for local_id in local_ids
                if connection.execute(
                    "UPDATE messages SET shown_at_ms = ? WHERE local_id = ? AND shown_at_ms IS NULL", (at_ms, local_id)
                ).rowcount
                == 1
            )

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
                _queue(connection, read_acknowledgement(message_id, ContentId(row[0]), row[1], at_ms))
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
        with self._reading() as connection, transaction(connection, "DEFERRED"):
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
            for table in TABLES:
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
        self._empty_log()

    def _empty_log(self) -> None:
        """Move the write-ahead log into the file and cut it, so that no deleted key stays in it.

        SQLite answers "busy" in a row, not by an error, when another process is reading; the next call does it then.
        """
        with self._reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


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


def _message(row: tuple[Any, ...]) -> InboxMessage:
    *columns, replaced, local_id = row
    return InboxMessage(*[*columns, _ids(replaced), local_id])


def _ids(joined: bytes) -> tuple[MessageId, ...]:
    return tuple(MessageId(joined[at : at + 16]) for at in range(0, len(joined), 16))


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
    return seen_as(None if row is None else row[0], envelope_digest)


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
