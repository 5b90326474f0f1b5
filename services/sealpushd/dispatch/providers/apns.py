"""Apple Push Notification service: settings, error table, client.

Sources: Apple, "Sending notification requests to APNs", "Establishing a token-based connection to APNs", "Handling
notification responses from APNs".

Why pyreqwest (reqwest, hyper, rustls): for one POST over HTTP/2 and TLS with a private CA, 64 at once, the client's CPU
time stands in the ratio 1 (pyreqwest, streamed answers) : 2.5 (h2 on asyncio, hand-written) : 12 (httpx[http2]). It keeps
all sends of a host on one connection, offers ALPN h2 only, opens a new connection after GOAWAY and repeats by itself only
what the server certainly did not process; deadlines, proxy and redirects can be set. Its errors quote the URL, and with
it the push token: they are never logged, chained or printed here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PyreqwestError, RequestTimeoutError
from pyreqwest.proxy import ProxyBuilder
from pyreqwest.response import Response

from sealpushd.dispatch.providers.base import (
    Accepted,
    Bug,
    Clock,
    HttpAnswer,
    Misconfigured,
    Outcome,
    PushEnvironment,
    PushTarget,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
    WakeUp,
    WakeUpPriority,
    clean_reason,
    parse_retry_after,
)

# Apple answers in tens of bytes; whoever sends more is not Apple, and his answer must not eat memory.
ANSWER_BYTES_MAX = 64 * 1024
# Apple: reuse one for 20 to 60 minutes.
PROVIDER_TOKEN_LIFETIME = timedelta(minutes=45)
PROVIDER_TOKEN_RENEWAL_MIN = timedelta(minutes=20)
# Apple does not say how long it sulks after TooManyProviderTokenUpdates.
TOKEN_UPDATES_PAUSE = timedelta(minutes=5)
# Apple: at most 30 days ahead.
LIFETIME_MAX = timedelta(days=30)
# After so long without traffic the next send goes alone again: the server may have closed the connection.
IDLE_BEFORE_PROBE = timedelta(seconds=60)
# What the user sees until the app's extension has fetched the content: a key of the app's own strings.
VISIBLE_LOC_KEY = "SEALPUSH_NEW_MESSAGE"
# The payloads up to the wake-up id.
VISIBLE_HEAD = f'{{"aps":{{"alert":{{"loc-key":"{VISIBLE_LOC_KEY}"}},"mutable-content":1}},"id":"'.encode()
MUTED_HEAD = b'{"aps":{"content-available":1},"id":"'


@dataclass(frozen=True, slots=True)
class ApnsSettings:
    """Credentials and limits of one team's APNs access.

    `private_key_pem` is the .p8 file's content. `private_ca_file` is trusted beside the system's CAs. `proxy_url` is a
    CONNECT proxy (http://…); proxies of the environment are not used. `total_timeout` bounds one send with everything.
    """

    key_id: str
    team_id: str
    private_key_pem: bytes = field(repr=False)
    production_host: str = "api.push.apple.com"
    sandbox_host: str = "api.sandbox.push.apple.com"
    port: int = 443
    private_ca_file: Path | None = None
    proxy_url: str | None = field(default=None, repr=False)
    connect_timeout: timedelta = timedelta(seconds=5)
    read_timeout: timedelta = timedelta(seconds=10)
    total_timeout: timedelta = timedelta(seconds=15)
    # Apple allows 1000 streams on a connection.
    streams_max: int = 500
    # Between two pings on a quiet connection; Apple closes those that are silent for long.
    ping_interval: timedelta = timedelta(minutes=5)


# Error table


def _gone(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return TokenGone(reason, at=_timestamp(answer))


def _retry(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return RetryAt(reason, parse_retry_after(answer.headers.get("retry-after"), now))


def _pause(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return RetryAt(reason, TOKEN_UPDATES_PAUSE)


def _plain(outcome: type[TokenSuspect] | type[RefreshAuth] | type[Misconfigured] | type[Bug]) -> _Row:
    return lambda reason, answer, now: outcome(reason)


_Row = Callable[[str, HttpAnswer, datetime], Outcome]

# (status, reason) → outcome; "*" is every other reason of that status.
ERRORS: Mapping[tuple[int, str], _Row] = MappingProxyType(
    {
        (400, "BadDeviceToken"): _plain(TokenSuspect),
        (400, "DeviceTokenNotForTopic"): _plain(TokenSuspect),
        (400, "BadTopic"): _plain(Misconfigured),
        (400, "MissingTopic"): _plain(Misconfigured),
        (400, "TopicDisallowed"): _plain(Misconfigured),
        (400, "IdleTimeout"): _retry,
        (400, "*"): _plain(Bug),
        (403, "ExpiredProviderToken"): _plain(RefreshAuth),
        (403, "*"): _plain(Misconfigured),
        (404, "*"): _plain(Bug),
        (405, "*"): _plain(Bug),
        (410, "Unregistered"): _gone,
        (410, "ExpiredToken"): _gone,
        # A way of being gone that we do not know: believe it, but not so far as to forget the token.
        (410, "*"): _plain(TokenSuspect),
        (413, "*"): _plain(Bug),
        (429, "TooManyProviderTokenUpdates"): _pause,
        (429, "*"): _retry,
        (500, "*"): _retry,
        (503, "*"): _retry,
    }
)


def classify(answer: HttpAnswer, request_id: str, now: datetime) -> Outcome:
    """The outcome that one answer means.

    Only an answer in APNs's own form may do harm (end a leg, stop a lane, quarantine): a success echoes our apns-id, an
    error is a JSON object with a reason. Anything else comes from something in between and is tried again, as is a
    status or a reason that Apple adds one day in the 5xx.
    """
    if answer.status == 200:
        echoed = answer.headers.get("apns-id", "").lower() == request_id
        return Accepted() if echoed else RetryAt("accepted-without-echo")
    reason = _reason(answer)
    if reason is None:
        return _retry(f"status-{answer.status}", answer, now)
    row = ERRORS.get((answer.status, reason)) or ERRORS.get((answer.status, "*"), _retry)
    return row(reason, answer, now)


def _content(answer: HttpAnswer) -> dict[str, object]:
    try:
        content = json.loads(answer.body or b"")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(answer: HttpAnswer) -> str | None:
    reason = _content(answer).get("reason")
    return clean_reason(reason) if isinstance(reason, str) and reason else None


def _timestamp(answer: HttpAnswer) -> datetime | None:
    """Since when the token is gone; milliseconds since 1970."""
    timestamp = _content(answer).get("timestamp")
    if not isinstance(timestamp, int) or isinstance(timestamp, bool):
        return None
    try:
        return datetime.fromtimestamp(timestamp / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


# Request


def build_payload(wake_up: WakeUp) -> bytes:
    """The body: `aps` as the push type asks, and the wake-up id; nothing else may ever stand here."""
    # base64url needs no escaping.
    return (MUTED_HEAD if wake_up.muted else VISIBLE_HEAD) + wake_up.wire_id.encode() + b'"}'


def build_headers(target: PushTarget, wake_up: WakeUp, now: datetime) -> dict[str, str]:
    """The apns-* headers. Repeats of a wake-up have the same apns-id, and the same collapse id when visible.

    The collapse id makes a repeat replace the banner instead of adding one. It is the wake-up id: it says nothing new.
    """
    expires_at = min(wake_up.expires_at, now + LIFETIME_MAX)
    headers = {
        "apns-id": str(wake_up.request_uuid),
        "apns-expiration": str(max(int(expires_at.timestamp()), 0)),
        "apns-topic": target.topic,
        "content-type": "application/json",
    }
    if wake_up.muted:
        # Apple refuses or drops background pushes of a higher priority.
        return headers | {"apns-push-type": "background", "apns-priority": "5"}
    priority = "10" if wake_up.priority is WakeUpPriority.HIGH else "5"
    return headers | {"apns-push-type": "alert", "apns-priority": priority, "apns-collapse-id": wake_up.wire_id}


class ProviderTokens:
    """The ES256 JWT that all sends share: renewed after 45 minutes, and out of turn at most once in 20 minutes."""

    def __init__(self, settings: ApnsSettings, clock: Clock) -> None:
        """Raises ValueError when the key is not a PEM private key on P-256."""
        private_key = load_pem_private_key(settings.private_key_pem, password=None)
        if not isinstance(private_key, EllipticCurvePrivateKey) or not isinstance(private_key.curve, SECP256R1):
            raise ValueError("the APNs key must be the .p8 file's PEM: a private key on P-256")
        self._private_key = private_key
        self._settings = settings
        self._clock = clock
        self._token = ""
        self._issued_at = datetime.min.replace(tzinfo=UTC)
        self._renewed_out_of_turn_at = datetime.min.replace(tzinfo=UTC)

    def current(self) -> str:
        """The token to use now."""
        if self._clock.now() - self._issued_at >= PROVIDER_TOKEN_LIFETIME:
            self._issue()
        return self._token

    def replace_expired(self, refused: str) -> str | None:
        """The token to use instead of one that APNs called expired; None: no renewal is due, try later.

        Many sends learn of it at once: the first renews, the others find the new one.
        """
        if refused != self._token:
            return self._token
        if self._clock.now() - self._renewed_out_of_turn_at < PROVIDER_TOKEN_RENEWAL_MIN:
            return None
        self._renewed_out_of_turn_at = self._clock.now()
        self._issue()
        return self._token

    def _issue(self) -> None:
        self._issued_at = self._clock.now()
        claims = {"iss": self._settings.team_id, "iat": int(self._issued_at.timestamp())}
        headers = {"kid": self._settings.key_id}
        self._token = jwt.encode(claims, self._private_key, algorithm="ES256", headers=headers)


class _Lane:
    """One APNs host: its connection, its streams, and whether the connection has proved itself.

    With token authentication APNs allows one stream until it has seen a valid token. So the first send on a connection
    goes alone; the others wait for its answer. Which connection the HTTP client uses cannot be seen from here, hence:
    after any failure, and after a silence, the next send goes alone again. Sends that the client itself moves to a new
    connection after GOAWAY are not held back; APNs refuses their early streams and the client repeats them.
    """

    def __init__(self, base_url: str, streams_max: int, clock: Clock) -> None:
        self.base_url = base_url
        self.streams = asyncio.Semaphore(streams_max)
        self._clock = clock
        self._proved_at: datetime | None = None
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
        return self._proved_at is not None and self._clock.now() - self._proved_at < IDLE_BEFORE_PROBE

    async def _observe(self, exchange: Callable[[], Awaitable[HttpAnswer]]) -> HttpAnswer:
        try:
            answer = await exchange()
        except BaseException:
            self._proved_at = None
            raise
        # Any answer but 403 means that the token was valid.
        self._proved_at = None if answer.status == 403 else self._clock.now()
        return answer


class ApnsProvider:
    """Sends wake-ups to APNs; see `Provider`. One connection per environment, made when first needed."""

    name = "apns"

    def __init__(self, settings: ApnsSettings, clock: Clock) -> None:
        """Raises ValueError or OSError when key, CA file or proxy are unusable."""
        self._settings = settings
        self._clock = clock
        self._tokens = ProviderTokens(settings, clock)
        self._client = _build_client(settings)
        self._lanes = {
            PushEnvironment.PRODUCTION: self._lane(settings.production_host),
            PushEnvironment.SANDBOX: self._lane(settings.sandbox_host),
        }

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        """See `Provider.send`. An expired provider token is renewed and the send repeated once."""
        device_token = target.token.reveal()
        if not device_token.isalnum():
            # APNs tokens are hexadecimal; anything else would change the path. Not ours to ask about.
            return TokenSuspect("malformed-token")
        try:
            async with asyncio.timeout(self._settings.total_timeout.total_seconds()):
                return await self._send(target, wake_up)
        except TimeoutError:
            return RetryAt("timeout")
        except PyreqwestError as e:
            return RetryAt(_network_reason(e))

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._client.close()

    async def _send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        bearer = self._tokens.current()
        outcome = await self._exchange(target, wake_up, bearer)
        if isinstance(outcome, RefreshAuth):
            renewed = self._tokens.replace_expired(bearer)
            if renewed is not None:
                outcome = await self._exchange(target, wake_up, renewed)
        if isinstance(outcome, TokenGone) and outcome.at is not None and outcome.at <= target.registered_at:
            # The device registered again after APNs saw it gone: the newer word counts.
            return RetryAt("gone-before-registration")
        return outcome

    async def _exchange(self, target: PushTarget, wake_up: WakeUp, bearer: str) -> Outcome:
        lane = self._lanes[target.environment]
        headers = build_headers(target, wake_up, self._clock.now())
        try:
            request = (
                self._client.post(f"{lane.base_url}/3/device/{target.token.reveal()}")
                .headers(headers)
                .bearer_auth(bearer)
                .body_bytes(build_payload(wake_up))
            )
        except ValueError:
            # A topic that cannot stand in a header.
            return Bug("malformed-request")

        async def exchange() -> HttpAnswer:
            async with request.build_streamed() as response:
                return await _read(response)

        answer = await lane.run(exchange)
        return classify(answer, headers["apns-id"], self._clock.now())

    def _lane(self, host: str) -> _Lane:
        return _Lane(f"https://{host}:{self._settings.port}", self._settings.streams_max, self._clock)


async def _read(response: Response) -> HttpAnswer:
    """The answer with its body, at most 64 KiB; a longer one is cut off and None."""
    headers = {str(name).lower(): str(value) for name, value in response.headers.items()}
    body = bytearray()
    while True:
        chunk = await response.body_reader.read_chunk()
        if chunk is None:
            return HttpAnswer(response.status, headers, bytes(body))
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            return HttpAnswer(response.status, headers, None)


def _network_reason(error: PyreqwestError) -> str:
    """A word for logs; the error's own text quotes the push token."""
    return "timeout" if isinstance(error, RequestTimeoutError) else f"network-{type(error).__name__}"


def _build_client(settings: ApnsSettings) -> Client:
    builder = (
        ClientBuilder()
        .user_agent("sealpush")
        .http2_prior_knowledge()
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
    if settings.private_ca_file is not None:
        builder = builder.add_root_certificate_pem(settings.private_ca_file.read_bytes())
    if settings.proxy_url is not None:
        builder = builder.proxy(ProxyBuilder.https(settings.proxy_url))
    return builder.build()
