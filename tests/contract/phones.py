"""All real services with a bank, and phones that register with them.

The services' clock is the fake one, which stands still; a phone's clock goes on from the true time by as much as it is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
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
    State,
)
from sealpush.ids import MessageId, SenderId, uuid7
from sealpush.keys import ContentSigningKey, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry
from sealpush.suites import SUITE_X25519
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
from tests.contract.harness import LIMIT_S, Connect, FakeClock, Peer, Serve, Served

APP = "bank-app"
PASSWORD = "a long password of a test"
ROOT, PLATFORM_KEY, CONTENT_KEY = RootKey.generate(), ContentSigningKey.generate(), ContentSigningKey.generate()
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# Much shorter than any clock here is wrong.
LIFETIME = timedelta(minutes=10)
NUMBERS = itertools.count(1)
SENDER_ID = SenderId(uuid7())


@dataclass
class WrongClock:
    """The own clock of a phone, or of a sender."""

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
    """Stands before the services and tells phones that the present is another one. Whoever runs them could."""

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
                told.server_time.FromDatetime(datetime.now(UTC) + self.lie)
                answer = told.SerializeToString()
            return answer

        return grpc.unary_unary_rpc_method_handler(forward)


@dataclass
class World:
    endpoints: Endpoints
    sender: Sender
    senders_clock: WrongClock
    sms: SmsSimulator
    accounts: MeshChannel
    organisation_id: bytes
    liar: Liar
    clock: FakeClock
    closing: list[Callable[[], Awaitable[None]]]

    def device(self, clock: WrongClock, keystore: Keystore, *, one_time_prekeys: int = 20, suite: int = SUITE_X25519) -> Device:
        self.clock.advance(timedelta(seconds=1))  # a challenge that is newer than those that were answered
        liar = Endpoints.single(f"127.0.0.1:{self.liar.port}", insecure=True)
        endpoints = liar if self.liar.lie else self.endpoints
        made = Device(
            APP,
            endpoints,
            keystore,
            root_public_key=ROOT.public_key,
            platform=Platform.ANDROID,
            one_time_prekeys=one_time_prekeys,
            suite=suite,
            clock=clock,
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

    def later(self, passed: timedelta) -> WrongClock:
        """Let so much time pass, for services, the bank and phones: the clock of a phone from now on."""
        self.clock.advance(passed)
        self.liar.lie += passed
        self.senders_clock.wrong_by_ms = self.liar.lie // timedelta(milliseconds=1)
        return WrongClock(self.senders_clock.wrong_by_ms)

    async def are_delivered(self, ids: list[MessageId], by: Sender | None = None) -> bool:
        sender = by or self.sender
        return all([(await sender.status(each)).state is State.DELIVERED for each in ids])


@contextlib.asynccontextmanager
async def whole_world(
    urls: dict[str, str], valkey_url: str, serve: Serve, mesh_channel: Connect, clock: FakeClock, folder: Path, closing: Any
) -> AsyncIterator[World]:
    """Everything started, over databases that were migrated. Ends what runs of itself; `closing` ends the rest."""
    sms = SmsSimulator(now=clock.now)
    inbox = Peer([(add_SimulatedSmsServicer_to_server, SmsControlService(sms))], None)
    await inbox.start()
    closing.append(inbox.stop)
    (folder / "vault.key").write_text("07" * 32)
    (folder / "platform.key").write_text(PLATFORM_KEY.seed.hex())
    settings = load(
        valkey_url=SecretStr(valkey_url),
        postgres_connections=2,
        vault_key=folder / "vault.key",
        platform_key=folder / "platform.key",
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
    senders_clock = WrongClock()
    async with Sender(endpoints, "bank", PASSWORD, signing_key=CONTENT_KEY, clock=senders_clock) as sender:
        yield World(endpoints, sender, senders_clock, sms, accounts, organisation_id, liar, clock, closing)
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


async def shows(world: World, device: Device, number: str, *, sealed: bool = False, by: Sender | None = None) -> None:
    """A message that is published now is shown and delivered."""
    ids = await world.publish(number, "shown", sealed=sealed, by=by)
    assert bodies(await device.drain()) == ["shown"]
    assert await world.are_delivered(ids, by=by)
