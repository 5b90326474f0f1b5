"""Run the benchmarks against the suite as `sealpush up` starts it.

    python -m bench                    all figures, some minutes
    python -m bench --short            the same with little load: to see that they run, not what they say
    python -m bench publish batch      some of them
    python -m bench push               those of the push services: lanes, isolation and storms
    python -m bench strangers          what an attack costs a service

One JSON object a figure on a line of standard output; what happens meanwhile is told on standard error, and in the end all figures
as a table. Figures are medians over rounds; each is measured next to its floor, round by round, because machines differ and drift: the
ratio is what to quote.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from bench.batch import measure as batch
from bench.isolation import measure as isolation
from bench.lanes import measure as lanes
from bench.latency import measure as latency
from bench.overload import measure as overload
from bench.path import measure as path
from bench.publish import measure as publish
from bench.sealing import measure as sealing
from bench.storms import measure as storms
from bench.strangers import measure as strangers
from bench.suite import Suite

FIGURES: dict[str, Callable[[Suite, bool], Awaitable[list[dict[str, Any]]]]] = {
    "publish": publish,
    "batch": batch,
    "overload": overload,
    "latency": latency,
    "path": path,
    "sealing": sealing,
    "lanes": lanes,
    "isolation": isolation,
    "storms": storms,
    "strangers": strangers,
}
# Several at once.
GROUPS: Final = {"push": ("lanes", "isolation", "storms")}
# Columns of the table, and how wide they are.
COLUMNS: Final = (("value", 11), ("floor_value", 11), ("ratio", 7), ("cpu_us", 7), ("floor_cpu_us", 12))


async def run(names: list[str], short: bool) -> None:
    figures: list[dict[str, Any]] = []
    async with Suite.start() as suite:
        for name in names:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            for figure in await FIGURES[name](suite, short):
                print(json.dumps(figure), flush=True)
                figures.append(figure)
            print(f"{name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(_table(figures), file=sys.stderr)


def _table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures for people; goals are in the JSON."""
    wide = max(len(figure["figure"]) for figure in figures)
    lines = ["", " ".join([" " * wide, *(f"{name:>{width}}" for name, width in COLUMNS), " unit; spread of the ratio; bound by"])]
    for figure in figures:
        cells = [f"{figure[name]:>{width},}" if name in figure else f"{'':>{width}}" for name, width in COLUMNS]
        spread = "{} to {}".format(*figure["ratio_spread"]) if "ratio_spread" in figure else ""
        notes = "; ".join(note for note in (figure["unit"], spread, figure.get("bound_by", "")) if note)
        lines.append(" ".join([f"{figure['figure']:<{wide}}", *cells, f" {notes}"]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, *GROUPS, []], help="which figures; all by default")
    parser.add_argument("--short", action="store_true", help="little load: checks that the benchmarks run")
    arguments = parser.parse_args()
    names = [name for asked in arguments.figures or FIGURES for name in GROUPS.get(asked, (asked,))]
    asyncio.run(run(list(dict.fromkeys(names)), arguments.short))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
