"""The launcher is a program, so it is tested as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sealpushd.engines import launcher

LAUNCHER = [sys.executable, "-I", "-S", launcher.__file__]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has root to drop")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*LAUNCHER, *arguments], capture_output=True, text=True, timeout=60, check=False)


def has_ended(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True  # before the file was opened, or before it was read
    return status.rpartition(")")[2].split()[0] == "Z"  # dead, and nobody has collected it yet


def wait_until_ended(pid: int, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return has_ended(pid)


def test_the_server_takes_over_the_launchers_pid_and_exit_code() -> None:
    with subprocess.Popen([*LAUNCHER, "--", "/bin/sh", "-c", "echo $$; exit 7"], stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=60)
    assert int(output) == process.pid
    assert process.returncode == 7


@needs_root
def test_root_becomes_an_ordinary_user_and_its_files_stay_roots(tmp_path: Path) -> None:
    file = tmp_path / "file"
    result = run("--drop-root", "--own", str(tmp_path), "--", "/bin/sh", "-c", f"id -u; id -g; echo hello > {file}")
    assert (result.stdout, result.stderr) == ("1000\n1000\n", "")
    assert file.stat().st_uid == 0
    assert file.stat().st_mode & 0o777 == 0o600


@needs_root
def test_what_an_ordinary_account_owned_is_given_back_without_following_links(tmp_path: Path) -> None:
    own, outside = tmp_path / "own", tmp_path / "outside"
    own.mkdir()
    for path in (own / "inside", outside):
        path.touch()
        os.chown(path, 65534, 65534)
    (own / "link").symlink_to(outside)
    os.chown(own, 65534, 65534)
    assert run("--drop-root", "--own", str(own), "--", "/bin/true").returncode == 0
    assert {path.name: path.stat().st_uid for path in (own, own / "inside", outside)} == {
        "own": 0,
        "inside": 0,
        "outside": 65534,
    }


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
@pytest.mark.parametrize("options", [(), pytest.param(("--drop-root",), marks=needs_root)])
def test_the_server_gets_the_death_signal_when_its_parent_is_killed(options: tuple[str, ...], before: str, tmp_path: Path) -> None:
    """Also where the parent ignores it, as what a shell starts in the background ignores SIGINT."""
    seen = tmp_path / "seen"
    server = f"trap 'echo INT > {seen}; exit' INT; echo $$; while :; do sleep 0.05; done"
    parent = (
        "import os, signal, subprocess, sys, time\n"
        f"signal.signal(signal.SIGINT, signal.{before})\n"
        "subprocess.Popen([*sys.argv[1:-3], '--parent-pid', str(os.getpid()), '--', *sys.argv[-3:]])\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", parent, *LAUNCHER, "--death-signal", "SIGINT", *options]
    with subprocess.Popen([*command, "/bin/sh", "-c", server], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not has_ended(pid)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert wait_until_ended(pid)
    assert seen.read_text() == "INT\n"


def test_a_parent_that_is_already_gone_is_noticed() -> None:
    # Its parent is this process, not process 1.
    result = run("--parent-pid", "1", "--", "/bin/echo", "started")
    assert (result.returncode, result.stdout) == (launcher.EXIT_PARENT_GONE, "")


def test_what_cannot_be_executed_is_named(tmp_path: Path) -> None:
    result = run("--", str(tmp_path / "missing"))
    assert result.returncode == launcher.EXIT_CANNOT_EXECUTE
    assert f"cannot execute {tmp_path / 'missing'}: No such file" in result.stderr


def test_broken_pipes_end_the_servers_helpers_again() -> None:
    result = run("--", "/bin/sh", "-c", "grep SigIgn /proc/self/status")
    assert int(result.stdout.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


@pytest.mark.parametrize("arguments", [(), ("--",), ("--drop-root",), ("/bin/true",), ("--unknown", "--", "/bin/true")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage: sealpushd.engines.launcher [options] -- BINARY" in result.stderr


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "sealpushd.engines.launcher", "--", "/bin/echo", "--started"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "--started\n"
