"""Run the benchmarks against the suite as `sealpush up` starts it.

    python -m bench                    all figures, some minutes
    python -m bench --short            the same with little load: to see that they run, not what they say
    python -m bench publish batch      some of them

One JSON object a figure on a line of standard output; what happens meanwhile is told on standard error. Figures are medians over rounds;
each is measured next to its floor, round by round, because machines differ and drift: the ratio is what to quote.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from bench.batch import measure as batch
from bench.latency import measure as latency
from bench.path import measure as path
from bench.publish import measure as publish
from bench.suite import Suite

FIGURES: dict[str, Callable[[Suite, bool], Awaitable[list[dict[str, Any]]]]] = {
    "publish": publish,
    "batch": batch,
    "latency": latency,
    "path": path,
}


async def run(names: list[str], short: bool) -> None:
    async with Suite.start() as suite:
        for name in names:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            for figure in await FIGURES[name](suite, short):
                print(json.dumps(figure), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="which figures; all by default")
    parser.add_argument("--short", action="store_true", help="little load: checks that the benchmarks run")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.figures or list(FIGURES), arguments.short))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
