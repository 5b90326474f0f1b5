"""One run of `sealpush up`, from the locked directory to the last process that ended."""

from __future__ import annotations

import asyncio
import json
import logging as stdlib_logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from sealpushd.engines import Engines
from sealpushd.engines.datadir import DataDir
from sealpushd.engines.process import bound_log
from sealpushd.platform import logging
from sealpushd.platform.errors import ServiceError
from sealpushd.platform.migrate import migrate
from sealpushd.up import demo, secrets, vendors
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.maintenance import maintain
from sealpushd.up.ports import HOST, PUBLIC, SERVICES, Ports
from sealpushd.up.stack import APP_ID, Stack, maintenance_url

log = structlog.get_logger()

_MAINTENANCE_EVERY_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Options:
    data_dir: Path
    base_port: int
    processes: int
    then_exit: bool
    quiet: bool
    show: bool
    log_level: str


async def run(options: Options) -> int:
    """Run until the messages are done (`then_exit`) or a signal comes; the exit code. Raises UpError, EngineError."""
    started_at = time.monotonic()

    def say(text: str = "") -> None:
        if not options.quiet:
            print(text, flush=True)

    work = asyncio.current_task()
    assert work is not None  # noqa: S101 - asyncio.run made one
    signals: list[int] = []

    def interrupt(number: int) -> None:
        signals.append(number)
        if len(signals) == 1:
            work.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await _run(options, started_at, say)
    except asyncio.CancelledError:
        if not signals:
            raise
        say("\nstopped")
        # Ctrl-C is how one leaves; in the middle of --then-exit it means that the messages did not all end.
        return 130 if options.then_exit else 0


async def _run(options: Options, started_at: float, say: Callable[..., None]) -> int:
    ports = Ports(options.base_port, options.processes)
    # Under the lock that the engines take again right afterwards: who is second must hear of that, not of its ports.
    with DataDir.open(options.data_dir) as data:
        _log_to(data.log / "up.log", options.log_level)
        ports.check_free()
        made = secrets.prepare(options.data_dir / "secrets", ["services", "simulators"])
        accounts = vendors.prepare(made.folder / "push", f"https://localhost:{ports.fcm}/token")
        first_time = data.postgres_major() is None
        log_folder = data.log

    def restarted(name: str, why: str, log_path: Path) -> None:
        say(f"{name} was restarted ({why}); log: {log_path}")

    say(f"Sealpush starts in {options.data_dir}" + (" (the first time: this takes a few seconds more)" if first_time else ""))
    async with Engines.open(options.data_dir, restarted=restarted) as engines:
        passwords = made.role_passwords
        applied = await migrate(engines.postgres_dsn, passwords)
        if applied:
            log.info("migrated", applied=applied)
        async with Stack.open(
            ports, made, accounts, engines.postgres_dsn, engines.valkey_url, log_folder, options.log_level, restarted
        ) as stack:
            # Imported while the services import theirs.
            from sealpushd.up import phones, show

            await stack.wait_ready()
            ready_seconds = time.monotonic() - started_at
            log.info("ready", seconds=round(ready_seconds, 3), pids=stack.pids)
            say(f"PostgreSQL, Valkey, {len(SERVICES)} services and the simulators answer after {ready_seconds:.1f} s\n")
            set_up = await demo.set_up(ports, made)
            endpoints = _endpoints(options.data_dir, ports, made, engines, set_up)
            async with (
                _maintained(maintenance_url(engines.postgres_dsn, made)),
                phones.open_phones(endpoints, options.data_dir) as handsets,
            ):
                endpoints.write(options.data_dir)
                try:
                    failing = asyncio.ensure_future(engines.wait())
                    result = await show.run(endpoints, set_up, handsets, say) if options.show else show.Result()
                    if options.then_exit:
                        failing.cancel()
                        return _finish(result, started_at, ready_seconds, stack)
                    say(show.farewell(options.data_dir))
                    await failing
                finally:
                    failing.cancel()
                    await asyncio.gather(failing, return_exceptions=True)
                    Endpoints.remove(options.data_dir)
    return 0


def _finish(result: object, started_at: float, ready_seconds: float, stack: Stack) -> int:
    from sealpushd.up.show import Result

    assert isinstance(result, Result)  # noqa: S101 - typed so because the module is imported late
    restarts = sum(child.restarts for child in stack.children.values())
    line = result.summary() | {
        "ready_seconds": round(ready_seconds, 2),
        "seconds": round(time.monotonic() - started_at, 2),
        "restarts": restarts,
    }
    print(json.dumps(line), flush=True)
    return 0 if result.all_as_expected else 1


def _endpoints(data_dir: Path, ports: Ports, made: secrets.Secrets, engines: Engines, set_up: demo.Demo) -> Endpoints:
    return Endpoints(
        pid=os.getpid(),
        ca=str(made.ca),
        public={service: ports.target(service, "public", "localhost") for service in PUBLIC},
        mesh={service: ports.target(service, "mesh") for service in SERVICES},
        metrics={service: f"{HOST}:{ports.of(service, 'metrics')}" for service in SERVICES},
        simulators=f"{HOST}:{ports.control}",
        push_services={"APNs": f"{HOST}:{ports.apns}", "FCM": f"{HOST}:{ports.fcm}", "HMS": f"{HOST}:{ports.hms}"},
        postgres_url=engines.postgres_dsn,
        valkey_url=engines.valkey_url,
        operator_key=str(made.service_key("operator")),
        app_id=APP_ID,
        login=demo.LOGIN,
        password=set_up.password,
        senders={name: sender_id.hex() for name, sender_id in set_up.sender_ids.items()},
        phone=demo.PHONE,
        root_public_key=set_up.root_public_key.hex(),
        demo_folder=str(data_dir / "secrets" / "demo"),
    )


@asynccontextmanager
async def _maintained(url: str) -> AsyncIterator[None]:
    """Keeps the partitions, as `sealpush db maintain --every 1h` does elsewhere."""

    async def keep() -> None:
        while True:
            try:
                made, dropped = await maintain(url)
                log.info("partitions kept", made=made, dropped=dropped)
            except ServiceError as e:
                log.warning("partitions could not be kept; next try in an hour", error=str(e))
            await asyncio.sleep(_MAINTENANCE_EVERY_S)

    task = asyncio.create_task(keep(), name="maintenance")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _log_to(path: Path, level: str) -> None:
    """Log of this process: a file beside those of the services. The terminal is for people."""
    bound_log(path)
    stream = path.open("a")
    logging.configure("up", level)
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=stream))
    for handler in stdlib_logging.getLogger().handlers:
        if isinstance(handler, stdlib_logging.StreamHandler):
            handler.setStream(stream)
