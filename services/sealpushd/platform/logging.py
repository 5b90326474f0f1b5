"""JSON logs by structlog, with the request id of the call they belong to. Secrets have types that print as `Name(…)`."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

import structlog

# Ids of the outside calls that the present work is done for; a batch serves several.
request_ids: ContextVar[tuple[str, ...]] = ContextVar("request_ids", default=())

# How many ids a batch carries along; more would make the header longer than the work.
REQUEST_IDS_MAX = 8


def _add_request_id(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    ids = request_ids.get()
    if ids:
        event["request_id"] = ids[0] if len(ids) == 1 else list(ids)
    return event


def configure(service: str, level: str, *, human: bool = False) -> None:
    """Log to standard error from now on: one JSON object a line, or text for people."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=False) if human else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard module: same stream, warnings and worse.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", force=True)
