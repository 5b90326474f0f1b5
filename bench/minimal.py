"""A push service that costs as little as possible: every request is accepted unread. A process of its own, in the simulators' place.

The simulators check what a vendor checks, and that costs them more than it costs a client to ask. This one shows what the client
can do: it reads frames of HTTP/2 and answers each stream with the same bytes. Headers are looked at only where the answer depends on
them: of a connection's first request, which may ask for an access token, and with APNs, whose answer echoes the apns-id as it came.

Its answers are so small that what may be on the way at once never fills a client's window, hence no flow control.
"""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import sys
from typing import Final, cast

import uvloop
from hpack import Decoder
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from sealpushd.simulators.apns import STREAMS_MAX
from sealpushd.simulators.fcm import FcmSimulator
from sealpushd.simulators.hms import HmsSimulator

PREFACE_BYTES: Final = 24
FRAME_HEAD_BYTES: Final = 9
DATA, HEADERS, SETTINGS, PING = 0x0, 0x1, 0x4, 0x6
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
# More than a client of a benchmark sends on one connection.
WINDOW: Final = 0x7FFFFFFF - 65_535

# HPACK (RFC 7541): entries of the static table, and the bits that tell the forms of a field.
STATIC_ENTRIES: Final = 61
INDEXED, INCREMENTAL, SIZE_UPDATE, HUFFMAN = 0x80, 0x40, 0x20, 0x80
STATUS_200: Final = b"\x88"
TOKEN: Final = {"access_token": "t" * 160, "token_type": "Bearer", "expires_in": 3600}
# What each vendor announces as streams at once, and answers to a send; APNs: nothing but the apns-id.
VENDORS: Final[dict[str, tuple[int, dict[str, str] | None]]] = {
    "apns": (STREAMS_MAX, None),
    "fcm": (FcmSimulator.streams_max, {"name": "projects/demo-bank-push/messages/0:1751700000000000%0123456789abcdef"}),
    "hms": (HmsSimulator.streams_max, {"code": "80000000", "msg": "Success", "requestId": "175170000000000000000001"}),
}


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field that enters no table."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """An integer that begins in the low bits of a byte, and where it ends."""
    limit = (1 << bits) - 1
    value = block[at] & limit
    at += 1
    if value < limit:
        return value, at
    shift = 0
    while True:
        more = block[at]
        at += 1
        value += (more & 0x7F) << shift
        shift += 7
        if not more & 0x80:
            return value, at


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """A string as it came, with its length in front, and where it ends."""
    length, start = _integer(block, at, 7)
    return block[at : start + length], start + length


def _encoded(name: bytes) -> frozenset[bytes]:
    """The two ways in which a short name may come."""
    short = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(name)
    return frozenset({bytes((len(name),)) + name, bytes((HUFFMAN | len(short),)) + short})


APNS_ID: Final = _encoded(b"apns-id")


class ApnsIds:
    """Finds the apns-id in the headers of a connection's requests without decoding anything.

    The table of a connection is a list: an index counts from the newest entry, so which old ones were thrown out is all one.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[bytes, bytes]] = []

    def echo(self, block: bytes) -> bytes:
        """The apns-id as a field that enters no table. Raises ValueError when there is none."""
        at, found = 0, b""
        while at < len(block):
            first = block[at]
            if first & INDEXED:
                index, at = _integer(block, at, 7)
                if index > STATIC_ENTRIES:
                    name, value = self._entries[STATIC_ENTRIES - index]
                    if name in APNS_ID:
                        found = b"\x00" + name + value
                continue
            if not first & INCREMENTAL and first & SIZE_UPDATE:
                _, at = _integer(block, at, 5)
                continue
            index, at = _integer(block, at, 6 if first & INCREMENTAL else 4)
            name = b""
            if not index:
                name, at = _string(block, at)
            elif index > STATIC_ENTRIES:
                name = self._entries[STATIC_ENTRIES - index][0]
            value, at = _string(block, at)
            if first & INCREMENTAL:
                self._entries.append((name, value))
            if name in APNS_ID:
                found = b"\x00" + name + value
        if not found:
            raise ValueError("a push without apns-id")
        return found


def _json_answer(stream_id: int, content: bytes) -> bytes:
    fields = STATUS_200 + _literal(b"content-type", b"application/json")
    return _frame(HEADERS, END_HEADERS, stream_id, fields) + _frame(DATA, END_STREAM, stream_id, content)


class Connection(asyncio.Protocol):
    def __init__(self, streams_max: int, content: bytes | None) -> None:
        self._streams_max = streams_max
        self._content = content
        self._waiting = bytearray()
        self._to_skip = PREFACE_BYTES
        self._is_first = True
        self._apns_ids = ApnsIds()
        # What the stream that is being read will be answered, where that differs from the others.
        self._answers: dict[int, bytes] = {}
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # create_server gives stream transports; uvloop's share no base class with asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        settings = (3).to_bytes(2, "big") + self._streams_max.to_bytes(4, "big")
        self._transport.write(_frame(SETTINGS, 0, 0, settings) + _frame(0x8, 0, 0, WINDOW.to_bytes(4, "big")))

    def data_received(self, data: bytes) -> None:
        self._waiting += data
        if self._to_skip:
            if len(self._waiting) < self._to_skip:
                return
            del self._waiting[: self._to_skip]
            self._to_skip = 0
        out: list[bytes] = []
        waiting, at = self._waiting, 0
        while len(waiting) - at >= FRAME_HEAD_BYTES:
            end = at + FRAME_HEAD_BYTES + int.from_bytes(waiting[at : at + 3], "big")
            if end > len(waiting):
                break
            kind, flags = waiting[at + 3], waiting[at + 4]
            stream_id = int.from_bytes(waiting[at + 5 : at + 9], "big")
            if kind == HEADERS:
                self._headers(stream_id, flags, bytes(waiting[at + FRAME_HEAD_BYTES : end]))
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                out.append(self._answer(stream_id))
            elif kind == SETTINGS and not flags & ACK:
                out.append(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                out.append(_frame(PING, ACK, 0, bytes(waiting[at + FRAME_HEAD_BYTES : end])))
            at = end
        del waiting[:at]
        if out and self._transport is not None:
            self._transport.write(b"".join(out))

    def _headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._content is not None and not self._is_first:
            return
        if flags & (PADDED | PRIORITY) or not flags & END_HEADERS:
            raise ValueError("headers in a form that this peer does not read")
        if self._content is None:
            fields = STATUS_200 + self._apns_ids.echo(payload)
            self._answers[stream_id] = _frame(HEADERS, END_HEADERS | END_STREAM, stream_id, fields)
            return
        path = next(bytes(value) for name, value in Decoder().decode(payload, raw=True) if bytes(name) == b":path")
        if path.endswith(b"token"):
            self._answers[stream_id] = _json_answer(stream_id, json.dumps(TOKEN).encode())
        self._is_first = False

    def _answer(self, stream_id: int) -> bytes:
        special = self._answers.pop(stream_id, None)
        return special if special is not None else _json_answer(stream_id, self._content or b"")


async def serve(certificate: str, private_key: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(certificate, private_key)
    loop = asyncio.get_running_loop()
    ports = {}
    for vendor, (streams_max, answer) in VENDORS.items():
        content = None if answer is None else json.dumps(answer).encode()

        def connected(streams_max: int = streams_max, content: bytes | None = content) -> Connection:
            return Connection(streams_max, content)

        listener = await loop.create_server(connected, "127.0.0.1", 0, ssl=context)
        ports[vendor] = listener.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
