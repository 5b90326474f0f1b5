"""The checked-in test vectors, by the Python SDK. Other implementations read the same files."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl import bindings
from nacl.exceptions import CryptoError

from scripts import generate_vectors
from sealpush.devicelog import DeviceLog, EntryKind, LogEntry, fingerprint
from sealpush.envelope import (
    HEADER_BYTES,
    Envelope,
    Header,
    Recipient,
    Stanza,
    TimeCheck,
    check_times,
    content_public_key,
    open_envelope,
    seal,
    verify_signature,
)
from sealpush.errors import (
    ContentTooLarge,
    DeviceLogBroken,
    EntryRefused,
    EnvelopeRefused,
    KeyRefused,
    ReceiptRefused,
    RevocationsRefused,
    SuiteUnsupported,
)
from sealpush.floor import Floor
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RecipientRef, RegistrationId, SenderId, SenderKeyId, SubscriberId
from sealpush.keys import (
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
    vouch_proof,
)
from sealpush.receipts import Receipt, verify_receipt
from sealpush.revocations import RevocationList, RevokedEntries, sign_revocations, verify_revocations
from sealpush.suites import SUITE_HYBRID, SUITE_X25519, SUITES

Json = dict[str, Any]

FOLDER = Path(__file__).resolve().parents[2] / "vectors"
FILES = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in generate_vectors.VECTORS}
SIGNATURES, PREKEYS, ENTRIES, PROOFS, RECEIPTS = (FILES[name] for name in ("signatures", "prekeys", "entries", "proofs", "receipts"))
DEVICE_LOG, REVOCATIONS = FILES["devicelog"], FILES["revocations"]
SEAL_FILES, OPEN_FILES = ("seal", "seal_hybrid"), ("open", "open_hybrid")


def cases(found: list[Json]) -> pytest.MarkDecorator:
    names = [case["name"] for case in found]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("case", found, ids=names)


def cases_of(files: tuple[str, ...], section: str) -> pytest.MarkDecorator:
    """The cases of a section in files of the same form, each with its file."""
    found = [(FILES[name], case, f"{name}: {case['name']}") for name in files for case in FILES[name][section]]
    names = [name for _, _, name in found]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize(("file", "case"), [(file, case) for file, case, _ in found], ids=names)


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


@cases_of(SEAL_FILES, "cases")
def test_sealing_gives_these_bytes_and_every_recipient_opens_them(file: Json, case: Json) -> None:
    signer = ContentSigningKey.from_seed(unhex(file["signers"][case["signer"]]["seed"]))
    assert signer.key_id.hex() == file["signers"][case["signer"]]["key_id"]
    recipients = []
    draw = drawn_from(unhex(case["random"]))
    random = draw(32 + 24)
    for each in case["recipients"]:
        device = file["devices"][each["device"]]
        (prekey,) = (prekey for prekey in device["prekeys"] if prekey["kind"] == each["kind"])
        recipients.append(
            Recipient(
                DeviceId(unhex(device["device_id"])),
                prekey["prekey_id"],
                PrekeyKind(each["kind"]),
                unhex(prekey["public_key"]),
                prekey["suite"],
            )
        )
        # What suite 2 encapsulates with cannot be injected here.
        random += draw(32) if prekey["suite"] == SUITE_X25519 else draw(64)[:0]
    content, expected = content_of(case["content"]), case["expect"]
    sealed = seal(content, header_of(case["header"]), recipients, signer, random=drawn_from(random))
    # So the stanzas of suite 2 are taken from the file, and everything else is what was sealed here.
    given = given_stanzas(expected)
    ours = tuple(given[n] if each.suite == SUITE_HYBRID else each for n, each in enumerate(sealed.stanzas))
    sealed = dataclasses.replace(sealed, stanzas=ours)
    data = sealed.encode()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (expected["bytes"], expected["sha256"])
    assert sealed.digest.hex() == expected["envelope_digest"]
    if "envelope" in expected:
        assert data.hex() == expected["envelope"]
    else:
        assert sealed.head.hex() == expected["head"]
        assert [stanza.encode().hex() for stanza in sealed.stanzas] == expected["stanzas"]
        assert sealed.tail[-64:].hex() == expected["signature"]
    for each in case["recipients"]:
        device = file["devices"][each["device"]]
        device_id = DeviceId(unhex(device["device_id"]))
        for form in (data, sealed.for_device(device_id)):
            opened = open_envelope(form, device_id=device_id, private_prekey_lookup=lookup_of(device), sender_public_key=signer.public_key)
            assert opened == content


def given_stanzas(expected: Json) -> list[Stanza]:
    if "stanzas" in expected:
        return [Stanza.decode(unhex(each)) for each in expected["stanzas"]]
    return list(Envelope.parse(unhex(expected["envelope"])).stanzas)


@cases_of(SEAL_FILES, "refused")
def test_sealing_is_refused(file: Json, case: Json) -> None:
    signer = ContentSigningKey.from_seed(unhex(file["signers"][case["signer"]]["seed"]))
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


def envelope_of(file: Json, case: Json) -> bytes:
    if "envelope" in case:
        return unhex(case["envelope"])
    data = bytearray(unhex(file["bases"][case["base"]]))
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


def context_of(file: Json, case: Json) -> Json:
    """With the device itself in the place of its number."""
    context: Json = file["context"] | case.get("context", {})
    return context | {"device": file["devices"][context["device"]]}


def whole_device(data: bytes, context: Json) -> bytes:
    """All checks of a device in their order, by the SDK's own functions."""
    device = context["device"]
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
        min_suite=min_suite_of(header, context),
    )


def min_suite_of(header: Header, context: Json) -> int:
    """What the device accepts for this content."""
    if context["raised_at_ms"] is None:
        return int(context["min_suite"])
    return Floor(context["min_suite"], context["raised_at_ms"]).min_suite(header.created_at_ms)


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
    device = context["device"]
    device_id = DeviceId(unhex(device["device_id"]))
    stanza = parsed.stanza_for(device_id)
    if stanza is None or stanza.suite not in SUITES or stanza.suite < min_suite_of(header, context):
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
    payload = SUITES[stanza.suite].unwrap(stanza.wrapped, prekey.public_key, prekey.private_key)
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


@cases_of(OPEN_FILES, "opened")
def test_a_device_opens(file: Json, case: Json) -> None:
    assert whole_device(envelope_of(file, case), context_of(file, case)) == content_of(file["content"])


@cases_of(OPEN_FILES, "refused")
def test_a_device_refuses_at_the_stage_that_the_vector_names(file: Json, case: Json) -> None:
    data, context = envelope_of(file, case), context_of(file, case)
    with pytest.raises(EnvelopeRefused):
        whole_device(data, context)
    assert last_stage(data, context) == case["stage"]


def sweep(file: Json, case: Json) -> Iterator[tuple[bytes, str]]:
    """Each flipped envelope and the stage that must refuse it."""
    base = unhex(file["bases"][case["base"]])
    signer = ContentSigningKey.from_seed(unhex(file["signer_seed"]))
    stages = [stage for stage, count in case["stages"] for _ in range(count)]
    assert len(stages) % len(case["masks"]) == 0
    for n, stage in enumerate(stages):
        data = bytearray(base)
        data[case["offset"] + n // len(case["masks"]) * case["step"]] ^= case["masks"][n % len(case["masks"])]
        if "content_offset" in case:
            content = data[case["content_offset"] : -64]
            signed = b"SPE1-sig" + hashlib.sha512(data[: HEADER_BYTES + 32] + hashlib.sha512(content).digest()).digest()
            data[-64:] = signer.sign(signed)
        yield bytes(data), stage


@cases_of(OPEN_FILES, "swept")
def test_a_device_refuses_every_flip_of_a_sweep(file: Json, case: Json) -> None:
    context = context_of(file, case)
    for data, stage in sweep(file, case):
        with pytest.raises(EnvelopeRefused):
            whole_device(data, context)
        assert last_stage(data, context) == stage


@pytest.mark.parametrize(("name", "base"), [(name, base) for name in OPEN_FILES for base in FILES[name]["truncated"]])
def test_a_device_refuses_every_beginning_of_an_envelope(name: str, base: str) -> None:
    file = FILES[name]
    whole, context = unhex(file["bases"][base]), context_of(file, {})
    for length in range(len(whole)):
        with pytest.raises(EnvelopeRefused):
            whole_device(whole[:length], context)
        assert last_stage(whole[:length], context) == "parse"


def test_every_stage_has_a_refusal_and_every_bit_of_the_header_two() -> None:
    file = FILES["open"]
    assert {case["stage"] for case in file["refused"]} == set(file["stages"])
    sweeps = [case for case in file["swept"] if case["offset"] == 0]
    assert ["content_offset" in case for case in sweeps] == [False, True]
    for case in sweeps:
        assert (case["step"], case["masks"]) == (1, [1 << bit for bit in range(8)])
        assert sum(count for _, count in case["stages"]) == HEADER_BYTES * 8


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
        case["min_suite"],
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
                unhex(fields["envelope_digest"]),
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


def receipt_text(base: str, changes: list[Json]) -> str:
    document: Any = json.loads(json.dumps(RECEIPTS["receipts"][base]))
    for change in changes:
        *steps, last = change["path"]
        place = document
        for step in steps:
            place = place[step]
        place[last] = change["value"]
    return json.dumps(document, ensure_ascii=False)


@cases(RECEIPTS["cases"])
def test_receipts_prove_what_the_vector_says(case: Json) -> None:
    receipt = Receipt.from_json(receipt_text(case["receipt"], case["changes"]).encode())
    kept = None if case["envelope"] is None else unhex(case["envelope"])
    root = unhex(case["root_public_key"])
    revocations = None if case["revocations"] is None else verify_revocations(root, unhex(case["revocations"]))
    verdict = verify_receipt(receipt, root, envelope=kept, revocations=revocations)
    places = {each.device_id: f" {n}" for n, each in enumerate(receipt.deliveries)} | {None: ""}
    found = {each.name + places[each.device_id]: each.finding.name.lower() for each in verdict.claims}
    assert len(found) == len(verdict.claims)
    assert found == case["claims"]


@cases(RECEIPTS["readable"])
def test_receipts_are_read_however_they_are_laid_out(case: Json) -> None:
    receipt = Receipt.from_json(case["text"].encode())
    assert json.loads(receipt.to_json()) == RECEIPTS["receipts"]["own"]
    assert Receipt.from_json(receipt.to_json().encode()) == receipt


@cases(RECEIPTS["refused"])
def test_what_is_no_receipt_is_refused(case: Json) -> None:
    text = case["text"] if "text" in case else receipt_text("own", case["changes"])
    with pytest.raises(ReceiptRefused):
        Receipt.from_json(text.encode())


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


# --- the device log ---------------------------------------------------------------------------------------------------


@cases(DEVICE_LOG["entries"])
def test_an_entry_of_a_device_log_reads_and_writes_as_these_bytes(case: Json) -> None:
    fields = case["fields"]
    by = fields["by_device_id"]
    made = LogEntry(
        EntryKind(fields["kind"]),
        DeviceId(unhex(fields["device_id"])),
        unhex(fields["identity_public_key"]),
        fields["time_ms"],
        fields["recovered"],
        None if by is None else DeviceId(unhex(by)),
        unhex(fields["signature"]),
    )
    assert made.encode().hex() == case["entry"]
    assert LogEntry.decode(unhex(case["entry"])) == made


@cases(DEVICE_LOG["entries_refused"])
def test_bytes_that_are_no_entry_of_a_device_log_are_refused(case: Json) -> None:
    with pytest.raises(ValueError, match=r"not an entry|EntryKind"):
        LogEntry.decode(unhex(case["entry"]))


@cases(DEVICE_LOG["logs"])
def test_a_device_log_has_these_heads_and_devices(case: Json) -> None:
    log = DeviceLog.start(SubscriberId(unhex(case["subscriber_id"])))
    heads = [log.head]
    for entry in case["entries"]:
        log = log.then(unhex(entry))
        heads.append(log.head)
    assert [each.hex() for each in heads] == case["heads"]
    assert log.seq == len(case["entries"])
    assert [
        {
            "device_id": each.device_id.hex(),
            "identity_public_key": each.identity_public_key.hex(),
            "added_ms": each.added_at_ms,
            "added_head": each.added_head.hex(),
            "vouched": each.vouched,
        }
        for each in log.devices.values()
    ] == case["devices"]


@cases(DEVICE_LOG["logs_refused"])
def test_a_broken_device_log_is_refused_at_its_last_entry(case: Json) -> None:
    *entries, last = map(unhex, case["entries"])
    log = DeviceLog.read(SubscriberId(unhex(case["subscriber_id"])), entries)
    with pytest.raises(DeviceLogBroken):
        log.then(last)


def test_a_vouch_is_these_bytes() -> None:
    vouch = DEVICE_LOG["vouch"]
    fields = vouch["fields"]
    proof = vouch_proof(
        DeviceId(unhex(fields["device_id"])),
        unhex(fields["identity_public_key"]),
        DeviceId(unhex(fields["by_device_id"])),
        unhex(fields["added_head"]),
    )
    assert proof.hex() == vouch["signed_bytes"]
    assert sign_proof(IdentityKey.from_seed(unhex(vouch["identity_seed"])), proof).hex() == vouch["signature"]


@cases(DEVICE_LOG["fingerprints"])
def test_a_fingerprint_has_these_digits(case: Json) -> None:
    devices = [(DeviceId(unhex(each["device_id"])), unhex(each["identity_public_key"])) for each in case["devices"]]
    assert fingerprint(devices) == case["fingerprint"]
