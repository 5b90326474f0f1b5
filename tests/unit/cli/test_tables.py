from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.cli.tables import table

# What columns are made of: no line breaks, and nothing that takes more or less than a place.
cells = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_stand_on_the_right() -> None:
    rows = [("bank", "9", "0.5", "2 min"), ("post-office", "12,000", "-", "-")]
    assert table(("APP", "QUEUED", "SENT/S", "OLDEST"), rows) == (
        "APP          QUEUED  SENT/S  OLDEST\nbank              9     0.5  2 min\npost-office  12,000       -  -"
    )


def test_a_table_without_rows_is_its_head() -> None:
    assert table(("APP", "QUEUED"), []) == "APP  QUEUED"


@pytest.mark.parametrize(
    ("cell", "on_right"),
    [
        ("1", True),
        ("1.5", True),
        ("12,000", True),
        ("-", True),
        ("", True),
        ("1.2.3", False),
        ("2027-01-31", False),
        ("1 s", False),
        ("+", False),
    ],
)
def test_what_a_number_is(cell: str, on_right: bool) -> None:
    lines = table(("LONG HEAD", "X"), [(cell, "x")]).splitlines()
    assert lines[1].startswith(" ") is on_right


@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=6)))
def test_every_cell_stands_in_its_column_and_no_line_ends_in_blanks(lines: list[list[str]]) -> None:
    head, rows = lines[0], lines[1:]
    text = table(head, rows).split("\n")
    assert len(text) == len(lines)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for shown, cells_of_line in zip(text, lines, strict=True):
        assert shown == shown.rstrip()
        start = 0
        for width, cell in zip(widths, cells_of_line, strict=True):
            place = shown[start : start + width].ljust(width)
            assert place.strip() == cell.strip()
            start += width + 2
