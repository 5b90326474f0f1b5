"""The mailbox on a real PostgreSQL: what it stores, the states it goes through, its leases and its journal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealpush.ids import AppId, ContentId, DeviceId, MessageId, SenderId, SubscriberId, WakeUpId, uuid7
from sealpush.model import Reason, State, StopPoint
from sealpush.proofs import AckOutcome
from sealpush.v1 import common_pb2
from sealpushd.engines import Engines
from sealpushd.fetch import rules
from sealpushd.fetch.rules import Ack, Event, NewMessage, Position, SignedAck, Taken, TakeQuery, Verdict, WakeUp
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.errors import Aborted, DeadlineExceeded, InvalidRequest, ServiceError, Unavailable
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Served, refusal, running_services, until_locked_out
from tests.contract.mailboxes import (
    IOS,
    PUSHED,
    QUARANTINED,
    RELEASED,
    RETRY,
    TOKEN_GONE,
    a_session,
    ack,
    an_id,
    claim,
    delivery,
    message,
    overdue,
    proto,
    put,
    report,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store(urls: dict[str, str]) -> AsyncIterator[MailboxStore]:
    db = Database(urls["fetch"], "fetch", 4)
    await db.open()
    yield MailboxStore(db)
    await db.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(urls: dict[str, str]) -> AsyncIterator[Connection]:
    """The database as its superuser: looks at tables and makes time pass."""
    connection = await connect(urls["admin"], search_path="fetch")
    yield connection
    await connection.close()


async def take(store: MailboxStore, of: NewMessage, device: int = 0) -> list[Taken]:
    (taken,) = await store.take([TakeQuery(of.deliveries[device].device_id, message_id=of.message_id)])
    return taken


async def states(store: MailboxStore, of: NewMessage) -> list[tuple[State, int]]:
    (record,) = await store.statuses(of.key.sender_id, [of.message_id])
    by_device = {each.device_id: (each.state, each.reason) for each in record.deliveries}
    return [by_device[each.device_id] for each in of.deliveries]


async def push_reasons(store: MailboxStore, of: NewMessage) -> list[int]:
    (record,) = await store.statuses(of.key.sender_id, [of.message_id])
    by_device = {each.device_id: each.push_reason for each in record.deliveries}
    return [by_device[each.device_id] for each in of.deliveries]


async def closing(sql: Connection, of: NewMessage) -> list[tuple[int, bool]]:
    """With what reason each delivery ends, and whether within the grace; what closes at the end of the lifetime does so exactly then."""
    rows = await sql.fetch(
        "SELECT device_id, close_reason, closes_at <= now() + $2::interval AS soon, closes_at = expires_at AS whole FROM open_deliveries"
        " WHERE message_id = $1",
        of.message_id,
        rules.DEAD_TOKEN_GRACE,
    )
    assert all(row["soon"] or row["whole"] for row in rows)
    by_device = {row["device_id"]: (row["close_reason"], row["soon"]) for row in rows}
    return [by_device[each.device_id] for each in of.deliveries]


async def grace_over(sql: Connection, of: NewMessage) -> None:
    """Let the grace of a message's deliveries, where they are in one, end now."""
    await sql.execute(
        "UPDATE open_deliveries SET closes_at = now() - interval '1 ms' WHERE message_id = $1 AND close_reason = 105", of.message_id
    )


async def sweep(store: MailboxStore) -> None:
    while await store.sweep():
        pass


async def journal(sql: Connection, of: NewMessage) -> list[tuple[bytes, int, State]]:
    rows = await sql.fetch("SELECT device_id, kind, state FROM status_events WHERE message_id = $1 ORDER BY seq", of.message_id)
    return [(row["device_id"], row["kind"], State(row["state"])) for row in rows]


def signed(of: NewMessage, outcome: AckOutcome, n: int) -> Ack:
    """A time that fits its signature only."""
    return ack(of, outcome, reason=0 if outcome is AckOutcome.READ else n, at_ms=n, signature=bytes([n]) * 64)


async def contents(sql: Connection, of: NewMessage) -> int:
    return int(await sql.fetchval("SELECT count(*) FROM contents WHERE message_id = $1", of.message_id))


# Accepting


async def test_a_stored_message_is_there_with_its_deliveries_journal_and_key(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id()), delivery(an_id()), tag="мітка", group_id=an_id())
    assert await put(store, made) == {made.message_id}
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.tag, record.group_id, record.order_id) == ("мітка", made.group_id, made.order_id)
    assert await states(store, made) == [(State.QUEUED, 0)] * 2
    assert [each[1:] for each in await journal(sql, made)] == [(1, State.QUEUED)] * 2
    (accepted,) = await store.lookup_accepted([made.key])
    assert accepted is not None
    assert (accepted.message_id, accepted.request_mac, accepted.devices) == (made.message_id, b"m" * 32, 2)
    assert [(each.head, each.stanza, each.tail) for each in await take(store, made)] == [(b"head", b"stanza", b"tail")]


async def test_a_key_is_kept_for_28_days(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    kept = await sql.fetchval("SELECT expires_at - now() FROM accepted_requests WHERE message_id = $1", made.message_id)
    assert timedelta(days=28) - timedelta(minutes=1) < kept <= timedelta(days=28)


async def test_storing_the_same_key_again_stores_nothing(store: MailboxStore, sql: Connection) -> None:
    first = message()
    again = replace(message(*first.deliveries), key=first.key)
    assert await put(store, first) == {first.message_id}
    assert await put(store, again) == set()
    assert await store.statuses(first.key.sender_id, [again.message_id]) == []
    assert await journal(sql, again) == []
    assert await contents(sql, again) == 0


async def test_the_same_key_of_another_sender_is_another_request(store: MailboxStore) -> None:
    first, second = message(), message()
    second = replace(second, key=replace(second.key, request_id=first.key.request_id))
    assert await put(store, first, second) == {first.message_id, second.message_id}


async def test_a_batch_that_fails_stores_nothing_of_any_of_its_messages(store: MailboxStore, sql: Connection) -> None:
    before = message()
    await put(store, before)
    good, bad = message(), replace(message(), message_id=before.message_id)
    with pytest.raises(Aborted):
        await put(store, good, bad)
    assert await store.lookup_accepted([good.key, bad.key]) == [None, None]
    assert await store.statuses(good.key.sender_id, [good.message_id]) == []
    assert await journal(sql, good) == []
    assert await put(store, good) == {good.message_id}


async def test_batches_with_the_same_keys_in_opposite_order_store_each_once_and_never_deadlock(store: MailboxStore) -> None:
    for _ in range(5):
        originals = [message() for _ in range(20)]
        copies = [[replace(message(*each.deliveries), key=each.key) for each in originals] for _ in range(4)]
        batches = [batch if n % 2 else batch[::-1] for n, batch in enumerate(copies)]
        async with asyncio.timeout(LIMIT_S):
            stored = await asyncio.gather(*(put(store, *batch) for batch in batches))
        for n, original in enumerate(originals):
            winners = [each for each in (batch[n].message_id for batch in copies) if any(each in ids for ids in stored)]
            (accepted,) = await store.lookup_accepted([original.key])
            assert accepted is not None
            assert winners == [accepted.message_id]


async def test_a_blocked_message_ends_at_once_and_is_never_pushed_or_fetched(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id()), delivery(an_id()), blocked=Reason.ADVERTISING_BLOCKED, head=b"", tail=b"")
    await put(store, made)
    assert await states(store, made) == [(State.BLOCKED, Reason.ADVERTISING_BLOCKED)] * 2
    assert await take(store, made) == []
    assert await claim(store, await a_session(store), made) == []
    assert [each[2] for each in await journal(sql, made)] == [State.BLOCKED] * 2


async def test_a_device_that_nothing_could_be_sealed_for_ends_undelivered_beside_the_others(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id(), stanza=b""), delivery(an_id()), delivery(an_id(), stanza=b"", push_reason=Reason.NO_PREKEY))
    await put(store, made)
    none = (State.UNDELIVERED, Reason.NO_PREKEY)
    assert await states(store, made) == [none, (State.QUEUED, 0), none]
    assert len(await claim(store, await a_session(store), made)) == 1
    assert await contents(sql, made) == 1


async def test_a_message_that_no_device_can_open_keeps_no_content(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id(), stanza=b""))
    await put(store, made)
    assert await contents(sql, made) == 0


async def test_a_device_without_a_push_token_is_not_pushed_and_can_fetch(store: MailboxStore) -> None:
    made = message(delivery(an_id(), push_reason=111))
    await put(store, made)
    assert await claim(store, await a_session(store), made) == []
    assert len(await take(store, made)) == 1


async def test_a_message_for_a_dead_token_ends_after_the_grace_and_one_for_no_token_at_the_end_of_its_lifetime(
    store: MailboxStore, sql: Connection
) -> None:
    made = message(*(delivery(an_id(), push_reason=reason) for reason in (Reason.TOKEN_GONE, Reason.NO_PUSH_TOKEN, 0)))
    await put(store, made)
    assert await closing(sql, made) == [(Reason.TOKEN_GONE, True), (Reason.LIFETIME_OVER, False), (Reason.LIFETIME_OVER, False)]
    assert await push_reasons(store, made) == [Reason.TOKEN_GONE, Reason.NO_PUSH_TOKEN, 0]
    assert [each.device_id for each in await claim(store, await a_session(store), made)] == [made.deliveries[2].device_id]
    await grace_over(sql, made)
    await sweep(store)
    assert await states(store, made) == [(State.UNDELIVERED, Reason.TOKEN_GONE), (State.QUEUED, 0), (State.QUEUED, 0)]


async def test_a_message_for_a_dead_token_that_is_fetched_in_the_grace_has_its_lifetime(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id(), push_reason=Reason.TOKEN_GONE))
    await put(store, made)
    assert len(await take(store, made)) == 1
    assert await closing(sql, made) == [(Reason.LIFETIME_OVER, False)]
    assert await push_reasons(store, made) == [Reason.NO_PUSH_TOKEN], "the app is there, if without a token"
    await grace_over(sql, made)
    await sweep(store)
    await store.acknowledge([ack(made)])
    assert await states(store, made) == [(State.DELIVERED, 0)]


async def test_a_message_that_lives_shorter_than_the_grace_expires_also_for_a_dead_token(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id(), push_reason=Reason.TOKEN_GONE), lifetime=rules.DEAD_TOKEN_GRACE - timedelta(seconds=1))
    await put(store, made)
    await overdue(sql, made)
    await sweep(store)
    assert await states(store, made) == [(State.EXPIRED, Reason.LIFETIME_OVER)]
    assert await push_reasons(store, made) == [Reason.TOKEN_GONE]


async def test_a_device_on_a_live_stream_is_pushed_two_seconds_later(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await store.store([made], [[WakeUpId(an_id())]], {made.deliveries[0].device_id})
    waits = await sql.fetchval("SELECT next_attempt_at - now() FROM open_deliveries WHERE message_id = $1", made.message_id)
    assert timedelta(seconds=1) < waits <= rules.LIVE_STREAM_HEAD_START
    assert await claim(store, await a_session(store), made) == []


async def test_a_newer_message_with_the_same_replace_key_takes_the_place_of_the_open_one(store: MailboxStore) -> None:
    device = an_id()
    first, delivered, second = (message(delivery(device), replace_hash=b"h" * 32) for _ in range(3))
    other = message(delivery(device), replace_hash=b"o" * 32)
    await put(store, delivered)
    await store.acknowledge([ack(delivered)])
    await put(store, first, other)
    await put(store, second)
    assert await states(store, first) == [(State.REPLACED, Reason.REPLACED_BY_NEWER)]
    assert await states(store, delivered) == [(State.DELIVERED, 0)]
    assert await states(store, other) == await states(store, second) == [(State.QUEUED, 0)]


async def test_messages_that_replace_each_other_within_one_batch_leave_the_newest(store: MailboxStore) -> None:
    device, subscriber = an_id(), SubscriberId(an_id())
    made = [message(delivery(device), replace_hash=b"h" * 32, subscriber_id=subscriber) for _ in range(3)]
    await put(store, *made)
    assert [(await states(store, each))[0][0] for each in made] == [State.REPLACED, State.REPLACED, State.QUEUED]


# Fetching and acknowledging


async def test_an_acknowledgement_before_the_push_passes_through_fetched(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    (answer,) = await store.acknowledge([ack(made)])
    assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, State.DELIVERED)
    assert [each[2] for each in await journal(sql, made)] == [State.QUEUED, State.FETCHED, State.DELIVERED]
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert record.deliveries[0].fetched_at is not None


@pytest.mark.parametrize(
    ("outcome", "state"),
    [(AckOutcome.DELIVERED, State.DELIVERED), (AckOutcome.UNDELIVERED, State.UNDELIVERED), (AckOutcome.BLOCKED, State.BLOCKED)],
)
async def test_an_acknowledgement_ends_the_delivery_and_is_kept_as_signed(
    store: MailboxStore, sql: Connection, outcome: AckOutcome, state: State
) -> None:
    made = message()
    await put(store, made)
    await take(store, made)
    signed = ack(made, outcome, reason=108)
    (answer,) = await store.acknowledge([signed])
    assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, state)
    row = await sql.fetchrow("SELECT * FROM deliveries WHERE message_id = $1", made.message_id)
    assert row is not None
    assert (row["ack_outcome"], row["ack_reason"], row["ack_at_ms"], row["ack_signature"]) == (
        outcome,
        signed.reason,
        signed.at_ms,
        signed.signature,
    )
    assert await contents(sql, made) == 0


async def test_repeating_an_acknowledgement_is_accepted_and_changes_nothing(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    signed = ack(made)
    answers = [*await store.acknowledge([signed, signed]), *await store.acknowledge([signed])]
    assert [each.verdict for each in answers] == [Verdict.ACCEPTED] * 3
    assert len(await journal(sql, made)) == 3
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert record.deliveries[0].late_ack_at is None


async def test_of_two_different_acknowledgements_the_first_wins_and_the_second_is_late(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    answers = await store.acknowledge([ack(made), ack(made, AckOutcome.UNDELIVERED)])
    assert [(each.verdict, each.state) for each in answers] == [(Verdict.ACCEPTED, State.DELIVERED), (Verdict.LATE, State.DELIVERED)]
    for _ in range(2):
        (again,) = await store.acknowledge([ack(made, AckOutcome.UNDELIVERED)])
        assert again.verdict is Verdict.LATE
    assert [each[1:] for each in await journal(sql, made)][-2:] == [(1, State.DELIVERED), (3, State.DELIVERED)]


async def test_an_acknowledgement_after_expiry_is_late_and_the_state_is_expired(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    await take(store, made)
    await overdue(sql, made)
    (answer,) = await store.acknowledge([ack(made)])
    assert (answer.verdict, answer.state) == (Verdict.LATE, State.EXPIRED)
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert record.deliveries[0].late_ack_at is not None
    assert await states(store, made) == [(State.EXPIRED, Reason.LIFETIME_OVER)]


async def test_a_wrong_content_or_device_is_unknown_and_changes_nothing(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    wrong = [
        ack(made, content_id=ContentId(an_id())),
        ack(made, device_id=DeviceId(an_id())),
        ack(made, message_id=MessageId(uuid7())),
        ack(made, AckOutcome.READ, content_id=ContentId(an_id())),
        *(ack(made, outcome, envelope_digest=os.urandom(32)) for outcome in AckOutcome),
    ]
    assert [(each.verdict, each.state) for each in await store.acknowledge(wrong)] == [(Verdict.UNKNOWN, None)] * len(wrong)
    assert await states(store, made) == [(State.QUEUED, 0)]
    # A wrong one does not stand in the way of the right one beside it.
    answers = await store.acknowledge([wrong[0], ack(made)])
    assert [each.verdict for each in answers] == [Verdict.UNKNOWN, Verdict.ACCEPTED]


async def test_late_and_reading_acknowledgements_of_another_envelope_are_unknown(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    await store.acknowledge([ack(made)])
    wrong = [ack(made, outcome, envelope_digest=os.urandom(32)) for outcome in AckOutcome]
    assert [each.verdict for each in await store.acknowledge(wrong)] == [Verdict.UNKNOWN] * len(wrong)
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.deliveries[0].late_ack_at, record.deliveries[0].read_at) == (None, None)
    # What could not be read may be said late, and the right one beside a wrong one counts.
    unread, *reads = await store.acknowledge(
        [ack(made, AckOutcome.UNDELIVERED, envelope_digest=None), wrong[-1], ack(made, AckOutcome.READ)]
    )
    assert (unread.verdict, unread.state) == (Verdict.LATE, State.DELIVERED)
    assert reads[-1].verdict is Verdict.ACCEPTED


async def test_a_message_from_before_evidence_was_kept_takes_any_envelope_and_is_read_once(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    await sql.execute("UPDATE messages SET evidence = NULL WHERE message_id = $1", made.message_id)
    (ended,) = await store.acknowledge([ack(made, envelope_digest=os.urandom(32))])
    assert (ended.verdict, ended.state) == (Verdict.ACCEPTED, State.DELIVERED)
    reads = await store.acknowledge([ack(made, AckOutcome.READ, envelope_digest=os.urandom(32)) for _ in range(3)])
    assert [each.verdict for each in reads] == [Verdict.ACCEPTED] * 3
    assert [each[1] for each in await journal(sql, made)].count(2) == 1


async def test_of_acknowledgements_at_once_one_is_kept_as_it_was_signed(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    await store.cancel(made.key.sender_id, [made.message_id])
    ended = message()
    await put(store, ended)
    await store.acknowledge([ack(ended)])

    late, read = AckOutcome.UNDELIVERED, AckOutcome.READ
    calls = [
        [signed(made, late, n), signed(ended, read, n), signed(ended, read, n + 100), signed(made, late, n + 100)] for n in range(1, 9)
    ]
    await asyncio.gather(*(store.acknowledge(call) for call in calls))
    for of, outcome in ((made, late), (ended, read)):
        (kept,) = await store.evidence(of.key.sender_id, [of.message_id])
        found = kept.deliveries[0].acks[-1]
        assert found.outcome is outcome
        assert found.signature == bytes([found.at_ms]) * 64
        assert found.reason == (0 if outcome is read else found.at_ms)
        # Later ones change nothing.
        await store.acknowledge([signed(of, outcome, 250)])
        assert await store.evidence(of.key.sender_id, [of.message_id]) == [kept]
    assert await store.evidence(ended.key.sender_id, [made.message_id, MessageId(uuid7())]) == []


async def test_reading_is_a_time_beside_delivered_and_not_a_state(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    early, delivered, read, again = await store.acknowledge(
        [ack(made, AckOutcome.READ), ack(made), ack(made, AckOutcome.READ), ack(made, AckOutcome.READ)]
    )
    assert {each.verdict for each in (early, delivered, read, again)} == {Verdict.ACCEPTED}
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.deliveries[0].state, record.deliveries[0].read_at is not None) == (State.DELIVERED, True)
    assert [each[1:] for each in await journal(sql, made)][-2:] == [(1, State.DELIVERED), (2, State.DELIVERED)]


async def test_a_reading_that_comes_first_counts_once_the_delivery_is_acknowledged(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    await store.take([TakeQuery(made.deliveries[0].device_id)])
    read = signed(made, AckOutcome.READ, 7)
    for again in (7, 8):
        # The device repeats it, as it does where an answer was lost: the first stays.
        (answer,) = await store.acknowledge([signed(made, AckOutcome.READ, again)])
        assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, State.FETCHED)
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.deliveries[0].state, record.deliveries[0].read_at) == (State.FETCHED, None)
    for _ in range(2):
        (answer,) = await store.acknowledge([ack(made)])
        assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, State.DELIVERED)
        (record,) = await store.statuses(made.key.sender_id, [made.message_id])
        assert record.deliveries[0].read_at is not None
        (answer,) = await store.acknowledge([signed(made, AckOutcome.READ, 9)])
        assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, State.DELIVERED)
    assert [each[1:] for each in await journal(sql, made)][-2:] == [(1, State.DELIVERED), (2, State.DELIVERED)], "once, and in this order"
    ((kept,),) = [each.deliveries for each in await store.evidence(made.key.sender_id, [made.message_id])]
    assert kept.acks[-1] == SignedAck(AckOutcome.READ, 0, read.at_ms, read.signature)


@pytest.mark.parametrize("end", [State.EXPIRED, State.CANCELLED, State.UNDELIVERED])
async def test_a_reading_of_a_delivery_that_then_ends_otherwise_is_evidence_and_no_reading(
    store: MailboxStore, sql: Connection, end: State
) -> None:
    made = message()
    await put(store, made)
    await store.take([TakeQuery(made.deliveries[0].device_id)])
    await store.acknowledge([signed(made, AckOutcome.READ, 7)])
    if end is State.EXPIRED:
        await overdue(sql, made)
        await sweep(store)
    elif end is State.CANCELLED:
        await store.cancel(made.key.sender_id, [made.message_id])
    else:
        await store.acknowledge([ack(made, AckOutcome.UNDELIVERED)])
    late = [] if end is State.UNDELIVERED else [ack(made)]
    answers = await store.acknowledge([signed(made, AckOutcome.READ, 8), *late])
    assert {(answer.verdict, answer.state) for answer in answers} == {(Verdict.LATE, end)}
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.deliveries[0].state, record.deliveries[0].read_at) == (end, None)
    assert 2 not in [kind for _, kind, _ in await journal(sql, made)]
    ((kept,),) = [each.deliveries for each in await store.evidence(made.key.sender_id, [made.message_id])]
    assert (kept.acks[-1].outcome, kept.acks[-1].at_ms) == (AckOutcome.READ, 7)


async def test_what_has_expired_is_not_handed_out_even_before_the_sweep(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    await overdue(sql, made)
    assert await take(store, made) == []
    assert await claim(store, await a_session(store), made) == []
    assert await store.waiting_ids([made.deliveries[0].device_id], 10) == {}


async def test_nothing_expires_before_its_time(store: MailboxStore) -> None:
    made = message(lifetime=timedelta(seconds=30))
    await put(store, made)
    await sweep(store)
    assert await states(store, made) == [(State.QUEUED, 0)]


async def test_the_content_stays_until_the_last_device_is_done(store: MailboxStore, sql: Connection) -> None:
    made = message(delivery(an_id()), delivery(an_id()))
    await put(store, made)
    await store.acknowledge([ack(made)])
    assert await contents(sql, made) == 1
    await store.acknowledge([ack(made, device=1)])
    assert await contents(sql, made) == 0


async def test_statuses_are_told_to_their_sender_only(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    stranger = SenderId(an_id())
    assert await store.statuses(stranger, [made.message_id]) == []
    assert await store.cancel(stranger, [made.message_id]) == {}
    assert await states(store, made) == [(State.QUEUED, 0)]


async def test_a_device_gets_nothing_of_another(store: MailboxStore) -> None:
    made = message(delivery(an_id()), delivery(an_id()))
    await put(store, made)
    stranger = DeviceId(an_id())
    wake_up_id = (await take(store, made))[0].wake_up_id
    queries = [
        TakeQuery(stranger, wake_up_id=wake_up_id),
        TakeQuery(made.deliveries[1].device_id, wake_up_id=wake_up_id),
        TakeQuery(stranger, message_id=made.message_id),
        TakeQuery(stranger, most=100),
    ]
    assert await store.take(queries) == [[], [], [], []]


# Stopping


async def test_a_cancel_before_any_hand_out_says_before_push_and_nothing_is_pushed_afterwards(store: MailboxStore) -> None:
    made = message(delivery(an_id()), delivery(an_id()))
    await put(store, made)
    ended = (await store.cancel(made.key.sender_id, [made.message_id]))[made.message_id]
    assert [(each.state, each.stop_point) for each in ended] == [(State.CANCELLED, StopPoint.BEFORE_PUSH)] * 2
    assert await claim(store, await a_session(store), made) == []
    again = (await store.cancel(made.key.sender_id, [made.message_id]))[made.message_id]
    assert {each.stop_point for each in again} == {StopPoint.BEFORE_PUSH}, "a repeated call gets the first answer again"


@pytest.mark.parametrize("outcome", [None, PUSHED, RETRY, RELEASED, QUARANTINED])
async def test_a_cancel_after_a_hand_out_says_that_a_push_may_have_left(store: MailboxStore, outcome: int | None) -> None:
    made = message()
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    if outcome is not None:
        await store.report(session, [report(wake_up, outcome)])
    (ended,) = (await store.cancel(made.key.sender_id, [made.message_id]))[made.message_id]
    assert (ended.state, ended.stop_point) == (State.CANCELLED, StopPoint.PUSH_MAY_HAVE_LEFT)
    # The report of what was in the air comes too late to change anything.
    await store.report(session, [report(wake_up, PUSHED)])
    assert await states(store, made) == [(State.CANCELLED, Reason.CANCELLED_BY_SENDER)]


async def test_a_cancel_that_waited_for_a_fetch_sees_it(store: MailboxStore, sql: Connection, urls: dict[str, str]) -> None:
    made = message()
    await put(store, made)
    other = await connect(urls["admin"], search_path="fetch")

    try:
        async with asyncio.timeout(LIMIT_S):
            # Both begin before either can go on; who came first goes first.
            async with other.transaction():
                await other.execute("SELECT FROM open_deliveries WHERE message_id = $1 FOR UPDATE", made.message_id)
                taking = asyncio.create_task(take(store, made))
                await until_locked_out(sql, 1)
                cancelling = asyncio.create_task(store.cancel(made.key.sender_id, [made.message_id]))
                await until_locked_out(sql, 2)
            taken, cancelled = await asyncio.gather(taking, cancelling)
    finally:
        await other.close()
    assert len(taken) == 1
    (ended,) = cancelled[made.message_id]
    assert (ended.state, ended.stop_point) == (State.CANCELLED, StopPoint.PUSH_MAY_HAVE_LEFT)
    assert [each[2] for each in await journal(sql, made)] == [State.QUEUED, State.FETCHED, State.CANCELLED]


async def test_a_message_ends_once_whoever_comes_at_the_same_time(store: MailboxStore, sql: Connection) -> None:
    for _ in range(10):
        made = message()
        await put(store, made)
        async with asyncio.timeout(LIMIT_S):
            (answer,), cancelled, closed = await asyncio.gather(
                store.acknowledge([ack(made)]),
                store.cancel(made.key.sender_id, [made.message_id]),
                store.close_devices({made.deliveries[0].device_id: Reason.UNREGISTERED}),
            )
        (won,) = {state for state, _ in await states(store, made)}
        (ended,) = cancelled[made.message_id]
        assert ended.state is won
        assert (answer.verdict is Verdict.ACCEPTED) == (won is State.DELIVERED)
        assert (closed != []) == (won is State.UNDELIVERED)
        assert [state for _, kind, state in await journal(sql, made) if kind == 1 and state.terminal] == [won]


async def test_a_block_ends_what_waits_of_that_sender_and_nothing_else(store: MailboxStore) -> None:
    subscriber, sender = SubscriberId(an_id()), SenderId(an_id())

    def of(content_class: int, sender_id: SenderId = sender, subscriber_id: SubscriberId = subscriber) -> NewMessage:
        made = message(content_class=content_class, subscriber_id=subscriber_id)
        return replace(made, key=replace(made.key, sender_id=sender_id))

    service, advertising, stranger, neighbour = of(1), of(2), of(2, SenderId(an_id())), of(2, sender, SubscriberId(an_id()))
    await put(store, service, advertising, stranger, neighbour)
    (ended,) = await store.block(subscriber, sender, advertising_only=True)
    assert (ended.message_id, ended.state, ended.stop_point) == (advertising.message_id, State.BLOCKED, StopPoint.BEFORE_PUSH)
    assert await states(store, advertising) == [(State.BLOCKED, Reason.ADVERTISING_BLOCKED)]
    assert await claim(store, await a_session(store), advertising) == []
    (ended,) = await store.block(subscriber, sender, advertising_only=False)
    assert ended.message_id == service.message_id
    assert await states(store, service) == [(State.BLOCKED, Reason.SENDER_BLOCKED)]
    assert await states(store, stranger) == await states(store, neighbour) == [(State.QUEUED, 0)]


# Leases


async def test_a_wake_up_is_leased_to_one_session_and_at_once_to_the_next_when_that_ends(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    first, second = await a_session(store), await a_session(store)
    (wake_up,) = await claim(store, first, made)
    assert (wake_up.fence, wake_up.attempts, wake_up.app_id) == (1, 0, made.app_id)
    assert await claim(store, second, made) == []
    await store.end_sessions([first])
    (again,) = await claim(store, second, made)
    assert (again.wake_up_id, again.fence) == (wake_up.wake_up_id, 2)


async def test_sessions_that_claim_at_the_same_time_share_the_work_without_overlap(store: MailboxStore) -> None:
    app = AppId(f"app-{an_id().hex()}")
    made = [message(app_id=app) for _ in range(40)]
    await put(store, *made)
    sessions = [await a_session(store) for _ in range(4)]
    claimed = await asyncio.gather(*(store.claim(session, [(app, IOS, 15)]) for session in sessions))
    ids = [wake_up.message_id for each in claimed for wake_up in each]
    assert len(ids) == len(set(ids))
    rest = await store.claim(sessions[0], [(app, IOS, 100)])
    assert {*ids, *(wake_up.message_id for wake_up in rest)} == {each.message_id for each in made}
    assert max(len(each) for each in claimed) <= 15


async def test_what_is_urgent_is_claimed_first(store: MailboxStore) -> None:
    app = AppId(f"app-{an_id().hex()}")
    low, normal, high = (message(app_id=app, priority=priority) for priority in (1, 2, 3))
    await put(store, low, normal, high)
    session = await a_session(store)
    order = [(await store.claim(session, [(app, IOS, 1)]))[0].message_id for _ in range(3)]
    assert order == [high.message_id, normal.message_id, low.message_id]


async def test_a_report_with_a_stale_fence_or_of_another_session_changes_nothing(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    first, second = await a_session(store), await a_session(store)
    (old,) = await claim(store, first, made)
    await store.end_sessions([first])
    (new,) = await claim(store, second, made)
    for session, late in ((first, old), (second, old), (first, new)):
        for outcome in (PUSHED, TOKEN_GONE, RETRY):
            await store.report(session, [report(late, outcome)])
    assert await states(store, made) == [(State.QUEUED, 0)]
    await store.report(second, [report(new, PUSHED)])
    assert await states(store, made) == [(State.PUSHED, 0)]
    # The fence is used up.
    await store.report(second, [report(new, RETRY)])
    assert await claim(store, second, made) == []


async def test_the_leases_of_a_session_that_was_not_seen_for_a_while_are_found_and_released(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    vanished, living = await a_session(store), await a_session(store)
    await claim(store, vanished, made)
    assert vanished not in await store.lost_sessions()
    await sql.execute("UPDATE wake_up_sessions SET seen_at = now() - interval '1 minute' WHERE session_id = $1", vanished)
    lost = await store.lost_sessions()
    assert vanished in lost
    assert living not in lost
    await store.end_sessions(lost)
    assert len(await claim(store, living, made)) == 1


async def test_a_claim_that_commits_after_its_session_ended_is_found_and_released(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    ended = await a_session(store)
    await store.end_sessions([ended])
    await claim(store, ended, made)
    assert ended in await store.lost_sessions()
    await store.end_sessions(await store.lost_sessions())
    assert len(await claim(store, await a_session(store), made)) == 1


@pytest.mark.parametrize("outcome", [RETRY, RELEASED])
async def test_what_is_to_be_tried_again_waits_for_its_time(store: MailboxStore, sql: Connection, outcome: int) -> None:
    made = message()
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, outcome, retry_in=timedelta(minutes=20), reason=28)])
    assert await claim(store, session, made) == []
    waits = "SELECT next_attempt_at - now() FROM open_deliveries WHERE message_id = $1"
    assert timedelta(minutes=19) < await sql.fetchval(waits, made.message_id) <= timedelta(minutes=20)
    await sql.execute("UPDATE open_deliveries SET next_attempt_at = now() WHERE message_id = $1", made.message_id)
    (again,) = await claim(store, session, made)
    assert (again.fence, again.attempts) == (2, 1 if outcome == RETRY else 0)


async def test_a_time_to_try_of_a_dispatcher_that_knows_moments_only_holds_within_what_is_possible(
    store: MailboxStore, sql: Connection
) -> None:
    """The release before sends its own clock's moment: a clock that is ahead must not put the next try off by as much."""
    made = message()
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    at = datetime.now(UTC) + timedelta(minutes=20)
    await store.report(session, [report(wake_up, RETRY, retry_at=at)])
    assert await sql.fetchval("SELECT next_attempt_at FROM open_deliveries WHERE message_id = $1", made.message_id) == at
    await sql.execute("UPDATE open_deliveries SET next_attempt_at = now() WHERE message_id = $1", made.message_id)
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, RETRY, retry_at=datetime.now(UTC) + timedelta(minutes=40))])
    assert len(await claim(store, session, made)) == 1


async def test_a_wake_up_says_what_is_left_of_its_lifetime_by_the_databases_clock(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    (wake_up,) = await claim(store, await a_session(store), made)
    left = wake_up.expires_at - datetime.now(UTC)
    assert abs(wake_up.expires_in - left) < timedelta(seconds=LIMIT_S)


async def test_a_quarantined_wake_up_is_not_pushed_again_and_stays_fetchable(store: MailboxStore) -> None:
    made = message()
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, QUARANTINED)])
    (record,) = await store.statuses(made.key.sender_id, [made.message_id])
    assert (record.deliveries[0].state, record.deliveries[0].push_reason) == (State.QUEUED, Reason.PUSH_QUARANTINED)
    assert await claim(store, session, made) == []
    assert len(await take(store, made)) == 1


async def test_a_dead_token_ends_the_delivery_after_a_grace_in_which_the_device_may_fetch(store: MailboxStore, sql: Connection) -> None:
    made, saved = message(), message()
    await put(store, made, saved)
    session = await a_session(store)
    for each in (made, saved):
        (wake_up,) = await claim(store, session, each)
        await store.report(session, [report(wake_up, TOKEN_GONE)])
    await sweep(store)
    assert await states(store, made) == [(State.QUEUED, 0)]
    assert await claim(store, session, made) == [], "nothing is pushed to a dead token in the grace"
    assert len(await take(store, saved)) == 1
    await store.acknowledge([ack(saved)])
    grace = await sql.fetchval("SELECT closes_at - now() FROM open_deliveries WHERE message_id = $1", made.message_id)
    assert timedelta() < grace <= rules.DEAD_TOKEN_GRACE
    await sql.execute("UPDATE open_deliveries SET closes_at = now() - interval '1 ms' WHERE message_id = $1", made.message_id)
    await sweep(store)
    assert await states(store, made) == [(State.UNDELIVERED, Reason.TOKEN_GONE)]
    assert await states(store, saved) == [(State.DELIVERED, 0)]


@pytest.mark.parametrize("taken_first", [True, False])
async def test_a_dead_token_ends_nothing_that_the_device_has_taken(store: MailboxStore, sql: Connection, taken_first: bool) -> None:
    made = message()
    await put(store, made)
    (wake_up,) = await claim(store, await a_session(store), made)
    session = await sql.fetchval("SELECT session_id FROM open_deliveries WHERE message_id = $1", made.message_id)
    if taken_first:
        await take(store, made)
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    if not taken_first:
        await take(store, made)
    row = await sql.fetchrow(
        "SELECT closes_at = expires_at AS whole, close_reason FROM open_deliveries WHERE message_id = $1", made.message_id
    )
    assert row is not None
    assert (row["whole"], row["close_reason"]) == (True, Reason.LIFETIME_OVER)


async def test_a_dead_token_shortly_before_the_end_of_the_lifetime_ends_as_expired(store: MailboxStore, sql: Connection) -> None:
    made = message(lifetime=timedelta(seconds=30))
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    assert await sql.fetchval("SELECT closes_at = expires_at FROM open_deliveries WHERE message_id = $1", made.message_id)
    assert await push_reasons(store, made) == [Reason.TOKEN_GONE]
    await overdue(sql, made)
    await sweep(store)
    assert await states(store, made) == [(State.EXPIRED, Reason.LIFETIME_OVER)]


async def test_a_dead_token_gives_the_grace_to_everything_its_device_has_not_fetched_and_to_nothing_else(
    store: MailboxStore, sql: Connection
) -> None:
    dead, neighbour, app = an_id(), an_id(), AppId(f"app-{an_id().hex()}")
    pushed, fetched, tokenless, waiting, told = (message(delivery(dead), delivery(neighbour), app_id=app) for _ in range(5))
    other_app = message(delivery(dead))
    tokenless = replace(tokenless, deliveries=(delivery(dead, push_reason=Reason.NO_PUSH_TOKEN),))
    await put(store, pushed, fetched, tokenless, told, other_app)
    session = await a_session(store)
    wake_ups: dict[tuple[bytes, bytes], WakeUp] = {(each.message_id, each.device_id): each for each in await claim(store, session, told)}
    await store.report(session, [report(wake_ups[pushed.message_id, device], PUSHED) for device in (dead, neighbour)])
    await take(store, fetched)
    await put(store, waiting)
    await store.report(session, [report(wake_ups[told.message_id, dead], TOKEN_GONE)])
    grace, lifetime = (Reason.TOKEN_GONE, True), (Reason.LIFETIME_OVER, False)
    for each in (pushed, waiting, told):
        assert await closing(sql, each) == [grace, lifetime]
        assert await push_reasons(store, each) == [Reason.TOKEN_GONE, 0]
    assert await closing(sql, tokenless) == await closing(sql, other_app) == [grace]
    assert await closing(sql, fetched) == [lifetime, lifetime]
    await store.end_sessions([session])
    claimed = {(each.message_id, each.device_id) for each in await claim(store, await a_session(store), told)}
    assert claimed == {(fetched.message_id, dead)} | {(each.message_id, neighbour) for each in (fetched, waiting, told)}
    for each in (pushed, waiting, told, tokenless, other_app):
        await grace_over(sql, each)
    await sweep(store)
    gone = (State.UNDELIVERED, Reason.TOKEN_GONE)
    assert await states(store, pushed) == [gone, (State.PUSHED, 0)]
    assert await states(store, tokenless) == await states(store, other_app) == [gone]
    assert await states(store, fetched) == [(State.FETCHED, 0), (State.QUEUED, 0)]
    assert [each[2] for each in await journal(sql, pushed) if each[0] == dead] == [State.QUEUED, State.PUSHED, State.UNDELIVERED]


@pytest.mark.parametrize("outcome", [PUSHED, RETRY, QUARANTINED, RELEASED, TOKEN_GONE, None])
async def test_what_was_being_pushed_when_its_device_was_given_up_stays_off_whatever_becomes_of_it(
    store: MailboxStore, sql: Connection, outcome: int | None
) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    told, held = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, told, held)
    first, second = await a_session(store), await a_session(store)
    wake_ups = {each.message_id: each for each in await claim(store, first, told)}
    await store.report(first, [report(wake_ups[told.message_id], TOKEN_GONE)])
    before = await sql.fetchval("SELECT closes_at FROM open_deliveries WHERE message_id = $1", held.message_id)
    if outcome is None:
        await store.end_sessions([first])
    else:
        await store.report(first, [report(wake_ups[held.message_id], outcome, reason=28 if outcome == RETRY else 0)])
    assert await closing(sql, held) == [(Reason.TOKEN_GONE, True)]
    assert before == await sql.fetchval("SELECT closes_at FROM open_deliveries WHERE message_id = $1", held.message_id), "one grace"
    assert await push_reasons(store, held) == [Reason.TOKEN_GONE]
    assert await claim(store, second, told) == []
    assert await store.requeue(app, IOS, (DeviceId(bytes(16)), rules.BEFORE_ALL)) == []


async def test_what_was_quarantined_before_its_device_was_given_up_is_not_requeued_any_more(store: MailboxStore, sql: Connection) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    failed, told = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, failed)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, failed)
    await store.report(session, [report(wake_up, QUARANTINED)])
    await put(store, told)
    (wake_up,) = await claim(store, session, told)
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    assert await store.requeue(app, IOS, (DeviceId(bytes(16)), rules.BEFORE_ALL)) == []
    assert await closing(sql, failed) == [(Reason.TOKEN_GONE, True)]


async def test_a_stale_report_of_a_dead_token_ends_nothing_of_its_device(store: MailboxStore, sql: Connection) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    made, other = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, made)
    first, second = await a_session(store), await a_session(store)
    (old,) = await claim(store, first, made)
    await store.end_sessions([first])
    (new,) = await claim(store, second, made)
    await put(store, other)
    for session, late in ((first, old), (second, old), (first, new)):
        await store.report(session, [report(late, TOKEN_GONE)])
    assert await closing(sql, made) == await closing(sql, other) == [(Reason.LIFETIME_OVER, False)]
    assert [each.message_id for each in await claim(store, first, made)] == [other.message_id]


@pytest.mark.parametrize("session_lives", [True, False])
async def test_a_dead_token_is_told_also_by_a_push_whose_message_has_ended_as_long_as_its_session_lives(
    store: MailboxStore, sql: Connection, session_lives: bool
) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    pushed, cancelled = (message(delivery(device), app_id=app) for _ in range(2))
    session = await a_session(store)
    await put(store, pushed)
    (wake_up,) = await claim(store, session, pushed)
    await store.report(session, [report(wake_up, PUSHED)])
    await put(store, cancelled)
    (wake_up,) = await claim(store, session, cancelled)
    await store.cancel(cancelled.key.sender_id, [cancelled.message_id])
    if not session_lives:
        await store.end_sessions([session])
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    assert await closing(sql, pushed) == [(Reason.TOKEN_GONE, True) if session_lives else (Reason.LIFETIME_OVER, False)]
    assert await states(store, cancelled) == [(State.CANCELLED, Reason.CANCELLED_BY_SENDER)]


async def test_a_device_with_more_deliveries_than_a_turn_takes_is_given_up_whole(
    store: MailboxStore, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sealpushd.fetch.store.GRACE_ROWS_MAX", 3)
    app, devices = AppId(f"app-{an_id().hex()}"), [an_id(), an_id()]
    for count in (8, 9):
        made = [message(delivery(devices[n % 2]), app_id=app) for n in range(count)]
        await put(store, *made)
        session = await a_session(store)
        wake_ups = [each for each in await claim(store, session, made[0]) if each.message_id in {made[0].message_id, made[1].message_id}]
        await store.report(session, [report(each, TOKEN_GONE) for each in wake_ups])
        for each in made:
            assert await closing(sql, each) == [(Reason.TOKEN_GONE, True)]
        await store.end_sessions([session])


async def test_the_grace_of_what_a_device_fetches_is_over_and_that_of_the_rest_goes_on(store: MailboxStore, sql: Connection) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    made, other = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, made, other)
    session = await a_session(store)
    wake_up, _ = await claim(store, session, made)
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    assert len(await take(store, made)) == 1
    assert await closing(sql, made) == [(Reason.LIFETIME_OVER, False)]
    assert await closing(sql, other) == [(Reason.TOKEN_GONE, True)]


async def test_a_device_with_a_new_token_is_pushed_again_and_what_is_in_its_grace_waits_to_be_fetched(
    store: MailboxStore, sql: Connection
) -> None:
    device, app = an_id(), AppId(f"app-{an_id().hex()}")
    before, after = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, before)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, before)
    await store.report(session, [report(wake_up, TOKEN_GONE)])
    # Registered: the recipient resolves without a reason again.
    await put(store, after)
    (wake_up,) = await claim(store, session, after)
    assert wake_up.message_id == after.message_id
    await store.report(session, [report(wake_up, PUSHED)])
    assert await closing(sql, before) == [(Reason.TOKEN_GONE, True)]
    assert await closing(sql, after) == [(Reason.LIFETIME_OVER, False)]
    (taken,) = await store.take([TakeQuery(DeviceId(device), most=10)])
    assert [each.message_id for each in taken] == [before.message_id, after.message_id]
    await grace_over(sql, before)
    await sweep(store)
    assert await states(store, before) == await states(store, after) == [(State.FETCHED, 0)]


# The journal


async def all_events(store: MailboxStore, after: Position, page: int = 7) -> tuple[list[Event], Position]:
    found: list[Event] = []
    while True:
        events, after = await store.events(after, page)
        found += events
        if len(events) < page:
            return found, after


async def test_the_journal_waits_for_no_transaction_and_misses_nothing_of_one_that_commits_late(
    store: MailboxStore, urls: dict[str, str]
) -> None:
    start = await store.now_position()
    late = await connect(urls["admin"], search_path="fetch")
    slow, early = message(), [message() for _ in range(9)]
    try:
        async with late.transaction():
            await late.execute(
                "INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
                " VALUES ($1, $1, $1, $1, 0, 1, 1, 0)",
                slow.message_id,
            )
            for each in early:
                await put(store, each)
            seen, position = await all_events(store, start)
            assert [event.message_id for event in seen] == [each.message_id for each in early], "nobody waits for what is not committed"
            assert await all_events(store, position) == ([], position)
    finally:
        await late.close()
    seen, position = await all_events(store, position)
    assert [event.message_id for event in seen] == [slow.message_id], "once, and although its number is lower"
    assert await all_events(store, position) == ([], position)


async def test_a_reader_from_now_on_sees_everything_that_commits_later(store: MailboxStore) -> None:
    before, after = message(), [message() for _ in range(10)]
    await put(store, before)
    position = await store.now_position()
    for each in after:
        await put(store, each)
    seen, _ = await all_events(store, position)
    assert [event.message_id for event in seen] == [each.message_id for each in after]


async def test_concurrent_writers_lose_no_event_to_a_reader_that_pages_meanwhile(store: MailboxStore) -> None:
    position = await store.now_position()
    made = [message() for _ in range(60)]
    wanted = {each.message_id for each in made}
    writing = asyncio.gather(*(put(store, each) for each in made))
    seen: list[MessageId] = []
    async with asyncio.timeout(LIMIT_S):
        while not writing.done() or len(seen) < len(made):
            events, position = await store.events(position, 5)
            seen += [event.message_id for event in events if event.message_id in wanted]
        await writing
    assert sorted(seen) == sorted(each.message_id for each in made)


# The whole state machine against a model

# From DELIVERY.md; a block also ends what was pushed already.
LEGAL = {
    None: {State.QUEUED, State.BLOCKED, State.UNDELIVERED},
    State.QUEUED: {
        State.PUSHED,
        State.FETCHED,
        State.UNDELIVERED,
        State.BLOCKED,
        State.EXPIRED,
        State.CANCELLED,
        State.REPLACED,
    },
    State.PUSHED: {State.QUEUED, State.FETCHED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED},
    State.FETCHED: {State.DELIVERED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED},
}


@dataclass
class Modelled:
    """One delivery as it should be."""

    of: NewMessage
    device: int
    state: State
    reason: int
    due: bool
    fence: int = 0
    session: int | None = None
    token_gone: bool = False
    quarantined: bool = False
    ack: AckOutcome | None = None
    late: bool = False
    read: bool = False
    read_first: bool = False

    def end(self, state: State, reason: int) -> None:
        if not self.state.terminal:
            self.state, self.reason, self.session, self.due = state, reason, None, False


@dataclass
class Machine:
    """Does the same to the store and to the model, and compares."""

    store: MailboxStore
    sql: Connection
    sender: SenderId = field(default_factory=lambda: SenderId(an_id()))
    subscriber: SubscriberId = field(default_factory=lambda: SubscriberId(an_id()))
    app: AppId = field(default_factory=lambda: AppId(f"app-{an_id().hex()}"))
    devices: list[bytes] = field(default_factory=lambda: [an_id(), an_id()])
    messages: list[NewMessage] = field(default_factory=list)
    model: list[Modelled] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)
    ended_sessions: set[int] = field(default_factory=set)
    leases: list[tuple[int, WakeUp]] = field(default_factory=list)
    # States seen by status reads, by delivery.
    ended: dict[tuple[bytes, bytes], State] = field(default_factory=dict)

    async def do(self, operation: tuple[str, int, int]) -> None:
        name, a, b = operation
        await getattr(self, name)(a, b)

    def pick(self, n: int) -> Modelled | None:
        return self.model[n % len(self.model)] if self.model else None

    async def put(self, a: int, b: int) -> None:
        deliveries = (
            delivery(self.devices[0], stanza=b"" if a % 5 == 0 else b"s", push_reason={1: 111, 2: 105}.get(a % 5, 0)),
            delivery(self.devices[1]),
        )
        made = message(
            *deliveries[: 1 + b % 2],
            subscriber_id=self.subscriber,
            app_id=self.app,
            content_class=1 + a % 2,
            blocked=Reason.SENDER_BLOCKED if a % 7 == 3 else 0,
            replace_hash=b"h" * 32 if b % 3 == 0 else b"",
        )
        made = replace(made, key=replace(made.key, sender_id=self.sender))
        await put(self.store, made)
        self.messages.append(made)
        if made.replace_hash:
            for each in self.model:
                if each.of.replace_hash and any(each.of.deliveries[each.device].device_id == d.device_id for d in made.deliveries):
                    each.end(State.REPLACED, Reason.REPLACED_BY_NEWER)
        for n, each_delivery in enumerate(made.deliveries):
            state, reason = State.QUEUED, 0
            if made.blocked:
                state, reason = State.BLOCKED, made.blocked
            elif not each_delivery.stanza:
                state, reason = State.UNDELIVERED, each_delivery.push_reason or Reason.NO_PREKEY
            each = Modelled(made, n, state, reason, due=state is State.QUEUED and not each_delivery.push_reason)
            each.token_gone = state is State.QUEUED and each_delivery.push_reason == Reason.TOKEN_GONE
            self.model.append(each)

    async def session(self, a: int, b: int) -> None:
        self.sessions.append(await a_session(self.store))

    async def end_session(self, a: int, b: int) -> None:
        if self.sessions:
            n = a % len(self.sessions)
            await self.store.end_sessions([self.sessions[n]])
            self.ended_sessions.add(n)
            for each in self.model:
                if each.session == n:
                    each.session = None

    async def claim(self, a: int, b: int) -> None:
        if not self.sessions:
            return
        n = a % len(self.sessions)
        claimed = await self.store.claim(self.sessions[n], [(self.app, IOS, 100)])
        due = [each for each in self.model if each.due and each.session is None and not each.state.terminal]
        assert {(each.message_id, each.device_id) for each in claimed} == {self.key(each) for each in due}
        for each in due:
            each.fence += 1
            each.session = n
        self.leases += [(n, wake_up) for wake_up in claimed]
        assert all(self.at((each.message_id, each.device_id)).fence == each.fence for each in claimed)

    async def report(self, a: int, b: int) -> None:
        if not self.leases:
            return
        # Any hand-out of the past may report, also twice.
        n, wake_up = self.leases[a % len(self.leases)]
        outcome = 1 + b % 5
        await self.store.report(self.sessions[n], [report(wake_up, outcome)])
        each = self.at((wake_up.message_id, wake_up.device_id))
        taken = each.session == n and each.fence == wake_up.fence and not each.state.terminal
        if outcome == TOKEN_GONE and (taken or (each.state.terminal and n not in self.ended_sessions)):
            for other in self.model:
                if self.key(other)[1] == wake_up.device_id and other.state in (State.QUEUED, State.PUSHED):
                    other.token_gone, other.due, other.quarantined = True, False, False
        if not taken:
            return
        each.session = None
        # What was taken off the queue while it was held stays off.
        each.quarantined = each.due and outcome == QUARANTINED
        each.due = each.due and outcome in (RETRY, RELEASED)
        if outcome == PUSHED and each.state is State.QUEUED:
            each.state = State.PUSHED

    async def requeue(self, a: int, b: int) -> None:
        requeued = await self.store.requeue(self.app, IOS, (DeviceId(bytes(16)), rules.BEFORE_ALL))
        hit = [each for each in self.model if each.quarantined and not each.state.terminal]
        assert {(message_id, device_id) for device_id, message_id in requeued} == {self.key(each) for each in hit}
        for each in hit:
            each.quarantined, each.due = False, True

    async def take(self, a: int, b: int) -> None:
        device = DeviceId(self.devices[a % 2])
        (taken,) = await self.store.take([TakeQuery(device, most=100)])
        waiting = [each for each in self.model if self.key(each)[1] == device and not each.state.terminal]
        assert [each.message_id for each in taken] == sorted(self.key(each)[0] for each in waiting)
        for each in waiting:
            each.state, each.token_gone = State.FETCHED, False

    async def acknowledge(self, a: int, b: int) -> None:
        each = self.pick(a)
        if each is None:
            return
        outcome, right = AckOutcome(1 + b % 4), b % 3 != 2
        given_ack = ack(each.of, outcome, device=each.device)
        wrong = {"content_id": ContentId(an_id())} if b % 2 else {"envelope_digest": bytes(32)}
        (answer,) = await self.store.acknowledge([given_ack if right else replace(given_ack, **wrong)])
        if not right:
            assert answer.verdict is Verdict.UNKNOWN
        elif outcome is AckOutcome.READ:
            assert (answer.verdict is Verdict.ACCEPTED) == (each.state is State.DELIVERED or not each.state.terminal)
            each.read = each.read or each.state is State.DELIVERED
            each.read_first = each.read_first or not each.state.terminal
        elif not each.state.terminal:
            assert answer.verdict is Verdict.ACCEPTED
            each.end(rules.ack_state(outcome), 0)
            each.ack = outcome
            each.read = each.read_first and outcome is AckOutcome.DELIVERED
        else:
            assert answer.verdict is (Verdict.ACCEPTED if each.ack is outcome else Verdict.LATE)
            each.late = each.late or each.ack is not outcome
        if right:
            assert answer.state is each.state

    async def cancel(self, a: int, b: int) -> None:
        if not self.messages:
            return
        made = self.messages[a % len(self.messages)]
        answers = (await self.store.cancel(self.sender, [made.message_id]))[made.message_id]
        for answer in answers:
            each = self.at((answer.message_id, answer.device_id))
            if each.state is State.CANCELLED:
                assert answer.stop_point in (StopPoint.BEFORE_PUSH, StopPoint.PUSH_MAY_HAVE_LEFT)
            elif each.state.terminal:
                assert answer.stop_point is StopPoint.TOO_LATE
            else:
                before = each.fence == 0 and each.state is State.QUEUED
                assert answer.stop_point is (StopPoint.BEFORE_PUSH if before else StopPoint.PUSH_MAY_HAVE_LEFT)
            each.end(State.CANCELLED, Reason.CANCELLED_BY_SENDER)
            assert answer.state is each.state

    async def block(self, a: int, b: int) -> None:
        advertising_only = a % 2 == 0
        ended = await self.store.block(self.subscriber, self.sender, advertising_only=advertising_only)
        hit = [each for each in self.model if not each.state.terminal and (not advertising_only or each.of.content_class == 2)]
        assert {(each.message_id, each.device_id) for each in ended} == {self.key(each) for each in hit}
        for each in hit:
            each.end(State.BLOCKED, Reason.ADVERTISING_BLOCKED if advertising_only else Reason.SENDER_BLOCKED)

    async def close_devices(self, a: int, b: int) -> None:
        device = DeviceId(self.devices[a % 2])
        await self.store.close_devices({device: Reason.UNREGISTERED})
        for each in self.model:
            if self.key(each)[1] == device:
                each.end(State.UNDELIVERED, Reason.UNREGISTERED)

    async def expire(self, a: int, b: int) -> None:
        if not self.messages:
            return
        made = self.messages[a % len(self.messages)]
        await overdue(self.sql, made)
        await sweep(self.store)
        for each in self.model:
            if each.of is made:
                gone = each.token_gone
                each.end(State.UNDELIVERED if gone else State.EXPIRED, Reason.TOKEN_GONE if gone else Reason.LIFETIME_OVER)

    async def grace_over(self, a: int, b: int) -> None:
        await self.sql.execute(
            "UPDATE open_deliveries SET closes_at = now() - interval '1 ms' WHERE close_reason = 105 AND sender_id = $1", self.sender
        )
        await sweep(self.store)
        for each in self.model:
            if each.token_gone:
                each.end(State.UNDELIVERED, Reason.TOKEN_GONE)

    @staticmethod
    def key(each: Modelled) -> tuple[bytes, bytes]:
        return each.of.message_id, each.of.deliveries[each.device].device_id

    def at(self, key: tuple[bytes, bytes]) -> Modelled:
        return next(each for each in self.model if self.key(each) == key)

    async def compare(self) -> None:
        rows = await self.sql.fetch(
            "SELECT d.* FROM deliveries d JOIN messages m USING (message_id) WHERE m.sender_id = $1 AND m.message_id = ANY ($2::uuid[])",
            self.sender,
            [each.message_id for each in self.messages],
        )
        table = {(row["message_id"], row["device_id"]): row for row in rows}
        assert set(table) == {self.key(each) for each in self.model}
        for each in self.model:
            row = table[self.key(each)]
            assert (State(row["state"]), row["reason"]) == (each.state, each.reason)
            assert (row["late_ack_at"] is not None, row["read_at"] is not None) == (each.late, each.read)
            assert each.state.terminal or (row["push_reason"] == Reason.TOKEN_GONE) == each.token_gone
            before = self.ended.setdefault(self.key(each), each.state) if each.state.terminal else None
            assert before in (None, each.state), "a terminal state changed"
        still_open = [each for each in self.model if not each.state.terminal]
        waiting = sum(each.due and each.session is None for each in still_open)
        held = sum(each.session is not None for each in still_open)
        quarantined = sum(each.quarantined for each in still_open)
        counts = [(q.waiting, q.due, q.held, q.quarantined) for q in await self.store.queues() if q.app_id == self.app]
        assert counts == ([(waiting, waiting, held, quarantined)] if waiting or held or quarantined else [])

    async def verify(self) -> None:
        ids = [each.message_id for each in self.messages]
        still_open = await self.sql.fetch("SELECT message_id, device_id, fence FROM open_deliveries WHERE sender_id = $1", self.sender)
        assert {(row["message_id"], row["device_id"]): row["fence"] for row in still_open} == {
            self.key(each): each.fence for each in self.model if not each.state.terminal
        }
        kept = await self.sql.fetch("SELECT message_id FROM contents WHERE message_id = ANY ($1::uuid[])", ids)
        assert {row["message_id"] for row in kept} == {each.of.message_id for each in self.model if not each.state.terminal}
        replayed: dict[tuple[bytes, bytes], tuple[State, int]] = {}
        for row in await self.sql.fetch(
            "SELECT message_id, device_id, kind, state, reason FROM status_events WHERE message_id = ANY ($1::uuid[]) ORDER BY seq",
            ids,
        ):
            key, state = (row["message_id"], row["device_id"]), State(row["state"])
            before = replayed[key][0] if key in replayed else None
            if row["kind"] == 1:
                assert state in LEGAL.get(before, set()), f"{before!r} → {state!r}"
                replayed[key] = state, row["reason"]
            else:
                assert state is before
        assert replayed == {self.key(each): (each.state, each.reason) for each in self.model}
        for record in await self.store.statuses(self.sender, ids):
            each_state = [each.state for each in record.deliveries]
            assert each_state == [self.at((record.message_id, each.device_id)).state for each in record.deliveries]


OPERATIONS = (
    "put",
    "put",
    "session",
    "end_session",
    "claim",
    "claim",
    "report",
    "report",
    "requeue",
    "take",
    "acknowledge",
    "acknowledge",
    "cancel",
    "block",
    "close_devices",
    "expire",
    "grace_over",
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    first=st.lists(st.tuples(st.sampled_from(("put", "session")), st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=5),
    rest=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 40), st.integers(0, 40)), max_size=25),
)
async def test_whatever_happens_in_whatever_order_the_mailbox_does_what_the_model_does(
    store: MailboxStore, sql: Connection, first: Sequence[tuple[str, int, int]], rest: Sequence[tuple[str, int, int]]
) -> None:
    machine = Machine(store, sql)
    for operation in (*first, *rest):
        await machine.do(operation)
        await machine.compare()
    await machine.verify()


# Partitions


async def test_partitions_exist_for_six_weeks_ahead_and_making_them_again_makes_none(sql: Connection) -> None:
    for parent in ("messages", "contents", "deliveries", "status_events"):
        names = {
            row[0] for row in await sql.fetch("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = $1::regclass", parent)
        }
        for weeks in range(-1, 7):
            year, week, _ = (datetime.now(UTC) + timedelta(weeks=weeks)).isocalendar()
            assert f"{parent}_{year:04}w{week:02}" in names
    await sql.execute("SET ROLE sealpush_maintenance")
    try:
        assert await sql.fetchval('SELECT "fetch".ensure_partitions()') == 0
    finally:
        await sql.execute("RESET ROLE")


async def test_only_partitions_past_their_retention_are_dropped(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    monday = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monday -= timedelta(days=monday.weekday())
    names = {}
    for weeks in (6, 20):
        start = monday - timedelta(weeks=weeks)
        year, week, _ = start.isocalendar()
        for parent in ("contents", "messages"):
            names[parent, weeks] = f"{parent}_{year:04}w{week:02}"
            await sql.execute(
                f"CREATE TABLE {names[parent, weeks]} PARTITION OF {parent} FOR VALUES"
                f" FROM ('{await sql.fetchval('SELECT uuid7_floor($1)::text', start)}')"
                f" TO ('{await sql.fetchval('SELECT uuid7_floor($1)::text', start + timedelta(weeks=1))}')"
            )
    await sql.execute("SET ROLE sealpush_maintenance")
    try:
        # A content is of no use after the longest lifetime; a status is kept for 90 days.
        assert await sql.fetchval('SELECT "fetch".drop_partitions()') == 3
        assert await sql.fetchval('SELECT "fetch".drop_partitions()') == 0
    finally:
        await sql.execute("RESET ROLE")
    left = {key for key, name in names.items() if await sql.fetchval("SELECT to_regclass($1)", name)}
    assert left == {("messages", 6)}
    await sql.execute(f"DROP TABLE {names['messages', 6]}")
    assert await states(store, made) == [(State.QUEUED, 0)]


# Over gRPC, as the other services call it


@dataclass
class World:
    served: Served
    publishing: MeshChannel
    dispatch: MeshChannel
    registration: MeshChannel

    @property
    def stub(self) -> Any:
        return mailbox_pb2_grpc.MailboxStub(self.publishing.channel)

    async def store(self, *messages: mailbox_pb2.NewMessage) -> list[mailbox_pb2.StoreResult]:
        answer = await self.publishing.call(self.stub.Store, mailbox_pb2.StoreRequest(messages=messages))
        return list(answer.results)

    def session(self) -> Any:
        stub: Any = mailbox_pb2_grpc.MailboxStub(self.dispatch.channel)
        return stub.WakeUpSession(metadata=self.dispatch.metadata())

    def events(self, request: mailbox_pb2.ReadEventsRequest) -> Any:
        return self.stub.ReadEvents(request, metadata=self.publishing.metadata(), timeout=LIMIT_S)


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with running_services(engines, mesh, urls, clock) as services:
        yield World(services["fetch"], *(services.channel("fetch", name) for name in ("publishing", "dispatch", "registration")))


async def test_the_same_key_twice_in_a_batch_stores_one_message_and_answers_both(world: World) -> None:
    first = message()
    same = replace(message(), key=first.key)
    other = replace(message(), key=replace(first.key, request_mac=b"o" * 32))
    one, two, three = await world.store(proto(first), proto(same), proto(other))
    assert (one.stored_now, two.stored_now, three.stored_now) == (True, False, False)
    assert {each.accepted.message_id for each in (one, two, three)} == {first.message_id}
    assert [each.accepted.other_request for each in (one, two, three)] == [False, False, True]
    (again,) = await world.store(proto(same))
    assert (again.stored_now, again.accepted.message_id) == (False, first.message_id)
    answer = await world.publishing.call(world.stub.LookupAccepted, mailbox_pb2.LookupAcceptedRequest(keys=[proto(other).key]))
    assert (answer.results[0].message_id, answer.results[0].other_request) == (first.message_id, True)


async def test_a_malformed_message_is_refused_by_its_field(world: World) -> None:
    good = proto(message())
    for fieldname, value in (("message_id", b"short"), ("subscriber_id", b""), ("content_id", b"x" * 17)):
        wrong = mailbox_pb2.NewMessage()
        wrong.CopyFrom(good)
        setattr(wrong, fieldname, value)
        with pytest.raises(InvalidRequest) as caught:
            await world.store(wrong)
        assert caught.value.field == fieldname
    twice = mailbox_pb2.NewMessage()
    twice.CopyFrom(good)
    twice.deliveries.append(good.deliveries[0])
    with pytest.raises(InvalidRequest, match="two deliveries"):
        await world.store(twice)
    with pytest.raises(InvalidRequest, match="at most 512"):
        await world.store(*[good] * 513)
    del good.deliveries[:]
    with pytest.raises(InvalidRequest, match="at least one"):
        await world.store(good)


def store_each(*messages: mailbox_pb2.NewMessage) -> mailbox_pb2.StoreRequest:
    return mailbox_pb2.StoreRequest(messages=messages, item_errors=True)


async def test_of_a_batch_a_message_that_is_wrong_is_refused_alone(world: World, store: MailboxStore) -> None:
    first, last = message(), message()
    wrong = proto(message())
    wrong.tag = "\x85"
    for batch in (store_each(proto(first), wrong, proto(last)), store_each(wrong)):
        results = (await world.publishing.call(world.stub.Store, batch)).results
        (refused,) = [each.refused for each in results if each.HasField("refused")]
        assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "tag")
        assert all(each.stored_now for each in results if not each.HasField("refused"))
    for each in (first, last):
        assert await states(store, each) == [(State.QUEUED, 0)]


async def test_a_message_id_that_another_key_has_taken_is_refused_alone_and_may_come_with_another(
    world: World, store: MailboxStore
) -> None:
    """Nothing is lost and nothing doubled: the key is free, and the other message as it was."""
    before, good = message(), message()
    taken = replace(message(), message_id=before.message_id, deliveries=before.deliveries)
    await put(store, before)
    one, two = (await world.publishing.call(world.stub.Store, store_each(proto(good), proto(taken)))).results
    assert one.stored_now
    assert (two.refused.code, two.refused.field) == (grpc.StatusCode.ABORTED.value[0], "message_id")
    assert two.refused.HasField("retry_after")
    assert await store.lookup_accepted([taken.key]) == [None]
    assert await states(store, before) == [(State.QUEUED, 0)]
    # A caller of the release before is told for the whole call.
    with pytest.raises(Aborted):
        await world.store(proto(taken), proto(good))
    again = replace(taken, message_id=MessageId(uuid7()))
    assert [each.stored_now for each in await world.store(proto(again))] == [True]


@pytest.mark.parametrize("far", [timedelta(days=-400), timedelta(days=400)])
async def test_a_message_id_of_a_time_far_off_is_refused_alone(world: World, store: MailboxStore, far: timedelta) -> None:
    """As of a publishing whose clock is wrong: what others store goes on."""
    good = message()
    at_ms = to_ms(datetime.now(UTC) + far)
    wrong = replace(message(), message_id=MessageId(at_ms.to_bytes(6, "big") + uuid7()[6:]))
    one, two = (await world.publishing.call(world.stub.Store, store_each(proto(wrong), proto(good)))).results
    assert (one.refused.code, one.refused.field) == (grpc.StatusCode.ABORTED.value[0], "message_id")
    assert two.stored_now
    assert await store.lookup_accepted([wrong.key]) == [None]


async def test_of_one_message_id_under_two_keys_in_a_batch_one_is_stored(world: World, store: MailboxStore) -> None:
    one = message()
    other = replace(message(), message_id=one.message_id, deliveries=one.deliveries)
    results = (await world.publishing.call(world.stub.Store, store_each(proto(one), proto(other)))).results
    assert [each.stored_now for each in results] == [True, False]
    assert results[1].refused.code == grpc.StatusCode.ABORTED.value[0]
    found = await store.lookup_accepted([one.key, other.key])
    assert [each is None for each in found] == [False, True]


async def test_the_same_key_and_id_for_another_request_is_not_told_as_stored(world: World) -> None:
    one = message()
    other = replace(one, key=replace(one.key, request_mac=b"o" * 32))
    first, second = await world.store(proto(one), proto(other))
    assert (first.stored_now, second.stored_now, second.accepted.other_request) == (True, False, True)


async def test_a_service_may_only_make_its_own_calls(world: World) -> None:
    stub: Any = mailbox_pb2_grpc.MailboxStub(world.registration.channel)
    answer = await refusal(stub.Store(mailbox_pb2.StoreRequest(), metadata=world.registration.metadata()))
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED


async def to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def read_wake_up(session: Any) -> mailbox_pb2.WakeUp:
    frame = await session.read()
    (wake_up,) = frame.wake_ups
    assert isinstance(wake_up, mailbox_pb2.WakeUp)
    return wake_up


def credit(of: NewMessage, amount: int = 1) -> mailbox_pb2.WakeUpSessionRequest:
    lane = mailbox_pb2.LaneCredit(app_id=of.app_id, platform=common_pb2.PLATFORM_IOS, credit=amount)
    return mailbox_pb2.WakeUpSessionRequest(credits=[lane])


async def test_a_session_gets_new_wake_ups_as_far_as_its_credit_goes(world: World) -> None:
    made = [message() for _ in range(3)]
    app = made[0].app_id
    async with asyncio.timeout(LIMIT_S):
        session = world.session()
        await session.write(credit(made[0], 2))
        await world.store(*(proto(replace(each, app_id=app)) for each in made))
        got: list[bytes] = []
        while len(got) < 2:
            got += [each.message_id for each in (await session.read()).wake_ups]
        assert len(got) == 2
        await session.write(credit(made[0]))
        got.append((await read_wake_up(session)).message_id)
        assert sorted(got) == sorted(each.message_id for each in made)
        session.cancel()


async def test_when_a_session_breaks_another_gets_its_wake_ups_with_a_new_fence(world: World) -> None:
    made = message()
    async with asyncio.timeout(LIMIT_S):
        first, second = world.session(), world.session()
        await first.write(credit(made))
        await world.store(proto(made))
        wake_up = await read_wake_up(first)
        await second.write(credit(made))
        first.cancel()
        again = await read_wake_up(second)
        second.cancel()
    assert (again.wake_up_id, again.fence, wake_up.fence) == (wake_up.wake_up_id, 2, 1)


async def test_the_last_reports_of_a_session_that_ends_are_written(world: World, store: MailboxStore) -> None:
    made = message()
    async with asyncio.timeout(LIMIT_S):
        session = world.session()
        await session.write(credit(made))
        await world.store(proto(made))
        wake_up = await read_wake_up(session)
        done = mailbox_pb2.WakeUpReport(
            message_id=wake_up.message_id,
            device_id=wake_up.device_id,
            fence=wake_up.fence,
            outcome=mailbox_pb2.WAKE_UP_OUTCOME_PUSHED,
            detail="a provider's word with a \0 in it",
        )
        await session.write(mailbox_pb2.WakeUpSessionRequest(reports=[done]))
        await session.done_writing()
        assert await session.read() is grpc.aio.EOF
    assert await states(store, made) == [(State.PUSHED, 0)]


async def test_a_report_that_means_nothing_fails_alone_and_its_wake_up_goes_out_again_in_a_while(
    world: World, store: MailboxStore, sql: Connection
) -> None:
    wrong, nobody, newer, good = (message() for _ in range(4))
    async with asyncio.timeout(LIMIT_S):
        session = world.session()
        await session.write(mailbox_pb2.WakeUpSessionRequest(credits=[mailbox_pb2.LaneCredit(app_id="\0", credit=1)]))
        await session.write(credit(good, 4))
        await world.store(*(proto(replace(each, app_id=good.app_id)) for each in (wrong, nobody, newer, good)))
        held: dict[bytes, mailbox_pb2.WakeUp] = {}
        while len(held) < 4:
            held.update((each.message_id, each) for each in (await session.read()).wake_ups)
        reports = [
            mailbox_pb2.WakeUpReport(message_id=each.message_id, device_id=each.device_id, fence=each.fence, outcome=outcome)
            for each, outcome in (
                (held[wrong.message_id], mailbox_pb2.WAKE_UP_OUTCOME_UNSPECIFIED),
                (held[nobody.message_id], mailbox_pb2.WAKE_UP_OUTCOME_PUSHED),
                (held[newer.message_id], mailbox_pb2.WAKE_UP_OUTCOME_RETRY),
                (held[good.message_id], mailbox_pb2.WAKE_UP_OUTCOME_PUSHED),
            )
        ]
        reports[1].message_id = b"short"
        reports[2].reason_code = 999  # type: ignore[assignment]  # of a dispatcher of a later release
        reports[2].retry_in.seconds = 60
        await session.write(mailbox_pb2.WakeUpSessionRequest(reports=reports))
        # The session goes on, and what it reported is written.
        more = replace(message(), app_id=good.app_id)
        await session.write(credit(more))
        await world.store(proto(more))
        assert (await read_wake_up(session)).message_id == more.message_id
        await session.done_writing()
        await to_the_end(session)
    assert await states(store, good) == [(State.PUSHED, 0)]
    rows = await sql.fetch(
        "SELECT message_id, attempts, next_attempt_at > now() + interval '20 s' AS later FROM open_deliveries"
        " WHERE message_id = ANY($1::uuid[])",
        [wrong.message_id, nobody.message_id, newer.message_id],
    )
    # Of `nobody` it is not known which lease the report was about: that one returned with the session.
    assert {row["message_id"]: (row["attempts"], row["later"]) for row in rows} == {
        wrong.message_id: (1, True),
        nobody.message_id: (0, False),
        newer.message_id: (1, True),
    }


async def test_a_reader_of_the_journal_goes_on_where_it_stopped(world: World) -> None:
    made = [message() for _ in range(5)]
    wanted = [each.message_id for each in made]
    reading = world.events(mailbox_pb2.ReadEventsRequest(consumer="t", from_now=True, page_size=2))
    position = (await reading.read()).position
    for each in made:
        await world.store(proto(each))
    seen: list[bytes] = []
    while len(seen) < 2:
        frame = await reading.read()
        seen += [each.message_id for each in frame.events if each.message_id in wanted]
        position = frame.position
    reading.cancel()
    reading = world.events(mailbox_pb2.ReadEventsRequest(consumer="t", position=position, page_size=1000))
    while len(seen) < len(made):
        frame = await reading.read()
        seen += [each.message_id for each in frame.events if each.message_id in wanted]
    assert frame.caught_up
    assert seen == wanted
    reading.cancel()


@pytest.mark.parametrize(
    ("request_", "field_"),
    [
        (mailbox_pb2.ReadEventsRequest(position=b"short"), "position"),
        (mailbox_pb2.ReadEventsRequest(position=b"\xff" * 16), "position"),
        (mailbox_pb2.ReadEventsRequest(page_size=1001), "page_size"),
    ],
)
async def test_a_reader_with_a_wrong_request_is_refused(world: World, request_: mailbox_pb2.ReadEventsRequest, field_: str) -> None:
    answer = await refusal(world.events(request_).read())
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, field_)


async def test_a_server_that_goes_away_ends_sessions_and_readers_at_once(world: World) -> None:
    async with asyncio.timeout(LIMIT_S):
        session, reading = world.session(), world.events(mailbox_pb2.ReadEventsRequest(from_now=True))
        await session.write(credit(message()))
        await reading.read()
        assert world.served.app.drain is not None
        # The session is open once the server has read from it: a claim of its own lane answers.
        probe = message()
        await session.write(credit(probe))
        await world.store(proto(probe))
        await read_wake_up(session)
        await world.served.app.drain()
        for call in (session, reading):
            assert (await refusal(to_the_end(call))).code is grpc.StatusCode.UNAVAILABLE


async def test_cancel_and_status_over_the_mesh_are_scoped_by_sender(world: World) -> None:
    made = message()
    await world.store(proto(made))
    for sender_id, found in ((an_id(), False), (made.key.sender_id, True)):
        statuses = await world.publishing.call(
            world.stub.GetStatuses, mailbox_pb2.MailboxGetStatusesRequest(sender_id=sender_id, message_ids=[made.message_id])
        )
        assert len(statuses.statuses) == int(found)
        answer = await world.publishing.call(
            world.stub.Cancel, mailbox_pb2.MailboxCancelRequest(sender_id=sender_id, message_ids=[made.message_id])
        )
        (result,) = answer.results
        assert result.found is found
    assert result.state == common_pb2.STATE_CANCELLED
    assert result.deliveries[0].stop_point == common_pb2.STOP_POINT_BEFORE_PUSH


async def test_a_mailbox_whose_postgres_is_away_answers_unavailable_and_stores_nothing(
    world: World, store: MailboxStore, sql: Connection
) -> None:
    made = message()
    blocker = "LOCK TABLE accepted_requests IN ACCESS EXCLUSIVE MODE"
    async with sql.transaction():
        await sql.execute(blocker)
        storing = asyncio.create_task(world.store(proto(made)))
        for pid in await until_locked_out(sql):
            await sql.execute("SELECT pg_terminate_backend($1, 5000)", pid)
        with pytest.raises(Unavailable):
            await storing
    assert await store.lookup_accepted([made.key]) == [None]
    (result,) = await world.store(proto(made))
    assert result.stored_now


async def test_an_answer_that_comes_after_the_callers_deadline_is_found_by_the_retry(
    world: World, store: MailboxStore, sql: Connection
) -> None:
    made = message()
    async with sql.transaction():
        await sql.execute("LOCK TABLE accepted_requests IN ACCESS EXCLUSIVE MODE")
        with pytest.raises((DeadlineExceeded, ServiceError)):
            await world.publishing.call(world.stub.Store, mailbox_pb2.StoreRequest(messages=[proto(made)]), timeout_s=0.3)
    (result,) = await world.store(proto(replace(message(), key=made.key)))
    assert result.accepted.message_id == made.message_id or result.stored_now
    (accepted,) = await store.lookup_accepted([made.key])
    assert accepted is not None
    assert accepted.message_id == result.accepted.message_id
