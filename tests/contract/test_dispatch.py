"""dispatch between a real mailbox on PostgreSQL and the simulated APNs; only the directory is a small one of this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import SecretStr

from sealpush.ids import uuid7
from sealpush.v1 import common_pb2
from sealpushd.dispatch.lanes import Lane, LaneSet, LaneState
from sealpushd.dispatch.providers.apns import ApnsProvider, ApnsSettings
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.dispatch.session import Dispatcher
from sealpushd.engines import Engines
from sealpushd.platform.db import Connection
from sealpushd.platform.settings import Settings, SettingsError, load
from sealpushd.platform.tls import LocalAuthority
from sealpushd.simulators.core import Answer, BlackHole, Delay
from sealpushd.simulators.server import ProviderKey, RunningSimulators, SimulatedApns, SimulatorSettings, simulators
from sealpushd.v1 import (
    directory_pb2,
    directory_pb2_grpc,
    lanes_pb2,
    lanes_pb2_grpc,
    mailbox_pb2,
    mailbox_pb2_grpc,
    providers_pb2,
    providers_pb2_grpc,
)
from tests.contract.dispatching import Dispatch, start_dispatch
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Peer, Services, refusal, running_services

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEAM, KEY, TOPIC, BANK, SHOP = "TEAM123456", "KEY1234567", "ua.bank.app", "bank", "shop"
IOS = common_pb2.PLATFORM_IOS
QUEUED, PUSHED = common_pb2.STATE_QUEUED, common_pb2.STATE_PUSHED


class Directory(directory_pb2_grpc.DirectoryServicer):
    """Registration, as far as dispatch sees it: compare-and-clear over a dictionary."""

    def __init__(self) -> None:
        self.targets: dict[bytes, directory_pb2.PushTarget] = {}
        self.asked: list[int] = []
        self.dead: list[directory_pb2.DeadToken] = []
        self.before_report: Callable[[directory_pb2.DeadToken], None] = lambda dead: None
        self.refuse = False

    def register(self, device_id: bytes, token: str, at: datetime, *, topic: str = "", app: str = BANK) -> None:
        target = directory_pb2.PushTarget(device_id=device_id, push_token=token, topic=topic, platform=IOS, app_id=app)
        target.registered_at.FromDatetime(at)
        self.targets[device_id] = target

    async def Resolve(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetPushTargets(self, request: Any, context: Any) -> Any:
        if self.refuse:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        self.asked.append(len(request.device_ids))
        nobody = directory_pb2.PushTarget
        return directory_pb2.GetPushTargetsResponse(targets=[self.targets.get(one, nobody(device_id=one)) for one in request.device_ids])

    async def ReportDeadTokens(self, request: Any, context: Any) -> Any:
        answers = []
        for dead in request.dead_tokens:
            self.dead.append(dead)
            self.before_report(dead)
            present = self.targets.get(dead.device_id)
            same = present is not None and present.push_token == dead.push_token
            older = present is not None and (not dead.HasField("dead_at") or present.registered_at.ToDatetime() < dead.dead_at.ToDatetime())
            if same and older:
                del self.targets[dead.device_id]
            answers.append(same and older)
        return directory_pb2.ReportDeadTokensResponse(forgotten=answers)


@dataclass(frozen=True)
class Keys:
    """A certificate for localhost and its authority, and a provider's signing key."""

    ca: Path
    certificate: Path
    private_key: Path
    provider: ec.EllipticCurvePrivateKey

    @property
    def provider_pem(self) -> bytes:
        return self.provider.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture(scope="session")
def apns_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    authority = LocalAuthority(tmp_path_factory.mktemp("authority"))
    return Keys(authority.certificate_path, *authority.issue("apns"), ec.generate_private_key(ec.SECP256R1()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def database(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "dispatch")


@dataclass
class World:
    """The mailbox with its port, the directory, the simulated APNs, the operator's view of the database, and dispatchers."""

    apns: RunningSimulators
    keys: Keys
    services: Services
    directory: Directory
    rows: Connection
    publishing: Any
    running: dict[Dispatcher, asyncio.Task[None]] = field(default_factory=dict)
    sender_id: bytes = field(default_factory=uuid7)
    lanes: LaneSet | None = None

    @property
    def clock(self) -> FakeClock:
        return self.services.clock

    @property
    def mailbox(self) -> Peer:
        return self.services["fetch"].mesh

    def provider(self, *, total_timeout: timedelta = timedelta(seconds=10)) -> ApnsProvider:
        url = f"https://localhost:{self.apns.apns_port}"
        settings = ApnsSettings(
            key_id=KEY,
            team_id=TEAM,
            private_key_pem=self.keys.provider_pem,
            topic=TOPIC,
            production_url=url,
            sandbox_url=url,
            http=HttpSettings(private_ca_file=self.keys.ca, total_timeout=total_timeout),
        )
        provider = ApnsProvider(settings, self.clock)
        self.services.closing.push_async_callback(provider.aclose)
        return provider

    def lane(self, app_id: str = BANK, *, capacity: int = 256, total_timeout: timedelta = timedelta(seconds=10)) -> Lane:
        """A lane of the next dispatcher. One that this dispatcher has already begins a new dispatcher."""
        if self.lanes is None or self.lanes.get(app_id, IOS) is not None:
            self.lanes = LaneSet(capacity, self.clock, lambda: 0.0)
        lane = self.lanes.put(app_id, IOS)
        lane.use(self.provider(total_timeout=total_timeout))
        return lane

    def dispatch(self, *lanes: Lane, drain_limit: timedelta = timedelta(seconds=5)) -> Dispatcher:
        """A running dispatcher without jitter: what is to be retried is retried at once."""
        mailbox = self.services.channel("fetch", "dispatch")
        registration = self.services.channel("registration", "dispatch")
        assert self.lanes is not None
        assert set(self.lanes) == set(lanes)
        dispatcher = Dispatcher(self.lanes, mailbox, registration, self.clock, lambda: 0.0, drain_limit=drain_limit)
        self.running[dispatcher] = asyncio.create_task(dispatcher.run())
        return dispatcher

    async def process(self, settings: Settings, *, work: bool = True) -> Dispatch:
        """The whole service; `work`: it takes wake-ups, too."""
        started = await start_dispatch(settings, self.services.mesh, self.clock, work=work)
        self.services.closing.push_async_callback(started.stop)
        return started

    async def kill(self, dispatcher: Dispatcher) -> None:
        task = self.running.pop(dispatcher)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def store(
        self,
        count: int,
        app_id: str = BANK,
        *,
        registered: bool = True,
        topic: str = "",
        expires_in: timedelta = timedelta(hours=1),
        priorities: Iterable[common_pb2.Priority.ValueType] = (common_pb2.PRIORITY_NORMAL,),
        muted: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """New messages, one device each: (message id, device id)."""
        now, pairs, messages, choice = datetime.now(UTC), [], [], list(priorities)
        for n in range(count):
            message_id, device_id = uuid7(), uuid7()
            pairs.append((message_id, device_id))
            if registered:
                token = self.apns.apns.create_device(topic or TOPIC)
                self.directory.register(device_id, token, self.clock.now() - timedelta(days=1), topic=topic, app=app_id)
            messages.append(
                mailbox_pb2.NewMessage(
                    key=mailbox_pb2.AcceptedKey(sender_id=self.sender_id, request_id=message_id.hex(), request_mac=bytes(32)),
                    message_id=message_id,
                    subscriber_id=uuid7(),
                    app_id=app_id,
                    content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
                    priority=choice[n % len(choice)],
                    created_at_ms=int(now.timestamp() * 1000),
                    expires_at_ms=int((now + expires_in).timestamp() * 1000),
                    channel=common_pb2.CHANNEL_PUSH,
                    muted=muted,
                    deliveries=[mailbox_pb2.NewDelivery(device_id=device_id, stanza=b"stanza", platform=IOS)],
                    content_id=uuid7(),
                    head=b"head",
                    tail=b"tail",
                )
            )
        for start in range(0, count, 256):
            await self.publishing(mailbox_pb2.StoreRequest(messages=messages[start : start + 256]))
        return pairs

    async def deliveries(self, pairs: list[tuple[bytes, bytes]]) -> list[Any]:
        return await self.rows.fetch(
            'SELECT d.*, o.session_id, o.next_attempt_at, o.quarantined, o.closes_at, o.fence FROM "fetch".deliveries d'
            ' JOIN "fetch".open_deliveries o USING (message_id, device_id) WHERE message_id = ANY ($1::uuid[]) ORDER BY message_id',
            [message_id for message_id, _ in pairs],
        )

    async def until(self, pairs: list[tuple[bytes, bytes]], true: Callable[[Any], bool], seconds: float = LIMIT_S) -> list[Any]:
        """The rows, once something is true of every one."""
        async with asyncio.timeout(seconds):
            while True:
                rows = await self.deliveries(pairs)
                if all(true(row) for row in rows):
                    return rows
                await asyncio.sleep(0.02)

    async def pushed(self, pairs: list[tuple[bytes, bytes]], seconds: float = LIMIT_S) -> list[Any]:
        return await self.until(pairs, lambda row: row["state"] == PUSHED and row["session_id"] is None, seconds)


async def eventually(true: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - counters of peers tell nobody
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, database: dict[str, str], clock: FakeClock, apns_keys: Keys) -> AsyncIterator[World]:
    public = apns_keys.provider.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    trusting = SimulatedApns(provider_keys=[ProviderKey(TEAM, KEY, public)])
    simulated = SimulatorSettings(apns_keys.certificate, apns_keys.private_key, apns=trusting)
    directory = Directory()
    stand_ins = {"registration": [(directory_pb2_grpc.add_DirectoryServicer_to_server, directory)]}
    async with (
        simulators(simulated, now=clock.now) as apns,
        running_services(engines, mesh, database, clock, ["fetch"], stand_ins=stand_ins, work=False) as services,
    ):
        channel = services.channel("fetch", "publishing")
        store = mailbox_pb2_grpc.MailboxStub(channel.channel).Store
        rows = await services.sql()
        await rows.execute('TRUNCATE "fetch".open_deliveries, dispatch.lane_states, dispatch.providers')

        async def publish(request: mailbox_pb2.StoreRequest) -> Any:
            return await channel.call(store, request)

        world = World(apns, apns_keys, services, directory, rows, publish)
        yield world
        for dispatcher in list(world.running):
            await world.kill(dispatcher)
        apns.apns.clear_faults()


async def test_wake_ups_are_pushed_and_reported_with_one_question_a_frame(world: World) -> None:
    pairs = await world.store(200)
    world.dispatch(world.lane())
    rows = await world.pushed(pairs)
    assert all(row["attempts"] == 1 and row["next_attempt_at"] is None for row in rows)
    assert world.apns.apns.counters.accepted == 200
    assert len(world.directory.asked) < 10


async def test_priority_and_muting_reach_the_push_service(world: World) -> None:
    await world.store(1, priorities=[common_pb2.PRIORITY_LOW])
    pairs = await world.store(1, priorities=[common_pb2.PRIORITY_HIGH]) + await world.store(1, muted=True)
    world.dispatch(world.lane(capacity=1))
    await world.pushed(pairs)
    await eventually(lambda: world.apns.apns.counters.accepted == 3)
    shapes = [dict(one.request.headers) for one in world.apns.apns.received]
    assert [(one["apns-push-type"], one["apns-priority"]) for one in shapes] == [("alert", "10"), ("background", "5"), ("alert", "5")]


async def test_storm_of_429_is_ridden_out_and_does_not_break_the_lane(world: World) -> None:
    world.apns.apns.set_fault(Answer(429, "TooManyRequests"), requests=60)
    pairs = await world.store(50)
    lane = world.lane()
    world.dispatch(lane)
    await world.pushed(pairs)
    assert lane.state is LaneState.OPEN
    assert lane.counts.retried == 60


async def test_outage_breaks_the_lane_which_comes_back_by_itself_and_spares_attempts(world: World) -> None:
    world.apns.apns.set_fault(Answer(503, "ServiceUnavailable"), requests=12)
    pairs = await world.store(40)
    lane = world.lane(capacity=4)
    world.dispatch(lane)
    rows = await world.pushed(pairs)
    assert lane.counts.retried == 12
    assert sum(row["attempts"] for row in rows) == 40 + 12


async def test_410_clears_the_token_and_ends_the_push_leg(world: World) -> None:
    pairs = await world.store(3)
    for token in [world.directory.targets[device_id].push_token for _, device_id in pairs]:
        world.apns.apns.uninstall(token)
    world.clock.advance(timedelta(seconds=1))
    world.dispatch(world.lane())
    rows = await world.until(pairs, lambda row: row["push_reason"] == common_pb2.REASON_CODE_TOKEN_GONE)
    assert not world.directory.targets
    # The device may still fetch for the grace.
    assert all(row["state"] == QUEUED and row["closes_at"] < datetime.now(UTC) + timedelta(minutes=2) for row in rows)


async def test_newer_token_registered_meanwhile_is_pushed_at_once(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1)
    world.apns.apns.uninstall(world.directory.targets[device_id].push_token)
    world.clock.advance(timedelta(seconds=1))
    newer = world.apns.apns.create_device(TOPIC)
    world.directory.before_report = lambda dead: world.directory.register(device_id, newer, world.clock.now())
    world.dispatch(world.lane())
    [row] = await world.pushed(pairs)
    assert row["attempts"] == 2
    assert world.directory.targets[device_id].push_token == newer


async def test_same_token_registered_anew_is_not_given_up(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1)
    token = world.directory.targets[device_id].push_token
    world.apns.apns.set_fault(Answer(410, "Unregistered", timestamp=world.clock.now()), requests=1)
    world.directory.before_report = lambda dead: world.directory.register(device_id, token, world.clock.now() + timedelta(seconds=1))
    world.dispatch(world.lane())
    await world.pushed(pairs)
    assert world.directory.targets[device_id].push_token == token


async def test_suspect_token_is_kept_set_aside_and_tried_again_after_a_new_registration(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1)
    world.apns.apns.set_fault(Answer(400, "BadDeviceToken"), requests=1)
    world.dispatch(world.lane())
    quarantined = await world.until(pairs, lambda row: row["quarantined"])
    assert quarantined[0]["push_reason"] == common_pb2.REASON_CODE_PUSH_QUARANTINED
    assert quarantined[0]["detail"] == "BadDeviceToken"
    assert quarantined[0]["closes_at"] > datetime.now(UTC) + timedelta(minutes=30)
    assert not world.directory.dead
    sent = world.apns.apns.counters.requests
    await world.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now()')
    await world.until(pairs, lambda row: row["attempts"] == 2 and row["session_id"] is None)
    assert world.apns.apns.counters.requests == sent
    world.directory.register(device_id, world.apns.apns.create_device(TOPIC), world.clock.now())
    await world.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now()')
    await world.pushed(pairs)


async def test_device_without_token_keeps_its_mailbox(world: World) -> None:
    pairs = await world.store(1, registered=False)
    world.dispatch(world.lane())
    [row] = await world.until(pairs, lambda row: row["push_reason"] == common_pb2.REASON_CODE_NO_PUSH_TOKEN)
    # There is nothing that an operator could requeue.
    assert not row["quarantined"]
    assert row["state"] == QUEUED
    assert row["next_attempt_at"] is None
    assert row["closes_at"] > datetime.now(UTC) + timedelta(minutes=30)


async def test_device_whose_token_died_before_is_given_up_without_a_push(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1, registered=False)
    world.directory.targets[device_id] = directory_pb2.PushTarget(device_id=device_id, platform=IOS, app_id=BANK, token_gone=True)
    world.dispatch(world.lane())
    [row] = await world.until(pairs, lambda row: row["push_reason"] == common_pb2.REASON_CODE_TOKEN_GONE)
    assert row["closes_at"] < datetime.now(UTC) + timedelta(minutes=2)
    assert world.apns.apns.counters.requests == 0


async def test_token_that_the_app_took_back_during_the_push_costs_only_the_push(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1)
    world.apns.apns.uninstall(world.directory.targets[device_id].push_token)
    world.clock.advance(timedelta(seconds=1))
    nothing = directory_pb2.PushTarget(device_id=device_id, platform=IOS, app_id=BANK)
    world.directory.before_report = lambda dead: world.directory.targets.update({device_id: nothing})
    world.dispatch(world.lane())
    [row] = await world.until(pairs, lambda row: row["push_reason"] == common_pb2.REASON_CODE_NO_PUSH_TOKEN)
    assert row["closes_at"] > datetime.now(UTC) + timedelta(minutes=30)


async def test_token_that_registration_keeps_is_tried_again_and_its_device_is_not_given_up(world: World) -> None:
    [(_, device_id)] = pairs = await world.store(1)
    # Registration dates the token later than the push service dates its death, and so does the push target.
    at = world.clock.now()
    world.directory.register(device_id, world.directory.targets[device_id].push_token, at)
    world.apns.apns.set_fault(Answer(410, "Unregistered", timestamp=at + timedelta(milliseconds=500)), requests=1)
    world.directory.before_report = lambda dead: dead.dead_at.FromDatetime(at - timedelta(seconds=1))
    world.dispatch(world.lane())
    await world.pushed(pairs)


async def test_registration_away_spends_no_attempt(world: World) -> None:
    world.directory.refuse = True
    pairs = await world.store(5)
    dispatcher = world.dispatch(world.lane())
    rows = await world.until(pairs, lambda row: row["detail"] == "directory-unavailable" and row["session_id"] is None)
    assert all(row["attempts"] == 0 and row["next_attempt_at"] > world.clock.now() for row in rows)
    world.directory.refuse = False
    await world.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now()')
    await world.pushed(pairs)
    await world.kill(dispatcher)


async def test_whether_a_wake_up_is_over_its_time_is_the_mailboxs_to_say(world: World) -> None:
    """A dispatcher whose clock is ahead pushes what the mailbox hands out, with what is left of its lifetime."""
    pairs = await world.store(1, expires_in=timedelta(minutes=2))
    world.clock.jump(timedelta(minutes=3))
    world.dispatch(world.lane())
    await world.pushed(pairs)
    [received] = [one for one in world.apns.apns.received if one.status == 200]
    left = int(received.request.header("apns-expiration") or "0") - world.clock.now().timestamp()
    assert 60 < left <= 120


async def test_installation_with_a_senseless_topic_is_quarantined_alone(world: World) -> None:
    pairs = await world.store(1, topic="evil.topic")
    token = world.directory.targets[pairs[0][1]].push_token
    world.apns.apns.set_fault(Answer(400, "TopicDisallowed"), requests=100, device_token=token)
    await world.rows.execute('UPDATE "fetch".open_deliveries SET attempts = 6')
    lane = world.lane()
    world.dispatch(lane)
    await world.until(pairs, lambda row: row["quarantined"] and row["attempts"] == 2)
    assert lane.state is LaneState.OPEN
    await world.pushed(await world.store(5))


async def test_wrong_credentials_stop_the_lane_and_keep_its_wake_ups(world: World) -> None:
    world.apns.apns.set_fault(Answer(403, "InvalidProviderToken"), requests=1)
    pairs = await world.store(3)
    lane = world.lane(capacity=1)
    world.dispatch(lane)
    await eventually(lambda: lane.state is LaneState.MISCONFIGURED)
    assert "InvalidProviderToken" in lane.detail
    sent = world.apns.apns.counters.requests
    await asyncio.sleep(0.1)
    assert world.apns.apns.counters.requests == sent
    # Five minutes later it tries again, and the one that failed has waited as long.
    world.clock.advance(timedelta(minutes=5))
    await world.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now()')
    await world.pushed(pairs)


async def test_black_hole_of_one_lane_does_not_slow_another(world: World) -> None:
    stuck = await world.store(40, SHOP)
    for _, device_id in stuck:
        token = world.directory.targets[device_id].push_token
        world.apns.apns.set_fault(BlackHole(), requests=10, device_token=token)
    shop, bank = world.lane(SHOP, capacity=32), world.lane(BANK, capacity=64)
    world.dispatch(shop, bank)
    await eventually(lambda: shop.sending == 32)
    pairs = await world.store(300)
    await world.pushed(pairs)
    assert shop.sending == shop.held == 32
    assert not any(row["state"] == PUSHED for row in await world.deliveries(stuck))


async def test_black_hole_opens_the_breaker(world: World) -> None:
    world.apns.apns.set_fault(BlackHole(), requests=1000)
    await world.store(40)
    lane = world.lane(capacity=16, total_timeout=timedelta(seconds=0.3))
    dispatcher = world.dispatch(lane)
    await eventually(lambda: lane.state is LaneState.BROKEN)
    assert lane.counts.retried <= 32
    await world.kill(dispatcher)


async def test_killed_dispatcher_returns_its_leases_and_another_pushes_the_same_ids(world: World) -> None:
    world.apns.apns.set_fault(BlackHole(), requests=10)
    pairs = await world.store(10)
    lane = world.lane()
    first = world.dispatch(lane)
    await eventually(lambda: lane.sending == 10 and world.apns.apns.counters.requests >= 1)
    await world.kill(first)
    assert lane.held == lane.sending == 0
    await world.until(pairs, lambda row: row["session_id"] is None)
    world.apns.apns.clear_faults()
    world.dispatch(world.lane())
    rows = await world.pushed(pairs)
    assert all(row["fence"] == 2 and row["attempts"] == 1 for row in rows)


async def test_mailbox_restart_loses_nothing(world: World) -> None:
    world.apns.apns.set_fault(Delay(timedelta(milliseconds=150)), requests=1000)
    pairs = await world.store(300)
    lane = world.lane()
    world.dispatch(lane)
    await eventually(lambda: lane.sending > 0)
    await world.mailbox.stop()
    await asyncio.sleep(0.1)
    await world.mailbox.start()
    await world.pushed(pairs)
    await eventually(lambda: lane.held == 0)


async def test_drain_reports_what_is_under_way_and_takes_nothing_more(world: World) -> None:
    world.apns.apns.set_fault(Delay(timedelta(seconds=1)), requests=1000)
    pairs = await world.store(30)
    lane = world.lane(capacity=10)
    dispatcher = world.dispatch(lane)
    await eventually(lambda: lane.sending == 10)
    await dispatcher.drain()
    await world.running.pop(dispatcher)
    rows = await world.until(pairs, lambda row: row["session_id"] is None)
    states = [row["state"] for row in rows]
    assert states.count(PUSHED) == lane.counts.accepted == world.apns.apns.counters.accepted == 10
    assert lane.held == 0


async def test_drain_is_bounded(world: World) -> None:
    world.apns.apns.set_fault(BlackHole(), requests=1000)
    pairs = await world.store(3)
    lane = world.lane()
    dispatcher = world.dispatch(lane, drain_limit=timedelta(seconds=0.2))
    await eventually(lambda: lane.sending == 3)
    async with asyncio.timeout(LIMIT_S):
        await dispatcher.drain()
    await world.running.pop(dispatcher)
    await world.until(pairs, lambda row: row["session_id"] is None and row["attempts"] == 0)


@pytest.fixture
def dispatch_settings(world: World, tmp_path: Path) -> Settings:
    vault_key = tmp_path / "vault.key"
    vault_key.write_text("5e" * 32)
    url = f"https://localhost:{world.apns.apns_port}"
    return load(
        postgres_url=SecretStr(world.services.urls["dispatch"]),
        vault_key=vault_key,
        **world.services.addresses,
        apns_production_url=url,
        apns_sandbox_url=url,
        push_ca=world.keys.ca,
    )


def new_apns_credential(world: World, **changes: Any) -> providers_pb2.PutProviderRequest:
    values = {"key_id": KEY, "team_id": TEAM, "topic": TOPIC}
    given: dict[str, Any] = {"app_id": BANK, "platform": IOS, "push_service": "apns", "settings": values, "secret": world.keys.provider_pem}
    return providers_pb2.PutProviderRequest(**given | changes)


async def test_paused_lane_sends_nothing_also_after_a_restart_until_it_is_resumed(world: World, dispatch_settings: Settings) -> None:
    dispatch = await world.process(dispatch_settings)
    operator = dispatch.operator
    lanes = lanes_pb2_grpc.LanesStub(operator.channel)
    await operator.call(providers_pb2_grpc.ProvidersStub(operator.channel).PutProvider, new_apns_credential(world))
    probes = world.apns.apns.counters.requests
    await world.pushed(await world.store(1))
    await operator.call(lanes.PauseLane, lanes_pb2.PauseLaneRequest(app_id=BANK, platform=IOS))
    pairs = await world.store(5)
    await dispatch.stop()

    dispatch = await world.process(dispatch_settings)
    operator = dispatch.operator
    lanes = lanes_pb2_grpc.LanesStub(operator.channel)
    [lane] = (await operator.call(lanes.ListLanes, lanes_pb2.ListLanesRequest())).lanes
    assert lane.state == lanes_pb2.LANE_STATE_PAUSED
    assert lane.detail.startswith("paused by operator")
    await asyncio.sleep(0.7)
    assert world.apns.apns.counters.requests == probes + 1
    await operator.call(lanes.ResumeLane, lanes_pb2.ResumeLaneRequest(app_id=BANK, platform=IOS))
    await world.rows.execute('UPDATE "fetch".open_deliveries SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL')
    await world.pushed(pairs)
    [lane] = (await operator.call(lanes.ListLanes, lanes_pb2.ListLanesRequest())).lanes
    assert (lane.state, lane.accepted) == (lanes_pb2.LANE_STATE_OPEN, 5)
    missing = lanes.PauseLane(lanes_pb2.PauseLaneRequest(app_id="nobody", platform=IOS), metadata=operator.metadata())
    assert (await refusal(missing)).code is grpc.StatusCode.NOT_FOUND
    await dispatch.stop()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"apns_production_url": "http://localhost"}, "SEALPUSH_APNS_PRODUCTION_URL"),
        ({"fcm_url": "https://localhost/path"}, "SEALPUSH_FCM_URL"),
        ({"hms_token_url": "https:///token"}, "SEALPUSH_HMS_TOKEN_URL"),
        ({"push_ca": Path("nowhere.pem")}, "SEALPUSH_PUSH_CA"),
        ({"vault_key": None}, "SEALPUSH_VAULT_KEY"),
    ],
)
async def test_wrong_settings_say_what_to_do(world: World, dispatch_settings: Settings, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        await world.process(dispatch_settings.model_copy(update=change))


async def test_without_a_credential_it_idles_and_drains(world: World, dispatch_settings: Settings) -> None:
    dispatch = await world.process(dispatch_settings, work=False)
    task = asyncio.ensure_future(dispatch.app.tasks[0]())
    await asyncio.sleep(0)
    assert dispatch.app.drain is not None
    await dispatch.app.drain()
    await task
