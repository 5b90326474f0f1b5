"""The device log end to end: SDK devices and senders against real registration, keys, mailbox and publishing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sealpush import fingerprint
from sealpush.device import Device, Installation
from sealpush.devicelog import DeviceLog, DeviceNotice, EntryKind, LogEntry, NoticeKind, next_head
from sealpush.errors import FailedPrecondition, InvalidRequest, KeyRefused, NotFound, PermissionDenied, RegistrationEnded
from sealpush.ids import AppId, DeviceId, SenderId, SubscriberId, uuid7
from sealpush.keys import (
    DAY_MS,
    ContentSigningKey,
    EntryKey,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    RootKey,
    SenderEntry,
    SenderMode,
    generate_prekey,
    sign_sender_entry,
)
from sealpush.keystore import Keystore
from sealpush.memory_keystore import MemoryKeystore
from sealpush.model import Platform
from sealpush.proofs import body_digest, change_proof, sign_proof, vouch_proof
from sealpush.publication import Accepted, IdentityChanged, Publication, PublishOutcome
from sealpush.sender import Sender
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.transport import Channels
from sealpush.v1 import accounts_pb2, accounts_pb2_grpc, common_pb2, keys_pb2, messages_pb2, registration_pb2
from sealpush.v1.content_pb2 import Content
from sealpush.wire import wire_prekey
from sealpushd.engines import Engines
from sealpushd.keys.store import KeyStore
from sealpushd.platform.access import ACCESS, AnyDevice
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection
from sealpushd.platform.server import AddServicer
from sealpushd.platform.tokens import DeviceCaller, SenderCaller
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1 import (
    administration_pb2,
    administration_pb2_grpc,
    sealing_pb2,
    sealing_pb2_grpc,
)
from tests.contract.harness import FakeClock, Mesh, Migrated, refusal, running_services

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = AppId("bank-app")
ROOT = RootKey.from_seed(b"\x01" * 32)
SIGNING_KEY = ContentSigningKey.from_seed(b"\x02" * 32)
PLATFORM_KEY = ContentSigningKey.from_seed(b"\x03" * 32)
# One database for all tests here: each makes its own people.
_numbers = itertools.count()


@dataclass
class SdkClock:
    """The services' clock as the SDK takes one; pauses take no time."""

    services: FakeClock

    def now_ms(self) -> int:
        return to_ms(self.services.now())

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Accounts(accounts_pb2_grpc.AccountsServicer, administration_pb2_grpc.AdministrationServicer):
    """One app and one bank."""

    def __init__(self, mesh: Mesh, now_ms: int) -> None:
        self.sender_id = SenderId(uuid7())
        self._mesh = mesh
        begin, end = now_ms - DAY_MS, now_ms + 90 * DAY_MS
        keys = [(EntryKey(each.public_key, begin, end),) for each in (SIGNING_KEY, PLATFORM_KEY)]
        bank = SenderEntry(self.sender_id, "Bank", SenderMode.END_TO_END | SenderMode.SERVER, keys[0], begin, end, 1)
        platform = SenderEntry(SenderId(bytes(16)), "Platform", SenderMode.SERVER, keys[1], begin, end, 1, EntryRole.PLATFORM)
        self.entry, self.platform_entry = sign_sender_entry(ROOT, bank), sign_sender_entry(ROOT, platform)

    async def SignIn(self, request: Any, context: Any) -> accounts_pb2.SignInResponse:
        caller = SenderCaller(self.sender_id, uuid7(), (APP,), frozenset({"publish", "keys"}), ())
        token, expires_at = self._mesh.keys["accounts"].sender_token(caller)
        response = accounts_pb2.SignInResponse(access_token=token, sender_id=self.sender_id)
        response.expires_at.seconds = expires_at
        return response

    async def GetSenderProfile(self, request: Any, context: Any) -> accounts_pb2.GetSenderProfileResponse:
        return accounts_pb2.GetSenderProfileResponse(sender_entry=self.entry, platform_entry=self.platform_entry)

    async def GetApps(self, request: Any, context: Any) -> administration_pb2.GetAppsResponse:
        return administration_pb2.GetAppsResponse(apps=[administration_pb2.App(app_id=APP, name="Bank")])

    async def GetSenders(self, request: Any, context: Any) -> administration_pb2.GetSendersResponse:
        senders = [administration_pb2.Sender(sender_id=self.sender_id, sender_entry=self.entry, platform_entry=self.platform_entry)]
        return administration_pb2.GetSendersResponse(senders=senders)


@dataclass
class Told:
    """What an app was told, as it was told."""

    notices: list[DeviceNotice] = field(default_factory=list)

    def __call__(self, notice: DeviceNotice) -> None:
        self.notices.append(notice)


@dataclass
class Rogue:
    """A device that the service makes up."""

    device_id: DeviceId = field(default_factory=lambda: DeviceId(uuid7()))
    identity: IdentityKey = field(default_factory=IdentityKey.generate)

    @property
    def fingerprint(self) -> str:
        return fingerprint([(self.device_id, self.identity.public_key)])


@dataclass
class World:
    clock: FakeClock
    channels: Channels
    sms: SmsSimulator
    accounts: Accounts
    sealing: Any
    mesh: Mesh
    sql: Connection
    store: KeyStore

    def number(self) -> str:
        """Of nobody yet."""
        return f"+38050200{next(_numbers):04d}"

    def device(self, keystore: Keystore | None = None, told: Told | None = None) -> Device:
        return Device(
            APP,
            self.channels,
            keystore or MemoryKeystore(),
            root_public_key=ROOT.public_key,
            platform=Platform.ANDROID,
            on_notice=told,
            one_time_prekeys=5,
            clock=SdkClock(self.clock),
        )

    async def register(self, device: Device, number: str) -> Device:
        # Codes for one number are 30 s apart. The mailbox has a clock of its own: a few minutes in all are no matter to a phone.
        self.clock.advance(timedelta(seconds=31))
        await device.start_registration(number)
        found = re.search(r"\b(\d{6})\b", self.sms.inbox(number)[-1].text)
        assert found is not None
        await device.confirm(found[1])
        return device

    async def phone(self, number: str, keystore: Keystore | None = None, told: Told | None = None) -> Device:
        """A registered phone that has looked at the log once."""
        device = await self.register(self.device(keystore, told), number)
        await device.maintain()
        return device

    async def slip_in(self, subscriber_id: SubscriberId, *rogues: Rogue) -> None:
        """As a server gone bad does it: nobody registered."""
        now_ms = to_ms(self.clock.now())
        devices = []
        for each in rogues:
            _, prekey = generate_prekey(each.identity, each.device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=now_ms)
            devices.append(
                sealing_pb2.NewDevice(
                    subscriber_id=subscriber_id,
                    device_id=each.device_id,
                    identity_public_key=each.identity.public_key,
                    signed_prekey=wire_prekey(prekey),
                )
            )
        answer = await self.sealing.PutDevices(sealing_pb2.PutDevicesRequest(devices=devices), metadata=self.as_registration)
        assert not any(answer.refusals)

    async def take_out(self, subscriber_id: SubscriberId, *rogues: Rogue) -> None:
        removed = [sealing_pb2.RemovedDevice(subscriber_id=subscriber_id, device_id=each.device_id) for each in rogues]
        await self.sealing.RemoveDevices(sealing_pb2.RemoveDevicesRequest(devices=removed), metadata=self.as_registration)

    @property
    def as_registration(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.mesh.keys['registration'].mesh_token()}"),)

    @property
    def keys(self) -> Any:
        return self.channels.keys

    def as_device(self, device_id: DeviceId, identity: IdentityKey) -> tuple[tuple[str, str], ...]:
        caller = DeviceCaller(device_id, SubscriberId(uuid7()), APP, identity.public_key)
        return (("authorization", f"Bearer {self.mesh.keys['registration'].device_token(caller)[0]}"),)

    async def log(self, subscriber_id: SubscriberId) -> list[LogEntry]:
        page = await self.store.log(subscriber_id, 0, 10_000)
        assert DeviceLog.read(subscriber_id, page.entries).head == page.head
        return [LogEntry.decode(each) for each in page.entries]

    async def rewrite(self, subscriber_id: SubscriberId, entries: list[bytes]) -> None:
        """Replace a log by another one whose hashes are right."""
        await self.sql.execute("DELETE FROM device_log WHERE subscriber_id = $1", subscriber_id)
        log = DeviceLog.start(subscriber_id)
        head = log.head
        for seq, entry in enumerate(entries, start=1):
            head = next_head(head, entry)
            await self.sql.execute("INSERT INTO device_log VALUES ($1, $2, $3, $4)", subscriber_id, seq, entry, head)
        await self.sql.execute("UPDATE device_lists SET seq = $2, head = $3 WHERE subscriber_id = $1", subscriber_id, len(entries), head)

    def sender(self) -> Sender:
        return Sender(self.channels, "bank", "secret", signing_key=SIGNING_KEY, clock=SdkClock(self.clock))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("registration", "keys", "fetch", "publishing")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    accounts = Accounts(mesh, to_ms(clock.now()))  # type: ignore[abstract]  # nobody asks for anything else
    stand_ins: dict[str, list[AddServicer]] = {
        "accounts": [
            (administration_pb2_grpc.add_AdministrationServicer_to_server, accounts),
            (accounts_pb2_grpc.add_AccountsServicer_to_server, accounts),
        ]
    }
    settings = {"codes_per_address_hour": 1000}
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins, settings=settings, platform_key=PLATFORM_KEY) as services:
        channels = await services.closing.enter_async_context(Channels(services.endpoints))
        sealing = sealing_pb2_grpc.SealingStub(services.channel("keys", "registration").channel)
        store = KeyStore(await services.database("keys"), 10)
        yield World(clock, channels, services.sms, accounts, sealing, mesh, await services.sql("keys"), store)


async def subscriber_of(device: Device) -> SubscriberId:
    registration = await device.registration()
    assert registration is not None
    return registration.subscriber_id


async def id_of(device: Device) -> DeviceId:
    registration = await device.registration()
    assert registration is not None
    return registration.device_id


async def told(device: Device) -> list[tuple[NoticeKind, DeviceId | None]]:
    return [(each.kind, each.device_id) for each in await device.notices()]


def content() -> Content:
    return Content(content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, body="hello")


# --- what phones are told -------------------------------------------------------------------------------------------------


async def test_a_device_that_the_server_slips_in_is_told_to_the_old_phone_once_and_over_restarts(world: World, tmp_path: Path) -> None:
    keystore, app, rogue = SqliteKeystore(tmp_path / "keys.db"), Told(), Rogue()
    phone = await world.phone(world.number(), keystore, app)
    assert await phone.notices() == []
    await world.slip_in(await subscriber_of(phone), rogue)
    await phone.maintain()
    [notice] = app.notices
    assert (notice.kind, notice.device_id, notice.fingerprint) == (NoticeKind.ADDED, rogue.device_id, rogue.fingerprint)
    assert notice.at <= world.clock.now()

    again = Told()
    keystore.close()
    keystore = SqliteKeystore(tmp_path / "keys.db")
    phone = world.device(keystore, again)
    assert await phone.notices() == [notice]
    world.clock.advance(timedelta(seconds=1))  # challenges of one moment are one challenge
    await phone.maintain()
    assert again.notices == []
    await phone.dismiss_notices(await phone.notices())
    await phone.maintain()
    assert await phone.notices() == []
    keystore.close()


async def test_a_new_phone_is_told_of_what_came_after_it_and_not_of_itself(world: World) -> None:
    number = world.number()
    first, app = await world.phone(number), Told()
    second = await world.register(world.device(told=app), number)
    rogue = Rogue()
    await world.slip_in(await subscriber_of(first), rogue)
    await second.maintain()
    assert [each.device_id for each in app.notices] == [rogue.device_id]
    await first.maintain()
    assert await told(first) == [(NoticeKind.ADDED, await id_of(second)), (NoticeKind.ADDED, rogue.device_id)]
    await second.unregister()
    await world.take_out(await subscriber_of(first), rogue)
    await first.dismiss_notices(await first.notices())
    await first.maintain()
    assert sorted(kind for kind, _ in await told(first)) == [NoticeKind.REMOVED, NoticeKind.REMOVED]


async def test_a_device_that_moves_to_another_person_starts_over(world: World) -> None:
    number, other = world.number(), world.number()
    phone, neighbour = await world.phone(number), await world.phone(other)
    assert len(await phone.devices()) == 1
    await world.register(phone, other)
    assert await subscriber_of(phone) == await subscriber_of(neighbour)
    await phone.maintain()
    await neighbour.maintain()
    assert await phone.notices() == []
    assert [each.is_this for each in await phone.devices()] == [False, True]
    assert await told(neighbour) == [(NoticeKind.ADDED, await id_of(phone))]


async def test_a_registration_that_is_half_done_breaks_no_log(world: World) -> None:
    phone = await world.phone(world.number())
    subscriber_id = await subscriber_of(phone)
    # Keys has moved it to somebody else; the answer that says so was lost.
    await world.sql.execute("UPDATE devices SET subscriber_id = $2 WHERE device_id = $1", await id_of(phone), uuid7())
    with pytest.raises(FailedPrecondition, match="another subscriber"):
        await phone.maintain()
    assert await phone.notices() == []
    await world.sql.execute("UPDATE devices SET subscriber_id = $2 WHERE device_id = $1", await id_of(phone), subscriber_id)
    await phone.maintain()
    assert await phone.notices() == []


async def test_a_rewritten_history_is_told_and_followed_from_then_on(world: World) -> None:
    phone, rogue = await world.phone(world.number()), Rogue()
    subscriber_id = await subscriber_of(phone)
    await world.slip_in(subscriber_id, rogue)
    await phone.maintain()
    await phone.dismiss_notices(await phone.notices())
    # The server takes the addition back out of history, and puts another in its place.
    page = await world.store.log(subscriber_id, 0, 10)
    other = Rogue()
    hidden = LogEntry(EntryKind.ADDED, other.device_id, other.identity.public_key, 1, recovered=True).encode()
    await world.rewrite(subscriber_id, [page.entries[0], hidden])
    await phone.maintain()
    assert await told(phone) == [
        (NoticeKind.LOG_BROKEN, None),
        (NoticeKind.REMOVED, rogue.device_id),
        (NoticeKind.ADDED, other.device_id),
    ]
    await phone.dismiss_notices(await phone.notices())
    await phone.maintain()
    assert await phone.notices() == []  # it follows the new history now
    third = Rogue()
    await world.slip_in(subscriber_id, third)
    await phone.maintain()
    assert await told(phone) == [(NoticeKind.ADDED, third.device_id)]


async def test_a_log_that_was_cut_or_restored_from_a_back_up_is_told(world: World) -> None:
    phone, rogue = await world.phone(world.number()), Rogue()
    subscriber_id = await subscriber_of(phone)
    await world.slip_in(subscriber_id, rogue)
    await phone.maintain()
    await phone.dismiss_notices(await phone.notices())
    page = await world.store.log(subscriber_id, 0, 10)
    await world.rewrite(subscriber_id, page.entries[:1])
    await phone.maintain()
    assert await told(phone) == [(NoticeKind.LOG_BROKEN, None), (NoticeKind.REMOVED, rogue.device_id)]


async def test_a_log_that_makes_no_sense_is_told_once_and_stops_no_message(world: World) -> None:
    number = world.number()
    phone = await world.phone(number)
    subscriber_id = await subscriber_of(phone)
    page = await world.store.log(subscriber_id, 0, 10)
    rogue = Rogue()
    hides = LogEntry(EntryKind.ADDED, rogue.device_id, rogue.identity.public_key, 1, recovered=False).encode()
    for entries in ([*page.entries, hides], [*page.entries, b"rubbish"], [*page.entries, hides]):
        await world.rewrite(subscriber_id, entries)
        async with world.sender() as sender:
            assert isinstance(await sender.publish(number, content()), Accepted)
        await phone.maintain()
        assert [each.content.body for each in await phone.drain()] == ["hello"]
        assert await told(phone) == [(NoticeKind.LOG_BROKEN, None)]
    await world.rewrite(subscriber_id, page.entries)
    await phone.dismiss_notices(await phone.notices())
    await phone.maintain()
    assert await phone.notices() == []  # the history that was known is back


async def test_a_long_log_is_read_in_pages(world: World) -> None:
    phone, rogue = await world.phone(world.number()), Rogue()
    subscriber_id = await subscriber_of(phone)
    entries = [(await world.log(subscriber_id))[0].encode()]
    for _ in range(300):
        for kind in (EntryKind.ADDED, EntryKind.REMOVED):
            entry = LogEntry(kind, rogue.device_id, rogue.identity.public_key, 1, recovered=kind is EntryKind.ADDED)
            entries.append(entry.encode())
    await world.rewrite(subscriber_id, entries)
    await phone.maintain()
    assert [kind for kind, _ in await told(phone)] == [NoticeKind.ADDED, NoticeKind.REMOVED] * 300


async def test_what_comes_while_a_phone_reads_is_told_once(world: World) -> None:
    app = Told()
    phone = await world.phone(world.number(), told=app)
    subscriber_id, rogues = await subscriber_of(phone), [Rogue() for _ in range(12)]
    await asyncio.gather(*(world.slip_in(subscriber_id, each) for each in rogues), *(phone.devices() for _ in range(12)))
    await phone.devices()
    assert sorted(each.device_id or b"" for each in app.notices) == sorted(each.device_id for each in rogues)
    assert app.notices == await phone.notices()


async def test_two_processes_over_one_store_tell_a_device_once(world: World, tmp_path: Path) -> None:
    app, rogues = Told(), [Rogue() for _ in range(6)]
    keystores = [SqliteKeystore(tmp_path / "keys.db") for _ in range(2)]
    phone = await world.phone(world.number(), keystores[0], app)
    extension = world.device(keystores[1], app)
    world.clock.advance(timedelta(seconds=1))  # challenges of one moment are one challenge
    await extension.maintain()
    for rogue in rogues:
        await world.slip_in(await subscriber_of(phone), rogue)
        await asyncio.gather(phone.devices(), extension.devices())
    assert [each.device_id for each in app.notices] == [each.device_id for each in rogues]
    assert await phone.notices() == await extension.notices() == app.notices
    for each in keystores:
        each.close()


async def test_only_devices_of_the_list_read_its_log_and_in_bounded_pages(world: World) -> None:
    phone = await world.phone(world.number())
    subscriber_id, identity = await subscriber_of(phone), IdentityKey.generate()
    metadata = world.as_device(await id_of(phone), identity)

    def read(**fields: Any) -> Any:
        return world.keys.GetDeviceLog(keys_pb2.GetDeviceLogRequest(subscriber_id=subscriber_id, **fields), metadata=metadata)

    answer = await read(page_size=1)
    assert (len(answer.entries), answer.seq) == (1, 1)
    assert not (await read(after_seq=1)).entries
    assert (await read(after_seq=2**63 - 1)).seq == 1
    assert (await refusal(read(after_seq=2**63))).field == "after_seq"
    assert (await refusal(read(page_size=257))).field == "page_size"
    stranger = world.as_device(DeviceId(uuid7()), identity)
    request = keys_pb2.GetDeviceLogRequest(subscriber_id=subscriber_id)
    assert (await refusal(world.keys.GetDeviceLog(request, metadata=stranger))).code is grpc.StatusCode.UNAUTHENTICATED


# --- vouching -------------------------------------------------------------------------------------------------------------


async def test_an_old_phone_vouches_for_a_new_one_and_everybody_sees_it(world: World) -> None:
    number = world.number()
    first, second, third = [await world.phone(number) for _ in range(3)]
    await first.vouch_for(await id_of(second), (await second.fingerprint()).replace(" ", ""))
    for phone in (first, second, third):
        assert [each.vouched for each in await phone.devices()] == [True, True, False]
    # The second is trusted now, and may vouch itself; nobody is told of what it did or what concerns it.
    await second.vouch_for(await id_of(third), await third.fingerprint())
    await first.maintain()
    await second.maintain()
    await third.maintain()
    assert await told(first) == [
        (NoticeKind.ADDED, await id_of(second)),
        (NoticeKind.ADDED, await id_of(third)),
        (NoticeKind.VOUCHED, await id_of(third)),
    ]
    assert await told(second) == [(NoticeKind.ADDED, await id_of(third))]
    assert await told(third) == [(NoticeKind.VOUCHED, await id_of(second))]
    async with world.sender() as sender:
        assert [each.vouched for each in (await sender.recipient_devices(number)).devices] == [True, True, True]


async def test_a_device_that_nobody_vouches_for_vouches_for_nobody(world: World) -> None:
    number = world.number()
    _, second, third = [await world.phone(number) for _ in range(3)]
    with pytest.raises(FailedPrecondition, match="nobody vouches for this device"):
        await second.vouch_for(await id_of(third), await third.fingerprint())
    # And not because the SDK asks itself.
    log = DeviceLog.read(await subscriber_of(second), [each.encode() for each in await world.log(await subscriber_of(second))])
    rogue = Rogue()
    request = keys_pb2.VouchDeviceRequest(device_id=await id_of(third), signature=bytes(64))
    refused = await refusal(world.keys.VouchDevice(request, metadata=world.as_device(await id_of(second), rogue.identity)))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert len(await world.log(await subscriber_of(second))) == log.seq


async def test_another_fingerprint_than_the_one_compared_is_not_vouched_for(world: World) -> None:
    number = world.number()
    first, second = [await world.phone(number) for _ in range(2)]
    with pytest.raises(KeyRefused, match="another fingerprint"):
        await first.vouch_for(await id_of(second), await first.fingerprint())
    with pytest.raises(NotFound):
        await first.vouch_for(DeviceId(uuid7()), await first.fingerprint())
    assert [each.vouched for each in await first.devices()] == [True, False]


async def test_a_vouch_counts_once_for_one_addition_by_the_device_that_signed(world: World) -> None:
    keystore = MemoryKeystore()
    first, rogue, other = await world.phone(world.number(), keystore), Rogue(), Rogue()
    subscriber_id, identity = await subscriber_of(first), keystore.identity()
    assert identity is not None
    await world.slip_in(subscriber_id, rogue, other)

    async def vouch(signature: bytes, rogue: Rogue = rogue, by: IdentityKey = identity) -> Any:
        request = keys_pb2.VouchDeviceRequest(device_id=rogue.device_id, signature=signature)
        return await world.keys.VouchDevice(request, metadata=world.as_device(await id_of(first), by))

    async def signed() -> bytes:
        log = DeviceLog.read(subscriber_id, [each.encode() for each in await world.log(subscriber_id)])
        listed = log.devices[rogue.device_id]
        proof = vouch_proof(listed.device_id, listed.identity_public_key, await id_of(first), listed.added_head)
        return sign_proof(identity, proof)

    signature = await signed()
    for wrong in (b"", bytes(63), bytes(64), sign_proof(other.identity, b"something")):
        assert (await refusal(vouch(wrong))).field == "signature"
    assert (await refusal(vouch(signature, other))).field == "signature"
    # At once and again: an answer may be lost.
    await asyncio.gather(*(vouch(signature) for _ in range(8)))
    await vouch(signature)
    assert [each.kind for each in await world.log(subscriber_id)].count(EntryKind.VOUCHED) == 1
    # The device goes and comes back: the old vouch is for the old addition.
    await world.take_out(subscriber_id, rogue)
    assert (await refusal(vouch(signature))).code is grpc.StatusCode.NOT_FOUND
    await world.slip_in(subscriber_id, rogue)
    assert (await refusal(vouch(signature))).field == "signature"
    await vouch(await signed())
    request = keys_pb2.VouchDeviceRequest(device_id=b"short", signature=signature)
    metadata = world.as_device(await id_of(first), identity)
    assert (await refusal(world.keys.VouchDevice(request, metadata=metadata))).field == "device_id"


async def test_vouches_and_additions_at_once_make_one_chain(world: World) -> None:
    keystore = MemoryKeystore()
    first = await world.phone(world.number(), keystore)
    subscriber_id, rogues = await subscriber_of(first), [Rogue() for _ in range(8)]

    async def come_and_be_vouched_for(rogue: Rogue) -> None:
        await world.slip_in(subscriber_id, rogue)
        await first.vouch_for(rogue.device_id, rogue.fingerprint)

    await asyncio.gather(*map(come_and_be_vouched_for, rogues))
    assert [each.vouched for each in await first.devices()] == [True] * 9
    assert len(await world.log(subscriber_id)) == 17


# --- taking a phone away ----------------------------------------------------------------------------------------------------


async def test_the_owner_takes_a_strangers_phone_away_and_all_that_waited_for_it_ends(world: World) -> None:
    number = world.number()
    owner = await world.phone(number)
    tablet = await world.phone(number)
    async with world.sender() as sender:
        stranger = await world.phone(number)
        assert isinstance(await sender.publish(number, content()), Accepted)
        removed_id = await id_of(stranger)
        await owner.remove_device(removed_id)
        await owner.remove_device(removed_id)
        row = await world.sql.fetchrow('SELECT state, reason FROM "fetch".deliveries WHERE device_id = $1', removed_id)
        assert row is not None
        assert (row["state"], row["reason"]) == (common_pb2.STATE_UNDELIVERED, common_pb2.REASON_CODE_UNREGISTERED)
        assert isinstance(await sender.publish(number, content()), Accepted)
        assert await world.sql.fetchval('SELECT count(*) FROM "fetch".deliveries WHERE device_id = $1', removed_id) == 1
        # Its token still stands for a quarter of an hour, and gives nothing.
        assert await stranger.drain() == []
        assert [each.device_id for each in (await sender.recipient_devices(number)).devices] == [await id_of(owner), await id_of(tablet)]
    with pytest.raises(RegistrationEnded):
        await stranger.update_installation(Installation(locale="uk"))
    with pytest.raises(RegistrationEnded):
        await stranger.drain()
    assert [len(await phone.drain()) for phone in (owner, tablet)] == [2, 2]
    assert [each.device_id for each in await owner.devices()] == [await id_of(owner), await id_of(tablet)]
    await tablet.maintain()
    assert await told(tablet) == [(NoticeKind.ADDED, removed_id), (NoticeKind.REMOVED, removed_id)]
    assert [each.kind for each in await world.log(await subscriber_of(owner))].count(EntryKind.REMOVED) == 1


# What each call of a device carries that is well-formed: a change, for those that are signed, and other fields.
REMOVAL = registration_pb2.DeviceRemoval(device_id=uuid7()).SerializeToString()
PREFERENCE = registration_pb2.Preference(sender_id=uuid7(), mute=True).SerializeToString()
DEVICE_CALLS: dict[str, tuple[Any, bytes | None, dict[str, Any]]] = {
    "/sealpush.v1.Registration/UpdateInstallation": (registration_pb2.UpdateInstallationRequest, b"", {}),
    "/sealpush.v1.Registration/Unregister": (registration_pb2.UnregisterRequest, None, {}),
    "/sealpush.v1.Registration/RemoveDevice": (registration_pb2.RemoveDeviceRequest, REMOVAL, {}),
    "/sealpush.v1.Registration/ListPreferences": (registration_pb2.ListPreferencesRequest, None, {}),
    "/sealpush.v1.Registration/SetPreference": (registration_pb2.SetPreferenceRequest, PREFERENCE, {}),
    "/sealpush.v1.Registration/SetRegistrationLock": (registration_pb2.SetRegistrationLockRequest, b"", {}),
    "/sealpush.v1.Keys/UploadPrekeys": (keys_pb2.UploadPrekeysRequest, b"", {}),
    "/sealpush.v1.Keys/GetPrekeyState": (keys_pb2.GetPrekeyStateRequest, None, {}),
    "/sealpush.v1.Keys/GetDeviceLog": (keys_pb2.GetDeviceLogRequest, None, {"subscriber_id": uuid7()}),
    "/sealpush.v1.Keys/VouchDevice": (keys_pb2.VouchDeviceRequest, None, {"device_id": uuid7(), "signature": bytes(64)}),
    "/sealpush.v1.Messages/Fetch": (messages_pb2.FetchRequest, None, {"wake_up_id": uuid7()}),
    "/sealpush.v1.Messages/Drain": (messages_pb2.DrainRequest, None, {}),
    "/sealpush.v1.Messages/Acknowledge": (messages_pb2.AcknowledgeRequest, None, {}),
}
# The mailbox does not ask whether a device is registered: nothing is open for one that is not.
MAILBOX = {
    "/sealpush.v1.Messages/Fetch": grpc.StatusCode.NOT_FOUND,
    "/sealpush.v1.Messages/Drain": grpc.StatusCode.OK,
    "/sealpush.v1.Messages/Acknowledge": grpc.StatusCode.OK,
}


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call ends, which gives nothing."""
    try:
        assert not getattr(await call, "deliveries", ())
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_removed_phone_is_told_by_every_call_that_it_has_ended_or_gets_nothing(world: World) -> None:
    """Its token stands for a quarter of an hour more."""
    number, keystore = world.number(), MemoryKeystore()
    owner, removed = await world.phone(number), await world.phone(number, keystore)
    async with world.sender() as sender:
        assert isinstance(await sender.publish(number, content()), Accepted)
    device_id, identity = await id_of(removed), keystore.identity()
    assert identity is not None
    await owner.remove_device(device_id)
    metadata = world.as_device(device_id, identity)
    codes = {}
    for counter, (method, (request, change, fields)) in enumerate(DEVICE_CALLS.items(), start=1_000):
        _, service, name = re.split(r"[./](?=[A-Z])", method)
        if "proof" in request.DESCRIPTOR.fields_by_name:
            signature = sign_proof(identity, change_proof(device_id, counter, method, body_digest(change or b"")))
            fields = {**fields, "proof": common_pb2.DeviceProof(counter=counter, signature=signature)}
        if change is not None:
            fields = {**fields, "change": change}
        stub = getattr(world.channels, service.lower())
        codes[method] = await code_of(getattr(stub, name)(request(**fields), metadata=metadata))
    assert codes == {method: MAILBOX.get(method, grpc.StatusCode.UNAUTHENTICATED) for method in DEVICE_CALLS}
    async with contextlib.AsyncExitStack() as ended:
        stream: Any = world.channels.messages.Stream(metadata=metadata)
        ended.callback(stream.cancel)
        assert (await stream.read()).backlog_done, "there is no backlog"
    tried = {*DEVICE_CALLS, "/sealpush.v1.Messages/Stream"}
    assert tried == {method for method, rule in ACCESS.items() if isinstance(rule, AnyDevice)}


async def test_a_phone_whose_prekeys_are_refused_learns_that_it_was_removed(world: World) -> None:
    """Its token is good for some minutes more: the refusal makes it ask for another one."""
    number = world.number()
    owner, stranger = await world.phone(number), await world.phone(number)
    await stranger.drain()
    await owner.remove_device(await id_of(stranger))
    with pytest.raises(RegistrationEnded):
        await stranger.devices()


async def test_a_strangers_phone_cannot_take_the_owners_away(world: World) -> None:
    number = world.number()
    owner, stranger, second_of_the_stranger = [await world.phone(number) for _ in range(3)]
    for device_id in (await id_of(owner), await id_of(second_of_the_stranger), DeviceId(uuid7())):
        with pytest.raises(PermissionDenied, match="use the phone that registered first"):
            await stranger.remove_device(device_id)
    assert len(await owner.devices()) == 3


async def test_a_phone_that_was_vouched_for_takes_others_away_even_the_one_that_vouched(world: World) -> None:
    number = world.number()
    first, second = [await world.phone(number) for _ in range(2)]
    first_id = await id_of(first)
    with pytest.raises(PermissionDenied):
        await second.remove_device(first_id)
    await first.vouch_for(await id_of(second), await second.fingerprint())
    await second.remove_device(first_id)
    assert [(each.device_id, each.vouched) for each in await second.devices()] == [(await id_of(second), True)]
    with pytest.raises(RegistrationEnded):
        await first.remove_device(await id_of(second))


async def test_a_removed_phone_that_registers_again_is_nobodys_trusted_phone(world: World) -> None:
    number = world.number()
    first, second = [await world.phone(number) for _ in range(2)]
    await first.vouch_for(await id_of(second), await second.fingerprint())
    second_id = await id_of(second)
    await first.remove_device(second_id)
    await world.register(second, number)
    assert await id_of(second) == second_id, "the device is the same"
    assert [(each.device_id, each.vouched) for each in await second.devices()] == [(await id_of(first), True), (second_id, False)]
    with pytest.raises(PermissionDenied):
        await second.remove_device(await id_of(first))
    kinds = [EntryKind.ADDED, EntryKind.ADDED, EntryKind.VOUCHED, EntryKind.REMOVED, EntryKind.ADDED]
    entries = await world.log(await subscriber_of(first))
    assert [each.kind for each in entries] == kinds
    assert entries[-1].recovered


async def test_another_persons_phone_and_this_one_are_not_removed(world: World) -> None:
    first, other = await world.phone(world.number()), await world.phone(world.number())
    with pytest.raises(NotFound) as foreign:
        await first.remove_device(await id_of(other))
    with pytest.raises(NotFound) as unknown:
        await first.remove_device(DeviceId(uuid7()))
    assert str(foreign.value) == str(unknown.value)
    with pytest.raises(InvalidRequest, match="call Unregister"):
        await first.remove_device(await id_of(first))
    assert [len(await phone.devices()) for phone in (first, other)] == [1, 1]


async def test_a_device_that_the_server_slipped_in_is_taken_out_again(world: World) -> None:
    owner, rogue = await world.phone(world.number()), Rogue()
    await world.slip_in(await subscriber_of(owner), rogue)
    assert len(await owner.devices()) == 2
    await owner.remove_device(rogue.device_id)
    assert [each.device_id for each in await owner.devices()] == [await id_of(owner)]


async def test_two_trusted_phones_that_remove_each_other_leave_one(world: World) -> None:
    number = world.number()
    first, second = [await world.phone(number) for _ in range(2)]
    await first.vouch_for(await id_of(second), await second.fingerprint())
    pairs = [(first, await id_of(second)), (second, await id_of(first))]
    outcomes = await asyncio.gather(*(phone.remove_device(other) for phone, other in pairs), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "RegistrationEnded"]
    survivor = first if outcomes[0] is None else second
    assert [each.device_id for each in await survivor.devices()] == [await id_of(survivor)]


# --- what senders see -----------------------------------------------------------------------------------------------------


async def test_a_sender_sees_devices_as_their_owner_does_and_burns_no_key(world: World) -> None:
    number = world.number()
    phones = [await world.phone(number) for _ in range(2)]
    async with world.sender() as sender:
        before = await world.sql.fetchval("SELECT count(*) FROM handouts")
        seen = await sender.recipient_devices(number)
        assert await world.sql.fetchval("SELECT count(*) FROM handouts") == before
        assert [each.fingerprint for each in seen.devices] == [await phone.fingerprint() for phone in phones]
        assert [each.vouched for each in seen.devices] == [True, False]
        own = await phones[0].devices()
        assert [each.added_at for each in seen.devices] == [each.added_at for each in own]
        assert seen.identity_changed_at.replace(microsecond=0) == own[-1].added_at.replace(microsecond=0)
        page = await world.store.log(await subscriber_of(phones[0]), 0, 1)
        assert seen.device_list_version == page.head
        with pytest.raises(NotFound) as nobody:
            await sender.recipient_devices("+380509999999")
        assert nobody.value.server_reason == "CONSUMER_PHONE_NOT_FOUND"


async def test_a_query_for_devices_only_takes_no_key_of_another_query_of_its_call(world: World) -> None:
    number = world.number()
    await world.phone(number)
    caller = SenderCaller(world.accounts.sender_id, uuid7(), (APP,), frozenset({"keys"}), ())
    metadata = (("authorization", f"Bearer {world.mesh.keys['accounts'].sender_token(caller)[0]}"),)
    recipient = common_pb2.Recipient(phone=number)
    queries = [keys_pb2.RecipientKeysQuery(request_id="r", recipient=recipient, devices_only=only) for only in (True, False)] + [
        keys_pb2.RecipientKeysQuery(recipient=recipient)
    ]
    answer = await world.keys.GetRecipientKeys(keys_pb2.GetRecipientKeysRequest(queries=queries), metadata=metadata)
    looked, given, refused = answer.results
    assert not looked.keys.devices[0].HasField("one_time_prekey")
    assert given.keys.devices[0].HasField("one_time_prekey")
    assert "request_id" in refused.refused


async def test_sealed_content_goes_to_approved_devices_only(world: World) -> None:
    number = world.number()
    phones = [await world.phone(number) for _ in range(2)]
    async with world.sender() as sender:
        approved = (await sender.recipient_devices(number)).approved
        assert isinstance(await sender.publish_sealed(number, content(), approved_devices=approved), Accepted)
        world.clock.advance(timedelta(seconds=1))
        third = await world.phone(number)
        outcome = await sender.publish_sealed(number, content(), approved_devices=approved)
        assert isinstance(outcome, IdentityChanged)
        assert outcome.device_ids == (await id_of(third),)
        assert outcome.changed_at == (await third.devices())[-1].added_at
        # One that leaves is no reason to hold back.
        await third.unregister()
        await phones[1].unregister()
        assert isinstance(await sender.publish_sealed(number, content(), approved_devices=approved), Accepted)
        # The same id with another key is another device.
        swapped = approved | {await id_of(phones[0]): bytes(32)}
        assert isinstance(await sender.publish_sealed(number, content(), approved_devices=swapped), IdentityChanged)
        with pytest.raises(ValueError, match="the server chooses"):
            await sender.publish(number, content(), approved_devices=approved)


@pytest.mark.parametrize("form", ["plain", "sealed", "batch"])
async def test_nothing_is_stored_for_a_recipient_with_a_device_that_is_too_new(world: World, form: str) -> None:
    number = world.number()
    phones = [await world.phone(number)]
    async with world.sender() as sender:

        async def publish(request_id: str = "") -> PublishOutcome:
            options: dict[str, Any] = {"identity_unchanged_for": timedelta(seconds=30), "request_id": request_id or uuid7().hex()}
            if form == "sealed":
                return await sender.publish_sealed(number, content(), **options)
            if form == "plain":
                return await sender.publish(number, content(), **options)
            [outcome] = await sender.publish_many([Publication.of(number, content(), **options)])
            return outcome

        world.clock.advance(timedelta(seconds=31))
        request_id = uuid7().hex()
        accepted = await publish(request_id)
        assert isinstance(accepted, Accepted)
        phones.append(await world.phone(number))
        outcome = await publish()
        assert isinstance(outcome, IdentityChanged)
        assert outcome.device_ids == (await id_of(phones[1]),)
        assert outcome.changed_at == (await phones[1].devices())[1].added_at
        # What was accepted before keeps its answer, and nothing else was stored.
        assert isinstance(await publish(request_id), Accepted) or form == "sealed"
        for phone in phones:
            await phone.drain()
        assert [len(await phone.inbox()) for phone in phones] == [1, 0]
        world.clock.advance(timedelta(seconds=31))
        assert isinstance(await publish(), Accepted)


async def test_who_took_a_number_over_cannot_get_another_channel_by_blocking_the_sender(world: World) -> None:
    number = world.number()
    await world.phone(number)
    world.clock.advance(timedelta(minutes=2))
    thief = await world.phone(number)
    async with world.sender() as sender:
        await thief.set_preference(world.accounts.sender_id, block_all=True)
        held: dict[str, Any] = {"identity_unchanged_for": timedelta(minutes=1)}
        publications = [Publication.of(number, content(), **held), Publication.of(number, content())]
        outcomes = await sender.publish_many(publications)
        # "Blocked" would let the sender fall back to what the number leads to.
        assert [type(outcome) for outcome in outcomes] == [IdentityChanged, Accepted]
        assert isinstance(outcomes[0], IdentityChanged)
        assert outcomes[0].device_ids == (await id_of(thief),)
        assert isinstance(await sender.publish_sealed(number, content(), **held), IdentityChanged)
