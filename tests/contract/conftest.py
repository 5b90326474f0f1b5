"""What contract tests share: real engines, migrated schemas, a mesh of trust, and services served in this process.

Tests that use the engines run in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from nacl.pwhash import argon2id
from redis.asyncio import Redis

from sealpush import transport
from sealpushd.engines import Engines
from sealpushd.engines import postgres as postgres_engine
from sealpushd.platform import clients
from sealpushd.platform import valkey as valkeys
from sealpushd.platform.db import connect
from sealpushd.platform.migrate import migrate
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated
from tests.contract.push_simulators import Certificates

PASSWORD = "a password of a test"


@pytest.fixture(autouse=True)
def _patient_with_valkey(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to Valkey is given up after a quarter of a second, and what was counted there is counted anew elsewhere: on a busy machine,
    limits and presence would sometimes not be what a test made them."""
    monkeypatch.setattr(valkeys, "TIMEOUT_S", LIMIT_S)


@pytest.fixture(scope="session", autouse=True)
def _channels_of_their_own() -> Iterator[None]:
    """gRPC shares connections between the channels of a process, and with them that nobody listens: to a new channel, a server that has
    got the port of one that was stopped a moment ago would seem away as well."""
    own = ("grpc.use_local_subchannel_pool", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "_OPTIONS", [*transport._OPTIONS, own])
        patch.setattr(clients, "CHANNEL_OPTIONS", [*clients.CHANNEL_OPTIONS, own])
        yield


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines() -> AsyncIterator[Engines]:
    """PostgreSQL and Valkey of this test run alone.

    PostgreSQL waits for no disk: nothing here outlives the run, and what is killed is a process, not the machine. That it does wait
    otherwise is for tests/system/test_engines.py.
    """
    # A short path: sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="sp-") as directory:
        async with AsyncExitStack() as stack:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(postgres_engine._SETTINGS, "fsync", "off")
                running = await stack.enter_async_context(Engines.open(Path(directory) / "data"))
            yield running


@pytest.fixture(scope="session")
def postgres(engines: Engines) -> str:
    """URL of the throw-away cluster, as its superuser."""
    return engines.postgres_dsn


@pytest_asyncio.fixture(loop_scope="session")
async def valkey_url(engines: Engines) -> str:
    """URL of an empty Valkey."""
    async with Redis.from_url(engines.valkey_url) as client:
        await client.flushall()
    return engines.valkey_url


@pytest.fixture(scope="session")
def migrated(postgres: str) -> Migrated:
    made = 0

    async def make(*services: str) -> dict[str, str]:
        nonlocal made
        made += 1
        name = f"contract_{made}"
        admin = await connect(postgres)
        try:
            await admin.execute(f'CREATE DATABASE "{name}"')
        finally:
            await admin.close()
        url = urlsplit(postgres)
        admin_url = url._replace(path=f"/{name}").geturl()
        await migrate(admin_url, {f"{service}_app": PASSWORD for service in services}, services)
        host = url.netloc.rpartition("@")[2]
        urls = {
            service: url._replace(netloc=f"{service}_app:{PASSWORD.replace(' ', '%20')}@{host}", path=f"/{name}").geturl()
            for service in services
        }
        return urls | {"admin": admin_url}

    return make


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return Mesh()


@pytest.fixture(scope="module")
def cheap_passwords() -> Iterator[None]:
    """Argon2id at its least, for modules that are not about guessing: 64 MiB for each sign-in would be half of their work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argon2id, "OPSLIMIT_INTERACTIVE", argon2id.OPSLIMIT_MIN)
        patch.setattr(argon2id, "MEMLIMIT_INTERACTIVE", argon2id.MEMLIMIT_MIN)
        yield


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of servers on localhost, and their authority."""
    return Certificates.make(tmp_path_factory.mktemp("tls"), ["localhost"])


@pytest.fixture(scope="session")
def other_certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The same, of an authority that nobody trusts."""
    return Certificates.make(tmp_path_factory.mktemp("other-tls"), ["localhost"])
