"""A sender: sign in, publish (sealed by the server or here), learn what became of it, cancel.

Every publish form answers with a `PublishOutcome`; only what concerns the sender as a whole (wrong password, no right, a
recipient's keys that do not verify) is raised. Repeating a publish with the same request id is always safe.

Content sealed here is sealed once: what is sent again are the same bytes, also when the caller publishes again with the
same request id after `Unanswered` (the last 1024 of them are kept in this process; `prepare_sealed()` gives the bytes to a
sender that keeps them itself).
"""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

import grpc
from google.protobuf.duration_pb2 import Duration

from sealpush import envelope, errors
from sealpush.doubt import Doubts, Said, said_by_batch_failure, said_by_failure, said_by_result
from sealpush.errors import CallFailed, KeyRefused, ReceiptRefused
from sealpush.ids import (
    ContentId,
    MessageId,
    RecipientRef,
    RequestId,
    SenderId,
    check_id,
    uuid7,
    uuid_text,
)
from sealpush.keys import ContentSigningKey, RecipientDevice
from sealpush.model import (
    Reason,
    Recipient,
    State,
    StoppedDelivery,
    wire_time,
)
from sealpush.publication import (
    RETRYABLE_CODES,
    Cancelled,
    IdentityChanged,
    MessageStatus,
    NotRegistered,
    Outdated,
    Publication,
    PublishOptions,
    PublishOutcome,
    RecipientDevices,
    Refused,
    SealedPublication,
    Unanswered,
    known_device,
    not_approved,
    outcome_of,
    outcome_of_failure,
    outdated_refusal,
    receipt_of,
    recipient_device,
    settled,
    status_of,
)
from sealpush.receipts import Receipt
from sealpush.retry import Clock, Deadline, Random, RetryPolicy, SystemClock, jitter, retrying
from sealpush.suites import SUITE_X25519
from sealpush.transport import (
    Calls,
    Channels,
    Endpoints,
    Token,
    TokenHolder,
    UnaryMethod,
    call_failed,
    call_metadata,
    cancellation_kept,
)
from sealpush.v1 import accounts_pb2, keys_pb2, publish_pb2
from sealpush.v1.content_pb2 import Content

Answer = TypeVar("Answer")

BATCH_ITEMS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 2 * 1024 * 1024 - 64 * 1024  # the service's 2 MiB, less room for the frame around the items
BATCHES_IN_FLIGHT: Final = 4  # keeps the service busy while one answer travels
RESEALS_MAX: Final = 3  # a recipient whose devices change faster than this is reached by a later publish
SEALED_KEPT_MAX: Final = 1024  # sealed requests without an answer, kept for the caller's own retry
SUITES_KEPT_MAX: Final = 65_536  # devices above suite 1, 10 MB; a sender to more than these notices for the latest
LIFETIME_DEFAULT: Final = timedelta(days=14)
STREAM_FAILURES_MAX: Final = 8  # in a row, some 13 s: then whoever publishes should know
WATCH_SILENT_ENDS_MAX: Final = 3  # a service that restarts may end a watch before it said anything
STATUS_WAIT_MAX: Final = timedelta(seconds=8)

# What concerns the sender, not one message.
_RAISED: Final = (errors.Unauthenticated, errors.PermissionDenied)


class Sender:
    """Publishes as one sender of an organisation. Safe for many tasks of one event loop; close it, or use `async with`.

    `sender_name` "" is the organisation's default sender. `signing_key` is needed to seal here. `timeout_s` is how long a
    call may take altogether, retries included: rule V21's response timeout. Nothing is sealed here to a device that takes a lower
    suite than `min_suite`.
    """

    def __init__(
        self,
        endpoints: Endpoints | Channels,
        login: str,
        password: str,
        *,
        sender_name: str = "",
        signing_key: ContentSigningKey | None = None,
        min_suite: int = SUITE_X25519,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
        random: Random = jitter,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._own_channels = isinstance(endpoints, Endpoints)
        self._channels = Channels(endpoints) if isinstance(endpoints, Endpoints) else endpoints
        self._clock = clock or SystemClock()
        self._policy = policy or RetryPolicy()
        self._calls = Calls(self._clock, random, self._policy, timeout_s)
        self._random = random
        self._timeout_s = timeout_s
        self._sign_in_request = accounts_pb2.SignInRequest(login=login, password=password, sender_name=sender_name)
        self._signing_key = signing_key
        self._min_suite = min_suite
        self._floors = _Floors()
        self._token = TokenHolder(self._sign_in, self._clock)
        self._sender_id: SenderId | None = None
        self._doubts = Doubts()
        self._sealed: OrderedDict[RequestId, tuple[Publication, publish_pb2.PublishRequest]] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections, if they are this sender's own."""
        if self._own_channels:
            await self._channels.close()

    async def sign_in(self) -> SenderId:
        """The id of the sender that speaks here; signs in if that has not happened. Raises CallFailed."""
        if self._sender_id is None:
            deadline = self._deadline()
            await retrying(lambda: self._token.renew(deadline), deadline=deadline, policy=self._policy, random=self._random)
        if self._sender_id is None:
            raise AssertionError("unreachable: signing in sets it")
        return self._sender_id

    async def publish(self, recipient: Recipient | str, content: Content, **options: Unpack[PublishOptions]) -> PublishOutcome:
        """Publish one message to a recipient or phone number; the server seals it, so it sees it for a moment."""
        return await self.publish_one(Publication.of(recipient, content, **options))

    async def publish_one(self, publication: Publication) -> PublishOutcome:
        """As `publish()`."""
        outcome = await self._send(publication.to_plain(), self._deadline())
        if isinstance(outcome, Outdated):  # nothing was sealed here: not an answer to this request
            return outdated_refusal(outcome)
        return outcome

    async def publish_sealed(self, recipient: Recipient | str, content: Content, **options: Unpack[PublishOptions]) -> PublishOutcome:
        """Publish one message that only the recipient's devices can read; the server cannot.

        Refused with reason SUITE_TOO_LOW: a device takes a lower suite than this sender's `min_suite`. Raises KeyRefused when a device's
        key is not signed by that device or is weaker than those before, SuiteUnsupported when it needs a newer release.
        """
        publication = Publication.of(recipient, content, **options)
        deadline = self._deadline()
        try:
            for _ in range(RESEALS_MAX + 1):
                request = self._kept(publication)
                if request is None:
                    sealed = await self._seal(publication, deadline)
                    if not isinstance(sealed, publish_pb2.PublishRequest):
                        return self._doubts.weigh(sealed)
                    request = self._keep(publication, sealed)
                outcome = await self._send(request, deadline)
                if isinstance(outcome, Outdated) or (isinstance(outcome, Refused) and outcome.retry_after is None):
                    # Not stored, and never to be: publishing again seals anew.
                    self._sealed.pop(publication.request_id, None)
                if not isinstance(outcome, Outdated):
                    return outcome
        except CallFailed as error:
            if isinstance(error, _RAISED):
                raise
            # The keys were not given: nothing was published in this call.
            return self._doubts.weigh(outcome_of_failure(publication.request_id, error, ambiguous=False))
        return outdated_refusal(Outdated(publication.request_id))

    async def prepare_sealed(
        self, recipient: Recipient | str, content: Content, **options: Unpack[PublishOptions]
    ) -> SealedPublication | NotRegistered | Refused | IdentityChanged | Unanswered:
        """The sealed request without sending it, for a sender that keeps it over its own crashes. Raises as `publish_sealed()`.

        Unanswered: what was sealed under this request id before may be stored; publish that again to know.
        """
        publication = Publication.of(recipient, content, **options)
        sealed = await self._seal(publication, self._deadline())
        if isinstance(sealed, publish_pb2.PublishRequest):
            return SealedPublication(publication.request_id, sealed.SerializeToString(deterministic=True))
        return self._doubts.weigh(sealed)

    async def publish_prepared(self, sealed: SealedPublication) -> PublishOutcome:
        """Send what `prepare_sealed()` made; Refused with reason OUTDATED_DEVICES: prepare it again, with the same request id."""
        outcome = await self._send(publish_pb2.PublishRequest.FromString(sealed.data), self._deadline())
        return settled(outcome)

    async def recipient_devices(self, recipient: Recipient | str, app_id: str = "") -> RecipientDevices:
        """Which devices a recipient has, with fingerprints; uses up no one-time prekey. `app_id` "" is the sender's default app.

        Raises NotFound when nobody is registered (`server_reason` says why), InvalidRequest for a recipient that cannot be.
        """
        query = keys_pb2.RecipientKeysQuery(recipient=Recipient.of(recipient).to_wire(), app_id=app_id, devices_only=True)
        result = await self._recipient_keys(query, self._deadline())
        match result.WhichOneof("outcome"):
            case "keys":
                keys = result.keys
                return RecipientDevices(
                    RecipientRef(keys.recipient_ref),
                    keys.device_list_version,
                    wire_time(keys.identity_changed_at),
                    tuple(map(known_device, keys.devices)),
                )
            case "not_registered":
                reason = Reason(result.not_registered).name
                raise errors.NotFound("nobody is registered in this app by this recipient", code="NOT_FOUND", server_reason=reason)
        raise errors.InvalidRequest(result.refused, code="INVALID_ARGUMENT", server_reason="KEYS_REFUSED")

    async def publish_many(self, publications: Iterable[Publication]) -> list[PublishOutcome]:
        """Publish many messages in batches; an outcome each, in their order. Items that were only refused for now are repeated."""
        outcomes: list[PublishOutcome] = []
        in_flight: deque[asyncio.Task[list[PublishOutcome]]] = deque()
        try:
            for chunk in _chunks(publication.to_plain() for publication in publications):
                if len(in_flight) == BATCHES_IN_FLIGHT:
                    outcomes.extend(await in_flight.popleft())
                in_flight.append(asyncio.create_task(self._publish_batch(chunk)))
            while in_flight:
                outcomes.extend(await in_flight.popleft())
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        return outcomes

    async def publish_stream(self, publications: AsyncIterable[Publication]) -> AsyncGenerator[PublishOutcome, None]:
        """Publish an endless source over one stream; outcomes come as the service answers, each with its request id.

        Messages gather while a frame is being sent and then go together. When the stream breaks, what has no answer yet is sent
        again. Raises CallFailed when that has not helped for a while; what had no answer then is safe to publish again.
        """
        session = _StreamSession(self._calls, self._channels, self._token, self._doubts, publications)
        try:
            async with contextlib.aclosing(session.run()) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            await session.close()

    async def status(self, message_id: MessageId, wait: timedelta | None = None) -> MessageStatus:
        """How far a message has come. `wait` None: the true state now; 0: the assumed answer (V17); longer, up to 8 s: waits
        for a terminal state. Raises NotFound."""
        request = publish_pb2.GetStatusRequest(message_id=check_id(message_id, "message_id"))
        if wait is not None:
            if not timedelta(0) <= wait <= STATUS_WAIT_MAX:
                raise ValueError("wait must be 0 to 8 s; ask again for longer, or use watch()")
            request.wait.CopyFrom(_duration(wait))
        answer = await self._calls.call(self._channels.publishing.GetStatus, request, deadline=self._deadline(), token=self._token)
        return status_of(answer.status)

    async def receipt(self, message_id: MessageId) -> Receipt:
        """Evidence of a message, for `verify_receipt()` now or by anybody later; as long as statuses are kept. Raises NotFound, and
        ReceiptRefused for an answer that is none."""
        request = publish_pb2.GetReceiptRequest(message_id=check_id(message_id, "message_id"))
        answer = await self._calls.call(self._channels.publishing.GetReceipt, request, deadline=self._deadline(), token=self._token)
        try:
            return receipt_of(answer.receipt)
        except ValueError as error:
            raise ReceiptRefused(f"the service answered with a malformed receipt: {error}; upgrade this SDK, or report it") from None

    async def statuses(self, message_ids: Iterable[MessageId]) -> dict[MessageId, MessageStatus]:
        """How far messages have come; ones that are not this sender's, or too old, are left out."""
        found: dict[MessageId, MessageStatus] = {}
        ids = list(message_ids)
        for start in range(0, len(ids), BATCH_ITEMS_MAX):
            request = publish_pb2.GetStatusesRequest(message_ids=ids[start : start + BATCH_ITEMS_MAX])
            answer = await self._calls.call(self._channels.publishing.GetStatuses, request, deadline=self._deadline(), token=self._token)
            found.update((MessageId(each.message_id), status_of(each)) for each in answer.statuses)
        return found

    async def watch(self, message_ids: Iterable[MessageId]) -> AsyncGenerator[MessageStatus, None]:
        """The present status of each of up to 512 messages, then every change, until all are terminal. Reconnects by itself."""
        open_ids = set(message_ids)
        if len(open_ids) > BATCH_ITEMS_MAX:
            raise ValueError(f"at most {BATCH_ITEMS_MAX} messages a watch; make several")
        last: dict[MessageId, MessageStatus] = {}
        attempt = 0
        clean_ends = 0
        renewed = False
        while open_ids:
            pause_s: float | None = None
            bearer = ""
            try:
                bearer = await self._token.get(self._deadline())
                call = self._channels.publishing.WatchStatus(
                    publish_pb2.WatchStatusRequest(message_ids=sorted(open_ids)), metadata=call_metadata(bearer, uuid7().hex())
                )
                try:
                    async for frame in call:
                        attempt, renewed = 0, False
                        for each in map(status_of, frame.statuses):
                            if last.get(each.message_id) != each:
                                last[each.message_id] = each
                                yield each
                            if each.state.terminal:
                                open_ids.discard(each.message_id)
                        if not open_ids:
                            return
                finally:
                    call.cancel()
            except grpc.aio.AioRpcError as error:
                failure = call_failed(error)
                if isinstance(failure, errors.Unauthenticated) and not renewed:
                    renewed = True
                    self._token.drop(bearer)
                    continue
                if not failure.retryable:
                    raise failure from error
                pause_s = failure.retry_after_s
            except CallFailed as failure:
                if not failure.retryable:
                    raise
                pause_s = failure.retry_after_s
            else:
                clean_ends += 1
                if clean_ends >= WATCH_SILENT_ENDS_MAX:
                    open_ids &= last.keys()  # of the rest the service says nothing: not messages of this sender
            await self._clock.sleep(self._policy.delay_s(attempt, self._random, pause_s))
            attempt += 1

    async def cancel(self, message_id: MessageId) -> Cancelled:
        """Stop what has not arrived. Repeating it is safe. Raises NotFound."""
        request = publish_pb2.CancelRequest(message_id=check_id(message_id, "message_id"))
        answer = await self._calls.call(self._channels.publishing.Cancel, request, deadline=self._deadline(), token=self._token)
        return Cancelled(State(answer.state), tuple(map(StoppedDelivery.from_wire, answer.deliveries)))

    def _deadline(self) -> Deadline:
        return Deadline.after(self._clock, self._timeout_s)

    async def _sign_in(self, deadline: Deadline) -> Token:
        answer = await self._calls.once(self._channels.accounts.SignIn, self._sign_in_request, deadline=deadline)
        self._sender_id = SenderId(check_id(answer.sender_id, "sender_id"))
        lifetime_s = wire_time(answer.expires_at).timestamp() - self._clock.now_ms() / 1000
        return Token(answer.access_token, lifetime_s)

    async def _send(self, request: publish_pb2.PublishRequest, deadline: Deadline) -> PublishOutcome | Outdated:
        """Send one request, the same bytes each time."""
        request_id = RequestId(request.request_id)
        method = self._heard(self._channels.publishing.Publish, (request_id,), said_by_failure)
        try:
            answer = await self._calls.call(method, request, deadline=deadline, token=self._token)
        except CallFailed as error:
            if isinstance(error, _RAISED) and request_id not in self._doubts:
                raise
            return self._doubts.weigh(outcome_of_failure(request_id, error, ambiguous=True))
        self._doubts.hear((request_id,), said_by_result(answer.result))
        return self._doubts.weigh(outcome_of(request_id, answer.result))

    def _heard(
        self, method: UnaryMethod[Answer], request_ids: Sequence[RequestId], said_by: Callable[[CallFailed], Said]
    ) -> UnaryMethod[Answer]:
        """The method; what each of its failures says about these requests is noted."""

        async def heard(request: Any, /, *, timeout: float | None = None, metadata: Any = None) -> Answer:
            try:
                return await method(request, timeout=timeout, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                self._doubts.hear(request_ids, said_by(call_failed(error)))
                raise
            except asyncio.CancelledError:  # of the caller, who may publish again
                self._doubts.hear(request_ids, Said.NOTHING)
                raise

        return heard

    async def _publish_batch(self, requests: Sequence[publish_pb2.PublishRequest]) -> list[PublishOutcome]:
        """Outcomes of one batch; repeats what was refused for now while the deadline allows."""
        deadline = self._deadline()
        ids = [RequestId(each.request_id) for each in requests]
        outcomes: list[PublishOutcome] = [Unanswered(each, "UNAVAILABLE", "not sent") for each in ids]
        waiting = list(range(len(requests)))
        for attempt in range(self._policy.attempts_max):
            method = self._heard(self._channels.publishing.PublishBatch, [ids[index] for index in waiting], said_by_batch_failure)
            try:
                answer = await self._calls.call(
                    method,
                    publish_pb2.PublishBatchRequest(requests=[requests[index] for index in waiting]),
                    deadline=deadline,
                    token=self._token,
                )
            except CallFailed as error:
                if isinstance(error, _RAISED) and not any(ids[index] in self._doubts for index in waiting):
                    raise
                for index in waiting:
                    outcomes[index] = self._doubts.weigh(outcome_of_failure(ids[index], error, ambiguous=True))
                return outcomes
            again: list[int] = []
            pause_s = 0.0
            for position, index in enumerate(waiting):
                result = answer.results[position] if position < len(answer.results) else publish_pb2.PublishResult()
                outcomes[index] = _heard_outcome(self._doubts, ids[index], result)
                if result.refusal.code in RETRYABLE_CODES:
                    again.append(index)
                    pause_s = max(pause_s, result.refusal.retry_after.ToTimedelta().total_seconds())
            delay_s = self._policy.fitting_delay_s(attempt, deadline.remaining_s(), self._random, pause_s)
            if not again or delay_s is None:
                break
            waiting = again
            await self._clock.sleep(delay_s)
        return outcomes

    def _kept(self, publication: Publication) -> publish_pb2.PublishRequest | None:
        """What was sealed for this very publication before."""
        known = self._sealed.get(publication.request_id)
        return known[1] if known is not None and known[0] == publication else None

    def _keep(self, publication: Publication, request: publish_pb2.PublishRequest) -> publish_pb2.PublishRequest:
        self._sealed[publication.request_id] = (publication, request)
        while len(self._sealed) > SEALED_KEPT_MAX:
            self._sealed.popitem(last=False)
        return request

    async def _recipient_keys(self, query: keys_pb2.RecipientKeysQuery, deadline: Deadline) -> keys_pb2.RecipientKeysResult:
        answer = await self._calls.call(
            self._channels.keys.GetRecipientKeys,
            keys_pb2.GetRecipientKeysRequest(queries=[query]),
            deadline=deadline,
            token=self._token,
        )
        return answer.results[0] if answer.results else keys_pb2.RecipientKeysResult(refused="the key service gave no result")

    async def _seal(
        self, publication: Publication, deadline: Deadline
    ) -> publish_pb2.PublishRequest | NotRegistered | Refused | IdentityChanged:
        """The request with its content sealed to the recipient's devices of now."""
        if self._signing_key is None:
            raise ValueError("sealing needs a signing_key whose public half stands in the sender's entry")
        query = keys_pb2.RecipientKeysQuery(
            request_id=publication.request_id, recipient=publication.recipient.to_wire(), app_id=publication.app_id
        )
        result = await self._recipient_keys(query, deadline)
        if result.WhichOneof("outcome") == "not_registered":
            return NotRegistered(publication.request_id, Reason(result.not_registered))
        if result.WhichOneof("outcome") != "keys":
            return Refused(publication.request_id, "INVALID_ARGUMENT", "KEYS_REFUSED", result.refused)
        _check_keys(result.keys)
        foreign = not_approved(publication, result.keys.devices)
        if foreign is not None:
            return foreign
        now_ms = self._clock.now_ms()
        request = publication.to_wire()
        lifetime = publication.lifetime or LIFETIME_DEFAULT
        header = envelope.Header(
            content_id=ContentId(uuid7()),
            sender_id=await self.sign_in(),
            sender_key_id=self._signing_key.key_id,
            recipient_ref=RecipientRef(result.keys.recipient_ref),
            created_at_ms=now_ms,
            expires_at_ms=now_ms + lifetime // timedelta(milliseconds=1),
        )
        recipients = [self._recipient(recipient_device(each), now_ms) for each in result.keys.devices]
        weak = [uuid_text(each.device_id) for each in recipients if each.suite < self._min_suite]
        if weak:
            message = (
                f"this sender seals to suite {self._min_suite} or higher, which these devices do not take: {', '.join(weak)};"
                " have their apps upgraded, lower min_suite, or use another channel"
            )
            return Refused(publication.request_id, "FAILED_PRECONDITION", "SUITE_TOO_LOW", message)
        sealed = envelope.seal(request.plain.SerializeToString(), header, recipients, self._signing_key)
        request.sealed.envelope = sealed.encode()
        request.sealed.device_list_version = result.keys.device_list_version
        request.lifetime.FromTimedelta(lifetime)
        return request

    def _recipient(self, device: RecipientDevice, now_ms: int) -> envelope.Recipient:
        """Raises KeyRefused, SuiteUnsupported."""
        found = envelope.recipient(device, now_ms)
        self._floors.check(device)
        return found


def _heard_outcome(doubts: Doubts, request_id: RequestId, result: publish_pb2.PublishResult) -> PublishOutcome:
    """The outcome that one result of many says, with what is known of attempts before."""
    doubts.hear((request_id,), said_by_result(result))
    return doubts.weigh(settled(outcome_of(request_id, result)))


class _Floors:
    """The lowest suite that each device ever signed, as far as this process saw it: whoever kept an old key cannot bring it back."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()  # by identity key, the latest last; suite 1 is not worth a place

    def check(self, device: RecipientDevice) -> None:
        """Of a device whose prekey was verified. Raises KeyRefused for one that accepted no such suite any more."""
        identity = device.identity_public_key
        if device.min_suite < self._known.get(identity, SUITE_X25519):
            raise KeyRefused("the device has signed for a higher suite before; somebody brings back an old key: do not seal to it")
        if device.min_suite > SUITE_X25519:
            self._known[identity] = device.min_suite
            self._known.move_to_end(identity)
            if len(self._known) > SUITES_KEPT_MAX:
                self._known.popitem(last=False)


class _StreamSession:
    """One publish_stream(): a source, frames without an answer, and the stream of the moment."""

    FRAMES_WITHOUT_ANSWER_MAX: Final = 8  # 8 × 512 messages are enough to keep a service busy over a slow line

    def __init__(
        self,
        calls: Calls,
        channels: Channels,
        token: TokenHolder,
        doubts: Doubts,
        source: AsyncIterable[Publication],
    ) -> None:
        self._calls = calls
        self._channels = channels
        self._token = token
        self._doubts = doubts
        self._gathered: asyncio.Queue[publish_pb2.PublishRequest | None] = asyncio.Queue(BATCH_ITEMS_MAX)
        self._reader = asyncio.create_task(self._read_source(source), name="sealpush-publish-source")
        self._held: publish_pb2.PublishRequest | None = None  # taken from the source, did not fit its frame
        self._source_done = False
        self._frame = 0
        self._unanswered: OrderedDict[int, list[publish_pb2.PublishRequest]] = OrderedDict()
        self._room = asyncio.Event()

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read_source(self, source: AsyncIterable[Publication]) -> None:
        try:
            async for publication in source:
                await self._gathered.put(publication.to_plain())
        except Exception:
            await self._gathered.put(None)  # what came before the failure is published; run() raises it then
            raise
        await self._gathered.put(None)

    async def run(self) -> AsyncGenerator[PublishOutcome, None]:
        clock, policy = self._calls.clock, self._calls.policy
        attempt = 0
        while True:
            bearer = ""
            try:
                bearer = await self._token.get(Deadline.after(clock, self._calls.timeout_s))
                async with contextlib.aclosing(self._run_once(bearer)) as answered:
                    async for outcome in answered:
                        attempt = 0
                        yield outcome
                if self._source_done and not self._unanswered:
                    self._reader.result()  # the source's own error, if it failed
                    return
                failure: CallFailed = errors.Unavailable("the service ended the stream before it answered everything")
            except grpc.aio.AioRpcError as error:
                failure = call_failed(error)
                if isinstance(failure, errors.Unauthenticated):
                    self._token.drop(bearer)
                    if attempt:
                        raise failure from error
                elif not failure.retryable:
                    raise failure from error
                elif failure.code == "INTERNAL":
                    self._token.drop(bearer)  # the real status was lost in gRPC: it may have been about the token
            except CallFailed as error:
                if not error.retryable:
                    raise
                failure = error
            attempt += 1
            if attempt >= min(policy.attempts_max, STREAM_FAILURES_MAX):
                raise failure
            await clock.sleep(policy.delay_s(attempt - 1, self._calls.random, failure.retry_after_s))

    async def _run_once(self, bearer: str) -> AsyncGenerator[PublishOutcome, None]:
        call = self._channels.publishing.PublishStream(metadata=call_metadata(bearer, uuid7().hex()))
        writer = asyncio.create_task(self._write(call), name="sealpush-publish-frames")
        try:
            with cancellation_kept():
                async for answer in call:
                    frame = self._unanswered.pop(answer.frame, None)
                    self._room.set()
                    if frame is None:
                        continue
                    results = list(answer.results) + [publish_pb2.PublishResult()] * (len(frame) - len(answer.results))
                    # All before the first is given on: who reads may stop at any.
                    for outcome in [
                        _heard_outcome(self._doubts, RequestId(request.request_id), result)
                        for request, result in zip(frame, results, strict=False)
                    ]:
                        yield outcome
        finally:
            # However the stream ended: any of its frames may have been stored before.
            for requests in self._unanswered.values():
                self._doubts.hear([RequestId(each.request_id) for each in requests], Said.NOTHING)
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall[publish_pb2.PublishStreamRequest, publish_pb2.PublishStreamResponse]) -> None:
        for number, requests in list(self._unanswered.items()):
            await call.write(publish_pb2.PublishStreamRequest(frame=number, requests=requests))
        while not self._source_done:
            while len(self._unanswered) >= self.FRAMES_WITHOUT_ANSWER_MAX:
                self._room.clear()
                await self._room.wait()
            requests = await self._next_frame()
            if requests:
                self._frame += 1
                self._unanswered[self._frame] = requests
                await call.write(publish_pb2.PublishStreamRequest(frame=self._frame, requests=requests))
        await call.done_writing()

    async def _next_frame(self) -> list[publish_pb2.PublishRequest]:
        """What gathered while the frame before was being written, within the bounds of a frame; waits for one message."""
        requests: list[publish_pb2.PublishRequest] = []
        size = 0
        while len(requests) < BATCH_ITEMS_MAX:
            if self._held is not None:
                each: publish_pb2.PublishRequest | None = self._held
                self._held = None
            elif requests and self._gathered.empty():
                break
            else:
                each = await self._gathered.get()
            if each is None:
                self._source_done = True
                break
            size += each.ByteSize()
            if requests and size > BATCH_BYTES_MAX:
                self._held = each
                break
            requests.append(each)
        return requests


def _chunks(requests: Iterable[publish_pb2.PublishRequest]) -> Iterator[list[publish_pb2.PublishRequest]]:
    """Batches in order, each within the bounds of one."""
    chunk: list[publish_pb2.PublishRequest] = []
    size = 0
    for each in requests:
        each_bytes = each.ByteSize() + 8  # tag and length around an item
        if chunk and (len(chunk) == BATCH_ITEMS_MAX or size + each_bytes > BATCH_BYTES_MAX):
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size += each_bytes
    if chunk:
        yield chunk


def _check_keys(keys: keys_pb2.RecipientKeys) -> None:
    """Raises KeyRefused for an answer that nothing can be sealed by; what is signed in it is checked device by device."""
    if len(keys.recipient_ref) != 32 or len({each.device_id for each in keys.devices}) != len(keys.devices):
        raise KeyRefused("the key service's answer about the recipient is malformed; ask for the keys again, or report it")


def _duration(length: timedelta) -> Duration:
    duration = Duration()
    duration.FromTimedelta(length)
    return duration
