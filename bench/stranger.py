"""A stranger at a public listener: HTTP/2 over TLS, frame by frame, with what no gRPC client would send."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import h2.connection
import h2.events
from h2.config import H2Configuration

_READ_BYTES: Final = 65_536
_HEADERS: Final = (
    (":method", "POST"),
    (":scheme", "https"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)


@dataclass(slots=True)
class Answer:
    """What has come on a stream: headers and trailers together, and whether it has ended."""

    headers: dict[str, str] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> str:
        """The gRPC status, a number; empty where the stream ended without one."""
        return self.headers.get("grpc-status", "")


class Stranger:
    """One connection. `call` opens a stream and sends nothing behind its headers; `send` sends of a request as much as it is let."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = h2.connection.H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._heard = asyncio.Condition()
        self.answers: dict[int, Answer] = {}
        self.closed = asyncio.Event()
        # Of requests, on all streams.
        self.sent_bytes = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, port: int, ca: str) -> AsyncIterator[Stranger]:
        """A connection to a listener of this machine whose certificate this authority (a file) has issued."""
        stranger = await cls.connect(port, ca)
        listening = asyncio.create_task(stranger.listen())
        try:
            yield stranger
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            stranger.close()

    @classmethod
    async def connect(cls, port: int, ca: str) -> Stranger:
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["h2"])
        stranger = cls(*await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost"))
        stranger._h2.initiate_connection()
        await stranger._flush()
        return stranger

    def close(self) -> None:
        """At once, whatever was still to be sent."""
        self._writer.transport.abort()

    async def call(self, method: str, metadata: Sequence[tuple[str, str]] = ()) -> int:
        """Open a stream to this method ("/package.Service/Method"); its number."""
        stream = self._h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self._h2.send_headers(stream, [*_HEADERS[:2], (":path", method), *_HEADERS[2:], *metadata])
        await self._flush()
        return stream

    async def send(self, stream: int, says: int, sends: int) -> None:
        """Say that a message of `says` bytes comes, and send `sends` of them, as the windows open.

        Returns when all have, or when the stream or the connection has ended. Where neither happens it waits: bound it from outside.
        """
        left = memoryview(struct.pack(">BI", 0, says) + bytes(sends))
        while len(left):
            window = self._window(stream)
            if window is None:
                break
            part = left[: min(window, self._h2.max_outbound_frame_size)]
            if len(part):
                self._h2.send_data(stream, bytes(part))
                left = left[len(part) :]
                self.sent_bytes += len(part)
                await self._flush()
            else:
                async with self._heard:
                    await self._heard.wait()

    async def end(self, stream: int) -> None:
        """Say that nothing more comes."""
        self._h2.end_stream(stream)
        await self._flush()

    async def reset(self, stream: int) -> None:
        """Cancel."""
        self._h2.reset_stream(stream, 8)
        await self._flush()

    def _window(self, stream: int) -> int | None:
        if self.closed.is_set() or self.answers[stream].ended.is_set():
            return None
        return self._h2.local_flow_control_window(stream)

    async def _flush(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._writer.write(self._h2.data_to_send())
            await self._writer.drain()

    async def listen(self) -> None:
        """Take what comes, until the connection ends."""
        try:
            with contextlib.suppress(OSError):
                while data := await self._reader.read(_READ_BYTES):
                    for event in self._h2.receive_data(data):
                        self._take(event)
                    await self._flush()
                    async with self._heard:
                        self._heard.notify_all()
        finally:
            self.closed.set()
            async with self._heard:
                self._heard.notify_all()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self.answers[event.stream_id].headers.update((str(name), str(value)) for name, value in event.headers)
            case h2.events.DataReceived():
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded() | h2.events.StreamReset():
                self.answers[event.stream_id].ended.set()
            case _:
                pass
