"""The listening side of a simulated push service: TLS, and HTTP/2 or HTTP/1.1 as the client chooses."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from sealpushd.simulators.exchange import Peer
from sealpushd.simulators.http1 import Http1Connection
from sealpushd.simulators.http2 import Http2Connection

# One provider needs a handful; more means that it opens one per message.
CONNECTIONS_MAX = 256


class HttpListener:
    """TLS 1.2 or later. ALPN h2, and http/1.1 or none at all where the peer speaks it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._connections: set[Http1Connection | Http2Connection] = set()
        self._deserted = asyncio.Event()
        self._deserted.set()
        self._accepted = 0
        self._closing = False
        self._listener: asyncio.Server | None = None

    async def start(self, *, host: str, port: int, certificate: Path, private_key: Path) -> int:
        """Listen; gives the real port. Raises OSError when it cannot, ssl.SSLError on a bad certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2", "http/1.1"] if self.peer.speaks_http1 else ["h2"])
        context.load_cert_chain(certificate, private_key)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Handshake(self), host, port, ssl=context)
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and drop every connection. Idempotent."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
            for connection in list(self._connections):
                connection.drop()
            await self._listener.wait_closed()
            # Aborted transports report their end in the next turns of the loop.
            await self._deserted.wait()

    def admit(self, chosen: str | None) -> Http1Connection | Http2Connection | None:
        """A new connection that speaks what its client chose; None: too many, the end, or a language that is not spoken here."""
        if self._closing or len(self._connections) >= CONNECTIONS_MAX:
            return None
        connection: Http1Connection | Http2Connection
        number = self._accepted + 1
        if chosen == "h2":
            connection = Http2Connection(self.peer, number, lambda: self._forget(connection))
        elif self.peer.speaks_http1:
            connection = Http1Connection(self.peer, number, lambda: self._forget(connection))
        else:
            return None
        self._accepted = number
        self._connections.add(connection)
        self._deserted.clear()
        return connection

    def _forget(self, connection: Http1Connection | Http2Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._deserted.set()


class _Handshake(asyncio.Protocol):
    """Until the TLS handshake has told which protocol the client chose."""

    def __init__(self, listener: HttpListener) -> None:
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        connection = None if tls is None else self._listener.admit(tls.selected_alpn_protocol())
        if connection is None:
            transport.close()
            return
        transport.set_protocol(connection)
        connection.connection_made(transport)
