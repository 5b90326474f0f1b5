"""sealpush.floor: the lowest suite of a device rises, never falls, and spares what is on its way."""

from hypothesis import given
from hypothesis import strategies as st

from sealpush.floor import Floor, confirm, floor, raise_to
from sealpush.keys import DAY_MS
from sealpush.local import FUTURE_SKEW_MS
from sealpush.memory_keystore import MemoryKeystore

NOW_MS = 1_700_000_000_000


def test_a_fresh_device_accepts_every_suite() -> None:
    assert floor(MemoryKeystore()) == Floor()
    assert Floor().min_suite(NOW_MS) == 1


@given(st.integers(-2 * FUTURE_SKEW_MS, 2 * FUTURE_SKEW_MS))
def test_after_a_rise_only_content_from_before_it_may_be_of_a_lower_suite(after_ms: int) -> None:
    expected = 1 if after_ms <= FUTURE_SKEW_MS else 2
    assert Floor(2, NOW_MS).min_suite(NOW_MS + after_ms) == expected
    assert Floor(2).min_suite(NOW_MS + after_ms) == 1


steps = st.one_of(st.tuples(st.just("raise"), st.integers(1, 3)), st.tuples(st.just("confirm"), st.integers(1, 3)))


@given(st.lists(steps, max_size=8))
def test_whatever_is_asked_the_suite_never_falls_and_its_first_confirmation_stays(asked: list[tuple[str, int]]) -> None:
    keystore = MemoryKeystore()
    for n, (step, suite) in enumerate(asked):
        before = floor(keystore)
        if step == "raise":
            assert raise_to(keystore, suite) == max(before.suite, suite)
        else:
            confirm(keystore, suite, NOW_MS + n)
        after = floor(keystore)
        assert after.suite == max(before.suite, suite if step == "raise" else 1)
        if after.suite == before.suite and before.raised_at_ms is not None:
            assert after == before
        elif step == "confirm" and suite == after.suite:
            assert after.raised_at_ms == NOW_MS + n
        else:
            assert after.raised_at_ms is None


def test_a_server_whose_clock_ran_ahead_at_the_rise_does_not_hold_the_floor_down_for_ever() -> None:
    keystore = MemoryKeystore()
    raise_to(keystore, 2)
    confirm(keystore, 2, NOW_MS + 1000 * DAY_MS)
    confirm(keystore, 2, NOW_MS + 7 * DAY_MS)
    assert floor(keystore) == Floor(2, NOW_MS + 7 * DAY_MS)
    confirm(keystore, 2, NOW_MS + 14 * DAY_MS)
    assert floor(keystore) == Floor(2, NOW_MS + 7 * DAY_MS)
