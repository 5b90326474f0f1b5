"""What `doctor` and `db status` look at. Each check gives a line for people and whether it is well."""

from __future__ import annotations

import asyncio
import http.client
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sealpushd.platform.clock import CLOCK_SKEW_MAX

if TYPE_CHECKING:
    from sealpushd.v1.administration_pb2 import EntryInUse
    from sealpushd.v1.lanes_pb2 import Lane
    from sealpushd.v1.mailbox_pb2 import Queue
    from sealpushd.v1.providers_pb2 import StoredProvider

# Fewer weeks than this ahead mean that maintenance does not run: it keeps six.
PARTITION_WEEKS_AHEAD_MIN: Final = 2
CERTIFICATE_DAYS_LEFT_MIN: Final = 14
# Two people have to meet at the machine where the root is.
ENTRY_DAYS_LEFT_MIN: Final = 14
# A new credential needs people at the vendor's console, and a second pair of eyes.
CREDENTIAL_DAYS_LEFT_MIN: Final = 30
# What was set so lately may be set again.
CLOCK_MOVED_LATELY: Final = timedelta(hours=1)
# `up` starts again within seconds what ends, not what hangs.
_LOOK: Final = "what dies is started again; if it stays so, look into {}"


@dataclass(frozen=True, slots=True)
class Check:
    ok: bool
    name: str
    text: str

    @property
    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<28} {self.text}"


async def check_schemas(url: str) -> list[Check]:
    """A check for each service: is its schema the one of this program? Raises StoreUnavailable."""
    from sealpushd.platform.migrate import SERVICES, SchemaError, check_schema, migrations_of

    checks = []
    for service in SERVICES:
        try:
            await check_schema(url, service)
            known = migrations_of(service)
            checks.append(Check(True, f"schema {service}", f"version {known[-1].version} ({known[-1].name})" if known else "has no tables"))
        except SchemaError as e:
            checks.append(Check(False, f"schema {service}", str(e)))
    return checks


async def check_partitions(url: str, now: datetime | None = None) -> Check:
    """Do the mailbox's partitions reach far enough? Raises StoreUnavailable."""
    from sealpushd.platform.db import connect

    connection = await connect(url)
    try:
        last = await connection.fetchval(
            "SELECT max(right(child.relname, 7)) FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid"
            " WHERE inhparent = to_regclass('fetch.messages')"
        )
    finally:
        await connection.close()
    return judge_partitions(last, now or datetime.now(UTC))


def judge_partitions(last_week: str | None, now: datetime) -> Check:
    """`last_week` as in the partitions' names: 2026w48."""
    name = "partitions"
    if last_week is None:
        return Check(False, name, "there are none: run `sealpush db migrate`")
    year, _, week = last_week.partition("w")
    until = datetime.fromisocalendar(int(year), int(week), 1).replace(tzinfo=UTC) + timedelta(weeks=1)
    weeks = (until - now) / timedelta(weeks=1)
    if weeks < PARTITION_WEEKS_AHEAD_MIN:
        return Check(False, name, f"they end on {until:%Y-%m-%d}: run `sealpush db maintain`, and let `--every 1h` keep it running")
    return Check(True, name, f"reach until {until:%Y-%m-%d}")


async def check_clock(url: str) -> Check:
    """Is this machine's clock the database's? Raises StoreUnavailable."""
    from sealpushd.platform.db import connect

    connection = await connect(url)
    try:
        before = datetime.now(UTC)
        theirs = await connection.fetchval("SELECT clock_timestamp()")
        after = datetime.now(UTC)
    finally:
        await connection.close()
    skew = abs(theirs - (before + (after - before) / 2))
    if skew > CLOCK_SKEW_MAX:
        return Check(False, "clock", f"differs from PostgreSQL's by {skew.total_seconds():.1f} s: set both by NTP")
    return Check(True, "clock", f"differs from PostgreSQL's by {skew.total_seconds() * 1000:.0f} ms")


async def check_service_clock(service: str, address: str) -> Check:
    """Is a service's clock this machine's, and was it left alone lately? `address` is where it shows its metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    name = f"clock {service}"
    began = time.monotonic()
    try:
        text = await asyncio.to_thread(_get_metrics, address)
    except (OSError, http.client.HTTPException) as e:
        return Check(False, name, f"{address} does not tell ({type(e).__name__})")
    now = datetime.now(UTC).timestamp() - (time.monotonic() - began) / 2
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    return judge_clock(name, found, now)


def _get_metrics(address: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=3)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def judge_clock(name: str, metrics: Mapping[str, float], now: float) -> Check:
    """By what a service's metrics say of its clock; `now` in epoch seconds."""
    theirs = metrics.get("sealpush_clock_seconds")
    if theirs is None:
        return Check(False, name, "its metrics say nothing of its clock: it is of another version")
    ahead = theirs - now
    if abs(ahead) > CLOCK_SKEW_MAX.total_seconds():
        return Check(False, name, f"differs from this machine's by {ahead:.1f} s: set both by NTP")
    database_ahead = metrics.get("sealpush_clock_database_ahead_seconds", 0.0)
    if abs(database_ahead) > CLOCK_SKEW_MAX.total_seconds():
        return Check(False, name, f"differs from PostgreSQL's by {-database_ahead:.1f} s: set both by NTP")
    since_s, moved_s = metrics.get("sealpush_clock_since_move_seconds", math.inf), metrics.get("sealpush_clock_moved_by_seconds", 0.0)
    if since_s < CLOCK_MOVED_LATELY.total_seconds():
        direction = "forward" if moved_s > 0 else "back"
        moved = f"was set {direction} by {timedelta(seconds=round(abs(moved_s)))}, {timedelta(seconds=round(since_s))} ago"
        return Check(False, name, f"{moved}: it is right now, so find out what set it, and let NTP run (docs/operations.md, Clocks)")
    return Check(True, name, f"differs from this machine's by {ahead * 1000:.0f} ms")


def check_certificate(path: Path, now: datetime | None = None) -> Check:
    """Does the first certificate of a PEM file last for a while?"""
    from cryptography import x509

    name = f"certificate {path.name}"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as e:
        return Check(False, name, f"{path} cannot be read: {e}")
    left = certificate.not_valid_after_utc - (now or datetime.now(UTC))
    if left < timedelta(days=CERTIFICATE_DAYS_LEFT_MIN):
        return Check(False, name, f"ends on {certificate.not_valid_after_utc:%Y-%m-%d}: renew it (`sealpush up` does when it starts)")
    return Check(True, name, f"good until {certificate.not_valid_after_utc:%Y-%m-%d}")


async def check_valkey(url: str, log: Path) -> Check:
    """Does Valkey answer? `log` is where to look if not."""
    import redis.asyncio
    import redis.exceptions

    started = time.monotonic()
    client = redis.asyncio.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3)
    try:
        async with client:
            await client.ping()
    except (redis.exceptions.RedisError, OSError) as e:
        return Check(
            False, "valkey", f"does not answer ({type(e).__name__}): messages still arrive, more slowly; if it stays so, look into {log}"
        )
    return Check(True, "valkey", f"answers in {(time.monotonic() - started) * 1000:.0f} ms")


async def check_health(service: str, address: str, log: Path) -> Check:
    """Does a service's mesh listener say that it serves? `log` is where to look if not."""
    import grpc

    from sealpushd.up import health

    name = f"service {service}"
    started = time.monotonic()
    try:
        answer = await health.ask(address, timeout_s=3)
    except grpc.aio.AioRpcError as e:
        return Check(False, name, f"{address} does not answer ({e.code().name}): {_LOOK.format(log)}")
    if answer != "SERVING":
        return Check(False, name, f"{address} answers {answer}: {_LOOK.format(log)}")
    return Check(True, name, f"{address} serves, answers in {(time.monotonic() - started) * 1000:.0f} ms")


async def check_port(name: str, host: str, port: int, log: Path) -> Check:
    """Does anything listen there? `log` is where to look if not."""
    try:
        async with asyncio.timeout(3):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return Check(False, name, f"nothing listens on {host}:{port}: {_LOOK.format(log)}")
    writer.close()
    await writer.wait_closed()
    return Check(True, name, f"{host}:{port} takes connections")


async def check_postgres(url: str) -> list[Check]:
    """PostgreSQL, and everything about it that can only be asked when it answers."""
    from sealpushd.platform.db import connect
    from sealpushd.platform.errors import StoreUnavailable

    started = time.monotonic()
    try:
        connection = await connect(url)
        try:
            durable = await connection.fetchval("SELECT current_setting('fsync') || '/' || current_setting('synchronous_commit')")
            version = await connection.fetchval("SHOW server_version")
        finally:
            await connection.close()
        checks = [Check(True, "postgres", f"{version} answers in {(time.monotonic() - started) * 1000:.0f} ms")]
        if durable != "on/on":
            checks.append(Check(False, "durability", f"fsync/synchronous_commit is {durable}: accepted messages may be lost; set both on"))
        return [*checks, *await check_schemas(url), await check_partitions(url), await check_clock(url)]
    except StoreUnavailable as e:
        return [Check(False, "postgres", str(e))]


async def check_push(dispatch: str, fetch: str, operator_key: Path, log: Path) -> list[Check]:
    """A check for each credential and each lane, also for what waits without one. `log` is where to look when nobody answers."""
    from sealpushd.platform.access import OPERATOR
    from sealpushd.platform.clients import MeshChannel
    from sealpushd.platform.errors import ServiceError
    from sealpushd.platform.tokens import ServiceKey
    from sealpushd.v1 import lanes_pb2, mailbox_pb2, providers_pb2
    from sealpushd.v1.lanes_pb2_grpc import LanesStub
    from sealpushd.v1.mailbox_pb2_grpc import MailboxStub
    from sealpushd.v1.providers_pb2_grpc import ProvidersStub

    key = ServiceKey.load(OPERATOR, operator_key)
    channel, mailbox = (MeshChannel(name, address, key, logs_outages=False) for name, address in (("dispatch", dispatch), ("fetch", fetch)))
    try:
        listed = await channel.call(ProvidersStub(channel.channel).ListProviders, providers_pb2.ListProvidersRequest(), timeout_s=3)
        lanes = (await channel.call(LanesStub(channel.channel).ListLanes, lanes_pb2.ListLanesRequest(), timeout_s=3)).lanes
        queues = (await mailbox.call(MailboxStub(mailbox.channel).GetQueues, mailbox_pb2.GetQueuesRequest(), timeout_s=3)).queues
    except ServiceError as e:
        return [Check(False, "lanes", f"dispatch or fetch does not tell ({e.message}): {_LOOK.format(log)}")]
    finally:
        await asyncio.gather(channel.aclose(), mailbox.aclose())
    now = datetime.now(UTC)
    known = {(lane.app_id, lane.platform) for lane in lanes}
    return [
        *(judge_credential(each, now) for each in listed.providers),
        *(judge_lane(each) for each in lanes),
        *(judge_queue_without_lane(each) for each in queues if (each.app_id, each.platform) not in known),
    ]


async def check_entries(accounts: str, operator_key: Path, log: Path, now: datetime | None = None) -> list[Check]:
    """A check for each entry of a sender, or of the platform, that ends soon. `log` is where to look when nobody answers."""
    from sealpushd.platform.access import OPERATOR
    from sealpushd.platform.clients import MeshChannel
    from sealpushd.platform.errors import ServiceError
    from sealpushd.platform.tokens import ServiceKey
    from sealpushd.v1.administration_pb2 import GetEndingEntriesRequest
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    now = now or datetime.now(UTC)
    request = GetEndingEntriesRequest()
    request.before.FromDatetime(now + timedelta(days=ENTRY_DAYS_LEFT_MIN))
    channel = MeshChannel("accounts", accounts, ServiceKey.load(OPERATOR, operator_key), logs_outages=False)
    try:
        ending = (await channel.call(AdministrationStub(channel.channel).GetEndingEntries, request, timeout_s=3)).entries
    except ServiceError as e:
        return [Check(False, "entries", f"accounts does not tell ({e.message}): {_LOOK.format(log)}")]
    finally:
        await channel.aclose()
    return judge_entries(ending, now, ENTRY_DAYS_LEFT_MIN)


def judge_entries(ending: Sequence[EntryInUse], now: datetime, days: int) -> list[Check]:
    """A check for each entry that ends within so many days; one that is well where none does."""
    if not ending:
        return [Check(True, "entries", f"none ends within {days} days")]
    return [judge_entry(each, now) for each in ending]


def judge_entry(entry: EntryInUse, now: datetime) -> Check:
    """An entry that ends soon, or has ended."""
    from sealpush.ids import uuid_text

    ends_at = entry.ends_at.ToDatetime(UTC)
    ends = f"{'ended' if ends_at <= now else 'ends'} on {ends_at:%Y-%m-%d}"
    root = f"the root {entry.root_public_key.hex()[:16]}…"
    if not entry.sender_id:
        todo = f"sign another with {root} (`sealpush root certify-platform`), then `sealpush accounts put-platform`"
        return Check(False, "entry of the platform", f"{ends}: {todo}")
    todo = f"sign another with {root} (`sealpush root certify-sender --sender-id {uuid_text(entry.sender_id)}`)"
    return Check(False, f"entry of {entry.display_name}", f"{ends}: {todo}, then `sealpush accounts put-sender`")


def judge_queue_without_lane(queue: Queue) -> Check:
    """What waits where nothing pushes."""
    from sealpushd.platform.metrics import platform_label

    lane = f"{queue.app_id} {platform_label(queue.platform)}"
    waiting = queue.waiting + queue.held
    return Check(False, f"lane {lane}", f"{waiting} wait and nothing pushes them: put a credential with `sealpush providers add {lane}`")


def judge_credential(stored: StoredProvider, now: datetime) -> Check:
    """Is a push service's credential in use, and for how long?"""
    from sealpushd.platform.metrics import platform_label

    lane = f"{stored.app_id} {platform_label(stored.platform)}"
    name = f"credential {lane}"
    if stored.problem:
        return Check(False, name, f"what is stored is not in use: {stored.problem}")
    if not stored.HasField("expires_at"):
        return Check(True, name, f"{stored.push_service}, in use; nobody said when it ends (--expires)")
    ends_at = stored.expires_at.ToDatetime(UTC)
    if ends_at <= now:
        return Check(False, name, f"ended on {ends_at:%Y-%m-%d}: put a new one with `sealpush providers rotate {lane}`")
    if ends_at - now < timedelta(days=CREDENTIAL_DAYS_LEFT_MIN):
        return Check(False, name, f"ends on {ends_at:%Y-%m-%d}: put a new one with `sealpush providers rotate {lane}`")
    return Check(True, name, f"{stored.push_service}, in use, good until {ends_at:%Y-%m-%d}")


def judge_lane(lane: Lane) -> Check:
    """Do wake-ups go out? A lane that somebody paused is well."""
    from sealpushd.platform.metrics import platform_label
    from sealpushd.v1 import lanes_pb2

    name = f"lane {lane.app_id} {platform_label(lane.platform)}"
    well = lane.state == lanes_pb2.LANE_STATE_PAUSED or (lane.state == lanes_pb2.LANE_STATE_OPEN and not lane.is_suspicious)
    return Check(well, name, lane.detail)


def all_well(checks: Sequence[Check]) -> bool:
    return all(check.ok for check in checks)
