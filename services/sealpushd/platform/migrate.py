"""Schemas, roles and migrations. One run at a time; services never migrate, they only check.

Every service owns a schema named after it, with the roles `<service>_owner` (no login; owns the tables) and `<service>_app`
(login; reads and writes rows only). `sealpush_maintenance` may call the functions that make and drop partitions.
A migration is a file `sql/NNNN_name.sql` of a service's folder, applied once, in order, inside one transaction, never edited after.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import asyncpg
import structlog

from sealpushd.platform.db import Connection, connect
from sealpushd.platform.errors import StoreUnavailable

log = structlog.get_logger()

SERVICES: Final = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")
MAINTENANCE_ROLE: Final = "sealpush_maintenance"
# More faults than these are no news: one restore makes them all.
_FAULTS_TOLD_MAX: Final = 3
# Any number, the same for ever: it names the lock that keeps two migrations apart.
_LOCK: Final = 0x5EA1_9054
# Who waits for a lock on a table holds up all who come to it after: writers stand still no longer than their calls can bear.
LOCK_TIMEOUT_S: Final = 2.0
# Between attempts, so that what had queued behind one is through before the next. Up to twice this, by chance: two programs
# that keep tables do not go on meeting each other.
LOCK_PAUSE_S: Final = 2.0
# A minute or so: longer than any transaction of a service lasts, so what still stands in the way is somebody's session.
LOCK_ATTEMPTS_MAX: Final = 15
# Tables that the service reads and only functions of the schema's owner, or the role that migrates, may change.
_READ_ONLY: Final[Mapping[str, Sequence[str]]] = {"fetch": ("journal_epoch",)}
_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


# In: $1 the service. Its tables (not their partitions, which come and go), sequences, indexes and functions.
_OBJECTS: Final = """
SELECT CASE c.relkind WHEN 'S' THEN 'sequence' WHEN 'i' THEN 'index' WHEN 'I' THEN 'index' ELSE 'table' END AS kind, c.relname::text AS name
FROM pg_class c
WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p', 'S', 'v', 'i', 'I') AND NOT c.relispartition
UNION
SELECT 'function', p.proname::text FROM pg_proc p WHERE p.pronamespace = to_regnamespace($1)
"""

# In: $1 the service, $2 the maintenance role, $3 tables that the service only reads. A row for whatever the service's roles do not own or
# may not use, in words.
_FAULTS: Final = """
WITH roles AS (
    SELECT to_regrole($1 || '_owner') AS owner, to_regrole($1 || '_app') AS app, to_regrole($2) AS maintenance
), relations AS (
    SELECT c.oid, c.relname, c.relkind, c.relowner FROM pg_class c
    WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p', 'S', 'v')
), functions AS (
    SELECT p.oid, p.proname, p.proowner FROM pg_proc p WHERE p.pronamespace = to_regnamespace($1)
)
SELECT 'the role ' || name || ' is missing' FROM roles, LATERAL (
    VALUES ($1 || '_owner', owner), ($1 || '_app', app), ($2, maintenance)) AS needed (name, role) WHERE role IS NULL
UNION ALL
SELECT 'the schema belongs to ' || n.nspowner::regrole FROM pg_namespace n, roles
WHERE n.nspname = $1 AND n.nspowner IS DISTINCT FROM roles.owner
UNION ALL
SELECT r.relname || ' belongs to ' || r.relowner::regrole FROM relations r, roles WHERE r.relowner IS DISTINCT FROM roles.owner
UNION ALL
SELECT f.proname || '() belongs to ' || f.proowner::regrole FROM functions f, roles WHERE f.proowner IS DISTINCT FROM roles.owner
UNION ALL
SELECT $1 || '_app may not use the schema' FROM roles
WHERE app IS NOT NULL AND to_regnamespace($1) IS NOT NULL AND NOT has_schema_privilege(app, to_regnamespace($1), 'USAGE')
UNION ALL
SELECT $1 || '_app may not ' || lower(privilege) || ' ' || r.relname
FROM roles, relations r, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
WHERE app IS NOT NULL AND r.relkind IN ('r', 'p') AND (privilege = 'SELECT' OR r.relname <> ALL ($3::text[]))
  AND NOT has_table_privilege(app, r.oid, privilege)
UNION ALL
SELECT $1 || '_app may not use ' || r.relname FROM roles, relations r
WHERE app IS NOT NULL AND r.relkind = 'S' AND NOT has_sequence_privilege(app, r.oid, 'USAGE')
UNION ALL
SELECT $2 || ' may not call ' || f.proname || '()' FROM roles, functions f
WHERE maintenance IS NOT NULL AND NOT has_function_privilege(maintenance, f.oid, 'EXECUTE')
UNION ALL
SELECT 'everybody may call ' || f.proname || '()' FROM functions f WHERE has_function_privilege('public', f.oid, 'EXECUTE')
"""


class SchemaError(Exception):
    """The schema in the database is not the one this program was written for; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    service: str
    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations_of(service: str) -> list[Migration]:
    """The migrations of a service, oldest first."""
    folder = files(f"sealpushd.{service}") / "sql"
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found.append(Migration(service, int(match[1]), Path(entry.name).stem, entry.read_text()))
    return sorted(found, key=lambda migration: migration.version)


async def migrate(admin_url: str, passwords: dict[str, str], services: Sequence[str] = SERVICES) -> list[str]:
    """Bring the schemas of these services to the present version; returns the names of the migrations that were applied.

    Roles, owners and grants are put right as well: a restored dump may lack them. `passwords` gives the password of each login role by its
    name; a role without one keeps what it has. Safe to repeat and to run twice at once. Raises SchemaError when the database is newer or an
    applied migration differs, StoreUnavailable, also when another transaction holds a table for too long: then what was applied before
    stays.
    """
    connection = await connect(admin_url)
    applied: list[str] = []
    try:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
        await connection.execute("CREATE SCHEMA IF NOT EXISTS sealpush_meta")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS sealpush_meta.migrations (service text, version int, name text NOT NULL,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (service, version))"
        )
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS sealpush_meta.objects (service text, kind text, name text, PRIMARY KEY (service, kind, name))"
        )
        await _login_role(connection, MAINTENANCE_ROLE, passwords.get(MAINTENANCE_ROLE))
        for service in services:
            await _roles_and_schema(connection, service, passwords.get(f"{service}_app"))
            for migration in await _pending(connection, service):
                await _apply(connection, migration)
                applied.append(f"{service}/{migration.name}")
            await _grants(connection, service)
            await _note_objects(connection, service, after_a_migration=any(each.startswith(f"{service}/") for each in applied))
        await connection.execute("GRANT USAGE ON SCHEMA sealpush_meta TO PUBLIC")
        await connection.execute("GRANT SELECT ON sealpush_meta.migrations, sealpush_meta.objects TO PUBLIC")
    except (asyncpg.InsufficientPrivilegeError, asyncpg.DuplicateObjectError) as e:
        raise SchemaError(f"cannot set up roles and schemas: {e}; migrate with a role that may create roles") from e
    finally:
        await connection.close()
    return applied


async def _apply(connection: Connection, migration: Migration) -> None:
    """In one transaction; again and again while somebody else holds a table that it needs."""
    attempt = 1
    while True:
        try:
            await _try(connection, migration)
            return
        except asyncpg.LockNotAvailableError as e:
            holder = await _holder(connection, migration.service)
            if attempt == LOCK_ATTEMPTS_MAX:
                raise StoreUnavailable(
                    f"migration {migration.service}/{migration.name} did not get a lock on its tables in {attempt} attempts of"
                    f" {LOCK_TIMEOUT_S:.0f} s: {holder}; end that transaction, then run `sealpush db migrate` again (nothing of this"
                    " migration was applied)"
                ) from e
            log.warning("a migration waits for a lock, and is tried again", migration=migration.name, holder=holder, attempt=attempt)
        attempt += 1
        await asyncio.sleep(LOCK_PAUSE_S * random.uniform(1, 2))  # noqa: S311 - no secret


async def _try(connection: Connection, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {int(LOCK_TIMEOUT_S * 1000)}")
        await connection.execute(f'SET LOCAL ROLE "{migration.service}_owner"')
        await connection.execute(f'SET LOCAL search_path = "{migration.service}"')
        await connection.execute(migration.sql)
        await connection.execute("RESET ROLE")
        await connection.execute(
            "INSERT INTO sealpush_meta.migrations (service, version, name, checksum) VALUES ($1, $2, $3, $4)",
            migration.service,
            migration.version,
            migration.name,
            migration.checksum,
        )


async def _holder(connection: Connection, service: str) -> str:
    """Who has held a table of this schema for longest, in words."""
    row = await connection.fetchrow(
        "SELECT l.pid, l.relation::regclass::text AS held, l.mode, a.application_name AS name,"
        " extract(epoch FROM clock_timestamp() - a.xact_start)::int AS held_s"
        " FROM pg_locks l JOIN pg_class c ON c.oid = l.relation LEFT JOIN pg_stat_activity a ON a.pid = l.pid"
        " WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid() AND c.relkind IN ('r', 'p') AND c.relnamespace = to_regnamespace($1)"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " ORDER BY a.xact_start NULLS LAST, l.mode <> 'AccessShareLock' DESC, c.relkind = 'p' DESC LIMIT 1",
        f'"{service}"',
    )
    if row is None:
        return "the transaction that held it has just ended"
    if row["pid"] is None:
        return f"a prepared transaction (pg_prepared_xacts) holds {row['mode']} on {row['held']}"
    since = "" if row["held_s"] is None else f", in a transaction of {row['held_s']} s"
    return f"process {row['pid']} of PostgreSQL ({row['name'] or 'without a name'}) holds {row['mode']} on {row['held']}{since}"


async def _login_role(connection: Connection, role: str, password: str | None) -> None:
    exists = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role)
    if not exists:
        await connection.execute(f'CREATE ROLE "{role}" LOGIN')
    if password is not None:
        # ALTER ROLE takes no parameters: let the server quote it.
        statement = await connection.fetchval("SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)", role, password)
        await connection.execute(statement)


async def _roles_and_schema(connection: Connection, service: str, password: str | None) -> None:
    owner = f"{service}_owner"
    if not await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", owner):
        await connection.execute(f'CREATE ROLE "{owner}" NOLOGIN')
    # Since PostgreSQL 16 even the creator of a role must be granted it before it can act as it.
    await connection.execute(f'GRANT "{owner}" TO CURRENT_USER')
    await _login_role(connection, f"{service}_app", password)
    await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{service}" AUTHORIZATION "{owner}"')
    await _own(connection, service, owner)


async def _own(connection: Connection, service: str, owner: str) -> None:
    """Give the schema and what is in it back to its owner, where a restore made it somebody else's."""
    statements = await connection.fetch(
        """
        SELECT format('ALTER SCHEMA %I OWNER TO %I', $1::text, $2::text) AS statement
        FROM pg_namespace WHERE nspname = $1 AND nspowner <> $2::regrole
        UNION ALL
        SELECT format('ALTER %s %I.%I OWNER TO %I', CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, $1::text, relname, $2::text)
        FROM pg_class WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'p', 'S', 'v') AND relowner <> $2::regrole
        UNION ALL
        SELECT format('ALTER FUNCTION %s OWNER TO %I', oid::regprocedure, $2::text)
        FROM pg_proc WHERE pronamespace = to_regnamespace($1) AND proowner <> $2::regrole
        """,
        service,
        owner,
    )
    for row in statements:
        await connection.execute(row["statement"])


async def _grants(connection: Connection, service: str) -> None:
    app = f"{service}_app"
    # Together, so that there is no moment in between at which the service may do more.
    async with connection.transaction():
        await connection.execute(f'REVOKE ALL ON ALL FUNCTIONS IN SCHEMA "{service}" FROM PUBLIC')
        await connection.execute(f'GRANT USAGE ON SCHEMA "{service}" TO "{app}", "{MAINTENANCE_ROLE}"')
        await connection.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{service}" TO "{app}"')
        await connection.execute(f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA "{service}" TO "{app}"')
        await connection.execute(f'GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA "{service}" TO "{MAINTENANCE_ROLE}"')
        for table in _READ_ONLY.get(service, ()):
            name = f'"{service}"."{table}"'
            if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
                await connection.execute(f'REVOKE INSERT, UPDATE, DELETE ON {name} FROM "{app}"')


async def _note_objects(connection: Connection, service: str, *, after_a_migration: bool) -> None:
    """Keep which objects the migrations made, so that a service sees when one is missing. Only what a migration made is believed: a schema
    that lost something since must not become the right one."""
    if after_a_migration or not await connection.fetchval("SELECT true FROM sealpush_meta.objects WHERE service = $1 LIMIT 1", service):
        async with connection.transaction():
            await connection.execute("DELETE FROM sealpush_meta.objects WHERE service = $1", service)
            await connection.executemany(
                "INSERT INTO sealpush_meta.objects (service, kind, name) VALUES ($1, $2, $3)",
                [(service, row["kind"], row["name"]) for row in await connection.fetch(_OBJECTS, service)],
            )


async def _pending(connection: Connection, service: str) -> list[Migration]:
    rows = await connection.fetch("SELECT version, name, checksum FROM sealpush_meta.migrations WHERE service = $1", service)
    return _compare(service, {row["version"]: (row["name"], row["checksum"]) for row in rows})


def _compare(service: str, applied: dict[int, tuple[str, str]]) -> list[Migration]:
    """Migrations still to apply; raises SchemaError where what was applied is not what this program has."""
    known = {migration.version: migration for migration in migrations_of(service)}
    for version, (name, checksum) in applied.items():
        if version not in known:
            raise SchemaError(
                f"the schema {service} was made by a newer Sealpush (migration {name}); run that version, or restore a back-up"
            )
        if known[version].checksum != checksum:
            raise SchemaError(
                f"migration {service}/{name} was changed after it was applied; use the program version that wrote this database"
            )
    return [migration for version, migration in sorted(known.items()) if version not in applied]


async def check_schema(url: str, service: str) -> None:
    """Raises SchemaError unless the service's schema is the one this program knows, all there, and its roles' own; StoreUnavailable
    without an answer."""
    connection = await connect(url)
    try:
        rows = await connection.fetch("SELECT version, name, checksum FROM sealpush_meta.migrations WHERE service = $1", service)
        faults = [row[0] for row in await connection.fetch(_FAULTS, service, MAINTENANCE_ROLE, list(_READ_ONLY.get(service, ())))]
        present = {(row["kind"], row["name"]) for row in await connection.fetch(_OBJECTS, service)}
        noted = await connection.fetch("SELECT kind, name FROM sealpush_meta.objects WHERE service = $1 ORDER BY kind, name", service)
        missing = [f"the {row['kind']} {row['name']}" for row in noted if (row["kind"], row["name"]) not in present]
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError, asyncpg.InsufficientPrivilegeError) as e:
        raise SchemaError("the database has no Sealpush schemas yet: run `sealpush db migrate` first") from e
    except asyncpg.PostgresError as e:
        raise StoreUnavailable(f"PostgreSQL does not answer properly: {e}") from e
    finally:
        await connection.close()
    pending = _compare(service, {row["version"]: (row["name"], row["checksum"]) for row in rows})
    if pending:
        raise SchemaError(f"the schema {service} lacks migration {pending[0].name}: run `sealpush db migrate` first")
    if missing:
        raise SchemaError(f"the schema {service} has lost {_told(missing)}; restore the whole database from a back-up")
    if faults:
        raise SchemaError(f"the schema {service} is not its roles' own: {_told(faults)}. Run `sealpush db migrate`, which puts that right")


def _told(things: Sequence[str]) -> str:
    more = len(things) - _FAULTS_TOLD_MAX
    return "; ".join(things[:_FAULTS_TOLD_MAX]) + (f"; and {more} more" if more > 0 else "")
