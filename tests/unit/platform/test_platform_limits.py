"""Whom a limit counts."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sealpushd.platform.addresses import address_subject
from sealpushd.platform.errors import wait_in_words


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


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (timedelta(0), "1 second"),
        (timedelta(seconds=1.2), "2 seconds"),
        (timedelta(seconds=119), "119 seconds"),
        (timedelta(seconds=121), "3 minutes"),
        (timedelta(minutes=119), "119 minutes"),
        (timedelta(hours=23, minutes=1), "24 hours"),
    ],
)
def test_a_wait_in_words_is_never_shorter_than_it_is(wait: timedelta, words: str) -> None:
    assert wait_in_words(wait) == words
