"""Valkey's client on a real Valkey: that its calls end, in time and when they are told to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from sealpushd.engines import Engines
from sealpushd.platform import valkey as valkeys
from sealpushd.platform.valkey import CHANNEL_QUEUE, TIMEOUT_S, Valkey
from tests.contract.harness import LIMIT_S

pytestmark = pytest.mark.asyncio(loop_scope="session")

DEVICE = bytes(16)

CALLS: dict[str, Callable[[Valkey], Awaitable[object]]] = {
    "ping": lambda valkey: valkey.ping(),
    "publish": lambda valkey: valkey.publish(CHANNEL_QUEUE, b""),
    "present": lambda valkey: valkey.present([DEVICE]),
    "set_present": lambda valkey: valkey.set_present([DEVICE], b"stream"),
    "clear_present": lambda valkey: valkey.clear_present(DEVICE),
    "count": lambda valkey: valkey.count([("sealpush:limit:test", 60)]),
}


@pytest_asyncio.fixture(loop_scope="session")
async def valkey(valkey_url: str) -> AsyncIterator[Valkey]:
    client = Valkey(valkey_url)
    yield client
    await client.aclose()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_that_is_cancelled_ends_as_cancelled_and_the_next_gets_its_own_answer(
    valkey: Valkey, call: Callable[[Valkey], Awaitable[object]]
) -> None:
    async def work() -> None:
        await call(valkey)

    # Of the turns of the loop that a call takes, the first are those in which it connects and writes: there a cancellation was lost.
    for turn in range(1, 30):
        task = asyncio.create_task(work())
        for _ in range(turn):
            await asyncio.sleep(0)
        asked = task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() is asked, f"cancelled in turn {turn}"
        assert await valkey.count([(f"sealpush:limit:turn {turn}", 60)]) == [1]


async def test_a_valkey_that_hangs_is_given_up_and_the_next_call_gets_its_own_answer(
    valkey: Valkey, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await valkey.ping()
    monkeypatch.setattr(valkeys, "TIMEOUT_S", TIMEOUT_S)
    server = engines.processes["valkey"]
    os.kill(server, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LIMIT_S):
            assert await valkey.count([("sealpush:limit:hung", 60)]) is None
            assert await valkey.present([DEVICE]) == [False]
            assert not await valkey.ping()
    finally:
        os.kill(server, signal.SIGCONT)
    monkeypatch.setattr(valkeys, "TIMEOUT_S", LIMIT_S)
    assert await valkey.count([("sealpush:limit:answers", 60)], add=7) == [7]
