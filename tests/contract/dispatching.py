"""A mailbox on PostgreSQL, a small directory, the three simulated push services, and dispatch processes between them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import SecretStr

from sealpush.ids import uuid7
from sealpush.v1 import common_pb2
from sealpushd.dispatch import app as dispatch_app
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.db import Connection
from sealpushd.platform.errors import Unavailable
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.platform.settings import Settings, load
from sealpushd.simulators.core import PushSimulator
from sealpushd.simulators.server import RunningSimulators, SimulatedApns, SimulatedFcm, SimulatedHms, SimulatorSettings, simulators
from sealpushd.v1 import directory_pb2, directory_pb2_grpc, lanes_pb2, lanes_pb2_grpc, mailbox_pb2, mailbox_pb2_grpc, providers_pb2
from sealpushd.v1.providers_pb2_grpc import ProvidersStub
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Peer, running_services
from tests.contract.push_simulators import Certificates

BANK = "bank"
IOS, ANDROID, HUAWEI = common_pb2.PLATFORM_IOS, common_pb2.PLATFORM_ANDROID, common_pb2.PLATFORM_HUAWEI
PLATFORMS = (IOS, ANDROID, HUAWEI)
TEAM, TOPIC, PROJECT, HMS_APP = "TEAM123456", "ua.bank.app", "demo-bank", "104000001"
# What a device of each platform belongs to, unless a test says otherwise.
TOPICS = {IOS: TOPIC, ANDROID: PROJECT, HUAWEI: HMS_APP}
RECEIPT_USER, RECEIPT_KEY = "receipts-user", "receipts-key-is-secret"


class Directory(directory_pb2_grpc.DirectoryServicer):
    """Registration, as far as dispatch sees it."""

    def __init__(self) -> None:
        self.targets: dict[bytes, directory_pb2.PushTarget] = {}
        self.dead: list[directory_pb2.DeadToken] = []

    async def Resolve(self, request: Any, context: Any) -> Any:
        raise AssertionError("dispatch resolves no recipients")

    async def GetPushTargets(self, request: Any, context: Any) -> Any:
        nobody = directory_pb2.PushTarget
        return directory_pb2.GetPushTargetsResponse(targets=[self.targets.get(one, nobody(device_id=one)) for one in request.device_ids])

    async def ReportDeadTokens(self, request: Any, context: Any) -> Any:
        self.dead.extend(request.dead_tokens)
        for dead in request.dead_tokens:
            self.targets.pop(dead.device_id, None)
        return directory_pb2.ReportDeadTokensResponse(forgotten=[True] * len(request.dead_tokens))


# Credentials


@dataclass(frozen=True, slots=True)
class Credential:
    """What an operator puts for a lane, and under which name the push service knows it."""

    platform: common_pb2.Platform.ValueType
    push_service: str
    settings: dict[str, str]
    secret: bytes
    known_as: str
    # What may stand nowhere.
    secrets: tuple[str, ...]
    # Of a key; hms has none.
    public_key: bytes = b""

    def request(self, app_id: str = BANK, **changes: Any) -> providers_pb2.PutProviderRequest:
        given: dict[str, Any] = {
            "app_id": app_id,
            "platform": self.platform,
            "push_service": self.push_service,
            "settings": self.settings,
            "secret": self.secret,
        } | changes
        return providers_pb2.PutProviderRequest(**{name: value for name, value in given.items() if value is not None})


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# Costs a tenth of a second each: made once.
_RSA_KEYS: list[rsa.RSAPrivateKey] = []


def _rsa_key(number: int) -> rsa.RSAPrivateKey:
    while len(_RSA_KEYS) <= number:
        _RSA_KEYS.append(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    return _RSA_KEYS[number]


@dataclass
class Vendors:
    """The simulated push services, and credentials that they trust."""

    running: RunningSimulators
    certificates: Certificates
    made: int = 0

    def simulator(self, platform: int) -> PushSimulator:
        by_platform: dict[int, PushSimulator] = {IOS: self.running.apns, ANDROID: self.running.fcm, HUAWEI: self.running.hms}
        return by_platform[platform]

    def credential(self, platform: int, topic: str = "", *, trusted: bool = True) -> Credential:
        """A new one, of another key than those before. `trusted`: the push service knows it."""
        self.made += 1
        known = common_pb2.Platform.ValueType(platform)
        make = {IOS: self._apns, ANDROID: self._fcm, HUAWEI: self._hms}[known]
        return make(topic or TOPICS[known], trusted=trusted)

    def _apns(self, topic: str, *, trusted: bool) -> Credential:
        key, key_id = ec.generate_private_key(ec.SECP256R1()), f"KEY{self.made:07}"
        if trusted:
            self.running.apns.register_provider_key(TEAM, key_id, _public_pem(key))
        pem, settings = _pem(key), {"key_id": key_id, "team_id": TEAM, "topic": topic}
        return Credential(IOS, "apns", settings, pem, key_id, tuple(pem.decode().split("\n")[1:-2]), _public_pem(key))

    def _fcm(self, project: str, *, trusted: bool) -> Credential:
        key, email = _rsa_key(self.made % 3), f"push-{self.made}@{project}.example"
        if trusted:
            self.running.fcm.register_service_account(project, email, "0123456789abcdef", _public_pem(key))
        pem = _pem(key).decode()
        account = {
            "type": "service_account",
            "project_id": project,
            "private_key_id": "0123456789abcdef",
            "private_key": pem,
            "client_email": email,
            "token_uri": f"https://localhost:{self.running.fcm_port}/token",
        }
        return Credential(ANDROID, "fcm", {}, json.dumps(account).encode(), email, tuple(pem.split("\n")[1:-2]))

    def _hms(self, app_id: str, *, trusted: bool) -> Credential:
        secret = f"client-secret-{self.made}-of-hms"
        if trusted:
            self.running.hms.register_client(app_id, secret, RECEIPT_USER, RECEIPT_KEY)
        content = {"app_id": app_id, "client_secret": secret, "receipt_user": RECEIPT_USER, "receipt_key": RECEIPT_KEY}
        return Credential(HUAWEI, "hms", {}, json.dumps(content).encode(), app_id, (secret, RECEIPT_KEY))

    def revoke(self, credential: Credential) -> None:
        assert self.simulator(credential.platform).revoke_credential(credential.known_as)

    def sent_ids(self, platform: int) -> Counter[str]:
        """How often each wake-up id was accepted."""
        ids: Counter[str] = Counter()
        for one in self.simulator(platform).received:
            body = json.loads(one.request.body or b"{}") if one.request.path not in ("/token", "/oauth2/v3/token") else {}
            message = body.get("message", {})
            data = message.get("data", {})
            is_probe = body.get("validate_only", False)
            wake_up_id = body.get("id") or (data.get("id") if isinstance(data, dict) else json.loads(data)["id"])
            if one.status == 200 and one.reason in ("", "80000000") and not is_probe and wake_up_id:
                ids[wake_up_id] += 1
        return ids


@asynccontextmanager
async def vendors(certificates: Certificates, clock: FakeClock, **hms: Any) -> AsyncIterator[Vendors]:
    """All three, in this process."""
    settings = SimulatorSettings(
        certificates.certificate, certificates.private_key, apns=SimulatedApns(), fcm=SimulatedFcm(), hms=SimulatedHms(**hms)
    )
    async with simulators(settings, now=clock.now) as running:
        yield Vendors(running, certificates)


# Dispatch


@dataclass
class Dispatch:
    """A dispatch process, as an operator sees it."""

    app: ServiceApp
    peer: Peer
    operator: MeshChannel
    clock_watch: ClockWatch
    closes: list[Callable[[], Awaitable[None]]]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def work(self) -> None:
        """Begin with what runs beside: the session, and following the others."""
        self.tasks = [asyncio.ensure_future(task()) for task in self.app.tasks]

    async def put(self, request: providers_pb2.PutProviderRequest) -> providers_pb2.PutProviderResponse:
        """As gRPC raises it."""
        stub = ProvidersStub(self.operator.channel)
        answer: providers_pb2.PutProviderResponse = await stub.PutProvider(request, metadata=self.operator.metadata())
        return answer

    async def test(self, platform: int, app_id: str = BANK) -> providers_pb2.TestProviderResponse:
        request = providers_pb2.TestProviderRequest(app_id=app_id, platform=common_pb2.Platform.ValueType(platform))
        answer: providers_pb2.TestProviderResponse = await ProvidersStub(self.operator.channel).TestProvider(
            request, metadata=self.operator.metadata()
        )
        return answer

    async def remove(self, platform: int, app_id: str = BANK) -> None:
        request = providers_pb2.RemoveProviderRequest(app_id=app_id, platform=common_pb2.Platform.ValueType(platform))
        await ProvidersStub(self.operator.channel).RemoveProvider(request, metadata=self.operator.metadata())

    async def stored(self) -> Sequence[providers_pb2.StoredProvider]:
        stub = ProvidersStub(self.operator.channel)
        answer = await stub.ListProviders(providers_pb2.ListProvidersRequest(), metadata=self.operator.metadata())
        return list(answer.providers)

    async def lanes(self) -> dict[tuple[str, int], lanes_pb2.Lane]:
        answer = await self._lanes.ListLanes(lanes_pb2.ListLanesRequest(), metadata=self.operator.metadata())
        return {(lane.app_id, lane.platform): lane for lane in answer.lanes}

    async def lane(self, platform: int, app_id: str = BANK) -> lanes_pb2.Lane:
        return (await self.lanes())[app_id, platform]

    async def pause(self, platform: int, app_id: str = BANK) -> None:
        request = lanes_pb2.PauseLaneRequest(app_id=app_id, platform=common_pb2.Platform.ValueType(platform))
        await self._lanes.PauseLane(request, metadata=self.operator.metadata())

    async def resume(self, platform: int, app_id: str = BANK) -> None:
        """Also looks at what changed, as the process does every two seconds."""
        request = lanes_pb2.ResumeLaneRequest(app_id=app_id, platform=common_pb2.Platform.ValueType(platform))
        await self._lanes.ResumeLane(request, metadata=self.operator.metadata())

    async def requeue(self, platform: int, app_id: str = BANK) -> int:
        request = lanes_pb2.RequeueLaneRequest(app_id=app_id, platform=common_pb2.Platform.ValueType(platform))
        answer = await self._lanes.RequeueLane(request, metadata=self.operator.metadata())
        return int(answer.requeued)

    async def lane_that(self, platform: int, true: Callable[[lanes_pb2.Lane], bool], seconds: float = LIMIT_S) -> lanes_pb2.Lane:
        """The lane, once something is true of it."""
        async with asyncio.timeout(seconds):
            while True:
                lane = (await self.lanes()).get((BANK, platform))
                if lane is not None and true(lane):
                    return lane
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """As SIGTERM does. Idempotent."""
        if self.tasks and self.app.drain is not None:
            await self.app.drain()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []
        await self.peer.stop()
        for close in reversed(self.closes):
            await close()
        self.closes.clear()

    @property
    def _lanes(self) -> Any:
        return lanes_pb2_grpc.LanesStub(self.operator.channel)


async def start_dispatch(settings: Settings, mesh: Mesh, clock: FakeClock, *, work: bool = True) -> Dispatch:
    """`work`: take wake-ups, too."""
    closes: list[Callable[[], Awaitable[None]]] = []
    try:
        runtime = Runtime("dispatch", settings, mesh.keys["dispatch"], mesh.verifier, clock, closes)
        app = await dispatch_app.build(runtime)
    except BaseException:
        for close in reversed(closes):
            await close()
        raise
    peer = Peer(app.mesh, mesh.verifier)
    await peer.start()
    operator = MeshChannel("dispatch", peer.address, mesh.keys["operator"])
    closes.append(operator.aclose)
    dispatch = Dispatch(app, peer, operator, runtime.clock_watch, closes)
    if work:
        dispatch.work()
    return dispatch


def dispatch_settings(vendors: Vendors, postgres_url: str, folder: Path, **changes: Any) -> Settings:
    """A folder for mounted credentials is `folder`/mounted; the vault's key lies in `folder`."""
    vault_key = folder / "vault.key"
    vault_key.write_text("5e" * 32)
    mounted = folder / "mounted"
    mounted.mkdir(exist_ok=True)
    running = vendors.running
    given: dict[str, Any] = {
        "postgres_url": SecretStr(postgres_url),
        "vault_key": vault_key,
        "credentials": mounted,
        "apns_production_url": f"https://localhost:{running.apns_port}",
        "apns_sandbox_url": f"https://localhost:{running.apns_port}",
        "fcm_url": f"https://localhost:{running.fcm_port}",
        "hms_url": f"https://localhost:{running.hms_port}",
        "hms_token_url": f"https://localhost:{running.hms_port}/oauth2/v3/token",
        "push_ca": vendors.certificates.ca,
        "drain_seconds": 1,
    }
    return load(**given | changes)


# Everything


@dataclass
class Pushing:
    """Messages go in, wake-ups come out."""

    clock: FakeClock
    mesh: Mesh
    vendors: Vendors
    settings: Settings
    mailbox: Peer
    directory: Directory
    rows: Connection
    publishing: Callable[[mailbox_pb2.StoreRequest], Awaitable[Any]]
    running: list[Dispatch] = field(default_factory=list)
    sender_id: bytes = field(default_factory=uuid7)

    async def dispatch(self, *, work: bool = True, **changes: Any) -> Dispatch:
        """Another dispatch process."""
        started = await start_dispatch(self.settings.model_copy(update=changes), self.mesh, self.clock, work=work)
        self.running.append(started)
        return started

    async def store(self, count: int, platform: int = IOS, *, topic: str = "", app_id: str = BANK) -> list[bytes]:
        """New messages, one device each."""
        now, messages = datetime.now(UTC), []
        platform = common_pb2.Platform.ValueType(platform)
        for _ in range(count):
            message_id, device_id = uuid7(), uuid7()
            token = self.vendors.simulator(platform).create_device(topic or TOPICS[platform])
            target = directory_pb2.PushTarget(device_id=device_id, push_token=token, platform=platform, app_id=app_id)
            target.registered_at.FromDatetime(self.clock.now() - timedelta(days=1))
            self.directory.targets[device_id] = target
            messages.append(
                mailbox_pb2.NewMessage(
                    key=mailbox_pb2.AcceptedKey(sender_id=self.sender_id, request_id=message_id.hex(), request_mac=bytes(32)),
                    message_id=message_id,
                    subscriber_id=uuid7(),
                    app_id=app_id,
                    content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
                    priority=common_pb2.PRIORITY_NORMAL,
                    created_at_ms=int(now.timestamp() * 1000),
                    expires_at_ms=int((now + timedelta(hours=1)).timestamp() * 1000),
                    channel=common_pb2.CHANNEL_PUSH,
                    deliveries=[mailbox_pb2.NewDelivery(device_id=device_id, stanza=b"stanza", platform=platform)],
                    content_id=uuid7(),
                    head=b"head",
                    tail=b"tail",
                )
            )
        for start in range(0, count, 256):
            await self.publishing(mailbox_pb2.StoreRequest(messages=messages[start : start + 256]))
        return [message.message_id for message in messages]

    async def deliveries(self, messages: Sequence[bytes]) -> list[Any]:
        return await self.rows.fetch(
            'SELECT d.*, o.session_id, o.next_attempt_at, o.quarantined, o.fence FROM "fetch".deliveries d'
            ' JOIN "fetch".open_deliveries o USING (message_id, device_id) WHERE message_id = ANY ($1::uuid[]) ORDER BY message_id',
            messages,
        )

    async def until(self, messages: Sequence[bytes], true: Callable[[Any], bool], seconds: float = LIMIT_S) -> list[Any]:
        """The rows, once something is true of every one."""
        async with asyncio.timeout(seconds):
            while True:
                rows = await self.deliveries(messages)
                if all(true(row) for row in rows):
                    assert len(rows) == len(messages)
                    return rows
                await asyncio.sleep(0.02)

    async def pushed(self, messages: Sequence[bytes], seconds: float = LIMIT_S) -> list[Any]:
        """The rows, once every one is pushed."""
        return await self.until(messages, lambda row: row["state"] == common_pb2.STATE_PUSHED and row["session_id"] is None, seconds)

    async def now(self) -> None:
        """What waits for its next try is due at once."""
        await self.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL')


@asynccontextmanager
async def pushing(
    databases: dict[str, str],
    engines: Engines,
    mesh: Mesh,
    certificates: Certificates,
    clock: FakeClock,
    folder: Path,
    vendors_clock: FakeClock | None = None,
) -> AsyncIterator[Pushing]:
    """`databases`: with the schemas of fetch and dispatch. `clock` is dispatch's, and the push services' unless they have their own."""
    directory = Directory()
    stand_ins = {"registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)]}
    async with (
        vendors(certificates, vendors_clock or clock) as running,
        running_services(engines, mesh, databases, clock, ["fetch"], stand_ins=stand_ins, work=False) as services,
    ):
        channel = services.channel("fetch", "publishing")
        store = mailbox_pb2_grpc.MailboxStub(channel.channel).Store
        rows = await services.sql()
        await rows.execute('TRUNCATE "fetch".open_deliveries, dispatch.lane_states, dispatch.providers')

        async def publish(request: mailbox_pb2.StoreRequest) -> Any:
            async with asyncio.timeout(LIMIT_S):
                while True:
                    try:
                        return await channel.call(store, request)
                    except Unavailable:
                        # It was restarted, and publishing has not found out.
                        await asyncio.sleep(0.02)

        made = Pushing(
            clock,
            mesh,
            running,
            dispatch_settings(running, databases["dispatch"], folder, **services.addresses),
            services["fetch"].mesh,
            directory,
            rows,
            publish,
        )
        try:
            yield made
        finally:
            for each in made.running:
                await each.stop()
