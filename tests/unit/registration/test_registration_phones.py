"""Phone numbers in one spelling."""

from __future__ import annotations

import random

import phonenumbers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE

from sealpushd.registration import phones
from sealpushd.registration.codes import CODE_LENGTH, Code
from sealpushd.registration.phones import Numbers, PhoneNumber, parse_phone
from sealpushd.registration.renumbering import RULES, present_form

E164 = phonenumbers.PhoneNumberFormat.E164

numbers = st.builds(
    lambda country, national: f"+{country}{national}",
    st.sampled_from(sorted(COUNTRY_CODE_TO_REGION_CODE)),
    st.text("0123456789", min_size=1, max_size=13),
)


_EXAMPLES = [
    str(given_number.country_code) + phonenumbers.national_significant_number(given_number)
    for region in sorted(phonenumbers.SUPPORTED_REGIONS)
    for kind in (phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.TOLL_FREE)
    if (given_number := phonenumbers.example_number_for_type(region, kind)) is not None
]
# Numbers beside the library's examples: often valid, unlike what is drawn at random.
valid_numbers = st.builds(
    lambda example, tail: f"+{example[: len(example) - len(tail)]}{tail}",
    st.sampled_from(_EXAMPLES),
    st.text("0123456789", max_size=5),
)


def by_library(text: str) -> str | None:
    """The long way, by nothing but the library and the table of what changed."""
    try:
        number = phonenumbers.parse(text)
    except phonenumbers.NumberParseException:
        return None
    country, national = str(number.country_code), phonenumbers.national_significant_number(number)
    e164 = f"+{country}{present_form(country, national) or national}"
    present = phonenumbers.parse(e164)
    # What reads as another number once it is written is none.
    return e164 if phonenumbers.is_valid_number(present) and phonenumbers.format_number(present, E164) == e164 else None


@given(numbers | valid_numbers)
@example("+3800501234567")
@example("+390612345678")
@example("+78001234567")
@example("+541123456789")
@example("+77011234567")
@settings(max_examples=2000)
def test_the_fast_way_never_differs_from_the_library(text: str) -> None:
    parsed = parse_phone(text)
    assert (None if parsed is None else parsed.e164) == by_library(text)


@given(valid_numbers)
@example("+200000000000")
@example("+3860000000")
@settings(max_examples=500)
def test_parsing_again_changes_nothing(text: str) -> None:
    parsed = parse_phone(text)
    if parsed is not None:
        assert parse_phone(parsed.e164) == parsed


@pytest.mark.parametrize("text", ["+380501234567", "+79161234567", "+14155552671", "+447400123456", "+4915112345678", "+48512345678"])
def test_ordinary_mobile_numbers_take_the_fast_way(text: str) -> None:
    assert phones._is_canonical(text)


@pytest.mark.parametrize(
    "text",
    [
        "+380501234567",
        " +380 50 123-45-67 ",
        "+380 (50) 123 45 67",
        "+380 [50] 123.45/67",
        "+3800501234567",
        "\N{FULLWIDTH PLUS SIGN}380501234567",
        "\N{LEFT-TO-RIGHT EMBEDDING}+380501234567\N{POP DIRECTIONAL FORMATTING}",
        "+380\N{NO-BREAK SPACE}50\N{ZERO WIDTH SPACE}123\N{EN DASH}45\N{NON-BREAKING HYPHEN}67",
        "+" + "380501234567".translate({ord("0") + d: chr(0x0660 + d) for d in range(10)}),
    ],
)
def test_one_number_has_one_spelling(text: str) -> None:
    parsed = parse_phone(text)
    assert parsed is not None
    assert parsed.e164 == "+380501234567"


@pytest.mark.parametrize("text", ["380501234567", "0501234567", "00380501234567", "79161234567"])
def test_without_a_plus_a_number_is_nobodys(text: str) -> None:
    assert parse_phone(text) is None


@pytest.mark.parametrize(
    ("text", "country", "e164"),
    [
        ("0501234567", "UA", "+380501234567"),
        ("501234567", "UA", "+380501234567"),
        ("380501234567", "UA", "+380501234567"),
        ("89161234567", "RU", "+79161234567"),
        ("79161234567", "RU", "+79161234567"),
        ("00380501234567", "DE", "+380501234567"),
        ("+4915112345678", "UA", "+4915112345678"),
    ],
)
def test_a_national_form_is_read_in_the_country_that_is_named(text: str, country: str, e164: str) -> None:
    parsed = parse_phone(text, country)
    assert parsed is not None
    assert parsed.e164 == e164


@given(st.sampled_from(["UA", "RU", "DE", "KZ", "US", "GB", "IT"]), st.text("0123456789", min_size=6, max_size=11))
@settings(max_examples=1000)
def test_a_national_number_never_becomes_somebody_elses_abroad(country: str, national: str) -> None:
    assert parse_phone(national) is None
    parsed = parse_phone(national, country)
    code = phonenumbers.country_code_for_region(country)
    # Only a number that is dialled as international leaves the country.
    assert parsed is None or parsed.e164.startswith(f"+{code}") or national.startswith(("0", "8"))


@pytest.mark.parametrize("text", ["+15550199", "+380441234", "+551112345678", "+3801"])
def test_what_nobody_can_have_is_no_number(text: str) -> None:
    assert parse_phone(text) is None


def test_an_operators_test_numbers_are_taken() -> None:
    tests = ("+1555",)
    parsed = parse_phone("+1 555 0199", test_prefixes=tests)
    assert parsed is not None
    assert parsed.e164 == "+15550199"
    assert parse_phone("+15", test_prefixes=tests) is None
    assert parse_phone("+380441234", test_prefixes=tests) is None


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("+22997123456", "+2290197123456"),
        ("+22507123456", "+2250707123456"),
        ("+22505123456", "+2250505123456"),
        ("+22501123456", "+2250101123456"),
        ("+22520212345", "+2252720212345"),
        ("+22520012345", "+2252520012345"),
        ("+22521812345", "+2252121812345"),
        ("+5215512345678", "+525512345678"),
        ("+541123456789", "+5491123456789"),
        ("+54 11 15 2345-6789", "+5491123456789"),
        ("+551187654321", "+5511987654321"),
    ],
)
def test_former_forms_lead_to_the_present_one(former: str, present: str) -> None:
    parsed = parse_phone(former)
    assert parsed is not None
    assert parsed.e164 == present
    assert parse_phone(present) == parsed


@pytest.mark.parametrize("text", ["+551132654321", "+548001234567", "+525512345678", "+2252720212345"])
def test_numbers_that_did_not_change_stay(text: str) -> None:
    country = next(code for code in RULES if text[1:].startswith(code))
    assert present_form(country, text[1 + len(country) :]) is None


@given(st.sampled_from(sorted(RULES)), st.text("0123456789", min_size=6, max_size=12))
@settings(max_examples=2000)
def test_a_rule_catches_no_number_of_today_but_the_optional_nine(country: str, national: str) -> None:
    """Renumbering must not take anybody's number away: what a rule changes is nobody's today, Argentina's landline form apart."""
    if present_form(country, national) is not None and country != "54":
        try:
            number = phonenumbers.parse(f"+{country}{national}")
        except phonenumbers.NumberParseException:
            return
        assert phonenumbers.national_significant_number(number) != national or not phonenumbers.is_valid_number(number)


def test_rules_exclude_each_other_and_lead_to_what_no_rule_changes() -> None:
    draw = random.Random(7)  # noqa: S311 - a test that repeats itself
    for country, rules in RULES.items():
        for _ in range(20_000):
            national = "".join(draw.choices("0123456789", k=draw.choice((8, 9, 10, 11))))
            assert sum(rule.pattern.fullmatch(national) is not None for rule in rules) <= 1
            present = present_form(country, national)
            if present is not None:
                assert present_form(country, present) is None


@given(st.text(max_size=30))
def test_any_text_is_a_number_or_none(text: str) -> None:
    parsed = parse_phone(text)
    assert parsed is None or parsed.e164.startswith("+")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "++380501234567",
        "+380501234567+",
        "+380",
        "+99912345678",
        "+38050123456789012345678",
        "+380501234567 ext. 5",
        "tel:+380501234567",
    ],
)
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


def test_an_installation_reads_numbers_as_its_settings_say() -> None:
    numbers = Numbers.read_as("UA", " +1555 , +38000,")
    assert numbers == Numbers("UA", ("+1555", "+38000"))
    assert numbers.parse("0501234567") == numbers.parse("+380501234567") == PhoneNumber("+380501234567")
    assert numbers.parse("+15550199") == PhoneNumber("+15550199")
    assert Numbers.read_as(None, "") == Numbers()


@pytest.mark.parametrize(
    ("country", "test_numbers", "said"),
    [
        ("XX", "", "no country"),
        ("ua", "", "no country"),
        (None, "1555", "no beginning"),
        (None, "+1", "no beginning"),
        (None, "+15x", "no"),
    ],
)
def test_settings_about_numbers_that_cannot_be_are_refused_in_words(country: str | None, test_numbers: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Numbers.read_as(country, test_numbers)
