"""No use of a wall clock is forgotten: each stands in the registry of timers, and operators read what stands there."""

from __future__ import annotations

from collections import Counter

import pytest

from sealpushd.platform.timers import TIMERS, Measure
from tests.clock_uses import ROOT, python_uses, sql_uses, uses


def is_simulator(use: str) -> bool:
    """They play vendors, and their registry is one entry."""
    return use.startswith("simulators/")


def test_every_use_of_a_wall_clock_is_in_the_registry_and_says_what_bounds_it() -> None:
    registered = Counter(use for timer in TIMERS for use in timer.uses if not is_simulator(use))
    found = {use for use in uses() if not is_simulator(use)}
    unknown, gone = sorted(found - registered.keys()), sorted(registered.keys() - found)
    assert not unknown, (
        "these read a clock that anybody can set: measure durations by clock.monotonic(), or say in platform/timers.py what bounds them"
    )
    assert not gone, "these stand in platform/timers.py and read no wall clock any more"
    assert [use for use, times in registered.items() if times > 1] == []
    assert len({timer.name for timer in TIMERS}) == len(TIMERS)


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return time.time()",
        "def f():\n    return time.time_ns()",
        "def f():\n    return datetime.now(UTC)",
        "def f():\n    return self._clock.now()",
        "def f():\n    return make(now=clock.now)",
        "def f():\n    return clock.now_ms()",
        "def f():\n    return Reading.of(clock)",
        "def f():\n    from time import time",
        "def f():\n    return db.fetch('SELECT now()')",
        "def f():\n    return 'INSERT … VALUES (clock_timestamp())'",
    ],
)
def test_a_use_of_a_wall_clock_is_found(text: str) -> None:
    assert python_uses(text) == {"f"}


@pytest.mark.parametrize(
    "text", ["def f():\n    return time.monotonic()", "def f():\n    return loop.time()", 'def f():\n    """As SQL\'s now()."""']
)
def test_a_steady_clock_is_no_use(text: str) -> None:
    assert python_uses(text) == set()


@pytest.mark.parametrize(
    ("text", "uses_it"),
    [
        ("SELECT now()", True),
        ("SELECT CURRENT_TIMESTAMP", True),
        ("SELECT clock_timestamp ( )", True),
        ("-- now()\nSELECT 1", False),
        ("SELECT known()", False),
    ],
)
def test_a_statement_that_asks_the_databases_clock_is_found(text: str, uses_it: bool) -> None:
    assert sql_uses(text) is uses_it


def test_the_page_for_operators_has_every_timer_and_its_bound() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = [f"| {timer.name} | {timer.measure.value} | {timer.bound} |" for timer in TIMERS if timer.measure is not Measure.ELSEWHERE]
    table = [line for line in page.splitlines() if line in rows]
    assert table == rows, "docs/operations.md, Clocks: the table is not the registry's; missing: " + "\n".join(set(rows) - set(table))
