"""PostgreSQL through a few pinned connections.

A pool's reset between uses costs more than a statement, so connections are never reset: nothing here leaves session state
behind. A lost connection is made again; the statement that lost it raises StoreUnavailable, because whether it took effect is
unknown. A caller that is cancelled costs no connection. Ids travel as 16 raw bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
import structlog
from prometheus_client import Histogram

from sealpushd.platform import admission
from sealpushd.platform.errors import StoreUnavailable, in_words
from sealpushd.platform.metrics import DB_RECONNECTS, DB_SECONDS
from sealpushd.platform.outage import Outage

log = structlog.get_logger()

CONNECT_TIMEOUT_S: Final = 5.0
# Longer than any call's deadline: the server side ends first, and with an error that names the statement.
STATEMENT_TIMEOUT_S: Final = 12.0
# When the server's own time-out does not arrive either, the network is gone: TCP alone would find out after a quarter of an hour.
SILENCE_TIMEOUT_S: Final = 15.0
# How long a statement may go on whose caller has gone, before the server is asked to end it: nearly all have ended by themselves.
ORPHAN_TIMEOUT_S: Final = 1.0
# Then the connection is given up. The server has answered long before, unless it hangs.
CLEAN_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
# Between attempts to connect to a server that is away: callers wait for the next one instead of each making their own.
RETRY_PAUSE_S: Final = 0.1
# Who comes while it is known to be away is told so after this, also when the present attempt takes longer, as with a server that hangs.
AWAY_PATIENCE_S: Final = 1.0
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
    # No memory, no space, no room for another lock.
    asyncpg.InsufficientResourcesError,
    # The machine below it failed: a file that cannot be read or written, or is gone.
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
)

# Statements of services look rows up by key, and never more than a batch: the planner is told so. Generic plans, made once: planning a
# join over partitions again for each call costs more than running it; and indexes whatever the statistics say, so
# that a table's first rows, or its emptiness, never turn a look-up into a scan. Halved the server's CPU for small batches. Nor joins that
# read a side whole, which look cheap while a table is small.
# Statements therefore never join two batches with each other, row by row (tests/contract/test_plans.py). Nor do the settings keep an index
# from being read whole, which costs no more than ten look-ups while a table is a page or empty, and is much worse when the plan is used
# later. So a join with the first column of an index is written `= ANY (ARRAY[…])`: by a plain equality PostgreSQL may also go through the
# index in order, in hope of a merge. Ordering is by what was given, not by the column itself, for the same reason; where that does not
# do, `OFFSET 0` in a subquery keeps what is looked up apart.
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

_Connection = TypeVar("_Connection", bound=Connection)
_Answer = TypeVar("_Answer")


def load_sql(folder: Path, name: str) -> str:
    """A statement from a service's `sql/` folder."""
    return (folder / "sql" / f"{name}.sql").read_text()


async def connect(url: str, *, search_path: str | None = None) -> Connection:
    """A connection whose uuid values are raw bytes; raises StoreUnavailable."""
    return await _connect(url, search_path, asyncpg.Connection)


async def _connect(url: str, search_path: str | None, kind: type[_Connection]) -> _Connection:
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
    connection: _Connection | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await asyncpg.connect(url, command_timeout=silence_s, server_settings=settings, connection_class=kind)
            await connection.set_type_codec("uuid", schema="pg_catalog", encoder=_as_is, decoder=bytes, format="binary")
    except BaseException as e:
        if connection is not None:
            connection.terminate()
        if isinstance(e, TimeoutError):
            raise StoreUnavailable(f"PostgreSQL did not answer within {CONNECT_TIMEOUT_S:.0f} s; does it hang?") from e
        if isinstance(e, (*_LOST, asyncpg.PostgresError)):
            raise StoreUnavailable(f"cannot connect to PostgreSQL: {in_words(e)}; is it running, are role and password right?") from e
        raise
    return connection


def _as_is(value: bytes) -> bytes:
    return value


def _refuse(turn: asyncio.Future[Any]) -> None:
    if not turn.done():
        turn.set_exception(StoreUnavailable("the database does not answer; try again with the same request id"))


async def _close(connection: Connection) -> None:
    try:
        await connection.close(timeout=CLOSE_TIMEOUT_S)
    except (OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
        connection.terminate()


def _look_at(statement: asyncio.Task[Any]) -> None:
    if not statement.cancelled():
        statement.exception()


class _Pinned(Connection):
    """A connection on which a statement runs to its end, also when who waits for it is cancelled.

    asyncpg would ask the server, over a connection of its own, to end the statement, and would not know afterwards whether it did: a
    BEGIN may have come through, and whatever was written after it would be answered for and never committed. Most statements take
    less than that question. So who is cancelled goes at once, and the connection is given back when its state is known.
    """

    __slots__ = ("_raised", "_statement")

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        return await self._to_its_end(super().execute(query, *args, timeout=timeout))

    async def executemany(self, command: str, args: Any, *, timeout: float | None = None) -> None:
        await self._to_its_end(super().executemany(command, args, timeout=timeout))

    async def fetch(self, query: str, *args: Any, timeout: float | None = None, record_class: Any = None) -> list[Any]:
        return await self._to_its_end(super().fetch(query, *args, timeout=timeout, record_class=record_class))

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None, record_class: Any = None) -> Any:
        return await self._to_its_end(super().fetchrow(query, *args, timeout=timeout, record_class=record_class))

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        return await self._to_its_end(super().fetchval(query, *args, column=column, timeout=timeout))

    def is_lost_by(self, error: BaseException) -> bool:
        """Whether an error that came out of a block says that this connection is lost. Not where it is the block's own: what else is done
        there may meet a time-out, or a broken connection of something else."""
        return not isinstance(error, OSError) or error is getattr(self, "_raised", None)

    @property
    def is_running(self) -> bool:
        """A statement runs whose caller has gone."""
        return self._running() is not None

    @property
    def is_clean(self) -> bool:
        """No statement runs, and no transaction is open. Without a running statement, asyncpg knows that for certain."""
        return self._running() is None and not self.is_in_transaction()

    async def clean(self) -> None:
        """Let the statement end, or end it when it takes long, and roll back. Raises what asyncpg raises; then close it."""
        if (statement := self._running()) is not None:
            await asyncio.wait((statement,), timeout=ORPHAN_TIMEOUT_S)
            if not statement.done():
                # Nobody waits for it, others wait for its locks: now the server is asked to end it.
                statement.cancel()
                await asyncio.wait((statement,))
                # Waits for the server's word about the cancelled one, after which the state is known again. In a transaction that is what
                # the ROLLBACK does; a BEGIN may have been what was cancelled.
                if not self.is_in_transaction():
                    await self.execute("SELECT 1")
        if self.is_in_transaction():
            await self.execute("ROLLBACK")

    def _running(self) -> asyncio.Task[Any] | None:
        statement: asyncio.Task[Any] | None = getattr(self, "_statement", None)
        return None if statement is None or statement.done() else statement

    async def _to_its_end(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        """What `await work` gives. Where the caller is cancelled, a task goes on with `work` from there.

        A task for every statement, with a shield before it, would do the same for three times the overhead.
        """
        if (earlier := self._running()) is not None:
            # Of a time-out inside a block, which goes on with another statement.
            try:
                await asyncio.wait((earlier,))
            except asyncio.CancelledError:
                work.close()
                raise
        while True:
            # As a task does it: `work` runs until it waits for something, and goes on when that is done.
            try:
                waiter: asyncio.Future[Any] = work.send(None)
            except StopIteration as end:
                answer: _Answer = end.value
                return answer
            except OSError as e:
                self._raised = e
                raise
            # Beside it waits the caller, whose cancelling then does not reach asyncpg.
            turn: asyncio.Future[None] = waiter.get_loop().create_future()
            waiter.add_done_callback(partial(_tell, turn))
            try:
                await turn
            except asyncio.CancelledError:
                self._statement = asyncio.create_task(_go_on(work, waiter))
                # Nobody waits any more: asyncio would print the error, and PostgreSQL's errors quote rows.
                self._statement.add_done_callback(_look_at)
                # What its caller left behind still is that caller's work.
                admission.hold_until_done(self._statement)
                raise


def _tell(turn: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not turn.done():
        turn.set_result(None)


async def _go_on(work: Coroutine[Any, Any, _Answer], waiter: asyncio.Future[Any]) -> _Answer:
    """The rest of `work`, which waits for this. Cancelling reaches asyncpg, as it does where `work` is awaited."""
    while True:
        try:
            await asyncio.wait((waiter,))
        except asyncio.CancelledError:
            waiter.cancel()
        try:
            waiter = work.send(None)
        except StopIteration as end:
            answer: _Answer = end.value
            return answer


class Database:
    """A fixed number of connections, each used by one statement or transaction at a time.

    They are made by tasks of their own, so that a caller that goes away costs none. While PostgreSQL is away there is one attempt at a
    time, for all who wait, and all are told at once when it fails.
    """

    def __init__(self, url: str, search_path: str, connections: int) -> None:
        self._url = url
        self._search_path = search_path
        self._size = connections
        # Last in, first out: under little load one warm connection does everything.
        self._idle: list[_Pinned] = []
        # In the order in which they came; a dict, because one that is cancelled leaves from anywhere.
        self._waiting: dict[asyncio.Future[_Pinned], None] = {}
        # Connections that stand, in use or not, and those to replace of the ones that were lost.
        self._standing = 0
        self._lost = 0
        self._attempts: set[asyncio.Task[None]] = set()
        self._cleaners: set[asyncio.Task[None]] = set()
        self._failed_at: float | None = None
        self._closing = False
        self._returned = asyncio.Event()
        self._timers: dict[str, Histogram] = {}
        self._outage = Outage("postgres", gone="PostgreSQL is away: no connection", back="PostgreSQL is back")

    async def open(self) -> None:
        """Make the first connection; raises StoreUnavailable when that fails."""
        self._idle.append(await _connect(self._url, self._search_path, _Pinned))
        self._standing = 1

    async def aclose(self) -> None:
        """Close every connection, after the statement it is working on. Who waits for one already is served; who comes later gets
        StoreUnavailable. Idempotent."""
        self._closing = True
        while self._waiting or self._attempts or self._standing > len(self._idle):
            if not self._waiting:
                for attempt in self._attempts:
                    attempt.cancel()
            self._returned.clear()
            await self._returned.wait()
        idle, self._idle, self._standing = self._idle, [], 0
        await asyncio.gather(*(_close(connection) for connection in idle))

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for more than one statement; asyncpg's errors come out as ServiceErrors, the block's own as they are.

        Who is cancelled in the block goes at once; a statement that runs then goes on to its end, and its connection is in use until it
        is clean. So what goes on without a caller is never more than there are connections.
        """
        return self._pinned()

    @asynccontextmanager
    async def _pinned(self) -> AsyncIterator[_Pinned]:
        connection = await self._take()
        try:
            yield connection
        except asyncpg.DataError as e:
            # A bug of whoever checked the value. The original shows it, and it may be a secret.
            raise ValueError(f"a value given to a statement does not fit ({type(e).__name__})") from None
        except _LOST as e:
            if not connection.is_lost_by(e):
                raise
            connection.terminate()
            if isinstance(e, TimeoutError):
                self._suspect_idle()
            raise StoreUnavailable("PostgreSQL went away in the middle; try again with the same request id") from e
        except _BUSY as e:
            raise StoreUnavailable(f"PostgreSQL refused for now ({type(e).__name__}); try again with the same request id") from e
        finally:
            self._give_back(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside a transaction that commits at the end of the block.

        Cancelled in the block it is rolled back; cancelled in the commit, that ends as it ends, and the caller does not know how.
        """
        async with self._pinned() as connection:
            await connection.execute("BEGIN")
            try:
                yield connection
            except Exception as e:
                # Before the error goes on, so that the locks are gone when it is acted on. Who is cancelled does not wait for that, nor who
                # gave up a statement that still runs.
                lost = isinstance(e, _LOST) and connection.is_lost_by(e)
                if not lost and not connection.is_running:
                    await connection.execute("ROLLBACK")
                raise
            if await connection.execute("COMMIT") != "COMMIT":
                # PostgreSQL's answer to the COMMIT of a transaction in which a statement failed and nobody passed the error on.
                raise RuntimeError("nothing was committed: a statement of this transaction failed, and its error was swallowed")

    async def _take(self) -> _Pinned:
        """A connection for the caller alone; raises StoreUnavailable."""
        if self._closing:
            raise StoreUnavailable("this server is going away; try again with the same request id")
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
            self._lose()
        self._connect_one_more()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[_Pinned] = loop.create_future()
        self._waiting[turn] = None
        is_away = self._failed_at is not None and not self._standing
        patience = loop.call_later(AWAY_PATIENCE_S, _refuse, turn) if is_away else None
        try:
            return await turn
        except asyncio.CancelledError:
            # Its turn may have come in the same moment.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back(turn.result())
            raise
        finally:
            self._waiting.pop(turn, None)
            self._returned.set()
            if patience is not None:
                patience.cancel()

    def _give_back(self, connection: _Pinned) -> None:
        if connection.is_closed():
            self._lose()
        elif connection.is_clean:
            self._give(connection)
        else:
            cleaner = asyncio.create_task(self._clean(connection), name="clean a connection")
            self._cleaners.add(cleaner)
            cleaner.add_done_callback(self._cleaners.discard)

    async def _clean(self, connection: _Pinned) -> None:
        try:
            async with asyncio.timeout(CLEAN_TIMEOUT_S):
                await connection.clean()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            log.debug("a connection was given up, because it could not be cleaned", error=in_words(e))
            connection.terminate()
            if isinstance(e, TimeoutError):
                self._suspect_idle()
        except BaseException:
            connection.terminate()
            raise
        finally:
            if not connection.is_closed() and not connection.is_clean:
                connection.terminate()
            self._give_back(connection)

    def _suspect_idle(self) -> None:
        """A server fell silent on one connection: the idle ones go, too. Else each would be found out in turn, by a caller each."""
        for connection in self._idle:
            connection.terminate()

    def _give(self, connection: _Pinned) -> None:
        """To who has waited longest, if anybody waits."""
        self._returned.set()
        turn = next((turn for turn in self._waiting if not turn.done()), None)
        if turn is None:
            self._idle.append(connection)
        else:
            del self._waiting[turn]
            turn.set_result(connection)

    def _lose(self) -> None:
        self._standing -= 1
        self._lost += 1
        self._returned.set()
        if self._waiting:
            self._connect_one_more()

    def _connect_one_more(self) -> None:
        """Unless there are as many connections as there may be, or a PostgreSQL that is away is asked already."""
        full = self._standing + len(self._attempts) >= self._size
        if not full and (self._failed_at is None or not self._attempts):
            attempt = asyncio.create_task(self._attempt(), name="connect to PostgreSQL")
            self._attempts.add(attempt)
            # Also of one that is cancelled before it began.
            attempt.add_done_callback(self._attempt_ended)

    async def _attempt(self) -> None:
        loop, attempt = asyncio.get_running_loop(), asyncio.current_task()
        assert attempt is not None  # noqa: S101 - it runs in one
        try:
            if self._failed_at is not None:
                await asyncio.sleep(self._failed_at + RETRY_PAUSE_S - loop.time())
            connection = await _connect(self._url, self._search_path, _Pinned)
        except Exception as e:
            self._attempt_ended(attempt)
            self._failed_at = loop.time()
            # PostgreSQL's words name roles and addresses: for the log, not for callers.
            self._outage.failed(e, stack=not isinstance(e, StoreUnavailable))
            if not self._standing:
                for turn in list(self._waiting):
                    _refuse(turn)
        else:
            self._attempt_ended(attempt)
            self._failed_at = None
            self._outage.worked()
            self._standing += 1
            if self._lost:
                self._lost -= 1
                DB_RECONNECTS.inc()
            self._give(connection)
            if self._waiting:
                self._connect_one_more()

    def _attempt_ended(self, attempt: asyncio.Task[None]) -> None:
        self._attempts.discard(attempt)
        self._returned.set()

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
