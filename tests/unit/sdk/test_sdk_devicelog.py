"""sealpush.devicelog: the chain, what a log may say, what is told of it, fingerprints."""

import contextlib
import hashlib
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.devicelog import (
    FINGERPRINT_ROUNDS,
    DeviceLog,
    DeviceNotice,
    EntryKind,
    LogEntry,
    NoticeKind,
    fingerprint,
    new_to,
    next_head,
    notices_of,
    notices_of_another,
    start_head,
)
from sealpush.errors import DeviceLogBroken
from sealpush.ids import DeviceId, SubscriberId
from sealpush.keys import TIME_MS_MAX, IdentityKey
from sealpush.proofs import vouch_proof

PERSON = SubscriberId(b"s" * 16)
OWN = DeviceId(b"0" * 16)
IDENTITIES = {DeviceId(bytes((ord("0") + n,)) * 16): IdentityKey.from_seed(bytes((n,)) * 32) for n in range(4)}

bytes16, bytes32, times = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32), st.integers(0, TIME_MS_MAX)
entries = st.builds(
    LogEntry, st.sampled_from((EntryKind.ADDED, EntryKind.REMOVED)), bytes16.map(DeviceId), bytes32, times, st.booleans()
) | (
    st.builds(
        LogEntry,
        st.just(EntryKind.VOUCHED),
        bytes16.map(DeviceId),
        bytes32,
        times,
        st.booleans(),
        bytes16.map(DeviceId),
        st.binary(min_size=64, max_size=64),
    )
)
device_ids = st.sampled_from(sorted(IDENTITIES))


def entry(kind: EntryKind, device_id: DeviceId, *, recovered: bool = False, at_ms: int = 1) -> bytes:
    return LogEntry(kind, device_id, IDENTITIES[device_id].public_key, at_ms, recovered).encode()


def vouch(log: DeviceLog, device_id: DeviceId, by: DeviceId) -> bytes:
    """The vouch of one device for another, as it would sign it on this log."""
    listed = log.devices[device_id]
    signature = IDENTITIES[by].sign(vouch_proof(device_id, listed.identity_public_key, by, listed.added_head))
    return LogEntry(EntryKind.VOUCHED, device_id, listed.identity_public_key, 1, by_device_id=by, signature=signature).encode()


def steps(log: DeviceLog) -> list[bytes]:
    """Every entry that this log can go on with, as an honest server would choose it."""
    found = []
    for device_id in IDENTITIES:
        if device_id not in log.devices:
            found.append(entry(EntryKind.ADDED, device_id, recovered=log.seq > 0))
            continue
        found.append(entry(EntryKind.REMOVED, device_id))
        if not log.devices[device_id].vouched:
            found.extend(vouch(log, device_id, by) for by, each in log.devices.items() if each.vouched)
    return found


@st.composite
def logs(draw: st.DrawFn) -> list[bytes]:
    """An honest history."""
    log, history = DeviceLog.start(PERSON), []
    for _ in range(draw(st.integers(0, 8))):
        history.append(draw(st.sampled_from(steps(log))))
        log = log.then(history[-1])
    return history


def test_the_chain_is_what_its_docstring_says() -> None:
    identity = IDENTITIES[OWN].public_key
    added = LogEntry(EntryKind.ADDED, OWN, identity, 0x0102, recovered=True)
    assert added.encode() == b"SPL1\x01\x01" + b"0" * 16 + identity + bytes(6) + b"\x01\x02"
    vouched = LogEntry(EntryKind.VOUCHED, OWN, identity, 0x0102, by_device_id=DeviceId(b"b" * 16), signature=b"g" * 64)
    assert vouched.encode() == b"SPL1\x03\x00" + b"0" * 16 + identity + bytes(6) + b"\x01\x02" + b"b" * 16 + b"g" * 64
    # Worked out with sha256sum: what other implementations must get.
    assert start_head(SubscriberId(bytes(16))).hex() == "c24186682d24d379fd592f5dc41f1107ca43ee40fd8ce46bd172158780fcd772"
    assert next_head(bytes(32), bytes(62)).hex() == "21bb9709fa2902811c4c9f011eca24ee466f3b0309fbedaa583dcb724f90f12d"


@given(entries)
def test_an_entry_survives_its_encoding(made: LogEntry) -> None:
    assert LogEntry.decode(made.encode()) == made


@given(st.binary(max_size=160) | st.builds(lambda kind, rest: b"SPL1" + bytes((kind,)) + rest, st.integers(0, 4), st.binary(max_size=150)))
def test_bytes_that_are_no_entry_are_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert LogEntry.decode(data).encode() == data


def test_who_vouches_belongs_to_entries_that_vouch() -> None:
    made = LogEntry(EntryKind.VOUCHED, OWN, bytes(32), 1)
    for wrong in (
        made,
        replace(made, by_device_id=OWN, signature=bytes(63)),
        replace(made, kind=EntryKind.ADDED, by_device_id=OWN, signature=bytes(64)),
    ):
        with pytest.raises(ValueError, match="who vouches"):
            wrong.encode()


@given(logs(), st.data())
def test_a_history_with_anything_changed_is_broken_or_another(history: list[bytes], data: st.DataObject) -> None:
    head = DeviceLog.read(PERSON, history).head

    def is_same(entries: list[bytes], person: SubscriberId = PERSON) -> bool:
        try:
            return DeviceLog.read(person, entries).head == head
        except DeviceLogBroken:
            return False

    assert is_same(history)
    assert not is_same(history, SubscriberId(b"t" * 16))
    if history:
        at = data.draw(st.integers(0, len(history) - 1))
        bit = data.draw(st.integers(0, 8 * len(history[at]) - 1))
        flipped = bytearray(history[at])
        flipped[bit // 8] ^= 1 << bit % 8
        assert not is_same([*history[:at], bytes(flipped), *history[at + 1 :]])
        assert not is_same(history[:at] + history[at + 1 :])
        assert not is_same([*history, history[at]])


@given(logs())
def test_all_trust_comes_from_the_first_device(history: list[bytes]) -> None:
    """A plain model: who is trusted is what vouches lead to from the first entry, as long as the one who signed was there."""
    trusted: set[DeviceId] = set()
    here: list[DeviceId] = []
    for n, each in enumerate(map(LogEntry.decode, history)):
        if each.kind is EntryKind.ADDED:
            here.append(each.device_id)
            if n == 0:
                trusted.add(each.device_id)
        elif each.kind is EntryKind.REMOVED:
            here.remove(each.device_id)
            trusted.discard(each.device_id)
        else:
            assert each.by_device_id in trusted
            trusted.add(each.device_id)
    log = DeviceLog.read(PERSON, history)
    assert list(log.devices) == here
    assert {device_id for device_id, each in log.devices.items() if each.vouched} == trusted


@given(logs(), st.data())
def test_a_vouch_is_for_one_addition_in_one_history(history: list[bytes], data: st.DataObject) -> None:
    """A vouch signed on one history is taken by no other, unless the addition is the very same."""
    log = DeviceLog.read(PERSON, history)
    vouches = [each for each in steps(log) if LogEntry.decode(each).kind is EntryKind.VOUCHED]
    other = DeviceLog.read(PERSON, data.draw(logs()))
    for each in vouches:
        said = LogEntry.decode(each)
        there = other.devices.get(said.device_id)
        try:
            other.then(each)
        except DeviceLogBroken:
            continue
        assert there is not None
        assert there.added_head == log.devices[said.device_id].added_head


def test_a_device_tells_of_the_others() -> None:
    one, two = DeviceId(b"1" * 16), DeviceId(b"2" * 16)
    log = DeviceLog.start(PERSON)
    history = []
    for device_id in (one, OWN, two):
        history.append(entry(EntryKind.ADDED, device_id, recovered=log.seq > 0, at_ms=5 + log.seq))
        log = log.then(history[-1])
    by_other, by_own = vouch(log, OWN, one), b""
    log = log.then(by_other)
    by_own = vouch(log, two, OWN)
    history += [by_other, by_own, entry(EntryKind.REMOVED, one, at_ms=9)]
    own_key, one_key = IDENTITIES[OWN].public_key, IDENTITIES[one].public_key
    assert notices_of(new_to(OWN, own_key, history), OWN, own_key) == [
        DeviceNotice(NoticeKind.ADDED, 7, two, IDENTITIES[two].public_key),
        DeviceNotice(NoticeKind.REMOVED, 9, one, IDENTITIES[one].public_key),
    ]
    # To the first device everything else is new, to one that the log does not name everything.
    kinds = [NoticeKind.ADDED, NoticeKind.ADDED, NoticeKind.VOUCHED]
    assert [each.kind for each in notices_of(new_to(one, one_key, history), one, one_key)] == kinds
    assert len(notices_of(new_to(DeviceId(b"9" * 16), own_key, history), DeviceId(b"9" * 16), own_key)) == len(history)
    # One of its own id under another key is not itself.
    assert new_to(OWN, b"x" * 32, history) == history
    told = notices_of(history, OWN, b"x" * 32)
    assert DeviceNotice(NoticeKind.ADDED, 6, OWN, own_key) in told


def test_of_another_history_the_differences_are_told() -> None:
    own_key = IDENTITIES[OWN].public_key
    one, two = DeviceId(b"1" * 16), DeviceId(b"2" * 16)
    before = DeviceLog.read(PERSON, [entry(EntryKind.ADDED, OWN), entry(EntryKind.ADDED, one, recovered=True)])
    swapped = LogEntry(EntryKind.ADDED, one, b"x" * 32, 3, recovered=True).encode()
    after = DeviceLog.read(PERSON, [entry(EntryKind.ADDED, OWN), swapped, entry(EntryKind.ADDED, two, recovered=True)])
    assert [(each.kind, each.device_id, each.identity_public_key) for each in notices_of_another(before, after, OWN, own_key, 8)] == [
        (NoticeKind.LOG_BROKEN, None, b""),
        (NoticeKind.REMOVED, one, IDENTITIES[one].public_key),
        (NoticeKind.ADDED, one, b"x" * 32),
        (NoticeKind.ADDED, two, IDENTITIES[two].public_key),
    ]
    assert [each.fingerprint == "" for each in notices_of_another(before, after, OWN, own_key, 8)] == [True, False, False, False]
    posing = DeviceLog.read(PERSON, [LogEntry(EntryKind.ADDED, OWN, b"x" * 32, 3).encode()])
    assert [(each.kind, each.identity_public_key) for each in notices_of_another(before, posing, OWN, own_key, 8)] == [
        (NoticeKind.LOG_BROKEN, b""),
        (NoticeKind.REMOVED, IDENTITIES[one].public_key),
        (NoticeKind.ADDED, b"x" * 32),
    ]


def test_a_fingerprint_is_what_its_docstring_says() -> None:
    identity = IDENTITIES[OWN].public_key
    digest = b"SPF1\x01" + OWN + identity
    for _ in range(FINGERPRINT_ROUNDS):
        digest = hashlib.sha512(digest).digest()
    groups = fingerprint([(OWN, identity)]).split(" ")
    assert [len(each) for each in groups] == [5] * 12
    assert [int(each) for each in groups] == [int.from_bytes(digest[n : n + 5], "big") % 100_000 for n in range(0, 60, 5)]


@given(st.dictionaries(bytes16.map(DeviceId), bytes32, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_fingerprint_knows_no_order_and_every_key(devices: dict[DeviceId, bytes], chance: Random) -> None:
    shuffled = list(devices.items())
    chance.shuffle(shuffled)
    made = fingerprint(shuffled)
    assert made == fingerprint(devices.items())
    device_id, key = shuffled[0]
    assert fingerprint([(device_id, bytes((key[0] ^ 1,)) + key[1:]), *shuffled[1:]]) != made


def test_a_fingerprint_of_nothing_of_one_twice_or_of_other_lengths_is_refused() -> None:
    key = bytes(32)
    for devices in ([], [(OWN, key), (OWN, b"x" * 32)], [(OWN, bytes(31))], [(DeviceId(b"short"), key)]):
        with pytest.raises(ValueError, match=r"fingerprint|identity public key|device_id"):
            fingerprint(devices)
