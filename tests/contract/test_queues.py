"""What operators see of the wake-ups that wait, and how they push again what was given up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from sealpush.ids import AppId, DeviceId, MessageId, WakeUpId, uuid7
from sealpush.model import Reason, State
from sealpush.v1 import common_pb2
from sealpushd.engines import Engines
from sealpushd.fetch import rules
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.queues import Queues
from sealpushd.fetch.rules import NewMessage, Queue, TakeQuery, Verdict, WakeUp
from sealpushd.fetch.store import OLDEST_AMONG, MailboxStore
from sealpushd.fetch.wire import timestamp
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.valkey import Valkey
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, refusal, running_services, until_locked_out
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

ANDROID = int(common_pb2.PLATFORM_ANDROID)
# Sorts before the keys of all deliveries.
FIRST = DeviceId(bytes(16)), rules.BEFORE_ALL


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
    """The database as its superuser: looks at tables and makes time pass."""
    connection = await connect(urls["admin"], search_path="fetch")
    yield connection
    await connection.close()


@pytest_asyncio.fixture(loop_scope="session")
async def valkey(valkey_url: str) -> AsyncIterator[Valkey]:
    client = Valkey(valkey_url)
    yield client
    await client.aclose()


@pytest.fixture
def leases(store: MailboxStore, valkey: Valkey) -> Leases:
    return Leases(store, valkey)


def an_app() -> AppId:
    return AppId(f"app-{an_id().hex()}")


def accepted(age: timedelta) -> MessageId:
    """The id of a message that was accepted so long ago."""
    return MessageId(uuid7(to_ms(datetime.now(UTC) - age)))


async def queue(store: MailboxStore, app_id: str, platform: int = IOS) -> Queue | None:
    return next((each for each in await store.queues() if (each.app_id, each.platform) == (app_id, platform)), None)


async def counts(store: MailboxStore, app_id: str) -> tuple[int, int, int, int]:
    """Waiting, due, held, quarantined."""
    found = await queue(store, app_id)
    return (0, 0, 0, 0) if found is None else (found.waiting, found.due, found.held, found.quarantined)


async def given_up(store: MailboxStore, *messages: NewMessage, reason: int = 0) -> None:
    """Store messages of one app and let a dispatcher give every wake-up up."""
    await put(store, *messages)
    session = await a_session(store)
    claimed = await claim(store, session, messages[0], 1_000)
    assert {each.message_id for each in claimed} == {each.message_id for each in messages}
    await store.report(session, [report(each, QUARANTINED, reason=reason, detail="BadDeviceToken") for each in claimed])
    await store.end_sessions([session])


async def requeue(store: MailboxStore, app_id: str) -> int:
    return len(await store.requeue(app_id, IOS, FIRST))


async def rows(sql: Connection, messages: Sequence[NewMessage]) -> list[Any]:
    return await sql.fetch(
        "SELECT o.*, d.state, d.push_reason, d.detail, d.attempts AS attempts_ever FROM open_deliveries o"
        " JOIN deliveries d USING (message_id, device_id) WHERE message_id = ANY ($1::uuid[]) ORDER BY message_id",
        [each.message_id for each in messages],
    )


# Counting


async def test_the_queue_of_a_lane_counts_what_waits_is_held_and_was_given_up(store: MailboxStore) -> None:
    app = an_app()
    # The oldest two are pushed and over: they do not count.
    pushed, fetched_unpushed, quarantined, retried, later, released, gone, tokenless, held, due = made = [
        message(delivery(an_id()), app_id=app, message_id=accepted(timedelta(seconds=60 - n))) for n in range(10)
    ]
    made[7] = tokenless = replace(tokenless, deliveries=(delivery(an_id(), push_reason=Reason.NO_PUSH_TOKEN),))
    await put(store, *made[:7], tokenless, held)
    await store.take([TakeQuery(fetched_unpushed.deliveries[0].device_id, message_id=fetched_unpushed.message_id)])
    session = await a_session(store)
    wake_ups = {each.message_id: each for each in await claim(store, session, held)}
    assert len(wake_ups) == 8
    soon = timedelta(minutes=20)
    await store.report(
        session,
        [
            report(wake_ups[pushed.message_id], PUSHED),
            report(wake_ups[quarantined.message_id], QUARANTINED),
            report(wake_ups[retried.message_id], RETRY),
            report(wake_ups[later.message_id], RETRY, retry_in=soon),
            report(wake_ups[released.message_id], RELEASED, retry_in=soon),
            report(wake_ups[gone.message_id], TOKEN_GONE),
        ],
    )
    await put(store, due)
    found = await queue(store, app)
    assert found is not None
    assert (found.waiting, found.due, found.held, found.quarantined) == (4, 2, 2, 1)
    assert found.oldest_at == rules.accepted_at(fetched_unpushed.message_id), "held, and older than what is due"
    await store.report(session, [report(wake_ups[fetched_unpushed.message_id], PUSHED)])
    found = await queue(store, app)
    assert found is not None
    assert found.oldest_at == rules.accepted_at(retried.message_id)


async def test_the_oldest_tells_when_it_was_accepted_to_the_millisecond(store: MailboxStore) -> None:
    app, now_ms = an_app(), to_ms(datetime.now(UTC))
    newer, older = (message(app_id=app, message_id=MessageId(uuid7(now_ms - age_ms))) for age_ms in (1_000, 4_321))
    await put(store, newer, older)
    found = await queue(store, app)
    assert found is not None
    assert found.oldest_at is not None
    assert to_ms(found.oldest_at) == now_ms - 4_321


async def test_the_oldest_is_told_also_where_all_wait_for_their_time(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    await sql.execute("UPDATE open_deliveries SET next_attempt_at = now() + interval '1 minute' WHERE app_id = $1", made.app_id)
    found = await queue(store, made.app_id)
    # As in an outage, which is when it is looked at.
    assert found == Queue(made.app_id, IOS, 1, due=0, held=0, oldest_at=rules.accepted_at(made.message_id), quarantined=0)


async def test_of_a_long_queue_the_oldest_is_that_of_those_whose_turn_is_next_at_any_priority(store: MailboxStore, sql: Connection) -> None:
    app = an_app()
    ages = [timedelta(seconds=10)] * OLDEST_AMONG
    made = [message(app_id=app, message_id=accepted(age)) for age in ages]
    behind = message(app_id=app, message_id=accepted(timedelta(hours=2)))
    await put(store, *made, behind)
    await sql.execute(
        "UPDATE open_deliveries SET next_attempt_at = now() - interval '1 minute' WHERE app_id = $1 AND message_id <> $2",
        app,
        behind.message_id,
    )
    found = await queue(store, app)
    assert found is not None
    assert (found.waiting, found.oldest_at) == (OLDEST_AMONG + 1, rules.accepted_at(min(each.message_id for each in made)))
    low = message(app_id=app, priority=1, message_id=accepted(timedelta(hours=1)))
    await put(store, low)
    found = await queue(store, app)
    assert found is not None
    assert found.oldest_at == rules.accepted_at(low.message_id)


async def test_lanes_are_told_apart_and_come_in_order_and_an_empty_one_is_left_out(store: MailboxStore) -> None:
    first, second = sorted((an_app(), an_app()))
    both = replace(delivery(an_id()), platform=ANDROID), delivery(an_id())
    made = message(*both, app_id=second), message(app_id=first)
    await put(store, *made)
    lanes = [(each.app_id, each.platform) for each in await store.queues() if each.app_id in (first, second)]
    assert lanes == [(first, IOS), (second, IOS), (second, ANDROID)]
    await store.cancel(made[1].key.sender_id, [made[1].message_id])
    assert await queue(store, first) is None


@pytest.mark.parametrize(("reason", "quarantined"), [(0, 1), (Reason.PUSH_QUARANTINED, 1), (Reason.NO_PUSH_TOKEN, 0), (28, 0)])
async def test_only_what_failed_to_be_pushed_is_quarantined_for_operators(
    store: MailboxStore, sql: Connection, reason: int, quarantined: int
) -> None:
    made = message()
    await given_up(store, made, reason=reason)
    assert await counts(store, made.app_id) == (0, 0, 0, quarantined)
    assert await requeue(store, made.app_id) == quarantined
    [row] = await rows(sql, [made])
    assert row["push_reason"] == (0 if quarantined else reason)
    assert (row["next_attempt_at"] is None) == (not quarantined)


# Requeuing


async def test_what_is_requeued_is_pushed_again_with_its_wake_up_id_and_all_its_tries(store: MailboxStore, sql: Connection) -> None:
    made = message()
    await put(store, made)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, RETRY)])
    (wake_up,) = await claim(store, session, made)
    await store.report(session, [report(wake_up, QUARANTINED, detail="BadDeviceToken")])
    assert await requeue(store, made.app_id) == 1
    [row] = await rows(sql, [made])
    assert (row["quarantined"], row["push_reason"], row["detail"], row["attempts_ever"]) == (False, 0, None, 2)
    (again,) = await claim(store, session, made)
    assert (again.wake_up_id, again.attempts, again.fence) == (wake_up.wake_up_id, 0, wake_up.fence + 1)
    # What the last hand-out reports too late changes nothing.
    await store.report(session, [report(wake_up, QUARANTINED)])
    assert await counts(store, made.app_id) == (0, 0, 1, 0)
    await store.report(session, [report(again, PUSHED)])
    [row] = await rows(sql, [made])
    assert row["state"] == State.PUSHED
    assert await queue(store, made.app_id) is None


async def test_requeuing_twice_requeues_once(store: MailboxStore) -> None:
    app = an_app()
    await given_up(store, *(message(app_id=app) for _ in range(3)))
    assert [await requeue(store, app) for _ in range(2)] == [3, 0]
    assert await counts(store, app) == (3, 3, 0, 0)


async def test_what_a_device_fetched_meanwhile_is_requeued_like_the_rest_and_what_it_acknowledged_is_not(store: MailboxStore) -> None:
    app = an_app()
    fetched, done, rest = made = [message(app_id=app) for _ in range(3)]
    await given_up(store, *made)
    await store.take([TakeQuery(each.deliveries[0].device_id, most=9) for each in (fetched, done)])
    await store.acknowledge([ack(done)])
    assert await requeue(store, app) == 2
    claimed = await claim(store, await a_session(store), rest)
    assert {each.message_id for each in claimed} == {fetched.message_id, rest.message_id}


async def test_what_has_expired_is_left_alone_and_ends_as_expired(store: MailboxStore, sql: Connection) -> None:
    app = an_app()
    expired, alive = message(app_id=app), message(app_id=app)
    await given_up(store, expired, alive)
    await overdue(sql, expired)
    assert await requeue(store, app) == 1
    [row] = await rows(sql, [expired])
    assert (row["quarantined"], row["push_reason"], row["next_attempt_at"]) == (True, Reason.PUSH_QUARANTINED, None)
    while await store.sweep():
        pass
    (record,) = await store.statuses(expired.key.sender_id, [expired.message_id])
    assert record.deliveries[0].state is State.EXPIRED
    assert [each.message_id for each in await claim(store, await a_session(store), alive)] == [alive.message_id]


async def test_other_lanes_and_what_waits_is_held_or_has_no_token_are_left_alone(store: MailboxStore, sql: Connection) -> None:
    app = an_app()
    mine, other_app = message(app_id=app), message()
    await given_up(store, mine)
    await given_up(store, other_app)
    other_platform = message(replace(delivery(an_id()), platform=ANDROID), app_id=app)
    await put(store, other_platform)
    await sql.execute(
        "UPDATE open_deliveries SET quarantined = true, next_attempt_at = NULL WHERE message_id = $1", other_platform.message_id
    )
    tokenless = message(delivery(an_id(), push_reason=Reason.NO_PUSH_TOKEN), app_id=app)
    held, waiting = message(app_id=app), message(app_id=app)
    await put(store, held, tokenless)
    session = await a_session(store)
    (wake_up,) = await claim(store, session, held)
    await put(store, waiting)
    untouched = [other_app, other_platform, tokenless, held, waiting]
    before = await rows(sql, untouched)
    assert await requeue(store, app) == 1
    assert await rows(sql, untouched) == before
    await store.report(session, [report(wake_up, PUSHED)])
    assert [row["state"] for row in await rows(sql, [held])] == [State.PUSHED]


async def test_batches_of_one_call_take_everything_and_a_call_takes_no_more_than_its_bound(store: MailboxStore, leases: Leases) -> None:
    app = an_app()
    await given_up(store, *(message(app_id=app) for _ in range(25)))
    queues = Queues(store, leases, FakeClock(), call_max=20, batch_max=4)
    assert await queues.requeue(app, IOS) == (20, True)
    assert await counts(store, app) == (20, 20, 0, 5)
    assert await queues.requeue(app, IOS) == (5, False)
    assert await queues.requeue(app, IOS) == (0, False)


async def test_what_is_given_up_again_at_once_is_not_requeued_by_the_same_call(store: MailboxStore, valkey: Valkey) -> None:
    app = an_app()
    made = [message(app_id=app) for _ in range(12)]
    await given_up(store, *made)
    session = await a_session(store)

    class GivingUp(Leases):
        """Its dispatcher is done with every batch before the next one."""

        async def wake(self) -> None:
            await store.report(session, [report(each, QUARANTINED) for each in await claim(store, session, made[0])])

    async with asyncio.timeout(LIMIT_S):
        assert await Queues(store, GivingUp(store, valkey), FakeClock(), batch_max=4).requeue(app, IOS) == (12, False)
    assert await counts(store, app) == (0, 0, 0, 12)


async def test_a_requeue_that_waited_for_an_acknowledgement_does_not_count_what_ended(
    store: MailboxStore, sql: Connection, urls: dict[str, str]
) -> None:
    app = an_app()
    made = [message(app_id=app) for _ in range(3)]
    await given_up(store, *made)
    ended = made[1]
    other = await connect(urls["admin"], search_path="fetch")

    try:
        async with asyncio.timeout(LIMIT_S):
            async with other.transaction():
                await other.execute("SELECT FROM open_deliveries WHERE message_id = $1 FOR UPDATE", ended.message_id)
                acknowledging = asyncio.create_task(store.acknowledge([ack(ended)]))
                await until_locked_out(sql, 1)
                requeuing = asyncio.create_task(requeue(store, app))
                await until_locked_out(sql, 2)
            (answer,), requeued = await asyncio.gather(acknowledging, requeuing)
    finally:
        await other.close()
    assert (answer.verdict, answer.state, requeued) == (Verdict.ACCEPTED, State.DELIVERED, 2)
    (record,) = await store.statuses(ended.key.sender_id, [ended.message_id])
    assert record.deliveries[0].state is State.DELIVERED


ROUNDS = 25
MESSAGES = 48
DEVICES = 6


async def test_requeues_beside_everything_else_on_the_same_lane_never_fail_and_each_is_requeued_once(
    store: MailboxStore, sql: Connection
) -> None:
    app = an_app()
    devices = [DeviceId(an_id()) for _ in range(DEVICES)]
    for _ in range(ROUNDS):
        made = [message(delivery(devices[n % DEVICES]), app_id=app) for n in range(MESSAGES)]
        by_id = {each.message_id: each for each in made}
        await given_up(store, *made)
        fresh = [message(delivery(devices[n % DEVICES]), app_id=app) for n in range(MESSAGES)]
        by_id |= {each.message_id: each for each in fresh}
        await store.store(fresh, [[WakeUpId(an_id())] for _ in fresh], set())
        session = await a_session(store)
        held = await claim(store, session, fresh[0], MESSAGES // 2)

        async def requeue_all(most: int, app: AppId = app) -> list[tuple[DeviceId, MessageId]]:
            requeued, last = [], FIRST
            while keys := await store.requeue(app, IOS, last, most):
                requeued += keys
                last = keys[-1]
            return requeued

        async def push(session: bytes = session, like: NewMessage = fresh[0]) -> None:
            while claimed := await claim(store, session, like, 16):
                await store.report(session, [report(each, PUSHED) for each in claimed])

        async def report_held(session: bytes = session, held: Sequence[WakeUp] = held) -> None:
            shuffled = random.sample(held, len(held))
            for start in range(0, len(shuffled), 8):
                await store.report(session, [report(each, PUSHED) for each in shuffled[start : start + 8]])

        async def fetch(by_id: dict[MessageId, NewMessage] = by_id) -> None:
            for device in random.sample(devices, DEVICES // 2):
                (taken,) = await store.take([TakeQuery(device, most=4)])
                await store.acknowledge([ack(by_id[each.message_id]) for each in taken])

        async with asyncio.timeout(LIMIT_S):
            one, two, _, _, _, _ = await asyncio.gather(requeue_all(5), requeue_all(7), push(), report_held(), fetch(), fetch())
        assert not set(one) & set(two)
        assert {message_id for _, message_id in (*one, *two)} <= {each.message_id for each in made}
        # Everything that was not acknowledged is pushed in the end, also what was held.
        await push()
        assert await counts(store, app) == (0, 0, 0, 0)
        found = await sql.fetch("SELECT DISTINCT state FROM deliveries WHERE message_id = ANY ($1::uuid[])", list(by_id))
        assert {row["state"] for row in found} == {State.PUSHED, State.DELIVERED}
        await store.close_devices(dict.fromkeys(devices, Reason.UNREGISTERED))
        await store.end_sessions([session])


# Metrics


def gauges(app_id: str) -> list[float | None]:
    """Waiting, quarantined, age of the oldest."""
    names = ("waiting", "quarantined", "oldest_seconds")
    return [REGISTRY.get_sample_value(f"sealpush_wake_ups_{name}", {"app": app_id, "platform": "ios"}) for name in names]


async def test_the_gauges_tell_what_waits_and_go_to_zero_with_it(store: MailboxStore, leases: Leases) -> None:
    clock = FakeClock()
    queues = Queues(store, leases, clock)
    app = an_app()
    failed, waiting = message(app_id=app), message(app_id=app, message_id=MessageId(uuid7(to_ms(clock.now()) - 5_000)))
    await given_up(store, failed)
    await put(store, waiting)
    assert gauges(app) == [None, None, None]
    await queues.refresh()
    assert gauges(app) == [1, 1, pytest.approx(5, abs=0.01)]
    clock.advance(timedelta(seconds=60))
    await queues.refresh()
    assert gauges(app) == [1, 1, pytest.approx(65, abs=0.01)]
    for each in (failed, waiting):
        await store.cancel(each.key.sender_id, [each.message_id])
    await queues.refresh()
    assert gauges(app) == [0, 0, 0]


async def test_a_count_that_fails_is_logged_and_the_next_one_tells(store: MailboxStore, leases: Leases, sql: Connection) -> None:
    made = message()
    await put(store, made)
    queues = Queues(store, leases, FakeClock(), refresh_period_s=0)
    with capture_logs() as logs:
        async with asyncio.timeout(LIMIT_S):
            watching = None
            try:
                async with sql.transaction():
                    await sql.execute("LOCK TABLE open_deliveries IN ACCESS EXCLUSIVE MODE")
                    watching = asyncio.create_task(queues.watch())
                    for pid in await until_locked_out(sql):
                        await sql.execute("SELECT pg_cancel_backend($1)", pid)
                    while not logs:
                        await sql.execute("SELECT")
                while gauges(made.app_id)[0] is None:
                    await sql.execute("SELECT")
            finally:
                if watching is not None:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
    assert logs[0]["event"].startswith("the queues could not be counted")
    assert gauges(made.app_id)[:2] == [1, 0]


# Over gRPC, as dispatch and operators call it


@dataclass
class World:
    channels: dict[str, MeshChannel]

    async def call(self, service: str, name: str, request: Any) -> Any:
        channel = self.channels[service]
        return await channel.call(getattr(mailbox_pb2_grpc.MailboxStub(channel.channel), name), request)

    def session(self) -> Any:
        stub: Any = mailbox_pb2_grpc.MailboxStub(self.channels["dispatch"].channel)
        return stub.WakeUpSession(metadata=self.channels["dispatch"].metadata())


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with running_services(engines, mesh, urls, clock) as services:
        yield World({name: services.channel("fetch", name) for name in mesh.keys})


REQUESTS = [
    ("GetQueues", mailbox_pb2.GetQueuesRequest()),
    ("Requeue", mailbox_pb2.RequeueRequest(app_id="shop", platform=common_pb2.PLATFORM_IOS)),
]


@pytest.mark.parametrize(("name", "request_"), REQUESTS)
async def test_dispatch_and_operators_may_look_and_requeue_and_nobody_else(world: World, name: str, request_: Any) -> None:
    for service, channel in world.channels.items():
        if service in ("dispatch", "operator"):
            await world.call(service, name, request_)
            continue
        method = getattr(mailbox_pb2_grpc.MailboxStub(channel.channel), name)
        assert (await refusal(method(request_, metadata=channel.metadata()))).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_requeue_wakes_the_dispatcher_and_the_queues_tell_it(world: World) -> None:
    made = message()
    lane: dict[str, Any] = {"app_id": made.app_id, "platform": common_pb2.PLATFORM_IOS}

    async def look() -> mailbox_pb2.Queue | None:
        answer = await world.call("operator", "GetQueues", mailbox_pb2.GetQueuesRequest())
        return next((each for each in answer.queues if each.app_id == made.app_id), None)

    async with asyncio.timeout(LIMIT_S):
        session = world.session()
        await session.write(mailbox_pb2.WakeUpSessionRequest(credits=[mailbox_pb2.LaneCredit(**lane, credit=2)]))
        await world.call("publishing", "Store", mailbox_pb2.StoreRequest(messages=[proto(made)]))
        (wake_up,) = (await session.read()).wake_ups
        assert await look() == mailbox_pb2.Queue(**lane, held=1, oldest_at=timestamp(rules.accepted_at(made.message_id)))
        failed = mailbox_pb2.WakeUpReport(
            message_id=wake_up.message_id,
            device_id=wake_up.device_id,
            fence=wake_up.fence,
            outcome=mailbox_pb2.WAKE_UP_OUTCOME_QUARANTINED,
            reason_code=common_pb2.REASON_CODE_PUSH_QUARANTINED,
        )
        await session.write(mailbox_pb2.WakeUpSessionRequest(reports=[failed]))
        while (queue := await look()) is not None and queue.held:
            pass
        assert queue == mailbox_pb2.Queue(**lane, quarantined=1)
        answer = await world.call("operator", "Requeue", mailbox_pb2.RequeueRequest(**lane))
        assert (answer.requeued, answer.more) == (1, False)
        (again,) = (await session.read()).wake_ups
        assert (again.wake_up_id, again.attempts) == (wake_up.wake_up_id, 0)
        session.cancel()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (mailbox_pb2.RequeueRequest(platform=common_pb2.PLATFORM_IOS), "app_id"),
        (mailbox_pb2.RequeueRequest(app_id="a" * 65, platform=common_pb2.PLATFORM_IOS), "app_id"),
        (mailbox_pb2.RequeueRequest(app_id="a\0b", platform=common_pb2.PLATFORM_IOS), "app_id"),
        (mailbox_pb2.RequeueRequest(app_id="shop"), "platform"),
        (mailbox_pb2.RequeueRequest(app_id="shop", platform=99_999), "platform"),  # type: ignore[arg-type]  # newer than this program
    ],
)
async def test_a_requeue_of_what_is_no_lane_is_refused_by_its_field(world: World, request_: mailbox_pb2.RequeueRequest, field: str) -> None:
    channel = world.channels["operator"]
    stub: Any = mailbox_pb2_grpc.MailboxStub(channel.channel)
    answer = await refusal(stub.Requeue(request_, metadata=channel.metadata()))
    assert (answer.code, answer.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_lane_that_does_not_exist_requeues_nothing(world: World) -> None:
    answer = await world.call("operator", "Requeue", mailbox_pb2.RequeueRequest(app_id=an_app(), platform=common_pb2.PLATFORM_ANDROID))
    assert (answer.requeued, answer.more) == (0, False)
