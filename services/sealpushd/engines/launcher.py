"""Becomes a server process that ends with its parent and is never root.

    python -m sealpushd.engines.launcher [--parent-pid PID] [--death-signal NAME] [--drop-root]
        [--own DIR]… [--own-top DIR]… -- BINARY ARG…

In one process, so that the pid of the launcher is the pid of the server:

1. `--drop-root`, when root: PostgreSQL refuses to run as root. A user namespace in which root is uid 1000 satisfies it
   while every file stays root's. Where user namespaces are forbidden (containers, mostly): an ordinary account takes
   over, see `_FALLBACK_USERS`. The directories given by `--own` (with what is in them) and `--own-top` (only
   themselves) are first given to whoever the server runs as.
2. PR_SET_PDEATHSIG: the kernel sends `--death-signal` when the parent ends, however it ends. After step 1, because the
   kernel forgets the request when the uid changes.
3. With `--parent-pid`: is that process still the parent? Otherwise it died before step 2 and no signal will ever come.
4. execv.

The kernel sends the death signal when the *thread* that spawned this process ends, not the whole process. So spawn from
a thread that lives as long as the parent: the main thread's event loop, never a worker of a thread pool.

The module imports only what is quick to import, because every start of a server pays for it. Callers run it as a file,
with `-I -S` (15 ms), which spares the imports of the package around it; `-m` works as well, and is slower.

Exit codes, when the server could not be started: 2 wrong arguments, 3 cannot become an ordinary user, 4 the parent is
gone, 5 cannot execute the binary. The reason is on standard error.
"""

import argparse
import ctypes
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

EXIT_CANNOT_DROP_ROOT = 3
EXIT_PARENT_GONE = 4
EXIT_CANNOT_EXECUTE = 5

# <linux/prctl.h> and <linux/sched.h>
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000

# Any number but 0 does; the first ordinary account of most distributions looks least odd in `ps`.
_UID_IN_NAMESPACE = 1000

# Accounts to run as where user namespaces are forbidden, best first: `nobody` is shared with other programs.
_FALLBACK_USERS = ("sealpush", "postgres", "nobody")


def _fail(code: int, message: str) -> NoReturn:
    print(f"sealpush engines launcher: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _give(path: str, uid: int, gid: int, *, recursive: bool) -> None:
    """Makes `path` belong to uid and gid; descends only where the owner was another one. Never follows a link."""
    status = os.lstat(path)
    if (status.st_uid, status.st_gid) == (uid, gid):
        return
    if recursive:
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                os.chown(os.path.join(directory, name), uid, gid, follow_symlinks=False)
    # Last, so that a run killed half-way is seen as unfinished by the next one.
    os.chown(path, uid, gid, follow_symlinks=False)


def _enter_user_namespace() -> bool:
    """Puts this process into a user namespace of its own; False where that is forbidden."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc().unshare(_CLONE_NEWUSER) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),  # gid_map of an unprivileged writer is refused without
        ("uid_map", f"{_UID_IN_NAMESPACE} {uid} 1"),
        ("gid_map", f"{_UID_IN_NAMESPACE} {gid} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as e:
            # There is no way back out of the namespace, so no fallback either.
            _fail(EXIT_CANNOT_DROP_ROOT, f"writing /proc/self/{name}: {e.strerror}. Run sealpush as an ordinary user.")
    return True


def _become_fallback_user(own: Sequence[str], own_top: Sequence[str], binary: str) -> None:
    import pwd  # only on this rare path

    for name in _FALLBACK_USERS:
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        if account.pw_uid != 0:
            break
    else:
        _fail(
            EXIT_CANNOT_DROP_ROOT,
            "user namespaces are forbidden here and none of the accounts "
            f"{', '.join(_FALLBACK_USERS)} exists. Run sealpush as an ordinary user, or create the account 'sealpush'.",
        )
    user, uid, gid = account.pw_name, account.pw_uid, account.pw_gid
    try:
        for path in own:
            _give(path, uid, gid, recursive=True)
        for path in own_top:
            _give(path, uid, gid, recursive=False)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except OSError as e:
        _fail(
            EXIT_CANNOT_DROP_ROOT,
            f"user namespaces are forbidden here, and becoming user '{user}' instead failed: {e}. Run sealpush as an ordinary user.",
        )
    if not os.access(binary, os.X_OK):
        _fail(
            EXIT_CANNOT_DROP_ROOT,
            f"user namespaces are forbidden here, and user '{user}' cannot execute {binary}. Run sealpush as an "
            f"ordinary user, or install it where '{user}' may read.",
        )
    for path in (*own, *own_top):
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            _fail(
                EXIT_CANNOT_DROP_ROOT,
                f"user namespaces are forbidden here, and user '{user}' cannot reach {path}. Run sealpush as an "
                f"ordinary user, or choose a --data-dir whose parent directories let '{user}' pass.",
            )


def _drop_root(own: Sequence[str], own_top: Sequence[str], binary: str) -> None:
    # Back to root first what an earlier run gave to an ordinary account: in the namespace only root's files are ours.
    uid, gid = os.geteuid(), os.getegid()
    if _user_namespaces_are_permitted():
        try:
            for path in own:
                _give(path, uid, gid, recursive=True)
            for path in own_top:
                _give(path, uid, gid, recursive=False)
        except OSError as e:
            _fail(EXIT_CANNOT_DROP_ROOT, f"{e}. Make root the owner of the data directory, or run as its owner.")
        if _enter_user_namespace():
            return
    _become_fallback_user(own, own_top, binary)


def _user_namespaces_are_permitted() -> bool:
    """Tries it in a child, because owners must be changed before and only if it works."""
    child = os.fork()
    if child == 0:
        os._exit(0 if _libc().unshare(_CLONE_NEWUSER) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _die_with_parent(death_signal: signal.Signals, parent_pid: int | None) -> None:
    libc = _libc()
    if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        _fail(EXIT_PARENT_GONE, f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if parent_pid is not None and os.getppid() != parent_pid:
        _fail(EXIT_PARENT_GONE, f"process {parent_pid} ended before the server was started")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Becomes the server given in `arguments` (default: sys.argv); raises SystemExit where it cannot."""
    parser = argparse.ArgumentParser(prog="sealpushd.engines.launcher", usage="%(prog)s [options] -- BINARY ARG…", allow_abbrev=False)
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--death-signal", choices=("SIGINT", "SIGTERM", "SIGQUIT", "SIGKILL"), default="SIGTERM")
    parser.add_argument("--drop-root", action="store_true")
    parser.add_argument("--own", action="append", default=[], metavar="DIR")
    parser.add_argument("--own-top", action="append", default=[], metavar="DIR")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Split here, because argparse's own treatment of "--" differs between versions of Python.
    end = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:end]), given[end + 1 :]
    if not command:
        parser.error("no server given: -- BINARY ARG…")

    if options.drop_root and os.geteuid() == 0:
        _drop_root(options.own, options.own_top, command[0])
    _die_with_parent(signal.Signals[options.death_signal], options.parent_pid)
    # An ignored signal stays ignored across exec. Python ignores the first two; a shell SIGINT and SIGQUIT of what it starts in the
    # background, and those are how servers are ended.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o077)
    try:
        os.execv(command[0], command)  # noqa: S606 # the whole purpose; the caller chose the binary
    except OSError as e:
        advice = " It was built for another kind of machine." if e.errno == errno.ENOEXEC else ""
        _fail(EXIT_CANNOT_EXECUTE, f"cannot execute {command[0]}: {e.strerror}.{advice}")


if __name__ == "__main__":
    main()
