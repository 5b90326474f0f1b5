"""Suites: how a content key is wrapped for a device. One object a suite; whoever adds a suite adds an object to `SUITES`.

    suite 1   X25519
              public 32, private 32; wrapped 112 = libsodium's SealedBox(public, payload)

    suite 2   ML-KEM-768 with X25519: holds as long as either does
              public 1216 = ML-KEM-768 1184 | X25519 32
              private 32 = seed; SHAKE-256(seed) gives 96 bytes: ML-KEM seed d | z 64, X25519 secret 32
              wrapped 1200 = HPKE base mode, one message: enc 1120 | ciphertext 80,
                             info = "SPE1-stanza", no additional data
              HPKE: KEM 0x647a (MLKEM768-X25519), KDF 0x0001 (HKDF-SHA256), AEAD 0x0003 (ChaCha20-Poly1305)

`payload` is 64 bytes in every suite. RFC 9180 defines HPKE; the KEM is not in it: the Internet-Drafts draft-ietf-hpke-pq and
draft-irtf-cfrg-concrete-hybrid-kems define it, so it is the id 0x647a that counts here, whatever becomes of the drafts' names.
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Final

import nacl.utils
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from nacl import bindings
from nacl.exceptions import CryptoError

from sealpush.errors import EnvelopeRefused, KeyRefused

SUITE_X25519: Final = 1
SUITE_HYBRID: Final = 2

PREKEY_PUBLIC_BYTES_MAX: Final = 2048  # of a suite that is not known here; the largest known has 1216
WRAPPED_BYTES_MAX: Final = 2048  # as above; the largest known has 1200
PAYLOAD_BYTES: Final = 64

INFO_STANZA: Final = b"SPE1-stanza"

Random = Callable[[int], bytes]

_X25519_BYTES: Final = 32
_MLKEM_PUBLIC_BYTES: Final = 1184
_MLKEM_CIPHERTEXT_BYTES: Final = 1088
_MLKEM_SEED_BYTES: Final = 64
_TAG_BYTES: Final = 16

# The points of X25519 whose multiples are few (u-coordinates, little-endian, top bit cleared): a shared secret with one
# of them is known to everybody. From "May the Fourth Be With You" (Bernstein et al.), as in libsodium. Each is also
# refused when sealing; the table lets a key be refused when it is uploaded, at no cost.
_LOW_ORDER: Final = frozenset(
    bytes.fromhex(point)
    for point in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


class Suite(ABC):
    """One way of wrapping. Lengths are in bytes, and exact."""

    suite_id: ClassVar[int]
    public_bytes: ClassVar[int]
    wrapped_bytes: ClassVar[int]

    @abstractmethod
    def key_pair(self, random: Random) -> tuple[bytes, bytes]:
        """A fresh private key and its public key, from 32 bytes of `random`."""

    @abstractmethod
    def check_public(self, public_key: bytes) -> None:
        """Return only for a public key that can be wrapped to. Raises KeyRefused."""

    @abstractmethod
    def wrap(self, payload: bytes, public_key: bytes, random: Random) -> bytes:
        """The payload wrapped for the holder of the private key. Raises KeyRefused for a public key that is none.

        `random` is for test vectors, where the suite can make use of it; nobody else passes another than the system's.
        """

    @abstractmethod
    def unwrap(self, wrapped: bytes, public_key: bytes, private_key: bytes) -> bytes:
        """The payload. Raises EnvelopeRefused for whatever does not unwrap."""


class _X25519(Suite):
    suite_id = SUITE_X25519
    public_bytes = _X25519_BYTES
    wrapped_bytes = PAYLOAD_BYTES + bindings.crypto_box_SEALBYTES

    def key_pair(self, random: Random) -> tuple[bytes, bytes]:
        private_key = random(_X25519_BYTES)
        return private_key, bindings.crypto_scalarmult_base(private_key)

    def check_public(self, public_key: bytes) -> None:
        if len(public_key) != self.public_bytes or _is_low_order(public_key):
            raise _not_usable("X25519")

    def wrap(self, payload: bytes, public_key: bytes, random: Random) -> bytes:
        if len(public_key) != self.public_bytes:
            raise _not_usable("X25519")
        try:
            if random is nacl.utils.random:
                return bindings.crypto_box_seal(payload, public_key)
            return _sealed_box_from(random(_X25519_BYTES), payload, public_key)
        except CryptoError:
            # libsodium refuses points of low order, whose shared secret anybody could compute.
            raise _not_usable("X25519") from None

    def unwrap(self, wrapped: bytes, public_key: bytes, private_key: bytes) -> bytes:
        try:
            return bindings.crypto_box_seal_open(wrapped, public_key, private_key)
        except CryptoError:
            raise EnvelopeRefused from None


class _Hybrid(Suite):
    """ML-KEM-768 with X25519, by HPKE. What it encapsulates with cannot be given: `random` does not reach it."""

    suite_id = SUITE_HYBRID
    public_bytes = _MLKEM_PUBLIC_BYTES + _X25519_BYTES
    wrapped_bytes = _MLKEM_CIPHERTEXT_BYTES + _X25519_BYTES + PAYLOAD_BYTES + _TAG_BYTES
    _hpke: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)

    def key_pair(self, random: Random) -> tuple[bytes, bytes]:
        seed = random(32)
        of_mlkem, of_x25519 = _expanded(seed)
        return seed, of_mlkem.public_key().public_bytes_raw() + of_x25519.public_key().public_bytes_raw()

    def check_public(self, public_key: bytes) -> None:
        _loaded(public_key)
        if _is_low_order(public_key[_MLKEM_PUBLIC_BYTES:]):
            raise _not_usable("hybrid")

    def wrap(self, payload: bytes, public_key: bytes, random: Random) -> bytes:
        try:
            return self._hpke.encrypt(payload, _loaded(public_key), info=INFO_STANZA)
        except ValueError:
            # A shared secret of zero: the X25519 half has low order.
            raise _not_usable("hybrid") from None

    def unwrap(self, wrapped: bytes, public_key: bytes, private_key: bytes) -> bytes:
        try:
            return self._hpke.decrypt(wrapped, hpke.MLKEM768X25519PrivateKey(*_expanded(private_key)), info=INFO_STANZA)
        except InvalidTag:
            raise EnvelopeRefused from None


# Every suite that this release can make, wrap to and open, by its id.
SUITES: Final[Mapping[int, Suite]] = {each.suite_id: each for each in (_X25519(), _Hybrid())}


# Loading takes a fifth of wrapping: a sender loads the keys of one envelope's devices to check them, then to wrap.
@functools.lru_cache(maxsize=64)
def _loaded(public_key: bytes) -> hpke.MLKEM768X25519PublicKey:
    """Raises KeyRefused for a wrong length and for ML-KEM coefficients that are not below the modulus (FIPS 203, 7.2)."""
    try:
        return hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_BYTES]),
            x25519.X25519PublicKey.from_public_bytes(public_key[_MLKEM_PUBLIC_BYTES:]),
        )
    except ValueError:
        raise _not_usable("hybrid") from None


def _not_usable(which: str) -> KeyRefused:
    return KeyRefused(f"the prekey is not a usable {which} key; the device must make a new one")


def _is_low_order(public_key: bytes) -> bool:
    """Whether an X25519 public key of 32 bytes is one of the few that make every shared secret known."""
    return public_key[:31] + bytes((public_key[31] & 0x7F,)) in _LOW_ORDER


def _expanded(seed: bytes) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    """The two private keys in a seed."""
    expanded = hashlib.shake_256(seed).digest(_MLKEM_SEED_BYTES + _X25519_BYTES)
    return (
        mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED_BYTES]),
        x25519.X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED_BYTES:]),
    )


def _sealed_box_from(ephemeral_private_key: bytes, payload: bytes, public_key: bytes) -> bytes:
    """A SealedBox whose ephemeral key is given instead of drawn, byte for byte as libsodium composes it.

    Source: libsodium's manual, "Sealed boxes": ephemeral_pk | box(m, nonce = BLAKE2b-24(ephemeral_pk | recipient_pk)).
    """
    ephemeral_public_key = bindings.crypto_scalarmult_base(ephemeral_private_key)
    nonce = hashlib.blake2b(ephemeral_public_key + public_key, digest_size=24).digest()
    return ephemeral_public_key + bindings.crypto_box_easy(payload, nonce, public_key, ephemeral_private_key)
