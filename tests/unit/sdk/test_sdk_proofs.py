"""sealpush.proofs: what a device signs."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RegistrationId
from sealpush.keys import IdentityKey
from sealpush.proofs import (
    AckOutcome,
    acknowledgement_proof,
    body_digest,
    challenge_proof,
    change_proof,
    read_proof,
    registration_proof,
    sign_proof,
    verify_proof,
)

IDENTITY = IdentityKey.from_seed(b"\x11" * 32)

ids = st.binary(min_size=16, max_size=16)
digests = st.binary(min_size=32, max_size=32)
u64 = st.integers(0, (1 << 64) - 1)

challenges = st.tuples(st.just("challenge"), st.binary(min_size=16, max_size=512), ids)
registrations = st.tuples(st.just("registration"), ids, digests, st.text("abc.-9", min_size=1, max_size=64))
acknowledgements = st.tuples(st.just("acknowledgement"), ids, ids, digests, ids, st.sampled_from(AckOutcome), st.integers(0, 65535), u64)
changes = st.tuples(st.just("change"), ids, st.integers(1, (1 << 64) - 1), st.text("/abc.", min_size=1), digests)
statements = st.one_of(challenges, registrations, acknowledgements, changes)

BUILDERS: dict[str, Callable[..., bytes]] = {
    "challenge": challenge_proof,
    "registration": registration_proof,
    "acknowledgement": acknowledgement_proof,
    "change": change_proof,
}


def build(statement: tuple[object, ...]) -> bytes:
    return BUILDERS[str(statement[0])](*statement[1:])


@given(statements, statements)
def test_different_statements_have_different_bytes(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    """Neither is the other's beginning: lengths inside decide where a proof ends, so nothing can be appended."""
    assert (one == other) == (build(one) == build(other)) == build(one).startswith(build(other))


@given(st.text("/abc.", min_size=1, max_size=99), st.text("/abc.", min_size=1, max_size=1))
def test_a_longer_method_does_not_run_into_the_digest(method: str, more: str) -> None:
    device, digest = DeviceId(b"D" * 16), body_digest(b"body")
    shifted = more.encode() + digest[:-1]
    assert change_proof(device, 1, method + more, digest) != change_proof(device, 1, method, shifted)


def test_proofs_have_the_documented_bytes() -> None:
    assert challenge_proof(b"c" * 20, DeviceId(b"D" * 16)) == b"SPP1-challenge\x01" + b"D" * 16 + b"\0\x14" + b"c" * 20
    assert (
        registration_proof(RegistrationId(b"R" * 16), b"I" * 32, AppId("ua.bank"))
        == b"SPP1-register\x01" + b"R" * 16 + b"I" * 32 + b"\0\x07ua.bank"
    )
    message, content, digest, device = MessageId(b"M" * 16), ContentId(b"C" * 16), b"E" * 32, DeviceId(b"D" * 16)
    assert (
        acknowledgement_proof(message, content, digest, device, AckOutcome.UNDELIVERED, 0x0102, 3)
        == b"SPP1-ack\x01" + b"M" * 16 + b"C" * 16 + b"E" * 32 + b"D" * 16 + b"\x02" + b"\x01\x02" + bytes(7) + b"\x03"
    )
    assert read_proof(message, content, digest, device, 3).endswith(b"\x04" + bytes(2) + bytes(7) + b"\x03")
    assert (
        change_proof(device, 9, "/sealpush.v1.Keys/Upload", b"h" * 32)
        == b"SPP1-change\x01" + b"D" * 16 + bytes(7) + b"\x09" + b"\x18/sealpush.v1.Keys/Upload" + b"h" * 32
    )


def test_a_proof_verifies_for_its_device_and_bytes_only() -> None:
    proof = challenge_proof(b"c" * 32, DeviceId(b"D" * 16))
    signature = sign_proof(IDENTITY, proof)
    assert verify_proof(IDENTITY.public_key, proof, signature)
    assert not verify_proof(IDENTITY.public_key, proof + b"\0", signature)
    assert not verify_proof(IdentityKey.generate().public_key, proof, signature)
    assert not verify_proof(b"", proof, b"")


def test_out_of_bounds_fields_are_refused() -> None:
    device = DeviceId(b"D" * 16)
    message, content = MessageId(b"M" * 16), ContentId(b"C" * 16)
    digest = body_digest(b"body")
    bad: list[Callable[[], bytes]] = [
        lambda: challenge_proof(b"c" * 15, device),
        lambda: challenge_proof(b"c" * 513, device),
        lambda: challenge_proof(b"c" * 32, DeviceId(b"D" * 15)),
        lambda: registration_proof(RegistrationId(b"R" * 17), b"I" * 32, AppId("a")),
        lambda: registration_proof(RegistrationId(b"R" * 16), b"I" * 31, AppId("a")),
        lambda: registration_proof(RegistrationId(b"R" * 16), b"I" * 32, AppId("")),
        lambda: registration_proof(RegistrationId(b"R" * 16), b"I" * 32, AppId("a" * 65)),
        lambda: registration_proof(RegistrationId(b"R" * 16), b"I" * 32, AppId("app é")),
        lambda: acknowledgement_proof(message, content, digest, device, AckOutcome.DELIVERED, 65536, 0),
        lambda: acknowledgement_proof(message, content, digest, device, AckOutcome.DELIVERED, 0, -1),
        lambda: acknowledgement_proof(MessageId(b""), content, digest, device, AckOutcome.DELIVERED, 0, 0),
        lambda: acknowledgement_proof(message, content, b"E" * 31, device, AckOutcome.DELIVERED, 0, 0),
        lambda: acknowledgement_proof(message, content, digest, device, 5, 0, 0),  # type: ignore[arg-type]  # no outcome
        lambda: change_proof(device, 0, "/m", digest),
        lambda: change_proof(device, 1, "", digest),
        lambda: change_proof(device, 1, "/m m", digest),
        lambda: change_proof(device, 1, "/é", digest),
        lambda: change_proof(device, 1, "/" + "m" * 100, digest),
        lambda: change_proof(device, 1, "/m", b"short"),
    ]
    for make in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - the list covers many texts
            make()
