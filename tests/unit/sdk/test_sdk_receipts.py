"""Receipts: what they prove after any change, and what a reader takes."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.envelope import FLAG_SERVER_SEALED, Envelope, Header, evidence_of, seal
from sealpush.errors import ReceiptRefused
from sealpush.ids import ContentId, DeviceId, MessageId, RecipientRef, SenderId, uuid7
from sealpush.keys import DAY_MS, ContentSigningKey, EntryKey, EntryRole, IdentityKey, RootKey, SenderEntry, SenderMode, sign_sender_entry
from sealpush.model import Reason, State
from sealpush.proofs import NO_DIGEST, AckOutcome, acknowledgement_proof
from sealpush.receipts import (
    DELIVERIES_MAX,
    RECEIPT_BYTES_MAX,
    Finding,
    Receipt,
    ReceiptDelivery,
    ReceiptVerdict,
    SignedAcknowledgement,
    verify_receipt,
)

NOW_MS = 1_700_000_000_000
ROOT = RootKey.from_seed(b"\x01" * 32)
KEY = ContentSigningKey.from_seed(b"\x02" * 32)
IDENTITY = IdentityKey.from_seed(b"\x03" * 32)
SENDER_ID, CONTENT_ID, DEVICE_ID = SenderId(b"S" * 16), ContentId(b"C" * 16), DeviceId(b"D" * 16)
MESSAGE_ID = MessageId(uuid7(NOW_MS))
# What no receipt proves by itself, whoever made it.
NEVER = {"acceptance", "recipient", "content", "not_revoked"}


def signed_entry(role: EntryRole) -> bytes:
    modes = SenderMode.SERVER if role is EntryRole.PLATFORM else SenderMode.SERVER | SenderMode.END_TO_END
    key = EntryKey(KEY.public_key, NOW_MS - DAY_MS, NOW_MS + DAY_MS)
    return sign_sender_entry(ROOT, SenderEntry(SENDER_ID, "Банк", modes, (key,), NOW_MS - DAY_MS, NOW_MS + DAY_MS, 1, role))


def sealed(text: bytes = b"text", *, server: bool = False) -> Envelope:
    flags = FLAG_SERVER_SEALED if server else 0
    return seal(text, Header(CONTENT_ID, SENDER_ID, KEY.key_id, RecipientRef(b"R" * 32), NOW_MS, NOW_MS + DAY_MS, flags), [], KEY)


def signed(digest: bytes, outcome: AckOutcome, reason: Reason = Reason.UNSPECIFIED, at_ms: int = NOW_MS) -> SignedAcknowledgement:
    proof = acknowledgement_proof(MESSAGE_ID, CONTENT_ID, digest, DEVICE_ID, outcome, reason, at_ms)
    return SignedAcknowledgement(outcome, reason, at_ms, IDENTITY.sign(proof))


def receipt(made: Envelope, *acknowledgements: SignedAcknowledgement, state: State = State.DELIVERED) -> Receipt:
    delivery = ReceiptDelivery(DEVICE_ID, IDENTITY.public_key, state, Reason.UNSPECIFIED, acknowledgements)
    return Receipt(
        MESSAGE_ID,
        SENDER_ID,
        CONTENT_ID,
        evidence_of(made.head, made.tail),
        signed_entry(EntryRole.SENDER),
        signed_entry(EntryRole.PLATFORM) if made.header.server_sealed else b"",
        (delivery,),
    )


def delivered(made: Envelope) -> Receipt:
    return receipt(made, signed(made.digest, AckOutcome.DELIVERED), signed(made.digest, AckOutcome.READ))


DELIVERED = delivered(sealed())
DELIVERED_BY_SERVER = delivered(sealed(server=True))


def all_proven(verdict: ReceiptVerdict) -> bool:
    return all(each.finding is Finding.PROVEN for each in verdict.claims if each.name not in NEVER)


@pytest.mark.parametrize("made", [DELIVERED, DELIVERED_BY_SERVER], ids=["sender", "server"])
def test_what_was_not_changed_is_proven(made: Receipt) -> None:
    verdict = verify_receipt(made, ROOT.public_key)
    assert all_proven(verdict)
    assert not verdict.failed
    assert verdict.sender_proven
    assert verdict.delivered_to == (DEVICE_ID,)


def places(document: Any, *path: str | int) -> list[tuple[str | int, ...]]:
    """Where each value stands."""
    if isinstance(document, dict):
        return [place for name, value in document.items() for place in places(value, *path, name)]
    if isinstance(document, list):
        return [place for number, value in enumerate(document) for place in places(value, *path, number)]
    return [path]


DOCUMENTS = [json.loads(each.to_json()) for each in (DELIVERED, DELIVERED_BY_SERVER)]


@given(st.sampled_from([(document, place) for document in DOCUMENTS for place in places(document)]), st.data())
def test_no_bit_of_any_field_changes_without_being_noticed(where: tuple[Any, tuple[str | int, ...]], data: st.DataObject) -> None:
    document, (*steps, last) = where
    changed = json.loads(json.dumps(document))
    place = changed
    for step in steps:
        place = place[step]
    value = place[last]
    if isinstance(value, int):
        place[last] = value ^ 1 << data.draw(st.integers(0, 15))
    elif last == "at_ms":
        place[last] = str(int(value) ^ 1 << data.draw(st.integers(0, 63)))
    elif last == "format":
        place[last] = value.swapcase()
    elif value:
        bits = bytearray(bytes.fromhex(value))
        bit = data.draw(st.integers(0, 8 * len(bits) - 1))
        bits[bit // 8] ^= 1 << bit % 8
        place[last] = bits.hex()
    else:
        place[last] = "00"
    try:
        verdict = verify_receipt(Receipt.from_json(json.dumps(changed).encode()), ROOT.public_key)
    except ReceiptRefused:
        return
    assert not all_proven(verdict)


@given(st.integers(0, len(DELIVERED.to_json()) - 1), st.integers(1, 255))
def test_no_byte_of_the_file_changes_without_being_noticed(at: int, mask: int) -> None:
    data = bytearray(DELIVERED.to_json().encode())
    data[at] ^= mask
    try:
        found = Receipt.from_json(bytes(data))
    except ReceiptRefused:
        return
    # White space changed into other white space, and nothing else, leaves the receipt as it was.
    assert found == DELIVERED or not all_proven(verify_receipt(found, ROOT.public_key))


@given(st.binary(max_size=400))
def test_what_is_no_receipt_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(ReceiptRefused):
        Receipt.from_json(data)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b'"' + b"a" * RECEIPT_BYTES_MAX + b'"', b"\xef\xbb\xbf{}"]
)
def test_what_would_burst_a_reader_is_refused(data: bytes) -> None:
    with pytest.raises(ReceiptRefused):
        Receipt.from_json(data)


def test_a_newer_version_says_what_to_do() -> None:
    with pytest.raises(ReceiptRefused, match="upgrade"):
        Receipt.from_json(DELIVERED.to_json().replace('"version": 1', '"version": 2').encode())


acknowledgements = st.builds(
    SignedAcknowledgement,
    st.sampled_from(AckOutcome),
    st.integers(0, 65535).map(Reason),
    st.integers(0, 2**64 - 1),
    st.binary(min_size=64, max_size=64),
)
deliveries = st.builds(
    ReceiptDelivery,
    st.binary(min_size=16, max_size=16).map(DeviceId),
    st.just(b"") | st.binary(min_size=32, max_size=32),
    st.integers(0, 65535).map(State),
    st.integers(0, 65535).map(Reason),
    st.lists(acknowledgements, max_size=3).map(tuple),
)
receipts = st.builds(
    Receipt,
    st.binary(min_size=16, max_size=16).map(MessageId),
    st.binary(min_size=16, max_size=16).map(SenderId),
    st.binary(min_size=16, max_size=16).map(ContentId),
    st.just(b"") | st.binary(min_size=254, max_size=254) | st.just(DELIVERED.evidence),
    st.binary(max_size=100) | st.just(DELIVERED.sender_entry),
    st.binary(max_size=100) | st.just(DELIVERED_BY_SERVER.platform_entry),
    st.lists(deliveries, min_size=1, max_size=3, unique_by=lambda each: each.device_id).map(tuple),
)


@given(receipts)
def test_a_file_holds_a_receipt_exactly_and_any_receipt_gets_a_verdict(made: Receipt) -> None:
    assert Receipt.from_json(made.to_json().encode()) == made
    verdict = verify_receipt(made, ROOT.public_key, envelope=b"")
    # Nobody but the holder of these keys signs.
    assert not any(each.finding is Finding.PROVEN for each in verdict.claims if each.device_id is not None)


def test_the_largest_receipt_there_can_be_is_read() -> None:
    ack = SignedAcknowledgement(AckOutcome.UNDELIVERED, Reason(65535), 2**64 - 1, bytes(64))
    devices = tuple(
        ReceiptDelivery(DeviceId(n.to_bytes(16, "big")), bytes(32), State(65535), Reason(65535), (ack,) * 3) for n in range(DELIVERIES_MAX)
    )
    made = dataclasses.replace(DELIVERED, sender_entry=bytes(1009), platform_entry=bytes(1009), deliveries=devices)
    assert Receipt.from_json(made.to_json().encode()) == made
    with pytest.raises(ValueError, match="1 to 512"):
        dataclasses.replace(made, deliveries=(*devices, dataclasses.replace(devices[0], device_id=DeviceId(b"x" * 16))))


def test_nothing_in_it_is_believed_once_something_fails() -> None:
    (delivery,) = DELIVERED.deliveries
    broken = dataclasses.replace(delivery.acknowledgements[1], at_ms=0)
    forged = dataclasses.replace(delivery, acknowledgements=(delivery.acknowledgements[0], broken))
    verdict = verify_receipt(dataclasses.replace(DELIVERED, deliveries=(forged,)), ROOT.public_key)
    assert verdict.failed
    assert not verdict.sender_proven
    assert verdict.delivered_to == ()


def test_what_was_signed_over_one_envelope_proves_nothing_of_another_under_the_same_content_id() -> None:
    """Both are truly signed by the sender; only one was ever opened."""
    opened, shown = sealed(b"You owe 1."), sealed(b"You owe 1000000.")
    forged = dataclasses.replace(delivered(opened), evidence=delivered(shown).evidence)
    verdict = verify_receipt(forged, ROOT.public_key)
    assert {each.name for each in verdict.claims if each.finding is Finding.FAILED} == {"delivered", "read"}
    assert verdict.delivered_to == ()


@pytest.mark.parametrize("outcome", AckOutcome)
def test_only_what_could_not_be_delivered_counts_without_an_envelope(outcome: AckOutcome) -> None:
    made = receipt(sealed(), signed(NO_DIGEST, outcome), state=State.UNDELIVERED)
    claims = {each.name: each.finding for each in verify_receipt(made, ROOT.public_key).claims}
    if outcome is AckOutcome.UNDELIVERED:
        assert (claims["unreadable"], claims["state"]) == (Finding.PROVEN, Finding.PROVEN)
    else:
        assert claims[outcome.name.lower()] is Finding.FAILED
    # Nobody signed that this envelope came with this message.
    assert claims["message"] is Finding.UNPROVEN


def test_without_evidence_what_the_device_signed_cannot_be_told() -> None:
    verdict = verify_receipt(dataclasses.replace(DELIVERED, evidence=b""), ROOT.public_key)
    assert not verdict.failed
    assert verdict.delivered_to == ()
    assert {each.finding for each in verdict.claims if each.device_id} == {Finding.UNPROVEN}


def test_a_verdict_needs_a_root() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        verify_receipt(DELIVERED, bytes(31))


def test_a_repr_shows_no_bytes_that_fill_a_screen() -> None:
    assert len(repr(DELIVERED)) < 1000
