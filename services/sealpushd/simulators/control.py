"""The gRPC side of the simulators: phones come online, tests script faults. Protobuf stops here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sealpushd.simulators.apns import ApnsSimulator
from sealpushd.simulators.core import (
    Answer,
    BlackHole,
    DeadToken,
    Delay,
    ExpiredProviderToken,
    Fault,
    FaultScope,
    GoAway,
    LostAnswer,
    Notification,
    PhoneLine,
    PushSimulator,
    Received,
)
from sealpushd.simulators.fcm import FcmSimulator
from sealpushd.simulators.hms import HmsSimulator
from sealpushd.simulators.sms import Sms, SmsSimulator, SmsWatcherTooSlow
from sealpushd.v1 import simulator_pb2 as pb
from sealpushd.v1.simulator_pb2_grpc import SimulatedPushServicer, SimulatedSmsServicer

PAGE_SIZE_MAX = 1_000
PAGE_SIZE_DEFAULT = 100
# As the proto says for a frame of Connect.
TOKENS_PER_FRAME_MAX = 10_000
# Frames of presence that may wait for a client that does not read.
PRESENCE_WAITING_MAX = 100

_Context = grpc.aio.ServicerContext[object, object]


SERVICES: Final[Mapping[type[PushSimulator], pb.SimulatedPushService.ValueType]] = {
    ApnsSimulator: pb.SIMULATED_PUSH_SERVICE_APNS,
    FcmSimulator: pb.SIMULATED_PUSH_SERVICE_FCM,
    HmsSimulator: pb.SIMULATED_PUSH_SERVICE_HMS,
}


class PushControlService(SimulatedPushServicer):
    """See SimulatedPush in the proto. One simulator a vendor, those that this process runs."""

    def __init__(self, running: Iterable[PushSimulator]) -> None:
        self._running = {SERVICES[type(simulator)]: simulator for simulator in running}

    async def CreateDevice(self, request: pb.CreateDeviceRequest, context: _Context) -> pb.CreateDeviceResponse:
        simulator = await self._named(request.push_service, context)
        try:
            return pb.CreateDeviceResponse(device_token=simulator.create_device(request.topic))
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except OverflowError as e:
            await _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(e))

    async def Connect(self, request_iterator: AsyncIterator[pb.ConnectRequest], context: _Context) -> AsyncIterator[pb.ConnectResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        line = (await self._named(first.push_service, context)).connect()
        presences: asyncio.Queue[pb.SimulatedPresence] = asyncio.Queue(PRESENCE_WAITING_MAX)
        reader = asyncio.create_task(_read_presence(first, request_iterator, line, presences))
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
        simulator = await self._named(request.push_service, context)
        if not simulator.uninstall(request.device_token):
            await _refuse(context, grpc.StatusCode.NOT_FOUND, "no app has this device token")
        return pb.UninstallAppResponse()

    async def RegisterCredential(self, request: pb.RegisterCredentialRequest, context: _Context) -> pb.RegisterCredentialResponse:
        simulator = await self._named(request.push_service, context)
        try:
            _register(simulator, request)
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        return pb.RegisterCredentialResponse()

    async def RevokeCredential(self, request: pb.RevokeCredentialRequest, context: _Context) -> pb.RevokeCredentialResponse:
        simulator = await self._named(request.push_service, context)
        if not simulator.revoke_credential(request.credential_id):
            await _refuse(context, grpc.StatusCode.NOT_FOUND, "no credential has this id")
        return pb.RevokeCredentialResponse()

    async def SetFault(self, request: pb.SetFaultRequest, context: _Context) -> pb.SetFaultResponse:
        simulator = await self._named(request.push_service, context)
        try:
            simulator.set_fault(
                _parse_fault(request.fault),
                scope=FaultScope.TOKENS if request.scope == pb.SIMULATED_FAULT_SCOPE_TOKENS else FaultScope.SENDS,
                requests=request.next_requests if request.HasField("next_requests") else None,
                duration=_timedelta(request.duration) if request.HasField("duration") else None,
                device_token=request.device_token if request.HasField("device_token") else None,
            )
        except ValueError as e:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(e))
        return pb.SetFaultResponse()

    async def ClearFaults(self, request: pb.ClearFaultsRequest, context: _Context) -> pb.ClearFaultsResponse:
        (await self._named(request.push_service, context)).clear_faults()
        return pb.ClearFaultsResponse()

    async def ListReceived(self, request: pb.ListReceivedRequest, context: _Context) -> pb.ListReceivedResponse:
        simulator = await self._named(request.push_service, context)
        if request.page_size > PAGE_SIZE_MAX or not (request.page_token or "0").isdecimal():
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"page_size is at most {PAGE_SIZE_MAX}")
        size = request.page_size or PAGE_SIZE_DEFAULT
        after = int(request.page_token or "0")
        page = list(islice((one for one in simulator.received if one.sequence > after), size + 1))
        more = len(page) > size
        page = page[:size]
        return pb.ListReceivedResponse(
            requests=[_to_received(one) for one in page],
            next_page_token=str(page[-1].sequence) if more else "",
        )

    async def Counters(self, request: pb.CountersRequest, context: _Context) -> pb.CountersResponse:
        counters = (await self._named(request.push_service, context)).counters
        # The record has the proto's names.
        return pb.CountersResponse(**asdict(counters))

    async def _named(self, push_service: pb.SimulatedPushService.ValueType, context: _Context) -> PushSimulator:
        """The simulator that a request names; ends the call when there is none."""
        if push_service not in SERVICES.values():
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "push_service is required: APNS, FCM or HMS")
        simulator = self._running.get(push_service)
        if simulator is None:
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "this process does not run that push service")
        return simulator


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
    first: pb.ConnectRequest,
    rest: AsyncIterator[pb.ConnectRequest],
    line: PhoneLine,
    presences: asyncio.Queue[pb.SimulatedPresence],
) -> str | None:
    """Bring phones online and offline as the client asks; closes the line at its end. Gives what was wrong."""
    request: pb.ConnectRequest | None = first
    try:
        while request is not None:
            if request.push_service not in (pb.SIMULATED_PUSH_SERVICE_UNSPECIFIED, first.push_service):
                return "one stream serves one push_service"
            if max(len(request.online_device_tokens), len(request.offline_device_tokens)) > TOKENS_PER_FRAME_MAX:
                return f"a frame names at most {TOKENS_PER_FRAME_MAX} device tokens"
            line.offline(request.offline_device_tokens)
            unknown = line.online(request.online_device_tokens)
            await presences.put(pb.SimulatedPresence(online=len(line), unknown_device_tokens=unknown))
            request = await anext(rest, None)
        return None
    finally:
        line.close()


async def _refuse(context: _Context, code: grpc.StatusCode, problem: str) -> NoReturn:
    await context.abort(code, problem)
    raise AssertionError("abort raises")


def _register(simulator: PushSimulator, request: pb.RegisterCredentialRequest) -> None:
    """Hand a credential to its simulator; raises ValueError when it is another vendor's or cannot be one."""
    match simulator, request.WhichOneof("credential"):
        case ApnsSimulator(), "apns_provider_key":
            key = request.apns_provider_key
            simulator.register_provider_key(key.team_id, key.key_id, key.public_key_pem.encode(), key.topics)
        case FcmSimulator(), "fcm_service_account":
            account = request.fcm_service_account
            pem = account.public_key_pem.encode()
            simulator.register_service_account(account.project_id, account.client_email, account.private_key_id, pem)
        case HmsSimulator(), "hms_client":
            client = request.hms_client
            simulator.register_client(client.app_id, client.client_secret, client.receipt_user, client.receipt_key)
        case _:
            raise ValueError("the credential is required and must be of the push_service")


def _parse_fault(fault: pb.SimulatedFault) -> Fault:
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


def _parse_answer(answer: pb.SimulatedAnswer) -> Answer:
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


def _to_received(received: Received) -> pb.ReceivedPushRequest:
    return pb.ReceivedPushRequest(
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
