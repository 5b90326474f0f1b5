"""A real PostgreSQL of our own, for one machine."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from urllib.parse import quote

import asyncpg

from .binaries import PostgresBinaries, find_postgres
from .datadir import DataDir
from .errors import EngineError
from .process import ServerProcess
from .watch import GoingDown

_SUPERUSER = "postgres"
_DATABASE = "sealpush"
# Nothing listens on it; it is part of the socket's name, and what clients assume.
_PORT = 5432

# initdb takes half a second on an SSD; this is for a slow disk under load.
_INITDB_TIMEOUT_S = 120.0
# Without a sign of life; a server that answers "starting up" gets the next bound.
_START_TIMEOUT_S = 30.0
# Replaying the write-ahead log after a crash: at most max_wal_size and a bit, at a slow disk's 10 MB/s.
_RECOVERY_TIMEOUT_S = 180.0
# For the server of a killed run to finish: its shutdown writes at most shared_buffers.
_PREDECESSOR_TIMEOUT_S = 20.0
# Between two attempts to connect, and to start beside a predecessor that is still ending.
_POLL_S = 0.01
_PREDECESSOR_POLL_S = 0.1
_CONNECT_TIMEOUT_S = 5.0
_PROBE_PAUSE_S = 0.1
# <utils/pidfile.h>, LOCK_FILE_LINE_PM_STATUS
_STATUS_LINE = 8

# A fast shutdown writes out shared_buffers; then an immediate one, which the next start repairs from the log.
_STOP_STEPS = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))

# Nobody listens, the server ends while answering, or clients that wait for its return took all places.
_NOT_YET = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.TooManyConnectionsError,
)

# PostgreSQL's refusals to start beside another server on its data directory: one that lives, or orphans of one.
_BESIDE_ANOTHER = re.compile(r'lock file "postmaster\.pid" already exists|pre-existing shared memory block')

_SETTINGS = {
    # Reached by nobody but us: no TCP, and a socket in a directory of mode 0700.
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "password_encryption": "scram-sha-256",
    # Durability is the contract: an accepted message survives a power cut.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # One small machine: the queue and the indexes' upper levels fit; the rest is the file system's cache.
    "shared_buffers": "128MB",
    # Seven services with a few pinned connections per worker, the operator's tools, and head-room.
    "max_connections": "120",
    # Whole pages after a checkpoint are most of the log; compressing them costs less than writing them.
    "wal_compression": "on",
    # Fewer checkpoints mean fewer whole pages in the log; max_wal_size bounds the replay after a crash to seconds.
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    "max_wal_size": "1GB",
    # A small machine's disk is small, too.
    "min_wal_size": "80MB",
    # A hot queue turns over many times an hour: vacuum early and often, and let it get done.
    "autovacuum_naptime": "10s",
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.1",
    "autovacuum_analyze_scale_factor": "0.05",
    "autovacuum_vacuum_cost_limit": "2000",
    "autovacuum_max_workers": "2",
    # Compiling takes longer than any of our statements.
    "jit": "off",
    # A session that holds locks and a snapshot while doing nothing stops vacuum and everybody behind it.
    "idle_in_transaction_session_timeout": "60s",
    # The process that starts logical subscriptions; there are none.
    "max_logical_replication_workers": "0",
    # Times are compared across services and read by operators of any zone.
    "timezone": "UTC",
    "log_timezone": "UTC",
    # To standard error, which is a bounded file.
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    # Statements and the details of their errors quote rows, and so phone numbers and tokens.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "cluster_name": "sealpush",
}

_SETTINGS_SINCE_18 = {
    # Three more processes for reads that mostly hit the cache are not worth it on two cores.
    "io_method": "sync",
}


class EmbeddedPostgres:
    """PostgreSQL with the database `sealpush`, durable, reachable only through a unix socket in a private directory."""

    name = "postgres"

    def __init__(self, data: DataDir, binaries: PostgresBinaries | None = None) -> None:
        """Starts nothing yet. binaries: default, those that suit the data directory."""
        self._data = data
        self._binaries = binaries
        self._password = ""
        self._was_ready = False
        self.log = data.log / "postgres.log"
        self._server = ServerProcess(
            "PostgreSQL",
            log=self.log,
            own=(data.postgres, data.sockets),
            own_top=data.passed_through,
            # Fast shutdown: sessions are ended, everything committed is kept.
            death_signal=signal.SIGINT,
        )

    @property
    def dsn(self) -> str:
        """Superuser's URL for asyncpg and libpq; the same for as long as the data directory is open. A secret."""
        return self._dsn(_DATABASE)

    @property
    def pid(self) -> int | None:
        """The postmaster's process, None while there is none."""
        return self._server.pid

    async def start(self) -> None:
        """Returns when `dsn` can be connected to. Also starts again after the server died.

        Makes the cluster and the database where missing; waits, within bounds, for the server of a killed run to end.
        Raises EngineError with the end of the server's log; then nothing is left running.
        """
        # Blocking for some milliseconds: it runs `postgres --version` and reads small files.
        major = self._data.postgres_major()
        if self._binaries is None or (major is not None and self._binaries.major != major):
            self._binaries = find_postgres(data_major=major)
        self._password = self._data.secret("postgres-password")
        try:
            if major is None:
                if self._was_ready:
                    # A new, empty one in its place would look like a recovery and be a loss.
                    raise EngineError(f"{self._data.postgres} has vanished while in use. Bring it back, then start again.")
                await self._make_cluster(self._binaries)
            await self._start_server(self._binaries)
            self._was_ready = True
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the server: fast shutdown, then an immediate one, then SIGKILL. Safe to call at any time."""
        await self._server.stop(*_STOP_STEPS)

    async def ready(self) -> None:
        """At once: `start` returns when it is."""

    async def probe(self) -> None:
        """Returns once it answers, be it by a refusal; may wait for ever. Raises GoingDown."""
        while True:
            # A smart shutdown, which SIGTERM asks for, lets whoever is connected go on and nobody else in. Our services never leave: it
            # would last for ever, and a service that is started meanwhile would not come up.
            if self._is_going_down():
                raise GoingDown
            try:
                connection = await asyncpg.connect(self.dsn)
                try:
                    await connection.fetchval("SELECT 1")
                finally:
                    connection.terminate()
                return
            except (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError):
                await asyncio.sleep(_PROBE_PAUSE_S)
            except asyncpg.PostgresError:
                if not self._is_going_down():
                    return

    async def finish(self) -> None:
        """Ends a server that shuts down already."""
        await self.stop()

    def kill(self) -> None:
        """SIGKILL, also for its backends; the next start repairs from the log."""
        self._server.kill()

    async def wait(self) -> int:
        """Waits until the server has ended and gives its return code."""
        return await self._server.wait()

    def bound_log(self) -> None:
        """Keeps the server's log within `process.LOG_BYTES_MAX`."""
        self._server.bound_log()

    def _is_going_down(self) -> bool:
        """What the postmaster writes into the eighth line of its pid file, for pg_ctl."""
        try:
            lines = (self._data.postgres / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= _STATUS_LINE and lines[_STATUS_LINE - 1].strip() == "stopping"

    def _dsn(self, database: str) -> str:
        user, password = quote(_SUPERUSER, safe=""), quote(self._password, safe="")
        return f"postgresql://{user}:{password}@/{database}?host={quote(str(self._data.sockets))}&port={_PORT}"

    async def _make_cluster(self, binaries: PostgresBinaries) -> None:
        """Runs initdb where nobody looks, then puts its result in place in one step."""
        with self._data.new_postgres() as directory:
            # A copy, because an ordinary account that initdb may run as cannot read our secrets.
            password_file = directory / "password"
            password_file.touch(mode=0o600)
            password_file.write_text(f"{self._password}\n", "ascii")
            initdb = ServerProcess(
                "initdb",
                log=self.log,
                own=(directory,),
                own_top=self._data.passed_through,
                # Its work is in a temporary directory, and its child ends when it finds the pipe closed.
                death_signal=signal.SIGKILL,
            )
            await initdb.spawn(
                [
                    binaries.initdb,
                    f"--pgdata={directory / 'pgdata'}",
                    f"--username={_SUPERUSER}",
                    f"--pwfile={password_file}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    # Sorts by code point: the same on every machine and after every upgrade of the C library.
                    "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8",
                    "--locale=C",
                    "--data-checksums",
                    "--no-instructions",
                ],
                cwd=directory,
            )
            try:
                async with asyncio.timeout(_INITDB_TIMEOUT_S):
                    returncode = await initdb.wait()
            except TimeoutError as e:
                raise initdb.failure(f"took longer than {_INITDB_TIMEOUT_S:.0f} s", "The disk may be too slow or full.") from e
            finally:
                await initdb.stop()
            if returncode != 0:
                raise initdb.failure(f"failed (exit code {returncode})", "Mend what it names and start again.")

    async def _start_server(self, binaries: PostgresBinaries) -> None:
        loop = asyncio.get_running_loop()
        predecessor_deadline = loop.time() + _PREDECESSOR_TIMEOUT_S
        while True:
            self._remove_dead_socket()
            await self._server.spawn(self._command(binaries), cwd=self._data.postgres)
            if await self._became_ready():
                return
            if not _BESIDE_ANOTHER.search(self._server.tail()):
                raise self._server.failure(
                    f"ended while starting (exit code {self._server.returncode})", "Mend what it names and start again."
                )
            if loop.time() > predecessor_deadline:
                raise self._server.failure(
                    f"refuses to start beside an earlier one, which has not ended in {_PREDECESSOR_TIMEOUT_S:.0f} s",
                    f"Find it ('ps -ef | grep {self._data.postgres}') and end it with 'kill -INT'.",
                )
            if not self._removed_stale_pid_file():
                await asyncio.sleep(_PREDECESSOR_POLL_S)

    def _command(self, binaries: PostgresBinaries) -> list[str | Path]:
        settings = _SETTINGS | {"unix_socket_directories": str(self._data.sockets)}
        if binaries.major >= 18:
            settings |= _SETTINGS_SINCE_18
        # On the command line: they belong to this version of Sealpush, not to the data directory.
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [binaries.postgres, "-D", self._data.postgres, *options]

    async def _became_ready(self) -> bool:
        """True when the database answers; False when the server ended first. Raises EngineError."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            timeout_s = _START_TIMEOUT_S
            try:
                await self._ensure_database()
            except asyncpg.InvalidPasswordError as e:
                raise EngineError(
                    f"PostgreSQL refuses the password in {self._data.root}/secrets/postgres-password. "
                    "Restore that file from the same back-up as the data."
                ) from e
            except asyncpg.CannotConnectNowError as e:
                timeout_s = _RECOVERY_TIMEOUT_S
                cause: Exception = e
            except _NOT_YET as e:
                cause = e
            else:
                return True
            if loop.time() > started + timeout_s:
                raise self._server.failure(
                    f"does not answer after {timeout_s:.0f} s", "The machine or its disk may be overloaded."
                ) from cause
            if await self._server.ends_within(_POLL_S):
                return False

    async def _ensure_database(self) -> None:
        """Connects; makes the database where missing. A retry does no harm."""
        try:
            connection = await asyncpg.connect(self._dsn(_DATABASE), timeout=_CONNECT_TIMEOUT_S)
        except asyncpg.InvalidCatalogNameError:
            connection = await asyncpg.connect(self._dsn("postgres"), timeout=_CONNECT_TIMEOUT_S)
            try:
                await connection.execute(f'CREATE DATABASE "{_DATABASE}"')
            finally:
                await connection.close(timeout=_CONNECT_TIMEOUT_S)
        else:
            await connection.close(timeout=_CONNECT_TIMEOUT_S)

    def _remove_dead_socket(self) -> None:
        """Removes the socket of a server of this run that was killed.

        Its lock file names a pid, which may belong to somebody else by now; PostgreSQL would refuse to start for that.
        """
        for name in (f".s.PGSQL.{_PORT}", f".s.PGSQL.{_PORT}.lock"):
            (self._data.sockets / name).unlink(missing_ok=True)

    def _removed_stale_pid_file(self) -> bool:
        """After PostgreSQL's refusal: removes postmaster.pid if the process it names is no server on this directory.

        PostgreSQL believes the file as long as any process has that pid, after a reboot for instance, or as a zombie
        nobody reaps. It is safe: the lock on our data directory keeps other starters out, and PostgreSQL finds orphans
        of a killed postmaster by their shared memory, not by this file.
        """
        pid_file = self._data.postgres / "postmaster.pid"
        try:
            process = Path("/proc") / str(int(pid_file.read_text().splitlines()[0]))
            if not process.exists():
                return False  # it has just ended: PostgreSQL itself will see that
            # A postmaster works in its data directory; a zombie has no working directory at all.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(process / "cwd", self._data.postgres):
                    return False
            pid_file.unlink()
        except (OSError, ValueError, IndexError):
            return False  # not to be known: wait, and let PostgreSQL judge again
        return True
