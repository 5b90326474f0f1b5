"""The data directory of one Sealpush on one machine, held by one process at a time.

    sealpush-format     {"format": 1}: says that the directory is ours and how it is laid out
    lock                held with flock while in use; contains the pid of the holder, for messages only
    postgres/           PostgreSQL's own data directory; appears complete (by rename) or not at all
    postgres-new-…/     an initdb under way, or left over by one that was killed: removed by the next run
    valkey/             working directory of Valkey, nothing durable
    secrets/            one file of mode 0600 a secret
    log/                what the servers print, bounded
    run/                s-…/: this run's sockets; `sockets`: a link to them, also when they had to go elsewhere

Directories made here have mode 0700. Nothing above the data directory is changed, only created where missing.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from .errors import EngineError

FORMAT = 1
"""The layout this code reads and writes. A directory of a later format is refused."""

_FORMAT_FILE = "sealpush-format"
_LOCK_FILE = "lock"
# What a first run that was killed before it wrote the format file may have left; `lost+found` is a fresh file system's.
_BEFORE_FORMAT = frozenset({_LOCK_FILE, f"{_FORMAT_FILE}.new", "lost+found"})

_NEW_POSTGRES_PREFIX = "postgres-new-"
# A server without its initdb ends within milliseconds.
_REMOVE_PATIENCE_S = 2.0

# The kernel takes 107 bytes for a socket's whole path; the longest name in the directory is ".s.PGSQL.5432.lock" (18).
_SOCKET_DIRECTORY_BYTES_MAX = 80
# PostgreSQL and Valkey both split this path at some other character, and so does a URL.
_SOCKET_DIRECTORY_SAFE = re.compile(r"[A-Za-z0-9/._-]+")
_SOCKETS_PREFIX_IN_RUN = "s-"
_SOCKETS_PREFIX_ELSEWHERE = "sealpush-s-"

# 256 bits, more than anybody guesses; 43 characters.
_SECRET_BYTES = 32


class DataDir:
    """An open, locked data directory. `DataDir.open` makes one."""

    def __init__(self, root: Path, lock_descriptor: int) -> None:
        self.root = root
        self.postgres = root / "postgres"
        self.valkey = root / "valkey"
        self.log = root / "log"
        self._secrets = root / "secrets"
        self._run = root / "run"
        self.passed_through = (root, self._run)
        """The directories above those that the servers use, down from the data directory."""
        self._lock_descriptor = lock_descriptor
        self.sockets = self._run
        """A directory for unix sockets, private to this run, whose path is short and needs no quoting."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """The directory at `path`, created where missing, locked until the end of the block.

        Raises EngineError: another process holds it; it was made by a newer Sealpush or by another user; it holds
        something else; it cannot be read or written. What a killed run left over is removed.
        """
        root = Path(os.path.abspath(path.expanduser()))
        with _explained(root):
            _make(root)
            _refuse_what_is_not_ours(root)
            lock_descriptor = _lock(root)
        try:
            data = cls(root, lock_descriptor)
            with _explained(root):
                data._prepare()
            try:
                yield data
            finally:
                data._remove_sockets()
        finally:
            # Closing releases the lock: the descriptor is not inherited, so no server that outlives us holds it.
            os.close(lock_descriptor)

    def secret(self, name: str) -> str:
        """The secret called `name`, 43 URL-safe characters; made on first use. Raises EngineError."""
        file = self._secrets / name
        with _explained(file):
            try:
                text = file.read_text("ascii").strip()
            except FileNotFoundError:
                text = secrets.token_urlsafe(_SECRET_BYTES)
                _write_durably(file, text)
            if not text:
                raise EngineError(f"{file} is empty. Restore it from a back-up of the data directory.")
            return text

    def postgres_major(self) -> int | None:
        """The major version of PostgreSQL that made `postgres/`, None when there is none yet.

        Raises EngineError when `postgres/` is there but incomplete: runs of Sealpush never leave it so.
        """
        with _explained(self.postgres):
            if not self.postgres.exists():
                return None
            if not any(self.postgres.iterdir()):
                self.postgres.rmdir()
                return None
            version, control = self.postgres / "PG_VERSION", self.postgres / "global" / "pg_control"
            if version.is_file() and control.is_file():
                text = version.read_text("ascii").strip()
                if text.isdigit():
                    return int(text)
        raise EngineError(
            f"{self.postgres} is not a complete PostgreSQL data directory: PG_VERSION or global/pg_control is missing. "
            "Restore it from a back-up; or, if nothing in it is needed, move it away to begin anew."
        )

    @contextlib.contextmanager
    def new_postgres(self) -> Iterator[Path]:
        """A temporary directory in which to prepare `pgdata`, which becomes `postgres/` at the end of the block.

        Killed at any moment, it leaves either no `postgres/` or a complete one.
        """
        with _explained(self.root):
            directory = Path(tempfile.mkdtemp(prefix=_NEW_POSTGRES_PREFIX, dir=self.root))
        try:
            yield directory
            with _explained(self.postgres):
                (directory / "pgdata").rename(self.postgres)
                _sync_directory(self.root)
        finally:
            _remove(directory)

    def _prepare(self) -> None:
        _check_format(self.root)
        for directory in (self.valkey, self._secrets, self.log, self._run):
            directory.mkdir(mode=0o700, exist_ok=True)
        for left_over in self.root.glob(f"{_NEW_POSTGRES_PREFIX}*"):
            # Errors are ignored: the killed initdb may still be ending. What stays is removed next time.
            shutil.rmtree(left_over, ignore_errors=True)
        self._remove_sockets()
        self.sockets = _short_directory(self._run)
        link = self._run / "sockets"
        link.unlink(missing_ok=True)
        link.symlink_to(self.sockets)

    def _remove_sockets(self) -> None:
        """Removes the socket directories of this and of earlier, killed, runs, wherever they are."""
        link = self._run / "sockets"
        with contextlib.suppress(OSError):
            target = Path(os.readlink(link))
            if target.name.startswith(_SOCKETS_PREFIX_ELSEWHERE) and target.lstat().st_uid in _owners(self.root):
                shutil.rmtree(target, ignore_errors=True)
        for directory in self._run.glob(f"{_SOCKETS_PREFIX_IN_RUN}*"):
            shutil.rmtree(directory, ignore_errors=True)
        link.unlink(missing_ok=True)


def _owners(root: Path) -> tuple[int, int]:
    """Who may own what we made: we, and the account that servers of a root without user namespaces run as."""
    return os.geteuid(), root.stat().st_uid


def _remove(directory: Path) -> None:
    """Removes an initdb's directory. The servers that a killed initdb had started go on writing there for a moment: tries again until
    then. What stays all the same is removed by the next run."""
    deadline = time.monotonic() + _REMOVE_PATIENCE_S
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.01)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an OSError into an EngineError that says what to do."""
    try:
        yield
    except OSError as e:
        where = e.filename if isinstance(e.filename, str) else path
        advice = {
            errno.EACCES: "Choose a --data-dir that this user may write, or make this user its owner.",
            errno.EPERM: "Choose a --data-dir that this user may write, or make this user its owner.",
            errno.EROFS: "The file system is read-only: choose another --data-dir.",
            errno.ENOSPC: "The disk is full: make room, or choose a --data-dir on another disk.",
            errno.EDQUOT: "The disk quota is used up: make room, or choose a --data-dir on another disk.",
            errno.ENOTDIR: "A file is in the way: choose another --data-dir.",
            errno.EEXIST: "A file is in the way: choose another --data-dir.",
        }.get(e.errno or 0, "Choose another --data-dir, on a local file system.")
        raise EngineError(f"Cannot use {where}: {e.strerror or e}. {advice}") from e


def _make(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    # mkdir applies the umask, which may only narrow 0700 further; the mode is never wider at any moment.
    root.mkdir(mode=0o700, exist_ok=True)


def _refuse_what_is_not_ours(root: Path) -> None:
    """Raises EngineError unless the directory is ours or is empty enough to become ours. Changes nothing."""
    names = {entry.name for entry in os.scandir(root)}
    if _FORMAT_FILE in names or names <= _BEFORE_FORMAT:
        return
    raise EngineError(
        f"{root} is not empty and is not a Sealpush data directory (it has no file {_FORMAT_FILE}). "
        "Choose an empty or a new directory as --data-dir."
    )


def _lock(root: Path) -> int:
    """Locks the directory and gives the descriptor that holds the lock."""
    descriptor = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise EngineError(
                f"{root} is in use by another Sealpush, process {holder}. Stop that one first, or give this one a --data-dir of its own."
            ) from e
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_format(root: Path) -> None:
    """Under the lock: reads the format file, or writes it into a directory that is to become ours."""
    file = root / _FORMAT_FILE
    try:
        maker = file.stat().st_uid
        if maker != os.geteuid():
            # Root could, but would leave files behind that the maker cannot use any more.
            raise EngineError(
                f"{root} was made by the user with uid {maker}, and this is uid {os.geteuid()}. "
                "Run Sealpush as that user, or choose another --data-dir."
            )
        text = file.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        if root.stat().st_uid == os.geteuid():
            root.chmod(0o700)
        _write_durably(file, json.dumps({"format": FORMAT}) + "\n")
        return
    try:
        found = json.loads(text)["format"]
    except (ValueError, TypeError, KeyError):
        found = None
    if not isinstance(found, int) or found < 1:
        raise EngineError(
            f"{file} is damaged. If {root} really is a Sealpush data directory, restore the file from a back-up; "
            "otherwise choose another --data-dir."
        )
    if found > FORMAT:
        raise EngineError(
            f"{root} was made by a newer Sealpush (format {found}; this one knows up to {FORMAT}). "
            "Upgrade Sealpush, or choose another --data-dir."
        )


def _short_directory(run: Path) -> Path:
    """A new private directory for sockets: in `run` where the path is short and plain enough, else in the system's."""
    for parent, prefix in (
        (run, _SOCKETS_PREFIX_IN_RUN),
        (Path(tempfile.gettempdir()), _SOCKETS_PREFIX_ELSEWHERE),
        (Path("/tmp"), _SOCKETS_PREFIX_ELSEWHERE),  # noqa: S108 # mkdtemp makes a private directory in it
    ):
        candidate = f"{parent}/{prefix}12345678"  # mkdtemp adds 8 characters
        if len(os.fsencode(candidate)) <= _SOCKET_DIRECTORY_BYTES_MAX and _SOCKET_DIRECTORY_SAFE.fullmatch(candidate):
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    raise EngineError(
        f"No directory for unix sockets: the path of the data directory is longer than {_SOCKET_DIRECTORY_BYTES_MAX} "
        "bytes or has unusual characters, and so have $TMPDIR and /tmp. Choose a --data-dir with a shorter path."
    )


def _write_durably(file: Path, text: str) -> None:
    """Writes a file of mode 0600 that is complete or absent, also after a power cut."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)
    new.rename(file)
    _sync_directory(file.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
