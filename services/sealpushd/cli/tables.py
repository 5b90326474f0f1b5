"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; numbers stand on the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = [all(_is_number(row[column]) for row in rows) and bool(rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if on_right else cell.ljust(width) for cell, width, on_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell in ("-", "") or cell.replace(".", "", 1).replace(",", "").isdigit()
