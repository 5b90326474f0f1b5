"""gRPC of keys: who, parse, decide, answer. Protobuf stops here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from sealpush.devicelog import start_head
from sealpush.errors import ContentTooLarge
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, SubscriberId, uuid7
from sealpush.keys import ONE_TIME_PREKEYS_BATCH, ContentSigningKey, PrekeyKind, SignedPrekey
from sealpush.proofs import body_digest, change_proof, verify_proof
from sealpush.suites import SUITE_X25519
from sealpush.v1 import common_pb2, keys_pb2, keys_pb2_grpc, publish_pb2
from sealpush.wire import read_prekey, wire_prekey
from sealpushd.keys import rules
from sealpushd.keys.rules import NewDevice, SealItem, StanzaCheck, StanzaKey, Upload
from sealpushd.keys.store import DeviceList, KeyStore
from sealpushd.platform import fields, rpc
from sealpushd.platform.clients import BatchedCall
from sealpushd.platform.clock import Clock, to_ms
from sealpushd.platform.errors import FailedPrecondition, InvalidRequest, Unauthenticated
from sealpushd.platform.tokens import SenderCaller
from sealpushd.platform.vault import Vault
from sealpushd.v1 import directory_pb2, sealing_pb2, sealing_pb2_grpc

UPLOAD_METHOD: Final = "/sealpush.v1.Keys/UploadPrekeys"
# 101 prekeys of the largest suite known take 150 kB.
CHANGE_BYTES_MAX: Final = 256 * 1024
RECIPIENT_QUERIES_MAX: Final = 100
REQUEST_ID_CHARS_MAX: Final = 64
APP_ID_CHARS_MAX: Final = 64
# An identifier of 128 characters and what surrounds it: recipients of all senders travel to registration in one frame.
RECIPIENT_BYTES_MAX: Final = 1024
# 142 bytes an entry at the most.
LOG_PAGE_MAX: Final = 256
# Devices of all items of a batch: in the largest suite 5.2 MB of stanzas, within a frame of the mesh, and under a second's work.
SEAL_DEVICES_MAX: Final = 4096
# Devices in one answer: with two prekeys of the largest suite each has 2.7 kB, and gRPC takes 4 MiB unless its user asks for more. The
# first recipient always fits.
RECIPIENT_DEVICES_MAX: Final = 1100
# Sealing runs in the event loop and lets everything else run after this long. Measured against worker threads, three batches of 512 in
# flight on two cores: one thread takes 1.4 times the time and 1.7 times the CPU, two take 1.9 and 2.3 times; with the other core busy it
# is 1.2 and 1.1 or more. A call into libsodium is too short to pay for passing the interpreter's lock around. The price is a wait of
# 3 ms for others instead of 0.3. A single item for very many devices is one slice, however long.
SEAL_SLICE_S: Final = 0.002

_PREKEY_KINDS: Final = frozenset(map(int, PrekeyKind))
_RECIPIENT_REF: Final = "recipient_ref"

Context = rpc.Context


def recipient_ref(vault: Vault, sender_id: SenderId, subscriber_id: SubscriberId) -> RecipientRef:
    """The sender's own pseudonym of a recipient: 32 bytes that say nothing to anybody else."""
    return RecipientRef(vault.lookup(sender_id + subscriber_id, _RECIPIENT_REF))


def _to_prekey(message: keys_pb2.Prekey) -> SignedPrekey:
    """Only the kind is checked here, everything else with the signature."""
    return read_prekey(message, PrekeyKind(fields.enum(message.kind, "kind", _PREKEY_KINDS)))


def _to_upload(change: bytes) -> Upload:
    if len(change) > CHANGE_BYTES_MAX:
        raise InvalidRequest(f"change may have at most {CHANGE_BYTES_MAX} bytes", field="change")
    try:
        message = keys_pb2.PrekeyUpload.FromString(change)
    except DecodeError as e:
        raise InvalidRequest("change is not a serialised PrekeyUpload", field="change") from e
    # Before anything is done with each.
    prekeys = fields.each(message.prekeys, "change.prekeys", _to_prekey, ONE_TIME_PREKEYS_BATCH + 1)
    return Upload(tuple(prekeys), message.min_suite, message.forget_former)


class KeysService(keys_pb2_grpc.KeysServicer):
    """For devices and for senders that seal by themselves."""

    def __init__(
        self,
        store: KeyStore,
        resolve: BatchedCall[directory_pb2.ResolveQuery, directory_pb2.ResolveResult],
        vault: Vault,
        clock: Clock,
    ) -> None:
        self._store = store
        self._resolve = resolve
        self._vault = vault
        self._clock = clock

    async def UploadPrekeys(self, request: keys_pb2.UploadPrekeysRequest, context: Context) -> keys_pb2.UploadPrekeysResponse:
        caller = rpc.require_device()
        upload = _to_upload(request.change)
        counter = fields.number(request.proof.counter, "proof.counter", fields.I64_MAX, least=1)
        device = await self._listed(caller.device_id)
        proof = change_proof(caller.device_id, counter, UPLOAD_METHOD, body_digest(request.change))
        if not verify_proof(device.identity_public_key, proof, request.proof.signature):
            raise InvalidRequest("the proof is not the device's signature over this change and counter", field="proof.signature")
        now = self._clock.now()
        min_suite = rules.check_upload(upload, device, to_ms(now))
        left = await self._store.upload(device, counter, min_suite, upload, now)
        return keys_pb2.UploadPrekeysResponse(one_time_prekeys_left=left)

    async def _listed(self, device_id: DeviceId) -> rules.Device:
        """The device, if it is in a list. Whose it is, a token may say as it was a quarter of an hour ago: the row knows."""
        device = await self._store.device(device_id)
        if device is None or device.removed:
            raise Unauthenticated("this device is not registered (any more); register again")
        return device

    async def GetDeviceLog(self, request: keys_pb2.GetDeviceLogRequest, context: Context) -> keys_pb2.GetDeviceLogResponse:
        caller = rpc.require_device()
        most = fields.number(request.page_size, "page_size", LOG_PAGE_MAX) or LOG_PAGE_MAX
        after_seq = fields.number(request.after_seq, "after_seq", fields.I64_MAX)
        device = await self._listed(caller.device_id)
        if device.subscriber_id != request.subscriber_id:
            raise FailedPrecondition("this device is in another subscriber's list; finish the registration and name that subscriber")
        page = await self._store.log(device.subscriber_id, after_seq, most)
        return keys_pb2.GetDeviceLogResponse(entries=page.entries, seq=page.seq, head=page.head)

    async def VouchDevice(self, request: keys_pb2.VouchDeviceRequest, context: Context) -> keys_pb2.VouchDeviceResponse:
        caller = rpc.require_device()
        device_id = DeviceId(fields.id16(request.device_id, "device_id"))
        device = await self._listed(caller.device_id)
        await self._store.vouch(device.subscriber_id, device_id, caller.device_id, request.signature, self._clock.now())
        return keys_pb2.VouchDeviceResponse()

    async def GetPrekeyState(self, request: keys_pb2.GetPrekeyStateRequest, context: Context) -> keys_pb2.GetPrekeyStateResponse:
        caller = rpc.require_device()
        keys = (await self._store.device_keys([caller.device_id])).get(caller.device_id)
        if keys is None:
            # Removed, or without prekeys.
            await self._listed(caller.device_id)
        left, known = await self._store.one_time_prekeys(caller.device_id, self._clock.now())
        response = keys_pb2.GetPrekeyStateResponse(one_time_prekeys_left=left)
        if keys is not None:
            response.min_suite = keys.device.min_suite
            known += [each.prekey for each in keys.prekeys]
            if known:
                response.highest_prekey.CopyFrom(wire_prekey(max(known, key=lambda each: each.prekey_id)))
        if keys is not None and keys.current is not None:
            response.signed_prekey_id = keys.current.prekey_id
            response.signed_prekey_expires_at.FromMilliseconds(keys.current.expires_at_ms)
        return response

    async def GetRecipientKeys(self, request: keys_pb2.GetRecipientKeysRequest, context: Context) -> keys_pb2.GetRecipientKeysResponse:
        sender = rpc.require_sender()
        fields.bounded(request.queries, "queries", RECIPIENT_QUERIES_MAX)
        refusals = [_refuse_query(query, sender) for query in request.queries]
        asked = [query for query, refusal in zip(request.queries, refusals, strict=True) if not refusal]
        answers = await self._resolve.submit_many(
            [
                directory_pb2.ResolveQuery(recipient=query.recipient, app_id=query.app_id or sender.app_ids[0], sender_id=sender.sender_id)
                for query in asked
            ]
        )
        resolved = [each.resolved for each in answers if each.WhichOneof("outcome") == "resolved"]
        keys = await self._store.device_keys([DeviceId(device.device_id) for each in resolved for device in each.devices])
        now = self._clock.now()
        usable = [list(_usable_devices(answer.resolved, keys, to_ms(now))) for answer in answers]
        fitting = rules.fitting([len(each) for each in usable], RECIPIENT_DEVICES_MAX)
        wanted = [
            rules.Wanted(query.request_id, found.device.device_id, prekey.suite, found.device.min_suite)
            for query, devices in zip(asked[:fitting], usable, strict=False)
            if not query.devices_only
            for found, prekey in devices
        ]
        one_time = await self._store.hand_out(sender.sender_id, wanted, now)
        # Read after the keys: a device that came in between is in the head, so that its absence shows.
        lists = await self._store.device_lists([SubscriberId(each.subscriber_id) for each in resolved])

        def result(n: int) -> keys_pb2.RecipientKeysResult:
            query, answer = asked[n], answers[n]
            match answer.WhichOneof("outcome"):
                case "not_registered":
                    return keys_pb2.RecipientKeysResult(not_registered=answer.not_registered)
                case "resolved" if n >= fitting:
                    return keys_pb2.RecipientKeysResult(ask_again=True)
                case "resolved":
                    devices = [
                        _from_device(
                            found, prekey, None if query.devices_only else one_time.get((query.request_id, found.device.device_id))
                        )
                        for found, prekey in usable[n]
                    ]
                    return self._recipient_keys(sender.sender_id, SubscriberId(answer.resolved.subscriber_id), devices, lists)
                case _:
                    return keys_pb2.RecipientKeysResult(refused=answer.invalid)

        remaining = map(result, range(len(asked)))
        return keys_pb2.GetRecipientKeysResponse(
            results=[keys_pb2.RecipientKeysResult(refused=refusal) if refusal else next(remaining) for refusal in refusals]
        )

    def _recipient_keys(
        self,
        sender_id: SenderId,
        subscriber_id: SubscriberId,
        devices: Sequence[keys_pb2.DeviceKeys],
        lists: dict[SubscriberId, DeviceList],
    ) -> keys_pb2.RecipientKeysResult:
        device_list = lists.get(subscriber_id)
        if not devices or device_list is None:
            return keys_pb2.RecipientKeysResult(not_registered=common_pb2.REASON_CODE_NO_PREKEY)
        answer = keys_pb2.RecipientKeys(
            recipient_ref=recipient_ref(self._vault, sender_id, subscriber_id),
            device_list_version=device_list.head,
            devices=devices,
        )
        if device_list.identity_changed_at is not None:
            answer.identity_changed_at.FromDatetime(device_list.identity_changed_at)
        return keys_pb2.RecipientKeysResult(keys=answer)


def _usable_devices(
    resolved: directory_pb2.Resolved, keys: dict[DeviceId, rules.DeviceKeys], now_ms: int
) -> Iterator[tuple[rules.DeviceKeys, SignedPrekey]]:
    """Those of a recipient's devices that can be sealed for, each with its signed prekey."""
    for each in resolved.devices:
        found = keys.get(DeviceId(each.device_id))
        prekey = rules.usable(found, SubscriberId(resolved.subscriber_id), now_ms)
        if found is not None and prekey is not None:
            yield found, prekey


def _from_device(keys: rules.DeviceKeys, signed: SignedPrekey, one_time: SignedPrekey | None) -> keys_pb2.DeviceKeys:
    message = keys_pb2.DeviceKeys(
        device_id=keys.device.device_id,
        identity_public_key=keys.device.identity_public_key,
        signed_prekey=wire_prekey(signed),
        one_time_prekey=None if one_time is None else wire_prekey(one_time),
        min_suite=keys.device.min_suite,
        vouched=keys.vouched,
    )
    message.added_at.FromMilliseconds(keys.added_at_ms)
    return message


def _refuse_query(query: keys_pb2.RecipientKeysQuery, sender: SenderCaller) -> str:
    """Why a query is refused; empty: it is not."""
    if not query.devices_only and not 1 <= len(query.request_id) <= REQUEST_ID_CHARS_MAX:
        return f"request_id must have 1 to {REQUEST_ID_CHARS_MAX} characters: that of the publish the keys are for"
    if not query.request_id.isascii() or not query.request_id.isprintable():
        return "request_id must be printable ASCII: that of the publish the keys are for"
    if query.recipient.WhichOneof("kind") is None:
        return "recipient names nobody; give a phone, an rnokpp or an external_user_id"
    if query.recipient.ByteSize() > RECIPIENT_BYTES_MAX:
        return f"recipient is longer than {RECIPIENT_BYTES_MAX} bytes"
    if not sender.app_ids:
        return "this sender has no app; ask the platform's operator for one"
    if len(query.app_id) > APP_ID_CHARS_MAX:
        return f"app_id is longer than {APP_ID_CHARS_MAX} characters"
    if query.app_id and query.app_id not in sender.app_ids:
        return f"this sender may not use the app {query.app_id!r}; it may use {', '.join(sender.app_ids)}"
    return ""


class SealingService(sealing_pb2_grpc.SealingServicer):
    """For the other services of the mesh."""

    def __init__(self, store: KeyStore, platform_key: ContentSigningKey, vault: Vault, clock: Clock) -> None:
        self._store = store
        self._platform_key = platform_key
        self._vault = vault
        self._clock = clock
        self._turn = asyncio.Lock()

    async def PutDevices(self, request: sealing_pb2.PutDevicesRequest, context: Context) -> sealing_pb2.PutDevicesResponse:
        parsed = fields.each_alone(request.devices, "devices", _to_device)
        refusals = [each.message if isinstance(each, InvalidRequest) else "" for each in parsed]
        devices = {n: each for n, each in enumerate(parsed) if not isinstance(each, InvalidRequest)}
        if devices:
            answers = await self._store.put_devices(list(devices.values()), self._clock.now())
            for n, refusal in zip(devices, answers, strict=True):
                refusals[n] = refusal
        return sealing_pb2.PutDevicesResponse(refusals=refusals)

    async def RemoveDevices(self, request: sealing_pb2.RemoveDevicesRequest, context: Context) -> sealing_pb2.RemoveDevicesResponse:
        devices = fields.each(request.devices, "devices", _to_removed)
        if devices:
            await self._store.remove_devices(devices, self._clock.now())
        return sealing_pb2.RemoveDevicesResponse()

    async def GetListedDevices(
        self, request: sealing_pb2.GetListedDevicesRequest, context: Context
    ) -> sealing_pb2.GetListedDevicesResponse:
        response = sealing_pb2.GetListedDevicesResponse()
        for device_id, subscriber_id, vouched in await self._store.listed_devices(_to_device_ids(request.device_ids)):
            response.devices.add(device_id=device_id, subscriber_id=subscriber_id, vouched=vouched)
        return response

    async def Seal(self, request: sealing_pb2.SealRequest, context: Context) -> sealing_pb2.SealResponse:
        items = _to_seal_items(request)
        # One statement a batch, 9 of 110 µs an item (measured, one device an item). A cache of prekeys would save those and, for as long
        # as it lives, go on sealing for devices that were removed.
        keys = await self._store.sealing_keys(list({device_id: None for item in items for device_id in item.device_ids}))
        now_ms = to_ms(self._clock.now())
        response = sealing_pb2.SealResponse()
        waiting = iter(items)
        while len(response.results) < len(items):
            # Batches take turns by the slice: however many there are, between two slices everything else gets its turn.
            async with self._turn:
                pause_at = time.perf_counter() + SEAL_SLICE_S
                for item in waiting:
                    ref = recipient_ref(self._vault, item.sender_id, item.subscriber_id)
                    sealed = rules.seal(item, keys, self._platform_key, ContentId(uuid7()), ref, now_ms)
                    response.results.append(_from_sealed(sealed))
                    if time.perf_counter() >= pause_at:
                        break
                await asyncio.sleep(0)
        return response

    async def CheckStanzas(self, request: sealing_pb2.CheckStanzasRequest, context: Context) -> sealing_pb2.CheckStanzasResponse:
        checks = fields.each(request.checks, "checks", _to_check)
        keys = await self._store.device_keys(list({device_id: None for each in checks for device_id in each.device_ids}))
        lists = await self._store.device_lists(list({each.subscriber_id: None for each in checks}))
        handouts = await self._store.handed_out(rules.one_time(stanza for check in checks for stanza in check.stanzas))
        now_ms = to_ms(self._clock.now())
        response = sealing_pb2.CheckStanzasResponse()
        for check in checks:
            verdict = rules.check_stanzas(check, keys, handouts, now_ms)
            device_list = lists.get(check.subscriber_id)
            response.verdicts.add(
                missing_device_ids=verdict.missing,
                surplus_device_ids=verdict.surplus,
                stale_device_ids=verdict.stale,
                device_list_version=start_head(check.subscriber_id) if device_list is None else device_list.head,
                foreign_recipient_ref=check.recipient_ref != recipient_ref(self._vault, check.sender_id, check.subscriber_id),
                identity_changed=None if verdict.too_new is None else _from_too_new(verdict.too_new),
            )
        return response

    async def GetIdentities(self, request: sealing_pb2.GetIdentitiesRequest, context: Context) -> sealing_pb2.GetIdentitiesResponse:
        found = await self._store.identities(_to_device_ids(request.device_ids))
        return sealing_pb2.GetIdentitiesResponse(
            identities=[sealing_pb2.DeviceIdentity(device_id=device_id, identity_public_key=key) for device_id, key in found.items()]
        )

    async def GetPlatformKey(self, request: sealing_pb2.GetPlatformKeyRequest, context: Context) -> sealing_pb2.GetPlatformKeyResponse:
        return sealing_pb2.GetPlatformKeyResponse(public_key=self._platform_key.public_key)


def _to_device_ids(device_ids: Sequence[bytes], field: str = "device_ids") -> list[DeviceId]:
    return list(map(DeviceId, fields.ids(device_ids, field)))


def _to_device(message: sealing_pb2.NewDevice) -> NewDevice:
    if message.signed_prekey.kind != keys_pb2.PREKEY_KIND_SIGNED:
        raise InvalidRequest("signed_prekey must be a signed prekey", field="signed_prekey.kind")
    return NewDevice(
        SubscriberId(fields.id16(message.subscriber_id, "subscriber_id")),
        DeviceId(fields.id16(message.device_id, "device_id")),
        fields.octets(message.identity_public_key, "identity_public_key", 32),
        _to_prekey(message.signed_prekey),
        message.min_suite or SUITE_X25519,
    )


def _to_removed(message: sealing_pb2.RemovedDevice) -> tuple[SubscriberId, DeviceId]:
    return (
        SubscriberId(fields.id16(message.subscriber_id, "subscriber_id")),
        DeviceId(fields.id16(message.device_id, "device_id")),
    )


def _to_seal_items(request: sealing_pb2.SealRequest) -> list[SealItem]:
    """Raises InvalidRequest that names the item: nothing of a batch with a bad one is sealed."""
    fields.bounded(request.items, "items")
    if sum(len(each.device_ids) for each in request.items) > SEAL_DEVICES_MAX:
        raise InvalidRequest(f"a batch may seal for at most {SEAL_DEVICES_MAX} devices; split it", field="items")
    return fields.each(request.items, "items", _to_seal_item)


def _to_seal_item(message: sealing_pb2.SealItem) -> SealItem:
    item = SealItem(
        SenderId(fields.id16(message.sender_id, "sender_id")),
        SubscriberId(fields.id16(message.subscriber_id, "subscriber_id")),
        tuple(_to_device_ids(message.device_ids)),
        message.content,
        message.created_at_ms,
        message.expires_at_ms,
        message.added_until_ms,
    )
    try:
        rules.check_seal_item(item)
    except (ValueError, ContentTooLarge) as e:
        raise InvalidRequest(str(e)) from e
    return item


def _from_too_new(too_new: rules.TooNew) -> publish_pb2.IdentityChanged:
    message = publish_pb2.IdentityChanged(device_ids=too_new.device_ids)
    message.changed_at.FromMilliseconds(too_new.changed_at_ms)
    return message


def _from_sealed(sealed: rules.Sealed | rules.TooNew) -> sealing_pb2.SealResult:
    if isinstance(sealed, rules.TooNew):
        return sealing_pb2.SealResult(identity_changed=_from_too_new(sealed))
    made = sealed.envelope
    parts = sealing_pb2.SealedParts(
        content_id=made.header.content_id,
        head=made.head,
        tail=made.tail,
        stanzas=[sealing_pb2.DeviceStanza(device_id=each.device_id, stanza=each.encode()) for each in made.stanzas],
    )
    return sealing_pb2.SealResult(parts=parts, devices_without_prekey=sealed.devices_without_prekey)


def _to_check(message: sealing_pb2.StanzaCheck) -> StanzaCheck:
    return StanzaCheck(
        SenderId(fields.id16(message.sender_id, "sender_id")),
        SubscriberId(fields.id16(message.subscriber_id, "subscriber_id")),
        tuple(_to_device_ids(message.device_ids)),
        tuple(
            StanzaKey(DeviceId(fields.id16(each.device_id, "stanzas.device_id")), each.suite, each.prekey_id, each.kind)
            for each in message.stanzas
        ),
        message.recipient_ref,
        message.added_until_ms,
    )
