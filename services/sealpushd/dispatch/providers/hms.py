"""Huawei Push Kit (HMS Core), downlink messages V1: requests, answers, and what each answer means.

Everything that Huawei defines for a sender of wake-ups stands in this file. Sources: developer.huawei.com, HMSCore-References
"Sending Downlink Messages" (https-send-api-0000001050986197: parameters, HTTP codes, result codes), "OAuth 2.0 open
authentication, client credentials mode" (HMSCore-Guides oauth2-0000001212610981) and the result codes of
oauth-login.cloud.huawei.com/oauth2/v3/token (account-server-error-code, server-error-codes-0000001062371380).

V1 reaches Android and HarmonyOS up to 4; HarmonyOS 5 and later asks for V3, with service accounts and other messages.

HTTP 200 is not success: the `code` decides. That a token is not valid for this app has one code, whether the app was
removed, the token is nonsense or it belongs to another app; and Huawei names no time. Under the credential of another app
every token of the app would answer so, except those of the few phones that have both. Hence such a token is `TokenGone` only while this
credential has had wake-ups accepted by ten devices and by as many as it was refused by, and `TokenSuspect` else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Self

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
    plain,
    retry,
)
from sealpushd.dispatch.providers.http import Connection, HttpClient, HttpSettings
from sealpushd.dispatch.providers.oauth import AuthorizedSends, is_https_url
from sealpushd.platform.clock import Clock

BASE_URL = "https://push-api.cloud.huawei.com"
TOKEN_URL = "https://oauth-login.cloud.huawei.com/oauth2/v3/token"  # noqa: S105 - where, not what
# Huawei: at most 1,296,000 seconds, 15 days.
TTL_MAX = timedelta(days=15)
# What has expired when it comes is refused as a fault of ours (80100004), so nothing is sent with less.
TTL_MIN = timedelta(seconds=1)
# Huawei caches for a device that is offline the newest message of each group 1 to 100 (0: of the app, -1: all). A wake-up
# says nothing but "drain your inbox", so the newest is enough. But an urgent one may start the app and another may not:
# they have groups of their own, so that neither replaces the other.
URGENT_GROUP = 1
NORMAL_GROUP = 2
# A token of nobody: of the right form, so that everything else about a request is looked at.
NOBODYS_TOKEN = PushToken("0" * 130)


@dataclass(frozen=True, slots=True)
class HmsCredential:
    """An app of AppGallery Connect as a client of Push Kit; user and key of its receipts are empty when it signs none."""

    app_id: str
    client_secret: str = field(repr=False)
    receipt_user: str = ""
    receipt_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class HmsSettings:
    """One app's Push Kit access. `app_id` is the id of its OAuth 2.0 client in AppGallery Connect."""

    app_id: str
    client_secret: str = field(repr=False)
    base_url: str = BASE_URL
    token_url: str = TOKEN_URL
    http: HttpSettings = field(default_factory=HttpSettings)

    @classmethod
    def parse(cls, content: bytes, *, base_url: str = BASE_URL, token_url: str = TOKEN_URL, http: HttpSettings | None = None) -> Self:
        """From the content of our credential file; raises as `parse_credential`."""
        credential = parse_credential(content)
        return cls(credential.app_id, credential.client_secret, base_url, token_url, http or HttpSettings())


# Credential


def parse_credential(content: bytes) -> HmsCredential:
    """The credential in our JSON file. Raises ValueError that says what is wrong and quotes nothing of it."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError('the HMS credential must be a JSON object with "app_id" and "client_secret"')
    names = ("app_id", "client_secret", "receipt_user", "receipt_key")
    if fields.keys() - set(names):
        raise ValueError(f"the HMS credential has fields that are none of {', '.join(names)}")
    texts = {name: fields.get(name, "") for name in names}
    # Ids are digits, so somebody may have left out the quotation marks.
    if isinstance(texts["app_id"], int) and not isinstance(texts["app_id"], bool):
        texts["app_id"] = str(texts["app_id"])
    for name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable() or text != text.strip():
            raise ValueError(f'"{name}" of the HMS credential must be a text without line breaks or blanks around it')
    _check_app_id(texts["app_id"])
    if not texts["client_secret"]:
        raise ValueError('the HMS credential has no "client_secret": AppGallery Connect shows it in the project settings')
    if bool(texts["receipt_user"]) != bool(texts["receipt_key"]):
        raise ValueError('"receipt_user" and "receipt_key" of the HMS credential come together, or not at all')
    return HmsCredential(**texts)


def _check_app_id(app_id: str) -> None:
    # It stands in the path; the token endpoint asks for the same form.
    if not re.fullmatch(r"[0-9]{1,64}", app_id):
        raise ValueError('"app_id" must be the id of the OAuth 2.0 client in AppGallery Connect: digits')


# Error table

SUCCESS = "80000000"
# The token is not valid for this app: gone, nonsense, or of another app.
INVALID_TOKEN = frozenset({"80100000", "80300007"})

# So many devices must have been reached before a refused one is believed to be gone.
REACHED_MIN = 10
# Devices that are remembered of either kind.
REMEMBERED_MAX = 10_000
# "The app has no permission", which Huawei may also say of a token of another project. A credential that works is not stopped by one.
NOT_PERMITTED = "80300002"

# code → outcome; "*" is every other code.
ERRORS: Mapping[str, Row] = MappingProxyType(
    {
        # "Some tokens are wrong": we send one.
        "80100000": plain(TokenSuspect),
        "80300007": plain(TokenSuspect),
        "80200001": plain(RefreshAuth),
        "80200003": plain(RefreshAuth),
        "80300002": plain(Misconfigured),
        "80300011": plain(Misconfigured),
        "80300013": plain(Misconfigured),
        "80100001": plain(Bug),
        "80100003": plain(Bug),
        "80100004": plain(Bug),
        "80100013": plain(Bug),
        "80100016": plain(Bug),
        "80100018": plain(Bug),
        "80300008": plain(Bug),
        "80300010": plain(Bug),
        "80600003": retry,
        "81000001": retry,
        "*": retry,
    }
)

FAULT_OF_OURS = "Push Kit does not understand a wake-up: this is a fault of Sealpush, report it"
NOT_VALID_HERE = (
    "the app was removed from the device, or the device token is of another app: is this the credential of the app? If not, put that one "
    "with `sealpush providers rotate`. Until the credential has reached ten devices, and more than it did not, tokens are kept and pushed "
    "to again once the device has registered again; after that they are forgotten"
)

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "80100000": NOT_VALID_HERE,
        "80300007": NOT_VALID_HERE,
        "80200001": (
            "an access token that was fetched just now is refused: is app_id the client id of this app in AppGallery Connect? Put the "
            "right credential with `sealpush providers rotate`"
        ),
        "80200003": "an access token that was fetched just now counts as expired: look at Huawei's status page",
        "80300002": (
            "the app may not push: enable Push Kit for it in AppGallery Connect (for users outside China disable and enable it once), and "
            "see that app_id and client_secret are of this app"
        ),
        "80300011": (
            "the app may not send urgent data messages: apply for that permission of Push Kit in AppGallery Connect; without it nothing "
            "but muted and unhurried wake-ups can be sent"
        ),
        "80300013": (
            "the address that receives receipts is wrong or its certificate has expired: correct it under Push Kit in AppGallery Connect"
        ),
        "80100001": FAULT_OF_OURS,
        "80100003": FAULT_OF_OURS,
        "80100004": "the wake-up had expired for Huawei when it came: is this machine's clock right?",
        "80100013": FAULT_OF_OURS,
        "80100016": FAULT_OF_OURS,
        "80100018": FAULT_OF_OURS,
        "80300008": FAULT_OF_OURS,
        "80300010": FAULT_OF_OURS,
        "80600003": "Push Kit could not ask Huawei's own login service: look at Huawei's status page",
        "81000001": "Push Kit has a fault: look at Huawei's status page",
        "status-503": "Push Kit asks to send more slowly: waits. If it lasts, ask Huawei for a larger quota, or look at its status page",
        "status-404": "there is no such app: is app_id the client id of this app in AppGallery Connect?",
        "accepted-without-request-id": "something between answers in Huawei's place: look at SEALPUSH_PROXY",
        "oauth-1101": (
            "Huawei knows no such client, or its secret is another: copy client id and secret from AppGallery Connect and put them with "
            "`sealpush providers rotate`"
        ),
        "oauth-invalid_client": (
            "Huawei knows no such client, or its secret is another: copy client id and secret from AppGallery Connect and put them with "
            "`sealpush providers rotate`"
        ),
    }
)


def classify(answer: HttpAnswer, now: datetime) -> Outcome:
    """The outcome that one answer means, as far as one answer tells: for `INVALID_TOKEN` see `HmsProvider.send`.

    Only an answer in Push Kit's own form may do harm (end a leg, stop a lane, quarantine): it is a JSON object with a code
    of eight digits, and a success names the request. Anything else comes from something in between and is tried again, as
    is everything in the 5xx: 503 is Huawei's flow control.
    """
    content = answer.json()
    code = content.get("code")
    if answer.status >= 500 or not isinstance(code, str) or not re.fullmatch(r"[0-9]{8}", code):
        # Not Huawei's, so neither is what it asks for; its flow control names no time.
        return RetryAt("unreadable-answer" if answer.status == 200 else f"status-{answer.status}")
    if code == SUCCESS:
        request_id = content.get("requestId")
        is_ours = answer.status == 200 and isinstance(request_id, str) and request_id
        return Accepted() if is_ours else RetryAt("accepted-without-request-id")
    row = ERRORS.get(code) or ERRORS["*"]
    return row(code, answer, now)


# Request


def build_message(target: PushTarget, wake_up: WakeUp, now: datetime, *, validate_only: bool = False) -> bytes:
    """The body: where to, the wake-up id, how urgent and until when; nothing else may ever stand here.

    There is no `notification`: the app shows what it has fetched. HIGH may start an app that is not running; like with FCM
    it is kept for what will be shown. The wake-up id is the receipt's tag too.
    """
    is_urgent = not wake_up.muted and wake_up.priority is WakeUpPriority.HIGH
    ttl = min(max(wake_up.expires_at - now, TTL_MIN), TTL_MAX)
    urgency, group = ("HIGH", URGENT_GROUP) if is_urgent else ("NORMAL", NORMAL_GROUP)
    # Only the token can hold what JSON escapes. Written out, because a json.dumps of the whole costs more than the rest of a send.
    data = f'"{{\\"id\\":\\"{wake_up.wire_id}\\"}}"'
    ttl_s = int(ttl.total_seconds())
    android = f'{{"urgency":"{urgency}","ttl":"{ttl_s}s","collapse_key":{group},"bi_tag":"{wake_up.wire_id}"}}'
    message = f'{{"data":{data},"android":{android},"token":[{json.dumps(target.token.reveal())}]}}'
    return f'{{"validate_only":{"true" if validate_only else "false"},"message":{message}}}'.encode()


class HmsProvider:
    """Sends wake-ups to Push Kit; see `Provider`. One access token for all sends."""

    name = "hms"

    def __init__(self, settings: HmsSettings, clock: Clock) -> None:
        """Raises ValueError or OSError when app id, token URL, CA file or proxy are unusable."""
        _check_app_id(settings.app_id)
        if not is_https_url(settings.token_url):
            raise ValueError("the URL of Huawei's token endpoint must be an https URL")
        self.topic = settings.app_id
        self._clock = clock
        # Devices, by the hash of their tokens, that took a wake-up and that did not, since this credential is in use.
        self._reached: set[int] = set()
        self._refused: set[int] = set()
        form = {"grant_type": "client_credentials", "client_id": settings.app_id, "client_secret": settings.client_secret}
        self._sends = AuthorizedSends(
            # Huawei promises no HTTP/2.
            HttpClient(settings.http, http2_only=False),
            Connection(settings.base_url, settings.http.streams_max, clock),
            clock,
            send_path=f"/v1/{settings.app_id}/messages:send",
            token_url=settings.token_url,
            grant_form=lambda: form,
            signed=False,
            classify=classify,
        )

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        """See `Provider.send`. A refused access token is replaced and the send repeated once."""
        if target.topic not in ("", self.topic):
            return TokenSuspect("other-topic", asked=False)
        outcome = await self._sends.send(build_message(target, wake_up, self._clock.now()))
        if isinstance(outcome, Accepted):
            self._remember(self._reached, target)
        if isinstance(outcome, Misconfigured) and outcome.reason == NOT_PERMITTED and await self._works():
            return TokenSuspect(outcome.reason)
        if isinstance(outcome, TokenSuspect) and outcome.reason in INVALID_TOKEN:
            self._remember(self._refused, target)
            if len(self._reached) >= max(REACHED_MIN, len(self._refused)):
                return TokenGone(outcome.reason)
        return outcome

    def _remember(self, devices: set[int], target: PushTarget) -> None:
        if len(devices) < REMEMBERED_MAX:
            devices.add(hash(target.token))

    async def _works(self) -> bool:
        """Whether the credential itself is in order, as far as is known or can be asked."""
        return bool(self._reached) or accepts(await self.probe())

    async def probe(self) -> Sequence[Probed]:
        """See `Provider.probe`. Push Kit has a dry run: an urgent message that is only looked at, to nobody's token."""
        now = self._clock.now()
        wake_up = WakeUp(bytes(16), muted=False, priority=WakeUpPriority.HIGH, expires_at=now)
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
