"""What happens to one delivery, in this order: the security argument (`Receiver._check_and_commit`).

    parse and bounds → suite → times, by the server's clock → seen before? → sender entry, signed by the pinned root, and
    its mode → signature → open → store plaintext, record and acknowledgement in one transaction

Three ways out: *taken* (an acknowledgement DELIVERED is queued), *refused* (UNDELIVERED is queued, one reason whatever the
check), and *held* (nothing is queued, so the service keeps it: a clock that cannot be trusted yet, no answer about the
sender, a busy store). A crash at any point repeats a step: the store knows what was seen, and owes acknowledgements until
the service has answered them.

What is acknowledged is an envelope, named by its digest: another one under the content id of one that is here is refused, because
DELIVERED says that this very envelope was opened.
"""

import asyncio
import contextlib
from collections.abc import Callable

from sealpush.entries import SenderEntries
from sealpush.envelope import MAGIC, Envelope, Header, TimeCheck, check_times, open_envelope
from sealpush.errors import EnvelopeRefused, KeystoreBusy
from sealpush.floor import floor
from sealpush.ids import ContentId, MessageId, SenderId
from sealpush.inbox import FLAG_MUTED, Inbox, parse_content
from sealpush.keys import PrekeyKind, PrekeyPrivate
from sealpush.keystore import CommitOutcome, InboxMessage, Keystore, PendingAcknowledgement, Seen
from sealpush.local import EXPIRY_SKEW_MS, FUTURE_SKEW_MS, Held, ServerTime, Store, Trouble, Who
from sealpush.model import Reason
from sealpush.proofs import NO_DIGEST, AckOutcome
from sealpush.retry import Deadline
from sealpush.session import Session
from sealpush.suites import SUITES
from sealpush.v1 import messages_pb2


class Receiver:
    """Decides about deliveries, one at a time. `prekey_missed` hears of content that a sender signed and no private half here opens."""

    def __init__(
        self,
        session: Session,
        store: Store,
        who: Who,
        time: ServerTime,
        entries: SenderEntries,
        inbox: Inbox,
        trouble: Trouble,
        prekey_missed: Callable[[], None],
    ) -> None:
        self._session = session
        self._store = store
        self._who = who
        self._time = time
        self._entries = entries
        self._inbox = inbox
        self._trouble = trouble
        self._prekey_missed = prekey_missed
        self.deciding = asyncio.Lock()  # also taken by who erases the store

    async def take(self, delivery: messages_pb2.Delivery, deadline: Deadline) -> None:
        """Check, open and store one delivery, and queue what to acknowledge. What is new waits in the store to be handed over.

        Raises Held where that cannot be decided now, KeystoreError where the store fails.
        """
        try:
            async with self.deciding:
                try:
                    await self._check_and_commit(delivery, deadline)
                except EnvelopeRefused:
                    await self._refuse(delivery, Reason.DEVICE_CANNOT_OPEN)
                except KeystoreBusy as busy:
                    raise Held(str(busy)) from busy
        except Held as held:
            self._trouble.note(held)
            raise
        # Also of what was here before: a call that was cancelled while its thread went on to commit has told nobody.
        self._inbox.arrived()

    async def _check_and_commit(self, delivery: messages_pb2.Delivery, deadline: Deadline) -> None:
        _, registration = self._who.registered()
        # Parse and bounds, then the suite.
        if len(delivery.message_id) != 16:
            raise Held("a delivery without a message id cannot be acknowledged")
        envelope = Envelope.parse(delivery.envelope)
        header, digest = envelope.header, envelope.digest
        stanza = envelope.stanza_for(registration.device_id)
        min_suite, seen = await self._store(
            lambda keystore: (
                floor(keystore).min_suite(header.created_at_ms),
                keystore.seen(header.sender_id, header.content_id, digest),
            )
        )
        if stanza is None or stanza.suite not in SUITES or stanza.suite < min_suite:
            raise EnvelopeRefused
        # Times.
        if await self._is_over(header, deadline):
            await self._refuse(delivery, Reason.LIFETIME_OVER)
            return
        # Seen before?
        if seen is Seen.OTHER:
            raise EnvelopeRefused
        if seen is Seen.THIS:
            delivered = self._delivered(delivery, header, digest)
            await self._store(lambda keystore: keystore.queue_acknowledgement(delivered))
            return
        # The sender's entry and its mode.
        public_key = await self._entries.content_public_key(header, deadline)

        # Signature, open, store: without a pause between, in one thread.
        def open_and_commit(keystore: Keystore) -> None:
            def prekey(suite: int, prekey_id: int, kind: PrekeyKind) -> PrekeyPrivate | None:
                found = keystore.prekey(suite, prekey_id, kind)
                if found is None:
                    self._prekey_missed()
                return found

            plaintext = open_envelope(
                envelope,
                device_id=registration.device_id,
                private_prekey_lookup=prekey,
                sender_public_key=public_key,
                min_suite=min_suite,
            )
            self._time.prove(keystore, header.created_at_ms)
            message = self._inbox_message(delivery, header, digest, plaintext)
            result = keystore.commit_message(
                message,
                acknowledgement=self._delivered(delivery, header, digest),
                used_prekey=(stanza.suite, stanza.prekey_id, stanza.kind),
            )
            if result.outcome is CommitOutcome.CONFLICT:
                raise EnvelopeRefused

        await self._store(open_and_commit)

    async def _is_over(self, header: Header, deadline: Deadline) -> bool:
        """Whether the message's lifetime has ended. Raises Held when the time is not known, or it is from the future."""
        verdict = _check_times(header, self._time.now_ms())
        if verdict is not TimeCheck.OK:
            if not await self._session.resync(deadline):
                raise Held("the server's time is not known; the message waits")
            verdict = _check_times(header, self._time.now_ms())
        if verdict is TimeCheck.FROM_THE_FUTURE:
            raise Held("the message is from the future by the server's own time; it waits")
        return verdict is TimeCheck.EXPIRED

    def _inbox_message(self, delivery: messages_pb2.Delivery, header: Header, digest: bytes, plaintext: bytes) -> InboxMessage:
        """As stored. Raises EnvelopeRefused for a plaintext that is no content."""
        return InboxMessage(
            message_id=MessageId(delivery.message_id),
            content_id=header.content_id,
            envelope_digest=digest,
            sender_id=header.sender_id,
            created_at_ms=header.created_at_ms,
            expires_at_ms=header.expires_at_ms,
            received_at_ms=self._time.now_ms(),
            content=plaintext,
            replace_key=parse_content(plaintext).replace_key.encode() or None,
            flags=header.flags | (FLAG_MUTED if delivery.muted else 0),
        )

    def _delivered(self, delivery: messages_pb2.Delivery, header: Header, digest: bytes) -> PendingAcknowledgement:
        return PendingAcknowledgement(
            MessageId(delivery.message_id), header.content_id, digest, AckOutcome.DELIVERED, int(Reason.UNSPECIFIED), self._time.now_ms()
        )

    async def _refuse(self, delivery: messages_pb2.Delivery, reason: Reason) -> None:
        """Queue UNDELIVERED, unless the other process of this device opened the same envelope meanwhile."""
        sender_id, content_id, digest = _names_in(delivery.envelope)
        acknowledgement = PendingAcknowledgement(
            MessageId(delivery.message_id), content_id, digest, AckOutcome.UNDELIVERED, int(reason), self._time.now_ms()
        )
        await self._store(lambda keystore: keystore.queue_acknowledgement(acknowledgement, sender_id=sender_id))


def _check_times(header: Header, now_ms: int) -> TimeCheck:
    """As `check_times()`, with the bound that fits each side: how late a clock can be, and how early a sealer's."""
    if check_times(header, now_ms, FUTURE_SKEW_MS) is TimeCheck.FROM_THE_FUTURE:
        return TimeCheck.FROM_THE_FUTURE
    if check_times(header, now_ms, EXPIRY_SKEW_MS) is TimeCheck.EXPIRED:
        return TimeCheck.EXPIRED
    return TimeCheck.OK


def _names_in(envelope: bytes) -> tuple[SenderId | None, ContentId, bytes]:
    """Which sender and content an envelope speaks of, and its digest, as far as it can be read; zeros name nothing."""
    with contextlib.suppress(EnvelopeRefused):
        parsed = Envelope.parse(envelope)
        return parsed.header.sender_id, parsed.header.content_id, parsed.digest
    if envelope[:4] == MAGIC and len(envelope) >= 22:
        return None, ContentId(envelope[6:22]), NO_DIGEST  # where the header has it: names the message, proves nothing
    return None, ContentId(bytes(16)), NO_DIGEST
