"""Simulated phones: the SDK's Device over a keystore in the data directory, woken by the simulated push services.

They do what an app does and nothing else. Phone 1, an iPhone, is in use: its app is open and holds a stream. Phones 2 (iPhone),
4 (Android) and 5 (Huawei) lie on the table: they hear of a message only when a push wakes them. All four belong to one person. Phone 3
is another person's, switched off and never allowed to receive pushes. What is sealed to phone 4 holds against a quantum computer too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import structlog

from sealpush.device import Device, Installation, Message
from sealpush.errors import KeystoreError, Overloaded, SealpushError, Unauthenticated
from sealpush.ids import MessageId
from sealpush.model import PushEnvironment
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.transport import Channels, cancellation_kept
from sealpushd.platform.clients import NO_PROXY
from sealpushd.platform.outage import Outage
from sealpushd.up.demo import OFFLINE_PHONE
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError
from sealpushd.up.sdk import public_endpoints
from sealpushd.up.vendors import APNS, FCM, HMS, Vendor
from sealpushd.v1 import simulator_pb2 as simulator
from sealpushd.v1.simulator_pb2_grpc import SimulatedPushStub, SimulatedSmsStub

if TYPE_CHECKING:
    from sealpushd.v1.simulator_pb2_grpc import SimulatedPushAsyncStub, SimulatedSmsAsyncStub

log = structlog.get_logger()

_PUSH_SERVICES: Final = {
    "apns": simulator.SIMULATED_PUSH_SERVICE_APNS,
    "fcm": simulator.SIMULATED_PUSH_SERVICE_FCM,
    "hms": simulator.SIMULATED_PUSH_SERVICE_HMS,
}

_CODE_TIMEOUT_S: Final = 20.0
_CODE = re.compile(r"\b(\d{4,8})\b")
_RETRY_FIRST_S: Final = 0.2
_RETRY_MAX_S: Final = 3.0
_ONLINE_TIMEOUT_S: Final = 20.0
# What is kept of the past for the show; the messages themselves are in the phone's keystore.
_REMEMBERED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Shown:
    """A message that a phone showed, when (monotonic), and what brought it."""

    message: Message
    at: float
    brought_by: str


@dataclass(slots=True)
class Handset:
    """One phone."""

    name: str
    number: str
    vendor: Vendor
    device: Device
    keystore: SqliteKeystore = field(repr=False)
    # Of its prekeys.
    suite: int
    shown: dict[MessageId, Shown] = field(default_factory=dict)
    # What the push service handed to this phone: the payloads as received.
    pushes: list[bytes] = field(default_factory=list, repr=False)
    online: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def show(self, messages: Sequence[Message], brought_by: str) -> None:
        for message in messages:
            if message.message_id in self.shown:
                log.error("a message was shown twice", phone=self.name)
            if len(self.shown) >= _REMEMBERED_MAX:
                del self.shown[next(iter(self.shown))]
            self.shown[message.message_id] = Shown(message, time.monotonic(), brought_by)
        async with self.changed:
            self.changed.notify_all()

    async def wait_for(self, message_id: MessageId, timeout_s: float) -> Shown | None:
        """The message once the phone shows it; None when it does not in time."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.changed.wait_for(lambda: message_id in self.shown)
        return self.shown.get(message_id)


@dataclass(frozen=True, slots=True)
class Handsets:
    in_use: Handset
    asleep: tuple[Handset, ...]
    switched_off: Handset

    @property
    def reachable(self) -> tuple[Handset, ...]:
        """Those that can receive: all of one person."""
        return (self.in_use, *self.asleep)


@asynccontextmanager
async def open_phones(endpoints: Endpoints, data_dir: Path) -> AsyncIterator[Handsets]:
    """The phones, registered and online, until the end of the block. Raises UpError, SealpushError."""
    folder = data_dir / "phones"
    folder.mkdir(mode=0o700, exist_ok=True)
    async with (
        Channels(public_endpoints(endpoints)) as channels,
        grpc.aio.insecure_channel(endpoints.simulators, options=[NO_PROXY, ("grpc.max_reconnect_backoff_ms", 500)]) as simulators,
        contextlib.AsyncExitStack() as stack,
    ):
        push, sms = SimulatedPushStub(simulators), SimulatedSmsStub(simulators)

        def handset(name: str, number: str, vendor: Vendor, suite: int = SUITE_X25519) -> Handset:
            file = folder / f"{name.replace(' ', '-')}.sqlite"
            try:
                keystore = stack.enter_context(SqliteKeystore(file))
            except KeystoreError as e:
                raise UpError(f"{file} cannot be used ({e}). Remove {folder}: the phones then register anew.") from e
            root = bytes.fromhex(endpoints.root_public_key)
            device = Device(endpoints.app_id, channels, keystore, root_public_key=root, platform=vendor.platform, suite=suite)
            return Handset(name, number, vendor, device, keystore, suite)

        phones = Handsets(
            handset("phone 1", endpoints.phone, APNS),
            (
                handset("phone 2", endpoints.phone, APNS),
                handset("phone 4", endpoints.phone, FCM, SUITE_HYBRID),
                handset("phone 5", endpoints.phone, HMS),
            ),
            handset("phone 3", OFFLINE_PHONE, APNS),
        )
        pushed = [_Pushed(phone, push) for phone in phones.reachable]

        async def register_all() -> None:
            # One after the other: the number gets one code at a time.
            for each in pushed:
                await _register(each.phone, sms, await each.new_token())

        await _all(register_all(), _register(phones.switched_off, sms, ""))
        streaming = asyncio.Event()
        tasks = [asyncio.create_task(each.run(), name=f"pushes of {each.phone.name}") for each in pushed]
        tasks.append(asyncio.create_task(_stream(phones.in_use, streaming), name=f"stream of {phones.in_use.name}"))
        try:
            try:
                async with asyncio.timeout(_ONLINE_TIMEOUT_S):
                    await asyncio.gather(streaming.wait(), *(phone.online.wait() for phone in phones.reachable))
            except TimeoutError as e:
                raise UpError(f"the simulated phones do not come online: look into {data_dir / 'log'}") from e
            yield phones
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _all(*works: Awaitable[object]) -> None:
    """All of them; the first error ends the others and is raised itself."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pushed_with(phone: Handset, push_token: str) -> Installation:
    """What the service must know to push to the phone."""
    environment = PushEnvironment.SANDBOX if phone.vendor is APNS else PushEnvironment.PRODUCTION
    return Installation(push_token=push_token, push_environment=environment, push_topic=phone.vendor.topic)


async def _register(phone: Handset, sms: SimulatedSmsAsyncStub, push_token: str) -> None:
    """Register the phone, or, where it is registered already, tell its new push token."""
    installation = replace(
        _pushed_with(phone, push_token), push_allowed_by_os=bool(push_token), push_allowed_by_app=True, app_version="1.0.0", locale="en"
    )
    if await phone.device.registration() is not None:
        try:
            await phone.device.update_installation(installation)
            return
        except Unauthenticated:
            # The server's data went, the phone's stayed. An app would ask its user to sign in again; so does this one.
            log.warning("the server does not know this phone any more: it registers anew", phone=phone.name)
    before = {each.sms_id for each in (await sms.Inbox(simulator.InboxRequest(phone=phone.number))).messages}
    while True:
        try:
            await phone.device.start_registration(phone.number)
            break
        except Overloaded as e:
            # A run that was killed here asked for a code a moment ago.
            await asyncio.sleep(min(e.retry_after_s or 1.0, 60.0))
    await phone.device.confirm(await _code(sms, phone.number, before), installation)


async def _code(sms: SimulatedSmsAsyncStub, number: str, before: set[str]) -> str:
    """The code in the next SMS, as a person would read it."""
    call = sms.WatchInbox(simulator.WatchInboxRequest(phone=number))
    try:
        async with asyncio.timeout(_CODE_TIMEOUT_S):
            async for each in call:
                found = _CODE.search(each.message.text)
                if each.message.sms_id not in before and found:
                    return found[1]
    except TimeoutError:
        pass
    finally:
        call.cancel()
    raise UpError("no SMS with a one-time code came to the simulated inbox: look into the logs of registration and simulators")


async def _stream(phone: Handset, caught_up: asyncio.Event) -> None:
    """The open app: messages as they come."""
    pause = _RETRY_FIRST_S
    outage = Outage("stream", gone="the stream ended and begins anew", back="the stream goes on", phone=phone.name)
    while True:
        try:
            async with phone.device.stream(retake=True) as messages:
                await messages.caught_up()
                caught_up.set()
                pause = _RETRY_FIRST_S
                outage.worked()
                async for message in messages:
                    await phone.show([message], "live stream")
        except (SealpushError, grpc.aio.AioRpcError) as e:
            outage.failed(e)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)


class _Pushed:
    """The phone's side of the push service: a token, and pushes that wake the app."""

    def __init__(self, phone: Handset, push: SimulatedPushAsyncStub) -> None:
        self.phone = phone
        self._push = push
        self._push_service = _PUSH_SERVICES[phone.vendor.kind]
        self._token = ""
        # Whether the registration service has this token.
        self._registered = True
        self._pushes = Outage(
            "push service", gone="the push service went away; the phone connects again", back="the push service is back", phone=phone.name
        )
        self._asking = Outage(
            "asking", gone="could not ask for messages; tries again", back="messages are answered for again", phone=phone.name
        )

    async def new_token(self) -> str:
        request = simulator.CreateDeviceRequest(push_service=self._push_service, topic=self.phone.vendor.topic)
        made = await self._push.CreateDevice(request, wait_for_ready=True, timeout=20)
        self._token = made.device_token
        return self._token

    async def run(self) -> None:
        """Until cancelled. A push service that was started anew knows no tokens: the phone then gets another one."""
        pause = _RETRY_FIRST_S
        while True:
            try:
                if not self._registered:
                    await self.new_token()
                    await self.phone.device.update_installation(_pushed_with(self.phone, self._token))
                    self._registered = True
                    pause = _RETRY_FIRST_S
                self._registered = await self._connected()
            except (grpc.aio.AioRpcError, SealpushError) as e:
                self._pushes.failed(e)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)

    async def _connected(self) -> bool:
        """Receive pushes until the connection ends; whether the token is still good. Raises AioRpcError."""
        call = self._push.Connect()
        wakes: set[asyncio.Task[None]] = set()
        try:
            with cancellation_kept():
                await call.write(simulator.ConnectRequest(push_service=self._push_service, online_device_tokens=[self._token]))
                async for response in call:
                    if response.WhichOneof("frame") == "presence":
                        if response.presence.unknown_device_tokens:
                            return False
                        self.phone.online.set()
                        self._pushes.worked()
                        # What was pushed while nobody listened is not pushed again: an app looks when it starts.
                        work = asyncio.create_task(self._catch_up())
                        wakes.add(work)
                        work.add_done_callback(wakes.discard)
                    for notification in response.batch.notifications:
                        self.phone.pushes.append(notification.payload)
                        work = asyncio.create_task(self._wake(notification.payload))
                        wakes.add(work)
                        work.add_done_callback(wakes.discard)
            return True
        finally:
            call.cancel()
            for work in wakes:
                work.cancel()
            await asyncio.gather(*wakes, return_exceptions=True)

    async def _wake(self, payload: bytes) -> None:
        messages: Sequence[Message] = ()
        try:
            messages = await self.phone.device.on_wake(json.loads(payload).get("id"))
            await self.phone.show(messages, "push")
        except SealpushError as e:
            self._asking.failed(e)
        if not messages:
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Ask until there was an answer: the system wakes an app again later when its first try failed."""
        pause = _RETRY_FIRST_S
        while True:
            try:
                await self.phone.show(await self.phone.device.drain(), "asking")
                self._asking.worked()
                return
            except SealpushError as e:
                self._asking.failed(e)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)
