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
    """Make the secrets that compose.yaml mounts, in FOLDER. What is there stays.

    Each service gets a TOML file with its own database password and a key of its own; the public halves are in trust.json.
    The certificates are for localhost: put your own in their place where others call.
    """
    from sealpushd.platform.migrate import MAINTENANCE_ROLE, SERVICES
    from sealpushd.platform.tls import write_secret
    from sealpushd.up.secrets import prepare as prepare_secrets

    made = prepare_secrets(folder, ["services"])

    def kept(name: str) -> str:
        path = folder / name
        if not path.exists():
            write_secret(path, randomness.token_hex(24).encode())
        return path.read_text().strip()

    admin, valkey_password = kept("postgres-password"), kept("valkey-password")
    for service in SERVICES:
        role = f"{service}_app"
        lines = (
            f'postgres_url = "postgresql://{role}:{made.role_passwords[role]}@{postgres}/sealpush"',
            f'valkey_url = "redis://:{valkey_password}@{valkey}"',
        )
        write_secret(folder / f"{service}.toml", ("\n".join(lines) + "\n").encode())
    write_secret(folder / "admin-url", f"postgresql://postgres:{admin}@{postgres}/sealpush\n".encode())
    password = made.role_passwords[MAINTENANCE_ROLE]
    write_secret(folder / "maintenance-url", f"postgresql://{MAINTENANCE_ROLE}:{password}@{postgres}/sealpush\n".encode())
    write_secret(
        folder / "valkey.conf",
        f'requirepass {valkey_password}\nsave ""\nappendonly no\nmaxmemory 256mb\nmaxmemory-policy allkeys-lfu\n'.encode(),
    )
    click.echo(f"{folder} holds the secrets; keep it out of version control and in your back-ups")
