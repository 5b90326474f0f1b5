"""Credentials of the push services: put by operators, taken over while wake-ups flow, never told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import REGISTRY

from sealpush.v1 import common_pb2
from sealpushd.cli.app import run
from sealpushd.cli.checks import judge_credential, judge_lane
from sealpushd.dispatch.credentials import SECRET_BYTES_MAX
from sealpushd.dispatch.lanes import LaneSet, LaneState
from sealpushd.dispatch.providers.base import Accepted, Misconfigured, Outcome, Probed, PushTarget, TokenSuspect, WakeUp
from sealpushd.dispatch.rules import STRANGERS_MAX
from sealpushd.dispatch.session import Dispatcher
from sealpushd.engines import Engines
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.vault import VaultError
from sealpushd.simulators.core import Answer, BlackHole, Delay, FaultScope
from sealpushd.v1 import lanes_pb2, providers_pb2
from sealpushd.v1.providers_pb2_grpc import ProvidersStub
from tests.contract.dispatching import (
    ANDROID,
    BANK,
    HUAWEI,
    IOS,
    PLATFORMS,
    TEAM,
    TOPIC,
    Credential,
    Dispatch,
    Pushing,
    pushing,
)
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Refusal, refusal
from tests.contract.push_simulators import Certificates

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHOP = "shop"
OPEN, PAUSED, MISCONFIGURED = lanes_pb2.LANE_STATE_OPEN, lanes_pb2.LANE_STATE_PAUSED, lanes_pb2.LANE_STATE_MISCONFIGURED
GOOD, REFUSED, UNKNOWN = providers_pb2.VERDICT_GOOD, providers_pb2.VERDICT_REFUSED, providers_pb2.VERDICT_UNKNOWN
CODE = grpc.StatusCode
each_platform = pytest.mark.parametrize("platform", PLATFORMS, ids=["apns", "fcm", "hms"])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def databases(migrated: Migrated) -> dict[str, str]:
    return await migrated("fetch", "dispatch")


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    databases: dict[str, str], engines: Engines, mesh: Mesh, certificates: Certificates, clock: FakeClock, tmp_path: Path
) -> AsyncIterator[Pushing]:
    async with pushing(databases, engines, mesh, certificates, clock, tmp_path) as world:
        yield world


@pytest.fixture
def mounted(world: Pushing) -> Path:
    assert world.settings.credentials is not None
    return world.settings.credentials


def verdicts(answer: providers_pb2.PutProviderResponse | providers_pb2.TestProviderResponse) -> list[tuple[str, int, str]]:
    return [(one.what, one.verdict, one.reason) for one in answer.verdicts]


async def fingerprint(dispatch: Dispatch) -> str:
    [stored] = await dispatch.stored()
    assert re.fullmatch("[0-9a-f]{12}", stored.fingerprint)
    return stored.fingerprint


def gauge(name: str, platform: str = "ios", app: str = BANK) -> float | None:
    return REGISTRY.get_sample_value(name, {"app": app, "platform": platform})


# Putting


async def test_three_push_services_push_at_once_with_what_was_put(world: Pushing) -> None:
    dispatch = await world.dispatch()
    answers = [await dispatch.put(world.vendors.credential(platform).request()) for platform in PLATFORMS]
    assert [verdicts(answer) for answer in answers] == [
        [("production", GOOD, ""), ("sandbox", GOOD, "")],
        [("access token", GOOD, ""), ("send", GOOD, "")],
        [("access token", GOOD, ""), ("send", GOOD, "")],
    ]
    messages = [message for platform in PLATFORMS for message in await world.store(20, platform)]
    rows = await world.pushed(messages)
    assert all(row["attempts"] == 1 for row in rows)
    lanes = await dispatch.lanes()
    assert {(lane.push_service, lane.state, lane.accepted) for lane in lanes.values()} == {
        ("apns", OPEN, 20),
        ("fcm", OPEN, 20),
        ("hms", OPEN, 20),
    }
    stored = await dispatch.stored()
    assert [(one.platform, one.push_service, one.version, one.secret_file, one.problem) for one in stored] == [
        (IOS, "apns", 1, "", ""),
        (ANDROID, "fcm", 1, "", ""),
        (HUAWEI, "hms", 1, "", ""),
    ]
    assert len({one.fingerprint for one in stored}) == 3
    for platform in PLATFORMS:
        tested = await dispatch.test(platform)
        assert tested.works
        assert all(one.verdict == GOOD for one in tested.verdicts)


@each_platform
async def test_what_the_push_service_refuses_is_not_stored_unless_it_is_to_be(world: Pushing, platform: int) -> None:
    dispatch = await world.dispatch(work=False)
    stranger = world.vendors.credential(platform, trusted=False)
    refused = await refusal(dispatch.put(stranger.request()))
    reason = {IOS: "InvalidProviderToken", ANDROID: "oauth-invalid_grant", HUAWEI: "oauth-1101"}[common_pb2.Platform.ValueType(platform)]
    assert refused.code is CODE.FAILED_PRECONDITION
    assert refused.message.startswith(f"nothing was stored, because {stranger.push_service} does not take the credential. ")
    assert f"refused ({reason}), " in refused.message
    assert "--untested" in refused.message
    assert not await dispatch.stored()
    assert not await dispatch.lanes()

    assert not (await dispatch.put(stranger.request(untested=True))).verdicts
    assert len(await dispatch.stored()) == 1
    tested = await dispatch.test(platform)
    assert not tested.works
    assert (tested.verdicts[0].verdict, tested.verdicts[0].reason) == (REFUSED, reason)
    assert tested.verdicts[0].advice


@each_platform
async def test_a_push_service_that_cannot_be_asked_is_no_verdict(world: Pushing, platform: int) -> None:
    dispatch = await world.dispatch(work=False)
    new = world.vendors.credential(platform)
    world.vendors.simulator(platform).set_fault(Answer(503), requests=4)
    refused = await refusal(dispatch.put(new.request()))
    assert refused.code is CODE.FAILED_PRECONDITION
    assert "cannot be asked (status-503)" in refused.message
    assert not await dispatch.stored()
    world.vendors.simulator(platform).clear_faults()
    await dispatch.put(new.request())
    world.vendors.simulator(platform).set_fault(Answer(503), requests=4)
    tested = await dispatch.test(platform)
    assert not tested.works
    assert tested.verdicts[-1].verdict == UNKNOWN


async def test_a_key_for_one_environment_is_enough(world: Pushing) -> None:
    dispatch = await world.dispatch(work=False)
    world.vendors.running.apns.set_fault(Answer(403, "BadEnvironmentKeyInToken"), requests=1)
    answer = await dispatch.put(world.vendors.credential(IOS).request())
    assert {one.verdict for one in answer.verdicts} == {GOOD, REFUSED}


async def test_a_black_hole_is_answered_within_the_time_of_a_call(world: Pushing) -> None:
    """Both at once: what is tested in real time costs it."""
    dispatch = await world.dispatch(work=False)
    world.vendors.running.apns.set_fault(BlackHole(), requests=4)
    world.vendors.running.fcm.set_fault(BlackHole(), scope=FaultScope.TOKENS, requests=4)
    puts = [refusal(dispatch.put(world.vendors.credential(platform).request())) for platform in (IOS, ANDROID)]
    async with asyncio.timeout(LIMIT_S):
        apns, fcm = await asyncio.gather(*puts)
    assert apns.code is fcm.code is CODE.FAILED_PRECONDITION
    assert "cannot be asked (timeout)" in apns.message
    assert "cannot be asked (oauth-timeout)" in fcm.message


async def test_adding_twice_and_replacing_nothing_are_refused(world: Pushing) -> None:
    dispatch = await world.dispatch(work=False)
    nothing = await refusal(dispatch.put(world.vendors.credential(IOS).request(replace=True)))
    assert (nothing.code, "`sealpush providers add`" in nothing.message) == (CODE.NOT_FOUND, True)
    await dispatch.put(world.vendors.credential(IOS).request())
    twice = await refusal(dispatch.put(world.vendors.credential(IOS).request()))
    assert (twice.code, "`sealpush providers rotate`" in twice.message) == (CODE.ALREADY_EXISTS, True)
    for call in (dispatch.test(ANDROID), dispatch.remove(ANDROID), dispatch.test(IOS, "nobody"), dispatch.remove(IOS, "nobody")):
        assert (await refusal(call)).code is CODE.NOT_FOUND


async def test_two_operators_at_the_same_time_are_told(world: Pushing) -> None:
    dispatch, other = await world.dispatch(work=False), await world.dispatch(work=False)

    async def together(first: Any, second: Any) -> Refusal:
        results = await asyncio.gather(first, second, return_exceptions=True)
        [lost] = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]

        async def again() -> None:
            raise lost

        return await refusal(again())

    requests = [world.vendors.credential(IOS).request() for _ in range(4)]
    # All are tried before one is stored.
    world.vendors.running.apns.set_fault(Answer(503), requests=8)
    for request in requests:
        request.untested = True
    late = await together(dispatch.put(requests[0]), other.put(requests[1]))
    assert late.code is CODE.ALREADY_EXISTS
    for request in requests[2:]:
        request.replace = True
        request.untested = False
    world.vendors.running.apns.clear_faults()
    world.vendors.running.apns.set_fault(Delay(timedelta(milliseconds=200)), requests=100)
    late = await together(dispatch.put(requests[2]), other.put(requests[3]))
    assert late.code is CODE.ABORTED
    assert "`sealpush providers list`" in late.message
    [stored] = await dispatch.stored()
    assert stored.version == 2


async def test_what_is_not_given_stays_as_it_was(world: Pushing) -> None:
    dispatch = await world.dispatch(work=False)
    first = world.vendors.credential(IOS)
    ends_at = Timestamp(seconds=int(world.clock.now().timestamp()) + 90 * 86400)
    await dispatch.put(first.request(expires_at=ends_at))
    [before] = await dispatch.stored()
    assert gauge("sealpush_credential_expires_timestamp_seconds") == ends_at.seconds
    world.clock.advance(timedelta(seconds=1))
    # One value alone.
    await dispatch.put(first.request(push_service=None, settings={"topic": "ua.bank.other"}, secret=None, replace=True))
    [after] = await dispatch.stored()
    assert after.settings == dict(before.settings) | {"topic": "ua.bank.other"}
    assert (after.fingerprint, after.expires_at, after.created_at) == (before.fingerprint, before.expires_at, before.created_at)
    assert (before.version, after.version) == (1, 2)
    assert after.updated_at.ToDatetime() > before.updated_at.ToDatetime()
    # Of a new secret nobody has said when it ends.
    second = world.vendors.credential(IOS)
    await dispatch.put(second.request(replace=True))
    [after] = await dispatch.stored()
    assert after.fingerprint != before.fingerprint
    assert not after.HasField("expires_at")
    assert gauge("sealpush_credential_expires_timestamp_seconds") == float("inf")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"app_id": ""}, "app_id", "1 to 64"),
        ({"app_id": "Bank"}, "app_id", "a-z"),
        ({"app_id": "a\x00"}, "app_id", "a-z"),
        ({"platform": None}, "platform", "required"),
        ({"platform": -1}, "platform", "32767"),
        ({"platform": 40_000}, "platform", "32767"),
        ({"push_service": None}, "push_service", "apns, fcm, hms"),
        ({"push_service": "adm"}, "push_service", "apns, fcm, hms"),
        ({"settings": {"key_id": "K", "team_id": "T"}}, "settings", "needs topic"),
        ({"settings": {"key_id": "K", "team_id": "T", "topic": ""}}, "settings", "needs topic"),
        ({"settings": {"key_id": "K", "team_id": "T", "topic": "t", "project": "p"}}, "settings", "has no project"),
        ({"settings": {"key_id": "K", "team_id": "T", "topic": LONG}}, "settings", "topic must be"),
        ({"settings": {"key_id": "K", "team_id": "T", "topic": "a\nb"}}, "settings", "topic must be"),
        ({"settings": {"key_id": "K", "team_id": " T", "topic": "t"}}, "settings", "team_id must be"),
        ({"secret": None}, "credential", "needs its secret"),
        ({"secret": b""}, "credential", "private key on P-256"),
        ({"secret": b"hunter2"}, "credential", "private key on P-256"),
        ({"secret": b"x" * (SECRET_BYTES_MAX + 1)}, "secret", "65536"),
        ({"secret": None, "secret_file": "nothing.p8"}, "secret_file", "cannot be read"),
        ({"secret": None, "secret_file": "../vault.key"}, "secret_file", "name of a file"),
        ({"secret": None, "secret_file": "/etc/passwd"}, "secret_file", "name of a file"),
        ({"secret": None, "secret_file": ".."}, "secret_file", "name of a file"),
        ({"secret": None, "secret_file": "folder"}, "secret_file", "cannot be read"),
        ({"secret": None, "secret_file": "large.p8"}, "secret_file", "more than 65536"),
        ({"secret": None, "secret_file": "pipe"}, "secret_file", "is no file"),
        ({"expires_at": Timestamp(seconds=1)}, "expires_at", "ended already"),
        ({"expires_at": Timestamp(seconds=10**15)}, "expires_at", "years 1970 to 9999"),
        ({"expires_at": Timestamp(seconds=4_000_000_000, nanos=-1)}, "expires_at", "years 1970 to 9999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_requests_name_their_field_and_store_nothing(
    world: Pushing, mounted: Path, changes: dict[str, Any], field: str, words: str
) -> None:
    (mounted / "folder").mkdir()
    (mounted / "large.p8").write_bytes(b"x" * (SECRET_BYTES_MAX + 1))
    os.mkfifo(mounted / "pipe")
    dispatch = await world.dispatch(work=False)
    async with asyncio.timeout(LIMIT_S):
        refused = await refusal(dispatch.put(world.vendors.credential(IOS).request(**changes)))
    assert (refused.code, refused.field) == (CODE.INVALID_ARGUMENT, field)
    assert words in refused.message
    assert "hunter2" not in refused.message
    assert not await dispatch.stored()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"push_service": "fcm"}, "push_service", "remove its credential"),
        ({"expires_at": Timestamp(seconds=1)}, "expires_at", "ended already"),
        ({"secret": b"hunter2"}, "credential", "private key on P-256"),
        ({"settings": {"project": "p"}, "secret": None}, "settings", "has no project"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_replacements_name_their_field_and_leave_what_was(
    world: Pushing, changes: dict[str, Any], field: str, words: str
) -> None:
    dispatch = await world.dispatch(work=False)
    credential = world.vendors.credential(IOS)
    await dispatch.put(credential.request())
    before = await dispatch.stored()
    refused = await refusal(dispatch.put(credential.request(replace=True, **changes)))
    assert (refused.code, refused.field) == (CODE.INVALID_ARGUMENT, field)
    assert words in refused.message
    assert await dispatch.stored() == before


async def test_names_that_no_credential_can_have_are_not_found(world: Pushing) -> None:
    dispatch = await world.dispatch(work=False)
    for app_id, platform in (("a\x00", 1), (BANK, 40_000), (BANK, -70_000), ("", 0), ("x" * 5000, 1)):
        for call in (dispatch.test(platform, app_id), dispatch.remove(platform, app_id)):
            assert (await refusal(call)).code is CODE.NOT_FOUND


async def test_only_the_operator_may_call(world: Pushing, mesh: Mesh) -> None:
    dispatch = await world.dispatch(work=False)
    request = world.vendors.credential(IOS).request()
    requests: dict[str, Any] = {
        "PutProvider": request,
        "TestProvider": providers_pb2.TestProviderRequest(app_id=BANK, platform=IOS),
        "ListProviders": providers_pb2.ListProvidersRequest(),
        "RemoveProvider": providers_pb2.RemoveProviderRequest(app_id=BANK, platform=IOS),
    }
    for name in ("accounts", "registration", "keys", "publishing", "dispatch", "fetch"):
        channel = MeshChannel("dispatch", dispatch.peer.address, mesh.keys[name])
        for method, message in requests.items():
            call = getattr(ProvidersStub(channel.channel), method)
            assert (await refusal(call(message, metadata=channel.metadata()))).code is CODE.PERMISSION_DENIED
            assert (await refusal(call(message))).code is CODE.UNAUTHENTICATED
        await channel.aclose()
    assert not await dispatch.stored()


# While wake-ups flow


async def test_rotation_under_traffic_neither_loses_nor_duplicates(world: Pushing) -> None:
    dispatch = await world.dispatch(push_concurrency=32)
    credentials: list[Credential] = []
    for platform in PLATFORMS:
        credentials.append(world.vendors.credential(platform))
        await dispatch.put(credentials[-1].request())
        world.vendors.simulator(platform).set_fault(Delay(timedelta(milliseconds=30)), requests=100_000)
    messages: list[bytes] = []
    rotated = asyncio.Event()

    async def publish() -> None:
        while not rotated.is_set():
            for platform in PLATFORMS:
                messages.extend(await world.store(16, platform))

    publishing = asyncio.create_task(publish())
    for _ in range(3):
        for platform in PLATFORMS:
            before = (await dispatch.lane(platform)).accepted
            await dispatch.put(world.vendors.credential(platform).request(replace=True))
            await dispatch.lane_that(platform, lambda lane, before=before: lane.accepted > before)  # type: ignore[misc]  # a default argument
    rotated.set()
    await publishing
    rows = await world.pushed(messages)
    assert not [lane.errors for lane in (await dispatch.lanes()).values() if lane.errors]
    assert all(row["attempts"] == 1 for row in rows)
    ids = [world.vendors.sent_ids(platform) for platform in PLATFORMS]
    assert sum(map(len, ids)) == len(messages)
    assert all(count == 1 for counted in ids for count in counted.values())
    assert all(lane.state == OPEN for lane in (await dispatch.lanes()).values())


async def test_revoked_credentials_stop_their_lanes_with_advice_and_others_repair_them(world: Pushing) -> None:
    dispatch = await world.dispatch(push_concurrency=8)
    messages: list[bytes] = []
    for platform in PLATFORMS:
        old = world.vendors.credential(platform)
        await dispatch.put(old.request())
        messages += await world.store(20, platform)
        await dispatch.lane_that(platform, lambda lane: lane.accepted > 0)
        world.vendors.revoke(old)
        messages += await world.store(40, platform)
    for platform in PLATFORMS:
        stopped = await dispatch.lane_that(platform, lambda lane: lane.state == MISCONFIGURED)
        assert "sealpush providers rotate" in stopped.detail
        assert "Wake-ups stay queued" in stopped.detail
        assert stopped.HasField("next_try_at")
        assert not judge_lane(stopped).ok
        sent = world.vendors.simulator(platform).counters.requests
        tested = await dispatch.test(platform)
        assert not tested.works
        assert REFUSED in {one.verdict for one in tested.verdicts}
        # Nothing but the test was sent.
        assert world.vendors.simulator(platform).counters.requests - sent <= 2
    for platform in PLATFORMS:
        await dispatch.put(world.vendors.credential(platform).request(replace=True))
    # Also those that went out in vain are pushed soon.
    await world.pushed(messages, seconds=6)
    for lane in (await dispatch.lanes()).values():
        assert (lane.state, lane.accepted) == (OPEN, 60)
        assert judge_lane(lane).ok
    assert not world.directory.dead
    assert all(count == 1 for platform in PLATFORMS for count in world.vendors.sent_ids(platform).values())


async def test_tokens_of_another_app_are_set_aside_and_pushed_once_it_is_repaired(world: Pushing) -> None:
    """In all processes: none gives up again what is requeued through another."""
    dispatch = await world.dispatch()
    wrong = {
        IOS: ("ua.other.app", "DeviceTokenNotForTopic"),
        ANDROID: ("demo-other", "SENDER_ID_MISMATCH"),
        HUAWEI: ("104000009", "80300007"),
    }
    # So many that one of the two processes gets enough to be suspicious.
    count = 3 * STRANGERS_MAX
    stored = {}
    for platform, (topic, _) in wrong.items():
        await dispatch.put(world.vendors.credential(platform, topic).request())
    other = await world.dispatch()
    for platform in PLATFORMS:
        stored[platform] = await world.store(count, platform)
    tokens = dict(world.directory.targets)
    for platform, (_, reason) in wrong.items():
        rows = await world.until(stored[platform], lambda row: row["quarantined"])
        assert {row["detail"] for row in rows} == {reason}
        lanes = [await each.lane(platform) for each in (dispatch, other)]
        assert sum(lane.quarantined for lane in lanes) == count
        assert all((lane.state, lane.dead_tokens) == (OPEN, 0) for lane in lanes)
        lane = max(lanes, key=lambda lane: lane.quarantined)
        assert lane.is_suspicious
        assert "Nothing was forgotten; repair it, then `sealpush lanes requeue`" in lane.detail
        assert not judge_lane(lane).ok
    assert world.directory.targets == tokens
    assert not world.directory.dead

    for platform in PLATFORMS:
        await dispatch.put(world.vendors.credential(platform).request(replace=True))
    assert await asyncio.gather(*(dispatch.requeue(platform) for platform in PLATFORMS)) == [count] * 3
    for platform in PLATFORMS:
        await world.pushed(stored[platform])
        lanes = [await each.lane(platform) for each in (dispatch, other)]
        assert sum(lane.accepted for lane in lanes) == count
        assert not any(lane.is_suspicious for lane in lanes)
    assert world.directory.targets == tokens


async def test_a_lane_that_is_stuck_or_refused_slows_no_other(world: Pushing) -> None:
    dispatch = await world.dispatch()
    credentials = {platform: world.vendors.credential(platform) for platform in PLATFORMS}
    for credential in credentials.values():
        await dispatch.put(credential.request())
    world.vendors.running.fcm.set_fault(BlackHole(), requests=10_000)
    world.vendors.revoke(credentials[HUAWEI])
    stuck = await world.store(300, ANDROID) + await world.store(300, HUAWEI)
    await dispatch.lane_that(ANDROID, lambda lane: lane.in_flight == 256)
    await dispatch.lane_that(HUAWEI, lambda lane: lane.state == MISCONFIGURED)
    await world.pushed(await world.store(500), seconds=5)
    assert not any(row["state"] == common_pb2.STATE_PUSHED for row in await world.deliveries(stuck))
    assert (await dispatch.lane(ANDROID)).in_flight == 256
    assert (await dispatch.lane(IOS)).state == OPEN


async def test_removal_sends_back_what_is_held_until_there_is_another(world: Pushing) -> None:
    dispatch = await world.dispatch(push_concurrency=64)
    await dispatch.put(world.vendors.credential(IOS).request())
    world.vendors.running.apns.set_fault(Delay(timedelta(milliseconds=200)), requests=100_000)
    messages = await world.store(300)
    await dispatch.lane_that(IOS, lambda lane: lane.accepted > 0)
    await dispatch.remove(IOS)
    assert not await dispatch.stored()
    assert (await dispatch.lanes()) == {}
    # What was under way is reported, the rest goes back.
    rows = await world.until(messages, lambda row: row["session_id"] is None)
    states = [row["state"] for row in rows]
    assert set(states) == {common_pb2.STATE_PUSHED, common_pb2.STATE_QUEUED}
    assert states.count(common_pb2.STATE_PUSHED) == len(world.vendors.sent_ids(IOS))
    world.vendors.running.apns.clear_faults()
    await dispatch.put(world.vendors.credential(IOS).request())
    await world.pushed(messages, seconds=6)
    ids = world.vendors.sent_ids(IOS)
    assert len(ids) == 300
    assert all(count == 1 for count in ids.values())
    # As before also for whoever looks at it.
    assert (gauge("sealpush_lane_open"), gauge("sealpush_lane_held"), gauge("sealpush_lane_in_flight")) == (1, 0, 0)
    assert gauge("sealpush_credential_usable") == 1


async def test_lane_comes_back_also_when_the_mailbox_was_away_meanwhile(world: Pushing) -> None:
    """What the mailbox was told of a lane that is gone, it has forgotten."""
    dispatch = await world.dispatch()
    await dispatch.put(world.vendors.credential(IOS).request())
    await dispatch.put(world.vendors.credential(ANDROID).request())
    await world.pushed(await world.store(1))
    await dispatch.remove(IOS)
    await world.mailbox.stop()
    await world.mailbox.start()
    await world.pushed(await world.store(1, ANDROID))
    await dispatch.put(world.vendors.credential(IOS).request())
    await world.pushed(await world.store(5), seconds=5)


async def test_restart_keeps_credentials_and_lanes(world: Pushing) -> None:
    dispatch = await world.dispatch()
    for platform in PLATFORMS:
        await dispatch.put(world.vendors.credential(platform).request())
    await dispatch.pause(HUAWEI)
    before = await dispatch.stored()
    await dispatch.stop()
    again = await world.dispatch()
    assert await again.stored() == before
    assert {platform: (await again.lane(platform)).state for platform in PLATFORMS} == {IOS: OPEN, ANDROID: OPEN, HUAWEI: PAUSED}
    await world.pushed(await world.store(5) + await world.store(5, ANDROID))


async def test_paused_lane_stays_paused_when_its_credential_comes_anew(world: Pushing) -> None:
    dispatch = await world.dispatch()
    await dispatch.put(world.vendors.credential(IOS).request())
    await dispatch.pause(IOS)
    await dispatch.remove(IOS)
    await dispatch.stop()
    again = await world.dispatch()
    [message] = await world.store(1)
    await again.put(world.vendors.credential(IOS).request())
    probes = len(world.vendors.running.apns.received)
    lane = await again.lane(IOS)
    assert lane.state == PAUSED
    assert lane.detail.startswith("paused by operator")
    # Another lane's wake-up comes through, this one's does not.
    await again.put(world.vendors.credential(ANDROID).request())
    await world.pushed(await world.store(1, ANDROID))
    assert len(world.vendors.running.apns.received) == probes
    await again.resume(IOS)
    await world.now()
    await world.pushed([message])


class Held:
    """A push service whose answers wait."""

    name = "apns"
    topic = TOPIC

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.asked = 0
        self.answers = asyncio.Event()

    async def send(self, target: PushTarget, wake_up: WakeUp) -> Outcome:
        self.asked += 1
        await self.answers.wait()
        return self.outcome

    async def probe(self) -> Sequence[Probed]:
        return [Probed("send", self.outcome)]

    def forget_failures(self) -> None:
        """It remembers none."""

    def advise(self, reason: str) -> str:
        return f"advice on {reason}"

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    "last_word", [TokenSuspect("SENDER_ID_MISMATCH"), Misconfigured("InvalidProviderToken")], ids=lambda one: one.reason
)
async def test_last_word_of_a_credential_that_was_replaced_holds_nothing_against_the_new_one(world: Pushing, last_word: Outcome) -> None:
    old, new = Held(last_word), Held(Accepted())
    new.answers.set()
    lanes = LaneSet(256, world.clock, lambda: 0.0)
    lane = lanes.put(BANK, IOS)
    lane.use(old)
    mailbox = MeshChannel("fetch", world.mailbox.address, world.mesh.keys["dispatch"])
    registration = MeshChannel("registration", world.settings.registration_mesh, world.mesh.keys["dispatch"])
    dispatcher = Dispatcher(lanes, mailbox, registration, world.clock, lambda: 0.0, drain_limit=timedelta(seconds=1))
    task = asyncio.create_task(dispatcher.run())
    messages = await world.store(10)
    async with asyncio.timeout(LIMIT_S):
        while old.asked < 10:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
    lane.use(new)
    old.answers.set()
    await world.pushed(messages)
    assert (lane.state, lane.is_suspicious, lane.counts.accepted) == (LaneState.OPEN, False, 10)
    await dispatcher.drain()
    await task
    for channel in (mailbox, registration):
        await channel.aclose()


# Several dispatch processes


async def test_every_process_follows_and_none_keeps_what_was_replaced(world: Pushing) -> None:
    one = await world.dispatch()
    first = world.vendors.credential(IOS)
    await one.put(first.request())
    await one.put(world.vendors.credential(ANDROID).request(SHOP))
    other = await world.dispatch()
    await world.pushed(await world.store(50))
    # Removed and added anew, faster than others look.
    await one.remove(IOS)
    await one.put(world.vendors.credential(IOS).request())
    await one.put(world.vendors.credential(HUAWEI).request())
    await one.remove(ANDROID, SHOP)
    world.vendors.revoke(first)
    await one.stop()
    await other.lane_that(HUAWEI, lambda lane: lane.state == OPEN)
    messages = await world.store(20) + await world.store(20, HUAWEI)
    rows = await world.pushed(messages)
    assert all(row["attempts"] == 1 for row in rows)
    assert {(lane.app_id, lane.platform, lane.state) for lane in (await other.lanes()).values()} == {
        (BANK, IOS, OPEN),
        (BANK, HUAWEI, OPEN),
    }


# Mounted files


async def test_mounted_file_is_taken_over_whenever_it_changes(world: Pushing, mounted: Path) -> None:
    dispatch = await world.dispatch()
    first, second, third = (world.vendors.credential(ANDROID) for _ in range(3))
    (mounted / "fcm.json").write_bytes(first.secret)
    await dispatch.put(first.request(secret=None, secret_file="fcm.json"))
    [stored] = await dispatch.stored()
    assert (stored.secret_file, stored.version) == ("fcm.json", 1)
    prints = [await fingerprint(dispatch)]
    messages = await world.store(5, ANDROID)
    await world.pushed(messages)

    # Replaced atomically.
    (mounted / "new").write_bytes(second.secret)
    (mounted / "new").rename(mounted / "fcm.json")
    world.vendors.revoke(first)
    await dispatch.resume(ANDROID)
    prints.append(await fingerprint(dispatch))
    await world.pushed(await world.store(5, ANDROID))

    # Broken: the one before stays in use, and says so.
    (mounted / "fcm.json").write_bytes(third.secret[:100])
    await dispatch.resume(ANDROID)
    await world.pushed(await world.store(5, ANDROID))
    lane, [stored] = await dispatch.lane(ANDROID), await dispatch.stored()
    assert (lane.state, lane.is_suspicious) == (OPEN, True)
    assert "the service account must be the JSON file" in lane.detail
    assert stored.problem.startswith("the service account must be the JSON file")
    assert not judge_credential(stored, world.clock.now()).ok
    assert not judge_lane(lane).ok
    assert gauge("sealpush_credential_usable", "android") == 0
    for break_file in ((mounted / "fcm.json").unlink, (mounted / "fcm.json").mkdir):
        break_file()
        await dispatch.resume(ANDROID)
        [stored] = await dispatch.stored()
        assert "cannot be read" in stored.problem
        assert (stored.fingerprint, str(mounted / "fcm.json") in stored.problem) == ("", True)
        await world.pushed(await world.store(2, ANDROID))
    (mounted / "fcm.json").rmdir()
    (mounted / "fcm.json").write_bytes(b"x" * (SECRET_BYTES_MAX + 1))
    await dispatch.resume(ANDROID)
    assert "more than 65536 bytes" in (await dispatch.stored())[0].problem

    # Whole again.
    (mounted / "fcm.json").write_bytes(third.secret)
    world.vendors.revoke(second)
    await dispatch.resume(ANDROID)
    prints.append(await fingerprint(dispatch))
    await world.pushed(await world.store(5, ANDROID))
    lane, [stored] = await dispatch.lane(ANDROID), await dispatch.stored()
    assert (lane.state, lane.is_suspicious, stored.problem) == (OPEN, False, "")
    assert gauge("sealpush_credential_usable", "android") == 1
    assert len(set(prints)) == 3
    assert not lane.errors


async def test_mounted_file_that_the_push_service_refuses_leaves_the_one_before_in_use(world: Pushing, mounted: Path) -> None:
    dispatch = await world.dispatch()
    first, stranger = world.vendors.credential(IOS), world.vendors.credential(IOS, trusted=False)
    (mounted / "key.p8").write_bytes(first.secret)
    await dispatch.put(first.request(secret=None, secret_file="key.p8"))
    (mounted / "key.p8").write_bytes(stranger.secret)
    await dispatch.resume(IOS)
    lane, [stored] = await dispatch.lane(IOS), await dispatch.stored()
    assert (lane.state, lane.is_suspicious) == (OPEN, True)
    assert stored.problem.startswith("apns does not take the new file. production: refused (InvalidProviderToken)")
    await world.pushed(await world.store(3))
    asked = world.vendors.running.apns.counters.requests
    await dispatch.resume(IOS)
    assert world.vendors.running.apns.counters.requests == asked, "what was refused is not asked again at once"
    (mounted / "key.p8").write_bytes(first.secret)
    await dispatch.resume(IOS)
    lane, [stored] = await dispatch.lane(IOS), await dispatch.stored()
    assert (lane.is_suspicious, stored.problem) == (False, "")


async def test_mounted_file_is_followed_as_kubernetes_swaps_it(world: Pushing, mounted: Path) -> None:
    """A secret's volume: the file is a link into `..data`, and `..data` a link that is renamed over."""
    dispatch = await world.dispatch()
    first, second = world.vendors.credential(IOS), world.vendors.credential(IOS)
    for name, credential in (("..2026_01", first), ("..2026_02", second)):
        (mounted / name).mkdir()
        (mounted / name / "key.p8").write_bytes(credential.secret)
        # The same time and size in both.
        os.utime(mounted / name / "key.p8", ns=(10**18, 10**18))
    assert len(first.secret) == len(second.secret)
    (mounted / "..data").symlink_to("..2026_01")
    (mounted / "key.p8").symlink_to("..data/key.p8")
    await dispatch.put(first.request(secret=None, secret_file="key.p8"))
    before = await fingerprint(dispatch)
    await world.pushed(await world.store(3))
    (mounted / "..data_tmp").symlink_to("..2026_02")
    (mounted / "..data_tmp").rename(mounted / "..data")
    # The second key under the same id: the first is refused from now on.
    world.vendors.running.apns.register_provider_key(TEAM, first.known_as, second.public_key)
    assert await fingerprint(dispatch) != before
    # Seen without anybody's doing.
    await world.pushed(await world.store(3), seconds=8)


async def test_credential_moves_between_store_and_file(world: Pushing, mounted: Path) -> None:
    dispatch = await world.dispatch(work=False)
    credential = world.vendors.credential(HUAWEI)
    (mounted / "hms.json").write_bytes(credential.secret)
    await dispatch.put(credential.request())
    stored = await fingerprint(dispatch)
    await dispatch.put(credential.request(secret=None, secret_file="hms.json", replace=True))
    [in_file] = await dispatch.stored()
    assert (in_file.secret_file, in_file.fingerprint) == ("hms.json", stored)
    assert await world.rows.fetchval("SELECT secret FROM dispatch.providers WHERE deleted_at IS NULL") is None
    await dispatch.put(credential.request(replace=True))
    assert (await dispatch.stored())[0].secret_file == ""


async def test_process_without_the_folder_or_the_file_says_so_and_pushes_nothing(world: Pushing, mounted: Path, tmp_path: Path) -> None:
    dispatch = await world.dispatch(work=False)
    credential = world.vendors.credential(IOS)
    (mounted / "key.p8").write_bytes(credential.secret)
    await dispatch.put(credential.request(secret=None, secret_file="key.p8"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, words in ((None, "SEALPUSH_CREDENTIALS names no folder"), (empty, "cannot be read (No such file or directory)")):
        other = await world.dispatch(work=False, credentials=folder)
        [stored], lane = await other.stored(), await other.lane(IOS)
        assert words in stored.problem
        assert stored.fingerprint == ""
        assert (lane.state, lane.push_service) == (MISCONFIGURED, "")
        assert words in lane.detail
        assert "ake-ups stay queued" in lane.detail
        tested = await refusal(other.test(IOS))
        assert (tested.code, words in tested.message) == (CODE.FAILED_PRECONDITION, True)
        assert not judge_credential(stored, world.clock.now()).ok
        assert not judge_lane(lane).ok
        await other.stop()


# The vault


async def test_secret_is_stored_encrypted_and_belongs_to_its_row(world: Pushing) -> None:
    dispatch = await world.dispatch()
    ios, shop = world.vendors.credential(IOS), world.vendors.credential(IOS)
    await dispatch.put(ios.request())
    await dispatch.put(shop.request(SHOP))
    for row in await world.rows.fetch("SELECT * FROM dispatch.providers"):
        assert not any(line.encode() in row["secret"] for line in ios.secrets + shop.secrets)
        assert "PRIVATE" not in row["settings"]
    # Somebody with a hand in the database puts one app's key into another's row.
    await world.rows.execute(
        "UPDATE dispatch.providers SET version = version + 1,"
        " secret = (SELECT secret FROM dispatch.providers WHERE app_id = 'shop') WHERE app_id = 'bank'"
    )
    await dispatch.resume(IOS)
    stored = {one.app_id: one for one in await dispatch.stored()}
    assert "cannot be opened" in stored[BANK].problem
    assert "`sealpush providers rotate`" in stored[BANK].problem
    assert (stored[BANK].fingerprint, stored[SHOP].problem) == ("", "")
    # What was in use stays in use.
    await world.pushed(await world.store(3))
    await dispatch.put(world.vendors.credential(IOS).request(replace=True))
    assert [one.problem for one in await dispatch.stored()] == ["", ""]
    # Nothing of a removed one is left.
    await dispatch.remove(IOS, SHOP)
    assert await world.rows.fetchval("SELECT secret FROM dispatch.providers WHERE app_id = 'shop'") == b""


async def test_process_with_another_vault_key_does_not_start(world: Pushing, tmp_path: Path) -> None:
    dispatch = await world.dispatch(work=False)
    await dispatch.put(world.vendors.credential(IOS).request())
    wrong = tmp_path / "wrong.key"
    wrong.write_text("a5" * 32)
    with pytest.raises(VaultError, match="is the vault key file the one it was written with"):
        await world.dispatch(vault_key=wrong)


# What is told


async def test_no_secret_is_told_to_anybody(world: Pushing, mounted: Path) -> None:
    told: list[str] = []
    credentials = [world.vendors.credential(platform, trusted=trusted) for platform in PLATFORMS for trusted in (False, True, True)]
    with structlog.testing.capture_logs() as logs:
        dispatch = await world.dispatch()
        for stranger, first, second in zip(*[iter(credentials)] * 3, strict=True):
            told.append(str(await refusal(dispatch.put(stranger.request()))))
            half = first.secret[: len(first.secret) // 2]
            told.append(str(await refusal(dispatch.put(first.request(secret=half)))))
            told.append(str(await dispatch.put(stranger.request(untested=True))))
            world.vendors.credential(first.platform)
            told.append(str(await dispatch.put(first.request(replace=True, untested=True))))
            world.vendors.revoke(first)
            await world.store(3, first.platform)
            await dispatch.lane_that(first.platform, lambda lane: lane.state == MISCONFIGURED)
            told.append(str(await dispatch.test(first.platform)))
            name = f"{first.push_service}.secret"
            (mounted / name).write_bytes(second.secret)
            told.append(str(await dispatch.put(second.request(secret=None, secret_file=name, replace=True, untested=True))))
            (mounted / name).write_bytes(second.secret[:-20])
            await dispatch.resume(second.platform)
            told += [str(await dispatch.stored()), str(await dispatch.lanes())]
            await dispatch.remove(second.platform)
        await dispatch.stop()
    everything = "\n".join([*told, *(json.dumps(entry, default=repr) for entry in logs)])
    assert "a stored credential cannot be used" in everything
    assert "a lane is stopped" in everything
    for credential in credentials:
        for secret in credential.secrets:
            assert secret not in everything
            assert repr(secret.encode()) not in everything
    for target in world.directory.targets.values():
        assert target.push_token not in everything


async def test_metrics_tell_the_end_and_the_use_of_a_credential(world: Pushing) -> None:
    dispatch = await world.dispatch(work=False)
    ends_at = Timestamp(seconds=int(world.clock.now().timestamp()) + 86400)
    await dispatch.put(world.vendors.credential(IOS).request(expires_at=ends_at))
    assert gauge("sealpush_credential_expires_timestamp_seconds") == ends_at.seconds
    assert gauge("sealpush_credential_usable") == 1
    # It ends, and stays in use: the push service decides.
    world.clock.advance(timedelta(days=2))
    await dispatch.resume(IOS)
    [stored] = await dispatch.stored()
    check = judge_credential(stored, world.clock.now())
    assert (stored.problem, check.ok) == ("", False)
    assert "ended on" in check.text
    await dispatch.remove(IOS)
    for name in ("sealpush_credential_expires_timestamp_seconds", "sealpush_credential_usable", "sealpush_lane_open"):
        assert gauge(name) is None


async def test_operator_at_a_terminal_sets_up_rotates_and_looks(
    world: Pushing, tmp_path: Path, capsys: pytest.CaptureFixture[str], mesh: Mesh
) -> None:
    """The command line against what really runs."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    # Nothing is logged to the terminal that the command writes to.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    dispatch = await world.dispatch()
    raw = mesh.keys["operator"]._private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    key = tmp_path / "operator.key"
    key.write_text(raw.hex())
    at = ["--operator-key", str(key), "--dispatch", dispatch.peer.address]

    async def sealpush(*arguments: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(run, arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    first, second = world.vendors.credential(IOS), world.vendors.credential(IOS)
    p8 = tmp_path / "key.p8"
    p8.write_bytes(first.secret)
    ids = ["--key-id", first.known_as, "--team-id", TEAM, "--topic", TOPIC]
    assert await sealpush("providers", "list", *at) == (0, "there are none: put one with `sealpush providers add`\n", "")
    code, out, err = await sealpush("providers", "add", BANK, "ios", "--secret-file", str(p8), *ids, "--expires", "2099-01-31", *at)
    assert (code, err) == (0, "")
    assert out == "good     production\ngood     sandbox\nadded: bank on ios; every dispatch process uses it within seconds\n"
    code, out, err = await sealpush("providers", "add", BANK, "ios", "--secret-file", str(p8), *ids, *at)
    assert (code, out) == (1, "")
    assert err == "sealpush: the lane has a credential already: `sealpush providers rotate`\n"
    p8.write_bytes(second.secret)
    code, out, err = await sealpush("providers", "rotate", BANK, "ios", "--secret-file", str(p8), *at)
    assert (code, out) == (1, "")
    assert err.startswith(
        "sealpush: nothing was stored, because apns does not take the credential. production: refused (InvalidProviderToken)"
    )
    assert len(err.splitlines()) == 1
    code, out, err = await sealpush("providers", "rotate", BANK, "ios", "--secret-file", str(p8), "--key-id", second.known_as, *at)
    assert (code, err) == (0, "")
    assert out.endswith("replaced: bank on ios; every dispatch process uses it within seconds\n")
    assert await sealpush("providers", "test", BANK, "ios", *at) == (
        0,
        "good     production\ngood     sandbox\nthe credential works\n",
        "",
    )
    code, out, err = await sealpush("providers", "list", "--json", *at)
    [listed] = json.loads(out)
    assert (listed["app_id"], listed["platform"], listed["version"], listed["expires_at"], listed["problem"]) == (
        BANK,
        "ios",
        2,
        None,
        None,
    )

    await world.pushed(await world.store(3))
    await world.store(2, HUAWEI)
    assert (await sealpush("lanes", "pause", BANK, "ios", *at))[:2] == (0, "paused: bank on ios\n")
    code, out, err = await sealpush("lanes", *at, "--fetch", world.mailbox.address)
    assert (code, err) == (0, "")
    assert re.search(r"^bank +ios +apns +PAUSED +0 +- +0 +0 +256 +0\.\d +3$", out, re.MULTILINE)
    assert re.search(r"^bank +huawei +- +NO LANE +2 +\d s +0 +- +- +- +-$", out, re.MULTILINE)
    assert "nothing pushes it; put a credential with `sealpush providers add bank huawei`" in out
    assert (await sealpush("lanes", "resume", BANK, "ios", *at))[:2] == (0, "resumed: bank on ios\n")
    assert (await sealpush("providers", "remove", BANK, "ios", *at))[:2] == (0, "removed: bank on ios\n")
    code, out, err = await sealpush("providers", "remove", BANK, "ios", *at)
    assert (code, out) == (1, "")
    assert err.startswith("sealpush: the lane has no credential")
