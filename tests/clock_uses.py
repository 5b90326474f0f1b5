"""Finds every use of a clock that somebody can set, in services and the SDK."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = (ROOT / "services" / "sealpushd", ROOT / "sdk" / "sealpush")
# Methods and functions that read a wall clock, whatever they are called on: `datetime.now`, `clock.now`, `time.time`, `clock.now_ms`.
_READS: Final = frozenset({"now", "utcnow", "today", "time_ns", "now_ms", "_now", "epoch_s"})
# `time` is also asked of event loops, which are steady.
_TIME_MODULE: Final = frozenset({"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"})
_SQL: Final = re.compile(
    r"\b(?:(?<![._])now\s*\(\s*\)|clock_timestamp\s*\(|statement_timestamp\s*\(|transaction_timestamp\s*\(|current_timestamp\b|localtimestamp\b"
    r"|current_date\b|current_time\b|timeofday\s*\()",
    re.IGNORECASE,
)
_COMMENT: Final = re.compile(r"--[^\n]*")


class _Finder(ast.NodeVisitor):
    def __init__(self) -> None:
        self.scope: list[str] = []
        self.found: set[str] = set()
        # Docstrings are no SQL.
        self._texts: set[int] = set()

    def _enter(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.scope.append(node.name)
        self._skip_docstring(node)
        self.generic_visit(node)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._enter(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node)

    def visit_Module(self, node: ast.Module) -> None:
        self._skip_docstring(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Also where it is only handed on, as `now=clock.now`."""
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        reads = node.attr in _TIME_MODULE if owner == "time" else node.attr in _READS or (owner, node.attr) == ("Reading", "of")
        if reads:
            self._note()
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "time" and any(each.name in _TIME_MODULE for each in node.names):
            self._note()

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and id(node) not in self._texts and _SQL.search(node.value):
            self._note()

    def _note(self) -> None:
        self.found.add(".".join(self.scope) or "module")

    def _skip_docstring(self, node: ast.AST) -> None:
        body = getattr(node, "body", [])
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            self._texts.add(id(body[0].value))


def python_uses(text: str) -> set[str]:
    """Qualified names of what uses a wall clock in a module."""
    finder = _Finder()
    finder.visit(ast.parse(text))
    return finder.found


def sql_uses(text: str) -> bool:
    return _SQL.search(_COMMENT.sub("", text)) is not None


def uses() -> Iterator[str]:
    """Every use, as `timers.py` names it: `dispatch/lanes.py Lane.observe`, `fetch/sql/claim.sql`; of the SDK with `sdk/` before it."""
    for package in PACKAGES:
        prefix = "sdk/" if package.name == "sealpush" else ""
        for path in sorted(package.rglob("*")):
            place = prefix + path.relative_to(package).as_posix()
            if path.suffix == ".py" and not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                yield from sorted(f"{place} {name}" for name in python_uses(path.read_text()))
            elif path.suffix == ".sql" and sql_uses(path.read_text()):
                yield place
