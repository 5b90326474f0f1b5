"""Receipts: what anybody can verify offline about a message, also when its content is gone. Pure; no I/O, no clock.

A receipt holds what a sender (or the platform for it) signed about a content, the certificates of the key, and what each
device signed about its delivery. Who verifies it needs the root's public key and nobody's word.

    evidence  = head126 | SHA-512(content)64 | signature64      head and content as in an envelope (envelope.py)
    signature = Ed25519(content-signing key, "SPE1-sig" | SHA-512(evidence without signature))

Acknowledgements are signed over SHA-256(evidence) too, so they speak of this very envelope.

A file is JSON: bytes as lower-case hex, `at_ms` as decimal text, everything else whole numbers. Without white space it is
what a plain JSON writer gives, so no name stands twice and nothing is escaped; unknown names are refused.
"""

import enum
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from sealpush.envelope import (
    CREATED_SKEW_MS,
    EVIDENCE_BYTES,
    HEADER_BYTES,
    Envelope,
    Header,
    content_public_key,
    envelope_digest,
    evidence_of,
    verify_evidence,
)
from sealpush.errors import EntryRefused, EnvelopeRefused, ReceiptRefused
from sealpush.ids import ContentId, DeviceId, MessageId, SenderId, check_id, uuid7_ms, uuid_text
from sealpush.keys import ENTRY_BYTES_MAX, EntryRole, SenderEntry, verify_sender_entry
from sealpush.model import Reason, State, moment
from sealpush.proofs import NO_DIGEST, AckOutcome, acknowledgement_proof, verify_proof
from sealpush.revocations import RevocationList

FORMAT: Final = "sealpush-receipt"
VERSION: Final = 1
RECEIPT_BYTES_MAX: Final = 1024 * 1024  # 512 devices with three acknowledgements each fill two thirds
DELIVERIES_MAX: Final = 512  # stanzas of an envelope
ACKNOWLEDGEMENTS_MAX: Final = 3  # an end, one that came late, and that it was read

_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,19}")
_WHITE = re.compile(r"[ \t\r\n]")
_U16_MAX: Final = (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class SignedAcknowledgement:
    """What a device signed about its delivery; the message, the content, the envelope and the device are the receipt's.

    `at_ms` is the device's time. Raises ValueError for a field out of bounds.
    """

    outcome: AckOutcome
    reason: Reason
    at_ms: int
    signature: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.reason <= _U16_MAX or not 0 <= self.at_ms < 1 << 64:
            raise ValueError("an acknowledgement's reason must fit 16 bits and its time 64")
        if len(self.signature) != 64:
            raise ValueError("an acknowledgement's signature must be 64 bytes")


@dataclass(frozen=True, slots=True)
class ReceiptDelivery:
    """One device: how the platform says it ended, and what the device signed: the end, what came after another
    end, that it was read.

    `identity_public_key` is empty where it is not known. Raises ValueError for a field out of bounds.
    """

    device_id: DeviceId
    identity_public_key: bytes
    state: State
    reason: Reason
    acknowledgements: tuple[SignedAcknowledgement, ...]

    def __post_init__(self) -> None:
        check_id(self.device_id, "device_id")
        if len(self.identity_public_key) not in (0, 32):
            raise ValueError("identity_public_key must be 32 bytes, or empty")
        if not 0 <= self.state <= _U16_MAX or not 0 <= self.reason <= _U16_MAX:
            raise ValueError("state and reason must fit 16 bits")
        if len(self.acknowledgements) > ACKNOWLEDGEMENTS_MAX:
            raise ValueError(f"a delivery has at most {ACKNOWLEDGEMENTS_MAX} acknowledgements")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is kept of a message. Trust nothing in it before `verify_receipt()`.

    `evidence` is empty where nothing was sealed, or where it was not kept yet; entries are empty where none is kept that
    allowed it, the platform's also where the server did not seal. Raises ValueError for a field out of bounds.
    """

    message_id: MessageId
    sender_id: SenderId
    content_id: ContentId
    evidence: bytes = field(repr=False)
    sender_entry: bytes = field(repr=False)
    platform_entry: bytes = field(repr=False)
    deliveries: tuple[ReceiptDelivery, ...]

    def __post_init__(self) -> None:
        check_id(self.message_id, "message_id")
        check_id(self.sender_id, "sender_id")
        check_id(self.content_id, "content_id")
        if len(self.evidence) not in (0, EVIDENCE_BYTES):
            raise ValueError(f"evidence must be {EVIDENCE_BYTES} bytes, or empty")
        if max(len(self.sender_entry), len(self.platform_entry)) > ENTRY_BYTES_MAX:
            raise ValueError(f"an entry has at most {ENTRY_BYTES_MAX} bytes")
        if not 1 <= len(self.deliveries) <= DELIVERIES_MAX:
            raise ValueError(f"a receipt has 1 to {DELIVERIES_MAX} deliveries")
        if len({each.device_id for each in self.deliveries}) != len(self.deliveries):
            raise ValueError("a device stands twice in the receipt")

    @property
    def nothing_sealed(self) -> bool:
        """Whether the message ended when it came, because the recipient blocked the sender: so says the platform, which kept nothing
        of it and has no word of a device."""
        blocked = all(each.state is State.BLOCKED and not each.acknowledgements for each in self.deliveries)
        return blocked and not self.evidence

    def to_json(self) -> str:
        """The file of this receipt."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "message_id": self.message_id.hex(),
            "sender_id": self.sender_id.hex(),
            "content_id": self.content_id.hex(),
            "evidence": self.evidence.hex(),
            "sender_entry": self.sender_entry.hex(),
            "platform_entry": self.platform_entry.hex(),
            "deliveries": [
                {
                    "device_id": each.device_id.hex(),
                    "identity_public_key": each.identity_public_key.hex(),
                    "state": int(each.state),
                    "reason_code": int(each.reason),
                    "acknowledgements": [
                        {
                            "outcome": int(ack.outcome),
                            "reason_code": int(ack.reason),
                            "at_ms": str(ack.at_ms),
                            "signature": ack.signature.hex(),
                        }
                        for ack in each.acknowledgements
                    ],
                }
                for each in self.deliveries
            ],
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The receipt in a file. Raises ReceiptRefused for anything that `to_json()` does not write, white space aside."""
        if len(data) > RECEIPT_BYTES_MAX:
            raise ReceiptRefused(f"a receipt has at most {RECEIPT_BYTES_MAX} bytes; is this another file?")
        try:
            text = data.decode("ascii")
            document = json.loads(text)
            plain = json.dumps(document, separators=(",", ":"))
        except (ValueError, RecursionError):
            raise ReceiptRefused("this is not JSON; give the file as `sealpush receipt --out` wrote it") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ReceiptRefused("this is not a receipt; give the file as `sealpush receipt --out` wrote it")
        if type(document.get("version")) is not int or document["version"] != VERSION:
            raise ReceiptRefused(
                f"this receipt is not of version {VERSION}, the one that this release reads; upgrade Sealpush to verify it"
            )
        try:
            if _WHITE.sub("", text) != plain:
                raise ValueError("it is not written plainly: a name stands twice, or something is escaped")
            return cls._of(document)
        except ValueError as error:
            raise ReceiptRefused(f"the receipt is malformed: {error}; ask for it again") from None

    @classmethod
    def _of(cls, document: Mapping[str, Any]) -> Self:
        ids = ("message_id", "sender_id", "content_id")
        blobs = ("evidence", "sender_entry", "platform_entry")
        _only(document, "format", "version", *ids, *blobs, "deliveries")
        message_id, sender_id, content_id = (_bytes(document, name) for name in ids)
        evidence, sender_entry, platform_entry = (_bytes(document, name) for name in blobs)
        deliveries = tuple(map(_delivery, _list(document, "deliveries")))
        return cls(MessageId(message_id), SenderId(sender_id), ContentId(content_id), evidence, sender_entry, platform_entry, deliveries)


def _delivery(document: Any) -> ReceiptDelivery:
    _only(document, "device_id", "identity_public_key", "state", "reason_code", "acknowledgements")
    return ReceiptDelivery(
        DeviceId(_bytes(document, "device_id")),
        _bytes(document, "identity_public_key"),
        State(_number(document, "state")),
        Reason(_number(document, "reason_code")),
        tuple(map(_acknowledgement, _list(document, "acknowledgements"))),
    )


def _acknowledgement(document: Any) -> SignedAcknowledgement:
    _only(document, "outcome", "reason_code", "at_ms", "signature")
    at_ms = document["at_ms"]
    if not isinstance(at_ms, str) or _DECIMAL.fullmatch(at_ms) is None:
        raise ValueError("at_ms must be decimal text")
    outcome, reason = AckOutcome(_number(document, "outcome")), Reason(_number(document, "reason_code"))
    return SignedAcknowledgement(outcome, reason, int(at_ms), _bytes(document, "signature"))


def _only(document: Any, *names: str) -> None:
    if not isinstance(document, dict) or document.keys() != set(names):
        raise ValueError(f"here belong {', '.join(names)}, and nothing else")


def _bytes(document: Mapping[str, Any], name: str) -> bytes:
    value = document[name]
    if not isinstance(value, str) or _HEX.fullmatch(value) is None:
        raise ValueError(f"{name} must be lower-case hex")
    return bytes.fromhex(value)


def _number(document: Mapping[str, Any], name: str) -> int:
    value = document[name]
    if type(value) is not int or not 0 <= value <= _U16_MAX:
        raise ValueError(f"{name} must be a whole number of 16 bits")
    return value


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document[name]
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


class Finding(enum.Enum):
    """What became of a claim."""

    PROVEN = "proven"
    # Nothing that was signed says so; the platform may say it.
    UNPROVEN = "not proven"
    # What is there to prove it does not verify: somebody changed the receipt, the root is another one or has revoked what it rests on.
    FAILED = "does not verify"


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that a receipt says. `name` is for programs (docs/receipts.md lists them), `sentence` for people."""

    name: str
    finding: Finding
    sentence: str
    device_id: DeviceId | None = None


@dataclass(frozen=True, slots=True)
class ReceiptVerdict:
    """What a receipt proves and what it does not."""

    claims: tuple[Claim, ...]

    @property
    def failed(self) -> bool:
        """Whether something in the receipt does not verify: then believe none of it."""
        return any(each.finding is Finding.FAILED for each in self.claims)

    @property
    def sender_proven(self) -> bool:
        """Whether nothing failed, and the sender's part is proven: who sealed and signed which content, and when."""
        return not self.failed and any(each.name == "content_signature" and each.finding is Finding.PROVEN for each in self.claims)

    @property
    def delivered_to(self) -> tuple[DeviceId, ...]:
        """Devices that signed that they opened and stored the message, in time or late; empty where anything failed."""
        if self.failed:
            return ()
        return tuple(
            each.device_id
            for each in self.claims
            if each.name == "delivered" and each.finding is Finding.PROVEN and each.device_id is not None
        )


def verify_receipt(
    receipt: Receipt, root_public_key: bytes, *, envelope: bytes | None = None, revocations: RevocationList | None = None
) -> ReceiptVerdict:
    """What the receipt proves to whoever trusts this root.

    `envelope` is the whole envelope, if somebody kept it: it is compared, but for its stanzas, which nothing signs. `revocations`
    is the root's newest list, as `verify_revocations()` gives it: a receipt whose key or entries it revokes fails, whenever the content
    was made, for whoever stole a key signs any time. Raises ValueError for a root that is not 32 bytes.
    """
    if len(root_public_key) != 32:
        raise ValueError("a root's public key is 32 bytes")
    claims = [*_sender_claims(receipt, root_public_key, revocations), _content_claim(receipt, envelope)]
    for delivery in receipt.deliveries:
        claims += _delivery_claims(receipt, delivery)
    return ReceiptVerdict((*claims, *_limits(receipt, claims)))


def verify_entry_then(root_public_key: bytes, blob: bytes, created_at_ms: int, role: EntryRole) -> SenderEntry:
    """The entry in a signed blob, as of when a content was created: signed by the root, of this role, in force at that time to
    within `CREATED_SKEW_MS`: the platform judged it by its own clock. Raises EntryRefused."""
    for at_ms in (created_at_ms, created_at_ms - CREATED_SKEW_MS):
        try:
            return verify_sender_entry(root_public_key, blob, at_ms, role=role)
        except EntryRefused:
            continue
    return verify_sender_entry(root_public_key, blob, created_at_ms + CREATED_SKEW_MS, role=role)


def _sender_claims(receipt: Receipt, root_public_key: bytes, revocations: RevocationList | None) -> Iterator[Claim]:
    """Who sealed and signed, when, and by which entries."""
    if not receipt.evidence:
        if receipt.nothing_sealed:
            why = "Nothing was ever sealed, so there is nothing to prove: the recipient had blocked the sender, says the platform."
        else:
            why = "Nothing of the envelope is kept: it was never sealed, or is from before that was kept. Nothing shows who sent what."
        yield Claim("content_signature", Finding.UNPROVEN, why)
        return
    try:
        header = Header.decode(receipt.evidence[:HEADER_BYTES])
    except EnvelopeRefused:
        yield Claim("header", Finding.FAILED, "What is kept is not the beginning of an envelope.")
        return
    if (header.sender_id, header.content_id) != (receipt.sender_id, receipt.content_id):
        yield Claim("header", Finding.FAILED, "The envelope names another sender or another content than the receipt.")
    claim, sender = _entry_claim(receipt.sender_entry, root_public_key, header, EntryRole.SENDER)
    yield claim
    platform: SenderEntry | None = None
    if header.server_sealed:
        claim, platform = _entry_claim(receipt.platform_entry, root_public_key, header, EntryRole.PLATFORM)
        yield claim
    elif receipt.platform_entry:
        yield Claim("platform_entry", Finding.FAILED, "There is an entry of the platform, which did not seal this.")
    claim, public_key = _signature_claim(receipt, header, sender, platform)
    yield claim
    if public_key is not None:
        yield _revocation_claim(revocations, [each for each in (sender, platform) if each is not None], public_key)


def _entry_claim(blob: bytes, root_public_key: bytes, header: Header, role: EntryRole) -> tuple[Claim, SenderEntry | None]:
    """What is to be said of the sender's entry or the platform's, and the entry if it holds."""
    whose = role.name.lower()
    name = f"{whose}_entry"
    if not blob:
        return Claim(name, Finding.UNPROVEN, f"No entry of the {whose} is kept that allowed it at that time."), None
    try:
        entry = verify_entry_then(root_public_key, blob, header.created_at_ms, role)
        if role is EntryRole.SENDER and entry.sender_id != header.sender_id:
            raise EntryRefused("the entry certifies another sender")
    except EntryRefused as error:
        return Claim(name, Finding.FAILED, f"The {whose}'s entry does not hold: {_why(error)}."), None
    who = f"{entry.display_name!r} as the sender {uuid_text(entry.sender_id)}" if role is EntryRole.SENDER else "the platform's key"
    return Claim(name, Finding.PROVEN, f"The root certified {who}, by an entry of that time."), entry


def _why(error: EntryRefused) -> str:
    """What is wrong; the second half of the text says what a phone should do."""
    what = str(error).partition(";")[0]
    return f"it {what.removeprefix('the sender entry ').removeprefix('the entry ')}"


def _signature_claim(
    receipt: Receipt, header: Header, sender: SenderEntry | None, platform: SenderEntry | None
) -> tuple[Claim, bytes | None]:
    """What is to be said of the signature, and the key that made it if it holds."""
    name = "content_signature"
    if sender is None or (header.server_sealed and platform is None):
        return Claim(name, Finding.UNPROVEN, "Without a valid entry nothing shows whose signature the envelope carries."), None
    try:
        public_key = content_public_key(header, sender, platform)
    except EnvelopeRefused:
        way = "by the server" if header.server_sealed else "by the sender itself"
        return Claim(
            name, Finding.FAILED, f"The entries do not allow that the key which the envelope names seals {way} at that time."
        ), None
    try:
        verify_evidence(receipt.evidence, public_key)
    except EnvelopeRefused:
        return Claim(name, Finding.FAILED, "The envelope is not signed by the key that it names."), None
    at, ref = _time(header.created_at_ms), header.recipient_ref.hex()[:16]
    if header.server_sealed:
        who = f"The platform sealed and signed this content for {sender.display_name!r}, which allows that"
    else:
        who = f"{sender.display_name!r} itself sealed and signed this content"
    return Claim(name, Finding.PROVEN, f"{who}, at {at} by its clock, for the recipient that it knows as {ref}…"), public_key


def _revocation_claim(revocations: RevocationList | None, entries: list[SenderEntry], public_key: bytes) -> Claim:
    name = "not_revoked"
    if revocations is None:
        return Claim(
            name, Finding.UNPROVEN, "That the root has not taken back the key that signed: no revocation list was given to look into."
        )
    number = f"The root's revocation list {revocations.serial}, of {_time(revocations.issued_ms)},"
    if revocations.revokes_key(public_key) or any(map(revocations.revokes_entry, entries)):
        return Claim(
            name, Finding.FAILED, f"{number} takes back the key that signed, or the entry: whoever stole it can sign with any earlier time."
        )
    return Claim(name, Finding.PROVEN, f"{number} takes back neither the key that signed nor its entry.")


def _content_claim(receipt: Receipt, envelope: bytes | None) -> Claim:
    name = "content"
    if receipt.nothing_sealed:
        return Claim(name, Finding.UNPROVEN, "What it said: nothing was ever sealed, and nothing is kept that it could be compared with.")
    if envelope is None:
        return Claim(name, Finding.UNPROVEN, "What it said: only a hash is kept. Whoever kept the envelope can have it compared.")
    if not receipt.evidence:
        return Claim(name, Finding.UNPROVEN, "What it said: nothing is kept that the envelope could be compared with.")
    try:
        parsed = Envelope.parse(envelope)
    except EnvelopeRefused:
        return Claim(name, Finding.FAILED, "What was given to compare is not a whole envelope.")
    if evidence_of(parsed.head, parsed.tail) != receipt.evidence:
        return Claim(name, Finding.FAILED, "The envelope that was given is another one.")
    return Claim(name, Finding.PROVEN, "The envelope that was given is this one: head, content and signature are the same.")


# What an acknowledgement says, by outcome: name of the claim, and how it reads.
_SIGNED: Final = {
    AckOutcome.DELIVERED: ("delivered", "opened and stored the message"),
    AckOutcome.UNDELIVERED: ("undelivered", "could not open or show the message"),
    AckOutcome.BLOCKED: ("blocked", "refused the message because its user blocks the sender"),
    AckOutcome.READ: ("read", "showed the message to its user, who read it"),
}
# Of UNDELIVERED over no envelope.
_UNREADABLE: Final = ("unreadable", "could not read what came as this message, whatever that was")
# Which outcome a device must have signed for a state that it brings about itself.
_STATE_OF: Final = {
    AckOutcome.DELIVERED: State.DELIVERED,
    AckOutcome.UNDELIVERED: State.UNDELIVERED,
    AckOutcome.BLOCKED: State.BLOCKED,
}


def _delivery_claims(receipt: Receipt, delivery: ReceiptDelivery) -> Iterator[Claim]:
    """What the device signed, and whether that is what the platform says."""
    ends: list[Finding] = []
    for ack in delivery.acknowledgements:
        claim = _acknowledgement_claim(receipt, delivery, ack)
        if _STATE_OF.get(ack.outcome) is delivery.state and ack.reason == delivery.reason:
            ends.append(claim.finding)
        yield claim
    said = delivery.state.name + (f" ({delivery.reason.name})" if delivery.reason else "")
    if Finding.PROVEN in ends:
        yield Claim("state", Finding.PROVEN, f"The platform says {said}, and so did the device.", delivery.device_id)
    elif delivery.state is State.DELIVERED and not ends:
        # Only an acknowledgement brings this state about.
        yield Claim("state", Finding.FAILED, f"The platform says {said}, and the device signed nothing of the kind.", delivery.device_id)
    elif receipt.nothing_sealed:
        yield Claim(
            "state", Finding.UNPROVEN, f"The platform says {said}; the device was asked nothing and got nothing.", delivery.device_id
        )
    else:
        yield Claim("state", Finding.UNPROVEN, f"The platform says {said}; nothing shows that the device said so.", delivery.device_id)


def _acknowledgement_claim(receipt: Receipt, delivery: ReceiptDelivery, ack: SignedAcknowledgement) -> Claim:
    name, what = _SIGNED[ack.outcome]
    if not receipt.evidence:
        return Claim(
            name, Finding.UNPROVEN, f"Whether the device {what}: nothing is kept of the envelope that it signed over.", delivery.device_id
        )
    if not delivery.identity_public_key:
        return Claim(name, Finding.UNPROVEN, f"Whether the device {what}: its key is not known.", delivery.device_id)
    if not _is_signed(receipt, delivery, ack, envelope_digest(receipt.evidence)):
        if ack.outcome is not AckOutcome.UNDELIVERED or not _is_signed(receipt, delivery, ack, NO_DIGEST):
            return Claim(name, Finding.FAILED, f"That the device {what} is not signed by its key.", delivery.device_id)
        name, what = _UNREADABLE
    why = f" ({ack.reason.name})" if ack.reason else ""
    return Claim(
        name, Finding.PROVEN, f"The device's key signed that it {what}{why}, at {_time(ack.at_ms)} by its clock.", delivery.device_id
    )


def _is_signed(receipt: Receipt, delivery: ReceiptDelivery, ack: SignedAcknowledgement, digest: bytes) -> bool:
    """Whether the device signed this acknowledgement over the envelope with this digest."""
    proof = acknowledgement_proof(receipt.message_id, receipt.content_id, digest, delivery.device_id, ack.outcome, ack.reason, ack.at_ms)
    return verify_proof(delivery.identity_public_key, proof, ack.signature)


def _limits(receipt: Receipt, claims: list[Claim]) -> Iterator[Claim]:
    """What a receipt cannot prove, whoever made it."""
    outcomes = {name for name, _ in _SIGNED.values()}
    linked = any(each.name in outcomes and each.finding is Finding.PROVEN for each in claims)
    message = uuid_text(receipt.message_id)
    if linked:
        brought = f"A device's key signed that the message {message} brought it this very envelope."
    elif receipt.nothing_sealed:
        brought = f"That no envelope went out with the message {message}: the platform says so."
    else:
        brought = f"That the message {message} carried this envelope: only a device's signature would show it."
    yield Claim("message", Finding.PROVEN if linked else Finding.UNPROVEN, brought)
    try:
        accepted = f" Its id says {_time(uuid7_ms(receipt.message_id))}, by the platform's clock."
    except ValueError:
        accepted = ""
    yield Claim("acceptance", Finding.UNPROVEN, f"When the platform accepted it.{accepted}")
    yield Claim(
        "recipient",
        Finding.UNPROVEN,
        "That these keys are the recipient's devices': the platform says so. The head of the recipient's device log, which senders get "
        "with the keys, holds it to that.",
    )


def _time(unix_ms: int) -> str:
    return f"{moment(unix_ms):%Y-%m-%d %H:%M:%S} UTC"
