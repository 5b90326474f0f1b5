"""A flood of lines that are alike is a few lines and a count."""

from __future__ import annotations

import asyncio
import json
import logging as standard
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.platform import logging
from sealpushd.platform.logging import KINDS_MAX, LINES_MAX, WINDOW_S, Kind, LineLimiter
from tests.contract.push_simulators import Certificates

# Bounds a hang; it claims nothing about time.
LIMIT_S = 30


class Steady:
    """A clock that is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Steady:
    made = Steady()
    monkeypatch.setattr(logging, "LineLimiter", lambda: LineLimiter(made))
    return made


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[threading.Timer]:
    """Timers that only fire when told to, by calling their function."""
    made: list[threading.Timer] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            made.append(self)

    monkeypatch.setattr(threading, "Timer", Timer)
    return made


def test_of_a_thousand_lines_ten_are_written_and_the_next_window_tells_the_rest(
    steady: Steady, timers: list[threading.Timer], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.configure("fetch", "info")
    log = structlog.get_logger()
    for n in range(1000):
        log.warning("a caller was refused", n=n)
    log.warning("something else")
    written = lines(capsys)
    assert [line.get("n") for line in written] == [*range(LINES_MAX), None]
    assert all("suppressed" not in line for line in written)
    steady.now += WINDOW_S
    for n in range(3):
        log.warning("a caller was refused", n=n)
    assert [line.get("suppressed") for line in lines(capsys)] == [1000 - LINES_MAX, None, None]


def test_where_no_line_follows_a_timer_tells_and_rests_when_all_is_told(
    steady: Steady, timers: list[threading.Timer], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.configure("fetch", "info")
    for _ in range(100):
        structlog.get_logger().warning("a caller was refused")
    capsys.readouterr()
    assert [timer.interval for timer in timers] == [WINDOW_S]
    timers[0].function()
    assert lines(capsys) == [], "the window has not ended: it is told later"
    assert len(timers) == 2
    steady.now += WINDOW_S
    # In a thread of its own, which knows no context.
    teller = threading.Thread(target=timers[1].function)
    teller.start()
    teller.join(LIMIT_S)
    (told,) = lines(capsys)
    assert (told["of"], told["suppressed"], told["level"], told["service"]) == ("a caller was refused", 90, "warning", "fetch")
    assert len(timers) == 2


def test_lines_of_what_a_service_does_by_itself_are_all_written(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("fetch", "debug")
    for _ in range(50):
        structlog.get_logger().info("a credential is in use")
        structlog.get_logger().debug("a receipt")
    assert len(lines(capsys)) == 100


def test_a_flood_of_one_failure_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("fetch", "info")
    log = structlog.get_logger()
    for failure in (*[ValueError("one")] * 50, KeyError("another")):
        log.error("call failed by a bug", exc_info=failure)
    for _ in range(50):
        try:
            raise OSError
        except OSError:
            log.exception("call failed by a bug")
    log.warning("call failed by a bug")
    written = lines(capsys)
    assert len(written) == LINES_MAX + 1 + LINES_MAX + 1
    assert all("Error" in line["exception"] for line in written[:-1])


def test_what_libraries_write_is_counted_as_well_whatever_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("fetch", "info")
    for n in range(50):
        standard.getLogger("grpc").error("connection %d failed", n)
        standard.getLogger("grpc").info("not shown")
    loop = asyncio.new_event_loop()
    for n in range(50):
        loop.call_exception_handler({"message": f"task {n} failed", "exception": ValueError(n)})
    loop.close()
    written = lines(capsys)
    assert [line["logger"] for line in written] == ["grpc"] * LINES_MAX + ["asyncio"] * LINES_MAX
    assert written[0]["event"] == "connection 0 failed"
    assert all("ValueError" in line["exception"] for line in written[LINES_MAX:])
    assert {line["level"] for line in written} == {"error"}
    logging.close()
    assert {(line["of"], line["suppressed"]) for line in lines(capsys)} == {("grpc", 40), ("asyncio", 40)}


def test_at_the_end_of_a_process_nothing_is_lost_silently() -> None:
    program = (
        "import structlog; from sealpushd.platform import logging; logging.configure('fetch', 'info')\n"
        "for _ in range(50): structlog.get_logger().error('refused')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT_S, check=True)
    written = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [line["event"] for line in written[:-1]] == ["refused"] * LINES_MAX
    assert (written[-1]["of"], written[-1]["suppressed"]) == ("refused", 50 - LINES_MAX)


def test_threads_lose_no_line_between_them(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("fetch", "info")
    log = structlog.get_logger()
    threads = [threading.Thread(target=lambda: [log.warning("refused") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(lines(capsys)) == LINES_MAX
    logging.close()
    (told,) = lines(capsys)
    assert told["suppressed"] == 8 * 500 - LINES_MAX


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1.5 * WINDOW_S), st.booleans()), max_size=300))
def test_every_line_is_written_or_counted_once(asked: list[tuple[str, float, bool]]) -> None:
    steady = Steady()
    limiter = LineLimiter(steady)
    came: Counter[str] = Counter()
    told: Counter[str] = Counter()
    written: list[tuple[str, float]] = []
    for of, later_s, is_told in asked:
        steady.now += later_s
        came[of] += 1
        untold = limiter.admit(Kind(of, "warning"))
        if untold is not None:
            written.append((of, steady.now))
            told[of] += 1 + untold
        if is_told:
            for kind, suppressed in limiter.take_untold():
                told[kind.of] += suppressed
    for kind, suppressed in limiter.take_untold(until_now=True):
        told[kind.of] += suppressed
    assert told == came
    for of in "abc":
        at = [moment for each, moment in written if each == of]
        # Around the border of two windows, twice as many.
        assert all(later - first >= WINDOW_S for first, later in zip(at, at[2 * LINES_MAX :], strict=False))


# Wherever something is allocated the collector may run, in the thread that allocates, and what it ends may log: asyncio does, of tasks.
COLLECTING = """
import structlog, threading
from sealpushd.platform import logging

class Window(logging._Window):
    def __init__(self, since):
        global left
        super().__init__(since)
        left -= 1
        if left >= 0:
            log.warning("of the collector", exc_info=RuntimeError())

class Timer(threading.Timer):
    def __init__(self, *arguments):
        log.warning("of the collector")
        super().__init__(*arguments)

logging._Window, threading.Timer, left = Window, Timer, 3
logging.configure("fetch", "info")
log = structlog.get_logger()
for _ in range(50):
    log.warning("refused")
"""


def test_a_line_that_the_garbage_collector_causes_in_the_middle_of_another_stops_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", COLLECTING], capture_output=True, timeout=LIMIT_S / 3, check=True)
    events = Counter(json.loads(line)["event"] for line in ended.stderr.splitlines())
    assert events["refused"] == LINES_MAX
    assert events["of the collector"] > 0


def test_ever_new_kinds_take_no_more_memory_and_no_more_lines() -> None:
    steady = Steady()
    limiter = LineLimiter(steady)
    written = sum(limiter.admit(Kind(f"kind {n}", "error")) is not None for n in range(10 * KINDS_MAX))
    assert written == KINDS_MAX + LINES_MAX
    steady.now += WINDOW_S
    assert limiter.admit(Kind("a later kind", "error")) == 0, "room is made of kinds that have ended"
    assert sum(suppressed for _, suppressed in limiter.take_untold(until_now=True)) == 10 * KINDS_MAX - written


PLAIN_CALLERS = """
import asyncio, pathlib, sys
from sealpushd.platform import tls
import grpc

async def main(certificate, private_key):
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(pathlib.Path(certificate), pathlib.Path(private_key)))
    await server.start()
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\\r\\n\\r\\n")
        await reader.read()
        writer.close()
    await server.stop(None)

asyncio.run(main(*sys.argv[1:]))
"""


def test_connections_that_do_not_speak_tls_write_no_lines(tmp_path: Path) -> None:
    certificates = Certificates.make(tmp_path, ["localhost"])
    files = str(certificates.certificate), str(certificates.private_key)
    ended = subprocess.run([sys.executable, "-c", PLAIN_CALLERS, *files], capture_output=True, timeout=LIMIT_S, check=True)
    assert ended.stderr == b""
