"""Load that ends by itself, and the arithmetic of rounds."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def per_second(call: Callable[[int], Awaitable[Any]], calls: int, concurrency: int) -> float:
    """Calls a second, `concurrency` at a time."""
    numbers = iter(range(calls))

    async def work() -> None:
        for number in numbers:
            await call(number)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return calls / (time.perf_counter() - start)


def ratio(name: str, unit: str, measured: list[float], floor_name: str, floor: list[float], **more: Any) -> dict[str, Any]:
    """A figure: medians of both sides, and the median, smallest and largest of their ratios, round by round."""
    ratios = [one / other for one, other in zip(measured, floor, strict=True)]
    return {
        "figure": name,
        "unit": unit,
        "value": round(statistics.median(measured), 1),
        "floor": floor_name,
        "floor_value": round(statistics.median(floor), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(measured),
        **more,
    }
