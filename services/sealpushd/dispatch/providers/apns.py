"""Apple Push Notification service: settings, error table, client.

Sources: Apple, "Sending notification requests to APNs", "Establishing a token-based connection to APNs", "Handling
notification responses from APNs".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sealpushd.dispatch.providers.base import (
    Accepted,
    Bug,
    HttpAnswer,
    Misconfigured,
    Outcome,
    Probed,
    PushEnvironment,
    PushTarget,
    PushToken,
    RefreshAuth,
    RetryAt,
    Row,
    TokenGone,
    TokenSuspect,
    WakeUp,
    WakeUpPriority,
    advise_common,
    clean_reason,
    parse_retry_after,
    plain,
    retry,
)
from sealpushd.dispatch.providers.http import Connection, HttpClient, HttpSettings, clock_is_wrong
from sealpushd.platform.clock import MOMENT_AHEAD_MAX, Clock, Reading

# Apple: reuse one for 20 to 60 minutes.
PROVIDER_TOKEN_LIFETIME = timedelta(minutes=45)
PROVIDER_TOKEN_RENEWAL_MIN = timedelta(minutes=20)
# Apple does not say how long it sulks after TooManyProviderTokenUpdates.
TOKEN_UPDATES_PAUSE = timedelta(minutes=5)
# Apple: at most 30 days ahead.
LIFETIME_MAX = timedelta(days=30)
# What the user sees until the app's extension has fetched the content: a key of the app's own strings.
VISIBLE_LOC_KEY = "SEALPUSH_NEW_MESSAGE"
# The payloads up to the wake-up id.
VISIBLE_HEAD = f'{{"aps":{{"alert":{{"loc-key":"{VISIBLE_LOC_KEY}"}},"mutable-content":1}},"id":"'.encode()
MUTED_HEAD = b'{"aps":{"content-available":1},"id":"'
# A token of nobody: of the right form, so that everything else about a request is looked at.
NOBODYS_TOKEN = PushToken("0" * 64)


@dataclass(frozen=True, slots=True)
class ApnsSettings:
    """Credentials of one team's APNs access. `private_key_pem` is the .p8 file's content, `topic` the app's bundle id."""

    key_id: str
    team_id: str
    private_key_pem: bytes = field(repr=False)
    topic: str = ""
    production_url: str = "https://api.push.apple.com"
    sandbox_url: str = "https://api.sandbox.push.apple.com"
    http: HttpSettings = field(default_factory=HttpSettings)


# Error table


def _gone(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return TokenGone(reason, at=_timestamp(answer))


def _patience(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return RetryAt(reason, parse_retry_after(answer, now), of_device=True)


def _pause(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return RetryAt(reason, TOKEN_UPDATES_PAUSE)


# (status, reason) → outcome; "*" is every other reason of that status.
ERRORS: Mapping[tuple[int, str], Row] = MappingProxyType(
    {
        (400, "BadDeviceToken"): plain(TokenSuspect),
        (400, "DeviceTokenNotForTopic"): plain(TokenSuspect),
        (400, "BadTopic"): plain(Misconfigured),
        (400, "MissingTopic"): plain(Misconfigured),
        (400, "TopicDisallowed"): plain(Misconfigured),
        (400, "IdleTimeout"): retry,
        (400, "*"): plain(Bug),
        (403, "ExpiredProviderToken"): plain(RefreshAuth),
        (403, "*"): plain(Misconfigured),
        (404, "*"): plain(Bug),
        (405, "*"): plain(Bug),
        (410, "Unregistered"): _gone,
        (410, "ExpiredToken"): _gone,
        # A way of being gone that we do not know: believe it, but not so far as to forget the token.
        (410, "*"): plain(TokenSuspect),
        (413, "*"): plain(Bug),
        (429, "TooManyProviderTokenUpdates"): _pause,
        (429, "TooManyRequests"): _patience,
        (429, "*"): retry,
        (500, "*"): retry,
        (503, "*"): retry,
    }
)


ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "BadDeviceToken": (
            "the device token is of the other environment (sandbox or production) or wrong: does the app register the environment it was "
            "built for? The token is kept and pushed to again once the device has registered again"
        ),
        "DeviceTokenNotForTopic": "the device token belongs to another app: does the topic (bundle id) of the credential fit the app?",
        "BadTopic": "the topic is no bundle id: correct it with `sealpush providers rotate --topic`",
        "MissingTopic": "neither the installation nor the credential names a topic: give it with `sealpush providers rotate --topic`",
        "TopicDisallowed": "the key's team may not push to this topic: check topic, team id and the key's restrictions in Apple's portal",
        "ExpiredProviderToken": (
            "a provider token that was signed just now counts as expired: this machine's clock is wrong, set it by NTP"
        ),
        "InvalidProviderToken": (
            "the key, key id or team id is wrong, or the key was revoked in Apple's portal: make a new key there and put it with "
            "`sealpush providers rotate`. Or this machine's clock is ahead: set it by NTP"
        ),
        "MissingProviderToken": "the request reached Apple without its token: does a proxy take headers away?",
        "BadEnvironmentKeyIdInToken": "the key is limited to the other environment: make one in Apple's portal that serves both",
        "UnrelatedKeyIdInToken": (
            "another key was used on this connection before: each credential has connections of its own, so something between here and "
            "Apple joins them. Does a proxy do that?"
        ),
        "BadCertificateEnvironment": "the key is limited to the other environment: make one in Apple's portal that serves both",
        "BadEnvironmentKeyInToken": "the key is limited to the other environment: make one in Apple's portal that serves both",
        "Forbidden": "Apple forbids this: is the developer account in good standing, and are its agreements accepted?",
        "Unregistered": "the app was removed from the device: the token is forgotten",
        "ExpiredToken": "the device token has expired: the token is forgotten",
        "TooManyRequests": "too many pushes to one device: only this device waits",
        "TooManyProviderTokenUpdates": "provider tokens are renewed too often: do several installations share the key? Waits 5 minutes",
        "InternalServerError": "Apple has a fault: look at Apple's system status page",
        "ServiceUnavailable": "Apple is overloaded: look at Apple's system status page",
        "Shutdown": "Apple closes the connection for maintenance: another one is opened",
        "IdleTimeout": "the connection was silent for too long: another one is opened",
        "PayloadTooLarge": "a wake-up is larger than Apple takes: this is a fault of Sealpush, report it",
        "accepted-without-echo": "something between answers in Apple's place: look at SEALPUSH_PROXY",
        "gone-before-registration": "the device has registered again since Apple saw it gone: it is tried again",
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
        # Not Apple's, so neither is what it asks for.
        return RetryAt(f"status-{answer.status}")
    if answer.status == 403 and clock_is_wrong(answer, now):
        return Misconfigured("clock-wrong")
    row = ERRORS.get((answer.status, reason)) or ERRORS.get((answer.status, "*"), retry)
    return row(reason, answer, now)


def _reason(answer: HttpAnswer) -> str | None:
    reason = answer.json().get("reason")
    return clean_reason(reason) if isinstance(reason, str) and reason else None


def _timestamp(answer: HttpAnswer) -> datetime | None:
    """Since when the token is gone; milliseconds since 1970."""
    timestamp = answer.json().get("timestamp")
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
    """The ES256 JWT that all sends share: renewed after 45 minutes, and out of turn at most once in 20 minutes.

    It carries the time of its making, so one that was made before the clock was set is made anew: Apple refuses a token of the future.
    """

    def __init__(self, settings: ApnsSettings, clock: Clock) -> None:
        """Raises ValueError when the key is not a PEM private key on P-256."""
        try:
            private_key = load_pem_private_key(settings.private_key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private_key = None
        if not isinstance(private_key, EllipticCurvePrivateKey) or not isinstance(private_key.curve, SECP256R1):
            raise ValueError("the APNs key must be the .p8 file's PEM: a private key on P-256")
        self._private_key = private_key
        self._settings = settings
        self._clock = clock
        self._token = ""
        self._issued: Reading | None = None
        # Of the steady clock; None: not yet.
        self._renewed_out_of_turn_at: float | None = None

    def current(self) -> str:
        """The token to use now."""
        issued = self._issued
        if (
            issued is None
            or issued.was_set(self._clock)
            or self._clock.monotonic() - issued.steady >= PROVIDER_TOKEN_LIFETIME.total_seconds()
        ):
            self._issue()
        return self._token

    def replace_expired(self, refused: str) -> str | None:
        """The token to use instead of one that APNs called expired; None: no renewal is due, try later.

        Many sends learn of it at once: the first renews, the others find the new one.
        """
        if refused != self._token:
            return self._token
        now = self._clock.monotonic()
        if self._renewed_out_of_turn_at is not None and now - self._renewed_out_of_turn_at < PROVIDER_TOKEN_RENEWAL_MIN.total_seconds():
            return None
        self._renewed_out_of_turn_at = now
        self._issue()
        return self._token

    def forget_failures(self) -> None:
        """The next refusal renews, also within the 20 minutes."""
        self._renewed_out_of_turn_at = None

    def _issue(self) -> None:
        self._issued = Reading.of(self._clock)
        claims = {"iss": self._settings.team_id, "iat": int(self._issued.wall.timestamp())}
        headers = {"kid": self._settings.key_id}
        self._token = jwt.encode(claims, self._private_key, algorithm="ES256", headers=headers)


class ApnsProvider:
    """Sends wake-ups to APNs; see `Provider`. One connection per environment, made when first needed."""

    name = "apns"

    def __init__(self, settings: ApnsSettings, clock: Clock) -> None:
        """Raises ValueError or OSError when key, CA file or proxy are unusable."""
        self.topic = settings.topic
        self._clock = clock
        self._tokens = ProviderTokens(settings, clock)
        self._client = HttpClient(settings.http, http2_only=True)
        self._connections = {
            environment: Connection(url, settings.http.streams_max, clock, _token_was_valid)
            for environment, url in (
                (PushEnvironment.PRODUCTION, settings.production_url),
                (PushEnvironment.SANDBOX, settings.sandbox_url),
            )
        }

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        """See `Provider.send`. An expired provider token is renewed and the send repeated once."""
        if not target.token.reveal().isalnum():
            # APNs tokens are hexadecimal; anything else would change the path. Not ours to ask about.
            return TokenSuspect("malformed-token", asked=False)
        return await self._client.guard(self._send(target, wake_up))

    async def probe(self) -> Sequence[Probed]:
        """See `Provider.probe`. APNs has no dry run: a muted wake-up that has expired already goes to nobody's token."""
        now = self._clock.now()
        wake_up = WakeUp(bytes(16), muted=True, priority=WakeUpPriority.NORMAL, expires_at=now)
        targets = [PushTarget(NOBODYS_TOKEN, environment, self.topic, now) for environment in self._connections]
        outcomes = await asyncio.gather(*(self.send(target, wake_up) for target in targets))
        return [Probed(target.environment.value, outcome) for target, outcome in zip(targets, outcomes, strict=True)]

    def advise(self, reason: str) -> str:
        """See `Provider.advise`."""
        return ADVICE.get(reason) or advise_common(reason)

    def forget_failures(self) -> None:
        """See `Provider.forget_failures`."""
        self._tokens.forget_failures()

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._client.aclose()

    async def _send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        bearer = self._tokens.current()
        outcome = await self._exchange(target, wake_up, bearer)
        if isinstance(outcome, RefreshAuth):
            renewed = self._tokens.replace_expired(bearer)
            if renewed is not None:
                outcome = await self._exchange(target, wake_up, renewed)
        if (
            isinstance(outcome, TokenGone)
            and outcome.at is not None
            and outcome.at <= target.registered_at <= self._clock.now() + MOMENT_AHEAD_MAX
        ):
            # The device registered again after APNs saw it gone: the newer word counts. A registration of the future is no word at all.
            return RetryAt("gone-before-registration", of_device=True)
        return outcome

    async def _exchange(self, target: PushTarget, wake_up: WakeUp, bearer: str) -> Outcome:
        connection = self._connections[target.environment]
        headers = build_headers(target, wake_up, self._clock.now()) | {"authorization": f"bearer {bearer}"}
        url = f"{connection.base_url}/3/device/{target.token.reveal()}"
        try:
            answer = await connection.run(lambda: self._client.post(url, headers, build_payload(wake_up)))
        except ValueError:
            # A topic that cannot stand in a header.
            return Bug("malformed-request", asked=False)
        return classify(answer, headers["apns-id"], self._clock.now())


def _token_was_valid(answer: HttpAnswer) -> bool:
    """Any answer but 403 means that the provider token was valid."""
    return answer.status != 403
