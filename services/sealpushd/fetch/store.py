"""What the mailbox keeps, and the statements over it. Every method is one transaction; hot ones take batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg

from sealpush.envelope import evidence_of
from sealpush.ids import ContentId, DeviceId, MessageId, OrderId, SenderId, WakeUpId
from sealpush.model import Reason, State, StopPoint
from sealpush.proofs import AckOutcome
from sealpushd.fetch import rules
from sealpushd.fetch.rules import (
    Accepted,
    AcceptedKey,
    Ack,
    AckAnswer,
    DeliveryEvidence,
    DeliveryRecord,
    Ended,
    Ending,
    Event,
    MessageEvidence,
    MessageRecord,
    NewMessage,
    Position,
    Queue,
    Report,
    SignedAck,
    Taken,
    TakeQuery,
    Verdict,
    WakeUp,
)
from sealpushd.platform.db import Database, load_sql
from sealpushd.platform.errors import Aborted, FailedPrecondition, StoreUnavailable

Result = TypeVar("Result")

# A deadlock between batches is resolved by PostgreSQL within its deadlock_timeout; the loser tries again.
DEADLOCK_TRIES_MAX: Final = 3
# Deliveries that one turn of the sweeper ends; the next turn goes on.
SWEEP_ROWS_MAX: Final = 2_000
# A dispatcher that was not seen for this long has lost its leases. Its stream's keep-alive would have ended it before.
SESSION_LOST_AFTER: Final = timedelta(seconds=15)

# Due wake-ups of a lane and priority among which the oldest is looked for; mailbox.proto names it.
OLDEST_AMONG: Final = 256
# Deliveries that one turn of a requeue changes: as long as that takes, acknowledgements of one of them wait.
REQUEUE_ROWS_MAX: Final = 1_000
# Deliveries that one turn lets end after a grace; the same holds.
GRACE_ROWS_MAX: Final = 1_000

# Any number, the same for ever.
ENDED_LOCK: Final = 0x5EA1_ACCE

_FOLDER = Path(__file__).parent


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows as columns, which is how statements take them; no rows give empty columns."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return columns or [[] for _ in range(width)]


class MailboxStore:
    """Statements over the schema `fetch`. Raises StoreUnavailable; else only what a method names."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._sql = {path.stem: load_sql(_FOLDER, path.stem) for path in (_FOLDER / "sql").glob("[a-z]*.sql")}

    async def _fetch(self, name: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        return await self._db.fetch(name, self._sql[name], *arguments)

    async def _locked(self, keys: Iterable[tuple[bytes, bytes]], name: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        """Rows of a statement over open deliveries that are locked first: message and device of each.

        Two statements and not one, because the second then sees everything that was committed before the locks were had. One that waits
        for locks itself goes on with an old view of the other tables; PostgreSQL then repeats its joins for the changed rows, and
        18.6 crashes where those joins prune partitions (tests/contract/test_mailbox.py has the case).
        """
        columns = _columns(keys, 2)

        async def work() -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                await connection.fetch(self._sql["lock_keys"], *columns)
                rows: Sequence[asyncpg.Record] = await connection.fetch(self._sql[name], *arguments)
                return rows

        return await self._retrying(work)

    async def _one_at_a_time(self, keys: Iterable[tuple[bytes, bytes]], name: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        """Rows of a statement that changes deliveries which have ended: those have no row in `open_deliveries` to lock, so that in all
        processes together one such statement runs at a time. For the same reasons as `_locked`, of which come first the `keys` of what may
        be open as well."""
        columns = _columns(keys, 2)

        async def work() -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                if columns[0]:
                    await connection.fetch(self._sql["lock_keys"], *columns)
                await connection.execute("SELECT pg_advisory_xact_lock($1)", ENDED_LOCK)
                rows: Sequence[asyncpg.Record] = await connection.fetch(self._sql[name], *arguments)
                return rows

        return await self._retrying(work)

    async def _retrying(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat what lost a deadlock: it was rolled back whole."""
        for tries_left in reversed(range(DEADLOCK_TRIES_MAX)):
            try:
                return await work()
            except StoreUnavailable as e:
                if not tries_left or not isinstance(e.__cause__, asyncpg.DeadlockDetectedError):
                    raise
        raise AssertionError("the last try returns or raises")

    async def lookup_accepted(self, keys: Sequence[AcceptedKey]) -> list[Accepted | None]:
        """What each key was accepted for, None where it was not. The caller compares the MACs."""
        rows = await self._fetch("lookup_accepted", [key.sender_id for key in keys], [key.request_id for key in keys])
        found = {(row["sender_id"], row["request_id"]): row for row in rows}
        return [_accepted(found.get((key.sender_id, key.request_id))) for key in keys]

    async def store(self, messages: Sequence[NewMessage], wake_up_ids: Sequence[Sequence[WakeUpId]], live: Set[DeviceId]) -> set[MessageId]:
        """Store messages, one wake-up id a delivery; returns the ids stored now. A key accepted before stores nothing.

        Messages are sorted by key, so that batches with the same keys cannot deadlock. Keys must differ within the call. Raises Aborted,
        and stores nothing, where a message's id is that of a message under another key, or of a time without partitions.
        """
        ordered = sorted(zip(messages, wake_up_ids, strict=True), key=lambda pair: (pair[0].key.sender_id, pair[0].key.request_id))
        message_columns = _columns(
            (
                (
                    m.key.sender_id,
                    m.key.request_id,
                    m.key.request_mac,
                    m.message_id,
                    m.subscriber_id,
                    m.app_id,
                    m.content_class,
                    m.priority,
                    m.created_at,
                    m.expires_at,
                    m.order_id,
                    m.leg_no,
                    m.channel,
                    m.group_id,
                    m.traffic_type,
                    m.tag or None,
                    m.originator_requested or None,
                    m.originator_effective or None,
                    m.muted,
                    m.content_id,
                    m.head,
                    m.tail,
                    len(m.deliveries),
                    m.replace_hash,
                )
                for m, _ in ordered
            ),
            24,
        )
        deliveries = []
        for number, (m, ids) in enumerate(ordered, start=1):
            for delivery, wake_up_id in zip(m.deliveries, ids, strict=True):
                state, reason = rules.initial_state(m.blocked, delivery)
                deliveries.append(
                    (
                        m.message_id,
                        delivery.device_id,
                        state,
                        reason,
                        delivery.push_reason,
                        delivery.platform,
                        delivery.stanza,
                        wake_up_id,
                        rules.push_in(state, delivery, on_live_stream=delivery.device_id in live),
                        rules.grace(delivery),
                        number,
                    )
                )
        # A hash of the content: 1 µs a message of the smallest size, 80 µs of 64 KiB.
        evidence = [evidence_of(m.head, m.tail) if m.head else None for m, _ in ordered]
        *delivery_columns, numbers = _columns(deliveries, 11)
        arguments = [*message_columns, *delivery_columns, evidence, numbers]
        replacing = [m for m, _ in ordered if m.replace_hash]

        async def work() -> set[MessageId]:
            if not replacing:
                return {row["message_id"] for row in await self._fetch("store", *arguments)}
            async with self._db.transaction() as connection:
                stored = {row["message_id"] for row in await connection.fetch(self._sql["store"], *arguments)}
                keys = [(m.message_id, d.device_id, m.replace_hash) for m in replacing if m.message_id in stored for d in m.deliveries]
                rows = await connection.fetch(self._sql["replaced"], *_columns(keys, 3))
                endings = [Ending(row["message_id"], row["device_id"], State.REPLACED, Reason.REPLACED_BY_NEWER) for row in rows]
                if endings:
                    await connection.fetch(self._sql["lock_keys"], *_columns(((e.message_id, e.device_id) for e in endings), 2))
                    await connection.fetch(self._sql["close"], *_close_columns(endings))
                return stored

        try:
            return await self._retrying(work)
        except asyncpg.UniqueViolationError as e:
            # Not a repeated request, whose key would have been found. Its caller makes another id with the next try.
            raise Aborted(
                "a message with this id is stored under another request id; try again with a fresh one", field="message_id"
            ) from e
        except asyncpg.CheckViolationError as e:
            # The only check is that of partitions: weeks of which everything is dropped, or that are far ahead.
            raise Aborted(
                "the time of this message id is far off, and nothing is kept for it; set the clock of publishing, and try again with a"
                " fresh id",
                field="message_id",
            ) from e

    async def take(self, queries: Sequence[TakeQuery], *, contents: bool = True) -> list[list[Taken]]:
        """Deliveries that devices ask for, FETCHED from now on; a list for each query, oldest first."""
        columns = _columns(((n, q.device_id, q.wake_up_id, q.message_id, q.after_id, q.most) for n, q in enumerate(queries)), 6)

        async def work() -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                asked = await connection.fetch(self._sql["lock_asked"], *columns, rules.TAKE_BYTES_MAX)
                if not asked:
                    return []
                found = _columns((tuple(row) for row in asked), 3)
                rows: Sequence[asyncpg.Record] = await connection.fetch(self._sql["take"], *found, contents)
                return rows

        rows = await self._retrying(work)
        answers: list[list[Taken]] = [[] for _ in queries]
        for row in rows:
            answers[row["question"]].append(
                Taken(
                    DeviceId(row["device_id"]),
                    MessageId(row["message_id"]),
                    WakeUpId(row["wake_up_id"]),
                    row["priority"],
                    row["content_class"],
                    row["muted"],
                    row["created_at"],
                    row["expires_at"],
                    row["head"] or b"",
                    row["stanza"] or b"",
                    row["tail"] or b"",
                )
            )
        return answers

    async def waiting_ids(self, device_ids: Sequence[DeviceId], most: int) -> dict[DeviceId, list[MessageId]]:
        """Ids of open deliveries by device, oldest first, without taking them."""
        waiting: dict[DeviceId, list[MessageId]] = {}
        for row in await self._fetch("waiting_ids", list(device_ids), most):
            waiting.setdefault(DeviceId(row["device_id"]), []).append(MessageId(row["message_id"]))
        return waiting

    async def acknowledge(self, acks: Sequence[Ack]) -> list[AckAnswer]:
        """Write down acknowledgements whose signatures were checked; an answer each. Repeating them is safe."""
        answers: dict[int, AckAnswer] = {}
        # One row a delivery may be in a statement: a second acknowledgement of the same one waits for the next round.
        rest = [(n, ack) for n, ack in enumerate(acks) if ack.outcome is not AckOutcome.READ]
        while rest:
            seen: set[tuple[MessageId, DeviceId]] = set()
            now: list[tuple[int, Ack]] = []
            later: list[tuple[int, Ack]] = []
            for n, ack in rest:
                key = (ack.message_id, ack.device_id)
                (later if key in seen else now).append((n, ack))
                seen.add(key)
            answers.update(await self._acknowledge(now))
            rest = later
        reads = [(n, ack) for n, ack in enumerate(acks) if ack.outcome is AckOutcome.READ]
        if reads:
            answers.update(await self._read(reads))
        return [answers[n] for n in range(len(acks))]

    async def _acknowledge(self, acks: Sequence[tuple[int, Ack]]) -> dict[int, AckAnswer]:
        columns = _columns(
            (
                (
                    a.message_id,
                    a.device_id,
                    rules.ack_state(a.outcome),
                    a.reason,
                    a.content_id,
                    a.outcome,
                    a.at_ms,
                    a.signature,
                    a.envelope_digest,
                )
                for _, a in acks
            ),
            9,
        )
        rows = await self._locked(((a.message_id, a.device_id) for _, a in acks), "close", *columns)
        closed = {(row["message_id"], row["device_id"]): State(row["state"]) for row in rows}
        answers = {
            n: AckAnswer(a.message_id, Verdict.ACCEPTED, closed[a.message_id, a.device_id])
            for n, a in acks
            if (a.message_id, a.device_id) in closed
        }
        missed = [(n, a) for n, a in acks if n not in answers]
        if missed:
            answers.update(await self._acknowledge_late(missed))
        return answers

    async def _acknowledge_late(self, acks: Sequence[tuple[int, Ack]]) -> dict[int, AckAnswer]:
        answers, overdue = await self._late_acks(acks)
        if overdue:
            # Open, but over its time: end it first, so that the acknowledgement is late for something.
            await self.sweep()
            ended, _ = await self._late_acks(overdue)
            answers.update(ended)
        return answers

    async def _late_acks(self, acks: Sequence[tuple[int, Ack]]) -> tuple[dict[int, AckAnswer], list[tuple[int, Ack]]]:
        """Answers, and those acknowledgements whose delivery is still open."""
        columns = _columns(
            ((a.message_id, a.device_id, a.content_id, a.outcome, a.reason, a.at_ms, a.signature, a.envelope_digest) for _, a in acks), 8
        )
        rows = await self._one_at_a_time((), "late_ack", *columns)
        found = {(row["message_id"], row["device_id"]): row for row in rows}
        answers = {}
        overdue = []
        for n, a in acks:
            row = found.get((a.message_id, a.device_id))
            if row is None:
                answers[n] = AckAnswer(a.message_id, Verdict.UNKNOWN, None)
                continue
            state = State(row["state"])
            answers[n] = AckAnswer(a.message_id, Verdict.ACCEPTED if row["repeated"] else Verdict.LATE, state)
            if not state.terminal:
                overdue.append((n, a))
        return answers, overdue

    async def _read(self, acks: Sequence[tuple[int, Ack]]) -> dict[int, AckAnswer]:
        distinct: dict[tuple[bytes | None, ...], tuple[int, bytes]] = {}
        for _, a in acks:
            distinct.setdefault((a.message_id, a.device_id, a.content_id, a.envelope_digest), (a.at_ms, a.signature))
        rows = await self._one_at_a_time(
            ((a.message_id, a.device_id) for _, a in acks), "read", *_columns(((*key, *signed) for key, signed in distinct.items()), 6)
        )
        found = {(row["message_id"], row["device_id"]): State(row["state"]) for row in rows}
        answers = {}
        for n, a in acks:
            state = found.get((a.message_id, a.device_id))
            if state is None:
                answers[n] = AckAnswer(a.message_id, Verdict.UNKNOWN, None)
            else:
                # Of what is open it is kept, and counts once the delivery is acknowledged.
                kept = state is State.DELIVERED or not state.terminal
                answers[n] = AckAnswer(a.message_id, Verdict.ACCEPTED if kept else Verdict.LATE, state)
        return answers

    async def close(self, endings: Sequence[Ending]) -> list[Ended]:
        """End deliveries that are still open; returns those that this call ended."""
        if not endings:
            return []
        rows = await self._locked(((e.message_id, e.device_id) for e in endings), "close", *_close_columns(endings))
        return [_ended(row) for row in rows]

    async def cancel(self, sender_id: SenderId, message_ids: Sequence[MessageId]) -> dict[MessageId, list[Ended]]:
        """End what is open of a sender's messages. Every delivery of a known message is answered; unknown messages are left out."""
        records = await self.statuses(sender_id, message_ids)
        endings = [
            Ending(record.message_id, delivery.device_id, State.CANCELLED, Reason.CANCELLED_BY_SENDER)
            for record in records
            for delivery in record.deliveries
            if not delivery.state.terminal
        ]
        await self.close(endings)
        # What ended meanwhile in another way, or had ended before, is told as it stands now; what an earlier call cancelled, as then.
        return {
            record.message_id: [_as_cancelled(record.message_id, each) for each in record.deliveries]
            for record in await self.statuses(sender_id, message_ids)
        }

    async def block(self, subscriber_id: bytes, sender_id: SenderId, *, advertising_only: bool) -> list[Ended]:
        """End what is queued of a sender that the recipient blocks now."""
        rows = await self._fetch("block", subscriber_id, sender_id, advertising_only)
        reason = Reason.ADVERTISING_BLOCKED if advertising_only else Reason.SENDER_BLOCKED
        return await self.close([Ending(row["message_id"], row["device_id"], State.BLOCKED, reason) for row in rows])

    async def close_devices(self, devices: dict[DeviceId, int]) -> list[Ended]:
        """End everything open of installations that are gone, with the reason given for each."""
        rows = await self._fetch("open_of_devices", list(devices))
        return await self.close([Ending(r["message_id"], r["device_id"], State.UNDELIVERED, devices[r["device_id"]]) for r in rows])

    async def sweep(self) -> list[Ended]:
        """End what is over its time: expired, or its token dead for longer than the grace."""

        async def work() -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                overdue = await connection.fetch(self._sql["lock_overdue"], SWEEP_ROWS_MAX)
                if not overdue:
                    return []
                endings = [
                    Ending(
                        row["message_id"],
                        row["device_id"],
                        State.EXPIRED if row["close_reason"] == Reason.LIFETIME_OVER else State.UNDELIVERED,
                        row["close_reason"],
                    )
                    for row in overdue
                ]
                rows: Sequence[asyncpg.Record] = await connection.fetch(self._sql["close"], *_close_columns(endings))
                return rows

        return [_ended(row) for row in await self._retrying(work)]

    async def statuses(self, sender_id: SenderId, message_ids: Sequence[MessageId]) -> list[MessageRecord]:
        """Messages of the sender with their deliveries; unknown ones are left out."""
        found: dict[MessageId, tuple[asyncpg.Record, list[DeliveryRecord]]] = {}
        for row in await self._fetch("statuses", sender_id, list(dict.fromkeys(message_ids))):
            _, deliveries = found.setdefault(MessageId(row["message_id"]), (row, []))
            deliveries.append(
                DeliveryRecord(
                    DeviceId(row["device_id"]),
                    State(row["state"]),
                    row["reason"],
                    row["push_reason"],
                    row["changed_at"],
                    row["pushed_at"],
                    row["fetched_at"],
                    row["read_at"],
                    row["late_ack_at"],
                    None if row["stop_point"] is None else StopPoint(row["stop_point"]),
                )
            )
        return [
            MessageRecord(
                message_id,
                OrderId(row["order_id"]),
                row["group_id"],
                row["tag"] or "",
                row["leg_no"],
                row["channel"],
                row["accepted_at"],
                row["expires_at"],
                deliveries,
            )
            for message_id, (row, deliveries) in found.items()
        ]

    async def evidence(self, sender_id: SenderId, message_ids: Sequence[MessageId]) -> list[MessageEvidence]:
        """What is kept of the sender's messages for their receipts; unknown ones are left out."""
        found: dict[MessageId, tuple[asyncpg.Record, list[DeliveryEvidence]]] = {}
        for row in await self._fetch("receipts", sender_id, list(dict.fromkeys(message_ids))):
            _, deliveries = found.setdefault(MessageId(row["message_id"]), (row, []))
            deliveries.append(DeliveryEvidence(DeviceId(row["device_id"]), State(row["state"]), row["reason"], _signed_acks(row)))
        return [
            MessageEvidence(message_id, ContentId(row["content_id"]), row["evidence"] or b"", deliveries)
            for message_id, (row, deliveries) in found.items()
        ]

    async def keep_sessions(self, session_ids: Sequence[bytes]) -> None:
        """Write down that these dispatchers are connected now."""
        await self._fetch("keep_sessions", list(session_ids))

    async def end_sessions(self, session_ids: Sequence[bytes]) -> None:
        """Release the leases of dispatchers that are gone; their wake-ups can be claimed again at once."""
        ended = list(session_ids)
        await self._fetch("release_leases", ended)
        await self._fetch("forget_sessions", ended)

    async def lost_sessions(self) -> list[bytes]:
        """Dispatchers that were not seen for a while, because their mailbox process is gone, and those that ended while a claim of theirs
        was still being committed."""
        rows = await self._fetch("lost_sessions", SESSION_LOST_AFTER)
        return [row["session_id"] for row in rows]

    async def claim(self, session_id: bytes, lanes: Sequence[tuple[str, int, int]]) -> list[WakeUp]:
        """Lease due wake-ups to a dispatcher: app, platform and how many for each lane."""
        rows = await self._retrying(lambda: self._fetch("claim", session_id, *_columns(lanes, 3)))
        return [WakeUp(*row) for row in rows]

    async def report(self, session_id: bytes, reports: Sequence[Report]) -> None:
        """Write down what became of wake-ups; stale reports change nothing. A dead token ends everything that the device has not fetched,
        after a grace."""
        distinct = {(report.message_id, report.device_id): report for report in reports}
        dead = [report for report in distinct.values() if report.outcome == rules.OUTCOME_TOKEN_GONE]
        if dead:
            # First: what fails in between is reported again, and goes on.
            await self._give_grace(session_id, dead)
        columns = _columns(
            ((r.message_id, r.device_id, r.fence, r.outcome, r.retry_at, r.reason, r.detail[:100], r.retry_in) for r in distinct.values()),
            8,
        )
        await self._locked(distinct, "report", session_id, *columns, rules.RETRY_IN_MAX)

    async def _give_grace(self, session_id: bytes, dead: Sequence[Report]) -> None:
        """Let what is open and unfetched of these reports' devices end after a grace, in turns in the order of the keys."""
        columns = _columns(((report.message_id, report.device_id, report.fence) for report in dead), 3)

        async def turn(device_id: bytes, message_id: bytes) -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                locked: Sequence[asyncpg.Record] = await connection.fetch(
                    self._sql["lock_gone"], session_id, *columns, device_id, message_id, GRACE_ROWS_MAX
                )
                if locked:
                    await connection.fetch(self._sql["grace"], *_columns((tuple(row) for row in locked), 2), rules.DEAD_TOKEN_GRACE)
                return locked

        last: tuple[bytes, bytes] = rules.BEFORE_ALL, rules.BEFORE_ALL
        while True:
            locked = await self._retrying(partial(turn, *last))
            if len(locked) < GRACE_ROWS_MAX:
                return
            last = locked[-1]["device_id"], locked[-1]["message_id"]

    async def pull_back(self) -> None:
        """Let what waits for its push longer than it can be due now: the database's clock was ahead when it was put off."""
        await self._retrying(lambda: self._fetch("pull_back", rules.RETRY_IN_MAX))

    async def queues(self) -> list[Queue]:
        """What waits to be pushed, by lane; lanes without anything are left out."""
        return [
            Queue(
                row["app_id"],
                row["platform"],
                row["waiting"],
                row["due"],
                row["held"],
                None if row["oldest"] is None else rules.accepted_at(MessageId(row["oldest"])),
                row["quarantined"],
            )
            for row in await self._fetch("queues", OLDEST_AMONG)
        ]

    async def requeue(
        self, app_id: str, platform: int, after: tuple[DeviceId, MessageId], most: int = REQUEUE_ROWS_MAX
    ) -> list[tuple[DeviceId, MessageId]]:
        """Push quarantined deliveries of a lane again, in the order of their keys after one; fewer than `most` were the last."""

        async def work() -> Sequence[asyncpg.Record]:
            async with self._db.transaction() as connection:
                locked: Sequence[asyncpg.Record] = await connection.fetch(self._sql["lock_quarantined"], app_id, platform, *after, most)
                if locked:
                    await connection.fetch(self._sql["requeue"], *_columns((tuple(row) for row in locked), 2))
                return locked

        return [(DeviceId(row["device_id"]), MessageId(row["message_id"])) for row in await self._retrying(work)]

    async def now_position(self) -> Position:
        """Where the journal's future begins: what is committed from now on comes after it."""
        floor = await self._journal_floor()
        row = await self._journal_now()
        await self._journal_flush(row)
        return Position(row["epoch"], row["snapshot"], floor, floor, row["dropped_xid"])

    async def first_position(self) -> Position:
        """Before everything that the journal keeps."""
        floor = await self._journal_floor()
        row = await self._journal_now()
        return Position(row["epoch"], rules.NOTHING_READ, 0, floor, row["dropped_xid"])

    async def check_position(self, position: Position) -> None:
        """Raises PositionLost where another cluster gave it, or one that a back-up has taken back since."""
        row = await self._journal_now()
        _check_position(position, row["epoch"], row["snapshot"])

    async def _journal_now(self) -> asyncpg.Record:
        (row,) = await self._fetch("journal_now")
        return row

    async def _journal_floor(self) -> int:
        (row,) = await self._fetch("journal_floor")
        return int(row["seq"])

    async def _journal_flush(self, step: asyncpg.Record) -> None:
        """Before a position leaves: no transaction that its snapshot calls ended may be given again after a crash."""
        if not step["is_flushed"]:
            await self._fetch("journal_flush")

    async def events(self, after: Position, most: int) -> tuple[list[Event], Position]:
        """Journal entries after a position, and the position after them. Fewer than `most`: that is all that is committed by now.

        The entries of a delivery come in the order of its changes, those of a transaction never before those of one that had committed when
        it changed the same delivery; nothing is left out or comes twice. Raises PositionLost.
        """
        position, found, floor_is_new = after, list[Event](), False
        while True:
            begins, wanted = not position.up_to, most - len(found)
            rows = await self._fetch(
                "read_events",
                position.done,
                position.floor,
                position.up_to or None,
                position.after,
                position.until if position.up_to else None,
                wanted,
                position.next_floor + rules.FLOOR_LAG_MAX if begins and not floor_is_new else None,
            )
            step = rows[0]
            _check_position(position, step["epoch"], step["up_to"])
            if position.misses(step["dropped_xid"]):
                raise PositionLost("entries after this position are past their retention: begin with an empty position")
            if step["floor_is_old"]:
                # Nothing was read: the step's snapshot has to be taken after its floor.
                position, floor_is_new = replace(position, next_floor=await self._journal_floor()), True
                continue
            if begins:
                await self._journal_flush(step)
            events = [_event(row) for row in rows if row["seq"] is not None]
            found += events
            if len(events) == wanted:
                return found, position.within(step["up_to"], step["until_seq"], rows[-1]["seq"])
            position, floor_is_new = position.step_done(step["up_to"], step["dropped_xid"]), False
            if begins:
                return found, position


class PositionLost(FailedPrecondition):
    """The journal does not go on after this position. Its reader begins with an empty one, which repeats, or from now on, and looks the
    states up that it keeps."""

    reason = "POSITION_LOST"


def _check_position(position: Position, epoch: bytes, snapshot: str) -> None:
    if position.epoch != epoch:
        raise PositionLost(
            "another database gave this position, or this one before it was restored: begin with an empty position, or from_now,"
            " and look up the states that you keep"
        )
    if position.newest_known > rules.snapshot_bounds(snapshot)[1]:
        raise PositionLost(
            "this position is ahead of the database, which was restored without `sealpush db restored`: run that, then begin with an"
            " empty position"
        )


def _event(row: asyncpg.Record) -> Event:
    return Event(
        MessageId(row["message_id"]),
        DeviceId(row["device_id"]),
        SenderId(row["sender_id"]),
        OrderId(row["order_id"]),
        row["leg_no"],
        row["group_id"],
        row["channel"],
        row["kind"],
        State(row["state"]),
        row["reason"],
        row["at"],
    )


def _accepted(row: asyncpg.Record | None) -> Accepted | None:
    if row is None:
        return None
    return Accepted(MessageId(row["message_id"]), row["request_mac"], row["devices"], row["message_expires_at"])


def _signed_acks(row: asyncpg.Record) -> tuple[SignedAck, ...]:
    """What a device signed: the end of its delivery, what came after another end, and that it was read."""
    acks = [
        SignedAck(AckOutcome(row[f"{kind}_outcome"]), row[f"{kind}_reason"], row[f"{kind}_at_ms"], row[f"{kind}_signature"])
        for kind in ("ack", "late_ack")
        if row[f"{kind}_signature"] is not None
    ]
    if row["read_ack_signature"] is not None:
        acks.append(SignedAck(AckOutcome.READ, 0, row["read_ack_at_ms"], row["read_ack_signature"]))
    return tuple(acks)


def _close_columns(endings: Sequence[Ending]) -> list[list[Any]]:
    distinct = {(e.message_id, e.device_id): e for e in endings}
    return _columns(((e.message_id, e.device_id, e.state, e.reason, None, None, None, None, None) for e in distinct.values()), 9)


def _ended(row: asyncpg.Record) -> Ended:
    return Ended(MessageId(row["message_id"]), DeviceId(row["device_id"]), State(row["state"]), StopPoint(row["stop_point"]))


def _as_cancelled(message_id: MessageId, delivery: DeliveryRecord) -> Ended:
    cancelled = delivery.state is State.CANCELLED and delivery.stop_point is not None
    return Ended(message_id, delivery.device_id, delivery.state, (delivery.stop_point if cancelled else None) or StopPoint.TOO_LATE)
