"""Turns that go round those who ask: who asks for more waits for their own share."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.platform.errors import Overloaded
from sealpushd.platform.turns import FairTurns

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30


class Served:
    """Callers that wait for a turn, and in which order they had it."""

    def __init__(self, turns: FairTurns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.refused: list[str] = []
        self.holding = self.holding_most = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, subject: str, *, known: bool = False) -> asyncio.Task[None]:
        task = asyncio.create_task(self._work(subject, known=known))
        self.tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def _work(self, subject: str, *, known: bool) -> None:
        try:
            async with self.turns.turn(subject, known=known):
                self.order.append(subject)
                self.holding += 1
                self.holding_most = max(self.holding, self.holding_most)
                try:
                    await asyncio.sleep(0)
                finally:
                    self.holding -= 1
        except Overloaded:
            self.refused.append(subject)

    async def end(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*self.tasks, return_exceptions=True)


def fair(at_once: int = 1, waiting_max: int = 8, waiting_each_max: int = 4) -> FairTurns:
    return FairTurns(at_once=at_once, waiting_max=waiting_max, waiting_each_max=waiting_each_max, refusal="too many at once")


async def test_turns_go_round_the_subjects_and_a_subjects_own_are_in_their_order() -> None:
    turns = fair()
    async with turns.turn("holder"):
        served = Served(turns)
        for subject in ("greedy", "greedy", "greedy", "modest", "late"):
            await served.ask(subject)
    await served.end()
    assert served.order == ["greedy", "modest", "late", "greedy", "greedy"]


async def test_a_subject_has_its_share_waiting_and_no_more() -> None:
    turns = fair(waiting_each_max=2)
    async with turns.turn("holder"):
        served = Served(turns)
        for _ in range(5):
            await served.ask("greedy")
        await served.ask("modest")
    await served.end()
    assert served.refused == ["greedy"] * 3
    assert served.order == ["greedy", "modest", "greedy"]


async def test_in_a_full_lane_a_newcomer_takes_the_place_of_whoever_has_most_waiting() -> None:
    turns = fair(waiting_max=4)
    async with turns.turn("holder"):
        served = Served(turns)
        for subject in ("greedy", "greedy", "greedy", "modest"):
            await served.ask(subject)
        await served.ask("newcomer")
        await asyncio.sleep(0)
        assert served.refused == ["greedy"]
        await served.ask("greedy")
        await served.ask("modest")
        await asyncio.sleep(0)
        assert served.refused == ["greedy", "greedy", "modest"], "it would have as many as anybody"
    await served.end()
    assert Counter(served.order) == {"greedy": 2, "modest": 1, "newcomer": 1}


async def test_the_known_have_every_other_turn_and_strangers_never_fill_their_lane() -> None:
    turns = fair(waiting_max=6)
    async with turns.turn("holder"):
        served = Served(turns)
        for n in range(6):
            await served.ask(f"stranger {n}")
        await served.ask("stranger 6")
        assert served.refused == ["stranger 6"]
        for _ in range(3):
            await served.ask("bank", known=True)
    await served.end()
    assert served.order[:6] == ["bank", "stranger 0", "bank", "stranger 1", "bank", "stranger 2"]


async def test_who_leaves_while_waiting_or_in_the_moment_of_its_turn_keeps_nothing() -> None:
    turns = fair(waiting_max=2)
    served = Served(turns)
    async with turns.turn("holder"):
        first, second = await served.ask("a"), await served.ask("b")
        second.cancel()
        await asyncio.sleep(0)
        assert turns.waiting == 1
        await served.ask("c")
    # The turn is the first one's already, which has not noticed.
    first.cancel()
    await served.end()
    assert served.order == ["c"]
    async with asyncio.timeout(LIMIT_S), turns.turn("later"):
        pass


async def test_who_leaves_in_the_moment_of_being_sent_away_leaves_nothing_behind() -> None:
    turns = fair(waiting_max=2)
    served = Served(turns)
    async with turns.turn("holder"):
        await served.ask("greedy")
        second = await served.ask("greedy")
        newcomer = asyncio.create_task(served._work("newcomer", known=False))
        served.tasks.append(newcomer)
        await asyncio.sleep(0)
        second.cancel()
    await served.end()
    assert served.order == ["greedy", "newcomer"]


@given(
    asked=st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.sampled_from(["stay", "leave", "pause"])), max_size=60),
    at_once=st.integers(1, 3),
)
def test_no_turn_is_lost_or_made_and_everybody_who_may_wait_is_served(asked: list[tuple[str, bool, str]], at_once: int) -> None:
    async def run() -> None:
        turns = fair(at_once=at_once)
        served = Served(turns)
        left = 0
        for subject, known, what in asked:
            task = await served.ask(subject, known=known)
            if what == "leave":
                left += task.cancel()
            elif what == "pause":
                await asyncio.sleep(0)
            assert turns.waiting <= 2 * 8
        await served.end()
        assert turns.waiting == 0
        assert served.holding_most <= at_once
        assert len(served.order) + len(served.refused) + left >= len(asked)
        # As many turns as at the beginning, and no more.
        async with asyncio.timeout(LIMIT_S):
            held = [turns.turn(f"later {n}") for n in range(at_once)]
            for each in held:
                await each.__aenter__()
            beyond = await served.ask("beyond")
            assert turns.waiting == 1
            beyond.cancel()
            for each in held:
                await each.__aexit__(None, None, None)
            await served.end()

    asyncio.run(run())


async def test_the_refusal_says_what_to_do() -> None:
    turns = fair(waiting_each_max=0)
    async with turns.turn("holder"):
        with pytest.raises(Overloaded, match="too many at once") as refused:
            async with turns.turn("another"):
                pass
    assert refused.value.retry_after is not None
