"""The services and simulators of one machine as children: which settings each gets, when they answer, in which order they end."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import grpc

from sealpushd.engines import Restarted
from sealpushd.engines.watch import Liveness
from sealpushd.platform.migrate import MAINTENANCE_ROLE
from sealpushd.up import health
from sealpushd.up.children import Child, stop_in_order
from sealpushd.up.ports import HOST, PUBLIC, SERVICES, Ports
from sealpushd.up.secrets import Secrets
from sealpushd.up.vendors import APNS_KEY_ID, APNS_TEAM_ID, FCM, HMS, Accounts

APP_ID: Final = "demo-bank"
# Enough for six Pythons to start on a machine that does something else as well.
READY_TIMEOUT_S: Final = 60.0
# Calls last at most 10 s, but here nobody is left who waits for their answers.
_DRAIN_S: Final = 2.0
_STOP_PATIENCE_S: Final = 6.0
# One machine: a service's few statements at a time go over these.
_CONNECTIONS: Final = 4
# Variables of ours that children may see; every other SEALPUSH_… is for somebody else.
_PASSED_ON: Final = ("SEALPUSH_TRACES",)
# First who takes work in, then who carries it on, then who keeps it.
_STOP_ORDER: Final = (("publishing", "accounts", "registration"), ("dispatch",), ("keys", "fetch"), ("simulators",))


def role_url(admin_url: str, role: str, password: str) -> str:
    """The same database as another role. Password: characters that need no quoting."""
    parts = urlsplit(admin_url)
    _, _, where = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{role}:{password}@{where}"))


def maintenance_url(admin_url: str, secrets: Secrets) -> str:
    return role_url(admin_url, MAINTENANCE_ROLE, secrets.role_passwords[MAINTENANCE_ROLE])


def environment(
    service: str, ports: Ports, secrets: Secrets, accounts: Accounts, postgres_url: str, valkey_url: str, log_level: str, process: int = 0
) -> dict[str, str]:
    """The settings of a process of a service, as environment. Each gets its own secrets and no other's."""
    certificate, private_key = secrets.certificate("services")
    own = {
        "SERVICE_KEY": secrets.service_key(service),
        "TRUST": secrets.trust,
        "POSTGRES_URL": role_url(postgres_url, f"{service}_app", secrets.role_passwords[f"{service}_app"]),
        "POSTGRES_CONNECTIONS": _CONNECTIONS,
        "VALKEY_URL": valkey_url,
        "VAULT_KEY": secrets.vault_key,
        "HOST": HOST,
        "MESH_PORT": ports.of(service, "mesh", process),
        "METRICS_PORT": ports.of(service, "metrics", process),
        "DRAIN_SECONDS": _DRAIN_S,
        "LOG_LEVEL": log_level,
    }
    own |= {f"{peer.upper()}_MESH": ports.target(peer, "mesh") for peer in SERVICES}
    if service in PUBLIC:
        own |= {"PUBLIC_PORT": ports.of(service, "public", process), "TLS_CERTIFICATE": certificate, "TLS_PRIVATE_KEY": private_key}
    if service == "registration":
        own |= {"CODE_CHANNEL": "simulated", "CODE_CHANNEL_ADDRESS": f"{HOST}:{ports.control}"}
    if service == "keys":
        own |= {"PLATFORM_KEY": secrets.platform_key}
    if service == "dispatch":
        own |= {
            "CREDENTIALS": accounts.folder,
            "APNS_PRODUCTION_URL": f"https://localhost:{ports.apns}",
            "APNS_SANDBOX_URL": f"https://localhost:{ports.apns}",
            "FCM_URL": f"https://localhost:{ports.fcm}",
            "HMS_URL": f"https://localhost:{ports.hms}",
            "HMS_TOKEN_URL": f"https://localhost:{ports.hms}/oauth2/v3/token",
            "PUSH_CA": secrets.ca,
            "TLS_CERTIFICATE": certificate,
            "TLS_PRIVATE_KEY": private_key,
        }
        if process == 0:  # the simulated Huawei knows one address
            own |= {"RECEIPTS_PORT": ports.receipts}
    return {**_inherited(os.environ), **{f"SEALPUSH_{name}": str(value) for name, value in own.items()}}


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("SEALPUSH_") or name in _PASSED_ON}


async def answers(address: str) -> None:
    """Return once the health service at an address says that it serves."""
    while True:
        try:
            if await health.ask(address, timeout_s=READY_TIMEOUT_S, wait=True) == "SERVING":
                return
        except grpc.aio.AioRpcError as e:
            if e.code() == grpc.StatusCode.UNIMPLEMENTED:
                # The simulators have no health service: that somebody answered is all there is to know.
                return
        await asyncio.sleep(0.05)


class Stack:
    """The running children by name."""

    def __init__(self, children: Mapping[str, Child]) -> None:
        self.children = children

    @property
    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self.children.items() if child.pid is not None}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        ports: Ports,
        secrets: Secrets,
        accounts: Accounts,
        postgres_url: str,
        valkey_url: str,
        log_folder: Path,
        log_level: str,
        restarted: Restarted,
    ) -> AsyncIterator[Stack]:
        """Starts all children at once; they need not answer yet, see `wait_ready`. Ends them in order at the end of the block."""

        def child(name: str, arguments: Sequence[str], settings: Mapping[str, str], address: str) -> Child:
            ready = functools.partial(answers, address)
            liveness = Liveness(functools.partial(health.answers_at_all, address))
            return Child(name, arguments, settings, log_folder / f"{name}.log", ready, liveness, restarted)

        python = ["-m", "sealpushd"]
        children: dict[str, Child] = {}
        certificate, private_key = secrets.certificate("simulators")
        simulators = [
            *(*python, "simulate", "all", "--control-port", str(ports.control)),
            *("--apns-port", str(ports.apns), "--fcm-port", str(ports.fcm), "--hms-port", str(ports.hms)),
            *("--certificate", str(certificate), "--private-key", str(private_key)),
            *("--provider-key", f"{APNS_TEAM_ID}:{APNS_KEY_ID}:{accounts.apns_public_key}"),
            *("--service-account", str(accounts.of(FCM)), "--client", str(accounts.of(HMS))),
            *("--receipt-url", f"https://localhost:{ports.receipts}/hms/{APP_ID}", "--receipt-ca", str(secrets.ca)),
        ]
        services: dict[str, list[Child]] = {service: [] for service in SERVICES}
        for process in range(ports.processes):
            for service in SERVICES:
                name = service if process == 0 else f"{service}-{process + 1}"
                settings = environment(service, ports, secrets, accounts, postgres_url, valkey_url, log_level, process)
                address = f"{HOST}:{ports.of(service, 'mesh', process)}"
                children[name] = child(name, [*python, "serve", service], settings, address)
                services[service].append(children[name])
        children["simulators"] = child("simulators", simulators, _inherited(os.environ), f"{HOST}:{ports.control}")
        try:
            await asyncio.gather(*(each.start() for each in children.values()))
            yield cls(children)
        finally:
            of = {**services, "simulators": [children["simulators"]]}
            await stop_in_order([[child for name in group for child in of[name]] for group in _STOP_ORDER], _STOP_PATIENCE_S)

    async def wait_ready(self) -> None:
        """Return once every child answers. Raises UpError with the last words of the one that does not."""
        waiting = [asyncio.ensure_future(child.wait_ready(READY_TIMEOUT_S)) for child in self.children.values()]
        try:
            await asyncio.gather(*waiting)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
