"""Messages as publishing would store them, and what dispatchers and devices do with them."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sealpush.envelope import envelope_digest, evidence_of
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, OrderId, SenderId, SubscriberId, WakeUpId, uuid7
from sealpush.proofs import AckOutcome
from sealpush.v1 import common_pb2
from sealpushd.fetch.rules import AcceptedKey, Ack, NewDelivery, NewMessage, Report, WakeUp
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Connection
from sealpushd.v1 import mailbox_pb2

IOS = int(common_pb2.PLATFORM_IOS)
# What a dispatcher reports.
PUSHED, RETRY, TOKEN_GONE, QUARANTINED, RELEASED = range(1, 6)


def an_id() -> bytes:
    return os.urandom(16)


def delivery(device_id: bytes, *, stanza: bytes = b"stanza", push_reason: int = 0) -> NewDelivery:
    return NewDelivery(DeviceId(device_id), stanza, IOS, push_reason)


def message(*deliveries: NewDelivery, lifetime: timedelta = timedelta(hours=1), **changes: Any) -> NewMessage:
    now = datetime.now(UTC)
    message_id = MessageId(uuid7())
    made = NewMessage(
        key=AcceptedKey(SenderId(an_id()), f"r-{message_id.hex()}", b"m" * 32),
        message_id=message_id,
        subscriber_id=SubscriberId(an_id()),
        app_id=AppId(f"app-{an_id().hex()}"),
        content_class=1,
        priority=2,
        created_at=now,
        expires_at=now + lifetime,
        replace_hash=b"",
        order_id=OrderId(message_id),
        leg_no=0,
        channel=1,
        group_id=None,
        traffic_type=4,
        tag="",
        originator_requested="",
        originator_effective="",
        muted=False,
        blocked=0,
        deliveries=deliveries or (delivery(an_id()),),
        content_id=ContentId(an_id()),
        head=b"head",
        tail=b"tail",
    )
    return replace(made, **changes)


def proto(made: NewMessage) -> mailbox_pb2.NewMessage:
    return mailbox_pb2.NewMessage(
        key=mailbox_pb2.AcceptedKey(sender_id=made.key.sender_id, request_id=made.key.request_id, request_mac=made.key.request_mac),
        message_id=made.message_id,
        subscriber_id=made.subscriber_id,
        app_id=made.app_id,
        content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        created_at_ms=to_ms(made.created_at),
        expires_at_ms=to_ms(made.expires_at),
        deliveries=[
            mailbox_pb2.NewDelivery(device_id=each.device_id, stanza=each.stanza, platform=common_pb2.PLATFORM_IOS)
            for each in made.deliveries
        ],
        content_id=made.content_id,
        head=made.head,
        tail=made.tail,
    )


def digest(of: NewMessage) -> bytes:
    """What names the envelope of a message in what its devices sign."""
    return envelope_digest(evidence_of(of.head, of.tail))


async def put(store: MailboxStore, *messages: NewMessage) -> set[MessageId]:
    return await store.store(messages, [[WakeUpId(an_id()) for _ in each.deliveries] for each in messages], set())


def ack(of: NewMessage, outcome: AckOutcome = AckOutcome.DELIVERED, *, device: int = 0, reason: int = 0, **changes: Any) -> Ack:
    device_id, now_ms = of.deliveries[device].device_id, to_ms(datetime.now(UTC))
    made = Ack(of.message_id, device_id, of.content_id, digest(of), outcome, reason, now_ms, b"s" * 64)
    return replace(made, **changes)


async def a_session(store: MailboxStore) -> bytes:
    session_id = uuid7()
    await store.keep_sessions([session_id])
    return session_id


async def claim(store: MailboxStore, session_id: bytes, of: NewMessage, most: int = 100) -> list[WakeUp]:
    return await store.claim(session_id, [(of.app_id, IOS, most)])


def report(of: WakeUp, outcome: int, **changes: Any) -> Report:
    return replace(Report(of.message_id, of.device_id, of.fence, outcome, None, 0, ""), **changes)


async def overdue(sql: Connection, of: NewMessage) -> None:
    """Let a message's lifetime end now."""
    await sql.execute(
        "UPDATE open_deliveries SET expires_at = now() - interval '1 ms', closes_at = now() - interval '1 ms' WHERE message_id = $1",
        of.message_id,
    )
