"""Values and helpers of the contract tests; the fixtures stand in conftest.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import REGISTRY
from pydantic import SecretStr
from redis.asyncio import Redis

from sealpush.keys import ContentSigningKey
from sealpush.transport import Endpoints
from sealpushd.accounts.app import build as build_accounts
from sealpushd.dispatch.app import build as build_dispatch
from sealpushd.engines import Engines
from sealpushd.fetch.app import build as build_fetch
from sealpushd.keys.app import build as build_keys
from sealpushd.platform.arrivals import Arrivals
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.errors import DETAILS_KEY
from sealpushd.platform.migrate import SERVICES
from sealpushd.platform.rpc import GuardedServer
from sealpushd.platform.server import PUBLIC_REQUEST_BYTES_MAX, AddServicer, Build, Runtime, ServiceApp, public_options
from sealpushd.platform.settings import Settings, load
from sealpushd.platform.tokens import ServiceKey, TokenVerifier
from sealpushd.platform.valkey import CHANNEL_QUEUE, CHANNEL_STREAMS
from sealpushd.publishing.app import build as build_publishing
from sealpushd.registration.app import build as build_registration
from sealpushd.simulators.control import SmsControlService
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1.simulator_pb2_grpc import add_SimulatedSmsServicer_to_server
from tests.clocks import FakeClock as FakeClock

LOOPBACK = "127.0.0.1"
# Bounds a hang, where nothing is claimed about time: a machine may be many times slower than the one on which a test was written.
LIMIT_S = 30
# Of no service: who calls there is refused at once.
NOBODY = f"{LOOPBACK}:9"
# The same everywhere, because a database, and so the data keys that this one wraps, outlives the services of a test.
VAULT_KEY = "07" * 32
NOTHING: Mapping[str, Any] = MappingProxyType({})
BUILDS: Mapping[str, Build] = {
    "accounts": build_accounts,
    "registration": build_registration,
    "keys": build_keys,
    "publishing": build_publishing,
    "dispatch": build_dispatch,
    "fetch": build_fetch,
}


async def until_locked_out(sql: Connection, count: int = 1) -> list[int]:
    """Wait until so many other clients of this database wait for a lock; their backends' process ids.

    Of clients, because autovacuum waits as well. Each look is a fresh one: within a transaction, PostgreSQL goes on showing those backends
    and statements that the first look found.
    """
    async with asyncio.timeout(LIMIT_S):
        while True:
            await sql.execute("SELECT pg_stat_clear_snapshot()")
            found = await sql.fetch(
                "SELECT pid FROM pg_stat_activity"
                " WHERE datname = current_database() AND backend_type = 'client backend' AND wait_event_type = 'Lock'"
            )
            if len(found) >= count:
                return [row["pid"] for row in found]


class Migrated(Protocol):
    async def __call__(self, *services: str) -> dict[str, str]:
        """A new database with these services' schemas: the URL of each service's own role, by service; "admin" the superuser's."""
        ...


class Mesh:
    """Keys of every service and the operator, and the trust in them."""

    def __init__(self) -> None:
        self.keys = {name: ServiceKey(name, Ed25519PrivateKey.generate()) for name in (*SERVICES, "operator")}
        self.verifier = TokenVerifier({name: [key.public_key] for name, key in self.keys.items()})


class Peer:
    """A gRPC server in this process, on a port of its own that it keeps over stop and start. Without a verifier it asks for no token."""

    def __init__(
        self,
        servicers: Sequence[AddServicer] = (),
        verifier: TokenVerifier | None = None,
        *,
        credentials: grpc.ServerCredentials | None = None,
        options: Sequence[tuple[str, int]] = (),
        arrivals: Arrivals | None = None,
    ) -> None:
        self.servicers = servicers
        self._arrivals = arrivals
        self._verifier = verifier
        self._credentials = credentials
        self._options = [("grpc.so_reuseport", 0), *options]
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def bind(self) -> Self:
        """Take the port; who calls before the start waits for it."""
        self._server = grpc.aio.server(options=self._options)
        if self._credentials is None:
            self.port = self._server.add_insecure_port(self.address)
        else:
            self.port = self._server.add_secure_port(self.address, self._credentials)
        return self

    async def start(self) -> None:
        if self._server is None:
            self.bind()
        assert self._server is not None
        registrar: Any = self._server if self._verifier is None else GuardedServer(self._server, self._verifier, arrivals=self._arrivals)
        for add, servicer in self.servicers:
            add(servicer, registrar)
        await self._server.start()

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no calls any more, and end those that last longer. Idempotent."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()


@dataclass(frozen=True, slots=True)
class Served:
    """A service that answers, wired by its own app.py."""

    app: ServiceApp
    public: grpc.aio.Channel
    public_address: str
    mesh: Peer


class Services:
    """Services in this process that call each other over real gRPC. `running_services` makes them; `services["keys"]` was served last."""

    def __init__(
        self,
        valkey_url: str,
        mesh: Mesh,
        urls: Mapping[str, str],
        clock: FakeClock,
        settings: Settings,
        closing: AsyncExitStack,
        *,
        work: bool,
    ) -> None:
        self.mesh = mesh
        # Of their databases, and the superuser's as "admin".
        self.urls = urls
        self.clock = clock
        # What every service is told; each gets the URL of its own database besides.
        self.settings = settings
        # What is to be closed at the end, last in, first out.
        self.closing = closing
        # What codes are sent to, where registration is served.
        self.sms = SmsSimulator(now=clock.now)
        self.stand_ins: dict[str, Peer] = {}
        self._valkey_url = valkey_url
        self._work = work
        self._served: dict[str, Served] = {}
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._listeners: dict[str, tuple[Peer, Peer]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._peers: list[Peer] = []
        self._mailboxes = 0

    def __getitem__(self, service: str) -> Served:
        return self._served[service]

    @property
    def endpoints(self) -> Endpoints:
        """Of the public listeners. A stand-in answers at one address for phones and services."""
        at = {name: peer.address for name, peer in self.stand_ins.items()}
        at |= {name: served.public_address for name, served in self._served.items()}
        accounts, registration, keys, publishing, messages = (
            at.get(name, NOBODY) for name in ("accounts", "registration", "keys", "publishing", "fetch")
        )
        return Endpoints(accounts, registration, keys, publishing, messages, insecure=True)

    @property
    def addresses(self) -> dict[str, str]:
        """The settings that say where each service's mesh listener is."""
        return {f"{name}_mesh": getattr(self.settings, f"{name}_mesh") for name in SERVICES}

    def channel(self, service: str, caller: str) -> MeshChannel:
        """To a service's mesh listener, with the credentials of another or the operator's."""
        channel = MeshChannel(service, getattr(self.settings, f"{service}_mesh"), self.mesh.keys[caller])
        self.closing.push_async_callback(channel.aclose)
        return channel

    async def database(self, service: str) -> Database:
        """One connection, as the service has them."""
        made = Database(self.urls[service], service, 1)
        await made.open()
        self.closing.push_async_callback(made.aclose)
        return made

    async def sql(self, search_path: str | None = None) -> Connection:
        """The database as its superuser: looks at tables and makes time pass."""
        made = await connect(self.urls["admin"], search_path=search_path)
        self.closing.push_async_callback(made.close)
        return made

    async def serve(self, service: str, settings: Mapping[str, Any] = NOTHING, build: Build | None = None) -> Served:
        """Serve it once more, as another process over the same database would, with these settings of its own.

        Who is served later calls this one; who is served already goes on calling the one before.
        """
        if service not in self._listeners:
            self._listen(service)
        public, inside = self._listeners.pop(service)
        closes: list[Callable[[], Awaitable[None]]] = []

        async def close() -> None:
            for each in reversed(closes):
                await each()

        self.closing.push_async_callback(close)
        own = self.settings.model_copy(update={"postgres_url": SecretStr(self.urls[service]), **settings})
        runtime = Runtime(service, own, self.mesh.keys[service], self.mesh.verifier, self.clock, closes)
        app = await (build or BUILDS[service])(runtime)
        closes.extend(app.closes)
        public.servicers, inside.servicers = app.public, app.mesh
        for peer in (public, inside):
            await peer.start()
        channel = await self.closing.enter_async_context(grpc.aio.insecure_channel(public.address))
        served = self._served[service] = Served(app, channel, public.address, inside)
        if app.drain is not None:
            self._drains.append(app.drain)
        if self._work:
            self._tasks += [asyncio.create_task(task()) for task in app.tasks]
            if service == "fetch" and build is None:
                self._mailboxes += 1
                await self._heard(self._mailboxes)
        return served

    async def _heard(self, mailboxes: int) -> None:
        """Wait until exactly so many mailboxes hear each other through Valkey."""
        async with Redis.from_url(self._valkey_url) as client, asyncio.timeout(LIMIT_S):
            while {count for _, count in await client.pubsub_numsub(CHANNEL_QUEUE, CHANNEL_STREAMS)} != {mailboxes}:
                pass

    def _listen(self, service: str) -> None:
        # As strangers meet it; dispatch has none.
        bounds = public_options(service, connections_max=1000) if service in PUBLIC_REQUEST_BYTES_MAX else ()
        public, inside = (Peer((), self.mesh.verifier, options=options).bind() for options in (bounds, ()))
        self._listeners[service] = public, inside
        self._peers += public, inside
        self.settings = self.settings.model_copy(update={f"{service}_mesh": inside.address})

    async def _open(self, services: Sequence[str], stand_ins: Mapping[str, Sequence[AddServicer]]) -> None:
        for name, servicers in stand_ins.items():
            peer = self.stand_ins[name] = await self.closing.enter_async_context(Peer(servicers, self.mesh.verifier))
            self.settings = self.settings.model_copy(update={f"{name}_mesh": peer.address})
        if "registration" in services:
            inbox = Peer([(add_SimulatedSmsServicer_to_server, SmsControlService(self.sms))])
            await self.closing.enter_async_context(inbox)
            self.settings = self.settings.model_copy(update={"code_channel_address": inbox.address})
        await self._heard(0)
        for service in services:
            self._listen(service)
        for service in services:
            await self.serve(service)

    async def _rest(self) -> None:
        """End what services do beside, and what their calls still do, before what they use is closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for drain in self._drains:
            await drain()
        await asyncio.gather(*(peer.stop(LIMIT_S) for peer in self._peers))
        deadline = time.monotonic() + LIMIT_S
        while running := in_flight():
            assert time.monotonic() < deadline, f"calls that do not end: {running}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def calling_from(address: str, served: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a listener whose calls come from another address of this machine, such as 127.0.0.2."""
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = served.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
        for ends in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(pump(*ends))
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    relay = await asyncio.start_server(connected, LOOPBACK, 0)
    try:
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{relay.sockets[0].getsockname()[1]}") as channel:
            yield channel
    finally:
        relay.close()
        for each in list(pumps):
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def in_flight() -> dict[str, float]:
    """How many calls of which methods services of this process are answering."""
    samples = [each for metric in REGISTRY.collect() if metric.name == "sealpush_rpc_in_flight" for each in metric.samples]
    return {each.labels["method"]: each.value for each in samples if each.value}


@asynccontextmanager
async def running_services(
    engines: Engines,
    mesh: Mesh,
    urls: Mapping[str, str],
    clock: FakeClock,
    services: Sequence[str] = (),
    *,
    stand_ins: Mapping[str, Sequence[AddServicer]] = NOTHING,
    settings: Mapping[str, Any] = NOTHING,
    platform_key: ContentSigningKey | None = None,
    work: bool = True,
) -> AsyncIterator[Services]:
    """These services, or all that have a database in `urls`, each wired by its own app.py, over PostgreSQL and an emptied Valkey.

    `stand_ins` answer in the place of others that they call; who is neither does not answer. All listeners have their ports before the
    first service is wired, because services call each other in circles. `work`: run what services do beside, too.
    """
    async with AsyncExitStack() as closing:
        async with Redis.from_url(engines.valkey_url) as client:
            await client.flushall()
        folder = Path(closing.enter_context(TemporaryDirectory()))
        (folder / "vault.key").write_text(VAULT_KEY)
        (folder / "platform.key").write_text((platform_key or ContentSigningKey.generate()).seed.hex())
        given = {
            "valkey_url": SecretStr(engines.valkey_url),
            "vault_key": folder / "vault.key",
            "platform_key": folder / "platform.key",
            "code_channel": "simulated",
            **{f"{name}_mesh": NOBODY for name in SERVICES},
        }
        made = Services(engines.valkey_url, mesh, urls, clock, load(**given, **settings), closing, work=work)
        try:
            await made._open(services or [name for name in SERVICES if name in urls], stand_ins)
            yield made
        finally:
            await made._rest()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status as clients branch on it."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    retry_after_s: float | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    reason: str = ""


async def refusal(call: Awaitable[Any]) -> Refusal:
    """The refusal of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    field, retry_after_s, metadata, reason = "", None, (), ""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    metadata, reason = tuple(sorted(info.metadata.items())), info.reason
                elif detail.Unpack(bad):
                    field = bad.field_violations[0].field
                elif detail.Unpack(retry):
                    retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return Refusal(error.code(), error.details() or "", field, retry_after_s, metadata, reason)
