"""Keys and their certificates: device identities, prekeys, content-signing keys, sender entries.

Types are frozen, and the ones that hold a secret print only their public half.

A prekey is signed by the identity of its device (Ed25519) over

    "SPE1-prekey" | device_id16 | min_suite1 | suite1 | prekey_id4 | kind1 | created_ms8 | expires_ms8
                  | len2 | public_key

`min_suite` is the lowest suite the device accepts. It is a property of the device, covered by each prekey's signature,
so nobody can lower it on the way without breaking every key. A device that raises it replaces its prekeys.

A sender entry is signed by the platform's root (Ed25519 over "SPC1-entry" | body) and travels as `body | signature64`:

    body: magic4 "SPCE" | version1 = 1 | role1 | modes1 | sender_id16 | serial8 | not_before_ms8 | not_after_ms8
          | name_len1 | display_name (UTF-8) | key_count1 × ( public_key32 | not_before_ms8 | not_after_ms8 )

role: 1 a sender, 2 the platform's own server-sealing key. modes: bit 0 end_to_end, bit 1 server. Numbers are
big-endian, `not_after` is exclusive, and an entry has exactly one encoding: trailing bytes are refused.
"""

import enum
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

import nacl.utils
from nacl import bindings
from nacl.exceptions import CryptoError

from sealpush.errors import EntryRefused, KeyRefused, SuiteUnsupported
from sealpush.ids import DeviceId, SenderId, SenderKeyId, check_id
from sealpush.suites import PREKEY_PUBLIC_BYTES_MAX, SUITE_X25519, SUITES
from sealpush.text import shows_as_written

DAY_MS: Final = 24 * 60 * 60 * 1000
# Times are Unix milliseconds in 64 bits on the wire, but nothing later than what a UUIDv7 can name (year 10889).
TIME_MS_MAX: Final = (1 << 48) - 1

MESSAGE_LIFETIME_MS_MAX: Final = 28 * DAY_MS
SIGNED_PREKEY_ROTATION_MS: Final = 7 * DAY_MS
# A phone may be switched off for this long and still be sealed to.
PREKEY_LIFETIME_MS_MAX: Final = 90 * DAY_MS
# A sender may hold a prekey for a week before using it, and the message then lives at most 28 days.
PREKEY_RETENTION_MS: Final = MESSAGE_LIFETIME_MS_MAX + 7 * DAY_MS
ONE_TIME_PREKEYS_BATCH: Final = 100
ONE_TIME_PREKEYS_REFILL_BELOW: Final = 20

ENTRY_KEYS_MAX: Final = 16  # a rotation overlaps two or three
ENTRY_NAME_BYTES_MAX: Final = 128  # what a phone can show in a notification title
ENTRY_BYTES_MAX: Final = 4 + 3 + 16 + 24 + 1 + ENTRY_NAME_BYTES_MAX + 1 + ENTRY_KEYS_MAX * 48 + 64

TAG_PREKEY: Final = b"SPE1-prekey"
TAG_ENTRY: Final = b"SPC1-entry"

_U8_MAX: Final = (1 << 8) - 1
_U32_MAX: Final = (1 << 32) - 1
_U64_MAX: Final = (1 << 64) - 1
SIGNATURE_BYTES: Final = 64


class PrekeyKind(enum.IntEnum):
    """A signed prekey serves many messages for a week; a one-time prekey serves one and is then destroyed."""

    SIGNED = 1
    ONE_TIME = 2


class EntryRole(enum.IntEnum):
    """Whose keys a sender entry certifies."""

    SENDER = 1
    PLATFORM = 2


class SenderMode(enum.IntFlag):
    """How a sender's content may be sealed: by the sender itself, by the server, or either."""

    END_TO_END = 1
    SERVER = 2


def verify_ed25519(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) over `message` was made by the holder of `public_key` (32 bytes).

    Malformed input is False as well: the lengths are checked here because the binding does not.
    """
    if len(public_key) != 32 or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        bindings.crypto_sign_open(signature + message, public_key)
    except CryptoError:
        return False
    return True


def is_usable_ed25519(public_key: bytes) -> bool:
    """Whether the bytes are a public key that somebody can hold, and that every library reads alike.

    Canonical, a point of the curve, and of the group of prime order: for a key of low order anybody can sign where the check is lax,
    and one with a part of low order verifies in some libraries and not in others. As slow as verifying a signature: for keys taken
    in, not for each use.
    """
    return len(public_key) == 32 and bindings.crypto_core_ed25519_is_valid_point(public_key)


def content_key_id(public_key: bytes) -> SenderKeyId:
    """The 8-byte name of a content-signing key that a header carries: the start of SHA-256("SPK-id" | public key)."""
    return SenderKeyId(hashlib.sha256(b"SPK-id" + public_key).digest()[:8])


@dataclass(frozen=True, slots=True)
class _SigningKey:
    """An Ed25519 key pair. Two are equal when their public halves are."""

    public_key: bytes
    _secret: bytes = field(repr=False, compare=False)  # seed | public key, as libsodium wants it

    @classmethod
    def generate(cls) -> Self:
        """A fresh key from the system's randomness."""
        return cls.from_seed(nacl.utils.random(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The key that belongs to a 32-byte seed, always the same one."""
        if len(seed) != 32:
            raise ValueError("an Ed25519 seed is 32 bytes")
        public_key, secret = bindings.crypto_sign_seed_keypair(seed)
        return cls(public_key, secret)

    @property
    def seed(self) -> bytes:
        """The secret: for a keystore only."""
        return self._secret[:32]

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of a message. Deterministic: the same message gives the same bytes."""
        return bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(public_key={self.public_key.hex()[:16]}…)"


@dataclass(frozen=True, slots=True, repr=False)
class IdentityKey(_SigningKey):
    """What a device is: it signs prekeys, challenges, acknowledgements and changes, and decrypts nothing."""


@dataclass(frozen=True, slots=True, repr=False)
class RootKey(_SigningKey):
    """The platform's root, kept offline: it signs sender entries, and apps pin its public half."""


def sign_body(root: RootKey, tag: bytes, body: bytes) -> bytes:
    """`body | signature64`, as what a root signs travels. The tag says what it is, and is signed with it."""
    return body + root.sign(tag + body)


def signed_body(root_public_key: bytes, tag: bytes, blob: bytes) -> bytes | None:
    """The body of `body | signature64`, if this root signed it as what the tag says; else None."""
    body, signature = blob[:-SIGNATURE_BYTES], blob[-SIGNATURE_BYTES:]
    return body if verify_ed25519(root_public_key, tag + body, signature) else None


@dataclass(frozen=True, slots=True, repr=False)
class ContentSigningKey(_SigningKey):
    """What a sender, or the platform when it seals for one, signs content with."""

    key_id: SenderKeyId = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_id", content_key_id(self.public_key))


@dataclass(frozen=True, slots=True)
class PrekeyPrivate:
    """The half of a prekey that never leaves the device. `(suite, prekey_id, kind)` names it; `private_key` is as its suite keeps it."""

    suite: int
    prekey_id: int
    kind: PrekeyKind
    public_key: bytes
    private_key: bytes = field(repr=False, compare=False)
    created_at_ms: int
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class SignedPrekey:
    """The half of a prekey that senders seal to, with the signature of its device.

    `prekey_id` is unsigned 32 bits and never used twice by a device. A sender may seal from `created_at_ms` on and
    before `expires_at_ms` (Unix milliseconds).
    """

    suite: int
    prekey_id: int
    kind: PrekeyKind
    public_key: bytes
    created_at_ms: int
    expires_at_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class RecipientDevice:
    """What a sender gets about one device. Trust nothing in it before `choose_prekey()`."""

    device_id: DeviceId
    identity_public_key: bytes
    signed_prekey: SignedPrekey
    one_time_prekey: SignedPrekey | None = None
    min_suite: int = SUITE_X25519


def prekey_proof(prekey: SignedPrekey, device_id: DeviceId, min_suite: int = SUITE_X25519) -> bytes:
    """The bytes that the identity of a device signs for one prekey. Raises ValueError for a field out of bounds."""
    if not 1 <= prekey.suite <= _U8_MAX or not 1 <= min_suite <= _U8_MAX:
        raise ValueError("suite and min_suite must be 1 to 255")
    if not 0 <= prekey.prekey_id <= _U32_MAX:
        raise ValueError("prekey_id must fit 32 bits")
    if not 0 <= prekey.created_at_ms < prekey.expires_at_ms <= TIME_MS_MAX:
        raise ValueError("a prekey must expire after it is created")
    if not 1 <= len(prekey.public_key) <= PREKEY_PUBLIC_BYTES_MAX:
        raise ValueError(f"a prekey's public key must be 1 to {PREKEY_PUBLIC_BYTES_MAX} bytes")
    fixed = struct.pack(
        ">16sBBIBQQH",
        check_id(device_id, "device_id"),
        min_suite,
        prekey.suite,
        prekey.prekey_id,
        PrekeyKind(prekey.kind),
        prekey.created_at_ms,
        prekey.expires_at_ms,
        len(prekey.public_key),
    )
    return TAG_PREKEY + fixed + prekey.public_key


def generate_prekey(
    identity: IdentityKey,
    device_id: DeviceId,
    *,
    prekey_id: int,
    kind: PrekeyKind,
    now_ms: int,
    lifetime_ms: int = PREKEY_LIFETIME_MS_MAX,
    suite: int = SUITE_X25519,
    min_suite: int = SUITE_X25519,
    random: Callable[[int], bytes] = nacl.utils.random,
) -> tuple[PrekeyPrivate, SignedPrekey]:
    """A fresh prekey: the private half for the keystore, the signed half for upload.

    Store the private half before uploading. `random(32)` gives it. Raises SuiteUnsupported for a suite that this release does not
    know, ValueError for one below `min_suite`.
    """
    if suite not in SUITES:
        raise SuiteUnsupported(f"prekeys of suite {suite} cannot be made by this release; use one of {sorted(SUITES)}")
    if suite < min_suite:
        raise ValueError(f"a prekey of suite {suite} is below the device's lowest suite {min_suite}")
    private_key, public_key = SUITES[suite].key_pair(random)
    expires_at_ms = now_ms + lifetime_ms
    unsigned = SignedPrekey(suite, prekey_id, kind, public_key, now_ms, expires_at_ms, b"")
    signature = identity.sign(prekey_proof(unsigned, device_id, min_suite))
    return (
        PrekeyPrivate(suite, prekey_id, kind, public_key, private_key, now_ms, expires_at_ms),
        SignedPrekey(suite, prekey_id, kind, public_key, now_ms, expires_at_ms, signature),
    )


def verify_prekey(
    prekey: SignedPrekey,
    *,
    device_id: DeviceId,
    identity_public_key: bytes,
    now_ms: int,
    min_suite: int = SUITE_X25519,
    skew_ms: int = 5 * 60 * 1000,
) -> None:
    """Return only if this prekey may be sealed to: signed by the device, in time, well-formed, strong enough.

    The suite need not be usable here: a server checks what newer devices upload. Raises KeyRefused.
    """
    try:
        proof = prekey_proof(prekey, device_id, min_suite)
    except ValueError as error:
        raise KeyRefused(f"the prekey is malformed: {error}") from None
    if prekey.suite < min_suite:
        raise KeyRefused("the prekey is weaker than its device allows; ask for the keys of this device again")
    if prekey.suite in SUITES:
        SUITES[prekey.suite].check_public(prekey.public_key)
    if prekey.expires_at_ms - prekey.created_at_ms > PREKEY_LIFETIME_MS_MAX:
        raise KeyRefused("the prekey lives longer than 90 days; the device must make a new one")
    if prekey.created_at_ms > now_ms + skew_ms:
        raise KeyRefused("the prekey is from the future; compare the clocks")
    if prekey.expires_at_ms <= now_ms:
        raise KeyRefused("the prekey has expired; the device must upload a new one")
    if not verify_ed25519(identity_public_key, proof, prekey.signature):
        raise KeyRefused("the prekey is not signed by this device; do not seal to it")


def choose_prekey(device: RecipientDevice, now_ms: int) -> SignedPrekey:
    """The verified prekey to seal to: the one-time prekey if there is one, else the signed prekey.

    A one-time prekey that has expired counts as none; one that fails any other check refuses the device, since falling
    back would quietly give up forward secrecy. Raises KeyRefused, or SuiteUnsupported when the prekey is sound but of
    a suite that this release cannot use.
    """
    prekey = device.one_time_prekey
    if prekey is not None and prekey.kind != PrekeyKind.ONE_TIME:
        raise KeyRefused("the one-time prekey is of another kind; ask for the keys of this device again")
    if prekey is None or prekey.expires_at_ms <= now_ms:
        prekey = device.signed_prekey
        if prekey.kind != PrekeyKind.SIGNED:
            raise KeyRefused("the signed prekey is of another kind; ask for the keys of this device again")
    verify_prekey(
        prekey,
        device_id=device.device_id,
        identity_public_key=device.identity_public_key,
        now_ms=now_ms,
        min_suite=device.min_suite,
    )
    if prekey.suite not in SUITES:
        raise SuiteUnsupported(f"the device asks for suite {prekey.suite}; upgrade this SDK to seal to it")
    return prekey


@dataclass(frozen=True, slots=True)
class EntryKey:
    """One content-signing key of an entry, good for content created in [not_before_ms, not_after_ms). Raises ValueError."""

    public_key: bytes
    not_before_ms: int
    not_after_ms: int

    def __post_init__(self) -> None:
        if not is_usable_ed25519(self.public_key):
            raise ValueError("a content-signing public key is a canonical Ed25519 key of 32 bytes, not of low order")
        _check_window(self.not_before_ms, self.not_after_ms)


@dataclass(frozen=True, slots=True)
class SenderEntry:
    """Who may speak as a sender and how: the certificate of a sender, or of the platform's own sealing key.

    `serial` rises with every new entry of a sender; a device never goes back to a lower one. A sender that seals itself
    has at least one key; one that only lets the server seal may have none. Raises ValueError for a field out of bounds.
    """

    sender_id: SenderId
    display_name: str
    modes: SenderMode
    keys: tuple[EntryKey, ...]
    not_before_ms: int
    not_after_ms: int
    serial: int
    role: EntryRole = EntryRole.SENDER
    version: int = 1

    def __post_init__(self) -> None:
        check_id(self.sender_id, "sender_id")
        if self.version != 1:
            raise ValueError("only version 1 of a sender entry is known; upgrade this SDK for a newer one")
        if not 1 <= self.modes <= SenderMode.END_TO_END | SenderMode.SERVER:
            raise ValueError("modes must be end_to_end, server or both")
        if self.role == EntryRole.PLATFORM and self.modes != SenderMode.SERVER:
            raise ValueError("the platform's entry has the mode server and no other")
        if not 0 <= self.serial <= _U64_MAX:
            raise ValueError("serial must fit 64 bits")
        _check_window(self.not_before_ms, self.not_after_ms)
        _check_name(self.display_name)
        keys_min = 1 if self.role == EntryRole.PLATFORM or SenderMode.END_TO_END in self.modes else 0
        if not keys_min <= len(self.keys) <= ENTRY_KEYS_MAX:
            raise ValueError(f"this entry must have {keys_min} to {ENTRY_KEYS_MAX} keys")
        if len({key.public_key for key in self.keys}) != len(self.keys):
            raise ValueError("a key stands twice in the entry; give it one window")

    def is_in_force(self, at_ms: int) -> bool:
        """Whether this time is within the entry's."""
        return self.not_before_ms <= at_ms < self.not_after_ms

    def public_key(self, key_id: bytes, at_ms: int) -> bytes | None:
        """The key with this id if it may sign content created at this time, else None."""
        for key in self.keys:
            if content_key_id(key.public_key) == key_id and key.not_before_ms <= at_ms < key.not_after_ms:
                return key.public_key
        return None

    def encode(self) -> bytes:
        """The one encoding of this entry, without signature."""
        name = self.display_name.encode()
        parts = [
            _ENTRY_HEAD.pack(
                _ENTRY_MAGIC,
                self.version,
                self.role,
                self.modes,
                self.sender_id,
                self.serial,
                self.not_before_ms,
                self.not_after_ms,
                len(name),
            ),
            name,
            bytes((len(self.keys),)),
        ]
        parts.extend(_ENTRY_KEY.pack(key.public_key, key.not_before_ms, key.not_after_ms) for key in self.keys)
        return b"".join(parts)

    @classmethod
    def decode_signed(cls, blob: bytes) -> Self:
        """The entry in a signed blob whose signature somebody else has checked, or that is not to be trusted. Raises ValueError."""
        return cls.decode(blob[:-SIGNATURE_BYTES])

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """The entry of an encoding; only after its signature was checked. Raises ValueError for anything inexact."""
        try:
            magic, version, role, modes, sender_id, serial, not_before_ms, not_after_ms, name_bytes = _ENTRY_HEAD.unpack_from(body)
            if magic != _ENTRY_MAGIC:
                raise ValueError("not a sender entry")
            position = _ENTRY_HEAD.size
            name = body[position : position + name_bytes].decode()
            position += name_bytes
            key_count = body[position]
            position += 1
            if len(body) != position + key_count * _ENTRY_KEY.size:
                raise ValueError("the entry is longer or shorter than it says")
        except (struct.error, IndexError):
            raise ValueError("the entry is cut short") from None
        return cls(
            sender_id=SenderId(sender_id),
            display_name=name,
            modes=SenderMode(modes),
            keys=tuple(EntryKey(*fields) for fields in _ENTRY_KEY.iter_unpack(body[position:])),
            not_before_ms=not_before_ms,
            not_after_ms=not_after_ms,
            serial=serial,
            role=EntryRole(role),
            version=version,
        )


_ENTRY_MAGIC: Final = b"SPCE"
_ENTRY_HEAD = struct.Struct(">4sBBB16sQQQB")
_ENTRY_KEY = struct.Struct(">32sQQ")


def _check_window(not_before_ms: int, not_after_ms: int) -> None:
    if not 0 <= not_before_ms < not_after_ms <= TIME_MS_MAX:
        raise ValueError("not_after_ms must be later than not_before_ms, both Unix milliseconds")


def _check_name(name: str) -> None:
    """Only what shows as written: a name with invisible or direction-changing characters could pose as another."""
    if not shows_as_written(name):
        raise ValueError("display_name must be NFC text without spaces around it and without characters that show nothing (sealpush.text)")
    if not 1 <= len(name.encode()) <= ENTRY_NAME_BYTES_MAX:
        raise ValueError(f"display_name must be 1 to {ENTRY_NAME_BYTES_MAX} bytes of UTF-8")


def sign_sender_entry(root: RootKey, entry: SenderEntry) -> bytes:
    """The entry as senders and phones carry it: its encoding and the root's signature."""
    return sign_body(root, TAG_ENTRY, entry.encode())


def verify_sender_entry(root_public_key: bytes, blob: bytes, now_ms: int, *, role: EntryRole = EntryRole.SENDER) -> SenderEntry:
    """The entry in a signed blob, if the pinned root signed it, it is in time, and it is of the role asked for.

    Raises EntryRefused. Keys inside have windows of their own: take one with `SenderEntry.public_key()`.
    """
    if not SIGNATURE_BYTES < len(blob) <= ENTRY_BYTES_MAX:
        raise EntryRefused("the sender entry has an impossible length; fetch it again")
    body = signed_body(root_public_key, TAG_ENTRY, blob)
    if body is None:
        raise EntryRefused("the sender entry is not signed by the pinned root; do not trust this server")
    try:
        entry = SenderEntry.decode(body)
    except ValueError as error:
        raise EntryRefused(f"the sender entry is malformed: {error}") from None
    if entry.role != role:
        raise EntryRefused(f"the entry certifies a {entry.role.name.lower()}, not a {role.name.lower()}")
    if not entry.is_in_force(now_ms):
        raise EntryRefused("the sender entry is outside its time; fetch the current one and compare the clocks")
    return entry
