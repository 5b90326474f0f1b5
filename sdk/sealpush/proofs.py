"""The exact bytes a device signs with its identity key, and the check of such a signature.

Every proof is `tag | version1 | fields`, big-endian. Tags differ and none is the beginning of another, fields have a
fixed width or a length before them: two different statements never give the same bytes, and a signature for one kind
is worth nothing for another. Both sides build the bytes from what they know; only the signature travels.

    challenge answer   "SPP1-challenge" | 1 | device_id16 | len2 | challenge
    registration       "SPP1-register"  | 1 | registration_id16 | identity_public_key32 | len2 | app_id (ASCII)
    acknowledgement    "SPP1-ack"       | 1 | message_id16 | content_id16 | envelope_digest32 | device_id16
                                           | outcome1 | reason_code2 | at_ms8
    change             "SPP1-change"    | 1 | device_id16 | counter8 | len1 | method (ASCII) | SHA-256(request body)32
    vouch              "SPP1-vouch"     | 1 | device_id16 | identity_public_key32 | by_device_id16 | added_head32

An acknowledgement names the envelope by its digest, because who seals chooses the content id and may choose it twice.

A change is an installation update, an unregistration, the removal of another device, a preference, a registration lock or a
prekey upload: anything that must not be replayed. Its counter rises with every change of the device; the server refuses one
that does not. A vouch needs none: the head of the device log right after its entry names one addition of one device in one
history.
"""

import enum
import hashlib
import struct
from typing import Final

from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RegistrationId, check_id, is_app_id
from sealpush.keys import IdentityKey, verify_ed25519

TAG_CHALLENGE: Final = b"SPP1-challenge"
TAG_REGISTER: Final = b"SPP1-register"
TAG_ACKNOWLEDGEMENT: Final = b"SPP1-ack"
TAG_CHANGE: Final = b"SPP1-change"
TAG_VOUCH: Final = b"SPP1-vouch"

CHALLENGE_BYTES_MIN: Final = 16  # enough randomness that a challenge never repeats
CHALLENGE_BYTES_MAX: Final = 512  # a stateless challenge carries a time, a scope and a MAC; nothing needs more
METHOD_BYTES_MAX: Final = 100  # a full gRPC method name

# In place of an envelope's digest, where the device could not read that far.
NO_DIGEST: Final = bytes(32)

_VERSION: Final = b"\x01"
_ACKNOWLEDGEMENT = struct.Struct(">16s16s32s16sBHQ")
_U64_MAX: Final = (1 << 64) - 1
_U16_MAX: Final = (1 << 16) - 1


class AckOutcome(enum.IntEnum):
    """What became of a message on this device. READ stands beside DELIVERED and never replaces it."""

    DELIVERED = 1
    UNDELIVERED = 2
    BLOCKED = 3
    READ = 4


def challenge_proof(challenge: bytes, device_id: DeviceId) -> bytes:
    """What a device signs to prove itself for a token. `challenge` is the server's bytes, 16 to 512, unchanged."""
    if not CHALLENGE_BYTES_MIN <= len(challenge) <= CHALLENGE_BYTES_MAX:
        raise ValueError(f"challenge must be {CHALLENGE_BYTES_MIN} to {CHALLENGE_BYTES_MAX} bytes")
    return b"".join((TAG_CHALLENGE, _VERSION, check_id(device_id, "device_id"), len(challenge).to_bytes(2, "big"), challenge))


def registration_proof(registration_id: RegistrationId, identity_public_key: bytes, app_id: AppId) -> bytes:
    """What a new device signs to show that it holds the identity it registers, for this registration and app only."""
    if len(identity_public_key) != 32:
        raise ValueError("identity_public_key must be 32 bytes")
    if not is_app_id(app_id):
        raise ValueError("app_id must be 1 to 64 characters of a-z 0-9 - .")
    app = app_id.encode("ascii")
    registration = check_id(registration_id, "registration_id")
    return b"".join((TAG_REGISTER, _VERSION, registration, identity_public_key, len(app).to_bytes(2, "big"), app))


def acknowledgement_proof(
    message_id: MessageId,
    content_id: ContentId,
    envelope_digest: bytes,
    device_id: DeviceId,
    outcome: AckOutcome,
    reason_code: int,
    at_ms: int,
) -> bytes:
    """What a device signs about the end of one delivery.

    `envelope_digest` is the 32 bytes of `Envelope.digest`, `NO_DIGEST` where the device could not read what came so far.
    `reason_code` is 0 to 65535 and 0 when there is nothing to say; `at_ms` is Unix milliseconds by the server's time.
    The bytes are the same however often they are built, so repeating an acknowledgement repeats its signature.
    """
    if len(envelope_digest) != 32:
        raise ValueError("envelope_digest must be the 32 bytes of Envelope.digest")
    if not 0 <= reason_code <= _U16_MAX:
        raise ValueError("reason_code must fit 16 bits")
    if not 0 <= at_ms <= _U64_MAX:
        raise ValueError("at_ms must be Unix milliseconds")
    fields = _ACKNOWLEDGEMENT.pack(
        check_id(message_id, "message_id"),
        check_id(content_id, "content_id"),
        envelope_digest,
        check_id(device_id, "device_id"),
        AckOutcome(outcome),
        reason_code,
        at_ms,
    )
    return TAG_ACKNOWLEDGEMENT + _VERSION + fields


def read_proof(message_id: MessageId, content_id: ContentId, envelope_digest: bytes, device_id: DeviceId, at_ms: int) -> bytes:
    """What a device signs when its user has read a message: an acknowledgement with outcome READ and no reason."""
    return acknowledgement_proof(message_id, content_id, envelope_digest, device_id, AckOutcome.READ, 0, at_ms)


def change_proof(device_id: DeviceId, counter: int, method: str, body_sha256: bytes) -> bytes:
    """What a device signs over one change of its keys, installation or preferences.

    `method` is the full gRPC method name, 1 to 100 printable ASCII characters without spaces; `body_sha256` is
    `body_digest()` of the request body bytes exactly as sent. `counter` is 1 or more.
    """
    if not 1 <= counter <= _U64_MAX:
        raise ValueError("counter must be 1 or more within 64 bits; take it from Keystore.next_counter()")
    if not (1 <= len(method) <= METHOD_BYTES_MAX and all("!" <= char <= "~" for char in method)):
        raise ValueError(f"method must be 1 to {METHOD_BYTES_MAX} printable ASCII characters without spaces")
    if len(body_sha256) != 32:
        raise ValueError("body_sha256 must be the 32 bytes of body_digest()")
    name = method.encode("ascii")
    return b"".join(
        (
            TAG_CHANGE,
            _VERSION,
            check_id(device_id, "device_id"),
            counter.to_bytes(8, "big"),
            bytes((len(name),)),
            name,
            body_sha256,
        )
    )


def vouch_proof(device_id: DeviceId, identity_public_key: bytes, by_device_id: DeviceId, added_head: bytes) -> bytes:
    """What a device signs about another one of the same person: its id belongs to this identity key, and the person said so.

    `added_head` is the 32-byte head of the person's device log right after the entry that added the device.
    """
    if len(identity_public_key) != 32:
        raise ValueError("identity_public_key must be 32 bytes")
    if len(added_head) != 32:
        raise ValueError("added_head must be the 32 bytes of a device log's head")
    device, by_device = check_id(device_id, "device_id"), check_id(by_device_id, "by_device_id")
    return b"".join((TAG_VOUCH, _VERSION, device, identity_public_key, by_device, added_head))


def body_digest(body: bytes) -> bytes:
    """SHA-256 of a request body, as a change proof binds it."""
    return hashlib.sha256(body).digest()


def sign_proof(identity: IdentityKey, proof: bytes) -> bytes:
    """The 64-byte signature that travels in place of the proof."""
    return identity.sign(proof)


def verify_proof(identity_public_key: bytes, proof: bytes, signature: bytes) -> bool:
    """Whether the device with this identity signed exactly this proof. Malformed input is simply False."""
    return verify_ed25519(identity_public_key, proof, signature)
