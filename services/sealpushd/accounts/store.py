"""What accounts keeps, in PostgreSQL. Every change appends to the journal in its own transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg

from sealpush.ids import AppId, SenderId, uuid7
from sealpush.keys import EntryRole, SenderEntry
from sealpush.revocations import RevocationList, RevokedKey
from sealpushd.accounts.rules import (
    ADDRESS_KNOWN_FOR,
    ADDRESSES_MAX,
    Account,
    AccountSender,
    App,
    Brand,
    Profile,
    Sender,
    SignedEntry,
    StoredEntry,
    stored_entry,
    stored_revocations,
)
from sealpushd.platform.db import Connection, Database, load_sql
from sealpushd.platform.errors import Aborted, InvalidRequest

_FOLDER: Final = Path(__file__).parent


def _sql(name: str) -> str:
    return load_sql(_FOLDER, name)


ACCOUNT: Final = _sql("account")
SIGN_IN_ADDRESS: Final = _sql("sign_in_address")
PUT_SIGN_IN_ADDRESS: Final = _sql("put_sign_in_address")
PROFILE: Final = _sql("profile")
SENDERS: Final = _sql("senders")
APPS: Final = _sql("apps")
ROOT_IN_USE: Final = _sql("root_in_use")
CHANGE_ORGANISATION: Final = _sql("change_organisation")
CREATE_ORGANISATION: Final = _sql("create_organisation")
PUT_APP: Final = _sql("put_app")
LOCK_ORGANISATION: Final = _sql("lock_organisation")
UNSET_DEFAULT: Final = _sql("unset_default")
PUT_SENDER: Final = _sql("put_sender")
SENDER_OWNER: Final = _sql("sender_owner")
CLEAR_SENDER_APPS: Final = _sql("clear_sender_apps")
PUT_SENDER_APPS: Final = _sql("put_sender_apps")
PUT_PLATFORM_ENTRY: Final = _sql("put_platform_entry")
APPEND_ENTRY: Final = _sql("append_entry")
ENTRIES_IN_USE: Final = _sql("entries_in_use")
PUT_REVOCATIONS: Final = _sql("put_revocations")
REVOCATIONS: Final = _sql("revocations")
ENTRIES: Final = _sql("entries")
APPEND_JOURNAL: Final = _sql("append_journal")

# Under which the platform's entries stand: there is one platform.
PLATFORM: Final = SenderId(bytes(16))
# Entries looked through for the one that was in force at a moment: more than a weekly rotation makes in a year. Each costs a signature.
ENTRIES_MAX: Final = 64

_ENTRY_WENT_BACK: Final = "a stored entry has this or a higher serial; sign a new one with a higher serial"
_LIST_WENT_BACK: Final = "the stored list has this or a higher serial; add to the newest list with `sealpush root revoke --list`"


@dataclass(frozen=True, slots=True)
class NewOrganisation:
    login: str
    # None: stays.
    password_hash: bytes | None
    name: str
    networks: tuple[str, ...]

    def __repr__(self) -> str:
        return f"NewOrganisation({self.login!r}, …)"


class SignInAddress(NamedTuple):
    """From where an organisation signs in: the address by its keyed hash."""

    organisation_id: bytes
    address_hmac: bytes


@dataclass(frozen=True, slots=True)
class EntryQuery:
    """Whose entries, by which root (None: any), for a moment."""

    role: EntryRole
    sender_id: SenderId
    root_public_key: bytes | None
    at: datetime


@dataclass(frozen=True, slots=True)
class NewSender:
    sender_id: SenderId
    organisation_id: bytes
    name: str
    signed_entry: bytes
    entry: SenderEntry
    root_public_key: bytes
    app_ids: tuple[AppId, ...]
    brand: Brand
    scopes: tuple[str, ...]
    is_default: bool


class AccountStore:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def accounts(self, logins: Sequence[str]) -> list[Account | None]:
        """A result each, in their order."""
        rows: dict[str, list[asyncpg.Record]] = {}
        for row in await self._db.fetch("account", ACCOUNT, list(dict.fromkeys(logins))):
            rows.setdefault(row["login"], []).append(row)
        return [_account(rows[login]) if login in rows else None for login in logins]

    async def signed_in_at(self, addresses: Sequence[SignInAddress]) -> list[datetime | None]:
        """When each organisation last signed in from that address, as far as is remembered; in their order."""
        asked = list(dict.fromkeys(addresses))
        columns = [each.organisation_id for each in asked], [each.address_hmac for each in asked]
        rows = await self._db.fetch("sign_in_address", SIGN_IN_ADDRESS, *columns)
        found = {SignInAddress(row["organisation_id"], row["address_hmac"]): row["signed_in_at"] for row in rows}
        return [found.get(each) for each in addresses]

    async def put_sign_in_address(self, address: SignInAddress, now: datetime) -> None:
        """The organisation signed in from there now."""
        await self._db.execute("put_sign_in_address", PUT_SIGN_IN_ADDRESS, *address, now, now - ADDRESS_KNOWN_FOR, ADDRESSES_MAX)

    async def profiles(self, sender_ids: Sequence[SenderId]) -> list[Profile | None]:
        """A result each, in their order."""
        rows = await self._db.fetch("profile", PROFILE, list(dict.fromkeys(sender_ids)))
        found = {
            row["sender_id"]: Profile(
                sender_entry=row["sender_entry"],
                platform_entry=row["platform_entry"] or b"",
                display_name=row["display_name"],
                brand_colour=row["brand_colour"],
                brand_text_colour=row["brand_text_colour"],
                logo_png=row["logo_png"] or b"",
            )
            for row in rows
        }
        return [found.get(sender_id) for sender_id in sender_ids]

    async def senders(self, sender_ids: Sequence[SenderId]) -> list[Sender]:
        rows = await self._db.fetch("senders", SENDERS, sender_ids)
        return [
            Sender(
                sender_id=SenderId(row["sender_id"]),
                organisation_id=row["organisation_id"],
                name=row["name"],
                sender_entry=row["sender_entry"],
                app_ids=tuple(row["app_ids"]),
                root_public_key=row["root_public_key"],
                platform_entry=row["platform_entry"] or b"",
            )
            for row in rows
        ]

    async def entries_in_use(self) -> list[StoredEntry]:
        """Every entry in use, in no promised order."""
        rows = await self._db.fetch("entries_in_use", ENTRIES_IN_USE)
        return [
            StoredEntry(SenderId(row["sender_id"]) if row["sender_id"] else None, row["root_public_key"], stored_entry(row["entry"]))
            for row in rows
        ]

    async def signed_revocations(self, root_public_keys: Sequence[bytes]) -> list[bytes | None]:
        """The newest list of each root as it was signed, in their order."""
        rows = await self._db.fetch("revocations", REVOCATIONS, list(dict.fromkeys(root_public_keys)))
        found: dict[bytes, bytes] = {row["root_public_key"]: row["revocations"] for row in rows}
        return [found.get(root_public_key) for root_public_key in root_public_keys]

    async def revocations(self, root_public_keys: Sequence[bytes]) -> dict[bytes, RevocationList]:
        """The newest lists by root; roots without one are left out."""
        roots = list(dict.fromkeys(root_public_keys))
        signed = zip(roots, await self.signed_revocations(roots), strict=True)
        return {root: stored_revocations(root, blob) for root, blob in signed if blob is not None}

    async def apps(self, app_ids: Sequence[str]) -> list[App]:
        rows = await self._db.fetch("apps", APPS, app_ids)
        return [App(AppId(row["app_id"]), row["name"], row["root_public_key"]) for row in rows]

    async def entries(self, queries: Sequence[EntryQuery]) -> list[list[SignedEntry]]:
        """Entries for each query, present and past, the likeliest first; at most `ENTRIES_MAX` each."""
        if not queries:
            return []
        columns = [
            list(range(len(queries))),
            [int(each.role) for each in queries],
            [each.sender_id for each in queries],
            [each.root_public_key for each in queries],
            [each.at for each in queries],
        ]
        found: list[list[SignedEntry]] = [[] for _ in queries]
        for row in await self._db.fetch("entries", ENTRIES, *columns, ENTRIES_MAX):
            found[row["question"]].append(SignedEntry(row["root_public_key"], row["entry"]))
        return found

    async def root_in_use(self, root_public_key: bytes) -> bool:
        return await self._db.fetch_one("root_in_use", ROOT_IN_USE, root_public_key) is not None

    async def put_organisation(self, new: NewOrganisation, *, actor: str, now: datetime) -> bytes:
        """Its id. Raises InvalidRequest when it would be created without a password, Aborted when another call creates it."""
        networks = list(new.networks)
        password_hash = None if new.password_hash is None else new.password_hash.decode()
        async with self._db.transaction() as c:
            row = await c.fetchrow(CHANGE_ORGANISATION, new.login, password_hash, new.name, networks, now)
            if row is None:
                if password_hash is None:
                    raise InvalidRequest("a new organisation needs a password", field="password")
                row = await c.fetchrow(CREATE_ORGANISATION, uuid7(), new.login, password_hash, new.name, networks, now)
            if row is None:
                raise Aborted("another call creates this organisation at the same time; try again")
            organisation_id: bytes = row["organisation_id"]
            detail = {"login": new.login, "name": new.name, "networks": networks, "password_changed": password_hash is not None}
            await _journal(c, now, actor, "PutOrganisation", organisation_id.hex(), detail)
            return organisation_id

    async def put_app(self, app: App, *, actor: str, now: datetime) -> None:
        """Raises InvalidRequest when its root would change under senders that hold entries of the present one."""
        async with self._db.transaction() as c:
            if await c.fetchrow(PUT_APP, uuid7(), app.app_id, app.name, app.root_public_key, now) is None:
                raise InvalidRequest(
                    "senders of this app hold entries of its present root; a new root needs a new app id", field="root_public_key"
                )
            detail = {"name": app.name, "root_public_key": app.root_public_key.hex()}
            await _journal(c, now, actor, "PutApp", app.app_id, detail)

    async def put_sender(self, new: NewSender, *, actor: str, now: datetime) -> None:
        """Raises InvalidRequest that names the field which does not fit what is stored."""
        try:
            async with self._db.transaction() as c:
                await self._put_sender(c, new, actor, now)
        except asyncpg.UniqueViolationError as e:
            raise InvalidRequest("another sender of this organisation has this name", field="name") from e
        except asyncpg.ForeignKeyViolationError as e:
            raise InvalidRequest("an app vanished meanwhile; put it first", field="app_ids") from e

    async def _put_sender(self, c: Connection, new: NewSender, actor: str, now: datetime) -> None:
        if await c.fetchrow(LOCK_ORGANISATION, new.organisation_id) is None:
            raise InvalidRequest("no such organisation; put it first", field="organisation_id")
        if new.is_default:
            await c.execute(UNSET_DEFAULT, new.organisation_id, new.sender_id, now)
        stored = await c.fetchrow(
            PUT_SENDER,
            new.sender_id,
            new.organisation_id,
            new.name,
            new.signed_entry,
            new.entry.serial,
            new.entry.display_name,
            new.root_public_key,
            new.brand.colour,
            new.brand.text_colour,
            new.brand.logo_png,
            list(new.scopes),
            new.is_default,
            now,
        )
        if stored is None:
            owner = await c.fetchval(SENDER_OWNER, new.sender_id)
            if owner != new.organisation_id:
                raise InvalidRequest("the sender belongs to another organisation", field="organisation_id")
            raise InvalidRequest(_ENTRY_WENT_BACK, field="sender_entry")
        await c.execute(APPEND_ENTRY, new.root_public_key, EntryRole.SENDER, new.sender_id, new.entry.serial, new.signed_entry, now)
        await c.execute(CLEAR_SENDER_APPS, new.sender_id)
        await c.execute(PUT_SENDER_APPS, new.sender_id, list(new.app_ids))
        detail = {
            "organisation_id": new.organisation_id.hex(),
            "name": new.name,
            "display_name": new.entry.display_name,
            "entry_serial": new.entry.serial,
            "app_ids": list(new.app_ids),
            "scopes": list(new.scopes),
            "is_default": new.is_default,
            "logo_changed": new.brand.logo_png is not None,
        }
        await _journal(c, now, actor, "PutSender", new.sender_id.hex(), detail)

    async def put_platform_entry(
        self, signed_entry: bytes, entry: SenderEntry, root_public_key: bytes, *, actor: str, now: datetime
    ) -> None:
        """Raises InvalidRequest when the entry is older than the stored one."""
        async with self._db.transaction() as c:
            if await c.fetchrow(PUT_PLATFORM_ENTRY, root_public_key, signed_entry, entry.serial, now) is None:
                raise InvalidRequest(_ENTRY_WENT_BACK, field="platform_entry")
            await c.execute(APPEND_ENTRY, root_public_key, EntryRole.PLATFORM, PLATFORM, entry.serial, signed_entry, now)
            await _journal(c, now, actor, "PutPlatformEntry", root_public_key.hex(), {"entry_serial": entry.serial})

    async def put_revocations(
        self, signed: bytes, revocations: RevocationList, root_public_key: bytes, *, actor: str, now: datetime
    ) -> None:
        """Raises InvalidRequest when the list is older than the stored one."""
        async with self._db.transaction() as c:
            if await c.fetchrow(PUT_REVOCATIONS, root_public_key, signed, revocations.serial, now) is None:
                raise InvalidRequest(_LIST_WENT_BACK, field="revocations")
            keys = sum(isinstance(item, RevokedKey) for item in revocations.items)
            detail = {"serial": revocations.serial, "senders": len(revocations.items) - keys, "keys": keys}
            await _journal(c, now, actor, "PutRevocations", root_public_key.hex(), detail)


def _account(rows: Sequence[asyncpg.Record]) -> Account:
    return Account(
        organisation_id=rows[0]["organisation_id"],
        password_hash=rows[0]["password_hash"].encode(),
        networks=tuple(rows[0]["networks"]),
        senders=tuple(
            AccountSender(
                sender_id=SenderId(row["sender_id"]),
                name=row["name"],
                app_ids=tuple(row["app_ids"]),
                scopes=frozenset(row["scopes"]),
                is_default=row["is_default"],
            )
            for row in rows
            if row["sender_id"] is not None
        ),
    )


async def _journal(c: Connection, now: datetime, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
    await c.execute(APPEND_JOURNAL, now, actor, action, subject, json.dumps(detail))
