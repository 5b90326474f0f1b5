"""Phones whose own clock is wrong, or is set while they run, against all real services: nothing is lost, nothing refused.

And phones that a server tells a wrong time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from sealpush import MemoryKeystore, SqliteKeystore, State
from sealpush.ids import MessageId
from sealpushd.engines import Engines
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated
from tests.contract.phones import DAY_MS, HOUR_MS, World, WrongClock, bodies, shows, whole_world

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

WRONG_MS = [HOUR_MS, -HOUR_MS, 24 * HOUR_MS, -24 * HOUR_MS]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "registration", "keys", "publishing", "fetch")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with whole_world(engines, mesh, urls, clock) as made:
        yield made


@pytest.mark.parametrize("wrong_by_ms", WRONG_MS)
async def test_a_phone_with_a_wrong_clock_registers_makes_prekeys_and_receives(world: World, wrong_by_ms: int) -> None:
    device, number = await world.registered(WrongClock(wrong_by_ms))
    assert await device.drain() == []
    assert (await device.diagnose()).one_time_prekeys == 20, "the service took them"
    ids = await world.publish(number, "by the server") + await world.publish(number, "by the sender", sealed=True)
    assert bodies(await device.drain()) == ["by the server", "by the sender"]
    assert (await device.diagnose()).one_time_prekeys == 19, "the sender used one"
    assert await world.are_delivered(ids)
    assert bodies(await device.inbox()) == ["by the sender", "by the server"]


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_is_set_while_the_phone_runs_loses_nothing(world: World, by_ms: int) -> None:
    clock = WrongClock()
    device, number = await world.registered(clock)
    ids: list[MessageId] = []
    for turn in range(6):
        ids += await world.publish(number, f"{turn}a", f"{turn}b", sealed=turn % 2 == 0)
        clock.wrong_by_ms += by_ms if turn < 3 else -by_ms
        assert bodies(await device.on_wake()) == [f"{turn}a", f"{turn}b"]
        await device.maintain()
    assert await world.are_delivered(ids)
    assert len(await device.inbox()) == 12


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_was_set_while_the_app_was_off_loses_nothing(world: World, by_ms: int, tmp_path: Path) -> None:
    keystore = SqliteKeystore(tmp_path / "phone.db")
    _, number = await world.registered(WrongClock(), keystore)
    ids = await world.publish(number, "a", "b")
    # A new process has nothing but the offset of then.
    device = world.device(WrongClock(by_ms), keystore)
    assert bodies(await device.drain()) == ["a", "b"]
    assert await world.are_delivered(ids)
    keystore.close()


@pytest.mark.parametrize("by_ms", WRONG_MS)
async def test_a_clock_that_is_set_while_a_stream_runs_loses_nothing(world: World, by_ms: int) -> None:
    clock = WrongClock()
    device, number = await world.registered(clock)
    async with asyncio.timeout(LIMIT_S), device.stream() as messages:
        ids = []
        for turn in range(4):
            ids += await world.publish(number, str(turn))
            assert (await anext(messages)).content.body == str(turn)
            clock.wrong_by_ms += by_ms if turn < 2 else -by_ms
        for each in ids:
            assert (await world.sender.status(each, timedelta(seconds=8))).state is State.DELIVERED


async def test_a_server_that_goes_back_by_days_brings_no_entry_back_that_has_ended(world: World, tmp_path: Path) -> None:
    with world.at(timedelta(days=-5)):
        ended = await world.another_sender(until=timedelta(days=-2))
    keystore = SqliteKeystore(tmp_path / "phone.db")
    device, number = await world.registered(WrongClock(), keystore)
    await shows(world, device, number)
    _, number_of_another = await world.registered(WrongClock(), nothing_heard := MemoryKeystore())
    world.liar.lie = timedelta(days=-5)
    with world.at(world.liar.lie):
        waiting = await world.publish(number, "of the past", by=ended, lifetime=timedelta(days=20))
        await world.publish(number_of_another, "of the past", by=ended, lifetime=timedelta(days=20))
    # Each a new process, by whatever clock of its own.
    for own_ms in (0, HOUR_MS, -5 * DAY_MS, -30 * DAY_MS):
        device = world.device(WrongClock(own_ms), keystore)
        assert await device.drain() == []
        assert "outside its time" in (await device.diagnose()).last_error
    assert not await world.are_delivered(waiting, by=ended)
    # What remains: a phone that has heard nothing signed since the entry ended.
    assert bodies(await world.device(WrongClock(), nothing_heard).drain()) == ["of the past"]
    # The right time again: the bound is in nobody's way.
    world.liar.lie = timedelta()
    await shows(world, world.device(WrongClock(), keystore), number)
    keystore.close()


@pytest.mark.parametrize("own_ms", [0, HOUR_MS, -DAY_MS])
async def test_a_server_that_ran_ahead_and_signed_its_times_ends_no_entry(world: World, tmp_path: Path, own_ms: int) -> None:
    soon_over = await world.another_sender(until=timedelta(days=1))
    keystore = SqliteKeystore(tmp_path / "phone.db")
    own = WrongClock(own_ms)
    _, number = await world.registered(own, keystore)
    world.liar.lie = timedelta(days=20)
    with world.at(world.liar.lie):
        ids = await world.publish(number, "of the future")
    assert bodies(await world.device(own, keystore).drain()) == ["of the future"]
    assert await world.are_delivered(ids)
    world.liar.lie = timedelta()
    for _ in range(2):
        await shows(world, world.device(own, keystore), number, by=soon_over)
    keystore.close()
