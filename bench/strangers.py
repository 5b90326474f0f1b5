"""What strangers, and a crowd, cost a service: its memory at rest and at its most, and how long what they sent was held.

Value and floor are the resident memory of the service's process, in MB; `held_s` is the time from the last byte sent until the service had
ended everything that a stranger had begun.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from bench.stranger import Stranger
from bench.suite import Suite
from sealpush.ids import DeviceId, SubscriberId, uuid7
from sealpush.v1 import messages_pb2_grpc
from sealpushd.platform.tokens import DeviceCaller, ServiceKey

CONNECTIONS: Final = 500
STREAMS: Final = 2_000
# Streams that one connection of a public listener may have.
STREAMS_A_CONNECTION: Final = 512
# Just below what publishing takes, and what registration takes.
LONG_BYTES: Final = 3_000_000
SHORT_BYTES: Final = 65_000
NEEDS_NONE: Final = "/sealpush.v1.Registration/GetChallenge"
# How long one request is pushed, and how many at a time.
SEND_S: Final = 5.0
SENDING: Final = 16
# Above this nobody waits; what is still there then "lasts".
HELD_S_MAX: Final = 100.0


@dataclass(slots=True)
class Memory:
    """Of one process, looked at as it goes."""

    pid: int
    at_rest: float
    most: float

    def look(self) -> float:
        line = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        now = int(line.split()[1]) / 1000
        self.most = max(self.most, now)
        return now


@asynccontextmanager
async def _memory(suite: Suite, service: str) -> AsyncIterator[Memory]:
    """Of a service; looked at all the time while open."""
    (pid,) = (pid for pid, name in suite.processes().items() if name == service)
    memory = Memory(pid, 0.0, 0.0)
    memory.at_rest = memory.look()

    async def watch() -> None:
        while True:
            memory.look()
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield memory
    finally:
        watching.cancel()


def _figure(name: str, memory: Memory, held_s: float | None, **more: Any) -> dict[str, Any]:
    return {
        "figure": name,
        "unit": "MB at the most",
        "value": round(memory.most, 1),
        "floor": "at rest",
        "floor_value": round(memory.at_rest, 1),
        "ratio": round(memory.most / memory.at_rest, 2),
        "held_s": "lasts" if held_s is None else round(held_s, 1),
        **more,
    }


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    return [
        await _half_sent(
            suite, short, "half-sent bodies without a token", "publishing", "/sealpush.v1.Publishing/PublishBatch", LONG_BYTES
        ),
        await _half_sent(suite, short, "half-sent to a call that needs none, long", "registration", NEEDS_NONE, LONG_BYTES),
        await _half_sent(
            suite, short, "half-sent to a call that needs none, short", "registration", NEEDS_NONE, SHORT_BYTES, connections=4
        ),
        await _idle(suite, 10 if short else CONNECTIONS, wait_s=0.0 if short else HELD_S_MAX),
        await _crowd(suite, 20 if short else STREAMS),
    ]


def _port(suite: Suite, service: str) -> int:
    return int(suite.endpoints.public[service].rpartition(":")[2])


async def _half_sent(
    suite: Suite, short: bool, name: str, service: str, method: str, request_bytes: int, connections: int = 1
) -> dict[str, Any]:
    """Every stream that the connections may have, and on each all of a request but its last byte."""
    turns = asyncio.Semaphore(SENDING)

    async def send(stranger: Stranger, stream: int) -> None:
        with suppress(TimeoutError):
            async with turns, asyncio.timeout(SEND_S):
                await stranger.send(stream, says=request_bytes, sends=request_bytes - 1)

    async with _memory(suite, service) as memory, AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(Stranger.at(_port(suite, service), suite.endpoints.ca)) for _ in range(connections)]
        calls = [(stranger, await stranger.call(method)) for stranger in strangers for _ in range(4 if short else STREAMS_A_CONNECTION)]
        await asyncio.gather(*(send(*call) for call in calls))
        answers = [stranger.answers[stream] for stranger, stream in calls]
        held_s = await _until_all([answer.ended for answer in answers], HELD_S_MAX)
        statuses = Counter(answer.status or "none" for answer in answers)
        return _figure(
            name,
            memory,
            held_s,
            streams=len(calls),
            sent_mb=round(sum(stranger.sent_bytes for stranger in strangers) / 1e6, 1),
            statuses=dict(statuses),
        )


async def _until_all(events: Sequence[asyncio.Event], wait_s: float) -> float | None:
    """Seconds until all are set; None: it takes longer."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(wait_s):
            for event in events:
                await event.wait()
    except TimeoutError:
        return None
    return time.monotonic() - began


async def _idle(suite: Suite, count: int, wait_s: float) -> dict[str, Any]:
    """Connections that do nothing after their greeting."""
    service = "fetch"
    async with _memory(suite, service) as memory, AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(Stranger.at(_port(suite, service), suite.endpoints.ca)) for _ in range(count)]
        held_s = await _until_all([stranger.closed for stranger in strangers], wait_s)
        return _figure(f"{count} idle connections", memory, held_s)


async def _crowd(suite: Suite, count: int) -> dict[str, Any]:
    """Device streams opened in one moment, as after a restart of fetch. Theirs is no attack: all must open."""
    key = ServiceKey.load("registration", suite.secrets / "keys" / "registration.key")
    credentials = grpc.ssl_channel_credentials(Path(suite.endpoints.ca).read_bytes())
    async with _memory(suite, "fetch") as memory, AsyncExitStack() as stack:
        # Of alike channels gRPC makes one connection, unless it is told not to.
        channels = [
            await stack.enter_async_context(
                grpc.aio.secure_channel(suite.endpoints.public["fetch"], credentials, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(1 + count // (STREAMS_A_CONNECTION // 2))
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        tokens = [key.device_token(DeviceCaller(DeviceId(uuid7()), SubscriberId(uuid7()), "crowd", bytes(32)))[0] for _ in range(count)]
        ended = Counter[str]()
        began = time.monotonic()

        async def opened(number: int) -> Any:
            stub = messages_pb2_grpc.MessagesStub(channels[number % len(channels)])
            call: Any = stub.Stream(metadata=(("authorization", f"Bearer {tokens[number]}"),))
            try:
                await call.read()
            except grpc.aio.AioRpcError as e:
                ended[e.code().name] += 1
            return call

        calls = await asyncio.gather(*(opened(number) for number in range(count)))
        seconds = time.monotonic() - began
        for call in calls:
            call.cancel()
        return _figure(
            f"{count:,} streams at once", memory, 0.0, opened=count - ended.total(), ended=dict(ended), opened_s=round(seconds, 1)
        )
