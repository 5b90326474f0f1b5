"""Settings: where they come from, and that a wrong one is named and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealpushd.platform.settings import CONFIG_VARIABLE, Settings, SettingsError, default_port, load, reference

SECRET = "postgresql://fetch_app:hunter2@host/sealpush"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sealpush.toml"
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    return path


def test_the_environment_comes_before_the_file_and_the_file_before_the_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('host = "192.0.2.1"\nlog_level = "error"\n')
    monkeypatch.setenv("SEALPUSH_LOG_LEVEL", "debug")
    loaded = load()
    assert (loaded.host, loaded.log_level, loaded.postgres_connections) == ("192.0.2.1", "debug", 4)


def test_an_unknown_key_of_the_file_is_refused_by_name(config: Path) -> None:
    config.write_text(f'postgres_ulr = "{SECRET}"\n')
    with pytest.raises(SettingsError, match="POSTGRES_ULR") as caught:
        load()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_CONNECTIONS", "hunter2"),
        ("POSTGRES_CONNECTIONS", "0"),
        ("LOG_LEVEL", "hunter2"),
        ("TRACES", "hunter2"),
        ("PUBLIC_PORT", "70000"),
        ("DRAIN_SECONDS", "hunter2"),
        ("CODE_CHANNEL", "hunter2"),
    ],
)
def test_a_wrong_value_is_named_and_never_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SEALPUSH_{name}", value)
    with pytest.raises(SettingsError, match=f"SEALPUSH_{name}") as caught:
        load()
    assert value not in str(caught.value).split()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("content", [b'host = "hunter2', b"\xff\xfe", b"host", b'host = "a"\nhost = "hunter2"'])
def test_a_file_that_is_no_toml_is_named_and_never_shown(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(SettingsError, match=r"sealpush\.toml") as caught:
        load()
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_missing_is_named(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"sealpush\.toml"):
        load()


def test_secrets_do_not_print() -> None:
    loaded = load(postgres_url=SECRET, valkey_url="redis://:hunter2@host")
    for text in (repr(loaded), str(loaded), f"{loaded.postgres_url}"):
        assert "hunter2" not in text


def test_what_is_needed_and_missing_is_listed_at_once() -> None:
    with pytest.raises(SettingsError, match="SEALPUSH_SERVICE_KEY, SEALPUSH_TRUST"):
        load(host="h").need("service_key", "trust", "host")


def test_the_reference_lists_every_setting_with_its_meaning() -> None:
    text = reference()
    for name, field in Settings.model_fields.items():
        assert f"SEALPUSH_{name.upper()}  [" in text
        assert field.description
        assert field.description in text


def test_no_two_listeners_share_a_default_port() -> None:
    services = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")
    ports = [default_port(service, listener) for service in services for listener in ("public", "mesh", "metrics")]
    assert len(set(ports)) == len(ports)
    loaded = load(public_port=0)
    assert loaded.port("fetch", "public") == 0
    for service in services:
        assert getattr(loaded, f"{service}_mesh").endswith(f":{loaded.port(service, 'mesh')}")
