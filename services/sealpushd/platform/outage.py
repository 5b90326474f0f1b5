"""What the log says of something that is away: one line when it goes, one when it is back, and how often it failed between.

Every call fails while a database is away, and background work tries again every second. A line for each would bury the one that
tells what to do.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import structlog

from sealpushd.platform.errors import in_words
from sealpushd.platform.metrics import AWAY

log = structlog.get_logger()

# What works for this long is back. What fails again sooner was never back: it is the same outage, and the log does not flicker.
STEADY_S: Final = 5.0


class Outage:
    """One thing that this process needs, as far as it answers. Belongs to the event loop.

    `gone` and `back` are the texts of the two lines, `facts` stand beside both. `what` names it in the metrics.
    """

    def __init__(self, what: str, *, gone: str, back: str, steady_s: float = STEADY_S, **facts: Any) -> None:
        self._gone = gone
        self._back = back
        self._steady_s = steady_s
        self._facts = facts
        self._since: float | None = None
        self._failures = 0
        self._kinds: set[type[BaseException]] = set()
        self._steady: asyncio.TimerHandle | None = None
        self._away = AWAY.labels(what)
        self._away.set(0)

    def failed(self, error: BaseException, *, stack: bool = False, **facts: Any) -> None:
        """It failed once more. Each kind of failure is told of once in an outage; `stack` is for those that are bugs."""
        if self._steady is not None:
            self._steady.cancel()
            self._steady = None
        if self._since is None:
            self._since = time.monotonic()
            self._failures = 0
            self._kinds.clear()
            self._away.set(1)
        self._failures += 1
        kind = type(error)
        if kind not in self._kinds:
            self._kinds.add(kind)
            emit = log.error if stack else log.warning
            emit(self._gone, error=in_words(error), **self._facts, **facts, **({"exc_info": error} if stack else {}))

    def worked(self) -> None:
        """It worked. Costs nothing where nothing was wrong."""
        if self._since is not None and self._steady is None:
            seconds = round(time.monotonic() - self._since, 1)
            self._steady = asyncio.get_running_loop().call_later(self._steady_s, self._is_over, seconds)

    def _is_over(self, seconds: float) -> None:
        self._steady = None
        self._since = None
        self._away.set(0)
        log.warning(self._back, seconds=seconds, failures=self._failures, **self._facts)
