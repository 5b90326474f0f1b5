"""Everybody wants the same rows at once: nothing fails, nothing is lost, nothing ends twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sealpush.ids import AppId, ContentId, DeviceId, MessageId, WakeUpId, uuid7
from sealpush.model import State
from sealpush.proofs import AckOutcome
from sealpushd.fetch.rules import Ack, Report, TakeQuery, Verdict
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.db import Connection, Database, connect
from tests.contract.harness import Migrated
from tests.contract.mailboxes import an_id, delivery, message

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
        contents = {each.message_id: each.content_id for each in made}
        await store.store(made, [[WakeUpId(an_id())] for _ in made], set())
        session = uuid7()
        await store.keep_sessions([session])

        async def push(session: bytes = session) -> None:
            while claimed := await store.claim(session, [(app_id, 1, 16)]):
                await store.report(session, [Report(w.message_id, w.device_id, w.fence, 1, None, 0, "") for w in claimed])

        async def fetch(first: int, contents: dict[MessageId, ContentId] = contents) -> None:
            mine = devices[first:] + devices[:first]
            while any(taken := await store.take([TakeQuery(device, most=16) for device in mine])):
                acks = [
                    Ack(each.message_id, each.device_id, contents[each.message_id], AckOutcome.DELIVERED, 0, 1, b"s" * 64)
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
            Ack(each.message_id, each.deliveries[0].device_id, each.content_id, outcome, 0, 1, b"s" * 64)
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
