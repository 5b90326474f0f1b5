"""A moment of a rolling restart and of processes that are killed; `make chaos` goes on for longer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("signal", ["TERM"])
def test_messages_travel_once_while_one_of_two_processes_of_a_service_ends(signal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--processes", "2", "--signal", signal, "--seconds", "5", "--rate", "10"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (campaign,) = json.loads(done.stdout)["campaigns"]
    assert campaign["ended"]
    assert campaign["accepted"] == campaign["published"] - campaign["refused"] > 0
