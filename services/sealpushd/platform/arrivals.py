"""Requests on their way: how long one may take to arrive, and how many are waited for at once.

gRPC keeps what has come of a request until it is whole. A request that never becomes whole would keep that, and its call, for as long as
its connection lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc

from sealpushd.platform.addresses import address_subject
from sealpushd.platform.errors import DeadlineExceeded, InvalidRequest, Overloaded

# The SDK gives a whole attempt as much: nobody waits any more for the answer to what came later.
ARRIVAL_S_MAX: Final = 10.0
# Calls whose requests are waited for at once: 50 kB each, and what has come of the request. gRPC gives a turn of the loop one call, and
# nearly every request comes in the packets that its call comes in: a few wait, and beside them those of slow networks.
WAITING_MAX: Final = 256
# The moment to end that tells a time-out of who had to make room: long ago.
_GIVEN_UP: Final = 0.0


class Arrivals:
    """The requests that one listener waits for."""

    def __init__(self, *, seconds_max: float = ARRIVAL_S_MAX, waiting_max: int = WAITING_MAX) -> None:
        self._seconds_max = seconds_max
        self._waiting_max = waiting_max
        # By whom an address stands for, and in the order they began: the time-out of each, and when it ends.
        self._waiting: dict[str, dict[asyncio.Timeout, float]] = {}
        self._count = 0
        # One for all: a timer for each call costs more than all else here, and nearly none would ever ring.
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self, read: Callable[[], Awaitable[Any]], address: str) -> bytes:
        """The one request of a call from this address.

        Raises DeadlineExceeded where it does not come in time, Overloaded where others came that are waited for instead, InvalidRequest
        where the caller ended without one.
        """
        address = address_subject(address)
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._seconds_max
        if self._timer is None:
            self._timer = loop.call_at(ends_at, self._end_late)
        try:
            async with asyncio.timeout(None) as waiting:
                self._waiting.setdefault(address, {})[waiting] = ends_at
                self._count += 1
                if self._count > self._waiting_max:
                    self._give_up_one()
                try:
                    raw = await read()
                finally:
                    self._leave(address, waiting)
        except TimeoutError:
            if waiting.when() == _GIVEN_UP:
                raise Overloaded("too many requests are on their way: send each whole, at once") from None
            raise DeadlineExceeded(f"the request did not arrive within {self._seconds_max:g} s: send it whole, at once") from None
        if raw is grpc.aio.EOF:
            raise InvalidRequest("the call ended without a request")
        assert isinstance(raw, bytes)  # noqa: S101 - gRPC gives nothing else to a method without a deserializer
        return raw

    def _leave(self, address: str, waiting: asyncio.Timeout) -> None:
        of_address = self._waiting.get(address, {})
        if waiting in of_address:
            del of_address[waiting]
            self._count -= 1
        if not of_address:
            self._waiting.pop(address, None)

    def _end_late(self) -> None:
        """End those whose time is over, and ring again for the next one."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        others: list[float] = []
        for of_address in self._waiting.values():
            for waiting, ends_at in of_address.items():
                if ends_at > now:
                    others.append(ends_at)
                elif not waiting.expired():
                    waiting.reschedule(ends_at)
        self._timer = loop.call_at(min(others), self._end_late) if others else None

    def _give_up_one(self) -> None:
        """End the oldest request of the address that has most of them: whoever floods loses its own, and others keep theirs."""
        address = max(self._waiting, key=lambda each: len(self._waiting[each]))
        waiting, ends_at = next(iter(self._waiting[address].items()))
        self._leave(address, waiting)
        if not waiting.expired():  # else it goes by itself
            is_late = ends_at <= asyncio.get_running_loop().time()
            waiting.reschedule(ends_at if is_late else _GIVEN_UP)
