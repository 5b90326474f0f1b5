import io
import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sealpush.ids import SenderId, parse_uuid
from sealpush.keys import ContentSigningKey, EntryRole, RootKey, SenderMode, verify_sender_entry
from sealpush.revocations import RevokedKey, revoking, verify_revocations
from sealpushd.certify import certify_platform, certify_sender, now_ms, platform_entry, sender_entry
from sealpushd.cli.app import run
from sealpushd.platform.settings import Settings
from sealpushd.signedfile import SignedFile
from sealpushd.v1 import sealing_pb2
from sealpushd.v1.administration_pb2 import EntryInUse, GetEndingEntriesResponse, GetRevocationListResponse, PutRevocationsResponse
from tests.unit.cli.answering import Installation, answering

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


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.fixture
def answered(tmp_path: Path) -> Iterator[Installation]:
    with answering(tmp_path) as made:
        yield made


ROOT = RootKey.from_seed(bytes(32))
KEY = RootKey.from_seed(bytes([1]) * 32).public_key
SENDER_ID = SenderId(parse_uuid(ID))


def sender_file(tmp_path: Path, content: bytes | None = None) -> Path:
    path = tmp_path / "sender.entry"
    entry = sender_entry(SENDER_ID, "Post", SenderMode.SERVER, [], days=2)
    path.write_bytes(SignedFile.of_entry(ROOT, entry).encode() if content is None else content)
    return path


def platform_file(tmp_path: Path) -> Path:
    path = tmp_path / "platform.entry"
    path.write_bytes(SignedFile.of_entry(ROOT, platform_entry(KEY, days=2)).encode())
    return path


def list_file(tmp_path: Path) -> Path:
    path = tmp_path / "revoked"
    path.write_bytes(SignedFile.of_revocations(ROOT, revoking(None, [RevokedKey(KEY)], issued_ms=5)).encode())
    return path


def put_sender(entry: Path, organisation_id: str = ID) -> list[str]:
    return ["accounts", "put-sender", organisation_id, "post", "--entry", str(entry), "--app", "a"]


def test_a_new_sender_key_is_for_its_owner_only_and_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sender.key"
    assert run(["accounts", "new-sender-key", str(path), "--json"]) == 0
    made = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public_key = ContentSigningKey.from_seed(bytes.fromhex(made.decode().strip())).public_key
    assert json.loads(capsys.readouterr().out) == {"public_key": public_key.hex()}
    assert run(["accounts", "new-sender-key", str(path)]) == 2
    assert f"{path} exists already" in refusal(capsys)
    assert path.read_bytes() == made


def test_a_key_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accounts", "new-sender-key", str(tmp_path / "nowhere" / "sender.key")]) == 2
    assert "cannot be written" in refusal(capsys)


def test_what_the_root_signed_is_put_as_it_is(tmp_path: Path, answered: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    answered.answers.given["GetPlatformKey"] = sealing_pb2.GetPlatformKeyResponse(public_key=KEY)
    asked = answered.answers.asked
    assert run(["accounts", "platform-key", *answered.accounts]) == 0
    assert capsys.readouterr().out == f"{KEY.hex()}\n"
    assert run(["accounts", "put-platform", "--entry", str(platform_file(tmp_path)), *answered.accounts]) == 0
    assert capsys.readouterr().out == f"{KEY.hex()}\n"
    assert asked[-1].root_public_key == ROOT.public_key
    assert verify_sender_entry(ROOT.public_key, asked[-1].platform_entry, now_ms(), role=EntryRole.PLATFORM).keys[0].public_key == KEY
    assert run([*put_sender(sender_file(tmp_path)), "--default", *answered.accounts]) == 0
    assert capsys.readouterr().out == f"{ID}\n"
    assert (asked[-1].sender_id, list(asked[-1].app_ids), asked[-1].is_default) == (SENDER_ID, ["a"], True)
    assert verify_sender_entry(ROOT.public_key, asked[-1].sender_entry, now_ms()).display_name == "Post"
    assert run(["accounts", "put-revocations", str(list_file(tmp_path)), "--json", *answered.accounts]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"serial": "1", "revoked": []}
    assert f"nothing in use is revoked: compare ids, serials and keys with `sealpush root show {tmp_path / 'revoked'}`" in captured.err
    assert verify_revocations(asked[-1].root_public_key, asked[-1].revocations).revokes_key(KEY)


def test_who_revokes_is_told_whom_that_hits(tmp_path: Path, answered: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    hit = [EntryInUse(sender_id=SENDER_ID, display_name="Post"), EntryInUse(display_name="Sealpush")]
    answered.answers.given["PutRevocations"] = PutRevocationsResponse(revoked=hit)
    assert run(["accounts", "put-revocations", str(list_file(tmp_path)), *answered.accounts]) == 0
    captured = capsys.readouterr()
    assert captured.out == "1\n"
    assert f"the entry of the sender Post, {ID}\n" in captured.err
    assert "the entry of the platform's sealing key\n" in captured.err
    assert run(["accounts", "put-revocations", str(list_file(tmp_path)), "--json", *answered.accounts]) == 0
    told = [{"sender_id": ID, "display_name": "Post"}, {"sender_id": None, "display_name": "Sealpush"}]
    assert json.loads(capsys.readouterr().out)["revoked"] == told


def test_a_lost_list_comes_back_as_the_root_signed_it(tmp_path: Path, answered: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    signed = SignedFile.decode(list_file(tmp_path).read_bytes())
    out = tmp_path / "list-again"
    get = ["accounts", "get-revocations", "--root-public-key", signed.root_public_key.hex(), "--out", str(out), *answered.accounts]
    answered.answers.given["GetRevocationList"] = [
        GetRevocationListResponse(),
        GetRevocationListResponse(revocations=signed.signed[:-1] + b"\x00"),
        GetRevocationListResponse(revocations=signed.signed),
    ]
    for words in ("root revoke --new", "not signed by the root"):
        assert run(get) == 1
        assert words in refusal(capsys)
        assert not out.exists()
    assert run(get) == 0
    assert capsys.readouterr().out == f"list number 1: {out}\n"
    assert SignedFile.decode(out.read_bytes()) == signed
    assert run(get) == 2
    assert "exists already" in refusal(capsys)


def test_entries_that_end_soon_are_told_without_an_up_and_fail(answered: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    answered.answers.given["GetEndingEntries"] = GetEndingEntriesResponse()
    assert run(["accounts", "ending-entries", *answered.accounts]) == 0
    assert capsys.readouterr().out == "ok    entries                      none ends within 14 days\n"
    ending = EntryInUse(sender_id=SENDER_ID, display_name="Post", root_public_key=b"\x09" * 32)
    ending.ends_at.FromDatetime(datetime(2020, 1, 2, tzinfo=UTC))
    answered.answers.given["GetEndingEntries"] = GetEndingEntriesResponse(entries=[ending])
    assert run(["accounts", "ending-entries", "--days", "30", *answered.accounts]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL  entry of Post                ended on 2020-01-02: sign another with the root 0909")
    assert "--sender-id " + ID in out
    asked = answered.answers.asked[-1].before.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=29) < asked <= timedelta(days=30)


def test_an_entry_of_a_key_that_the_platform_does_not_seal_with_is_not_put(
    tmp_path: Path, answered: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    answered.answers.given["GetPlatformKey"] = sealing_pb2.GetPlatformKeyResponse(public_key=b"\x07" * 32)
    assert run(["accounts", "put-platform", "--entry", str(platform_file(tmp_path)), *answered.accounts]) == 1
    assert f"which is {'07' * 32}: certify that one" in refusal(capsys)
    assert len(answered.answers.asked) == 1


def test_a_file_of_another_kind_changed_or_strange_is_refused_before_anybody_is_called(
    tmp_path: Path, answered: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = json.loads(sender_file(tmp_path).read_text())
    last_byte = int(signed["signed"][-2:], 16) ^ 1
    changed = json.dumps({**signed, "signed": f"{signed['signed'][:-2]}{last_byte:02x}"}).encode()
    relabelled = json.dumps({**signed, "kind": "platform entry"}).encode()
    put_platform = ["accounts", "put-platform", "--entry"]
    for arguments, exit_code, words in (
        (put_sender(platform_file(tmp_path)), 2, "holds a platform entry, not a sender entry"),
        ([*put_platform, str(sender_file(tmp_path))], 2, "holds a sender entry, not a platform entry"),
        (["accounts", "put-revocations", str(sender_file(tmp_path))], 2, "holds a sender entry, not a revocation list"),
        (put_sender(list_file(tmp_path)), 2, "holds a revocation list"),
        (put_sender(sender_file(tmp_path), organisation_id="post"), 2, "no id of an organisation"),
    ):
        assert run([*arguments, *answered.accounts]) == exit_code
        assert words in refusal(capsys)
    for content, make, exit_code, words in (
        (changed, put_sender, 1, "not signed by the root that the file names"),
        (relabelled, lambda path: [*put_platform, str(path)], 1, "holds another entry"),
        (b"hunter2", put_sender, 2, "holds nothing that `sealpush root` signed"),
        (b"[]", put_sender, 2, "holds nothing that `sealpush root` signed"),
        (b'{"format": "sealpush signed", "version": 2}', put_sender, 2, "holds nothing that `sealpush root` signed"),
        (b"[" * 300_000, put_sender, 2, "holds nothing that `sealpush root` signed"),
    ):
        assert run([*make(sender_file(tmp_path, content)), *answered.accounts]) == exit_code
        assert words in refusal(capsys)
    assert answered.answers.asked == []


def test_without_an_installation_the_command_asks_for_the_operators_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accounts", "put-app", "a", "--name", "A", "--root-public-key", "07" * 32]) == 2
    assert "give --operator-key: no `sealpush up` runs" in refusal(capsys)


def test_addresses_come_from_the_settings_where_no_up_runs(
    key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEALPUSH_ACCOUNTS_MESH", "127.0.0.1:1")
    app = ["accounts", "put-app", "a", "--name", "A", "--root-public-key", "07" * 32]
    assert run([*app, "--operator-key", str(key_file)]) == 1
    assert "accounts" in refusal(capsys)


@pytest.mark.parametrize("digits", ["", "hunter2", "07" * 31])
def test_what_is_no_key_is_refused_without_its_content(digits: str, installation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_the_root_certifies_is_taken_for_as_many_days() -> None:
    platform = verify_sender_entry(ROOT.public_key, certify_platform(ROOT, KEY, days=2), now_ms(), role=EntryRole.PLATFORM)
    assert (platform.modes, [each.public_key for each in platform.keys]) == (SenderMode.SERVER, [KEY])
    signed = certify_sender(ROOT, platform.sender_id, "Post", SenderMode.SERVER, [], days=2)
    entry = verify_sender_entry(ROOT.public_key, signed, now_ms(), role=EntryRole.SENDER)
    assert (entry.sender_id, entry.display_name, entry.keys) == (platform.sender_id, "Post", ())
    assert timedelta(days=2) < timedelta(milliseconds=entry.not_after_ms - entry.not_before_ms) < timedelta(days=2, hours=2)
