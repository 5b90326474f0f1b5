"""registration over real gRPC with real PostgreSQL and Valkey; its peers are small real gRPC servers that remember the calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from sealpush import Device, Endpoints, MemoryKeystore, Platform, RegistrationLocked
from sealpush.errors import InvalidRequest, Overloaded
from sealpush.ids import AppId, DeviceId, RegistrationId, SubscriberId, uuid7
from sealpush.keys import IdentityKey, PrekeyKind, RootKey, generate_prekey
from sealpush.proofs import body_digest, challenge_proof, change_proof, registration_proof
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.v1 import common_pb2, registration_pb2, registration_pb2_grpc
from sealpush.wire import wire_prekey
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Database, connect
from sealpushd.platform.passwords import Argon2
from sealpushd.platform.server import AddServicer
from sealpushd.platform.tokens import DeviceCaller
from sealpushd.platform.vault import Vault
from sealpushd.registration.rules import Lock
from sealpushd.registration.store import RegistrationStore
from sealpushd.simulators.sms import SmsSimulator
from sealpushd.v1 import (
    administration_pb2,
    administration_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    mailbox_pb2,
    mailbox_pb2_grpc,
    sealing_pb2,
    sealing_pb2_grpc,
    simulator_pb2_grpc,
)
from tests.contract.harness import (
    LIMIT_S,
    NOBODY,
    FakeClock,
    Mesh,
    Migrated,
    Peer,
    Refusal,
    Served,
    Services,
    read_refusal,
    refusal,
    running_services,
    until_locked_out,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = AppId("bank-app")
METHOD = "/sealpush.v1.Registration/"
TOKEN = "ab" * 32


class Accounts(administration_pb2_grpc.AdministrationServicer):
    async def GetApps(self, request: Any, context: Any) -> Any:
        known = [app_id for app_id in request.app_ids if app_id in (APP, "other-app")]
        return administration_pb2.GetAppsResponse(apps=[administration_pb2.App(app_id=one, name="Bank") for one in known])


class Keys(sealing_pb2_grpc.SealingServicer):
    def __init__(self) -> None:
        self.put: list[tuple[bytes, bytes]] = []
        self.min_suites: dict[bytes, int] = {}
        self.removed: list[tuple[bytes, bytes]] = []
        # What the device log says: whose list a device is in, and whether it is trusted there.
        self.listed: dict[bytes, tuple[bytes, bool]] = {}
        self.refuse = ""
        # What happens once while registration waits for an answer.
        self.meanwhile: Callable[[], Awaitable[Any]] | None = None

    async def PutDevices(self, request: Any, context: Any) -> Any:
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            await call()
        self.put.extend((one.subscriber_id, one.device_id) for one in request.devices)
        for one in request.devices:
            is_first = all(subscriber_id != one.subscriber_id for subscriber_id, _ in self.listed.values())
            self.listed.setdefault(one.device_id, (one.subscriber_id, is_first))
        self.min_suites.update((one.device_id, one.min_suite) for one in request.devices)
        return sealing_pb2.PutDevicesResponse(refusals=[self.refuse for _ in request.devices])

    async def RemoveDevices(self, request: Any, context: Any) -> Any:
        self.removed.extend((one.subscriber_id, one.device_id) for one in request.devices)
        for one in request.devices:
            self.listed.pop(one.device_id, None)
        return sealing_pb2.RemoveDevicesResponse()

    async def GetListedDevices(self, request: Any, context: Any) -> Any:
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            await call()
        found = [(one, *self.listed[one]) for one in request.device_ids if one in self.listed]
        return sealing_pb2.GetListedDevicesResponse(
            devices=[
                sealing_pb2.ListedDevice(device_id=device_id, subscriber_id=subscriber_id, vouched=vouched)
                for device_id, subscriber_id, vouched in found
            ]
        )


class Mailbox(mailbox_pb2_grpc.MailboxServicer):
    def __init__(self) -> None:
        self.closed: list[tuple[bytes, int]] = []
        self.blocked: list[tuple[bytes, bytes, bool]] = []
        self.called = asyncio.Event()

    async def CloseDevices(self, request: Any, context: Any) -> Any:
        self.closed.extend((one.device_id, one.reason_code) for one in request.devices)
        self.called.set()
        return mailbox_pb2.CloseDevicesResponse(closed=len(request.devices))

    async def Block(self, request: Any, context: Any) -> Any:
        self.blocked.append((request.subscriber_id, request.sender_id, request.advertising_only))
        stopped = common_pb2.StoppedDelivery(
            message_id=bytes(16), stop_point=common_pb2.STOP_POINT_BEFORE_PUSH, state=common_pb2.STATE_BLOCKED
        )
        return mailbox_pb2.BlockResponse(deliveries=[stopped])


@dataclass
class World:
    services: Services
    # The process that is asked.
    served: Served
    directory_channel: MeshChannel
    clock: FakeClock
    sms: SmsSimulator
    keys: Keys
    mailbox: Mailbox
    mailbox_peer: Peer
    urls: dict[str, str]
    mesh: Mesh
    numbers: int = 0

    @property
    def registration(self) -> Any:
        return registration_pb2_grpc.RegistrationStub(self.served.public)

    async def directory(self, method: str, request: Any, channel: MeshChannel | None = None) -> Any:
        channel = channel or self.directory_channel
        return await channel.call(getattr(directory_pb2_grpc.DirectoryStub(channel.channel), method), request)

    def number(self) -> str:
        self.numbers += 1
        return f"+38050100{self.numbers:04d}"

    def start(self, phone: str, app_id: str = APP) -> Any:
        return self.registration.StartRegistration(registration_pb2.StartRegistrationRequest(app_id=app_id, phone=phone, locale="uk-UA"))

    async def resolve(self, phone: str, sender_id: bytes = bytes(16), **fields: Any) -> Any:
        query = directory_pb2.ResolveQuery(
            **{"recipient": common_pb2.Recipient(phone=phone), "app_id": APP, "sender_id": sender_id, **fields}
        )
        return (await self.directory("Resolve", directory_pb2.ResolveRequest(queries=[query]))).results[0]

    async def target(self, device_id: bytes, channel: MeshChannel | None = None) -> Any:
        channel = channel or self.directory_channel
        stub = directory_pb2_grpc.DirectoryStub(channel.channel)
        return (await channel.call(stub.GetPushTargets, directory_pb2.GetPushTargetsRequest(device_ids=[device_id]))).targets[0]

    def code(self, phone: str) -> str:
        found = re.search(r"\b(\d{6})\b", self.sms.inbox(phone)[-1].text)
        assert found is not None
        return found[1]

    async def phone(self, number: str = "", **installation: Any) -> Phone:
        """A registered phone."""
        made = Phone(self, number or self.number())
        await made.register(**installation)
        return made


@dataclass
class Phone:
    """An app instance with its keys."""

    world: World
    number: str
    device_id: DeviceId = field(default_factory=lambda: DeviceId(uuid7()))
    identity: IdentityKey = field(default_factory=IdentityKey.generate)
    app_id: AppId = APP
    counter: int = 0
    token: str = ""
    subscriber_id: bytes = b""

    def confirmation(
        self, registration_id: bytes, code: str, pin: str = "", suite: int = SUITE_X25519, **installation: Any
    ) -> registration_pb2.ConfirmRegistrationRequest:
        now_ms = to_ms(self.world.clock.now())
        _, prekey = generate_prekey(
            self.identity, self.device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=now_ms, suite=suite, min_suite=suite
        )
        said = {"platform": common_pb2.PLATFORM_IOS, "push_token": TOKEN[:-24] + self.device_id.hex()[:24], **installation}
        return registration_pb2.ConfirmRegistrationRequest(
            registration_id=registration_id,
            code=code,
            device_id=self.device_id,
            identity_public_key=self.identity.public_key,
            signed_prekey=wire_prekey(prekey),
            installation=registration_pb2.Installation(**said),
            proof=self.identity.sign(registration_proof(RegistrationId(registration_id), self.identity.public_key, self.app_id)),
            # Phones of suite 1 that were made before the field do not send it.
            min_suite=suite if suite > SUITE_X25519 else 0,
            pin=pin,
        )

    def confirm(self, request: registration_pb2.ConfirmRegistrationRequest) -> Any:
        return self.world.registration.ConfirmRegistration(request)

    async def ask(self, pin: str = "", **installation: Any) -> registration_pb2.ConfirmRegistrationRequest:
        """The confirmation by a new code."""
        self.world.clock.advance(timedelta(seconds=31))
        started = await self.world.start(self.number, self.app_id)
        return self.confirmation(started.registration_id, self.world.code(self.number), pin, **installation)

    async def register(self, pin: str = "", **installation: Any) -> registration_pb2.ConfirmRegistrationRequest:
        started = await self.world.start(self.number)
        request = self.confirmation(started.registration_id, self.world.code(self.number), pin, **installation)
        self.subscriber_id = (await self.confirm(request)).subscriber_id
        return request

    async def challenge(self) -> bytes:
        request = registration_pb2.GetChallengeRequest(device_id=self.device_id)
        challenge: bytes = (await self.world.registration.GetChallenge(request)).challenge
        return challenge

    def answer(self, challenge: bytes, identity: IdentityKey | None = None) -> Any:
        signature = (identity or self.identity).sign(challenge_proof(challenge, self.device_id))
        return self.world.registration.Authenticate(
            registration_pb2.AuthenticateRequest(device_id=self.device_id, challenge=challenge, signature=signature)
        )

    async def authenticate(self) -> str:
        self.token = (await self.answer(await self.challenge())).access_token
        return self.token

    def proof(self, method: str, change: bytes, counter: int | None = None) -> common_pb2.DeviceProof:
        if counter is None:
            self.counter += 1
            counter = self.counter
        statement = change_proof(self.device_id, counter, METHOD + method, body_digest(change))
        return common_pb2.DeviceProof(counter=counter, signature=self.identity.sign(statement))

    def call(self, method: str, request: Any) -> Any:
        return getattr(self.world.registration, method)(request, metadata=(("authorization", f"Bearer {self.token}"),))

    def update(self, counter: int | None = None, **installation: Any) -> Any:
        change = registration_pb2.Installation(**installation).SerializeToString()
        proof = self.proof("UpdateInstallation", change, counter)
        return self.call("UpdateInstallation", registration_pb2.UpdateInstallationRequest(change=change, proof=proof))

    def prefer(self, sender_id: bytes, **fields: bool) -> Any:
        change = registration_pb2.Preference(sender_id=sender_id, **fields).SerializeToString()
        proof = self.proof("SetPreference", change)
        return self.call("SetPreference", registration_pb2.SetPreferenceRequest(change=change, proof=proof))

    def lock(self, pin: str) -> Any:
        change = registration_pb2.RegistrationLock(pin=pin).SerializeToString()
        proof = self.proof("SetRegistrationLock", change)
        return self.call("SetRegistrationLock", registration_pb2.SetRegistrationLockRequest(change=change, proof=proof))

    def unregister(self, counter: int | None = None) -> Any:
        return self.call("Unregister", registration_pb2.UnregisterRequest(proof=self.proof("Unregister", b"", counter)))

    def removal(self, device_id: bytes, counter: int | None = None) -> registration_pb2.RemoveDeviceRequest:
        change = registration_pb2.DeviceRemoval(device_id=device_id).SerializeToString()
        return registration_pb2.RemoveDeviceRequest(change=change, proof=self.proof("RemoveDevice", change, counter))

    def remove(self, device_id: bytes) -> Any:
        return self.call("RemoveDevice", self.removal(device_id))

    async def preferences(self, **page: Any) -> registration_pb2.ListPreferencesResponse:
        listed: registration_pb2.ListPreferencesResponse = await self.call(
            "ListPreferences", registration_pb2.ListPreferencesRequest(**page)
        )
        return listed


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("registration")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    admin = await connect(urls["admin"])
    await admin.execute(
        "TRUNCATE registration.subscribers, registration.registrations, registration.pending_closures, registration.vault_keys CASCADE"
    )
    await admin.close()
    accounts, keys, mailbox = Accounts(), Keys(), Mailbox()  # type: ignore[abstract]  # they answer only what registration asks
    stand_ins: dict[str, list[AddServicer]] = {
        "accounts": [(administration_pb2_grpc.add_AdministrationServicer_to_server, accounts)],
        "keys": [(sealing_pb2_grpc.add_SealingServicer_to_server, keys)],
        "fetch": [(mailbox_pb2_grpc.add_MailboxServicer_to_server, mailbox)],
    }
    settings = {"codes_per_number_hour": 5, "codes_per_address_hour": 40}
    # What registration does beside is started by the tests of it.
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins, settings=settings, work=False) as services:
        channel = services.channel("registration", "publishing")
        yield World(
            services, services["registration"], channel, clock, services.sms, keys, mailbox, services.stand_ins["fetch"], urls, mesh
        )


def dispatch(world: World) -> MeshChannel:
    return world.services.channel("registration", "dispatch")


# --- codes ---------------------------------------------------------------------------------------------------------------


async def test_a_code_names_the_app_and_registers_the_phone(world: World) -> None:
    phone = await world.phone()
    text = world.sms.inbox(phone.number)[-1].text
    assert text.startswith("Bank: ")
    assert "код" in text
    resolved = (await world.resolve(phone.number)).resolved
    assert resolved.subscriber_id == phone.subscriber_id
    assert [(one.device_id, one.platform, one.push_reason) for one in resolved.devices] == [
        (phone.device_id, common_pb2.PLATFORM_IOS, common_pb2.REASON_CODE_UNSPECIFIED)
    ]
    assert world.keys.put == [(phone.subscriber_id, phone.device_id)]
    assert world.mailbox.closed == []


async def test_a_wrong_number_and_an_unknown_app_are_refused_by_field(world: World) -> None:
    for number in ("", "12", "not a number", "+99912345678", "+380" + "5" * 30):
        refused = await refusal(world.start(number))
        assert (refused.code, refused.field) == (StatusCode.INVALID_ARGUMENT, "phone")
    assert (await refusal(world.start(world.number(), "no-app"))).field == "app_id"
    assert (await refusal(world.start(world.number(), "\0"))).field == "app_id"


async def test_a_number_is_the_same_however_it_is_written(world: World) -> None:
    phone = Phone(world, "+380501009999")
    started = await world.start("\u202a+380 (50) 100\u00a099-99\u202c")
    await phone.confirm(phone.confirmation(started.registration_id, world.code(phone.number)))
    assert (await world.resolve("+38 050 100 99 99")).WhichOneof("outcome") == "resolved"
    # Abroad it would be somebody else's.
    for national in ("380501009999", "0501009999"):
        assert (await world.resolve(national)).invalid


async def test_a_number_of_before_a_renumbering_is_the_same_person(world: World) -> None:
    phone = Phone(world, "+2290197123456")
    started = await world.start("+22997123456")
    await phone.confirm(phone.confirmation(started.registration_id, world.code(phone.number)))
    for form in ("+22997123456", "+229 01 97 12 34 56"):
        assert (await world.resolve(form)).WhichOneof("outcome") == "resolved"


async def test_an_operator_says_in_which_country_national_numbers_are_and_which_are_for_tests(world: World) -> None:
    world.served = await world.services.serve("registration", {"default_country": "UA", "test_numbers": "+1555"})
    await world.start("050 100 88 88")
    assert world.code("+380501008888")
    await world.start("+1 555 0199")
    assert world.code("+15550199")
    assert (await refusal(world.start("+380441234"))).field == "phone"


async def test_five_wrong_codes_end_the_registration(world: World) -> None:
    phone = Phone(world, world.number())
    started = await world.start(phone.number)
    code = world.code(phone.number)
    wrong = f"{(int(code) + 1) % 1_000_000:06d}"
    answers = [await refusal(phone.confirm(phone.confirmation(started.registration_id, wrong))) for _ in range(5)]
    assert [(answer.code, answer.field, dict(answer.metadata)["attempts_left"]) for answer in answers] == [
        (StatusCode.INVALID_ARGUMENT, "code", str(left)) for left in (4, 3, 2, 1, 0)
    ]
    ended = await refusal(phone.confirm(phone.confirmation(started.registration_id, code)))
    assert ended.code is StatusCode.FAILED_PRECONDITION
    assert (await world.resolve(phone.number)).not_registered == common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND


async def test_parallel_guesses_are_all_counted(world: World) -> None:
    phone = Phone(world, world.number())
    started = await world.start(phone.number)
    wrong = f"{(int(world.code(phone.number)) + 1) % 1_000_000:06d}"
    answers = await asyncio.gather(*(refusal(phone.confirm(phone.confirmation(started.registration_id, wrong))) for _ in range(20)))
    assert sum(answer.code is StatusCode.INVALID_ARGUMENT for answer in answers) == 5


async def test_an_expired_code_is_refused(world: World) -> None:
    phone = Phone(world, world.number())
    started = await world.start(phone.number)
    world.clock.advance(timedelta(seconds=world.services.settings.code_lifetime_seconds + 1))
    refused = await refusal(phone.confirm(phone.confirmation(started.registration_id, world.code(phone.number))))
    assert refused.code is StatusCode.FAILED_PRECONDITION


async def test_codes_to_a_number_are_limited(world: World) -> None:
    # Begin with a window, so that it does not end in the middle.
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    number = world.number()
    await world.start(number)
    too_soon = await refusal(world.start(number))
    assert too_soon.code is StatusCode.RESOURCE_EXHAUSTED
    assert too_soon.retry_after_s == 30
    assert len(world.sms.inbox(number)) == 1
    for _ in range(4):
        world.clock.advance(timedelta(seconds=31))
        await world.start(number)
    world.clock.advance(timedelta(seconds=31))
    limited = await refusal(world.start(number))
    assert dict(limited.metadata) == {"limit": "codes_per_number"}
    assert limited.retry_after_s is not None
    assert limited.message.endswith("try again in 58 minutes")
    world.clock.advance(timedelta(seconds=limited.retry_after_s))
    await world.start(number)


async def test_who_asks_too_soon_is_told_when_and_uses_nothing_up(world: World) -> None:
    """Five presses of a button: one code, and no hour without one."""
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    number = world.number()
    await world.start(number)
    for seconds in range(1, 30):
        world.clock.advance(timedelta(seconds=1))
        too_soon = await refusal(world.start(number))
        assert too_soon.retry_after_s == 30 - seconds
        assert too_soon.message.endswith(f"in {30 - seconds} second{'s' if seconds < 29 else ''}")
    assert len(world.sms.inbox(number)) == 1
    world.clock.advance(timedelta(seconds=1))
    await world.start(number)
    # Nor of the address, the prefix or the day.
    for _ in range(38):
        await world.start(world.number())


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"codes_per_number_hour": 1}, "codes_per_number"),
        ({"codes_per_number_hour": 3, "codes_per_address_hour": 3}, "codes_per_address"),
        ({"codes_per_number_hour": 3, "codes_per_prefix_hour": 3}, "codes_per_prefix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_code_that_one_limit_refuses_uses_up_no_other(world: World, settings: dict[str, int], limit: str) -> None:
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    world.served = await world.services.serve("registration", settings)
    numbers = [world.number() for _ in range(3)]
    for number in numbers:
        await world.start(number)
    counted = await limit_counts(world)
    for _ in range(5):
        world.clock.advance(timedelta(seconds=31))
        assert dict((await refusal(world.start(numbers[0]))).metadata) == {"limit": limit}
    assert await limit_counts(world) == counted


async def limit_counts(world: World) -> dict[bytes, int]:
    url = world.services.settings.valkey_url
    assert url is not None
    client: Any = Redis.from_url(url.get_secret_value())
    async with client:
        return {key: int(await client.get(key)) for key in sorted(await client.keys("sealpush:limit:*"))}


async def test_of_those_who_ask_for_one_number_at_once_one_gets_a_code_sent(world: World) -> None:
    number = world.number()
    answers = await asyncio.gather(*(_outcome(world.start(number)) for _ in range(10)))
    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    assert len(refused) == 9
    assert {answer.retry_after_s for answer in refused} == {30}
    assert len(world.sms.inbox(number)) == 1


async def test_a_number_waits_for_no_code_of_a_clock_that_was_ahead(world: World) -> None:
    number = world.number()
    world.clock.advance(timedelta(hours=3))
    await world.start(number)
    world.clock.advance(timedelta(hours=-3))
    assert (await refusal(world.start(number))).retry_after_s == 30, "it counts as sent now"
    world.clock.advance(timedelta(seconds=30))
    await world.start(number)
    assert len(world.sms.inbox(number)) == 2


async def test_a_code_of_a_clock_that_was_ahead_is_good_for_no_longer_than_another(world: World) -> None:
    phone = Phone(world, world.number())
    world.clock.advance(timedelta(hours=3))
    started = await world.start(phone.number)
    world.clock.advance(timedelta(hours=-3))
    wrong = phone.confirmation(started.registration_id, f"{(int(world.code(phone.number)) + 1) % 10**6:06d}")
    assert (await refusal(phone.confirm(wrong))).field == "code"
    world.clock.advance(timedelta(seconds=world.services.settings.code_lifetime_seconds))
    right = phone.confirmation(started.registration_id, world.code(phone.number))
    assert (await refusal(phone.confirm(right))).code is StatusCode.FAILED_PRECONDITION


async def test_a_number_over_its_limit_does_not_use_up_the_codes_of_its_neighbours(world: World) -> None:
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    world.served = await world.services.serve("registration", {"codes_per_number_hour": 1, "codes_per_prefix_hour": 2})
    number = world.number()
    neighbour = f"{number[:-1]}{9 - int(number[-1])}"
    await world.start(number)
    for _ in range(3):
        world.clock.advance(timedelta(seconds=31))
        assert dict((await refusal(world.start(number))).metadata) == {"limit": "codes_per_number"}
    await world.start(neighbour)


async def test_codes_to_an_address_are_limited(world: World) -> None:
    for _ in range(world.services.settings.codes_per_address_hour):
        await world.start(world.number())
    limited = await refusal(world.start(world.number()))
    assert limited.code is StatusCode.RESOURCE_EXHAUSTED
    assert dict(limited.metadata) == {"limit": "codes_per_address"}


async def test_without_a_code_channel_registration_says_what_to_set(world: World) -> None:
    world.served = await world.services.serve("registration", {"code_channel": "none"})
    refused = await refusal(world.start(world.number()))
    assert refused.code is StatusCode.FAILED_PRECONDITION
    assert "SEALPUSH_CODE_CHANNEL" in refused.message


async def test_a_code_that_could_not_be_sent_can_be_asked_for_again_at_once_and_counts_for_nothing(world: World) -> None:
    working, number = world.served, world.number()
    world.served = await world.services.serve("registration", {"code_channel_address": NOBODY})
    for _ in range(10):
        assert (await refusal(world.start(number))).code is StatusCode.UNAVAILABLE
    assert set((await limit_counts(world)).values()) == {0}
    world.served = working
    await world.start(number)


class SilentGateway(simulator_pb2_grpc.SimulatedSmsServicer):
    """Takes every code and does not say so."""

    async def Deliver(self, request: Any, context: Any) -> Any:
        await context.abort(StatusCode.DEADLINE_EXCEEDED, "")


async def test_a_code_of_which_nobody_knows_whether_it_was_sent_counts(world: World) -> None:
    """Else a gateway that is slow to answer would let anybody flood a number."""
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    gateway = SilentGateway()  # type: ignore[abstract]  # nothing else is called
    number = world.number()
    async with Peer([(simulator_pb2_grpc.add_SimulatedSmsServicer_to_server, gateway)]) as peer:
        world.served = await world.services.serve("registration", {"code_channel_address": peer.address})
        for _ in range(5):
            assert (await refusal(world.start(number))).code is StatusCode.UNAVAILABLE
        assert dict((await refusal(world.start(number))).metadata) == {"limit": "codes_per_number"}


# --- confirming ------------------------------------------------------------------------------------------------------------


async def test_a_repeated_confirmation_gives_the_same_answer(world: World) -> None:
    phone = Phone(world, world.number())
    request = await phone.register()
    world.clock.advance(timedelta(hours=1))
    assert (await phone.confirm(request)).subscriber_id == phone.subscriber_id
    other = Phone(world, phone.number)
    used = await refusal(other.confirm(other.confirmation(request.registration_id, request.code)))
    assert used.code is StatusCode.FAILED_PRECONDITION


async def test_a_foreign_proof_and_a_foreign_prekey_are_refused(world: World) -> None:
    phone, stranger = Phone(world, world.number()), Phone(world, world.number())
    started = await world.start(phone.number)
    code = world.code(phone.number)
    request = phone.confirmation(started.registration_id, code)
    request.proof = stranger.confirmation(started.registration_id, code).proof
    assert (await refusal(phone.confirm(request))).field == "proof"
    request = phone.confirmation(started.registration_id, code)
    request.signed_prekey.CopyFrom(stranger.confirmation(started.registration_id, code).signed_prekey)
    assert (await refusal(phone.confirm(request))).field == "signed_prekey"
    await phone.confirm(phone.confirmation(started.registration_id, code))


async def test_a_phone_registers_with_the_lowest_suite_that_its_prekey_says(world: World) -> None:
    phone, plain = Phone(world, world.number()), await world.phone()
    started = await world.start(phone.number)
    code = world.code(phone.number)
    for said in (0, 1, 3, 256):
        request = phone.confirmation(started.registration_id, code, suite=SUITE_HYBRID)
        request.min_suite = said
        assert (await refusal(phone.confirm(request))).field == "signed_prekey"
    await phone.confirm(phone.confirmation(started.registration_id, code, suite=SUITE_HYBRID))
    assert world.keys.min_suites == {phone.device_id: SUITE_HYBRID, plain.device_id: SUITE_X25519}


async def test_an_identity_key_that_nobody_can_hold_is_refused(world: World) -> None:
    phone = Phone(world, world.number())
    request = await phone.ask()
    for unusable in (bytes(32), b"\x01" + bytes(31), (2**255 - 18).to_bytes(32, "little"), b"k" * 31):
        request.identity_public_key = unusable
        assert (await refusal(phone.confirm(request))).field == "identity_public_key"


async def test_a_device_id_belongs_to_its_identity_for_ever(world: World) -> None:
    phone = await world.phone()
    thief = Phone(world, world.number(), device_id=phone.device_id)
    started = await world.start(thief.number)
    refused = await refusal(thief.confirm(thief.confirmation(started.registration_id, world.code(thief.number))))
    assert refused.code is StatusCode.ALREADY_EXISTS


async def test_what_keys_refuses_is_not_registered_and_costs_no_attempt(world: World) -> None:
    phone = Phone(world, world.number())
    started = await world.start(phone.number)
    world.keys.refuse = "the prekey is not wanted"
    for _ in range(6):
        refused = await refusal(phone.confirm(phone.confirmation(started.registration_id, world.code(phone.number))))
        assert refused.field == "signed_prekey"
    world.keys.refuse = ""
    await phone.confirm(phone.confirmation(started.registration_id, world.code(phone.number)))
    assert len(set(world.keys.put)) == 1, "a repeated confirmation asks for the same subscriber"


async def test_unknown_platforms_are_refused_by_field(world: World) -> None:
    phone = Phone(world, world.number())
    started = await world.start(phone.number)
    for installation, wrong in (
        ({"platform": 99}, "platform"),
        ({"platform": 0}, "installation.platform"),
        ({"push_environment": 9}, "push_environment"),
        ({"push_token": "../x"}, "push_token"),
        ({"locale": "not a locale"}, "locale"),
        ({"subscriptions": registration_pb2.Subscriptions(names=[""])}, "subscriptions"),
    ):
        request = phone.confirmation(started.registration_id, world.code(phone.number), **installation)
        assert (await refusal(phone.confirm(request))).field == wrong


# --- whose a number is -----------------------------------------------------------------------------------------------------


async def test_a_second_phone_joins_the_person_and_its_decisions(world: World) -> None:
    first, sender_id = await world.phone(), uuid7()
    await first.authenticate()
    await first.prefer(sender_id, mute=True)
    second = await world.phone(first.number)
    assert second.subscriber_id == first.subscriber_id
    resolved = (await world.resolve(first.number, sender_id)).resolved
    assert {one.device_id for one in resolved.devices} == {first.device_id, second.device_id}
    assert resolved.mute


async def test_a_recycled_number_clears_preferences_and_unbinds_the_old_devices(world: World) -> None:
    old, sender_id = await world.phone(), uuid7()
    await old.authenticate()
    await old.prefer(sender_id, block_all=True)
    world.clock.advance(timedelta(days=91))
    new = await world.phone(old.number)
    assert new.subscriber_id != old.subscriber_id
    resolved = (await world.resolve(old.number, sender_id)).resolved
    assert [one.device_id for one in resolved.devices] == [new.device_id]
    assert not resolved.block_all
    assert world.mailbox.closed == [(old.device_id, common_pb2.REASON_CODE_NUMBER_REBOUND)]
    assert world.keys.removed == [(old.subscriber_id, old.device_id)]
    assert (await refusal(old.answer(await old.challenge()))).code is StatusCode.UNAUTHENTICATED
    assert (await world.target(old.device_id, dispatch(world))).push_token == ""


async def test_authentication_keeps_a_number_from_being_recycled(world: World) -> None:
    first = await world.phone()
    world.clock.advance(timedelta(days=80))
    await first.authenticate()
    world.clock.advance(timedelta(days=80))
    assert (await world.phone(first.number)).subscriber_id == first.subscriber_id


async def test_the_same_device_is_the_same_person_after_any_time(world: World) -> None:
    phone = await world.phone()
    subscriber_id = phone.subscriber_id
    world.clock.advance(timedelta(days=400))
    await phone.register()
    assert phone.subscriber_id == subscriber_id
    assert world.mailbox.closed == []


async def test_a_device_that_proves_another_number_moves(world: World) -> None:
    phone, number = await world.phone(), world.number()
    old_number, old_subscriber = phone.number, phone.subscriber_id
    phone.number = number
    await phone.register()
    assert phone.subscriber_id != old_subscriber
    assert world.mailbox.closed == [(phone.device_id, common_pb2.REASON_CODE_NUMBER_REBOUND)]
    assert world.keys.removed == [(old_subscriber, phone.device_id)]
    assert (await world.resolve(old_number)).not_registered == common_pb2.REASON_CODE_NO_APPLICATION
    assert (await world.resolve(number)).resolved.devices[0].device_id == phone.device_id


async def test_a_moved_device_receives_nothing_until_its_old_deliveries_are_closed(world: World) -> None:
    phone = await world.phone()
    await world.mailbox_peer.stop()
    phone.number = world.number()
    await phone.register()
    assert (await world.resolve(phone.number)).not_registered == common_pb2.REASON_CODE_NO_ACTIVE_INSTALLATIONS
    await world.mailbox_peer.start()
    await work_off(world)
    assert (await world.resolve(phone.number)).resolved.devices[0].device_id == phone.device_id


async def work_off(world: World) -> None:
    """Let the service's own background task tell what is due, until the mailbox was called."""
    world.clock.advance(timedelta(minutes=2))
    task = asyncio.create_task(world.served.app.tasks[0]())
    admin = await connect(world.urls["admin"])
    try:
        async with asyncio.timeout(LIMIT_S):
            while await admin.fetchval("SELECT count(*) FROM registration.pending_closures"):
                world.clock.advance(timedelta(minutes=2))
                await asyncio.wait((task,), timeout=0.02)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await admin.close()


async def test_what_must_be_told_survives_a_mailbox_that_is_down_and_a_restart(world: World) -> None:
    phone, sender_id = await world.phone(), uuid7()
    await phone.authenticate()
    await world.mailbox_peer.stop()
    assert len((await phone.prefer(sender_id, block_all=True)).stopped) == 0
    await phone.unregister()
    assert world.mailbox.closed == []
    assert world.keys.removed == [(phone.subscriber_id, phone.device_id)], "one peer's absence does not hold up another"
    world.served = await world.services.serve("registration")
    await world.mailbox_peer.start()
    await work_off(world)
    assert set(world.mailbox.closed) == {(phone.device_id, common_pb2.REASON_CODE_UNREGISTERED)}
    assert set(world.mailbox.blocked) == {(phone.subscriber_id, sender_id, False)}


async def test_what_a_publish_on_its_way_may_have_missed_is_told_once_more(world: World) -> None:
    phone, sender_id = await world.phone(), uuid7()
    await phone.authenticate()
    await phone.prefer(sender_id, block_all=True)
    await phone.unregister()
    assert (len(world.mailbox.blocked), len(world.mailbox.closed)) == (1, 1)
    await work_off(world)
    assert world.mailbox.blocked == [(phone.subscriber_id, sender_id, False)] * 2
    assert world.mailbox.closed == [(phone.device_id, common_pb2.REASON_CODE_UNREGISTERED)] * 2


async def test_a_device_cannot_come_back_before_its_end_is_carried_out(world: World) -> None:
    phone = await world.phone()
    await phone.authenticate()
    await world.mailbox_peer.stop()
    await phone.unregister()
    started = await world.start(phone.number)
    request = phone.confirmation(started.registration_id, world.code(phone.number))
    assert (await refusal(phone.confirm(request))).code is StatusCode.UNAVAILABLE
    await world.mailbox_peer.start()
    async with asyncio.timeout(LIMIT_S):
        while isinstance(answer := await _outcome(phone.confirm(request)), Refusal):
            assert answer.code is StatusCode.UNAVAILABLE
    assert set(world.mailbox.closed) == {(phone.device_id, common_pb2.REASON_CODE_UNREGISTERED)}
    assert (await world.resolve(phone.number)).WhichOneof("outcome") == "resolved"


async def _outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as e:
        return read_refusal(e)


async def test_two_phones_that_register_a_new_number_at_once_become_one_person(world: World) -> None:
    number = world.number()
    phones = [Phone(world, number) for _ in range(3)]
    requests = []
    for phone in phones:
        world.clock.advance(timedelta(seconds=31))
        started = await world.start(number)
        requests.append(phone.confirmation(started.registration_id, world.code(number)))
    answers = await asyncio.gather(*(phone.confirm(request) for phone, request in zip(phones, requests, strict=True)))
    assert len({answer.subscriber_id for answer in answers}) == 1
    assert len((await world.resolve(number)).resolved.devices) == 3


async def test_one_code_brings_one_device_into_the_log_whatever_happens_at_once_or_half_way(world: World) -> None:
    first = Phone(world, world.number())
    started = await world.start(first.number)
    request = first.confirmation(started.registration_id, world.code(first.number))
    others = [Phone(world, first.number) for _ in range(3)]
    requests = [other.confirmation(started.registration_id, world.code(first.number)) for other in others]
    answers: list[Any] = []

    async def guests() -> None:
        answers.extend([await _outcome(other.confirm(asked)) for other, asked in zip(others, requests, strict=True)])
        # The caller left after its device came into the log, and before it was bound.
        raise AssertionError("keys breaks down")

    world.keys.meanwhile = guests
    await refusal(first.confirm(request))
    assert [answer.code for answer in answers] == [StatusCode.FAILED_PRECONDITION] * 3
    assert (await refusal(others[0].confirm(requests[0]))).code is StatusCode.FAILED_PRECONDITION
    await asyncio.gather(*(first.confirm(request) for _ in range(3)))
    assert {device_id for _, device_id in world.keys.put} == {first.device_id}


# --- the registration lock -------------------------------------------------------------------------------------------------

PIN = "271828"


async def locked_phone(world: World) -> Phone:
    """A phone whose person has set a lock."""
    phone = await world.phone()
    await phone.authenticate()
    await phone.lock(PIN)
    return phone


def locked_refusals(cause: str) -> float:
    return REGISTRY.get_sample_value("sealpush_registration_locked_total", {"cause": cause}) or 0


def is_locked(answer: Refusal, left: int) -> bool:
    return (answer.code, answer.reason, dict(answer.metadata)["attempts_left"]) == (
        StatusCode.FAILED_PRECONDITION,
        "REGISTRATION_LOCKED",
        str(left),
    )


async def test_a_locked_number_asks_a_further_device_for_the_pin_and_the_code_stays_good(world: World) -> None:
    counted = {cause: locked_refusals(cause) for cause in ("no_pin", "wrong_pin", "too_many")}
    owner = await locked_phone(world)
    other = Phone(world, owner.number)
    request = await other.ask()
    for _ in range(7):
        refused = await refusal(other.confirm(request))
        assert is_locked(refused, 5), "a missing PIN is no attempt"
    midnight = (world.clock.now() + timedelta(days=31)).strftime("%Y-%m-%dT00:00:00Z")
    assert dict(refused.metadata)["lock_lapses_at"] == midnight
    request.pin = "271829"
    assert is_locked(await refusal(other.confirm(request)), 4)
    assert [one.device_id for one in (await world.resolve(owner.number)).resolved.devices] == [owner.device_id]
    assert world.keys.put == [(owner.subscriber_id, owner.device_id)], "a device that is locked out is in no log"
    request.pin = PIN
    assert (await other.confirm(request)).subscriber_id == owner.subscriber_id
    third = Phone(world, owner.number)
    assert is_locked(await refusal(third.confirm(await third.ask("271829"))), 4), "the right PIN forgot the wrong one"
    assert {cause: locked_refusals(cause) - counted[cause] for cause in counted} == {"no_pin": 7, "wrong_pin": 2, "too_many": 0}


async def test_a_wrong_code_tells_nothing_of_a_lock(world: World) -> None:
    owner = await locked_phone(world)
    other = Phone(world, owner.number)
    request = await other.ask(PIN)
    request.code = f"{(int(request.code) + 1) % 1_000_000:06d}"
    refused = await refusal(other.confirm(request))
    assert (refused.code, refused.field, refused.reason) == (StatusCode.INVALID_ARGUMENT, "code", "INVALID_REQUEST")


async def test_a_lost_answer_of_a_locked_confirmation_is_repeated_without_the_pin(world: World) -> None:
    owner = await locked_phone(world)
    other = Phone(world, owner.number)
    request = await other.ask(PIN)
    await other.confirm(request)
    for pin in (PIN, "", "wrong pin"):
        request.pin = pin
        assert (await other.confirm(request)).subscriber_id == owner.subscriber_id


async def test_a_phone_of_the_person_registers_again_without_the_pin(world: World) -> None:
    owner = await locked_phone(world)
    world.clock.advance(timedelta(days=1))
    await owner.register()
    other = Phone(world, owner.number)
    assert is_locked(await refusal(other.confirm(await other.ask())), 5), "and the lock stays"


async def test_a_device_that_moves_to_a_locked_number_gives_the_pin(world: World) -> None:
    owner, mover = await locked_phone(world), await world.phone()
    old_number, mover.number = mover.number, owner.number
    request = await mover.ask()
    assert is_locked(await refusal(mover.confirm(request)), 5)
    assert (await world.resolve(old_number)).resolved.devices[0].device_id == mover.device_id
    request.pin = PIN
    assert (await mover.confirm(request)).subscriber_id == owner.subscriber_id


async def test_a_lock_stands_before_every_app_of_the_person(world: World) -> None:
    owner = await locked_phone(world)
    other = Phone(world, owner.number, app_id=AppId("other-app"))
    request = await other.ask()
    assert is_locked(await refusal(other.confirm(request)), 5)
    request.pin = PIN
    assert (await other.confirm(request)).subscriber_id == owner.subscriber_id


async def test_an_attempt_counts_for_the_lock_that_was_looked_at_only(world: World) -> None:
    owner = await locked_phone(world)
    db = Database(world.urls["registration"], "registration", 1)
    await db.open()
    store = RegistrationStore(db, Vault(b"d" * 32, b"l" * 32))
    (row,) = await db.fetch("lock", "SELECT pin_hash FROM registration_locks")
    looked_at = Lock(SubscriberId(owner.subscriber_id), row["pin_hash"])
    assert (await store.take_pin_attempt(looked_at, world.clock.now()) or looked_at).wrong_pins == 1
    await owner.lock("161803")
    assert await store.take_pin_attempt(looked_at, world.clock.now()) is None
    await store.forget_pin_attempts(looked_at)
    (row,) = await db.fetch("lock", "SELECT wrong_pins FROM registration_locks")
    assert row["wrong_pins"] == 0
    await owner.lock("")
    assert await store.take_pin_attempt(looked_at, world.clock.now()) is None
    await db.aclose()


async def test_a_lock_is_changed_and_removed_by_any_phone_of_the_person(world: World) -> None:
    owner = await locked_phone(world)
    assert (await owner.preferences()).registration_lock
    second = Phone(world, owner.number)
    await second.confirm(await second.ask(PIN))
    await second.authenticate()
    assert (await second.preferences()).registration_lock
    await second.lock("a longer phrase")
    third = Phone(world, owner.number)
    request = await third.ask(PIN)
    assert is_locked(await refusal(third.confirm(request)), 4)
    await owner.lock("")
    assert not (await second.preferences()).registration_lock
    assert (await third.confirm(request)).subscriber_id == owner.subscriber_id


async def test_a_pin_that_is_too_easy_and_a_foreign_change_are_refused_and_change_nothing(world: World) -> None:
    owner = await locked_phone(world)
    for easy in ("1234", "0000", "271"):
        refused = await refusal(owner.lock(easy))
        assert (refused.code, refused.field) == (StatusCode.INVALID_ARGUMENT, "pin")
    change = registration_pb2.RegistrationLock(pin="314159").SerializeToString()
    request = registration_pb2.SetRegistrationLockRequest(change=change, proof=owner.proof("SetPreference", change))
    assert (await refusal(owner.call("SetRegistrationLock", request))).field == "proof.signature"
    request.proof.CopyFrom(owner.proof("SetRegistrationLock", change, counter=1))
    assert (await refusal(owner.call("SetRegistrationLock", request))).code is StatusCode.ABORTED
    other = Phone(world, owner.number)
    too_long = await other.ask("9" * 1000)
    assert (await refusal(other.confirm(too_long))).field == "pin"
    await other.confirm(await other.ask(PIN))


async def test_a_lock_is_not_changed_without_end(world: World) -> None:
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    owner = await locked_phone(world)
    # No more at once than may wait of one address.
    answers = [answer for _ in range(4) for answer in await asyncio.gather(*(_outcome(owner.lock(PIN)) for _ in range(5)))]
    assert sum(isinstance(answer, Refusal) and answer.code is StatusCode.RESOURCE_EXHAUSTED for answer in answers) == 1
    await owner.lock("")


async def test_of_parallel_guesses_in_two_processes_five_are_looked_at(world: World) -> None:
    owner = await locked_phone(world)
    guessers = [Phone(world, owner.number) for _ in range(2)]
    requests = [await guesser.ask("314159") for guesser in guessers]
    second = await world.services.serve("registration")
    processes = [registration_pb2_grpc.RegistrationStub(one.public) for one in (world.served, second)]
    # Each with the code's own attempts returned at once: the same registration guesses on and on.
    answers = [
        await asyncio.gather(*(_outcome(processes[n % 2].ConfirmRegistration(requests[n % 2])) for n in range(20))),
        await asyncio.gather(*(_outcome(processes[n % 2].ConfirmRegistration(requests[n % 2])) for n in range(4))),
    ]
    refused = [answer for batch in answers for answer in batch]
    assert all(isinstance(answer, Refusal) for answer in refused)
    guessed = [answer for answer in refused if dict(answer.metadata).get("attempts_left") is not None]
    assert sorted(dict(answer.metadata)["attempts_left"] for answer in guessed) == ["0", "1", "2", "3", "4"]
    requests[0].pin = PIN
    limited = await refusal(guessers[0].confirm(requests[0]))
    assert limited.code is StatusCode.RESOURCE_EXHAUSTED, "not even the right one is looked at"
    assert dict(limited.metadata) == {"limit": "registration_lock"}
    assert limited.retry_after_s == pytest.approx(86_400, abs=60)
    requests[0].pin = ""
    assert is_locked(await refusal(guessers[0].confirm(requests[0])), 0)


async def test_who_has_no_pin_left_takes_no_turn_at_hashing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are few: a stranger who guesses at a lock of their own would otherwise hold up everybody's."""
    owner = await locked_phone(world)
    guesser = Phone(world, owner.number)
    request = await guesser.ask("314159")
    for _ in range(5):
        await refusal(guesser.confirm(request))
    asked: list[str] = []
    turn = Argon2.turn

    def watched(argon2: Argon2, subject: str, *, known: bool = False) -> AbstractAsyncContextManager[None]:
        asked.append(subject)
        return turn(argon2, subject, known=known)

    monkeypatch.setattr(Argon2, "turn", watched)
    assert dict((await refusal(guesser.confirm(request))).metadata) == {"limit": "registration_lock"}
    assert asked == []
    other = await locked_phone(world)
    assert is_locked(await refusal(Phone(world, other.number).confirm(await Phone(world, other.number).ask("314159"))), 4)
    assert set(asked) == {"127.0.0.1"}


async def test_who_knows_the_pin_does_not_have_it_hashed_without_end(world: World) -> None:
    world.clock.advance(timedelta(seconds=3600 - world.clock.now().timestamp() % 3600))
    owner = await locked_phone(world)
    other = Phone(world, owner.number)
    request = await other.ask(PIN)
    # What fails behind the lock leaves the code good, and the right PIN takes no attempt.
    world.keys.refuse = "min_suite never goes down"
    answers = await asyncio.gather(*(_outcome(other.confirm(request)) for _ in range(5)))
    answers += [await _outcome(other.confirm(request)) for _ in range(18)]
    world.keys.refuse = ""
    limited = [answer for answer in answers if answer.code is StatusCode.RESOURCE_EXHAUSTED]
    assert 1 <= len(limited) <= 3
    assert {dict(answer.metadata)["limit"] for answer in limited} == {"right_pins_per_lock"}
    world.clock.advance(timedelta(hours=1))
    await other.confirm(await other.ask(PIN))


async def test_attempts_return_after_a_day_and_with_a_new_pin(world: World) -> None:
    owner = await locked_phone(world)
    other = Phone(world, owner.number)

    async def spend() -> None:
        request = await other.ask("314159")
        for left in (4, 3, 2, 1, 0):
            assert is_locked(await refusal(other.confirm(request)), left)
        limited = await refusal(other.confirm(request))
        assert limited.code is StatusCode.RESOURCE_EXHAUSTED

    await spend()
    world.clock.advance(timedelta(days=1))
    await spend()
    await owner.lock("161803")
    world.clock.advance(timedelta(hours=1))
    await other.confirm(await other.ask("161803"))


async def test_a_lock_lapses_after_thirty_days_of_silence_and_who_joins_then_ends_it(world: World) -> None:
    owner = await locked_phone(world)
    world.clock.advance(timedelta(days=29))
    await owner.authenticate()
    world.clock.advance(timedelta(days=29))
    other = Phone(world, owner.number)
    assert is_locked(await refusal(other.confirm(await other.ask())), 5), "authentication keeps it in force"
    world.clock.advance(timedelta(days=2))
    assert (await other.confirm(await other.ask())).subscriber_id == owner.subscriber_id
    third = Phone(world, owner.number)
    await third.confirm(await third.ask())
    await owner.authenticate()
    assert not (await owner.preferences()).registration_lock


async def test_who_joins_after_a_lock_lapsed_does_not_end_the_one_that_is_set_meanwhile(world: World) -> None:
    owner = await locked_phone(world)
    world.clock.advance(timedelta(days=31))
    other = Phone(world, owner.number)
    request = await other.ask()
    admin = await connect(world.urls["admin"])
    async with admin.transaction():
        # Holds up the binding after it has looked at the lock.
        await admin.execute("SELECT 1 FROM registration.identifiers FOR UPDATE")
        joining = asyncio.ensure_future(_outcome(other.confirm(request)))
        await until_locked_out(admin)
        await owner.authenticate()
        await owner.lock("161803")
    await admin.close()
    assert not isinstance(await joining, Refusal)
    third = Phone(world, owner.number)
    assert is_locked(await refusal(third.confirm(await third.ask())), 5)
    await third.confirm(await third.ask("161803"))


async def test_a_lock_that_lapsed_is_in_force_again_when_its_phone_is_used(world: World) -> None:
    owner = await locked_phone(world)
    world.clock.advance(timedelta(days=31))
    await owner.authenticate()
    other = Phone(world, owner.number)
    assert is_locked(await refusal(other.confirm(await other.ask())), 5)


async def test_a_lock_that_comes_into_force_while_a_device_registers_is_asked_for(world: World) -> None:
    owner = await locked_phone(world)
    world.clock.advance(timedelta(days=31))
    other = Phone(world, owner.number)
    request = await other.ask()
    world.keys.meanwhile = owner.authenticate
    assert is_locked(await refusal(other.confirm(request)), 5)
    request.pin = PIN
    await other.confirm(request)
    # And a phone of the person that leaves in the middle of coming again is a further device by then.
    request = await other.ask()
    await other.authenticate()
    world.keys.meanwhile = other.unregister
    assert is_locked(await refusal(other.confirm(request)), 5)


async def test_a_recycled_number_is_not_locked_and_its_old_pin_is_gone(world: World) -> None:
    old = await locked_phone(world)
    world.clock.advance(timedelta(days=91))
    new = await world.phone(old.number)
    assert new.subscriber_id != old.subscriber_id
    await new.authenticate()
    assert not (await new.preferences()).registration_lock
    assert await locks(world) == 0


async def test_when_the_last_phone_leaves_the_lock_goes(world: World) -> None:
    owner = await locked_phone(world)
    second = Phone(world, owner.number)
    await second.confirm(await second.ask(PIN))
    await owner.unregister()
    assert is_locked(await refusal(owner.confirm(await owner.ask())), 5), "an ended installation is like any other device"
    await second.authenticate()
    await second.unregister()
    assert await locks(world) == 0
    await owner.confirm(await owner.ask())


async def test_when_the_last_phone_moves_to_another_number_the_lock_goes(world: World) -> None:
    owner = await locked_phone(world)
    old_number, owner.number = owner.number, world.number()
    await owner.register()
    assert await locks(world) == 0
    await world.phone(old_number)


async def test_a_lock_that_was_set_while_another_device_registers_is_asked_for_or_came_later(world: World) -> None:
    owner = await world.phone()
    await owner.authenticate()
    others = [Phone(world, owner.number) for _ in range(3)]
    requests = [await other.ask() for other in others]
    _, *answers = await asyncio.gather(
        owner.lock(PIN), *(_outcome(other.confirm(request)) for other, request in zip(others, requests, strict=True))
    )
    joined = {one.device_id for one in (await world.resolve(owner.number)).resolved.devices} - {owner.device_id}
    for other, answer in zip(others, answers, strict=True):
        assert isinstance(answer, Refusal) != (other.device_id in joined)
        assert not isinstance(answer, Refusal) or answer.code in (StatusCode.FAILED_PRECONDITION, StatusCode.ABORTED)


async def test_the_sdk_asks_its_user_for_the_pin_and_confirms_with_the_same_code(world: World) -> None:
    def device() -> Device:
        endpoints = Endpoints.single(world.served.public_address, insecure=True)
        return Device(APP, endpoints, MemoryKeystore(), root_public_key=RootKey.generate().public_key, platform=Platform.ANDROID)

    number, owner, other = world.number(), device(), device()
    await owner.start_registration(number)
    await owner.confirm(world.code(number))
    await owner.set_registration_lock("кава о пів на сьому")
    assert await owner.registration_lock()
    assert (await owner.diagnose()).registration_lock
    world.clock.advance(timedelta(seconds=31))
    await other.start_registration(number)
    with pytest.raises(RegistrationLocked) as locked:
        await other.confirm(world.code(number))
    assert (locked.value.attempts_left, locked.value.retryable) == (5, False)
    assert locked.value.lapses_at is not None
    assert timedelta(days=30) <= locked.value.lapses_at - world.clock.now() <= timedelta(days=31)
    for _ in range(5):
        with pytest.raises(RegistrationLocked) as locked:
            await other.confirm(world.code(number), pin="кава о сьомій")
    assert (locked.value.attempts_left, locked.value.retry_after_s) == (0, 86_400)
    with pytest.raises(Overloaded) as limited:
        await other.confirm(world.code(number), pin="кава о пів на сьому")
    assert limited.value.retry_after_s == 86_400
    await owner.set_registration_lock("чай о пів на сьому")
    assert (await other.confirm(world.code(number), pin="чай о пів на сьому")).subscriber_id is not None
    with pytest.raises(InvalidRequest, match="repeat or count"):
        await other.set_registration_lock("1234")
    with pytest.raises(ValueError, match="remove_registration_lock"):
        await other.set_registration_lock(" ")
    await other.remove_registration_lock()
    assert not await owner.registration_lock()
    for each in (owner, other):
        await each.close()


async def test_no_pin_is_in_a_log_line_or_in_the_database(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    owner = await locked_phone(world)
    other = Phone(world, owner.number)
    request = await other.ask("31415926")
    await refusal(other.confirm(request))
    await refusal(owner.lock("31415926" * 5))
    admin = await connect(world.urls["admin"])
    dump = "\n".join(str(row[0]) for row in await admin.fetch("SELECT t::text FROM registration.registration_locks t"))
    await admin.close()
    shown = "".join(capsys.readouterr())
    for secret in (PIN, "31415926"):
        assert secret not in dump
        assert secret.encode().hex() not in dump
        assert secret not in shown
    assert b"$argon2id$".hex() in dump


async def locks(world: World) -> int:
    admin = await connect(world.urls["admin"])
    try:
        return int(await admin.fetchval("SELECT count(*) FROM registration.registration_locks"))
    finally:
        await admin.close()


# --- authentication --------------------------------------------------------------------------------------------------------


async def test_an_answered_challenge_gives_a_device_token(world: World) -> None:
    phone = await world.phone()
    caller = world.mesh.verifier.verify(await phone.authenticate())
    assert caller == DeviceCaller(phone.device_id, SubscriberId(phone.subscriber_id), APP, phone.identity.public_key)


async def test_every_bad_answer_is_refused_alike(world: World) -> None:
    phone, unknown = await world.phone(), Phone(world, world.number())
    older = await phone.challenge()
    world.clock.advance(timedelta(seconds=1))
    newer, expired = await phone.challenge(), await phone.challenge()
    await phone.answer(newer)
    answers = [await refusal(phone.answer(newer)), await refusal(phone.answer(older))]
    world.clock.advance(timedelta(seconds=61))
    fresh = await phone.challenge()
    answers += [
        await refusal(phone.answer(expired)),
        await refusal(phone.answer(fresh, IdentityKey.generate())),
        await refusal(phone.answer(fresh[:-1] + bytes([fresh[-1] ^ 1]))),
        await refusal(phone.answer(await unknown.challenge())),
        await refusal(unknown.answer(await unknown.challenge())),
    ]
    assert {answer.code for answer in answers} == {StatusCode.UNAUTHENTICATED}
    assert len(set(answers)) == 1


async def test_a_clock_that_ran_ahead_and_came_back_locks_no_device_out(world: World) -> None:
    phone = await world.phone()
    ahead = timedelta(days=1)
    world.clock.advance(ahead)
    from_the_future = await phone.challenge()
    await phone.answer(from_the_future)
    world.clock.advance(-ahead)
    answered = await phone.challenge()
    await phone.answer(answered)
    assert {(await refusal(phone.answer(each))).code for each in (from_the_future, answered)} == {StatusCode.UNAUTHENTICATED}
    world.clock.advance(timedelta(seconds=1))
    await phone.authenticate()


async def test_of_many_parallel_answers_to_one_challenge_one_is_accepted(world: World) -> None:
    phone = await world.phone()
    challenge = await phone.challenge()
    answers = await asyncio.gather(*(_outcome(phone.answer(challenge)) for _ in range(16)))
    assert sum(not isinstance(answer, Refusal) for answer in answers) == 1


# --- changes ---------------------------------------------------------------------------------------------------------------


async def test_a_used_counter_aborts_and_changes_nothing(world: World) -> None:
    phone = await world.phone()
    await phone.authenticate()
    await phone.update(counter=7, push_allowed_by_os=False)
    for counter in (7, 6):
        assert (await refusal(phone.update(counter=counter, push_allowed_by_os=True))).code is StatusCode.ABORTED
    assert (await world.resolve(phone.number)).resolved.devices[0].push_reason == common_pb2.REASON_CODE_PUSH_OS_DISABLED
    await phone.update(counter=8, push_allowed_by_os=True)


async def test_a_change_signed_by_another_key_or_over_other_bytes_is_refused(world: World) -> None:
    phone = await world.phone()
    await phone.authenticate()
    own = phone.identity
    phone.identity = IdentityKey.generate()
    assert (await refusal(phone.update(locale="uk"))).field == "proof.signature"
    phone.identity = own
    proof = phone.proof("UpdateInstallation", b"other bytes")
    request = registration_pb2.UpdateInstallationRequest(change=b"", proof=proof)
    assert (await refusal(phone.call("UpdateInstallation", request))).field == "proof.signature"
    proof = phone.proof("UpdateInstallation", b"\xff")
    request = registration_pb2.UpdateInstallationRequest(change=b"\xff", proof=proof)
    assert (await refusal(phone.call("UpdateInstallation", request))).field == "change"
    assert (await refusal(phone.update(platform=77))).field == "platform"


async def test_an_update_changes_what_it_names_and_nothing_else(world: World) -> None:
    phone, channel = await world.phone(push_topic="com.bank"), dispatch(world)
    await phone.authenticate()
    await phone.update(push_token="cd" * 32, push_environment=common_pb2.PUSH_ENVIRONMENT_SANDBOX)
    target = await world.target(phone.device_id, channel)
    assert (target.push_token, target.environment, target.topic, target.app_id) == (
        "cd" * 32,
        common_pb2.PUSH_ENVIRONMENT_SANDBOX,
        "com.bank",
        APP,
    )
    await phone.update(app_version="4.12.0")
    assert (await world.target(phone.device_id, channel)) == target
    await phone.update(push_token="")
    assert (await world.target(phone.device_id, channel)).push_token == ""
    assert (await world.resolve(phone.number)).resolved.devices[0].push_reason == common_pb2.REASON_CODE_NO_PUSH_TOKEN


async def test_a_token_belongs_to_the_installation_that_named_it_last(world: World) -> None:
    before, after = await world.phone(push_token=TOKEN), await world.phone(push_token=TOKEN)
    channel = dispatch(world)
    assert (await world.target(before.device_id, channel)).push_token == ""
    assert (await world.target(after.device_id, channel)).push_token == TOKEN


async def test_unregistering_ends_the_installation_and_can_be_repeated(world: World) -> None:
    phone = await world.phone()
    await phone.authenticate()
    await phone.unregister()
    await phone.unregister(counter=phone.counter)
    assert world.mailbox.closed == [(phone.device_id, common_pb2.REASON_CODE_UNREGISTERED)]
    assert world.keys.removed == [(phone.subscriber_id, phone.device_id)]
    assert (await refusal(phone.update(locale="uk"))).code is StatusCode.UNAUTHENTICATED
    assert (await refusal(phone.answer(await phone.challenge()))).code is StatusCode.UNAUTHENTICATED
    assert (await world.resolve(phone.number)).not_registered == common_pb2.REASON_CODE_NO_ACTIVE_INSTALLATIONS


async def two_phones(world: World) -> tuple[Phone, Phone]:
    """Of one person, both with a token; the log trusts the first."""
    first = await world.phone()
    world.clock.advance(timedelta(seconds=31))
    second = await world.phone(first.number)
    assert second.subscriber_id == first.subscriber_id
    await first.authenticate()
    await second.authenticate()
    return first, second


async def test_a_removed_device_ends_as_if_it_had_unregistered_and_removing_can_be_repeated(world: World) -> None:
    first, second = await two_phones(world)
    await first.remove(second.device_id)
    assert world.mailbox.closed == [(second.device_id, common_pb2.REASON_CODE_UNREGISTERED)]
    assert world.keys.removed == [(second.subscriber_id, second.device_id)]
    assert (await refusal(second.update(locale="uk"))).code is StatusCode.UNAUTHENTICATED
    assert (await refusal(second.answer(await second.challenge()))).code is StatusCode.UNAUTHENTICATED
    assert (await refusal(second.remove(first.device_id))).code is StatusCode.UNAUTHENTICATED
    assert (await world.target(second.device_id, dispatch(world))).push_token == ""
    assert [one.device_id for one in (await world.resolve(first.number)).resolved.devices] == [first.device_id]
    # The answer was lost: the SDK says it again under another counter.
    await first.remove(second.device_id)
    assert (len(world.mailbox.closed), len(world.keys.removed)) == (1, 1)
    await work_off(world)
    assert world.mailbox.closed == [(second.device_id, common_pb2.REASON_CODE_UNREGISTERED)] * 2


async def test_an_old_removal_does_not_strike_a_device_that_came_back(world: World) -> None:
    first, second = await two_phones(world)
    removal = first.removal(second.device_id)
    await first.call("RemoveDevice", removal)
    world.clock.advance(timedelta(seconds=31))
    await second.register()
    assert (await refusal(first.call("RemoveDevice", removal))).code is StatusCode.ABORTED
    assert len((await world.resolve(first.number)).resolved.devices) == 2
    assert world.keys.listed[second.device_id] == (first.subscriber_id, False)


async def test_a_removal_that_is_refused_changes_nothing(world: World) -> None:
    first, second = await two_phones(world)
    stranger = await world.phone()
    assert (await refusal(first.remove(first.device_id))).field == "device_id"
    assert (await refusal(first.remove(b"short"))).field == "device_id"
    unknown = await refusal(first.remove(uuid7()))
    assert unknown.code is StatusCode.NOT_FOUND
    assert await refusal(first.remove(stranger.device_id)) == unknown
    denied = await refusal(second.remove(first.device_id))
    assert denied.code is StatusCode.PERMISSION_DENIED
    assert "use the phone that registered first" in denied.message
    # Whoever may remove nobody learns of nobody.
    assert {await refusal(second.remove(one)) for one in (stranger.device_id, uuid7())} == {denied}
    # Trusted in somebody else's log is not trusted in this one.
    world.keys.listed[second.device_id] = (stranger.subscriber_id, True)
    assert await refusal(second.remove(first.device_id)) == denied
    request = first.removal(second.device_id)
    request.change = registration_pb2.DeviceRemoval(device_id=stranger.device_id).SerializeToString()
    assert (await refusal(first.call("RemoveDevice", request))).field == "proof.signature"
    request = registration_pb2.RemoveDeviceRequest(change=b"\xff", proof=first.proof("RemoveDevice", b"\xff"))
    assert (await refusal(first.call("RemoveDevice", request))).field == "change"
    assert (world.mailbox.closed, world.keys.removed) == ([], [])
    assert len((await world.resolve(first.number)).resolved.devices) == 2


async def test_two_trusted_devices_that_remove_each_other_at_once_leave_one(world: World) -> None:
    for _ in range(5):
        world.clock.advance(timedelta(hours=1))  # for the limit of codes
        first, second = await two_phones(world)
        world.keys.listed[second.device_id] = (second.subscriber_id, True)
        outcomes = await asyncio.gather(_outcome(first.remove(second.device_id)), _outcome(second.remove(first.device_id)))
        [refused] = [one for one in outcomes if isinstance(one, Refusal)]
        assert refused.code is StatusCode.UNAUTHENTICATED
        survivor = first if outcomes[1] is refused else second
        assert [one.device_id for one in (await world.resolve(first.number)).resolved.devices] == [survivor.device_id]


@pytest.mark.parametrize("was_active", [True, False])
async def test_a_device_that_is_removed_while_it_registers_again_is_not_registered(world: World, was_active: bool) -> None:
    first, second = await two_phones(world)
    if not was_active:
        await second.unregister()
        # An attempt before this one got as far as the log.
        world.keys.listed[second.device_id] = (second.subscriber_id, False)
    request = await second.ask()

    async def remove() -> None:
        await first.remove(second.device_id)

    # Between its entry into the log and its commit: active without being in the log, nothing could be sealed to it.
    world.keys.meanwhile = remove
    assert (await refusal(second.confirm(request))).code is StatusCode.FAILED_PRECONDITION
    assert [one.device_id for one in (await world.resolve(first.number)).resolved.devices] == [first.device_id]
    await second.confirm(await second.ask())
    assert len((await world.resolve(first.number)).resolved.devices) == 2


async def test_a_device_that_leaves_by_itself_while_it_is_removed_is_gone(world: World) -> None:
    first, second = await two_phones(world)

    async def leave() -> None:
        await second.unregister()

    world.keys.meanwhile = leave
    await first.remove(second.device_id)
    assert set(world.mailbox.closed) == {(second.device_id, common_pb2.REASON_CODE_UNREGISTERED)}
    assert [one.device_id for one in (await world.resolve(first.number)).resolved.devices] == [first.device_id]


async def test_a_registration_that_was_never_finished_is_removed_from_the_list(world: World) -> None:
    first = await world.phone()
    await first.authenticate()
    ghost = uuid7()
    world.keys.listed[ghost] = (first.subscriber_id, False)
    await first.remove(ghost)
    assert world.keys.removed == [(first.subscriber_id, ghost)]
    assert world.mailbox.closed == []


async def test_a_removal_survives_peers_that_are_down_after_its_commit(world: World) -> None:
    first, second = await two_phones(world)
    await world.mailbox_peer.stop()
    await first.remove(second.device_id)
    assert world.mailbox.closed == []
    await world.mailbox_peer.start()
    await work_off(world)
    assert set(world.mailbox.closed) == {(second.device_id, common_pb2.REASON_CODE_UNREGISTERED)}


async def test_blocking_a_sender_ends_its_queued_deliveries(world: World) -> None:
    phone, sender_id = await world.phone(), uuid7()
    await phone.authenticate()
    stopped = (await phone.prefer(sender_id, block_advertising=True)).stopped
    assert [one.stop_point for one in stopped] == [common_pb2.STOP_POINT_BEFORE_PUSH]
    assert world.mailbox.blocked == [(phone.subscriber_id, sender_id, True)]
    resolved = (await world.resolve(phone.number, sender_id)).resolved
    assert (resolved.block_all, resolved.block_advertising, resolved.mute) == (False, True, False)
    assert not (await world.resolve(phone.number, uuid7())).resolved.block_advertising
    await phone.prefer(sender_id)
    assert not (await world.resolve(phone.number, sender_id)).resolved.block_advertising
    assert len(world.mailbox.blocked) == 1


async def test_preferences_are_listed_in_pages(world: World) -> None:
    phone = await world.phone()
    await phone.authenticate()
    senders = sorted(uuid7() for _ in range(5))
    for sender_id in senders:
        await phone.prefer(sender_id, mute=True)
    listed: list[bytes] = []
    page = await phone.preferences(page_size=2)
    while True:
        listed.extend(one.sender_id for one in page.preferences)
        if not page.next_page_token:
            break
        page = await phone.preferences(page_size=2, page_token=page.next_page_token)
    assert listed == senders
    assert (await refusal(phone.call("ListPreferences", registration_pb2.ListPreferencesRequest(page_size=501)))).field == "page_size"


# --- the directory ---------------------------------------------------------------------------------------------------------


async def test_resolve_answers_each_query_in_order_and_says_why_not(world: World) -> None:
    phone = await world.phone(is_primary=True, subscriptions=registration_pb2.Subscriptions(names=["news", "cards"]))
    android = await world.phone(phone.number, platform=common_pb2.PLATFORM_ANDROID, push_allowed_by_app=False)
    recipient, sender_id = common_pb2.Recipient(phone=phone.number), uuid7()

    def query(**fields: Any) -> directory_pb2.ResolveQuery:
        return directory_pb2.ResolveQuery(**{"recipient": recipient, "app_id": APP, "sender_id": sender_id, **fields})

    queries = [
        query(recipient=common_pb2.Recipient(phone="+380509999999")),
        query(),
        query(recipient=common_pb2.Recipient(phone="12")),
        query(primary_only=True),
        query(platforms=[common_pb2.PLATFORM_ANDROID]),
        query(platforms=[common_pb2.PLATFORM_HUAWEI]),
        query(platforms=[common_pb2.PLATFORM_ANDROID], primary_only=True),
        query(subscriptions=["news"]),
        query(subscriptions=["news", "loans"]),
        query(app_id="other-app"),
        query(recipient=common_pb2.Recipient(rnokpp="1234567890")),
        query(recipient=common_pb2.Recipient(external_user_id="u1")),
        query(recipient=common_pb2.Recipient()),
        query(app_id="\0"),
    ]
    results = (await world.directory("Resolve", directory_pb2.ResolveRequest(queries=queries))).results
    both = {(phone.device_id, common_pb2.REASON_CODE_UNSPECIFIED), (android.device_id, common_pb2.REASON_CODE_PUSH_DISABLED)}
    only, other = {(phone.device_id, common_pb2.REASON_CODE_UNSPECIFIED)}, {(android.device_id, common_pb2.REASON_CODE_PUSH_DISABLED)}
    expected: list[Any] = [
        common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND,
        both,
        "invalid",
        only,
        other,
        common_pb2.REASON_CODE_PLATFORM_NOT_FOUND,
        common_pb2.REASON_CODE_NO_PRIMARY_DEVICES,
        only,
        common_pb2.REASON_CODE_SUBSCRIPTION_FAILED,
        common_pb2.REASON_CODE_NO_APPLICATION,
        common_pb2.REASON_CODE_CONSUMER_ID_NOT_FOUND,
        common_pb2.REASON_CODE_CONSUMER_ID_NOT_FOUND,
        "invalid",
        "invalid",
    ]
    for result, wanted in zip(results, expected, strict=True):
        match result.WhichOneof("outcome"):
            case "resolved":
                assert {(one.device_id, one.push_reason) for one in result.resolved.devices} == wanted
            case "not_registered":
                assert result.not_registered == wanted
            case "invalid":
                assert wanted == "invalid"


async def test_at_most_one_installation_of_a_person_is_primary(world: World) -> None:
    first = await world.phone(is_primary=True)
    second = await world.phone(first.number, is_primary=True)
    await first.authenticate()
    await second.authenticate()

    async def primary() -> list[bytes]:
        return [one.device_id for one in (await world.resolve(first.number, primary_only=True)).resolved.devices]

    assert await primary() == [second.device_id]
    await first.update(is_primary=True)
    assert await primary() == [first.device_id]
    await asyncio.gather(first.update(is_primary=True), second.update(is_primary=True))
    assert len(await primary()) == 1


async def test_a_dead_token_is_forgotten_only_while_it_is_the_same_and_older(world: World) -> None:
    phone, channel = await world.phone(push_token=TOKEN), dispatch(world)
    await phone.authenticate()

    async def report(token: str, after: timedelta | None) -> list[bool]:
        dead = directory_pb2.DeadToken(device_id=phone.device_id, push_token=token)
        if after is not None:
            dead.dead_at.FromDatetime(registered_at + after)
        unknown = directory_pb2.DeadToken(device_id=uuid7(), push_token=token)
        request = directory_pb2.ReportDeadTokensRequest(dead_tokens=[unknown, dead])
        return list((await world.directory("ReportDeadTokens", request, channel)).forgotten)

    registered_at = world.clock.now()
    second = timedelta(seconds=1)
    assert await report("cd" * 32, second) == [False, False]
    assert await report(TOKEN, -second) == [False, False]
    # The app registers the same token again after its death: it lives.
    world.clock.advance(2 * second)
    await phone.update(push_token=TOKEN)
    assert await report(TOKEN, second) == [False, False]
    assert (await world.target(phone.device_id, channel)).push_token == TOKEN
    registered: Timestamp = (await world.target(phone.device_id, channel)).registered_at
    assert abs(registered.ToDatetime().timestamp() - world.clock.now().replace(tzinfo=None).timestamp()) < 0.001
    assert await report(TOKEN, 3 * second) == [False, True]
    assert (await world.target(phone.device_id, channel)).push_token == ""
    assert await report(TOKEN, 3 * second) == [False, False]


async def test_a_device_whose_token_died_is_told_apart_from_one_without_a_token_until_its_app_speaks_of_it_again(world: World) -> None:
    channel = dispatch(world)
    phone, tokenless = await world.phone(), await world.phone(push_token="")
    beside = await world.phone(phone.number)
    await phone.authenticate()

    async def told(of: Phone = phone) -> tuple[int, bool]:
        devices = {one.device_id: one.push_reason for one in (await world.resolve(of.number)).resolved.devices}
        target = await world.target(of.device_id, channel)
        assert target.push_token == "" or not target.token_gone
        return devices[of.device_id], target.token_gone

    async def die() -> None:
        token = (await world.target(phone.device_id, channel)).push_token
        world.clock.advance(timedelta(seconds=1))
        dead = [directory_pb2.DeadToken(device_id=one.device_id, push_token=token) for one in (phone, tokenless, beside)]
        request = directory_pb2.ReportDeadTokensRequest(dead_tokens=dead)
        assert list((await world.directory("ReportDeadTokens", request, channel)).forgotten) == [True, False, False]
        assert await told() == gone

    pushed, gone, none = (0, False), (common_pb2.REASON_CODE_TOKEN_GONE, True), (common_pb2.REASON_CODE_NO_PUSH_TOKEN, False)
    assert await told() == pushed
    await die()
    assert await told(tokenless) == none
    assert await told(beside) == pushed
    # What does not speak of the token changes nothing; that the app asks and fetches is seen by the mailbox.
    await phone.authenticate()
    await phone.update(app_version="4.12.0")
    assert await told() == gone
    await phone.update(push_token="cd" * 32)
    assert await told() == pushed
    await die()
    await phone.update(push_token="")
    assert await told() == none
    await phone.update(push_token="cd" * 32)
    await die()
    # What its user forbade comes first: the app that said so was there.
    await phone.update(push_allowed_by_os=False)
    assert await told() == (common_pb2.REASON_CODE_PUSH_OS_DISABLED, True)
    world.clock.advance(timedelta(minutes=1))
    await phone.register()
    assert await told() == pushed
    await die()
    await phone.unregister()
    assert not (await world.target(phone.device_id, channel)).token_gone
    world.clock.advance(timedelta(minutes=1))
    await phone.register(push_token="")
    assert await told() == none


async def test_a_token_that_another_installation_has_now_is_not_called_dead(world: World) -> None:
    before, after = await world.phone(push_token=TOKEN), await world.phone(push_token=TOKEN)
    world.clock.advance(timedelta(seconds=1))
    dead = directory_pb2.DeadToken(device_id=before.device_id, push_token=TOKEN)
    request = directory_pb2.ReportDeadTokensRequest(dead_tokens=[dead])
    assert list((await world.directory("ReportDeadTokens", request, dispatch(world))).forgotten) == [False]
    assert (await world.resolve(before.number)).resolved.devices[0].push_reason == common_pb2.REASON_CODE_NO_PUSH_TOKEN
    assert (await world.resolve(after.number)).resolved.devices[0].push_reason == 0


async def test_a_new_token_wins_every_race_against_the_death_of_the_old_one(world: World) -> None:
    phone, channel = await world.phone(push_token=TOKEN), dispatch(world)
    await phone.authenticate()
    world.clock.advance(timedelta(seconds=1))
    dead = directory_pb2.DeadToken(device_id=phone.device_id, push_token=TOKEN)
    request = directory_pb2.ReportDeadTokensRequest(dead_tokens=[dead])
    reports = [world.directory("ReportDeadTokens", request, channel) for _ in range(8)]
    await asyncio.gather(*reports[:4], phone.update(push_token="cd" * 32), *reports[4:])
    target = await world.target(phone.device_id, channel)
    assert (target.push_token, target.token_gone) == ("cd" * 32, False)
    assert (await world.resolve(phone.number)).resolved.devices[0].push_reason == 0


async def test_numbers_and_tokens_are_nowhere_in_the_database_in_clear(world: World) -> None:
    phone = await world.phone()
    admin = await connect(world.urls["admin"])
    dump: list[str] = []
    for table in ("identifiers", "installations", "registrations", "subscribers", "preferences", "pending_closures", "limit_counts"):
        dump.extend(str(row[0]) for row in await admin.fetch(f"SELECT t::text FROM registration.{table} t"))  # noqa: S608 - a constant
    await admin.close()
    text = "\n".join(dump)
    code = world.code(phone.number)
    token = TOKEN[:-24] + phone.device_id.hex()[:24]
    for secret in (phone.number[1:], token, code):
        assert secret.encode().hex() not in text
    assert phone.number not in text
    assert token not in text


async def test_a_start_tells_the_servers_time_so_that_the_first_prekey_has_right_times(world: World) -> None:
    started = await world.start(world.number())
    assert started.server_time.ToDatetime(UTC) == world.clock.now()
