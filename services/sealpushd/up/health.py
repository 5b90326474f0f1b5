"""Asking the health service that every server has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sealpushd.platform.clients import NO_PROXY

# Of whoever waits for a process that starts: it listens from one moment to the next.
_EAGER: Final = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
# Of `answers_at_all`: one call, longer than its callers wait, and the pause after a connection that broke.
_TRY_S: Final = 10.0
_PAUSE_S: Final = 0.1


async def ask(address: str, *, timeout_s: float, wait: bool = False) -> str:
    """`SERVING`, `NOT_SERVING` …; with `wait` also when nobody listens yet. Raises AioRpcError."""
    return await _ask(address, timeout_s=timeout_s, wait=wait, options=_EAGER)


async def answers_at_all(address: str) -> None:
    """Return once whoever listens at an address answers anything, be it a refusal. Waits for ever; the caller bounds it."""
    while True:
        try:
            # Not eager: an attempt to connect that is given up after 100 ms says nothing about a process that is merely slow.
            await _ask(address, timeout_s=_TRY_S, wait=True, options=())
            return
        except grpc.aio.AioRpcError as e:
            # These two come from our own side of the connection, every other from the process that was asked.
            if e.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return
        await asyncio.sleep(_PAUSE_S)


async def _ask(address: str, *, timeout_s: float, wait: bool, options: Sequence[tuple[str, int]]) -> str:
    async with grpc.aio.insecure_channel(address, options=[NO_PROXY, *options]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        check = stub.Check  # type: ignore[attr-defined] # its stubs leave the methods out
        answer = await check(health_pb2.HealthCheckRequest(), wait_for_ready=wait, timeout=timeout_s)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
