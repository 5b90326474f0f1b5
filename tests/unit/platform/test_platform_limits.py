"""Whom a limit counts."""

from __future__ import annotations

import pytest

from sealpushd.platform.limits import address_subject


@pytest.mark.parametrize(
    ("address", "subject"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2::7", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::7", "2001:db8:1:3::/64"),
        # A Unix socket has none.
        ("", ""),
    ],
)
def test_addresses_that_one_machine_can_choose_among_count_as_one(address: str, subject: str) -> None:
    assert address_subject(address) == subject
