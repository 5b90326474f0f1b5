"""What became of a lane's wake-ups since the process started, as operators see it: counts, reasons, the rate, receipts."""

from __future__ import annotations

import collections
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Final, assert_never

from prometheus_client import Counter

from sealpushd.dispatch.rules import Decision, Pushed, Quarantine, Retry, StopLane, TokenDead
from sealpushd.platform.clock import Reading

# Different reasons that are counted apart; vendors have about 30 each.
ERRORS_MAX: Final = 32
OTHER_ERROR: Final = "other"
RATE_SECONDS: Final = 60

_ERRORS = Counter("sealpush_lane_errors", "Wake-ups that were not accepted, by lane and reason.", ["app", "platform", "reason"])


class Rate:
    """How many of something happened in the last minute, by the second. `now` is of the steady clock."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()

    def add(self, now: float) -> None:
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += 1
        else:
            self._seconds.append([second, 1])
            self._forget(second)

    def per_second(self, now: float) -> float:
        self._forget(int(now))
        return sum(count for _, count in self._seconds) / RATE_SECONDS

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - RATE_SECONDS:
            self._seconds.popleft()


@dataclass(slots=True)
class SeenError:
    """One reason for which wake-ups were not accepted."""

    count: int
    last_at: datetime


class Tally:
    """Of one lane. `labels`: its app and platform, for metrics."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self.accepted = 0
        self.retried = 0
        self.dead_tokens = 0
        self.quarantined = 0
        # What push services told of deliveries afterwards, by its word.
        self.receipts: collections.Counter[str] = collections.Counter()
        self.rate = Rate()
        self.errors: dict[str, SeenError] = {}
        self._labels = labels
        # Label look-ups cost more than counting: remember the children.
        self._counters: dict[str, Counter] = {}

    def take(self, decision: Decision, reason: str, now: Reading) -> None:
        """Count what became of one send, and why if it was not accepted."""
        match decision:
            case Pushed():
                self.accepted += 1
                self.rate.add(now.steady)
                return
            case Retry() | StopLane():
                self.retried += 1
            case TokenDead(certain=True):
                self.dead_tokens += 1
            case TokenDead() | Quarantine():
                self.quarantined += 1
            case _:
                assert_never(decision)
        if reason not in self.errors and len(self.errors) >= ERRORS_MAX:
            reason = OTHER_ERROR
        seen = self.errors.setdefault(reason, SeenError(0, now.wall))
        seen.count, seen.last_at = seen.count + 1, now.wall
        counter = self._counters.get(reason)
        if counter is None:
            counter = self._counters[reason] = _ERRORS.labels(*self._labels, reason)
        counter.inc()

    def by_frequency(self) -> list[tuple[str, SeenError]]:
        """The reasons, most frequent first."""
        return sorted(self.errors.items(), key=lambda item: -item[1].count)
