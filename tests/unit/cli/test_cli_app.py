import importlib
from datetime import timedelta
from pathlib import Path

import click
import grpc
import pytest

from sealpush.errors import RootMismatch
from sealpushd.cli import errors
from sealpushd.cli.app import COMMANDS, run
from sealpushd.cli.serve import SERVICES as CLI_SERVICES
from sealpushd.cli.types import DURATION
from sealpushd.engines import EngineError
from sealpushd.platform.errors import StoreUnavailable
from sealpushd.platform.migrate import SERVICES, SchemaError
from sealpushd.platform.settings import Settings, SettingsError
from sealpushd.platform.vault import VaultError
from sealpushd.up.errors import UpError

ID = "0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SEALPUSH_{name.upper()}", raising=False)
    monkeypatch.delenv("SEALPUSH_CONFIG", raising=False)
    monkeypatch.delenv("SEALPUSH_POSTGRES_ADMIN_URL", raising=False)


def all_commands() -> list[tuple[list[str], click.Command]]:
    found = []
    for name, where in COMMANDS.items():
        module, _, attribute = where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        found.append(([name], command))
        if isinstance(command, click.Group):
            found.extend(([name, sub], subcommand) for sub, subcommand in command.commands.items())
    return found


@pytest.mark.parametrize(("path", "command"), all_commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_every_command_and_option_has_help(path: list[str], command: click.Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"]) == 0
    assert command.help is not None
    assert capsys.readouterr().out.startswith(f"Usage: sealpush {' '.join(path)}")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert not any(line.endswith("...") for line in out.splitlines()[1:])


def test_the_command_knows_the_services_of_the_platform() -> None:
    assert CLI_SERVICES == SERVICES


def test_settings_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings"]) == 0
    out = capsys.readouterr().out
    assert all(f"SEALPUSH_{name.upper()} " in out for name in Settings.model_fields)


def test_serve_without_settings_says_what_is_missing_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "accounts"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "sealpush: not set: SEALPUSH_SERVICE_KEY, SEALPUSH_TRUST (see `sealpush settings`)\n"


def test_a_wrong_setting_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SEALPUSH_MESH_PORT", "hunter2")
    assert run(["serve", "accounts"]) == 2
    err = capsys.readouterr().err
    assert "SEALPUSH_MESH_PORT" in err
    assert "hunter2" not in err


def test_an_unknown_command_and_an_unknown_service_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nonsense"]) == 2
    assert run(["serve", "nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_migrating_nowhere_says_which_variable_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["db", "migrate"]) == 2
    assert "SEALPUSH_POSTGRES_ADMIN_URL" in capsys.readouterr().err


def test_a_database_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["db", "migrate", "--url", f"postgresql://nobody:none@/none?host={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sealpush: cannot connect to PostgreSQL")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"fetch_app": 1}', '{"fetch_app": ""}'])
def test_a_wrong_password_file_is_refused_before_anything_else(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "passwords.json"
    path.write_text(content)
    assert run(["db", "migrate", "--url", "postgresql://x@/x", "--passwords", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["send", "+380501234567", "hello"], ["status", ID], ["cancel", ID], ["explain", ID], ["receipt", ID], ["doctor"]]
)
def test_without_a_running_up_the_commands_say_how_to_start_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--data-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"no `sealpush up` runs on {tmp_path}" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (SettingsError("x"), 2),
        (SchemaError("x"), 2),
        (VaultError("x"), 2),
        (StoreUnavailable("x"), 1),
        (EngineError("x"), 1),
        (UpError("x"), 1),
        (RootMismatch("x"), 1),
        (grpc.RpcError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_expected_errors_are_shown_as_a_line(error: Exception, exit_code: int) -> None:
    described = errors.describe(error)
    assert described is not None
    assert described.exit_code == exit_code
    assert "x" in described.message


def test_a_bug_keeps_its_traceback() -> None:
    assert errors.describe(KeyError("x")) is None


@pytest.mark.parametrize(
    ("text", "duration"),
    [("500ms", timedelta(milliseconds=500)), ("90s", timedelta(seconds=90)), ("1.5h", timedelta(minutes=90)), ("14d", timedelta(days=14))],
)
def test_durations_are_read(text: str, duration: timedelta) -> None:
    assert DURATION.convert(text, None, None) == duration


@pytest.mark.parametrize("text", ["", "10", "0s", "-1s", "1 h", "h", "1w", "1e9d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="90s"):
        DURATION.convert(text, None, None)


def test_a_duration_beyond_all_calendars_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="longer"):
        DURATION.convert("999999999999d", None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "give a text or a --title"),
        (["", "--sealed"], "give a text or a --title"),
        (["x", "--lifetime", "29d"], "1 s to 28 days"),
        (["x", "--lifetime", "100ms"], "1 s to 28 days"),
        (["x", "--request-id", ""], "1 to 64"),
        (["x", "--request-id", "é"], "ASCII"),
    ],
)
def test_what_cannot_be_sent_is_told_in_one_line_before_anybody_is_called(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["send", "+380501234567", *arguments, "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
