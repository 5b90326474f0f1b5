"""sealpush.revocations: one encoding, one root, and what a list revokes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.errors import RevocationsRefused
from sealpush.ids import SenderId
from sealpush.keys import TIME_MS_MAX, ContentSigningKey, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode
from sealpush.revocations import (
    REVOCATIONS_BYTES_MAX,
    REVOCATIONS_MAX,
    RevocationList,
    Revoked,
    RevokedEntries,
    RevokedKey,
    revoking,
    sign_revocations,
    verify_revocations,
)

ROOT = RootKey.from_seed(b"\x22" * 32)
NOW_MS = 1_700_000_000_000
SENDER = SenderId(b"S" * 16)
KEY = b"K" * 32
SIGNING_KEY = ContentSigningKey.from_seed(KEY)
LIST = RevocationList(7, NOW_MS, (RevokedEntries(SENDER, 5), RevokedKey(KEY)))

items = st.one_of(
    st.builds(RevokedEntries, st.binary(min_size=16, max_size=16).map(SenderId), st.integers(0, 2**64 - 1)),
    st.builds(RevokedKey, st.binary(min_size=32, max_size=32)),
)


@st.composite
def lists(draw: st.DrawFn) -> RevocationList:
    found: list[Revoked] = draw(st.lists(items, max_size=12, unique_by=lambda item: item.subject))
    in_order = tuple(sorted(found, key=lambda item: item.encode()))
    return RevocationList(draw(st.integers(1, 2**64 - 1)), draw(st.integers(0, TIME_MS_MAX)), in_order)


def entry(serial: int = 5, *, sender_id: SenderId = SENDER, role: EntryRole = EntryRole.SENDER) -> SenderEntry:
    return SenderEntry(sender_id, "Bank", SenderMode.SERVER, (EntryKey(SIGNING_KEY.public_key, 0, NOW_MS),), 0, NOW_MS, serial, role)


@given(lists())
def test_a_signed_list_is_read_as_it_was_written(revocations: RevocationList) -> None:
    signed = sign_revocations(ROOT, revocations)
    assert verify_revocations(ROOT.public_key, signed) == revocations
    assert len(signed) <= REVOCATIONS_BYTES_MAX


@given(lists(), st.data())
def test_a_changed_byte_is_noticed(revocations: RevocationList, data: st.DataObject) -> None:
    signed = bytearray(sign_revocations(ROOT, revocations))
    signed[data.draw(st.integers(0, len(signed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RevocationsRefused):
        verify_revocations(ROOT.public_key, bytes(signed))


@given(lists(), st.integers(0, 40))
def test_a_list_cut_short_is_refused_also_when_it_is_signed(revocations: RevocationList, dropped: int) -> None:
    body = revocations.encode()
    cut = body[: max(0, len(body) - 1 - dropped)]
    with pytest.raises(RevocationsRefused):
        verify_revocations(ROOT.public_key, cut + ROOT.sign(b"SPC1-revoked" + cut))


@given(st.binary(max_size=200))
def test_signed_bytes_that_are_no_list_are_refused_and_what_is_read_is_written_the_same(body: bytes) -> None:
    for candidate in (body, b"SPRL\x01" + body):
        try:
            found = verify_revocations(ROOT.public_key, candidate + ROOT.sign(b"SPC1-revoked" + candidate))
        except RevocationsRefused:
            continue
        assert found.encode() == candidate


def test_another_root_another_tag_and_other_bytes_behind_it_are_refused() -> None:
    signed = sign_revocations(ROOT, LIST)
    body = LIST.encode()
    for blob, root in (
        (signed, RootKey.generate()),
        (body + ROOT.sign(b"SPC1-entry" + body), ROOT),
        (body + b"\0" + ROOT.sign(b"SPC1-revoked" + body + b"\0"), ROOT),
        (signed + b"\0", ROOT),
        (b"", ROOT),
        (bytes(REVOCATIONS_BYTES_MAX + 1), ROOT),
    ):
        with pytest.raises(RevocationsRefused):
            verify_revocations(root.public_key, blob)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"serial": 0}, "serial"),
        ({"serial": 2**64}, "serial"),
        ({"issued_ms": -1}, "issued_ms"),
        ({"issued_ms": TIME_MS_MAX + 1}, "issued_ms"),
        ({"items": (RevokedKey(KEY), RevokedEntries(SENDER, 5))}, "rise"),
        ({"items": (RevokedKey(KEY), RevokedKey(KEY))}, "rise"),
        ({"items": (RevokedEntries(SENDER, 5), RevokedEntries(SENDER, 6))}, "rise"),
        ({"items": tuple(RevokedKey(n.to_bytes(32, "big")) for n in range(REVOCATIONS_MAX + 1))}, "at most 4096"),
    ],
)
def test_a_list_has_one_form(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(LIST, **fields)  # type: ignore[arg-type]  # the fields are wrong on purpose


def test_a_full_list_can_be_signed_and_read() -> None:
    full = RevocationList(1, NOW_MS, tuple(RevokedKey(n.to_bytes(32, "big")) for n in range(REVOCATIONS_MAX)))
    signed = sign_revocations(ROOT, full)
    assert len(signed) == REVOCATIONS_BYTES_MAX
    assert verify_revocations(ROOT.public_key, signed) == full
    with pytest.raises(ValueError, match="at most 4096"):
        revoking(full, [RevokedKey(KEY)], issued_ms=NOW_MS)


def test_entries_are_revoked_up_to_a_serial_and_keys_everywhere() -> None:
    assert [LIST.revokes_entry(entry(serial)) for serial in (0, 4, 5, 6)] == [True, True, True, False]
    assert LIST.revokes_entry(entry(role=EntryRole.PLATFORM))
    assert not LIST.revokes_entry(entry(sender_id=SenderId(b"T" * 16)))
    assert LIST.revokes_key(KEY)
    assert not LIST.revokes_key(b"k" * 32)


def test_the_next_list_revokes_what_the_one_before_did_and_more() -> None:
    first = revoking(None, [RevokedKey(KEY), RevokedEntries(SENDER, 5)], issued_ms=NOW_MS)
    assert first == replace(LIST, serial=1)
    second = revoking(first, [RevokedEntries(SENDER, 9)], issued_ms=NOW_MS + 1)
    assert second == RevocationList(2, NOW_MS + 1, (RevokedEntries(SENDER, 9), RevokedKey(KEY)))
    for again in (RevokedEntries(SENDER, 9), RevokedEntries(SENDER, 8), RevokedKey(KEY)):
        with pytest.raises(ValueError, match="already"):
            revoking(second, [again], issued_ms=NOW_MS)


@given(lists().filter(lambda found: found.serial < 2**64 - 1), items)
def test_adding_never_takes_anything_back(revocations: RevocationList, more: Revoked) -> None:
    try:
        following = revoking(revocations, [more], issued_ms=NOW_MS)
    except ValueError:
        assert more.subject in {item.subject for item in revocations.items}
        return
    assert following.serial == revocations.serial + 1
    for item in (*revocations.items, more):
        if isinstance(item, RevokedKey):
            assert following.revokes_key(item.public_key)
        else:
            assert following.revokes_entry(entry(item.serial, sender_id=item.sender_id))


def test_fields_of_an_item_are_checked() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        RevokedKey(b"short")
    with pytest.raises(ValueError, match="64 bits"):
        RevokedEntries(SENDER, 2**64)
    with pytest.raises(ValueError, match="sender_id"):
        RevokedEntries(SenderId(b"short"), 1)
