"""A dispatch whose clock is set, between a real mailbox and push services whose clocks are right: pushes go again by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from sealpushd.dispatch.rules import LANE_RETRY
from sealpushd.engines import Engines
from sealpushd.simulators.core import Answer
from sealpushd.v1 import lanes_pb2
from tests.contract.dispatching import ANDROID, HUAWEI, IOS, Dispatch, Pushing, pushing
from tests.contract.harness import FakeClock, Mesh, Migrated
from tests.contract.push_simulators import Certificates

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Apple takes a token that is 40 minutes old.
JUMPS = [timedelta(minutes=40), timedelta(hours=-3), timedelta(days=365), timedelta(days=-365)]
# Those whose push services look at what is signed with our time.
SIGNED = [IOS, ANDROID]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def databases(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "dispatch")


@pytest.fixture
def right() -> FakeClock:
    """The clock of the push services, which nobody sets."""
    return FakeClock()


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    databases: dict[str, str],
    engines: Engines,
    mesh: Mesh,
    certificates: Certificates,
    clock: FakeClock,
    right: FakeClock,
    tmp_path: Path,
) -> AsyncIterator[Pushing]:
    async with pushing(databases, engines, mesh, certificates, clock, tmp_path, right) as made:
        yield made


async def stopped(world: Pushing, platform: int, jump: timedelta) -> tuple[Dispatch, list[bytes]]:
    """A dispatch whose lane stopped because of its clock, and what waits in that lane."""
    dispatch = await world.dispatch()
    world.clock.jump(jump)
    await dispatch.put(world.vendors.credential(platform).request(untested=True))
    waiting = await world.store(2, platform)
    assert "clock" in (await dispatch.lane_that(platform, is_stopped)).detail
    return dispatch, waiting


def is_stopped(lane: lanes_pb2.Lane) -> bool:
    """And nothing is on the way any more that might stop it once more."""
    return lane.state == lanes_pb2.LANE_STATE_MISCONFIGURED and not lane.in_flight


@pytest.mark.parametrize("platform", SIGNED)
@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_a_lane_that_a_wrong_clock_stopped_pushes_within_minutes_of_its_return(
    world: Pushing, right: FakeClock, platform: int, jump: timedelta
) -> None:
    _, waiting = await stopped(world, platform, jump)
    world.clock.jump(-jump)
    for clock in (world.clock, right):
        clock.advance(LANE_RETRY)
    await world.now()
    await world.pushed(waiting)


@pytest.mark.parametrize("platform", SIGNED)
async def test_resuming_a_lane_whose_clock_was_set_right_means_now(world: Pushing, platform: int) -> None:
    dispatch, waiting = await stopped(world, platform, timedelta(minutes=40))
    world.clock.jump(timedelta(minutes=-40))
    await dispatch.resume(platform)
    await world.now()
    await world.pushed(waiting)


@pytest.mark.parametrize("platform", SIGNED)
@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_a_lane_resumes_by_itself_when_the_clock_is_seen_to_be_set(world: Pushing, platform: int, jump: timedelta) -> None:
    dispatch, waiting = await stopped(world, platform, jump)
    assert dispatch.clock_watch.look() == jump
    await world.now()
    await dispatch.lane_that(platform, is_stopped)
    world.clock.jump(-jump)
    assert dispatch.clock_watch.look() == -jump
    await world.now()
    await world.pushed(waiting)


@pytest.mark.parametrize("platform", [IOS, ANDROID, HUAWEI])
@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_the_next_try_after_a_503_does_not_wait_for_the_clock(world: Pushing, platform: int, jump: timedelta) -> None:
    dispatch = await world.dispatch()
    await dispatch.put(world.vendors.credential(platform).request())
    await world.pushed(await world.store(1, platform))
    world.vendors.simulator(platform).set_fault(Answer(503, "ServiceUnavailable"), requests=1)
    world.clock.jump(jump)
    waiting = await world.store(1, platform)
    await world.until(waiting, lambda row: row["attempts"] == 1)
    waits = await world.rows.fetchval(
        'SELECT max(next_attempt_at - now()) FROM "fetch".open_deliveries WHERE message_id = ANY ($1::uuid[])', waiting
    )
    assert waits < timedelta(seconds=10)
