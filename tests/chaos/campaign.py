"""One campaign: messages at a steady rate, and processes that end one after the other and come back."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc

from bench.phones import Phones
from bench.suite import Suite
from sealpush.errors import CallFailed
from sealpush.ids import MessageId, RequestId
from sealpush.model import State
from sealpush.publication import Accepted, Publication, PublishOutcome, Refused, Unanswered
from sealpush.sender import Sender
from sealpush.v1 import common_pb2
from sealpush.v1.content_pb2 import Content
from sealpushd.up import health
from sealpushd.up.sdk import content_key

# Who is ended in which order. First those that a publish goes through, so that a short campaign is about them.
ORDER: Final = ("publishing", "fetch", "keys", "registration", "accounts", "dispatch")
PHONES: Final = 4  # on live streams, and as many that pushes wake
# Every so many messages is sealed by the sender.
SEALED_EVERY: Final = 4
# A process that comes back takes a second or two, a machine that does something else as well ten times that.
BACK_TIMEOUT_S: Final = 60.0
# Between one process that is back and the end of the next: the channels of everybody else find it within this.
SETTLE_S: Final = 1.0
# What was accepted last is delivered within moments; wake-ups whose lease died with their dispatcher take half a minute.
DELIVERED_TIMEOUT_S: Final = 90.0


@dataclass
class Report:
    """What one campaign saw."""

    processes: int
    signal: signal.Signals
    ended: Counter[str] = field(default_factory=Counter)  # processes, by service
    outcomes: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)  # of what was not accepted
    publish_ms: list[float] = field(default_factory=list)
    accepted: int = 0  # those whose answer came when they were asked about again included
    undelivered: int = 0
    unopened: int = 0
    opened_twice: int = 0
    refused_and_opened: int = 0

    @property
    def published(self) -> int:
        return self.outcomes.total()

    @property
    def failed(self) -> int:
        """Publishes that their sender had to do something about."""
        return self.published - self.outcomes["Accepted"]

    @property
    def ok(self) -> bool:
        """Nothing was lost, nothing came twice; and one of several processes may be restarted without a failed call."""
        kept = not (self.undelivered or self.unopened or self.opened_twice or self.refused_and_opened) and self.accepted > 0
        return kept and (self.failed == 0 or self.processes == 1 or self.signal is signal.SIGKILL)

    def summary(self) -> dict[str, Any]:
        return {
            "signal": self.signal.name,
            "processes": self.processes,
            "ended": dict(self.ended),
            "published": self.published,
            **{name.lower(): self.outcomes[name] for name in ("Unanswered", "Refused")},
            "accepted": self.accepted,
            "undelivered": self.undelivered,
            "unopened": self.unopened,
            "opened_twice": self.opened_twice,
            "refused_and_opened": self.refused_and_opened,
            "publish_p50_ms": round(statistics.median(self.publish_ms), 1),
            "publish_max_ms": round(max(self.publish_ms), 1),
            "why": dict(self.why),
            "ok": self.ok,
        }


def table(reports: Sequence[Report]) -> str:
    """The campaigns for people, one a line."""
    columns = [*(name for name in reports[0].summary() if name not in ("ended", "why"))]
    rows = [columns, *([str(report.summary()[name]) for name in columns] for report in reports)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


async def run(processes: int, number: signal.Signals, seconds: float, rate: float) -> Report:
    """Start the suite, end its processes for so long, and account for every message."""
    report = Report(processes, number)
    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(Suite.start(processes))
        streaming = await stack.enter_async_context(Phones.registered(suite, PHONES))
        woken = await stack.enter_async_context(Phones.registered(suite, PHONES))
        await stack.enter_async_context(streaming.streaming())
        await stack.enter_async_context(woken.woken())
        both = (streaming, woken)
        endpoints = suite.endpoints
        sender = Sender(suite.channels, endpoints.login, endpoints.password, signing_key=content_key(endpoints, ""))
        await sender.sign_in()
        traffic = _Traffic(sender, [number for phones in both for number in phones.numbers], rate, report)
        publishing = asyncio.create_task(traffic.run())
        try:
            await _roll(suite, number, time.monotonic() + seconds, report)
        finally:
            traffic.stop()
        outcomes = await publishing
        await _account(sender, both, outcomes, report)
    return report


class _Traffic:
    """Publishes at a steady rate, however long the answers take."""

    def __init__(self, sender: Sender, numbers: Sequence[str], rate: float, report: Report) -> None:
        self._sender = sender
        self._numbers = numbers
        self._interval_s = 1 / rate
        self._report = report
        self._stopped = asyncio.Event()
        self.publications: list[Publication] = []

    def stop(self) -> None:
        self._stopped.set()

    async def run(self) -> list[tuple[Publication, PublishOutcome]]:
        """Every publication with its outcome, once it was stopped."""
        tasks: list[asyncio.Task[tuple[Publication, PublishOutcome]]] = []
        due = time.monotonic()
        while not self._stopped.is_set():
            tasks.append(asyncio.create_task(self._publish(len(tasks))))
            due += self._interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return await asyncio.gather(*tasks)

    async def _publish(self, number: int) -> tuple[Publication, PublishOutcome]:
        content = Content(content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL, body=f"message {number}")
        publication = Publication.of(self._numbers[number % len(self._numbers)], content)
        began = time.monotonic()
        outcome = await _send(self._sender, publication, sealed=number % SEALED_EVERY == 0)
        self._report.publish_ms.append((time.monotonic() - began) * 1000)
        self._report.outcomes[type(outcome).__name__] += 1
        if not isinstance(outcome, Accepted):
            self._report.why[f"{type(outcome).__name__}: {getattr(outcome, 'message', outcome)}"] += 1
        return publication, outcome


async def _send(sender: Sender, publication: Publication, *, sealed: bool) -> PublishOutcome:
    if sealed:
        return await sender.publish_sealed(publication.recipient, publication.content, request_id=publication.request_id)
    return await sender.publish_one(publication)


async def _roll(suite: Suite, number: signal.Signals, until: float, report: Report) -> None:
    """End one process after the other, each when the one before answers again, round after round."""
    ports = {service: sorted(_mesh_ports(suite, service)) for service in ORDER}
    for turn in itertools.cycle(range(report.processes)):
        for service in ORDER:
            if time.monotonic() >= until:
                return
            port = ports[service][turn]
            pid = _mesh_ports(suite, service)[port]
            os.kill(pid, number)
            report.ended[service] += 1
            began = time.monotonic()
            await _until(partial(_has_ended, pid))
            ended_s = time.monotonic() - began
            await _until(partial(_serves, port))
            took = f"ended after {ended_s:.1f} s, back after {time.monotonic() - began:.1f} s"
            print(f"{service}, process {turn + 1}: {took}", file=sys.stderr, flush=True)
            await asyncio.sleep(SETTLE_S)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(BACK_TIMEOUT_S):
        while not await condition():  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.1)


async def _has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _mesh_ports(suite: Suite, service: str) -> dict[int, int]:
    """Mesh port to pid of the running processes of a service."""
    found: dict[int, int] = {}
    for pid, name in suite.processes().items():
        if name != service:
            continue
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ports = [int(each.partition(b"=")[2]) for each in environment if each.startswith(b"SEALPUSH_MESH_PORT=")]
        if ports:
            found[ports[0]] = pid
    return found


async def _serves(port: int) -> bool:
    try:
        return await health.ask(f"127.0.0.1:{port}", timeout_s=1) == "SERVING"
    except grpc.aio.AioRpcError:
        return False


async def _account(sender: Sender, both: Iterable[Phones], outcomes: Sequence[tuple[Publication, PublishOutcome]], report: Report) -> None:
    """What became of every message: its status, and how often a phone handed it to its app."""
    accepted: dict[MessageId, RequestId] = {}
    bodies: dict[RequestId, str] = {}
    refused: set[str] = set()
    for number, (publication, outcome) in enumerate(outcomes):
        bodies[publication.request_id] = publication.content.body
        if isinstance(outcome, Unanswered):
            # As its message says: published again with the same request id, to know.
            outcome = await _send(sender, publication, sealed=number % SEALED_EVERY == 0)
        if isinstance(outcome, Accepted):
            accepted[outcome.message_id] = publication.request_id
        elif isinstance(outcome, Refused):
            refused.add(publication.content.body)
    report.accepted = len(accepted)
    opened: Counter[str] = Counter()
    deadline = time.monotonic() + DELIVERED_TIMEOUT_S
    while True:
        for phones in both:
            for phone in phones.phones:
                try:
                    opened.update(message.content.body for message in await phone.device.drain())
                except CallFailed as error:
                    print(f"a phone could not ask: {error}", file=sys.stderr)
            while not phones.opened.empty():
                opened[phones.opened.get_nowait().content.body] += 1
        statuses = await sender.statuses(accepted)
        report.undelivered = sum(message_id not in statuses or statuses[message_id].state is not State.DELIVERED for message_id in accepted)
        report.unopened = sum(not opened[bodies[request_id]] for request_id in accepted.values())
        report.opened_twice = sum(count > 1 for count in opened.values())
        report.refused_and_opened = sum(body in opened for body in refused)
        if not (report.undelivered or report.unopened) or time.monotonic() > deadline:
            return
        await asyncio.sleep(0.5)
