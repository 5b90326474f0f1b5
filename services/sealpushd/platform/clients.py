"""Calls to the other services of the mesh: one channel a service, own credentials, deadline, request ids, natural batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from sealpushd.platform import admission, telemetry
from sealpushd.platform.batching import NaturalBatcher
from sealpushd.platform.errors import DETAILS_KEY, from_mesh
from sealpushd.platform.logging import REQUEST_IDS_MAX, request_ids
from sealpushd.platform.metrics import MESH_BATCH_ITEMS
from sealpushd.platform.outage import Outage
from sealpushd.platform.rpc import DEADLINE_S_MAX, REQUEST_ID_KEY
from sealpushd.platform.tokens import ServiceKey

# Above the 2 MiB that batches are bounded by: a bound on accidents, not on use.
MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024

CHANNEL_OPTIONS: Final = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without this, gRPC waits a minute for the answer to its ping (seen with 1.8x).
    ("grpc.http2.ping_timeout_ms", 5_000),
    # A peer that restarts is back within a second: do not wait longer than that to find out.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt to connect may take: on a busy machine longer than on a quick one. No pause where it fails at once.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

# Half of what a call from outside may take: what gathers behind a batch that a silent peer holds has its own turn within the time of its
# callers. An answer takes milliseconds.
BATCH_DEADLINE_S: Final = DEADLINE_S_MAX / 2

# What gRPC says in the place of a peer that does not.
_SILENCE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

Item = TypeVar("Item")
Result = TypeVar("Result")


class MeshChannel:
    """A channel to one service that carries this service's credentials. `logs_outages`: not where a command tells a person what failed."""

    def __init__(self, peer: str, address: str, key: ServiceKey, *, logs_outages: bool = True) -> None:
        self.peer = peer
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._key = key
        self._outage: Outage | None = None
        if logs_outages:
            self._outage = Outage(f"mesh {peer}", gone="another service does not answer", back="another service answers again", peer=peer)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Credentials, request ids and trace context of the present work."""
        ids = request_ids.get()
        entries = [("authorization", f"Bearer {self._key.mesh_token()}")]
        if ids:
            entries.append((REQUEST_ID_KEY, ",".join(ids[:REQUEST_IDS_MAX])))
        if telemetry.enabled():
            entries.extend(telemetry.outgoing_metadata().items())
        return tuple(entries)

    async def call(self, method: Any, request: Message, timeout_s: float = DEADLINE_S_MAX) -> Any:
        """The answer of a unary call; raises the ServiceError that the peer's answer stands for.

        Whoever this work is for waits no longer than its own deadline, and so does the peer.
        """
        timeout_s = admission.remaining_s(timeout_s)
        try:
            answer = await method(request, timeout=timeout_s, metadata=self.metadata())
        except grpc.aio.AioRpcError as e:
            is_silent = e.code() in _SILENCE and not any(key == DETAILS_KEY for key, _ in e.trailing_metadata() or ())
            # Any other is an answer, and be it a refusal: what is wrong there is said there.
            self._note(e if is_silent else None)
            raise from_mesh(e, self.peer) from e
        self._note(None)
        return answer

    def _note(self, silence: grpc.aio.AioRpcError | None) -> None:
        if self._outage is not None:
            if silence is not None:
                self._outage.failed(silence)
            else:
                self._outage.worked()

    async def aclose(self) -> None:
        await self.channel.close()


class BatchedCall(Generic[Item, Result]):
    """A batch RPC of another service, called with single items or many.

    `build` makes the request of a batch, `results` takes the results out of the answer, in the items' order; an exception in the place of
    one fails that item. What the peer refuses a batch for fails alone as well: the rest is asked again without it.
    """

    def __init__(
        self,
        channel: MeshChannel,
        method: Any,
        build: Callable[[Sequence[Item]], Message],
        results: Callable[[Any], Sequence[Result | Exception]],
        *,
        in_flight_max: int = 1,
        weigh: Callable[[Item], int] | None = None,
    ) -> None:
        async def flush(items: Sequence[tuple[Item, tuple[str, ...]]]) -> Sequence[Result | Exception]:
            batch_items.observe(len(items))
            distinct = dict.fromkeys(one for _, ids in items for one in ids)
            request_ids.set(tuple(distinct)[:REQUEST_IDS_MAX])
            return results(await channel.call(method, build([item for item, _ in items]), BATCH_DEADLINE_S))

        name = getattr(method, "_method", b"")
        batch_items = MESH_BATCH_ITEMS.labels(name.decode() if isinstance(name, bytes) else str(name))
        self._batcher: NaturalBatcher[tuple[Item, tuple[str, ...]], Result] = NaturalBatcher(
            flush, in_flight_max=in_flight_max, weigh=None if weigh is None else lambda pair: weigh(pair[0])
        )

    async def submit(self, item: Item) -> Result:
        return await self._batcher.submit((item, request_ids.get()))

    async def submit_many(self, items: Sequence[Item]) -> list[Result]:
        ids = request_ids.get()
        return await self._batcher.submit_many([(item, ids) for item in items])

    async def submit_each(self, items: Sequence[Item]) -> list[Result | Exception]:
        """As `submit_many`; an item that failed has its error as result."""
        ids = request_ids.get()
        return await self._batcher.submit_each([(item, ids) for item in items])

    async def aclose(self) -> None:
        await self._batcher.aclose()
