"""Errors as the command line shows them: what happened and what to do, in a line, without a traceback."""

from __future__ import annotations

import sys
from typing import IO, Any, Final

import click

# Exit code by the class that an error is, or descends from. Named by module, so that showing an error imports nothing new:
# an error can only be of a class whose module is there already.
_FAILED: Final = 1
_WRONGLY_SET_UP: Final = 2
_KNOWN: Final = {
    ("sealpushd.platform.settings", "SettingsError"): _WRONGLY_SET_UP,
    ("sealpushd.platform.migrate", "SchemaError"): _WRONGLY_SET_UP,
    ("sealpushd.platform.vault", "VaultError"): _WRONGLY_SET_UP,
    ("sealpushd.platform.errors", "ServiceError"): _FAILED,
    ("sealpushd.engines.errors", "EngineError"): _FAILED,
    ("sealpushd.up.errors", "UpError"): _FAILED,
    ("sealpush.errors", "SealpushError"): _FAILED,
}


class CommandFailed(click.ClickException):
    """A command cannot do what it was asked for. The message says why and what to do."""

    exit_code = _FAILED

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"sealpush: {self.format_message()}", file=file, err=file is None)


class WronglyCalled(CommandFailed):
    """What was given, or set up, cannot work: trying again does not help."""

    exit_code = _WRONGLY_SET_UP


def describe(error: Exception) -> CommandFailed | None:
    """How to show an error that is expected to happen; None for what is a bug, whose traceback somebody must see."""
    for (module, name), exit_code in _KNOWN.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return WronglyCalled(str(error)) if exit_code == _WRONGLY_SET_UP else CommandFailed(str(error))
    grpc = sys.modules.get("grpc")
    if grpc is not None and isinstance(error, grpc.RpcError):
        code, details = getattr(error, "code", None), getattr(error, "details", None)
        name = code().name if callable(code) else type(error).__name__
        return CommandFailed(f"{details() if callable(details) else error} ({name})")
    return None
