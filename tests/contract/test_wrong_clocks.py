"""Phones whose own clock is wrong, or is set while they run, against all real services: nothing is lost, nothing refused.

The services' clock is the fake one, which stands still; a phone's clock goes on from the true time by as much as it is wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from sealpush import (
    Accepted,
    Content,
    ContentClass,
    Device,
    Keystore,
    MemoryKeystore,
    Message,
    Platform,
    Sender,
    SqliteKeystore,
    State,
)
from sealpush.ids import MessageId, SenderId, uuid7
from sealpush.keys import ContentSigningKey, RootKey, SenderMode
from sealpushd.certify import certify_platform, certify_sender
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.v1 import administration_pb2, administration_pb2_grpc
from tests.contract.harness import FakeClock, Mesh, Migrated, Services, running_services

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

APP = "bank-app"
PASSWORD = "a long password of a test"
ROOT, PLATFORM_KEY, CONTENT_KEY = RootKey.generate(), ContentSigningKey.generate(), ContentSigningKey.generate()
HOUR_MS = 3_600_000
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


@dataclass
class World:
    services: Services
    sender: Sender

    def device(self, clock: WrongClock, keystore: Keystore) -> Device:
        made = Device(
            APP,
            self.services.endpoints,
            keystore,
            root_public_key=ROOT.public_key,
            platform=Platform.ANDROID,
            one_time_prekeys=20,
            clock=clock,
        )
        self.services.closing.push_async_callback(made.close)
        return made

    async def registered(self, clock: WrongClock, keystore: Keystore | None = None) -> tuple[Device, str]:
        number = f"+38050200{next(NUMBERS):04d}"
        device = self.device(clock, keystore or MemoryKeystore())
        await device.start_registration(number)
        found = re.search(r"\b(\d{6})\b", self.services.sms.inbox(number)[-1].text)
        assert found is not None
        await device.confirm(found[1])
        return device, number

    async def publish(self, number: str, *bodies: str, sealed: bool = False) -> list[MessageId]:
        publish = self.sender.publish_sealed if sealed else self.sender.publish
        ids = []
        for body in bodies:
            outcome = await publish(number, Content(body=body), content_class=ContentClass.INFORMATIONAL, lifetime=LIFETIME)
            assert isinstance(outcome, Accepted), outcome
            ids.append(outcome.message_id)
        return ids

    async def are_delivered(self, ids: list[MessageId]) -> bool:
        return all([(await self.sender.status(each)).state is State.DELIVERED for each in ids])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "registration", "keys", "publishing", "fetch")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with running_services(engines, mesh, urls, clock, platform_key=PLATFORM_KEY) as services:
        await set_up(services.channel("accounts", "operator"))
        sender = await services.closing.enter_async_context(Sender(services.endpoints, "bank", PASSWORD, signing_key=CONTENT_KEY))
        yield World(services, sender)


async def set_up(accounts: MeshChannel) -> None:
    """An app with its root, the platform's entry, and a bank that may seal by itself or have it done."""
    stub, proto = administration_pb2_grpc.AdministrationStub(accounts.channel), administration_pb2
    organisation = await accounts.call(stub.PutOrganisation, proto.PutOrganisationRequest(login="bank", password=PASSWORD, name="Bank"))
    await accounts.call(stub.PutApp, proto.PutAppRequest(app_id=APP, name="Bank", root_public_key=ROOT.public_key))
    platform = certify_platform(ROOT, PLATFORM_KEY.public_key, days=30)
    await accounts.call(stub.PutPlatformEntry, proto.PutPlatformEntryRequest(platform_entry=platform, root_public_key=ROOT.public_key))
    modes = SenderMode.SERVER | SenderMode.END_TO_END
    entry = certify_sender(ROOT, SENDER_ID, "Bank", modes, [CONTENT_KEY.public_key], days=30)
    await accounts.call(
        stub.PutSender,
        proto.PutSenderRequest(
            organisation_id=organisation.organisation_id,
            sender_id=SENDER_ID,
            name="bank",
            sender_entry=entry,
            app_ids=[APP],
            is_default=True,
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
