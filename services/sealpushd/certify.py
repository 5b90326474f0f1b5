"""Sender entries as they are certified, for whoever has a root: `sealpush root` and the demo of `sealpush up`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from sealpush.ids import SenderId, uuid7
from sealpush.keys import DAY_MS, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry

# A phone whose clock is slow must not refuse a new entry.
_SKEW_MS: Final = 3_600_000


def sender_entry(sender_id: SenderId, display_name: str, modes: SenderMode, public_keys: Sequence[bytes], *, days: int) -> SenderEntry:
    """The entry of a sender, good from now on for so many days. Raises ValueError for what no entry may hold."""
    return _entry(sender_id, display_name, EntryRole.SENDER, modes, public_keys, days)


def platform_entry(*public_keys: bytes, days: int) -> SenderEntry:
    """The entry of the platform's sealing key, or of the old and the new one, good from now on for so many days.

    Raises ValueError for what is no key.
    """
    return _entry(SenderId(uuid7()), "Sealpush", EntryRole.PLATFORM, SenderMode.SERVER, public_keys, days)


def certify_sender(
    root: RootKey, sender_id: SenderId, display_name: str, modes: SenderMode, public_keys: Sequence[bytes], *, days: int
) -> bytes:
    """`sender_entry()`, signed."""
    return sign_sender_entry(root, sender_entry(sender_id, display_name, modes, public_keys, days=days))


def certify_platform(root: RootKey, public_key: bytes, *, days: int) -> bytes:
    """`platform_entry()`, signed."""
    return sign_sender_entry(root, platform_entry(public_key, days=days))


def now_ms() -> int:
    """Unix milliseconds by this machine's clock; serials of entries are such times, so that they rise by themselves."""
    return time.time_ns() // 1_000_000


def _entry(
    sender_id: SenderId, display_name: str, role: EntryRole, modes: SenderMode, public_keys: Sequence[bytes], days: int
) -> SenderEntry:
    serial = now_ms()
    since, until = serial - _SKEW_MS, serial + days * DAY_MS
    return SenderEntry(
        sender_id=sender_id,
        display_name=display_name,
        modes=modes,
        keys=tuple(EntryKey(public_key, since, until) for public_key in public_keys),
        not_before_ms=since,
        not_after_ms=until,
        serial=serial,
        role=role,
    )
