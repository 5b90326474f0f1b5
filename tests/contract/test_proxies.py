"""Calls inside the suite, and to this machine, take no proxy of the environment."""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from sealpush.transport import Channels, Endpoints
from sealpush.v1 import accounts_pb2, accounts_pb2_grpc
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.server import AddServicer
from sealpushd.up import health
from sealpushd.v1 import administration_pb2, administration_pb2_grpc
from tests.contract.harness import NOBODY, Mesh, Peer

SERVICES = Path(__file__).parents[2] / "services" / "sealpushd"


class Administration(administration_pb2_grpc.AdministrationServicer):
    async def GetApps(self, request: administration_pb2.GetAppsRequest, context: object) -> administration_pb2.GetAppsResponse:
        return administration_pb2.GetAppsResponse()


class Accounts(accounts_pb2_grpc.AccountsServicer):
    async def GetRevocations(self, request: accounts_pb2.GetRevocationsRequest, context: object) -> accounts_pb2.GetRevocationsResponse:
        return accounts_pb2.GetRevocationsResponse()


@pytest.fixture
async def peer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Peer]:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://{NOBODY}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    # Nothing else is called.
    servicers: list[AddServicer] = [
        (administration_pb2_grpc.add_AdministrationServicer_to_server, Administration()),  # type: ignore[abstract]
        (accounts_pb2_grpc.add_AccountsServicer_to_server, Accounts()),  # type: ignore[abstract]
    ]
    async with Peer(servicers) as peer:
        yield peer


async def test_the_environments_proxy_is_used_where_nothing_says_otherwise(peer: Peer) -> None:
    """What the other tests rest on."""
    async with grpc.aio.insecure_channel(peer.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await accounts_pb2_grpc.AccountsStub(channel).GetRevocations(accounts_pb2.GetRevocationsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_services_call_each_other_without_it(peer: Peer) -> None:
    channel = MeshChannel("accounts", peer.address, Mesh().keys["dispatch"])
    stub = administration_pb2_grpc.AdministrationStub(channel.channel)
    assert await channel.call(stub.GetApps, administration_pb2.GetAppsRequest()) == administration_pb2.GetAppsResponse()
    await channel.aclose()


async def test_the_supervisor_asks_for_health_without_it(peer: Peer) -> None:
    # This peer has no health service: that it says so is its answer.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.ask(peer.address, timeout_s=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_sdk_calls_this_machine_without_it(peer: Peer) -> None:
    for address in (peer.address, f"localhost:{peer.port}", f"ipv4:{peer.address}", f"dns:///localhost:{peer.port}"):
        async with Channels(Endpoints(address, address, address, address, address, insecure=True)) as channels:
            answer = await channels.accounts.GetRevocations(accounts_pb2.GetRevocationsRequest())
            assert answer == accounts_pb2.GetRevocationsResponse()


def test_no_channel_of_the_services_is_made_without_saying_so() -> None:
    made = [
        (path, call)
        for path in SERVICES.rglob("*.py")
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("insecure_channel", "secure_channel"))
    ]
    assert made
    for path, call in made:
        options = "".join(ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "options")
        assert "NO_PROXY" in options or "CHANNEL_OPTIONS" in options, f"{path}:{call.lineno}"
