"""Processes that are kept running: started, waited for, started again when they die or hang, ended in order.

Start them from the main thread's event loop: they end when the thread that started them ends, whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from sealpushd.engines import Restarted, launcher
from sealpushd.engines.process import bound_log
from sealpushd.engines.watch import Liveness, restart_pause_s, until_ended
from sealpushd.up.errors import UpError

log = structlog.get_logger()

_STABLE_S: Final = 30.0
# A child that is set up wrongly says so with this code, and does not get better by trying.
_WRONGLY_SET_UP: Final = 2
# A child that ends so often before it ever answered will not come to it.
_FAILED_STARTS_MAX: Final = 5
_TAIL_BYTES: Final = 4096


class Child:
    """One process that is kept running until `stop`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        ready: Callable[[], Awaitable[None]],
        liveness: Liveness,
        restarted: Restarted,
    ) -> None:
        """`ready` returns once the process answers; it may wait for ever, the caller bounds it. `restarted` is told of each restart."""
        self.name = name
        self.restarts = 0
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._log = log_path
        self._ready = ready
        self._liveness = liveness
        self._restarted = restarted
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._was_ready = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """None while it is being started again."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the process and keep it running from now on. Raises UpError when it cannot even be started."""
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once it answers. Raises UpError with its last words when it gives up or takes longer."""
        assert self._supervisor is not None  # noqa: S101 - start() comes first
        answering = asyncio.ensure_future(self._ready())
        try:
            done, _ = await asyncio.wait({answering, self._supervisor}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._supervisor in done:
                self._supervisor.result()
            if answering not in done:
                raise UpError(f"{self.name} does not answer after {timeout_s:.0f} s. {self._words()}")
            answering.result()
            self._was_ready.set()
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def stop(self, patience_s: float) -> None:
        """SIGTERM, then SIGKILL after so many seconds. Safe to call at any time."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            self._send(signal.SIGTERM)
            # What somebody stopped hears of nothing else before it goes on.
            self._send(signal.SIGCONT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await process.wait()
        finally:
            if process.returncode is None:
                log.warning("killed, because it did not end in time", child=self.name)
                self._send(signal.SIGKILL)
        await process.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _spawn(self) -> None:
        # The launcher asks the kernel to end this process with ours before Python even starts, so that there is no moment
        # in which we can die without it. SIGKILL, because the engines die with us, and without them there is nothing to drain.
        command = [sys.executable, "-I", "-S", launcher.__file__, "--parent-pid", str(os.getpid()), "--death-signal", "SIGKILL", "--"]
        try:
            bound_log(self._log)
            with self._log.open("ab") as output:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    sys.executable,
                    *self._arguments,
                    stdin=DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._environment,
                    # Ctrl-C goes to the terminal's whole process group; we end our children ourselves, in order.
                    start_new_session=True,
                )
        except OSError as e:
            raise UpError(f"cannot start {self.name}: {e.strerror or e}. Make room (memory, disk, processes) and try again.") from e

    async def _supervise(self) -> None:
        """Start the process again whenever it ends or hangs. Raises UpError when it never comes to answer."""
        attempts = 0
        while True:
            alive_since = time.monotonic()
            why = await until_ended(self, self._liveness)
            code = self._process.returncode if self._process is not None else None
            if not self._was_ready.is_set() and (code == _WRONGLY_SET_UP or self.restarts + 1 >= _FAILED_STARTS_MAX):
                raise UpError(f"{self.name} cannot run. {self._words()}")
            if time.monotonic() - alive_since > _STABLE_S:
                attempts = 0
            log.warning("ended, starting it again", child=self.name, why=why)
            started = False
            while not started:
                await asyncio.sleep(restart_pause_s(attempts))
                attempts += 1
                try:
                    await self._spawn()
                    started = True
                except UpError as e:
                    log.error("did not start again", child=self.name, error=str(e))
            self.restarts += 1
            self._restarted(self.name, why, self._log)

    # What `until_ended` asks for.

    async def ready(self) -> None:
        await self._was_ready.wait()
        # One that was started again has its own start before it.
        await self._ready()

    async def wait(self) -> int:
        assert self._process is not None  # noqa: S101 - there was one to supervise
        return await self._process.wait()

    async def finish(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def bound_log(self) -> None:
        bound_log(self._log)

    def _words(self) -> str:
        try:
            with self._log.open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, end - _TAIL_BYTES))
                lines = stream.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            lines = []
        return f"Its log, {self._log}, ends with:\n" + ("\n".join(lines[-8:]) or "(nothing)")


async def stop_in_order(groups: Sequence[Sequence[Child]], patience_s: float) -> None:
    """End the children group by group, those of a group at once. Takes at most `patience_s` a group."""
    for group in groups:
        await asyncio.gather(*(child.stop(patience_s) for child in group))
