"""Calls whose callers go away, on a real PostgreSQL: none costs a connection, holds a lock for long, or leaves half of its work."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from sealpushd.engines import Engines
from sealpushd.platform import db as databases
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.errors import StoreUnavailable
from tests.contract.harness import LIMIT_S, Migrated, until_locked_out

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONNECTIONS = 4
INSERT = "INSERT INTO vault_keys VALUES ($1, '')"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch")


@pytest_asyncio.fixture(loop_scope="session")
async def sql(urls: dict[str, str]) -> AsyncIterator[Connection]:
    connection = await connect(urls["admin"], search_path="fetch")
    await connection.execute("DELETE FROM vault_keys")
    yield connection
    await connection.close()


@pytest_asyncio.fixture(loop_scope="session")
async def db(urls: dict[str, str]) -> AsyncIterator[Database]:
    database = Database(urls["fetch"], "fetch", CONNECTIONS)
    await database.open()
    yield database
    await database.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def one(urls: dict[str, str]) -> AsyncIterator[Database]:
    database = Database(urls["fetch"], "fetch", 1)
    await database.open()
    yield database
    await database.aclose()


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An item for each connection that is asked for, be it in vain."""
    made: list[None] = []
    original = asyncpg.connect

    async def counted(*arguments: Any, **options: Any) -> Any:
        # Not those of the engines' supervisor, which looks after PostgreSQL from this process.
        if options.get("connection_class") is databases._Pinned:
            made.append(None)
        return await original(*arguments, **options)

    monkeypatch.setattr(asyncpg, "connect", counted)
    return made


async def backend(database: Database) -> int:
    row = await database.fetch_one("t", "SELECT pg_backend_pid() AS pid")
    assert row is not None
    return int(row["pid"])


async def warm(database: Database) -> set[int]:
    """The process ids of all its backends."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(database.connection()) for _ in range(CONNECTIONS)]
        return {await connection.fetchval("SELECT pg_backend_pid()") for connection in connections}


async def backends(sql: Connection, state: str = "%") -> set[int]:
    rows = await sql.fetch(
        "SELECT pid FROM pg_stat_activity WHERE usename = 'fetch_app' AND datname = current_database() AND state LIKE $1", state
    )
    return {row["pid"] for row in rows}


async def names(sql: Connection, like: str = "%") -> list[str]:
    return [row["name"] for row in await sql.fetch("SELECT name FROM vault_keys WHERE name LIKE $1 ORDER BY name", like)]


async def _statement(database: Database, name: str) -> None:
    await database.execute("t", INSERT, f"{name} a")


async def _pair(database: Database, name: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(INSERT, f"{name} a")
        await connection.execute(INSERT, f"{name} b")


async def _refused(database: Database, name: str) -> None:
    """Ends by an error inside: must leave nothing, also when the rollback is what is cancelled."""
    async with database.transaction() as connection:
        await connection.execute(INSERT, f"{name} never")
        await connection.execute(INSERT, f"{name} never")


async def _look(database: Database, _: str) -> None:
    async with database.connection() as connection:
        await connection.fetchval("SELECT 1")
        await connection.fetchrow("SELECT 2")


WORKS: list[Callable[[Database, str], Awaitable[None]]] = [_statement, _pair, _refused, _look]


@pytest.mark.parametrize("seed", range(3))
async def test_calls_cancelled_at_any_moment_cost_no_connection_and_leave_nothing_half(
    db: Database, sql: Connection, connects: list[None], seed: int
) -> None:
    dice = random.Random(seed)  # noqa: S311 - repeatable
    before = await warm(db)
    connects.clear()
    done: list[tuple[str, bool]] = []

    async def call(number: int) -> None:
        work, name = WORKS[number % len(WORKS)], f"{seed} {number:04}"
        task = asyncio.ensure_future(work(db, name))
        await asyncio.sleep(dice.choice((0, 0.0005, 0.001, 0.002, 0.005, 0.02)))
        for _ in range(dice.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or isinstance(result, asyncio.CancelledError | asyncpg.UniqueViolationError), result
        done.append((name, result is None and work is not _refused))

    async with asyncio.timeout(LIMIT_S):
        for start in range(0, 400, 20):
            await asyncio.gather(*(call(number) for number in range(start, start + 20)))
        after = await warm(db)
    assert len(connects) == 0
    assert after == before
    assert await backends(sql, "idle in transaction%") == set()
    found = await names(sql)
    assert not [name for name in found if "never" in name]
    for name, completed in done:
        rows = [each for each in found if each.startswith(name)]
        if int(name.split()[1]) % len(WORKS) == 1:
            assert len(rows) in ((2,) if completed else (0, 2)), name
    assert {name for name, completed in done if completed and int(name.split()[1]) % len(WORKS) == 0} <= {each[:-2] for each in found}
    assert any(not completed for _, completed in done)


async def test_a_caller_that_is_cancelled_goes_at_once_and_its_statement_is_ended_soon(
    one: Database, sql: Connection, connects: list[None]
) -> None:
    """A statement behind somebody's lock: who gave up does not wait for it, and those behind do not wait until its time-out."""
    pid = await backend(one)
    connects.clear()
    await sql.execute(INSERT, "locked")
    async with sql.transaction():
        await sql.execute("SELECT 1 FROM vault_keys WHERE name = 'locked' FOR UPDATE")
        task = asyncio.create_task(one.execute("t", "DELETE FROM vault_keys WHERE name = 'locked'"))
        await until_locked_out(sql)
        task.cancel()
        started = time.monotonic()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert time.monotonic() - started < databases.ORPHAN_TIMEOUT_S / 2
        async with asyncio.timeout(LIMIT_S):
            assert await backend(one) == pid
    assert len(connects) == 0
    assert await names(sql) == ["locked"]


async def test_a_transaction_cancelled_behind_a_lock_is_rolled_back_and_its_connection_goes_on(one: Database, sql: Connection) -> None:
    pid = await backend(one)

    async def work() -> None:
        async with one.transaction() as connection:
            await connection.execute(INSERT, "before")
            await connection.execute("DELETE FROM vault_keys WHERE name = 'locked'")

    await sql.execute(INSERT, "locked")
    async with sql.transaction():
        await sql.execute("SELECT 1 FROM vault_keys WHERE name = 'locked' FOR UPDATE")
        task = asyncio.create_task(work())
        await until_locked_out(sql)
        task.cancel()
        await asyncio.wait((task,))
        async with asyncio.timeout(LIMIT_S):
            await one.execute("t", INSERT, "after")
    assert await backend(one) == pid
    assert await names(sql) == ["after", "locked"]
    assert await backends(sql, "idle in transaction%") == set()


async def test_a_commit_whose_caller_goes_ends_whole(one: Database, sql: Connection) -> None:
    reached = asyncio.Event()

    async def work() -> None:
        async with one.transaction() as connection:
            await connection.execute(INSERT, "committed")
            reached.set()

    task = asyncio.create_task(work())
    await reached.wait()
    # The COMMIT is on its way in this moment: the block ended without another wait.
    task.cancel()
    await asyncio.wait((task,))
    await one.execute("t", INSERT, "next")
    assert await names(sql) == ["committed", "next"]


async def test_callers_cancelled_while_they_wait_for_a_connection_leave_no_trace(one: Database, sql: Connection) -> None:
    for turn in range(40):
        async with one.connection() as connection:
            waiting = [asyncio.create_task(one.execute("t", INSERT, f"{turn} {n}")) for n in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await connection.execute("SELECT 1")
        # Its turn has just come.
        waiting[1].cancel()
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        async with asyncio.timeout(LIMIT_S):
            await waiting[2]
        assert f"{turn} 2" in await names(sql)
        assert f"{turn} 0" not in await names(sql)
    assert not one._waiting


async def test_calls_cancelled_while_they_connect_share_what_they_asked_for(urls: dict[str, str], connects: list[None]) -> None:
    cold = Database(urls["fetch"], "fetch", CONNECTIONS)
    await cold.open()
    async with cold.connection():
        for _ in range(50):
            task = asyncio.create_task(cold.fetch("t", "SELECT 1"))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait((task,))
    assert len(await warm(cold)) <= CONNECTIONS
    assert len(connects) <= CONNECTIONS
    await cold.aclose()


async def test_closing_waits_for_what_goes_on_without_its_caller(urls: dict[str, str], sql: Connection) -> None:
    database = Database(urls["fetch"], "fetch", 1)
    await database.open()
    task = asyncio.create_task(database.execute("t", "INSERT INTO vault_keys SELECT 'late', '' FROM pg_sleep(0.3)"))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait((task,))
    assert await names(sql) == []
    async with asyncio.timeout(LIMIT_S):
        await database.aclose()
    assert await names(sql) == ["late"]
    assert await backends(sql) == set()


async def test_a_transaction_in_which_a_failure_was_swallowed_is_not_called_committed(one: Database, sql: Connection) -> None:
    async def swallowing() -> None:
        async with one.transaction() as connection:
            await connection.execute(INSERT, "lost")
            with suppress(asyncpg.UniqueViolationError):
                await connection.execute(INSERT, "lost")

    with pytest.raises(RuntimeError, match="nothing was committed"):
        await swallowing()
    assert await names(sql) == []


async def test_a_time_out_inside_a_block_leaves_its_connection_to_nobody_half_way(one: Database, sql: Connection) -> None:
    with pytest.raises(TimeoutError):
        async with one.transaction() as connection, asyncio.timeout(0.05):
            await connection.execute("INSERT INTO vault_keys SELECT 'half', '' FROM pg_sleep(0.3)")
    async with asyncio.timeout(LIMIT_S):
        await one.execute("t", INSERT, "whole")
    assert await names(sql) == ["whole"]


async def test_a_block_that_goes_on_after_a_time_out_and_is_cancelled_leaves_nothing(one: Database, sql: Connection) -> None:
    """Two statements are then under way: one that nobody waits for, and one behind it."""
    waits = asyncio.Event()

    async def work() -> None:
        async with one.transaction() as connection:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await connection.execute("INSERT INTO vault_keys SELECT 'first', '' FROM pg_sleep(60)")
            waits.set()
            await connection.execute(INSERT, "second")

    task = asyncio.create_task(work())
    async with asyncio.timeout(LIMIT_S):
        await waits.wait()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        await one.execute("t", INSERT, "next")
    assert await names(sql) == ["next"]
    assert await backends(sql, "idle in transaction%") == set()


async def test_all_who_wait_for_a_database_that_hangs_are_told_together(
    urls: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch, connects: list[None]
) -> None:
    """Not each after an attempt of its own: the last of a hundred would wait for two minutes."""
    monkeypatch.setattr(databases, "CONNECT_TIMEOUT_S", 1.0)
    database = Database(urls["fetch"], "fetch", CONNECTIONS)
    await database.open()
    async with database.connection() as connection:
        connection.terminate()
    server = engines.processes["postgres"]
    os.kill(server, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LIMIT_S):
            connects.clear()
            calls = [asyncio.create_task(database.fetch("t", "SELECT 1")) for _ in range(100)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, StoreUnavailable) for each in answers)
            assert len(connects) <= CONNECTIONS
            connects.clear()
            answers = await asyncio.gather(*(database.fetch("t", "SELECT 1") for _ in range(100)), return_exceptions=True)
            assert all(isinstance(each, StoreUnavailable) for each in answers)
            assert len(connects) == 1
    finally:
        os.kill(server, signal.SIGCONT)
    async with asyncio.timeout(LIMIT_S):
        while True:
            with suppress(StoreUnavailable):
                assert len(await database.fetch("t", "SELECT 1")) == 1
                break
        await database.aclose()


async def test_who_comes_while_it_is_known_to_be_away_does_not_wait_for_the_whole_attempt(
    urls: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "CONNECT_TIMEOUT_S", 0.5)
    database = Database(urls["fetch"], "fetch", 1)
    await database.open()
    async with database.connection() as connection:
        connection.terminate()
    server = engines.processes["postgres"]
    os.kill(server, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(StoreUnavailable):
                await database.fetch("t", "SELECT 1")
            monkeypatch.setattr(databases, "CONNECT_TIMEOUT_S", 10 * LIMIT_S)
            monkeypatch.setattr(databases, "AWAY_PATIENCE_S", 0.1)
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await database.fetch("t", "SELECT 1")
    finally:
        os.kill(server, signal.SIGCONT)
    async with asyncio.timeout(LIMIT_S):
        await database.aclose()


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), OSError("disk")], ids=repr)
@pytest.mark.parametrize("writes", [False, True])
async def test_an_error_of_the_blocks_own_work_costs_no_connection_and_commits_nothing(
    db: Database, sql: Connection, error: OSError, writes: bool
) -> None:
    async def work() -> None:
        async with db.transaction() if writes else db.connection() as connection:
            if writes:
                await connection.execute(INSERT, "own work a")
            raise error

    before = await warm(db)
    with pytest.raises(type(error)) as raised:
        await work()
    assert raised.value is error
    assert await names(sql, "own work%") == []
    assert await warm(db) == before


async def test_who_gives_up_a_statement_does_not_wait_for_it_and_its_transaction_is_rolled_back(db: Database, sql: Connection) -> None:
    async def work() -> None:
        async with db.transaction() as connection:
            await connection.execute(INSERT, "given up a")
            async with asyncio.timeout(0.05):
                # For as long as PostgreSQL lets it.
                await connection.execute("SELECT pg_sleep(60)")

    before = await warm(db)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(TimeoutError):
            await work()
        assert len(await backends(sql, "active")) == 1
        while await backends(sql, "idle") != before:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(0.01)
    assert await names(sql, "given up%") == []
    assert await warm(db) == before


async def test_a_file_that_postgresql_cannot_read_is_an_outage_and_no_bug(urls: dict[str, str]) -> None:
    db = Database(urls["admin"], "fetch", 1)
    await db.open()
    try:
        with pytest.raises(StoreUnavailable, match="PostgreSQL refused for now"):
            await db.fetch("read", "SELECT pg_read_file('/no/such/file')")
        assert [row[0] for row in await db.fetch("one", "SELECT 1")] == [1]
    finally:
        await db.aclose()
