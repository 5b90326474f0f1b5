"""The tree of commands, and what becomes of their errors: one line on standard error that says what to do, and an exit code."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Final

import click

from sealpushd.cli.errors import CommandFailed, describe

# Command → where it is defined. Imported when it is used: `sealpush serve` must not wait for what only `up` needs.
COMMANDS: Final = {
    "up": "sealpushd.cli.up:up",
    "send": "sealpushd.cli.messages:send",
    "status": "sealpushd.cli.messages:status",
    "cancel": "sealpushd.cli.messages:cancel",
    "explain": "sealpushd.cli.messages:explain",
    "receipt": "sealpushd.cli.messages:receipt",
    "doctor": "sealpushd.cli.doctor:doctor",
    "serve": "sealpushd.cli.serve:serve",
    "simulate": "sealpushd.cli.serve:simulate",
    "health": "sealpushd.cli.serve:health",
    "db": "sealpushd.cli.db:db",
    "prepare": "sealpushd.cli.prepare:prepare",
    "root": "sealpushd.cli.root:root",
    "accounts": "sealpushd.cli.accounts:accounts",
    "providers": "sealpushd.cli.providers:providers",
    "lanes": "sealpushd.cli.lanes:lanes",
    "settings": "sealpushd.cli.serve:settings",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, name = where.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above names commands only
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="sealpush", message="%(package)s %(version)s")
def sealpush() -> None:
    """Sealed push messages from banks and public services to phones.

    Try it on this machine: `sealpush up`, then `sealpush send` from a second terminal.
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command line and give its exit code: 0 done, 1 failed, 2 wrongly called or set up, 130 interrupted."""
    try:
        result = sealpush.main(args=list(arguments), prog_name="sealpush", standalone_mode=False)
    except click.exceptions.Exit as e:
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone: nothing to tell anybody.
        return 1
    except Exception as e:
        failed = describe(e)
        if failed is None:
            raise
        failed.show()
        return failed.exit_code
    return result if isinstance(result, int) else 0


__all__ = ["COMMANDS", "CommandFailed", "run", "sealpush"]
