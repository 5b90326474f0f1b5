from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.base import (
    COMMON_ADVICE,
    PUSH_TOKEN_CHARACTERS_MAX,
    RARE_ADVICE,
    Accepted,
    Bug,
    HttpAnswer,
    Misconfigured,
    Outcome,
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
from sealpushd.dispatch.providers.fcm import (
    ADVICE,
    BAD_REQUEST,
    DENIALS,
    ERROR_INFO,
    ERRORS,
    FCM_ERROR,
    QUOTA_FAILURE,
    TTL_MAX,
    FcmProvider,
    FcmSettings,
    build_assertion,
    build_message,
    classify,
    parse_service_account,
)
from sealpushd.dispatch.providers.http import HttpSettings
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TARGET = PushTarget(PushToken("d" * 22 + ":APA91b" + "x" * 134), PushEnvironment.PRODUCTION, "bank-app", NOW)
# A narrow alphabet: the whole of Unicode costs a second to set up and finds nothing more.
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=100)
SUCCESS = b'{"name":"projects/bank-app/messages/0:1500415314455276%31bd1c9631bd1c96"}'


def wake_up(*, muted: bool = False, priority: WakeUpPriority = WakeUpPriority.HIGH, expires_at: datetime | None = None) -> WakeUp:
    return WakeUp(bytes(range(16)), muted=muted, priority=priority, expires_at=expires_at or NOW + timedelta(hours=1))


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def pem(private_key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def account_fields(**changes: object) -> dict[str, object]:
    fields = {
        "type": "service_account",
        "project_id": "bank-app",
        "private_key_id": "0123456789abcdef",
        "private_key": pem(rsa_key()),
        "client_email": "push@bank-app.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
        "universe_domain": "googleapis.com",
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def account_file(**changes: object) -> bytes:
    return json.dumps(account_fields(**changes)).encode()


# Requests


def test_urgent_wake_up_is_the_golden_message() -> None:
    assert json.loads(build_message(TARGET, wake_up(), NOW)) == {
        "message": {
            "token": TARGET.token.reveal(),
            "data": {"id": "AAECAwQFBgcICQoLDA0ODw"},
            "android": {"priority": "HIGH", "ttl": "3600s"},
        }
    }


@pytest.mark.parametrize(
    "quiet", [wake_up(muted=True), wake_up(priority=WakeUpPriority.NORMAL), wake_up(muted=True, priority=WakeUpPriority.NORMAL)]
)
def test_muted_or_unhurried_wake_up_is_normal_and_collapsible(quiet: WakeUp) -> None:
    assert json.loads(build_message(TARGET, quiet, NOW)) == {
        "message": {
            "token": TARGET.token.reveal(),
            "data": {"id": "AAECAwQFBgcICQoLDA0ODw"},
            "android": {"priority": "NORMAL", "ttl": "3600s", "collapse_key": "wake-up"},
        }
    }


def test_dry_run_says_so_and_changes_nothing_else() -> None:
    dry = json.loads(build_message(TARGET, wake_up(), NOW, validate_only=True))
    assert dry.pop("validate_only") is True
    assert dry == json.loads(build_message(TARGET, wake_up(), NOW))


@given(
    left=st.timedeltas(min_value=timedelta(days=-1000), max_value=timedelta(days=1000)),
    muted=st.booleans(),
    priority=st.sampled_from(WakeUpPriority),
    wake_up_id=st.binary(min_size=16, max_size=16),
    token=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=300),
)
def test_every_message_is_within_googles_bounds(
    left: timedelta, muted: bool, priority: WakeUpPriority, wake_up_id: bytes, token: str
) -> None:
    target = PushTarget(PushToken(token), PushEnvironment.PRODUCTION, "bank-app", NOW)
    body = json.loads(build_message(target, WakeUp(wake_up_id, muted=muted, priority=priority, expires_at=NOW + left), NOW))
    message = body["message"]
    assert message.keys() == {"token", "data", "android"}, "and so no notification"
    assert message["token"] == token
    assert message["data"].keys() == {"id"}
    ttl = message["android"]["ttl"]
    assert ttl.endswith("s")
    assert 0 <= int(ttl[:-1]) <= 2_419_200 == TTL_MAX.total_seconds()
    assert (message["android"]["priority"] == "HIGH") is ("collapse_key" not in message["android"])


def test_the_longest_token_makes_no_message_that_is_too_long() -> None:
    target = PushTarget(PushToken("x" * PUSH_TOKEN_CHARACTERS_MAX), PushEnvironment.PRODUCTION, "bank-app", NOW)
    content = json.loads(build_message(target, wake_up(), NOW))["message"]["data"]
    assert len(json.dumps(content)) < 100


# Answers


def refusal(status: int, name: str, *details: dict[str, Any], headers: dict[str, str] | None = None) -> HttpAnswer:
    error = {"code": status, "message": "words", "status": name, "details": list(details)}
    return HttpAnswer(status, headers or {}, json.dumps({"error": error}).encode())


def fcm_error(code: str) -> dict[str, Any]:
    return {"@type": FCM_ERROR, "errorCode": code}


def bad_request(*fields: str) -> dict[str, Any]:
    return {"@type": BAD_REQUEST, "fieldViolations": [{"field": field, "description": "wrong"} for field in fields]}


def error_info(reason: str) -> dict[str, Any]:
    return {"@type": ERROR_INFO, "reason": reason, "domain": "googleapis.com"}


def quota_failure(description: str) -> dict[str, Any]:
    return {"@type": QUOTA_FAILURE, "violations": [{"subject": "project:bank-app", "description": description}]}


AFTER_7 = {"retry-after": "7"}
SECONDS_7, MINUTE = timedelta(seconds=7), timedelta(minutes=1)

# Answers as Google's documentation and its users show them, and what they mean.
ANSWERS: dict[str, tuple[HttpAnswer, Outcome]] = {
    "success": (HttpAnswer(200, {}, SUCCESS), Accepted()),
    "gone": (refusal(404, "NOT_FOUND", fcm_error("UNREGISTERED")), TokenGone("UNREGISTERED")),
    "of another project": (refusal(403, "PERMISSION_DENIED", fcm_error("SENDER_ID_MISMATCH")), TokenSuspect("SENDER_ID_MISMATCH")),
    "no token": (refusal(400, "INVALID_ARGUMENT", fcm_error("INVALID_ARGUMENT")), TokenSuspect("INVALID_ARGUMENT")),
    "no token, field named": (
        refusal(400, "INVALID_ARGUMENT", fcm_error("INVALID_ARGUMENT"), bad_request("message.token")),
        TokenSuspect("INVALID_ARGUMENT"),
    ),
    "no token, field alone": (refusal(400, "INVALID_ARGUMENT", bad_request("message.token")), TokenSuspect("INVALID_ARGUMENT")),
    "bad field": (refusal(400, "INVALID_ARGUMENT", fcm_error("INVALID_ARGUMENT"), bad_request("message.android.ttl")), Bug("BadRequest")),
    "bad field and token": (
        refusal(400, "INVALID_ARGUMENT", fcm_error("INVALID_ARGUMENT"), bad_request("message.token", "message.android.ttl")),
        Bug("BadRequest"),
    ),
    "bad field alone": (refusal(400, "INVALID_ARGUMENT", bad_request("message.data[0].value")), Bug("BadRequest")),
    "bad, nothing named": (refusal(400, "INVALID_ARGUMENT"), Bug("BadRequest")),
    "bad, no field named": (refusal(400, "INVALID_ARGUMENT", fcm_error("INVALID_ARGUMENT"), bad_request()), Bug("BadRequest")),
    "of an Apple device": (
        refusal(401, "UNAUTHENTICATED", fcm_error("THIRD_PARTY_AUTH_ERROR")),
        TokenSuspect("THIRD_PARTY_AUTH_ERROR"),
    ),
    "of an Apple device, old name": (refusal(401, "UNAUTHENTICATED", fcm_error("APNS_AUTH_ERROR")), TokenSuspect("APNS_AUTH_ERROR")),
    "quota of the project": (
        refusal(429, "RESOURCE_EXHAUSTED", fcm_error("QUOTA_EXCEEDED"), quota_failure("Message rate exceeded")),
        RetryAt("QUOTA_EXCEEDED", MINUTE),
    ),
    "quota of the project, for so long": (
        refusal(429, "RESOURCE_EXHAUSTED", fcm_error("QUOTA_EXCEEDED"), headers=AFTER_7),
        RetryAt("QUOTA_EXCEEDED", SECONDS_7),
    ),
    "quota of the device": (
        refusal(429, "RESOURCE_EXHAUSTED", fcm_error("QUOTA_EXCEEDED"), quota_failure("Device message rate exceeded")),
        RetryAt("QUOTA_EXCEEDED", MINUTE, of_device=True),
    ),
    "quota of requests": (refusal(429, "RESOURCE_EXHAUSTED"), RetryAt("RESOURCE_EXHAUSTED", MINUTE)),
    "overloaded": (refusal(503, "UNAVAILABLE", fcm_error("UNAVAILABLE"), headers=AFTER_7), RetryAt("UNAVAILABLE", SECONDS_7)),
    "fault": (refusal(500, "INTERNAL", fcm_error("INTERNAL")), RetryAt("INTERNAL")),
    "unexplained": (refusal(500, "UNKNOWN", fcm_error("UNSPECIFIED_ERROR")), RetryAt("UNSPECIFIED_ERROR")),
    "new code": (refusal(400, "INVALID_ARGUMENT", fcm_error("SOMETHING_NEW")), RetryAt("SOMETHING_NEW")),
    "access token refused": (refusal(401, "UNAUTHENTICATED", error_info("ACCESS_TOKEN_EXPIRED")), RefreshAuth("UNAUTHENTICATED")),
    "role missing": (refusal(403, "PERMISSION_DENIED"), Misconfigured("PERMISSION_DENIED")),
    "role missing, by IAM": (
        refusal(403, "PERMISSION_DENIED", error_info("IAM_PERMISSION_DENIED")),
        Misconfigured("IAM_PERMISSION_DENIED"),
    ),
    "API disabled": (refusal(403, "PERMISSION_DENIED", error_info("SERVICE_DISABLED")), Misconfigured("SERVICE_DISABLED")),
    "denied, new reason": (refusal(403, "PERMISSION_DENIED", error_info("NEW")), Misconfigured("PERMISSION_DENIED")),
    "no such project": (refusal(404, "NOT_FOUND"), Misconfigured("NOT_FOUND")),
    "overloaded, no code": (refusal(503, "UNAVAILABLE", headers=AFTER_7), RetryAt("UNAVAILABLE", SECONDS_7)),
    "gateway": (refusal(504, "DEADLINE_EXCEEDED"), RetryAt("DEADLINE_EXCEEDED")),
    "new status": (refusal(409, "ABORTED"), RetryAt("ABORTED")),
}


@pytest.mark.parametrize(("answer", "outcome"), ANSWERS.values(), ids=list(ANSWERS))
def test_answers(answer: HttpAnswer, outcome: Outcome) -> None:
    assert classify(answer, NOW) == outcome


def test_every_row_of_the_error_table_is_played() -> None:
    played = {outcome.reason for _, outcome in ANSWERS.values()}
    words = {word for _, word in ERRORS if word != "*"}
    assert words <= played | {"INVALID_ARGUMENT"}


def test_every_reason_of_the_tables_has_advice() -> None:
    reasons = {outcome.reason for _, outcome in ANSWERS.values() if outcome.reason} | {word for _, word in ERRORS if word != "*"} | DENIALS
    unexplained = {"SOMETHING_NEW", "DEADLINE_EXCEEDED", "ABORTED"}
    assert reasons - unexplained <= ADVICE.keys()
    provider = FcmProvider(FcmSettings(account_file()), FakeClock(NOW))
    for reason in (
        *reasons,
        *COMMON_ADVICE,
        *RARE_ADVICE,
        "status-403",
        "oauth-invalid_grant",
        "oauth-network-dns",
        "oauth-timeout",
        "oauth-status-500",
        "network-PoolTimeoutError",
    ):
        if reason not in unexplained:
            assert provider.advise(reason) != advise_common("SOMETHING_NEW"), reason
    assert "sealpush providers rotate" in provider.advise("oauth-invalid_grant")
    assert "DNS" in provider.advise("oauth-network-dns")


def test_refused_access_token_under_a_wrong_clock_is_the_clocks() -> None:
    date = {"date": format_datetime(NOW - timedelta(minutes=6), usegmt=True)}
    assert classify(refusal(401, "UNAUTHENTICATED", headers=date), NOW) == Misconfigured("clock-wrong")
    near = {"date": format_datetime(NOW - timedelta(minutes=4), usegmt=True)}
    assert classify(refusal(401, "UNAUTHENTICATED", headers=near), NOW) == RefreshAuth("UNAUTHENTICATED")


@pytest.mark.parametrize(
    "body",
    [
        b"<html>blocked</html>",
        b"",
        None,
        b"[]",
        b"{}",
        b'{"error":"no"}',
        b'{"error":{"code":418}}',
        b'{"error":{"code":400,"status":"INVALID_ARGUMENT"}}',
        b'{"error":{"status":"PERMISSION_DENIED"}}',
        b"[" * 5000,
        b'{"reason":"BadDeviceToken"}',
        b'{"code":"80300007","msg":"x","requestId":"1"}',
    ],
)
@pytest.mark.parametrize("status", [302, 401, 403, 404, 407, 410, 502])
def test_an_answer_that_is_not_googles_does_no_harm(status: int, body: bytes | None) -> None:
    assert classify(HttpAnswer(status, {}, body), NOW) == RetryAt(f"status-{status}")


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"", None, b"{}", b'{"name":5}', b'{"name":"elsewhere"}', SUCCESS[:-3]])
def test_success_counts_only_in_googles_own_form(body: bytes | None) -> None:
    assert classify(HttpAnswer(200, {}, body), NOW) == RetryAt("unreadable-answer")


@given(status=st.integers(100, 599).filter(lambda status: status != 200), body=st.none() | st.binary(max_size=50))
def test_noise_does_no_harm(status: int, body: bytes | None) -> None:
    assert isinstance(classify(HttpAnswer(status, {}, body), NOW), RetryAt)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
details = st.fixed_dictionaries(
    {},
    optional={
        "@type": st.sampled_from([FCM_ERROR, BAD_REQUEST, ERROR_INFO, QUOTA_FAILURE]) | json_values,
        "errorCode": st.sampled_from([word for _, word in ERRORS]) | json_values,
        "fieldViolations": st.lists(st.dictionaries(st.just("field"), json_values), max_size=2) | json_values,
        "violations": st.lists(st.dictionaries(st.sampled_from(["subject", "description"]), json_values), max_size=2) | json_values,
        "reason": json_values,
    },
)


@given(
    status=st.sampled_from([400, 401, 403, 404, 429, 500, 503]),
    name=st.sampled_from([word for _, word in ERRORS]) | json_values,
    listed=st.lists(details, max_size=3) | json_values,
)
def test_classify_never_raises_and_never_says_more_than_a_word(status: int, name: object, listed: object) -> None:
    error = {"code": status, "status": name, "details": listed}
    outcome = classify(HttpAnswer(status, {}, json.dumps({"error": error}).encode()), NOW)
    assert len(outcome.reason) <= 64


# Credential


def test_service_account_is_read_from_googles_file() -> None:
    account = parse_service_account(account_file())
    assert (account.project_id, account.client_email) == ("bank-app", "push@bank-app.iam.gserviceaccount.com")
    assert (account.private_key_id, account.token_uri) == ("0123456789abcdef", "https://oauth2.googleapis.com/token")
    assert FcmProvider(FcmSettings(account_file()), FakeClock(NOW)).topic == "bank-app"
    assert FcmProvider(FcmSettings(account_file(), project="other"), FakeClock(NOW)).topic == "other"


SECRET = "hunter2hunter2"
BAD_ACCOUNTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON file"),
    "garbage": (b"\xff\xfe" + SECRET.encode(), "JSON file"),
    "nested": (b"[" * 100_000, "JSON file"),
    "array": (b'["' + SECRET.encode() + b'"]', "JSON file"),
    "p8": (b"-----BEGIN PRIVATE KEY-----\n" + SECRET.encode(), "JSON file"),
    "user's credential": (account_file(type="authorized_user", refresh_token=SECRET), "service_account"),
    "google-services.json": (json.dumps({"project_info": {"project_id": "x"}, "client": [SECRET]}).encode(), "service_account"),
    "no project": (account_file(project_id=None), "project_id"),
    "no key id": (account_file(private_key_id=""), "private_key_id"),
    "no key": (account_file(private_key=None), "private_key"),
    "no email": (account_file(client_email=5), "client_email"),
    "no token endpoint": (account_file(token_uri=" "), "token_uri"),
    "plain http": (account_file(token_uri=f"http://host/{SECRET}"), "https"),
    "project of another form": (account_file(project_id=f"../{SECRET}"), "project id"),
    "garbled key": (account_file(private_key=f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"), "RSA"),
    "EC key": (account_file(private_key=pem(ec.generate_private_key(ec.SECP256R1()))), "RSA"),
    "short key": (account_file(private_key=pem(rsa_key(1024))), "2048"),
    "public key": (account_file(private_key="-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), "RSA"),
}


@pytest.mark.parametrize(("content", "word"), BAD_ACCOUNTS.values(), ids=list(BAD_ACCOUNTS))
def test_unusable_service_account_is_refused_at_the_start_without_quoting_it(content: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word) as refusal:
        FcmProvider(FcmSettings(content), FakeClock(NOW))
    told = "".join(str(error) for error in (refusal.value, refusal.value.__cause__, refusal.value.__context__) if error is not None)
    assert SECRET not in told


@given(content=st.dictionaries(st.sampled_from(sorted(account_fields())), json_values))
def test_parsing_a_service_account_raises_nothing_but_value_errors(content: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="service account"):
        parse_service_account(json.dumps(content).encode())


def test_project_that_cannot_stand_in_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="project id"):
        FcmProvider(FcmSettings(account_file(), project="a/b"), FakeClock(NOW))


def test_assertion_is_googles() -> None:
    account = parse_service_account(account_file())
    assertion = build_assertion(account, NOW)
    assert jwt.get_unverified_header(assertion) == {"alg": "RS256", "typ": "JWT", "kid": "0123456789abcdef"}
    options: jwt.types.Options = {"verify_iat": False, "verify_exp": False}
    claims = jwt.decode(assertion, rsa_key().public_key(), algorithms=["RS256"], audience=account.token_uri, options=options)
    assert claims == {
        "iss": "push@bank-app.iam.gserviceaccount.com",
        "scope": "https://www.googleapis.com/auth/firebase.messaging",
        "aud": "https://oauth2.googleapis.com/token",
        "iat": int(NOW.timestamp()),
        "exp": int(NOW.timestamp()) + 3600,
    }


def test_settings_and_account_never_print_the_key_or_the_proxys_password() -> None:
    settings = FcmSettings(account_file(), http=HttpSettings(proxy_url="http://user:hunter2@proxy:3128"))
    for text in (repr(settings), repr(parse_service_account(account_file()))):
        assert "PRIVATE" not in text
        assert "RSA" not in text
        assert "hunter2" not in text


async def test_target_of_another_project_is_not_asked_about() -> None:
    provider = FcmProvider(FcmSettings(account_file(), base_url="https://nowhere.invalid"), FakeClock(NOW))
    target = PushTarget(TARGET.token, PushEnvironment.PRODUCTION, "other-app", NOW)
    assert await provider.send(target, wake_up()) == TokenSuspect("other-topic")
    await provider.aclose()
