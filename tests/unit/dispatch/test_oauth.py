from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.base import HttpAnswer, Misconfigured, Outcome, RefreshAuth, RetryAt
from sealpushd.dispatch.providers.oauth import (
    FAILURE_KEPT,
    FAILURE_KEPT_MAX,
    LIFETIME_MAX,
    RENEW_BEFORE,
    REPLACE_MIN,
    TOKEN_CHARACTERS_MAX,
    AccessTokens,
    Grant,
    is_https_url,
    of_token_endpoint,
    read_grant,
)
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DOWN = RetryAt("oauth-status-503")


class Endpoint:
    """A token endpoint that counts; it answers when the gate is open."""

    def __init__(self) -> None:
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.answer: Callable[[int], Grant | Outcome] = lambda number: Grant(f"token-{number}", HOUR)

    async def fetch(self) -> Grant | Outcome:
        self.asked += 1
        number = self.asked
        await self.gate.wait()
        return self.answer(number)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
async def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
async def tokens(endpoint: Endpoint, clock: FakeClock) -> AccessTokens:
    return AccessTokens(endpoint.fetch, clock)


async def settled() -> None:
    """Every task that can run has run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


# Sharing one token


async def test_a_hundred_sends_at_once_ask_the_endpoint_once(tokens: AccessTokens, endpoint: Endpoint) -> None:
    endpoint.gate.clear()
    waiting = [asyncio.create_task(tokens.current()) for _ in range(100)]
    await settled()
    assert endpoint.asked == 1
    endpoint.gate.set()
    assert set(await asyncio.gather(*waiting)) == {"token-1"}
    assert endpoint.asked == 1


async def test_token_is_kept_until_shortly_before_its_end(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    assert await tokens.current() == "token-1"
    clock.advance(HOUR - RENEW_BEFORE - timedelta(seconds=1))
    assert await tokens.current() == "token-1"
    await settled()
    assert endpoint.asked == 1


async def test_renewal_comes_early_and_the_old_token_serves_meanwhile(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    await tokens.current()
    endpoint.gate.clear()
    clock.advance(HOUR - RENEW_BEFORE)
    for _ in range(5):
        assert await tokens.current() == "token-1"
    await settled()
    assert endpoint.asked == 2
    endpoint.gate.set()
    await settled()
    assert await tokens.current() == "token-2"


async def test_failed_renewal_harms_nobody_while_the_old_token_serves(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    await tokens.current()
    endpoint.answer = lambda _: Misconfigured("oauth-invalid_grant")
    clock.advance(HOUR - RENEW_BEFORE)
    assert await tokens.current() == "token-1"
    await settled()
    clock.advance(RENEW_BEFORE - timedelta(seconds=1))
    assert await tokens.current() == "token-1"
    await settled()
    clock.advance(FAILURE_KEPT)
    assert await tokens.current() == Misconfigured("oauth-invalid_grant")


async def test_failure_answers_all_for_a_while_and_is_then_tried_again(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    endpoint.answer = lambda _: DOWN
    assert [await tokens.current() for _ in range(50)] == [DOWN] * 50
    assert endpoint.asked == 1
    clock.advance(FAILURE_KEPT)
    endpoint.answer = lambda number: Grant(f"token-{number}", HOUR)
    assert await tokens.current() == "token-2"


@pytest.mark.parametrize(
    ("asked_for", "kept"),
    [
        (timedelta(0), FAILURE_KEPT),
        (timedelta(seconds=30), timedelta(seconds=30)),
        (timedelta(hours=5), FAILURE_KEPT_MAX),
    ],
)
async def test_patience_that_the_endpoint_asks_for_is_had_within_bounds(
    tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock, asked_for: timedelta, kept: timedelta
) -> None:
    endpoint.answer = lambda _: RetryAt("oauth-status-503", asked_for)
    await tokens.current()
    clock.advance(kept - timedelta(milliseconds=1))
    assert await tokens.current() == RetryAt("oauth-status-503", asked_for)
    assert endpoint.asked == 1
    clock.advance(timedelta(milliseconds=1))
    await tokens.current()
    assert endpoint.asked == 2


async def test_the_one_who_gives_up_does_not_end_the_renewal_of_the_others(tokens: AccessTokens, endpoint: Endpoint) -> None:
    endpoint.gate.clear()
    impatient, patient = asyncio.create_task(tokens.current()), asyncio.create_task(tokens.current())
    await settled()
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    endpoint.gate.set()
    assert await patient == "token-1"
    assert impatient.cancelled()
    assert endpoint.asked == 1


async def test_closing_ends_a_renewal_and_those_who_wait_get_an_outcome(tokens: AccessTokens, endpoint: Endpoint) -> None:
    endpoint.gate.clear()
    waiting = [asyncio.create_task(tokens.current()) for _ in range(3)]
    await settled()
    await tokens.aclose()
    assert await asyncio.gather(*waiting) == [RetryAt("closed")] * 3
    await tokens.aclose()


# Replacing a refused token


async def test_storm_of_refusals_replaces_the_token_once(tokens: AccessTokens, endpoint: Endpoint) -> None:
    refused = await tokens.current()
    assert isinstance(refused, str)
    endpoint.gate.clear()
    waiting = [asyncio.create_task(tokens.replace(refused)) for _ in range(100)]
    await settled()
    endpoint.gate.set()
    assert set(await asyncio.gather(*waiting)) == {"token-2"}
    assert await tokens.replace(refused) == "token-2", "who learns of it late gets the new one"
    assert endpoint.asked == 2


async def test_fresh_token_that_is_refused_too_is_not_replaced_at_once(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    await tokens.current()
    assert await tokens.replace("token-1") == "token-2"
    assert await tokens.replace("token-2") == RefreshAuth("oauth-token-refused-again")
    assert endpoint.asked == 2
    clock.advance(REPLACE_MIN)
    assert await tokens.replace("token-2") == "token-3"


async def test_replacement_that_fails_tells_why(tokens: AccessTokens, endpoint: Endpoint, clock: FakeClock) -> None:
    await tokens.current()
    endpoint.answer = lambda _: Misconfigured("oauth-invalid_grant")
    assert await tokens.replace("token-1") == Misconfigured("oauth-invalid_grant")
    assert await tokens.replace("token-1") == Misconfigured("oauth-invalid_grant")
    assert await tokens.current() == Misconfigured("oauth-invalid_grant"), "a token that was refused is not used again"
    assert endpoint.asked == 2


async def test_refusal_of_an_older_token_changes_nothing(tokens: AccessTokens, endpoint: Endpoint) -> None:
    await tokens.current()
    assert await tokens.replace("token-0") == "token-1"
    assert endpoint.asked == 1


# Lifetimes


def granted(**fields: object) -> HttpAnswer:
    return HttpAnswer(200, {}, json.dumps({"access_token": "t", "token_type": "Bearer"} | fields).encode())


@pytest.mark.parametrize(
    ("expires_in", "lifetime"),
    [
        (3599, timedelta(seconds=3599)),
        (1, timedelta(seconds=1)),
        (10**30, LIFETIME_MAX),
        (0, timedelta(minutes=1)),
        (-5, timedelta(minutes=1)),
        (True, timedelta(minutes=1)),
        ("3600", timedelta(minutes=1)),
        (3600.5, timedelta(minutes=1)),
        (None, timedelta(minutes=1)),
        ([], timedelta(minutes=1)),
    ],
)
def test_senseless_lifetime_is_a_minute_and_a_long_one_a_day(expires_in: object, lifetime: timedelta) -> None:
    assert read_grant(granted(expires_in=expires_in), NOW, signed=True) == Grant("t", lifetime)


@given(st.integers(1, 10_000_000))
def test_token_is_renewed_within_its_lifetime_and_not_at_once(seconds: int) -> None:
    async def scenario() -> None:
        clock, endpoint = FakeClock(NOW), Endpoint()
        granted_here = read_grant(granted(expires_in=seconds), NOW, signed=True)
        assert isinstance(granted_here, Grant)
        endpoint.answer = lambda number: Grant(f"token-{number}", granted_here.lifetime)
        tokens = AccessTokens(endpoint.fetch, clock)
        assert await tokens.current() == "token-1"
        clock.advance(granted_here.lifetime * 0.49)
        await tokens.current()
        await settled()
        assert endpoint.asked == 1
        clock.advance(granted_here.lifetime * 0.51 - timedelta(microseconds=1))
        assert await tokens.current() == "token-1"
        await settled()
        assert endpoint.asked == 2

    asyncio.run(scenario())


# Answers of a token endpoint


@pytest.mark.parametrize(
    "token", [None, 5, "", "a\nb", "ключ", "x" * (TOKEN_CHARACTERS_MAX + 1), ["t"]], ids=lambda token: str(token)[:10].encode().hex()
)
def test_answer_without_a_usable_token_is_unreadable(token: object) -> None:
    assert read_grant(granted(access_token=token, expires_in=3600), NOW, signed=True) == RetryAt("unreadable-answer")


@given(
    status=st.integers(100, 599),
    body=st.none() | st.binary(max_size=50) | st.sampled_from([b"[1]", b"{}", b"<html>", b'{"error":{}}', b'{"error":null}', b"[" * 5000]),
)
def test_an_answer_that_is_no_token_endpoints_stops_nothing(status: int, body: bytes | None) -> None:
    assert isinstance(read_grant(HttpAnswer(status, {}, body), NOW, signed=True), RetryAt)


@given(
    status=st.integers(100, 599),
    content=st.dictionaries(
        st.sampled_from(["access_token", "expires_in", "error", "error_description"]),
        st.none() | st.text(st.characters(max_codepoint=0x2FF), max_size=100) | st.integers() | st.floats() | st.booleans(),
    ),
)
def test_read_grant_never_raises(status: int, content: dict[str, object]) -> None:
    read_grant(HttpAnswer(status, {}, json.dumps(content).encode()), NOW, signed=True)


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        (400, "invalid_grant", Misconfigured("oauth-invalid_grant")),
        (401, "invalid_client", Misconfigured("oauth-invalid_client")),
        (400, 1101, Misconfigured("oauth-1101")),
        (400, "a secret, quoted: hunter2", Misconfigured("oauth-unreadable")),
        (429, "slow_down", RetryAt("oauth-status-429", timedelta(seconds=7))),
        (500, "internal_failure", RetryAt("oauth-status-500", timedelta(seconds=7))),
        (503, "invalid_grant", RetryAt("oauth-status-503", timedelta(seconds=7))),
    ],
)
def test_refused_credential_stops_the_lane_and_a_sick_endpoint_does_not(status: int, error: object, outcome: Outcome) -> None:
    answer = HttpAnswer(status, {"retry-after": "7"}, json.dumps({"error": error}).encode())
    assert read_grant(answer, NOW, signed=True) == outcome


def test_refusal_under_a_wrong_clock_is_the_clocks_if_a_time_was_signed() -> None:
    headers = {"date": format_datetime(NOW + HOUR, usegmt=True)}
    answer = HttpAnswer(400, headers, b'{"error":"invalid_grant"}')
    assert read_grant(answer, NOW, signed=True) == Misconfigured("clock-wrong")
    assert read_grant(answer, NOW, signed=False) == Misconfigured("oauth-invalid_grant")


def test_access_token_is_never_printed() -> None:
    assert "hunter2" not in repr(Grant("hunter2", HOUR))


def test_reasons_of_the_network_say_that_it_was_the_token_endpoint() -> None:
    assert of_token_endpoint(RetryAt("network-dns")) == RetryAt("oauth-network-dns")
    assert of_token_endpoint(RetryAt("timeout")) == RetryAt("oauth-timeout")
    assert of_token_endpoint(RetryAt("unreadable-answer")) == RetryAt("oauth-unreadable-answer")
    assert of_token_endpoint(RetryAt("closed")) == RetryAt("closed")
    assert of_token_endpoint(Misconfigured("clock-wrong")) == Misconfigured("clock-wrong")


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        ("https://oauth2.googleapis.com/token", True),
        ("https://localhost:8443/token", True),
        ("http://oauth2.googleapis.com/token", False),
        ("https://", False),
        ("https:///token", False),
        ("https://user:pass@host/token", False),
        ("https://host/token?x=1", False),
        ("https://host/token#x", False),
        ("https://host:99999/token", False),
        ("https://host:0/token", False),
        ("https://[::1/token", False),
        ("https://host/to\nken", False),
        ("file:///etc/passwd", False),
        ("", False),
    ],
)
def test_token_endpoint_is_an_https_url(url: str, is_one: bool) -> None:
    assert is_https_url(url) is is_one
