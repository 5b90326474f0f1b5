"""sealpush.throttle: a service that is asked for too much has little to refuse, and all of it is sent again soon after."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sealpush.throttle import Throttle

STEP_S = 0.02
ANSWER_S = 0.05


@dataclass(slots=True)
class Flow:
    """What became of attempts."""

    offered: int = 0
    sent: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Caller:
    """A caller, and a service that accepts so many a second and refuses the rest."""

    dice: random.Random
    throttle: Throttle = field(default_factory=Throttle)
    now: float = 0.0
    answers: deque[tuple[float, bool]] = field(default_factory=deque)

    def attempt(self, rate: float, capacity: float, seconds: float) -> Flow:
        flow, room, due = Flow(), 0.0, 0.0
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            room = min(room + capacity * STEP_S, max(1.0, capacity / 10))
            due += rate * STEP_S
            while self.answers and self.answers[0][0] <= self.now:
                self.throttle.answered(self.now, accepted=self.answers.popleft()[1])
            while due >= 1:
                due -= 1
                flow.offered += 1
                if self.throttle.holds_back(self.now, self.dice.random):
                    continue
                flow.sent += 1
                is_accepted = room >= 1
                room -= is_accepted
                flow.accepted += is_accepted
                self.answers.append((self.now + ANSWER_S, is_accepted))
        return flow


callers = st.builds(Caller, st.integers(0, 2**32).map(random.Random))
capacities = st.floats(50, 400)
few = settings(max_examples=20)


@few
@given(callers, st.floats(1, 400))
def test_nothing_is_held_back_while_nothing_is_refused(caller: Caller, rate: float) -> None:
    flow = caller.attempt(rate, rate * 2 + 10, 5)
    assert flow.sent == flow.offered == flow.accepted


@few
@given(callers, capacities, st.floats(2, 5))
def test_an_overload_is_little_more_than_what_is_accepted_and_uses_all_of_it(caller: Caller, capacity: float, factor: float) -> None:
    caller.attempt(capacity * factor, capacity, 3)
    flow = caller.attempt(capacity * factor, capacity, 10)
    assert flow.accepted >= 0.9 * capacity * 10
    # Beyond the two fifths some a second go out whatever is refused.
    assert flow.sent - flow.accepted <= 0.45 * flow.accepted + 10 * 10


@few
@given(callers, capacities, st.floats(2, 5), st.floats(0.1, 0.9))
def test_five_seconds_after_the_load_fell_everything_is_sent(caller: Caller, capacity: float, factor: float, later: float) -> None:
    caller.attempt(capacity * factor, capacity, 8)
    caller.attempt(capacity * later, capacity, 5)
    flow = caller.attempt(capacity * later, capacity, 5)
    assert flow.sent == flow.offered


@few
@given(callers, capacities)
def test_a_service_that_accepts_again_is_sent_everything_again(caller: Caller, capacity: float) -> None:
    stalled = caller.attempt(capacity, 0, 30)
    assert stalled.accepted == 0
    assert 0 < stalled.sent < 0.5 * stalled.offered
    caller.attempt(capacity, capacity * 2, 5)
    flow = caller.attempt(capacity, capacity * 2, 5)
    assert flow.sent == flow.offered


@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), max_size=200))
def test_whatever_was_answered_an_attempt_may_go_out(answers: list[tuple[float, bool]]) -> None:
    throttle, now = Throttle(), 0.0
    for step_s, accepted in answers:
        now += step_s
        throttle.answered(now, accepted=accepted)
        assert not throttle.holds_back(now, lambda: 1 - 2**-53)


def test_a_caller_that_calls_seldom_is_hardly_held_back() -> None:
    caller = Caller(random.Random(1))  # noqa: S311 - dice of a test
    flow = caller.attempt(0.5, 0, 1000)
    assert flow.sent >= 0.85 * flow.offered
