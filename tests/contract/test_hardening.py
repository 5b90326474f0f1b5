"""What an attacker, a dead network and a slow reader try, and what they must not get."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest

from sealpush.v1 import publish_pb2, publish_pb2_grpc
from sealpushd.platform import db
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.db import Database
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.server import server_options
from sealpushd.platform.tokens import LEEWAY_S
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc
from tests.contract.harness import LIMIT_S, LOOPBACK, Mesh, Migrated, Peer

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Wire:
    """A network between two ends, which can be cut without either of them hearing of it."""

    def __init__(self, dial: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        self._dial = dial
        self._whole = asyncio.Event()
        self._whole.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

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
        far_reader, far_writer = await self._dial()
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
    monkeypatch.setattr(db, "SILENCE_TIMEOUT_S", 2)
    url = urlsplit((await migrated("fetch"))["fetch"])
    where = parse_qs(url.query)
    wire = Wire(lambda: asyncio.open_unix_connection(f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}"))
    async with wire.open(), asyncio.timeout(LIMIT_S):
        credentials = url.netloc.rpartition("@")[0]
        through = url._replace(netloc=f"{credentials}@{LOOPBACK}:{wire.port}", query="sslmode=disable")
        database = Database(through.geturl(), "fetch", 1)
        await database.open()
        await database.fetch("probe", "SELECT 1")
        wire.cut()
        with pytest.raises(StoreUnavailable):
            await database.fetch("probe", "SELECT 1")
        wire.mend()
        assert [tuple(row) for row in await database.fetch("probe", "SELECT 2")] == [(2,)]
        await database.aclose()


async def test_when_one_connection_fell_silent_the_others_are_not_waited_for_in_turn(
    migrated: Migrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "SILENCE_TIMEOUT_S", 1)
    url = urlsplit((await migrated("fetch"))["fetch"])
    where = parse_qs(url.query)
    wire = Wire(lambda: asyncio.open_unix_connection(f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}"))
    async with wire.open(), asyncio.timeout(LIMIT_S):
        credentials = url.netloc.rpartition("@")[0]
        through = url._replace(netloc=f"{credentials}@{LOOPBACK}:{wire.port}", query="sslmode=disable")
        database = Database(through.geturl(), "fetch", 3)
        await database.open()
        async with database.connection(), database.connection(), database.connection():
            pass
        wire.cut()
        monkeypatch.setattr(db, "CONNECT_TIMEOUT_S", 0.5)
        with pytest.raises(StoreUnavailable, match="went away in the middle"):
            await database.fetch("probe", "SELECT 1")
        # The next one does not try another dead connection, and who knows that the database is away says so.
        with pytest.raises(StoreUnavailable, match="the database does not answer"):
            await database.fetch("probe", "SELECT 1")
        wire.mend()
        monkeypatch.setattr(db, "CONNECT_TIMEOUT_S", LIMIT_S)
        assert [tuple(row) for row in await database.fetch("probe", "SELECT 2")] == [(2,)]
        await database.aclose()


async def test_what_a_frozen_process_locked_is_let_go_and_it_learns_that_nothing_was_committed(
    migrated: Migrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "IDLE_IN_TRANSACTION_S", 0.5)
    url = (await migrated("fetch"))["fetch"]
    frozen, other = Database(url, "fetch", 1), Database(url, "fetch", 1)
    await frozen.open()
    await other.open()
    await other.execute("probe", "INSERT INTO wake_up_sessions (session_id) VALUES ($1)", b"s" * 16)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreUnavailable):  # noqa: PT012 - the commit at the end of the block is what raises
            async with frozen.transaction() as connection:
                await connection.execute("UPDATE wake_up_sessions SET seen_at = 'epoch'")
                await other.execute("probe", "UPDATE wake_up_sessions SET seen_at = now()")
        (row,) = await frozen.fetch("probe", "SELECT seen_at > 'epoch' FROM wake_up_sessions")
    assert row[0]
    await frozen.aclose()
    await other.aclose()


class _Waiting(mailbox_pb2_grpc.MailboxServicer):
    """Holds a session until it ends."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def WakeUpSession(self, request_iterator: Any, context: Any) -> AsyncIterator[mailbox_pb2.WakeUpSessionResponse]:
        self.began.set()
        try:
            async for _ in request_iterator:
                yield mailbox_pb2.WakeUpSessionResponse()
        finally:
            self.ended.set()


async def test_the_session_of_a_dispatcher_whose_network_is_gone_ends(mesh: Mesh) -> None:
    servicer = _Waiting()  # type: ignore[abstract]  # nothing else is called
    options = server_options(receive_bytes_max=1024, keepalive_ms=1_000, streams_max=8)
    peer = Peer([(mailbox_pb2_grpc.add_MailboxServicer_to_server, servicer)], mesh.verifier, options=options).bind()
    wire = Wire(lambda: asyncio.open_connection(LOOPBACK, peer.port))
    async with peer, wire.open(), asyncio.timeout(2 * LIMIT_S):
        channel = MeshChannel("fetch", f"{LOOPBACK}:{wire.port}", mesh.keys["dispatch"])
        call = mailbox_pb2_grpc.MailboxStub(channel.channel).WakeUpSession(metadata=channel.metadata())
        await call.write(mailbox_pb2.WakeUpSessionRequest())
        await servicer.began.wait()
        wire.cut()
        await servicer.ended.wait()
        call.cancel()
        await channel.aclose()


class _Publishing(publish_pb2_grpc.PublishingServicer):
    """Streams that never end by themselves."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[publish_pb2.WatchStatusResponse]:
        try:
            while True:
                yield publish_pb2.WatchStatusResponse()
                await asyncio.sleep(0.01)
        finally:
            self.let_go.set()

    async def PublishStream(self, request_iterator: Any, context: Any) -> AsyncIterator[publish_pb2.PublishStreamResponse]:
        try:
            async for frame in request_iterator:
                yield publish_pb2.PublishStreamResponse(frame=frame.frame)
        finally:
            self.let_go.set()


async def _read_all(call: Any) -> int:
    """How many answers came before the end."""
    return len([answer async for answer in call])


@pytest.mark.parametrize("busy", [True, False])
async def test_a_senders_stream_ends_with_its_token(mesh: Mesh, *, busy: bool) -> None:
    claims = {"org": bytes(16).hex(), "apps": ["bank"], "scopes": ["publish", "status"], "networks": []}
    # One to two seconds are left of what clocks may differ by: a token's times are whole seconds.
    token, _ = mesh.keys["accounts"].sign("sender", bytes(16).hex(), 2 - LEEWAY_S, claims)
    servicer = _Publishing()  # type: ignore[abstract]  # nothing else is called
    metadata = (("authorization", f"Bearer {token}"),)
    async with (
        Peer([(publish_pb2_grpc.add_PublishingServicer_to_server, servicer)], mesh.verifier) as peer,
        grpc.aio.insecure_channel(peer.address) as channel,
        asyncio.timeout(LIMIT_S),
    ):
        stub = publish_pb2_grpc.PublishingStub(channel)
        if busy:
            call: Any = stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=metadata)
        else:
            call = stub.PublishStream(metadata=metadata)
            await call.write(publish_pb2.PublishStreamRequest(frame=1))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await _read_all(call)
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "expired" in (ended.value.details() or "")
        await servicer.let_go.wait()


class _Flood(publish_pb2_grpc.PublishingServicer):
    """Answers that are too large to go out before the client reads."""

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[publish_pb2.WatchStatusResponse]:
        status = publish_pb2.MessageStatus(message_id=bytes(1_000_000))
        while True:
            yield publish_pb2.WatchStatusResponse(statuses=[status])


async def test_a_stream_whose_token_ends_while_the_client_does_not_read_is_told_so(mesh: Mesh) -> None:
    """The service is in the middle of writing then: ended there, the call would have no status, and its client would wait for ever."""
    claims = {"org": bytes(16).hex(), "apps": ["bank"], "scopes": ["publish", "status"], "networks": []}
    token, ends_at = mesh.keys["accounts"].sign("sender", bytes(16).hex(), 2 - LEEWAY_S, claims)
    servicer = _Flood()  # type: ignore[abstract]  # nothing else is called
    async with (
        Peer([(publish_pb2_grpc.add_PublishingServicer_to_server, servicer)], mesh.verifier) as peer,
        grpc.aio.insecure_channel(peer.address) as channel,
        asyncio.timeout(LIMIT_S),
    ):
        stub = publish_pb2_grpc.PublishingStub(channel)
        call: Any = stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=(("authorization", f"Bearer {token}"),))
        answers = aiter(call)
        await anext(answers)
        # The passing of time is what is tested: until the token, and what clocks may differ by, is over for certain.
        await asyncio.sleep(ends_at + LEEWAY_S + 0.2 - time.time())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await _read_all(answers)
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
