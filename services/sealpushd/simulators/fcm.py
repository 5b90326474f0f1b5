"""A strict Firebase Cloud Messaging, HTTP v1, with Google's token endpoint: it refuses what Google refuses, in Google's words.

Sources: Firebase, "REST Resource: projects.messages", "ErrorCode", "FCM error codes" (both shapes of INVALID_ARGUMENT: `BadRequest`
for a bad field, `FcmError` alone for a malformed registration token), "Non-collapsible and collapsible messages" (100 waiting
messages, four collapse keys), "Throttling and quotas"; Google Identity, "Using OAuth 2.0 for server to server applications". The
texts of the token endpoint's errors and of 401 and 403 are those that users report of the real service.

What could not be checked against Google, and is ours: the order of the checks; the texts for a bad ttl and for the quotas; that what
is wrong with a readable message answers with FcmError and BadRequest together; the reason in a 401 for a token that is unknown or
revoked; which four collapse keys stay (here: the newest). Google would hand out an access token for any known scope and refuse the
send; here a scope that cannot send is refused at once. `collapse_key` among the data, which Google overwrites silently, is refused.

Only what is sent to one registration token is delivered; topics, conditions and Firebase installation ids (`fid`) are refused. Of
`notification`, `apns`, `webpush` and `fcm_options` only that they are objects is checked. One registration token here is one app on one
device.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sealpushd.simulators.core import (
    CLOCK_SKEW_MAX,
    Answer,
    Device,
    Notification,
    PushSimulator,
    Refused,
    Reply,
    Verdict,
    parse_json,
)
from sealpushd.simulators.exchange import Exchange, HttpRequest
from sealpushd.simulators.oauth import AccessTokens, TokenState, bearer, granted, json_headers, read_form, to_json, without_secrets

DATA_BYTES_MAX: Final = 4096
TTL_MAX: Final = timedelta(seconds=2_419_200)
# Without collapse keys; one more and all that waits is thrown away.
WAITING_MAX: Final = 100
COLLAPSE_KEYS_MAX: Final = 4
PROJECT_MESSAGES_PER_MINUTE_MAX: Final = 600_000
DEVICE_MESSAGES_PER_MINUTE_MAX: Final = 240
DEVICE_MESSAGES_PER_HOUR_MAX: Final = 5_000
ASSERTION_LIFETIME_MAX: Final = timedelta(hours=1)
# What Google answers; the token is good a little longer.
EXPIRES_IN: Final = timedelta(seconds=3599)
SCOPES: Final = frozenset({"https://www.googleapis.com/auth/firebase.messaging", "https://www.googleapis.com/auth/cloud-platform"})
GRANT_TYPE: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"

FCM_ERROR: Final = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST: Final = "type.googleapis.com/google.rpc.BadRequest"
ERROR_INFO: Final = "type.googleapis.com/google.rpc.ErrorInfo"
QUOTA_FAILURE: Final = "type.googleapis.com/google.rpc.QuotaFailure"

# FcmError's errorCode to the status of google.rpc beside it.
ERROR_CODES: Final = {
    "UNSPECIFIED_ERROR": "UNKNOWN",
    "INVALID_ARGUMENT": "INVALID_ARGUMENT",
    "UNREGISTERED": "NOT_FOUND",
    "SENDER_ID_MISMATCH": "PERMISSION_DENIED",
    "QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED",
    "UNAVAILABLE": "UNAVAILABLE",
    "INTERNAL": "INTERNAL",
    "THIRD_PARTY_AUTH_ERROR": "UNAUTHENTICATED",
}
# google.rpc's HTTP mapping, for scripted answers with a word of their own.
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_SENDER_HELP: Final = "See https://developers.google.com/identity/sign-in/web/devconsole-project."
_EXPECTED: Final = "Expected OAuth 2 access token, login cookie or other valid authentication credential."
_MISSING: Final = f"Request is missing required authentication credential. {_EXPECTED} {_SENDER_HELP}"
_INVALID: Final = f"Request had invalid authentication credentials. {_EXPECTED} {_SENDER_HELP}"
_BAD_TIMES: Final = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
    "Check your iat and exp values in the JWT claim."
)

_PATH: Final = re.compile(r"/v1/projects/([^/?]+)/messages:send")
_PROJECT: Final = re.compile(r"[a-z0-9][a-z0-9.:\-]{1,62}")
_DEVICE_TOKEN: Final = re.compile(r"[A-Za-z0-9_\-]{11,64}:APA91b[A-Za-z0-9_\-]{100,200}")
_DURATION: Final = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9}))?s")
_RESERVED_PREFIXES: Final = ("google", "gcm")
_RESERVED_KEYS: Final = frozenset({"from", "message_type", "collapse_key"})

_REQUEST_FIELDS: Final = {"validate_only": bool, "message": dict}
_MESSAGE_FIELDS: Final = {
    "name": str,
    "data": dict,
    "notification": dict,
    "android": dict,
    "webpush": dict,
    "apns": dict,
    "fcm_options": dict,
    "fid": str,
    "token": str,
    "topic": str,
    "condition": str,
}
_ANDROID_FIELDS: Final = {
    "collapse_key": str,
    "priority": str,
    "ttl": str,
    "restricted_package_name": str,
    "data": dict,
    "notification": dict,
    "fcm_options": dict,
    "direct_boot_ok": bool,
    "bandwidth_constrained_ok": bool,
    "restricted_satellite_ok": bool,
}
_TYPE_NAMES: Final = {str: "TYPE_STRING", bool: "TYPE_BOOL", dict: "TYPE_MESSAGE"}


@dataclass(slots=True)
class _Account:
    project_id: str
    # By private_key_id.
    keys: dict[str, RSAPublicKey] = field(default_factory=dict)


@dataclass(slots=True)
class _Window:
    """How many messages fell into the current stretch of time."""

    seconds: int
    number: int = -1
    count: int = 0

    def left_s(self, now: datetime) -> int:
        """Seconds until the next stretch begins."""
        return self.seconds - int(now.timestamp()) % self.seconds

    def is_full(self, now: datetime, count_max: int) -> bool:
        number = int(now.timestamp()) // self.seconds
        if number != self.number:
            self.number, self.count = number, 0
        return self.count >= count_max


@dataclass(frozen=True, slots=True)
class _Message:
    token: str
    data: Mapping[str, str]
    headers: dict[str, str]
    ttl: timedelta
    validate_only: bool


class FcmSimulator(PushSimulator):
    """The state of the simulated service and its answers.

    `token_audience` is the only `aud` of an assertion that is accepted; None: any https URL whose path is the token endpoint's.
    `messages_per_minute_max` is the quota of a project.
    """

    # What Google's front ends announce.
    streams_max = 100
    # 4096 bytes of data may be six times as long in JSON; the rest of a message is small.
    body_bytes_max = 64 * 1024
    speaks_http1 = True
    token_paths = ("/token",)

    def __init__(
        self,
        *,
        now: Callable[[], datetime],
        token_audience: str | None = None,
        messages_per_minute_max: int = PROJECT_MESSAGES_PER_MINUTE_MAX,
    ) -> None:
        super().__init__(now=now)
        self._token_audience = token_audience
        self.messages_per_minute_max = messages_per_minute_max
        self._accounts: dict[str, _Account] = {}
        self._access_tokens = AccessTokens()
        self._project_windows: dict[str, _Window] = {}
        self._device_windows: dict[str, tuple[_Window, _Window]] = {}
        # Devices whose waiting messages were thrown away, and how many.
        self._deleted: dict[str, int] = {}

    # control

    def register_service_account(self, project_id: str, client_email: str, private_key_id: str, public_key_pem: bytes) -> None:
        """Trust this key of an account, besides its others. Raises ValueError when it is not an RSA public key."""
        self._check_topic(project_id)
        if not client_email or not private_key_id:
            raise ValueError("a service account has a client_email and a private_key_id")
        public_key = load_pem_public_key(public_key_pem)
        if not isinstance(public_key, RSAPublicKey):
            raise ValueError("a service account's key must be a PEM public key of RSA")
        known = self._accounts.get(client_email)
        if known is None or known.project_id != project_id:
            known = self._accounts[client_email] = _Account(project_id)
        known.keys[private_key_id] = public_key

    def revoke_credential(self, credential_id: str) -> bool:
        self._access_tokens.revoke(credential_id)
        return self._accounts.pop(credential_id, None) is not None

    def uninstall(self, device_token: str) -> bool:
        self._deleted.pop(device_token, None)
        self._device_windows.pop(device_token, None)
        return super().uninstall(device_token)

    def deliver_waiting(self, device: Device) -> None:
        """As for all, after the notice that messages were deleted, if some were."""
        deleted = self._deleted.pop(device.token, 0)
        if deleted and device.line is not None:
            headers = {"message_type": "deleted_messages", "total_deleted": str(deleted)}
            device.line.put(Notification(device.token, headers, b"{}", None))
        super().deliver_waiting(device)

    # the token endpoint

    def _grant(self, request: HttpRequest) -> Verdict:
        if request.method != "POST":
            raise _refused_token("invalid_request", "Method must be POST", status=405)
        try:
            form = read_form(request)
        except ValueError as e:
            raise _refused_token("invalid_request", f"Bad Request: {e}") from e
        if form.get("grant_type") != GRANT_TYPE:
            raise _refused_token("unsupported_grant_type", f"Invalid grant_type: {form.get('grant_type', '')}")
        if not form.get("assertion"):
            raise _refused_token("invalid_request", "Missing required parameter: assertion")
        account = self._verify(form["assertion"])
        self.counters.access_tokens += 1
        return Verdict(Reply(200, granted(self._access_tokens.issue(account, self.now()), EXPIRES_IN), accepted=True))

    def _verify(self, assertion: str) -> str:
        """The account that signed this assertion; raises Refused."""
        # The clock is ours and the audience a URL of any host, so PyJWT must not judge them.
        options: jwt.types.Options = {"verify_exp": False, "verify_iat": False, "verify_aud": False, "verify_nbf": False}
        try:
            claimed = jwt.decode(assertion, options={"verify_signature": False})
            key_id = jwt.get_unverified_header(assertion).get("kid")
        except jwt.PyJWTError as e:
            raise _refused_token("invalid_grant", "Invalid JWT Signature.") from e
        email = claimed.get("iss")
        account = self._accounts.get(email) if isinstance(email, str) else None
        if account is None or not isinstance(email, str):
            raise _refused_token("invalid_grant", "Invalid grant: account not found")
        keys = list(account.keys.values()) if key_id is None else [key for known, key in account.keys.items() if known == key_id]
        claims = next(filter(None, (_signed(assertion, key, options) for key in keys)), None)
        if claims is None:
            raise _refused_token("invalid_grant", "Invalid JWT Signature.")
        self._check_claims(claims)
        return email

    def _check_claims(self, claims: Mapping[str, Any]) -> None:
        issued_at, expires_at = claims.get("iat"), claims.get("exp")
        now = self.now().timestamp()
        if (
            not _is_number(issued_at)
            or not _is_number(expires_at)
            or not 0 < expires_at - issued_at <= ASSERTION_LIFETIME_MAX.total_seconds()
            or expires_at <= now
            or issued_at - now > CLOCK_SKEW_MAX.total_seconds()
        ):
            raise _refused_token("invalid_grant", _BAD_TIMES)
        if not self._is_audience(claims.get("aud")):
            raise _refused_token("invalid_grant", "Invalid JWT: Failed audience check.")
        scope = claims.get("scope")
        if not isinstance(scope, str) or not SCOPES & set(scope.split(" ")):
            raise _refused_token("invalid_scope", "Invalid OAuth scope or ID token audience provided.")

    def _is_audience(self, audience: object) -> bool:
        if not isinstance(audience, str):
            return False
        if self._token_audience is not None:
            return audience == self._token_audience
        url = urlsplit(audience)
        return url.scheme == "https" and url.path in self.token_paths

    def _without_secrets(self, request: HttpRequest) -> bytes:
        return without_secrets(request)

    # sends

    def _check_topic(self, topic: str) -> None:
        if not _PROJECT.fullmatch(topic):
            raise ValueError("an FCM app is known by the id of its project: lower-case letters, digits and hyphens")

    def _new_device_token(self) -> str:
        return f"{secrets.token_urlsafe(16)}:APA91b{secrets.token_urlsafe(101)[:134]}"

    def _admit(self, exchange: Exchange) -> Callable[[], Verdict]:
        request = exchange.request
        path = _PATH.fullmatch(request.path_only)
        if path is None or request.method != "POST":
            raise _refused(404, "NOT_FOUND", "Requested entity was not found.")
        account = self._authenticate(request)
        project_id = path[1]
        if account.project_id != project_id:
            resource = f"//cloudresourcemanager.googleapis.com/projects/{project_id}"
            permission = "cloudmessaging.messages.create"
            info = {
                "@type": ERROR_INFO,
                "reason": "IAM_PERMISSION_DENIED",
                "domain": "cloudresourcemanager.googleapis.com",
                "metadata": {"resource": f"projects/{project_id}", "permission": permission},
            }
            problem = f"Permission '{permission}' denied on resource '{resource}' (or it may not exist)."
            raise _refused(403, "PERMISSION_DENIED", problem, [info])
        return lambda: self._check(request, project_id)

    def _authenticate(self, request: HttpRequest) -> _Account:
        token = bearer(request)
        if token is None:
            raise _unauthenticated(_MISSING, "CREDENTIALS_MISSING")
        state, owner = self._access_tokens.look(token, self.now())
        account = self._accounts.get(owner)
        if state is TokenState.GOOD and account is not None:
            return account
        raise _unauthenticated(_INVALID, "ACCESS_TOKEN_EXPIRED" if state is TokenState.EXPIRED else "ACCESS_TOKEN_TYPE_UNSUPPORTED")

    def _check(self, request: HttpRequest, project_id: str) -> Verdict:
        message = _read_message(request)
        if not _DEVICE_TOKEN.fullmatch(message.token):
            problem = "The registration token is not a valid FCM registration token"
            raise _refused(400, "INVALID_ARGUMENT", problem, [_fcm_error("INVALID_ARGUMENT")], "INVALID_ARGUMENT")
        device = self.device(message.token)
        if device is None or device.uninstalled_at is not None:
            raise _refused(404, "NOT_FOUND", "Requested entity was not found.", [_fcm_error("UNREGISTERED")], "UNREGISTERED")
        if device.topic != project_id:
            raise _refused(403, "PERMISSION_DENIED", "SenderId mismatch", [_fcm_error("SENDER_ID_MISMATCH")], "SENDER_ID_MISMATCH")
        self._count(project_id, device, only_look=message.validate_only)
        message_id = f"0:{int(self.now().timestamp() * 1_000_000)}%{uuid.uuid4().hex[:16]}"
        reply = Reply(200, to_json({"name": f"projects/{project_id}/messages/{message_id}"}), accepted=True)
        if message.validate_only:
            return Verdict(Reply(200, to_json({"name": f"projects/{project_id}/messages/fake_message_id"}), accepted=True))
        headers = {"message_id": message_id, **message.headers}
        return Verdict(reply, [(device, Notification(device.token, headers, to_json(message.data), self.now() + message.ttl))])

    def _count(self, project_id: str, device: Device, *, only_look: bool) -> None:
        """Take one message from the quotas; raises Refused when one is used up."""
        now = self.now()
        project = self._project_windows.setdefault(project_id, _Window(60))
        minute, hour = self._device_windows.setdefault(device.token, (_Window(60), _Window(3600)))
        for window, count_max, subject in (
            (project, self.messages_per_minute_max, f"project:{project_id}"),
            (minute, DEVICE_MESSAGES_PER_MINUTE_MAX, "device"),
            (hour, DEVICE_MESSAGES_PER_HOUR_MAX, "device"),
        ):
            if window.is_full(now, count_max):
                what = f"Quota exceeded: {count_max} messages in {window.seconds} seconds for this {subject.partition(':')[0]}."
                failure: Mapping[str, object] = {"@type": QUOTA_FAILURE, "violations": [{"subject": subject, "description": what}]}
                details = [_fcm_error("QUOTA_EXCEEDED"), failure]
                headers = (("retry-after", str(window.left_s(now))),)
                raise _refused(429, "RESOURCE_EXHAUSTED", what, details, "QUOTA_EXCEEDED", headers)
        if not only_look:
            for window in (project, minute, hour):
                window.count += 1

    def _addressed(self, request: HttpRequest) -> Sequence[str]:
        try:
            token = parse_json(request.body)["message"]["token"]
        except (ValueError, KeyError, TypeError):
            return []
        return [token] if isinstance(token, str) else []

    # answers

    def _render(self, exchange: Exchange, answer: Answer) -> Reply:
        if answer.reason is None:
            return Reply(answer.status, to_json({}), accepted=answer.status == 200)
        if self._asks_token(exchange.request):
            return _token_error(answer.status, answer.reason, "scripted")
        status = ERROR_CODES.get(answer.reason)
        if status is None and answer.reason in _STATUSES.values():
            return _error(answer.status, answer.reason, "scripted", [], answer.reason)
        status = status or _STATUSES.get(answer.status, "UNKNOWN")
        return _error(answer.status, status, "scripted", [_fcm_error(answer.reason)], answer.reason)

    def _expire(self, exchange: Exchange) -> Reply:
        self._access_tokens.expire(bearer(exchange.request) or "", self.now())
        return _unauthenticated(_INVALID, "ACCESS_TOKEN_EXPIRED").reply

    def _headers_of_all(self, exchange: Exchange) -> list[tuple[str, str]]:
        return json_headers(self.now())

    # effects

    def _store(self, device: Device, notification: Notification) -> None:
        now = self.now()
        alive = [one for one in device.waiting if one.expires_at is None or one.expires_at > now]
        self.counters.dropped += len(device.waiting) - len(alive)
        key = notification.headers.get("collapse_key")
        if key is None:
            if sum("collapse_key" not in one.headers for one in alive) >= WAITING_MAX:
                self._deleted[device.token] = self._deleted.get(device.token, 0) + len(alive) + 1
                self.counters.dropped += len(alive) + 1
                device.waiting = []
                return
            device.waiting = [*alive, notification]
            return
        kept = [one for one in alive if one.headers.get("collapse_key") != key]
        collapsible = [one for one in kept if "collapse_key" in one.headers]
        if len(collapsible) >= COLLAPSE_KEYS_MAX:
            kept.remove(collapsible[0])
        self.counters.dropped += len(alive) - len(kept)
        device.waiting = [*kept, notification]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _signed(assertion: str, key: RSAPublicKey, options: jwt.types.Options) -> dict[str, Any] | None:
    """The claims, if this key signed them."""
    try:
        claims: dict[str, Any] = jwt.decode(assertion, key, algorithms=["RS256"], options=options)
    except jwt.PyJWTError:
        return None
    return claims


# Reading a message, as the JSON mapping of protobuf does


def _read_message(request: HttpRequest) -> _Message:
    """The message of a send; raises Refused with Google's words."""
    if request.body_bytes > len(request.body):
        raise _bad_value("", "Request payload is too large.")
    try:
        body = parse_json(request.body)
    except ValueError as e:
        raise _refused(400, "INVALID_ARGUMENT", f"Invalid JSON payload received. {e}", [_violation("", str(e))]) from e
    if not isinstance(body, dict):
        raise _bad_value("", "Invalid JSON payload received. Root element must be a message.")
    top = _fields(body, _REQUEST_FIELDS, "")
    content = _fields(top.get("message", {}), _MESSAGE_FIELDS, "message")
    android = _fields(content.get("android", {}), _ANDROID_FIELDS, "message.android")
    targets = [name for name in ("fid", "token", "topic", "condition") if name in content]
    if len(targets) > 1:
        problem = f"Invalid value at 'message' (oneof), oneof field 'target' is already set. Cannot set '{targets[1]}'"
        raise _bad_value("message", problem)
    data = _data(content.get("data", {}), "message.data")
    data = _data(android["data"], "message.android.data") if android.get("data") else data
    ttl = _ttl(android["ttl"]) if "ttl" in android else TTL_MAX
    priority = _priority(android.get("priority", "NORMAL"))
    # From here on the message can be read; what is wrong with it is FCM's to say.
    if not targets:
        raise _bad_message("message", "Recipient of the message is not set.")
    if targets != ["token"]:
        raise _bad_message(f"message.{targets[0]}", "This simulator delivers to registration tokens only.")
    if not timedelta(0) <= ttl <= TTL_MAX:
        raise _bad_message("message.android.ttl", f"Invalid ttl: it must be 0 to {int(TTL_MAX.total_seconds())} seconds.")
    _check_data(data)
    # Rounded down to the nearest second, says Firebase.
    ttl = timedelta(seconds=int(ttl.total_seconds()))
    headers = {"priority": priority, "ttl": str(int(ttl.total_seconds()))}
    if android.get("collapse_key"):
        headers["collapse_key"] = android["collapse_key"]
    shown = android.get("notification") or content.get("notification")
    if shown:
        headers["notification"] = json.dumps(shown)
    return _Message(content["token"], data, headers, ttl, bool(top.get("validate_only", False)))


def _fields(given: dict[str, Any], known: Mapping[str, type], where: str) -> dict[str, Any]:
    """The fields by their proto names, snake_case and lowerCamelCase accepted; null is absent. Raises Refused on any other."""
    names = {name: name for name in known} | {_camel(name): name for name in known}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in names:
            place = f" at '{where}'" if where else ""
            problem = f'Invalid JSON payload received. Unknown name "{name}"{place}: Cannot find field.'
            raise _bad_value(where, problem)
        proper = names[name]
        path = f"{where}.{proper}" if where else proper
        if proper in found:
            raise _bad_value(path, f"Invalid value at '{path}', field is already set.")
        if value is None:
            continue
        if not isinstance(value, known[proper]):
            raise _bad_value(path, f"Invalid value at '{path}' ({_TYPE_NAMES[known[proper]]}), {json.dumps(value)}")
        found[proper] = value
    return found


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.title, rest))


def _data(given: dict[str, Any], where: str) -> dict[str, str]:
    for number, value in enumerate(given.values()):
        if not isinstance(value, str):
            path = f"{where}[{number}].value"
            raise _bad_value(path, f"Invalid value at '{path}' (TYPE_STRING), {json.dumps(value)}")
    return given


def _ttl(text: str) -> timedelta:
    duration = _DURATION.fullmatch(text)
    if duration is None:
        where = "message.android.ttl"
        raise _bad_value(where, f"Invalid value at '{where}' (type.googleapis.com/google.protobuf.Duration), {json.dumps(text)}")
    sign = -1 if duration[1] else 1
    # A duration that datetime cannot hold is out of FCM's range too.
    seconds = min(int(duration[2]), 10 * int(TTL_MAX.total_seconds()))
    return sign * (timedelta(seconds=seconds) + timedelta(seconds=float(f"0.{duration[3] or 0}")))


def _priority(text: str) -> str:
    """NORMAL or HIGH. Lower case is taken as well: Firebase's documentation and its own server libraries write it so."""
    if text.upper() not in ("NORMAL", "HIGH"):
        where = "message.android.priority"
        problem = (
            f"Invalid value at '{where}' (type.googleapis.com/google.firebase.fcm.v1.AndroidConfig.MessagePriority), {json.dumps(text)}"
        )
        raise _bad_value(where, problem)
    return text.upper()


def _check_data(data: Mapping[str, str]) -> None:
    """Raises Refused on a reserved key and on too much data."""
    for key in data:
        if key in _RESERVED_KEYS or key.startswith(_RESERVED_PREFIXES):
            raise _bad_message("message.data", f"Invalid data payload key: {key}")
    if sum(len(key.encode()) + len(value.encode()) for key, value in data.items()) > DATA_BYTES_MAX:
        raise _bad_message("message", "Android message is too big")


# Answers


def _error(
    status: int,
    name: str,
    message: str,
    details: Sequence[Mapping[str, object]],
    reason: str,
    headers: tuple[tuple[str, str], ...] = (),
) -> Reply:
    """An error in the form of google.rpc; `reason` is for the record."""
    error: dict[str, object] = {"code": status, "message": message, "status": name}
    if details:
        error["details"] = list(details)
    return Reply(status, to_json({"error": error}), headers, reason)


def _refused(
    status: int,
    name: str,
    message: str,
    details: Sequence[Mapping[str, object]] = (),
    reason: str = "",
    headers: tuple[tuple[str, str], ...] = (),
) -> Refused:
    return Refused(_error(status, name, message, details, reason or name, headers))


def _fcm_error(code: str) -> dict[str, object]:
    return {"@type": FCM_ERROR, "errorCode": code}


def _violation(where: str, problem: str) -> dict[str, object]:
    violation = {"field": where, "description": problem} if where else {"description": problem}
    return {"@type": BAD_REQUEST, "fieldViolations": [violation]}


def _bad_value(where: str, problem: str) -> Refused:
    """The JSON is not that of a message."""
    return _refused(400, "INVALID_ARGUMENT", problem, [_violation(where, problem)])


def _bad_message(where: str, problem: str) -> Refused:
    """The message can be read, and FCM does not take it."""
    return _refused(400, "INVALID_ARGUMENT", problem, [_fcm_error("INVALID_ARGUMENT"), _violation(where, problem)])


def _unauthenticated(problem: str, reason: str) -> Refused:
    info = {
        "@type": ERROR_INFO,
        "reason": reason,
        "domain": "googleapis.com",
        "metadata": {"service": "fcm.googleapis.com", "method": "google.firebase.fcm.v1.FcmService.SendMessage"},
    }
    challenge = 'Bearer realm="https://accounts.google.com/"' + ("" if reason == "CREDENTIALS_MISSING" else ', error="invalid_token"')
    return _refused(401, "UNAUTHENTICATED", problem, [info], headers=(("www-authenticate", challenge),))


def _token_error(status: int, error: str, description: str) -> Reply:
    return Reply(status, to_json({"error": error, "error_description": description}), reason=error)


def _refused_token(error: str, description: str, *, status: int = 400) -> Refused:
    return Refused(_token_error(status, error, description))
