"""The checked-in test vectors, by the Python SDK. Other implementations read the same files."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl import bindings
from nacl.exceptions import CryptoError

from scripts import generate_vectors
from sealpush.envelope import (
    HEADER_BYTES,
    Envelope,
    Header,
    Recipient,
    TimeCheck,
    check_times,
    content_public_key,
    open_envelope,
    seal,
    verify_signature,
)
from sealpush.errors import ContentTooLarge, EntryRefused, EnvelopeRefused, KeyRefused, RevocationsRefused, SuiteUnsupported
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RecipientRef, RegistrationId, SenderId, SenderKeyId
from sealpush.keys import (
    SUITES_SUPPORTED,
    ContentSigningKey,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    RecipientDevice,
    RootKey,
    SignedPrekey,
    choose_prekey,
    content_key_id,
    prekey_proof,
    sign_sender_entry,
    verify_ed25519,
    verify_prekey,
    verify_sender_entry,
)
from sealpush.proofs import (
    AckOutcome,
    acknowledgement_proof,
    body_digest,
    challenge_proof,
    change_proof,
    registration_proof,
    sign_proof,
    verify_proof,
)
from sealpush.revocations import RevocationList, RevokedEntries, sign_revocations, verify_revocations

Json = dict[str, Any]

FOLDER = Path(__file__).resolve().parents[2] / "vectors"
FILES = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in generate_vectors.VECTORS}
SEAL, OPEN, SIGNATURES, PREKEYS, ENTRIES, PROOFS = (FILES[name] for name in ("seal", "open", "signatures", "prekeys", "entries", "proofs"))
REVOCATIONS = FILES["revocations"]


def cases(found: list[Json]) -> pytest.MarkDecorator:
    names = [case["name"] for case in found]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("case", found, ids=names)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def content_of(described: Json) -> bytes:
    return unhex(described["hex"]) if "hex" in described else unhex(described["repeat"]) * described["length"]


def header_of(fields: Json) -> Header:
    return Header(
        content_id=ContentId(unhex(fields["content_id"])),
        sender_id=SenderId(unhex(fields["sender_id"])),
        sender_key_id=SenderKeyId(unhex(fields["sender_key_id"])),
        recipient_ref=RecipientRef(unhex(fields["recipient_ref"])),
        created_at_ms=fields["created_ms"],
        expires_at_ms=fields["expires_ms"],
        flags=fields["flags"],
    )


def drawn_from(data: bytes) -> Callable[[int], bytes]:
    rest = [data]

    def random(size: int) -> bytes:
        drawn, rest[0] = rest[0][:size], rest[0][size:]
        return drawn

    return random


def lookup_of(device: Json) -> Callable[[int, int, PrekeyKind], PrekeyPrivate | None]:
    def lookup(suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
        for each in device["prekeys"]:
            if (each["suite"], each["prekey_id"], each["kind"]) == (suite, prekey_id, kind):
                return PrekeyPrivate(suite, prekey_id, kind, unhex(each["public_key"]), unhex(each["private_key"]), 0, 1)
        return None

    return lookup


def test_the_files_are_what_the_script_makes() -> None:
    assert generate_vectors.stale_files() == []


# --- sealing ---------------------------------------------------------------------------------------------------------


@cases(SEAL["cases"])
def test_sealing_gives_these_bytes_and_every_recipient_opens_them(case: Json) -> None:
    signer = ContentSigningKey.from_seed(unhex(SEAL["signers"][case["signer"]]["seed"]))
    assert signer.key_id.hex() == SEAL["signers"][case["signer"]]["key_id"]
    recipients = []
    for each in case["recipients"]:
        device = SEAL["devices"][each["device"]]
        (prekey,) = (prekey for prekey in device["prekeys"] if prekey["kind"] == each["kind"])
        recipients.append(
            Recipient(DeviceId(unhex(device["device_id"])), prekey["prekey_id"], PrekeyKind(each["kind"]), unhex(prekey["public_key"]))
        )
    content = content_of(case["content"])
    sealed = seal(content, header_of(case["header"]), recipients, signer, random=drawn_from(unhex(case["random"])))
    data, expected = sealed.encode(), case["expect"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (expected["bytes"], expected["sha256"])
    if "envelope" in expected:
        assert data.hex() == expected["envelope"]
    else:
        assert sealed.head.hex() == expected["head"]
        assert [stanza.encode().hex() for stanza in sealed.stanzas] == expected["stanzas"]
        assert sealed.tail[-64:].hex() == expected["signature"]
    for each in case["recipients"]:
        device = SEAL["devices"][each["device"]]
        device_id = DeviceId(unhex(device["device_id"]))
        for form in (data, sealed.for_device(device_id)):
            opened = open_envelope(form, device_id=device_id, private_prekey_lookup=lookup_of(device), sender_public_key=signer.public_key)
            assert opened == content


@cases(SEAL["refused"])
def test_sealing_is_refused(case: Json) -> None:
    signer = ContentSigningKey.from_seed(unhex(SEAL["signers"][case["signer"]]["seed"]))
    with pytest.raises((ValueError, ContentTooLarge, SuiteUnsupported, KeyRefused)):
        seal(
            content_of(case["content"]),
            header_of(case["header"]),
            [
                Recipient(
                    DeviceId(unhex(each["device_id"])),
                    each["prekey_id"],
                    PrekeyKind(each["kind"]),
                    unhex(each["public_key"]),
                    each["suite"],
                )
                for each in case["recipients"]
            ],
            signer,
        )


# --- opening ---------------------------------------------------------------------------------------------------------


def envelope_of(case: Json) -> bytes:
    if "envelope" in case:
        return unhex(case["envelope"])
    data = bytearray(unhex(OPEN["bases"][case["base"]]))
    for change in case["changes"]:
        match change["op"]:
            case "flip":
                data[change["offset"]] ^= change["mask"]
            case "replace":
                replacement = unhex(change["hex"])
                data[change["offset"] : change["offset"] + len(replacement)] = replacement
            case "truncate":
                del data[change["length"] :]
            case "append":
                data += unhex(change["hex"])
            case other:
                raise AssertionError(other)
    return bytes(data)


def context_of(case: Json) -> Json:
    context: Json = OPEN["context"] | case.get("context", {})
    return context


def whole_device(data: bytes, context: Json) -> bytes:
    """All checks of a device in their order, by the SDK's own functions."""
    device = OPEN["devices"][context["device"]]
    device_id = DeviceId(unhex(device["device_id"]))
    parsed = Envelope.parse(data)
    header = parsed.header
    if check_times(header, context["now_ms"], context["skew_ms"]) is not TimeCheck.OK:
        raise EnvelopeRefused
    if [header.sender_id.hex(), header.content_id.hex()] in context["seen"]:
        raise EnvelopeRefused
    return open_envelope(
        data,
        device_id=device_id,
        private_prekey_lookup=lookup_of(device),
        sender_public_key=entry_key(header, context),
        min_suite=context["min_suite"],
    )


def entry_key(header: Header, context: Json) -> bytes:
    root, now_ms = unhex(context["root_public_key"]), context["now_ms"]
    # A sealed-by-server case may hand over a sender's entry in the platform's place: the role decides.
    try:
        sender = verify_sender_entry(root, unhex(context["sender_entry"]), now_ms)
        platform = None
        if header.server_sealed and context["platform_entry"]:
            platform = verify_sender_entry(root, unhex(context["platform_entry"]), now_ms, role=EntryRole.PLATFORM)
    except EntryRefused:
        raise EnvelopeRefused from None
    return content_public_key(header, sender, platform)


def stages(data: bytes, context: Json) -> Iterator[str]:
    """The stages as they are reached; the last one refuses. Put together from the SDK's parts and libsodium."""
    yield "parse"
    parsed = Envelope.parse(data)
    header = parsed.header
    yield "stanza"
    device = OPEN["devices"][context["device"]]
    device_id = DeviceId(unhex(device["device_id"]))
    stanza = parsed.stanza_for(device_id)
    if stanza is None or stanza.suite not in SUITES_SUPPORTED or stanza.suite < context["min_suite"]:
        return
    yield "times"
    if check_times(header, context["now_ms"], context["skew_ms"]) is not TimeCheck.OK:
        return
    yield "seen"
    if [header.sender_id.hex(), header.content_id.hex()] in context["seen"]:
        return
    yield "entry"
    public_key = entry_key(header, context)
    yield "signature"
    verify_signature(parsed, public_key)
    yield "unwrap"
    prekey = lookup_of(device)(stanza.suite, stanza.prekey_id, stanza.kind)
    if prekey is None:
        return
    payload = bindings.crypto_box_seal_open(stanza.wrapped, prekey.public_key, prekey.private_key)
    yield "binding"
    header_bytes = data[:HEADER_BYTES]
    if payload[32:] != hashlib.sha256(header_bytes + device_id + stanza.prekey_id.to_bytes(4, "big") + bytes((stanza.kind,))).digest():
        return
    yield "commit"
    if parsed.head[HEADER_BYTES:] != hashlib.sha256(b"SPE1-commit" + payload[:32] + header_bytes).digest():
        return
    yield "open"
    bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(parsed.tail[28:-64], header_bytes, parsed.tail[4:28], payload[:32])
    yield "unpad"


def last_stage(data: bytes, context: Json) -> str:
    reached = ""
    try:
        for stage in stages(data, context):
            reached = stage
    except (EnvelopeRefused, CryptoError):
        pass
    return reached


@cases(OPEN["opened"])
def test_a_device_opens(case: Json) -> None:
    assert whole_device(envelope_of(case), context_of(case)) == content_of(OPEN["content"])


@cases(OPEN["refused"])
def test_a_device_refuses_at_the_stage_that_the_vector_names(case: Json) -> None:
    data, context = envelope_of(case), context_of(case)
    with pytest.raises(EnvelopeRefused):
        whole_device(data, context)
    assert last_stage(data, context) == case["stage"]


def test_every_stage_and_every_byte_of_the_header_has_a_refusal() -> None:
    assert {case["stage"] for case in OPEN["refused"]} == set(OPEN["stages"])
    flips = {change["offset"] for case in OPEN["refused"] for change in case.get("changes", ()) if change["op"] == "flip"}
    assert set(range(HEADER_BYTES)) <= flips


# --- signatures, prekeys, entries, proofs ----------------------------------------------------------------------------


@cases(SIGNATURES["cases"])
def test_signatures_are_checked_strictly(case: Json) -> None:
    assert verify_ed25519(unhex(case["public_key"]), unhex(case["message"]), unhex(case["signature"])) is case["valid"]


def prekey_of(fields: Json) -> SignedPrekey:
    return SignedPrekey(
        suite=fields["suite"],
        prekey_id=fields["prekey_id"],
        kind=PrekeyKind(fields["kind"]),
        public_key=unhex(fields["public_key"]),
        created_at_ms=fields["created_ms"],
        expires_at_ms=fields["expires_ms"],
        signature=unhex(fields["signature"]),
    )


@cases(PREKEYS["verify"])
def test_prekeys_are_accepted_or_refused(case: Json) -> None:
    device_id = DeviceId(unhex(case["device_id"]))

    def verify() -> None:
        verify_prekey(
            prekey_of(case["prekey"]),
            device_id=device_id,
            identity_public_key=unhex(case["identity_public_key"]),
            now_ms=case["now_ms"],
            min_suite=case["min_suite"],
        )

    if not case["accepted"]:
        with pytest.raises((KeyRefused, ValueError), match=r"prekey|PrekeyKind"):
            verify()
        return
    verify()
    prekey = prekey_of(case["prekey"])
    proof = prekey_proof(prekey, device_id, case["min_suite"])
    assert proof.hex() == case["signed_bytes"]
    assert IdentityKey.from_seed(unhex(PREKEYS["identity_seed"])).sign(proof) == prekey.signature


@cases(PREKEYS["choose"])
def test_the_prekey_to_seal_to_is_chosen(case: Json) -> None:
    device = RecipientDevice(
        DeviceId(unhex(PREKEYS["device_id"])),
        IdentityKey.from_seed(unhex(PREKEYS["identity_seed"])).public_key,
        prekey_of(case["signed_prekey"]),
        prekey_of(case["one_time_prekey"]) if case["one_time_prekey"] else None,
    )
    if case["chosen"] == "refused":
        with pytest.raises((KeyRefused, SuiteUnsupported)):
            choose_prekey(device, PREKEYS["now_ms"])
    else:
        assert choose_prekey(device, PREKEYS["now_ms"]) == prekey_of(case[case["chosen"]])


@cases(ENTRIES["verify"])
def test_entries_are_read_or_refused(case: Json) -> None:
    root = RootKey.from_seed(unhex(ENTRIES["root_seed"]))
    assert root.public_key.hex() == ENTRIES["root_public_key"]
    blob = unhex(case["blob"])
    if case["entry"] is None:
        with pytest.raises(EntryRefused):
            verify_sender_entry(root.public_key, blob, case["now_ms"], role=EntryRole(case["role"]))
        return
    entry = verify_sender_entry(root.public_key, blob, case["now_ms"], role=EntryRole(case["role"]))
    assert generate_vectors.entry_json(entry) == case["entry"]
    assert sign_sender_entry(root, entry) == blob
    for key in entry.keys:
        assert entry.public_key(content_key_id(key.public_key), key.not_before_ms) == key.public_key
        assert entry.public_key(content_key_id(key.public_key), key.not_after_ms) is None


def statement_of(case: Json) -> bytes:
    fields: Json = {name: int(value) if name in ("counter", "at_ms") else value for name, value in case["fields"].items()}
    match case["statement"]:
        case "challenge":
            return challenge_proof(unhex(fields["challenge"]), DeviceId(unhex(fields["device_id"])))
        case "registration":
            registration_id = RegistrationId(unhex(fields["registration_id"]))
            return registration_proof(registration_id, unhex(fields["identity_public_key"]), AppId(fields["app_id"]))
        case "acknowledgement":
            return acknowledgement_proof(
                MessageId(unhex(fields["message_id"])),
                ContentId(unhex(fields["content_id"])),
                DeviceId(unhex(fields["device_id"])),
                AckOutcome(fields["outcome"]),
                fields["reason_code"],
                fields["at_ms"],
            )
        case "change":
            digest = body_digest(unhex(fields["body"]))
            return change_proof(DeviceId(unhex(fields["device_id"])), fields["counter"], fields["method"], digest)
        case other:
            raise AssertionError(other)


@cases(PROOFS["cases"])
def test_statements_have_these_bytes_and_signatures(case: Json) -> None:
    identity = IdentityKey.from_seed(unhex(PROOFS["identity_seed"]))
    statement = statement_of(case)
    assert statement.hex() == case["signed_bytes"]
    assert sign_proof(identity, statement).hex() == case["signature"]


@cases(PROOFS["refused"])
def test_statements_out_of_bounds_are_refused(case: Json) -> None:
    with pytest.raises(ValueError, match=r"must|valid"):
        statement_of(case)


@cases(PROOFS["verify"])
def test_proofs_are_checked(case: Json) -> None:
    assert verify_proof(unhex(case["public_key"]), unhex(case["signed_bytes"]), unhex(case["signature"])) is case["valid"]


def revocations_json(found: RevocationList) -> Json:
    items: list[Json] = [
        {"kind": 1, "sender_id": item.sender_id.hex(), "serial": str(item.serial)}
        if isinstance(item, RevokedEntries)
        else {"kind": 2, "public_key": item.public_key.hex()}
        for item in found.items
    ]
    return {"serial": str(found.serial), "issued_ms": found.issued_ms, "items": items}


@cases(REVOCATIONS["verify"])
def test_revocation_lists_are_read_or_refused(case: Json) -> None:
    root = RootKey.from_seed(unhex(REVOCATIONS["root_seed"]))
    assert root.public_key.hex() == REVOCATIONS["root_public_key"]
    blob = unhex(case["blob"])
    if case["list"] is None:
        with pytest.raises(RevocationsRefused):
            verify_revocations(root.public_key, blob)
        return
    found = verify_revocations(root.public_key, blob)
    assert revocations_json(found) == case["list"]
    assert sign_revocations(root, found) == blob


@cases(REVOCATIONS["rising_keys"])
def test_a_revocation_list_has_a_largest_size(case: Json) -> None:
    listed = b"".join(b"\x02" + number.to_bytes(32, "big") for number in range(case["keys"]))
    blob = unhex(case["head"]) + listed + unhex(case["signature"])
    if not case["accepted"]:
        with pytest.raises(RevocationsRefused):
            verify_revocations(unhex(REVOCATIONS["root_public_key"]), blob)
        return
    found = verify_revocations(unhex(REVOCATIONS["root_public_key"]), blob)
    assert len(found.items) == case["keys"]
    assert found.revokes_key((case["keys"] - 1).to_bytes(32, "big"))
    assert not found.revokes_key(case["keys"].to_bytes(32, "big"))


@cases(REVOCATIONS["judged"])
def test_what_is_revoked_does_not_count(case: Json) -> None:
    root, now_ms = unhex(REVOCATIONS["root_public_key"]), REVOCATIONS["now_ms"]
    revoked = verify_revocations(root, unhex(case["list"]))
    entries = [verify_sender_entry(root, unhex(case["sender_entry"]), now_ms)]
    if case["platform_entry"]:
        entries.append(verify_sender_entry(root, unhex(case["platform_entry"]), now_ms, role=EntryRole.PLATFORM))
    public_key = unhex(case["public_key"])
    assert entries[-1].public_key(content_key_id(public_key), now_ms) == public_key
    assert (not any(map(revoked.revokes_entry, entries)) and not revoked.revokes_key(public_key)) is case["trusted"]


def test_the_scripts_own_hsalsa20_is_libsodiums() -> None:
    """The low-order cases rest on it: with it wrong they would be refused for the wrong reason."""
    secret, point = generate_vectors.bytes_for("a"), bindings.crypto_scalarmult_base(generate_vectors.bytes_for("b"))
    shared = bindings.crypto_scalarmult(secret, point)
    assert generate_vectors.hsalsa20(bytes(16), shared) == bindings.crypto_box_beforenm(point, secret)


def test_a_check_that_drifts_from_the_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_vectors, "OUT", tmp_path)
    monkeypatch.setattr(generate_vectors, "VECTORS", {"signatures": generate_vectors.signature_vectors})
    assert generate_vectors.stale_files() == ["signatures.json"]
    (tmp_path / "signatures.json").write_text(generate_vectors.render(generate_vectors.signature_vectors()), encoding="utf-8")
    (tmp_path / "surplus.json").write_text("{}", encoding="utf-8")
    assert generate_vectors.stale_files() == ["surplus.json"]
