"""Write the test vectors that every implementation of the formats reads, or check that they are current.

    python scripts/generate_vectors.py            write tests/vectors/*.json
    python scripts/generate_vectors.py --check    exit 1 when what is checked in differs

Everything follows from fixed seeds, so the files change only when a format does. What a genuine sender makes comes from
the SDK; what only a dishonest one makes is put together here, from the text of the format. The expected stage of each
refusal is stated by hand, not taken from the code under test. docs/device-protocol.md tells how to read the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nacl import bindings

from sealpush import envelope, keys, proofs
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RecipientRef, RegistrationId, SenderId
from sealpush.keys import DAY_MS, TIME_MS_MAX, EntryKey, EntryRole, PrekeyKind, SenderEntry, SenderMode

OUT = Path(__file__).resolve().parent.parent / "tests/vectors"

Json = dict[str, Any]

NOW_MS = 1_700_000_000_000
SKEW_MS = 5 * 60 * 1000
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
    """A device of the vectors: an identity, a signed and a one-time prekey."""

    def __init__(self, number: int) -> None:
        self.device_id = DeviceId(bytes_for(f"device {number}", 16))
        self.identity = keys.IdentityKey.from_seed(bytes_for(f"identity {number}"))
        self.private: dict[PrekeyKind, keys.PrekeyPrivate] = {}
        self.prekeys: dict[PrekeyKind, keys.SignedPrekey] = {}
        # The largest prekey id there is belongs to the last phone.
        first_id = 0xFFFFFFFE if number == 7 else number * 2
        for offset, kind in enumerate(PrekeyKind):
            secret = bytes_for(f"prekey {number} {kind.value}")
            self.private[kind], self.prekeys[kind] = keys.generate_prekey(
                self.identity, self.device_id, prekey_id=first_id + offset, kind=kind, now_ms=NOW_MS, random=drawn_from(secret)
            )

    def recipient(self, kind: PrekeyKind) -> envelope.Recipient:
        return envelope.Recipient.of(self.device_id, self.prekeys[kind])

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


# --- sealing and opening ---------------------------------------------------------------------------------------------


def sealing_case(
    name: str,
    content: bytes,
    content_json: Json,
    recipients: list[tuple[int, PrekeyKind]],
    *,
    header: envelope.Header = HEADER,
    signer: str = "bank",
) -> Json:
    random = bytes_for(f"randomness of {name}", 32 + 24 + 32 * len(recipients))
    to = [PHONES[number].recipient(kind) for number, kind in recipients]
    sealed = envelope.seal(content, header, to, SIGNERS[signer], random=drawn_from(random))
    data = sealed.encode()
    expected: Json = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
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
) -> bytes:
    """An envelope for the first phone, put together by hand and truly signed, with parts of the caller's choice."""
    content_key, nonce = bytes_for("forged CEK"), bytes_for("forged nonce", 24)
    prekey = PHONE.private[SIGNED]
    device_id, prekey_id, kind = bound_to or (PHONE.device_id, prekey.prekey_id, prekey.kind.value)
    if bound is None:
        bound = hashlib.sha256(header + device_id + struct.pack(">IB", prekey_id, kind)).digest()
    if commit is None:
        commit = hashlib.sha256(b"SPE1-commit" + content_key + header).digest()
    if padded is None:
        padded = b"content\x80" + bytes(248)
    payload = content_key + bound
    if ephemeral is None:
        secret = bytes_for("forged ephemeral key")
        point = bindings.crypto_scalarmult_base(secret)
        box_nonce = hashlib.blake2b(point + prekey.public_key, digest_size=24).digest()
        wrapped = point + bindings.crypto_box_easy(payload, box_nonce, prekey.public_key, secret)
    else:
        wrapped = box_to_a_known_secret(ephemeral, payload, prekey.public_key)
    stanza = PHONE.device_id + struct.pack(">BIBH", 1, prekey.prekey_id, prekey.kind.value, len(wrapped)) + wrapped
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
        "stages": ["parse", "stanza", "times", "seen", "entry", "signature", "unwrap", "binding", "commit", "open", "unpad"],
        "devices": [phone.described() for phone in PHONES[:3]],
        "context": {
            "device": 0,
            "now_ms": NOW_MS,
            "skew_ms": SKEW_MS,
            "min_suite": 1,
            "seen": [],
            "root_public_key": ROOT.public_key.hex(),
            "sender_entry": signed_entry(entry()),
            "platform_entry": signed_entry(PLATFORM_ENTRY),
        },
        "content": {"hex": b"content".hex()},
        "bases": {"one device": one.hex(), "two devices": two.hex(), "by the server": server.hex()},
        "opened": opened,
        "refused": refused,
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

    def choice(name: str, chosen: str, signed_prekey: keys.SignedPrekey, one_time_prekey: keys.SignedPrekey | None) -> Json:
        return {
            "name": name,
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
) -> bytes:
    """An entry's bytes by the text of the format, also where the SDK would not make them."""
    head = magic + bytes((version, role, modes)) + SENDER_ID + struct.pack(">QQQ", 9, *window)
    named = bytes((len(name) if name_bytes is None else name_bytes,)) + name
    certified = b"".join(bytes_for(f"certified key {0 if same_key else i}") + struct.pack(">QQ", *w) for i, w in enumerate(key_windows))
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
    many_keys = tuple(EntryKey(bytes_for(f"entry key {number}"), number, TIME_MS_MAX) for number in range(16))
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

    def acknowledge(name: str, outcome: proofs.AckOutcome, reason_code: int = 0, at_ms: int = NOW_MS) -> Json:
        proof = proofs.acknowledgement_proof(message, content, device, outcome, reason_code, at_ms)
        ids = {"message_id": message.hex(), "content_id": content.hex(), "device_id": device.hex()}
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
        changed("a preference", "/sealpush.v1.Registration/SetPreference", b"change bytes"),
        changed("unregistering, which has no bytes", "/sealpush.v1.Registration/Unregister", b"", counter=2**32),
        changed("the largest counter", "/m", b"\x00", counter=u64_max),
        changed("the longest method", "/" + "m" * 99, b"body"),
    ]
    delivered, challenged = cases[4], cases[1]
    ack_fields, challenge_fields, change_fields = delivered["fields"], challenged["fields"], cases[9]["fields"]
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
            refused("an app id of 256 bytes", "registration", register_fields, app_id="a" * 256),
            refused("an identity key of 31 bytes", "registration", register_fields, identity_public_key="00" * 31),
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
    "open": open_vectors,
    "signatures": signature_vectors,
    "prekeys": prekey_vectors,
    "entries": entry_vectors,
    "proofs": proof_vectors,
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
    if parser.parse_args().check:
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
