"""A process can always open a few files more than strangers can make it open."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sealpushd.platform.server import OTHER_FILES_MAX

_SCRIPT = """
import resource, sys
from sealpushd.platform.server import connections_possible

soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(connections_possible(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "possible", "raised_to"),
    [
        pytest.param(256, 4096, 2000, 2000 + OTHER_FILES_MAX, id="room: the soft limit is raised as far as needed"),
        pytest.param(4096, 4096, 2000, 4096, id="enough: nothing is changed"),
        pytest.param(256, 1024, 1024 - OTHER_FILES_MAX, 1024, id="too little: fewer connections"),
    ],
)
def test_connections_leave_files_for_the_rest(soft: int, hard: int, possible: int, raised_to: int) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(soft), str(hard), "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines()[-1] == f"{possible} {raised_to}"
    assert ("ulimit" in done.stdout + done.stderr) == (possible < 2000)
