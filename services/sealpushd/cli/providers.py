"""`sealpush providers`: the credentials that wake-ups are pushed with, one a platform of an app."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sealpushd.cli.checks import CREDENTIAL_DAYS_LEFT_MIN
from sealpushd.cli.errors import WronglyCalled
from sealpushd.cli.installation import Installation, Service, installation_of
from sealpushd.cli.tables import table

if TYPE_CHECKING:
    from sealpush.v1 import common_pb2
    from sealpushd.v1 import providers_pb2

# Which push service a platform uses unless told otherwise.
PUSH_SERVICES: Final = {"ios": "apns", "android": "fcm", "huawei": "hms"}

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_file = click.Path(exists=True, dir_okay=False, path_type=Path)
app_argument = click.argument("app_id")
platform_argument = click.argument("platform", type=str)


def platform_number(text: str) -> common_pb2.Platform.ValueType:
    """The platform that "ios" or a newer one's number means. Raises WronglyCalled."""
    from sealpush.v1 import common_pb2

    if re.fullmatch("[0-9]{1,5}", text) and 0 < int(text) < 32768:
        return common_pb2.Platform.ValueType(int(text))
    try:
        number = common_pb2.Platform.Value(f"PLATFORM_{text.upper()}")
    except ValueError:
        number = common_pb2.PLATFORM_UNSPECIFIED
    if number == common_pb2.PLATFORM_UNSPECIFIED:
        known = ", ".join(name.removeprefix("PLATFORM_").lower() for name, value in common_pb2.Platform.items() if value)
        raise WronglyCalled(f"{text!r} is no platform: {known}")
    return number


@click.group(short_help="Set up the push services' credentials.")
def providers() -> None:
    """Set up the credentials that wake-ups are pushed with: one a platform of an app, for APNs, FCM or HMS.

    Every dispatch process takes a change over within seconds, without a restart. What each vendor asks for, step by step:
    docs/push-services.md.
    """


def _credential_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--push-service", type=click.Choice(["apns", "fcm", "hms"]), help="Default: that of the platform."),
        click.option("--secret-file", type=_file, help="apns: the .p8 key. fcm: the service account's JSON. hms: JSON, as above."),
        click.option("--mounted", metavar="NAME", help="Instead: name of that file in the folder SEALPUSH_CREDENTIALS of every dispatch."),
        click.option("--key-id", help="apns: id of the key, 10 characters."),
        click.option("--team-id", help="apns: id of the team, 10 characters."),
        click.option("--topic", help="apns: the app's bundle id."),
        click.option("--project", help="fcm: project id. Default: the service account's."),
        click.option("--expires", metavar="DATE", help="When the credential ends (2027-01-31), to be warned ahead."),
        click.option("--untested", is_flag=True, help="Take it although the push service refuses it or cannot be asked."),
        _json,
    )
    for option in reversed(options):
        command = option(command)
    return command


@providers.command("add", short_help="Add a credential.")
@app_argument
@platform_argument
@_credential_options
@installation_of("dispatch")
def add(installation: Installation, app_id: str, platform: str, **given: Any) -> None:
    """Add the credential that pushes of APP_ID on PLATFORM (ios, android, huawei) go out with.

    It is tried first: the push service is asked what it thinks of it, without waking any phone. The secret is stored
    encrypted. A secret file of hms holds {"app_id": …, "client_secret": …}, and for delivery receipts also "receipt_user"
    and "receipt_key".
    """
    kind = given["push_service"] or PUSH_SERVICES.get(platform_name(platform_number(platform)))
    if kind is None:
        raise WronglyCalled(f"say with --push-service what pushes to {platform}")
    _put(installation.service("dispatch"), app_id, platform, kind, given, replace=False)


@providers.command("rotate", short_help="Replace a credential, or a part of it.")
@app_argument
@platform_argument
@_credential_options
@installation_of("dispatch")
def rotate(installation: Installation, app_id: str, platform: str, **given: Any) -> None:
    """Replace the credential of APP_ID on PLATFORM. What is not given stays as it is, but a new secret without --expires has no end.

    The new one is tried first; the old one is used until the new one is stored, and no wake-up is lost in between. Revoke
    the old one in the vendor's console afterwards.
    """
    _put(installation.service("dispatch"), app_id, platform, given["push_service"] or "", given, replace=True)


def _put(dispatch: Service, app_id: str, platform: str, kind: str, given: dict[str, Any], *, replace: bool) -> None:
    from sealpushd.v1 import providers_pb2
    from sealpushd.v1.providers_pb2_grpc import ProvidersStub

    if given["secret_file"] is not None and given["mounted"]:
        raise WronglyCalled("give either --secret-file or --mounted")
    if not replace and given["secret_file"] is None and not given["mounted"]:
        raise WronglyCalled("give the credential: --secret-file or --mounted")
    request = providers_pb2.PutProviderRequest(
        app_id=app_id,
        platform=platform_number(platform),
        push_service=kind,
        settings={name: given[name] for name in ("key_id", "team_id", "topic", "project") if given[name]},
        replace=replace,
        untested=given["untested"],
    )
    if given["secret_file"] is not None:
        try:
            request.secret = given["secret_file"].read_bytes()
        except OSError as e:
            raise WronglyCalled(f"{given['secret_file']} cannot be read: {e.strerror}") from e
    elif given["mounted"]:
        request.secret_file = given["mounted"]
    if given["expires"]:
        request.expires_at.FromDatetime(_date(given["expires"]))
    answer = dispatch.call(ProvidersStub, "PutProvider", request)
    if given["as_json"]:
        click.echo(json.dumps({"app_id": app_id, "platform": platform, "verdicts": [_to_json(each) for each in answer.verdicts]}))
        return
    _show(answer.verdicts)
    click.echo(f"{'replaced' if replace else 'added'}: {app_id} on {platform}; every dispatch process uses it within seconds")


@providers.command("test", short_help="Ask a push service what it thinks of a credential.")
@app_argument
@platform_argument
@_json
@installation_of("dispatch")
def test(installation: Installation, app_id: str, platform: str, as_json: bool) -> None:
    """Ask the push service what it thinks of the stored credential of APP_ID on PLATFORM. No phone is woken.

    Exit code 0 if it works, 1 if it does not or the push service cannot be asked.
    """
    from sealpushd.v1 import providers_pb2
    from sealpushd.v1.providers_pb2_grpc import ProvidersStub

    request = providers_pb2.TestProviderRequest(
        app_id=app_id,
        platform=platform_number(platform),
    )
    answer = installation.service("dispatch").call(ProvidersStub, "TestProvider", request)
    if as_json:
        click.echo(json.dumps({"works": answer.works, "verdicts": [_to_json(each) for each in answer.verdicts]}))
    else:
        _show(answer.verdicts)
        click.echo(_conclusion(answer))
    if not answer.works:
        raise click.exceptions.Exit(1)


@providers.command("list", short_help="Show the credentials.")
@_json
@installation_of("dispatch")
def list_(installation: Installation, as_json: bool) -> None:
    """Show the credentials that are stored, never their secrets."""
    from sealpushd.v1 import providers_pb2
    from sealpushd.v1.providers_pb2_grpc import ProvidersStub

    answer = installation.service("dispatch").call(ProvidersStub, "ListProviders", providers_pb2.ListProvidersRequest())
    if as_json:
        click.echo(json.dumps([_stored_json(each) for each in answer.providers], indent=1))
        return
    if not answer.providers:
        click.echo("there are none: put one with `sealpush providers add`")
        return
    rows = [
        (
            one.app_id,
            platform_name(one.platform),
            one.push_service,
            ", ".join(f"{name}={value}" for name, value in sorted(one.settings.items())) or "-",
            f"file {one.secret_file}" if one.secret_file else "stored",
            one.fingerprint or "-",
            _expiry(one),
            f"{one.updated_at.ToDatetime():%Y-%m-%d %H:%M}",
        )
        for one in answer.providers
    ]
    click.echo(table(("APP", "PLATFORM", "SERVICE", "SETTINGS", "SECRET", "FINGERPRINT", "EXPIRES", "CHANGED (UTC)"), rows))
    for one in answer.providers:
        if one.problem:
            click.echo(f"\n{one.app_id} on {platform_name(one.platform)}: what is stored is not in use: {one.problem}")


@providers.command("remove", short_help="Forget a credential.")
@app_argument
@platform_argument
@installation_of("dispatch")
def remove(installation: Installation, app_id: str, platform: str) -> None:
    """Forget the credential of APP_ID on PLATFORM. Its wake-ups stay queued until there is another."""
    from sealpushd.v1 import providers_pb2
    from sealpushd.v1.providers_pb2_grpc import ProvidersStub

    request = providers_pb2.RemoveProviderRequest(
        app_id=app_id,
        platform=platform_number(platform),
    )
    installation.service("dispatch").call(ProvidersStub, "RemoveProvider", request)
    click.echo(f"removed: {app_id} on {platform}")


def platform_name(number: int) -> str:
    """As metrics and operators name it."""
    from sealpushd.platform.metrics import platform_label

    return platform_label(number)


def _expiry(one: providers_pb2.StoredProvider) -> str:
    if not one.HasField("expires_at"):
        return "-"
    left = one.expires_at.ToDatetime(UTC) - datetime.now(UTC)
    warning = " ENDED" if left <= timedelta(0) else " SOON" if left < timedelta(days=CREDENTIAL_DAYS_LEFT_MIN) else ""
    return f"{one.expires_at.ToDatetime():%Y-%m-%d}{warning}"


def _date(text: str) -> datetime:
    try:
        # To the end of that day.
        return datetime.strptime(text, "%Y-%m-%d").replace(hour=23, minute=59, second=59, tzinfo=UTC)
    except ValueError as e:
        raise WronglyCalled(f"{text!r} is no date; write it as 2027-01-31") from e


def _verdict(verdict: providers_pb2.ProviderVerdict) -> str:
    from sealpushd.v1 import providers_pb2

    return {providers_pb2.VERDICT_GOOD: "good", providers_pb2.VERDICT_REFUSED: "refused"}.get(verdict.verdict, "unknown")


def _conclusion(answer: providers_pb2.TestProviderResponse) -> str:
    if answer.works:
        return "the credential works"
    if any(_verdict(each) == "refused" for each in answer.verdicts):
        return "the credential does not work"
    return "the push service cannot be asked: whether the credential works is unknown"


def _show(verdicts: Sequence[providers_pb2.ProviderVerdict]) -> None:
    for one in verdicts:
        why = f" ({one.reason}): {one.advice}" if one.reason else ""
        click.echo(f"{_verdict(one):<8} {one.what}{why}")


def _to_json(one: providers_pb2.ProviderVerdict) -> dict[str, str]:
    return {"what": one.what, "verdict": _verdict(one), "reason": one.reason, "advice": one.advice}


def _stored_json(one: providers_pb2.StoredProvider) -> dict[str, Any]:
    return {
        "app_id": one.app_id,
        "platform": platform_name(one.platform),
        "push_service": one.push_service,
        "settings": dict(one.settings),
        "secret_file": one.secret_file or None,
        "fingerprint": one.fingerprint or None,
        "expires_at": one.expires_at.ToJsonString() if one.HasField("expires_at") else None,
        "version": one.version,
        "updated_at": one.updated_at.ToJsonString(),
        "problem": one.problem or None,
    }
