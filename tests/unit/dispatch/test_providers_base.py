from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sealpushd.dispatch.providers import apns, fcm, hms
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
from sealpushd.dispatch.providers.http import clock_is_wrong
from sealpushd.dispatch.providers.oauth import read_grant

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


# What a header may hold at all, and numbers and dates of every size in every place.
YEARS = st.integers(0, 10**12) | st.sampled_from([0, 1, 9999, 10_000, 2**31, 2**63, 99999999999])
DATES = st.builds(
    lambda day, year, hour, zone: f"Sun, {day} Mar {year} {hour}:00:00 {zone}",
    st.integers(0, 10**11),
    YEARS,
    st.integers(0, 10**11),
    st.sampled_from(["GMT", "+0000", "-0000", "+9999", "-9999", "+99999999999", "EST", ""]),
)
HEADERS = st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60) | YEARS.map(str) | DATES


@given(retry_after=HEADERS, date=HEADERS)
@example(retry_after="Sun, 01 Mar 99999999999 11:00:00 GMT", date=None)
@example(retry_after=None, date="Sun, 01 Mar 99999999999 11:00:00 GMT")
@example(retry_after="Fri, 31 Dec 9999 23:59:59 -0100", date="Mon, 01 Jan 0001 00:00:00 +0100")
@example(retry_after="99999999999", date=None)
def test_no_header_of_a_push_service_raises_or_asks_for_more_than_is_honest(retry_after: str | None, date: str | None) -> None:
    headers = {name: value for name, value in (("retry-after", retry_after), ("date", date)) if value is not None}
    for status in (400, 401, 403, 429, 500, 503):
        answer = HttpAnswer(status, headers, b'{"reason": "TooManyRequests", "error": "x", "code": "80000000"}')
        pause = parse_retry_after(answer, NOW)
        assert pause is None or timedelta(0) <= pause <= RETRY_AFTER_MAX
        clock_is_wrong(answer, NOW)
        apns.classify(answer, "id", NOW)
        fcm.classify(answer, NOW)
        hms.classify(answer, NOW)
        for signed in (True, False):
            read_grant(answer, NOW, signed=signed)


@pytest.mark.parametrize("value", ["9999999999", "99999999999", "Sun, 01 Mar 99999999999 11:00:00 GMT", "Sun, 01 Mar 10000 11:00:00 GMT"])
def test_a_pause_that_is_too_large_counts_as_none(value: str) -> None:
    assert parse_retry_after(HttpAnswer(503, {"retry-after": value}), NOW) is None


def test_a_date_to_wait_for_counts_from_the_answers_own_date() -> None:
    headers = {"retry-after": "Sun, 01 Mar 2026 11:01:00 GMT", "date": "Sun, 01 Mar 2026 11:00:00 GMT"}
    for ours in (NOW, NOW + timedelta(days=365), NOW - timedelta(days=365)):
        assert parse_retry_after(HttpAnswer(503, headers), ours) == timedelta(minutes=1)
