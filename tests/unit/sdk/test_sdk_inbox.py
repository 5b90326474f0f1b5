"""Handing over, by whatever ends in the middle of it: calls that are cancelled, a store that is busy, processes that are killed."""

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sealpush.entries import SenderEntries
from sealpush.errors import KeystoreBusy
from sealpush.ids import ContentId, MessageId, SenderId
from sealpush.inbox import MARKED_MIN, Inbox, Message
from sealpush.keystore import InboxMessage, Keystore, PendingAcknowledgement
from sealpush.live import MessageStream
from sealpush.local import EXPIRY_SKEW_MS, ServerTime, Store, Trouble
from sealpush.memory_keystore import MemoryKeystore
from sealpush.proofs import AckOutcome
from sealpush.session import Session
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.v1.content_pb2 import Content

SENDER = SenderId(b"S" * 16)
START_MS = 1_700_000_000_000
LIFETIME_MS = 60_000
LIMIT_S = 10.0

Result = TypeVar("Result")


class Clock:
    """A clock that goes forward when it is told to."""

    def __init__(self) -> None:
        self.at_ms = START_MS

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Names:
    """The names of senders, as `SenderEntries` gives them; a store is asked for them, so whoever asks is interrupted there too."""

    async def name(self, sender_id: SenderId) -> str:
        await asyncio.sleep(0)
        return sender_id.hex()


class Faulty(Store):
    """A store that another process holds now and then, and whose calls are as slow as the test wants them."""

    def __init__(self, keystore: Keystore) -> None:
        super().__init__(keystore)
        self.busy = 0
        self.gate: threading.Event | None = None

    async def __call__(self, use: Callable[[Keystore], Result]) -> Result:
        await asyncio.sleep(0)  # other tasks get their turn also where the store is memory
        if self.busy:
            self.busy -= 1
            if self.busy == 0:
                raise KeystoreBusy("another process holds the keystore; try again")
        gate = self.gate
        if gate is None:
            return await super().__call__(use)

        def slowly(keystore: Keystore) -> Result:
            done = use(keystore)
            gate.wait(LIMIT_S)  # the caller is cancelled meanwhile, while its thread has done it
            return done

        return await asyncio.to_thread(slowly, self._keystore)


def keep(
    keystore: Keystore, number: int, key: bytes | None = None, lifetime_ms: int = LIFETIME_MS, received_at_ms: int = START_MS
) -> InboxMessage:
    message = InboxMessage(
        message_id=MessageId(number.to_bytes(16, "big")),
        content_id=ContentId(number.to_bytes(16, "big")),
        envelope_digest=number.to_bytes(32, "big"),
        sender_id=SENDER,
        created_at_ms=START_MS + number,
        expires_at_ms=received_at_ms + lifetime_ms,
        received_at_ms=received_at_ms,
        content=Content(version=1, body=str(number)).SerializeToString(),
        replace_key=key,
    )
    acknowledgement = PendingAcknowledgement(
        message.message_id, message.content_id, message.envelope_digest, AckOutcome.DELIVERED, 0, received_at_ms
    )
    assert keystore.commit_message(message, acknowledgement=acknowledgement)
    return message


class HandingOver(RuleBasedStateMachine):
    """Two processes of one device over one store, a few tasks in each."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.directory = tempfile.TemporaryDirectory()
        self.memory: MemoryKeystore | None = None
        self.opened: list[SqliteKeystore] = []
        self.inboxes: list[Inbox] = []
        self.stores: list[Faulty] = []
        self.committed = 0
        # message → when it ends, and the one that took its place
        self.ends: dict[MessageId, int] = {}
        self.successor: dict[MessageId, MessageId] = {}
        self.newest: dict[bytes, MessageId] = {}
        self.given: list[Message] = []
        # Marked by a process that was killed before it handed them over.
        self.only_listed: set[MessageId] = set()

    @initialize(in_file=st.booleans())
    def start(self, in_file: bool) -> None:
        self.memory = None if in_file else MemoryKeystore()
        self.inboxes, self.stores = [], []
        for _ in range(2):
            self.begin_process(len(self.inboxes))

    def begin_process(self, at: int) -> None:
        keystore: Keystore
        if self.memory is not None:
            keystore = self.memory
        else:
            keystore = SqliteKeystore(Path(self.directory.name) / "keys.db")
            self.opened.append(keystore)
        store = Faulty(keystore)
        inbox = Inbox(store, ServerTime(self.clock, store), cast(SenderEntries, Names()))
        self.stores[at : at + 1], self.inboxes[at : at + 1] = [store], [inbox]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        async def bounded() -> Result:
            async with asyncio.timeout(LIMIT_S):
                return await work

        return self.loop.run_until_complete(bounded())

    def keep(self, key: bytes | None, lifetime_ms: int) -> None:
        self.committed += 1
        message = keep(self.memory or self.opened[-1], self.committed, key, lifetime_ms, self.clock.at_ms)
        self.ends[message.message_id] = message.expires_at_ms
        if key is not None:
            if key in self.newest:
                self.successor[self.newest[key]] = message.message_id
            self.newest[key] = message.message_id

    @rule(count=st.integers(1, 30))
    def messages_come(self, count: int) -> None:
        for _ in range(count):
            self.keep(None, LIFETIME_MS)

    @rule(key=st.sampled_from([b"a", b"b"]), lifetime_ms=st.sampled_from([LIFETIME_MS, 1000]))
    def a_message_comes_that_replaces_another(self, key: bytes, lifetime_ms: int) -> None:
        self.keep(key, lifetime_ms)

    @rule()
    def more_come_than_fit_a_page(self) -> None:
        if self.memory is not None:
            for _ in range(620):
                self.keep(None, LIFETIME_MS)

    @rule(by_ms=st.integers(0, 20_000))
    def time_goes_by(self, by_ms: int) -> None:
        self.clock.at_ms += by_ms

    @rule(at=st.integers(0, 1), limit=st.sampled_from([None, 1, 3]))
    def a_call_hands_over(self, at: int, limit: int | None) -> None:
        self.given += self.run(self.inboxes[at].hand_over(limit=limit))

    @rule(at=st.integers(0, 1), limits=st.lists(st.sampled_from([None, 1, 7]), min_size=2, max_size=4), key=st.sampled_from([None, b"a"]))
    def calls_hand_over_beside_each_other(self, at: int, limits: list[int | None], key: bytes | None) -> None:
        async def hand_over(limit: int | None) -> None:
            self.given += await self.inboxes[at].hand_over(limit=limit)

        async def come() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
                self.keep(key, LIFETIME_MS)

        async def all_of_them() -> None:
            await asyncio.gather(come(), *map(hand_over, limits))

        self.run(all_of_them())

    @rule(at=st.integers(0, 1), after=st.integers(1, 3), limit=st.sampled_from([None, 2]))
    def the_store_is_busy(self, at: int, after: int, limit: int | None) -> None:
        self.stores[at].busy = after
        with contextlib.suppress(KeystoreBusy):
            self.given += self.run(self.inboxes[at].hand_over(limit=limit))
        self.stores[at].busy = 0

    @rule(at=st.integers(0, 1), turns=st.integers(0, 200))
    def a_call_is_cancelled(self, at: int, turns: int) -> None:
        async def cancelled() -> None:
            call = asyncio.create_task(self.inboxes[at].hand_over())
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.given += await call

        self.run(cancelled())

    @rule(at=st.integers(0, 1), key=st.sampled_from([None, b"b"]))
    def a_call_is_cancelled_while_its_thread_goes_on(self, at: int, key: bytes | None) -> None:
        """The mark is written, and nobody waits for it; the next call of this process has what it marked."""
        store = self.stores[at]

        async def cancelled() -> None:
            gate = store.gate = threading.Event()
            call = asyncio.create_task(self.inboxes[at].hand_over())
            await asyncio.sleep(0.002)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.given += await call
            store.gate = None
            following = asyncio.create_task(self.inboxes[at].hand_over(limit=1))
            gate.set()
            self.given += await following

        self.run(cancelled())
        if key is not None:
            self.keep(key, LIFETIME_MS)

    @precondition(lambda self: self.memory is None)
    @rule(at=st.integers(0, 1), turns=st.integers(0, 200))
    def a_process_is_killed(self, at: int, turns: int) -> None:
        """Without closing anything, in the middle of a call. What that call had marked is in the inbox, and nothing else is lost."""
        inbox = self.inboxes[at]

        async def killed() -> None:
            call = asyncio.create_task(inbox.hand_over())
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.given += await call
            await inbox._until_marked()  # its thread has ended, as it has with a process

        self.run(killed())
        for each in inbox._ready:
            kept = self.opened[at].message(each.message_id)
            assert kept is not None
            assert kept.shown_at_ms is not None
            self.only_listed.add(each.message_id)
        self.begin_process(at)

    @invariant()
    def nothing_is_handed_over_twice(self) -> None:
        ids = [each.message_id for each in self.given]
        assert len(ids) == len(set(ids))

    @invariant()
    def nothing_comes_after_its_successor(self) -> None:
        at = {each.message_id: place for place, each in enumerate(self.given)}
        for old, new in self.successor.items():
            assert not (old in at and new in at and at[new] < at[old])

    def teardown(self) -> None:
        try:
            for each in self.inboxes:
                self.given += self.run(each.hand_over())
            given = {each.message_id for each in self.given}
            owed = {
                each
                for each, ends_at_ms in self.ends.items()
                if each not in self.successor and self.clock.at_ms < ends_at_ms + EXPIRY_SKEW_MS
            }
            assert owed <= given | self.only_listed
            assert not given & self.only_listed
            self.nothing_is_handed_over_twice()
            self.nothing_comes_after_its_successor()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            for keystore in self.opened:
                keystore.close()
            self.directory.cleanup()


HandingOver.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
test_whatever_happens_each_message_is_handed_over_once_and_in_order = HandingOver.TestCase


async def test_a_mark_that_ended_in_a_way_nobody_foresaw_is_the_trouble_of_one_call() -> None:
    class Failing(Store):
        fails = False

        async def __call__(self, use: Callable[[Keystore], Result]) -> Result:
            if self.fails:
                raise RuntimeError("cannot schedule new futures after shutdown")
            return await super().__call__(use)

    class Marking(Inbox):
        async def _mark(self, waiting: list[Message]) -> None:
            store.fails = not tried
            tried.append(len(waiting))
            await super()._mark(waiting)

    tried: list[int] = []
    keystore = MemoryKeystore()
    store = Failing(keystore)
    inbox = Marking(store, ServerTime(Clock(), store), cast(SenderEntries, Names()))
    keep(keystore, 1)
    with pytest.raises(RuntimeError):
        await inbox.hand_over()
    store.fails = False
    (given,) = await inbox.hand_over()
    assert given.is_new


class Counting(Store):
    """How often the store is asked, and how often it is written to."""

    asked = 0

    async def __call__(self, use: Callable[[Keystore], Result]) -> Result:
        self.asked += 1
        return await super().__call__(use)


class Marks(MemoryKeystore):
    marks = 0

    def mark_shown(self, local_ids: Sequence[int], at_ms: int) -> frozenset[int]:
        self.marks += 1
        return super().mark_shown(local_ids, at_ms)


def a_stream(inbox: Inbox) -> MessageStream:
    # It asks neither while there are messages.
    return MessageStream(inbox, cast(Session, None), cast(Trouble, None), asyncio.Event())


async def test_a_backlog_goes_through_a_stream_by_the_page_and_once_each() -> None:
    keystore = Marks()
    store = Counting(keystore)
    inbox = Inbox(store, ServerTime(Clock(), store), cast(SenderEntries, Names()))
    for number in range(1, 1001):
        keep(keystore, number)
    stream = a_stream(inbox)
    given = [(await anext(stream)).content.body for _ in range(1000)]
    assert given == [str(number) for number in range(1, 1001)]
    pages = -(-1000 // MARKED_MIN)
    assert keystore.marks == pages
    assert store.asked <= 1000 + 2 * pages


async def test_what_a_stream_had_marked_when_it_ended_goes_to_the_next_call() -> None:
    keystore = MemoryKeystore()
    clock, store = Clock(), Store(keystore)
    inbox = Inbox(store, ServerTime(clock, store), cast(SenderEntries, Names()))
    for number in range(1, 6):
        keep(keystore, number, key=b"k" if number == 3 else None, lifetime_ms=1_000 if number == 4 else LIFETIME_MS)
    assert (await anext(a_stream(inbox))).content.body == "1"
    # The third is replaced, the fourth ends, the second is deleted.
    keep(keystore, 6, key=b"k")
    keystore.delete_message(MessageId((2).to_bytes(16, "big")))
    clock.at_ms += 1_000 + EXPIRY_SKEW_MS
    assert (await anext(a_stream(inbox))).content.body == "5"
    assert [each.content.body for each in await inbox.hand_over()] == ["6"]
