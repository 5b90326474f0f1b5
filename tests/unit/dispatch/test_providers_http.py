from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from sealpushd.dispatch.providers.base import Accepted, HttpAnswer, Outcome, RetryAt
from sealpushd.dispatch.providers.http import Connection, HttpClient, HttpSettings, clock_is_wrong
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PATIENT = HttpSettings(total_timeout=timedelta(hours=1))


async def until_cancelled() -> Outcome:
    await asyncio.Event().wait()
    raise AssertionError


async def losing_cancellations() -> Outcome:
    """As the HTTP client does when a cancellation meets the answer."""
    try:
        return await until_cancelled()
    except asyncio.CancelledError:
        return Accepted()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("work", [until_cancelled, losing_cancellations])
async def test_cancellation_passes_also_when_the_http_client_loses_it(work: Callable[[], Awaitable[Outcome]]) -> None:
    client = HttpClient(PATIENT, http2_only=True)
    guarded = asyncio.create_task(client.guard(work()))
    await settled()
    guarded.cancel()
    with pytest.raises(asyncio.CancelledError):
        await guarded
    await client.aclose()


async def test_deadline_is_an_outcome_and_leaves_no_cancellation_behind() -> None:
    client = HttpClient(HttpSettings(total_timeout=timedelta(0)), http2_only=True)
    assert await client.guard(until_cancelled()) == RetryAt("timeout")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await client.aclose()


async def test_outer_deadline_that_the_http_client_loses_is_kept() -> None:
    client = HttpClient(PATIENT, http2_only=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await client.guard(losing_cancellations())
    await client.aclose()


async def test_first_exchange_of_a_connection_goes_alone() -> None:
    connection = Connection("https://localhost", 100, FakeClock(NOW), lambda answer: answer.status == 200)
    gate, under_way, most = asyncio.Event(), 0, 0

    async def exchange() -> HttpAnswer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        under_way -= 1
        return HttpAnswer(200)

    first = [asyncio.create_task(connection.run(exchange)) for _ in range(20)]
    await settled()
    assert most == 1
    gate.set()
    await asyncio.gather(*first)
    gate.clear()
    second = [asyncio.create_task(connection.run(exchange)) for _ in range(20)]
    await settled()
    assert most == 20
    gate.set()
    await asyncio.gather(*second)


@pytest.mark.parametrize(
    ("date", "is_wrong"),
    [
        (None, False),
        ("", False),
        ("yesterday", False),
        (format_datetime(NOW, usegmt=True), False),
        (format_datetime(NOW + timedelta(minutes=5), usegmt=True), False),
        (format_datetime(NOW + timedelta(minutes=5, seconds=1), usegmt=True), True),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), True),
        ("Sun, 01 Mar 2026 11:00:00", False),
    ],
)
def test_clock_is_wrong_when_it_differs_from_the_answers_by_more_than_five_minutes(date: str | None, is_wrong: bool) -> None:
    assert clock_is_wrong(HttpAnswer(403, {} if date is None else {"date": date}), NOW) is is_wrong
