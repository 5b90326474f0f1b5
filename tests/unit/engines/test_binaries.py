from pathlib import Path

import pytest

from sealpushd.engines import binaries
from sealpushd.engines.binaries import find_postgres, find_valkey
from sealpushd.engines.errors import EngineError


def install(directory: Path, name: str, printed: str) -> Path:
    """A program that prints `printed`, as a server does for --version."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\necho '{printed}'\n")
    program.chmod(0o755)
    return program


def install_postgres(directory: Path, version: str) -> Path:
    install(directory, "initdb", f"initdb (PostgreSQL) {version}")
    return install(directory, "postgres", f"postgres (PostgreSQL) {version}")


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_package_directory", lambda name: None)


def test_a_suitable_system_postgres_comes_before_the_wheel(tmp_path: Path) -> None:
    postgres = install_postgres(tmp_path / "bin", "17.4 (Debian 17.4-1)")
    found = find_postgres(path=str(tmp_path / "bin"), system_root=tmp_path)
    assert (found.postgres, found.major, found.source) == (postgres, 17, "system")


def test_a_link_on_path_is_followed_to_the_initdb_beside_it(tmp_path: Path) -> None:
    postgres = install_postgres(tmp_path / "usr/lib/postgresql/18/bin", "18.1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "postgres").symlink_to(postgres)
    found = find_postgres(path=str(tmp_path / "bin"), system_root=tmp_path)
    assert found.initdb == postgres.with_name("initdb")


@pytest.mark.parametrize("version", ["15.18 (Debian 15.18-0+deb12u1)", "16.9", "19beta2", "19devel"])
def test_old_and_unfinished_system_versions_are_skipped(tmp_path: Path, version: str) -> None:
    install_postgres(tmp_path / "bin", version)
    assert find_postgres(path=str(tmp_path / "bin"), system_root=tmp_path).source == "wheel"


def test_the_newest_of_the_systems_versions_is_taken(tmp_path: Path) -> None:
    for version in ("15.1", "17.4", "18.2"):
        install_postgres(tmp_path / f"usr/lib/postgresql/{version.partition('.')[0]}/bin", version)
    assert find_postgres(path="", system_root=tmp_path).major == 18


def test_existing_data_is_opened_by_exactly_its_major_version(tmp_path: Path) -> None:
    for version in ("15.1", "17.4", "18.2"):
        install_postgres(tmp_path / f"usr/lib/postgresql/{version.partition('.')[0]}/bin", version)
    assert find_postgres(data_major=17, path="", system_root=tmp_path).major == 17
    with pytest.raises(EngineError, match=r"made by PostgreSQL 16, and only that .* Install PostgreSQL 16 beside"):
        find_postgres(data_major=16, path="", system_root=tmp_path)


@pytest.mark.usefixtures("no_wheels")
def test_nothing_found_says_what_to_install(tmp_path: Path) -> None:
    install_postgres(tmp_path, "15.18")
    with pytest.raises(EngineError, match=r"Found: 15 .*pip install 'sealpush\[embedded\]'"):
        find_postgres(path=str(tmp_path), system_root=tmp_path)
    with pytest.raises(EngineError, match=r"Found none\. .*pip install 'sealpush\[embedded\]'"):
        find_valkey(path="")


def test_a_postgres_without_initdb_or_that_does_not_run_is_skipped(tmp_path: Path) -> None:
    install(tmp_path / "a", "postgres", "postgres (PostgreSQL) 18.1")
    install_postgres(tmp_path / "b", "18.1").write_text("#!/no/such/interpreter\n")
    for directory in ("a", "b"):
        assert find_postgres(path=str(tmp_path / directory), system_root=tmp_path).source == "wheel"


def test_a_suitable_system_valkey_comes_before_the_wheel(tmp_path: Path) -> None:
    install(tmp_path / "new", "valkey-server", "Valkey server v=8.1.0 sha=0 malloc=jemalloc")
    install(tmp_path / "old", "valkey-server", "Valkey server v=7.2.9 sha=0 malloc=jemalloc")
    assert find_valkey(path=str(tmp_path / "new")).source == "system"
    assert find_valkey(path=str(tmp_path / "old")).source == "wheel"
