from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.apns import (
    ADVICE,
    ERRORS,
    ApnsProvider,
    ApnsSettings,
    ProviderTokens,
    build_headers,
    build_payload,
    classify,
)
from sealpushd.dispatch.providers.base import (
    COMMON_ADVICE,
    RARE_ADVICE,
    Accepted,
    Bug,
    HttpAnswer,
    Misconfigured,
    PushEnvironment,
    PushTarget,
    PushToken,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
    WakeUp,
    WakeUpPriority,
    advise_common,
)
from sealpushd.dispatch.providers.http import HttpSettings
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TARGET = PushTarget(PushToken("3f" * 32), PushEnvironment.PRODUCTION, "ua.bank.app", NOW)
# A narrow alphabet: the whole of Unicode costs a second to set up and finds nothing more.
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=100)
REQUEST_ID = "00010203-0405-4607-8809-0a0b0c0d0e0f"


def wake_up(*, muted: bool = False, priority: WakeUpPriority = WakeUpPriority.HIGH) -> WakeUp:
    return WakeUp(bytes(range(16)), muted=muted, priority=priority, expires_at=NOW + timedelta(hours=1))


def settings(private_key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> ApnsSettings:
    pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ApnsSettings(key_id="KEY1234567", team_id="TEAM123456", private_key_pem=pem)


def test_visible_wake_up_has_apples_shape_and_the_id_alone() -> None:
    assert json.loads(build_payload(wake_up())) == {
        "aps": {"alert": {"loc-key": "SEALPUSH_NEW_MESSAGE"}, "mutable-content": 1},
        "id": "AAECAwQFBgcICQoLDA0ODw",
    }
    assert build_headers(TARGET, wake_up(), NOW) == {
        "apns-id": REQUEST_ID,
        "apns-expiration": str(int(NOW.timestamp()) + 3600),
        "apns-topic": "ua.bank.app",
        "apns-push-type": "alert",
        "apns-priority": "10",
        "apns-collapse-id": "AAECAwQFBgcICQoLDA0ODw",
        "content-type": "application/json",
    }


def test_muted_wake_up_shows_nothing_and_is_background_of_priority_5() -> None:
    muted = wake_up(muted=True)
    assert json.loads(build_payload(muted)) == {"aps": {"content-available": 1}, "id": "AAECAwQFBgcICQoLDA0ODw"}
    headers = build_headers(TARGET, muted, NOW)
    assert (headers["apns-push-type"], headers["apns-priority"]) == ("background", "5")
    assert "apns-collapse-id" not in headers


def test_normal_priority_is_5_and_lifetime_is_capped_at_30_days() -> None:
    distant = WakeUp(bytes(16), muted=False, priority=WakeUpPriority.NORMAL, expires_at=NOW + timedelta(days=400))
    headers = build_headers(TARGET, distant, NOW)
    assert headers["apns-priority"] == "5"
    assert int(headers["apns-expiration"]) == int((NOW + timedelta(days=30)).timestamp())


def test_success_counts_only_with_our_id() -> None:
    assert classify(HttpAnswer(200, {"apns-id": REQUEST_ID.upper()}), REQUEST_ID, NOW) == Accepted()
    assert isinstance(classify(HttpAnswer(200, {}, b"<html>"), REQUEST_ID, NOW), RetryAt)


@given(
    status=st.integers(100, 599).filter(lambda status: status != 200),
    body=st.none() | st.binary(max_size=50) | st.sampled_from([b"[1]", b"{}", b'{"reason":5}', b'{"reason":""}', b"[" * 5000]),
)
def test_an_answer_that_is_not_apples_does_no_harm(status: int, body: bytes | None) -> None:
    assert isinstance(classify(HttpAnswer(status, {}, body), REQUEST_ID, NOW), RetryAt)


@given(
    status=st.sampled_from([*sorted({status for status, _ in ERRORS}), 418, 502]),
    content=st.dictionaries(
        st.sampled_from(["reason", "timestamp"]),
        st.none() | texts | st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=3),
    ),
)
def test_classify_never_raises(status: int, content: dict[str, object]) -> None:
    classify(HttpAnswer(status, {}, json.dumps(content).encode()), REQUEST_ID, NOW)


@pytest.mark.parametrize(
    ("status", "reason", "outcome"),
    [
        (400, "SomethingNew", Bug),
        (403, "SomethingNew", Misconfigured),
        (403, "ExpiredProviderToken", RefreshAuth),
        (410, "Unregistered", TokenGone),
        (410, "SomethingNew", TokenSuspect),
        (429, "SomethingNew", RetryAt),
        (502, "SomethingNew", RetryAt),
        (418, "SomethingNew", RetryAt),
    ],
)
def test_reasons_that_apple_adds_later_fall_to_the_row_of_their_status(status: int, reason: str, outcome: type[object]) -> None:
    answer = HttpAnswer(status, {}, json.dumps({"reason": reason}).encode())
    assert isinstance(classify(answer, REQUEST_ID, NOW), outcome)


def test_provider_token_is_reused_for_45_minutes_and_then_renewed() -> None:
    clock, private_key = FakeClock(NOW), ec.generate_private_key(ec.SECP256R1())
    tokens = ProviderTokens(settings(private_key), clock)
    first = tokens.current()
    clock.advance(timedelta(minutes=44, seconds=59))
    assert tokens.current() == first
    clock.advance(timedelta(seconds=1))
    assert tokens.current() != first
    claims = jwt.decode(first, private_key.public_key(), algorithms=["ES256"], options={"verify_iat": False})
    assert claims == {"iss": "TEAM123456", "iat": int(NOW.timestamp())}
    assert jwt.get_unverified_header(first)["kid"] == "KEY1234567"


def test_expired_provider_token_is_renewed_once_for_all_who_learn_of_it() -> None:
    clock = FakeClock(NOW)
    tokens = ProviderTokens(settings(ec.generate_private_key(ec.SECP256R1())), clock)
    first = tokens.current()
    second = tokens.replace_expired(first)
    assert second != first
    assert tokens.replace_expired(first) == second
    assert second is not None
    assert tokens.replace_expired(second) is None, "a second renewal within 20 minutes would anger APNs"
    clock.advance(timedelta(minutes=20))
    assert tokens.replace_expired(second) not in (None, second)


@pytest.mark.parametrize(
    "private_key",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["Ed25519", "P-384", "RSA"],
)
def test_key_of_another_kind_is_refused_at_the_start(
    private_key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
) -> None:
    with pytest.raises(ValueError, match="P-256"):
        ApnsProvider(settings(private_key), FakeClock(NOW))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfehunter2",
        b"hunter2",
        b"-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n",
        b'{"type":"service_account","private_key":"hunter2"}',
    ],
)
def test_garbage_instead_of_a_key_is_refused_without_quoting_it(content: bytes) -> None:
    with pytest.raises(ValueError, match="P-256") as refusal:
        ApnsProvider(ApnsSettings("KEY1234567", "TEAM123456", content), FakeClock(NOW))
    told = "".join(str(error) for error in (refusal.value, refusal.value.__cause__, refusal.value.__context__) if error is not None)
    assert "hunter2" not in told


def test_every_reason_of_the_table_has_advice() -> None:
    reasons = {reason for _, reason in ERRORS if reason != "*"} | {"accepted-without-echo", "gone-before-registration"}
    assert reasons <= ADVICE.keys()
    provider = ApnsProvider(settings(ec.generate_private_key(ec.SECP256R1())), FakeClock(NOW))
    for reason in (*ADVICE, *COMMON_ADVICE, *RARE_ADVICE, "status-403", "network-PoolTimeoutError"):
        assert provider.advise(reason) != advise_common("SomethingNew"), reason
    assert "sealpush providers rotate" in provider.advise("InvalidProviderToken")


def test_settings_never_print_the_key_or_the_proxys_password() -> None:
    private = ApnsSettings("k", "t", b"-----BEGIN PRIVATE KEY-----", http=HttpSettings(proxy_url="http://user:pass@proxy:3128"))
    assert "PRIVATE" not in repr(private)
    assert "pass" not in repr(private)
