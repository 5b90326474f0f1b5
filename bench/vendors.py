"""The three push services as a benchmark meets them: peers to push to, the product's provider for each, and a client without it.

The bare client is pyreqwest as the providers use it, on one connection, with requests that were prepared beforehand: what remains of a
send when nothing is made, signed, looked up, measured or understood.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

import grpc
from pyreqwest.client import Client, ClientBuilder

from bench.load import per_second
from bench.suite import Suite
from sealpushd.dispatch.makers import Config, PushServices, make
from sealpushd.dispatch.providers import apns, fcm, hms
from sealpushd.dispatch.providers.base import Provider, PushEnvironment, PushTarget, PushToken, WakeUp, WakeUpPriority
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.platform.clock import SystemClock
from sealpushd.up.vendors import APNS, APNS_KEY_ID, APNS_TEAM_ID, FCM, HMS, VENDORS, Vendor
from sealpushd.v1 import simulator_pb2, simulator_pb2_grpc

# Wake-ups in flight a lane, as the product has it by default.
IN_FLIGHT: Final = 256
LIFETIME: Final = timedelta(hours=1)
SERVICES: Final = {
    APNS.kind: simulator_pb2.SIMULATED_PUSH_SERVICE_APNS,
    FCM.kind: simulator_pb2.SIMULATED_PUSH_SERVICE_FCM,
    HMS.kind: simulator_pb2.SIMULATED_PUSH_SERVICE_HMS,
}
_START_TIMEOUT_S: Final = 30.0


# Peers


@dataclass(frozen=True, slots=True)
class Peer:
    """Something that takes pushes. `urls` by kind of vendor; `new_tokens` makes device tokens that it accepts."""

    name: str
    pid: int
    urls: Mapping[str, str]
    new_tokens: Callable[[Vendor, int], Awaitable[list[str]]]


async def simulated_tokens(simulators: grpc.aio.Channel, vendor: Vendor, count: int) -> list[str]:
    """So many new phones of the simulators, none of them online."""
    push = simulator_pb2_grpc.SimulatedPushStub(simulators)
    request = simulator_pb2.CreateDeviceRequest(push_service=SERVICES[vendor.kind], topic=vendor.topic)
    tokens: list[str] = []

    async def create(_: int) -> None:
        tokens.append((await push.CreateDevice(request)).device_token)

    await per_second(create, count, 64)
    return tokens


def peer_of(suite: Suite, simulators: grpc.aio.Channel) -> Peer:
    """The suite's own simulators."""
    pid = next(pid for pid, name in suite.processes().items() if name == "simulators")
    urls = {vendor.kind: f"https://localhost:{suite.endpoints.push_services[vendor.name].rpartition(':')[2]}" for vendor in VENDORS}
    return Peer("simulated push service", pid, urls, lambda vendor, count: simulated_tokens(simulators, vendor, count))


@asynccontextmanager
async def simulators(suite: Suite) -> AsyncIterator[Peer]:
    """Simulators beside the suite's, that trust the same credentials and send no receipts."""
    with tempfile.TemporaryFile("w+") as log:
        certificate, private_key = suite.secrets / "tls" / "simulators.pem", suite.secrets / "tls" / "simulators.key"
        push = suite.secrets / "push"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sealpushd", "simulate", "all", "--control-port", "0", "--apns-port", "0", "--fcm-port", "0"),
            *("--hms-port", "0", "--certificate", str(certificate), "--private-key", str(private_key)),
            *("--provider-key", f"{APNS_TEAM_ID}:{APNS_KEY_ID}:{push / 'apns.pem'}"),
            *("--service-account", str(push / FCM.file), "--client", str(push / HMS.file)),
            stdout=log,
            stderr=log,
        )
        async with _ending(process):
            ports = await _ports(process, lambda: os.pread(log.fileno(), 65_536, 0).decode())
            urls = {vendor.kind: f"https://localhost:{ports[f'{vendor.kind}_port']}" for vendor in VENDORS}
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['control_port']}") as channel:
                yield Peer("simulated push service", process.pid, urls, lambda vendor, n: simulated_tokens(channel, vendor, n))


@asynccontextmanager
async def minimal(suite: Suite) -> AsyncIterator[Peer]:
    """The push service that costs as little as possible."""
    certificate, private_key = suite.secrets / "tls" / "simulators.pem", suite.secrets / "tls" / "simulators.key"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.minimal", str(certificate), str(private_key)), stdout=asyncio.subprocess.PIPE
    )
    async with _ending(process):
        assert process.stdout is not None
        async with asyncio.timeout(_START_TIMEOUT_S):
            ports = json.loads(await process.stdout.readline())
        yield Peer("minimal push service", process.pid, {kind: f"https://localhost:{port}" for kind, port in ports.items()}, _any_tokens)


async def _any_tokens(vendor: Vendor, count: int) -> list[str]:
    """Tokens of the vendor's form."""
    if vendor is APNS:
        return [secrets.token_hex(32) for _ in range(count)]
    head = f"{secrets.token_urlsafe(16)}:APA91b" if vendor is FCM else ""
    return [f"{head}{secrets.token_urlsafe(98)[:130]}" for _ in range(count)]


@asynccontextmanager
async def _ending(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _ports(process: asyncio.subprocess.Process, log: Callable[[], str]) -> dict[str, int]:
    """The ports that a log tells once everything listens."""
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            found = {name: int(port) for name, port in re.findall(r'"?(\w+_port)"?\s*[:=]\s*"?(\d+)', log())}
            if "control_port" in found:
                return found
            if process.returncode is not None:
                raise RuntimeError(f"the simulators ended: {log()[-1000:]}")
            await asyncio.sleep(0.05)


# What the product sends with


def provider(suite: Suite, vendor: Vendor, peer: Peer) -> Provider:
    """The vendor's provider, made as dispatch makes it."""
    urls = peer.urls
    http = HttpSettings(private_ca_file=Path(suite.endpoints.ca), streams_max=IN_FLIGHT)
    services = PushServices(urls["apns"], urls["apns"], urls["fcm"], urls["hms"], f"{urls['hms']}/oauth2/v3/token", http)
    return make(Config(vendor.kind, vendor.settings, credential(suite, vendor, peer)), services, SystemClock())


def credential(suite: Suite, vendor: Vendor, peer: Peer) -> bytes:
    """The suite's own credential; a service account names the token endpoint that it asks: the peer's."""
    content = (suite.secrets / "push" / vendor.file).read_bytes()
    if vendor is not FCM:
        return content
    return json.dumps(json.loads(content) | {"token_uri": f"{peer.urls['fcm']}/token"}).encode()


def wake_ups(vendor: Vendor, tokens: Sequence[str], count: int) -> list[tuple[PushTarget, WakeUp]]:
    """So many for these devices in turn, as a dispatcher hands them to a provider."""
    now = datetime.now(UTC)
    targets = [PushTarget(PushToken(token), PushEnvironment.PRODUCTION, vendor.topic, now - LIFETIME) for token in tokens]
    return [
        (targets[n % len(targets)], WakeUp(os.urandom(16), muted=False, priority=WakeUpPriority.HIGH, expires_at=now + LIFETIME))
        for n in range(count)
    ]


# What the bare client sends


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready to go."""

    url: str
    headers: dict[str, str]
    body: bytes


class BareClient:
    """pyreqwest with one connection over TLS, HTTP/2 and nothing around it. `async with` opens and closes it."""

    def __init__(self, suite: Suite, vendor: Vendor, peer: Peer) -> None:
        self._vendor = vendor
        self._peer = peer
        self._secret = credential(suite, vendor, peer)
        authority = Path(suite.endpoints.ca).read_bytes()
        self._client: Client = ClientBuilder().http2_prior_knowledge().no_proxy().add_root_certificate_pem(authority).build()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def prepare(self, given: Sequence[tuple[PushTarget, WakeUp]]) -> list[Prepared]:
        """The requests of these wake-ups. It fetches the access token first, so the connection is there and alone."""
        base, now = self._peer.urls[self._vendor.kind], datetime.now(UTC)
        if self._vendor is APNS:
            values = self._vendor.settings
            settings = apns.ApnsSettings(values["key_id"], values["team_id"], self._secret, values["topic"])
            bearer = f"bearer {apns.ProviderTokens(settings, SystemClock()).current()}"
            return [
                Prepared(
                    f"{base}/3/device/{target.token.reveal()}",
                    apns.build_headers(target, wake_up, now) | {"authorization": bearer},
                    apns.build_payload(wake_up),
                )
                for target, wake_up in given
            ]
        build = fcm.build_message if self._vendor is FCM else hms.build_message
        folder = f"/v1/projects/{self._vendor.topic}" if self._vendor is FCM else f"/v1/{self._vendor.topic}"
        url = f"{base}{folder}/messages:send"
        headers = {"authorization": f"Bearer {await self._access_token(base)}", "content-type": "application/json; charset=UTF-8"}
        return [Prepared(url, headers, build(target, wake_up, now)) for target, wake_up in given]

    async def send(self, request: Prepared) -> None:
        """Send one and read its answer. Raises RuntimeError when it is not a 200."""
        async with self._client.post(request.url).headers(request.headers).body_bytes(request.body).build_streamed() as response:
            while await response.body_reader.read_chunk() is not None:
                pass
            if response.status != 200:
                raise RuntimeError(f"the bare client was answered {response.status}")

    async def _access_token(self, base: str) -> str:
        if self._vendor is FCM:
            account = fcm.parse_service_account(self._secret)
            url = f"{base}/token"
            form = {"grant_type": fcm.JWT_GRANT, "assertion": fcm.build_assertion(account, datetime.now(UTC))}
        else:
            client = hms.parse_credential(self._secret)
            url = f"{base}/oauth2/v3/token"
            form = {"grant_type": "client_credentials", "client_id": client.app_id, "client_secret": client.client_secret}
        headers = {"content-type": "application/x-www-form-urlencoded"}
        response = await self._client.post(url).headers(headers).body_bytes(urlencode(form).encode()).build().send()
        granted: dict[str, Any] = await response.json()
        token: str = granted["access_token"]
        return token
