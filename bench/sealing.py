"""What sealing and opening cost, next to one libsodium SealedBox of the same key material: CPU-µs, in one process, round by round."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

from nacl.public import PrivateKey, SealedBox
from nacl.utils import random

from bench.load import ratio
from bench.suite import Suite
from sealpush.envelope import Envelope, Header, open_envelope, recipient, seal
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, uuid7
from sealpush.keys import ContentSigningKey, IdentityKey, PrekeyKind, PrekeyPrivate, RecipientDevice, generate_prekey

CONTENT: Final = b"You paid 120.50 at the bakery. Balance: 1,204.50."
DEVICES: Final = (1, 3, 8)
# CEK and binding: what an envelope wraps for each device.
WRAPPED: Final = random(64)
NOW_MS: Final = 1_800_000_000_000


def _cpu_us(work: Callable[[], object], times: int) -> float:
    """CPU-µs of one call, over many."""
    started = time.process_time_ns()
    for _ in range(times):
        work()
    return (time.process_time_ns() - started) / times / 1000


def _devices(count: int) -> tuple[list[RecipientDevice], dict[DeviceId, PrekeyPrivate]]:
    """Devices as a sender gets them, each with a signed and a one-time prekey, and their private halves of the latter."""
    devices, private = [], {}
    for _ in range(count):
        identity, device_id = IdentityKey.generate(), DeviceId(uuid7())
        _, signed = generate_prekey(identity, device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=NOW_MS)
        private[device_id], one_time = generate_prekey(identity, device_id, prekey_id=2, kind=PrekeyKind.ONE_TIME, now_ms=NOW_MS)
        devices.append(RecipientDevice(device_id, identity.public_key, signed, one_time))
    return devices, private


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    """Seal for 1, 3 and 8 devices, prekeys verified, and open. The suite is not asked: this is the SDK alone."""
    rounds, times = (2, 20) if short else (15, 400)
    box = PrivateKey.generate()
    sealing_box, opening_box = SealedBox(box.public_key), SealedBox(box)
    boxed = sealing_box.encrypt(WRAPPED)
    signing_key = ContentSigningKey.generate()

    def sealed(devices: list[RecipientDevice]) -> Envelope:
        header = Header(ContentId(uuid7()), SenderId(bytes(16)), signing_key.key_id, RecipientRef(bytes(32)), NOW_MS, NOW_MS + 60_000)
        return seal(CONTENT, header, [recipient(device, NOW_MS) for device in devices], signing_key)

    figures = []
    for count in DEVICES:
        devices, private = _devices(count)
        envelope = sealed(devices)
        ours, floor = [], []
        for _ in range(rounds):
            floor.append(_cpu_us(lambda: sealing_box.encrypt(WRAPPED), times))
            ours.append(_cpu_us(functools.partial(sealed, devices), times))
        figures.append(
            ratio(
                f"seal for {count} device{'s' if count > 1 else ''}, prekeys verified",
                "CPU-µs",
                ours,
                "one SealedBox.encrypt",
                floor,
                bytes=len(envelope.encode()),
                content_bytes=len(CONTENT),
                goal_ratio=round(2.8 + 2.3 * (count - 1), 1),
            )
        )
    [device], private = _devices(1)
    envelope = sealed([device])
    prekey = private[device.device_id]
    ours, floor = [], []
    for _ in range(rounds):
        floor.append(_cpu_us(lambda: opening_box.decrypt(boxed), times))
        ours.append(
            _cpu_us(
                lambda: open_envelope(
                    envelope.encode(),
                    device_id=device.device_id,
                    private_prekey_lookup=lambda suite, prekey_id, kind: prekey,
                    sender_public_key=signing_key.public_key,
                ),
                times,
            )
        )
    figures.append(ratio("open", "CPU-µs", ours, "one SealedBox.decrypt", floor, goal_ratio=4.5))
    return figures
