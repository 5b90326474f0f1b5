"""Watching a process until it ends, whatever keeps it from working: the same for engines and for services.

A process that hangs answers no probe, and is killed. One that was told by somebody else to shut down, and waits for its clients to
leave first, is made to end now. Whoever calls starts it again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

_log = structlog.get_logger()

# A probe costs both sides a millisecond or two; seldomer would only be added to the time for which a hung process is not noticed.
PROBE_EVERY_S = 3.0
# An answer takes milliseconds; a machine that is busy with something else may take a thousand times that.
PROBE_PATIENCE_S = 5.0
# One may be lost to a moment in which everything stood still, us included. Three are 15 s without a single answer, while calls
# last at most 10 s: whoever waited for this process has been refused already.
PROBES_UNANSWERED_MAX = 3
# One that was started again may hang before it ever answers. As long as a first start gets, on a machine that does something else as well.
START_PATIENCE_S = 60.0

# The first restart is at once, because what died by accident comes back; then doubling, so that what cannot live does not eat the machine.
# No longer than what a start takes: what waits for a database that comes back is not to be away for much longer than that is.
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 2.0
# A log that grows by megabytes within this is a storm in itself.
_LOG_CHECK_S = 30.0


class GoingDown(Exception):
    """Raised by a probe: the process shuts down by somebody's order, and serves nobody new until it was started again."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """How a process that hangs is told from one that is slow: so many probes in a row that nobody answered."""

    # Returns once the process answers, whatever it says; it may wait for ever. Called only after the process was ready.
    probe: Callable[[], Awaitable[None]]
    every_s: float = PROBE_EVERY_S
    patience_s: float = PROBE_PATIENCE_S
    unanswered_max: int = PROBES_UNANSWERED_MAX
    start_patience_s: float = START_PATIENCE_S


class Watched(Protocol):
    """One process that is kept running."""

    name: str

    @property
    def pid(self) -> int | None: ...
    async def wait(self) -> int: ...
    async def ready(self) -> None:
        """Return once it may be probed: it answers, or did when it was started."""

    async def finish(self) -> None:
        """End it at once, but cleanly: it shuts down already."""

    def kill(self) -> None:
        """SIGKILL, for it and what belongs to it."""

    def bound_log(self) -> None: ...


async def until_ended(watched: Watched, liveness: Liveness) -> str:
    """Wait until the process has ended, and see to it when it hangs or does not come to its end. Returns why it ended, in words."""
    reasons: list[str] = []
    watch = asyncio.create_task(_end_when_useless(watched, liveness, reasons), name=f"watch {watched.name}")
    try:
        code = await _wait_and_bound_log(watched)
    finally:
        # Also when the supervisor is ended: who drains is not probed.
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    return reasons[0] if reasons else _why(code)


def restart_pause_s(attempts: int) -> float:
    """How long to wait before the next start, after so many."""
    # The exponent is bounded as well: a float does not hold 2 to the power of a year's restarts.
    return min(_BACKOFF_FIRST_S * 2 ** min(attempts - 1, 10), _BACKOFF_MAX_S) if attempts else 0.0


async def _end_when_useless(watched: Watched, liveness: Liveness, reasons: list[str]) -> None:
    """Return once the process was sent its end; that it ended and what follows is for the supervisor."""
    try:
        async with asyncio.timeout(liveness.start_patience_s):
            await watched.ready()
        unanswered = 0
    except TimeoutError:
        _log.warning("did not come to answer after its start", process=watched.name, pid=watched.pid)
        unanswered = liveness.unanswered_max
    while unanswered < liveness.unanswered_max:
        if not unanswered:
            await asyncio.sleep(liveness.every_s)
        try:
            async with asyncio.timeout(liveness.patience_s):
                await liveness.probe()
            unanswered = 0
        except TimeoutError:
            unanswered += 1
            _log.warning("does not answer", process=watched.name, pid=watched.pid, probes=unanswered)
        except GoingDown:
            _log.warning("was told to shut down and waits for its clients; ended now", process=watched.name, pid=watched.pid)
            reasons.append("told to shut down by somebody else")
            await watched.finish()
            return
    _log.error("killed, because it hangs", process=watched.name, pid=watched.pid)
    reasons.append("hung")
    watched.kill()


async def _wait_and_bound_log(watched: Watched) -> int:
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOG_CHECK_S):
                return await watched.wait()
        # A log that cannot be bounded, on a full disk for instance, is no reason to stop watching.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(watched.bound_log)


def _why(code: int) -> str:
    if code == -9:
        return "killed"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
