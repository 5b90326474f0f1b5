"""sealpush.ids: UUIDv7 and their text."""

import threading
import time
import uuid
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import check_id, parse_uuid, uuid7, uuid7_ms, uuid_text


@given(st.integers(0, (1 << 48) - 1))
def test_uuid7_has_rfc_9562_version_variant_and_time(now_ms: int) -> None:
    made = uuid.UUID(bytes=uuid7(now_ms))
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert uuid7_ms(made.bytes) == now_ms


def test_ids_of_one_millisecond_rise() -> None:
    made = [uuid7(1_700_000_000_000) for _ in range(2000)]
    assert made == sorted(set(made))


def test_ids_by_the_clock_rise_over_threads_without_repeats() -> None:
    made: list[list[bytes]] = [[] for _ in range(4)]

    def work(mine: list[bytes]) -> None:
        mine.extend(uuid7() for _ in range(500))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({each for mine in made for each in mine}) == 2000


def test_a_clock_set_back_by_less_than_a_minute_does_not_set_ids_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid7()
    back_ns = (uuid7_ms(first) - 59_000) * 1_000_000
    monkeypatch.setattr("sealpush.ids.time.time_ns", lambda: back_ns)
    second = uuid7()
    assert second > first
    assert uuid7_ms(second) >= uuid7_ms(first)


@pytest.mark.parametrize("ahead", [timedelta(minutes=40), timedelta(days=3), timedelta(days=365)])
def test_ids_of_a_clock_that_was_ahead_carry_the_present_once_it_is_back(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """A message's id says in which partition it lies: one of next year lies in none."""
    now_ms = time.time_ns() // 1_000_000
    monkeypatch.setattr("sealpush.ids.time.time_ns", lambda: (now_ms + ahead // timedelta(milliseconds=1)) * 1_000_000)
    assert uuid7_ms(uuid7()) > now_ms
    monkeypatch.setattr("sealpush.ids.time.time_ns", lambda: now_ms * 1_000_000)
    assert uuid7_ms(uuid7()) == now_ms


@pytest.mark.parametrize("now_ms", [-1, 1 << 48])
def test_a_time_that_does_not_fit_is_refused(now_ms: int) -> None:
    with pytest.raises(ValueError, match="milliseconds"):
        uuid7(now_ms)


@given(st.binary(min_size=16, max_size=16))
def test_text_is_the_standard_form_and_parses_back(value: bytes) -> None:
    text = uuid_text(value)
    assert text == str(uuid.UUID(bytes=value))
    assert parse_uuid(text) == parse_uuid(text.upper()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "018f2f0e7c1a7d3b9a542f6f0d6c1b2a",
        "{018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2a}",
        "018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2a\n",
        "018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2",
        "018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2g",
        "018f2f0e-7c1a-7d3b-9a54-2f6f0d6c1b2٣",
    ],
)
def test_any_other_spelling_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="018f2f0e-7c1a"):
        parse_uuid(text)


def test_only_a_uuid7_carries_a_time() -> None:
    for value in (bytes(16), uuid.uuid4().bytes, b"short"):
        with pytest.raises(ValueError, match="UUIDv7"):
            uuid7_ms(value)


def test_wrong_length_is_refused_by_field_name() -> None:
    with pytest.raises(ValueError, match="device_id"):
        check_id(b"x" * 15, "device_id")
