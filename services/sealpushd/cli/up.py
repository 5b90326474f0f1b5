"""`sealpush up`: everything on this machine, with a show."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from sealpushd.cli.options import data_dir_option
from sealpushd.up.ports import HIGHEST, PROCESSES_MAX


@click.command(short_help="Run all of Sealpush on this machine, with a show.")
@data_dir_option
@click.option(
    "--base-port",
    type=click.IntRange(1, 65535 - HIGHEST),
    default=7100,
    show_default=True,
    envvar="SEALPUSH_BASE_PORT",
    help="The ports used are counted from here.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, PROCESSES_MAX),
    default=1,
    show_default=True,
    help="Processes of each service, side by side: one may be restarted while the others answer.",
)
@click.option("--then-exit", is_flag=True, help="Leave after the messages. Exit code 0 if every one ended as it should.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result line of --then-exit, and errors.")
@click.option("--no-show", is_flag=True, help="Only run: register the phones, send no messages.")
@click.option(
    "--log",
    "log_level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level in the services' logs, <data-dir>/log/.",
)
def up(data_dir: Path, base_port: int, processes: int, then_exit: bool, quiet: bool, no_show: bool, log_level: str) -> int:
    """Run all of Sealpush on this machine and show how messages travel. Needs nothing but this package.

    Starts PostgreSQL and Valkey, six services, a simulated Apple push service and SMS inbox, and two simulated phones. Sends a few
    messages and tells what became of each; then stays until Ctrl-C. Everything is kept in the data directory: a second start on it is
    faster and goes on where the first ended. All listeners are on 127.0.0.1.

    The last line of --then-exit is one JSON object: sent, delivered, blocked, not_registered, cancelled, seconds, ready_seconds, ….
    """
    from sealpushd.up.run import Options, run

    return asyncio.run(run(Options(data_dir.expanduser().absolute(), base_port, processes, then_exit, quiet, not no_show, log_level)))
