"""The SQLite file of a keystore: its schema and what each version adds, how it is made, opened and written to."""

import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from sealpush.errors import KeystoreBusy, KeystoreError, KeystoreTooNew
from sealpush.proofs import NO_DIGEST

BUSY_TIMEOUT_S: Final = 10.0  # a commit takes milliseconds; a notification extension lives about 30 s
SCHEMA_VERSION: Final = 3
_APPLICATION_ID: Final = 0x53504B31  # "SPK1": tells this file from any other SQLite file

_SCHEMA = """
-- One value per name: identity_seed, root_public_key, clock_offset_ms, proven_time_ms, counter, next_prekey_id, log_head, the
-- registration, the revocation list with its serial, and "fact:…" for the caller's own.
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
    3: """
-- The ids, one after the other, of messages that were shown and that this one took the place of.
ALTER TABLE messages ADD COLUMN replaces BLOB NOT NULL DEFAULT x'';

-- What is handed over next, oldest first, however many were before.
CREATE INDEX messages_unshown ON messages (local_id, expires_at_ms) WHERE shown_at_ms IS NULL
""",
}
TABLES: Final = ("facts", "prekeys", "entries", "seen", "messages", "acknowledgements", "device_log", "notices")


_creating = threading.Lock()


def open_file(file: Path) -> sqlite3.Connection:
    """The file as a connection, made if it is not there, with the schema of this release; `transaction()` begins one.

    Raises KeystoreTooNew for a file written by a newer release, KeystoreError for one that is not a keystore.
    """
    with _creating, translated():
        _create_private(file)
        connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection)
        except BaseException:
            connection.close()
            raise
    return connection


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
    with transaction(connection):
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
def transaction(connection: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
    """One transaction: committed at the end of the block, rolled back when it raises."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def translated() -> Iterator[None]:
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
