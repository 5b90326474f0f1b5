"""What an operator sees of `sealpush providers`, word for word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.v1 import common_pb2
from sealpushd.cli.app import run
from sealpushd.cli.errors import WronglyCalled
from sealpushd.cli.providers import platform_number
from sealpushd.platform.errors import AlreadyExists, FailedPrecondition, NotFound
from sealpushd.platform.settings import Settings
from sealpushd.v1 import providers_pb2 as pb
from tests.unit.cli.answering import Installation, answering

IOS, ANDROID, HUAWEI = common_pb2.PLATFORM_IOS, common_pb2.PLATFORM_ANDROID, common_pb2.PLATFORM_HUAWEI
APNS = ["--key-id", "KEY1234567", "--team-id", "TEAM123456", "--topic", "ua.bank"]
SECRET = b"-----BEGIN PRIVATE KEY-----\nhunter2\n"


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


@pytest.fixture
def p8(tmp_path: Path) -> str:
    path = tmp_path / "key.p8"
    path.write_bytes(SECRET)
    return str(path)


def at(text: str) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromisoformat(text).replace(tzinfo=UTC))
    return stamp


def verdict(what: str, found: pb.Verdict.ValueType, reason: str = "", advice: str = "") -> pb.ProviderVerdict:
    return pb.ProviderVerdict(what=what, verdict=found, reason=reason, advice=advice)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "hunter2" not in captured.err
    return captured.err


def test_add_sends_what_was_given_and_shows_the_verdict(installation: Installation, p8: str, capsys: pytest.CaptureFixture[str]) -> None:
    installation.answers.given["PutProvider"] = pb.PutProviderResponse(
        verdicts=[verdict("production", pb.VERDICT_GOOD), verdict("sandbox", pb.VERDICT_REFUSED, "BadEnvironmentKeyInToken", "make a key.")]
    )
    add = ["providers", "add", "bank", "ios", "--secret-file", p8, *APNS, "--expires", "2027-01-31", *installation.dispatch]
    assert run(add) == 0
    assert capsys.readouterr().out == (
        "good     production\n"
        "refused  sandbox (BadEnvironmentKeyInToken): make a key.\n"
        "added: bank on ios; every dispatch process uses it within seconds\n"
    )
    assert installation.answers.asked == [
        pb.PutProviderRequest(
            app_id="bank",
            platform=IOS,
            push_service="apns",
            settings={"key_id": "KEY1234567", "team_id": "TEAM123456", "topic": "ua.bank"},
            secret=SECRET,
            expires_at=at("2027-01-31T23:59:59"),
        )
    ]
    [authorization] = installation.answers.authorizations
    assert authorization.startswith("Bearer ")


@pytest.mark.parametrize(
    ("platform", "number", "kind"), [("ios", IOS, "apns"), ("android", ANDROID, "fcm"), ("huawei", HUAWEI, "hms"), ("IOS", IOS, "apns")]
)
def test_each_platform_has_its_push_service(installation: Installation, p8: str, platform: str, number: int, kind: str) -> None:
    assert run(["providers", "add", "bank", platform, "--secret-file", p8, *installation.dispatch]) == 0
    [asked] = installation.answers.asked
    assert (asked.platform, asked.push_service, asked.replace, asked.untested) == (number, kind, False, False)
    assert not asked.HasField("expires_at")


def test_a_platform_newer_than_this_program_is_a_number_and_names_its_push_service(
    installation: Installation, p8: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add = ["providers", "add", "bank", "77", "--secret-file", p8, *installation.dispatch]
    assert run(add) == 2
    assert refusal(capsys) == "sealpush: say with --push-service what pushes to 77\n"
    assert run([*add, "--push-service", "fcm"]) == 0
    assert (installation.answers.asked[0].platform, installation.answers.asked[0].push_service) == (77, "fcm")


def test_rotate_sends_nothing_that_was_not_given(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["providers", "rotate", "bank", "ios", "--topic", "ua.new", "--untested", *installation.dispatch]) == 0
    assert capsys.readouterr().out == "replaced: bank on ios; every dispatch process uses it within seconds\n"
    expected = pb.PutProviderRequest(app_id="bank", platform=IOS, settings={"topic": "ua.new"}, replace=True, untested=True)
    assert installation.answers.asked == [expected]
    assert installation.answers.asked[0].WhichOneof("credential") is None


def test_a_mounted_file_goes_by_its_name(installation: Installation) -> None:
    assert run(["providers", "rotate", "bank", "android", "--mounted", "fcm.json", *installation.dispatch]) == 0
    assert installation.answers.asked == [pb.PutProviderRequest(app_id="bank", platform=ANDROID, secret_file="fcm.json", replace=True)]


def test_put_as_json(installation: Installation, p8: str, capsys: pytest.CaptureFixture[str]) -> None:
    installation.answers.given["PutProvider"] = pb.PutProviderResponse(verdicts=[verdict("production", pb.VERDICT_GOOD)])
    assert run(["providers", "add", "bank", "ios", "--secret-file", p8, "--json", *installation.dispatch]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "app_id": "bank",
        "platform": "ios",
        "verdicts": [{"what": "production", "verdict": "good", "reason": "", "advice": ""}],
    }


@pytest.mark.parametrize(
    ("verdicts", "works", "told", "exit_code"),
    [
        (
            [verdict("production", pb.VERDICT_GOOD), verdict("sandbox", pb.VERDICT_GOOD)],
            True,
            "good     production\ngood     sandbox\nthe credential works\n",
            0,
        ),
        (
            [verdict("access token", pb.VERDICT_REFUSED, "oauth-invalid_grant", "make a new key.")],
            False,
            "refused  access token (oauth-invalid_grant): make a new key.\nthe credential does not work\n",
            1,
        ),
        (
            [verdict("access token", pb.VERDICT_GOOD), verdict("send", pb.VERDICT_UNKNOWN, "timeout", "look at the network")],
            False,
            "good     access token\nunknown  send (timeout): look at the network\n"
            "the push service cannot be asked: whether the credential works is unknown\n",
            1,
        ),
    ],
    ids=["good", "refused", "unknown"],
)
def test_test_tells_good_refused_and_unknown_apart(
    verdicts: list[pb.ProviderVerdict],
    works: bool,
    told: str,
    exit_code: int,
    installation: Installation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installation.answers.given["TestProvider"] = pb.TestProviderResponse(verdicts=verdicts, works=works)
    assert run(["providers", "test", "bank", "ios", *installation.dispatch]) == exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (told, "")
    assert run(["providers", "test", "bank", "ios", "--json", *installation.dispatch]) == exit_code
    answer = json.loads(capsys.readouterr().out)
    assert answer["works"] is works
    assert [each["verdict"] for each in answer["verdicts"]] == [line.split()[0] for line in told.splitlines()[:-1]]


def test_list_is_a_table_and_says_what_is_not_in_use(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    stored = [
        pb.StoredProvider(
            app_id="bank",
            platform=ANDROID,
            push_service="fcm",
            secret_file="fcm.json",
            version=7,
            updated_at=at("2026-02-28T09:05:59"),
            problem="the credential file /etc/fcm.json cannot be read",
        ),
        pb.StoredProvider(
            app_id="bank",
            platform=IOS,
            push_service="apns",
            settings={"topic": "t", "key_id": "K"},
            fingerprint="0123456789ab",
            expires_at=at("2099-01-31"),
            version=1,
            created_at=at("2026-01-01"),
            updated_at=at("2026-01-01"),
        ),
    ]
    installation.answers.given["ListProviders"] = pb.ListProvidersResponse(providers=stored)
    assert run(["providers", "list", *installation.dispatch]) == 0
    assert capsys.readouterr().out == (
        "APP   PLATFORM  SERVICE  SETTINGS           SECRET         FINGERPRINT   EXPIRES     CHANGED (UTC)\n"
        "bank  android   fcm      -                  file fcm.json  -             -           2026-02-28 09:05\n"
        "bank  ios       apns     key_id=K, topic=t  stored         0123456789ab  2099-01-31  2026-01-01 00:00\n"
        "\n"
        "bank on android: what is stored is not in use: the credential file /etc/fcm.json cannot be read\n"
    )
    assert run(["providers", "list", "--json", *installation.dispatch]) == 0
    android, ios = json.loads(capsys.readouterr().out)
    assert android == {
        "app_id": "bank",
        "platform": "android",
        "push_service": "fcm",
        "settings": {},
        "secret_file": "fcm.json",
        "fingerprint": None,
        "expires_at": None,
        "version": 7,
        "updated_at": "2026-02-28T09:05:59Z",
        "problem": "the credential file /etc/fcm.json cannot be read",
    }
    assert (ios["secret_file"], ios["fingerprint"], ios["expires_at"], ios["problem"]) == (
        None,
        "0123456789ab",
        "2099-01-31T00:00:00Z",
        None,
    )


def test_an_empty_list_says_what_to_do(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["providers", "list", *installation.dispatch]) == 0
    assert capsys.readouterr().out == "there are none: put one with `sealpush providers add`\n"
    assert run(["providers", "list", "--json", *installation.dispatch]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_remove_says_what_is_gone(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["providers", "remove", "bank", "huawei", *installation.dispatch]) == 0
    assert capsys.readouterr().out == "removed: bank on huawei\n"
    assert installation.answers.asked == [pb.RemoveProviderRequest(app_id="bank", platform=HUAWEI)]


@pytest.mark.parametrize(
    ("method", "command", "error"),
    [
        ("PutProvider", ["rotate", "bank", "ios"], NotFound("the lane has no credential yet: `sealpush providers add`")),
        ("PutProvider", ["rotate", "bank", "ios"], AlreadyExists("the lane has a credential already")),
        ("PutProvider", ["rotate", "bank", "ios"], FailedPrecondition("nothing was stored, because apns …")),
        ("TestProvider", ["test", "bank", "ios"], NotFound("the lane has no credential")),
        ("RemoveProvider", ["remove", "bank", "ios"], NotFound("the lane has no credential")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_dispatch_refuses_is_one_line(
    method: str, command: list[str], error: Any, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    installation.answers.given[method] = error
    assert run(["providers", *command, *installation.dispatch]) == 1
    assert refusal(capsys) == f"sealpush: {error.message}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "bank", "symbian", "--secret-file", "P8"], "'symbian' is no platform: ios, android, huawei"),
        (["add", "bank", "unspecified", "--secret-file", "P8"], "is no platform"),
        (["rotate", "bank", "0"], "is no platform"),
        (["rotate", "bank", "-1"], "No such option"),
        (["rotate", "bank", "32768"], "is no platform"),
        (["test", "bank", "symbian"], "is no platform"),
        (["remove", "bank", "symbian"], "is no platform"),
        (["add", "bank", "ios"], "give the credential: --secret-file or --mounted"),
        (["add", "bank", "ios", "--secret-file", "P8", "--mounted", "x"], "give either --secret-file or --mounted"),
        (["rotate", "bank", "ios", "--secret-file", "P8", "--mounted", "x"], "give either --secret-file or --mounted"),
        (["rotate", "bank", "ios", "--expires", "31.01.2027"], "'31.01.2027' is no date; write it as 2027-01-31"),
        (["rotate", "bank", "ios", "--expires", "2027-02-30"], "is no date"),
        (["rotate", "bank", "ios", "--secret-file", "nowhere.p8"], "nowhere.p8"),
        (["rotate", "bank", "ios", "--secret-file", "."], "is a directory"),
        (["rotate", "bank", "ios", "--push-service", "wns"], "wns"),
        (["rotate", "bank"], "PLATFORM"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrongly_given_is_told_before_anybody_is_called(
    arguments: list[str], words: str, installation: Installation, p8: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["providers", *(p8 if each == "P8" else each for each in arguments), *installation.dispatch]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "hunter2" not in captured.err
    assert not installation.answers.asked


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(installation: Installation, p8: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(p8).chmod(0)
    assert run(["providers", "rotate", "bank", "ios", "--secret-file", p8, *installation.dispatch]) == 2
    assert "not readable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["list"], ["test", "bank", "ios"], ["remove", "bank", "ios"], ["rotate", "bank", "ios"]],
    ids=" ".join,
)
def test_without_an_installation_the_command_says_what_to_give(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["providers", *command]) == 2
    assert refusal(capsys).startswith(f"sealpush: give --operator-key: no `sealpush up` runs on {tmp_path}")


def test_a_dispatch_that_does_not_answer_and_a_key_that_is_none_are_one_line(
    tmp_path: Path, free_base_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "operator.key"
    key.write_text("hunter2")
    command = ["providers", "list", "--operator-key", str(key), "--dispatch", f"127.0.0.1:{free_base_port}"]
    assert run(command) == 2
    assert str(key) in refusal(capsys)
    key.write_text("07" * 32)
    assert run(command) == 1
    assert "dispatch" in refusal(capsys)


@pytest.mark.parametrize(("text", "number"), [("ios", 1), ("IOS", 1), ("Android", 2), ("3", 3), ("77", 77), ("32767", 32767)])
def test_platforms_have_names_and_numbers(text: str, number: int) -> None:
    assert platform_number(text) == number


@pytest.mark.parametrize("text", ["", "platform_ios", "0", "32768", "-1", "1.0", " ios", "9" * 5000])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(WronglyCalled, match="is no platform"):
        platform_number(text)


@pytest.mark.parametrize(("days", "warning"), [(-1, " ENDED"), (29, " SOON"), (40, "")])
def test_list_warns_of_what_ends(installation: Installation, capsys: pytest.CaptureFixture[str], days: int, warning: str) -> None:
    end = datetime.now(UTC) + timedelta(days=days)
    one = pb.StoredProvider(app_id="bank", platform=IOS, push_service="apns", version=1)
    one.expires_at.FromDatetime(end)
    installation.answers.given["ListProviders"] = pb.ListProvidersResponse(providers=[one])
    assert run(["providers", "list", *installation.dispatch]) == 0
    assert f"{end:%Y-%m-%d}{warning}  " in capsys.readouterr().out
