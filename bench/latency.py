"""From publish to opened on a phone at rest: one message at a time, on a live stream and woken by a push."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from bench.phones import Phones
from bench.publish import request
from bench.suite import Suite


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    messages = 10 if short else 200
    figures = []
    for name, way in (("live stream", Phones.streaming), ("push", Phones.woken)):
        async with Phones.registered(suite, 1) as phones, way(phones):
            took: list[float] = []
            # The floor of any answer: the round trip that only asks for a status of nothing.
            floor: list[float] = []
            for number in range(messages + 5):
                start = time.perf_counter()
                await suite.channels.publishing.Publish(request(phones.numbers[0]), metadata=suite.metadata, timeout=10)
                accepted = time.perf_counter()
                async with asyncio.timeout(20):
                    await phones.opened.get()
                if number >= 5:
                    took.append((time.perf_counter() - start) * 1000)
                    floor.append((accepted - start) * 1000)
        figures.append(
            {
                "figure": f"publish to opened, {name}",
                "unit": "ms",
                "value": round(statistics.median(took), 1),
                "p95": round(statistics.quantiles(took, n=20)[-1], 1),
                "floor": "publish accepted (durable), same messages",
                "floor_value": round(statistics.median(floor), 1),
                "ratio": round(statistics.median(took) / statistics.median(floor), 2),
                "messages": messages,
                "goal": 30,
            }
        )
    return figures
