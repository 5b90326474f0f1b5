"""What the platform's root took back before its time: sender entries and content-signing keys, in one signed list.

A list is signed by the root (Ed25519 over "SPC1-revoked" | body) and travels as `body | signature64`:

    body: magic4 "SPRL" | version1 = 1 | serial8 | issued_ms8 | count2 × item
    item: kind1 = 1 | sender_id16 | serial8    the entries of this id with this or a lower serial
        | kind1 = 2 | public_key32             this content-signing key, in whatever entry, whenever the content was made

Numbers are big-endian. A list has exactly one encoding: items rise by their bytes, no sender and no key stands twice, and
nothing follows. A list takes the place of every list with a lower serial, as a whole. It has no end: an operator that forgets
to renew it must not silence every sender. So whoever withholds a new list is bounded by the end of the entries.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Self

from sealpush.errors import RevocationsRefused
from sealpush.ids import SenderId, check_id
from sealpush.keys import SIGNATURE_BYTES, TIME_MS_MAX, RootKey, SenderEntry, sign_body, signed_body

# A phone fetches the list as a whole; entries that have ended need no revocation any more.
REVOCATIONS_MAX: Final = 4096
TAG_REVOKED: Final = b"SPC1-revoked"

_MAGIC: Final = b"SPRL"
_VERSION: Final = 1
_HEAD = struct.Struct(">4sBQQH")
_ENTRIES = struct.Struct(">B16sQ")
_KEY = struct.Struct(">B32s")
_KIND_ENTRIES: Final = 1
_KIND_KEY: Final = 2
_U64_MAX: Final = (1 << 64) - 1

REVOCATIONS_BYTES_MAX: Final = _HEAD.size + REVOCATIONS_MAX * _KEY.size + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class RevokedEntries:
    """Every entry of this sender, or of the platform, with this or a lower serial."""

    sender_id: SenderId
    serial: int

    def __post_init__(self) -> None:
        check_id(self.sender_id, "sender_id")
        if not 0 <= self.serial <= _U64_MAX:
            raise ValueError("serial must fit 64 bits")

    @property
    def subject(self) -> bytes:
        """What is revoked: stands once in a list."""
        return bytes((_KIND_ENTRIES,)) + self.sender_id

    def encode(self) -> bytes:
        """Kind, id and serial: 25 bytes."""
        return _ENTRIES.pack(_KIND_ENTRIES, self.sender_id, self.serial)


@dataclass(frozen=True, slots=True)
class RevokedKey:
    """A content-signing key, in whatever entry it stands."""

    public_key: bytes

    def __post_init__(self) -> None:
        if len(self.public_key) != 32:
            raise ValueError("a content-signing public key is 32 bytes")

    @property
    def subject(self) -> bytes:
        """What is revoked: stands once in a list."""
        return self.encode()

    def encode(self) -> bytes:
        """Kind and key: 33 bytes."""
        return _KEY.pack(_KIND_KEY, self.public_key)


Revoked = RevokedEntries | RevokedKey


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What is revoked, `items` in the order of their bytes. `serial` rises with every list of a root, from 1 on.

    Raises ValueError for a field out of bounds, and for items in another order or twice.
    """

    serial: int
    issued_ms: int
    items: tuple[Revoked, ...] = ()
    _serials: dict[SenderId, int] = field(init=False, repr=False, compare=False)
    _keys: frozenset[bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.serial <= _U64_MAX:
            raise ValueError("a list's serial must be 1 or more and fit 64 bits")
        if not 0 <= self.issued_ms <= TIME_MS_MAX:
            raise ValueError("issued_ms must be Unix milliseconds")
        if len(self.items) > REVOCATIONS_MAX:
            raise ValueError(f"a list holds at most {REVOCATIONS_MAX} revocations")
        subjects = [item.subject for item in self.items]
        if any(one >= later for one, later in pairwise(subjects)):
            raise ValueError("items must rise by their bytes, and none may stand twice")
        object.__setattr__(self, "_serials", {item.sender_id: item.serial for item in self.items if isinstance(item, RevokedEntries)})
        object.__setattr__(self, "_keys", frozenset(item.public_key for item in self.items if isinstance(item, RevokedKey)))

    def revokes_entry(self, entry: SenderEntry) -> bool:
        """Whether the entry as a whole is revoked. Its keys may be revoked one by one as well."""
        serial = self._serials.get(entry.sender_id)
        return serial is not None and entry.serial <= serial

    def revokes_key(self, public_key: bytes) -> bool:
        """Whether this content-signing key is revoked."""
        return public_key in self._keys

    def revoked_keys(self, entry: SenderEntry) -> tuple[bytes, ...]:
        """Those of the entry's keys that are revoked."""
        return tuple(key.public_key for key in entry.keys if self.revokes_key(key.public_key))

    def encode(self) -> bytes:
        """The one encoding of this list, without signature."""
        head = _HEAD.pack(_MAGIC, _VERSION, self.serial, self.issued_ms, len(self.items))
        return head + b"".join(item.encode() for item in self.items)

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """The list of an encoding; only after its signature was checked. Raises ValueError for anything inexact."""
        try:
            magic, version, serial, issued_ms, count = _HEAD.unpack_from(body)
            if magic != _MAGIC:
                raise ValueError("not a revocation list")
            if version != _VERSION:
                raise ValueError("only version 1 of a revocation list is known; upgrade this SDK for a newer one")
            items: list[Revoked] = []
            position = _HEAD.size
            for _ in range(count):
                match body[position]:
                    case 1:
                        _, sender_id, entry_serial = _ENTRIES.unpack_from(body, position)
                        items.append(RevokedEntries(SenderId(sender_id), entry_serial))
                        position += _ENTRIES.size
                    case 2:
                        _, public_key = _KEY.unpack_from(body, position)
                        items.append(RevokedKey(public_key))
                        position += _KEY.size
                    case kind:
                        raise ValueError(f"revocations of kind {kind} are unknown; upgrade this SDK")
        except (struct.error, IndexError):
            raise ValueError("the list is cut short") from None
        if position != len(body):
            raise ValueError("the list is longer than it says")
        return cls(serial, issued_ms, tuple(items))


def revoking(known: RevocationList | None, more: Iterable[Revoked], *, issued_ms: int) -> RevocationList:
    """The list that follows the known one, or a root's first, and revokes more.

    Raises ValueError for what is revoked already, and where the list is full.
    """
    kept = {item.subject: item for item in known.items} if known else {}
    for item in more:
        before = kept.get(item.subject)
        if before is not None and before.encode() >= item.encode():
            raise ValueError("the list revokes this already: there is nothing to sign")
        kept[item.subject] = item
    return RevocationList(known.serial + 1 if known else 1, issued_ms, tuple(kept[subject] for subject in sorted(kept)))


def sign_revocations(root: RootKey, revocations: RevocationList) -> bytes:
    """The list as it travels: its encoding and the root's signature."""
    return sign_body(root, TAG_REVOKED, revocations.encode())


def verify_revocations(root_public_key: bytes, blob: bytes) -> RevocationList:
    """The list in a signed blob, if this root signed it. Raises RevocationsRefused. Whether a newer one is known is the caller's."""
    if not SIGNATURE_BYTES < len(blob) <= REVOCATIONS_BYTES_MAX:
        raise RevocationsRefused("the revocation list has an impossible length; fetch it again")
    body = signed_body(root_public_key, TAG_REVOKED, blob)
    if body is None:
        raise RevocationsRefused("the revocation list is not signed by the root; do not trust who gave it")
    try:
        return RevocationList.decode(body)
    except ValueError as error:
        raise RevocationsRefused(f"the revocation list is malformed: {error}") from None
