from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.providers.base import (
    COMMON_ADVICE,
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
    TokenSuspect,
    WakeUp,
    WakeUpPriority,
    advise_common,
)
from sealpushd.dispatch.providers.hms import (
    ADVICE,
    ERRORS,
    INVALID_TOKEN,
    NORMAL_GROUP,
    SUCCESS,
    TTL_MAX,
    URGENT_GROUP,
    HmsCredential,
    HmsProvider,
    HmsSettings,
    build_message,
    classify,
    parse_credential,
)
from sealpushd.dispatch.providers.http import HttpSettings
from tests.clocks import FakeClock

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
APP = "101234567"
TARGET = PushTarget(PushToken("I" + "Q" * 129), PushEnvironment.PRODUCTION, APP, NOW)
# A narrow alphabet: the whole of Unicode costs a second to set up and finds nothing more.
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=100)


def wake_up(*, muted: bool = False, priority: WakeUpPriority = WakeUpPriority.HIGH, expires_at: datetime | None = None) -> WakeUp:
    return WakeUp(bytes(range(16)), muted=muted, priority=priority, expires_at=expires_at or NOW + timedelta(hours=1))


# Requests


def test_urgent_wake_up_is_the_golden_message() -> None:
    assert json.loads(build_message(TARGET, wake_up(), NOW)) == {
        "validate_only": False,
        "message": {
            "data": '{"id":"AAECAwQFBgcICQoLDA0ODw"}',
            "android": {"urgency": "HIGH", "ttl": "3600s", "collapse_key": 1, "bi_tag": "AAECAwQFBgcICQoLDA0ODw"},
            "token": [TARGET.token.reveal()],
        },
    }


@pytest.mark.parametrize(
    "quiet", [wake_up(muted=True), wake_up(priority=WakeUpPriority.NORMAL), wake_up(muted=True, priority=WakeUpPriority.NORMAL)]
)
def test_muted_or_unhurried_wake_up_is_normal_and_has_a_group_of_its_own(quiet: WakeUp) -> None:
    assert json.loads(build_message(TARGET, quiet, NOW))["message"]["android"] == {
        "urgency": "NORMAL",
        "ttl": "3600s",
        "collapse_key": 2,
        "bi_tag": "AAECAwQFBgcICQoLDA0ODw",
    }


def test_dry_run_says_so_and_changes_nothing_else() -> None:
    dry, real = (json.loads(build_message(TARGET, wake_up(), NOW, validate_only=validate_only)) for validate_only in (True, False))
    assert (dry.pop("validate_only"), real.pop("validate_only")) == (True, False)
    assert dry == real


@given(
    left=st.timedeltas(min_value=timedelta(days=-1000), max_value=timedelta(days=1000)),
    muted=st.booleans(),
    priority=st.sampled_from(WakeUpPriority),
    wake_up_id=st.binary(min_size=16, max_size=16),
    token=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=300),
)
def test_every_message_is_within_huaweis_bounds(
    left: timedelta, muted: bool, priority: WakeUpPriority, wake_up_id: bytes, token: str
) -> None:
    target = PushTarget(PushToken(token), PushEnvironment.PRODUCTION, APP, NOW)
    body = build_message(target, WakeUp(wake_up_id, muted=muted, priority=priority, expires_at=NOW + left), NOW)
    message = json.loads(body)["message"]
    assert message.keys() == {"data", "android", "token"}, "and so no notification"
    assert message["token"] == [token]
    assert json.loads(message["data"]).keys() == {"id"}
    assert json.loads(message["data"])["id"] == message["android"]["bi_tag"]
    assert 1 <= int(message["android"]["ttl"].removesuffix("s")) <= 1_296_000 == TTL_MAX.total_seconds()
    assert message["android"]["collapse_key"] == (URGENT_GROUP if message["android"]["urgency"] == "HIGH" else NORMAL_GROUP)
    assert len(body) - len(json.dumps(token)) <= 4096


# Answers


def answered(code: object, status: int = 200, **more: object) -> HttpAnswer:
    content = {"code": code, "msg": "words", "requestId": "157440955549500001002006"} | more
    return HttpAnswer(status, {"retry-after": "7"}, json.dumps(content).encode())


SECONDS_7 = timedelta(seconds=7)
OUTCOMES: dict[str, Outcome] = {
    "80100000": TokenSuspect("80100000"),
    "80300007": TokenSuspect("80300007"),
    "80200001": RefreshAuth("80200001"),
    "80200003": RefreshAuth("80200003"),
    "80300002": Misconfigured("80300002"),
    "80300011": Misconfigured("80300011"),
    "80300013": Misconfigured("80300013"),
    "80100001": Bug("80100001"),
    "80100003": Bug("80100003"),
    "80100004": Bug("80100004"),
    "80100013": Bug("80100013"),
    "80100016": Bug("80100016"),
    "80100018": Bug("80100018"),
    "80300008": Bug("80300008"),
    "80300010": Bug("80300010"),
    "80600003": RetryAt("80600003", SECONDS_7),
    "81000001": RetryAt("81000001", SECONDS_7),
    "*": RetryAt("89999999", SECONDS_7),
}


def test_every_row_of_the_error_table_is_played() -> None:
    assert OUTCOMES.keys() == ERRORS.keys()
    assert ERRORS.keys() > INVALID_TOKEN


@pytest.mark.parametrize(("code", "outcome"), OUTCOMES.items(), ids=list(OUTCOMES))
@pytest.mark.parametrize("status", [200, 400, 401])
def test_the_code_decides_and_not_the_status(code: str, outcome: Outcome, status: int) -> None:
    assert classify(answered(code.replace("*", "89999999"), status), NOW) == outcome


def test_success_counts_only_with_a_request_id() -> None:
    assert classify(answered(SUCCESS), NOW) == Accepted()
    for odd in (
        answered(SUCCESS, requestId=""),
        answered(SUCCESS, requestId=None),
        answered(SUCCESS, requestId=5),
        answered(SUCCESS, status=202),
    ):
        assert classify(odd, NOW) == RetryAt("accepted-without-request-id")


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_flow_control_and_faults_of_the_gateway_are_retries_whatever_they_carry(status: int) -> None:
    for body in (b"", b"<html>", answered("80300007").body, answered(SUCCESS).body):
        # Whoever answers so need not be Huawei, so neither is what it asks for.
        assert classify(HttpAnswer(status, {"retry-after": "7"}, body), NOW) == RetryAt(f"status-{status}")


@pytest.mark.parametrize(
    "body",
    [
        b"<html>blocked</html>",
        b"",
        None,
        b"[]",
        b"{}",
        b'{"code":80300007}',
        b'{"code":"404","msg":"Not found."}',
        b'{"code":"8030000x"}',
        b'{"code":"80300007"',
        b"[" * 5000,
        b'{"error":{"code":404,"status":"NOT_FOUND"}}',
    ],
)
@pytest.mark.parametrize("status", [200, 302, 401, 403, 404])
def test_an_answer_that_is_not_huaweis_does_no_harm(status: int, body: bytes | None) -> None:
    assert classify(HttpAnswer(status, {}, body), NOW) == RetryAt("unreadable-answer" if status == 200 else f"status-{status}")


@given(
    status=st.integers(100, 599),
    content=st.dictionaries(
        st.sampled_from(["code", "msg", "requestId"]), st.sampled_from(sorted(ERRORS)) | st.none() | texts | st.integers() | st.booleans()
    ),
)
def test_classify_never_raises_and_never_says_more_than_a_word(status: int, content: dict[str, object]) -> None:
    assert len(classify(HttpAnswer(status, {}, json.dumps(content).encode()), NOW).reason) <= 64


def test_a_wrong_clock_is_not_what_huawei_refuses() -> None:
    answer = HttpAnswer(200, {"date": format_datetime(NOW + timedelta(hours=1), usegmt=True)}, answered("80200001").body)
    assert classify(answer, NOW) == RefreshAuth("80200001")


def test_every_reason_of_the_tables_has_advice() -> None:
    reasons = ERRORS.keys() - {"*"} | {"accepted-without-request-id", "status-503", "oauth-1101"}
    assert reasons <= ADVICE.keys()
    provider = HmsProvider(HmsSettings(APP, "secret"), FakeClock(NOW))
    for reason in (*reasons, *COMMON_ADVICE, *RARE_ADVICE, "status-403", "oauth-network-dns", "oauth-timeout", "oauth-status-500"):
        assert provider.advise(reason) != advise_common("89999999"), reason
    assert "AppGallery Connect" in provider.advise("80300002")
    assert "sealpush providers rotate" in provider.advise("oauth-1101")


# Credential


def test_credential_is_read_from_our_file() -> None:
    full = {"app_id": APP, "client_secret": "hunter2", "receipt_user": "bank", "receipt_key": "swordfish"}
    assert parse_credential(json.dumps(full).encode()) == HmsCredential(APP, "hunter2", "bank", "swordfish")
    assert parse_credential(b'{"app_id":101234567,"client_secret":"hunter2"}') == HmsCredential(APP, "hunter2")
    settings = HmsSettings.parse(json.dumps(full).encode())
    assert settings == HmsSettings(APP, "hunter2")
    assert HmsProvider(settings, FakeClock(NOW)).topic == APP


SECRET = "hunter2hunter2"
BAD_CREDENTIALS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON object"),
    "garbage": (b"\xff\xfe" + SECRET.encode(), "JSON object"),
    "nested": (b"[" * 100_000, "JSON object"),
    "text": (json.dumps(SECRET).encode(), "JSON object"),
    "key file": (b"-----BEGIN PRIVATE KEY-----\n" + SECRET.encode(), "JSON object"),
    "service account": (json.dumps({"type": "service_account", "private_key": SECRET}).encode(), "fields"),
    "no id": (json.dumps({"client_secret": SECRET}).encode(), "app_id"),
    "id of another form": (json.dumps({"app_id": f"../{SECRET}", "client_secret": SECRET}).encode(), "app_id"),
    "true as id": (json.dumps({"app_id": True, "client_secret": SECRET}).encode(), "app_id"),
    "no secret": (json.dumps({"app_id": APP}).encode(), "client_secret"),
    "number as secret": (json.dumps({"app_id": APP, "client_secret": 5}).encode(), "client_secret"),
    "line break": (json.dumps({"app_id": APP, "client_secret": SECRET + "\n"}).encode(), "client_secret"),
    "user without key": (json.dumps({"app_id": APP, "client_secret": SECRET, "receipt_user": "bank"}).encode(), "receipt_key"),
    "key without user": (json.dumps({"app_id": APP, "client_secret": SECRET, "receipt_key": SECRET}).encode(), "receipt_user"),
}


@pytest.mark.parametrize(("content", "word"), BAD_CREDENTIALS.values(), ids=list(BAD_CREDENTIALS))
def test_unusable_credential_is_refused_without_quoting_it(content: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word) as refusal:
        HmsSettings.parse(content)
    told = "".join(str(error) for error in (refusal.value, refusal.value.__cause__, refusal.value.__context__) if error is not None)
    assert SECRET not in told


def test_settings_that_cannot_be_used_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="app_id"):
        HmsProvider(HmsSettings("../1", "secret"), FakeClock(NOW))
    with pytest.raises(ValueError, match="https"):
        HmsProvider(HmsSettings(APP, "secret", token_url="http://huawei.example/token"), FakeClock(NOW))


def test_settings_and_credential_never_print_secrets_or_the_proxys_password() -> None:
    settings = HmsSettings(APP, "hunter2", http=HttpSettings(proxy_url="http://user:hunter2@proxy:3128"))
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in repr(HmsCredential(APP, "hunter2", "bank", "hunter2"))


async def test_target_of_another_app_is_not_asked_about() -> None:
    provider = HmsProvider(HmsSettings(APP, "secret", base_url="https://nowhere.invalid"), FakeClock(NOW))
    target = PushTarget(TARGET.token, PushEnvironment.PRODUCTION, "109999999", NOW)
    assert await provider.send(target, wake_up()) == TokenSuspect("other-topic")
    await provider.aclose()
