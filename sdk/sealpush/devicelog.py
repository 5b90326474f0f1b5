"""The log of a person's devices: layout, chain, what it says, and fingerprints. Pure; servers and phones share it.

The log of a subscriber is a hash chain of entries that are never changed. Numbers are big-endian:

    entry = "SPL1" | kind1 | flags1 | device_id16 | identity_public_key32 | at_ms8 [ | by_device_id16 | signature64 ]
    head0 = SHA-256("SPL1-start" | subscriber_id16)
    headN = SHA-256("SPL1-log" | headN-1 | entryN)

kind: 1 added, 2 removed, 3 vouched; only the last has what stands in brackets. Times are Unix milliseconds within 48 bits. flags bit 0, of
an added device: recovered, that is no device which was there before vouches for it. The head is the `device_list_version` that senders
see.

What a log may say is decided here once, for the server that writes it and for everybody who reads it (`DeviceLog.then()`):

- a device is added that is not in the list, removed that is; the first entry of a log adds a device that is not recovered, every later
  one that adds says `recovered`;
- a recovered device becomes vouched for by the signature of a device that is in the list and trusted itself: the first of the log, or
  vouched for. A device that nobody vouches for can vouch for nobody, so all trust in a log comes from its first device. The signature is
  over the head right after the entry that added the device: it counts for this addition in this history, and nowhere else.

A server that slips in a device cannot hide that from whoever reads the log on from where they knew it; what it can do is withhold the
log's end.
"""

import enum
import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Self

from sealpush.errors import DeviceLogBroken
from sealpush.ids import DeviceId, SubscriberId, check_id
from sealpush.keys import TIME_MS_MAX
from sealpush.model import moment
from sealpush.proofs import verify_proof, vouch_proof

# A number's codes are limited a day, and a registration adds two entries at most: nobody comes near it by living long.
ENTRIES_MAX: Final = 4096
FINGERPRINT_ROUNDS: Final = 5200  # the number in use for safety numbers; makes a search for a look-alike 5200 times dearer

_ENTRY: Final = struct.Struct(">4sBB16s32sQ")
_VOUCH: Final = struct.Struct(">16s64s")
_MAGIC: Final = b"SPL1"
_RECOVERED: Final = 1


class EntryKind(enum.IntEnum):
    """What happened to a device."""

    ADDED = 1
    REMOVED = 2
    VOUCHED = 3


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One change of a subscriber's devices. `by_device_id` and `signature` are of whoever vouches, None and empty in other kinds."""

    kind: EntryKind
    device_id: DeviceId
    identity_public_key: bytes
    at_ms: int
    recovered: bool = False
    by_device_id: DeviceId | None = None
    signature: bytes = b""

    def encode(self) -> bytes:
        """62 bytes, 142 of one that vouches. Raises ValueError for fields that do not belong to its kind."""
        if (self.kind is EntryKind.VOUCHED) is not (self.by_device_id is not None and len(self.signature) == 64):
            raise ValueError("who vouches, and the 64-byte signature, belong to entries that vouch, and to these alone")
        flags = _RECOVERED if self.recovered else 0
        entry = _ENTRY.pack(_MAGIC, self.kind, flags, self.device_id, self.identity_public_key, self.at_ms)
        return entry if self.by_device_id is None else entry + _VOUCH.pack(self.by_device_id, self.signature)

    @classmethod
    def decode(cls, entry: bytes) -> Self:
        """The entry in exactly these bytes; raises ValueError."""
        try:
            magic, kind, flags, device_id, identity_public_key, at_ms = _ENTRY.unpack(entry[: _ENTRY.size])
            vouch = _VOUCH.unpack(entry[_ENTRY.size :]) if kind == EntryKind.VOUCHED else (None, b"")
        except struct.error as e:
            raise ValueError("not an entry of a device log") from e
        if magic != _MAGIC or flags & ~_RECOVERED or at_ms > TIME_MS_MAX or (kind != EntryKind.VOUCHED and len(entry) != _ENTRY.size):
            raise ValueError("not an entry of a device log that this release knows")
        by_device_id, signature = vouch
        return cls(EntryKind(kind), DeviceId(device_id), identity_public_key, at_ms, bool(flags & _RECOVERED), by_device_id, signature)


def start_head(subscriber_id: SubscriberId) -> bytes:
    """The head of a log that has no entries yet."""
    return hashlib.sha256(b"SPL1-start" + subscriber_id).digest()


def next_head(head: bytes, entry: bytes) -> bytes:
    """The head after one more entry."""
    return hashlib.sha256(b"SPL1-log" + head + entry).digest()


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """A device that is in a list. `added_head` is the head right after the entry that added it: what a vouch is signed over."""

    device_id: DeviceId
    identity_public_key: bytes
    added_at_ms: int
    added_head: bytes
    vouched: bool


@dataclass(frozen=True, slots=True)
class DeviceLog:
    """How far a log was followed, and which devices are in the list there, oldest first."""

    seq: int
    head: bytes
    devices: Mapping[DeviceId, ListedDevice] = field(default_factory=dict)

    @classmethod
    def start(cls, subscriber_id: SubscriberId) -> Self:
        """A log without entries."""
        return cls(0, start_head(subscriber_id))

    @classmethod
    def read(cls, subscriber_id: SubscriberId, entries: Iterable[bytes]) -> Self:
        """The log with these entries from its first on. Raises DeviceLogBroken."""
        log = cls.start(subscriber_id)
        for entry in entries:
            log = log.then(entry)
        return log

    def then(self, entry: bytes) -> Self:
        """The log with one more entry. Raises DeviceLogBroken for one that this log cannot go on with."""
        try:
            said = LogEntry.decode(entry)
        except ValueError as e:
            raise DeviceLogBroken("an entry cannot be read; if the log is sound, a newer release of the app can") from e
        seq, head = self.seq + 1, next_head(self.head, entry)
        devices = dict(self.devices)
        listed = devices.get(said.device_id)
        match said.kind:
            case EntryKind.ADDED:
                if listed is not None or said.recovered is not (self.seq > 0):
                    raise DeviceLogBroken("a device is added that is there, or that hides that nobody vouches for it")
                devices[said.device_id] = ListedDevice(said.device_id, said.identity_public_key, said.at_ms, head, not said.recovered)
            case EntryKind.REMOVED:
                if listed is None or said.recovered or listed.identity_public_key != said.identity_public_key:
                    raise DeviceLogBroken("a device is removed that is not there")
                del devices[said.device_id]
            case EntryKind.VOUCHED:
                by = devices.get(said.by_device_id) if said.by_device_id is not None else None
                if listed is None or listed.vouched or said.recovered or listed.identity_public_key != said.identity_public_key:
                    raise DeviceLogBroken("a device is vouched for that is not there, or needs nobody to vouch for it")
                if by is None or not by.vouched:
                    raise DeviceLogBroken("a device vouches that is not there, or that nobody vouches for")
                proof = vouch_proof(listed.device_id, listed.identity_public_key, by.device_id, listed.added_head)
                if not verify_proof(by.identity_public_key, proof, said.signature):
                    raise DeviceLogBroken("a vouch is not signed by the device that it names")
                devices[said.device_id] = replace(listed, vouched=True)
        return type(self)(seq, head, devices)


class NoticeKind(enum.IntEnum):
    """What a person is to be told about the devices, and about this one."""

    ADDED = 1  # a device came, and nobody vouches for it: ask the person whether it is theirs
    VOUCHED = 2  # one of the person's other devices vouched for it
    REMOVED = 3
    LOG_BROKEN = 4  # the service tells another history than before: do not trust its list
    LOG_WITHHELD = 5  # messages come, and the log has not for days: there may be devices that nobody was told of
    RESTORED = 6  # this device works with a store out of a back-up: what was sealed to it since then may never open


@dataclass(frozen=True, slots=True)
class DeviceNotice:
    """Something that happened to the person's other devices, or to this one; kept until it is dismissed.

    `at_ms` is as the log says; of a notice about the log or this device, which names no device, when it was found. `number` rises, 0
    before it is stored.
    """

    kind: NoticeKind
    at_ms: int
    device_id: DeviceId | None = None
    identity_public_key: bytes = b""
    number: int = 0

    @property
    def at(self) -> datetime:
        """When it happened."""
        return moment(self.at_ms)

    @property
    def fingerprint(self) -> str:
        """Of the device, to compare with what it shows itself; empty where no device is concerned. Takes milliseconds."""
        return "" if self.device_id is None else fingerprint([(self.device_id, self.identity_public_key)])


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device of a person. `vouched`: the first of its log, or vouched for by one that was; else the service alone says whose it is."""

    device_id: DeviceId
    identity_public_key: bytes
    added_at: datetime
    vouched: bool
    is_this: bool = False

    @property
    def fingerprint(self) -> str:
        """60 digits to compare with what the device shows itself. Takes milliseconds."""
        return fingerprint([(self.device_id, self.identity_public_key)])


_NOTICE_OF: Final = {
    EntryKind.ADDED: NoticeKind.ADDED,
    EntryKind.REMOVED: NoticeKind.REMOVED,
    EntryKind.VOUCHED: NoticeKind.VOUCHED,
}


def notices_of(entries: Iterable[bytes], own: DeviceId, own_key: bytes) -> list[DeviceNotice]:
    """What a device tells of entries that came: nothing of itself, and not what it vouched for.

    Itself is its id under its own identity key: somebody else's key under its id is told like any other device.
    """
    said = [LogEntry.decode(entry) for entry in entries]
    return [
        DeviceNotice(_NOTICE_OF[each.kind], each.at_ms, each.device_id, each.identity_public_key)
        for each in said
        if (each.device_id, each.identity_public_key) != (own, own_key) and each.by_device_id != own
    ]


def new_to(own: DeviceId, own_key: bytes, entries: Sequence[bytes]) -> Sequence[bytes]:
    """What of a whole log came after the device itself; all of it where the device is not in it under its own identity key."""
    said = map(LogEntry.decode, entries)
    itself = (EntryKind.ADDED, own, own_key)
    added = [n for n, each in enumerate(said) if (each.kind, each.device_id, each.identity_public_key) == itself]
    return entries[added[-1] + 1 :] if added else entries


def notices_of_another(before: DeviceLog, after: DeviceLog, own: DeviceId, own_key: bytes, now_ms: int) -> list[DeviceNotice]:
    """What a device tells when the service has another history than the one that was known: that, and how the lists differ."""
    found = [DeviceNotice(NoticeKind.LOG_BROKEN, now_ms)]
    for device_id, each in before.devices.items():
        now = after.devices.get(device_id)
        if device_id != own and (now is None or now.identity_public_key != each.identity_public_key):
            found.append(DeviceNotice(NoticeKind.REMOVED, now_ms, device_id, each.identity_public_key))
    for device_id, each in after.devices.items():
        known = before.devices.get(device_id)
        is_own = (device_id, each.identity_public_key) == (own, own_key)
        if not is_own and (known is None or known.identity_public_key != each.identity_public_key):
            found.append(DeviceNotice(NoticeKind.ADDED, each.added_at_ms, device_id, each.identity_public_key))
    return found


def fingerprint(devices: Iterable[tuple[DeviceId, bytes]]) -> str:
    """60 digits, in 12 groups of 5, that stand for these devices and their identity keys; the order given does not matter.

        h = SHA-512("SPF1" | 1 | pairs), pairs = device_id16 | identity_public_key32 of each device, sorted by these bytes
        5200 hashes in all: h = SHA-512(h), 5199 times; then 12 times the next 5 bytes of h, big-endian, modulo 100,000

    Raises ValueError for no device, for one given twice, and for lengths that are none of an id or key.
    """
    pairs = sorted(devices)
    if not pairs or len({device_id for device_id, _ in pairs}) != len(pairs):
        raise ValueError("a fingerprint is of at least one device, and of each device once")
    if any(len(identity_public_key) != 32 for _, identity_public_key in pairs):
        raise ValueError("an identity public key is 32 bytes")
    digest = hashlib.sha512(b"SPF1\x01" + b"".join(check_id(device_id, "device_id") + key for device_id, key in pairs)).digest()
    for _ in range(FINGERPRINT_ROUNDS - 1):
        digest = hashlib.sha512(digest).digest()
    return " ".join(f"{int.from_bytes(digest[start : start + 5], 'big') % 100_000:05}" for start in range(0, 60, 5))
