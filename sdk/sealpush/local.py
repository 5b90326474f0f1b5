"""What a device knows on its own side: its store, who it is, the server's time, and what went wrong last.

Small collaborators that the other parts of a device are given. None of them makes a call to the service.
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.errors import NotRegisteredHere, SealpushError
from sealpush.keys import IdentityKey
from sealpush.keystore import DeviceRegistration, Keystore, MemoryKeystore
from sealpush.model import timestamp_ms
from sealpush.retry import Clock

# A sealer's clock may be 5 minutes off when the service accepts; a minute more for what travels.
FUTURE_SKEW_MS: Final = 6 * 60 * 1000
# The server's time is known to within a round trip; a message may be shown this long after its end.
EXPIRY_SKEW_MS: Final = 5_000
# A stream's frame can be late but never early, so it can only move the clock forward, unless the clock jumped.
CLOCK_JUMP_MS: Final = 60_000
CLOCK_PERSIST_MS: Final = 500  # smaller changes of the offset are not worth a write

Result = TypeVar("Result")


class Store:
    """The keystore, for coroutines: `await store(lambda keystore: keystore.fact(name))`."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._inline = isinstance(keystore, MemoryKeystore)

    async def __call__(self, use: Callable[[Keystore], Result]) -> Result:
        """What `use` makes of the keystore: at once where it is memory, in a thread where it is a file."""
        if self._inline:
            return use(self._keystore)
        return await asyncio.to_thread(use, self._keystore)


class Who:
    """Who this device is: None until it is registered, and again afterwards."""

    def __init__(self) -> None:
        self.identity: IdentityKey | None = None
        self.registration: DeviceRegistration | None = None

    def registered(self) -> tuple[IdentityKey, DeviceRegistration]:
        """Both. Raises NotRegisteredHere."""
        if self.identity is None or self.registration is None:
            raise NotRegisteredHere("this device is not registered; call start_registration() and confirm()")
        return self.identity, self.registration


class ServerTime:
    """The server's time as known here: the local clock and how far it is off, which the store keeps."""

    def __init__(self, clock: Clock, store: Store) -> None:
        self._clock = clock
        self._store = store
        self.offset_ms: int | None = None
        self.learned_at: float | None = None  # monotonic; None: not in this process

    def now_ms(self) -> int:
        """Unix milliseconds by the server's clock; by the local one while nothing is known."""
        return self._clock.now_ms() + (self.offset_ms or 0)

    def local_ms(self) -> int:
        """Unix milliseconds by the local clock, which may be wrong: for `sent_ms`."""
        return self._clock.now_ms()

    async def learn(self, server_time: Timestamp, sent_ms: int | None = None) -> None:
        """Learn from a server's time that arrived just now; an unset one teaches nothing.

        `sent_ms`: when its request left, by the local clock; None for what came without being asked for.
        """
        server_ms = timestamp_ms(server_time)
        if server_ms <= 0:
            return
        received_ms = self._clock.now_ms()
        known_ms = self.offset_ms
        if sent_ms is not None and sent_ms <= received_ms:
            offset_ms = server_ms - (sent_ms + received_ms) // 2
        else:
            offset_ms = server_ms - received_ms
            if known_ms is not None and known_ms - CLOCK_JUMP_MS < offset_ms <= known_ms:
                offset_ms = known_ms
        self.learned_at = self._clock.monotonic()
        if known_ms is None or abs(offset_ms - known_ms) >= CLOCK_PERSIST_MS:
            self.offset_ms = offset_ms
            await self._store(lambda keystore: keystore.set_clock_offset_ms(offset_ms))


class Trouble:
    """What went wrong last, for `Device.diagnose()`."""

    def __init__(self) -> None:
        self.last = ""

    def note(self, error: BaseException) -> None:
        """Keep it. Errors of this package hold no secrets; of others only the kind is kept."""
        self.last = f"{type(error).__name__}: {error}" if isinstance(error, SealpushError) else type(error).__name__


class Held(SealpushError):
    """Not now: nothing is acknowledged, the service keeps the delivery. Never reaches the app."""

    reason = "HELD"
    retryable = True
