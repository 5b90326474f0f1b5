"""Wake-up sessions: handing due wake-ups to dispatchers as far as their credit goes, and taking their reports."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Final

import structlog

from sealpush.ids import uuid7
from sealpushd.fetch.rules import Report, WakeUp
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.errors import StoreUnavailable, Unavailable
from sealpushd.platform.outage import Outage
from sealpushd.platform.valkey import CHANNEL_QUEUE, Valkey

log = structlog.get_logger()

# How often a session looks for wake-ups that fell due without a notice: retries, and pushes held back for a live stream.
LOOK_PERIOD_S: Final = 0.5
# Wake-ups in one frame.
CLAIM_MAX: Final = 256
HEARTBEAT_S: Final = 5.0
STORE_RETRY_PAUSE_S: Final = 0.5


class WakeUpSession:
    """One connected dispatcher: its credit by lane, and its reports on the way to the store."""

    def __init__(self, store: MailboxStore) -> None:
        self.session_id = uuid7()
        self._store = store
        self._credit: Counter[tuple[str, int]] = Counter()
        self._reports: list[Report] = []
        self._changed = asyncio.Event()
        self._reported = asyncio.Event()
        self._ended: Exception | None = None

    def add_credit(self, app_id: str, platform: int, credit: int) -> None:
        self._credit[app_id, platform] += credit
        self._changed.set()

    def add_reports(self, reports: Iterable[Report]) -> None:
        self._reports.extend(reports)
        self._reported.set()

    def wake(self) -> None:
        """Something may be due."""
        self._changed.set()

    def end(self, error: Exception) -> None:
        self._ended = error
        self._changed.set()

    async def wake_ups(self) -> AsyncIterator[list[WakeUp]]:
        """Frames of wake-ups that are now leased to this session, for ever. Raises what ended the session."""
        while True:
            if self._ended is not None:
                raise self._ended
            self._changed.clear()
            lanes = [(app_id, platform, min(credit, CLAIM_MAX)) for (app_id, platform), credit in self._credit.items() if credit > 0]
            claimed: list[WakeUp] = []
            if lanes:
                try:
                    claimed = await self._store.claim(self.session_id, lanes)
                except StoreUnavailable:
                    await asyncio.sleep(STORE_RETRY_PAUSE_S)
                    continue
            if claimed:
                for wake_up in claimed:
                    self._credit[wake_up.app_id, wake_up.platform] -= 1
                yield claimed
                continue
            try:
                async with asyncio.timeout(LOOK_PERIOD_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def write_reports(self) -> None:
        """Write reports down as they come, for ever. What gathered during one write goes with the next."""
        while True:
            await self._reported.wait()
            self._reported.clear()
            reports, self._reports = self._reports, []
            try:
                await self._store.report(self.session_id, reports)
            except StoreUnavailable:
                # The leases stay until it is written: put them back in front, newer ones override.
                self._reports[:0] = reports
                self._reported.set()
                await asyncio.sleep(STORE_RETRY_PAUSE_S)
            except asyncio.CancelledError:
                self._reports[:0] = reports
                raise

    async def write_last_reports(self) -> None:
        """Write down what is left when the session ends. Repeating a report is harmless: its fence is used up."""
        reports, self._reports = self._reports, []
        if reports:
            try:
                await self._store.report(self.session_id, reports)
            except StoreUnavailable as e:
                log.warning("the last reports of a dispatcher are lost: its wake-ups will repeat", reports=len(reports), error=e.message)


class Leases:
    """The wake-up sessions of this process."""

    def __init__(self, store: MailboxStore, valkey: Valkey) -> None:
        self._store = store
        self._valkey = valkey
        self._sessions: set[WakeUpSession] = set()
        self._ended: list[bytes] = []
        self._outage = Outage(
            "leases",
            gone="the heartbeat of wake-up sessions failed and goes on later",
            back="the heartbeat of wake-up sessions works again",
        )

    async def open(self) -> WakeUpSession:
        """Raises StoreUnavailable."""
        session = WakeUpSession(self._store)
        await self._store.keep_sessions([session.session_id])
        self._sessions.add(session)
        return session

    async def close(self, session: WakeUpSession) -> None:
        """Release what the session held; when the store does not answer, the heartbeat does it later."""
        self._sessions.discard(session)
        try:
            await self._store.end_sessions([session.session_id])
        except StoreUnavailable:
            self._ended.append(session.session_id)
        self.wake_local()

    async def drain(self) -> None:
        for session in list(self._sessions):
            session.end(Unavailable("this server is going away; connect again"))

    def wake_local(self) -> None:
        for session in self._sessions:
            session.wake()

    async def wake(self) -> None:
        """New wake-ups are due: tell the dispatchers here, or whoever holds one."""
        if self._sessions:
            self.wake_local()
        else:
            await self._valkey.publish(CHANNEL_QUEUE, b"")

    async def listen(self) -> None:
        async for _ in self._valkey.listen(CHANNEL_QUEUE):
            self.wake_local()

    async def heartbeat(self) -> None:
        """Keep the leases of connected dispatchers, release those of vanished ones, for ever."""
        while True:
            try:
                if self._sessions:
                    await self._store.keep_sessions([session.session_id for session in self._sessions])
                lost = await self._store.lost_sessions() + self._ended
                if lost:
                    await self._store.end_sessions(lost)
                    self._ended.clear()
                    log.info("released the leases of dispatchers that are gone", sessions=len(lost))
                    self.wake_local()
                self._outage.worked()
            except StoreUnavailable as e:
                self._outage.failed(e)
            await asyncio.sleep(HEARTBEAT_S)
