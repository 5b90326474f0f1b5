"""What operators see of the wake-ups that wait, and how they push again what was given up."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from prometheus_client import Gauge

from sealpush.ids import DeviceId
from sealpushd.fetch import rules
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.rules import Queue
from sealpushd.fetch.store import REQUEUE_ROWS_MAX, MailboxStore
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.metrics import platform_label
from sealpushd.platform.outage import Outage

log = structlog.get_logger()

REFRESH_PERIOD_S: Final = 30.0
# Deliveries that one call requeues, about a second's work and so well within its deadline; mailbox.proto names it.
REQUEUE_CALL_MAX: Final = 20_000

# Every process of fetch tells the same: take the largest, not the sum.
_WAITING: Final = Gauge("sealpush_wake_ups_waiting", "Wake-ups to be pushed that no dispatcher holds, by lane.", ["app", "platform"])
_QUARANTINED: Final = Gauge("sealpush_wake_ups_quarantined", "Wake-ups given up until they are requeued, by lane.", ["app", "platform"])
_OLDEST_SECONDS: Final = Gauge(
    "sealpush_wake_ups_oldest_seconds",
    "How long ago the oldest wake-up that waits or is held was accepted, by lane; 0: none is.",
    ["app", "platform"],
)


class Queues:
    """The queues of all lanes. `call_max` and `batch_max` bound what one call and one transaction requeue."""

    def __init__(
        self,
        store: MailboxStore,
        leases: Leases,
        clock: Clock,
        *,
        refresh_period_s: float = REFRESH_PERIOD_S,
        call_max: int = REQUEUE_CALL_MAX,
        batch_max: int = REQUEUE_ROWS_MAX,
    ) -> None:
        self._store = store
        self._leases = leases
        self._clock = clock
        self._refresh_period_s = refresh_period_s
        self._call_max = call_max
        self._batch_max = batch_max
        self._outage = Outage(
            "queues", gone="the queues could not be counted; their metrics stay as they are", back="the queues are counted again"
        )
        # Lanes that the gauges tell of.
        self._told: set[tuple[str, str]] = set()

    async def look(self) -> list[Queue]:
        """What waits now. Raises StoreUnavailable."""
        return await self._store.queues()

    async def requeue(self, app_id: str, platform: int) -> tuple[int, bool]:
        """Push what is quarantined in a lane again: how many, and whether there may be more. Raises StoreUnavailable.

        What fails in the middle has requeued a part; a repeated call goes on.
        """
        requeued = 0
        # In the order of the keys: what is quarantined once more meanwhile is not met again, so that it ends.
        last = DeviceId(bytes(rules.BEFORE_ALL)), rules.BEFORE_ALL
        while requeued < self._call_max:
            keys = await self._store.requeue(app_id, platform, last, self._batch_max)
            if keys:
                await self._leases.wake()
                requeued, last = requeued + len(keys), keys[-1]
            if len(keys) < self._batch_max:
                break
        more = requeued >= self._call_max
        log.info("quarantined wake-ups were requeued", app=app_id, platform=platform, requeued=requeued, more=more)
        return requeued, more

    async def refresh(self) -> None:
        """Let the gauges tell what waits now, and nothing wait for a clock that was ahead. Raises StoreUnavailable."""
        await self._store.pull_back()
        queues = await self._store.queues()
        now = self._clock.now()
        told: set[tuple[str, str]] = set()
        for queue in queues:
            labels = (queue.app_id, platform_label(queue.platform))
            told.add(labels)
            age_s = 0.0 if queue.oldest_at is None else max((now - queue.oldest_at).total_seconds(), 0.0)
            _set(labels, queue.waiting, queue.quarantined, age_s)
        for labels in self._told - told:
            _set(labels, 0, 0, 0.0)
        self._told |= told

    async def watch(self) -> None:
        """Refresh, for ever."""
        while True:
            try:
                await self.refresh()
                self._outage.worked()
            except StoreUnavailable as e:
                self._outage.failed(e)
            await asyncio.sleep(self._refresh_period_s)


def _set(labels: tuple[str, str], waiting: int, quarantined: int, oldest_s: float) -> None:
    _WAITING.labels(*labels).set(waiting)
    _QUARANTINED.labels(*labels).set(quarantined)
    _OLDEST_SECONDS.labels(*labels).set(oldest_s)
