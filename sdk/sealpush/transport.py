"""Where the services are, the connections to them, and how one call is made: token, deadline, retry, errors.

One `Channels` serves thousands of devices and senders in a process: an HTTP/2 connection per service carries them all.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as WireMessage
from google.rpc import error_details_pb2, status_pb2

from sealpush import errors
from sealpush.errors import CallFailed, Unauthenticated, WrongCode
from sealpush.ids import uuid7
from sealpush.retry import Clock, Deadline, Random, RetryPolicy, retrying
from sealpush.throttle import Throttle
from sealpush.v1.accounts_pb2_grpc import AccountsStub
from sealpush.v1.keys_pb2_grpc import KeysStub
from sealpush.v1.messages_pb2_grpc import MessagesStub
from sealpush.v1.publish_pb2_grpc import PublishingStub
from sealpush.v1.registration_pb2_grpc import RegistrationStub

if TYPE_CHECKING:  # only the stubs know these
    from sealpush.v1.accounts_pb2_grpc import AccountsAsyncStub
    from sealpush.v1.keys_pb2_grpc import KeysAsyncStub
    from sealpush.v1.messages_pb2_grpc import MessagesAsyncStub
    from sealpush.v1.publish_pb2_grpc import PublishingAsyncStub
    from sealpush.v1.registration_pb2_grpc import RegistrationAsyncStub

MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024  # above the 2 MiB that batches are bounded by: a bound on accidents, not on use
TIMEOUT_S: Final = 10.0  # one attempt; the services cap theirs at the same
HELD_BACK_S: Final = 1.0  # the services ask those whom they refuse for a pause of one to two seconds, and so does the SDK itself
TOKEN_MARGIN_S: Final = 60.0  # a token is renewed this long before its end, so that none ends on the way

_DOMAIN: Final = "sealpush"
_DETAILS_KEY: Final = "grpc-status-details-bin"
# gRPC's own words where a request is larger than it sends, or the service takes: no attempt is any better.
_TOO_LARGE: Final = ("CLIENT: Sent message larger than max", "SERVER: Received message larger than max")
# What gRPC makes of a write on a stream that the other side has just ended: the real status is lost.
_LOST_STATUS: Final = "Internal error from Core"
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.lb_policy_name", "round_robin"),
    # Mobile networks forget an idle connection after about a minute, without a word.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without this, gRPC waits a minute for the answer to its ping (seen with 1.8x).
    ("grpc.http2.ping_timeout_ms", 10_000),
    # The services end a connection without a call after a minute. Whoever goes first has no call that meets the end.
    ("grpc.client_idle_timeout_ms", 45_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # How long one attempt to connect may take: three round trips of a poor mobile network, and no pause where it fails at once.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # Well below a call's deadline, so that each call that waits for a service to come back sees it come back.
    ("grpc.max_reconnect_backoff_ms", 4_000),
]

SERVICES: Final = ("accounts", "registration", "keys", "publishing", "messages")

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where each public service listens, as "host:port", over TLS.

    Several processes of a service, all of them used: "dns:///host:port", a name with an address for each, or
    "ipv4:address:port,address:port", where each certificate names the first address.

    `ca_pem` is a private certificate authority's certificate; without it the well-known ones count. `insecure` switches
    TLS off: for tests within one machine only.
    """

    accounts: str
    registration: str
    keys: str
    publishing: str
    messages: str
    ca_pem: bytes | None = field(default=None, repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in SERVICES:
            if not getattr(self, name):
                raise ValueError(f"endpoints: {name} needs an address, such as push.example:443")

    @classmethod
    def single(cls, address: str, *, ca_pem: bytes | None = None, insecure: bool = False) -> Self:
        """All services behind one gateway."""
        return cls(address, address, address, address, address, ca_pem, insecure)

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """The endpoints in a JSON object: the five names, or "gateway" for all of them; optional "ca_pem".

        A name beside "gateway" overrides it; names that are not known are left for newer releases. TLS cannot be
        switched off this way. Raises ValueError.
        """
        try:
            read = json.loads(text)
        except ValueError as error:
            raise ValueError(f"endpoints must be a JSON object: {error}") from None
        if not isinstance(read, dict):
            raise ValueError("endpoints must be a JSON object of names and addresses")
        given: list[Any] = [read.get(name, read.get("gateway", "")) for name in SERVICES]
        ca_pem = read.get("ca_pem")
        if not all(isinstance(address, str) for address in given) or not isinstance(ca_pem, str | None):
            raise ValueError("endpoints: addresses and ca_pem are text")
        accounts, registration, keys, publishing, messages = given
        return cls(accounts, registration, keys, publishing, messages, ca_pem.encode() if ca_pem else None)


class Channels:
    """The connections to the services, opened when first used, shared by everybody who is given this object.

    Belongs to one event loop. Whoever makes it closes it: `async with Channels(endpoints) as channels`.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, Any] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections and the calls on them."""
        self._closed = True
        channels = list(self._channels.values())
        self._channels.clear()
        self._stubs.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    @property
    def accounts(self) -> "AccountsAsyncStub":
        stub: AccountsAsyncStub = self._stub("accounts", AccountsStub)
        return stub

    @property
    def registration(self) -> "RegistrationAsyncStub":
        stub: RegistrationAsyncStub = self._stub("registration", RegistrationStub)
        return stub

    @property
    def keys(self) -> "KeysAsyncStub":
        stub: KeysAsyncStub = self._stub("keys", KeysStub)
        return stub

    @property
    def publishing(self) -> "PublishingAsyncStub":
        stub: PublishingAsyncStub = self._stub("publishing", PublishingStub)
        return stub

    @property
    def messages(self) -> "MessagesAsyncStub":
        stub: MessagesAsyncStub = self._stub("messages", MessagesStub)
        return stub

    def _stub(self, service: str, kind: Any) -> Any:
        stub = self._stubs.get(service)
        if stub is None:
            stub = self._stubs[service] = kind(self._channel(getattr(self.endpoints, service)))
        return stub

    def check_open(self) -> None:
        """Raises RuntimeError once they are closed."""
        if self._closed:
            raise RuntimeError("these channels are closed; make new ones")

    def _channel(self, address: str) -> grpc.aio.Channel:
        self.check_open()
        channel = self._channels.get(address)
        if channel is None:
            options = list(_OPTIONS)
            scheme, _, addresses = address.partition(":")
            if scheme in ("ipv4", "ipv6"):
                # gRPC would look for the whole list in the certificate.
                options.append(("grpc.default_authority", addresses.partition(",")[0]))
            if self.endpoints.insecure:
                channel = grpc.aio.insecure_channel(address, options=options)
            else:
                credentials = grpc.ssl_channel_credentials(root_certificates=self.endpoints.ca_pem)
                channel = grpc.aio.secure_channel(address, credentials, options=options)
            self._channels[address] = channel
        return channel


_KINDS: Final[dict[grpc.StatusCode, type[CallFailed]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    # Cancelled by the other side: a server or proxy that goes away.
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
}


def call_failed(error: grpc.aio.AioRpcError) -> CallFailed:
    """A gRPC error with its google.rpc.Status details, in this package's words."""
    info = error_details_pb2.ErrorInfo()
    fields_at_fault = error_details_pb2.BadRequest()
    pause = error_details_pb2.RetryInfo()
    retry_after_s = None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Is(info.DESCRIPTOR):
                    detail.Unpack(info)
                elif detail.Is(fields_at_fault.DESCRIPTOR):
                    detail.Unpack(fields_at_fault)
                elif detail.Is(pause.DESCRIPTOR) and detail.Unpack(pause):
                    retry_after_s = max(0.0, pause.retry_delay.ToTimedelta().total_seconds())
        except DecodeError:
            continue  # details help; an answer without them is an answer
    ours = info.domain == _DOMAIN
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (error.details() or "").startswith(_TOO_LARGE):
        return errors.InvalidRequest(
            f"the request is too large, nothing was done; split it or make it smaller ({error.details()})",
            code=grpc.StatusCode.INVALID_ARGUMENT.name,
            server_reason="REQUEST_TOO_LARGE",
        )
    metadata = dict(info.metadata) if ours else {}
    kind = _KINDS.get(error.code(), errors.ServerFault)
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _LOST_STATUS:
        kind = errors.Unavailable
    if kind is errors.InvalidRequest and "attempts_left" in metadata:
        kind = WrongCode
    if kind is errors.FailedPrecondition and ours and info.reason == errors.RegistrationLocked.reason:
        kind = errors.RegistrationLocked
    code = error.code().name
    return kind(
        error.details() or f"the service answered {code} without a word",
        code=code,
        server_reason=info.reason if ours else "",
        field=next((each.field for each in fields_at_fault.field_violations), ""),
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


@contextlib.contextmanager
def cancellation_kept() -> Iterator[None]:
    """A block that reads a call which streams both ways; a cancellation ends it, always.

    gRPC loses one that meets the end of such a call before its first message, and raises how the call ended. Whoever then connects again
    would go on for ever, and with it whoever waits for its end.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task is not None else 0
    try:
        yield
    except grpc.aio.AioRpcError:
        if task is not None and task.cancelling() > cancellations:
            raise asyncio.CancelledError from None
        raise
    if task is not None and task.cancelling() > cancellations:
        raise asyncio.CancelledError


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token and for how long it is good from the moment it was got."""

    text: str = field(repr=False)
    lifetime_s: float


class TokenHolder:
    """The present token: got on first use, renewed before it ends, by one caller at a time."""

    __slots__ = ("_clock", "_lock", "_obtain", "_renew_at", "_token")

    def __init__(self, obtain: Callable[[Deadline], Awaitable[Token]], clock: Clock) -> None:
        self._obtain = obtain
        self._clock = clock
        self._lock = asyncio.Lock()
        self._token = ""
        self._renew_at = 0.0

    @property
    def held(self) -> bool:
        """Whether there is a token that need not be renewed yet."""
        return bool(self._token) and self._clock.monotonic() < self._renew_at

    async def get(self, deadline: Deadline) -> str:
        """A token good for a while. Raises CallFailed."""
        if not self.held:
            async with self._lock:
                if not self.held:
                    await self._renew(deadline)
        return self._token

    async def renew(self, deadline: Deadline) -> None:
        """Get a new token, whatever the present one is worth."""
        async with self._lock:
            await self._renew(deadline)

    async def _renew(self, deadline: Deadline) -> None:
        token = await self._obtain(deadline)
        # A local clock far off makes the lifetime look spent: then try it, the service's refusal renews it.
        lifetime_s = token.lifetime_s if token.lifetime_s > 0 else TOKEN_MARGIN_S
        self._token = token.text
        self._renew_at = self._clock.monotonic() + lifetime_s - min(TOKEN_MARGIN_S, lifetime_s / 5)

    def drop(self, text: str) -> None:
        """Forget this token; one got meanwhile stays."""
        if self._token == text:
            self._token = ""


class UnaryMethod(Protocol[Answer_co]):
    """A unary method of a stub."""

    def __call__(self, request: Any, /, *, timeout: float | None = None, metadata: Any = None) -> Awaitable[Answer_co]: ...


class Calls:
    """Makes calls with everything a call needs. Every error is a CallFailed.

    A service that refuses calls as too many is sent few of those that follow, until it accepts more. The rest is refused here: Overloaded.
    """

    __slots__ = ("_throttles", "clock", "policy", "random", "timeout_s")

    def __init__(self, clock: Clock, random: Random, policy: RetryPolicy, timeout_s: float = TIMEOUT_S) -> None:
        if timeout_s <= 0:
            raise ValueError("timeout_s must be positive: every call has a deadline")
        self.clock = clock
        self.random = random
        self.policy = policy
        self.timeout_s = timeout_s
        # By the proto file of a request, which holds one service.
        self._throttles: dict[str, Throttle] = {}

    async def call(
        self,
        method: UnaryMethod[Answer],
        request: WireMessage,
        *,
        deadline: Deadline,
        token: TokenHolder | None = None,
    ) -> Answer:
        """The answer; repeats the same request while errors are retryable and the deadline allows."""
        request_id = uuid7().hex()
        return await retrying(
            lambda: self.once(method, request, deadline=deadline, token=token, request_id=request_id),
            deadline=deadline,
            policy=self.policy,
            random=self.random,
        )

    async def once(
        self,
        method: UnaryMethod[Answer],
        request: WireMessage,
        *,
        deadline: Deadline,
        token: TokenHolder | None = None,
        request_id: str = "",
    ) -> Answer:
        """The answer to one attempt. A token that the service refuses is renewed once."""
        throttle = self._throttles.setdefault(request.DESCRIPTOR.file.name, Throttle())
        for renewed in (False, True):
            bearer = await token.get(deadline) if token is not None else ""
            if throttle.holds_back(self.clock.monotonic(), self.random):
                raise errors.Overloaded(
                    "not sent: the service refuses too much of what this client sends; try again after the time in retry_after_s",
                    code=grpc.StatusCode.RESOURCE_EXHAUSTED.name,
                    server_reason=errors.Overloaded.reason,
                    retry_after_s=HELD_BACK_S + self.random(),
                )
            try:
                answer = await method(
                    request,
                    timeout=deadline.timeout_s(self.timeout_s),
                    metadata=call_metadata(bearer, request_id or uuid7().hex()),
                )
                throttle.answered(self.clock.monotonic(), accepted=True)
                return answer
            except grpc.aio.AioRpcError as error:
                failure = call_failed(error)
                if failure.server_reason:
                    # Without the service's own word nothing is known of how much it accepts.
                    throttle.answered(self.clock.monotonic(), accepted=failure.server_reason != errors.Overloaded.reason)
                if not isinstance(failure, Unauthenticated) or token is None or renewed:
                    raise failure from error
                token.drop(bearer)
        raise AssertionError("unreachable: the second round returns or raises")


def call_metadata(bearer: str, request_id: str) -> Metadata:
    """What travels beside a request."""
    if not bearer:
        return (("x-request-id", request_id),)
    return (("authorization", f"Bearer {bearer}"), ("x-request-id", request_id))
