"""Decisions of the mailbox: states, their order, what a message's status is, how a stop is answered. Pure."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum
from itertools import pairwise
from typing import Final

from sealpush.ids import ContentId, DeviceId, MessageId, OrderId, SenderId, SubscriberId, WakeUpId
from sealpush.model import Reason, State, StopPoint
from sealpush.proofs import AckOutcome
from sealpushd.platform.clock import from_ms


class Verdict(IntEnum):
    ACCEPTED = 1
    LATE = 2
    UNKNOWN = 3
    REFUSED = 4


# Which changes are legal. Everything open may end as EXPIRED, CANCELLED or REPLACED, and an acknowledgement passes through FETCHED.
LEGAL: Final[dict[State, frozenset[State]]] = {
    State.QUEUED: frozenset(
        {State.PUSHED, State.FETCHED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED}
    ),
    State.PUSHED: frozenset(
        {State.QUEUED, State.FETCHED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED}
    ),
    State.FETCHED: frozenset({State.DELIVERED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED}),
}

# Where all deliveries have ended without one that arrived, the first of these that occurs is the message's.
_TERMINAL_ORDER: Final = (State.BLOCKED, State.UNDELIVERED, State.EXPIRED, State.REPLACED, State.CANCELLED)

# A device on a live stream gets this long to acknowledge before its push leaves after all.
LIVE_STREAM_HEAD_START: Final = timedelta(seconds=2)
# A device whose token is dead may still poll for this long: from the push service's answer on; for later messages, from their acceptance.
DEAD_TOKEN_GRACE: Final = timedelta(seconds=60)
# What a dispatcher reports of a dead token, as in `WakeUpOutcome`.
OUTCOME_TOKEN_GONE: Final = 3
# A push service may ask for 15 minutes, and dispatch adds 11 to the last try; a later one is of a clock that is wrong.
RETRY_IN_MAX: Final = timedelta(minutes=30)
# A wake-up of which a dispatcher reports what means nothing is tried again after this, so that a bug of it cannot turn into a storm.
REPORT_LOST_PAUSE: Final = timedelta(seconds=30)
# What one question may take at the most, less than a gRPC message with room for one more envelope and the rest.
TAKE_BYTES_MAX: Final = 2 * 1024 * 1024
# Sorts before every id.
BEFORE_ALL: Final = MessageId(bytes(16))


def message_state(deliveries: Iterable[tuple[State, int]], reached: State = State.QUEUED) -> tuple[State, int]:
    """State and reason of a message from those of its deliveries: any DELIVERED wins; then, once all have ended, by importance; else the
    farthest that any delivery has `reached`, also one that ended since: a status never goes backwards."""
    by_state: dict[State, int] = {}
    for state, reason in deliveries:
        by_state.setdefault(state, reason)
    if not by_state:
        raise ValueError("a message has at least one delivery")
    if State.DELIVERED in by_state:
        return State.DELIVERED, 0
    farthest = max((state for state in by_state if not state.terminal), default=None)
    if farthest is not None:
        state = max(farthest, reached)
        return state, by_state.get(state, 0)
    state = next(state for state in _TERMINAL_ORDER if state in by_state)
    return state, by_state[state]


@dataclass(frozen=True, slots=True)
class AcceptedKey:
    """An idempotency key with the MAC of the request it stands for."""

    sender_id: SenderId
    request_id: str
    request_mac: bytes


@dataclass(frozen=True, slots=True)
class NewDelivery:
    device_id: DeviceId
    stanza: bytes
    platform: int
    push_reason: int


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to store; see `NewMessage` in mailbox.proto for the fields."""

    key: AcceptedKey
    message_id: MessageId
    subscriber_id: SubscriberId
    app_id: str
    content_class: int
    priority: int
    created_at: datetime
    expires_at: datetime
    replace_hash: bytes
    order_id: OrderId
    leg_no: int
    channel: int
    group_id: bytes | None
    traffic_type: int
    tag: str
    originator_requested: str
    originator_effective: str
    muted: bool
    blocked: int
    deliveries: tuple[NewDelivery, ...]
    content_id: ContentId
    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a key was accepted for."""

    message_id: MessageId
    request_mac: bytes
    devices: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Taken:
    """A delivery that a device takes. The envelope's parts are empty where only the change of state was asked for."""

    device_id: DeviceId
    message_id: MessageId
    wake_up_id: WakeUpId
    priority: int
    content_class: int
    muted: bool
    created_at: datetime
    expires_at: datetime
    head: bytes
    stanza: bytes
    tail: bytes

    @property
    def envelope_bytes(self) -> int:
        return len(self.head) + len(self.stanza) + len(self.tail)


def is_full(taken: Sequence[Taken], most: int) -> bool:
    """Whether more may wait behind what was taken, of which `most` were asked for."""
    return len(taken) >= most or sum(each.envelope_bytes for each in taken) >= TAKE_BYTES_MAX


@dataclass(frozen=True, slots=True)
class TakeQuery:
    """Which deliveries a device wants: one by wake-up id, one by message id, or the next ones after an id."""

    device_id: DeviceId
    wake_up_id: WakeUpId | None = None
    message_id: MessageId | None = None
    after_id: MessageId = BEFORE_ALL
    most: int = 1


@dataclass(frozen=True, slots=True)
class Ending:
    """A delivery that is to end."""

    message_id: MessageId
    device_id: DeviceId
    state: State
    reason: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A delivery that did end, with what went before."""

    message_id: MessageId
    device_id: DeviceId
    state: State
    stop_point: StopPoint


@dataclass(frozen=True, slots=True)
class Ack:
    """An acknowledgement whose signature is right. `envelope_digest` is None where the device could not read what came."""

    message_id: MessageId
    device_id: DeviceId
    content_id: ContentId
    envelope_digest: bytes | None
    outcome: AckOutcome
    reason: int
    at_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class AckAnswer:
    message_id: MessageId
    verdict: Verdict
    state: State | None


def ack_state(outcome: AckOutcome) -> State:
    """The terminal state that an acknowledgement asks for. READ asks for none: ValueError."""
    match outcome:
        case AckOutcome.DELIVERED:
            return State.DELIVERED
        case AckOutcome.UNDELIVERED:
            return State.UNDELIVERED
        case AckOutcome.BLOCKED:
            return State.BLOCKED
    raise ValueError("reading is no state")


def initial_state(blocked: int, delivery: NewDelivery) -> tuple[State, int]:
    """State and reason a delivery is stored with."""
    if blocked:
        return State.BLOCKED, blocked
    if not delivery.stanza:
        return State.UNDELIVERED, delivery.push_reason or Reason.NO_PREKEY
    return State.QUEUED, 0


def push_in(state: State, delivery: NewDelivery, *, on_live_stream: bool) -> float | None:
    """Seconds until a new delivery's push; None: it is not pushed."""
    if state.terminal or delivery.push_reason:
        return None
    return LIVE_STREAM_HEAD_START.total_seconds() if on_live_stream else 0.0


def grace(delivery: NewDelivery) -> float | None:
    """Seconds after which a new delivery ends if its device has not fetched it by then; None: its lifetime alone counts."""
    return DEAD_TOKEN_GRACE.total_seconds() if delivery.push_reason == Reason.TOKEN_GONE else None


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A wake-up handed to a dispatcher."""

    message_id: MessageId
    device_id: DeviceId
    wake_up_id: WakeUpId
    fence: int
    app_id: str
    platform: int
    priority: int
    muted: bool
    expires_at: datetime
    attempts: int
    # When it was handed out, by the database's clock.
    expires_in: timedelta


@dataclass(frozen=True, slots=True)
class Report:
    """What a dispatcher says of a wake-up; outcomes as in `WakeUpOutcome`.

    `retry_at` is of a dispatcher's clock, and counts only without `retry_in`: dispatchers of the release before know nothing else.
    """

    message_id: MessageId
    device_id: DeviceId
    fence: int
    outcome: int
    retry_at: datetime | None
    reason: int
    detail: str
    retry_in: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits to be pushed in a lane; see `Queue` in mailbox.proto."""

    app_id: str
    platform: int
    waiting: int
    due: int
    held: int
    oldest_at: datetime | None
    quarantined: int


def accepted_at(message_id: MessageId) -> datetime:
    """When publishing accepted a message, to the millisecond: its id is a UUIDv7 (RFC 9562, section 5.7)."""
    return from_ms(int.from_bytes(message_id[:6], "big"))


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    device_id: DeviceId
    state: State
    reason: int
    push_reason: int
    changed_at: datetime
    pushed_at: datetime | None
    fetched_at: datetime | None
    read_at: datetime | None
    late_ack_at: datetime | None
    stop_point: StopPoint | None

    @property
    def reached(self) -> State:
        """How far it came on its way to the device, whatever became of it then."""
        if self.fetched_at is not None:
            return State.FETCHED
        return State.QUEUED if self.pushed_at is None else State.PUSHED


@dataclass(frozen=True, slots=True)
class MessageRecord:
    message_id: MessageId
    order_id: OrderId
    group_id: bytes | None
    tag: str
    leg_no: int
    channel: int
    accepted_at: datetime
    expires_at: datetime
    deliveries: Sequence[DeliveryRecord]


@dataclass(frozen=True, slots=True)
class SignedAck:
    """An acknowledgement as its device signed it, beside message, content and device."""

    outcome: AckOutcome
    reason: int
    at_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class DeliveryEvidence:
    """What a device signed about a delivery: its end, what came after another end, that it was read."""

    device_id: DeviceId
    state: State
    reason: int
    acks: tuple[SignedAck, ...]


@dataclass(frozen=True, slots=True)
class MessageEvidence:
    """What is kept of a message for its receipt; `evidence` is empty where nothing was sealed, or kept at that time."""

    message_id: MessageId
    content_id: ContentId
    evidence: bytes
    deliveries: Sequence[DeliveryEvidence]


@dataclass(frozen=True, slots=True)
class Event:
    """A journal entry; `kind` as in `EventKind`."""

    message_id: MessageId
    device_id: DeviceId
    sender_id: SenderId
    order_id: OrderId
    leg_no: int
    group_id: bytes | None
    channel: int
    kind: int
    state: State
    reason: int
    at: datetime


# A snapshot that knows no transaction: before everything.
NOTHING_READ: Final = "1:1:"
_SNAPSHOT: Final = re.compile(r"(\d{1,19}):(\d{1,19}):((?:\d{1,19}(?:,\d{1,19})*)?)", re.ASCII)
# Form of a position; the former one was 16 bytes long and had none.
_POSITION_FORM: Final = 2
_FORMER_POSITION_BYTES: Final = 16
_POSITION_HEAD: Final = struct.Struct(">B16sQQQQQ")
_BIGINT_MAX: Final = (1 << 63) - 1
# How far a floor may lie behind before a new one is looked up: what a reader that comes back reads in vain, about a page.
FLOOR_LAG_MAX: Final = 1_000


def snapshot_bounds(snapshot: str) -> tuple[int, int]:
    """The oldest transaction that ran, and the first that the snapshot does not know. Raises ValueError for what PostgreSQL refuses."""
    match = _SNAPSHOT.fullmatch(snapshot)
    if match is None:
        raise ValueError("a snapshot is written oldest:next:running")
    oldest, first_unknown = int(match[1]), int(match[2])
    running = [int(each) for each in match[3].split(",")] if match[3] else []
    ascending = all(one < other for one, other in pairwise(running))
    if not 0 < oldest <= first_unknown <= _BIGINT_MAX or not ascending or any(not oldest <= each < first_unknown for each in running):
        raise ValueError("the numbers of a snapshot ascend")
    return oldest, first_unknown


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the journal: what `done` sees was read, and of a step that is under way (`up_to`) everything to the number `after`.

    `floor`: transactions that `done` does not know have numbers above. `next_floor`: the same of every snapshot taken from now on.
    `until`: no number that `up_to` sees is above. `dropped`: the newest transaction of which entries were past their retention when
    the step began.
    """

    epoch: bytes
    done: str
    floor: int
    next_floor: int
    dropped: int
    up_to: str = ""
    after: int = 0
    until: int = 0

    def misses(self, dropped: int) -> bool:
        """Whether entries were not read that are past their retention by now."""
        return dropped > self.dropped and dropped >= snapshot_bounds(self.done)[0]

    @property
    def newest_known(self) -> int:
        """The first transaction that a cluster need not have begun yet when it gave this position."""
        return snapshot_bounds(self.up_to or self.done)[1]

    def within(self, up_to: str, until: int, after: int) -> Position:
        """In the middle of a step, after an event."""
        return replace(self, up_to=up_to, until=until, after=after)

    def step_done(self, up_to: str, dropped: int) -> Position:
        return Position(self.epoch, up_to, self.next_floor, self.next_floor, dropped)

    def encode(self) -> bytes:
        head = _POSITION_HEAD.pack(_POSITION_FORM, self.epoch, self.floor, self.next_floor, self.dropped, self.after, self.until)
        return head + f"{self.done} {self.up_to}".encode()

    @classmethod
    def decode(cls, data: bytes) -> Position:
        """Raises ValueError for what is no position, with what its reader does instead."""
        if len(data) == _FORMER_POSITION_BYTES:
            raise ValueError(
                "this position is of the version before, whose order was not always right: begin with an empty position or from_now,"
                " and take the states that you keep from the events, or from GetStatuses"
            )
        try:
            form, epoch, floor, next_floor, dropped, after, until = _POSITION_HEAD.unpack_from(data)
            done, space, up_to = data[_POSITION_HEAD.size :].decode("ascii").partition(" ")
            if form != _POSITION_FORM or not space or max(floor, next_floor, dropped, after, until) > _BIGINT_MAX:
                raise ValueError("another form")
            for snapshot in (done, up_to) if up_to else (done,):
                snapshot_bounds(snapshot)
        except (struct.error, ValueError):
            raise ValueError("this is no position: give one as it came with the events, or none") from None
        return cls(epoch, done, floor, next_floor, dropped, up_to, after, until)
