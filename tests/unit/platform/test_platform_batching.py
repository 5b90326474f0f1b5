"""NaturalBatcher: one flush at a time, bounded batches, nobody forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealpushd.platform import admission
from sealpushd.platform.admission import Door, End, party_of
from sealpushd.platform.batching import QUEUE_AGE_S_MAX, NaturalBatcher
from sealpushd.platform.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30


class Gate:
    """A flush that waits to be let through, and remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.entered = asyncio.Event()
        self.fail_on: set[int] = set()

    async def flush(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        self.entered.set()
        await self.open.wait()
        if self.fail_on.intersection(items):
            raise RuntimeError("this batch fails")
        return [item * 10 for item in items]


async def test_a_lone_item_goes_at_once_and_what_comes_meanwhile_goes_together() -> None:
    gate = Gate()
    batcher = NaturalBatcher[int, int](gate.flush)
    first = asyncio.create_task(batcher.submit(1))
    await gate.entered.wait()
    others = [asyncio.create_task(batcher.submit(n)) for n in (2, 3, 4)]
    await asyncio.sleep(0)
    gate.open.set()
    assert [await first, *await asyncio.gather(*others)] == [10, 20, 30, 40]
    assert gate.batches == [[1], [2, 3, 4]]


@pytest.mark.parametrize("in_flight_max", [1, 2, 3])
async def test_a_caller_that_submits_again_at_once_is_served(in_flight_max: int) -> None:
    async def flush(items: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        return items

    batcher = NaturalBatcher[int, int](flush, in_flight_max=in_flight_max, items_max=1)

    async def caller() -> list[int]:
        return [await batcher.submit(n) for n in range(20)]

    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.gather(*(caller() for _ in range(in_flight_max))) == [list(range(20))] * in_flight_max


async def test_a_failure_reaches_every_submission_of_its_batch_and_no_other() -> None:
    gate = Gate()
    gate.fail_on = {3}
    batcher = NaturalBatcher[int, int](gate.flush, items_max=2)
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(1, 7)]
    gate.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert gate.batches == [[1, 2], [3, 4], [5, 6]]
    assert [type(result) for result in results] == [int, int, RuntimeError, RuntimeError, int, int]


async def test_a_wrong_number_of_results_is_an_error_and_not_a_mix_up() -> None:
    async def flush(items: Sequence[int]) -> Sequence[int]:
        return items[1:]

    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        await NaturalBatcher[int, int](flush).submit_many([1, 2])


async def test_a_cancelled_submission_that_waits_is_never_flushed_and_harms_nobody() -> None:
    gate = Gate()
    batcher = NaturalBatcher[int, int](gate.flush)
    first = asyncio.create_task(batcher.submit(1))
    await gate.entered.wait()
    leaves, stays = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
    await asyncio.sleep(0)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    gate.open.set()
    assert [await first, await stays] == [10, 30]
    assert gate.batches == [[1], [3]]


async def test_a_submission_cancelled_in_flight_does_not_cancel_the_others_of_its_batch() -> None:
    gate = Gate()
    batcher = NaturalBatcher[int, int](gate.flush)
    leaves, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
    await gate.entered.wait()
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    gate.open.set()
    assert await stays == 20
    assert gate.batches == [[1, 2]]


async def test_more_than_may_wait_is_refused_before_any_of_it_is_worked_on() -> None:
    gate = Gate()
    batcher = NaturalBatcher[int, int](gate.flush, items_max=2, queue_items_max=3)
    first = asyncio.create_task(batcher.submit(0))
    await gate.entered.wait()
    waiting = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await batcher.submit_many([2, 3, 4])
    assert refused.value.retry_after is not None
    gate.open.set()
    await asyncio.gather(first, waiting)
    assert gate.batches == [[0], [1]]
    assert await batcher.submit_many([2, 3, 4]) == [20, 30, 40]


async def test_a_caller_who_is_let_in_is_let_in_with_all_parts() -> None:
    """Room is asked for once: the parts that had gone ahead would be worked on for a caller who was refused."""
    gate, times = Gate(), iter(range(0, 10_000, 100))
    gate.open.set()
    # A moment is long here: by the second part, the first is old.
    batcher = NaturalBatcher[int, int](gate.flush, items_max=2, clock=lambda: next(times))
    assert await batcher.submit_many([1, 2, 3, 4]) == [10, 20, 30, 40]


async def test_what_has_waited_beyond_its_deadline_is_never_flushed() -> None:
    gate, time = Gate(), [100.0]
    batcher = NaturalBatcher[int, int](gate.flush, clock=lambda: time[0])

    async def submit(item: int, deadline_at: float | None) -> int:
        admission.working(None, deadline_at)
        return await batcher.submit(item)

    first = asyncio.create_task(submit(1, None))
    await gate.entered.wait()
    late, in_time, unbound = (asyncio.create_task(submit(item, at)) for item, at in ((2, 110.0), (3, 110.5), (4, None)))
    await asyncio.sleep(0)
    time[0] = 110.0
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        await late
    assert list(await asyncio.gather(first, in_time, unbound)) == [10, 30, 40]
    assert gate.batches == [[1], [3, 4]]


async def test_a_flush_has_time_until_the_latest_deadline_of_its_batch_and_is_nobodys_own() -> None:
    seen: list[tuple[list[int], float | None, object]] = []
    gate = Gate()

    async def flush(items: Sequence[int]) -> Sequence[int]:
        seen.append((list(items), admission.deadline_at(), admission.place()))
        return await gate.flush(items)

    batcher = NaturalBatcher[int, int](flush, items_max=2, clock=lambda: 0.0)
    at = Door()
    place = at.enter(party_of(None, "192.0.2.1"))

    async def submit(item: int, deadline_at: float | None) -> int:
        admission.working(place, deadline_at)
        return await batcher.submit(item)

    gate.open.set()
    await asyncio.gather(*(submit(item, ends_at) for item, ends_at in ((1, 5.0), (2, 9.0), (3, 5.0), (4, None))))
    assert seen == [([1, 2], 9.0, None), ([3, 4], None, None)]


async def test_work_in_a_batch_holds_the_place_of_who_left_until_it_has_ended() -> None:
    gate, at = Gate(), Door(later=lambda _, then: then())
    batcher = NaturalBatcher[int, int](gate.flush)
    caller = party_of(None, "192.0.2.1")

    async def call(item: int) -> int:
        place = at.enter(caller)
        admission.working(place, None)
        try:
            return await batcher.submit(item)
        except asyncio.CancelledError:
            place.leave(End.RESET)
            raise

    leaves = asyncio.create_task(call(1))
    await gate.entered.wait()
    waits = asyncio.create_task(call(2))
    await asyncio.sleep(0)
    for task in (leaves, waits):
        task.cancel()
    await asyncio.gather(leaves, waits, return_exceptions=True)
    # What waited is not worked on any more; what was on its way is.
    assert at.held(caller) == 1
    gate.open.set()
    await batcher.aclose()
    assert at.in_flight == 0
    assert gate.batches == [[1]]


async def test_a_queue_that_moves_too_slowly_is_full_however_short_it_is() -> None:
    gate, time = Gate(), [0.0]
    batcher = NaturalBatcher[int, int](gate.flush, clock=lambda: time[0])
    first = asyncio.create_task(batcher.submit(0))
    await gate.entered.wait()
    waiting = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0)
    time[0] = QUEUE_AGE_S_MAX
    also = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    time[0] += 0.1
    with pytest.raises(Overloaded):
        await batcher.submit(3)
    gate.open.set()
    assert list(await asyncio.gather(first, waiting, also)) == [0, 10, 20]
    assert await batcher.submit(3) == 30


async def test_closing_waits_for_what_is_in_flight() -> None:
    gate = Gate()
    batcher = NaturalBatcher[int, int](gate.flush)
    task = asyncio.create_task(batcher.submit(1))
    await gate.entered.wait()
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    gate.open.set()
    await closing
    assert await task == 10


async def test_nothing_submitted_is_nothing_flushed() -> None:
    gate = Gate()
    assert await NaturalBatcher[int, int](gate.flush).submit_many([]) == []
    assert gate.batches == []


@settings(max_examples=80)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(20, 100),
    st.booleans(),
)
def test_everybody_gets_their_own_results_in_order_within_the_bounds(
    submissions: list[list[int]], items_max: int, in_flight_max: int, bytes_max: int, weighed: bool
) -> None:
    async def run() -> None:
        batches: list[list[tuple[int, int, int]]] = []
        in_flight = 0

        async def flush(items: Sequence[tuple[int, int, int]]) -> Sequence[tuple[int, int, int]]:
            nonlocal in_flight
            in_flight += 1
            assert in_flight <= in_flight_max
            batches.append(list(items))
            await asyncio.sleep(0)
            in_flight -= 1
            return items

        batcher = NaturalBatcher[tuple[int, int, int], tuple[int, int, int]](
            flush,
            items_max=items_max,
            in_flight_max=in_flight_max,
            bytes_max=bytes_max,
            weigh=(lambda item: item[2]) if weighed else None,
        )
        given_items = [[(n, m, weight) for m, weight in enumerate(weights)] for n, weights in enumerate(submissions)]
        async with asyncio.timeout(LIMIT_S):
            assert await asyncio.gather(*(batcher.submit_many(items) for items in given_items)) == given_items
        flat = [item for batch in batches for item in batch]
        assert flat == [item for items in given_items for item in items]
        for batch in batches:
            assert len(batch) <= items_max
            if weighed and len(batch) > 1:
                assert sum(item[2] for item in batch) <= bytes_max

    asyncio.run(run())


async def test_of_a_submission_that_was_split_each_part_has_its_own_result_or_error() -> None:
    """What one part stored must not be told as refused because another part was."""
    gate = Gate()
    gate.fail_on = {3}
    gate.open.set()
    batcher = NaturalBatcher[int, int](gate.flush, items_max=2)
    results = await batcher.submit_each([1, 2, 3, 4, 5])
    assert [result if isinstance(result, int) else type(result) for result in results] == [10, 20, RuntimeError, RuntimeError, 50]
    assert await batcher.submit_each([]) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.sets(st.integers(0, 200)), st.booleans())
def test_an_item_that_its_batch_is_refused_for_fails_alone(sizes: list[int], bad: set[int], refused: bool) -> None:
    """Also where another's item has failed the batch: nobody learns of it."""
    done: list[int] = []

    async def flush(items: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        if first := sorted(bad.intersection(items)):
            raise InvalidRequest(f"{first[0]} is wrong") if refused else ValueError(f"{first[0]} does not fit")
        done.extend(items)
        return [item * 10 for item in items]

    async def run() -> None:
        batcher = NaturalBatcher[int, int](flush)
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        submissions = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        async with asyncio.timeout(LIMIT_S):
            answers = await asyncio.gather(*(batcher.submit_each(items) for items in submissions))
        for items, results in zip(submissions, answers, strict=True):
            for item, result in zip(items, results, strict=True):
                assert str(result).split(" ")[0] == str(item if item in bad else item * 10)
                assert isinstance(result, Exception) == (item in bad)
        good = [item for items in submissions for item in items if item not in bad]
        assert done == good, "each once, in their order"
        for items in submissions:
            if bad.intersection(items):
                with pytest.raises((InvalidRequest, ValueError), match=str(min(bad.intersection(items)))):
                    await batcher.submit_many(items)

    asyncio.run(run())


async def test_an_error_in_the_place_of_a_result_is_of_that_item_alone() -> None:
    async def flush(items: Sequence[int]) -> Sequence[int | Exception]:
        return [Overloaded("later") if item == 2 else item for item in items]

    batcher = NaturalBatcher[int, int](flush)
    one, two, three = (asyncio.create_task(batcher.submit(n)) for n in (1, 2, 3))
    with pytest.raises(Overloaded):
        await two
    assert [await one, await three] == [1, 3]


async def test_a_batch_that_fails_for_a_reason_of_its_own_is_flushed_once() -> None:
    flushed = 0

    async def flush(items: Sequence[int]) -> Sequence[int]:
        nonlocal flushed
        flushed += 1
        raise Unavailable("nobody is there")

    results = await NaturalBatcher[int, int](flush).submit_each([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert flushed == 1


async def test_what_was_done_before_the_peer_went_away_in_the_middle_of_a_halving_is_told() -> None:
    async def flush(items: Sequence[int]) -> Sequence[int]:
        if len(items) > 2:
            raise InvalidRequest("one of these")
        if 3 in items:
            raise Unavailable("gone")
        return items

    results = await NaturalBatcher[int, int](flush).submit_each([1, 2, 3, 4])
    assert [type(result) for result in results] == [int, int, Unavailable, Unavailable]
