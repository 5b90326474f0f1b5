"""What every simulated push service has: devices and the lines of their phones, faults, a record of what came, counters.

A vendor's simulator says what a token looks like, who may ask, what is in order, and what waits for a phone that is offline.

One event loop uses a simulator; nothing is durable. Its clock gives aware datetimes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final

from sealpushd.simulators.exchange import Connection, Exchange, HttpRequest

# Clocks differ; what was issued further in the future than this is refused.
CLOCK_SKEW_MAX: Final = timedelta(minutes=5)

# Bounds of the process, so that a long run does not eat the machine.
DEVICES_MAX: Final = 1_000_000
RECEIVED_MAX: Final = 10_000
RECEIVED_BODY_BYTES_MAX: Final = 8192
FAULTS_MAX: Final = 64
NOTIFICATIONS_WAITING_MAX: Final = 100_000


# What can go wrong on purpose


class FaultScope(Enum):
    """Which requests a fault is for."""

    SENDS = "sends"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer with this and deliver nothing. `reason` is the vendor's word, rendered as the vendor does (APNs: reason, FCM:
    errorCode, HMS: code, token endpoints: error). `raw_body` stands for the rendered body when given. `timestamp`: APNs only.
    """

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
    """Send GOAWAY with this reason instead of processing the request, then close. HTTP/1.1: close."""

    reason: str


@dataclass(frozen=True, slots=True)
class DeadToken:
    """Uninstall the app as the request arrives: the device of the fault, or else all that the request addresses."""


@dataclass(frozen=True, slots=True)
class ExpiredProviderToken:
    """Refuse what the provider shows as expired; a new one is welcome at once.

    APNs: its JWT, in this request. FCM and HMS: the access token, from now on, as if its hour were over.
    """


Fault = Answer | Delay | BlackHole | LostAnswer | GoAway | DeadToken | ExpiredProviderToken


@dataclass(slots=True)
class _ScriptedFault:
    fault: Fault
    scope: FaultScope
    requests_left: int | None
    until: datetime | None
    device_token: str | None


# What is known


@dataclass(frozen=True, slots=True)
class Notification:
    """What a phone gets; the proto says what headers and payload are for each vendor.

    It never waits for a phone beyond `expires_at`, and not at all when that is not later than its arrival; None: no end.
    """

    device_token: str
    headers: dict[str, str]
    payload: bytes
    expires_at: datetime | None


@dataclass(slots=True)
class Received:
    """What a provider sent; status 0: not answered. Of what authenticates it only the SHA-256 is kept."""

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
    token_requests: int = 0
    access_tokens: int = 0
    receipts: int = 0


@dataclass(slots=True)
class Device:
    """One app on one device. `waiting` is what it gets when it comes online."""

    token: str
    topic: str
    uninstalled_at: datetime | None = None
    waiting: list[Notification] = field(default_factory=list)
    line: PhoneLine | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back. `reason` is the vendor's word in it, for the record; `accepted` whether it means success."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    accepted: bool = False
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request that is in order: what is answered, and what goes to which device."""

    reply: Reply
    deliveries: Sequence[tuple[Device, Notification]] = ()


class Refused(Exception):
    """A request that is not in order."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.reason)
        self.reply = reply


class PhoneLine:
    """The phones that one client keeps online: `online`, `offline`, then read `next_batch` until it ends."""

    def __init__(self, service: PushSimulator) -> None:
        self._service = service
        self._devices: dict[str, Device] = {}
        self._notifications: deque[Notification] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._devices)

    def online(self, device_tokens: Iterable[str]) -> list[str]:
        """Bring phones online and deliver what waited for them; gives the tokens that no app has."""
        unknown = []
        for token in device_tokens:
            device = self._service.device(token)
            if device is None or device.uninstalled_at is not None:
                unknown.append(token)
                continue
            if device.line is not None:
                device.line.offline([token])
            device.line = self
            self._devices[device.token] = device
            self._service.deliver_waiting(device)
        return unknown

    def offline(self, device_tokens: Iterable[str]) -> None:
        """Take phones offline."""
        for token in device_tokens:
            device = self._devices.pop(self._service.canonical(token), None)
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


class PushSimulator(ABC):
    """The state of one simulated push service and its answers. It is the `Peer` of its listener."""

    # A peer's: what the listener allows.
    streams_max: int
    body_bytes_max: int
    speaks_http1: bool
    # Where access tokens are asked for; empty: the vendor has none.
    token_paths: Sequence[str] = ()

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        self.now = now
        self.received: deque[Received] = deque(maxlen=RECEIVED_MAX)
        self.counters = Counters()
        self._devices: dict[str, Device] = {}
        self._faults: list[_ScriptedFault] = []
        self._received_ever = 0

    # control

    def create_device(self, topic: str) -> str:
        """A new device with this app; gives its token. Raises ValueError on a bad topic, OverflowError when full."""
        self._check_topic(topic)
        if len(self._devices) >= DEVICES_MAX:
            raise OverflowError(f"{DEVICES_MAX} devices exist, restart the simulator")
        token = self._new_device_token()
        self._devices[token] = Device(token, topic)
        return token

    def canonical(self, device_token: str) -> str:
        """The form in which a device token is known here."""
        return device_token

    def device(self, device_token: str) -> Device | None:
        """The device of this token, uninstalled ones included."""
        return self._devices.get(self.canonical(device_token))

    def uninstall(self, device_token: str) -> bool:
        """Remove the app from its device; False: no such token. Idempotent: the first time counts."""
        device = self.device(device_token)
        if device is None:
            return False
        if device.uninstalled_at is None:
            device.uninstalled_at = self.now()
            waiting, device.waiting = device.waiting, []
            if device.line is not None:
                device.line.offline([device.token])
            self._app_removed(device, waiting)
        return True

    def connect(self) -> PhoneLine:
        """A line that phones can be brought online on; close it when done."""
        return PhoneLine(self)

    def set_fault(
        self,
        fault: Fault,
        *,
        scope: FaultScope = FaultScope.SENDS,
        requests: int | None = None,
        duration: timedelta | None = None,
        device_token: str | None = None,
    ) -> None:
        """Script a fault for the next requests or for a while (exactly one of both). Raises ValueError."""
        if (requests is None) == (duration is None):
            raise ValueError("a fault lasts for a number of requests or for a duration")
        if (requests is not None and requests < 1) or (duration is not None and duration <= timedelta(0)):
            raise ValueError("a fault lasts for at least one request or for some time")
        if scope is FaultScope.TOKENS:
            if not self.token_paths:
                raise ValueError("this service has no token endpoint")
            if device_token is not None or isinstance(fault, DeadToken | ExpiredProviderToken):
                raise ValueError("the token endpoint knows no devices and no access tokens")
        if len(self._faults) >= FAULTS_MAX:
            raise ValueError(f"{FAULTS_MAX} faults are set, clear them first")
        until = None if duration is None else self.now() + duration
        self._faults.append(_ScriptedFault(fault, scope, requests, until, device_token and self.canonical(device_token)))

    def clear_faults(self) -> None:
        """Play no more faults."""
        self._faults.clear()

    @abstractmethod
    def revoke_credential(self, credential_id: str) -> bool:
        """Trust a provider's credential no more, nor what it has got; False: there is none of this id."""

    # what the listener calls

    def connection_opened(self, connection: Connection) -> None:
        """A provider connected."""
        self.counters.connections += 1

    def stream_refused(self, connection: Connection) -> None:
        """A provider opened more streams than it may, for example before it had shown who it is."""
        self.counters.early_streams += 1

    def request_received(self, exchange: Exchange) -> None:
        """Check who asks, play the fault that is due, check what is asked, answer."""
        record = self._record(exchange)
        try:
            if self._asks_token(exchange.request):
                self.counters.token_requests += 1
                scripted = self._due_fault(FaultScope.TOKENS, exchange.request)
                check: Callable[[], Verdict] = functools.partial(self._grant, exchange.request)
            else:
                self.counters.requests += 1
                check = self._admit(exchange)
                scripted = self._due_fault(FaultScope.SENDS, exchange.request)
            fault = None if scripted is None else scripted.fault
            if scripted is not None and self._is_answered_by(scripted, exchange, record):
                return
            verdict = check()
        except Refused as refused:
            self._answer(exchange, record, refused.reply)
            return
        if isinstance(fault, Delay):
            loop = asyncio.get_running_loop()
            loop.call_later(fault.by.total_seconds(), self._accept, exchange, record, verdict)
            return
        if isinstance(fault, LostAnswer):
            self._deliver(verdict)
            exchange.connection.drop()
            return
        self._accept(exchange, record, verdict)

    # the vendor's

    @abstractmethod
    def _check_topic(self, topic: str) -> None:
        """Raises ValueError when no app can have this name."""

    @abstractmethod
    def _new_device_token(self) -> str:
        """A token that nobody has."""

    @abstractmethod
    def _admit(self, exchange: Exchange) -> Callable[[], Verdict]:
        """Check who sends; gives the check of what is sent. Both raise Refused. A fault may come in between."""

    def _grant(self, request: HttpRequest) -> Verdict:
        """Check a request for an access token; raises Refused. Asked only of a vendor that has `token_paths`."""
        raise NotImplementedError

    @abstractmethod
    def _addressed(self, request: HttpRequest) -> Sequence[str]:
        """The device tokens that a send names; none when it cannot be read."""

    @abstractmethod
    def _render(self, exchange: Exchange, answer: Answer) -> Reply:
        """A scripted answer without `raw_body`, as the vendor words it. `retry_after` and `truncated` are seen to."""

    @abstractmethod
    def _expire(self, exchange: Exchange) -> Reply:
        """Let what the provider showed be expired; gives the refusal."""

    @abstractmethod
    def _headers_of_all(self, exchange: Exchange) -> list[tuple[str, str]]:
        """The headers of every answer."""

    @abstractmethod
    def _store(self, device: Device, notification: Notification) -> None:
        """Let a notification wait, in the place of others if need be; count those in `counters.dropped`."""

    def _handed_over(self, notification: Notification) -> None:
        """A phone has it."""
        self.counters.delivered += 1

    def _app_removed(self, device: Device, waiting: Sequence[Notification]) -> None:
        """The app is gone, and what waited for it with it."""
        self.counters.dropped += len(waiting)

    # effects

    def deliver_waiting(self, device: Device) -> None:
        """A device came online: it gets what waited, unless that has expired."""
        waiting, device.waiting = device.waiting, []
        for notification in waiting:
            if notification.expires_at is not None and notification.expires_at <= self.now():
                self.counters.dropped += 1
            elif device.line is not None and device.line.put(notification):
                self._handed_over(notification)

    def _asks_token(self, request: HttpRequest) -> bool:
        return request.path_only in self.token_paths

    def _due_fault(self, scope: FaultScope, request: HttpRequest) -> _ScriptedFault | None:
        if not self._faults:
            return None
        now = self.now()
        self._faults = [
            scripted for scripted in self._faults if scripted.requests_left != 0 and (scripted.until is None or now < scripted.until)
        ]
        addressed = {self.canonical(token) for token in self._addressed(request)} if scope is FaultScope.SENDS else set()
        for scripted in self._faults:
            if scripted.scope is scope and (scripted.device_token is None or scripted.device_token in addressed):
                if scripted.requests_left is not None:
                    scripted.requests_left -= 1
                return scripted
        return None

    def _is_answered_by(self, scripted: _ScriptedFault, exchange: Exchange, record: Received) -> bool:
        """Play a fault that takes the place of the check; False: go on."""
        match scripted.fault:
            case Answer() as answer:
                self._answer(exchange, record, self._scripted(exchange, answer))
            case BlackHole():
                pass
            case GoAway(reason):
                exchange.goaway(reason)
            case ExpiredProviderToken():
                raise Refused(self._expire(exchange))
            case DeadToken():
                for token in [scripted.device_token] if scripted.device_token is not None else self._addressed(exchange.request):
                    self.uninstall(token)
                return False
            case _:
                return False
        return True

    def _scripted(self, exchange: Exchange, answer: Answer) -> Reply:
        rendered = self._render(exchange, answer)
        retry_after = () if answer.retry_after is None else (("retry-after", str(int(answer.retry_after.total_seconds()))),)
        if answer.raw_body is not None:
            rendered = Reply(answer.status, answer.raw_body, reason=answer.reason or "")
        headers = (*rendered.headers, *retry_after)
        return Reply(answer.status, rendered.body, headers, rendered.reason, rendered.accepted, answer.truncated)

    def _accept(self, exchange: Exchange, record: Received, verdict: Verdict) -> None:
        self._deliver(verdict)
        self._answer(exchange, record, verdict.reply)

    def _deliver(self, verdict: Verdict) -> None:
        for device, notification in verdict.deliveries:
            if device.line is not None and device.line.put(notification):
                self._handed_over(notification)
            elif device.uninstalled_at is not None:
                self._app_removed(device, [notification])
            elif notification.expires_at is not None and notification.expires_at <= self.now():
                self.counters.dropped += 1
            else:
                self._store(device, notification)

    def _answer(self, exchange: Exchange, record: Received, reply: Reply) -> None:
        record.status, record.reason = reply.status, reply.reason
        if not self._asks_token(exchange.request):
            if reply.accepted:
                self.counters.accepted += 1
            else:
                self.counters.refused += 1
        headers = [*self._headers_of_all(exchange), *reply.headers]
        exchange.answer(reply.status, headers, reply.body, truncated=reply.truncated)

    def _record(self, exchange: Exchange) -> Received:
        request = exchange.request
        headers = tuple((name, fingerprint(value) if name == "authorization" else value) for name, value in request.headers)
        body = self._without_secrets(request) if self._asks_token(request) else request.body
        kept = HttpRequest(request.method, request.scheme, request.path, headers, body[:RECEIVED_BODY_BYTES_MAX], request.body_bytes)
        self._received_ever += 1
        record = Received(self._received_ever, self.now(), exchange.connection.number, kept)
        self.received.append(record)
        return record

    def _without_secrets(self, request: HttpRequest) -> bytes:
        """The body of a request for an access token, as it may be kept."""
        return b""


def parse_json(body: bytes) -> Any:
    """The content of a body. Raises ValueError also for what a strict reader stumbles over: a key given twice, half a character,
    endless nesting."""
    try:
        content = json.loads(body, object_pairs_hook=_object_once)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    return content


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is given twice")
    return content


def fingerprint(value: str) -> str:
    """How a secret is kept in the record: two requests can be told to show the same one."""
    return hashlib.sha256(value.encode()).hexdigest()
