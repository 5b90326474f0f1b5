"""What a stranger's connection costs: nothing is kept for a call that is refused, and what is kept for others has an end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.stranger import Stranger
from sealpush import transport
from sealpush.ids import DeviceId, SubscriberId
from sealpush.v1 import (
    accounts_pb2,
    accounts_pb2_grpc,
    keys_pb2_grpc,
    messages_pb2,
    messages_pb2_grpc,
    publish_pb2_grpc,
    registration_pb2_grpc,
)
from sealpushd.platform.access import ACCESS, Anyone
from sealpushd.platform.arrivals import Arrivals
from sealpushd.platform.server import PUBLIC_IDLE_MS, AddServicer, Health, public_options
from sealpushd.platform.tls import LocalAuthority, server_credentials
from sealpushd.platform.tokens import DeviceCaller
from tests.contract.harness import LIMIT_S, LOOPBACK, Mesh, Peer, in_flight

pytestmark = pytest.mark.asyncio(loop_scope="session")

OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, UNAUTHENTICATED = "0", "3", "4", "5", "8", "12", "16"
SIGN_IN = "/sealpush.v1.Accounts/SignIn"
HEALTH = "/grpc.health.v1.Health/Check"
NEED_A_TOKEN = [method for method, rule in ACCESS.items() if method.startswith("/sealpush.v1.") and not isinstance(rule, Anyone)]
NEED_NONE = {
    "accounts": ["SignIn", "GetSenderProfile", "GetRevocations"],
    "registration": ["StartRegistration", "ConfirmRegistration", "GetChallenge", "Authenticate"],
}


class _Accounts(accounts_pb2_grpc.AccountsServicer):
    async def SignIn(self, request: Any, context: Any) -> accounts_pb2.SignInResponse:
        return accounts_pb2.SignInResponse(access_token=request.login)


class _Messages(messages_pb2_grpc.MessagesServicer):
    """Streams that say hello, and then a word for each request."""

    async def Stream(self, request_iterator: Any, context: Any) -> AsyncIterator[messages_pb2.StreamResponse]:
        yield messages_pb2.StreamResponse(backlog_done=True)
        async for _ in request_iterator:
            yield messages_pb2.StreamResponse()


class Listener:
    """All public methods at one TLS listener that has the options of a service's, and bounds of a test's own."""

    def __init__(self, mesh: Mesh, authority: LocalAuthority, port: int) -> None:
        self._mesh = mesh
        self._authority = authority
        self.port = port

    @property
    def ca(self) -> str:
        return str(self._authority.certificate_path)

    @property
    def device(self) -> tuple[tuple[str, str], ...]:
        """A device's metadata."""
        token, _ = self._mesh.keys["registration"].device_token(
            DeviceCaller(DeviceId(bytes(16)), SubscriberId(bytes(16)), "app", bytes(32))
        )
        return (("authorization", f"Bearer {token}"),)

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own: of alike channels gRPC makes one."""
        credentials = grpc.ssl_channel_credentials(self._authority.certificate_path.read_bytes())
        return grpc.aio.secure_channel(f"{LOOPBACK}:{self.port}", credentials, options=[("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def listening(
    mesh: Mesh, folder: Path, service: str = "accounts", *, arrivals: Arrivals | None = None, health: Health | None = None, **bounds: int
) -> AsyncIterator[Listener]:
    authority = LocalAuthority(folder)
    # Of the generated servicers only what comes before the handlers is tested.
    generated: list[tuple[Any, Any]] = [
        (accounts_pb2_grpc.add_AccountsServicer_to_server, _Accounts),
        (registration_pb2_grpc.add_RegistrationServicer_to_server, registration_pb2_grpc.RegistrationServicer),
        (keys_pb2_grpc.add_KeysServicer_to_server, keys_pb2_grpc.KeysServicer),
        (publish_pb2_grpc.add_PublishingServicer_to_server, publish_pb2_grpc.PublishingServicer),
        (messages_pb2_grpc.add_MessagesServicer_to_server, _Messages),
    ]
    servicers: list[AddServicer] = [(add, kind()) for add, kind in generated]
    servicers.append((Health.add_to, health or Health()))
    options = public_options(service, **{"connections_max": 1000, **bounds})
    credentials = server_credentials(*authority.issue("test"))
    async with (
        Peer(servicers, mesh.verifier, credentials=credentials, options=options, arrivals=arrivals) as peer,
        asyncio.timeout(LIMIT_S),
    ):
        yield Listener(mesh, authority, peer.port)


async def until_nothing_is_in_flight() -> None:
    """Raises TimeoutError where a call lasts."""
    async with asyncio.timeout(LIMIT_S):
        while in_flight():  # noqa: ASYNC110 - a gauge tells nobody that it has changed
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", NEED_A_TOKEN)
async def test_a_call_without_a_token_is_refused_before_its_request_is_sent(mesh: Mesh, tmp_path: Path, method: str) -> None:
    async with listening(mesh, tmp_path) as listener, Stranger.at(listener.port, listener.ca) as stranger:
        stream = await stranger.call(method)
        await stranger.answers[stream].ended.wait()
        assert stranger.answers[stream].status == UNAUTHENTICATED


@pytest.mark.parametrize("method", [SIGN_IN, HEALTH, "/sealpush.v1.Messages/Acknowledge", "/sealpush.v1.Messages/Drain"])
async def test_a_request_that_does_not_arrive_ends_its_call(mesh: Mesh, tmp_path: Path, method: str) -> None:
    async with (
        listening(mesh, tmp_path, arrivals=Arrivals(seconds_max=0.2)) as listener,
        Stranger.at(listener.port, listener.ca) as stranger,
    ):
        for sent in (None, 100):
            stream = await stranger.call(method, listener.device)
            if sent is not None:
                await stranger.send(stream, says=1000, sends=sent)
            await stranger.answers[stream].ended.wait()
            assert stranger.answers[stream].status == DEADLINE_EXCEEDED
            assert "did not arrive" in stranger.answers[stream].headers["grpc-message"]
    await until_nothing_is_in_flight()


@pytest.mark.parametrize("method", [SIGN_IN, "/sealpush.v1.Messages/Drain"])
async def test_a_call_that_ends_or_is_cancelled_without_a_request_is_no_error_of_the_service(
    mesh: Mesh, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(mesh, tmp_path) as listener, Stranger.at(listener.port, listener.ca) as stranger:
        ended = await stranger.call(method, listener.device)
        await stranger.end(ended)
        await stranger.answers[ended].ended.wait()
        assert stranger.answers[ended].status == INVALID_ARGUMENT
        for _ in range(20):
            await stranger.reset(await stranger.call(method, listener.device))
        half = await stranger.call(method, listener.device)
        await stranger.send(half, says=1000, sends=100)
    await until_nothing_is_in_flight()
    assert not caplog.records


@pytest.mark.parametrize(("service", "name"), [(service, name) for service, names in NEED_NONE.items() for name in names])
async def test_a_request_that_is_too_long_for_a_service_is_refused_by_the_length_that_it_says(
    mesh: Mesh, tmp_path: Path, service: str, name: str
) -> None:
    async with listening(mesh, tmp_path, service) as listener, Stranger.at(listener.port, listener.ca) as stranger:
        stream = await stranger.call(f"/sealpush.v1.{service.title()}/{name}")
        await stranger.send(stream, says=100_000, sends=1)
        await stranger.answers[stream].ended.wait()
        assert stranger.answers[stream].status == RESOURCE_EXHAUSTED


async def test_the_methods_that_need_no_token_are_those_of_services_whose_requests_are_short() -> None:
    anyone = {method for method, rule in ACCESS.items() if isinstance(rule, Anyone)}
    assert anyone == {f"/sealpush.v1.{service.title()}/{name}" for service, names in NEED_NONE.items() for name in names}


async def test_of_too_many_requests_on_their_way_the_oldest_goes(mesh: Mesh, tmp_path: Path) -> None:
    async with (
        listening(mesh, tmp_path, arrivals=Arrivals(waiting_max=2)) as listener,
        Stranger.at(listener.port, listener.ca) as stranger,
    ):
        first, *others = [await stranger.call(SIGN_IN) for _ in range(3)]
        await stranger.answers[first].ended.wait()
        assert stranger.answers[first].status == RESOURCE_EXHAUSTED
        for stream in others:
            await stranger.send(stream, says=0, sends=0)
            await stranger.end(stream)
            await stranger.answers[stream].ended.wait()
            assert stranger.answers[stream].status == OK


async def test_an_idle_connection_is_ended_and_one_with_a_stream_is_not(mesh: Mesh, tmp_path: Path) -> None:
    async with listening(mesh, tmp_path, idle_ms=100) as listener, listener.channel() as channel:
        stub = messages_pb2_grpc.MessagesStub(channel)
        call: Any = stub.Stream(metadata=listener.device)
        assert (await call.read()).backlog_done
        for _ in range(3):
            async with Stranger.at(listener.port, listener.ca) as idle:
                await idle.closed.wait()
        await call.write(messages_pb2.StreamRequest())
        assert await call.read() == messages_pb2.StreamResponse()
        call.cancel()


async def test_a_caller_whose_idle_connection_was_ended_calls_again_as_if_nothing_had_been(mesh: Mesh, tmp_path: Path) -> None:
    async with listening(mesh, tmp_path, idle_ms=100) as listener, listener.channel() as channel:
        stub = accounts_pb2_grpc.AccountsStub(channel)
        for _ in range(3):
            assert (await stub.SignIn(accounts_pb2.SignInRequest(login="bank"))).access_token == "bank"
            while (state := channel.get_state()) is not grpc.ChannelConnectivity.IDLE:
                await channel.wait_for_state_change(state)


async def test_the_sdk_ends_its_idle_connection_before_the_service_does() -> None:
    """So no call of it meets the end, and gRPC tells an app's standard error nothing of a connection that the other side has ended."""
    options: dict[str, Any] = dict(transport._OPTIONS)
    assert options["grpc.client_idle_timeout_ms"] < PUBLIC_IDLE_MS


async def test_a_connection_that_does_not_greet_is_ended(mesh: Mesh, tmp_path: Path) -> None:
    async with listening(mesh, tmp_path, handshake_timeout_ms=100) as listener:
        reader, writer = await asyncio.open_connection(LOOPBACK, listener.port)
        assert await reader.read() == b""
        writer.close()


async def test_connections_beyond_the_bound_are_refused_until_one_ends(mesh: Mesh, tmp_path: Path) -> None:
    async with listening(mesh, tmp_path, connections_max=2) as listener:
        first, second = [await Stranger.connect(listener.port, listener.ca) for _ in range(2)]
        with pytest.raises(OSError):  # noqa: PT011 - how the system says it is its own affair
            await Stranger.connect(listener.port, listener.ca)
        first.close()
        while True:
            try:
                (await Stranger.connect(listener.port, listener.ca)).close()
                break
            except OSError:
                await asyncio.sleep(0.01)
        second.close()


async def test_health_is_anybodys_question_and_nobodys_stream(mesh: Mesh, tmp_path: Path) -> None:
    health = Health()
    async with (
        listening(mesh, tmp_path, health=health) as listener,
        listener.channel() as channel,
        Stranger.at(listener.port, listener.ca) as stranger,
    ):
        check: Any = channel.unary_unary(HEALTH)
        assert await check(b"") == b"\x08\x01"  # SERVING
        health.serving = False
        assert await check(b"") == b"\x08\x02"  # NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check(b"\x0a\x01x")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        stream = await stranger.call("/grpc.health.v1.Health/Watch")
        await stranger.answers[stream].ended.wait()
        assert stranger.answers[stream].status == UNIMPLEMENTED


async def test_thousands_of_streams_that_are_opened_at_once_all_open(mesh: Mesh, tmp_path: Path) -> None:
    """What a restart of fetch brings about."""
    async with listening(mesh, tmp_path, "fetch") as listener, AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(listener.channel()) for _ in range(10)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        metadata = listener.device

        async def opened(number: int) -> Any:
            call: Any = messages_pb2_grpc.MessagesStub(channels[number % len(channels)]).Stream(metadata=metadata)
            assert (await call.read()).backlog_done
            return call

        calls = await asyncio.gather(*(opened(number) for number in range(3000)))
        for call in calls:
            call.cancel()


async def test_a_stranger_that_speaks_no_tls_writes_nothing_into_the_log(tmp_path: Path) -> None:
    script = f"""
import asyncio
from pathlib import Path
from sealpushd.platform import logging  # before grpc, as in every command
import grpc
from sealpushd.platform.tls import LocalAuthority, server_credentials

async def main():
    logging.configure("accounts", "info")
    server = grpc.aio.server()
    port = server.add_secure_port("{LOOPBACK}:0", server_credentials(*LocalAuthority(Path({str(tmp_path)!r})).issue("test")))
    await server.start()
    for said in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n", bytes(100)):
        reader, writer = await asyncio.open_connection("{LOOPBACK}", port)
        writer.write(said)
        writer.write_eof()
        await reader.read()
        writer.close()
    await server.stop(None)

asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout + done.stderr == ""
