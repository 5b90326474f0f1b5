"""What surrounds every call: who may come in, how long it may take, and what a caller reads when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from structlog.testing import capture_logs

from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpush.transport import call_failed
from sealpush.v1 import keys_pb2, keys_pb2_grpc, messages_pb2, messages_pb2_grpc, publish_pb2, publish_pb2_grpc
from sealpushd.platform import admission, clients, rpc
from sealpushd.platform.admission import DEVICE_IN_FLIGHT_MAX, LIMIT_MIN, AdaptiveLimit, Door, End, party_of
from sealpushd.platform.clients import BatchedCall, MeshChannel
from sealpushd.platform.errors import DETAILS_KEY, Aborted, DeadlineExceeded, NotFound, ServiceError, Unavailable
from sealpushd.platform.logging import request_ids
from sealpushd.platform.rpc import DEADLINE_S_MAX, REQUEST_ID_KEY, GuardedServer, address_of
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller, ServiceKey, TokenVerifier
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30
ACCOUNTS, REGISTRATION, PUBLISHING, FETCH = (
    ServiceKey(name, Ed25519PrivateKey.generate()) for name in ("accounts", "registration", "publishing", "fetch")
)
VERIFIER = TokenVerifier({each.name: [each.public_key] for each in (ACCOUNTS, REGISTRATION, PUBLISHING, FETCH)})
SENDER = SenderCaller(SenderId(b"s" * 16), b"o" * 16, ("app",), frozenset({"publish", "status"}), ())
DEVICE = DeviceCaller(DeviceId(b"d" * 16), SubscriberId(b"u" * 16), "app", b"k" * 32)
SECRET = "hunter2"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


AS_SENDER = bearer(ACCOUNTS.sender_token(SENDER)[0])


class Publishing(publish_pb2_grpc.PublishingServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.act: Callable[[], Awaitable[None]] = self.nothing
        self.callers: list[Caller] = []
        self.ids: list[tuple[str, ...]] = []
        self.remaining_s: float | None = None
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def nothing(self) -> None:
        pass

    async def hang(self) -> None:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def Publish(self, request: publish_pb2.PublishRequest, context: Any) -> publish_pb2.PublishResponse:
        self.callers.append(rpc.require_sender())
        self.ids.append(request_ids.get())
        task = asyncio.current_task()
        assert task is not None
        await self.act()
        return publish_pb2.PublishResponse()

    async def WatchStatus(self, request: publish_pb2.WatchStatusRequest, context: Any) -> AsyncIterator[publish_pb2.WatchStatusResponse]:
        yield publish_pb2.WatchStatusResponse()
        await self.act()

    async def PublishStream(
        self, request_iterator: AsyncIterator[publish_pb2.PublishStreamRequest], context: Any
    ) -> AsyncIterator[publish_pb2.PublishStreamResponse]:
        try:
            async for request in request_iterator:
                async with admission.turn():
                    await self.act()
                yield publish_pb2.PublishStreamResponse(frame=request.frame)
        finally:
            self.cancelled.set()


class Mailbox(mailbox_pb2_grpc.MailboxServicer):
    def __init__(self) -> None:
        self.ids: list[tuple[str, ...]] = []
        self.sizes: list[int] = []
        # How many calls are not answered at all.
        self.silent = 0

    async def LookupAccepted(self, request: mailbox_pb2.LookupAcceptedRequest, context: Any) -> mailbox_pb2.LookupAcceptedResponse:
        self.ids.append(request_ids.get())
        self.sizes.append(len(request.keys))
        if self.silent:
            self.silent -= 1
            await asyncio.Event().wait()
        return mailbox_pb2.LookupAcceptedResponse(results=[mailbox_pb2.AcceptedResult() for _ in request.keys])


class Keys(keys_pb2_grpc.KeysServicer):
    """Work that its caller's leaving does not stop, as a statement or a hash that runs already."""

    def __init__(self) -> None:
        self.running = 0
        self.begun = asyncio.Semaphore(0)
        self.finish = asyncio.Event()

    async def GetPrekeyState(self, request: keys_pb2.GetPrekeyStateRequest, context: Any) -> keys_pb2.GetPrekeyStateResponse:
        self.running += 1
        self.begun.release()
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            await self.finish.wait()
            raise
        finally:
            self.running -= 1
        return keys_pb2.GetPrekeyStateResponse()


class World:
    def __init__(self) -> None:
        # They answer only what is asked here.
        self.publishing, self.mailbox, self.keys = Publishing(), Mailbox(), Keys()  # type: ignore[abstract]  # nothing else is called
        self.server = grpc.aio.server()
        # The smallest there is: a few calls fill it.
        self.door = Door(limit=AdaptiveLimit(LIMIT_MIN))
        guarded: Any = GuardedServer(self.server, VERIFIER, self.door)
        keys_pb2_grpc.add_KeysServicer_to_server(self.keys, guarded)
        publish_pb2_grpc.add_PublishingServicer_to_server(self.publishing, guarded)
        mailbox_pb2_grpc.add_MailboxServicer_to_server(self.mailbox, guarded)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub: Any = publish_pb2_grpc.PublishingStub(self.channel)

    async def publish(self, metadata: Any = AS_SENDER, timeout: float = LIMIT_S) -> Any:
        return await self.stub.Publish(publish_pb2.PublishRequest(), metadata=metadata, timeout=timeout)

    async def refused(self, metadata: Any = AS_SENDER, timeout: float = LIMIT_S) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.publish(metadata, timeout)
        return caught.value


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.server.start()
    yield made
    await made.channel.close()
    await made.server.stop(None)


@pytest.mark.parametrize(
    ("present", "code"),
    [
        (lambda: (), grpc.StatusCode.UNAUTHENTICATED),
        (lambda: (("authorization", ""),), grpc.StatusCode.UNAUTHENTICATED),
        (lambda: (("authorization", "Basic dTpw"),), grpc.StatusCode.UNAUTHENTICATED),
        (lambda: bearer("nonsense"), grpc.StatusCode.UNAUTHENTICATED),
        # These tokens end sooner than a run of all tests may take: they are made here and not while tests are collected.
        (lambda: bearer(REGISTRATION.device_token(DEVICE)[0]), grpc.StatusCode.PERMISSION_DENIED),
        (lambda: bearer(PUBLISHING.mesh_token()), grpc.StatusCode.PERMISSION_DENIED),
    ],
)
async def test_without_the_right_token_a_call_does_not_reach_its_handler(
    world: World, present: Callable[[], tuple[tuple[str, str], ...]], code: grpc.StatusCode
) -> None:
    metadata = present()
    error = await world.refused(metadata)
    assert error.code() is code
    assert world.publishing.callers == []
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        async for _ in world.stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=metadata, timeout=LIMIT_S):
            pass
    assert streamed.value.code() is code


async def test_the_handler_knows_the_caller(world: World) -> None:
    await world.publish()
    await world.publish((("authorization", AS_SENDER[0][1].replace("Bearer", "bearer")),))
    assert world.publishing.callers == [SENDER, SENDER]


async def test_a_method_without_a_rule_cannot_be_served() -> None:
    class Handler:
        request_streaming = response_streaming = False

    with pytest.raises(RuntimeError, match="no rule"):
        GuardedServer(grpc.aio.server(), VERIFIER).add_registered_method_handlers("sealpush.v1.New", {"Call": Handler()})


async def test_a_known_error_reaches_the_caller_with_its_details(world: World) -> None:
    async def fail() -> None:
        raise NotFound("there is none", field="message_id")

    world.publishing.act = fail
    error = await world.refused()
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "there is none")
    assert DETAILS_KEY in dict(error.trailing_metadata() or ())


async def test_an_unknown_error_hides_its_text(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise KeyError(SECRET)

    world.publishing.act = fail
    error = await world.refused()
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in f"{error.details()}{error.debug_error_string()}{error.trailing_metadata()}"
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        async for _ in world.stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=AS_SENDER, timeout=LIMIT_S):
            pass
    assert streamed.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(streamed.value.details())
    capsys.readouterr()


async def test_bytes_that_are_no_request_are_the_callers_fault(world: World) -> None:
    # Field 1 is a string, and 0xff is no UTF-8; then a tag that ends too early.
    for raw in (b"\x0a\x01\xff", b"\x0a\x05a"):
        call: Any = world.channel.unary_unary("/sealpush.v1.Publishing/Publish")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(raw, metadata=AS_SENDER, timeout=LIMIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stream: Any = world.channel.stream_stream("/sealpush.v1.Publishing/PublishStream")(metadata=AS_SENDER, timeout=LIMIT_S)
    await stream.write(b"\x12\x02\x0a\x05")
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_ends_with_its_callers_deadline(world: World) -> None:
    await world.publish()  # so that the time is not spent on connecting
    world.publishing.act = world.publishing.hang
    error = await world.refused(timeout=0.5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(LIMIT_S):
        await world.publishing.cancelled.wait()


async def test_no_call_gets_more_time_than_the_cap(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEADLINE_S_MAX == 10
    monkeypatch.setattr(rpc, "DEADLINE_S_MAX", 0.1)
    world.publishing.act = world.publishing.hang
    error = await world.refused(timeout=LIMIT_S)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "same request id" in str(error.details())


async def test_what_gathers_behind_a_batch_that_a_silent_peer_holds_has_its_turn_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clients.BATCH_DEADLINE_S <= DEADLINE_S_MAX / 2
    monkeypatch.setattr(clients, "BATCH_DEADLINE_S", 0.2)
    channel = MeshChannel("fetch", world.address, PUBLISHING)
    batched = BatchedCall[mailbox_pb2.AcceptedKey, mailbox_pb2.AcceptedResult](
        channel,
        mailbox_pb2_grpc.MailboxStub(channel.channel).LookupAccepted,
        lambda items: mailbox_pb2.LookupAcceptedRequest(keys=items),
        lambda answer: answer.results,
    )
    world.mailbox.silent = 1
    async with asyncio.timeout(LIMIT_S):
        held = asyncio.ensure_future(batched.submit(mailbox_pb2.AcceptedKey()))
        while not world.mailbox.sizes:  # noqa: ASYNC110 - the peer is in this very process
            await asyncio.sleep(0)
        behind = asyncio.ensure_future(batched.submit(mailbox_pb2.AcceptedKey()))
        with pytest.raises(ServiceError):
            await held
        assert isinstance(await behind, mailbox_pb2.AcceptedResult)
    await batched.aclose()
    await channel.aclose()


async def test_a_caller_that_goes_away_stops_its_handler(world: World) -> None:
    world.publishing.act = world.publishing.hang
    call = world.stub.Publish(publish_pb2.PublishRequest(), metadata=AS_SENDER, timeout=LIMIT_S)
    await world.publishing.entered.wait()
    call.cancel()
    async with asyncio.timeout(LIMIT_S):
        await world.publishing.cancelled.wait()


async def test_a_stream_whose_caller_goes_away_is_closed_at_once(world: World) -> None:
    call = world.stub.PublishStream(metadata=AS_SENDER)
    await call.write(publish_pb2.PublishStreamRequest(frame=7))
    assert (await call.read()).frame == 7
    call.cancel()
    async with asyncio.timeout(LIMIT_S):
        await world.publishing.cancelled.wait()


async def test_an_error_ends_a_stream_after_what_was_sent(world: World) -> None:
    async def fail() -> None:
        raise Aborted("another took over")

    world.publishing.act = fail
    call = world.stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=AS_SENDER, timeout=LIMIT_S)
    assert await call.read() == publish_pb2.WatchStatusResponse()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "another took over")


@pytest.mark.parametrize(
    ("given", "kept"), [("a-request", ("a-request",)), ("a,b", ("a", "b")), ("", None), ("has space", None), ("x" * 601, None)]
)
async def test_a_request_id_is_kept_and_a_strange_one_is_replaced(world: World, given: str, kept: tuple[str, ...] | None) -> None:
    await world.publish((*AS_SENDER, (REQUEST_ID_KEY, given)))
    (ids,) = world.publishing.ids
    if kept is None:
        assert len(ids) == 1
        assert ids[0] != given
    else:
        assert ids == kept


async def test_request_ids_pass_on_to_the_next_service_also_through_a_batch(world: World) -> None:
    channel = MeshChannel("fetch", world.address, PUBLISHING)
    mailbox = mailbox_pb2_grpc.MailboxStub(channel.channel)
    batched = BatchedCall[mailbox_pb2.AcceptedKey, mailbox_pb2.AcceptedResult](
        channel,
        mailbox.LookupAccepted,
        lambda items: mailbox_pb2.LookupAcceptedRequest(keys=items),
        lambda answer: answer.results,
        in_flight_max=1,
    )

    async def call(name: str) -> None:
        request_ids.set((name,))
        await batched.submit(mailbox_pb2.AcceptedKey())

    await asyncio.gather(*(asyncio.create_task(call(f"r{n}")) for n in range(4)))
    assert sum(world.mailbox.sizes) == 4
    assert [one for ids in world.mailbox.ids for one in ids] == ["r0", "r1", "r2", "r3"]
    await batched.aclose()
    await channel.aclose()


async def test_a_service_that_may_not_make_a_call_reads_unavailable_and_the_outside_caller_no_more(world: World) -> None:
    channel = MeshChannel("fetch", world.address, FETCH)
    mailbox = mailbox_pb2_grpc.MailboxStub(channel.channel)
    with pytest.raises(Unavailable, match="fetch"):
        await channel.call(mailbox.LookupAccepted, mailbox_pb2.LookupAcceptedRequest())
    await channel.aclose()


async def test_a_peer_that_is_down_is_unavailable_at_once() -> None:
    channel = MeshChannel("fetch", "127.0.0.1:9", PUBLISHING)
    with pytest.raises(Unavailable):
        await channel.call(messages_pb2_grpc.MessagesStub(channel.channel).Fetch, messages_pb2.FetchRequest())
    await channel.aclose()


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:[::1]:5000", "::1"),
        ("unix:/run/sealpush.sock", ""),
        ("unix:", ""),
        ("", ""),
    ],
)
def test_the_callers_address_is_taken_out_of_grpcs_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address


class _Gone:
    """The context of a call whose caller went in the moment in which it failed. gRPC shows that once in a thousand deadlines."""

    def invocation_metadata(self) -> Any:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def abort(self, code: grpc.StatusCode, *_: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


class _GoneWhileRead(_Gone):
    """Of a caller with a good token, who went before its request was read."""

    def invocation_metadata(self) -> Any:
        return AS_SENDER

    async def read(self) -> Any:
        raise grpc.aio.InternalError('Failed "execute_batch"')


@pytest.mark.parametrize("context", [_Gone(), _GoneWhileRead()], ids=["refused", "while its request is read"])
@pytest.mark.parametrize("method", ["Publish", "WatchStatus"])
async def test_a_caller_that_has_gone_is_a_cancelled_call_and_neither_a_bug_nor_a_traceback(method: str, context: _Gone) -> None:
    """gRPC prints a stack for whatever else comes out of a handler."""
    handlers: list[Any] = []

    class Server:
        def add_generic_rpc_handlers(self, given: Any) -> None:
            handlers.extend(given)

    publishing: Any = Publishing()  # type: ignore[abstract]  # nothing else is called
    guarded: Any = GuardedServer(Server(), VERIFIER)  # type: ignore[arg-type]
    publish_pb2_grpc.add_PublishingServicer_to_server(publishing, guarded)
    handler = handlers[0].service(SimpleNamespace(method=f"/sealpush.v1.Publishing/{method}", invocation_metadata=()))
    answer = handler.stream_unary(None, context) if method == "Publish" else anext(handler.stream_stream(None, context))
    with capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        await answer
    assert not logs


def full(world: World, caller: Caller | None) -> list[admission.Place]:
    """Take all that this caller gets."""
    places = []
    with contextlib.suppress(admission.Refused):
        while True:
            places.append(world.door.enter(party_of(caller, "192.0.2.1")))
    return places


async def test_what_is_too_much_is_refused_at_once_says_when_to_come_back_and_is_let_in_then(world: World) -> None:
    world.publishing.act = world.publishing.hang
    calls = [asyncio.ensure_future(world.publish()) for _ in range(3 * LIMIT_MIN)]
    # The others are answered while what was let in still hangs: nobody waits for a time-out to hear of it.
    refused = []
    for done in asyncio.as_completed(calls):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await done
        refused.append(caught.value)
        if len(refused) + len(world.publishing.callers) == len(calls):
            break
    assert 0 < len(world.publishing.callers) <= LIMIT_MIN
    for error in refused:
        failure = call_failed(error)
        assert (failure.code, failure.server_reason, failure.retryable) == ("RESOURCE_EXHAUSTED", "OVERLOADED", True)
        assert failure.retry_after_s is not None
        assert 1 <= failure.retry_after_s < 2
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    world.publishing.act = world.publishing.nothing
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await world.publish()
                break


async def test_a_refused_call_is_not_parsed_nor_its_token_looked_at(world: World) -> None:
    full(world, ServiceCaller("fetch"))
    call: Any = world.channel.unary_unary("/sealpush.v1.Publishing/Publish")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\x0a\x05a", metadata=bearer("nonsense"), timeout=LIMIT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_phone_that_resets_its_calls_in_a_loop_neither_piles_up_work_nor_keeps_a_bank_out(world: World) -> None:
    keys: Any = keys_pb2_grpc.KeysStub(world.channel)
    metadata = bearer(REGISTRATION.device_token(DEVICE)[0])
    refused = 0
    for _ in range(3 * DEVICE_IN_FLIGHT_MAX):
        call = keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=metadata, timeout=LIMIT_S)
        begun = asyncio.create_task(world.keys.begun.acquire())
        answered = asyncio.ensure_future(call.code())
        done, _ = await asyncio.wait((begun, answered), return_when=asyncio.FIRST_COMPLETED)
        if answered in done:
            assert await answered is grpc.StatusCode.RESOURCE_EXHAUSTED
            refused += 1
        call.cancel()
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        await world.publish()
    assert 0 < world.keys.running <= DEVICE_IN_FLIGHT_MAX
    assert refused >= 2 * DEVICE_IN_FLIGHT_MAX
    world.keys.finish.set()


async def test_a_stream_waits_for_room_for_its_work_and_takes_none_while_it_only_waits(world: World) -> None:
    streams = [world.stub.PublishStream(metadata=AS_SENDER) for _ in range(2 * LIMIT_MIN)]
    for stream in streams:
        await stream.write(publish_pb2.PublishStreamRequest(frame=7))
        assert (await stream.read()).frame == 7
    # All are open, and nothing is in flight.
    places = full(world, SENDER)
    assert len(places) > LIMIT_MIN / 2
    await streams[0].write(publish_pb2.PublishStreamRequest(frame=8))
    answer = asyncio.ensure_future(streams[0].read())
    await world.refused()
    assert not answer.done()
    for place in places:
        place.leave(End.DONE)
    assert (await answer).frame == 8
    for stream in streams:
        stream.cancel()


async def test_a_stream_is_not_opened_where_there_is_no_room(world: World) -> None:
    full(world, SENDER)
    stream = world.stub.WatchStatus(publish_pb2.WatchStatusRequest(), metadata=AS_SENDER, timeout=LIMIT_S)
    assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_service_that_has_too_much_to_do_says_so_to_the_outside_caller(world: World) -> None:
    behind = World()
    await behind.server.start()
    full(behind, ServiceCaller("publishing"))
    channel = MeshChannel("fetch", behind.address, PUBLISHING)
    mailbox = mailbox_pb2_grpc.MailboxStub(channel.channel)

    async def ask() -> None:
        await channel.call(mailbox.LookupAccepted, mailbox_pb2.LookupAcceptedRequest())

    world.publishing.act = ask
    failure = call_failed(await world.refused())
    assert (failure.code, failure.server_reason, failure.retryable) == ("RESOURCE_EXHAUSTED", "OVERLOADED", True)
    assert failure.retry_after_s is not None
    assert failure.retry_after_s >= 1
    assert behind.mailbox.sizes == []
    await channel.aclose()
    await behind.channel.close()
    await behind.server.stop(None)


async def test_a_call_to_another_service_ends_with_the_deadline_of_whom_it_is_for(world: World) -> None:
    channel = MeshChannel("fetch", world.address, PUBLISHING)
    mailbox = mailbox_pb2_grpc.MailboxStub(channel.channel)
    admission.working(None, time.monotonic())
    with pytest.raises(DeadlineExceeded):
        await channel.call(mailbox.LookupAccepted, mailbox_pb2.LookupAcceptedRequest())
    assert world.mailbox.sizes == []
    await channel.aclose()
