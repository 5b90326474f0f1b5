"""Natural batching: send at once when nothing is in flight; what comes meanwhile gathers and goes together next.

No timers: at low load nothing waits, under load batches grow until the bounds. One class for calls between services and
for statements to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from sealpushd.platform import admission
from sealpushd.platform.admission import Place
from sealpushd.platform.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

# A mesh frame and a statement carry at most this many items; larger ones gain nothing (measured) and hold up the rest.
BATCH_ITEMS_MAX: Final = 512
# What has waited for so long says that what joins it would not be worked on in time: a queue is long or short only in seconds.
QUEUE_AGE_S_MAX: Final = 2.0
# A bound on memory, not on time: what that many wait for takes a quarter of a second here and twenty there.
QUEUE_ITEMS_MAX: Final = 20_000
# What one item can bring upon its whole batch: a peer's refusal of what was asked, or a value that a statement does not take. Nothing was
# done then. Everything else is about the batch, and flushing parts of it would only add to the trouble.
_OF_AN_ITEM: Final = (InvalidRequest, NotFound, AlreadyExists, FailedPrecondition, Aborted, ValueError)


@dataclass(eq=False, slots=True)
class _Submission(Generic[Item, Result]):
    """Items that wait: whose place their work takes, until when it is of use, since when they wait."""

    items: Sequence[Item]
    future: asyncio.Future[list[Result | Exception]]
    place: Place | None
    deadline_at: float | None
    since: float


class NaturalBatcher(Generic[Item, Result]):
    """Gathers submissions into bounded batches for `flush`.

    `flush` takes a sequence of items and returns a result each, in their order; an exception in the place of a result fails that item
    alone. When it raises what one item can bring about, the batch is halved until that item stands alone, so that nobody is refused
    because of somebody else; so repeating `flush` must be safe. When it raises anything else, every item in the batch fails with it.
    A submission is never reordered behind a later one.

    What nobody waits for any more, or whose deadline has ended, is dropped before it is flushed. `flush` has time until the latest
    deadline of its batch, and works for everybody in it: their places at the door are kept until it has ended, also of those who left.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        items_max: int = BATCH_ITEMS_MAX,
        in_flight_max: int = 1,
        queue_items_max: int = QUEUE_ITEMS_MAX,
        weigh: Callable[[Item], int] | None = None,
        bytes_max: int = 2 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._flush = flush
        self._items_max = items_max
        self._in_flight_max = in_flight_max
        self._queue_items_max = queue_items_max
        self._weigh = weigh
        self._bytes_max = bytes_max
        self._waiting: deque[_Submission[Item, Result]] = deque()
        self._waiting_items = 0
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, item: Item) -> Result:
        """The result for one item."""
        return _all(await self._submit((item,)))[0]

    async def submit_many(self, items: Sequence[Item]) -> list[Result]:
        """Results for many items, in their order; more than a batch holds is split. Raises what the first of those that failed raised: of
        the others nothing is known then, see `submit_each`."""
        return _all(await self.submit_each(items))

    async def submit_each(self, items: Sequence[Item]) -> list[Result | Exception]:
        """As `submit_many`; an item that failed has its error as result, so that what happened to the others is not lost."""
        parts = self._submit_parts(items)
        if len(parts) == 1:
            return await parts[0]
        return [result for part in await asyncio.gather(*parts) for result in part]

    def _submit_parts(self, items: Sequence[Item]) -> list[asyncio.Future[list[Result | Exception]]]:
        """The results to come of each part."""
        if not items:
            return []
        # All of it or nothing: parts that went ahead would be worked on for a caller who was refused.
        self._need_room(len(items))
        return [self._enqueue(part) for part in self._split(items)]

    def _split(self, items: Sequence[Item]) -> Sequence[Sequence[Item]]:
        if self._weigh is None:
            if len(items) <= self._items_max:
                return (items,)
            return [items[start : start + self._items_max] for start in range(0, len(items), self._items_max)]
        parts: list[Sequence[Item]] = []
        part: list[Item] = []
        size = 0
        for item in items:
            weight = self._weigh(item)
            if part and (len(part) == self._items_max or size + weight > self._bytes_max):
                parts.append(part)
                part, size = [], 0
            part.append(item)
            size += weight
        parts.append(part)
        return parts

    def _need_room(self, items: int) -> None:
        # The head alone: what is split and submitted at once waits behind itself.
        is_old = self._waiting and self._clock() - self._waiting[0].since > QUEUE_AGE_S_MAX
        if is_old or self._waiting_items + items > self._queue_items_max:
            raise Overloaded("too much is waiting here already; try again in a second")

    def _submit(self, items: Sequence[Item]) -> asyncio.Future[list[Result | Exception]]:
        self._need_room(len(items))
        return self._enqueue(items)

    def _enqueue(self, items: Sequence[Item]) -> asyncio.Future[list[Result | Exception]]:
        future: asyncio.Future[list[Result | Exception]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Submission(items, future, admission.place(), admission.deadline_at(), self._clock()))
        self._waiting_items += len(items)
        if len(self._running) < self._in_flight_max:
            self._start()
        return future

    def _start(self) -> None:
        self._running.add(asyncio.get_running_loop().create_task(self._run()))

    async def _run(self) -> None:
        try:
            await self._work()
        finally:
            # Here and not in a callback, which runs later: whoever submits in between would find this worker still counted and
            # wait for one that never starts.
            task = asyncio.current_task()
            if task is not None:
                self._running.discard(task)

    async def _work(self) -> None:
        # Whoever submits in the same turn of the loop as the first still joins its batch.
        while self._waiting:
            submissions = self._next()
            if not submissions:
                continue
            batch = [item for each in submissions for item in each.items]
            deadlines = [each.deadline_at for each in submissions]
            # A worker is nobody's: it began in the context of whoever came first.
            admission.working(None, max((each for each in deadlines if each is not None), default=None) if None not in deadlines else None)
            places = [each.place for each in submissions if each.place is not None and each.place.hold()]
            try:
                results = await self._flush_each(batch)
            except BaseException:
                for each in submissions:
                    each.future.cancel()
                raise
            finally:
                for place in places:
                    place.release()
            start = 0
            for each in submissions:
                if not each.future.done():
                    each.future.set_result(results[start : start + len(each.items)])
                start += len(each.items)

    async def _flush_each(self, items: Sequence[Item]) -> list[Result | Exception]:
        """A result for each item, or the error that it fails with."""
        try:
            results = await self._flush(items)
            if len(results) != len(items):
                raise RuntimeError(f"flush answered {len(results)} results for {len(items)} items")
            return list(results)
        except _OF_AN_ITEM as e:
            if len(items) == 1:
                return [e]
        except Exception as e:
            return [e] * len(items)
        middle = len(items) // 2
        return [*await self._flush_each(items[:middle]), *await self._flush_each(items[middle:])]

    def _next(self) -> list[_Submission[Item, Result]]:
        """What goes into the next batch, taken out of the queue; what is of no use any more falls out."""
        submissions: list[_Submission[Item, Result]] = []
        items, size, now = 0, 0, self._clock()
        while self._waiting:
            first = self._waiting[0]
            is_wanted = not first.future.done()
            if is_wanted and first.deadline_at is not None and first.deadline_at <= now:
                first.future.set_exception(DeadlineExceeded("the deadline ended before the work; try again with the same request id"))
                is_wanted = False
            weight = sum(map(self._weigh, first.items)) if is_wanted and self._weigh is not None else 0
            if is_wanted and submissions and (items + len(first.items) > self._items_max or size + weight > self._bytes_max):
                break
            self._waiting.popleft()
            self._waiting_items -= len(first.items)
            if is_wanted:
                submissions.append(first)
                items += len(first.items)
                size += weight
        return submissions

    async def aclose(self) -> None:
        """Wait until nothing is in flight; nothing new may be submitted."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)


def _all(results: Sequence[Result | Exception]) -> list[Result]:
    """The results; raises the first error among them."""
    good: list[Result] = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        good.append(result)
    return good
