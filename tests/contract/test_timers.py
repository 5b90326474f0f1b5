"""A clock is set under every timer of the registry, ahead or back, by minutes to a year, and set right: each recovers within its bound."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from sealpush.ids import AppId, DeviceId, RegistrationId, SenderId, SubscriberId, _Uuid7, uuid7, uuid7_ms
from sealpush.keys import PrekeyKind, SignedPrekey
from sealpush.suites import SUITE_X25519
from sealpush.v1 import accounts_pb2, common_pb2, content_pb2, publish_pb2
from sealpushd.accounts import rules as account_rules
from sealpushd.accounts.service import PROFILE_CACHED, AccountsService
from sealpushd.dispatch import credentials as dispatch_credentials
from sealpushd.dispatch.credentials import REFUSED_RETRY, Credentials
from sealpushd.dispatch.lanes import Lane, LaneSet, Send
from sealpushd.dispatch.makers import PushServices
from sealpushd.dispatch.providers import fcm
from sealpushd.dispatch.providers.apns import ApnsSettings, ProviderTokens
from sealpushd.dispatch.providers.base import (
    HttpAnswer,
    Misconfigured,
    Outcome,
    Probed,
    Provider,
    PushEnvironment,
    PushTarget,
    PushToken,
    RetryAt,
    parse_retry_after,
)
from sealpushd.dispatch.providers.http import IDLE_BEFORE_PROBE, Connection
from sealpushd.dispatch.providers.oauth import FAILURE_KEPT, AccessTokens, Grant
from sealpushd.dispatch.receipts import REMEMBERED_FOR, BadSignature, Signatures
from sealpushd.dispatch.rules import HALVING_PERIOD, LANE_RETRY, Window, decide
from sealpushd.dispatch.session import _Held, _Session, to_wake_up
from sealpushd.dispatch.store import StoredCredential
from sealpushd.fetch.store import MailboxStore
from sealpushd.keys.rules import Device, DeviceKeys, StoredPrekey, usable
from sealpushd.platform.clock import MOMENT_AHEAD_MAX, Reading, to_ms
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.db import Connection as Sql
from sealpushd.platform.db import Database, connect, load_sql
from sealpushd.platform.errors import LimitExceeded, StoreUnavailable, Unauthenticated
from sealpushd.platform.limits import CODES_PER_NUMBER, ONE_TIME_PREKEYS_PER_SENDER, Counted, Limit, Limiter
from sealpushd.platform.logging import LINES_MAX, WINDOW_S, Kind, LineLimiter
from sealpushd.platform.settings import load
from sealpushd.platform.timers import TIMERS, Measure
from sealpushd.platform.tls import LocalAuthority
from sealpushd.platform.tokens import LEEWAY_S, MESH_TOKEN_LIFETIME_S, SENDER_TOKEN_LIFETIME_S, SenderCaller, ServiceKey, TokenVerifier
from sealpushd.platform.vault import FileKeyWrapper, Vault
from sealpushd.publishing.rules import LIFETIME_DEFAULT, parse_publish
from sealpushd.registration import outbox, rules
from sealpushd.registration.outbox import PURGE_EVERY, Outbox
from sealpushd.registration.peers import KNOWN_FOR, Apps
from sealpushd.registration.phones import parse_phone
from sealpushd.registration.store import DeadToken, RegistrationStore, StartedRegistration
from sealpushd.up.maintenance import CLOCKS_DIFFER_MAX, maintain
from sealpushd.v1 import administration_pb2, mailbox_pb2
from tests.clock_uses import ROOT, python_uses
from tests.clocks import FakeClock
from tests.contract.harness import LIMIT_S, VAULT_KEY, Migrated
from tests.contract.mailboxes import a_session, claim, message, put
from tests.unit.dispatch.test_receipts import KEY as RECEIPT_KEY
from tests.unit.dispatch.test_receipts import header

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

AMOUNTS = [timedelta(minutes=40), timedelta(hours=5), timedelta(days=3), timedelta(days=365)]
JUMPS = [sign * amount for amount in AMOUNTS for sign in (1, -1)]
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
BANK = AppId("bank")


@dataclass
class World:
    """What a walk may need of the real parts."""

    clock: FakeClock
    jump: timedelta
    mailbox: MailboxStore
    registration: RegistrationStore
    # The databases of fetch, registration and keys as their superuser.
    sql: Sql
    admin_url: str
    patch: pytest.MonkeyPatch
    folder: Path

    @contextmanager
    def away(self) -> Iterator[None]:
        """The clock is set, and set right afterwards; some time passes between."""
        self.clock.jump(self.jump)
        yield
        self.clock.advance(SECOND)
        self.clock.jump(-self.jump)


Walk = Callable[[World], Awaitable[None]]
WALKS: dict[str, Walk] = {}


def walks(name: str) -> Callable[[Walk], Walk]:
    def put_in(walk: Walk) -> Walk:
        assert name not in WALKS
        WALKS[name] = walk
        return walk

    return put_in


# PostgreSQL's is the one clock that no test can set; that it is the judge is what stands in the registry of these.
JUDGED_BY_POSTGRESQL = {"ends of deliveries"}
WALKED = [
    timer.name for timer in TIMERS if timer.measure not in (Measure.SHOWN, Measure.ELSEWHERE) and timer.name not in JUDGED_BY_POSTGRESQL
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "registration", "keys")


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    urls: dict[str, str], clock: FakeClock, jump: timedelta, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[World]:
    (tmp_path / "vault.key").write_text(VAULT_KEY)
    mailbox, registration = Database(urls["fetch"], "fetch", 1), Database(urls["registration"], "registration", 1)
    sql = await connect(urls["admin"])
    for each in (mailbox, registration):
        await each.open()
    vault = await Vault.open(registration, "registration", FileKeyWrapper(tmp_path / "vault.key"))
    yield World(clock, jump, MailboxStore(mailbox), RegistrationStore(registration, vault), sql, urls["admin"], monkeypatch, tmp_path)
    for each in (mailbox, registration):
        await each.aclose()
    await sql.close()


async def test_every_timer_of_the_registry_has_its_walk() -> None:
    assert WALKS.keys() == set(WALKED)


@pytest.mark.parametrize("name", WALKED)
@pytest.mark.parametrize("jump", JUMPS, ids=str)
async def test_a_timer_recovers_from_a_clock_that_was_set_and_set_right(name: str, world: World) -> None:
    async with asyncio.timeout(LIMIT_S):
        await WALKS[name](world)


# dispatch


def a_lane(clock: FakeClock) -> Lane:
    provider = SimpleNamespace(name="apns", topic="", advise=lambda reason: "", forget_failures=lambda: None)
    lane = Lane("bank", 1, capacity=8, clock=clock, random=lambda: 0.5)
    lane.use(cast(Provider, provider))
    return lane


def stop(lane: Lane) -> None:
    lane.took()
    send = lane.admit()
    assert isinstance(send, Send)
    outcome = Misconfigured("clock-wrong")
    lane.observe(send, outcome, decide(outcome, 1, lambda: 0.5))
    lane.settled()


@walks("lane breaker")
async def _(world: World) -> None:
    before, meanwhile = a_lane(world.clock), a_lane(world.clock)
    stop(before)
    with world.away():
        assert before.closed_for == LANE_RETRY
        stop(meanwhile)
    for lane in (before, meanwhile):
        world.clock.advance(lane.closed_for or timedelta(0))
        lane.took()
        assert isinstance(lane.admit(), Send)


@walks("slowing down of a lane")
async def _(world: World) -> None:
    with world.away():
        window = Window.whole(64).halved(world.clock.monotonic())
    world.clock.advance(HALVING_PERIOD)
    assert (window.size, window.halved(world.clock.monotonic()).size) == (32, 16)


@walks("rate of a lane")
async def _(world: World) -> None:
    lane = a_lane(world.clock)
    with world.away():
        for _ in range(60):
            lane.counts.rate.add(world.clock.monotonic())
    assert lane.counts.rate.per_second(world.clock.monotonic()) == 1
    world.clock.advance(MINUTE)
    assert lane.counts.rate.per_second(world.clock.monotonic()) == 0


def access_tokens(clock: FakeClock, *answers: Grant | Outcome) -> AccessTokens:
    left = iter(answers)

    async def fetch() -> Grant | Outcome:
        return next(left)

    return AccessTokens(fetch, clock)


@walks("access tokens of FCM and HMS")
async def _(world: World) -> None:
    tokens = access_tokens(world.clock, Grant("first", HOUR), Grant("second", HOUR))
    with world.away():
        assert await tokens.current() == "first"
    assert await tokens.current() == "first"
    world.clock.advance(HOUR)
    assert await tokens.current() == "second"


@walks("failures of a token endpoint")
async def _(world: World) -> None:
    tokens = access_tokens(world.clock, RetryAt("oauth-status-503"), Misconfigured("clock-wrong"), Grant("first", HOUR))
    with world.away():
        assert await tokens.current() == RetryAt("oauth-status-503")
        world.clock.advance(FAILURE_KEPT)
        assert await tokens.current() == Misconfigured("clock-wrong")
    world.clock.advance(FAILURE_KEPT)
    assert await tokens.current() == "first"


@walks("proved connections")
async def _(world: World) -> None:
    connection = Connection("https://localhost", 8, world.clock)

    async def exchange() -> HttpAnswer:
        return HttpAnswer(200)

    with world.away():
        await connection.run(exchange)
        assert connection._is_proved()
    assert connection._is_proved()
    world.clock.advance(IDLE_BEFORE_PROBE)
    assert not connection._is_proved()


@walks("refused credential files")
async def _(world: World) -> None:
    file = world.folder / "key"
    file.write_bytes(b"first")
    now = datetime.now(UTC)
    row = StoredCredential(uuid7(), "bank", 1, "apns", {}, None, "key", 1, None, now, now)
    asked: list[str] = []

    async def nothing() -> list[Any]:
        return []

    async def rows() -> list[StoredCredential]:
        return [row]

    async def probe() -> list[Probed]:
        asked.append("again")
        return [Probed("send", Misconfigured("InvalidProviderToken"))]

    provider = SimpleNamespace(name="apns", topic="", probe=probe, aclose=nothing, advise=lambda reason: "", forget_failures=lambda: None)
    world.patch.setattr(dispatch_credentials, "make", lambda *_: provider)
    store = SimpleNamespace(credentials=rows, lane_states=nothing)
    lanes = LaneSet(8, world.clock, lambda: 0.5)
    credentials = Credentials(cast(Any, store), cast(Any, None), lanes, PushServices.of(load()), world.folder, world.clock)
    await credentials.refresh()
    file.write_bytes(b"second, refused")
    with world.away():
        await credentials.refresh()
    await credentials.refresh()
    assert len(asked) == 1
    world.clock.advance(REFUSED_RETRY)
    await credentials.refresh()
    assert len(asked) == 2
    await credentials.aclose()


@walks("lines left out of the log")
async def _(world: World) -> None:
    limiter, kind = LineLimiter(world.clock.monotonic), Kind("an event", "warning", "")
    with world.away():
        for _ in range(LINES_MAX):
            assert limiter.admit(kind) == 0
    assert limiter.admit(kind) is None
    world.clock.advance(timedelta(seconds=WINDOW_S))
    assert limiter.admit(kind) == 1


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def issued_at(token: str) -> float:
    return float(jwt.decode(token, options={"verify_signature": False})["iat"])


@walks("provider token of APNs")
async def _(world: World) -> None:
    settings = ApnsSettings("KEY1234567", "TEAM123456", _pem(ec.generate_private_key(ec.SECP256R1())))
    before, meanwhile = ProviderTokens(settings, world.clock), ProviderTokens(settings, world.clock)
    kept = before.current()
    with world.away():
        meanwhile.current()
        assert before.current() != kept
    for tokens in (before, meanwhile):
        assert abs(issued_at(tokens.current()) - world.clock.now().timestamp()) <= 1
    again = before.current()
    world.clock.advance(44 * MINUTE)
    assert before.current() == again


_RSA = rsa.generate_private_key(65537, 2048)


@walks("assertions for FCM")
async def _(world: World) -> None:
    account = {
        "type": "service_account",
        "project_id": "bank-app",
        "private_key_id": "0123456789abcdef",
        "private_key": _pem(_RSA).decode(),
        "client_email": "push@bank-app.example",
        "token_uri": "https://localhost/token",
    }
    provider = fcm.FcmProvider(fcm.FcmSettings(json.dumps(account).encode()), world.clock)
    with world.away():
        provider._sends._grant_form()
    assert abs(issued_at(provider._sends._grant_form()["assertion"]) - world.clock.now().timestamp()) <= 1
    await provider.aclose()


@walks("receipts of Huawei")
async def _(world: World) -> None:
    signatures, first = Signatures(), header(world.clock.now())
    with world.away():
        with pytest.raises(BadSignature, match="5 minutes"):
            signatures.verify(first, [RECEIPT_KEY], Reading.of(world.clock))
        signatures.verify(header(world.clock.now()), [RECEIPT_KEY], Reading.of(world.clock))
    signatures.verify(first, [RECEIPT_KEY], Reading.of(world.clock))
    with pytest.raises(BadSignature, match="before"):
        signatures.verify(first, [RECEIPT_KEY], Reading.of(world.clock))
    world.clock.advance(REMEMBERED_FOR + SECOND)
    signatures.verify(header(world.clock.now()), [RECEIPT_KEY], Reading.of(world.clock))
    assert len(signatures._seen) == 1


@walks("next try of a wake-up")
async def _(world: World) -> None:
    made = message()
    await put(world.mailbox, made)
    # As PostgreSQL wrote it while its clock was away.
    await world.sql.execute(
        'UPDATE "fetch".open_deliveries SET next_attempt_at = now() + $2 WHERE message_id = $1', made.message_id, world.jump
    )
    await world.mailbox.pull_back()
    assert len(await claim(world.mailbox, await a_session(world.mailbox), made)) == 1


def held(clock: FakeClock) -> _Held:
    wake_up = mailbox_pb2.WakeUp(wake_up_id=bytes(16), priority=common_pb2.PRIORITY_NORMAL)
    wake_up.expires_in.FromTimedelta(10 * MINUTE)
    return _Held(_Session(asyncio.Event()), a_lane(clock), wake_up, clock)


@walks("lifetime of a wake-up in dispatch")
async def _(world: World) -> None:
    before = held(world.clock)
    with world.away():
        meanwhile = held(world.clock)
        assert before.expires_at - world.clock.now() == 10 * MINUTE
    assert before.expires_at - world.clock.now() == meanwhile.expires_at - world.clock.now() == 10 * MINUTE - SECOND


@walks("answers of push services")
async def _(world: World) -> None:
    def http_date(moment: datetime) -> str:
        return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")

    right = world.clock.now()
    answer = HttpAnswer(503, {"retry-after": http_date(right + MINUTE), "date": http_date(right)})
    with world.away():
        assert parse_retry_after(answer, world.clock.now()) == MINUTE
    assert parse_retry_after(answer, world.clock.now()) == MINUTE


@walks("requests to push services")
async def _(world: World) -> None:
    target = PushTarget(PushToken("token"), PushEnvironment.PRODUCTION, "bank-app", world.clock.now())
    wake_up = held(world.clock)

    def ttl() -> str:
        body = fcm.build_message(target, to_wake_up(wake_up.wake_up, wake_up.expires_at), world.clock.now())
        return str(json.loads(body)["message"]["android"]["ttl"])

    with world.away():
        assert ttl() == "600s"
    assert ttl() == "599s"


# Tokens


SENDER = SenderCaller(SenderId(b"s" * 16), b"o" * 16, ("bank",), frozenset({"publish"}), ())


def key_and_verifier(signing: FakeClock, verifying: FakeClock) -> tuple[ServiceKey, TokenVerifier]:
    key = ServiceKey("accounts", Ed25519PrivateKey.generate(), signing)
    return key, TokenVerifier({"accounts": [key.public_key]}, verifying)


@walks("mesh token")
async def _(world: World) -> None:
    right = FakeClock(world.clock.now())
    key, verifier = key_and_verifier(world.clock, right)
    verifier.verify(key.mesh_token())
    with world.away(), pytest.raises(Unauthenticated):
        verifier.verify(key.mesh_token())
    verifier.verify(key.mesh_token())
    kept = key.mesh_token()
    world.clock.advance(timedelta(seconds=MESH_TOKEN_LIFETIME_S / 2 - 1))
    assert key.mesh_token() == kept


@walks("tokens of senders and devices")
async def _(world: World) -> None:
    right = FakeClock(world.clock.now())
    key, verifier = key_and_verifier(world.clock, right)
    with world.away():
        meanwhile, _ = key.sender_token(SENDER)
        if world.jump > timedelta(0):
            with pytest.raises(Unauthenticated, match="future"):
                verifier.verify(meanwhile)
    token, _ = key.sender_token(SENDER)
    _, ends_at = verifier.verify_until(token)
    assert ends_at - right.now().timestamp() <= SENDER_TOKEN_LIFETIME_S + 2 * LEEWAY_S


@walks("verified tokens")
async def _(world: World) -> None:
    right = FakeClock(world.clock.now())
    key, verifier = key_and_verifier(right, world.clock)
    token, _ = key.sender_token(SENDER)
    verifier.verify(token)
    with world.away():
        # Not what it remembers: an hour back it would be one of the future.
        if world.jump < timedelta(0) or world.jump > timedelta(seconds=SENDER_TOKEN_LIFETIME_S + LEEWAY_S):
            with pytest.raises(Unauthenticated):
                verifier.verify(token)
    verifier.verify(token)
    world.clock.advance(timedelta(seconds=SENDER_TOKEN_LIFETIME_S + LEEWAY_S))
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


# registration


@walks("challenges of devices")
async def _(world: World) -> None:
    device_id = DeviceId(uuid7())

    def mac(body: bytes) -> bytes:
        return bytes(32)

    def good(challenge: bytes) -> bool:
        return rules.challenge_issued_us(challenge, device_id, mac, now=world.clock.now()) is not None

    with world.away():
        meanwhile = rules.make_challenge(device_id, bytes(16), mac, now=world.clock.now())
        answered_us = int.from_bytes(meanwhile[1:9], "big")
    challenge = rules.make_challenge(device_id, bytes(16), mac, now=world.clock.now())
    assert (good(meanwhile), good(challenge)) == (False, True)
    newer = answered_us < int.from_bytes(challenge[1:9], "big")
    assert newer or answered_us > rules.latest_challenge_us(world.clock.now()), "so the statement lets the new one count"


@walks("codes")
async def _(world: World) -> None:
    phone = parse_phone(f"+38050{uuid7_ms(uuid7()) % 10_000_000:07}")
    assert phone is not None

    async def start() -> timedelta | None:
        now = world.clock.now()
        registration_id = RegistrationId(uuid7())
        return await world.registration.start(
            StartedRegistration(registration_id, BANK, phone, bytes(32), SubscriberId(uuid7()), now, now + 10 * MINUTE)
        )

    with world.away():
        await start()
    # What was made by a clock ahead counts as made when it is next looked at.
    wait = await start()
    assert wait is None or wait <= rules.RESEND_AFTER
    world.clock.advance(rules.RESEND_AFTER)
    assert await start() is None


@walks("purge of codes")
async def _(world: World) -> None:
    purged = asyncio.Event()

    async def purge_registrations(now: datetime, kept: timedelta) -> None:
        purged.set()

    async def claim_closures(now: datetime) -> list[Any]:
        return []

    store = SimpleNamespace(purge_registrations=purge_registrations, claim_closures=claim_closures)
    channel = cast(Any, SimpleNamespace(channel=_NoChannel()))
    world.patch.setattr(outbox, "POLL_PAUSE_S", 0.0)
    with world.away():
        running = asyncio.create_task(Outbox(cast(Any, store), channel, channel, world.clock).run())
        await purged.wait()
    purged.clear()
    world.clock.advance(PURGE_EVERY)
    await purged.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


class _NoChannel:
    """Makes stubs that nobody calls."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


async def installed(world: World, *, seen_at: datetime, token: str | None = None) -> tuple[SubscriberId, DeviceId, bytes]:
    """A device whose moments are all `seen_at`; subscriber, device and the hash of its number."""
    subscriber_id, device_id, lookup = SubscriberId(uuid7()), DeviceId(uuid7()), uuid7() * 2
    token_lookup = world.registration._vault.lookup(token.encode(), "push token") if token is not None else None
    await world.sql.execute("INSERT INTO registration.subscribers VALUES ($1, $2)", subscriber_id, seen_at)
    await world.sql.execute("INSERT INTO registration.identifiers VALUES (1, '', $1, $1, $2, $3)", lookup, subscriber_id, seen_at)
    await world.sql.execute(
        "INSERT INTO registration.installations (device_id, subscriber_id, app_id, platform, push_environment, push_topic, push_token,"
        " push_token_lookup, token_registered_at, push_allowed_by_os, push_allowed_by_app, state, is_primary, subscriptions, app_version,"
        " locale, identity_public_key, registration_id, created_at, updated_at, last_seen_at)"
        " VALUES ($1, $2, 'bank', 1, 1, '', $3, $4, $5, true, true, 1, true, '{}', '', '', $6, $1, $7, $7, $7)",
        device_id,
        subscriber_id,
        token_lookup,
        token_lookup,
        seen_at if token is not None else None,
        bytes(32),
        seen_at,
    )
    return subscriber_id, device_id, lookup


@walks("registration locks and numbers in use")
async def _(world: World) -> None:
    with world.away():
        meanwhile = world.clock.now()
        subscriber_id, _, lookup = await installed(world, seen_at=meanwhile)
        await world.sql.execute(
            "INSERT INTO registration.registration_locks VALUES ($1, $2, $3, $4, $3)", subscriber_id, b"pin", meanwhile, rules.PIN_ATTEMPTS
        )
    facts = await world.registration.facts(lookup, DeviceId(uuid7()), world.clock.now())
    assert facts.lock is not None
    world.clock.advance(rules.PIN_ATTEMPTS_RETURN_AFTER)
    assert rules.pin_attempts_left(facts.lock, now=world.clock.now()) == rules.PIN_ATTEMPTS
    world.clock.advance(rules.LOCK_LAPSES_AFTER)
    assert rules.locked_until(facts, now=world.clock.now()) is None
    world.clock.advance(rules.RECYCLED_AFTER)
    binding = rules.decide_binding(facts, DeviceId(uuid7()), SubscriberId(uuid7()), now=world.clock.now())
    assert binding.recycled == subscriber_id


@walks("dead push tokens")
async def _(world: World) -> None:
    token = uuid7().hex()
    with world.away():
        _, device_id, _ = await installed(world, seen_at=world.clock.now(), token=token)
    world.clock.advance(SECOND)
    dead = DeadToken(device_id, rules.PushToken(token), world.clock.now())
    assert await world.registration.forget_tokens([dead], world.clock.now()) == [True]


@walks("telling other services")
async def _(world: World) -> None:
    await world.sql.execute("TRUNCATE registration.pending_closures")
    with world.away():
        await world.sql.execute(
            "INSERT INTO registration.pending_closures (kind, subscriber_id, device_id, created_at, next_attempt_at)"
            " VALUES (1, $1, $1, $2, $3)",
            uuid7(),
            world.clock.now(),
            world.clock.now() + MINUTE,
        )
    assert len(await world.registration.claim_closures(world.clock.now())) == 1


@walks("apps that registration remembers")
async def _(world: World) -> None:
    asked = []

    async def call(method: Any, request: administration_pb2.GetAppsRequest) -> administration_pb2.GetAppsResponse:
        asked.append(request.app_ids[0])
        return administration_pb2.GetAppsResponse(apps=[administration_pb2.App(app_id="bank", name="Bank")])

    apps = Apps(cast(Any, SimpleNamespace(channel=_NoChannel(), call=call)), world.clock)
    with world.away():
        await apps.get(BANK)
    await apps.get(BANK)
    assert len(asked) == 1
    world.clock.advance(KNOWN_FOR)
    await apps.get(BANK)
    assert len(asked) == 2


# Limits


class _NoValkey:
    async def count(self, keys: Sequence[tuple[str, int]], add: int = 1) -> list[int] | None:
        return None


class _Counts:
    """In memory."""

    def __init__(self) -> None:
        self.counted: Counter[int] = Counter()

    async def count(self, limit: Limit, subject: str, window: int, add: int) -> int:
        self.counted[window] += add
        return self.counted[window]


@walks("rate limits")
async def _(world: World) -> None:
    settings = load()
    limiter = Limiter(cast(Any, _NoValkey()), _Counts(), settings, world.clock)
    with world.away():
        for _ in range(CODES_PER_NUMBER.allowed(settings)):
            await limiter.take(Counted(CODES_PER_NUMBER, "number"))
        with pytest.raises(LimitExceeded):
            await limiter.take(Counted(CODES_PER_NUMBER, "number"))
    refused = 0
    for _ in range(3):
        try:
            await limiter.take(Counted(CODES_PER_NUMBER, "number"))
        except LimitExceeded:
            refused += 1
        world.clock.advance(CODES_PER_NUMBER.window)
    assert refused <= 1, "no more than the one window that was used up"


# accounts, keys, publishing


@walks("profiles and lists that accounts remembers")
async def _(world: World) -> None:
    asked = []

    async def profiles(ids: Any) -> list[Any]:
        asked.append(ids)
        fields = ("sender_entry", "platform_entry", "display_name", "brand_colour", "brand_text_colour", "logo_png")
        return [SimpleNamespace(**dict.fromkeys(fields)) for _ in ids]

    store = SimpleNamespace(profiles=profiles, signed_revocations=None, accounts=None, signed_in_at=None)
    service = AccountsService(cast(Any, store), cast(Any, None), cast(Any, None), cast(Any, None), world.clock)
    request = accounts_pb2.GetSenderProfileRequest(sender_id=uuid7())
    with world.away():
        await service.GetSenderProfile(request, cast(Any, None))
    await service.GetSenderProfile(request, cast(Any, None))
    assert len(asked) == 1
    world.clock.advance(PROFILE_CACHED)
    await service.GetSenderProfile(request, cast(Any, None))
    assert len(asked) == 2


@walks("addresses known from a sign-in")
async def _(world: World) -> None:
    account = cast(Any, SimpleNamespace(networks=()))
    with world.away():
        noted = world.clock.now()
    for _ in range(2):
        now = world.clock.now()
        is_known = account_rules.standing(account, "192.0.2.1", noted, now=now).is_known
        assert not is_known or now - noted <= account_rules.ADDRESS_KNOWN_FOR
        if account_rules.is_worth_noting(noted, now=now):
            noted = now
        assert account_rules.standing(account, "192.0.2.1", noted, now=now).is_known
        world.clock.advance(24 * HOUR)


@walks("one-time prekeys handed out")
async def _(world: World) -> None:
    sender_id, device_id = uuid7(), uuid7()
    lasts = timedelta(days=35)
    with world.away():
        await world.sql.execute(
            "INSERT INTO keys.handouts SELECT $1, 'request' || n, $2, 1, n, '', $3 FROM generate_series(1, 10) n",
            sender_id,
            device_id,
            world.clock.now() + lasts,
        )
    statement = load_sql(ROOT / "services" / "sealpushd" / "keys", "count_handouts").replace("FROM handouts", "FROM keys.handouts")
    window = ONE_TIME_PREKEYS_PER_SENDER.window

    async def counted() -> list[Any]:
        ends = world.clock.now() + lasts
        return list(await world.sql.fetch(statement, [device_id], sender_id, ends - window, ends + MOMENT_AHEAD_MAX))

    if world.jump > timedelta(0):
        assert await counted() == []
        world.clock.advance(world.jump)
    world.clock.advance(window)
    assert await counted() == []


@walks("lifetimes of prekeys")
async def _(world: World) -> None:
    subscriber_id, now_ms = SubscriberId(uuid7()), to_ms(world.clock.now())
    prekey = SignedPrekey(SUITE_X25519, 1, PrekeyKind.SIGNED, bytes(32), now_ms, now_ms + 30 * 86_400_000, bytes(64))
    device = Device(DeviceId(uuid7()), subscriber_id, bytes(32), SUITE_X25519, False)
    keys = DeviceKeys(device, (StoredPrekey(prekey, None),))
    with world.away():
        usable(keys, subscriber_id, to_ms(world.clock.now()))
    assert usable(keys, subscriber_id, to_ms(world.clock.now())) is prekey


@walks("senders that publishing remembers")
async def _(world: World) -> None:
    # By the process's own steady clock, which no test hands in.
    text = (ROOT / "services" / "sealpushd" / "publishing" / "peers.py").read_text()
    assert python_uses(text) == set()
    assert "time.monotonic()" in text


@walks("acceptance of messages")
async def _(world: World) -> None:
    request = publish_pb2.PublishRequest(
        recipient=common_pb2.Recipient(phone="+380501234567"),
        content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        plain=content_pb2.Content(title="Title", body="Body"),
    )
    with world.away():
        parse_publish(request, SENDER.sender_id, ["bank"], world.clock.now())
    publication = parse_publish(request, SENDER.sender_id, ["bank"], world.clock.now())
    assert publication.expires_at == world.clock.now() + LIFETIME_DEFAULT


@walks("ids by the clock")
async def _(world: World) -> None:
    ids = _Uuid7()
    with world.away():
        ids.next(to_ms(world.clock.now()), never_back=True)
    now_ms = to_ms(world.clock.now())
    assert uuid7_ms(ids.next(now_ms, never_back=True)) == now_ms


@walks("dispatchers that hold wake-ups")
async def _(world: World) -> None:
    session = await a_session(world.mailbox)
    # As PostgreSQL wrote it while its clock was away.
    await world.sql.execute('UPDATE "fetch".wake_up_sessions SET seen_at = now() + $2 WHERE session_id = $1', session, world.jump)
    assert session in await world.mailbox.lost_sessions()
    await world.mailbox.keep_sessions([session])
    assert session not in await world.mailbox.lost_sessions()


@walks("partitions and retention")
async def _(world: World) -> None:
    # A partition that only a clock that is wrong calls old; which of the two clocks it is does not matter.
    part = (datetime.now(UTC) - timedelta(weeks=2)).strftime("messages_%Gw%V")
    await world.sql.execute(
        f'CREATE TABLE IF NOT EXISTS "fetch".{part} PARTITION OF "fetch".messages'
        " FOR VALUES FROM ('00000000-0000-7000-8000-000000000000') TO ('00000000-0000-7000-8000-000000000001')"
    )
    with world.away():
        if abs(world.jump) > CLOCKS_DIFFER_MAX:
            with pytest.raises(StoreUnavailable, match="clock differs"):
                await maintain(world.admin_url, world.clock)
    await maintain(world.admin_url, world.clock)
    assert await world.sql.fetchval("SELECT to_regclass($1) IS NOT NULL", f"fetch.{part}")


# The machine


@walks("the watch over the clock")
async def _(world: World) -> None:
    watch = ClockWatch(world.clock)
    seen: list[timedelta] = []
    watch.on_moved.append(seen.append)
    with world.away():
        assert watch.look() == world.jump
    assert watch.look() == -world.jump
    assert watch.look() is None
    assert seen == [world.jump, -world.jump]


@walks("certificates of `sealpush up`")
async def _(world: World) -> None:
    with world.away():
        LocalAuthority(world.folder, world.clock).issue("services")
    authority = LocalAuthority(world.folder, world.clock)
    for path in (authority.certificate_path, authority.issue("services")[0]):
        assert_in_force(path, world.clock.now())


def assert_in_force(path: Path, now: datetime) -> None:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


async def started(world: World, number: str, now: datetime, expires_at: datetime | None = None) -> timedelta | None:
    phone = parse_phone(number)
    assert phone is not None
    ids = RegistrationId(uuid7()), SubscriberId(uuid7())
    return await world.registration.start(
        StartedRegistration(ids[0], BANK, phone, bytes(32), ids[1], now, now + 10 * MINUTE if expires_at is None else expires_at)
    )


@pytest.mark.parametrize("jump", [timedelta(0)])
@pytest.mark.parametrize(("ahead", "wait"), [(20 * SECOND, 50 * SECOND), (40 * SECOND, 30 * SECOND)])
async def test_a_code_counts_as_made_when_it_was_unless_no_clock_that_works_says_so(
    world: World, ahead: timedelta, wait: timedelta
) -> None:
    number, now = f"+38050{uuid7_ms(uuid7()) % 10_000_000:07}", world.clock.now()
    assert await started(world, number, now + ahead) is None
    assert await started(world, number, now) == wait


@pytest.mark.parametrize("jump", JUMPS)
async def test_a_process_whose_clock_is_wrong_purges_no_code_of_the_others(world: World, jump: timedelta) -> None:
    number, now = f"+38050{uuid7_ms(uuid7()) % 10_000_000:07}", datetime.now(UTC)
    await world.sql.execute("DELETE FROM registration.registrations")
    for which, expires_at in enumerate((now + 10 * MINUTE, now - 23 * HOUR, now - 400 * 24 * HOUR, now + 400 * 24 * HOUR)):
        assert await started(world, number, now + which * MINUTE, expires_at) is None
    await world.registration.purge_registrations(now + jump, rules.REGISTRATIONS_KEPT)
    kept = [row["expires_at"] for row in await world.sql.fetch("SELECT expires_at FROM registration.registrations ORDER BY expires_at")]
    assert {now - 23 * HOUR, now + 10 * MINUTE} <= set(kept)
    await world.registration.purge_registrations(now, rules.REGISTRATIONS_KEPT)
    kept = [row["expires_at"] for row in await world.sql.fetch("SELECT expires_at FROM registration.registrations ORDER BY expires_at")]
    assert kept == [now - 23 * HOUR, now + 10 * MINUTE]
