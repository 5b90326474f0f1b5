"""What the log says of an outage: that it began, that it is over, and how much failed between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from sealpushd.platform import server
from sealpushd.platform.errors import StoreUnavailable, in_words
from sealpushd.platform.outage import WORDINGS_MAX, Outage
from sealpushd.platform.server import _keep_running

LIMIT_S = 30


def away(what: str) -> float | None:
    return REGISTRY.get_sample_value("sealpush_away", {"what": what})


@pytest.fixture(autouse=True)
def _plain_log() -> None:
    structlog.reset_defaults()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - bounded
            await asyncio.sleep(0.005)


async def test_an_outage_has_one_line_when_it_begins_one_when_it_is_over_and_a_count() -> None:
    outage = Outage("test one", gone="it is away", back="it is back", steady_s=0.02, peer="keys")
    with capture_logs() as lines:
        outage.worked()
        for _ in range(1000):
            outage.failed(StoreUnavailable("refused"))
        assert away("test one") == 1
        for _ in range(1000):
            outage.worked()
        await until(lambda: away("test one") == 0)
        outage.worked()
    assert [(line["event"], line["log_level"], line["peer"]) for line in lines] == [
        ("it is away", "warning", "keys"),
        ("it is back", "warning", "keys"),
    ]
    assert lines[0]["error"] == "refused"
    assert lines[1]["failures"] == 1000


async def test_what_works_now_and_then_is_one_outage() -> None:
    outage = Outage("test two", gone="it is away", back="it is back", steady_s=0.2)
    with capture_logs() as lines:
        for _ in range(20):
            outage.failed(StoreUnavailable("refused"))
            outage.worked()
            await asyncio.sleep(0.001)
        assert len(lines) == 1
        await until(lambda: len(lines) == 2)
    assert lines[1]["failures"] == 20


async def test_another_kind_of_failure_in_an_outage_has_a_line_of_its_own() -> None:
    outage = Outage("test three", gone="it is away", back="it is back")
    with capture_logs() as lines:
        for _ in range(10):
            outage.failed(StoreUnavailable("refused"))
            outage.failed(TypeError("a bug"), stack=True)
    assert [(line["error"], "exc_info" in line) for line in lines] == [("refused", False), ("a bug", True)]


async def test_failures_of_one_type_that_say_something_else_have_lines_of_their_own_and_never_many() -> None:
    outage = Outage("test four", gone="it is away", back="it is back")
    hangs, refused = "did not answer within 5 s; does it hang?", "are role and password right?"
    with capture_logs() as lines:
        for port in range(5000, 5010):
            outage.failed(StoreUnavailable(hangs))
            outage.failed(StoreUnavailable(f"{refused} (127.0.0.1:{port})"))
        assert [line["error"] for line in lines] == [hangs, f"{refused} (127.0.0.1:5000)"]
        for letter in "abcdefghijkl":
            outage.failed(StoreUnavailable(letter))
        assert len(lines) == WORDINGS_MAX


async def test_of_two_that_are_the_same_thing_each_counts() -> None:
    first, second = (Outage("test five", gone="it is away", back="it is back", steady_s=0.01) for _ in range(2))
    with capture_logs() as lines:
        first.failed(StoreUnavailable("refused"))
        second.failed(StoreUnavailable("refused"))
        assert away("test five") == 2
        second.worked()
        await until(lambda: len(lines) == 3)
        assert away("test five") == 1
        Outage("test five", gone="it is away", back="it is back")
        assert away("test five") == 1
        first.worked()
        await until(lambda: away("test five") == 0)


@pytest.mark.parametrize(("error", "stack"), [(StoreUnavailable("the database does not answer"), False), (KeyError("bug"), True)])
async def test_a_background_task_that_fails_again_and_again_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception, stack: bool
) -> None:
    monkeypatch.setattr(server, "TASK_RESTART_PAUSE_S", 0.001)
    monkeypatch.setattr(server, "TASK_STEADY_S", 0.05)
    runs = 0

    async def task() -> None:
        nonlocal runs
        runs += 1
        if runs <= 20:
            raise error
        await asyncio.Event().wait()

    with capture_logs() as lines:
        running = asyncio.create_task(_keep_running(task))
        await until(lambda: len(lines) == 2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert ["exc_info" in line for line in lines] == [stack, False]
    assert lines[1]["failures"] == 20
    assert all(line["task"].endswith("task") for line in lines)


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), OSError(" "), StoreUnavailable("")], ids=repr)
def test_an_error_without_words_is_told_by_its_kind(error: Exception) -> None:
    assert in_words(error) == type(error).__name__


def test_an_error_of_grpc_is_one_line() -> None:
    nothing: Any = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details="connection refused")
    assert in_words(error) == "UNAVAILABLE: connection refused"
