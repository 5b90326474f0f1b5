"""Files that commands are given or make: keys, entries, lists, receipts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sealpushd.cli.errors import WronglyCalled

if TYPE_CHECKING:
    from sealpushd.signedfile import SignedFile

KEY_BYTES: Final = 32

EXISTING: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW: Final = click.Path(dir_okay=False, path_type=Path)


def read(path: Path, bytes_max: int | None = None) -> bytes:
    """A file's bytes; with a bound at most one more than that, which is enough to refuse it. Raises WronglyCalled."""
    try:
        with path.open("rb") as file:
            return file.read(-1 if bytes_max is None else bytes_max + 1)
    except OSError as e:
        raise WronglyCalled(f"{path} cannot be read: {e.strerror}") from e


def parse_key(digits: str, where: str) -> bytes:
    """A key of 32 bytes as hex. The error names no content: it may be a secret."""
    try:
        key = bytes.fromhex(digits.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise WronglyCalled(f"{where} does not hold a key of 64 hex digits")
    return key


def read_signed(path: Path) -> SignedFile:
    """What `sealpush root` signed, not verified yet. Raises WronglyCalled."""
    from sealpushd.signedfile import SignedFile

    try:
        return SignedFile.decode(read(path))
    except ValueError as e:
        raise WronglyCalled(f"{path}: {e}") from e


def check_new(path: Path) -> None:
    """Raises WronglyCalled when the file is there, or could not be made: before people are asked for anything."""
    if path.exists():
        raise WronglyCalled(f"{path} exists already, and is never written over: name another file")
    if not path.parent.is_dir():
        raise WronglyCalled(f"{path} cannot be written: there is no directory {path.parent}")


def write_new(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a new file that is on disk when this returns. Raises WronglyCalled when it is there: what is in use must not be replaced."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError as e:
        raise WronglyCalled(f"{path} exists already, and is never written over: name another file") from e
    except OSError as e:
        raise WronglyCalled(f"{path} cannot be written: {e.strerror}") from e
