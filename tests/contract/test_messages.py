"""Messages: what a device gets, in which order, and what becomes of its acknowledgements."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sealpush.ids import DeviceId, SubscriberId, uuid7
from sealpush.keys import IdentityKey
from sealpush.proofs import NO_DIGEST, AckOutcome, acknowledgement_proof, read_proof, sign_proof
from sealpush.v1 import common_pb2, messages_pb2, messages_pb2_grpc
from sealpushd.engines import Engines
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.mailbox import Mailbox
from sealpushd.fetch.queues import Queues
from sealpushd.fetch.rules import TAKE_BYTES_MAX, NewMessage
from sealpushd.fetch.service import MailboxServicer, MessagesServicer
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.streams import UNACKNOWLEDGED_MAX, StreamHub
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.server import Build, Runtime, ServiceApp
from sealpushd.platform.tokens import DeviceCaller
from sealpushd.platform.valkey import Valkey
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Served, Services, refusal, running_services
from tests.contract.mailboxes import an_id, delivery, digest, message, proto

pytestmark = pytest.mark.asyncio(loop_scope="session")

HEAD, STANZA = b"h" * 126, b"s" * 139


@dataclass
class Phone:
    """A device that signs."""

    mesh: Mesh
    device_id: DeviceId = field(default_factory=lambda: DeviceId(uuid7()))
    identity: IdentityKey = field(default_factory=IdentityKey.generate)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        caller = DeviceCaller(self.device_id, SubscriberId(an_id()), "app", self.identity.public_key)
        return (("authorization", f"Bearer {self.mesh.keys['registration'].device_token(caller)[0]}"),)

    def ack(
        self, of: NewMessage, outcome: AckOutcome = AckOutcome.DELIVERED, reason: int = 0, *, envelope_digest: bytes | None = None
    ) -> messages_pb2.Acknowledgement:
        at_ms = 1_700_000_000_000
        named = digest(of) if envelope_digest is None else envelope_digest
        if outcome is AckOutcome.READ:
            proof = read_proof(of.message_id, of.content_id, named, self.device_id, at_ms)
        else:
            proof = acknowledgement_proof(of.message_id, of.content_id, named, self.device_id, outcome, reason, at_ms)
        return messages_pb2.Acknowledgement(
            message_id=of.message_id,
            content_id=of.content_id,
            envelope_digest=named,
            outcome=messages_pb2.AckOutcome.ValueType(outcome),
            reason_code=common_pb2.ReasonCode.ValueType(reason),
            at_ms=at_ms,
            signature=sign_proof(self.identity, proof),
        )

    def message(self, tail: bytes = b"t" * 400, **changes: Any) -> NewMessage:
        return message(delivery(self.device_id, stanza=STANZA), head=HEAD, tail=tail, **changes)


@dataclass
class World:
    served: Served
    mailbox: Any
    mesh: Mesh
    # Says, as registration does, that installations have ended.
    close_devices: Any

    @property
    def messages(self) -> Any:
        return messages_pb2_grpc.MessagesStub(self.served.public)

    def phone(self) -> Phone:
        return Phone(self.mesh)

    async def store(self, *made: NewMessage) -> None:
        for start in range(0, len(made), 25):
            await self.mailbox(mailbox_pb2.StoreRequest(messages=[proto(each) for each in made[start : start + 25]]))

    async def acknowledge(self, phone: Phone, *acks: messages_pb2.Acknowledgement) -> list[messages_pb2.AckResult]:
        request = messages_pb2.AcknowledgeRequest(acknowledgements=acks)
        return list((await self.messages.Acknowledge(request, metadata=phone.metadata)).results)

    async def drain(self, phone: Phone, size: int = 0) -> list[list[messages_pb2.Delivery]]:
        pages, token = [], b""
        while True:
            request = messages_pb2.DrainRequest(page_size=size, page_token=token)
            answer = await self.messages.Drain(request, metadata=phone.metadata)
            pages.append(list(answer.deliveries))
            token = answer.next_page_token
            if not token:
                return pages

    async def open(self, phone: Phone) -> Stream:
        return Stream(self.messages.Stream(metadata=phone.metadata))


class Stream:
    """A device's side of its stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.deliveries: list[messages_pb2.Delivery] = []
        self.results: list[messages_pb2.AckResult] = []
        self.backlog_done = False

    @property
    def ids(self) -> list[bytes]:
        return [each.message_id for each in self.deliveries]

    async def read(self) -> bool:
        """Take one frame; False at the end of the stream. Raises what it ended with."""
        frame = await self.call.read()
        if frame is grpc.aio.EOF:
            return False
        assert not (self.backlog_done and frame.backlog_done)
        assert frame.ByteSize() < 4 * 1024 * 1024, "a client takes no larger frame by default"
        self.backlog_done = self.backlog_done or frame.backlog_done
        self.deliveries += frame.deliveries
        self.results += frame.ack_results
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                assert await self.read()

    async def backlog(self) -> None:
        await self.until(lambda: self.backlog_done)

    async def acknowledge(self, *acks: messages_pb2.Acknowledgement) -> None:
        await self.call.write(messages_pb2.StreamRequest(acknowledgements=acks))

    async def end(self) -> grpc.aio.AioRpcError:
        """Read on until the stream is ended by the server."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.until(lambda: False)
        return caught.value


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(urls: dict[str, str]) -> AsyncIterator[Connection]:
    connection = await connect(urls["admin"], search_path="fetch")
    yield connection
    await connection.close()


def without_valkey(address: Path, sweep_period_s: float) -> Build:
    """The mailbox wired as in its app.py, with a Valkey that nobody answers for."""

    async def wire(runtime: Runtime) -> ServiceApp:
        store = MailboxStore(await runtime.database())
        valkey = Valkey(f"unix://{address}")
        runtime.closes.append(valkey.aclose)
        hub, leases = StreamHub(valkey, store, sweep_period_s=sweep_period_s), Leases(store, valkey)
        mailbox = Mailbox(store, hub, leases)
        return ServiceApp(
            public=[(messages_pb2_grpc.add_MessagesServicer_to_server, MessagesServicer(mailbox, hub))],
            mesh=[
                (
                    mailbox_pb2_grpc.add_MailboxServicer_to_server,
                    MailboxServicer(mailbox, store, leases, Queues(store, leases, runtime.clock)),
                )
            ],
            tasks=[hub.listen, hub.sweep],
            drain=hub.drain,
        )

    return wire


class Start:
    """Starts mailboxes, as many as a test needs, over one database."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, wire: Build | None = None) -> World:
        served = await self._services.serve("fetch", build=wire)
        channel = self._services.channel("fetch", "publishing")
        stub: Any = mailbox_pb2_grpc.MailboxStub(channel.channel)

        async def store(request: mailbox_pb2.StoreRequest) -> None:
            await channel.call(stub.Store, request)

        registration = self._services.channel("fetch", "registration")
        registration_stub: Any = mailbox_pb2_grpc.MailboxStub(registration.channel)

        async def close_devices(*device_ids: bytes) -> None:
            devices = [mailbox_pb2.ClosedDevice(device_id=each, reason_code=common_pb2.REASON_CODE_UNREGISTERED) for each in device_ids]
            await registration.call(registration_stub.CloseDevices, mailbox_pb2.CloseDevicesRequest(devices=devices))

        return World(served, store, self._services.mesh, close_devices)


@pytest_asyncio.fixture(loop_scope="session")
async def start(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[Start]:
    async with running_services(engines, mesh, urls, clock) as services:
        yield Start(services)


@pytest_asyncio.fixture(loop_scope="session")
async def world(start: Start) -> World:
    return await start()


# Fetch


async def test_a_wake_up_id_fetches_its_delivery_with_this_devices_stanza_only(world: World, sql: Connection) -> None:
    phone, other = world.phone(), world.phone()
    made = message(delivery(phone.device_id, stanza=STANZA), delivery(other.device_id, stanza=b"o" * 139), head=HEAD, tail=b"t" * 400)
    await world.store(made)
    wake_up_id = await sql.fetchval("SELECT wake_up_id FROM open_deliveries WHERE device_id = $1", phone.device_id)
    for _ in range(2):
        answer = await world.messages.Fetch(messages_pb2.FetchRequest(wake_up_id=wake_up_id), metadata=phone.metadata)
        assert answer.delivery.envelope == HEAD + b"\x00\x01" + STANZA + made.tail
        assert answer.delivery.message_id == made.message_id
        assert answer.delivery.wake_up_id == wake_up_id
    foreign = await refusal(world.messages.Fetch(messages_pb2.FetchRequest(wake_up_id=wake_up_id), metadata=other.metadata))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    await world.acknowledge(phone, phone.ack(made))
    ended = await refusal(world.messages.Fetch(messages_pb2.FetchRequest(wake_up_id=wake_up_id), metadata=phone.metadata))
    assert ended.code is grpc.StatusCode.NOT_FOUND


async def test_a_wake_up_id_that_is_none_is_refused(world: World) -> None:
    answer = await refusal(world.messages.Fetch(messages_pb2.FetchRequest(wake_up_id=b"short"), metadata=world.phone().metadata))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, "wake_up_id")


# Drain


@pytest.mark.parametrize("size", [1, 3, 7, 8, 0, 256])
async def test_draining_by_pages_gives_everything_once_and_oldest_first(world: World, size: int) -> None:
    phone = world.phone()
    made = [phone.message() for _ in range(7)]
    await world.store(*made)
    pages = await world.drain(phone, size)
    assert [each.message_id for page in pages for each in page] == sorted(each.message_id for each in made)
    assert max(len(page) for page in pages) <= (size or 64)


async def test_a_page_is_bounded_by_bytes_and_nothing_is_lost(world: World) -> None:
    phone = world.phone()
    made = [phone.message(b"t" * 65_000) for _ in range(40)]
    await world.store(*made)
    pages = await world.drain(phone, 256)
    assert [each.message_id for page in pages for each in page] == sorted(each.message_id for each in made)
    assert len(pages) > 1
    largest = max(len(each.envelope) for page in pages for each in page)
    assert all(sum(len(each.envelope) for each in page) <= TAKE_BYTES_MAX + largest for page in pages)


async def test_draining_an_empty_mailbox_gives_one_empty_page(world: World) -> None:
    assert await world.drain(world.phone()) == [[]]


@pytest.mark.parametrize(
    ("request_", "field_"),
    [(messages_pb2.DrainRequest(page_size=257), "page_size"), (messages_pb2.DrainRequest(page_token=b"x"), "page_token")],
)
async def test_a_wrong_page_is_refused(world: World, request_: messages_pb2.DrainRequest, field_: str) -> None:
    answer = await refusal(world.messages.Drain(request_, metadata=world.phone().metadata))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, field_)


# Acknowledge


async def test_acknowledgements_are_answered_each_in_their_order(world: World) -> None:
    phone, stranger = world.phone(), world.phone()
    one, two, three = (phone.message() for _ in range(3))
    await world.store(one, two, three)
    unknown = phone.message()
    wrong = phone.ack(two)
    wrong.signature = stranger.ack(two).signature
    results = await world.acknowledge(
        phone, phone.ack(one), wrong, phone.ack(unknown), phone.ack(three, AckOutcome.UNDELIVERED, 108), phone.ack(one)
    )
    assert [(each.message_id, each.verdict) for each in results] == [
        (one.message_id, messages_pb2.ACK_VERDICT_ACCEPTED),
        (two.message_id, messages_pb2.ACK_VERDICT_REFUSED),
        (unknown.message_id, messages_pb2.ACK_VERDICT_UNKNOWN),
        (three.message_id, messages_pb2.ACK_VERDICT_ACCEPTED),
        (one.message_id, messages_pb2.ACK_VERDICT_ACCEPTED),
    ]
    assert [each.message_id for page in await world.drain(phone) for each in page] == [two.message_id]


async def test_another_device_cannot_acknowledge_with_its_own_signature(world: World) -> None:
    phone, stranger = world.phone(), world.phone()
    made = phone.message()
    await world.store(made)
    (own,) = await world.acknowledge(stranger, stranger.ack(made))
    assert own.verdict == messages_pb2.ACK_VERDICT_UNKNOWN
    (stolen,) = await world.acknowledge(stranger, phone.ack(made))
    assert stolen.verdict == messages_pb2.ACK_VERDICT_REFUSED
    assert len(await world.drain(phone)) == 1


async def test_reading_after_delivery_is_accepted(world: World) -> None:
    phone = world.phone()
    made = phone.message()
    await world.store(made)
    results = await world.acknowledge(phone, phone.ack(made), phone.ack(made, AckOutcome.READ))
    assert [each.verdict for each in results] == [messages_pb2.ACK_VERDICT_ACCEPTED] * 2
    assert results[1].state == common_pb2.STATE_DELIVERED


def changed(ack: messages_pb2.Acknowledgement, **fields: Any) -> messages_pb2.Acknowledgement:
    copy = messages_pb2.Acknowledgement()
    copy.CopyFrom(ack)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


async def test_an_acknowledgement_with_any_field_changed_is_refused_and_harms_no_other(world: World) -> None:
    phone = world.phone()
    made, beside = phone.message(), phone.message()
    await world.store(made, beside)
    good = phone.ack(made)
    wrong = [
        changed(good, message_id=b"short"),
        changed(good, content_id=an_id()),
        changed(good, envelope_digest=os.urandom(32)),
        changed(good, envelope_digest=NO_DIGEST),
        changed(good, envelope_digest=b""),
        phone.ack(made, envelope_digest=NO_DIGEST),
        phone.ack(made, AckOutcome.BLOCKED, envelope_digest=NO_DIGEST),
        phone.ack(made, AckOutcome.READ, envelope_digest=NO_DIGEST),
        changed(good, outcome=messages_pb2.ACK_OUTCOME_UNDELIVERED),
        changed(good, outcome=0),
        changed(good, outcome=99),
        changed(good, reason_code=2),
        changed(good, reason_code=-1),
        changed(good, at_ms=1),
        changed(good, signature=b""),
    ]
    results = await world.acknowledge(phone, *wrong, phone.ack(beside))
    assert [each.verdict for each in results] == [messages_pb2.ACK_VERDICT_REFUSED] * len(wrong) + [messages_pb2.ACK_VERDICT_ACCEPTED]


@pytest.mark.parametrize(("reason", "at_ms"), [(40_000, 1), (999, 1), (0, 2**63), (0, 2**64 - 1)])
async def test_well_signed_numbers_that_mean_nothing_are_refused_and_fail_nobody_elses_batch(world: World, reason: int, at_ms: int) -> None:
    phone, neighbour = world.phone(), world.phone()
    made, other = phone.message(), neighbour.message()
    await world.store(made, other)
    proof = acknowledgement_proof(made.message_id, made.content_id, digest(made), phone.device_id, AckOutcome.UNDELIVERED, reason, at_ms)
    odd = changed(
        phone.ack(made),
        outcome=messages_pb2.ACK_OUTCOME_UNDELIVERED,
        reason_code=reason,
        at_ms=at_ms,
        signature=sign_proof(phone.identity, proof),
    )
    (refused,), (accepted,) = await asyncio.gather(world.acknowledge(phone, odd), world.acknowledge(neighbour, neighbour.ack(other)))
    assert refused.verdict == messages_pb2.ACK_VERDICT_REFUSED
    assert accepted.verdict == messages_pb2.ACK_VERDICT_ACCEPTED


async def test_an_acknowledgement_of_another_envelope_ends_nothing(world: World) -> None:
    phone = world.phone()
    made = phone.message()
    await world.store(made)
    results = await world.acknowledge(phone, *(phone.ack(made, outcome, envelope_digest=os.urandom(32)) for outcome in AckOutcome))
    assert [each.verdict for each in results] == [messages_pb2.ACK_VERDICT_UNKNOWN] * len(AckOutcome)
    ((again,),) = await world.drain(phone)
    assert again.message_id == made.message_id
    (unread,) = await world.acknowledge(phone, phone.ack(made, AckOutcome.UNDELIVERED, envelope_digest=NO_DIGEST))
    assert (unread.verdict, unread.state) == (messages_pb2.ACK_VERDICT_ACCEPTED, common_pb2.STATE_UNDELIVERED)


async def test_more_acknowledgements_than_one_request_holds_are_refused(world: World) -> None:
    phone = world.phone()
    ack = phone.ack(phone.message())
    request = messages_pb2.AcknowledgeRequest(acknowledgements=[ack] * 257)
    answer = await refusal(world.messages.Acknowledge(request, metadata=phone.metadata))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, "acknowledgements")


# Stream


async def test_a_stream_brings_the_backlog_says_so_and_then_what_comes(world: World) -> None:
    phone = world.phone()
    before, after = [phone.message() for _ in range(3)], [phone.message() for _ in range(3)]
    await world.store(*before)
    stream = await world.open(phone)
    await stream.backlog()
    assert stream.ids == [each.message_id for each in before]
    for each in after:
        await world.store(each)
    await stream.until(lambda: len(stream.ids) == 6)
    assert stream.ids == [each.message_id for each in (*before, *after)]
    await stream.acknowledge(*(phone.ack(each) for each in (*before, *after)))
    await stream.until(lambda: len(stream.results) == 6)
    assert {each.verdict for each in stream.results} == {messages_pb2.ACK_VERDICT_ACCEPTED}
    stream.call.cancel()
    assert await world.drain(phone) == [[]]


async def test_what_is_stored_while_the_backlog_is_sent_comes_once(world: World) -> None:
    phone = world.phone()
    made = [phone.message() for _ in range(150)]
    await world.store(*made[:75])
    stream = await world.open(phone)
    await asyncio.gather(world.store(*made[75:]), stream.until(lambda: len(set(stream.ids)) == 150))
    await stream.backlog()
    assert len(stream.ids) == 150
    stream.call.cancel()


async def test_half_closing_answers_the_last_acknowledgements_and_ends_cleanly(world: World) -> None:
    phone = world.phone()
    made = [phone.message() for _ in range(3)]
    await world.store(*made)
    stream = await world.open(phone)
    await stream.backlog()
    await stream.acknowledge(*(phone.ack(each) for each in made))
    await stream.call.done_writing()
    async with asyncio.timeout(LIMIT_S):
        while await stream.read():
            pass
    assert await stream.call.code() is grpc.StatusCode.OK
    assert len(stream.results) == 3


async def test_at_most_256_are_unacknowledged_and_the_backlog_goes_on_as_they_are(world: World) -> None:
    phone = world.phone()
    made = [phone.message() for _ in range(UNACKNOWLEDGED_MAX + 70)]
    await world.store(*made)
    stream = await world.open(phone)
    await stream.until(lambda: len(stream.ids) == UNACKNOWLEDGED_MAX)
    # A refused acknowledgement makes no room: only the answer comes.
    bad = phone.ack(made[0])
    bad.signature = bytes(64)
    await stream.acknowledge(bad)
    await stream.until(lambda: len(stream.results) == 1)
    assert stream.results[0].verdict == messages_pb2.ACK_VERDICT_REFUSED
    assert (len(stream.ids), stream.backlog_done) == (UNACKNOWLEDGED_MAX, False)
    await stream.acknowledge(phone.ack(made[0]))
    await stream.until(lambda: len(stream.ids) == UNACKNOWLEDGED_MAX + 1)
    assert not stream.backlog_done
    await stream.acknowledge(*(phone.ack(each) for each in made[1:201]))
    await stream.backlog()
    assert stream.ids == [each.message_id for each in made]
    stream.call.cancel()


async def test_large_messages_come_in_frames_that_a_client_takes(world: World) -> None:
    phone = world.phone()
    made = [phone.message(b"t" * 65_000) for _ in range(80)]
    stream = await world.open(phone)
    await stream.backlog()
    await asyncio.gather(*(world.store(each) for each in made))
    await stream.until(lambda: len(stream.ids) == 80)
    assert sorted(stream.ids) == sorted(each.message_id for each in made)
    stream.call.cancel()


async def test_a_second_stream_ends_the_first_with_a_reason_and_takes_over(world: World) -> None:
    phone = world.phone()
    made = phone.message()
    await world.store(made)
    first = await world.open(phone)
    await first.backlog()
    second = await world.open(phone)
    error = await first.end()
    assert error.code() is grpc.StatusCode.ABORTED
    assert "another stream" in str(error.details())
    await second.backlog()
    assert second.ids == [made.message_id]
    live = phone.message()
    await world.store(live)
    await second.until(lambda: live.message_id in second.ids)
    second.call.cancel()


async def test_too_many_acknowledgements_in_a_frame_end_the_stream(world: World) -> None:
    phone = world.phone()
    stream = await world.open(phone)
    await stream.acknowledge(*[phone.ack(phone.message())] * 257)
    assert (await stream.end()).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_frame_end_the_stream(world: World) -> None:
    raw: Any = world.served.public.stream_stream(
        "/sealpush.v1.Messages/Stream", response_deserializer=messages_pb2.StreamResponse.FromString
    )
    call = raw(metadata=world.phone().metadata)
    await call.write(b"\x0a\xff")
    assert (await Stream(call).end()).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_server_that_goes_away_ends_streams_with_unavailable_and_nothing_is_lost(world: World) -> None:
    phone = world.phone()
    made = phone.message()
    await world.store(made)
    stream = await world.open(phone)
    await stream.backlog()
    assert world.served.app.drain is not None
    await world.served.app.drain()
    assert (await stream.end()).code() is grpc.StatusCode.UNAVAILABLE
    again = await world.open(phone)
    await again.backlog()
    assert again.ids == [made.message_id]
    again.call.cancel()


@pytest.mark.parametrize("told", [0, 1])
async def test_an_installation_that_has_ended_loses_its_stream_wherever_that_is(start: Start, told: int) -> None:
    processes = [await start(), await start()]
    here = processes[0]
    phone, other = here.phone(), here.phone()
    stream, untouched = await here.open(phone), await here.open(other)
    await stream.backlog()
    await untouched.backlog()
    await processes[told].close_devices(phone.device_id)
    error = await stream.end()
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "register again" in str(error.details())
    made = other.message()
    await here.store(made)
    await untouched.until(lambda: untouched.ids == [made.message_id])
    untouched.call.cancel()


async def test_a_message_stored_by_another_process_comes_at_once_and_a_stream_there_ends_this_one(start: Start) -> None:
    here, there = await start(), await start()
    phone = here.phone()
    first = await here.open(phone)
    await first.backlog()
    made = phone.message()
    await there.store(made)
    await first.until(lambda: first.ids == [made.message_id])
    second = await there.open(phone)
    assert (await first.end()).code() is grpc.StatusCode.ABORTED
    await second.backlog()
    assert second.ids == [made.message_id]
    second.call.cancel()


async def test_without_valkey_the_sweep_brings_what_another_process_stored(start: Start, tmp_path: Path) -> None:
    wire = without_valkey(tmp_path / "nobody", 0.05)
    here, there = await start(wire), await start(wire)
    phone = here.phone()
    stream = await here.open(phone)
    await stream.backlog()
    made = [phone.message() for _ in range(10)]
    await there.store(*made)
    await stream.until(lambda: len(stream.ids) == 10)
    assert stream.ids == [each.message_id for each in made]
    await stream.acknowledge(*(phone.ack(each) for each in made))
    await stream.until(lambda: len(stream.results) == 10)
    # Several sweeps later nothing came twice.
    live = phone.message()
    await there.store(live)
    await stream.until(lambda: live.message_id in stream.ids)
    assert len(stream.ids) == 11
    stream.call.cancel()


async def test_a_device_that_leaves_while_its_stream_opens_is_forgotten(urls: dict[str, str], tmp_path: Path) -> None:
    db = Database(urls["fetch"], "fetch", 1)
    await db.open()
    entered = asyncio.Event()

    class Slow(Valkey):
        async def set_present(self, device_ids: Sequence[bytes], stream_id: bytes) -> None:
            entered.set()
            await asyncio.Event().wait()

    valkey = Slow(f"unix://{tmp_path / 'nobody'}")
    hub = StreamHub(valkey, MailboxStore(db))
    device = DeviceId(an_id())
    opening = asyncio.create_task(hub.open(device))
    await entered.wait()
    assert await hub.live([device]) == {device}
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    assert await hub.live([device]) == set()
    await valkey.aclose()
    await db.aclose()


async def test_a_stream_that_breaks_loses_nothing(world: World) -> None:
    phone = world.phone()
    made = [phone.message() for _ in range(20)]
    await world.store(*made)
    acknowledged: set[bytes] = set()
    while len(acknowledged) < len(made):
        stream = await world.open(phone)
        await stream.backlog()
        assert sorted(stream.ids) == sorted(each.message_id for each in made if each.message_id not in acknowledged)
        some = [each for each in made if each.message_id in stream.ids][:7]
        await stream.acknowledge(*(phone.ack(each) for each in some))
        await stream.until(lambda: len(stream.results) == len(some))  # noqa: B023 - used before the next turn
        acknowledged |= {each.message_id for each in some}
        stream.call.cancel()
