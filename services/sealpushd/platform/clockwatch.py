"""Sees that this machine's wall clock was set, or differs from the database's; logs it, counts it, and tells whom it concerns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from sealpushd.platform.clock import CLOCK_SKEW_MAX, Clock, Reading
from sealpushd.platform.errors import ServiceError

log = structlog.get_logger()

# How soon a clock that was set is seen.
LOOK_PERIOD_S: Final = 5.0
# PostgreSQL is asked every so many looks: once a minute costs it nothing.
LOOKS_A_QUESTION: Final = 12

CLOCK = Gauge("sealpush_clock_seconds", "This process's wall clock, epoch seconds: compare it over processes.")
MOVES = Counter("sealpush_clock_moves", "How often this process saw that its wall clock was set, by more than 30 s.")
MOVED_BY = Gauge("sealpush_clock_moved_by_seconds", "By how much the wall clock was set the last time; negative: back.")
SINCE_MOVE = Gauge("sealpush_clock_since_move_seconds", "How long ago the wall clock was set; +Inf: not since this process started.")
DATABASE_AHEAD = Gauge("sealpush_clock_database_ahead_seconds", "How far PostgreSQL's clock is ahead of this process's.")


class ClockWatch:
    """Of one process. `run` for ever; `on_moved` are called with by how much the wall clock was set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = Reading.of(clock)
        self._moved_at: float | None = None
        self._differs = False
        self.on_moved: list[Callable[[timedelta], None]] = []
        # What PostgreSQL's clock says; None: this service has no database.
        self.ask_database: Callable[[], Awaitable[datetime]] | None = None
        CLOCK.set_function(lambda: clock.now().timestamp())
        SINCE_MOVE.set_function(lambda: float("inf") if self._moved_at is None else clock.monotonic() - self._moved_at)

    def look(self) -> timedelta | None:
        """By how much the wall clock was set since the last look; None: it was not."""
        before, self._last = self._last, Reading.of(self._clock)
        if not before.was_set(self._clock):
            return None
        by = before.moved(self._clock)
        self._moved_at = self._last.steady
        MOVES.inc()
        MOVED_BY.set(by.total_seconds())
        log.warning("this machine's clock was set; is NTP running?", by_s=round(by.total_seconds(), 1))
        for tell in self.on_moved:
            tell(by)
        return by

    async def compare(self) -> timedelta | None:
        """How far PostgreSQL's clock is ahead of ours; None: it cannot be asked."""
        if self.ask_database is None:
            return None
        began = Reading.of(self._clock)
        try:
            theirs = await self.ask_database()
        except ServiceError:
            # That it does not answer is told elsewhere.
            return None
        if began.was_set(self._clock):
            return None
        ours = began.wall + timedelta(seconds=(self._clock.monotonic() - began.steady) / 2)
        ahead = theirs - ours
        DATABASE_AHEAD.set(ahead.total_seconds())
        differs = abs(ahead) > CLOCK_SKEW_MAX
        if differs and not self._differs:
            log.warning("PostgreSQL's clock differs from this machine's: set both by NTP", ahead_s=round(ahead.total_seconds(), 1))
        elif self._differs and not differs:
            log.info("PostgreSQL's clock is this machine's again")
        self._differs = differs
        return ahead

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await self.compare()
            for _ in range(LOOKS_A_QUESTION):
                await asyncio.sleep(LOOK_PERIOD_S)
                self.look()
