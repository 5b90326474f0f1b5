"""The messages kept here, as the app sees them: opened, handed over once, listed.

A message is handed to the app once: it is marked shown, then handed over. A crash between the two leaves it in the inbox.
One that was committed but not handed over (a crash, an interruption, the end of a deadline) comes with the next hand-over.
"""

import contextlib
from collections.abc import Iterable, Iterator
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
from sealpush.keystore import InboxMessage
from sealpush.local import EXPIRY_SKEW_MS, ServerTime, Store
from sealpush.model import moment
from sealpush.v1.content_pb2 import Content

FLAG_MUTED: Final = 1 << 8  # in the store's flags, above the envelope's own eight bits


class SealedBy(Enum):
    """Who sealed a message. The server saw the content of what it sealed."""

    SENDER = "sender"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Message:
    """An opened message. The content never appears in a repr.

    `content` of a higher version than this release knows holds class, title and body only. `is_new`: handed over for the
    first time. `replaces`: messages that this one took the place of; take their notifications away. `muted`: show no
    notification.
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


@dataclass(frozen=True, slots=True)
class Committed:
    """A message that was committed and not handed over yet, with what it replaced."""

    stored: InboxMessage
    replaces: tuple[MessageId, ...] = ()


class Inbox:
    """Messages out of the store."""

    def __init__(self, store: Store, time: ServerTime, entries: SenderEntries) -> None:
        self._store = store
        self._time = time
        self._entries = entries
        # Something may have been committed without being handed over: at the start, and after an interruption.
        self._unshown = True

    def interrupted(self) -> None:
        """Note that something may stay committed without being handed over."""
        self._unshown = True

    @contextlib.contextmanager
    def handing_over(self) -> Iterator[None]:
        """A block that commits or hands over: what it leaves undone when it fails, the next one finds."""
        try:
            yield
        except BaseException:
            self._unshown = True
            raise

    async def recover(self) -> list[Committed]:
        """What was committed and not handed over before, oldest first."""
        if not self._unshown:
            return []
        self._unshown = False
        stored = await self._store(lambda keystore: keystore.inbox())
        return [Committed(each) for each in reversed(stored) if each.shown_at_ms is None]

    async def show(self, committed: Iterable[Committed], shown: list[Message]) -> None:
        """Append what may be shown now and was not before, each marked first."""
        with self.handing_over():
            for each in committed:
                now_ms = self._time.now_ms()
                if now_ms >= each.stored.expires_at_ms + EXPIRY_SKEW_MS:
                    continue
                message = await self._message(each.stored, each.replaces)
                if await self._mark_shown(message.message_id, now_ms):
                    shown.append(message)

    async def messages(self, limit: int) -> list[Message]:
        """Newest first, without those whose lifetime is over."""
        now_ms = self._time.now_ms()
        stored = await self._store(lambda keystore: keystore.inbox(limit=limit))
        return [await self._message(each) for each in stored if now_ms < each.expires_at_ms]

    async def _mark_shown(self, message_id: MessageId, at_ms: int) -> bool:
        return await self._store(lambda keystore: keystore.mark_shown(message_id, at_ms))

    async def _message(self, stored: InboxMessage, replaces: tuple[MessageId, ...] = ()) -> Message:
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
            replaces=replaces,
            read_at=None if stored.read_at_ms is None else moment(stored.read_at_ms),
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
