"""What sealing and opening cost, next to one libsodium SealedBox of the same key material: CPU-µs, in one process, round by round.

Then what the service keys seals in a second, asked in batches as publishing asks it.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from nacl.public import PrivateKey, SealedBox
from nacl.utils import random

from bench.load import per_second, ratio
from bench.suite import Suite
from sealpush.envelope import Envelope, Header, open_envelope, recipient, seal
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, uuid7
from sealpush.keys import ContentSigningKey, IdentityKey, PrekeyKind, PrekeyPrivate, RecipientDevice, generate_prekey
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.wire import wire_prekey
from sealpushd.platform.batching import BATCH_ITEMS_MAX
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.tokens import ServiceKey
from sealpushd.v1 import sealing_pb2, sealing_pb2_grpc

CONTENT: Final = b"You paid 120.50 at the bakery. Balance: 1,204.50."
# Suites of the devices of one envelope.
DEVICES: Final[Mapping[str, Sequence[Sequence[int]]]] = {
    "suite 1": [(SUITE_X25519,) * count for count in (1, 3, 8)],
    "suite 2": [(SUITE_HYBRID,) * count for count in (1, 3, 8)],
    "both suites": [(SUITE_X25519, SUITE_HYBRID) * 4],
}
# CEK and binding: what an envelope wraps for each device.
WRAPPED: Final = random(64)
NOW_MS: Final = 1_800_000_000_000
# Devices sealed to in turn: as with real recipients, no message finds a key that was loaded for the one before.
DISTINCT: Final = 96
# One at work and one that waits, so that the service is never idle.
BATCHES_IN_FLIGHT: Final = 2


def _cpu_us(work: Callable[[], object], times: int) -> float:
    """CPU-µs of one call, over many."""
    started = time.process_time_ns()
    for _ in range(times):
        work()
    return (time.process_time_ns() - started) / times / 1000


def _devices(suites: Sequence[int]) -> tuple[list[RecipientDevice], dict[DeviceId, PrekeyPrivate]]:
    """Devices as a sender gets them, each with a signed and a one-time prekey, and their private halves of the latter."""
    devices, private = [], {}
    for suite in suites:
        identity, device_id = IdentityKey.generate(), DeviceId(uuid7())
        make = functools.partial(generate_prekey, identity, device_id, now_ms=NOW_MS, suite=suite, min_suite=suite)
        _, signed = make(prekey_id=1, kind=PrekeyKind.SIGNED)
        private[device_id], one_time = make(prekey_id=2, kind=PrekeyKind.ONE_TIME)
        devices.append(RecipientDevice(device_id, identity.public_key, signed, one_time, suite))
    return devices, private


def _sealed_to_next(sealed: Callable[[list[RecipientDevice]], Envelope], recipients: Iterator[list[RecipientDevice]]) -> Envelope:
    return sealed(next(recipients))


def _only(prekey: PrekeyPrivate, *name: object) -> PrekeyPrivate:
    """A keystore of one prekey."""
    return prekey


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    """Seal for 1, 3 and 8 devices, prekeys verified, and open: the SDK alone. Then the service keys, asked by its own call."""
    rounds, times = (2, 20) if short else (15, 400)
    return [*_by_the_sdk(rounds, times), *await _by_the_service(suite, short)]


def _by_the_sdk(rounds: int, times: int) -> list[dict[str, Any]]:
    box = PrivateKey.generate()
    sealing_box, opening_box = SealedBox(box.public_key), SealedBox(box)
    boxed = sealing_box.encrypt(WRAPPED)
    signing_key = ContentSigningKey.generate()

    def sealed(devices: list[RecipientDevice]) -> Envelope:
        header = Header(ContentId(uuid7()), SenderId(bytes(16)), signing_key.key_id, RecipientRef(bytes(32)), NOW_MS, NOW_MS + 60_000)
        return seal(CONTENT, header, [recipient(device, NOW_MS) for device in devices], signing_key)

    figures = []
    for name, sets in DEVICES.items():
        for suites in sets:
            count = len(suites)
            recipients = itertools.cycle([_devices(suites)[0] for _ in range(DISTINCT // count)])
            envelope = sealed(next(recipients))
            ours, floor = [], []
            for _ in range(rounds):
                floor.append(_cpu_us(lambda: sealing_box.encrypt(WRAPPED), times))
                ours.append(_cpu_us(functools.partial(_sealed_to_next, sealed, recipients), times))
            goal = {"goal_ratio": round(2.8 + 2.3 * (count - 1), 1)} if name == "suite 1" else {}
            figures.append(
                ratio(
                    f"seal for {count} device{'s' if count > 1 else ''} of {name}, prekeys verified",
                    "CPU-µs",
                    ours,
                    "one SealedBox.encrypt",
                    floor,
                    bytes=len(envelope.encode()),
                    content_bytes=len(CONTENT),
                    **goal,
                )
            )
    for name in ("suite 1", "suite 2"):
        [device], private = _devices(DEVICES[name][0])
        data = sealed([device]).encode()
        prekey = private[device.device_id]
        opening = functools.partial(
            open_envelope,
            data,
            device_id=device.device_id,
            private_prekey_lookup=functools.partial(_only, prekey),
            sender_public_key=signing_key.public_key,
        )
        ours, floor = [], []
        for _ in range(rounds):
            floor.append(_cpu_us(lambda: opening_box.decrypt(boxed), times))
            ours.append(_cpu_us(opening, times))
        goal = {"goal_ratio": 4.5} if name == "suite 1" else {}
        figures.append(ratio(f"open, {name}", "CPU-µs", ours, "one SealedBox.decrypt", floor, bytes=len(data), **goal))
    return figures


async def _by_the_service(suite: Suite, short: bool) -> list[dict[str, Any]]:
    """Envelopes a second from Seal, in full batches of one device each, and what keys and PostgreSQL spend on one."""
    rounds, batches = (1, 2) if short else (5, 24)
    box = SealedBox(PrivateKey.generate().public_key)

    def channel(caller: str) -> MeshChannel:
        return MeshChannel("keys", suite.endpoints.mesh["keys"], ServiceKey.load(caller, suite.secrets / "keys" / f"{caller}.key"))

    registration, publishing = channel("registration"), channel("publishing")
    try:
        figures = []
        for name, kind in (("suite 1", SUITE_X25519), ("suite 2", SUITE_HYBRID)):
            request = await _batch(registration, kind)
            call = functools.partial(_seal, publishing, request)
            await call(0)
            ours, floor, keys, postgres = [], [], 0.0, 0.0
            for _ in range(rounds):
                floor.append(1e6 / _cpu_us(lambda: box.encrypt(WRAPPED), 2000))
                before = suite.cpu_seconds()
                rate = await per_second(call, batches, BATCHES_IN_FLIGHT)
                after = suite.cpu_seconds()
                ours.append(rate * BATCH_ITEMS_MAX)
                keys += after["keys"] - before["keys"]
                postgres += after["postgres"] - before["postgres"]
            envelopes = rounds * batches * BATCH_ITEMS_MAX
            keys_us, postgres_us = keys / envelopes * 1e6, postgres / envelopes * 1e6
            figures.append(
                ratio(
                    f"Seal by the service, {name}, one device each",
                    "envelopes/s",
                    ours,
                    "SealedBox.encrypt, one core",
                    floor,
                    cpu_us=round(keys_us, 1),
                    postgres_cpu_us=round(postgres_us, 1),
                    per_core_of_keys=round(1e6 / keys_us),
                )
            )
        return figures
    finally:
        await registration.aclose()
        await publishing.aclose()


async def _batch(registration: MeshChannel, suite: int) -> sealing_pb2.SealRequest:
    """Contents for as many new devices of a suite as a batch holds."""
    now_ms = time.time_ns() // 1_000_000
    devices, items = [], []
    for _ in range(BATCH_ITEMS_MAX):
        identity, device_id, subscriber_id = IdentityKey.generate(), DeviceId(uuid7()), uuid7()
        _, prekey = generate_prekey(identity, device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=now_ms, suite=suite, min_suite=suite)
        devices.append(
            sealing_pb2.NewDevice(
                subscriber_id=subscriber_id,
                device_id=device_id,
                identity_public_key=identity.public_key,
                signed_prekey=wire_prekey(prekey),
                min_suite=suite,
            )
        )
        items.append(
            sealing_pb2.SealItem(
                sender_id=uuid7(),
                subscriber_id=subscriber_id,
                device_ids=[device_id],
                content=CONTENT,
                created_at_ms=now_ms,
                expires_at_ms=now_ms + 3_600_000,
            )
        )
    stub = sealing_pb2_grpc.SealingStub(registration.channel)
    answer = await registration.call(stub.PutDevices, sealing_pb2.PutDevicesRequest(devices=devices))
    if any(answer.refusals):
        raise RuntimeError(f"keys took no device: {answer.refusals[0]}")
    return sealing_pb2.SealRequest(items=items)


async def _seal(publishing: MeshChannel, request: sealing_pb2.SealRequest, number: int) -> None:
    """The call of this number: all are alike."""
    stub = sealing_pb2_grpc.SealingStub(publishing.channel)
    answer = await publishing.call(stub.Seal, request)
    if any(len(each.parts.stanzas) != 1 for each in answer.results):
        raise RuntimeError("keys left a device out")
