"""Every rate limit of the suite in one table, and the counter that keeps them.

A limit counts what one subject (a number, an address, a login) did in a fixed window; a subject can therefore do up to twice
the limit around the border of two windows. What did not happen counts for nothing: a call that one limit refuses uses up no other, and
what a call had counted it gives back where it then did nothing. Counters live in Valkey. What happens without Valkey stands in the table:

- OPEN: the limit is not kept meanwhile.
- POSTGRES: counting goes on in the service's own schema, from zero. Nobody is locked out because a cache is down and nobody
  gets in more often than twice the limit in that window. Without PostgreSQL the call fails anyway: closed.

Bounds that are no rates (attempts of one code, sizes, queues) stand with the rule they belong to.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple, Protocol

import structlog

from sealpushd.platform.clock import Clock
from sealpushd.platform.db import Database
from sealpushd.platform.errors import LimitExceeded, wait_in_words
from sealpushd.platform.metrics import LIMITS_EXCEEDED
from sealpushd.platform.settings import Settings
from sealpushd.platform.valkey import Valkey, limit_key

log = structlog.get_logger()


class WithoutValkey(enum.Enum):
    """What keeps a limit while Valkey is away."""

    OPEN = "open"
    POSTGRES = "postgres"


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `allowed` of something in each `window`, per subject. `refusal` is what a caller over the limit reads."""

    name: str
    allowed: Callable[[Settings], int]
    window: timedelta
    without_valkey: WithoutValkey
    reason: str
    refusal: str


class Counted(NamedTuple):
    """Something that counts towards a limit, for a subject. Subjects that identify a person must come in as a keyed hash."""

    limit: Limit
    subject: str


class Taken(NamedTuple):
    """What was counted, in which window."""

    counted: Counted
    window: int


def _limit(name: str, allowed: Callable[[Settings], int], window: timedelta, reason: str, refusal: str) -> Limit:
    # Each of today's limits guards money (an SMS has a price) or a secret (a code, a password): none fails open.
    return Limit(name, allowed, window, WithoutValkey.POSTGRES, reason, refusal)


_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
_QUARTER: Final = timedelta(minutes=15)

CODES_PER_NUMBER: Final = _limit(
    "codes_per_number",
    lambda settings: settings.codes_per_number_hour,
    _HOUR,
    "with 5 attempts a code, 25 guesses of a million in an hour; and nobody is flooded with SMS",
    "too many codes were sent to this number",
)
CODES_PER_NUMBER_DAY: Final = _limit(
    "codes_per_number_day",
    lambda settings: 2 * settings.codes_per_number_hour,
    _DAY,
    "somebody who guesses patiently, every hour of every day, needs decades",
    "too many codes were sent to this number today",
)
CODES_PER_ADDRESS: Final = _limit(
    "codes_per_address",
    lambda settings: settings.codes_per_address_hour,
    _HOUR,
    "one machine that asks for codes to many numbers; phones behind one mobile gateway share an address",
    "too many codes were asked for from this address",
)
CODES_PER_PREFIX: Final = _limit(
    "codes_per_prefix",
    lambda settings: settings.codes_per_prefix_hour,
    _HOUR,
    "SMS pumping: blocks of numbers, often premium, that share all but their last digits",
    "too many codes were sent to numbers like this one",
)
SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS: Final = _limit(
    "sign_in_failures_per_login_and_address",
    lambda _: 20,
    _QUARTER,
    "one machine that guesses one organisation's password; it locks out nobody at another address",
    "too many failed sign-ins",
)
SIGN_IN_FAILURES_PER_LOGIN: Final = _limit(
    "sign_in_failures_per_login",
    lambda _: 200,
    _QUARTER,
    "many machines that guess one organisation's password: 20,000 of a day against twelve bytes. Not of an address from which the "
    "organisation signed in lately, and counted apart from outside its networks: these failures lock out others",
    "too many failed sign-ins",
)
SIGN_IN_FAILURES_PER_ADDRESS: Final = _limit(
    "sign_in_failures_per_address",
    lambda _: 100,
    _QUARTER,
    "one machine that tries many logins; an organisation's applications may share an address",
    "too many failed sign-ins from this address",
)

LOCK_CHANGES_PER_DEVICE: Final = _limit(
    "lock_changes_per_device",
    lambda _: 20,
    _HOUR,
    "each takes a slow hash: one phone that changes its PIN without end would hold up everybody who registers a locked number",
    "the registration lock was changed too often",
)

RIGHT_PINS_PER_LOCK: Final = _limit(
    "right_pins_per_lock",
    lambda _: 20,
    _HOUR,
    "each takes a slow hash, and what fails afterwards leaves code and attempts as they were; wrong ones the lock itself counts",
    "this number's PIN was given too often",
)

# Counted in the handouts themselves, in the transaction that makes them: exact over any day, no counter beside them that could fail.
ONE_TIME_PREKEYS_PER_SENDER: Final = _limit(
    "one_time_prekeys_per_sender",
    lambda _: 10,
    _DAY,
    "a sender that asks and never publishes drains a device for others: a device tops up daily when fewer than 20 are left, so that with "
    "10 a day no single sender empties what another may need before that; beyond it the signed prekey serves",
    "this sender had its share of the device's one-time prekeys today",
)

LIMITS: Final = (
    CODES_PER_NUMBER,
    CODES_PER_NUMBER_DAY,
    CODES_PER_ADDRESS,
    CODES_PER_PREFIX,
    SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS,
    SIGN_IN_FAILURES_PER_LOGIN,
    SIGN_IN_FAILURES_PER_ADDRESS,
    LOCK_CHANGES_PER_DEVICE,
    RIGHT_PINS_PER_LOCK,
    ONE_TIME_PREKEYS_PER_SENDER,
)
# From the beginning, so that an alert on it does not miss the first.
for _one in LIMITS:
    LIMITS_EXCEEDED.labels(_one.name)

# $1 limit, $2 subject's hash, $3 window, $4 how many to add, negative to take back, $5 now, $6 when the row may go. Returns the count so
# far. Not below 0: what is given back here may have been counted in Valkey.
COUNT: Final = """
WITH gone AS (
    DELETE FROM limit_counts WHERE ctid IN (SELECT ctid FROM limit_counts WHERE ends_at < $5 LIMIT 100 FOR UPDATE SKIP LOCKED)
)
INSERT INTO limit_counts (name, subject, in_window, counted, ends_at) VALUES ($1, $2, $3, greatest($4, 0), $6)
ON CONFLICT (name, subject, in_window) DO UPDATE SET counted = greatest(limit_counts.counted + $4, 0)
RETURNING counted
"""


class Counting(Protocol):
    """Where counts are kept: adds to the count of a subject in a window and returns it."""

    async def count(self, limit: Limit, subject: str, window: int, add: int) -> int: ...


class PostgresCounter:
    """Counts in the service's schema. Needs `limit_counts(name, subject, in_window, counted, ends_at)`."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def count(self, limit: Limit, subject: str, window: int, add: int) -> int:
        digest = hashlib.blake2b(subject.encode(), digest_size=16).digest()
        now = self._clock.now()
        row = await self._db.fetch_one("limit_count", COUNT, limit.name, digest, window, add, now, now + 2 * limit.window)
        return int(row["counted"]) if row is not None else 0


class Limiter:
    """Keeps the limits of the table."""

    def __init__(self, valkey: Valkey, fallback: Counting, settings: Settings, clock: Clock) -> None:
        self._valkey = valkey
        self._fallback = fallback
        self._settings = settings
        self._clock = clock

    async def take(self, *counted: Counted) -> list[Taken]:
        """Count one of each; or nothing, and raise LimitExceeded with the time to wait, where that is one too many of the first such."""
        # Most that are refused are refused here, and take nothing from others even for a moment.
        await self.check(*counted)
        taken = self._now(counted)
        over = [one for one, so_far in await self._count(taken, 1) if so_far > one.limit.allowed(self._settings)]
        if over:
            await self.give_back(taken)
            raise self._exceeded(over[0].limit)
        return taken

    async def give_back(self, taken: Sequence[Taken]) -> None:
        """Undo `take`: nothing came of it."""
        await self._count(taken, -1)

    async def check(self, *counted: Counted) -> None:
        """Count nothing; raises LimitExceeded when one is used up already."""
        for one, so_far in await self._count(self._now(counted), 0):
            if so_far >= one.limit.allowed(self._settings):
                raise self._exceeded(one.limit)

    async def add(self, *counted: Counted) -> None:
        """Count one of each that has happened, whatever the limit."""
        await self._count(self._now(counted), 1)

    def _now(self, counted: Sequence[Counted]) -> list[Taken]:
        now_s = self._clock.now().timestamp()
        return [Taken(one, int(now_s // one.limit.window.total_seconds())) for one in counted]

    async def _count(self, taken: Sequence[Taken], add: int) -> list[tuple[Counted, int]]:
        """What each comes to. In one go, so that a Valkey that does not answer is waited for once."""
        keys = [(limit_key(limit.name, subject, window), int(limit.window.total_seconds())) for (limit, subject), window in taken]
        counts = await self._valkey.count(keys, add)
        if counts is None:
            counts = [
                await self._fallback.count(limit, subject, window, add) if limit.without_valkey is WithoutValkey.POSTGRES else 0
                for (limit, subject), window in taken
            ]
        found = [(one.counted, so_far) for one, so_far in zip(taken, counts, strict=True)]
        for one, so_far in found:
            if add > 0 and so_far == one.limit.allowed(self._settings):
                # Once a subject and window, and not with each refusal: those the metric counts.
                log.warning("a limit is used up", limit=one.limit.name)
        return found

    def _exceeded(self, limit: Limit) -> LimitExceeded:
        window_s = limit.window.total_seconds()
        retry_after = timedelta(seconds=window_s - self._clock.now().timestamp() % window_s)
        LIMITS_EXCEEDED.labels(limit.name).inc()
        message = f"{limit.refusal}; try again in {wait_in_words(retry_after)}"
        return LimitExceeded(message, retry_after=retry_after, metadata={"limit": limit.name})
