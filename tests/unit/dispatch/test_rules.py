from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.base import (
    RETRY_AFTER_MAX,
    Accepted,
    Bug,
    Misconfigured,
    Outcome,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
)
from sealpushd.dispatch.rules import (
    ATTEMPTS_MAX,
    BACKOFF_BASE,
    Pushed,
    Quarantine,
    Retry,
    StopLane,
    TokenDead,
    backoff,
    decide,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=100)
attempts = st.integers(1, 30)
dice = st.floats(0, 1, exclude_max=True)
waits = st.none() | st.timedeltas(timedelta(days=-1), timedelta(days=400))
outcomes = st.one_of(
    st.builds(Accepted),
    st.builds(TokenGone, reason=texts, at=st.none() | st.just(NOW)),
    st.builds(TokenSuspect, reason=texts),
    st.builds(RetryAt, reason=texts, retry_after=waits),
    st.builds(RefreshAuth, reason=texts),
    st.builds(Misconfigured, reason=texts),
    st.builds(Bug, reason=texts),
)


@given(attempt=st.integers(1, ATTEMPTS_MAX - 1), retry_after=waits, random=dice)
def test_retry_is_never_earlier_than_retry_after_and_never_unbounded(attempt: int, retry_after: timedelta | None, random: float) -> None:
    decision = decide(RetryAt("TooManyRequests", retry_after), attempt, lambda: random)
    assert isinstance(decision, Retry)
    asked = min(max(retry_after or timedelta(0), timedelta(0)), RETRY_AFTER_MAX)
    assert asked <= decision.delay <= asked + BACKOFF_BASE * 2**7


@given(outcome=outcomes, attempt=st.integers(ATTEMPTS_MAX, 10_000), random=dice)
def test_nothing_is_tried_again_after_the_eighth_attempt(outcome: Outcome, attempt: int, random: float) -> None:
    assert not isinstance(decide(outcome, attempt, lambda: random), Retry | StopLane)


@given(attempt=attempts, random=dice)
def test_a_bug_is_never_retried(attempt: int, random: float) -> None:
    assert decide(Bug("PayloadTooLarge"), attempt, lambda: random) == Quarantine("PayloadTooLarge")


@given(attempt=attempts)
def test_backoff_ceiling_doubles_up_to_its_bound(attempt: int) -> None:
    ceiling = backoff(attempt, lambda: 1.0)
    assert ceiling <= backoff(attempt + 1, lambda: 1.0) <= BACKOFF_BASE * 2**7
    assert backoff(attempt, lambda: 0.0) == timedelta(0)


@given(outcome=outcomes, attempt=attempts, random=dice)
def test_every_outcome_has_a_decision_with_a_reason_fit_for_logs(outcome: Outcome, attempt: int, random: float) -> None:
    decision = decide(outcome, attempt, lambda: random)
    reason = getattr(decision, "reason", "")
    assert len(reason) <= 64
    assert reason.isascii()
    assert reason.isprintable()


@pytest.mark.parametrize("attempt", [1, ATTEMPTS_MAX, 100])
def test_terminal_outcomes_do_not_depend_on_the_attempt(attempt: int) -> None:
    assert decide(Accepted(), attempt, lambda: 0.5) == Pushed()
    gone = decide(TokenGone("Unregistered", at=NOW), attempt, lambda: 0.5)
    assert gone == TokenDead(certain=True, gone_at=NOW, reason="Unregistered")
    suspect = decide(TokenSuspect("BadDeviceToken"), attempt, lambda: 0.5)
    assert suspect == TokenDead(certain=False, gone_at=None, reason="BadDeviceToken")


@pytest.mark.parametrize("outcome", [RefreshAuth("ExpiredProviderToken"), Misconfigured("TopicDisallowed")])
def test_wrong_credentials_stop_the_lane_for_a_while(outcome: RefreshAuth | Misconfigured) -> None:
    decision = decide(outcome, 1, lambda: 0.5)
    assert isinstance(decision, StopLane)
    assert decision.reason == outcome.reason
    assert decision.pause > timedelta(0)


def test_the_property_tests_cover_every_outcome() -> None:
    assert len(get_args(Outcome)) == 7
