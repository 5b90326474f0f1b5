"""Turns at scarce work, shared out fairly between those who ask: whoever asks for much waits for their own share, not others for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sealpushd.platform.errors import Overloaded

_Waiter = asyncio.Future[None]


class _Lane:
    """Who waits, by subject. The first subject is served next, its oldest waiter first, and goes to the end."""

    def __init__(self, waiting_max: int, waiting_each_max: int, refusal: str) -> None:
        self._waiting_max = waiting_max
        self._waiting_each_max = waiting_each_max
        self._refusal = refusal
        self._subjects: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self.waiting = 0

    def add(self, subject: str, waiter: _Waiter) -> None:
        """Raises Overloaded where the subject has its share waiting, or everybody has as much as this one would."""
        own = len(self._subjects.get(subject, ()))
        if own >= self._waiting_each_max:
            raise Overloaded(self._refusal)
        if self.waiting >= self._waiting_max:
            self._make_room(own)
        self._subjects.setdefault(subject, deque()).append(waiter)
        self.waiting += 1

    def _make_room(self, own: int) -> None:
        """Sends away the newest of the subject that has most waiting: a full lane is full of those who ask for most."""
        subject, waiters = max(self._subjects.items(), key=lambda item: len(item[1]))
        if len(waiters) <= own + 1:
            raise Overloaded(self._refusal)
        waiter = waiters[-1]
        self.discard(subject, waiter)
        if not waiter.done():
            waiter.set_exception(Overloaded(self._refusal))

    def discard(self, subject: str, waiter: _Waiter) -> None:
        waiters = self._subjects.get(subject)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        self.waiting -= 1
        if not waiters:
            del self._subjects[subject]

    def pop(self) -> _Waiter | None:
        """Who is next; None: nobody waits."""
        while self._subjects:
            subject, waiters = self._subjects.popitem(last=False)
            waiter = waiters.popleft()
            self.waiting -= 1
            if waiters:
                self._subjects[subject] = waiters
            if not waiter.done():
                return waiter
        return None


class FairTurns:
    """At most `at_once` turns at a time: `async with turns.turn(subject): …`.

    Turns go round the subjects that wait, so that one that asks a thousand times gets no more of them than one that asks once. A subject
    has at most `waiting_each_max` waiting; who is one too many is refused as Overloaded. Subjects that are `known`, because they proved
    something before, have a lane of their own, which gets every other turn while both wait: however many strangers there are, they neither
    fill it nor take more than half.

    In each lane `waiting_max` wait. In a full one a subject takes the place of another that has more waiting, which is refused then.
    """

    def __init__(self, *, at_once: int, waiting_max: int, waiting_each_max: int, refusal: str) -> None:
        self._free = at_once
        self._strangers, self._known = (_Lane(waiting_max, waiting_each_max, refusal) for _ in range(2))
        # The lane in front is asked first.
        self._lanes = deque((self._known, self._strangers))

    @property
    def waiting(self) -> int:
        return self._known.waiting + self._strangers.waiting

    @asynccontextmanager
    async def turn(self, subject: str, *, known: bool = False) -> AsyncIterator[None]:
        """Have a turn, which ends with the block. Raises Overloaded."""
        await self._take(subject, self._known if known else self._strangers)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, subject: str, lane: _Lane) -> None:
        if self._free:
            # Then nobody waits.
            self._free -= 1
            return
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        lane.add(subject, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            lane.discard(subject, waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # The turn came at the same time.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        for lane in tuple(self._lanes):
            waiter = lane.pop()
            if waiter is not None:
                self._lanes.remove(lane)
                self._lanes.append(lane)
                waiter.set_result(None)
                return
        self._free += 1
