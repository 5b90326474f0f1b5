"""Prekeys as protobuf: one way there and back for phones, senders and services."""

from sealpush.keys import PrekeyKind, SignedPrekey
from sealpush.v1 import keys_pb2


def wire_prekey(prekey: SignedPrekey) -> keys_pb2.Prekey:
    """As protobuf."""
    return keys_pb2.Prekey(
        suite=prekey.suite,
        prekey_id=prekey.prekey_id,
        kind=keys_pb2.PrekeyKind.ValueType(prekey.kind),
        public_key=prekey.public_key,
        created_at_ms=prekey.created_at_ms,
        expires_at_ms=prekey.expires_at_ms,
        signature=prekey.signature,
    )


def read_prekey(message: keys_pb2.Prekey, kind: PrekeyKind) -> SignedPrekey:
    """A prekey as it came, of the kind that its place asks for: the kind is part of what is signed, so a wrong one does not verify.

    Nothing is checked.
    """
    return SignedPrekey(
        message.suite,
        message.prekey_id,
        kind,
        message.public_key,
        message.created_at_ms,
        message.expires_at_ms,
        message.signature,
    )
