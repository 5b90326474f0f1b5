"""Wake-ups queued in the suite, as many as a benchmark wants and at once.

Devices are rows of registration and wake-ups are messages that the mailbox stores: both are put where the services would put them, the
rows by SQL and the messages by the mailbox's own call, because registering thousands of phones by SMS and sealing for each of them
would measure something else. Everything after that is the product: dispatch, fetch, registration and PostgreSQL are the processes
that `sealpush up` started, and the push services are its simulators. The phones are switched off: nobody fetches.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc

from bench.suite import Suite
from bench.vendors import LIFETIME, SERVICES, Peer, peer_of
from sealpush.ids import uuid7
from sealpush.v1 import common_pb2
from sealpushd.platform.access import OPERATOR
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.db import Connection, Database, connect
from sealpushd.platform.tokens import ServiceKey
from sealpushd.platform.vault import FileKeyWrapper, Vault
from sealpushd.up.vendors import Vendor
from sealpushd.v1 import lanes_pb2, lanes_pb2_grpc, mailbox_pb2, mailbox_pb2_grpc, simulator_pb2, simulator_pb2_grpc

STORE_MAX: Final = 256
PUSHED: Final = 2
LOOK_S: Final = 0.1
# An envelope of an ordinary message, as far as the mailbox sees it.
HEAD, TAIL, STANZA = os.urandom(200), os.urandom(600), os.urandom(120)


@dataclass(frozen=True, slots=True)
class Device:
    device_id: bytes
    push_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Wake-ups that were queued together: when that began, and how many of their lane had been accepted before."""

    vendor: Vendor
    message_ids: list[bytes]
    began: datetime
    accepted_before: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How many of a batch were pushed, when the last one was, and how often the most patient one was tried."""

    pushed: int
    last_at: datetime
    attempts_max: int


class Queue:
    """The lanes of the demo's app, and what waits in them. `opened` opens and closes it.

    Without `holds`, wake-ups go as they are queued, because holding them costs two seconds each time: for benchmarks that only show
    that they run.
    """

    def __init__(
        self,
        suite: Suite,
        sql: Connection,
        vault: Vault,
        lanes: MeshChannel,
        watching: MeshChannel,
        publishing: MeshChannel,
        registration: MeshChannel,
        peer: Peer,
        *,
        holds: bool,
    ) -> None:
        self._suite = suite
        self._sql = sql
        self._sql_is_free = asyncio.Lock()
        self.holds = holds
        self._vault = vault
        self._lanes = lanes
        self._operator: Any = lanes_pb2_grpc.LanesStub(lanes.channel)
        self._watching = watching
        self._watcher: Any = mailbox_pb2_grpc.MailboxStub(watching.channel)
        self._publishing = publishing
        self._mailbox: Any = mailbox_pb2_grpc.MailboxStub(publishing.channel)
        self._registration = registration
        self._closing: Any = mailbox_pb2_grpc.MailboxStub(registration.channel)
        self.peer = peer
        self._sender_id = bytes.fromhex(next(iter(suite.endpoints.senders.values())))

    @classmethod
    @asynccontextmanager
    async def opened(cls, suite: Suite, simulators: grpc.aio.Channel, *, holds: bool) -> AsyncIterator[Queue]:
        def channel(peer: str, caller: str) -> MeshChannel:
            return MeshChannel(peer, suite.endpoints.mesh[peer], ServiceKey.load(caller, suite.secrets / "keys" / f"{caller}.key"))

        database = Database(suite.endpoints.postgres_url, "registration", 1)
        await database.open()
        vault = await Vault.open(database, "registration", FileKeyWrapper(suite.secrets / "vault.key"))
        await database.aclose()
        channels = (
            channel("dispatch", OPERATOR),
            channel("fetch", OPERATOR),
            channel("fetch", "publishing"),
            channel("fetch", "registration"),
        )
        sql = await connect(suite.endpoints.postgres_url)
        try:
            yield cls(suite, sql, vault, *channels, peer_of(suite, simulators), holds=holds)
        finally:
            await sql.close()
            for each in channels:
                await each.aclose()

    # Devices and messages

    async def enrol(self, vendor: Vendor, count: int) -> list[Device]:
        """New devices of the vendor's, each of a subscriber of its own."""
        devices = [Device(uuid7(), token) for token in await self.peer.new_tokens(vendor, count)]
        now = datetime.now(UTC)
        subscribers = [uuid7() for _ in devices]
        tokens = [device.push_token.encode() for device in devices]
        async with self._sql_is_free, self._sql.transaction():
            await self._sql.execute("INSERT INTO registration.subscribers SELECT unnest($1::uuid[]), $2", subscribers, now)
            await self._sql.execute(
                "INSERT INTO registration.installations (device_id, subscriber_id, app_id, platform, push_environment, push_topic,"
                " push_token, push_token_lookup, token_registered_at, push_allowed_by_os, push_allowed_by_app, state, is_primary,"
                " subscriptions, app_version, locale, identity_public_key, registration_id, created_at, updated_at, last_seen_at)"
                " SELECT t.*, $7, true, true, 1, true, '{}', '', '', $8, gen_random_uuid(), $7, $7, $7"
                " FROM (SELECT a, b, $3, $4::smallint, 1, '', c, d FROM unnest($1::uuid[], $2::uuid[], $5::bytea[], $6::bytea[])"
                " AS u (a, b, c, d)) AS t",
                [device.device_id for device in devices],
                subscribers,
                self._suite.endpoints.app_id,
                int(vendor.platform),
                [self._vault.encrypt(token, f"push token {device.device_id.hex()}") for device, token in zip(devices, tokens, strict=True)],
                [self._vault.lookup(token, "push token") for token in tokens],
                now,
                bytes(32),
            )
        return devices

    async def put(self, vendor: Vendor, devices: Sequence[Device], count: int) -> Batch:
        """Queue so many wake-ups for these devices in turn. They wait while the lane is paused."""
        accepted_before, began = (await self.lane(vendor)).accepted, datetime.now(UTC)
        created_ms = int(began.timestamp() * 1000)
        lifetime_ms = int(LIFETIME.total_seconds() * 1000)
        ids = [uuid7() for _ in range(count)]
        messages = [
            mailbox_pb2.NewMessage(
                key=mailbox_pb2.AcceptedKey(sender_id=self._sender_id, request_id=message_id.hex(), request_mac=bytes(32)),
                message_id=message_id,
                subscriber_id=message_id,
                app_id=self._suite.endpoints.app_id,
                content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
                created_at_ms=created_ms,
                expires_at_ms=created_ms + lifetime_ms,
                channel=common_pb2.CHANNEL_PUSH,
                deliveries=[
                    mailbox_pb2.NewDelivery(
                        device_id=devices[n % len(devices)].device_id,
                        stanza=STANZA,
                        platform=common_pb2.Platform.ValueType(vendor.platform),
                    )
                ],
                content_id=uuid7(),
                head=HEAD,
                tail=TAIL,
            )
            for n, message_id in enumerate(ids)
        ]
        for first in range(0, count, STORE_MAX):
            await self._publishing.call(self._mailbox.Store, mailbox_pb2.StoreRequest(messages=messages[first : first + STORE_MAX]))
        return Batch(vendor, ids, began, accepted_before)

    async def until_due(self, batches: Sequence[Batch]) -> None:
        """Return once every one of these could be handed out; nothing else waits in their lanes.

        A lane that is paused has left credit with the mailbox: as many come to dispatch at once, and go back for two seconds.
        """
        if not self.holds:
            return
        wanted = {int(batch.vendor.platform): len(batch.message_ids) for batch in batches}
        async with asyncio.timeout(20):
            while True:
                answer = await self._lanes_of_mailbox()
                if all(answer.get(platform) == count for platform, count in wanted.items()):
                    return
                await asyncio.sleep(LOOK_S)

    async def _lanes_of_mailbox(self) -> dict[int, int]:
        answer = await self._watching.call(self._watcher.GetQueues, mailbox_pb2.GetQueuesRequest())
        return {int(queue.platform): queue.due for queue in answer.queues if queue.app_id == self._suite.endpoints.app_id}

    async def forget(self, devices: Sequence[Device]) -> None:
        """End what is open for these devices, as registration does when they are gone."""
        for first in range(0, len(devices), STORE_MAX):
            closed = [
                mailbox_pb2.ClosedDevice(device_id=device.device_id, reason_code=common_pb2.REASON_CODE_UNREGISTERED)
                for device in devices[first : first + STORE_MAX]
            ]
            await self._registration.call(self._closing.CloseDevices, mailbox_pb2.CloseDevicesRequest(devices=closed))

    # Lanes

    async def pause(self, vendor: Vendor) -> None:
        """Take no wake-ups. What is on the way goes on."""
        if not self.holds:
            return
        request = lanes_pb2.PauseLaneRequest(app_id=self._suite.endpoints.app_id, platform=self._platform(vendor))
        await self._lanes.call(self._operator.PauseLane, request)

    async def resume(self, vendor: Vendor) -> None:
        """Take wake-ups again."""
        request = lanes_pb2.ResumeLaneRequest(app_id=self._suite.endpoints.app_id, platform=self._platform(vendor))
        await self._lanes.call(self._operator.ResumeLane, request)

    async def begin(self, *batches: Batch) -> datetime:
        """Let these go; gives the time just before."""
        began = datetime.now(UTC) if self.holds else min(batch.began for batch in batches)
        for batch in batches:
            await self.resume(batch.vendor)
        return began

    async def lane(self, vendor: Vendor) -> lanes_pb2.Lane:
        answer = await self._lanes.call(self._operator.ListLanes, lanes_pb2.ListLanesRequest())
        found: lanes_pb2.Lane = next(lane for lane in answer.lanes if lane.platform == int(vendor.platform))
        return found

    async def until_held(self, vendor: Vendor, count: int, timeout_s: float) -> None:
        """Return once dispatch holds so many of a lane, or more."""
        async with asyncio.timeout(timeout_s):
            while (await self.lane(vendor)).in_flight < count:  # noqa: ASYNC110 - a count elsewhere has no event
                await asyncio.sleep(LOOK_S)

    async def until_idle(self, vendor: Vendor, timeout_s: float) -> None:
        """Return once dispatch holds nothing of a lane."""
        async with asyncio.timeout(timeout_s):
            while (await self.lane(vendor)).in_flight:  # noqa: ASYNC110 - as above
                await asyncio.sleep(LOOK_S)

    async def until_accepted(self, batch: Batch, count: int, timeout_s: float) -> bool:
        """Return once the push service has taken so many of a batch; False: it did not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while (await self.lane(batch.vendor)).accepted - batch.accepted_before < count:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            return False
        return True

    async def finish(self, batch: Batch, timeout_s: float) -> Ended:
        """What became of a batch, once all of it is PUSHED, or after this time."""
        done = await self.until_accepted(batch, len(batch.message_ids), timeout_s)
        try:
            async with asyncio.timeout(5 if done else 1):
                while (ended := await self._look(batch)).pushed < len(batch.message_ids):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            pass
        return ended

    async def _look(self, batch: Batch) -> Ended:
        async with self._sql_is_free:
            row = await self._sql.fetchrow(
                'SELECT count(*) FILTER (WHERE state = $2), max(pushed_at), max(attempts) FROM "fetch".deliveries'
                " WHERE message_id = ANY ($1)",
                batch.message_ids,
                PUSHED,
            )
        assert row is not None
        return Ended(row[0], row[1] or datetime.now(UTC), row[2] or 0)

    def _platform(self, vendor: Vendor) -> common_pb2.Platform.ValueType:
        return common_pb2.Platform.ValueType(vendor.platform)


class Faults:
    """What goes wrong at the suite's simulators."""

    def __init__(self, simulators: grpc.aio.Channel) -> None:
        self._push: Any = simulator_pb2_grpc.SimulatedPushStub(simulators)

    async def answer(
        self, vendor: Vendor, status: int, reason: str | None, retry_after_s: int | None, *, for_s: float = 0.0, requests: int = 0
    ) -> None:
        """Answer every send so, for a while or so many times."""
        answer = simulator_pb2.SimulatedAnswer(status=status, reason=reason)
        if retry_after_s is not None:
            answer.retry_after.FromTimedelta(timedelta(seconds=retry_after_s))
        await self._set(vendor, simulator_pb2.SimulatedFault(answer=answer), for_s, requests)

    async def swallow(self, vendor: Vendor, *, for_s: float) -> None:
        """Answer no send for a while."""
        await self._set(vendor, simulator_pb2.SimulatedFault(black_hole=simulator_pb2.SimulatedBlackHole()), for_s)

    async def clear(self, vendor: Vendor) -> None:
        await self._push.ClearFaults(simulator_pb2.ClearFaultsRequest(push_service=SERVICES[vendor.kind]))

    async def counters(self, vendor: Vendor) -> simulator_pb2.CountersResponse:
        counted: simulator_pb2.CountersResponse = await self._push.Counters(
            simulator_pb2.CountersRequest(push_service=SERVICES[vendor.kind])
        )
        return counted

    async def _set(self, vendor: Vendor, fault: simulator_pb2.SimulatedFault, for_s: float, requests: int = 0) -> None:
        request = simulator_pb2.SetFaultRequest(push_service=SERVICES[vendor.kind], fault=fault)
        if requests:
            request.next_requests = requests
        else:
            request.duration.FromTimedelta(timedelta(seconds=for_s))
        await self._push.SetFault(request)
