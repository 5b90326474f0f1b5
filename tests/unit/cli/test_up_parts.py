"""The parts of `sealpush up` that need no processes."""

import dataclasses
import json
import os
import socket
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sealpushd.cli.prepare import prepare
from sealpushd.engines import process
from sealpushd.platform.migrate import SERVICES
from sealpushd.platform.settings import Settings
from sealpushd.platform.tokens import ServiceKey, TokenVerifier
from sealpushd.up import ports, secrets, stack, vendors
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError
from sealpushd.up.ports import Ports

CERTIFICATES = ["services", "simulators"]


def secret_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    secrets.prepare(folder, CERTIFICATES)
    first = secret_files(folder)
    secrets.prepare(folder, CERTIFICATES)
    assert secret_files(folder) == first
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_services_trust_each_other_and_nobody_else(tmp_path: Path) -> None:
    made = secrets.prepare(tmp_path, CERTIFICATES)
    verifier = TokenVerifier.load(made.trust)
    for name in (*SERVICES, "operator"):
        verifier.verify(ServiceKey.load(name, made.service_key(name)).mesh_token())
    assert set(json.loads(made.trust.read_text())) == {*SERVICES, "operator"}


def test_a_second_key_in_the_trust_file_stays_and_a_missing_one_is_added(tmp_path: Path) -> None:
    made = secrets.prepare(tmp_path, CERTIFICATES)
    trusted = json.loads(made.trust.read_text())
    trusted["fetch"].append("ab" * 32)
    trusted["partner"] = ["cd" * 32]
    own = trusted.pop("keys")
    made.trust.write_text(json.dumps(trusted))
    secrets.prepare(tmp_path, CERTIFICATES)
    assert json.loads(made.trust.read_text()) == trusted | {"keys": own}

    made.trust.write_text("[]")
    with pytest.raises(UpError, match=r"trust\.json is no trust file .*remove it"):
        secrets.prepare(tmp_path, CERTIFICATES)


def test_a_certificate_from_elsewhere_stays_to_the_byte(tmp_path: Path) -> None:
    made = secrets.prepare(tmp_path / "ours", CERTIFICATES)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "push.example")])
    soon = datetime.now(UTC) + timedelta(days=1)
    elsewhere = x509.CertificateBuilder(name, name, key.public_key(), 1, soon - timedelta(days=90), soon).sign(key, hashes.SHA256())
    certificate, private_key = made.certificate("services")
    certificate.write_bytes(elsewhere.public_bytes(Encoding.PEM))
    private_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    before = secret_files(made.folder)
    secrets.prepare(made.folder, CERTIFICATES)
    assert secret_files(made.folder) == before

    private_key.unlink()
    with pytest.raises(UpError, match=r"services\.pem has no services\.key beside it"):
        secrets.prepare(made.folder, CERTIFICATES)


def test_preparing_again_changes_no_byte_and_says_what_it_made(tmp_path: Path) -> None:
    first = CliRunner().invoke(prepare, [str(tmp_path)])
    assert first.exit_code == 0
    assert "made: accounts.toml, admin-url, " in first.output
    files = secret_files(tmp_path)

    second = CliRunner().invoke(prepare, [str(tmp_path)])
    assert "made: nothing, all is there" in second.output
    assert secret_files(tmp_path) == files

    (tmp_path / "valkey.conf").write_text("maxmemory 4gb\n")
    (tmp_path / "admin-url").write_text("postgresql://admin@elsewhere/sealpush\n")
    (tmp_path / "accounts.toml").unlink()
    files |= {"valkey.conf": b"maxmemory 4gb\n", "admin-url": b"postgresql://admin@elsewhere/sealpush\n"}
    third = CliRunner().invoke(prepare, [str(tmp_path)])
    assert "made: accounts.toml\n" in third.output
    assert f"{tmp_path / 'valkey.conf'} stays as it is" in third.output
    assert f"{tmp_path / 'admin-url'} stays as it is" in third.output
    assert secret_files(tmp_path) == files

    moved = CliRunner().invoke(prepare, [str(tmp_path), "--postgres", "db.example:5432"])
    assert f"{tmp_path / 'fetch.toml'} stays as it is" in moved.output
    assert secret_files(tmp_path) == files
    assert all(secret not in moved.output for secret in json.loads(files["role-passwords.json"]).values())


@pytest.mark.parametrize("name", ["keys/fetch.key", "vault.key", "platform.key", "role-passwords.json"])
def test_a_half_made_folder_is_completed_and_a_lost_secret_never_replaced(name: str, tmp_path: Path) -> None:
    secrets.prepare(tmp_path, CERTIFICATES)
    (tmp_path / "complete").unlink()
    (tmp_path / name).unlink()
    secrets.prepare(tmp_path, CERTIFICATES)

    (tmp_path / name).unlink()
    with pytest.raises(UpError, match=f"{name} is missing. Restore"):
        secrets.prepare(tmp_path, CERTIFICATES)


@pytest.mark.parametrize("name", ["keys/fetch.key", "vault.key", "role-passwords.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}"])
def test_a_damaged_secret_is_named_and_its_content_is_not(name: str, content: bytes, tmp_path: Path) -> None:
    secrets.prepare(tmp_path, CERTIFICATES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpError, match=f"{name} is damaged"):
        secrets.prepare(tmp_path, CERTIFICATES)


def test_damaged_certificates_may_simply_be_removed(tmp_path: Path) -> None:
    secrets.prepare(tmp_path, CERTIFICATES)
    (tmp_path / "tls" / "ca.key").write_bytes(b"")
    with pytest.raises(UpError, match=r"tls is damaged .*Remove it"):
        secrets.prepare(tmp_path, CERTIFICATES)


def test_the_root_key_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "root.key"
    assert secrets.load_root(path).public_key == secrets.load_root(path).public_key
    path.write_bytes(b"x")
    with pytest.raises(UpError, match="damaged"):
        secrets.load_root(path)


@pytest.mark.parametrize("processes", range(1, ports.PROCESSES_MAX + 1))
def test_no_two_listeners_share_a_port(processes: int) -> None:
    assert len(Ports(7100, processes).all()) == 3 * len(SERVICES) * processes + 5
    assert max(Ports(7100, processes).all()) <= 7100 + ports.HIGHEST
    assert ports.SERVICES == SERVICES


def test_several_processes_are_one_target_of_which_each_listener_is_told_by_itself() -> None:
    assert Ports(7100).target("keys", "public", "localhost") == "localhost:7103"
    target = Ports(7100, 2).target("keys", "public", "localhost")
    assert target == "ipv4:127.0.0.1:7103,127.0.0.1:7113"
    listeners = dataclasses.replace(endpoints(), public={"keys": target}).listeners()
    assert (listeners["keys"], listeners["keys-2"]) == ("127.0.0.1:7103", "127.0.0.1:7113")


def test_a_taken_port_is_named_with_what_to_do(free_base_port: int) -> None:
    base = Ports(free_base_port)
    base.check_free()
    with socket.socket() as other:
        other.bind(("127.0.0.1", base.of("publishing", "public")))
        other.listen()
        with pytest.raises(UpError, match=rf"port {base.of('publishing', 'public')} \(publishing, public\) is taken .*--base-port"):
            base.check_free(patience_s=0)


def endpoints() -> Endpoints:
    return Endpoints(
        pid=1,
        ca="/ca.pem",
        public={"accounts": "localhost:1"},
        mesh={"accounts": "127.0.0.1:2"},
        metrics={"accounts": "127.0.0.1:5"},
        simulators="127.0.0.1:3",
        push_services={"APNs": "127.0.0.1:4"},
        postgres_url="postgresql://hidden",
        valkey_url="redis://hidden",
        operator_key="/k",
        app_id="demo-bank",
        login="demo",
        password="hidden",
        senders={"demo-bank": "00"},
        phone="+380501234567",
        root_public_key="00",
        demo_folder="/demo",
    )


def test_endpoints_travel_through_a_private_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    endpoints().write(tmp_path)
    assert stat.S_IMODE((tmp_path / "run" / "endpoints.json").stat().st_mode) == 0o600
    assert Endpoints.load(tmp_path) == endpoints()
    assert "hidden" not in repr(endpoints())
    Endpoints.remove(tmp_path)
    with pytest.raises(UpError, match="no `sealpush up` runs"):
        Endpoints.load(tmp_path)


def test_endpoints_of_a_killed_run_say_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    dataclasses.replace(endpoints(), pid=gone.pid).write(tmp_path)
    with pytest.raises(UpError, match=f"process {gone.pid}, was killed: start it again"):
        Endpoints.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 3}'])
def test_damaged_endpoints_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "endpoints.json").write_text(content)
    with pytest.raises(UpError):
        Endpoints.load(tmp_path)


def test_another_role_uses_the_same_database() -> None:
    url = stack.role_url("postgresql://postgres:s%2Fx@/sealpush?host=/run/s-1&port=5432", "fetch_app", "abc")
    assert url == "postgresql://fetch_app:abc@/sealpush?host=/run/s-1&port=5432"


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_gets_settings_that_exist_and_only_its_own_secrets(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEALPUSH_CONFIG", "/elsewhere.toml")
    made = secrets.prepare(tmp_path, CERTIFICATES)
    accounts = vendors.prepare(tmp_path / "push", "https://localhost:1/token")
    environment = stack.environment(service, Ports(7100), made, accounts, "postgresql://postgres:x@/sealpush", "redis://x", "info")
    ours = {name for name in environment if name.startswith("SEALPUSH_")}
    assert ours <= {f"SEALPUSH_{name.upper()}" for name in Settings.model_fields}
    assert environment["PATH"] == os.environ["PATH"]
    for other in set(SERVICES) - {service}:
        assert made.role_passwords[f"{other}_app"] not in str(environment)
        assert f"/{other}.key" not in str(environment)
    assert ("SEALPUSH_PLATFORM_KEY" in ours) == (service == "keys")
    assert ("SEALPUSH_CREDENTIALS" in ours) == (service == "dispatch")


def test_a_log_is_bounded_while_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 10)
    path = tmp_path / "x.log"
    process.bound_log(path)
    with path.open("ab", buffering=0) as stream:
        stream.write(b"01234567890")
        process.bound_log(path)
        stream.write(b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "x.log.1").read_bytes() == b"01234567890"
