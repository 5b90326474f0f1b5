"""`sealpush root` as its people use it: files in, files out, nobody called."""

import errno
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sealpush.ids import uuid_text
from sealpush.keys import DAY_MS, ContentSigningKey, EntryRole, SenderMode, verify_sender_entry
from sealpush.revocations import RevokedEntries, RevokedKey, verify_revocations
from sealpushd import rootfile
from sealpushd.certify import now_ms
from sealpushd.cli.app import run
from sealpushd.signedfile import SignedFile

ID = "0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"
KEY = ContentSigningKey.from_seed(b"\x01" * 32).public_key
CHEAP = rootfile.Cost(1, 8192)
PASSPHRASES = {"Anna": "the first of them", "Borys": "the second of them", "Vira": "the third of them"}


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte a passphrase is for real roots."""
    monkeypatch.setattr(rootfile, "SENSITIVE", CHEAP)


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., list[str]]:
    """The options that give passphrases without a terminal."""

    def options(*names: str) -> list[str]:
        found = []
        for name in names:
            path = tmp_path / f"{name}.passphrase"
            path.write_text(PASSPHRASES[name] + "\n")
            found += ["--passphrase-file", f"{name}={path}"]
        return found

    return options


Given = Callable[..., list[str]]


@pytest.fixture
def root_file(tmp_path: Path, given: Given, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "root.json"
    people = [word for name in PASSPHRASES for word in ("--person", name)]
    assert run(["root", "create", str(path), *people, *given(*PASSPHRASES)]) == 0
    assert capsys.readouterr().out == f"{public_key_of(path).hex()}\n"
    return path


@pytest.fixture
def two(given: Given) -> list[str]:
    return ["--as", "Vira", "--as", "Anna", *given("Anna", "Vira")]


def public_key_of(path: Path) -> bytes:
    return rootfile.RootFile.decode(path.read_bytes()).root_public_key


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert not any(passphrase in captured.err for passphrase in PASSPHRASES.values())
    return captured.err


def test_a_root_is_for_its_owner_only_holds_no_seed_and_is_never_written_over(
    root_file: Path, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    made = root_file.read_bytes()
    assert stat.S_IMODE(root_file.stat().st_mode) == 0o600
    opened = rootfile.open_root(rootfile.RootFile.decode(made), {name: PASSPHRASES[name] for name in ("Borys", "Vira")})
    assert opened.public_key == public_key_of(root_file)
    assert opened.seed.hex() not in made.decode()
    assert run(["root", "create", str(root_file), "--person", "Anna", "--person", "Borys", *given("Anna", "Borys")]) == 2
    assert "exists already" in refusal(capsys)
    assert root_file.read_bytes() == made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--person", "Anna"], "2 to 8 people"),
        (["--person", "Anna", "--person", "Anna"], "same person stands there twice"),
        (["--person", "Anna", "--person", "Borys"], "no terminal to type the passphrase of Anna at: give --passphrase-file Anna=FILE"),
        (["--person", "Anna", "--person", "Borys", "--passphrase-file", "Anna"], "NAME=FILE"),
        (["--person", "Anna", "--person", "Borys", "--passphrase-file", "Maks=/dev/null"], "one of Anna, Borys"),
        (["--person", "Anna", "--person", "Borys", "--passphrase-file", "Anna=/dev/null"], "must have 12 characters"),
        (["--person", "Anna", "--person", "Borys", "--passphrase-file", "Anna=/nowhere/it/is"], "cannot be read"),
    ],
)
def test_a_root_that_cannot_be_is_refused_in_one_line_and_not_made(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["root", "create", str(tmp_path / "root.json"), *arguments]) == 2
    err = refusal(capsys)
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "root.json").exists()


def certify(root_file: Path, out: Path, *more: str) -> list[str]:
    named = ["--display-name", "Example Bank", "--mode", "server", "--mode", "end_to_end", "--key", KEY.hex()]
    return ["root", "certify-sender", str(root_file), *named, "--out", str(out), *more]


def test_two_people_certify_a_sender_for_ninety_days_and_see_what_they_sign(
    root_file: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bank.entry"
    before_ms = now_ms()
    assert run([*certify(root_file, out, "--sender-id", ID), *two]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"signed: {out}\n"
    shown = captured.err
    for text in ("Anna and Vira sign with the root", "the sender Example Bank", ID, KEY.hex(), "the platform (server)", "(end_to_end)"):
        assert text in shown
    assert not any(passphrase in shown for passphrase in PASSPHRASES.values())
    signed = SignedFile.decode(out.read_bytes())
    entry = verify_sender_entry(public_key_of(root_file), signed.signed, now_ms())
    assert (uuid_text(entry.sender_id), entry.display_name, entry.modes) == (ID, "Example Bank", SenderMode(3))
    assert 90 * DAY_MS <= entry.not_after_ms - before_ms < 90 * DAY_MS + 60_000
    assert run([*certify(root_file, out), *two]) == 2
    assert "exists already" in refusal(capsys)


def test_a_new_sender_gets_an_id_of_its_own(root_file: Path, two: list[str], tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for path in files:
        assert run([*certify(root_file, path, "--days", "1"), *two]) == 0
    one, other = (SignedFile.decode(path.read_bytes()).entry() for path in files)
    assert one.sender_id != other.sender_id
    assert one.not_after_ms - one.not_before_ms < DAY_MS + 2 * 3_600_000


def test_the_platform_is_certified_for_the_server_only(root_file: Path, two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "platform.entry"
    assert run(["root", "certify-platform", str(root_file), "--key", KEY.hex(), "--out", str(out), *two]) == 0
    signed = SignedFile.decode(out.read_bytes())
    entry = verify_sender_entry(public_key_of(root_file), signed.signed, now_ms(), role=EntryRole.PLATFORM)
    assert (entry.modes, [key.public_key for key in entry.keys]) == (SenderMode.SERVER, [KEY])


@pytest.mark.parametrize(
    ("people", "words"),
    [
        (["--as", "Anna"], "two different people use a root together"),
        (["--as", "Anna", "--as", "Anna"], "two different people use a root together"),
        (["--as", "Anna", "--as", "Maks"], "Maks is nobody of this root; its people are Anna, Borys, Vira"),
        ([], "say who uses the root: --as twice, with two of Anna, Borys, Vira"),
        (["--as", "Anna", "--as", "Borys"], "no terminal to type the passphrase of Anna"),
    ],
)
def test_one_person_alone_signs_nothing(
    people: list[str], words: str, root_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*certify(root_file, tmp_path / "bank.entry"), *people]) == 2
    assert words in refusal(capsys)
    assert not (tmp_path / "bank.entry").exists()


def test_a_wrong_passphrase_signs_nothing(root_file: Path, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = given("Anna", "Borys")
    (tmp_path / "Borys.passphrase").write_text("not the second of them")
    assert run([*certify(root_file, tmp_path / "bank.entry"), "--as", "Anna", "--as", "Borys", *options]) == 2
    assert "one of them is wrong" in refusal(capsys)
    assert not (tmp_path / "bank.entry").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--display-name", "Bank", "--mode", "end_to_end"], "needs a key"),
        (["--display-name", " Bank", "--mode", "server"], "display_name"),
        (["--display-name", "Bank", "--mode", "server", "--key", "00"], "--key does not hold a key"),
        (["--display-name", "Bank", "--mode", "server", "--key", KEY.hex(), "--key", KEY.hex()], "stands twice"),
        (["--display-name", "Bank", "--mode", "server", "--sender-id", "x"], "not a UUID"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_before_anybody_types(
    arguments: list[str], words: str, root_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "bank.entry"), "--as", "Anna", "--as", "Borys"]
    assert run(["root", "certify-sender", str(root_file), *arguments, *out]) == 2
    assert words in refusal(capsys)


def revoke(root_file: Path, out: Path, *more: str) -> list[str]:
    return ["root", "revoke", str(root_file), "--out", str(out), *more]


def test_lists_follow_each_other_and_keep_what_was_revoked(
    root_file: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "list-1", tmp_path / "list-2"
    assert run([*revoke(root_file, first, "--new", "--key", KEY.hex()), *two]) == 0
    before_ms = now_ms()
    assert run([*revoke(root_file, second, "--list", str(first), "--sender-id", ID), *two]) == 0
    captured = capsys.readouterr()
    assert f"key {KEY.hex()}" in captured.err
    assert f"entries of {ID} up to serial" in captured.err
    revocations = verify_revocations(public_key_of(root_file), SignedFile.decode(second.read_bytes()).signed)
    entries, key = revocations.items
    assert revocations.serial == 2
    assert key == RevokedKey(KEY)
    assert isinstance(entries, RevokedEntries)
    assert uuid_text(entries.sender_id) == ID
    assert before_ms <= entries.serial <= now_ms()
    exact = tmp_path / "list-3"
    assert run([*revoke(root_file, exact, "--new", "--sender-id", ID, "--up-to-serial", "9"), *two]) == 0
    [only] = SignedFile.decode(exact.read_bytes()).revocations().items
    assert isinstance(only, RevokedEntries)
    assert only.serial == 9


def test_what_cannot_be_revoked_is_told(
    root_file: Path, two: list[str], given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, out, other_root = tmp_path / "list-1", tmp_path / "list-2", tmp_path / "other.json"
    assert run([*revoke(root_file, known, "--new", "--key", KEY.hex()), *two]) == 0
    assert run(["root", "create", str(other_root), "--person", "Anna", "--person", "Borys", *given("Anna", "Borys")]) == 0
    capsys.readouterr()
    key = ["--key", KEY.hex()]
    for arguments, exit_code, words in (
        (revoke(root_file, out, *key), 2, "give either --list with the newest list of this root, or --new"),
        (revoke(root_file, out, *key, "--new", "--list", str(known)), 2, "give either --list"),
        (revoke(root_file, out, "--new"), 2, "say what to revoke"),
        (revoke(root_file, out, "--new", *key, "--up-to-serial", "5"), 2, "goes with --sender-id"),
        (revoke(root_file, out, "--list", str(known), *key), 2, "revokes this already"),
        (revoke(other_root, out, "--list", str(known), "--sender-id", ID), 1, "not signed by the root"),
        (revoke(root_file, out, "--list", str(root_file), *key), 2, "holds nothing that `sealpush root` signed"),
        (revoke(root_file, known, "--list", str(known), "--sender-id", ID), 2, "exists already"),
    ):
        assert run([*arguments, *two]) == exit_code
        assert words in refusal(capsys)
    assert not out.exists()


def test_show_says_what_a_file_is_and_whose(root_file: Path, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry, revoked = tmp_path / "bank.entry", tmp_path / "list"
    assert run([*certify(root_file, entry, "--sender-id", ID), *two]) == 0
    assert run([*revoke(root_file, revoked, "--new", "--sender-id", ID), *two]) == 0
    capsys.readouterr()
    root_public_key = public_key_of(root_file).hex()
    for path, words in (
        (root_file, ["Anna, Borys, Vira: any two of them", root_public_key]),
        (entry, ["Example Bank", ID, KEY.hex(), f"signed by the root  {root_public_key}"]),
        (revoked, ["number 1", f"entries of {ID} up to serial", root_public_key]),
    ):
        assert run(["root", "show", str(path), "--root-public-key", root_public_key]) == 0
        out = re.sub(r"(?<=\w)   +", "  ", capsys.readouterr().out)
        assert all(word in out for word in words), out
        assert run(["root", "show", str(path), "--root-public-key", KEY.hex()]) == 1
        assert "of another root" in refusal(capsys)
    document = json.loads(entry.read_text())
    entry.write_text(json.dumps({**document, "root_public_key": KEY.hex()}))
    assert run(["root", "show", str(entry)]) == 1
    assert "not signed by the root that the file names" in refusal(capsys)
    entry.write_text("hunter2")
    assert run(["root", "show", str(entry)]) == 2
    assert refusal(capsys) == f"sealpush: {entry} is neither a root's file nor signed by one\n"


# A session of its own, whose terminal is the one it was given: that is what passphrases are typed at.
_AT_A_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)
from sealpushd import rootfile
rootfile.SENSITIVE = rootfile.Cost(1, 8192)
from sealpushd.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_people_type_their_passphrases_at_a_terminal_that_shows_none(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    path = tmp_path / "root.json"
    arguments = ["root", "create", str(path), "--person", "Anna", "--person", "Borys"]
    with subprocess.Popen(
        [sys.executable, "-c", _AT_A_TERMINAL, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = ""
        for prompt, typed in (
            ("Anna, your passphrase: ", "too short"),
            ("must have 12 characters or more", None),
            ("Anna, your passphrase: ", PASSPHRASES["Anna"]),
            ("Repeat for confirmation: ", "not the same again"),
            ("do not match", None),
            ("Anna, your passphrase: ", PASSPHRASES["Anna"]),
            ("Repeat for confirmation: ", PASSPHRASES["Anna"]),
            ("Borys, your passphrase: ", PASSPHRASES["Borys"]),
            ("Repeat for confirmation: ", PASSPHRASES["Borys"]),
        ):
            part = b""
            while prompt.encode() not in part:
                assert select.select([ours], [], [], 30)[0], f"waited for {prompt!r}, saw {part!r}"
                part += os.read(ours, 1)
            seen += part.decode()
            if typed is not None:
                os.write(ours, typed.encode() + b"\n")
        try:
            while more := os.read(ours, 1024):
                seen += more.decode()
        except OSError as e:
            if e.errno != errno.EIO:  # how a terminal says that nobody has it open any more
                raise
        assert process.wait(10) == 0
    os.close(ours)
    assert not any(passphrase in seen for passphrase in PASSPHRASES.values())
    assert public_key_of(path).hex() in seen
    opened = rootfile.open_root(rootfile.RootFile.decode(path.read_bytes()), {name: PASSPHRASES[name] for name in ("Anna", "Borys")})
    assert opened.public_key == public_key_of(path)
