"""Processes that are kept running: started, waited for, started again when they die or hang, ended in order.

Start them from the main thread's event loop: they end when the thread that started them ends, whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from sealpushd.engines import launcher
from sealpushd.up.errors import UpError

log = structlog.get_logger()

# Of one log; the one before is kept, so twice this on disk.
LOG_BYTES_MAX: Final = 8 * 1024 * 1024
_LOG_CHECK_S: Final = 30.0
# The first restart is at once, because what died by accident comes back; then doubling.
_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0
_STABLE_S: Final = 30.0
# A child that is set up wrongly says so with this code, and does not get better by trying.
_WRONGLY_SET_UP: Final = 2
# A child that ends so often before it ever answered will not come to it.
_FAILED_STARTS_MAX: Final = 5
_TAIL_BYTES: Final = 4096
# A probe costs both sides a millisecond or two; seldomer would only be added to the time for which a hung child is not noticed.
_PROBE_EVERY_S: Final = 3.0
# An answer takes milliseconds; a machine that is busy with something else may take a thousand times that.
_PROBE_PATIENCE_S: Final = 5.0
# One may be lost to a moment in which everything stood still, us included. Three are 15 s without a single answer, while calls
# last at most 10 s: whoever waited for this child has been refused already.
_PROBES_UNANSWERED_MAX: Final = 3

# Name, why ("killed", "hung" …), its log.
Restarted = Callable[[str, str, Path], None]


@dataclass(frozen=True, slots=True)
class Liveness:
    """How a child that hangs is told from one that is slow: so many probes in a row that nobody answered."""

    # Returns once the process answers, whatever it says; it may wait for ever. Called only after the process was ready.
    probe: Callable[[], Awaitable[None]]
    every_s: float = _PROBE_EVERY_S
    patience_s: float = _PROBE_PATIENCE_S
    unanswered_max: int = _PROBES_UNANSWERED_MAX


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
        self._hung = False

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
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await process.wait()
        finally:
            if process.returncode is None:
                log.warning("killed, because it did not end in time", child=self.name)
                self._send(signal.SIGKILL)
        await process.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
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
        """Start the process again whenever it ends. Raises UpError when it never comes to answer."""
        attempts = 0
        while True:
            alive_since = time.monotonic()
            code = await self._wait_and_watch()
            if not self._was_ready.is_set() and (code == _WRONGLY_SET_UP or self.restarts + 1 >= _FAILED_STARTS_MAX):
                raise UpError(f"{self.name} cannot run. {self._words()}")
            if time.monotonic() - alive_since > _STABLE_S:
                attempts = 0
            log.warning("ended, starting it again", child=self.name, code=code)
            started = False
            while not started:
                if attempts:
                    await asyncio.sleep(min(_BACKOFF_FIRST_S * 2 ** min(attempts - 1, 10), _BACKOFF_MAX_S))
                attempts += 1
                try:
                    await self._spawn()
                    started = True
                except UpError as e:
                    log.error("did not start again", child=self.name, error=str(e))
            self.restarts += 1
            self._restarted(self.name, "hung" if self._hung else _why(code), self._log)

    async def _wait_and_watch(self) -> int:
        assert self._process is not None  # noqa: S101 - there was one to supervise
        self._hung = False
        watch = asyncio.create_task(self._kill_when_hung(self._process), name=f"watch {self.name}")
        try:
            return await self._wait_and_bound_log()
        finally:
            # Also when `stop` ends the supervisor: who drains is not probed.
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _kill_when_hung(self, process: Process) -> None:
        """Return once the process was found hanging and sent SIGKILL; that it ended and what follows is for the supervisor."""
        await self._was_ready.wait()
        # One that was started again has its own start before it.
        await self._ready()
        unanswered = 0
        while unanswered < self._liveness.unanswered_max:
            if not unanswered:
                await asyncio.sleep(self._liveness.every_s)
            try:
                async with asyncio.timeout(self._liveness.patience_s):
                    await self._liveness.probe()
                unanswered = 0
            except TimeoutError:
                unanswered += 1
                log.warning("does not answer", child=self.name, pid=process.pid, probes=unanswered)
        if process.returncode is None:
            log.error("killed, because it hangs", child=self.name, pid=process.pid)
            self._hung = True
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _wait_and_bound_log(self) -> int:
        assert self._process is not None  # noqa: S101 - there was one to supervise
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOG_CHECK_S):
                    return await self._process.wait()
            with contextlib.suppress(OSError):
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


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def bound_log(path: Path) -> None:
    """Move a log aside once it is larger than LOG_BYTES_MAX; whoever has it open goes on writing to the emptied one."""
    try:
        if path.stat().st_size <= LOG_BYTES_MAX:
            return
    except FileNotFoundError:
        return
    shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    os.truncate(path, 0)


async def stop_in_order(groups: Sequence[Sequence[Child]], patience_s: float) -> None:
    """End the children group by group, those of a group at once. Takes at most `patience_s` a group."""
    for group in groups:
        await asyncio.gather(*(child.stop(patience_s) for child in group))
