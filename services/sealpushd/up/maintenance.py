"""Keeping the mailbox's partitions: those of the coming weeks made, those past their retention dropped. And forgetting what is over
elsewhere, or what a back-up brought back."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import asyncpg

from sealpushd.platform.clock import Clock, SystemClock
from sealpushd.platform.db import connect
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import SchemaError

# Retention is counted in weeks; and a clock that is wrong is wrong by more, or harms nothing here.
CLOCKS_DIFFER_MAX: Final = timedelta(hours=1)
# One statement's worth: a fraction of a second, and few rows locked meanwhile.
SWEEP_ROWS_MAX: Final = 10_000


async def maintain(url: str, clock: Clock | None = None) -> tuple[int, int]:
    """One round as sealpush_maintenance; how many partitions were made and dropped. Raises StoreUnavailable, SchemaError.

    StoreUnavailable also where PostgreSQL's clock and ours differ: what is dropped because one of them is wrong is gone.
    """
    clock = clock or SystemClock()
    connection = await connect(url)
    try:
        await connection.execute("SET statement_timeout = 0")
        # Whatever waits for this lock holds up all traffic behind it: rather try again in the next round.
        await connection.execute("SET lock_timeout = '2s'")
        ahead = await connection.fetchval("SELECT clock_timestamp()") - clock.now()
        if abs(ahead) > CLOCKS_DIFFER_MAX:
            raise StoreUnavailable(
                f"PostgreSQL's clock differs from this machine's by {abs(ahead)}: set both by NTP. Nothing was made and nothing dropped"
            )
        # Quoted: FETCH is a word of SQL.
        made = await connection.fetchval('SELECT "fetch".ensure_partitions()')
        dropped = await connection.fetchval('SELECT "fetch".drop_partitions()')
        while await connection.fetchval("SELECT keys.sweep_handouts($1)", SWEEP_ROWS_MAX) == SWEEP_ROWS_MAX:
            pass
    except (asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError) as e:
        raise SchemaError("the database has no Sealpush schemas yet: run `sealpush db migrate` first") from e
    except asyncpg.InsufficientPrivilegeError as e:
        raise SchemaError(f"this role may not keep the partitions ({e}): use sealpush_maintenance") from e
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as e:
        raise StoreUnavailable(f"PostgreSQL refused for now: {e}") from e
    finally:
        await connection.close()
    return made, dropped


async def forget_one_time_prekeys(url: str) -> None:
    """After a restore: no prekey is handed out again whose private half its phone has destroyed since.

    `url` is of the role that migrates. Raises StoreUnavailable, also while a service holds the tables, and SchemaError.
    """
    await _after_restore(url, "keys", "TRUNCATE keys.one_time_prekeys, keys.handouts")


async def begin_new_journal(url: str) -> None:
    """After a restore: positions that were given before are refused, instead of meaning other entries than they did.

    `url` and errors as in `forget_one_time_prekeys`.
    """
    await _after_restore(
        url,
        "fetch",
        # Whoever is writing has ended then, and nobody begins: what is there came out of the back-up.
        'LOCK TABLE "fetch".status_events IN EXCLUSIVE MODE',
        "UPDATE \"fetch\".journal_epoch SET epoch = gen_random_uuid(), dropped_xid = '0',"
        ' restored_seq = (SELECT last_value FROM "fetch".status_events_seq)',
    )


async def _after_restore(url: str, service: str, *statements: str) -> None:
    connection = await connect(url)
    try:
        await connection.execute("SET lock_timeout = '2s'")
        await connection.execute(f"SET ROLE {service}_owner")
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError, asyncpg.UndefinedObjectError) as e:
        raise SchemaError("the database has no Sealpush schemas yet: run `sealpush db migrate` first") from e
    except asyncpg.InsufficientPrivilegeError as e:
        raise SchemaError(f"this role may not do that ({e}): use the one that `sealpush db migrate` is run as") from e
    except asyncpg.LockNotAvailableError as e:
        raise StoreUnavailable(f"somebody works with these tables: stop the service {service}, then try again") from e
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as e:
        raise StoreUnavailable(f"PostgreSQL refused for now: {e}") from e
    finally:
        await connection.close()
