"""The one shape of all push services: what goes in, what comes out.

A provider turns (target, wake-up) into an `Outcome`. It never decides what follows from it: that is `dispatch.rules`.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import Enum
from types import MappingProxyType
from typing import Protocol

WAKE_UP_ID_BYTES = 16
# Vendors' reasons are short words ("TooManyProviderTokenUpdates"); a longer one is not one of theirs.
REASON_CHARACTERS_MAX = 64
# An honest push service asks for seconds or minutes; a mistaken one must not park a delivery for ever.
RETRY_AFTER_MAX = timedelta(minutes=15)
# No vendor's token is longer than about 4 KiB (FCM reserves the right to that size).
PUSH_TOKEN_CHARACTERS_MAX = 4096


class PushToken:
    """A device's address at its push service. A secret: it prints as `PushToken(…)`, `reveal` is for the wire only."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Raises ValueError (without the value) when it is empty, too long or not printable ASCII."""
        if not 0 < len(value) <= PUSH_TOKEN_CHARACTERS_MAX or not value.isascii() or not value.isprintable():
            raise ValueError(f"a push token has 1 to {PUSH_TOKEN_CHARACTERS_MAX} printable ASCII characters")
        self._value = value

    def reveal(self) -> str:
        """The token itself."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PushToken) and self._value == other._value

    def __hash__(self) -> int:
        return hash((PushToken, self._value))

    def __repr__(self) -> str:
        return "PushToken(…)"


class PushEnvironment(Enum):
    """Which of the vendor's worlds a token lives in. APNs has two; the others know PRODUCTION only."""

    PRODUCTION = "production"
    SANDBOX = "sandbox"


class WakeUpPriority(Enum):
    """How soon the device should learn of it."""

    HIGH = "high"
    # May wait until the device is awake for another reason.
    NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where a wake-up goes. `topic` is what the token belongs to (bundle id, project, app id), `registered_at` its registration."""

    token: PushToken
    environment: PushEnvironment
    topic: str
    registered_at: datetime

    def __post_init__(self) -> None:
        if self.registered_at.tzinfo is None:
            raise ValueError("registered_at must be an aware datetime")


@dataclass(frozen=True, slots=True)
class WakeUp:
    """What is sent: an opaque random id and nothing that says who sent what.

    `muted` wakes the app without showing anything. After `expires_at` the push service drops it.
    """

    wake_up_id: bytes
    muted: bool
    priority: WakeUpPriority
    expires_at: datetime

    def __post_init__(self) -> None:
        if len(self.wake_up_id) != WAKE_UP_ID_BYTES:
            raise ValueError(f"a wake-up id has {WAKE_UP_ID_BYTES} bytes")
        if self.expires_at.tzinfo is None:
            raise ValueError("expires_at must be an aware datetime")

    @property
    def wire_id(self) -> str:
        """The id as it travels: base64url without padding, 22 characters."""
        return base64.urlsafe_b64encode(self.wake_up_id).rstrip(b"=").decode()

    @property
    def request_uuid(self) -> uuid.UUID:
        """The same UUID for every repeat of this wake-up, for vendors whose requests carry one."""
        return uuid.UUID(bytes=self.wake_up_id, version=4)


def clean_reason(text: object) -> str:
    """A vendor's reason fit for logs and labels: at most 64 letters, digits, `.`, `_`, `-`; never empty.

    Vendors (and whatever stands between) may answer anything, also an echo of the token; only a short word passes.
    """
    if isinstance(text, str) and re.fullmatch(rf"[A-Za-z0-9._\-]{{1,{REASON_CHARACTERS_MAX}}}", text):
        return text
    return "unreadable"


# What can come out


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`asked`: the push service was; False: decided here, which says nothing of the push service."""

    reason: str = ""
    asked: bool = field(default=True, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        if self.reason:
            object.__setattr__(self, "reason", clean_reason(self.reason))


@dataclass(frozen=True, slots=True)
class Accepted(_Outcome):
    """The push service took it. Not "delivered": only the device's acknowledgement is."""


@dataclass(frozen=True, slots=True)
class TokenGone(_Outcome):
    """The app is gone from the device, says the push service. `at`: since when; None: it named no time.

    Without a time, compare-and-clear uses the moment of the answer.
    """

    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class TokenSuspect(_Outcome):
    """The token is not valid **here**: wrong token, or a good token of the other environment or another app.

    The push service cannot tell which, and names no time. A phone whose registration carried the wrong environment
    would be forgotten for good although its token is fine. So: this push leg ends, the token is set aside until the
    device registers again, and it is not erased.
    """


@dataclass(frozen=True, slots=True)
class RetryAt(_Outcome):
    """Not now. `retry_after`: not earlier than this, as the push service asked; None: it did not.

    `of_device`: patience with this device is asked for; it says nothing of the push service as a whole.
    """

    retry_after: timedelta | None = None
    of_device: bool = False

    def __post_init__(self) -> None:
        _Outcome.__post_init__(self)
        if self.retry_after is not None:
            object.__setattr__(self, "retry_after", min(max(self.retry_after, timedelta(0)), RETRY_AFTER_MAX))


@dataclass(frozen=True, slots=True)
class RefreshAuth(_Outcome):
    """Our credential is refused as expired although the provider has just renewed it, or may not yet renew it again."""


@dataclass(frozen=True, slots=True)
class Misconfigured(_Outcome):
    """CONFIG: credentials or topic are wrong; every push of this app fails until somebody repairs it."""


@dataclass(frozen=True, slots=True)
class Bug(_Outcome):
    """Our request is wrong and stays wrong: never repeat it."""


Outcome = Accepted | TokenGone | TokenSuspect | RetryAt | RefreshAuth | Misconfigured | Bug


# The first of two steps, where a push service has two.
ACCESS_TOKEN = "access token"  # noqa: S105 - the name of a step


@dataclass(frozen=True, slots=True)
class Probed:
    """What a push service thinks of a credential. `what`: which part of it was tried: ACCESS_TOKEN, "send" or an environment."""

    what: str
    outcome: Outcome

    @property
    def is_good(self) -> bool | None:
        """Whether the credential works here; None: the push service could not be asked.

        The probe's token is nobody's: that it is refused as a token shows that the credential was taken.
        """
        match self.outcome:
            case Accepted() | TokenGone() | TokenSuspect():
                return True
            case RefreshAuth() | Misconfigured() | Bug():
                return False
            case RetryAt():
                return None


def accepts(probes: Sequence[Probed]) -> bool:
    """Whether a push service takes a credential.

    An access token alone sends nothing. A key may be limited to one environment, so one that works is enough.
    """
    return any(probed.is_good for probed in probes if probed.what != ACCESS_TOKEN)


class Provider(Protocol):
    """One push service for one app's credentials. Safe for many concurrent sends on one event loop."""

    @property
    def name(self) -> str:
        """ "apns", "fcm" or "hms"; a label for logs and metrics."""

    @property
    def topic(self) -> str:
        """Where installations belong that name no topic of their own: bundle id, project, app id."""

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        """Hand one wake-up over.

        Never raises for what the push service or the network does: no answer, a late one or garbage is `RetryAt`.
        Bounded by the provider's total timeout. Repeating a send with the same wake-up is harmless. Cancellation passes
        through; whether the push left is then unknown.
        """

    async def probe(self) -> Sequence[Probed]:
        """Ask the push service what it thinks of the credential, without waking any device. Raises as little as `send`."""

    def advise(self, reason: str) -> str:
        """What the reason of an outcome means and what to do about it: a sentence for an operator."""

    def forget_failures(self) -> None:
        """Ask the push service anew with the next send, also where an earlier failure says not yet: somebody repaired something."""

    async def aclose(self) -> None:
        """Close connections; sends under way end as `RetryAt`. Idempotent."""


# What a reason means that is ours and not a vendor's, and what to do about it.
COMMON_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "timeout": "it did not answer in time: look at the network, the proxy and the vendor's status page",
        "network-dns": "its host name cannot be resolved: look at this machine's DNS and at the URL in the settings",
        "network-certificate": "its certificate is not trusted: does something open TLS on the way? Name its authority in SEALPUSH_PUSH_CA",
        "network-refused": "nothing takes connections there: look at the URL in the settings, the proxy and the firewall",
        "network-proxy": "the proxy refuses the connection: look at SEALPUSH_PROXY and the proxy's rules for CONNECT",
        "network-broken": "the connection broke: look at the network and the vendor's status page",
        "closed": "the credential was replaced or the service ends; it is sent again by the next one",
        "clock-wrong": "this machine's clock differs from the vendor's by more than 5 minutes, so what it signs is refused: set it by NTP",
        "unreadable-answer": "something between answers in the vendor's place (a proxy, a captive page): look at SEALPUSH_PROXY",
        "malformed-token": "the app registered something that is no token of this push service: look at the app",
        "other-topic": "the installation belongs to another app or project than the credential: it is pushed to once it registers anew",
    }
)

# Likewise, for what should not come to pass.
RARE_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "unreadable": "it names a reason that is no word of a vendor's: does something answer in its place? Look at SEALPUSH_PROXY",
        "malformed-request": "the topic or the URL in the settings cannot stand in a request: look at `sealpush providers list`",
        "oauth-no-token": "the access token ended before it could be used: is this machine's clock steady?",
        "oauth-token-refused-again": "an access token that was fetched just now is refused: was the credential revoked?",
    }
)


def advise_common(reason: str) -> str:
    """What a reason means that is not in a provider's own table: ours, an HTTP status, the network's, or the token endpoint's."""
    advice = COMMON_ADVICE.get(reason) or RARE_ADVICE.get(reason)
    if advice is not None:
        return advice
    if reason.startswith("oauth-"):
        return f"the token endpoint was asked for an access token: {advise_common(reason.removeprefix('oauth-'))}"
    if reason.startswith("status-"):
        return (
            f"HTTP {reason.removeprefix('status-')} without the error that the push service would name: it has a fault (look at its "
            "status page), or something between answers in its place (look at SEALPUSH_PROXY)"
        )
    if reason.startswith("network-"):
        return COMMON_ADVICE["network-broken"]
    return "look at the vendor's documentation and status page"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer of a push service, bounded. Header names are lower case; `body` is None when it was too long."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = b""

    def json(self) -> dict[str, object]:
        """The body as an object; empty when it is none."""
        try:
            content = json.loads(self.body or b"")
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


# What one answer of a push service means: (reason, answer, now) → outcome.
Row = Callable[[str, HttpAnswer, datetime], "Outcome"]


def plain(outcome: type[TokenSuspect] | type[TokenGone] | type[RefreshAuth] | type[Misconfigured] | type[Bug]) -> Row:
    """The outcome with the reason alone."""
    return lambda reason, answer, now: outcome(reason)


def retry(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    """Again later, as late as the answer asks for."""
    return RetryAt(reason, parse_retry_after(answer, now))


def parse_http_date(value: str | None) -> datetime | None:
    """The moment of an HTTP date; None: absent, unreadable, without its zone, or no moment that there is."""
    try:
        at = parsedate_to_datetime(value or "")
        return at.astimezone(UTC) if at.tzinfo else None
    except (ValueError, OverflowError, TypeError, IndexError):
        # Of a year such as 99999999999; and the parser of the standard library lets more than one kind through.
        return None


def parse_retry_after(answer: HttpAnswer, now: datetime) -> timedelta | None:
    """The Retry-After header, seconds or an HTTP date; None: absent, unreadable or too large. Bounded by `RETRY_AFTER_MAX`.

    A date is the push service's, so it counts from the answer's own Date; `now` stands in where that is missing.
    """
    value = answer.headers.get("retry-after", "")
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value, re.ASCII):
        return min(timedelta(seconds=int(value)), RETRY_AFTER_MAX)
    at = parse_http_date(value)
    if at is None:
        return None
    return min(max(at - (parse_http_date(answer.headers.get("date")) or now), timedelta(0)), RETRY_AFTER_MAX)
