"""A connection without a network: what a simulator answers is read off it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from sealpushd.simulators.core import PushSimulator
from sealpushd.simulators.exchange import Exchange, HttpRequest


@dataclass
class Clock:
    """Time that only moves when told to."""

    time: datetime = datetime(2026, 1, 2, 3, 4, 0, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def advance(self, by: timedelta) -> None:
        self.time += by


@dataclass(eq=False)
class Wire:
    """One client's connection; keeps what is answered."""

    number: int = 1
    is_open: bool = True
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def raise_streams_max(self, streams_max: int) -> None:
        self.said.append(f"streams {streams_max}")

    def send_answer(self, stream_id: int, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool) -> None:
        self.answers.append((status, dict(headers), body))

    def goaway(self, reason: str, *, last_stream_id: int) -> None:
        self.said.append(f"goaway {reason} {last_stream_id}")

    def drop(self, *, gently: bool = False) -> None:
        self.is_open = False


class Ask(Protocol):
    def __call__(self, service: PushSimulator, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer to a POST; status 0: there was none. A dict is sent as JSON, text as a form."""
        ...


def ask(service: PushSimulator, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    wire = Wire()
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "application/x-www-form-urlencoded" if isinstance(body, str) else "application/json"
    fields = (("content-type", kind), *headers.items())
    service.connection_opened(wire)
    service.request_received(Exchange(wire, 1, HttpRequest("POST", "https", path, fields, content, len(content))))
    if not wire.answers:
        return 0, None
    [(status, _, answer)] = wire.answers
    return status, json.loads(answer) if answer else None
