"""`sealpush accounts`: organisations, apps and senders of an installation, put by its operator; their root is `sealpush root`'s."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealpushd.cli import files
from sealpushd.cli.checks import ENTRY_DAYS_LEFT_MIN, all_well, judge_entries
from sealpushd.cli.errors import CommandFailed, WronglyCalled
from sealpushd.cli.installation import Installation, installation_of

if TYPE_CHECKING:
    from sealpushd.signedfile import Kind, SignedFile

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_entry = click.option("--entry", type=files.EXISTING, required=True, help="The entry as `sealpush root` signed it.")


@click.group(short_help="Set up organisations, apps and senders.")
def accounts() -> None:
    """Set up organisations, apps and senders, as the installation's operator. Putting again changes what is there.

    In this order: put-app, platform-key, put-platform, put-organisation, put-sender. Entries are signed by `sealpush root` before,
    with keys that new-sender-key and platform-key print; ending-entries says when to sign anew.
    """


@accounts.command("new-sender-key", short_help="Make a key that a sender signs with.")
@click.argument("file", type=files.NEW)
@_json
def new_sender_key(file: Path, as_json: bool) -> None:
    """Make a content-signing key in FILE and print its public half, which `sealpush root certify-sender` certifies.

    For the sender itself, where it seals by itself: FILE stays with it. Calls nobody.
    """
    from sealpush.keys import ContentSigningKey

    key = ContentSigningKey.generate()
    files.write_new(file, key.seed.hex().encode() + b"\n")
    _show({"public_key": key.public_key.hex()}, as_json)


@accounts.command("put-organisation", short_help="Put an organisation and its login.")
@click.argument("login")
@click.option("--name", required=True, help="Name for people, up to 128 characters.")
@click.option("--network", "networks", multiple=True, metavar="CIDR", help="Network it calls from. Repeatable. Default: any.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input. An empty line: the present one stays.")
@_json
@installation_of("accounts", "keys")
def put_organisation(
    installation: Installation, login: str, name: str, networks: tuple[str, ...], password_stdin: bool, as_json: bool
) -> None:
    """Create or change the organisation that signs in as LOGIN (a-z 0-9 - .), and print its id."""
    from sealpush.ids import uuid_text
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    request = administration.PutOrganisationRequest(login=login, password=_password(password_stdin), name=name, networks=networks)
    answer = installation.service("accounts").call(AdministrationStub, "PutOrganisation", request)
    _show({"organisation_id": uuid_text(answer.organisation_id)}, as_json)


@accounts.command("put-app", short_help="Put an app and the root it pins.")
@click.argument("app_id")
@click.option("--name", required=True, help="Name for people, also in the SMS with the code.")
@click.option("--root-public-key", metavar="HEX", required=True, help="The root that the app pins, as `sealpush root create` printed it.")
@_json
@installation_of("accounts", "keys")
def put_app(installation: Installation, app_id: str, name: str, root_public_key: str, as_json: bool) -> None:
    """Create or change the app APP_ID (a-z 0-9 - .). Its root stays as long as senders hold entries of it."""
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    public_key = files.parse_key(root_public_key, "--root-public-key")
    request = administration.PutAppRequest(app_id=app_id, name=name, root_public_key=public_key)
    installation.service("accounts").call(AdministrationStub, "PutApp", request)
    _show({"app_id": app_id}, as_json)


@accounts.command("platform-key", short_help="Print the platform's public sealing key.")
@_json
@installation_of("accounts", "keys")
def platform_key(installation: Installation, as_json: bool) -> None:
    """Print the public half of the key that the platform seals with, which `sealpush root certify-platform` certifies."""
    from sealpushd.v1 import sealing_pb2 as sealing
    from sealpushd.v1.sealing_pb2_grpc import SealingStub

    answer = installation.service("keys").call(SealingStub, "GetPlatformKey", sealing.GetPlatformKeyRequest())
    _show({"platform_public_key": answer.public_key.hex()}, as_json)


@accounts.command("put-platform", short_help="Put the entry of the platform's sealing key.")
@_entry
@_json
@installation_of("accounts", "keys")
def put_platform(installation: Installation, entry: Path, as_json: bool) -> None:
    """Put the entry of the key that the platform seals with, for senders that let it, and print that key.

    Once for each root that apps pin, again before the entry ends, and when the platform's key changes.
    """
    from sealpushd.signedfile import Kind
    from sealpushd.up.endpoints import Endpoints
    from sealpushd.up.errors import UpError
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1 import sealing_pb2 as sealing
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub
    from sealpushd.v1.sealing_pb2_grpc import SealingStub

    signed = _signed(entry, Kind.PLATFORM_ENTRY)
    with contextlib.suppress(UpError):
        if Endpoints.load(installation.data_dir).root_public_key == signed.root_public_key.hex():
            raise WronglyCalled("this is the root of the demo: `sealpush up` certifies the platform's key with it by itself")
    certified = [key.public_key for key in signed.entry().keys]
    present: bytes = installation.service("keys").call(SealingStub, "GetPlatformKey", sealing.GetPlatformKeyRequest()).public_key
    if present not in certified:
        raise CommandFailed(f"{entry} certifies another key than the platform seals with, which is {present.hex()}: certify that one")
    request = administration.PutPlatformEntryRequest(platform_entry=signed.signed, root_public_key=signed.root_public_key)
    installation.service("accounts").call(AdministrationStub, "PutPlatformEntry", request)
    _show({"platform_public_key": present.hex()}, as_json)


@accounts.command("put-sender", short_help="Put a sender with its entry.")
@click.argument("organisation_id")
@click.argument("name")
@_entry
@click.option(
    "--app", "app_ids", multiple=True, required=True, metavar="APP_ID", help="App it may send to; first: its default. Repeatable."
)
@click.option("--logo", type=files.EXISTING, help="PNG of 512 x 512 pixels, up to 128 KiB. Default when changing: the present one.")
@click.option("--colour", default="", metavar="'#rrggbb'", help="Brand colour.")
@click.option("--text-colour", default="", metavar="'#rrggbb'", help="Colour of text on the brand colour.")
@click.option("--scope", "scopes", multiple=True, help="What it may do: publish, status, cancel, keys. Repeatable. Default: all.")
@click.option("--default", "is_default", is_flag=True, help="The organisation signs in as this sender when it names none.")
@_json
@installation_of("accounts", "keys")
def put_sender(
    installation: Installation,
    organisation_id: str,
    name: str,
    entry: Path,
    app_ids: tuple[str, ...],
    logo: Path | None,
    colour: str,
    text_colour: str,
    scopes: tuple[str, ...],
    is_default: bool,
    as_json: bool,
) -> None:
    """Put the sender NAME of the organisation ORGANISATION_ID, as a whole, and print its id, which its entry names.

    Its apps must pin the root that signed the entry. Again before the entry ends, with a new one of the same id.
    """
    from sealpush.ids import uuid_text
    from sealpushd.signedfile import Kind
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    signed = _signed(entry, Kind.SENDER_ENTRY)
    request = administration.PutSenderRequest(
        organisation_id=_id(organisation_id, "organisation"),
        sender_id=signed.entry().sender_id,
        name=name,
        sender_entry=signed.signed,
        app_ids=app_ids,
        brand_colour=colour,
        brand_text_colour=text_colour,
        logo_png=b"" if logo is None else files.read(logo),
        scopes=scopes,
        is_default=is_default,
    )
    installation.service("accounts").call(AdministrationStub, "PutSender", request)
    _show({"sender_id": uuid_text(request.sender_id)}, as_json)


@accounts.command("put-revocations", short_help="Put a root's newest revocation list.")
@click.argument("revocations", metavar="LIST", type=files.EXISTING)
@_json
@installation_of("accounts", "keys")
def put_revocations(installation: Installation, revocations: Path, as_json: bool) -> None:
    """Put LIST, as `sealpush root revoke` signed it, print its number, and say which entries in use it hits.

    What it revokes is refused at publishing within 30 seconds. Phones learn it within a day, or when they see a sender that is
    new to them.
    """
    from sealpush.ids import uuid_text
    from sealpushd.signedfile import Kind
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    signed = _signed(revocations, Kind.REVOCATIONS)
    serial = signed.revocations().serial
    request = administration.PutRevocationsRequest(revocations=signed.signed, root_public_key=signed.root_public_key)
    answer = installation.service("accounts").call(AdministrationStub, "PutRevocations", request)
    for each in answer.revoked:
        whose = f"the sender {each.display_name}, {uuid_text(each.sender_id)}" if each.sender_id else "the platform's sealing key"
        click.echo(f"revoked, wholly or a key of it: the entry of {whose}", err=True)
    if not answer.revoked:
        click.echo(f"nothing in use is revoked: compare ids, serials and keys with `sealpush root show {revocations}`", err=True)
    if as_json:
        hit = [
            {"sender_id": uuid_text(each.sender_id) if each.sender_id else None, "display_name": each.display_name}
            for each in answer.revoked
        ]
        click.echo(json.dumps({"serial": str(serial), "revoked": hit}))
    else:
        click.echo(serial)


@accounts.command("get-revocations", short_help="Get a root's newest revocation list back.")
@click.option("--root-public-key", metavar="HEX", required=True, help="The root whose list it is.")
@click.option("--out", type=files.NEW, required=True, help="File to write, which must not exist.")
@installation_of("accounts", "keys")
def get_revocations(installation: Installation, root_public_key: str, out: Path) -> None:
    """Write the newest list of a root to a file as `sealpush root revoke --list` takes it, for people who no longer have theirs.

    Its signature is checked. That no newer one was put is the installation's word: compare its number with what is remembered.
    """
    from sealpushd.signedfile import Kind, SignedFile
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    files.check_new(out)
    root = files.parse_key(root_public_key, "--root-public-key")
    request = administration.GetRevocationListRequest(root_public_key=root)
    answer = installation.service("accounts").call(AdministrationStub, "GetRevocationList", request)
    if not answer.revocations:
        raise CommandFailed("this root has no list here: begin its first with `sealpush root revoke --new`")
    signed = SignedFile(Kind.REVOCATIONS, root, answer.revocations)
    number = signed.revocations().serial
    files.write_new(out, signed.encode(), mode=0o644)
    click.echo(f"list number {number}: {out}")


@accounts.command("ending-entries", short_help="Say which entries end soon.")
@click.option("--days", type=click.IntRange(1, 3650), default=ENTRY_DAYS_LEFT_MIN, show_default=True, help="How far ahead to look.")
@installation_of("accounts", "keys")
def ending_entries(installation: Installation, days: int) -> None:
    """Say which entries of senders, and of the platform, end within some days, and what to do: for a daily job.

    Exit code 0 only if none does. `sealpush doctor` says the same beside a running `sealpush up`.
    """
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    now = datetime.now(UTC)
    request = administration.GetEndingEntriesRequest()
    request.before.FromDatetime(now + timedelta(days=days))
    checks = judge_entries(installation.service("accounts").call(AdministrationStub, "GetEndingEntries", request).entries, now, days)
    for check in checks:
        click.echo(check.line)
    if not all_well(checks):
        raise click.exceptions.Exit(1)


def _signed(path: Path, kind: Kind) -> SignedFile:
    """A file of this kind. Raises WronglyCalled."""
    signed = files.read_signed(path)
    if signed.kind is not kind:
        raise WronglyCalled(f"{path} holds a {signed.kind.value}, not a {kind.value}")
    return signed


def _show(answer: dict[str, str], as_json: bool) -> None:
    """An answer of one value: bare for a shell, or as JSON."""
    click.echo(json.dumps(answer) if as_json else next(iter(answer.values())))


def _password(from_stdin: bool) -> str:
    """The password to set; empty for the present one."""
    if from_stdin:
        try:
            return sys.stdin.readline().rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise WronglyCalled("the password on standard input is not UTF-8") from e
    if not sys.stdin.isatty():
        raise WronglyCalled("there is no terminal to ask for the password: give --password-stdin")
    answer: str = click.prompt(
        "Password (empty: the present one stays)", default="", show_default=False, hide_input=True, confirmation_prompt=True, err=True
    )
    return answer


def _id(text: str, whose: str) -> bytes:
    from sealpush.ids import parse_uuid

    try:
        return parse_uuid(text)
    except ValueError as e:
        raise WronglyCalled(f"{text!r} is no id of a{'n' if whose == 'organisation' else ''} {whose}: {e}") from e
