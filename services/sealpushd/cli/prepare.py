"""`sealpush prepare`: the secrets of an installation as files to hand out, for compose and for a mesh."""

from __future__ import annotations

import secrets as randomness
from pathlib import Path

import click


@click.command(short_help="Make the secrets that compose.yaml mounts.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--postgres", default="postgres:5432", show_default=True, help="host:port of PostgreSQL, as the services see it.")
@click.option("--valkey", default="valkey:6379", show_default=True, help="host:port of Valkey, as the services see it.")
def prepare(folder: Path, postgres: str, valkey: str) -> None:
    """Make the secrets that compose.yaml mounts, in FOLDER. What is there stays, and is named where it is not what would be made now.

    Each service gets a TOML file with its own database password and a key of its own; the public halves are in trust.json.
    The certificates are for localhost: put your own in their place where others call.
    """
    from sealpushd.platform.migrate import MAINTENANCE_ROLE, SERVICES
    from sealpushd.platform.tls import write_secret
    from sealpushd.up.secrets import prepare as prepare_secrets

    before = _versions(folder)
    made = prepare_secrets(folder, ["services"])
    differing: list[str] = []

    def keep_or_write(name: str, content: str, why: str = "") -> str:
        """The file's content, which is this one where it is not there yet."""
        path = folder / name
        if not path.exists():
            write_secret(path, content.encode())
        present = path.read_text()
        if why and present != content:
            differing.append(f"{path} stays as it is; it is not what {why} say now. To have it written anew, remove it.")
        return present

    admin = keep_or_write("postgres-password", randomness.token_hex(24)).strip()
    valkey_password = keep_or_write("valkey-password", randomness.token_hex(24)).strip()
    for service in SERVICES:
        role = f"{service}_app"
        lines = (
            f'postgres_url = "postgresql://{role}:{made.role_passwords[role]}@{postgres}/sealpush"',
            f'valkey_url = "redis://:{valkey_password}@{valkey}"',
        )
        keep_or_write(f"{service}.toml", "\n".join(lines) + "\n", "the passwords and addresses")
    keep_or_write("admin-url", f"postgresql://postgres:{admin}@{postgres}/sealpush\n", "the password and address")
    password = made.role_passwords[MAINTENANCE_ROLE]
    keep_or_write("maintenance-url", f"postgresql://{MAINTENANCE_ROLE}:{password}@{postgres}/sealpush\n", "the password and address")
    keep_or_write("valkey.conf", _valkey_conf(valkey_password), "the password and this release")

    after = _versions(folder)
    new = sorted(str(path.relative_to(folder)) for path in after.keys() - before.keys())
    changed = sorted(str(path.relative_to(folder)) for path in after.keys() & before.keys() if after[path] != before[path])
    click.echo(f"made: {', '.join(new)}" if new else "made: nothing, all is there")
    if changed:
        click.echo(f"extended or renewed: {', '.join(changed)}")
    for line in differing:
        click.echo(line, err=True)
    click.echo(f"{folder} holds the secrets; keep it out of version control and in your back-ups")


def _valkey_conf(password: str) -> str:
    return f'requirepass {password}\nsave ""\nappendonly no\nmaxmemory 256mb\nmaxmemory-policy allkeys-lfu\n'


def _versions(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each file, and what tells that it was written anew."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
