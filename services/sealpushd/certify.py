"""Sender entries signed by the root, for whoever sets senders up: `sealpush accounts` and the demo of `sealpush up`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from sealpush.ids import SenderId, uuid7
from sealpush.keys import DAY_MS, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry

# A phone whose clock is slow must not refuse a new entry.
_SKEW_MS: Final = 3_600_000


def certify_sender(
    root: RootKey, sender_id: SenderId, display_name: str, modes: SenderMode, public_keys: Sequence[bytes], *, days: int
) -> bytes:
    """The signed entry of a sender, good from now on for so many days. Raises ValueError for what no entry may hold."""
    return _certify(root, sender_id, display_name, EntryRole.SENDER, modes, public_keys, days)


def certify_platform(root: RootKey, public_key: bytes, *, days: int) -> bytes:
    """The signed entry of the platform's sealing key, good from now on for so many days."""
    return _certify(root, SenderId(uuid7()), "Sealpush", EntryRole.PLATFORM, SenderMode.SERVER, [public_key], days)


def _certify(
    root: RootKey, sender_id: SenderId, display_name: str, role: EntryRole, modes: SenderMode, public_keys: Sequence[bytes], days: int
) -> bytes:
    now_ms = time.time_ns() // 1_000_000
    since, until = now_ms - _SKEW_MS, now_ms + days * DAY_MS
    entry = SenderEntry(
        sender_id=sender_id,
        display_name=display_name,
        modes=modes,
        keys=tuple(EntryKey(public_key, since, until) for public_key in public_keys),
        not_before_ms=since,
        not_after_ms=until,
        # Rises by itself: a phone never goes back to an older entry.
        serial=now_ms,
        role=role,
    )
    return sign_sender_entry(root, entry)
