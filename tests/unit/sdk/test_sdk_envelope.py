"""sealpush.envelope: sealing, taking apart, opening, and everything that must be refused."""

import dataclasses
import hashlib
from collections.abc import Callable

import nacl.bindings
import nacl.public
import nacl.signing
import nacl.utils
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealpush.envelope import (
    CONTENT_BYTES_MAX,
    ENVELOPE_BYTES_MAX,
    FLAG_SERVER_SEALED,
    HEAD_BYTES,
    HEADER_BYTES,
    STANZAS_MAX,
    Envelope,
    Header,
    Recipient,
    Stanza,
    TimeCheck,
    assemble,
    check_times,
    content_public_key,
    open_envelope,
    pad,
    recipient,
    seal,
    unpad,
    verify_signature,
)
from sealpush.errors import ContentTooLarge, EnvelopeRefused, KeyRefused, SuiteUnsupported
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId
from sealpush.keys import (
    DAY_MS,
    ContentSigningKey,
    EntryKey,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    RecipientDevice,
    SenderEntry,
    SenderMode,
    generate_prekey,
)
from sealpush.suites import SUITE_HYBRID, SUITE_X25519

NOW_MS = 1_700_000_000_000
BANK_KEY = ContentSigningKey.from_seed(b"\x33" * 32)
PLATFORM_KEY = ContentSigningKey.from_seed(b"\x44" * 32)
HEADER = Header(
    content_id=ContentId(b"C" * 16),
    sender_id=SenderId(b"S" * 16),
    sender_key_id=BANK_KEY.key_id,
    recipient_ref=RecipientRef(b"R" * 32),
    created_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + DAY_MS,
)
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    b"\xed" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 30 + b"\x7f",
]


class Phone:
    """A device with one prekey, as the envelope code sees it."""

    def __init__(self, number: int, kind: PrekeyKind = PrekeyKind.SIGNED, suite: int = SUITE_X25519) -> None:
        self.device_id = DeviceId(bytes((number,)) * 16)
        seed = hashlib.sha256(bytes((number,))).digest()
        identity = IdentityKey.from_seed(seed)
        self.private, prekey = generate_prekey(
            identity, self.device_id, prekey_id=1000 + number, kind=kind, now_ms=NOW_MS, suite=suite, random=lambda _: seed
        )
        self.device: RecipientDevice = RecipientDevice(
            self.device_id,
            identity.public_key,
            prekey if kind is PrekeyKind.SIGNED else Phone(number, suite=suite).device.signed_prekey,
            prekey if kind is PrekeyKind.ONE_TIME else None,
        )
        self.recipient = recipient(self.device, NOW_MS)

    def lookup(self, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        mine = (self.private.suite, self.private.prekey_id, self.private.kind)
        return self.private if mine == (suite, prekey_id, kind) else None

    def open(self, envelope: Envelope | bytes, public_key: bytes = BANK_KEY.public_key, **options: int) -> bytes:
        return open_envelope(
            envelope,
            device_id=self.device_id,
            private_prekey_lookup=self.lookup,
            sender_public_key=public_key,
            **options,
        )


PHONES = [Phone(number, PrekeyKind(1 + number % 2)) for number in range(8)]
PHONE = PHONES[0]
HYBRIDS = [Phone(100 + number, PrekeyKind(1 + number % 2), SUITE_HYBRID) for number in range(8)]
HYBRID = HYBRIDS[0]


def counted(start: int = 0) -> Callable[[int], bytes]:
    """Bytes that anybody can reproduce: SHA-256 of a counter."""
    state = [start]

    def random(size: int) -> bytes:
        state[0] += 1
        return hashlib.sha256(state[0].to_bytes(4, "big")).digest()[:size]

    return random


@settings(max_examples=60)
@given(
    content=st.one_of(st.binary(max_size=600), st.integers(0, CONTENT_BYTES_MAX).map(lambda size: b"x" * size)),
    phones=st.lists(st.sampled_from(PHONES + HYBRIDS), unique=True, max_size=10),
    injected=st.booleans(),
)
def test_every_recipient_opens_what_was_sealed_and_nobody_else(content: bytes, phones: list[Phone], injected: bool) -> None:
    """Any content, any devices in any order, both suites and both kinds of prekey."""
    random = counted() if injected else nacl.utils.random
    envelope = seal(content, HEADER, [phone.recipient for phone in phones], BANK_KEY, random=random)
    data = envelope.encode()
    assert Envelope.parse(data) == envelope
    for phone in phones:
        assert phone.open(envelope) == phone.open(data) == phone.open(envelope.for_device(phone.device_id)) == content
    for phone in {*PHONES, *HYBRIDS}.difference(phones):
        with pytest.raises(EnvelopeRefused):
            phone.open(envelope)


@pytest.mark.parametrize("size", [0, 1, 254, 255, 256, 511, 512, 4095, 4096, 32767, 32768, CONTENT_BYTES_MAX])
def test_sizes_at_the_edges_of_buckets_open(size: int) -> None:
    content = b"\x80" * size
    assert PHONE.open(seal(content, HEADER, [PHONE.recipient], BANK_KEY)) == content


def test_content_over_the_bound_is_refused_before_work() -> None:
    with pytest.raises(ContentTooLarge, match=str(CONTENT_BYTES_MAX)):
        seal(bytes(CONTENT_BYTES_MAX + 1), HEADER, [PHONE.recipient], BANK_KEY)


def test_bytes_are_the_documented_layout() -> None:
    """Built again here from the format's text and PyNaCl's public API, without the code under test."""
    envelope = seal(b"hello", HEADER, [PHONES[1].recipient], BANK_KEY, random=counted())
    random = counted()
    cek, nonce, ephemeral = random(32), random(24), nacl.public.PrivateKey(random(32))
    header = (
        b"SPE1\x01\x00" + b"C" * 16 + b"S" * 16 + BANK_KEY.key_id + b"R" * 32
        + NOW_MS.to_bytes(8, "big") + (NOW_MS + DAY_MS).to_bytes(8, "big")
    )  # fmt: skip
    commit = hashlib.sha256(b"SPE1-commit" + cek + header).digest()
    phone = PHONES[1]
    bound = hashlib.sha256(header + phone.device_id + (1001).to_bytes(4, "big") + b"\x02").digest()
    prekey_public = nacl.public.PublicKey(phone.private.public_key)
    seal_nonce = hashlib.blake2b(bytes(ephemeral.public_key) + bytes(prekey_public), digest_size=24).digest()
    boxed = nacl.public.Box(ephemeral, prekey_public).encrypt(cek + bound, seal_nonce).ciphertext
    wrapped = bytes(ephemeral.public_key) + boxed
    stanza = phone.device_id + b"\x01" + (1001).to_bytes(4, "big") + b"\x02" + b"\x00\x70" + wrapped
    padded = b"hello\x80" + bytes(250)
    sealed = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(padded, header, nonce, cek)
    content = (24 + 256 + 16).to_bytes(4, "big") + nonce + sealed
    signed = b"SPE1-sig" + hashlib.sha512(header + commit + hashlib.sha512(content).digest()).digest()
    signature = nacl.signing.SigningKey(b"\x33" * 32).sign(signed).signature
    assert envelope.encode() == header + commit + b"\x00\x01" + stanza + content + signature
    assert len(header) == HEADER_BYTES
    assert (envelope.head, envelope.tail) == (header + commit, content + signature)
    assert assemble(envelope.head, stanza, envelope.tail) == envelope.encode()


def test_injected_randomness_gives_genuine_sealed_boxes() -> None:
    envelope = seal(b"hello", HEADER, [PHONE.recipient], BANK_KEY, random=counted())
    payload = nacl.public.SealedBox(nacl.public.PrivateKey(PHONE.private.private_key)).decrypt(envelope.stanzas[0].wrapped)
    assert payload[:32] == counted()(32)


VECTORS = {
    # (devices, content bytes) → SHA-256 of the envelope sealed with counted() randomness
    (0, 5): "027ad03e9c0c3301e21def8e0ada0ae7229f6d4ac68876c855a94192ca29aebe",
    (1, 5): "14b20e21e44a9133aa7acccb2a2657d4cdc9102681e67a63697787ff0dccf149",
    (8, 300): "d7712495d15130f945a241941f5e8896b3c93f84791c3227d4afbd14bf3131de",
    (1, CONTENT_BYTES_MAX): "f405b5bda063cca51d580e96168ab38230b7a9fac2d7e790bb71ffe0d95bdbda",
}


@pytest.mark.parametrize(("devices", "size"), list(VECTORS))
def test_vectors_stay_as_they_are(devices: int, size: int) -> None:
    recipients = [phone.recipient for phone in PHONES[:devices]]
    data = seal(b"v" * size, HEADER, recipients, BANK_KEY, random=counted()).encode()
    assert hashlib.sha256(data).hexdigest() == VECTORS[devices, size]


@pytest.mark.parametrize("phone", [PHONE, HYBRID], ids=["suite 1", "suite 2"])
def test_without_injection_nothing_repeats(phone: Phone) -> None:
    one, other = (seal(b"", HEADER, [phone.recipient], BANK_KEY) for _ in range(2))
    assert one.head[HEADER_BYTES:] != other.head[HEADER_BYTES:]
    assert one.tail[4:28] != other.tail[4:28]
    assert one.stanzas[0].wrapped != other.stanzas[0].wrapped


@pytest.mark.parametrize("phone", [PHONE, HYBRID], ids=["suite 1", "suite 2"])
def test_every_flipped_bit_is_refused(phone: Phone) -> None:
    data = seal(b"hello", HEADER, [phone.recipient], BANK_KEY).encode()
    assert phone.open(data) == b"hello"
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeRefused):
            phone.open(bytes(flipped))


@pytest.mark.parametrize("phones", [PHONES[:2], [HYBRID, PHONE], HYBRIDS[:2]], ids=["suite 1", "mixed", "suite 2"])
def test_every_truncation_and_any_trailing_byte_is_refused(phones: list[Phone]) -> None:
    data = seal(b"hello", HEADER, [phone.recipient for phone in phones], BANK_KEY).encode()
    for length in range(len(data)):
        with pytest.raises(EnvelopeRefused):
            Envelope.parse(data[:length])
    for extra in (b"\0", data, bytes(ENVELOPE_BYTES_MAX)):
        with pytest.raises(EnvelopeRefused):
            Envelope.parse(data + extra)


@settings(max_examples=200)
@given(st.binary(max_size=1200))
def test_noise_is_refused_and_never_anything_else(noise: bytes) -> None:
    genuine = seal(b"", HEADER, [PHONE.recipient], BANK_KEY, random=counted()).encode()
    for data in (noise, genuine[:HEAD_BYTES] + noise, genuine[: HEAD_BYTES + 2] + noise):
        with pytest.raises(EnvelopeRefused):
            PHONE.open(data)


def test_a_refusal_tells_nothing() -> None:
    data = seal(b"hello", HEADER, [PHONE.recipient], BANK_KEY).encode()
    texts = set()
    for position in (0, 5, 10, HEAD_BYTES - 1, HEAD_BYTES + 30, len(data) - 80, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with pytest.raises(EnvelopeRefused) as caught:
            PHONE.open(bytes(flipped))
        texts.add((str(caught.value), caught.value.args))
        assert caught.value.__cause__ is None
        assert not vars(caught.value)
    assert len(texts) == 1


def test_another_device_another_key_another_sender_are_refused() -> None:
    envelope = seal(b"hello", HEADER, [PHONE.recipient], BANK_KEY)
    with pytest.raises(EnvelopeRefused):
        PHONES[1].open(envelope)
    with pytest.raises(EnvelopeRefused):
        PHONE.open(envelope, PLATFORM_KEY.public_key)
    with pytest.raises(EnvelopeRefused):
        PHONE.open(envelope, b"short")
    with pytest.raises(EnvelopeRefused):
        envelope.for_device(PHONES[1].device_id)
    stolen_id = Phone(1)
    stolen_id.device_id = PHONE.device_id
    with pytest.raises(EnvelopeRefused):
        stolen_id.open(envelope)  # no such prekey here
    stolen_id.private = dataclasses.replace(stolen_id.private, prekey_id=PHONE.private.prekey_id, kind=PHONE.private.kind)
    with pytest.raises(EnvelopeRefused):
        stolen_id.open(envelope)  # a prekey of that name, but another key


def test_a_key_that_signs_under_anothers_key_id_is_refused() -> None:
    foreign = dataclasses.replace(HEADER, sender_key_id=PLATFORM_KEY.key_id)
    with pytest.raises(ValueError, match="sender_key_id"):
        seal(b"", foreign, [PHONE.recipient], BANK_KEY)
    envelope = seal(b"hello", foreign, [PHONE.recipient], PLATFORM_KEY)
    with pytest.raises(EnvelopeRefused):
        verify_signature(envelope, BANK_KEY.public_key)
    verify_signature(envelope, PLATFORM_KEY.public_key)


@pytest.mark.parametrize("phone", [PHONE, HYBRID], ids=["suite 1", "suite 2"])
def test_a_stanza_moved_to_another_envelope_is_refused(phone: Phone) -> None:
    """Same device, same prekey, both genuine: the hash beside the key stops it."""
    one = seal(b"pay 1", HEADER, [phone.recipient], BANK_KEY)
    other = seal(b"pay 2", dataclasses.replace(HEADER, content_id=ContentId(b"c" * 16)), [phone.recipient], BANK_KEY)
    with pytest.raises(EnvelopeRefused):
        phone.open(dataclasses.replace(one, stanzas=other.stanzas))


@pytest.mark.parametrize("phone", [PHONE, HYBRID], ids=["suite 1", "suite 2"])
def test_a_stanza_of_the_same_header_but_another_content_key_is_refused(phone: Phone) -> None:
    """The commitment: a second sealing under the same header has another key."""
    one, other = (seal(b"pay", HEADER, [phone.recipient], BANK_KEY) for _ in range(2))
    with pytest.raises(EnvelopeRefused):
        phone.open(dataclasses.replace(one, stanzas=other.stanzas))


def resealed(head: bytes, padded: bytes, content_key: bytes, device_id: bytes = PHONE.device_id) -> Envelope:
    """An envelope that a dishonest but genuine sender makes: everything signed, one part of the caller's choice."""
    header_bytes = head[:HEADER_BYTES]
    bound = hashlib.sha256(header_bytes + device_id + PHONE.private.prekey_id.to_bytes(4, "big") + bytes((PHONE.private.kind,))).digest()
    wrapped = nacl.bindings.crypto_box_seal(content_key + bound, PHONE.private.public_key)
    sealed = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(padded, header_bytes, bytes(24), content_key)
    content = (24 + len(sealed)).to_bytes(4, "big") + bytes(24) + sealed
    signature = BANK_KEY.sign(b"SPE1-sig" + hashlib.sha512(head + hashlib.sha512(content).digest()).digest())
    stanza = Stanza(PHONE.device_id, 1, PHONE.private.prekey_id, PHONE.private.kind, wrapped)
    return Envelope(Header.decode(header_bytes), head, (stanza,), content + signature)


def test_wrong_commit_and_wrong_padding_are_refused_even_from_a_genuine_sender() -> None:
    content_key = b"k" * 32
    header_bytes = HEADER.encode()
    head = header_bytes + hashlib.sha256(b"SPE1-commit" + content_key + header_bytes).digest()
    assert PHONE.open(resealed(head, pad(b"ok"), content_key)) == b"ok"
    with pytest.raises(EnvelopeRefused):
        PHONE.open(resealed(header_bytes + bytes(32), pad(b"ok"), content_key))
    with pytest.raises(EnvelopeRefused):  # everything right but the device that the stanza is bound to
        PHONE.open(resealed(head, pad(b"ok"), content_key, device_id=PHONES[1].device_id))
    for padded in (bytes(256), b"x" * 256, b"ok\x80" + bytes(509)):
        with pytest.raises(EnvelopeRefused):
            PHONE.open(resealed(head, padded, content_key))


def test_a_signature_by_another_key_than_the_header_names_is_refused() -> None:
    header_bytes = dataclasses.replace(HEADER, sender_key_id=PLATFORM_KEY.key_id).encode()
    head = header_bytes + hashlib.sha256(b"SPE1-commit" + b"k" * 32 + header_bytes).digest()
    with pytest.raises(EnvelopeRefused):
        PHONE.open(resealed(head, pad(b"ok"), b"k" * 32))


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("random", [nacl.utils.random, counted()])
def test_low_order_prekeys_are_a_clean_error(point: bytes, random: Callable[[int], bytes]) -> None:
    bad = dataclasses.replace(PHONE.recipient, public_key=point)
    with pytest.raises(KeyRefused, match="usable"):
        seal(b"", HEADER, [bad], BANK_KEY, random=random)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_low_order_ephemeral_key_is_refused(point: bytes) -> None:
    envelope = seal(b"", HEADER, [PHONE.recipient], BANK_KEY)
    stanza = dataclasses.replace(envelope.stanzas[0], wrapped=point + envelope.stanzas[0].wrapped[32:])
    with pytest.raises(EnvelopeRefused):
        PHONE.open(dataclasses.replace(envelope, stanzas=(stanza,)))


def test_an_unknown_suite_is_carried_but_neither_made_nor_opened() -> None:
    with pytest.raises(SuiteUnsupported, match="upgrade"):
        seal(b"", HEADER, [dataclasses.replace(PHONE.recipient, suite=3)], BANK_KEY)
    envelope = seal(b"hi", HEADER, [PHONE.recipient], BANK_KEY)
    unknown = Stanza(DeviceId(b"H" * 16), 3, 1, PrekeyKind.SIGNED, b"w" * 1248)
    mixed = dataclasses.replace(envelope, stanzas=(unknown, *envelope.stanzas))
    assert Envelope.parse(mixed.encode()) == mixed
    assert PHONE.open(mixed.encode()) == b"hi"
    with pytest.raises(EnvelopeRefused):
        open_envelope(
            mixed,
            device_id=unknown.device_id,
            private_prekey_lookup=lambda *_: PHONE.private,
            sender_public_key=BANK_KEY.public_key,
        )


def test_a_suite_below_the_lowest_accepted_is_refused() -> None:
    envelope = seal(b"hi", HEADER, [PHONE.recipient, HYBRID.recipient], BANK_KEY)
    with pytest.raises(EnvelopeRefused):
        PHONE.open(envelope, min_suite=2)
    assert HYBRID.open(envelope, min_suite=2) == b"hi"
    with pytest.raises(EnvelopeRefused):
        HYBRID.open(envelope, min_suite=3)


def test_a_hybrid_stanza_has_the_documented_size() -> None:
    none, one = (seal(b"", HEADER, [HYBRID.recipient][:count], BANK_KEY) for count in (0, 1))
    assert (len(HYBRID.recipient.public_key), len(one.stanzas[0].wrapped)) == (1216, 1200)
    assert len(one.encode()) - len(none.encode()) == 24 + 1200


@pytest.mark.parametrize(
    ("suite", "kind", "wrapped_bytes"),
    [(0, 1, 112), (1, 0, 112), (1, 3, 112), (1, 1, 111), (1, 1, 113), (2, 1, 1199), (2, 1, 1201), (2, 1, 112), (3, 1, 0), (3, 1, 2049)],
)
def test_malformed_stanzas_are_refused(suite: int, kind: int, wrapped_bytes: int) -> None:
    data = b"D" * 16 + bytes((suite,)) + bytes(4) + bytes((kind,)) + wrapped_bytes.to_bytes(2, "big") + bytes(wrapped_bytes)
    with pytest.raises(EnvelopeRefused):
        Stanza.decode(data)
    envelope = seal(b"", HEADER, [PHONE.recipient], BANK_KEY)
    with pytest.raises(EnvelopeRefused):
        Envelope.parse(assemble(envelope.head, data, envelope.tail))


def test_a_stanza_survives_encoding_and_its_bytes_are_exact() -> None:
    stanza = seal(b"", HEADER, [PHONE.recipient], BANK_KEY).stanzas[0]
    assert Stanza.decode(stanza.encode()) == stanza
    for data in (stanza.encode() + b"\0", stanza.encode()[:-1], b""):
        with pytest.raises(EnvelopeRefused):
            Stanza.decode(data)


def test_a_device_appears_once_and_their_number_is_bounded() -> None:
    with pytest.raises(ValueError, match="twice"):
        seal(b"", HEADER, [PHONE.recipient, PHONE.recipient], BANK_KEY)
    many = [Recipient(DeviceId(n.to_bytes(16, "big")), n, PrekeyKind.SIGNED, PHONE.private.public_key) for n in range(STANZAS_MAX + 1)]
    with pytest.raises(ValueError, match=str(STANZAS_MAX)):
        seal(b"", HEADER, many, BANK_KEY)
    envelope = seal(b"", HEADER, [PHONE.recipient], BANK_KEY)
    with pytest.raises(EnvelopeRefused):
        Envelope.parse(dataclasses.replace(envelope, stanzas=envelope.stanzas * 2).encode())
    stanzas = [dataclasses.replace(envelope.stanzas[0], device_id=each.device_id) for each in many]
    assert len(Envelope.parse(dataclasses.replace(envelope, stanzas=tuple(stanzas[:-1])).encode()).stanzas) == 512
    with pytest.raises(EnvelopeRefused):
        Envelope.parse(dataclasses.replace(envelope, stanzas=tuple(stanzas)).encode())


def test_an_envelope_for_nobody_parses_and_opens_for_nobody() -> None:
    envelope = seal(b"hi", HEADER, [], BANK_KEY)
    assert Envelope.parse(envelope.encode()) == envelope
    verify_signature(envelope, BANK_KEY.public_key)
    with pytest.raises(EnvelopeRefused):
        PHONE.open(envelope)


def test_prekeys_of_wrong_shape_are_refused_when_sealing() -> None:
    with pytest.raises(KeyRefused, match="usable X25519"):
        seal(b"", HEADER, [dataclasses.replace(PHONE.recipient, public_key=b"x" * 31)], BANK_KEY)
    for change in ({"device_id": b"x" * 15}, {"prekey_id": 1 << 32}, {"prekey_id": -1}):
        with pytest.raises(ValueError, match="prekey_id must fit"):
            seal(b"", HEADER, [dataclasses.replace(PHONE.recipient, **change)], BANK_KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"content_suite": 0},
        {"content_suite": 2},
        {"flags": 2},
        {"flags": 0x81},
        {"content_id": b"x" * 15},
        {"sender_id": b"x" * 17},
        {"sender_key_id": b"x" * 9},
        {"recipient_ref": b"x" * 31},
        {"created_at_ms": -1},
        {"expires_at_ms": NOW_MS},
        {"expires_at_ms": NOW_MS + 28 * DAY_MS + 1},
        {"created_at_ms": 1 << 48, "expires_at_ms": (1 << 48) + 1},
    ],
)
def test_headers_out_of_bounds_cannot_be_made(change: dict[str, int]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the list covers many texts
        dataclasses.replace(HEADER, **change)  # type: ignore[arg-type]  # wrong on purpose


def test_headers_survive_encoding_and_unknown_flags_or_suites_are_refused() -> None:
    flagged = dataclasses.replace(HEADER, flags=FLAG_SERVER_SEALED)
    assert flagged.server_sealed
    assert not HEADER.server_sealed
    for header in (HEADER, flagged):
        assert Header.decode(header.encode()) == header
    data = HEADER.encode()
    for broken in (data[:-1], data + b"\0", b"SPE2" + data[4:], data[:4] + b"\x02" + data[5:], data[:5] + b"\x02" + data[6:]):
        with pytest.raises(EnvelopeRefused):
            Header.decode(broken)


@given(st.integers(0, CONTENT_BYTES_MAX))
def test_padding_is_the_smallest_power_of_two_and_comes_off(size: int) -> None:
    padded = pad(b"\x80" * size)
    assert len(padded) == max(256, 1 << size.bit_length())
    assert len(padded) <= 65536
    assert unpad(padded) == b"\x80" * size


@pytest.mark.parametrize(
    "padded",
    [b"", b"\x80", bytes(256), b"x" * 256, b"\x80" + bytes(254), b"\x80" + bytes(511), b"\x80" + bytes(254) + b"\x01",
     b"x" * 100_000, b"\x80" + bytes(131071)],
)  # fmt: skip
def test_wrong_padding_is_one_error(padded: bytes) -> None:
    with pytest.raises(EnvelopeRefused):
        unpad(padded)


def test_times_are_judged_with_skew_on_both_sides() -> None:
    skew_ms = 1000
    for now_ms, expected in [
        (NOW_MS - skew_ms - 1, TimeCheck.FROM_THE_FUTURE),
        (NOW_MS - skew_ms, TimeCheck.OK),
        (HEADER.expires_at_ms + skew_ms - 1, TimeCheck.OK),
        (HEADER.expires_at_ms + skew_ms, TimeCheck.EXPIRED),
    ]:
        assert check_times(HEADER, now_ms, skew_ms) is expected


def entry(role: EntryRole, modes: SenderMode, signing_key: ContentSigningKey, sender_id: bytes = b"S" * 16) -> SenderEntry:
    keys = (EntryKey(signing_key.public_key, NOW_MS, NOW_MS + DAY_MS),)
    return SenderEntry(SenderId(sender_id), "Bank", modes, keys, NOW_MS, NOW_MS + DAY_MS, 1, role)


def test_who_must_have_signed_follows_from_flag_and_modes() -> None:
    both = SenderMode.END_TO_END | SenderMode.SERVER
    platform = entry(EntryRole.PLATFORM, SenderMode.SERVER, PLATFORM_KEY, b"P" * 16)
    own = HEADER
    served = dataclasses.replace(HEADER, flags=FLAG_SERVER_SEALED, sender_key_id=PLATFORM_KEY.key_id)
    assert content_public_key(own, entry(EntryRole.SENDER, both, BANK_KEY), None) == BANK_KEY.public_key
    assert content_public_key(served, entry(EntryRole.SENDER, both, BANK_KEY), platform) == PLATFORM_KEY.public_key
    end_to_end = entry(EntryRole.SENDER, SenderMode.END_TO_END, BANK_KEY)
    server_only = entry(EntryRole.SENDER, SenderMode.SERVER, BANK_KEY)
    refused: list[tuple[Header, SenderEntry, SenderEntry | None]] = [
        (served, end_to_end, platform),  # a server gone bad speaking for a bank that seals itself
        (own, server_only, platform),
        (served, server_only, None),
        (served, server_only, server_only),
        (own, platform, platform),
        (dataclasses.replace(own, flags=FLAG_SERVER_SEALED), server_only, platform),  # the bank's key with the flag
        (dataclasses.replace(served, flags=0), entry(EntryRole.SENDER, both, BANK_KEY), platform),
        (own, entry(EntryRole.SENDER, both, BANK_KEY, b"T" * 16), platform),
        (dataclasses.replace(own, created_at_ms=NOW_MS - 1), end_to_end, platform),
    ]
    for header, sender, server in refused:
        with pytest.raises(EnvelopeRefused):
            content_public_key(header, sender, server)


def test_the_flag_cannot_be_dropped_on_the_way() -> None:
    served = dataclasses.replace(HEADER, flags=FLAG_SERVER_SEALED, sender_key_id=PLATFORM_KEY.key_id)
    data = bytearray(seal(b"hi", served, [PHONE.recipient], PLATFORM_KEY).encode())
    assert PHONE.open(bytes(data), PLATFORM_KEY.public_key) == b"hi"
    data[5] = 0
    with pytest.raises(EnvelopeRefused):
        PHONE.open(bytes(data), PLATFORM_KEY.public_key)


def test_an_error_of_the_store_is_not_blamed_on_the_envelope() -> None:
    def fail(suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        open_envelope(
            seal(b"", HEADER, [PHONE.recipient], BANK_KEY),
            device_id=PHONE.device_id,
            private_prekey_lookup=fail,
            sender_public_key=BANK_KEY.public_key,
        )


def test_repr_of_an_envelope_shows_no_sealed_bytes() -> None:
    envelope = seal(b"hello", HEADER, [PHONE.recipient], BANK_KEY)
    assert "SPE1" not in repr(envelope)
    assert "wrapped" not in repr(envelope.stanzas[0])
