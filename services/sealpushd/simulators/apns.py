"""A strict Apple Push Notification service: it refuses what Apple refuses and says why in Apple's words.

Sources: Apple, "Sending notification requests to APNs", "Establishing a token-based connection to APNs" and "Handling
notification responses from APNs". Where Apple names no reason for a malformed payload, `BadPayload` is ours.

An offline device keeps exactly one notification per app, the newest. One device token here is one app on one device.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sealpushd.simulators.http2 import Exchange, Http2Connection, HttpRequest

PAYLOAD_BYTES_MAX = 4096
COLLAPSE_ID_BYTES_MAX = 64
STREAMS_MAX = 1000
PROVIDER_TOKEN_AGE_MAX = timedelta(minutes=60)
PROVIDER_TOKEN_RENEWAL_MIN = timedelta(minutes=20)
LIFETIME_MAX = timedelta(days=30)
# Clocks differ; a provider token from further in the future than this is refused.
CLOCK_SKEW_MAX = timedelta(minutes=5)

# Bounds of the process, so that a long run does not eat the machine.
DEVICES_MAX = 1_000_000
RECEIVED_MAX = 10_000
FAULTS_MAX = 64
NOTIFICATIONS_WAITING_MAX = 100_000
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


# What can go wrong on purpose


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer with this and deliver nothing. `raw_body` stands for the JSON body when given."""

    status: int
    reason: str | None = None
    retry_after: timedelta | None = None
    raw_body: bytes | None = None
    timestamp: datetime | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Delay:
    """Do everything right, this much later."""

    by: timedelta


@dataclass(frozen=True, slots=True)
class BlackHole:
    """Never answer, deliver nothing."""


@dataclass(frozen=True, slots=True)
class LostAnswer:
    """Deliver, then drop the connection before the answer."""


@dataclass(frozen=True, slots=True)
class GoAway:
    """Send GOAWAY with this reason instead of processing the request, then close."""

    reason: str


@dataclass(frozen=True, slots=True)
class DeadToken:
    """Uninstall the app as the request arrives."""


@dataclass(frozen=True, slots=True)
class ExpiredProviderToken:
    """403 ExpiredProviderToken; a new token is welcome at once."""


Fault = Answer | Delay | BlackHole | LostAnswer | GoAway | DeadToken | ExpiredProviderToken


@dataclass(slots=True)
class _ScriptedFault:
    fault: Fault
    requests_left: int | None
    until: datetime | None
    device_token: str | None


# What is known


@dataclass(frozen=True, slots=True)
class Notification:
    """What a phone gets."""

    device_token: str
    headers: dict[str, str]
    payload: bytes
    expires_at: datetime | None


@dataclass(slots=True)
class Received:
    """What a provider sent; status 0: not answered. The bearer token itself is never kept, only its SHA-256."""

    sequence: int
    at: datetime
    connection: int
    request: HttpRequest
    status: int = 0
    reason: str = ""


@dataclass(slots=True)
class Counters:
    """How much happened since the start; the proto says what each means."""

    connections: int = 0
    requests: int = 0
    accepted: int = 0
    refused: int = 0
    delivered: int = 0
    dropped: int = 0
    early_streams: int = 0
    provider_tokens: int = 0


@dataclass(slots=True)
class _Device:
    token: str
    topic: str
    uninstalled_at: datetime | None = None
    waiting: Notification | None = None
    line: PhoneLine | None = None


@dataclass(frozen=True, slots=True)
class _ProviderKey:
    team_id: str
    public_key: EllipticCurvePublicKey
    topics: frozenset[str]


@dataclass(frozen=True, slots=True)
class _ProviderToken:
    team_id: str
    issued_at: datetime
    topics: frozenset[str]


@dataclass(slots=True)
class _ConnectionState:
    """What APNs remembers of one connection."""

    authorization: str | None = None
    since: datetime | None = None


class _Refused(Exception):
    def __init__(self, status: int, reason: str, timestamp: datetime | None = None) -> None:
        super().__init__(reason)
        self.answer = Answer(status, reason, timestamp=timestamp)


class PhoneLine:
    """The phones that one client keeps online: `online`, `offline`, then read `next_batch` until it ends."""

    def __init__(self, apns: ApnsSimulator) -> None:
        self._apns = apns
        self._devices: dict[str, _Device] = {}
        self._notifications: deque[Notification] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._devices)

    def online(self, device_tokens: Iterable[str]) -> list[str]:
        """Bring phones online and deliver what waited for them; gives the tokens that no app has."""
        unknown = []
        for token in device_tokens:
            device = self._apns.device(token)
            if device is None or device.uninstalled_at is not None:
                unknown.append(token)
                continue
            if device.line is not None:
                device.line.offline([token])
            device.line = self
            self._devices[token] = device
            self._apns.deliver_waiting(device)
        return unknown

    def offline(self, device_tokens: Iterable[str]) -> None:
        """Take phones offline."""
        for token in device_tokens:
            device = self._devices.pop(token, None)
            if device is not None:
                device.line = None

    def put(self, notification: Notification) -> bool:
        """Hand a notification over; False: the reader is too far behind."""
        if len(self._notifications) >= NOTIFICATIONS_WAITING_MAX:
            return False
        self._notifications.append(notification)
        self._changed.set()
        return True

    async def next_batch(self, size_max: int = 512) -> list[Notification]:
        """The next notifications, at least one; an empty list: the line is closed."""
        while not self._notifications and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return [self._notifications.popleft() for _ in range(min(size_max, len(self._notifications)))]

    def close(self) -> None:
        """All phones go offline. Idempotent."""
        self.offline(list(self._devices))
        self._closed = True
        self._changed.set()


class ApnsSimulator:
    """The state of the simulated service and its answers. One event loop uses it; nothing is durable.

    `now` gives aware datetimes. `limit_token_updates` refuses a second new provider token on one connection within 20
    minutes, as Apple does.
    """

    streams_max = 1

    def __init__(self, *, now: Callable[[], datetime], limit_token_updates: bool = False) -> None:
        self._now = now
        self._limit_token_updates = limit_token_updates
        self._keys: dict[str, _ProviderKey] = {}
        self._devices: dict[str, _Device] = {}
        self._connections: dict[Http2Connection, _ConnectionState] = {}
        self._verified: dict[str, _ProviderToken] = {}
        self._faults: list[_ScriptedFault] = []
        self.received: deque[Received] = deque(maxlen=RECEIVED_MAX)
        self.counters = Counters()

    # control

    def register_provider_key(self, team_id: str, key_id: str, public_key_pem: bytes, topics: Iterable[str] = ()) -> None:
        """Trust this key; no topics: any. Raises ValueError when it is not a P-256 public key."""
        public_key = load_pem_public_key(public_key_pem)
        if not isinstance(public_key, EllipticCurvePublicKey) or not isinstance(public_key.curve, SECP256R1):
            raise ValueError("a provider key must be a PEM public key on P-256")
        self._keys[key_id] = _ProviderKey(team_id, public_key, frozenset(topics))
        self._verified.clear()

    def create_device(self, topic: str) -> str:
        """A new device with this app; gives its token. Raises ValueError on a bad topic, OverflowError when full."""
        if not _TOPIC.fullmatch(topic):
            raise ValueError("a topic is a bundle id: letters, digits, dots and hyphens")
        if len(self._devices) >= DEVICES_MAX:
            raise OverflowError(f"{DEVICES_MAX} devices exist, restart the simulator")
        token = secrets.token_hex(32)
        self._devices[token] = _Device(token, topic)
        return token

    def device(self, device_token: str) -> _Device | None:
        """The device of this token, uninstalled ones included."""
        return self._devices.get(device_token.lower())

    def uninstall(self, device_token: str) -> bool:
        """Remove the app from its device; False: no such token. Idempotent: the first time counts."""
        device = self.device(device_token)
        if device is None:
            return False
        if device.uninstalled_at is None:
            device.uninstalled_at = self._now()
            device.waiting = None
            if device.line is not None:
                device.line.offline([device.token])
        return True

    def connect(self) -> PhoneLine:
        """A line that phones can be brought online on; close it when done."""
        return PhoneLine(self)

    def set_fault(
        self,
        fault: Fault,
        *,
        requests: int | None = None,
        duration: timedelta | None = None,
        device_token: str | None = None,
    ) -> None:
        """Script a fault for the next requests or for a while (exactly one of both). Raises ValueError."""
        if (requests is None) == (duration is None):
            raise ValueError("a fault lasts for a number of requests or for a duration")
        if (requests is not None and requests < 1) or (duration is not None and duration <= timedelta(0)):
            raise ValueError("a fault lasts for at least one request or for some time")
        if len(self._faults) >= FAULTS_MAX:
            raise ValueError(f"{FAULTS_MAX} faults are set, clear them first")
        until = None if duration is None else self._now() + duration
        self._faults.append(_ScriptedFault(fault, requests, until, device_token and device_token.lower()))

    def clear_faults(self) -> None:
        """Play no more faults."""
        self._faults.clear()

    # what the HTTP/2 server calls

    def connection_opened(self, connection: Http2Connection) -> None:
        """A provider connected."""
        self.counters.connections += 1
        self._connections = {known: state for known, state in self._connections.items() if known.is_open}
        self._connections[connection] = _ConnectionState()

    def stream_refused(self, connection: Http2Connection) -> None:
        """A provider opened streams before it had shown who it is."""
        self.counters.early_streams += 1

    def request_received(self, exchange: Exchange) -> None:
        """Check the request in Apple's order, play the fault that is due, answer."""
        self.counters.requests += 1
        record = self._record(exchange)
        try:
            provider = self._authenticate(exchange)
            exchange.connection.raise_streams_max(STREAMS_MAX)
            fault = self._due_fault(_path_token(exchange.request))
            if self._is_answered_by(fault, exchange, record):
                return
            device, notification = self._check(exchange.request, provider)
        except _Refused as refused:
            self._answer(exchange, record, refused.answer)
            return
        if isinstance(fault, Delay):
            loop = asyncio.get_running_loop()
            loop.call_later(fault.by.total_seconds(), self._accept, exchange, record, device, notification)
            return
        if isinstance(fault, LostAnswer):
            self._deliver(device, notification)
            exchange.connection.drop()
            return
        self._accept(exchange, record, device, notification)

    # checks

    def _authenticate(self, exchange: Exchange) -> _ProviderToken:
        authorization = exchange.request.header("authorization")
        if authorization is None:
            raise _Refused(403, "MissingProviderToken")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _Refused(403, "InvalidProviderToken")
        provider = self._verified.get(token) or self._verify(token)
        now = self._now()
        if now - provider.issued_at > PROVIDER_TOKEN_AGE_MAX:
            raise _Refused(403, "ExpiredProviderToken")
        state = self._connections[exchange.connection]
        if state.authorization != token:
            is_early = state.since is not None and now - state.since < PROVIDER_TOKEN_RENEWAL_MIN
            if self._limit_token_updates and state.authorization is not None and is_early:
                raise _Refused(429, "TooManyProviderTokenUpdates")
            state.authorization, state.since = token, now
        return provider

    def _verify(self, token: str) -> _ProviderToken:
        """Check the signature of a token not seen before; the age is checked at each use."""
        try:
            provider_key = self._keys[jwt.get_unverified_header(token)["kid"]]
            # The clock is ours, so PyJWT must not compare with the machine's.
            options: jwt.types.Options = {"verify_iat": False, "verify_exp": False, "require": ["iss", "iat"]}
            claims = jwt.decode(token, provider_key.public_key, algorithms=["ES256"], options=options)
            issued_at = datetime.fromtimestamp(claims["iat"], UTC)
        except (jwt.PyJWTError, KeyError, TypeError, ValueError, OverflowError) as e:
            raise _Refused(403, "InvalidProviderToken") from e
        if claims["iss"] != provider_key.team_id or issued_at - self._now() > CLOCK_SKEW_MAX:
            raise _Refused(403, "InvalidProviderToken")
        if len(self._verified) >= VERIFIED_TOKENS_MAX:
            self._verified.clear()
        self.counters.provider_tokens += 1
        self._verified[token] = _ProviderToken(provider_key.team_id, issued_at, provider_key.topics)
        return self._verified[token]

    def _check(self, request: HttpRequest, provider: _ProviderToken) -> tuple[_Device, Notification]:
        """The device and what to deliver; raises _Refused with Apple's reason."""
        names = [name for name, _ in request.headers if name.startswith("apns-") or name == "authorization"]
        if len(names) != len(set(names)):
            raise _Refused(400, "DuplicateHeaders")
        path = _PATH.fullmatch(request.path)
        if path is None or request.scheme != "https":
            raise _Refused(404, "BadPath")
        if request.method != "POST":
            raise _Refused(405, "MethodNotAllowed")
        if not path[1]:
            raise _Refused(400, "MissingDeviceToken")
        expires_at = _check_headers(request, self._now())
        topic = request.header("apns-topic")
        if topic is None:
            raise _Refused(400, "MissingTopic")
        if not _TOPIC.fullmatch(topic):
            raise _Refused(400, "BadTopic")
        if provider.topics and topic not in provider.topics:
            raise _Refused(400, "TopicDisallowed")
        _check_payload(request)
        device = self.device(path[1])
        if not _DEVICE_TOKEN.fullmatch(path[1]) or device is None:
            raise _Refused(400, "BadDeviceToken")
        if device.topic != topic:
            raise _Refused(400, "DeviceTokenNotForTopic")
        if device.uninstalled_at is not None:
            raise _Refused(410, "Unregistered", timestamp=device.uninstalled_at)
        headers = {name: value for name, value in request.headers if name.startswith("apns-")}
        return device, Notification(device.token, headers, request.body, expires_at)

    # effects

    def _due_fault(self, device_token: str) -> Fault | None:
        now = self._now()
        self._faults = [
            scripted for scripted in self._faults if scripted.requests_left != 0 and (scripted.until is None or now < scripted.until)
        ]
        for scripted in self._faults:
            if scripted.device_token in (None, device_token):
                if scripted.requests_left is not None:
                    scripted.requests_left -= 1
                return scripted.fault
        return None

    def _is_answered_by(self, fault: Fault | None, exchange: Exchange, record: Received) -> bool:
        """Play a fault that takes the place of the check; False: go on."""
        match fault:
            case Answer():
                if fault.reason == "ExpiredProviderToken":
                    self._connections[exchange.connection].authorization = None
                self._answer(exchange, record, fault)
            case BlackHole():
                pass
            case GoAway(reason):
                exchange.connection.goaway(reason, last_stream_id=max(exchange.stream_id - 2, 0))
            case ExpiredProviderToken():
                self._connections[exchange.connection].authorization = None
                raise _Refused(403, "ExpiredProviderToken")
            case DeadToken():
                self.uninstall(_path_token(exchange.request))
                return False
            case _:
                return False
        return True

    def _accept(self, exchange: Exchange, record: Received, device: _Device, notification: Notification) -> None:
        self._deliver(device, notification)
        self._answer(exchange, record, Answer(200))

    def _deliver(self, device: _Device, notification: Notification) -> None:
        if device.line is not None and device.line.put(notification):
            self.counters.delivered += 1
            return
        if notification.headers.get("apns-expiration") == "0":
            self.counters.dropped += 1
            return
        if device.waiting is not None:
            self.counters.dropped += 1
        device.waiting = notification

    def deliver_waiting(self, device: _Device) -> None:
        """A device came online: it gets the one notification that waited, unless that has expired."""
        waiting, device.waiting = device.waiting, None
        if waiting is None or device.line is None:
            return
        if waiting.expires_at is not None and waiting.expires_at <= self._now():
            self.counters.dropped += 1
        elif device.line.put(waiting):
            self.counters.delivered += 1

    def _answer(self, exchange: Exchange, record: Received, answer: Answer) -> None:
        record.status, record.reason = answer.status, answer.reason or ""
        if answer.status == 200:
            self.counters.accepted += 1
        else:
            self.counters.refused += 1
        message_id = exchange.request.header("apns-id") or ""
        headers = [("apns-id", message_id if _UUID.fullmatch(message_id) else str(uuid.uuid4()))]
        if answer.retry_after is not None:
            headers.append(("retry-after", str(int(answer.retry_after.total_seconds()))))
        body = b""
        if answer.raw_body is not None:
            body = answer.raw_body
        elif answer.reason is not None:
            headers.append(("content-type", "application/json"))
            content: dict[str, object] = {"reason": answer.reason}
            if answer.timestamp is not None:
                content["timestamp"] = int(answer.timestamp.timestamp() * 1000)
            body = json.dumps(content).encode()
        exchange.answer(answer.status, headers, body, truncated=answer.truncated)

    def _record(self, exchange: Exchange) -> Received:
        request = exchange.request
        headers = tuple(
            (name, hashlib.sha256(value.encode()).hexdigest() if name == "authorization" else value) for name, value in request.headers
        )
        kept = HttpRequest(request.method, request.scheme, request.path, headers, request.body, request.body_bytes)
        record = Received(self.counters.requests, self._now(), exchange.connection.number, kept)
        self.received.append(record)
        return record


def _path_token(request: HttpRequest) -> str:
    path = _PATH.fullmatch(request.path)
    return path[1].lower() if path else ""


def _check_headers(request: HttpRequest, now: datetime) -> datetime | None:
    """Check the apns-* headers but the topic; gives the end of the lifetime, None: Apple's own choice."""
    message_id = request.header("apns-id")
    if message_id is not None and not _UUID.fullmatch(message_id):
        raise _Refused(400, "BadMessageId")
    if len((request.header("apns-collapse-id") or "").encode()) > COLLAPSE_ID_BYTES_MAX:
        raise _Refused(400, "BadCollapseId")
    if (request.header("apns-priority") or "10") not in ("10", "5", "1"):
        raise _Refused(400, "BadPriority")
    if request.header("apns-push-type") not in PUSH_TYPES:
        raise _Refused(400, "InvalidPushType")
    expiration = request.header("apns-expiration")
    if expiration is None:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", expiration):
        raise _Refused(400, "BadExpirationDate")
    expires_at = datetime.fromtimestamp(int(expiration), UTC)
    if expires_at > now + LIFETIME_MAX + CLOCK_SKEW_MAX:
        raise _Refused(400, "BadExpirationDate")
    return expires_at


def _check_payload(request: HttpRequest) -> None:
    """Check size and form of the payload, and that it fits the push type."""
    if request.body_bytes == 0:
        raise _Refused(400, "PayloadEmpty")
    if request.body_bytes > PAYLOAD_BYTES_MAX:
        raise _Refused(413, "PayloadTooLarge")
    try:
        payload = json.loads(request.body)
    except ValueError as e:
        raise _Refused(400, "BadPayload") from e
    aps = payload.get("aps") if isinstance(payload, dict) else None
    if not isinstance(aps, dict):
        raise _Refused(400, "BadPayload")
    shown = aps.keys() & {"alert", "sound", "badge"}
    if request.header("apns-push-type") == "background":
        if request.header("apns-priority") != "5":
            raise _Refused(400, "BadPriority")
        if shown or aps.get("content-available") != 1:
            raise _Refused(400, "InvalidPushType")
    elif request.header("apns-push-type") == "alert" and not shown:
        raise _Refused(400, "InvalidPushType")
