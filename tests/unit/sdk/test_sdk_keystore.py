"""The keystores: one contract over both, then what only a file can go through."""

import dataclasses
import json
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sealpush.devicelog import DeviceNotice, NoticeKind
from sealpush.errors import KeystoreBusy, KeystoreError, KeystoreTooNew, RootMismatch
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, SenderId, SubscriberId
from sealpush.keys import DAY_MS, PREKEY_RETENTION_MS, EntryRole, IdentityKey, PrekeyKind, PrekeyPrivate, generate_prekey
from sealpush.keystore import (
    DEDUP_MARGIN_MS,
    NOTICES_MAX,
    CommitOutcome,
    DeviceRegistration,
    InboxMessage,
    KeptLog,
    Keystore,
    PendingAcknowledgement,
    Seen,
)
from sealpush.memory_keystore import MemoryKeystore
from sealpush.proofs import NO_DIGEST, AckOutcome
from sealpush.sqlite_file import SCHEMA_VERSION
from sealpush.sqlite_keystore import SqliteKeystore

NOW_MS = 1_700_000_000_000
SENDER = SenderId(b"S" * 16)
IDENTITY = IdentityKey.from_seed(b"\x11" * 32)
DIGEST = b"\xdd" * 32


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keystore]:
    made: Keystore = MemoryKeystore() if request.param == "memory" else SqliteKeystore(tmp_path / "keys.db")
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


def make_message(
    number: int, *, replace_key: bytes | None = None, created_at_ms: int = NOW_MS, sender_id: SenderId = SENDER
) -> InboxMessage:
    return InboxMessage(
        message_id=MessageId(number.to_bytes(16, "big")),
        content_id=ContentId((number + (1 << 100)).to_bytes(16, "big")),
        envelope_digest=(number + (1 << 200)).to_bytes(32, "big"),
        sender_id=sender_id,
        created_at_ms=created_at_ms,
        expires_at_ms=created_at_ms + DAY_MS,
        received_at_ms=created_at_ms + 5,
        content=b"plaintext %d" % number,
        replace_key=replace_key,
        flags=1,
    )


def make_acknowledgement(message: InboxMessage, outcome: AckOutcome = AckOutcome.DELIVERED, at_ms: int = NOW_MS) -> PendingAcknowledgement:
    return PendingAcknowledgement(message.message_id, message.content_id, message.envelope_digest, outcome, 0, at_ms)


def make_prekey(prekey_id: int, kind: PrekeyKind = PrekeyKind.ONE_TIME, *, now_ms: int = NOW_MS) -> PrekeyPrivate:
    return generate_prekey(IDENTITY, DeviceId(b"D" * 16), prekey_id=prekey_id, kind=kind, now_ms=now_ms)[0]


def commit(store: Keystore, message: InboxMessage, prekey: PrekeyPrivate | None = None) -> CommitOutcome:
    used = None if prekey is None else (prekey.suite, prekey.prekey_id, prekey.kind)
    return store.commit_message(message, acknowledgement=make_acknowledgement(message), used_prekey=used).outcome


def show(store: Keystore, message: InboxMessage, *, at_ms: int = NOW_MS) -> frozenset[int]:
    stored = store.message(message.message_id)
    assert stored is not None
    return store.mark_shown([stored.local_id], at_ms)


def test_an_empty_store_knows_nothing(store: Keystore) -> None:
    assert store.identity() is None
    assert store.registration() is None
    assert store.fact("server") is None
    assert store.clock_offset_ms() is None
    assert store.pinned_root() is None
    assert store.sender_entry(SENDER, EntryRole.SENDER) is None
    assert store.revocations() is None
    assert store.prekey(1, 1, PrekeyKind.SIGNED) is None
    assert store.newest_signed_prekey() is None
    assert not store.pending_acknowledgements()
    assert not store.inbox()
    assert store.message(MessageId(bytes(16))) is None
    assert store.seen(SENDER, ContentId(bytes(16)), DIGEST) is Seen.NEVER


def test_the_identity_is_made_once(store: Keystore) -> None:
    made = store.create_identity()
    assert store.create_identity().seed == made.seed
    again = store.identity()
    assert again is not None
    assert again.seed == made.seed


def test_registration_and_facts_are_kept_and_replaced(store: Keystore) -> None:
    for name in ("ua.bank", "ua.bänk"):
        registration = DeviceRegistration(DeviceId(b"D" * 16), SubscriberId(b"U" * 16), AppId(name), NOW_MS)
        store.set_registration(registration)
        assert store.registration() == registration
    store.set_fact("server", b"one")
    store.set_fact("server", b"two")
    assert store.fact("server") == b"two"
    store.set_fact("server", None)
    assert store.fact("server") is None
    for name, value in [("", b""), ("x" * 65, b""), ("x", bytes(4097))]:
        with pytest.raises(KeystoreError):
            store.set_fact(name, value)


def test_a_fact_cannot_touch_the_stores_own_values(store: Keystore) -> None:
    seed = store.create_identity().seed
    store.set_fact("identity_seed", b"x" * 32)
    assert store.create_identity().seed == seed


def test_the_counter_rises_by_one_and_can_be_raised(store: Keystore) -> None:
    assert [store.next_counter() for _ in range(3)] == [1, 2, 3]
    store.raise_counter(10)
    store.raise_counter(5)
    assert store.next_counter() == 11
    store.raise_counter((1 << 63) + 5)
    assert store.next_counter() == (1 << 63) + 6


def test_prekey_ids_follow_each_other_and_can_be_raised(store: Keystore) -> None:
    assert store.highest_prekey_id() == 0
    assert store.reserve_prekey_ids(3) == 1
    store.raise_prekey_id(2)
    assert store.highest_prekey_id() == 3
    store.raise_prekey_id(10)
    assert store.highest_prekey_id() == 10
    assert store.reserve_prekey_ids(1) == 11


def test_the_proven_time_rises_and_never_falls(store: Keystore) -> None:
    assert store.proven_time_ms() == 0
    assert store.raise_proven_time(NOW_MS) == NOW_MS
    assert store.raise_proven_time(NOW_MS - 1) == NOW_MS, "what another process of the device has kept"
    assert store.proven_time_ms() == NOW_MS


def test_the_clock_offset_may_be_negative(store: Keystore) -> None:
    store.set_clock_offset_ms(-90_000)
    assert store.clock_offset_ms() == -90_000


def test_another_root_is_refused_and_replacing_it_drops_what_the_old_one_signed(store: Keystore) -> None:
    store.pin_root(b"r" * 32)
    store.pin_root(b"r" * 32)
    store.put_sender_entry(SENDER, EntryRole.SENDER, 1, NOW_MS, b"blob")
    store.put_revocations(9, b"list")
    store.raise_proven_time(NOW_MS)
    with pytest.raises(RootMismatch):
        store.pin_root(b"q" * 32)
    assert store.pinned_root() == b"r" * 32
    assert store.sender_entry(SENDER, EntryRole.SENDER) == b"blob"
    store.pin_root(b"q" * 32, replace=True)
    assert store.pinned_root() == b"q" * 32
    assert store.sender_entry(SENDER, EntryRole.SENDER) is None
    assert store.revocations() is None
    assert store.proven_time_ms() == 0
    assert store.put_revocations(1, b"the other root's first list")
    with pytest.raises(KeystoreError):
        store.pin_root(b"short")


def test_a_sender_entry_never_goes_back(store: Keystore) -> None:
    top = (1 << 64) - 1
    assert store.put_sender_entry(SENDER, EntryRole.SENDER, 5, NOW_MS, b"five")
    assert not store.put_sender_entry(SENDER, EntryRole.SENDER, 4, NOW_MS, b"four")
    assert store.sender_entry(SENDER, EntryRole.SENDER) == b"five"
    assert store.put_sender_entry(SENDER, EntryRole.SENDER, 5, NOW_MS, b"five again")
    assert store.put_sender_entry(SENDER, EntryRole.SENDER, top, NOW_MS, b"top")
    assert not store.put_sender_entry(SENDER, EntryRole.SENDER, top - 1, NOW_MS, b"below")
    assert store.sender_entry(SENDER, EntryRole.PLATFORM) is None
    store.purge(NOW_MS - 1)
    assert store.sender_entry(SENDER, EntryRole.SENDER) == b"top"
    store.purge(NOW_MS)
    assert store.sender_entry(SENDER, EntryRole.SENDER) is None


def test_a_sender_entry_does_not_go_back_to_one_that_outlives_the_newest(store: Keystore) -> None:
    assert store.put_sender_entry(SENDER, EntryRole.SENDER, 2, NOW_MS, b"two, ends soon")
    store.purge(NOW_MS)
    assert not store.put_sender_entry(SENDER, EntryRole.SENDER, 1, NOW_MS + DAY_MS, b"one, ends later")
    assert store.sender_entry(SENDER, EntryRole.SENDER) is None
    assert store.put_sender_entry(SENDER, EntryRole.SENDER, 3, NOW_MS + DAY_MS, b"three")
    assert store.sender_entry(SENDER, EntryRole.SENDER) == b"three"


def test_a_revocation_list_never_goes_back(store: Keystore) -> None:
    top = (1 << 64) - 1
    longest = bytes(135_255)
    assert store.put_revocations(5, longest)
    assert not store.put_revocations(4, b"four")
    assert store.revocations() == longest
    assert store.put_revocations(5, b"five, written anew")
    assert store.put_revocations(top, b"top")
    assert not store.put_revocations(top - 1, b"below")
    store.purge(1 << 62)
    assert store.revocations() == b"top"
    store.erase()
    assert store.revocations() is None
    assert store.put_revocations(1, b"one")


def test_prekey_ids_are_given_once(store: Keystore) -> None:
    first = store.reserve_prekey_ids(100)
    assert store.reserve_prekey_ids(1) == first + 100
    assert store.reserve_prekey_ids(1) == first + 101
    for count in (0, 1 << 32):
        with pytest.raises(KeystoreError):
            store.reserve_prekey_ids(count)


def test_prekeys_come_back_whole(store: Keystore) -> None:
    prekeys = [make_prekey(number) for number in range(1, 6)] + [make_prekey(9, PrekeyKind.SIGNED)]
    store.add_prekeys(prekeys)
    for each in prekeys:
        known = store.prekey(each.suite, each.prekey_id, each.kind)
        assert known == each
        assert known is not None
        assert known.private_key == each.private_key
    assert store.prekey(1, 1, PrekeyKind.SIGNED) is None
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 5


def test_adding_prekeys_is_all_or_nothing(store: Keystore) -> None:
    store.add_prekeys([make_prekey(2)])
    for batch in ([make_prekey(1), make_prekey(2)], [make_prekey(3), make_prekey(3)]):
        with pytest.raises(KeystoreError, match="reserve_prekey_ids"):
            store.add_prekeys(batch)
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 1


def test_a_retired_signed_prekey_lives_as_long_as_a_message_sealed_to_it_can(store: Keystore) -> None:
    old, new = make_prekey(1, PrekeyKind.SIGNED), make_prekey(2, PrekeyKind.SIGNED, now_ms=NOW_MS + 7 * DAY_MS)
    store.add_prekeys([old, new])
    assert store.newest_signed_prekey() == new
    retired_ms = NOW_MS + 8 * DAY_MS
    store.retire_signed_prekeys(2, retired_ms)
    store.retire_signed_prekeys(2, retired_ms + DAY_MS)  # repeating does not prolong it
    store.purge(retired_ms + PREKEY_RETENTION_MS - 1)
    assert store.prekey(1, 1, PrekeyKind.SIGNED) == old
    store.purge(retired_ms + PREKEY_RETENTION_MS)
    assert store.prekey(1, 1, PrekeyKind.SIGNED) is None
    assert store.prekey(1, 2, PrekeyKind.SIGNED) == new


def test_unused_prekeys_run_out_too(store: Keystore) -> None:
    prekey = make_prekey(1)
    store.add_prekeys([prekey])
    store.purge(prekey.expires_at_ms + PREKEY_RETENTION_MS - 1)
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 1
    store.purge(prekey.expires_at_ms + PREKEY_RETENTION_MS)
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 0


def test_committing_stores_acknowledges_and_destroys_the_one_time_key(store: Keystore) -> None:
    prekey, message = make_prekey(1), make_message(1)
    store.add_prekeys([prekey])
    result = store.commit_message(message, acknowledgement=make_acknowledgement(message), used_prekey=(1, 1, PrekeyKind.ONE_TIME))
    assert result
    assert result.outcome is CommitOutcome.STORED
    assert store.seen(SENDER, message.content_id, message.envelope_digest) is Seen.THIS
    stored = store.message(message.message_id)
    assert stored is not None
    assert stored.local_id > 0
    assert dataclasses.replace(stored, local_id=0) == message
    assert store.inbox() == [stored]
    assert store.pending_acknowledgements() == [make_acknowledgement(message)]
    assert store.prekey(1, 1, PrekeyKind.ONE_TIME) is None


def test_a_signed_prekey_survives_its_use(store: Keystore) -> None:
    prekey = make_prekey(1, PrekeyKind.SIGNED)
    store.add_prekeys([prekey])
    commit(store, make_message(1), prekey)
    assert store.prekey(1, 1, PrekeyKind.SIGNED) == prekey


def test_the_same_content_is_stored_once_and_acknowledged_for_each_message(store: Keystore) -> None:
    message = make_message(1)
    assert commit(store, message) is CommitOutcome.STORED
    assert commit(store, message) is CommitOutcome.DUPLICATE
    again = dataclasses.replace(message, message_id=MessageId(b"another message!"), content=b"other")
    result = store.commit_message(again, acknowledgement=make_acknowledgement(again))
    assert not result
    assert [each.content for each in store.inbox()] == [message.content]
    assert len(store.pending_acknowledgements()) == 2
    other_sender = dataclasses.replace(message, sender_id=SenderId(b"T" * 16))
    assert commit(store, other_sender) is CommitOutcome.STORED


def test_another_envelope_under_the_same_content_id_is_a_conflict_and_changes_nothing(store: Keystore) -> None:
    message, prekey = make_message(1), make_prekey(1)
    store.add_prekeys([prekey])
    commit(store, message)
    other = dataclasses.replace(message, message_id=MessageId(b"another message!"), envelope_digest=DIGEST, content=b"other")
    assert store.seen(SENDER, message.content_id, message.envelope_digest) is Seen.THIS
    assert store.seen(SENDER, message.content_id, DIGEST) is Seen.OTHER
    assert commit(store, other, prekey) is CommitOutcome.CONFLICT
    assert store.pending_acknowledgements() == [make_acknowledgement(message)]
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 1
    assert [each.content for each in store.inbox()] == [message.content]
    # Also long after the message itself is gone.
    store.delete_message(message.message_id)
    assert commit(store, other, prekey) is CommitOutcome.CONFLICT
    # It is refused as what it is, which an end of the envelope that is here would not be.
    same, another = (make_acknowledgement(each, AckOutcome.UNDELIVERED) for each in (message, other))
    assert not store.queue_acknowledgement(same, sender_id=SENDER)
    assert store.queue_acknowledgement(another, sender_id=SENDER)


def test_what_is_committed_has_a_digest_and_its_acknowledgement_the_same_one(store: Keystore) -> None:
    message = make_message(1)
    for digest in (b"", bytes(31), NO_DIGEST):
        nameless = dataclasses.replace(message, envelope_digest=digest)
        with pytest.raises(KeystoreError, match="digest"):
            store.commit_message(nameless, acknowledgement=make_acknowledgement(nameless))
    other = dataclasses.replace(make_acknowledgement(message), envelope_digest=DIGEST)
    with pytest.raises(KeystoreError, match="another message"):
        store.commit_message(message, acknowledgement=other)
    assert store.inbox() == []


def test_a_deleted_message_stays_known_until_expiry_and_margin(store: Keystore) -> None:
    message = make_message(1)
    commit(store, message)
    assert store.delete_message(message.message_id)
    assert not store.delete_message(message.message_id)
    assert commit(store, message) is CommitOutcome.DUPLICATE
    store.purge(message.expires_at_ms + DEDUP_MARGIN_MS - 1)
    assert store.seen(SENDER, message.content_id, message.envelope_digest) is Seen.THIS
    assert store.inbox() == []
    store.purge(message.expires_at_ms + DEDUP_MARGIN_MS)
    assert store.seen(SENDER, message.content_id, message.envelope_digest) is Seen.NEVER


def test_a_replace_key_takes_the_predecessor_of_the_same_sender_even_if_shown(store: Keystore) -> None:
    first, second = make_message(1, replace_key=b"k"), make_message(2, replace_key=b"k")
    commit(store, first)
    show(store, first)
    bystanders = [
        make_message(3, replace_key=b"other"),
        make_message(4),
        make_message(5),
        make_message(6, replace_key=b"k", sender_id=SenderId(b"T" * 16)),
        make_message(7, replace_key=b""),
    ]
    for each in bystanders:
        assert commit(store, each) is CommitOutcome.STORED
    result = store.commit_message(second, acknowledgement=make_acknowledgement(second))
    assert result
    stored = store.message(second.message_id)
    assert stored is not None
    assert stored.replaces == (first.message_id,)
    assert {each.message_id for each in store.inbox()} == {each.message_id for each in [second, *bystanders]}
    assert commit(store, first) is CommitOutcome.DUPLICATE


def test_a_predecessor_that_arrives_late_is_acknowledged_but_not_shown(store: Keystore) -> None:
    newer, older = make_message(1, replace_key=b"k", created_at_ms=NOW_MS + 1), make_message(2, replace_key=b"k")
    commit(store, newer)
    result = store.commit_message(older, acknowledgement=make_acknowledgement(older))
    assert not result
    assert result.outcome is CommitOutcome.SUPERSEDED
    assert [each.message_id for each in store.inbox()] == [newer.message_id]
    assert len(store.pending_acknowledgements()) == 2
    assert commit(store, older) is CommitOutcome.DUPLICATE


def test_acknowledgements_wait_in_order_until_confirmed(store: Keystore) -> None:
    messages = [make_message(number) for number in range(4)]
    for each in messages:
        commit(store, each)
    pending = store.pending_acknowledgements()
    assert [each.message_id for each in pending] == [each.message_id for each in messages]
    assert store.pending_acknowledgements(2) == pending[:2]
    store.confirm_acknowledgements(pending[:2])
    store.confirm_acknowledgements(pending[:2])
    assert store.pending_acknowledgements() == pending[2:]
    with pytest.raises(KeystoreError):
        store.pending_acknowledgements(0)


def test_the_first_outcome_stays_and_read_stands_beside_it(store: Keystore) -> None:
    message = make_message(1)
    assert store.queue_acknowledgement(make_acknowledgement(message, AckOutcome.BLOCKED))
    assert not store.queue_acknowledgement(make_acknowledgement(message, AckOutcome.UNDELIVERED))
    assert store.queue_acknowledgement(make_acknowledgement(message, AckOutcome.READ))
    assert [each.outcome for each in store.pending_acknowledgements()] == [AckOutcome.BLOCKED, AckOutcome.READ]


def test_a_process_that_came_too_late_does_not_deny_a_delivery(store: Keystore) -> None:
    """The other process committed, had its acknowledgement confirmed, and destroyed the key this one looked for."""
    message = make_message(1)
    commit(store, message)
    store.confirm_acknowledgements(store.pending_acknowledgements())
    denial = make_acknowledgement(message, AckOutcome.UNDELIVERED)
    assert not store.queue_acknowledgement(denial, sender_id=SENDER)
    assert store.pending_acknowledgements() == []
    unknown = make_acknowledgement(make_message(2), AckOutcome.UNDELIVERED)
    assert store.queue_acknowledgement(unknown, sender_id=SENDER)


def test_shown_and_read_are_noted_once(store: Keystore) -> None:
    message = make_message(1)
    commit(store, message)
    (local_id,) = show(store, message, at_ms=1)
    assert store.mark_shown([local_id], 2) == frozenset()
    assert store.mark_read(message.message_id, 3, acknowledge=True)
    assert not store.mark_read(message.message_id, 4, acknowledge=True)
    stored = store.message(message.message_id)
    assert stored is not None
    assert (stored.shown_at_ms, stored.read_at_ms) == (1, 3)
    assert store.pending_acknowledgements()[1] == make_acknowledgement(message, AckOutcome.READ, 3)
    assert store.mark_shown([local_id + 1000], 1) == frozenset()
    assert not store.mark_read(MessageId(b"x" * 16), 1, acknowledge=True)
    quiet = make_message(2)
    commit(store, quiet)
    assert store.mark_read(quiet.message_id, 3, acknowledge=False)
    assert len(store.pending_acknowledgements()) == 3


def test_the_inbox_pages_newest_first(store: Keystore) -> None:
    for number in range(5):
        commit(store, make_message(number))
    pages, before = [], None
    while page := store.inbox(before=before, limit=2):
        pages.append([each.content for each in page])
        before = page[-1].local_id
    assert pages == [[b"plaintext 4", b"plaintext 3"], [b"plaintext 2", b"plaintext 1"], [b"plaintext 0"]]
    store.delete_message(make_message(4).message_id)
    commit(store, make_message(9))
    assert store.inbox(limit=1)[0].content == b"plaintext 9"


def test_what_has_run_out_takes_no_place_in_a_page_of_the_inbox(store: Keystore) -> None:
    for number in range(6):
        commit(store, make_message(number, created_at_ms=NOW_MS if number % 2 else NOW_MS - 2 * DAY_MS))
    page = store.inbox(alive_at_ms=NOW_MS, limit=2)
    assert [each.content for each in page] == [b"plaintext 5", b"plaintext 3"]
    assert [each.content for each in store.inbox(alive_at_ms=NOW_MS, before=page[-1].local_id, limit=2)] == [b"plaintext 1"]


def test_what_was_not_shown_pages_oldest_first(store: Keystore) -> None:
    for number in range(7):
        commit(store, make_message(number, created_at_ms=NOW_MS - 2 * DAY_MS if number == 3 else NOW_MS))
    show(store, make_message(1))
    pages, after = [], 0
    while page := store.unshown(alive_at_ms=NOW_MS, after=after, limit=2):
        pages.append([each.content for each in page])
        after = page[-1].local_id
    assert pages == [[b"plaintext 0", b"plaintext 2"], [b"plaintext 4", b"plaintext 5"], [b"plaintext 6"]]
    assert [each.content for each in store.unshown(alive_at_ms=NOW_MS - 3 * DAY_MS)][2] == b"plaintext 3"
    assert store.unshown(alive_at_ms=make_message(0).expires_at_ms) == []
    store.delete_message(make_message(0).message_id)
    assert [each.content for each in store.unshown(alive_at_ms=NOW_MS, limit=1)] == [b"plaintext 2"]


def test_of_those_marked_together_each_is_whose_call_marked_it_first(store: Keystore) -> None:
    for number in range(4):
        commit(store, make_message(number))
    ids = [each.local_id for each in store.unshown(alive_at_ms=NOW_MS)]
    store.delete_message(make_message(3).message_id)
    assert store.mark_shown(ids[:2], 1) == frozenset(ids[:2])
    assert store.mark_shown(ids, 2) == frozenset({ids[2]})
    assert store.mark_shown([], 3) == frozenset()
    assert store.unshown(alive_at_ms=NOW_MS) == []
    assert [each.shown_at_ms for each in reversed(store.inbox())] == [1, 1, 2]


def test_two_messages_under_one_id_are_shown_each(store: Keystore) -> None:
    # The server chooses the id of a message.
    same = replace(make_message(2), message_id=make_message(1).message_id)
    commit(store, make_message(1))
    commit(store, same)
    ids = [each.local_id for each in store.unshown(alive_at_ms=NOW_MS)]
    assert store.mark_shown(ids, 1) == frozenset(ids)
    assert len(ids) == 2


def test_what_was_never_shown_hands_on_what_it_replaced(store: Keystore) -> None:
    messages = [make_message(number, replace_key=b"k") for number in range(5)]
    commit(store, messages[0])
    show(store, messages[0])
    commit(store, messages[1])
    commit(store, messages[2])
    assert [each.replaces for each in store.unshown(alive_at_ms=NOW_MS)] == [(messages[0].message_id,)]
    show(store, messages[2])
    commit(store, messages[3])
    assert [each.replaces for each in store.unshown(alive_at_ms=NOW_MS)] == [(messages[2].message_id,)]


def test_what_is_handed_over_next_is_found_by_an_index(path: Path) -> None:
    with SqliteKeystore(path) as store:
        seen: list[str] = []
        connection = store._connection
        assert connection is not None
        connection.set_trace_callback(seen.append)
        store.unshown(alive_at_ms=NOW_MS)
        connection.set_trace_callback(None)
        (plan,) = connection.execute(f"EXPLAIN QUERY PLAN {seen[-1]}").fetchall()
        assert "INDEX messages_unshown" in plan[3]


def test_an_acknowledgement_of_another_message_is_refused(store: Keystore) -> None:
    with pytest.raises(KeystoreError, match="another message"):
        store.commit_message(make_message(1), acknowledgement=make_acknowledgement(make_message(2)))
    assert store.inbox() == []


def notice(number: int, kind: NoticeKind = NoticeKind.ADDED) -> DeviceNotice:
    return DeviceNotice(kind, NOW_MS + number, None if kind is NoticeKind.LOG_BROKEN else DeviceId(b"D" * 16), b"i" * 32)


def test_a_device_log_is_kept_with_its_notices_and_only_in_the_place_of_the_known_one(store: Keystore) -> None:
    assert store.device_log() == KeptLog()
    first, longer, other = KeptLog((b"a", b"b"), b"1" * 32), KeptLog((b"a", b"b", b"c"), b"2" * 32), KeptLog((b"x",), b"3" * 32)
    assert store.put_device_log(KeptLog(), first, [notice(1)]) == [replace(notice(1), number=1)]
    assert store.put_device_log(KeptLog(), other, [notice(2)]) is None
    assert store.device_log() == first
    assert store.put_device_log(first, longer, []) == []
    assert store.device_log() == longer
    assert store.put_device_log(first, other, [notice(2)]) is None
    assert store.put_device_log(longer, other, [notice(3), notice(4)]) == [replace(notice(3), number=2), replace(notice(4), number=3)]
    assert store.device_log() == other
    assert [each.number for each in store.notices()] == [1, 2, 3]
    assert store.notices()[0] == replace(notice(1), number=1)


def test_dismissed_notices_do_not_come_back_and_numbers_are_given_once(store: Keystore) -> None:
    log = KeptLog()
    store.put_device_log(log, log, [notice(1), notice(2)])
    store.dismiss_notices([2, 7])
    assert [each.number for each in store.notices()] == [1]
    store.put_device_log(log, log, [notice(3)])
    assert [each.number for each in store.notices()] == [1, 3]
    store.dismiss_notices([1, 3])
    assert store.notices() == []


def test_a_broken_log_is_told_once_until_it_is_dismissed(store: Keystore) -> None:
    log, broken = KeptLog(), notice(1, NoticeKind.LOG_BROKEN)
    assert store.put_device_log(log, log, [broken, broken]) == [replace(broken, number=1)]
    assert store.put_device_log(log, log, [broken, notice(2)]) == [replace(notice(2), number=2)]
    store.dismiss_notices([1])
    assert store.put_device_log(log, log, [broken]) == [replace(broken, number=3)]


def test_notices_are_bounded_and_the_oldest_go(store: Keystore) -> None:
    log = KeptLog()
    for start in range(0, NOTICES_MAX + 500, 500):
        added = store.put_device_log(log, log, [notice(n) for n in range(start, start + 500)])
        assert added is not None
        assert [each.number for each in added] == list(range(start + 1, start + 501))
    assert [each.number for each in store.notices()] == list(range(501, NOTICES_MAX + 501))


def test_erasing_leaves_nothing(store: Keystore) -> None:
    seed = store.create_identity().seed
    store.put_device_log(KeptLog(), KeptLog((b"a",), b"1" * 32), [notice(1)])
    store.pin_root(b"r" * 32)
    store.add_prekeys([make_prekey(1)])
    commit(store, make_message(1))
    store.erase()
    assert store.identity() is None
    assert not store.pending_acknowledgements()
    assert not store.inbox()
    assert store.prekey_count(PrekeyKind.ONE_TIME) == 0
    assert store.pinned_root() is None
    assert store.device_log() == KeptLog()
    assert store.notices() == []
    assert store.create_identity().seed != seed


def test_a_closed_store_says_so(store: Keystore) -> None:
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [store.identity, store.next_counter, store.create_identity, store.inbox]
    for call in calls:
        with pytest.raises(KeystoreError, match="closed"):
            call()


def test_threads_share_a_store(store: Keystore) -> None:
    counters: list[int] = []
    stored: list[CommitOutcome] = []

    def work() -> None:
        for number in range(10):
            counters.append(store.next_counter())
            stored.append(commit(store, make_message(number)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counters) == list(range(1, 41))
    assert stored.count(CommitOutcome.STORED) == 10


def test_repr_shows_neither_plaintext_nor_replace_key() -> None:
    text = repr(make_message(1, replace_key=b"loan-7"))
    assert "plaintext" not in text
    assert "loan" not in text


def test_an_empty_memory_store_is_cheap() -> None:
    tracemalloc.start()
    try:
        stores = [MemoryKeystore() for _ in range(1000)]
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(stores) < 1500


# What only a file goes through.


def test_everything_survives_closing(path: Path) -> None:
    with SqliteKeystore(path) as store:
        seed = store.create_identity().seed
        store.next_counter()
        store.add_prekeys([make_prekey(1)])
        commit(store, make_message(1))
    with SqliteKeystore(path) as store:
        assert store.create_identity().seed == seed
        assert store.next_counter() == 2
        assert store.prekey_count(PrekeyKind.ONE_TIME) == 1
        assert [each.content for each in store.inbox()] == [b"plaintext 1"]
        assert len(store.pending_acknowledgements()) == 1


def test_the_files_are_their_owners_alone(path: Path) -> None:
    with SqliteKeystore(path) as store:
        store.next_counter()
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes == {"keys.db": 0o600, "keys.db-wal": 0o600, "keys.db-shm": 0o600}
    path.chmod(0o644)
    with SqliteKeystore(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_writes_are_durable_when_they_return(path: Path) -> None:
    with SqliteKeystore(path) as store:
        assert store._connection is not None
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_used_keys_are_gone_from_the_bytes_of_the_file_after_a_purge(path: Path) -> None:
    prekey, message = make_prekey(1), make_message(1)
    with SqliteKeystore(path) as store:
        store.add_prekeys([prekey])
        commit(store, message, prekey)
        store.delete_message(message.message_id)
        store.purge(NOW_MS)
        left = b"".join(each.read_bytes() for each in path.parent.iterdir())
        assert store._connection is not None
        assert store._connection.execute("PRAGMA secure_delete").fetchone() == (1,)
    assert prekey.private_key not in left
    assert message.content not in left


def test_a_store_of_the_release_before_is_taken_over_with_everything_in_it(path: Path) -> None:
    message = make_message(1)
    with SqliteKeystore(path) as store:
        seed = store.create_identity().seed
        commit(store, message)
    connection = sqlite3.connect(path)
    for table in ("device_log", "notices"):
        connection.execute(f"DROP TABLE {table}")
    for table in ("seen", "messages", "acknowledgements"):
        connection.execute(f"ALTER TABLE {table} DROP COLUMN envelope_digest")
    connection.execute("DROP INDEX messages_unshown")
    connection.execute("ALTER TABLE messages DROP COLUMN replaces")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    for _ in range(2):
        with SqliteKeystore(path) as store:
            assert store.create_identity().seed == seed
            assert store.inbox() == [dataclasses.replace(message, envelope_digest=NO_DIGEST, local_id=1)]
            assert store.put_device_log(store.device_log(), KeptLog((b"a",), b"1" * 32), []) == []
            # What was owed does not say over which envelope. The service sends the delivery again, and it is known.
            assert store.pending_acknowledgements() == []
            assert store.seen(SENDER, message.content_id, message.envelope_digest) is Seen.THIS
    with SqliteKeystore(path) as store:
        assert commit(store, message) is CommitOutcome.DUPLICATE
        assert store.pending_acknowledgements() == [make_acknowledgement(message)]
        assert commit(store, make_message(2)) is CommitOutcome.STORED
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()


def test_a_revocation_list_outlives_the_process_and_the_other_process_sees_it(path: Path) -> None:
    with SqliteKeystore(path) as store, SqliteKeystore(path) as other:
        assert store.put_revocations(5, b"five")
        assert not other.put_revocations(4, b"four")
        assert other.revocations() == b"five"
    with SqliteKeystore(path) as store:
        assert store.revocations() == b"five"
        assert not store.put_revocations(4, b"four")


def test_a_store_of_a_newer_release_is_refused_untouched(path: Path) -> None:
    SqliteKeystore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(KeystoreTooNew, match="upgrade the app"):
        SqliteKeystore(path)


def test_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(KeystoreError, match="something else"):
        SqliteKeystore(path)
    noise = tmp_path / "noise"
    noise.write_bytes(b"not a database" * 100)
    with pytest.raises(KeystoreError):
        SqliteKeystore(noise)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(KeystoreError, match="regular file"):
        SqliteKeystore(link)
    with pytest.raises(KeystoreError, match="directory"):
        SqliteKeystore(tmp_path / "missing" / "keys.db")


def test_a_store_held_by_another_is_busy_and_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealpush.sqlite_file.BUSY_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    with SqliteKeystore(path) as store:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(KeystoreBusy):
            store.next_counter()
        holder.execute("ROLLBACK")
        assert store.next_counter() == 1
    holder.close()


def test_a_number_too_large_for_the_file_changes_nothing(path: Path) -> None:
    with SqliteKeystore(path) as store:
        store.add_prekeys([make_prekey(1)])
        with pytest.raises(KeystoreError, match="63 bits"):
            commit(store, dataclasses.replace(make_message(1), expires_at_ms=1 << 64), make_prekey(1))
        assert store.prekey_count(PrekeyKind.ONE_TIME) == 1
        assert store.pending_acknowledgements() == []


_WORKER = """
import json, sys
from sealpush.keystore import *
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.keys import *
from sealpush.proofs import AckOutcome
store = SqliteKeystore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
identity = store.create_identity().public_key.hex()
counters, stored, first_ids = [], [], []
for number in range(25):
    counters.append(store.next_counter())
    first_ids.append(store.reserve_prekey_ids(3))
    message_id, content_id = number.to_bytes(16, "big"), (number + 100).to_bytes(16, "big")
    message = InboxMessage(message_id, content_id, b"d" * 32, b"S" * 16, 1, 2, 3, b"text")
    acknowledgement = PendingAcknowledgement(message_id, content_id, b"d" * 32, AckOutcome.DELIVERED, 0, 4)
    if store.commit_message(message, acknowledgement=acknowledgement):
        stored.append(number)
store.close()
print(json.dumps([identity, counters, first_ids, stored]))
"""


def test_two_processes_on_one_file_agree(path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    results = []
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        results.append(json.loads(output))
    one, other = results
    assert one[0] == other[0]
    assert sorted(one[1] + other[1]) == list(range(1, 51))
    assert sorted(one[2] + other[2]) == list(range(1, 151, 3))
    assert sorted(one[3] + other[3]) == list(range(25))
    with SqliteKeystore(path) as store:
        assert len(store.inbox()) == len(store.pending_acknowledgements()) == 25


_VICTIM = """
import os, signal, sys
from sealpush.keystore import *
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.keys import *
from sealpush.proofs import AckOutcome
store = SqliteKeystore(sys.argv[1])
message_id, content_id = b"M" * 16, b"C" * 16
message = InboxMessage(message_id, content_id, b"d" * 32, b"S" * 16, 1, 2, 3, b"text")
acknowledgement = PendingAcknowledgement(message_id, content_id, b"d" * 32, AckOutcome.DELIVERED, 0, 4)
def kill_at(statement):
    if statement.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
store._connection.set_trace_callback(kill_at)
store.commit_message(message, acknowledgement=acknowledgement, used_prekey=(1, 1, PrekeyKind.ONE_TIME))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("statement", "kept"),
    [("DELETE FROM prekeys", False), ("INSERT INTO messages", False), ("COMMIT", False), ("never", True)],
)
def test_a_process_killed_while_committing_leaves_all_or_nothing(path: Path, statement: str, kept: bool) -> None:
    with SqliteKeystore(path) as store:
        store.add_prekeys([make_prekey(1)])
    victim = subprocess.run([sys.executable, "-c", _VICTIM, path, statement], timeout=60, check=False)
    assert victim.returncode == -signal.SIGKILL
    with SqliteKeystore(path) as store:
        assert (store.seen(SENDER, ContentId(b"C" * 16), b"d" * 32) is Seen.THIS) is kept
        assert len(store.inbox()) == len(store.pending_acknowledgements()) == int(kept)
        assert (store.prekey(1, 1, PrekeyKind.ONE_TIME) is None) is kept
