"""Commands about PostgreSQL: migrate, maintain, restored, status."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import timedelta
from pathlib import Path

import click

from sealpushd.cli.errors import WronglyCalled
from sealpushd.cli.types import DURATION

ADMIN_URL = "SEALPUSH_POSTGRES_ADMIN_URL"

_url = click.option("--url", envvar=ADMIN_URL, help=f"PostgreSQL as a role that may create roles. From {ADMIN_URL} if not given.")
_url_file = click.option(
    "--url-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the URL, so that it stands in no process list.",
)


def _chosen(url: str | None, url_file: Path | None) -> str:
    if url_file is not None:
        return url_file.read_text().strip()
    if not url:
        raise WronglyCalled(f"which PostgreSQL? Set {ADMIN_URL}, or give --url-file or --url")
    return url


@click.group()
def db() -> None:
    """Schemas, roles and partitions in PostgreSQL."""


def _read_passwords(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        passwords = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise WronglyCalled(f"{path} is no JSON file: {e}") from e
    if not isinstance(passwords, dict) or not all(isinstance(value, str) and value for value in passwords.values()):
        raise WronglyCalled(f'{path} must be a JSON object of role to password: {{"fetch_app": "…"}}')
    return passwords


@db.command()
@_url
@_url_file
@click.option(
    "--passwords",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file, login role to password. A role that is not named keeps the password it has.",
)
def migrate(url: str | None, url_file: Path | None, passwords: Path | None) -> None:
    """Bring all schemas to this version. Safe to repeat, and to run twice at once: the second waits for the first."""
    from sealpushd.platform.migrate import migrate as run

    applied = asyncio.run(run(_chosen(url, url_file), _read_passwords(passwords)))
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to apply: the schemas are those of this version")


@db.command(short_help="Make the coming partitions, drop the old ones.")
@click.option("--url", envvar="SEALPUSH_POSTGRES_URL", help="PostgreSQL as sealpush_maintenance. From SEALPUSH_POSTGRES_URL if not given.")
@_url_file
@click.option("--every", type=DURATION, help="Repeat after this long, until SIGTERM: 1h, 30m, …. Without: once.")
def maintain(url: str | None, url_file: Path | None, every: timedelta | None) -> None:
    """Make the partitions of the coming weeks and drop those past their retention; forget one-time prekeys handed out long ago."""
    asyncio.run(_maintain(_chosen(url, url_file), every))


async def _maintain(url: str, every: timedelta | None) -> None:
    from sealpushd.platform.errors import StoreUnavailable
    from sealpushd.up.maintenance import maintain as maintain_once

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set():
        try:
            made, dropped = await maintain_once(url)
            click.echo(f"partitions: {made} made, {dropped} dropped")
        except StoreUnavailable as e:
            if every is None:
                raise
            # The partitions reach weeks ahead: there is time until the next round.
            click.echo(f"sealpush: {e}; next try in {every}", err=True)
        if every is None:
            return
        try:
            async with asyncio.timeout(every.total_seconds()):
                await stop.wait()
        except TimeoutError:
            continue


@db.command(short_help="Once after a restore from a back-up, before services start.")
@_url
@_url_file
def restored(url: str | None, url_file: Path | None) -> None:
    """Run once when PostgreSQL came out of a back-up, after `migrate` and before services start.

    Forgets the one-time prekeys in it: phones have destroyed the private halves of some since, and messages sealed to those would be lost.
    Phones send new ones within a day; until then senders use the signed prekeys. And lets readers of the journal begin again: their
    positions mean other events now, and are refused. Safe to repeat.
    """
    from sealpushd.up.maintenance import begin_new_journal, forget_one_time_prekeys

    chosen = _chosen(url, url_file)
    asyncio.run(forget_one_time_prekeys(chosen))
    click.echo("forgot all one-time prekeys; phones send new ones within a day")
    asyncio.run(begin_new_journal(chosen))
    click.echo("began a new journal: positions given before are refused, and their readers begin again")


@db.command()
@_url
@_url_file
def status(url: str | None, url_file: Path | None) -> None:
    """Show each schema's version and how far the partitions reach."""
    from sealpushd.cli.checks import check_partitions, check_schemas

    async def collect() -> list[tuple[bool, str]]:
        chosen = _chosen(url, url_file)
        found = [*await check_schemas(chosen), await check_partitions(chosen)]
        return [(check.ok, check.line) for check in found]

    lines = asyncio.run(collect())
    for _, line in lines:
        click.echo(line)
    if not all(ok for ok, _ in lines):
        raise click.exceptions.Exit(1)
