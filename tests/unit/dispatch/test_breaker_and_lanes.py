"""The circuit breaker and a lane's book-keeping: pure, with a clock and dice of the test."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sealpushd.dispatch.lanes import PAUSED_RETRY, Lane, LaneSet, LaneState, Release, Send
from sealpushd.dispatch.providers.base import (
    Accepted,
    Bug,
    Misconfigured,
    Outcome,
    Probed,
    PushTarget,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
    WakeUp,
)
from sealpushd.dispatch.rules import (
    FAILURES_MAX,
    HALVING_PERIOD,
    LANE_RETRY,
    REOPEN_MAX,
    STRANGERS_MAX,
    Breaker,
    Circuit,
    Evidence,
    Window,
    decide,
    evidence,
    excuse_lane,
)
from sealpushd.dispatch.store import LaneRow
from sealpushd.platform.metrics import platform_label
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
STEADY = 1_000.0
dice = st.floats(0, 1, exclude_max=True)


class NoProvider:
    name = "apns"
    topic = "ua.bank"
    asked_anew = 0

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        raise NotImplementedError

    async def probe(self) -> Sequence[Probed]:
        raise NotImplementedError

    def advise(self, reason: str) -> str:
        return f"advice on {reason}"

    def forget_failures(self) -> None:
        self.asked_anew += 1

    async def aclose(self) -> None:
        """Nothing is open."""


def new_lane(clock: FakeClock, capacity: int = 256, die: float = 0.5) -> Lane:
    lane = Lane("bank", 1, capacity=capacity, clock=clock, random=lambda: die)
    lane.use(NoProvider())
    return lane


def settle(lane: Lane, send: Send, outcome: Outcome, clock: FakeClock, *, attempt: int = 1, topic_of_lane: bool = True) -> None:
    excused = excuse_lane(outcome, topic_of_lane=topic_of_lane)
    lane.observe(send, outcome, decide(excused, attempt, lambda: 0.5))
    lane.settled()


def break_(lane: Lane, clock: FakeClock) -> None:
    for _ in range(FAILURES_MAX):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, RetryAt("ServiceUnavailable"), clock)


# Breaker


@given(st.lists(st.booleans(), max_size=40))
def test_closed_breaker_opens_exactly_after_so_many_failures_in_a_row(results: list[bool]) -> None:
    breaker, in_a_row = Breaker(), 0
    for good in results:
        if breaker.circuit(STEADY) is not Circuit.CLOSED:
            break
        breaker = breaker.succeeded(probe=False) if good else breaker.failed(STEADY, lambda: 0.5, probe=False)
        in_a_row = 0 if good else in_a_row + 1
        assert (breaker.circuit(STEADY) is Circuit.OPEN) is (in_a_row == FAILURES_MAX)


@given(openings=st.integers(0, 10_000), random=dice)
def test_reopening_is_spaced_out_with_a_bound(openings: int, random: float) -> None:
    breaker = Breaker(0, openings, STEADY).failed(STEADY, lambda: random, probe=True)
    assert breaker.open_until is not None
    assert STEADY <= breaker.open_until <= STEADY + REOPEN_MAX.total_seconds()
    assert breaker.openings == openings + 1


@given(good=st.booleans(), later=st.timedeltas(timedelta(0), timedelta(days=1)))
def test_only_the_probe_decides_while_the_circuit_is_not_closed(good: bool, later: timedelta) -> None:
    breaker = Breaker(0, 3, STEADY)
    after = breaker.succeeded(probe=False) if good else breaker.failed(STEADY + later.total_seconds(), lambda: 0.5, probe=False)
    assert after == breaker
    assert breaker.succeeded(probe=True) == Breaker()


class LaneMachine(RuleBasedStateMachine):
    """Any order of credits, hand-outs, sends, outcomes, pauses and time."""

    @initialize(capacity=st.integers(1, 20), die=dice)
    def begin(self, capacity: int, die: float) -> None:
        self.clock, self.capacity = FakeClock(NOW), capacity
        self.lane = new_lane(self.clock, capacity, die)
        self.credit = self.waiting = 0
        self.sending: list[Send] = []
        self.paused = False

    @rule()
    def give_credit(self) -> None:
        more = self.lane.take_credit()
        assert not (more and self.paused)
        self.credit += more

    @rule()
    def reconnect(self) -> None:
        self.lane.session_began()
        self.credit = 0

    @precondition(lambda self: self.credit > 0)
    @rule()
    def hand_out(self) -> None:
        self.credit -= 1
        self.waiting += 1
        self.lane.took()

    @precondition(lambda self: self.waiting > 0)
    @rule()
    def admit(self) -> None:
        admission = self.lane.admit()
        if isinstance(admission, Release):
            assert self.lane.state is not LaneState.OPEN
            self.lane.settled()
        else:
            assert not self.paused
            assert not (admission.probe and any(send.probe for send in self.sending))
            self.sending.append(admission)
        self.waiting -= 1

    @precondition(lambda self: self.sending)
    @rule(
        outcome=st.sampled_from(
            [Accepted(), RetryAt("timeout"), RetryAt("TooManyRequests", of_device=True), Bug("x"), Misconfigured("y"), RefreshAuth("z")]
        ),
        attempt=st.integers(1, 9),
        topic_of_lane=st.booleans(),
    )
    def answer(self, outcome: Outcome, attempt: int, topic_of_lane: bool) -> None:
        settle(self.lane, self.sending.pop(0), outcome, self.clock, attempt=attempt, topic_of_lane=topic_of_lane)

    @precondition(lambda self: self.sending)
    @rule()
    def lose(self) -> None:
        self.lane.abandon(self.sending.pop())
        self.lane.settled()

    @rule(paused=st.booleans())
    def switch(self, paused: bool) -> None:
        self.paused = paused
        self.lane.apply(LaneRow("bank", 1, paused, "", None if paused else self.clock.now()))

    @rule(seconds=st.integers(0, 400))
    def wait(self, seconds: int) -> None:
        self.clock.advance(timedelta(seconds=seconds))

    @invariant()
    def holds_no_more_than_its_capacity(self) -> None:
        if hasattr(self, "lane"):
            assert self.lane.held == self.waiting + len(self.sending)
            assert self.lane.sending == len(self.sending)
            assert self.lane.held + self.credit <= self.capacity

    def teardown(self) -> None:
        # Whatever happened: once everything is settled and operators resume it, the lane works with all its credit.
        if not hasattr(self, "lane"):
            return
        for send in self.sending:
            self.lane.abandon(send)
            self.lane.settled()
        for _ in range(self.waiting):
            self.lane.settled()
        self.clock.advance(timedelta(seconds=1))
        self.lane.apply(LaneRow("bank", 1, False, "", self.clock.now()))
        self.lane.session_began()
        assert self.lane.state is LaneState.OPEN
        assert self.lane.take_credit() == self.capacity
        last = self.lane.admit()
        assert isinstance(last, Send)
        assert not last.probe


TestLane = LaneMachine.TestCase


# Lanes


def test_credit_never_exceeds_what_the_lane_may_hold() -> None:
    lane = new_lane(FakeClock(NOW), capacity=3)
    assert lane.take_credit() == 3
    assert lane.take_credit() == 0
    lane.took()
    assert lane.take_credit() == 0
    lane.settled()
    assert lane.take_credit() == 1


def test_broken_lane_gets_no_credit_and_releases_until_one_try_succeeds() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    break_(lane, clock)
    assert lane.state is LaneState.BROKEN
    assert "ServiceUnavailable" in lane.detail
    assert lane.take_credit() == 0
    assert lane.closed_for is not None
    assert lane.admit() == Release(lane.closed_for, "lane-broken")
    clock.advance(lane.closed_for)
    assert lane.take_credit() == 1
    lane.took()
    probe = lane.admit()
    assert isinstance(probe, Send)
    assert probe.probe
    assert isinstance(lane.admit(), Release)
    settle(lane, probe, Accepted(), clock)
    # It begins small: whoever was down is not helped by a burst.
    assert lane.take_credit() == 2


def test_lost_try_makes_room_for_another() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    break_(lane, clock)
    assert lane.closed_for is not None
    clock.advance(lane.closed_for)
    probe = lane.admit()
    assert isinstance(probe, Send)
    lane.abandon(probe)
    again = lane.admit()
    assert isinstance(again, Send)
    assert again.probe


def test_wrong_credentials_stop_the_lane_until_resumed_or_tried_again() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    lane.took()
    send = lane.admit()
    assert isinstance(send, Send)
    settle(lane, send, Misconfigured("InvalidProviderToken"), clock)
    assert lane.state is LaneState.MISCONFIGURED
    assert "InvalidProviderToken" in lane.detail
    assert lane.closed_for == LANE_RETRY
    assert lane.take_credit() == 0
    assert lane.apply(LaneRow("bank", 1, False, "resumed", clock.now()))
    assert lane.take_credit() == 256


def test_installation_with_a_topic_of_its_own_cannot_stop_the_lane() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for _ in range(3 * FAILURES_MAX):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, Misconfigured("TopicDisallowed"), clock, topic_of_lane=False)
    assert lane.state is LaneState.OPEN


@pytest.mark.parametrize(
    "outcome", [RetryAt("TooManyRequests", of_device=True), Accepted(), Bug("PayloadTooLarge"), TokenGone("Unregistered")]
)
def test_what_concerns_one_device_never_breaks_the_lane(outcome: Outcome) -> None:
    assert evidence(outcome) is Evidence.WORKS


def test_pause_is_taken_over_at_once_and_only_changes_are_told() -> None:
    lanes = LaneSet(256, FakeClock(NOW), lambda: 0.5)
    lane = lanes.put("bank", 1)
    lane.use(NoProvider())
    told: list[None] = []
    lanes.on_change = lambda: told.append(None)
    paused = LaneRow("bank", 1, True, "paused by operator", None)
    lanes.apply([paused, LaneRow("other", 1, True, "", None)])
    lanes.apply([paused])
    assert len(told) == 1
    assert lane.state is LaneState.PAUSED
    assert lane.detail.startswith("paused by operator")
    assert lane.take_credit() == 0
    assert isinstance(lane.refusal(), Release)
    lanes.apply([LaneRow("bank", 1, False, "", NOW)])
    assert lane.take_credit() == 256


def test_counts_tell_what_became_of_sends() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for outcome in (Accepted(), RetryAt("timeout"), TokenGone("Unregistered"), Bug("PayloadTooLarge")):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, outcome, clock)
    counts = lane.counts
    assert (counts.accepted, counts.retried, counts.dead_tokens, counts.quarantined) == (1, 1, 1, 1)
    assert lane.held == lane.sending == 0


def test_credit_gathers_to_a_quarter_before_it_is_given_back() -> None:
    lane = new_lane(FakeClock(NOW), capacity=8)
    assert lane.take_credit() == 8
    lane.took()
    lane.took()
    lane.settled()
    assert lane.take_credit() == 0
    lane.settled()
    assert lane.take_credit() == 2


def test_metrics_name_platforms_also_those_of_the_future() -> None:
    assert platform_label(1) == "ios"
    assert platform_label(999) == "999"


# The window


@given(
    results=st.lists(st.tuples(st.booleans(), st.timedeltas(timedelta(0), timedelta(seconds=3))), max_size=60), capacity=st.integers(1, 50)
)
def test_window_stays_between_one_and_the_capacity_and_is_halved_once_a_period(
    results: list[tuple[bool, timedelta]], capacity: int
) -> None:
    period = HALVING_PERIOD.total_seconds()
    window, now, halved_at = Window.whole(capacity), STEADY, STEADY - period
    for good, later in results:
        now += later.total_seconds()
        before = window.size
        window = window.grown() if good else window.halved(now)
        assert 1 <= window.size <= capacity
        if not good:
            due = now - halved_at >= period
            assert window.size == (max(before // 2, 1) if due else before)
            halved_at = now if due else halved_at


def test_asked_pause_keeps_the_breaker_open_as_long() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for _ in range(FAILURES_MAX):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, RetryAt("QUOTA_EXCEEDED", timedelta(seconds=90)), clock)
    assert lane.closed_for is not None
    assert lane.closed_for >= timedelta(seconds=90)


def test_success_after_an_outage_opens_the_window_again() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock, capacity=16)
    break_(lane, clock)
    assert lane.closed_for is not None
    clock.advance(lane.closed_for)
    for _ in range(20):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, Accepted(), clock)
    assert lane.window == 16


# Credentials


def test_lane_without_a_credential_says_so_takes_nothing_and_sends_nothing() -> None:
    lane = Lane("bank", 1, capacity=8, clock=FakeClock(NOW), random=lambda: 0.5)
    lane.lose("the credential file is missing")
    assert lane.take_credit() == 0
    assert isinstance(lane.admit(), Release)
    assert lane.state is LaneState.MISCONFIGURED
    assert "the credential file is missing" in lane.detail


def test_new_credential_repairs_a_stopped_lane_and_late_words_of_the_old_one_do_not_stop_it_again() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    sends = []
    for _ in range(3):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        sends.append(send)
    settle(lane, sends[0], Misconfigured("InvalidProviderToken"), clock)
    assert lane.closed_for is not None
    lane.use(NoProvider())
    settle(lane, sends[1], Misconfigured("InvalidProviderToken"), clock)
    settle(lane, sends[2], RetryAt("timeout"), clock)
    assert lane.state is LaneState.OPEN
    assert lane.window == 256
    assert lane.sending == lane.held == 0


def test_removed_lane_takes_back_what_comes_on_old_credit_and_lives_again_with_a_new_credential() -> None:
    lanes = LaneSet(8, FakeClock(NOW), lambda: 0.5)
    lane = lanes.put("bank", 1)
    lane.use(NoProvider())
    assert lane.take_credit() == 8
    assert lanes.remove(lane) is not None
    assert len(lanes) == 0
    assert lanes.get("bank", 1) is None
    late = lanes.for_wake_up("bank", 1)
    assert late is lane
    late.took()
    assert isinstance(late.refusal(), Release)
    late.settled()
    assert lanes.put("bank", 1) is lane


# Tokens that are not of the credential


def test_many_strangers_in_a_row_are_told_and_one_good_token_ends_the_suspicion() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for number in range(STRANGERS_MAX):
        assert lane.detail == "takes wake-ups"
        # The same phone again and again, and what we ourselves refuse, say nothing of the credential.
        for _ in range(3):
            lane.set_aside(b"device %d" % number, NOW, "DeviceTokenNotForTopic", asked=True)
        lane.set_aside(b"other %d" % number, NOW, "other-topic", asked=False)
    assert lane.state is LaneState.OPEN
    assert lane.is_suspicious
    assert "advice on DeviceTokenNotForTopic" in lane.detail
    lane.took()
    send = lane.admit()
    assert isinstance(send, Send)
    settle(lane, send, Accepted(), clock)
    assert lane.detail == "takes wake-ups"


NOT_ASKED = [TokenSuspect("malformed-token", asked=False), Bug("malformed-request", asked=False), RetryAt("closed", asked=False)]


@pytest.mark.parametrize("nothing", [*NOT_ASKED, Misconfigured("TopicDisallowed")])
def test_what_a_registration_brings_about_neither_mends_a_broken_lane_nor_spares_one(nothing: Outcome) -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)

    def send_one(outcome: Outcome) -> None:
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, outcome, clock, topic_of_lane=False)

    for _ in range(FAILURES_MAX):
        assert lane.state is LaneState.OPEN
        send_one(nothing)
        send_one(RetryAt("ServiceUnavailable"))
    assert lane.closed_for is not None
    clock.advance(lane.closed_for)
    # Half-open: these decide nothing, and the next one is tried at once.
    for _ in range(3):
        send_one(nothing)
        assert lane.closed_for is not None
    send_one(Accepted())
    assert lane.closed_for is None


def test_tokens_that_were_set_aside_are_tried_again_after_a_resume() -> None:
    lane = new_lane(FakeClock(NOW))
    lane.set_aside(b"device", NOW, "BadDeviceToken", asked=True)
    assert lane.set_aside_for(b"device", NOW) == "BadDeviceToken"
    assert lane.set_aside_for(b"device", NOW + timedelta(seconds=1)) is None
    lane.apply(LaneRow("bank", 1, False, "resumed", NOW))
    assert lane.set_aside_for(b"device", NOW) is None


# What operators see


def test_rate_is_that_of_the_last_minute() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for _ in range(120):
        lane.counts.rate.add(clock.monotonic())
    assert lane.counts.rate.per_second(clock.monotonic()) == 2.0
    clock.advance(timedelta(seconds=59))
    lane.counts.rate.add(clock.monotonic())
    assert lane.counts.rate.per_second(clock.monotonic()) == 121 / 60
    clock.advance(timedelta(seconds=1))
    assert lane.counts.rate.per_second(clock.monotonic()) == 1 / 60
    clock.advance(timedelta(minutes=2))
    assert lane.counts.rate.per_second(clock.monotonic()) == 0


def test_error_reasons_are_bounded() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock, capacity=1000)
    for number in range(100):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, Bug(f"reason-{number}"), clock)
    assert len(lane.counts.errors) <= 33
    assert sum(seen.count for seen in lane.counts.errors.values()) == 100


def test_what_a_broken_lane_gives_back_waits_for_the_lane_and_not_for_its_time() -> None:
    """A push service may ask for a day; whoever repairs it, or resumes the lane, has it all pushed at once."""
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    for _ in range(FAILURES_MAX):
        lane.took()
        send = lane.admit()
        assert isinstance(send, Send)
        settle(lane, send, RetryAt("ServiceUnavailable", timedelta(days=1)), clock)
    assert lane.closed_for is not None
    assert lane.closed_for > timedelta(minutes=14)
    assert lane.admit() == Release(PAUSED_RETRY, "lane-broken")
    assert lane.take_credit() == 0


def test_resume_through_a_process_whose_clock_is_behind_counts() -> None:
    clock = FakeClock(NOW)
    lane = new_lane(clock)
    assert lane.apply(LaneRow("bank", 1, False, "resumed", clock.now()))
    break_(lane, clock)
    assert lane.apply(LaneRow("bank", 1, False, "resumed", clock.now() - timedelta(seconds=3)))
    assert lane.state is LaneState.OPEN
    assert not lane.apply(LaneRow("bank", 1, False, "resumed", clock.now() - timedelta(seconds=3)))
