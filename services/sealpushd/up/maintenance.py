"""Keeping the mailbox's partitions: those of the coming weeks made, those past their retention dropped."""

from __future__ import annotations

import asyncpg

from sealpushd.platform.db import connect
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import SchemaError


async def maintain(url: str) -> tuple[int, int]:
    """One round as sealpush_maintenance; how many partitions were made and dropped. Raises StoreUnavailable, SchemaError."""
    connection = await connect(url)
    try:
        await connection.execute("SET statement_timeout = 0")
        # Whatever waits for this lock holds up all traffic behind it: rather try again in the next round.
        await connection.execute("SET lock_timeout = '2s'")
        # Quoted: FETCH is a word of SQL.
        made = await connection.fetchval('SELECT "fetch".ensure_partitions()')
        dropped = await connection.fetchval('SELECT "fetch".drop_partitions()')
    except (asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError) as e:
        raise SchemaError("the database has no Sealpush schemas yet: run `sealpush db migrate` first") from e
    except asyncpg.InsufficientPrivilegeError as e:
        raise SchemaError(f"this role may not keep the partitions ({e}): use sealpush_maintenance") from e
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as e:
        raise StoreUnavailable(f"PostgreSQL refused for now: {e}") from e
    finally:
        await connection.close()
    return made, dropped
