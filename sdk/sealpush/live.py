"""Messages as they come: a stream that is kept going, and its connections (deliveries down, acknowledgements up)."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Final, Self

import grpc

from sealpush import errors
from sealpush.acknowledging import ACKS_BATCH_MAX, Acknowledgements, is_final
from sealpush.errors import CallFailed, KeystoreBusy, StreamTakenOver
from sealpush.ids import MessageId, uuid7
from sealpush.inbox import Inbox, Message
from sealpush.keystore import PendingAcknowledgement
from sealpush.local import Held, ServerTime, Trouble
from sealpush.receiving import Receiver
from sealpush.session import CALL_DEADLINE_S, Session
from sealpush.transport import call_failed, call_metadata
from sealpush.upkeep import Upkeep
from sealpush.v1 import messages_pb2

HOUSEKEEPING_S: Final = 3600.0

# What a write raises on a call that has ended.
_CALL_ENDED: Final = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
_StreamCall = grpc.aio.StreamStreamCall[messages_pb2.StreamRequest, messages_pb2.StreamResponse]


class MessageStream:
    """Messages as they come. Made by `Device.stream()`; raises there what `Device.run_stream()` would."""

    def __init__(self, inbox: Inbox, session: Session, trouble: Trouble, caught_up: asyncio.Event) -> None:
        self._inbox = inbox
        self._session = session
        self._trouble = trouble
        self._caught_up = caught_up
        self._failure: Exception | None = None
        self._backlog_came = False

    def failed(self, error: Exception) -> None:
        """Note what ended the stream: it comes after what was received before, and to whoever waits for a backlog that had not come."""
        self._failure = error
        self._backlog_came = self._caught_up.is_set()
        self._caught_up.set()
        self._inbox.arrived()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        attempt = 0
        while True:
            # Both before the look: what comes during it is found by the next one.
            arrival, failure = self._inbox.arrival, self._failure
            try:
                for message in await self._inbox.hand_over(limit=1):
                    return message
            except KeystoreBusy as busy:
                self._trouble.note(busy)
                await self._session.pause(attempt)
                attempt += 1
                continue
            if failure is not None:
                raise failure
            await arrival.wait()

    async def caught_up(self) -> None:
        """Return once everything that had waited at the service has come. Raises what ended the stream before."""
        await self._caught_up.wait()
        if self._failure is not None and not self._backlog_came:
            raise self._failure


class Live:
    """A device's streams. The service keeps one at a time; what it holds is tried again while one lasts."""

    def __init__(
        self,
        session: Session,
        receiver: Receiver,
        acknowledgements: Acknowledgements,
        inbox: Inbox,
        upkeep: Upkeep,
        time: ServerTime,
        trouble: Trouble,
    ) -> None:
        self._session = session
        self._receiver = receiver
        self._acknowledgements = acknowledgements
        self._inbox = inbox
        self._upkeep = upkeep
        self._time = time
        self._trouble = trouble
        self.held: dict[MessageId, messages_pb2.Delivery] = {}

    @contextlib.asynccontextmanager
    async def messages(self, *, retake: bool) -> AsyncIterator[MessageStream]:
        """A stream to iterate over, while the block lasts."""
        caught_up = asyncio.Event()

        async def run() -> None:
            try:
                await self._keep_connected(caught_up, retake=retake)
            except Exception as error:
                stream.failed(error)

        stream = MessageStream(self._inbox, self._session, self._trouble, caught_up)
        task = asyncio.create_task(run(), name="sealpush-stream")
        try:
            yield stream
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_connected(self, caught_up: asyncio.Event, *, retake: bool) -> None:
        """Keep one stream going: connect, take what comes, connect again after a pause with full jitter."""
        attempt = 0
        refused_token = False
        while True:
            connection = self._connection(caught_up)
            pause_s: float | None = None
            try:
                bearer = await self._session.bearer(self._session.deadline())
                await connection.run(bearer)
            except grpc.aio.AioRpcError as error:
                failure = call_failed(error)
                self._trouble.note(failure)
                pause_s = failure.retry_after_s
                if isinstance(failure, errors.Aborted):
                    if not retake:
                        raise StreamTakenOver(
                            "another stream of this device took over; this one has ended, pass retake=True to take it back"
                        ) from error
                    connection.progressed = False  # two that take from each other slow each other down
                elif isinstance(failure, errors.Unauthenticated):
                    self._session.drop(bearer)
                    if not refused_token or connection.progressed:
                        refused_token = True
                        continue
                    raise failure from error
                elif isinstance(failure, errors.PermissionDenied | errors.InvalidRequest | errors.FailedPrecondition):
                    raise failure from error
            except CallFailed as failure:
                self._trouble.note(failure)
                pause_s = failure.retry_after_s
                if not failure.retryable and not isinstance(failure, errors.ServerFault):
                    raise
            except KeystoreBusy as busy:
                self._trouble.note(busy)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and not task.cancelling():
                    # gRPC ends the calls of channels that are closed as if somebody had cancelled whoever waits for them.
                    self._session.channels.check_open()
                raise
            if connection.progressed:
                attempt = 0
                refused_token = False
            await self._session.pause(attempt, pause_s)
            attempt += 1

    def _connection(self, caught_up: asyncio.Event) -> "_Connection":
        return _Connection(
            session=self._session,
            receiver=self._receiver,
            uplink=_Uplink(self._acknowledgements),
            upkeep=self._upkeep,
            time=self._time,
            held=self.held,
            caught_up=caught_up,
        )


class _Uplink:
    """The acknowledgements of one connection: sent once each, forgotten when answered."""

    def __init__(self, acknowledgements: Acknowledgements) -> None:
        self._acknowledgements = acknowledgements
        self._owing = asyncio.Event()
        self._owing.set()  # what an earlier connection or crash left
        # Nothing is written before the service has spoken: a refusal that meets a write loses its status (in gRPC).
        self._open = asyncio.Event()
        # Sent up this connection and not answered yet, by message, in the order sent.
        self._sent: dict[MessageId, deque[PendingAcknowledgement]] = {}
        # What the store says is owed and what was sent are read and changed together, or an answer between sends it twice.
        self._ledger = asyncio.Lock()

    def spoken(self) -> None:
        """The service has spoken."""
        self._open.set()

    def owing(self) -> None:
        """There may be something more to send."""
        self._owing.set()

    async def answered(self, results: Iterable[messages_pb2.AckResult]) -> None:
        """Forget what the service has answered. What it did not judge stays owed, and goes up the next connection."""
        async with self._ledger:
            answered: list[PendingAcknowledgement] = []
            for result in results:
                sent = self._sent.get(MessageId(result.message_id))
                if sent and is_final(result):
                    answered.append(sent.popleft())
                    if not sent:
                        del self._sent[answered[-1].message_id]
            if answered:
                await self._acknowledgements.answered(answered)
                self._owing.set()

    async def write(self, call: _StreamCall) -> None:
        """Send what is owed; what comes meanwhile gathers in the store and goes together with the next write."""
        await self._open.wait()
        while True:
            await self._owing.wait()
            self._owing.clear()
            async with self._ledger:
                owed = await self._acknowledgements.owed()
                fresh = [each for each in owed if each not in self._sent.get(each.message_id, ())][:ACKS_BATCH_MAX]
                for each in fresh:
                    self._sent.setdefault(each.message_id, deque()).append(each)
            if fresh:
                await call.write(messages_pb2.StreamRequest(acknowledgements=map(self._acknowledgements.signed, fresh)))
                self._owing.set()


class _Connection:
    """One connection of a stream."""

    def __init__(
        self,
        *,
        session: Session,
        receiver: Receiver,
        uplink: _Uplink,
        upkeep: Upkeep,
        time: ServerTime,
        held: dict[MessageId, messages_pb2.Delivery],
        caught_up: asyncio.Event,
    ) -> None:
        self._session = session
        self._receiver = receiver
        self._uplink = uplink
        self._upkeep = upkeep
        self._time = time
        self._held = held
        self._caught_up = caught_up
        self._waking = asyncio.Event()
        self.progressed = False

    async def run(self, bearer: str) -> None:
        """Until the stream ends. Raises AioRpcError as the call ended, or what the store or the device raised."""
        call = self._session.channels.messages.Stream(metadata=call_metadata(bearer, uuid7().hex()))
        reader = asyncio.create_task(self._read(call), name="sealpush-stream-read")
        others = [
            asyncio.create_task(self._uplink.write(call), name="sealpush-stream-write"),
            asyncio.create_task(self._keep_house(), name="sealpush-stream-upkeep"),
        ]
        try:
            await asyncio.wait([reader, *others], return_when=asyncio.FIRST_COMPLETED)
            for task in others:
                # A write fails because the call ended: the reader knows how. Anything else is the store's.
                if task.done() and not isinstance(task.exception(), _CALL_ENDED):
                    task.result()
            await reader
        finally:
            call.cancel()
            for task in (reader, *others):
                task.cancel()
            await asyncio.gather(reader, *others, return_exceptions=True)

    async def _read(self, call: _StreamCall) -> None:
        async for frame in call:
            self.progressed = True
            self._uplink.spoken()
            await self._time.learn(frame.server_time)
            await self._uplink.answered(frame.ack_results)
            for delivery in frame.deliveries:
                await self._take(delivery)
            if frame.backlog_done:
                self._caught_up.set()

    async def _take(self, delivery: messages_pb2.Delivery) -> None:
        message_id = MessageId(delivery.message_id)
        try:
            await self._receiver.take(delivery, self._session.deadline())
        except Held:
            if len(self._held) < ACKS_BATCH_MAX:
                self._held[message_id] = delivery
                self._waking.set()
            return
        self._held.pop(message_id, None)
        self._uplink.owing()
        if self._upkeep.is_hastened:
            self._waking.set()

    async def _keep_house(self) -> None:
        """Try again what is held, and do what is due daily."""
        attempt = 0
        while True:
            await self._upkeep.do_if_due(self._session.deadline(), CALL_DEADLINE_S)
            if self._session.ended:  # nothing comes down this stream any more: raise that, instead of waiting for ever
                await self._session.bearer(self._session.deadline())
            if not self._held:
                attempt = 0
                self._waking.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HOUSEKEEPING_S):
                        await self._waking.wait()
                continue
            await self._session.pause(attempt)
            attempt += 1
            for delivery in list(self._held.values()):
                await self._take(delivery)
