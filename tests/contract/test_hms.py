"""The provider of HMS over real HTTP and TLS against the simulated Push Kit and its token endpoint; its receipts are read."""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest

from sealpushd.dispatch.providers.base import (
    Accepted,
    Bug,
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
from sealpushd.dispatch.providers.hms import ERRORS, REACHED_MIN, HmsProvider, HmsSettings
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.dispatch.providers.oauth import FAILURE_KEPT, REPLACE_MIN
from sealpushd.dispatch.receipts import BadSignature, Receipt, ReceiptKey, Signatures, parse_receipts
from sealpushd.platform.clock import Reading
from sealpushd.simulators import core as simulated
from sealpushd.simulators.core import FaultScope
from sealpushd.simulators.receipts import ReceiptSettings
from sealpushd.simulators.server import HmsClient, RunningSimulators, SimulatedHms, SimulatorSettings, simulators
from tests.contract.harness import FakeClock
from tests.contract.push_simulators import Certificates, connect_proxy

APP, OTHER_APP, SECRET = "101234567", "109999999", "secret of the app"
RECEIPT_KEY = ReceiptKey("bank", "key of the receipts")
HOUR = timedelta(hours=1)
CLIENTS = [HmsClient(APP, SECRET, RECEIPT_KEY.user, RECEIPT_KEY.key), HmsClient(OTHER_APP, SECRET)]


@pytest.fixture
async def running(certificates: Certificates, clock: FakeClock) -> AsyncIterator[RunningSimulators]:
    settings = SimulatorSettings(certificates.certificate, certificates.private_key, hms=SimulatedHms(clients=CLIENTS))
    async with simulators(settings, now=clock.now) as running:
        yield running


def settings_for(port: int, certificates: Certificates) -> HmsSettings:
    return HmsSettings(
        app_id=APP,
        client_secret=SECRET,
        base_url=f"https://localhost:{port}",
        token_url=f"https://localhost:{port}/oauth2/v3/token",
        http=HttpSettings(private_ca_file=certificates.ca, total_timeout=timedelta(seconds=5)),
    )


@pytest.fixture
def settings(running: RunningSimulators, certificates: Certificates) -> HmsSettings:
    return settings_for(running.hms_port, certificates)


def with_http(settings: HmsSettings, **changes: Any) -> HmsSettings:
    return replace(settings, http=replace(settings.http, **changes))


@pytest.fixture
async def provider(settings: HmsSettings, clock: FakeClock) -> AsyncIterator[HmsProvider]:
    provider = HmsProvider(settings, clock)
    yield provider
    await provider.aclose()


def new_target(running: RunningSimulators, clock: FakeClock, app_id: str = APP) -> PushTarget:
    token = PushToken(running.hms.create_device(app_id))
    return PushTarget(token, PushEnvironment.PRODUCTION, "", clock.now() - timedelta(days=1))


@pytest.fixture
def target(running: RunningSimulators, clock: FakeClock) -> PushTarget:
    return new_target(running, clock)


def new_wake_up(clock: FakeClock, *, muted: bool = False) -> WakeUp:
    return WakeUp(uuid.uuid4().bytes, muted=muted, priority=WakeUpPriority.HIGH, expires_at=clock.now() + HOUR)


async def send_with(settings: HmsSettings, target: PushTarget, clock: FakeClock) -> Outcome:
    """What a provider of these settings makes of one wake-up."""
    provider = HmsProvider(settings, clock)
    try:
        return await provider.send(target, new_wake_up(clock))
    finally:
        await provider.aclose()


# Wake-ups


async def test_the_client_has_the_shape_of_every_provider(provider: HmsProvider) -> None:
    shape: Provider = provider
    assert (shape.name, shape.topic) == ("hms", APP)


@pytest.mark.parametrize("muted", [False, True])
async def test_wake_up_reaches_the_phone_with_the_id_alone(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, muted: bool
) -> None:
    line = running.hms.connect()
    assert line.online([target.token.reveal()]) == []
    wake_up = new_wake_up(clock, muted=muted)
    assert await provider.send(target, wake_up) == Accepted()
    [notification] = await line.next_batch()
    assert json.loads(notification.payload) == {"id": wake_up.wire_id}
    assert notification.headers.pop("request_id")
    assert notification.headers == {
        "urgency": "NORMAL" if muted else "HIGH",
        "ttl": "3600",
        "collapse_key": "2" if muted else "1",
        "bi_tag": wake_up.wire_id,
    }


async def test_of_wake_ups_that_wait_the_newest_urgent_and_the_newest_muted_one_are_kept(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    wake_ups = [new_wake_up(clock, muted=muted) for muted in (True, False, True, False, True)]
    for wake_up in wake_ups:
        assert await provider.send(target, wake_up) == Accepted()
    line = running.hms.connect()
    line.online([target.token.reveal()])
    assert [json.loads(one.payload)["id"] for one in await line.next_batch()] == [wake_ups[number].wire_id for number in (3, 4)]


async def test_nothing_but_protocol_fields_and_the_id_ever_reaches_huawei(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    wake_up = new_wake_up(clock)
    await provider.send(target, wake_up)
    asked, sent = (received.request for received in running.hms.received)
    assert (asked.path, sent.path) == ("/oauth2/v3/token", f"/v1/{APP}/messages:send")
    form = parse_qs(asked.body.decode())
    assert form.keys() == {"grant_type", "client_id", "client_secret"}
    assert (form["grant_type"], form["client_id"]) == (["client_credentials"], [APP])
    headers = dict(sent.headers)
    assert headers.pop("authorization", None)
    assert headers == {
        "content-type": "application/json; charset=UTF-8",
        "content-length": str(len(sent.body)),
        "accept": "*/*",
        "user-agent": "sealpush",
    }
    assert json.loads(sent.body) == {
        "validate_only": False,
        "message": {
            "data": json.dumps({"id": wake_up.wire_id}, separators=(",", ":")),
            "android": {"urgency": "HIGH", "ttl": "3600s", "collapse_key": 1, "bi_tag": wake_up.wire_id},
            "token": [target.token.reveal()],
        },
    }


async def test_one_connection_and_one_access_token_serve_many_sends(
    running: RunningSimulators, provider: HmsProvider, clock: FakeClock
) -> None:
    targets = [new_target(running, clock) for _ in range(200)]
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for target in targets))) == {Accepted()}
    counters = running.hms.counters
    assert (counters.connections, counters.access_tokens, counters.early_streams) == (1, 1, 0)


# What Huawei answers


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
    "80600003": RetryAt("80600003"),
    "81000001": RetryAt("81000001"),
    "*": RetryAt("89999999"),
}


def test_every_row_of_the_error_table_is_played() -> None:
    assert OUTCOMES.keys() == ERRORS.keys()


@pytest.mark.parametrize(("code", "outcome"), OUTCOMES.items(), ids=list(OUTCOMES))
async def test_error_table(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, code: str, outcome: Outcome
) -> None:
    running.hms.set_fault(simulated.Answer(200, code.replace("*", "89999999")), duration=HOUR)
    assert await provider.send(target, new_wake_up(clock)) == outcome
    running.hms.clear_faults()
    clock.advance(REPLACE_MIN)
    assert await provider.send(target, new_wake_up(clock)) == Accepted(), "the provider is usable afterwards"


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_flow_control_and_gateway_errors_are_retries(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, status: int
) -> None:
    running.hms.set_fault(simulated.Answer(status, retry_after=timedelta(seconds=7)), requests=1)
    assert await provider.send(target, new_wake_up(clock)) == RetryAt(f"status-{status}")
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


async def test_dead_token_is_gone_only_once_the_credential_has_reached_enough_devices(
    running: RunningSimulators, provider: HmsProvider, clock: FakeClock
) -> None:
    dead = new_target(running, clock)
    running.hms.uninstall(dead.token.reveal())
    await provider.probe()
    one = new_target(running, clock)
    for _ in range(REACHED_MIN):
        assert await provider.send(one, new_wake_up(clock)) == Accepted()
    assert await provider.send(dead, new_wake_up(clock)) == TokenSuspect("80300007"), "one phone, however often, is not many"
    for _ in range(REACHED_MIN - 1):
        assert await provider.send(new_target(running, clock), new_wake_up(clock)) == Accepted()
    assert await provider.send(dead, new_wake_up(clock)) == TokenGone("80300007")


async def test_credential_that_reaches_fewer_devices_than_it_does_not_erases_no_token(
    running: RunningSimulators, provider: HmsProvider, clock: FakeClock
) -> None:
    for _ in range(REACHED_MIN):
        assert await provider.send(new_target(running, clock), new_wake_up(clock)) == Accepted()
    outcomes = []
    for _ in range(2 * REACHED_MIN):
        stranger = new_target(running, clock)
        running.hms.uninstall(stranger.token.reveal())
        outcomes.append(await provider.send(stranger, new_wake_up(clock)))
    assert outcomes[REACHED_MIN:] == [TokenSuspect("80300007")] * REACHED_MIN


async def test_one_token_that_may_not_be_pushed_to_does_not_stop_a_credential_that_works(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.set_fault(simulated.Answer(200, "80300002"), requests=1)
    assert await provider.send(new_target(running, clock), new_wake_up(clock)) == TokenSuspect("80300002")


async def test_credential_of_another_app_erases_no_token(settings: HmsSettings, target: PushTarget, clock: FakeClock) -> None:
    provider = HmsProvider(replace(settings, app_id=OTHER_APP), clock)
    for _ in range(3):
        assert await provider.send(target, new_wake_up(clock)) == TokenSuspect("80300007")
    await provider.aclose()


async def test_target_of_another_app_never_reaches_huawei(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(replace(target, topic=OTHER_APP), new_wake_up(clock)) == TokenSuspect("other-topic")
    assert not running.hms.received
    assert await provider.send(replace(target, topic=APP), new_wake_up(clock)) == Accepted()


async def test_wake_up_that_has_expired_is_not_refused_as_a_fault_of_ours(
    provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, replace(new_wake_up(clock), expires_at=clock.now() - HOUR)) == Accepted()


SUCCESS = b'{"code":"80000000","msg":"Success","requestId":"1"'
GARBAGE = {
    "html": simulated.Answer(403, raw_body=b"<html>blocked by the company's proxy</html>"),
    "html success": simulated.Answer(200, raw_body=b"<html>log in first</html>"),
    "empty success": simulated.Answer(200, raw_body=b""),
    "success that names no request": simulated.Answer(200, raw_body=b'{"code":"80000000","msg":"Success","requestId":""}'),
    "redirect": simulated.Answer(302, raw_body=b"elsewhere"),
    "array": simulated.Answer(200, raw_body=b'["80300007"]'),
    "number": simulated.Answer(200, raw_body=b'{"code":80300007}'),
    "huge": simulated.Answer(200, raw_body=b'{"code":"80300007","msg":"' + b"x" * 4_000_000 + b'"}'),
    "huge success": simulated.Answer(200, raw_body=SUCCESS + b',"x":"' + b"x" * 4_000_000 + b'"}'),
    "half": simulated.Answer(200, raw_body=SUCCESS),
    "truncated": simulated.Answer(200, reason="80300007", truncated=True),
    "not utf-8": simulated.Answer(200, raw_body=b'{"code":"\xff\xfe"}'),
    "another vendor's": simulated.Answer(410, raw_body=b'{"reason":"Unregistered"}'),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=list(GARBAGE))
async def test_garbage_does_no_harm(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, answer: simulated.Answer
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.set_fault(answer, requests=1)
    assert isinstance(await provider.send(target, new_wake_up(clock)), RetryAt)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    assert running.hms.counters.requests == 3, "no redirect was followed, and nothing was repeated"


# The network


async def test_what_the_network_does_has_a_reason_each(
    running: RunningSimulators,
    settings: HmsSettings,
    other_certificates: Certificates,
    target: PushTarget,
    clock: FakeClock,
    unused_tcp_port: int,
) -> None:
    """The token endpoint is reached here all the same."""
    impostor = SimulatorSettings(other_certificates.certificate, other_certificates.private_key, hms=SimulatedHms())
    async with simulators(impostor, now=clock.now) as other:
        for base_url, reason in (
            ("https://nowhere.invalid", "network-dns"),
            (f"https://localhost:{unused_tcp_port}", "network-refused"),
            (f"https://localhost:{other.hms_port}", "network-certificate"),
        ):
            assert await send_with(replace(settings, base_url=base_url), target, clock) == RetryAt(reason)
        assert not other.hms.received


async def test_what_keeps_us_from_the_token_endpoint_is_told_as_the_token_endpoints(
    settings: HmsSettings, other_certificates: Certificates, target: PushTarget, clock: FakeClock, unused_tcp_port: int
) -> None:
    async with connect_proxy({}) as refusing_proxy:
        for troubled, reason in (
            (replace(settings, token_url="https://nowhere.invalid/oauth2/v3/token"), "oauth-network-dns"),
            (replace(settings, token_url=f"https://localhost:{unused_tcp_port}/oauth2/v3/token"), "oauth-network-refused"),
            (with_http(settings, private_ca_file=other_certificates.ca), "oauth-network-certificate"),
            (with_http(settings, proxy_url=f"http://127.0.0.1:{unused_tcp_port}"), "oauth-network-proxy"),
            (with_http(settings, proxy_url=refusing_proxy), "oauth-network-proxy"),
        ):
            assert await send_with(troubled, target, clock) == RetryAt(reason)


async def test_black_hole_is_a_retry_within_the_deadline_and_harms_nobody_else(
    running: RunningSimulators, settings: HmsSettings, target: PushTarget, clock: FakeClock
) -> None:
    provider = HmsProvider(with_http(settings, total_timeout=timedelta(seconds=1.5)), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.set_fault(simulated.BlackHole(), requests=1)
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(5)))
    assert sorted(map(str, outcomes)) == sorted(map(str, [RetryAt("timeout"), *[Accepted()] * 4]))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    await provider.aclose()


async def test_goaway_and_a_lost_answer_are_survived(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    for fault in (simulated.GoAway("maintenance"), simulated.LostAnswer()):
        running.hms.set_fault(fault, requests=1)
        wake_up = new_wake_up(clock)
        assert isinstance(await provider.send(target, wake_up), Accepted | RetryAt)
        assert await provider.send(target, wake_up) == Accepted()


@asynccontextmanager
async def http1_server(certificates: Certificates, answers: dict[bytes, bytes]) -> AsyncIterator[tuple[int, list[tuple[bytes, bytes]]]]:
    """A TLS server of HTTP/1.1 alone that answers each path with its JSON; gives its port, and head and body of what it is asked."""
    asked: list[tuple[bytes, bytes]] = []
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        connections.add(connection)
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                asked.append((head, await reader.readexactly(int(lengths[0]))))
                body = answers[head.split(b" ")[1]]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.transport.abort()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.private_key)
    context.set_alpn_protocols(["http/1.1"])
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)
        await server.wait_closed()


async def test_push_kit_without_http2_is_served_too(certificates: Certificates, clock: FakeClock) -> None:
    answers = {
        b"/oauth2/v3/token": b'{"access_token":"CF3Xl2XV6jMK\\/==","expires_in":3600,"token_type":"Bearer"}',
        f"/v1/{APP}/messages:send".encode(): SUCCESS + b"}",
    }
    target = PushTarget(PushToken("I" * 130), PushEnvironment.PRODUCTION, "", clock.now())
    async with http1_server(certificates, answers) as (port, asked):
        provider = HmsProvider(settings_for(port, certificates), clock)
        outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(10)))
        await provider.aclose()
    assert set(outcomes) == {Accepted()}
    assert [head.split(b" ")[1] for head, _ in asked].count(b"/oauth2/v3/token") == 1
    assert all(b"\r\nAuthorization: Bearer CF3Xl2XV6jMK/==\r\n" in head for head, _ in asked[1:])


async def test_cancellation_passes_and_leaves_the_provider_usable(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.hms.set_fault(simulated.BlackHole(), requests=1)
    send = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    while len(running.hms.received) < 2:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await send
    assert send.cancelled()
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


@pytest.mark.parametrize("scope", FaultScope)
async def test_closing_ends_sends_as_retries(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, scope: FaultScope
) -> None:
    running.hms.set_fault(simulated.BlackHole(), scope=scope, requests=1)
    sends = [asyncio.create_task(provider.send(target, new_wake_up(clock))) for _ in range(3)]
    awaited = 1 if scope is FaultScope.TOKENS else 2
    while len(running.hms.received) < awaited:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)
    await provider.aclose()
    assert {type(outcome) for outcome in await asyncio.gather(*sends)} == {RetryAt}
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("closed")
    await provider.aclose()


# Access tokens


async def test_access_token_is_renewed_before_its_end(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    counters = running.hms.counters
    for advance, access_tokens in ((0, 1), (54, 1), (1, 2), (54, 2)):
        clock.advance(timedelta(minutes=advance))
        assert await provider.send(target, new_wake_up(clock)) == Accepted()
        while counters.access_tokens < access_tokens:  # noqa: ASYNC110 - the renewal runs beside the send
            await asyncio.sleep(0)
        assert counters.access_tokens == access_tokens
    assert counters.refused == 0


async def test_expired_access_token_is_replaced_once_and_the_sends_succeed(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.set_fault(simulated.ExpiredProviderToken(), requests=1)
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50)))) == {Accepted()}
    assert running.hms.counters.access_tokens == 2


@pytest.mark.parametrize("code", ["80200001", "80200003"])
async def test_access_tokens_refused_for_ever_are_not_replaced_in_a_storm(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock, code: str
) -> None:
    running.hms.set_fault(simulated.Answer(200, code), duration=HOUR)
    assert set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50)))) == {RefreshAuth(code)}
    assert running.hms.counters.access_tokens == 2
    assert running.hms.counters.requests <= 100


async def test_credential_that_is_revoked_in_the_middle_of_a_run_is_a_misconfiguration(
    running: RunningSimulators, provider: HmsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.revoke_credential(APP)
    outcomes = set(await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50))))
    assert outcomes == {Misconfigured("oauth-1101")}
    assert running.hms.counters.token_requests == 2
    assert "sealpush providers rotate" in provider.advise("oauth-1101")


@pytest.mark.parametrize("change", [{"client_secret": "another"}, {"app_id": "107777777"}], ids=["secret", "app"])
async def test_credential_that_huawei_does_not_know_is_a_misconfiguration(
    settings: HmsSettings, target: PushTarget, clock: FakeClock, change: dict[str, str]
) -> None:
    assert await send_with(replace(settings, **change), target, clock) == Misconfigured("oauth-1101")  # type: ignore[arg-type]  # these two are str


@pytest.mark.parametrize("hours", [1, -1])
async def test_clock_that_is_wrong_by_an_hour_harms_nothing(
    settings: HmsSettings, target: PushTarget, clock: FakeClock, hours: int
) -> None:
    """Nothing that is shown to Huawei has a time of ours in it."""
    wrong = FakeClock()
    wrong.advance(clock.now() - wrong.now() + timedelta(hours=hours))
    assert await send_with(settings, target, wrong) == Accepted()
    assert await send_with(replace(settings, client_secret="another"), target, wrong) == Misconfigured("oauth-1101")


AFTER_7 = timedelta(seconds=7)
TROUBLES: dict[str, tuple[simulated.Fault, Outcome]] = {
    "down": (simulated.Answer(503, retry_after=AFTER_7), RetryAt("oauth-status-503", AFTER_7)),
    "html": (simulated.Answer(200, raw_body=b"<html>log in first</html>"), RetryAt("oauth-unreadable-answer")),
    "blocked": (simulated.Answer(403, raw_body=b"<html>blocked</html>"), RetryAt("oauth-status-403")),
    "huge": (simulated.Answer(200, raw_body=b'{"access_token":"' + b"x" * 4_000_000 + b'"}'), RetryAt("oauth-unreadable-answer")),
    "no token": (simulated.Answer(200, raw_body=b'{"expires_in":3600}'), RetryAt("oauth-unreadable-answer")),
    "black hole": (simulated.BlackHole(), RetryAt("oauth-timeout")),
    "truncated": (simulated.Answer(200, raw_body=b'{"access_token":"x"}', truncated=True), RetryAt("oauth-network-broken")),
    "refused": (simulated.Answer(400, "1101"), Misconfigured("oauth-1101")),
}


@pytest.mark.parametrize(("fault", "outcome"), TROUBLES.values(), ids=list(TROUBLES))
async def test_trouble_of_the_token_endpoint_harms_no_send_while_the_old_token_serves(
    running: RunningSimulators, settings: HmsSettings, target: PushTarget, clock: FakeClock, fault: simulated.Fault, outcome: Outcome
) -> None:
    provider = HmsProvider(with_http(settings, total_timeout=timedelta(seconds=2)), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.hms.set_fault(fault, scope=FaultScope.TOKENS, duration=timedelta(days=1))
    clock.advance(timedelta(minutes=56))
    for _ in range(3):
        assert await provider.send(target, new_wake_up(clock)) == Accepted()
        clock.advance(FAILURE_KEPT)
    clock.advance(timedelta(minutes=4))
    assert await provider.send(target, new_wake_up(clock)) == outcome
    running.hms.clear_faults()
    clock.advance(AFTER_7)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    await provider.aclose()


# Probe


async def test_probe_of_a_good_credential_wakes_nobody(running: RunningSimulators, provider: HmsProvider) -> None:
    probes = await provider.probe()
    assert [(probed.what, probed.is_good) for probed in probes] == [("access token", True), ("send", True)]
    assert json.loads(running.hms.received[-1].request.body)["validate_only"] is True
    assert running.hms.counters.delivered == 0


async def test_probe_tells_which_step_fails(running: RunningSimulators, settings: HmsSettings, clock: FakeClock) -> None:
    for troubled, code, verdicts in (
        (replace(settings, client_secret="another"), None, [("access token", False)]),
        (settings, "80300002", [("access token", True), ("send", False)]),
        (replace(settings, base_url="https://nowhere.invalid"), None, [("access token", True), ("send", None)]),
    ):
        if code is not None:
            running.hms.set_fault(simulated.Answer(200, code), requests=1)
        provider = HmsProvider(troubled, clock)
        probes = await provider.probe()
        assert [(probed.what, probed.is_good) for probed in probes] == verdicts
        assert all(provider.advise(probed.outcome.reason) for probed in probes)
        await provider.aclose()


# Receipts


async def test_receipts_are_signed_and_name_the_wake_up(certificates: Certificates, clock: FakeClock) -> None:
    async with http1_server(certificates, {b"/receipts": b'{"code":"0","message":"success"}'}) as (port, asked):
        receipts = ReceiptSettings(f"https://localhost:{port}/receipts", ca=certificates.ca)
        hms = SimulatedHms(clients=CLIENTS, receipts=receipts)
        async with simulators(SimulatorSettings(certificates.certificate, certificates.private_key, hms=hms), now=clock.now) as running:
            provider = HmsProvider(settings_for(running.hms_port, certificates), clock)
            target, wake_up = new_target(running, clock), new_wake_up(clock)
            line = running.hms.connect()
            line.online([target.token.reveal()])
            assert await provider.send(target, wake_up) == Accepted()
            await line.next_batch()
            while not asked:  # noqa: ASYNC110 - the receipt comes by itself
                await asyncio.sleep(0)
            await provider.aclose()
    [(head, body)] = asked
    header = next(line.partition(b":")[2].decode() for line in head.split(b"\r\n") if line.lower().startswith(b"x-huawei-callback-id"))
    signatures = Signatures()
    assert signatures.verify(header, [ReceiptKey("bank", "another"), RECEIPT_KEY], Reading.of(clock)) == RECEIPT_KEY
    with pytest.raises(BadSignature, match="seen"):
        signatures.verify(header, [RECEIPT_KEY], Reading.of(clock))
    assert parse_receipts(body) == [Receipt(wake_up.wake_up_id, 0, "delivered", APP)]
