"""compose.yaml names only settings, secrets and commands that exist."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sealpushd.cli.app import run
from sealpushd.platform.arrivals import WAITING_MAX
from sealpushd.platform.migrate import SERVICES
from sealpushd.platform.server import PUBLIC_REQUEST_BYTES_MAX
from sealpushd.platform.settings import CONFIG_VARIABLE, Settings, default_port
from sealpushd.up.ports import PUBLIC

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
CONTAINERS: dict[str, Any] = COMPOSE["services"]


def test_there_is_a_container_for_each_service_and_each_store() -> None:
    assert set(CONTAINERS) == {*SERVICES, "postgres", "valkey", "migrate", "maintenance"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_settings_that_exist_secrets_that_are_mounted_and_a_health_check(service: str) -> None:
    container = CONTAINERS[service]
    assert container["command"] == ["serve", service]
    for name, value in container["environment"].items():
        assert name == CONFIG_VARIABLE or name.removeprefix("SEALPUSH_").lower() in Settings.model_fields, name
        if value.startswith("/run/secrets/"):
            assert value.removeprefix("/run/secrets/") in container["secrets"]
    assert container["healthcheck"]["test"] == ["CMD", "sealpush", "health", f"127.0.0.1:{default_port(service, 'mesh')}"]
    assert container["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for peer in SERVICES:
        assert container["environment"][f"SEALPUSH_{peer.upper()}_MESH"] == f"dns:///{peer}:{default_port(peer, 'mesh')}"


@pytest.mark.parametrize("service", SERVICES)
def test_only_services_with_a_public_listener_publish_a_port(service: str) -> None:
    public = default_port(service, "public")
    published = CONTAINERS[service].get("ports", [])
    assert published == ([f"${{SEALPUSH_ADDRESS:-127.0.0.1}}:{public}:{public}"] if service in PUBLIC else [])


def test_only_the_service_that_needs_a_secret_gets_it() -> None:
    holders: dict[str, set[str]] = {}
    for name, container in CONTAINERS.items():
        for secret in container.get("secrets", ()):
            holders.setdefault(secret, set()).add(name)
    assert set(holders) == set(COMPOSE["secrets"])
    assert holders["platform_key"] == {"keys"}
    assert holders["admin_url"] == {"migrate"}
    assert holders["maintenance_url"] == {"maintenance"}
    for service in SERVICES:
        assert holders[f"{service}_key"] == holders[f"{service}_toml"] == {service}


def test_images_are_pinned_and_nothing_runs_as_root_with_all_powers() -> None:
    for name, container in CONTAINERS.items():
        image = container["image"].replace("${SEALPUSH_IMAGE:-", "").rstrip("}")
        _, _, tag = image.partition(":")
        assert tag, name
        assert tag != "latest"
        assert name == "postgres" or container["user"] == "${SEALPUSH_UID:-1000}"
    assert CONTAINERS["postgres"]["image"].startswith("postgres:18")
    assert CONTAINERS["valkey"]["image"].startswith("valkey/valkey:9")


def _bytes(size: str) -> int:
    return int(size[:-1]) * {"m": 1024**2, "g": 1024**3}[size[-1]]


def test_every_container_has_a_bound_on_its_memory_that_its_connections_fit_into() -> None:
    bounds = {name: _bytes(container["mem_limit"]) for name, container in CONTAINERS.items()}
    connections = Settings.model_fields["public_connections"].default
    at_rest = 100_000_000
    for service in PUBLIC:
        each = 70_000 if service == "fetch" else 40_000
        assert bounds[service] > at_rest + connections * each + WAITING_MAX * PUBLIC_REQUEST_BYTES_MAX[service], service


def test_prepare_makes_every_secret_that_compose_mounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "secrets"
    assert run(["prepare", str(folder)]) == 0
    for name, secret in COMPOSE["secrets"].items():
        path = folder / Path(secret["file"]).relative_to("deploy/secrets")
        assert path.read_text().strip(), name
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(["prepare", str(folder)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    for service in SERVICES:
        assert tomllib.loads((folder / f"{service}.toml").read_text()).keys() <= Settings.model_fields.keys()


def test_the_image_is_slim_and_not_root() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert all("-slim" in line for line in dockerfile.splitlines() if line.startswith("FROM"))
    assert "\nUSER 10001\n" in dockerfile
