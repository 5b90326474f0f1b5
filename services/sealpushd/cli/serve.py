"""Commands that run one process: a service, the simulators; and the two that help whoever runs them."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Final

import click

from sealpushd.cli.errors import CommandFailed, WronglyCalled

SERVICES: Final = ("accounts", "registration", "keys", "publishing", "dispatch", "fetch")


@click.command(short_help="Run one service until SIGTERM.")
@click.argument("name", type=click.Choice(SERVICES))
def serve(name: str) -> None:
    """Run one service until SIGTERM, then let its calls finish and end.

    Everything is set by SEALPUSH_… variables or a TOML file, see `sealpush settings`. Logs go to standard error. The service
    refuses a database whose schema it does not know: migrate first, with `sealpush db migrate`.
    """
    import uvloop

    from sealpushd.platform import settings
    from sealpushd.platform.server import run_service

    loaded = settings.load()
    try:
        app = importlib.import_module(f"sealpushd.{name}.app")
    except ModuleNotFoundError as e:
        raise WronglyCalled(f"the service {name} is not installed ({e}): install `sealpush[server]`") from e
    uvloop.run(run_service(name, loaded, app.build))


@click.group(short_help="Run a simulated push service.")
def simulate() -> None:
    """Run peers that stand in for the outside world, for one machine and for tests."""


def _provider_key(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str, Path]]:
    keys = []
    for value in values:
        team_id, _sep, rest = value.partition(":")
        key_id, separator, path = rest.partition(":")
        if not separator or not Path(path).is_file():
            raise click.BadParameter(f"{value!r} is not TEAM_ID:KEY_ID:FILE with a file that exists")
        keys.append((team_id, key_id, Path(path)))
    return keys


@simulate.command()
@click.option("--apns-port", type=click.IntRange(0, 65535), default=7191, show_default=True, help="HTTP/2 with TLS, as Apple's. 0: any.")
@click.option("--control-port", type=click.IntRange(0, 65535), default=7190, show_default=True, help="gRPC for phones and SMS. 0: any.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the APNs side binds to.")
@click.option("--certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="PEM chain.")
@click.option("--private-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="PEM key.")
@click.option(
    "--provider-key",
    "provider_keys",
    multiple=True,
    callback=_provider_key,
    metavar="TEAM_ID:KEY_ID:FILE",
    help="Public key (PEM, P-256) of a provider to trust. Repeatable.",
)
def apns(
    apns_port: int, control_port: int, host: str, certificate: Path, private_key: Path, provider_keys: list[tuple[str, str, Path]]
) -> None:
    """Run a simulated APNs, its phones, and an SMS inbox, until SIGTERM."""
    from sealpushd.platform import logging
    from sealpushd.simulators.server import ProviderKey, SimulatorSettings, run_simulators

    logging.configure("simulators", "info")
    try:
        settings = SimulatorSettings(
            apns_certificate=certificate,
            apns_private_key=private_key,
            apns_host=host,
            apns_port=apns_port,
            control_port=control_port,
            provider_keys=[ProviderKey(team_id, key_id, path.read_bytes()) for team_id, key_id, path in provider_keys],
        )
        run_simulators(settings)
    except OSError as e:
        raise CommandFailed(f"the simulators cannot start: {e}; choose other ports with --apns-port and --control-port") from e


@click.command()
def settings() -> None:
    """Print every setting: variable, default, meaning."""
    from sealpushd.platform.settings import reference

    click.echo(reference())


@click.command(short_help="Ask a service whether it serves.")
@click.argument("address", metavar="HOST:PORT")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 60), default=3.0, show_default=True, help="Seconds to wait.")
def health(address: str, timeout_s: float) -> None:
    """Ask a service's mesh listener whether it serves; exit code 0 if so. For health checks of containers."""
    import grpc

    from sealpushd.up.health import ask

    try:
        answer = asyncio.run(ask(address, timeout_s=timeout_s))
    except grpc.aio.AioRpcError as e:
        raise CommandFailed(f"{address} does not answer: {e.code().name}") from e
    if answer != "SERVING":
        raise CommandFailed(f"{address} answers {answer}")
    click.echo(answer)
