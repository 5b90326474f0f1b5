"""The whole path: publish in batches, seal, store, push or stream, fetch, open, acknowledge, ask for the status.

Messages a second through it all, and what each process of the suite spends on one. Phones and sender live in the measuring process, whose
CPU is told apart; the floor is what the same machine can do with the same contents when nothing but sealing and opening happens.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.phones import Phones
from bench.publish import request
from bench.suite import Suite
from sealpush.envelope import Header, Recipient, open_envelope, seal
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, uuid7
from sealpush.keys import ContentSigningKey, IdentityKey, PrekeyKind, generate_prekey
from sealpush.v1 import common_pb2, publish_pb2

BATCH = 64
IN_FLIGHT = 512


async def measure(suite: Suite, short: bool) -> list[dict[str, Any]]:
    messages = 128 if short else 6_000
    figures = []
    for name, way in (("push", Phones.woken), ("live stream", Phones.streaming)):
        async with Phones.registered(suite, 16) as phones, way(phones):
            await _send(suite, phones, 64)
            own, before, start = time.process_time(), suite.cpu_seconds(), time.perf_counter()
            ids = await _send(suite, phones, messages)
            took = time.perf_counter() - start
            after, own = suite.cpu_seconds(), time.process_time() - own
            await _check(suite, ids)
        by_process = {process: round((after[process] - before.get(process, 0)) * 1e6 / messages) for process in sorted(after)}
        servers = sum(each for process, each in by_process.items() if process != "simulators")
        floor = _seal_and_open(200 if short else 2_000)
        figures.append(
            {
                "figure": f"whole path, {name}",
                "unit": "messages/s",
                "value": round(messages / took),
                "floor": "seal and open alone",
                "floor_value": round(floor),
                "ratio": round(messages / took / floor, 3),
                "messages": messages,
                "cpu_us_per_message": servers,
                "cpu_us_by_process": by_process,
                "cpu_us_of_phones_and_sender": round(own * 1e6 / messages),
                "goal": 800,
                "goal_cpu_us": 800,
            }
        )
    return figures


async def _send(suite: Suite, phones: Phones, messages: int) -> list[bytes]:
    """Publish so many, never more than `IN_FLIGHT` ahead of the phones, and return once all were opened."""
    numbers = phones.numbers
    ids: list[bytes] = []
    opened = 0
    for first in range(0, messages, BATCH):
        while len(ids) - opened > IN_FLIGHT - BATCH:
            async with asyncio.timeout(60):
                await phones.opened.get()
            opened += 1
        some = [request(numbers[n % len(numbers)]) for n in range(first, min(first + BATCH, messages))]
        answer = await suite.channels.publishing.PublishBatch(
            publish_pb2.PublishBatchRequest(requests=some), metadata=suite.metadata, timeout=30
        )
        ids.extend(result.accepted.message_id for result in answer.results)
    while opened < len(ids):
        async with asyncio.timeout(60):
            await phones.opened.get()
        opened += 1
    return ids


async def _check(suite: Suite, ids: list[bytes]) -> None:
    """Every message reached its end: what was not delivered did not count."""
    for first in range(0, len(ids), 512):
        some = ids[first : first + 512]
        for _ in range(100):
            answer = await suite.channels.publishing.GetStatuses(
                publish_pb2.GetStatusesRequest(message_ids=some), metadata=suite.metadata, timeout=10
            )
            if all(status.state == common_pb2.STATE_DELIVERED for status in answer.statuses):
                break
            await asyncio.sleep(0.1)
        else:
            raise RuntimeError("messages were opened and are not DELIVERED")


def _seal_and_open(messages: int) -> float:
    """Messages a second that one process seals and opens, without anything around it."""
    now_ms = time.time_ns() // 1_000_000
    device_id, key = DeviceId(uuid7()), ContentSigningKey.generate()
    private, public = generate_prekey(IdentityKey.generate(), device_id, prekey_id=1, kind=PrekeyKind.SIGNED, now_ms=now_ms)
    content = request("+380501234567").plain.SerializeToString()
    start = time.perf_counter()
    for _ in range(messages):
        header = Header(
            content_id=ContentId(uuid7()),
            sender_id=SenderId(bytes(16)),
            sender_key_id=key.key_id,
            recipient_ref=RecipientRef(bytes(32)),
            created_at_ms=now_ms,
            expires_at_ms=now_ms + 60_000,
        )
        envelope = seal(content, header, [Recipient.of(device_id, public)], key)
        open_envelope(envelope, device_id=device_id, private_prekey_lookup=lambda *_: private, sender_public_key=key.public_key)
    return messages / (time.perf_counter() - start)
