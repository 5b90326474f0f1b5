"""Short-lived signed tokens: of senders, of devices, and between services. Everybody verifies them offline.

A token is a JWT signed with Ed25519 (RFC 8037) by the service that vouches for it. Which service may vouch for what stands in
`ISSUERS`; the services' public keys come from the trust file.
"""

from __future__ import annotations

import base64
import hmac
import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpushd.platform.clock import Clock, Reading, SystemClock
from sealpushd.platform.errors import Unauthenticated

SENDER_TOKEN_LIFETIME_S: Final = 2 * 3600
DEVICE_TOKEN_LIFETIME_S: Final = 15 * 60
MESH_TOKEN_LIFETIME_S: Final = 10 * 60
# Clocks of two machines may differ by this much.
LEEWAY_S: Final = 30
# Verified tokens kept, so that a call costs a dictionary look-up and not a signature check.
CACHE_TOKENS_MAX: Final = 50_000


@dataclass(frozen=True, slots=True)
class SenderCaller:
    """A sender that signed in."""

    sender_id: SenderId
    organisation_id: bytes
    app_ids: tuple[str, ...]
    scopes: frozenset[str]
    networks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceCaller:
    """A device that proved its identity key."""

    device_id: DeviceId
    subscriber_id: SubscriberId
    app_id: str
    identity_public_key: bytes


@dataclass(frozen=True, slots=True)
class ServiceCaller:
    """Another service of the mesh, or the operator."""

    name: str


Caller = SenderCaller | DeviceCaller | ServiceCaller

# Audience → the service that may issue such tokens. Mesh tokens are issued by each service for itself.
ISSUERS: Final = {"sender": "accounts", "device": "registration"}
LIFETIMES_S: Final = {"sender": SENDER_TOKEN_LIFETIME_S, "device": DEVICE_TOKEN_LIFETIME_S, "mesh": MESH_TOKEN_LIFETIME_S}


class ServiceKey:
    """The Ed25519 key a service signs its tokens with. Never prints itself."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey, clock: Clock | None = None) -> None:
        self.name = name
        self._private_key = private_key
        self._clock = clock or SystemClock()
        self._hash_key: bytes | None = None
        self._mesh_token = ""
        self._mesh_token_made: Reading | None = None

    def __repr__(self) -> str:
        return f"ServiceKey({self.name}, …)"

    @classmethod
    def load(cls, name: str, path: Path) -> ServiceKey:
        """The key in a file of 32 bytes as hex; raises ValueError that names the file."""
        try:
            return cls(name, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip())))
        except (OSError, ValueError, UnsupportedAlgorithm) as e:
            raise ValueError(f"{path} holds no service key (64 hex digits): {e}") from e

    @property
    def public_key(self) -> bytes:
        return self._private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def keyed_hash(self, value: bytes, context: str) -> bytes:
        """32 bytes that only processes with this key can make of the value: whoever has the database alone has nothing to guess by."""
        if self._hash_key is None:
            self._hash_key = hmac.digest(self._private_key.private_bytes_raw(), b"sealpush keyed hash", "sha256")
        return hmac.digest(self._hash_key, len(context).to_bytes(1, "big") + context.encode() + value, "sha256")

    def sign(self, audience: str, subject: str, lifetime_s: int, claims: dict[str, Any]) -> tuple[str, int]:
        """A token and the epoch second it ends at."""
        now = int(self._clock.epoch_s())
        payload = {"iss": self.name, "aud": audience, "sub": subject, "iat": now, "exp": now + lifetime_s, **claims}
        return jwt.encode(payload, self._private_key, algorithm="EdDSA"), now + lifetime_s

    def mesh_token(self) -> str:
        """This service's token towards the others, renewed at half its life, and when the clock was set: nobody takes one of the future."""
        made = self._mesh_token_made
        if made is None or self._clock.monotonic() - made.steady >= MESH_TOKEN_LIFETIME_S / 2 or made.was_set(self._clock):
            self._mesh_token_made = Reading.of(self._clock)
            self._mesh_token, _ = self.sign("mesh", self.name, MESH_TOKEN_LIFETIME_S, {})
        return self._mesh_token

    def sender_token(self, caller: SenderCaller) -> tuple[str, int]:
        return self.sign(
            "sender",
            caller.sender_id.hex(),
            SENDER_TOKEN_LIFETIME_S,
            {
                "org": caller.organisation_id.hex(),
                "apps": list(caller.app_ids),
                "scopes": sorted(caller.scopes),
                "networks": list(caller.networks),
            },
        )

    def device_token(self, caller: DeviceCaller) -> tuple[str, int]:
        return self.sign(
            "device",
            caller.device_id.hex(),
            DEVICE_TOKEN_LIFETIME_S,
            {
                "subscriber": caller.subscriber_id.hex(),
                "app": caller.app_id,
                "key": base64.urlsafe_b64encode(caller.identity_public_key).decode(),
            },
        )


@dataclass(frozen=True, slots=True)
class _Verified:
    """What a token says. It is taken between these epoch seconds and at no other time, however the clock comes to them."""

    caller: Caller
    begins_at: float
    ends_at: float


class TokenVerifier:
    """Verifies tokens against the trust file: `{"accounts": ["<hex public key>", …], …}`, several keys while one is rotated."""

    def __init__(self, trusted: dict[str, list[bytes]], clock: Clock | None = None) -> None:
        self._keys = {name: [Ed25519PublicKey.from_public_bytes(key) for key in keys] for name, keys in trusted.items()}
        self._clock = clock or SystemClock()
        self._cache: OrderedDict[str, _Verified] = OrderedDict()

    @classmethod
    def load(cls, path: Path) -> TokenVerifier:
        """Raises ValueError that names the file when it is not a trust file."""
        try:
            document = json.loads(path.read_text())
            return cls({name: [bytes.fromhex(key) for key in keys] for name, keys in document.items()})
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise ValueError(f"{path} is no trust file (JSON: service name to list of hex public keys): {e}") from e

    def verify(self, token: str) -> Caller:
        """Who the token speaks for; raises Unauthenticated for anything that is not a valid, current token."""
        return self.verify_until(token)[0]

    def verify_until(self, token: str) -> tuple[Caller, float]:
        """As `verify`, and the epoch second from which the token is no longer taken."""
        verified = self._cache.get(token)
        # One that is known gets the same answer as one that is looked at now, also when the clock was set since.
        if verified is None or not verified.begins_at <= self._clock.epoch_s() < verified.ends_at:
            self._cache.pop(token, None)
            verified = self._cache[token] = self._verify(token)
            if len(self._cache) > CACHE_TOKENS_MAX:
                self._cache.popitem(last=False)
        return verified.caller, verified.ends_at

    def _verify(self, token: str) -> _Verified:
        try:
            claimed = jwt.decode(token, options={"verify_signature": False})
            issuer, audience = str(claimed.get("iss")), str(claimed.get("aud"))
        except jwt.PyJWTError as e:
            raise Unauthenticated("the access token is malformed; sign in again") from e
        if ISSUERS.get(audience, issuer if audience == "mesh" else None) != issuer:
            raise Unauthenticated("the access token comes from an issuer that may not vouch for it; sign in again")
        for key in self._keys.get(issuer, ()):
            try:
                claims = jwt.decode(
                    token,
                    key,
                    algorithms=["EdDSA"],
                    audience=audience,
                    issuer=issuer,
                    # Its times are looked at below, by the clock that is handed in.
                    options={"require": ["exp", "iat", "sub", "aud", "iss"], "verify_exp": False, "verify_iat": False},
                )
                begins_at, ends_at = _lifetime(audience, claims, self._clock.epoch_s())
                return _Verified(_to_caller(audience, claims), begins_at, ends_at)
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, KeyError, ValueError, TypeError) as e:
                raise Unauthenticated("the access token is not valid; sign in again") from e
        raise Unauthenticated("the access token is not signed by a key this installation trusts; sign in again")


def _lifetime(audience: str, claims: dict[str, Any], now: float) -> tuple[float, float]:
    """The epoch seconds from which the token is taken, and no longer taken. Raises Unauthenticated where it is not taken now, ValueError
    for no time.

    A token of the future is refused, and one that lasts longer than any that is made ends like them: what a wrong clock signs, or
    anybody with a key, is bounded by the right one.
    """
    made_at, ends_at = float(claims["iat"]), float(claims["exp"])
    if not (math.isfinite(made_at) and math.isfinite(ends_at)):
        raise ValueError("iat and exp are no times")
    begins_at = made_at - LEEWAY_S
    if now < begins_at:
        raise Unauthenticated("the access token was made in the future: the clock of its issuer or of this service is wrong; sign in again")
    ends_at = min(ends_at, made_at + LIFETIMES_S[audience]) + LEEWAY_S
    if ends_at <= now:
        raise Unauthenticated("the access token has expired; sign in again")
    return begins_at, ends_at


def _to_caller(audience: str, claims: dict[str, Any]) -> Caller:
    if audience == "sender":
        return SenderCaller(
            sender_id=SenderId(bytes.fromhex(claims["sub"])),
            organisation_id=bytes.fromhex(claims["org"]),
            app_ids=tuple(claims["apps"]),
            scopes=frozenset(claims["scopes"]),
            networks=tuple(claims["networks"]),
        )
    if audience == "device":
        return DeviceCaller(
            device_id=DeviceId(bytes.fromhex(claims["sub"])),
            subscriber_id=SubscriberId(bytes.fromhex(claims["subscriber"])),
            app_id=str(claims["app"]),
            identity_public_key=base64.urlsafe_b64decode(claims["key"]),
        )
    if claims["sub"] != claims["iss"]:
        raise ValueError("a mesh token speaks for its issuer only")
    return ServiceCaller(str(claims["sub"]))
