"""A strict Apple Push Notification service: it refuses what Apple refuses and says why in Apple's words.

Sources: Apple, "Sending notification requests to APNs", "Establishing a token-based connection to APNs" and "Handling
notification responses from APNs". Where Apple names no reason for a malformed payload, `BadPayload` is ours.

An offline device keeps exactly one notification per app, the newest. One device token here is one app on one device.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sealpushd.simulators.core import CLOCK_SKEW_MAX, Answer, Device, Notification, PushSimulator, Refused, Reply, Verdict, parse_json
from sealpushd.simulators.exchange import Connection, Exchange, HttpRequest

PAYLOAD_BYTES_MAX = 4096
VOIP_PAYLOAD_BYTES_MAX = 5120
COLLAPSE_ID_BYTES_MAX = 64
STREAMS_MAX = 1000
PROVIDER_TOKEN_AGE_MAX = timedelta(minutes=60)
PROVIDER_TOKEN_RENEWAL_MIN = timedelta(minutes=20)
LIFETIME_MAX = timedelta(days=30)
# A bound of the process.
VERIFIED_TOKENS_MAX = 1_000

PUSH_TYPES = frozenset(
    {
        "alert",
        "background",
        "complication",
        "controls",
        "fileprovider",
        "liveactivity",
        "location",
        "mdm",
        "pushtotalk",
        "voip",
        "widgets",
    }
)
_PATH = re.compile(r"/3/device/([^/?]*)")
_DEVICE_TOKEN = re.compile(r"(?:[0-9a-fA-F]{2}){32,100}")
_TOPIC = re.compile(r"[A-Za-z0-9.\-]{1,255}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class _ProviderKey:
    team_id: str
    public_key: EllipticCurvePublicKey
    topics: frozenset[str]


@dataclass(frozen=True, slots=True)
class _ProviderToken:
    team_id: str
    key_id: str
    issued_at: datetime
    topics: frozenset[str]


@dataclass(slots=True)
class _ConnectionState:
    """What APNs remembers of one connection."""

    authorization: str | None = None
    since: datetime | None = None
    # Of the first push: a connection is one key's.
    key_id: str | None = None


class ApnsSimulator(PushSimulator):
    """The state of the simulated service and its answers.

    `limit_token_updates` refuses a second new provider token on one connection within 20 minutes, as Apple does.
    """

    # Until the first valid provider token.
    streams_max = 1
    # Twice what a payload may have, to show what came.
    body_bytes_max = 2 * VOIP_PAYLOAD_BYTES_MAX
    speaks_http1 = False

    def __init__(self, *, now: Callable[[], datetime], limit_token_updates: bool = False) -> None:
        super().__init__(now=now)
        self._limit_token_updates = limit_token_updates
        self._keys: dict[str, _ProviderKey] = {}
        self._connections: dict[Connection, _ConnectionState] = {}
        self._verified: dict[str, _ProviderToken] = {}

    # control

    def register_provider_key(self, team_id: str, key_id: str, public_key_pem: bytes, topics: Iterable[str] = ()) -> None:
        """Trust this key; no topics: any. Raises ValueError when it is not a P-256 public key."""
        public_key = load_pem_public_key(public_key_pem)
        if not isinstance(public_key, EllipticCurvePublicKey) or not isinstance(public_key.curve, SECP256R1):
            raise ValueError("a provider key must be a PEM public key on P-256")
        self._keys[key_id] = _ProviderKey(team_id, public_key, frozenset(topics))
        self._verified.clear()

    def revoke_credential(self, credential_id: str) -> bool:
        self._verified.clear()
        return self._keys.pop(credential_id, None) is not None

    def canonical(self, device_token: str) -> str:
        return device_token.lower()

    # what the listener calls

    def connection_opened(self, connection: Connection) -> None:
        super().connection_opened(connection)
        self._connections = {known: state for known, state in self._connections.items() if known.is_open}
        self._connections[connection] = _ConnectionState()

    # checks

    def _check_topic(self, topic: str) -> None:
        if not _TOPIC.fullmatch(topic):
            raise ValueError("a topic is a bundle id: letters, digits, dots and hyphens")

    def _new_device_token(self) -> str:
        return secrets.token_hex(32)

    def _admit(self, exchange: Exchange) -> Callable[[], Verdict]:
        provider = self._authenticate(exchange)
        exchange.connection.raise_streams_max(STREAMS_MAX)
        return lambda: self._check(exchange.request, provider)

    def _authenticate(self, exchange: Exchange) -> _ProviderToken:
        authorization = exchange.request.header("authorization")
        if authorization is None:
            raise _refused(403, "MissingProviderToken")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _refused(403, "InvalidProviderToken")
        provider = self._verified.get(token) or self._verify(token)
        now = self.now()
        if now - provider.issued_at > PROVIDER_TOKEN_AGE_MAX:
            raise _refused(403, "ExpiredProviderToken")
        state = self._connections[exchange.connection]
        if state.key_id not in (None, provider.key_id):
            raise _refused(403, "UnrelatedKeyIdInToken")
        if state.authorization != token:
            is_early = state.since is not None and now - state.since < PROVIDER_TOKEN_RENEWAL_MIN
            if self._limit_token_updates and state.authorization is not None and is_early:
                raise _refused(429, "TooManyProviderTokenUpdates")
            state.authorization, state.since = token, now
        state.key_id = provider.key_id
        return provider

    def _verify(self, token: str) -> _ProviderToken:
        """Check the signature of a token not seen before; the age is checked at each use."""
        try:
            key_id = jwt.get_unverified_header(token)["kid"]
            provider_key = self._keys[key_id]
            # The clock is ours, so PyJWT must not compare with the machine's.
            options: jwt.types.Options = {"verify_iat": False, "verify_exp": False, "require": ["iss", "iat"]}
            claims = jwt.decode(token, provider_key.public_key, algorithms=["ES256"], options=options)
            issued_at = datetime.fromtimestamp(claims["iat"], UTC)
        except (jwt.PyJWTError, KeyError, TypeError, ValueError, OverflowError) as e:
            raise _refused(403, "InvalidProviderToken") from e
        if claims["iss"] != provider_key.team_id or issued_at - self.now() > CLOCK_SKEW_MAX:
            raise _refused(403, "InvalidProviderToken")
        if len(self._verified) >= VERIFIED_TOKENS_MAX:
            self._verified.clear()
        self.counters.provider_tokens += 1
        self._verified[token] = _ProviderToken(provider_key.team_id, key_id, issued_at, provider_key.topics)
        return self._verified[token]

    def _check(self, request: HttpRequest, provider: _ProviderToken) -> Verdict:
        """What to deliver; raises Refused with Apple's reason."""
        names = [name for name, _ in request.headers if name.startswith("apns-") or name == "authorization"]
        if len(names) != len(set(names)):
            raise _refused(400, "DuplicateHeaders")
        path = _PATH.fullmatch(request.path)
        if path is None or request.scheme != "https":
            raise _refused(404, "BadPath")
        if request.method != "POST":
            raise _refused(405, "MethodNotAllowed")
        if not path[1]:
            raise _refused(400, "MissingDeviceToken")
        expires_at = _check_headers(request, self.now())
        topic = request.header("apns-topic")
        if topic is None:
            raise _refused(400, "MissingTopic")
        if not _TOPIC.fullmatch(topic):
            raise _refused(400, "BadTopic")
        if provider.topics and topic not in provider.topics:
            raise _refused(400, "TopicDisallowed")
        _check_payload(request)
        device = self.device(path[1])
        if not _DEVICE_TOKEN.fullmatch(path[1]) or device is None:
            raise _refused(400, "BadDeviceToken")
        if device.topic != topic:
            raise _refused(400, "DeviceTokenNotForTopic")
        if device.uninstalled_at is not None:
            raise _refused(410, "Unregistered", timestamp=device.uninstalled_at)
        headers = {name: value for name, value in request.headers if name.startswith("apns-")}
        return Verdict(Reply(200, accepted=True), [(device, Notification(device.token, headers, request.body, expires_at))])

    def _addressed(self, request: HttpRequest) -> Sequence[str]:
        path = _PATH.fullmatch(request.path)
        return [path[1]] if path else []

    # answers

    def _render(self, exchange: Exchange, answer: Answer) -> Reply:
        if answer.reason == "ExpiredProviderToken":
            self._connections[exchange.connection].authorization = None
        return _rendered(answer.status, answer.reason, answer.timestamp)

    def _expire(self, exchange: Exchange) -> Reply:
        self._connections[exchange.connection].authorization = None
        return _rendered(403, "ExpiredProviderToken")

    def _headers_of_all(self, exchange: Exchange) -> list[tuple[str, str]]:
        message_id = exchange.request.header("apns-id") or ""
        return [("apns-id", message_id if _UUID.fullmatch(message_id) else str(uuid.uuid4()))]

    # effects

    def _store(self, device: Device, notification: Notification) -> None:
        self.counters.dropped += len(device.waiting)
        device.waiting = [notification]


def _rendered(status: int, reason: str | None, timestamp: datetime | None = None) -> Reply:
    """An answer in Apple's form; without a reason it has no body."""
    if reason is None:
        return Reply(status, accepted=status == 200)
    content: dict[str, object] = {"reason": reason}
    if timestamp is not None:
        content["timestamp"] = int(timestamp.timestamp() * 1000)
    return Reply(status, json.dumps(content).encode(), (("content-type", "application/json"),), reason)


def _refused(status: int, reason: str, timestamp: datetime | None = None) -> Refused:
    return Refused(_rendered(status, reason, timestamp))


def _check_headers(request: HttpRequest, now: datetime) -> datetime | None:
    """Check the apns-* headers but the topic; gives the end of the lifetime, None: Apple's own choice."""
    message_id = request.header("apns-id")
    if message_id is not None and not _UUID.fullmatch(message_id):
        raise _refused(400, "BadMessageId")
    if len((request.header("apns-collapse-id") or "").encode()) > COLLAPSE_ID_BYTES_MAX:
        raise _refused(400, "BadCollapseId")
    if (request.header("apns-priority") or "10") not in ("10", "5", "1"):
        raise _refused(400, "BadPriority")
    if request.header("apns-push-type") not in PUSH_TYPES:
        raise _refused(400, "InvalidPushType")
    expiration = request.header("apns-expiration")
    if expiration is None:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", expiration):
        raise _refused(400, "BadExpirationDate")
    expires_at = datetime.fromtimestamp(int(expiration), UTC)
    if expires_at > now + LIFETIME_MAX + CLOCK_SKEW_MAX:
        raise _refused(400, "BadExpirationDate")
    return expires_at


def _check_payload(request: HttpRequest) -> None:
    """Check size and form of the payload, and that it fits the push type."""
    if request.body_bytes == 0:
        raise _refused(400, "PayloadEmpty")
    if request.body_bytes > (VOIP_PAYLOAD_BYTES_MAX if request.header("apns-push-type") == "voip" else PAYLOAD_BYTES_MAX):
        raise _refused(413, "PayloadTooLarge")
    try:
        payload = parse_json(request.body)
    except ValueError as e:
        raise _refused(400, "BadPayload") from e
    aps = payload.get("aps") if isinstance(payload, dict) else None
    if not isinstance(aps, dict):
        raise _refused(400, "BadPayload")
    shown = aps.keys() & {"alert", "sound", "badge"}
    if request.header("apns-push-type") == "background":
        if request.header("apns-priority") != "5":
            raise _refused(400, "BadPriority")
        if shown or aps.get("content-available") != 1:
            raise _refused(400, "InvalidPushType")
    elif request.header("apns-push-type") == "alert" and not shown:
        raise _refused(400, "InvalidPushType")
