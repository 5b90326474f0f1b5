"""Settings of the services: environment variables `SEALPUSH_…` first, then the TOML file that `SEALPUSH_CONFIG` names, then defaults.

One class for the suite: a service reads the part it needs. `reference()` prints every setting with its default and meaning.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CONFIG_VARIABLE: Final = "SEALPUSH_CONFIG"

# Where services listen unless told otherwise: 71xx public, 72xx mesh, 73xx metrics, in this order.
_ORDER: Final = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")


def default_port(service: str, listener: Literal["public", "mesh", "metrics"], base: int = 7100) -> int:
    """The port of a service's listener; `base` moves all of them together."""
    return base + {"public": 0, "mesh": 100, "metrics": 200}[listener] + 1 + _ORDER.index(service)


class SettingsError(Exception):
    """A setting is missing or wrong; the message names each and says what it should be."""


class Settings(BaseSettings):
    """Every setting of the suite."""

    model_config = SettingsConfigDict(env_prefix="SEALPUSH_", extra="forbid", frozen=True)

    # What every service needs.
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged: debug, info, warning, error."
    )
    log_human: bool = Field(False, description="Log text for people instead of JSON.")
    traces: bool = Field(False, description="Send OpenTelemetry traces; the exporter reads the OTEL_… variables.")
    host: str = Field("127.0.0.1", description="Address all listeners bind to.")
    public_port: int | None = Field(None, ge=0, le=65535, description="Public listener; default by service (7101 …). 0: any free one.")
    mesh_port: int | None = Field(None, ge=0, le=65535, description="Mesh listener; default by service (7201 …). 0: any free one.")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="Metrics listener; default by service (7301 …). 0: any free one.")
    tls_certificate: Path | None = Field(None, description="PEM chain of the public listener. Needed where there is one.")
    tls_private_key: Path | None = Field(None, description="PEM key of the public listener.")
    public_connections: int = Field(
        10_000, ge=1, le=1_000_000, description="Connections to the public listener at once: 40 kB each, 70 kB with a live stream."
    )
    reflection: bool = Field(
        False, description="Offer gRPC server reflection on the public listener. For development: its streams are anybody's, without end."
    )
    drain_seconds: float = Field(8.0, gt=0, le=300, description="How long calls may finish after SIGTERM.")

    # Trust between services.
    service_key: Path | None = Field(None, description="File with this service's Ed25519 key (64 hex digits).")
    trust: Path | None = Field(None, description="JSON file: service name to list of public keys (hex).")

    # Stores.
    postgres_url: SecretStr | None = Field(None, description="PostgreSQL as the service's own role: postgresql://fetch_app:…@host/sealpush")
    postgres_connections: int = Field(4, ge=1, le=64, description="Pinned connections to PostgreSQL.")
    valkey_url: SecretStr | None = Field(None, description="Valkey: redis://…, rediss://… or unix://…")
    vault_key: Path | None = Field(None, description="File with the key outside PostgreSQL that wraps the data keys (64 hex digits).")

    # Where the other services' mesh listeners are.
    accounts_mesh: str = Field(
        "127.0.0.1:7201", description="Mesh address of accounts. Several processes: dns:///name:port, or ipv4:address:port,address:port."
    )
    registration_mesh: str = Field("127.0.0.1:7202", description="Mesh address of registration.")
    keys_mesh: str = Field("127.0.0.1:7203", description="Mesh address of keys.")
    publishing_mesh: str = Field("127.0.0.1:7204", description="Mesh address of publishing (health only).")
    dispatch_mesh: str = Field("127.0.0.1:7205", description="Mesh address of dispatch.")
    fetch_mesh: str = Field("127.0.0.1:7206", description="Mesh address of fetch.")

    # Registration.
    default_country: str | None = Field(
        None, description="Country (UA, KZ, …) in whose national form a number without + is read. Not set: such a number is refused."
    )
    test_numbers: str = Field(
        "", description="Beginnings of numbers that nobody has and that are taken all the same, for tests: +1555,+38000. Empty: none."
    )
    code_channel: Literal["simulated", "none"] = Field(
        "none", description="How one-time codes reach people: none, or simulated (an inbox, no SMS)."
    )
    code_channel_address: str = Field("127.0.0.1:7190", description="Address of the simulated SMS inbox.")
    code_lifetime_seconds: int = Field(300, ge=30, le=3600, description="How long a one-time code is good.")
    codes_per_number_hour: int = Field(5, ge=1, description="Codes sent to one number in an hour.")
    codes_per_address_hour: int = Field(100, ge=1, description="Codes asked for from one address in an hour.")
    codes_per_prefix_hour: int = Field(
        1000, ge=1, description="Codes sent to one number prefix (the number less its last 4 digits) in an hour."
    )

    # Sealing.
    platform_key: Path | None = Field(None, description="File with the platform's sealing key (64 hex digits). keys only.")

    # Dispatch. The credentials of the push services are put by `sealpush providers`.
    credentials: Path | None = Field(None, description="Folder of credential files that `sealpush providers add --mounted` may name.")
    apns_production_url: str = Field("https://api.push.apple.com", description="APNs for production tokens.")
    apns_sandbox_url: str = Field("https://api.sandbox.push.apple.com", description="APNs for sandbox tokens.")
    fcm_url: str = Field("https://fcm.googleapis.com", description="FCM. Its access tokens come from the service account's token_uri.")
    hms_url: str = Field("https://push-api.cloud.huawei.com", description="Huawei Push Kit.")
    hms_token_url: str = Field("https://oauth-login.cloud.huawei.com/oauth2/v3/token", description="Where Huawei gives access tokens.")
    push_ca: Path | None = Field(None, description="PEM of a private authority to trust towards the push services, beside the public ones.")
    proxy: SecretStr | None = Field(None, description="CONNECT proxy towards the push services: http://host:port")
    receipts_port: int | None = Field(
        None, ge=0, le=65535, description="Port for delivery receipts from Huawei, HTTPS with SEALPUSH_TLS_CERTIFICATE. Not set: none."
    )
    push_concurrency: int = Field(256, ge=1, le=1000, description="Wake-ups in flight a lane.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get(CONFIG_VARIABLE)
        if not path:
            return (init_settings, env_settings)
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(path)))

    def port(self, service: str, listener: Literal["public", "mesh", "metrics"]) -> int:
        given = {"public": self.public_port, "mesh": self.mesh_port, "metrics": self.metrics_port}[listener]
        return default_port(service, listener) if given is None else given

    def need(self, *names: str) -> None:
        """Raises SettingsError that lists those of the named settings that are not set."""
        missing = [name for name in names if getattr(self, name) in (None, "")]
        if missing:
            variables = ", ".join(f"SEALPUSH_{name.upper()}" for name in missing)
            raise SettingsError(f"not set: {variables} (see `sealpush settings`)")


def load(**overrides: Any) -> Settings:
    """The settings of this process; raises SettingsError that names every wrong one."""
    path = os.environ.get(CONFIG_VARIABLE)
    if path and not Path(path).is_file():
        raise SettingsError(f"{CONFIG_VARIABLE} names {path}, which is not a file")
    try:
        return Settings(**overrides)
    except ValidationError as e:
        # Never the value: it may be a secret.
        lines = [f"SEALPUSH_{'_'.join(map(str, error['loc'])).upper()}: {error['msg']}" for error in e.errors(include_input=False)]
        raise SettingsError("settings are wrong:\n  " + "\n  ".join(lines)) from None
    except ValueError as e:
        raise SettingsError(f"{path} is not a TOML file of settings: {e}") from None


def reference() -> str:
    """Every setting: variable, default, meaning."""
    lines = [
        "Settings come from the environment, then from the TOML file that SEALPUSH_CONFIG names (same names, lower case, without",
        "the prefix), then from these defaults.",
        "",
    ]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "not set" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"SEALPUSH_{name.upper()}  [{shown}]\n    {field.description}")
    return "\n".join(lines)
