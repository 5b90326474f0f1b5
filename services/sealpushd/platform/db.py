"""PostgreSQL through a few pinned connections.

A pool's reset between uses costs more than a statement, so connections are never reset: nothing here leaves session state
behind. A lost connection is made again; the statement that lost it raises StoreUnavailable, because whether it took effect is
unknown. Ids travel as 16 raw bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import structlog
from prometheus_client import Histogram

from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.metrics import DB_RECONNECTS, DB_SECONDS

log = structlog.get_logger()

CONNECT_TIMEOUT_S: Final = 5.0
# Longer than any call's deadline: the server side ends first, and with an error that names the statement.
STATEMENT_TIMEOUT_S: Final = 12.0
# When the server's own time-out does not arrive either, the network is gone: TCP alone would find out after a quarter of an hour.
SILENCE_TIMEOUT_S: Final = 15.0
# What a process that froze or lost its machine in the middle of a transaction has locked is let go after this.
IDLE_IN_TRANSACTION_S: Final = 20.0

_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # What a statement gets whose connection the server ended since the one before.
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    OSError,
)
# The statement failed, the connection stands: trying again may help.
_BUSY = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DiskFullError,
    asyncpg.OutOfMemoryError,
    asyncpg.ReadOnlySQLTransactionError,
)

# Statements of services look rows up by key, and never more than a batch: the planner is told so. Generic plans, made once: planning a
# join over partitions again for each call costs more than running it; and indexes whatever the statistics say, so
# that a table's first rows, or its emptiness, never turn a look-up into a scan. Halved the server's CPU for small batches. Nor joins that
# read a side whole, which look cheap while a table is small.
# Statements therefore never join two batches with each other, row by row (tests/contract/test_plans.py).
_LOOK_UPS: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    # Generic in its stubs only.
    Connection = asyncpg.Connection


def load_sql(folder: Path, name: str) -> str:
    """A statement from a service's `sql/` folder."""
    return (folder / "sql" / f"{name}.sql").read_text()


async def connect(url: str, *, search_path: str | None = None) -> Connection:
    """A connection whose uuid values are raw bytes; raises StoreUnavailable."""
    settings = {
        "application_name": f"sealpush-{search_path or 'admin'}",
        "statement_timeout": f"{int(STATEMENT_TIMEOUT_S * 1000)}",
        # A statement whose client went away ends and lets its locks go, instead of running until the time-out.
        "client_connection_check_interval": "1000",
    }
    silence_s: float | None = None
    if search_path is not None:
        settings |= _LOOK_UPS | {
            "search_path": search_path,
            "idle_in_transaction_session_timeout": f"{int(IDLE_IN_TRANSACTION_S * 1000)}",
        }
        silence_s = SILENCE_TIMEOUT_S
    try:
        connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S, command_timeout=silence_s, server_settings=settings)
    except (*_LOST, TimeoutError, asyncpg.PostgresError) as e:
        raise StoreUnavailable(f"cannot connect to PostgreSQL: {e or type(e).__name__}; is it running, are role and password right?") from e
    await connection.set_type_codec("uuid", schema="pg_catalog", encoder=_as_is, decoder=bytes, format="binary")
    return connection


def _as_is(value: bytes) -> bytes:
    return value


class _Closed:
    """Is handed out instead of connections once they are closed."""


class Database:
    """A fixed set of connections, each used by one statement or transaction at a time."""

    def __init__(self, url: str, search_path: str, connections: int) -> None:
        self._url = url
        self._search_path = search_path
        self._size = connections
        # Last in, first out: under little load one warm connection does everything.
        self._idle: asyncio.LifoQueue[Connection | _Closed | None] = asyncio.LifoQueue()
        self._timers: dict[str, Histogram] = {}

    async def open(self) -> None:
        """Make the first connection; raises StoreUnavailable when that fails."""
        for _ in range(self._size - 1):
            self._idle.put_nowait(None)
        self._idle.put_nowait(await connect(self._url, search_path=self._search_path))

    async def aclose(self) -> None:
        """Close every connection, after the statement it is working on. Who waits for one already is served; who comes later gets
        StoreUnavailable. Idempotent."""
        for _ in range(self._size):
            connection = await self._idle.get()
            if isinstance(connection, _Closed):
                break
            if connection is not None and not connection.is_closed():
                try:
                    await connection.close(timeout=2)
                except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError):
                    connection.terminate()
        self._idle.put_nowait(_Closed())

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for more than one statement; asyncpg's errors come out as ServiceErrors."""
        connection = await self._idle.get()
        if isinstance(connection, _Closed):
            # For the next one, too: what a call tidies up in the end must not wait for a connection that never comes.
            self._idle.put_nowait(connection)
            raise StoreUnavailable("this server is going away; try again with the same request id")
        try:
            if connection is None or connection.is_closed():
                if connection is not None:
                    DB_RECONNECTS.inc()
                connection = None
                try:
                    connection = await connect(self._url, search_path=self._search_path)
                except StoreUnavailable as e:
                    # PostgreSQL's words name roles and addresses: for the log, not for callers.
                    log.warning("no connection to PostgreSQL", error=e.message)
                    raise StoreUnavailable("the database does not answer; try again with the same request id") from e
            yield connection
        except asyncio.CancelledError:
            # Never handed to anybody else: a statement may still be running on it, or a BEGIN that was cancelled may have come through,
            # and whatever was written after it would be answered for and never committed. Asking asyncpg is no help: it does not know yet.
            if connection is not None:
                connection.terminate()
            raise
        except asyncpg.DataError as e:
            # A bug of whoever checked the value. The original shows it, and it may be a secret.
            raise ValueError(f"a value given to a statement does not fit ({type(e).__name__})") from None
        except _LOST as e:
            if connection is not None:
                connection.terminate()
            raise StoreUnavailable("PostgreSQL went away in the middle; try again with the same request id") from e
        except _BUSY as e:
            raise StoreUnavailable(f"PostgreSQL refused for now ({type(e).__name__}); try again with the same request id") from e
        finally:
            self._idle.put_nowait(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside a transaction that commits at the end of the block."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def fetch(self, name: str, query: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        """Rows of one statement, which is a transaction of its own. `name` is for the metrics."""
        timer = self._timers.get(name)
        if timer is None:
            timer = self._timers[name] = DB_SECONDS.labels(name)
        start = time.perf_counter()
        async with self.connection() as connection:
            rows: Sequence[asyncpg.Record] = await connection.fetch(query, *arguments)
        timer.observe(time.perf_counter() - start)
        return rows

    async def fetch_one(self, name: str, query: str, *arguments: Any) -> asyncpg.Record | None:
        """The first row, if there is one."""
        rows = await self.fetch(name, query, *arguments)
        return rows[0] if rows else None

    async def execute(self, name: str, query: str, *arguments: Any) -> None:
        await self.fetch(name, query, *arguments)
