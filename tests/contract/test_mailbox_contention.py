"""Everybody wants the same rows at once: nothing fails, nothing is lost, nothing ends twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from sealpush.ids import AppId, ContentId, DeviceId, MessageId, WakeUpId, uuid7
from sealpush.model import Reason, State
from sealpush.proofs import AckOutcome
from sealpushd.fetch.rules import Ack, Ending, NewMessage, Report, TakeQuery, Verdict, WakeUp
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.db import Connection, Database, connect
from tests.contract.harness import LIMIT_S, Migrated, until_locked_out
from tests.contract.mailboxes import PUSHED, RETRY, TOKEN_GONE, a_session, ack, an_id, claim, delivery, digest, message, put, report

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROUNDS = 120
MESSAGES = 64
DEVICES = 8


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch")


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


async def test_pushes_fetches_and_acknowledgements_of_the_same_deliveries_never_fail(store: MailboxStore, sql: Connection) -> None:
    # PostgreSQL 18.6 crashed here while one statement both waited for the locks and looked at partitions.
    devices = [DeviceId(an_id()) for _ in range(DEVICES)]
    app_id = AppId(f"app-{an_id().hex()}")
    for _ in range(ROUNDS):
        made = [message(delivery(devices[n % DEVICES]), app_id=app_id) for n in range(MESSAGES)]
        contents = {each.message_id: (each.content_id, digest(each)) for each in made}
        await store.store(made, [[WakeUpId(an_id())] for _ in made], set())
        session = uuid7()
        await store.keep_sessions([session])

        async def push(session: bytes = session) -> None:
            while claimed := await store.claim(session, [(app_id, 1, 16)]):
                await store.report(session, [Report(w.message_id, w.device_id, w.fence, 1, None, 0, "") for w in claimed])

        async def fetch(first: int, contents: dict[MessageId, tuple[ContentId, bytes]] = contents) -> None:
            mine = devices[first:] + devices[:first]
            while any(taken := await store.take([TakeQuery(device, most=16) for device in mine])):
                acks = [
                    Ack(each.message_id, each.device_id, *contents[each.message_id], AckOutcome.DELIVERED, 0, 1, b"s" * 64)
                    for found in taken
                    for each in found
                ]
                answers = await store.acknowledge(acks)
                assert {answer.verdict for answer in answers} == {Verdict.ACCEPTED}

        await asyncio.gather(push(), push(), fetch(0), fetch(3), fetch(6))
        rows = await sql.fetch(
            "SELECT state, count(*) AS n FROM deliveries WHERE message_id = ANY ($1::uuid[]) GROUP BY state", list(contents)
        )
        assert {row["state"]: row["n"] for row in rows} == {State.DELIVERED: MESSAGES}
        twice = await sql.fetch(
            "SELECT message_id FROM status_events WHERE message_id = ANY ($1::uuid[]) AND state >= 4"
            " GROUP BY message_id HAVING count(*) <> 1",
            list(contents),
        )
        assert twice == [], "every delivery ended once"


async def test_late_acknowledgements_and_readings_of_the_same_deliveries_never_fail(store: MailboxStore, sql: Connection) -> None:
    devices = [DeviceId(an_id()) for _ in range(DEVICES)]
    made = [message(delivery(devices[n % DEVICES])) for n in range(MESSAGES)]
    await store.store(made, [[WakeUpId(an_id())] for _ in made], set())

    def acks(outcome: AckOutcome) -> list[Ack]:
        return [
            Ack(each.message_id, each.deliveries[0].device_id, each.content_id, digest(each), outcome, 0, 1, b"s" * 64)
            for each in random.sample(made, len(made))
        ]

    await store.acknowledge(acks(AckOutcome.DELIVERED))
    late = [AckOutcome.UNDELIVERED, AckOutcome.READ] * 10
    answers = await asyncio.gather(*(store.acknowledge(acks(outcome)) for outcome in late))
    for outcome, some in zip(late, answers, strict=True):
        assert {answer.verdict for answer in some} == {Verdict.ACCEPTED if outcome is AckOutcome.READ else Verdict.LATE}
    kinds = await sql.fetch(
        "SELECT kind, count(*) AS n FROM status_events WHERE message_id = ANY ($1::uuid[]) AND kind > 1 GROUP BY kind",
        [each.message_id for each in made],
    )
    assert {row["kind"]: row["n"] for row in kinds} == {2: MESSAGES, 3: MESSAGES}, "each was read once and late once"


async def in_turn(sql: Connection, urls: dict[str, str], of: NewMessage, *works: Callable[[], Awaitable[object]]) -> None:
    """Do things to a delivery that all begin before any can go on; who came first goes first."""
    other = await connect(urls["admin"], search_path="fetch")
    try:
        async with asyncio.timeout(LIMIT_S):
            async with other.transaction():
                await other.execute("SELECT FROM open_deliveries WHERE message_id = $1 FOR UPDATE", of.message_id)
                tasks = []
                for work in works:
                    tasks.append(asyncio.ensure_future(work()))
                    await until_locked_out(sql, len(tasks))
            await asyncio.gather(*tasks)
    finally:
        await other.close()


async def as_it_is(sql: Connection, of: NewMessage) -> tuple[State, int, bool]:
    """State, the reason it closes with, and whether it has its whole lifetime."""
    row = await sql.fetchrow(
        "SELECT d.state, o.close_reason, o.closes_at = o.expires_at AS whole FROM open_deliveries o"
        " JOIN deliveries d USING (message_id, device_id) WHERE message_id = $1",
        of.message_id,
    )
    assert row is not None
    return State(row["state"]), row["close_reason"], row["whole"]


@pytest.mark.parametrize("fetch_first", [True, False])
async def test_a_fetch_and_the_news_of_a_dead_token_leave_the_lifetime_whoever_comes_first(
    store: MailboxStore, sql: Connection, urls: dict[str, str], fetch_first: bool
) -> None:
    device, app = DeviceId(an_id()), AppId(f"app-{an_id().hex()}")
    older, told = (message(delivery(device), app_id=app) for _ in range(2))
    await put(store, older, told)
    session = await a_session(store)
    wake_ups = {each.message_id: each for each in await claim(store, session, told)}
    works = [
        lambda: store.take([TakeQuery(device, message_id=older.message_id)]),
        lambda: store.report(session, [report(wake_ups[told.message_id], TOKEN_GONE)]),
    ]
    await in_turn(sql, urls, older, *(works if fetch_first else reversed(works)))
    assert await as_it_is(sql, older) == (State.FETCHED, Reason.LIFETIME_OVER, True)
    assert await as_it_is(sql, told) == (State.QUEUED, Reason.TOKEN_GONE, False)


async def test_a_sweep_that_waited_for_a_fetch_lets_what_was_fetched_live(
    store: MailboxStore, sql: Connection, urls: dict[str, str]
) -> None:
    device = DeviceId(an_id())
    fetched, gone = (message(delivery(device, push_reason=Reason.TOKEN_GONE)) for _ in range(2))
    await put(store, fetched, gone)
    await sql.execute("UPDATE open_deliveries SET closes_at = now() - interval '1 ms' WHERE device_id = $1", device)
    await in_turn(sql, urls, fetched, lambda: store.take([TakeQuery(device, message_id=fetched.message_id)]), store.sweep)
    assert await as_it_is(sql, fetched) == (State.FETCHED, Reason.LIFETIME_OVER, True)
    (record,) = await store.statuses(gone.key.sender_id, [gone.message_id])
    assert (record.deliveries[0].state, record.deliveries[0].reason) == (State.UNDELIVERED, Reason.TOKEN_GONE)
    (answer,) = await store.acknowledge([ack(fetched)])
    assert (answer.verdict, answer.state) == (Verdict.ACCEPTED, State.DELIVERED)


async def test_of_two_sessions_that_call_the_same_token_dead_the_second_prolongs_nothing(
    store: MailboxStore, sql: Connection, urls: dict[str, str]
) -> None:
    device, app = DeviceId(an_id()), AppId(f"app-{an_id().hex()}")
    older, one, two = (message(delivery(device), app_id=app) for _ in range(3))
    sessions = [await a_session(store) for _ in range(2)]
    leases = []
    for session, each in zip(sessions, (one, two), strict=True):
        await put(store, each)
        leases += [(session, wake_up) for wake_up in await claim(store, session, each)]
    await put(store, older)

    def tell(session: bytes, wake_up: WakeUp) -> Callable[[], Awaitable[None]]:
        return lambda: store.report(session, [report(wake_up, TOKEN_GONE)])

    await in_turn(sql, urls, older, *(tell(session, wake_up) for session, wake_up in leases))
    closes = await sql.fetch("SELECT DISTINCT closes_at, close_reason, next_attempt_at FROM open_deliveries WHERE device_id = $1", device)
    assert [(row["close_reason"], row["next_attempt_at"]) for row in closes] == [(Reason.TOKEN_GONE, None)], "all at one moment"


async def test_news_of_dead_tokens_beside_everything_else_of_the_same_devices_never_fail(store: MailboxStore, sql: Connection) -> None:
    for _ in range(ROUNDS // 3):
        async with asyncio.timeout(LIMIT_S):
            await news_of_dead_tokens(store, sql)


async def news_of_dead_tokens(store: MailboxStore, sql: Connection) -> None:
    app, devices = AppId(f"app-{an_id().hex()}"), [DeviceId(an_id()) for _ in range(DEVICES)]
    dead = devices[: DEVICES // 2]
    made = [message(delivery(devices[n % DEVICES]), app_id=app) for n in range(MESSAGES)]
    late = [message(delivery(devices[n % DEVICES]), app_id=app) for n in range(MESSAGES // 4)]
    known = [message(delivery(device, push_reason=Reason.TOKEN_GONE), app_id=app) for device in dead]
    by_id = {each.message_id: each for each in (*made, *late, *known)}
    await put(store, *made)
    sessions = [await a_session(store) for _ in range(2)]
    reports = {
        session: [
            report(each, random.choice((TOKEN_GONE, RETRY, PUSHED)) if each.device_id in dead else PUSHED)  # noqa: S311 - any mixture
            for each in await claim(store, session, made[0], MESSAGES // 3)
        ]
        for session in sessions
    }
    told = {each.device_id for some in reports.values() for each in some if each.outcome == TOKEN_GONE}

    async def tell(session: bytes) -> None:
        shuffled = random.sample(reports[session], len(reports[session]))
        for start in range(0, len(shuffled), 4):
            await store.report(session, shuffled[start : start + 4])

    async def fetch() -> None:
        for device in random.sample(devices, DEVICES // 2):
            (taken,) = await store.take([TakeQuery(device, most=3)])
            answers = await store.acknowledge([ack(by_id[each.message_id]) for each in taken[:1]])
            # Late: another one acknowledged between, never the sweep.
            assert {answer.state for answer in answers} <= {State.DELIVERED}

    async def sweep() -> None:
        for device in dead:
            await sql.execute("UPDATE open_deliveries SET closes_at = now() WHERE device_id = $1 AND close_reason = 105", device)
            await store.sweep()

    await asyncio.gather(*map(tell, sessions), fetch(), fetch(), put(store, *late), put(store, *known), sweep())
    rows = await sql.fetch(
        "SELECT o.*, d.state, d.push_reason FROM open_deliveries o JOIN deliveries d USING (message_id, device_id)"
        " WHERE o.device_id = ANY ($1::uuid[])",
        devices,
    )
    before = {each.message_id for each in made}
    for row in rows:
        assert row["session_id"] is None, "every report was taken"
        in_grace = row["close_reason"] == Reason.TOKEN_GONE
        assert in_grace == (row["closes_at"] < row["expires_at"])
        if row["state"] == State.FETCHED or row["device_id"] not in dead:
            assert not in_grace
        elif row["device_id"] in told and row["message_id"] in before:
            assert in_grace
        if in_grace:
            assert (row["next_attempt_at"], row["push_reason"]) == (None, Reason.TOKEN_GONE)
    twice = await sql.fetch(
        "SELECT message_id FROM status_events WHERE message_id = ANY ($1::uuid[]) AND state >= 4 AND kind = 1"
        " GROUP BY message_id HAVING count(*) <> 1",
        list(by_id),
    )
    assert twice == [], "every delivery ended once"
    await store.close_devices(dict.fromkeys(devices, Reason.UNREGISTERED))
    await store.end_sessions(sessions)


async def test_the_journal_tells_a_fetch_before_the_cancellation_that_waited_elsewhere_meanwhile(
    store: MailboxStore, sql: Connection, urls: dict[str, str]
) -> None:
    # The cancellation has its transaction id from its first lock on, before the fetch begins; it locks the fetched delivery after that.
    first, held, fetched = (message(delivery(device)) for device in sorted(an_id() for _ in range(3)))
    position = await store.now_position()
    await put(store, first, held, fetched)

    async def fetch() -> None:
        assert (await store.take([TakeQuery(fetched.deliveries[0].device_id, message_id=fetched.message_id)]))[0]

    other = await connect(urls["admin"], search_path="fetch")
    try:
        async with asyncio.timeout(LIMIT_S), other.transaction():
            await other.execute("SELECT FROM open_deliveries WHERE message_id = $1 FOR UPDATE", held.message_id)
            cancelling = asyncio.ensure_future(
                store.close(
                    [
                        Ending(each.message_id, each.deliveries[0].device_id, State.CANCELLED, Reason.CANCELLED_BY_SENDER)
                        for each in (first, held, fetched)
                    ]
                )
            )
            await until_locked_out(sql)
            await fetch()
        assert len(await cancelling) == 3
    finally:
        await other.close()
    events, _ = await store.events(position, 1_000)
    states = [event.state for event in events if event.message_id == fetched.message_id]
    assert states == [State.QUEUED, State.FETCHED, State.CANCELLED]
