"""What is let in: as much as is finished in time, nobody more than a share, until the last work has ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpushd.platform import admission
from sealpushd.platform.admission import (
    DEVICE_IN_FLIGHT_MAX,
    IN_TIME_S,
    IN_TIME_S_MAX,
    LIMIT_MAX,
    LIMIT_MIN,
    LIMIT_START,
    OUTSIDE_PART,
    RESET_HOLD_S,
    WINDOW_S,
    AdaptiveLimit,
    Door,
    End,
    Pace,
    Party,
    Place,
    Refused,
    allowance_s,
    party_of,
)
from sealpushd.platform.errors import DeadlineExceeded, InvalidRequest, Overloaded
from sealpushd.platform.tokens import DeviceCaller, SenderCaller, ServiceCaller

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30
BANK, OTHER = (party_of(SenderCaller(SenderId(name * 16), b"o" * 16, ("app",), frozenset(), ()), "") for name in (b"b", b"c"))
PHONE = party_of(DeviceCaller(DeviceId(b"d" * 16), SubscriberId(b"u" * 16), "app", b"k" * 32), "")
MESH = party_of(ServiceCaller("publishing"), "")
MOBILE = party_of(None, "192.0.2.1")


class Time:
    """Moves when told to; what is to happen later happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, then: Callable[[], None]) -> None:
        self._timers.append((self.now + seconds, then))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [then for at, then in self._timers if at <= self.now]
        self._timers = [timer for timer in self._timers if timer[0] > self.now]
        for then in due:
            then()


def door(units: float = 64) -> tuple[Door, Time]:
    time = Time()
    return Door(time, time.later, AdaptiveLimit(units)), time


def fill(at: Door, party: Party) -> list[Place]:
    """All that this caller gets."""
    places = []
    while True:
        try:
            places.append(at.enter(party))
        except Refused:
            return places


def windows(limit: AdaptiveLimit, count: int, lateness: Callable[[float], float], now: float = 0.0) -> list[float]:
    """The limit after each of so many windows in which all of it was used; how late work is depends on how much of it there is."""
    seen = []
    for _ in range(count):
        limit.filled(limit.units)
        for _ in range(50):
            now += WINDOW_S / 49
            limit.ended(lateness(limit.units), now)
        seen.append(limit.units)
    return seen


@settings(max_examples=30)
@given(st.floats(50, 20_000))
def test_the_limit_finds_what_is_finished_in_time_on_any_machine_and_stays_there(per_second: float) -> None:
    # What a machine that does so much a second makes of so many at a time (Little's law).
    seen = windows(AdaptiveLimit(), 60, lambda units: units / per_second / IN_TIME_S)
    right = min(LIMIT_MAX, max(LIMIT_MIN, per_second * IN_TIME_S))
    assert all(abs(units - right) <= right / 10 for units in seen[20:])


def test_after_a_stall_the_limit_is_back_within_five_seconds() -> None:
    limit = AdaptiveLimit()
    before = windows(limit, 40, lambda units: units / 1_500 / IN_TIME_S)[-1]
    assert windows(limit, 4, lambda _: 10.0, now=100.0)[-1] < before / 2
    assert windows(limit, int(5 / WINDOW_S), lambda units: units / 1_500 / IN_TIME_S, now=200.0)[-1] >= 0.95 * before


def test_what_is_slow_without_being_much_leaves_the_limit_alone() -> None:
    limit = AdaptiveLimit()
    for n in range(1_000):
        limit.filled(limit.units / 4)
        limit.ended(20.0, n / 10)
    assert limit.units == LIMIT_START


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 10)), max_size=300))
def test_the_limit_stays_within_its_bounds_whatever_happens(happened: list[tuple[float, float, float]]) -> None:
    limit, now = AdaptiveLimit(), 0.0
    for lateness, in_flight, passed in happened:
        now += passed
        limit.filled(in_flight)
        limit.ended(lateness, now)
        assert LIMIT_MIN <= limit.units <= LIMIT_MAX


def test_a_large_request_may_take_longer_than_a_small_one_up_to_a_bound() -> None:
    assert allowance_s(1) == IN_TIME_S
    assert IN_TIME_S < allowance_s(15) < IN_TIME_S_MAX == allowance_s(10_000)


def test_a_bank_that_is_alone_gets_nearly_all_and_another_always_finds_room() -> None:
    at, _ = door()
    outside = 64 * OUTSIDE_PART
    alone = len(fill(at, BANK))
    assert outside * 0.85 <= alone < outside
    assert len(fill(at, OTHER)) >= 1


@settings(max_examples=5)
@given(st.randoms(use_true_random=False), st.integers(64, 512))
def test_two_greedy_callers_come_out_even_once_places_change_hands(dice: Random, units: int) -> None:
    at, _ = door(units)
    held = {BANK: fill(at, BANK), OTHER: fill(at, OTHER)}
    assert len(held[BANK]) > 5 * len(held[OTHER])
    shares = []
    for step in range(6 * units):
        (had,) = dice.choices((BANK, OTHER), (len(held[BANK]), len(held[OTHER])))
        held[had].pop().leave(End.DONE)
        # Whoever was first goes on asking first.
        for party in (BANK, OTHER):
            held[party] += fill(at, party)
        if step > 4 * units:
            shares.append(len(held[BANK]) / (len(held[BANK]) + len(held[OTHER])))
    assert 0.4 < sum(shares) / len(shares) < 0.6


def test_a_crowd_outside_leaves_the_mesh_its_part() -> None:
    at, _ = door()
    for n in range(1_000):
        fill(at, party_of(None, f"192.0.{n // 256}.{n % 256}"))
    assert at.in_flight <= 64 * OUTSIDE_PART
    assert len(fill(at, MESH)) == 64 - at.held(party_of(None, "")) - (at.in_flight - at.held(MESH))
    assert at.in_flight == 64
    with pytest.raises(Refused):
        at.check_full(is_mesh=True)


def test_a_service_is_not_one_greedy_caller() -> None:
    at, _ = door()
    assert len(fill(at, MESH)) == 64


def test_a_phone_never_has_more_than_a_phone_needs() -> None:
    at, _ = door(LIMIT_MAX)
    assert len(fill(at, PHONE)) == DEVICE_IN_FLIGHT_MAX
    assert len(fill(at, BANK)) > DEVICE_IN_FLIGHT_MAX


def test_strangers_are_counted_by_address_and_of_ipv6_by_network() -> None:
    assert party_of(None, "2001:db8::1") == party_of(None, "2001:db8::2") != party_of(None, "2001:db8:0:1::1")
    assert party_of(None, "192.0.2.1") != party_of(None, "192.0.2.2")


def test_a_call_that_is_reset_keeps_its_place_for_as_long_as_it_could_have_taken() -> None:
    at, time = door()
    for place in fill(at, PHONE):
        place.leave(End.RESET)
    with pytest.raises(Refused):
        at.enter(PHONE)
    time.advance(RESET_HOLD_S)
    assert at.in_flight == 0
    assert len(fill(at, PHONE)) == DEVICE_IN_FLIGHT_MAX


def test_work_that_goes_on_after_a_reset_counts_until_it_has_ended() -> None:
    at, time = door()
    place = at.enter(PHONE)
    assert place.hold()
    place.leave(End.RESET)
    time.advance(10 * RESET_HOLD_S)
    assert at.held(PHONE) == 1
    place.release()
    assert (at.held(PHONE), at.in_flight) == (0, 0)


def test_who_only_waits_gives_the_place_back_and_work_that_begins_later_finds_none_to_hold() -> None:
    at, _ = door()
    place = at.enter(BANK)
    place.rest()
    assert at.in_flight == 0
    assert not place.hold()
    place.weigh(1 << 20)
    place.leave(End.RESET)
    assert at.in_flight == 0


def test_a_request_is_weighed_and_the_largest_gets_in_however_small_the_limit() -> None:
    at, _ = door(32)
    place = at.enter(BANK)
    place.weigh(3 << 20)
    assert at.held(BANK) == 8
    place.leave(End.DONE)
    assert at.in_flight == 0


def test_nothing_is_begun_for_a_deadline_that_has_ended_and_nothing_that_would_not_meet_it() -> None:
    at, time = door()
    with pytest.raises(DeadlineExceeded):
        at.enter(BANK, 0.0)
    pace = Pace()
    for _ in range(100):
        pace.took(1.0, time.now)
    with pytest.raises(Refused):
        at.enter(BANK, 0.2, pace)
    assert at.in_flight == 0
    # However few the calls are, it is tried again soon, or it would never be known that it would be met by now.
    time.now += 4
    at.enter(BANK, 0.2, pace)


def test_calls_that_are_late_make_the_limit_smaller_whatever_is_usual_and_those_reset_or_in_a_hurry_do_not() -> None:
    def after(end: End, took_s: float) -> float:
        at, time = door(64)
        for _ in range(40):
            places = fill(at, BANK)
            time.advance(took_s)
            for place in places:
                place.leave(end)
            time.advance(RESET_HOLD_S)
        return at.limit.units

    assert after(End.LATE, 0.3) == LIMIT_MIN
    assert after(End.SHED, 0.01) == LIMIT_MIN
    assert after(End.RESET, 3.0) == 64
    assert after(End.FAILED, 3.0) == 64
    assert after(End.LATE, 0.01) == 64
    assert after(End.DONE, 0.01) > 64


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.sampled_from(["hold", "release", "rest", "weigh", *End])), max_size=200))
def test_every_place_comes_back_whatever_order_things_end_in(steps: list[tuple[int, int, str | End]]) -> None:
    at, time = door(100)
    parties = [BANK, OTHER, PHONE, MESH, party_of(None, "192.0.2.1"), party_of(None, "::1")]
    open_places: list[Place] = []
    holds: list[Place] = []
    for who, which, what in steps:
        with contextlib.suppress(Refused):
            open_places.append(at.enter(parties[who]))
        if not open_places:
            continue
        place = open_places[which % len(open_places)]
        match what:
            case "hold":
                if place.hold():
                    holds.append(place)
            case "release" if holds:
                holds.pop().release()
            case "rest":
                place.rest()
            case "weigh":
                place.weigh(which * 4_096)
            case End():
                place.leave(what)
                open_places.remove(place)
        assert at.in_flight == sum(at.held(party) for party in parties) >= 0
    for place in open_places:
        place.leave(End.DONE)
    for place in holds:
        place.release()
    time.advance(RESET_HOLD_S)
    assert at.in_flight == 0
    assert all(at.held(party) == 0 for party in parties)


async def test_a_piece_of_a_stream_waits_for_a_place_and_is_not_refused() -> None:
    at, _ = door()
    places = fill(at, BANK)
    waiting = [asyncio.create_task(at.wait(BANK)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    # One of them leaves; its turn is the next one's.
    waiting[0].cancel()
    for place in places:
        place.leave(End.DONE)
    async with asyncio.timeout(LIMIT_S):
        got = await asyncio.gather(*waiting[1:])
    assert at.held(BANK) == 2
    for place in got:
        place.leave(End.DONE)
    assert at.in_flight == 0


async def test_a_turn_that_is_lost_with_its_waiter_goes_to_the_next() -> None:
    at, _ = door()
    places = fill(at, BANK)
    first, second = (asyncio.create_task(at.wait(BANK)) for _ in range(2))
    await asyncio.sleep(0)
    places.pop().leave(End.DONE)
    # It has been woken and has not run yet.
    first.cancel()
    async with asyncio.timeout(LIMIT_S):
        await second
    assert first.cancelled()


async def test_whose_share_is_used_up_does_not_hold_up_those_behind_it() -> None:
    at, _ = door()
    fill(at, BANK)
    places = fill(at, OTHER)
    greedy = [asyncio.create_task(at.wait(BANK)) for _ in range(5)]
    await asyncio.sleep(0)
    newcomer = asyncio.create_task(at.wait(PHONE))
    await asyncio.sleep(0)
    assert not newcomer.done()
    places.pop().leave(End.DONE)
    async with asyncio.timeout(LIMIT_S):
        (await newcomer).leave(End.DONE)
    assert not any(task.done() for task in greedy)
    for task in greedy:
        task.cancel()


async def test_a_place_that_was_waited_for_is_nobody_elses_meanwhile() -> None:
    at, _ = door()
    fill(at, BANK)
    places = fill(at, OTHER)
    waiting = asyncio.create_task(at.wait(PHONE))
    await asyncio.sleep(0)
    places.pop().leave(End.DONE)
    # A call that comes before the one that waits has run.
    with pytest.raises(Refused):
        at.enter(MOBILE)
    async with asyncio.timeout(LIMIT_S):
        await waiting


async def test_work_outside_of_calls_has_no_place_and_no_deadline() -> None:
    assert admission.place() is None
    assert admission.remaining_s(7.0) == 7.0
    admission.rest()
    admission.hold_until_done(asyncio.get_running_loop().create_future())


async def test_work_that_is_left_to_run_holds_the_place_of_its_call() -> None:
    at, _ = door()
    place = at.enter(BANK)
    admission.working(place, None)
    work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    admission.hold_until_done(work)
    place.leave(End.DONE)
    assert at.held(BANK) == 1
    work.set_result(None)
    await asyncio.sleep(0)
    assert at.held(BANK) == 0


def test_refusals_and_the_limit_are_counted() -> None:
    def refused(reason: str, caller: str) -> float:
        return REGISTRY.get_sample_value("sealpush_admission_refused_total", {"reason": reason, "caller": caller}) or 0.0

    before = refused("share", "device"), refused("full", "service")
    at, _ = door()
    fill(at, PHONE)
    fill(at, MESH)
    assert refused("share", "device") == before[0] + 1
    assert refused("full", "service") == before[1] + 1
    assert REGISTRY.get_sample_value("sealpush_admission_in_flight") == 64
    assert REGISTRY.get_sample_value("sealpush_admission_limit") == 64


def test_those_refused_together_come_back_apart() -> None:
    at, _ = door()
    fill(at, BANK)
    details = set()
    for _ in range(200):
        with pytest.raises(Refused) as caught:
            at.enter(BANK)
        details.add(caught.value.rendered[2][0][1])
    assert len(details) > 10


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (TimeoutError(), End.LATE),
        (DeadlineExceeded("late"), End.LATE),
        (Overloaded("too much"), End.SHED),
        (asyncio.CancelledError(), End.RESET),
        (GeneratorExit(), End.RESET),
        (InvalidRequest("no"), End.FAILED),
        (KeyError("bug"), End.FAILED),
    ],
    ids=repr,
)
async def test_a_piece_of_a_stream_ends_as_a_call_would_that_raised_the_same(
    error: BaseException, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[End] = []
    monkeypatch.setattr(Place, "leave", lambda place, end: ends.append(end))
    admission.visiting(Door(), party_of(None, "10.0.0.1"))
    with pytest.raises(type(error)):
        async with admission.turn():
            raise error
    assert ends == [end] == [End.by(error)]
