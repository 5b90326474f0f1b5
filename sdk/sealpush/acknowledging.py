"""Acknowledgements: what the store says is owed, signed, sent, and forgotten once the service has answered.

They are queued in the transaction that commits or refuses a delivery. Signing happens when sending; the bytes do not change.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from sealpush import errors
from sealpush.keystore import PAGE_MAX, PendingAcknowledgement
from sealpush.local import Store, Trouble, Who
from sealpush.proofs import acknowledgement_proof, sign_proof
from sealpush.retry import Deadline
from sealpush.session import Session
from sealpush.v1 import common_pb2, messages_pb2

ACKS_BATCH_MAX: Final = 256  # the service's bound on a frame, and on deliveries without an acknowledgement

_FINAL_VERDICTS: Final = frozenset(
    {
        messages_pb2.ACK_VERDICT_ACCEPTED,
        messages_pb2.ACK_VERDICT_LATE,
        messages_pb2.ACK_VERDICT_UNKNOWN,
        messages_pb2.ACK_VERDICT_REFUSED,
    }
)


class Acknowledgements:
    """What this device owes the service."""

    def __init__(self, session: Session, store: Store, who: Who, trouble: Trouble) -> None:
        self._session = session
        self._store = store
        self._who = who
        self._trouble = trouble
        self._sending = asyncio.Lock()

    async def owed(self, limit: int = PAGE_MAX) -> list[PendingAcknowledgement]:
        """What the service has not answered, oldest first."""
        return await self._store(lambda keystore: keystore.pending_acknowledgements(limit))

    async def answered(self, acknowledgements: Sequence[PendingAcknowledgement]) -> None:
        """Forget what the service has answered."""
        await self._store(lambda keystore: keystore.confirm_acknowledgements(acknowledgements))

    async def send(self, deadline: Deadline) -> None:
        """Send what is owed until nothing is, or nothing moves. One call at a time: what is on its way is not sent again."""
        async with self._sending:
            while owed := await self.owed(ACKS_BATCH_MAX):
                answered = await self._send_batch(owed, deadline)
                if not answered:
                    return
                await self.answered(answered)

    async def _send_batch(self, owed: Sequence[PendingAcknowledgement], deadline: Deadline) -> list[PendingAcknowledgement]:
        """Those that were answered."""
        request = messages_pb2.AcknowledgeRequest(acknowledgements=map(self.signed, owed))
        try:
            answer = await self._session.call(self._session.channels.messages.Acknowledge, request, deadline)
        except errors.InvalidRequest as error:
            # One that the service cannot read must not stand in the way of the others: find it, and give it up.
            self._trouble.note(error)
            if len(owed) == 1:
                return list(owed)
            middle = len(owed) // 2
            return [*await self._send_batch(owed[:middle], deadline), *await self._send_batch(owed[middle:], deadline)]
        return [each for each, result in zip(owed, answer.results, strict=False) if is_final(result)]

    def signed(self, acknowledgement: PendingAcknowledgement) -> messages_pb2.Acknowledgement:
        """As protobuf, signed by this device."""
        identity, registration = self._who.registered()
        proof = acknowledgement_proof(
            acknowledgement.message_id,
            acknowledgement.content_id,
            acknowledgement.envelope_digest,
            registration.device_id,
            acknowledgement.outcome,
            acknowledgement.reason_code,
            acknowledgement.at_ms,
        )
        return messages_pb2.Acknowledgement(
            message_id=acknowledgement.message_id,
            content_id=acknowledgement.content_id,
            envelope_digest=acknowledgement.envelope_digest,
            outcome=messages_pb2.AckOutcome.ValueType(acknowledgement.outcome),
            reason_code=common_pb2.ReasonCode.ValueType(acknowledgement.reason_code),
            at_ms=acknowledgement.at_ms,
            signature=sign_proof(identity, proof),
        )


def is_final(result: messages_pb2.AckResult) -> bool:
    """Whether the service has judged it; what it did not judge stays owed."""
    return result.verdict in _FINAL_VERDICTS
