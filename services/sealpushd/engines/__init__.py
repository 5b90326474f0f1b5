"""Real PostgreSQL and Valkey servers for one machine, kept alive while open.

    async with Engines.open(Path("~/.sealpush")) as engines:
        engines.postgres_dsn, engines.valkey_url

Open it in the main thread's event loop: the servers end when the thread that started them ends.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, Self

import structlog

from .datadir import DataDir
from .errors import EngineError
from .postgres import EmbeddedPostgres
from .valkey import EmbeddedValkey
from .watch import Liveness, Watched, restart_pause_s, until_ended

__all__ = ["EmbeddedPostgres", "EmbeddedValkey", "EngineError", "Engines"]

_log = structlog.get_logger()

# A server that lived this long had recovered: what happens next is another accident, and again restarted at once.
_STABLE_S = 60.0
# In a row, over 10 s and more. What cannot even start by then needs somebody to look.
FAILED_STARTS_MAX = 10

# Name, why ("killed", "hung" …), its log.
Restarted = Callable[[str, str, Path], None]


class _Engine(Watched, Protocol):
    log: Path

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def probe(self) -> None: ...


class Engines:
    """The running engines. `Engines.open` makes one."""

    def __init__(self, postgres: EmbeddedPostgres | None, valkey: EmbeddedValkey | None, restarted: Restarted | None) -> None:
        self._postgres = postgres
        self._valkey = valkey
        self._restarted = restarted
        self._engines: list[_Engine] = [engine for engine in (postgres, valkey) if engine is not None]
        self._supervisors: list[asyncio.Task[None]] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls, data_dir: Path, *, postgres: bool = True, valkey: bool = True, restarted: Restarted | None = None
    ) -> AsyncIterator[Self]:
        """Starts the engines wanted, on `data_dir`, and keeps them running until the end of the block.

        An engine that dies, hangs or is told by somebody else to shut down is started again with the same paths, so clients
        only reconnect; `restarted` is told of it, and `wait` reports one that cannot be. At the end of the block they are
        stopped; should this process be killed instead, they end by themselves.
        Raises EngineError when one cannot be started, and when another process uses the directory.
        """
        with DataDir.open(data_dir) as data:
            engines = cls(EmbeddedPostgres(data) if postgres else None, EmbeddedValkey(data) if valkey else None, restarted)
            try:
                await engines._start()
                yield engines
            finally:
                await engines._stop()

    @property
    def postgres_dsn(self) -> str:
        """For asyncpg, superuser, database `sealpush`; does not change while open. A secret."""
        if self._postgres is None:
            raise EngineError("PostgreSQL was not asked for: open the engines with postgres=True.")
        return self._postgres.dsn

    @property
    def valkey_url(self) -> str:
        """For redis-py; does not change while open. A secret."""
        if self._valkey is None:
            raise EngineError("Valkey was not asked for: open the engines with valkey=True.")
        return self._valkey.url

    @property
    def processes(self) -> Mapping[str, int]:
        """Name ("postgres", "valkey") to pid, without those that are just being restarted."""
        return {engine.name: engine.pid for engine in self._engines if engine.pid is not None}

    async def wait(self) -> None:
        """Never returns while all is well; raises EngineError when an engine cannot be kept running."""
        if not self._supervisors:
            await asyncio.Event().wait()
        done, _ = await asyncio.wait(self._supervisors, return_when=asyncio.FIRST_COMPLETED)
        for supervisor in done:
            supervisor.result()

    async def _start(self) -> None:
        started_at = time.monotonic()
        # All are waited for: what was half-way must have stopped itself before the first error is raised.
        starts = [asyncio.create_task(engine.start(), name=f"start {engine.name}") for engine in self._engines]
        try:
            results = await asyncio.gather(*starts, return_exceptions=True)
        except asyncio.CancelledError:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._supervisors = [asyncio.create_task(self._supervise(engine), name=f"supervise {engine.name}") for engine in self._engines]
        _log.info("engines started", processes=self.processes, took_s=round(time.monotonic() - started_at, 3))

    async def _stop(self) -> None:
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        results = await asyncio.gather(*(engine.stop() for engine in self._engines), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _supervise(self, engine: _Engine) -> None:
        """Starts the engine again whenever it ends or hangs. Raises EngineError after FAILED_STARTS_MAX failures in a row."""
        attempts = 0
        while True:
            alive_since = time.monotonic()
            why = await until_ended(engine, Liveness(engine.probe))
            if time.monotonic() - alive_since > _STABLE_S:
                attempts = 0
            _log.warning("engine ended, starting it again", engine=engine.name, why=why)
            failed = 0
            while True:
                await asyncio.sleep(restart_pause_s(attempts))
                attempts += 1
                try:
                    await engine.start()
                except EngineError as e:
                    failed += 1
                    _log.error("engine did not start again", engine=engine.name, failed=failed, error=str(e))
                    if failed >= FAILED_STARTS_MAX:
                        raise
                else:
                    break
            _log.info("engine started again", engine=engine.name, pid=engine.pid)
            if self._restarted is not None:
                self._restarted(engine.name, why, engine.log)
