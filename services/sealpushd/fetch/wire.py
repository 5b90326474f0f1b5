"""Protobuf of the mailbox to its own types and back. Malformed input is refused here, by the name of its field."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush import proofs
from sealpush.envelope import assemble
from sealpush.ids import ID_BYTES, AppId, ContentId, DeviceId, MessageId, OrderId, SenderId, SubscriberId
from sealpush.model import State
from sealpush.proofs import AckOutcome
from sealpush.v1 import common_pb2, messages_pb2, publish_pb2
from sealpushd.fetch import rules
from sealpushd.fetch.rules import (
    Accepted,
    AcceptedKey,
    Ack,
    AckAnswer,
    Ended,
    Event,
    MessageEvidence,
    MessageRecord,
    NewDelivery,
    NewMessage,
    Queue,
    Report,
    Taken,
    WakeUp,
)
from sealpushd.platform import fields
from sealpushd.platform.errors import InvalidRequest
from sealpushd.v1 import mailbox_pb2

_REASON_CODES: Final = frozenset(common_pb2.ReasonCode.values())
_PLATFORMS: Final = frozenset(common_pb2.Platform.values()) - {common_pb2.PLATFORM_UNSPECIFIED}
APP_ID_CHARACTERS_MAX: Final = 64
# As the protos say: what publishing lets in.
REQUEST_ID_CHARACTERS_MAX: Final = 64
TAG_CHARACTERS_MAX: Final = 50
ORIGINATOR_CHARACTERS_MAX: Final = 32
MAC_BYTES: Final = 32
# What fits a row of PostgreSQL beside the rest: stanzas are kept in line. Those of the largest suite have 1.2 kB.
STANZA_BYTES_MAX: Final = 7 * 1024
# A leg is numbered up to 100; this is what the column holds.
LEG_NO_MAX: Final = fields.ENUM_MAX
_OUTCOMES: Final = frozenset(mailbox_pb2.WakeUpOutcome.values()) - {mailbox_pb2.WAKE_UP_OUTCOME_UNSPECIFIED}


def timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def optional_timestamp(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else timestamp(moment)


def parse_ack(proto: messages_pb2.Acknowledgement, device_id: DeviceId, identity_public_key: bytes) -> Ack | None:
    """An acknowledgement whose fields and signature are right, else None."""
    if len(proto.message_id) != ID_BYTES or len(proto.content_id) != ID_BYTES:
        return None
    if proto.reason_code not in _REASON_CODES or proto.at_ms > fields.I64_MAX:
        return None
    try:
        outcome = AckOutcome(proto.outcome)
    except ValueError:
        return None
    message_id, content_id, digest = MessageId(proto.message_id), ContentId(proto.content_id), proto.envelope_digest
    if digest == proofs.NO_DIGEST and outcome is not AckOutcome.UNDELIVERED:
        return None
    try:
        if outcome is AckOutcome.READ:
            proof = proofs.read_proof(message_id, content_id, digest, device_id, proto.at_ms)
        else:
            proof = proofs.acknowledgement_proof(message_id, content_id, digest, device_id, outcome, proto.reason_code, proto.at_ms)
    except ValueError:
        return None
    if not proofs.verify_proof(identity_public_key, proof, proto.signature):
        return None
    known = None if digest == proofs.NO_DIGEST else digest
    return Ack(message_id, device_id, content_id, known, outcome, proto.reason_code, proto.at_ms, proto.signature)


def to_delivery(taken: Taken) -> messages_pb2.Delivery:
    return messages_pb2.Delivery(
        message_id=taken.message_id,
        wake_up_id=taken.wake_up_id,
        envelope=assemble(taken.head, taken.stanza, taken.tail),
        priority=common_pb2.Priority.ValueType(taken.priority),
        content_class=common_pb2.ContentClass.ValueType(taken.content_class),
        muted=taken.muted,
        created_at=timestamp(taken.created_at),
        expires_at=timestamp(taken.expires_at),
    )


def to_ack_result(answer: AckAnswer) -> messages_pb2.AckResult:
    return messages_pb2.AckResult(
        message_id=answer.message_id,
        verdict=messages_pb2.AckVerdict.ValueType(answer.verdict),
        state=common_pb2.State.ValueType(answer.state or 0),
    )


def parse_key(proto: mailbox_pb2.AcceptedKey) -> AcceptedKey:
    return AcceptedKey(
        SenderId(fields.id16(proto.sender_id, "sender_id")),
        fields.text(proto.request_id, "request_id", REQUEST_ID_CHARACTERS_MAX, characters_min=1),
        fields.octets(proto.request_mac, "request_mac", MAC_BYTES),
    )


def parse_message(proto: mailbox_pb2.NewMessage) -> NewMessage:
    """Raises InvalidRequest that names the field."""
    if not proto.deliveries:
        raise InvalidRequest("a message has at least one delivery", field="deliveries")
    if len({each.device_id for each in proto.deliveries}) != len(proto.deliveries):
        raise InvalidRequest("a message has two deliveries for one device", field="deliveries")
    message_id = MessageId(fields.id16(proto.message_id, "message_id"))
    return NewMessage(
        key=parse_key(proto.key),
        message_id=message_id,
        subscriber_id=SubscriberId(fields.id16(proto.subscriber_id, "subscriber_id")),
        app_id=AppId(fields.text(proto.app_id, "app_id", APP_ID_CHARACTERS_MAX)),
        content_class=fields.enum(proto.content_class, "content_class"),
        priority=fields.enum(proto.priority, "priority") or common_pb2.PRIORITY_NORMAL,
        created_at=fields.moment_ms(proto.created_at_ms, "created_at_ms"),
        expires_at=fields.moment_ms(proto.expires_at_ms, "expires_at_ms"),
        replace_hash=fields.octets(proto.replace_hash, "replace_hash", 0, MAC_BYTES),
        order_id=OrderId(fields.optional_id16(proto.order_id, "order_id") or message_id),
        leg_no=fields.number(proto.leg_no, "leg_no", LEG_NO_MAX),
        channel=fields.enum(proto.channel, "channel") or common_pb2.CHANNEL_PUSH,
        group_id=fields.optional_id16(proto.group_id, "group_id") or None,
        traffic_type=fields.enum(proto.traffic_type, "traffic_type"),
        tag=fields.text(proto.tag, "tag", TAG_CHARACTERS_MAX),
        originator_requested=fields.text(proto.originator_requested, "originator_requested", ORIGINATOR_CHARACTERS_MAX),
        originator_effective=fields.text(proto.originator_effective, "originator_effective", ORIGINATOR_CHARACTERS_MAX),
        muted=proto.muted,
        blocked=fields.enum(proto.blocked, "blocked"),
        deliveries=tuple(fields.each(proto.deliveries, "deliveries", parse_delivery, fields.ENUM_MAX)),
        content_id=ContentId(fields.id16(proto.content_id, "content_id")),
        head=proto.head,
        tail=proto.tail,
    )


def parse_delivery(proto: mailbox_pb2.NewDelivery) -> NewDelivery:
    return NewDelivery(
        DeviceId(fields.id16(proto.device_id, "device_id")),
        fields.octets_to(proto.stanza, "stanza", STANZA_BYTES_MAX),
        fields.enum(proto.platform, "platform"),
        fields.enum(proto.push_reason, "push_reason"),
    )


def to_accepted(accepted: Accepted | None, key: AcceptedKey) -> mailbox_pb2.AcceptedResult:
    if accepted is None:
        return mailbox_pb2.AcceptedResult()
    return mailbox_pb2.AcceptedResult(
        message_id=accepted.message_id,
        other_request=not hmac.compare_digest(accepted.request_mac, key.request_mac),
        expires_at=timestamp(accepted.expires_at),
        devices=accepted.devices,
    )


def to_stopped(ended: Sequence[Ended]) -> list[common_pb2.StoppedDelivery]:
    return [
        common_pb2.StoppedDelivery(
            message_id=each.message_id,
            device_id=each.device_id,
            stop_point=common_pb2.StopPoint.ValueType(each.stop_point),
            state=common_pb2.State.ValueType(each.state),
        )
        for each in ended
    ]


def to_status(record: MessageRecord) -> publish_pb2.MessageStatus:
    reached = max((each.reached for each in record.deliveries), default=State.QUEUED)
    state, reason = rules.message_state(((each.state, each.reason) for each in record.deliveries), reached)
    # When the message entered its state: with the first delivery that is in it; a state of all, with the last.
    moments = [each.changed_at for each in record.deliveries if each.state is state]
    at = min(moments) if state is State.DELIVERED else max(each.changed_at for each in record.deliveries)
    return publish_pb2.MessageStatus(
        message_id=record.message_id,
        state=common_pb2.State.ValueType(state),
        reason_code=common_pb2.ReasonCode.ValueType(reason),
        created_at=timestamp(record.accepted_at),
        expires_at=timestamp(record.expires_at),
        at=timestamp(at),
        attempts=[
            publish_pb2.Attempt(
                channel=common_pb2.Channel.ValueType(record.channel),
                leg_no=record.leg_no,
                state=common_pb2.State.ValueType(state),
                reason_code=common_pb2.ReasonCode.ValueType(reason),
                at=timestamp(at),
            )
        ],
        deliveries=[
            publish_pb2.DeliveryStatus(
                device_id=each.device_id,
                state=common_pb2.State.ValueType(each.state),
                reason_code=common_pb2.ReasonCode.ValueType(each.reason),
                pushed_at=optional_timestamp(each.pushed_at),
                fetched_at=optional_timestamp(each.fetched_at),
                at=timestamp(each.changed_at),
                read_at=optional_timestamp(each.read_at),
                late_ack_at=optional_timestamp(each.late_ack_at),
                push_reason=common_pb2.ReasonCode.ValueType(each.push_reason),
            )
            for each in record.deliveries
        ],
        order_id=record.order_id,
        group_id=record.group_id or b"",
        tag=record.tag,
    )


def to_receipt(evidence: MessageEvidence, sender_id: SenderId) -> publish_pb2.Receipt:
    """The mailbox's part of a receipt."""
    return publish_pb2.Receipt(
        message_id=evidence.message_id,
        sender_id=sender_id,
        content_id=evidence.content_id,
        evidence=evidence.evidence,
        deliveries=[
            publish_pb2.ReceiptDelivery(
                device_id=each.device_id,
                state=common_pb2.State.ValueType(each.state),
                reason_code=common_pb2.ReasonCode.ValueType(each.reason),
                acknowledgements=[
                    publish_pb2.SignedAcknowledgement(
                        outcome=messages_pb2.AckOutcome.ValueType(ack.outcome),
                        reason_code=common_pb2.ReasonCode.ValueType(ack.reason),
                        at_ms=ack.at_ms,
                        signature=ack.signature,
                    )
                    for ack in each.acks
                ],
            )
            for each in evidence.deliveries
        ],
    )


def parse_report(proto: mailbox_pb2.WakeUpReport) -> Report:
    """Raises InvalidRequest that names the field."""
    retry_in = fields.duration(proto.retry_in, "retry_in") if proto.HasField("retry_in") else None
    return Report(
        MessageId(fields.id16(proto.message_id, "message_id")),
        DeviceId(fields.id16(proto.device_id, "device_id")),
        fields.number(proto.fence, "fence", fields.I64_MAX),
        fields.enum(proto.outcome, "outcome", _OUTCOMES),
        fields.moment(proto.retry_at, "retry_at") if proto.HasField("retry_at") else None,
        # Of a newer dispatcher it may be one that this mailbox does not know: senders may.
        fields.enum(proto.reason_code, "reason_code"),
        # The provider's own words: PostgreSQL holds every character but this one.
        proto.detail.replace("\0", ""),
        None if retry_in is None else min(max(retry_in, timedelta(0)), rules.RETRY_IN_MAX),
    )


def parse_reports(protos: Sequence[mailbox_pb2.WakeUpReport]) -> tuple[list[Report], list[InvalidRequest]]:
    """What a dispatcher reports, and what of it means nothing.

    Such a report ends no session, whose other leases are as good as before. Where it names its lease, that is given back: the wake-up
    counts as tried and goes out again in a while. Else the lease ends with the session.
    """
    parsed = fields.each_alone(protos, "reports", parse_report, len(protos))
    reports = [each if isinstance(each, Report) else _give_back(proto) for proto, each in zip(protos, parsed, strict=True)]
    return [each for each in reports if each is not None], [each for each in parsed if isinstance(each, InvalidRequest)]


def _give_back(proto: mailbox_pb2.WakeUpReport) -> Report | None:
    lease = mailbox_pb2.WakeUpReport(
        message_id=proto.message_id, device_id=proto.device_id, fence=proto.fence, outcome=mailbox_pb2.WAKE_UP_OUTCOME_RETRY
    )
    try:
        return replace(parse_report(lease), retry_in=rules.REPORT_LOST_PAUSE, detail="report-not-understood")
    except InvalidRequest:
        return None


def parse_credits(protos: Sequence[mailbox_pb2.LaneCredit]) -> tuple[list[tuple[AppId, int, int]], list[InvalidRequest]]:
    """What a dispatcher can take, by lane, and what of it names none."""
    parsed = fields.each_alone(protos, "credits", parse_credit, len(protos))
    return [each for each in parsed if not isinstance(each, InvalidRequest)], [each for each in parsed if isinstance(each, InvalidRequest)]


def parse_credit(proto: mailbox_pb2.LaneCredit) -> tuple[AppId, int, int]:
    """A lane, and what its dispatcher can take."""
    return (
        AppId(fields.text(proto.app_id, "app_id", APP_ID_CHARACTERS_MAX)),
        fields.enum(proto.platform, "platform"),
        proto.credit,
    )


def parse_closed(proto: mailbox_pb2.ClosedDevice) -> tuple[DeviceId, int]:
    """A device that is gone, and the reason."""
    device_id = DeviceId(fields.id16(proto.device_id, "device_id"))
    return device_id, fields.enum(proto.reason_code, "reason_code")


def to_wake_up(each: WakeUp) -> mailbox_pb2.WakeUp:
    left = each.expires_in
    return mailbox_pb2.WakeUp(
        message_id=each.message_id,
        device_id=each.device_id,
        wake_up_id=each.wake_up_id,
        fence=each.fence,
        app_id=each.app_id,
        platform=common_pb2.Platform.ValueType(each.platform),
        priority=common_pb2.Priority.ValueType(each.priority),
        muted=each.muted,
        expires_at=timestamp(each.expires_at),
        attempts=each.attempts,
        expires_in=Duration(seconds=left.days * 86_400 + left.seconds, nanos=left.microseconds * 1000),
    )


def parse_lane(app_id: str, platform: int) -> tuple[AppId, int]:
    name = fields.text(app_id, "app_id", APP_ID_CHARACTERS_MAX, characters_min=1)
    return AppId(name), fields.enum(platform, "platform", _PLATFORMS)


def to_queue(queue: Queue) -> mailbox_pb2.Queue:
    return mailbox_pb2.Queue(
        app_id=queue.app_id,
        platform=common_pb2.Platform.ValueType(queue.platform),
        waiting=queue.waiting,
        due=queue.due,
        held=queue.held,
        oldest_at=optional_timestamp(queue.oldest_at),
        quarantined=queue.quarantined,
    )


def to_event(each: Event) -> mailbox_pb2.StatusEvent:
    return mailbox_pb2.StatusEvent(
        message_id=each.message_id,
        device_id=each.device_id,
        sender_id=each.sender_id,
        order_id=each.order_id,
        leg_no=each.leg_no,
        group_id=each.group_id or b"",
        channel=common_pb2.Channel.ValueType(each.channel),
        state=common_pb2.State.ValueType(each.state),
        reason_code=common_pb2.ReasonCode.ValueType(each.reason),
        kind=mailbox_pb2.EventKind.ValueType(each.kind),
        at=timestamp(each.at),
    )
