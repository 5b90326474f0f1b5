"""The service keys over real gRPC and real PostgreSQL, with phones that open what it seals."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sealpush.devicelog import DeviceLog, EntryKind, LogEntry
from sealpush.envelope import CONTENT_BYTES_MAX, Header, Recipient, Stanza, assemble, open_envelope, recipient, seal
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, SubscriberId, uuid7
from sealpush.keys import (
    DAY_MS,
    ContentSigningKey,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    RecipientDevice,
    SignedPrekey,
    content_key_id,
    generate_prekey,
    prekey_proof,
    verify_ed25519,
)
from sealpush.proofs import body_digest, change_proof, sign_proof
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.v1 import common_pb2, keys_pb2, keys_pb2_grpc
from sealpush.wire import read_prekey, wire_prekey
from sealpushd.engines import Engines
from sealpushd.keys import rules
from sealpushd.keys.store import KeyStore
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import connect
from sealpushd.platform.errors import Aborted
from sealpushd.platform.tokens import DeviceCaller, SenderCaller, ServiceKey
from sealpushd.v1 import directory_pb2, directory_pb2_grpc, sealing_pb2, sealing_pb2_grpc
from tests.contract.harness import FakeClock, Mesh, Migrated, refusal, running_services

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP, OTHER_APP = "example-bank", "example-shop"
UPLOAD_METHOD = "/sealpush.v1.Keys/UploadPrekeys"


class Directory(directory_pb2_grpc.DirectoryServicer):
    """Registration, as small as it gets: phone numbers to subscribers."""

    def __init__(self) -> None:
        self.people: dict[tuple[str, str], tuple[SubscriberId, list[DeviceId]]] = {}

    async def Resolve(self, request: directory_pb2.ResolveRequest, context: Any) -> directory_pb2.ResolveResponse:
        return directory_pb2.ResolveResponse(results=[self._resolve(query) for query in request.queries])

    def _resolve(self, query: directory_pb2.ResolveQuery) -> directory_pb2.ResolveResult:
        if not query.recipient.phone.startswith("+"):
            return directory_pb2.ResolveResult(invalid="write the number in international format")
        if (query.recipient.phone, query.app_id) not in self.people:
            return directory_pb2.ResolveResult(not_registered=common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND)
        subscriber_id, device_ids = self.people[query.recipient.phone, query.app_id]
        devices = [directory_pb2.ResolvedDevice(device_id=each) for each in device_ids]
        return directory_pb2.ResolveResult(resolved=directory_pb2.Resolved(subscriber_id=subscriber_id, devices=devices))

    async def GetPushTargets(self, request: directory_pb2.GetPushTargetsRequest, context: Any) -> Any:
        raise NotImplementedError

    async def ReportDeadTokens(self, request: directory_pb2.ReportDeadTokensRequest, context: Any) -> Any:
        raise NotImplementedError


@dataclass
class World:
    clock: FakeClock
    keys: keys_pb2_grpc.KeysAsyncStub
    sealing: sealing_pb2_grpc.SealingAsyncStub
    directory: Directory
    store: KeyStore
    services: dict[str, ServiceKey]

    @property
    def now_ms(self) -> int:
        return to_ms(self.clock.now())

    def mesh(self, service: str = "publishing") -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.services[service].mesh_token()}"),)

    def device(self, phone: Phone) -> tuple[tuple[str, str], ...]:
        caller = DeviceCaller(phone.device_id, SubscriberId(uuid7()), APP, phone.identity.public_key)
        return (("authorization", f"Bearer {self.services['registration'].device_token(caller)[0]}"),)

    def sender(self, sender_id: SenderId, *app_ids: str) -> tuple[tuple[str, str], ...]:
        caller = SenderCaller(sender_id, uuid7(), app_ids, frozenset({"keys"}), ())
        return (("authorization", f"Bearer {self.services['accounts'].sender_token(caller)[0]}"),)

    async def put(self, *devices: sealing_pb2.NewDevice) -> list[str]:
        request = sealing_pb2.PutDevicesRequest(devices=devices)
        return list((await self.sealing.PutDevices(request, metadata=self.mesh("registration"))).refusals)

    async def remove(self, *devices: tuple[SubscriberId, DeviceId]) -> None:
        removed = [sealing_pb2.RemovedDevice(subscriber_id=s, device_id=d) for s, d in devices]
        await self.sealing.RemoveDevices(sealing_pb2.RemoveDevicesRequest(devices=removed), metadata=self.mesh("registration"))

    async def seal(self, *items: sealing_pb2.SealItem) -> list[sealing_pb2.SealResult]:
        return list((await self.sealing.Seal(sealing_pb2.SealRequest(items=items), metadata=self.mesh())).results)

    async def check(self, *checks: sealing_pb2.StanzaCheck) -> list[sealing_pb2.StanzaVerdict]:
        request = sealing_pb2.CheckStanzasRequest(checks=checks)
        return list((await self.sealing.CheckStanzas(request, metadata=self.mesh())).verdicts)

    async def log(self, subscriber_id: SubscriberId) -> list[LogEntry]:
        """The subscriber's log; makes sure that it is the one its head stands for."""
        page = await self.store.log(subscriber_id, 0, 10_000)
        read = DeviceLog.read(subscriber_id, page.entries)
        assert (read.seq, read.head) == (page.seq, page.head)
        return [LogEntry.decode(each) for each in page.entries]

    async def sealed_for(self, phone: Phone, subscriber_id: SubscriberId) -> bool:
        """Whether something can be sealed for this phone now."""
        [result] = await self.seal(self.item(subscriber_id, phone))
        return not result.devices_without_prekey

    def item(self, subscriber_id: SubscriberId, *phones: Phone, content: bytes = b"hello", **fields: Any) -> sealing_pb2.SealItem:
        wanted: dict[str, Any] = {"sender_id": uuid7(), "created_at_ms": self.now_ms, "expires_at_ms": self.now_ms + DAY_MS} | fields
        return sealing_pb2.SealItem(subscriber_id=subscriber_id, device_ids=[each.device_id for each in phones], content=content, **wanted)


class Phone:
    """An app instance: identity, prekeys with their private halves, a counter. `suite` is what it makes, and the lowest it accepts."""

    def __init__(self, now_ms: int, suite: int = SUITE_X25519) -> None:
        self.device_id = DeviceId(uuid7())
        self.suite = suite
        self.identity = IdentityKey.generate()
        self.counter = 0
        self._private: dict[tuple[int, int, PrekeyKind], PrekeyPrivate] = {}
        self._next_id = 1
        self.signed_prekey = self.new_prekey(now_ms)

    def new_prekey(self, now_ms: int, kind: PrekeyKind = PrekeyKind.SIGNED, lifetime_ms: int = 90 * DAY_MS) -> SignedPrekey:
        private, public = generate_prekey(
            self.identity,
            self.device_id,
            prekey_id=self._next_id,
            kind=kind,
            now_ms=now_ms,
            lifetime_ms=lifetime_ms,
            suite=self.suite,
            min_suite=self.suite,
        )
        self._private[private.suite, private.prekey_id, private.kind] = private
        self._next_id += 1
        return public

    def resigned(self, prekey: SignedPrekey) -> SignedPrekey:
        """The same fields under this phone's signature."""
        signature = self.identity.sign(prekey_proof(prekey, self.device_id))
        return replace(prekey, signature=signature)

    def new_device(self, subscriber_id: SubscriberId, prekey: SignedPrekey | None = None) -> sealing_pb2.NewDevice:
        return sealing_pb2.NewDevice(
            subscriber_id=subscriber_id,
            device_id=self.device_id,
            identity_public_key=self.identity.public_key,
            signed_prekey=wire_prekey(prekey or self.signed_prekey),
            min_suite=self.suite,
        )

    def raised(self, now_ms: int) -> SignedPrekey:
        """The signed prekey with which it leaves suite 1."""
        self.suite = SUITE_HYBRID
        self.signed_prekey = self.new_prekey(now_ms)
        return self.signed_prekey

    def upload(
        self, *prekeys: SignedPrekey, min_suite: int = 0, forget_former: bool = False, counter: int | None = None
    ) -> keys_pb2.UploadPrekeysRequest:
        if counter is None:
            counter = self.counter = self.counter + 1
        wire = [wire_prekey(each) for each in prekeys]
        change = keys_pb2.PrekeyUpload(prekeys=wire, min_suite=min_suite, forget_former=forget_former).SerializeToString()
        signature = sign_proof(self.identity, change_proof(self.device_id, counter, UPLOAD_METHOD, body_digest(change)))
        return keys_pb2.UploadPrekeysRequest(change=change, proof=common_pb2.DeviceProof(counter=counter, signature=signature))

    def stanza(self, prekey: SignedPrekey | None = None) -> sealing_pb2.StanzaKey:
        prekey = prekey or self.signed_prekey
        return sealing_pb2.StanzaKey(
            device_id=self.device_id,
            suite=prekey.suite,
            prekey_id=prekey.prekey_id,
            kind=keys_pb2.PrekeyKind.ValueType(prekey.kind),
        )

    def open(self, parts: sealing_pb2.SealedParts, sender_public_key: bytes) -> bytes:
        stanza = {each.device_id: each.stanza for each in parts.stanzas}[self.device_id]
        return open_envelope(
            assemble(parts.head, stanza, parts.tail),
            device_id=self.device_id,
            private_prekey_lookup=lambda *name: self._private.get(name),
            sender_public_key=sender_public_key,
        )


async def refused(call: Awaitable[Any], code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> tuple[str, str]:
    """The message and the field of the refusal that a call must end in."""
    found = await refusal(call)
    assert found.code is code, found
    return found.message, found.field


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    """One database for all tests here: each makes its own people."""
    return await migrated("keys")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    directory = Directory()
    stand_ins = {"registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)]}
    async with running_services(engines, mesh, urls, clock, stand_ins=stand_ins) as services:
        store = KeyStore(await services.database("keys"), 10)
        sealing = sealing_pb2_grpc.SealingStub(services.channel("keys", "publishing").channel)
        yield World(clock, keys_pb2_grpc.KeysStub(services["keys"].public), sealing, directory, store, mesh.keys)


@pytest.fixture
def phone(world: World) -> Phone:
    return Phone(world.now_ms)


@pytest.fixture
def subscriber() -> SubscriberId:
    return SubscriberId(uuid7())


async def platform_key(world: World) -> bytes:
    request = sealing_pb2.GetPlatformKeyRequest()
    return (await world.sealing.GetPlatformKey(request, metadata=world.mesh("operator"))).public_key


# Devices and their log.


async def test_a_device_that_was_put_is_in_the_log_and_can_be_sealed_for(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    assert await world.put(phone.new_device(subscriber)) == [""]
    [entry] = await world.log(subscriber)
    assert entry == LogEntry(EntryKind.ADDED, phone.device_id, phone.identity.public_key, world.now_ms, recovered=False)
    assert await world.sealed_for(phone, subscriber)


async def test_putting_a_device_again_changes_nothing(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    device = phone.new_device(subscriber)
    assert await world.put(device, device) == ["", ""]
    assert await world.put(device) == [""]
    assert len(await world.log(subscriber)) == 1


async def test_a_second_device_is_marked_recovered_as_nobody_vouches_for_it(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber), Phone(world.now_ms).new_device(subscriber))
    assert [each.recovered for each in await world.log(subscriber)] == [False, True]


async def test_another_identity_for_a_known_device_id_is_refused(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    thief = Phone(world.now_ms)
    thief.device_id = phone.device_id
    forged = thief.new_device(subscriber, thief.new_prekey(world.now_ms))
    [first, second] = await world.put(phone.new_device(subscriber), forged)
    assert (first, "another identity key" in second) == ("", True)
    await world.remove((subscriber, phone.device_id))
    assert "another identity key" in (await world.put(forged))[0]
    assert len(await world.log(subscriber)) == 2


async def test_a_prekey_that_another_device_signed_is_refused_and_leaves_no_trace(
    world: World, phone: Phone, subscriber: SubscriberId
) -> None:
    other = Phone(world.now_ms)
    [refusal] = await world.put(phone.new_device(subscriber, other.signed_prekey))
    assert "not signed by this device" in refusal
    assert await world.store.device(phone.device_id) is None
    assert await world.log(subscriber) == []


async def test_a_bad_device_does_not_hold_up_the_others_of_its_batch(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    short = phone.new_device(subscriber)
    short.device_id = b"short"
    unsigned = phone.new_device(subscriber)
    unsigned.signed_prekey.kind = keys_pb2.PREKEY_KIND_ONE_TIME
    unnamed = phone.new_device(subscriber)
    unnamed.identity_public_key = b""
    refusals = await world.put(short, unsigned, phone.new_device(subscriber), unnamed)
    assert [bool(each) for each in refusals] == [True, True, False, True]


async def test_a_moved_device_leaves_the_old_list_and_enters_the_new(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    new_owner = SubscriberId(uuid7())
    await world.put(phone.new_device(subscriber))
    assert await world.put(phone.new_device(new_owner)) == [""]
    assert [each.kind for each in await world.log(subscriber)] == [EntryKind.ADDED, EntryKind.REMOVED]
    assert [each.kind for each in await world.log(new_owner)] == [EntryKind.ADDED]
    assert not await world.sealed_for(phone, subscriber)
    assert await world.sealed_for(phone, new_owner)
    # A removal that comes late, for the old owner, must not take it from the new one.
    await world.remove((subscriber, phone.device_id))
    assert await world.sealed_for(phone, new_owner)


async def test_a_removed_device_is_never_sealed_for_and_may_come_back(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    await world.remove((subscriber, phone.device_id), (subscriber, phone.device_id), (subscriber, DeviceId(uuid7())))
    await world.remove((subscriber, phone.device_id))
    assert not await world.sealed_for(phone, subscriber)
    await refused(world.keys.UploadPrekeys(phone.upload(), metadata=world.device(phone)), grpc.StatusCode.UNAUTHENTICATED)
    assert await world.put(phone.new_device(subscriber)) == [""]
    assert await world.sealed_for(phone, subscriber)
    kinds = [each.kind for each in await world.log(subscriber)]
    assert kinds == [EntryKind.ADDED, EntryKind.REMOVED, EntryKind.ADDED]


async def test_who_is_listed_and_trusted_is_told_of_devices_in_a_list_only(world: World, subscriber: SubscriberId) -> None:
    first, second, gone = [Phone(world.now_ms) for _ in range(3)]
    for each in (first, second, gone):
        assert await world.put(each.new_device(subscriber)) == [""]
    await world.remove((subscriber, gone.device_id))

    async def listed(*device_ids: bytes) -> set[tuple[bytes, bytes, bool]]:
        request = sealing_pb2.GetListedDevicesRequest(device_ids=device_ids)
        answer = await world.sealing.GetListedDevices(request, metadata=world.mesh("registration"))
        return {(each.device_id, each.subscriber_id, each.vouched) for each in answer.devices}

    asked = (first.device_id, second.device_id, gone.device_id, uuid7())
    assert await listed(*asked) == {(first.device_id, subscriber, True), (second.device_id, subscriber, False)}
    assert await listed() == set()
    # Back after the first: trusted no more, whatever it was.
    await world.remove((subscriber, first.device_id))
    assert await world.put(first.new_device(subscriber)) == [""]
    assert await listed(first.device_id) == {(first.device_id, subscriber, False)}
    for wrong in ([b"short"], [uuid7()] * 513):
        assert (await refused(listed(*wrong)))[1] in ("device_ids", f"device_ids[{len(wrong) - 1}]")


async def test_a_registration_repeated_late_does_not_bring_back_an_old_prekey(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    world.clock.advance(timedelta(days=7))
    newer = phone.new_prekey(world.now_ms)
    await world.keys.UploadPrekeys(phone.upload(newer), metadata=world.device(phone))
    assert await world.put(phone.new_device(subscriber)) == [""]
    state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
    assert state.signed_prekey_id == newer.prekey_id


async def test_concurrent_batches_for_the_same_subscribers_neither_deadlock_nor_break_the_chain(world: World) -> None:
    subscribers = [SubscriberId(uuid7()) for _ in range(3)]
    phones = [Phone(world.now_ms) for _ in range(12)]
    chance = random.Random(7)  # noqa: S311 - an order, not a secret

    async def put(each: Sequence[Phone]) -> None:
        assert not any(await world.put(*(phone.new_device(chance.choice(subscribers)) for phone in each)))

    async def remove() -> None:
        await world.remove(*((chance.choice(subscribers), phone.device_id) for phone in chance.sample(phones, 6)))

    # Every batch holds the same devices in another order, and moves some of them between the subscribers.
    await asyncio.gather(*(put(chance.sample(phones, 12)) if n % 3 else remove() for n in range(24)))
    logs = [await world.log(each) for each in subscribers]
    here = [0, 0, 0]
    for n, log in enumerate(logs):
        for entry in log:
            here[n] += 1 if entry.kind is EntryKind.ADDED else -1
    found = [await world.store.device(phone.device_id) for phone in phones]
    assert here == [sum(each is not None and not each.removed and each.subscriber_id == s for each in found) for s in subscribers]


async def test_concurrent_devices_of_a_new_subscriber_make_one_chain(world: World, subscriber: SubscriberId) -> None:
    phones = [Phone(world.now_ms) for _ in range(16)]
    answers = await asyncio.gather(*(world.put(phone.new_device(subscriber)) for phone in phones))
    assert answers == [[""]] * 16
    log = await world.log(subscriber)
    assert {each.device_id for each in log} == {phone.device_id for phone in phones}
    assert sum(not each.recovered for each in log) == 1


async def test_a_batch_is_bounded(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    _, field = await refused(world.put(*[phone.new_device(subscriber)] * 513))
    assert field == "devices"
    _, field = await refused(world.remove((subscriber, DeviceId(b"short"))))
    assert field == "devices[0].device_id"


# Prekeys.


async def test_uploaded_prekeys_are_kept_and_counted(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    signed = phone.new_prekey(world.now_ms)
    one_time = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(100)]
    answer = await world.keys.UploadPrekeys(phone.upload(signed, *one_time), metadata=world.device(phone))
    assert answer.one_time_prekeys_left == 100
    # Under a new counter the same upload is safe to repeat.
    answer = await world.keys.UploadPrekeys(phone.upload(signed, *one_time), metadata=world.device(phone))
    assert answer.one_time_prekeys_left == 100
    state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
    assert (state.signed_prekey_id, state.one_time_prekeys_left) == (signed.prekey_id, 100)
    assert state.signed_prekey_expires_at.ToMilliseconds() == signed.expires_at_ms
    world.clock.advance(timedelta(days=90))
    state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
    assert state.one_time_prekeys_left == 0
    assert (state.highest_prekey.prekey_id, state.min_suite) == (one_time[-1].prekey_id, 1), "what has expired is known still"


async def test_a_device_that_is_gone_is_told_so_and_has_no_state(world: World, phone: Phone) -> None:
    await refused(
        world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone)), grpc.StatusCode.UNAUTHENTICATED
    )


async def test_a_counter_works_once(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    request = phone.upload(phone.new_prekey(world.now_ms), counter=5)
    await world.keys.UploadPrekeys(request, metadata=world.device(phone))
    for replayed in (request, phone.upload(counter=5), phone.upload(counter=4)):
        message, _ = await refused(world.keys.UploadPrekeys(replayed, metadata=world.device(phone)), grpc.StatusCode.ABORTED)
        assert "counter" in message
    await world.keys.UploadPrekeys(phone.upload(counter=6), metadata=world.device(phone))


async def test_of_concurrent_uploads_with_one_counter_one_wins(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    requests = [phone.upload(phone.new_prekey(world.now_ms), counter=1) for _ in range(8)]
    calls = [world.keys.UploadPrekeys(each, metadata=world.device(phone)) for each in requests]
    codes = [await call.code() for call in calls]
    assert sorted(codes, key=str) == [grpc.StatusCode.ABORTED] * 7 + [grpc.StatusCode.OK]


async def test_a_change_that_the_device_did_not_sign_uses_up_nothing(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    good = phone.upload(phone.new_prekey(world.now_ms), counter=3)
    forged = Phone(world.now_ms)
    forged.device_id = phone.device_id
    for bad in (
        forged.upload(counter=3),
        keys_pb2.UploadPrekeysRequest(change=good.change, proof=common_pb2.DeviceProof(counter=4, signature=good.proof.signature)),
        keys_pb2.UploadPrekeysRequest(change=good.change + b"\x10\x01", proof=good.proof),
        keys_pb2.UploadPrekeysRequest(change=good.change, proof=common_pb2.DeviceProof(counter=3)),
    ):
        _, field = await refused(world.keys.UploadPrekeys(bad, metadata=world.device(phone)))
        assert field == "proof.signature"
    await world.keys.UploadPrekeys(good, metadata=world.device(phone))


async def test_prekeys_that_nobody_should_seal_to_are_refused(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    now, good = world.now_ms, phone.new_prekey(world.now_ms)
    bad = {
        "low order": phone.resigned(replace(good, public_key=bytes(32))),
        "low order, top bit set": phone.resigned(replace(good, public_key=b"\x01" + bytes(30) + b"\x80")),
        "short": phone.resigned(replace(good, public_key=b"k" * 31)),
        "expired": phone.resigned(replace(good, created_at_ms=now - 2 * DAY_MS, expires_at_ms=now)),
        "from the future": phone.resigned(replace(good, created_at_ms=now + DAY_MS, expires_at_ms=now + 2 * DAY_MS)),
        "lives too long": phone.resigned(replace(good, expires_at_ms=now + 91 * DAY_MS)),
        "ends before it begins": replace(good, expires_at_ms=now - 1),
        "hybrid, short": phone.resigned(replace(good, suite=2, public_key=b"k" * 1215)),
        "hybrid, ML-KEM beyond its modulus": phone.resigned(replace(good, suite=2, public_key=b"\xff" * 1184 + b"k" * 32)),
        "hybrid, X25519 of low order": phone.resigned(replace(good, suite=2, public_key=b"k" * 1184 + bytes(32))),
        "unknown suite": phone.resigned(replace(good, suite=3, public_key=b"k" * 1216)),
        "suite 0": replace(good, suite=0),
        "not signed": replace(good, signature=bytes(64)),
        "signature cut short": replace(good, signature=good.signature[:-1]),
        "id used before": phone.resigned(replace(good, prekey_id=phone.signed_prekey.prekey_id)),
    }
    for name, prekey in bad.items():
        _, field = await refused(world.keys.UploadPrekeys(phone.upload(prekey), metadata=world.device(phone)))
        assert field in ("change.prekeys", "change.prekeys[0]"), name
    state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
    assert state.signed_prekey_id == phone.signed_prekey.prekey_id


async def test_what_is_no_upload_is_refused(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    unknown_kind = keys_pb2.PrekeyUpload(prekeys=[keys_pb2.Prekey(suite=1)]).SerializeToString()
    for change, counter, expected in (
        (b"\xff", 1, "change"),
        (bytes(300_000), 1, "change"),
        (unknown_kind, 1, "change.prekeys[0].kind"),
        (b"", 0, "proof.counter"),
        (b"", 1 << 63, "proof.counter"),
    ):
        request = keys_pb2.UploadPrekeysRequest(change=change, proof=common_pb2.DeviceProof(counter=counter))
        assert (await refused(world.keys.UploadPrekeys(request, metadata=world.device(phone))))[1] == expected
    many = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(101)]
    for upload in (phone.upload(*many), phone.upload(many[0], many[0]), phone.upload(*[phone.new_prekey(world.now_ms) for _ in range(2)])):
        assert (await refused(world.keys.UploadPrekeys(upload, metadata=world.device(phone))))[1] == "change.prekeys"
    # Raised without a signed prekey that says so.
    assert (await refused(world.keys.UploadPrekeys(phone.upload(min_suite=2), metadata=world.device(phone))))[1] == "change.prekeys"
    for upload in (phone.upload(min_suite=3), phone.upload(min_suite=300)):
        assert (await refused(world.keys.UploadPrekeys(upload, metadata=world.device(phone))))[1] == "change.min_suite"


async def test_a_raised_lowest_suite_retires_the_prekeys_that_were_signed_for_a_lower_one(
    world: World, phone: Phone, subscriber: SubscriberId
) -> None:
    await world.put(phone.new_device(subscriber))
    one_time = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(3)]
    await world.keys.UploadPrekeys(phone.upload(*one_time, counter=1), metadata=world.device(phone))
    device = await world.store.device(phone.device_id)
    assert device is not None
    # No call can raise it before a second suite is supported: ask the store.
    assert await world.store.upload(device, 2, 2, rules.Upload((), 2), world.clock.now()) == 0
    assert (await world.store.one_time_prekeys(phone.device_id, world.clock.now()))[0] == 0
    # What was checked against the device as it was before does not count any more.
    with pytest.raises(Aborted):
        await world.store.upload(device, 3, 1, rules.Upload((), 0), world.clock.now())


# Sealing.


async def test_what_the_server_seals_opens_on_each_device(world: World, subscriber: SubscriberId) -> None:
    phones = [Phone(world.now_ms) for _ in range(3)]
    await world.put(*(phone.new_device(subscriber) for phone in phones))
    key = await platform_key(world)
    sizes = (0, 300, CONTENT_BYTES_MAX)
    items = [world.item(subscriber, *phones, content=os.urandom(size)) for size in sizes]
    results = await world.seal(*items)
    for item, result in zip(items, results, strict=True):
        assert [phone.open(result.parts, key) for phone in phones] == [item.content] * 3
        header = Header.decode(result.parts.head[:94])
        assert header.server_sealed
        assert header.sender_key_id == content_key_id(key)
        assert (header.content_id, header.sender_id) == (result.parts.content_id, item.sender_id)
        assert (header.created_at_ms, header.expires_at_ms) == (item.created_at_ms, item.expires_at_ms)
    assert len({each.parts.content_id for each in results}) == len(results)


async def test_a_recipient_looks_different_to_each_sender(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    bank, shop = uuid7(), uuid7()
    results = await world.seal(*(world.item(subscriber, phone, sender_id=each) for each in (bank, bank, shop)))
    refs = [Header.decode(each.parts.head[:94]).recipient_ref for each in results]
    assert refs[0] == refs[1] != refs[2]


async def test_devices_without_a_prekey_of_now_are_named_and_the_others_sealed_for(
    world: World, phone: Phone, subscriber: SubscriberId
) -> None:
    expiring, foreign, unknown = Phone(world.now_ms), Phone(world.now_ms), Phone(world.now_ms)
    short_lived = expiring.new_prekey(world.now_ms, lifetime_ms=1000)
    await world.put(phone.new_device(subscriber), expiring.new_device(subscriber, short_lived), foreign.new_device(SubscriberId(uuid7())))
    assert await world.sealed_for(expiring, subscriber)
    world.clock.advance(timedelta(seconds=1))
    [result] = await world.seal(world.item(subscriber, expiring, phone, foreign, unknown, phone))
    assert list(result.devices_without_prekey) == [expiring.device_id, foreign.device_id, unknown.device_id]
    assert [each.device_id for each in result.parts.stanzas] == [phone.device_id]
    [result] = await world.seal(world.item(subscriber, unknown))
    assert not result.parts.stanzas
    assert result.parts.content_id


async def test_a_bad_item_is_named_and_its_batch_refused(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    good = world.item(subscriber, phone)
    for bad in (
        world.item(subscriber, phone, content=bytes(CONTENT_BYTES_MAX + 1)),
        world.item(subscriber, phone, sender_id=b"short"),
        world.item(subscriber, phone, expires_at_ms=world.now_ms),
        world.item(subscriber, phone, expires_at_ms=world.now_ms + 29 * DAY_MS),
        world.item(subscriber, phone, created_at_ms=1 << 50, expires_at_ms=(1 << 50) + 1),
        world.item(subscriber, *[phone] * 513),
    ):
        message, field = await refused(world.seal(good, bad))
        assert (field[:8], message[:8]) == ("items[1]", "items[1]")
    assert (await refused(world.seal(*[good] * 513)))[1] == "items"
    assert (await refused(world.seal(*[world.item(subscriber, *[phone] * 512)] * 9)))[1] == "items"


async def test_others_are_served_while_a_large_batch_is_sealed(world: World, subscriber: SubscriberId) -> None:
    phones = [Phone(world.now_ms) for _ in range(8)]
    await world.put(*(phone.new_device(subscriber) for phone in phones))
    batch = asyncio.create_task(world.seal(*[world.item(subscriber, *phones)] * 512))
    served = 0
    while not batch.done():
        await platform_key(world)
        served += 1
    assert len(await batch) == 512
    # Some 400 ms in slices of 2 ms; without slices it is the one or two that came before and after.
    assert served >= 5


# Stanzas.


async def test_stanzas_that_fit_are_accepted_and_others_are_named(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    second, gone = Phone(world.now_ms), Phone(world.now_ms)
    await world.put(phone.new_device(subscriber), second.new_device(subscriber), gone.new_device(subscriber))
    await world.remove((subscriber, gone.device_id))
    sender_id = uuid7()
    [sealed] = await world.seal(world.item(subscriber, phone, second, sender_id=sender_id))
    ref = Header.decode(sealed.parts.head[:94]).recipient_ref
    wrong_kind, wrong_id, wrong_suite = second.stanza(), second.stanza(), second.stanza()
    wrong_kind.kind, wrong_id.prekey_id, wrong_suite.suite = keys_pb2.PREKEY_KIND_ONE_TIME, 99, 2

    def check(*stanzas: sealing_pb2.StanzaKey, devices: Sequence[Phone] = (phone, second), **fields: Any) -> sealing_pb2.StanzaCheck:
        wanted = {"sender_id": sender_id, "subscriber_id": subscriber, "recipient_ref": ref} | fields
        return sealing_pb2.StanzaCheck(device_ids=[each.device_id for each in devices], stanzas=stanzas, **wanted)

    verdicts = await world.check(
        check(phone.stanza(), second.stanza()),
        check(phone.stanza()),
        check(phone.stanza(), second.stanza(), gone.stanza()),
        check(phone.stanza(), wrong_kind),
        check(phone.stanza(), wrong_id),
        check(phone.stanza(), wrong_suite),
        check(phone.stanza(), second.stanza(), sender_id=uuid7()),
        check(phone.stanza(), second.stanza(), recipient_ref=b""),
        # A device that has no prekey is not missing: nobody can seal for it. A stanza for it is of no use.
        check(phone.stanza(), second.stanza(), devices=(phone, second, gone)),
        check(phone.stanza(), second.stanza(), gone.stanza(), devices=(phone, second, gone)),
        # Somebody else's devices.
        check(phone.stanza(), second.stanza(), subscriber_id=uuid7()),
        check(devices=()),
    )
    head = (await world.store.device_lists([subscriber]))[subscriber].head
    assert {each.device_list_version for each in verdicts[:10]} == {head}
    assert len(verdicts[10].device_list_version) == 32
    named = [
        (list(each.missing_device_ids), list(each.surplus_device_ids), list(each.stale_device_ids), each.foreign_recipient_ref)
        for each in verdicts
    ]
    a, b, c = phone.device_id, second.device_id, gone.device_id
    assert named == [
        ([], [], [], False),
        ([b], [], [], False),
        ([], [c], [], False),
        ([], [], [b], False),
        ([], [], [b], False),
        ([], [], [b], False),
        ([], [], [], True),
        ([], [], [], True),
        ([], [], [], False),
        ([], [], [c], False),
        ([], [], [a, b], True),
        ([], [], [], False),
    ]


async def test_a_replaced_prekey_is_accepted_while_its_private_half_is_surely_kept(
    world: World, phone: Phone, subscriber: SubscriberId
) -> None:
    await world.put(phone.new_device(subscriber))
    first = phone.signed_prekey
    second = phone.new_prekey(world.now_ms)
    await world.keys.UploadPrekeys(phone.upload(second), metadata=world.device(phone))

    async def stale(prekey: SignedPrekey) -> bool:
        check = sealing_pb2.StanzaCheck(
            sender_id=uuid7(), subscriber_id=subscriber, device_ids=[phone.device_id], stanzas=[phone.stanza(prekey)]
        )
        return bool((await world.check(check))[0].stale_device_ids)

    assert [await stale(each) for each in (first, second)] == [False, False]
    world.clock.advance(timedelta(days=7) - timedelta(milliseconds=1))
    assert [await stale(each) for each in (first, second)] == [False, False]
    world.clock.advance(timedelta(milliseconds=1))
    assert [await stale(each) for each in (first, second)] == [True, False]
    third = phone.new_prekey(world.now_ms)
    await world.keys.UploadPrekeys(phone.upload(third), metadata=world.device(phone))
    assert [await stale(each) for each in (first, second, third)] == [True, False, False]


async def test_a_malformed_check_is_named(world: World, subscriber: SubscriberId) -> None:
    good = sealing_pb2.StanzaCheck(sender_id=uuid7(), subscriber_id=subscriber)
    bad = sealing_pb2.StanzaCheck(sender_id=b"short", subscriber_id=subscriber)
    assert (await refused(world.check(good, bad)))[1].startswith("checks[1].")
    assert (await refused(world.check(*[good] * 513)))[1] == "checks"


# Senders that seal by themselves.


async def ask(world: World, sender_id: SenderId, *queries: keys_pb2.RecipientKeysQuery) -> list[keys_pb2.RecipientKeysResult]:
    request = keys_pb2.GetRecipientKeysRequest(queries=queries)
    return list((await world.keys.GetRecipientKeys(request, metadata=world.sender(sender_id, APP, OTHER_APP))).results)


def query(phone_number: str, app_id: str = "", request_id: str = "request-1") -> keys_pb2.RecipientKeysQuery:
    return keys_pb2.RecipientKeysQuery(request_id=request_id, recipient=common_pb2.Recipient(phone=phone_number), app_id=app_id)


async def test_a_sender_seals_with_what_the_key_call_gives(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    keyless = Phone(world.now_ms)
    await world.put(phone.new_device(subscriber))
    world.directory.people["+380501110001", APP] = subscriber, [phone.device_id, keyless.device_id]
    sender_id = SenderId(uuid7())
    results = await ask(world, sender_id, query("+380501110001"), query("+380501110001"))
    assert results[0] == results[1]
    keys = results[0].keys
    assert keys.device_list_version == (await world.store.device_lists([subscriber]))[subscriber].head
    assert keys.identity_changed_at.ToMilliseconds() == world.now_ms
    [device] = keys.devices
    found = RecipientDevice(
        DeviceId(device.device_id),
        device.identity_public_key,
        read_prekey(device.signed_prekey, PrekeyKind.SIGNED),
        min_suite=device.min_suite,
    )
    to: Recipient = recipient(found, world.now_ms)
    key = ContentSigningKey.generate()
    header = Header(ContentId(uuid7()), sender_id, key.key_id, RecipientRef(keys.recipient_ref), world.now_ms, world.now_ms + DAY_MS)
    made = seal(b"from the bank itself", header, [to], key)
    check = sealing_pb2.StanzaCheck(
        sender_id=sender_id,
        subscriber_id=subscriber,
        device_ids=[phone.device_id, keyless.device_id],
        stanzas=[
            sealing_pb2.StanzaKey(
                device_id=each.device_id, suite=each.suite, prekey_id=each.prekey_id, kind=keys_pb2.PrekeyKind.ValueType(each.kind)
            )
            for each in made.stanzas
        ],
        recipient_ref=made.header.recipient_ref,
    )
    assert await world.check(check) == [sealing_pb2.StanzaVerdict(device_list_version=keys.device_list_version)]
    parts = sealing_pb2.SealedParts(
        head=made.head, tail=made.tail, stanzas=[sealing_pb2.DeviceStanza(device_id=s.device_id, stanza=s.encode()) for s in made.stanzas]
    )
    assert phone.open(parts, key.public_key) == b"from the bank itself"


async def test_each_query_has_its_own_answer(world: World, phone: Phone, subscriber: SubscriberId) -> None:
    await world.put(phone.new_device(subscriber))
    world.directory.people["+380501110002", OTHER_APP] = subscriber, [phone.device_id]
    world.directory.people["+380501110003", APP] = SubscriberId(uuid7()), [DeviceId(uuid7())]
    results = await ask(
        world,
        SenderId(uuid7()),
        query("+380501110002"),
        query("+380501110002", app_id="somebody-else's"),
        query("+380501110002", app_id=OTHER_APP),
        query("050"),
        query("+380501110003"),
        query("+380501110002", request_id=""),
        query("+380501110002", request_id="r" * 65),
        keys_pb2.RecipientKeysQuery(request_id="request-1"),
        query("+380501110002", request_id="request\0"),
        query("+380501110002", request_id="запит"),
    )
    outcomes = [each.WhichOneof("outcome") for each in results]
    assert outcomes == ["not_registered", "refused", "keys", "refused", "not_registered", *["refused"] * 5]
    assert results[0].not_registered == common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND
    assert "somebody-else's" in results[1].refused
    assert "international" in results[3].refused
    assert results[4].not_registered == common_pb2.REASON_CODE_NO_PREKEY


async def test_a_query_too_long_to_be_right_is_refused_in_few_words_and_goes_no_further(world: World, subscriber: SubscriberId) -> None:
    at_bound = "+" + "3" * 1020
    world.directory.people["+380501110012", APP] = subscriber, []
    results = await ask(world, SenderId(uuid7()), query("+" + "3" * 300_000), query("+380501110012", app_id="a" * 100_000), query(at_bound))
    assert ["recipient is longer" in each.refused or "app_id is longer" in each.refused for each in results] == [True, True, False]
    assert all(len(each.refused) < 200 for each in results)


async def test_a_sender_without_an_app_and_too_many_queries_are_refused(world: World) -> None:
    request = keys_pb2.GetRecipientKeysRequest(queries=[query("+380501110004")])
    answer = await world.keys.GetRecipientKeys(request, metadata=world.sender(SenderId(uuid7())))
    assert "no app" in answer.results[0].refused
    assert (await refused(ask(world, SenderId(uuid7()), *[query("+380501110004")] * 101)))[1] == "queries"
    assert await ask(world, SenderId(uuid7())) == []


# One-time prekeys are handed out.


def keys_of(result: keys_pb2.RecipientKeysResult) -> dict[DeviceId, int | None]:
    """Which one-time prekey each device of an answer has; None: the signed prekey alone."""
    assert all(each.HasField("signed_prekey") for each in result.keys.devices)
    return {
        DeviceId(each.device_id): each.one_time_prekey.prekey_id if each.HasField("one_time_prekey") else None
        for each in result.keys.devices
    }


async def key_of(world: World, sender_id: SenderId, number: str, request_id: str) -> int | None:
    """The one-time prekey that a sender gets for a recipient with one device."""
    [result] = await ask(world, sender_id, query(number, request_id=request_id))
    [prekey_id] = keys_of(result).values()
    return prekey_id


async def stock(world: World, phone: Phone, count: int, **options: Any) -> list[SignedPrekey]:
    """Gives a phone that is known one-time prekeys."""
    prekeys = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME, **options) for _ in range(count)]
    await world.keys.UploadPrekeys(phone.upload(*prekeys), metadata=world.device(phone))
    return prekeys


async def left(world: World, phone: Phone) -> int:
    state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
    return state.one_time_prekeys_left


@pytest_asyncio.fixture(loop_scope="session")
async def number(world: World, phone: Phone, subscriber: SubscriberId) -> str:
    """Of a recipient with one device, that is known and has no one-time prekeys yet."""
    await world.put(phone.new_device(subscriber))
    world.directory.people["+380502220001", APP] = subscriber, [phone.device_id]
    return "+380502220001"


async def test_a_request_gets_a_one_time_prekey_of_its_own_and_the_same_when_it_asks_again(world: World, phone: Phone, number: str) -> None:
    prekeys = await stock(world, phone, 30)
    bank, shop = SenderId(uuid7()), SenderId(uuid7())
    results = await ask(world, bank, query(number, request_id="a"), query(number, request_id="b"), query(number, request_id="a"))
    assert results[0] == results[2]
    assert read_prekey(results[0].keys.devices[0].one_time_prekey, PrekeyKind.ONE_TIME) == prekeys[0]
    assert read_prekey(results[1].keys.devices[0].one_time_prekey, PrekeyKind.ONE_TIME) == prekeys[1]
    assert await key_of(world, shop, number, "a") == prekeys[2].prekey_id
    assert await ask(world, bank, query(number, request_id="a")) == [results[0]]
    assert await key_of(world, bank, number, "b") == prekeys[1].prekey_id
    assert await left(world, phone) == 27


async def test_a_crash_before_the_commit_hands_out_nothing_and_after_it_the_same_again(world: World, phone: Phone, number: str) -> None:
    prekeys = await stock(world, phone, 5)
    bank = SenderId(uuid7())
    wanted = [rules.Wanted("a", phone.device_id, 1, 1)]

    async def crash_before_commit() -> None:
        async with world.store._db.transaction() as connection:
            found = await world.store._hand_out(connection, SenderId(uuid7()), wanted, world.clock.now())
            assert [prekey for prekey, _ in found.values()] == [prekeys[0]]
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        await crash_before_commit()
    assert await left(world, phone) == 5
    # Committed, and nobody heard of it.
    assert await world.store.hand_out(bank, wanted, world.clock.now()) == {("a", phone.device_id): prekeys[0]}
    assert await key_of(world, bank, number, "a") == prekeys[0].prekey_id
    assert await left(world, phone) == 4


async def test_no_key_is_given_twice_and_no_request_gets_two_however_many_ask_at_once(world: World) -> None:
    people: dict[str, list[Phone]] = {f"+38050333000{n}": [Phone(world.now_ms) for _ in range(2)] for n in range(3)}
    phones = [phone for each in people.values() for phone in each]
    for number, devices in people.items():
        owner = SubscriberId(uuid7())
        await world.put(*(phone.new_device(owner) for phone in devices))
        world.directory.people[number, APP] = owner, [phone.device_id for phone in devices]
    for phone in phones:
        await stock(world, phone, 100)
    chance = random.Random(11)  # noqa: S311 - an order, not a secret
    senders = [SenderId(uuid7()) for _ in range(25)]

    async def call(sender_id: SenderId) -> dict[tuple[SenderId, str, DeviceId], int | None]:
        # Two requests for everybody, in an order of its own: locks must not cross.
        names = [(number, f"{number}/{n}") for number in people for n in range(2)]
        chance.shuffle(names)
        results = await ask(world, sender_id, *(query(number, request_id=request_id) for number, request_id in names))
        return {
            (sender_id, request_id, device_id): prekey_id
            for (_, request_id), result in zip(names, results, strict=True)
            for device_id, prekey_id in keys_of(result).items()
        }

    # Each sender asks three times at once: identical calls, as after a lost answer.
    answers = await asyncio.gather(*(call(each) for each in senders * 3))
    given: dict[tuple[SenderId, str, DeviceId], int | None] = {}
    for answer in answers:
        for name, prekey_id in answer.items():
            assert given.setdefault(name, prekey_id) == prekey_id
    assert len(given) == 25 * 6 * 2
    for phone in phones:
        mine = [prekey_id for (_, _, device_id), prekey_id in given.items() if device_id == phone.device_id]
        assert None not in mine
        assert len(set(mine)) == len(mine) == 50
        assert await left(world, phone) == 50


async def test_the_last_key_goes_to_one_and_the_others_seal_to_the_signed_prekey(world: World, phone: Phone, number: str) -> None:
    await stock(world, phone, 3)
    senders = [SenderId(uuid7()) for _ in range(12)]
    got = await asyncio.gather(*(key_of(world, each, number, "a") for each in senders))
    assert sorted(each is not None for each in got) == [False] * 9 + [True] * 3
    assert await left(world, phone) == 0
    more = await stock(world, phone, 20)
    # Who got none may get one now; who got one keeps it.
    again = [await key_of(world, each, number, "a") for each in senders]
    assert [b for a, b in zip(got, again, strict=True) if a is not None] == [a for a in got if a is not None]
    assert [b for a, b in zip(got, again, strict=True) if a is None] == [each.prekey_id for each in more[:9]]


async def test_keys_that_expired_are_passed_over_and_one_that_expires_later_is_not_given_again(
    world: World, phone: Phone, number: str
) -> None:
    bank = SenderId(uuid7())
    await stock(world, phone, 2, lifetime_ms=DAY_MS)
    [good] = await stock(world, phone, 1, lifetime_ms=3 * DAY_MS)
    await stock(world, phone, 2, lifetime_ms=DAY_MS)
    world.clock.advance(timedelta(days=1))
    assert await key_of(world, bank, number, "a") == good.prekey_id
    assert await key_of(world, bank, number, "b") is None
    assert await left(world, phone) == 0
    world.clock.advance(timedelta(days=2))
    await stock(world, phone, 1)
    # The request had its key; what is sealed for it now goes to the signed prekey.
    assert await key_of(world, bank, number, "a") is None


async def test_a_sender_gets_ten_keys_of_a_device_a_day_and_leaves_the_rest_to_others(world: World, phone: Phone, number: str) -> None:
    await stock(world, phone, 100)
    greedy, other = SenderId(uuid7()), SenderId(uuid7())
    results = await ask(world, greedy, *(query(number, request_id=f"{n}") for n in range(12)))
    got = [key for result in results for key in keys_of(result).values()]
    assert [each is not None for each in got] == [True] * 10 + [False] * 2
    assert await key_of(world, greedy, number, "more") is None
    # What it has it may ask for as often as it likes.
    assert await key_of(world, greedy, number, "3") == got[3]
    assert await key_of(world, other, number, "a") is not None
    world.clock.advance(timedelta(days=1) - timedelta(milliseconds=1))
    assert await key_of(world, greedy, number, "more") is None
    world.clock.advance(timedelta(milliseconds=1))
    assert await key_of(world, greedy, number, "more") is not None
    assert await left(world, phone) == 88


async def test_at_once_a_sender_gets_no_more_than_one_after_the_other(world: World, phone: Phone, number: str) -> None:
    await stock(world, phone, 100)
    greedy = SenderId(uuid7())
    got = await asyncio.gather(*(key_of(world, greedy, number, f"{n}") for n in range(40)))
    assert sum(each is not None for each in got) == 10


async def test_a_repeated_upload_does_not_bring_back_what_was_handed_out(world: World, phone: Phone, number: str) -> None:
    prekeys = await stock(world, phone, 3)
    bank = SenderId(uuid7())
    for n in range(2):
        assert await key_of(world, bank, number, f"{n}") == prekeys[n].prekey_id
    # As after a lost answer: the same keys under a new counter.
    answer = await world.keys.UploadPrekeys(phone.upload(*prekeys), metadata=world.device(phone))
    assert answer.one_time_prekeys_left == 1
    assert await key_of(world, bank, number, "2") == prekeys[2].prekey_id
    answer = await world.keys.UploadPrekeys(phone.upload(*prekeys), metadata=world.device(phone))
    assert answer.one_time_prekeys_left == 0
    assert await key_of(world, bank, number, "3") is None


async def test_an_upload_and_handouts_at_the_same_time_lose_no_key_and_double_none(world: World, phone: Phone, number: str) -> None:
    await stock(world, phone, 20)
    senders = [SenderId(uuid7()) for _ in range(30)]
    uploads = [phone.upload(*(phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(10)), counter=n) for n in range(2, 7)]

    async def upload() -> None:
        for each in uploads:
            await world.keys.UploadPrekeys(each, metadata=world.device(phone))

    got, _ = await asyncio.gather(asyncio.gather(*(key_of(world, each, number, "a") for each in senders)), upload())
    given = [each for each in got if each is not None]
    assert len(set(given)) == len(given)
    assert await left(world, phone) == 20 + 50 - len(given)


async def test_a_removed_device_takes_its_handouts_along(world: World, phone: Phone, number: str, subscriber: SubscriberId) -> None:
    [prekey] = await stock(world, phone, 1)
    bank = SenderId(uuid7())
    assert await key_of(world, bank, number, "a") == prekey.prekey_id
    await world.remove((subscriber, phone.device_id))
    await world.put(phone.new_device(subscriber))
    assert await key_of(world, bank, number, "a") is None
    assert await stale(world, bank, subscriber, phone, prekey)


async def test_a_raised_lowest_suite_takes_back_what_was_handed_out_below_it(world: World, phone: Phone, number: str) -> None:
    await stock(world, phone, 2)
    bank = SenderId(uuid7())
    wanted = rules.Wanted("a", phone.device_id, 1, 1)
    assert await world.store.hand_out(bank, [wanted], world.clock.now())
    device = await world.store.device(phone.device_id)
    assert device is not None
    await world.store.upload(device, 5, 2, rules.Upload((), 2), world.clock.now())
    assert await world.store.hand_out(bank, [wanted], world.clock.now()) == {}


async def test_a_phone_that_lost_private_halves_has_its_former_prekeys_forgotten(
    world: World, phone: Phone, number: str, subscriber: SubscriberId
) -> None:
    async def highest() -> int:
        state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
        known = read_prekey(state.highest_prekey, PrekeyKind(state.highest_prekey.kind))
        assert verify_ed25519(phone.identity.public_key, prekey_proof(known, phone.device_id, state.min_suite), known.signature), (
            "the phone believes nothing else"
        )
        return known.prekey_id

    bank, former = SenderId(uuid7()), [phone.signed_prekey]
    assert await highest() == former[0].prekey_id
    given, _ = former[1:] = await stock(world, phone, 2)
    assert await key_of(world, bank, number, "a") == given.prekey_id
    former.append(phone.new_prekey(world.now_ms))
    await world.keys.UploadPrekeys(phone.upload(former[-1]), metadata=world.device(phone))
    assert await highest() == former[-1].prekey_id
    assert not any([await stale(world, bank, subscriber, phone, each) for each in (former[0], given, former[-1])])
    one_time = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(2)]
    alone = phone.upload(*one_time, forget_former=True)
    assert (await refused(world.keys.UploadPrekeys(alone, metadata=world.device(phone))))[1] == "change.prekeys"
    signed = phone.new_prekey(world.now_ms)
    for _ in range(2):  # the answer to the first was lost
        upload = phone.upload(signed, *one_time, forget_former=True)
        assert (await world.keys.UploadPrekeys(upload, metadata=world.device(phone))).one_time_prekeys_left == 2
    assert all([await stale(world, bank, subscriber, phone, each) for each in former])
    assert not await stale(world, bank, subscriber, phone, signed)
    assert await key_of(world, bank, number, "a") == one_time[0].prekey_id
    for _ in range(2):  # and so was its repeat's: nothing is forgotten, or given twice, of what was handed out meanwhile
        upload = phone.upload(signed, *one_time, forget_former=True)
        assert (await world.keys.UploadPrekeys(upload, metadata=world.device(phone))).one_time_prekeys_left == 1
        assert not await stale(world, bank, subscriber, phone, one_time[0])
    assert await key_of(world, SenderId(uuid7()), number, "b") == one_time[1].prekey_id
    [result] = await world.seal(world.item(subscriber, phone))
    assert phone.open(result.parts, await platform_key(world)) == b"hello"
    assert await highest() == signed.prekey_id


async def test_the_highest_id_is_known_wherever_the_prekey_is(world: World, phone: Phone, number: str) -> None:
    for made in (1, 30):
        given = (await stock(world, phone, made))[-1]
        state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
        assert state.highest_prekey.prekey_id == given.prekey_id
        bank = SenderId(uuid7())
        while await key_of(world, bank, number, str(uuid7())) is not None:
            bank = SenderId(uuid7())
        state = await world.keys.GetPrekeyState(keys_pb2.GetPrekeyStateRequest(), metadata=world.device(phone))
        assert (state.highest_prekey.prekey_id, state.one_time_prekeys_left) == (given.prekey_id, 0)


async def test_devices_without_one_time_prekeys_are_not_locked(world: World, phone: Phone, number: str, urls: dict[str, str]) -> None:
    other = await connect(urls["keys"], search_path="keys")
    try:
        async with other.transaction():
            await other.fetch("SELECT FROM devices WHERE device_id = $1 FOR UPDATE", phone.device_id)
            assert await key_of(world, SenderId(uuid7()), number, "a") is None
    finally:
        await other.close()


async def test_handing_out_takes_the_same_number_of_statements_for_one_device_and_for_many(world: World, subscriber: SubscriberId) -> None:
    phones = [Phone(world.now_ms) for _ in range(20)]
    await world.put(*(each.new_device(subscriber) for each in phones))
    for each in phones:
        await stock(world, each, 6)
    bank = SenderId(uuid7())
    # The first time a connection also asks for types.
    await world.store.hand_out(bank, [rules.Wanted("first", phones[0].device_id, 1, 1)], world.clock.now())
    statements: list[str] = []
    async with world.store._db.connection() as connection:
        pass
    with connection.query_logger(lambda record: statements.append(record.query)):
        for some, requests in ((phones[:1], 1), (phones, 4)):
            wanted = [rules.Wanted(f"{len(some)}/{n}", each.device_id, 1, 1) for each in some for n in range(requests)]
            for _ in range(2):
                assert len(await world.store.hand_out(bank, wanted, world.clock.now())) == len(wanted)
                # Marks the end: the log runs a little behind.
                await world.store.device(phones[0].device_id)
    marks = [n for n, statement in enumerate(statements) if statement.startswith("-- One device.")]
    first, first_again, many = marks[0], marks[1] - marks[0] - 1, marks[2] - marks[1] - 1
    # With BEGIN and COMMIT; who asks again costs one.
    assert (first, first_again, many) == (9, 1, 9)


async def test_handouts_that_are_over_are_swept_a_bounded_number_at_a_time(
    world: World, phone: Phone, number: str, urls: dict[str, str]
) -> None:
    await stock(world, phone, 10)
    bank = SenderId(uuid7())
    for n in range(5):
        await key_of(world, bank, number, f"{n}")
    admin = await connect(urls["admin"])
    try:
        mine = "SELECT count(*) FROM keys.handouts WHERE sender_id = $1"
        just_before = world.clock.now() + timedelta(days=35) - timedelta(milliseconds=1)
        # Those of tests before this one may go too.
        while await admin.fetchval("SELECT keys.sweep_handouts(1000, $1)", just_before):
            pass
        assert await admin.fetchval(mine, bank) == 5
        over = just_before + timedelta(milliseconds=1)
        assert [await admin.fetchval("SELECT keys.sweep_handouts(2, $1)", over) for _ in range(4)] == [2, 2, 1, 0]
        assert await admin.fetchval(mine, bank) == 0
    finally:
        await admin.close()


# What was sealed to them is accepted from whom they were handed to.


async def stale(world: World, sender_id: SenderId, subscriber: SubscriberId, phone: Phone, prekey: SignedPrekey) -> bool:
    check = sealing_pb2.StanzaCheck(
        sender_id=sender_id, subscriber_id=subscriber, device_ids=[phone.device_id], stanzas=[phone.stanza(prekey)]
    )
    [verdict] = await world.check(check)
    assert not verdict.missing_device_ids
    assert not verdict.surplus_device_ids
    return bool(verdict.stale_device_ids)


async def test_a_one_time_prekey_is_accepted_from_whom_it_was_handed_to_and_again_when_the_publish_is_repeated(
    world: World, phone: Phone, number: str, subscriber: SubscriberId
) -> None:
    given, kept = await stock(world, phone, 2)
    bank, shop = SenderId(uuid7()), SenderId(uuid7())
    assert await stale(world, bank, subscriber, phone, given)
    assert await key_of(world, bank, number, "a") == given.prekey_id
    assert [await stale(world, bank, subscriber, phone, given) for _ in range(3)] == [False] * 3
    assert await stale(world, shop, subscriber, phone, given)
    assert await stale(world, bank, subscriber, phone, kept)
    assert await stale(world, bank, subscriber, phone, replace(given, kind=PrekeyKind.SIGNED))
    assert await stale(world, bank, subscriber, phone, replace(given, suite=2))
    assert await stale(world, bank, subscriber, phone, replace(given, suite=70_000, prekey_id=(1 << 32) - 1))
    assert await stale(world, bank, SubscriberId(uuid7()), phone, given)
    # Used up does not matter here: the handout says whose it is.
    assert await key_of(world, shop, number, "a") == kept.prekey_id
    assert not await stale(world, bank, subscriber, phone, given)
    world.clock.advance(timedelta(days=35) - timedelta(milliseconds=1))
    assert not await stale(world, bank, subscriber, phone, given)
    world.clock.advance(timedelta(milliseconds=1))
    assert await stale(world, bank, subscriber, phone, given)


async def test_a_one_time_prekey_that_expired_is_stale(world: World, phone: Phone, number: str, subscriber: SubscriberId) -> None:
    [prekey] = await stock(world, phone, 1, lifetime_ms=DAY_MS)
    bank = SenderId(uuid7())
    await key_of(world, bank, number, "a")
    world.clock.advance(timedelta(days=1) - timedelta(milliseconds=1))
    assert not await stale(world, bank, subscriber, phone, prekey)
    world.clock.advance(timedelta(milliseconds=1))
    assert await stale(world, bank, subscriber, phone, prekey)


# The hybrid suite.


def as_known(device: keys_pb2.DeviceKeys) -> RecipientDevice:
    """A device as a sender gets it."""
    one_time = read_prekey(device.one_time_prekey, PrekeyKind.ONE_TIME) if device.HasField("one_time_prekey") else None
    return RecipientDevice(
        DeviceId(device.device_id),
        device.identity_public_key,
        read_prekey(device.signed_prekey, PrekeyKind.SIGNED),
        one_time,
        device.min_suite,
    )


async def test_a_device_registers_with_the_hybrid_suite_and_everything_is_sealed_to_it_in_that_suite(
    world: World, subscriber: SubscriberId, number: str
) -> None:
    phone, plain = Phone(world.now_ms, SUITE_HYBRID), Phone(world.now_ms)
    assert await world.put(phone.new_device(subscriber), plain.new_device(subscriber)) == ["", ""]
    world.directory.people[number, APP] = subscriber, [phone.device_id, plain.device_id]
    await stock(world, phone, 3)
    # By the server.
    [result] = await world.seal(world.item(subscriber, phone, plain))
    assert [Stanza.decode(each.stanza).suite for each in result.parts.stanzas] == [2, 1]
    key = await platform_key(world)
    assert [each.open(result.parts, key) for each in (phone, plain)] == [b"hello"] * 2
    # By a sender, to the one-time prekey.
    bank = SenderId(uuid7())
    [answer] = await ask(world, bank, query(number))
    devices = [as_known(each) for each in answer.keys.devices]
    assert [each.min_suite for each in devices] == [2, 1]
    to = [recipient(each, world.now_ms) for each in devices]
    assert [(each.suite, each.kind) for each in to] == [(2, PrekeyKind.ONE_TIME), (1, PrekeyKind.SIGNED)]
    signing = ContentSigningKey.generate()
    ref = RecipientRef(answer.keys.recipient_ref)
    header = Header(ContentId(uuid7()), bank, signing.key_id, ref, world.now_ms, world.now_ms + DAY_MS)
    made = seal(b"from the bank", header, to, signing)
    keys = [sealing_pb2.StanzaKey(device_id=s.device_id, suite=s.suite, prekey_id=s.prekey_id, kind=int(s.kind)) for s in made.stanzas]  # type: ignore[arg-type]  # an enum on the wire is its number
    check = sealing_pb2.StanzaCheck(
        sender_id=bank, subscriber_id=subscriber, device_ids=[each.device_id for each in devices], stanzas=keys, recipient_ref=ref
    )
    assert await world.check(check) == [sealing_pb2.StanzaVerdict(device_list_version=answer.keys.device_list_version)]
    parts = sealing_pb2.SealedParts(
        head=made.head, tail=made.tail, stanzas=[sealing_pb2.DeviceStanza(device_id=s.device_id, stanza=s.encode()) for s in made.stanzas]
    )
    assert [each.open(parts, signing.public_key) for each in (phone, plain)] == [b"from the bank"] * 2


async def test_a_device_goes_to_the_hybrid_suite_in_one_upload_and_what_it_had_below_is_forgotten(
    world: World, phone: Phone, number: str, subscriber: SubscriberId
) -> None:
    [given, _] = await stock(world, phone, 2)
    old, bank = phone.signed_prekey, SenderId(uuid7())
    assert await key_of(world, bank, number, "a") == given.prekey_id
    assert not await stale(world, bank, subscriber, phone, old)
    signed = phone.raised(world.now_ms + 1)
    one_time = [phone.new_prekey(world.now_ms, PrekeyKind.ONE_TIME) for _ in range(100)]
    upload = phone.upload(signed, *one_time, min_suite=SUITE_HYBRID)
    assert (await world.keys.UploadPrekeys(upload, metadata=world.device(phone))).one_time_prekeys_left == 100
    # Nothing that was made for the lower suite is good for anything any more.
    assert await stale(world, bank, subscriber, phone, old)
    assert await stale(world, bank, subscriber, phone, given)
    assert await key_of(world, bank, number, "a") == one_time[0].prekey_id
    assert not await stale(world, bank, subscriber, phone, one_time[0])
    [result] = await world.seal(world.item(subscriber, phone))
    assert phone.open(result.parts, await platform_key(world)) == b"hello"
    assert Stanza.decode(result.parts.stanzas[0].stanza).suite == SUITE_HYBRID
    # The answer was lost: the same prekeys again, under a new counter, change nothing.
    again = phone.upload(signed, *one_time, min_suite=SUITE_HYBRID)
    assert (await world.keys.UploadPrekeys(again, metadata=world.device(phone))).one_time_prekeys_left == 99
    # There is no way back.
    phone.suite = SUITE_X25519
    lower = phone.upload(phone.new_prekey(world.now_ms), min_suite=SUITE_X25519)
    assert (await refused(world.keys.UploadPrekeys(lower, metadata=world.device(phone))))[1] == "change.min_suite"
    quiet = phone.upload(phone.new_prekey(world.now_ms))
    assert (await refused(world.keys.UploadPrekeys(quiet, metadata=world.device(phone))))[1] == "change.prekeys[0]"


async def test_registering_again_raises_the_lowest_suite_but_never_lowers_it(
    world: World, phone: Phone, number: str, subscriber: SubscriberId
) -> None:
    [given] = await stock(world, phone, 1)
    first, bank = phone.new_device(subscriber), SenderId(uuid7())
    assert await key_of(world, bank, number, "a") == given.prekey_id
    phone.raised(world.now_ms - 1)  # its clock went back meanwhile: the prekey counts all the same
    second = phone.new_device(subscriber)
    assert await world.put(second, second) == ["", ""]
    assert await world.put(second) == [""]
    assert await key_of(world, bank, number, "a") is None
    assert (await world.store.one_time_prekeys(phone.device_id, world.clock.now()))[0] == 0
    [result] = await world.seal(world.item(subscriber, phone))
    assert phone.open(result.parts, await platform_key(world)) == b"hello"
    [refusal] = await world.put(first)
    assert "never goes down" in refusal
    # Also not after a removal, or at another subscriber.
    await world.remove((subscriber, phone.device_id))
    first.subscriber_id = uuid7()
    assert "never goes down" in (await world.put(first))[0]
    assert await world.put(second) == [""]


async def test_a_lowest_suite_that_the_prekey_does_not_say_is_refused(world: World, subscriber: SubscriberId) -> None:
    for suite, said in ((1, 2), (2, 1), (2, 3), (1, 300)):
        phone = Phone(world.now_ms, suite)
        device = phone.new_device(subscriber)
        device.min_suite = said
        assert (await world.put(device))[0]
        assert await world.store.device(phone.device_id) is None


async def test_a_large_stock_is_handed_out_to_its_end_in_order(world: World, number: str, subscriber: SubscriberId) -> None:
    phone = Phone(world.now_ms, SUITE_HYBRID)
    await world.put(phone.new_device(subscriber))
    world.directory.people[number, APP] = subscriber, [phone.device_id]
    # Of 70 keys the first 30 expire: more than one window looks ahead.
    expiring = await stock(world, phone, 30, lifetime_ms=1000)
    lasting = await stock(world, phone, 40)
    assert (len(expiring), await left(world, phone)) == (30, 70)
    world.clock.advance(timedelta(seconds=2))
    got = [await key_of(world, SenderId(uuid7()), number, f"{n}") for n in range(43)]
    # The first request only passes over what has expired and gets none: its content goes to the signed prekey.
    assert got == [None, *(each.prekey_id for each in lasting), None, None]


async def test_an_answer_that_would_be_too_large_says_who_is_to_be_asked_for_again_and_burns_nothing(
    world: World, subscriber: SubscriberId
) -> None:
    phones = [Phone(world.now_ms, SUITE_HYBRID) for _ in range(64)]
    assert await world.put(*(each.new_device(subscriber) for each in phones)) == [""] * 64
    await stock(world, phones[0], 20)
    for n in range(20):
        world.directory.people[f"+3805022200{n:02}", APP] = subscriber, [each.device_id for each in phones]
    bank = SenderId(uuid7())
    queries = [query(f"+3805022200{n:02}", request_id=f"{n}") for n in range(20)]
    results = await ask(world, bank, queries[0], query("050"), *queries[1:], query("+380509999999"))
    outcomes = [each.WhichOneof("outcome") for each in results]
    assert outcomes == ["keys", "refused", *["keys"] * 16, *["ask_again"] * 3, "not_registered"]
    assert await left(world, phones[0]) == 20 - 10  # what one sender gets of a device, all to those that were answered
    again = await ask(world, SenderId(uuid7()), *queries[17:])
    assert [len(each.keys.devices) for each in again] == [64] * 3
