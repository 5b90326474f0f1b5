"""gRPC of publishing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, Final

from sealpush.envelope import HEADER_BYTES
from sealpush.ids import MessageId, SenderId
from sealpush.v1 import publish_pb2, publish_pb2_grpc
from sealpushd.platform import admission, fields, rpc
from sealpushd.platform.errors import InvalidRequest, NotFound, ServiceError
from sealpushd.platform.tokens import SenderCaller
from sealpushd.publishing import rules
from sealpushd.publishing.acceptance import Acceptance, to_refusal
from sealpushd.publishing.peers import Peers
from sealpushd.publishing.rules import Wait
from sealpushd.publishing.watching import StatusWatch
from sealpushd.v1 import mailbox_pb2

# Frames of one stream that are worked on at once; more would only wait elsewhere.
FRAMES_IN_FLIGHT_MAX: Final = 8

_NO_SUCH_MESSAGE: Final = "this sender has no such message, or it is older than statuses are kept"


class PublishingServicer(publish_pb2_grpc.PublishingServicer):
    """What senders call."""

    def __init__(self, acceptance: Acceptance, watch: StatusWatch, peers: Peers) -> None:
        self._acceptance = acceptance
        self._watch = watch
        self._peers = peers

    async def Publish(self, request: publish_pb2.PublishRequest, context: Any) -> publish_pb2.PublishResponse:
        (outcome,) = await self._acceptance.accept(rpc.require_sender(), [request])
        if isinstance(outcome, ServiceError):
            raise outcome
        return publish_pb2.PublishResponse(result=outcome)

    async def PublishBatch(self, request: publish_pb2.PublishBatchRequest, context: Any) -> publish_pb2.PublishBatchResponse:
        results = await self._accept_all(rpc.require_sender(), request.requests, request.ByteSize())
        return publish_pb2.PublishBatchResponse(results=results)

    async def PublishStream(
        self, request_iterator: AsyncIterator[publish_pb2.PublishStreamRequest], context: Any
    ) -> AsyncIterator[publish_pb2.PublishStreamResponse]:
        caller = rpc.require_sender()
        done: asyncio.Queue[publish_pb2.PublishStreamResponse | Exception | None] = asyncio.Queue()
        # A frame holds its place until its results were taken: a sender that does not read them is not read either.
        room = asyncio.Semaphore(FRAMES_IN_FLIGHT_MAX)

        async def work(frame: publish_pb2.PublishStreamRequest) -> None:
            try:
                size = frame.ByteSize()
                async with admission.turn(size):
                    results = await self._accept_all(caller, frame.requests, size)
                done.put_nowait(publish_pb2.PublishStreamResponse(frame=frame.frame, results=results))
            except Exception as e:
                done.put_nowait(e)

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for frame in request_iterator:
                        await room.acquire()
                        group.create_task(work(frame))
            except ExceptionGroup as e:
                # Only what reading raised: the workers report their own.
                done.put_nowait(e.exceptions[0])
            else:
                done.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await done.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                room.release()
        finally:
            reader.cancel()

    async def _accept_all(
        self, caller: SenderCaller, requests: Sequence[publish_pb2.PublishRequest], size: int
    ) -> list[publish_pb2.PublishResult]:
        fields.bounded(requests, "requests", rules.BATCH_REQUESTS_MAX)
        if size > rules.BATCH_BYTES_MAX:
            raise InvalidRequest(f"a batch is at most {rules.BATCH_BYTES_MAX} bytes; split it", field="requests")
        outcomes = await self._acceptance.accept(caller, requests)
        return [
            to_refusal(request, outcome) if isinstance(outcome, ServiceError) else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    async def GetStatus(self, request: publish_pb2.GetStatusRequest, context: Any) -> publish_pb2.GetStatusResponse:
        caller = rpc.require_sender()
        message_id = MessageId(fields.id16(request.message_id, "message_id"))
        how, wait = rules.parse_wait(request)
        status = await self._status(caller.sender_id, message_id, wait)
        return publish_pb2.GetStatusResponse(status=rules.assume(status) if how is Wait.ASSUMED else status)

    async def _status(self, sender_id: SenderId, message_id: MessageId, wait: timedelta) -> publish_pb2.MessageStatus:
        last: publish_pb2.MessageStatus | None = None
        if not wait:
            found = await self._watch.statuses(sender_id, [message_id])
            last = found[0] if found else None
        else:
            # From here on it waits for what others do.
            admission.rest()
            try:
                async with asyncio.timeout(wait.total_seconds()):
                    async for statuses in self._watch.watch(sender_id, [message_id]):
                        last = statuses[-1] if statuses else last
            except TimeoutError:
                # The interval is over: what was seen last is the answer.
                if last is None:
                    raise
        if last is None:
            raise NotFound(_NO_SUCH_MESSAGE)
        return last

    async def GetStatuses(self, request: publish_pb2.GetStatusesRequest, context: Any) -> publish_pb2.GetStatusesResponse:
        caller = rpc.require_sender()
        statuses = await self._watch.statuses(caller.sender_id, _message_ids(request.message_ids))
        return publish_pb2.GetStatusesResponse(statuses=statuses)

    async def WatchStatus(self, request: publish_pb2.WatchStatusRequest, context: Any) -> AsyncIterator[publish_pb2.WatchStatusResponse]:
        caller = rpc.require_sender()
        async for statuses in self._watch.watch(caller.sender_id, _message_ids(request.message_ids)):
            yield publish_pb2.WatchStatusResponse(statuses=statuses)

    async def GetReceipt(self, request: publish_pb2.GetReceiptRequest, context: Any) -> publish_pb2.GetReceiptResponse:
        caller = rpc.require_sender()
        message_id = MessageId(fields.id16(request.message_id, "message_id"))
        receipt = await self._peers.evidence(caller.sender_id, message_id)
        if receipt is None:
            raise NotFound(_NO_SUCH_MESSAGE)
        identities = await self._peers.identities([each.device_id for each in receipt.deliveries])
        for each in receipt.deliveries:
            each.identity_public_key = identities.get(each.device_id, b"")
        if receipt.evidence:
            entries = await self._peers.certifying_entries(receipt.evidence[:HEADER_BYTES])
            receipt.sender_entry, receipt.platform_entry = entries.sender_entry, entries.platform_entry
        return publish_pb2.GetReceiptResponse(receipt=receipt)

    async def Cancel(self, request: publish_pb2.CancelRequest, context: Any) -> publish_pb2.CancelResponse:
        caller = rpc.require_sender()
        message_id = MessageId(fields.id16(request.message_id, "message_id"))
        answer = await self._peers.mailbox_channel.call(
            self._peers.mailbox.Cancel,
            mailbox_pb2.MailboxCancelRequest(sender_id=caller.sender_id, message_ids=[message_id]),
        )
        (result,) = answer.results
        if not result.found:
            raise NotFound(_NO_SUCH_MESSAGE)
        return publish_pb2.CancelResponse(state=result.state, deliveries=result.deliveries)


def _message_ids(values: Sequence[bytes]) -> list[MessageId]:
    return list(map(MessageId, fields.ids(values, "message_ids", rules.BATCH_REQUESTS_MAX, least=1)))
