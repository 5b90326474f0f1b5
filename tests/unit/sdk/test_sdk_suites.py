"""sealpush.suites: wrapping and unwrapping, and every key that cannot be wrapped to."""

import hashlib
import hmac
import json
import os
from pathlib import Path

import nacl.bindings
import nacl.utils
import pytest
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from sealpush.errors import EnvelopeRefused, KeyRefused
from sealpush.suites import PREKEY_PUBLIC_BYTES_MAX, SUITE_HYBRID, SUITE_X25519, SUITES, WRAPPED_BYTES_MAX, Suite

HYBRID = SUITES[SUITE_HYBRID]
PAYLOAD = bytes(range(64))
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    b"\xed" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 30 + b"\x7f",
]

suites = pytest.mark.parametrize("suite", SUITES.values(), ids=[f"suite {each}" for each in SUITES])


@suites
@settings(max_examples=30)
@given(seed=st.binary(min_size=32, max_size=32), payload=st.binary(min_size=64, max_size=64))
def test_what_is_wrapped_is_unwrapped_by_its_holder_alone(suite: Suite, seed: bytes, payload: bytes) -> None:
    private_key, public_key = suite.key_pair(lambda size: seed[:size])
    assert suite.key_pair(lambda size: seed[:size]) == (private_key, public_key)
    suite.check_public(public_key)
    wrapped = suite.wrap(payload, public_key, nacl.utils.random)
    assert (len(private_key), len(public_key), len(wrapped)) == (32, suite.public_bytes, suite.wrapped_bytes)
    assert suite.unwrap(wrapped, public_key, private_key) == payload
    other_private, other_public = suite.key_pair(nacl.utils.random)
    with pytest.raises(EnvelopeRefused):
        suite.unwrap(wrapped, other_public, other_private)


@suites
def test_every_known_suite_keeps_within_the_bounds_of_an_unknown_one(suite: Suite) -> None:
    assert suite.public_bytes <= PREKEY_PUBLIC_BYTES_MAX
    assert suite.wrapped_bytes <= WRAPPED_BYTES_MAX


@suites
def test_a_public_key_of_another_length_is_refused_and_so_is_wrapping_to_it(suite: Suite) -> None:
    _, public_key = suite.key_pair(nacl.utils.random)
    for bad in (b"", public_key[:-1], public_key + b"\0", public_key * 2):
        with pytest.raises(KeyRefused, match="usable"):
            suite.check_public(bad)
        with pytest.raises(KeyRefused, match="usable"):
            suite.wrap(PAYLOAD, bad, nacl.utils.random)


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("top_bit", [0, 0x80])
@suites
def test_a_low_order_x25519_half_is_refused_and_so_is_wrapping_to_it(suite: Suite, point: bytes, top_bit: int) -> None:
    _, public_key = suite.key_pair(nacl.utils.random)
    bad = public_key[:-32] + point[:31] + bytes((point[31] | top_bit,))
    with pytest.raises(KeyRefused, match="usable"):
        suite.check_public(bad)
    with pytest.raises(KeyRefused, match="usable"):
        suite.wrap(PAYLOAD, bad, nacl.utils.random)


@pytest.mark.parametrize("position", [0, 1, 767])
@pytest.mark.parametrize(("coefficient", "canonical"), [(3328, True), (3329, False), (4095, False)])
def test_an_ml_kem_coefficient_at_the_modulus_or_above_is_refused(position: int, coefficient: int, canonical: bool) -> None:
    _, public_key = HYBRID.key_pair(nacl.utils.random)
    # Two coefficients of 12 bits in 3 bytes, little-endian (FIPS 203, ByteEncode).
    packed = int.from_bytes(public_key[:1152], "little")
    packed = packed & ~(0xFFF << 12 * position) | coefficient << 12 * position
    changed = packed.to_bytes(1152, "little") + public_key[1152:]
    if canonical:
        HYBRID.check_public(changed)
    else:
        with pytest.raises(KeyRefused, match="usable"):
            HYBRID.check_public(changed)
        with pytest.raises(KeyRefused, match="usable"):
            HYBRID.wrap(PAYLOAD, changed, nacl.utils.random)


@suites
def test_whatever_was_not_wrapped_for_a_key_is_refused(suite: Suite) -> None:
    private_key, public_key = suite.key_pair(nacl.utils.random)
    wrapped = suite.wrap(PAYLOAD, public_key, nacl.utils.random)
    for bad in (b"", wrapped[:-1], wrapped + b"\0", os.urandom(len(wrapped)), wrapped[:-80] + bytes(80), bytes(len(wrapped))):
        with pytest.raises(EnvelopeRefused):
            suite.unwrap(bad, public_key, private_key)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_low_order_ephemeral_half_is_refused(point: bytes) -> None:
    private_key, public_key = HYBRID.key_pair(nacl.utils.random)
    wrapped = HYBRID.wrap(PAYLOAD, public_key, nacl.utils.random)
    with pytest.raises(EnvelopeRefused):
        HYBRID.unwrap(wrapped[:1088] + point + wrapped[1120:], public_key, private_key)


def test_suites_do_not_open_each_others_stanzas() -> None:
    seed = os.urandom(32)
    for one, other in ((SUITES[SUITE_X25519], HYBRID), (HYBRID, SUITES[SUITE_X25519])):
        _, to = one.key_pair(lambda _: seed)
        private_key, public_key = other.key_pair(lambda _: seed)
        with pytest.raises(EnvelopeRefused):
            other.unwrap(one.wrap(PAYLOAD, to, nacl.utils.random), public_key, private_key)


def hkdf_extract(salt: bytes, material: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), material, "sha256")


def hkdf_expand(key: bytes, info: bytes, size: int) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha256")[:size]


def apart(seed: bytes, enc: bytes, info: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Public key, shared secret, key and nonce: HPKE taken apart by RFC 9180 and the drafts' text, without the HPKE under test."""
    expanded = hashlib.shake_256(seed).digest(96)
    lattice, curve = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    curve_public = curve.public_key().public_bytes_raw()
    shared = hashlib.sha3_256(
        lattice.decapsulate(enc[:1088])
        + curve.exchange(x25519.X25519PublicKey.from_public_bytes(enc[1088:]))
        + enc[1088:]
        + curve_public
        + b"\\.//^\\"
    ).digest()
    suite_id = b"HPKE" + bytes.fromhex("647a00010003")

    def labeled_extract(salt: bytes, label: bytes, material: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + suite_id + label + material)

    def labeled_expand(key: bytes, label: bytes, info: bytes, size: int) -> bytes:
        return hkdf_expand(key, size.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info, size)

    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    secret = labeled_extract(shared, b"secret", b"")
    key, nonce = labeled_expand(secret, b"key", context, 32), labeled_expand(secret, b"base_nonce", context, 12)
    return lattice.public_key().public_bytes_raw() + curve_public, shared, key, nonce


def test_the_hybrid_is_hpke_with_the_kem_that_the_module_names() -> None:
    seed = os.urandom(32)
    _, public_key = HYBRID.key_pair(lambda _: seed)
    wrapped = HYBRID.wrap(PAYLOAD, public_key, nacl.utils.random)
    same_public_key, _, key, nonce = apart(seed, wrapped[:1120], b"SPE1-stanza")
    assert public_key == same_public_key
    assert nacl.bindings.crypto_aead_chacha20poly1305_ietf_decrypt(wrapped[1120:], b"", nonce, key) == PAYLOAD


def test_the_hybrid_agrees_with_the_published_vector() -> None:
    """Its `info` and additional data are not ours, so that its message is opened with the parts that the test above holds to ours."""
    published = json.loads((Path(__file__).parent / "hpke_published.json").read_text())
    del published["source"]
    vector = {name: bytes.fromhex(value) for name, value in published.items()}
    _, public_key = HYBRID.key_pair(lambda _: vector["seed"])
    assert public_key == vector["public_key"]
    assert apart(vector["seed"], vector["enc"], vector["info"]) == (
        public_key,
        vector["shared_secret"],
        vector["key"],
        vector["base_nonce"],
    )
    opened = nacl.bindings.crypto_aead_chacha20poly1305_ietf_decrypt(
        vector["ciphertext"], vector["aad"], vector["base_nonce"], vector["key"]
    )
    assert opened == vector["plaintext"]
