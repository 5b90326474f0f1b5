"""A reader of the journal gets every entry once, those of a delivery in the order of its changes, whatever the transactions do meanwhile.

Transactions are real ones, each on a connection of its own, and take their turns as a test says. A change is what every statement of the
mailbox does: have the lock of the delivery, then write the entry. The delivery counts its changes, and the entry holds the count.

By default the largest walk takes every fourth interleaving, and chance gets fewer tries; with SEALPUSH_TESTS=thorough in the environment
all of it runs. docs/architecture.md says how many that is.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealpush.ids import AppId, DeviceId, MessageId
from sealpush.model import Reason, State
from sealpush.proofs import AckOutcome
from sealpushd.fetch import rules
from sealpushd.fetch.rules import Event, NewMessage, Position, TakeQuery
from sealpushd.fetch.store import MailboxStore, PositionLost
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.up.maintenance import begin_new_journal
from tests.contract.harness import LIMIT_S, Migrated
from tests.contract.mailboxes import PUSHED, a_session, ack, an_id, claim, delivery, message, overdue, put, report

pytestmark = pytest.mark.asyncio(loop_scope="session")

SLOTS = 3
THOROUGH = os.environ.get("SEALPUSH_TESTS") == "thorough"
# Of everything at once; of schedules that hypothesis makes; which of the interleavings of the largest walk.
ROUNDS, SCHEDULES, EVERY = (15, 1_000, 1) if THOROUGH else (3, 100, 4)
MESSAGES = 24
# Interleavings of a walk of which not all are tried by default.
LARGE = 100


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "keys")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store(urls: dict[str, str]) -> AsyncIterator[MailboxStore]:
    db = Database(urls["fetch"], "fetch", 8)
    await db.open()
    yield MailboxStore(db)
    await db.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(urls: dict[str, str]) -> AsyncIterator[Connection]:
    connection = await connect(urls["admin"], search_path="fetch")
    yield connection
    await connection.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slots(urls: dict[str, str]) -> AsyncIterator[list[Connection]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(SLOTS):
            made.append(await connect(urls["admin"], search_path="fetch"))
            stack.push_async_callback(made[-1].close)
        yield made


async def read_all(store: MailboxStore, position: Position, page: int) -> tuple[list[Event], Position]:
    found: list[Event] = []
    while True:
        events, position = await store.events(position, page)
        # As it travels: a reader may come back at any time.
        position = Position.decode(position.encode())
        found += events
        if len(events) < page:
            return found, position


@dataclass
class Turns:
    """Transactions over a few deliveries, of which each may be changed by one at a time, and one reader."""

    store: MailboxStore
    slots: Sequence[Connection]
    page: int
    position: Position
    deliveries: Sequence[bytes]
    # By delivery: the slot that has its lock.
    locked: dict[bytes, int] = field(default_factory=dict)
    # By delivery: how many changes are committed.
    committed: dict[bytes, int] = field(default_factory=dict)
    # By slot: the changes of its transaction, by delivery.
    running: dict[int, dict[bytes, int]] = field(default_factory=dict)
    seen: dict[bytes, list[int]] = field(default_factory=dict)

    async def begin(self, slot: int) -> None:
        if slot in self.running:
            return
        self.running[slot] = {}
        await self.slots[slot].execute("BEGIN")
        # As a batch that has locked another delivery.
        await self.slots[slot].execute("SELECT pg_current_xact_id()")

    async def change(self, slot: int, n: int) -> bool:
        """False: another one has the lock."""
        device = self.deliveries[n]
        if self.locked.get(device, slot) != slot:
            return False
        await self.begin(slot)
        self.locked[device] = slot
        changes = self.running[slot]
        changes[device] = changes.get(device, self.committed.get(device, 0)) + 1
        await self.slots[slot].execute("UPDATE open_deliveries SET fence = fence + 1 WHERE device_id = $1", device)
        await self.slots[slot].execute(
            "INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
            " SELECT message_id, device_id, sender_id, message_id, 0, 1, 1, fence FROM open_deliveries WHERE device_id = $1",
            device,
        )
        return True

    async def end(self, slot: int, *, commit: bool = True) -> None:
        changes = self.running.pop(slot, None)
        if changes is None:
            return
        await self.slots[slot].execute("COMMIT" if commit else "ROLLBACK")
        if commit:
            self.committed |= changes
        self.locked = {device: by for device, by in self.locked.items() if by != slot}

    async def read(self, *, everything: bool) -> None:
        if everything:
            events, self.position = await read_all(self.store, self.position, self.page)
        else:
            events, self.position = await self.store.events(self.position, self.page)
        for event in events:
            if event.device_id in self.deliveries:
                self.seen.setdefault(event.device_id, []).append(event.reason)
        for device in self.deliveries:
            seen, committed = self.seen.get(device, []), self.committed.get(device, 0)
            assert seen == list(range(1, len(seen) + 1)), "in order, each once"
            assert len(seen) <= committed
            if everything:
                assert len(seen) == committed, "nobody waits for what is not committed"

    async def finish(self) -> None:
        for slot in list(self.running):
            await self.end(slot)
        await self.read(everything=True)


async def turns(store: MailboxStore, slots: Sequence[Connection], page: int, deliveries: int) -> Turns:
    made = [message(delivery(an_id())) for _ in range(deliveries)]
    await put(store, *made)
    return Turns(store, slots, page, await store.now_position(), [each.deliveries[0].device_id for each in made])


def interleavings(left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every order in which so many steps of each can be done."""
    if not any(left):
        yield ()
    for n, steps in enumerate(left):
        if steps:
            for rest in interleavings((*left[:n], steps - 1, *left[n + 1 :])):
                yield (n, *rest)


def possible(order: Sequence[int], scripts: Sequence[Sequence[int]]) -> bool:
    """Whether nobody has to wait: a step that waits for a lock is the same as one that comes later."""
    at, locked = [0] * len(scripts), dict[int, int]()
    for slot in order:
        step, at[slot] = at[slot], at[slot] + 1
        if 0 < step <= len(scripts[slot]) and locked.setdefault(scripts[slot][step - 1], slot) != slot:
            return False
        if step > len(scripts[slot]):
            locked = {delivery: by for delivery, by in locked.items() if by != slot}
    return True


def is_first_of_its_kind(order: Sequence[int], scripts: Sequence[Sequence[int]]) -> bool:
    """Whether transactions that do the same begin in the order of their slots: else it is another interleaving with the names changed."""
    begins = [order.index(slot) for slot in range(len(scripts))]
    return all(begins[a] < begins[b] for b in range(len(scripts)) for a in range(b) if scripts[a] == scripts[b])


@pytest.mark.parametrize(
    ("scripts", "count"),
    [
        # Which deliveries each transaction changes, after it has got its id.
        pytest.param(((0,), (0,), (0,)), 28, id="one delivery"),
        pytest.param(((0, 1), (0, 1)), 5, id="two deliveries in the same order"),
        pytest.param(((0, 1), (1,), (0,)), 556, id="two deliveries, three transactions"),
    ],
)
async def test_every_interleaving_is_read_in_order(
    store: MailboxStore, slots: Sequence[Connection], scripts: Sequence[Sequence[int]], count: int
) -> None:
    orders = [
        order
        for order in interleavings(tuple(len(script) + 2 for script in scripts))
        if possible(order, scripts) and is_first_of_its_kind(order, scripts)
    ]
    assert len(orders) == count
    # Every other time the reader reads all that there is after each turn, else a single entry.
    for tried, order in enumerate(orders if count < LARGE else orders[::EVERY]):
        run, at = await turns(store, slots, 1, 2), [0] * SLOTS
        for slot in order:
            step, at[slot] = at[slot], at[slot] + 1
            if step == 0:
                await run.begin(slot)
            elif step <= len(scripts[slot]):
                assert await run.change(slot, scripts[slot][step - 1])
            else:
                await run.end(slot)
            await run.read(everything=tried % 2 == 0)
        await run.finish()


OPERATIONS = st.one_of(
    st.tuples(st.just("change"), st.integers(0, SLOTS - 1), st.integers(0, 3)),
    st.tuples(st.just("change"), st.integers(0, SLOTS - 1), st.integers(0, 3)),
    st.tuples(st.just("begin"), st.integers(0, SLOTS - 1), st.just(0)),
    st.tuples(st.sampled_from(("commit", "commit", "roll back")), st.integers(0, SLOTS - 1), st.just(0)),
    st.tuples(st.sampled_from(("read", "read everything")), st.just(0), st.just(0)),
)


@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=40), page=st.integers(1, 4), lag=st.sampled_from((0, 2, 1_000)))
async def test_whatever_transactions_do_the_journal_is_read_in_order(
    store: MailboxStore, slots: Sequence[Connection], operations: Sequence[tuple[str, int, int]], page: int, lag: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rules, "FLOOR_LAG_MAX", lag)
        run = await turns(store, slots, page, 4)
        for name, slot, n in operations:
            match name:
                case "change":
                    await run.change(slot, n)
                case "begin":
                    await run.begin(slot)
                case "read" | "read everything":
                    await run.read(everything=name != "read")
                case _:
                    await run.end(slot, commit=name == "commit")
        await run.finish()


@pytest.mark.parametrize("page", [3, 500])
async def test_cancel_fetch_replace_block_acknowledge_push_and_expire_at_once_are_read_in_order(
    store: MailboxStore, sql: Connection, page: int
) -> None:
    """Who reads the journal alone ends with what the tables say."""
    for _ in range(ROUNDS):
        async with asyncio.timeout(LIMIT_S):
            await everything_at_once(store, sql, page)


async def everything_at_once(store: MailboxStore, sql: Connection, page: int) -> None:
    devices = [DeviceId(an_id()) for _ in range(4)]
    app, first = AppId(f"app-{an_id().hex()}"), message()
    position = await store.now_position()

    def some(n: int) -> NewMessage:
        made = message(*(delivery(device) for device in random.sample(devices, 1 + n % 3)), app_id=app, subscriber_id=first.subscriber_id)
        made = replace(made, replace_hash=bytes([n % 3]) * 32 if n % 2 else b"")
        return replace(made, key=replace(made.key, sender_id=first.key.sender_id))

    made = [some(n) for n in range(MESSAGES)]
    newer = [some(2 * n + 1) for n in range(MESSAGES // 4)]
    wanted = {each.message_id for each in (*made, *newer)}
    await put(store, *made)

    async def push() -> None:
        session = await a_session(store)
        while claimed := await claim(store, session, made[0], 7):
            await store.report(session, [report(each, PUSHED) for each in claimed])

    async def fetch(first: int) -> None:
        for device in devices[first:] + devices[:first]:
            await store.take([TakeQuery(device, most=9)])

    async def acknowledge() -> None:
        for each in random.sample(made, len(made) // 2):
            outcomes = (AckOutcome.DELIVERED, AckOutcome.READ, AckOutcome.UNDELIVERED)
            await store.acknowledge([ack(each, random.choice(outcomes), device=n) for n in range(len(each.deliveries))])  # noqa: S311 - any

    async def cancel() -> None:
        ids = [each.message_id for each in random.sample(made, len(made) // 3)]
        await store.cancel(first.key.sender_id, ids)

    async def block() -> None:
        await store.block(first.subscriber_id, first.key.sender_id, advertising_only=False)

    async def expire() -> None:
        for each in random.sample(made, 3):
            await overdue(sql, each)
            await store.sweep()

    works = [push(), push(), fetch(0), fetch(2), acknowledge(), acknowledge(), cancel(), expire(), put(store, *newer)]
    random.shuffle(works)
    working = asyncio.gather(*works)
    seen: list[Event] = []
    while not working.done():
        events, position = await store.events(position, page)
        seen += events
    await working
    await block()
    events, position = await read_all(store, position, page)
    told: dict[tuple[MessageId, DeviceId], list[Event]] = {}
    for event in (*seen, *events):
        if event.message_id in wanted:
            told.setdefault((event.message_id, event.device_id), []).append(event)
    rows = await sql.fetch(
        "SELECT message_id, device_id, state, reason, (SELECT count(*) FROM status_events e WHERE e.message_id = d.message_id"
        " AND e.device_id = d.device_id) AS entries FROM deliveries d WHERE message_id = ANY ($1::uuid[])",
        list(wanted),
    )
    assert {(row["message_id"], row["device_id"]) for row in rows} == set(told)
    for row in rows:
        events = told[row["message_id"], row["device_id"]]
        changes = [event.state for event in events if event.kind == 1]
        assert len(events) == row["entries"], "nothing is left out or comes twice"
        assert (changes[-1], events[-1].state) == (row["state"], row["state"])
        for before, after in pairwise(changes):
            assert after in rules.LEGAL[before]
        assert row["state"] >= State.DELIVERED, "the block ended what was open"


async def test_a_reader_that_was_away_reads_its_pages_from_where_it_stopped(store: MailboxStore, sql: Connection) -> None:
    """Not everything that came since, once a page: that would be a square of it."""
    position, device = await store.now_position(), an_id()
    await entries(sql, device, 6_000)
    events, position = await store.events(position, 100)
    assert [event.reason for event in events] == list(range(1, 101))
    assert (position.after - 100, position.until) == (position.floor, position.floor + 6_000)
    _, position = await read_all(store, position, 100)
    assert position.floor >= position.next_floor - rules.FLOOR_LAG_MAX
    await entries(sql, device, 5_000)
    events, position = await store.events(position, 100)
    assert position.after - 100 <= position.floor + rules.FLOOR_LAG_MAX


async def entries(sql: Connection, device: bytes, count: int) -> None:
    await sql.execute(
        "INSERT INTO status_events (message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
        " SELECT $1, $1, $1, $1, 0, 1, 1, n FROM generate_series(1, $2) n",
        device,
        count,
    )


async def test_a_position_of_another_database_or_from_before_a_restore_is_refused_and_says_what_to_do(
    store: MailboxStore, urls: dict[str, str], migrated: Migrated
) -> None:
    position = await store.now_position()
    elsewhere = Database((await migrated("fetch"))["fetch"], "fetch", 1)
    await elsewhere.open()
    try:
        for ask in (MailboxStore(elsewhere).check_position(position), MailboxStore(elsewhere).events(position, 1)):
            with pytest.raises(PositionLost, match="begin with an empty position"):
                await ask
    finally:
        await elsewhere.aclose()
    before = message()
    await put(store, before)
    await begin_new_journal(urls["admin"])
    for ask in (store.check_position(position), store.events(position, 1)):
        with pytest.raises(PositionLost, match="before it was restored"):
            await ask
    after = message()
    await put(store, after)
    seen, position = await read_all(store, await store.first_position(), 500)
    ids = [event.message_id for event in seen if event.message_id in (before.message_id, after.message_id)]
    assert ids == [before.message_id, after.message_id]
    assert await read_all(store, position, 500) == ([], position)


async def test_entries_of_a_dump_are_read_once_whatever_their_transactions_were_called(
    store: MailboxStore, sql: Connection, urls: dict[str, str]
) -> None:
    # Of a cluster with more transactions than this one has had: here they have not begun.
    old = an_id()
    await sql.execute(
        "INSERT INTO status_events (xid, message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
        " SELECT (pg_current_xact_id()::text::int8 + n)::text::xid8, $1, $1, $1, $1, 0, 1, 1, n FROM generate_series(1, 30) n",
        old,
    )
    await begin_new_journal(urls["admin"])
    following = await store.now_position()
    seen, position = await read_all(store, await store.first_position(), 400)
    assert [event.reason for event in seen if event.message_id == old] == list(range(1, 31))
    for _ in range(40):
        made = message()
        await put(store, made)
        (event,), position = await store.events(position, 7)
        assert event.message_id == made.message_id, "and not what the number of this transaction was used for there"
    seen, _ = await read_all(store, following, 7)
    assert old not in {event.message_id for event in seen}


async def test_a_position_ahead_of_the_database_is_refused(store: MailboxStore) -> None:
    position = await store.now_position()
    ahead = replace(position, done=f"{1 << 60}:{1 << 60}:")
    with pytest.raises(PositionLost, match="sealpush db restored"):
        await store.check_position(ahead)


async def test_a_reader_that_missed_dropped_entries_is_told_and_one_that_read_them_goes_on(store: MailboxStore, sql: Connection) -> None:
    behind = await store.now_position()
    await sql.execute(
        "CREATE TABLE status_events_2020w02 PARTITION OF status_events FOR VALUES FROM ('2020-01-06+00') TO ('2020-01-13+00')"
    )
    old = an_id()
    await sql.execute(
        "INSERT INTO status_events (at, message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
        " VALUES ('2020-01-07+00', $1, $1, $1, $1, 0, 1, 1, 0)",
        old,
    )
    await sql.execute("ALTER TABLE status_events_2020w02 OWNER TO fetch_owner")
    seen, ahead = await read_all(store, behind, 100)
    assert old in {event.message_id for event in seen}
    assert await sql.fetchval("SELECT drop_partitions()") == 1
    with pytest.raises(PositionLost, match="past their retention"):
        await store.events(behind, 100)
    made = message()
    await put(store, made)
    (event,), _ = await store.events(ahead, 100)
    assert event.message_id == made.message_id
    await read_all(store, await store.first_position(), 500)
    assert await store.close_devices({made.deliveries[0].device_id: Reason.UNREGISTERED})


async def test_entries_of_a_dump_that_go_make_nobody_begin_again(store: MailboxStore, sql: Connection, urls: dict[str, str]) -> None:
    # Their transactions are another cluster's, with more of them than this one will have.
    await sql.execute(
        "CREATE TABLE status_events_2020w03 PARTITION OF status_events FOR VALUES FROM ('2020-01-13+00') TO ('2020-01-20+00')"
    )
    old = an_id()
    await sql.execute(
        "INSERT INTO status_events (at, xid, message_id, device_id, sender_id, order_id, leg_no, channel, state, reason)"
        " VALUES ('2020-01-14+00', '1000000000000', $1, $1, $1, $1, 0, 1, 1, 0)",
        old,
    )
    await sql.execute("ALTER TABLE status_events_2020w03 OWNER TO fetch_owner")
    await begin_new_journal(urls["admin"])
    behind = await store.first_position()
    _, ahead = await read_all(store, behind, 500)
    assert await sql.fetchval("SELECT drop_partitions()") == 1
    made = message()
    await put(store, made)
    (event,), _ = await store.events(ahead, 100)
    assert event.message_id == made.message_id
    with pytest.raises(PositionLost, match="past their retention"):
        await store.events(behind, 100)
    assert await store.close_devices({made.deliveries[0].device_id: Reason.UNREGISTERED})


@pytest.mark.parametrize("asked", ["now", "first", "step"])
async def test_what_a_position_calls_ended_is_on_disk_before_the_position_is_given(
    store: MailboxStore, sql: Connection, urls: dict[str, str], asked: str
) -> None:
    """After a crash PostgreSQL gives ids and numbers again of which nothing was on disk: entries under them would count as read."""
    since = await store.now_position()
    for _ in range(30):
        transaction = sql.transaction()
        await transaction.start()
        await sql.execute("SELECT pg_current_xact_id(), nextval('status_events_seq')")
        # PostgreSQL does not wait for the disk with this.
        await transaction.rollback()
        log_end = await sql.fetchval("SELECT pg_current_wal_insert_lsn()::text")
        if asked == "step":
            _, since = await store.events(since, 10)
        else:
            await (store.now_position() if asked == "now" else store.first_position())
        assert await sql.fetchval("SELECT pg_current_wal_flush_lsn() >= $1::text::pg_lsn", log_end)
