"""Values and helpers of the contract tests; the fixtures stand in conftest.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2, status_pb2

from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.db import Connection
from sealpushd.platform.errors import DETAILS_KEY
from sealpushd.platform.migrate import SERVICES
from sealpushd.platform.rpc import GuardedServer
from sealpushd.platform.server import AddServicer, Build, ServiceApp
from sealpushd.platform.settings import Settings
from sealpushd.platform.tokens import ServiceKey, TokenVerifier

LOOPBACK = "127.0.0.1"
# Bounds a hang, where nothing is claimed about time: a machine may be many times slower than the one on which a test was written.
LIMIT_S = 30


class FakeClock:
    """Time that only moves when told to; starts at the real present, because tokens live in real time."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)

    def now(self) -> datetime:
        return self._now

    def advance(self, by: timedelta) -> None:
        self._now += by


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
    """A gRPC server in this process, on a port of its own that it keeps over stop and start."""

    def __init__(self, servicers: Sequence[AddServicer], verifier: TokenVerifier | None) -> None:
        self._servicers = servicers
        self._verifier = verifier
        self._port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        registrar: Any = self._server if self._verifier is None else GuardedServer(self._server, self._verifier)
        for add, servicer in self._servicers:
            add(servicer, registrar)
        self._port = self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


@dataclass(frozen=True, slots=True)
class Served:
    """A service that answers, wired by its own app.py."""

    app: ServiceApp
    public: grpc.aio.Channel
    public_address: str
    mesh_address: str


class Serve(Protocol):
    async def __call__(self, service: str, build: Build, settings: Settings, clock: FakeClock) -> Served: ...


class Connect(Protocol):
    def __call__(self, peer: str, address: str, service: str) -> MeshChannel:
        """A channel to a mesh address with the credentials of a service."""
        ...


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
