"""A database of an earlier version, with rows in it, becomes one of this version."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest

from sealpush.devicelog import EntryKind, LogEntry
from sealpush.envelope import evidence_of
from sealpush.ids import DeviceId, SenderId, uuid7
from sealpush.keys import EntryRole
from sealpush.model import Reason, State
from sealpush.proofs import AckOutcome
from sealpushd.accounts.rules import SignedEntry
from sealpushd.accounts.store import PLATFORM, AccountStore, EntryQuery
from sealpushd.fetch import rules
from sealpushd.fetch.rules import NewMessage, TakeQuery
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform import migrate as migrations
from sealpushd.platform.db import Connection, Database, connect, load_sql
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import Migration, check_schema, migrate
from sealpushd.registration import store as registration_store
from tests.contract.harness import LIMIT_S, Migrated, until_locked_out
from tests.contract.mailboxes import IOS, QUARANTINED, TOKEN_GONE, a_session, ack, an_id, claim, delivery, message, put, report

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Sorts before the keys of all deliveries.
FIRST = DeviceId(bytes(16)), rules.BEFORE_ALL


async def at_version(migrated: Migrated, monkeypatch: pytest.MonkeyPatch, service: str, version: int) -> dict[str, str]:
    """A database as a program of this version of the schema made it."""

    def known_then(service: str) -> Sequence[Migration]:
        return [each for each in known(service) if each.version <= version]

    known = migrations.migrations_of
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "migrations_of", known_then)
        return await migrated(service)


async def to_now(urls: dict[str, str], service: str) -> Sequence[str]:
    """Migrate; what was applied."""
    applied = await migrate(urls["admin"], {}, [service])
    await check_schema(urls[service], service)
    return applied


async def test_a_mailbox_with_rows_gets_its_index_and_goes_on(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = await at_version(migrated, monkeypatch, "fetch", 1)
    db = Database(urls["fetch"], "fetch", 1)
    await db.open()
    sql = await connect(urls["admin"], search_path="fetch")
    try:
        assert await sql.fetchval("SELECT to_regclass('open_deliveries_quarantined')") is None
        store, device = MailboxStore(db), an_id()
        failed, waiting = message(delivery(device)), message(delivery(device))
        await row_of_mailbox_2(sql, failed)
        session = await a_session(store)
        (wake_up,) = await claim(store, session, failed)
        await store.report(session, [report(wake_up, QUARANTINED)])
        await row_of_mailbox_2(sql, waiting)
        assert "fetch/0002_quarantined" in await to_now(urls, "fetch")
        assert await sql.fetchval("SELECT to_regclass('open_deliveries_quarantined')") is not None
        assert await store.requeue(failed.app_id, IOS, FIRST) == [(device, failed.message_id)]
        (wake_up,) = await claim(store, session, waiting)
        await store.report(session, [report(wake_up, TOKEN_GONE)])
        await sql.execute("UPDATE open_deliveries SET closes_at = now() WHERE close_reason = 105")
        assert {each.message_id for each in await store.sweep()} == {failed.message_id, waiting.message_id}
        (record,) = await store.statuses(failed.key.sender_id, [failed.message_id])
        assert (record.deliveries[0].state, record.deliveries[0].reason) == (State.UNDELIVERED, Reason.TOKEN_GONE)
    finally:
        await sql.close()
        await db.aclose()


async def row_of_mailbox_2(sql: Connection, of: NewMessage) -> None:
    """A message for one device as version 2 of the mailbox, and version 1, stored it."""
    (to,) = of.deliveries
    about = of.message_id, of.key.sender_id, of.subscriber_id, of.app_id
    await sql.execute(
        "INSERT INTO messages (message_id, sender_id, subscriber_id, app_id, order_id, content_class, content_id, created_at, expires_at)"
        " VALUES ($1, $2, $3, $4, $1, 1, $5, $6, $7)",
        *about,
        of.content_id,
        of.created_at,
        of.expires_at,
    )
    await sql.execute("INSERT INTO contents (message_id, head, tail) VALUES ($1, $2, $3)", of.message_id, of.head, of.tail)
    await sql.execute(
        "INSERT INTO deliveries (message_id, device_id, state, platform, stanza) VALUES ($1, $2, 1, $3, $4)",
        of.message_id,
        to.device_id,
        IOS,
        to.stanza,
    )
    await sql.execute(
        "INSERT INTO open_deliveries (message_id, sender_id, subscriber_id, app_id, device_id, wake_up_id, content_class, platform,"
        " priority, muted, bytes, expires_at, closes_at, next_attempt_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, 1, $7, 2, false, 10, $8, $8, now())",
        *about,
        to.device_id,
        an_id(),
        IOS,
        of.expires_at,
    )


async def test_messages_of_before_are_delivered_and_have_receipts_without_an_envelope(
    migrated: Migrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await at_version(migrated, monkeypatch, "fetch", 2)
    db = Database(urls["fetch"], "fetch", 1)
    await db.open()
    sql = await connect(urls["admin"], search_path="fetch")
    try:
        store, old, new = MailboxStore(db), message(), message(head=b"h" * 126, tail=b"t" * 364)
        await row_of_mailbox_2(sql, old)
        assert "fetch/0003_receipts" in await to_now(urls, "fetch")
        await put(store, new)
        for each in (old, new):
            ((taken,),) = await store.take([TakeQuery(each.deliveries[0].device_id)])
            assert (taken.head, taken.tail) == (each.head, each.tail)
            signed = ack(each)
            await store.acknowledge([signed, ack(each, AckOutcome.READ)])
            (kept,) = await store.evidence(each.key.sender_id, [each.message_id])
            assert kept.evidence == (evidence_of(each.head, each.tail) if each is new else b"")
            (delivery_kept,) = kept.deliveries
            assert [each.outcome for each in delivery_kept.acks] == [AckOutcome.DELIVERED, AckOutcome.READ]
            assert delivery_kept.acks[0].signature == signed.signature
    finally:
        await sql.close()
        await db.aclose()


async def test_present_entries_become_the_first_of_the_history(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = await at_version(migrated, monkeypatch, "accounts", 2)
    db = Database(urls["accounts"], "accounts", 1)
    await db.open()
    sql = await connect(urls["admin"], search_path="accounts")
    try:
        organisation, sender, root = uuid7(), SenderId(uuid7()), bytes(32)
        await sql.execute("INSERT INTO organisations VALUES ($1, 'bank', '', 'A bank', '{}', '{}', 1, now(), now())", organisation)
        await sql.execute(
            "INSERT INTO senders (sender_id, organisation_id, name, sender_entry, entry_serial, display_name, root_public_key, scopes,"
            " created_at, updated_at) VALUES ($1, $2, 'cards', 'entry', 7, 'A bank', $3, '{}', now(), now())",
            sender,
            organisation,
            root,
        )
        await sql.execute("INSERT INTO platform_entries VALUES ($1, 'platform', 3, 1, now())", root)
        assert "accounts/0003_entries" in await to_now(urls, "accounts")
        store, at = AccountStore(db), await sql.fetchval("SELECT now()")
        queries = [EntryQuery(EntryRole.SENDER, sender, None, at), EntryQuery(EntryRole.PLATFORM, PLATFORM, root, at)]
        assert await store.entries(queries) == [[SignedEntry(root, b"entry")], [SignedEntry(root, b"platform")]]
    finally:
        await sql.close()
        await db.aclose()


async def test_installations_of_before_are_not_dead_and_can_die(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = await at_version(migrated, monkeypatch, "registration", 1)
    sql = await connect(urls["admin"], search_path="registration")
    try:
        subscriber, with_token, without = uuid7(), uuid7(), uuid7()
        await rows_of_version_1(sql, subscriber, with_token, without)
        assert "registration/0002_dead_tokens" in await to_now(urls, "registration")

        async def resolved() -> dict[bytes, tuple[bool, bool]]:
            """Whether each installation has a token, and whether one of it died."""
            rows = await sql.fetch(registration_store.RESOLVE, [1], [""], [b"number"], ["bank"], [an_id()])
            return {row[5]: (row[12], row[13]) for row in rows}

        assert await resolved() == {with_token: (True, False), without: (False, False)}
        now = await sql.fetchval("SELECT now()")
        dead = await sql.fetch(
            load_sql(Path(registration_store.__file__).parent, "forget_tokens"), [with_token], [b"hash"], [now], now, now
        )
        assert [row["device_id"] for row in dead] == [with_token]
        assert await resolved() == {with_token: (False, True), without: (False, False)}
    finally:
        await sql.close()


async def rows_of_version_1(sql: Connection, subscriber: bytes, with_token: bytes, without: bytes) -> None:
    await sql.execute("INSERT INTO subscribers VALUES ($1, now())", subscriber)
    await sql.execute(
        "INSERT INTO identifiers (kind, scope, lookup_hmac, ciphertext, subscriber_id, bound_at) VALUES (1, '', $1, $1, $2, now())",
        b"number",
        subscriber,
    )
    for device, token in ((with_token, b"hash"), (without, None)):
        await sql.execute(
            "INSERT INTO installations (device_id, subscriber_id, app_id, platform, push_environment, push_topic, push_token,"
            " push_token_lookup, token_registered_at, push_allowed_by_os, push_allowed_by_app, state, is_primary, subscriptions,"
            " app_version, locale, identity_public_key, registration_id, created_at, updated_at, last_seen_at)"
            " VALUES ($1, $2, 'bank', 1, 1, '', $3, $3, CASE WHEN $3::bytea IS NULL THEN NULL ELSE now() - interval '1 day' END, true,"
            " true, 1, false, '{}', '', '', $4, $1, now(), now(), now())",
            device,
            subscriber,
            token,
            bytes(32),
        )


async def test_devices_of_before_are_recovered_as_their_log_says(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = await at_version(migrated, monkeypatch, "keys", 2)
    sql = await connect(urls["admin"], search_path="keys")
    subscriber, key = uuid7(), bytes(32)
    first, second, gone, back = (uuid7() for _ in range(4))
    added, removed = EntryKind.ADDED, EntryKind.REMOVED
    history = [(added, first), (added, second), (added, gone), (removed, gone), (added, back), (removed, back), (added, back)]
    try:
        for device in (first, second, gone, back):
            await sql.execute(
                "INSERT INTO devices VALUES ($1, $2, $3, 1, 0, now(), CASE WHEN $4 THEN now() END)", device, subscriber, key, device == gone
            )
        for seq, (kind, device) in enumerate(history, start=1):
            entry = LogEntry(kind, DeviceId(device), key, 1, recovered=kind is added and seq > 1).encode()
            await sql.execute("INSERT INTO device_log VALUES ($1, $2, $3, $4)", subscriber, seq, entry, bytes(32))
        assert "keys/0003_vouched" in await to_now(urls, "keys")
        rows = await sql.fetch("SELECT device_id, recovered FROM devices WHERE removed_at IS NULL")
        assert {row["device_id"]: row["recovered"] for row in rows} == {first: False, second: True, back: True}
    finally:
        await sql.close()


async def test_a_migration_behind_a_long_transaction_lets_writers_by_and_says_who_holds_it_up(
    migrated: Migrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = await at_version(migrated, monkeypatch, "fetch", 3)
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(migrations, "LOCK_PAUSE_S", 0.01)
    monkeypatch.setattr(migrations, "LOCK_ATTEMPTS_MAX", 3)
    long, writer = await connect(urls["admin"], search_path="fetch"), await connect(urls["admin"], search_path="fetch")
    lock = "LOCK TABLE status_events IN ROW EXCLUSIVE MODE"
    try:
        async with asyncio.timeout(LIMIT_S):
            transaction = long.transaction()
            await transaction.start()
            await long.execute(lock)
            migrating = asyncio.create_task(migrate(urls["admin"], {}, ["fetch"]))
            await until_locked_out(long)
            async with writer.transaction():
                await writer.execute(lock)
            with pytest.raises(StoreUnavailable) as refused:
                await migrating
            told = str(refused.value)
            assert "fetch/0004_journal" in told
            assert f"process {long.get_server_pid()} of PostgreSQL (sealpush-fetch) holds RowExclusiveLock" in told
            assert "status_events" in told
            await transaction.rollback()
            assert "fetch/0004_journal" in await to_now(urls, "fetch")
    finally:
        await long.close()
        await writer.close()


async def test_a_migration_waits_for_a_transaction_that_ends(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = await at_version(migrated, monkeypatch, "fetch", 3)
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(migrations, "LOCK_PAUSE_S", 0.01)
    other = await connect(urls["admin"], search_path="fetch")
    try:
        async with asyncio.timeout(LIMIT_S):
            async with other.transaction():
                await other.execute("LOCK TABLE status_events IN ROW EXCLUSIVE MODE")
                migrating = asyncio.create_task(to_now(urls, "fetch"))
                await until_locked_out(other)
            assert "fetch/0004_journal" in await migrating
    finally:
        await other.close()


@pytest.mark.parametrize("change", ["UPDATE journal_epoch SET dropped_xid = '0'", "DELETE FROM journal_epoch"])
async def test_a_service_reads_what_the_journal_depends_on_and_does_not_change_it(migrated: Migrated, change: str) -> None:
    urls = await migrated("fetch")
    # Rights are given anew with every run.
    await migrate(urls["admin"], {}, ["fetch"])
    sql = await connect(urls["fetch"], search_path="fetch")
    try:
        assert await sql.fetchval("SELECT count(*) FROM journal_epoch") == 1
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await sql.execute(change)
    finally:
        await sql.close()
