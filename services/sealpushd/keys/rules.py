"""Decisions about keys: the device log, which prekeys are taken, what is sealed to, whether stanzas fit. Pure.

The layout of the log, and what it may say, stand in sealpush/devicelog.py: phones read by the same rules.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Final, Self

from sealpush import envelope
from sealpush.devicelog import DeviceLog, EntryKind, LogEntry, next_head
from sealpush.errors import ContentTooLarge, DeviceLogBroken, KeyRefused
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, SubscriberId
from sealpush.keys import (
    MESSAGE_LIFETIME_MS_MAX,
    ONE_TIME_PREKEYS_BATCH,
    ONE_TIME_PREKEYS_REFILL_BELOW,
    PREKEY_RETENTION_MS,
    TIME_MS_MAX,
    ContentSigningKey,
    PrekeyKind,
    SignedPrekey,
    verify_prekey,
)
from sealpush.suites import SUITES
from sealpushd.platform.errors import FailedPrecondition, InvalidRequest, NotFound

# A refill comes when fewer than 20 are left and brings 100; an upload repeated under a new counter still fits.
ONE_TIME_PREKEYS_MAX: Final = 2 * ONE_TIME_PREKEYS_BATCH
# A device keeps the private half of a replaced prekey for 35 days and a message lives up to 28: what was sealed within this time
# after the replacement can surely be opened until its end.
SUPERSEDED_GRACE_MS: Final = PREKEY_RETENTION_MS - MESSAGE_LIFETIME_MS_MAX
# A sender may hold a prekey for a week before it seals, and what it sealed may be published, also again, until the envelope ends, 28 days
# later: until then it must be known whose the key is.
HANDOUT_LIFETIME_MS: Final = PREKEY_RETENTION_MS


@dataclass(frozen=True, slots=True)
class Device:
    """A device as it is known here."""

    device_id: DeviceId
    subscriber_id: SubscriberId
    identity_public_key: bytes
    min_suite: int
    removed: bool


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device to enter into its subscriber's list, with the prekey it can be sealed to at once and the lowest suite it accepts."""

    subscriber_id: SubscriberId
    device_id: DeviceId
    identity_public_key: bytes
    signed_prekey: SignedPrekey
    min_suite: int


@dataclass(frozen=True, slots=True)
class StoredPrekey:
    """A signed prekey as it is kept; `superseded_at_ms` is None for the current one."""

    prekey: SignedPrekey
    superseded_at_ms: int | None


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """A device that is in a list, and its signed prekeys: the current one and perhaps the one before."""

    device: Device
    prekeys: tuple[StoredPrekey, ...]
    added_at_ms: int = 0
    vouched: bool = False

    @property
    def current(self) -> SignedPrekey | None:
        return next((each.prekey for each in self.prekeys if each.superseded_at_ms is None), None)


@dataclass(frozen=True, slots=True)
class ListEnd:
    """Where the log of a subscriber ends."""

    subscriber_id: SubscriberId
    seq: int
    head: bytes
    device_added: bool = False


@dataclass(frozen=True, slots=True)
class Append:
    subscriber_id: SubscriberId
    seq: int
    entry: bytes
    head: bytes


class _Logs:
    """Logs being appended to; starts from their ends."""

    def __init__(self, ends: Mapping[SubscriberId, ListEnd]) -> None:
        self._ends = dict(ends)
        self.appends: list[Append] = []

    def append(self, subscriber_id: SubscriberId, entry: LogEntry) -> None:
        end = self._ends[subscriber_id]
        encoded = entry.encode()
        head, seq = next_head(end.head, encoded), end.seq + 1
        added = end.device_added or entry.kind is EntryKind.ADDED
        self._ends[subscriber_id] = ListEnd(subscriber_id, seq, head, added)
        self.appends.append(Append(subscriber_id, seq, encoded, head))

    def is_empty(self, subscriber_id: SubscriberId) -> bool:
        return self._ends[subscriber_id].seq == 0

    @property
    def moved_ends(self) -> list[ListEnd]:
        return [self._ends[subscriber_id] for subscriber_id in dict.fromkeys(each.subscriber_id for each in self.appends)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch of devices changes."""

    # A text a device that was asked for, empty where nothing is against it.
    refusals: list[str] = field(default_factory=list)
    placed: Mapping[DeviceId, SubscriberId] = field(default_factory=dict)
    # Of those placed.
    recovered: Set[DeviceId] = frozenset()
    vouched: Sequence[DeviceId] = ()
    removed: Sequence[DeviceId] = ()
    prekeys: Mapping[DeviceId, SignedPrekey] = field(default_factory=dict)
    # Devices that accept no lower suite than this any more. All that was signed for a lower one goes.
    raised: Mapping[DeviceId, int] = field(default_factory=dict)
    appends: Sequence[Append] = ()
    ends: Sequence[ListEnd] = ()


def plan_put(
    devices: Sequence[NewDevice],
    known: Mapping[DeviceId, Device],
    prekeys: Mapping[DeviceId, DeviceKeys],
    ends: Mapping[SubscriberId, ListEnd],
    now_ms: int,
) -> Plan:
    """What entering these devices, in this order, means. Entering one that is there already means nothing.

    `known` holds a row for each of the devices, one that is `removed` for those that are new. `ends` holds the logs of their new and
    present subscribers. A device may come from another subscriber, whose log then says that it left.
    """
    logs = _Logs(ends)
    known = dict(known)
    placed: dict[DeviceId, SubscriberId] = {}
    recovered: set[DeviceId] = set()
    taken: dict[DeviceId, SignedPrekey] = {}
    raised: dict[DeviceId, int] = {}
    refusals = []
    for new in devices:
        device = known[new.device_id]
        refusal = _refuse_device(new, device, now_ms)
        keys = prekeys.get(new.device_id)
        held = [each.prekey for each in keys.prekeys] if keys is not None else []
        if new.device_id in taken:
            held.append(taken[new.device_id])
        refusal = refusal or _refuse_reuse(new.signed_prekey, held)
        refusals.append(refusal)
        if refusal:
            continue
        if device.removed or device.subscriber_id != new.subscriber_id:
            if not device.removed:
                logs.append(device.subscriber_id, LogEntry(EntryKind.REMOVED, device.device_id, device.identity_public_key, now_ms))
            # Nothing in a registration is signed by a device that was there before: only the first needs nobody to vouch for it.
            is_recovered = not logs.is_empty(new.subscriber_id)
            logs.append(new.subscriber_id, LogEntry(EntryKind.ADDED, device.device_id, device.identity_public_key, now_ms, is_recovered))
            placed[device.device_id] = new.subscriber_id
            recovered.discard(device.device_id)
            if is_recovered:
                recovered.add(device.device_id)
            known[device.device_id] = replace(device, subscriber_id=new.subscriber_id, removed=False)
        if new.min_suite > device.min_suite:
            raised[device.device_id] = new.min_suite
            known[device.device_id] = replace(known[device.device_id], min_suite=new.min_suite)
        # A registration that is repeated late must not bring back a prekey that was replaced since; one that raises the lowest suite
        # brings the only prekey that says so.
        if new.min_suite > device.min_suite or all(new.signed_prekey.created_at_ms > each.created_at_ms for each in held):
            taken[device.device_id] = new.signed_prekey
    return Plan(
        refusals,
        placed=placed,
        recovered=recovered,
        prekeys=taken,
        raised=raised,
        appends=logs.appends,
        ends=logs.moved_ends,
    )


def plan_remove(
    devices: Sequence[tuple[SubscriberId, DeviceId]],
    known: Mapping[DeviceId, Device],
    ends: Mapping[SubscriberId, ListEnd],
    now_ms: int,
) -> Plan:
    """What taking these devices out of these subscribers' lists means. One that is not there (any more) means nothing."""
    logs = _Logs(ends)
    removed: dict[DeviceId, None] = {}
    for subscriber_id, device_id in devices:
        device = known.get(device_id)
        if device is None or device.removed or device.subscriber_id != subscriber_id or device_id in removed:
            continue
        logs.append(subscriber_id, LogEntry(EntryKind.REMOVED, device_id, device.identity_public_key, now_ms))
        removed[device_id] = None
    return Plan(removed=list(removed), appends=logs.appends, ends=logs.moved_ends)


def plan_vouch(
    subscriber_id: SubscriberId, log: DeviceLog, device_id: DeviceId, by_device_id: DeviceId, signature: bytes, now_ms: int
) -> Plan:
    """What it means that one device of this log vouches for another. For a device that needs it no more it means nothing.

    Raises NotFound for a device that is not in the list, FailedPrecondition for one that may not vouch, InvalidRequest for a signature
    over something else.
    """
    by, listed = log.devices.get(by_device_id), log.devices.get(device_id)
    if listed is None:
        raise NotFound("no such device in this list; read the device log again")
    if by is None or not by.vouched:
        raise FailedPrecondition("nobody vouches for this device itself, so it cannot vouch for others; use the device that was first")
    if listed.vouched:
        return Plan()
    entry = LogEntry(EntryKind.VOUCHED, device_id, listed.identity_public_key, now_ms, by_device_id=by_device_id, signature=signature)
    try:
        after = log.then(entry.encode())
    except (ValueError, DeviceLogBroken) as e:
        raise InvalidRequest("the vouch is not the calling device's signature over this device and its entry", field="signature") from e
    end = ListEnd(subscriber_id, after.seq, after.head)
    return Plan(vouched=(device_id,), appends=(Append(subscriber_id, after.seq, entry.encode(), after.head),), ends=(end,))


def _refuse_device(new: NewDevice, device: Device, now_ms: int) -> str:
    if not hmac.compare_digest(new.identity_public_key, device.identity_public_key):
        return "the device id belongs to another identity key; register with a new device id"
    if new.signed_prekey.kind is not PrekeyKind.SIGNED:
        return "signed_prekey is of another kind"
    if new.min_suite < device.min_suite:
        return f"min_suite is {device.min_suite} and never goes down; register with a prekey of that suite"
    return refuse_prekey(new.signed_prekey, device, now_ms, new.min_suite)


def _refuse_reuse(prekey: SignedPrekey, held: Iterable[SignedPrekey]) -> str:
    if any(each.prekey_id == prekey.prekey_id and each != prekey for each in held):
        return f"prekey id {prekey.prekey_id} was used for another prekey; take a new one"
    return ""


def refuse_prekey(prekey: SignedPrekey, device: Device, now_ms: int, min_suite: int) -> str:
    """Why this prekey of a device cannot be taken; empty: it can."""
    if prekey.suite not in SUITES:
        # Taking it would leave the device without a prekey that this server can seal to.
        return f"prekeys of suite {prekey.suite} are not supported here yet; use one of {sorted(SUITES)}"
    try:
        verify_prekey(
            prekey,
            device_id=device.device_id,
            identity_public_key=device.identity_public_key,
            now_ms=now_ms,
            min_suite=min_suite,
        )
    except KeyRefused as e:
        return str(e)
    return ""


@dataclass(frozen=True, slots=True)
class Upload:
    """What a device uploads. `min_suite` 0 leaves it as it is; with `forget_former` nothing counts that it uploaded before."""

    prekeys: tuple[SignedPrekey, ...]
    min_suite: int
    forget_former: bool = False

    @property
    def signed(self) -> SignedPrekey | None:
        return next((each for each in self.prekeys if each.kind is PrekeyKind.SIGNED), None)

    @property
    def one_time(self) -> list[SignedPrekey]:
        return [each for each in self.prekeys if each.kind is PrekeyKind.ONE_TIME]


def check_upload(upload: Upload, device: Device, now_ms: int) -> int:
    """The device's lowest suite after this upload; raises InvalidRequest for anything in it that cannot be taken."""
    min_suite = upload.min_suite or device.min_suite
    if min_suite < device.min_suite:
        raise InvalidRequest(f"min_suite is {device.min_suite} and never goes down", field="change.min_suite")
    if min_suite > max(SUITES):
        raise InvalidRequest(f"suites up to {max(SUITES)} are supported here", field="change.min_suite")
    if min_suite > device.min_suite and upload.signed is None:
        raise InvalidRequest("a device that raises min_suite sends a new signed prekey along", field="change.prekeys")
    if upload.forget_former and upload.signed is None:
        raise InvalidRequest("a device that has its former prekeys forgotten sends a signed prekey along", field="change.prekeys")
    if len(upload.prekeys) - len(upload.one_time) > 1 or len(upload.one_time) > ONE_TIME_PREKEYS_BATCH:
        raise InvalidRequest(
            f"an upload holds at most one signed prekey and {ONE_TIME_PREKEYS_BATCH} one-time prekeys", field="change.prekeys"
        )
    if len({(each.kind, each.prekey_id) for each in upload.prekeys}) != len(upload.prekeys):
        raise InvalidRequest("a prekey id stands twice in the upload", field="change.prekeys")
    for n, prekey in enumerate(upload.prekeys):
        refusal = refuse_prekey(prekey, device, now_ms, min_suite)
        if refusal:
            raise InvalidRequest(refusal, field=f"change.prekeys[{n}]")
    return min_suite


def replaces(prekey: SignedPrekey, held: Sequence[SignedPrekey]) -> bool:
    """Whether an uploaded signed prekey becomes the current one: not if it is held already.

    Raises InvalidRequest when its id was used for another.
    """
    refusal = _refuse_reuse(prekey, held)
    if refusal:
        raise InvalidRequest(refusal, field="change.prekeys")
    return prekey not in held


# A record of one key in the blob of its suite.
_ONE_TIME_RECORD: Final = {suite_id: struct.Struct(f">IQQ{suite.public_bytes}s64s") for suite_id, suite in SUITES.items()}


def record_bytes(suite: int) -> int:
    """What one key of a suite takes in its blob."""
    return _ONE_TIME_RECORD[suite].size


def to_record(prekey: SignedPrekey) -> bytes:
    """A one-time prekey as it is kept."""
    return _ONE_TIME_RECORD[prekey.suite].pack(
        prekey.prekey_id, prekey.created_at_ms, prekey.expires_at_ms, prekey.public_key, prekey.signature
    )


def from_record(suite: int, record: bytes) -> SignedPrekey:
    """The one-time prekey in a record."""
    prekey_id, created_at_ms, expires_at_ms, public_key, signature = _ONE_TIME_RECORD[suite].unpack(record)
    return SignedPrekey(suite, prekey_id, PrekeyKind.ONE_TIME, public_key, created_at_ms, expires_at_ms, signature)


@dataclass(frozen=True, slots=True)
class OneTimePrekeys:
    """A device's one-time prekeys of one suite; the columns of the table.

    With `more`, the blob is a window from the next key on, and others follow: enough for taking keys, not for what needs them all.
    """

    suite: int
    first_index: int
    next_index: int
    blob: bytes = field(repr=False)
    more: bool = False

    def _records(self, index: int) -> Iterator[SignedPrekey]:
        """From this index on."""
        size = record_bytes(self.suite)
        for start in range((index - self.first_index) * size, len(self.blob), size):
            yield from_record(self.suite, self.blob[start : start + size])

    def _unpassed(self) -> Iterator[SignedPrekey]:
        """From the next index on."""
        return self._records(self.next_index)

    @property
    def all(self) -> list[SignedPrekey]:
        """Of all keys in the blob, also those that were handed out or have expired."""
        return list(self._records(self.first_index))

    def left(self, now_ms: int) -> list[SignedPrekey]:
        """Those that were not handed out and have not expired, oldest first."""
        return [each for each in self._unpassed() if each.expires_at_ms > now_ms]

    def taken(self, count: int, now_ms: int) -> tuple[list[SignedPrekey], Self]:
        """The next keys, as many as asked for if they are here, and the stock without them. What has expired is passed over for good."""
        given: list[SignedPrekey] = []
        next_index = self.next_index
        for each in self._unpassed():
            if each.expires_at_ms > now_ms:
                if len(given) == count:
                    return given, replace(self, next_index=next_index)
                given.append(each)
            next_index += 1
        if self.more:
            return given, replace(self, next_index=next_index)
        # Nothing is left: the blob goes.
        return given, replace(self, first_index=next_index, next_index=next_index, blob=b"")

    def refilled(self, added: Sequence[SignedPrekey], now_ms: int, handed_out: Set[int] = frozenset()) -> Self:
        """With more keys at the end, and without what was handed out or expired. Raises InvalidRequest if that is too many.

        `handed_out` holds ids of those added that somebody has got already: an upload is repeated when its answer was lost.
        """
        left = self.left(now_ms)
        added = [each for each in added if each.prekey_id not in handed_out]
        for each in added:
            refusal = _refuse_reuse(each, left)
            if refusal:
                raise InvalidRequest(refusal, field="change.prekeys")
        keys = list(dict.fromkeys([*left, *added]))
        if len(keys) > ONE_TIME_PREKEYS_MAX:
            raise InvalidRequest(
                f"{len(left)} one-time prekeys are left, and at most {ONE_TIME_PREKEYS_MAX} are kept; upload fewer",
                field="change.prekeys",
            )
        return type(self)(self.suite, self.next_index, self.next_index, b"".join(map(to_record, keys)))


# A device refills when fewer than this are left: no more of an old batch have expired in front of a newer one, as a rule.
WINDOW_SPARE: Final = ONE_TIME_PREKEYS_REFILL_BELOW


# Of one sender's handout: the request and the device.
HandoutName = tuple[str, DeviceId]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A one-time prekey to hand out: of this device, in the suite of its signed prekey and for its lowest suite, for a sender's request."""

    request_id: str
    device_id: DeviceId
    suite: int
    min_suite: int

    @property
    def name(self) -> HandoutName:
        return self.request_id, self.device_id


@dataclass(frozen=True, slots=True)
class HandoutPlan:
    """What a sender gets, and the stocks that it is taken from."""

    given: Mapping[HandoutName, SignedPrekey]
    stocks: Mapping[DeviceId, OneTimePrekeys]


def plan_handouts(
    wanted: Iterable[Wanted],
    stocks: Mapping[DeviceId, OneTimePrekeys],
    handed_out: Mapping[DeviceId, int],
    allowed: int,
    now_ms: int,
) -> HandoutPlan:
    """A key each for what is wanted and was not given before, as far as stocks and the limit go; the rest gets none.

    `handed_out` is how many of a device's keys this sender got lately; it gets `allowed` in all.
    """
    by_device: dict[DeviceId, dict[HandoutName, None]] = {}
    for each in wanted:
        by_device.setdefault(each.device_id, {})[each.name] = None
    given: dict[HandoutName, SignedPrekey] = {}
    moved: dict[DeviceId, OneTimePrekeys] = {}
    for device_id, names in by_device.items():
        stock = stocks.get(device_id)
        if stock is None:
            continue
        prekeys, after = stock.taken(max(0, min(len(names), allowed - handed_out.get(device_id, 0))), now_ms)
        given.update(zip(names, prekeys, strict=False))
        if after != stock:
            moved[device_id] = after
    return HandoutPlan(given, moved)


@dataclass(frozen=True, slots=True)
class SealingKey:
    """What sealing needs of a device. Its signature was checked when it came, and nobody else writes where it is kept."""

    subscriber_id: SubscriberId
    added_at_ms: int
    expires_at_ms: int
    recipient: envelope.Recipient


@dataclass(frozen=True, slots=True)
class SealItem:
    """A content to seal for some devices of one subscriber."""

    sender_id: SenderId
    subscriber_id: SubscriberId
    device_ids: tuple[DeviceId, ...]
    content: bytes = field(repr=False)
    created_at_ms: int
    expires_at_ms: int
    # 0: however new they are.
    added_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class TooNew:
    """Devices that came after a message's bound, and when the newest of them did."""

    device_ids: tuple[DeviceId, ...]
    changed_at_ms: int


def _too_new(added: Iterable[tuple[DeviceId, int]], added_until_ms: int) -> TooNew | None:
    """Those of a recipient's devices that were added after the bound; None: there are none, or no bound (0)."""
    found = {device_id: at_ms for device_id, at_ms in added if at_ms > added_until_ms} if added_until_ms else {}
    return TooNew(tuple(found), max(found.values())) if found else None


@dataclass(frozen=True, slots=True)
class Sealed:
    envelope: envelope.Envelope
    devices_without_prekey: tuple[DeviceId, ...]


def seal(
    item: SealItem,
    keys: Mapping[DeviceId, SealingKey],
    signing_key: ContentSigningKey,
    content_id: ContentId,
    recipient_ref: RecipientRef,
    now_ms: int,
) -> Sealed | TooNew:
    """The content sealed for those of its devices that have a prekey, and the others. Raises ValueError, ContentTooLarge.

    A device that is not the subscriber's (any more) counts as one without a prekey. Nothing is sealed where one is too new for the item.
    """
    own = ((each, keys[each].added_at_ms) for each in item.device_ids if each in keys and keys[each].subscriber_id == item.subscriber_id)
    newcomers = _too_new(own, item.added_until_ms)
    if newcomers is not None:
        return newcomers
    recipients = []
    without = []
    for device_id in dict.fromkeys(item.device_ids):
        key = keys.get(device_id)
        if key is None or key.subscriber_id != item.subscriber_id or key.expires_at_ms <= now_ms:
            without.append(device_id)
        else:
            recipients.append(key.recipient)
    header = envelope.Header(
        content_id=content_id,
        sender_id=item.sender_id,
        sender_key_id=signing_key.key_id,
        recipient_ref=recipient_ref,
        created_at_ms=item.created_at_ms,
        expires_at_ms=item.expires_at_ms,
        flags=envelope.FLAG_SERVER_SEALED,
    )
    return Sealed(envelope.seal(item.content, header, recipients, signing_key), tuple(without))


def check_seal_item(item: SealItem) -> None:
    """Raises ContentTooLarge or ValueError where sealing would, before any work is done."""
    if len(item.content) > envelope.CONTENT_BYTES_MAX:
        raise ContentTooLarge(f"content has {len(item.content)} bytes; at most {envelope.CONTENT_BYTES_MAX} can be sealed")
    if len(item.device_ids) > envelope.STANZAS_MAX:
        raise ValueError(f"an envelope holds at most {envelope.STANZAS_MAX} devices")
    if not 0 <= item.created_at_ms < item.expires_at_ms <= TIME_MS_MAX:
        raise ValueError("expires_at_ms must be later than created_at_ms, both Unix milliseconds")
    if item.expires_at_ms - item.created_at_ms > MESSAGE_LIFETIME_MS_MAX:
        raise ValueError("a message lives at most 28 days")


@dataclass(frozen=True, slots=True)
class StanzaKey:
    """What a stanza says it was sealed to; `kind` as on the wire."""

    device_id: DeviceId
    suite: int
    prekey_id: int
    kind: int


@dataclass(frozen=True, slots=True)
class StanzaCheck:
    sender_id: SenderId
    subscriber_id: SubscriberId
    device_ids: tuple[DeviceId, ...]
    stanzas: tuple[StanzaKey, ...]
    recipient_ref: bytes
    # 0: however new they are.
    added_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class StanzaVerdict:
    """All empty and None: the envelope fits."""

    missing: tuple[DeviceId, ...] = ()
    surplus: tuple[DeviceId, ...] = ()
    stale: tuple[DeviceId, ...] = ()
    too_new: TooNew | None = None


def usable(keys: DeviceKeys | None, subscriber_id: SubscriberId, now_ms: int) -> SignedPrekey | None:
    """The signed prekey that senders seal to now, if the device is this subscriber's and has one."""
    if keys is None or keys.device.subscriber_id != subscriber_id or keys.current is None:
        return None
    return keys.current if keys.current.expires_at_ms > now_ms else None


def fitting(counts: Sequence[int], most: int) -> int:
    """How many from the beginning fit together into `most`, the first in any case."""
    total = 0
    for n, count in enumerate(counts):
        total += count
        if total > most and n > 0:
            return n
    return len(counts)


@dataclass(frozen=True, slots=True)
class Handout:
    """Who got a one-time prekey, and until when both the key and the handout are good."""

    sender_id: SenderId
    expires_at_ms: int


def one_time(stanzas: Iterable[StanzaKey]) -> list[StanzaKey]:
    """Those that say they were sealed to a one-time prekey that there could be."""
    return [each for each in stanzas if each.kind == PrekeyKind.ONE_TIME and each.suite in SUITES]


def accepted(stanza: StanzaKey, keys: DeviceKeys | None, check: StanzaCheck, handouts: Mapping[StanzaKey, Handout], now_ms: int) -> bool:
    """Whether the device surely can open this stanza for as long as a message may live.

    A one-time prekey must have been handed out to this sender. It may be used again here: a publish that is repeated is the same as
    before, and what else is sealed to it the device refuses, because its private half went with the first message.
    """
    if keys is None or keys.device.subscriber_id != check.subscriber_id or stanza.suite < keys.device.min_suite:
        return False
    if stanza.kind == PrekeyKind.ONE_TIME:
        handout = handouts.get(stanza)
        return handout is not None and handout.sender_id == check.sender_id and handout.expires_at_ms > now_ms
    for each in keys.prekeys:
        prekey = each.prekey
        if (prekey.suite, prekey.prekey_id, prekey.kind.value) != (stanza.suite, stanza.prekey_id, stanza.kind):
            continue
        if each.superseded_at_ms is not None and now_ms >= each.superseded_at_ms + SUPERSEDED_GRACE_MS:
            return False
        return prekey.expires_at_ms > now_ms
    return False


def check_stanzas(
    check: StanzaCheck, keys: Mapping[DeviceId, DeviceKeys], handouts: Mapping[StanzaKey, Handout], now_ms: int
) -> StanzaVerdict:
    """What is wrong with the stanzas of an envelope, given the devices and prekeys of now. `handouts` are those of `one_time()`.

    A device without a usable prekey is not missing: no sender could do better.
    """
    devices = set(check.device_ids)
    sealed = {each.device_id for each in check.stanzas}
    found = (keys[each] for each in check.device_ids if each in keys)
    own = ((each.device.device_id, each.added_at_ms) for each in found if each.device.subscriber_id == check.subscriber_id)
    return StanzaVerdict(
        missing=tuple(
            device_id
            for device_id in dict.fromkeys(check.device_ids)
            if device_id not in sealed and usable(keys.get(device_id), check.subscriber_id, now_ms) is not None
        ),
        surplus=tuple(dict.fromkeys(each.device_id for each in check.stanzas if each.device_id not in devices)),
        stale=tuple(
            dict.fromkeys(
                each.device_id
                for each in check.stanzas
                if each.device_id in devices and not accepted(each, keys.get(each.device_id), check, handouts, now_ms)
            )
        ),
        too_new=_too_new(own, check.added_until_ms),
    )
