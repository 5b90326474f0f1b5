import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sealpushd.engines.datadir import FORMAT, DataDir
from sealpushd.engines.errors import EngineError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_everything_in_it_is_private_and_nothing_above_it_is_changed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with DataDir.open(tmp_path / "made" / "data") as data:
        data.secret("some")
        directories = [data.root, data.valkey, data.log, data.sockets, *data.passed_through, data.root / "secrets"]
        assert {mode(directory) for directory in directories} == {0o700}
        assert mode(data.root / "secrets" / "some") == 0o600
        assert mode(data.root / "lock") == 0o600
    assert mode(tmp_path) == 0o755


def test_an_empty_directory_of_ours_becomes_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with DataDir.open(tmp_path):
        assert mode(tmp_path) == 0o700


def test_a_second_opening_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    with (
        DataDir.open(tmp_path),
        pytest.raises(EngineError, match=rf"in use by another Sealpush, process {os.getpid()}\. Stop that one"),
        DataDir.open(tmp_path),
    ):
        pass
    with DataDir.open(tmp_path):
        pass


def test_a_child_does_not_hold_the_lock_on(tmp_path: Path) -> None:
    with DataDir.open(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with child, DataDir.open(tmp_path):
        assert child.poll() is None
        child.communicate(b"\n")


def test_a_foreign_directory_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EngineError, match=r"not empty and is not a Sealpush data directory"), DataDir.open(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert mode(tmp_path) == 0o755


def test_a_run_killed_before_the_format_was_written_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("lock", "sealpush-format.new"):
        (tmp_path / name).touch()
    with DataDir.open(tmp_path):
        assert json.loads((tmp_path / "sealpush-format").read_text()) == {"format": FORMAT}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": FORMAT + 1}), r"made by a newer Sealpush .* Upgrade Sealpush"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "1"}', "is damaged"),
    ],
)
def test_a_newer_or_damaged_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sealpush-format").write_text(text)
    with pytest.raises(EngineError, match=message), DataDir.open(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away, and open those of others")
def test_root_does_not_take_over_another_users_directory(tmp_path: Path) -> None:
    with DataDir.open(tmp_path):
        pass
    os.chown(tmp_path / "sealpush-format", 65534, 65534)
    with pytest.raises(EngineError, match=r"made by the user with uid 65534"), DataDir.open(tmp_path):
        pass


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(EngineError, match=r"Cannot use .*/file.* A file is in the way"), DataDir.open(path):
            pass


def test_a_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as data:
        first = data.secret("one")
        assert len(first) == 43
        assert data.secret("two") != first
    with DataDir.open(tmp_path) as data:
        assert data.secret("one") == first
        (tmp_path / "secrets" / "one").write_text("")
        with pytest.raises(EngineError, match="is empty"):
            data.secret("one")


def test_a_new_postgres_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as data:
        with contextlib.suppress(ZeroDivisionError), data.new_postgres() as directory:
            (directory / "pgdata").mkdir()
            raise ZeroDivisionError
        assert not data.postgres.exists()
        with data.new_postgres() as directory:
            (directory / "pgdata" / "global").mkdir(parents=True)
            (directory / "pgdata" / "global" / "pg_control").touch()
            (directory / "pgdata" / "PG_VERSION").write_text("18\n")
            assert data.postgres_major() is None
        assert data.postgres_major() == 18
        assert not directory.exists()


def test_an_empty_postgres_directory_is_as_none_and_an_incomplete_one_is_not_touched(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as data:
        data.postgres.mkdir()
        assert data.postgres_major() is None
        (data.postgres / "base").mkdir(parents=True)
        with pytest.raises(EngineError, match=r"not a complete PostgreSQL data directory"):
            data.postgres_major()
        assert (data.postgres / "base").exists()


@pytest.mark.parametrize("name", ["long-" + "x" * 100, 'spaces, commas and "quotes"'])
def test_sockets_go_elsewhere_when_the_path_is_long_or_unusual(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    with DataDir.open(root) as data:
        assert root not in data.sockets.parents
        assert len(os.fsencode(data.sockets)) <= 80
        assert mode(data.sockets) == 0o700
        assert (root / "run" / "sockets").readlink() == data.sockets
    assert not data.sockets.exists()


def test_left_overs_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    root = tmp_path / ("long-" + "x" * 100)
    script = (
        "import os, signal, sys; from pathlib import Path; from sealpushd.engines.datadir import DataDir\n"
        "with DataDir.open(Path(sys.argv[1])) as data, data.new_postgres() as new:\n"
        "    print(data.sockets, new, sep='\\n', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False)
    left_over = [Path(line) for line in killed.stdout.splitlines()]
    assert [path.exists() for path in left_over] == [True, True]
    with DataDir.open(root):
        assert [path.exists() for path in left_over] == [False, False]
