"""What publishing asks of the other services: each call takes items one by one and goes out in batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from sealpush.ids import MessageId, SenderId
from sealpush.keys import SenderEntry
from sealpush.v1 import publish_pb2
from sealpushd.platform.batching import BATCH_ITEMS_MAX
from sealpushd.platform.clients import BatchedCall, MeshChannel
from sealpushd.platform.errors import FailedPrecondition, Unavailable, from_refusal
from sealpushd.publishing.rules import Standing
from sealpushd.v1 import (
    administration_pb2,
    administration_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    mailbox_pb2,
    mailbox_pb2_grpc,
    sealing_pb2,
    sealing_pb2_grpc,
)

# How old a standing may be while accounts answers: what the root took back goes on for this long at the most.
STANDING_FRESH_S: Final = 30.0
# While accounts does not answer, one this old still serves: entries live for months, and an outage must not stop every sender.
STANDING_STALE_MAX_S: Final = 3600.0


class Peers:
    """The mesh as publishing sees it. Raises ServiceErrors, as `from_mesh` makes them."""

    def __init__(self, accounts: MeshChannel, registration: MeshChannel, keys: MeshChannel, fetch: MeshChannel) -> None:
        directory = directory_pb2_grpc.DirectoryStub(registration.channel)
        sealing = sealing_pb2_grpc.SealingStub(keys.channel)
        self.mailbox_channel = fetch
        self.mailbox = mailbox_pb2_grpc.MailboxStub(fetch.channel)
        self.lookup_accepted: BatchedCall[mailbox_pb2.AcceptedKey, mailbox_pb2.AcceptedResult] = BatchedCall(
            fetch,
            self.mailbox.LookupAccepted,
            lambda items: mailbox_pb2.LookupAcceptedRequest(keys=items),
            lambda answer: answer.results,
        )
        self.resolve: BatchedCall[directory_pb2.ResolveQuery, directory_pb2.ResolveResult] = BatchedCall(
            registration,
            directory.Resolve,
            lambda items: directory_pb2.ResolveRequest(queries=items),
            lambda answer: answer.results,
        )
        self.seal: BatchedCall[sealing_pb2.SealItem, sealing_pb2.SealResult] = BatchedCall(
            keys,
            sealing.Seal,
            lambda items: sealing_pb2.SealRequest(items=items),
            lambda answer: answer.results,
            # By the answer, which is larger than what is asked: a stanza of the largest suite has 1.2 kB.
            weigh=lambda item: 256 + len(item.content) + 1280 * len(item.device_ids),
        )
        self.check_stanzas: BatchedCall[sealing_pb2.StanzaCheck, sealing_pb2.StanzaVerdict] = BatchedCall(
            keys,
            sealing.CheckStanzas,
            lambda items: sealing_pb2.CheckStanzasRequest(checks=items),
            lambda answer: answer.verdicts,
            weigh=lambda item: 128 + 32 * len(item.stanzas) + 18 * len(item.device_ids),
        )
        self.store: BatchedCall[mailbox_pb2.NewMessage, mailbox_pb2.StoreResult] = BatchedCall(
            fetch,
            self.mailbox.Store,
            lambda items: mailbox_pb2.StoreRequest(messages=items, item_errors=True),
            lambda answer: [from_refusal(each.refused) if each.HasField("refused") else each for each in answer.results],
            # Stanzas that senders sealed may be ten times the usual 150 bytes.
            weigh=lambda item: 512 + len(item.tail) + sum(64 + len(each.stanza) for each in item.deliveries),
        )
        self._sealing = sealing
        self._keys = keys
        self._accounts = accounts
        self._administration = administration_pb2_grpc.AdministrationStub(accounts.channel)
        self._standings: dict[SenderId, tuple[Standing, float]] = {}

    async def standing(self, sender_id: SenderId) -> Standing:
        """What the root says of the sender, at most 30 s old while accounts answers. Raises FailedPrecondition without an entry."""
        kept = self._standings.get(sender_id)
        now = time.monotonic()
        if kept is not None and now - kept[1] < STANDING_FRESH_S:
            return kept[0]
        try:
            answer = await self._accounts.call(
                self._administration.GetSenders, administration_pb2.GetSendersRequest(sender_ids=[sender_id])
            )
        except Unavailable:
            if kept is not None and now - kept[1] < STANDING_STALE_MAX_S:
                return kept[0]
            raise
        # Forgotten first: a sender that was removed must not come back when accounts is away.
        self._standings.pop(sender_id, None)
        standing = _decode(answer.senders)
        self._standings[sender_id] = (standing, now)
        return standing

    async def evidence(self, sender_id: SenderId, message_id: MessageId) -> publish_pb2.Receipt | None:
        """The mailbox's part of a receipt; None: not a message of this sender, or too old."""
        request = mailbox_pb2.MailboxGetReceiptsRequest(sender_id=sender_id, message_ids=[message_id])
        answer = await self.mailbox_channel.call(self.mailbox.GetReceipts, request)
        return answer.receipts[0] if answer.receipts else None

    async def certifying_entries(self, header: bytes) -> administration_pb2.CertifyingEntries:
        """The entries that allowed an envelope with this header when it was made; empty where none is kept."""
        answer = await self._accounts.call(self._administration.FindEntries, administration_pb2.FindEntriesRequest(headers=[header]))
        result: administration_pb2.CertifyingEntries = answer.results[0]
        return result

    async def identities(self, device_ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Identity keys of devices, by id; unknown ones are left out."""
        found: dict[bytes, bytes] = {}
        for start in range(0, len(device_ids), BATCH_ITEMS_MAX):
            request = sealing_pb2.GetIdentitiesRequest(device_ids=device_ids[start : start + BATCH_ITEMS_MAX])
            answer = await self._keys.call(self._sealing.GetIdentities, request)
            found.update((each.device_id, each.identity_public_key) for each in answer.identities)
        return found


def _decode(senders: Sequence[administration_pb2.Sender]) -> Standing:
    # Accounts verified the root's signature when the entry was put; phones verify it again.
    try:
        if senders and senders[0].sender_entry:
            return Standing(
                entry=SenderEntry.decode_signed(senders[0].sender_entry),
                is_revoked=senders[0].is_entry_revoked,
                revoked_keys=frozenset(senders[0].revoked_keys),
                platform=SenderEntry.decode_signed(senders[0].platform_entry) if senders[0].platform_entry else None,
                is_platform_revoked=senders[0].is_platform_revoked,
            )
    except ValueError as e:
        raise FailedPrecondition("the sender's entry is malformed; ask the operator to certify a new one") from e
    raise FailedPrecondition("this sender has no entry or was removed; ask the operator")
