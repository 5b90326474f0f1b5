"""Children of `sealpush up` that hang, and those that are only slow: real processes, probes that are functions."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sealpushd.engines.watch import Liveness
from sealpushd.up.children import Child

PATIENCE_S = 40.0
PROBE_S = 0.05
UNANSWERED_MAX = 3


class Watched:
    """A child that does nothing, and what its supervisor asked and said."""

    def __init__(self, log_path: Path, probe: Callable[["Watched"], Awaitable[None]], start_patience_s: float) -> None:
        self.log_path = log_path
        self.ready_pids: list[int | None] = []
        self.probed_pids: list[int | None] = []
        self.told: list[tuple[str, str, Path]] = []
        self.may_be_ready = asyncio.Event()
        self.may_be_ready.set()
        self._probe = probe
        liveness = Liveness(
            self._probed, every_s=0.001, patience_s=PROBE_S, unanswered_max=UNANSWERED_MAX, start_patience_s=start_patience_s
        )
        arguments = ["-c", "import signal; signal.pause()"]
        self.child = Child("idle", arguments, os.environ, log_path, self._ready, liveness, lambda *told: self.told.append(told))

    async def _ready(self) -> None:
        await self.may_be_ready.wait()
        self.ready_pids.append(self.child.pid)

    async def _probed(self) -> None:
        self.probed_pids.append(self.child.pid)
        await self._probe(self)


@asynccontextmanager
async def running(
    log_path: Path, probe: Callable[[Watched], Awaitable[None]], start_patience_s: float = PATIENCE_S
) -> AsyncIterator[Watched]:
    watched = Watched(log_path, probe, start_patience_s)
    await watched.child.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield watched
    finally:
        await watched.child.stop(0)


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is another process
        await asyncio.sleep(0.005)


async def answer(_: Watched) -> None:
    """At once."""


async def test_a_child_that_hangs_is_killed_started_again_and_told_of_once(tmp_path: Path) -> None:
    async def the_first_hangs(watched: Watched) -> None:
        if watched.child.restarts == 0:
            await asyncio.Event().wait()

    async with running(tmp_path / "idle.log", the_first_hangs) as watched:
        first = watched.child.pid
        assert first is not None
        await watched.child.wait_ready(PATIENCE_S)
        await eventually(lambda: watched.child.restarts == 1)
        assert watched.probed_pids.count(first) == UNANSWERED_MAX
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        # The second answers, and is left alone.
        await eventually(lambda: len(watched.probed_pids) > 4 * UNANSWERED_MAX)
        assert watched.told == [("idle", "hung", tmp_path / "idle.log")]


async def test_a_child_that_is_slow_now_and_then_is_left_alone(tmp_path: Path) -> None:
    async def every_third_answers(watched: Watched) -> None:
        if len(watched.probed_pids) % UNANSWERED_MAX:
            await asyncio.Event().wait()

    async with running(tmp_path / "idle.log", every_third_answers) as watched:
        await watched.child.wait_ready(PATIENCE_S)
        await eventually(lambda: len(watched.probed_pids) > 4 * UNANSWERED_MAX)
        assert (watched.child.restarts, watched.told) == (0, [])


async def test_a_child_that_hangs_in_its_second_start_is_started_once_more(tmp_path: Path) -> None:
    async with running(tmp_path / "idle.log", answer, start_patience_s=PROBE_S) as watched:
        await watched.child.wait_ready(PATIENCE_S)
        watched.may_be_ready.clear()
        first = watched.child.pid
        assert first is not None
        os.kill(first, 9)
        await eventually(lambda: watched.child.restarts == 2)
        assert [why for _, why, _ in watched.told] == ["killed", "hung"]
        watched.may_be_ready.set()
        await eventually(lambda: watched.child.pid in watched.probed_pids)


async def test_who_starts_or_stops_is_not_probed(tmp_path: Path) -> None:
    async with running(tmp_path / "idle.log", answer) as watched:
        await asyncio.sleep(PROBE_S)
        assert watched.probed_pids == []
        await watched.child.wait_ready(PATIENCE_S)
        await eventually(lambda: bool(watched.probed_pids))

        watched.may_be_ready.clear()
        first = watched.child.pid
        assert first is not None
        os.kill(first, 9)
        await eventually(lambda: watched.child.restarts == 1)
        assert watched.told == [("idle", "killed", tmp_path / "idle.log")]
        await asyncio.sleep(PROBE_S)
        assert watched.child.pid not in watched.probed_pids
        watched.may_be_ready.set()
        await eventually(lambda: watched.child.pid in watched.probed_pids)
        assert watched.child.pid in watched.ready_pids

        await watched.child.stop(PATIENCE_S)
        probes = len(watched.probed_pids)
        await asyncio.sleep(PROBE_S)
        assert len(watched.probed_pids) == probes
