"""What surrounds every call that a service answers: caller, access rule, deadline, request id, errors, metrics, trace.

The wrapping happens once, when a servicer is registered, so that a call pays for what it uses and not for a chain of
interceptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final
from urllib.parse import unquote

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from prometheus_client import Counter

from sealpush.ids import uuid7
from sealpushd.platform import access, telemetry
from sealpushd.platform.errors import DeadlineExceeded, InvalidRequest, ServiceError, Unauthenticated, render
from sealpushd.platform.logging import request_ids
from sealpushd.platform.metrics import RPC_ANSWERS, RPC_IN_FLIGHT, RPC_SECONDS
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller, TokenVerifier

log = structlog.get_logger()

# No call is worth more of a server's time than this, whatever deadline its caller names.
DEADLINE_S_MAX: Final = 10.0
REQUEST_ID_KEY: Final = "x-request-id"
_STREAM_OVER: Final = "the access token of this stream has expired; sign in again and go on in a new stream"
_REQUEST_ID = re.compile(r"[0-9A-Za-z._,:+-]{1,600}")

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
_address: ContextVar[str] = ContextVar("address", default="")

Context = grpc.aio.ServicerContext[Any, Any]


def require_sender() -> SenderCaller:
    """The sender that makes this call. The access table has made sure of it; another kind here is a bug."""
    caller = _caller.get()
    if not isinstance(caller, SenderCaller):
        raise TypeError("the access table lets a caller in that is no sender")
    return caller


def require_device() -> DeviceCaller:
    """The device that makes this call; as `require_sender`."""
    caller = _caller.get()
    if not isinstance(caller, DeviceCaller):
        raise TypeError("the access table lets a caller in that is no device")
    return caller


def require_service() -> ServiceCaller:
    """The service, or the operator, that makes this call; as `require_sender`."""
    caller = _caller.get()
    if not isinstance(caller, ServiceCaller):
        raise TypeError("the access table lets a caller in that is no service")
    return caller


def caller_address() -> str:
    """The caller's IP address, without port; empty for a Unix socket."""
    return _address.get()


def address_of(peer: str) -> str:
    """The IP address in a gRPC peer such as `ipv4:10.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    host, _, _ = unquote(rest).rpartition(":")
    return host.strip("[]")


class GuardedServer:
    """Stands between generated registration code and a gRPC server, and guards every method on the way."""

    def __init__(self, server: grpc.aio.Server, verifier: TokenVerifier) -> None:
        self._server = server
        self._verifier = verifier
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Unused: methods come by `add_registered_method_handlers`, which the generated code calls as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.services.append(service)
        guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            if method not in access.ACCESS:
                raise RuntimeError(f"{method} has no rule in the access table")
            guarded[name] = _guard(handler, method, access.ACCESS[method], self._verifier)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))


def _guard(handler: Any, method: str, rule: access.Rule, verifier: TokenVerifier) -> grpc.RpcMethodHandler[Any, Any]:
    in_flight = RPC_IN_FLIGHT.labels(method)
    # Label look-ups cost more than the counting: remember the children, which are made when first needed.
    seconds = RPC_SECONDS.labels(method)
    answers: dict[grpc.StatusCode, Counter] = {grpc.StatusCode.OK: RPC_ANSWERS.labels(method, grpc.StatusCode.OK.name)}

    def count(code: grpc.StatusCode, start: float) -> None:
        seconds.observe(time.perf_counter() - start)
        if code not in answers:
            answers[code] = RPC_ANSWERS.labels(method, code.name)
        answers[code].inc()

    def parse(raw: bytes) -> Any:
        try:
            return handler.request_deserializer(raw)
        except DecodeError as e:
            raise InvalidRequest("the bytes are not this method's request message (protobuf, texts in UTF-8)") from e

    async def parsed(requests: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
        async for raw in requests:
            yield parse(raw)

    def enter(context: Context) -> tuple[Mapping[str, str], float | None]:
        """The call's metadata, and how many seconds a sender's token still lasts."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = metadata.get(REQUEST_ID_KEY, "")
        request_ids.set(tuple(given.split(",")) if _REQUEST_ID.fullmatch(given) else (uuid7().hex(),))
        address = address_of(context.peer())
        _address.set(address)
        caller, ends_at = access.admit(rule, metadata.get("authorization", ""), address, verifier)
        _caller.set(caller)
        return metadata, ends_at - time.time() if isinstance(caller, SenderCaller) and ends_at is not None else None

    def answer(error: BaseException) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded("the deadline ended before the work; try again with the same request id")
        if not isinstance(error, ServiceError):
            log.error("call failed by a bug", method=method, exc_info=error)
            error = ServiceError("internal error; the log has it under this request id")
        return render(error)

    async def unary(raw: bytes, context: Context) -> Any:
        start = time.perf_counter()
        code = grpc.StatusCode.OK
        in_flight.inc()
        try:
            metadata, _ = enter(context)
            request = parse(raw)
            remaining = context.time_remaining()
            limit = DEADLINE_S_MAX if remaining is None else min(remaining, DEADLINE_S_MAX)
            async with asyncio.timeout(limit):
                if telemetry.enabled():
                    with telemetry.server_span(method, metadata):
                        return await handler.unary_unary(request, context)
                return await handler.unary_unary(request, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as e:
            code, message, trailing = answer(e)
            await context.abort(code, message, trailing)
            raise
        finally:
            in_flight.dec()
            count(code, start)

    async def streaming(call: Callable[[], AsyncGenerator[Message, None]], context: Context) -> AsyncGenerator[Message, None]:
        start = time.perf_counter()
        code = grpc.StatusCode.OK
        life: asyncio.Timeout | None = None
        in_flight.inc()
        try:
            # A sender's stream ends with its token: what was taken from the sender meanwhile, it must not go on using. Devices' streams
            # outlive theirs of 15 minutes, because signing in so often would cost more than the stream saves; what they get is sealed to
            # the device and ends with its registration. Services' tokens are about the moment of the call.
            _, lifetime_s = enter(context)
            ends_at = None if lifetime_s is None else asyncio.get_running_loop().time() + lifetime_s
            # Closed here, so that what a handler holds is let go at the end of its call and not when memory is collected.
            async with contextlib.aclosing(call()) as responses:
                while True:
                    # Not around the yield: a time-out that meets gRPC's writing would end the call there without a status, and its
                    # client would wait for ever.
                    async with asyncio.timeout_at(ends_at) as life:
                        response = await anext(responses, None)
                    if response is None:
                        break
                    if ends_at is not None and asyncio.get_running_loop().time() >= ends_at:
                        # A handler that never waits leaves a time-out no moment to act.
                        raise Unauthenticated(_STREAM_OVER)
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as e:
            if isinstance(e, TimeoutError) and life is not None and life.expired():
                e = Unauthenticated(_STREAM_OVER)
            code, message, trailing = answer(e)
            await context.abort(code, message, trailing)
        finally:
            in_flight.dec()
            count(code, start)

    # gRPC looks at the function itself: only an asynchronous generator runs in the event loop.
    async def unary_stream(raw: bytes, context: Context) -> AsyncGenerator[Message, None]:
        async with contextlib.aclosing(streaming(lambda: handler.unary_stream(parse(raw), context), context)) as responses:
            async for response in responses:
                yield response

    async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[Message, None]:
        async with contextlib.aclosing(streaming(lambda: handler.stream_stream(parsed(requests), context), context)) as responses:
            async for response in responses:
                yield response

    # Requests stay bytes until the caller is known: a stranger's are never parsed, and what cannot be parsed gets a proper answer.
    serializers = {"request_deserializer": None, "response_serializer": handler.response_serializer}
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream_stream, **serializers)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream, **serializers)
    if handler.request_streaming:
        raise RuntimeError(f"{method}: client streaming is not used in this suite")
    return grpc.unary_unary_rpc_method_handler(unary, **serializers)
