"""How providers speak HTTP: one client's settings, bounded answers, connections that are kept.

Why pyreqwest (reqwest, hyper, rustls): for one POST over HTTP/2 and TLS with a private CA, 64 at once, the client's CPU
time stands in the ratio 1 (pyreqwest, streamed answers) : 2.5 (h2 on asyncio, hand-written) : 12 (httpx[http2]). It keeps
all sends of a host on one connection, opens a new one after GOAWAY and repeats by itself only what the server certainly
did not process; deadlines, proxy and redirects can be set. Its errors quote the URL, and with it a push token: they are
never logged, chained or printed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import ClientClosedError, DecodeError, DetailedPyreqwestError, PyreqwestError, TransportError
from pyreqwest.proxy import ProxyBuilder
from pyreqwest.response import Response

from sealpushd.dispatch.providers.base import HttpAnswer, RetryAt, parse_http_date
from sealpushd.platform.clock import Clock

# Push services answer in tens of bytes; whoever sends more is none, and his answer must not eat memory.
ANSWER_BYTES_MAX = 64 * 1024
# Of an answer's headers, those that any provider reads.
HEADERS_READ = ("apns-id", "retry-after", "date")
# After so long without traffic the next send goes alone again: the server may have closed the connection.
IDLE_BEFORE_PROBE = timedelta(seconds=60)
# Vendors take tokens that are a few minutes old or young; what differs by more is a clock that is not set.
CLOCK_SKEW_MAX = timedelta(minutes=5)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How to reach a push service, whichever it is.

    `private_ca_file` is trusted beside the system's CAs. `proxy_url` is a CONNECT proxy (http://…); proxies of the
    environment are not used. `total_timeout` bounds one send with everything.
    """

    private_ca_file: Path | None = None
    proxy_url: str | None = field(default=None, repr=False)
    connect_timeout: timedelta = timedelta(seconds=5)
    read_timeout: timedelta = timedelta(seconds=10)
    total_timeout: timedelta = timedelta(seconds=15)
    # At once to one host.
    streams_max: int = 500
    # Between two pings on a quiet connection; Apple closes those that are silent for long.
    ping_interval: timedelta = timedelta(minutes=5)


class HttpClient:
    """Sends requests and reads bounded answers. `http2_only`: not even offer HTTP/1.1."""

    def __init__(self, settings: HttpSettings, *, http2_only: bool) -> None:
        """Raises ValueError or OSError when CA file or proxy are unusable."""
        self._client = _build_client(settings, http2_only=http2_only)
        self._total_s = settings.total_timeout.total_seconds()

    async def post(self, url: str, headers: dict[str, str], body: bytes) -> HttpAnswer:
        """The answer, its body at most 64 KiB. Raises PyreqwestError, and ValueError when the request cannot be one."""
        request = self._client.post(url).headers(headers).body_bytes(body)
        async with request.build_streamed() as response:
            return await _read(response)

    async def guard(self, work: Awaitable[Result], *, share: float = 1) -> Result | RetryAt:
        """The work's result, or what becomes of it when the network or the time does not let it end.

        `share`: of the total timeout, for work that is part of a send. Cancellation passes through, always: pyreqwest loses one
        that meets the answer, and whoever waits in a loop would then never end.
        """
        task = asyncio.current_task()
        cancellations = task.cancelling() if task is not None else 0
        result: Result | RetryAt
        try:
            async with asyncio.timeout(share * self._total_s):
                result = await work
        except TimeoutError:
            result = RetryAt("timeout")
        except PyreqwestError as e:
            reason = network_reason(e)
            result = RetryAt(reason, asked=reason != "closed")
        if task is not None and task.cancelling() > cancellations:
            raise asyncio.CancelledError
        return result

    async def aclose(self) -> None:
        """End all requests. Idempotent."""
        await self._client.close()


class Connection:
    """The way to one host: its streams, and whether the connection has proved itself.

    The first send on a connection goes alone; the others wait for its answer. APNs demands that with token
    authentication, and where HTTP/2 is still to be negotiated it keeps a burst from opening a connection each. Which
    connection the HTTP client uses cannot be seen from here, hence: after any failure, and after a silence, the next send
    goes alone again. Sends that the client itself moves to a new connection after GOAWAY are not held back; APNs refuses
    their early streams and the client repeats them.
    """

    def __init__(self, base_url: str, streams_max: int, clock: Clock, proves: Callable[[HttpAnswer], bool] | None = None) -> None:
        """`proves`: whether an answer shows that the connection takes many streams; None: any answer does."""
        self.base_url = base_url
        self.streams = asyncio.Semaphore(streams_max)
        self._clock = clock
        self._proves = proves
        # Of the steady clock.
        self._proved_at: float | None = None
        self._probe = asyncio.Lock()

    async def run(self, exchange: Callable[[], Awaitable[HttpAnswer]]) -> HttpAnswer:
        """Run one exchange, alone if need be; raises what it raises."""
        async with self.streams:
            if not self._is_proved():
                async with self._probe:
                    if not self._is_proved():
                        return await self._observe(exchange)
            return await self._observe(exchange)

    def _is_proved(self) -> bool:
        return self._proved_at is not None and self._clock.monotonic() - self._proved_at < IDLE_BEFORE_PROBE.total_seconds()

    async def _observe(self, exchange: Callable[[], Awaitable[HttpAnswer]]) -> HttpAnswer:
        try:
            answer = await exchange()
        except ValueError:
            # Never sent.
            raise
        except BaseException:
            self._proved_at = None
            raise
        self._proved_at = self._clock.monotonic() if self._proves is None or self._proves(answer) else None
        return answer


def clock_is_wrong(answer: HttpAnswer, now: datetime) -> bool:
    """Whether the answer's Date differs from our clock by more than tokens bear; no Date: no."""
    theirs = parse_http_date(answer.headers.get("date"))
    return theirs is not None and abs(theirs - now) > CLOCK_SKEW_MAX


def network_reason(error: PyreqwestError) -> str:
    """One of the reasons of `COMMON_ADVICE`; the error's own text quotes the push token."""
    if isinstance(error, ClientClosedError):
        return "closed"
    causes = _causes(error)
    if isinstance(error, TimeoutError) or "timed out" in causes:
        return "timeout"
    for word, reason in (
        ("dns error", "network-dns"),
        ("certificate", "network-certificate"),
        ("tunnel", "network-proxy"),
        ("proxy", "network-proxy"),
        ("refused", "network-refused"),
    ):
        if word in causes:
            return reason
    return "network-broken" if isinstance(error, TransportError | DecodeError) else f"network-{type(error).__name__}"


def _causes(error: PyreqwestError) -> str:
    """What the error says of its causes, in lower case, without the first sentence: that one quotes the URL."""
    if not isinstance(error, DetailedPyreqwestError) or not error.details:
        return ""
    causes = error.details.get("causes") or []
    return " ".join(cause["message"] for cause in causes[1:]).lower()


async def _read(response: Response) -> HttpAnswer:
    """The answer with its body; a longer one is cut off and None."""
    found = response.headers
    headers = {name: value for name in HEADERS_READ if (value := found.get(name)) is not None}
    body = bytearray()
    while True:
        chunk = await response.body_reader.read_chunk()
        if chunk is None:
            return HttpAnswer(response.status, headers, bytes(body))
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            return HttpAnswer(response.status, headers, None)


def _build_client(settings: HttpSettings, *, http2_only: bool) -> Client:
    builder = (
        ClientBuilder()
        .user_agent("sealpush")
        .https_only(True)
        .min_tls_version("TLSv1.2")
        .follow_redirects(False)
        .referer(False)
        # A compressed answer of 64 KiB can be a gigabyte.
        .gzip(False)
        .brotli(False)
        .zstd(False)
        .deflate(False)
        .no_proxy()
        .connect_timeout(settings.connect_timeout)
        .read_timeout(settings.read_timeout)
        .timeout(settings.total_timeout)
        # Apple counts rapid reconnects as an attack: keep the connection.
        .pool_idle_timeout(None)
        .http2_keep_alive_interval(settings.ping_interval)
        .http2_keep_alive_timeout(settings.read_timeout)
        .http2_keep_alive_while_idle(True)
    )
    builder = builder.http2_prior_knowledge() if http2_only else builder.http2(True)
    if settings.private_ca_file is not None:
        builder = builder.add_root_certificate_pem(settings.private_ca_file.read_bytes())
    if settings.proxy_url is not None:
        builder = builder.proxy(ProxyBuilder.https(settings.proxy_url))
    return builder.build()
