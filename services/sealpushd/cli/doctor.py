"""`sealpush doctor`: what is well and what is not, a line each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from sealpushd.cli.options import data_dir_option


@click.command(short_help="Say what is wrong with a running `sealpush up`.")
@data_dir_option
def doctor(data_dir: Path) -> None:
    """Check a running `sealpush up`: engines, schemas, partitions, certificates, the clocks of this machine, PostgreSQL and each service,
    ports, services, entries of senders, push credentials and lanes.

    Exit code 0 if all is well. Every line that says FAIL says what to do.
    """
    from sealpushd.cli.checks import (
        Check,
        all_well,
        check_certificate,
        check_entries,
        check_health,
        check_port,
        check_postgres,
        check_push,
        check_service_clock,
        check_valkey,
    )
    from sealpushd.up.endpoints import Endpoints

    endpoints = Endpoints.load(data_dir)
    log = data_dir / "log"

    def log_of(listener: str) -> Path:
        return log / f"{listener if listener in endpoints.mesh else 'simulators'}.log"

    async def collect() -> list[Check]:
        postgres, valkey, entries, push, services, ports = await asyncio.gather(
            check_postgres(endpoints.postgres_url),
            check_valkey(endpoints.valkey_url, log / "valkey.log"),
            check_entries(endpoints.mesh["accounts"], Path(endpoints.operator_key), log_of("accounts")),
            check_push(endpoints.mesh["dispatch"], endpoints.mesh["fetch"], Path(endpoints.operator_key), log_of("dispatch")),
            asyncio.gather(
                *(check_health(name, address, log_of(name)) for name, address in endpoints.mesh.items()),
                *(check_service_clock(name, address) for name, address in endpoints.metrics.items()),
            ),
            asyncio.gather(
                *(check_port(f"port {name}", *_split(address), log_of(name)) for name, address in endpoints.listeners().items())
            ),
        )
        certificates = [check_certificate(path) for path in sorted(Path(endpoints.ca).parent.glob("*.pem"))]
        return [*postgres, valkey, *services, *ports, *certificates, *entries, *push]

    checks = asyncio.run(collect())
    for check in checks:
        click.echo(check.line)
    failed = sum(not check.ok for check in checks)
    click.echo("all is well" if all_well(checks) else f"{failed} of {len(checks)} checks failed")
    if failed:
        raise click.exceptions.Exit(1)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
