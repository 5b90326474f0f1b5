"""Strangers who give each sign-in up after moments, beside a bank that signs in: a process of its own, so that only the service is shared.

python -m tests.contract.impatient ADDRESS LOGIN PASSWORD     prints how the bank's calls ended, as JSON
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from contextlib import AsyncExitStack

import grpc

from sealpush.v1 import accounts_pb2, accounts_pb2_grpc
from tests.contract.harness import calling_from

STRANGERS, LOOPS = 8, 64
# Together fewer calls than gRPC lets wait (`PENDING_MAX`): what is beyond, it ends by itself, whoever's it is.
CALLS_EACH = 40
# What strangers give a call at the most, so that it ends at any point of the work; and the bank: as long as the SDK.
MOMENT_S, PATIENCE_S = 0.2, 10.0
BANKS = 8


async def main(address: str, login: str, password: str) -> None:
    banks: Counter[str] = Counter()
    strangers: Counter[str] = Counter()

    async def sign_in(channel: grpc.aio.Channel, ended: Counter[str], login: str, password: str, timeout: float) -> None:
        try:
            stub = accounts_pb2_grpc.AccountsStub(channel)
            await stub.SignIn(accounts_pb2.SignInRequest(login=login, password=password), timeout=timeout)
            ended["OK"] += 1
        except grpc.aio.AioRpcError as e:
            ended[e.code().name] += 1

    async def give_up_each(channel: grpc.aio.Channel, login: str) -> None:
        for _ in range(CALLS_EACH):
            await sign_in(channel, strangers, login, "wrong password", random.uniform(0.001, MOMENT_S))  # noqa: S311 - dice of a test

    async with AsyncExitStack() as stack:
        bank = await stack.enter_async_context(calling_from("127.0.0.2", address))
        crowd = [await stack.enter_async_context(calling_from(f"127.0.1.{each + 1}", address)) for each in range(STRANGERS)]
        giving_up = asyncio.gather(*(give_up_each(crowd[each % STRANGERS], f"nobody-{each}") for each in range(LOOPS)))
        while not giving_up.done():
            await asyncio.gather(*(sign_in(bank, banks, login, password, PATIENCE_S) for _ in range(BANKS)))
        await giving_up
    print(json.dumps({"bank": banks, "strangers": strangers}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
