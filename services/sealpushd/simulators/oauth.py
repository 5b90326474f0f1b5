"""What the token endpoints of Google and Huawei have in common: forms, and access tokens that live for an hour."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import format_datetime
from enum import Enum
from typing import Final
from urllib.parse import parse_qsl, urlencode

from sealpushd.simulators.core import fingerprint
from sealpushd.simulators.exchange import HttpRequest

ACCESS_TOKEN_LIFETIME: Final = timedelta(hours=1)
FORM: Final = "application/x-www-form-urlencoded"
# A provider needs one at a time; the oldest give way.
ACCESS_TOKENS_MAX: Final = 10_000
_FIELDS_MAX: Final = 20
_SECRET_FIELDS: Final = frozenset({"assertion", "client_secret"})


class TokenState(Enum):
    """What an access token that is shown turns out to be."""

    GOOD = "good"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(slots=True)
class _AccessToken:
    owner: str
    expires_at: datetime
    revoked: bool = False


class AccessTokens:
    """The access tokens of one service by their owner: an account, a client."""

    def __init__(self) -> None:
        self._tokens: dict[str, _AccessToken] = {}

    def issue(self, owner: str, now: datetime) -> str:
        """A new token; older ones of this owner stay good."""
        if len(self._tokens) >= ACCESS_TOKENS_MAX:
            del self._tokens[next(iter(self._tokens))]
        token = secrets.token_urlsafe(96)
        self._tokens[token] = _AccessToken(owner, now + ACCESS_TOKEN_LIFETIME)
        return token

    def look(self, token: str, now: datetime) -> tuple[TokenState, str]:
        """What a token is, and whose; nobody's is ""."""
        known = self._tokens.get(token)
        if known is None:
            return TokenState.UNKNOWN, ""
        if known.revoked:
            return TokenState.REVOKED, known.owner
        return TokenState.EXPIRED if known.expires_at <= now else TokenState.GOOD, known.owner

    def expire(self, token: str, now: datetime) -> None:
        """Its hour is over."""
        known = self._tokens.get(token)
        if known is not None:
            known.expires_at = min(known.expires_at, now)

    def revoke(self, owner: str) -> None:
        """All of an owner, for good."""
        for token in self._tokens.values():
            token.revoked = token.revoked or token.owner == owner


def bearer(request: HttpRequest) -> str | None:
    """The access token of a request; None: it shows none."""
    scheme, _, token = (request.header("authorization") or "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def read_form(request: HttpRequest) -> dict[str, str]:
    """The fields of a form. Raises ValueError that says what is wrong."""
    if (request.header("content-type") or "").partition(";")[0].strip().lower() != FORM:
        raise ValueError(f"Content-Type must be {FORM}")
    if request.body_bytes > len(request.body):
        raise ValueError("the form is too large")
    fields = parse_qsl(request.body.decode("utf-8"), keep_blank_values=True, strict_parsing=True, max_num_fields=_FIELDS_MAX)
    if len(dict(fields)) != len(fields):
        raise ValueError("a field is given twice")
    return dict(fields)


def without_secrets(request: HttpRequest) -> bytes:
    """The body of a token request with its secrets replaced by their SHA-256; nothing of one that cannot be read."""
    try:
        fields = read_form(request)
    except ValueError:
        return b""
    return urlencode({name: fingerprint(value) if name in _SECRET_FIELDS else value for name, value in fields.items()}).encode()


def granted(access_token: str, lifetime: timedelta) -> bytes:
    """The body that hands an access token out, RFC 6749, section 5.1."""
    return to_json({"access_token": access_token, "expires_in": int(lifetime.total_seconds()), "token_type": "Bearer"})


def to_json(content: Mapping[str, object]) -> bytes:
    """A JSON body."""
    return json.dumps(content, ensure_ascii=False).encode()


def json_headers(now: datetime) -> list[tuple[str, str]]:
    """The headers of every answer of FCM, HMS and their token endpoints: `date` tells the simulator's clock."""
    return [("content-type", "application/json; charset=UTF-8"), ("date", format_datetime(now, usegmt=True))]
