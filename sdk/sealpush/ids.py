"""Identifiers: 16 raw bytes in memory and on the wire, UUID text only towards people.

Ids made here are UUIDv7 (RFC 9562, section 5.7): they sort by creation time. They are names, not secrets.
"""

import os
import re
import threading
import time
from typing import NewType

MessageId = NewType("MessageId", bytes)
ContentId = NewType("ContentId", bytes)
SenderId = NewType("SenderId", bytes)
DeviceId = NewType("DeviceId", bytes)
SubscriberId = NewType("SubscriberId", bytes)
RegistrationId = NewType("RegistrationId", bytes)
WakeUpId = NewType("WakeUpId", bytes)
OrderId = NewType("OrderId", bytes)
GroupId = NewType("GroupId", bytes)
SenderKeyId = NewType("SenderKeyId", bytes)  # 8 bytes
RecipientRef = NewType("RecipientRef", bytes)  # 32 bytes
RequestId = NewType("RequestId", str)  # chosen by the caller
AppId = NewType("AppId", str)

ID_BYTES = 16

_APP_ID = re.compile(r"[a-z0-9.-]{1,64}", re.ASCII)
_UNIX_MS_MAX = (1 << 48) - 1
_COUNTER_BITS = 74  # rand_a (12) and rand_b (62) taken together
_TEXT = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


# A clock that is set back by more had been wrong: ids that went on from there would carry a wrong time until the present has come so far.
_BACK_MS_MAX = 60_000


class _Uuid7:
    """Makes rising UUIDv7 (RFC 9562, section 6.2, method 2: the random part is a counter within a millisecond)."""

    __slots__ = ("_counter", "_lock", "_unix_ms")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh, also in a forked child, whose lock may have been copied while held."""
        self._lock = threading.Lock()
        self._unix_ms = -1
        self._counter = 0

    def next(self, unix_ms: int, *, never_back: bool) -> bytes:
        with self._lock:
            if never_back and self._unix_ms - _BACK_MS_MAX <= unix_ms < self._unix_ms:
                unix_ms = self._unix_ms  # the wall clock was set back a little: order matters more
            if unix_ms == self._unix_ms:
                self._counter += 1 + int.from_bytes(os.urandom(4), "big")
            else:
                # The top bit starts clear, so the counter has room for 2**41 further ids in this millisecond.
                self._counter = int.from_bytes(os.urandom(10), "big") >> (80 - _COUNTER_BITS + 1)
                self._unix_ms = unix_ms
            counter = self._counter
        high = counter >> 62
        low = counter & ((1 << 62) - 1)
        return (unix_ms << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low).to_bytes(16, "big")


_by_clock = _Uuid7()
_by_caller = _Uuid7()
os.register_at_fork(after_in_child=_by_clock.forget)
os.register_at_fork(after_in_child=_by_caller.forget)


def uuid7(now_ms: int | None = None) -> bytes:
    """A new UUIDv7 as 16 bytes, larger than the one before it in this process.

    `now_ms` is Unix time in milliseconds; without it the wall clock is read, and an id never sorts before an earlier
    one even if that clock is set back by up to a minute. With it the id carries exactly that time, and consecutive calls with the same
    time rise. Thread-safe. Raises ValueError for a time that 48 bits cannot hold.
    """
    if now_ms is None:
        return _by_clock.next(time.time_ns() // 1_000_000, never_back=True)
    if not 0 <= now_ms <= _UNIX_MS_MAX:
        raise ValueError("now_ms must be Unix milliseconds within 48 bits; was it given in another unit?")
    return _by_caller.next(now_ms, never_back=False)


def uuid7_ms(value: bytes) -> int:
    """The Unix time in milliseconds that a UUIDv7 carries. Raises ValueError for anything else."""
    if len(value) != ID_BYTES or value[6] >> 4 != 7 or value[8] >> 6 != 0b10:
        raise ValueError("not a UUIDv7; only ids made by uuid7() carry a time")
    return int.from_bytes(value[:6], "big")


def uuid_text(value: bytes) -> str:
    """The id as people read it: lower-case hex in groups of 8-4-4-4-12."""
    digits = check_id(value, "id").hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def parse_uuid(text: str) -> bytes:
    """The 16 bytes of a UUID in its 36-character text form, either case. Raises ValueError for any other spelling."""
    if _TEXT.fullmatch(text) is None:
        raise ValueError("not a UUID; write it as 8-4-4-4-12 hex digits, such as 018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2a")
    return bytes.fromhex(text.replace("-", ""))


def check_id(value: bytes, name: str) -> bytes:
    """The same value, known to be 16 bytes. Raises ValueError that names the field."""
    if len(value) != ID_BYTES:
        raise ValueError(f"{name} must be {ID_BYTES} raw bytes, not {len(value)}; parse_uuid() turns text into bytes")
    return value


def is_app_id(text: str) -> bool:
    """Whether the text can be an app id at all: 1 to 64 characters of a-z 0-9 - ."""
    return _APP_ID.fullmatch(text) is not None
