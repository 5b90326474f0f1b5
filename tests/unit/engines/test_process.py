import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sealpushd.engines import process
from sealpushd.engines.errors import EngineError
from sealpushd.engines.process import ServerProcess

Make = Callable[[], ServerProcess]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make() -> ServerProcess:
        return ServerProcess("Shell", log=tmp_path / "log", own=(), own_top=(), death_signal=signal.SIGTERM)

    return make


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def wait_for_output(server: ServerProcess, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in server.tail():  # noqa: ASYNC110 # bounded polling of a file
            await asyncio.sleep(0.01)


async def test_a_failure_tells_the_last_words_of_the_latest_process_only(make: Make, tmp_path: Path) -> None:
    server = make()
    for word in ("first", "second"):
        await server.spawn(sh(f"echo {word} >&2; exit 3"), cwd=tmp_path)
        assert await server.wait() == 3
    assert (server.pid, server.returncode) == (None, 3)
    message = str(server.failure("ended", "Do this."))
    assert "Shell ended. Do this." in message
    assert "second" in message
    assert "first" not in message


async def test_the_tail_is_bounded(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(sh("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"), cwd=tmp_path)
    await server.wait()
    assert server.tail().endswith("line 1999")
    assert len(server.tail()) <= 4096


async def test_standard_input_reaches_the_server(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(["/bin/cat"], cwd=tmp_path, stdin=b"settings")
    assert await server.wait() == 0
    assert server.tail() == "settings"


async def test_a_server_that_closes_its_input_early_is_no_error(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(["/bin/true"], cwd=tmp_path, stdin=b"x" * 1_000_000)
    assert await server.wait() == 0


async def test_a_server_that_ignores_its_signal_is_killed(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(sh("trap '' TERM; echo ready; while :; do sleep 0.05; done"), cwd=tmp_path)
    await wait_for_output(server, "ready")
    await server.stop((signal.SIGTERM, 0.1))
    assert server.returncode == -signal.SIGKILL
    await server.stop((signal.SIGTERM, 0.1))  # again: nothing to do


async def test_stop_escalates_from_signal_to_signal(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(sh("trap '' TERM; trap 'exit 5' INT; echo ready; while :; do sleep 0.05; done"), cwd=tmp_path)
    await wait_for_output(server, "ready")
    await server.stop((signal.SIGTERM, 0.1), (signal.SIGINT, 5.0))
    assert server.returncode == 5


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(make: Make, tmp_path: Path) -> None:
    server = make()
    await server.spawn(["/bin/sleep", "60"], cwd=tmp_path)
    assert server.pid is not None
    assert os.getpgid(server.pid) != os.getpgid(0)
    await server.stop((signal.SIGTERM, 5.0))


async def test_the_environment_cannot_bend_the_server(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_MESSAGES", "uk_UA.UTF-8")
    server = make()
    await server.spawn(["/usr/bin/env"], cwd=tmp_path)
    await server.wait()
    assert "LC_ALL=C" in server.tail().splitlines()
    assert "PGPORT" not in server.tail()
    assert "uk_UA" not in server.tail()


async def test_the_log_is_moved_aside_while_the_server_goes_on_writing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 5)
    server = make()
    await server.spawn(sh("echo before; read -r line; echo after"), cwd=tmp_path, stdin=b"")
    await server.wait()
    server.bound_log()
    assert (tmp_path / "log.1").read_text() == "before\nafter\n"
    assert (tmp_path / "log").read_text() == ""

    await server.spawn(sh("trap 'echo after; exit' TERM; echo before; while :; do sleep 0.05; done"), cwd=tmp_path)
    await wait_for_output(server, "before")
    server.bound_log()
    await server.stop((signal.SIGTERM, 5.0))
    assert (tmp_path / "log").read_text() == "after\n"
    assert server.tail() == "after"


async def test_a_log_that_cannot_be_written_is_an_engine_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(EngineError, match=r"Cannot start Shell: Is a directory"):
        await make().spawn(["/bin/true"], cwd=tmp_path)
