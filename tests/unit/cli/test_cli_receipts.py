"""`sealpush receipt --verify`: offline, and what a person sees."""

import json
from pathlib import Path
from typing import Any

import pytest

from sealpushd.cli.app import run
from sealpushd.signedfile import Kind, SignedFile

VECTORS = json.loads((Path(__file__).resolve().parents[2] / "vectors/receipts.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in VECTORS["cases"]}
ROOT = CASES["sealed by the sender"]["root_public_key"]


def verify(folder: Path, name: str, *more: str, root: str = ROOT) -> int:
    """Exit code for a case of the vectors without changes, or for one with a change of the first level."""
    case = CASES[name]
    receipt = VECTORS["receipts"][case["receipt"]] | {change["path"][0]: change["value"] for change in case["changes"]}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return run(["receipt", "--verify", str(folder / "receipt.json"), "--root-public-key", root, *more])


def test_what_verifies_is_told_by_sender_device_and_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, "sealed by the server, for devices that say different things") == 0
    out = capsys.readouterr().out
    blocks = [block.splitlines()[0] for block in out.split("\n\n")]
    devices = [f"Device {each['device_id'][:8]}" for each in VECTORS["receipts"]["server"]["deliveries"]]
    assert [blocks[0], blocks[1], blocks[5]] == ["Receipt of message 018bcfe5-6800-7abc-8def-0123456789ab", "Sender", "Message"]
    assert [block[:15] for block in blocks[2:5]] == devices
    assert f"by the root {ROOT}" in out
    assert "could not open or show the message (DEVICE_CANNOT_OPEN)" in " ".join(out.split())
    by = "The sender's part is proven, by the key of the platform, which the sender lets speak for it."
    assert " ".join(out.split("\n\n")[-1].split()).startswith(f"{by} 2 devices signed that they opened the message;")
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "conclusion"),
    [
        ("evidence: recipient ref", "It does NOT verify"),
        ("another root", "It does NOT verify"),
        ("no evidence", "The sender's part is NOT proven. No device has signed"),
        ("no entry of the sender", "The sender's part is NOT proven. One device signed"),
    ],
)
def test_what_is_not_proven_fails_and_says_so(name: str, conclusion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, name, root=CASES[name]["root_public_key"]) == 1
    assert capsys.readouterr().out.split("\n\n")[-1].startswith(conclusion)


def test_without_a_word_of_a_device_the_senders_part_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, "no device has said anything") == 0
    assert "No device has signed that it opened the message." in capsys.readouterr().out


def test_a_program_gets_the_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, "sealed by the sender", "--json") == 0
    found: Any = json.loads(capsys.readouterr().out)
    assert (found["sender_proven"], found["failed"], found["root_public_key"]) == (True, False, ROOT)
    assert found["delivered_to"] == [each["device_id"] for each in found["claims"] if each["name"] == "delivered"]
    assert {each["finding"] for each in found["claims"]} == {"PROVEN", "UNPROVEN"}


def test_the_envelope_that_was_kept_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "envelope"
    kept.write_bytes(bytes.fromhex(CASES["the envelope"]["envelope"]))
    assert verify(tmp_path, "the envelope", "--envelope", str(kept)) == 0
    assert "The envelope that was given is this one" in capsys.readouterr().out
    kept.write_bytes(bytes.fromhex(CASES["another envelope"]["envelope"]))
    assert verify(tmp_path, "another envelope", "--envelope", str(kept)) == 1


def listed(folder: Path, name: str) -> str:
    """The revocation list of a case, as `sealpush root` writes it."""
    path = folder / "list"
    path.write_bytes(SignedFile(Kind.REVOCATIONS, bytes.fromhex(ROOT), bytes.fromhex(CASES[name]["revocations"])).encode())
    return str(path)


@pytest.mark.parametrize("name", ["the key is revoked", "the entry is revoked", "the platform's key is revoked"])
def test_what_the_root_took_back_is_told_apart_from_what_was_changed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, name, "--revocations", listed(tmp_path, name)) == 1
    out = capsys.readouterr().out
    assert "The root's revocation list 7, of 2023-11-15" in " ".join(out.split())
    assert out.split("\n\n")[-1].startswith("It verifies, but the root has REVOKED")
    # Without the list nobody would know.
    assert verify(tmp_path, name) == 0
    assert "no revocation list was given" in " ".join(capsys.readouterr().out.split())


def test_what_was_changed_is_not_excused_by_a_revocation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "revoked, and not signed by that key"
    assert verify(tmp_path, name, "--revocations", listed(tmp_path, name)) == 1
    assert capsys.readouterr().out.split("\n\n")[-1].startswith("It does NOT verify")


def test_a_list_that_takes_back_something_else_leaves_the_receipt_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, "another key is revoked", "--revocations", listed(tmp_path, "another key is revoked")) == 0
    assert "takes back neither the key" in " ".join(capsys.readouterr().out.split())


def test_a_list_of_another_root_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = CASES["another root"]["root_public_key"]
    assert verify(tmp_path, "another root", "--revocations", listed(tmp_path, "an empty list"), root=other) == 1
    assert "not signed by the root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give either a message id or --verify FILE"),
        (["0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b", "--verify", "FILE", "--root-public-key", ROOT], 2, "give either"),
        (["--verify", "FILE"], 2, "--verify needs --root-public-key"),
        (["--verify", "FILE", "--root-public-key", ROOT, "--out", "FILE"], 2, "no --out"),
        (["--verify", "FILE", "--root-public-key", "11"], 2, "64 hex digits"),
        (["--verify", "FILE", "--root-public-key", "x" * 64], 2, "64 hex digits"),
        (["--verify", "NOTHING", "--root-public-key", ROOT], 2, "does not exist"),
        (["--verify", "FILE", "--root-public-key", ROOT], 1, "this is not JSON"),
        (["--verify", "FILE", "--root-public-key", ROOT, "--envelope", "NOTHING"], 2, "does not exist"),
        (["--verify", "FILE", "--root-public-key", ROOT, "--revocations", "NOTHING"], 2, "does not exist"),
        (["--verify", "FILE", "--root-public-key", ROOT, "--revocations", "FILE"], 2, "nothing that `sealpush root` signed"),
        (["not-an-id", "--root-public-key", ROOT], 2, "is no message id"),
    ],
)
def test_a_wrong_call_says_what_to_do(
    arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_bytes(b"no receipt")
    given = [str(tmp_path / each) if each in ("FILE", "NOTHING") else each for each in arguments]
    assert run(["receipt", *given]) == code
    assert says in capsys.readouterr().err
