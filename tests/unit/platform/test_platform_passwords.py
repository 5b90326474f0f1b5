"""Argon2id in turns: right and wrong, few at once, and no turn lost to callers that leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sealpushd.platform.errors import Overloaded
from sealpushd.platform.passwords import HASHES_AT_ONCE, HASHES_WAITING_EACH_MAX, HASHES_WAITING_MAX, Argon2, hash_password, is_password

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30


async def enter(argon2: Argon2, leave: asyncio.Event, address: str = "192.0.2.7") -> None:
    async with argon2.turn(address):
        await leave.wait()


async def test_a_hash_is_salted_and_is_of_its_password_only() -> None:
    argon2 = Argon2()
    hashed = await argon2.hash(b"271828")
    assert await argon2.is_password(hashed, b"271828")
    assert not await argon2.is_password(hashed, b"271829")
    assert hash_password(b"271828") != hashed
    assert not is_password(hash_password(b""), b"271828")


def test_a_guess_costs_64_mib_and_two_passes() -> None:
    assert hash_password(b"271828").startswith(b"$argon2id$v=19$m=65536,t=2,p=1$")


async def test_few_hash_at_once_and_who_comes_when_too_many_wait_is_sent_away() -> None:
    argon2, leave = Argon2(), asyncio.Event()
    tasks = [asyncio.create_task(enter(argon2, leave, f"{n}")) for n in range(HASHES_AT_ONCE + HASHES_WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await enter(argon2, leave, "another")
    # Whoever leaves while waiting makes room.
    tasks.pop().cancel()
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(enter(argon2, leave, "another")))
    leave.set()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*tasks)
        async with argon2.turn("one"), argon2.turn("two"):
            pass


async def test_one_address_fills_its_share_of_the_queue_and_not_the_queue() -> None:
    argon2, leave = Argon2(), asyncio.Event()
    tasks = [asyncio.create_task(enter(argon2, leave)) for _ in range(HASHES_AT_ONCE + HASHES_WAITING_EACH_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await enter(argon2, leave)
    tasks.append(asyncio.create_task(enter(argon2, leave, "another")))
    leave.set()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*tasks)


async def test_a_caller_that_leaves_keeps_its_turn_until_its_thread_is_done() -> None:
    argon2, begun, done = Argon2(), [threading.Event() for _ in range(HASHES_AT_ONCE)], threading.Event()

    async def leave_early(event: threading.Event) -> None:
        def work() -> None:
            event.set()
            done.wait(LIMIT_S)

        async with argon2.turn("192.0.2.7"):
            await argon2._in_thread(work)

    tasks = [asyncio.create_task(leave_early(event)) for event in begun]
    for event in begun:
        assert await asyncio.to_thread(event.wait, LIMIT_S)
    for task in tasks:
        task.cancel()
    later = asyncio.create_task(enter(argon2, asyncio.Event()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    assert argon2._turns.waiting == 1, "64 MiB each: what still runs counts"
    done.set()
    async with asyncio.timeout(LIMIT_S):
        assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True))
    later.cancel()
