"""`sealpush accounts`: organisations, apps and senders of an installation, put by its operator, and the root that certifies them."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import secrets as randomness
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sealpushd.cli.errors import CommandFailed, WronglyCalled
from sealpushd.cli.installation import Installation, installation_of

if TYPE_CHECKING:
    from sealpush.keys import RootKey

_KEY_BYTES: Final = 32
_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_new_file = click.Path(dir_okay=False, path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_root_key = click.option("--root-key", type=_file, required=True, help="File with the root key, as `new-root` makes it.")
_days = click.option(
    "--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long the entry is good; put it anew before."
)


@click.group(short_help="Set up organisations, apps and senders.")
def accounts() -> None:
    """Set up organisations, apps and senders, as the installation's operator. Putting again changes what is there.

    In this order: new-root, put-app, put-platform, put-organisation, put-sender.
    """


@accounts.command("new-root", short_help="Make a root key.")
@click.argument("file", type=_new_file)
@_json
def new_root(file: Path, as_json: bool) -> None:
    """Make a root key in FILE and print its public half, which apps pin.

    Keep FILE offline: anybody who has it can speak for every sender. No service needs it; put-sender and put-platform sign with it.
    """
    from sealpush.keys import RootKey

    root = RootKey.generate()
    _write_new(file, root.seed)
    _show({"root_public_key": root.public_key.hex()}, as_json)


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
@click.option("--root-key", type=_file, help="File with the root key whose public half the app pins.")
@click.option("--root-public-key", metavar="HEX", help="The public half itself, as `new-root` printed it.")
@_json
@installation_of("accounts", "keys")
def put_app(
    installation: Installation,
    app_id: str,
    name: str,
    root_key: Path | None,
    root_public_key: str | None,
    as_json: bool,
) -> None:
    """Create or change the app APP_ID (a-z 0-9 - .). Its root stays as long as senders hold entries of it."""
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    if (root_key is None) == (root_public_key is None):
        raise WronglyCalled("give either --root-key or --root-public-key")
    public_key = _root(root_key).public_key if root_key is not None else _key((root_public_key or "").encode(), "--root-public-key")
    request = administration.PutAppRequest(app_id=app_id, name=name, root_public_key=public_key)
    installation.service("accounts").call(AdministrationStub, "PutApp", request)
    _show({"app_id": app_id}, as_json)


@accounts.command("put-platform", short_help="Certify the platform's sealing key.")
@_root_key
@_days
@_json
@installation_of("accounts", "keys")
def put_platform(installation: Installation, root_key: Path, days: int, as_json: bool) -> None:
    """Certify the key that the platform seals with for senders that let it, and print its public half.

    Once for each root that apps pin, and again when the platform's key changes.
    """
    from sealpushd.certify import certify_platform
    from sealpushd.up.endpoints import Endpoints
    from sealpushd.up.errors import UpError
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1 import sealing_pb2 as sealing
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub
    from sealpushd.v1.sealing_pb2_grpc import SealingStub

    root = _root(root_key)
    with contextlib.suppress(UpError):
        if Endpoints.load(installation.data_dir).root_public_key == root.public_key.hex():
            raise WronglyCalled("this is the root of the demo: `sealpush up` certifies the platform's key with it by itself")
    service = installation.service("accounts")
    platform = installation.service("keys").call(SealingStub, "GetPlatformKey", sealing.GetPlatformKeyRequest())
    request = administration.PutPlatformEntryRequest(
        platform_entry=certify_platform(root, platform.public_key, days=days), root_public_key=root.public_key
    )
    service.call(AdministrationStub, "PutPlatformEntry", request)
    _show({"platform_public_key": platform.public_key.hex()}, as_json)


@accounts.command("put-sender", short_help="Certify a sender and put it.")
@click.argument("organisation_id")
@click.argument("name")
@click.option("--display-name", required=True, help="Name that phones show, as the root certifies it.")
@click.option(
    "--app", "app_ids", multiple=True, required=True, metavar="APP_ID", help="App it may send to; first: its default. Repeatable."
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["server", "end_to_end"]),
    multiple=True,
    required=True,
    help="Who may seal for it: the server, or the sender itself. Repeatable.",
)
@click.option(
    "--sender-key", "sender_keys", type=_file, multiple=True, help="File with a key it signs with (64 hex digits). Repeatable: old and new."
)
@click.option("--new-sender-key", type=_new_file, help="Make a key it signs with in this file, which must not exist.")
@_root_key
@_days
@click.option("--logo", type=_file, help="PNG of 512 x 512 pixels, up to 128 KiB. Default when changing: the present one.")
@click.option("--colour", default="", metavar="'#rrggbb'", help="Brand colour.")
@click.option("--text-colour", default="", metavar="'#rrggbb'", help="Colour of text on the brand colour.")
@click.option("--scope", "scopes", multiple=True, help="What it may do: publish, status, cancel, keys. Repeatable. Default: all.")
@click.option("--default", "is_default", is_flag=True, help="The organisation signs in as this sender when it names none.")
@click.option("--sender-id", "sender_id_text", metavar="UUID", help="The sender to change, as a whole. Default: a new one.")
@_json
@installation_of("accounts", "keys")
def put_sender(
    installation: Installation,
    organisation_id: str,
    name: str,
    display_name: str,
    app_ids: tuple[str, ...],
    modes: tuple[str, ...],
    sender_keys: tuple[Path, ...],
    new_sender_key: Path | None,
    root_key: Path,
    days: int,
    logo: Path | None,
    colour: str,
    text_colour: str,
    scopes: tuple[str, ...],
    is_default: bool,
    sender_id_text: str | None,
    as_json: bool,
) -> None:
    """Certify the sender NAME of the organisation ORGANISATION_ID with the root, put it, and print its id.

    Its apps must pin this root. A sender that seals by itself (end_to_end) needs a key.
    """
    from sealpush.ids import SenderId, uuid7, uuid_text
    from sealpush.keys import ContentSigningKey, SenderMode
    from sealpushd.certify import certify_sender
    from sealpushd.platform.errors import ServiceError
    from sealpushd.v1 import administration_pb2 as administration
    from sealpushd.v1.administration_pb2_grpc import AdministrationStub

    if "end_to_end" in modes and not sender_keys and new_sender_key is None:
        raise WronglyCalled("the mode end_to_end needs a key: give --sender-key or --new-sender-key")
    request = administration.PutSenderRequest(
        organisation_id=_id(organisation_id, "organisation"),
        sender_id=uuid7() if sender_id_text is None else _id(sender_id_text, "sender"),
        name=name,
        app_ids=app_ids,
        brand_colour=colour,
        brand_text_colour=text_colour,
        logo_png=b"" if logo is None else _read(logo),
        scopes=scopes,
        is_default=is_default,
    )
    root = _root(root_key)
    seeds = [_key(_read(path), str(path)) for path in sender_keys]
    new_seed = None if new_sender_key is None else randomness.token_bytes(_KEY_BYTES)
    if new_seed is not None:
        seeds.append(new_seed)
    sender_id = SenderId(request.sender_id)
    try:
        mode = functools.reduce(operator.or_, (SenderMode[each.upper()] for each in modes))
        public_keys = [ContentSigningKey.from_seed(seed).public_key for seed in seeds]
        request.sender_entry = certify_sender(root, sender_id, display_name, mode, public_keys, days=days)
    except ValueError as e:
        raise WronglyCalled(str(e)) from e
    service = installation.service("accounts")
    again = [] if sender_id_text else [f"add --sender-id {uuid_text(sender_id)}"]
    if new_sender_key is not None and new_seed is not None:
        # Before the entry that names it: a certified key must not be lost.
        _write_new(new_sender_key, new_seed)
        again.append(f"give the key that was made with --sender-key {new_sender_key}")
    try:
        service.call(AdministrationStub, "PutSender", request)
    except ServiceError as e:
        raise CommandFailed(f"{e}; to try again, {' and '.join(again)}" if again else str(e)) from e
    _show({"sender_id": uuid_text(sender_id)}, as_json)


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


def _root(path: Path) -> RootKey:
    from sealpush.keys import RootKey

    return RootKey.from_seed(_key(_read(path), str(path)))


def _key(digits: bytes, where: str) -> bytes:
    """A key of 32 bytes as hex. The error names no content: it may be a secret."""
    try:
        key = bytes.fromhex(digits.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise WronglyCalled(f"{where} does not hold a key of 64 hex digits")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise WronglyCalled(f"{path} cannot be read: {e.strerror}") from e


def _write_new(path: Path, seed: bytes) -> None:
    """Write a key that only its owner reads. Raises WronglyCalled when the file is there: a key in use must not be replaced."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(seed.hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as e:
        raise WronglyCalled(f"{path} exists already; a key is never written over: name another file") from e
    except OSError as e:
        raise WronglyCalled(f"{path} cannot be written: {e.strerror}") from e
