"""What is still accepted when more is asked than can be done: unary Publish at 1 to 5 times its peak, against the peak.

The peak is taken first, with calls that follow each other; then calls come at a rate, whether those before are answered or not, as those of
many senders do. Both come from a process of its own (`bench.openloop`). Clients are of two kinds: those that do about a refusal what the
SDK does, by its own classes (they hold attempts back, wait, try again), and raw ones that take no notice. On a machine whose cores the
services, the database and the load share, each refused call and the load itself take from what is accepted: the shares of a core that they
took stand beside.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import grpc

from bench.openloop import DEADLINE_EXCEEDED, ID_MARK, OK, RESOURCE_EXHAUSTED, Order, Outcome
from bench.phones import Phones
from bench.publish import CONCURRENCY, request
from bench.suite import Suite, cpu_seconds
from sealpushd.up.sdk import public_endpoints

FACTORS: Final = (1.0, 1.5, 2.0, 3.0, 5.0)
# How long a raw client waits.
TIMEOUT_S: Final = 2.0
# What the SDK gives a call, with its pauses, unless its user says otherwise.
SDK_TIMEOUT_S: Final = 10.0
# Those of many senders: a single connection holds 512 calls at most, and what is more waits in its client.
CONNECTIONS: Final = 16
# A call that takes longer than this after the load fell is not served as before it.
RECOVERED_S: Final = 0.25
SERVICES: Final = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    rounds, seconds, settle_s, watch_s = (1, 3.0, 1.0, 0.5) if short else (3, 10.0, 4.0, 6.0)
    factors = FACTORS[:1] if short else FACTORS
    async with Phones.registered(suite, 16, pushed=False) as phones:
        asked = request(phones.numbers[0])
        asked.request_id = ID_MARK.decode()
        host, _, port = public_endpoints(suite.endpoints).publishing.rpartition(":")

        def order(timeout_s: float = TIMEOUT_S, **how: Any) -> Order:
            return Order(
                host=host,
                port=int(port),
                ca=suite.endpoints.ca,
                path="/sealpush.v1.Publishing/Publish",
                authorization=suite.metadata[0][1],
                request_hex=asked.SerializeToString().hex(),
                timeout_s=timeout_s,
                **how,
            )

        await _load(order(seconds=1.0, settle_s=0.0, connections=1, concurrency=32))
        peaks = []
        for _ in range(rounds):
            outcome = await _load(order(seconds=seconds / 2, settle_s=settle_s / 2, connections=CONNECTIONS, concurrency=CONCURRENCY))
            peaks.append(outcome.statuses.get(OK, 0) / outcome.seconds)
        peak = statistics.median(peaks)
        figures = []
        for factor, obeys in [(factor, obeys) for obeys in (True, False) for factor in factors]:
            pids = {pid: name for pid, name in suite.processes().items() if name in SERVICES}
            timeout_s = SDK_TIMEOUT_S if obeys else TIMEOUT_S
            wanted = order(
                seconds=seconds, settle_s=settle_s, timeout_s=timeout_s, connections=CONNECTIONS, rate=factor * peak, obeys=obeys
            )
            loading = asyncio.create_task(_load(wanted))
            publishing = next(pid for pid, name in pids.items() if name == "publishing")
            cpu, began = cpu_seconds(publishing), time.monotonic()
            most = 0
            while not loading.done():
                most = max(most, sum(map(_resident_bytes, pids)))
                await asyncio.wait((loading,), timeout=0.5)
            cpu_share = (cpu_seconds(publishing) - cpu) / (time.monotonic() - began)
            outcome = loading.result()
            recovery_s = await _recovery(suite, phones.numbers[1], watch_s)
            goodput = outcome.statuses.get(OK, 0) / outcome.seconds
            figures.append(
                {
                    "figure": f"unary publish at {factor:g} times the peak, {'clients as the SDK' if obeys else 'raw clients'}",
                    "unit": "messages/s",
                    "value": round(goodput, 1),
                    "floor": f"peak, {CONCURRENCY} at a time",
                    "floor_value": round(peak, 1),
                    "ratio": round(goodput / peak, 3),
                    "offered": round(outcome.calls / outcome.seconds, 1),
                    "sent": round(outcome.sent / outcome.seconds, 1),
                    "refused": round(outcome.refused / outcome.seconds, 1),
                    "resource_exhausted_share": _share(outcome, RESOURCE_EXHAUSTED),
                    "deadline_exceeded_share": _share(outcome, DEADLINE_EXCEEDED),
                    "other_share": round(1 - sum(_share(outcome, each) for each in (OK, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED)), 3),
                    "ok_p50_ms": round(outcome.ok_p50_s * 1000, 1),
                    "ok_p99_ms": round(outcome.ok_p99_s * 1000, 1),
                    "services_mb": round(most / 1e6),
                    "recovery_s": round(recovery_s, 2),
                    "publishing_cpu_share": round(cpu_share, 2),
                    "generator_cpu_share": round(outcome.cpu_share, 2),
                    "generator_behind_s": round(outcome.behind_s, 3),
                }
            )
        return figures


async def _load(order: Order) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.openloop"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate(json.dumps(asdict(order)).encode())
    assert process.returncode == 0
    return Outcome(**json.loads(answer))


def _share(outcome: Outcome, status: str) -> float:
    return round(outcome.statuses.get(status, 0) / max(1, outcome.calls), 3)


async def _recovery(suite: Suite, number: str, watch_s: float) -> float:
    """How long after the load fell the last call ended that was refused or slow."""
    fell = time.monotonic()
    last = fell
    while (began := time.monotonic()) < fell + watch_s:
        try:
            await suite.channels.publishing.Publish(request(number), metadata=suite.metadata, timeout=TIMEOUT_S)
            is_well = time.monotonic() - began < RECOVERED_S
        except grpc.aio.AioRpcError:
            is_well = False
        if not is_well:
            last = time.monotonic()
        await asyncio.sleep(0.02)
    return last - fell


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0
