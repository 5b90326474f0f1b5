"""Values out of requests, checked one way at every door: ids, texts, times, numbers, and batches of them.

A value is given back as the service's own type, or InvalidRequest names the field and the rule. What passes here is held by `datetime` and
by PostgreSQL: nothing that a caller sends is refused by either later, as if it were a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import ID_BYTES, AppId, is_app_id
from sealpushd.platform.batching import BATCH_ITEMS_MAX
from sealpushd.platform.clock import from_ms
from sealpushd.platform.errors import InvalidRequest

# PostgreSQL's bigint, and its smallint for enums.
I64_MAX: Final = 2**63 - 1
ENUM_MAX: Final = 2**15 - 1
# 9999-12-31 less a day: no time zone or allowance that is added makes another year of it.
MOMENT_MS_MAX: Final = 253_402_214_400_000
# Ten thousand years.
DURATION_S_MAX: Final = 315_576_000_000

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


def id16(value: bytes, field: str) -> bytes:
    """An id of 16 bytes."""
    if len(value) != ID_BYTES:
        raise InvalidRequest(f"{field} must be 16 bytes, not {len(value)}", field=field)
    return value


def optional_id16(value: bytes, field: str) -> bytes:
    """An id of 16 bytes, or nothing."""
    if value and len(value) != ID_BYTES:
        raise InvalidRequest(f"{field} must be empty or 16 bytes, not {len(value)}", field=field)
    return value


def octets(value: bytes, field: str, *sizes: int) -> bytes:
    """Bytes of one of these lengths."""
    if len(value) not in sizes:
        raise InvalidRequest(f"{field} must be {' or '.join(map(str, sizes))} bytes, not {len(value)}", field=field)
    return value


def octets_to(value: bytes, field: str, most: int) -> bytes:
    """Bytes up to a length."""
    if len(value) > most:
        raise InvalidRequest(f"{field} must be at most {most} bytes, not {len(value)}", field=field)
    return value


def text(value: str, field: str, characters_max: int, *, characters_min: int = 0) -> str:
    """A text within its length and without control characters: PostgreSQL holds no NUL, and no log or terminal wants the others."""
    if not characters_min <= len(value) <= characters_max:
        raise InvalidRequest(f"{field} must be {characters_min} to {characters_max} characters, not {len(value)}", field=field)
    if any(character < " " or "\x7f" <= character <= "\x9f" for character in value):
        raise InvalidRequest(f"{field} holds a control character", field=field)
    return value


def app_id(value: str, field: str = "app_id") -> AppId:
    """The id of an app."""
    if not is_app_id(value):
        raise InvalidRequest("an app id is 1 to 64 characters of a-z 0-9 - .", field=field)
    return AppId(value)


def moment(value: Timestamp, field: str) -> datetime:
    """A moment from 1970 to 9999."""
    if not 0 <= value.seconds <= MOMENT_MS_MAX // 1000 or not 0 <= value.nanos < 1_000_000_000:
        raise InvalidRequest(f"{field} must be a time of the years 1970 to 9999", field=field)
    return value.ToDatetime(UTC)


def moment_ms(value: int, field: str) -> datetime:
    """A moment from 1970 to 9999, given in milliseconds."""
    if not 0 <= value <= MOMENT_MS_MAX:
        raise InvalidRequest(f"{field} must be milliseconds since 1970, up to the year 9999", field=field)
    return from_ms(value)


def duration(value: Duration, field: str, most: timedelta | None = None, *, least: timedelta = timedelta(0)) -> timedelta:
    """How long something takes or lasts, within its bounds; without `most` up to ten thousand years either way."""
    try:
        # As duration.proto bounds it; not every implementation does.
        if abs(value.seconds) > DURATION_S_MAX:
            raise ValueError("too long")
        parsed = value.ToTimedelta()
    except (ValueError, OverflowError) as e:
        raise InvalidRequest(f"{field} must be a duration within ten thousand years", field=field) from e
    if most is not None and not least <= parsed <= most:
        raise InvalidRequest(f"{field} must be {_in_words(least)} to {_in_words(most)}", field=field)
    return parsed


def _in_words(length: timedelta) -> str:
    return f"{length.days} days" if length.days and not length.seconds else f"{length.total_seconds():g} s"


def number(value: int, field: str, most: int, *, least: int = 0) -> int:
    """A number within its bounds."""
    if not least <= value <= most:
        raise InvalidRequest(f"{field} must be {least} to {most}, not {value}", field=field)
    return value


def enum(value: int, field: str, known: Collection[int] | None = None) -> int:
    """A value of an enum that this version knows; without `known` any that can be kept, because a service of the next release may name one
    that this release only hands on."""
    number(value, field, ENUM_MAX)
    if known is not None and value not in known:
        raise InvalidRequest(f"{field} {value} is unknown to this version", field=field)
    return value


def bounded(items: Sequence[Item], field: str, most: int = BATCH_ITEMS_MAX, *, least: int = 0) -> Sequence[Item]:
    """As many items as a call may have."""
    if len(items) < least:
        raise InvalidRequest(f"give {least} to {most} {field}", field=field)
    if len(items) > most:
        raise InvalidRequest(f"at most {most} {field} a call, not {len(items)}; split the request", field=field)
    return items


def each(items: Sequence[Item], field: str, parse: Callable[[Item], Parsed], most: int = BATCH_ITEMS_MAX) -> list[Parsed]:
    """Every item of a batch; the first that is wrong refuses it, by its place: `keys[3].request_id`."""
    parsed = []
    for place, outcome in enumerate(each_alone(items, field, parse, most)):
        if isinstance(outcome, InvalidRequest):
            where = f"{field}[{place}]"
            raise InvalidRequest(f"{where}: {outcome.message}", field=f"{where}.{outcome.field}" if outcome.field else where)
        parsed.append(outcome)
    return parsed


def each_alone(
    items: Sequence[Item], field: str, parse: Callable[[Item], Parsed], most: int = BATCH_ITEMS_MAX
) -> list[Parsed | InvalidRequest]:
    """Every item of a batch, or what is wrong with it."""
    return [_outcome(item, parse) for item in bounded(items, field, most)]


def ids(values: Sequence[bytes], field: str, most: int = BATCH_ITEMS_MAX, *, least: int = 0) -> list[bytes]:
    """Ids of 16 bytes each; one that is wrong is named by its place."""
    bounded(values, field, most, least=least)
    return [id16(value, f"{field}[{place}]") for place, value in enumerate(values)]


def _outcome(item: Item, parse: Callable[[Item], Parsed]) -> Parsed | InvalidRequest:
    try:
        return parse(item)
    except InvalidRequest as e:
        return e
