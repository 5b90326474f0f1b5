"""Sealed envelopes: seal, take apart, put together, open. Pure functions over bytes; no I/O, no clock.

Version 1, all numbers big-endian. The bytes below are what is signed and stored; nothing is ever re-serialised.

    envelope  = head | count2 | stanza × count | tail

    head      = header94 | commit32
    header    = magic4 "SPE1" | content_suite1 | flags1 | content_id16 | sender_id16 | sender_key_id8
                | recipient_ref32 | created_ms8 | expires_ms8
    commit    = SHA-256("SPE1-commit" | CEK | header)

    stanza    = device_id16 | suite1 | prekey_id4 | kind1 | len2 | wrapped
    wrapped   = CEK32 | SHA-256(header | device_id | prekey_id4 | kind1), wrapped for the prekey as suites.py says:
                112 bytes in suite 1, 1200 in suite 2; 1 to 2048 in a suite not known here, carried and never opened

    tail      = content | signature64
    content   = len4 | nonce24 | ciphertext        len counts nonce and ciphertext
    ciphertext= XChaCha20-Poly1305(CEK, nonce, AAD = header, padded)        16 bytes longer than padded
    padded    = plaintext | 0x80 | 0x00 …          to the next power of two, at least 256, at most 65536
    signature = Ed25519(content-signing key, "SPE1-sig" | SHA-512(header | commit | SHA-512(content)))

content_suite 1 is the only one known. flags: bit 0 = sealed by the server (not end to end); other bits are refused.
Times are Unix milliseconds below 2^48; expires is later than created, by 28 days at most.
kind: 1 signed prekey, 2 one-time prekey. A device appears at most once. The signature leaves the stanzas out, because
a device is given its own stanza only; each stanza is tied to the header by the hash wrapped beside the key.

Why each part is there: the commitment makes a ciphertext open under one key only (XChaCha20-Poly1305 alone does not);
the hash in the stanza stops a stanza from being moved to another envelope, device or prekey; the header as additional
data ties identities and times to the content; the signature says who speaks.

With injected randomness (test vectors) bytes are drawn in this order: CEK 32, nonce 24, then per recipient of suite 1, in
order, 32 bytes that are the secret key of the SealedBox's ephemeral pair. A stanza of suite 2 is different each time.
"""

import enum
import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import nacl.utils
from nacl import bindings
from nacl.exceptions import CryptoError

from sealpush.errors import ContentTooLarge, EnvelopeRefused, SuiteUnsupported
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, SenderKeyId
from sealpush.keys import (
    MESSAGE_LIFETIME_MS_MAX,
    SIGNATURE_BYTES,
    TIME_MS_MAX,
    ContentSigningKey,
    EntryRole,
    PrekeyKind,
    PrekeyPrivate,
    RecipientDevice,
    SenderEntry,
    SenderMode,
    SignedPrekey,
    choose_prekey,
    content_key_id,
    verify_ed25519,
)
from sealpush.suites import SUITE_X25519, SUITES, WRAPPED_BYTES_MAX, Random

MAGIC: Final = b"SPE1"
CONTENT_SUITE: Final = 1
FLAG_SERVER_SEALED: Final = 1

TAG_COMMIT: Final = b"SPE1-commit"
TAG_SIGNATURE: Final = b"SPE1-sig"

PADDED_BYTES_MIN: Final = 256
PADDED_BYTES_MAX: Final = 64 * 1024
CONTENT_BYTES_MAX: Final = PADDED_BYTES_MAX - 1  # the padding mark takes one byte
HEADER_BYTES: Final = 94
HEAD_BYTES: Final = HEADER_BYTES + 32
# The platform takes an envelope whose creation time differs from its own clock by this much at the most.
CREATED_SKEW_MS: Final = 5 * 60 * 1000
# One subscriber's devices. Even with every stanza at its largest an envelope stays within the 2 MiB of a batch.
STANZAS_MAX: Final = 512

_HEADER = struct.Struct(">4sBB16s16s8s32sQQ")
_STANZA = struct.Struct(">16sBIBH")
_BINDING = struct.Struct(">16sIB")
_NONCE_BYTES: Final = 24
_TAG_BYTES: Final = 16
_BUCKETS: Final = frozenset(PADDED_BYTES_MIN << shift for shift in range(9))
_U32_MAX: Final = (1 << 32) - 1

STANZA_BYTES_MAX: Final = _STANZA.size + WRAPPED_BYTES_MAX
TAIL_BYTES_MIN: Final = 4 + _NONCE_BYTES + PADDED_BYTES_MIN + _TAG_BYTES + SIGNATURE_BYTES
TAIL_BYTES_MAX: Final = 4 + _NONCE_BYTES + PADDED_BYTES_MAX + _TAG_BYTES + SIGNATURE_BYTES
EVIDENCE_BYTES: Final = HEAD_BYTES + 64 + SIGNATURE_BYTES
ENVELOPE_BYTES_MAX: Final = HEAD_BYTES + 2 + STANZAS_MAX * STANZA_BYTES_MAX + TAIL_BYTES_MAX

PrekeyLookup = Callable[[int, int, PrekeyKind], PrekeyPrivate | None]


class TimeCheck(enum.Enum):
    """Whether a message may be shown now."""

    OK = "ok"
    EXPIRED = "expired"
    FROM_THE_FUTURE = "from_the_future"


@dataclass(frozen=True, slots=True)
class Header:
    """The part of an envelope that everybody may read and the sender signs. Times are Unix milliseconds.

    Raises ValueError for a field out of bounds, including a lifetime over 28 days: no device keeps keys for longer.
    """

    content_id: ContentId
    sender_id: SenderId
    sender_key_id: SenderKeyId
    recipient_ref: RecipientRef
    created_at_ms: int
    expires_at_ms: int
    flags: int = 0
    content_suite: int = CONTENT_SUITE

    def __post_init__(self) -> None:
        if self.content_suite != CONTENT_SUITE:
            raise ValueError(f"content_suite must be {CONTENT_SUITE}; upgrade this SDK for a newer one")
        if self.flags & ~FLAG_SERVER_SEALED:
            raise ValueError("flags has bits that this release does not know")
        if len(self.content_id) != 16 or len(self.sender_id) != 16:
            raise ValueError("content_id and sender_id must be 16 raw bytes; parse_uuid() turns text into bytes")
        if len(self.sender_key_id) != 8 or len(self.recipient_ref) != 32:
            raise ValueError("sender_key_id must be 8 bytes and recipient_ref 32")
        if not 0 <= self.created_at_ms < self.expires_at_ms <= TIME_MS_MAX:
            raise ValueError("expires_at_ms must be later than created_at_ms, both Unix milliseconds")
        if self.expires_at_ms - self.created_at_ms > MESSAGE_LIFETIME_MS_MAX:
            raise ValueError("a message lives at most 28 days; bring expires_at_ms closer")

    @property
    def server_sealed(self) -> bool:
        """Whether the platform sealed this content for the sender, and so saw it."""
        return self.flags & FLAG_SERVER_SEALED != 0

    def encode(self) -> bytes:
        """The 94 bytes of this header."""
        return _HEADER.pack(
            MAGIC,
            self.content_suite,
            self.flags,
            self.content_id,
            self.sender_id,
            self.sender_key_id,
            self.recipient_ref,
            self.created_at_ms,
            self.expires_at_ms,
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The header in exactly 94 bytes. Raises EnvelopeRefused."""
        try:
            magic, suite, flags, content_id, sender_id, key_id, recipient_ref, created, expires = _HEADER.unpack(data)
            if magic != MAGIC:
                raise ValueError("not an envelope")
            return cls(content_id, sender_id, key_id, recipient_ref, created, expires, flags, suite)
        except (struct.error, ValueError):
            raise EnvelopeRefused from None


@dataclass(frozen=True, slots=True)
class Recipient:
    """One device to seal to, by a prekey that was verified (`recipient()` does both)."""

    device_id: DeviceId
    prekey_id: int
    kind: PrekeyKind
    public_key: bytes
    suite: int = SUITE_X25519

    @classmethod
    def of(cls, device_id: DeviceId, prekey: SignedPrekey) -> Self:
        """The recipient of a prekey that the caller has verified."""
        return cls(device_id, prekey.prekey_id, prekey.kind, prekey.public_key, prekey.suite)


def recipient(device: RecipientDevice, now_ms: int) -> Recipient:
    """The recipient for what the key service said about a device, after checking all signatures.

    Raises KeyRefused or SuiteUnsupported.
    """
    return Recipient.of(device.device_id, choose_prekey(device, now_ms))


@dataclass(frozen=True, slots=True)
class Stanza:
    """The content key as wrapped for one device."""

    device_id: DeviceId
    suite: int
    prekey_id: int
    kind: PrekeyKind
    wrapped: bytes = field(repr=False)

    def encode(self) -> bytes:
        """The bytes of this stanza, as stored per device and put into an envelope."""
        head = _STANZA.pack(self.device_id, self.suite, self.prekey_id, self.kind, len(self.wrapped))
        return head + self.wrapped

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The stanza in exactly these bytes. Raises EnvelopeRefused."""
        stanza, end = cls._take(data, 0)
        if end != len(data):
            raise EnvelopeRefused
        return stanza

    @classmethod
    def _take(cls, data: bytes, start: int) -> tuple[Self, int]:
        """The stanza that begins at `start`, and where it ends."""
        wrapped_start = start + _STANZA.size
        if wrapped_start > len(data):
            raise EnvelopeRefused
        device_id, suite, prekey_id, kind, wrapped_bytes = _STANZA.unpack_from(data, start)
        end = wrapped_start + wrapped_bytes
        if end > len(data) or suite == 0 or kind not in _KINDS:
            raise EnvelopeRefused
        if suite in SUITES:
            if wrapped_bytes != SUITES[suite].wrapped_bytes:
                raise EnvelopeRefused
        elif not 1 <= wrapped_bytes <= WRAPPED_BYTES_MAX:
            raise EnvelopeRefused
        return cls(DeviceId(device_id), suite, prekey_id, _KINDS[kind], data[wrapped_start:end]), end


_KINDS: Final = {kind.value: kind for kind in PrekeyKind}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A sealed message in the pieces in which a server keeps it: head and tail once, one stanza per device.

    Made by `seal()` and `Envelope.parse()`, which see to it that the pieces are well-formed; that says nothing yet
    about who signed it. `header` is the decoded beginning of `head`.
    """

    header: Header
    head: bytes = field(repr=False)
    stanzas: tuple[Stanza, ...] = field(repr=False)
    tail: bytes = field(repr=False)

    def encode(self) -> bytes:
        """The whole envelope with all its stanzas."""
        parts = [self.head, len(self.stanzas).to_bytes(2, "big")]
        parts.extend(stanza.encode() for stanza in self.stanzas)
        parts.append(self.tail)
        return b"".join(parts)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The envelope in exactly these bytes, every length within its bound. Raises EnvelopeRefused.

        Work and memory are proportional to `data`, which is refused unread above `ENVELOPE_BYTES_MAX`.
        """
        if not HEAD_BYTES + 2 + TAIL_BYTES_MIN <= len(data) <= ENVELOPE_BYTES_MAX:
            raise EnvelopeRefused
        header = Header.decode(data[:HEADER_BYTES])
        count = int.from_bytes(data[HEAD_BYTES : HEAD_BYTES + 2], "big")
        if count > STANZAS_MAX:
            raise EnvelopeRefused
        position = HEAD_BYTES + 2
        stanzas = []
        devices = set()
        for _ in range(count):
            stanza, position = Stanza._take(data, position)
            stanzas.append(stanza)
            devices.add(stanza.device_id)
        if len(devices) != count:
            raise EnvelopeRefused
        tail = data[position:]
        sealed_bytes = int.from_bytes(tail[:4], "big")
        if len(tail) != 4 + sealed_bytes + SIGNATURE_BYTES or sealed_bytes - _NONCE_BYTES - _TAG_BYTES not in _BUCKETS:
            raise EnvelopeRefused
        return cls(header, data[:HEAD_BYTES], tuple(stanzas), tail)

    @property
    def digest(self) -> bytes:
        """The 32 bytes that name this envelope in what devices sign, see `envelope_digest()`."""
        return envelope_digest(evidence_of(self.head, self.tail))

    def stanza_for(self, device_id: DeviceId) -> Stanza | None:
        """The stanza of one device, or None if the envelope is not sealed to it."""
        for stanza in self.stanzas:
            if stanza.device_id == device_id:
                return stanza
        return None

    def for_device(self, device_id: DeviceId) -> bytes:
        """The envelope as one device gets it, with its stanza only. Raises EnvelopeRefused if it has none."""
        stanza = self.stanza_for(device_id)
        if stanza is None:
            raise EnvelopeRefused
        return assemble(self.head, stanza.encode(), self.tail)


def assemble(head: bytes, stanza: bytes, tail: bytes) -> bytes:
    """The envelope for one device from stored pieces of a parsed one. Copies, checks nothing."""
    return b"".join((head, b"\x00\x01", stanza, tail))


def pad(content: bytes) -> bytes:
    """The content with its end marked, filled to a power of two from 256 bytes to 64 KiB. Raises ContentTooLarge."""
    if len(content) > CONTENT_BYTES_MAX:
        raise ContentTooLarge(f"content may have at most {CONTENT_BYTES_MAX} bytes; send a link to the rest")
    bucket = max(PADDED_BYTES_MIN, 1 << len(content).bit_length())
    return b"".join((content, b"\x80", bytes(bucket - len(content) - 1)))


def unpad(padded: bytes) -> bytes:
    """What `pad()` was given. Raises EnvelopeRefused for anything that `pad()` does not produce.

    Runs on authenticated bytes only, so its timing tells nobody anything.
    """
    end = padded.rfind(b"\x80")
    if len(padded) not in _BUCKETS or end < 0 or padded.count(0, end + 1) != len(padded) - end - 1:
        raise EnvelopeRefused
    if len(padded) > PADDED_BYTES_MIN and end < len(padded) // 2:
        raise EnvelopeRefused  # would have fitted a smaller bucket: not a canonical padding
    return padded[:end]


def seal(
    content: bytes,
    header: Header,
    recipients: Sequence[Recipient],
    signing_key: ContentSigningKey,
    *,
    random: Random = nacl.utils.random,
) -> Envelope:
    """The content sealed to the recipients and signed by `signing_key`, which the header must name.

    `content` is at most `CONTENT_BYTES_MAX` bytes and may be empty; there are at most `STANZAS_MAX` recipients, each
    device once. No recipients make an envelope that nobody can open. Each call draws a new content key: keep the
    result and send it again on a retry rather than sealing twice.

    `random` is for test vectors only (see the module's text). Raises ContentTooLarge, SuiteUnsupported, KeyRefused for
    a prekey that cannot be sealed to, ValueError for arguments that contradict each other.
    """
    if header.sender_key_id != signing_key.key_id:
        raise ValueError("header.sender_key_id names another key; set it to signing_key.key_id")
    if len(recipients) > STANZAS_MAX:
        raise ValueError(f"an envelope holds at most {STANZAS_MAX} devices; split the recipients")
    if len({each.device_id for each in recipients}) != len(recipients):
        raise ValueError("a device stands twice among the recipients; keep one prekey of it")
    padded = pad(content)
    header_bytes = header.encode()
    content_encryption_key = random(32)
    nonce = random(_NONCE_BYTES)
    head = header_bytes + hashlib.sha256(TAG_COMMIT + content_encryption_key + header_bytes).digest()
    ciphertext = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(padded, header_bytes, nonce, content_encryption_key)
    sealed = b"".join(((_NONCE_BYTES + len(ciphertext)).to_bytes(4, "big"), nonce, ciphertext))
    signature = signing_key.sign(_signed_bytes(head, sealed))
    stanzas = tuple(_wrap(content_encryption_key, header_bytes, each, random) for each in recipients)
    return Envelope(header, head, stanzas, sealed + signature)


def verify_signature(envelope: Envelope, sender_public_key: bytes) -> None:
    """Return only if the holder of this key signed the envelope and the header names that key.

    Whether the key belongs to the sender at that time is for `content_public_key()`. Raises EnvelopeRefused.
    """
    _verify(envelope.header, evidence_of(envelope.head, envelope.tail), sender_public_key)


def evidence_of(head: bytes, tail: bytes) -> bytes:
    """What is left of an envelope when its content is gone: head | SHA-512(content) | signature, 254 bytes.

    All that the signature covers, so that it verifies for ever (`verify_evidence()`); nothing in it is secret. Checks nothing.
    """
    return b"".join((head, hashlib.sha512(tail[:-SIGNATURE_BYTES]).digest(), tail[-SIGNATURE_BYTES:]))


def envelope_digest(evidence: bytes) -> bytes:
    """SHA-256 of the 254 bytes of `evidence_of()`: the name of an envelope in what devices sign. 32 bytes, the same for each device
    and however often the envelope is sent, since stanzas do not count."""
    return hashlib.sha256(evidence).digest()


def verify_evidence(evidence: bytes, sender_public_key: bytes) -> None:
    """As `verify_signature()`, of an envelope whose content need not be there any more. Raises EnvelopeRefused."""
    if len(evidence) != EVIDENCE_BYTES:
        raise EnvelopeRefused
    _verify(Header.decode(evidence[:HEADER_BYTES]), evidence, sender_public_key)


def _verify(header: Header, evidence: bytes, sender_public_key: bytes) -> None:
    if len(sender_public_key) != 32 or content_key_id(sender_public_key) != header.sender_key_id:
        raise EnvelopeRefused
    signed = TAG_SIGNATURE + hashlib.sha512(evidence[:-SIGNATURE_BYTES]).digest()
    if not verify_ed25519(sender_public_key, signed, evidence[-SIGNATURE_BYTES:]):
        raise EnvelopeRefused


def content_public_key(header: Header, sender_entry: SenderEntry, platform_entry: SenderEntry | None) -> bytes:
    """The key that must have signed this envelope, by entries that were verified against the pinned root.

    Sealed by the sender: a key of the sender's entry, whose modes list end_to_end. Sealed by the server: a key of the
    platform's entry, and the sender's own entry must list server, so that a server gone bad cannot speak for a sender
    that only seals itself. Raises EnvelopeRefused.
    """
    if sender_entry.role != EntryRole.SENDER or sender_entry.sender_id != header.sender_id:
        raise EnvelopeRefused
    if header.server_sealed:
        if platform_entry is None or platform_entry.role != EntryRole.PLATFORM:
            raise EnvelopeRefused
        mode, holder = SenderMode.SERVER, platform_entry
    else:
        mode, holder = SenderMode.END_TO_END, sender_entry
    public_key = holder.public_key(header.sender_key_id, header.created_at_ms)
    if mode not in sender_entry.modes or public_key is None:
        raise EnvelopeRefused
    return public_key


def check_times(header: Header, now_ms: int, skew_ms: int) -> TimeCheck:
    """Whether a message may be shown at `now_ms`, the server's time as the device knows it to within `skew_ms`.

    It is expired from `expires_at_ms + skew_ms` on, and from the future while created after `now_ms + skew_ms`; the
    latter says that a clock is wrong and is a reason to hold the message, not to discard it.
    """
    if header.created_at_ms > now_ms + skew_ms:
        return TimeCheck.FROM_THE_FUTURE
    if now_ms >= header.expires_at_ms + skew_ms:
        return TimeCheck.EXPIRED
    return TimeCheck.OK


def open_envelope(
    envelope: Envelope | bytes,
    *,
    device_id: DeviceId,
    private_prekey_lookup: PrekeyLookup,
    sender_public_key: bytes,
    min_suite: int = SUITE_X25519,
) -> bytes:
    """The content, if every check passes: form, suite, own stanza, signature, key, binding, commitment, padding.

    `private_prekey_lookup(suite, prekey_id, kind)` gives the private half or None; what it raises passes through, as
    that is no fault of the envelope. `sender_public_key` is the answer of `content_public_key()`. Times and replays are
    the caller's: `check_times()` and the keystore's record of what was seen.

    Opening changes nothing and may be repeated. Raises EnvelopeRefused, always the same.
    """
    if isinstance(envelope, bytes):
        envelope = Envelope.parse(envelope)
    stanza = envelope.stanza_for(device_id)
    if stanza is None or stanza.suite not in SUITES or stanza.suite < min_suite:
        raise EnvelopeRefused
    verify_signature(envelope, sender_public_key)
    prekey = private_prekey_lookup(stanza.suite, stanza.prekey_id, stanza.kind)
    if prekey is None:
        raise EnvelopeRefused
    header_bytes, commit = envelope.head[:HEADER_BYTES], envelope.head[HEADER_BYTES:]
    payload = SUITES[stanza.suite].unwrap(stanza.wrapped, prekey.public_key, prekey.private_key)
    content_encryption_key, bound = payload[:32], payload[32:]
    if not hmac.compare_digest(bound, _binding(header_bytes, device_id, stanza.prekey_id, stanza.kind)):
        raise EnvelopeRefused
    expected = hashlib.sha256(TAG_COMMIT + content_encryption_key + header_bytes).digest()
    if not hmac.compare_digest(commit, expected):
        raise EnvelopeRefused
    try:
        padded = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            envelope.tail[4 + _NONCE_BYTES : -SIGNATURE_BYTES],
            header_bytes,
            envelope.tail[4 : 4 + _NONCE_BYTES],
            content_encryption_key,
        )
    except CryptoError:
        raise EnvelopeRefused from None
    return unpad(padded)


def _signed_bytes(head: bytes, sealed: bytes) -> bytes:
    """What a content-signing key signs: hashes, so that the cost of signing does not grow with the content."""
    return TAG_SIGNATURE + hashlib.sha512(head + hashlib.sha512(sealed).digest()).digest()


def _binding(header_bytes: bytes, device_id: bytes, prekey_id: int, kind: int) -> bytes:
    """The hash that ties a wrapped key to its header, device and prekey."""
    return hashlib.sha256(header_bytes + _BINDING.pack(device_id, prekey_id, kind)).digest()


def _wrap(content_encryption_key: bytes, header_bytes: bytes, each: Recipient, random: Random) -> Stanza:
    """The stanza for one recipient."""
    if each.suite not in SUITES:
        raise SuiteUnsupported(f"this release cannot seal to suite {each.suite}; upgrade this SDK")
    if len(each.device_id) != 16 or not 0 <= each.prekey_id <= _U32_MAX:
        raise ValueError("device_id must be 16 raw bytes and prekey_id must fit 32 bits")
    payload = content_encryption_key + _binding(header_bytes, each.device_id, each.prekey_id, each.kind)
    wrapped = SUITES[each.suite].wrap(payload, each.public_key, random)
    return Stanza(each.device_id, each.suite, each.prekey_id, PrekeyKind(each.kind), wrapped)
