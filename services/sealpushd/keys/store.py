"""What keys keeps, and the statements over it. Changes are one transaction each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg

from sealpush.devicelog import DeviceLog, start_head
from sealpush.envelope import Recipient
from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpush.keys import PrekeyKind, SignedPrekey
from sealpushd.keys import rules
from sealpushd.keys.rules import (
    Device,
    DeviceKeys,
    Handout,
    HandoutName,
    ListEnd,
    NewDevice,
    OneTimePrekeys,
    Plan,
    SealingKey,
    StanzaKey,
    StoredPrekey,
    Upload,
    Wanted,
)
from sealpushd.platform.clock import MOMENT_AHEAD_MAX, to_ms
from sealpushd.platform.db import Connection, Database, load_sql
from sealpushd.platform.errors import Aborted
from sealpushd.platform.limits import ONE_TIME_PREKEYS_PER_SENDER

_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DeviceList:
    """A subscriber's device list as senders see it. `identity_changed_at` is None where no device was ever added."""

    head: bytes
    identity_changed_at: datetime | None


@dataclass(frozen=True, slots=True)
class LogPage:
    """Some entries of a device log, oldest first, and where the log ends."""

    entries: list[bytes]
    seq: int
    head: bytes


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows as columns, which is how statements take them; no rows give empty columns."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return columns or [[] for _ in range(width)]


class KeyStore:
    """Statements over the schema `keys`. Raises StoreUnavailable, and what a method names."""

    def __init__(self, db: Database, one_time_allowed: int) -> None:
        """`one_time_allowed`: how many one-time prekeys of a device a sender gets within the window of the limit."""
        self._db = db
        self._one_time_allowed = one_time_allowed
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

    async def vouch(
        self, subscriber_id: SubscriberId, device_id: DeviceId, by_device_id: DeviceId, signature: bytes, now: datetime
    ) -> None:
        """Note that one device of a subscriber vouches for another. Safe to repeat and to race. Raises as `rules.plan_vouch()`."""
        async with self._db.transaction() as connection:
            await self._lock_devices(connection, [device_id, by_device_id])
            await self._lock_lists(connection, [subscriber_id])
            # Under the lock of its end: nobody appends meanwhile.
            log = DeviceLog.read(subscriber_id, [row["entry"] for row in await connection.fetch(self._sql["log"], subscriber_id)])
            await self._apply(connection, rules.plan_vouch(subscriber_id, log, device_id, by_device_id, signature, to_ms(now)), now)

    async def _lock_devices(self, connection: Connection, ids: Sequence[DeviceId]) -> dict[DeviceId, Device]:
        return {row["device_id"]: _device(row) for row in await connection.fetch(self._sql["lock_devices"], ids)}

    async def _lock_lists(self, connection: Connection, subscribers: Iterable[SubscriberId]) -> dict[SubscriberId, ListEnd]:
        starts = [(each, start_head(each)) for each in subscribers]
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
            await connection.execute(self._sql["place_devices"], *_columns(plan.placed.items(), 2), now, list(plan.recovered))
        if plan.raised:
            await connection.execute(self._sql["raise_min_suites"], *_columns(plan.raised.items(), 2))
        if plan.vouched:
            await connection.execute(self._sql["vouch_devices"], list(plan.vouched))
        if plan.prekeys:
            await self._put_signed(connection, list(plan.prekeys.items()), now)

    async def _put_signed(self, connection: Connection, prekeys: Sequence[tuple[DeviceId, SignedPrekey]], now: datetime) -> None:
        rows = [(d, p.suite, p.prekey_id, p.public_key, p.created_at_ms, p.expires_at_ms, p.signature) for d, p in prekeys]
        await connection.execute(self._sql["put_signed_prekeys"], *_columns(rows, 7), now)

    async def device(self, device_id: DeviceId) -> Device | None:
        row = await self._db.fetch_one("device", self._sql["device"], device_id)
        return None if row is None else _device(row)

    async def identities(self, device_ids: Sequence[DeviceId]) -> dict[DeviceId, bytes]:
        """Identity keys of devices, removed ones included; unknown ones are left out."""
        rows = await self._db.fetch("identities", self._sql["identities"], list(device_ids))
        return {DeviceId(row["device_id"]): row["identity_public_key"] for row in rows}

    async def listed_devices(self, device_ids: Sequence[DeviceId]) -> list[tuple[DeviceId, SubscriberId, bool]]:
        """Of those devices that are in a list: whose, and whether they are trusted there."""
        rows = await self._db.fetch("listed_devices", self._sql["listed_devices"], list(device_ids))
        return [(DeviceId(row["device_id"]), SubscriberId(row["subscriber_id"]), row["vouched"]) for row in rows]

    async def upload(self, device: Device, counter: int, min_suite: int, upload: Upload, now: datetime) -> int:
        """Store prekeys that were checked against `device`; returns the number of one-time prekeys left.

        Raises Aborted when the counter was used or the device changed meanwhile, InvalidRequest for a prekey id that was used.
        """
        async with self._db.transaction() as connection:
            taken = await connection.fetch(self._sql["take_counter"], device.device_id, counter, device.min_suite, min_suite)
            if not taken:
                raise Aborted(f"the counter {counter} was used, or the device has changed meanwhile; read its state and try again")
            is_new = False
            if upload.signed is not None:
                keys = _device_keys(await connection.fetch(self._sql["signed_prekeys"], [device.device_id])).get(device.device_id)
                held = [each.prekey for each in keys.prekeys] if keys is not None else []
                is_new = rules.replaces(upload.signed, held)
                if is_new:
                    await self._put_signed(connection, [(device.device_id, upload.signed)], now)
            stocks = _stocks(await connection.fetch(self._sql["one_time_prekeys"], device.device_id))
            names = [(device.device_id, each.suite, each.prekey_id) for each in upload.one_time]
            rows = await connection.fetch(self._sql["handed_out"], *_columns(names, 3)) if names else []
            handed_out = {suite: {row["prekey_id"] for row in rows if row["suite"] == suite} for suite in {row["suite"] for row in rows}}
            # Once: a repeat, after a lost answer, would forget what has been handed out of the new ones.
            forgets = upload.forget_former and is_new
            if forgets:
                await connection.execute(self._sql["forget_former_prekeys"], device.device_id)
            begins_anew = forgets or min_suite > device.min_suite
            if begins_anew:
                # With a higher suite: the signature of each prekey covers the lowest one, so that the old ones do not verify any more.
                await connection.execute(self._sql["forget_handouts"], device.device_id)
                stocks = {suite: OneTimePrekeys(suite, each.next_index, each.next_index, b"") for suite, each in stocks.items()}
            now_ms = to_ms(now)
            for suite in {each.suite for each in upload.one_time} | (set(stocks) if begins_anew else set()):
                added = [each for each in upload.one_time if each.suite == suite]
                stock = stocks.get(suite, OneTimePrekeys(suite, 0, 0, b"")).refilled(added, now_ms, handed_out.get(suite, set()))
                await connection.execute(self._sql["put_one_time_prekeys"], device.device_id, suite, stock.first_index, stock.blob)
                stocks[suite] = stock
            return sum(len(each.left(now_ms)) for each in stocks.values())

    async def one_time_prekeys(self, device_id: DeviceId, now: datetime) -> tuple[int, list[SignedPrekey]]:
        """How many one-time prekeys of a device are left; and those known here, the one with the highest id among them."""
        stocks = _stocks(await self._db.fetch("one_time_prekeys", self._sql["one_time_prekeys"], device_id)).values()
        row = await self._db.fetch_one("highest_handout", self._sql["highest_handout"], device_id)
        known = [prekey for each in stocks for prekey in each.all]
        if row is not None:
            known.append(rules.from_record(row["suite"], row["prekey"]))
        return sum(len(each.left(to_ms(now))) for each in stocks), known

    async def hand_out(self, sender_id: SenderId, wanted: Sequence[Wanted], now: datetime) -> dict[HandoutName, SignedPrekey]:
        """The one-time prekeys that a sender gets: those it got before for the same request and device, and new ones.

        What is not in the answer gets none: the stock is empty, the sender had its share today, or its key has expired since. Seven
        statements at the most. Safe to repeat and to race: a device's stock moves under its lock, in the transaction that notes whose
        its keys are.
        """
        if not wanted:
            return {}
        names = _columns([each.name for each in wanted], 2)
        # First without a lock: who asks again holds up nobody.
        found = _handouts(await self._db.fetch("handouts", self._sql["handouts"], sender_id, *names))
        missing = [each for each in wanted if each.name not in found]
        if missing:
            async with self._db.transaction() as connection:
                rows = await connection.fetch(self._sql["lock_stocked"], list({each.device_id: None for each in missing}))
                min_suites = {row["device_id"]: row["min_suite"] for row in rows}
                # A device that has raised its lowest suite since the caller looked has other keys than the caller will name.
                missing = [each for each in missing if min_suites.get(each.device_id) == each.min_suite]
                if missing:
                    found |= await self._hand_out(connection, sender_id, missing, now)
        now_ms = to_ms(now)
        return {name: prekey for name, (prekey, ends_ms) in found.items() if min(prekey.expires_at_ms, ends_ms) > now_ms}

    async def _hand_out(
        self, connection: Connection, sender_id: SenderId, wanted: Sequence[Wanted], now: datetime
    ) -> dict[HandoutName, tuple[SignedPrekey, int]]:
        """Of devices that are locked."""
        names = _columns([each.name for each in wanted], 2)
        found = _handouts(await connection.fetch(self._sql["handouts"], sender_id, *names))
        missing = [each for each in wanted if each.name not in found]
        suites = {each.device_id: each.suite for each in missing}
        ends = now + timedelta(milliseconds=rules.HANDOUT_LIFETIME_MS)
        rows = await connection.fetch(
            self._sql["count_handouts"], list(suites), sender_id, ends - ONE_TIME_PREKEYS_PER_SENDER.window, ends + MOMENT_AHEAD_MAX
        )
        handed_out = {row["device_id"]: row["handed_out"] for row in rows}
        counts = Counter(each.device_id for each in missing)
        windows = [(each, suite, rules.record_bytes(suite), counts[each] + rules.WINDOW_SPARE) for each, suite in suites.items()]
        stocks = {
            row["device_id"]: OneTimePrekeys(row["suite"], row["next_index"], row["next_index"], row["blob"], row["more"])
            for row in await connection.fetch(self._sql["stocks"], *_columns(windows, 4))
        }
        plan = rules.plan_handouts(missing, stocks, handed_out, self._one_time_allowed, to_ms(now))
        if plan.stocks:
            moved = [(device_id, each.suite, each.next_index, not each.blob) for device_id, each in plan.stocks.items()]
            await connection.execute(self._sql["move_stocks"], *_columns(moved, 4))
        if plan.given:
            given = [(*name, each.suite, each.prekey_id, rules.to_record(each)) for name, each in plan.given.items()]
            found |= _handouts(await connection.fetch(self._sql["add_handouts"], sender_id, ends, *_columns(given, 5)))
        return found

    async def handed_out(self, stanzas: Sequence[StanzaKey]) -> dict[StanzaKey, Handout]:
        """Who holds the one-time prekeys that these stanzas name."""
        if not stanzas:
            return {}
        names = [(each.device_id, each.suite, each.prekey_id) for each in dict.fromkeys(stanzas)]
        found = {}
        for row in await self._db.fetch("handed_out", self._sql["handed_out"], *_columns(names, 3)):
            prekey = rules.from_record(row["suite"], row["prekey"])
            stanza = StanzaKey(DeviceId(row["device_id"]), row["suite"], row["prekey_id"], PrekeyKind.ONE_TIME.value)
            found[stanza] = Handout(SenderId(row["sender_id"]), min(prekey.expires_at_ms, to_ms(row["expires_at"])))
        return found

    async def device_keys(self, device_ids: Sequence[DeviceId]) -> dict[DeviceId, DeviceKeys]:
        """Those of the devices that are in a list and have prekeys, with the current ones and those before."""
        return _device_keys(await self._db.fetch("signed_prekeys", self._sql["signed_prekeys"], device_ids))

    async def sealing_keys(self, device_ids: Sequence[DeviceId]) -> dict[DeviceId, SealingKey]:
        """The current signed prekeys of those devices that are in a list and have one, expired or not."""
        return {
            row["device_id"]: SealingKey(
                row["subscriber_id"],
                to_ms(row["added_at"]),
                row["expires_at_ms"],
                Recipient(row["device_id"], row["prekey_id"], PrekeyKind.SIGNED, row["public_key"], row["suite"]),
            )
            for row in await self._db.fetch("sealing_keys", self._sql["sealing_keys"], device_ids)
        }

    async def device_lists(self, subscriber_ids: Sequence[SubscriberId]) -> dict[SubscriberId, DeviceList]:
        rows = await self._db.fetch("lists", self._sql["lists"], subscriber_ids)
        return {row["subscriber_id"]: DeviceList(row["head"], row["identity_changed_at"]) for row in rows}

    async def log(self, subscriber_id: SubscriberId, after_seq: int, most: int) -> LogPage:
        """Entries of a subscriber's device log after this number, at most so many."""
        rows = await self._db.fetch("log_after", self._sql["log_after"], subscriber_id, after_seq, most)
        if not rows:
            return LogPage([], 0, start_head(subscriber_id))
        return LogPage([row["entry"] for row in rows if row["entry"] is not None], rows[0]["seq"], rows[0]["head"])


def _device(row: asyncpg.Record) -> Device:
    return Device(
        DeviceId(row["device_id"]), SubscriberId(row["subscriber_id"]), row["identity_public_key"], row["min_suite"], row["removed"]
    )


def _stocks(rows: Iterable[asyncpg.Record]) -> dict[int, OneTimePrekeys]:
    return {row["suite"]: OneTimePrekeys(row["suite"], row["first_index"], row["next_index"], row["blob"]) for row in rows}


def _handouts(rows: Iterable[asyncpg.Record]) -> dict[HandoutName, tuple[SignedPrekey, int]]:
    """The keys by request and device, each with the end of its handout."""
    return {
        (row["request_id"], DeviceId(row["device_id"])): (rules.from_record(row["suite"], row["prekey"]), to_ms(row["expires_at"]))
        for row in rows
    }


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
            found[device_id] = replace(found[device_id], prekeys=(*found[device_id].prekeys, stored))
        else:
            device = Device(device_id, SubscriberId(row["subscriber_id"]), row["identity_public_key"], row["min_suite"], removed=False)
            found[device_id] = DeviceKeys(device, (stored,), to_ms(row["added_at"]), vouched=not row["recovered"])
    return found
