"""Decisions about keys, without anything around them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.devicelog import DeviceLog, EntryKind, LogEntry, start_head
from sealpush.envelope import CONTENT_BYTES_MAX, Recipient
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, SubscriberId, uuid7
from sealpush.keys import (
    DAY_MS,
    ONE_TIME_PREKEYS_BATCH,
    TIME_MS_MAX,
    ContentSigningKey,
    IdentityKey,
    PrekeyKind,
    SignedPrekey,
    generate_prekey,
    prekey_proof,
)
from sealpush.proofs import vouch_proof
from sealpush.suites import SUITES
from sealpush.v1 import keys_pb2
from sealpushd.keys import rules, service
from sealpushd.keys.app import load_platform_key
from sealpushd.keys.rules import (
    Device,
    DeviceKeys,
    ListEnd,
    NewDevice,
    OneTimePrekeys,
    SealingKey,
    SealItem,
    StanzaCheck,
    StanzaKey,
    StoredPrekey,
    Upload,
)
from sealpushd.platform.clients import MESSAGE_BYTES_MAX
from sealpushd.platform.errors import FailedPrecondition, InvalidRequest, NotFound
from sealpushd.platform.settings import SettingsError
from sealpushd.v1 import sealing_pb2

NOW = 1_800_000_000_000
IDENTITY = IdentityKey.from_seed(b"i" * 32)
DEVICE = Device(DeviceId(b"d" * 16), SubscriberId(b"s" * 16), IDENTITY.public_key, 1, removed=False)


def hybrid(prekey_id: int = 1, kind: PrekeyKind = PrekeyKind.SIGNED, created_at_ms: int = NOW, min_suite: int = 2) -> SignedPrekey:
    _, public = generate_prekey(
        IDENTITY, DEVICE.device_id, prekey_id=prekey_id, kind=kind, now_ms=created_at_ms, suite=2, min_suite=min_suite
    )
    return public


def prekey(prekey_id: int = 1, kind: PrekeyKind = PrekeyKind.SIGNED, created_at_ms: int = NOW, min_suite: int = 1) -> SignedPrekey:
    _, public = generate_prekey(IDENTITY, DEVICE.device_id, prekey_id=prekey_id, kind=kind, now_ms=created_at_ms, min_suite=min_suite)
    return public


ONE_TIME = [prekey(n, PrekeyKind.ONE_TIME) for n in range(100)]
STRANGER = DeviceId(b"t" * 16)
CURRENT, PREVIOUS = prekey(2), prekey(1)
KEYS = DeviceKeys(DEVICE, (StoredPrekey(CURRENT, None), StoredPrekey(PREVIOUS, NOW)))


# Devices.


PHONES = {name: IdentityKey.from_seed(name * 32) for name in (b"a", b"b", b"c")}
PHONE_PREKEYS = {
    name: generate_prekey(identity, DeviceId(name * 16), prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=NOW)[1]
    for name, identity in PHONES.items()
}
PEOPLE = [SubscriberId(name * 16) for name in (b"1", b"2", b"3")]
phones, people = st.sampled_from(sorted(PHONES)), st.sampled_from(PEOPLE)


def new_device(name: bytes, subscriber: SubscriberId) -> NewDevice:
    return NewDevice(subscriber, DeviceId(name * 16), PHONES[name].public_key, PHONE_PREKEYS[name], min_suite=1)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.tuples(phones, people), max_size=6)), max_size=6))
def test_whatever_is_put_and_removed_the_logs_say_where_each_device_is(steps: list[tuple[bool, list[tuple[bytes, SubscriberId]]]]) -> None:
    """Plays plans against a table in memory, and compares with a plain model and with what the logs replay to."""
    known: dict[DeviceId, Device] = {}
    ends = {
        SubscriberId(name * 16): ListEnd(SubscriberId(name * 16), 0, start_head(SubscriberId(name * 16))) for name in (b"1", b"2", b"3")
    }
    logs: dict[SubscriberId, list[bytes]] = {subscriber: [] for subscriber in ends}
    model: dict[DeviceId, SubscriberId] = {}
    recovered: set[DeviceId] = set()
    for put, pairs in steps:
        if put:
            for name, subscriber in pairs:
                new = new_device(name, subscriber)
                known.setdefault(new.device_id, Device(new.device_id, subscriber, new.identity_public_key, 1, removed=True))
                model[new.device_id] = subscriber
            plan = rules.plan_put([new_device(*pair) for pair in pairs], known, {}, ends, NOW)
            assert plan.refusals == [""] * len(pairs)
        else:
            for name, subscriber in pairs:
                if model.get(DeviceId(name * 16)) == subscriber:
                    del model[DeviceId(name * 16)]
            plan = rules.plan_remove([(subscriber, DeviceId(name * 16)) for name, subscriber in pairs], known, ends, NOW)
        for device_id, subscriber in plan.placed.items():
            known[device_id] = replace(known[device_id], subscriber_id=subscriber, removed=False)
        recovered = (recovered - set(plan.placed)) | plan.recovered
        for device_id in plan.removed:
            known[device_id] = replace(known[device_id], removed=True)
        for append in plan.appends:
            logs[append.subscriber_id].append(append.entry)
            assert append.seq == len(logs[append.subscriber_id])
        ends |= {end.subscriber_id: replace(end, device_added=False) for end in plan.ends}
    assert {each.device_id: each.subscriber_id for each in known.values() if not each.removed} == model
    for subscriber, log in logs.items():
        read = DeviceLog.read(subscriber, log)
        assert (read.seq, read.head) == (ends[subscriber].seq, ends[subscriber].head)
        assert set(read.devices) == {device_id for device_id, owner in model.items() if owner == subscriber}
        assert {each.device_id for each in read.devices.values() if not each.vouched} == recovered & set(read.devices)


def listed(*names: bytes) -> tuple[DeviceLog, list[bytes]]:
    """A log with these devices, the first of them trusted."""
    log, history = DeviceLog.start(PEOPLE[0]), []
    for name in names:
        history.append(LogEntry(EntryKind.ADDED, DeviceId(name * 16), PHONES[name].public_key, NOW, recovered=log.seq > 0).encode())
        log = log.then(history[-1])
    return log, history


def vouch(log: DeviceLog, name: bytes, by: bytes) -> bytes:
    each = log.devices[DeviceId(name * 16)]
    return PHONES[by].sign(vouch_proof(each.device_id, each.identity_public_key, DeviceId(by * 16), each.added_head))


def plan_vouch(log: DeviceLog, name: bytes, by: bytes, signature: bytes) -> rules.Plan:
    return rules.plan_vouch(PEOPLE[0], log, DeviceId(name * 16), DeviceId(by * 16), signature, NOW)


def test_a_vouch_appends_what_every_reader_accepts_and_is_no_change_of_identity() -> None:
    log, history = listed(b"a", b"b")
    plan = plan_vouch(log, b"b", b"a", vouch(log, b"b", b"a"))
    [append] = plan.appends
    after = DeviceLog.read(PEOPLE[0], [*history, append.entry])
    assert (after.seq, after.head) == (append.seq, append.head)
    assert after.devices[DeviceId(b"b" * 16)].vouched
    assert plan.vouched == (DeviceId(b"b" * 16),)
    assert [(each.seq, each.head, each.device_added) for each in plan.ends] == [(after.seq, after.head, False)]
    assert plan_vouch(after, b"b", b"a", b"whatever") == rules.Plan()


def test_who_may_not_vouch_and_what_cannot_be_vouched_for_is_refused() -> None:
    log, _ = listed(b"a", b"b")
    with pytest.raises(NotFound):
        plan_vouch(log, b"c", b"a", bytes(64))
    for by in (b"b", b"c"):
        with pytest.raises(FailedPrecondition, match="nobody vouches"):
            plan_vouch(log, b"b", by, bytes(64))
    for signature in (b"", bytes(64), PHONES[b"b"].sign(b"something"), vouch(log, b"a", b"a")):
        with pytest.raises(InvalidRequest) as refused:
            plan_vouch(log, b"b", b"a", signature)
        assert refused.value.field == "signature"


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 9))
def test_a_message_with_a_bound_is_sealed_unless_a_device_it_goes_to_is_newer(added: list[int], bound: int) -> None:
    """By the server and by the sender alike; devices of others, and unknown ones, do not count."""
    ids = [DeviceId(bytes((n,)) * 16) for n in range(len(added))]
    newer = tuple(device_id for device_id, at_ms in zip(ids, added, strict=True) if bound and at_ms > bound)
    wanted = rules.TooNew(newer, max(at_ms for at_ms in added if at_ms > bound)) if newer else None

    recipient = Recipient.of(DEVICE.device_id, CURRENT)
    sealing = {
        d: SealingKey(DEVICE.subscriber_id, at_ms, NOW + DAY_MS, replace(recipient, device_id=d))
        for d, at_ms in zip(ids, added, strict=True)
    }
    sealing[STRANGER] = SealingKey(SubscriberId(b"t" * 16), 10, NOW + DAY_MS, replace(recipient, device_id=STRANGER))
    item = SealItem(SenderId(uuid7()), DEVICE.subscriber_id, (*ids, STRANGER, DeviceId(uuid7())), b"", NOW, NOW + 1, bound)
    sealed = rules.seal(item, sealing, ContentSigningKey.generate(), ContentId(uuid7()), RecipientRef(bytes(32)), NOW)
    assert (sealed if isinstance(sealed, rules.TooNew) else None) == wanted

    keys = {d: replace(KEYS, device=replace(DEVICE, device_id=d), added_at_ms=at_ms) for d, at_ms in zip(ids, added, strict=True)}
    keys[STRANGER] = replace(KEYS, device=replace(DEVICE, device_id=STRANGER, subscriber_id=SubscriberId(b"t" * 16)), added_at_ms=10)
    verdict = rules.check_stanzas(replace(check(devices=(*ids, STRANGER)), added_until_ms=bound), keys, {}, NOW)
    assert verdict.too_new == wanted


# Uploads.


def test_an_upload_within_all_bounds_is_taken() -> None:
    assert rules.check_upload(Upload((CURRENT, *ONE_TIME), 0), DEVICE, NOW) == 1
    assert rules.check_upload(Upload((), 1), DEVICE, NOW) == 1


LOW_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("top_bit", [0, 0x80])
def test_no_low_order_point_is_taken_in_any_encoding(point: str, top_bit: int) -> None:
    public_key = bytes.fromhex(point)
    unsigned = replace(CURRENT, public_key=public_key[:31] + bytes((public_key[31] | top_bit,)))
    signed = replace(unsigned, signature=IDENTITY.sign(prekey_proof(unsigned, DEVICE.device_id)))
    assert "usable X25519" in rules.refuse_prekey(signed, DEVICE, NOW, 1)


def test_the_lowest_suite_never_goes_down_and_never_beyond_what_is_supported() -> None:
    strict = replace(DEVICE, min_suite=2)
    with pytest.raises(InvalidRequest) as caught:
        rules.check_upload(Upload((), 1), strict, NOW)
    assert "never goes down" in caught.value.message
    with pytest.raises(InvalidRequest):
        rules.check_upload(Upload((), 3), DEVICE, NOW)
    # Raising it needs a prekey whose signature says so.
    with pytest.raises(InvalidRequest) as caught:
        rules.check_upload(Upload((), 2), DEVICE, NOW)
    assert "signed prekey" in caught.value.message
    with pytest.raises(InvalidRequest):
        rules.check_upload(Upload((CURRENT,), 2), DEVICE, NOW)
    with pytest.raises(InvalidRequest):
        rules.check_upload(Upload((hybrid(min_suite=1),), 2), DEVICE, NOW)
    assert rules.check_upload(Upload((hybrid(),), 2), DEVICE, NOW) == 2
    # Once there, the suite may be left as it is, and nothing lower is taken.
    assert rules.check_upload(Upload((hybrid(2, PrekeyKind.ONE_TIME),), 0), strict, NOW) == 2
    with pytest.raises(InvalidRequest):
        rules.check_upload(Upload((prekey(3, PrekeyKind.ONE_TIME),), 0), strict, NOW)


def test_a_signed_prekey_held_already_is_no_news_and_its_id_is_taken() -> None:
    assert rules.replaces(CURRENT, [PREVIOUS])
    assert not rules.replaces(CURRENT, [CURRENT, PREVIOUS])
    with pytest.raises(InvalidRequest):
        rules.replaces(prekey(1), [CURRENT, PREVIOUS])


def test_one_time_prekeys_are_kept_in_order_without_those_handed_out_or_expired() -> None:
    stock = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[:50], NOW)
    assert stock.left(NOW) == ONE_TIME[:50]
    handed_out = replace(stock, next_index=3)
    assert handed_out.left(NOW) == ONE_TIME[3:50]
    refilled = handed_out.refilled(ONE_TIME[50:], NOW)
    assert (refilled.first_index, refilled.next_index) == (3, 3)
    assert refilled.left(NOW) == ONE_TIME[3:]
    assert refilled.left(NOW + 90 * DAY_MS) == []
    assert len(refilled.refilled([], NOW + 90 * DAY_MS).blob) == 0


def test_one_time_prekeys_are_bounded_and_their_ids_their_own() -> None:
    full = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME, NOW)
    assert full.refilled(ONE_TIME, NOW) == full
    with pytest.raises(InvalidRequest):
        full.refilled([replace(ONE_TIME[0], signature=bytes(64))], NOW)
    more = [replace(each, prekey_id=each.prekey_id + 100) for each in ONE_TIME]
    full = full.refilled(more, NOW)
    with pytest.raises(InvalidRequest) as caught:
        full.refilled([replace(ONE_TIME[0], prekey_id=200)], NOW)
    assert "200 one-time prekeys are left" in caught.value.message


def test_keys_are_taken_oldest_first_and_never_twice() -> None:
    stock = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[:5], NOW)
    first, stock = stock.taken(2, NOW)
    none, same = stock.taken(0, NOW)
    second, stock = stock.taken(2, NOW)
    assert (first, none, second) == (ONE_TIME[:2], [], ONE_TIME[2:4])
    assert (same.next_index, stock.next_index) == (2, 4)
    last, empty = stock.taken(2, NOW)
    assert last == ONE_TIME[4:5]
    assert empty == OneTimePrekeys(1, 5, 5, b"")
    assert empty.taken(1, NOW) == ([], empty)


@pytest.mark.parametrize("key", [ONE_TIME[7], hybrid(7, PrekeyKind.ONE_TIME)], ids=["suite 1", "suite 2"])
def test_a_record_survives_its_encoding(key: SignedPrekey) -> None:
    record = rules.to_record(key)
    assert rules.from_record(key.suite, record) == key
    assert len(record) == rules.record_bytes(key.suite)


def test_from_a_window_as_many_are_taken_as_are_in_it_and_what_follows_stays() -> None:
    whole = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[:5], NOW)
    window = replace(whole, blob=whole.blob[: 3 * rules.record_bytes(1)], more=True)
    given, after = window.taken(4, NOW)
    assert given == ONE_TIME[:3]
    assert after == replace(window, next_index=3)
    # Also where everything in it has expired.
    assert window.taken(1, NOW + 90 * DAY_MS) == ([], after)


def test_a_repeated_upload_leaves_out_what_was_handed_out_meanwhile() -> None:
    given, stock = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[:5], NOW).taken(2, NOW)
    again = stock.refilled(ONE_TIME[:5], NOW, {each.prekey_id for each in given})
    assert again.left(NOW) == ONE_TIME[2:5]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("refill"), st.lists(st.integers(1, 40), max_size=12)),
            st.tuples(st.just("take"), st.integers(0, 6)),
            st.tuples(st.just("wait"), st.integers(1, 15)),
        ),
        max_size=25,
    )
)
def test_whatever_is_refilled_taken_and_expires_a_stock_is_a_queue_without_the_expired(
    steps: list[tuple[str, list[int]] | tuple[str, int]],
) -> None:
    """Plays steps against a plain list of keys; times in milliseconds."""
    stock, model, now, next_id = OneTimePrekeys(1, 0, 0, b""), list[SignedPrekey](), NOW, 0
    handed_out: set[int] = set()
    for step, value in steps:
        model = [each for each in model if each.expires_at_ms > now]
        if isinstance(value, list):
            # A key as the rule sees it: nothing here looks at signatures.
            added = [replace(ONE_TIME[0], prekey_id=next_id + n, expires_at_ms=now + lives) for n, lives in enumerate(value)]
            next_id += len(added)
            if len(model) + len(added) <= rules.ONE_TIME_PREKEYS_MAX:
                before = stock.next_index
                stock = stock.refilled(added, now)
                model += added
                assert stock.first_index == stock.next_index == before
        elif step == "take":
            before = stock.next_index
            given, stock = stock.taken(value, now)
            assert given == model[:value]
            model = model[value:]
            assert stock.first_index <= stock.next_index
            assert stock.next_index >= before + len(given)
            assert handed_out.isdisjoint(each.prekey_id for each in given)
            handed_out |= {each.prekey_id for each in given}
            # Trimmed as soon as nothing is left.
            assert bool(stock.blob) is bool(model)
        else:
            now += value
        assert stock.left(now) == [each for each in model if each.expires_at_ms > now]


# Handouts.


def wanted(request_id: str, device: int = 0) -> rules.Wanted:
    return rules.Wanted(request_id, DeviceId(bytes((device,)) * 16), 1, 1)


def test_one_request_gets_one_key_of_a_device_however_often_it_stands_in_a_call() -> None:
    stock = OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[:5], NOW)
    plan = rules.plan_handouts([wanted("a"), wanted("b"), wanted("a")], {DeviceId(bytes(16)): stock}, {}, 10, NOW)
    assert plan.given == {("a", DeviceId(bytes(16))): ONE_TIME[0], ("b", DeviceId(bytes(16))): ONE_TIME[1]}
    assert plan.stocks == {DeviceId(bytes(16)): replace(stock, next_index=2)}


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), max_size=20),
    st.lists(st.integers(0, 8), min_size=3, max_size=3),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.integers(0, 10),
)
def test_handouts_keep_to_stock_and_limit_and_give_no_key_twice(
    asked: list[tuple[str, int]], sizes: list[int], handed_out: list[int], allowed: int
) -> None:
    ids = [DeviceId(bytes((n,)) * 16) for n in range(3)]
    stocks = {
        device_id: OneTimePrekeys(1, 0, 0, b"").refilled(ONE_TIME[10 * n : 10 * n + size], NOW)
        for n, (device_id, size) in enumerate(zip(ids, sizes, strict=True))
        if size
    }
    plan = rules.plan_handouts([wanted(*each) for each in asked], stocks, dict(zip(ids, handed_out, strict=True)), allowed, NOW)
    assert len({each.prekey_id for each in plan.given.values()}) == len(plan.given)
    for n, device_id in enumerate(ids):
        requests = {request_id for request_id, device in asked if device == n}
        given = [prekey for (_, device), prekey in plan.given.items() if device == device_id]
        assert len(given) == min(len(requests), sizes[n], max(0, allowed - handed_out[n]))
        assert given == ONE_TIME[10 * n : 10 * n + len(given)]
        assert (
            plan.stocks.get(device_id, stocks.get(device_id, OneTimePrekeys(1, 0, 0, b""))).left(NOW)
            == ONE_TIME[10 * n + len(given) : 10 * n + sizes[n]]
        )
        assert (device_id in plan.stocks) is bool(given)


@given(st.booleans(), st.booleans(), st.integers(-2, 2))
def test_a_one_time_prekey_is_accepted_from_its_holder_until_it_ends(held: bool, same_sender: bool, late: int) -> None:
    key = stanza(ONE_TIME[0])
    one = check(key)
    holder = one.sender_id if same_sender else SenderId(uuid7())
    handouts = {key: rules.Handout(holder, NOW - late)} if held else {}
    verdict = rules.check_stanzas(one, {DEVICE.device_id: KEYS}, handouts, NOW)
    assert (verdict.stale == ()) is (held and same_sender and late < 0)
    assert rules.check_stanzas(one, {}, handouts, NOW).stale == (DEVICE.device_id,)


def test_only_one_time_prekeys_that_there_can_be_are_looked_up() -> None:
    key = stanza(ONE_TIME[0])
    assert rules.one_time([key, stanza(CURRENT), replace(key, suite=3), replace(key, suite=70_000), replace(key, kind=3)]) == [key]
    assert rules.one_time([replace(key, suite=2)]) == [replace(key, suite=2)]


# Sealing and stanzas.


def test_an_item_at_its_bounds_can_be_sealed_and_one_beyond_is_refused_beforehand() -> None:
    item = SealItem(SenderId(uuid7()), DEVICE.subscriber_id, (), os.urandom(CONTENT_BYTES_MAX), NOW, NOW + 28 * DAY_MS)
    rules.check_seal_item(item)
    ref = RecipientRef(bytes(32))
    sealed = rules.seal(item, {}, ContentSigningKey.from_seed(bytes(32)), ContentId(uuid7()), ref, NOW)
    assert isinstance(sealed, rules.Sealed)
    assert sealed.envelope.stanzas == ()
    at_the_end_of_time = replace(item, created_at_ms=TIME_MS_MAX, expires_at_ms=TIME_MS_MAX + 1)
    for bad in (at_the_end_of_time, replace(item, expires_at_ms=NOW), replace(item, expires_at_ms=item.expires_at_ms + 1)):
        with pytest.raises(ValueError, match=r"expires_at_ms|28 days"):
            rules.check_seal_item(bad)


def check(*stanzas: StanzaKey, devices: tuple[DeviceId, ...] = (DEVICE.device_id,)) -> StanzaCheck:
    return StanzaCheck(SenderId(uuid7()), DEVICE.subscriber_id, devices, stanzas, bytes(32))


def stanza(of: SignedPrekey) -> StanzaKey:
    return StanzaKey(DEVICE.device_id, of.suite, of.prekey_id, of.kind)


@given(st.integers(0, 100 * DAY_MS))
def test_a_stanza_is_good_until_its_prekey_ends_and_a_week_after_a_newer_one_came(later: int) -> None:
    now = NOW + later
    current = rules.check_stanzas(check(stanza(CURRENT)), {DEVICE.device_id: KEYS}, {}, now)
    previous = rules.check_stanzas(check(stanza(PREVIOUS)), {DEVICE.device_id: KEYS}, {}, now)
    assert bool(current.stale) is (later >= 90 * DAY_MS)
    assert bool(previous.stale) is (later >= 7 * DAY_MS)


@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_every_device_and_every_stanza_is_judged_once(devices: set[int], sealed: set[int], with_prekeys: set[int]) -> None:
    def device_id(n: int) -> DeviceId:
        return DeviceId(bytes((n,)) * 16)

    keys = {device_id(n): replace(KEYS, device=replace(DEVICE, device_id=device_id(n))) for n in with_prekeys}
    stanzas = [replace(stanza(CURRENT), device_id=device_id(n)) for n in sorted(sealed)]
    verdict = rules.check_stanzas(check(*stanzas, devices=tuple(device_id(n) for n in sorted(devices))), keys, {}, NOW)
    assert set(verdict.missing) == {device_id(n) for n in (devices & with_prekeys) - sealed}
    assert set(verdict.surplus) == {device_id(n) for n in sealed - devices}
    assert set(verdict.stale) == {device_id(n) for n in sealed & devices - with_prekeys}


def test_a_stanza_below_the_lowest_suite_is_stale() -> None:
    strict = DeviceKeys(replace(DEVICE, min_suite=2), KEYS.prekeys)
    assert rules.check_stanzas(check(stanza(CURRENT)), {DEVICE.device_id: strict}, {}, NOW).stale == (DEVICE.device_id,)


# The platform's key.


def test_a_file_without_a_platform_key_is_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "platform"
    for content in ("secret", "00" * 31):
        path.write_text(content)
        with pytest.raises(SettingsError) as caught:
            load_platform_key(path)
        assert str(path) in str(caught.value)
        assert content not in str(caught.value)
    with pytest.raises(SettingsError):
        load_platform_key(tmp_path / "missing")
    path.write_text("11" * 32 + "\n")
    assert load_platform_key(path) == ContentSigningKey.from_seed(b"\x11" * 32)


# Sizes.


LARGEST_PREKEY = keys_pb2.Prekey(
    suite=255,
    prekey_id=(1 << 32) - 1,
    kind=keys_pb2.PREKEY_KIND_ONE_TIME,
    public_key=bytes(max(each.public_bytes for each in SUITES.values())),
    created_at_ms=TIME_MS_MAX,
    expires_at_ms=TIME_MS_MAX,
    signature=bytes(64),
)


def test_the_largest_answer_of_keys_fits_what_grpc_takes_by_default() -> None:
    device = keys_pb2.DeviceKeys(
        device_id=bytes(16), identity_public_key=bytes(32), signed_prekey=LARGEST_PREKEY, one_time_prekey=LARGEST_PREKEY, min_suite=255
    )
    around = keys_pb2.RecipientKeysResult(keys=keys_pb2.RecipientKeys(recipient_ref=bytes(32), device_list_version=bytes(32)))
    devices, recipients = service.RECIPIENT_DEVICES_MAX * (device.ByteSize() + 8), service.RECIPIENT_QUERIES_MAX * (around.ByteSize() + 32)
    assert devices + recipients < 4 * 1024 * 1024


def test_the_largest_upload_and_the_stanzas_of_the_largest_batch_fit_their_bounds() -> None:
    upload = keys_pb2.PrekeyUpload(prekeys=[LARGEST_PREKEY] * (ONE_TIME_PREKEYS_BATCH + 1), min_suite=255)
    assert upload.ByteSize() < service.CHANGE_BYTES_MAX
    stanza_bytes = 24 + max(each.wrapped_bytes for each in SUITES.values())
    stanza = sealing_pb2.DeviceStanza(device_id=bytes(16), stanza=bytes(stanza_bytes))
    contents = 2 * 1024 * 1024  # of a batch, padded
    assert service.SEAL_DEVICES_MAX * (stanza.ByteSize() + 8) + contents < MESSAGE_BYTES_MAX
