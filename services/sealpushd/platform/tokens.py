"""Short-lived signed tokens: of senders, of devices, and between services. Everybody verifies them offline.

A token is a JWT signed with Ed25519 (RFC 8037) by the service that vouches for it. Which service may vouch for what stands in
`ISSUERS`; the services' public keys come from the trust file.
"""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sealpush.ids import DeviceId, SenderId, SubscriberId
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


class ServiceKey:
    """The Ed25519 key a service signs its tokens with. Never prints itself."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        self.name = name
        self._private_key = private_key
        self._hash_key: bytes | None = None
        self._mesh_token = ""
        self._mesh_token_renew_at = 0.0

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
        now = int(time.time())
        payload = {"iss": self.name, "aud": audience, "sub": subject, "iat": now, "exp": now + lifetime_s, **claims}
        return jwt.encode(payload, self._private_key, algorithm="EdDSA"), now + lifetime_s

    def mesh_token(self) -> str:
        """This service's token towards the others, renewed at half its life."""
        now = time.monotonic()
        if now >= self._mesh_token_renew_at:
            self._mesh_token, _ = self.sign("mesh", self.name, MESH_TOKEN_LIFETIME_S, {})
            self._mesh_token_renew_at = now + MESH_TOKEN_LIFETIME_S / 2
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


class TokenVerifier:
    """Verifies tokens against the trust file: `{"accounts": ["<hex public key>", …], …}`, several keys while one is rotated."""

    def __init__(self, trusted: dict[str, list[bytes]]) -> None:
        self._keys = {name: [Ed25519PublicKey.from_public_bytes(key) for key in keys] for name, keys in trusted.items()}
        self._cache: OrderedDict[str, tuple[Caller, float]] = OrderedDict()

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
        cached = self._cache.get(token)
        if cached is not None:
            if time.time() < cached[1]:
                return cached
            del self._cache[token]
        verified = self._cache[token] = self._verify(token)
        if len(self._cache) > CACHE_TOKENS_MAX:
            self._cache.popitem(last=False)
        return verified

    def _verify(self, token: str) -> tuple[Caller, float]:
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
                    leeway=LEEWAY_S,
                    options={"require": ["exp", "iat", "sub", "aud", "iss"]},
                )
                return _to_caller(audience, claims), float(claims["exp"]) + LEEWAY_S
            except jwt.InvalidSignatureError:
                continue
            except jwt.ExpiredSignatureError as e:
                raise Unauthenticated("the access token has expired; sign in again") from e
            except (jwt.PyJWTError, KeyError, ValueError, TypeError) as e:
                raise Unauthenticated("the access token is not valid; sign in again") from e
        raise Unauthenticated("the access token is not signed by a key this installation trusts; sign in again")


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
