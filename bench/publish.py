"""Unary Publish a second, against a bare grpc.aio server that stores and seals nothing. Same client, same TLS, same request."""

from __future__ import annotations

import asyncio
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import grpc

from bench.load import per_second, ratio
from bench.phones import Phones
from bench.suite import Suite
from sealpush.v1 import common_pb2, content_pb2, publish_pb2, publish_pb2_grpc

CONCURRENCY = 256


def request(phone: str) -> publish_pb2.PublishRequest:
    return publish_pb2.PublishRequest(
        request_id=str(uuid.uuid4()),
        recipient=common_pb2.Recipient(phone=phone),
        content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        plain=content_pb2.Content(title="Payment", body="You paid 120.50 at the corner shop. Balance: 4,310.00."),
    )


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    calls, rounds = (200, 2) if short else (4_000, 5)
    secrets = Path(suite.endpoints.ca).parent
    echo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.echo", str(secrets / "services.pem"), str(secrets / "services.key")), stdout=asyncio.subprocess.PIPE
    )
    assert echo.stdout is not None
    port = int(await echo.stdout.readline())
    credentials = grpc.ssl_channel_credentials(Path(suite.endpoints.ca).read_bytes())
    try:
        async with (
            grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel,
            Phones.registered(suite, 16, pushed=False) as phones,
        ):
            bare = publish_pb2_grpc.PublishingStub(channel)
            numbers = phones.numbers

            async def publish(number: int) -> None:
                answer = await suite.channels.publishing.Publish(
                    request(numbers[number % len(numbers)]), metadata=suite.metadata, timeout=10
                )
                assert answer.result.HasField("accepted"), answer

            async def ask_echo(number: int) -> None:
                await bare.Publish(request(numbers[number % len(numbers)]), metadata=suite.metadata, timeout=10)

            await per_second(publish, calls // 10, CONCURRENCY)
            measured, floor = [], []
            for _ in range(rounds):
                floor.append(await per_second(ask_echo, calls, CONCURRENCY))
                measured.append(await per_second(publish, calls, CONCURRENCY))
        return [ratio("unary publish", "messages/s", measured, "bare grpc.aio echo", floor, concurrency=CONCURRENCY, goal_ratio=0.4)]
    finally:
        echo.send_signal(signal.SIGTERM)
        await echo.wait()
