"""Valkey only speeds things up: every call here has a short deadline, and a failure is counted and gone on without.

All key names stand in this module. Every key has a time to live.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from sealpushd.platform.metrics import VALKEY_ERRORS
from sealpushd.platform.outage import Outage

# Of a whole call, a new connection and a second try included. Valkey is on the same machine or rack: what takes longer is not worth
# waiting for.
TIMEOUT_S: Final = 0.25
PRESENCE_TTL_S: Final = 60
RECONNECT_PAUSE_S: Final = 0.5

# Channels: devices that have something new; wake-ups that wait for dispatch; streams that a newer one ended; devices
# whose installation has ended.
CHANNEL_DEVICES: Final = "sealpush:devices"
CHANNEL_QUEUE: Final = "sealpush:queue"
CHANNEL_STREAMS: Final = "sealpush:streams"
CHANNEL_DISMISSED: Final = "sealpush:dismissed"


def presence_key(device_id: bytes) -> bytes:
    return b"sealpush:presence:" + device_id


def limit_key(name: str, subject: str, window: int) -> str:
    """Key of a rate limit's window. The subject may be a phone number or an address: only its hash is stored."""
    digest = hashlib.blake2b(f"{name}\0{subject}".encode(), digest_size=16).hexdigest()
    return f"sealpush:limit:{name}:{digest}:{window}"


_Answer = TypeVar("_Answer")

_FAILURES = (RedisError, OSError, TimeoutError)


class Valkey:
    """The few things services use Valkey for. Nothing here raises because Valkey is away."""

    def __init__(self, url: str) -> None:
        # Without the client's own time-out: with one, redis-py writes by asyncio.wait_for, which in Python 3.11 loses a cancellation that
        # meets the result. A task of a service that ends would go on for ever.
        self._client: Redis = Redis.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            health_check_interval=0,
        )
        self._url = url
        self._calls: set[asyncio.Task[Any]] = set()
        self._outage = Outage("valkey", gone="Valkey is away: everything goes on without it", back="Valkey is back")

    async def aclose(self) -> None:
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._client.aclose()

    async def _go_on_without(self, use: str, call: Callable[[], Awaitable[_Answer]], otherwise: _Answer) -> _Answer:
        """What the call answers, or `otherwise`. It runs to its end, or its time-out, also when who waits for it is cancelled: a
        connection that is left in the middle of an answer is of no use to anybody, and another one costs more than the answer."""

        async def answer() -> _Answer:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    answered = await call()
            except _FAILURES as e:
                VALKEY_ERRORS.labels(use).inc()
                self._outage.failed(e)
                return otherwise
            self._outage.worked()
            return answered

        task = asyncio.create_task(answer())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)

    async def ping(self) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return bool(await self._client.ping())
        except _FAILURES:
            return False

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens; lost when nobody does."""

        async def publish() -> None:
            await self._client.publish(channel, message)

        await self._go_on_without("publish", publish, None)

    async def present(self, device_ids: Sequence[bytes]) -> list[bool]:
        """Which devices hold a live stream, as far as is known; all False when Valkey is away."""

        async def look() -> list[bool]:
            values: list[Any] = await self._client.mget([presence_key(device_id) for device_id in device_ids])
            return [value is not None for value in values]

        return await self._go_on_without("presence", look, [False] * len(device_ids))

    async def set_present(self, device_ids: Sequence[bytes], stream_id: bytes) -> None:
        async def set_all() -> None:
            async with self._client.pipeline(transaction=False) as pipe:
                for device_id in device_ids:
                    pipe.set(presence_key(device_id), stream_id, ex=PRESENCE_TTL_S)
                await pipe.execute()

        await self._go_on_without("presence", set_all, None)

    async def clear_present(self, device_id: bytes) -> None:
        async def delete() -> None:
            await self._client.delete(presence_key(device_id))

        await self._go_on_without("presence", delete, None)

    async def count(self, keys: Sequence[tuple[str, int]], add: int = 1) -> list[int] | None:
        """Add to each key, which lives for so many seconds; what was added to each so far, in order, this call included. 0 reads.

        None when Valkey is away.
        """

        async def count() -> list[int] | None:
            async with self._client.pipeline(transaction=True) as pipe:
                for key, ttl_s in keys:
                    pipe.incrby(key, add)
                    pipe.expire(key, ttl_s, nx=True)
                answers = await pipe.execute()
            return [int(counted) for counted in answers[::2]]

        return await self._go_on_without("limit", count, None)

    async def listen(self, *channels: str) -> AsyncIterator[tuple[str, bytes]]:
        """Messages of channels, for ever; connects again when the connection is lost. What came meanwhile is lost."""
        outage = Outage("valkey channels", gone="no channel of Valkey: notices are lost", back="Valkey's channels are heard again")
        while True:
            # A subscription is quiet for long: its reads must not end by the short time-out of the other calls.
            client: Redis = Redis.from_url(self._url, socket_timeout=None, socket_connect_timeout=TIMEOUT_S)
            try:
                async with client.pubsub() as pubsub:
                    await pubsub.subscribe(*channels)
                    outage.worked()
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            yield message["channel"].decode(), message["data"]
            except _FAILURES as e:
                VALKEY_ERRORS.labels("listen").inc()
                outage.failed(e)
            finally:
                await client.aclose()
            await asyncio.sleep(RECONNECT_PAUSE_S)
