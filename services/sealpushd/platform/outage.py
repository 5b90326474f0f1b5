"""What the log says of something that is away: one line when it goes, one when it is back, and how often it failed between.

Every call fails while a database is away, and background work tries again every second. A line for each would bury the one that
tells what to do.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from typing import Any, Final
from weakref import WeakSet

import structlog

from sealpushd.platform.errors import in_words
from sealpushd.platform.metrics import AWAY

log = structlog.get_logger()

# What works for this long is back. What fails again sooner was never back: it is the same outage, and the log does not flicker.
STEADY_S: Final = 5.0
# Lines about one kind of error in an outage, each with other words. A server that goes and comes back says two or three things; what says
# more names something new each time, and tells nothing new.
WORDINGS_MAX: Final = 4
# Names, numbers and addresses in an error's words, which differ from one failure to the next of the same kind.
_VARYING = re.compile(r"\S*\d\S*")
# Of each `what`, those that there are: several connections to one thing are away by themselves.
_ALL: Final[defaultdict[str, WeakSet[Outage]]] = defaultdict(WeakSet)


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
        # By kind of error, the wordings that were told of.
        self._told: defaultdict[type[BaseException], set[str]] = defaultdict(set)
        self._steady: asyncio.TimerHandle | None = None
        self._away = AWAY.labels(what)
        self._alike = _ALL[what]
        self._alike.add(self)
        self._count()

    def failed(self, error: BaseException, *, stack: bool = False, **facts: Any) -> None:
        """It failed once more. Each kind of failure, by its type and its words, is told of once in an outage; `stack` is for those that are
        bugs."""
        if self._steady is not None:
            self._steady.cancel()
            self._steady = None
        if self._since is None:
            self._since = time.monotonic()
            self._failures = 0
            self._told.clear()
            self._count()
        self._failures += 1
        words, told = in_words(error), self._told[type(error)]
        wording = _VARYING.sub("", words)
        if wording not in told and len(told) < WORDINGS_MAX:
            told.add(wording)
            emit = log.error if stack else log.warning
            emit(self._gone, error=words, **self._facts, **facts, **({"exc_info": error} if stack else {}))

    def _count(self) -> None:
        self._away.set(sum(each._since is not None for each in self._alike))

    def worked(self) -> None:
        """It worked. Costs nothing where nothing was wrong."""
        if self._since is not None and self._steady is None:
            seconds = round(time.monotonic() - self._since, 1)
            self._steady = asyncio.get_running_loop().call_later(self._steady_s, self._is_over, seconds)

    def _is_over(self, seconds: float) -> None:
        self._steady = None
        self._since = None
        self._count()
        log.warning(self._back, seconds=seconds, failures=self._failures, **self._facts)
