"""Getting everything that waits, page by page: take, acknowledge, next; and what a wake-up named, out of turn."""

import asyncio
import base64
import contextlib
from collections.abc import Iterable
from typing import Final

from sealpush import errors
from sealpush.acknowledging import Acknowledgements
from sealpush.ids import parse_uuid
from sealpush.local import Held, ServerTime
from sealpush.receiving import Receiver
from sealpush.retry import Deadline
from sealpush.session import Session
from sealpush.v1 import messages_pb2

PAGE_SIZE: Final = 64  # with messages of 64 KiB a page still fits the service's 2 MiB twice over


class Drainer:
    """Takes what waits at the service."""

    def __init__(self, session: Session, receiver: Receiver, acknowledgements: Acknowledgements, time: ServerTime) -> None:
        self._session = session
        self._receiver = receiver
        self._acknowledgements = acknowledgements
        self._time = time
        # Wake-ups that came, and up to which of them a drain that began later has gone through.
        self._draining = asyncio.Lock()
        self._wake_ups = 0
        self._wake_ups_drained = 0

    async def drain_for_wake_up(self, named: bytes | None, deadline: Deadline) -> None:
        """Drain, unless a drain that began after this wake-up came has been through meanwhile."""
        self._wake_ups += 1
        mine = self._wake_ups
        async with self._draining:
            if self._wake_ups_drained >= mine:
                return
            covered = self._wake_ups
            await self.drain(deadline, named)
            self._wake_ups_drained = covered

    async def drain(self, deadline: Deadline, named: bytes | None = None) -> None:
        """Take page after page, acknowledging each. What is held stays at the service and does not stand in the way.

        What `named` names is fetched after the first page if it was not on it and there are more. Raises CallFailed.
        """
        request = messages_pb2.DrainRequest(page_size=PAGE_SIZE)
        while True:
            sent_at = self._time.steady_s()
            answer = await self._session.call(self._session.channels.messages.Drain, request, deadline)
            await self._time.learn(answer.server_time, sent_at)
            await self._take_all(answer.deliveries, deadline)
            if not answer.next_page_token:
                return
            if named is not None:
                if all(delivery.wake_up_id != named for delivery in answer.deliveries):
                    await self._fetch(named, deadline)
                named = None
            request.page_token = answer.next_page_token

    async def _fetch(self, wake_up_id: bytes, deadline: Deadline) -> None:
        request = messages_pb2.FetchRequest(wake_up_id=wake_up_id)
        sent_at = self._time.steady_s()
        try:
            answer = await self._session.call(self._session.channels.messages.Fetch, request, deadline)
        except (errors.NotFound, errors.InvalidRequest):
            return  # it has ended, or the push was garbled: what waits comes by draining
        await self._time.learn(answer.server_time, sent_at)
        await self._take_all([answer.delivery], deadline)

    async def _take_all(self, deliveries: Iterable[messages_pb2.Delivery], deadline: Deadline) -> None:
        """Take these, and acknowledge them before more is fetched: their senders are waiting."""
        for delivery in deliveries:
            with contextlib.suppress(Held):
                await self._receiver.take(delivery, deadline)
        await self._acknowledgements.send(deadline)


def parse_wake_up_id(pushed: bytes | str | None) -> bytes | None:
    """The 16 bytes of a wake-up id as pushed (base64url without padding), or None for anything else: then draining does."""
    if isinstance(pushed, str):
        try:
            pushed = parse_uuid(pushed) if len(pushed) == 36 else base64.urlsafe_b64decode(pushed + "=" * (-len(pushed) % 4))
        except ValueError:
            return None
    return pushed if pushed is not None and len(pushed) == 16 else None
