"""The bootstrap that every service shares: listeners, health, metrics, drain. A service brings its servicers and tasks."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from sealpushd.platform import logging, telemetry, tls
from sealpushd.platform.admission import Door
from sealpushd.platform.clients import MESSAGE_BYTES_MAX, MeshChannel
from sealpushd.platform.clock import Clock, SystemClock
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.db import Database
from sealpushd.platform.errors import NotFound, ServiceError, in_words
from sealpushd.platform.metrics import serve_metrics
from sealpushd.platform.migrate import check_schema
from sealpushd.platform.outage import Outage
from sealpushd.platform.rpc import GuardedServer
from sealpushd.platform.settings import Settings, SettingsError
from sealpushd.platform.tokens import ServiceKey, TokenVerifier
from sealpushd.platform.valkey import Valkey
from sealpushd.platform.vault import FileKeyWrapper, Vault

log = structlog.get_logger()

# HTTP/2 streams one client connection may hold open at once: services multiplex everything over one, phones need a handful. A client that
# takes no answers has each of them held in memory.
MESH_STREAMS_MAX: Final = 10_000
PUBLIC_STREAMS_MAX: Final = 512
# A request from outside, by service: about twice the largest that is answered. gRPC has no limit by method, and a longer one is refused by
# the length that it says, so whoever needs no token (accounts, registration) cannot have more than this gathered for a call.
PUBLIC_REQUEST_BYTES_MAX: Final[Mapping[str, int]] = {
    "accounts": 16 * 1024,  # a login and a password
    "registration": 64 * 1024,  # a push token of 4,096 characters and 64 subscriptions
    "keys": 512 * 1024,  # 256 KiB of prekeys
    "publishing": 3 * 1024 * 1024,  # a batch of 2 MiB, and room for what surrounds it
    "fetch": 128 * 1024,  # 256 acknowledgements
}
# A connection without a call for this long is ended; whoever calls again connects again. What it holds, some 40 kB, is for others then.
PUBLIC_IDLE_MS: Final = 60_000
# From the first packet to HTTP/2's settings, by way of TLS: two round trips, on a slow network.
HANDSHAKE_TIMEOUT_MS: Final = 10_000
# Calls that nobody has looked at yet: gRPC gives a turn of the loop one. More end at once, as CANCELLED, and whoever has a device's stream
# comes back after a while. With gRPC's own numbers (1,000, and from there on some at random) the phones of a fetch that has just restarted
# did not all get in: they come at once. Each holds 20 kB, and up to 64 KiB of its request.
PENDING_MAX: Final = 4_000
# Files of a process besides its public connections: the database, Valkey, the mesh, push services, and what is for a moment.
OTHER_FILES_MAX: Final = 512
KEEPALIVE_TIMEOUT_MS: Final = 5_000
# A dispatcher whose machine or network is gone sends no goodbye: its leases are held until this finds out.
MESH_KEEPALIVE_MS: Final = 10_000
# A phone that left its network holds a live stream until this finds out. Seldom, because each ping wakes its radio.
PUBLIC_KEEPALIVE_MS: Final = 300_000
TASK_RESTART_PAUSE_S: Final = 1.0
# A background task that has run for so long has recovered. Longer than one of its statements takes to be given up.
TASK_STEADY_S: Final = 20.0


def server_options(*, receive_bytes_max: int, keepalive_ms: int, streams_max: int) -> list[tuple[str, int]]:
    """What every listener has in common, and the three in which they differ."""
    return [
        ("grpc.max_receive_message_length", receive_bytes_max),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_concurrent_streams", streams_max),
        ("grpc.server.max_pending_requests", PENDING_MAX),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_MAX),
        # Two servers on one port would share its connections at random: refuse instead.
        ("grpc.so_reuseport", 0),
        # Phones ping through networks that drop idle connections after a minute.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # gRPC's own defaults are two hours and, for the answer, a minute: the second time-out is the one that ends the connection.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ]


MESH_OPTIONS: Final = server_options(receive_bytes_max=MESSAGE_BYTES_MAX, keepalive_ms=MESH_KEEPALIVE_MS, streams_max=MESH_STREAMS_MAX)


def public_options(
    service: str, *, connections_max: int, idle_ms: int = PUBLIC_IDLE_MS, handshake_timeout_ms: int = HANDSHAKE_TIMEOUT_MS
) -> list[tuple[str, int]]:
    """What a service's public listener has, and the mesh has not: bounds on what strangers may hold.

    None in the mesh: its peers are few and known, and their sessions last.
    """
    return [
        *server_options(
            receive_bytes_max=PUBLIC_REQUEST_BYTES_MAX[service], keepalive_ms=PUBLIC_KEEPALIVE_MS, streams_max=PUBLIC_STREAMS_MAX
        ),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.max_connection_idle_ms", idle_ms),
        ("grpc.server_handshake_timeout_ms", handshake_timeout_ms),
        # What a call may send before anybody has looked at it stays 64 KiB: by the speed of the connection gRPC would make it some MiB.
        # A request that is waited for opens the window as far as it is long.
        ("grpc.http2.bdp_probe", 0),
    ]


AddServicer = tuple[Callable[[Any, Any], None], Any]


@dataclass(frozen=True, slots=True)
class ServiceApp:
    """A wired service: what it answers, what runs beside, what to close, in this order."""

    public: Sequence[AddServicer] = ()
    mesh: Sequence[AddServicer] = ()
    # Run until cancelled; one that fails is logged and started again.
    tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    # Called first when the service ends: stop taking work, end long streams.
    drain: Callable[[], Awaitable[None]] | None = None
    closes: Sequence[Callable[[], Awaitable[None]]] = ()


@dataclass(slots=True)
class Runtime:
    """What `app.py` wires a service from. Parts are opened on demand and closed by the bootstrap."""

    service: str
    settings: Settings
    key: ServiceKey
    verifier: TokenVerifier
    clock: Clock = field(default_factory=SystemClock)
    closes: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    # Whom it concerns that the clock was set says so here.
    clock_watch: ClockWatch = field(init=False)

    def __post_init__(self) -> None:
        self.clock_watch = ClockWatch(self.clock)

    async def database(self) -> Database:
        """Connections as the service's role, its schema checked. Raises SchemaError, StoreUnavailable, SettingsError."""
        self.settings.need("postgres_url")
        assert self.settings.postgres_url is not None  # noqa: S101 - need() has just made sure
        url = self.settings.postgres_url.get_secret_value()
        await check_schema(url, self.service)
        db = Database(url, self.service, self.settings.postgres_connections)
        await db.open()
        self.closes.append(db.aclose)

        async def clock_of_database() -> datetime:
            row = await db.fetch_one("clock", "SELECT clock_timestamp() AS now")
            assert row is not None  # noqa: S101 - a statement without a table has one row
            moment: datetime = row["now"]
            return moment

        self.clock_watch.ask_database = clock_of_database
        return db

    async def vault(self, db: Database) -> Vault:
        self.settings.need("vault_key")
        assert self.settings.vault_key is not None  # noqa: S101 - need() has just made sure
        return await Vault.open(db, self.service, FileKeyWrapper(self.settings.vault_key))

    def valkey(self) -> Valkey:
        self.settings.need("valkey_url")
        assert self.settings.valkey_url is not None  # noqa: S101 - need() has just made sure
        valkey = Valkey(self.settings.valkey_url.get_secret_value())
        self.closes.append(valkey.aclose)
        return valkey

    def channel(self, peer: str) -> MeshChannel:
        """A channel to another service's mesh listener."""
        channel = MeshChannel(peer, getattr(self.settings, f"{peer}_mesh"), self.key)
        self.closes.append(channel.aclose)
        return channel


Build = Callable[[Runtime], Awaitable[ServiceApp]]


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, setting: str) -> int:
    try:
        return server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as e:
        raise SettingsError(f"cannot listen on {address}: is another process using it? Choose another with {setting}") from e


async def run_service(service: str, settings: Settings, build: Build, ready: Callable[[dict[str, int]], None] | None = None) -> None:
    """Run one service until SIGTERM or SIGINT, then drain: NOT_SERVING, finish calls, close.

    Raises SettingsError, SchemaError, StoreUnavailable before it serves anything. `ready` gets the ports once it does.
    """
    logging.configure(service, settings.log_level, human=settings.log_human)
    telemetry.configure(service, enabled=settings.traces)
    settings.need("service_key", "trust")
    assert settings.service_key is not None and settings.trust is not None  # noqa: S101, PT018 - need() has just made sure
    try:
        key, verifier = ServiceKey.load(service, settings.service_key), TokenVerifier.load(settings.trust)
    except ValueError as e:
        raise SettingsError(str(e)) from e
    runtime = Runtime(service, settings, key, verifier)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    try:
        app = await build(runtime)
        await _serve(service, settings, app, runtime.clock_watch, verifier, stopping, ready)
    finally:
        for close in reversed(runtime.closes):
            try:
                async with asyncio.timeout(5):
                    await close()
            except Exception as e:
                log.warning("a part did not close cleanly", error=in_words(e))


async def _serve(
    service: str,
    settings: Settings,
    app: ServiceApp,
    clock_watch: ClockWatch,
    verifier: TokenVerifier,
    stopping: asyncio.Event,
    ready: Callable[[dict[str, int]], None] | None,
) -> None:
    health = Health()
    servers: list[grpc.aio.Server] = []
    # One for both listeners: they share the event loop, and what the mesh asks must find room beside those outside.
    door = Door()
    ports: dict[str, int] = {}
    if app.public:
        settings.need("tls_certificate", "tls_private_key")
        assert settings.tls_certificate is not None and settings.tls_private_key is not None  # noqa: S101, PT018 - as above
        try:
            credentials = tls.server_credentials(settings.tls_certificate, settings.tls_private_key)
        except ValueError as e:
            raise SettingsError(str(e)) from e
        connections_max = connections_possible(settings.public_connections)
        public, services = _server(app.public, verifier, door, health, public_options(service, connections_max=connections_max))
        if settings.reflection:
            reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], public)
        ports["public"] = _listen(public, f"{settings.host}:{settings.port(service, 'public')}", credentials, "SEALPUSH_PUBLIC_PORT")
        servers.append(public)
    mesh, _ = _server(app.mesh, verifier, door, health, MESH_OPTIONS)
    ports["mesh"] = _listen(mesh, f"{settings.host}:{settings.port(service, 'mesh')}", None, "SEALPUSH_MESH_PORT")
    servers.append(mesh)
    try:
        ports["metrics"] = serve_metrics(settings.host, settings.port(service, "metrics"))
    except OSError as e:
        port = settings.port(service, "metrics")
        raise SettingsError(f"cannot listen on {settings.host}:{port}: {e.strerror}; choose another with SEALPUSH_METRICS_PORT") from e

    for server in servers:
        await server.start()
    tasks = [asyncio.create_task(_keep_running(task), name=getattr(task, "__qualname__", "task")) for task in (*app.tasks, clock_watch.run)]
    log.info("serving", **ports)
    if ready is not None:
        ready(ports)
    await stopping.wait()

    log.info("draining", seconds=settings.drain_seconds)
    health.serving = False
    # The listeners first: whoever is told to come back must find another process, and not open its stream here again.
    stops = [asyncio.ensure_future(server.stop(settings.drain_seconds)) for server in servers]
    await asyncio.sleep(0)
    if app.drain is not None:
        await app.drain()
    await asyncio.gather(*stops)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for close in app.closes:
        await close()
    log.info("stopped")


def _server(
    servicers: Sequence[AddServicer],
    verifier: TokenVerifier,
    door: Door,
    health: Health,
    options: Sequence[tuple[str, int]],
) -> tuple[grpc.aio.Server, list[str]]:
    """A server with its servicers guarded, and the names of their gRPC services."""
    server = grpc.aio.server(options=options)
    guarded = GuardedServer(server, verifier, door)
    for add, servicer in servicers:
        add(servicer, guarded)
    health.add_to(guarded)
    return server, guarded.services


class Health:
    """Whether this process serves, for load balancers and supervisors."""

    def __init__(self) -> None:
        self.serving = True

    async def _check(self, request: health_pb2.HealthCheckRequest, _: object) -> health_pb2.HealthCheckResponse:
        if request.service:
            raise NotFound("the health of single gRPC services is not kept; ask for the empty name", field="service")
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if self.serving else answer.NOT_SERVING)

    def add_to(self, server: GuardedServer) -> None:
        """Offer Check, and no Watch: that would be a stream for every stranger, for as long as it likes."""
        check = grpc.unary_unary_rpc_method_handler(
            self._check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        )
        server.add_registered_method_handlers("grpc.health.v1.Health", {"Check": check})


def connections_possible(wanted: int) -> int:
    """How many public connections this process can have, with as many files open as the system lets it.

    Without files a process can neither accept nor reach its database again: strangers must not use up the last of them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted + OTHER_FILES_MAX
    if soft != resource.RLIM_INFINITY and soft < enough:
        soft = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - OTHER_FILES_MAX))
    if possible < wanted:
        log.warning("the limit of open files allows fewer public connections; raise it (ulimit -n)", connections=possible, wanted=wanted)
    return possible


async def _keep_running(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    name = getattr(task, "__qualname__", "task")
    outage = Outage(
        f"task {name}",
        gone="a background task failed and starts again",
        back="a background task goes on as it should",
        steady_s=TASK_STEADY_S,
        task=name,
    )
    while True:
        try:
            await task()
            return
        except asyncio.CancelledError:
            raise
        except Exception as e:
            # What a service cannot help has said enough with its text; a bug needs its stack, once.
            outage.failed(e, stack=not isinstance(e, ServiceError))
            await asyncio.sleep(TASK_RESTART_PAUSE_S)
            outage.worked()
