"""Numbers that changed while their owners did not: old forms and optional digits, and the form of today. Pure data.

`phonenumbers` knows the plan of today and not where a number of yesterday went. Each rule gives, for a national number that somebody may
still have in an address book or a database, what the same person is called on now. A rule stands here only where the old form leads to
exactly one new one, by the digits alone, and never catches a number that is somebody else's today.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Rule:
    """National numbers that `pattern` matches whole are today `present` (as for `re.Match.expand`)."""

    pattern: re.Pattern[str]
    present: str
    why: str


def _rule(pattern: str, present: str, why: str) -> Rule:
    return Rule(re.compile(pattern, re.ASCII), present, why)


_BENIN: Final = "Benin, 30 November 2024: 8 digits became 10, with 01 before them"
_IVORY_COAST: Final = (
    "Côte d'Ivoire, 31 January 2021: 8 digits became 10. Before a mobile number stands its operator of then, told by the second digit; "
    "before a fixed one, told by the third"
)
_MEXICO: Final = "Mexico, August 2019: the 1 between country code and mobile number is gone"
_ARGENTINA: Final = (
    "Argentina: calls from abroad to a mobile phone have a 9 after the country code, and many write it without. Area code and number "
    "are one person's either way"
)
_BRAZIL: Final = (
    "Brazil, until November 2016: mobile numbers got a 9 after the area code. Landlines begin with 2 to 5, and with 7 there are mobile "
    "numbers of 8 digits still"
)

# Country code → its rules. The patterns of one country exclude each other.
RULES: Final[dict[str, tuple[Rule, ...]]] = {
    "229": (_rule(r"[24-9]\d{7}", r"01\g<0>", _BENIN),),
    "225": (
        _rule(r"[04-9][0-3]\d{6}", r"01\g<0>", _IVORY_COAST),
        _rule(r"[04-9][4-6]\d{6}", r"05\g<0>", _IVORY_COAST),
        _rule(r"[04-9][7-9]\d{6}", r"07\g<0>", _IVORY_COAST),
        _rule(r"2\d8\d{5}", r"21\g<0>", _IVORY_COAST),
        _rule(r"[23]\d0\d{5}", r"25\g<0>", _IVORY_COAST),
        _rule(r"2\d[1-79]\d{5}|3\d[1-9]\d{5}", r"27\g<0>", _IVORY_COAST),
    ),
    "52": (_rule(r"1(\d{10})", r"\1", _MEXICO),),
    "54": (_rule(r"(?:11|[23]\d)\d{8}", r"9\g<0>", _ARGENTINA),),
    "55": (_rule(r"([1-9]{2})([689]\d{7})", r"\g<1>9\2", _BRAZIL),),
}


def present_form(country_code: str, national: str) -> str | None:
    """What the national number is today; None: it did not change."""
    for rule in RULES.get(country_code, ()):
        match = rule.pattern.fullmatch(national)
        if match is not None:
            return match.expand(rule.present)
    return None
