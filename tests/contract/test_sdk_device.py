"""sealpush.Device against a small mailbox that speaks the real protocol over real gRPC and seals with sealpush.envelope."""

# What is waited for is in the service's dictionaries.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from sealpush import live
from sealpush.device import Device, Installation, Message, Preference, SealedBy
from sealpush.devicelog import DeviceNotice, EntryKind, LogEntry, NoticeKind, next_head, start_head
from sealpush.entries import PROFILE_FAILED_PAUSE_S, PROFILE_PAUSE_S, Revocations, SenderProfile
from sealpush.envelope import FLAG_SERVER_SEALED, Envelope, Header, Recipient, seal
from sealpush.errors import (
    CallFailed,
    EntryRefused,
    KeystoreError,
    NotFound,
    NotRegisteredHere,
    RegistrationEnded,
    StreamTakenOver,
    Unavailable,
    WrongCode,
)
from sealpush.floor import Floor, floor
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RecipientRef, RegistrationId, SenderId, SenderKeyId, SubscriberId, uuid7
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
    SignedPrekey,
    generate_prekey,
    sign_sender_entry,
    verify_prekey,
)
from sealpush.keystore import PAGE_MAX, CommitOutcome, InboxMessage, Keystore, PendingAcknowledgement
from sealpush.local import FUTURE_SKEW_MS, ServerTime, Store, Trouble
from sealpush.memory_keystore import MemoryKeystore
from sealpush.model import Platform, Reason
from sealpush.proofs import (
    NO_DIGEST,
    AckOutcome,
    acknowledgement_proof,
    body_digest,
    challenge_proof,
    change_proof,
    registration_proof,
    verify_proof,
)
from sealpush.retry import Deadline, RetryPolicy, SystemClock
from sealpush.revocations import RevocationList, Revoked, RevokedEntries, RevokedKey, sign_revocations
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.transport import TIMEOUT_S, Calls, Channels, Endpoints
from sealpush.v1 import accounts_pb2, common_pb2, keys_pb2, messages_pb2, registration_pb2
from sealpush.v1.accounts_pb2_grpc import AccountsServicer, add_AccountsServicer_to_server
from sealpush.v1.content_pb2 import Content
from sealpush.v1.keys_pb2_grpc import KeysServicer, add_KeysServicer_to_server
from sealpush.v1.messages_pb2_grpc import MessagesServicer, add_MessagesServicer_to_server
from sealpush.v1.registration_pb2_grpc import RegistrationServicer, add_RegistrationServicer_to_server
from sealpush.wire import read_prekey, wire_prekey
from tests.contract.harness import LIMIT_S, Peer

APP = "example-bank"
PHONE = "+380501234567"
CODE = "123456"
SENDER = SenderId(b"S" * 16)
ROOT = RootKey.from_seed(b"\x01" * 32)
SENDER_KEY = ContentSigningKey.from_seed(b"\x02" * 32)
PLATFORM_KEY = ContentSigningKey.from_seed(b"\x03" * 32)
HOUR_MS = 3_600_000
FOREVER_MS = 4_000_000_000_000

Context = Any


@dataclass
class FakeClock:
    """A wall clock that can be wrong, and pauses that take no time."""

    wrong_by_ms: int = 0
    ahead_s: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.wrong_by_ms + int(self.ahead_s * 1000)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.ahead_s += seconds
        await asyncio.sleep(0.001)


async def fail(context: Context, code: grpc.StatusCode, reason: str, **metadata: str) -> None:
    info = AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="sealpush", metadata=metadata))
    status = status_pb2.Status(code=code.value[0], message=reason, details=[info])
    await context.abort(code, reason, (("grpc-status-details-bin", status.SerializeToString()),))


@dataclass
class Phone:
    """What the service knows of a device."""

    device_id: DeviceId
    identity_public_key: bytes
    signed_prekey: SignedPrekey
    installation: registration_pb2.Installation
    one_time: dict[int, SignedPrekey] = field(default_factory=dict)
    min_suite: int = 1
    counter: int = 0
    waiting: dict[bytes, messages_pb2.Delivery] = field(default_factory=dict)
    ended: dict[bytes, messages_pb2.Acknowledgement] = field(default_factory=dict)
    preferences: dict[bytes, registration_pb2.Preference] = field(default_factory=dict)
    stream: asyncio.Queue[messages_pb2.Delivery | None] | None = None


def make_entry(
    modes: SenderMode = SenderMode.END_TO_END | SenderMode.SERVER,
    key: ContentSigningKey = SENDER_KEY,
    *,
    serial: int = 1,
    root: RootKey = ROOT,
    not_after_ms: int = FOREVER_MS,
) -> bytes:
    return sign_sender_entry(
        root, SenderEntry(SENDER, "Банк Приклад", modes, (EntryKey(key.public_key, 0, FOREVER_MS),), 0, not_after_ms, serial)
    )


PLATFORM_ENTRY = sign_sender_entry(
    ROOT,
    SenderEntry(
        SenderId(b"P" * 16),
        "Platform",
        SenderMode.SERVER,
        (EntryKey(PLATFORM_KEY.public_key, 0, FOREVER_MS),),
        0,
        FOREVER_MS,
        1,
        EntryRole.PLATFORM,
    ),
)


class Service(RegistrationServicer, KeysServicer, AccountsServicer, MessagesServicer):
    """All public services that a device talks to, in memory, with faults to order."""

    def __init__(self) -> None:
        self.phones: dict[bytes, Phone] = {}
        self.calls: Counter[str] = Counter()
        self.tokens: dict[str, bytes] = {}
        self.token_lifetime_s = 900.0
        self.entry: bytes = make_entry()
        self.platform_entry = PLATFORM_ENTRY
        self.brand: dict[str, Any] = {}
        self.revocations = b""
        # Faults: names of methods that answer UNAVAILABLE, or as `down_as` says, before, or after, doing their work; so many times.
        self.down: Counter[str] = Counter()
        self.down_as = grpc.StatusCode.UNAVAILABLE
        self.lose_answer: Counter[str] = Counter()
        self.tells_time = True
        self.time_ahead_s = 0.0
        self.hang: set[str] = set()
        # What happens once while a method is at work, by its name.
        self.meanwhile: dict[str, Callable[[], None]] = {}
        self.page = 64
        self.acknowledged: list[messages_pb2.Acknowledgement] = []
        self.ack_frames: list[int] = []
        self.refuse_acks = False
        # So many answers to challenges are refused, as those are that a newer one overtook.
        self.refuse_answers = 0
        self.confirmations: list[registration_pb2.ConfirmRegistrationRequest] = []
        self.log_after_own: list[bytes] = []
        self.uploads: list[keys_pb2.PrekeyUpload] = []
        # The prekey with the highest id that the service says it knows of a phone.
        self.highest_prekey: SignedPrekey | None = None
        self.stopping = False

    def phone(self) -> Phone:
        return next(iter(self.phones.values()))

    def now(self) -> Timestamp:
        stamp = Timestamp()
        stamp.FromMilliseconds(time.time_ns() // 1_000_000 + int(self.time_ahead_s * 1000))
        return stamp

    def time(self) -> Timestamp | None:
        return self.now() if self.tells_time else None

    async def before(self, name: str, context: Context) -> None:
        self.calls[name] += 1
        self.meanwhile.pop(name, lambda: None)()
        if name in self.hang:
            await asyncio.sleep(60)
        if self.down[name]:
            self.down[name] -= 1
            await fail(context, self.down_as, self.down_as.name)

    async def after(self, name: str, context: Context) -> None:
        if self.lose_answer[name]:
            self.lose_answer[name] -= 1
            await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")

    async def who(self, context: Context) -> Phone:
        metadata = dict(context.invocation_metadata())
        device_id = self.tokens.get(metadata.get("authorization", "").removeprefix("Bearer "))
        if device_id not in self.phones:
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        return self.phones[cast(bytes, device_id)]

    async def check_change(self, phone: Phone, name: str, change: bytes, proof: common_pb2.DeviceProof, context: Context) -> None:
        expected = change_proof(phone.device_id, proof.counter, name, body_digest(change))
        if not verify_proof(phone.identity_public_key, expected, proof.signature):
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "BAD_PROOF")
        if proof.counter <= phone.counter:
            await fail(context, grpc.StatusCode.ABORTED, "ABORTED")
        phone.counter = proof.counter

    # Registration

    async def StartRegistration(self, request: registration_pb2.StartRegistrationRequest, context: Context) -> Any:
        await self.before("StartRegistration", context)
        return registration_pb2.StartRegistrationResponse(registration_id=b"R" * 16, code_length=6, server_time=self.time())

    async def ConfirmRegistration(self, request: registration_pb2.ConfirmRegistrationRequest, context: Context) -> Any:
        await self.before("ConfirmRegistration", context)
        self.confirmations.append(request)
        if request.code != CODE:
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "WRONG_CODE", attempts_left="2")
        known = self.phones.get(request.device_id)
        if known is not None and known.identity_public_key != request.identity_public_key:
            await fail(context, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")
        proof = registration_proof(RegistrationId(request.registration_id), request.identity_public_key, AppId(APP))
        assert verify_proof(request.identity_public_key, proof, request.proof)
        prekey = read_prekey(request.signed_prekey, PrekeyKind.SIGNED)
        verify_prekey(
            prekey,
            device_id=DeviceId(request.device_id),
            identity_public_key=request.identity_public_key,
            now_ms=self.now().ToMilliseconds(),
            min_suite=request.min_suite,
        )
        if known is None:
            self.phones[request.device_id] = Phone(
                DeviceId(request.device_id), request.identity_public_key, prekey, request.installation, min_suite=request.min_suite
            )
        await self.after("ConfirmRegistration", context)
        return registration_pb2.ConfirmRegistrationResponse(subscriber_id=b"U" * 16, server_time=self.time())

    async def GetChallenge(self, request: registration_pb2.GetChallengeRequest, context: Context) -> Any:
        await self.before("GetChallenge", context)
        return registration_pb2.GetChallengeResponse(challenge=b"challenge" + request.device_id)

    async def Authenticate(self, request: registration_pb2.AuthenticateRequest, context: Context) -> Any:
        await self.before("Authenticate", context)
        phone = self.phones.get(request.device_id)
        if self.refuse_answers:
            self.refuse_answers -= 1
            phone = None
        if phone is None or not verify_proof(
            phone.identity_public_key, challenge_proof(request.challenge, phone.device_id), request.signature
        ):
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        token = f"token-{self.calls['Authenticate']}"
        self.tokens[token] = request.device_id
        expires = Timestamp()
        expires.FromMilliseconds(self.now().ToMilliseconds() + int(self.token_lifetime_s * 1000))
        return registration_pb2.AuthenticateResponse(access_token=token, expires_at=expires, server_time=self.time())

    async def UpdateInstallation(self, request: registration_pb2.UpdateInstallationRequest, context: Context) -> Any:
        await self.before("UpdateInstallation", context)
        phone = await self.who(context)
        await self.check_change(phone, "/sealpush.v1.Registration/UpdateInstallation", request.change, request.proof, context)
        phone.installation.MergeFrom(registration_pb2.Installation.FromString(request.change))
        await self.after("UpdateInstallation", context)
        return registration_pb2.UpdateInstallationResponse()

    async def Unregister(self, request: registration_pb2.UnregisterRequest, context: Context) -> Any:
        await self.before("Unregister", context)
        phone = await self.who(context)
        await self.check_change(phone, "/sealpush.v1.Registration/Unregister", b"", request.proof, context)
        del self.phones[phone.device_id]
        await self.after("Unregister", context)
        return registration_pb2.UnregisterResponse()

    async def RemoveDevice(self, request: registration_pb2.RemoveDeviceRequest, context: Context) -> Any:
        await self.before("RemoveDevice", context)
        phone = await self.who(context)
        await self.check_change(phone, "/sealpush.v1.Registration/RemoveDevice", request.change, request.proof, context)
        self.phones.pop(registration_pb2.DeviceRemoval.FromString(request.change).device_id, None)
        await self.after("RemoveDevice", context)
        return registration_pb2.RemoveDeviceResponse()

    async def ListPreferences(self, request: registration_pb2.ListPreferencesRequest, context: Context) -> Any:
        phone = await self.who(context)
        return registration_pb2.ListPreferencesResponse(preferences=phone.preferences.values())

    async def SetPreference(self, request: registration_pb2.SetPreferenceRequest, context: Context) -> Any:
        phone = await self.who(context)
        await self.check_change(phone, "/sealpush.v1.Registration/SetPreference", request.change, request.proof, context)
        preference = registration_pb2.Preference.FromString(request.change)
        phone.preferences[preference.sender_id] = preference
        stopped = [
            common_pb2.StoppedDelivery(
                message_id=each, device_id=phone.device_id, stop_point=common_pb2.STOP_POINT_BEFORE_PUSH, state=common_pb2.STATE_BLOCKED
            )
            for each in phone.waiting
        ]
        return registration_pb2.SetPreferenceResponse(stopped=stopped)

    async def SetRegistrationLock(self, request: registration_pb2.SetRegistrationLockRequest, context: Context) -> Any:
        raise NotImplementedError("tests/contract/test_registration.py has locks, with the real service")

    # Keys

    async def UploadPrekeys(self, request: keys_pb2.UploadPrekeysRequest, context: Context) -> Any:
        await self.before("UploadPrekeys", context)
        phone = await self.who(context)
        await self.check_change(phone, "/sealpush.v1.Keys/UploadPrekeys", request.change, request.proof, context)
        upload = keys_pb2.PrekeyUpload.FromString(request.change)
        self.uploads.append(upload)
        min_suite = upload.min_suite or phone.min_suite
        if min_suite < phone.min_suite:
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        if min_suite > phone.min_suite:
            phone.min_suite = min_suite
            phone.one_time.clear()
        for each in (read_prekey(sent, PrekeyKind(sent.kind)) for sent in upload.prekeys):
            verify_prekey(
                each,
                device_id=phone.device_id,
                identity_public_key=phone.identity_public_key,
                now_ms=self.now().ToMilliseconds(),
                min_suite=min_suite,
            )
            if each.kind is PrekeyKind.SIGNED:
                phone.signed_prekey = each
            else:
                phone.one_time[each.prekey_id] = each
        await self.after("UploadPrekeys", context)
        return keys_pb2.UploadPrekeysResponse(one_time_prekeys_left=len(phone.one_time))

    async def GetPrekeyState(self, request: keys_pb2.GetPrekeyStateRequest, context: Context) -> Any:
        await self.before("GetPrekeyState", context)
        phone = await self.who(context)
        return keys_pb2.GetPrekeyStateResponse(
            signed_prekey_id=phone.signed_prekey.prekey_id,
            one_time_prekeys_left=len(phone.one_time),
            highest_prekey=None if self.highest_prekey is None else wire_prekey(self.highest_prekey),
            min_suite=phone.min_suite,
        )

    async def GetRecipientKeys(self, request: keys_pb2.GetRecipientKeysRequest, context: Context) -> Any:
        raise NotImplementedError

    async def GetDeviceLog(self, request: keys_pb2.GetDeviceLogRequest, context: Context) -> Any:
        await self.before("GetDeviceLog", context)
        phone = await self.who(context)
        entries = [LogEntry(EntryKind.ADDED, phone.device_id, phone.identity_public_key, 1).encode(), *self.log_after_own]
        head = start_head(SubscriberId(request.subscriber_id))
        for entry in entries:
            head = next_head(head, entry)
        await self.after("GetDeviceLog", context)
        return keys_pb2.GetDeviceLogResponse(entries=entries[request.after_seq :], seq=len(entries), head=head)

    async def VouchDevice(self, request: keys_pb2.VouchDeviceRequest, context: Context) -> Any:
        raise NotImplementedError

    # Accounts

    async def SignIn(self, request: accounts_pb2.SignInRequest, context: Context) -> Any:
        raise NotImplementedError

    async def GetSenderProfile(self, request: accounts_pb2.GetSenderProfileRequest, context: Context) -> Any:
        await self.before("GetSenderProfile", context)
        if request.sender_id != SENDER:
            await fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        return accounts_pb2.GetSenderProfileResponse(sender_entry=self.entry, platform_entry=self.platform_entry, **self.brand)

    async def GetRevocations(self, request: accounts_pb2.GetRevocationsRequest, context: Context) -> Any:
        await self.before("GetRevocations", context)
        assert request.root_public_key == ROOT.public_key
        return accounts_pb2.GetRevocationsResponse(revocations=self.revocations)

    # Messages

    async def Fetch(self, request: messages_pb2.FetchRequest, context: Context) -> Any:
        await self.before("Fetch", context)
        phone = await self.who(context)
        for delivery in phone.waiting.values():
            if delivery.wake_up_id == request.wake_up_id:
                return messages_pb2.FetchResponse(delivery=delivery, server_time=self.time())
        await fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        return None

    async def Drain(self, request: messages_pb2.DrainRequest, context: Context) -> Any:
        await self.before("Drain", context)
        phone = await self.who(context)
        ids = sorted(each for each in phone.waiting if each > request.page_token)
        page = ids[: self.page]
        return messages_pb2.DrainResponse(
            deliveries=[phone.waiting[each] for each in page],
            next_page_token=page[-1] if len(ids) > self.page else b"",
            server_time=self.time(),
        )

    def take(self, phone: Phone, ack: messages_pb2.Acknowledgement) -> messages_pb2.AckResult:
        self.acknowledged.append(ack)
        proof = acknowledgement_proof(
            MessageId(ack.message_id),
            ContentId(ack.content_id),
            ack.envelope_digest,
            phone.device_id,
            AckOutcome(ack.outcome),
            ack.reason_code,
            ack.at_ms,
        )
        if not verify_proof(phone.identity_public_key, proof, ack.signature):
            verdict = messages_pb2.ACK_VERDICT_REFUSED
        elif ack.outcome == messages_pb2.ACK_OUTCOME_READ:
            verdict = messages_pb2.ACK_VERDICT_ACCEPTED
        elif ack.message_id in phone.ended:
            same = phone.ended[ack.message_id].outcome == ack.outcome
            verdict = messages_pb2.ACK_VERDICT_ACCEPTED if same else messages_pb2.ACK_VERDICT_LATE
        elif ack.message_id in phone.waiting:
            del phone.waiting[ack.message_id]
            phone.ended[ack.message_id] = ack
            verdict = messages_pb2.ACK_VERDICT_ACCEPTED
        else:
            verdict = messages_pb2.ACK_VERDICT_UNKNOWN
        return messages_pb2.AckResult(message_id=ack.message_id, verdict=verdict)

    async def Acknowledge(self, request: messages_pb2.AcknowledgeRequest, context: Context) -> Any:
        await self.before("Acknowledge", context)
        phone = await self.who(context)
        if self.refuse_acks and any(each.content_id == bytes(16) for each in request.acknowledgements):
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        results = [self.take(phone, ack) for ack in request.acknowledgements]
        await self.after("Acknowledge", context)
        return messages_pb2.AcknowledgeResponse(results=results)

    async def Stream(self, requests: AsyncIterator[messages_pb2.StreamRequest], context: Context) -> AsyncIterator[Any]:
        await self.before("Stream", context)
        phone = await self.who(context)
        if phone.stream is not None:
            phone.stream.put_nowait(None)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        phone.stream = queue

        async def read() -> None:
            async for request in requests:
                self.ack_frames.append(len(request.acknowledgements))
                queue.put_nowait(messages_pb2.StreamResponse(ack_results=[self.take(phone, ack) for ack in request.acknowledgements]))
            queue.put_nowait("end")

        reader = asyncio.create_task(read())
        try:
            backlog = list(phone.waiting.values())
            for start in range(0, len(backlog), 100):
                yield messages_pb2.StreamResponse(deliveries=backlog[start : start + 100], server_time=self.time())
            yield messages_pb2.StreamResponse(backlog_done=True, server_time=self.time())
            while True:
                item = await queue.get()
                if item is None:
                    await fail(context, grpc.StatusCode.ABORTED, "TAKEN_OVER")
                if item == "end":
                    return
                if item == "restart":
                    await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
                if isinstance(item, messages_pb2.Delivery):
                    item = messages_pb2.StreamResponse(deliveries=[item], server_time=self.time())
                yield item
        finally:
            reader.cancel()
            if phone.stream is queue:
                phone.stream = None

    # The sending side

    def send(
        self,
        text: str = "hello",
        *,
        phone: Phone | None = None,
        content_id: ContentId | None = None,
        key: ContentSigningKey = SENDER_KEY,
        flags: int = 0,
        created_ms: int | None = None,
        lifetime_ms: int = DAY_MS,
        one_time: bool = False,
        prekey: SignedPrekey | None = None,
        muted: bool = False,
        sender_id: SenderId = SENDER,
        plaintext: bytes | None = None,
        **content: Any,
    ) -> messages_pb2.Delivery:
        """Seal a message to a phone and put it into its mailbox."""
        phone = phone or self.phone()
        created_ms = self.now().ToMilliseconds() if created_ms is None else created_ms
        header = Header(
            content_id or ContentId(uuid7()),
            sender_id,
            SenderKeyId(key.key_id),
            RecipientRef(b"r" * 32),
            created_ms,
            created_ms + lifetime_ms,
            flags,
        )
        prekey = prekey or (phone.one_time.pop(min(phone.one_time)) if one_time else phone.signed_prekey)
        body = Content(version=1, content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, body=text)
        body.MergeFrom(Content(**content))
        sealed = seal(body.SerializeToString() if plaintext is None else plaintext, header, [Recipient.of(phone.device_id, prekey)], key)
        return self.put(sealed.encode(), phone, muted=muted)

    def put(self, envelope: bytes, phone: Phone | None = None, *, muted: bool = False) -> messages_pb2.Delivery:
        phone = phone or self.phone()
        delivery = messages_pb2.Delivery(message_id=uuid7(), wake_up_id=uuid7(), envelope=envelope, muted=muted)
        phone.waiting[delivery.message_id] = delivery
        if phone.stream is not None:
            phone.stream.put_nowait(delivery)
        return delivery

    def reasons(self) -> list[tuple[AckOutcome, Reason]]:
        return [(AckOutcome(each.outcome), Reason(each.reason_code)) for each in self.acknowledged]

    def outcomes(self) -> list[AckOutcome]:
        return [AckOutcome(each.outcome) for each in self.acknowledged]


@asynccontextmanager
async def serving(service: Service, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    add = add_RegistrationServicer_to_server, add_KeysServicer_to_server, add_AccountsServicer_to_server, add_MessagesServicer_to_server
    async with Peer([(each, service) for each in add], credentials=credentials) as peer:
        yield peer.address


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def channels(service: Service) -> AsyncIterator[Channels]:
    async with serving(service) as address, Channels(Endpoints.single(address, insecure=True)) as made:
        yield made


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


Make = Callable[..., Device]


@pytest.fixture
def make(channels: Channels, clock: FakeClock) -> Make:
    def device(keystore: Keystore | None = None, **options: Any) -> Device:
        given: dict[str, Any] = {"one_time_prekeys": 0, "clock": clock, "random": lambda: 0.5, **options}
        return Device(
            APP,
            given.pop("channels", channels),
            keystore or MemoryKeystore(),
            root_public_key=ROOT.public_key,
            platform=Platform.ANDROID,
            **given,
        )

    return device


async def register(device: Device) -> Device:
    await device.start_registration(PHONE)
    await device.confirm(CODE, Installation(push_token="token"))
    return device


@pytest.fixture(params=["memory", "sqlite"])
def keystore(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made: Keystore = MemoryKeystore() if request.param == "memory" else SqliteKeystore(tmp_path / "keys.db")
    yield made
    made.close()


def texts(messages: list[Message]) -> list[str]:
    return [each.content.body for each in messages]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.005)


# --- registration ---


async def test_a_device_registers_and_receives(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    assert service.phone().installation.push_token == "token"
    assert service.phone().installation.platform == common_pb2.PLATFORM_ANDROID
    sent = service.send("привіт", title="Рахунок")
    (message,) = await device.drain()
    assert (message.content.title, message.content.body) == ("Рахунок", "привіт")
    assert (message.message_id, message.sender_id, message.sender_name) == (sent.message_id, SENDER, "Банк Приклад")
    assert message.sealed_by is SealedBy.SENDER
    assert message.is_new
    assert not message.muted
    assert service.outcomes() == [AckOutcome.DELIVERED]
    assert keystore.pending_acknowledgements() == []
    assert await device.drain() == []
    assert "привіт" not in repr(message)


async def test_a_lost_answer_to_a_registration_is_repeated_with_the_same_keys(service: Service, make: Make, keystore: Keystore) -> None:
    service.lose_answer["ConfirmRegistration"] = 100
    first = make(keystore, policy=RetryPolicy(attempts_max=2))
    await first.start_registration(PHONE)
    with pytest.raises(Unavailable):
        await first.confirm(CODE)
    assert await first.registration() is None
    service.lose_answer.clear()
    again = make(keystore)  # the process was restarted meanwhile
    registration = await again.confirm(CODE)
    assert {(each.device_id, each.identity_public_key, each.signed_prekey.public_key) for each in service.confirmations} == {
        (registration.device_id, service.phone().identity_public_key, service.phone().signed_prekey.public_key)
    }
    assert len(service.confirmations) == 3
    service.send()
    assert texts(await again.drain()) == ["hello"]


async def test_a_wrong_code_says_how_many_tries_are_left(make: Make) -> None:
    device = make()
    with pytest.raises(NotRegisteredHere):
        await device.confirm(CODE)
    await device.start_registration(PHONE)
    with pytest.raises(WrongCode) as caught:
        await device.confirm("000000")
    assert caught.value.attempts_left == 2
    assert (await device.confirm(CODE)).app_id == APP


async def test_a_taken_device_id_is_replaced(service: Service, make: Make) -> None:
    keystore = MemoryKeystore()
    await register(make(keystore))
    other = MemoryKeystore()
    other.set_fact("device.id", service.phone().device_id)
    registration = await (await register(make(other))).registration()
    assert registration is not None
    assert registration.device_id != service.phone().device_id
    assert len(service.phones) == 2


async def test_a_phone_whose_clock_is_wrong_registers_with_right_times(service: Service, make: Make, clock: FakeClock) -> None:
    clock.wrong_by_ms = 48 * HOUR_MS
    device = await register(make())  # the service verifies the prekey's times
    service.send()
    assert texts(await device.drain()) == ["hello"]


async def test_an_unregistered_device_says_so(make: Make) -> None:
    device = make()
    for call in (device.drain(), device.on_wake(), device.preferences(), device.maintain(), device.run_stream()):
        with pytest.raises(NotRegisteredHere):
            await call


async def test_unregistering_forgets_everything_also_after_a_lost_answer(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    service.lose_answer["Unregister"] = 1
    await device.unregister()
    assert service.phones == {}
    assert keystore.identity() is None
    with pytest.raises(NotRegisteredHere):
        await device.drain()
    await register(device)
    service.send()
    assert texts(await device.drain()) == ["hello"]


async def test_a_removed_phone_knows_that_it_has_ended_and_can_begin_anew(service: Service, make: Make, keystore: Keystore) -> None:
    removed, by = await register(make(keystore)), await register(make())
    registration = await removed.registration()
    assert registration is not None
    await removed.drain()
    assert not (await removed.diagnose()).ended
    service.lose_answer["RemoveDevice"] = 1
    await by.remove_device(registration.device_id)
    assert service.calls["RemoveDevice"] == 2
    for call in (removed.drain(), removed.on_wake(), removed.preferences(), removed.update_installation(Installation(locale="uk"))):
        with pytest.raises(RegistrationEnded, match="register again"):
            await call
    seen = await removed.diagnose()
    assert (seen.registered, seen.authenticated, seen.ended) == (True, False, True)
    await removed.unregister()
    assert keystore.identity() is None
    await register(removed)
    await removed.drain()
    assert not (await removed.diagnose()).ended


async def test_an_answer_that_another_process_overtook_ends_nothing(service: Service, make: Make) -> None:
    device = await register(make())
    service.refuse_answers = 1
    service.send()
    assert texts(await device.drain()) == ["hello"]
    service.tokens.clear()
    service.refuse_answers = 2
    with pytest.raises(RegistrationEnded):
        await device.drain()
    # What the service knows again has not ended.
    service.send("again")
    assert texts(await device.drain()) == ["again"]
    assert not (await device.diagnose()).ended


# --- changes ---


async def test_a_change_whose_answer_was_lost_is_made_again_with_a_new_counter(service: Service, make: Make) -> None:
    device = await register(make())
    service.lose_answer["UpdateInstallation"] = 1
    await device.update_installation(Installation(push_token="", push_allowed_by_os=False, subscriptions=["news"]))
    installation = service.phone().installation
    assert installation.push_token == ""
    assert installation.HasField("push_allowed_by_os")
    assert list(installation.subscriptions.names)[-1] == "news"
    assert service.phone().counter == 2


async def test_a_store_restored_from_a_backup_catches_up_with_its_counter(service: Service, make: Make) -> None:
    device = await register(make())
    service.phone().counter = 50_000
    await device.update_installation(Installation(app_version="2.0"))
    assert service.phone().installation.app_version == "2.0"
    assert service.phone().counter > 50_000


async def test_preferences_keep_what_is_not_named(service: Service, make: Make) -> None:
    device = await register(make())
    service.send()
    (stopped,) = await device.set_preference(SENDER, block_advertising=True)
    assert stopped.stop_point.name == "BEFORE_PUSH"
    await device.set_preference(SENDER, mute=True)
    assert await device.preferences() == [Preference(SENDER, block_all=False, block_advertising=True, mute=True)]


# --- waking up ---


async def test_what_a_wake_up_names_does_not_wait_behind_a_long_backlog(service: Service, make: Make) -> None:
    device = await register(make())
    service.page = 2
    for number in range(5):
        service.send(str(number))
    named = service.send("named")
    text = base64.urlsafe_b64encode(named.wake_up_id).decode().rstrip("=")
    assert texts(await device.on_wake(text)) == ["0", "1", "named", "2", "3", "4"]
    assert service.outcomes() == [AckOutcome.DELIVERED] * 6
    assert await device.on_wake(named.wake_up_id) == []
    assert await device.on_wake("no id at all") == []


async def test_a_wake_up_returns_in_time_and_loses_nothing(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore, clock=SystemClock()))
    named = service.send("first")
    service.send("second")
    service.hang = {"Drain"}
    started = time.monotonic()
    assert texts(await device.on_wake(named.wake_up_id, deadline=1.5)) == []
    service.hang = {"Acknowledge"}
    assert texts(await device.on_wake(deadline=1.5)) == ["first", "second"]
    assert time.monotonic() - started < TIMEOUT_S, "it did not wait as long as one call may take"
    service.hang = set()
    assert texts(await device.on_wake()) == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2


async def test_wake_ups_that_come_together_share_a_drain(service: Service, make: Make) -> None:
    device = await register(make())
    sent = [service.send(str(number)) for number in range(8)]
    before = service.calls["Drain"]
    taken = await asyncio.gather(*(device.on_wake(each.wake_up_id) for each in sent))
    assert sorted(text for messages in taken for text in texts(messages)) == [str(number) for number in range(8)]
    assert service.calls["Drain"] - before <= 2
    assert len(service.acknowledged) == 8, "what is on its way is not sent again"


async def test_a_wake_up_without_a_service_returns_nothing_in_time(service: Service, make: Make) -> None:
    device = await register(make(clock=SystemClock()))
    service.send()
    service.down["GetChallenge"] = 1000
    started = time.monotonic()
    assert await device.on_wake(deadline=0.5) == []
    assert time.monotonic() - started < TIMEOUT_S / 2, "it did not try as often as it may"
    assert (await device.diagnose()).last_error.startswith("Unavailable")


async def test_what_was_stored_before_the_end_of_time_is_handed_over_next_time(service: Service, make: Make) -> None:
    device = await register(make(clock=SystemClock()))
    service.send()
    service.hang = {"Acknowledge"}  # stored, and then the time is over: still handed over, and only once
    assert texts(await device.on_wake(deadline=1.5)) == ["hello"]
    service.hang = set()
    assert await device.on_wake() == []
    assert service.outcomes() == [AckOutcome.DELIVERED]


# --- crashes and duplicates ---


async def test_a_crash_between_store_and_acknowledgement_is_acknowledged_later_once(
    service: Service, make: Make, keystore: Keystore
) -> None:
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    service.send()
    service.down["Acknowledge"] = 1
    with pytest.raises(Unavailable):
        await device.drain()
    assert service.acknowledged == []
    again = make(keystore)
    assert texts(await again.drain()) == ["hello"]
    assert service.outcomes() == [AckOutcome.DELIVERED]
    assert await again.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED]


async def test_a_lost_answer_to_an_acknowledgement_is_harmless(service: Service, make: Make) -> None:
    device = await register(make())
    service.send()
    service.lose_answer["Acknowledge"] = 1
    assert texts(await device.drain()) == ["hello"]
    assert len({each.SerializeToString() for each in service.acknowledged}) == 1


def digest_of(delivery: messages_pb2.Delivery) -> bytes:
    return Envelope.parse(delivery.envelope).digest


async def test_the_same_envelope_again_is_acknowledged_again_and_not_shown(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    sent = service.send("once")
    assert texts(await device.drain()) == ["once"]
    service.put(sent.envelope)
    assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2
    assert {each.envelope_digest for each in service.acknowledged} == {digest_of(sent)}
    assert texts(await device.inbox()) == ["once"]


async def test_another_envelope_under_a_seen_content_id_is_never_acknowledged_as_delivered(
    service: Service, make: Make, keystore: Keystore
) -> None:
    device = await register(make(keystore))
    content_id = ContentId(b"C" * 16)
    first = service.send("once", content_id=content_id)
    assert texts(await device.drain()) == ["once"]
    # Also one that says the very same.
    for text in ("another", "once"):
        other = service.send(text, content_id=content_id)
        assert await make(keystore).drain() == []
        assert service.reasons()[-1] == (AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)
        assert service.acknowledged[-1].envelope_digest == digest_of(other)
    # The first one, as often as it comes, is what it was; and it is what was read.
    service.put(first.envelope)
    await device.drain()
    assert await device.mark_read(MessageId(first.message_id))
    await device.drain()
    assert service.outcomes()[-2:] == [AckOutcome.DELIVERED, AckOutcome.READ]
    assert {each.envelope_digest for each in service.acknowledged[-2:]} == {digest_of(first)}
    assert texts(await device.inbox()) == ["once"]


async def test_an_envelope_whose_content_id_another_process_takes_meanwhile_is_refused(
    service: Service, make: Make, tmp_path: Path
) -> None:
    """It was opened when nothing had that id; what is stored decides."""
    with SqliteKeystore(tmp_path / "keys.db") as one, SqliteKeystore(tmp_path / "keys.db") as other:
        device = await register(make(one))
        mine = service.send("mine", content_id=ContentId(b"C" * 16))
        theirs = InboxMessage(MessageId(uuid7()), ContentId(b"C" * 16), b"d" * 32, SENDER, 0, FOREVER_MS, 0, Content().SerializeToString())
        taken = PendingAcknowledgement(theirs.message_id, theirs.content_id, theirs.envelope_digest, AckOutcome.DELIVERED, 0, 0)
        # The app has found the id unseen and asks who the sender is.
        outcomes: list[CommitOutcome] = []
        service.meanwhile["GetSenderProfile"] = lambda: outcomes.append(other.commit_message(theirs, acknowledgement=taken).outcome)
        await device.drain()
        assert outcomes == [CommitOutcome.STORED]
        said = {each.message_id: (AckOutcome(each.outcome), each.envelope_digest) for each in service.acknowledged}
        assert said == {
            theirs.message_id: (AckOutcome.DELIVERED, b"d" * 32),
            mine.message_id: (AckOutcome.UNDELIVERED, digest_of(mine)),
        }
        assert [each.message_id for each in await device.inbox()] == [theirs.message_id]


async def test_what_cannot_be_read_is_acknowledged_without_an_envelope(service: Service, make: Make) -> None:
    device = await register(make())
    service.put(b"noise")
    await device.drain()
    assert service.reasons() == [(AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)]
    assert service.acknowledged[0].envelope_digest == NO_DIGEST


async def test_a_service_whose_clock_runs_ahead_for_a_while_makes_a_phone_forget_nothing(
    service: Service, make: Make, keystore: Keystore
) -> None:
    device = await register(make(keystore))
    shown = service.send("once", lifetime_ms=20 * DAY_MS)
    assert texts(await device.drain()) == ["once"]
    service.time_ahead_s = 30 * 24 * 3600
    await make(keystore).maintain()
    service.time_ahead_s = 0
    again = make(keystore)
    await again.maintain()
    service.put(shown.envelope)
    assert await again.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2
    service.send("twice")
    assert texts(await again.drain()) == ["twice"]


async def test_two_processes_of_one_phone_show_a_message_once(service: Service, make: Make, tmp_path: Path) -> None:
    with SqliteKeystore(tmp_path / "keys.db") as one, SqliteKeystore(tmp_path / "keys.db") as other:
        await register(make(one, one_time_prekeys=30))
        app, extension = make(one, one_time_prekeys=30), make(other, one_time_prekeys=30)
        await app.maintain()
        for number in range(20):
            service.send(str(number), one_time=True)
        shown = await asyncio.gather(app.drain(), extension.on_wake())
        assert sorted(texts([*shown[0], *shown[1]]), key=int) == [str(number) for number in range(20)]
        assert set(service.outcomes()) == {AckOutcome.DELIVERED}


async def test_a_replace_key_takes_the_predecessor_away(service: Service, make: Make) -> None:
    device = await register(make())
    first = service.send("1", replace_key="balance")
    await device.drain()
    service.send("2", replace_key="balance")
    (second,) = await device.drain()
    assert second.replaces == (first.message_id,)
    assert texts(await device.inbox()) == ["2"]
    service.send("3", replace_key="balance")
    service.send("4", replace_key="balance")
    assert texts(await device.drain()) == ["4"]  # only the last of one batch is shown
    service.send("0", replace_key="balance", created_ms=service.now().ToMilliseconds() - HOUR_MS)
    assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 5


# --- handing over ---


def keep(store: Keystore, number: int, *, replace_key: str = "", lifetime_ms: int = DAY_MS) -> MessageId:
    """Commit a message as if a process had taken it and ended before it handed it over."""
    now_ms = time.time_ns() // 1_000_000
    message = InboxMessage(
        message_id=MessageId(number.to_bytes(16, "big")),
        content_id=ContentId((number + (1 << 100)).to_bytes(16, "big")),
        envelope_digest=(number + (1 << 200)).to_bytes(32, "big"),
        sender_id=SENDER,
        created_at_ms=now_ms + number,
        expires_at_ms=now_ms + lifetime_ms,
        received_at_ms=now_ms,
        content=Content(version=1, body=str(number), replace_key=replace_key).SerializeToString(),
        replace_key=replace_key.encode() or None,
    )
    acknowledgement = PendingAcknowledgement(
        message.message_id, message.content_id, message.envelope_digest, AckOutcome.DELIVERED, 0, now_ms
    )
    assert store.commit_message(message, acknowledgement=acknowledgement)
    return message.message_id


async def test_however_many_wait_all_are_handed_over_oldest_first(make: Make, keystore: Keystore) -> None:
    await register(make(keystore))
    for number in range(PAGE_MAX + 120):
        keep(keystore, number)
    in_order = [str(number) for number in range(PAGE_MAX + 120)]
    assert texts(await make(keystore).drain()) == in_order
    assert await make(keystore).drain() == []


async def test_a_store_that_is_busy_while_handing_over_loses_nothing(make: Make, tmp_path: Path) -> None:
    with SqliteKeystore(tmp_path / "keys.db") as store:
        device = await register(make(store))
        await device.drain()
        for number in range(61):
            keep(store, number)
        failures, connection = iter([False] * 30 + [True]), store._connection
        assert connection is not None

        def fail_at_the_31st(statement: str) -> None:
            if statement.startswith("UPDATE messages SET shown_at_ms") and next(failures, False):
                connection.interrupt()

        connection.set_trace_callback(fail_at_the_31st)
        shown: list[Message] = []
        for _ in range(2):
            with contextlib.suppress(KeystoreError):
                shown += await device.drain()
        assert texts(shown) == [str(number) for number in range(61)]


@pytest.mark.parametrize("statement", ["SELECT message_id", "UPDATE messages SET shown_at_ms"])
@pytest.mark.parametrize("nth", [1, 3])
async def test_a_hand_over_that_is_cancelled_loses_nothing(make: Make, tmp_path: Path, statement: str, nth: int) -> None:
    with SqliteKeystore(tmp_path / "keys.db") as store:
        device = await register(make(store))
        await device.drain()
        shown: list[Message] = []
        for number in range(20):
            keep(store, number)
        draining = asyncio.create_task(device.drain())
        loop, left, connection = asyncio.get_running_loop(), iter(range(1, 1000)), store._connection
        assert connection is not None

        def cancel(now: str) -> None:
            if now.startswith(statement) and next(left) == nth:
                loop.call_soon_threadsafe(draining.cancel)

        connection.set_trace_callback(cancel)
        with contextlib.suppress(asyncio.CancelledError):
            shown += await draining
        shown += await device.drain()
        assert texts(shown) == [str(number) for number in range(20)]


async def test_a_replaced_message_never_comes_after_its_successor(service: Service, make: Make, tmp_path: Path) -> None:
    with SqliteKeystore(tmp_path / "keys.db") as store:
        await register(make(store))
        old = keep(store, 0, replace_key="balance")
        for number in range(1, 301):
            keep(store, number)
        device = make(store)
        shown: list[Message] = []

        async def drain() -> None:
            shown.extend(await device.drain())

        async def wake() -> None:
            shown.extend(await device.on_wake())

        def is_marked() -> bool:
            message = store.message(old)
            return message is not None and message.shown_at_ms is not None

        draining = asyncio.create_task(drain())
        await until(lambda: is_marked() or draining.done())
        service.send("new", replace_key="balance")
        await asyncio.gather(draining, wake())
        assert len(shown) == 302
        assert [each.content.body for each in shown if each.content.replace_key] == ["0", "new"]


async def test_a_message_says_what_to_take_away_also_when_it_is_handed_over_late(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    first = service.send("1", replace_key="balance")
    await device.drain()
    # Neither 2 nor 3 reaches the app of this process; 2 never did.
    service.send("2", replace_key="balance")
    service.send("3", replace_key="balance")
    service.down["Acknowledge"] = 1
    with pytest.raises(Unavailable):
        await device.drain()
    (last,) = await make(keystore).drain()
    assert (last.content.body, last.replaces) == ("3", (first.message_id,))


async def test_a_stream_hands_over_what_a_call_that_failed_left(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        await messages.caught_up()
        service.down["Acknowledge"] = 1
        stream, service.phone().stream = service.phone().stream, None
        service.send("taken by draining")
        with contextlib.suppress(Unavailable):
            assert await device.drain() == []
        service.phone().stream = stream
        assert (await anext(messages)).content.body == "taken by draining"


async def test_the_inbox_pages_over_all_that_is_kept(make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    kept = PAGE_MAX + 120
    for number in range(kept):
        keep(keystore, number, lifetime_ms=DAY_MS if number % 2 else -1)
    alive = [str(number) for number in reversed(range(kept)) if number % 2]
    assert texts(await device.inbox()) == alive, "what has run out takes no place in a page"
    pages: list[list[str]] = []
    before: int | None = None
    while page := await device.inbox(before=before, limit=100):
        pages.append(texts(page))
        before = page[-1].position
    assert [len(page) for page in pages] == [100, 100, 100, 10]
    assert sum(pages, []) == alive  # noqa: RUF017 - a few
    for number in range(kept, 2 * kept):
        keep(keystore, number)
    assert len(await device.inbox()) == PAGE_MAX
    assert len(await device.inbox(limit=10_000)) == kept + len(alive)
    with pytest.raises(ValueError, match="limit"):
        await device.inbox(limit=0)


# --- who may speak ---


def break_signature(service: Service) -> None:
    delivery = service.send()
    delivery.envelope = delivery.envelope[:-1] + bytes((delivery.envelope[-1] ^ 1,))


def wrong_key(service: Service) -> None:
    service.send(key=ContentSigningKey.from_seed(b"\x09" * 32))


def server_speaks_for_end_to_end_sender(service: Service) -> None:
    service.entry = make_entry(SenderMode.END_TO_END)
    service.send(key=PLATFORM_KEY, flags=FLAG_SERVER_SEALED)


def sender_key_claims_to_be_the_server(service: Service) -> None:
    service.send(flags=FLAG_SERVER_SEALED)


def unknown_sender(service: Service) -> None:
    service.send(sender_id=SenderId(b"X" * 16))


def foreign_root(service: Service) -> None:
    service.entry = make_entry(root=RootKey.from_seed(b"\x08" * 32))
    service.send()


def another_device(service: Service) -> None:
    phone = service.phone()
    service.send(phone=replace(phone, device_id=DeviceId(b"E" * 16), waiting=phone.waiting))


def not_an_envelope(service: Service) -> None:
    service.put(b"SPE1" + b"\0" * 300)


def content_is_no_protobuf(service: Service) -> None:
    service.send(plaintext=b"\xff\xff\xff")


def cut_short(service: Service) -> None:
    delivery = service.send()
    delivery.envelope = delivery.envelope[:-1]


@pytest.mark.parametrize(
    "forge",
    [
        break_signature,
        wrong_key,
        server_speaks_for_end_to_end_sender,
        sender_key_claims_to_be_the_server,
        unknown_sender,
        foreign_root,
        another_device,
        not_an_envelope,
        content_is_no_protobuf,
        cut_short,
    ],
)
async def test_what_cannot_be_trusted_is_refused_and_reported(service: Service, make: Make, forge: Callable[[Service], None]) -> None:
    device = await register(make())
    forge(service)
    assert await device.drain() == []
    assert await device.inbox() == []
    assert service.reasons() == [(AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)]
    assert service.phone().waiting == {}


async def test_the_server_may_seal_for_a_sender_that_allows_it_and_the_phone_shows_that(service: Service, make: Make) -> None:
    device = await register(make())
    service.send(key=PLATFORM_KEY, flags=FLAG_SERVER_SEALED, muted=True)
    (message,) = await device.drain()
    assert message.sealed_by is SealedBy.SERVER
    assert message.muted
    (kept,) = await device.inbox()
    assert (kept.sealed_by, kept.muted, kept.is_new) == (SealedBy.SERVER, True, False)


async def test_a_new_key_of_the_sender_is_learned(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    service.send("old key")
    assert texts(await device.drain()) == ["old key"]
    new_key = ContentSigningKey.from_seed(b"\x07" * 32)
    service.entry = make_entry(key=new_key, serial=2)
    clock.ahead_s += 3600
    service.time_ahead_s += 3600
    service.send("new key", key=new_key)
    assert texts(await device.drain()) == ["new key"]
    # and a rollback to the old entry convinces nobody
    service.entry = make_entry(serial=1)
    clock.ahead_s += 3600
    service.time_ahead_s += 3600
    service.send("rolled back")
    assert await device.drain() == []
    assert len(service.phone().waiting) == 1


async def test_an_entry_that_ran_out_is_fetched_anew(service: Service, make: Make, clock: FakeClock) -> None:
    service.entry = make_entry(not_after_ms=service.now().ToMilliseconds() + HOUR_MS)
    device = await register(make())
    service.send("1")
    assert texts(await device.drain()) == ["1"]
    clock.ahead_s = service.time_ahead_s = 7200
    service.send("2")
    assert await device.drain() == []  # held: the service still gives the old one
    assert service.outcomes() == [AckOutcome.DELIVERED]
    service.entry = make_entry(serial=2)
    assert texts(await device.drain()) == ["2"]


async def test_without_the_accounts_service_messages_wait(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make(policy=RetryPolicy(attempts_max=2)))
    for _ in range(10):
        service.send()
    service.down["GetSenderProfile"] = 2
    assert await device.drain() == []
    assert service.acknowledged == []
    assert service.calls["GetSenderProfile"] == 2  # not once a message
    clock.ahead_s += PROFILE_FAILED_PAUSE_S
    assert len(await device.drain()) == 10


# --- what the root took back ---


def revoke(service: Service, *items: Revoked, serial: int = 1, root: RootKey = ROOT, issued_ms: int = 0) -> None:
    """Have the service give this list from now on."""
    in_order = tuple(sorted(items, key=lambda item: item.encode()))
    service.revocations = sign_revocations(root, RevocationList(serial, issued_ms, in_order))


async def test_a_key_revoked_after_its_entry_was_cached_is_refused_from_the_next_day_on(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    device = await register(make(keystore))
    service.send("before", lifetime_ms=7 * DAY_MS)
    assert texts(await device.drain()) == ["before"]
    revoke(service, RevokedKey(SENDER_KEY.public_key))
    service.send("not known yet", lifetime_ms=7 * DAY_MS)
    assert texts(await device.drain()) == ["not known yet"]
    clock.ahead_s = service.time_ahead_s = 24 * 3600 + 1
    assert await device.drain() == []  # nothing waits, but what is due daily is done
    service.send("after")
    assert await device.drain() == []
    assert service.reasons()[-1] == (AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)
    assert "revoked the key that signed this message" in (await device.diagnose()).last_error
    assert texts(await device.inbox()) == ["not known yet", "before"]  # what was believed stays


async def test_the_list_is_asked_for_before_an_entry_is_trusted_that_is_new_here(service: Service, make: Make) -> None:
    device = await register(make())
    revoke(service, RevokedKey(SENDER_KEY.public_key))
    for _ in range(5):
        service.send()
    assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.UNDELIVERED] * 5
    assert service.calls["GetRevocations"] == 1 + 1  # before the entry, and by what is due daily


@pytest.mark.parametrize("failing", ["UploadPrekeys", "GetChallenge"])
async def test_the_list_comes_also_where_the_rest_of_what_is_due_fails(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock, failing: str
) -> None:
    device = await register(make(keystore))
    revoke(service, RevokedKey(SENDER_KEY.public_key))
    clock.ahead_s = service.time_ahead_s = 8 * 24 * 3600
    service.down[failing] = 1000
    with pytest.raises(CallFailed):
        await device.maintain()
    assert keystore.revocations() == service.revocations


async def test_a_revoked_sender_that_is_certified_anew_is_believed_again(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    device = await register(make(keystore))
    service.send("one")
    await device.drain()
    revoke(service, RevokedEntries(SENDER, 1))
    await device.maintain()
    service.send("two")
    assert await device.drain() == []
    assert "revoked the entry of Банк Приклад" in (await device.diagnose()).last_error
    clock.ahead_s += PROFILE_PAUSE_S
    service.entry = make_entry(serial=2)
    service.send("three")
    assert texts(await device.drain()) == ["three"]


async def test_a_flood_of_a_revoked_sender_asks_the_service_once_a_minute(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    revoke(service, RevokedEntries(SENDER, 1))
    for _ in range(200):
        service.send()
    await device.drain()
    assert service.calls["GetSenderProfile"] == 1
    clock.ahead_s += PROFILE_PAUSE_S
    service.send()
    await device.drain()
    assert service.calls["GetSenderProfile"] == 2
    assert service.outcomes() == [AckOutcome.UNDELIVERED] * 201


async def test_a_list_outlives_the_process_and_never_goes_back(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    revoke(service, RevokedKey(SENDER_KEY.public_key), serial=2)
    await device.maintain()
    kept = keystore.revocations()
    assert kept == service.revocations
    revoke(service, serial=1)  # an older one, that revokes nothing
    again = make(keystore)
    await again.maintain()
    assert keystore.revocations() == kept
    service.send()
    assert await again.drain() == []
    assert service.outcomes() == [AckOutcome.UNDELIVERED]
    revoke(service, serial=3)
    await again.maintain()
    service.send("taken back by a newer list")
    assert texts(await again.drain()) == ["taken back by a newer list"]


async def test_two_processes_over_one_store_go_by_the_newer_list(service: Service, make: Make, keystore: Keystore) -> None:
    first = await register(make(keystore))
    second = make(keystore)
    revoke(service, serial=1)
    await second.maintain()
    revoke(service, RevokedKey(SENDER_KEY.public_key), serial=3)
    await first.maintain()
    revoke(service, serial=2)  # a server that lags behind; its list is newer than what the second process has seen
    await second.maintain()
    service.send()
    assert await second.drain() == []
    assert service.outcomes() == [AckOutcome.UNDELIVERED]


@pytest.mark.parametrize("issued_in_ms", [0, 400 * DAY_MS])
async def test_by_the_issue_of_a_list_an_entry_has_ended_and_one_from_the_future_ends_no_other(
    service: Service, make: Make, keystore: Keystore, issued_in_ms: int
) -> None:
    now_ms = service.now().ToMilliseconds()
    revoke(service, issued_ms=now_ms + issued_in_ms)
    device = await register(make(keystore))
    await device.maintain()
    service.entry = make_entry(not_after_ms=now_ms - DAY_MS)
    service.time_ahead_s = -3 * 86_400
    service.send("signed by a key that has ended")
    for _ in range(2):
        assert await device.drain() == []
        device = make(keystore)
    assert service.acknowledged == []
    service.entry = make_entry(serial=2, not_after_ms=now_ms + DAY_MS)
    assert texts(await device.drain()) == ["signed by a key that has ended"], "certified anew"


async def test_of_two_questions_at_once_the_newer_list_counts_whichever_is_stored_last(
    service: Service, channels: Channels, clock: FakeClock
) -> None:
    class LateStore(Store):
        """Resumes who stored first after who stored second, as threads may."""

        held = False

        async def __call__(self, use: Callable[[Keystore], Any]) -> Any:
            result = await super().__call__(use)
            if result is True and not self.held:  # a list was put
                self.held = True
                await second_is_done.wait()
            return result

    second_is_done = asyncio.Event()
    calls = Calls(clock, lambda: 0.5, RetryPolicy())
    store = LateStore(MemoryKeystore())
    revocations = Revocations(ROOT.public_key, calls, channels, store, ServerTime(clock, store), Trouble())
    deadline = Deadline.after(clock, 10)
    revoke(service, serial=1)
    first = asyncio.create_task(revocations.refresh(deadline))
    await until(lambda: service.calls["GetRevocations"] == 1)
    revoke(service, RevokedKey(SENDER_KEY.public_key), serial=2)
    await revocations.refresh(deadline)
    second_is_done.set()
    await first
    newest = await revocations.newest()
    assert newest is not None
    assert newest.serial == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda service: revoke(service, RevokedKey(SENDER_KEY.public_key), root=RootKey.from_seed(b"\x08" * 32)),
        lambda service: setattr(service, "revocations", service.revocations[:-1]),
        lambda service: setattr(service, "revocations", b"garbage"),
        lambda service: setattr(service, "revocations", bytes(200_000)),
    ],
    ids=["another root", "cut short", "garbage", "too long"],
)
async def test_a_list_that_cannot_be_trusted_is_noted_and_changes_nothing(
    service: Service, make: Make, spoil: Callable[[Service], None]
) -> None:
    device = await register(make())
    revoke(service, RevokedKey(SENDER_KEY.public_key))
    spoil(service)
    service.send()
    assert texts(await device.drain()) == ["hello"]
    assert "the revocation list" in (await device.diagnose()).last_error


async def test_a_service_that_does_not_give_the_list_holds_up_no_message(service: Service, make: Make) -> None:
    device = await register(make(policy=RetryPolicy(attempts_max=2)))
    revoke(service, RevokedKey(b"k" * 32))
    service.down["GetRevocations"] = 1000
    for n in range(10):
        service.send(str(n))
    assert len(await device.drain()) == 10
    assert service.calls["GetRevocations"] == 2 + 2  # not once a message
    service.down.clear()
    await device.maintain()
    assert service.outcomes() == [AckOutcome.DELIVERED] * 10


async def test_a_list_damaged_in_the_store_is_noted_and_got_again(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    revoke(service, RevokedKey(SENDER_KEY.public_key), serial=4)
    keystore.put_revocations(4, b"damaged")
    service.send()
    assert await device.drain() == []
    assert keystore.revocations() == service.revocations


async def test_who_unregisters_forgets_the_list_and_asks_again(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    revoke(service, RevokedKey(SENDER_KEY.public_key), serial=4)
    await device.maintain()
    await device.unregister()
    assert keystore.revocations() is None
    await register(device)
    service.send()
    assert await device.drain() == []
    assert keystore.revocations() == service.revocations


async def test_a_sender_profile_is_what_the_root_certified_and_a_brand(service: Service, make: Make) -> None:
    device = make()  # entries are public: nobody has to be registered
    service.brand = {"brand_colour": "#0a7c4a", "brand_text_colour": "#ffffff", "logo_png": b"png", "display_name": "Somebody Else"}
    profile = await device.sender_profile(SENDER)
    assert profile == SenderProfile(SENDER, "Банк Приклад", SenderMode.END_TO_END | SenderMode.SERVER, "#0a7c4a", "#ffffff", b"png")
    with pytest.raises(NotFound):
        await device.sender_profile(SenderId(b"X" * 16))
    with pytest.raises(ValueError, match="sender_id"):
        await device.sender_profile(SenderId(b"X"))
    service.down["GetSenderProfile"] = 1000
    with pytest.raises(Unavailable):
        await make(policy=RetryPolicy(attempts_max=2)).sender_profile(SENDER)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda service: setattr(service, "entry", make_entry(root=RootKey.from_seed(b"\x08" * 32))), "not signed by the pinned root"),
        (lambda service: setattr(service, "entry", make_entry(not_after_ms=1)), "outside its time"),
        (lambda service: setattr(service, "entry", PLATFORM_ENTRY), "certifies a platform"),
        (lambda service: revoke(service, RevokedEntries(SENDER, 1)), "revoked the entry of Банк Приклад"),
    ],
    ids=["another root", "expired", "the platform's", "revoked"],
)
async def test_a_sender_profile_that_cannot_be_trusted_is_refused(
    service: Service, make: Make, spoil: Callable[[Service], None], words: str
) -> None:
    device = make()
    spoil(service)
    with pytest.raises(EntryRefused, match=words):
        await device.sender_profile(SENDER)


async def test_a_sender_profile_never_goes_back_to_an_older_entry(service: Service, make: Make) -> None:
    device = make()
    service.entry = make_entry(serial=5)
    await device.sender_profile(SENDER)
    service.entry = make_entry(serial=4)
    with pytest.raises(EntryRefused, match="older entry"):
        await device.sender_profile(SENDER)


async def test_content_of_a_higher_version_shows_title_and_body(service: Service, make: Make) -> None:
    device = await register(make())
    service.send("body", version=9, title="title", deep_link="app://x")
    (message,) = await device.drain()
    assert message.content == Content(version=9, content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, title="title", body="body")


# --- time ---


async def test_a_clock_that_is_wrong_by_an_hour_holds_and_is_healed_by_the_service(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    service.tells_time = False
    clock.wrong_by_ms = -HOUR_MS  # somebody set the clock back: everything is from the future
    service.send("new")
    assert await device.drain() == []
    assert service.acknowledged == []
    assert len(service.phone().waiting) == 1
    service.tells_time = True
    assert texts(await device.drain()) == ["new"]
    assert abs((await device.diagnose()).clock_offset_ms or 0) >= HOUR_MS - 1000
    clock.wrong_by_ms = +HOUR_MS  # and forward: everything is expired
    service.send("short", lifetime_ms=60_000)
    assert texts(await device.drain()) == ["short"]
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2


async def test_a_wrong_clock_is_healed_by_asking_when_the_answer_tells_no_time(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    service.send("a", lifetime_ms=60_000)
    clock.wrong_by_ms = HOUR_MS
    service.tells_time = False
    assert await device.drain() == []
    assert service.acknowledged == []
    service.tells_time = True
    assert texts(await device.drain()) == ["a"]


JUMPS = [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS]


@pytest.mark.parametrize("by_ms", JUMPS)
async def test_a_clock_that_jumps_while_the_service_answers_teaches_the_right_time(
    service: Service, make: Make, clock: FakeClock, by_ms: int
) -> None:
    def jump() -> None:
        clock.wrong_by_ms += by_ms

    service.meanwhile = {"StartRegistration": jump, "ConfirmRegistration": jump, "Authenticate": jump, "Drain": jump}
    device = await register(make())  # the service verifies the prekey's times
    service.send("short", lifetime_ms=60_000)
    assert texts(await device.drain()) == ["short"]
    assert service.meanwhile == {}
    assert (await device.diagnose()).clock_offset_ms == pytest.approx(-4 * by_ms, abs=5000)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("by_ms", JUMPS)
async def test_a_clock_that_jumps_between_two_messages_loses_neither(
    service: Service, make: Make, clock: FakeClock, by_ms: int, again: bool
) -> None:
    def jump() -> None:
        clock.wrong_by_ms += by_ms

    device = await register(make())
    service.send("a", lifetime_ms=60_000)
    service.send("b", lifetime_ms=60_000)
    # The device asked for the time a moment ago, so that it would not ask again without reason.
    assert await device._session.resync(device._session.deadline())
    # The sender is asked for after the first message's times were checked and before the second's.
    service.meanwhile["GetSenderProfile"] = jump
    if again:
        service.meanwhile["Authenticate"] = jump
    assert texts(await device.drain()) == ["a", "b"]
    assert service.meanwhile == {}
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2


@pytest.mark.parametrize("by_ms", [30_000, *JUMPS])
async def test_a_clock_that_jumps_while_a_stream_runs_loses_nothing(service: Service, make: Make, clock: FakeClock, by_ms: int) -> None:
    device = await register(make())
    async with device.stream() as messages, asyncio.timeout(LIMIT_S):
        service.send("a", lifetime_ms=20_000)
        assert (await anext(messages)).content.body == "a"
        assert await device._session.resync(device._session.deadline())
        clock.wrong_by_ms += by_ms
        service.send("b", lifetime_ms=20_000)
        assert (await anext(messages)).content.body == "b"
    assert set(service.outcomes()) == {AckOutcome.DELIVERED}


@pytest.mark.parametrize("by_ms", JUMPS)
async def test_prekeys_made_after_the_clock_jumped_have_right_times(service: Service, make: Make, clock: FakeClock, by_ms: int) -> None:
    device = await register(make(one_time_prekeys=5))
    assert await device.drain() == []
    service.phone().one_time.clear()
    clock.wrong_by_ms = by_ms
    await device.maintain()
    made = [each.created_at_ms for each in (*service.phone().one_time.values(), service.phone().signed_prekey)]
    assert len(made) == 6
    assert made == pytest.approx([service.now().ToMilliseconds()] * 6, abs=60_000)


async def test_an_expired_message_is_never_shown(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    service.send("late", created_ms=service.now().ToMilliseconds() - HOUR_MS, lifetime_ms=HOUR_MS - 60_000)
    assert await device.drain() == []
    assert service.reasons() == [(AckOutcome.UNDELIVERED, Reason.LIFETIME_OVER)]
    service.send("in time", lifetime_ms=60_000)
    assert texts(await device.drain()) == ["in time"]
    assert texts(await device.inbox()) == ["in time"]
    clock.ahead_s += 61
    assert await device.inbox() == []


async def test_a_message_stored_and_expired_before_it_was_handed_over_is_not_shown(service: Service, make: Make, clock: FakeClock) -> None:
    keystore = MemoryKeystore()
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    service.send(lifetime_ms=60_000)
    service.down["Acknowledge"] = 1
    with pytest.raises(Unavailable):
        await device.drain()
    clock.ahead_s = service.time_ahead_s = 3600
    assert await make(keystore).drain() == []


# --- tokens ---


async def test_a_token_is_renewed_before_it_ends_and_when_it_is_refused(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    await device.drain()
    await device.drain()
    assert service.calls["Authenticate"] == 1
    clock.ahead_s += 850
    await device.drain()
    assert service.calls["Authenticate"] == 2
    service.tokens.clear()
    service.send()
    assert texts(await device.drain()) == ["hello"]
    assert service.calls["Authenticate"] == 3
    service.phones.clear()
    service.tokens.clear()
    with pytest.raises(RegistrationEnded):
        await device.drain()


# --- reading ---


async def test_reading_is_acknowledged_beside_delivered(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    service.send()
    (message,) = await device.drain()
    assert await device.mark_read(message.message_id)
    assert not await device.mark_read(message.message_id)
    await device.drain()
    assert service.outcomes() == [AckOutcome.DELIVERED, AckOutcome.READ]
    (kept,) = await device.inbox()
    assert kept.read_at is not None
    assert await device.delete(message.message_id)
    assert await device.inbox() == []


async def test_an_acknowledgement_the_service_cannot_read_does_not_stop_the_others(service: Service, make: Make) -> None:
    device = await register(make())
    service.refuse_acks = True
    for number in range(5):
        if number == 2:
            service.put(b"rubbish")
        service.send(str(number))
    assert len(await device.drain()) == 5
    assert service.outcomes() == [AckOutcome.DELIVERED] * 5
    assert (await device.diagnose()).acknowledgements_waiting == 0


# --- the stream ---


async def test_a_stream_brings_the_backlog_and_then_what_comes(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    for number in range(3):
        service.send(str(number))
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        got = [(await anext(messages)).content.body for _ in range(3)]
        await messages.caught_up()
        service.send("live")
        got.append((await anext(messages)).content.body)
        await until(lambda: not service.phone().waiting)
    assert got == ["0", "1", "2", "live"]
    assert service.outcomes() == [AckOutcome.DELIVERED] * 4
    assert service.calls["Acknowledge"] == 0
    await until(lambda: service.phone().stream is None)


async def test_acknowledgements_gather_while_one_is_on_its_way(service: Service, make: Make) -> None:
    device = await register(make())
    for number in range(1000):
        service.send(str(number))
    got: list[str] = []
    device._on_message = lambda message: got.append(message.content.body)
    task = asyncio.create_task(device.run_stream())
    # Acknowledged is what is stored; it is handed over after that.
    await until(lambda: not service.phone().waiting and len(got) >= 1000)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert got == [str(number) for number in range(1000)]
    assert sum(service.ack_frames) == 1000
    assert max(service.ack_frames) <= 256
    assert len(service.ack_frames) < 500


async def test_a_second_stream_ends_the_first_for_good(service: Service, make: Make) -> None:
    keystore = MemoryKeystore()
    first, second = await register(make(keystore)), make(keystore)
    async with asyncio.timeout(LIMIT_S), first.stream() as messages:
        await messages.caught_up()
        async with second.stream() as others:
            await others.caught_up()
            with pytest.raises(StreamTakenOver):
                await anext(messages)
            with pytest.raises(StreamTakenOver):
                await anext(messages)
            service.send()
            assert (await anext(others)).content.body == "hello"
    assert service.calls["Stream"] == 2


async def test_a_stream_may_retake(service: Service, make: Make, clock: FakeClock) -> None:
    keystore = MemoryKeystore()
    first, second = await register(make(keystore)), make(keystore)
    async with asyncio.timeout(LIMIT_S), first.stream(retake=True) as messages:
        await messages.caught_up()
        async with second.stream() as others:
            with pytest.raises(StreamTakenOver):
                await anext(others)
        service.send()
        assert (await anext(messages)).content.body == "hello"
    assert clock.pauses


async def test_a_broken_stream_connects_again_and_shows_nothing_twice(service: Service, make: Make, clock: FakeClock) -> None:
    shown: list[str] = []

    async def on_message(message: Message) -> None:
        shown.append(message.content.body)
        raise RuntimeError("the app's own fault")

    device = await register(make(on_message=on_message))
    task = asyncio.create_task(device.run_stream())
    await until(lambda: service.phone().stream is not None)
    for number in range(5):
        service.send(str(number))
        await until(lambda: not service.phone().waiting)
        tried = service.calls["Stream"]
        cast(Any, service.phone().stream).put_nowait("restart")
        service.down["Stream"] = 2
        service.tokens.clear()
        while service.calls["Stream"] < tried + 3:
            await asyncio.sleep(0.005)
        await until(lambda: service.phone().stream is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert shown == ["0", "1", "2", "3", "4"]
    assert service.outcomes() == [AckOutcome.DELIVERED] * 5
    assert all(0 < each < 30 for each in clock.pauses)


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
async def test_a_stream_that_a_busy_service_does_not_let_in_comes_back_by_itself(
    service: Service, make: Make, clock: FakeClock, code: grpc.StatusCode
) -> None:
    """CANCELLED is what gRPC makes of calls that a server has not looked at in time."""
    device = await register(make())
    service.down_as = code
    service.down["Stream"] = 3
    service.send("hello")
    async with device.stream() as messages:
        assert (await anext(messages)).content.body == "hello"
    assert len(clock.pauses) == 3


async def test_a_stream_takes_what_it_held_once_it_can(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make(policy=RetryPolicy(attempts_max=2)))
    service.down["GetSenderProfile"] = 10
    service.send("waits")
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        assert (await anext(messages)).content.body == "waits"
        await until(lambda: not service.phone().waiting)
    assert service.calls["GetSenderProfile"] == 11
    assert service.calls["Stream"] == 1


async def test_a_stream_sends_what_an_earlier_process_still_owes(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    service.send()
    (message,) = await device.drain()
    await device.mark_read(message.message_id)
    async with asyncio.timeout(LIMIT_S), make(keystore).stream():
        await until(lambda: len(service.acknowledged) == 2)
        await until(lambda: keystore.pending_acknowledgements() == [])
    assert service.outcomes() == [AckOutcome.DELIVERED, AckOutcome.READ]


async def test_what_a_closed_stream_had_not_given_out_comes_by_draining(service: Service, make: Make) -> None:
    device = await register(make())
    for number in range(3):
        service.send(str(number))
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        await messages.caught_up()
        await until(lambda: not service.phone().waiting)
        assert (await anext(messages)).content.body == "0"
    assert texts(await device.drain()) == ["1", "2"]
    assert await device.drain() == []


async def test_a_stream_of_an_ended_installation_ends(service: Service, make: Make) -> None:
    device = await register(make())
    service.phones.clear()
    with pytest.raises(RegistrationEnded):
        await device.run_stream()


async def test_who_waits_for_the_backlog_of_a_stream_that_ends_is_told(service: Service, make: Make) -> None:
    device = await register(make())
    service.phones.clear()
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        for _ in range(2):
            with pytest.raises(RegistrationEnded):
                await messages.caught_up()
        with pytest.raises(RegistrationEnded):
            await anext(messages)


async def test_a_stream_whose_channels_are_closed_ends(service: Service, make: Make) -> None:
    device = await register(make())
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        await messages.caught_up()
        await device._channels.close()
        with pytest.raises(RuntimeError, match="channels are closed"):
            await anext(messages)


async def test_a_stream_that_was_open_when_the_installation_ended_ends(
    service: Service, make: Make, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HOUSEKEEPING_S", 0.01)
    device = await register(make())
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        await messages.caught_up()
        service.phones.clear()
        service.tokens.clear()
        clock.ahead_s += 2 * 3600  # until the log of devices is due
        with pytest.raises(RegistrationEnded):
            await anext(messages)


# --- one-time prekeys ---


async def test_a_one_time_prekey_opens_one_message_and_is_gone(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore, one_time_prekeys=3))
    await device.drain()
    prekey = service.phone().one_time[min(service.phone().one_time)]
    name = (prekey.suite, prekey.prekey_id, prekey.kind)
    assert keystore.prekey(*name) is not None
    first = service.send("once", one_time=True)
    assert texts(await device.drain()) == ["once"]
    assert keystore.prekey(*name) is None
    assert keystore.prekey_count(PrekeyKind.ONE_TIME) == 2
    # The same envelope again is a duplicate: acknowledged, not shown.
    service.put(first.envelope)
    assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 2
    # Another message to the used key: nothing is left to open it with.
    service.phone().one_time[prekey.prekey_id] = prekey
    service.send("twice", one_time=True)
    assert await device.drain() == []
    assert service.reasons()[2:] == [(AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)]
    assert texts(await device.inbox()) == ["once"]
    # What comes after it arrives.
    service.send("next", one_time=True)
    service.send("shared")
    assert sorted(texts(await device.drain())) == ["next", "shared"]


async def test_a_phone_whose_store_failed_in_the_middle_of_a_message_still_opens_it(service: Service, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with SqliteKeystore(path) as failing:
        device = await register(make(failing, one_time_prekeys=1))
        await device.drain()
        service.send("kept", one_time=True)

        connection = failing._connection
        assert connection is not None

        def fail_at_the_message(statement: str) -> None:
            if statement.startswith("INSERT INTO messages"):
                connection.interrupt()

        # What was opened is not stored, and so the key that opened it stays: both or neither.
        connection.set_trace_callback(fail_at_the_message)
        with pytest.raises(KeystoreError):
            await device.drain()
        connection.set_trace_callback(None)
        assert failing.prekey_count(PrekeyKind.ONE_TIME) == 1
    with SqliteKeystore(path) as store:
        assert texts(await make(store, one_time_prekeys=1).drain()) == ["kept"]
        assert store.prekey_count(PrekeyKind.ONE_TIME) == 0


async def test_one_time_prekeys_are_topped_up_below_twenty_a_hundred_at_a_time(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore, one_time_prekeys=100))
    await device.drain()
    phone = service.phone()
    assert len(phone.one_time) == 100
    for prekey_id in sorted(phone.one_time)[:80]:
        del phone.one_time[prekey_id]
    await device.maintain()
    assert len(phone.one_time) == 20
    del phone.one_time[min(phone.one_time)]
    await device.maintain()
    assert len(phone.one_time) == 119
    assert keystore.prekey_count(PrekeyKind.ONE_TIME) == 200


async def test_one_time_prekeys_that_nobody_used_are_forgotten_after_their_retention(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    device = await register(make(keystore, one_time_prekeys=5))
    await device.drain()
    # Handed out and never used: the service asks for no more of them.
    clock.ahead_s = service.time_ahead_s = (90 + 35) * 86_400 - 60
    await device.maintain()
    assert keystore.prekey_count(PrekeyKind.ONE_TIME) == 5
    clock.ahead_s = service.time_ahead_s = (90 + 35) * 86_400 + 60
    await device.maintain()
    assert keystore.prekey_count(PrekeyKind.ONE_TIME) == 0


# --- upkeep ---


async def test_prekeys_rotate_after_a_week_and_old_messages_still_open(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make(one_time_prekeys=50))
    await device.drain()
    first = service.phone().signed_prekey
    assert len(service.phone().one_time) == 50
    assert service.calls["UploadPrekeys"] == 1
    sealed_to_old = service.send("old key", lifetime_ms=20 * DAY_MS)
    del service.phone().waiting[sealed_to_old.message_id]
    clock.ahead_s = service.time_ahead_s = 8 * 86_400
    service.lose_answer["UploadPrekeys"] = 1
    for _ in range(40):
        service.send("uses up", one_time=True)
    assert len(await device.drain()) == 40  # and maintains
    second = service.phone().signed_prekey
    assert second.prekey_id != first.prekey_id
    assert len(service.phone().one_time) == 60
    service.phone().waiting[sealed_to_old.message_id] = sealed_to_old
    service.send("new key")
    assert sorted(texts(await device.drain())) == ["new key", "old key"]
    uploads = service.calls["UploadPrekeys"]
    await device.maintain()
    assert service.calls["UploadPrekeys"] == uploads
    assert service.phone().signed_prekey == second


async def test_a_rotation_whose_upload_failed_is_repeated_with_the_same_key(service: Service, make: Make, clock: FakeClock) -> None:
    keystore = MemoryKeystore()
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    clock.ahead_s = service.time_ahead_s = 8 * 86_400
    service.down["UploadPrekeys"] = 10
    assert await device.drain() == []  # messages matter more
    made = keystore.newest_signed_prekey()
    service.down.clear()
    await make(keystore).maintain()
    assert made is not None
    assert service.phone().signed_prekey.public_key == made.public_key


async def test_a_server_that_goes_back_keeps_no_old_prekey_in_use(service: Service, make: Make, clock: FakeClock) -> None:
    keystore = MemoryKeystore()
    device = await register(make(keystore))
    for passed_s in (6.9 * 86_400, 7.1 * 86_400):  # the daily upkeep is due at the first of them only
        clock.ahead_s = service.time_ahead_s = passed_s
        service.send()
        assert len(await device.drain()) == 1
    first = service.phone().signed_prekey
    service.time_ahead_s = 86_400
    await device.drain()
    second = keystore.newest_signed_prekey()
    assert second is not None
    assert second.created_at_ms - first.created_at_ms >= 7 * DAY_MS
    # A server that believes its clock refuses a prekey from the future: it gets it when the clock is right.
    assert service.phone().signed_prekey == first
    service.time_ahead_s = clock.ahead_s
    await device.maintain()
    assert service.phone().signed_prekey.public_key == second.public_key


async def test_lost_prekeys_are_replaced_once_whatever_becomes_of_the_upload(service: Service, make: Make, keystore: Keystore) -> None:
    told: list[DeviceNotice] = []
    options = {"one_time_prekeys": 20, "policy": RetryPolicy(attempts_max=1), "on_notice": told.append}
    device = await register(make(keystore, **options))
    await device.maintain()
    service.highest_prekey = made_before(service, keystore, 500)
    for fault in (service.down, service.lose_answer):
        fault["UploadPrekeys"] = 10
        with pytest.raises(Unavailable):
            await make(keystore, **options).maintain()
        fault.clear()
    await make(keystore, **options).maintain()
    signed, *one_time = service.uploads[-1].prekeys
    assert service.uploads[-1].forget_former
    assert signed.prekey_id == 501, "made once, and kept"
    assert len(one_time) == 20
    assert min(each.prekey_id for each in one_time) > 501
    assert [each.kind for each in told] == [NoticeKind.RESTORED]
    uploads = len(service.uploads)
    await make(keystore, **options).maintain()
    assert len(service.uploads) == uploads
    service.send("to a new one", one_time=True)
    assert texts(await device.drain()) == ["to a new one"]


def made_before(service: Service, keystore: Keystore, prekey_id: int, min_suite: int = SUITE_X25519) -> SignedPrekey:
    """One that this phone made and signed, and that its store, out of a back-up, knows nothing of."""
    identity, phone, now_ms = keystore.identity(), service.phone(), service.now().ToMilliseconds()
    assert identity is not None
    _, public = generate_prekey(
        identity,
        phone.device_id,
        prekey_id=prekey_id,
        kind=PrekeyKind.ONE_TIME,
        now_ms=now_ms,
        suite=min_suite,
        min_suite=min_suite,
    )
    return public


async def test_a_server_cannot_make_a_phone_leap_or_rise_by_a_prekey_that_it_did_not_sign(
    service: Service, make: Make, keystore: Keystore
) -> None:
    device = await register(make(keystore))
    await device.maintain()
    given = keystore.highest_prekey_id()
    own = made_before(service, keystore, 500)
    for forged in (
        replace(own, prekey_id=0xFFFF_FFFF),
        replace(own, kind=PrekeyKind.SIGNED),
        replace(own, public_key=b""),
        replace(make_unknown_prekey(service), prekey_id=0xFFFF_FFFF),
    ):
        service.highest_prekey = forged
        await device.maintain()
    service.highest_prekey = own
    service.phone().min_suite = SUITE_HYBRID  # not the one that it was signed with
    await device.maintain()
    assert keystore.highest_prekey_id() == given
    assert await device.notices() == []
    assert floor(keystore).suite == SUITE_X25519


class FullDisk:
    """A store that fails from some write of certain facts on."""

    def __init__(self, keystore: Keystore, writes: int) -> None:
        self._keystore = keystore
        self._left = writes

    def __getattr__(self, name: str) -> Any:
        if name in {"set_fact", "raise_prekey_id"}:
            self._left -= 1
            if self._left < 0:
                raise KeystoreError("the disk is full")
        return getattr(self._keystore, name)


@pytest.mark.parametrize("writes", range(3))
async def test_a_leap_that_is_cut_short_goes_on(service: Service, make: Make, keystore: Keystore, writes: int) -> None:
    """The store fails, or the phone goes off, between two of its writes."""
    await (await register(make(keystore))).maintain()
    service.highest_prekey = made_before(service, keystore, 500, SUITE_HYBRID)
    service.phone().min_suite = SUITE_HYBRID
    with pytest.raises(KeystoreError):
        await make(cast("Keystore", FullDisk(keystore, writes))).maintain()
    device = make(keystore)
    await device.maintain()
    assert service.uploads[-1].forget_former
    assert service.phone().signed_prekey.prekey_id == 501
    assert floor(keystore).suite == SUITE_HYBRID
    assert [each.kind for each in await device.notices()] == [NoticeKind.RESTORED]


async def test_a_look_that_was_hastened_and_failed_is_made_again(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    await (await register(make(keystore))).maintain()
    device = make(keystore, policy=RetryPolicy(attempts_max=1))
    service.highest_prekey = made_before(service, keystore, 500)
    service.send(prekey=make_unknown_prekey(service))
    service.down["GetPrekeyState"] = 1
    await device.drain()
    assert not service.down["GetPrekeyState"]
    clock.ahead_s = service.time_ahead_s = 2 * 3600
    await device.drain()
    assert service.phone().signed_prekey.prekey_id == 501


def make_unknown_prekey(service: Service) -> SignedPrekey:
    """One whose private half is not in the phone's store."""
    now_ms = service.now().ToMilliseconds()
    return generate_prekey(IdentityKey.generate(), service.phone().device_id, prekey_id=77, kind=PrekeyKind.ONE_TIME, now_ms=now_ms)[1]


async def test_a_stream_looks_at_once_when_a_prekey_is_missing(service: Service, make: Make, keystore: Keystore) -> None:
    await (await register(make(keystore))).maintain()
    async with make(keystore).stream() as messages:
        await messages.caught_up()
        service.highest_prekey = made_before(service, keystore, 500)
        service.send(prekey=make_unknown_prekey(service))
        await until(lambda: service.phone().signed_prekey.prekey_id == 501)
        service.send("opens")
        async with asyncio.timeout(LIMIT_S):
            assert (await anext(messages)).content.body == "opens"


async def test_who_names_prekeys_that_never_were_costs_a_look_an_hour(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    assert await device.drain() == []
    looks = service.calls["GetRevocations"]
    never = make_unknown_prekey(service)
    for hours in range(3):
        clock.ahead_s = service.time_ahead_s = hours * 3600
        for _ in range(5):
            service.send(prekey=never)
            assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.UNDELIVERED] * 15
    assert service.calls["GetRevocations"] == looks + 2, "not in the hour of the first look"


# --- the hybrid suite ---


async def test_a_device_registers_with_the_hybrid_suite_and_receives(service: Service, make: Make, keystore: Keystore) -> None:
    service.lose_answer["ConfirmRegistration"] = 1
    device = await register(make(keystore, suite=SUITE_HYBRID, one_time_prekeys=3))
    first, second = service.confirmations
    assert first == second
    assert (first.min_suite, first.signed_prekey.suite) == (SUITE_HYBRID, SUITE_HYBRID)
    await device.drain()
    phone = service.phone()
    assert {each.suite for each in phone.one_time.values()} == {SUITE_HYBRID}
    service.send("signed")
    once = service.send("once", one_time=True)
    assert sorted(texts(await device.drain())) == ["once", "signed"]
    assert keystore.prekey_count(PrekeyKind.ONE_TIME) == 2
    service.put(once.envelope)
    assert await device.drain() == []
    assert service.outcomes() == [AckOutcome.DELIVERED] * 3
    raised_at_ms = floor(keystore).raised_at_ms
    assert raised_at_ms is not None
    assert abs(raised_at_ms - service.now().ToMilliseconds()) < 60_000


async def test_a_device_goes_to_the_hybrid_suite_in_one_upload_and_loses_nothing_on_the_way(
    service: Service, make: Make, keystore: Keystore
) -> None:
    await (await register(make(keystore, one_time_prekeys=30))).drain()
    phone = service.phone()
    old = phone.signed_prekey
    service.send("on its way")
    service.send("on its way, once", one_time=True)
    raised = make(keystore, suite=SUITE_HYBRID, one_time_prekeys=30)
    service.lose_answer["UploadPrekeys"] = 1
    await raised.maintain()
    assert service.calls["UploadPrekeys"] == 3  # the first device's, this one's, and again as the answer was lost
    assert (phone.min_suite, phone.signed_prekey.suite) == (SUITE_HYBRID, SUITE_HYBRID)
    assert [each.suite for each in phone.one_time.values()] == [SUITE_HYBRID] * 30
    service.send("new", one_time=True)
    # Taken by the service just before, by a sender whose clock is ahead.
    service.send("late", prekey=old, created_ms=service.now().ToMilliseconds() + FUTURE_SKEW_MS // 2)
    assert sorted(texts(await raised.drain())) == ["late", "new", "on its way", "on its way, once"]
    uploads = service.calls["UploadPrekeys"]
    await raised.maintain()
    assert service.calls["UploadPrekeys"] == uploads


async def test_an_old_prekey_that_a_bad_server_gives_to_a_sender_opens_nothing_new(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    await register(make(keystore))
    old = service.phone().signed_prekey
    device = make(keystore, suite=SUITE_HYBRID)
    await device.maintain()
    raised_at_ms = floor(keystore).raised_at_ms
    assert raised_at_ms is not None
    clock.ahead_s = service.time_ahead_s = 3600
    service.send("last", prekey=old, created_ms=raised_at_ms + FUTURE_SKEW_MS)
    assert texts(await device.drain()) == ["last"]
    service.send("too late", prekey=old, created_ms=raised_at_ms + FUTURE_SKEW_MS + 1)
    assert await device.drain() == []
    assert service.reasons() == [(AckOutcome.DELIVERED, Reason.UNSPECIFIED), (AckOutcome.UNDELIVERED, Reason.DEVICE_CANNOT_OPEN)]
    # The other process of this phone need not know of the suite: the store does.
    service.send("too late again", prekey=old)
    assert await make(keystore).drain() == []
    service.send("new")
    assert texts(await make(keystore).drain()) == ["new"]


async def test_a_rise_that_the_service_never_heard_of_refuses_nothing_and_is_repeated_with_the_same_key(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    await register(make(keystore))
    service.down["UploadPrekeys"] = 100
    with pytest.raises(Unavailable):
        await make(keystore, suite=SUITE_HYBRID, policy=RetryPolicy(attempts_max=1)).maintain()
    made = keystore.newest_signed_prekey()
    clock.ahead_s = service.time_ahead_s = 3600
    service.send("to the old key")
    device = make(keystore, suite=SUITE_HYBRID)
    assert texts(await device.drain()) == ["to the old key"]
    assert floor(keystore) == Floor(SUITE_HYBRID, None)
    service.down.clear()
    # The app was set back meanwhile: what was decided stays, as the service may have heard of it.
    await make(keystore).maintain()
    assert made is not None
    assert service.phone().signed_prekey.public_key == made.public_key
    assert service.phone().min_suite == SUITE_HYBRID
    assert floor(keystore).raised_at_ms is not None


async def test_a_device_that_was_raised_keeps_the_suite_and_says_so(
    service: Service, make: Make, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    keystore = MemoryKeystore()
    await register(make(keystore, suite=SUITE_HYBRID))
    first, before = service.phone().signed_prekey, floor(keystore)
    lower = make(keystore, suite=SUITE_X25519)
    clock.ahead_s = service.time_ahead_s = 8 * 86_400
    await lower.maintain()
    assert service.phone().signed_prekey.suite == SUITE_HYBRID
    assert service.phone().signed_prekey != first
    assert floor(keystore) == before
    assert [each.message for each in caplog.records if "raised to suite 2" in each.message]
    with pytest.raises(ValueError, match="suite must be one of"):
        make(suite=3)


async def test_a_diagnosis_says_what_works(service: Service, make: Make, clock: FakeClock) -> None:
    before = await make().diagnose()
    assert (before.registered, before.authenticated, before.device_id) == (False, False, None)
    assert set(before.reach.values()) == {"ok"}
    device = await register(make())
    service.down["GetSenderProfile"] = 1
    diagnosis = await device.diagnose()
    assert diagnosis.reach["accounts"].startswith("UNAVAILABLE")
    assert {diagnosis.reach[name] for name in ("registration", "keys", "messages")} == {"ok"}
    assert diagnosis.registered
    assert diagnosis.authenticated
    assert diagnosis.acknowledgements_waiting == 0


# --- many, and over TLS ---


async def test_five_hundred_devices_share_a_process(service: Service, make: Make) -> None:
    devices = [make(clock=SystemClock()) for _ in range(500)]
    for start in range(0, 500, 100):
        await asyncio.gather(*(register(device) for device in devices[start : start + 100]))
    assert len(service.phones) == 500
    got: list[str] = []
    for device in devices:
        device._on_message = lambda message: got.append(message.content.body)
    tasks = [asyncio.create_task(device.run_stream()) for device in devices]
    async with asyncio.timeout(2 * LIMIT_S):
        while any(phone.stream is None for phone in service.phones.values()):
            await asyncio.sleep(0.02)
        for phone in service.phones.values():
            service.send(phone.device_id.hex(), phone=phone)
        while any(phone.waiting for phone in service.phones.values()) or len(got) < 500:
            await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(got) == sorted(each.hex() for each in service.phones)


def make_tls() -> tuple[bytes, grpc.ServerCredentials]:
    """A private authority's certificate, and a server that it vouches for."""

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = (
        x509.CertificateBuilder()
        .subject_name(name("Test CA"))
        .issuer_name(name("Test CA"))
        .public_key(ca_key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        x509.CertificateBuilder()
        .subject_name(name("server"))
        .issuer_name(name("Test CA"))
        .public_key(key.public_key())
        .serial_number(2)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ca.public_bytes(Encoding.PEM), grpc.ssl_server_credentials([(pem, leaf.public_bytes(Encoding.PEM))])


async def test_over_tls_only_the_given_authority_is_trusted(service: Service) -> None:
    ca_pem, credentials = make_tls()
    other_ca_pem, _ = make_tls()

    def device(ca: bytes, address: str) -> Device:
        return Device(
            APP,
            Endpoints.single(address, ca_pem=ca),
            MemoryKeystore(),
            root_public_key=ROOT.public_key,
            platform=Platform.IOS,
            policy=RetryPolicy(attempts_max=1),
        )

    async with serving(service, credentials) as address:
        async with device(other_ca_pem, address) as stranger:
            with pytest.raises(Unavailable):
                await stranger.start_registration(PHONE)
        async with device(ca_pem, address) as trusted:
            await register(trusted)
            service.send()
            assert texts(await trusted.on_wake()) == ["hello"]


# --- the device log ---


def a_newcomer() -> bytes:
    """An entry that adds a device which nobody vouches for."""
    return LogEntry(EntryKind.ADDED, DeviceId(uuid7()), bytes(32), 1, recovered=True).encode()


@pytest.mark.parametrize("way", ["drain", "wake", "stream", "upkeep"])
async def test_the_device_log_is_looked_at_once_an_hour_whatever_wakes_the_app(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock, way: str
) -> None:
    told: list[DeviceNotice] = []
    device = await register(make(keystore, on_notice=told.append))

    async def look() -> None:
        match way:
            case "drain":
                await device.drain()
            case "wake":
                await device.on_wake()
            case "upkeep":
                await device.maintain()
            case "stream":
                checked_at = keystore.fact("devices.checked-at")
                async with device.stream() as messages:
                    await messages.caught_up()
                    if clock.now_ms() - looked_at_ms[-1] >= HOUR_MS:
                        # To its end: a look that is broken off is made again.
                        await until(lambda: keystore.fact("devices.checked-at") != checked_at and len(told) == len(service.log_after_own))

    looked_at_ms = [clock.now_ms() - HOUR_MS]
    await look()
    looked_at_ms.append(clock.now_ms())
    service.log_after_own.append(a_newcomer())
    clock.ahead_s = service.time_ahead_s = clock.ahead_s + 3500
    await look()
    assert len(told) == (1 if way == "upkeep" else 0)
    clock.ahead_s = service.time_ahead_s = clock.ahead_s + 110
    await look()
    assert [each.kind for each in told] == [NoticeKind.ADDED]
    assert service.calls["GetDeviceLog"] == (3 if way == "upkeep" else 2)


@pytest.mark.parametrize("first_look", [True, False])
async def test_another_key_under_the_phones_own_id_is_told_and_is_not_this_phone(
    service: Service, make: Make, keystore: Keystore, first_look: bool
) -> None:
    device = await register(make(keystore))
    if not first_look:
        await device.maintain()
    phone, foreign = service.phone(), bytes(32)
    service.log_after_own.append(LogEntry(EntryKind.REMOVED, phone.device_id, phone.identity_public_key, 2).encode())
    service.log_after_own.append(LogEntry(EntryKind.ADDED, phone.device_id, foreign, 3, recovered=True).encode())
    await device.maintain()
    assert [(each.kind, each.identity_public_key) for each in keystore.notices()] == [(NoticeKind.ADDED, foreign)]
    assert [each.is_this for each in await device.devices()] == [False]


async def test_when_the_log_was_looked_at_last_is_known_to_the_next_process(service: Service, make: Make, keystore: Keystore) -> None:
    await (await register(make(keystore))).on_wake()
    await make(keystore).on_wake()
    assert service.calls["GetDeviceLog"] == 1


async def test_a_log_that_does_not_come_holds_up_no_message(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make(policy=RetryPolicy(attempts_max=1)))
    await device.drain()
    service.log_after_own.append(a_newcomer())
    for fault in (service.down, service.lose_answer):
        clock.ahead_s = service.time_ahead_s = clock.ahead_s + 3700
        fault["GetDeviceLog"] = 100
        for text in ("one", "two"):
            service.send(text)
            assert texts(await device.drain()) == [text]
        fault.clear()
        assert await device.notices() == []
    # It asked once each time, and asks again after a while.
    assert service.calls["GetDeviceLog"] == 3
    clock.ahead_s = service.time_ahead_s = clock.ahead_s + 301
    await device.drain()
    assert [each.kind for each in await device.notices()] == [NoticeKind.ADDED]


async def test_a_log_that_hangs_leaves_a_wake_up_its_deadline(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make(policy=RetryPolicy(attempts_max=1)))
    service.hang.add("GetDeviceLog")
    service.send()
    started = time.monotonic()
    assert texts(await device.on_wake(deadline=2.0)) == ["hello"]
    assert time.monotonic() - started < TIMEOUT_S, "it did not wait as long as one call may take"


async def test_a_notice_is_kept_whatever_the_app_does_with_it(
    service: Service, make: Make, keystore: Keystore, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(notice: DeviceNotice) -> None:
        raise RuntimeError("secret")

    device = await register(make(keystore, on_notice=fail))
    service.log_after_own.append(a_newcomer())
    await device.drain()
    [notice] = await make(keystore).notices()
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text
    await device.dismiss_notices([notice])
    assert await make(keystore).notices() == []


async def test_an_app_may_ask_for_the_devices_when_it_is_told_of_one(service: Service, make: Make) -> None:
    seen: list[int] = []

    async def ask(notice: DeviceNotice) -> None:
        seen.append(len(await device.devices()))

    device = await register(make(on_notice=ask))
    service.log_after_own.append(a_newcomer())
    async with asyncio.timeout(LIMIT_S):
        await device.drain()
    assert seen == [2]


async def test_a_log_without_end_is_broken_before_it_costs_anything(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    service.log_after_own = [a_newcomer()] * 40_000
    service.send()
    async with asyncio.timeout(LIMIT_S):
        assert texts(await device.drain()) == ["hello"]
    assert [each.kind for each in await device.notices()] == [NoticeKind.LOG_BROKEN]
    assert keystore.device_log().entries == ()


async def test_a_time_that_no_store_can_hold_does_not_keep_the_person_in_the_dark(service: Service, make: Make, keystore: Keystore) -> None:
    device = await register(make(keystore))
    added = a_newcomer()
    service.log_after_own.append(added[:-8] + b"\xff" * 8)
    await device.drain()
    assert [each.kind for each in await device.notices()] == [NoticeKind.LOG_BROKEN]


async def test_a_log_that_is_withheld_while_messages_come_is_told_after_days(
    service: Service, make: Make, keystore: Keystore, clock: FakeClock
) -> None:
    device = await register(make(keystore, policy=RetryPolicy(attempts_max=1)))
    await device.drain()

    async def told_after(hours: float, device: Device = device) -> list[NoticeKind]:
        clock.ahead_s = service.time_ahead_s = clock.ahead_s + hours * 3600
        await device.drain()
        return [each.kind for each in await device.notices()]

    service.down["GetDeviceLog"] = 1
    assert await told_after(2) == []
    assert await told_after(100) == []  # it came in between
    service.down["GetDeviceLog"] = 1000
    assert await told_after(2) == []
    assert await told_after(71) == []
    assert await told_after(2, make(keystore, policy=RetryPolicy(attempts_max=1))) == [NoticeKind.LOG_WITHHELD]
    await device.dismiss_notices(await device.notices())
    assert await told_after(71) == []
    assert await told_after(2) == [NoticeKind.LOG_WITHHELD]


async def test_a_server_that_stops_its_clock_is_looked_at_all_the_same(service: Service, make: Make, clock: FakeClock) -> None:
    device = await register(make())
    await device.drain()
    clock.ahead_s, service.time_ahead_s = 3700, 0
    await device.drain()
    assert service.calls["GetDeviceLog"] == 2
