"""What a sender publishes and what it learns: publications, outcomes, devices, statuses, and their protobuf. No I/O."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Self, TypedDict, Unpack

import grpc

from sealpush import errors
from sealpush.content import check_content
from sealpush.devicelog import KnownDevice
from sealpush.errors import CallFailed
from sealpush.ids import (
    ContentId,
    DeviceId,
    GroupId,
    MessageId,
    OrderId,
    RecipientRef,
    RequestId,
    SenderId,
    uuid7,
    uuid_text,
)
from sealpush.keys import PrekeyKind, RecipientDevice
from sealpush.model import (
    Channel,
    ContentClass,
    Platform,
    Priority,
    Reason,
    Recipient,
    State,
    StoppedDelivery,
    TrafficType,
    wire_time,
)
from sealpush.proofs import AckOutcome
from sealpush.receipts import Receipt, ReceiptDelivery, SignedAcknowledgement
from sealpush.v1 import common_pb2, keys_pb2, publish_pb2
from sealpush.v1.content_pb2 import Content
from sealpush.wire import read_prekey

LIFETIME_MAX: Final = timedelta(days=28)
IDENTITY_UNCHANGED_MAX: Final = timedelta(days=365)
CONTENT_VERSION: Final = 1

RETRYABLE_CODES: Final = frozenset(
    code.value[0] for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
)
# With these a service says that it does not know what became of a request.
_UNKNOWN_CODES: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED"})
_CODE_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Accepted:
    """Durably stored, for so many devices. `repeated_request`: it was before, this is the first answer again."""

    request_id: RequestId
    message_id: MessageId
    expires_at: datetime
    devices: int
    repeated_request: bool = False


@dataclass(frozen=True, slots=True)
class NotRegistered:
    """Nobody can receive it; nothing was stored. Use another channel at once."""

    request_id: RequestId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refused:
    """Definitely not stored. `retry_after` None: repeating it unchanged does not help."""

    request_id: RequestId
    code: str
    reason: str
    message: str
    field: str = ""
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No answer in time: it may or may not be stored. Publish again with the same request id to know."""

    request_id: RequestId
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class IdentityChanged:
    """The recipient has a device that is too new (`identity_unchanged_for`), or that is not among `approved_devices`; nothing was stored.

    The number may have been taken over: hold the message back, and send it over no other channel that the number leads to.
    `changed_at` is when the newest of these devices was added.
    """

    request_id: RequestId
    device_ids: tuple[DeviceId, ...]
    changed_at: datetime

    @property
    def reason(self) -> str:
        """As of a refusal."""
        return "IDENTITY_CHANGED"

    @property
    def message(self) -> str:
        """As of a refusal."""
        return (
            f"the recipient has {len(self.device_ids)} device(s) too new or not approved; hold it back until the person has confirmed them"
        )


PublishOutcome = Accepted | NotRegistered | Refused | Unanswered | IdentityChanged


@dataclass(frozen=True, slots=True)
class RecipientDevices:
    """A recipient's devices in an app that can be sealed for, as the service says; their fingerprints are for people to compare.

    `device_list_version` is the head of the person's device log over all apps; `identity_changed_at` when that last added a device.
    """

    recipient_ref: RecipientRef
    device_list_version: bytes
    identity_changed_at: datetime
    devices: tuple[KnownDevice, ...]

    @property
    def approved(self) -> dict[DeviceId, bytes]:
        """The identity key of each device: what to keep, and to give as `approved_devices`, once somebody has approved of the list."""
        return {each.device_id: each.identity_public_key for each in self.devices}


class PublishOptions(TypedDict, total=False):
    """What `publish()` takes beside recipient and content; see Publication."""

    request_id: str | None
    app_id: str
    content_class: ContentClass
    priority: Priority
    lifetime: timedelta | None
    replace_key: str
    order_id: OrderId | None
    leg_no: int
    channel: Channel
    group_id: GroupId | None
    traffic_type: TrafficType
    tag: str
    originator: str
    primary_only: bool
    subscriptions: Sequence[str]
    platforms: Sequence[Platform]
    identity_unchanged_for: timedelta | None
    approved_devices: Mapping[DeviceId, bytes] | None


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to publish. The request id is made here where none is given; keep it to ask again.

    Raises ValueError (ContentRefused is one) for what the service would refuse, whoever seals it.

    `content_class` must be set, here or in the content. `lifetime` None: 14 days. `replace_key` defaults to the content's own.
    `identity_unchanged_for`: IdentityChanged, and nothing stored, when a device that it would go to was added more recently.
    `approved_devices`: seal to no others than these, by `RecipientDevices.approved`; for content that is sealed here.
    """

    recipient: Recipient
    content: Content = field(repr=False)
    request_id: RequestId = field(default_factory=lambda: RequestId(uuid_text(uuid7())))
    app_id: str = ""
    content_class: ContentClass = ContentClass.UNSPECIFIED
    priority: Priority = Priority.UNSPECIFIED
    lifetime: timedelta | None = None
    replace_key: str = field(default="", repr=False)
    order_id: OrderId | None = None
    leg_no: int = 0
    channel: Channel = Channel.UNSPECIFIED
    group_id: GroupId | None = None
    traffic_type: TrafficType = TrafficType.UNSPECIFIED
    tag: str = ""
    originator: str = ""
    primary_only: bool = False
    subscriptions: Sequence[str] = ()
    platforms: Sequence[Platform] = ()
    identity_unchanged_for: timedelta | None = None
    approved_devices: Mapping[DeviceId, bytes] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.request_id) <= 64 or not all("!" <= char <= "~" for char in self.request_id):
            raise ValueError("request_id must be 1 to 64 visible ASCII characters")
        check_content(self.content)
        if not (self.content_class or self.content.content_class):
            raise ValueError("content_class must say whether this is informational or advertising")
        if self.lifetime is not None and not timedelta(seconds=1) <= self.lifetime <= LIFETIME_MAX:
            raise ValueError("lifetime must be 1 s to 28 days")
        if self.identity_unchanged_for is not None and not timedelta(seconds=1) <= self.identity_unchanged_for <= IDENTITY_UNCHANGED_MAX:
            raise ValueError("identity_unchanged_for must be 1 s to 365 days")
        if self.identity_unchanged_for is not None and (self.primary_only or self.subscriptions):
            raise ValueError("identity_unchanged_for does not go with primary_only or subscriptions: devices say these of themselves")
        if self.approved_devices is not None and not isinstance(self.approved_devices, Mapping):
            raise ValueError("approved_devices are identity keys by device id, as RecipientDevices.approved gives them")

    @classmethod
    def of(cls, recipient: Recipient | str, content: Content, **options: Unpack[PublishOptions]) -> Self:
        """The publication to a recipient or phone number."""
        given = dict(options)
        if given.get("request_id") is None:
            given.pop("request_id", None)
        return cls(Recipient.of(recipient), content, **given)  # type: ignore[arg-type]  # popping the key makes it a plain dict for the checker

    def to_wire(self) -> publish_pb2.PublishRequest:
        """The request, sealed by the server unless `sealed` takes the place of `plain`."""
        content = Content()
        content.CopyFrom(self.content)
        content.version = content.version or CONTENT_VERSION
        if self.content_class:
            content.content_class = common_pb2.ContentClass.ValueType(self.content_class)
        request = publish_pb2.PublishRequest(
            request_id=self.request_id,
            recipient=self.recipient.to_wire(),
            app_id=self.app_id,
            content_class=content.content_class,
            plain=content,
            priority=common_pb2.Priority.ValueType(self.priority),
            replace_key=self.replace_key or content.replace_key,
            order_id=self.order_id or b"",
            leg_no=self.leg_no,
            channel=common_pb2.Channel.ValueType(self.channel),
            group_id=self.group_id or b"",
            traffic_type=common_pb2.TrafficType.ValueType(self.traffic_type),
            tag=self.tag,
            originator=self.originator,
            primary_only=self.primary_only,
            subscriptions=self.subscriptions,
            platforms=[common_pb2.Platform.ValueType(each) for each in self.platforms],
        )
        if self.lifetime is not None:
            request.lifetime.FromTimedelta(self.lifetime)
        if self.identity_unchanged_for is not None:
            request.identity_unchanged_for.FromTimedelta(self.identity_unchanged_for)
        return request

    def to_plain(self) -> publish_pb2.PublishRequest:
        """The request for the server to seal. Raises ValueError where only who seals here can keep what was asked for."""
        if self.approved_devices is not None:
            raise ValueError("the server chooses the devices it seals for; publish_sealed() seals to approved_devices only")
        return self.to_wire()


@dataclass(frozen=True, slots=True)
class SealedPublication:
    """A request whose content is sealed: bytes to keep until there is an answer, and to send again unchanged."""

    request_id: RequestId
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """How far one device's delivery has come; times are None until it happens."""

    device_id: DeviceId
    state: State
    reason: Reason
    at: datetime
    pushed_at: datetime | None
    fetched_at: datetime | None
    read_at: datetime | None
    late_ack_at: datetime | None
    push_reason: Reason


@dataclass(frozen=True, slots=True)
class Attempt:
    """A channel that was tried."""

    channel: Channel
    leg_no: int
    state: State
    reason: Reason
    at: datetime


@dataclass(frozen=True, slots=True)
class MessageStatus:
    """How far a message has come. `assumed`: the waiting interval was 0 and this is not the true state."""

    message_id: MessageId
    state: State
    reason: Reason
    assumed: bool
    created_at: datetime
    expires_at: datetime
    at: datetime
    attempts: tuple[Attempt, ...]
    deliveries: tuple[DeliveryStatus, ...]
    order_id: OrderId
    group_id: GroupId | None
    tag: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a cancel found: the state that won, and for each delivery whether a push may have left."""

    state: State
    deliveries: tuple[StoppedDelivery, ...]


@dataclass(frozen=True, slots=True)
class Outdated:
    """The envelope does not fit the recipient's devices of now."""

    request_id: RequestId


def outcome_of(request_id: RequestId, result: publish_pb2.PublishResult) -> PublishOutcome | Outdated:
    """The outcome that a result says; what is only refused for now counts as no answer."""
    match result.WhichOneof("outcome"):
        case "accepted":
            accepted = result.accepted
            return Accepted(
                request_id, MessageId(accepted.message_id), wire_time(accepted.expires_at), accepted.devices, accepted.repeated_request
            )
        case "not_registered":
            return NotRegistered(request_id, Reason(result.not_registered.reason_code))
        case "outdated_devices":
            return Outdated(request_id)
        case "identity_changed":
            changed = result.identity_changed
            return IdentityChanged(request_id, tuple(map(DeviceId, changed.device_ids)), wire_time(changed.changed_at))
        case "refusal":
            refusal = result.refusal
            retry_after = refusal.retry_after.ToTimedelta() if refusal.HasField("retry_after") else None
            code = _CODE_NAMES.get(refusal.code, "UNKNOWN")
            if code in _UNKNOWN_CODES:
                return Unanswered(request_id, refusal.reason, refusal.message)
            return Refused(request_id, code, refusal.reason, refusal.message, refusal.field, retry_after)
    return Unanswered(request_id, "NO_RESULT", "the service gave no outcome that this release knows; ask again, or upgrade")


def settled(outcome: PublishOutcome | Outdated) -> PublishOutcome:
    """What a caller is told where nobody seals anew."""
    return outdated_refusal(outcome) if isinstance(outcome, Outdated) else outcome


def outdated_refusal(outdated: Outdated) -> Refused:
    """As a refusal that sealing again cures."""
    return Refused(
        outdated.request_id,
        "FAILED_PRECONDITION",
        "OUTDATED_DEVICES",
        "the recipient's devices changed; ask for the keys again and seal again",
        retry_after=timedelta(0),
    )


def outcome_of_failure(request_id: RequestId, error: CallFailed, *, ambiguous: bool) -> Refused | Unanswered:
    """The outcome that a call's error means. Only a definite answer is a refusal."""
    # RESOURCE_EXHAUSTED without the service's own word is gRPC's or a proxy's: it may be about the answer, which was too large.
    foreign = isinstance(error, errors.Overloaded) and not error.server_reason
    unknown = foreign or isinstance(error, errors.Unavailable | errors.DeadlineExceeded | errors.ServerFault | errors.Aborted)
    if unknown and ambiguous:
        return Unanswered(request_id, error.server_reason or error.reason, str(error))
    retry_after = None if error.retry_after_s is None and not error.retryable else timedelta(seconds=error.retry_after_s or 0)
    return Refused(request_id, error.code, error.server_reason or error.reason, str(error), error.field, retry_after)


def known_device(keys: keys_pb2.DeviceKeys) -> KnownDevice:
    """For people to look at. Nothing is verified."""
    return KnownDevice(DeviceId(keys.device_id), keys.identity_public_key, wire_time(keys.added_at), keys.vouched)


def not_approved(publication: Publication, devices: Iterable[keys_pb2.DeviceKeys]) -> IdentityChanged | None:
    """Which of the devices to seal for are not approved, by id and identity key; None: all are, or nobody asked."""
    if publication.approved_devices is None:
        return None
    approved = publication.approved_devices
    foreign = [each for each in map(known_device, devices) if approved.get(each.device_id) != each.identity_public_key]
    if not foreign:
        return None
    return IdentityChanged(publication.request_id, tuple(each.device_id for each in foreign), max(each.added_at for each in foreign))


def recipient_device(keys: keys_pb2.DeviceKeys) -> RecipientDevice:
    """To seal to, once `choose_prekey()` has verified it."""
    return RecipientDevice(
        DeviceId(keys.device_id),
        keys.identity_public_key,
        read_prekey(keys.signed_prekey, PrekeyKind.SIGNED),
        read_prekey(keys.one_time_prekey, PrekeyKind.ONE_TIME) if keys.HasField("one_time_prekey") else None,
        keys.min_suite or 1,
    )


def status_of(status: publish_pb2.MessageStatus) -> MessageStatus:
    """A status as the service gave it."""
    return MessageStatus(
        MessageId(status.message_id),
        State(status.state),
        Reason(status.reason_code),
        status.assumed,
        wire_time(status.created_at),
        wire_time(status.expires_at),
        wire_time(status.at),
        tuple(
            Attempt(Channel(each.channel), each.leg_no, State(each.state), Reason(each.reason_code), wire_time(each.at))
            for each in status.attempts
        ),
        tuple(
            DeliveryStatus(
                DeviceId(each.device_id),
                State(each.state),
                Reason(each.reason_code),
                wire_time(each.at),
                wire_time(each.pushed_at) if each.HasField("pushed_at") else None,
                wire_time(each.fetched_at) if each.HasField("fetched_at") else None,
                wire_time(each.read_at) if each.HasField("read_at") else None,
                wire_time(each.late_ack_at) if each.HasField("late_ack_at") else None,
                Reason(each.push_reason),
            )
            for each in status.deliveries
        ),
        OrderId(status.order_id),
        GroupId(status.group_id) if status.group_id else None,
        status.tag,
    )


def receipt_of(receipt: publish_pb2.Receipt) -> Receipt:
    """Raises ValueError for what no receipt holds."""
    return Receipt(
        MessageId(receipt.message_id),
        SenderId(receipt.sender_id),
        ContentId(receipt.content_id),
        receipt.evidence,
        receipt.sender_entry,
        receipt.platform_entry,
        tuple(
            ReceiptDelivery(
                DeviceId(each.device_id),
                each.identity_public_key,
                State(each.state),
                Reason(each.reason_code),
                tuple(
                    SignedAcknowledgement(AckOutcome(ack.outcome), Reason(ack.reason_code), ack.at_ms, ack.signature)
                    for ack in each.acknowledgements
                ),
            )
            for each in receipt.deliveries
        ),
    )
