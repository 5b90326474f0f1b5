"""Receipts over the real accounts, keys, publishing and mailbox: what became of a message, verified with the root's key alone."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sealpush.envelope import Envelope, evidence_of, seal
from sealpush.errors import NotFound, PermissionDenied
from sealpush.ids import DeviceId, MessageId, SenderId, SubscriberId, uuid7
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
from sealpush.model import ContentClass, Reason, State
from sealpush.proofs import NO_DIGEST, AckOutcome, acknowledgement_proof, sign_proof
from sealpush.publication import Accepted
from sealpush.receipts import Claim, Finding, Receipt, ReceiptVerdict, verify_receipt
from sealpush.sender import Sender
from sealpush.transport import Channels
from sealpush.v1 import common_pb2, messages_pb2, messages_pb2_grpc, publish_pb2, publish_pb2_grpc
from sealpush.v1.content_pb2 import Content
from sealpush.wire import wire_prekey
from sealpushd.cli.app import run
from sealpushd.cli.receipts import as_lines
from sealpushd.engines import Engines
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection
from sealpushd.platform.tokens import DeviceCaller, SenderCaller
from sealpushd.v1 import administration_pb2, administration_pb2_grpc, directory_pb2, directory_pb2_grpc, sealing_pb2, sealing_pb2_grpc
from tests.contract.harness import NOBODY, FakeClock, Mesh, Migrated, Services, refusal, running_services

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

APP = "bank"
PHONE = "+380501234567"
LOGIN, PASSWORD = "bank", "correct horse battery"
# For all tests of the module: they share a database, and so the platform's entry.
PLATFORM_KEY = ContentSigningKey.generate()
ROOT = RootKey.generate()


class Directory(directory_pb2_grpc.DirectoryServicer):
    """Registration: one person, whatever the number."""

    def __init__(self) -> None:
        self.subscriber_id = SubscriberId(uuid7())
        self.device_ids: list[DeviceId] = []
        self.block_all = False

    async def Resolve(self, request: directory_pb2.ResolveRequest, context: Any) -> directory_pb2.ResolveResponse:
        devices = [directory_pb2.ResolvedDevice(device_id=each, platform=common_pb2.PLATFORM_IOS) for each in self.device_ids]
        resolved = directory_pb2.Resolved(subscriber_id=self.subscriber_id, devices=devices, block_all=self.block_all)
        return directory_pb2.ResolveResponse(results=[directory_pb2.ResolveResult(resolved=resolved)] * len(request.queries))


@dataclass
class Phone:
    world: World
    identity: IdentityKey = field(default_factory=IdentityKey.generate)
    device_id: DeviceId = field(default_factory=lambda: DeviceId(uuid7()))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        caller = DeviceCaller(self.device_id, self.world.directory.subscriber_id, APP, self.identity.public_key)
        return (("authorization", f"Bearer {self.world.mesh.keys['registration'].device_token(caller)[0]}"),)

    async def fetch(self) -> dict[MessageId, bytes]:
        """Take what waits: envelopes by message."""
        answer = await self.world.messages.Drain(messages_pb2.DrainRequest(), metadata=self.metadata)
        return {each.message_id: each.envelope for each in answer.deliveries}

    async def acknowledge(
        self,
        message_id: MessageId,
        envelope: bytes,
        outcome: AckOutcome = AckOutcome.DELIVERED,
        reason: Reason = Reason.UNSPECIFIED,
        *,
        readable: bool = True,
    ) -> None:
        at_ms = to_ms(self.world.clock.now())
        parsed = Envelope.parse(envelope)
        content_id, digest = parsed.header.content_id, parsed.digest if readable else NO_DIGEST
        proof = acknowledgement_proof(message_id, content_id, digest, self.device_id, outcome, reason, at_ms)
        ack = messages_pb2.Acknowledgement(
            message_id=message_id,
            content_id=content_id,
            envelope_digest=digest,
            outcome=messages_pb2.AckOutcome.ValueType(outcome),
            reason_code=common_pb2.ReasonCode.ValueType(reason),
            at_ms=at_ms,
            signature=sign_proof(self.identity, proof),
        )
        answer = await self.world.messages.Acknowledge(messages_pb2.AcknowledgeRequest(acknowledgements=[ack]), metadata=self.metadata)
        assert answer.results[0].verdict in (messages_pb2.ACK_VERDICT_ACCEPTED, messages_pb2.ACK_VERDICT_LATE)

    async def take(self, message_id: MessageId, *outcomes: AckOutcome) -> bytes:
        """Fetch a message and acknowledge it so; the envelope."""
        envelope = (await self.fetch())[message_id]
        for outcome in outcomes or (AckOutcome.DELIVERED,):
            await self.acknowledge(message_id, envelope, outcome)
        return envelope


@dataclass
class World:
    """The services, an operator, and one bank."""

    services: Services
    directory: Directory
    sql: Connection
    operator: Any
    sealing: Any
    organisation_id: bytes = b""
    sender_id: SenderId = field(default_factory=lambda: SenderId(uuid7()))
    signing_key: ContentSigningKey = field(default_factory=ContentSigningKey.generate)
    serial: int = 0

    @property
    def clock(self) -> FakeClock:
        return self.services.clock

    @property
    def mesh(self) -> Mesh:
        return self.services.mesh

    @property
    def messages(self) -> Any:
        return messages_pb2_grpc.MessagesStub(self.services["fetch"].public)

    def _entry(self, role: EntryRole, sender_id: SenderId, modes: SenderMode, public_key: bytes) -> bytes:
        # Rises over all tests: they share the platform's.
        self.serial = max(self.serial + 1, to_ms(self.clock.now()))
        since, until = to_ms(self.clock.now()) - DAY_MS, to_ms(self.clock.now()) + DAY_MS
        keys = (EntryKey(public_key, since, until),)
        return sign_sender_entry(ROOT, SenderEntry(sender_id, "Банк", modes, keys, since, until, self.serial, role))

    async def administer(self, method: str, request: Any) -> Any:
        return await self.operator.call(getattr(administration_pb2_grpc.AdministrationStub(self.operator.channel), method), request)

    async def put_sender(
        self, key: ContentSigningKey, *, sender_id: SenderId | None = None, name: str = "cards", scopes: tuple[str, ...] = ()
    ) -> None:
        sender_id = sender_id or self.sender_id
        await self.administer(
            "PutSender",
            administration_pb2.PutSenderRequest(
                organisation_id=self.organisation_id,
                sender_id=sender_id,
                name=name,
                sender_entry=self._entry(EntryRole.SENDER, sender_id, SenderMode.SERVER | SenderMode.END_TO_END, key.public_key),
                app_ids=[APP],
                scopes=scopes,
            ),
        )

    async def put_platform(self, public_key: bytes) -> None:
        entry = self._entry(EntryRole.PLATFORM, SenderId(uuid7()), SenderMode.SERVER, public_key)
        await self.administer(
            "PutPlatformEntry", administration_pb2.PutPlatformEntryRequest(platform_entry=entry, root_public_key=ROOT.public_key)
        )

    async def set_up(self) -> None:
        self.organisation_id = (
            await self.administer(
                "PutOrganisation", administration_pb2.PutOrganisationRequest(login=LOGIN, password=PASSWORD, name="A bank")
            )
        ).organisation_id
        await self.administer("PutApp", administration_pb2.PutAppRequest(app_id=APP, name="An app", root_public_key=ROOT.public_key))
        await self.put_sender(self.signing_key, name=f"sender-{self.sender_id.hex()}")
        await self.put_platform(PLATFORM_KEY.public_key)

    async def phone(self) -> Phone:
        """A new device of the recipient."""
        made = Phone(self)
        _, prekey = generate_prekey(
            made.identity, made.device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=to_ms(self.clock.now()), lifetime_ms=90 * DAY_MS
        )
        device = sealing_pb2.NewDevice(
            subscriber_id=self.directory.subscriber_id,
            device_id=made.device_id,
            identity_public_key=made.identity.public_key,
            signed_prekey=wire_prekey(prekey),
        )
        answer = await self.sealing.call(
            sealing_pb2_grpc.SealingStub(self.sealing.channel).PutDevices, sealing_pb2.PutDevicesRequest(devices=[device])
        )
        assert list(answer.refusals) == [""]
        self.directory.device_ids.append(made.device_id)
        return made

    async def remove(self, phone: Phone) -> None:
        removed = sealing_pb2.RemovedDevice(subscriber_id=self.directory.subscriber_id, device_id=phone.device_id)
        await self.sealing.call(
            sealing_pb2_grpc.SealingStub(self.sealing.channel).RemoveDevices, sealing_pb2.RemoveDevicesRequest(devices=[removed])
        )
        self.directory.device_ids.remove(phone.device_id)

    async def sender(self, name: str = "") -> Sender:
        channels = await self.services.closing.enter_async_context(Channels(self.services.endpoints))
        return Sender(
            channels, LOGIN, PASSWORD, sender_name=name or f"sender-{self.sender_id.hex()}", signing_key=self.signing_key, timeout_s=5
        )

    async def contents(self, message_id: MessageId) -> int:
        return int(await self.sql.fetchval("SELECT count(*) FROM contents WHERE message_id = $1", message_id))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "keys", "fetch", "publishing")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    directory = Directory()  # type: ignore[abstract]  # answers only what publishing and keys ask
    stand_ins = {"registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)]}
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins, platform_key=PLATFORM_KEY) as services:
        sql = await services.sql("fetch")
        made = World(services, directory, sql, services.channel("accounts", "operator"), services.channel("keys", "registration"))
        await made.set_up()
        yield made


def content() -> Content:
    return Content(content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, body="You paid 120.50.")


async def publish(sender: Sender, *, sealed: bool = False) -> MessageId:
    outcome = await (sender.publish_sealed if sealed else sender.publish)(PHONE, content(), content_class=ContentClass.INFORMATIONAL)
    assert isinstance(outcome, Accepted), outcome
    return outcome.message_id


def verified(receipt: Receipt, envelope: bytes | None = None) -> ReceiptVerdict:
    """The verdict of somebody who got the file and knows the root."""
    return verify_receipt(Receipt.from_json(receipt.to_json().encode()), ROOT.public_key, envelope=envelope)


def claims(verdict: ReceiptVerdict, *names: str) -> list[tuple[str, Finding]]:
    return [(each.name, each.finding) for each in verdict.claims if not names or each.name in names]


def about(verdict: ReceiptVerdict, phone: Phone) -> list[Claim]:
    return [each for each in verdict.claims if each.device_id == phone.device_id]


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_delivered_message_is_proven_after_its_content_is_gone(world: World, sealed: bool) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender, sealed=sealed)
    envelope = await phone.take(message_id, AckOutcome.DELIVERED, AckOutcome.READ)
    assert await world.contents(message_id) == 0
    receipt = await sender.receipt(message_id)
    assert (receipt.message_id, receipt.sender_id) == (message_id, world.sender_id)
    assert receipt.evidence == evidence_of(Envelope.parse(envelope).head, Envelope.parse(envelope).tail)
    verdict = verified(receipt, envelope)
    assert verdict.sender_proven
    assert verdict.delivered_to == (phone.device_id,)
    assert claims(verdict) == [
        ("sender_entry", Finding.PROVEN),
        *([] if sealed else [("platform_entry", Finding.PROVEN)]),
        ("content_signature", Finding.PROVEN),
        ("not_revoked", Finding.UNPROVEN),
        ("content", Finding.PROVEN),
        ("delivered", Finding.PROVEN),
        ("read", Finding.PROVEN),
        ("state", Finding.PROVEN),
        ("message", Finding.PROVEN),
        ("acceptance", Finding.UNPROVEN),
        ("recipient", Finding.UNPROVEN),
    ]
    said = next(each.sentence for each in verdict.claims if each.name == "content_signature")
    assert said.startswith("'Банк' itself sealed" if sealed else "The platform sealed and signed this content for 'Банк'")
    assert bool(receipt.platform_entry) is not sealed


async def test_before_any_device_signed_only_the_senders_part_is_proven(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    verdict = verified(await sender.receipt(message_id))
    assert verdict.sender_proven
    assert verdict.delivered_to == ()
    assert claims(verdict, "state", "message", "delivered") == [("state", Finding.UNPROVEN), ("message", Finding.UNPROVEN)]
    assert "QUEUED" in about(verdict, phone)[0].sentence


async def test_a_sender_gone_bad_cannot_show_another_content_under_the_id_of_the_delivered_one(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender, sealed=True)
    header = Envelope.parse(await phone.take(message_id, AckOutcome.DELIVERED, AckOutcome.READ)).header
    other = seal(b"You agreed to everything.", header, [], world.signing_key)
    forged = dataclasses.replace(await sender.receipt(message_id), evidence=evidence_of(other.head, other.tail))
    verdict = verified(forged, other.encode())
    assert verdict.delivered_to == ()
    # The sender truly signed it; that is why the device's word has to be about the envelope.
    assert claims(verdict, "content_signature", "content", "delivered", "read", "message") == [
        ("content_signature", Finding.PROVEN),
        ("content", Finding.PROVEN),
        ("delivered", Finding.FAILED),
        ("read", Finding.FAILED),
        ("message", Finding.UNPROVEN),
    ]


async def test_what_a_device_could_not_read_proves_nothing_of_the_envelope(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    envelope = (await phone.fetch())[message_id]
    await phone.acknowledge(message_id, envelope, AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN, readable=False)
    verdict = verified(await sender.receipt(message_id), envelope)
    assert verdict.sender_proven
    assert claims(verdict, "unreadable", "undelivered", "state", "message") == [
        ("unreadable", Finding.PROVEN),
        ("state", Finding.PROVEN),
        ("message", Finding.UNPROVEN),
    ]


async def test_each_of_several_devices_speaks_for_itself(world: World) -> None:
    delivered, refused, silent = await world.phone(), await world.phone(), await world.phone()
    sender = await world.sender()
    message_id = await publish(sender, sealed=True)
    envelope = await delivered.take(message_id)
    await refused.acknowledge(message_id, envelope, AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)
    verdict = verified(await sender.receipt(message_id))
    assert verdict.sender_proven
    assert verdict.delivered_to == (delivered.device_id,)
    assert [(each.name, each.finding) for each in about(verdict, delivered)] == [("delivered", Finding.PROVEN), ("state", Finding.PROVEN)]
    assert [(each.name, each.finding) for each in about(verdict, refused)] == [("undelivered", Finding.PROVEN), ("state", Finding.PROVEN)]
    assert "DEVICE_CANNOT_OPEN" in about(verdict, refused)[0].sentence
    assert [(each.name, each.finding) for each in about(verdict, silent)] == [("state", Finding.UNPROVEN)]


async def test_what_arrived_after_a_cancellation_is_proven_beside_it(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    envelope = (await phone.fetch())[message_id]
    await sender.cancel(message_id)
    await phone.acknowledge(message_id, envelope)
    receipt = await sender.receipt(message_id)
    (delivery,) = receipt.deliveries
    assert (delivery.state, len(delivery.acknowledgements)) == (State.CANCELLED, 1)
    verdict = verified(receipt)
    assert verdict.sender_proven
    assert verdict.delivered_to == (phone.device_id,)
    assert claims(verdict, "delivered", "state") == [("delivered", Finding.PROVEN), ("state", Finding.UNPROVEN)]


async def test_of_repeated_acknowledgements_the_first_is_kept(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    envelope = await phone.take(message_id, AckOutcome.DELIVERED, AckOutcome.READ)
    first = await sender.receipt(message_id)
    world.clock.advance(timedelta(seconds=1))
    for outcome in (AckOutcome.DELIVERED, AckOutcome.READ, AckOutcome.UNDELIVERED):
        await phone.acknowledge(message_id, envelope, outcome)
    again = await sender.receipt(message_id)
    (before,), (after,) = first.deliveries, again.deliveries
    assert after.acknowledgements[0] == before.acknowledgements[0]
    assert after.acknowledgements[2] == before.acknowledgements[1]
    # What it contradicts itself with is kept, too, and shown.
    assert after.acknowledgements[1].outcome is AckOutcome.UNDELIVERED
    assert not verified(again).failed


@pytest.mark.parametrize("between", [False, True])
async def test_a_reading_that_came_before_its_acknowledgement_is_proven_and_verifies_offline(
    world: World, between: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a receipt that was made when only the reading had come."""
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    envelope = (await phone.fetch())[message_id]
    await phone.acknowledge(message_id, envelope, AckOutcome.READ)
    if not between:
        world.clock.advance(timedelta(seconds=1))
        await phone.acknowledge(message_id, envelope, AckOutcome.DELIVERED)
    receipt = await sender.receipt(message_id)
    (delivery,) = receipt.deliveries
    signed = [AckOutcome.READ] if between else [AckOutcome.DELIVERED, AckOutcome.READ]
    assert delivery.state is (State.FETCHED if between else State.DELIVERED)
    assert [each.outcome for each in delivery.acknowledgements] == signed
    verdict = verified(receipt, envelope)
    assert verdict.sender_proven
    assert not verdict.failed
    assert [(each.name, each.finding) for each in about(verdict, phone)] == [
        *([] if between else [("delivered", Finding.PROVEN)]),
        ("read", Finding.PROVEN),
        ("state", Finding.UNPROVEN if between else Finding.PROVEN),
    ]
    file = tmp_path / "receipt.json"
    file.write_text(receipt.to_json())
    assert run(["receipt", "--verify", str(file), "--root-public-key", ROOT.public_key.hex()]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "showed the message to its user, who read it" in said
    # Nobody can say that another message was read.
    forged = replace(delivery, acknowledgements=tuple(replace(each, at_ms=each.at_ms + 1) for each in delivery.acknowledgements))
    file.write_text(replace(receipt, deliveries=(forged,)).to_json())
    assert run(["receipt", "--verify", str(file), "--root-public-key", ROOT.public_key.hex()]) == 1
    assert "It does NOT verify" in capsys.readouterr().out


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_key_that_has_left_its_entry_since_is_still_proven(world: World, sealed: bool) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender, sealed=sealed)
    await phone.take(message_id)
    before = await sender.receipt(message_id)
    await world.put_sender(ContentSigningKey.generate(), name=f"sender-{world.sender_id.hex()}")
    await world.put_platform(ContentSigningKey.generate().public_key)
    try:
        assert await sender.receipt(message_id) == before
        assert verified(before).sender_proven
    finally:
        await world.put_platform(PLATFORM_KEY.public_key)


async def test_a_device_that_was_removed_since_is_still_proven(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    await phone.take(message_id)
    await world.remove(phone)
    assert verified(await sender.receipt(message_id)).delivered_to == (phone.device_id,)


async def test_a_message_from_before_evidence_was_kept_says_so_and_proves_nothing(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    await phone.take(message_id)
    await world.sql.execute("UPDATE messages SET evidence = NULL WHERE message_id = $1", message_id)
    verdict = verified(await sender.receipt(message_id))
    assert not verdict.failed
    assert not verdict.sender_proven
    assert verdict.delivered_to == ()
    assert claims(verdict, "delivered", "state") == [("delivered", Finding.UNPROVEN), ("state", Finding.UNPROVEN)]
    (absent,) = [each for each in verdict.claims if each.name == "content_signature"]
    assert absent.finding is Finding.UNPROVEN
    assert "Nothing of the envelope is kept" in absent.sentence


async def test_what_was_blocked_was_never_sealed(world: World) -> None:
    await world.phone()
    sender = await world.sender()
    world.directory.block_all = True
    message_id = await publish(sender)
    receipt = await sender.receipt(message_id)
    assert receipt.evidence == b""
    assert claims(verified(receipt), "content_signature", "state") == [
        ("content_signature", Finding.UNPROVEN),
        ("state", Finding.UNPROVEN),
    ]
    assert receipt.nothing_sealed
    said = {each.name: each.sentence for each in verified(receipt).claims}
    assert "Nothing was ever sealed" in said["content_signature"]
    assert "nothing was ever sealed" in said["content"]
    assert "the device was asked nothing" in said["state"]
    assert "no envelope went out" in said["message"]
    shown = " ".join(" ".join(as_lines(receipt, verified(receipt), ROOT.public_key)).split())
    assert "Nothing was ever sealed: the recipient had blocked the sender" in shown
    assert "this envelope" not in shown


@pytest.mark.parametrize("how", ["a device said so", "it was kept"])
async def test_what_was_sealed_and_blocked_later_is_not_said_to_be_unsealed(world: World, how: str) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    await phone.take(message_id, AckOutcome.BLOCKED)
    receipt = await sender.receipt(message_id)
    if how == "a device said so":
        receipt = replace(receipt, evidence=b"")
    assert [each.state for each in receipt.deliveries] == [State.BLOCKED]
    assert not receipt.nothing_sealed


async def test_entries_that_are_not_kept_leave_the_sender_unproven(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender, sealed=True)
    await phone.take(message_id)
    await world.sql.execute("DELETE FROM accounts.entries WHERE sender_id = $1", world.sender_id)
    verdict = verified(await sender.receipt(message_id))
    assert not verdict.failed
    assert not verdict.sender_proven
    assert verdict.delivered_to == (phone.device_id,)


async def test_a_receipt_is_given_to_its_sender_only(world: World) -> None:
    await world.phone()
    sender = await world.sender()
    message_id = await publish(sender)
    await world.put_sender(ContentSigningKey.generate(), sender_id=SenderId(uuid7()), name=f"other-{message_id.hex()}")
    with pytest.raises(NotFound):
        await (await world.sender(f"other-{message_id.hex()}")).receipt(message_id)
    with pytest.raises(NotFound):
        await sender.receipt(MessageId(uuid7()))
    await world.put_sender(ContentSigningKey.generate(), sender_id=SenderId(uuid7()), name=f"mute-{message_id.hex()}", scopes=("publish",))
    with pytest.raises(PermissionDenied):
        await (await world.sender(f"mute-{message_id.hex()}")).receipt(message_id)


@pytest.mark.parametrize("service", ["keys_mesh", "accounts_mesh"])
async def test_without_a_service_that_knows_there_is_no_half_receipt(world: World, service: str) -> None:
    """A receipt without keys or entries would look like one that lost them."""
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    await phone.take(message_id)
    cut_off = await world.services.serve("publishing", {service: NOBODY})
    caller = SenderCaller(world.sender_id, world.organisation_id, (APP,), frozenset({"status"}), ())
    bearer = (("authorization", f"Bearer {world.mesh.keys['accounts'].sender_token(caller)[0]}"),)
    publishing: Any = publish_pb2_grpc.PublishingStub(cut_off.public)
    found = await refusal(publishing.GetReceipt(publish_pb2.GetReceiptRequest(message_id=message_id), metadata=bearer))
    assert found.code is grpc.StatusCode.UNAVAILABLE


async def test_a_receipt_is_the_same_after_a_restart(world: World) -> None:
    phone, sender = await world.phone(), await world.sender()
    message_id = await publish(sender)
    await phone.take(message_id)
    before = await sender.receipt(message_id)
    for service in ("accounts", "keys", "fetch", "publishing"):
        await world.services.serve(service)
    assert await (await world.sender()).receipt(message_id) == before


async def test_malformed_questions_are_refused(world: World) -> None:
    accounts = world.services.channel("accounts", "publishing")
    administration: Any = administration_pb2_grpc.AdministrationStub(accounts.channel)
    for headers in ([b""], [bytes(94)], [bytes(93)], [bytes(94)] * 17):
        found = await refusal(
            administration.FindEntries(administration_pb2.FindEntriesRequest(headers=headers), metadata=accounts.metadata())
        )
        assert found.field == "headers"
    keys = world.services.channel("keys", "publishing")
    sealing: Any = sealing_pb2_grpc.SealingStub(keys.channel)
    found = await refusal(sealing.GetIdentities(sealing_pb2.GetIdentitiesRequest(device_ids=[b"short"]), metadata=keys.metadata()))
    assert found.field == "device_ids[0]"
    unknown = await sealing.GetIdentities(sealing_pb2.GetIdentitiesRequest(device_ids=[uuid7()]), metadata=keys.metadata())
    assert not unknown.identities
