"""Wires dispatch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from sealpush.v1 import common_pb2
from sealpushd.dispatch.lanes import Lane, LaneSet
from sealpushd.dispatch.providers.apns import ApnsProvider, ApnsSettings
from sealpushd.dispatch.providers.base import Provider
from sealpushd.dispatch.service import LanesService
from sealpushd.dispatch.session import Dispatcher
from sealpushd.dispatch.store import LaneStore
from sealpushd.platform.clock import Clock
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.platform.settings import Settings, SettingsError
from sealpushd.v1 import lanes_pb2_grpc

# Of the time to drain, what sends may use; the rest is for the session's end and the listener.
DRAIN_SHARE: Final = 0.75


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """What makes a lane, wherever it is written down: settings of the process today, rows of `providers` next."""

    app_id: str
    platform: int
    kind: str
    # Topic, package or project of installations that name none.
    topic: str
    secret: bytes = field(repr=False)
    # As the kind's own maker reads them.
    values: Mapping[str, str] = field(default_factory=dict)


def configured(settings: Settings) -> list[ProviderConfig]:
    """The lanes that the settings name; raises SettingsError that says what is missing or wrong."""
    if not settings.apns_app_id:
        return []
    settings.need("apns_key_id", "apns_team_id", "apns_private_key")
    assert settings.apns_private_key is not None  # noqa: S101 - need() has just made sure
    try:
        secret = settings.apns_private_key.read_bytes()
    except OSError as e:
        raise SettingsError(f"SEALPUSH_APNS_PRIVATE_KEY: {settings.apns_private_key} cannot be read: {e.strerror}") from e
    values = {
        "key_id": settings.apns_key_id,
        "team_id": settings.apns_team_id,
        "production_url": settings.apns_production_url,
        "sandbox_url": settings.apns_sandbox_url,
    }
    return [ProviderConfig(settings.apns_app_id, common_pb2.PLATFORM_IOS, "apns", settings.apns_topic, secret, values)]


def _apns(config: ProviderConfig, settings: Settings, clock: Clock) -> Provider:
    production_host, port = _host_and_port(config.values["production_url"], "SEALPUSH_APNS_PRODUCTION_URL")
    sandbox_host, sandbox_port = _host_and_port(config.values["sandbox_url"], "SEALPUSH_APNS_SANDBOX_URL")
    if port != sandbox_port:
        raise SettingsError("SEALPUSH_APNS_PRODUCTION_URL and SEALPUSH_APNS_SANDBOX_URL must have the same port")
    try:
        return ApnsProvider(
            ApnsSettings(
                key_id=config.values["key_id"],
                team_id=config.values["team_id"],
                private_key_pem=config.secret,
                production_host=production_host,
                sandbox_host=sandbox_host,
                port=port,
                private_ca_file=settings.apns_ca,
                proxy_url=settings.proxy,
                streams_max=settings.push_concurrency,
            ),
            clock,
        )
    except (ValueError, OSError) as e:
        raise SettingsError(f"the APNs lane of {config.app_id} cannot be made: {e}") from e


# One maker a kind of push service; FCM and HMS join here.
MAKERS: Final[Mapping[str, Callable[[ProviderConfig, Settings, Clock], Provider]]] = {"apns": _apns}


def _host_and_port(url: str, variable: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError as e:
        raise SettingsError(f"{variable}: not a URL: {e}") from e
    if parts.scheme != "https" or not host or parts.path not in ("", "/") or parts.query or parts.username:
        raise SettingsError(f"{variable}: must be https://host or https://host:port")
    return f"[{host}]" if ":" in host else host, port


async def build(runtime: Runtime) -> ServiceApp:
    """The dispatch service: mesh Lanes, and the session with the mailbox. Needs PostgreSQL."""
    settings, clock, dice = runtime.settings, runtime.clock, random.Random().random  # noqa: S311 - jitter
    store = LaneStore(await runtime.database())
    made = []
    for config in configured(settings):
        provider = MAKERS[config.kind](config, settings, clock)
        runtime.closes.append(provider.aclose)
        made.append(
            Lane(
                config.app_id,
                config.platform,
                provider,
                topic=config.topic,
                capacity=settings.push_concurrency,
                clock=clock,
                random=dice,
            )
        )
    lanes = LaneSet(made)
    dispatcher = Dispatcher(
        lanes,
        runtime.channel("fetch"),
        runtime.channel("registration"),
        clock,
        dice,
        drain_limit=DRAIN_SHARE * timedelta(seconds=settings.drain_seconds),
    )
    service = LanesService(lanes, store, clock)
    await service.refresh()
    return ServiceApp(
        mesh=[(lanes_pb2_grpc.add_LanesServicer_to_server, service)],
        tasks=[dispatcher.run, service.follow],
        drain=dispatcher.drain,
    )
