"""What the parsers of requests let in, in PostgreSQL: every extreme of it is held, and comes back as it was."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import WakeUpId
from sealpush.v1 import common_pb2
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.wire import (
    ORIGINATOR_CHARACTERS_MAX,
    REQUEST_ID_CHARACTERS_MAX,
    STANZA_BYTES_MAX,
    TAG_CHARACTERS_MAX,
    parse_message,
    to_status,
)
from sealpushd.platform import fields
from sealpushd.platform.db import Connection, Database, connect
from tests.contract.harness import Migrated
from tests.contract.mailboxes import an_id, message, proto

pytestmark = pytest.mark.asyncio(loop_scope="session")

# The characters at every edge: of ASCII, of the controls, of one, two and three bytes, around the surrogates, the last.
EDGES = " ~\xa0\u07ff\u0800\ud7ff\ue000\ufeff\ufffd\ufffe\uffff\U00010000\U0010ffff"
# The ends of what protobuf can say and a parser can pass.
ACCEPTED: list[tuple[str, Any]] = [
    *(("uuid", fields.id16(value, "f")) for value in (bytes(16), b"\xff" * 16)),
    ("text", fields.text(EDGES, "f", len(EDGES))),
    ("text", fields.text("\U0010ffff" * 128, "f", 128)),
    *(("timestamptz", fields.moment_ms(value, "f")) for value in (0, 1, fields.MOMENT_MS_MAX)),
    *(
        ("timestamptz", fields.moment(Timestamp(seconds=seconds, nanos=nanos), "f"))
        for seconds, nanos in ((0, 0), (0, 999_999_999), (fields.MOMENT_MS_MAX // 1000, 999_999_999))
    ),
    *(
        ("interval", fields.duration(Duration(seconds=seconds, nanos=nanos), "f"))
        for seconds, nanos in ((0, 0), (315_576_000_000, 0), (-315_576_000_000, 0), (0, -999_999_999))
    ),
    *(("int8", fields.number(value, "f", fields.I64_MAX)) for value in (0, fields.I64_MAX)),
    *(("int2", fields.enum(value, "f")) for value in (0, fields.ENUM_MAX)),
    ("bytea", fields.octets(b"\0" * 32, "f", 0, 32)),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(urls: dict[str, str]) -> AsyncIterator[Connection]:
    connection = await connect(urls["admin"], search_path="fetch")
    yield connection
    await connection.close()


@pytest.mark.parametrize(("kind", "value"), ACCEPTED, ids=lambda value: repr(value)[:40])
async def test_what_a_parser_lets_in_is_held_by_its_column(sql: Connection, kind: str, value: Any) -> None:
    async with sql.transaction():
        # By kind: asyncpg remembers the types of a statement.
        await sql.execute(f"CREATE TEMP TABLE held_{kind} (value {kind} NOT NULL) ON COMMIT DROP")
        assert await sql.fetchval(f"INSERT INTO held_{kind} VALUES ($1) RETURNING value", value) == value  # noqa: S608 - of this file


async def test_moments_take_the_allowances_that_are_added_to_them(sql: Connection) -> None:
    last = fields.moment_ms(fields.MOMENT_MS_MAX, "f")
    for offset in ("UTC", "Pacific/Kiritimati", "Etc/GMT+12"):
        assert await sql.fetchval("SELECT extract(year FROM $1::timestamptz AT TIME ZONE $2)", last, offset) == 9999
    assert (last + timedelta(hours=14)).year == 9999


@pytest.mark.parametrize("at_ms", [0, fields.MOMENT_MS_MAX])
async def test_a_message_at_every_limit_is_stored_and_its_status_is_told(urls: dict[str, str], at_ms: int) -> None:
    given = proto(message())
    given.key.request_id = (EDGES * 9)[:REQUEST_ID_CHARACTERS_MAX]
    given.app_id = "a" * 64
    given.created_at_ms, given.expires_at_ms = at_ms, fields.MOMENT_MS_MAX
    given.replace_hash, given.order_id, given.group_id = b"\xff" * 32, b"\xff" * 16, bytes(16)
    given.leg_no = fields.ENUM_MAX
    for name in ("content_class", "priority", "channel", "traffic_type"):
        setattr(given, name, fields.ENUM_MAX)
    given.tag = (EDGES * 9)[:TAG_CHARACTERS_MAX]
    given.originator_requested = given.originator_effective = "\U0010ffff" * ORIGINATOR_CHARACTERS_MAX
    given.deliveries[0].stanza = os.urandom(STANZA_BYTES_MAX)
    given.deliveries[0].platform = common_pb2.Platform.ValueType(fields.ENUM_MAX)
    given.deliveries.add(device_id=an_id(), push_reason=common_pb2.ReasonCode.ValueType(fields.ENUM_MAX), stanza=b"s")
    parsed = parse_message(given)
    db = Database(urls["fetch"], "fetch", 1)
    await db.open()
    try:
        store = MailboxStore(db)
        stored = await store.store([parsed], [[WakeUpId(an_id()) for _ in parsed.deliveries]], set())
        assert stored == {parsed.message_id}
        (record,) = await store.statuses(parsed.key.sender_id, [parsed.message_id])
    finally:
        await db.aclose()
    told = to_status(record)
    assert (told.tag, told.attempts[0].leg_no, len(told.deliveries)) == (given.tag, fields.ENUM_MAX, 2)
    assert told.expires_at.seconds == fields.MOMENT_MS_MAX // 1000
