"""The provider of FCM over real HTTP/2 and TLS against the simulated FCM and its token endpoint."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sealpushd.dispatch.providers.base import (
    Accepted,
    Misconfigured,
    Outcome,
    Provider,
    PushEnvironment,
    PushTarget,
    PushToken,
    RefreshAuth,
    RetryAt,
    TokenGone,
    TokenSuspect,
    WakeUp,
    WakeUpPriority,
)
from sealpushd.dispatch.providers.fcm import FcmProvider, FcmSettings
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.dispatch.providers.oauth import FAILURE_KEPT, REPLACE_MIN
from sealpushd.simulators import core as simulated
from sealpushd.simulators.core import FaultScope
from sealpushd.simulators.server import RunningSimulators, ServiceAccount, SimulatedFcm, SimulatorSettings, simulators
from tests.contract.harness import FakeClock
from tests.contract.push_simulators import Certificates, connect_proxy

PROJECT, OTHER_PROJECT = "demo-bank", "demo-post"
EMAIL, OTHER_EMAIL, KEY_ID = "push@demo-bank.example", "push@demo-post.example", "0123456789abcdef"
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Keys:
    """The signing key of the service accounts, and one that nobody trusts."""

    account: rsa.RSAPrivateKey
    stranger: rsa.RSAPrivateKey

    @property
    def public_pem(self) -> bytes:
        return self.account.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys(*(rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)))


@pytest.fixture
async def running(certificates: Certificates, keys: Keys, clock: FakeClock) -> AsyncIterator[RunningSimulators]:
    accounts = [
        ServiceAccount(PROJECT, EMAIL, KEY_ID, keys.public_pem),
        ServiceAccount(OTHER_PROJECT, OTHER_EMAIL, KEY_ID, keys.public_pem),
    ]
    settings = SimulatorSettings(certificates.certificate, certificates.private_key, fcm=SimulatedFcm(service_accounts=accounts))
    async with simulators(settings, now=clock.now) as running:
        yield running


def account_file(key: rsa.RSAPrivateKey, port: int, **changes: str) -> bytes:
    fields = {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": KEY_ID,
        "private_key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        "client_email": EMAIL,
        "token_uri": f"https://localhost:{port}/token",
    }
    return json.dumps(fields | changes).encode()


@pytest.fixture
def settings(keys: Keys, running: RunningSimulators, certificates: Certificates) -> FcmSettings:
    return FcmSettings(
        service_account=account_file(keys.account, running.fcm_port),
        base_url=f"https://localhost:{running.fcm_port}",
        http=HttpSettings(private_ca_file=certificates.ca, total_timeout=timedelta(seconds=5)),
    )


def with_http(settings: FcmSettings, **changes: Any) -> FcmSettings:
    return replace(settings, http=replace(settings.http, **changes))


@pytest.fixture
async def provider(settings: FcmSettings, clock: FakeClock) -> AsyncIterator[FcmProvider]:
    provider = FcmProvider(settings, clock)
    yield provider
    await provider.aclose()


def new_target(running: RunningSimulators, clock: FakeClock, project: str = PROJECT) -> PushTarget:
    token = PushToken(running.fcm.create_device(project))
    return PushTarget(token, PushEnvironment.PRODUCTION, "", clock.now() - timedelta(days=1))


@pytest.fixture
def target(running: RunningSimulators, clock: FakeClock) -> PushTarget:
    return new_target(running, clock)


def new_wake_up(clock: FakeClock, *, muted: bool = False) -> WakeUp:
    return WakeUp(uuid.uuid4().bytes, muted=muted, priority=WakeUpPriority.HIGH, expires_at=clock.now() + HOUR)


async def send_with(settings: FcmSettings, target: PushTarget, clock: FakeClock) -> Outcome:
    """What a provider of these settings makes of one wake-up."""
    provider = FcmProvider(settings, clock)
    try:
        return await provider.send(target, new_wake_up(clock))
    finally:
        await provider.aclose()


# Wake-ups


async def test_the_client_has_the_shape_of_every_provider(provider: FcmProvider) -> None:
    shape: Provider = provider
    assert (shape.name, shape.topic) == ("fcm", PROJECT)


@pytest.mark.parametrize("muted", [False, True])
async def test_wake_up_reaches_the_phone_with_the_id_alone(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock, muted: bool
) -> None:
    line = running.fcm.connect()
    assert line.online([target.token.reveal()]) == []
    wake_up = new_wake_up(clock, muted=muted)
    assert await provider.send(target, wake_up) == Accepted()
    [notification] = await line.next_batch()
    assert json.loads(notification.payload) == {"id": wake_up.wire_id}
    assert notification.headers.pop("message_id")
    assert notification.headers == (
        {"priority": "NORMAL", "ttl": "3600", "collapse_key": "wake-up"} if muted else {"priority": "HIGH", "ttl": "3600"}
    )


async def test_of_muted_wake_ups_that_wait_only_the_newest_is_kept_and_of_urgent_ones_all(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    wake_ups = [new_wake_up(clock, muted=muted) for muted in (True, False, True, False, True)]
    for wake_up in wake_ups:
        assert await provider.send(target, wake_up) == Accepted()
    line = running.fcm.connect()
    line.online([target.token.reveal()])
    assert [json.loads(one.payload)["id"] for one in await line.next_batch()] == [wake_ups[number].wire_id for number in (1, 3, 4)]


async def test_nothing_but_protocol_fields_and_the_id_ever_reaches_google(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    wake_up = new_wake_up(clock)
    await provider.send(target, wake_up)
    asked, sent = (received.request for received in running.fcm.received)
    assert (asked.path, sent.path) == ("/token", f"/v1/projects/{PROJECT}/messages:send")
    assert parse_qs(asked.body.decode()).keys() == {"grant_type", "assertion"}
    headers = dict(sent.headers)
    assert headers.pop("authorization", None)
    assert headers == {
        "content-type": "application/json; charset=UTF-8",
        "content-length": str(len(sent.body)),
        "accept": "*/*",
        "user-agent": "sealpush",
    }
    assert json.loads(sent.body) == {
        "message": {
            "token": target.token.reveal(),
            "data": {"id": wake_up.wire_id},
            "android": {"priority": "HIGH", "ttl": "3600s"},
        }
    }


async def test_one_connection_and_one_access_token_serve_many_sends(
    running: RunningSimulators, provider: FcmProvider, clock: FakeClock
) -> None:
    targets = [new_target(running, clock) for _ in range(200)]
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for target in targets))) == {Accepted()}
    counters = running.fcm.counters
    assert (counters.connections, counters.access_tokens, counters.early_streams) == (1, 1, 0)


# What Google answers


AFTER_7, MINUTE = timedelta(seconds=7), timedelta(minutes=1)
ROWS: dict[tuple[int, str], Outcome] = {
    (404, "UNREGISTERED"): TokenGone("UNREGISTERED"),
    (403, "SENDER_ID_MISMATCH"): TokenSuspect("SENDER_ID_MISMATCH"),
    (401, "THIRD_PARTY_AUTH_ERROR"): TokenSuspect("THIRD_PARTY_AUTH_ERROR"),
    (429, "QUOTA_EXCEEDED"): RetryAt("QUOTA_EXCEEDED", AFTER_7),
    (503, "UNAVAILABLE"): RetryAt("UNAVAILABLE", AFTER_7),
    (500, "INTERNAL"): RetryAt("INTERNAL", AFTER_7),
    (500, "UNSPECIFIED_ERROR"): RetryAt("UNSPECIFIED_ERROR", AFTER_7),
    (400, "SOMETHING_NEW"): RetryAt("SOMETHING_NEW", AFTER_7),
    (403, "PERMISSION_DENIED"): Misconfigured("PERMISSION_DENIED"),
    (404, "NOT_FOUND"): Misconfigured("NOT_FOUND"),
    (429, "RESOURCE_EXHAUSTED"): RetryAt("RESOURCE_EXHAUSTED", AFTER_7),
    (401, "UNAUTHENTICATED"): RefreshAuth("UNAUTHENTICATED"),
    (409, "ABORTED"): RetryAt("ABORTED", AFTER_7),
    (504, "DEADLINE_EXCEEDED"): RetryAt("DEADLINE_EXCEEDED", AFTER_7),
}


@pytest.mark.parametrize(("row", "outcome"), ROWS.items(), ids=lambda value: str(value)[:60])
async def test_error_table(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock, row: tuple[int, str], outcome: Outcome
) -> None:
    running.fcm.set_fault(simulated.Answer(*row, retry_after=AFTER_7), duration=HOUR)
    assert await provider.send(target, new_wake_up(clock)) == outcome
    running.fcm.clear_faults()
    clock.advance(REPLACE_MIN)
    assert await provider.send(target, new_wake_up(clock)) == Accepted(), "the provider is usable afterwards"


async def test_what_is_wrong_with_a_token_ends_its_leg_and_only_the_gone_are_forgotten(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.fcm.uninstall(target.token.reveal())
    assert await provider.send(target, new_wake_up(clock)) == TokenGone("UNREGISTERED")
    stranger = new_target(running, clock, OTHER_PROJECT)
    assert await provider.send(stranger, new_wake_up(clock)) == TokenSuspect("SENDER_ID_MISMATCH")
    nonsense = replace(target, token=PushToken("../../other?x=1"))
    assert await provider.send(nonsense, new_wake_up(clock)) == TokenSuspect("INVALID_ARGUMENT")


async def test_target_of_another_project_never_reaches_google(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(replace(target, topic=OTHER_PROJECT), new_wake_up(clock)) == TokenSuspect("other-topic")
    assert not running.fcm.received
    assert await provider.send(replace(target, topic=PROJECT), new_wake_up(clock)) == Accepted()


async def test_quota_of_one_device_is_patience_with_this_device_only(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    outcomes = [await provider.send(target, new_wake_up(clock)) for _ in range(241)]
    assert set(outcomes[:240]) == {Accepted()}
    refused = outcomes[240]
    assert isinstance(refused, RetryAt)
    assert refused.of_device
    assert refused.retry_after is not None
    assert timedelta(0) < refused.retry_after <= MINUTE
    assert await provider.send(new_target(running, clock), new_wake_up(clock)) == Accepted()


GARBAGE = {
    "html": simulated.Answer(403, raw_body=b"<html>blocked by the company's proxy</html>"),
    "html success": simulated.Answer(200, raw_body=b"<html>log in first</html>"),
    "empty success": simulated.Answer(200, raw_body=b""),
    "redirect": simulated.Answer(302, raw_body=b"elsewhere"),
    "empty": simulated.Answer(400, raw_body=b""),
    "array": simulated.Answer(404, raw_body=b'["UNREGISTERED"]'),
    "huge": simulated.Answer(404, raw_body=b'{"error":{"code":404,"status":"NOT_FOUND","x":"' + b"x" * 4_000_000 + b'"}}'),
    "huge success": simulated.Answer(200, raw_body=b'{"name":"projects/demo-bank/messages/' + b"x" * 4_000_000 + b'"}'),
    "truncated": simulated.Answer(404, reason="UNREGISTERED", truncated=True),
    "not utf-8": simulated.Answer(400, raw_body=b'{"error":"\xff\xfe"}'),
    "another vendor's": simulated.Answer(410, raw_body=b'{"reason":"Unregistered"}'),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=list(GARBAGE))
async def test_garbage_does_no_harm(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock, answer: simulated.Answer
) -> None:
    running.fcm.set_fault(answer, requests=1)
    assert isinstance(await provider.send(target, new_wake_up(clock)), RetryAt)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    assert running.fcm.counters.requests == 2, "no redirect was followed, and nothing was repeated"


# The network


async def test_what_the_network_does_has_a_reason_each(
    settings: FcmSettings, target: PushTarget, clock: FakeClock, unused_tcp_port: int
) -> None:
    """The token endpoint is reached here all the same."""
    for base_url, reason in (
        ("https://nowhere.invalid", "network-dns"),
        (f"https://localhost:{unused_tcp_port}", "network-refused"),
    ):
        assert await send_with(replace(settings, base_url=base_url), target, clock) == RetryAt(reason)


async def test_what_keeps_us_from_the_token_endpoint_is_told_as_the_token_endpoints(
    keys: Keys, settings: FcmSettings, other_certificates: Certificates, target: PushTarget, clock: FakeClock, unused_tcp_port: int
) -> None:
    elsewhere = account_file(keys.account, 443, token_uri="https://nowhere.invalid/token")
    nobody = account_file(keys.account, unused_tcp_port)
    async with connect_proxy({}) as refusing_proxy:
        for troubled, reason in (
            (replace(settings, service_account=elsewhere), "oauth-network-dns"),
            (replace(settings, service_account=nobody), "oauth-network-refused"),
            (with_http(settings, private_ca_file=other_certificates.ca), "oauth-network-certificate"),
            (with_http(settings, proxy_url=f"http://127.0.0.1:{unused_tcp_port}"), "oauth-network-proxy"),
            (with_http(settings, proxy_url=refusing_proxy), "oauth-network-proxy"),
        ):
            assert await send_with(troubled, target, clock) == RetryAt(reason)


async def test_certificate_of_another_authority_is_refused_and_nothing_is_sent(
    running: RunningSimulators, settings: FcmSettings, other_certificates: Certificates, target: PushTarget, clock: FakeClock
) -> None:
    """The token endpoint's is good, that of FCM is not."""
    impostor = SimulatorSettings(other_certificates.certificate, other_certificates.private_key, fcm=SimulatedFcm())
    async with simulators(impostor, now=clock.now) as other:
        troubled = replace(settings, base_url=f"https://localhost:{other.fcm_port}")
        assert await send_with(troubled, target, clock) == RetryAt("network-certificate")
        assert not other.fcm.received


async def test_black_hole_is_a_retry_within_the_deadline_and_harms_nobody_else(
    running: RunningSimulators, settings: FcmSettings, target: PushTarget, clock: FakeClock
) -> None:
    provider = FcmProvider(with_http(settings, total_timeout=timedelta(seconds=1.5)), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.fcm.set_fault(simulated.BlackHole(), requests=1)
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(5)))
    assert sorted(map(str, outcomes)) == sorted(map(str, [RetryAt("timeout"), *[Accepted()] * 4]))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    await provider.aclose()


async def test_goaway_and_a_lost_answer_are_survived(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    for fault in (simulated.GoAway("maintenance"), simulated.LostAnswer()):
        running.fcm.set_fault(fault, requests=1)
        wake_up = new_wake_up(clock)
        assert isinstance(await provider.send(target, wake_up), Accepted | RetryAt)
        assert await provider.send(target, wake_up) == Accepted()


async def test_cancellation_passes_and_leaves_the_provider_usable(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.fcm.set_fault(simulated.BlackHole(), requests=1)
    send = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    while len(running.fcm.received) < 2:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await send
    assert send.cancelled()
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


@pytest.mark.parametrize("scope", FaultScope)
async def test_closing_ends_sends_as_retries(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock, scope: FaultScope
) -> None:
    running.fcm.set_fault(simulated.BlackHole(), scope=scope, requests=1)
    sends = [asyncio.create_task(provider.send(target, new_wake_up(clock))) for _ in range(3)]
    awaited = 1 if scope is FaultScope.TOKENS else 2
    while len(running.fcm.received) < awaited:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)
    await provider.aclose()
    assert {type(outcome) for outcome in await asyncio.gather(*sends)} == {RetryAt}
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("closed")
    await provider.aclose()


# Access tokens


async def test_access_token_is_renewed_before_its_end(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    counters = running.fcm.counters
    for advance, access_tokens in ((0, 1), (54, 1), (1, 2), (54, 2)):
        clock.advance(timedelta(minutes=advance))
        assert await provider.send(target, new_wake_up(clock)) == Accepted()
        while counters.access_tokens < access_tokens:  # noqa: ASYNC110 - the renewal runs beside the send
            await asyncio.sleep(0)
        assert counters.access_tokens == access_tokens
    assert counters.refused == 0


async def test_expired_access_token_is_replaced_once_and_the_sends_succeed(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.fcm.set_fault(simulated.ExpiredProviderToken(), requests=1)
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50)))) == {Accepted()}
    assert running.fcm.counters.access_tokens == 2


async def test_access_tokens_refused_for_ever_are_not_replaced_in_a_storm(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.fcm.set_fault(simulated.Answer(401, "UNAUTHENTICATED"), duration=HOUR)
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50)))) == {RefreshAuth("UNAUTHENTICATED")}
    assert running.fcm.counters.access_tokens == 2
    assert running.fcm.counters.requests <= 100
    assert "sealpush providers rotate" in provider.advise("UNAUTHENTICATED")


async def test_credential_that_is_revoked_in_the_middle_of_a_run_is_a_misconfiguration(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.fcm.revoke_credential(EMAIL)
    outcomes = set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50))))
    assert outcomes == {Misconfigured("oauth-invalid_grant")}
    assert running.fcm.counters.token_requests == 2
    assert "sealpush providers rotate" in provider.advise("oauth-invalid_grant")


@pytest.mark.parametrize("stranger", ["key", "account"])
async def test_credential_that_google_does_not_know_is_a_misconfiguration(
    keys: Keys, running: RunningSimulators, settings: FcmSettings, target: PushTarget, clock: FakeClock, stranger: str
) -> None:
    content = {
        "key": account_file(keys.stranger, running.fcm_port),
        "account": account_file(keys.account, running.fcm_port, client_email="nobody@demo-bank.example"),
    }[stranger]
    assert await send_with(replace(settings, service_account=content), target, clock) == Misconfigured("oauth-invalid_grant")


async def test_credential_of_another_project_stops_the_lane_and_erases_no_token(
    keys: Keys, running: RunningSimulators, settings: FcmSettings, target: PushTarget, clock: FakeClock
) -> None:
    other = account_file(keys.account, running.fcm_port, client_email=OTHER_EMAIL, project_id=OTHER_PROJECT)
    assert await send_with(replace(settings, service_account=other), target, clock) == TokenSuspect("SENDER_ID_MISMATCH")
    mixed = replace(settings, service_account=other, project=PROJECT)
    assert await send_with(mixed, target, clock) == Misconfigured("IAM_PERMISSION_DENIED")


@pytest.mark.parametrize("hours", [1, -1])
async def test_clock_that_is_wrong_by_an_hour_is_told_from_a_wrong_key(
    settings: FcmSettings, target: PushTarget, clock: FakeClock, hours: int
) -> None:
    wrong = FakeClock()
    wrong.advance(clock.now() - wrong.now() + timedelta(hours=hours, minutes=6 * hours))
    assert await send_with(settings, target, wrong) == Misconfigured("clock-wrong")


TROUBLES: dict[str, tuple[simulated.Fault, Outcome]] = {
    "down": (simulated.Answer(503, retry_after=AFTER_7), RetryAt("oauth-status-503", AFTER_7)),
    "html": (simulated.Answer(200, raw_body=b"<html>log in first</html>"), RetryAt("oauth-unreadable-answer")),
    "blocked": (simulated.Answer(403, raw_body=b"<html>blocked</html>"), RetryAt("oauth-status-403")),
    "huge": (simulated.Answer(200, raw_body=b'{"access_token":"' + b"x" * 4_000_000 + b'"}'), RetryAt("oauth-unreadable-answer")),
    "no token": (simulated.Answer(200, raw_body=b'{"expires_in":3600}'), RetryAt("oauth-unreadable-answer")),
    "black hole": (simulated.BlackHole(), RetryAt("oauth-timeout")),
    "truncated": (simulated.Answer(200, raw_body=b'{"access_token":"x"}', truncated=True), RetryAt("oauth-network-broken")),
    "refused": (simulated.Answer(400, "invalid_grant"), Misconfigured("oauth-invalid_grant")),
}


@pytest.mark.parametrize(("fault", "outcome"), TROUBLES.values(), ids=list(TROUBLES))
async def test_trouble_of_the_token_endpoint_harms_no_send_while_the_old_token_serves(
    running: RunningSimulators, settings: FcmSettings, target: PushTarget, clock: FakeClock, fault: simulated.Fault, outcome: Outcome
) -> None:
    provider = FcmProvider(with_http(settings, total_timeout=timedelta(seconds=2)), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.fcm.set_fault(fault, scope=FaultScope.TOKENS, duration=timedelta(days=1))
    clock.advance(timedelta(minutes=56))
    for _ in range(3):
        assert await provider.send(target, new_wake_up(clock)) == Accepted()
        clock.advance(FAILURE_KEPT)
    clock.advance(timedelta(minutes=4))
    assert await provider.send(target, new_wake_up(clock)) == outcome
    running.fcm.clear_faults()
    clock.advance(AFTER_7)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    await provider.aclose()


# Probe


async def test_probe_of_a_good_credential_wakes_nobody(running: RunningSimulators, provider: FcmProvider) -> None:
    probes = await provider.probe()
    assert [(probed.what, probed.is_good) for probed in probes] == [("access token", True), ("send", True)]
    sent = json.loads(running.fcm.received[-1].request.body)
    assert sent["validate_only"] is True
    assert running.fcm.counters.delivered == 0


async def test_probe_tells_which_step_fails(keys: Keys, running: RunningSimulators, settings: FcmSettings, clock: FakeClock) -> None:
    stranger = replace(settings, service_account=account_file(keys.stranger, running.fcm_port))
    mixed = replace(settings, project=OTHER_PROJECT)
    unreachable = replace(settings, base_url="https://nowhere.invalid")
    for troubled, verdicts in (
        (stranger, [("access token", False)]),
        (mixed, [("access token", True), ("send", False)]),
        (unreachable, [("access token", True), ("send", None)]),
    ):
        provider = FcmProvider(troubled, clock)
        probes = await provider.probe()
        assert [(probed.what, probed.is_good) for probed in probes] == verdicts
        assert all(provider.advise(probed.outcome.reason) for probed in probes)
        await provider.aclose()


async def test_one_token_that_google_does_not_find_does_not_stop_a_credential_that_works(
    running: RunningSimulators, provider: FcmProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    not_found = b'{"error":{"code":404,"status":"NOT_FOUND","message":"Requested entity was not found."}}'
    running.fcm.set_fault(simulated.Answer(404, raw_body=not_found), requests=1)
    assert await provider.send(target, new_wake_up(clock)) == TokenSuspect("NOT_FOUND")
