"""Wires dispatch."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Final

from sealpushd.dispatch.credentials import Credentials
from sealpushd.dispatch.lanes import LaneSet
from sealpushd.dispatch.makers import PushServices
from sealpushd.dispatch.service import LanesService, ProvidersService
from sealpushd.dispatch.session import Dispatcher
from sealpushd.dispatch.store import LaneStore
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.v1 import lanes_pb2_grpc, providers_pb2_grpc

# Of the time to drain, what sends may use; the rest is for the session's end and the listener.
DRAIN_SHARE: Final = 0.75


async def build(runtime: Runtime) -> ServiceApp:
    """The dispatch service: mesh Lanes and Providers, and the session with the mailbox; HTTPS for receipts. Needs PostgreSQL."""
    settings, clock, dice = runtime.settings, runtime.clock, random.Random().random  # noqa: S311 - jitter
    services = PushServices.of(settings)
    db = await runtime.database()
    store, vault = LaneStore(db), await runtime.vault(db)
    lanes = LaneSet(settings.push_concurrency, clock, dice)
    runtime.clock_watch.on_moved.append(lanes.clock_moved)
    credentials = Credentials(store, vault, lanes, services, settings.credentials, clock)
    runtime.closes.append(credentials.aclose)
    mailbox = runtime.channel("fetch")
    dispatcher = Dispatcher(
        lanes,
        mailbox,
        runtime.channel("registration"),
        clock,
        dice,
        drain_limit=DRAIN_SHARE * timedelta(seconds=settings.drain_seconds),
    )
    service = LanesService(lanes, store, credentials, mailbox, clock)
    await service.refresh()
    if settings.receipts_port is not None:
        # Only here: who takes no receipts needs no HTTP server.
        from sealpushd.dispatch.listener import listen

        runtime.closes.append((await listen(settings, lanes, credentials, clock)).aclose)
    return ServiceApp(
        mesh=[
            (lanes_pb2_grpc.add_LanesServicer_to_server, service),
            (providers_pb2_grpc.add_ProvidersServicer_to_server, ProvidersService(credentials)),
        ],
        tasks=[dispatcher.run, service.follow],
        drain=dispatcher.drain,
    )
