"""What keys keeps, and the statements over it. Changes are one transaction each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import asyncpg

from sealpush.envelope import Recipient
from sealpush.ids import DeviceId, SubscriberId
from sealpush.keys import PrekeyKind, SignedPrekey
from sealpushd.keys import rules
from sealpushd.keys.rules import Device, DeviceKeys, ListEnd, NewDevice, OneTimePrekeys, Plan, SealingKey, StoredPrekey, Upload
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection, Database, load_sql
from sealpushd.platform.errors import Aborted

_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DeviceList:
    """A subscriber's device list as senders see it. `identity_changed_at` is None where no device was ever added."""

    head: bytes
    identity_changed_at: datetime | None


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows as columns, which is how statements take them; no rows give empty columns."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return columns or [[] for _ in range(width)]


class KeyStore:
    """Statements over the schema `keys`. Raises StoreUnavailable, and what a method names."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._sql = {path.stem: load_sql(_FOLDER, path.stem) for path in (_FOLDER / "sql").glob("[a-z]*.sql")}

    async def put_devices(self, devices: Sequence[NewDevice], now: datetime) -> list[str]:
        """Enter devices into their subscribers' lists; a refusal each, empty for those that are in. Safe to repeat and to race."""
        ids = list({each.device_id: None for each in devices})
        async with self._db.transaction() as connection:
            rows = [(each.device_id, each.subscriber_id, each.identity_public_key) for each in devices]
            made = {row["device_id"] for row in await connection.fetch(self._sql["add_devices"], *_columns(rows, 3), now)}
            known = await self._lock_devices(connection, ids)
            subscribers = {each.subscriber_id for each in devices} | {each.subscriber_id for each in known.values()}
            ends = await self._lock_lists(connection, subscribers)
            prekeys = _device_keys(await connection.fetch(self._sql["signed_prekeys"], ids))
            plan = rules.plan_put(devices, known, prekeys, ends, to_ms(now))
            await self._apply(connection, plan, now)
            refused = [device_id for device_id in made if device_id not in plan.placed]
            if refused:
                # What was not let in leaves no trace: its id is free for the next.
                await connection.execute(self._sql["drop_devices"], refused)
        return plan.refusals

    async def remove_devices(self, devices: Sequence[tuple[SubscriberId, DeviceId]], now: datetime) -> None:
        """Take devices out of their subscribers' lists and forget their prekeys. Safe to repeat and to race."""
        async with self._db.transaction() as connection:
            known = await self._lock_devices(connection, [device_id for _, device_id in devices])
            ends = await self._lock_lists(connection, {each.subscriber_id for each in known.values()})
            await self._apply(connection, rules.plan_remove(devices, known, ends, to_ms(now)), now)

    async def _lock_devices(self, connection: Connection, ids: Sequence[DeviceId]) -> dict[DeviceId, Device]:
        return {row["device_id"]: _device(row) for row in await connection.fetch(self._sql["lock_devices"], ids)}

    async def _lock_lists(self, connection: Connection, subscribers: Iterable[SubscriberId]) -> dict[SubscriberId, ListEnd]:
        starts = [(each, rules.start_head(each)) for each in subscribers]
        await connection.execute(self._sql["add_lists"], *_columns(starts, 2))
        rows = await connection.fetch(self._sql["lock_lists"], [each for each, _ in starts])
        return {row["subscriber_id"]: ListEnd(SubscriberId(row["subscriber_id"]), row["seq"], row["head"]) for row in rows}

    async def _apply(self, connection: Connection, plan: Plan, now: datetime) -> None:
        if plan.appends:
            appends = [(each.subscriber_id, each.seq, each.entry, each.head) for each in plan.appends]
            ends = [(each.subscriber_id, each.seq, each.head, each.device_added) for each in plan.ends]
            await connection.execute(self._sql["append_log"], *_columns(appends, 4), *_columns(ends, 4), now)
        if plan.removed:
            await connection.execute(self._sql["forget_devices"], list(plan.removed), now)
        if plan.placed:
            await connection.execute(self._sql["place_devices"], *_columns(plan.placed.items(), 2), now)
        if plan.prekeys:
            await self._put_signed(connection, list(plan.prekeys.items()), now)

    async def _put_signed(self, connection: Connection, prekeys: Sequence[tuple[DeviceId, SignedPrekey]], now: datetime) -> None:
        rows = [(d, p.suite, p.prekey_id, p.public_key, p.created_at_ms, p.expires_at_ms, p.signature) for d, p in prekeys]
        await connection.execute(self._sql["put_signed_prekeys"], *_columns(rows, 7), now)

    async def device(self, device_id: DeviceId) -> Device | None:
        row = await self._db.fetch_one("device", self._sql["device"], device_id)
        return None if row is None else _device(row)

    async def upload(self, device: Device, counter: int, min_suite: int, upload: Upload, now: datetime) -> int:
        """Store prekeys that were checked against `device`; returns the number of one-time prekeys left.

        Raises Aborted when the counter was used or the device changed meanwhile, InvalidRequest for a prekey id that was used.
        """
        async with self._db.transaction() as connection:
            taken = await connection.fetch(self._sql["take_counter"], device.device_id, counter, device.min_suite, min_suite)
            if not taken:
                raise Aborted(f"the counter {counter} was used, or the device has changed meanwhile; read its state and try again")
            if upload.signed is not None:
                keys = _device_keys(await connection.fetch(self._sql["signed_prekeys"], [device.device_id])).get(device.device_id)
                held = [each.prekey for each in keys.prekeys] if keys is not None else []
                if rules.replaces(upload.signed, held):
                    await self._put_signed(connection, [(device.device_id, upload.signed)], now)
            stocks = _stocks(await connection.fetch(self._sql["one_time_prekeys"], device.device_id))
            if min_suite > device.min_suite:
                # The signature of each prekey covers the lowest suite: the old ones do not verify any more.
                stocks = {suite: OneTimePrekeys(suite, each.next_index, each.next_index, b"") for suite, each in stocks.items()}
            now_ms = to_ms(now)
            for suite in {each.suite for each in upload.one_time} | (set(stocks) if min_suite > device.min_suite else set()):
                added = [each for each in upload.one_time if each.suite == suite]
                stock = stocks.get(suite, OneTimePrekeys(suite, 0, 0, b"")).refilled(added, now_ms)
                await connection.execute(self._sql["put_one_time_prekeys"], device.device_id, suite, stock.first_index, stock.blob)
                stocks[suite] = stock
            return sum(len(each.left(now_ms)) for each in stocks.values())

    async def one_time_prekeys_left(self, device_id: DeviceId, now: datetime) -> int:
        rows = await self._db.fetch("one_time_prekeys", self._sql["one_time_prekeys"], device_id)
        return sum(len(each.left(to_ms(now))) for each in _stocks(rows).values())

    async def device_keys(self, device_ids: Sequence[DeviceId]) -> dict[DeviceId, DeviceKeys]:
        """Those of the devices that are in a list and have prekeys, with the current ones and those before."""
        return _device_keys(await self._db.fetch("signed_prekeys", self._sql["signed_prekeys"], device_ids))

    async def sealing_keys(self, device_ids: Sequence[DeviceId]) -> dict[DeviceId, SealingKey]:
        """The current signed prekeys of those devices that are in a list and have one, expired or not."""
        return {
            row["device_id"]: SealingKey(
                row["subscriber_id"],
                row["expires_at_ms"],
                Recipient(row["device_id"], row["prekey_id"], PrekeyKind.SIGNED, row["public_key"], row["suite"]),
            )
            for row in await self._db.fetch("sealing_keys", self._sql["sealing_keys"], device_ids)
        }

    async def device_lists(self, subscriber_ids: Sequence[SubscriberId]) -> dict[SubscriberId, DeviceList]:
        rows = await self._db.fetch("lists", self._sql["lists"], subscriber_ids)
        return {row["subscriber_id"]: DeviceList(row["head"], row["identity_changed_at"]) for row in rows}

    async def log(self, subscriber_id: SubscriberId) -> list[bytes]:
        """The entries of a subscriber's device log, oldest first."""
        return [row["entry"] for row in await self._db.fetch("log", self._sql["log"], subscriber_id)]


def _device(row: asyncpg.Record) -> Device:
    return Device(
        DeviceId(row["device_id"]), SubscriberId(row["subscriber_id"]), row["identity_public_key"], row["min_suite"], row["removed"]
    )


def _stocks(rows: Iterable[asyncpg.Record]) -> dict[int, OneTimePrekeys]:
    return {row["suite"]: OneTimePrekeys(row["suite"], row["first_index"], row["next_index"], row["blob"]) for row in rows}


def _device_keys(rows: Iterable[asyncpg.Record]) -> dict[DeviceId, DeviceKeys]:
    found: dict[DeviceId, DeviceKeys] = {}
    for row in rows:
        prekey = SignedPrekey(
            row["suite"],
            row["prekey_id"],
            PrekeyKind.SIGNED,
            row["public_key"],
            row["created_at_ms"],
            row["expires_at_ms"],
            row["signature"],
        )
        stored = StoredPrekey(prekey, None if row["superseded_at"] is None else to_ms(row["superseded_at"]))
        device_id = DeviceId(row["device_id"])
        if device_id in found:
            found[device_id] = DeviceKeys(found[device_id].device, (*found[device_id].prekeys, stored))
        else:
            device = Device(device_id, SubscriberId(row["subscriber_id"]), row["identity_public_key"], row["min_suite"], removed=False)
            found[device_id] = DeviceKeys(device, (stored,))
    return found
