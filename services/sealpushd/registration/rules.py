"""Whose a number is, who receives, what a device may change. Pure: values and `now` in, decisions out.

Whose a number is
-----------------
A code proves possession of the number at this moment, nothing about the past. Operators give numbers that were silent for
months to new people, who must get neither the messages nor the decisions of the one before. So:

- An installation that belongs to the number's subscriber already (same device id and identity key) is the same person.
- Another device joins the subscriber when one of its installations was used within `RECYCLED_AFTER`: several phones of a person.
- When every installation of the subscriber has been silent for longer, or was unregistered, the number counts as recycled: a new
  subscriber gets it, the old installations are unbound, their open deliveries closed and the old preferences deleted. A person
  who comes back after so long, with a new phone, decides anew about senders; nothing else is lost.

A device that proves a different number moves: it leaves its subscriber, its open deliveries there are closed, and it receives
nothing for the new one until they are.

Whose a number is when somebody took it over
--------------------------------------------
Whoever gets a person's number from the operator (SIM swap) gets the code as well. A recipient may set a PIN against that, the registration
lock. It is the subscriber's: one for all of its apps, devices and identifiers, and any of its devices may set, change and remove it.

- While the lock is in force, a device that proves the number gives the PIN as well, also one that moves here from another number. Only an
  active installation of the subscriber (same device id and identity key) needs none: its key proves more than a PIN.
- The code is looked at first: who has not got the number learns of no lock. A missing or wrong PIN leaves the code good.
- Wrong PINs are counted for the lock, over all registrations and processes: `PIN_ATTEMPTS`, then none for `PIN_ATTEMPTS_RETURN_AFTER`.
- It is in force only while an active installation of the subscriber was used within `LOCK_LAPSES_AFTER`. That is shorter than
  `RECYCLED_AFTER`, and operators let a number rest for longer: the next owner of a number is never locked out by somebody who is gone, and
  who lost every phone and forgot the PIN waits so long at the most. Who goes on using the app with a number that is no longer theirs keeps
  it locked: that cannot be told from a SIM swap.
- The first other device that joins after it lapsed ends it for good: its use must not bring back a PIN that it never gave. So does the end
  of the subscriber's last installation.

Who takes a device away from a person
-------------------------------------
Whoever took over a number registers a phone of their own, which must not be able to take away its owner's. So a device takes others away
only where the device log trusts it: the first of its log, or vouched for by one that was. It ends them as they would end themselves.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, NamedTuple

from sealpush.ids import AppId, DeviceId, RegistrationId, SenderId, SubscriberId
from sealpush.model import Reason
from sealpushd.platform import fields
from sealpushd.platform.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    wait_in_words,
)

RECYCLED_AFTER: Final = timedelta(days=90)
LOCK_LAPSES_AFTER: Final = timedelta(days=30)
# Of ten thousand PINs of four digits, 150 in the month that a taken number may stay unnoticed.
PIN_ATTEMPTS: Final = 5
PIN_ATTEMPTS_RETURN_AFTER: Final = timedelta(days=1)
PIN_CHARACTERS_MIN: Final = 4
PIN_CHARACTERS_MAX: Final = 32
# As typed. NFKC makes one character of up to four.
_PIN_TYPED_MAX: Final = 4 * PIN_CHARACTERS_MAX
# A code is one of a million: five guesses, then another code, which the limits count.
CODE_ATTEMPTS: Final = 5
RESEND_AFTER: Final = timedelta(seconds=30)
# Kept after their end, so that a confirmation whose answer was lost can be repeated.
REGISTRATIONS_KEPT: Final = timedelta(days=1)

# Longer than any publish may take, so that none that began before a change is stored after this.
REPEAT_AFTER: Final = timedelta(seconds=15)

CHALLENGE_LIFETIME: Final = timedelta(seconds=60)
# How far the clock of the process that gave a challenge may be ahead. A later one is refused, and the device asks for another.
CHALLENGE_SKEW: Final = timedelta(seconds=5)
CHALLENGE_RANDOM_BYTES: Final = 16
_CHALLENGE_VERSION: Final = b"\x01"
_CHALLENGE_BYTES: Final = 1 + 8 + 16 + CHALLENGE_RANDOM_BYTES + 32

PUSH_TOKEN_CHARACTERS_MAX: Final = 4096
TOPIC_CHARACTERS_MAX: Final = 255
APP_VERSION_CHARACTERS_MAX: Final = 32
LOCALE_CHARACTERS_MAX: Final = 35
SUBSCRIPTIONS_MAX: Final = 64
SUBSCRIPTION_CHARACTERS_MAX: Final = 64
RNOKPP_CHARACTERS_MAX: Final = 32
EXTERNAL_ID_CHARACTERS_MAX: Final = 128

IOS: Final = 1
_IOS_TOKEN = re.compile(r"[0-9A-Fa-f]{64,200}", re.ASCII)
# Printable ASCII without spaces.
_VISIBLE = re.compile(r"[!-~]*", re.ASCII)
_LOCALE = re.compile(r"[A-Za-z0-9-]*", re.ASCII)


# Installations that one number may have at a time. Far above what people own; a message is sealed for each.
INSTALLATIONS_MAX: Final = 64


class IdentifierKind(enum.IntEnum):
    PHONE = 1
    RNOKPP = 2
    EXTERNAL_USER = 3


class InstallState(enum.IntEnum):
    ACTIVE = 1
    UNREGISTERED = 2
    # Its number got a new owner.
    UNBOUND = 3


class ClosureKind(enum.IntEnum):
    CLOSE_DEVICE = 1
    REMOVE_DEVICE = 2
    BLOCK_SENDER = 3


class PushToken:
    """A push service's address of an app instance. Never prints itself."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "PushToken(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PushToken) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Pin:
    """What opens a registration lock, in the form it is compared in. Never prints itself; compared by its hash only."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Pin(…)"


NO_TOKEN: Final = PushToken("")


# --- binding -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstallationChange:
    """What a device says of itself; None: nothing about it. `push_token` NO_TOKEN: it has none any more."""

    platform: int | None = None
    push_token: PushToken | None = None
    push_environment: int | None = None
    push_topic: str | None = None
    push_allowed_by_os: bool | None = None
    push_allowed_by_app: bool | None = None
    is_primary: bool | None = None
    app_version: str | None = None
    locale: str | None = None
    subscriptions: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device that asks to be registered."""

    device_id: DeviceId
    identity_public_key: bytes
    installation: InstallationChange


@dataclass(frozen=True, slots=True)
class KnownDevice:
    device_id: DeviceId
    state: InstallState
    last_seen_at: datetime


@dataclass(frozen=True, slots=True)
class OwnInstallation:
    """What is stored of the device that registers."""

    subscriber_id: SubscriberId
    app_id: AppId
    state: InstallState
    identity_public_key: bytes
    registration_id: RegistrationId


@dataclass(frozen=True, slots=True)
class Installed:
    """Whose installation a device is or was."""

    subscriber_id: SubscriberId
    state: InstallState


@dataclass(frozen=True, slots=True)
class Listed:
    """In whose device log a device is. `vouched`: trusted there, as the first of the log or by the word of one that was."""

    subscriber_id: SubscriberId
    vouched: bool


@dataclass(frozen=True, slots=True)
class Lock:
    """A registration lock. Two are equal when they have the same PIN, set at the same time, however many wrong ones were tried."""

    subscriber_id: SubscriberId
    pin_hash: bytes = field(repr=False)
    wrong_pins: int = field(default=0, compare=False)
    last_wrong_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a binding is decided from: whose the number is, with which devices, under which lock, and what this device was before."""

    owner: SubscriberId | None
    owner_devices: tuple[KnownDevice, ...]
    own: OwnInstallation | None
    lock: Lock | None = None

    @property
    def is_own(self) -> bool:
        """Whether the device is an active installation of the number's subscriber."""
        return self.own is not None and self.own.state is InstallState.ACTIVE and self.own.subscriber_id == self.owner


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a device goes, and what that ends."""

    subscriber_id: SubscriberId
    # The subscriber whose number this was; its preferences go.
    recycled: SubscriberId | None = None
    # Its devices that are unbound.
    unbound: tuple[DeviceId, ...] = ()
    # The subscriber that the device itself leaves.
    left: SubscriberId | None = None
    # The subscriber's lock had lapsed and goes.
    ends_lock: bool = False


@dataclass(frozen=True, slots=True)
class Closure:
    """Something another service must be told. The id is 0 until it is stored."""

    kind: ClosureKind
    subscriber_id: SubscriberId
    device_id: DeviceId | None = None
    sender_id: SenderId | None = None
    reason: Reason = Reason.UNSPECIFIED
    advertising_only: bool = False
    closure_id: int = 0


def resend_in(newest: datetime | None, *, now: datetime) -> timedelta:
    """How long until another code may be made, after one that was made then; None: it is gone by now."""
    return max(timedelta(seconds=1), (newest or now - RESEND_AFTER) + RESEND_AFTER - now)


def check_identity(own: OwnInstallation | None, identity_public_key: bytes, app_id: AppId) -> None:
    """Raises AlreadyExists when the device id belongs to another identity key, or to another app."""
    if own is None:
        return
    if not hmac.compare_digest(own.identity_public_key, identity_public_key):
        raise AlreadyExists("the device id belongs to another identity key; choose a new device id")
    if own.app_id != app_id:
        raise AlreadyExists("the device id belongs to another app; choose a new device id")


def bound_before(own: OwnInstallation | None, registration_id: RegistrationId) -> SubscriberId | None:
    """The subscriber, when exactly this registration bound the device before: its answer was lost, it may be given again."""
    if own is None or own.state is not InstallState.ACTIVE or own.registration_id != registration_id:
        return None
    return own.subscriber_id


def decide_binding(facts: Facts, device_id: DeviceId, new_subscriber_id: SubscriberId, *, now: datetime) -> Binding:
    """To whom a device that proved a number, and opened its lock, belongs; the rules stand at the head of this module.

    Raises FailedPrecondition when the number has as many installations as one message may be sealed for.
    """
    own = facts.own
    ends_lock = facts.lock is not None and not facts.is_own and locked_until(facts, now=now) is None
    if facts.owner is None:
        binding = Binding(new_subscriber_id)
    elif own is not None and own.subscriber_id == facts.owner:
        return Binding(facts.owner, ends_lock=ends_lock)
    elif any(_in_use(device, now) for device in facts.owner_devices):
        if sum(device.state is InstallState.ACTIVE for device in facts.owner_devices) >= INSTALLATIONS_MAX:
            raise FailedPrecondition(
                f"this number has {INSTALLATIONS_MAX} installations already; unregister one that is not used any more and try again"
            )
        binding = Binding(facts.owner, ends_lock=ends_lock)
    else:
        unbound = tuple(device.device_id for device in facts.owner_devices if device.state is InstallState.ACTIVE)
        binding = Binding(new_subscriber_id, recycled=facts.owner, unbound=unbound)
    if own is None or own.state is not InstallState.ACTIVE or own.subscriber_id == binding.subscriber_id:
        return binding
    return replace(binding, left=own.subscriber_id)


def _in_use(device: KnownDevice, now: datetime) -> bool:
    return device.state is InstallState.ACTIVE and now - device.last_seen_at <= RECYCLED_AFTER


def closures_of_binding(binding: Binding, device_id: DeviceId) -> list[Closure]:
    """Whom to tell what after this binding."""
    ended = [(device, binding.recycled) for device in binding.unbound if binding.recycled is not None]
    if binding.left is not None:
        ended.append((device_id, binding.left))
    return [closure for device, subscriber in ended for closure in closures_of_end(device, subscriber, Reason.NUMBER_REBOUND)]


def closures_of_end(device_id: DeviceId, subscriber_id: SubscriberId, reason: Reason) -> list[Closure]:
    """Whom to tell what when a device leaves a subscriber."""
    return [
        Closure(ClosureKind.CLOSE_DEVICE, subscriber_id, device_id, reason=reason),
        Closure(ClosureKind.REMOVE_DEVICE, subscriber_id, device_id),
    ]


def check_removal(by_device_id: DeviceId, device_id: DeviceId) -> None:
    """Raises InvalidRequest for a device that would take itself away."""
    if by_device_id == device_id:
        raise InvalidRequest("this is the calling device itself; to end it call Unregister", field="device_id")


def closures_of_removal(
    device_id: DeviceId, subscriber_id: SubscriberId, installed: Installed | None, listed: Listed | None, by: Listed | None
) -> list[Closure]:
    """Whom to tell what when a device of this subscriber takes another one away; nothing where that was done before.

    `installed` and `listed` are the other one's, `by` the calling device's. Raises PermissionDenied where the log does not trust the
    calling device, NotFound for a device that is not this subscriber's.
    """
    if by is None or by.subscriber_id != subscriber_id or not by.vouched:
        raise PermissionDenied(
            "nobody vouches for this phone, so it cannot remove others; use the phone that registered first, or one that was vouched for"
        )
    if installed == Installed(subscriber_id, InstallState.ACTIVE):
        return closures_of_end(device_id, subscriber_id, Reason.UNREGISTERED)
    if listed is not None and listed.subscriber_id == subscriber_id:
        # A registration that was never finished, or an end that keys has yet to be told of. What the person sees in the list must go.
        return [Closure(ClosureKind.REMOVE_DEVICE, subscriber_id, device_id)]
    if installed is not None and installed.subscriber_id == subscriber_id:
        return []
    raise NotFound("no such device of this person; read the device log again")


def repeated(closures: Sequence[Closure]) -> list[Closure]:
    """What the mailbox is told once more after `REPEAT_AFTER`: a publish that had resolved the recipient before this change is stored by
    then at the latest, and ends like those before it."""
    return [closure for closure in closures if closure.kind is not ClosureKind.REMOVE_DEVICE]


def closures_of_preference(preference: Preference, subscriber_id: SubscriberId) -> list[Closure]:
    """Whom to tell what after a recipient decided about a sender."""
    if not preference.block_all and not preference.block_advertising:
        return []
    only = not preference.block_all
    return [Closure(ClosureKind.BLOCK_SENDER, subscriber_id, sender_id=preference.sender_id, advertising_only=only)]


# --- the registration lock -------------------------------------------------------------------------------------------------


class RegistrationLocked(FailedPrecondition):
    """The number is locked, and the PIN is missing or wrong."""

    reason = "REGISTRATION_LOCKED"


def typed_pin(text: str) -> Pin | None:
    """What was typed, as it is compared: in NFKC (keyboards differ in how they write the same), without spaces around. None: nothing."""
    if len(text) > _PIN_TYPED_MAX:
        raise InvalidRequest(f"a PIN has at most {PIN_CHARACTERS_MAX} characters", field="pin")
    text = unicodedata.normalize("NFKC", text).strip()
    return Pin(text) if text else None


def check_new_pin(pin: Pin) -> Pin:
    """The PIN, if it is worth setting."""
    text = pin.value
    if not PIN_CHARACTERS_MIN <= len(text) <= PIN_CHARACTERS_MAX or not text.isprintable():
        raise InvalidRequest(
            f"a PIN has {PIN_CHARACTERS_MIN} to {PIN_CHARACTERS_MAX} characters that can be seen: digits or a phrase", field="pin"
        )
    # A run of digits may go on from 9 to 0.
    base = 10 if text.isascii() and text.isdecimal() else 0x110000
    steps = {(ord(after) - ord(before)) % base for before, after in pairwise(text)}
    if len(steps) == 1 and steps <= {0, 1, base - 1}:
        raise InvalidRequest("this PIN is among the first that anybody tries; choose one that does not repeat or count", field="pin")
    return pin


def lies_ahead(facts: Facts, latest: datetime) -> bool:
    """Whether any moment in it is later than can be: a clock that was ahead wrote it, and what is reckoned from it would not end."""
    moments = [device.last_seen_at for device in facts.owner_devices]
    if facts.lock is not None and facts.lock.last_wrong_at is not None:
        moments.append(facts.lock.last_wrong_at)
    return any(moment > latest for moment in moments)


def locked_until(facts: Facts, *, now: datetime) -> datetime | None:
    """Until when the lock keeps this device out without the PIN, should nobody use the number's devices; None: it does not."""
    if facts.lock is None or facts.is_own:
        return None
    used_at = max((device.last_seen_at for device in facts.owner_devices if device.state is InstallState.ACTIVE), default=None)
    return used_at + LOCK_LAPSES_AFTER if used_at is not None and now - used_at <= LOCK_LAPSES_AFTER else None


def pin_attempts_left(lock: Lock, *, now: datetime) -> int:
    if lock.last_wrong_at is None or now - lock.last_wrong_at >= PIN_ATTEMPTS_RETURN_AFTER:
        return PIN_ATTEMPTS
    return PIN_ATTEMPTS - lock.wrong_pins


def take_pin_attempt(lock: Lock, *, now: datetime) -> Lock:
    """The lock with one wrong PIN more: counted before the PIN is looked at, so that parallel guesses are, too.

    Raises LimitExceeded when none is left.
    """
    left = pin_attempts_left(lock, now=now)
    if left <= 0:
        wait = _attempts_return_in(lock, now)
        raise LimitExceeded(
            f"too many wrong PINs; try again in {wait_in_words(wait)}, or change the PIN on a phone that is registered",
            retry_after=wait,
            metadata={"limit": "registration_lock"},
        )
    return replace(lock, wrong_pins=PIN_ATTEMPTS - left + 1, last_wrong_at=now)


def _attempts_return_in(lock: Lock, now: datetime) -> timedelta:
    return PIN_ATTEMPTS_RETURN_AFTER - (now - (lock.last_wrong_at or now))


def locked(lock: Lock, until: datetime, *, pin_given: bool, now: datetime) -> RegistrationLocked:
    """The refusal of a device without the right PIN. `until` as `locked_until` says, `lock` after the attempt."""
    left = pin_attempts_left(lock, now=now)
    # Whole days: when exactly the person last used a phone is nobody's business.
    lapses_at = until.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return RegistrationLocked(
        "the PIN of this number is wrong" if pin_given else "this number is locked; give the PIN beside the code",
        retry_after=None if left else _attempts_return_in(lock, now),
        metadata={"attempts_left": str(left), "lock_lapses_at": lapses_at.strftime("%Y-%m-%dT%H:%M:%SZ")},
    )


# --- proofs --------------------------------------------------------------------------------------------------------------


def make_challenge(device_id: DeviceId, random: bytes, mac: Callable[[bytes], bytes], *, now: datetime) -> bytes:
    """version1 | issued µs8 | device_id16 | random16 | mac32. Whoever holds the MAC's key recognises it: nothing is stored."""
    issued_us = int(now.timestamp() * 1_000_000)
    body = _CHALLENGE_VERSION + issued_us.to_bytes(8, "big") + device_id + random
    return body + mac(body)


def challenge_issued_us(challenge: bytes, device_id: DeviceId, mac: Callable[[bytes], bytes], *, now: datetime) -> int | None:
    """When this challenge was issued, if it was, to this device, and is still good. Else None, without saying why."""
    if len(challenge) != _CHALLENGE_BYTES or challenge[:1] != _CHALLENGE_VERSION:
        return None
    body = challenge[:-32]
    if not hmac.compare_digest(mac(body), challenge[-32:]) or challenge[9:25] != device_id:
        return None
    issued_us = int.from_bytes(challenge[1:9], "big")
    age = timedelta(microseconds=int(now.timestamp() * 1_000_000) - issued_us)
    return issued_us if -CHALLENGE_SKEW <= age <= CHALLENGE_LIFETIME else None


def latest_challenge_us(now: datetime) -> int:
    """The latest issue time, in microseconds, that `challenge_issued_us` accepts now."""
    return int((now + CHALLENGE_SKEW).timestamp() * 1_000_000)


def code_secret(registration_id: RegistrationId, digits: str) -> bytes:
    """What is hashed, with the vault's key, instead of keeping a code."""
    return registration_id + hashlib.sha256(digits.encode()).digest()


# --- what devices say of themselves -----------------------------------------------------------------------------------------


def check_installation(change: InstallationChange) -> InstallationChange:
    """The change, if each field is within its bounds."""
    token = None if change.push_token is None else change.push_token.value
    if token:
        if len(token) > PUSH_TOKEN_CHARACTERS_MAX or _VISIBLE.fullmatch(token) is None:
            raise InvalidRequest(f"a push token is at most {PUSH_TOKEN_CHARACTERS_MAX} visible ASCII characters", field="push_token")
        if change.platform == IOS and _IOS_TOKEN.fullmatch(token) is None:
            raise InvalidRequest("an APNs token is 64 to 200 hex digits", field="push_token")
    _check_text(change.push_topic, TOPIC_CHARACTERS_MAX, _VISIBLE, "push_topic")
    _check_text(change.locale, LOCALE_CHARACTERS_MAX, _LOCALE, "locale")
    _check_text(change.app_version, APP_VERSION_CHARACTERS_MAX, _VISIBLE, "app_version")
    for name in fields.bounded(change.subscriptions or (), "subscriptions", SUBSCRIPTIONS_MAX):
        fields.text(name, "subscriptions", SUBSCRIPTION_CHARACTERS_MAX, characters_min=1)
    return change


def _check_text(text: str | None, characters_max: int, pattern: re.Pattern[str], field: str) -> None:
    if text is not None and (len(text) > characters_max or pattern.fullmatch(text) is None):
        raise InvalidRequest(f"{field} has at most {characters_max} characters, none of them unusual", field=field)


def check_locale(locale: str) -> str:
    _check_text(locale, LOCALE_CHARACTERS_MAX, _LOCALE, "locale")
    return locale


@dataclass(frozen=True, slots=True)
class Preference:
    """What a recipient decided about a sender."""

    sender_id: SenderId
    block_all: bool
    block_advertising: bool
    mute: bool

    @property
    def is_default(self) -> bool:
        return not (self.block_all or self.block_advertising or self.mute)


# --- resolving: the hottest code of the service. NamedTuples, because making one takes a third of a frozen dataclass ------------


class Query(NamedTuple):
    """One recipient to resolve."""

    kind: int
    scope: str
    lookup: bytes
    app_id: str
    sender_id: bytes
    primary_only: bool = False
    subscriptions: tuple[str, ...] = ()
    platforms: tuple[int, ...] = ()


class Row(NamedTuple):
    """One row of sql/resolve.sql."""

    n: int
    subscriber_id: bytes
    block_all: bool | None
    block_advertising: bool | None
    mute: bool | None
    device_id: bytes | None
    platform: int
    is_active: bool
    is_primary: bool
    subscriptions: Sequence[str]
    push_allowed_by_os: bool
    push_allowed_by_app: bool
    has_token: bool
    token_gone: bool


class Target(NamedTuple):
    """A device that receives. `push_reason` says why it is not pushed, NONE that it is."""

    device_id: bytes
    platform: int
    push_reason: int


class Resolved(NamedTuple):
    """Who receives, and what the recipient decided about the sender."""

    subscriber_id: bytes
    devices: list[Target]
    block_all: bool
    block_advertising: bool
    mute: bool


def resolve(queries: Sequence[Query], rows: Iterable[Any]) -> list[Resolved | Reason]:
    """The result of each query, in their order, from the rows (shaped as `Row`) that the store found for them, sorted by n."""
    results: list[Resolved | Reason | None] = [None] * len(queries)
    n = 0
    found: list[Any] = []
    for row in rows:
        if row[0] != n:
            if found:
                results[n - 1] = _resolve_known(queries[n - 1], found)
            n = row[0]
            found = [row]
        else:
            found.append(row)
    if found:
        results[n - 1] = _resolve_known(queries[n - 1], found)
    return [_nobody(query) if result is None else result for query, result in zip(queries, results, strict=True)]


def _nobody(query: Query) -> Reason:
    return Reason.CONSUMER_PHONE_NOT_FOUND if query.kind == IdentifierKind.PHONE else Reason.CONSUMER_ID_NOT_FOUND


def _resolve_known(query: Query, rows: list[Any]) -> Resolved | Reason:
    first = rows[0]
    if first[5] is None:
        return Reason.NO_APPLICATION
    active = [row for row in rows if row[7]]
    if not active:
        return Reason.NO_ACTIVE_INSTALLATIONS
    if query.platforms:
        active = [row for row in active if row[6] in query.platforms]
        if not active:
            return Reason.PLATFORM_NOT_FOUND
    if query.primary_only:
        active = [row for row in active if row[8]]
        if not active:
            return Reason.NO_PRIMARY_DEVICES
    if query.subscriptions:
        asked = set(query.subscriptions)
        active = [row for row in active if asked.issubset(row[9])]
        if not active:
            return Reason.SUBSCRIPTION_FAILED
    devices = [Target(row[5], row[6], 0 if row[10] and row[11] and row[12] else push_reason(*row[10:14])) for row in active]
    return Resolved(first[1], devices, bool(first[2]), bool(first[3]), bool(first[4]))


def push_reason(allowed_by_os: bool, allowed_by_app: bool, has_token: bool, token_gone: bool) -> Reason:
    """Why an installation is not pushed; NONE: it is. What its user forbade comes before what is missing.

    A token that the push service called dead says that the app was removed; one that was never there, that it asks by itself.
    """
    if not allowed_by_os:
        return Reason.PUSH_OS_DISABLED
    if not allowed_by_app:
        return Reason.PUSH_DISABLED
    if has_token:
        return Reason.UNSPECIFIED
    return Reason.TOKEN_GONE if token_gone else Reason.NO_PUSH_TOKEN
