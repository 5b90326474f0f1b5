"""The decisions of accounts."""

from __future__ import annotations

import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.envelope import FLAG_SERVER_SEALED, Header
from sealpush.ids import AppId, ContentId, RecipientRef, SenderId, uuid7
from sealpush.keys import DAY_MS, ContentSigningKey, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry
from sealpushd.accounts import rules
from sealpushd.accounts.rules import Account, AccountSender, App, SignedEntry, Standing
from sealpushd.platform.access import SCOPES, address_allowed
from sealpushd.platform.errors import InvalidRequest

HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def png(width: int, height: int) -> bytes:
    return HEADER + struct.pack(">II", width, height) + bytes(9)


def sender(name: str, *, is_default: bool = False) -> AccountSender:
    return AccountSender(SenderId(uuid7()), name, (AppId("app"),), SCOPES, is_default)


def account(*senders: AccountSender) -> Account:
    return Account(uuid7(), b"$argon2id$...", (), senders)


def test_a_logo_of_exactly_512_pixels_is_taken() -> None:
    assert rules.check_logo(png(512, 512)) == png(512, 512)
    assert rules.check_logo(b"") is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_logo_of_any_other_size_is_refused(width: int, height: int) -> None:
    if (width, height) != (512, 512):
        with pytest.raises(InvalidRequest):
            rules.check_logo(png(width, height))


@given(st.binary(max_size=64))
def test_what_is_no_png_is_refused_cleanly(data: bytes) -> None:
    if data and not data.startswith(HEADER):
        with pytest.raises(InvalidRequest):
            rules.check_logo(data)


def test_a_logo_that_is_cut_or_too_large_is_refused() -> None:
    for wrong in (png(512, 512)[:-1], png(512, 512) + bytes(rules.LOGO_BYTES_MAX)):
        with pytest.raises(InvalidRequest):
            rules.check_logo(wrong)


@given(st.lists(st.ip_addresses(v=4).map(lambda address: f"{address}/32"), min_size=1, max_size=8))
def test_an_address_of_a_listed_network_is_allowed(networks: list[str]) -> None:
    checked = rules.check_networks(networks)
    assert all(address_allowed(network.removesuffix("/32"), checked) for network in networks)
    assert rules.check_networks(checked) == checked


@pytest.mark.parametrize("network", ["", "10.0.0.1/8", "300.0.0.0/8", "bank.example", "10.0.0.0/33"])
def test_what_is_no_network_is_refused(network: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rules.check_networks([network])
    assert caught.value.field == "networks"


def test_no_more_networks_than_a_token_can_carry() -> None:
    networks = [f"10.0.{n}.0/24" for n in range(65)]
    with pytest.raises(InvalidRequest):
        rules.check_networks(networks)
    assert len(rules.check_networks(networks[:64])) == 64


def test_no_scopes_means_all_of_them() -> None:
    assert set(rules.check_scopes([])) == SCOPES
    assert rules.check_scopes(["status", "publish", "status"]) == ("publish", "status")


def test_a_named_sender_speaks_else_the_default_else_the_only_one() -> None:
    cards, loans = sender("cards"), sender("loans", is_default=True)
    assert rules.choose_sender(account(cards, loans), "cards") is cards
    assert rules.choose_sender(account(cards, loans), "") is loans
    assert rules.choose_sender(account(cards), "") is cards
    for nobody in (account(), account(cards, sender("more"))):
        with pytest.raises(InvalidRequest):
            rules.choose_sender(nobody, "")
    with pytest.raises(InvalidRequest):
        rules.choose_sender(account(cards), "Cards")


def test_apps_of_one_sender_share_their_root() -> None:
    one, two = App(AppId("one"), "One", b"r" * 32), App(AppId("two"), "Two", b"s" * 32)
    assert rules.common_root([AppId("one")], [one, two]) == b"r" * 32
    for asked in ([AppId("one"), AppId("two")], [AppId("three")]):
        with pytest.raises(InvalidRequest):
            rules.common_root(asked, [one, two])


@given(st.text(max_size=70))
def test_a_login_is_what_its_description_says(text: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert rules.is_login(text) == (1 <= len(text) <= 64 and set(text) <= allowed)


@pytest.mark.parametrize("password", ["elevenbytes", "x" * 257])
def test_a_password_outside_its_bounds_is_refused_without_repeating_it(password: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rules.check_new_password(password)
    assert password not in str(caught.value)


NOW = datetime(2026, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("networks", "address", "signed_in_at", "expected"),
    [
        ((), "192.0.2.7", None, Standing.STRANGE),
        ((), "192.0.2.7", NOW - timedelta(days=30), Standing.PROVEN),
        ((), "192.0.2.7", NOW - timedelta(days=30, seconds=1), Standing.STRANGE),
        (("192.0.2.0/24",), "192.0.2.7", None, Standing.INSIDE),
        (("192.0.2.0/24",), "192.0.2.7", NOW, Standing.PROVEN),
        (("192.0.2.0/24",), "192.0.2.7", NOW - timedelta(days=31), Standing.INSIDE),
        # Its networks were changed since.
        (("198.51.100.0/24",), "192.0.2.7", NOW, Standing.STRANGE),
    ],
)
def test_what_an_address_is_to_an_organisation(
    networks: tuple[str, ...], address: str, signed_in_at: datetime | None, expected: Standing
) -> None:
    assert rules.standing(replace(account(), networks=networks), address, signed_in_at, now=NOW) is expected
    assert rules.standing(None, address, signed_in_at, now=NOW) is Standing.STRANGE


def test_a_failure_counts_for_nobody_who_is_proven_elsewhere() -> None:
    counted = {each: set(rules.failures_counted("bank", "192.0.2.7", each)) for each in Standing}
    others = set(rules.failures_counted("bank", "198.51.100.1", Standing.STRANGE))
    assert not others & counted[Standing.PROVEN]
    assert not others & counted[Standing.INSIDE]
    assert others & counted[Standing.STRANGE]


def test_an_account_does_not_print_its_password_hash() -> None:
    assert "argon2" not in repr(account())


# Entries of the past

NOW_MS = 1_700_000_000_000
SENDER_ID = SenderId(b"S" * 16)
ROOT, OTHER_ROOT = RootKey.from_seed(b"\x01" * 32), RootKey.from_seed(b"\x02" * 32)
KEY, PLATFORM_KEY = ContentSigningKey.from_seed(b"\x03" * 32), ContentSigningKey.from_seed(b"\x04" * 32)
BOTH = SenderMode.END_TO_END | SenderMode.SERVER


def entry(
    key: ContentSigningKey = KEY,
    *,
    root: RootKey = ROOT,
    modes: SenderMode = BOTH,
    role: EntryRole = EntryRole.SENDER,
    since: int = NOW_MS - DAY_MS,
    sender_id: SenderId = SENDER_ID,
) -> SignedEntry:
    until = NOW_MS + DAY_MS
    made = SenderEntry(sender_id, "A bank", modes, (EntryKey(key.public_key, NOW_MS - DAY_MS, until),), since, until, 1, role)
    return SignedEntry(root.public_key, sign_sender_entry(root, made))


def platform_entry(key: ContentSigningKey = PLATFORM_KEY, *, root: RootKey = ROOT) -> SignedEntry:
    return entry(key, root=root, modes=SenderMode.SERVER, role=EntryRole.PLATFORM)


def header(*, server: bool = False) -> Header:
    key, flags = (PLATFORM_KEY, FLAG_SERVER_SEALED) if server else (KEY, 0)
    return Header(ContentId(bytes(16)), SENDER_ID, key.key_id, RecipientRef(bytes(32)), NOW_MS, NOW_MS + DAY_MS, flags)


def test_the_first_entry_that_lists_the_key_certifies_it() -> None:
    other, first, second = entry(PLATFORM_KEY), entry(), entry(modes=SenderMode.END_TO_END)
    assert rules.certifying(header(), [other, first, second], []) == (first.signed_entry, b"")
    assert rules.certifying(header(), [other], []) is None
    assert rules.certifying(header(), [], []) is None


def test_what_the_server_sealed_needs_a_sender_that_allows_it_and_the_platforms_key() -> None:
    only_itself, allowing = entry(modes=SenderMode.END_TO_END), entry()
    old, platform = platform_entry(KEY), platform_entry()
    certified = rules.certifying(header(server=True), [only_itself, allowing], [old, platform])
    assert certified == (allowing.signed_entry, platform.signed_entry)
    assert rules.certifying(header(server=True), [only_itself], [platform]) is None
    assert rules.certifying(header(server=True), [allowing], [old]) is None
    assert rules.certifying(header(server=True), [allowing], []) is None


def test_sender_and_platform_are_certified_by_one_root() -> None:
    sender, platform = entry(), platform_entry()
    other_sender, other_platform = entry(root=OTHER_ROOT), platform_entry(root=OTHER_ROOT)
    assert rules.certifying(header(server=True), [sender], [other_platform]) is None
    certified = rules.certifying(header(server=True), [sender, other_sender], [other_platform])
    assert certified == (other_sender.signed_entry, other_platform.signed_entry)
    certified = rules.certifying(header(server=True), [sender, other_sender], [other_platform, platform])
    assert certified == (sender.signed_entry, platform.signed_entry)


def test_an_entry_that_was_not_in_force_or_is_not_the_roots_certifies_nothing() -> None:
    later, forged, foreign = entry(since=NOW_MS + 3_600_000), entry(root=OTHER_ROOT), entry(sender_id=SenderId(b"O" * 16))
    forged = SignedEntry(ROOT.public_key, forged.signed_entry)
    assert rules.certifying(header(), [later, forged, foreign, SignedEntry(ROOT.public_key, b"rubbish")], []) is None


def test_only_the_header_of_an_envelope_is_taken() -> None:
    assert rules.check_header(header().encode()) == header()
    for wrong in (b"", bytes(94), header().encode()[:-1], header().encode() + b"\0"):
        with pytest.raises(InvalidRequest):
            rules.check_header(wrong)
