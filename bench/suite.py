"""The suite under measurement: the real processes, in a folder that goes away, and what each process costs."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sealpush import Channels
from sealpush.v1 import accounts_pb2
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError
from sealpushd.up.ports import PROCESSES_MAX, Ports
from sealpushd.up.sdk import public_endpoints

START_TIMEOUT_S: Final = 60.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_claims: Final = ExitStack()
atexit.register(_claims.close)


@dataclass(slots=True)
class Suite:
    """A running `sealpush up` without its show."""

    process: asyncio.subprocess.Process
    endpoints: Endpoints
    channels: Channels
    token: str
    numbers_used: int = 0

    def next_number(self) -> str:
        """A phone number that this run has not used."""
        self.numbers_used += 1
        return f"+38050200{self.numbers_used:04}"

    @classmethod
    @asynccontextmanager
    async def start(cls, processes: int = 1) -> AsyncIterator[Suite]:
        """So many processes of each service."""
        with tempfile.TemporaryDirectory(prefix="sealpush-bench-") as folder:
            data_dir = Path(folder) / "data"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sealpushd", "up", "--data-dir", str(data_dir), "--base-port", str(free_base())),
                *("--quiet", "--no-show", "--processes", str(processes)),
                stdout=sys.stderr,
            )
            try:
                endpoints = await _wait(process, data_dir)
                async with Channels(public_endpoints(endpoints)) as channels:
                    answer = await channels.accounts.SignIn(
                        accounts_pb2.SignInRequest(login=endpoints.login, password=endpoints.password), timeout=10
                    )
                    yield cls(process, endpoints, channels, answer.access_token)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                    await process.wait()

    @property
    def secrets(self) -> Path:
        """The folder of every secret of the suite."""
        return Path(self.endpoints.ca).parent.parent

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of every process of the suite, by name; PostgreSQL's are one."""
        used: dict[str, float] = {}
        for pid, name in self.processes().items():
            used[name] = used.get(name, 0.0) + cpu_seconds(pid)
        return used

    def processes(self) -> dict[int, str]:
        """Pid to name of every process below `sealpush up`, itself included."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = _stat(int(entry.name))
                if fields:
                    parents[int(entry.name)] = int(fields[1])
        found = {self.process.pid: "up"}
        grown = True
        while grown:
            grown = False
            for pid, parent in parents.items():
                if parent in found and pid not in found:
                    found[pid] = _name(pid, found[parent])
                    grown = True
        return found


def free_base() -> int:
    """A base port whose range nobody uses, and nobody else gets from here while this process lasts.

    That nobody listens is not enough: a suite takes seconds from looking to listening, and would talk to the services of another.
    """
    # Below the ports that Linux gives to connections.
    for base in range(11_000, 32_000, 250):
        # A name that ends with the process, and is known wherever the ports are: in this network namespace.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sealpush-base-port-{base}")
            Ports(base, PROCESSES_MAX).check_free(patience_s=0)
        except (OSError, UpError):
            claim.close()
            continue
        _claims.enter_context(claim)
        return base
    raise RuntimeError("no free range of ports")


async def _wait(process: asyncio.subprocess.Process, data_dir: Path) -> Endpoints:
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            if process.returncode is not None:
                raise RuntimeError("`sealpush up` ended before it was ready")
            try:
                return Endpoints.load(data_dir)
            except UpError:
                await asyncio.sleep(0.1)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name: state, ppid, …"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def cpu_seconds(pid: int) -> float:
    """CPU time so far of one process, in steps of the kernel's clock: usually 10 ms."""
    fields = _stat(pid)
    # User and system time, with those of children that ended.
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0


def _name(pid: int, parent: str) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return parent
    if parent == "postgres" or "postgres" in command[0]:
        return "postgres"
    if "valkey" in command[0]:
        return "valkey"
    if "serve" in command:
        return command[command.index("serve") + 1]
    return "simulators" if "simulate" in command else parent
