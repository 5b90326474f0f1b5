"""What is fuzzed, and what must hold for every input: a clean refusal or the whole truth, never another exception.

Importing this module instruments the code under test: only the fuzzing process does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import atheris

with atheris.instrument_imports(include=["sealpush.envelope", "sealpush.keys", "sealpush.revocations", "sealpush.suites"]):
    from sealpush.envelope import HEADER_BYTES, Envelope, Header, Recipient, _signed_bytes, open_envelope, seal
    from sealpush.keys import (
        ContentSigningKey,
        EntryKey,
        IdentityKey,
        PrekeyKind,
        PrekeyPrivate,
        RootKey,
        SenderEntry,
        SenderMode,
        generate_prekey,
        sign_sender_entry,
        verify_sender_entry,
    )
    from sealpush.revocations import RevocationList, RevokedEntries, RevokedKey, sign_revocations, verify_revocations
    from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.errors import EntryRefused, EnvelopeRefused, RevocationsRefused
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId

NOW_MS = 1_800_000_000_000
# Of both suites; each has a prekey of one kind.
DEVICES = {
    DeviceId(bytes([number]) * 16): suite for number, suite in enumerate((SUITE_X25519, SUITE_X25519, SUITE_HYBRID, SUITE_HYBRID), 1)
}
CONTENT = b"one-time code 471 208"


@dataclass(frozen=True, slots=True)
class Target:
    """`run` takes any bytes and raises only when something is wrong; `seeds` are good inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _deterministic(seed: int) -> Callable[[int], bytes]:
    """Bytes that look random and are the same in every run."""
    state = seed

    def draw(count: int) -> bytes:
        nonlocal state
        made = bytearray()
        while len(made) < count:
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            made += state.to_bytes(8, "big")
        return bytes(made[:count])

    return draw


def _sealed() -> tuple[Envelope, dict[DeviceId, PrekeyPrivate], ContentSigningKey]:
    """A good envelope for all devices, what they open it with, and who sealed it."""
    draw = _deterministic(1)
    signing_key = ContentSigningKey.from_seed(draw(32))
    private: dict[DeviceId, PrekeyPrivate] = {}
    recipients = []
    for number, (device_id, suite) in enumerate(DEVICES.items()):
        kind = PrekeyKind.ONE_TIME if number % 2 else PrekeyKind.SIGNED
        identity = IdentityKey.from_seed(draw(32))
        private[device_id], prekey = generate_prekey(
            identity, device_id, prekey_id=number, kind=kind, now_ms=NOW_MS, suite=suite, random=draw
        )
        recipients.append(Recipient.of(device_id, prekey))
    header = Header(ContentId(b"c" * 16), SenderId(b"s" * 16), signing_key.key_id, RecipientRef(b"r" * 32), NOW_MS, NOW_MS + 60_000)
    return seal(CONTENT, header, recipients, signing_key, random=draw), private, signing_key


ENVELOPE, PRIVATE, SIGNER = _sealed()


def parse(data: bytes) -> None:
    """What parses is exactly what it was parsed from."""
    try:
        envelope = Envelope.parse(data)
    except EnvelopeRefused:
        return
    assert envelope.encode() == data
    for stanza in envelope.stanzas:
        assert Envelope.parse(envelope.for_device(stanza.device_id)).stanzas == (stanza,)


def open_(data: bytes) -> None:
    """What opens is the one content that was sealed, by the bytes that were sealed."""
    for device_id in DEVICES:
        try:
            envelope = Envelope.parse(data)
            content = open_envelope(
                envelope,
                device_id=device_id,
                private_prekey_lookup=functools.partial(_private_half, device_id),
                sender_public_key=SIGNER.public_key,
            )
        except EnvelopeRefused:
            continue
        # Other devices' stanzas are not signed, because a device gets its own only.
        same = (envelope.head, envelope.stanza_for(device_id), envelope.tail)
        assert same == (ENVELOPE.head, ENVELOPE.stanza_for(device_id), ENVELOPE.tail)
        assert content == CONTENT


def resigned(data: bytes) -> None:
    """As `open_`, but with a good signature: what lies behind it must hold by itself, against a sender gone bad."""
    try:
        envelope = Envelope.parse(data)
    except EnvelopeRefused:
        return
    sealed = envelope.tail[:-64]
    head = envelope.head.replace(envelope.header.sender_key_id, SIGNER.key_id, 1)
    if len(head) != len(envelope.head) or Header.decode(head[:HEADER_BYTES]).sender_key_id != SIGNER.key_id:
        return
    signature = SIGNER.sign(_signed_bytes(head, sealed))
    stanzas = b"".join(stanza.encode() for stanza in envelope.stanzas)
    open_(b"".join((head, len(envelope.stanzas).to_bytes(2, "big"), stanzas, sealed, signature)))


def _private_half(device_id: DeviceId, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
    kept = PRIVATE[device_id]
    return kept if (kept.suite, kept.prekey_id, kept.kind) == (suite, prekey_id, kind) else None


ROOT = RootKey.from_seed(b"\x07" * 32)
ENTRY = sign_sender_entry(
    ROOT,
    SenderEntry(
        SenderId(b"s" * 16),
        "Demo Bank",
        SenderMode.END_TO_END | SenderMode.SERVER,
        (EntryKey(SIGNER.public_key, NOW_MS, NOW_MS + 10_000),),
        NOW_MS,
        NOW_MS + 20_000,
        7,
    ),
)


def entry(data: bytes) -> None:
    """Only what the root signed is an entry, and any body has one encoding."""
    try:
        verify_sender_entry(ROOT.public_key, data, NOW_MS)
        assert data == ENTRY
    except EntryRefused:
        pass
    try:
        decoded = SenderEntry.decode(data)
    except ValueError:
        return
    assert decoded.encode() == data


LIST = sign_revocations(ROOT, RevocationList(3, NOW_MS, (RevokedEntries(SenderId(b"s" * 16), 7), RevokedKey(SIGNER.public_key))))


def revocations(data: bytes) -> None:
    """Only what the root signed is a list, and any body has one encoding."""
    try:
        verify_revocations(ROOT.public_key, data)
        assert data == LIST
    except RevocationsRefused:
        pass
    try:
        decoded = RevocationList.decode(data)
    except ValueError:
        return
    assert decoded.encode() == data


_WHOLE = ENVELOPE.encode()
_ENVELOPES = (_WHOLE, *(ENVELOPE.for_device(device_id) for device_id in DEVICES))
TARGETS = {
    "parse": Target(parse, _ENVELOPES),
    "open": Target(open_, _ENVELOPES),
    "resigned": Target(resigned, _ENVELOPES),
    "entry": Target(entry, (ENTRY, ENTRY[:-64])),
    "revocations": Target(revocations, (LIST, LIST[:-64])),
}
