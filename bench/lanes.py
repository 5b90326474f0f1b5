"""One lane a push service: the provider alone, and the whole of dispatch, each against a bare HTTP/2 client with the same requests.

The provider's `send` runs in the measuring process, on the event loop that services use, against two peers: the simulated push service,
which checks all that a vendor checks and so is slower than its client, and a minimal one that only answers. The whole of dispatch is the
suite's own process: wake-ups are queued while the lane is paused, and time runs from the moment before it is resumed to the commit that
makes the last one PUSHED. Beside it the bare client sends as many to the same simulators.

`cores` says how many each side kept busy while the product's side was measured; the peers have one thread each.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import uvloop

from bench.load import per_second, ratio
from bench.suite import Suite, cpu_seconds
from bench.vendors import IN_FLIGHT, BareClient, Peer, minimal, provider, simulators, wake_ups
from bench.wakeups import Queue
from sealpushd.dispatch.providers.base import Accepted
from sealpushd.up.vendors import VENDORS, Vendor

BARE: Final = "bare pyreqwest, requests prepared"
GOAL_RATIO: Final = 0.5
DEVICES: Final = 500
# A peer that was busy for so much of the time is what bounds the figure.
BUSY: Final = 0.9
FINISH_TIMEOUT_S: Final = 60.0
# Processes of the suite that have a part in a push.
PARTS: Final = ("dispatch", "fetch", "postgres", "registration", "simulators")


class Spent:
    """Wall and CPU time of this process and of others, between `start` and `stop`."""

    def __init__(self, suite: Suite | None, peer: Peer) -> None:
        self._suite = suite
        self._peer = peer
        self._before: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        others = self._suite.cpu_seconds() if self._suite is not None else {"push service": cpu_seconds(self._peer.pid)}
        return others | {"client": time.process_time(), "wall": time.perf_counter()}

    def start(self) -> None:
        self._before = self._now()

    def stop(self) -> dict[str, float]:
        return {name: at - self._before.get(name, 0.0) for name, at in self._now().items()}


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    return [*await _providers(suite, short), *await _dispatch(suite, short)]


# The provider alone


async def _providers(suite: Suite, short: bool) -> list[dict[str, Any]]:
    figures = []
    async with simulators(suite) as simulated, minimal(suite) as least:
        for vendor in VENDORS:
            for peer, calls in ((simulated, 1_000), (least, 4_000)):
                tokens = await peer.new_tokens(vendor, 50 if short else DEVICES)
                # A loop of its own, of the kind that services run on; this one sleeps meanwhile.
                work = _compare(suite, vendor, peer, tokens, 100 if short else calls, 1 if short else 5)
                figures.append(await asyncio.to_thread(uvloop.run, work))
    return figures


async def _compare(suite: Suite, vendor: Vendor, peer: Peer, tokens: Sequence[str], calls: int, rounds: int) -> dict[str, Any]:
    lane = provider(suite, vendor, peer)
    spent = Spent(None, peer)
    rates: dict[str, list[float]] = {"lane": [], "bare": []}
    costs: dict[str, list[dict[str, float]]] = {"lane": [], "bare": []}
    try:
        async with BareClient(suite, vendor, peer) as bare:
            given = wake_ups(vendor, tokens, calls)
            requests = await bare.prepare(given)

            async def send(number: int) -> None:
                outcome = await lane.send(*given[number])
                if not isinstance(outcome, Accepted):
                    raise RuntimeError(f"{vendor.name} did not take a wake-up: {outcome!r}")

            async def send_bare(number: int) -> None:
                await bare.send(requests[number])

            # The first of a connection goes alone: APNs allows no more before it knows who asks.
            for warm_up in (send, send_bare):
                await warm_up(0)
                await per_second(warm_up, calls // 10, IN_FLIGHT)
            for _ in range(rounds):
                for name, call in (("bare", send_bare), ("lane", send)):
                    spent.start()
                    rates[name].append(await per_second(call, calls, IN_FLIGHT))
                    costs[name].append(spent.stop())
    finally:
        await lane.aclose()
    cores = _cores(costs["lane"])
    return ratio(
        f"{vendor.name} provider, {peer.name}",
        "wake-ups/s",
        rates["lane"],
        BARE,
        rates["bare"],
        cpu_us=_micros(costs["lane"], "client", calls),
        floor_cpu_us=_micros(costs["bare"], "client", calls),
        peer_cpu_us=_micros(costs["lane"], "push service", calls),
        cores=cores,
        bound_by="push service" if cores["push service"] >= BUSY else "client",
        in_flight=IN_FLIGHT,
        goal_ratio=GOAL_RATIO,
    )


# The whole of dispatch


async def _dispatch(suite: Suite, short: bool) -> list[dict[str, Any]]:
    count, rounds = (100, 1) if short else (2_000, 3)
    runs = {vendor.kind: _Runs() for vendor in VENDORS}
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(suite.endpoints.simulators))
        queue = await stack.enter_async_context(Queue.opened(suite, channel, holds=not short))
        if not short:
            await _round(suite, queue, count // 4, {vendor.kind: _Runs() for vendor in VENDORS})
        for _ in range(rounds):
            await _round(suite, queue, count, runs)
    return [_whole(vendor, runs[vendor.kind], count) for vendor in VENDORS]


@dataclass(slots=True)
class _Runs:
    """Wake-ups a second and costs, round by round."""

    rates: list[float] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    bare_rates: list[float] = field(default_factory=list)
    bare_costs: list[dict[str, float]] = field(default_factory=list)


async def _round(suite: Suite, queue: Queue, count: int, runs: Mapping[str, _Runs]) -> None:
    """Every vendor once. A device gets one wake-up, so that no push service has anything to replace or to tell of."""
    spent = Spent(suite, queue.peer)
    batches = []
    for vendor in VENDORS:
        tokens = await queue.peer.new_tokens(vendor, count)
        rate, cost = await asyncio.to_thread(uvloop.run, _bare(suite, vendor, queue.peer, tokens))
        runs[vendor.kind].bare_rates.append(rate)
        runs[vendor.kind].bare_costs.append(cost)
        devices = await queue.enrol(vendor, count)
        await queue.pause(vendor)
        batches.append(await queue.put(vendor, devices, count))
    await queue.until_due(batches)
    for batch in batches:
        spent.start()
        began = await queue.begin(batch)
        ended = await queue.finish(batch, FINISH_TIMEOUT_S)
        cost = spent.stop()
        if ended.pushed < count:
            raise RuntimeError(f"{batch.vendor.name}: {count - ended.pushed} of {count} wake-ups are not PUSHED")
        took = (ended.last_at - began).total_seconds()
        runs[batch.vendor.kind].rates.append(count / took)
        runs[batch.vendor.kind].costs.append(cost | {"wall": took})


def _whole(vendor: Vendor, runs: _Runs, count: int) -> dict[str, Any]:
    cores = _cores(runs.costs)
    # Those that have no part in it idle.
    by_process = {name: _micros(runs.costs, name, count) for name in sorted(cores) if name in PARTS}
    busiest = max(by_process, key=lambda name: cores[name])
    return ratio(
        f"{vendor.name} dispatch, queued to PUSHED",
        "wake-ups/s",
        runs.rates,
        BARE,
        runs.bare_rates,
        cpu_us=by_process["dispatch"],
        floor_cpu_us=_micros(runs.bare_costs, "client", count),
        cpu_us_by_process=by_process,
        cores={name: cores[name] for name in by_process},
        bound_by=busiest if cores[busiest] >= BUSY else "all together",
        wake_ups=count,
        goal_ratio=GOAL_RATIO,
    )


async def _bare(suite: Suite, vendor: Vendor, peer: Peer, tokens: Sequence[str]) -> tuple[float, dict[str, float]]:
    """One wake-up for each of these by the bare client: a second, and what that cost."""
    async with BareClient(suite, vendor, peer) as bare:
        requests = await bare.prepare(wake_ups(vendor, tokens, len(tokens)))
        await bare.send(requests[0])
        spent = Spent(None, peer)
        spent.start()
        rate = await per_second(lambda number: bare.send(requests[number + 1]), len(requests) - 1, IN_FLIGHT)
        return rate, spent.stop()


def _micros(costs: Sequence[dict[str, float]], name: str, calls: int) -> int:
    return round(statistics.median(cost[name] for cost in costs) * 1e6 / calls)


def _cores(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(cost[name] / cost["wall"] for cost in costs), 2) for name in costs[0] if name != "wall"}
