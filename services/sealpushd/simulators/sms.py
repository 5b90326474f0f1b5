"""A simulated SMS gateway: it delivers at once, into memory."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime

# Bounds of the process: the newest messages of the most recently used numbers stay.
MESSAGES_PER_NUMBER_MAX = 100
NUMBERS_MAX = 100_000
WATCHER_MESSAGES_WAITING_MAX = 1_000
# Ten parts of 160 characters.
TEXT_CHARACTERS_MAX = 1_600
# GSM 03.40: an alphanumeric originating address.
SENDER_NAME_CHARACTERS_MAX = 11
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")


@dataclass(frozen=True, slots=True)
class Sms:
    """One delivered SMS."""

    sms_id: str
    phone: str
    text: str
    sender_name: str
    at: datetime


class SmsWatcherTooSlow(Exception):
    """The reader is too far behind; read the inbox and watch again."""


class SmsSimulator:
    """Inboxes by number. One event loop uses it; nothing is durable. `now` gives aware datetimes."""

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        self._now = now
        self._inboxes: dict[str, deque[Sms]] = {}
        self._watchers: dict[str, set[asyncio.Queue[Sms]]] = {}

    def deliver(self, phone: str, text: str, sender_name: str = "") -> Sms:
        """Put one SMS into the inbox. Raises ValueError (which names the field, not its value)."""
        check_phone(phone)
        if not 0 < len(text) <= TEXT_CHARACTERS_MAX:
            raise ValueError(f"text must have 1 to {TEXT_CHARACTERS_MAX} characters")
        if len(sender_name) > SENDER_NAME_CHARACTERS_MAX:
            raise ValueError(f"sender_name must have at most {SENDER_NAME_CHARACTERS_MAX} characters")
        sms = Sms(str(uuid.uuid4()), phone, text, sender_name, self._now())
        inbox = self._inboxes.pop(phone, None) or deque(maxlen=MESSAGES_PER_NUMBER_MAX)
        # Put back at the end: the first number is the one that has been silent longest.
        self._inboxes[phone] = inbox
        inbox.append(sms)
        if len(self._inboxes) > NUMBERS_MAX:
            del self._inboxes[next(iter(self._inboxes))]
        for watcher in self._watchers.get(phone, ()):
            # One place is kept free below for the sign that the watcher fell behind.
            if watcher.qsize() <= WATCHER_MESSAGES_WAITING_MAX:
                watcher.put_nowait(sms)
        return sms

    def inbox(self, phone: str) -> list[Sms]:
        """What this number received, oldest first. Raises ValueError on a number that is not E.164."""
        check_phone(phone)
        return list(self._inboxes.get(phone, ()))

    async def watch(self, phone: str) -> AsyncIterator[Sms]:
        """The inbox, then each SMS as it comes. Raises ValueError, SmsWatcherTooSlow."""
        queue: asyncio.Queue[Sms] = asyncio.Queue()
        watchers = self._watchers.setdefault(phone, set())
        watchers.add(queue)
        try:
            for sms in self.inbox(phone):
                yield sms
            while True:
                if queue.qsize() > WATCHER_MESSAGES_WAITING_MAX:
                    raise SmsWatcherTooSlow
                yield await queue.get()
        finally:
            watchers.discard(queue)
            if not watchers:
                self._watchers.pop(phone, None)


def check_phone(phone: str) -> None:
    """Raises ValueError when this is not E.164 with the plus sign."""
    if not _E164.fullmatch(phone):
        raise ValueError("phone must be E.164 with the plus sign, for example +380501234567")
