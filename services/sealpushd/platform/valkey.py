"""Valkey only speeds things up: every call here has a short deadline, and a failure is counted and gone on without.

All key names stand in this module. Every key has a time to live.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from sealpushd.platform.metrics import VALKEY_ERRORS

log = structlog.get_logger()

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

    async def aclose(self) -> None:
        await self._client.aclose()

    async def ping(self) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return bool(await self._client.ping())
        except _FAILURES:
            return False

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens; lost when nobody does."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.publish(channel, message)
        except _FAILURES:
            VALKEY_ERRORS.labels("publish").inc()

    async def present(self, device_ids: Sequence[bytes]) -> list[bool]:
        """Which devices hold a live stream, as far as is known; all False when Valkey is away."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                values: list[Any] = await self._client.mget([presence_key(device_id) for device_id in device_ids])
        except _FAILURES:
            VALKEY_ERRORS.labels("presence").inc()
            return [False] * len(device_ids)
        return [value is not None for value in values]

    async def set_present(self, device_ids: Sequence[bytes], stream_id: bytes) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._client.pipeline(transaction=False) as pipe:
                for device_id in device_ids:
                    pipe.set(presence_key(device_id), stream_id, ex=PRESENCE_TTL_S)
                await pipe.execute()
        except _FAILURES:
            VALKEY_ERRORS.labels("presence").inc()

    async def clear_present(self, device_id: bytes) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.delete(presence_key(device_id))
        except _FAILURES:
            VALKEY_ERRORS.labels("presence").inc()

    async def count(self, keys: Sequence[tuple[str, int]], add: int = 1) -> list[int] | None:
        """Add to each key, which lives for so many seconds; what was added to each so far, in order, this call included. 0 reads.

        None when Valkey is away.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S), self._client.pipeline(transaction=True) as pipe:
                for key, ttl_s in keys:
                    pipe.incrby(key, add)
                    pipe.expire(key, ttl_s, nx=True)
                answers = await pipe.execute()
        except _FAILURES:
            VALKEY_ERRORS.labels("limit").inc()
            return None
        return [int(counted) for counted in answers[::2]]

    async def listen(self, *channels: str) -> AsyncIterator[tuple[str, bytes]]:
        """Messages of channels, for ever; connects again when the connection is lost. What came meanwhile is lost."""
        while True:
            # A subscription is quiet for long: its reads must not end by the short time-out of the other calls.
            client: Redis = Redis.from_url(self._url, socket_timeout=None, socket_connect_timeout=TIMEOUT_S)
            try:
                async with client.pubsub() as pubsub:
                    await pubsub.subscribe(*channels)
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            yield message["channel"].decode(), message["data"]
            except _FAILURES:
                VALKEY_ERRORS.labels("listen").inc()
            finally:
                await client.aclose()
            await asyncio.sleep(RECONNECT_PAUSE_S)
