"""A service that ends: what it does with whoever is connected."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from sealpushd.platform.clock import SystemClock
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.server import ServiceApp, _serve
from sealpushd.platform.settings import load
from sealpushd.up import health
from tests.contract.harness import LIMIT_S, LOOPBACK, Mesh


async def test_who_is_told_to_come_back_by_a_server_that_drains_does_not_find_it() -> None:
    """A stream that was ended would be opened here again at once, and hold up the end."""
    stopping, draining, drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ports: dict[str, int] = {}

    async def drain() -> None:
        draining.set()
        await drained.wait()

    def ready(found: dict[str, int]) -> None:
        ports.update(found)
        stopping.set()

    settings = load(mesh_port=0, metrics_port=0, host=LOOPBACK)
    serving = asyncio.create_task(
        _serve("fetch", settings, ServiceApp(drain=drain), ClockWatch(SystemClock()), Mesh().verifier, stopping, ready)
    )
    async with asyncio.timeout(LIMIT_S):
        await draining.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.ask(f"{LOOPBACK}:{ports['mesh']}", timeout_s=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        drained.set()
        await serving
