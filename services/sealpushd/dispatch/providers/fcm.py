"""Firebase Cloud Messaging (FCM), HTTP v1: requests, answers, and what each answer means.

Everything that Google defines for a sender of wake-ups stands in this file. Sources: firebase.google.com, "ErrorCode"
(docs/reference/fcm/rest/v1/ErrorCode), "FCM error codes" (docs/cloud-messaging/error-codes), "projects.messages"
(docs/reference/fcm/rest/v1/projects.messages), "FCM throttling and quotas" (docs/cloud-messaging/throttling-and-quotas),
"Android message priority" (docs/cloud-messaging/android/message-priority); developers.google.com, "Using OAuth 2.0 for
server to server applications" (identity/protocols/oauth2/service-account).

Three answers are taken more gently than their words suggest. SENDER_ID_MISMATCH and an INVALID_ARGUMENT that is about the
token mean `TokenSuspect`, not `TokenGone`: if an operator puts the credential of another project, every token of the app
answers so, and none may be erased. A token of the wrong project is set aside until the device registers again.
THIRD_PARTY_AUTH_ERROR is not about our credential, although its status is 401: Google says so of a token that belongs to an
Apple device or a browser whose own credentials the project lacks. It too sets one token aside and stops no lane.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
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
    accepts,
    advise_common,
    clean_reason,
    parse_retry_after,
    plain,
    retry,
)
from sealpushd.dispatch.providers.http import Connection, HttpClient, HttpSettings, clock_is_wrong
from sealpushd.dispatch.providers.oauth import AuthorizedSends, is_https_url
from sealpushd.platform.clock import Clock

SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
# Google: at most an hour.
ASSERTION_LIFETIME = timedelta(hours=1)
# Google signs with 2048 bits; less is not one of its keys.
KEY_BITS_MIN = 2048
# Google: 0 to 2,419,200 seconds, four weeks.
TTL_MAX = timedelta(seconds=2_419_200)
# Google: wait at least a minute when the quota of the project is used up and no Retry-After says otherwise.
QUOTA_PAUSE = timedelta(minutes=1)
# A wake-up says nothing but "drain your inbox", so of several that wait for a device only the newest matters.
COLLAPSE_KEY = "wake-up"
# A token of nobody: of the right form, so that everything else about a request is looked at.
NOBODYS_TOKEN = PushToken("0" * 22 + ":APA91b" + "0" * 134)

FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
QUOTA_FAILURE = "type.googleapis.com/google.rpc.QuotaFailure"


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """A Google service account and one of its keys, as the JSON file of the Google Cloud console has them."""

    project_id: str
    client_email: str
    private_key_id: str
    token_uri: str
    private_key: RSAPrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class FcmSettings:
    """One project's FCM access. `service_account` is the content of the account's JSON key file.

    `project` takes the place of the service account's own project: an account may send for another one.
    """

    service_account: bytes = field(repr=False)
    project: str = ""
    base_url: str = "https://fcm.googleapis.com"
    http: HttpSettings = field(default_factory=HttpSettings)


# Credential


def parse_service_account(content: bytes) -> ServiceAccount:
    """The service account in a JSON key file. Raises ValueError that says what is wrong and quotes nothing of it."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError("the service account must be the JSON file that the Google Cloud console gave when the key was made")
    if fields.get("type") != "service_account":
        raise ValueError('the JSON file is not of a service account: its "type" must be "service_account"')
    texts = {}
    for name in ("project_id", "client_email", "private_key_id", "private_key", "token_uri"):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'the service account has no "{name}": put the whole JSON file')
        texts[name] = text.strip()
    _check_project_id(texts["project_id"])
    if not is_https_url(texts["token_uri"]):
        raise ValueError('"token_uri" of the service account must be an https URL')
    return ServiceAccount(
        project_id=texts["project_id"],
        client_email=texts["client_email"],
        private_key_id=texts["private_key_id"],
        token_uri=texts["token_uri"],
        private_key=_load_private_key(texts["private_key"]),
    )


def _load_private_key(pem: str) -> RSAPrivateKey:
    try:
        private_key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private_key = None
    if not isinstance(private_key, RSAPrivateKey) or private_key.key_size < KEY_BITS_MIN:
        raise ValueError(f'"private_key" of the service account must be a PEM private key, RSA of at least {KEY_BITS_MIN} bits')
    return private_key


def _check_project_id(project_id: str) -> None:
    # It stands in the path. Old projects of a domain are named "example.com:name".
    if not re.fullmatch(r"[a-z0-9][a-z0-9.:\-]{0,99}", project_id):
        raise ValueError("the project id has 1 to 100 lower-case letters, digits, hyphens, and no other characters")


def build_assertion(account: ServiceAccount, now: datetime) -> str:
    """The signed claim that the token endpoint trades for an access token."""
    issued_at = int(now.timestamp())
    claims = {
        "iss": account.client_email,
        "scope": SCOPE,
        "aud": account.token_uri,
        "iat": issued_at,
        "exp": issued_at + int(ASSERTION_LIFETIME.total_seconds()),
    }
    return jwt.encode(claims, account.private_key, algorithm="RS256", headers={"kid": account.private_key_id})


# Error table


@dataclass(frozen=True, slots=True)
class GoogleError:
    """An error in Google's own form: `code` is FcmError's errorCode, empty without one; `status` that of google.rpc."""

    code: str
    status: str
    details: Mapping[str, dict[str, object]]

    def items(self, kind: str, name: str) -> list[dict[str, object]]:
        """The objects in one list of one detail."""
        listed = self.details.get(kind, {}).get(name)
        return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def read_error(answer: HttpAnswer) -> GoogleError | None:
    """The error that an answer carries; None: it is not in Google's form."""
    error = answer.json().get("error")
    if not isinstance(error, dict) or error.get("code") != answer.status:
        return None
    status, listed = error.get("status"), error.get("details")
    if not isinstance(status, str) or not status:
        return None
    details = {str(detail.get("@type")): detail for detail in (listed if isinstance(listed, list) else []) if isinstance(detail, dict)}
    code = details.get(FCM_ERROR, {}).get("errorCode")
    return GoogleError(clean_reason(code) if isinstance(code, str) and code else "", clean_reason(status), details)


def _invalid_argument(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    """The token's fault, if Google names no field or only the token's; else the request's."""
    error = read_error(answer)
    violations = error.items(BAD_REQUEST, "fieldViolations") if error is not None else []
    if error is None or BAD_REQUEST not in error.details or (violations and all(one.get("field") == "message.token" for one in violations)):
        return TokenSuspect(reason)
    return Bug("BadRequest")


def _invalid_request(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    """As above, but without FcmError: where Google names no field it is not about the token."""
    error = read_error(answer)
    named = error is not None and BAD_REQUEST in error.details
    return _invalid_argument(reason, answer, now) if named else Bug("BadRequest")


def _quota(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    """Google names the exhausted quota in words; "device" in them means patience with this device only."""
    error = read_error(answer)
    violations = error.items(QUOTA_FAILURE, "violations") if error is not None else []
    of_device = any("device" in str(one.get(word, "")).lower() for one in violations for word in ("subject", "description"))
    return RetryAt(reason, parse_retry_after(answer, now) or QUOTA_PAUSE, of_device=of_device)


def _unauthenticated(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    return Misconfigured("clock-wrong") if clock_is_wrong(answer, now) else RefreshAuth(reason)


def _denied(reason: str, answer: HttpAnswer, now: datetime) -> Outcome:
    """ErrorInfo's word where it has one that we can advise on: it says which permission."""
    error = read_error(answer)
    info = error.details.get(ERROR_INFO, {}).get("reason") if error is not None else None
    return Misconfigured(info if isinstance(info, str) and info in DENIALS else reason)


# ErrorInfo's reasons of a PERMISSION_DENIED that are told instead of it.
DENIALS = frozenset(
    {"SERVICE_DISABLED", "IAM_PERMISSION_DENIED", "CONSUMER_INVALID", "BILLING_DISABLED", "ACCESS_TOKEN_SCOPE_INSUFFICIENT"}
)

# (where the word stands, word) → outcome; "*" is every other word that stands there. An errorCode is asked first.
ERRORS: Mapping[tuple[str, str], Row] = MappingProxyType(
    {
        ("errorCode", "UNREGISTERED"): plain(TokenGone),
        ("errorCode", "SENDER_ID_MISMATCH"): plain(TokenSuspect),
        ("errorCode", "INVALID_ARGUMENT"): _invalid_argument,
        ("errorCode", "THIRD_PARTY_AUTH_ERROR"): plain(TokenSuspect),
        # The name that THIRD_PARTY_AUTH_ERROR had before.
        ("errorCode", "APNS_AUTH_ERROR"): plain(TokenSuspect),
        ("errorCode", "QUOTA_EXCEEDED"): _quota,
        ("errorCode", "UNAVAILABLE"): retry,
        ("errorCode", "INTERNAL"): retry,
        ("errorCode", "UNSPECIFIED_ERROR"): retry,
        ("errorCode", "*"): retry,
        ("status", "UNAUTHENTICATED"): _unauthenticated,
        ("status", "PERMISSION_DENIED"): _denied,
        ("status", "NOT_FOUND"): plain(Misconfigured),
        ("status", "INVALID_ARGUMENT"): _invalid_request,
        ("status", "RESOURCE_EXHAUSTED"): _quota,
        ("status", "*"): retry,
    }
)

MISSING_ROLE = (
    "the service account may not send for this project: give it the role Firebase Cloud Messaging API Admin in the Google Cloud "
    "console, or put another one with `sealpush providers rotate`"
)

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "UNREGISTERED": "the app was removed from the device, or its token was replaced: the token is forgotten",
        "SENDER_ID_MISMATCH": (
            "the device token belongs to another Firebase project: is this the service account of the app's project? If not, put that "
            "one with `sealpush providers rotate`. The token is kept and pushed to again once the device has registered again"
        ),
        "INVALID_ARGUMENT": (
            "this is no token of FCM: what does the app register? The token is kept and pushed to again once the device has "
            "registered again"
        ),
        "BadRequest": "FCM does not understand a wake-up: this is a fault of Sealpush, report it",
        "THIRD_PARTY_AUTH_ERROR": (
            "the device token is of an Apple device or a browser, whose own credentials the Firebase project lacks: does the app "
            "register an FCM token where it should register one of APNs?"
        ),
        "APNS_AUTH_ERROR": (
            "the device token is of an Apple device, whose own credentials the Firebase project lacks: does the app register an FCM "
            "token where it should register one of APNs?"
        ),
        "QUOTA_EXCEEDED": (
            "more messages than the quota of the project (600,000 a minute) or of one device (240 a minute): waits. The Google Cloud "
            "console shows the quota under Firebase Cloud Messaging API"
        ),
        "RESOURCE_EXHAUSTED": (
            "more requests than the quota allows: waits. The Google Cloud console shows the quota under Firebase Cloud Messaging API"
        ),
        "UNAVAILABLE": "FCM is overloaded: look at the Firebase status page",
        "INTERNAL": "FCM has a fault: look at the Firebase status page",
        "UNSPECIFIED_ERROR": "FCM has a fault that it does not explain: look at the Firebase status page",
        "UNAUTHENTICATED": (
            "an access token that was fetched just now is refused: was the service account disabled in the Google Cloud console? Make "
            "a new key there and put it with `sealpush providers rotate`"
        ),
        "PERMISSION_DENIED": MISSING_ROLE,
        "IAM_PERMISSION_DENIED": MISSING_ROLE,
        "SERVICE_DISABLED": (
            "the project does not use the Firebase Cloud Messaging API: enable it in the Google Cloud console and wait a few minutes"
        ),
        "CONSUMER_INVALID": "the project is gone or suspended: look at it in the Google Cloud console",
        "BILLING_DISABLED": "the project's billing is disabled: look at it in the Google Cloud console",
        "ACCESS_TOKEN_SCOPE_INSUFFICIENT": "the access token lacks the scope of messaging: this is a fault of Sealpush, report it",
        "NOT_FOUND": (
            "there is no such project: look at the project id in the Google Cloud console and put the right one with "
            "`sealpush providers rotate`"
        ),
        "oauth-invalid_grant": (
            "Google takes the service account's signature no more: its key was deleted or the account disabled in the Google Cloud "
            "console, or this machine's clock is wrong. Set the clock by NTP, or make a new key there and put it with "
            "`sealpush providers rotate`"
        ),
        "oauth-invalid_client": (
            "Google does not know the service account: was it deleted in the Google Cloud console? Make a new one there and put its "
            "key with `sealpush providers rotate`"
        ),
        "oauth-deleted_client": (
            "the service account was deleted in the Google Cloud console: make a new one there and put its key with "
            "`sealpush providers rotate`"
        ),
        "oauth-disabled_client": (
            "the service account is disabled: enable it in the Google Cloud console, or put another one with `sealpush providers rotate`"
        ),
        "oauth-unauthorized_client": "the service account may not ask for access tokens: look at it in the Google Cloud console",
        "oauth-access_denied": "Google refuses the service account: look at the organisation's policies in the Google Cloud console",
        "oauth-invalid_scope": "the token endpoint does not know FCM's scope: is token_uri of the service account Google's?",
        "oauth-invalid_request": "the token endpoint does not understand our request: is token_uri of the service account Google's?",
        "oauth-unsupported_grant_type": "the token endpoint takes no service accounts: is token_uri of the service account Google's?",
    }
)


def classify(answer: HttpAnswer, now: datetime) -> Outcome:
    """The outcome that one answer means.

    Only an answer in FCM's own form may do harm (end a leg, stop a lane, quarantine): a success names the message, an error
    is google.rpc's with the HTTP status in it. Anything else comes from something in between and is tried again.
    """
    if answer.status == 200:
        name = answer.json().get("name")
        is_ours = isinstance(name, str) and name.startswith("projects/") and "/messages/" in name
        return Accepted() if is_ours else RetryAt("unreadable-answer")
    error = read_error(answer)
    if error is None:
        # Not Google's, so neither is what it asks for.
        return RetryAt(f"status-{answer.status}")
    where, word = ("errorCode", error.code) if error.code else ("status", error.status)
    row = ERRORS.get((where, word)) or ERRORS[where, "*"]
    return row(word, answer, now)


# Request


def build_message(target: PushTarget, wake_up: WakeUp, now: datetime, *, validate_only: bool = False) -> bytes:
    """The body: where to, the wake-up id, how urgent and until when; nothing else may ever stand here.

    There is no `notification`: the app shows what it has fetched. HIGH only where something will be shown, because Google
    lowers the priority of apps whose HIGH messages show nothing. Only NORMAL messages are collapsible: FCM delays those
    after 20 for one app and device, to one in three minutes, and what is urgent must not wait for that.
    """
    is_urgent = not wake_up.muted and wake_up.priority is WakeUpPriority.HIGH
    ttl = min(max(wake_up.expires_at - now, timedelta(0)), TTL_MAX)
    android = f'"priority":"HIGH","ttl":"{int(ttl.total_seconds())}s"'
    if not is_urgent:
        android = f'"priority":"NORMAL","ttl":"{int(ttl.total_seconds())}s","collapse_key":"{COLLAPSE_KEY}"'
    # Only the token can hold what JSON escapes. Written out, because a json.dumps of the whole costs more than the rest of a send.
    message = f'{{"token":{json.dumps(target.token.reveal())},"data":{{"id":"{wake_up.wire_id}"}},"android":{{{android}}}}}'
    return f'{{{_DRY_RUN if validate_only else ""}"message":{message}}}'.encode()


_DRY_RUN = '"validate_only":true,'


class FcmProvider:
    """Sends wake-ups to FCM; see `Provider`. One connection, one access token for all sends."""

    name = "fcm"

    def __init__(self, settings: FcmSettings, clock: Clock) -> None:
        """Raises ValueError or OSError when service account, project, CA file or proxy are unusable."""
        account = parse_service_account(settings.service_account)
        self.topic = settings.project or account.project_id
        _check_project_id(self.topic)
        self._clock = clock
        self._has_accepted = False
        self._sends = AuthorizedSends(
            HttpClient(settings.http, http2_only=True),
            Connection(settings.base_url, settings.http.streams_max, clock),
            clock,
            send_path=f"/v1/projects/{self.topic}/messages:send",
            token_url=account.token_uri,
            grant_form=lambda: {"grant_type": JWT_GRANT, "assertion": build_assertion(account, clock.now())},
            signed=True,
            classify=classify,
        )

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        """See `Provider.send`. A refused access token is replaced and the send repeated once."""
        if target.topic not in ("", self.topic):
            return TokenSuspect("other-topic", asked=False)
        outcome = await self._sends.send(build_message(target, wake_up, self._clock.now()))
        if isinstance(outcome, Accepted):
            self._has_accepted = True
        if isinstance(outcome, Misconfigured) and outcome.reason == "NOT_FOUND" and (self._has_accepted or accepts(await self.probe())):
            # The project is there. Google's own libraries read this as a token that is not.
            return TokenSuspect(outcome.reason)
        return outcome

    async def probe(self) -> Sequence[Probed]:
        """See `Provider.probe`. FCM has a dry run: a message that is only looked at, to nobody's token."""
        now = self._clock.now()
        wake_up = WakeUp(bytes(16), muted=True, priority=WakeUpPriority.NORMAL, expires_at=now)
        nobody = PushTarget(NOBODYS_TOKEN, PushEnvironment.PRODUCTION, self.topic, now)
        return await self._sends.probe(build_message(nobody, wake_up, now, validate_only=True))

    def advise(self, reason: str) -> str:
        """See `Provider.advise`."""
        return ADVICE.get(reason) or advise_common(reason)

    def forget_failures(self) -> None:
        """See `Provider.forget_failures`."""
        self._sends.tokens.forget_failures()

    async def aclose(self) -> None:
        """See `Provider.aclose`."""
        await self._sends.aclose()
