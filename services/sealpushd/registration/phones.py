"""Phone numbers in one spelling: E.164. Pure.

`phonenumbers` knows every country's rules and takes 30 to 100 µs a number, more than everything else about a publish together. Most
numbers come in E.164 already; `_is_canonical` recognises those in about one microsecond, by the same metadata, and leaves the
rest to the library. The two agree on every number (a property the tests check).
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Final

import phonenumbers
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, NumberParseException, PhoneMetadata, PhoneNumberFormat

PHONE_CHARACTERS_MAX: Final = 25
# A sender repeats its customers; beyond this the look-up costs more than it saves.
_CACHED_MAX: Final = 65_536

_E164 = re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII)


class PhoneNumber:
    """A number in E.164. Never prints itself."""

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


@cache
def _country(code: str) -> tuple[frozenset[int], re.Pattern[str] | None] | None:
    """How long a country's numbers can be, and what its trunk prefix looks like; None for what is no country code."""
    regions = COUNTRY_CODE_TO_REGION_CODE.get(int(code))
    if regions is None:
        return None
    nowhere = regions[0] == "001"
    metadata = PhoneMetadata.metadata_for_nongeo_region(int(code)) if nowhere else PhoneMetadata.metadata_for_region(regions[0])
    if metadata is None or metadata.general_desc is None:
        return None
    trunk = metadata.national_prefix_for_parsing
    return frozenset(metadata.general_desc.possible_length), None if trunk is None else re.compile(trunk)


def _is_canonical(text: str) -> bool:
    """Whether the text is certainly what `phonenumbers` would make of it. False means: ask it."""
    if _E164.fullmatch(text) is None:
        return False
    for digits in (1, 2, 3):
        country = _country(text[1 : 1 + digits])
        if country is not None:
            lengths, trunk = country
            national = text[1 + digits :]
            # Leading zeros belong to a number in a few countries and are dialled in the others.
            return len(national) in lengths and national[0] != "0" and (trunk is None or trunk.match(national) is None)
    return False


@lru_cache(maxsize=_CACHED_MAX)
def _parsed(text: str) -> PhoneNumber | None:
    try:
        number = phonenumbers.parse(text)
    except NumberParseException:
        return None
    if not phonenumbers.is_possible_number(number) or number.extension:
        return None
    e164 = phonenumbers.format_number(number, PhoneNumberFormat.E164)
    # Zeros where a trunk prefix is taken off give a number that reads as yet another one: such a text names nobody for certain.
    return PhoneNumber(e164) if phonenumbers.parse(e164) == number else None


def parse_phone(text: str) -> PhoneNumber | None:
    """The number in international format, with or without "+"; None when it is none. Costs a microsecond where it is E.164."""
    if _is_canonical(text):
        return PhoneNumber(text)
    if not 1 <= len(text) <= PHONE_CHARACTERS_MAX:
        return None
    stripped = text.strip()
    return _parsed(stripped if stripped.startswith("+") else f"+{stripped}")
