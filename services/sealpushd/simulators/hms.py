"""A strict Huawei Push Kit (HMS) with Huawei's token endpoint: it refuses what Huawei refuses, with Huawei's codes.

HTTP 200 is not success here: the `code` of the body says what became of a send. Sources: Huawei, "Sending Downlink Messages" (REST, v1;
limits, tokens, collapse_key, ttl), the table of OAuth errors in "Account Kit, server error codes" (error 1101 with sub_error 12304, 20002,
20003, 20171, 20182), "Sending Receipts for Downlink Messages", and "six most common result codes": 80200001 also for an access token of
another app, 80300007 also for tokens of another app, 80300010 also where `message` or `token` is not found at its place.

What could not be checked against Huawei, and is ours: the order of the checks; the texts; sub_error 20001 for what is no form; which of
80100001 (parameters) and 80100003 (structure) a fault gets; that unknown fields are refused (80100003); 80300002 for an app id that is
not registered; that a ttl needs its unit; how a lifetime of 0 is taken (now or never); how many messages wait for an offline device at
collapse_key -1.

Only what is sent to tokens is delivered; topics and conditions are refused. Of `notification`, `apns` and `webpush` only that they are
objects is checked. One token here is one app on one device. Uninstalling the app makes its token illegal at once; Huawei learns of it
from the device.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from sealpushd.simulators.core import Answer, Device, Notification, PushSimulator, Refused, Reply, Verdict, parse_json
from sealpushd.simulators.exchange import Exchange, HttpRequest
from sealpushd.simulators.oauth import (
    ACCESS_TOKEN_LIFETIME,
    AccessTokens,
    TokenState,
    bearer,
    granted,
    json_headers,
    read_form,
    to_json,
    without_secrets,
)

TOKENS_MAX: Final = 1_000
MESSAGE_BYTES_MAX: Final = 4096
TTL_MAX: Final = timedelta(days=15)
TTL_DEFAULT: Final = timedelta(days=1)
COLLAPSE_ALL: Final = -1
COLLAPSE_KEY_MAX: Final = 100
# A bound of the process; the oldest give way.
WAITING_MAX: Final = 100

SUCCESS: Final = "80000000"
PARTIAL: Final = "80100000"
# Codes and what they mean.
CODES: Final = {
    SUCCESS: "Success",
    PARTIAL: "The message is successfully sent to some tokens.",
    "80100001": "Some request parameters are incorrect.",
    "80100003": "Incorrect message structure.",
    "80100004": "The message expiration time is earlier than the current time or out of range.",
    "80100013": "The collapse_key message field is invalid.",
    "80200001": "OAuth authentication error.",
    "80200003": "OAuth token expired.",
    "80300002": "The current app does not have the permission to send messages.",
    "80300007": "All tokens are invalid.",
    "80300008": "The message body size exceeds the default value.",
    "80300010": "The number of tokens in the message body exceeds the default value.",
    "80600003": "Failed to request the OAuth service.",
    "81000001": "System internal error.",
}
# Receipts: the app has it; the app is absent; a newer one took its place while it waited.
DELIVERED: Final = 0
APP_ABSENT: Final = 2
REPLACED: Final = 15

_PATH: Final = re.compile(r"/v1/([^/?]+)/messages:send")
_APP_ID: Final = re.compile(r"[0-9]{1,64}")
_DEVICE_TOKEN: Final = re.compile(r"[A-Za-z0-9_\-]{130}")
_TTL: Final = re.compile(r"([0-9]{1,9})(?:\.[0-9]{1,9})?s")
_TOKEN_ALPHABET: Final = string.ascii_letters + string.digits + "_-"

_REQUEST_FIELDS: Final = frozenset({"validate_only", "message"})
_MESSAGE_FIELDS: Final = frozenset({"data", "notification", "android", "apns", "webpush", "token", "topic", "condition"})
_ANDROID_FIELDS: Final = frozenset(
    {"collapse_key", "urgency", "category", "ttl", "bi_tag", "receipt_id", "fast_app_target", "data", "notification", "target_user_type"}
)


@dataclass(frozen=True, slots=True)
class ReceiptStatus:
    """What became of one notification; `timestamp_ms` is the simulator's clock."""

    app_id: str
    bi_tag: str
    token: str
    status: int
    timestamp_ms: int
    request_id: str


class Receipts(Protocol):
    """Where receipts go."""

    def put(self, receipt: ReceiptStatus) -> None:
        """Take one receipt; never waits."""


@dataclass(frozen=True, slots=True, repr=False)
class Client:
    """An app as the token endpoint knows it; user and key sign its receipts, "" each: they are not signed."""

    secret: str
    receipt_user: str = ""
    receipt_key: str = ""


@dataclass(frozen=True, slots=True)
class _Message:
    tokens: list[str]
    payload: bytes
    headers: dict[str, str]
    ttl: timedelta
    validate_only: bool


class HmsSimulator(PushSimulator):
    """The state of the simulated service and its answers. Receipts go to `receipts`, None: nowhere."""

    streams_max = 100
    # 1,000 tokens and a message that JSON may have made six times as long.
    body_bytes_max = 256 * 1024
    speaks_http1 = True
    # Version 2 still answers, in the same way.
    token_paths = ("/oauth2/v3/token", "/oauth2/v2/token")

    def __init__(self, *, now: Callable[[], datetime], receipts: Receipts | None = None) -> None:
        super().__init__(now=now)
        self.receipts = receipts
        self.clients: dict[str, Client] = {}
        self._access_tokens = AccessTokens()

    # control

    def register_client(self, app_id: str, client_secret: str, receipt_user: str = "", receipt_key: str = "") -> None:
        """Trust this client. Raises ValueError on a bad id or an empty secret."""
        self._check_topic(app_id)
        if not client_secret:
            raise ValueError("a client has a secret")
        self.clients[app_id] = Client(client_secret, receipt_user, receipt_key)

    def revoke_credential(self, credential_id: str) -> bool:
        self._access_tokens.revoke(credential_id)
        return self.clients.pop(credential_id, None) is not None

    # the token endpoint

    def _grant(self, request: HttpRequest) -> Verdict:
        if request.method != "POST":
            raise _refused_token(20001, "method not allowed", status=405)
        try:
            form = read_form(request)
        except ValueError as e:
            raise _refused_token(20001, str(e)) from e
        if form.get("grant_type") != "client_credentials":
            raise _refused_token(20182, "invalid grant_type")
        app_id, secret = form.get("client_id", ""), form.get("client_secret", "")
        if not _APP_ID.fullmatch(app_id):
            raise _refused_token(20002, "invalid client_id")
        if not secret:
            raise _refused_token(20171, "client_secret is empty")
        client = self.clients.get(app_id)
        if client is None:
            raise _refused_token(20003, "client_id does not exist")
        if not hmac.compare_digest(client.secret.encode(), secret.encode()):
            raise _refused_token(12304, "client_id and client_secret do not match")
        self.counters.access_tokens += 1
        return Verdict(Reply(200, granted(self._access_tokens.issue(app_id, self.now()), ACCESS_TOKEN_LIFETIME), accepted=True))

    def _without_secrets(self, request: HttpRequest) -> bytes:
        return without_secrets(request)

    # sends

    def _check_topic(self, topic: str) -> None:
        if not _APP_ID.fullmatch(topic):
            raise ValueError("an app of Push Kit is known by its app id: digits")

    def _new_device_token(self) -> str:
        return "".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(130))

    def _admit(self, exchange: Exchange) -> Callable[[], Verdict]:
        request = exchange.request
        path = _PATH.fullmatch(request.path)
        if path is None:
            raise Refused(Reply(404, to_json({"code": "404", "msg": "Not found."}), reason="404"))
        if request.method != "POST":
            raise Refused(Reply(405, to_json({"code": "405", "msg": "Method not allowed."}), reason="405"))
        app_id = path[1]
        state, owner = self._access_tokens.look(bearer(request) or "", self.now())
        if state is TokenState.EXPIRED:
            raise _refused("80200003")
        if state is not TokenState.GOOD:
            raise _refused("80200001")
        if app_id not in self.clients:
            raise _refused("80300002")
        if owner != app_id:
            raise _refused("80200001")
        return lambda: self._check(request, app_id)

    def _check(self, request: HttpRequest, app_id: str) -> Verdict:
        message = _read_message(request)
        devices, illegal = [], []
        for token in dict.fromkeys(message.tokens):
            device = self.device(token) if _DEVICE_TOKEN.fullmatch(token) else None
            if device is None or device.topic != app_id or device.uninstalled_at is not None:
                illegal.append(token)
            else:
                devices.append(device)
        if not devices:
            raise _refused("80300007")
        request_id = _request_id()
        if illegal:
            msg = json.dumps({"success": len(devices), "failure": len(illegal), "illegal_tokens": illegal})
            reply = _coded(200, PARTIAL, msg, request_id)
        else:
            reply = _coded(200, SUCCESS, request_id=request_id)
        if message.validate_only:
            return Verdict(reply)
        headers = {"request_id": request_id, **message.headers}
        expires_at = self.now() + message.ttl
        return Verdict(reply, [(device, Notification(device.token, headers, message.payload, expires_at)) for device in devices])

    def _addressed(self, request: HttpRequest) -> Sequence[str]:
        try:
            tokens = parse_json(request.body)["message"]["token"]
        except (ValueError, KeyError, TypeError):
            return []
        return [token for token in tokens if isinstance(token, str)] if isinstance(tokens, list) else []

    # answers

    def _render(self, exchange: Exchange, answer: Answer) -> Reply:
        if answer.reason is None:
            # Flow control and gateway errors have no code of Push Kit.
            return Reply(answer.status, accepted=answer.status == 200)
        if self._asks_token(exchange.request):
            return Reply(answer.status, to_json({"error": _number(answer.reason), "error_description": "scripted"}), reason=answer.reason)
        return _coded(answer.status, answer.reason)

    def _expire(self, exchange: Exchange) -> Reply:
        self._access_tokens.expire(bearer(exchange.request) or "", self.now())
        return _coded(200, "80200003")

    def _headers_of_all(self, exchange: Exchange) -> list[tuple[str, str]]:
        return json_headers(self.now())

    # effects

    def _store(self, device: Device, notification: Notification) -> None:
        now = self.now()
        alive = [one for one in device.waiting if one.expires_at is None or one.expires_at > now]
        self.counters.dropped += len(device.waiting) - len(alive)
        group = int(notification.headers["collapse_key"])
        if group == COLLAPSE_ALL:
            kept = alive[max(len(alive) + 1 - WAITING_MAX, 0) :]
            self.counters.dropped += len(alive) - len(kept)
        else:
            # 0 keeps the newest of the app, others the newest of their group.
            replaced = [one for one in alive if group in (0, int(one.headers["collapse_key"]))]
            kept = [one for one in alive if one not in replaced]
            self.counters.dropped += len(replaced)
            for one in replaced:
                self._report(one, REPLACED)
        device.waiting = [*kept, notification]

    def _handed_over(self, notification: Notification) -> None:
        super()._handed_over(notification)
        self._report(notification, DELIVERED)

    def _app_removed(self, device: Device, waiting: Sequence[Notification]) -> None:
        super()._app_removed(device, waiting)
        for notification in waiting:
            self._report(notification, APP_ABSENT)

    def _report(self, notification: Notification, status: int) -> None:
        device = self.device(notification.device_token)
        if self.receipts is not None and device is not None:
            headers = notification.headers
            at = int(self.now().timestamp() * 1000)
            receipt = ReceiptStatus(device.topic, headers.get("bi_tag", ""), device.token, status, at, headers["request_id"])
            self.receipts.put(receipt)


# Reading a message


def _read_message(request: HttpRequest) -> _Message:
    """The message of a send; raises Refused with Huawei's code."""
    if request.body_bytes > len(request.body):
        raise _refused("80300008")
    if (request.header("content-type") or "").partition(";")[0].strip().lower() != "application/json":
        raise _refused("80100001", "Content-Type must be application/json")
    try:
        body = parse_json(request.body)
    except ValueError as e:
        raise _refused("80100001", "the body is no JSON") from e
    if not isinstance(body, dict):
        raise _refused("80100001", "the body is no JSON object")
    validate_only = body.get("validate_only", False)
    if not isinstance(validate_only, bool):
        raise _refused("80100001", "validate_only must be a boolean")
    message = body.get("message")
    tokens = message.get("token") if isinstance(message, dict) else None
    if isinstance(message, dict) and (message.keys() & {"topic", "condition"}):
        raise _refused("80100003", "this simulator delivers to tokens only")
    if not isinstance(message, dict) or not isinstance(tokens, list) or not 1 <= len(tokens) <= TOKENS_MAX:
        raise _refused("80300010")
    if not all(isinstance(token, str) for token in tokens):
        raise _refused("80100003", "token must be strings")
    without_tokens = {**body, "message": {name: value for name, value in message.items() if name != "token"}}
    if len(json.dumps(without_tokens, ensure_ascii=False, separators=(",", ":")).encode()) > MESSAGE_BYTES_MAX:
        raise _refused("80300008")
    _only(body, _REQUEST_FIELDS)
    _only(message, _MESSAGE_FIELDS)
    data = message.get("data")
    if not isinstance(data, str | None):
        raise _refused("80100003", "data must be a string")
    for name in ("notification", "android", "apns", "webpush"):
        if not isinstance(message.get(name, {}), dict):
            raise _refused("80100003", f"{name} must be an object")
    android = message.get("android", {})
    _only(android, _ANDROID_FIELDS)
    if not isinstance(android.get("data", ""), str):
        raise _refused("80100003", "android.data must be a string")
    data = android.get("data", data)
    shown = android.get("notification", message.get("notification"))
    if data is None and shown is None:
        raise _refused("80100003", "the message has neither data nor notification")
    headers, ttl = _read_android(android)
    if shown is not None:
        headers["notification"] = json.dumps(shown)
    return _Message(tokens, (data or "").encode(), headers, ttl, validate_only)


def _read_android(android: dict[str, Any]) -> tuple[dict[str, str], timedelta]:
    """What the phone is told beside the data, and the lifetime; raises Refused."""
    urgency = android.get("urgency", "NORMAL")
    if urgency not in ("HIGH", "NORMAL"):
        raise _refused("80100003", "urgency must be HIGH or NORMAL")
    collapse_key = android.get("collapse_key", COLLAPSE_ALL)
    if type(collapse_key) is not int or not COLLAPSE_ALL <= collapse_key <= COLLAPSE_KEY_MAX:
        raise _refused("80100013")
    bi_tag = android.get("bi_tag", "")
    if not isinstance(bi_tag, str):
        raise _refused("80100003", "bi_tag must be a string")
    ttl = TTL_DEFAULT
    if "ttl" in android:
        given = _TTL.fullmatch(android["ttl"]) if isinstance(android["ttl"], str) else None
        if given is None or timedelta(seconds=int(given[1])) > TTL_MAX:
            raise _refused("80100004")
        ttl = timedelta(seconds=int(given[1]))
    headers = {"urgency": urgency, "ttl": str(int(ttl.total_seconds())), "collapse_key": str(collapse_key)}
    return headers | ({"bi_tag": bi_tag} if bi_tag else {}), ttl


def _only(given: dict[str, Any], known: frozenset[str]) -> None:
    for name in given:
        if name not in known:
            raise _refused("80100003", f"unknown field {name[:64]}")


# Answers


def _request_id() -> str:
    """24 digits, as Huawei's."""
    return "".join(secrets.choice(string.digits) for _ in range(24))


def _coded(status: int, code: str, msg: str = "", request_id: str = "") -> Reply:
    body = to_json({"code": code, "msg": msg or CODES.get(code, "scripted"), "requestId": request_id or _request_id()})
    return Reply(status, body, reason=code, accepted=status == 200 and code in (SUCCESS, PARTIAL))


def _refused(code: str, detail: str = "") -> Refused:
    return Refused(_coded(200, code, f"{CODES[code]} {detail}".strip()))


def _refused_token(sub_error: int, description: str, *, status: int = 400) -> Refused:
    body = to_json({"error": 1101, "sub_error": sub_error, "error_description": description})
    return Refused(Reply(status, body, reason="1101"))


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
