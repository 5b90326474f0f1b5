"""PublishBatch, messages a second, against one raw multi-row insert of the same bytes into one table."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import grpc

from bench.load import per_second, ratio
from bench.phones import Phones
from bench.publish import request
from bench.suite import Suite
from sealpush.v1 import publish_pb2
from sealpushd.platform.db import connect

BATCH = 256
CONCURRENCY = 16
# After a refusal.
PAUSE_S = 0.25


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    batches, rounds = (4, 2) if short else (60, 5)
    admin = await connect(suite.endpoints.postgres_url)
    await admin.execute("CREATE TABLE IF NOT EXISTS public.bench_floor (message_id uuid PRIMARY KEY, device_id uuid, content bytea)")
    try:
        async with Phones.registered(suite, 16, pushed=False) as phones:
            numbers = phones.numbers

            async def publish(_: int) -> None:
                batch = publish_pb2.PublishBatchRequest(requests=[request(numbers[n % len(numbers)]) for n in range(BATCH)])
                while True:
                    try:
                        answer = await suite.channels.publishing.PublishBatch(batch, metadata=suite.metadata, timeout=30)
                        break
                    except grpc.aio.AioRpcError as e:
                        # On a slow machine so many batches are more than is finished in time: come back, as a sender does.
                        if e.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                            raise
                        await asyncio.sleep(PAUSE_S)
                assert all(result.HasField("accepted") for result in answer.results)

            async def insert() -> float:
                ids = [[os.urandom(16) for _ in range(BATCH)] for _ in range(batches)]
                content = [os.urandom(700)] * BATCH
                start = time.perf_counter()
                for some in ids:
                    await admin.execute(
                        "INSERT INTO public.bench_floor SELECT * FROM unnest($1::uuid[], $1::uuid[], $2::bytea[])", some, content
                    )
                return batches * BATCH / (time.perf_counter() - start)

            await per_second(publish, 2, 1)
            measured, floor = [], []
            for _ in range(rounds):
                floor.append(await insert())
                measured.append(BATCH * await per_second(publish, batches, CONCURRENCY))
        return [ratio("batched publish", "messages/s", measured, "raw multi-row insert", floor, batch=BATCH, goal=5_000)]
    finally:
        await admin.execute("DROP TABLE public.bench_floor")
        await admin.close()
