"""sealpush.proven: the latest time that is proven rises, and nobody who signs can carry it beyond the phone's own clock."""

import time
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sealpush.keys import DAY_MS, TIME_MS_MAX
from sealpush.local import PROVEN_STEP_MS, ServerTime, Store
from sealpush.memory_keystore import MemoryKeystore
from sealpush.proven import proven

NOW_MS = 1_700_000_000_000
times = st.one_of(st.integers(0, TIME_MS_MAX), st.integers(NOW_MS - 10 * DAY_MS, NOW_MS + 10 * DAY_MS))


@given(st.lists(st.tuples(times, times), max_size=20))
def test_the_bound_rises_to_what_was_signed_and_the_own_clock_had_reached(heard: list[tuple[int, int]]) -> None:
    bound_ms = 0
    for n, (signed_ms, own_ms) in enumerate(heard):
        before_ms, bound_ms = bound_ms, proven(bound_ms, signed_ms, own_ms)
        assert bound_ms >= before_ms
        assert bound_ms <= max(each for each, _ in heard[: n + 1])
        assert bound_ms <= max(own for _, own in heard[: n + 1])
        if signed_ms <= own_ms:
            assert bound_ms >= signed_ms


@given(st.lists(times, max_size=20), times)
def test_whatever_is_signed_a_phone_whose_clock_is_right_is_not_moved_into_the_future(signed: list[int], now_ms: int) -> None:
    bound_ms = 0
    for each in signed:
        bound_ms = proven(bound_ms, each, now_ms)
    assert bound_ms <= now_ms


@given(st.permutations([NOW_MS - DAY_MS, NOW_MS, NOW_MS + DAY_MS, 0]))
def test_the_order_in_which_times_are_heard_does_not_matter(signed: list[int]) -> None:
    bound_ms = 0
    for each in signed:
        bound_ms = proven(bound_ms, each, NOW_MS + 5)
    assert bound_ms == NOW_MS + 5


@dataclass
class StillClock:
    """A phone's own clock, which stands."""

    at_ms: int = NOW_MS

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


@given(st.lists(times, max_size=20), st.integers(-30 * DAY_MS, 30 * DAY_MS))
def test_what_the_server_says_pulls_the_bounded_time_below_nothing_that_was_proven(signed: list[int], offset_ms: int) -> None:
    keystore = MemoryKeystore()
    known = ServerTime(StillClock(), Store(keystore))
    for each in signed:
        known.prove(keystore, each)
    known.offset_ms = offset_ms
    assert known.now_ms() == NOW_MS + offset_ms
    assert known.bounded_ms() >= known.now_ms()
    proven_ms = max((min(each, NOW_MS) for each in signed), default=0)
    assert known.bounded_ms() > proven_ms - PROVEN_STEP_MS
    assert known.bounded_ms() == max(known.now_ms(), keystore.proven_time_ms())


def test_small_steps_are_not_written_and_what_another_process_kept_stays() -> None:
    keystore = MemoryKeystore()
    slow, fast = (ServerTime(StillClock(), Store(keystore)) for _ in range(2))
    slow.prove(keystore, NOW_MS - 2 * PROVEN_STEP_MS)
    slow.prove(keystore, NOW_MS - PROVEN_STEP_MS - 1)
    assert keystore.proven_time_ms() == NOW_MS - 2 * PROVEN_STEP_MS
    fast.prove(keystore, NOW_MS)
    slow.prove(keystore, NOW_MS - PROVEN_STEP_MS)
    assert keystore.proven_time_ms() == NOW_MS
