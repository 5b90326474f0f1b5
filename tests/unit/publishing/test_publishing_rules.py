"""What a request must be: every bound, at it and beyond."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from sealpush.envelope import CONTENT_BYTES_MAX, FLAG_SERVER_SEALED, TAIL_BYTES_MIN, Envelope, Header, seal
from sealpush.envelope import Recipient as EnvelopeRecipient
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, uuid7
from sealpush.keys import DAY_MS, ContentSigningKey, EntryKey, EntryRole, IdentityKey, PrekeyKind, SenderEntry, SenderMode, generate_prekey
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.v1 import common_pb2, content_pb2, publish_pb2
from sealpushd.platform.clock import from_ms, to_ms
from sealpushd.platform.errors import FailedPrecondition, InvalidRequest, PermissionDenied, ServiceError
from sealpushd.publishing import rules
from sealpushd.publishing.rules import Standing, Wait, assume, blocked_reason, check_request_id, check_standing, parse_publish, parse_wait

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SENDER = SenderId(b"s" * 16)
APPS = ("bank", "shop")
KEY = ContentSigningKey.generate()
ENTRY = SenderEntry(
    SENDER,
    "Банк",
    SenderMode.END_TO_END | SenderMode.SERVER,
    (EntryKey(KEY.public_key, to_ms(NOW) - DAY_MS, to_ms(NOW) + DAY_MS),),
    to_ms(NOW) - DAY_MS,
    to_ms(NOW) + DAY_MS,
    1,
)
PLATFORM = dataclasses.replace(ENTRY, sender_id=SenderId(b"P" * 16), modes=SenderMode.SERVER, role=EntryRole.PLATFORM)


def request(**fields: Any) -> publish_pb2.PublishRequest:
    made = publish_pb2.PublishRequest(
        request_id="r",
        recipient=common_pb2.Recipient(phone="+380501234567"),
        content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        plain=content_pb2.Content(body="text"),
    )
    for name, value in fields.items():
        field = getattr(made, name)
        if hasattr(field, "CopyFrom"):
            field.CopyFrom(value)
        elif hasattr(field, "extend"):
            field.extend(value)
        else:
            setattr(made, name, value)
    return made


def parse(made: publish_pb2.PublishRequest, now: datetime = NOW) -> rules.Publication:
    return parse_publish(made, SENDER, APPS, now)


def refused(made: publish_pb2.PublishRequest, field: str, now: datetime = NOW) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(made, now)
    assert caught.value.field == field


def with_content(**fields: Any) -> publish_pb2.PublishRequest:
    return request(plain=content_pb2.Content(**{"body": "text", **fields}))


def lifetime(seconds: float) -> Duration:
    made = Duration()
    made.FromTimedelta(timedelta(seconds=seconds))
    return made


# Request ids


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64))
def test_printable_ascii_is_a_request_id(text: str) -> None:
    check_request_id(text)


@pytest.mark.parametrize("text", ["", "a" * 65, "has space", "new\n", "nul\0", "ключ", "\x7f"])
def test_anything_else_is_no_request_id(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request_id(text)
    assert caught.value.field == "request_id"


# Fields of a request


def test_a_plain_request_is_read_with_its_defaults() -> None:
    publication = parse(request())
    assert publication.app_id == "bank"
    assert publication.expires_at == NOW + timedelta(days=14)
    content = content_pb2.Content.FromString(publication.plain or b"")
    assert (content.version, content.content_class, content.body) == (1, common_pb2.CONTENT_CLASS_INFORMATIONAL, "text")


def test_an_app_that_is_not_the_senders_is_forbidden() -> None:
    assert parse(request(app_id="shop")).app_id == "shop"
    with pytest.raises(PermissionDenied, match="'other'"):
        parse(request(app_id="other"))
    with pytest.raises(PermissionDenied, match="any app"):
        parse_publish(request(), SENDER, (), NOW)


@pytest.mark.parametrize(("field", "most"), [("replace_key", 64), ("tag", 50), ("originator", 32)])
def test_a_text_may_be_as_long_as_the_proto_says_in_characters(field: str, most: int) -> None:
    parse(request(**{field: "я" * most}))
    refused(request(**{field: "я" * (most + 1)}), field)


@pytest.mark.parametrize("field", ["replace_key", "tag", "originator"])
@pytest.mark.parametrize("character", ["\0", "\n", "\x1f", "\x7f"])
def test_a_text_that_a_database_or_a_log_cannot_hold_is_refused(field: str, character: str) -> None:
    refused(request(**{field: f"a{character}b"}), field)


@pytest.mark.parametrize("field", ["order_id", "group_id"])
def test_an_id_is_16_bytes_or_absent(field: str) -> None:
    parse(request(**{field: bytes(16)}))
    for wrong in (bytes(15), bytes(17)):
        refused(request(**{field: wrong}), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("content_class", 0),
        ("content_class", 3),
        ("priority", 4),
        ("priority", -1),
        ("channel", 99),
        ("channel", common_pb2.CHANNEL_SMS),
        ("traffic_type", 7),
    ],
)
def test_a_number_that_is_no_value_of_its_enum_is_refused(field: str, value: int) -> None:
    refused(request(**{field: value}), field)


def test_platforms_are_known_ones() -> None:
    parse(request(platforms=[common_pb2.PLATFORM_IOS, common_pb2.PLATFORM_WEB]))
    for value in (0, 6):
        refused(request(platforms=[value]), "platforms")


def test_subscriptions_are_bounded_in_number_and_length() -> None:
    parse(request(subscriptions=["я" * 64] * 16))
    for wrong in (["a"] * 17, ["a" * 65], ["a\0b"]):
        refused(request(subscriptions=wrong), "subscriptions")


def test_legs_are_bounded() -> None:
    parse(request(leg_no=100))
    refused(request(leg_no=101), "leg_no")


def test_a_request_without_recipient_or_content_is_refused() -> None:
    made = request()
    made.ClearField("recipient")
    refused(made, "recipient")
    made = request()
    made.ClearField("plain")
    refused(made, "content")


@pytest.mark.parametrize(
    ("seconds", "right"),
    [(1, True), (0.999, False), (0, False), (-1, False), (28 * 86_400, True), (28 * 86_400 + 0.001, False), (1e13, False)],
)
def test_a_lifetime_is_one_second_to_28_days(seconds: float, right: bool) -> None:
    made = request()
    made.lifetime.seconds = int(seconds // 1)
    made.lifetime.nanos = int(seconds % 1 * 1e9)
    if right:
        assert parse(made).expires_at == NOW + timedelta(seconds=seconds)
    else:
        refused(made, "lifetime")


@pytest.mark.parametrize(("seconds", "right"), [(1, True), (0, False), (-1, False), (365 * 86_400, True), (365 * 86_400 + 1, False)])
def test_how_long_devices_must_have_been_there_is_one_second_to_a_year(seconds: int, right: bool) -> None:
    assert parse(request()).added_until is None
    for made in (request(), sealed(envelope())):
        made.identity_unchanged_for.seconds = seconds
        if right:
            assert parse(made).added_until == NOW - timedelta(seconds=seconds)
        else:
            refused(made, "identity_unchanged_for")


def test_who_is_asked_for_unchanged_devices_does_not_choose_by_what_devices_say_of_themselves() -> None:
    for made in (request(primary_only=True), request(subscriptions=["codes"])):
        assert parse(made).added_until is None
        made.identity_unchanged_for.seconds = 1
        refused(made, "identity_unchanged_for")
    made = request(platforms=[common_pb2.PLATFORM_IOS])
    made.identity_unchanged_for.seconds = 1
    assert parse(made).added_until == NOW - timedelta(seconds=1)


# Plain contents


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("title", 256),
        ("deep_link", 2048),
        ("action_type", 64),
        ("resource_id", 128),
        ("short_text", 512),
        ("template_type", 64),
    ],
)
def test_a_text_of_the_content_may_be_as_long_as_the_proto_says(field: str, most: int) -> None:
    parse(with_content(**{field: "я" * most}))
    refused(with_content(**{field: "я" * (most + 1)}), f"plain.{field}")


@pytest.mark.parametrize("field", ["image_url", "content_url"])
def test_an_address_is_https_and_bounded(field: str) -> None:
    prefix = "https://host/"
    parse(with_content(**{field: prefix + "a" * (2048 - len(prefix))}))
    for wrong in (prefix + "a" * (2049 - len(prefix)), "http://host/", "javascript:alert(1)", " https://host"):
        refused(with_content(**{field: wrong}), f"plain.{field}")


def test_a_custom_payload_is_bounded_in_bytes() -> None:
    parse(with_content(custom_payload='{"":"' + "я" * 8_188 + '"}'))
    refused(with_content(custom_payload='{"":"' + "я" * 8_189 + '"}'), "plain.custom_payload")
    refused(with_content(custom_payload="я"), "plain.custom_payload")


def test_actions_are_bounded() -> None:
    good = content_pb2.Action(title="t" * 64, action="a" * 64, options="o" * 2048)
    parse(with_content(actions=[good] * 3))
    refused(with_content(actions=[good] * 4), "plain.actions")
    for wrong in ({"title": "t" * 65}, {"action": "a" * 65}, {"options": "o" * 2049}):
        refused(with_content(actions=[content_pb2.Action(**wrong)]), "plain.actions")


def test_a_content_with_nothing_to_show_is_refused() -> None:
    refused(with_content(body=""), "plain.body")
    for field in ("title", "short_text"):
        parse(with_content(body="", **{field: "x"}))
    parse(with_content(body="", content_url="https://host/"))


def test_a_content_is_as_large_as_an_envelope_holds() -> None:
    around = len(parse(with_content(body="x" * 60_000)).plain or b"") - 60_000
    parse(with_content(body="x" * (CONTENT_BYTES_MAX - around)))
    refused(with_content(body="x" * (CONTENT_BYTES_MAX - around + 1)), "plain")


def test_a_content_agrees_with_its_request() -> None:
    refused(with_content(version=2), "plain.version")
    refused(with_content(content_class=common_pb2.CONTENT_CLASS_ADVERTISING), "plain.content_class")
    refused(with_content(replace_key="other"), "plain.replace_key")
    made = with_content(replace_key="k")
    made.replace_key = "k"
    assert content_pb2.Content.FromString(parse(made).plain or b"").replace_key == "k"


# Sealed contents


def envelope(
    *,
    created_ms: int = to_ms(NOW),
    lives_ms: int = 3_600_000,
    sender_id: SenderId = SENDER,
    key: ContentSigningKey = KEY,
    flags: int = 0,
    devices: int = 1,
    content: bytes = b"content",
    suite: int = SUITE_X25519,
) -> Envelope:
    header = Header(ContentId(uuid7()), sender_id, key.key_id, RecipientRef(bytes(32)), created_ms, created_ms + lives_ms, flags)
    identity = IdentityKey.generate()
    recipients = []
    for n in range(devices):
        device_id = DeviceId(n.to_bytes(16, "big"))
        _, prekey = generate_prekey(identity, device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=created_ms, suite=suite)
        recipients.append(EnvelopeRecipient.of(device_id, prekey))
    return seal(content, header, recipients, key)


def sealed(made: Envelope | bytes, **fields: Any) -> publish_pb2.PublishRequest:
    data = made if isinstance(made, bytes) else made.encode()
    return request(sealed=publish_pb2.SealedContent(envelope=data), **fields)


def test_a_sealed_message_takes_its_times_from_the_envelope() -> None:
    made = envelope(created_ms=to_ms(NOW) - 60_000)
    publication = parse(sealed(made))
    assert publication.plain is None
    assert publication.envelope == made
    assert (publication.created_at, publication.expires_at) == (NOW - timedelta(minutes=1), NOW + timedelta(minutes=59))


@pytest.mark.parametrize("skew_ms", [-300_001, 300_001])
def test_an_envelope_made_more_than_five_minutes_away_is_refused(skew_ms: int) -> None:
    parse(sealed(envelope(created_ms=to_ms(NOW) + skew_ms // 300_001 * 300_000)))
    refused(sealed(envelope(created_ms=to_ms(NOW) + skew_ms)), "sealed.envelope")


def test_an_envelope_that_has_expired_or_lives_too_short_is_refused() -> None:
    refused(sealed(envelope(created_ms=to_ms(NOW) - 60_000, lives_ms=60_000)), "sealed.envelope")
    refused(sealed(envelope(lives_ms=999)), "sealed.envelope")
    parse(sealed(envelope(lives_ms=1_000)))


@pytest.mark.parametrize(("seconds", "right"), [(3_599, True), (3_601, True), (3_598.9, False), (3_601.1, False)])
def test_a_lifetime_beside_an_envelope_agrees_with_it(seconds: float, right: bool) -> None:
    made = sealed(envelope(), lifetime=lifetime(seconds))
    if right:
        parse(made)
    else:
        refused(made, "lifetime")


def test_an_envelope_of_another_sender_or_of_the_server_is_refused() -> None:
    refused(sealed(envelope(sender_id=SenderId(b"o" * 16))), "sealed.envelope")
    refused(sealed(envelope(flags=FLAG_SERVER_SEALED)), "sealed.envelope")


@given(st.binary(max_size=1_000))
def test_bytes_that_are_no_envelope_are_refused(data: bytes) -> None:
    refused(sealed(data), "sealed.envelope")


def test_an_envelope_is_at_most_160_kib_which_holds_the_largest_content_for_64_hybrid_devices() -> None:
    parse(sealed(envelope(devices=64, content=b"x" * CONTENT_BYTES_MAX, suite=SUITE_HYBRID)))
    large = envelope(devices=81, content=b"x" * CONTENT_BYTES_MAX, suite=SUITE_HYBRID)
    assert len(large.encode()) > rules.SEALED_BYTES_MAX
    refused(sealed(large), "sealed.envelope")


# What the root says of the sender


def check(made: publish_pb2.PublishRequest, entry: SenderEntry = ENTRY, now: datetime = NOW) -> None:
    check_standing(parse(made, now), Standing(entry, platform=PLATFORM), now)


def test_an_entry_allows_what_its_modes_say() -> None:
    check(request())
    check(sealed(envelope()))
    with pytest.raises(FailedPrecondition, match="end-to-end only"):
        check(request(), dataclasses.replace(ENTRY, modes=SenderMode.END_TO_END))
    with pytest.raises(FailedPrecondition, match="lets only the server seal"):
        check(sealed(envelope()), dataclasses.replace(ENTRY, modes=SenderMode.SERVER))


@pytest.mark.parametrize(
    ("at_ms", "wrong"),
    [
        (ENTRY.not_before_ms - 1, "not in force before"),
        (ENTRY.not_before_ms, ""),
        (ENTRY.not_after_ms - 1, ""),
        (ENTRY.not_after_ms, "has ended"),
    ],
)
def test_an_entry_out_of_its_time_allows_nothing(at_ms: int, wrong: str) -> None:
    if not wrong:
        check(request(), now=from_ms(at_ms))
    else:
        with pytest.raises(FailedPrecondition, match=wrong):
            check(request(), now=from_ms(at_ms))


def test_a_signature_by_a_key_that_the_entry_does_not_list_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not signed by a key"):
        check(sealed(envelope(key=ContentSigningKey.generate())))


@given(st.integers(min_value=0), st.integers(1, 255))
def test_an_envelope_with_any_byte_of_its_content_changed_is_refused(position: int, change: int) -> None:
    made = bytearray(envelope().encode())
    # Behind the stanzas: content and signature.
    start = len(made) - TAIL_BYTES_MIN
    made[start + position % TAIL_BYTES_MIN] ^= change
    with pytest.raises(ServiceError) as caught:
        check(sealed(bytes(made)))
    assert caught.value.field == "sealed.envelope"


# What follows


@pytest.mark.parametrize(
    ("content_class", "block_all", "block_advertising", "reason"),
    [
        (1, False, False, 0),
        (1, False, True, 0),
        (2, False, True, common_pb2.REASON_CODE_ADVERTISING_BLOCKED),
        (2, True, True, common_pb2.REASON_CODE_SENDER_BLOCKED),
        (1, True, False, common_pb2.REASON_CODE_SENDER_BLOCKED),
    ],
)
def test_a_block_applies_to_what_it_names(content_class: int, block_all: bool, block_advertising: bool, reason: int) -> None:
    assert blocked_reason(content_class, block_all=block_all, block_advertising=block_advertising) == reason


def test_the_traffic_type_follows_from_the_class_where_it_is_not_given() -> None:
    assert rules.traffic_type(request()) == common_pb2.TRAFFIC_TYPE_INFORMATIONAL
    assert rules.traffic_type(request(content_class=2)) == common_pb2.TRAFFIC_TYPE_ADVERTISING
    assert rules.traffic_type(request(traffic_type=5)) == common_pb2.TRAFFIC_TYPE_AUTHORIZATION


def wait(change: Callable[[Duration], None] | None) -> tuple[Wait, timedelta]:
    made = publish_pb2.GetStatusRequest()
    if change is not None:
        made.wait.SetInParent()
        change(made.wait)
    return parse_wait(made)


def test_an_absent_interval_is_the_true_state_and_a_present_0_the_assumed_one() -> None:
    assert wait(None) == (Wait.TRUE_STATE, timedelta())
    assert wait(lambda duration: None) == (Wait.ASSUMED, timedelta())
    assert wait(lambda duration: duration.FromSeconds(8)) == (Wait.UP_TO, timedelta(seconds=8))
    for wrong in (-1, 9, 2**60):
        with pytest.raises(InvalidRequest) as caught:
            wait(lambda duration, wrong=wrong: setattr(duration, "seconds", wrong))  # type: ignore[misc]  # a default argument
        assert caught.value.field == "wait"


@pytest.mark.parametrize("state", [value for value in common_pb2.State.values() if value])
def test_the_assumed_state_is_delivered_unless_the_app_is_gone_or_the_sender_took_it_back(state: int) -> None:
    status = publish_pb2.MessageStatus(message_id=bytes(16), state=common_pb2.State.ValueType(state))
    told = assume(status)
    if state in (common_pb2.STATE_CANCELLED, common_pb2.STATE_REPLACED):
        assert told == status
    else:
        assert told.state == common_pb2.STATE_DELIVERED
        assert told.assumed == (state != common_pb2.STATE_DELIVERED)
    for reason in (common_pb2.REASON_CODE_UNREGISTERED, common_pb2.REASON_CODE_NO_APPLICATION):
        status.reason_code = reason
        assert assume(status) == status


@pytest.mark.parametrize("kind", ["phone", "rnokpp", "external_user_id"])
def test_a_recipient_longer_than_any_identifier_is_refused(kind: str) -> None:
    at_bound = common_pb2.Recipient(**{kind: "1" * (rules.RECIPIENT_BYTES_MAX - 3)})
    assert at_bound.ByteSize() == rules.RECIPIENT_BYTES_MAX
    parse(request(recipient=at_bound))
    with pytest.raises(InvalidRequest) as caught:
        parse(request(recipient=common_pb2.Recipient(**{kind: "1" * rules.RECIPIENT_BYTES_MAX})))
    assert caught.value.field == "recipient"


def test_what_a_recipient_hides_in_unknown_fields_counts() -> None:
    hidden = common_pb2.Recipient.FromString(b"\xfa\x07\xd0\x0f" + bytes(2000))  # field 127, 2,000 bytes
    hidden.phone = "+380501234567"
    with pytest.raises(InvalidRequest) as caught:
        parse(request(recipient=hidden))
    assert caught.value.field == "recipient"


def test_platforms_are_bounded_before_each_is_looked_at() -> None:
    parse(request(platforms=[common_pb2.PLATFORM_IOS] * rules.PLATFORMS_MAX))
    with pytest.raises(InvalidRequest) as caught:
        parse(request(platforms=[common_pb2.PLATFORM_IOS] * (rules.PLATFORMS_MAX + 1)))
    assert caught.value.field == "platforms"


def test_an_app_id_that_is_too_long_is_not_repeated_in_the_refusal() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(request(app_id="a" * 100_000))
    assert len(caught.value.message) < 200
