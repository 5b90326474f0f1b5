"""Phones whose store comes out of a back-up, against all real services: what was sealed meanwhile may be lost, nothing later.

And services whose database does.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from sealpush import SUITE_HYBRID, Installation, MemoryKeystore, NoticeKind, SqliteKeystore, State
from sealpushd.engines import Engines
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import SchemaError
from sealpushd.up.maintenance import forget_one_time_prekeys
from tests.contract.harness import FakeClock, Mesh, Migrated
from tests.contract.phones import World, WrongClock, bodies, shows, whole_world

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "registration", "keys", "publishing", "fetch")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with whole_world(engines, mesh, urls, clock) as made:
        yield made


async def back_again(world: World, own: WrongClock, keystore: SqliteKeystore, number: str) -> None:
    """A phone that has found out: it opens whatever comes, makes changes and owes nothing, and the person is told once."""
    device = world.device(own, keystore)
    # What was sealed before the phone came back may be lost; then its sender knows.
    [before] = await world.publish(number, "before", sealed=True)
    shown = bodies(await device.drain())
    assert (await world.sender.status(before)).state is (State.DELIVERED if shown else State.UNDELIVERED)
    for n in range(3):
        await shows(world, device, number, sealed=True)
        await shows(world, device, number)
        await device.update_installation(Installation(app_version=str(n)))
    diagnosis = await device.diagnose()
    assert (diagnosis.acknowledgements_waiting, diagnosis.deliveries_held, diagnosis.ended) == (0, 0, False)
    notices = await device.notices()
    assert [each.kind for each in notices] == [NoticeKind.RESTORED]
    await device.dismiss_notices(notices)
    # It is over: another look finds nothing lost.
    signed = keystore.newest_signed_prekey()
    await device.maintain()
    assert keystore.newest_signed_prekey() == signed
    assert await device.notices() == []


@pytest.mark.parametrize("passed", [timedelta(hours=30), timedelta(days=8), timedelta(days=20)])
async def test_a_phone_restored_from_a_backup_opens_the_next_message(world: World, tmp_path: Path, passed: timedelta) -> None:
    path, backup = tmp_path / "phone.db", tmp_path / "backup.db"
    with SqliteKeystore(path) as keystore:
        device, number = await world.registered(WrongClock(), keystore)
        await shows(world, device, number, sealed=True)
        await device.mark_read((await device.inbox())[0].message_id)  # what the copy still owes
    shutil.copy(path, backup)
    own = world.later(passed)
    with SqliteKeystore(path) as keystore:
        device = world.device(own, keystore)
        for n in range(9):
            await shows(world, device, number, sealed=True)
            await device.update_installation(Installation(app_version=str(n)))
        await device.maintain()
    shutil.copy(backup, path)
    with SqliteKeystore(path) as keystore:
        await back_again(world, own, keystore, number)


async def test_a_copy_of_this_morning_finds_out_by_the_first_message_that_it_cannot_open(world: World, tmp_path: Path) -> None:
    path, backup = tmp_path / "phone.db", tmp_path / "backup.db"
    with SqliteKeystore(path) as keystore:
        _, number = await world.registered(WrongClock(), keystore)
        await world.device(WrongClock(), keystore, one_time_prekeys=0).maintain()
    shutil.copy(path, backup)
    own = world.later(timedelta(hours=5))
    with SqliteKeystore(path) as keystore:
        await world.device(own, keystore).maintain()
    shutil.copy(backup, path)
    with SqliteKeystore(path) as keystore:
        device = world.device(own, keystore)
        assert await device.drain() == []
        assert await device.notices() == [], "nothing is due, and nothing has come yet"
        await back_again(world, own, keystore, number)


async def test_a_copy_from_before_a_rise_goes_up_again(world: World, tmp_path: Path) -> None:
    path, backup = tmp_path / "phone.db", tmp_path / "backup.db"
    with SqliteKeystore(path) as keystore:
        device, number = await world.registered(WrongClock(), keystore)
        await device.maintain()
    shutil.copy(path, backup)
    with SqliteKeystore(path) as keystore:
        await world.device(WrongClock(), keystore, suite=SUITE_HYBRID).maintain()
    shutil.copy(backup, path)
    own = world.later(timedelta(days=2))
    with SqliteKeystore(path) as keystore:
        await back_again(world, own, keystore, number)
        signed = keystore.newest_signed_prekey()
        assert signed is not None
        assert signed.suite == SUITE_HYBRID


async def test_a_phone_that_was_not_restored_gives_its_ids_in_order(world: World, tmp_path: Path) -> None:
    with SqliteKeystore(tmp_path / "phone.db") as keystore:
        device, number = await world.registered(WrongClock(), keystore)
        own = WrongClock()
        for _ in range(4):
            for _ in range(2):
                await shows(world, device, number, sealed=True)
            own = world.later(timedelta(days=3))
            device = world.device(own, keystore)
        assert await device.notices() == []
        assert keystore.highest_prekey_id() < 100


async def test_prekeys_that_a_restored_database_brings_back_are_not_handed_out_again(world: World, urls: dict[str, str]) -> None:
    keystore = MemoryKeystore()
    device, number = await world.registered(WrongClock(), keystore)
    await device.maintain()
    sql = await world.services.sql("keys")
    backup = await sql.fetch("SELECT * FROM one_time_prekeys")
    for _ in range(3):
        await shows(world, device, number, sealed=True)
    await sql.execute("TRUNCATE one_time_prekeys, handouts")
    await sql.copy_records_to_table("one_time_prekeys", records=[tuple(each) for each in backup], schema_name="keys")

    assert await forget_one_time_prekeys(urls["admin"]) == len({each["device_id"] for each in backup})
    await shows(world, device, number, sealed=True)
    assert await sql.fetchval("SELECT count(*) FROM handouts") == 0, "to the signed prekey"
    device = world.device(world.later(timedelta(days=2)), keystore)
    await shows(world, device, number, sealed=True)
    await shows(world, device, number, sealed=True)
    assert await sql.fetchval("SELECT count(*) FROM handouts") > 0, "the phone has sent new ones"
    assert await forget_one_time_prekeys(urls["admin"]) > 0
    assert await forget_one_time_prekeys(urls["admin"]) == 0


async def test_prekeys_are_forgotten_while_nobody_works_with_them_only(world: World, urls: dict[str, str], migrated: Migrated) -> None:
    sql = await world.services.sql("keys")
    async with sql.transaction():
        await sql.execute("SELECT count(*) FROM one_time_prekeys")
        with pytest.raises(StoreUnavailable, match="stop the service keys"):
            await forget_one_time_prekeys(urls["admin"])
    with pytest.raises(SchemaError, match="use the one that `sealpush db migrate` is run as"):
        await forget_one_time_prekeys(urls["fetch"])
    nothing = await migrated()
    with pytest.raises(SchemaError, match="run `sealpush db migrate` first"):
        await forget_one_time_prekeys(nothing["admin"])
