"""Values out of requests: what passes is held by datetime and PostgreSQL, what does not is refused by the name of its field."""

import unicodedata
from collections.abc import Callable
from datetime import UTC, timedelta
from typing import Any, TypeVar

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.fetch.wire import parse_closed, parse_credit, parse_key, parse_message, parse_report
from sealpushd.platform import fields
from sealpushd.platform.clock import to_ms
from sealpushd.platform.errors import InvalidRequest
from sealpushd.v1 import mailbox_pb2

ID = b"i" * 16
NOW_MS = 1_700_000_000_000
Parsed = TypeVar("Parsed")


@pytest.mark.parametrize(
    "refused",
    [
        lambda: fields.id16(bytes(15), "f"),
        lambda: fields.optional_id16(b"x", "f"),
        lambda: fields.octets(bytes(31), "f", 0, 32),
        lambda: fields.text("a\0b", "f", 10),
        lambda: fields.text("\x1b[31m", "f", 10),
        lambda: fields.text("\x9b31m", "f", 10),
        lambda: fields.text("", "f", 10, characters_min=1),
        lambda: fields.text("a" * 11, "f", 10),
        lambda: fields.moment(Timestamp(seconds=253_402_300_800), "f"),
        lambda: fields.moment(Timestamp(seconds=-1), "f"),
        lambda: fields.moment(Timestamp(seconds=1, nanos=-1), "f"),
        lambda: fields.moment(Timestamp(seconds=1, nanos=2**31 - 1), "f"),
        lambda: fields.moment_ms(2**63 - 1, "f"),
        lambda: fields.moment_ms(2**64 - 1, "f"),
        lambda: fields.number(2**63, "f", fields.I64_MAX),
        lambda: fields.enum(2**31 - 1, "f"),
        lambda: fields.enum(-1, "f"),
        lambda: fields.enum(7, "f", {1, 2}),
    ],
)
def test_what_nothing_holds_is_refused_by_the_name_of_its_field(refused: Callable[[], Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refused()
    assert caught.value.field == "f"


def test_what_passes_comes_back() -> None:
    assert fields.id16(ID, "f") == ID
    assert fields.optional_id16(b"", "f") == b""
    assert fields.text("Банк", "f", 4) == "Банк"
    assert fields.moment(Timestamp(seconds=fields.MOMENT_MS_MAX // 1000), "f").year == 9999
    assert fields.moment_ms(fields.MOMENT_MS_MAX, "f").year == 9999
    assert fields.enum(99, "f") == 99, "of a newer service"


def message(**changed: Any) -> mailbox_pb2.NewMessage:
    made = mailbox_pb2.NewMessage(
        key=mailbox_pb2.AcceptedKey(sender_id=ID, request_id="r", request_mac=bytes(32)),
        message_id=ID,
        subscriber_id=ID,
        content_id=ID,
        created_at_ms=NOW_MS,
        expires_at_ms=NOW_MS + 1000,
        deliveries=[mailbox_pb2.NewDelivery(device_id=ID)],
    )
    made.MergeFrom(mailbox_pb2.NewMessage(**changed))
    return made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("created_at_ms", 2**63 - 1),
        ("expires_at_ms", 2**64 - 1),
        ("app_id", "a\0"),
        ("tag", "\0"),
        ("originator_requested", "\0"),
        ("originator_effective", "a" * 33),
        ("leg_no", 2**32 - 1),
        ("order_id", b"x"),
        ("group_id", bytes(17)),
        ("replace_hash", b"x"),
        ("content_class", 2**31 - 1),
        ("priority", -1),
        ("channel", 2**31 - 1),
        ("traffic_type", 2**31 - 1),
        ("blocked", 2**31 - 1),
    ],
)
def test_a_message_that_no_row_holds_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    assert parse_message(message()).message_id == ID
    with pytest.raises(InvalidRequest) as caught:
        parse_message(message(**{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "parse"),
    [
        ("request_id", lambda: parse_key(mailbox_pb2.AcceptedKey(sender_id=ID, request_id="a\0", request_mac=bytes(32)))),
        ("fence", lambda: parse_report(mailbox_pb2.WakeUpReport(message_id=ID, device_id=ID, fence=2**64 - 1, outcome=1))),  # type: ignore[arg-type]
        ("app_id", lambda: parse_credit(mailbox_pb2.LaneCredit(app_id="\0", credit=1))),
        ("platform", lambda: parse_credit(mailbox_pb2.LaneCredit(app_id="a", platform=2**31 - 1))),  # type: ignore[arg-type]
        ("reason_code", lambda: parse_closed(mailbox_pb2.ClosedDevice(device_id=ID, reason_code=2**31 - 1))),  # type: ignore[arg-type]
    ],
)
def test_what_the_mesh_sends_the_mailbox_is_refused_by_the_name_of_its_field(field: str, parse: Callable[[], Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse()
    assert caught.value.field == field


FAR = st.integers(-(2**63), 2**63 - 1)
# What protobuf can carry in a text: no lone surrogates.
TEXTS = st.text(st.characters(codec="utf-8"))


def passes(parse: Callable[[], Parsed]) -> Parsed | None:
    """What was parsed; None: refused by the name of its field, and by nothing else."""
    try:
        return parse()
    except InvalidRequest as e:
        assert e.field == "f"  # noqa: PT017 - of what may pass as well
        return None


@given(FAR, st.integers(-(2**31), 2**31 - 1))
def test_a_moment_that_passes_is_one_and_survives_an_allowance(seconds: int, nanos: int) -> None:
    value = Timestamp()
    value.seconds, value.nanos = seconds, nanos
    parsed = passes(lambda: fields.moment(value, "f"))
    is_moment = 0 <= seconds <= fields.MOMENT_MS_MAX // 1000 and 0 <= nanos < 10**9
    assert (parsed is not None) == is_moment
    if parsed is not None:
        assert parsed.tzinfo is UTC
        assert int(parsed.timestamp()) == seconds
        assert (parsed + timedelta(hours=14)).year <= 9999


@given(st.integers(0, 2**64 - 1) | st.integers(0, fields.MOMENT_MS_MAX))
def test_milliseconds_that_pass_are_a_moment(value: int) -> None:
    parsed = passes(lambda: fields.moment_ms(value, "f"))
    assert (parsed is not None) == (value <= fields.MOMENT_MS_MAX)
    if parsed is not None:
        assert to_ms(parsed) == value


@given(FAR | st.integers(-400_000_000_000, 400_000_000_000), st.integers(-(2**31), 2**31 - 1))
def test_a_duration_that_passes_is_one_and_lies_within_its_bounds(seconds: int, nanos: int) -> None:
    value = Duration()
    value.seconds, value.nanos = seconds, nanos
    parsed = passes(lambda: fields.duration(value, "f"))
    within = passes(lambda: fields.duration(value, "f", timedelta(days=28), least=timedelta(seconds=1)))
    assert within is None or timedelta(seconds=1) <= within <= timedelta(days=28)
    if parsed is not None:
        assert abs(parsed) <= timedelta(seconds=fields.DURATION_S_MAX + 1)
        assert (within is not None) == (timedelta(seconds=1) <= parsed <= timedelta(days=28))


@given(TEXTS, st.integers(0, 20))
def test_a_text_that_passes_has_its_length_and_no_control_character(value: str, most: int) -> None:
    parsed = passes(lambda: fields.text(value, "f", most))
    controls = [each for each in value if unicodedata.category(each) == "Cc"]
    assert (parsed is not None) == (len(value) <= most and not controls)
    assert parsed in (None, value)


@given(st.integers(-(2**31), 2**31 - 1), st.none() | st.sets(st.integers(0, 5)))
def test_an_enum_that_passes_fits_its_column_and_is_known_where_that_counts(value: int, known: set[int] | None) -> None:
    parsed = passes(lambda: fields.enum(value, "f", known))
    assert (parsed is not None) == (0 <= value <= 2**15 - 1 and (known is None or value in known))


@given(st.lists(st.binary(min_size=15, max_size=17), max_size=6), st.integers(0, 6))
def test_of_a_batch_the_first_item_that_is_wrong_is_named_by_its_place(values: list[bytes], most: int) -> None:
    wrong = [n for n, value in enumerate(values) if len(value) != 16]
    parsers: tuple[Callable[[], list[bytes]], ...] = (
        lambda: fields.ids(values, "f", most),
        lambda: fields.each(values, "f", lambda value: fields.id16(value, "id"), most),
    )
    for parse in parsers:
        if len(values) > most or wrong:
            with pytest.raises(InvalidRequest) as caught:
                parse()
            assert caught.value.field is not None
            assert caught.value.field.removesuffix(".id") == ("f" if len(values) > most else f"f[{wrong[0]}]")
        else:
            assert parse() == values
    if len(values) <= most:
        alone = fields.each_alone(values, "f", lambda value: fields.id16(value, "id"), most)
        assert [n for n, each in enumerate(alone) if isinstance(each, InvalidRequest)] == wrong
