"""sealpush.retry: pauses, deadlines and the loop."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.errors import CallFailed, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from sealpush.retry import ATTEMPT_S_MIN, LAST_ATTEMPT_S, Deadline, RetryPolicy, SystemClock, jitter, retrying


class FakeClock:
    """Pauses that take no time."""

    def __init__(self) -> None:
        self.time = 100.0
        self.pauses: list[float] = []

    def now_ms(self) -> int:
        return int(self.time * 1000)

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds


class Failing:
    """Fails in the given ways, then answers."""

    def __init__(self, *errors: CallFailed) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@given(st.integers(0, 100), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 1000))
def test_a_pause_is_within_its_bounds(attempt: int, random: float, retry_after_s: float | None) -> None:
    policy = RetryPolicy(base_s=0.1, cap_s=5)
    delay_s = policy.delay_s(attempt, lambda: random, retry_after_s)
    asked = retry_after_s or 0.0
    assert asked <= delay_s <= asked + min(5, 0.1 * 2 ** min(attempt, 32))


def test_the_jitter_is_full() -> None:
    drawn = [RetryPolicy(base_s=1, cap_s=1).delay_s(0, jitter) for _ in range(500)]
    assert min(drawn) < 0.1
    assert max(drawn) > 0.9


@pytest.mark.parametrize(("base_s", "cap_s", "attempts_max"), [(0, 1, 1), (2, 1, 1), (1, 1, 0)])
def test_an_impossible_policy_is_refused(base_s: float, cap_s: float, attempts_max: int) -> None:
    with pytest.raises(ValueError, match="base_s"):
        RetryPolicy(base_s, cap_s, attempts_max)


async def test_what_may_pass_is_tried_again() -> None:
    clock, attempt = FakeClock(), Failing(Unavailable("a"), DeadlineExceeded("b"), Overloaded("c", retry_after_s=4))
    answer = await retrying(attempt, deadline=Deadline.after(clock, 60), policy=RetryPolicy(base_s=1), random=lambda: 0.5)
    assert answer == "answer"
    assert clock.pauses == [0.5, 1.0, 6.0]


async def test_what_does_not_pass_is_raised_at_once() -> None:
    clock, attempt = FakeClock(), Failing(InvalidRequest("wrong"))
    with pytest.raises(InvalidRequest):
        await retrying(attempt, deadline=Deadline.after(clock, 60), policy=RetryPolicy())
    assert attempt.calls == 1
    assert clock.pauses == []


async def test_no_pause_goes_beyond_the_deadline() -> None:
    clock, attempt = FakeClock(), Failing(Overloaded("later", retry_after_s=61))
    with pytest.raises(Overloaded):
        await retrying(attempt, deadline=Deadline.after(clock, 60), policy=RetryPolicy())
    assert clock.pauses == []


@given(st.floats(0.05, 60), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=20), st.floats(0, 1))
async def test_what_only_fails_is_tried_until_just_before_its_deadline(total_s: float, dice: list[float], answer_s: float) -> None:
    clock = FakeClock()
    started: list[float] = []
    deadline = Deadline.after(clock, total_s)

    async def attempt() -> str:
        started.append(deadline.remaining_s())
        clock.time += min(answer_s * 0.05, deadline.remaining_s())
        raise Unavailable("nobody there")

    rolled = itertools.cycle(dice)
    with pytest.raises(Unavailable):
        await retrying(attempt, deadline=deadline, policy=RetryPolicy(attempts_max=10_000), random=lambda: next(rolled))
    assert deadline.remaining_s() <= max(ATTEMPT_S_MIN, LAST_ATTEMPT_S)
    assert all(remaining_s > 0 for remaining_s in started)
    if total_s > 2 * LAST_ATTEMPT_S:
        assert any(remaining_s >= LAST_ATTEMPT_S / 2 for remaining_s in started[1:])


async def test_unlucky_dice_do_not_end_a_call_long_before_its_deadline() -> None:
    """With the default policy, whatever the dice say: an attempt in the last second of ten, when the service is back."""
    for seed in range(200):
        clock, dice = FakeClock(), random.Random(seed)  # noqa: S311 - dice of a test
        began, deadline = clock.time, Deadline.after(clock, 10)

        async def attempt(clock: FakeClock = clock, began: float = began) -> str:
            if clock.time - began < 9:
                raise Unavailable("restarting")
            return "answer"

        assert await retrying(attempt, deadline=deadline, policy=RetryPolicy(), random=dice.random) == "answer"


async def test_after_an_attempt_without_an_answer_a_refusal_does_not_say_that_nothing_was_done() -> None:
    clock, attempt = FakeClock(), Failing(DeadlineExceeded("lost", code="DEADLINE_EXCEEDED"), Overloaded("full", retry_after_s=61))
    with pytest.raises(DeadlineExceeded, match="lost") as caught:
        await retrying(attempt, deadline=Deadline.after(clock, 60), policy=RetryPolicy())
    assert caught.value.retry_after_s == 61
    assert isinstance(caught.value.__cause__, Overloaded)


async def test_attempts_are_bounded() -> None:
    clock, attempt = FakeClock(), Failing(*(Unavailable(str(number)) for number in range(100)))
    with pytest.raises(Unavailable, match="2"):
        await retrying(attempt, deadline=Deadline.after(clock, 1e9), policy=RetryPolicy(attempts_max=3), random=lambda: 0.0)
    assert attempt.calls == 3


def test_a_deadline_that_is_over_starts_nothing() -> None:
    clock = FakeClock()
    deadline = Deadline.after(clock, 5)
    assert deadline.timeout_s(10) == 5
    assert deadline.timeout_s(2) == 2
    clock.time += 6
    assert deadline.remaining_s() == 0
    with pytest.raises(DeadlineExceeded):
        deadline.timeout_s(10)


async def test_the_systems_clock_goes_forward() -> None:
    clock = SystemClock()
    before, wall = clock.monotonic(), clock.now_ms()
    await clock.sleep(0.002)
    assert clock.monotonic() > before
    assert clock.now_ms() >= wall > 1_600_000_000_000
