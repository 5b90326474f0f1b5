"""Who goes when too many requests are on their way: of the address that has most of them the oldest."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from sealpushd.platform.arrivals import Arrivals
from sealpushd.platform.errors import DeadlineExceeded, InvalidRequest, Overloaded


class Call:
    """A call from an address, whose request comes when the test says so."""

    def __init__(self, arrivals: Arrivals, address: str) -> None:
        self._request: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(arrivals.receive(self._read, address))

    async def _read(self) -> object:
        return await self._request

    def arrive(self, raw: object = b"request") -> None:
        self._request.set_result(raw)


async def begun(arrivals: Arrivals, *addresses: str) -> list[Call]:
    calls = []
    for address in addresses:
        calls.append(Call(arrivals, address))
        await asyncio.sleep(0)
    return calls


@pytest.mark.asyncio
async def test_whoever_floods_loses_its_own_oldest_and_others_keep_theirs() -> None:
    arrivals = Arrivals(waiting_max=3)
    phone, *flood = await begun(arrivals, "phone", "flood", "flood", "flood", "flood")
    for lost in flood[:2]:
        with pytest.raises(Overloaded):
            await lost.task
    for kept in (phone, *flood[2:]):
        kept.arrive()
        assert await kept.task == b"request"


@pytest.mark.asyncio
async def test_a_flood_from_ever_new_addresses_of_an_ipv6_network_is_one_flood() -> None:
    arrivals = Arrivals(waiting_max=3)
    phone, *flood = await begun(arrivals, "2001:db8:1::1", *(f"2001:db8:2::{n}" for n in range(1, 5)))
    for lost in flood[:2]:
        with pytest.raises(Overloaded):
            await lost.task
    phone.arrive()
    assert await phone.task == b"request"


@pytest.mark.asyncio
async def test_what_has_come_or_been_cancelled_is_not_counted_any_more() -> None:
    arrivals = Arrivals(waiting_max=1)
    for _ in range(3):
        (call,) = await begun(arrivals, "phone")
        call.arrive()
        await call.task
        (call,) = await begun(arrivals, "phone")
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
    (last,) = await begun(arrivals, "phone")
    last.arrive()
    assert await last.task == b"request"


@pytest.mark.asyncio
async def test_a_request_that_does_not_come_and_a_call_without_one_are_told_apart() -> None:
    (late,) = await begun(Arrivals(seconds_max=0), "phone")
    with pytest.raises(DeadlineExceeded, match="within 0 s"):
        await late.task
    (without,) = await begun(Arrivals(), "phone")
    without.arrive(grpc.aio.EOF)
    with pytest.raises(InvalidRequest, match="without a request"):
        await without.task


@pytest.mark.asyncio
async def test_a_request_whose_time_is_just_over_can_be_given_up_as_well() -> None:
    calls = await begun(Arrivals(seconds_max=0, waiting_max=1), *["flood"] * 3)
    ended = await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
    assert [type(each) for each in ended] == [DeadlineExceeded] * 3


@pytest.mark.asyncio
async def test_each_request_that_does_not_come_is_ended_whenever_it_began() -> None:
    """One timer is for all: for those that began before it rang, and those after there was nothing to wait for."""
    arrivals = Arrivals(seconds_max=0.05)
    for _ in range(2):
        calls = []
        for _ in range(3):
            calls += await begun(arrivals, "phone", "office")
            await asyncio.sleep(0.02)
        async with asyncio.timeout(30):
            ended = await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
        assert [type(each) for each in ended] == [DeadlineExceeded] * 6
        (last,) = await begun(arrivals, "phone")
        last.arrive()
        assert await last.task == b"request"
        await asyncio.sleep(0.1)
