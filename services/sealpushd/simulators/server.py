"""Runs simulators in one process: any set of APNs, FCM and HMS over TLS, an SMS inbox, and the gRPC control listener."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from sealpushd.simulators.apns import ApnsSimulator
from sealpushd.simulators.control import PushControlService, SmsControlService
from sealpushd.simulators.core import PushSimulator
from sealpushd.simulators.fcm import PROJECT_MESSAGES_PER_MINUTE_MAX, FcmSimulator
from sealpushd.simulators.hms import HmsSimulator
from sealpushd.simulators.listener import HttpListener
from sealpushd.simulators.receipts import ReceiptSender, ReceiptSettings
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1.simulator_pb2_grpc import add_SimulatedPushServicer_to_server, add_SimulatedSmsServicer_to_server

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
class ServiceAccount:
    """A service account that the simulated Google trusts, with the public half (PEM, RSA) of one of its keys."""

    project_id: str
    client_email: str
    private_key_id: str
    public_key_pem: bytes


@dataclass(frozen=True, slots=True, repr=False)
class HmsClient:
    """An app of the simulated Push Kit as its OAuth client; user and key sign its receipts, "" each: they are not signed."""

    app_id: str
    client_secret: str
    receipt_user: str = ""
    receipt_key: str = ""


@dataclass(frozen=True, slots=True)
class SimulatedApns:
    """The simulated APNs. Port 0: any free one."""

    port: int = 0
    provider_keys: Sequence[ProviderKey] = ()
    limit_token_updates: bool = False


@dataclass(frozen=True, slots=True)
class SimulatedFcm:
    """The simulated FCM and its token endpoint (`/token`). Port 0: any free one. `token_audience`: see `FcmSimulator`."""

    port: int = 0
    service_accounts: Sequence[ServiceAccount] = ()
    token_audience: str | None = None
    messages_per_minute_max: int = PROJECT_MESSAGES_PER_MINUTE_MAX


@dataclass(frozen=True, slots=True)
class SimulatedHms:
    """The simulated Push Kit and its token endpoint (`/oauth2/v3/token`). Port 0: any free one. No `receipts`: it sends none."""

    port: int = 0
    clients: Sequence[HmsClient] = ()
    receipts: ReceiptSettings | None = None


@dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """What runs, and where it listens; a vendor without settings does not run.

    `certificate` and `private_key` are PEM files; the certificate names the hosts that providers connect to. `host` is the address
    that the vendors' listeners bind to; the control listener is on loopback only. Port 0: any free one.
    """

    certificate: Path
    private_key: Path
    host: str = LOOPBACK
    control_port: int = 0
    apns: SimulatedApns | None = None
    fcm: SimulatedFcm | None = None
    hms: SimulatedHms | None = None


@dataclass(frozen=True, slots=True)
class RunningSimulators:
    """The simulators and the real ports, while they run. A vendor that does not run has port 0, and nobody reaches it."""

    apns: ApnsSimulator
    fcm: FcmSimulator
    hms: HmsSimulator
    sms: SmsSimulator
    apns_port: int
    fcm_port: int
    hms_port: int
    control_port: int


def _utc_now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def simulators(settings: SimulatorSettings, *, now: Callable[[], datetime] = _utc_now) -> AsyncIterator[RunningSimulators]:
    """The running simulators; leaving the block ends them. Raises OSError when a port is taken, ValueError on a bad credential."""
    apns, fcm, hms, sms = _apns(settings.apns, now), _fcm(settings.fcm, now), _hms(settings.hms, now), SmsSimulator(now=now)
    async with AsyncExitStack() as stack:
        ports: dict[PushSimulator, int] = {}
        for simulator, wanted in ((apns, settings.apns), (fcm, settings.fcm), (hms, settings.hms)):
            if wanted is not None:
                listener = HttpListener(simulator)
                stack.push_async_callback(listener.close)
                files = {"certificate": settings.certificate, "private_key": settings.private_key}
                ports[simulator] = await listener.start(host=settings.host, port=wanted.port, **files)
        if settings.hms is not None and settings.hms.receipts is not None:
            await stack.enter_async_context(ReceiptSender.sending(settings.hms.receipts, hms, now))
        control_port = await stack.enter_async_context(_control(settings.control_port, list(ports), sms))
        yield RunningSimulators(apns, fcm, hms, sms, ports.get(apns, 0), ports.get(fcm, 0), ports.get(hms, 0), control_port)


@asynccontextmanager
async def _control(port: int, running: Sequence[PushSimulator], sms: SmsSimulator) -> AsyncIterator[int]:
    """The control listener; gives its real port."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", CONTROL_MESSAGE_BYTES_MAX),
            # A second process must get an error, not half of the calls.
            ("grpc.so_reuseport", 0),
        ]
    )
    add_SimulatedPushServicer_to_server(PushControlService(running), server)
    add_SimulatedSmsServicer_to_server(SmsControlService(sms), server)
    try:
        bound = server.add_insecure_port(f"{LOOPBACK}:{port}")
    except RuntimeError as e:
        raise OSError(f"cannot listen on {LOOPBACK}:{port}, is the port taken?") from e
    try:
        await server.start()
        yield bound
    finally:
        await server.stop(SHUTDOWN_GRACE_S)


def _apns(settings: SimulatedApns | None, now: Callable[[], datetime]) -> ApnsSimulator:
    settings = settings or SimulatedApns()
    apns = ApnsSimulator(now=now, limit_token_updates=settings.limit_token_updates)
    for key in settings.provider_keys:
        apns.register_provider_key(key.team_id, key.key_id, key.public_key_pem, key.topics)
    return apns


def _fcm(settings: SimulatedFcm | None, now: Callable[[], datetime]) -> FcmSimulator:
    settings = settings or SimulatedFcm()
    quota, audience = settings.messages_per_minute_max, settings.token_audience
    fcm = FcmSimulator(now=now, token_audience=audience, messages_per_minute_max=quota)
    for account in settings.service_accounts:
        fcm.register_service_account(account.project_id, account.client_email, account.private_key_id, account.public_key_pem)
    return fcm


def _hms(settings: SimulatedHms | None, now: Callable[[], datetime]) -> HmsSimulator:
    settings = settings or SimulatedHms()
    hms = HmsSimulator(now=now)
    for client in settings.clients:
        hms.register_client(client.app_id, client.client_secret, client.receipt_user, client.receipt_key)
    return hms


async def serve_simulators(
    settings: SimulatorSettings,
    *,
    stop: asyncio.Event,
    ready: Callable[[RunningSimulators], None] | None = None,
) -> None:
    """Run the simulators until `stop` is set or the task is cancelled; `ready` gets the real ports once they listen."""
    async with simulators(settings) as running:
        listening = {"apns_port": running.apns_port, "fcm_port": running.fcm_port, "hms_port": running.hms_port}
        ports = {name: port for name, port in listening.items() if port}
        _log.info("simulators listen", **ports, control_port=running.control_port)
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
