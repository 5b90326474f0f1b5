"""`sealpush root`: the platform's root, used by two of its people on a machine that is kept apart. Calls nobody."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sealpushd.cli import files
from sealpushd.cli.errors import CommandFailed, WronglyCalled

if TYPE_CHECKING:
    from sealpush.keys import RootKey, SenderEntry
    from sealpush.revocations import RevocationList
    from sealpushd.rootfile import RootFile
    from sealpushd.signedfile import SignedFile

ENTRY_DAYS: Final = 90  # somebody who withholds a revocation list is bounded by it

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_passphrase_files = click.option(
    "--passphrase-file",
    "passphrase_files",
    multiple=True,
    metavar="NAME=FILE",
    help="Read a person's passphrase from a file, where there is no terminal to type it at. Repeatable.",
)
_as = click.option("--as", "names", multiple=True, metavar="NAME", help="Who uses the root: twice. Default: both, where it has two people.")
_out = click.option("--out", type=files.NEW, required=True, help="File to write, which must not exist.")
_days = click.option(
    "--days", type=click.IntRange(1, 3650), default=ENTRY_DAYS, show_default=True, help="How long the entry is good; certify anew before."
)


@click.group(short_help="Make the platform's root, and sign with it, by two people.")
def root() -> None:
    """Make the platform's root and sign with it: senders, the platform's own key, and what is revoked.

    Any two of the root's people use it together; one alone can do nothing. Everything here is done on a machine that is kept
    apart, without a network. What comes out is public, and published with `sealpush accounts`.
    """


@root.command(short_help="Make a root for two people or more.")
@click.argument("file", type=files.NEW)
@click.option("--person", "people", multiple=True, required=True, metavar="NAME", help="Who will use the root: 2 to 8 people. Repeatable.")
@_passphrase_files
@_json
def create(file: Path, people: tuple[str, ...], passphrase_files: tuple[str, ...], as_json: bool) -> None:
    """Make a root in FILE and print its public half, which apps pin.

    Each person types a passphrase of their own, 12 characters or more, twice. Any two of them can then sign, and with three people
    or more one may lose theirs. Keep copies of FILE: without it there is no root.
    """
    from sealpush.keys import RootKey
    from sealpushd import rootfile

    files.check_new(file)
    with _told():
        named = rootfile.check_people(people)
        passphrases = _passphrases(named, passphrase_files, new=True)
        click.echo("making the root takes some seconds a person ...", err=True)
        made = RootKey.generate()
        kept = rootfile.create(made, passphrases, cost=rootfile.SENSITIVE)
    files.write_new(file, kept.encode())
    answer = {"root_public_key": made.public_key.hex()}
    click.echo(json.dumps(answer) if as_json else answer["root_public_key"])


@root.command("certify-sender", short_help="Sign a sender's entry.")
@click.argument("file", type=files.EXISTING)
@click.option("--display-name", required=True, help="Name that phones show.")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["server", "end_to_end"]),
    multiple=True,
    required=True,
    help="Who may seal for it: the server, or the sender itself. Repeatable.",
)
@click.option(
    "--key", "keys", multiple=True, metavar="HEX", help="Public half of a key it signs with, 64 hex digits. Repeatable: old and new."
)
@click.option("--sender-id", "sender_id_text", metavar="UUID", help="The sender to certify anew. Default: a new one.")
@_days
@_out
@_as
@_passphrase_files
def certify_sender(
    file: Path,
    display_name: str,
    modes: tuple[str, ...],
    keys: tuple[str, ...],
    sender_id_text: str | None,
    days: int,
    out: Path,
    names: tuple[str, ...],
    passphrase_files: tuple[str, ...],
) -> None:
    """Sign the entry of a sender with the root in FILE: who may speak under this name, by which keys, for how long.

    Check what is shown before you type your passphrase: phones will believe it. `sealpush accounts put-sender` publishes the entry.
    """
    from sealpush.ids import SenderId, uuid7
    from sealpush.keys import SenderMode
    from sealpushd.certify import sender_entry

    if "end_to_end" in modes and not keys:
        raise WronglyCalled("the mode end_to_end needs a key: give --key, as `sealpush accounts new-sender-key` prints it")
    sender_id = SenderId(uuid7() if sender_id_text is None else _sender_id(sender_id_text))
    with _told():
        mode = functools.reduce(operator.or_, (SenderMode[each.upper()] for each in modes))
        entry = sender_entry(sender_id, display_name, mode, [files.parse_key(each, "--key") for each in keys], days=days)
    _certify(file, entry, out, names, passphrase_files)


@root.command("certify-platform", short_help="Sign the entry of the platform's sealing key.")
@click.argument("file", type=files.EXISTING)
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="HEX",
    help="The platform's public key, as `sealpush accounts platform-key` prints it. Repeatable: old and new.",
)
@_days
@_out
@_as
@_passphrase_files
def certify_platform(
    file: Path, keys: tuple[str, ...], days: int, out: Path, names: tuple[str, ...], passphrase_files: tuple[str, ...]
) -> None:
    """Sign the entry of the key that the platform seals with, for senders that let it, with the root in FILE.

    Compare the key with what `sealpush accounts platform-key` prints, over another way than the one it came by: whoever has its
    secret half can speak for every sender with the mode server. `sealpush accounts put-platform` publishes the entry.
    """
    from sealpushd.certify import platform_entry

    with _told():
        entry = platform_entry(*(files.parse_key(each, "--key") for each in keys), days=days)
    _certify(file, entry, out, names, passphrase_files)


def _certify(file: Path, entry: SenderEntry, out: Path, names: Sequence[str], passphrase_files: Sequence[str]) -> None:
    from sealpushd.signedfile import SignedFile

    files.check_new(out)
    used = _use(file, names, passphrase_files, _entry_lines(entry))
    files.write_new(out, SignedFile.of_entry(used, entry).encode(), mode=0o644)
    click.echo(f"signed: {out}")


@root.command(short_help="Sign a list that revokes more.")
@click.argument("file", type=files.EXISTING)
@click.option("--list", "list_file", type=files.EXISTING, help="The newest list of this root, which is added to.")
@click.option("--new", is_flag=True, help="Begin the root's first list.")
@click.option("--sender-id", "sender_id_text", metavar="UUID", help="Revoke the entries of this sender.")
@click.option(
    "--up-to-serial", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Revoke its entries up to this one. Default: all until now."
)
@click.option("--key", "keys", multiple=True, metavar="HEX", help="Revoke this key, in whatever entry it stands. Repeatable.")
@_out
@_as
@_passphrase_files
def revoke(
    file: Path,
    list_file: Path | None,
    new: bool,
    sender_id_text: str | None,
    up_to_serial: int | None,
    keys: tuple[str, ...],
    out: Path,
    names: tuple[str, ...],
    passphrase_files: tuple[str, ...],
) -> None:
    """Revoke a sender's entries or a content-signing key with the root in FILE, before their time is over.

    Lists take each other's place as a whole, so the newest one is added to (--list); keep it beside FILE. A sender whose entries
    are revoked may be certified anew. The platform's entries have an id each: revoke its key.

    `sealpush accounts put-revocations` publishes the list.
    """
    from sealpush.ids import SenderId
    from sealpush.revocations import Revoked, RevokedEntries, RevokedKey, revoking
    from sealpushd.certify import now_ms
    from sealpushd.signedfile import SignedFile

    if (list_file is None) != new:
        raise WronglyCalled("give either --list with the newest list of this root, or --new for its first")
    if up_to_serial is not None and sender_id_text is None:
        raise WronglyCalled("--up-to-serial goes with --sender-id")
    at_ms = now_ms()
    more: list[Revoked] = [RevokedKey(files.parse_key(each, "--key")) for each in keys]
    if sender_id_text is not None:
        more.append(RevokedEntries(SenderId(_sender_id(sender_id_text)), at_ms if up_to_serial is None else up_to_serial))
    if not more:
        raise WronglyCalled("say what to revoke: --sender-id, --key")
    files.check_new(out)
    with _told():
        known = None if list_file is None else _known_list(file, list_file)
        following = revoking(known, more, issued_ms=at_ms)
    used = _use(file, names, passphrase_files, _list_lines(following))
    files.write_new(out, SignedFile.of_revocations(used, following).encode(), mode=0o644)
    click.echo(f"signed: {out}")


@root.command(short_help="Say what is in a root's file, an entry or a list.")
@click.argument("file", type=files.EXISTING)
@click.option("--root-public-key", metavar="HEX", help="Fail unless this root signed it, or is in it.")
def show(file: Path, root_public_key: str | None) -> None:
    """Say in words what is in FILE, once its signature was checked. Needs no passphrase."""
    from sealpushd.rootfile import RootFile, RootFileError
    from sealpushd.signedfile import SignedFile

    wanted = None if root_public_key is None else files.parse_key(root_public_key, "--root-public-key")
    content = files.read(file)
    try:
        signed = SignedFile.decode(content)
    except ValueError:
        try:
            kept = RootFile.decode(content)
        except RootFileError:
            raise WronglyCalled(f"{file} is neither a root's file nor signed by one") from None
        holder, lines = kept.root_public_key, _root_lines(kept)
    else:
        holder, lines = signed.root_public_key, _signed_lines(signed)
    if wanted is not None and wanted != holder:
        raise CommandFailed(f"{file} is of another root: {holder.hex()}")
    click.echo(_listed(lines))


Line = tuple[str, str]


def _use(file: Path, names: Sequence[str], passphrase_files: Sequence[str], lines: Sequence[Line]) -> RootKey:
    """The root, opened by two people who were shown what it will sign."""
    from sealpushd import rootfile

    with _told():
        kept = rootfile.RootFile.decode(files.read(file))
        if not names and len(kept.people) > rootfile.PEOPLE_MIN:
            raise WronglyCalled(f"say who uses the root: --as twice, with two of {', '.join(kept.people)}")
        pair = rootfile.check_pair(kept, names or kept.people)
        click.echo(f"{pair[0]} and {pair[1]} sign with the root {kept.root_public_key.hex()}:\n\n{_listed(lines)}\n", err=True)
        passphrases = _passphrases(pair, passphrase_files, new=False)
        click.echo("opening the root takes some seconds ...", err=True)
        return rootfile.open_root(kept, passphrases)


def _passphrases(names: Sequence[str], passphrase_files: Sequence[str], *, new: bool) -> dict[str, str]:
    """A passphrase of each, out of a file or typed. Raises WronglyCalled, RootFileError."""
    from sealpushd import rootfile

    given = {}
    for each in passphrase_files:
        name, equals, path = each.partition("=")
        if not equals or rootfile.check_name(name) not in names:
            raise WronglyCalled(f"write --passphrase-file as NAME=FILE, with one of {', '.join(names)}")
        given[rootfile.check_name(name)] = _passphrase_in(Path(path))
    found = {}
    for name in names:
        found[name] = given[name] if name in given else _typed(name, new=new)
        rootfile.check_passphrase(name, found[name])
    return found


def _passphrase_in(path: Path) -> str:
    try:
        return files.read(path).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise WronglyCalled(f"{path} does not hold a passphrase in UTF-8") from None


def _typed(name: str, *, new: bool) -> str:
    from sealpushd import rootfile

    if not sys.stdin.isatty():
        raise WronglyCalled(f"there is no terminal to type the passphrase of {name} at: give --passphrase-file {name}=FILE")

    def check(text: str) -> str:
        try:
            rootfile.check_passphrase(name, text)
        except rootfile.RootFileError as e:
            raise click.UsageError(str(e)) from e
        return text

    answer: str = click.prompt(f"{name}, your passphrase", hide_input=True, confirmation_prompt=new, value_proc=check, err=True)
    return answer


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What a pure rule refuses, as the command line shows it."""
    try:
        yield
    except ValueError as e:
        raise WronglyCalled(str(e)) from e


def _sender_id(text: str) -> bytes:
    from sealpush.ids import parse_uuid

    with _told():
        return parse_uuid(text)


def _known_list(file: Path, list_file: Path) -> RevocationList:
    """A list that the root in the file signed: to one of another root nothing must be added."""
    from sealpush.revocations import verify_revocations
    from sealpushd.rootfile import RootFile

    return verify_revocations(RootFile.decode(files.read(file)).root_public_key, files.read_signed(list_file).signed)


def _root_lines(kept: RootFile) -> list[Line]:
    return [
        ("root", kept.root_public_key.hex()),
        ("people", f"{', '.join(kept.people)}: any two of them"),
        ("a guess at a passphrase", f"Argon2id, {kept.cost.operations} operations in {kept.cost.memory_bytes >> 20} MiB"),
    ]


def _signed_lines(signed: SignedFile) -> list[Line]:
    """Raises EntryRefused or RevocationsRefused for a wrong signature."""
    from sealpushd.signedfile import Kind

    said = _list_lines(signed.revocations()) if signed.kind is Kind.REVOCATIONS else _entry_lines(signed.entry())
    return [*said, ("signed by the root", signed.root_public_key.hex())]


def _entry_lines(entry: SenderEntry) -> list[Line]:
    from sealpush.ids import uuid_text
    from sealpush.keys import EntryRole, SenderMode

    is_platform = entry.role is EntryRole.PLATFORM
    who = {SenderMode.END_TO_END: "the sender itself (end_to_end)", SenderMode.SERVER: "the platform (server)"}
    windows = {(key.not_before_ms, key.not_after_ms) for key in entry.keys}
    own = windows <= {(entry.not_before_ms, entry.not_after_ms)}
    return [
        ("entry of", "the platform's sealing key" if is_platform else f"the sender {entry.display_name}"),
        ("id", uuid_text(entry.sender_id)),
        ("who may seal", ", ".join(text for mode, text in who.items() if mode in entry.modes)),
        *(
            ("key", key.public_key.hex() + ("" if own else f", {_time(key.not_before_ms)} to {_time(key.not_after_ms)}"))
            for key in entry.keys
        ),
        ("good", f"{_time(entry.not_before_ms)} to {_time(entry.not_after_ms)}"),
        ("serial", str(entry.serial)),
    ]


def _list_lines(revocations: RevocationList) -> list[Line]:
    from sealpush.ids import uuid_text
    from sealpush.revocations import RevokedEntries

    lines = [("revocation list", f"number {revocations.serial}, of {_time(revocations.issued_ms)}")]
    for item in revocations.items:
        if isinstance(item, RevokedEntries):
            lines.append(("revoked", f"entries of {uuid_text(item.sender_id)} up to serial {item.serial}"))
        else:
            lines.append(("revoked", f"key {item.public_key.hex()}"))
    return lines


def _listed(lines: Sequence[Line]) -> str:
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"  {label.ljust(width)}  {text}" for label, text in lines)


def _time(unix_ms: int) -> str:
    from sealpush.model import moment

    return f"{moment(unix_ms):%Y-%m-%d %H:%M} UTC"
