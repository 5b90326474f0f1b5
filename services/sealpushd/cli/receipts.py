"""What a receipt proves, for people and for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sealpushd.cli import files

if TYPE_CHECKING:
    from sealpush.receipts import Claim, Receipt, ReceiptVerdict
    from sealpush.revocations import RevocationList

_LINE_CHARACTERS: Final = 110
# The longest word for a finding, and room around it.
_INDENT: Final = 19
# Claims that are about the whole message and come after its devices.
_OF_THE_MESSAGE: Final = frozenset({"message", "acceptance", "recipient"})


def as_document(receipt: Receipt, verdict: ReceiptVerdict, root_public_key: bytes) -> dict[str, Any]:
    """A verdict as JSON."""
    from sealpush.ids import uuid_text

    return {
        "message_id": uuid_text(receipt.message_id),
        "sender_id": uuid_text(receipt.sender_id),
        "root_public_key": root_public_key.hex(),
        "failed": verdict.failed,
        "sender_proven": verdict.sender_proven,
        "delivered_to": [uuid_text(each) for each in verdict.delivered_to],
        "claims": [
            {
                "name": each.name,
                "device_id": None if each.device_id is None else uuid_text(each.device_id),
                "finding": each.finding.name,
                "sentence": each.sentence,
            }
            for each in verdict.claims
        ],
    }


def as_lines(receipt: Receipt, verdict: ReceiptVerdict, root_public_key: bytes) -> Iterator[str]:
    """A verdict for people: what is proven of the sender, of each device and of the message, and what it comes to."""
    from sealpush.ids import uuid_text

    yield f"Receipt of message {uuid_text(receipt.message_id)}"
    yield f"by the root {root_public_key.hex()}"
    yield from _block("Sender", [each for each in verdict.claims if each.device_id is None and each.name not in _OF_THE_MESSAGE])
    for delivery in receipt.deliveries:
        claims = [each for each in verdict.claims if each.device_id == delivery.device_id]
        yield from _block(f"Device {uuid_text(delivery.device_id)}", claims)
    yield from _block("Message", [each for each in verdict.claims if each.name in _OF_THE_MESSAGE])
    yield ""
    yield textwrap.fill(conclusion(receipt, verdict), _LINE_CHARACTERS)


def _block(title: str, claims: list[Claim]) -> Iterator[str]:
    yield f"\n{title}"
    for each in claims:
        yield textwrap.fill(
            each.sentence,
            _LINE_CHARACTERS,
            initial_indent=f"  {each.finding.value}".ljust(_INDENT),
            subsequent_indent=" " * _INDENT,
            break_on_hyphens=False,
        )


def conclusion(receipt: Receipt, verdict: ReceiptVerdict) -> str:
    """What it comes to, in a line or two."""
    from sealpush.receipts import Finding

    if {each.name for each in verdict.claims if each.finding is Finding.FAILED} == {"not_revoked"}:
        return (
            "It verifies, but the root has REVOKED what it rests on. Believe it only if it is the same as a receipt that somebody else "
            "got before the key was stolen, or gets from the service."
        )
    if verdict.failed:
        return "It does NOT verify: the receipt was changed, or the root is not the one that the app pins. Believe none of it."
    if receipt.nothing_sealed:
        return (
            "Nothing was ever sealed: the recipient had blocked the sender when the message came, says the platform. No device got "
            "anything, and there is nothing that a receipt could prove."
        )
    devices = len(verdict.delivered_to)
    delivery = {
        0: "No device has signed that it opened the message.",
        1: "One device signed that it opened the message; that it is the recipient's is the platform's word.",
    }.get(devices, f"{devices} devices signed that they opened the message; that they are the recipient's is the platform's word.")
    if not verdict.sender_proven:
        return f"The sender's part is NOT proven. {delivery}"
    if any(each.name == "platform_entry" for each in verdict.claims):
        return f"The sender's part is proven, by the key of the platform, which the sender lets speak for it. {delivery}"
    return f"The sender's part is proven. {delivery}"


def read_receipt(path: Path) -> Receipt:
    """The receipt in a file. Raises WronglyCalled when it cannot be read, ReceiptRefused for another file."""
    from sealpush.receipts import RECEIPT_BYTES_MAX, Receipt

    return Receipt.from_json(files.read(path, RECEIPT_BYTES_MAX))


def read_revocations(path: Path, root_public_key: bytes) -> RevocationList:
    """The list in a file of `sealpush root revoke`, if this root signed it. Raises WronglyCalled, RevocationsRefused."""
    from sealpush.revocations import verify_revocations

    return verify_revocations(root_public_key, files.read_signed(path).signed)
