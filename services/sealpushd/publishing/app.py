"""Wires publishing."""

from __future__ import annotations

from sealpush.v1 import publish_pb2_grpc
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.publishing.acceptance import Acceptance
from sealpushd.publishing.peers import Peers
from sealpushd.publishing.service import PublishingServicer
from sealpushd.publishing.watching import StatusWatch


async def build(runtime: Runtime) -> ServiceApp:
    """The publishing service. Needs PostgreSQL for its vault keys, and accounts, registration, keys and fetch."""
    vault = await runtime.vault(await runtime.database())
    peers = Peers(runtime.channel("accounts"), runtime.channel("registration"), runtime.channel("keys"), runtime.channel("fetch"))
    watch = StatusWatch(peers)
    servicer = PublishingServicer(Acceptance(peers, vault, runtime.clock), watch, peers)
    return ServiceApp(public=[(publish_pb2_grpc.add_PublishingServicer_to_server, servicer)], tasks=[watch.tail], drain=watch.drain)
