"""JSON logs by structlog, with the request id of the call they belong to. Secrets have types that print as `Name(…)`.

Whoever can cause a warning can cause a million. So of warnings and errors that are alike only the first few of a minute are written; the
rest are counted, and a line says how many they were. Lines of the levels below are all written: they tell of what a service does by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import structlog

# Ids of the outside calls that the present work is done for; a batch serves several.
request_ids: ContextVar[tuple[str, ...]] = ContextVar("request_ids", default=())

# How many ids a batch carries along; more would make the header longer than the work.
REQUEST_IDS_MAX = 8

# Of one kind in a window: enough to see what is wrong, and few enough to read when everything is.
LINES_MAX: Final = 10
WINDOW_S: Final = 60.0
# Kinds stand in the code, so they are few. Of a library that makes up ever new ones, those beyond share one.
KINDS_MAX: Final = 512

# How a line says of what kind it is, where its event does not: libraries' lines, and those that are written always.
_KIND: Final = "_kind"


class Kind(NamedTuple):
    """What makes lines alike: event or library, level, and the type of an exception or where the library wrote it."""

    of: str
    level: str
    detail: str = ""


ALWAYS: Final = Kind("", "")


class _Window:
    """What became of the lines of one kind since a moment."""

    __slots__ = ("passed", "since", "suppressed")

    def __init__(self, since: float) -> None:
        self.since = since
        self.passed = 0
        self.suppressed = 0


class LineLimiter:
    """Lets `LINES_MAX` lines of a kind pass in a window, which begins with the first, and counts the rest. Threads may share it."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._windows: dict[Kind, _Window] = {}
        # Reentrant, as those of the standard module: the garbage collector may run in here, and what it ends may log.
        self._lock = threading.RLock()

    def admit(self, kind: Kind) -> int | None:
        """None: the line is not written. Else it is, and so many like it were not, of which nobody was told."""
        now = self._monotonic()
        with self._lock:
            window = self._windows.get(kind)
            if window is None:
                if len(self._windows) >= KINDS_MAX:
                    self._forget(now)
                if len(self._windows) >= KINDS_MAX:
                    kind = Kind("other lines", kind.level)
                window = self._windows.setdefault(kind, _Window(now))
            untold = 0
            if now - window.since >= WINDOW_S:
                untold = window.suppressed
                window.since, window.passed, window.suppressed = now, 0, 0
            if window.passed < LINES_MAX:
                window.passed += 1
                return untold
            window.suppressed += 1
            return None

    def _forget(self, now: float) -> None:
        """Kinds of which there is nothing to tell."""
        for kind, window in self._windows.copy().items():
            if not window.suppressed and now - window.since >= WINDOW_S:
                self._windows.pop(kind, None)

    def take_untold(self, *, until_now: bool = False) -> list[tuple[Kind, int]]:
        """What was suppressed in windows that have ended, and nobody was told of; `until_now`: in the others as well."""
        now = self._monotonic()
        with self._lock:
            ended = [(kind, window) for kind, window in self._windows.copy().items() if until_now or now - window.since >= WINDOW_S]
            for kind, _ in ended:
                self._windows.pop(kind, None)
        return [(kind, window.suppressed) for kind, window in ended if window.suppressed]

    @property
    def has_untold(self) -> bool:
        with self._lock:
            return any(window.suppressed for window in self._windows.copy().values())


class _Limit:
    """The limiter as a structlog processor.

    What a window suppressed stands in the next line of its kind; where none follows, a timer's thread tells it within two windows,
    whatever event loops there are, and `close` the rest.
    """

    def __init__(self, limiter: LineLimiter) -> None:
        self._limiter = limiter
        # As in the limiter.
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._closed = False

    def __call__(self, _: object, level: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        kind: Kind | None = event.pop(_KIND, None)
        if level in ("info", "debug") or kind is ALWAYS:
            return event
        suppressed = self._limiter.admit(kind or Kind(event["event"], level, _type_name(event.get("exc_info"))))
        if suppressed is None:
            if self._timer is None:
                self._tell_later()
            raise structlog.DropEvent
        if suppressed:
            event["suppressed"] = suppressed
        return event

    def _tell_later(self) -> None:
        with self._lock:
            if self._timer is None and not self._closed:
                self._timer = threading.Timer(WINDOW_S, self._tell)
                # A process does not stay for its log: `close` tells the rest.
                self._timer.daemon = True
                self._timer.start()

    def _tell(self) -> None:
        with self._lock:
            self._timer = None
        _write(self._limiter.take_untold())
        if self._limiter.has_untold:
            self._tell_later()

    def close(self) -> None:
        """Tell what is left. Idempotent."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
        _write(self._limiter.take_untold(until_now=True))


def _type_name(exc_info: Any) -> str:
    """Of what type an exception is that goes with a line, as structlog takes them; empty without one."""
    if not exc_info:
        return ""
    if isinstance(exc_info, BaseException):
        return type(exc_info).__name__
    kind = exc_info[0] if isinstance(exc_info, tuple) else sys.exc_info()[0]
    return kind.__name__ if kind is not None else ""


def _write(untold: list[tuple[Kind, int]]) -> None:
    for kind, suppressed in untold:
        said = {"of": kind.of, "suppressed": suppressed, _KIND: ALWAYS} | ({"detail": kind.detail} if kind.detail else {})
        # The stream may be closed when a process ends.
        with contextlib.suppress(ValueError, OSError):
            structlog.get_logger().log(_LEVELS[kind.level], "lines like others were left out", **said)


_LEVELS: Final = {"warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


class _Libraries(logging.Handler):
    """What libraries write by the standard module, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = next((name for name, number in reversed(_LEVELS.items()) if record.levelno >= number), "warning")
            # Not by its text, which has the peer's address or a task's name in it and is never the same.
            kind = Kind(record.name, level, f"{record.filename}:{record.lineno}")
            exc_info = {"exc_info": record.exc_info} if record.exc_info else {}
            structlog.get_logger().log(_LEVELS[level], record.getMessage(), logger=record.name, **exc_info, **{_KIND: kind})
        except Exception:
            # As the handlers of the standard module do: no line of a log ends what it tells of.
            self.handleError(record)


def _add_request_id(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    ids = request_ids.get()
    if ids:
        event["request_id"] = ids[0] if len(ids) == 1 else list(ids)
    return event


_limit: _Limit | None = None


def close() -> None:
    """Tell what was suppressed so far, before the process ends or the log goes elsewhere. Idempotent."""
    global _limit
    if _limit is not None:
        _limit.close()
        _limit = None


atexit.register(close)


def configure(service: str, level: str, *, human: bool = False) -> None:
    """Log to standard error from now on: one JSON object a line, or text for people."""
    global _limit
    close()
    _limit = _Limit(LineLimiter())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=False) if human else structlog.processors.JSONRenderer(ensure_ascii=False)
    )

    def add_service(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # No context variable: threads do not inherit those.
        event["service"] = service
        return event

    writer = structlog.WriteLogger(sys.stderr)
    structlog.configure(
        processors=[
            # First: what it drops costs nothing more.
            _limit,
            structlog.contextvars.merge_contextvars,
            add_service,
            _add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # One for all lines: structlog asks for a logger with each, also with one that is not written.
        logger_factory=lambda *_: writer,
    )
    # Warnings of libraries, and worse.
    logging.basicConfig(level=logging.WARNING, handlers=[_Libraries()], force=True)
