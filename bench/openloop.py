"""Calls at a given rate, whatever becomes of those before: what an overload is made of. A process that costs as little as possible.

A gRPC client in Python takes as long for a call as the server that refuses it, and would eat the machine that is being measured. This
one writes frames of HTTP/2 that were made beforehand, and looks at nothing of the answers but their status. What the SDK does about a
refusal it does by the SDK's own rules, if it is told to.

    python -m bench.openloop < ORDER     reads an `Order` as JSON, prints an `Outcome` as JSON
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import random
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import uvloop
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple

from sealpush.retry import RetryPolicy
from sealpush.throttle import Throttle
from sealpush.transport import HELD_BACK_S

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD_BYTES: Final = 9
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 0x1, 0x3, 0x4
CANCEL: Final = (8).to_bytes(4, "big")
WINDOW_MAX: Final = 0x7FFFFFFF
WINDOW_FIRST: Final = 65_535
TICK_S: Final = 0.005
# In place of the request id, which each call has its own of.
ID_MARK: Final = b"00000000-0000-0000-0000-000000000000"
# Statuses of answers are looked up by their bytes; messages that name something would fill the memory.
BLOCKS_KEPT_MAX: Final = 4_096

OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, LOST = "0", "4", "8", "lost"


@dataclass(frozen=True, slots=True)
class Order:
    """What to send. `request` is a serialised message with `ID_MARK` in it. Either `rate` a second, or `concurrency` at a time."""

    host: str
    port: int
    ca: str
    path: str
    authorization: str
    request_hex: str
    seconds: float
    # Answers of this first part are not counted: the limit is still being found.
    settle_s: float
    timeout_s: float
    connections: int
    rate: float = 0.0
    concurrency: int = 0
    # A caller that resets each of its calls so long after having made it.
    reset_after_s: float = 0.0
    # After a refusal what the SDK does: hold attempts back, and try again as long as the deadline allows. Otherwise a refusal is the end.
    obeys: bool = False


@dataclass(slots=True)
class Outcome:
    """Calls that ended after the settling, by gRPC status number; seconds of those that succeeded, from when they were due."""

    seconds: float
    calls: int
    statuses: dict[str, int]
    ok_p50_s: float
    ok_p99_s: float
    # CPU time of this process for each second of the load, and how far it fell behind its rate.
    cpu_share: float
    behind_s: float
    held_back: int
    # Attempts that the service was sent, and those of them that it refused.
    sent: int
    refused: int


@dataclass(slots=True)
class Ledger:
    counts: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    blocks: dict[bytes, str | None] = field(default_factory=dict)
    sent: int = 0
    refused: int = 0


@dataclass(slots=True)
class Obedience:
    """What all connections of one sender do about refusals: as `sealpush.transport.Calls` and `sealpush.retry.Attempts`."""

    throttle: Throttle = field(default_factory=Throttle)
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    # When to try again, on which connection, due when, and how many attempts have failed.
    later: list[tuple[float, int, float, int]] = field(default_factory=list)

    def again(self, number: int, due: float, failed: int, now: float, timeout_s: float) -> bool:
        """Whether there is another attempt after this one, which was refused with a pause of one to two seconds."""
        asked_s = HELD_BACK_S + random.random()  # noqa: S311 - spreads retries
        pause_s = self.policy.fitting_delay_s(failed, due + timeout_s - now, random.random, asked_s)
        if pause_s is None:
            return False
        heapq.heappush(self.later, (now + pause_s, number, due, failed + 1))
        return True


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _nothing() -> None:
    pass


class Connection(asyncio.Protocol):
    """One connection to the server, with as many streams as that allows; what is too much waits here, as in any client of gRPC."""

    def __init__(self, order: Order, ledger: Ledger, obedience: Obedience | None, number: int) -> None:
        self._order = order
        self._ledger = ledger
        self._obedience = obedience
        self._number = number
        self._encoder = Encoder()
        self._headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", order.path),
            (":authority", f"{order.host}:{order.port}"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "sealpush-bench"),
            ("authorization", order.authorization),
        ]
        before, after = bytes.fromhex(order.request_hex).split(ID_MARK)
        size = len(before) + len(ID_MARK) + len(after)
        self._before, self._after = b"\x00" + size.to_bytes(4, "big") + before, after
        self._data_head = (size + 5).to_bytes(3, "big") + bytes((DATA, END_STREAM))
        self._data_bytes = size + 5
        self._prefix = f"{os.urandom(8).hex()}-{number:04}-".encode()
        self._block = b""
        self._timeouts: dict[int, bytes] = {}
        self._next_id = 1
        self._window = WINDOW_FIRST
        self._streams_max = 100
        self._read = bytearray()
        self._transport: Any = None
        # When the call was due, and how many of its attempts have failed.
        self.open: dict[int, tuple[float, int]] = {}
        self.waiting: deque[tuple[float, int]] = deque()
        self.on_end: Callable[[], None] = _nothing
        self.ready = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        mine = HEADER_TABLE_SIZE.to_bytes(2, "big") + bytes(4)
        mine += INITIAL_WINDOW_SIZE.to_bytes(2, "big") + WINDOW_MAX.to_bytes(4, "big")
        more = (WINDOW_MAX - WINDOW_FIRST).to_bytes(4, "big")
        self._transport.write(PREFACE + frame(SETTINGS, 0, 0, mine) + frame(WINDOW_UPDATE, 0, 0, more))

    def connection_lost(self, error: Exception | None) -> None:
        self._ledger.counts[LOST] += len(self.open) + len(self.waiting)
        self.open.clear()
        self.waiting.clear()

    def call(self, due: float, failed: int = 0) -> None:
        if self._obedience is not None and self._obedience.throttle.holds_back(time.perf_counter(), random.random):
            self._refused(due, failed)
            return
        self.waiting.append((due, failed))
        self.flush()

    def _refused(self, due: float, failed: int) -> None:
        obedience = self._obedience
        if obedience is None or not obedience.again(self._number, due, failed, time.perf_counter(), self._order.timeout_s):
            self._ledger.counts[RESOURCE_EXHAUSTED] += 1
            self.on_end()

    def _timeout(self, due: float) -> bytes:
        """What is left of the time of a call, as a header that does not enter the table; in steps, so that few are made."""
        left = max(1, int((due + self._order.timeout_s - time.perf_counter()) * 100))
        block = self._timeouts.get(left)
        if block is None:
            block = self._timeouts[left] = self._encoder.encode([NeverIndexedHeaderTuple("grpc-timeout", f"{left * 10}m")])
        return block

    def flush(self) -> None:
        """Write what waits, as far as there are streams and window."""
        out = bytearray()
        while self.waiting and len(self.open) < self._streams_max and self._window >= self._data_bytes:
            stream_id, self._next_id = self._next_id, self._next_id + 2
            self.open[stream_id] = self.waiting.popleft()
            self._ledger.sent += 1
            # The first enters the table, the others are indices into it: the same bytes each time.
            block = self._block or self._encoder.encode(self._headers)
            if not self._block:
                self._block = b"" if stream_id == 1 else block
            block += self._timeout(self.open[stream_id][0])
            number = stream_id.to_bytes(4, "big")
            out += len(block).to_bytes(3, "big") + bytes((HEADERS, END_HEADERS)) + number + block
            out += self._data_head + number + self._before + self._prefix + b"%014d" % stream_id + self._after
            self._window -= self._data_bytes
        if out:
            self._transport.write(bytes(out))

    def expire(self, now: float) -> None:
        """Reset what has taken too long, oldest first."""
        reset_after_s = self._order.reset_after_s or self._order.timeout_s
        out = bytearray()
        for stream_id, (due, _) in list(self.open.items()):
            if now - due < reset_after_s:
                # In the order they were sent: behind it are others that fell due later, unless they are repeated.
                if self._obedience is None:
                    break
                continue
            del self.open[stream_id]
            self._ledger.counts[DEADLINE_EXCEEDED] += 1
            out += frame(RST_STREAM, 0, stream_id, CANCEL)
            self.on_end()
        while self.waiting and now - self.waiting[0][0] >= reset_after_s:
            self.waiting.popleft()
            self._ledger.counts[DEADLINE_EXCEEDED] += 1
            self.on_end()
        if out:
            self._transport.write(bytes(out))
            self.flush()

    def data_received(self, data: bytes) -> None:
        self._read += data
        read, at = self._read, 0
        while len(read) - at >= FRAME_HEAD_BYTES:
            size = int.from_bytes(read[at : at + 3], "big")
            end = at + FRAME_HEAD_BYTES + size
            if len(read) < end:
                break
            kind, flags = read[at + 3], read[at + 4]
            stream_id = int.from_bytes(read[at + 5 : at + 9], "big")
            if kind == HEADERS and flags & END_STREAM:
                self._ended(stream_id, self._status(bytes(read[at + FRAME_HEAD_BYTES : end])))
            elif kind == RST_STREAM:
                self._ended(stream_id, LOST)
            elif kind not in (HEADERS, DATA):
                self._control(kind, flags, stream_id, bytes(read[at + FRAME_HEAD_BYTES : end]))
            at = end
        del read[:at]
        self.flush()

    def _ended(self, stream_id: int, status: str) -> None:
        call = self.open.pop(stream_id, None)
        if call is None:
            return
        due, failed = call
        if status in (OK, RESOURCE_EXHAUSTED) and self._obedience is not None:
            self._obedience.throttle.answered(time.perf_counter(), accepted=status == OK)
        if status == RESOURCE_EXHAUSTED:
            self._ledger.refused += 1
            self._refused(due, failed)
            return
        self._ledger.counts[status] += 1
        if status == OK:
            self._ledger.latencies.append(time.perf_counter() - due)
        self.on_end()

    def _status(self, block: bytes) -> str:
        """The gRPC status in trailers; without a table the same bytes are always the same fields."""
        known = self._ledger.blocks.get(block)
        if known is None:
            fields = {bytes(name): bytes(value) for name, value in Decoder().decode(block, raw=True)}
            known = fields.get(b"grpc-status", b"none").decode()
            if len(self._ledger.blocks) < BLOCKS_KEPT_MAX:
                self._ledger.blocks[block] = known
        return known

    def _control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == MAX_CONCURRENT_STREAMS:
                    self._streams_max = int.from_bytes(payload[at + 2 : at + 6], "big")
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
            self.ready.set()
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream_id == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self._transport.close()


async def run(order: Order) -> Outcome:
    context = ssl.create_default_context(cafile=order.ca)
    context.set_alpn_protocols(["h2"])
    loop = asyncio.get_running_loop()
    ledger = Ledger()
    obedience = Obedience() if order.obeys else None
    connections = []
    for number in range(order.connections):
        _, connection = await loop.create_connection(
            partial(Connection, order, ledger, obedience, number), order.host, order.port, ssl=context, server_hostname="localhost"
        )
        await connection.ready.wait()
        connections.append(connection)

    began = time.perf_counter()
    ends_at = began + order.seconds
    sent, behind_s = 0, 0.0
    cpu = time.process_time()
    counting_since = began

    if order.concurrency:
        for number in range(order.concurrency):
            connection = connections[number % len(connections)]

            def again(connection: Connection = connection) -> None:
                now = time.perf_counter()
                if now < ends_at:
                    connection.waiting.append((now, 0))

            connection.on_end = again
            connection.call(began)
    while (now := time.perf_counter()) < ends_at:
        if now - began >= order.settle_s and counting_since == began and order.settle_s:
            counting_since, cpu = now, time.process_time()
            ledger.counts.clear()
            ledger.latencies.clear()
            ledger.sent = ledger.refused = 0
        if order.rate:
            due = int((now - began) * order.rate)
            if sent < due:
                behind_s = max(behind_s, now - (began + sent / order.rate))
            while sent < due:
                connections[sent % len(connections)].call(began + sent / order.rate)
                sent += 1
        while obedience is not None and obedience.later and obedience.later[0][0] <= now:
            _, number, was_due, failed = heapq.heappop(obedience.later)
            connections[number].call(was_due, failed)
        for connection in connections:
            connection.expire(now)
        await asyncio.sleep(TICK_S)
    seconds = time.perf_counter() - counting_since
    counts, latencies = dict(ledger.counts), sorted(ledger.latencies)
    outcome = Outcome(
        seconds=seconds,
        calls=sum(counts.values()),
        statuses=counts,
        ok_p50_s=latencies[len(latencies) // 2] if latencies else 0.0,
        ok_p99_s=latencies[len(latencies) * 99 // 100] if latencies else 0.0,
        cpu_share=(time.process_time() - cpu) / seconds,
        behind_s=behind_s,
        held_back=sum(len(connection.waiting) for connection in connections),
        sent=ledger.sent,
        refused=ledger.refused,
    )
    for connection in connections:
        connection._transport.abort()
    return outcome


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(run(Order(**json.load(sys.stdin)))))), flush=True)
