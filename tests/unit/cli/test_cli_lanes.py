"""What an operator sees of `sealpush lanes`, word for word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.v1 import common_pb2
from sealpushd.cli.app import run
from sealpushd.cli.lanes import _seconds
from sealpushd.platform.errors import NotFound, Unavailable
from sealpushd.platform.settings import Settings
from sealpushd.v1 import lanes_pb2 as pb
from sealpushd.v1 import mailbox_pb2
from tests.unit.cli.answering import Installation, answering

IOS, ANDROID, HUAWEI = common_pb2.PLATFORM_IOS, common_pb2.PLATFORM_ANDROID, common_pb2.PLATFORM_HUAWEI
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SEALPUSH_{name.upper()}", raising=False)
    monkeypatch.delenv("SEALPUSH_CONFIG", raising=False)
    # No `up` runs there.
    monkeypatch.setenv("SEALPUSH_DATA_DIR", str(tmp_path))


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    with answering(tmp_path) as made:
        yield made


def ago(by: timedelta) -> Timestamp:
    """In the middle of what is shown as one number, so that a slow test shows the same."""
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) - by)
    return stamp


def queue(
    platform: common_pb2.Platform.ValueType, waiting: int, oldest: timedelta | None = None, quarantined: int = 0
) -> mailbox_pb2.Queue:
    return mailbox_pb2.Queue(
        app_id="bank",
        platform=platform,
        waiting=waiting,
        due=waiting,
        oldest_at=ago(oldest) if oldest is not None else None,
        quarantined=quarantined,
    )


def error(reason: str, count: int, last: timedelta, advice: str = "do this") -> pb.LaneError:
    return pb.LaneError(reason=reason, count=count, last_at=ago(last), advice=advice)


def show(installation: Installation, lanes: list[pb.Lane], queues: list[mailbox_pb2.Queue], capsys: pytest.CaptureFixture[str]) -> str:
    installation.answers.given |= {
        "ListLanes": pb.ListLanesResponse(lanes=lanes),
        "GetQueues": mailbox_pb2.GetQueuesResponse(queues=queues),
    }
    exit_code = run(["lanes", *installation.both])
    captured = capsys.readouterr()
    assert (exit_code, captured.err) == (0, "")
    return captured.out


WELL = pb.Lane(
    app_id="bank",
    platform=IOS,
    push_service="apns",
    state=pb.LANE_STATE_OPEN,
    detail="takes wake-ups",
    in_flight=3,
    window=256,
    rate_per_second=1234.56,
    accepted=1_000_000,
)


def test_lanes_that_are_well_are_a_line_each(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(installation, [WELL], [queue(IOS, 12, 3 * MINUTE + 10 * SECOND)], capsys) == (
        "APP   PLATFORM  SERVICE  STATE  QUEUED  OLDEST  QUARANTINED  IN FLIGHT  WINDOW  SENT/S     SENT\n"
        "bank  ios       apns     open       12  3 min             0          3     256  1234.6  1000000\n"
    )


def test_lanes_that_are_not_say_why_and_what_nobody_pushes_stands_out(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = pb.Lane(
        app_id="bank",
        platform=ANDROID,
        push_service="fcm",
        state=pb.LANE_STATE_MISCONFIGURED,
        detail="fcm refuses (oauth-invalid_grant): make a new key. Wake-ups stay queued",
        window=256,
        next_try_at=ago(-4 * MINUTE - 10 * SECOND),
        errors=[error("oauth-invalid_grant", 17, 5 * MINUTE + 10 * SECOND, "make a new key")],
    )
    lost = pb.Lane(app_id="shop", platform=IOS, state=pb.LANE_STATE_MISCONFIGURED, detail="the file cannot be read", window=256)
    queues = [queue(ANDROID, 400, 26 * HOUR), queue(HUAWEI, 5, 50 * HOUR, quarantined=2)]
    assert show(installation, [stopped, lost], queues, capsys) == (
        "APP   PLATFORM  SERVICE  STATE          QUEUED  OLDEST  QUARANTINED  IN FLIGHT  WINDOW  SENT/S  SENT\n"
        "bank  android   fcm      MISCONFIGURED     400  26 h              0          0     256     0.0     0\n"
        "shop  ios       -        MISCONFIGURED       0  -                 0          0     256     0.0     0\n"
        "bank  huawei    -        NO LANE             5  2 d               2          -       -       -     -\n"
        "\n"
        "bank android: fcm refuses (oauth-invalid_grant): make a new key. Wake-ups stay queued (tries again in 4 min)\n"
        "  17 × oauth-invalid_grant, last 5 min ago: make a new key\n"
        "\n"
        "shop ios: the file cannot be read\n"
        "\n"
        "bank huawei: nothing pushes it; put a credential with `sealpush providers add bank huawei`\n"
    )


def test_an_open_lane_tells_its_suspicion_its_errors_and_its_receipts(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    lane = pb.Lane()
    lane.CopyFrom(WELL)
    lane.is_suspicious = True
    lane.detail = "takes wake-ups, but the last 20 tokens were none of this credential's"
    lane.errors.extend(error(f"Reason{n}", 10 - n, 3 * HOUR + 20 * MINUTE) for n in range(7))
    lane.receipts.update({"delivered": 9, "app-absent": 1})
    out = show(installation, [lane], [], capsys)
    assert out.splitlines()[2:] == [
        "",
        "bank ios: takes wake-ups, but the last 20 tokens were none of this credential's",
        *(f"  {10 - n} × Reason{n}, last 3 h ago: do this" for n in range(5)),
        "  and 2 more reasons, see --json",
        "  receipts: 1 app-absent, 9 delivered",
    ]


def test_paused_lane_is_told_with_who_paused_it(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    paused = pb.Lane(
        app_id="bank", platform=IOS, push_service="apns", state=pb.LANE_STATE_PAUSED, detail="paused by operator at …", window=256
    )
    out = show(installation, [paused], [queue(IOS, 0, quarantined=7)], capsys)
    assert out.splitlines()[1:] == [
        "bank  ios       apns     PAUSED       0       -            7          0     256     0.0     0",
        "",
        "bank ios: paused by operator at …",
    ]


def test_json_holds_everything(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    lane = pb.Lane()
    lane.CopyFrom(WELL)
    lane.is_suspicious, lane.retried, lane.dead_tokens, lane.quarantined, lane.failures_in_a_row = True, 4, 5, 6, 7
    lane.errors.append(error("TooManyRequests", 4, HOUR))
    lane.receipts["delivered"] = 9
    installation.answers.given |= {
        "ListLanes": pb.ListLanesResponse(lanes=[lane]),
        "GetQueues": mailbox_pb2.GetQueuesResponse(queues=[queue(IOS, 12, 3 * MINUTE, quarantined=1), queue(HUAWEI, 5)]),
    }
    assert run(["lanes", "--json", *installation.both]) == 0
    told, none = json.loads(capsys.readouterr().out)
    assert told.pop("oldest_seconds") == pytest.approx(180, abs=30)
    [seen] = told.pop("errors")
    assert (seen["reason"], seen["count"], seen["advice"]) == ("TooManyRequests", 4, "do this")
    assert told == {
        "app_id": "bank",
        "platform": "ios",
        "push_service": "apns",
        "state": "open",
        "suspicious": True,
        "detail": "takes wake-ups",
        "queued": 12,
        "due": 12,
        "quarantined": 1,
        "in_flight": 3,
        "window": 256,
        "rate_per_second": 1234.56,
        "accepted": 1_000_000,
        "retried": 4,
        "dead_tokens": 5,
        "failures_in_a_row": 7,
        "next_try_at": None,
        "receipts": {"delivered": 9},
    }
    assert none == {
        "app_id": "bank",
        "platform": "huawei",
        "state": "no lane",
        "queued": 5,
        "due": 5,
        "oldest_seconds": None,
        "quarantined": 0,
    }


def test_without_lanes_it_says_what_to_do(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(installation, [], [], capsys) == "there are no lanes: put a credential with `sealpush providers add`\n"


def test_steering_says_what_was_done(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    installation.answers.given["RequeueLane"] = [pb.RequeueLaneResponse(requeued=20_000, more=True), pb.RequeueLaneResponse(requeued=17)]
    for command, told in (("pause", "paused: bank"), ("resume", "resumed: bank"), ("requeue", "requeued: 20017 of bank")):
        assert run(["lanes", command, "bank", "android", *installation.dispatch]) == 0
        assert capsys.readouterr().out == f"{told} on android\n"
    assert installation.answers.asked == [
        pb.PauseLaneRequest(app_id="bank", platform=ANDROID),
        pb.ResumeLaneRequest(app_id="bank", platform=ANDROID),
        *[pb.RequeueLaneRequest(app_id="bank", platform=ANDROID)] * 2,
    ]


@pytest.mark.parametrize("command", ["pause", "resume", "requeue"])
def test_what_cannot_be_steered_is_one_line(command: str, installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("PauseLane", "ResumeLane", "RequeueLane"):
        installation.answers.given[method] = NotFound("no such lane; ListLanes shows those there are")
    assert run(["lanes", command, "bank", "ios", *installation.dispatch]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "sealpush: no such lane; ListLanes shows those there are\n")
    assert run(["lanes", command, "bank", "symbian", *installation.dispatch]) == 2
    assert "'symbian' is no platform" in capsys.readouterr().err
    assert run(["lanes", command, "bank", "ios"]) == 2
    assert "give --operator-key: no `sealpush up` runs" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ListLanes", "GetQueues"])
def test_a_service_that_is_away_is_one_line(method: str, installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    installation.answers.given[method] = Unavailable("PostgreSQL went away")
    assert run(["lanes", *installation.both]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "try again" in captured.err


@pytest.mark.parametrize(
    ("age", "shown"),
    [
        (-5 * SECOND, "0 s"),
        (timedelta(0), "0 s"),
        (59 * SECOND, "59 s"),
        (119 * SECOND, "119 s"),
        (120 * SECOND, "2 min"),
        (119 * MINUTE, "119 min"),
        (2 * HOUR, "2 h"),
        (47 * HOUR, "47 h"),
        (2 * DAY, "2 d"),
        (400 * DAY, "400 d"),
    ],
)
def test_ages_are_told_in_the_unit_that_fits(age: timedelta, shown: str) -> None:
    assert _seconds(age) == shown


def test_options_before_the_subcommand_are_refused_because_they_would_be_lost(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lanes", "--operator-key", str(installation.key), "pause", "bank", "ios", *installation.dispatch]) == 2
    assert "write the options behind `pause`" in capsys.readouterr().err
