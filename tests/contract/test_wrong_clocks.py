"""Phones whose own clock is wrong, or is set while they run, against all real services: nothing is lost, nothing refused.

And phones that a server tells a wrong time. The services' clock is the fake one, which stands still; a phone's clock goes on from the
true time by as much as it is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
from pydantic import SecretStr

from sealpush import (
    Accepted,
    Content,
    ContentClass,
    Device,
    Endpoints,
    Keystore,
    MemoryKeystore,
    Message,
    Platform,
    Sender,
    SqliteKeystore,
    State,
)
from sealpush.ids import MessageId, SenderId, uuid7
from sealpush.keys import ContentSigningKey, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry
from sealpush.v1 import messages_pb2, registration_pb2
from sealpushd.accounts.app import build as build_accounts
from sealpushd.fetch.app import build as build_fetch
from sealpushd.keys.app import build as build_keys
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.settings import load
from sealpushd.publishing.app import build as build_publishing
from sealpushd.registration.app import build as build_registration
from sealpushd.simulators.control import SmsControlService
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1 import administration_pb2, administration_pb2_grpc
from sealpushd.v1.simulator_pb2_grpc import add_SimulatedSmsServicer_to_server
from tests.contract.harness import Connect, FakeClock, Migrated, Peer, Serve, Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = "bank-app"
PASSWORD = "a long password of a test"
ROOT, PLATFORM_KEY, CONTENT_KEY = RootKey.generate(), ContentSigningKey.generate(), ContentSigningKey.generate()
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WRONG_MS = [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS]
# Much shorter than any clock here is wrong.
LIFETIME = timedelta(minutes=10)
LIMIT_S = 20
NUMBERS = itertools.count(1)
SENDER_ID = SenderId(uuid7())


@dataclass
class WrongClock:
    """A phone's own clock."""

    wrong_by_ms: int = 0

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.wrong_by_ms

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


# The answers that tell a phone what time it is.
TELL_TIME: Final[dict[str, Any]] = {
    "/sealpush.v1.Registration/StartRegistration": registration_pb2.StartRegistrationResponse,
    "/sealpush.v1.Registration/ConfirmRegistration": registration_pb2.ConfirmRegistrationResponse,
    "/sealpush.v1.Registration/Authenticate": registration_pb2.AuthenticateResponse,
    "/sealpush.v1.Messages/Drain": messages_pb2.DrainResponse,
}


class Liar(grpc.GenericRpcHandler):
    """Stands before the services and tells a phone another time than theirs. Whoever runs them could."""

    def __init__(self, channels: dict[str, grpc.aio.Channel]) -> None:
        self._channels = channels
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.start, self.stop = self._server.start, self._server.stop
        self.lie = timedelta()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = handler_call_details.method
        metadata = tuple(each for each in handler_call_details.invocation_metadata if each[0] != "user-agent")
        channel = self._channels[method.split("/")[1].rpartition(".")[2].lower()]

        async def forward(request: bytes, context: Any) -> bytes:
            try:
                answer: bytes = await channel.unary_unary(method, bytes, bytes)(request, metadata=metadata, timeout=LIMIT_S)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))
            if method in TELL_TIME:
                told = TELL_TIME[method].FromString(answer)
                told.server_time.FromDatetime(told.server_time.ToDatetime() + self.lie)
                answer = told.SerializeToString()
            return answer

        return grpc.unary_unary_rpc_method_handler(forward)


@dataclass
class World:
    endpoints: Endpoints
    sender: Sender
    sms: SmsSimulator
    accounts: MeshChannel
    organisation_id: bytes
    liar: Liar
    clock: FakeClock
    closing: list[Callable[[], Awaitable[None]]]

    def device(self, clock: WrongClock, keystore: Keystore) -> Device:
        self.clock.advance(timedelta(seconds=1))  # a challenge that is newer than those that were answered
        liar = Endpoints.single(f"127.0.0.1:{self.liar.port}", insecure=True)
        endpoints = liar if self.liar.lie else self.endpoints
        made = Device(
            APP, endpoints, keystore, root_public_key=ROOT.public_key, platform=Platform.ANDROID, one_time_prekeys=20, clock=clock
        )
        self.closing.append(made.close)
        return made

    async def another_sender(self, *, until: timedelta) -> Sender:
        """One more of the bank's, which the server seals for, certified until then, counted from now."""
        sender_id = SenderId(uuid7())
        name = sender_id.hex()
        await put_sender(self.accounts, self.organisation_id, sender_id, name, make_entry(sender_id, SenderMode.SERVER, until=until))
        sender = Sender(self.endpoints, "bank", PASSWORD, sender_name=name)
        self.closing.append(sender.close)
        return sender

    async def registered(self, clock: WrongClock, keystore: Keystore | None = None) -> tuple[Device, str]:
        number = f"+38050200{next(NUMBERS):04d}"
        device = self.device(clock, keystore or MemoryKeystore())
        await device.start_registration(number)
        found = re.search(r"\b(\d{6})\b", self.sms.inbox(number)[-1].text)
        assert found is not None
        await device.confirm(found[1])
        return device, number

    async def publish(
        self, number: str, *bodies: str, sealed: bool = False, by: Sender | None = None, lifetime: timedelta = LIFETIME
    ) -> list[MessageId]:
        sender = by or self.sender
        publish = sender.publish_sealed if sealed else sender.publish
        ids = []
        for body in bodies:
            outcome = await publish(number, Content(body=body), content_class=ContentClass.INFORMATIONAL, lifetime=lifetime)
            assert isinstance(outcome, Accepted), outcome
            ids.append(outcome.message_id)
        return ids

    @contextlib.contextmanager
    def at(self, moved: timedelta) -> Iterator[None]:
        """Have the services' clock go wrong for a while."""
        self.clock.advance(moved)
        yield
        self.clock.advance(-moved)

    async def are_delivered(self, ids: list[MessageId], by: Sender | None = None) -> bool:
        sender = by or self.sender
        return all([(await sender.status(each)).state is State.DELIVERED for each in ids])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "registration", "keys", "publishing", "fetch")


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    urls: dict[str, str], valkey_url: str, serve: Serve, mesh_channel: Connect, clock: FakeClock, tmp_path: Path, closing: Any
) -> AsyncIterator[World]:
    sms = SmsSimulator(now=clock.now)
    inbox = Peer([(add_SimulatedSmsServicer_to_server, SmsControlService(sms))], None)
    await inbox.start()
    closing.append(inbox.stop)
    (tmp_path / "vault.key").write_text("07" * 32)
    (tmp_path / "platform.key").write_text(PLATFORM_KEY.seed.hex())
    settings = load(
        valkey_url=SecretStr(valkey_url),
        postgres_connections=2,
        vault_key=tmp_path / "vault.key",
        platform_key=tmp_path / "platform.key",
        code_channel="simulated",
        code_channel_address=inbox.address,
    )
    served: dict[str, Served] = {}
    tasks: list[asyncio.Task[None]] = []
    # Keys and registration call each other, so keys is served once more when registration has an address.
    for name, build in (
        ("accounts", build_accounts),
        ("fetch", build_fetch),
        ("keys", build_keys),
        ("registration", build_registration),
        ("keys", build_keys),
        ("publishing", build_publishing),
    ):
        settings = settings.model_copy(update={"postgres_url": SecretStr(urls[name])})
        served[name] = await serve(name, build, settings, clock)
        settings = settings.model_copy(update={f"{name}_mesh": served[name].mesh_address})
        tasks += [asyncio.create_task(task()) for task in served[name].app.tasks]
    public = {name: one.public_address for name, one in served.items()}
    endpoints = Endpoints(public["accounts"], public["registration"], public["keys"], public["publishing"], public["fetch"], insecure=True)
    accounts = mesh_channel("accounts", served["accounts"].mesh_address, "operator")
    organisation_id = await set_up(accounts)
    liar = Liar({name if name != "fetch" else "messages": one.public for name, one in served.items()})
    await liar.start()
    closing.append(lambda: liar.stop(None))
    async with Sender(endpoints, "bank", PASSWORD, signing_key=CONTENT_KEY) as sender:
        yield World(endpoints, sender, sms, accounts, organisation_id, liar, clock, closing)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def make_entry(
    sender_id: SenderId,
    modes: SenderMode,
    *keys: ContentSigningKey,
    until: timedelta = timedelta(days=30),
    role: EntryRole = EntryRole.SENDER,
) -> bytes:
    """In force since 30 days ago."""
    now_ms = WrongClock().now_ms()
    window = (now_ms - 30 * DAY_MS, now_ms + until // timedelta(milliseconds=1))
    certified = tuple(EntryKey(each.public_key, *window) for each in keys)
    return sign_sender_entry(ROOT, SenderEntry(sender_id, "Bank", modes, certified, *window, serial=now_ms, role=role))


async def set_up(accounts: MeshChannel) -> bytes:
    """An app with its root, the platform's entry, and a bank that may seal by itself or have it done: its organisation's id."""
    stub, proto = administration_pb2_grpc.AdministrationStub(accounts.channel), administration_pb2
    organisation = await accounts.call(stub.PutOrganisation, proto.PutOrganisationRequest(login="bank", password=PASSWORD, name="Bank"))
    await accounts.call(stub.PutApp, proto.PutAppRequest(app_id=APP, name="Bank", root_public_key=ROOT.public_key))
    platform = make_entry(SenderId(uuid7()), SenderMode.SERVER, PLATFORM_KEY, role=EntryRole.PLATFORM)
    await accounts.call(stub.PutPlatformEntry, proto.PutPlatformEntryRequest(platform_entry=platform, root_public_key=ROOT.public_key))
    entry = make_entry(SENDER_ID, SenderMode.SERVER | SenderMode.END_TO_END, CONTENT_KEY)
    await put_sender(accounts, organisation.organisation_id, SENDER_ID, "bank", entry, is_default=True)
    return bytes(organisation.organisation_id)


async def put_sender(
    accounts: MeshChannel, organisation_id: bytes, sender_id: SenderId, name: str, entry: bytes, *, is_default: bool = False
) -> None:
    stub, proto = administration_pb2_grpc.AdministrationStub(accounts.channel), administration_pb2
    await accounts.call(
        stub.PutSender,
        proto.PutSenderRequest(
            organisation_id=organisation_id,
            sender_id=sender_id,
            name=name,
            sender_entry=entry,
            app_ids=[APP],
            is_default=is_default,
        ),
    )


def bodies(messages: list[Message]) -> list[str]:
    return [each.content.body for each in messages]


@pytest.mark.parametrize("wrong_by_ms", WRONG_MS)
async def test_a_phone_with_a_wrong_clock_registers_makes_prekeys_and_receives(world: World, wrong_by_ms: int) -> None:
    device, number = await world.registered(WrongClock(wrong_by_ms))
    assert await device.drain() == []
    assert (await device.diagnose()).one_time_prekeys == 20, "the service took them"
    ids = await world.publish(number, "by the server") + await world.publish(number, "by the sender", sealed=True)
    assert bodies(await device.drain()) == ["by the server", "by the sender"]
    assert (await device.diagnose()).one_time_prekeys == 19, "the sender used one"
    assert await world.are_delivered(ids)
    assert bodies(await device.inbox()) == ["by the sender", "by the server"]


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_is_set_while_the_phone_runs_loses_nothing(world: World, by_ms: int) -> None:
    clock = WrongClock()
    device, number = await world.registered(clock)
    ids: list[MessageId] = []
    for turn in range(6):
        ids += await world.publish(number, f"{turn}a", f"{turn}b", sealed=turn % 2 == 0)
        clock.wrong_by_ms += by_ms if turn < 3 else -by_ms
        assert bodies(await device.on_wake()) == [f"{turn}a", f"{turn}b"]
        await device.maintain()
    assert await world.are_delivered(ids)
    assert len(await device.inbox()) == 12


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_was_set_while_the_app_was_off_loses_nothing(world: World, by_ms: int, tmp_path: Path) -> None:
    keystore = SqliteKeystore(tmp_path / "phone.db")
    _, number = await world.registered(WrongClock(), keystore)
    ids = await world.publish(number, "a", "b")
    # A new process has nothing but the offset of then.
    device = world.device(WrongClock(by_ms), keystore)
    assert bodies(await device.drain()) == ["a", "b"]
    assert await world.are_delivered(ids)
    keystore.close()


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_is_set_while_a_stream_runs_loses_nothing(world: World, by_ms: int) -> None:
    clock = WrongClock()
    device, number = await world.registered(clock)
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        ids = []
        for turn in range(4):
            ids += await world.publish(number, str(turn))
            assert (await anext(messages)).content.body == str(turn)
            clock.wrong_by_ms += by_ms if turn < 2 else -by_ms
        for each in ids:
            assert (await world.sender.status(each, timedelta(seconds=8))).state is State.DELIVERED


async def test_a_server_that_goes_back_by_days_brings_no_entry_back_that_has_ended(world: World, tmp_path: Path) -> None:
    with world.at(timedelta(days=-5)):
        ended = await world.another_sender(until=timedelta(days=-2))
    keystore = SqliteKeystore(tmp_path / "phone.db")
    device, number = await world.registered(WrongClock(), keystore)
    await shows(world, device, number)
    _, number_of_another = await world.registered(WrongClock(), nothing_heard := MemoryKeystore())
    world.liar.lie = timedelta(days=-5)
    with world.at(world.liar.lie):
        waiting = await world.publish(number, "of the past", by=ended, lifetime=timedelta(days=20))
        await world.publish(number_of_another, "of the past", by=ended, lifetime=timedelta(days=20))
    # Each a new process, by whatever clock of its own.
    for own_ms in (0, HOUR_MS, -5 * DAY_MS, -30 * DAY_MS):
        device = world.device(WrongClock(own_ms), keystore)
        assert await device.drain() == []
        assert "outside its time" in (await device.diagnose()).last_error
    assert not await world.are_delivered(waiting, by=ended)
    # What remains: a phone that has heard nothing signed since the entry ended.
    assert bodies(await world.device(WrongClock(), nothing_heard).drain()) == ["of the past"]
    # The right time again: the bound is in nobody's way.
    world.liar.lie = timedelta()
    await shows(world, world.device(WrongClock(), keystore), number)
    keystore.close()


@pytest.mark.parametrize("own_ms", [0, HOUR_MS, -DAY_MS])
async def test_a_server_that_ran_ahead_and_signed_its_times_ends_no_entry(world: World, tmp_path: Path, own_ms: int) -> None:
    soon_over = await world.another_sender(until=timedelta(days=1))
    keystore = SqliteKeystore(tmp_path / "phone.db")
    own = WrongClock(own_ms)
    _, number = await world.registered(own, keystore)
    world.liar.lie = timedelta(days=20)
    with world.at(world.liar.lie):
        ids = await world.publish(number, "of the future")
    assert bodies(await world.device(own, keystore).drain()) == ["of the future"]
    assert await world.are_delivered(ids)
    world.liar.lie = timedelta()
    for _ in range(2):
        await shows(world, world.device(own, keystore), number, by=soon_over)
    keystore.close()


async def shows(world: World, device: Device, number: str, by: Sender | None = None) -> None:
    """A message that is published now is shown and delivered."""
    ids = await world.publish(number, "shown", by=by)
    assert bodies(await device.drain()) == ["shown"]
    assert await world.are_delivered(ids, by=by)
