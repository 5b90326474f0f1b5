"""HTTP/2 of a simulated push service: h2 (sans-IO) on an asyncio protocol. It knows nothing of any vendor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from sealpushd.simulators.exchange import Exchange, Incoming, Peer


@dataclass(slots=True)
class _Outgoing:
    body: memoryview
    truncated: bool


class _AnnouncedOnly(Settings):
    """Settings whose bound on streams is told and not kept: h2 would end the whole connection over one stream too many, and a push service
    refuses that stream alone."""

    @property
    def max_concurrent_streams(self) -> int:
        return 2**31 - 1

    @max_concurrent_streams.setter
    def max_concurrent_streams(self, value: int) -> None:
        self[SettingCodes.MAX_CONCURRENT_STREAMS] = value


class Http2Connection(asyncio.Protocol):
    """One connection of a provider. `ended` is called when it is gone."""

    def __init__(self, peer: Peer, number: int, ended: Callable[[], None]) -> None:
        self._peer = peer
        self._ended = ended
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self._incoming: dict[int, Incoming] = {}
        self._outgoing: dict[int, _Outgoing] = {}
        self._open_streams: set[int] = set()
        self._transport: asyncio.Transport | None = None
        self._streams_max = peer.streams_max
        self.number = number

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # create_server gives stream transports; uvloop's share no base class with asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        # In the first SETTINGS: a client that believed h2's own 100 for a moment would open that many.
        self._h2.local_settings = _AnnouncedOnly(client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: self._streams_max})
        self._h2.initiate_connection()
        self._flush()
        self._peer.connection_opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            events = self._h2.receive_data(data)
            # h2 has closed these streams already, also for the events that come before the reset.
            reset = {event.stream_id for event in events if isinstance(event, StreamReset)}
            for stream_id in reset:
                self._forget(stream_id)
            for event in events:
                if not (isinstance(event, RequestReceived) and event.stream_id in reset):
                    self._handle(event)
        except (H2Error, UnicodeDecodeError):
            # h2 has put the GOAWAY that says why into its buffer; of headers that are no text it says nothing.
            self._flush()
            self.drop(gently=True)
            return
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._ended()

    # the peer's side

    @property
    def is_open(self) -> bool:
        """Whether an answer can still be sent."""
        return self._transport is not None

    def raise_streams_max(self, streams_max: int) -> None:
        """Announce that so many streams may be open at once from now on."""
        if self._transport is not None and streams_max != self._streams_max:
            self._streams_max = streams_max
            self._h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: streams_max})

    def send_answer(self, stream_id: int, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool) -> None:
        """See `Exchange.answer`."""
        if self._transport is None or stream_id not in self._open_streams:
            return
        length = len(body) + 1 if truncated else len(body)
        fields = [(":status", str(status)), *headers]
        if length:
            fields.append(("content-length", str(length)))
        self._h2.send_headers(stream_id, fields, end_stream=length == 0)
        if length == 0:
            self._open_streams.discard(stream_id)
        else:
            self._outgoing[stream_id] = _Outgoing(memoryview(body), truncated)
            self._pump(stream_id)
        self._flush()

    def goaway(self, reason: str, *, last_stream_id: int) -> None:
        """Say goodbye with a JSON reason, as APNs does, and close."""
        if self._transport is not None:
            note = json.dumps({"reason": reason}).encode()
            self._h2.close_connection(ErrorCodes.NO_ERROR, additional_data=note, last_stream_id=last_stream_id)
            self._flush()
            self.drop(gently=True)

    def drop(self, *, gently: bool = False) -> None:
        """Close at once; `gently` lets what was written reach the other side."""
        transport, self._transport = self._transport, None
        if transport is not None:
            if gently:
                transport.close()
            else:
                transport.abort()

    # h2's side

    def _handle(self, event: Event) -> None:
        match event:
            case RequestReceived():
                self._open(event)
            case DataReceived():
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                incoming = self._incoming.get(event.stream_id)
                if incoming is not None:
                    incoming.take(event.data, self._peer.body_bytes_max)
            case StreamEnded():
                self._complete(event.stream_id)
            case WindowUpdated():
                for stream_id in [event.stream_id] if event.stream_id else list(self._outgoing):
                    self._pump(stream_id)
            case ConnectionTerminated():
                self.drop(gently=True)

    def _open(self, event: RequestReceived) -> None:
        if len(self._open_streams) >= self._streams_max:
            # The client may not have seen our SETTINGS yet: refuse the stream, keep the connection.
            self._h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            self._peer.stream_refused(self)
            return
        fields = [(str(name), str(value)) for name, value in event.headers]
        self._open_streams.add(event.stream_id)
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        self._incoming[event.stream_id] = Incoming(
            method=pseudo.get(":method", ""),
            scheme=pseudo.get(":scheme", ""),
            path=pseudo.get(":path", ""),
            headers=tuple((name, value) for name, value in fields if not name.startswith(":")),
        )

    def _complete(self, stream_id: int) -> None:
        incoming = self._incoming.pop(stream_id, None)
        if incoming is not None:
            self._peer.request_received(Exchange(self, stream_id, incoming.whole()))

    def _pump(self, stream_id: int) -> None:
        """Send as much of an answer's body as the client's windows allow."""
        outgoing = self._outgoing.get(stream_id)
        while outgoing is not None and len(outgoing.body):
            room = min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size)
            if room <= 0:
                return
            part, outgoing.body = outgoing.body[:room], outgoing.body[room:]
            last = len(outgoing.body) == 0 and not outgoing.truncated
            self._h2.send_data(stream_id, bytes(part), end_stream=last)
        if outgoing is not None:
            if outgoing.truncated:
                self._h2.reset_stream(stream_id, ErrorCodes.INTERNAL_ERROR)
            self._forget(stream_id)

    def _forget(self, stream_id: int) -> None:
        self._incoming.pop(stream_id, None)
        self._outgoing.pop(stream_id, None)
        self._open_streams.discard(stream_id)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)
