"""A moment of coverage-guided fuzzing; `make fuzz` goes on for longer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine")


@pytest.mark.parametrize(
    ("target", "runs"), [("parse", 50_000), ("open", 10_000), ("resigned", 8_000), ("entry", 50_000), ("revocations", 50_000)]
)
def test_nothing_but_a_clean_refusal_comes_of_strange_bytes(target: str, runs: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, "--runs", str(runs)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) >= runs
    assert not list(tmp_path.iterdir()), "an input that breaks it is left behind"
