"""What a device knows on its own side: its store, who it is, the server's time, and what went wrong last.

Small collaborators that the other parts of a device are given. None of them makes a call to the service.
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.errors import NotRegisteredHere, SealpushError
from sealpush.keys import IdentityKey
from sealpush.keystore import DeviceRegistration, Keystore
from sealpush.memory_keystore import MemoryKeystore
from sealpush.model import timestamp_ms
from sealpush.proven import proven
from sealpush.retry import Clock

# A sealer's clock may be 5 minutes off when the service accepts; a minute more for what travels.
FUTURE_SKEW_MS: Final = 6 * 60 * 1000
# The server's time is known to within a round trip; a message may be shown this long after its end.
EXPIRY_SKEW_MS: Final = 5_000
# A stream's frame can be late but never early, so it can only move the clock forward, unless it is as late as nothing else explains.
FRAME_LATE_MS_MAX: Final = 60_000
# What the local clock may differ from the steady one without having jumped: it is adjusted all the time. Less than anything is judged by.
CLOCK_JUMP_MS: Final = EXPIRY_SKEW_MS
# One attempt takes no longer; what more went by were attempts before it.
ROUND_TRIP_S_MAX: Final = 10.0
CLOCK_PERSIST_MS: Final = 500  # smaller changes of the offset are not worth a write
PROVEN_STEP_MS: Final = 60 * 60 * 1000  # nor are smaller ones of the proven time: entries and prekeys end after days

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
    """The server's time as known here: the local clock and how far it is off, and the latest time that is proven. The store keeps both."""

    def __init__(self, clock: Clock, store: Store) -> None:
        self._clock = clock
        self._store = store
        self.offset_ms: int | None = None
        self.proven_ms = 0
        self.learned_at: float | None = None  # monotonic; None: not in this process
        self._learned_ms = 0  # the local clock then

    def now_ms(self) -> int:
        """Unix milliseconds by the server's clock; by the local one while nothing is known."""
        return self._clock.now_ms() + (self.offset_ms or 0)

    def bounded_ms(self) -> int:
        """As `now_ms()`, but never before the proven time: what entries and this device's prekeys are judged by."""
        return max(self.now_ms(), self.proven_ms)

    def local_ms(self) -> int:
        """Unix milliseconds by the local clock: for what must not be the server's to tell."""
        return self._clock.now_ms()

    def steady_s(self) -> float:
        """Seconds that only go forward, whatever happens to the local clock: for `sent_at`."""
        return self._clock.monotonic()

    def jumped(self) -> bool:
        """Whether somebody set the local clock since the server's time was learned, or the phone slept: `now_ms()` may be wrong until it
        is learned again."""
        if self.learned_at is None:
            return False
        steady_ms = (self._clock.monotonic() - self.learned_at) * 1000
        return abs(self._clock.now_ms() - self._learned_ms - steady_ms) > CLOCK_JUMP_MS

    def prove(self, keystore: Keystore, signed_ms: int) -> None:
        """Learn from a time whose signature was verified up to the pinned root. Raises KeystoreError."""
        proven_ms = proven(self.proven_ms, signed_ms, self.local_ms())
        if proven_ms - self.proven_ms >= PROVEN_STEP_MS:
            self.proven_ms = keystore.raise_proven_time(proven_ms)  # another process of this device may have heard of a later one

    async def learn(self, server_time: Timestamp, sent_at: float | None = None) -> None:
        """Learn from a server's time that arrived just now; an unset one teaches nothing.

        `sent_at`: when its request left, by `steady_s()`; None for what came without being asked for.
        """
        server_ms = timestamp_ms(server_time)
        if server_ms <= 0:
            return
        received_ms, received_at = self._clock.now_ms(), self._clock.monotonic()
        known_ms = self.offset_ms
        offset_ms = server_ms - received_ms
        if sent_at is not None:
            # Half of the way there and back, by the clock that cannot have been set on the way.
            offset_ms += int(500 * min(received_at - sent_at, ROUND_TRIP_S_MAX))
        elif known_ms is not None and not self.jumped() and known_ms - FRAME_LATE_MS_MAX < offset_ms <= known_ms:
            offset_ms = known_ms
        self.learned_at, self._learned_ms = received_at, received_ms
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
