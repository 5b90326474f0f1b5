"""Encryption at rest of what a thief of the database must not read: phone numbers, push tokens, keys.

A value is encrypted with a data key of its service (XChaCha20-Poly1305, bound to a context such as the column's name). Data keys lie
in the service's schema, wrapped by a key that lives outside PostgreSQL (a file, or a KMS behind the same port). Values that are looked
up are found by a keyed hash, whose key is wrapped the same way, so that changing the outside key changes no hash.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final, Protocol

import nacl.exceptions
from nacl import bindings
from nacl.utils import random

from sealpushd.platform.db import Database

_NONCE: Final = bindings.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
_KEY_BYTES: Final = 32
_VERSION: Final = b"\x01"
READ_KEY: Final = "SELECT wrapped FROM vault_keys WHERE name = $1"
ADD_KEY: Final = "INSERT INTO vault_keys (name, wrapped) VALUES ($1, $2) ON CONFLICT DO NOTHING"
DATA_KEY: Final = "data"
LOOKUP_KEY: Final = "lookup"


class VaultError(Exception):
    """A stored secret cannot be opened: wrong outside key, or changed bytes. Holds no detail of the value."""


class KeyWrapper(Protocol):
    """The key outside PostgreSQL. A KMS implements the same two calls."""

    async def wrap(self, key: bytes, context: bytes) -> bytes: ...

    async def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Raises VaultError."""
        ...


def _seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    nonce = random(_NONCE)
    return _VERSION + nonce + bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plain, context, nonce, key)


def _open(key: bytes, stored: bytes, context: bytes) -> bytes:
    try:
        if stored[:1] != _VERSION:
            raise VaultError("a stored secret has an unknown version; was it written by a newer Sealpush?")
        nonce, sealed = stored[1 : 1 + _NONCE], stored[1 + _NONCE :]
        return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, context, nonce, key)
    except (nacl.exceptions.CryptoError, ValueError, TypeError) as e:
        raise VaultError("a stored secret cannot be opened: is the vault key file the one it was written with?") from e


class FileKeyWrapper:
    """An outside key of 32 bytes in a file, as hex."""

    def __init__(self, path: Path) -> None:
        try:
            self._key = bytes.fromhex(path.read_text().strip())
        except (OSError, ValueError) as e:
            raise VaultError(f"{path} holds no vault key (64 hex digits): {e}") from e
        if len(self._key) != _KEY_BYTES:
            raise VaultError(f"{path} holds no vault key (64 hex digits)")

    async def wrap(self, key: bytes, context: bytes) -> bytes:
        return _seal(self._key, key, context)

    async def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return _open(self._key, wrapped, context)


class Vault:
    """Encrypts, decrypts and hashes for one service. Synchronous and fast: the keys are in memory once opened."""

    def __init__(self, data_key: bytes, lookup_key: bytes) -> None:
        self._data_key = data_key
        self._lookup_key = lookup_key

    def __repr__(self) -> str:
        return "Vault(…)"

    @classmethod
    async def open(cls, db: Database, service: str, wrapper: KeyWrapper) -> Vault:
        """The vault of a service, whose keys are made at the first opening. Needs a table `vault_keys(name, wrapped)`.

        Safe to run in several processes at once: the first row wins and all read it. Raises VaultError, StoreUnavailable.
        """
        keys = {}
        for name in (DATA_KEY, LOOKUP_KEY):
            context = f"sealpush vault {service} {name}".encode()
            row = await db.fetch_one("vault", READ_KEY, name)
            if row is None:
                made = await wrapper.wrap(random(_KEY_BYTES), context)
                await db.execute("vault", ADD_KEY, name, made)
                row = await db.fetch_one("vault", READ_KEY, name)
            if row is None:
                raise VaultError("the vault's keys vanished while it was opened; try again")
            keys[name] = await wrapper.unwrap(row["wrapped"], context)
        return cls(keys[DATA_KEY], keys[LOOKUP_KEY])

    def encrypt(self, plain: bytes, context: str) -> bytes:
        """Bytes to store; only `decrypt` with the same context opens them."""
        return _seal(self._data_key, plain, context.encode())

    def decrypt(self, stored: bytes, context: str) -> bytes:
        """Raises VaultError."""
        return _open(self._data_key, stored, context.encode())

    def lookup(self, value: bytes, context: str) -> bytes:
        """Keyed hash of 32 bytes to find a value by; differs by context."""
        label = context.encode()
        return hmac.digest(self._lookup_key, len(label).to_bytes(2, "big") + label + value, hashlib.sha256)
