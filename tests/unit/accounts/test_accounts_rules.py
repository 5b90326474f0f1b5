"""The decisions of accounts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import AppId, SenderId, uuid7
from sealpushd.accounts import rules
from sealpushd.accounts.rules import Account, AccountSender, App
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


def test_failures_from_outside_are_counted_apart() -> None:
    assert rules.failure_subject("bank", inside=True) != rules.failure_subject("bank", inside=False)


def test_an_account_does_not_print_its_password_hash() -> None:
    assert "argon2" not in repr(account())
