"""Simulated iPhones for the benchmarks: the SDK's devices, woken by the simulated push service or on a live stream."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from bench.suite import Suite
from sealpush import Device, MemoryKeystore, Platform
from sealpush.device import Installation, Message
from sealpushd.up.vendors import APNS_TOPIC
from sealpushd.v1 import simulator_pb2, simulator_pb2_grpc

if TYPE_CHECKING:
    from sealpushd.v1.simulator_pb2_grpc import SimulatedPushAsyncStub, SimulatedSmsAsyncStub

_CODE = re.compile(r"\b(\d{6})\b")


@dataclass(frozen=True, slots=True)
class Phone:
    number: str
    push_token: str
    device: Device


class Phones:
    """Registered phones, one a number. `opened` gets a message as soon as its phone has opened and stored it."""

    def __init__(self, suite: Suite, phones: Sequence[Phone]) -> None:
        self._suite = suite
        self.phones = phones
        self.opened: asyncio.Queue[Message] = asyncio.Queue()

    @property
    def numbers(self) -> list[str]:
        return [phone.number for phone in self.phones]

    @classmethod
    @asynccontextmanager
    async def registered(cls, suite: Suite, count: int, *, pushed: bool = True) -> AsyncIterator[Phones]:
        """Phones that are fresh: their numbers are registered anew for each use and unregistered at its end.

        Not `pushed`: they have no push token, so that what is measured is accepting alone and not the pushes that follow.
        """
        async with grpc.aio.insecure_channel(suite.endpoints.simulators) as simulators:
            push = simulator_pb2_grpc.SimulatedPushStub(simulators)
            sms = simulator_pb2_grpc.SimulatedSmsStub(simulators)
            phones = [await _register(suite, push, sms, suite.next_number(), pushed=pushed) for _ in range(count)]
        try:
            yield cls(suite, phones)
        finally:
            for phone in phones:
                await phone.device.unregister()
                await phone.device.close()

    @asynccontextmanager
    async def woken(self) -> AsyncIterator[None]:
        """While open, pushes of the simulated service wake the phones, which fetch, open and acknowledge."""
        by_token = {phone.push_token: phone.device for phone in self.phones}
        waking: set[asyncio.Task[None]] = set()
        stop = asyncio.Event()
        connected = asyncio.Event()

        async def wake(device: Device, wake_up_id: str) -> None:
            for message in await device.on_wake(wake_up_id):
                self.opened.put_nowait(message)

        async def online() -> AsyncIterator[simulator_pb2.ConnectRequest]:
            apns = simulator_pb2.SIMULATED_PUSH_SERVICE_APNS
            yield simulator_pb2.ConnectRequest(push_service=apns, online_device_tokens=list(by_token))
            await stop.wait()

        async def listen(channel: grpc.aio.Channel) -> None:
            async for frame in simulator_pb2_grpc.SimulatedPushStub(channel).Connect(online()):
                if frame.HasField("presence"):
                    connected.set()
                for notification in frame.batch.notifications:
                    wake_up_id = json.loads(notification.payload)["id"]
                    task = asyncio.create_task(wake(by_token[notification.device_token], wake_up_id))
                    waking.add(task)
                    task.add_done_callback(waking.discard)

        async with grpc.aio.insecure_channel(self._suite.endpoints.simulators) as channel:
            listening = asyncio.create_task(listen(channel))
            try:
                await connected.wait()
                yield
            finally:
                stop.set()
                listening.cancel()
                await asyncio.gather(listening, *waking, return_exceptions=True)

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """While open, every phone holds a live stream."""
        ready = asyncio.Semaphore(0)

        async def hold(device: Device) -> None:
            async with device.stream() as stream:
                await stream.caught_up()
                ready.release()
                async for message in stream:
                    self.opened.put_nowait(message)

        tasks = [asyncio.create_task(hold(phone.device)) for phone in self.phones]
        try:
            for _ in tasks:
                await ready.acquire()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _register(suite: Suite, push: SimulatedPushAsyncStub, sms: SimulatedSmsAsyncStub, number: str, *, pushed: bool) -> Phone:
    # No one-time prekeys: what is measured here seals to signed prekeys.
    device = Device(
        suite.endpoints.app_id,
        suite.channels,
        MemoryKeystore(),
        root_public_key=bytes.fromhex(suite.endpoints.root_public_key),
        platform=Platform.IOS,
        one_time_prekeys=0,
    )
    request = simulator_pb2.CreateDeviceRequest(push_service=simulator_pb2.SIMULATED_PUSH_SERVICE_APNS, topic=APNS_TOPIC)
    token = (await push.CreateDevice(request)).device_token
    await device.start_registration(number)
    inbox = await sms.Inbox(simulator_pb2.InboxRequest(phone=number))
    code = _CODE.search(inbox.messages[-1].text)
    assert code is not None, "the message holds no code"
    await device.confirm(code[1], Installation(push_token=token if pushed else "", push_allowed_by_os=True, push_allowed_by_app=True))
    return Phone(number, token, device)
