"""Delivery receipts of Huawei Push Kit: whether a callback is Huawei's, and what it says. Pure, except for one memory.

Receipts are information and never a confirmation: the signature covers a time and a nonce but not the body, and only the
device's own acknowledgement says that something was delivered. A callback without a signature is Huawei's only when a
receipt is tried out in AppGallery Connect.

Sources: developer.huawei.com, "Message Receipt" (HMSCore-Guides msg-receipt-guide-0000001050040176: status codes, signature,
both forms of the key), "Sending Receipts for Downlink Messages" (HMSCore-References-V5 https-send-receipt-api-0000001051066120:
V1), "Message Receipt" (push-api-msg-receipt: V2). Status 256 stands in none of them.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from sealpushd.dispatch.providers.base import WAKE_UP_ID_BYTES, clean_reason
from sealpushd.platform.clock import Reading

# How old or young a signature may be.
SIGNATURE_AGE_MAX = timedelta(minutes=5)
# A signature fits for as long on either side of its time, so it is remembered for so long.
REMEMBERED_FOR = 2 * SIGNATURE_AGE_MAX
# Only what was signed is remembered: Huawei alone can fill this. Then the oldest give way.
REMEMBERED_MAX = 100_000
HEADER_CHARACTERS_MAX = 1024
# Huawei: at most 100 a callback; its older documentation says 1,000.
STATUSES_MAX = 1000
BODY_BYTES_MAX = 2 * 1024 * 1024
STATUS_MAX = 1_000_000

WORDS: Mapping[int, str] = MappingProxyType(
    {
        0: "delivered",
        # The app was removed.
        2: "app-absent",
        # The device's app has another token, or none.
        5: "other-token",
        # The user or the app forbids notifications.
        6: "not-displayed",
        # The device was offline for 30 days.
        10: "inactive-device",
        # A newer message of the same collapse_key came before the device did.
        15: "replaced",
        # The app is not running and may not be started: it gets the message when it runs.
        27: "app-not-running",
        # More than Huawei lets through to one device.
        102: "too-frequent",
        # Huawei holds messages to this device back.
        201: "withheld",
        256: "too-frequent",
    }
)


class BadSignature(Exception):
    """The callback is not Huawei's, or it is one that was seen before; the message says why, without quoting it."""


class MalformedReceipts(Exception):
    """The callback's body is none of a receipt."""


@dataclass(frozen=True, slots=True)
class ReceiptKey:
    """User name and key of the callback as AppGallery Connect has them."""

    user: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one message. `wake_up_id` is None when its tag is none of ours.

    `app` is what Huawei calls the app: its id (V1) or its package (V2); empty: it does not say.
    """

    wake_up_id: bytes | None
    status: int
    word: str
    app: str = ""


@dataclass(frozen=True, slots=True)
class _Signature:
    timestamp: str
    nonce: str
    value: str


class Signatures:
    """Checks the signatures of callbacks. Remembers those it has seen, in this process."""

    def __init__(self, remembered_max: int = REMEMBERED_MAX) -> None:
        self._remembered_max = remembered_max
        # Until when, by the steady clock; in the order in which they came.
        self._seen: OrderedDict[str, float] = OrderedDict()

    def verify(self, header: str | None, keys: Iterable[ReceiptKey], now: Reading) -> ReceiptKey:
        """The first of the keys that signed X-HUAWEI-CALLBACK-ID. Raises BadSignature.

        What is remembered is the signature, not the nonce: time, nonce and user are signed without anything between them, so
        that one signature fits a millisecond time as well as a time in seconds whose rest has moved into the nonce.
        """
        signature = _read_signature(header)
        if abs(_time(signature.timestamp) - now.wall) > SIGNATURE_AGE_MAX:
            raise BadSignature("the signature is older or younger than 5 minutes: is this machine's clock right?")
        signers = [key for key in keys if _fits(signature, key)]
        if not signers:
            raise BadSignature("the signature does not fit: are receipt_user and receipt_key those of AppGallery Connect?")
        self._forget(now.steady)
        if signature.value in self._seen:
            raise BadSignature("the callback was seen before")
        self._seen[signature.value] = now.steady + REMEMBERED_FOR.total_seconds()
        return signers[0]

    def _forget(self, now: float) -> None:
        while self._seen and (len(self._seen) >= self._remembered_max or next(iter(self._seen.values())) < now):
            self._seen.popitem(last=False)


def _read_signature(header: str | None) -> _Signature:
    if header is None:
        raise BadSignature("the callback is not signed: set user name and key of the callback in AppGallery Connect")
    is_plain = len(header) <= HEADER_CHARACTERS_MAX and header.isascii() and header.isprintable()
    parts = [part.partition("=") for part in header.split(";") if part.strip()] if is_plain else []
    fields = {name.strip().lower(): value.strip() for name, _, value in parts}
    is_whole = len(parts) == len(fields) and fields.keys() == {"timestamp", "nonce", "value"} and fields["nonce"]
    if not is_whole or not re.fullmatch(r"[0-9]{10}(?:[0-9]{3})?", fields["timestamp"]):
        raise BadSignature("X-HUAWEI-CALLBACK-ID has not the form timestamp=…; nonce=…; value=…")
    return _Signature(fields["timestamp"], fields["nonce"], fields["value"])


def _time(timestamp: str) -> datetime:
    """Milliseconds, as the newer documentation says, or seconds, as the older does."""
    return datetime.fromtimestamp(int(timestamp) / (1000 if len(timestamp) > 10 else 1), UTC)


def _fits(signature: _Signature, key: ReceiptKey) -> bool:
    """Whether the key signed this: as its text (older configurations), or as what its Base64 stands for (newer ones)."""
    signed = f"{signature.timestamp}{signature.nonce}{key.user}".encode()
    secrets = [key.key.encode()]
    with suppress(ValueError):
        secrets.append(base64.b64decode(key.key, validate=True))
    # An empty key signs nothing: anybody could.
    values = [base64.b64encode(hmac.digest(secret, signed, "sha256")) for secret in secrets if secret]
    return any(hmac.compare_digest(value, signature.value.encode()) for value in values)


def parse_receipts(body: bytes) -> list[Receipt]:
    """The receipts in a callback's body, V1 or V2; what cannot be read of them is left out. Raises MalformedReceipts.

    The device tokens that stand beside are not kept.
    """
    if len(body) > BODY_BYTES_MAX:
        raise MalformedReceipts(f"receipts have at most {BODY_BYTES_MAX} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    statuses = content.get("statuses") if isinstance(content, dict) else None
    if not isinstance(statuses, list):
        raise MalformedReceipts('receipts are a JSON object with a list "statuses"')
    if len(statuses) > STATUSES_MAX:
        raise MalformedReceipts(f"a callback has at most {STATUSES_MAX} receipts")
    receipts = [_read_receipt(status) for status in statuses if isinstance(status, dict)]
    return [receipt for receipt in receipts if receipt is not None]


def _read_receipt(fields: dict[str, object]) -> Receipt | None:
    delivery = fields.get("deliveryStatus")
    status = _read_status(delivery.get("result") if isinstance(delivery, dict) else fields.get("status"))
    if status is None:
        return None
    named = (fields.get(name) for name in ("appid", "clientId", "appPackageName"))
    app = next((name for name in named if isinstance(name, str) and name), "")
    return Receipt(_read_wake_up_id(fields.get("biTag")), status, WORDS.get(status, "other"), clean_reason(app) if app else "")


def _read_status(status: object) -> int | None:
    if isinstance(status, str) and re.fullmatch(r"[0-9]{1,7}", status):
        status = int(status)
    is_one = isinstance(status, int) and not isinstance(status, bool) and 0 <= status <= STATUS_MAX
    return status if is_one and isinstance(status, int) else None


def _read_wake_up_id(tag: object) -> bytes | None:
    if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z0-9_\-]{22}", tag):
        return None
    wake_up_id = base64.urlsafe_b64decode(tag + "==")
    # The last character carries two bits only: others are another spelling of the same id, and none of ours.
    is_ours = base64.urlsafe_b64encode(wake_up_id).rstrip(b"=").decode() == tag
    return wake_up_id if is_ours and len(wake_up_id) == WAKE_UP_ID_BYTES else None
