"""Which port is whose on one machine, and whether they are free."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from typing import Final, Literal

from sealpushd.platform.settings import default_port
from sealpushd.up.errors import UpError

HOST: Final = "127.0.0.1"
SERVICES: Final = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")
# Services that outsiders call.
PUBLIC: Final = ("accounts", "registration", "keys", "publishing", "fetch")
LISTENERS: Final[tuple[Literal["public", "mesh", "metrics"], ...]] = ("public", "mesh", "metrics")
# Of one service, side by side; each has ports of its own, this far apart.
PROCESSES_MAX: Final = 4
_PROCESS_STEP: Final = 10
# The last port, counted from the base.
HIGHEST: Final = 206 + _PROCESS_STEP * (PROCESSES_MAX - 1)
# The processes of a run that was killed end within moments; only then their ports are free.
_PATIENCE_S: Final = 3.0


class Ports:
    """Every port of one `up`, counted from a base, with so many processes of each service."""

    def __init__(self, base: int, processes: int = 1) -> None:
        self.base = base
        self.processes = processes
        self.control = base + 90
        self.apns = base + 91
        self.fcm = base + 92
        self.hms = base + 93
        # Where dispatch takes Huawei's delivery receipts.
        self.receipts = base + 94

    def of(self, service: str, listener: Literal["public", "mesh", "metrics"], process: int = 0) -> int:
        return default_port(service, listener, self.base) + _PROCESS_STEP * process

    def target(self, service: str, listener: Literal["public", "mesh"], host: str = HOST) -> str:
        """What a client connects to: the address of the one process, or the list of all."""
        if self.processes == 1:
            return f"{host}:{self.of(service, listener)}"
        return "ipv4:" + ",".join(f"{HOST}:{self.of(service, listener, process)}" for process in range(self.processes))

    def all(self) -> Mapping[int, str]:
        """Port to what it is for."""
        ports = {
            self.of(service, listener, process): f"{service}, {listener}"
            for process in range(self.processes)
            for listener in LISTENERS
            for service in SERVICES
        }
        return ports | {
            self.control: "simulators, control",
            self.apns: "simulated APNs",
            self.fcm: "simulated FCM",
            self.hms: "simulated HMS",
            self.receipts: "dispatch, receipts",
        }

    def check_free(self, patience_s: float = _PATIENCE_S) -> None:
        """Raises UpError that names the first port somebody listens on. Waits a moment for those of a killed run."""
        deadline = time.monotonic() + patience_s
        for port, purpose in self.all().items():
            while not _is_free(port):
                if time.monotonic() > deadline:
                    raise UpError(
                        f"port {port} ({purpose}) is taken by another program. "
                        f"Choose other ports with --base-port: {self.base} uses {self.base + 1} to {max(self.all())}."
                    )
                time.sleep(0.05)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of a while ago that only linger do not take the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                return False
            raise UpError(f"cannot use port {port}: {e.strerror}. Choose other ports with --base-port.") from e
    return True
