"""Kinds of arguments."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Final

import click

_UNITS: Final = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Duration(click.ParamType[timedelta]):
    """`90s`, `1h`, `1.5d`: more than nothing."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = _DURATION.fullmatch(str(value))
        try:
            duration = timedelta(**{_UNITS[match[2]]: float(match[1])}) if match else timedelta()
        except OverflowError:
            self.fail(f"{value!r} is longer than can be told", param, ctx)
        if not duration:
            self.fail(f"{value!r} is no duration; write it as 500ms, 90s, 5m, 1h or 14d", param, ctx)
        return duration


DURATION: Final = Duration()
