"""Publishing over real gRPC: with the real mailbox, and accounts, registration and keys as small as they get."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration

from sealpush.envelope import Envelope, Header, open_envelope, seal
from sealpush.envelope import Recipient as EnvelopeRecipient
from sealpush.ids import ContentId, DeviceId, MessageId, RecipientRef, SenderId, SubscriberId, uuid7
from sealpush.keys import (
    DAY_MS,
    TIME_MS_MAX,
    ContentSigningKey,
    EntryKey,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    SenderEntry,
    SenderMode,
    generate_prekey,
)
from sealpush.proofs import AckOutcome
from sealpush.v1 import common_pb2, content_pb2, publish_pb2, publish_pb2_grpc
from sealpushd.engines import Engines
from sealpushd.fetch import service as mailbox_service
from sealpushd.fetch import wire
from sealpushd.fetch.mailbox import Mailbox
from sealpushd.fetch.rules import Accepted as Stored
from sealpushd.fetch.rules import Ack, NewMessage, TakeQuery
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection
from sealpushd.platform.errors import InvalidRequest, Overloaded
from sealpushd.platform.server import AddServicer
from sealpushd.platform.tokens import SenderCaller
from sealpushd.publishing import peers
from sealpushd.v1 import (
    administration_pb2,
    administration_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    mailbox_pb2,
    sealing_pb2,
    sealing_pb2_grpc,
)
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Peer, Served, refusal, running_services

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = "bank"
PHONE = "+380501234567"
REF = RecipientRef(b"r" * 32)
# One key for all tests of the module: they share a database and so its wrapped keys.
VAULT_KEY = os.urandom(32).hex()


@dataclass
class Device:
    device_id: DeviceId = field(default_factory=lambda: DeviceId(uuid7()))
    identity: IdentityKey = field(default_factory=IdentityKey.generate)
    private: PrekeyPrivate | None = None
    push_reason: int = 0

    def recipient(self, now_ms: int) -> EnvelopeRecipient:
        self.private, prekey = generate_prekey(self.identity, self.device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=now_ms)
        return EnvelopeRecipient.of(self.device_id, prekey)


@dataclass
class Person:
    devices: list[Device] = field(default_factory=lambda: [Device(), Device()])
    subscriber_id: SubscriberId = field(default_factory=lambda: SubscriberId(uuid7()))
    block_all: bool = False
    block_advertising: bool = False
    mute: bool = False


class Administration(administration_pb2_grpc.AdministrationServicer):
    """Accounts: entries of senders."""

    def __init__(self) -> None:
        self.entries: dict[bytes, SenderEntry] = {}
        key = EntryKey(ContentSigningKey.generate().public_key, 0, TIME_MS_MAX)
        self.platform = SenderEntry(SenderId(b"P" * 16), "Platform", SenderMode.SERVER, (key,), 0, TIME_MS_MAX, 1, EntryRole.PLATFORM)

    async def GetSenders(self, request: administration_pb2.GetSendersRequest, context: Any) -> administration_pb2.GetSendersResponse:
        known = [each for each in request.sender_ids if each in self.entries]
        return administration_pb2.GetSendersResponse(
            senders=[
                administration_pb2.Sender(
                    sender_id=each,
                    sender_entry=self.entries[each].encode() + bytes(64),
                    platform_entry=self.platform.encode() + bytes(64),
                )
                for each in known
            ]
        )


class Directory(directory_pb2_grpc.DirectoryServicer):
    """Registration: numbers to people."""

    def __init__(self) -> None:
        self.people: dict[str, Person] = {}
        self.asked = 0

    async def Resolve(self, request: directory_pb2.ResolveRequest, context: Any) -> directory_pb2.ResolveResponse:
        self.asked += len(request.queries)
        return directory_pb2.ResolveResponse(results=[self._resolve(query) for query in request.queries])

    def _resolve(self, query: directory_pb2.ResolveQuery) -> directory_pb2.ResolveResult:
        phone = query.recipient.phone
        if not phone.startswith("+"):
            return directory_pb2.ResolveResult(invalid="write the number in international format")
        person = self.people.get(phone)
        if person is None or query.app_id != APP:
            return directory_pb2.ResolveResult(not_registered=common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND)
        devices = [
            directory_pb2.ResolvedDevice(
                device_id=each.device_id, platform=common_pb2.PLATFORM_IOS, push_reason=common_pb2.ReasonCode.ValueType(each.push_reason)
            )
            for each in person.devices
        ]
        resolved = directory_pb2.Resolved(
            subscriber_id=person.subscriber_id,
            devices=devices,
            block_all=person.block_all,
            block_advertising=person.block_advertising,
            mute=person.mute,
        )
        return directory_pb2.ResolveResult(resolved=resolved)


class Sealing(sealing_pb2_grpc.SealingServicer):
    """Keys: seals for every device but those without a prekey, and knows which stanzas are of now."""

    def __init__(self) -> None:
        self.without_prekey: set[bytes] = set()
        self.sealed = 0
        self.head = b"head"

    async def Seal(self, request: sealing_pb2.SealRequest, context: Any) -> sealing_pb2.SealResponse:
        self.sealed += len(request.items)
        results = []
        for item in request.items:
            stanzas = [
                sealing_pb2.DeviceStanza(device_id=each, stanza=b"stanza " + each)
                for each in item.device_ids
                if each not in self.without_prekey
            ]
            parts = sealing_pb2.SealedParts(content_id=uuid7(), head=self.head, tail=b"sealed " + item.content, stanzas=stanzas)
            results.append(sealing_pb2.SealResult(parts=parts))
        return sealing_pb2.SealResponse(results=results)

    async def CheckStanzas(self, request: sealing_pb2.CheckStanzasRequest, context: Any) -> sealing_pb2.CheckStanzasResponse:
        verdicts = []
        for check in request.checks:
            present = {each.device_id for each in check.stanzas}
            verdicts.append(
                sealing_pb2.StanzaVerdict(
                    missing_device_ids=sorted(set(check.device_ids) - present),
                    surplus_device_ids=sorted(present - set(check.device_ids)),
                    stale_device_ids=sorted(each.device_id for each in check.stanzas if each.prekey_id != 1),
                    device_list_version=b"version",
                    foreign_recipient_ref=check.recipient_ref != REF,
                )
            )
        return sealing_pb2.CheckStanzasResponse(verdicts=verdicts)


@dataclass
class World:
    served: Served
    mailbox: Served
    mesh: Mesh
    clock: FakeClock
    store: MailboxStore
    sql: Connection
    administration: Administration
    directory: Directory
    sealing: Sealing
    stubs: dict[str, Peer]
    key: ContentSigningKey = field(default_factory=ContentSigningKey.generate)
    sender_id: SenderId = field(default_factory=lambda: SenderId(uuid7()))

    @property
    def publishing(self) -> Any:
        return publish_pb2_grpc.PublishingStub(self.served.public)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return self.as_sender(self.sender_id)

    def as_sender(self, sender_id: SenderId, *app_ids: str) -> tuple[tuple[str, str], ...]:
        caller = SenderCaller(sender_id, uuid7(), app_ids or (APP,), frozenset({"publish", "status", "cancel"}), ())
        return (("authorization", f"Bearer {self.mesh.keys['accounts'].sender_token(caller)[0]}"),)

    def certify(self, modes: SenderMode = SenderMode.END_TO_END | SenderMode.SERVER, sender_id: SenderId | None = None) -> None:
        now = to_ms(self.clock.now())
        key = EntryKey(self.key.public_key, now - DAY_MS, now + DAY_MS)
        entry = SenderEntry(sender_id or self.sender_id, "Банк", modes, (key,), now - DAY_MS, now + DAY_MS, 1)
        self.administration.entries[entry.sender_id] = entry

    def person(self, phone: str = PHONE, **decisions: Any) -> Person:
        made = self.directory.people[phone] = Person(**decisions)
        return made

    def request(self, **fields: Any) -> publish_pb2.PublishRequest:
        values: dict[str, Any] = {
            "request_id": uuid7().hex(),
            "recipient": common_pb2.Recipient(phone=PHONE),
            "content_class": common_pb2.CONTENT_CLASS_INFORMATIONAL,
        }
        if "sealed" not in fields:
            values["plain"] = content_pb2.Content(body="text")
        return publish_pb2.PublishRequest(**{**values, **fields})

    def envelope(self, *devices: Device, **header: Any) -> Envelope:
        now_ms = to_ms(self.clock.now())
        made = Header(ContentId(uuid7()), self.sender_id, self.key.key_id, REF, now_ms, now_ms + 3_600_000)
        return seal(b"content", dataclasses.replace(made, **header), [each.recipient(now_ms) for each in devices], self.key)

    def sealed(self, envelope: Envelope, **fields: Any) -> publish_pb2.PublishRequest:
        return self.request(sealed=publish_pb2.SealedContent(envelope=envelope.encode()), **fields)

    async def publish(self, request: publish_pb2.PublishRequest, timeout: float = LIMIT_S) -> publish_pb2.PublishResult:
        result: publish_pb2.PublishResult = (await self.publishing.Publish(request, metadata=self.metadata, timeout=timeout)).result
        return result

    async def batch(self, *requests: publish_pb2.PublishRequest) -> list[publish_pb2.PublishResult]:
        batch = publish_pb2.PublishBatchRequest(requests=requests)
        return list((await self.publishing.PublishBatch(batch, metadata=self.metadata, timeout=LIMIT_S)).results)

    async def status(self, message_id: bytes, wait_s: float | None = None) -> publish_pb2.MessageStatus:
        request = publish_pb2.GetStatusRequest(message_id=message_id)
        if wait_s is not None:
            wait = Duration()
            wait.FromTimedelta(timedelta(seconds=wait_s))
            request.wait.CopyFrom(wait)
        answer: publish_pb2.GetStatusResponse = await self.publishing.GetStatus(request, metadata=self.metadata, timeout=LIMIT_S)
        return answer.status

    async def acknowledge(self, message_id: bytes, device: Device) -> None:
        row = await self.sql.fetchrow("SELECT content_id, sha256(evidence) AS digest FROM messages WHERE message_id = $1", message_id)
        assert row is not None
        ack = Ack(
            MessageId(message_id), DeviceId(device.device_id), row["content_id"], row["digest"], AckOutcome.DELIVERED, 0, 1, bytes(64)
        )
        await self.store.acknowledge([ack])

    async def grace_over(self, message_id: bytes) -> None:
        """Let the grace of a message's dead tokens end now; the mailbox's own sweep finds it."""
        await self.sql.execute("UPDATE open_deliveries SET closes_at = now() WHERE message_id = $1 AND close_reason = 105", message_id)

    async def stored(self) -> int:
        return int(await self.sql.fetchval("SELECT count(*) FROM messages WHERE sender_id = $1", self.sender_id))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "publishing")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    administration, directory, sealing = Administration(), Directory(), Sealing()  # type: ignore[abstract]  # asked for nothing else
    stand_ins: dict[str, list[AddServicer]] = {
        "accounts": [(administration_pb2_grpc.add_AdministrationServicer_to_server, administration)],
        "registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)],
        "keys": [(sealing_pb2_grpc.add_SealingServicer_to_server, sealing)],
    }
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins) as services:
        made = World(
            services["publishing"],
            services["fetch"],
            mesh,
            clock,
            MailboxStore(await services.database("fetch")),
            await services.sql("fetch"),
            administration,
            directory,
            sealing,
            services.stand_ins,
        )
        made.certify()
        yield made


# Accepting


async def test_a_plain_message_is_sealed_for_every_device_and_stored(world: World) -> None:
    person = world.person()
    result = await world.publish(world.request(tag="мітка", lifetime=Duration(seconds=60)))
    assert result.WhichOneof("outcome") == "accepted"
    assert result.accepted.devices == 2
    assert not result.accepted.repeated_request
    assert result.accepted.expires_at.ToMilliseconds() == to_ms(world.clock.now() + timedelta(seconds=60))
    status = await world.status(result.accepted.message_id)
    assert (status.state, status.tag) == (common_pb2.STATE_QUEUED, "мітка")
    assert {each.device_id for each in status.deliveries} == {each.device_id for each in person.devices}
    ((taken,),) = await world.store.take([TakeQuery(person.devices[0].device_id, most=10)])
    assert taken.stanza == b"stanza " + person.devices[0].device_id
    assert content_pb2.Content.FromString(taken.tail.removeprefix(b"sealed ")).body == "text"


async def test_the_same_request_again_gets_the_first_answer_and_stores_nothing(world: World) -> None:
    world.person()
    request = world.request()
    first, again = await world.publish(request), await world.publish(request)
    assert again.accepted.repeated_request
    again.accepted.repeated_request = False
    assert again == first
    assert await world.stored() == 1


@pytest.mark.parametrize("release", ["this", "before"])
async def test_a_message_that_the_mailbox_refuses_fails_alone(world: World, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Nothing that publishing lets in, until one of the two knows a rule that the other does not."""
    world.person()
    parse, calls = wire.parse_message, []

    def strict(proto: mailbox_pb2.NewMessage) -> NewMessage:
        calls.append(proto.tag)
        if proto.tag == "wrong":
            raise InvalidRequest("this mailbox knows no such tag", field="tag")
        return parse(proto)

    request = mailbox_pb2.StoreRequest

    def before(messages: Sequence[mailbox_pb2.NewMessage], *, item_errors: bool) -> mailbox_pb2.StoreRequest:
        """What a mailbox sees that does not know the flag."""
        assert item_errors
        return request(messages=messages)

    requests = [world.request(tag="wrong" if n == 3 else "right") for n in range(8)]
    with monkeypatch.context() as patched:
        patched.setattr(mailbox_service, "parse_message", strict)
        if release == "before":
            patched.setattr(mailbox_pb2, "StoreRequest", before)
        results = await world.batch(*requests)
    assert [result.HasField("accepted") for result in results] == [n != 3 for n in range(8)]
    assert (results[3].refusal.code, results[3].refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "tag")
    assert not results[3].refusal.HasField("retry_after")
    assert await world.stored() == 7
    assert (len(calls) > 8) is (release == "before")


@pytest.mark.parametrize("field_", ["tag", "replace_key", "originator"])
async def test_a_control_character_of_the_upper_range_is_refused_at_the_door(world: World, field_: str) -> None:
    world.person()
    good, wrong = world.request(), world.request(**{field_: "a\x85"})
    accepted, refused = await world.batch(good, wrong)
    assert accepted.HasField("accepted")
    assert (refused.refusal.code, refused.refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], field_)


async def test_what_a_batch_stored_before_the_mailbox_was_overloaded_is_told_as_stored_and_only_the_rest_as_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.person()
    stored, calls = Mailbox.store, []

    async def store(self: Mailbox, messages: Sequence[NewMessage]) -> list[tuple[Stored, bool] | Exception]:
        calls.append(len(messages))
        if len(calls) > 1:
            raise Overloaded("full")
        return await stored(self, messages)

    # Of 2 MiB as the sender sends it, and of more with what is sealed to devices: it goes to the mailbox in two parts.
    plain = content_pb2.Content(body="x" * 40_900)
    requests = [world.request(plain=plain) for _ in range(51)]
    with monkeypatch.context() as patched:
        patched.setattr(Mailbox, "store", store)
        results = await world.batch(*requests)
    assert len(calls) == 2
    accepted = [result.request_id for result in results if result.HasField("accepted")]
    assert len(accepted) == calls[0] == await world.stored()
    assert {result.refusal.reason for result in results if result.request_id not in accepted} == {"OVERLOADED"}


async def test_an_envelope_whose_time_is_over_is_refused_with_a_word_of_its_own_and_one_that_was_stored_gets_its_answer(
    world: World,
) -> None:
    (device, *_) = world.person(devices=[Device()]).devices
    expires_at_ms = to_ms(world.clock.now()) + 60_000
    late, stored = (world.sealed(world.envelope(device, expires_at_ms=expires_at_ms)) for _ in range(2))
    first = await world.publish(stored)
    world.clock.advance(timedelta(minutes=2))
    answer = await refusal(world.publish(late))
    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ENVELOPE_EXPIRED")
    assert (await world.publish(stored)).accepted.message_id == first.accepted.message_id


async def test_another_request_with_the_same_id_is_refused_whatever_differs(world: World) -> None:
    world.person()
    request = world.request()
    await world.publish(request)
    for change in ({"tag": "x"}, {"priority": 3}, {"lifetime": Duration(seconds=60)}, {"plain": content_pb2.Content(body="other")}):
        other = world.request(request_id=request.request_id, **change)
        answer = await refusal(world.publish(other))
        assert (answer.code, answer.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
    assert await world.stored() == 1


async def test_two_senders_may_use_the_same_request_id(world: World) -> None:
    world.person()
    other = SenderId(uuid7())
    world.certify(sender_id=other)
    request = world.request()
    first = await world.publish(request)
    second = (await world.publishing.Publish(request, metadata=world.as_sender(other), timeout=LIMIT_S)).result
    assert not second.accepted.repeated_request
    assert second.accepted.message_id != first.accepted.message_id


async def test_a_refusal_and_a_not_registered_do_not_use_up_the_request_id(world: World) -> None:
    world.directory.people.clear()
    request = world.request()
    result = await world.publish(request)
    assert result.not_registered.reason_code == common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND
    assert await world.stored() == 0
    wrong = world.request(request_id=request.request_id, content_class=0)
    assert (await refusal(world.publish(wrong))).code is grpc.StatusCode.INVALID_ARGUMENT
    world.person()
    assert (await world.publish(request)).WhichOneof("outcome") == "accepted"


async def test_a_malformed_recipient_is_refused_with_what_to_do(world: World) -> None:
    answer = await refusal(world.publish(world.request(recipient=common_pb2.Recipient(phone="050"))))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, "recipient")
    assert "international" in answer.message


async def test_text_that_is_no_utf_8_is_refused(world: World) -> None:
    world.person()
    raw = world.request(tag="AB").SerializeToString().replace(b"AB", b"\xff\xfe")
    call: Any = world.served.public.unary_unary("/sealpush.v1.Publishing/Publish")
    answer = await refusal(call(raw, metadata=world.metadata, timeout=LIMIT_S))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert await world.stored() == 0


async def test_a_text_that_the_database_cannot_hold_is_refused_alone(world: World) -> None:
    world.person()
    good, bad = await world.batch(world.request(tag="good"), world.request(tag="b\0d"))
    assert good.WhichOneof("outcome") == "accepted"
    assert (bad.refusal.code, bad.refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "tag")


async def test_an_app_that_was_not_granted_is_forbidden(world: World) -> None:
    world.person()
    assert (await refusal(world.publish(world.request(app_id="other")))).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_sender_without_an_entry_is_refused_and_an_end_to_end_one_for_plain_contents(world: World) -> None:
    person = world.person()
    world.certify(SenderMode.END_TO_END)
    answer = await refusal(world.publish(world.request()))
    assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "end-to-end" in answer.message
    assert (await world.publish(world.sealed(world.envelope(*person.devices)))).WhichOneof("outcome") == "accepted"
    stranger = await refusal(world.publishing.Publish(world.request(), metadata=world.as_sender(SenderId(uuid7())), timeout=LIMIT_S))
    assert stranger.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_device_that_nothing_could_be_sealed_for_is_told_and_does_not_stop_the_others(world: World) -> None:
    person = world.person()
    world.sealing.without_prekey = {person.devices[0].device_id}
    result = await world.publish(world.request())
    status = await world.status(result.accepted.message_id)
    told = {each.device_id: (each.state, each.reason_code) for each in status.deliveries}
    assert told == {
        person.devices[0].device_id: (common_pb2.STATE_UNDELIVERED, common_pb2.REASON_CODE_NO_PREKEY),
        person.devices[1].device_id: (common_pb2.STATE_QUEUED, 0),
    }


async def test_advertising_that_is_blocked_is_not_even_sealed_and_other_messages_pass(world: World) -> None:
    world.person(block_advertising=True)
    result = await world.publish(world.request(content_class=common_pb2.CONTENT_CLASS_ADVERTISING))
    status = await world.status(result.accepted.message_id)
    assert (status.state, status.reason_code) == (common_pb2.STATE_BLOCKED, common_pb2.REASON_CODE_ADVERTISING_BLOCKED)
    assert world.sealing.sealed == 0
    passed = await world.publish(world.request())
    assert (await world.status(passed.accepted.message_id)).state == common_pb2.STATE_QUEUED
    world.person(block_all=True)
    blocked = await world.publish(world.request())
    assert (await world.status(blocked.accepted.message_id)).reason_code == common_pb2.REASON_CODE_SENDER_BLOCKED


async def test_a_muted_sender_is_delivered_without_a_notification(world: World) -> None:
    person = world.person(mute=True)
    await world.publish(world.request())
    ((taken,),) = await world.store.take([TakeQuery(person.devices[0].device_id, most=10)])
    assert taken.muted


async def test_a_later_message_with_the_same_replace_key_replaces_the_first(world: World) -> None:
    world.person()
    first = await world.publish(world.request(replace_key="balance"))
    other = await world.publish(world.request(replace_key="other"))
    second = await world.publish(world.request(replace_key="balance"))
    states = [(await world.status(each.accepted.message_id)).state for each in (first, other, second)]
    assert states == [common_pb2.STATE_REPLACED, common_pb2.STATE_QUEUED, common_pb2.STATE_QUEUED]
    kept = await world.sql.fetch("SELECT replace_hash FROM open_deliveries WHERE sender_id = $1", world.sender_id)
    assert all(len(row["replace_hash"]) == 32 for row in kept)


# Sealed by the sender


async def test_a_sealed_message_reaches_its_devices_as_the_sender_made_it(world: World) -> None:
    person = world.person()
    envelope = world.envelope(*person.devices)
    result = await world.publish(world.sealed(envelope))
    assert world.sealing.sealed == 0
    ((taken,),) = await world.store.take([TakeQuery(person.devices[1].device_id, most=10)])
    assert taken.message_id == result.accepted.message_id
    one = envelope.for_device(person.devices[1].device_id)
    assert taken.head + b"\x00\x01" + taken.stanza + taken.tail == one
    opened = open_envelope(
        one,
        device_id=person.devices[1].device_id,
        private_prekey_lookup=lambda suite, prekey_id, kind: person.devices[1].private,
        sender_public_key=world.key.public_key,
    )
    assert opened == b"content"


async def test_a_sealed_message_is_repeated_after_its_creation_time_is_long_past(world: World) -> None:
    person = world.person()
    request = world.sealed(world.envelope(*person.devices))
    first = await world.publish(request)
    world.clock.advance(timedelta(minutes=6))
    again = await world.publish(request)
    assert again.accepted.repeated_request
    assert again.accepted.message_id == first.accepted.message_id
    # A new one with that creation time is refused.
    request.request_id = uuid7().hex()
    answer = await refusal(world.publish(request))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sealed.envelope")


async def test_a_batch_of_a_sender_that_was_removed_repeats_what_was_accepted_and_refuses_the_rest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.person()
    request = world.request()
    first = await world.publish(request)
    del world.administration.entries[world.sender_id]
    monkeypatch.setattr(peers, "STANDING_FRESH_S", 0.0)
    again, new = await world.batch(request, world.request())
    assert again.accepted.message_id == first.accepted.message_id
    assert new.refusal.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    # Removed stays removed, also when accounts is away.
    await world.stubs["accounts"].stop()
    assert (await refusal(world.publish(world.request()))).code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "header",
    [{"sender_id": SenderId(b"o" * 16)}, {"recipient_ref": RecipientRef(b"f" * 32)}, {"flags": 1}],
    ids=["another sender", "another recipient", "as the server"],
)
async def test_an_envelope_that_says_something_else_than_its_sender_is_refused(world: World, header: dict[str, Any]) -> None:
    person = world.person()
    answer = await refusal(world.publish(world.sealed(world.envelope(*person.devices, **header))))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sealed.envelope")
    assert await world.stored() == 0


async def test_an_envelope_with_a_bad_signature_is_refused(world: World) -> None:
    person = world.person()
    request = world.sealed(world.envelope(*person.devices))
    data = bytearray(request.sealed.envelope)
    data[-1] ^= 1
    request.sealed.envelope = bytes(data)
    assert (await refusal(world.publish(request))).field == "sealed.envelope"


async def test_an_envelope_for_other_devices_than_those_of_now_gets_a_typed_answer_and_stores_nothing(world: World) -> None:
    person = world.person()
    gone = Device()
    request = world.sealed(world.envelope(person.devices[0], gone))
    result = await world.publish(request)
    assert list(result.outdated_devices.missing_device_ids) == [person.devices[1].device_id]
    assert list(result.outdated_devices.surplus_device_ids) == [gone.device_id]
    assert result.outdated_devices.device_list_version == b"version"
    assert await world.stored() == 0
    # The key is free: sealed again, it is accepted.
    again = world.sealed(world.envelope(*person.devices), request_id=request.request_id)
    assert (await world.publish(again)).WhichOneof("outcome") == "accepted"


# Devices whose token is dead


async def test_a_message_to_nobody_but_dead_tokens_is_accepted_says_so_at_once_and_ends_after_the_grace(world: World) -> None:
    person = world.person(devices=[Device(push_reason=common_pb2.REASON_CODE_TOKEN_GONE) for _ in range(2)])
    result = await world.publish(world.request())
    assert (result.WhichOneof("outcome"), result.accepted.devices) == ("accepted", 2)
    message_id = result.accepted.message_id
    status = await world.status(message_id)
    assert (status.state, status.reason_code) == (common_pb2.STATE_QUEUED, 0)
    assert {(each.state, each.push_reason) for each in status.deliveries} == {(common_pb2.STATE_QUEUED, common_pb2.REASON_CODE_TOKEN_GONE)}
    async with asyncio.timeout(LIMIT_S):
        waiting = asyncio.create_task(world.status(message_id, 8))
        await world.grace_over(message_id)
        ended = await waiting
    assert (ended.state, ended.reason_code) == (common_pb2.STATE_UNDELIVERED, common_pb2.REASON_CODE_TOKEN_GONE)
    assert {each.reason_code for each in ended.deliveries} == {common_pb2.REASON_CODE_TOKEN_GONE}
    await world.acknowledge(message_id, person.devices[0])
    late = await world.status(message_id)
    assert late.state == common_pb2.STATE_UNDELIVERED
    assert any(each.HasField("late_ack_at") for each in late.deliveries)


async def test_a_dead_token_beside_a_living_device_ends_its_own_delivery_only(world: World) -> None:
    dead, alive = Device(push_reason=common_pb2.REASON_CODE_TOKEN_GONE), Device()
    world.person(devices=[dead, alive])
    message_id = (await world.publish(world.request())).accepted.message_id
    await world.grace_over(message_id)
    async with asyncio.timeout(LIMIT_S):
        status = await world.status(message_id)
        while common_pb2.STATE_UNDELIVERED not in {each.state for each in status.deliveries}:
            status = await world.status(message_id)
    told = {each.device_id: (each.state, each.reason_code) for each in status.deliveries}
    assert told == {
        dead.device_id: (common_pb2.STATE_UNDELIVERED, common_pb2.REASON_CODE_TOKEN_GONE),
        alive.device_id: (common_pb2.STATE_QUEUED, 0),
    }
    assert status.state == common_pb2.STATE_QUEUED
    await world.acknowledge(message_id, alive)
    assert (await world.status(message_id)).state == common_pb2.STATE_DELIVERED


async def test_a_device_without_a_token_that_comes_online_in_the_grace_gets_its_message(world: World) -> None:
    person = world.person(devices=[Device(push_reason=common_pb2.REASON_CODE_TOKEN_GONE)])
    message_id = (await world.publish(world.request())).accepted.message_id
    ((taken,),) = await world.store.take([TakeQuery(person.devices[0].device_id, most=10)])
    assert taken.message_id == message_id
    (delivery,) = (await world.status(message_id)).deliveries
    assert (delivery.state, delivery.push_reason) == (common_pb2.STATE_FETCHED, common_pb2.REASON_CODE_NO_PUSH_TOKEN)
    await world.acknowledge(message_id, person.devices[0])
    assert (await world.status(message_id)).state == common_pb2.STATE_DELIVERED


# Batches and streams


async def test_a_batch_answers_each_message_in_its_order(world: World) -> None:
    world.person()
    same = world.request()
    requests = [
        world.request(),
        world.request(content_class=0),
        world.request(recipient=common_pb2.Recipient(phone="+1")),
        same,
        world.request(request_id="not an id"),
        same,
        world.request(request_id=same.request_id, tag="other"),
    ]
    results = await world.batch(*requests)
    assert [each.request_id for each in results] == [each.request_id for each in requests]
    assert [each.WhichOneof("outcome") for each in results] == [
        "accepted",
        "refusal",
        "not_registered",
        "accepted",
        "refusal",
        "accepted",
        "refusal",
    ]
    assert results[1].refusal.field == "content_class"
    assert not results[1].refusal.HasField("retry_after")
    assert (results[3].accepted.repeated_request, results[5].accepted.repeated_request) == (False, True)
    assert results[3].accepted.message_id == results[5].accepted.message_id
    assert results[6].refusal.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert await world.stored() == 2


async def test_a_batch_over_its_bounds_is_refused_and_an_empty_one_is_not(world: World) -> None:
    world.person()
    assert await world.batch() == []
    assert len(await world.batch(*(world.request() for _ in range(512)))) == 512
    too_many = await refusal(world.batch(*(world.request() for _ in range(513))))
    assert (too_many.code, too_many.field) == (grpc.StatusCode.INVALID_ARGUMENT, "requests")
    large = world.request(plain=content_pb2.Content(body="x" * 60_000))
    assert (await refusal(world.batch(*[large] * 36))).field == "requests"


async def test_a_stream_answers_each_frame_with_its_number_and_ends_when_the_sender_does(world: World) -> None:
    world.person()
    call = world.publishing.PublishStream(metadata=world.metadata, timeout=LIMIT_S)
    frames = {n: [world.request() for _ in range(n)] for n in range(1, 21)}

    async def write() -> None:
        for number, requests in frames.items():
            await call.write(publish_pb2.PublishStreamRequest(frame=number, requests=requests))
        await call.done_writing()

    writing = asyncio.create_task(write())
    answered: dict[int, list[str]] = {}
    async for answer in call:
        assert all(each.WhichOneof("outcome") == "accepted" for each in answer.results)
        answered[answer.frame] = [each.request_id for each in answer.results]
    await writing
    assert answered == {number: [each.request_id for each in requests] for number, requests in frames.items()}
    assert await call.code() is grpc.StatusCode.OK


async def until_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_frame_over_its_bounds_or_without_sense_ends_the_stream(world: World) -> None:
    world.person()
    call = world.publishing.PublishStream(metadata=world.metadata, timeout=LIMIT_S)
    await call.write(publish_pb2.PublishStreamRequest(frame=1, requests=[world.request() for _ in range(513)]))
    assert (await refusal(until_the_end(call))).code is grpc.StatusCode.INVALID_ARGUMENT
    raw: Any = world.served.public.stream_stream("/sealpush.v1.Publishing/PublishStream")
    call = raw(metadata=world.metadata, timeout=LIMIT_S)
    await call.write(b"\x12\xff")
    assert (await refusal(until_the_end(call))).code is grpc.StatusCode.INVALID_ARGUMENT


# Peers that are away


@pytest.mark.parametrize("name", ["accounts", "registration", "keys"])
async def test_a_peer_that_is_down_is_unavailable_nothing_is_stored_and_the_retry_is_accepted(world: World, name: str) -> None:
    world.person()
    request = world.request()
    await world.stubs[name].stop()
    answer = await refusal(world.publish(request))
    assert answer.code is grpc.StatusCode.UNAVAILABLE
    assert name in answer.message
    assert await world.stored() == 0
    await world.stubs[name].start()

    async def accepted() -> publish_pb2.PublishResult:
        while True:
            try:
                return await world.publish(request)
            except grpc.aio.AioRpcError as e:
                assert e.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - until the channel is up again

    async with asyncio.timeout(LIMIT_S):
        result = await accepted()
    assert (result.WhichOneof("outcome"), result.accepted.repeated_request) == ("accepted", False)


async def test_a_sender_that_is_known_goes_on_while_accounts_is_away(world: World) -> None:
    world.person()
    await world.publish(world.request())
    await world.stubs["accounts"].stop()
    assert (await world.publish(world.request())).WhichOneof("outcome") == "accepted"


async def test_when_the_answer_comes_after_the_deadline_the_retry_gets_the_same_message(world: World) -> None:
    world.person()
    request = world.request()
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        answer = await refusal(world.publish(request, timeout=0.3))
        assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    # What was on its way is committed now, or the retry stores it: in both cases once.
    result = await world.publish(request)
    again = await world.publish(request)
    assert again.accepted.repeated_request
    assert again.accepted.message_id == result.accepted.message_id
    assert await world.stored() == 1


# Statuses


async def test_a_status_is_told_to_its_sender_only(world: World) -> None:
    world.person()
    result = await world.publish(world.request())
    request = publish_pb2.GetStatusRequest(message_id=result.accepted.message_id)
    stranger = world.as_sender(SenderId(uuid7()))
    for wait in (None, Duration(), Duration(nanos=50_000_000)):
        if wait is not None:
            request.wait.CopyFrom(wait)
        answer = await refusal(world.publishing.GetStatus(request, metadata=stranger, timeout=LIMIT_S))
        assert answer.code is grpc.StatusCode.NOT_FOUND
    cancel = publish_pb2.CancelRequest(message_id=result.accepted.message_id)
    assert (await refusal(world.publishing.Cancel(cancel, metadata=stranger, timeout=LIMIT_S))).code is grpc.StatusCode.NOT_FOUND
    many = publish_pb2.GetStatusesRequest(message_ids=[result.accepted.message_id, uuid7()])
    assert len((await world.publishing.GetStatuses(many, metadata=stranger, timeout=LIMIT_S)).statuses) == 0
    assert len((await world.publishing.GetStatuses(many, metadata=world.metadata, timeout=LIMIT_S)).statuses) == 1


async def test_a_waiting_interval_of_0_assumes_delivery_and_an_absent_one_does_not(world: World) -> None:
    world.person()
    result = await world.publish(world.request())
    true, assumed = await world.status(result.accepted.message_id), await world.status(result.accepted.message_id, 0)
    assert (true.state, true.assumed) == (common_pb2.STATE_QUEUED, False)
    assert (assumed.state, assumed.assumed) == (common_pb2.STATE_DELIVERED, True)


async def test_a_longer_interval_waits_for_the_end_and_no_longer_than_asked(world: World) -> None:
    person = world.person()
    result = await world.publish(world.request())
    message_id = result.accepted.message_id
    assert (await world.status(message_id, 0.1)).state == common_pb2.STATE_QUEUED
    async with asyncio.timeout(LIMIT_S):
        waiting = asyncio.create_task(world.status(message_id, 8))
        await world.acknowledge(message_id, person.devices[0])
        assert (await waiting).state == common_pb2.STATE_DELIVERED
    assert (await world.status(message_id, 8)).state == common_pb2.STATE_DELIVERED


async def test_watching_tells_the_present_first_then_every_change_and_ends_with_the_last(world: World) -> None:
    person = world.person()
    ids = [(await world.publish(world.request())).accepted.message_id for _ in range(2)]
    request = publish_pb2.WatchStatusRequest(message_ids=[*ids, uuid7()])
    call = world.publishing.WatchStatus(request, metadata=world.metadata, timeout=LIMIT_S)
    first = await call.read()
    assert {each.message_id: each.state for each in first.statuses} == dict.fromkeys(ids, common_pb2.STATE_QUEUED)
    for message_id in ids:
        await world.acknowledge(message_id, person.devices[0])
    seen: dict[bytes, list[int]] = {each: [] for each in ids}
    while (frame := await call.read()) is not grpc.aio.EOF:
        for status in frame.statuses:
            seen[status.message_id].append(status.state)
    assert {message_id: states[-1] for message_id, states in seen.items()} == dict.fromkeys(ids, common_pb2.STATE_DELIVERED)
    assert await call.code() is grpc.StatusCode.OK


async def test_a_server_that_goes_away_ends_its_watchers_at_once(world: World) -> None:
    world.person()
    result = await world.publish(world.request())
    request = publish_pb2.WatchStatusRequest(message_ids=[result.accepted.message_id])
    call = world.publishing.WatchStatus(request, metadata=world.metadata, timeout=LIMIT_S)
    await call.read()
    assert world.served.app.drain is not None
    await world.served.app.drain()
    answer = await refusal(until_the_end(call))
    assert answer.code is grpc.StatusCode.UNAVAILABLE


async def test_watching_nothing_known_ends_at_once_and_a_wrong_list_is_refused(world: World) -> None:
    call = world.publishing.WatchStatus(publish_pb2.WatchStatusRequest(message_ids=[uuid7()]), metadata=world.metadata, timeout=LIMIT_S)
    frames = [frame async for frame in call]
    assert [len(frame.statuses) for frame in frames] in ([], [0])
    for wrong in ([], [b"short"], [uuid7()] * 513):
        request = publish_pb2.WatchStatusRequest(message_ids=wrong)
        answer = await refusal(until_the_end(world.publishing.WatchStatus(request, metadata=world.metadata, timeout=LIMIT_S)))
        assert (answer.code, answer.field.removesuffix("[0]")) == (grpc.StatusCode.INVALID_ARGUMENT, "message_ids")


async def test_a_cancel_says_for_each_delivery_whether_a_push_may_have_left(world: World) -> None:
    person = world.person()
    result = await world.publish(world.request())
    message_id = result.accepted.message_id
    session = uuid7()
    await world.store.keep_sessions([session])
    pushed = await world.store.claim(session, [(APP, int(common_pb2.PLATFORM_IOS), 1)])
    answer = await world.publishing.Cancel(publish_pb2.CancelRequest(message_id=message_id), metadata=world.metadata, timeout=LIMIT_S)
    assert answer.state == common_pb2.STATE_CANCELLED
    claimed = {each.device_id for each in pushed if each.message_id == message_id}
    for each in answer.deliveries:
        expected = common_pb2.STOP_POINT_PUSH_MAY_HAVE_LEFT if each.device_id in claimed else common_pb2.STOP_POINT_BEFORE_PUSH
        assert (each.stop_point, each.state) == (expected, common_pb2.STATE_CANCELLED)
    await world.acknowledge(message_id, person.devices[0])
    assert (await world.status(message_id)).state == common_pb2.STATE_CANCELLED
    wrong = await refusal(world.publishing.Cancel(publish_pb2.CancelRequest(message_id=b"x"), metadata=world.metadata, timeout=LIMIT_S))
    assert (wrong.code, wrong.field) == (grpc.StatusCode.INVALID_ARGUMENT, "message_id")
