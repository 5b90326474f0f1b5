"""The platform on a real PostgreSQL: migrations, connections that are lost and heal, and the vault's keys."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from sealpushd.platform import migrate as migrations
from sealpushd.platform.db import Database, connect
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import SERVICES, SchemaError, check_schema, migrate
from sealpushd.platform.vault import FileKeyWrapper, Vault, VaultError
from tests.contract.harness import LIMIT_S, Migrated

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECRET = "hunter2"


async def new_database(postgres: str, name: str) -> str:
    admin = await connect(postgres)
    try:
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}"')
        await admin.execute(f'CREATE DATABASE "{name}"')
    finally:
        await admin.close()
    return urlsplit(postgres)._replace(path=f"/{name}").geturl()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "publishing")


@pytest_asyncio.fixture(loop_scope="session")
async def db(urls: dict[str, str]) -> AsyncIterator[Database]:
    database = Database(urls["fetch"], "fetch", 2)
    await database.open()
    yield database
    await database.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def admin(urls: dict[str, str]) -> AsyncIterator[Callable[..., Awaitable[object]]]:
    connection = await connect(urls["admin"])
    yield connection.fetchval
    await connection.close()


async def end_backends(admin: Callable[..., Awaitable[object]]) -> None:
    await admin("SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE usename = 'fetch_app'")


async def test_every_schema_is_made_once_and_migrating_again_changes_nothing(postgres: str) -> None:
    url = await new_database(postgres, "platform_once")
    applied = await migrate(url, {})
    assert [name.split("/")[0] for name in applied if name.endswith("/0001_first")] == list(SERVICES)
    assert await migrate(url, {}) == []


async def test_migrations_that_run_at_the_same_time_apply_each_once(postgres: str) -> None:
    url = await new_database(postgres, "platform_twice")
    runs = await asyncio.gather(*(migrate(url, {"fetch_app": "a password of a test"}) for _ in range(3)))
    applied = [name for run in runs for name in run]
    assert len(applied) == len(set(applied))
    assert len([name for name in applied if name.endswith("/0001_first")]) == len(SERVICES)


async def test_a_service_refuses_a_database_that_was_never_migrated(postgres: str) -> None:
    url = await new_database(postgres, "platform_empty")
    with pytest.raises(SchemaError, match="sealpush db migrate"):
        await check_schema(url, "fetch")


async def test_a_service_refuses_a_database_that_lacks_its_migration(urls: dict[str, str]) -> None:
    await check_schema(urls["fetch"], "fetch")
    with pytest.raises(SchemaError, match="lacks migration 0001_first"):
        await check_schema(urls["fetch"], "accounts")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ('ALTER TABLE "fetch".messages OWNER TO postgres', "messages belongs to postgres"),
        ('ALTER SCHEMA "fetch" OWNER TO postgres', "the schema belongs to postgres"),
        ('ALTER FUNCTION "fetch".ensure_partitions OWNER TO postgres', r"ensure_partitions\(\) belongs to postgres"),
        ('REVOKE ALL ON "fetch".deliveries FROM fetch_app', "fetch_app may not select deliveries"),
        ('REVOKE INSERT ON "fetch".messages FROM fetch_app', "fetch_app may not insert messages"),
        ('REVOKE USAGE ON SEQUENCE "fetch".status_events_seq FROM fetch_app', "fetch_app may not use status_events_seq"),
        ('REVOKE USAGE ON SCHEMA "fetch" FROM fetch_app', "fetch_app may not use the schema"),
        ('GRANT EXECUTE ON FUNCTION "fetch".drop_partitions TO PUBLIC', r"everybody may call drop_partitions\(\)"),
        (
            'REVOKE EXECUTE ON FUNCTION "fetch".drop_partitions FROM sealpush_maintenance',
            r"sealpush_maintenance may not call drop_partitions\(\)",
        ),
    ],
)
async def test_a_service_refuses_a_schema_that_is_not_its_roles_own_and_migrate_puts_it_right(
    postgres: str, damage: str, fault: str
) -> None:
    url = await new_database(postgres, f"platform_{uuid.uuid4().hex}")
    await migrate(url, {}, ["fetch"])
    await check_schema(url, "fetch")
    connection = await connect(url)
    try:
        await connection.execute(damage)
        with pytest.raises(SchemaError, match=f"{fault}.*sealpush db migrate"):
            await check_schema(url, "fetch")
    finally:
        await connection.close()
    assert await migrate(url, {}, ["fetch"]) == []
    await check_schema(url, "fetch")


async def test_a_service_refuses_a_schema_that_lost_something(postgres: str) -> None:
    url = await new_database(postgres, "platform_lost")
    await migrate(url, {}, ["fetch"])
    connection = await connect(url)
    try:
        await connection.execute('DROP FUNCTION "fetch".drop_partitions; DROP INDEX "fetch".open_deliveries_claim')
    finally:
        await connection.close()
    for _ in range(2):
        with pytest.raises(SchemaError, match=r"has lost the function drop_partitions; the index open_deliveries_claim; restore"):
            await check_schema(url, "fetch")
        # What is gone does not become right by migrating.
        assert await migrate(url, {}, ["fetch"]) == []


async def test_a_newer_and_a_changed_database_are_refused_and_stay_untouched(postgres: str) -> None:
    url = await new_database(postgres, "platform_newer")
    await migrate(url, {}, ["fetch"])
    connection = await connect(url)
    try:
        await connection.execute("INSERT INTO sealpush_meta.migrations VALUES ('fetch', 9000, '9000_later', '')")
        for attempt in (migrate(url, {}, ["fetch"]), check_schema(url, "fetch")):
            with pytest.raises(SchemaError, match=r"newer Sealpush.*9000_later"):
                await attempt
        await connection.execute("DELETE FROM sealpush_meta.migrations WHERE version = 9000")
        await connection.execute("UPDATE sealpush_meta.migrations SET checksum = 'other' WHERE version = 1")
        for attempt in (migrate(url, {}, ["fetch"]), check_schema(url, "fetch")):
            with pytest.raises(SchemaError, match="0001_first was changed"):
                await attempt
    finally:
        await connection.close()


async def test_a_migration_that_fails_leaves_nothing_and_the_next_run_goes_on(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = await new_database(postgres, "platform_fails")
    broken = migrations.Migration("fetch", 1, "0001_first", "CREATE TABLE half (n int); SELECT 1 / 0;")
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "migrations_of", lambda _: [broken])
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate(url, {}, ["fetch"])
    connection = await connect(url)
    try:
        assert await connection.fetchval("SELECT to_regclass('fetch.half')") is None
    finally:
        await connection.close()
    assert await migrate(url, {}, ["fetch"]) != []


async def test_a_role_that_may_not_create_roles_is_told_so(urls: dict[str, str]) -> None:
    with pytest.raises(SchemaError, match="role that may create roles"):
        await migrate(urls["fetch"], {}, ["fetch"])


@pytest.mark.parametrize(
    "statement",
    [
        'CREATE TABLE "fetch".mine (n int)',
        "CREATE TABLE public.mine (n int)",
        "CREATE SCHEMA mine",
        'DROP TABLE "fetch".messages',
        'ALTER TABLE "fetch".messages ADD COLUMN n int',
        'TRUNCATE "fetch".messages',
        "SELECT * FROM publishing.vault_keys",
        'SELECT "fetch".drop_partitions()',
        'SELECT "fetch".ensure_partitions()',
        "UPDATE sealpush_meta.migrations SET checksum = ''",
        "SET ROLE fetch_owner",
    ],
)
async def test_a_services_role_reads_and_writes_its_own_rows_and_nothing_else(urls: dict[str, str], statement: str) -> None:
    connection = await connect(urls["fetch"], search_path="fetch")
    try:
        assert await connection.fetchval("SELECT count(*) FROM messages") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_connection_lost_while_nobody_used_it_heals_by_the_next_call_but_one(
    db: Database, admin: Callable[..., Awaitable[object]]
) -> None:
    assert len(await db.fetch("t", "SELECT 1")) == 1
    await end_backends(admin)
    # Whether the loss is noticed before the next statement or by it is the kernel's affair.
    with suppress(StoreUnavailable):
        await db.fetch("t", "SELECT 1")
    for _ in range(4):
        assert len(await db.fetch("t", "SELECT 1")) == 1


async def test_a_connection_lost_during_a_statement_is_unavailable(db: Database, admin: Callable[..., Awaitable[object]]) -> None:
    task = asyncio.create_task(db.fetch("t", "SELECT pg_sleep(60)"))
    async with asyncio.timeout(LIMIT_S):
        while not await admin("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%'"):
            pass
        await end_backends(admin)
        with pytest.raises(StoreUnavailable, match="same request id"):
            await task
    assert len(await db.fetch("t", "SELECT 1")) == 1


async def test_a_cancelled_statement_ends_and_the_next_ones_are_served(db: Database, admin: Callable[..., Awaitable[object]]) -> None:
    task = asyncio.create_task(db.fetch("t", "SELECT pg_sleep(61)"))
    async with asyncio.timeout(LIMIT_S):
        while not await admin("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(61)%'"):
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(4):
            row = await db.fetch_one("t", "SELECT 7 AS seven")
            assert row is not None
            assert row["seven"] == 7
        while await admin("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(61)%' AND state = 'active'"):
            pass


async def test_a_transaction_cancelled_half_way_is_rolled_back(db: Database) -> None:
    entered = asyncio.Event()

    async def work() -> None:
        async with db.transaction() as connection:
            await connection.execute("INSERT INTO vault_keys VALUES ('half', '')")
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    async with asyncio.timeout(LIMIT_S):
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(3):
            assert not await db.fetch("t", "SELECT 1 FROM vault_keys WHERE name = 'half'")


async def test_whenever_a_transaction_is_cancelled_what_is_written_next_is_committed(
    urls: dict[str, str], admin: Callable[..., Awaitable[object]]
) -> None:
    one = Database(urls["fetch"], "fetch", 1)
    await one.open()

    async def work() -> None:
        async with one.transaction() as connection:
            await connection.execute("INSERT INTO vault_keys VALUES ('cancelled', '')")

    try:
        for turn in range(60):
            cancelled = asyncio.create_task(work())
            for _ in range(turn % 20):
                await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            async with one.transaction() as connection:
                await connection.execute("INSERT INTO vault_keys VALUES ($1, '')", f"turn {turn}")
            await one.execute("t", "INSERT INTO vault_keys VALUES ($1, '')", f"after {turn}")
            for name in (f"turn {turn}", f"after {turn}"):
                assert await admin('SELECT count(*) FROM "fetch".vault_keys WHERE name = $1', name) == 1
            await one.execute("t", "DELETE FROM vault_keys WHERE name = 'cancelled'")
    finally:
        await one.aclose()


async def test_a_value_that_does_not_fit_is_a_bug_that_shows_no_value_and_costs_no_connection(db: Database) -> None:
    row = await db.fetch_one("t", "SELECT pg_backend_pid() AS pid")
    assert row is not None
    for value in (SECRET, 2**40):
        with pytest.raises(ValueError, match="does not fit") as caught:
            await db.fetch("t", "SELECT $1::int2", value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        assert SECRET not in str(caught.value)
    again = await db.fetch_one("t", "SELECT pg_backend_pid() AS pid")
    assert again is not None
    assert again["pid"] == row["pid"]


async def test_more_callers_than_connections_take_turns(db: Database) -> None:
    async with asyncio.timeout(LIMIT_S):
        rows = await asyncio.gather(*(db.fetch("t", "SELECT $1::int AS n, pg_backend_pid() AS pid", n) for n in range(50)))
    assert [row[0]["n"] for row in rows] == list(range(50))
    assert len({row[0]["pid"] for row in rows}) <= 2


async def test_who_comes_while_a_database_closes_or_later_is_refused_and_who_waits_already_is_served(urls: dict[str, str]) -> None:
    """What a call tidies up may come after the end: without an answer it would wait for ever, and the call with it."""
    one = Database(urls["fetch"], "fetch", 1)
    await one.open()
    async with asyncio.timeout(LIMIT_S):
        async with one.connection():
            before = asyncio.create_task(one.fetch("t", "SELECT 1"))
            await asyncio.sleep(0)
            closing = asyncio.create_task(one.aclose())
            await asyncio.sleep(0)
            meanwhile = asyncio.create_task(one.fetch("t", "SELECT 1"))
            await asyncio.sleep(0)
        await closing
        assert len(await before) == 1
        for late in (meanwhile, one.fetch("t", "SELECT 1"), one.fetch("t", "SELECT 1")):
            with pytest.raises(StoreUnavailable, match="going away"):
                await late
        await one.aclose()


async def test_a_postgres_that_is_away_is_unavailable_and_names_no_password(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        await connect(f"postgresql://fetch_app:{SECRET}@/sealpush?host={tmp_path}")
    assert SECRET not in str(caught.value)


async def test_a_wrong_password_is_unavailable_and_is_not_shown(urls: dict[str, str]) -> None:
    parts = urlsplit(urls["fetch"])
    with pytest.raises(StoreUnavailable) as caught:
        await connect(parts._replace(netloc=f"fetch_app:{SECRET}@{parts.netloc.rpartition('@')[2]}").geturl())
    assert SECRET not in str(caught.value)


async def test_processes_that_open_a_vault_at_once_get_the_same_keys_and_another_outside_key_none(db: Database, tmp_path: Path) -> None:
    (tmp_path / "vault.key").write_text("33" * 32)
    wrapper = FileKeyWrapper(tmp_path / "vault.key")
    vaults = await asyncio.gather(*(Vault.open(db, "fetch", wrapper) for _ in range(4)))
    assert len({vault.lookup(b"value", "c") for vault in vaults}) == 1
    assert vaults[3].decrypt(vaults[0].encrypt(b"plain", "c"), "c") == b"plain"
    (tmp_path / "other.key").write_text("44" * 32)
    with pytest.raises(VaultError, match="is the vault key file the one"):
        await Vault.open(db, "fetch", FileKeyWrapper(tmp_path / "other.key"))
    # Keys of one service are not those of another, also when its rows are copied.
    with pytest.raises(VaultError):
        await Vault.open(db, "publishing", wrapper)
