"""The clock of tests of services: it moves only when told to, both together or the wall clock alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class FakeClock:
    """Starts at the real present unless told otherwise, because certificates and PostgreSQL live in real time."""

    def __init__(self, now: datetime | None = None) -> None:
        self._wall = now or datetime.now(UTC)
        # Not zero, and not the wall clock: who mixes the two is found out.
        self._steady = 1_000.0

    def now(self) -> datetime:
        return self._wall

    def epoch_s(self) -> float:
        return self._wall.timestamp()

    def monotonic(self) -> float:
        return self._steady

    def advance(self, by: timedelta) -> None:
        """Time passes."""
        self._wall += by
        self._steady += by.total_seconds()

    def jump(self, by: timedelta) -> None:
        """Somebody sets the wall clock."""
        self._wall += by
