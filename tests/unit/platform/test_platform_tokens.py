"""Tokens: who may vouch for whom, and everything that must not pass."""

from __future__ import annotations

import base64
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpushd.platform.errors import Unauthenticated
from sealpushd.platform.tokens import (
    LEEWAY_S,
    SENDER_TOKEN_LIFETIME_S,
    Caller,
    DeviceCaller,
    SenderCaller,
    ServiceCaller,
    ServiceKey,
    TokenVerifier,
)
from tests.clocks import FakeClock

SENDER = SenderCaller(SenderId(b"s" * 16), b"o" * 16, ("bank", "shop"), frozenset({"publish", "status"}), ("10.0.0.0/8",))
DEVICE = DeviceCaller(DeviceId(b"d" * 16), SubscriberId(b"u" * 16), "bank", b"k" * 32)


def key(name: str) -> ServiceKey:
    return ServiceKey(name, Ed25519PrivateKey.generate())


ACCOUNTS, REGISTRATION, FETCH, STRANGER = key("accounts"), key("registration"), key("fetch"), key("accounts")
VERIFIER = TokenVerifier({each.name: [each.public_key] for each in (ACCOUNTS, REGISTRATION, FETCH)})


def refused(token: str, words: str | None = None) -> None:
    with pytest.raises(Unauthenticated, match=words):
        VERIFIER.verify(token)


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_each_kind_of_token_gives_back_who_it_was_made_for() -> None:
    assert VERIFIER.verify(ACCOUNTS.sender_token(SENDER)[0]) == SENDER
    assert VERIFIER.verify(REGISTRATION.device_token(DEVICE)[0]) == DEVICE
    assert VERIFIER.verify(FETCH.mesh_token()) == ServiceCaller("fetch")


def test_an_issuer_that_is_not_trusted_is_refused() -> None:
    refused(key("elsewhere").mesh_token(), "not signed by a key")
    refused(STRANGER.sender_token(SENDER)[0], "not signed by a key")


def test_a_service_may_not_vouch_for_callers_of_another() -> None:
    refused(REGISTRATION.sender_token(SENDER)[0], "may not vouch")
    refused(ACCOUNTS.device_token(DEVICE)[0], "may not vouch")
    refused(FETCH.sign("sender", SENDER.sender_id.hex(), 60, {})[0], "may not vouch")


def test_a_service_speaks_for_itself_only() -> None:
    refused(FETCH.sign("mesh", "operator", 60, {})[0])
    refused(FETCH.sign("mesh", "operator", 60, {"iss": "operator"})[0])


def test_a_device_token_cannot_pose_as_a_service_or_a_sender() -> None:
    caller = VERIFIER.verify(REGISTRATION.device_token(DEVICE)[0])
    assert isinstance(caller, DeviceCaller)
    for audience in ("mesh", "sender"):
        refused(REGISTRATION.sign(audience, DEVICE.device_id.hex(), 60, {})[0])


@pytest.mark.parametrize("audience", ["", "operators", "MESH", "None"])
def test_an_audience_nobody_issues_for_is_refused(audience: str) -> None:
    refused(FETCH.sign(audience, "fetch", 60, {})[0], "may not vouch")


def test_several_audiences_in_one_token_are_refused() -> None:
    refused(FETCH.sign("mesh", "fetch", 60, {"aud": ["mesh", "sender"]})[0])


def test_an_expired_token_is_refused_also_when_it_was_good_before() -> None:
    refused(ACCOUNTS.sign("sender", SENDER.sender_id.hex(), -LEEWAY_S - 1, {})[0], "expired")
    verifier = TokenVerifier({"fetch": [FETCH.public_key]})
    # Ends within the leeway in a moment: verified, kept, and refused once its time is over.
    ends_at = int(time.time()) - LEEWAY_S + 1
    token, _ = FETCH.sign("mesh", "fetch", 0, {"exp": ends_at})
    assert verifier.verify(token) == ServiceCaller("fetch")
    while time.time() < ends_at + LEEWAY_S:
        pass
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


@pytest.mark.parametrize("claim", ["exp", "iat", "sub"])
def test_a_token_that_lacks_a_claim_is_refused(claim: str) -> None:
    claims = {"iss": "fetch", "aud": "mesh", "sub": "fetch", "iat": int(time.time()), "exp": int(time.time()) + 60}
    del claims[claim]
    refused(jwt.encode(claims, FETCH._private_key, algorithm="EdDSA"), "not valid")


def test_a_token_without_signature_is_refused() -> None:
    now = int(time.time())
    body = part({"iss": "fetch", "aud": "mesh", "sub": "fetch", "iat": now, "exp": now + 60})
    for algorithm in ("none", "None", "NONE"):
        refused(f"{part({'alg': algorithm, 'typ': 'JWT'})}.{body}.")
    refused(jwt.encode({"iss": "fetch", "aud": "mesh", "sub": "fetch", "iat": now, "exp": now + 60}, "", algorithm="none"))


def test_the_public_key_is_no_shared_secret() -> None:
    now = int(time.time())
    claims = {"iss": "fetch", "aud": "mesh", "sub": "fetch", "iat": now, "exp": now + 60}
    refused(jwt.encode(claims, FETCH.public_key.hex(), algorithm="HS256"), "not valid")


@given(st.integers(min_value=0), st.integers(1, 63))
def test_a_token_with_any_character_changed_is_refused_or_the_same(position: int, shift: int) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    token = ACCOUNTS.sender_token(SENDER)[0]
    position %= len(token)
    if token[position] == ".":
        return
    changed = token[:position] + alphabet[(alphabet.index(token[position]) + shift) % 64] + token[position + 1 :]
    last = (token.index(".") - 1, token.rindex(".") - 1, len(token) - 1)
    try:
        caller = VERIFIER.verify(changed)
    except Unauthenticated:
        return
    # The last character of a part has bits that mean nothing.
    assert position in last
    assert caller == SENDER


@given(st.text(max_size=200))
def test_what_is_no_token_is_refused_and_raises_nothing_else(text: str) -> None:
    refused(text)


@pytest.mark.parametrize("payload", ["[" * 6000, '{"iss":' * 2000, "1" * 5000, "null", '{"exp": 1e999}'])
def test_a_hostile_payload_is_refused_and_raises_nothing_else(payload: str) -> None:
    body = base64.urlsafe_b64encode(payload.encode()).decode().rstrip("=")
    refused(f"{part({'alg': 'EdDSA', 'typ': 'JWT'})}.{body}.AAAA")


def test_a_trusted_issuer_that_names_an_endless_expiry_is_refused() -> None:
    refused(FETCH.sign("mesh", "fetch", 60, {"exp": float("inf")})[0])


def test_both_keys_are_good_while_one_is_rotated_and_only_the_new_one_after() -> None:
    new = key("fetch")
    both = TokenVerifier({"fetch": [FETCH.public_key, new.public_key]})
    assert both.verify(FETCH.mesh_token()) == both.verify(new.mesh_token()) == ServiceCaller("fetch")
    after = TokenVerifier({"fetch": [new.public_key]})
    assert after.verify(new.mesh_token()) == ServiceCaller("fetch")
    with pytest.raises(Unauthenticated):
        after.verify(FETCH.mesh_token())


def test_files_that_hold_no_key_or_trust_are_named_and_not_quoted(tmp_path: Path) -> None:
    secret = "5e" * 31
    for content in (secret, "zz" * 32, ""):
        (tmp_path / "fetch.key").write_text(content)
        with pytest.raises(ValueError, match=r"fetch\.key") as caught:
            ServiceKey.load("fetch", tmp_path / "fetch.key")
        assert secret not in str(caught.value)
    for content in ("", "[]", '{"fetch": 1}', '{"fetch": ["00"]}', '{"fetch": ["zz"]}'):
        (tmp_path / "trust.json").write_text(content)
        with pytest.raises(ValueError, match=r"trust\.json"):
            TokenVerifier.load(tmp_path / "trust.json")
    (tmp_path / "fetch.key").write_text("07" * 32 + "\n")
    loaded = ServiceKey.load("fetch", tmp_path / "fetch.key")
    (tmp_path / "trust.json").write_text(json.dumps({"fetch": [loaded.public_key.hex()]}))
    assert TokenVerifier.load(tmp_path / "trust.json").verify(loaded.mesh_token()) == ServiceCaller("fetch")


@given(st.lists(st.tuples(st.booleans(), st.integers(-SENDER_TOKEN_LIFETIME_S, SENDER_TOKEN_LIFETIME_S)), max_size=12))
def test_a_token_that_is_remembered_is_judged_as_one_that_is_looked_at_anew(moves: list[tuple[bool, int]]) -> None:
    """Whatever becomes of the clock: time passes, or somebody sets it, by seconds or by hours."""
    clock = FakeClock()
    signing = ServiceKey("accounts", Ed25519PrivateKey.generate(), clock)
    remembering = TokenVerifier({"accounts": [signing.public_key]}, clock)
    token, _ = signing.sender_token(SENDER)
    remembering.verify(token)

    def judged(verifier: TokenVerifier) -> str | tuple[Caller, float]:
        try:
            return verifier.verify_until(token)
        except Unauthenticated as e:
            return e.message

    for passes, seconds in moves:
        if passes:
            clock.advance(timedelta(seconds=abs(seconds)))
        else:
            clock.jump(timedelta(seconds=seconds))
        assert judged(remembering) == judged(TokenVerifier({"accounts": [signing.public_key]}, clock))
