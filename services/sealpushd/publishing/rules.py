"""Decisions of publishing: what a request must be, what follows from who the recipient is, and how a status is told. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final, Literal

from sealpush.content import ContentRefused, check_content
from sealpush.envelope import CONTENT_BYTES_MAX, CREATED_SKEW_MS, HEADER_BYTES, Envelope, Header, content_public_key, verify_signature
from sealpush.errors import EnvelopeRefused
from sealpush.ids import SenderId
from sealpush.keys import SenderEntry, SenderMode, content_key_id
from sealpush.model import moment
from sealpush.v1 import common_pb2, content_pb2, publish_pb2
from sealpushd.platform import fields
from sealpushd.platform.clock import from_ms, to_ms
from sealpushd.platform.errors import FailedPrecondition, InvalidRequest, PermissionDenied

REQUEST_ID_MAX: Final = 64
BATCH_REQUESTS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 2 * 1024 * 1024
LIFETIME_DEFAULT: Final = timedelta(days=14)
DURATION_MIN: Final = timedelta(seconds=1)
LIFETIME_MAX: Final = timedelta(days=28)
# For how long no device may have been added: longer than this is no longer about a number that was taken over.
IDENTITY_UNCHANGED_MAX: Final = timedelta(days=365)
# An envelope's own lifetime and the one in the request may differ by rounding, not by more.
LIFETIME_DIFFERENCE_MAX: Final = timedelta(seconds=1)
SUBSCRIPTIONS_MAX: Final = 16
SUBSCRIPTION_CHARACTERS_MAX: Final = 64
LEG_NO_MAX: Final = 100
# There are fewer platforms than this; each named costs a look-up, and all go to registration with the batch of others.
PLATFORMS_MAX: Final = 16
# An identifier of 128 characters and what surrounds it. A longer one is nobody's, and together with others it would burst the frame
# that all senders' recipients share.
RECIPIENT_BYTES_MAX: Final = 1024
# A content of 64 KiB and a stanza of 1.2 kB for each of the 64 installations that a recipient can have; keeps a message far below the
# bound on a batch.
SEALED_BYTES_MAX: Final = 160 * 1024
# The waiting interval of a status; below the 10 s that any call may take.
WAIT_MAX: Final = timedelta(seconds=8)

_PLATFORM_KEY_REVOKED: Final = (
    "the platform's root revoked the key that the platform seals with: seal the content yourself, or ask the operator to seal with another"
    " key that the root certified"
)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
_PLATFORMS: Final = frozenset(common_pb2.Platform.values()) - {common_pb2.PLATFORM_UNSPECIFIED}

_REQUEST_LIMITS: Final = {"app_id": 64, "replace_key": 64, "tag": 50, "originator": 32}


class EnvelopeExpired(InvalidRequest):
    """The lifetime of what the sender sealed ended before it was accepted: it waited, or was retried, for too long."""

    reason = "ENVELOPE_EXPIRED"


@dataclass(frozen=True, slots=True)
class Publication:
    """A request that could be right: everything that can be known without asking anybody was checked."""

    request: publish_pb2.PublishRequest = dataclasses.field(repr=False)
    app_id: str
    created_at: datetime
    expires_at: datetime
    # Serialised Content for the server to seal, or the envelope that the sender sealed.
    plain: bytes | None = dataclasses.field(repr=False)
    envelope: Envelope | None
    # Devices added later get nothing, and neither do the others then; None: however new they are.
    added_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What the platform's root says of a sender: its entry, and what it took back of it since."""

    entry: SenderEntry
    is_revoked: bool = False
    # Of the sender's entry and of the platform's.
    revoked_keys: frozenset[bytes] = frozenset()
    # Of the key that the platform seals with, for every sender of the same root; None: it was never certified.
    platform: SenderEntry | None = None
    is_platform_revoked: bool = False


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest unless it can be an idempotency key."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            f"request_id must be 1 to {REQUEST_ID_MAX} visible ASCII characters; use a UUID of your own", field="request_id"
        )


def parse_publish(request: publish_pb2.PublishRequest, sender_id: SenderId, app_ids: Sequence[str], now: datetime) -> Publication:
    """What a sender asks for, its request id checked before.

    Raises InvalidRequest that names the field, PermissionDenied for an app that is not the sender's.
    """
    if request.recipient.WhichOneof("kind") is None:
        raise InvalidRequest("recipient is missing: give a phone number", field="recipient")
    if request.recipient.ByteSize() > RECIPIENT_BYTES_MAX:
        raise InvalidRequest(f"recipient is longer than {RECIPIENT_BYTES_MAX} bytes", field="recipient")
    # Before anything repeats such a text in a message of its own.
    for field, most in _REQUEST_LIMITS.items():
        fields.text(getattr(request, field), field, most)
    app_id = _app(request.app_id, app_ids)
    if request.content_class not in (common_pb2.CONTENT_CLASS_INFORMATIONAL, common_pb2.CONTENT_CLASS_ADVERTISING):
        raise InvalidRequest("content_class must be INFORMATIONAL or ADVERTISING", field="content_class")
    fields.enum(request.priority, "priority", common_pb2.Priority.values())
    fields.enum(request.channel, "channel", common_pb2.Channel.values())
    fields.enum(request.traffic_type, "traffic_type", common_pb2.TrafficType.values())
    if request.channel not in (common_pb2.CHANNEL_UNSPECIFIED, common_pb2.CHANNEL_PUSH):
        raise InvalidRequest("this installation carries messages by push only", field="channel")
    for platform in fields.bounded(request.platforms, "platforms", PLATFORMS_MAX):
        fields.enum(platform, "platforms", _PLATFORMS)
    fields.optional_id16(request.order_id, "order_id")
    fields.optional_id16(request.group_id, "group_id")
    fields.number(request.leg_no, "leg_no", LEG_NO_MAX)
    for subscription in fields.bounded(request.subscriptions, "subscriptions", SUBSCRIPTIONS_MAX):
        fields.text(subscription, "subscriptions", SUBSCRIPTION_CHARACTERS_MAX)
    lifetime = _lifetime(request)
    unchanged = _duration(request, "identity_unchanged_for", IDENTITY_UNCHANGED_MAX)
    if unchanged is not None and (request.primary_only or request.subscriptions):
        # Whoever took the number over makes its own device the primary one and ends it again: then nobody is left to look at, and
        # "not registered" would send the message to that number by SMS.
        raise InvalidRequest(
            "identity_unchanged_for does not go with primary_only or subscriptions, which the recipient's devices say of themselves:"
            " leave these out",
            field="identity_unchanged_for",
        )
    added_until = None if unchanged is None else now - unchanged
    match request.WhichOneof("content"):
        case "plain":
            expires_at = now + (lifetime or LIFETIME_DEFAULT)
            return Publication(request, app_id, now, expires_at, _plain(request), None, added_until)
        case "sealed":
            envelope = _sealed(request.sealed, sender_id, lifetime, now)
            header = envelope.header
            created_at, expires_at = from_ms(header.created_at_ms), from_ms(header.expires_at_ms)
            return Publication(request, app_id, created_at, expires_at, None, envelope, added_until)
    raise InvalidRequest("content is missing: give `plain` or `sealed`", field="content")


def _app(app_id: str, allowed: Sequence[str]) -> str:
    if not app_id:
        if not allowed:
            raise PermissionDenied("this sender may not use any app yet; ask the operator to grant one")
        return allowed[0]
    if app_id not in allowed:
        raise PermissionDenied(f"this sender may not use the app {app_id!r}")
    return app_id


def _lifetime(request: publish_pb2.PublishRequest) -> timedelta | None:
    return _duration(request, "lifetime", LIFETIME_MAX)


def _duration(
    request: publish_pb2.PublishRequest, field: Literal["lifetime", "identity_unchanged_for"], most: timedelta
) -> timedelta | None:
    return fields.duration(getattr(request, field), field, most, least=DURATION_MIN) if request.HasField(field) else None


def _plain(request: publish_pb2.PublishRequest) -> bytes:
    content = content_pb2.Content()
    content.CopyFrom(request.plain)
    try:
        check_content(content)
    except ContentRefused as e:
        raise InvalidRequest(str(e), field=f"plain.{e.field}") from e
    if content.version > 1:
        raise InvalidRequest("this server knows version 1 of a content", field="plain.version")
    if content.content_class not in (common_pb2.CONTENT_CLASS_UNSPECIFIED, request.content_class):
        raise InvalidRequest("the content names another class than the request", field="plain.content_class")
    if content.replace_key not in ("", request.replace_key):
        raise InvalidRequest("the content names another replace_key than the request", field="plain.replace_key")
    content.version = 1
    content.content_class = request.content_class
    content.replace_key = request.replace_key
    serialised = content.SerializeToString()
    if len(serialised) > CONTENT_BYTES_MAX:
        raise InvalidRequest(f"the content is {len(serialised)} bytes, at most {CONTENT_BYTES_MAX} are possible; shorten it", field="plain")
    return serialised


def _sealed(sealed: publish_pb2.SealedContent, sender_id: SenderId, lifetime: timedelta | None, now: datetime) -> Envelope:
    if len(sealed.envelope) > SEALED_BYTES_MAX:
        raise InvalidRequest(f"an envelope is at most {SEALED_BYTES_MAX} bytes", field="sealed.envelope")
    try:
        envelope = Envelope.parse(sealed.envelope)
    except EnvelopeRefused as e:
        raise InvalidRequest("the envelope cannot be parsed; see docs/device-protocol.md for its layout", field="sealed.envelope") from e
    header = envelope.header
    if header.sender_id != sender_id:
        raise InvalidRequest("the envelope names another sender", field="sealed.envelope")
    if header.server_sealed:
        raise InvalidRequest("the envelope says that the server sealed it; leave that flag out", field="sealed.envelope")
    if abs(to_ms(now) - header.created_at_ms) > CREATED_SKEW_MS:
        raise InvalidRequest(
            "the envelope was made more than 5 minutes from the server's time; check your clock and seal again", field="sealed.envelope"
        )
    own = timedelta(milliseconds=header.expires_at_ms - header.created_at_ms)
    if own < DURATION_MIN:
        raise InvalidRequest("the envelope lives shorter than 1 second", field="sealed.envelope")
    if lifetime is not None and abs(own - lifetime) > LIFETIME_DIFFERENCE_MAX:
        raise InvalidRequest("lifetime differs from the envelope's own; leave it out or make them equal", field="lifetime")
    if header.expires_at_ms <= to_ms(now):
        raise EnvelopeExpired(
            "the envelope has expired, and nothing is stored; if its content is still of use, seal it again", field="sealed.envelope"
        )
    if len({stanza.device_id for stanza in envelope.stanzas}) != len(envelope.stanzas):
        raise InvalidRequest("the envelope has two stanzas for one device", field="sealed.envelope")
    return envelope


def check_sealing_key(head: bytes, standing: Standing) -> None:
    """Raises FailedPrecondition for a content that the platform sealed with a key that the root revoked, while another is good."""
    if not standing.revoked_keys or not head:
        return
    if Header.decode(head[:HEADER_BYTES]).sender_key_id in map(content_key_id, standing.revoked_keys):
        raise FailedPrecondition(_PLATFORM_KEY_REVOKED)


def check_standing(publication: Publication, standing: Standing, now: datetime) -> None:
    """What the root allows the sender. Raises FailedPrecondition for the mode, an entry out of time and what was revoked,
    InvalidRequest for the signature.

    Phones check the same: what they would refuse is refused here, before it is accepted.
    """
    entry = standing.entry
    if standing.is_revoked:
        raise FailedPrecondition("the platform's root revoked the sender's entry; ask the operator to certify a new one")
    _check_in_force(entry, "the sender's entry", now)
    if publication.envelope is None:
        if SenderMode.SERVER not in entry.modes:
            raise FailedPrecondition("this sender is end-to-end only: seal the content yourself and publish it as `sealed`")
        if standing.platform is None:
            raise FailedPrecondition(
                "the key that the platform seals with has no entry: seal the content yourself, or ask the operator to certify it"
            )
        _check_in_force(standing.platform, "the entry of the platform's key", now)
        if standing.is_platform_revoked:
            raise FailedPrecondition(_PLATFORM_KEY_REVOKED)
        return
    if SenderMode.END_TO_END not in entry.modes:
        raise FailedPrecondition("this sender's entry lets only the server seal: publish the content as `plain`")
    try:
        public_key = content_public_key(publication.envelope.header, entry, None)
        if public_key in standing.revoked_keys:
            raise FailedPrecondition(
                "the platform's root revoked the key that signed the envelope: seal with another key of the entry, or ask the operator"
                " to certify a new one"
            )
        verify_signature(publication.envelope, public_key)
    except EnvelopeRefused as e:
        raise InvalidRequest(
            "the envelope is not signed by a key that the sender's entry lists for this time", field="sealed.envelope"
        ) from e


def _check_in_force(entry: SenderEntry, what: str, now: datetime) -> None:
    if to_ms(now) < entry.not_before_ms:
        begins_at = moment(entry.not_before_ms)
        raise FailedPrecondition(f"{what} is not in force before {begins_at:%Y-%m-%d %H:%M} UTC; publish then")
    if to_ms(now) >= entry.not_after_ms:
        raise FailedPrecondition(f"{what} has ended; ask the operator to certify a new one")


def blocked_reason(content_class: int, *, block_all: bool, block_advertising: bool) -> int:
    """Why the recipient's decision forbids a message; 0: it does not."""
    if block_all:
        return common_pb2.REASON_CODE_SENDER_BLOCKED
    if block_advertising and content_class == common_pb2.CONTENT_CLASS_ADVERTISING:
        return common_pb2.REASON_CODE_ADVERTISING_BLOCKED
    return 0


def traffic_type(request: publish_pb2.PublishRequest) -> int:
    """The traffic type as given, else the one that the content class stands for."""
    if request.traffic_type:
        return request.traffic_type
    if request.content_class == common_pb2.CONTENT_CLASS_ADVERTISING:
        return common_pb2.TRAFFIC_TYPE_ADVERTISING
    return common_pb2.TRAFFIC_TYPE_INFORMATIONAL


class Wait(Enum):
    """How a status is asked for."""

    TRUE_STATE = "true state"
    ASSUMED = "assumed"
    UP_TO = "up to"


def parse_wait(request: publish_pb2.GetStatusRequest) -> tuple[Wait, timedelta]:
    """Absent: the true state. Present and 0: the assumed one. Longer: wait so long at the most. Raises InvalidRequest."""
    if not request.HasField("wait"):
        return Wait.TRUE_STATE, timedelta()
    wait = fields.duration(request.wait, "wait", WAIT_MAX)
    return (Wait.UP_TO, wait) if wait else (Wait.ASSUMED, wait)


TERMINAL: Final = frozenset(
    {
        common_pb2.STATE_DELIVERED,
        common_pb2.STATE_UNDELIVERED,
        common_pb2.STATE_BLOCKED,
        common_pb2.STATE_EXPIRED,
        common_pb2.STATE_CANCELLED,
        common_pb2.STATE_REPLACED,
    }
)

# The app instance is gone, or the sender itself took the message back: nothing to assume then.
_NOT_ASSUMED_REASONS: Final = frozenset(
    {
        common_pb2.REASON_CODE_UNREGISTERED,
        common_pb2.REASON_CODE_NUMBER_REBOUND,
        common_pb2.REASON_CODE_NO_APPLICATION,
        common_pb2.REASON_CODE_TOKEN_GONE,
    }
)
_NOT_ASSUMED_STATES: Final = frozenset({common_pb2.STATE_CANCELLED, common_pb2.STATE_REPLACED})


def assume(status: publish_pb2.MessageStatus) -> publish_pb2.MessageStatus:
    """The answer for a waiting interval of 0: DELIVERED whether or not the device received it, as long as the app is registered."""
    if status.state in _NOT_ASSUMED_STATES or status.reason_code in _NOT_ASSUMED_REASONS:
        return status
    assumed = publish_pb2.MessageStatus()
    assumed.CopyFrom(status)
    assumed.assumed = status.state != common_pb2.STATE_DELIVERED
    assumed.state = common_pb2.STATE_DELIVERED
    assumed.reason_code = common_pb2.REASON_CODE_UNSPECIFIED
    return assumed
