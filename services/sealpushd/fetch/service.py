"""gRPC of the mailbox: what devices call, and what the other services call."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush import proofs
from sealpush.envelope import assemble
from sealpush.ids import ID_BYTES, AppId, ContentId, DeviceId, MessageId, OrderId, SenderId, SubscriberId, WakeUpId
from sealpush.v1 import common_pb2, messages_pb2, messages_pb2_grpc, publish_pb2
from sealpushd.fetch import rules
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.rules import (
    Accepted,
    AcceptedKey,
    Ack,
    AckAnswer,
    AckOutcome,
    Ended,
    MessageRecord,
    NewDelivery,
    NewMessage,
    Position,
    Report,
    State,
    Taken,
    TakeQuery,
    Verdict,
)
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.streams import UNACKNOWLEDGED_MAX, LiveStream, StreamHub
from sealpushd.platform import rpc
from sealpushd.platform.batching import BATCH_ITEMS_MAX, NaturalBatcher
from sealpushd.platform.clock import from_ms
from sealpushd.platform.errors import InvalidRequest, NotFound, Overloaded, ServiceError, Unavailable
from sealpushd.platform.metrics import DELIVERIES
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc

log = structlog.get_logger()

PAGE_DEFAULT: Final = 64
PAGE_MAX: Final = 256
# A page of deliveries; below the bound on a gRPC message with room for the rest.
PAGE_BYTES_MAX: Final = 2 * 1024 * 1024
EVENTS_PAGE_DEFAULT: Final = 500
EVENTS_PAGE_MAX: Final = 1_000
# How long a reader of the journal waits for a notice of this process before it looks for what others wrote.
JOURNAL_LOOK_PERIOD_S: Final = 0.25
SWEEP_PERIOD_S: Final = 1.0
# A device's time as the database holds it.
AT_MS_MAX: Final = 2**63 - 1

_REASON_CODES: Final = frozenset(common_pb2.ReasonCode.values())
_OUTCOMES: Final = frozenset(mailbox_pb2.WakeUpOutcome.values()) - {mailbox_pb2.WAKE_UP_OUTCOME_UNSPECIFIED}


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _optional(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else _timestamp(moment)


def _now() -> Timestamp:
    return _timestamp(datetime.now(UTC))


def need_id(value: bytes, field: str) -> bytes:
    """A 16-byte id; raises InvalidRequest that names the field."""
    if len(value) != ID_BYTES:
        raise InvalidRequest(f"{field} must be 16 bytes, not {len(value)}", field=field)
    return value


class Journal:
    """Tells readers in this process that something was written."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._draining = False

    async def drain(self) -> None:
        """End the readers: they would hold up a server that is going away."""
        self._draining = True
        self.written()

    def check_open(self) -> None:
        """Raises Unavailable once this process is going away."""
        if self._draining:
            raise Unavailable("this server is going away; connect again")

    def written(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), JOURNAL_LOOK_PERIOD_S)


class Mailbox:
    """The operations both listeners share, batched on the way to the store."""

    def __init__(self, store: MailboxStore, hub: StreamHub, leases: Leases) -> None:
        self._store = store
        self._hub = hub
        self._leases = leases
        self.journal = Journal()
        self._storing: NaturalBatcher[NewMessage, tuple[Accepted, bool]] = NaturalBatcher(
            self._store_batch, weigh=lambda message: 512 + len(message.tail)
        )
        self._looking_up: NaturalBatcher[AcceptedKey, Accepted | None] = NaturalBatcher(store.lookup_accepted)
        self._taking: NaturalBatcher[TakeQuery, list[Taken]] = NaturalBatcher(self._take_batch)
        self._acknowledging: NaturalBatcher[Ack, AckAnswer] = NaturalBatcher(self._acknowledge_batch)

    async def lookup_accepted(self, keys: Sequence[AcceptedKey]) -> list[Accepted | None]:
        return await self._looking_up.submit_many(keys)

    async def store(self, messages: Sequence[NewMessage]) -> list[tuple[Accepted, bool]]:
        """What each key stands for now, and whether this call stored it."""
        return await self._storing.submit_many(messages)

    async def _store_batch(self, messages: Sequence[NewMessage]) -> Sequence[tuple[Accepted, bool]]:
        first: dict[tuple[SenderId, str], NewMessage] = {}
        for message in messages:
            first.setdefault((message.key.sender_id, message.key.request_id), message)
        distinct = list(first.values())
        live = await self._hub.live(list({delivery.device_id for message in distinct for delivery in message.deliveries}))
        wake_up_ids = [[WakeUpId(os.urandom(ID_BYTES)) for _ in message.deliveries] for message in distinct]
        stored = await self._store.store(distinct, wake_up_ids, live)
        fresh = [message for message in distinct if message.message_id in stored]
        await self._announce(fresh, live)
        older = [message.key for message in messages if message.message_id not in stored]
        found = iter(await self._store.lookup_accepted(older)) if older else iter(())
        answers: list[tuple[Accepted, bool]] = []
        for message in messages:
            if message.message_id in stored:
                answers.append((Accepted(message.message_id, message.key.request_mac, len(message.deliveries), message.expires_at), True))
                continue
            accepted = next(found)
            if accepted is None:
                raise Overloaded("a request with this id is being decided; try again")
            answers.append((accepted, False))
        return answers

    async def _announce(self, messages: Sequence[NewMessage], live: set[DeviceId]) -> None:
        keys: list[tuple[DeviceId, MessageId]] = []
        pushable = False
        for message in messages:
            for delivery in message.deliveries:
                state, _ = rules.initial_state(message.blocked, delivery)
                DELIVERIES.labels(state.name).inc()
                if not state.terminal:
                    keys.append((delivery.device_id, message.message_id))
                    pushable = pushable or not delivery.push_reason
        await self._hub.announce(keys, live)
        if pushable:
            await self._leases.wake()
        self.journal.written()

    async def take(self, query: TakeQuery) -> list[Taken]:
        return await self._taking.submit(query)

    async def take_many(self, queries: Sequence[TakeQuery]) -> list[list[Taken]]:
        return await self._taking.submit_many(queries)

    async def _take_batch(self, queries: Sequence[TakeQuery]) -> Sequence[list[Taken]]:
        taken = await self._store.take(queries)
        if any(taken):
            self.journal.written()
        return taken

    async def acknowledge(self, acks: Sequence[Ack]) -> list[AckAnswer]:
        return await self._acknowledging.submit_many(acks)

    async def _acknowledge_batch(self, acks: Sequence[Ack]) -> Sequence[AckAnswer]:
        answers = await self._store.acknowledge(acks)
        for answer in answers:
            if answer.verdict is Verdict.ACCEPTED and answer.state is not None:
                DELIVERIES.labels(answer.state.name).inc()
        self.journal.written()
        return answers

    async def sweep(self) -> None:
        """End what is over its time, for ever."""
        while True:
            try:
                while ended := await self._store.sweep():
                    self.journal.written()
                    for each in ended:
                        DELIVERIES.labels(each.state.name).inc()
            except ServiceError as e:
                log.warning("the sweep of overdue deliveries failed and goes on later", error=e.message)
            await asyncio.sleep(SWEEP_PERIOD_S)


def parse_ack(proto: messages_pb2.Acknowledgement, device_id: DeviceId, identity_public_key: bytes) -> Ack | None:
    """An acknowledgement whose fields and signature are right, else None."""
    if len(proto.message_id) != ID_BYTES or len(proto.content_id) != ID_BYTES:
        return None
    if proto.reason_code not in _REASON_CODES or proto.at_ms > AT_MS_MAX:
        return None
    try:
        outcome = AckOutcome(proto.outcome)
    except ValueError:
        return None
    message_id, content_id = MessageId(proto.message_id), ContentId(proto.content_id)
    try:
        if outcome is AckOutcome.READ:
            proof = proofs.read_proof(message_id, content_id, device_id, proto.at_ms)
        else:
            proof = proofs.acknowledgement_proof(
                message_id, content_id, device_id, proofs.AckOutcome(outcome), proto.reason_code, proto.at_ms
            )
    except ValueError:
        return None
    if not proofs.verify_proof(identity_public_key, proof, proto.signature):
        return None
    return Ack(message_id, device_id, content_id, outcome, proto.reason_code, proto.at_ms, proto.signature)


def to_delivery(taken: Taken) -> messages_pb2.Delivery:
    return messages_pb2.Delivery(
        message_id=taken.message_id,
        wake_up_id=taken.wake_up_id,
        envelope=assemble(taken.head, taken.stanza, taken.tail),
        priority=common_pb2.Priority.ValueType(taken.priority),
        content_class=common_pb2.ContentClass.ValueType(taken.content_class),
        muted=taken.muted,
        created_at=_timestamp(taken.created_at),
        expires_at=_timestamp(taken.expires_at),
    )


def to_ack_result(answer: AckAnswer) -> messages_pb2.AckResult:
    return messages_pb2.AckResult(
        message_id=answer.message_id,
        verdict=messages_pb2.AckVerdict.ValueType(answer.verdict),
        state=common_pb2.State.ValueType(answer.state or 0),
    )


class MessagesServicer(messages_pb2_grpc.MessagesServicer):
    """What devices call."""

    def __init__(self, mailbox: Mailbox, hub: StreamHub) -> None:
        self._mailbox = mailbox
        self._hub = hub

    async def Fetch(self, request: messages_pb2.FetchRequest, context: Any) -> messages_pb2.FetchResponse:  # noqa: N802 - gRPC's name
        caller = rpc.require_device()
        wake_up_id = WakeUpId(need_id(request.wake_up_id, "wake_up_id"))
        taken = await self._mailbox.take(TakeQuery(caller.device_id, wake_up_id=wake_up_id))
        if not taken:
            raise NotFound("no open delivery of this device has this wake-up id; drain instead")
        return messages_pb2.FetchResponse(delivery=to_delivery(taken[0]), server_time=_now())

    async def Drain(self, request: messages_pb2.DrainRequest, context: Any) -> messages_pb2.DrainResponse:  # noqa: N802 - gRPC's name
        caller = rpc.require_device()
        if request.page_size > PAGE_MAX:
            raise InvalidRequest(f"page_size is at most {PAGE_MAX}", field="page_size")
        after = MessageId(need_id(request.page_token, "page_token")) if request.page_token else rules.BEFORE_ALL
        most = request.page_size or PAGE_DEFAULT
        taken = await self._mailbox.take(TakeQuery(caller.device_id, after_id=after, most=most))
        page: list[messages_pb2.Delivery] = []
        size = 0
        for each in taken:
            size += len(each.tail) + 512
            if page and size > PAGE_BYTES_MAX:
                break
            page.append(to_delivery(each))
        more = len(page) < len(taken) or len(taken) == most
        return messages_pb2.DrainResponse(
            deliveries=page, next_page_token=page[-1].message_id if page and more else b"", server_time=_now()
        )

    async def Acknowledge(  # noqa: N802 - gRPC's name
        self, request: messages_pb2.AcknowledgeRequest, context: Any
    ) -> messages_pb2.AcknowledgeResponse:
        answers = await self._acknowledge(request.acknowledgements)
        return messages_pb2.AcknowledgeResponse(results=[to_ack_result(answer) for answer in answers])

    async def _acknowledge(self, protos: Sequence[messages_pb2.Acknowledgement]) -> list[AckAnswer]:
        caller = rpc.require_device()
        if len(protos) > UNACKNOWLEDGED_MAX:
            raise InvalidRequest(f"at most {UNACKNOWLEDGED_MAX} acknowledgements a request", field="acknowledgements")
        parsed = [parse_ack(proto, caller.device_id, caller.identity_public_key) for proto in protos]
        answers = iter(await self._mailbox.acknowledge([ack for ack in parsed if ack is not None]))
        return [
            next(answers) if ack is not None else AckAnswer(MessageId(proto.message_id), Verdict.REFUSED, None)
            for proto, ack in zip(protos, parsed, strict=True)
        ]

    async def Stream(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[messages_pb2.StreamRequest], context: Any
    ) -> AsyncIterator[messages_pb2.StreamResponse]:
        caller = rpc.require_device()
        stream = await self._hub.open(caller.device_id)
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            async for response in self._backlog(stream):
                yield response
            yield messages_pb2.StreamResponse(backlog_done=True, server_time=_now())
            while True:
                answers, ids = await stream.next()
                if answers:
                    yield _answer_frame(answers)
                for frame in _frames(await self._take(stream, ids)):
                    yield _delivery_frame(frame)
        except StreamDone:
            return
        finally:
            reader.cancel()
            await self._hub.close(stream)

    async def _read(self, requests: AsyncIterator[messages_pb2.StreamRequest], stream: LiveStream) -> None:
        """Acknowledgements come up while deliveries go down. An error ends the stream, and so does the device."""
        try:
            async for request in requests:
                stream.answered(await self._acknowledge(request.acknowledgements))
        except Exception as e:
            # Also a bug ends the stream: the device connects again, where a stream without a reader would hang.
            stream.end(e)
        else:
            stream.end(StreamDone("the device ended its stream"))

    async def _backlog(self, stream: LiveStream) -> AsyncIterator[messages_pb2.StreamResponse]:
        """What waited before the stream began. Where there is no room, it goes on as the device acknowledges."""
        after = rules.BEFORE_ALL
        while True:
            answers = stream.take_answers() if stream.room else await stream.room_again()
            if answers:
                yield _answer_frame(answers)
            if not stream.room:
                continue
            most = min(PAGE_DEFAULT, stream.room)
            taken = await self._mailbox.take(TakeQuery(stream.device_id, after_id=after, most=most))
            stream.sent(each.message_id for each in taken)
            for frame in _frames(taken):
                yield _delivery_frame(frame)
            if len(taken) < most:
                return
            after = taken[-1].message_id

    async def _take(self, stream: LiveStream, ids: Sequence[MessageId]) -> list[Taken]:
        if not ids:
            return []
        queries = [TakeQuery(stream.device_id, message_id=message_id) for message_id in ids]
        taken = [each for found in await self._mailbox.take_many(queries) for each in found]
        stream.gone(set(ids).difference(each.message_id for each in taken))
        return taken


class StreamDone(ServiceError):
    """The device half-closed its stream: it ends without an error on the device's side."""

    reason = "STREAM_DONE"


def _answer_frame(answers: Sequence[AckAnswer]) -> messages_pb2.StreamResponse:
    return messages_pb2.StreamResponse(ack_results=[to_ack_result(answer) for answer in answers], server_time=_now())


def _delivery_frame(taken: Sequence[Taken]) -> messages_pb2.StreamResponse:
    return messages_pb2.StreamResponse(deliveries=[to_delivery(each) for each in taken], server_time=_now())


def _frames(taken: Sequence[Taken]) -> list[list[Taken]]:
    """Deliveries in frames of at most `PAGE_BYTES_MAX`."""
    frames: list[list[Taken]] = []
    size = PAGE_BYTES_MAX
    for each in taken:
        weight = len(each.tail) + 512
        if size + weight > PAGE_BYTES_MAX:
            frames.append([])
            size = 0
        frames[-1].append(each)
        size += weight
    return frames


def parse_key(proto: mailbox_pb2.AcceptedKey) -> AcceptedKey:
    return AcceptedKey(SenderId(need_id(proto.sender_id, "sender_id")), proto.request_id, proto.request_mac)


def parse_message(proto: mailbox_pb2.NewMessage) -> NewMessage:
    if not proto.deliveries:
        raise InvalidRequest("a message has at least one delivery", field="deliveries")
    if len({each.device_id for each in proto.deliveries}) != len(proto.deliveries):
        raise InvalidRequest("a message has two deliveries for one device", field="deliveries")
    message_id = MessageId(need_id(proto.message_id, "message_id"))
    return NewMessage(
        key=parse_key(proto.key),
        message_id=message_id,
        subscriber_id=SubscriberId(need_id(proto.subscriber_id, "subscriber_id")),
        app_id=AppId(proto.app_id),
        content_class=proto.content_class,
        priority=proto.priority or common_pb2.PRIORITY_NORMAL,
        created_at=from_ms(proto.created_at_ms),
        expires_at=from_ms(proto.expires_at_ms),
        replace_hash=proto.replace_hash,
        order_id=OrderId(proto.order_id or message_id),
        leg_no=proto.leg_no,
        channel=proto.channel or common_pb2.CHANNEL_PUSH,
        group_id=proto.group_id or None,
        traffic_type=proto.traffic_type,
        tag=proto.tag,
        originator_requested=proto.originator_requested,
        originator_effective=proto.originator_effective,
        muted=proto.muted,
        blocked=proto.blocked,
        deliveries=tuple(
            NewDelivery(DeviceId(need_id(each.device_id, "device_id")), each.stanza, each.platform, each.push_reason)
            for each in proto.deliveries
        ),
        content_id=ContentId(need_id(proto.content_id, "content_id")),
        head=proto.head,
        tail=proto.tail,
    )


def to_accepted(accepted: Accepted | None, key: AcceptedKey) -> mailbox_pb2.AcceptedResult:
    if accepted is None:
        return mailbox_pb2.AcceptedResult()
    return mailbox_pb2.AcceptedResult(
        message_id=accepted.message_id,
        other_request=not hmac.compare_digest(accepted.request_mac, key.request_mac),
        expires_at=_timestamp(accepted.expires_at),
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
    state, reason = rules.message_state((each.state, each.reason) for each in record.deliveries)
    # When the message entered its state: with the first delivery that is in it; a state of all, with the last.
    moments = [each.changed_at for each in record.deliveries if each.state is state]
    at = min(moments) if state is State.DELIVERED else max(each.changed_at for each in record.deliveries)
    return publish_pb2.MessageStatus(
        message_id=record.message_id,
        state=common_pb2.State.ValueType(state),
        reason_code=common_pb2.ReasonCode.ValueType(reason),
        created_at=_timestamp(record.accepted_at),
        expires_at=_timestamp(record.expires_at),
        at=_timestamp(at),
        attempts=[
            publish_pb2.Attempt(
                channel=common_pb2.Channel.ValueType(record.channel),
                leg_no=record.leg_no,
                state=common_pb2.State.ValueType(state),
                reason_code=common_pb2.ReasonCode.ValueType(reason),
                at=_timestamp(at),
            )
        ],
        deliveries=[
            publish_pb2.DeliveryStatus(
                device_id=each.device_id,
                state=common_pb2.State.ValueType(each.state),
                reason_code=common_pb2.ReasonCode.ValueType(each.reason),
                pushed_at=_optional(each.pushed_at),
                fetched_at=_optional(each.fetched_at),
                at=_timestamp(each.changed_at),
                read_at=_optional(each.read_at),
                late_ack_at=_optional(each.late_ack_at),
                push_reason=common_pb2.ReasonCode.ValueType(each.push_reason),
            )
            for each in record.deliveries
        ],
        order_id=record.order_id,
        group_id=record.group_id or b"",
        tag=record.tag,
    )


def parse_report(proto: mailbox_pb2.WakeUpReport) -> Report:
    if proto.outcome not in _OUTCOMES:
        raise InvalidRequest(f"outcome {proto.outcome} is unknown to this version", field="outcome")
    if proto.reason_code not in _REASON_CODES:
        raise InvalidRequest(f"reason_code {proto.reason_code} is unknown to this version", field="reason_code")
    try:
        retry_at = proto.retry_at.ToDatetime(UTC) if proto.HasField("retry_at") else None
    except (ValueError, OverflowError) as e:
        raise InvalidRequest("retry_at is no valid time", field="retry_at") from e
    return Report(
        MessageId(need_id(proto.message_id, "message_id")),
        DeviceId(need_id(proto.device_id, "device_id")),
        proto.fence,
        proto.outcome,
        retry_at,
        proto.reason_code,
        # The provider's own words: PostgreSQL holds every character but this one.
        proto.detail.replace("\0", ""),
    )


class MailboxServicer(mailbox_pb2_grpc.MailboxServicer):
    """What the other services call."""

    def __init__(self, mailbox: Mailbox, store: MailboxStore, leases: Leases) -> None:
        self._mailbox = mailbox
        self._store = store
        self._leases = leases

    async def LookupAccepted(  # noqa: N802 - gRPC's name
        self, request: mailbox_pb2.LookupAcceptedRequest, context: Any
    ) -> mailbox_pb2.LookupAcceptedResponse:
        keys = [parse_key(proto) for proto in _bounded(request.keys, "keys")]
        found = await self._mailbox.lookup_accepted(keys)
        return mailbox_pb2.LookupAcceptedResponse(results=[to_accepted(accepted, key) for accepted, key in zip(found, keys, strict=True)])

    async def Store(self, request: mailbox_pb2.StoreRequest, context: Any) -> mailbox_pb2.StoreResponse:  # noqa: N802 - gRPC's name
        messages = [parse_message(proto) for proto in _bounded(request.messages, "messages")]
        answers = await self._mailbox.store(messages)
        return mailbox_pb2.StoreResponse(
            results=[
                mailbox_pb2.StoreResult(accepted=to_accepted(accepted, message.key), stored_now=now)
                for (accepted, now), message in zip(answers, messages, strict=True)
            ]
        )

    async def WakeUpSession(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[mailbox_pb2.WakeUpSessionRequest], context: Any
    ) -> AsyncIterator[mailbox_pb2.WakeUpSessionResponse]:
        session = await self._leases.open()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    for credit in request.credits:
                        session.add_credit(credit.app_id, credit.platform, credit.credit)
                    if request.reports:
                        session.add_reports([parse_report(report) for report in request.reports])
            except Exception as e:
                session.end(e)
            else:
                session.end(StreamDone("the dispatcher ended its session"))

        async def write() -> None:
            try:
                await session.write_reports()
            except Exception as e:
                # The leases end with the session; another one gets the wake-ups.
                session.end(e)

        tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
        try:
            async for wake_ups in session.wake_ups():
                yield mailbox_pb2.WakeUpSessionResponse(
                    wake_ups=[
                        mailbox_pb2.WakeUp(
                            message_id=each.message_id,
                            device_id=each.device_id,
                            wake_up_id=each.wake_up_id,
                            fence=each.fence,
                            app_id=each.app_id,
                            platform=common_pb2.Platform.ValueType(each.platform),
                            priority=common_pb2.Priority.ValueType(each.priority),
                            muted=each.muted,
                            expires_at=_timestamp(each.expires_at),
                            attempts=each.attempts,
                        )
                        for each in wake_ups
                    ]
                )
        except StreamDone:
            return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.write_last_reports()
            await self._leases.close(session)

    async def ReadEvents(  # noqa: N802 - gRPC's name
        self, request: mailbox_pb2.ReadEventsRequest, context: Any
    ) -> AsyncIterator[mailbox_pb2.ReadEventsResponse]:
        try:
            position = await self._store.now_position() if request.from_now else Position.decode(request.position)
        except ValueError as e:
            raise InvalidRequest(str(e), field="position") from e
        if request.page_size > EVENTS_PAGE_MAX:
            raise InvalidRequest(f"page_size is at most {EVENTS_PAGE_MAX}", field="page_size")
        most = request.page_size or EVENTS_PAGE_DEFAULT
        # The first frame tells the reader that it misses nothing from here on.
        yield mailbox_pb2.ReadEventsResponse(position=position.encode())
        while True:
            self._mailbox.journal.check_open()
            events, position = await self._store.events(position, most)
            if events:
                yield mailbox_pb2.ReadEventsResponse(
                    events=[
                        mailbox_pb2.StatusEvent(
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
                            at=_timestamp(each.at),
                        )
                        for each in events
                    ],
                    position=position.encode(),
                    caught_up=len(events) < most,
                )
            if len(events) < most:
                await self._mailbox.journal.wait()

    async def GetStatuses(  # noqa: N802 - gRPC's name
        self, request: mailbox_pb2.MailboxGetStatusesRequest, context: Any
    ) -> mailbox_pb2.MailboxGetStatusesResponse:
        sender_id = SenderId(need_id(request.sender_id, "sender_id"))
        ids = [MessageId(need_id(each, "message_ids")) for each in _bounded(request.message_ids, "message_ids")]
        records = await self._store.statuses(sender_id, ids)
        return mailbox_pb2.MailboxGetStatusesResponse(statuses=[to_status(record) for record in records])

    async def Cancel(  # noqa: N802 - gRPC's name
        self, request: mailbox_pb2.MailboxCancelRequest, context: Any
    ) -> mailbox_pb2.MailboxCancelResponse:
        sender_id = SenderId(need_id(request.sender_id, "sender_id"))
        ids = [MessageId(need_id(each, "message_ids")) for each in _bounded(request.message_ids, "message_ids")]
        ended = await self._store.cancel(sender_id, ids)
        self._mailbox.journal.written()
        results = []
        for message_id in ids:
            deliveries = ended.get(message_id)
            if deliveries is None:
                results.append(mailbox_pb2.CancelResult())
                continue
            state, _ = rules.message_state((each.state, 0) for each in deliveries)
            results.append(mailbox_pb2.CancelResult(found=True, state=common_pb2.State.ValueType(state), deliveries=to_stopped(deliveries)))
        return mailbox_pb2.MailboxCancelResponse(results=results)

    async def Block(self, request: mailbox_pb2.BlockRequest, context: Any) -> mailbox_pb2.BlockResponse:  # noqa: N802 - gRPC's name
        ended = await self._store.block(
            need_id(request.subscriber_id, "subscriber_id"),
            SenderId(need_id(request.sender_id, "sender_id")),
            advertising_only=request.advertising_only,
        )
        self._mailbox.journal.written()
        return mailbox_pb2.BlockResponse(deliveries=to_stopped(ended))

    async def CloseDevices(  # noqa: N802 - gRPC's name
        self, request: mailbox_pb2.CloseDevicesRequest, context: Any
    ) -> mailbox_pb2.CloseDevicesResponse:
        devices = {DeviceId(need_id(each.device_id, "device_id")): int(each.reason_code) for each in _bounded(request.devices, "devices")}
        ended = await self._store.close_devices(devices)
        self._mailbox.journal.written()
        return mailbox_pb2.CloseDevicesResponse(closed=len(ended))


def _bounded(items: Any, field: str) -> Any:
    if len(items) > BATCH_ITEMS_MAX:
        raise InvalidRequest(f"at most {BATCH_ITEMS_MAX} {field} a call", field=field)
    return items
