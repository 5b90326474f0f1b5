"""sealpush.Sender against a small publishing service over real gRPC that stores by request id and opens what was sealed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from sealpush.envelope import Envelope, Stanza, open_envelope
from sealpush.errors import (
    EnvelopeRefused,
    InvalidRequest,
    KeyRefused,
    NotFound,
    PermissionDenied,
    ReceiptRefused,
    Unauthenticated,
    Unavailable,
)
from sealpush.ids import DeviceId, MessageId, uuid7, uuid_text
from sealpush.keys import ContentSigningKey, IdentityKey, PrekeyKind, PrekeyPrivate, SignedPrekey, generate_prekey
from sealpush.model import ContentClass, Platform, Priority, Reason, Recipient, State, StopPoint
from sealpush.proofs import AckOutcome
from sealpush.publication import Accepted, NotRegistered, Publication, PublishOutcome, Refused, SealedPublication, Unanswered
from sealpush.receipts import SignedAcknowledgement
from sealpush.retry import RetryPolicy
from sealpush.sender import Sender
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.transport import Channels, Endpoints
from sealpush.v1 import accounts_pb2, common_pb2, keys_pb2, messages_pb2, publish_pb2
from sealpush.v1.accounts_pb2_grpc import AccountsServicer, add_AccountsServicer_to_server
from sealpush.v1.content_pb2 import Content
from sealpush.v1.keys_pb2_grpc import KeysServicer, add_KeysServicer_to_server
from sealpush.v1.publish_pb2_grpc import PublishingServicer, add_PublishingServicer_to_server
from sealpush.wire import wire_prekey
from tests.contract.harness import Peer

PHONE = "+380501234567"
NOBODY = "+380500000000"
SENDER_ID = b"S" * 16
SIGNING_KEY = ContentSigningKey.from_seed(b"\x02" * 32)

Context = Any


def content(text: str = "hello") -> Content:
    return Content(content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, body=text)


@dataclass
class FakeClock:
    """Pauses that take no time."""

    ahead_s: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + int(self.ahead_s * 1000)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.ahead_s += seconds
        await asyncio.sleep(0.001)


async def fail(context: Context, code: grpc.StatusCode, reason: str, *, field: str = "", retry_after_s: float | None = None) -> None:
    details = []
    info = AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="sealpush"))
    details.append(info)
    if field:
        fields = AnyMessage()
        fields.Pack(error_details_pb2.BadRequest(field_violations=[error_details_pb2.BadRequest.FieldViolation(field=field)]))
        details.append(fields)
    if retry_after_s is not None:
        pause = error_details_pb2.RetryInfo()
        pause.retry_delay.FromTimedelta(timedelta(seconds=retry_after_s))
        packed = AnyMessage()
        packed.Pack(pause)
        details.append(packed)
    status = status_pb2.Status(code=code.value[0], message=reason, details=details)
    await context.abort(code, reason, (("grpc-status-details-bin", status.SerializeToString()),))


class Phone:
    """A device to seal to."""

    def __init__(self, number: int, suite: int = SUITE_X25519) -> None:
        self.device_id = DeviceId(bytes((number,)) * 16)
        self.identity = IdentityKey.from_seed(bytes((number,)) * 32)
        self.private: PrekeyPrivate
        self.public: SignedPrekey
        self.privates: dict[tuple[int, int, PrekeyKind], PrekeyPrivate] = {}
        self.take_suite(suite)
        self.one_time: list[SignedPrekey] = []
        self.handed_out: dict[str, SignedPrekey] = {}

    def take_suite(self, suite: int) -> None:
        """Makes a signed prekey of this suite, the lowest it accepts."""
        self.min_suite = suite
        self.private, self.public = generate_prekey(
            self.identity,
            self.device_id,
            prekey_id=len(self.privates) + 1,
            kind=PrekeyKind.SIGNED,
            now_ms=time.time_ns() // 1_000_000,
            suite=suite,
            min_suite=suite,
        )
        self.privates[suite, self.private.prekey_id, PrekeyKind.SIGNED] = self.private

    def stock(self, count: int) -> None:
        """Makes one-time prekeys."""
        for prekey_id in range(len(self.privates) + 1, len(self.privates) + 1 + count):
            private, public = generate_prekey(
                self.identity, self.device_id, prekey_id=prekey_id, kind=PrekeyKind.ONE_TIME, now_ms=time.time_ns() // 1_000_000
            )
            self.privates[1, prekey_id, PrekeyKind.ONE_TIME] = private
            self.one_time.append(public)

    def to_wire(self, request_id: str) -> keys_pb2.DeviceKeys:
        if request_id not in self.handed_out and self.one_time:
            self.handed_out[request_id] = self.one_time.pop(0)
        one_time = self.handed_out.get(request_id)
        return keys_pb2.DeviceKeys(
            device_id=self.device_id,
            identity_public_key=self.identity.public_key,
            signed_prekey=wire_prekey(self.public),
            one_time_prekey=None if one_time is None else wire_prekey(one_time),
            min_suite=self.min_suite,
        )

    def accepts(self, stanza: Stanza) -> bool:
        given = {each.prekey_id for each in self.handed_out.values()}
        return stanza.prekey_id in given if stanza.kind == PrekeyKind.ONE_TIME else stanza.prekey_id == self.public.prekey_id

    def open(self, envelope: bytes) -> str:
        plaintext = open_envelope(
            Envelope.parse(envelope).for_device(self.device_id),
            device_id=self.device_id,
            private_prekey_lookup=lambda *name: self.privates.get(name),
            sender_public_key=SIGNING_KEY.public_key,
        )
        return Content.FromString(plaintext).body


def stanzas(request: publish_pb2.PublishRequest) -> dict[bytes, Stanza]:
    """By device."""
    return {each.device_id: each for each in Envelope.parse(request.sealed.envelope).stanzas}


class Service(AccountsServicer, KeysServicer, PublishingServicer):
    """The services a sender talks to, in memory, with faults to order."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.tokens: set[str] = set()
        self.token_lifetime_s = 900.0
        self.phones = [Phone(1), Phone(2)]
        self.recipient_ref = b"r" * 32
        self.joining: list[Phone] = []  # one more device after each look at the keys
        self.stored: dict[str, tuple[bytes, publish_pb2.PublishRequest]] = {}
        self.received: list[bytes] = []
        self.frames: list[int] = []
        self.down: Counter[str] = Counter()
        self.lose_answer: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.item_busy: Counter[str] = Counter()
        self.forbidden: Counter[str] = Counter()
        self.expired: set[str] = set()
        # What is ordered as soon as an answer is lost.
        self.busy_after_loss: Counter[str] = Counter()
        self.forbidden_after_loss: Counter[str] = Counter()
        self.item_busy_after_loss: Counter[str] = Counter()
        self.hang: set[str] = set()
        self.hanging = asyncio.Event()
        self.cut_stream_after = 0
        self.states: dict[bytes, asyncio.Queue[State | None]] = {}
        self.last_state: dict[bytes, State] = {}
        self.request_ids: set[str] = set()
        self.ack_outcome = messages_pb2.ACK_OUTCOME_DELIVERED

    def version(self) -> bytes:
        return bytes((len(self.phones),)) * 32

    async def before(self, name: str, context: Context, *, free: bool = False) -> None:
        self.calls[name] += 1
        metadata = dict(context.invocation_metadata())
        self.request_ids.add(metadata["x-request-id"])
        if name in self.hang:
            self.hanging.set()
            await asyncio.sleep(60)
        if self.down[name]:
            self.down[name] -= 1
            await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
        if self.busy[name]:
            self.busy[name] -= 1
            await fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=3)
        if self.forbidden[name]:
            self.forbidden[name] -= 1
            await fail(context, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        if not free and metadata.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")

    async def after(self, name: str, context: Context) -> None:
        if self.lose_answer[name]:
            self.lose_answer[name] -= 1
            self.busy.update(self.busy_after_loss)
            self.forbidden.update(self.forbidden_after_loss)
            self.item_busy.update(self.item_busy_after_loss)
            await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")

    async def SignIn(self, request: accounts_pb2.SignInRequest, context: Context) -> Any:
        await self.before("SignIn", context, free=True)
        if (request.login, request.password) != ("bank", "secret"):
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        token = f"token-{self.calls['SignIn']}"
        self.tokens.add(token)
        expires = Timestamp()
        expires.FromMilliseconds(time.time_ns() // 1_000_000 + int(self.token_lifetime_s * 1000))
        return accounts_pb2.SignInResponse(access_token=token, expires_at=expires, sender_id=SENDER_ID)

    async def GetSenderProfile(self, request: accounts_pb2.GetSenderProfileRequest, context: Context) -> Any:
        raise NotImplementedError

    async def GetRevocations(self, request: accounts_pb2.GetRevocationsRequest, context: Context) -> Any:
        raise NotImplementedError

    async def UploadPrekeys(self, request: keys_pb2.UploadPrekeysRequest, context: Context) -> Any:
        raise NotImplementedError

    async def GetPrekeyState(self, request: keys_pb2.GetPrekeyStateRequest, context: Context) -> Any:
        raise NotImplementedError

    async def GetRecipientKeys(self, request: keys_pb2.GetRecipientKeysRequest, context: Context) -> Any:
        await self.before("GetRecipientKeys", context)
        (query,) = request.queries
        if query.recipient.phone == NOBODY:
            result = keys_pb2.RecipientKeysResult(not_registered=common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND)
        elif query.recipient.phone == "rubbish":
            result = keys_pb2.RecipientKeysResult(refused="not a phone number")
        else:
            keys = keys_pb2.RecipientKeys(
                recipient_ref=self.recipient_ref,
                device_list_version=self.version(),
                devices=[each.to_wire(query.request_id) for each in self.phones],
            )
            result = keys_pb2.RecipientKeysResult(keys=keys)
        if self.joining:
            self.phones.append(self.joining.pop())
        return keys_pb2.GetRecipientKeysResponse(results=[result])

    async def GetDeviceLog(self, request: keys_pb2.GetDeviceLogRequest, context: Context) -> Any:
        raise NotImplementedError

    async def VouchDevice(self, request: keys_pb2.VouchDeviceRequest, context: Context) -> Any:
        raise NotImplementedError

    def take(self, request: publish_pb2.PublishRequest) -> publish_pb2.PublishResult:
        data = request.SerializeToString(deterministic=True)
        self.received.append(data)
        result = publish_pb2.PublishResult(request_id=request.request_id)
        known = self.stored.get(request.request_id)
        if request.request_id in self.expired:
            result.refusal.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            result.refusal.reason = "EXPIRED"
        elif self.item_busy[request.request_id]:
            self.item_busy[request.request_id] -= 1
            result.refusal.code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            result.refusal.reason = "LIMIT_EXCEEDED"
            result.refusal.retry_after.FromTimedelta(timedelta(seconds=1))
        elif request.recipient.phone == NOBODY and known is None:
            result.not_registered.reason_code = common_pb2.REASON_CODE_CONSUMER_PHONE_NOT_FOUND
        elif request.recipient.phone == "rubbish":
            result.refusal.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            result.refusal.reason = "INVALID_REQUEST"
            result.refusal.field = "recipient.phone"
        elif known is not None and known[1].SerializeToString(deterministic=True) != data:
            result.refusal.code = grpc.StatusCode.ALREADY_EXISTS.value[0]
            result.refusal.reason = "ALREADY_EXISTS"
        elif request.HasField("sealed") and not self.fits(request):
            result.outdated_devices.device_list_version = self.version()
        else:
            if known is None:
                known = self.stored[request.request_id] = (uuid7(), request)
            else:
                result.accepted.repeated_request = True
            result.accepted.message_id = known[0]
            result.accepted.devices = len(self.phones)
        return result

    def fits(self, request: publish_pb2.PublishRequest) -> bool:
        sealed = stanzas(request)
        return request.sealed.device_list_version == self.version() and all(each.accepts(sealed[each.device_id]) for each in self.phones)

    async def Publish(self, request: publish_pb2.PublishRequest, context: Context) -> Any:
        await self.before("Publish", context)
        result = self.take(request)
        if result.HasField("refusal"):
            code = next(each for each in grpc.StatusCode if each.value[0] == result.refusal.code)
            await fail(context, code, result.refusal.reason, field=result.refusal.field)
        await self.after("Publish", context)
        return publish_pb2.PublishResponse(result=result)

    async def PublishBatch(self, request: publish_pb2.PublishBatchRequest, context: Context) -> Any:
        await self.before("PublishBatch", context)
        self.frames.append(len(request.requests))
        assert request.ByteSize() <= 2 * 1024 * 1024
        results = [self.take(each) for each in request.requests]
        await self.after("PublishBatch", context)
        return publish_pb2.PublishBatchResponse(results=results)

    async def PublishStream(self, requests: AsyncIterator[publish_pb2.PublishStreamRequest], context: Context) -> AsyncIterator[Any]:
        await self.before("PublishStream", context)
        async for request in requests:
            self.frames.append(len(request.requests))
            results = [self.take(each) for each in request.requests]
            if self.cut_stream_after and len(self.frames) % self.cut_stream_after == 0:
                self.cut_stream_after += 7
                self.item_busy.update(self.item_busy_after_loss)
                await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")  # stored, and the answer is lost
            yield publish_pb2.PublishStreamResponse(frame=request.frame, results=results)

    def status(self, message_id: bytes, *, assumed: bool = False) -> publish_pb2.MessageStatus:
        state = State.DELIVERED if assumed else self.last_state.get(message_id, State.QUEUED)
        status = publish_pb2.MessageStatus(
            message_id=message_id, state=common_pb2.State.ValueType(state), assumed=assumed, order_id=message_id, tag="tag"
        )
        delivery = status.deliveries.add(device_id=self.phones[0].device_id, state=common_pb2.State.ValueType(state))
        delivery.read_at.FromMilliseconds(1_700_000_000_000)
        status.attempts.add(channel=common_pb2.CHANNEL_PUSH, state=common_pb2.State.ValueType(state))
        return status

    async def GetStatus(self, request: publish_pb2.GetStatusRequest, context: Context) -> Any:
        await self.before("GetStatus", context)
        if request.message_id not in {each[0] for each in self.stored.values()}:
            await fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assumed = request.HasField("wait") and request.wait.ToTimedelta() == timedelta(0)
        return publish_pb2.GetStatusResponse(status=self.status(request.message_id, assumed=assumed))

    async def GetStatuses(self, request: publish_pb2.GetStatusesRequest, context: Context) -> Any:
        await self.before("GetStatuses", context)
        assert len(request.message_ids) <= 512
        known = {each[0] for each in self.stored.values()}
        return publish_pb2.GetStatusesResponse(statuses=[self.status(each) for each in request.message_ids if each in known])

    async def WatchStatus(self, request: publish_pb2.WatchStatusRequest, context: Context) -> AsyncIterator[Any]:
        await self.before("WatchStatus", context)
        known = [each for each in request.message_ids if each in self.states]
        yield publish_pb2.WatchStatusResponse(statuses=[self.status(each) for each in known])
        for message_id in known:
            while not self.last_state.get(message_id, State.QUEUED).terminal:
                state = await self.states[message_id].get()
                if state is None:
                    await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
                self.last_state[message_id] = cast(State, state)
                yield publish_pb2.WatchStatusResponse(statuses=[self.status(message_id)])

    async def GetReceipt(self, request: publish_pb2.GetReceiptRequest, context: Context) -> Any:
        await self.before("GetReceipt", context)
        delivery = publish_pb2.ReceiptDelivery(
            device_id=self.phones[0].device_id,
            state=common_pb2.STATE_DELIVERED,
            acknowledgements=[publish_pb2.SignedAcknowledgement(outcome=self.ack_outcome, at_ms=7, signature=bytes(64))],
        )
        receipt = publish_pb2.Receipt(
            message_id=request.message_id, sender_id=SENDER_ID, content_id=b"C" * 16, evidence=bytes(254), deliveries=[delivery]
        )
        return publish_pb2.GetReceiptResponse(receipt=receipt)

    async def Cancel(self, request: publish_pb2.CancelRequest, context: Context) -> Any:
        await self.before("Cancel", context)
        await self.after("Cancel", context)
        stopped = common_pb2.StoppedDelivery(
            message_id=request.message_id,
            device_id=self.phones[0].device_id,
            stop_point=common_pb2.STOP_POINT_BEFORE_PUSH,
            state=common_pb2.STATE_CANCELLED,
        )
        return publish_pb2.CancelResponse(state=common_pb2.STATE_CANCELLED, deliveries=[stopped])


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def channels(service: Service) -> AsyncIterator[Channels]:
    add = add_AccountsServicer_to_server, add_KeysServicer_to_server, add_PublishingServicer_to_server
    async with Peer([(each, service) for each in add]) as peer, Channels(Endpoints.single(peer.address, insecure=True)) as made:
        yield made


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def sender(channels: Channels, clock: FakeClock) -> Sender:
    return Sender(channels, "bank", "secret", signing_key=SIGNING_KEY, clock=clock, random=lambda: 0.5)


# --- publishing ---


async def test_a_message_is_published_and_says_everything_it_was_given(service: Service, sender: Sender) -> None:
    outcome = await sender.publish(
        PHONE,
        Content(body="hello", replace_key="balance"),
        request_id="r-1",
        content_class=ContentClass.ADVERTISING,
        priority=Priority.HIGH,
        lifetime=timedelta(hours=1),
        tag="t",
        primary_only=True,
        platforms=[Platform.IOS],
        subscriptions=["news"],
    )
    assert isinstance(outcome, Accepted)
    message_id, request = service.stored["r-1"]
    assert (outcome.message_id, outcome.devices, outcome.repeated_request) == (message_id, 2, False)
    assert request.recipient.phone == PHONE
    assert request.plain.version == 1
    assert request.content_class == request.plain.content_class == common_pb2.CONTENT_CLASS_ADVERTISING
    assert (request.replace_key, request.tag, request.primary_only) == ("balance", "t", True)
    assert request.lifetime.seconds == 3600
    assert list(request.platforms) == [common_pb2.PLATFORM_IOS]


async def test_a_request_id_is_made_where_none_is_given(service: Service, sender: Sender) -> None:
    one, other = await sender.publish(PHONE, content()), await sender.publish(Recipient(rnokpp="12345678"), content())
    assert one.request_id != other.request_id
    assert set(service.stored) == {one.request_id, other.request_id}


async def test_nobody_registered_and_refusals_are_answers(sender: Sender) -> None:
    nobody = await sender.publish(NOBODY, content())
    assert isinstance(nobody, NotRegistered)
    assert nobody.reason is Reason.CONSUMER_PHONE_NOT_FOUND
    refused = await sender.publish("rubbish", content())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field, refused.retry_after) == ("INVALID_ARGUMENT", "recipient.phone", None)


async def test_the_same_bytes_go_again_after_an_ambiguous_failure(service: Service, sender: Sender) -> None:
    service.lose_answer["Publish"] = 2
    outcome = await sender.publish(PHONE, content())
    assert isinstance(outcome, Accepted)
    assert outcome.repeated_request
    assert len(service.received) == 3
    assert len(set(service.received)) == 1


async def test_without_an_answer_the_outcome_is_unknown_and_in_time(service: Service, channels: Channels) -> None:
    sender = Sender(channels, "bank", "secret", timeout_s=1)
    await sender.sign_in()
    service.hang = {"Publish"}
    started = time.monotonic()
    outcome = await sender.publish(PHONE, content(), request_id="r")
    assert time.monotonic() - started < 4, "each of its attempts may not take the whole time"
    assert isinstance(outcome, Unanswered)
    assert outcome.request_id == "r"


async def test_a_pause_the_service_asks_for_is_kept(service: Service, sender: Sender, clock: FakeClock) -> None:
    service.busy["Publish"] = 1
    assert isinstance(await sender.publish(PHONE, content()), Accepted)
    assert clock.pauses == [3 + 0.5 * 0.2]
    service.busy["Publish"] = 100  # until the time is over
    outcome = await sender.publish(PHONE, content())
    assert isinstance(outcome, Refused)
    assert outcome.retry_after == timedelta(seconds=3)


# --- in doubt: an answer was lost after the message was stored, and what follows is a refusal ---


async def test_a_refusal_after_a_lost_answer_does_not_say_that_nothing_is_stored(service: Service, sender: Sender) -> None:
    service.lose_answer["Publish"] = 1
    service.busy_after_loss["Publish"] = 100
    outcome = await sender.publish(PHONE, content(), request_id="r")
    assert "r" in service.stored
    assert isinstance(outcome, Unanswered)


async def test_the_doubt_lasts_over_the_callers_own_repetition_and_ends_with_an_answer_about_the_request(
    service: Service, sender: Sender
) -> None:
    service.lose_answer["Publish"] = 1
    service.busy_after_loss["Publish"] = 100
    assert isinstance(await sender.publish(PHONE, content(), request_id="r"), Unanswered)
    assert isinstance(await sender.publish(PHONE, content(), request_id="r"), Unanswered)
    assert isinstance(await sender.publish(PHONE, content(), request_id="other"), Refused)
    service.busy.clear()
    outcome = await sender.publish(PHONE, content(), request_id="r")
    assert isinstance(outcome, Accepted)
    assert outcome.repeated_request
    service.busy["Publish"] = 100
    assert isinstance(await sender.publish(PHONE, content("another"), request_id="r"), Refused)


async def test_nobody_registered_after_an_attempt_that_was_not_taken_is_an_answer(service: Service, sender: Sender) -> None:
    service.down["Publish"] = 1
    assert isinstance(await sender.publish(NOBODY, content()), NotRegistered)
    service.down["Publish"] = 1
    assert isinstance(await sender.publish("rubbish", content()), Refused)


async def test_a_right_that_was_taken_away_after_a_lost_answer_leaves_the_doubt(service: Service, sender: Sender) -> None:
    service.lose_answer["Publish"] = 1
    service.forbidden_after_loss["Publish"] = 1
    outcome = await sender.publish(PHONE, content(), request_id="r")
    assert isinstance(outcome, Unanswered)
    assert outcome.reason == "PERMISSION_DENIED"
    service.forbidden["Publish"] = 1
    with pytest.raises(PermissionDenied):
        await sender.publish(PHONE, content(), request_id="new")


async def test_a_publish_that_its_caller_cancelled_is_in_doubt(service: Service, sender: Sender) -> None:
    await sender.sign_in()
    service.hang = {"Publish"}
    publishing = asyncio.create_task(sender.publish(PHONE, content(), request_id="r"))
    await service.hanging.wait()
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    service.hang.clear()
    service.busy["Publish"] = 100
    assert isinstance(await sender.publish(PHONE, content(), request_id="r"), Unanswered)


async def test_a_refused_item_of_a_batch_whose_answer_was_lost_is_in_doubt(service: Service, sender: Sender) -> None:
    service.lose_answer["PublishBatch"] = 1
    service.item_busy_after_loss["stored"] = 100
    stored, nobody = await sender.publish_many(
        [Publication.of(PHONE, content(), request_id="stored"), Publication.of(NOBODY, content(), request_id="nobody")]
    )
    assert isinstance(stored, Unanswered)
    assert isinstance(nobody, NotRegistered)


async def test_a_batch_refused_as_a_whole_after_a_lost_answer_is_in_doubt(service: Service, sender: Sender) -> None:
    service.lose_answer["PublishBatch"] = 1
    service.busy_after_loss["PublishBatch"] = 100
    (outcome,) = await sender.publish_many([Publication.of(PHONE, content(), request_id="r")])
    assert isinstance(outcome, Unanswered)


async def test_a_refused_item_of_a_stream_that_broke_is_in_doubt(service: Service, sender: Sender) -> None:
    service.cut_stream_after = 1
    service.item_busy_after_loss["r"] = 100
    (outcome,) = await publish_all(sender, [Publication.of(PHONE, content(), request_id="r")])
    assert "r" in service.stored
    assert isinstance(outcome, Unanswered)


async def test_sealed_and_refused_after_a_lost_answer_is_in_doubt_also_when_the_recipient_is_gone(service: Service, sender: Sender) -> None:
    service.lose_answer["Publish"] = 1
    service.busy_after_loss["Publish"] = 100
    assert isinstance(await sender.publish_sealed(PHONE, content(), request_id="r"), Unanswered)
    sender._sealed.clear()  # as after a thousand others: what is asked for next are the keys
    service.busy.clear()
    assert isinstance(await sender.publish_sealed(NOBODY, content(), request_id="r"), Unanswered)
    # Sealed anew it is another request, and the one that is stored may be the first.
    assert isinstance(await sender.publish_sealed(PHONE, content(), request_id="r"), Unanswered)
    assert not isinstance(await sender.prepare_sealed(NOBODY, content(), request_id="r"), NotRegistered)


async def test_a_cancel_that_may_have_been_done_does_not_fail_as_if_nothing_was(service: Service, sender: Sender) -> None:
    service.lose_answer["Cancel"] = 1
    service.busy_after_loss["Cancel"] = 100
    with pytest.raises(Unavailable) as caught:
        await sender.cancel(MessageId(b"1" * 16))
    assert caught.value.retry_after_s == 3


async def test_a_request_too_large_for_the_service_is_refused_at_once_and_says_so(service: Service, sender: Sender) -> None:
    outcome = await sender.publish(PHONE, content("x" * 5 * 1024 * 1024))
    assert isinstance(outcome, Refused)
    assert (outcome.code, outcome.reason, outcome.retry_after) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", None)


async def test_what_is_sealed_and_refused_for_good_is_sealed_anew_when_published_again(service: Service, sender: Sender) -> None:
    assert isinstance(await sender.prepare_sealed(PHONE, content()), SealedPublication)
    service.expired.add("r")
    refused = await sender.publish_sealed(PHONE, content(), request_id="r", lifetime=timedelta(seconds=1))
    assert isinstance(refused, Refused)
    assert refused.reason == "EXPIRED"
    service.expired.clear()
    assert isinstance(await sender.publish_sealed(PHONE, content(), request_id="r", lifetime=timedelta(seconds=1)), Accepted)
    assert len(set(service.received)) == 2


# --- signing in ---


async def test_a_token_is_renewed_before_it_ends_and_when_it_is_refused(service: Service, sender: Sender, clock: FakeClock) -> None:
    for _ in range(3):
        await sender.publish(PHONE, content())
    assert service.calls["SignIn"] == 1
    clock.ahead_s += 850
    await asyncio.gather(*(sender.publish(PHONE, content()) for _ in range(10)))
    assert service.calls["SignIn"] == 2
    service.tokens.clear()
    assert isinstance(await sender.publish(PHONE, content()), Accepted)
    assert service.calls["SignIn"] == 3


async def test_a_wrong_password_is_raised(channels: Channels) -> None:
    sender = Sender(channels, "bank", "wrong")
    with pytest.raises(Unauthenticated):
        await sender.publish(PHONE, content())
    with pytest.raises(Unauthenticated):
        await sender.sign_in()


async def test_a_password_is_never_in_a_repr(sender: Sender) -> None:
    assert "secret" not in repr(sender)
    publication = Publication.of(PHONE, content("private"))
    assert "private" not in repr(publication)
    assert PHONE not in repr(publication)


# --- sealing here ---


async def test_sealed_content_opens_on_each_device_and_nowhere_else(service: Service, sender: Sender) -> None:
    outcome = await sender.publish_sealed(PHONE, content("таємниця"), lifetime=timedelta(hours=1))
    assert isinstance(outcome, Accepted)
    (_, request) = service.stored[outcome.request_id]
    assert [phone.open(request.sealed.envelope) for phone in service.phones] == ["таємниця"] * 2
    assert "таємниця".encode() not in request.SerializeToString()
    header = Envelope.parse(request.sealed.envelope).header
    assert header.expires_at_ms - header.created_at_ms == request.lifetime.seconds * 1000 == 3_600_000
    assert header.sender_id == SENDER_ID
    assert not header.server_sealed


async def test_a_one_time_prekey_is_used_where_there_is_one_and_the_signed_prekey_where_there_is_none(
    service: Service, sender: Sender
) -> None:
    stocked, bare = service.phones
    stocked.stock(2)
    kinds = []
    for n in range(3):
        outcome = await sender.publish_sealed(PHONE, content(f"{n}"), request_id=f"r{n}")
        assert isinstance(outcome, Accepted)
        request = service.stored[f"r{n}"][1]
        sealed = stanzas(request)
        kinds.append((sealed[stocked.device_id].kind, sealed[stocked.device_id].prekey_id, sealed[bare.device_id].kind))
        assert [phone.open(request.sealed.envelope) for phone in service.phones] == [f"{n}"] * 2
    signed, one_time = PrekeyKind.SIGNED, PrekeyKind.ONE_TIME
    assert kinds == [(one_time, 2, signed), (one_time, 3, signed), (signed, 1, signed)]
    # The private half is gone with the first message: nothing opens the second time.
    del stocked.privates[1, 2, one_time]
    with pytest.raises(EnvelopeRefused):
        stocked.open(service.stored["r0"][1].sealed.envelope)


async def test_a_lost_answer_and_sealing_again_burn_no_second_one_time_prekey(service: Service, sender: Sender) -> None:
    (phone, _) = service.phones
    phone.stock(10)
    service.lose_answer["Publish"] = 2
    assert isinstance(await sender.publish_sealed(PHONE, content(), request_id="lost"), Accepted)
    assert len(service.received) == 3
    assert len(set(service.received)) == 1
    service.joining = [Phone(3), Phone(4)]
    assert isinstance(await sender.publish_sealed(PHONE, content(), request_id="again"), Accepted)
    assert set(phone.handed_out) == {"lost", "again"}
    assert len(phone.one_time) == 8


async def test_a_one_time_prekey_that_went_stale_is_replaced_by_sealing_again(service: Service, sender: Sender) -> None:
    (phone, _) = service.phones
    phone.stock(2)
    prepared = await sender.prepare_sealed(PHONE, content(), request_id="r")
    assert isinstance(prepared, SealedPublication)
    phone.handed_out.clear()  # the device was removed and came back
    refused = await sender.publish_prepared(prepared)
    assert isinstance(refused, Refused)
    assert refused.reason == "OUTDATED_DEVICES"
    outcome = await sender.publish_sealed(PHONE, content(), request_id="r")
    assert isinstance(outcome, Accepted)
    assert stanzas(service.stored["r"][1])[phone.device_id].prekey_id == 3


async def test_a_one_time_prekey_of_another_device_is_never_sealed_to(service: Service, sender: Sender) -> None:
    one, other = service.phones
    other.stock(1)
    one.handed_out["r"] = other.one_time[0]
    with pytest.raises(KeyRefused):
        await sender.publish_sealed(PHONE, content(), request_id="r")
    assert service.received == []


async def test_outdated_devices_are_sealed_to_again_with_the_same_request_id(service: Service, sender: Sender) -> None:
    service.joining = [Phone(3), Phone(4)]
    outcome = await sender.publish_sealed(PHONE, content("all"), request_id="r")
    assert isinstance(outcome, Accepted)
    assert service.calls["GetRecipientKeys"] == 3
    assert [phone.open(service.stored["r"][1].sealed.envelope) for phone in service.phones] == ["all"] * 4


async def test_sealing_again_is_bounded(service: Service, sender: Sender) -> None:
    service.joining = [Phone(number) for number in range(3, 30)]
    outcome = await sender.publish_sealed(PHONE, content())
    assert isinstance(outcome, Refused)
    assert outcome.reason == "OUTDATED_DEVICES"
    assert service.calls["Publish"] == 4
    assert service.stored == {}


async def test_sealed_bytes_are_the_same_on_every_retry_also_the_callers(service: Service, sender: Sender) -> None:
    sender._policy = sender._calls.policy = RetryPolicy(attempts_max=2)
    service.lose_answer["Publish"] = 3
    first = await sender.publish_sealed(PHONE, content(), request_id="r")
    assert isinstance(first, Unanswered)
    second = await sender.publish_sealed(PHONE, content(), request_id="r")
    assert isinstance(second, Accepted)
    assert second.repeated_request
    assert len(service.received) == 4
    assert len(set(service.received)) == 1
    assert service.calls["GetRecipientKeys"] == 1
    other = await sender.publish_sealed(PHONE, content("something else"), request_id="r")
    assert isinstance(other, Refused)
    assert other.code == "ALREADY_EXISTS"


async def test_a_prepared_message_survives_the_senders_process(service: Service, sender: Sender, channels: Channels) -> None:
    prepared = await sender.prepare_sealed(PHONE, content())
    assert isinstance(prepared, SealedPublication)
    service.lose_answer["Publish"] = 100
    assert isinstance(await sender.publish_prepared(prepared), Unanswered)
    service.lose_answer.clear()
    outcome = await Sender(channels, "bank", "secret").publish_prepared(SealedPublication(prepared.request_id, prepared.data))
    assert isinstance(outcome, Accepted)
    assert outcome.repeated_request
    service.phones.append(Phone(3))
    stale = SealedPublication(prepared.request_id, prepared.data.replace(prepared.request_id.encode(), b"x" * 36))
    assert isinstance(await sender.publish_prepared(stale), Refused)


async def test_a_key_that_is_not_the_devices_own_is_never_sealed_to(service: Service, sender: Sender) -> None:
    service.phones[1].identity = IdentityKey.from_seed(b"\x77" * 32)
    with pytest.raises(KeyRefused):
        await sender.publish_sealed(PHONE, content())
    assert service.received == []


async def test_devices_of_both_suites_get_one_envelope(service: Service, sender: Sender) -> None:
    service.phones[1].take_suite(SUITE_HYBRID)
    assert isinstance(await sender.publish_sealed(PHONE, content("both"), request_id="r"), Accepted)
    request = service.stored["r"][1]
    assert [stanzas(request)[phone.device_id].suite for phone in service.phones] == [1, 2]
    assert [phone.open(request.sealed.envelope) for phone in service.phones] == ["both"] * 2


async def test_an_answer_that_names_a_device_twice_or_no_recipient_is_refused_as_bad_keys(service: Service, sender: Sender) -> None:
    service.phones.append(service.phones[0])
    with pytest.raises(KeyRefused, match="malformed"):
        await sender.publish_sealed(PHONE, content())
    service.phones.pop()
    service.recipient_ref = b"r" * 31
    with pytest.raises(KeyRefused, match="malformed"):
        await sender.publish_sealed(PHONE, content())
    assert service.received == []


async def test_an_old_key_that_comes_back_after_a_stronger_one_is_never_sealed_to(service: Service, sender: Sender) -> None:
    phone = service.phones[1]
    old = phone.public
    phone.take_suite(SUITE_HYBRID)
    assert isinstance(await sender.publish_sealed(PHONE, content()), Accepted)
    # A bad server kept the old key, whose signature is as true as ever.
    phone.min_suite, phone.public = SUITE_X25519, old
    received = len(service.received)
    with pytest.raises(KeyRefused, match="old key"):
        await sender.publish_sealed(PHONE, content())
    assert len(service.received) == received
    phone.take_suite(SUITE_HYBRID)
    assert isinstance(await sender.publish_sealed(PHONE, content()), Accepted)


async def test_what_is_remembered_of_suites_is_bounded_and_keeps_the_latest(
    service: Service, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sealpush.sender.SUITES_KEPT_MAX", 2)
    service.phones = [Phone(number, SUITE_HYBRID) for number in range(1, 4)]
    assert isinstance(await sender.publish_sealed(PHONE, content()), Accepted)
    forgotten, *kept = service.phones
    for phone in (*kept, forgotten):
        phone.take_suite(SUITE_X25519)
    service.phones = [forgotten]
    assert isinstance(await sender.publish_sealed(PHONE, content()), Accepted)
    for phone in kept:
        service.phones = [phone]
        with pytest.raises(KeyRefused):
            await sender.publish_sealed(PHONE, content())


async def test_a_sender_may_refuse_to_seal_to_devices_below_a_suite(service: Service, channels: Channels, clock: FakeClock) -> None:
    strict = Sender(channels, "bank", "secret", signing_key=SIGNING_KEY, min_suite=SUITE_HYBRID, clock=clock, random=lambda: 0.5)
    service.phones[0].take_suite(SUITE_HYBRID)
    refused = await strict.publish_sealed(PHONE, content())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "SUITE_TOO_LOW")
    assert uuid_text(service.phones[1].device_id) in refused.message
    assert uuid_text(service.phones[0].device_id) not in refused.message
    assert service.received == []
    service.phones[1].take_suite(SUITE_HYBRID)
    assert isinstance(await strict.publish_sealed(PHONE, content()), Accepted)


async def test_sealing_to_nobody_and_without_a_key(service: Service, sender: Sender, channels: Channels) -> None:
    assert isinstance(await sender.publish_sealed(NOBODY, content()), NotRegistered)
    assert isinstance(await sender.publish_sealed("rubbish", content()), Refused)
    service.down["GetRecipientKeys"] = 100
    refused = await sender.publish_sealed(PHONE, content())
    assert isinstance(refused, Refused)
    assert refused.code == "UNAVAILABLE"
    with pytest.raises(ValueError, match="signing_key"):
        await Sender(channels, "bank", "secret").publish_sealed(PHONE, content())


# --- many ---


async def test_many_go_in_batches_and_come_back_in_order(service: Service, sender: Sender) -> None:
    publications = [Publication.of(NOBODY if number % 10 == 0 else PHONE, content(), request_id=str(number)) for number in range(1500)]
    service.item_busy["7"] = 2
    outcomes = await sender.publish_many(publications)
    assert [outcome.request_id for outcome in outcomes] == [str(number) for number in range(1500)]
    assert [isinstance(outcome, NotRegistered) for outcome in outcomes] == [number % 10 == 0 for number in range(1500)]
    assert isinstance(outcomes[7], Accepted)
    assert sorted(service.frames) == [1, 1, 476, 512, 512]


async def test_a_batch_is_bounded_by_bytes_too(service: Service, sender: Sender) -> None:
    outcomes = await sender.publish_many(Publication.of(PHONE, content("x" * 60_000)) for _ in range(100))
    assert all(isinstance(outcome, Accepted) for outcome in outcomes)
    assert max(service.frames) < 40


async def test_a_batch_without_an_answer_is_unanswered_item_by_item(service: Service, sender: Sender) -> None:
    service.lose_answer["PublishBatch"] = 1
    first = await sender.publish_many([Publication.of(PHONE, content(), request_id="a")])
    assert isinstance(first[0], Accepted)
    service.down["PublishBatch"] = 1000
    outcomes = await sender.publish_many([Publication.of(PHONE, content(), request_id="b")])
    assert isinstance(outcomes[0], Unanswered)


async def publish_all(sender: Sender, publications: list[Publication]) -> list[PublishOutcome]:
    async def source() -> AsyncIterator[Publication]:
        for publication in publications:
            yield publication

    return [outcome async for outcome in sender.publish_stream(source())]


async def test_a_stream_gathers_frames_and_answers_everything_once(service: Service, sender: Sender) -> None:
    outcomes = await publish_all(sender, [Publication.of(PHONE, content(), request_id=str(number)) for number in range(3000)])
    assert sorted(int(outcome.request_id) for outcome in outcomes) == list(range(3000))
    assert all(isinstance(outcome, Accepted) for outcome in outcomes)
    assert max(service.frames) <= 512
    assert len(service.frames) < 300


async def test_a_broken_stream_sends_again_what_has_no_answer(service: Service, sender: Sender, clock: FakeClock) -> None:
    service.cut_stream_after = 2
    outcomes = await publish_all(sender, [Publication.of(PHONE, content(), request_id=str(number)) for number in range(3000)])
    assert sorted(int(outcome.request_id) for outcome in outcomes) == list(range(3000))
    assert len(service.stored) == 3000
    assert clock.pauses
    assert any(isinstance(outcome, Accepted) and outcome.repeated_request for outcome in outcomes)


async def test_a_stream_gives_up_when_nothing_helps_and_passes_the_sources_error_on(service: Service, sender: Sender) -> None:
    service.down["PublishStream"] = 1000
    with pytest.raises(Unavailable):
        await publish_all(sender, [Publication.of(PHONE, content())])
    service.down.clear()

    async def broken() -> AsyncIterator[Publication]:
        yield Publication.of(PHONE, content(), request_id="before")
        raise RuntimeError("the source failed")

    got: list[PublishOutcome] = []
    with pytest.raises(RuntimeError, match="the source failed"):
        got.extend([outcome async for outcome in sender.publish_stream(broken())])
    assert "before" in service.stored


async def test_leaving_a_stream_early_leaves_nothing_behind(sender: Sender) -> None:
    async def endless() -> AsyncIterator[Publication]:
        while True:
            yield Publication.of(PHONE, content())

    stream = sender.publish_stream(endless())
    assert isinstance(await anext(stream), Accepted)
    await stream.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("sealpush")]


async def test_publishing_that_is_cancelled_while_it_connects_ends_as_cancelled(channels: Channels, clock: FakeClock) -> None:
    """In gRPC a cancellation that meets the end of a stream call before its first message is lost: the next attempt would go on."""
    accounts = channels.endpoints.accounts
    async with Channels(Endpoints(accounts, accounts, accounts, "127.0.0.1:1", accounts, insecure=True)) as nobody_publishes:
        sender = Sender(nobody_publishes, "bank", "secret", clock=clock, random=lambda: 0.5)
        await sender.sign_in()
        for turn in range(1, 30):
            task = asyncio.create_task(publish_all(sender, [Publication.of(PHONE, content())]))
            for _ in range(turn):
                await asyncio.sleep(0)
            asked = task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() is asked, f"cancelled in turn {turn}"


# --- statuses ---


async def test_a_receipt_is_what_the_service_answers(service: Service, sender: Sender) -> None:
    message_id = MessageId(uuid7())
    service.down["GetReceipt"] = 1
    receipt = await sender.receipt(message_id)
    assert (receipt.message_id, receipt.sender_id, receipt.content_id, receipt.evidence) == (message_id, SENDER_ID, b"C" * 16, bytes(254))
    (delivery,) = receipt.deliveries
    assert (delivery.device_id, delivery.identity_public_key, delivery.state) == (service.phones[0].device_id, b"", State.DELIVERED)
    assert delivery.acknowledgements == (SignedAcknowledgement(AckOutcome.DELIVERED, Reason.UNSPECIFIED, 7, bytes(64)),)


async def test_an_answer_that_is_no_receipt_is_refused(service: Service, sender: Sender) -> None:
    service.ack_outcome = messages_pb2.ACK_OUTCOME_UNSPECIFIED
    with pytest.raises(ReceiptRefused, match="malformed receipt"):
        await sender.receipt(MessageId(uuid7()))


async def test_a_status_is_true_or_assumed(service: Service, sender: Sender) -> None:
    outcome = await sender.publish(PHONE, content())
    assert isinstance(outcome, Accepted)
    true = await sender.status(outcome.message_id)
    assert (true.state, true.assumed, true.deliveries[0].pushed_at) == (State.QUEUED, False, None)
    assert true.deliveries[0].read_at is not None
    assumed = await sender.status(outcome.message_id, timedelta(0))
    assert (assumed.state, assumed.assumed) == (State.DELIVERED, True)
    with pytest.raises(NotFound):
        await sender.status(MessageId(bytes(16)))
    with pytest.raises(ValueError, match="8 s"):
        await sender.status(outcome.message_id, timedelta(seconds=9))


async def test_statuses_come_by_the_thousand(service: Service, sender: Sender) -> None:
    outcomes = await sender.publish_many(Publication.of(PHONE, content()) for _ in range(600))
    ids = [outcome.message_id for outcome in outcomes if isinstance(outcome, Accepted)]
    found = await sender.statuses([*ids, MessageId(bytes(16))])
    assert set(found) == set(ids)
    assert service.calls["GetStatuses"] == 2


async def test_a_watch_survives_a_broken_connection_and_repeats_nothing(service: Service, sender: Sender) -> None:
    one, other, unknown = MessageId(b"1" * 16), MessageId(b"2" * 16), MessageId(b"3" * 16)
    for message_id, states in (
        (one, [State.PUSHED, None, State.FETCHED, None, State.DELIVERED]),
        (other, [State.EXPIRED]),
    ):
        service.states[message_id] = asyncio.Queue()
        for state in states:
            service.states[message_id].put_nowait(state)
    seen = [(status.message_id, status.state) async for status in sender.watch([one, other, unknown])]
    assert [state for message_id, state in seen if message_id == one] == [State.QUEUED, State.PUSHED, State.FETCHED, State.DELIVERED]
    assert [state for message_id, state in seen if message_id == other] == [State.QUEUED, State.EXPIRED]


async def test_a_cancel_says_whether_a_push_may_have_left(sender: Sender) -> None:
    cancelled = await sender.cancel(MessageId(b"1" * 16))
    assert cancelled.state is State.CANCELLED
    assert cancelled.deliveries[0].stop_point is StopPoint.BEFORE_PUSH


async def test_errors_carry_what_the_service_said(service: Service, sender: Sender) -> None:
    service.busy["GetStatus"] = 1000
    with pytest.raises(Exception, match="OVERLOADED") as caught:
        await sender.status(MessageId(b"1" * 16))
    assert vars(caught.value)["server_reason"] == "OVERLOADED"
    assert vars(caught.value)["retry_after_s"] == 3
    assert not isinstance(caught.value, InvalidRequest | PermissionDenied)
