"""Phone numbers: one person, one spelling. Pure.

A number is kept as its canonical E.164 form: what somebody who calls today dials. Three things stand between a text and that form.

- How people write: blanks, brackets, dashes, invisible marks and digits of other scripts are taken off or translated.
- Where a number belongs: it starts with "+" and its country code, or the caller names the country whose national form it is. Nothing is
  guessed: read as an international number, a national one names somebody abroad.
- Renumbering: old forms of a number, and forms with optional digits, lead to the present one (`renumbering`).

`phonenumbers` knows every country's rules and takes 30 to 100 µs a number, more than everything else about a publish together. Most
numbers come in E.164 already; `_is_canonical` recognises those in a few microseconds, by the same metadata, and leaves the rest to the
library. The two agree on every number (a property the tests check).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

import phonenumbers
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, NumberParseException, PhoneMetadata, PhoneNumberDesc, PhoneNumberFormat

from sealpushd.registration.renumbering import present_form

# As typed: fifteen digits, each between marks that nobody sees.
TYPED_CHARACTERS_MAX: Final = 64
# A sender repeats its customers; beyond this the look-up costs more than it saves.
_CACHED_MAX: Final = 65_536

_E164 = re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII)
_DIALLED = re.compile(r"\+?[0-9]+", re.ASCII)
# One digit would be half a continent.
_TEST_PREFIX = re.compile(r"\+[1-9][0-9]{1,13}", re.ASCII)
# Blanks, invisible marks and dashes by their Unicode categories; what else people put between digits by name.
_BETWEEN_CATEGORIES: Final = frozenset({"Zs", "Cf", "Pd"})
_BETWEEN_CHARACTERS: Final = frozenset("()[]./\t\N{MINUS SIGN}\N{COMBINING GRAPHEME JOINER}")
_PLUS_SIGNS: Final = "+\N{FULLWIDTH PLUS SIGN}\N{SMALL PLUS SIGN}"

_KINDS: Final = (
    "fixed_line", "mobile", "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "pager", "uan", "voicemail",
)  # fmt: skip


class PhoneNumber:
    """A number in its canonical form. Never prints itself."""

    __slots__ = ("e164",)

    def __init__(self, e164: str) -> None:
        self.e164 = e164

    def __repr__(self) -> str:
        return "PhoneNumber(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PhoneNumber) and self.e164 == other.e164

    def __hash__(self) -> int:
        return hash(self.e164)

    @property
    def prefix(self) -> str:
        """The number less its last 4 digits."""
        return self.e164[:-4]


@dataclass(frozen=True, slots=True)
class _Region:
    """What makes a national number one of this region's."""

    general: re.Pattern[str]
    lengths: frozenset[int]
    # Of the regions that share a country code, those but the main one have numbers that begin so; None: only the kinds decide.
    leading: re.Pattern[str] | None
    kinds: tuple[tuple[re.Pattern[str], frozenset[int]], ...]

    def has_kind(self, national: str) -> bool:
        """Whether it is a number of any kind (mobile, fixed, …): what `phonenumbers` calls valid."""
        return self.general.fullmatch(national) is not None and any(
            (not lengths or len(national) in lengths) and pattern.fullmatch(national) is not None for pattern, lengths in self.kinds
        )


@dataclass(frozen=True, slots=True)
class _Country:
    """The regions of a country code, the main one first, and what a trunk prefix looks like there."""

    regions: tuple[_Region, ...]
    trunk: re.Pattern[str] | None

    def is_valid(self, national: str) -> bool:
        if len(self.regions) == 1:
            return self.regions[0].has_kind(national)
        for region in self.regions:
            if region.leading is not None:
                if region.leading.match(national) is not None:
                    return region.has_kind(national)
            elif region.has_kind(national):
                return True
        return False


@cache
def _country(code: str) -> _Country | None:
    """The rules of a country code; None for what is none."""
    names = COUNTRY_CODE_TO_REGION_CODE.get(int(code))
    if names is None:
        return None
    metadata = [
        PhoneMetadata.metadata_for_nongeo_region(int(code)) if name == "001" else PhoneMetadata.metadata_for_region(name) for name in names
    ]
    regions = tuple(region for each in metadata if each is not None and (region := _region(each)) is not None)
    main = metadata[0]
    if main is None or not regions:
        return None
    trunk = main.national_prefix_for_parsing
    return _Country(regions, None if trunk is None else re.compile(trunk))


def _region(metadata: PhoneMetadata) -> _Region | None:
    general = metadata.general_desc
    if general is None or general.national_number_pattern is None:
        return None
    kinds: list[tuple[re.Pattern[str], frozenset[int]]] = []
    for kind in _KINDS:
        described: PhoneNumberDesc | None = getattr(metadata, kind)
        if described is not None and described.national_number_pattern is not None:
            lengths = described.possible_length
            kinds.append((re.compile(described.national_number_pattern), frozenset(lengths)))
    leading = metadata.leading_digits
    return _Region(
        re.compile(general.national_number_pattern),
        frozenset(general.possible_length),
        None if leading is None else re.compile(leading),
        tuple(kinds),
    )


def _is_canonical(text: str) -> bool:
    """Whether the text is certainly what the long way would make of it. False means: go the long way."""
    if _E164.fullmatch(text) is None:
        return False
    for digits in (1, 2, 3):
        code = text[1 : 1 + digits]
        country = _country(code)
        if country is not None:
            national = text[1 + digits :]
            # Leading zeros belong to a number in a few countries and are dialled in the others.
            return (
                national[0] != "0"
                and len(national) in country.regions[0].lengths
                and (country.trunk is None or country.trunk.match(national) is None)
                and present_form(code, national) is None
                and country.is_valid(national)
            )
    return False


def _dialled(text: str) -> str | None:
    """The digits of a typed number in ASCII, after "+" where it has one; None when there is something else in it."""
    kept: list[str] = []
    for character in text:
        if character in _PLUS_SIGNS:
            kept.append("+")
        elif (digit := unicodedata.decimal(character, None)) is not None:
            kept.append(str(digit))
        elif character not in _BETWEEN_CHARACTERS and unicodedata.category(character) not in _BETWEEN_CATEGORIES:
            return None
    dialled = "".join(kept)
    return dialled if _DIALLED.fullmatch(dialled) is not None else None


@lru_cache(maxsize=_CACHED_MAX)
def _parsed(dialled: str, country: str | None, test_prefixes: tuple[str, ...]) -> PhoneNumber | None:
    try:
        number = phonenumbers.parse(dialled, country)
    except NumberParseException:
        return None
    if number.extension:
        return None
    e164 = phonenumbers.format_number(number, PhoneNumberFormat.E164)
    if e164.startswith(test_prefixes) and phonenumbers.is_possible_number(number):
        return PhoneNumber(e164)
    try:
        code, national = str(number.country_code), phonenumbers.national_significant_number(number)
        present = present_form(code, national)
        if present is not None:
            e164 = f"+{code}{present}"
            number = phonenumbers.parse(e164)
        # Zeros where a trunk prefix is taken off give a number that reads as yet another one: such a text names nobody for certain.
        if not phonenumbers.is_valid_number(number) or phonenumbers.parse(e164) != number:
            return None
    except NumberParseException:
        return None
    return PhoneNumber(e164)


def parse_phone(text: str, country: str | None = None, test_prefixes: Sequence[str] = ()) -> PhoneNumber | None:
    """The canonical number that a text names, or None.

    `country`: two letters (ISO 3166-1) of the country whose national form is meant where the text does not start with "+". None: such a
    text is no number. `test_prefixes`: beginnings in E.164, such as "+1555", of numbers that nobody has and that are taken all the same.
    Costs a few microseconds where the text is canonical already.
    """
    if _is_canonical(text):
        return PhoneNumber(text)
    dialled = _dialled(text) if 1 <= len(text) <= TYPED_CHARACTERS_MAX else None
    if dialled is None or not (dialled.startswith("+") or country is not None):
        return None
    return _parsed(dialled, country, tuple(test_prefixes))


@dataclass(frozen=True, slots=True)
class Numbers:
    """How an installation reads the numbers it is given; the parameters are those of `parse_phone`."""

    country: str | None = None
    test_prefixes: tuple[str, ...] = ()

    @classmethod
    def read_as(cls, country: str | None, test_numbers: str) -> Numbers:
        """From settings: a country or none, and beginnings separated by commas. Raises ValueError that says what is wrong."""
        if country is not None and country not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError(f"{country!r} is no country: give two capital letters of ISO 3166-1, such as UA")
        prefixes = tuple(prefix.strip() for prefix in test_numbers.split(",") if prefix.strip())
        for prefix in prefixes:
            if _TEST_PREFIX.fullmatch(prefix) is None:
                raise ValueError(f"{prefix!r} is no beginning of a number: give + and 2 to 14 digits, such as +1555")
        return cls(country, prefixes)

    def parse(self, text: str) -> PhoneNumber | None:
        """The canonical number that a text names, or None."""
        return parse_phone(text, self.country, self.test_prefixes)
