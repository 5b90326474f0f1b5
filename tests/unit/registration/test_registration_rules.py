"""The decisions of registration."""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import AppId, DeviceId, RegistrationId, SenderId, SubscriberId, uuid7
from sealpush.model import Reason
from sealpush.v1 import common_pb2
from sealpushd.platform.errors import AlreadyExists, FailedPrecondition, InvalidRequest, LimitExceeded, NotFound, PermissionDenied
from sealpushd.registration import rules
from sealpushd.registration.rules import (
    Closure,
    ClosureKind,
    Facts,
    InstallationChange,
    Installed,
    InstallState,
    KnownDevice,
    Listed,
    Lock,
    OwnInstallation,
    Pin,
    Preference,
    PushToken,
    Query,
    Resolved,
    Row,
    Target,
)

NOW = datetime(2026, 11, 22, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = b"k" * 32
DEVICE = DeviceId(bytes(15) + b"\x01")
CANDIDATE = SubscriberId(b"c" * 16)
OWNER = SubscriberId(b"o" * 16)

devices = st.builds(
    KnownDevice,
    device_id=st.binary(min_size=16, max_size=16).map(DeviceId).filter(lambda one: one != DEVICE),
    state=st.sampled_from(InstallState),
    last_seen_at=st.integers(0, 400).map(lambda days: NOW - days * DAY),
)
owns = st.none() | st.builds(
    OwnInstallation,
    subscriber_id=st.sampled_from([OWNER, SubscriberId(b"x" * 16)]),
    app_id=st.just(AppId("app")),
    state=st.sampled_from(InstallState),
    identity_public_key=st.just(KEY),
    registration_id=st.just(RegistrationId(b"r" * 16)),
)
facts_known = st.builds(
    Facts,
    owner=st.just(OWNER),
    owner_devices=st.lists(devices, max_size=4).map(tuple),
    own=owns,
    lock=st.none() | st.just(Lock(OWNER, b"a hash")),
)


def mac(body: bytes) -> bytes:
    return hmac.digest(b"a key", body, hashlib.sha256)


def known(days: int, state: InstallState = InstallState.ACTIVE) -> KnownDevice:
    return KnownDevice(DeviceId(uuid7()), state, NOW - days * DAY)


# --- whose a number is -----------------------------------------------------------------------------------------------------


def test_a_number_nobody_had_gets_the_subscriber_chosen_at_the_start() -> None:
    binding = rules.decide_binding(Facts(None, (), None), DEVICE, CANDIDATE, now=NOW)
    assert binding == rules.Binding(CANDIDATE)
    assert rules.closures_of_binding(binding, DEVICE) == []


@given(facts_known)
def test_a_number_is_recycled_only_when_nobody_of_its_subscriber_used_it_lately(facts: Facts) -> None:
    binding = rules.decide_binding(facts, DEVICE, CANDIDATE, now=NOW)
    in_use = any(one.state is InstallState.ACTIVE and NOW - one.last_seen_at <= 90 * DAY for one in facts.owner_devices)
    same_person = facts.own is not None and facts.own.subscriber_id == OWNER
    assert (binding.subscriber_id == OWNER) == (in_use or same_person)
    assert (binding.recycled == OWNER) == (not in_use and not same_person)
    if binding.recycled is not None:
        assert set(binding.unbound) == {one.device_id for one in facts.owner_devices if one.state is InstallState.ACTIVE}
    else:
        assert binding.unbound == ()


@given(facts_known)
def test_a_device_leaves_exactly_the_subscriber_it_was_active_with(facts: Facts) -> None:
    binding = rules.decide_binding(facts, DEVICE, CANDIDATE, now=NOW)
    own = facts.own
    moved = own is not None and own.state is InstallState.ACTIVE and own.subscriber_id != binding.subscriber_id
    assert binding.left == (own.subscriber_id if own is not None and moved else None)
    closures = rules.closures_of_binding(binding, DEVICE)
    closed = {closure.device_id for closure in closures if closure.kind is ClosureKind.CLOSE_DEVICE}
    removed = {(closure.subscriber_id, closure.device_id) for closure in closures if closure.kind is ClosureKind.REMOVE_DEVICE}
    assert closed == set(binding.unbound) | ({DEVICE} if moved else set())
    assert {device for _, device in removed} == closed
    assert all(subscriber != binding.subscriber_id for subscriber, _ in removed)


def test_90_days_are_the_border() -> None:
    def recycled(*owner_devices: KnownDevice) -> bool:
        return rules.decide_binding(Facts(OWNER, owner_devices, None), DEVICE, CANDIDATE, now=NOW).recycled is not None

    assert not recycled(known(90))
    assert recycled(known(91))
    assert recycled(known(1, InstallState.UNREGISTERED))
    assert recycled()
    assert not recycled(known(200), known(2))


def test_a_number_has_at_most_so_many_installations() -> None:
    full = tuple(known(1) for _ in range(rules.INSTALLATIONS_MAX))
    with pytest.raises(FailedPrecondition, match="unregister one"):
        rules.decide_binding(Facts(OWNER, full, None), DEVICE, CANDIDATE, now=NOW)
    ended = (*full[1:], known(1, InstallState.UNREGISTERED))
    assert rules.decide_binding(Facts(OWNER, ended, None), DEVICE, CANDIDATE, now=NOW).subscriber_id == OWNER
    # Who has one already may register again.
    own = OwnInstallation(OWNER, AppId("app"), InstallState.ACTIVE, KEY, RegistrationId(uuid7()))
    assert rules.decide_binding(Facts(OWNER, full, own), DEVICE, CANDIDATE, now=NOW).subscriber_id == OWNER


def test_the_mailbox_is_told_twice_and_keys_once() -> None:
    closures = rules.closures_of_end(DEVICE, OWNER, Reason.UNREGISTERED)
    assert [closure.kind for closure in rules.repeated(closures)] == [ClosureKind.CLOSE_DEVICE]


# --- who takes a device away -----------------------------------------------------------------------------------------------

OTHER = SubscriberId(b"x" * 16)
listed = st.none() | st.builds(Listed, subscriber_id=st.sampled_from([OWNER, OTHER]), vouched=st.booleans())
installed = st.none() | st.builds(Installed, subscriber_id=st.sampled_from([OWNER, OTHER]), state=st.sampled_from(InstallState))


@given(installed, listed, listed)
def test_only_a_device_trusted_in_the_subscribers_own_log_takes_others_away(
    installed: Installed | None, listed: Listed | None, by: Listed | None
) -> None:
    if by == Listed(OWNER, vouched=True):
        return
    with pytest.raises(PermissionDenied, match="use the phone that registered first"):
        rules.closures_of_removal(DEVICE, OWNER, installed, listed, by)


@given(installed, listed)
def test_a_removal_is_the_devices_own_end_and_never_another_subscribers(installed: Installed | None, listed: Listed | None) -> None:
    ours = {installed and installed.subscriber_id, listed and listed.subscriber_id} & {OWNER}
    if not ours:
        with pytest.raises(NotFound):
            rules.closures_of_removal(DEVICE, OWNER, installed, listed, Listed(OWNER, vouched=True))
        return
    closures = rules.closures_of_removal(DEVICE, OWNER, installed, listed, Listed(OWNER, vouched=True))
    if installed == Installed(OWNER, InstallState.ACTIVE):
        assert closures == rules.closures_of_end(DEVICE, OWNER, Reason.UNREGISTERED)
    else:
        # Deliveries of a device that is active elsewhere are not this person's to close.
        in_list = listed is not None and listed.subscriber_id == OWNER
        assert closures == ([Closure(ClosureKind.REMOVE_DEVICE, OWNER, DEVICE)] if in_list else [])


def test_a_device_does_not_remove_itself() -> None:
    with pytest.raises(InvalidRequest, match="call Unregister"):
        rules.check_removal(DEVICE, DEVICE)
    rules.check_removal(DEVICE, DeviceId(uuid7()))


def test_a_device_id_belongs_to_one_key_and_one_app() -> None:
    own = OwnInstallation(OWNER, AppId("app"), InstallState.UNREGISTERED, KEY, RegistrationId(uuid7()))
    rules.check_identity(own, KEY, AppId("app"))
    rules.check_identity(None, KEY, AppId("app"))
    for identity, app_id in ((b"z" * 32, "app"), (KEY, "other")):
        with pytest.raises(AlreadyExists):
            rules.check_identity(own, identity, AppId(app_id))


def test_only_the_registration_that_bound_an_active_device_can_be_repeated() -> None:
    registration_id = RegistrationId(uuid7())
    own = OwnInstallation(OWNER, AppId("app"), InstallState.ACTIVE, KEY, registration_id)
    assert rules.bound_before(own, registration_id) == OWNER
    assert rules.bound_before(own, RegistrationId(uuid7())) is None
    ended = OwnInstallation(OWNER, AppId("app"), InstallState.UNREGISTERED, KEY, registration_id)
    assert rules.bound_before(ended, registration_id) is None
    assert rules.bound_before(None, registration_id) is None


# --- the registration lock -------------------------------------------------------------------------------------------------


def owned(state: InstallState) -> OwnInstallation:
    return OwnInstallation(OWNER, AppId("app"), state, KEY, RegistrationId(b"r" * 16))


def set_pin(text: str) -> str:
    pin = rules.typed_pin(text)
    assert pin is not None
    return rules.check_new_pin(pin).value


@given(facts_known)
def test_a_lock_is_in_force_for_other_devices_while_one_of_its_person_was_used_within_thirty_days(facts: Facts) -> None:
    until = rules.locked_until(facts, now=NOW)
    used = [one.last_seen_at for one in facts.owner_devices if one.state is InstallState.ACTIVE and NOW - one.last_seen_at <= 30 * DAY]
    own = facts.own is not None and facts.own.subscriber_id == OWNER and facts.own.state is InstallState.ACTIVE
    assert until == (max(used) + 30 * DAY if used and facts.lock is not None and not own else None)


@given(facts_known)
def test_a_recycled_number_is_never_locked(facts: Facts) -> None:
    if rules.decide_binding(facts, DEVICE, CANDIDATE, now=NOW).recycled is not None:
        assert rules.locked_until(facts, now=NOW) is None


@given(facts_known)
def test_whoever_joins_under_a_lapsed_lock_ends_it_and_nobody_else_does(facts: Facts) -> None:
    binding = rules.decide_binding(facts, DEVICE, CANDIDATE, now=NOW)
    lapsed = facts.lock is not None and rules.locked_until(facts, now=NOW) is None
    assert binding.ends_lock == (lapsed and not facts.is_own and binding.subscriber_id == OWNER)


def test_an_ended_installation_gives_the_pin_like_any_other() -> None:
    lock, others = Lock(OWNER, b"a hash"), (known(1),)
    assert rules.locked_until(Facts(OWNER, others, owned(InstallState.ACTIVE), lock), now=NOW) is None
    assert rules.locked_until(Facts(OWNER, others, owned(InstallState.UNREGISTERED), lock), now=NOW) == NOW + 29 * DAY


def test_locks_are_equal_by_their_pin_and_print_nothing_of_it() -> None:
    assert Lock(OWNER, b"h") == Lock(OWNER, b"h", 3, NOW) != Lock(OWNER, b"i")
    assert "a hash" not in repr(Lock(OWNER, b"a hash"))
    assert repr(Pin("271828")) == f"{Pin('271828')}" == "Pin(…)"


@given(st.lists(st.integers(0, 30 * 3600), min_size=1, max_size=60))
def test_no_day_sees_more_than_five_wrong_pins(pauses_s: list[int]) -> None:
    lock, now = Lock(OWNER, b"h"), NOW
    tried: list[datetime] = []
    for pause_s in pauses_s:
        now += timedelta(seconds=pause_s)
        left = rules.pin_attempts_left(lock, now=now)
        if left == 0:
            with pytest.raises(LimitExceeded) as refused:
                rules.take_pin_attempt(lock, now=now)
            assert refused.value.retry_after is not None
            assert rules.pin_attempts_left(lock, now=now + refused.value.retry_after) == 5
            continue
        lock = rules.take_pin_attempt(lock, now=now)
        assert rules.pin_attempts_left(lock, now=now) == left - 1
        tried.append(now)
    assert all(sum(start <= each < start + DAY for each in tried) <= 5 for start in tried)


def test_a_refusal_says_how_many_are_left_and_the_day_but_not_the_minute_of_the_end() -> None:
    until = NOW + timedelta(days=3, hours=5, minutes=7)
    refused = rules.locked(Lock(OWNER, b"h", 2, NOW), until, pin_given=True, now=NOW)
    assert refused.metadata == {"attempts_left": "3", "lock_lapses_at": "2026-11-26T00:00:00Z"}
    assert (refused.reason, refused.retry_after) == ("REGISTRATION_LOCKED", None)
    spent = rules.locked(Lock(OWNER, b"h", 5, NOW - timedelta(hours=1)), until, pin_given=False, now=NOW)
    assert (spent.metadata["attempts_left"], spent.retry_after) == ("0", timedelta(hours=23))


@pytest.mark.parametrize(
    "easy", ["0000", "9" * 20, "1234", "4321", "012345", "7890", "3210987", "aaaa", "abcd", "zyxw", "٤٤٤٤", "\uff11234"]
)
def test_pins_that_anybody_tries_first_are_refused(easy: str) -> None:
    with pytest.raises(InvalidRequest, match="repeat or count") as refused:
        set_pin(easy)
    assert easy not in str(refused.value)


@pytest.mark.parametrize("wrong", ["1", "271", "2" * 16 + "7" * 17, "x" * 129, "27\x0018", "27\n18", "ab\u200bcd", "\u202e271828"])
def test_pins_of_a_wrong_length_or_that_cannot_be_seen_are_refused(wrong: str) -> None:
    with pytest.raises(InvalidRequest, match="PIN") as refused:
        set_pin(wrong)
    assert refused.value.field == "pin"


def test_a_pin_is_the_same_however_keyboards_write_it() -> None:
    assert set_pin("кава з \u0457жею") == set_pin(" кава з \u0456\u0308жею ")
    assert set_pin("\uff12\uff17\uff11\uff18") == "2718"
    assert rules.typed_pin("") is rules.typed_pin("  ") is None


@given(st.text(max_size=140))
def test_whatever_is_typed_is_a_pin_or_an_error_and_stays_the_same_when_typed_again(text: str) -> None:
    try:
        pin = rules.typed_pin(text)
    except InvalidRequest:
        assert len(text) > 128
        return
    if pin is not None and len(pin.value) <= 128:
        again = rules.typed_pin(pin.value)
        assert again is not None
        assert again.value == pin.value


@given(st.text("0123456789", min_size=4, max_size=32))
def test_digits_that_neither_repeat_nor_count_may_be_set(digits: str) -> None:
    steps = {(int(after) - int(before)) % 10 for before, after in pairwise(digits)}
    if steps in ({0}, {1}, {9}):
        with pytest.raises(InvalidRequest):
            set_pin(digits)
    else:
        assert set_pin(digits) == digits


# --- challenges ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60_000_000))
def test_a_challenge_is_good_for_60_seconds(age_us: int) -> None:
    challenge = rules.make_challenge(DEVICE, bytes(16), mac, now=NOW)
    later = NOW + timedelta(microseconds=age_us)
    assert rules.challenge_issued_us(challenge, DEVICE, mac, now=later) == int(NOW.timestamp() * 1_000_000)


def test_a_challenge_too_old_or_from_the_future_is_refused() -> None:
    challenge = rules.make_challenge(DEVICE, bytes(16), mac, now=NOW)
    for moment in (NOW + timedelta(seconds=60, microseconds=1), NOW - timedelta(seconds=5, microseconds=1)):
        assert rules.challenge_issued_us(challenge, DEVICE, mac, now=moment) is None
    assert len(challenge) <= 128


@given(st.integers(0, 8 * 73 - 1))
def test_a_challenge_with_any_bit_changed_is_refused(bit: int) -> None:
    challenge = bytearray(rules.make_challenge(DEVICE, bytes(16), mac, now=NOW))
    challenge[bit // 8] ^= 1 << bit % 8
    assert rules.challenge_issued_us(bytes(challenge), DEVICE, mac, now=NOW) is None


@given(st.binary(max_size=100))
def test_made_up_challenges_are_refused(challenge: bytes) -> None:
    assert rules.challenge_issued_us(challenge, DEVICE, mac, now=NOW) is None


def test_a_challenge_is_for_one_device() -> None:
    challenge = rules.make_challenge(DEVICE, bytes(16), mac, now=NOW)
    assert rules.challenge_issued_us(challenge, DeviceId(uuid7()), mac, now=NOW) is None


# --- installations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (InstallationChange(push_token=PushToken("a b")), "push_token"),
        (InstallationChange(push_token=PushToken("x" * 4097)), "push_token"),
        (InstallationChange(platform=rules.IOS, push_token=PushToken("../" + "a" * 64)), "push_token"),
        (InstallationChange(push_topic="a\nb"), "push_topic"),
        (InstallationChange(locale="x" * 36), "locale"),
        (InstallationChange(app_version="1" * 33), "app_version"),
        (InstallationChange(subscriptions=("x" * 65,)), "subscriptions"),
        (InstallationChange(subscriptions=tuple(str(n) for n in range(65))), "subscriptions"),
        (InstallationChange(subscriptions=("a\0",)), "subscriptions"),
    ],
)
def test_a_field_outside_its_bounds_is_named(change: InstallationChange, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rules.check_installation(change)
    assert caught.value.field == field


def test_secrets_do_not_print() -> None:
    change = InstallationChange(push_token=PushToken("a secret token"))
    assert "secret" not in repr(change)
    assert repr(PushToken("a secret token")) == "PushToken(…)"


@pytest.mark.parametrize(
    ("block_all", "block_advertising", "expected"), [(False, False, None), (True, False, False), (True, True, False), (False, True, True)]
)
def test_a_block_is_told_as_wide_as_it_is(block_all: bool, block_advertising: bool, expected: bool | None) -> None:
    preference = Preference(SenderId(b"s" * 16), block_all, block_advertising, mute=False)
    closures = rules.closures_of_preference(preference, OWNER)
    told = [Closure(ClosureKind.BLOCK_SENDER, OWNER, sender_id=SenderId(b"s" * 16), advertising_only=bool(expected))]
    assert closures == ([] if expected is None else told)


def test_reasons_have_the_numbers_of_the_proto() -> None:
    for reason in Reason:
        name = f"REASON_CODE_{reason.name}"
        assert int(common_pb2.ReasonCode.Value(name)) == int(reason)


# --- resolving -------------------------------------------------------------------------------------------------------------


def row(n: int, **fields: Any) -> Row:
    values: dict[str, Any] = {
        "device_id": DEVICE,
        "subscriber_id": OWNER,
        "block_all": None,
        "block_advertising": None,
        "mute": None,
        "platform": 1,
        "is_active": True,
        "is_primary": False,
        "subscriptions": [],
        "push_allowed_by_os": True,
        "push_allowed_by_app": True,
        "has_token": True,
        "token_gone": False,
    }
    return Row(n=n, **{**values, **fields})


def query(kind: int = 1, **fields: Any) -> Query:
    return Query(kind, "", b"h" * 32, "app", b"s" * 16, **fields)


def test_nobody_known_is_answered_by_the_kind_of_the_recipient() -> None:
    assert rules.resolve([query(1), query(2), query(3)], []) == [
        Reason.CONSUMER_PHONE_NOT_FOUND,
        Reason.CONSUMER_ID_NOT_FOUND,
        Reason.CONSUMER_ID_NOT_FOUND,
    ]


@given(st.lists(st.integers(0, 3), max_size=20))
def test_results_come_in_the_order_of_the_queries(counts: list[int]) -> None:
    rows = [row(n, device_id=bytes([n]) + bytes(14) + bytes([one])) for n, count in enumerate(counts, 1) for one in range(count)]
    results = rules.resolve([query() for _ in counts], rows)
    for n, (count, result) in enumerate(zip(counts, results, strict=True), 1):
        if count == 0:
            assert result is Reason.CONSUMER_PHONE_NOT_FOUND
        else:
            assert isinstance(result, Resolved)
            assert [device.device_id[0] for device in result.devices] == [n] * count


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ({}, {"device_id": None}, Reason.NO_APPLICATION),
        ({}, {"is_active": False}, Reason.NO_ACTIVE_INSTALLATIONS),
        ({"platforms": (2,)}, {}, Reason.PLATFORM_NOT_FOUND),
        ({"primary_only": True}, {}, Reason.NO_PRIMARY_DEVICES),
        ({"subscriptions": ("a", "b")}, {"subscriptions": ["a"]}, Reason.SUBSCRIPTION_FAILED),
    ],
)
def test_what_is_missing_is_named(asked: dict[str, Any], stored: dict[str, Any], expected: Reason) -> None:
    assert rules.resolve([query(**asked)], [row(1, **stored)]) == [expected]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, Reason.UNSPECIFIED),
        ({"has_token": False}, Reason.NO_PUSH_TOKEN),
        ({"has_token": False, "token_gone": True}, Reason.TOKEN_GONE),
        ({"push_allowed_by_app": False, "has_token": False}, Reason.PUSH_DISABLED),
        ({"push_allowed_by_app": False, "has_token": False, "token_gone": True}, Reason.PUSH_DISABLED),
        ({"push_allowed_by_os": False, "push_allowed_by_app": False}, Reason.PUSH_OS_DISABLED),
    ],
)
def test_a_device_that_cannot_be_pushed_says_why(stored: dict[str, Any], expected: Reason) -> None:
    assert rules.resolve([query()], [row(1, **stored)]) == [Resolved(OWNER, [Target(DEVICE, 1, expected)], False, False, False)]


def test_decisions_about_the_sender_come_along() -> None:
    (resolved,) = rules.resolve([query()], [row(1, block_all=True, block_advertising=False, mute=True)])
    assert isinstance(resolved, Resolved)
    assert (resolved.block_all, resolved.block_advertising, resolved.mute) == (True, False, True)
