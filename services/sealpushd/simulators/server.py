"""Runs the simulators: APNs over HTTP/2 and TLS, and the gRPC control listener, in one process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from sealpushd.simulators.apns import ApnsSimulator
from sealpushd.simulators.control import ApnsControlService, SmsControlService
from sealpushd.simulators.http2 import Http2Server
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1.simulator_pb2_grpc import add_SimulatedApnsServicer_to_server, add_SimulatedSmsServicer_to_server

LOOPBACK = "127.0.0.1"
# A scripted giant answer may be 16 MiB; it travels in one SetFault.
CONTROL_MESSAGE_BYTES_MAX = 17 * 1024 * 1024
# Streams of phones do not end by themselves.
SHUTDOWN_GRACE_S = 0.5

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProviderKey:
    """A provider's public signing key (PEM, P-256) that the simulated APNs trusts; no topics: any."""

    team_id: str
    key_id: str
    public_key_pem: bytes
    topics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """Where the simulators listen. Port 0: any free one. The control listener is on loopback only.

    `apns_certificate` and `apns_private_key` are PEM files; the certificate names the host that providers connect to.
    `apns_host` is the address to listen on.
    """

    apns_certificate: Path
    apns_private_key: Path
    apns_host: str = LOOPBACK
    apns_port: int = 0
    control_port: int = 0
    provider_keys: Sequence[ProviderKey] = ()
    limit_token_updates: bool = False


@dataclass(frozen=True, slots=True)
class RunningSimulators:
    """The simulators and the real ports, while they run."""

    apns: ApnsSimulator
    sms: SmsSimulator
    apns_port: int
    control_port: int


def _utc_now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def simulators(settings: SimulatorSettings, *, now: Callable[[], datetime] = _utc_now) -> AsyncIterator[RunningSimulators]:
    """The running simulators; leaving the block ends them. Raises OSError when a port is taken."""
    apns, sms = ApnsSimulator(now=now, limit_token_updates=settings.limit_token_updates), SmsSimulator(now=now)
    for key in settings.provider_keys:
        apns.register_provider_key(key.team_id, key.key_id, key.public_key_pem, key.topics)
    control = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", CONTROL_MESSAGE_BYTES_MAX),
            # A second process must get an error, not half of the calls.
            ("grpc.so_reuseport", 0),
        ]
    )
    add_SimulatedApnsServicer_to_server(ApnsControlService(apns), control)
    add_SimulatedSmsServicer_to_server(SmsControlService(sms), control)
    try:
        control_port = control.add_insecure_port(f"{LOOPBACK}:{settings.control_port}")
    except RuntimeError as e:
        raise OSError(f"cannot listen on {LOOPBACK}:{settings.control_port}, is the port taken?") from e
    http2 = Http2Server(apns)
    try:
        apns_port = await http2.start(
            host=settings.apns_host,
            port=settings.apns_port,
            certificate=settings.apns_certificate,
            private_key=settings.apns_private_key,
        )
        await control.start()
        yield RunningSimulators(apns, sms, apns_port, control_port)
    finally:
        await http2.close()
        await control.stop(SHUTDOWN_GRACE_S)


async def serve_simulators(
    settings: SimulatorSettings,
    *,
    stop: asyncio.Event,
    ready: Callable[[RunningSimulators], None] | None = None,
) -> None:
    """Run the simulators until `stop` is set or the task is cancelled; `ready` gets the real ports once they listen."""
    async with simulators(settings) as running:
        _log.info("simulators listen", apns_port=running.apns_port, control_port=running.control_port)
        if ready is not None:
            ready(running)
        await stop.wait()


def run_simulators(settings: SimulatorSettings, ready: Callable[[RunningSimulators], None] | None = None) -> None:
    """Run the simulators in this process until SIGINT or SIGTERM. For the command line."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await serve_simulators(settings, stop=stop, ready=ready)

    asyncio.run(main())
