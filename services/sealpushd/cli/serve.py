"""Commands that run one process: a service, the simulators; and the two that help whoever runs them."""

from __future__ import annotations

import asyncio
import importlib
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import click

from sealpushd.cli.errors import CommandFailed, WronglyCalled

if TYPE_CHECKING:
    from sealpushd.simulators.receipts import ReceiptSettings
    from sealpushd.simulators.server import HmsClient, ProviderKey, ServiceAccount, SimulatedApns, SimulatedFcm, SimulatedHms

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


@click.group(short_help="Run simulated push services.")
def simulate() -> None:
    """Run peers that stand in for the outside world, for one machine and for tests.

    Each command runs one push service, or all of them, with their phones and an SMS inbox, until SIGTERM. Phones and tests reach them
    over the control port. The ports are logged once everything listens.
    """


_Command = TypeVar("_Command", bound=Callable[..., None])
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_PORT: Final = click.IntRange(0, 65535)


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _provider_keys(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[ProviderKey]:
    from sealpushd.simulators.server import ProviderKey

    keys = []
    for value in values:
        team_id, _sep, rest = value.partition(":")
        key_id, separator, path = rest.partition(":")
        if not separator or not Path(path).is_file():
            raise click.BadParameter(f"{value!r} is not TEAM_ID:KEY_ID:FILE with a file that exists")
        keys.append(ProviderKey(team_id, key_id, Path(path).read_bytes()))
    return keys


def _service_accounts(_: click.Context, __: click.Parameter, values: tuple[Path, ...]) -> list[ServiceAccount]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    from sealpushd.simulators.server import ServiceAccount

    accounts = []
    for path in values:
        file = _json_file(path, required=("project_id", "client_email", "private_key_id", "private_key"), more=None)
        try:
            public_key = load_pem_private_key(file["private_key"].encode(), None).public_key()
        except (ValueError, TypeError) as e:
            raise click.BadParameter(f"{path}: private_key is no PEM private key") from e
        pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        accounts.append(ServiceAccount(file["project_id"], file["client_email"], file["private_key_id"], pem))
    return accounts


def _hms_clients(_: click.Context, __: click.Parameter, values: tuple[Path, ...]) -> list[HmsClient]:
    from sealpushd.simulators.server import HmsClient

    receipts = ("receipt_user", "receipt_key")
    return [HmsClient(**_json_file(path, required=("app_id", "client_secret"), more=receipts)) for path in values]


def _json_file(path: Path, required: Sequence[str], more: Sequence[str] | None) -> dict[str, str]:
    """The named strings of a JSON file; `more` may be there, anything else may not (None: it may, and is not read)."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as e:
        raise click.BadParameter(f"{path} is no JSON") from e
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} is no JSON object")
    unknown = set() if more is None else content.keys() - {*required, *more}
    if unknown:
        raise click.BadParameter(f"{path}: {', '.join(sorted(unknown))} is not known; it has {', '.join((*required, *(more or ())))}")
    read = {name: content[name] for name in (*required, *(more or ())) if name in content}
    for name in {*required, *read}:
        if not isinstance(read.get(name), str) or not read[name]:
            raise click.BadParameter(f"{path}: {name} must be a string with content")
    return read


_common_options = _options(
    click.option("--control-port", type=_PORT, default=7190, show_default=True, help="gRPC for phones and SMS. 0: any."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address the vendors' sides bind to."),
    click.option("--certificate", type=_FILE, required=True, help="PEM chain."),
    click.option("--private-key", type=_FILE, required=True, help="PEM key."),
)
_apns_options = _options(
    click.option("--apns-port", type=_PORT, default=7191, show_default=True, help="HTTP/2 with TLS, as Apple's. 0: any."),
    click.option(
        "--provider-key",
        "provider_keys",
        multiple=True,
        callback=_provider_keys,
        metavar="TEAM_ID:KEY_ID:FILE",
        help="Public key (PEM, P-256) of a provider to trust. Repeatable.",
    ),
)
_fcm_options = _options(
    click.option(
        "--fcm-port", type=_PORT, default=7192, show_default=True, help="HTTP/2 or 1.1 with TLS, as Google's; tokens at /token. 0: any."
    ),
    click.option(
        "--service-account",
        "service_accounts",
        multiple=True,
        type=_FILE,
        callback=_service_accounts,
        help="Service account to trust, the JSON file that the provider signs with. Repeatable.",
    ),
)
_hms_options = _options(
    click.option(
        "--hms-port",
        type=_PORT,
        default=7193,
        show_default=True,
        help="HTTP/2 or 1.1 with TLS, as Huawei's; tokens at /oauth2/v3/token. 0: any.",
    ),
    click.option(
        "--client",
        "hms_clients",
        multiple=True,
        type=_FILE,
        callback=_hms_clients,
        help='App to trust, JSON: {"app_id", "client_secret"} and, to sign receipts, {"receipt_user", "receipt_key"}. Repeatable.',
    ),
    click.option("--receipt-url", help="https URL that gets delivery receipts; without it none are sent."),
    click.option("--receipt-ca", type=_FILE, help="PEM of a private authority to trust at --receipt-url instead of the public ones."),
)


@simulate.command(short_help="A simulated APNs.")
@_apns_options
@_common_options
def apns(apns_port: int, provider_keys: list[ProviderKey], **common: Any) -> None:
    """Run a simulated APNs, its phones, and an SMS inbox, until SIGTERM."""
    from sealpushd.simulators.server import SimulatedApns

    _simulate(common, apns=SimulatedApns(apns_port, provider_keys))


@simulate.command(short_help="A simulated FCM with its token endpoint.")
@_fcm_options
@_common_options
def fcm(fcm_port: int, service_accounts: list[ServiceAccount], **common: Any) -> None:
    """Run a simulated FCM (HTTP v1) with Google's token endpoint, its phones, and an SMS inbox, until SIGTERM."""
    from sealpushd.simulators.server import SimulatedFcm

    _simulate(common, fcm=SimulatedFcm(fcm_port, service_accounts))


@simulate.command(short_help="A simulated Huawei Push Kit with its token endpoint.")
@_hms_options
@_common_options
def hms(hms_port: int, hms_clients: list[HmsClient], receipt_url: str | None, receipt_ca: Path | None, **common: Any) -> None:
    """Run a simulated Huawei Push Kit with its token endpoint, its phones, and an SMS inbox, until SIGTERM."""
    from sealpushd.simulators.server import SimulatedHms

    _simulate(common, hms=SimulatedHms(hms_port, hms_clients, _receipts(receipt_url, receipt_ca)))


@simulate.command("all", short_help="All of them in one process.")
@_apns_options
@_fcm_options
@_hms_options
@_common_options
def all_(
    apns_port: int,
    provider_keys: list[ProviderKey],
    fcm_port: int,
    service_accounts: list[ServiceAccount],
    hms_port: int,
    hms_clients: list[HmsClient],
    receipt_url: str | None,
    receipt_ca: Path | None,
    **common: Any,
) -> None:
    """Run simulated APNs, FCM and Huawei Push Kit, their phones, and an SMS inbox in one process, until SIGTERM.

    A push service without credentials runs too: it trusts nobody until a test registers some over the control port.
    """
    from sealpushd.simulators.server import SimulatedApns, SimulatedFcm, SimulatedHms

    _simulate(
        common,
        apns=SimulatedApns(apns_port, provider_keys),
        fcm=SimulatedFcm(fcm_port, service_accounts),
        hms=SimulatedHms(hms_port, hms_clients, _receipts(receipt_url, receipt_ca)),
    )


def _receipts(url: str | None, ca: Path | None) -> ReceiptSettings | None:
    from sealpushd.simulators.receipts import ReceiptSettings

    if url is None:
        if ca is not None:
            raise WronglyCalled("--receipt-ca is for --receipt-url, which is missing")
        return None
    if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
        raise WronglyCalled("--receipt-url must be an https URL: receipts name push tokens")
    return ReceiptSettings(url, ca)


def _simulate(
    common: Mapping[str, Any], *, apns: SimulatedApns | None = None, fcm: SimulatedFcm | None = None, hms: SimulatedHms | None = None
) -> None:
    from sealpushd.platform import logging
    from sealpushd.simulators.server import SimulatorSettings, run_simulators

    logging.configure("simulators", "info")
    try:
        run_simulators(SimulatorSettings(**common, apns=apns, fcm=fcm, hms=hms))
    except ssl.SSLError as e:
        raise CommandFailed(
            f"the simulators cannot start: --certificate and --private-key are no PEM chain and its key ({e.reason})"
        ) from e
    except OSError as e:
        raise CommandFailed(f"the simulators cannot start: {e}; choose other ports with --control-port and the vendors' own") from e
    except ValueError as e:
        raise WronglyCalled(f"a credential cannot be used: {e}") from e


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
