"""Following messages: one tail of the mailbox's journal wakes everybody who waits for a change."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import grpc
import structlog

from sealpush.ids import MessageId, SenderId
from sealpush.v1 import publish_pb2
from sealpushd.platform.errors import Unavailable
from sealpushd.platform.outage import Outage
from sealpushd.publishing import rules
from sealpushd.publishing.peers import Peers
from sealpushd.v1 import mailbox_pb2

log = structlog.get_logger()

RECONNECT_MAX_S: Final = 2.0
# The tail stays connected for this long after the last follower: the next one is likely to come soon.
TAIL_KEPT_S: Final = 10.0
# A watcher looks by itself this often, in case the tail is away.
LOOK_PERIOD_S: Final = 2.0


class Follower:
    """Somebody who waits for changes of some messages."""

    def __init__(self, message_ids: Sequence[MessageId]) -> None:
        self._changed = set(message_ids)
        self._event = asyncio.Event()

    def notice(self, message_id: MessageId) -> None:
        self._changed.add(message_id)
        self._event.set()

    async def changed(self) -> set[MessageId]:
        """Messages that may have changed since the last call; empty when nothing came within a look period."""
        try:
            async with asyncio.timeout(LOOK_PERIOD_S):
                await self._event.wait()
        except TimeoutError:
            return set()
        self._event.clear()
        changed, self._changed = self._changed, set()
        return changed


class StatusWatch:
    """Statuses of messages, now and as they change."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._followers: dict[MessageId, set[Follower]] = {}
        self._followed = asyncio.Event()
        self._followed_at = 0.0
        self._draining = False
        self._outage = Outage("journal", gone="the journal's tail ended and is taken up again", back="the journal's tail is read again")

    async def drain(self) -> None:
        """End the watchers: they would hold up a server that is going away."""
        self._draining = True
        self._notice_all()

    def _notice_all(self) -> None:
        for message_id, followers in list(self._followers.items()):
            for follower in followers:
                follower.notice(message_id)

    async def statuses(self, sender_id: SenderId, message_ids: Sequence[MessageId]) -> list[publish_pb2.MessageStatus]:
        """Present statuses; unknown messages are left out."""
        answer = await self._peers.mailbox_channel.call(
            self._peers.mailbox.GetStatuses,
            mailbox_pb2.MailboxGetStatusesRequest(sender_id=sender_id, message_ids=message_ids),
        )
        return list(answer.statuses)

    async def watch(self, sender_id: SenderId, message_ids: Sequence[MessageId]) -> AsyncIterator[list[publish_pb2.MessageStatus]]:
        """Every known message once, then those that changed, until all are terminal. Follows before it looks: nothing slips between."""
        with self._following(message_ids) as follower:
            last: dict[bytes, bytes] = {}
            waiting = set(message_ids)
            first = True
            while waiting:
                changed = waiting if first else (await follower.changed() or waiting) & waiting
                statuses = await self.statuses(sender_id, sorted(changed)) if changed else []
                if first:
                    waiting &= {MessageId(status.message_id) for status in statuses}
                fresh = []
                for status in statuses:
                    seen = status.SerializeToString(deterministic=True)
                    if last.get(status.message_id) != seen:
                        last[status.message_id] = seen
                        fresh.append(status)
                    if status.state in rules.TERMINAL:
                        waiting.discard(MessageId(status.message_id))
                if fresh or first:
                    yield fresh
                first = False
                if waiting and self._draining:
                    raise Unavailable("this server is going away; watch again")

    @contextmanager
    def _following(self, message_ids: Sequence[MessageId]) -> Iterator[Follower]:
        follower = Follower(message_ids)
        for message_id in message_ids:
            self._followers.setdefault(message_id, set()).add(follower)
        self._followed.set()
        try:
            yield follower
        finally:
            self._followed_at = time.monotonic()
            for message_id in message_ids:
                followers = self._followers.get(message_id, set())
                followers.discard(follower)
                if not followers:
                    self._followers.pop(message_id, None)

    async def tail(self) -> None:
        """Read the journal's present end and wake who waits, for ever; connects again when the mailbox was away.

        Not while nobody follows anything: every change of every message would pass here for nothing.
        """
        pause = 0.1
        while True:
            await self._followed.wait()
            try:
                call = self._peers.mailbox.ReadEvents(
                    mailbox_pb2.ReadEventsRequest(consumer="publishing", from_now=True),
                    metadata=self._peers.mailbox_channel.metadata(),
                )
                async for frame in call:
                    pause = 0.1
                    self._outage.worked()
                    if not frame.events:
                        # Connected: what happened before is looked up by everybody.
                        self._notice_all()
                    for event in frame.events:
                        message_id = MessageId(event.message_id)
                        for follower in self._followers.get(message_id, ()):
                            follower.notice(message_id)
                    if not self._followers and time.monotonic() - self._followed_at > TAIL_KEPT_S:
                        self._followed.clear()
                        call.cancel()
                        break
            except grpc.aio.AioRpcError as e:
                self._outage.failed(e)
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - jitter
            pause = min(pause * 2, RECONNECT_MAX_S)
