"""Takes Huawei's delivery receipts over HTTPS: POST /hms/APP_ID, signed with the callback's key.

aiohttp speaks HTTP here: it needs no second server around it, and bounds what it reads. Anybody may connect, and what listens here
also pushes: connections are few, live shortly and carry one request each.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import structlog
from aiohttp import web
from prometheus_client import Counter

from sealpushd.dispatch.credentials import Credentials
from sealpushd.dispatch.lanes import LaneSet
from sealpushd.dispatch.receipts import BODY_BYTES_MAX, BadSignature, MalformedReceipts, ReceiptKey, Signatures, parse_receipts
from sealpushd.platform.clock import Clock, Reading
from sealpushd.platform.metrics import platform_label
from sealpushd.platform.settings import Settings, SettingsError

log = structlog.get_logger()

# Huawei reads a code from the body: 0 is success, anything else is tried again.
_TAKEN: Final = {"code": "0", "message": "success"}
_CLOSE_S: Final = 1.0
# Huawei needs a few; each is a file descriptor of the process that pushes.
CONNECTIONS_MAX: Final = 64
# For a handshake, a header and 2 MiB at the most, from a data centre.
CONNECTION_S: Final = 15.0

_RECEIPTS = Counter("sealpush_push_receipts", "What a push service told of wake-ups afterwards, by its word.", ["app", "platform", "word"])
_REFUSED = Counter("sealpush_push_receipts_refused", "Receipts that were refused: not signed, not readable or for nobody.")


class _Brief(asyncio.Protocol):
    """A connection that ends after a while, whatever happens on it; above the bound it is closed at once."""

    def __init__(self, inner: asyncio.Protocol, open_connections: set[_Brief]) -> None:
        self._inner = inner
        self._open = open_connections
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # create_server gives stream transports; uvloop's share no base class with asyncio's.
        stream = cast(asyncio.Transport, transport)
        if len(self._open) >= CONNECTIONS_MAX:
            stream.abort()
            return
        self._open.add(self)
        self._deadline = asyncio.get_running_loop().call_later(CONNECTION_S, stream.abort)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._open.discard(self)
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._deadline is not None else None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class ReceiptsListener:
    """Counts receipts by lane: information, never a confirmed delivery."""

    def __init__(self, lanes: LaneSet, credentials: Credentials, clock: Clock) -> None:
        self._lanes = lanes
        self._credentials = credentials
        self._clock = clock
        self._signatures = Signatures()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._open: set[_Brief] = set()

    async def start(self, host: str, port: int, certificate: Path, private_key: Path) -> int:
        """Listen; gives the real port. Raises SettingsError."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(certificate, private_key)
        except OSError as e:
            raise SettingsError(f"SEALPUSH_TLS_CERTIFICATE or SEALPUSH_TLS_PRIVATE_KEY cannot be used: {e}") from e
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_post("/hms/{app_id}", self._take)
        # Without its log of requests: a receipt is no news.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        make = cast(Callable[[], asyncio.Protocol], self._runner.server)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(
                lambda: _Brief(make(), self._open), host, port, ssl=context, ssl_handshake_timeout=CONNECTION_S
            )
        except OSError as e:
            raise SettingsError(f"cannot listen on {host}:{port}: {e.strerror}; choose another with SEALPUSH_RECEIPTS_PORT") from e
        bound: int = self._listener.sockets[0].getsockname()[1]
        log.info("takes delivery receipts", port=bound)
        return bound

    async def aclose(self) -> None:
        """Idempotent."""
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        app_id = request.match_info["app_id"]
        found = self._credentials.receipt_key(app_id)
        if found is None:
            # As where the signature does not fit: which apps there are is nobody's business.
            return self._refuse(401, "not signed with the key of an app that expects receipts")
        lane_key, receipt_key = found
        try:
            receipts = parse_receipts(await self._signed_body(request, receipt_key))
        except BadSignature as e:
            log.warning("a receipt was refused", app=app_id, problem=str(e))
            return self._refuse(401, "not signed with the key of an app that expects receipts")
        except MalformedReceipts as e:
            log.warning("a receipt was refused", app=app_id, problem=str(e))
            return self._refuse(400, str(e))
        lane = self._lanes.get(*lane_key)
        for receipt in receipts:
            _RECEIPTS.labels(app_id, platform_label(lane_key[1]), receipt.word).inc()
            if lane is not None:
                lane.counts.receipts[receipt.word] += 1
            tag = receipt.wake_up_id.hex() if receipt.wake_up_id is not None else ""
            log.debug("a receipt", app=app_id, wake_up=tag, status=receipt.status, word=receipt.word, vendors_app=receipt.app)
        return _answer(200, _TAKEN)

    async def _signed_body(self, request: web.Request, key: ReceiptKey) -> bytes:
        """The body of a callback that is Huawei's. Raises BadSignature.

        A stranger's body is not read. That a signature was seen is remembered when the body is whole: what broke on the way is sent
        again as it was.
        """
        signature = request.headers.get("X-HUAWEI-CALLBACK-ID")
        Signatures().verify(signature, [key], Reading.of(self._clock))
        body = await request.read()
        self._signatures.verify(signature, [key], Reading.of(self._clock))
        return body

    def _refuse(self, status: int, message: str) -> web.Response:
        _REFUSED.inc()
        return _answer(status, {"code": str(status), "message": message})


def _answer(status: int, content: dict[str, str]) -> web.Response:
    response = web.json_response(content, status=status, headers={"Server": "sealpush"})
    response.force_close()
    return response


async def listen(settings: Settings, lanes: LaneSet, credentials: Credentials, clock: Clock) -> ReceiptsListener:
    """A running listener as the settings ask for it. Raises SettingsError."""
    settings.need("receipts_port", "tls_certificate", "tls_private_key")
    assert settings.receipts_port is not None  # noqa: S101 - need() has just made sure
    assert settings.tls_certificate is not None  # noqa: S101 - as above
    assert settings.tls_private_key is not None  # noqa: S101 - as above
    listener = ReceiptsListener(lanes, credentials, clock)
    await listener.start(settings.host, settings.receipts_port, settings.tls_certificate, settings.tls_private_key)
    return listener
