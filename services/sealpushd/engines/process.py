"""One server process behind the launcher: started, watched, stopped, its output kept in a bounded log."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import launcher
from .errors import EngineError

LOG_BYTES_MAX = 8 * 1024 * 1024
"""Of a server's log: days of normal work, minutes of a storm. The log before it is kept, so twice this on disk."""

# Enough for a server's last words; more would bury the message that carries it.
_TAIL_BYTES_MAX = 4096

# After SIGKILL only a process stuck in the kernel, on a dead disk, is still there.
_KILL_TIMEOUT_S = 10.0

# These change where a server listens, what it reads or in which language it complains.
_ENVIRONMENT_DROPPED = ("PG", "LC_", "LANG")


class ServerProcess:
    """A server that ends with this process, however this process ends.

    Start it from a thread that lives as long as the program, in practice the main thread's event loop: the kernel takes
    the end of the spawning thread for the end of the parent (see `launcher`).
    """

    def __init__(self, name: str, *, log: Path, own: Sequence[Path], own_top: Sequence[Path], death_signal: signal.Signals) -> None:
        """own, own_top: the directories the server must be able to use, as in `launcher`."""
        self._name = name
        self._log = log
        self._own = own
        self._own_top = own_top
        self._death_signal = death_signal
        self._process: Process | None = None
        self._log_position = 0

    @property
    def pid(self) -> int | None:
        """The server's process, None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """How the latest process ended: exit code, negative for a signal. None while it runs and before the first."""
        return self._process.returncode if self._process is not None else None

    async def spawn(self, command: Sequence[str | Path], *, cwd: Path, stdin: bytes | None = None) -> None:
        """Starts the server; it need not be ready yet. Raises EngineError when even the launcher cannot be started."""
        if self.pid is not None:
            raise RuntimeError(f"{self._name} is already running")
        arguments = [sys.executable, "-I", "-S", launcher.__file__]
        arguments += ["--parent-pid", str(os.getpid()), "--death-signal", self._death_signal.name]
        if os.geteuid() == 0:
            arguments.append("--drop-root")
            for option, directories in (("--own", self._own), ("--own-top", self._own_top)):
                for directory in directories:
                    arguments += [option, str(directory)]
        arguments += ["--", *map(str, command)]
        try:
            self.bound_log()
            with self._log.open("ab") as log:
                self._log_position = log.tell()
                process = await asyncio.create_subprocess_exec(
                    *arguments,
                    stdin=DEVNULL if stdin is None else PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=cwd,
                    env=_environment(os.environ),
                    # Ctrl-C goes to the terminal's whole process group; the servers must outlive what uses them.
                    start_new_session=True,
                )
        except OSError as e:
            raise EngineError(
                f"Cannot start {self._name}: {e.strerror or e} ({e.filename or sys.executable}). "
                "Make room (memory, disk, processes) and try again."
            ) from e
        self._process = process
        if stdin is not None and process.stdin is not None:
            process.stdin.write(stdin)
            # It may have ended already; then whoever waits for it to become ready says so.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await process.stdin.drain()
            process.stdin.close()

    async def wait(self) -> int:
        """Waits until the process has ended and gives its return code."""
        if self._process is None:
            raise RuntimeError(f"{self._name} was never started")
        return await self._process.wait()

    async def ends_within(self, timeout_s: float) -> bool:
        """Waits until the process has ended, but no longer than so many seconds; whether it has."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait()
                return True
        return False

    async def stop(self, *steps: tuple[signal.Signals, float]) -> None:
        """Sends each signal and waits for so many seconds; then SIGKILL. Does nothing when the process has ended.

        Cancelled, it kills at once. Raises EngineError when not even SIGKILL ends the process.
        """
        if self.pid is None:
            return
        try:
            for number, timeout_s in steps:
                self._send(number)
                # What somebody stopped hears of nothing else before it goes on.
                self._send(signal.SIGCONT)
                if await self.ends_within(timeout_s):
                    return
        finally:
            self.kill()
        if not await self.ends_within(_KILL_TIMEOUT_S):
            raise EngineError(
                f"{self._name} (process {self.pid}) does not end even by SIGKILL: its disk may be gone. Look into the kernel's log."
            )

    def kill(self) -> None:
        """SIGKILL, for it and its children. Does nothing when the process has ended.

        A child that somebody stopped would outlive its parent, and PostgreSQL refuses to start beside one.
        """
        if self.pid is not None:
            children = _children(self.pid)
            self._send(signal.SIGKILL)
            for child in children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)

    def tail(self) -> str:
        """The last lines the latest process wrote."""
        try:
            with self._log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(end - _TAIL_BYTES_MAX, min(self._log_position, end)))
                return log.read(_TAIL_BYTES_MAX).decode("utf-8", "replace").strip()
        except OSError as e:
            return f"(no log: {e.strerror})"

    def failure(self, what: str, advice: str) -> EngineError:
        """An EngineError that says `what` happened to this server, with its last words and where to read more."""
        return EngineError(f"{self._name} {what}. {advice} Its log, {self._log}, ends with:\n{self.tail() or '(nothing)'}")

    def bound_log(self) -> None:
        """As the function. Blocks for some milliseconds."""
        if bound_log(self._log):
            self._log_position = 0

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def bound_log(path: Path) -> bool:
    """Move a log aside once it is larger than LOG_BYTES_MAX; whoever has it open goes on writing to the emptied one. Whether it was."""
    try:
        if path.stat().st_size <= LOG_BYTES_MAX:
            return False
    except FileNotFoundError:
        return False
    # A server holds the file open for appending, so it is copied and emptied, not renamed. A line written between
    # the two is lost: the price of not standing between the server and its log, where we could block it.
    shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    os.truncate(path, 0)
    return True


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in inherited.items() if not name.startswith(_ENVIRONMENT_DROPPED)}
    return kept | {"LC_ALL": "C"}
