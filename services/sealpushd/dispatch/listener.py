"""Takes Huawei's delivery receipts over HTTPS: POST /hms/APP_ID, signed with the callback's key.

aiohttp speaks HTTP here: it needs no second server around it, and bounds what it reads.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import Counter

from sealpush.v1 import common_pb2
from sealpushd.dispatch.credentials import Credentials
from sealpushd.dispatch.lanes import LaneSet
from sealpushd.dispatch.receipts import BODY_BYTES_MAX, BadSignature, MalformedReceipts, Signatures, parse_receipts
from sealpushd.platform.clock import Clock
from sealpushd.platform.metrics import platform_label
from sealpushd.platform.settings import Settings, SettingsError

log = structlog.get_logger()

# Huawei reads a code from the body: 0 is success, anything else is tried again.
_TAKEN: Final = {"code": "0", "message": "success"}
_CLOSE_S: Final = 1.0

_RECEIPTS = Counter("sealpush_push_receipts", "What a push service told of wake-ups afterwards, by its word.", ["app", "platform", "word"])


class ReceiptsListener:
    """Counts receipts by lane: information, never a confirmed delivery."""

    def __init__(self, lanes: LaneSet, credentials: Credentials, clock: Clock) -> None:
        self._lanes = lanes
        self._credentials = credentials
        self._clock = clock
        self._signatures = Signatures()
        self._runner: web.AppRunner | None = None

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
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=context).start()
        except OSError as e:
            raise SettingsError(f"cannot listen on {host}:{port}: {e.strerror}; choose another with SEALPUSH_RECEIPTS_PORT") from e
        bound: int = self._runner.addresses[0][1]
        log.info("takes delivery receipts", port=bound)
        return bound

    async def aclose(self) -> None:
        """Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        app_id = request.match_info["app_id"]
        key = self._credentials.receipt_key(app_id)
        if key is None:
            return web.json_response({"code": "404", "message": "no receipts are expected for this app"}, status=404)
        try:
            self._signatures.verify(request.headers.get("X-HUAWEI-CALLBACK-ID"), [key], self._clock.now())
            receipts = parse_receipts(await request.read())
        except BadSignature as e:
            log.warning("a receipt was refused", app=app_id, problem=str(e))
            return web.json_response({"code": "401", "message": str(e)}, status=401)
        except MalformedReceipts as e:
            log.warning("a receipt was refused", app=app_id, problem=str(e))
            return web.json_response({"code": "400", "message": str(e)}, status=400)
        lane = self._lanes.get(app_id, common_pb2.PLATFORM_HUAWEI)
        for receipt in receipts:
            _RECEIPTS.labels(app_id, platform_label(common_pb2.PLATFORM_HUAWEI), receipt.word).inc()
            if lane is not None:
                lane.counts.receipts[receipt.word] += 1
        return web.json_response(_TAKEN)


async def listen(settings: Settings, lanes: LaneSet, credentials: Credentials, clock: Clock) -> ReceiptsListener:
    """A running listener as the settings ask for it. Raises SettingsError."""
    settings.need("receipts_port", "tls_certificate", "tls_private_key")
    assert settings.receipts_port is not None  # noqa: S101 - need() has just made sure
    assert settings.tls_certificate is not None  # noqa: S101 - as above
    assert settings.tls_private_key is not None  # noqa: S101 - as above
    listener = ReceiptsListener(lanes, credentials, clock)
    await listener.start(settings.host, settings.receipts_port, settings.tls_certificate, settings.tls_private_key)
    return listener
