import io
import json
import stat
import time
from datetime import timedelta
from pathlib import Path

import pytest

from sealpush.keys import EntryRole, RootKey, SenderMode, verify_sender_entry
from sealpushd.certify import certify_platform, certify_sender
from sealpushd.cli.app import run
from sealpushd.platform.settings import Settings

ID = "0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SEALPUSH_{name.upper()}", raising=False)
    monkeypatch.delenv("SEALPUSH_CONFIG", raising=False)
    # No `up` runs there.
    monkeypatch.setenv("SEALPUSH_DATA_DIR", str(tmp_path))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.key"
    path.write_text("07" * 32 + "\n")
    return path


@pytest.fixture
def installation(key_file: Path) -> list[str]:
    """An installation where nobody listens."""
    return ["--operator-key", str(key_file), "--accounts", "127.0.0.1:1", "--keys", "127.0.0.1:1"]


def put_sender(key_file: Path, *more: str, organisation_id: str = ID, name: str = "Post") -> list[str]:
    arguments = ["put-sender", organisation_id, "post", "--display-name", name, "--app", "a", "--root-key", str(key_file), *more]
    return ["accounts", *arguments]


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_a_new_root_is_for_its_owner_only_and_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "root.key"
    assert run(["accounts", "new-root", str(path), "--json"]) == 0
    made = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public_key = RootKey.from_seed(bytes.fromhex(made.decode().strip())).public_key
    assert json.loads(capsys.readouterr().out) == {"root_public_key": public_key.hex()}
    assert run(["accounts", "new-root", str(path)]) == 2
    assert f"{path} exists already" in refusal(capsys)
    assert path.read_bytes() == made


def test_a_root_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accounts", "new-root", str(tmp_path / "nowhere" / "root.key")]) == 2
    assert "cannot be written" in refusal(capsys)


def test_without_an_installation_the_command_asks_for_the_operators_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accounts", "put-app", "a", "--name", "A", "--root-public-key", "07" * 32]) == 2
    assert "give --operator-key: no `sealpush up` runs" in refusal(capsys)


def test_addresses_come_from_the_settings_where_no_up_runs(
    key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEALPUSH_ACCOUNTS_MESH", "127.0.0.1:1")
    app = ["accounts", "put-app", "a", "--name", "A", "--root-key", str(key_file)]
    assert run([*app, "--operator-key", str(key_file)]) == 1
    assert "accounts" in refusal(capsys)


@pytest.mark.parametrize("roots", [[], ["--root-public-key", "07" * 32, "--root-key", "KEY"]], ids=["no root", "two roots"])
def test_an_app_has_one_root(roots: list[str], key_file: Path, installation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(key_file) if each == "KEY" else each for each in roots]
    assert run(["accounts", "put-app", "a", "--name", "A", *given, *installation]) == 2
    assert "either --root-key or --root-public-key" in refusal(capsys)


@pytest.mark.parametrize("digits", ["", "hunter2", "07" * 31])
def test_what_is_no_key_is_refused_without_its_content(
    digits: str, tmp_path: Path, installation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.key"
    path.write_text(digits)
    assert run(["accounts", "put-platform", "--root-key", str(path), *installation]) == 2
    assert refusal(capsys) == f"sealpush: {path} does not hold a key of 64 hex digits\n"
    assert run(["accounts", "put-app", "a", "--name", "A", "--root-public-key", digits, *installation]) == 2
    assert refusal(capsys) == "sealpush: --root-public-key does not hold a key of 64 hex digits\n"


def test_a_password_is_asked_for_on_a_terminal_only(
    installation: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    organisation = ["accounts", "put-organisation", "post", "--name", "Post", *installation]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(organisation) == 2
    assert "--password-stdin" in refusal(capsys)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert run([*organisation, "--password-stdin"]) == 2
    assert "not UTF-8" in refusal(capsys)


def test_a_sender_that_cannot_be_is_refused_before_a_key_is_made(
    key_file: Path, tmp_path: Path, installation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    new_key = tmp_path / "new.key"
    making = ["--mode", "end_to_end", "--new-sender-key", str(new_key)]
    for arguments, words in (
        (put_sender(key_file, "--mode", "end_to_end"), "needs a key"),
        (put_sender(key_file, *making, organisation_id="post"), "no id of an organisation"),
        (put_sender(key_file, *making, "--sender-id", "x"), "no id of a sender"),
        (put_sender(key_file, *making, name=" Post"), "display_name"),
    ):
        assert run([*arguments, *installation]) == 2
        assert words in refusal(capsys)
    assert run(put_sender(key_file, *making)) == 2
    assert "give --operator-key" in refusal(capsys)
    assert not new_key.exists()


def test_a_sender_that_nobody_answered_for_can_be_put_again_with_its_id_and_key(
    key_file: Path, tmp_path: Path, installation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    new_key = tmp_path / "new.key"
    sender = put_sender(key_file, "--mode", "end_to_end", "--mode", "server", "--new-sender-key", str(new_key), *installation)
    assert run(sender) == 1
    err = refusal(capsys)
    assert "to try again, add --sender-id " in err
    assert f"--sender-key {new_key}" in err
    assert stat.S_IMODE(new_key.stat().st_mode) == 0o600
    kept = new_key.read_bytes()
    assert run(sender) == 2
    assert "exists already" in refusal(capsys)
    assert new_key.read_bytes() == kept


def test_what_the_root_certifies_is_taken_for_as_many_days() -> None:
    root, key = RootKey.from_seed(bytes(32)), RootKey.from_seed(bytes([1]) * 32).public_key
    platform = verify_sender_entry(root.public_key, certify_platform(root, key, days=2), now_ms(), role=EntryRole.PLATFORM)
    assert (platform.modes, [each.public_key for each in platform.keys]) == (SenderMode.SERVER, [key])
    signed = certify_sender(root, platform.sender_id, "Post", SenderMode.SERVER, [], days=2)
    entry = verify_sender_entry(root.public_key, signed, now_ms(), role=EntryRole.SENDER)
    assert (entry.sender_id, entry.display_name, entry.keys) == (platform.sender_id, "Post", ())
    assert timedelta(days=2) < timedelta(milliseconds=entry.not_after_ms - entry.not_before_ms) < timedelta(days=2, hours=2)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
