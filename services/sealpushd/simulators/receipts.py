"""Receipts of the simulated Push Kit: what became of a notification, told to the provider's own server.

Source: Huawei, "Sending Receipts for Downlink Messages" (V1): POST of up to 100 `statuses`; where user and key are configured, a header
X-HUAWEI-CALLBACK-ID with the Base64 of HMAC-SHA256 over timestamp, nonce and user. The key is used as UTF-8 text, as in older
configurations of Huawei's; newer ones hold it in Base64. How often Huawei repeats a receipt could not be found: here a batch is sent
until it is answered with 2xx, and given up after the last try.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import structlog
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PyreqwestError

from sealpushd.simulators.hms import HmsSimulator, ReceiptStatus

STATUSES_MAX: Final = 100
# Receipts that wait for a receiver that is away; the oldest give way.
WAITING_MAX: Final = 10_000
CALLBACK_ID: Final = "X-HUAWEI-CALLBACK-ID"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReceiptSettings:
    """Where receipts go: an https URL, and the PEM of a private authority to trust (None: the public ones).

    A batch is tried `tries` times; the pause between tries begins with `pause_first` and doubles up to `pause_max`.
    """

    url: str
    ca: Path | None = None
    timeout: timedelta = timedelta(seconds=5)
    tries: int = 20
    pause_first: timedelta = timedelta(milliseconds=100)
    pause_max: timedelta = timedelta(seconds=10)


class ReceiptSender:
    """Sends what is put in, in batches of one app, in order. `sending` runs it."""

    def __init__(self, settings: ReceiptSettings, hms: HmsSimulator, now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._hms = hms
        self._now = now
        self._waiting: deque[ReceiptStatus] = deque(maxlen=WAITING_MAX)
        self._changed = asyncio.Event()
        self._closing = False

    def put(self, receipt: ReceiptStatus) -> None:
        """Take one receipt; never waits."""
        self._waiting.append(receipt)
        self._changed.set()

    @classmethod
    @asynccontextmanager
    async def sending(cls, settings: ReceiptSettings, hms: HmsSimulator, now: Callable[[], datetime]) -> AsyncIterator[ReceiptSender]:
        """Receipts of this simulator are sent while the block lasts. Raises OSError when the authority cannot be read."""
        builder = ClientBuilder().https_only(True).no_proxy().timeout(settings.timeout)
        if settings.ca is not None:
            builder = builder.add_root_certificate_pem(settings.ca.read_bytes())
        sender = cls(settings, hms, now)
        async with builder.build() as client:
            hms.receipts = sender
            task = asyncio.create_task(sender._run(client), name="receipts")
            try:
                yield sender
            finally:
                hms.receipts = None
                # A cancellation that meets an answer is lost in the HTTP client: then this tells.
                sender._closing = True
                task.cancel()
                await asyncio.wait((task,))
                if not task.cancelled():
                    task.result()

    async def _run(self, client: Client) -> None:
        while not self._closing:
            await self._changed.wait()
            self._changed.clear()
            while not self._closing and (batch := self._next_batch()):
                await self._deliver(client, batch)

    def _next_batch(self) -> list[ReceiptStatus]:
        """The oldest receipts of one app."""
        batch: list[ReceiptStatus] = []
        while self._waiting and len(batch) < STATUSES_MAX and (not batch or self._waiting[0].app_id == batch[0].app_id):
            batch.append(self._waiting.popleft())
        return batch

    async def _deliver(self, client: Client, batch: Sequence[ReceiptStatus]) -> None:
        pause = self._settings.pause_first
        for _ in range(self._settings.tries):
            problem = await self._try(client, batch)
            if problem is None:
                self._hms.counters.receipts += len(batch)
                return
            if self._closing:
                return
            _log.info("the receiver of receipts does not take them; they are sent again", problem=problem)
            await asyncio.sleep(pause.total_seconds())
            pause = min(2 * pause, self._settings.pause_max)
        _log.warning("receipts were given up", receipts=len(batch))

    async def _try(self, client: Client, batch: Sequence[ReceiptStatus]) -> str | None:
        """Send a batch once; gives what went wrong."""
        body = json.dumps({"statuses": [_to_json(receipt) for receipt in batch]}).encode()
        headers = {"content-type": "application/json", **self._signed(batch[0].app_id)}
        try:
            response = await client.post(self._settings.url).headers(headers).body_bytes(body).build().send()
        except PyreqwestError as e:
            return type(e).__name__
        return None if 200 <= response.status < 300 else f"HTTP {response.status}"

    def _signed(self, app_id: str) -> dict[str, str]:
        client = self._hms.clients.get(app_id)
        if client is None or not client.receipt_user or not client.receipt_key:
            return {}
        timestamp, nonce = str(int(self._now().timestamp() * 1000)), str(uuid.uuid4())
        value = signature(client.receipt_key, timestamp, nonce, client.receipt_user)
        return {CALLBACK_ID: f"timestamp={timestamp}; nonce={nonce}; value={value}"}


def signature(key: str, timestamp: str, nonce: str, user: str) -> str:
    """The `value` of the header."""
    return base64.b64encode(hmac.digest(key.encode(), f"{timestamp}{nonce}{user}".encode(), "sha256")).decode("ascii")


def _to_json(receipt: ReceiptStatus) -> dict[str, object]:
    return {
        "biTag": receipt.bi_tag,
        "appid": receipt.app_id,
        "token": receipt.token,
        "status": receipt.status,
        "timestamp": receipt.timestamp_ms,
        "requestId": receipt.request_id,
    }
