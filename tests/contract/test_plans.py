"""Every statement of every service finds its rows by key, whatever was leased when PostgreSQL took its statistics, or before it took any.

Services plan a statement once a connection and keep the plan. One that was made before there were statistics, or while nothing was leased,
must be as good when there are millions. So in each situation below every scan of a table has to be a look-up in an index by its first
column, and in one that names a row. What reads otherwise on purpose is listed with its reason.

Not among the situations: tables that were analysed while they were empty. To PostgreSQL, reading one is as cheap as a look-up then.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

import sealpushd
from sealpushd.platform.db import Connection, connect
from sealpushd.platform.migrate import SERVICES
from tests.contract.harness import Migrated

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROWS = 4_000

SERVICES_FOLDER = Path(sealpushd.__file__).parent
STATEMENTS: Final = {
    f"{service}/{path.stem}": path.read_text()
    for service in SERVICES
    for path in sorted((SERVICES_FOLDER / service / "sql").glob("[a-z]*.sql"))
}

# Indexes that name no row but a few, by statement.
BY_INDEX: Final[Mapping[str, frozenset[str]]] = {
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
        for name in ("devices_of", "drop_idle_lock", "end_installation", "lock_siblings", "resolve")
    },
    "registration/forget_tokens": frozenset({"installations_token"}),
    "registration/take_token": frozenset({"installations_token"}),
    **{
        f"registration/{name}": frozenset({"registrations_number"})
        for name in ("drop_begun_registrations", "newest_code", "start_registration")
    },
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
    # Counts: its head says what that costs.
    "fetch/queues": frozenset({"open_deliveries"}),
    # Empty but for what a peer has not been told yet.
    "registration/drop_blocks": frozenset({"pending_closures"}),
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


async def fill(admin: Connection) -> None:
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
            f" SELECT {', '.join(values.values())} FROM generate_series(1, {ROWS}) n"
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
    yield World(admin, made, await indexes_of(admin))
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


def faults(name: str, plan: Mapping[str, Any], indexes: Mapping[str, Index]) -> set[str]:
    """What is not a look-up by key."""
    schema = name.partition("/")[0]
    found = set()
    for node in nodes(plan):
        kind = node["Node Type"]
        if kind in ("Index Scan", "Index Only Scan"):
            index = indexes[f"{schema}.{node['Index Name']}"]
            if index.table in WHOLE.get(name, frozenset()):
                continue
            if index.first_column not in node.get("Index Cond", ""):
                found.add(f"reads all of {index.table} by {index.name}")
            elif not index.unique and index.name not in BY_INDEX.get(name, ()):
                found.add(f"looks up {index.table} by {index.name}")
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


async def test_every_statement_looks_rows_up_by_key_with_statistics_of_rows_and_without_any(world: World) -> None:
    wrong: dict[str, set[str]] = {}

    async def look(situation: str) -> None:
        for service in SERVICES:
            await world.connections[service].execute("DISCARD PLANS")
        for name, sql in STATEMENTS.items():
            connection = world.connections[name.partition("/")[0]]
            for fault in faults(name, await plan_of(connection, sql), world.indexes):
                wrong.setdefault(f"{name}: {fault}", set()).add(situation)

    await look("empty, never analysed")
    await fill(world.admin)
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
    assert not wrong, "\n".join(f"{fault} ({', '.join(sorted(when))})" for fault, when in sorted(wrong.items()))


async def analyse(admin: Connection) -> None:
    """As autovacuum does: what has rows."""
    for row in await admin.fetch(
        "SELECT format('ANALYZE %I.%I', n.nspname, c.relname) AS statement FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY ($1) AND c.relkind = 'r' AND pg_relation_size(c.oid) > 0",
        list(SERVICES),
    ):
        await admin.execute(row["statement"])
