"""What a push service that hangs costs the others: two lanes with and without a third that is a black hole, in turn.

The third swallows what it is given: dispatch holds as many of its wake-ups as a lane may, and hundreds more wait. Time for the two begins
so that the swallowed sends run into their time-out while it runs, and their breaker opens. Each of the three is the black hole
in turn, and the two lanes run alone before and after: the mean of both is what they are compared with.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import grpc

from bench.lanes import PARTS
from bench.load import ratio
from bench.suite import Suite
from bench.vendors import IN_FLIGHT
from bench.wakeups import Batch, Device, Faults, Queue
from sealpushd.up.vendors import VENDORS, Vendor

DEVICES: Final = 1_000
# More than a lane may hold.
SWALLOWED: Final = 600
# A lane is given new credit by the quarter, so it may hold that much less.
HELD_MIN: Final = IN_FLIGHT * 3 // 4
# A send's answer is waited for 10 s; the two lanes start so long after the swallowed sends.
HEAD_START_S: Final = 8.0
FINISH_TIMEOUT_S: Final = 90.0
# Longer than anything here takes.
FOR_S: Final = 600.0


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    count, rounds, devices = (100, 1, 100) if short else (3_000, 3, DEVICES)
    head_start_s = 0.0 if short else HEAD_START_S
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(suite.endpoints.simulators))
        queue = await stack.enter_async_context(Queue.opened(suite, channel, holds=not short))
        faults = Faults(channel)
        enrolled = {vendor.kind: await queue.enrol(vendor, devices) for vendor in VENDORS}
        for vendor in VENDORS:
            await queue.pause(vendor)
        if not short:
            # Once round everywhere: connections, access tokens, and a first message for each device.
            await _push(suite, queue, [await queue.put(vendor, enrolled[vendor.kind], devices) for vendor in VENDORS])
        alone: list[float] = []
        beside: list[float] = []
        holes: list[str] = []
        costs_alone: list[dict[str, float]] = []
        costs_beside: list[dict[str, float]] = []
        for number in range(rounds):
            hole = VENDORS[number % len(VENDORS)]
            holes.append(hole.name)
            two = [vendor for vendor in VENDORS if vendor is not hole]
            before, cost_before = await _alone(suite, queue, two, enrolled, count)
            rate, cost = await _beside(suite, queue, faults, hole, two, enrolled, count, head_start_s)
            after, cost_after = await _alone(suite, queue, two, enrolled, count)
            beside.append(rate)
            alone.append((before + after) / 2)
            costs_beside.append(cost)
            costs_alone += [cost_before, cost_after]
        for vendor in VENDORS:
            await queue.resume(vendor)
    return [
        ratio(
            "two lanes beside a black hole",
            "wake-ups/s",
            beside,
            "the same two lanes alone",
            alone,
            by_hole=[
                {"black_hole": hole, "beside": round(one), "alone": round(other)}
                for hole, one, other in zip(holes, beside, alone, strict=True)
            ],
            # Of all that have a part in it: what else the machine does disturbs this less than the rate.
            cpu_us=_micros(costs_beside, *PARTS),
            floor_cpu_us=_micros(costs_alone, *PARTS),
            cpu_us_of_dispatch=_micros(costs_beside, "dispatch"),
            floor_cpu_us_of_dispatch=_micros(costs_alone, "dispatch"),
            wake_ups=2 * count,
            swallowed_at_once=IN_FLIGHT,
            goal_ratio=0.95,
        )
    ]


async def _alone(
    suite: Suite, queue: Queue, two: Sequence[Vendor], enrolled: Mapping[str, Sequence[Device]], count: int
) -> tuple[float, dict[str, float]]:
    return await _push(suite, queue, [await queue.put(vendor, enrolled[vendor.kind], count) for vendor in two])


async def _beside(
    suite: Suite,
    queue: Queue,
    faults: Faults,
    hole: Vendor,
    two: Sequence[Vendor],
    enrolled: Mapping[str, Sequence[Device]],
    count: int,
    head_start_s: float,
) -> tuple[float, dict[str, float]]:
    await faults.swallow(hole, for_s=FOR_S)
    loop = asyncio.get_running_loop()
    # Devices of its own: what is left of these wake-ups goes with them.
    victims = await queue.enrol(hole, SWALLOWED)
    await queue.put(hole, victims, SWALLOWED)
    await queue.resume(hole)
    await queue.until_held(hole, HELD_MIN, 20)
    start_at = loop.time() + head_start_s
    batches = [await queue.put(vendor, enrolled[vendor.kind], count) for vendor in two]
    await queue.until_due(batches)
    await asyncio.sleep(max(start_at - loop.time(), 0))
    try:
        return await _push(suite, queue, batches)
    finally:
        await queue.pause(hole)
        await faults.clear(hole)
        await queue.forget(victims)


async def _push(suite: Suite, queue: Queue, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
    """Resume the lanes of these batches until all is PUSHED, then pause them: wake-ups a second, and CPU-µs of each process for one."""
    wanted = sum(len(batch.message_ids) for batch in batches)
    await queue.until_due(batches)
    before = suite.cpu_seconds()
    began = await queue.begin(*batches)
    ended = [await queue.finish(batch, FINISH_TIMEOUT_S) for batch in batches]
    after = suite.cpu_seconds()
    for batch in batches:
        await queue.pause(batch.vendor)
    if sum(each.pushed for each in ended) < wanted:
        raise RuntimeError("wake-ups beside a black hole are not PUSHED")
    rate = wanted / (max(each.last_at for each in ended) - began).total_seconds()
    return rate, {part: (after[part] - before.get(part, 0.0)) * 1e6 / wanted for part in PARTS}


def _micros(costs: Sequence[Mapping[str, float]], *parts: str) -> int:
    return round(statistics.median(sum(cost[part] for part in parts) for cost in costs))
