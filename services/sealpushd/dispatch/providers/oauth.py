"""Access tokens of push services that speak OAuth 2: fetched once for all sends, renewed before their end.

What is the same for every such push service stands here: how a token is fetched, kept and replaced, and how a send
carries it. Sources: RFC 6749, sections 5.1 and 5.2 (answers of the token endpoint); RFC 7523 (JWT as a grant).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import urlencode, urlsplit

from sealpushd.dispatch.providers.base import (
    ACCESS_TOKEN,
    Accepted,
    Bug,
    HttpAnswer,
    Misconfigured,
    Outcome,
    Probed,
    RefreshAuth,
    RetryAt,
    clean_reason,
    retry,
)
from sealpushd.dispatch.providers.http import Connection, HttpClient, clock_is_wrong
from sealpushd.platform.clock import Clock

# A token is renewed so long before its end, while it still serves.
RENEW_BEFORE = timedelta(minutes=5)
# A token that is refused before its time is replaced; a fresh one that is refused as well is not, for so long.
REPLACE_MIN = timedelta(minutes=1)
# A failure of the token endpoint answers all sends for so long: hundreds must not ask it at once, again and again.
FAILURE_KEPT = timedelta(seconds=2)
# Longer when it asks for patience, but a mistaken Retry-After must not keep us from it for hours.
FAILURE_KEPT_MAX = timedelta(minutes=1)
# Vendors give an hour; what a mistaken answer may claim at most.
LIFETIME_MAX = timedelta(hours=24)
TOKEN_CHARACTERS_MAX = 8192
# How much of a send's time the token endpoint may take: less than all, so that a send can say what it waited for.
TOKEN_SHARE = 2 / 3

# Before every moment of the steady clock.
NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Grant:
    """An access token, a secret, and how long it serves."""

    token: str = field(repr=False)
    lifetime: timedelta


def read_grant(answer: HttpAnswer, now: datetime, *, signed: bool) -> Grant | Outcome:
    """What a token endpoint's answer means: a token, `Misconfigured` when it refuses the credential, else `RetryAt`.

    `signed`: what was shown to it carries a time of ours, so that a wrong clock may be what it refuses.
    """
    content = answer.json()
    if answer.status == 200:
        token, expires_in = content.get("access_token"), content.get("expires_in")
        if not isinstance(token, str) or not 0 < len(token) <= TOKEN_CHARACTERS_MAX or not token.isascii() or not token.isprintable():
            return RetryAt("unreadable-answer")
        seconds = expires_in if isinstance(expires_in, int) and not isinstance(expires_in, bool) and expires_in > 0 else 60
        return Grant(token, min(timedelta(seconds=min(seconds, 1_000_000)), LIFETIME_MAX))
    error = content.get("error")
    if answer.status in (400, 401, 403) and isinstance(error, str | int):
        if signed and clock_is_wrong(answer, now):
            return Misconfigured("clock-wrong")
        return Misconfigured(f"oauth-{clean_reason(str(error))}")
    return retry(f"oauth-status-{answer.status}", answer, now)


class AccessTokens:
    """The access token that all sends of a provider share. All its times are of the steady clock: how long it serves is all that counts."""

    def __init__(self, fetch: Callable[[], Awaitable[Grant | Outcome]], clock: Clock) -> None:
        """`fetch` asks the token endpoint, with a deadline of its own, and does not raise."""
        self._fetch = fetch
        self._clock = clock
        self._token = ""
        self._ends_at = NEVER
        self._renew_at = NEVER
        self._replaced_at = NEVER
        self._failure: Outcome | None = None
        self._failure_until = NEVER
        self._fetching: asyncio.Task[None] | None = None

    async def current(self) -> str | Outcome:
        """The token to use now, or why there is none."""
        now = self._clock.monotonic()
        if now >= self._renew_at and now >= self._failure_until:
            fetching = self._start()
            if now >= self._ends_at:
                # Many wait for it, and the one whose time is over must not end it for the others.
                await asyncio.wait([fetching])
                if fetching.cancelled():
                    return RetryAt("closed", asked=False)
        return self._token if self._clock.monotonic() < self._ends_at else (self._failure or RetryAt("oauth-no-token"))

    async def replace(self, refused: str) -> str | Outcome:
        """The token to use instead of one that was refused; RefreshAuth: a new one was refused as well just now.

        Many sends learn of it at once: the first renews, the others find the new one.
        """
        now = self._clock.monotonic()
        if refused == self._token:
            if now - self._replaced_at < REPLACE_MIN.total_seconds():
                return RefreshAuth("oauth-token-refused-again")
            self._replaced_at = now
            # Forgotten at once: who learns of it while the new one is on its way waits for it.
            self._token = ""
            self._ends_at = self._renew_at = self._failure_until = NEVER
        return await self.current()

    def forget_failures(self) -> None:
        """The token endpoint is asked with the next send, whatever it answered the last one; a refused token is replaced at once."""
        self._failure_until = self._replaced_at = NEVER

    async def aclose(self) -> None:
        """End a renewal under way. Idempotent."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    def _start(self) -> asyncio.Task[None]:
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._renew())
        return self._fetching

    async def _renew(self) -> None:
        granted = await self._fetch()
        now = self._clock.monotonic()
        if isinstance(granted, Grant):
            self._failure, self._failure_until = None, NEVER
            self._token = granted.token
            self._ends_at = now + granted.lifetime.total_seconds()
            self._renew_at = now + max(granted.lifetime - RENEW_BEFORE, granted.lifetime / 2).total_seconds()
            return
        patience = granted.retry_after if isinstance(granted, RetryAt) and granted.retry_after is not None else FAILURE_KEPT
        self._failure, self._failure_until = granted, now + min(max(patience, FAILURE_KEPT), FAILURE_KEPT_MAX).total_seconds()


class AuthorizedSends:
    """Sends bodies to one URL, each with the access token, which it fetches, renews and replaces.

    What is the vendor's own comes from the provider: `grant_form` makes the fields that the token endpoint is asked with, anew
    each time; `classify` says what an answer to a send means, and with `RefreshAuth` that the access token was refused.
    """

    def __init__(
        self,
        client: HttpClient,
        connection: Connection,
        clock: Clock,
        *,
        send_path: str,
        token_url: str,
        grant_form: Callable[[], Mapping[str, str]],
        signed: bool,
        classify: Callable[[HttpAnswer, datetime], Outcome],
    ) -> None:
        """`signed`: see `read_grant`."""
        self._client = client
        self._connection = connection
        self._clock = clock
        self._send_url = connection.base_url + send_path
        self._token_url = token_url
        self._grant_form = grant_form
        self._signed = signed
        self._classify = classify
        self.tokens = AccessTokens(self._fetch, clock)

    async def send(self, body: bytes) -> Outcome:
        """What became of one send. A refused access token is replaced and the send repeated once."""
        return await self._client.guard(self._send(body))

    async def probe(self, body: bytes) -> list[Probed]:
        """First the access token, then a send with it, unless there is none."""
        token = await self.tokens.current()
        if not isinstance(token, str):
            return [Probed(ACCESS_TOKEN, token)]
        return [Probed(ACCESS_TOKEN, Accepted()), Probed("send", await self.send(body))]

    async def aclose(self) -> None:
        """End a renewal under way, and all requests of the client. Idempotent."""
        await self.tokens.aclose()
        await self._client.aclose()

    async def _send(self, body: bytes) -> Outcome:
        token = await self.tokens.current()
        if not isinstance(token, str):
            return token
        outcome = await self._exchange(token, body)
        if not isinstance(outcome, RefreshAuth):
            return outcome
        renewed = await self.tokens.replace(token)
        if isinstance(renewed, str):
            return await self._exchange(renewed, body)
        # The push service's own reason says more than ours.
        return outcome if isinstance(renewed, RefreshAuth) else renewed

    async def _exchange(self, token: str, body: bytes) -> Outcome:
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json; charset=UTF-8"}
        try:
            answer = await self._connection.run(lambda: self._client.post(self._send_url, headers, body))
        except ValueError:
            return Bug("malformed-request")
        return self._classify(answer, self._clock.now())

    async def _fetch(self) -> Grant | Outcome:
        granted = await self._client.guard(self._ask_for_grant(), share=TOKEN_SHARE)
        return granted if isinstance(granted, Grant) else of_token_endpoint(granted)

    async def _ask_for_grant(self) -> Grant | Outcome:
        headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
        answer = await self._client.post(self._token_url, headers, urlencode(self._grant_form()).encode())
        return read_grant(answer, self._clock.now(), signed=self._signed)


def of_token_endpoint(outcome: Outcome) -> Outcome:
    """The outcome, its reason saying that it was the token endpoint that could not be asked."""
    if isinstance(outcome, RetryAt) and re.fullmatch(r"timeout|unreadable-answer|network-.*", outcome.reason):
        return RetryAt(f"oauth-{outcome.reason}", outcome.retry_after)
    return outcome


def is_https_url(url: str) -> bool:
    """Whether it is an https URL with a host, without a user, a query or a fragment."""
    try:
        parts = urlsplit(url)
        port_is_possible = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = "@" not in parts.netloc and not parts.query and not parts.fragment
    return parts.scheme == "https" and bool(parts.hostname) and port_is_possible and plain and url.isascii() and url.isprintable()
