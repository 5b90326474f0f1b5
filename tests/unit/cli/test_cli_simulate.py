"""`sealpush simulate`: what the options become, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sealpushd.cli.app import run
from sealpushd.simulators import server
from sealpushd.simulators.server import HmsClient, ServiceAccount, SimulatorSettings

CLIENT = {"app_id": "104000001", "client_secret": "secret"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[SimulatorSettings]:
    """The settings that would be run."""
    settings: list[SimulatorSettings] = []
    monkeypatch.setattr(server, "run_simulators", settings.append)
    return settings


@pytest.fixture
def tls(tmp_path: Path) -> list[str]:
    for name in ("cert.pem", "key.pem", "ca.pem"):
        (tmp_path / name).write_text("x")
    return ["--certificate", str(tmp_path / "cert.pem"), "--private-key", str(tmp_path / "key.pem")]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def account(key: rsa.RSAPrivateKey) -> dict[str, str]:
    """A service account's file as Google hands it out."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    ids = {"type": "service_account", "project_id": "demo-bank", "client_email": "push@example", "private_key_id": "k1"}
    return {**ids, "private_key": pem, "token_uri": "https://oauth2.googleapis.com/token"}


@pytest.mark.parametrize(("command", "vendors"), [("apns", "apns"), ("fcm", "fcm"), ("hms", "hms"), ("all", "apns fcm hms")])
def test_each_command_runs_its_vendors_also_without_credentials(
    started: list[SimulatorSettings], tls: list[str], command: str, vendors: str
) -> None:
    assert run(["simulate", command, *tls]) == 0
    [settings] = started
    assert {name for name in ("apns", "fcm", "hms") if getattr(settings, name) is not None} == set(vendors.split())
    assert (settings.control_port, settings.host) == (7190, "127.0.0.1")


def test_all_takes_ports_and_credentials_of_all(
    started: list[SimulatorSettings], tls: list[str], tmp_path: Path, key: rsa.RSAPrivateKey
) -> None:
    (tmp_path / "provider.pem").write_bytes(b"public key")
    ca = str(tmp_path / "ca.pem")
    ports = ["--apns-port", "1", "--fcm-port", "2", "--hms-port", "3", "--control-port", "4"]
    signed = CLIENT | {"receipt_user": "user", "receipt_key": "key"}
    credentials = [
        *("--provider-key", f"TEAM:KEY:{tmp_path / 'provider.pem'}"),
        *("--service-account", write(tmp_path / "account.json", account(key))),
        *("--client", write(tmp_path / "one.json", CLIENT), "--client", write(tmp_path / "two.json", signed)),
        *("--receipt-url", "https://localhost:5/receipts", "--receipt-ca", ca),
    ]
    assert run(["simulate", "all", *tls, *ports, *credentials]) == 0
    [settings] = started
    assert settings.apns is not None
    assert settings.fcm is not None
    assert settings.hms is not None
    assert settings.hms.receipts is not None
    assert (settings.apns.port, settings.fcm.port, settings.hms.port, settings.control_port) == (1, 2, 3, 4)
    assert [(one.team_id, one.key_id, one.public_key_pem) for one in settings.apns.provider_keys] == [("TEAM", "KEY", b"public key")]
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert list(settings.fcm.service_accounts) == [ServiceAccount("demo-bank", "push@example", "k1", public)]
    assert list(settings.hms.clients) == [HmsClient("104000001", "secret"), HmsClient("104000001", "secret", "user", "key")]
    assert (settings.hms.receipts.url, settings.hms.receipts.ca) == ("https://localhost:5/receipts", Path(ca))


BAD_FILES: dict[str, tuple[str, object, str]] = {
    "array": ("--client", [], "no JSON object"),
    "no secret": ("--client", {"app_id": "1"}, "client_secret must be a string"),
    "empty secret": ("--client", {"app_id": "1", "client_secret": ""}, "client_secret must be a string"),
    "number": ("--client", {"app_id": 1, "client_secret": "x"}, "app_id must be a string"),
    "misspelt": ("--client", CLIENT | {"receipt_usr": "x"}, "receipt_usr is not known"),
    "account without key": ("--service-account", {"project_id": "p", "client_email": "e", "private_key_id": "k"}, "private_key must be"),
    "account with no key": (
        "--service-account",
        {"project_id": "p", "client_email": "e", "private_key_id": "k", "private_key": "x"},
        "no PEM private key",
    ),
}


@pytest.mark.parametrize(("option", "content", "problem"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_bad_credentials_are_refused_by_name(
    started: list[SimulatorSettings],
    tls: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    content: object,
    problem: str,
) -> None:
    assert run(["simulate", "all", *tls, option, write(tmp_path / "file.json", content)]) == 2
    assert problem in capsys.readouterr().err
    assert started == []


BAD_RECEIPTS = {
    "plain": (["--receipt-url", "http://localhost/receipts"], "must be an https URL"),
    "authority alone": (["--receipt-ca", "cert.pem"], "--receipt-url, which is missing"),
}


@pytest.mark.parametrize(("options", "problem"), BAD_RECEIPTS.values(), ids=list(BAD_RECEIPTS))
def test_bad_receipts_are_refused(
    tls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["simulate", "hms", *tls, *options]) == 2
    assert problem in capsys.readouterr().err


def test_certificate_that_is_none_is_told(tls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ports = ["--fcm-port", "0", "--control-port", "0"]
    assert run(["simulate", "fcm", *tls, *ports]) == 1
    assert "no PEM chain" in capsys.readouterr().err
