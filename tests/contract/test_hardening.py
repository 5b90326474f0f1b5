"""What an attacker, a dead network and a slow reader try, and what they must not get."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest

from sealpushd.platform import db
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.db import Database, connect
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.rpc import GuardedServer
from sealpushd.platform.server import server_options
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc
from tests.contract.harness import LOOPBACK, Mesh, Migrated

pytestmark = pytest.mark.asyncio(loop_scope="session")

LIMIT_S = 10


class Wire:
    """A network between two ends, which can be cut without either of them hearing of it."""

    def __init__(self, host: str, port: int) -> None:
        self._peer = host, port
        self._whole = asyncio.Event()
        self._whole.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self._whole.clear()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65_536):
                    await self._whole.wait()
                    writer.write(data)
                    await writer.drain()
                # Also a goodbye gets lost.
                await self._whole.wait()
        finally:
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._peer)
        for ends in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(*ends))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_server(self._connected, LOOPBACK, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for pump in list(self._pumps):
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)


async def test_a_database_that_fell_silent_is_given_up_and_the_next_statement_gets_a_new_connection(
    migrated: Migrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "SILENCE_TIMEOUT_S", 0.5)
    url = urlsplit((await migrated("fetch"))["fetch"])
    assert url.hostname is not None
    wire = Wire(url.hostname, url.port or 5432)
    async with wire.open(), asyncio.timeout(LIMIT_S):
        credentials = url.netloc.rpartition("@")[0]
        database = Database(url._replace(netloc=f"{credentials}@{LOOPBACK}:{wire.port}").geturl(), "fetch", 1)
        await database.open()
        await database.fetch("probe", "SELECT 1")
        wire.cut()
        with pytest.raises(StoreUnavailable):
            await database.fetch("probe", "SELECT 1")
        wire._whole.set()
        assert [tuple(row) for row in await database.fetch("probe", "SELECT 2")] == [(2,)]
        await database.aclose()


async def test_what_a_frozen_process_locked_is_let_go(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "IDLE_IN_TRANSACTION_S", 0.5)
    url = (await migrated("fetch"))["fetch"]
    frozen, other = await connect(url, search_path="fetch"), await connect(url, search_path="fetch")
    try:
        await other.execute("INSERT INTO wake_up_sessions (session_id) VALUES ($1)", b"s" * 16)
        transaction = frozen.transaction()
        await transaction.start()
        await frozen.execute("UPDATE wake_up_sessions SET seen_at = now()")
        async with asyncio.timeout(LIMIT_S):
            await other.execute("UPDATE wake_up_sessions SET seen_at = now()")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await transaction.commit()
    finally:
        frozen.terminate()
        await other.close()


class _Waiting(mailbox_pb2_grpc.MailboxServicer):
    """Holds a session until it ends."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def WakeUpSession(self, request_iterator: Any, context: Any) -> AsyncIterator[mailbox_pb2.WakeUpSessionResponse]:  # noqa: N802 - gRPC's name
        self.began.set()
        try:
            async for _ in request_iterator:
                yield mailbox_pb2.WakeUpSessionResponse()
        finally:
            self.ended.set()


async def test_the_session_of_a_dispatcher_whose_network_is_gone_ends(mesh: Mesh) -> None:
    servicer = _Waiting()
    server = grpc.aio.server(options=server_options(receive_bytes_max=1024, keepalive_ms=1_000))
    mailbox_pb2_grpc.add_MailboxServicer_to_server(servicer, GuardedServer(server, mesh.verifier))  # type: ignore[arg-type]
    wire = Wire(LOOPBACK, server.add_insecure_port(f"{LOOPBACK}:0"))
    await server.start()
    async with wire.open(), asyncio.timeout(2 * LIMIT_S):
        channel = MeshChannel("fetch", f"{LOOPBACK}:{wire.port}", mesh.keys["dispatch"])
        call = mailbox_pb2_grpc.MailboxStub(channel.channel).WakeUpSession(metadata=channel.metadata())
        await call.write(mailbox_pb2.WakeUpSessionRequest())
        await servicer.began.wait()
        wire.cut()
        await servicer.ended.wait()
        call.cancel()
        await channel.aclose()
    await server.stop(None)
