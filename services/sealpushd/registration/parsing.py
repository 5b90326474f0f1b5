"""Between protobuf and the values inside. Refusals name the field."""

from __future__ import annotations

from datetime import datetime
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.errors import KeyRefused
from sealpush.ids import DeviceId, SenderId
from sealpush.keys import PrekeyKind, SignedPrekey, is_usable_ed25519, verify_prekey
from sealpush.proofs import body_digest, change_proof, verify_proof
from sealpush.v1 import common_pb2, keys_pb2, registration_pb2
from sealpush.wire import read_prekey
from sealpushd.platform import fields
from sealpushd.platform.errors import InvalidRequest
from sealpushd.platform.tokens import DeviceCaller
from sealpushd.registration import rules
from sealpushd.registration.phones import Numbers
from sealpushd.registration.rules import NO_TOKEN, IdentifierKind, InstallationChange, Pin, Preference, PushToken, Query
from sealpushd.registration.store import DeadToken, RegistrationStore
from sealpushd.v1 import directory_pb2

PHONE_HELP: Final = "not a valid phone number in international format, with + and country code, such as +380501234567"

_PLATFORMS: Final = frozenset(common_pb2.Platform.values())
_ENVIRONMENTS: Final = frozenset(common_pb2.PushEnvironment.values())
_PRODUCTION: Final = int(common_pb2.PUSH_ENVIRONMENT_PRODUCTION)

MessageType = TypeVar("MessageType", bound=Message)


def identity_key(value: bytes) -> bytes:
    if not is_usable_ed25519(value):
        raise InvalidRequest(
            "identity_public_key must be a canonical Ed25519 key of 32 bytes, not of low order; make a new identity",
            field="identity_public_key",
        )
    return value


def signed_change(kind: type[MessageType], change: bytes) -> MessageType:
    """The message whose serialised bytes a device signed."""
    try:
        return kind.FromString(change)
    except DecodeError as e:
        raise InvalidRequest(f"change is no serialised {kind.DESCRIPTOR.name}", field="change") from e


def checked_counter(caller: DeviceCaller, proof: common_pb2.DeviceProof, method: str, change: bytes) -> int:
    """The counter of a change, proven to come from this device."""
    counter = fields.number(proof.counter, "proof.counter", fields.I64_MAX, least=1)
    statement = change_proof(caller.device_id, counter, method, body_digest(change))
    if not verify_proof(caller.identity_public_key, statement, proof.signature):
        raise InvalidRequest("the change is not signed by the identity key of this device", field="proof.signature")
    return counter


def installation_change(said: registration_pb2.Installation) -> InstallationChange:
    """What an update says: absent and zero fields stay."""
    fields.enum(said.platform, "platform", _PLATFORMS)
    fields.enum(said.push_environment, "push_environment", _ENVIRONMENTS)
    token = None
    if said.HasField("push_token"):
        token = PushToken(said.push_token) if said.push_token else NO_TOKEN
    return rules.check_installation(
        InstallationChange(
            platform=int(said.platform) or None,
            push_token=token,
            push_environment=int(said.push_environment) or None,
            push_topic=said.push_topic or None,
            push_allowed_by_os=said.push_allowed_by_os if said.HasField("push_allowed_by_os") else None,
            push_allowed_by_app=said.push_allowed_by_app if said.HasField("push_allowed_by_app") else None,
            is_primary=said.is_primary if said.HasField("is_primary") else None,
            app_version=said.app_version if said.HasField("app_version") else None,
            locale=said.locale if said.HasField("locale") else None,
            subscriptions=tuple(dict.fromkeys(said.subscriptions.names)) if said.HasField("subscriptions") else None,
        )
    )


def new_installation(said: registration_pb2.Installation) -> InstallationChange:
    """What a registration says, with a value for everything."""
    change = installation_change(said)
    if change.platform is None:
        raise InvalidRequest("name the platform", field="installation.platform")
    return InstallationChange(
        platform=change.platform,
        push_token=change.push_token or NO_TOKEN,
        push_environment=change.push_environment or _PRODUCTION,
        push_topic=change.push_topic or "",
        # A system that asks its user reports the answer; until then pushes are tried.
        push_allowed_by_os=change.push_allowed_by_os is not False,
        push_allowed_by_app=change.push_allowed_by_app is not False,
        is_primary=bool(change.is_primary),
        app_version=change.app_version or "",
        locale=change.locale or "",
        subscriptions=change.subscriptions or (),
    )


def signed_prekey(prekey: keys_pb2.Prekey, device: DeviceId, identity_public_key: bytes, min_suite: int, now_ms: int) -> SignedPrekey:
    """The first signed prekey of a device, verified."""
    if prekey.kind != keys_pb2.PREKEY_KIND_SIGNED:
        raise InvalidRequest("the first prekey must be of the kind SIGNED", field="signed_prekey.kind")
    parsed = read_prekey(prekey, PrekeyKind.SIGNED)
    try:
        verify_prekey(parsed, device_id=device, identity_public_key=identity_public_key, now_ms=now_ms, min_suite=min_suite)
    except KeyRefused as e:
        raise InvalidRequest(str(e), field="signed_prekey") from e
    return parsed


def preference(said: registration_pb2.Preference) -> Preference:
    sender_id = SenderId(fields.id16(said.sender_id, "sender_id"))
    return Preference(sender_id, said.block_all, said.block_advertising, said.mute)


def new_pin(said: registration_pb2.RegistrationLock) -> Pin | None:
    """The PIN to set; None: no lock."""
    pin = rules.typed_pin(said.pin)
    return None if pin is None else rules.check_new_pin(pin)


def query(asked: directory_pb2.ResolveQuery, store: RegistrationStore, numbers: Numbers) -> Query:
    """One recipient to resolve. Raises InvalidRequest."""
    recipient = asked.recipient
    kind = recipient.WhichOneof("kind")
    scope = ""
    fields.id16(asked.sender_id, "sender_id")
    fields.app_id(asked.app_id)
    if kind == "phone":
        phone = numbers.parse(recipient.phone)
        if phone is None:
            raise InvalidRequest(PHONE_HELP, field="recipient.phone")
        number, lookup = IdentifierKind.PHONE, store.phone_lookup(phone)
    elif kind == "rnokpp":
        if not 1 <= len(recipient.rnokpp) <= rules.RNOKPP_CHARACTERS_MAX:
            raise InvalidRequest(f"an rnokpp has 1 to {rules.RNOKPP_CHARACTERS_MAX} characters", field="recipient.rnokpp")
        number, lookup = IdentifierKind.RNOKPP, store.identifier_lookup(recipient.rnokpp.strip(), "rnokpp")
    elif kind == "external_user_id":
        if not 1 <= len(recipient.external_user_id) <= rules.EXTERNAL_ID_CHARACTERS_MAX:
            most = rules.EXTERNAL_ID_CHARACTERS_MAX
            raise InvalidRequest(f"an external user id has 1 to {most} characters", field="recipient.external_user_id")
        # The sender's own names of its users mean nothing to another sender.
        scope = asked.sender_id.hex()
        number, lookup = IdentifierKind.EXTERNAL_USER, store.identifier_lookup(recipient.external_user_id, "external user")
    else:
        raise InvalidRequest("name a recipient: phone, rnokpp or external_user_id", field="recipient")
    if not (asked.primary_only or asked.subscriptions or asked.platforms):
        return Query(number, scope, lookup, asked.app_id, asked.sender_id)
    return Query(
        number, scope, lookup, asked.app_id, asked.sender_id, asked.primary_only, tuple(asked.subscriptions), tuple(asked.platforms)
    )


def dead_token(said: directory_pb2.DeadToken, now: datetime) -> DeadToken:
    return DeadToken(
        fields.id16(said.device_id, "device_id"),
        PushToken(said.push_token),
        fields.moment(said.dead_at, "dead_at") if said.HasField("dead_at") else now,
    )


def timestamp(moment: datetime) -> Timestamp:
    """Half the time of Timestamp.FromDatetime."""
    return Timestamp(seconds=int(moment.timestamp()), nanos=moment.microsecond * 1000)
