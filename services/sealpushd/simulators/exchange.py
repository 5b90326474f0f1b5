"""Requests and answers of a simulated push service, whatever HTTP they travel on.

A `Peer` is the vendor's side: it gets each request whole and may answer it at once, later, never, or break the connection in the
ways a real service does. A `Connection` is one client, over HTTP/2 or HTTP/1.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

# What a client with a bug or a grudge may send beyond the vendor's limit is counted and thrown away.
HEADERS_MAX = 200
HEADER_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request, whole. Header names are lower case, pseudo headers stand apart.

    `body` has at most the peer's `body_bytes_max` bytes; `body_bytes` says how many came.
    """

    method: str
    scheme: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    body_bytes: int

    @property
    def path_only(self) -> str:
        """The path without its query, such as the system parameters that every Google API takes (`?prettyPrint=false`)."""
        return self.path.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The first value of this header; None: absent."""
        return next((value for known, value in self.headers if known == name), None)


class Connection(Protocol):
    """One client's connection."""

    number: int

    @property
    def is_open(self) -> bool:
        """Whether an answer can still be sent."""

    def raise_streams_max(self, streams_max: int) -> None:
        """Announce that so many streams may be open at once from now on. HTTP/1.1 has one."""

    def send_answer(self, stream_id: int, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool) -> None:
        """See `Exchange.answer`."""

    def goaway(self, reason: str, *, last_stream_id: int) -> None:
        """Say goodbye with a JSON reason, as APNs does, and close. HTTP/1.1 closes."""

    def drop(self, *, gently: bool = False) -> None:
        """Close at once; `gently` lets what was written reach the other side."""


class Peer(Protocol):
    """The vendor's side: what to do with a request."""

    streams_max: int
    body_bytes_max: int
    speaks_http1: bool

    def connection_opened(self, connection: Connection) -> None:
        """A client connected; `connection.number` counts from 1."""

    def stream_refused(self, connection: Connection) -> None:
        """A stream came above the announced limit, before the client could know it, and was refused."""

    def request_received(self, exchange: Exchange) -> None:
        """A request is complete: answer it now, later or never."""


@dataclass(slots=True)
class Exchange:
    """One request and the means to answer it. Answering after the connection is gone does nothing."""

    connection: Connection
    stream_id: int
    request: HttpRequest

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes = b"", *, truncated: bool = False) -> None:
        """Send the whole answer. `truncated` announces one byte more, then resets the stream."""
        self.connection.send_answer(self.stream_id, status, headers, body, truncated=truncated)

    def goaway(self, reason: str) -> None:
        """Close the connection instead of processing this request: a client may repeat it elsewhere."""
        # Streams of clients have odd numbers.
        self.connection.goaway(reason, last_stream_id=max(self.stream_id - 2, 0))


@dataclass(slots=True)
class Incoming:
    """A request that is still coming."""

    method: str
    scheme: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0

    def take(self, data: bytes, body_bytes_max: int) -> None:
        """The next part of the body; what is beyond the bound is counted only."""
        self.body_bytes += len(data)
        self.body += data[: max(body_bytes_max - len(self.body), 0)]

    def whole(self) -> HttpRequest:
        """The request, now that its end has come."""
        return HttpRequest(self.method, self.scheme, self.path, self.headers, bytes(self.body), self.body_bytes)
