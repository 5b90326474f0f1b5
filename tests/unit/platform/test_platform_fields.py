"""Values out of requests: what passes is held by datetime and PostgreSQL, what does not is refused by the name of its field."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sealpushd.fetch.wire import parse_closed, parse_credit, parse_key, parse_message, parse_report
from sealpushd.platform import fields
from sealpushd.platform.errors import InvalidRequest
from sealpushd.v1 import mailbox_pb2

ID = b"i" * 16
NOW_MS = 1_700_000_000_000


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
        ("credits.app_id", lambda: parse_credit(mailbox_pb2.LaneCredit(app_id="\0", credit=1))),
        ("credits.platform", lambda: parse_credit(mailbox_pb2.LaneCredit(app_id="a", platform=2**31 - 1))),  # type: ignore[arg-type]
        ("devices.reason_code", lambda: parse_closed(mailbox_pb2.ClosedDevice(device_id=ID, reason_code=2**31 - 1))),  # type: ignore[arg-type]
    ],
)
def test_what_the_mesh_sends_the_mailbox_is_refused_by_the_name_of_its_field(field: str, parse: Callable[[], Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse()
    assert caught.value.field == field
