import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sealpush.v1 import common_pb2
from sealpushd.cli.checks import (
    check_certificate,
    check_entries,
    check_health,
    check_port,
    check_push,
    check_service_clock,
    judge_clock,
    judge_credential,
    judge_entry,
    judge_lane,
    judge_partitions,
)
from sealpushd.platform.clockwatch import ClockWatch
from sealpushd.platform.metrics import serve_metrics
from sealpushd.platform.tls import CERTIFICATE_LIFETIME, LocalAuthority
from sealpushd.up.ports import Ports
from sealpushd.v1 import lanes_pb2, mailbox_pb2
from sealpushd.v1.administration_pb2 import EntryInUse, GetEndingEntriesResponse
from sealpushd.v1.providers_pb2 import ListProvidersResponse, StoredProvider
from tests.clocks import FakeClock
from tests.unit.cli.answering import answering

NOW = datetime(2026, 11, 18, 12, tzinfo=UTC)  # in ISO week 47


@pytest.mark.parametrize(("last", "ok"), [("2026w52", True), ("2026w49", True), ("2026w48", False), ("2026w30", False), (None, False)])
def test_partitions_must_reach_two_weeks_ahead(last: str | None, ok: bool) -> None:
    check = judge_partitions(last, NOW)
    assert check.ok is ok
    assert ok or "sealpush db" in check.text


def test_a_certificate_near_its_end_is_reported(tmp_path: Path) -> None:
    certificate, _ = LocalAuthority(tmp_path).issue("services")
    now = datetime.now(UTC)
    assert check_certificate(certificate, now).ok
    assert not check_certificate(certificate, now + CERTIFICATE_LIFETIME - timedelta(days=5)).ok
    assert not check_certificate(tmp_path / "nothing.pem", now).ok


async def test_a_service_that_is_not_there_fails_its_checks(free_base_port: int) -> None:
    port = Ports(free_base_port).of("fetch", "mesh")
    log = Path("data/log/fetch.log")
    for check in (await check_health("fetch", f"127.0.0.1:{port}", log), await check_port("fetch", "127.0.0.1", port, log)):
        assert not check.ok
        assert str(log) in check.text


def stored(ends_at: datetime | None = None, problem: str = "") -> StoredProvider:
    made = StoredProvider(app_id="bank", platform=common_pb2.PLATFORM_HUAWEI, push_service="hms", problem=problem)
    if ends_at is not None:
        made.expires_at.FromDatetime(ends_at)
    return made


@pytest.mark.parametrize(
    ("credential", "ok", "text"),
    [
        (stored(), True, "hms, in use; nobody said when it ends (--expires)"),
        (stored(NOW + timedelta(days=31)), True, "hms, in use, good until 2026-12-19"),
        (stored(NOW + timedelta(days=29)), False, "ends on 2026-12-17: put a new one with `sealpush providers rotate bank huawei`"),
        (stored(NOW), False, "ended on 2026-11-18: put a new one with `sealpush providers rotate bank huawei`"),
        (stored(NOW - timedelta(days=400)), False, "ended on 2025-10-14: put a new one with `sealpush providers rotate bank huawei`"),
        (stored(NOW + timedelta(days=400), "the file cannot be read"), False, "what is stored is not in use: the file cannot be read"),
    ],
    ids=["endless", "long", "short", "now", "over", "unusable"],
)
def test_a_credential_must_be_in_use_and_last_for_a_month(credential: StoredProvider, ok: bool, text: str) -> None:
    check = judge_credential(credential, NOW)
    assert (check.ok, check.name, check.text) == (ok, "credential bank huawei", text)
    assert check.line.startswith("ok  " if ok else "FAIL")


@pytest.mark.parametrize(
    ("state", "suspicious", "ok"),
    [
        (lanes_pb2.LANE_STATE_OPEN, False, True),
        (lanes_pb2.LANE_STATE_OPEN, True, False),
        (lanes_pb2.LANE_STATE_PAUSED, False, True),
        (lanes_pb2.LANE_STATE_BROKEN, False, False),
        (lanes_pb2.LANE_STATE_MISCONFIGURED, False, False),
        # What a newer dispatch says and this program does not know is no good news.
        (lanes_pb2.LANE_STATE_UNSPECIFIED, False, False),
        (77, False, False),
    ],
)
def test_a_lane_is_well_when_it_pushes_or_somebody_paused_it(state: Any, suspicious: bool, ok: bool) -> None:
    lane = lanes_pb2.Lane(app_id="bank", platform=common_pb2.PLATFORM_IOS, state=state, is_suspicious=suspicious, detail="how it is")
    check = judge_lane(lane)
    assert (check.ok, check.name, check.text) == (ok, "lane bank ios", "how it is")


async def test_a_dispatch_that_is_not_there_fails_the_check_of_the_lanes(free_base_port: int, tmp_path: Path) -> None:
    key, log = tmp_path / "operator.key", Path("data/log/dispatch.log")
    key.write_text("07" * 32)
    [check] = await check_push(f"127.0.0.1:{free_base_port}", f"127.0.0.1:{free_base_port}", key, log)
    assert (check.ok, check.name) == (False, "lanes")
    assert str(log) in check.text


async def test_every_credential_and_lane_is_checked(tmp_path: Path) -> None:
    with answering(tmp_path) as installation:
        installation.answers.given |= {
            "ListProviders": ListProvidersResponse(providers=[stored(problem="the file cannot be read")]),
            "ListLanes": lanes_pb2.ListLanesResponse(lanes=[lanes_pb2.Lane(app_id="bank", platform=common_pb2.PLATFORM_HUAWEI)]),
            "GetQueues": mailbox_pb2.GetQueuesResponse(
                queues=[
                    mailbox_pb2.Queue(app_id="bank", platform=common_pb2.PLATFORM_HUAWEI, waiting=1),
                    mailbox_pb2.Queue(app_id="bank", platform=common_pb2.PLATFORM_RUSTORE, waiting=3),
                ]
            ),
        }
        checks = await check_push(installation.address, installation.address, installation.key, tmp_path / "log")
    assert [(check.ok, check.name) for check in checks] == [
        (False, "credential bank huawei"),
        (False, "lane bank huawei"),
        (False, "lane bank rustore"),
    ]
    assert "3 wait and nothing pushes them" in checks[2].text


def ending(days: float, sender_id: bytes = b"") -> EntryInUse:
    entry = EntryInUse(sender_id=sender_id, display_name="Bank" if sender_id else "Sealpush", root_public_key=b"\x07" * 32)
    entry.ends_at.FromDatetime(NOW + timedelta(days=days))
    return entry


@pytest.mark.parametrize(
    ("entry", "name", "text"),
    [
        (
            ending(3),
            "entry of the platform",
            "ends on 2026-11-21: sign another with the root 0707070707070707… (`sealpush root certify-platform`)",
        ),
        (ending(-3, bytes(16)), "entry of Bank", "ended on 2026-11-15: sign another with the root 0707070707070707…"),
        (ending(0, bytes(16)), "entry of Bank", "ended on 2026-11-18: sign another"),
    ],
    ids=["platform", "over", "now"],
)
def test_an_entry_that_ends_soon_is_told_with_what_to_do(entry: EntryInUse, name: str, text: str) -> None:
    check = judge_entry(entry, NOW)
    assert (check.ok, check.name) == (False, name)
    assert check.text.startswith(text)
    assert f"then `sealpush accounts put-{'sender' if entry.sender_id else 'platform'}`" in check.text


async def test_entries_are_asked_for_two_weeks_ahead(tmp_path: Path, free_base_port: int) -> None:
    with answering(tmp_path) as installation:
        [well] = await check_entries(installation.address, installation.key, tmp_path / "log", NOW)
        assert (well.ok, well.text) == (True, "none ends within 14 days")
        assert installation.answers.asked[-1].before.ToDatetime(UTC) == NOW + timedelta(days=14)
        installation.answers.given["GetEndingEntries"] = GetEndingEntriesResponse(entries=[ending(1), ending(2, bytes(16))])
        checks = await check_entries(installation.address, installation.key, tmp_path / "log", NOW)
        assert [check.ok for check in checks] == [False, False]
    [away] = await check_entries(f"127.0.0.1:{free_base_port}", installation.key, Path("data/log/accounts.log"), NOW)
    assert not away.ok
    assert "data/log/accounts.log" in away.text


@pytest.mark.parametrize(
    ("metrics", "ok", "text"),
    [
        ({"seconds": 1000.2, "since_move_seconds": math.inf}, True, "200 ms"),
        ({"seconds": 1011, "since_move_seconds": math.inf}, False, "by 11.0 s: set both by NTP"),
        ({"seconds": 989, "since_move_seconds": math.inf}, False, "by -11.0 s"),
        ({"seconds": 1000, "since_move_seconds": math.inf, "database_ahead_seconds": -2400}, False, "PostgreSQL's by 2400.0 s"),
        ({"seconds": 1000, "since_move_seconds": 90, "moved_by_seconds": -2400}, False, "was set back by 0:40:00, 0:01:30 ago"),
        ({"seconds": 1000, "since_move_seconds": 90, "moved_by_seconds": 86400}, False, "was set forward by 1 day, 0:00:00"),
        ({"seconds": 1000, "since_move_seconds": 7200, "moved_by_seconds": 2400}, True, "0 ms"),
        ({}, False, "another version"),
    ],
)
def test_a_clock_that_differs_or_was_set_lately_is_told(metrics: dict[str, float], ok: bool, text: str) -> None:
    check = judge_clock("clock fetch", {f"sealpush_clock_{name}": value for name, value in metrics.items()}, 1000)
    assert check.ok is ok
    assert text in check.text


async def test_the_clock_of_a_running_service_is_read_from_its_metrics() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    port = serve_metrics("127.0.0.1", 0)
    assert (await check_service_clock("fetch", f"127.0.0.1:{port}")).ok
    clock.jump(timedelta(minutes=40))
    assert "differs from this machine's by 2" in (await check_service_clock("fetch", f"127.0.0.1:{port}")).text
    watch.look()
    clock.jump(timedelta(minutes=-40))
    watch.look()
    assert "was set back by 0:40:00" in (await check_service_clock("fetch", f"127.0.0.1:{port}")).text


async def test_a_service_whose_metrics_cannot_be_asked_fails_the_check_of_its_clock(free_base_port: int) -> None:
    assert not (await check_service_clock("fetch", f"127.0.0.1:{free_base_port}")).ok
