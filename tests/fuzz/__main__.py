"""`python -m tests.fuzz TARGET [--seconds N] [--runs N]`: fuzz one target; an input that breaks it is left in the working directory."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long")
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many executions")
    given = parser.parse_args()
    target = TARGETS[given.target]
    with tempfile.TemporaryDirectory(prefix="sealpush-fuzz-") as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, f"seed-{number}").write_bytes(seed)
        limits = [f"-runs={given.runs}", f"-max_total_time={given.seconds}", "-max_len=4096", "-print_final_stats=1", "-timeout=5"]
        atheris.Setup([sys.argv[0], *limits, corpus], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
