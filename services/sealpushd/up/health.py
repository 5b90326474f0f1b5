"""Asking the health service that every server has."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Of whoever waits for a process that starts: it listens from one moment to the next.
_EAGER = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]


async def ask(address: str, *, timeout_s: float, wait: bool = False) -> str:
    """`SERVING`, `NOT_SERVING` …; with `wait` also when nobody listens yet. Raises AioRpcError."""
    async with grpc.aio.insecure_channel(address, options=_EAGER) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        check = stub.Check  # type: ignore[attr-defined] # its stubs leave the methods out
        answer = await check(health_pb2.HealthCheckRequest(), wait_for_ready=wait, timeout=timeout_s)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
