"""Who may speak as a sender, by what its root signed: the same table at publishing, with the real accounts, and on a phone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sealpush.device import Device
from sealpush.envelope import FLAG_SERVER_SEALED, Header, seal
from sealpush.ids import ContentId, SenderId, uuid7
from sealpush.keys import DAY_MS, ContentSigningKey, EntryKey, EntryRole, SenderEntry, SenderMode, sign_sender_entry
from sealpush.memory_keystore import MemoryKeystore
from sealpush.model import Platform, Reason
from sealpush.proofs import AckOutcome
from sealpush.revocations import RevocationList, Revoked, RevokedEntries, RevokedKey, sign_revocations
from sealpush.transport import Channels, Endpoints
from sealpush.v1 import accounts_pb2, accounts_pb2_grpc, common_pb2, content_pb2, publish_pb2, publish_pb2_grpc
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import connect
from sealpushd.platform.server import AddServicer
from sealpushd.platform.tokens import SenderCaller
from sealpushd.v1 import administration_pb2, administration_pb2_grpc, directory_pb2_grpc, sealing_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Refusal, Served, refusal, running_services
from tests.contract.test_publishing import APP, REF, Directory, Person, Sealing
from tests.contract.test_sdk_device import APP as PHONE_APP
from tests.contract.test_sdk_device import PHONE, PLATFORM_KEY, ROOT, SENDER, SENDER_KEY, Service, register, serving, texts
from tests.contract.test_sdk_device import FakeClock as PhoneClock

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

BOTH = SenderMode.END_TO_END | SenderMode.SERVER
PLATFORM_ID = SenderId(b"P" * 16)
# In force when it is put; at the time of the test it lies so many days behind, or ahead.
SERIAL = 5
SPARE_KEY = ContentSigningKey.generate().public_key


@dataclass(frozen=True)
class Case:
    """What the root signed, who seals, and what becomes of a message: published, and at a phone that it reached anyway."""

    name: str
    sealed_by_sender: bool
    # Words of the publisher's refusal and of what the phone notes for itself; "": it passes.
    publish: str = ""
    phone: str = ""
    # The phone waits for a better entry instead of refusing for good.
    held: bool = False
    modes: SenderMode = BOTH
    days: tuple[int, int] = (-1, 1)
    # Of the platform's entry; None: none was put.
    platform_days: tuple[int, int] | None = (-1, 1)
    revoked: tuple[Revoked, ...] = ()
    # Another key in the platform's entry, which it does not seal with.
    platform_spare: bool = False


NEW_ENTRY = "ask the operator to certify a new one"
CASES = [
    Case("sealed by the sender", True),
    Case("sealed by the server", False),
    Case(
        "revoked is another sender, an older entry and another key",
        True,
        revoked=(RevokedEntries(SENDER, SERIAL - 1), RevokedEntries(SenderId(b"T" * 16), 99), RevokedKey(b"k" * 32)),
    ),
    Case("the platform's key is revoked, and the sender seals", True, revoked=(RevokedKey(PLATFORM_KEY.public_key),)),
    Case("the sender's key is revoked, and the server seals", False, revoked=(RevokedKey(SENDER_KEY.public_key),)),
    *(
        case
        for sealed in (True, False)
        for case in (
            Case("expired", sealed, f"has ended; {NEW_ENTRY}", "outside its time; the message waits", held=True, days=(-3, -1)),
            Case("not yet valid", sealed, "not in force before", "outside its time; the message waits", held=True, days=(1, 3)),
            Case(
                "revoked entry",
                sealed,
                f"revoked the sender's entry; {NEW_ENTRY}",
                "revoked the entry of Bank; its operator must certify a new one",
                revoked=(RevokedEntries(SENDER, SERIAL),),
            ),
        )
    ),
    Case(
        "revoked key",
        True,
        "revoked the key that signed the envelope: seal with another key",
        "revoked the key that signed this message; the sender must seal with another one",
        revoked=(RevokedKey(SENDER_KEY.public_key),),
    ),
    Case(
        "revoked key of the platform",
        False,
        "revoked the key that the platform seals with: seal the content yourself",
        "revoked the key that signed this message",
        revoked=(RevokedKey(PLATFORM_KEY.public_key),),
    ),
    Case(
        "revoked key of the platform that has another",
        False,
        "revoked the key that the platform seals with: seal the content yourself",
        "revoked the key that signed this message",
        revoked=(RevokedKey(PLATFORM_KEY.public_key),),
        platform_spare=True,
    ),
    Case("revoked is a key that the platform does not seal with", False, revoked=(RevokedKey(SPARE_KEY),), platform_spare=True),
    Case(
        "revoked entry of the platform",
        False,
        "revoked the key that the platform seals with: seal the content yourself",
        "revoked the entry of Platform",
        revoked=(RevokedEntries(PLATFORM_ID, SERIAL),),
    ),
    Case(
        "expired entry of the platform",
        False,
        f"the entry of the platform's key has ended; {NEW_ENTRY}",
        "outside its time; the message waits",
        held=True,
        platform_days=(-3, -1),
    ),
    Case(
        "entry of the platform that is not valid yet",
        False,
        "the entry of the platform's key is not in force before",
        "outside its time; the message waits",
        held=True,
        platform_days=(1, 3),
    ),
    Case("expired entry of the platform, and the sender seals", True, platform_days=(-3, -1)),
    Case("no entry of the platform", False, "has no entry: seal the content yourself", "impossible length", platform_days=None),
    Case("no entry of the platform, and the sender seals", True, platform_days=None),
    Case("wrong mode", True, "publish the content as `plain`", "does not allow the mode END_TO_END", modes=SenderMode.SERVER),
    Case("wrong mode", False, "end-to-end only: seal the content yourself", "does not allow the mode SERVER", modes=SenderMode.END_TO_END),
]


def name_of(case: Case) -> str:
    return f"{case.name}, {'sealed' if case.sealed_by_sender else 'plain'}"


@dataclass
class Signed:
    """What the root signed for a case."""

    entry: bytes
    platform_entry: bytes
    revocations: bytes

    @classmethod
    def of(cls, case: Case, now_ms: int) -> Signed:
        since, until = (now_ms + days * DAY_MS for days in case.days)
        always = (now_ms - 30 * DAY_MS, now_ms + 30 * DAY_MS)
        sender = SenderEntry(SENDER, "Bank", case.modes, (EntryKey(SENDER_KEY.public_key, *always),), since, until, SERIAL)
        platform_keys: tuple[EntryKey, ...] = (EntryKey(PLATFORM_KEY.public_key, *always),)
        if case.platform_spare:
            platform_keys += (EntryKey(SPARE_KEY, *always),)
        platform_entry = b""
        if case.platform_days is not None:
            since, until = (now_ms + days * DAY_MS for days in case.platform_days)
            platform = SenderEntry(PLATFORM_ID, "Platform", SenderMode.SERVER, platform_keys, since, until, SERIAL, EntryRole.PLATFORM)
            platform_entry = sign_sender_entry(ROOT, platform)
        items = tuple(sorted(case.revoked, key=lambda item: item.encode()))
        revocations = sign_revocations(ROOT, RevocationList(1, now_ms, items))
        return cls(sign_sender_entry(ROOT, sender), platform_entry, revocations)


@dataclass
class World:
    clock: FakeClock
    accounts: Served
    publishing: Served
    operator: MeshChannel
    person: Person
    token: str

    async def administer(self, method: str, request: Any) -> Any:
        return await self.operator.call(getattr(administration_pb2_grpc.AdministrationStub(self.operator.channel), method), request)

    async def administer_at(self, days: tuple[int, int], method: str, request: Any) -> None:
        """In the middle of these days, when accounts still takes the entry."""
        away = timedelta(days=sum(days) / 2)
        self.clock.advance(away)
        await self.administer(method, request)
        self.clock.advance(-away)

    async def put(self, case: Case, signed: Signed) -> None:
        """At a time when accounts still takes the entry; what is revoked comes after it."""
        root = ROOT.public_key
        await self.administer("PutApp", administration_pb2.PutAppRequest(app_id=APP, name="App", root_public_key=root))
        organisation = administration_pb2.PutOrganisationRequest(login="bank", name="Bank", password="a long password")
        organisation_id = (await self.administer("PutOrganisation", organisation)).organisation_id
        if case.platform_days is not None:
            platform = administration_pb2.PutPlatformEntryRequest(platform_entry=signed.platform_entry, root_public_key=root)
            await self.administer_at(case.platform_days, "PutPlatformEntry", platform)
        sender = administration_pb2.PutSenderRequest(
            organisation_id=organisation_id, sender_id=SENDER, name="bank", sender_entry=signed.entry, app_ids=[APP]
        )
        await self.administer_at(case.days, "PutSender", sender)
        revocations = administration_pb2.PutRevocationsRequest(revocations=signed.revocations, root_public_key=root)
        await self.administer("PutRevocations", revocations)

    def request(self, case: Case) -> publish_pb2.PublishRequest:
        made = publish_pb2.PublishRequest(
            request_id=uuid7().hex(),
            recipient=common_pb2.Recipient(phone=PHONE),
            content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        )
        if not case.sealed_by_sender:
            made.plain.CopyFrom(content_pb2.Content(body="text"))
            return made
        now_ms = to_ms(self.clock.now())
        header = Header(ContentId(uuid7()), SENDER, SENDER_KEY.key_id, REF, now_ms, now_ms + 3_600_000)
        recipients = [device.recipient(now_ms) for device in self.person.devices]
        made.sealed.envelope = seal(b"content", header, recipients, SENDER_KEY).encode()
        return made

    async def publish(self, case: Case) -> publish_pb2.PublishResult | Refusal:
        stub: Any = publish_pb2_grpc.PublishingStub(self.publishing.public)
        call = stub.Publish(self.request(case), metadata=(("authorization", f"Bearer {self.token}"),), timeout=LIMIT_S)
        if case.publish:
            return await refusal(call)
        result: publish_pb2.PublishResult = (await call).result
        return result

    async def public_word(self) -> Signed:
        """What accounts tells phones."""
        stub: Any = accounts_pb2_grpc.AccountsStub(self.accounts.public)
        profile = await stub.GetSenderProfile(accounts_pb2.GetSenderProfileRequest(sender_id=SENDER))
        answer = await stub.GetRevocations(accounts_pb2.GetRevocationsRequest(root_public_key=ROOT.public_key))
        return Signed(profile.sender_entry, profile.platform_entry, answer.revocations)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "fetch", "publishing")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    admin = await connect(urls["admin"])
    await admin.execute(
        "TRUNCATE accounts.organisations, accounts.apps, accounts.platform_entries, accounts.revocations, accounts.journal CASCADE"
    )
    await admin.close()
    directory, sealing = Directory(), Sealing()  # type: ignore[abstract]  # they answer only what publishing asks
    now_ms = to_ms(clock.now())
    header = Header(ContentId(uuid7()), SENDER, PLATFORM_KEY.key_id, REF, now_ms, now_ms + 3_600_000, FLAG_SERVER_SEALED)
    sealing.head = header.encode() + bytes(32)
    person = directory.people[PHONE] = Person()
    stand_ins: dict[str, list[AddServicer]] = {
        "registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)],
        "keys": [(sealing_pb2_grpc.add_SealingServicer_to_server, sealing)],
    }
    token = mesh.keys["accounts"].sender_token(SenderCaller(SENDER, uuid7(), (APP,), frozenset({"publish"}), ()))[0]
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins) as services:
        yield World(clock, services["accounts"], services["publishing"], services.channel("accounts", "operator"), person, token)


@pytest.mark.parametrize("case", CASES, ids=name_of)
async def test_publishing_and_phone_agree_and_say_what_to_do(world: World, case: Case) -> None:
    signed = Signed.of(case, to_ms(world.clock.now()))
    await world.put(case, signed)
    published = await world.publish(case)
    if case.publish:
        assert isinstance(published, Refusal)
        assert published.code is grpc.StatusCode.FAILED_PRECONDITION
        assert case.publish in published.message
    else:
        assert isinstance(published, publish_pb2.PublishResult)
        assert published.WhichOneof("outcome") == "accepted"

    told = await world.public_word()
    assert told == signed
    service = Service()
    service.entry, service.platform_entry, service.revocations = told.entry, told.platform_entry, told.revocations
    async with serving(service) as address, Channels(Endpoints.single(address, insecure=True)) as channels:
        device = await register(
            Device(
                PHONE_APP,
                channels,
                MemoryKeystore(),
                root_public_key=ROOT.public_key,
                platform=Platform.IOS,
                one_time_prekeys=0,
                clock=PhoneClock(),
                random=lambda: 0.5,
            )
        )
        key: ContentSigningKey = SENDER_KEY if case.sealed_by_sender else PLATFORM_KEY
        service.send(key=key, flags=0 if case.sealed_by_sender else FLAG_SERVER_SEALED)
        shown = texts(await device.drain())
        noted = (await device.diagnose()).last_error
    if not case.phone:
        assert (shown, service.reasons(), noted) == (["hello"], [(AckOutcome.DELIVERED, Reason.UNSPECIFIED)], "")
        return
    assert shown == []
    assert case.phone in noted
    assert service.reasons() == ([] if case.held else [(AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)])
