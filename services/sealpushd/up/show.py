"""The show: five messages, each to its end, told to people."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from sealpush.ids import MessageId
from sealpush.model import ContentClass, Priority, State, StopPoint
from sealpush.publication import Accepted, NotRegistered, PublishOutcome
from sealpush.receipts import verify_receipt
from sealpush.sender import Sender
from sealpush.suites import SUITE_HYBRID
from sealpush.transport import Channels
from sealpush.v1 import common_pb2
from sealpush.v1.content_pb2 import Content
from sealpushd.cli.reasons import explanation
from sealpushd.up.demo import BANK, LOGIN, NOBODYS_PHONE, OFFLINE_PHONE, PHONE, SHOP, Demo
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError
from sealpushd.up.phones import Handset, Handsets
from sealpushd.up.sdk import public_endpoints

# A message that takes longer has not worked.
_PATIENCE_S: Final = 20.0
# All that may pass the push service: what the system needs to show a notification, and the wake-up id.
_PUSHED_KEYS: Final = frozenset({"aps", "id"})

Say = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one message."""

    title: str
    ended: str
    expected: str
    as_expected: bool
    milliseconds: float
    details: tuple[str, ...] = ()


@dataclass(slots=True)
class Result:
    messages: list[Told] = field(default_factory=list)

    @property
    def all_as_expected(self) -> bool:
        return all(each.as_expected for each in self.messages)

    def summary(self) -> dict[str, Any]:
        ended = [each.ended for each in self.messages]
        return {
            "sent": len(ended),
            "delivered": ended.count("DELIVERED"),
            "blocked": ended.count("BLOCKED"),
            "not_registered": ended.count("NOT_REGISTERED"),
            "cancelled": ended.count("CANCELLED"),
            "unexpected": sum(not each.as_expected for each in self.messages),
        }


async def run(endpoints: Endpoints, demo: Demo, phones: Handsets, say: Say) -> Result:
    """Send the messages one after the other and tell what became of each. Raises SealpushError."""
    say(
        f"One person, {PHONE}, has four phones. Phone 1 is in use (live stream); an iPhone, an Android and a Huawei are asleep,\n"
        "until the push services of Apple, Google and Huawei wake them.\n"
    )
    result = Result()
    async with Channels(public_endpoints(endpoints)) as channels:
        bank = Sender(channels, LOGIN, demo.password, sender_name=BANK, signing_key=demo.content_keys[BANK])
        shop = Sender(channels, LOGIN, demo.password, sender_name=SHOP)
        acts: list[Callable[[], Awaitable[Told]]] = [
            lambda: _delivered(
                bank,
                phones,
                demo.root_public_key,
                "Demo Bank",
                "sealed by the platform, which saw it for a moment",
                bank.publish(PHONE, _content("Payment", "250.00 UAH paid at the bakery. Balance: 1,204.50 UAH."), priority=Priority.HIGH),
            ),
            lambda: _delivered(
                bank,
                phones,
                demo.root_public_key,
                "Demo Bank",
                "sealed by the bank itself, the platform cannot read it",
                bank.publish_sealed(PHONE, _content("Your new PIN", "4071. Tell nobody, not even us."), priority=Priority.HIGH),
            ),
            lambda: _blocked(shop, phones, demo),
            lambda: _not_registered(bank),
            lambda: _cancelled(bank),
        ]
        for number, act in enumerate(acts, 1):
            told = await act()
            result.messages.append(told)
            mark = "" if told.as_expected else f"  (expected {told.expected})"
            say(f"{number}  {told.title:<58} {told.ended:<15} {told.milliseconds:6.0f} ms{mark}")
            for line in told.details:
                say(f"   {line}")
            say()
    return result


def farewell(data_dir: Path) -> str:
    where = "" if data_dir == Path("data").absolute() else f" --data-dir {data_dir}"
    sealpush = _program()
    return "\n".join(
        (
            "Everything runs. From a second terminal:",
            f"  {sealpush} send {PHONE} 'Hello' --wait 10s{where}",
            f"  {sealpush} send {PHONE} 'For your eyes only' --sealed{where}",
            f"  {sealpush} status MESSAGE_ID{where}        also: cancel, explain, receipt",
            f"  {sealpush} doctor{where}",
            "Ctrl-C ends it.",
        )
    )


def _program() -> str:
    """How to call this program in another terminal that stands in the same directory."""
    started_as = Path(sys.argv[0])
    if started_as.name != "sealpush":
        return f"{Path(sys.executable).name} -m sealpushd"
    found = shutil.which("sealpush")
    if found is not None and Path(found).samefile(started_as):
        return "sealpush"
    return str(started_as.relative_to(Path.cwd()) if started_as.is_relative_to(Path.cwd()) else started_as)


def _content(title: str, body: str, content_class: ContentClass = ContentClass.INFORMATIONAL) -> Content:
    return Content(title=title, body=body, content_class=common_pb2.ContentClass.ValueType(content_class), locale="en")


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1000


async def _ended(sender: Sender, message_id: MessageId) -> State:
    """The state a message ended in, followed by watching; the last one seen when the patience is over."""
    state = State.UNSPECIFIED
    try:
        async with asyncio.timeout(_PATIENCE_S):
            async for status in sender.watch([message_id]):
                state = status.state
    except TimeoutError:
        pass
    return state


def _accepted(outcome: PublishOutcome) -> Accepted:
    if not isinstance(outcome, Accepted):
        what = "nobody is registered" if isinstance(outcome, NotRegistered) else outcome.message
        raise UpError(f"a message that should be accepted was not: {what}")
    return outcome


async def _delivered(
    sender: Sender, phones: Handsets, root_public_key: bytes, sender_name: str, sealed: str, publish: Awaitable[PublishOutcome]
) -> Told:
    started = time.monotonic()
    pushes_before = [len(phone.pushes) for phone in phones.reachable]
    message_id = _accepted(await publish).message_id
    state = await _ended(sender, message_id)
    took = _ms_since(started)
    shown = await asyncio.gather(*(phone.wait_for(message_id, _PATIENCE_S) for phone in phones.reachable))
    pushes = [(phone, payload) for phone, before in zip(phones.reachable, pushes_before, strict=True) for payload in phone.pushes[before:]]
    details = [sealed, *_pushed_lines(pushes)]
    title = ""
    for phone, one in zip(phones.reachable, shown, strict=True):
        if one is None:
            details.append(f"{phone.name} showed nothing")
        else:
            title = one.message.content.title
            took_it = (one.at - started) * 1000
            phone_name = f"{phone.name} ({phone.vendor.model}{', post-quantum' if phone.suite == SUITE_HYBRID else ''})"
            details.append(f"{phone_name} showed “{one.message.content.body}” after {took_it:.0f} ms ({one.brought_by})")
    proof = verify_receipt(await sender.receipt(message_id), root_public_key)
    details.append(f"its receipt proves to anybody who sealed it, and that {_number_of_phones(len(proof.delivered_to))} opened it")
    well = state == State.DELIVERED and None not in shown and _opaque(pushes) and proof.sender_proven and bool(proof.delivered_to)
    return Told(f"{sender_name} → {PHONE}: {title}", state.name, "DELIVERED", well, took, tuple(details))


def _number_of_phones(count: int) -> str:
    return "a phone" if count == 1 else f"{count} phones"


def _opaque(pushes: list[tuple[Handset, bytes]]) -> bool:
    """Whether nothing but a wake-up id passed the push services."""
    return all(set(json.loads(payload)) <= _PUSHED_KEYS for _, payload in pushes)


def _pushed_lines(pushes: list[tuple[Handset, bytes]]) -> list[str]:
    if not pushes:
        return ["nothing passed the push services"]
    return [f"through {phone.vendor.name} went only {payload.decode()}" for phone, payload in pushes]


async def _blocked(shop: Sender, phones: Handsets, demo: Demo) -> Told:
    await phones.in_use.device.set_preference(demo.sender_ids[SHOP], block_advertising=True)
    started = time.monotonic()
    pushes_before = _pushes(*phones.reachable)
    content = _content("Sale", "Everything for half the price!", ContentClass.ADVERTISING)
    message_id = _accepted(await shop.publish(PHONE, content)).message_id
    state = await _ended(shop, message_id)
    took = _ms_since(started)
    reason = (await shop.status(message_id)).reason
    shown = [phone.name for phone in phones.reachable if message_id in phone.shown]
    well = state == State.BLOCKED and not shown and _pushes(*phones.reachable) == pushes_before
    details = (explanation(reason).happened, "nothing passed the push services, no phone showed anything" if well else f"shown by: {shown}")
    return Told(f"Demo Shop → {PHONE}: Sale (advertising)", state.name, "BLOCKED", well, took, details)


def _pushes(*phones: Handset) -> int:
    return sum(len(phone.pushes) for phone in phones)


async def _not_registered(bank: Sender) -> Told:
    started = time.monotonic()
    outcome = await bank.publish(NOBODYS_PHONE, _content("Welcome", "Nobody reads this."))
    took = _ms_since(started)
    well = isinstance(outcome, NotRegistered)
    ended = "NOT_REGISTERED" if well else type(outcome).__name__
    details = (explanation(outcome.reason).happened + " The bank sends an SMS instead.",) if isinstance(outcome, NotRegistered) else ()
    return Told(f"Demo Bank → {NOBODYS_PHONE}: Welcome", ended, "NOT_REGISTERED", well, took, details)


async def _cancelled(bank: Sender) -> Told:
    """In time for certain: phone 3 is switched off and has no push token, so that nothing but the phone itself could fetch it."""
    started = time.monotonic()
    message_id = _accepted(await bank.publish(OFFLINE_PHONE, _content("Loan offer", "Withdrawn."), lifetime=timedelta(hours=1))).message_id
    cancelled = await bank.cancel(message_id)
    state = await _ended(bank, message_id)
    took = _ms_since(started)
    before_push = all(each.stop_point == StopPoint.BEFORE_PUSH for each in cancelled.deliveries)
    details = ("cancelled while the phone (phone 3) was off; " + ("no push had left" if before_push else "a push may have left"),)
    well = state == State.CANCELLED and before_push and bool(cancelled.deliveries)
    return Told(f"Demo Bank → {OFFLINE_PHONE}: Loan offer", state.name, "CANCELLED", well, took, details)
