"""Argon2id over what people remember: passwords, PINs. Slow on purpose, so in a thread and a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar

from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id

from sealpushd.platform.turns import FairTurns

Result = TypeVar("Result")

# Each hash takes 64 MiB and a core for a twentieth of a second. As few at once also bound by how much parallel guesses overshoot a limit.
HASHES_AT_ONCE: Final = 2
# About two seconds of work: who comes later is better off coming again.
HASHES_WAITING_MAX: Final = 64
# Of one address: enough for an organisation's applications that all begin at once, an eighth of what may wait.
HASHES_WAITING_EACH_MAX: Final = 8


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
    """Turns at hashing, round the addresses that ask: `async with argon2.turn(subject): await argon2.is_password(...)`.

    Everything that needs no hash is looked at before, limits first: a turn is for who may have it. One for each process: what is scarce
    is its memory and its cores.
    """

    def __init__(self) -> None:
        self._turns = FairTurns(
            at_once=HASHES_AT_ONCE,
            waiting_max=HASHES_WAITING_MAX,
            waiting_each_max=HASHES_WAITING_EACH_MAX,
            refusal="too many passwords are being checked at once; try again in a second",
        )
        # Threads of its own: a hash never waits behind other work, nor other work behind hashes, so a turn lasts as long as its hash.
        self._threads = ThreadPoolExecutor(HASHES_AT_ONCE, thread_name_prefix="argon2")

    def turn(self, subject: str, *, known: bool = False) -> AbstractAsyncContextManager[None]:
        """A turn for an address; `known`: one that has proven something before (FairTurns). Entering raises Overloaded."""
        return self._turns.turn(subject, known=known)

    async def hash(self, password: bytes) -> bytes:
        return await self._in_thread(lambda: hash_password(password))

    async def is_password(self, password_hash: bytes, password: bytes) -> bool:
        return await self._in_thread(lambda: is_password(password_hash, password))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread cannot be stopped: callers that come and leave would otherwise run more than two. The turn ends with the hash.
            await asyncio.wait((running,))
            raise
