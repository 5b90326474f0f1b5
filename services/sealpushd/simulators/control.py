"""The gRPC side of the simulators: phones come online, tests script faults. Protobuf stops here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sealpushd.simulators.apns import (
    Answer,
    ApnsSimulator,
    BlackHole,
    DeadToken,
    Delay,
    ExpiredProviderToken,
    Fault,
    GoAway,
    LostAnswer,
    Notification,
    PhoneLine,
    Received,
)
from sealpushd.simulators.sms import Sms, SmsSimulator, SmsWatcherTooSlow
from sealpushd.v1 import simulator_pb2 as pb
from sealpushd.v1.simulator_pb2_grpc import SimulatedApnsServicer, SimulatedSmsServicer

PAGE_SIZE_MAX = 1_000
PAGE_SIZE_DEFAULT = 100
# As the proto says for a frame of Connect.
TOKENS_PER_FRAME_MAX = 10_000
# Frames of presence that may wait for a client that does not read.
PRESENCE_WAITING_MAX = 100

_Context = grpc.aio.ServicerContext[object, object]


class ApnsControlService(SimulatedApnsServicer):
    """See SimulatedApns in the proto."""

    def __init__(self, apns: ApnsSimulator) -> None:
        self._apns = apns

    async def CreateDevice(self, request: pb.CreateDeviceRequest, context: _Context) -> pb.CreateDeviceResponse:
        try:
            return pb.CreateDeviceResponse(device_token=self._apns.create_device(request.topic))
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except OverflowError as e:
            await _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(e))

    async def Connect(self, request_iterator: AsyncIterator[pb.ConnectRequest], context: _Context) -> AsyncIterator[pb.ConnectResponse]:
        line = self._apns.connect()
        presences: asyncio.Queue[pb.SimulatedPresence] = asyncio.Queue(PRESENCE_WAITING_MAX)
        reader = asyncio.create_task(_read_presence(request_iterator, line, presences))
        next_presence = asyncio.create_task(presences.get())
        next_batch = asyncio.create_task(line.next_batch())
        try:
            while True:
                await asyncio.wait([next_presence, next_batch], return_when=asyncio.FIRST_COMPLETED)
                # The answer to a request comes before what it brings: a phone is online, then it gets its notification.
                if next_presence.done():
                    yield pb.ConnectResponse(presence=next_presence.result())
                    next_presence = asyncio.create_task(presences.get())
                    continue
                batch = next_batch.result()
                if not batch:
                    break
                notifications = [_to_notification(notification) for notification in batch]
                yield pb.ConnectResponse(batch=pb.SimulatedNotificationBatch(notifications=notifications))
                next_batch = asyncio.create_task(line.next_batch())
            # The client has ended its side, or sent what cannot be read: that is raised here.
            error = await reader
            if error is not None:
                await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        finally:
            line.close()
            for task in (reader, next_presence, next_batch):
                task.cancel()
            await asyncio.gather(reader, next_presence, next_batch, return_exceptions=True)

    async def UninstallApp(self, request: pb.UninstallAppRequest, context: _Context) -> pb.UninstallAppResponse:
        if not self._apns.uninstall(request.device_token):
            await _refuse(context, grpc.StatusCode.NOT_FOUND, "no app has this device token")
        return pb.UninstallAppResponse()

    async def RegisterProviderKey(self, request: pb.RegisterProviderKeyRequest, context: _Context) -> pb.RegisterProviderKeyResponse:
        try:
            public_key_pem = request.public_key_pem.encode()
            self._apns.register_provider_key(request.team_id, request.key_id, public_key_pem, request.topics)
        except ValueError:
            problem = "public_key_pem must be a PEM public key on P-256"
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, problem)
        return pb.RegisterProviderKeyResponse()

    async def SetFault(self, request: pb.SetFaultRequest, context: _Context) -> pb.SetFaultResponse:
        try:
            self._apns.set_fault(
                _parse_fault(request.fault),
                requests=request.next_requests if request.HasField("next_requests") else None,
                duration=_timedelta(request.duration) if request.HasField("duration") else None,
                device_token=request.device_token if request.HasField("device_token") else None,
            )
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        return pb.SetFaultResponse()

    async def ClearFaults(self, request: pb.ClearFaultsRequest, context: _Context) -> pb.ClearFaultsResponse:
        self._apns.clear_faults()
        return pb.ClearFaultsResponse()

    async def ListReceived(self, request: pb.ListReceivedRequest, context: _Context) -> pb.ListReceivedResponse:
        if request.page_size > PAGE_SIZE_MAX or not (request.page_token or "0").isdecimal():
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"page_size is at most {PAGE_SIZE_MAX}")
        size = request.page_size or PAGE_SIZE_DEFAULT
        after = int(request.page_token or "0")
        page = list(islice((one for one in self._apns.received if one.sequence > after), size + 1))
        more = len(page) > size
        page = page[:size]
        return pb.ListReceivedResponse(
            requests=[_to_received(one) for one in page],
            next_page_token=str(page[-1].sequence) if more else "",
        )

    async def Counters(self, request: pb.CountersRequest, context: _Context) -> pb.CountersResponse:
        counters = self._apns.counters
        return pb.CountersResponse(
            connections=counters.connections,
            requests=counters.requests,
            accepted=counters.accepted,
            refused=counters.refused,
            delivered=counters.delivered,
            dropped=counters.dropped,
            early_streams=counters.early_streams,
            provider_tokens=counters.provider_tokens,
        )


class SmsControlService(SimulatedSmsServicer):
    """See SimulatedSms in the proto."""

    def __init__(self, sms: SmsSimulator) -> None:
        self._sms = sms

    async def Deliver(self, request: pb.DeliverRequest, context: _Context) -> pb.DeliverResponse:
        try:
            sms = self._sms.deliver(request.phone, request.text, request.sender_name)
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        return pb.DeliverResponse(sms_id=sms.sms_id)

    async def Inbox(self, request: pb.InboxRequest, context: _Context) -> pb.InboxResponse:
        try:
            return pb.InboxResponse(messages=[_to_sms(sms) for sms in self._sms.inbox(request.phone)])
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))

    async def WatchInbox(self, request: pb.WatchInboxRequest, context: _Context) -> AsyncIterator[pb.WatchInboxResponse]:
        try:
            async for sms in self._sms.watch(request.phone):
                yield pb.WatchInboxResponse(message=_to_sms(sms))
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except SmsWatcherTooSlow:
            await _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "read faster, or read the inbox and watch again")


async def _read_presence(
    requests: AsyncIterator[pb.ConnectRequest], line: PhoneLine, presences: asyncio.Queue[pb.SimulatedPresence]
) -> str | None:
    """Bring phones online and offline as the client asks; closes the line at its end. Gives what was wrong."""
    try:
        async for request in requests:
            if max(len(request.online_device_tokens), len(request.offline_device_tokens)) > TOKENS_PER_FRAME_MAX:
                return f"a frame names at most {TOKENS_PER_FRAME_MAX} device tokens"
            line.offline(request.offline_device_tokens)
            unknown = line.online(request.online_device_tokens)
            await presences.put(pb.SimulatedPresence(online=len(line), unknown_device_tokens=unknown))
        return None
    finally:
        line.close()


async def _refuse(context: _Context, code: grpc.StatusCode, problem: str) -> NoReturn:
    await context.abort(code, problem)
    raise AssertionError("abort raises")


def _parse_fault(fault: pb.ApnsFault) -> Fault:
    match fault.WhichOneof("kind"):
        case "answer":
            return _parse_answer(fault.answer)
        case "delay":
            return Delay(_timedelta(fault.delay))
        case "black_hole":
            return BlackHole()
        case "lost_answer":
            return LostAnswer()
        case "goaway_reason":
            return GoAway(fault.goaway_reason)
        case "dead_token":
            return DeadToken()
        case "expired_provider_token":
            return ExpiredProviderToken()
        case _:
            raise ValueError("fault.kind is required")


def _parse_answer(answer: pb.ApnsAnswer) -> Answer:
    if not 200 <= answer.status <= 599:
        raise ValueError("answer.status must be 200 to 599")
    return Answer(
        status=answer.status,
        reason=answer.reason if answer.HasField("reason") else None,
        retry_after=_timedelta(answer.retry_after) if answer.HasField("retry_after") else None,
        raw_body=answer.raw_body if answer.HasField("raw_body") else None,
        timestamp=answer.timestamp.ToDatetime(UTC) if answer.HasField("timestamp") else None,
        truncated=answer.truncated,
    )


def _to_notification(notification: Notification) -> pb.SimulatedNotification:
    return pb.SimulatedNotification(device_token=notification.device_token, headers=notification.headers, payload=notification.payload)


def _to_received(received: Received) -> pb.ReceivedApnsRequest:
    return pb.ReceivedApnsRequest(
        at=_timestamp(received.at),
        path=received.request.path,
        headers=_to_headers(received),
        body=received.request.body,
        status=received.status,
        reason=received.reason,
        connection=received.connection,
    )


def _to_headers(received: Received) -> Iterator[pb.ReceivedHeader]:
    return (pb.ReceivedHeader(name=name, value=value) for name, value in received.request.headers)


def _to_sms(sms: Sms) -> pb.SimulatedSmsMessage:
    return pb.SimulatedSmsMessage(sms_id=sms.sms_id, phone=sms.phone, text=sms.text, sender_name=sms.sender_name, at=_timestamp(sms.at))


def _timedelta(duration: Duration) -> timedelta:
    return duration.ToTimedelta()


def _timestamp(at: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp
