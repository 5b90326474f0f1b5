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
from sealpush.v1 import publish_pb2
from sealpushd.platform import access, admission, telemetry
from sealpushd.platform.admission import Door, End, Pace, Party, Place
from sealpushd.platform.arrivals import Arrivals
from sealpushd.platform.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Rendered,
    ServiceError,
    Unauthenticated,
    render,
    to_refusal,
)
from sealpushd.platform.logging import request_ids
from sealpushd.platform.metrics import RPC_ANSWERS, RPC_IN_FLIGHT, RPC_SECONDS
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller, TokenVerifier

log = structlog.get_logger()

# No call is worth more of a server's time than this, whatever deadline its caller names.
DEADLINE_S_MAX: Final = 10.0
# A call that is cancelled so shortly before its deadline has met it.
_DEADLINE_SLACK_S: Final = 0.02
REQUEST_ID_KEY: Final = "x-request-id"
_STREAM_OVER: Final = "the access token of this stream has expired; sign in again and go on in a new stream"
_NO_SPAN: Final = contextlib.nullcontext()
_INTERNAL: Final = "internal error; the log has it under this request id"
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


def refused(error: Exception) -> publish_pb2.Refusal:
    """The error of one item, for its result, as a call would have been answered."""
    if not isinstance(error, ServiceError):
        log.error("an item failed by a bug", exc_info=error)
        error = ServiceError(_INTERNAL)
    return to_refusal(error)


class GuardedServer:
    """Stands between generated registration code and a gRPC server, and guards every method on the way."""

    def __init__(
        self, server: grpc.aio.Server, verifier: TokenVerifier, door: Door | None = None, arrivals: Arrivals | None = None
    ) -> None:
        self._server = server
        self._verifier = verifier
        self._door = door or Door()
        self._arrivals = arrivals or Arrivals()
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Unused: methods come by `add_registered_method_handlers`, which the generated code calls as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.services.append(service)
        guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            rule = access.ACCESS.get(method) or access.OTHERS.get(method)
            if rule is None:
                raise RuntimeError(f"{method} has no rule in the access table")
            # Whether a process is alive must be heard also when it has too much to do.
            door = self._door if method in access.ACCESS else None
            guarded[name] = _guard(handler, method, rule, self._verifier, door, self._arrivals)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))


async def _abort(context: Context, code: grpc.StatusCode, message: str, trailing: tuple[tuple[str, bytes], ...]) -> None:
    """End the call with an error. Always raises."""
    try:
        await context.abort(code, message, trailing)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as e:
        # Its caller has gone in this moment, and there is nobody to tell. gRPC would print a stack; a cancelled call it lets be.
        raise asyncio.CancelledError from e


def _guard(
    handler: Any, method: str, rule: access.Rule, verifier: TokenVerifier, door: Door | None, arrivals: Arrivals
) -> grpc.RpcMethodHandler[Any, Any]:
    is_mesh = isinstance(rule, access.Services)
    pace = Pace()
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

    def enter(context: Context) -> tuple[Mapping[str, Any], Party, str, float | None]:
        """The call's metadata, for whom it counts, where it comes from, and how many seconds a sender's token still lasts."""
        if door is not None:
            door.check_full(is_mesh=is_mesh)
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        given = metadata.get(REQUEST_ID_KEY, "")
        request_ids.set(tuple(given.split(",")) if _REQUEST_ID.fullmatch(given) else (uuid7().hex(),))
        address = address_of(context.peer())
        _address.set(address)
        caller, ends_at = access.admit(rule, metadata.get("authorization", ""), address, verifier)
        _caller.set(caller)
        party = admission.party_of(caller, address)
        if door is not None:
            # Before the request is received; a place is taken when it is whole.
            door.check(party)
        return metadata, party, address, ends_at - time.time() if isinstance(caller, SenderCaller) and ends_at is not None else None

    def answer(error: BaseException) -> Rendered:
        if isinstance(error, admission.Refused):
            return error.rendered
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded("the deadline ended before the work; try again with the same request id")
        if not isinstance(error, ServiceError):
            log.error("call failed by a bug", method=method, exc_info=error)
            error = ServiceError(_INTERNAL)
        return render(error)

    async def unary(_: object, context: Context) -> Any:
        start = time.perf_counter()
        code = grpc.StatusCode.OK
        place: Place | None = None
        end = End.FAILED
        ends_at = 0.0
        in_flight.inc()
        try:
            metadata, party, address, _ = enter(context)
            raw = await arrivals.receive(context.read, address)
            remaining = context.time_remaining()
            limit = DEADLINE_S_MAX if remaining is None else min(remaining, DEADLINE_S_MAX)
            if door is not None:
                place = door.enter(party, limit, pace)
                place.weigh(len(raw))
            ends_at = time.monotonic() + limit
            admission.working(place, ends_at)
            request = parse(raw)
            async with asyncio.timeout(limit):
                with telemetry.server_span(method, metadata) if telemetry.enabled() else _NO_SPAN:
                    response = await handler.unary_unary(request, context)
            end = End.DONE
            return response
        except asyncio.CancelledError as e:
            code = grpc.StatusCode.CANCELLED
            # gRPC cancels at the deadline, too.
            end = End.LATE if time.monotonic() >= ends_at - _DEADLINE_SLACK_S else End.by(e)
            raise
        except grpc.aio.InternalError as e:
            # What gRPC says where the caller went while its request was read: no bug, and nobody to tell.
            code = grpc.StatusCode.CANCELLED
            end = End.RESET
            raise asyncio.CancelledError from e
        except Exception as e:
            end = End.by(e)
            code, message, trailing = answer(e)
            await _abort(context, code, message, trailing)
            raise
        finally:
            if place is not None:
                place.leave(end)
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
            # A stream takes no place of its own (`admission.turn`); where there is none, `enter` refuses it: it would only wait.
            _, party, _, lifetime_s = enter(context)
            if door is not None:
                admission.visiting(door, party)
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
        except grpc.aio.InternalError as e:
            # As of a unary call.
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from e
        except Exception as e:
            if isinstance(e, TimeoutError) and life is not None and life.expired():
                e = Unauthenticated(_STREAM_OVER)
            code, message, trailing = answer(e)
            await _abort(context, code, message, trailing)
        finally:
            in_flight.dec()
            count(code, start)

    # gRPC looks at the function itself: only an asynchronous generator runs in the event loop.
    async def unary_stream(_: object, context: Context) -> AsyncGenerator[Message, None]:
        async def call() -> AsyncGenerator[Message, None]:
            request = parse(await arrivals.receive(context.read, _address.get()))
            async with contextlib.aclosing(handler.unary_stream(request, context)) as responses:
                async for response in responses:
                    yield response

        async with contextlib.aclosing(streaming(call, context)) as responses:
            async for response in responses:
                yield response

    async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[Message, None]:
        async with contextlib.aclosing(streaming(lambda: handler.stream_stream(parsed(requests), context), context)) as responses:
            async for response in responses:
                yield response

    # To gRPC every method streams its requests, which look the same on the wire: it calls a method that streams them before the first has
    # come, and one that does not when that is whole. So a stranger is refused by the metadata, whatever it sends behind them, and nothing
    # of it is kept. Requests stay bytes until then: a stranger's are never parsed, and what cannot be parsed gets a proper answer.
    serializers = {"request_deserializer": None, "response_serializer": handler.response_serializer}
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream_stream, **serializers)
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(unary_stream, **serializers)
    if handler.request_streaming:
        raise RuntimeError(f"{method}: client streaming is not used in this suite")
    return grpc.stream_unary_rpc_method_handler(unary, **serializers)
