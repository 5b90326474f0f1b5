"""Argon2id over what people remember: passwords, PINs. Slow on purpose, so in a thread and a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, Self, TypeVar

from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id

from sealpushd.platform.errors import Overloaded

Work = ParamSpec("Work")
Result = TypeVar("Result")

# Each hash takes 64 MiB and a core for a twentieth of a second. As few at once also bound by how much parallel guesses overshoot a limit.
HASHES_AT_ONCE: Final = 2
# About two seconds of work: who comes later is better off coming again.
HASHES_WAITING_MAX: Final = 64


def hash_password(password: bytes) -> bytes:
    """A salted hash to store. Takes its time: from a coroutine by `Argon2.hash`."""
    return argon2id.str(password, opslimit=argon2id.OPSLIMIT_INTERACTIVE, memlimit=argon2id.MEMLIMIT_INTERACTIVE)


def is_password(password_hash: bytes, password: bytes) -> bool:
    """Whether the hash is of this password. Takes as long as making it."""
    try:
        return argon2id.verify(password_hash, password)
    except InvalidkeyError:
        return False


class Argon2:
    """Turns at hashing: `async with argon2: await argon2.is_password(...)`. Entering raises Overloaded when too many wait already."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(HASHES_AT_ONCE)
        self._waiting = 0

    async def __aenter__(self) -> Self:
        if self._waiting >= HASHES_WAITING_MAX:
            raise Overloaded("too many passwords are being checked at once; try again in a second")
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._turns.release()

    async def hash(self, password: bytes) -> bytes:
        return await self._in_thread(hash_password, password)

    async def is_password(self, password_hash: bytes, password: bytes) -> bool:
        return await self._in_thread(is_password, password_hash, password)

    async def _in_thread(self, work: Callable[Work, Result], *arguments: Work.args, **named: Work.kwargs) -> Result:
        running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread cannot be stopped: callers that come and leave would otherwise run as many as there are threads.
            await asyncio.wait((running,))
            raise
