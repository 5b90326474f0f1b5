"""A database is dumped and comes back in another cluster by the commands of docs/backup.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealpushd.engines import Engines
from sealpushd.engines.binaries import find_postgres
from sealpushd.platform.db import connect
from sealpushd.platform.migrate import SERVICES, SchemaError, check_schema, migrate
from sealpushd.up.stack import role_url

PAGE = (Path(__file__).parents[2] / "docs" / "backup.md").read_text()
PASSWORDS = {f"{service}_app": f"password-{service}" for service in SERVICES} | {"sealpush_maintenance": "password-m"}


def commands(title: str) -> list[str]:
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.strip() for line in re.findall(r"^    (\S.*)$", section, re.MULTILINE)]


@pytest.fixture
def folder() -> Iterator[Path]:
    # A short path that any user may pass: the engines drop root, and sockets lie in it.
    made = Path(tempfile.mkdtemp(prefix="backup-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def run(command: str, folder: Path, admin_url: str) -> str:
    secrets = folder / "deploy" / "secrets"
    secrets.mkdir(parents=True, exist_ok=True)
    (secrets / "admin-url").write_text(admin_url + "\n")
    (secrets / "role-passwords.json").write_text(json.dumps(PASSWORDS))
    path = os.pathsep.join([str(find_postgres().postgres.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


async def test_a_dump_comes_back_in_an_empty_cluster_and_services_take_it(folder: Path) -> None:
    async with Engines.open(folder / "old", valkey=False) as old:
        await migrate(old.postgres_dsn, PASSWORDS)
        sql = await connect(old.postgres_dsn)
        await sql.execute("INSERT INTO registration.subscribers VALUES ($1, now())", os.urandom(16))
        await sql.close()
        for command in commands("Taking one"):
            await asyncio.to_thread(run, command, folder, old.postgres_dsn)

    async with Engines.open(folder / "new", valkey=False) as new:
        restore, *after = commands("Restoring one")
        assert "pg_restore" in restore
        await asyncio.to_thread(run, restore, folder, new.postgres_dsn)
        # Half-way: everything is there and nothing is its roles' own.
        with pytest.raises(SchemaError, match=r"the role fetch_owner is missing.*sealpush db migrate"):
            await check_schema(new.postgres_dsn, "fetch")
        said = [await asyncio.to_thread(run, command, folder, new.postgres_dsn) for command in after]
        assert "FAIL" not in said[-1]
        for service in SERVICES:
            url = role_url(new.postgres_dsn, f"{service}_app", PASSWORDS[f"{service}_app"])
            await check_schema(url, service)
        sql = await connect(role_url(new.postgres_dsn, "registration_app", PASSWORDS["registration_app"]), search_path="registration")
        assert await sql.fetchval("SELECT count(*) FROM subscribers") == 1
        await sql.execute("INSERT INTO subscribers VALUES ($1, now())", os.urandom(16))
        await sql.close()
