"""Real servers on a real disk, killed for real."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis.asyncio

from sealpushd import engines as engines_module
from sealpushd.engines import EmbeddedPostgres, EmbeddedValkey, EngineError, Engines, launcher
from sealpushd.engines.binaries import find_postgres
from sealpushd.engines.datadir import DataDir
from sealpushd.engines.process import ServerProcess
from sealpushd.engines.watch import Liveness

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has root to drop")

# Opens the engines in a process of its own, prints what they are, keeps them open until its input ends.
HOLDER = """
import asyncio, json, os, sys
from pathlib import Path
from sealpushd.engines import Engines

async def main():
    async with Engines.open(Path(sys.argv[1])) as engines:
        facts = {"uid": os.geteuid(), "dsn": engines.postgres_dsn, "processes": engines.processes}
        print(json.dumps(facts), flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""

# The holder in a user namespace like that of a container that permits no further ones.
WITHOUT_NAMESPACES = """
import ctypes, os, sys
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("unshared", flush=True)
sys.stdin.readline()
os.setgid(0), os.setuid(0)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Where any user may pass, and short enough for sockets: pytest's own directories are neither."""
    parent = Path(tempfile.mkdtemp(prefix="engines-"))
    parent.chmod(0o755)
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A data directory that was used once, cleanly."""

    async def use(data_dir: Path) -> None:
        async with Engines.open(data_dir, valkey=False):
            pass

    parent = Path(tempfile.mkdtemp(prefix="engines-"))
    asyncio.run(use(parent / "data"))
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture
def used_data_dir(template: Path, data_dir: Path) -> Path:
    """The same as `data_dir`, but with a PostgreSQL cluster in it, which saves the time of an initdb."""
    shutil.copytree(template, data_dir, symlinks=True)
    return data_dir


def processes_in(data_dir: Path) -> dict[int, str]:
    """Every process that works inside the directory: servers, their children, an initdb. Never an orphaned zombie."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(process / "cwd").startswith(f"{data_dir}/"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 # the kernel tells nobody when a process that is no child ends
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def names_in(data_dir: Path, pattern: str) -> list[str]:
    return [path.name for path in data_dir.glob(pattern)]


@contextlib.contextmanager
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """Some program that has nothing to do with us."""
    with subprocess.Popen(["/bin/sleep", "60"], cwd="/") as process:
        try:
            yield process
        finally:
            process.kill()


def map_all_users(pid: int) -> None:
    """Makes the users of a new user namespace those of this one."""
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 65536")


async def remember(dsn: str, word: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute("CREATE TABLE IF NOT EXISTS words (word text PRIMARY KEY)")
        await connection.execute("INSERT INTO words VALUES ($1)", word)


async def remembered(dsn: str) -> list[str]:
    async with connected(dsn) as connection:
        return [row["word"] for row in await connection.fetch("SELECT word FROM words ORDER BY word")]


@contextlib.contextmanager
def holder(data_dir: Path, *prefix: str) -> Iterator["subprocess.Popen[str]"]:
    """The holder; `prefix` is put before the interpreter."""
    command = [*prefix, sys.executable, "-c", HOLDER, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def facts(process: "subprocess.Popen[str]") -> Mapping[str, Any]:
    """What the holder prints once the engines are open."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            read: Mapping[str, Any] = json.loads(line)
            return read
    raise AssertionError("the holder ended first")


async def test_data_outlives_a_restart_and_nothing_else_does(data_dir: Path) -> None:
    async with Engines.open(data_dir) as engines:
        await remember(engines.postgres_dsn, "kept")
        async with redis.asyncio.Redis.from_url(engines.valkey_url) as valkey:
            await valkey.set("cached", "1")
            assert (await valkey.config_get("maxmemory-policy"))["maxmemory-policy"] == "allkeys-lfu"
        assert set(engines.processes) == {"postgres", "valkey"}
        assert set(engines.processes.values()) <= set(processes_in(data_dir))
        password = (data_dir / "secrets" / "valkey-password").read_text()
        assert not any(password in command for command in processes_in(data_dir).values())
    assert processes_in(data_dir) == {}
    assert os.listdir(data_dir / "run") == []

    async with Engines.open(data_dir) as engines:
        assert await remembered(engines.postgres_dsn) == ["kept"]
        async with redis.asyncio.Redis.from_url(engines.valkey_url) as valkey:
            assert await valkey.get("cached") is None


async def test_postgres_is_durable_private_and_sorts_the_same_everywhere(used_data_dir: Path) -> None:
    async with Engines.open(used_data_dir, valkey=False) as engines:
        assert set(engines.processes) == {"postgres"}
        with pytest.raises(EngineError, match="valkey=True"):
            _ = engines.valkey_url
        async with connected(engines.postgres_dsn) as connection:
            settings = {row["name"]: row["setting"] for row in await connection.fetch("SELECT * FROM pg_settings")}
            locale = await connection.fetchrow(
                "SELECT datname, datlocprovider, datlocale, pg_encoding_to_char(encoding) AS encoding "
                "FROM pg_database WHERE datname = current_database()"
            )
        assert [settings[name] for name in ("fsync", "synchronous_commit", "full_page_writes")] == ["on"] * 3
        assert settings["data_checksums"] == "on"
        assert settings["listen_addresses"] == ""
        assert dict(locale or {}) == {
            "datname": "sealpush",
            "datlocprovider": b"b",
            "datlocale": "C.UTF-8",
            "encoding": "UTF8",
        }
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(engines.postgres_dsn, password="wrong")


async def test_a_second_opening_is_refused_while_the_first_goes_on(used_data_dir: Path) -> None:
    async with Engines.open(used_data_dir) as engines:
        with holder(used_data_dir) as second:
            assert second.stdout is not None
            second.communicate(timeout=60)
            assert second.returncode == 1
        with pytest.raises(EngineError, match=rf"in use by another Sealpush, process {os.getpid()}\b"):
            async with Engines.open(used_data_dir):
                pass
        await remember(engines.postgres_dsn, "undisturbed")


async def test_killed_engines_come_back_under_the_same_addresses(used_data_dir: Path) -> None:
    async with Engines.open(used_data_dir) as engines:
        before = dict(engines.processes)
        dsn, url = engines.postgres_dsn, engines.valkey_url
        await remember(dsn, "committed")
        async with connected(dsn):  # a backend that outlives its postmaster for a moment
            for pid in before.values():
                os.kill(pid, signal.SIGKILL)
            await eventually(
                lambda: engines.processes.keys() == before.keys() and not set(engines.processes.values()) & set(before.values())
            )
        assert (engines.postgres_dsn, engines.valkey_url) == (dsn, url)

        # Both have a pid again, which is a little before they answer.
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError, asyncpg.PostgresError, redis.exceptions.RedisError):
                    async with redis.asyncio.Redis.from_url(url) as valkey:
                        assert await valkey.ping()
                    assert await remembered(dsn) == ["committed"]
                    break
                await asyncio.sleep(0.01)
    assert processes_in(used_data_dir) == {}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervision that finds out in seconds."""
    monkeypatch.setattr(engines_module, "Liveness", partial(Liveness, every_s=0.1, patience_s=1.0, unanswered_max=2))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.usefixtures("impatient")
async def test_engines_that_hang_are_started_again_and_what_was_committed_is_there(used_data_dir: Path) -> None:
    told: list[tuple[str, str, Path]] = []
    async with Engines.open(used_data_dir, restarted=lambda *what: told.append(what)) as engines:
        before = dict(engines.processes)
        await remember(engines.postgres_dsn, "committed")
        async with connected(engines.postgres_dsn):
            # Its children as well: they would outlive it, and PostgreSQL does not start beside one.
            stopped = [pid for server in before.values() for pid in (server, *children_of(server))]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            await eventually(lambda: {name for name, _, _ in told} == set(before))
        assert sorted(told) == [(name, "hung", used_data_dir / "log" / f"{name}.log") for name in ("postgres", "valkey")]
        assert not set(stopped) & set(processes_in(used_data_dir))
        assert await remembered(engines.postgres_dsn) == ["committed"]
        async with redis.asyncio.Redis.from_url(engines.valkey_url) as valkey:
            assert await valkey.ping()
        # They are well, and are left alone.
        after = dict(engines.processes)
        await asyncio.sleep(1)
        assert dict(engines.processes) == after


@pytest.mark.usefixtures("impatient")
async def test_a_postgres_that_somebody_told_to_wait_for_its_clients_does_not_wait(used_data_dir: Path) -> None:
    """SIGTERM to the postmaster: who is connected may stay for ever, and nobody else is let in."""
    told: list[tuple[str, str, Path]] = []
    async with Engines.open(used_data_dir, valkey=False, restarted=lambda *what: told.append(what)) as engines:
        await remember(engines.postgres_dsn, "committed")
        client = await asyncpg.connect(engines.postgres_dsn)
        before = engines.processes["postgres"]
        os.kill(before, signal.SIGTERM)
        await eventually(lambda: bool(told))
        assert told == [("postgres", "told to shut down by somebody else", used_data_dir / "log" / "postgres.log")]
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await client.fetchval("SELECT 1")
        client.terminate()
        assert await remembered(engines.postgres_dsn) == ["committed"]
        # Ended in order: nothing had to be repaired from the log.
        assert "not properly shut down" not in (used_data_dir / "log" / "postgres.log").read_text()


async def test_engines_that_somebody_stopped_end_with_us_and_in_order(used_data_dir: Path) -> None:
    """Not by SIGKILL after all patience, which for PostgreSQL is 25 s."""
    async with Engines.open(used_data_dir) as engines:
        for pid in engines.processes.values():
            os.kill(pid, signal.SIGSTOP)
    assert processes_in(used_data_dir) == {}
    assert "database system is shut down" in (used_data_dir / "log" / "postgres.log").read_text().splitlines()[-1]


async def test_an_engine_that_cannot_come_back_is_reported_and_data_is_not_replaced(
    used_data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_module, "FAILED_STARTS_MAX", 2)
    async with Engines.open(used_data_dir, valkey=False) as engines:
        (used_data_dir / "postgres").rename(used_data_dir / "elsewhere")
        os.kill(engines.processes["postgres"], signal.SIGKILL)
        async with asyncio.timeout(30):
            with pytest.raises(EngineError, match="has vanished while in use"):
                await engines.wait()
    assert not (used_data_dir / "postgres").exists()


async def test_engines_end_when_their_parent_is_killed_and_the_next_run_has_the_data(used_data_dir: Path) -> None:
    with holder(used_data_dir) as parent:
        seen = facts(parent)
        await remember(seen["dsn"], "committed")
        parent.kill()
        parent.wait(timeout=60)
        # At once, while the servers of the killed run may still be ending.
        async with Engines.open(used_data_dir) as engines:
            assert await remembered(engines.postgres_dsn) == ["committed"]
            await eventually(lambda: not set(seen["processes"].values()) & set(processes_in(used_data_dir)))
    assert processes_in(used_data_dir) == {}


async def test_engines_end_when_their_parent_is_killed_and_nobody_follows(used_data_dir: Path) -> None:
    with holder(used_data_dir) as parent:
        facts(parent)
        parent.kill()
        parent.wait(timeout=60)
        await eventually(lambda: processes_in(used_data_dir) == {})


async def test_an_initdb_killed_half_way_is_healed(data_dir: Path) -> None:
    with holder(data_dir) as parent:
        await eventually(lambda: any(data_dir.glob("postgres-new-*/pgdata/PG_VERSION")))
        parent.kill()
        parent.wait(timeout=60)
    assert not (data_dir / "postgres").exists()
    async with Engines.open(data_dir, valkey=False) as engines:
        await remember(engines.postgres_dsn, "works")
    async with Engines.open(data_dir, valkey=False):
        assert names_in(data_dir, "postgres-new-*") == []


async def test_cancelled_while_starting_nothing_is_left(data_dir: Path) -> None:
    async def never_ends() -> None:
        async with Engines.open(data_dir):
            await asyncio.Event().wait()

    task = asyncio.create_task(never_ends())
    await eventually(lambda: any(data_dir.glob("postgres-new-*/pgdata/PG_VERSION")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: processes_in(data_dir) == {})
    assert names_in(data_dir, "postgres*") == []


@pytest.mark.parametrize("engine", [EmbeddedPostgres, EmbeddedValkey])
async def test_cancelled_in_the_last_moment_of_a_start_it_ends(
    used_data_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: type[EmbeddedPostgres] | type[EmbeddedValkey]
) -> None:
    """A start that has just succeeded and tidies up must not take a cancellation for its own: whoever cancelled would wait for ever."""
    wait = ServerProcess.wait
    cancelled: list[bool] = []

    async def meets_a_cancellation(self: ServerProcess) -> int:
        try:
            return await wait(self)
        except asyncio.CancelledError:
            if not cancelled:
                cancelled.append(starting.cancel())
            raise

    with DataDir.open(used_data_dir) as data:
        server = engine(data)
        monkeypatch.setattr(ServerProcess, "wait", meets_a_cancellation)
        starting = asyncio.create_task(server.start())
        async with asyncio.timeout(30):
            with pytest.raises(asyncio.CancelledError):
                await starting
            await server.wait()


@pytest.mark.parametrize("turns", range(12))
async def test_a_start_of_valkey_that_is_cancelled_while_it_asks_ends_as_cancelled(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """The first answer of a server must not take the place of a cancellation: the supervisor would go on watching it."""

    async def listens(self: ServerProcess, timeout_s: float) -> bool:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_unix_connection(urlsplit(server.url).path)
                    break
                await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        cancel_in(turns)
        return False

    def cancel_in(turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(cancel_in, turns - 1)
        else:
            asked.append(starting.cancel())

    asked: list[bool] = []
    with DataDir.open(data_dir) as data:
        server = EmbeddedValkey(data)
        with monkeypatch.context() as patched:
            patched.setattr(ServerProcess, "ends_within", listens)
            patched.setattr(EmbeddedValkey, "stop", lambda _: asyncio.sleep(0))
            starting = asyncio.create_task(server.start())
            await asyncio.wait((starting,))
        await server.stop()
        assert [starting.cancelled()] == asked


async def test_a_pid_file_whose_pid_belongs_to_somebody_else_is_seen_through(used_data_dir: Path) -> None:
    async with Engines.open(used_data_dir, valkey=False):
        pid_file = (used_data_dir / "postgres" / "postmaster.pid").read_text()
    with stranger() as process:
        lines = [str(process.pid), *pid_file.splitlines()[1:]]
        (used_data_dir / "postgres" / "postmaster.pid").write_text("\n".join(lines) + "\n")
        # Taken for a server that still ends, it would be waited for, and then reported.
        async with Engines.open(used_data_dir, valkey=False):
            pass
        assert process.poll() is None


async def test_a_failed_start_says_why_and_leaves_nothing(used_data_dir: Path) -> None:
    control = used_data_dir / "postgres" / "global" / "pg_control"
    control.write_bytes(b"\0" * control.stat().st_size)
    with pytest.raises(EngineError, match=r"(?s)PostgreSQL ended while starting.*postgres\.log, ends with:.*incompatible"):
        async with Engines.open(used_data_dir):
            pass
    assert processes_in(used_data_dir) == {}


async def test_a_lost_password_is_named(used_data_dir: Path) -> None:
    (used_data_dir / "secrets" / "postgres-password").unlink()
    with pytest.raises(EngineError, match=r"refuses the password in .*secrets/postgres-password"):
        async with Engines.open(used_data_dir, valkey=False):
            pass
    assert processes_in(used_data_dir) == {}


async def test_a_data_directory_with_a_long_and_unusual_path_works(data_dir: Path) -> None:
    unusual = data_dir / "long, 'quoted' and \"unusual\" = %20 & ключ" / ("x" * 100)
    async with Engines.open(unusual) as engines:
        await remember(engines.postgres_dsn, "works")
        async with redis.asyncio.Redis.from_url(engines.valkey_url) as valkey:
            assert await valkey.ping()
        sockets = (unusual / "run" / "sockets").readlink()
        assert unusual not in sockets.parents
    assert not sockets.exists()


@needs_root
async def test_an_ordinary_user_may_run_it(data_dir: Path) -> None:
    # By our own launcher, which makes an ordinary user of root while everything root may read stays readable.
    with holder(data_dir, sys.executable, launcher.__file__, "--drop-root", "--") as process:
        seen = facts(process)
        assert seen["uid"] != 0
        await remember(seen["dsn"], "works")
        process.communicate("", timeout=60)
        assert process.returncode == 0
    assert processes_in(data_dir) == {}


@needs_root
async def test_root_without_user_namespaces_runs_it_as_an_ordinary_account(data_dir: Path) -> None:
    async with Engines.open(data_dir) as engines:
        await remember(engines.postgres_dsn, "with")
    postgres = find_postgres().postgres
    if not all(directory.stat().st_mode & 0o001 for directory in (postgres, *postgres.parents)):
        pytest.skip("this installation can be used by its owner only")

    with holder(data_dir, sys.executable, "-c", WITHOUT_NAMESPACES) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "unshared\n"
        map_all_users(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        seen = facts(process)
        assert seen["uid"] == 0
        assert os.stat(f"/proc/{seen['processes']['postgres']}").st_uid != 0
        assert (data_dir / "postgres").stat().st_uid != 0
        assert (data_dir / "secrets").stat().st_uid == 0
        await remember(seen["dsn"], "without")
        process.communicate("", timeout=60)
        assert process.returncode == 0

    async with Engines.open(data_dir) as engines:
        assert await remembered(engines.postgres_dsn) == ["with", "without"]
    assert (data_dir / "postgres").stat().st_uid == 0
