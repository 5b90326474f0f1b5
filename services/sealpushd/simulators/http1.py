"""HTTP/1.1 of a simulated push service: h11 (sans-IO) on an asyncio protocol. It knows nothing of any vendor.

One request at a time: what a client sends ahead waits until the answer is out. Connections are kept alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import h11

from sealpushd.simulators.exchange import HEADER_BYTES_MAX, HEADERS_MAX, Exchange, Incoming, Peer

# A client that does not wait for its answers may be this far ahead, then it is cut off. (Pausing to read would hide
# that it went away.)
BYTES_AHEAD_MAX = 256 * 1024


class Http1Connection(asyncio.Protocol):
    """One connection of a provider. `ended` is called when it is gone."""

    def __init__(self, peer: Peer, number: int, ended: Callable[[], None]) -> None:
        self._peer = peer
        self._ended = ended
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming | None = None
        # Counts the requests of this connection in HTTP/2's way; 0: none waits for its answer.
        self._last_stream_id = -1
        self._unanswered = 0
        self._bytes_ahead = 0
        self.number = number

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # create_server gives stream transports; uvloop's share no base class with asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._peer.connection_opened(self)

    def data_received(self, data: bytes) -> None:
        if self._unanswered:
            self._bytes_ahead += len(data)
            if self._bytes_ahead > BYTES_AHEAD_MAX:
                self.drop()
                return
        self._h11.receive_data(data)
        self._work()

    def eof_received(self) -> None:
        # None: asyncio closes the transport.
        self._h11.receive_data(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._ended()

    # the peer's side

    @property
    def is_open(self) -> bool:
        """Whether an answer can still be sent."""
        return self._transport is not None

    def raise_streams_max(self, streams_max: int) -> None:
        """Nothing to announce."""

    def send_answer(self, stream_id: int, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool) -> None:
        """See `Exchange.answer`."""
        if self._transport is None or stream_id != self._unanswered:
            return
        self._unanswered = self._bytes_ahead = 0
        length = len(body) + 1 if truncated else len(body)
        self._send(h11.Response(status_code=status, headers=[*headers, ("content-length", str(length))]))
        if body:
            self._send(h11.Data(data=body))
        if truncated:
            self.drop(gently=True)
            return
        self._send(h11.EndOfMessage())
        if self._h11.our_state is h11.MUST_CLOSE:
            self.drop(gently=True)
            return
        self._h11.start_next_cycle()
        # Not from inside the peer: a pile of requests sent ahead must not become a pile of calls.
        asyncio.get_running_loop().call_soon(self._work)

    def goaway(self, reason: str, *, last_stream_id: int) -> None:
        """HTTP/1.1 has no goodbye."""
        self.drop(gently=True)

    def drop(self, *, gently: bool = False) -> None:
        """Close at once; `gently` lets what was written reach the other side."""
        transport, self._transport = self._transport, None
        if transport is not None:
            if gently:
                transport.close()
            else:
                transport.abort()

    # h11's side

    def _work(self) -> None:
        """Handle what has come until a request waits for its answer or more is needed."""
        while self._transport is not None:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as e:
                self._refuse(e.error_status_hint)
                return
            match event:
                case h11.Request():
                    self._open(event)
                case h11.Data() if self._incoming is not None:
                    self._incoming.take(event.data, self._peer.body_bytes_max)
                case h11.EndOfMessage() if self._incoming is not None:
                    incoming, self._incoming = self._incoming, None
                    self._last_stream_id += 2
                    self._unanswered = self._last_stream_id
                    self._peer.request_received(Exchange(self, self._unanswered, incoming.whole()))
                case h11.ConnectionClosed():
                    self.drop(gently=True)
                    return
                case _:
                    return

    def _open(self, request: h11.Request) -> None:
        if len(request.headers) > HEADERS_MAX:
            self._refuse(431)
            return
        self._incoming = Incoming(
            method=request.method.decode("ascii"),
            scheme="https",
            path=request.target.decode("ascii"),
            headers=tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers),
        )
        if self._h11.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))

    def _refuse(self, status: int) -> None:
        """What came is no HTTP/1.1: say so where that is still possible, and close."""
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send(h11.Response(status_code=status, headers=[("content-length", "0"), ("connection", "close")]))
        self.drop(gently=True)

    def _send(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        if data and self._transport is not None:
            self._transport.write(data)
