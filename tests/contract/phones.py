"""All real services with a bank, and phones that register with them.

The services' clock is the fake one, which stands still; a phone's clock goes on from the true time by as much as it is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc

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
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.v1 import administration_pb2, administration_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Services, running_services

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
    services: Services
    sender: Sender
    senders_clock: WrongClock
    accounts: MeshChannel
    organisation_id: bytes
    liar: Liar

    def device(self, clock: WrongClock, keystore: Keystore, *, one_time_prekeys: int = 20, suite: int = SUITE_X25519) -> Device:
        self.services.clock.advance(timedelta(seconds=1))  # a challenge that is newer than those that were answered
        liar = Endpoints.single(f"127.0.0.1:{self.liar.port}", insecure=True)
        endpoints = liar if self.liar.lie else self.services.endpoints
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
        self.services.closing.push_async_callback(made.close)
        return made

    async def another_sender(self, *, until: timedelta) -> Sender:
        """One more of the bank's, which the server seals for, certified until then, counted from now."""
        sender_id = SenderId(uuid7())
        name = sender_id.hex()
        await put_sender(self.accounts, self.organisation_id, sender_id, name, make_entry(sender_id, SenderMode.SERVER, until=until))
        sender = Sender(self.services.endpoints, "bank", PASSWORD, sender_name=name)
        self.services.closing.push_async_callback(sender.close)
        return sender

    async def registered(self, clock: WrongClock, keystore: Keystore | None = None) -> tuple[Device, str]:
        number = f"+38050200{next(NUMBERS):04d}"
        device = self.device(clock, keystore or MemoryKeystore())
        await device.start_registration(number)
        found = re.search(r"\b(\d{6})\b", self.services.sms.inbox(number)[-1].text)
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
        self.services.clock.advance(moved)
        yield
        self.services.clock.advance(-moved)

    def later(self, passed: timedelta) -> WrongClock:
        """Let so much time pass, for services, the bank and phones: the clock of a phone from now on."""
        self.services.clock.advance(passed)
        self.liar.lie += passed
        self.senders_clock.wrong_by_ms = self.liar.lie // timedelta(milliseconds=1)
        return WrongClock(self.senders_clock.wrong_by_ms)

    async def are_delivered(self, ids: list[MessageId], by: Sender | None = None) -> bool:
        sender = by or self.sender
        return all([(await sender.status(each)).state is State.DELIVERED for each in ids])


@contextlib.asynccontextmanager
async def whole_world(engines: Engines, mesh: Mesh, urls: Mapping[str, str], clock: FakeClock) -> AsyncIterator[World]:
    """Everything started, over databases that were migrated."""
    async with running_services(engines, mesh, urls, clock, platform_key=PLATFORM_KEY) as services:
        accounts = services.channel("accounts", "operator")
        organisation_id = await set_up(accounts)
        public = {name: services[name].public for name in ("accounts", "registration", "keys", "publishing")}
        liar = Liar(public | {"messages": services["fetch"].public})
        await liar.start()
        services.closing.push_async_callback(liar.stop, None)
        senders_clock = WrongClock()
        sender = Sender(services.endpoints, "bank", PASSWORD, signing_key=CONTENT_KEY, clock=senders_clock)
        await services.closing.enter_async_context(sender)
        yield World(services, sender, senders_clock, accounts, organisation_id, liar)


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
