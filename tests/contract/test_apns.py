"""The provider and the simulator of APNs over real HTTP/2 and TLS; an independent client keeps the simulator honest."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aioapns
import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from google.protobuf.duration_pb2 import Duration
from pyreqwest.client import Client, ClientBuilder

from sealpushd.dispatch.providers.apns import ERRORS, ApnsProvider, ApnsSettings
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
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.simulators import core as simulated
from sealpushd.simulators.server import ProviderKey, RunningSimulators, SimulatedApns, SimulatorSettings, serve_simulators, simulators
from sealpushd.v1 import simulator_pb2 as pb
from sealpushd.v1.simulator_pb2_grpc import SimulatedPushStub, SimulatedSmsStub
from tests.clocks import FakeClock
from tests.contract.harness import LIMIT_S
from tests.contract.push_simulators import connect_proxy

TEAM, KEY, TOPIC = "TEAM123456", "KEY1234567", "ua.bank.app"
APNS = pb.SIMULATED_PUSH_SERVICE_APNS


@dataclass(frozen=True)
class Keys:
    """A throw-away CA with a certificate for localhost, another CA, and a provider's signing key."""

    ca: Path
    other_ca: Path
    certificate: Path
    private_key: Path
    provider: ec.EllipticCurvePrivateKey

    @property
    def provider_pem(self) -> bytes:
        return _private_pem(self.provider)

    @property
    def provider_public_pem(self) -> bytes:
        return self.provider.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _private_pem(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, is_ca: bool) -> bytes:
    now = datetime.now(UTC)
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if not is_ca:
        server_auth = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        builder = builder.add_extension(server_auth, critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("tls")
    ca_key, other_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    files = {
        "ca.pem": _certificate("test CA", ca_key, "test CA", ca_key, is_ca=True),
        "other.pem": _certificate("test CA", other_key, "test CA", other_key, is_ca=True),
        "cert.pem": _certificate("localhost", key, "test CA", ca_key, is_ca=False),
        "key.pem": _private_pem(key),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Keys(
        ca=folder / "ca.pem",
        other_ca=folder / "other.pem",
        certificate=folder / "cert.pem",
        private_key=folder / "key.pem",
        provider=ec.generate_private_key(ec.SECP256R1()),
    )


@pytest.fixture
def clock() -> FakeClock:
    # Whole seconds: certificates are checked against the machine's clock, tokens against this one.
    return FakeClock(datetime.now(UTC).replace(microsecond=0))


@pytest.fixture
async def running(keys: Keys, clock: FakeClock) -> AsyncIterator[RunningSimulators]:
    apns = SimulatedApns(provider_keys=[ProviderKey(TEAM, KEY, keys.provider_public_pem)], limit_token_updates=True)
    settings = SimulatorSettings(keys.certificate, keys.private_key, apns=apns)
    async with simulators(settings, now=clock.now) as running:
        yield running


@pytest.fixture
def apns_settings(keys: Keys, running: RunningSimulators) -> ApnsSettings:
    return ApnsSettings(
        key_id=KEY,
        team_id=TEAM,
        private_key_pem=keys.provider_pem,
        production_url=f"https://localhost:{running.apns_port}",
        sandbox_url=f"https://127.0.0.1:{running.apns_port}",
        http=HttpSettings(private_ca_file=keys.ca, total_timeout=timedelta(seconds=5)),
    )


def with_http(settings: ApnsSettings, **changes: Any) -> ApnsSettings:
    return replace(settings, http=replace(settings.http, **changes))


@pytest.fixture
async def provider(apns_settings: ApnsSettings, clock: FakeClock) -> AsyncIterator[ApnsProvider]:
    provider = ApnsProvider(apns_settings, clock)
    yield provider
    await provider.aclose()


@pytest.fixture
def target(running: RunningSimulators, clock: FakeClock) -> PushTarget:
    token = PushToken(running.apns.create_device(TOPIC))
    return PushTarget(token, PushEnvironment.PRODUCTION, TOPIC, clock.now() - timedelta(days=1))


def new_wake_up(clock: FakeClock, *, muted: bool = False) -> WakeUp:
    expires_at = clock.now() + timedelta(hours=1)
    return WakeUp(uuid.uuid4().bytes, muted=muted, priority=WakeUpPriority.HIGH, expires_at=expires_at)


async def arrived(running: RunningSimulators, requests: int) -> None:
    """Returns when the simulator has received so many requests."""
    while running.apns.counters.requests < requests:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)


# The provider


async def test_the_client_has_the_shape_of_every_provider(provider: ApnsProvider) -> None:
    shape: Provider = provider
    assert shape.name == "apns"


@pytest.mark.parametrize("muted", [False, True])
async def test_wake_up_reaches_the_phone_with_aps_and_id_alone(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock, muted: bool
) -> None:
    line = running.apns.connect()
    assert line.online([target.token.reveal()]) == []
    wake_up = new_wake_up(clock, muted=muted)
    assert await provider.send(target, wake_up) == Accepted()
    [notification] = await line.next_batch()
    payload = json.loads(notification.payload)
    assert payload.keys() == {"aps", "id"}
    assert payload["id"] == wake_up.wire_id
    assert ("alert" in payload["aps"]) is not muted
    assert notification.headers["apns-push-type"] == ("background" if muted else "alert")
    assert notification.headers["apns-priority"] == ("5" if muted else "10")


async def test_nothing_but_protocol_fields_and_the_id_ever_reaches_apns(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    wake_up = new_wake_up(clock)
    await provider.send(target, wake_up)
    [received] = running.apns.received
    headers = dict(received.request.headers)
    assert headers.pop("authorization", None)
    assert headers == {
        "apns-id": str(wake_up.request_uuid),
        "apns-expiration": str(int(wake_up.expires_at.timestamp())),
        "apns-topic": TOPIC,
        "apns-push-type": "alert",
        "apns-priority": "10",
        "apns-collapse-id": wake_up.wire_id,
        "content-type": "application/json",
        "content-length": str(len(received.request.body)),
        "accept": "*/*",
        "user-agent": "sealpush",
    }
    assert received.request.path == f"/3/device/{target.token.reveal()}"


WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
# Every row of the table and the outcome that PNS.md asks for; "*" is played with a reason Apple may add one day.
ROWS: dict[tuple[int, str], Outcome] = {
    (400, "BadDeviceToken"): TokenSuspect("BadDeviceToken"),
    (400, "DeviceTokenNotForTopic"): TokenSuspect("DeviceTokenNotForTopic"),
    (400, "BadTopic"): Misconfigured("BadTopic"),
    (400, "MissingTopic"): Misconfigured("MissingTopic"),
    (400, "TopicDisallowed"): Misconfigured("TopicDisallowed"),
    (400, "IdleTimeout"): RetryAt("IdleTimeout", timedelta(seconds=7)),
    (400, "*"): Bug("New"),
    (403, "ExpiredProviderToken"): RefreshAuth("ExpiredProviderToken"),
    (403, "*"): Misconfigured("New"),
    (404, "*"): Bug("New"),
    (405, "*"): Bug("New"),
    (410, "Unregistered"): TokenGone("Unregistered", at=WHEN),
    (410, "ExpiredToken"): TokenGone("ExpiredToken", at=WHEN),
    (410, "*"): TokenSuspect("New"),
    (413, "*"): Bug("New"),
    (429, "TooManyProviderTokenUpdates"): RetryAt("TooManyProviderTokenUpdates", timedelta(minutes=5)),
    (429, "TooManyRequests"): RetryAt("TooManyRequests", timedelta(seconds=7), of_device=True),
    (429, "*"): RetryAt("New", timedelta(seconds=7)),
    (500, "*"): RetryAt("New", timedelta(seconds=7)),
    (503, "*"): RetryAt("New", timedelta(seconds=7)),
}


def test_every_row_of_the_error_table_is_played() -> None:
    assert ROWS.keys() == ERRORS.keys()


@pytest.mark.parametrize(("row", "outcome"), ROWS.items(), ids=lambda value: str(value)[:60])
async def test_error_table(
    running: RunningSimulators,
    provider: ApnsProvider,
    target: PushTarget,
    clock: FakeClock,
    row: tuple[int, str],
    outcome: Outcome,
) -> None:
    status, reason = row
    answer = simulated.Answer(status, reason.replace("*", "New"), retry_after=timedelta(seconds=7), timestamp=WHEN)
    running.apns.set_fault(answer, duration=timedelta(hours=1))
    target = replace(target, registered_at=WHEN - timedelta(days=1))
    assert await provider.send(target, new_wake_up(clock)) == outcome
    running.apns.clear_faults()
    assert await provider.send(target, new_wake_up(clock)) == Accepted(), "the provider is usable afterwards"


async def test_uninstalled_app_is_gone_but_not_if_it_registered_again(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.apns.uninstall(target.token.reveal())
    outcome = await provider.send(target, new_wake_up(clock))
    assert outcome == TokenGone("Unregistered", at=clock.now())
    registered_again = replace(target, registered_at=clock.now() + timedelta(minutes=1))
    assert await provider.send(registered_again, new_wake_up(clock)) == RetryAt("gone-before-registration", of_device=True)


async def test_token_of_the_other_environment_is_suspect_not_gone(
    keys: Keys, provider: ApnsProvider, apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock
) -> None:
    apns = SimulatedApns(provider_keys=[ProviderKey(TEAM, KEY, keys.provider_public_pem)])
    settings = SimulatorSettings(keys.certificate, keys.private_key, apns=apns)
    async with simulators(settings, now=clock.now) as sandbox:
        other = ApnsProvider(replace(apns_settings, sandbox_url=f"https://127.0.0.1:{sandbox.apns_port}"), clock)
        sandboxed = replace(target, environment=PushEnvironment.SANDBOX)
        assert await other.send(sandboxed, new_wake_up(clock)) == TokenSuspect("BadDeviceToken")
        await other.aclose()
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


async def test_environment_selects_the_host(
    running: RunningSimulators, apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock
) -> None:
    provider = ApnsProvider(replace(apns_settings, production_url="https://nowhere.invalid"), clock)
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("network-dns")
    sandboxed = replace(target, environment=PushEnvironment.SANDBOX)
    assert await provider.send(sandboxed, new_wake_up(clock)) == Accepted()
    await provider.aclose()


async def test_malformed_token_or_topic_never_reaches_apns(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    sneaky = replace(target, token=PushToken("../../other?x=1"))
    assert await provider.send(sneaky, new_wake_up(clock)) == TokenSuspect("malformed-token")
    assert await provider.send(replace(target, topic="a\nb"), new_wake_up(clock)) == Bug("malformed-request")
    assert not running.apns.received


async def test_black_hole_is_a_retry_within_the_deadline_and_harms_nobody_else(
    running: RunningSimulators, apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock
) -> None:
    provider = ApnsProvider(with_http(apns_settings, total_timeout=timedelta(seconds=1.5)), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.apns.set_fault(simulated.BlackHole(), requests=1)
    lost = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    await asyncio.sleep(0)
    other = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    assert sorted(map(str, await asyncio.gather(lost, other))) == sorted(map(str, [RetryAt("timeout"), Accepted()]))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    await provider.aclose()


async def test_slow_answer_within_the_deadline_is_accepted(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.apns.set_fault(simulated.Delay(timedelta(milliseconds=20)), requests=1)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


async def test_goaway_is_survived(running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.apns.set_fault(simulated.GoAway("Shutdown"), requests=1)
    wake_up = new_wake_up(clock)
    outcome = await provider.send(target, wake_up)
    # The HTTP client may repeat by itself what GOAWAY says was not processed.
    assert isinstance(outcome, Accepted | RetryAt)
    assert await provider.send(target, wake_up) == Accepted()
    assert running.apns.counters.connections == 2


async def test_goaway_under_load_loses_nothing_and_repeats_little(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    wake_ups = [new_wake_up(clock) for _ in range(100)]
    running.apns.set_fault(simulated.Delay(timedelta(0)), requests=20)
    running.apns.set_fault(simulated.GoAway("Shutdown"), requests=1)
    outcomes = await asyncio.gather(*(provider.send(target, wake_up) for wake_up in wake_ups))
    for wake_up, outcome in zip(wake_ups, outcomes, strict=True):
        assert isinstance(outcome, Accepted | RetryAt)
        assert outcome == Accepted() or await provider.send(target, wake_up) == Accepted()
    assert running.apns.counters.connections <= 4
    assert running.apns.counters.requests <= 210


async def test_lost_answer_is_a_retry_and_repeats_the_same_apns_id(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.apns.set_fault(simulated.LostAnswer(), requests=1)
    wake_up = new_wake_up(clock)
    assert isinstance(await provider.send(target, wake_up), RetryAt)
    assert len(running.apns.received) == 2, "what may have been processed is repeated by the dispatcher only"
    assert await provider.send(target, wake_up) == Accepted()
    ids = [received.request.header("apns-id") for received in running.apns.received][1:]
    assert ids == [str(wake_up.request_uuid)] * 2


GARBAGE = {
    "html": simulated.Answer(403, raw_body=b"<html>blocked by the company's proxy</html>"),
    "html success": simulated.Answer(302, raw_body=b"<html>log in first</html>"),
    "empty": simulated.Answer(400, raw_body=b""),
    "array": simulated.Answer(410, raw_body=b'["Unregistered"]'),
    "huge": simulated.Answer(410, raw_body=b'{"reason":"Unregistered","x":"' + b"x" * 4_000_000 + b'"}'),
    "truncated": simulated.Answer(410, raw_body=b'{"reason":"Unregistered"}', truncated=True),
    "not utf-8": simulated.Answer(400, raw_body=b'{"reason":"\xff\xfe"}'),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=list(GARBAGE))
async def test_garbage_does_no_harm(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock, answer: simulated.Answer
) -> None:
    running.apns.set_fault(answer, requests=1)
    assert isinstance(await provider.send(target, new_wake_up(clock)), RetryAt)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


async def test_redirect_is_not_followed(running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock) -> None:
    running.apns.set_fault(simulated.Answer(307, raw_body=b"elsewhere"), requests=1)
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("status-307")
    assert len(running.apns.received) == 1


async def test_certificate_of_another_ca_is_refused(
    running: RunningSimulators, apns_settings: ApnsSettings, keys: Keys, target: PushTarget, clock: FakeClock
) -> None:
    provider = ApnsProvider(with_http(apns_settings, private_ca_file=keys.other_ca), clock)
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("network-certificate")
    assert not running.apns.received
    await provider.aclose()


async def test_nobody_listening_and_a_dead_proxy_are_retries_that_say_so(
    apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock, unused_tcp_port: int
) -> None:
    for settings, reason in (
        (replace(apns_settings, production_url=f"https://localhost:{unused_tcp_port}"), "network-refused"),
        (with_http(apns_settings, proxy_url=f"http://127.0.0.1:{unused_tcp_port}"), "network-proxy"),
    ):
        provider = ApnsProvider(settings, clock)
        assert await provider.send(target, new_wake_up(clock)) == RetryAt(reason)
        await provider.aclose()


async def test_proxy_that_refuses_is_told_from_one_that_is_dead(apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock) -> None:
    async with connect_proxy({}) as proxy:
        provider = ApnsProvider(with_http(apns_settings, proxy_url=proxy), clock)
        assert await provider.send(target, new_wake_up(clock)) == RetryAt("network-proxy")
        await provider.aclose()


async def test_connect_proxy_is_used(running: RunningSimulators, apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock) -> None:
    asked: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", running.apns_port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    provider = ApnsProvider(with_http(apns_settings, proxy_url=f"http://127.0.0.1:{port}"), clock)
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    assert asked[0].startswith(f"CONNECT localhost:{running.apns_port} ".encode())
    await provider.aclose()
    proxy.close()


async def test_one_connection_and_one_provider_token_serve_many_sends(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(200)))
    assert set(outcomes) == {Accepted()}
    counters = running.apns.counters
    assert (counters.connections, counters.provider_tokens, counters.early_streams) == (1, 1, 0)
    clock.advance(timedelta(minutes=44))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    assert counters.provider_tokens == 1
    clock.advance(timedelta(minutes=1))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    assert counters.provider_tokens == 2


async def test_first_send_of_a_new_connection_goes_alone(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    for _ in range(3):
        running.apns.set_fault(simulated.LostAnswer(), requests=1)
        await provider.send(target, new_wake_up(clock))
        outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(50)))
        assert set(outcomes) == {Accepted()}
    assert running.apns.counters.early_streams == 0


async def test_expired_provider_token_is_renewed_once_and_the_sends_succeed(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    clock.advance(timedelta(minutes=21))
    running.apns.set_fault(simulated.ExpiredProviderToken(), requests=20)
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(20)))
    assert set(outcomes) == {Accepted()}
    assert running.apns.counters.provider_tokens == 2


async def test_provider_token_expired_for_ever_is_not_renewed_in_a_storm(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.apns.set_fault(simulated.ExpiredProviderToken(), duration=timedelta(hours=1))
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(20)))
    assert set(outcomes) == {RefreshAuth("ExpiredProviderToken")}
    assert running.apns.counters.provider_tokens == 2
    assert running.apns.counters.requests <= 40


async def test_wrong_key_is_a_misconfiguration(apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock) -> None:
    stranger = _private_pem(ec.generate_private_key(ec.SECP256R1()))
    provider = ApnsProvider(replace(apns_settings, private_key_pem=stranger), clock)
    assert await provider.send(target, new_wake_up(clock)) == Misconfigured("InvalidProviderToken")
    await provider.aclose()


@pytest.mark.parametrize(
    ("off", "outcome"),
    [
        (timedelta(hours=1), Misconfigured("InvalidProviderToken")),
        (timedelta(hours=-2), RefreshAuth("ExpiredProviderToken")),
    ],
    ids=["ahead", "behind"],
)
async def test_clock_that_is_wrong_by_hours_stops_the_lane_and_the_advice_names_the_clock(
    apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock, off: timedelta, outcome: Outcome
) -> None:
    """Apple sends no Date, so that the clock cannot be told from the key with certainty."""
    wrong = FakeClock(clock.now() + off)
    provider = ApnsProvider(apns_settings, wrong)
    assert await provider.send(target, new_wake_up(wrong)) == outcome
    assert "clock" in provider.advise(outcome.reason)
    await provider.aclose()


async def test_key_that_is_revoked_in_the_middle_of_a_run_is_a_misconfiguration(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.apns.revoke_credential(KEY)
    outcomes = await asyncio.gather(*(provider.send(target, new_wake_up(clock)) for _ in range(20)))
    assert set(outcomes) == {Misconfigured("InvalidProviderToken")}
    assert "sealpush providers rotate" in provider.advise("InvalidProviderToken")


async def test_probe_asks_both_environments_and_wakes_nobody(
    running: RunningSimulators, apns_settings: ApnsSettings, clock: FakeClock
) -> None:
    apns_settings = replace(apns_settings, topic=TOPIC)
    for settings, verdicts in (
        (apns_settings, [True, True]),
        (replace(apns_settings, key_id="OTHER", sandbox_url="https://nowhere.invalid"), [False, None]),
    ):
        provider = ApnsProvider(settings, clock)
        probes = await provider.probe()
        assert [probed.what for probed in probes] == ["production", "sandbox"]
        assert [probed.is_good for probed in probes] == verdicts
        await provider.aclose()
    assert running.apns.counters.delivered == running.apns.counters.accepted == 0


async def test_cancellation_passes_and_leaves_the_provider_usable(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    running.apns.set_fault(simulated.BlackHole(), requests=1)
    send = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    await arrived(running, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await send
    assert send.cancelled()
    assert await provider.send(target, new_wake_up(clock)) == Accepted()


async def test_closing_ends_sends_as_retries(
    running: RunningSimulators, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    running.apns.set_fault(simulated.BlackHole(), requests=1)
    send = asyncio.create_task(provider.send(target, new_wake_up(clock)))
    await arrived(running, 2)
    await provider.aclose()
    assert isinstance(await send, RetryAt)
    assert isinstance(await provider.send(target, new_wake_up(clock)), RetryAt)
    await provider.aclose()


# The simulator


async def test_an_independent_client_delivers(running: RunningSimulators, keys: Keys, clock: FakeClock) -> None:
    client = aioapns.APNs(
        key=keys.provider_pem.decode(),
        key_id=KEY,
        team_id=TEAM,
        topic=TOPIC,
        ssl_context=_alpn_context(keys),
        max_connections=1,
    )
    _point_at(client, running)
    line = running.apns.connect()
    token = running.apns.create_device(TOPIC)
    line.online([token])
    alert = aioapns.NotificationRequest(token, {"aps": {"alert": "hello"}}, push_type=aioapns.PushType.ALERT, priority=10, time_to_live=60)
    result = await client.send_notification(alert)
    assert (result.status, result.notification_id) == ("200", alert.notification_id)
    [notification] = await line.next_batch()
    assert json.loads(notification.payload) == {"aps": {"alert": "hello"}}
    running.apns.uninstall(token)
    client.err_func = _ignore
    gone = await client.send_notification(aioapns.NotificationRequest(token, {"aps": {"alert": "hello"}}, push_type=aioapns.PushType.ALERT))
    assert (gone.status, gone.description) == ("410", "Unregistered")
    assert gone.timestamp == int(clock.now().timestamp() * 1000)
    client.pool.close()


async def _ignore(request: aioapns.NotificationRequest, result: aioapns.common.NotificationResult) -> None:
    """aioapns logs errors unless it has somebody to tell."""


def _alpn_context(keys: Keys) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(keys.ca))
    context.set_alpn_protocols(["h2"])
    return context


def _point_at(client: aioapns.APNs, running: RunningSimulators) -> None:
    """aioapns takes host and port from its protocol class."""
    base = client.pool.protocol_class
    client.pool.protocol_class = type("Local", (base,), {"APNS_SERVER": "localhost", "APNS_PORT": running.apns_port})


@dataclass
class RawClient:
    """Sends whatever it is told to."""

    client: Client
    base_url: str
    bearer: str
    token: str

    async def post(self, payload: Any = None, *, path: str | None = None, method: str = "POST", **changes: str | None) -> tuple[int, str]:
        """Status and reason of a good alert with some headers changed (`_` for `-`) or, as None, left out."""
        headers = {
            "authorization": f"bearer {self.bearer}",
            "apns-topic": TOPIC,
            "apns-push-type": "alert",
        }
        for name, value in changes.items():
            headers.pop(name.replace("_", "-"), None)
            if value is not None:
                headers[name.replace("_", "-")] = value
        body = payload if isinstance(payload, bytes) else json.dumps(payload or {"aps": {"alert": "x"}}).encode()
        url = self.base_url + (f"/3/device/{self.token}" if path is None else path)
        response = await self.client.request(method, url).headers(headers).body_bytes(body).build().send()
        assert uuid.UUID(response.get_header("apns-id"))
        content = await response.text()
        return response.status, json.loads(content)["reason"] if content else ""


@pytest.fixture
async def raw(running: RunningSimulators, keys: Keys, clock: FakeClock) -> AsyncIterator[RawClient]:
    builder = ClientBuilder().http2_prior_knowledge().no_proxy().timeout(timedelta(seconds=5))
    async with builder.add_root_certificate_pem(keys.ca.read_bytes()).build() as client:
        base_url = f"https://localhost:{running.apns_port}"
        yield RawClient(client, base_url, make_bearer(keys, clock), running.apns.create_device(TOPIC))


def make_bearer(keys: Keys, clock: FakeClock, *, kid: str = KEY, **claims: Any) -> str:
    claims = {"iss": TEAM, "iat": int(clock.now().timestamp())} | claims
    return jwt.encode(claims, keys.provider, algorithm="ES256", headers={"kid": kid})


BAD_REQUESTS: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "path": ({"path": "/3/devices/ab"}, (404, "BadPath")),
    "method": ({"method": "PUT"}, (405, "MethodNotAllowed")),
    "no token": ({"path": "/3/device/"}, (400, "MissingDeviceToken")),
    "odd token": ({"path": "/3/device/xyz"}, (400, "BadDeviceToken")),
    "unknown token": ({"path": "/3/device/" + "ab" * 32}, (400, "BadDeviceToken")),
    "no authorization": ({"authorization": None}, (403, "MissingProviderToken")),
    "no bearer": ({"authorization": "basic abc"}, (403, "InvalidProviderToken")),
    "no jwt": ({"authorization": "bearer abc"}, (403, "InvalidProviderToken")),
    "no topic": ({"apns_topic": None}, (400, "MissingTopic")),
    "bad topic": ({"apns_topic": "a b"}, (400, "BadTopic")),
    "other topic": ({"apns_topic": "ua.other.app"}, (400, "DeviceTokenNotForTopic")),
    "no push type": ({"apns_push_type": None}, (400, "InvalidPushType")),
    "bad push type": ({"apns_push_type": "loud"}, (400, "InvalidPushType")),
    "bad id": ({"apns_id": "1"}, (400, "BadMessageId")),
    "bad priority": ({"apns_priority": "7"}, (400, "BadPriority")),
    "bad expiration": ({"apns_expiration": "soon"}, (400, "BadExpirationDate")),
    "distant expiration": ({"apns_expiration": "99999999999"}, (400, "BadExpirationDate")),
    "long collapse id": ({"apns_collapse_id": "x" * 65}, (400, "BadCollapseId")),
    "empty": ({"payload": b""}, (400, "PayloadEmpty")),
    "too large": ({"payload": {"aps": {"alert": "x" * 4096}}}, (413, "PayloadTooLarge")),
    "much too large": ({"payload": b"x" * 200_000}, (413, "PayloadTooLarge")),
    "no json": ({"payload": b"{"}, (400, "BadPayload")),
    "no object": ({"payload": [1]}, (400, "BadPayload")),
    "no aps": ({"payload": {"id": "x"}}, (400, "BadPayload")),
    "alert without alert": ({"payload": {"aps": {"content-available": 1}}}, (400, "InvalidPushType")),
    "loud background": (
        {"payload": {"aps": {"content-available": 1}}, "apns_push_type": "background"},
        (400, "BadPriority"),
    ),
    "background with alert": (
        {"payload": {"aps": {"content-available": 1, "alert": "x"}}, "apns_push_type": "background", "apns_priority": "5"},
        (400, "InvalidPushType"),
    ),
}


@pytest.mark.parametrize(("request_parts", "answer"), BAD_REQUESTS.values(), ids=list(BAD_REQUESTS))
async def test_simulator_refuses_what_apple_refuses(raw: RawClient, request_parts: dict[str, Any], answer: tuple[int, str]) -> None:
    assert await raw.post(**request_parts) == answer
    assert await raw.post() == (200, "")


BAD_BEARERS: dict[str, tuple[Callable[[Keys, FakeClock], str], str]] = {
    "unknown key": (lambda keys, clock: make_bearer(keys, clock, kid="OTHER"), "InvalidProviderToken"),
    "other team": (lambda keys, clock: make_bearer(keys, clock, iss="OTHER"), "InvalidProviderToken"),
    "no time": (lambda keys, clock: make_bearer(keys, clock, iat="now"), "InvalidProviderToken"),
    "future": (
        lambda keys, clock: make_bearer(keys, clock, iat=int(clock.now().timestamp()) + 3600),
        "InvalidProviderToken",
    ),
    "old": (
        lambda keys, clock: make_bearer(keys, clock, iat=int(clock.now().timestamp()) - 3601),
        "ExpiredProviderToken",
    ),
    "unsigned": (
        lambda keys, clock: jwt.encode({"iss": TEAM, "iat": 1}, "", algorithm="none", headers={"kid": KEY}),
        "InvalidProviderToken",
    ),
    "other signature": (
        lambda keys, clock: make_bearer(replace(keys, provider=ec.generate_private_key(ec.SECP256R1())), clock),
        "InvalidProviderToken",
    ),
}


@pytest.mark.parametrize(("bearer", "reason"), BAD_BEARERS.values(), ids=list(BAD_BEARERS))
async def test_simulator_refuses_bad_provider_tokens(
    raw: RawClient, keys: Keys, clock: FakeClock, bearer: Callable[[Keys, FakeClock], str], reason: str
) -> None:
    assert await raw.post(authorization=f"bearer {bearer(keys, clock)}") == (403, reason)


async def test_provider_tokens_may_change_every_20_minutes_only(raw: RawClient, keys: Keys, clock: FakeClock) -> None:
    assert await raw.post() == (200, "")
    clock.advance(timedelta(minutes=19))
    second = f"bearer {make_bearer(keys, clock)}"
    assert await raw.post(authorization=second) == (429, "TooManyProviderTokenUpdates")
    clock.advance(timedelta(minutes=1))
    assert await raw.post(authorization=second) == (200, "")
    clock.advance(timedelta(minutes=60))
    assert await raw.post(authorization=second) == (403, "ExpiredProviderToken")


async def test_a_connection_is_one_keys(running: RunningSimulators, raw: RawClient, keys: Keys, clock: FakeClock) -> None:
    running.apns.register_provider_key(TEAM, "OTHER", keys.provider_public_pem)
    other = f"bearer {make_bearer(keys, clock, kid='OTHER')}"
    assert await raw.post() == (200, "")
    assert await raw.post(authorization=other) == (403, "UnrelatedKeyIdInToken")
    assert await raw.post() == (200, "")
    async with ClientBuilder().http2_prior_knowledge().no_proxy().add_root_certificate_pem(keys.ca.read_bytes()).build() as client:
        assert await replace(raw, client=client).post(authorization=other) == (200, "")


async def test_calls_over_ip_may_be_longer(raw: RawClient) -> None:
    payload = {"aps": {}, "call": "x" * 5_000}
    assert await raw.post(payload, apns_push_type="voip") == (200, "")
    assert await raw.post(payload) == (413, "PayloadTooLarge")
    assert await raw.post({"aps": {}, "call": "x" * 5_120}, apns_push_type="voip") == (413, "PayloadTooLarge")


async def test_the_first_settings_allow_one_stream(running: RunningSimulators, keys: Keys) -> None:
    reader, writer = await asyncio.open_connection("localhost", running.apns_port, ssl=_alpn_context(keys))
    length, kind = int.from_bytes(await reader.readexactly(3)), (await reader.readexactly(1))[0]
    await reader.readexactly(5)
    frame = await reader.readexactly(length)
    settings = {int.from_bytes(frame[at : at + 2]): int.from_bytes(frame[at + 2 : at + 6]) for at in range(0, length, 6)}
    assert kind == 4
    assert settings[3] == 1
    writer.close()
    await writer.wait_closed()


async def test_streams_before_the_first_valid_token_are_refused(running: RunningSimulators, keys: Keys, raw: RawClient) -> None:
    """A client that opens five streams before it has seen our SETTINGS gets four of them refused."""
    from h2.connection import H2Connection
    from h2.events import StreamEnded, StreamReset

    reader, writer = await asyncio.open_connection("localhost", running.apns_port, ssl=_alpn_context(keys))
    connection = H2Connection()
    connection.initiate_connection()
    headers = [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", f"/3/device/{raw.token}"),
        ("authorization", f"bearer {raw.bearer}"),
        ("apns-topic", TOPIC),
        ("apns-push-type", "alert"),
    ]
    for stream_id in (1, 3, 5, 7, 9):
        connection.send_headers(stream_id, headers)
    for stream_id in (1, 3, 5, 7, 9):
        connection.send_data(stream_id, b'{"aps":{"alert":"x"}}', end_stream=True)
    writer.write(connection.data_to_send())
    ended: set[int] = set()
    refused: set[int] = set()
    while len(ended) + len(refused) < 5:
        for event in connection.receive_data(await reader.read(65536)):
            if isinstance(event, StreamEnded):
                ended.add(event.stream_id)
            if isinstance(event, StreamReset):
                refused.add(event.stream_id)
        writer.write(connection.data_to_send())
    assert (ended, refused) == ({1}, {3, 5, 7, 9})
    assert connection.remote_settings.max_concurrent_streams == 1000
    assert running.apns.counters.early_streams == 4
    writer.close()
    await writer.wait_closed()


async def test_offline_phone_keeps_only_the_newest_and_nothing_that_expired(
    running: RunningSimulators, raw: RawClient, clock: FakeClock
) -> None:
    for number in range(3):
        await raw.post({"aps": {"alert": "x"}, "n": number})
    await raw.post({"aps": {"alert": "x"}, "n": "not stored"}, apns_expiration="0")
    line = running.apns.connect()
    line.online([raw.token])
    assert [json.loads(one.payload)["n"] for one in await line.next_batch()] == [2]
    line.close()
    assert await line.next_batch() == []
    await raw.post(apns_expiration=str(int(clock.now().timestamp()) + 60))
    clock.advance(timedelta(seconds=61))
    again = running.apns.connect()
    again.online([raw.token])
    await raw.post({"aps": {"alert": "x"}, "n": "live"}, apns_expiration="0")
    assert [json.loads(one.payload).get("n") for one in await again.next_batch()] == ["live"]
    assert (running.apns.counters.delivered, running.apns.counters.dropped) == (2, 4)


async def test_simulator_keeps_no_bearer_token(running: RunningSimulators, raw: RawClient) -> None:
    await raw.post()
    assert raw.bearer not in repr(running.apns.received)


# The control listener


@pytest.fixture
async def channel(running: RunningSimulators) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.control_port}") as channel:
        yield channel


async def test_phones_of_one_stream_get_their_notifications(
    channel: grpc.aio.Channel, running: RunningSimulators, provider: ApnsProvider, clock: FakeClock
) -> None:
    stub = SimulatedPushStub(channel)
    tokens = [(await stub.CreateDevice(pb.CreateDeviceRequest(push_service=APNS, topic=TOPIC))).device_token for _ in range(3)]
    stream = stub.Connect()
    await stream.write(pb.ConnectRequest(push_service=APNS, online_device_tokens=[*tokens, "ab" * 32]))
    presence = (await anext(aiter(stream))).presence
    assert presence == pb.SimulatedPresence(online=3, unknown_device_tokens=["ab" * 32])
    wake_ups = {token: new_wake_up(clock) for token in tokens}
    for token, wake_up in wake_ups.items():
        target = PushTarget(PushToken(token), PushEnvironment.PRODUCTION, TOPIC, clock.now())
        assert await provider.send(target, wake_up) == Accepted()
    seen: dict[str, str] = {}
    async for response in stream:
        for notification in response.batch.notifications:
            assert notification.headers["apns-topic"] == TOPIC
            seen[notification.device_token] = json.loads(notification.payload)["id"]
        if len(seen) == 3:
            break
    assert seen == {token: wake_up.wire_id for token, wake_up in wake_ups.items()}
    await stream.done_writing()
    assert [response async for response in stream] == []
    received = await stub.ListReceived(pb.ListReceivedRequest(push_service=APNS, page_size=2))
    assert len(received.requests) == 2
    rest = await stub.ListReceived(pb.ListReceivedRequest(push_service=APNS, page_token=received.next_page_token))
    assert [one.status for one in rest.requests] == [200]
    assert rest.next_page_token == ""
    counters = await stub.Counters(pb.CountersRequest(push_service=APNS))
    assert (counters.accepted, counters.delivered, counters.connections) == (3, 3, 1)


async def test_faults_are_scripted_over_the_wire(
    channel: grpc.aio.Channel, provider: ApnsProvider, target: PushTarget, clock: FakeClock
) -> None:
    stub = SimulatedPushStub(channel)
    busy = pb.SimulatedFault(answer=pb.SimulatedAnswer(status=503, reason="Shutdown", retry_after=Duration(seconds=9)))
    await stub.SetFault(pb.SetFaultRequest(push_service=APNS, fault=busy, next_requests=1))
    assert await provider.send(target, new_wake_up(clock)) == RetryAt("Shutdown", timedelta(seconds=9))
    await stub.SetFault(pb.SetFaultRequest(push_service=APNS, fault=busy, duration=Duration(seconds=60)))
    await stub.ClearFaults(pb.ClearFaultsRequest(push_service=APNS))
    assert await provider.send(target, new_wake_up(clock)) == Accepted()
    dead = pb.SimulatedFault(dead_token=pb.SimulatedDeadToken())
    await stub.SetFault(pb.SetFaultRequest(push_service=APNS, fault=dead, next_requests=1, device_token=target.token.reveal()))
    assert isinstance(await provider.send(target, new_wake_up(clock)), TokenGone)
    for bad in (
        pb.SetFaultRequest(push_service=APNS, fault=busy),
        pb.SetFaultRequest(push_service=APNS, next_requests=1),
        pb.SetFaultRequest(push_service=APNS, fault=pb.SimulatedFault(answer=pb.SimulatedAnswer(status=42)), next_requests=1),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.SetFault(bad)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.UninstallApp(pb.UninstallAppRequest(push_service=APNS, device_token="ab"))
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_provider_key_is_registered_over_the_wire(
    channel: grpc.aio.Channel, keys: Keys, apns_settings: ApnsSettings, target: PushTarget, clock: FakeClock
) -> None:
    stub = SimulatedPushStub(channel)
    public_pem = keys.provider_public_pem.decode()
    key = pb.SimulatedProviderKey(team_id=TEAM, key_id="SECOND", public_key_pem=public_pem, topics=["ua.other"])
    await stub.RegisterCredential(pb.RegisterCredentialRequest(push_service=APNS, apns_provider_key=key))
    provider = ApnsProvider(replace(apns_settings, key_id="SECOND"), clock)
    assert await provider.send(target, new_wake_up(clock)) == Misconfigured("TopicDisallowed")
    await provider.aclose()
    no_key = pb.SimulatedProviderKey(public_key_pem="no")
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.RegisterCredential(pb.RegisterCredentialRequest(push_service=APNS, apns_provider_key=no_key))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_sms_reach_the_inbox_and_its_watchers(channel: grpc.aio.Channel) -> None:
    stub = SimulatedSmsStub(channel)
    phone = "+380501234567"
    first = await stub.Deliver(pb.DeliverRequest(phone=phone, text="code 111111", sender_name="BANK"))
    watch = stub.WatchInbox(pb.WatchInboxRequest(phone=phone))
    watched = aiter(watch)
    assert (await anext(watched)).message.sms_id == first.sms_id
    second = await stub.Deliver(pb.DeliverRequest(phone=phone, text="code 222222"))
    assert (await anext(watched)).message.sms_id == second.sms_id
    watch.cancel()
    inbox = await stub.Inbox(pb.InboxRequest(phone=phone))
    assert [message.text for message in inbox.messages] == ["code 111111", "code 222222"]
    assert inbox.messages[0].sender_name == "BANK"
    for _ in range(120):
        await stub.Deliver(pb.DeliverRequest(phone=phone, text="more"))
    assert len((await stub.Inbox(pb.InboxRequest(phone=phone))).messages) == 100
    assert not (await stub.Inbox(pb.InboxRequest(phone="+380501234568"))).messages
    for bad in (pb.DeliverRequest(phone="0501234567", text="x"), pb.DeliverRequest(phone=phone, text="")):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Deliver(bad)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_server_reports_its_ports_and_stops_when_asked(keys: Keys) -> None:
    stop = asyncio.Event()
    ports: list[int] = []

    def ready(running: RunningSimulators) -> None:
        ports.extend((running.apns_port, running.control_port))
        stop.set()

    settings = SimulatorSettings(keys.certificate, keys.private_key, apns=SimulatedApns())
    async with asyncio.timeout(LIMIT_S):
        await serve_simulators(settings, stop=stop, ready=ready)
    assert all(port > 0 for port in ports)
    with pytest.raises(OSError, match=r"[Cc]onnect"):
        await asyncio.open_connection("127.0.0.1", ports[0])


async def test_taken_control_port_is_an_error(running: RunningSimulators, keys: Keys) -> None:
    settings = SimulatorSettings(keys.certificate, keys.private_key, control_port=running.control_port)
    with pytest.raises(OSError, match="is the port taken"):
        async with simulators(settings):
            pass
