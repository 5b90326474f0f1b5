"""What registration keeps, in PostgreSQL. Numbers and tokens are encrypted and hashed here: nothing above sees stored bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from sealpush.ids import AppId, DeviceId, RegistrationId, SenderId, SubscriberId
from sealpush.model import Reason
from sealpushd.platform.clock import CLOCK_MOVED, MOMENT_AHEAD_MAX
from sealpushd.platform.db import Connection, Database, load_sql
from sealpushd.platform.errors import Aborted, Unauthenticated
from sealpushd.platform.tokens import DeviceCaller
from sealpushd.platform.vault import Vault
from sealpushd.registration import rules
from sealpushd.registration.phones import PhoneNumber
from sealpushd.registration.rules import (
    Binding,
    Closure,
    ClosureKind,
    Facts,
    InstallationChange,
    Installed,
    InstallState,
    KnownDevice,
    Listed,
    Lock,
    NewDevice,
    OwnInstallation,
    Pin,
    Preference,
    PushToken,
    Query,
    Resolved,
)

_FOLDER: Final = Path(__file__).parent

_ENDED: Final = "this installation has ended; register again"

# The attempt right after the commit has this long before the background task tries as well.
CLOSURE_LEASE: Final = timedelta(seconds=5)
CLOSURE_BACKOFF_S_MAX: Final = 60.0
# One call to a peer carries this many.
CLOSURES_MAX: Final = 512


def _sql(name: str) -> str:
    return load_sql(_FOLDER, name)


RESOLVE: Final = _sql("resolve")
PUSH_TARGETS: Final = _sql("push_targets")
FORGET_TOKENS: Final = _sql("forget_tokens")
PULL_BACK_MOMENTS: Final = _sql("pull_back_moments")
IDENTITIES: Final = _sql("identities")
TAKE_CHALLENGES: Final = _sql("take_challenges")
START_REGISTRATION: Final = _sql("start_registration")
NEWEST_CODE: Final = _sql("newest_code")
DROP_REGISTRATION: Final = _sql("drop_registration")
DROP_BEGUN_REGISTRATIONS: Final = _sql("drop_begun_registrations")
TAKE_ATTEMPT: Final = _sql("take_attempt")
RETURN_ATTEMPT: Final = _sql("return_attempt")
CLAIM_REGISTRATION: Final = _sql("claim_registration")
USE_REGISTRATION: Final = _sql("use_registration")
PURGE_REGISTRATIONS: Final = _sql("purge_registrations")
OWNER: Final = _sql("owner")
DEVICES_OF: Final = _sql("devices_of")
OWN: Final = _sql("own")
LOCK: Final = _sql("lock")
LOCK_SIBLINGS: Final = _sql("lock_siblings")
LOCK_INSTALLATIONS: Final = _sql("lock_installations")
PUT_SUBSCRIBER: Final = _sql("put_subscriber")
BIND_NUMBER: Final = _sql("bind_number")
UNBIND_DEVICES: Final = _sql("unbind_devices")
CLEAR_PREFERENCES: Final = _sql("clear_preferences")
TAKE_TOKEN: Final = _sql("take_token")
UNSET_PRIMARY: Final = _sql("unset_primary")
PUT_INSTALLATION: Final = _sql("put_installation")
CHANGE_INSTALLATION: Final = _sql("change_installation")
END_INSTALLATION: Final = _sql("end_installation")
TAKE_COUNTER: Final = _sql("take_counter")
COUNTER: Final = _sql("counter")
PUT_PREFERENCE: Final = _sql("put_preference")
DROP_PREFERENCE: Final = _sql("drop_preference")
LIST_PREFERENCES: Final = _sql("list_preferences")
DROP_BLOCKS: Final = _sql("drop_blocks")
PUT_REGISTRATION_LOCK: Final = _sql("put_registration_lock")
DROP_REGISTRATION_LOCK: Final = _sql("drop_registration_lock")
DROP_LAPSED_LOCK: Final = _sql("drop_lapsed_lock")
DROP_IDLE_LOCK: Final = _sql("drop_idle_lock")
HOLD_REGISTRATION_LOCK: Final = _sql("hold_registration_lock")
NOTE_PIN_ATTEMPT: Final = _sql("note_pin_attempt")
FORGET_PIN_ATTEMPTS: Final = _sql("forget_pin_attempts")
HAS_REGISTRATION_LOCK: Final = _sql("has_registration_lock")
PUT_CLOSURES: Final = _sql("put_closures")
CLAIM_CLOSURES: Final = _sql("claim_closures")
CLOSURES_OF: Final = _sql("closures_of")
CLOSURES_DONE: Final = _sql("closures_done")


@dataclass(frozen=True, slots=True)
class StartedRegistration:
    registration_id: RegistrationId
    app_id: AppId
    phone: PhoneNumber
    code_hash: bytes
    new_subscriber_id: SubscriberId
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class PendingRegistration:
    """A registration one attempt of which was just taken."""

    app_id: AppId
    phone_lookup: bytes
    phone_stored: bytes
    code_hash: bytes
    attempts_left: int
    new_subscriber_id: SubscriberId
    is_used: bool


class DeadToken(NamedTuple):
    device_id: bytes
    push_token: PushToken
    dead_at: datetime


class PushTarget(NamedTuple):
    """Where to push; no token: nowhere."""

    device_id: bytes
    push_token: PushToken
    environment: int
    topic: str
    registered_at: datetime | None
    platform: int
    app_id: str
    token_gone: bool


class Answered(NamedTuple):
    """A challenge, by its time, that a device answered."""

    device_id: DeviceId
    issued_us: int


class RegistrationStore:
    def __init__(self, db: Database, vault: Vault) -> None:
        self._db = db
        self._vault = vault

    # --- hashes ---

    def phone_lookup(self, phone: PhoneNumber) -> bytes:
        return self._vault.lookup(phone.e164.encode(), "phone")

    def identifier_lookup(self, value: str, context: str) -> bytes:
        return self._vault.lookup(value.encode(), context)

    def code_hash(self, registration_id: RegistrationId, digits: str) -> bytes:
        return self._vault.lookup(rules.code_secret(registration_id, digits), "code")

    def pin_secret(self, pin: Pin) -> bytes:
        """What Argon2id is taken over instead of the PIN: a thief of the database alone has nothing to guess at."""
        return self._vault.lookup(pin.value.encode(), "registration lock")

    def challenge_mac(self, body: bytes) -> bytes:
        return self._vault.lookup(body, "challenge")

    def _token(self, device_id: bytes, token: PushToken | None) -> tuple[bytes | None, bytes | None]:
        """Stored form and hash of a token, both None without one. The stored form opens for its device only."""
        if token is None or not token.value:
            return None, None
        plain = token.value.encode()
        return self._vault.encrypt(plain, f"push token {device_id.hex()}"), self._vault.lookup(plain, "push token")

    # --- codes ---

    async def start(self, new: StartedRegistration) -> timedelta | None:
        """None: stored. Else how long until another code for the number may be made."""
        lookup = self.phone_lookup(new.phone)
        async with self._db.transaction() as c:
            # Of two that ask at once, the second sees the first one's code.
            await c.execute(LOCK, _lock_number(lookup))
            row = await c.fetchrow(
                START_REGISTRATION,
                new.registration_id,
                new.app_id,
                lookup,
                self._vault.encrypt(new.phone.e164.encode(), "phone"),
                new.code_hash,
                rules.CODE_ATTEMPTS,
                new.new_subscriber_id,
                new.created_at,
                new.expires_at,
                new.created_at - rules.RESEND_AFTER,
                # Not the wider bound of other moments: for as long the number would wait.
                new.created_at + CLOCK_MOVED,
            )
            if row is not None:
                return None
            newest = await c.fetchval(NEWEST_CODE, new.app_id, lookup)
        # It may have gone meanwhile, because it was not sent.
        return rules.resend_in(newest, now=new.created_at)

    async def drop_registration(self, registration_id: RegistrationId) -> None:
        await self._db.execute("drop_registration", DROP_REGISTRATION, registration_id)

    async def take_attempt(self, registration_id: RegistrationId, now: datetime, expires_max: datetime) -> PendingRegistration | None:
        """The registration, with one attempt less; None: unknown, expired or used up. No code is good after `expires_max`."""
        row = await self._db.fetch_one("take_attempt", TAKE_ATTEMPT, registration_id, now, expires_max)
        if row is None:
            return None
        return PendingRegistration(
            app_id=AppId(row["app_id"]),
            phone_lookup=row["phone_lookup"],
            phone_stored=row["phone"],
            code_hash=row["code_hash"],
            attempts_left=row["attempts_left"],
            new_subscriber_id=SubscriberId(row["new_subscriber_id"]),
            is_used=row["is_used"],
        )

    async def return_attempt(self, registration_id: RegistrationId) -> None:
        await self._db.execute("return_attempt", RETURN_ATTEMPT, registration_id)

    async def claim_registration(self, registration_id: RegistrationId, device_id: DeviceId) -> bool:
        """Keep the registration for this device. False: it is another one's, or was used. Safe to repeat."""
        return await self._db.fetch_one("claim_registration", CLAIM_REGISTRATION, registration_id, device_id) is not None

    async def purge_registrations(self, now: datetime, kept: timedelta) -> None:
        """Those that expired longer ago than they are kept, and those that expire later than any can: a clock that was ahead made them."""
        await self._db.execute("purge_registrations", PURGE_REGISTRATIONS, now, kept)

    # --- binding ---

    async def facts(self, phone_lookup: bytes, device_id: DeviceId, now: datetime) -> Facts:
        """What is known of a number and a device. Moments of a clock that was ahead are set to `now` first, and age from there."""
        latest = now + MOMENT_AHEAD_MAX
        async with self._db.connection() as c:
            facts = await _facts(c, phone_lookup, device_id)
            if not rules.lies_ahead(facts, latest):
                return facts
            await c.execute(PULL_BACK_MOMENTS, facts.owner, now, latest)
            return await _facts(c, phone_lookup, device_id)

    async def bind(
        self,
        registration_id: RegistrationId,
        pending: PendingRegistration,
        device: NewDevice,
        facts: Facts,
        binding: Binding,
        *,
        now: datetime,
    ) -> list[Closure] | None:
        """Carry a binding out in one transaction; returns what other services must be told, stored already.

        None, with nothing changed: the facts are other ones by now, or another device used the registration. Decide again.
        """
        async with self._db.transaction() as c:
            # A number's row may not exist yet, so that there is nothing but its hash to lock. The order is the same everywhere.
            for lock in sorted((_lock_number(pending.phone_lookup), _lock_number(device.device_id))):
                await c.execute(LOCK, lock)
            if await _facts(c, pending.phone_lookup, device.device_id) != facts:
                return None
            if await c.fetchrow(USE_REGISTRATION, registration_id, device.device_id, now) is None:
                return None
            await c.execute(PUT_SUBSCRIBER, binding.subscriber_id, now)
            await c.execute(BIND_NUMBER, pending.phone_lookup, pending.phone_stored, binding.subscriber_id, now)
            if binding.recycled is not None:
                await c.execute(UNBIND_DEVICES, list(binding.unbound), now)
                await c.execute(CLEAR_PREFERENCES, binding.recycled)
            await self._put_installation(c, registration_id, pending.app_id, device, binding, now)
            if binding.ends_lock and facts.lock is not None:
                await c.execute(DROP_LAPSED_LOCK, facts.lock.subscriber_id, facts.lock.pin_hash)
            for abandoned in filter(None, (binding.recycled, binding.left)):
                await c.execute(DROP_IDLE_LOCK, abandoned)
            return await _put_closures(c, rules.closures_of_binding(binding, device.device_id), now, now + CLOSURE_LEASE)

    async def _put_installation(
        self, c: Connection, registration_id: RegistrationId, app_id: AppId, device: NewDevice, binding: Binding, now: datetime
    ) -> None:
        said = device.installation
        stored, lookup = self._token(device.device_id, said.push_token)
        if lookup is not None:
            await c.execute(TAKE_TOKEN, lookup, device.device_id)
        if said.is_primary:
            await c.execute(UNSET_PRIMARY, device.device_id, binding.subscriber_id, app_id)
        await c.execute(
            PUT_INSTALLATION,
            device.device_id,
            binding.subscriber_id,
            app_id,
            said.platform,
            said.push_environment,
            said.push_topic,
            stored,
            lookup,
            said.push_allowed_by_os,
            said.push_allowed_by_app,
            binding.left is not None,
            said.is_primary,
            list(said.subscriptions or ()),
            said.app_version,
            said.locale,
            device.identity_public_key,
            registration_id,
            now,
        )

    # --- authentication ---

    async def identities(self, device_ids: Sequence[DeviceId]) -> list[bytes | None]:
        """Identity keys of active installations, in order."""
        rows = await self._db.fetch("identities", IDENTITIES, list(dict.fromkeys(device_ids)))
        found: dict[bytes, bytes] = {row[0]: row[1] for row in rows}
        return [found.get(device_id) for device_id in device_ids]

    async def take_challenges(self, answered: Sequence[Answered], now: datetime, latest_us: int) -> list[DeviceCaller | None]:
        """Who each proved to be; None where a challenge as new was answered before. Of one device's in a batch the newest counts.

        `latest_us`: no challenge can have been issued later than this, in microseconds; one answered that was does not count.
        """
        newest: dict[DeviceId, int] = {}
        for device_id, issued_us in answered:
            newest[device_id] = max(issued_us, newest.get(device_id, 0))
        rows = await self._db.fetch("take_challenges", TAKE_CHALLENGES, list(newest), list(newest.values()), now, latest_us)
        accepted = {
            row["device_id"]: DeviceCaller(
                DeviceId(row["device_id"]), SubscriberId(row["subscriber_id"]), row["app_id"], row["identity_public_key"]
            )
            for row in rows
        }
        # The very same challenge twice in a batch is a replay, too: pop gives it to the first.
        return [accepted.pop(device_id, None) if newest[device_id] == issued_us else None for device_id, issued_us in answered]

    # --- changes by devices ---

    async def change_installation(self, device_id: DeviceId, counter: int, change: InstallationChange, now: datetime) -> None:
        """Raises Aborted when the counter was used, Unauthenticated when the installation has ended."""
        stored, lookup = self._token(device_id, change.push_token)
        async with self._db.transaction() as c:
            if change.is_primary:
                await c.fetch(LOCK_SIBLINGS, device_id)
                own = await c.fetchrow(OWN, device_id)
                if own is not None:
                    await c.execute(UNSET_PRIMARY, device_id, own["subscriber_id"], own["app_id"])
            row = await c.fetchrow(
                CHANGE_INSTALLATION,
                device_id,
                counter,
                now,
                change.platform,
                change.push_environment,
                change.push_topic,
                change.push_token is not None,
                stored,
                lookup,
                change.push_allowed_by_os,
                change.push_allowed_by_app,
                change.is_primary,
                None if change.subscriptions is None else list(change.subscriptions),
                change.app_version,
                change.locale,
            )
            if row is None:
                await _refuse_change(c, device_id)
            if lookup is not None:
                await c.execute(TAKE_TOKEN, lookup, device_id)

    async def end_installation(self, device_id: DeviceId, counter: int, now: datetime) -> list[Closure]:
        """What other services must be told; nothing when exactly this call ended it before. Raises as `change_installation`."""
        async with self._db.transaction() as c:
            row = await c.fetchrow(TAKE_COUNTER, device_id, counter, now)
            if row is None:
                stored = await c.fetchrow(COUNTER, device_id)
                if stored is not None and stored["state"] == InstallState.UNREGISTERED and stored["change_counter"] == counter:
                    return []
                await _refuse_change(c, device_id)
            subscriber_id = SubscriberId(row["subscriber_id"])
            closures = rules.closures_of_end(device_id, subscriber_id, Reason.UNREGISTERED)
            return await _end_installation(c, device_id, subscriber_id, closures, now)

    async def remove_installation(
        self, by_device_id: DeviceId, counter: int, device_id: DeviceId, listed: Mapping[DeviceId, Listed], now: datetime
    ) -> list[Closure]:
        """End another installation of the subscriber; returns what other services must be told, nothing when that was done before.

        `listed` is what the device log says of both. Raises as `change_installation`, and as `rules.closures_of_removal`.
        """
        async with self._db.transaction() as c:
            # Apart from the binding of that device.
            await c.execute(LOCK, _lock_number(device_id))
            # In one order: of two that remove each other, the second finds that it has ended.
            rows = await c.fetch(LOCK_INSTALLATIONS, [by_device_id, device_id])
            subscriber_id = await _take_counter(c, by_device_id, counter, now)
            installed = {one["device_id"]: Installed(SubscriberId(one["subscriber_id"]), InstallState(one["state"])) for one in rows}
            closures = rules.closures_of_removal(
                device_id, subscriber_id, installed.get(device_id), listed.get(device_id), listed.get(by_device_id)
            )
            # A registration may have entered it into the log already. Were it bound after this, it would be active and in no list.
            await c.execute(DROP_BEGUN_REGISTRATIONS, subscriber_id, device_id)
            return await _end_installation(c, device_id, subscriber_id, closures, now)

    async def set_preference(self, device_id: DeviceId, counter: int, preference: Preference, now: datetime) -> list[Closure]:
        """What other services must be told. Raises as `change_installation`."""
        async with self._db.transaction() as c:
            subscriber_id = await _take_counter(c, device_id, counter, now)
            if preference.is_default:
                await c.execute(DROP_PREFERENCE, subscriber_id, preference.sender_id)
            else:
                await c.execute(
                    PUT_PREFERENCE,
                    subscriber_id,
                    preference.sender_id,
                    preference.block_all,
                    preference.block_advertising,
                    preference.mute,
                    now,
                )
            await c.execute(DROP_BLOCKS, subscriber_id, preference.sender_id)
            closures = rules.closures_of_preference(preference, subscriber_id)
            await _put_closures(c, rules.repeated(closures), now, now + rules.REPEAT_AFTER)
            return await _put_closures(c, closures, now, now + CLOSURE_LEASE)

    async def preferences(self, device_id: DeviceId, after: bytes, limit: int) -> list[Preference]:
        rows = await self._db.fetch("list_preferences", LIST_PREFERENCES, device_id, after, limit)
        return [Preference(SenderId(row["sender_id"]), row["block_all"], row["block_advertising"], row["mute"]) for row in rows]

    # --- the registration lock ---

    async def set_lock(self, device_id: DeviceId, counter: int, pin_hash: bytes | None, now: datetime) -> None:
        """None: no lock any more. Raises as `change_installation`."""
        async with self._db.transaction() as c:
            subscriber_id = await _take_counter(c, device_id, counter, now)
            if pin_hash is None:
                await c.execute(DROP_REGISTRATION_LOCK, subscriber_id)
            else:
                await c.execute(PUT_REGISTRATION_LOCK, subscriber_id, pin_hash, now)

    async def has_lock(self, device_id: DeviceId) -> bool:
        """Raises Unauthenticated when the installation has ended."""
        row = await self._db.fetch_one("has_registration_lock", HAS_REGISTRATION_LOCK, device_id)
        if row is None:
            raise Unauthenticated(_ENDED)
        return bool(row["has_lock"])

    async def take_pin_attempt(self, lock: Lock, now: datetime) -> Lock | None:
        """The lock after the attempt that was noted; None: it is another one by now. Raises LimitExceeded when none is left."""
        async with self._db.transaction() as c:
            held = _lock(await c.fetchrow(HOLD_REGISTRATION_LOCK, lock.subscriber_id))
            if held is None or held != lock:
                return None
            taken = rules.take_pin_attempt(held, now=now)
            await c.execute(NOTE_PIN_ATTEMPT, lock.subscriber_id, taken.wrong_pins, taken.last_wrong_at)
            return taken

    async def forget_pin_attempts(self, lock: Lock) -> None:
        await self._db.execute("forget_pin_attempts", FORGET_PIN_ATTEMPTS, lock.subscriber_id, lock.pin_hash)

    # --- what others must be told ---

    async def claim_closures(self, now: datetime) -> list[Closure]:
        rows = await self._db.fetch("claim_closures", CLAIM_CLOSURES, now, CLOSURES_MAX, CLOSURE_BACKOFF_S_MAX)
        return sorted(map(_closure, rows), key=lambda closure: closure.closure_id)

    async def closures_of(self, device_id: DeviceId) -> list[Closure]:
        return [_closure(row) for row in await self._db.fetch("closures_of", CLOSURES_OF, device_id)]

    async def closures_done(self, closure_ids: Sequence[int]) -> None:
        await self._db.execute("closures_done", CLOSURES_DONE, closure_ids)

    # --- the directory ---

    async def resolve(self, queries: Sequence[Query]) -> list[Resolved | Reason]:
        """A result each, in their order, from one statement."""
        kinds, scopes, lookups, app_ids, sender_ids, *_ = zip(*queries, strict=True)
        return rules.resolve(queries, await self._db.fetch("resolve", RESOLVE, kinds, scopes, lookups, app_ids, sender_ids))

    async def push_targets(self, device_ids: Sequence[bytes]) -> list[PushTarget]:
        """A result each, in their order, from one statement."""
        rows = await self._db.fetch("push_targets", PUSH_TARGETS, device_ids)
        decrypt = self._vault.decrypt
        found: dict[bytes, PushTarget] = {}
        for device_id, stored, environment, topic, registered_at, platform, app_id, token_gone in rows:
            token = rules.NO_TOKEN if stored is None else PushToken(decrypt(stored, f"push token {device_id.hex()}").decode())
            found[device_id] = PushTarget(device_id, token, environment, topic, registered_at, platform, app_id, token_gone)
        unknown = rules.NO_TOKEN
        return [found.get(device_id) or PushTarget(device_id, unknown, 0, "", None, 0, "", False) for device_id in device_ids]

    async def forget_tokens(self, dead: Sequence[DeadToken], now: datetime) -> list[bool]:
        """Whether each token was forgotten, in order, from one statement. A report that stands twice is true twice."""
        device_ids = [one.device_id for one in dead]
        lookups = [self._vault.lookup(one.push_token.value.encode(), "push token") for one in dead]
        rows = await self._db.fetch(
            "forget_tokens", FORGET_TOKENS, device_ids, lookups, [one.dead_at for one in dead], now, now + MOMENT_AHEAD_MAX
        )
        forgotten = {(row[0], row[1]) for row in rows}
        return [pair in forgotten for pair in zip(device_ids, lookups, strict=True)]


async def _facts(c: Connection, phone_lookup: bytes, device_id: DeviceId) -> Facts:
    number = await c.fetchrow(OWNER, phone_lookup)
    owner = None if number is None else SubscriberId(number["subscriber_id"])
    devices = [] if owner is None else await c.fetch(DEVICES_OF, owner)
    own = await c.fetchrow(OWN, device_id)
    return Facts(
        owner=owner,
        owner_devices=tuple(KnownDevice(DeviceId(row[0]), InstallState(row[1]), row[2]) for row in devices),
        own=None
        if own is None
        else OwnInstallation(
            subscriber_id=SubscriberId(own["subscriber_id"]),
            app_id=AppId(own["app_id"]),
            state=InstallState(own["state"]),
            identity_public_key=own["identity_public_key"],
            registration_id=RegistrationId(own["registration_id"]),
        ),
        lock=_lock(number),
    )


def _lock(row: Any) -> Lock | None:
    if row is None or row["pin_hash"] is None:
        return None
    return Lock(SubscriberId(row["subscriber_id"]), row["pin_hash"], row["wrong_pins"], row["last_wrong_at"])


def _lock_number(value: bytes) -> int:
    return int.from_bytes(value[-8:], "big", signed=True)


async def _end_installation(
    c: Connection, device_id: DeviceId, subscriber_id: SubscriberId, closures: Sequence[Closure], now: datetime
) -> list[Closure]:
    """End an installation, if it is there; returns the closures as stored."""
    await c.execute(END_INSTALLATION, device_id, subscriber_id, now)
    await c.execute(DROP_IDLE_LOCK, subscriber_id)
    await _put_closures(c, rules.repeated(closures), now, now + rules.REPEAT_AFTER)
    return await _put_closures(c, closures, now, now + CLOSURE_LEASE)


async def _take_counter(c: Connection, device_id: DeviceId, counter: int, now: datetime) -> SubscriberId:
    """Whose installation the device is, with the counter of its change used up. Raises as `change_installation`."""
    row = await c.fetchrow(TAKE_COUNTER, device_id, counter, now)
    if row is None:
        await _refuse_change(c, device_id)
    return SubscriberId(row["subscriber_id"])


async def _refuse_change(c: Connection, device_id: DeviceId) -> NoReturn:
    stored = await c.fetchrow(COUNTER, device_id)
    if stored is None or stored["state"] != InstallState.ACTIVE:
        raise Unauthenticated(_ENDED)
    raise Aborted("the counter was used: a replay, or another process of the device was faster; take the next counter")


async def _put_closures(c: Connection, closures: Sequence[Closure], now: datetime, due_at: datetime) -> list[Closure]:
    """The same closures with their ids; the background task tells them from `due_at` on."""
    if not closures:
        return []
    rows = await c.fetch(
        PUT_CLOSURES,
        [closure.kind for closure in closures],
        [closure.subscriber_id for closure in closures],
        [closure.device_id for closure in closures],
        [closure.sender_id for closure in closures],
        [closure.reason for closure in closures],
        [closure.advertising_only for closure in closures],
        now,
        due_at,
    )
    return [replace(closure, closure_id=row["closure_id"]) for closure, row in zip(closures, rows, strict=True)]


def _closure(row: Any) -> Closure:
    return Closure(
        kind=ClosureKind(row["kind"]),
        subscriber_id=SubscriberId(row["subscriber_id"]),
        device_id=row["device_id"],
        sender_id=row["sender_id"],
        reason=Reason(row["reason_code"]),
        advertising_only=row["advertising_only"],
        closure_id=row["closure_id"],
    )
