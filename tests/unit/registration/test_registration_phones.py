"""Phone numbers in one spelling."""

from __future__ import annotations

import phonenumbers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE

from sealpushd.registration import phones
from sealpushd.registration.codes import CODE_LENGTH, Code
from sealpushd.registration.phones import PhoneNumber, parse_phone

numbers = st.builds(
    lambda country, national: f"+{country}{national}",
    st.sampled_from(sorted(COUNTRY_CODE_TO_REGION_CODE)),
    st.text("0123456789", min_size=1, max_size=13),
)


def by_library(text: str) -> str | None:
    try:
        number = phonenumbers.parse(text)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_possible_number(number):
        return None
    e164 = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    # What reads as another number once it is written is none.
    return e164 if phonenumbers.parse(e164) == number else None


@given(numbers)
@example("+3800501234567")
@example("+390612345678")
@example("+78001234567")
@example("+541123456789")
@settings(max_examples=1000)
def test_the_fast_way_never_differs_from_the_library(text: str) -> None:
    parsed = parse_phone(text)
    assert (None if parsed is None else parsed.e164) == by_library(text)


@given(numbers)
@example("+200000000000")
@example("+3860000000")
def test_parsing_again_changes_nothing(text: str) -> None:
    parsed = parse_phone(text)
    if parsed is not None:
        assert parse_phone(parsed.e164) == parsed
        assert parse_phone(parsed.e164[1:]) == parsed


@pytest.mark.parametrize("text", ["+380501234567", "+79161234567", "+14155552671", "+447400123456", "+4915112345678", "+48512345678"])
def test_ordinary_mobile_numbers_take_the_fast_way(text: str) -> None:
    assert phones._is_canonical(text)


@pytest.mark.parametrize(
    "text", ["+380501234567", "380501234567", " +380 50 123-45-67 ", "+380 (50) 123 45 67", "+3800501234567", "＋380501234567"]
)
def test_one_number_has_one_spelling(text: str) -> None:
    parsed = parse_phone(text)
    assert parsed is not None
    assert parsed.e164 == "+380501234567"


@given(st.text(max_size=30))
def test_any_text_is_a_number_or_none(text: str) -> None:
    parsed = parse_phone(text)
    assert parsed is None or parsed.e164.startswith("+")


@pytest.mark.parametrize("text", ["", "+", "0501234567", "+380", "+99912345678", "+38050123456789012345678", "+380501234567 ext. 5"])
def test_what_is_no_international_number_is_none(text: str) -> None:
    assert parse_phone(text) is None


def test_numbers_and_codes_do_not_print() -> None:
    assert repr(PhoneNumber("+380501234567")) == "PhoneNumber(…)"
    assert repr(Code("123456")) == "Code(…)"


def test_codes_have_six_digits_and_speak_the_language_asked_for() -> None:
    codes = {Code.fresh().digits for _ in range(200)}
    assert all(len(code) == CODE_LENGTH and code.isdigit() for code in codes)
    assert len(codes) > 190
    code = Code("012345")
    assert code.text("Bank", "uk-UA") != code.text("Bank", "ru") != code.text("Bank", "en-GB")
    assert code.text("Bank", "xx") == code.text("Bank", "")
    assert all("012345" in code.text("Bank", locale) and "Bank" in code.text("Bank", locale) for locale in ("uk", "ru", "en", ""))
