"""gRPC of the mailbox: what devices call, and what the other services call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import ID_BYTES, MessageId, SenderId, WakeUpId
from sealpush.v1 import common_pb2, messages_pb2, messages_pb2_grpc
from sealpushd.fetch import rules
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.mailbox import Mailbox
from sealpushd.fetch.queues import Queues
from sealpushd.fetch.rules import Accepted, AckAnswer, NewMessage, Position, Taken, TakeQuery, Verdict
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.streams import UNACKNOWLEDGED_MAX, LiveStream, StreamHub
from sealpushd.fetch.wire import (
    parse_ack,
    parse_closed,
    parse_credits,
    parse_key,
    parse_lane,
    parse_message,
    parse_reports,
    timestamp,
    to_accepted,
    to_ack_result,
    to_delivery,
    to_event,
    to_queue,
    to_receipt,
    to_status,
    to_stopped,
    to_wake_up,
)
from sealpushd.platform import admission, fields, rpc
from sealpushd.platform.errors import InvalidRequest, NotFound, ServiceError, Unavailable
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc

log = structlog.get_logger()

PAGE_DEFAULT: Final = 64
PAGE_MAX: Final = 256
EVENTS_PAGE_DEFAULT: Final = 500
EVENTS_PAGE_MAX: Final = 1_000


def _now() -> Timestamp:
    return timestamp(datetime.now(UTC))


class MessagesServicer(messages_pb2_grpc.MessagesServicer):
    """What devices call."""

    def __init__(self, mailbox: Mailbox, hub: StreamHub) -> None:
        self._mailbox = mailbox
        self._hub = hub

    async def Fetch(self, request: messages_pb2.FetchRequest, context: Any) -> messages_pb2.FetchResponse:
        caller = rpc.require_device()
        wake_up_id = WakeUpId(fields.id16(request.wake_up_id, "wake_up_id"))
        taken = await self._mailbox.take(TakeQuery(caller.device_id, wake_up_id=wake_up_id))
        if not taken:
            raise NotFound("no open delivery of this device has this wake-up id; drain instead")
        return messages_pb2.FetchResponse(delivery=to_delivery(taken[0]), server_time=_now())

    async def Drain(self, request: messages_pb2.DrainRequest, context: Any) -> messages_pb2.DrainResponse:
        caller = rpc.require_device()
        most = fields.number(request.page_size, "page_size", PAGE_MAX) or PAGE_DEFAULT
        after = MessageId(fields.id16(request.page_token, "page_token")) if request.page_token else rules.BEFORE_ALL
        taken = await self._mailbox.take(TakeQuery(caller.device_id, after_id=after, most=most))
        more = rules.is_full(taken, most)
        return messages_pb2.DrainResponse(
            deliveries=[to_delivery(each) for each in taken],
            next_page_token=taken[-1].message_id if taken and more else b"",
            server_time=_now(),
        )

    async def Acknowledge(self, request: messages_pb2.AcknowledgeRequest, context: Any) -> messages_pb2.AcknowledgeResponse:
        answers = await self._acknowledge(request.acknowledgements)
        return messages_pb2.AcknowledgeResponse(results=[to_ack_result(answer) for answer in answers])

    async def _acknowledge(self, protos: Sequence[messages_pb2.Acknowledgement]) -> list[AckAnswer]:
        caller = rpc.require_device()
        fields.bounded(protos, "acknowledgements", UNACKNOWLEDGED_MAX)
        parsed = [parse_ack(proto, caller.device_id, caller.identity_public_key) for proto in protos]
        answers = iter(await self._mailbox.acknowledge([ack for ack in parsed if ack is not None]))
        return [
            next(answers) if ack is not None else AckAnswer(_echo(proto.message_id), Verdict.REFUSED, None)
            for proto, ack in zip(protos, parsed, strict=True)
        ]

    async def Stream(
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
                async with admission.turn(request.ByteSize()):
                    answers = await self._acknowledge(request.acknowledgements)
                stream.answered(answers)
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
            async with admission.turn():
                taken = await self._mailbox.take(TakeQuery(stream.device_id, after_id=after, most=most))
            stream.sent(each.message_id for each in taken)
            for frame in _frames(taken):
                yield _delivery_frame(frame)
            if not rules.is_full(taken, most):
                return
            after = taken[-1].message_id

    async def _take(self, stream: LiveStream, ids: Sequence[MessageId]) -> list[Taken]:
        if not ids:
            return []
        queries = [TakeQuery(stream.device_id, message_id=message_id) for message_id in ids]
        taken = [each for found in await self._mailbox.take_many(queries) for each in found]
        stream.gone(set(ids).difference(each.message_id for each in taken))
        return taken


def _echo(message_id: bytes) -> MessageId:
    """The id to name in a refusal: not what is none, which may be as long as a request."""
    return MessageId(message_id if len(message_id) == ID_BYTES else b"")


class StreamDone(ServiceError):
    """The device half-closed its stream: it ends without an error on the device's side."""

    reason = "STREAM_DONE"


def _answer_frame(answers: Sequence[AckAnswer]) -> messages_pb2.StreamResponse:
    return messages_pb2.StreamResponse(ack_results=[to_ack_result(answer) for answer in answers], server_time=_now())


def _delivery_frame(taken: Sequence[Taken]) -> messages_pb2.StreamResponse:
    return messages_pb2.StreamResponse(deliveries=[to_delivery(each) for each in taken], server_time=_now())


def _frames(taken: Sequence[Taken]) -> list[list[Taken]]:
    """Deliveries in frames of at most `TAKE_BYTES_MAX`."""
    frames: list[list[Taken]] = []
    size = rules.TAKE_BYTES_MAX
    for each in taken:
        weight = each.envelope_bytes
        if size + weight > rules.TAKE_BYTES_MAX:
            frames.append([])
            size = 0
        frames[-1].append(each)
        size += weight
    return frames


class MailboxServicer(mailbox_pb2_grpc.MailboxServicer):
    """What the other services call."""

    def __init__(self, mailbox: Mailbox, store: MailboxStore, leases: Leases, queues: Queues) -> None:
        self._mailbox = mailbox
        self._store = store
        self._leases = leases
        self._queues = queues

    async def LookupAccepted(self, request: mailbox_pb2.LookupAcceptedRequest, context: Any) -> mailbox_pb2.LookupAcceptedResponse:
        keys = fields.each(request.keys, "keys", parse_key)
        found = await self._mailbox.lookup_accepted(keys)
        return mailbox_pb2.LookupAcceptedResponse(results=[to_accepted(accepted, key) for accepted, key in zip(found, keys, strict=True)])

    async def Store(self, request: mailbox_pb2.StoreRequest, context: Any) -> mailbox_pb2.StoreResponse:
        parsed = fields.each_alone(request.messages, "messages", parse_message)
        refused = [each for each in parsed if isinstance(each, InvalidRequest)]
        if refused and not request.item_errors:
            # Before anything is stored.
            raise refused[0]
        answers = iter(await self._mailbox.store([each for each in parsed if not isinstance(each, InvalidRequest)]))
        outcomes = [each if isinstance(each, InvalidRequest) else _to_result(each, next(answers)) for each in parsed]
        failed = [each for each in outcomes if isinstance(each, Exception)]
        # Where PostgreSQL is away, that is no message's fault.
        if failed and (not request.item_errors or (len(failed) == len(parsed) and isinstance(failed[0], Unavailable))):
            raise failed[0]
        return mailbox_pb2.StoreResponse(
            results=[mailbox_pb2.StoreResult(refused=rpc.refused(each)) if isinstance(each, Exception) else each for each in outcomes]
        )

    async def WakeUpSession(
        self, request_iterator: AsyncIterator[mailbox_pb2.WakeUpSessionRequest], context: Any
    ) -> AsyncIterator[mailbox_pb2.WakeUpSessionResponse]:
        session = await self._leases.open()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    credits_, wrong_credits = parse_credits(request.credits)
                    for credit in credits_:
                        session.add_credit(*credit)
                    reports, wrong_reports = parse_reports(request.reports)
                    if reports:
                        session.add_reports(reports)
                    if wrong := wrong_credits + wrong_reports:
                        log.error("a dispatcher says what means nothing", items=len(wrong), field=wrong[0].field, error=wrong[0].message)
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
                yield mailbox_pb2.WakeUpSessionResponse(wake_ups=[to_wake_up(each) for each in wake_ups])
        except StreamDone:
            return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.write_last_reports()
            await self._leases.close(session)

    async def ReadEvents(self, request: mailbox_pb2.ReadEventsRequest, context: Any) -> AsyncIterator[mailbox_pb2.ReadEventsResponse]:
        position = await self._position(request)
        most = fields.number(request.page_size, "page_size", EVENTS_PAGE_MAX) or EVENTS_PAGE_DEFAULT
        # The first frame tells the reader that it misses nothing from here on.
        yield mailbox_pb2.ReadEventsResponse(position=position.encode())
        while True:
            self._mailbox.journal.check_open()
            events, position = await self._store.events(position, most)
            if events:
                yield mailbox_pb2.ReadEventsResponse(
                    events=[to_event(each) for each in events],
                    position=position.encode(),
                    caught_up=len(events) < most,
                )
            if len(events) < most:
                await self._mailbox.journal.wait()

    async def _position(self, request: mailbox_pb2.ReadEventsRequest) -> Position:
        """Where a reader begins."""
        if request.from_now:
            return await self._store.now_position()
        if not request.position:
            return await self._store.first_position()
        try:
            position = Position.decode(request.position)
        except ValueError as e:
            raise InvalidRequest(str(e), field="position") from e
        await self._store.check_position(position)
        return position

    async def GetStatuses(self, request: mailbox_pb2.MailboxGetStatusesRequest, context: Any) -> mailbox_pb2.MailboxGetStatusesResponse:
        sender_id = SenderId(fields.id16(request.sender_id, "sender_id"))
        ids = list(map(MessageId, fields.ids(request.message_ids, "message_ids")))
        records = await self._store.statuses(sender_id, ids)
        return mailbox_pb2.MailboxGetStatusesResponse(statuses=[to_status(record) for record in records])

    async def GetReceipts(self, request: mailbox_pb2.MailboxGetReceiptsRequest, context: Any) -> mailbox_pb2.MailboxGetReceiptsResponse:
        sender_id = SenderId(fields.id16(request.sender_id, "sender_id"))
        ids = list(map(MessageId, fields.ids(request.message_ids, "message_ids")))
        found = await self._store.evidence(sender_id, ids)
        return mailbox_pb2.MailboxGetReceiptsResponse(receipts=[to_receipt(each, sender_id) for each in found])

    async def Cancel(self, request: mailbox_pb2.MailboxCancelRequest, context: Any) -> mailbox_pb2.MailboxCancelResponse:
        sender_id = SenderId(fields.id16(request.sender_id, "sender_id"))
        ids = list(map(MessageId, fields.ids(request.message_ids, "message_ids")))
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

    async def Block(self, request: mailbox_pb2.BlockRequest, context: Any) -> mailbox_pb2.BlockResponse:
        ended = await self._store.block(
            fields.id16(request.subscriber_id, "subscriber_id"),
            SenderId(fields.id16(request.sender_id, "sender_id")),
            advertising_only=request.advertising_only,
        )
        self._mailbox.journal.written()
        return mailbox_pb2.BlockResponse(deliveries=to_stopped(ended))

    async def CloseDevices(self, request: mailbox_pb2.CloseDevicesRequest, context: Any) -> mailbox_pb2.CloseDevicesResponse:
        devices = dict(fields.each(request.devices, "devices", parse_closed))
        ended = await self._mailbox.close_devices(devices)
        return mailbox_pb2.CloseDevicesResponse(closed=len(ended))

    async def GetQueues(self, request: mailbox_pb2.GetQueuesRequest, context: Any) -> mailbox_pb2.GetQueuesResponse:
        return mailbox_pb2.GetQueuesResponse(queues=[to_queue(queue) for queue in await self._queues.look()])

    async def Requeue(self, request: mailbox_pb2.RequeueRequest, context: Any) -> mailbox_pb2.RequeueResponse:
        requeued, more = await self._queues.requeue(*parse_lane(request.app_id, request.platform))
        return mailbox_pb2.RequeueResponse(requeued=requeued, more=more)


def _to_result(message: NewMessage, answer: tuple[Accepted, bool] | Exception) -> mailbox_pb2.StoreResult | Exception:
    if isinstance(answer, Exception):
        return answer
    accepted, now = answer
    return mailbox_pb2.StoreResult(accepted=to_accepted(accepted, message.key), stored_now=now)
