"""A push service that asks for patience in the middle of a run: how many requests it gets for a wake-up, and that none is lost.

A third of the wake-ups are accepted, then everything is refused for a while, then everything is accepted again. The figure is the
sends that the push service received for each wake-up: 1 would be perfect. What was on the way when the storm began, a lane's
capacity, is refused in any case, so the figure depends on how many wake-ups there are: `wasted` does not.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc

from bench.suite import Suite
from bench.vendors import IN_FLIGHT
from bench.wakeups import Faults, Queue
from sealpushd.up.vendors import FCM, HMS, Vendor

DEVICES: Final = 1_000
GOAL: Final = 1.1
FINISH_TIMEOUT_S: Final = 170.0


@dataclass(frozen=True, slots=True)
class Storm:
    """What is answered, and for how long. `retry_after_s`: the header; None: there is none.

    `only_requests`: it ends after so many requests, however long that takes; for runs that only show that they run.
    """

    name: str
    vendor: Vendor
    status: int
    reason: str | None
    retry_after_s: int | None
    lasts_s: float
    only_requests: int = 0


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    count, only, lasts_s = (50, 2, 0.0) if short else (5_000, 0, 5.0)
    quota = Storm("FCM 429 QUOTA_EXCEEDED, Retry-After", FCM, 429, "QUOTA_EXCEEDED", 1 if short else 2, lasts_s, only)
    # Huawei's flow control is a bare 503.
    flow = Storm("HMS 503", HMS, 503, None, None, lasts_s, only)
    # Without a Retry-After, FCM asks for a minute's pause.
    quiet = Storm("FCM 429 QUOTA_EXCEEDED, no Retry-After", FCM, 429, "QUOTA_EXCEEDED", None, lasts_s)
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(suite.endpoints.simulators))
        queue = await stack.enter_async_context(Queue.opened(suite, channel, holds=not short))
        faults = Faults(channel)
        # A lane knows nothing of another's weather, and nothing here is a matter of speed.
        figures = list(await asyncio.gather(*(_weather(queue, faults, storm, count) for storm in (quota, flow))))
        if not short:
            figures.append(await _weather(queue, faults, quiet, count))
    return figures


async def _weather(queue: Queue, faults: Faults, storm: Storm, count: int) -> dict[str, Any]:
    vendor = storm.vendor
    devices = await queue.enrol(vendor, min(DEVICES, count))
    await queue.pause(vendor)
    # Another benchmark may have left a send that nobody answers.
    await queue.until_idle(vendor, 30)
    before = await faults.counters(vendor)
    if not queue.holds:
        # There is no run to be in the middle of.
        await _begin(faults, storm)
    batch = await queue.put(vendor, devices, count)
    await queue.until_due([batch])
    began = await queue.begin(batch)
    try:
        if queue.holds:
            if not await queue.until_accepted(batch, count // 3, 60):
                raise RuntimeError(f"{vendor.name} takes nothing before the storm")
            await _begin(faults, storm)
        stormed_at = time.time()
        ended = await queue.finish(batch, FINISH_TIMEOUT_S)
    finally:
        await faults.clear(vendor)
    after = await faults.counters(vendor)
    requests = after.requests - before.requests
    return {
        "figure": f"storm: {storm.name}",
        "unit": "requests a wake-up",
        "value": round(requests / count, 3),
        "floor": "one each",
        "floor_value": 1.0,
        "ratio": round(requests / count, 3),
        "wake_ups": count,
        "pushed": ended.pushed,
        "wasted": requests - count,
        "in_flight": IN_FLIGHT,
        "storm_s": storm.lasts_s,
        "retry_after_s": storm.retry_after_s,
        "attempts_max": ended.attempts_max,
        # From the end of the storm to the last PUSHED.
        "recovered_s": round(ended.last_at.timestamp() - stormed_at - storm.lasts_s, 1),
        "seconds": round((ended.last_at - began).total_seconds(), 1),
        "goal": GOAL,
    }


async def _begin(faults: Faults, storm: Storm) -> None:
    await faults.answer(storm.vendor, storm.status, storm.reason, storm.retry_after_s, for_s=storm.lasts_s, requests=storm.only_requests)
