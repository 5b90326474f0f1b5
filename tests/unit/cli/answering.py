"""Services that answer what a test says, on a real port, so that the command line can be read as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from sealpushd.platform.errors import ServiceError, render
from sealpushd.v1 import (
    administration_pb2,
    administration_pb2_grpc,
    lanes_pb2,
    lanes_pb2_grpc,
    mailbox_pb2,
    mailbox_pb2_grpc,
    providers_pb2,
    providers_pb2_grpc,
    sealing_pb2,
    sealing_pb2_grpc,
)


@dataclass
class Answers:
    """What is answered, by method: a message, an error, or several in turn. And what was asked."""

    given: dict[str, Any] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(request)
        self.authorizations |= {str(value) for key, value in context.invocation_metadata() if key == "authorization"}
        answer = self.given[method]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, ServiceError):
            code, message, trailing = render(answer)
            context.set_trailing_metadata(trailing)
            context.abort(code, message)
        return answer


class _Servicer:
    """Every method of every service."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def __getattr__(self, method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        return lambda request, context: self._answers.answer(method, request, context)


@dataclass
class Installation:
    """An installation, and the options that name it."""

    answers: Answers
    address: str
    key: Path

    @property
    def dispatch(self) -> list[str]:
        return ["--operator-key", str(self.key), "--dispatch", self.address]

    @property
    def accounts(self) -> list[str]:
        return ["--operator-key", str(self.key), "--accounts", self.address, "--keys", self.address]

    @property
    def both(self) -> list[str]:
        return [*self.dispatch, "--fetch", self.address]


@contextmanager
def answering(folder: Path) -> Iterator[Installation]:
    """Accounts, keys, dispatch and fetch on one port."""
    answers = Answers(
        {
            "PutProvider": providers_pb2.PutProviderResponse(),
            "ListProviders": providers_pb2.ListProvidersResponse(),
            "RemoveProvider": providers_pb2.RemoveProviderResponse(),
            "ListLanes": lanes_pb2.ListLanesResponse(),
            "PauseLane": lanes_pb2.PauseLaneResponse(),
            "ResumeLane": lanes_pb2.ResumeLaneResponse(),
            "GetQueues": mailbox_pb2.GetQueuesResponse(),
            "PutSender": administration_pb2.PutSenderResponse(),
            "PutPlatformEntry": administration_pb2.PutPlatformEntryResponse(),
            "PutRevocations": administration_pb2.PutRevocationsResponse(),
            "GetEndingEntries": administration_pb2.GetEndingEntriesResponse(),
            "GetPlatformKey": sealing_pb2.GetPlatformKeyResponse(),
        }
    )
    key = folder / "operator.key"
    key.write_text("07" * 32 + "\n")
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        servicer: Any = _Servicer(answers)
        providers_pb2_grpc.add_ProvidersServicer_to_server(servicer, server)
        lanes_pb2_grpc.add_LanesServicer_to_server(servicer, server)
        mailbox_pb2_grpc.add_MailboxServicer_to_server(servicer, server)
        administration_pb2_grpc.add_AdministrationServicer_to_server(servicer, server)
        sealing_pb2_grpc.add_SealingServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield Installation(answers, f"127.0.0.1:{port}", key)
        finally:
            server.stop(None).wait()
