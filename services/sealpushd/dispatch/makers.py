"""What a stored credential becomes: a provider that pushes with it. One maker a kind of push service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509

from sealpushd.dispatch.providers.apns import ApnsProvider, ApnsSettings
from sealpushd.dispatch.providers.base import Provider
from sealpushd.dispatch.providers.fcm import FcmProvider, FcmSettings
from sealpushd.dispatch.providers.hms import HmsProvider, HmsSettings, parse_credential
from sealpushd.dispatch.providers.http import HttpSettings
from sealpushd.dispatch.receipts import ReceiptKey
from sealpushd.platform.clock import Clock
from sealpushd.platform.settings import Settings, SettingsError

VALUE_CHARACTERS_MAX: Final = 256


class CredentialError(Exception):
    """A credential cannot be used; the message says why and what to do, without the secret. `field`: what of the request is wrong."""

    def __init__(self, message: str, *, field: str = "credential") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class PushServices:
    """Where the push services are and how they are reached: the same for all credentials."""

    apns_production_url: str
    apns_sandbox_url: str
    fcm_url: str
    hms_url: str
    hms_token_url: str
    http: HttpSettings

    @classmethod
    def of(cls, settings: Settings) -> PushServices:
        """Raises SettingsError that names the setting that is wrong."""
        if settings.push_ca is not None and not settings.push_ca.is_file():
            raise SettingsError(f"SEALPUSH_PUSH_CA: {settings.push_ca} is not a file")
        http = HttpSettings(
            private_ca_file=settings.push_ca,
            proxy_url=settings.proxy.get_secret_value() if settings.proxy is not None else None,
            streams_max=settings.push_concurrency,
        )
        _check_http(http)
        return cls(
            _base_url(settings.apns_production_url, "SEALPUSH_APNS_PRODUCTION_URL"),
            _base_url(settings.apns_sandbox_url, "SEALPUSH_APNS_SANDBOX_URL"),
            _base_url(settings.fcm_url, "SEALPUSH_FCM_URL"),
            _base_url(settings.hms_url, "SEALPUSH_HMS_URL"),
            _url(settings.hms_token_url, "SEALPUSH_HMS_TOKEN_URL"),
            http,
        )


@dataclass(frozen=True, slots=True)
class Config:
    """A credential in the clear: which push service, what is no secret, and the secret."""

    kind: str
    values: Mapping[str, str]
    secret: bytes = field(repr=False)


def _apns(config: Config, services: PushServices, clock: Clock) -> Provider:
    return ApnsProvider(
        ApnsSettings(
            key_id=config.values["key_id"],
            team_id=config.values["team_id"],
            private_key_pem=config.secret,
            topic=config.values["topic"],
            production_url=services.apns_production_url,
            sandbox_url=services.apns_sandbox_url,
            http=services.http,
        ),
        clock,
    )


def _fcm(config: Config, services: PushServices, clock: Clock) -> Provider:
    return FcmProvider(
        FcmSettings(service_account=config.secret, project=config.values.get("project", ""), base_url=services.fcm_url, http=services.http),
        clock,
    )


def _hms(config: Config, services: PushServices, clock: Clock) -> Provider:
    return HmsProvider(
        HmsSettings.parse(config.secret, base_url=services.hms_url, token_url=services.hms_token_url, http=services.http), clock
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """A push service: how its provider is made, and which values a credential must and may have beside its secret."""

    make: Callable[[Config, PushServices, Clock], Provider]
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()


KINDS: Final[Mapping[str, Kind]] = {
    "apns": Kind(_apns, needs=frozenset({"key_id", "team_id", "topic"})),
    "fcm": Kind(_fcm, takes=frozenset({"project"})),
    "hms": Kind(_hms),
}


def make(config: Config, services: PushServices, clock: Clock) -> Provider:
    """A provider that pushes with the credential. Raises CredentialError."""
    kind = KINDS.get(config.kind)
    if kind is None:
        raise CredentialError(f"there is no push service {config.kind!r}; known are {', '.join(KINDS)}", field="push_service")
    missing = kind.needs - {name for name, value in config.values.items() if value}
    if missing:
        raise CredentialError(f"a credential of {config.kind} needs {', '.join(sorted(missing))}", field="settings")
    unknown = config.values.keys() - kind.needs - kind.takes
    if unknown:
        raise CredentialError(f"a credential of {config.kind} has no {', '.join(sorted(unknown))}", field="settings")
    for name, value in config.values.items():
        if len(value) > VALUE_CHARACTERS_MAX or not value.isascii() or not value.isprintable() or value != value.strip():
            raise CredentialError(
                f"{name} must be at most {VALUE_CHARACTERS_MAX} printable ASCII characters without spaces around", field="settings"
            )
    try:
        return kind.make(config, services, clock)
    except (ValueError, OSError) as e:
        raise CredentialError(str(e)) from e


def receipt_key_of(config: Config) -> ReceiptKey | None:
    """What the push service signs its delivery receipts with; None: it sends none. Of a credential that `make` has taken."""
    if config.kind != "hms":
        return None
    credential = parse_credential(config.secret)
    return ReceiptKey(credential.receipt_user, credential.receipt_key) if credential.receipt_key else None


def _check_http(http: HttpSettings) -> None:
    """Raises SettingsError once, where else every credential would be blamed. The text quotes no URL: a proxy's may hold a password."""
    if http.private_ca_file is not None:
        try:
            certificates = x509.load_pem_x509_certificates(http.private_ca_file.read_bytes())
        except (ValueError, OSError):
            certificates = []
        if not certificates:
            raise SettingsError(f"SEALPUSH_PUSH_CA: {http.private_ca_file} holds no certificate in PEM")
    if http.proxy_url is not None:
        try:
            parts = urlsplit(http.proxy_url)
            is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            is_one = False
        if not is_one:
            raise SettingsError("SEALPUSH_PROXY: must be http://host:port")


def _base_url(url: str, variable: str) -> str:
    checked = _url(url, variable)
    if urlsplit(checked).path not in ("", "/"):
        raise SettingsError(f"{variable}: must be https://host or https://host:port")
    return checked.rstrip("/")


def _url(url: str, variable: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        raise SettingsError(f"{variable}: not a URL: {e}") from e
    if parts.scheme != "https" or not host or parts.query or parts.fragment or "@" in parts.netloc:
        raise SettingsError(f"{variable}: must begin with https:// and a host, and have neither a user nor a query")
    return url
