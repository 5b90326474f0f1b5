"""The watch over the clock, and what a token's holder and reader make of a clock that is set."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sealpushd.platform.clock import CLOCK_MOVED, CLOCK_SKEW_MAX, Reading
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.errors import StoreUnavailable, Unauthenticated
from sealpushd.platform.tokens import LEEWAY_S, MESH_TOKEN_LIFETIME_S, ServiceKey, TokenVerifier
from tests.clocks import FakeClock

HOUR = timedelta(hours=1)


@given(passed=st.timedeltas(timedelta(0), timedelta(days=400)), jump=st.timedeltas(timedelta(days=-400), timedelta(days=400)))
def test_a_reading_tells_time_that_passed_from_a_clock_that_was_set(passed: timedelta, jump: timedelta) -> None:
    clock = FakeClock()
    reading = Reading.of(clock)
    clock.advance(passed)
    assert not reading.was_set(clock)
    clock.jump(jump)
    assert abs(reading.moved(clock) - jump) < timedelta(milliseconds=1)
    if abs(abs(jump) - CLOCK_MOVED) > timedelta(milliseconds=1):
        assert reading.was_set(clock) is (abs(jump) > CLOCK_MOVED)


def test_the_watch_logs_each_move_once_and_says_nothing_of_time_that_passes() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    with capture_logs() as logs:
        for _ in range(100):
            clock.advance(HOUR)
            assert watch.look() is None
        assert logs == []
        clock.jump(-HOUR)
        assert watch.look() == -HOUR
        assert watch.look() is None
    assert [(each["log_level"], each["by_s"]) for each in logs] == [("warning", -3600.0)]


async def test_the_watch_tells_once_that_the_databases_clock_differs_and_that_it_no_longer_does() -> None:
    clock, ahead = FakeClock(), HOUR
    watch = ClockWatch(clock)

    async def database() -> datetime:
        return clock.now() + ahead

    assert await watch.compare() is None
    watch.ask_database = database
    with capture_logs() as logs:
        assert [await watch.compare() for _ in range(2)] == [HOUR, HOUR]
        ahead = CLOCK_SKEW_MAX
        assert await watch.compare() == CLOCK_SKEW_MAX
    assert [each["log_level"] for each in logs] == ["warning", "info"]


async def test_a_database_that_does_not_answer_or_a_clock_that_is_set_meanwhile_is_no_difference() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)

    async def away() -> datetime:
        raise StoreUnavailable("away")

    async def set_meanwhile() -> datetime:
        before = clock.now()
        clock.jump(HOUR)
        return before

    for ask in (away, set_meanwhile):
        watch.ask_database = ask
        assert await watch.compare() is None


@pytest.mark.parametrize("jump", [timedelta(minutes=40), timedelta(minutes=-40), timedelta(days=365)], ids=str)
def test_a_mesh_token_of_before_the_clock_was_set_is_not_used_any_more(jump: timedelta) -> None:
    wrong, right = FakeClock(), FakeClock()
    key = ServiceKey("fetch", Ed25519PrivateKey.generate(), wrong)
    verifier = TokenVerifier({"fetch": [key.public_key]}, right)
    wrong.jump(jump)
    key.mesh_token()
    wrong.jump(-jump)
    verifier.verify(key.mesh_token())


def test_a_token_that_was_verified_is_looked_at_again_when_the_clock_was_set_back() -> None:
    """It would serve for as long as the clock went back, else: a year, where it is worth ten minutes."""
    clock = FakeClock()
    key = ServiceKey("fetch", Ed25519PrivateKey.generate(), clock)
    verifier = TokenVerifier({"fetch": [key.public_key]}, clock)
    token = key.mesh_token()
    verifier.verify(token)
    clock.jump(timedelta(days=-365))
    with pytest.raises(Unauthenticated, match="in the future"):
        verifier.verify(token)
    clock.advance(timedelta(seconds=MESH_TOKEN_LIFETIME_S + LEEWAY_S))
    clock.jump(timedelta(days=365))
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


def test_a_token_that_claims_to_last_longer_than_any_ends_like_them() -> None:
    clock = FakeClock()
    key = ServiceKey("fetch", Ed25519PrivateKey.generate(), clock)
    verifier = TokenVerifier({"fetch": [key.public_key]}, clock)
    token, _ = key.sign("mesh", "fetch", 365 * 86_400, {})
    verifier.verify(token)
    clock.advance(timedelta(seconds=MESH_TOKEN_LIFETIME_S + LEEWAY_S))
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


@pytest.mark.parametrize("times", [{"iat": float("nan")}, {"exp": float("inf")}, {"exp": "soon"}, {"iat": None}], ids=str)
def test_times_that_are_none_are_refused(times: dict[str, object]) -> None:
    key = ServiceKey("fetch", Ed25519PrivateKey.generate())
    token, _ = key.sign("mesh", "fetch", 60, times)
    with pytest.raises(Unauthenticated, match="not valid"):
        TokenVerifier({"fetch": [key.public_key]}).verify(token)
