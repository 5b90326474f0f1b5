"""Telling other services what a commit here means for them, until they have answered.

What must be told is a row of `pending_closures`, written in the transaction of the change. It is tried right after the commit and
then, with growing pauses, by a background task of any process of this service. All these calls are idempotent: telling twice is
harmless, forgetting is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final, NamedTuple

from prometheus_client import Counter

from sealpush.ids import DeviceId
from sealpush.v1 import common_pb2
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import ServiceError, StoreUnavailable, Unavailable
from sealpushd.platform.outage import Outage
from sealpushd.registration.rules import REGISTRATIONS_KEPT, Closure, ClosureKind
from sealpushd.registration.store import CLOSURES_MAX, RegistrationStore
from sealpushd.v1 import mailbox_pb2, mailbox_pb2_grpc, sealing_pb2, sealing_pb2_grpc

# A call right after a commit must leave the caller's deadline time for the answer.
TELL_TIMEOUT_S: Final = 2.0
POLL_PAUSE_S: Final = 1.0
PURGE_EVERY: Final = timedelta(hours=1)

FAILED = Counter("sealpush_registration_closures_failed", "Attempts to tell another service that failed and are repeated.", ["kind"])


def _name(kind: ClosureKind) -> str:
    return kind.name.lower()


class Stopped(NamedTuple):
    """A delivery that a block ended, in the mailbox's words."""

    message_id: bytes
    device_id: bytes
    stop_point: int
    state: int


class Outbox:
    def __init__(self, store: RegistrationStore, mailbox: MeshChannel, sealing: MeshChannel, clock: Clock) -> None:
        self._store = store
        self._mailbox = mailbox
        self._sealing = sealing
        self._clock = clock
        self._noting = Outage(
            "outbox", gone="peers were told, but that could not be noted; they are told again", back="what peers were told is noted"
        )
        self._telling = {
            kind: Outage(
                f"telling {_name(kind)}",
                gone="another service was not told, and is told later",
                back="another service was told at last",
                kind=_name(kind),
            )
            for kind in ClosureKind
        }
        self._close_devices = mailbox_pb2_grpc.MailboxStub(mailbox.channel).CloseDevices
        self._block = mailbox_pb2_grpc.MailboxStub(mailbox.channel).Block
        self._remove_devices = sealing_pb2_grpc.SealingStub(sealing.channel).RemoveDevices

    async def tell(self, closures: Sequence[Closure]) -> list[Stopped]:
        """Try once; what succeeds is done with, what fails stays for the background task. Returns what blocks ended.

        Raises nothing because a peer, or by now the database, is away: the change itself is committed.
        """
        if not closures:
            return []
        stopped: list[Stopped] = []

        async def block(batch: Sequence[Closure]) -> None:
            for closure in batch:
                stopped.extend(await self._tell_block(closure))

        by_kind = {kind: [closure for closure in closures if closure.kind is kind] for kind in ClosureKind}
        done = await asyncio.gather(
            self._attempt(by_kind[ClosureKind.CLOSE_DEVICE], self._tell_close, CLOSURES_MAX),
            self._attempt(by_kind[ClosureKind.REMOVE_DEVICE], self._tell_remove, CLOSURES_MAX),
            self._attempt(by_kind[ClosureKind.BLOCK_SENDER], block, 1),
        )
        told = [closure_id for ids in done for closure_id in ids]
        if told:
            try:
                await self._store.closures_done(told)
                self._noting.worked()
            except StoreUnavailable as e:
                self._noting.failed(e)
        return stopped

    async def _attempt(self, closures: Sequence[Closure], tell: Callable[[Sequence[Closure]], Awaitable[None]], size: int) -> list[int]:
        """Ids of those that were told."""
        told: list[int] = []
        for start in range(0, len(closures), size):
            batch = closures[start : start + size]
            try:
                await tell(batch)
            except ServiceError as e:
                FAILED.labels(_name(batch[0].kind)).inc(len(batch))
                self._telling[batch[0].kind].failed(e, reason=e.reason)
                if isinstance(e, Unavailable):
                    break
                if len(batch) > 1:
                    # One that the peer refuses must not hold up the others.
                    told.extend(await self._attempt(batch, tell, 1))
            else:
                self._telling[batch[0].kind].worked()
                told.extend(closure.closure_id for closure in batch)
        return told

    async def _tell_close(self, closures: Sequence[Closure]) -> None:
        devices = [
            mailbox_pb2.ClosedDevice(device_id=closure.device_id or b"", reason_code=common_pb2.ReasonCode.ValueType(closure.reason))
            for closure in closures
        ]
        await self._mailbox.call(self._close_devices, mailbox_pb2.CloseDevicesRequest(devices=devices), TELL_TIMEOUT_S)

    async def _tell_remove(self, closures: Sequence[Closure]) -> None:
        devices = [
            sealing_pb2.RemovedDevice(subscriber_id=closure.subscriber_id, device_id=closure.device_id or b"") for closure in closures
        ]
        await self._sealing.call(self._remove_devices, sealing_pb2.RemoveDevicesRequest(devices=devices), TELL_TIMEOUT_S)

    async def _tell_block(self, closure: Closure) -> list[Stopped]:
        request = mailbox_pb2.BlockRequest(
            subscriber_id=closure.subscriber_id, sender_id=closure.sender_id or b"", advertising_only=closure.advertising_only
        )
        response: mailbox_pb2.BlockResponse = await self._mailbox.call(self._block, request, TELL_TIMEOUT_S)
        return [Stopped(one.message_id, one.device_id, one.stop_point, one.state) for one in response.deliveries]

    async def settle(self, device_id: DeviceId) -> None:
        """Returns when nothing is left to be told about a device; raises Unavailable when a peer is away.

        A device that comes back must not be struck by what was still to be told about its end.
        """
        pending = await self._store.closures_of(device_id)
        if pending:
            await self.tell(pending)
            if await self._store.closures_of(device_id):
                raise Unavailable("the end of the earlier registration of this device is still being carried out; try again")

    async def run_once(self) -> int:
        """Tell what is due; returns how many that were."""
        closures = await self._store.claim_closures(self._clock.now())
        await self.tell(closures)
        return len(closures)

    async def run(self) -> None:
        """For ever: tell what is due, and purge registrations that ended long ago."""
        purge_at = self._clock.monotonic()
        while True:
            if self._clock.monotonic() >= purge_at:
                await self._store.purge_registrations(self._clock.now(), REGISTRATIONS_KEPT)
                purge_at = self._clock.monotonic() + PURGE_EVERY.total_seconds()
            if await self.run_once() < CLOSURES_MAX:
                await asyncio.sleep(POLL_PAUSE_S)
