from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.base import (
    RETRY_AFTER_MAX,
    Bug,
    HttpAnswer,
    PushEnvironment,
    PushTarget,
    PushToken,
    RetryAt,
    WakeUp,
    WakeUpPriority,
    clean_reason,
    parse_retry_after,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECRET = "3f" * 32


def test_push_token_is_never_printed() -> None:
    target = PushTarget(PushToken(SECRET), PushEnvironment.PRODUCTION, "ua.bank.app", NOW)
    for text in (repr(target), str(target), f"{target.token}", f"{target.token!r}", "%s" % target.token):  # noqa: UP031 - somebody may write it so
        assert SECRET not in text
        assert "PushToken(…)" in text


@pytest.mark.parametrize("value", ["", "a\nb", "ключ", "a" * 5000])
def test_malformed_push_token_is_refused_without_quoting_it(value: str) -> None:
    with pytest.raises(ValueError, match="a push token has") as refusal:
        PushToken(value)
    assert not value or value not in str(refusal.value)


def test_push_tokens_compare_by_value() -> None:
    assert len({PushToken(SECRET), PushToken(SECRET), PushToken("ab")}) == 2


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=100) | st.integers() | st.none())
def test_reason_is_always_short_and_plain(text: object) -> None:
    reason = clean_reason(text)
    assert 0 < len(reason) <= 64
    assert all(character.isalnum() or character in "._-" for character in reason)
    assert Bug(reason).reason == reason


def test_reason_that_quotes_something_is_dropped() -> None:
    assert RetryAt("no such token: " + SECRET).reason == "unreadable"


def test_wake_up_has_one_wire_id_and_one_uuid_for_all_repeats() -> None:
    first, second = (WakeUp(bytes(range(16)), muted=muted, priority=WakeUpPriority.HIGH, expires_at=NOW) for muted in (False, True))
    assert first.wire_id == second.wire_id == "AAECAwQFBgcICQoLDA0ODw"
    assert first.request_uuid == second.request_uuid
    assert first.request_uuid.version == 4
    assert first.request_uuid.variant == uuid.RFC_4122


def test_naive_times_and_short_ids_are_refused() -> None:
    naive = NOW.replace(tzinfo=None)
    with pytest.raises(ValueError, match="aware"):
        PushTarget(PushToken(SECRET), PushEnvironment.PRODUCTION, "a", naive)
    with pytest.raises(ValueError, match="aware"):
        WakeUp(bytes(16), muted=False, priority=WakeUpPriority.HIGH, expires_at=naive)
    with pytest.raises(ValueError, match="16 bytes"):
        WakeUp(bytes(15), muted=False, priority=WakeUpPriority.HIGH, expires_at=NOW)


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("120", timedelta(minutes=2)),
        ("999999999", RETRY_AFTER_MAX),
        ("Sun, 01 Mar 2026 12:01:00 GMT", timedelta(minutes=1)),
        ("Sun, 01 Mar 2026 11:00:00 GMT", timedelta(0)),
        ("Sun, 01 Mar 2099 11:00:00 GMT", RETRY_AFTER_MAX),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_bounded(value: str | None, delay: timedelta | None) -> None:
    headers = {} if value is None else {"retry-after": value}
    assert parse_retry_after(HttpAnswer(503, headers), NOW) == delay
