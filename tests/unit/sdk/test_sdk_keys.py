"""sealpush.keys: signing keys, prekeys, sender entries."""

import dataclasses
import hashlib
from collections.abc import Callable

import nacl.public
import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings

from sealpush import envelope, proofs
from sealpush.errors import EntryRefused, KeyRefused, SuiteUnsupported
from sealpush.ids import DeviceId, SenderId
from sealpush.keys import (
    DAY_MS,
    ENTRY_KEYS_MAX,
    PREKEY_LIFETIME_MS_MAX,
    TAG_ENTRY,
    TAG_PREKEY,
    ContentSigningKey,
    EntryKey,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    RecipientDevice,
    RootKey,
    SenderEntry,
    SenderMode,
    SignedPrekey,
    choose_prekey,
    content_key_id,
    generate_prekey,
    is_usable_ed25519,
    prekey_proof,
    sign_sender_entry,
    verify_ed25519,
    verify_prekey,
    verify_sender_entry,
)

NOW_MS = 1_700_000_000_000
DEVICE = DeviceId(b"D" * 16)
IDENTITY = IdentityKey.from_seed(b"\x11" * 32)
ROOT = RootKey.from_seed(b"\x22" * 32)
SENDER_KEY = ContentSigningKey.from_seed(b"\x33" * 32)

LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    b"\xed" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 30 + b"\x7f",
]


def make_prekey(kind: PrekeyKind = PrekeyKind.SIGNED, *, suite: int = 1, min_suite: int = 1, now_ms: int = NOW_MS) -> SignedPrekey:
    return generate_prekey(IDENTITY, DEVICE, prekey_id=7, kind=kind, now_ms=now_ms, suite=suite, min_suite=min_suite)[1]


def check(prekey: SignedPrekey, *, now_ms: int = NOW_MS, device_id: DeviceId = DEVICE, min_suite: int = 1) -> None:
    verify_prekey(
        prekey,
        device_id=device_id,
        identity_public_key=IDENTITY.public_key,
        now_ms=now_ms,
        min_suite=min_suite,
    )


def resign(prekey: SignedPrekey) -> SignedPrekey:
    return dataclasses.replace(prekey, signature=IDENTITY.sign(prekey_proof(prekey, DEVICE)))


def make_entry(
    *,
    modes: SenderMode = SenderMode.END_TO_END,
    role: EntryRole = EntryRole.SENDER,
    keys: tuple[EntryKey, ...] = (EntryKey(SENDER_KEY.public_key, NOW_MS, NOW_MS + DAY_MS),),
    display_name: str = "Банк «Тест»",
    serial: int = 5,
) -> SenderEntry:
    return SenderEntry(
        sender_id=SenderId(b"S" * 16),
        display_name=display_name,
        modes=modes,
        keys=keys,
        not_before_ms=NOW_MS,
        not_after_ms=NOW_MS + DAY_MS,
        serial=serial,
        role=role,
    )


def test_signing_keys_agree_with_pynacl() -> None:
    reference = nacl.signing.SigningKey(b"\x11" * 32)
    assert IDENTITY.public_key == bytes(reference.verify_key)
    assert IDENTITY.sign(b"words") == reference.sign(b"words").signature
    assert IDENTITY.seed == b"\x11" * 32
    assert verify_ed25519(IDENTITY.public_key, b"words", IDENTITY.sign(b"words"))


def test_generated_keys_differ() -> None:
    assert IdentityKey.generate() != IdentityKey.generate()
    with pytest.raises(ValueError, match="32 bytes"):
        IdentityKey.from_seed(b"short")


def test_a_signature_check_never_raises_on_malformed_input() -> None:
    signature = IDENTITY.sign(b"m")
    assert not verify_ed25519(IDENTITY.public_key[:31], b"m", signature)
    assert not verify_ed25519(IDENTITY.public_key, b"m", signature[:63])
    assert not verify_ed25519(IDENTITY.public_key, b"m", signature + b"\0")
    assert not verify_ed25519(bytes(32), b"m", signature)
    # A message that swallows the end of the signature must not verify either.
    assert not verify_ed25519(IDENTITY.public_key, signature[-1:] + b"m", signature[:-1])


def test_key_id_is_the_start_of_a_tagged_hash() -> None:
    expected = hashlib.sha256(b"SPK-id" + SENDER_KEY.public_key).digest()[:8]
    assert SENDER_KEY.key_id == content_key_id(SENDER_KEY.public_key) == expected


def test_repr_shows_no_secret() -> None:
    private, _ = generate_prekey(IDENTITY, DEVICE, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=NOW_MS)
    secrets = [IDENTITY.seed, SENDER_KEY.seed, ROOT.seed, private.private_key]
    shown = [form(each) for each in (IDENTITY, SENDER_KEY, ROOT, private) for form in (repr, str)]
    for secret in secrets:
        for text in shown:
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
    assert IDENTITY.public_key.hex()[:16] in repr(IDENTITY)


def test_keys_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        IDENTITY.public_key = b"x" * 32  # type: ignore[misc]  # mypy refuses it, too


def test_all_tags_differ_and_none_begins_another() -> None:
    tags = [
        TAG_PREKEY,
        TAG_ENTRY,
        envelope.TAG_COMMIT,
        envelope.TAG_SIGNATURE,
        proofs.TAG_CHALLENGE,
        proofs.TAG_REGISTER,
        proofs.TAG_ACKNOWLEDGEMENT,
        proofs.TAG_CHANGE,
    ]
    for tag in tags:
        assert 4 <= len(tag) <= 16
        assert tag.isascii()
        assert not any(other.startswith(tag) for other in tags if other is not tag)


@pytest.mark.parametrize("kind", list(PrekeyKind))
def test_a_fresh_prekey_verifies_and_its_halves_belong_together(kind: PrekeyKind) -> None:
    private, signed = generate_prekey(IDENTITY, DEVICE, prekey_id=(1 << 32) - 1, kind=kind, now_ms=NOW_MS)
    check(signed)
    assert bytes(nacl.public.PrivateKey(private.private_key).public_key) == private.public_key == signed.public_key


def test_prekey_proof_has_the_documented_bytes() -> None:
    prekey = SignedPrekey(1, 0x01020304, PrekeyKind.ONE_TIME, b"P" * 32, 0x0A, 0x0B, b"")
    expected = (
        b"SPE1-prekey" + b"D" * 16 + b"\x01\x01" + b"\x01\x02\x03\x04" + b"\x02"
        + (0x0A).to_bytes(8, "big") + (0x0B).to_bytes(8, "big") + b"\x00\x20" + b"P" * 32
    )  # fmt: skip
    assert prekey_proof(prekey, DEVICE) == expected


CHANGES: list[Callable[[SignedPrekey], SignedPrekey]] = [
    lambda each: dataclasses.replace(each, prekey_id=each.prekey_id + 1),
    lambda each: dataclasses.replace(each, kind=PrekeyKind.ONE_TIME),
    lambda each: dataclasses.replace(each, suite=200),
    lambda each: dataclasses.replace(each, created_at_ms=each.created_at_ms + 1),
    lambda each: dataclasses.replace(each, expires_at_ms=each.expires_at_ms - 1),
    lambda each: dataclasses.replace(each, public_key=b"\x09" + bytes(31)),
    lambda each: dataclasses.replace(each, signature=bytes(64)),
    lambda each: dataclasses.replace(each, signature=b""),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_prekey_changed_on_the_way_is_refused(change: Callable[[SignedPrekey], SignedPrekey]) -> None:
    with pytest.raises(KeyRefused, match="not signed"):
        check(change(make_prekey()))


def test_a_prekey_of_another_device_is_refused() -> None:
    with pytest.raises(KeyRefused, match="not signed"):
        check(make_prekey(), device_id=DeviceId(b"E" * 16))


def test_min_suite_cannot_be_changed_on_the_way() -> None:
    with pytest.raises(KeyRefused, match="weaker"):
        check(make_prekey(), min_suite=2)
    hybrid = make_prekey(suite=2, min_suite=2)
    check(hybrid, min_suite=2)
    with pytest.raises(KeyRefused, match="not signed"):
        check(hybrid, min_suite=1)


def test_prekey_times_are_enforced() -> None:
    prekey = make_prekey()
    check(prekey, now_ms=NOW_MS + PREKEY_LIFETIME_MS_MAX - 1)
    with pytest.raises(KeyRefused, match="expired"):
        check(prekey, now_ms=NOW_MS + PREKEY_LIFETIME_MS_MAX)
    with pytest.raises(KeyRefused, match="future"):
        check(prekey, now_ms=NOW_MS - DAY_MS)
    too_long = resign(dataclasses.replace(prekey, expires_at_ms=NOW_MS + PREKEY_LIFETIME_MS_MAX + 1))
    with pytest.raises(KeyRefused, match="90 days"):
        check(too_long)


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("top_bit", [0, 0x80])
def test_low_order_points_are_refused_though_signed(point: bytes, top_bit: int) -> None:
    point = point[:31] + bytes((point[31] | top_bit,))
    with pytest.raises(KeyRefused, match="usable"):
        check(resign(dataclasses.replace(make_prekey(), public_key=point)))


def test_a_prekey_of_wrong_length_is_refused_though_signed() -> None:
    for length in (31, 33):
        with pytest.raises(KeyRefused, match="usable"):
            check(resign(dataclasses.replace(make_prekey(), public_key=b"k" * length)))
    for length in (0, 2049):
        with pytest.raises(KeyRefused, match="malformed"):
            check(dataclasses.replace(make_prekey(), public_key=b"k" * length))


def test_no_prekey_is_made_of_an_unknown_suite_or_below_what_its_device_accepts() -> None:
    with pytest.raises(SuiteUnsupported, match="3"):
        make_prekey(suite=3)
    with pytest.raises(ValueError, match="below"):
        make_prekey(suite=1, min_suite=2)


def test_the_one_time_prekey_is_preferred() -> None:
    signed, once = make_prekey(), make_prekey(PrekeyKind.ONE_TIME)
    assert choose_prekey(RecipientDevice(DEVICE, IDENTITY.public_key, signed), NOW_MS) is signed
    assert choose_prekey(RecipientDevice(DEVICE, IDENTITY.public_key, signed, once), NOW_MS) is once


def test_an_expired_one_time_prekey_counts_as_none_but_a_forged_one_refuses_the_device() -> None:
    signed = make_prekey()
    expired = make_prekey(PrekeyKind.ONE_TIME, now_ms=NOW_MS - PREKEY_LIFETIME_MS_MAX)
    assert choose_prekey(RecipientDevice(DEVICE, IDENTITY.public_key, signed, expired), NOW_MS) is signed
    forged = dataclasses.replace(make_prekey(PrekeyKind.ONE_TIME), signature=bytes(64))
    with pytest.raises(KeyRefused):
        choose_prekey(RecipientDevice(DEVICE, IDENTITY.public_key, signed, forged), NOW_MS)


def test_prekey_kinds_cannot_be_swapped() -> None:
    signed, once = make_prekey(), make_prekey(PrekeyKind.ONE_TIME)
    for device in (
        RecipientDevice(DEVICE, IDENTITY.public_key, once),
        RecipientDevice(DEVICE, IDENTITY.public_key, signed, signed),
    ):
        with pytest.raises(KeyRefused, match="another kind"):
            choose_prekey(device, NOW_MS)


def test_a_device_that_asks_for_an_unknown_suite_is_refused_cleanly() -> None:
    unknown = SignedPrekey(3, 7, PrekeyKind.SIGNED, b"h" * 1600, NOW_MS, NOW_MS + DAY_MS, b"")
    unknown = dataclasses.replace(unknown, signature=IDENTITY.sign(prekey_proof(unknown, DEVICE, 3)))
    with pytest.raises(SuiteUnsupported, match="upgrade"):
        choose_prekey(RecipientDevice(DEVICE, IDENTITY.public_key, unknown, min_suite=3), NOW_MS)


def test_a_sender_entry_survives_signing_and_verifying() -> None:
    entry = make_entry()
    assert verify_sender_entry(ROOT.public_key, sign_sender_entry(ROOT, entry), NOW_MS) == entry


def test_the_encoding_of_an_entry_is_the_documented_one() -> None:
    entry = make_entry(display_name="Bank", modes=SenderMode.END_TO_END | SenderMode.SERVER)
    start, end = NOW_MS.to_bytes(8, "big"), (NOW_MS + DAY_MS).to_bytes(8, "big")
    assert entry.encode() == (
        b"SPCE\x01\x01\x03" + b"S" * 16 + (5).to_bytes(8, "big") + start + end
        + b"\x04Bank" + b"\x01" + SENDER_KEY.public_key + start + end
    )  # fmt: skip


names = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20).filter(lambda name: _is_accepted_name(name))


def _is_accepted_name(name: str) -> bool:
    try:
        make_entry(display_name=name)
    except ValueError:
        return False
    return True


@given(
    name=names,
    serial=st.integers(0, (1 << 64) - 1),
    modes=st.sampled_from([1, 2, 3]),
    seeds=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=ENTRY_KEYS_MAX, unique=True),
)
def test_entries_have_exactly_one_encoding(name: str, serial: int, modes: int, seeds: list[bytes]) -> None:
    keys = tuple(EntryKey(ContentSigningKey.from_seed(seed).public_key, number, number + 1) for number, seed in enumerate(seeds))
    entry = make_entry(display_name=name, serial=serial, modes=SenderMode(modes), keys=keys)
    body = entry.encode()
    assert SenderEntry.decode(body) == entry
    for broken in (body + b"\0", body[:-1]):
        with pytest.raises(ValueError, match="entry"):
            SenderEntry.decode(broken)


def test_truncated_extended_or_flipped_entries_are_refused() -> None:
    blob = sign_sender_entry(ROOT, make_entry())
    for length in range(len(blob)):
        with pytest.raises(EntryRefused):
            verify_sender_entry(ROOT.public_key, blob[:length], NOW_MS)
    for extra in (b"\0", bytes(2000)):
        with pytest.raises(EntryRefused):
            verify_sender_entry(ROOT.public_key, blob + extra, NOW_MS)
    for bit in range(len(blob) * 8):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EntryRefused):
            verify_sender_entry(ROOT.public_key, bytes(flipped), NOW_MS)


@given(st.binary(max_size=200))
def test_a_body_signed_by_the_root_but_malformed_is_refused(body: bytes) -> None:
    with pytest.raises(EntryRefused):
        verify_sender_entry(ROOT.public_key, body + ROOT.sign(TAG_ENTRY + body), NOW_MS)


def test_every_truncation_signed_by_the_root_is_refused() -> None:
    body = make_entry().encode()
    for length in range(1, len(body)):
        cut = body[:length]
        with pytest.raises(EntryRefused, match="malformed"):
            verify_sender_entry(ROOT.public_key, cut + ROOT.sign(TAG_ENTRY + cut), NOW_MS)


def test_another_root_another_role_and_another_time_are_refused() -> None:
    entry = make_entry()
    blob = sign_sender_entry(ROOT, entry)
    with pytest.raises(EntryRefused, match="pinned root"):
        verify_sender_entry(IDENTITY.public_key, blob, NOW_MS)
    with pytest.raises(EntryRefused, match="not a platform"):
        verify_sender_entry(ROOT.public_key, blob, NOW_MS, role=EntryRole.PLATFORM)
    for now_ms in (NOW_MS - 1, NOW_MS + DAY_MS):
        with pytest.raises(EntryRefused, match="time"):
            verify_sender_entry(ROOT.public_key, blob, now_ms)
    platform = sign_sender_entry(ROOT, make_entry(role=EntryRole.PLATFORM, modes=SenderMode.SERVER))
    with pytest.raises(EntryRefused, match="not a sender"):
        verify_sender_entry(ROOT.public_key, platform, NOW_MS)


@pytest.mark.parametrize(
    "name",
    ["", " Bank", "Bank ", "Ba\nnk", "Ba\u202enk", "Ba\u200bnk", "e\u0301", "x" * 129, "\ud800", "Ba\u00a0nk"],
)
def test_names_that_could_deceive_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="display_name"):
        make_entry(display_name=name)


def test_contradictory_entries_are_refused() -> None:
    key = EntryKey(SENDER_KEY.public_key, NOW_MS, NOW_MS + DAY_MS)
    many = [ContentSigningKey.from_seed(bytes((n,)) * 32).public_key for n in range(ENTRY_KEYS_MAX + 1)]
    assert make_entry(keys=(), modes=SenderMode.SERVER).keys == ()
    assert len(make_entry(keys=tuple(EntryKey(key, 0, 1) for key in many[1:])).keys) == ENTRY_KEYS_MAX
    bad: list[Callable[[], SenderEntry]] = [
        lambda: make_entry(keys=()),
        lambda: make_entry(modes=SenderMode(0)),
        lambda: make_entry(modes=SenderMode(4)),
        lambda: make_entry(keys=(key, key)),
        lambda: make_entry(keys=(EntryKey(SENDER_KEY.public_key, 1, 1),)),
        lambda: make_entry(keys=tuple(EntryKey(key, 0, 1) for key in many)),
        lambda: make_entry(role=EntryRole.PLATFORM, modes=SenderMode.END_TO_END),
        lambda: make_entry(role=EntryRole.PLATFORM, modes=SenderMode.SERVER, keys=()),
        lambda: make_entry(serial=1 << 64),
        lambda: dataclasses.replace(make_entry(), version=2),
    ]
    for make in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - the list covers many texts
            make()


ED25519_P = 2**255 - 19
_ORDER_EIGHT_Y = int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little")
# Of the orders 4, 1, 2 and 8; the last two are the first two written in another way.
LOW_ORDER_Y = (0, 1, ED25519_P - 1, _ORDER_EIGHT_Y, ED25519_P - _ORDER_EIGHT_Y, ED25519_P, ED25519_P + 1)


@pytest.mark.parametrize("sign", [0, 1 << 255])
@pytest.mark.parametrize("y", LOW_ORDER_Y)
def test_ed25519_keys_of_low_order_are_refused_also_as_a_part_of_another(y: int, sign: int) -> None:
    point = (y | sign).to_bytes(32, "little")
    assert not is_usable_ed25519(point)
    with pytest.raises(ValueError, match="low order"):
        EntryKey(point, 0, 1)
    if 1 < y < ED25519_P:
        assert not is_usable_ed25519(bindings.crypto_core_ed25519_add(SENDER_KEY.public_key, point))


@pytest.mark.parametrize("sign", [0, 1 << 255])
def test_no_ed25519_key_can_be_written_in_two_ways(sign: int) -> None:
    assert not any(is_usable_ed25519((y | sign).to_bytes(32, "little")) for y in range(ED25519_P, 1 << 255))


@given(st.binary(min_size=32, max_size=32))
def test_every_ed25519_key_that_is_made_is_usable_as_a_whole(seed: bytes) -> None:
    public_key = IdentityKey.from_seed(seed).public_key
    assert is_usable_ed25519(public_key)
    assert not is_usable_ed25519(public_key[:-1])
    assert not is_usable_ed25519(public_key + b"\0")


def test_an_entrys_key_is_good_only_within_its_window() -> None:
    entry = make_entry()
    assert entry.public_key(SENDER_KEY.key_id, NOW_MS) == SENDER_KEY.public_key
    assert entry.public_key(SENDER_KEY.key_id, NOW_MS - 1) is None
    assert entry.public_key(SENDER_KEY.key_id, NOW_MS + DAY_MS) is None
    assert entry.public_key(b"another!", NOW_MS) is None
