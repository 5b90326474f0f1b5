"""Wires the mailbox."""

from __future__ import annotations

from sealpush.v1 import messages_pb2_grpc
from sealpushd.fetch.leases import Leases
from sealpushd.fetch.mailbox import Mailbox
from sealpushd.fetch.queues import Queues
from sealpushd.fetch.service import MailboxServicer, MessagesServicer
from sealpushd.fetch.store import MailboxStore
from sealpushd.fetch.streams import StreamHub
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.v1 import mailbox_pb2_grpc


async def build(runtime: Runtime) -> ServiceApp:
    """The fetch service: public Messages, mesh Mailbox. Needs PostgreSQL and Valkey."""
    store = MailboxStore(await runtime.database())
    valkey = runtime.valkey()
    hub = StreamHub(valkey, store)
    leases = Leases(store, valkey)
    mailbox = Mailbox(store, hub, leases)
    queues = Queues(store, leases, runtime.clock)

    async def drain() -> None:
        await hub.drain()
        await leases.drain()
        await mailbox.journal.drain()

    return ServiceApp(
        public=[(messages_pb2_grpc.add_MessagesServicer_to_server, MessagesServicer(mailbox, hub))],
        mesh=[(mailbox_pb2_grpc.add_MailboxServicer_to_server, MailboxServicer(mailbox, store, leases, queues))],
        tasks=[hub.listen, hub.sweep, leases.listen, leases.heartbeat, mailbox.sweep, queues.watch],
        drain=drain,
    )
