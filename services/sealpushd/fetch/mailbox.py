"""What both listeners of the mailbox do, gathered into batches on the way to the store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog

from sealpush.ids import ID_BYTES, DeviceId, MessageId, SenderId, WakeUpId
from sealpushd.fetch import rules
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.rules import Accepted, AcceptedKey, Ack, AckAnswer, Ended, NewMessage, Taken, TakeQuery, Verdict
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.streams import StreamHub
from sealpushd.platform.batching import NaturalBatcher
from sealpushd.platform.errors import Overloaded, ServiceError, Unavailable
from sealpushd.platform.metrics import DELIVERIES
from sealpushd.platform.outage import Outage

log = structlog.get_logger()

# How long a reader of the journal waits for a notice of this process before it looks for what others wrote.
JOURNAL_LOOK_PERIOD_S: Final = 0.25
SWEEP_PERIOD_S: Final = 1.0


class Journal:
    """Tells readers in this process that something was written."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._draining = False

    async def drain(self) -> None:
        """End the readers: they would hold up a server that is going away."""
        self._draining = True
        self.written()

    def check_open(self) -> None:
        """Raises Unavailable once this process is going away."""
        if self._draining:
            raise Unavailable("this server is going away; connect again")

    def written(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(JOURNAL_LOOK_PERIOD_S):
                await self._event.wait()


class Mailbox:
    """The operations both listeners share, batched on the way to the store."""

    def __init__(self, store: MailboxStore, hub: StreamHub, leases: Leases) -> None:
        self._store = store
        self._hub = hub
        self._leases = leases
        self.journal = Journal()
        self._storing: NaturalBatcher[NewMessage, tuple[Accepted, bool]] = NaturalBatcher(
            self._store_batch, weigh=lambda message: 512 + len(message.tail)
        )
        self._looking_up: NaturalBatcher[AcceptedKey, Accepted | None] = NaturalBatcher(store.lookup_accepted)
        self._taking: NaturalBatcher[TakeQuery, list[Taken]] = NaturalBatcher(self._take_batch)
        self._acknowledging: NaturalBatcher[Ack, AckAnswer] = NaturalBatcher(self._acknowledge_batch)
        self._outage = Outage(
            "sweep of deliveries",
            gone="the sweep of overdue deliveries failed and goes on later",
            back="the sweep of overdue deliveries works again",
        )

    async def lookup_accepted(self, keys: Sequence[AcceptedKey]) -> list[Accepted | None]:
        return await self._looking_up.submit_many(keys)

    async def store(self, messages: Sequence[NewMessage]) -> list[tuple[Accepted, bool] | Exception]:
        """What each key stands for now, and whether this call stored it; or why nothing of that message is stored."""
        return await self._storing.submit_each(messages)

    async def _store_batch(self, messages: Sequence[NewMessage]) -> Sequence[tuple[Accepted, bool] | Exception]:
        first: dict[tuple[SenderId, str], NewMessage] = {}
        for message in messages:
            first.setdefault((message.key.sender_id, message.key.request_id), message)
        distinct = list(first.values())
        live = await self._hub.live(list({delivery.device_id for message in distinct for delivery in message.deliveries}))
        wake_up_ids = [[WakeUpId(os.urandom(ID_BYTES)) for _ in message.deliveries] for message in distinct]
        stored = await self._store.store(distinct, wake_up_ids, live)
        fresh = [message for message in distinct if message.message_id in stored]
        await self._announce(fresh, live)
        # Not by the id, which the second message of a key may have as well.
        is_fresh = set(map(id, fresh))
        older = [message.key for message in messages if id(message) not in is_fresh]
        found = iter(await self._store.lookup_accepted(older)) if older else iter(())
        answers: list[tuple[Accepted, bool] | Exception] = []
        for message in messages:
            if id(message) in is_fresh:
                answers.append((Accepted(message.message_id, message.key.request_mac, len(message.deliveries), message.expires_at), True))
                continue
            accepted = next(found)
            if accepted is None:
                answers.append(Overloaded("a request with this id is being decided; try again"))
            else:
                answers.append((accepted, False))
        return answers

    async def _announce(self, messages: Sequence[NewMessage], live: set[DeviceId]) -> None:
        keys: list[tuple[DeviceId, MessageId]] = []
        pushable = False
        for message in messages:
            for delivery in message.deliveries:
                state, _ = rules.initial_state(message.blocked, delivery)
                DELIVERIES.labels(state.name).inc()
                if not state.terminal:
                    keys.append((delivery.device_id, message.message_id))
                    pushable = pushable or not delivery.push_reason
        await self._hub.announce(keys, live)
        if pushable:
            await self._leases.wake()
        self.journal.written()

    async def take(self, query: TakeQuery) -> list[Taken]:
        return await self._taking.submit(query)

    async def take_many(self, queries: Sequence[TakeQuery]) -> list[list[Taken]]:
        return await self._taking.submit_many(queries)

    async def _take_batch(self, queries: Sequence[TakeQuery]) -> Sequence[list[Taken]]:
        taken = await self._store.take(queries)
        if any(taken):
            self.journal.written()
        return taken

    async def acknowledge(self, acks: Sequence[Ack]) -> list[AckAnswer]:
        return await self._acknowledging.submit_many(acks)

    async def _acknowledge_batch(self, acks: Sequence[Ack]) -> Sequence[AckAnswer]:
        answers = await self._store.acknowledge(acks)
        for answer in answers:
            if answer.verdict is Verdict.ACCEPTED and answer.state is not None and answer.state.terminal:
                DELIVERIES.labels(answer.state.name).inc()
        self.journal.written()
        return answers

    async def close_devices(self, devices: dict[DeviceId, int]) -> list[Ended]:
        """End what is open of installations that are gone, and their streams."""
        ended = await self._store.close_devices(devices)
        self.journal.written()
        await self._hub.dismiss(list(devices))
        return ended

    async def sweep(self) -> None:
        """End what is over its time, for ever."""
        while True:
            try:
                while ended := await self._store.sweep():
                    self.journal.written()
                    for each in ended:
                        DELIVERIES.labels(each.state.name).inc()
                self._outage.worked()
            except ServiceError as e:
                self._outage.failed(e)
            await asyncio.sleep(SWEEP_PERIOD_S)
