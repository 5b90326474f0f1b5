"""Every statement of every service finds its rows by key, whatever the tables held when PostgreSQL took its statistics, or before it did.

Services plan a statement once a connection and keep the plan. One that was made before there were statistics, while a table was empty, or
while nothing was leased, must be as good when there are millions. So in each situation below every scan of a table has to be a look-up
in an index by its first column, and in one that names a row. What reads otherwise on purpose is listed with its reason.
"""

from __future__ import annotations

import ast
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

import sealpushd
from sealpush.ids import AppId
from sealpushd.fetch.rules import TakeQuery
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform import limits, vault
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.migrate import SERVICES
from tests.contract.harness import Migrated
from tests.contract.mailboxes import IOS, PUSHED, a_session, ack, an_id, message, put, report

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROWS = 1_500
# Indexes that have what is looked up in a later column. While the table is a page they cost the same as the right one to PostgreSQL, and
# nothing in a statement tells it otherwise. The table holds a day's handouts; the plan goes when the next statistics are taken, which
# autovacuum does within its `autovacuum_naptime` of 50 new rows.
TIES: Final = frozenset({"handouts_expires_at_idx", "handouts_pkey"})
# Rows with which a table looks as cheap to read as to look something up in.
FEW = (1, 3, 40)
# What one connection does at once, and how much the mailbox has grown since it planned that.
BATCH, GROWTH = 64, 5_120
# Modules whose statements no service runs.
ADMINISTRATION: Final = ("migrate.py",)

SERVICES_FOLDER = Path(sealpushd.__file__).parent
STATEMENTS = {
    f"{service}/{path.stem}": path.read_text()
    for service in SERVICES
    for path in sorted((SERVICES_FOLDER / service / "sql").glob("[a-z]*.sql"))
}
# What the platform runs in the schema of each service that has the table.
INLINE: Final = {"limit_counts": (limits.COUNT,), "vault_keys": (vault.READ_KEY, vault.ADD_KEY)}
for _service in SERVICES:
    _tables = "".join(path.read_text() for path in (SERVICES_FOLDER / _service / "sql").glob("0*.sql"))
    for _table, _inline in INLINE.items():
        if f"CREATE TABLE {_table} (" in _tables:
            STATEMENTS |= {f"{_service}/{_table} {n}": sql for n, sql in enumerate(_inline)}

# Indexes that name no row but a few, by statement.
BY_INDEX: Final[Mapping[str, frozenset[str]]] = {
    # What is over, a hundred at a time.
    "accounts/put_sign_in_address": frozenset({"sign_in_addresses_age"}),
    **{f"{service}/limit_counts 0": frozenset({"limit_counts_ends"}) for service in ("accounts", "registration")},
    "fetch/block": frozenset({"open_deliveries_subscriber"}),
    "fetch/claim": frozenset({"open_deliveries_claim"}),
    "fetch/lock_overdue": frozenset({"open_deliveries_close"}),
    "fetch/lock_quarantined": frozenset({"open_deliveries_quarantined"}),
    "fetch/read_events": frozenset({"status_events_seq_idx", "status_events_xid_seq_idx"}),
    "fetch/release_leases": frozenset({"open_deliveries_session"}),
    "fetch/replaced": frozenset({"open_deliveries_replace"}),
    # Handouts of a device, and of a sender among them.
    **{
        f"keys/{name}": frozenset({"handouts_device_id_sender_id_expires_at_idx"})
        for name in ("count_handouts", "forget_devices", "forget_handouts", "handed_out", "handouts", "highest_handout", "raise_min_suites")
    },
    "registration/claim_closures": frozenset({"pending_closures_due"}),
    "registration/closures_done": frozenset({"pending_closures_device"}),
    "registration/closures_of": frozenset({"pending_closures_device"}),
    # Installations of a subscriber, and of a token.
    **{
        f"registration/{name}": frozenset({"installations_subscriber"})
        for name in ("devices_of", "drop_idle_lock", "end_installation", "lock_siblings", "pull_back_moments", "resolve")
    },
    "registration/forget_tokens": frozenset({"installations_token"}),
    "registration/take_token": frozenset({"installations_token"}),
    **{f"registration/{name}": frozenset({"registrations_number"}) for name in ("newest_code", "start_registration")},
    "registration/drop_begun_registrations": frozenset({"identifiers_subscriber", "registrations_number"}),
    "registration/purge_registrations": frozenset({"registrations_expiry"}),
}
# Tables that are read whole on purpose, by statement.
WHOLE: Final[Mapping[str, frozenset[str]]] = {
    # What people enter: hundreds of rows, read at a sign-in or by an operator.
    **{
        f"accounts/{name}": frozenset({"apps", "organisations", "platform_entries", "sender_apps", "senders"})
        for name in ("account", "entries_in_use", "profile", "put_app", "root_in_use", "senders", "unset_default")
    },
    # A row a lane or a credential.
    **{f"dispatch/{name}": frozenset({"lane_states", "providers"}) for name in ("change_provider", "lane_states", "providers")},
    # Every dispatcher, and what is leased to one, by an index of nothing else; every 5 s.
    "fetch/lost_sessions": frozenset({"open_deliveries", "wake_up_sessions"}),
    # What waits for a push: their heads say what that costs.
    **{f"fetch/{name}": frozenset({"open_deliveries"}) for name in ("pull_back", "queues")},
    # Empty but for what a peer has not been told yet.
    **{f"registration/{name}": frozenset({"pending_closures"}) for name in ("claim_closures", "drop_blocks")},
}
# One row each, joined with whatever else there is.
ONE_ROW: Final = frozenset({"journal_epoch", "status_events_seq"})
# A function a lane: few rows on one side.
FEW_ROWS: Final = frozenset({"fetch/claim", "keys/handouts"})


@dataclass(frozen=True, slots=True)
class Index:
    # Of a partition: those of its table.
    name: str
    table: str
    first_column: str
    unique: bool


@dataclass(slots=True)
class World:
    admin: Connection
    urls: dict[str, str]
    # By service: a connection as the service has it.
    connections: dict[str, Connection]
    indexes: dict[str, Index]


async def indexes_of(admin: Connection) -> dict[str, Index]:
    """Every index by schema and name. An index of a partition counts as that of its table."""
    rows = await admin.fetch(
        "SELECT n.nspname || '.' || c.relname AS name, t.relname AS relation, coalesce(p.relname, t.relname) AS parent, x.indisunique,"
        " pg_get_indexdef(c.oid, 1, true) AS first_column, coalesce(pc.relname, c.relname) AS parent_index"
        " FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_inherits i ON i.inhrelid = t.oid LEFT JOIN pg_class p ON p.oid = i.inhparent"
        " LEFT JOIN pg_inherits ii ON ii.inhrelid = c.oid LEFT JOIN pg_class pc ON pc.oid = ii.inhparent"
    )
    return {row["name"]: Index(row["parent_index"], row["parent"], row["first_column"], row["indisunique"]) for row in rows}


def value(column: str, kind: str) -> str:
    """An expression for any value of a column's type; rows differ by `n`."""
    match kind:
        case "uuid":
            return "gen_random_uuid()"
        case "bytea":
            return "sha256(int4send(n))"
        case "boolean":
            return "n % 2 = 0"
        case "smallint":
            return "(1 + n % 3)::smallint"
        case "integer" | "bigint":
            return "n"
        case "double precision":
            return "n"
        case "timestamp with time zone":
            return "now() + n * interval '1 second'"
        case "jsonb":
            return "'{}'"
        case "xid8":
            return "pg_current_xact_id()"
        case _ if kind.endswith("[]"):
            return "'{}'"
        case _:
            return f"'{column}' || n"


async def fill(admin: Connection, rows: int) -> None:
    """Rows in every table; what they mean does not matter, so that nothing checks what refers to what."""
    await admin.execute("SET session_replication_role = replica")
    columns = await admin.fetch(
        "SELECT n.nspname, c.relname, a.attname, format_type(a.atttypid, NULL) AS kind, a.attidentity <> '' AS given"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE n.nspname = ANY ($1) AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0 AND NOT a.attisdropped"
        "   AND a.attgenerated = '' ORDER BY 1, 2, a.attnum",
        list(SERVICES),
    )
    tables: dict[tuple[str, str], dict[str, str]] = {}
    for row in columns:
        if not row["given"]:
            tables.setdefault((row["nspname"], row["relname"]), {})[row["attname"]] = value(row["attname"], row["kind"])
    for (schema, table), values in tables.items():
        if table in ("messages", "contents", "deliveries"):
            # Of this week, where their partitions are.
            values["message_id"] = "overlay('fetch'.uuid7_floor(now())::text PLACING substr(gen_random_uuid()::text, 15) FROM 15)::uuid"
            values["message_id"] = values["message_id"].replace("'fetch'", '"fetch"')
        if table == "status_events":
            values["at"] = "now()"
        if table in ("journal_epoch", "migrations"):
            continue
        await admin.execute(
            f'INSERT INTO "{schema}"."{table}" ({", ".join(values)})'  # noqa: S608 - names and expressions of this file
            f" SELECT {', '.join(values.values())} FROM generate_series(1, {rows}) n"
            " ON CONFLICT DO NOTHING"
        )
    await admin.execute("SET session_replication_role = origin")


@pytest_asyncio.fixture(loop_scope="session")
async def world(migrated: Migrated) -> AsyncIterator[World]:
    urls = await migrated(*SERVICES)
    admin = await connect(urls["admin"])
    await admin.execute("SET search_path = pg_catalog")
    # Statistics are taken when the test says so, and rows need not make sense.
    for row in await admin.fetch(
        "SELECT format('ALTER TABLE %I.%I DROP CONSTRAINT %I', n.nspname, c.relname, k.conname) AS statement FROM pg_constraint k"
        " JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY ($1) AND k.contype = 'c' AND k.coninhcount = 0"
        " UNION ALL"
        " SELECT format('ALTER TABLE %I.%I SET (autovacuum_enabled = off)', n.nspname, c.relname) AS statement FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY ($1) AND c.relkind = 'r'",
        list(SERVICES),
    ):
        await admin.execute(row["statement"])
    made = {service: await connect(urls[service], search_path=service) for service in SERVICES}
    yield World(admin, urls, made, await indexes_of(admin))
    for connection in (*made.values(), admin):
        await connection.close()


async def plan_of(connection: Connection, sql: str) -> Mapping[str, Any]:
    """The plan that a service's connection makes of a statement and keeps, whatever its arguments."""
    await connection.execute(f"PREPARE looked_at AS {sql}")
    try:
        count = await connection.fetchval("SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'looked_at'")
        arguments = f"({', '.join(['NULL'] * count)})" if count else ""
        found = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE looked_at {arguments}")
    finally:
        await connection.execute("DEALLOCATE looked_at")
    plan: Mapping[str, Any] = json.loads(found)[0]["Plan"]
    return plan


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def faults(name: str, plan: Mapping[str, Any], indexes: Mapping[str, Index], *, small: bool = False) -> set[str]:
    """What is not a look-up by key. `small`: of tables of a page."""
    schema = name.partition("/")[0]
    found = set()
    for node in nodes(plan):
        kind = node["Node Type"]
        if kind in ("Index Scan", "Index Only Scan"):
            index = indexes[f"{schema}.{node['Index Name']}"]
            if index.table in WHOLE.get(name, frozenset()) or (small and index.name in TIES):
                continue
            if index.first_column not in node.get("Index Cond", ""):
                found.add(f"reads all of {index.table} by {index.name}")
            elif not index.unique and index.name not in BY_INDEX.get(name, ()):
                found.add(f"looks up {index.table} by {index.name}")
        elif kind == "Tid Scan" and "TID Cond" in node:
            # By address.
            continue
        elif "Relation Name" in node and kind != "ModifyTable" and node["Relation Name"] not in ONE_ROW | WHOLE.get(name, frozenset()):
            found.add(f"{kind} of {node['Relation Name']}")
        elif kind in ("Hash Join", "Merge Join"):
            found.add(kind)
        elif kind == "Nested Loop" and name not in FEW_ROWS and all(each["Node Type"] in _BATCH for each in inputs(node)):
            found.add("compares every row of a batch with every row of another")
    return found


_BATCH: Final = ("CTE Scan", "Function Scan", "Materialize", "Subquery Scan")


def inputs(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in node["Plans"] if each["Parent Relationship"] in ("Outer", "Inner")]


async def test_every_statement_looks_rows_up_by_key_whatever_the_tables_held_when_it_was_planned(world: World) -> None:
    wrong: dict[str, set[str]] = {}

    async def look(situation: str, *, small: bool = False) -> None:
        for service in SERVICES:
            await world.connections[service].execute("DISCARD PLANS")
        for name, sql in STATEMENTS.items():
            connection = world.connections[name.partition("/")[0]]
            for fault in faults(name, await plan_of(connection, sql), world.indexes, small=small):
                wrong.setdefault(f"{name}: {fault}", set()).add(situation)

    await look("empty, never analysed")
    await fill(world.admin, ROWS)
    await look("full, never analysed")
    await world.admin.execute('UPDATE "fetch".open_deliveries SET session_id = NULL, fence = 0')
    await analyse(world.admin)
    await look("full, analysed while nothing is leased")
    await world.admin.execute('UPDATE "fetch".open_deliveries SET session_id = gen_random_uuid(), fence = 1')
    await analyse(world.admin)
    await look("full, analysed while all is leased")
    await world.admin.execute('UPDATE "fetch".open_deliveries SET session_id = (SELECT gen_random_uuid())')
    await analyse(world.admin)
    await look("full, analysed while one has leased all")
    await empty(world.admin)
    await analyse(world.admin)
    await look("empty, analysed", small=True)
    for rows in FEW:
        await fill(world.admin, rows)
        await analyse(world.admin)
        await look(f"analysed with {rows} rows", small=True)
    await fill(world.admin, ROWS)
    await look("full, analysed with few rows")
    assert not wrong, "\n".join(f"{fault} ({', '.join(sorted(when))})" for fault, when in sorted(wrong.items()))


async def test_a_join_by_plain_equality_reads_a_table_whole_until_statistics_are_taken_after_it_has_grown(world: World) -> None:
    """Why no statement has one, and how long what is left of that lasts (`TIES`): a kept plan goes with the statistics that follow."""
    keys, name = world.connections["keys"], "keys/a join"
    await analyse(world.admin)
    await keys.execute("PREPARE kept AS SELECT h.* FROM unnest($1::uuid[]) AS t (device_id) JOIN devices h ON h.device_id = t.device_id")

    async def kept() -> set[str]:
        found = await keys.fetchval("EXPLAIN (FORMAT JSON) EXECUTE kept (NULL)")
        return faults(name, json.loads(found)[0]["Plan"], world.indexes)

    whole = {"reads all of devices by devices_pkey"}
    assert await kept() == whole
    await fill(world.admin, ROWS)
    assert await kept() == whole
    await analyse(world.admin)
    assert not await kept()


async def analyse(admin: Connection) -> None:
    """Every table, as a plain ANALYZE does: partitions of weeks to come are empty."""
    for row in await admin.fetch(
        "SELECT format('ANALYZE %I.%I', n.nspname, c.relname) AS statement FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY ($1) AND c.relkind = 'r'",
        list(SERVICES),
    ):
        await admin.execute(row["statement"])


async def empty(admin: Connection) -> None:
    await admin.execute(
        await admin.fetchval(
            "SELECT 'TRUNCATE ' || string_agg(format('%I.%I', n.nspname, c.relname), ', ') FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = ANY ($1) AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relname <> 'journal_epoch'",
            list(SERVICES),
        )
    )


async def test_a_plan_that_was_made_at_the_worst_moment_stays_good(world: World) -> None:
    """While the mailbox was as good as empty, and PostgreSQL knew it; no statistics are taken afterwards, which would make another."""
    app, service = AppId("a-bank"), Database(world.urls["fetch"], "fetch", 1)
    others = Database(world.urls["fetch"], "fetch", 1)
    for database in (service, others):
        await database.open()
    store, session = MailboxStore(service), await a_session(MailboxStore(others))

    async def live(count: int) -> int:
        """Messages and what becomes of them, all of it by one connection. How many rows and entries of indexes it has read."""
        before = await read(world.admin)
        made = [message(app_id=app, replace_hash=an_id() * 2) for _ in range(2 * count)]
        gone, replaced = made[:count], made[count:]
        sender_id = gone[0].key.sender_id
        await put(store, *made)
        claimed = await store.claim(session, [(app, IOS, count)])
        assert len(claimed) == count
        await store.report(session, [report(each, PUSHED) for each in claimed])
        taken = await store.take([TakeQuery(each.deliveries[0].device_id, most=1) for each in gone])
        assert all(taken)
        await store.acknowledge([ack(each) for each in gone])
        await store.statuses(sender_id, [each.message_id for each in gone])
        await store.lookup_accepted([each.key for each in made])
        await store.close_devices({each.deliveries[0].device_id: 1 for each in replaced})
        await service.fetch("flush", "SELECT pg_stat_force_next_flush()")
        return await read(world.admin) - before

    try:
        await put(MailboxStore(others), message(app_id=AppId("another")))
        await analyse(world.admin)
        await live(1)
        for _ in range(GROWTH // 256):
            await put(MailboxStore(others), *(message(app_id=AppId("another")) for _ in range(256)))
        await others.fetch("flush", "SELECT pg_stat_force_next_flush()")
        # Each of them is looked up a few times in a few indexes, in the partition where it is.
        assert await live(BATCH) < BATCH * 60
    finally:
        await service.aclose()
        await others.aclose()


async def read(admin: Connection) -> int:
    found: int = await admin.fetchval(
        "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'fetch')"
        " + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'fetch')"
    )
    return int(found)


async def test_no_statement_of_a_service_is_left_out() -> None:
    """What stands between the lines of a module: by its first word, and because it reads or writes a table."""
    known = {" ".join(sql.split()) for sql in STATEMENTS.values()}
    found = set()
    for folder in ("platform", *SERVICES):
        for path in (SERVICES_FOLDER / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name not in ADMINISTRATION:
                    sql = " ".join(node.value.split())
                    if sql.startswith(("WITH ", "SELECT ", "INSERT ", "UPDATE ", "DELETE ")) and (
                        " FROM " in sql or " INTO " in sql or " SET " in sql
                    ):
                        found.add(sql)
    assert found
    assert found <= known
