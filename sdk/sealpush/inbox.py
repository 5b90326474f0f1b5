"""The messages kept here, as the app sees them: opened, handed over once, listed.

What is committed and not shown yet is handed over oldest first, to whoever asks next: draining, a wake-up or a stream of this process, or
another process of this device. Nothing that waits is kept in memory, so however a call ends, the next one finds it in the store.

A message is marked shown, then handed over: two processes must not show it both. The mark is the last step of a call. Who takes messages
one by one has a page of them marked at a time. The rest is ready for the next call of this process, also where the stream ends or the
call is cancelled. A process that is killed leaves what was marked in the inbox, where `Device.inbox()` lists it.
"""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Final

from google.protobuf.message import DecodeError

from sealpush.content import made_safe
from sealpush.entries import SenderEntries
from sealpush.envelope import FLAG_SERVER_SEALED
from sealpush.errors import EnvelopeRefused
from sealpush.ids import MessageId, SenderId
from sealpush.keystore import PAGE_MAX, InboxMessage, Keystore
from sealpush.local import EXPIRY_SKEW_MS, ServerTime, Store
from sealpush.model import moment
from sealpush.retry import Deadline
from sealpush.v1.content_pb2 import Content

# Marked at a time, however few are asked for: each mark is a write, and one for each message held up a backlog. No more, because a process
# that is killed may have marked so many without handing them over.
MARKED_MIN: Final = 32
FLAG_MUTED: Final = 1 << 8  # in the store's flags, above the envelope's own eight bits


class SealedBy(Enum):
    """Who sealed a message. The server saw the content of what it sealed."""

    SENDER = "sender"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Message:
    """An opened message. The content never appears in a repr.

    `content` of a higher version than this release knows holds class, title and body only. `is_new`: handed over for the
    first time. `replaces`: messages that were handed over and that this one took the place of; take their notifications away.
    `muted`: show no notification. `position`: where it stands in the inbox of this device; a later one has a higher one.
    """

    message_id: MessageId
    sender_id: SenderId
    sender_name: str
    sealed_by: SealedBy
    content: Content = field(repr=False)
    muted: bool
    created_at: datetime
    expires_at: datetime
    received_at: datetime
    is_new: bool
    replaces: tuple[MessageId, ...] = ()
    read_at: datetime | None = None
    position: int = 0


class Inbox:
    """Messages out of the store."""

    def __init__(self, store: Store, time: ServerTime, entries: SenderEntries) -> None:
        self._store = store
        self._time = time
        self._entries = entries
        # One hand-over at a time, whoever asks: so a message and its successor go out in this order.
        self._sequence = asyncio.Lock()
        # A mark goes on when its call is cancelled, in its thread. What it marked is ready for the next call.
        self._marking: asyncio.Task[None] | None = None
        self._ready: list[Message] = []
        self._arrival = asyncio.Event()

    @property
    def arrival(self) -> asyncio.Event:
        """Set as soon as something may wait that did not when this was asked for."""
        return self._arrival

    def arrived(self) -> None:
        """Tell streams that something may wait, or that they are to look again."""
        self._arrival.set()
        self._arrival = asyncio.Event()

    async def hand_over(self, *, limit: int | None = None, collecting: Deadline | None = None) -> list[Message]:
        """What waits, oldest first: at most `limit`, or all; what is not collected by the end of `collecting` waits on.

        Raises KeystoreError; then, and where this is cancelled, everything waits on.
        """
        async with self._sequence:
            given = await self._left(limit)
            wanted = None if limit is None else limit - len(given)
            if wanted is None or wanted > 0:
                # Until the mark is made: whoever is cancelled leaves them to the next call.
                self._ready = [*given, *self._ready]
                waiting = await self._waiting(None if wanted is None else max(wanted, MARKED_MIN), collecting)
                if waiting:
                    self._marking = asyncio.create_task(self._mark(waiting), name="sealpush-hand-over")
                    await asyncio.shield(self._marking)
                given, self._ready = self._ready[:limit], self._ready[len(self._ready[:limit]) :]
            return given

    async def forget(self) -> None:
        """Forget what a cancelled call left: the store was erased."""
        async with self._sequence:
            await self._until_marked()
            self._ready = []

    async def _until_marked(self) -> None:
        """Wait for the mark of a call that was cancelled."""
        if self._marking is not None:
            # Whatever became of it: how it failed was for the call that began it.
            await asyncio.wait((self._marking,))
            self._marking = None

    async def _left(self, limit: int | None) -> list[Message]:
        """Taken from what is ready: at most `limit`, without those that ended meanwhile, or were replaced or deleted: another process may
        have shown the successor."""
        await self._until_marked()
        ready, alive_at_ms = self._ready, self._time.now_ms() - EXPIRY_SKEW_MS
        if not ready:
            return []

        def look(keystore: Keystore) -> tuple[list[Message], int]:
            found: list[Message] = []
            for count, each in enumerate(ready, start=1):
                stored = keystore.message(each.message_id)
                if stored is not None and stored.expires_at_ms > alive_at_ms:
                    found.append(each)
                if len(found) == limit:
                    return found, count
            return found, len(ready)

        found, looked = await self._store(look)
        self._ready = ready[looked:]
        return found

    async def _waiting(self, limit: int | None, collecting: Deadline | None) -> list[Message]:
        alive_at_ms = self._time.now_ms() - EXPIRY_SKEW_MS
        found: list[Message] = []
        while limit is None or len(found) < limit:
            after = found[-1].position if found else 0
            page_size = PAGE_MAX if limit is None else min(limit - len(found), PAGE_MAX)
            page = await self._unshown(alive_at_ms, after, page_size)
            found += [await self._message(each) for each in page]
            if len(page) < page_size or (collecting is not None and collecting.remaining_s() <= 0):
                break
        return found

    async def _unshown(self, alive_at_ms: int, after: int, limit: int) -> list[InboxMessage]:
        return await self._store(lambda keystore: keystore.unshown(alive_at_ms=alive_at_ms, after=after, limit=limit))

    async def _mark(self, waiting: list[Message]) -> None:
        """Mark them in one transaction. Those that another process marked before, or that were replaced meanwhile, are not for us."""
        positions, now_ms = [each.position for each in waiting], self._time.now_ms()
        marked = await self._store(lambda keystore: keystore.mark_shown(positions, now_ms))
        fresh = [each for each in waiting if each.position in marked]
        replaced = {message_id for each in fresh for message_id in each.replaces}
        self._ready = [*(each for each in self._ready if each.message_id not in replaced), *fresh]

    async def messages(self, before: int | None, limit: int) -> list[Message]:
        """Newest first, without those whose lifetime is over."""
        alive_at_ms = self._time.now_ms()
        found: list[Message] = []
        while len(found) < limit:
            page_size = min(limit - len(found), PAGE_MAX)
            page = await self._page(alive_at_ms, before, page_size)
            found += [await self._message(each) for each in page]
            if len(page) < page_size:
                break
            before = found[-1].position
        return found

    async def _page(self, alive_at_ms: int, before: int | None, limit: int) -> list[InboxMessage]:
        return await self._store(lambda keystore: keystore.inbox(alive_at_ms=alive_at_ms, before=before, limit=limit))

    async def _message(self, stored: InboxMessage) -> Message:
        return Message(
            message_id=stored.message_id,
            sender_id=stored.sender_id,
            sender_name=await self._entries.name(stored.sender_id),
            sealed_by=SealedBy.SERVER if stored.flags & FLAG_SERVER_SEALED else SealedBy.SENDER,
            content=parse_content(stored.content),
            muted=bool(stored.flags & FLAG_MUTED),
            created_at=moment(stored.created_at_ms),
            expires_at=moment(stored.expires_at_ms),
            received_at=moment(stored.received_at_ms),
            is_new=stored.shown_at_ms is None,
            replaces=stored.replaces,
            read_at=None if stored.read_at_ms is None else moment(stored.read_at_ms),
            position=stored.local_id,
        )


def parse_content(plaintext: bytes) -> Content:
    """The content in a plaintext, made safe to show. Of a higher version only class, title and body are kept. Raises EnvelopeRefused."""
    try:
        content = Content.FromString(plaintext)
    except DecodeError:
        raise EnvelopeRefused from None
    if content.version > 1:
        content = Content(version=content.version, content_class=content.content_class, title=content.title, body=content.body)
    return made_safe(content)
