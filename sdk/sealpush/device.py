"""A device: register, get messages, acknowledge them, keep its keys fresh.

What happens to a delivery, in this order, is the security argument (`Device._take`):

    parse and bounds → suite → times, by the server's clock → seen before? → sender entry, signed by the pinned root, and
    its mode → signature → open → store plaintext, record and acknowledgement in one transaction → acknowledge

Three ways out: *taken* (acknowledged DELIVERED), *refused* (acknowledged UNDELIVERED, one reason whatever the check), and
*held* (nothing is acknowledged, so the service keeps it: a clock that cannot be trusted yet, no answer about the sender,
a busy store). A crash at any point repeats a step: the store knows what was seen, and owes acknowledgements until the
service has answered them.

A message is handed to the app once: it is marked shown, then handed over. A crash between the two leaves it in `inbox()`.
"""

import asyncio
import base64
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush import errors
from sealpush.envelope import FLAG_SERVER_SEALED, MAGIC, Envelope, Header, TimeCheck, check_times, content_public_key, open_envelope
from sealpush.errors import CallFailed, EntryRefused, EnvelopeRefused, KeystoreBusy, NotRegisteredHere, SealpushError, StreamTakenOver
from sealpush.ids import AppId, ContentId, DeviceId, MessageId, RegistrationId, SenderId, SubscriberId, check_id, parse_uuid, uuid7
from sealpush.keys import (
    DAY_MS,
    ONE_TIME_PREKEYS_BATCH,
    ONE_TIME_PREKEYS_REFILL_BELOW,
    SIGNED_PREKEY_ROTATION_MS,
    SUITE_X25519,
    SUITES_SUPPORTED,
    EntryRole,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    SenderEntry,
    SignedPrekey,
    generate_prekey,
    prekey_proof,
    verify_sender_entry,
)
from sealpush.keystore import PAGE_MAX, DeviceRegistration, InboxMessage, Keystore, MemoryKeystore, PendingAcknowledgement
from sealpush.model import Platform, PushEnvironment, Reason, StoppedDelivery, moment, timestamp_ms, wire_time
from sealpush.proofs import (
    AckOutcome,
    acknowledgement_proof,
    body_digest,
    challenge_proof,
    change_proof,
    registration_proof,
    sign_proof,
)
from sealpush.retry import Clock, Deadline, Random, RetryPolicy, SystemClock, jitter
from sealpush.transport import Calls, Channels, Endpoints, Token, TokenHolder, UnaryMethod, call_failed, call_metadata
from sealpush.v1 import accounts_pb2, common_pb2, keys_pb2, messages_pb2, registration_pb2
from sealpush.v1.content_pb2 import Content

log = logging.getLogger("sealpush")

ACKS_BATCH_MAX: Final = 256  # the service's bound on a frame, and on deliveries without an acknowledgement
PAGE_SIZE: Final = 64  # with messages of 64 KiB a page still fits the service's 2 MiB twice over
# A sealer's clock may be 5 minutes off when the service accepts; a minute more for what travels.
FUTURE_SKEW_MS: Final = 6 * 60 * 1000
# The server's time is known to within a round trip; a message may be shown this long after its end.
EXPIRY_SKEW_MS: Final = 5_000
# A stream's frame can be late but never early, so it can only move the clock forward, unless the clock jumped.
CLOCK_JUMP_MS: Final = 60_000
CLOCK_PERSIST_MS: Final = 500  # smaller changes of the offset are not worth a write
RESYNC_PAUSE_S: Final = 10.0  # between two questions for the server's time
PROFILE_PAUSE_S: Final = 60.0  # between two questions about one sender whose present entry does not fit
PROFILE_DEADLINE_S: Final = 5.0  # messages of other senders wait behind it
PROFILE_FAILED_PAUSE_S: Final = 2.0  # after no answer about a sender: a page of messages must not wait for each
ENTRIES_KEPT_MAX: Final = 256  # senders whose entry is kept parsed; more start over
CALL_DEADLINE_S: Final = 30.0
WAKE_UP_DEADLINE_S: Final = 25.0  # a notification extension has about 30 s
# Kept for marking what is handed over, once the time for fetching is over.
HAND_OVER_S: Final = 1.0
MAINTENANCE_S_MIN: Final = 2.0  # not begun with less time than this
MAINTENANCE_ON_WAKE_S: Final = 3.0  # new messages wait for it, once a day
MAINTENANCE_PERIOD_MS: Final = DAY_MS
HOUSEKEEPING_S: Final = 3600.0
ONE_TIME_PRIVATE_MAX: Final = 1000  # stop making more when uploads keep failing
CHANGE_ATTEMPTS_MAX: Final = 6
STREAM_QUEUE_MAX: Final = 256

FLAG_MUTED: Final = 1 << 8  # in the store's flags, above the envelope's own eight bits
_PLATFORM_ENTRY: Final = SenderId(bytes(16))  # there is one platform: its entry is cached under this name

_REGISTRATION_ID: Final = "registration.id"
_DEVICE_ID: Final = "device.id"
_UPLOADED_PREKEY: Final = "prekey.uploaded"
_MAINTAINED_AT: Final = "maintained.at"

Result = TypeVar("Result")
OnMessage = Callable[["Message"], Awaitable[None] | None]


class SealedBy(Enum):
    """Who sealed a message. The server saw the content of what it sealed."""

    SENDER = "sender"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Message:
    """An opened message. The content never appears in a repr.

    `content` of a higher version than this release knows holds class, title and body only. `is_new`: handed over for the
    first time. `replaces`: messages that this one took the place of; take their notifications away. `muted`: show no
    notification.
    """

    message_id: MessageId
    sender_id: SenderId
    sender_name: str
    sealed_by: SealedBy
    content: Content = field(repr=False)
    muted: bool
    created_at: datetime
    expires_at: datetime
    received_at: datetime
    is_new: bool
    replaces: tuple[MessageId, ...] = ()
    read_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Installation:
    """What the service may know of this app instance. None stays as it is; an empty `push_token` removes the token."""

    push_token: str | None = field(default=None, repr=False)
    push_environment: PushEnvironment = PushEnvironment.UNSPECIFIED
    push_topic: str = ""
    push_allowed_by_os: bool | None = None
    push_allowed_by_app: bool | None = None
    is_primary: bool | None = None
    app_version: str | None = None
    locale: str | None = None
    subscriptions: Sequence[str] | None = None

    def to_wire(self, platform: Platform) -> registration_pb2.Installation:
        """As protobuf."""
        return registration_pb2.Installation(
            platform=common_pb2.Platform.ValueType(platform),
            push_token=self.push_token,
            push_environment=common_pb2.PushEnvironment.ValueType(self.push_environment),
            push_topic=self.push_topic,
            push_allowed_by_os=self.push_allowed_by_os,
            push_allowed_by_app=self.push_allowed_by_app,
            is_primary=self.is_primary,
            app_version=self.app_version,
            locale=self.locale,
            subscriptions=None if self.subscriptions is None else registration_pb2.Subscriptions(names=self.subscriptions),
        )


@dataclass(frozen=True, slots=True)
class RegistrationStarted:
    """A one-time code is on its way."""

    code_length: int
    expires_at: datetime
    resend_at: datetime


@dataclass(frozen=True, slots=True)
class Preference:
    """What the recipient decided about one sender, on all devices."""

    sender_id: SenderId
    block_all: bool = False
    block_advertising: bool = False
    mute: bool = False


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What works and what does not, for support; holds no secrets.

    `reach` says per service "ok" or why not. `acknowledgements_waiting` stops counting at 500.
    """

    registered: bool
    device_id: DeviceId | None
    app_id: AppId
    authenticated: bool
    reach: Mapping[str, str]
    clock_offset_ms: int | None
    acknowledgements_waiting: int
    deliveries_held: int
    signed_prekey_age_ms: int | None
    one_time_prekeys: int
    last_error: str


@dataclass(frozen=True, slots=True)
class _New:
    """A message that was committed just now, with what it replaced."""

    stored: InboxMessage
    replaces: tuple[MessageId, ...]


class _Held(Exception):
    """Not now: nothing is acknowledged, the service keeps the delivery."""


class Device:
    """One registered app instance. Safe for many tasks of one event loop, and for two processes over one SqliteKeystore.

    `endpoints` may be a `Channels` shared by many devices; then whoever made it closes it. `root_public_key` is the
    platform's root that the app ships; it is pinned in the keystore. `on_message` gets each message that `run_stream()`
    brings. `one_time_prekeys` is how many to keep at the service; 0: only signed prekeys, no forward secrecy within a week.
    """

    def __init__(
        self,
        app_id: str,
        endpoints: Endpoints | Channels,
        keystore: Keystore,
        *,
        root_public_key: bytes,
        platform: Platform,
        on_message: OnMessage | None = None,
        one_time_prekeys: int = ONE_TIME_PREKEYS_BATCH,
        clock: Clock | None = None,
        random: Random = jitter,
        policy: RetryPolicy | None = None,
    ) -> None:
        if not 0 <= one_time_prekeys <= ONE_TIME_PREKEYS_BATCH:
            raise ValueError(f"one_time_prekeys must be 0 to {ONE_TIME_PREKEYS_BATCH}")
        self.app_id = AppId(app_id)
        self._own_channels = isinstance(endpoints, Endpoints)
        self._channels = Channels(endpoints) if isinstance(endpoints, Endpoints) else endpoints
        self._keystore = keystore
        self._inline = isinstance(keystore, MemoryKeystore)
        self._root_public_key = root_public_key
        self._platform = platform
        self._on_message = on_message
        self._one_time_prekeys = one_time_prekeys
        self._clock = clock or SystemClock()
        self._random = random
        self._policy = policy or RetryPolicy()
        self._calls = Calls(self._clock, random, self._policy)
        self._token = TokenHolder(self._authenticate, self._clock)
        self._prepared = False
        self._identity: IdentityKey | None = None
        self._registration: DeviceRegistration | None = None
        self._offset_ms: int | None = None
        self._synced_at: float | None = None  # monotonic; None: not in this process
        self._asked_time_at: float | None = None
        self._maintained_at_ms = 0
        # Something may have been committed without being handed over: at the start, and after an interruption.
        self._unshown = True
        self._entries: dict[tuple[SenderId, EntryRole], SenderEntry] = {}
        self._names: dict[SenderId, str] = {}
        self._profile_asked_at: dict[SenderId, float] = {}
        self._profile_failed_at: float | None = None
        self._held: dict[MessageId, messages_pb2.Delivery] = {}
        self._taking = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._acknowledging = asyncio.Lock()
        # Wake-ups that came, and up to which of them a drain that began later has gone through.
        self._draining = asyncio.Lock()
        self._wake_ups = 0
        self._wake_ups_drained = 0
        self._last_error = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections, if they are this device's own. The keystore stays open: its owner closes it."""
        if self._own_channels:
            await self._channels.close()

    # --- registration ---

    async def registration(self) -> DeviceRegistration | None:
        """Who this device is to the service, or None."""
        await self._prepare()
        return self._registration

    async def start_registration(self, phone: str, *, locale: str = "") -> RegistrationStarted:
        """Have a one-time code sent to the number. Raises Overloaded when another one may be asked for later only."""
        await self._prepare()
        request = registration_pb2.StartRegistrationRequest(app_id=self.app_id, phone=phone, locale=locale)
        sent_ms = self._clock.now_ms()
        # Each call sends a code: a lost answer is for the person to repeat, who sees whether one came.
        answer = await self._calls.once(self._channels.registration.StartRegistration, request, deadline=self._deadline())
        if answer.HasField("server_time"):
            await self._set_time(answer.server_time, sent_ms)
        await self._store(self._keystore.set_fact, _REGISTRATION_ID, check_id(answer.registration_id, "registration_id"))
        return RegistrationStarted(answer.code_length, wire_time(answer.expires_at), wire_time(answer.resend_at))

    async def confirm(self, code: str, installation: Installation | None = None) -> DeviceRegistration:
        """Prove the number by the code and become a recipient.

        Call it again after a lost answer, also in a new process: identity, device id and prekey are stored before the
        first call and stay the same. Raises WrongCode, FailedPrecondition (start again), NotRegisteredHere (never started).
        """
        await self._prepare()
        registration_id = await self._store(self._keystore.fact, _REGISTRATION_ID)
        if registration_id is None:
            raise NotRegisteredHere("no registration was started here; call start_registration() first")
        identity = self._identity = await self._store(self._keystore.create_identity)
        for last in (False, True):
            device_id = await self._own_device_id()
            prekey = await self._store(self._first_signed_prekey, identity, device_id)
            request = registration_pb2.ConfirmRegistrationRequest(
                registration_id=registration_id,
                code=code,
                device_id=device_id,
                identity_public_key=identity.public_key,
                signed_prekey=_wire_prekey(_sign_prekey(identity, device_id, prekey)),
                installation=(installation or Installation()).to_wire(self._platform),
                proof=sign_proof(identity, registration_proof(RegistrationId(registration_id), identity.public_key, self.app_id)),
            )
            sent_ms = self._clock.now_ms()
            try:
                answer = await self._calls.call(self._channels.registration.ConfirmRegistration, request, deadline=self._deadline())
                break
            except errors.AlreadyExists:
                if last:
                    raise
                # The id belongs to an identity that is not here any more (a store that was partly restored).
                await self._store(self._keystore.set_fact, _DEVICE_ID, uuid7(self._clock.now_ms()))
        if answer.HasField("server_time"):
            await self._set_time(answer.server_time, sent_ms)
        registration = DeviceRegistration(
            device_id, SubscriberId(check_id(answer.subscriber_id, "subscriber_id")), self.app_id, self._now_ms()
        )
        await self._store(self._keystore.set_fact, _UPLOADED_PREKEY, prekey.prekey_id.to_bytes(4, "big"))
        await self._store(self._keystore.set_registration, registration)
        await self._store(self._keystore.set_fact, _REGISTRATION_ID, None)
        self._registration = registration
        return registration

    async def update_installation(self, installation: Installation) -> None:
        """Tell the service what changed: a new push token, a permission, and the like. Repeating it is safe."""
        change = installation.to_wire(self._platform).SerializeToString()
        await self._change(
            "/sealpush.v1.Registration/UpdateInstallation",
            self._channels.registration.UpdateInstallation,
            lambda proof: registration_pb2.UpdateInstallationRequest(change=change, proof=proof),
            change,
        )

    async def unregister(self) -> None:
        """End this installation and forget everything that is kept here, also if it had ended already."""
        try:
            await self._change(
                "/sealpush.v1.Registration/Unregister",
                self._channels.registration.Unregister,
                lambda proof: registration_pb2.UnregisterRequest(proof=proof),
                b"",
            )
        except errors.Unauthenticated:
            log.info("the installation had ended before")
        async with self._taking:
            await self._store(self._keystore.erase)
            self._prepared = False
            self._identity = self._registration = None
            self._entries.clear()
            self._names.clear()
            self._held.clear()
            self._token = TokenHolder(self._authenticate, self._clock)

    async def preferences(self) -> list[Preference]:
        """What the recipient decided about senders."""
        await self._registered()
        found: list[Preference] = []
        request = registration_pb2.ListPreferencesRequest()
        while True:
            answer = await self._call(self._channels.registration.ListPreferences, request, self._deadline())
            found.extend(
                Preference(SenderId(each.sender_id), each.block_all, each.block_advertising, each.mute) for each in answer.preferences
            )
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    async def set_preference(
        self, sender_id: SenderId, *, block_all: bool | None = None, block_advertising: bool | None = None, mute: bool | None = None
    ) -> list[StoppedDelivery]:
        """Decide about a sender, for all of the recipient's devices; None keeps what was decided before.

        Answers with the waiting deliveries that this ended, at most 1000 of them.
        """
        check_id(sender_id, "sender_id")
        known = Preference(sender_id)
        if None in (block_all, block_advertising, mute):
            known = next((each for each in await self.preferences() if each.sender_id == sender_id), known)
        change = registration_pb2.Preference(
            sender_id=sender_id,
            block_all=known.block_all if block_all is None else block_all,
            block_advertising=known.block_advertising if block_advertising is None else block_advertising,
            mute=known.mute if mute is None else mute,
        ).SerializeToString()
        answer = await self._change(
            "/sealpush.v1.Registration/SetPreference",
            self._channels.registration.SetPreference,
            lambda proof: registration_pb2.SetPreferenceRequest(change=change, proof=proof),
            change,
        )
        return [StoppedDelivery.from_wire(each) for each in answer.stopped]

    # --- messages ---

    async def on_wake(self, wake_up_id: bytes | str | None = None, deadline: float = WAKE_UP_DEADLINE_S) -> list[Message]:
        """What a push woke the app for, and everything else that waits. New messages only.

        `wake_up_id` is as pushed: 16 bytes, their base64url text, or None; what it names does not wait behind a long
        backlog. Wake-ups that come while one is worked on share the drain after it: a message is returned by one of them.
        Returns within `deadline` seconds with what it has by then; the rest comes with the next call. An unreachable
        service is no error here (`diagnose()` tells); a device that is not registered is.
        """
        whole = Deadline.after(self._clock, deadline)
        fetching = Deadline(self._clock, whole.at - min(HAND_OVER_S, deadline / 5))
        taken: dict[MessageId, _New] = {}
        try:
            async with asyncio.timeout(fetching.remaining_s()):
                await self._registered()
                await self._drain_for_wake_up(_wake_up_id(wake_up_id), taken, fetching)
                await self._maintain_if_due(fetching, MAINTENANCE_ON_WAKE_S)
        except (TimeoutError, errors.Unavailable, errors.Overloaded, errors.DeadlineExceeded, errors.ServerFault, KeystoreBusy) as error:
            self._unshown = True
            self._note(error)
        except BaseException:
            self._unshown = True
            raise
        shown: list[Message] = []
        with contextlib.suppress(TimeoutError, KeystoreBusy):
            async with asyncio.timeout(whole.remaining_s()):
                await self._show(taken.values(), shown)
        return shown

    async def drain(self, deadline: float = 60.0) -> list[Message]:
        """Everything that waits; returns the new messages, oldest first. Raises CallFailed; what came by then comes next time."""
        await self._registered()
        taken: dict[MessageId, _New] = {}
        try:
            limit = Deadline.after(self._clock, deadline)
            await self._drain(taken, limit)
            await self._maintain_if_due(limit, CALL_DEADLINE_S)
        except BaseException:
            self._unshown = True
            raise
        shown: list[Message] = []
        await self._show(taken.values(), shown)
        return shown

    @contextlib.asynccontextmanager
    async def stream(self, *, retake: bool = False) -> AsyncIterator["MessageStream"]:
        """Messages as they come, while the block lasts: `async with device.stream() as messages: async for message in messages`.

        Reconnects by itself. With `retake` it takes over from another stream of this device instead of giving way.
        """
        await self._registered()
        queue: asyncio.Queue[_New | BaseException] = asyncio.Queue(STREAM_QUEUE_MAX)
        caught_up = asyncio.Event()

        async def run() -> None:
            try:
                await self._stream(queue.put, caught_up, retake=retake)
            except Exception as error:
                await queue.put(error)

        task = asyncio.create_task(run(), name="sealpush-stream")
        try:
            yield MessageStream(self, queue, caught_up)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not queue.empty():
                self._unshown = True

    async def run_stream(self, *, retake: bool = False) -> None:
        """Hand each message to `on_message` as it comes, until cancelled. Reconnects by itself.

        Raises StreamTakenOver when another stream of this device took over, unless `retake`; Unauthenticated when the
        installation has ended. What `on_message` raises is logged, without content, and does not end the stream.
        """
        await self._registered()

        async def hand_over(new: _New) -> None:
            shown: list[Message] = []
            await self._show([new], shown)
            for message in shown:
                await self._tell(message)

        await self._stream(hand_over, asyncio.Event(), retake=retake)

    async def inbox(self, *, limit: int = PAGE_MAX) -> list[Message]:
        """Messages kept here, newest first, without those whose lifetime is over."""
        await self._prepare()
        now_ms = self._now_ms()
        stored = await self._store(lambda: self._keystore.inbox(limit=limit))
        return [await self._message(each, ()) for each in stored if now_ms < each.expires_at_ms]

    async def mark_read(self, message_id: MessageId) -> bool:
        """Note that the user read a message; the sender learns it with the next acknowledgements. False if it was before."""
        await self._prepare()
        now_ms = self._now_ms()
        return await self._store(lambda: self._keystore.mark_read(message_id, now_ms, acknowledge=True))

    async def delete(self, message_id: MessageId) -> bool:
        """Delete a message from the inbox; it does not come back."""
        await self._prepare()
        return await self._store(self._keystore.delete_message, message_id)

    # --- upkeep ---

    async def maintain(self) -> None:
        """What is due daily: a new signed prekey every 7 days, more one-time prekeys, and forgetting what has run out.

        `drain()`, `on_wake()` and streams do it by themselves when it is due; calling it more often is harmless.
        """
        await self._registered()
        await self._maintain(self._deadline())

    async def diagnose(self, deadline: float = 5.0) -> Diagnosis:
        """What works and what does not, found out by harmless calls within `deadline` seconds. Raises KeystoreError only."""
        await self._prepare()
        limit = Deadline.after(self._clock, deadline)
        device_id = self._registration.device_id if self._registration else DeviceId(bytes(16))
        challenge = registration_pb2.GetChallengeRequest(device_id=device_id)
        profile = accounts_pb2.GetSenderProfileRequest(sender_id=_PLATFORM_ENTRY)
        reach = dict(
            zip(
                ("accounts", "registration", "keys", "messages"),
                await asyncio.gather(
                    self._reach(self._channels.accounts.GetSenderProfile, profile, limit),
                    self._reach(self._channels.registration.GetChallenge, challenge, limit),
                    self._reach(self._channels.keys.GetPrekeyState, keys_pb2.GetPrekeyStateRequest(), limit),
                    self._reach(self._channels.messages.Acknowledge, messages_pb2.AcknowledgeRequest(), limit),
                ),
                strict=True,
            )
        )
        authenticated = False
        if self._registration is not None:
            with contextlib.suppress(CallFailed):
                authenticated = bool(await self._token.get(limit))
        signed = await self._store(self._keystore.newest_signed_prekey)
        return Diagnosis(
            registered=self._registration is not None,
            device_id=self._registration.device_id if self._registration else None,
            app_id=self.app_id,
            authenticated=authenticated,
            reach=reach,
            clock_offset_ms=self._offset_ms,
            acknowledgements_waiting=len(await self._store(self._keystore.pending_acknowledgements)),
            deliveries_held=len(self._held),
            signed_prekey_age_ms=None if signed is None else self._now_ms() - signed.created_at_ms,
            one_time_prekeys=await self._store(self._keystore.prekey_count, PrekeyKind.ONE_TIME),
            last_error=self._last_error,
        )

    async def _reach(self, method: UnaryMethod[Any], request: Any, limit: Deadline) -> str:
        """Whether a service answers at all: a refusal is an answer."""
        try:
            await self._calls.once(method, request, deadline=limit)
        except (errors.Unavailable, errors.DeadlineExceeded, errors.ServerFault) as error:
            return f"{error.code}: {error}"
        except CallFailed:
            return "ok"
        return "ok"

    # --- the store, the clock, the token ---

    async def _store(self, call: Callable[..., Result], *arguments: object) -> Result:
        """A keystore call: at once where it is memory, in a thread where it is a file."""
        if self._inline:
            return call(*arguments)
        return await asyncio.to_thread(call, *arguments)

    async def _prepare(self) -> None:
        """Pin the root and read what is kept, once."""
        if self._prepared:
            return

        def read() -> tuple[IdentityKey | None, DeviceRegistration | None, int | None, bytes | None]:
            self._keystore.pin_root(self._root_public_key)
            return (
                self._keystore.identity(),
                self._keystore.registration(),
                self._keystore.clock_offset_ms(),
                self._keystore.fact(_MAINTAINED_AT),
            )

        self._identity, self._registration, self._offset_ms, maintained_at = await self._store(read)
        self._maintained_at_ms = int.from_bytes(maintained_at or b"", "big")
        self._prepared = True

    async def _registered(self) -> tuple[IdentityKey, DeviceRegistration]:
        await self._prepare()
        return self._who()

    def _who(self) -> tuple[IdentityKey, DeviceRegistration]:
        if self._identity is None or self._registration is None:
            raise NotRegisteredHere("this device is not registered; call start_registration() and confirm()")
        return self._identity, self._registration

    def _deadline(self) -> Deadline:
        return Deadline.after(self._clock, CALL_DEADLINE_S)

    def _note(self, error: BaseException) -> None:
        """Keep what went wrong for diagnose(). Errors of this package hold no secrets; of others only the kind is kept."""
        self._last_error = f"{type(error).__name__}: {error}" if isinstance(error, SealpushError | _Held) else type(error).__name__

    def _now_ms(self) -> int:
        """The server's time as known here."""
        return self._clock.now_ms() + (self._offset_ms or 0)

    async def _set_time(self, server_time: Timestamp, sent_ms: int | None = None) -> None:
        """Learn from a server's time that arrived just now. `sent_ms`: when its request left, by the local clock."""
        server_ms = timestamp_ms(server_time)
        if server_ms <= 0:
            return
        received_ms = self._clock.now_ms()
        known_ms = self._offset_ms
        if sent_ms is not None and sent_ms <= received_ms:
            offset_ms = server_ms - (sent_ms + received_ms) // 2
        else:
            offset_ms = server_ms - received_ms
            if known_ms is not None and known_ms - CLOCK_JUMP_MS < offset_ms <= known_ms:
                offset_ms = known_ms
        self._synced_at = self._clock.monotonic()
        if known_ms is None or abs(offset_ms - known_ms) >= CLOCK_PERSIST_MS:
            self._offset_ms = offset_ms
            await self._store(self._keystore.set_clock_offset_ms, offset_ms)

    async def _resync(self, deadline: Deadline) -> bool:
        """Ask for the server's time, by a new token; whether it is known now. Not more often than every few seconds."""
        now = self._clock.monotonic()
        if self._asked_time_at is not None and now - self._asked_time_at < RESYNC_PAUSE_S:
            return self._synced_at is not None and self._synced_at >= self._asked_time_at
        self._asked_time_at = now
        try:
            await self._token.renew(deadline)
        except CallFailed as error:
            self._note(error)
        return self._synced_at is not None and self._synced_at >= now

    async def _authenticate(self, deadline: Deadline) -> Token:
        """A token for an answered challenge. A lost answer costs nothing: the next attempt takes a new challenge."""
        identity, registration = self._who()
        device_id = registration.device_id
        stub = self._channels.registration
        challenge = (
            await self._calls.once(stub.GetChallenge, registration_pb2.GetChallengeRequest(device_id=device_id), deadline=deadline)
        ).challenge
        signature = sign_proof(identity, challenge_proof(challenge, device_id))
        request = registration_pb2.AuthenticateRequest(device_id=device_id, challenge=challenge, signature=signature)
        sent_ms = self._clock.now_ms()
        answer = await self._calls.once(stub.Authenticate, request, deadline=deadline)
        if answer.HasField("server_time"):
            await self._set_time(answer.server_time, sent_ms)
        return Token(answer.access_token, (timestamp_ms(answer.expires_at) - self._now_ms()) / 1000)

    async def _call(self, method: UnaryMethod[Result], request: Any, deadline: Deadline) -> Result:
        return await self._calls.call(method, request, deadline=deadline, token=self._token)

    async def _change(
        self,
        name: str,
        method: UnaryMethod[Result],
        request: Callable[[common_pb2.DeviceProof], Any],
        change: bytes,
        deadline: Deadline | None = None,
    ) -> Result:
        """The answer to a change that must come from this device, once. Each attempt has a counter of its own, since one whose
        answer was lost may have used its counter; all changes may be repeated.

        ABORTED says that the counter was used: another process was faster, or the store is an old copy and lags behind by an
        unknown number. So the counter leaps, further each time.
        """
        identity, registration = await self._registered()
        deadline = deadline or self._deadline()
        digest = body_digest(change)
        attempt = 0
        async with self._changing:
            while True:
                counter = await self._store(self._keystore.next_counter)
                proof = common_pb2.DeviceProof(
                    counter=counter, signature=sign_proof(identity, change_proof(registration.device_id, counter, name, digest))
                )
                try:
                    return await self._calls.once(method, request(proof), deadline=deadline, token=self._token)
                except errors.Aborted:
                    attempt += 1
                    if attempt == CHANGE_ATTEMPTS_MAX:
                        raise
                    if attempt > 1:
                        await self._store(self._keystore.raise_counter, counter + 16**attempt)
                except CallFailed as error:
                    attempt += 1
                    delay_s = self._policy.delay_s(attempt - 1, self._random, error.retry_after_s)
                    if not error.retryable or attempt == CHANGE_ATTEMPTS_MAX or delay_s >= deadline.remaining_s():
                        raise
                    await self._clock.sleep(delay_s)

    # --- prekeys ---

    async def _own_device_id(self) -> DeviceId:
        """The id this device has or will have, stored before anybody hears of it."""
        known = await self._store(self._keystore.fact, _DEVICE_ID)
        if known is None:
            known = uuid7(self._clock.now_ms())
            await self._store(self._keystore.set_fact, _DEVICE_ID, known)
        return DeviceId(known)

    def _make_signed_prekey(self, identity: IdentityKey, device_id: DeviceId) -> PrekeyPrivate:
        private, _ = generate_prekey(
            identity, device_id, prekey_id=self._keystore.reserve_prekey_ids(1), kind=PrekeyKind.SIGNED, now_ms=self._now_ms()
        )
        self._keystore.add_prekeys([private])
        return private

    def _first_signed_prekey(self, identity: IdentityKey, device_id: DeviceId) -> PrekeyPrivate:
        """The one that an earlier attempt made, so that a repeated registration is the same; a new one if that is old, or was
        made by a clock that ran ahead."""
        known = self._keystore.newest_signed_prekey()
        if known is None or not 0 <= self._now_ms() - known.created_at_ms < SIGNED_PREKEY_ROTATION_MS:
            return self._make_signed_prekey(identity, device_id)
        return known

    def _make_one_time_prekeys(self, identity: IdentityKey, device_id: DeviceId, count: int) -> list[SignedPrekey]:
        first = self._keystore.reserve_prekey_ids(count)
        now_ms = self._now_ms()
        pairs = [
            generate_prekey(identity, device_id, prekey_id=prekey_id, kind=PrekeyKind.ONE_TIME, now_ms=now_ms)
            for prekey_id in range(first, first + count)
        ]
        self._keystore.add_prekeys([private for private, _ in pairs])
        return [public for _, public in pairs]

    async def _maintain(self, deadline: Deadline) -> None:
        identity, registration = self._who()
        device_id = registration.device_id
        await self._token.get(deadline)  # and with it the server's time
        newest = await self._store(self._keystore.newest_signed_prekey)
        uploaded = await self._store(self._keystore.fact, _UPLOADED_PREKEY)
        upload = keys_pb2.PrekeyUpload()
        if newest is None or not -FUTURE_SKEW_MS <= self._now_ms() - newest.created_at_ms < SIGNED_PREKEY_ROTATION_MS:
            newest = await self._store(self._make_signed_prekey, identity, device_id)
        rotated = newest.prekey_id.to_bytes(4, "big") != uploaded
        if rotated:
            upload.prekeys.append(_wire_prekey(_sign_prekey(identity, device_id, newest)))
        if self._one_time_prekeys and await self._store(self._keystore.prekey_count, PrekeyKind.ONE_TIME) < ONE_TIME_PRIVATE_MAX:
            state = await self._call(self._channels.keys.GetPrekeyState, keys_pb2.GetPrekeyStateRequest(), deadline)
            if state.one_time_prekeys_left < min(ONE_TIME_PREKEYS_REFILL_BELOW, self._one_time_prekeys):
                more = await self._store(self._make_one_time_prekeys, identity, device_id, self._one_time_prekeys)
                upload.prekeys.extend(map(_wire_prekey, more))
        if upload.prekeys:
            change = upload.SerializeToString()
            await self._change(
                "/sealpush.v1.Keys/UploadPrekeys",
                self._channels.keys.UploadPrekeys,
                lambda proof: keys_pb2.UploadPrekeysRequest(change=change, proof=proof),
                change,
                deadline,
            )
        now_ms = self._now_ms()
        if rotated:
            await self._store(self._keystore.set_fact, _UPLOADED_PREKEY, newest.prekey_id.to_bytes(4, "big"))
            await self._store(self._keystore.retire_signed_prekeys, newest.prekey_id, now_ms)
        await self._store(self._keystore.purge, now_ms)
        await self._store(self._keystore.set_fact, _MAINTAINED_AT, now_ms.to_bytes(8, "big"))
        self._maintained_at_ms = now_ms

    async def _maintain_if_due(self, deadline: Deadline, longest_s: float) -> None:
        """Messages matter more: what fails here is noted, and tried again the next time."""
        remaining_s = min(deadline.remaining_s(), longest_s)
        if abs(self._now_ms() - self._maintained_at_ms) < MAINTENANCE_PERIOD_MS or remaining_s < MAINTENANCE_S_MIN:
            return
        try:
            await self._maintain(Deadline.after(self._clock, remaining_s))
        except SealpushError as error:
            self._note(error)

    # --- taking deliveries ---

    async def _fetch(self, wake_up_id: bytes, taken: dict[MessageId, _New], deadline: Deadline) -> None:
        sent_ms = self._clock.now_ms()
        try:
            answer = await self._call(self._channels.messages.Fetch, messages_pb2.FetchRequest(wake_up_id=wake_up_id), deadline)
        except (errors.NotFound, errors.InvalidRequest):
            return  # it has ended, or the push was garbled: what waits comes by draining
        if answer.HasField("server_time"):
            await self._set_time(answer.server_time, sent_ms)
        await self._take_all([answer.delivery], taken, deadline)
        await self._acknowledge(deadline)  # before more is fetched: the sender is waiting for this one

    async def _drain_for_wake_up(self, named: bytes | None, taken: dict[MessageId, _New], deadline: Deadline) -> None:
        """Drain, unless a drain that began after this wake-up came has been through meanwhile."""
        self._wake_ups += 1
        mine = self._wake_ups
        async with self._draining:
            if self._wake_ups_drained >= mine:
                return
            covered = self._wake_ups
            await self._drain(taken, deadline, named)
            self._wake_ups_drained = covered

    async def _drain(self, taken: dict[MessageId, _New], deadline: Deadline, named: bytes | None = None) -> None:
        """Take page after page, acknowledging each. What is held stays at the service and does not stand in the way.

        What `named` names is fetched after the first page if it was not on it and there are more.
        """
        await self._recover_unshown(taken)
        request = messages_pb2.DrainRequest(page_size=PAGE_SIZE)
        while True:
            sent_ms = self._clock.now_ms()
            answer = await self._call(self._channels.messages.Drain, request, deadline)
            if answer.HasField("server_time"):
                await self._set_time(answer.server_time, sent_ms)
            await self._take_all(answer.deliveries, taken, deadline)
            await self._acknowledge(deadline)
            if not answer.next_page_token:
                break
            if named is not None:
                if all(delivery.wake_up_id != named for delivery in answer.deliveries):
                    await self._fetch(named, taken, deadline)
                named = None
            request.page_token = answer.next_page_token

    async def _recover_unshown(self, taken: dict[MessageId, _New]) -> None:
        """Messages that were stored and not handed over before: a crash, or an end of time, came between."""
        if not self._unshown:
            return
        self._unshown = False
        for each in reversed(await self._store(self._keystore.inbox)):
            if each.shown_at_ms is None:
                taken.setdefault(each.message_id, _New(each, ()))

    async def _take_all(self, deliveries: Iterable[messages_pb2.Delivery], taken: dict[MessageId, _New], deadline: Deadline) -> None:
        for delivery in deliveries:
            try:
                new = await self._take(delivery, deadline)
            except _Held as held:
                self._note(held)
                continue
            if new is not None:
                for replaced in new.replaces:
                    taken.pop(replaced, None)
                taken[new.stored.message_id] = new

    async def _take(self, delivery: messages_pb2.Delivery, deadline: Deadline) -> _New | None:
        """Check, open and store one delivery, and queue what to acknowledge. None: nothing new to show.

        Raises _Held where that cannot be decided now, KeystoreError where the store fails.
        """
        async with self._taking:
            try:
                return await self._take_checked(delivery, deadline)
            except EnvelopeRefused:
                await self._refuse(delivery, Reason.DEVICE_CANNOT_OPEN)
            except KeystoreBusy as busy:
                raise _Held(str(busy)) from busy
            return None

    async def _take_checked(self, delivery: messages_pb2.Delivery, deadline: Deadline) -> _New | None:
        _, registration = self._who()
        # Parse and bounds, then the suite.
        if len(delivery.message_id) != 16:
            raise _Held("a delivery without a message id cannot be acknowledged")
        envelope = Envelope.parse(delivery.envelope)
        header = envelope.header
        stanza = envelope.stanza_for(registration.device_id)
        if stanza is None or stanza.suite not in SUITES_SUPPORTED:
            raise EnvelopeRefused
        # Times.
        verdict = _check_times(header, self._now_ms())
        if verdict is not TimeCheck.OK:
            if not await self._resync(deadline):
                raise _Held("the server's time is not known; the message waits")
            verdict = _check_times(header, self._now_ms())
        if verdict is TimeCheck.FROM_THE_FUTURE:
            raise _Held("the message is from the future by the server's own time; it waits")
        if verdict is TimeCheck.EXPIRED:
            await self._refuse(delivery, Reason.LIFETIME_OVER)
            return None
        # Seen before?
        if await self._store(self._keystore.seen, header.sender_id, header.content_id):
            await self._store(self._keystore.queue_acknowledgement, self._acknowledgement(delivery, header, AckOutcome.DELIVERED))
            return None
        # The sender's entry and its mode.
        public_key = await self._content_public_key(header, deadline)

        # Signature, open, store: without a pause between, in one thread.
        def open_and_commit() -> _New | None:
            plaintext = open_envelope(
                envelope,
                device_id=registration.device_id,
                private_prekey_lookup=self._keystore.prekey,
                sender_public_key=public_key,
            )
            content = parse_content(plaintext)
            message = InboxMessage(
                message_id=MessageId(delivery.message_id),
                content_id=header.content_id,
                sender_id=header.sender_id,
                created_at_ms=header.created_at_ms,
                expires_at_ms=header.expires_at_ms,
                received_at_ms=self._now_ms(),
                content=plaintext,
                replace_key=content.replace_key.encode() or None,
                flags=header.flags | (FLAG_MUTED if delivery.muted else 0),
            )
            result = self._keystore.commit_message(
                message,
                acknowledgement=self._acknowledgement(delivery, header, AckOutcome.DELIVERED),
                used_prekey=(stanza.suite, stanza.prekey_id, stanza.kind),
            )
            return _New(message, result.replaced) if result else None

        try:
            return await self._store(open_and_commit)
        except asyncio.CancelledError:
            self._unshown = True  # the thread goes on and may commit
            raise

    def _acknowledgement(
        self, delivery: messages_pb2.Delivery, header: Header, outcome: AckOutcome, reason: Reason = Reason.UNSPECIFIED
    ) -> PendingAcknowledgement:
        return PendingAcknowledgement(MessageId(delivery.message_id), header.content_id, outcome, int(reason), self._now_ms())

    async def _refuse(self, delivery: messages_pb2.Delivery, reason: Reason) -> None:
        """Queue UNDELIVERED, unless the other process of this device opened the same content meanwhile."""
        sender_id: SenderId | None = None
        content_id = ContentId(bytes(16))
        with contextlib.suppress(EnvelopeRefused):
            header = Envelope.parse(delivery.envelope).header
            sender_id, content_id = header.sender_id, header.content_id
        if sender_id is None and delivery.envelope[:4] == MAGIC and len(delivery.envelope) >= 22:
            content_id = ContentId(delivery.envelope[6:22])  # where the header has it: names the message, proves nothing
        acknowledgement = PendingAcknowledgement(
            MessageId(delivery.message_id), content_id, AckOutcome.UNDELIVERED, int(reason), self._now_ms()
        )
        await self._store(lambda: self._keystore.queue_acknowledgement(acknowledgement, sender_id=sender_id))

    async def _content_public_key(self, header: Header, deadline: Deadline) -> bytes:
        """The key that must have signed: by the entries kept here, else by the present ones.

        Raises EnvelopeRefused when the present entries do not allow it, _Held when they cannot be had.
        """
        sender_id = header.sender_id
        sender = await self._kept_entry(sender_id, EntryRole.SENDER)
        platform = await self._kept_entry(_PLATFORM_ENTRY, EntryRole.PLATFORM) if header.server_sealed else None
        if sender is not None and (platform is not None or not header.server_sealed):
            with contextlib.suppress(EnvelopeRefused):
                return content_public_key(header, sender, platform)
            asked_at = self._profile_asked_at.get(sender_id)
            if asked_at is not None and self._clock.monotonic() - asked_at < PROFILE_PAUSE_S:
                raise EnvelopeRefused  # these are the present ones
        failed_at = self._profile_failed_at
        if failed_at is not None and self._clock.monotonic() - failed_at < PROFILE_FAILED_PAUSE_S:
            raise _Held("nobody answered just now who a sender is; the message waits")
        try:
            answer = await self._calls.call(
                self._channels.accounts.GetSenderProfile,
                accounts_pb2.GetSenderProfileRequest(sender_id=sender_id),
                deadline=Deadline.after(self._clock, min(deadline.remaining_s(), PROFILE_DEADLINE_S)),
            )
        except errors.NotFound:
            raise EnvelopeRefused from None
        except CallFailed as error:
            self._note(error)
            self._profile_failed_at = self._clock.monotonic()
            raise _Held("nobody answers who the sender is; the message waits") from error
        sender = await self._new_entry(sender_id, EntryRole.SENDER, answer.sender_entry)
        if header.server_sealed:
            platform = await self._new_entry(_PLATFORM_ENTRY, EntryRole.PLATFORM, answer.platform_entry)
        if len(self._profile_asked_at) >= ENTRIES_KEPT_MAX:
            self._profile_asked_at.clear()
        self._profile_asked_at[sender_id] = self._clock.monotonic()
        return content_public_key(header, sender, platform)

    async def _kept_entry(self, name: SenderId, role: EntryRole) -> SenderEntry | None:
        """A cached entry that holds now, verified."""
        now_ms = self._now_ms()
        entry = self._entries.get((name, role))
        if entry is None:
            blob = await self._store(self._keystore.sender_entry, name, role)
            if blob is None:
                return None
            with contextlib.suppress(EntryRefused):
                entry = verify_sender_entry(self._root_public_key, blob, now_ms, role=role)
                self._remember(name, entry)
        return entry if entry is not None and entry.not_before_ms <= now_ms < entry.not_after_ms else None

    async def _new_entry(self, name: SenderId, role: EntryRole, blob: bytes) -> SenderEntry:
        """An entry as the service gave it just now, verified and cached."""
        try:
            entry = verify_sender_entry(self._root_public_key, blob, self._now_ms(), role=role)
        except EntryRefused as refused:
            self._note(refused)
            if _out_of_time(blob, self._now_ms()):
                raise _Held("the sender's entry is outside its time; the message waits for a new one") from refused
            raise EnvelopeRefused from None
        if role is EntryRole.SENDER and entry.sender_id != name:
            raise EnvelopeRefused
        if not await self._store(self._keystore.put_sender_entry, name, role, entry.serial, entry.not_after_ms, blob):
            raise _Held("the service gave an older entry of the sender than is known here; the message waits")
        self._remember(name, entry)
        if role is EntryRole.SENDER:
            await self._keep_name(name, entry.display_name)
        return entry

    def _remember(self, name: SenderId, entry: SenderEntry) -> None:
        if len(self._entries) >= ENTRIES_KEPT_MAX:
            self._entries.clear()
        self._entries[name, entry.role] = entry

    async def _keep_name(self, sender_id: SenderId, display_name: str) -> None:
        """Names outlive entries, so that an old message still says who sent it."""
        if await self._name(sender_id) != display_name:
            self._names[sender_id] = display_name
            await self._store(self._keystore.set_fact, _name_fact(sender_id), display_name.encode())

    async def _name(self, sender_id: SenderId) -> str:
        name = self._names.get(sender_id)
        if name is None:
            kept = await self._store(self._keystore.fact, _name_fact(sender_id))
            if len(self._names) >= ENTRIES_KEPT_MAX:
                self._names.clear()
            name = self._names[sender_id] = (kept or b"").decode()
        return name

    # --- handing over ---

    async def _show(self, new: Iterable[_New], shown: list[Message]) -> None:
        """Append what may be shown now and was not before, each marked first."""
        try:
            for each in new:
                now_ms = self._now_ms()
                if now_ms >= each.stored.expires_at_ms + EXPIRY_SKEW_MS:
                    continue
                message = await self._message(each.stored, each.replaces)
                if await self._store(self._keystore.mark_shown, each.stored.message_id, now_ms):
                    shown.append(message)
        except BaseException:
            self._unshown = True
            raise

    async def _message(self, stored: InboxMessage, replaces: tuple[MessageId, ...]) -> Message:
        return Message(
            message_id=stored.message_id,
            sender_id=stored.sender_id,
            sender_name=await self._name(stored.sender_id),
            sealed_by=SealedBy.SERVER if stored.flags & FLAG_SERVER_SEALED else SealedBy.SENDER,
            content=parse_content(stored.content),
            muted=bool(stored.flags & FLAG_MUTED),
            created_at=moment(stored.created_at_ms),
            expires_at=moment(stored.expires_at_ms),
            received_at=moment(stored.received_at_ms),
            is_new=stored.shown_at_ms is None,
            replaces=replaces,
            read_at=None if stored.read_at_ms is None else moment(stored.read_at_ms),
        )

    async def _tell(self, message: Message) -> None:
        if self._on_message is None:
            return
        try:
            done = self._on_message(message)
            if inspect.isawaitable(done):
                await done
        except Exception as error:
            # The kind only: an exception of the app may quote the content.
            log.error("on_message failed with %s; the message is in the inbox", type(error).__name__)

    # --- acknowledging ---

    def _signed(self, acknowledgement: PendingAcknowledgement) -> messages_pb2.Acknowledgement:
        identity, registration = self._who()
        proof = acknowledgement_proof(
            acknowledgement.message_id,
            acknowledgement.content_id,
            registration.device_id,
            acknowledgement.outcome,
            acknowledgement.reason_code,
            acknowledgement.at_ms,
        )
        return messages_pb2.Acknowledgement(
            message_id=acknowledgement.message_id,
            content_id=acknowledgement.content_id,
            outcome=messages_pb2.AckOutcome.ValueType(acknowledgement.outcome),
            reason_code=common_pb2.ReasonCode.ValueType(acknowledgement.reason_code),
            at_ms=acknowledgement.at_ms,
            signature=sign_proof(identity, proof),
        )

    async def _acknowledge(self, deadline: Deadline) -> None:
        """Send what is owed until nothing is, or nothing moves. One call at a time: what is on its way is not sent again."""
        async with self._acknowledging:
            while True:
                owed = await self._store(self._keystore.pending_acknowledgements, ACKS_BATCH_MAX)
                if not owed:
                    return
                answered = await self._acknowledge_batch(owed, deadline)
                if not answered:
                    return
                await self._store(self._keystore.confirm_acknowledgements, answered)

    async def _acknowledge_batch(self, owed: Sequence[PendingAcknowledgement], deadline: Deadline) -> list[PendingAcknowledgement]:
        request = messages_pb2.AcknowledgeRequest(acknowledgements=map(self._signed, owed))
        try:
            answer = await self._call(self._channels.messages.Acknowledge, request, deadline)
        except errors.InvalidRequest as error:
            # One that the service cannot read must not stand in the way of the others: find it, and give it up.
            self._note(error)
            if len(owed) == 1:
                return list(owed)
            middle = len(owed) // 2
            return [
                *await self._acknowledge_batch(owed[:middle], deadline),
                *await self._acknowledge_batch(owed[middle:], deadline),
            ]
        return [each for each, result in zip(owed, answer.results, strict=False) if _is_final(result)]

    # --- the stream ---

    async def _stream(self, deliver: Callable[[_New], Awaitable[None]], caught_up: asyncio.Event, *, retake: bool) -> None:
        """Keep one stream going: connect, take what comes, connect again after a pause with full jitter."""
        recovered: dict[MessageId, _New] = {}
        await self._recover_unshown(recovered)
        for new in recovered.values():
            await deliver(new)
        attempt = 0
        refused_token = False
        try:
            while True:
                connection = _Connection(self, deliver, caught_up)
                pause_s: float | None = None
                try:
                    bearer = await self._token.get(self._deadline())
                    await connection.run(bearer)
                except grpc.aio.AioRpcError as error:
                    failure = call_failed(error)
                    self._note(failure)
                    pause_s = failure.retry_after_s
                    if isinstance(failure, errors.Aborted):
                        if not retake:
                            raise StreamTakenOver(
                                "another stream of this device took over; this one has ended, pass retake=True to take it back"
                            ) from error
                        connection.progressed = False  # two that take from each other slow each other down
                    elif isinstance(failure, errors.Unauthenticated):
                        self._token.drop(bearer)
                        if not refused_token or connection.progressed:
                            refused_token = True
                            continue
                        raise failure from error
                    elif isinstance(failure, errors.PermissionDenied | errors.InvalidRequest | errors.FailedPrecondition):
                        raise failure from error
                except CallFailed as failure:
                    self._note(failure)
                    pause_s = failure.retry_after_s
                    if not failure.retryable and not isinstance(failure, errors.ServerFault):
                        raise
                except KeystoreBusy as busy:
                    self._note(busy)
                if connection.progressed:
                    attempt = 0
                    refused_token = False
                await self._clock.sleep(self._policy.delay_s(attempt, self._random, pause_s))
                attempt += 1
        finally:
            self._unshown = True


class MessageStream:
    """Messages as they come. Made by `Device.stream()`; raises there what `Device.run_stream()` would."""

    def __init__(self, device: Device, queue: "asyncio.Queue[_New | BaseException]", caught_up: asyncio.Event) -> None:
        self._device = device
        self._queue = queue
        self._caught_up = caught_up

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        shown: list[Message] = []
        while not shown:
            new = await self._queue.get()
            if isinstance(new, BaseException):
                self._queue.put_nowait(new)  # it stays the answer
                raise new
            await self._device._show([new], shown)
        return shown[0]

    async def caught_up(self) -> None:
        """Return once everything that had waited at the service has come."""
        await self._caught_up.wait()


class _Connection:
    """One connection of a stream: deliveries down, acknowledgements up."""

    def __init__(self, device: Device, deliver: Callable[[_New], Awaitable[None]], caught_up: asyncio.Event) -> None:
        self._device = device
        self._deliver = deliver
        self._caught_up = caught_up
        self._owing = asyncio.Event()
        self._holding = asyncio.Event()
        # Sent up this connection and not answered yet, by message, in the order sent.
        self._sent: dict[MessageId, deque[PendingAcknowledgement]] = {}
        # What the store says is owed and what was sent are read and changed together, or an answer between sends it twice.
        self._ledger = asyncio.Lock()
        # Nothing is written before the service has spoken: a refusal that meets a write loses its status (in gRPC).
        self._open = asyncio.Event()
        self.progressed = False

    async def run(self, bearer: str) -> None:
        """Until the stream ends. Raises AioRpcError as the call ended, or what the store or the device raised."""
        call = self._device._channels.messages.Stream(metadata=call_metadata(bearer, uuid7().hex()))
        self._owing.set()  # what an earlier connection or crash left
        reader = asyncio.create_task(self._read(call), name="sealpush-stream-read")
        others = [
            asyncio.create_task(self._write(call), name="sealpush-stream-write"),
            asyncio.create_task(self._keep_house(), name="sealpush-stream-upkeep"),
        ]
        try:
            await asyncio.wait([reader, *others], return_when=asyncio.FIRST_COMPLETED)
            for task in others:
                # A write fails because the call ended: the reader knows how. Anything else is the store's.
                if task.done() and not isinstance(task.exception(), _CALL_ENDED):
                    task.result()
            await reader
        finally:
            call.cancel()
            for task in (reader, *others):
                task.cancel()
            await asyncio.gather(reader, *others, return_exceptions=True)

    async def _read(self, call: "_StreamCall") -> None:
        device = self._device
        async for frame in call:
            self.progressed = True
            self._open.set()
            if frame.HasField("server_time"):
                await device._set_time(frame.server_time)
            await self._confirm(frame.ack_results)
            for delivery in frame.deliveries:
                await self._take(delivery)
            if frame.backlog_done:
                self._caught_up.set()

    async def _take(self, delivery: messages_pb2.Delivery) -> None:
        device = self._device
        message_id = MessageId(delivery.message_id)
        try:
            new = await device._take(delivery, device._deadline())
        except _Held as held:
            device._note(held)
            if len(device._held) < ACKS_BATCH_MAX:
                device._held[message_id] = delivery
                self._holding.set()
            return
        device._held.pop(message_id, None)
        self._owing.set()
        if new is not None:
            await self._deliver(new)

    async def _confirm(self, results: Iterable[messages_pb2.AckResult]) -> None:
        """Forget what the service has answered. What it did not judge stays owed, and goes up the next connection."""
        device = self._device
        async with self._ledger:
            answered: list[PendingAcknowledgement] = []
            for result in results:
                sent = self._sent.get(MessageId(result.message_id))
                if sent and _is_final(result):
                    answered.append(sent.popleft())
                    if not sent:
                        del self._sent[answered[-1].message_id]
            if answered:
                await device._store(device._keystore.confirm_acknowledgements, answered)
                self._owing.set()

    async def _write(self, call: "_StreamCall") -> None:
        """Send what is owed; what comes meanwhile gathers in the store and goes together with the next write."""
        device = self._device
        await self._open.wait()
        while True:
            await self._owing.wait()
            self._owing.clear()
            async with self._ledger:
                owed = await device._store(device._keystore.pending_acknowledgements)
                fresh = [each for each in owed if each not in self._sent.get(each.message_id, ())][:ACKS_BATCH_MAX]
                for each in fresh:
                    self._sent.setdefault(each.message_id, deque()).append(each)
            if fresh:
                await call.write(messages_pb2.StreamRequest(acknowledgements=map(device._signed, fresh)))
                self._owing.set()

    async def _keep_house(self) -> None:
        """Try again what is held, and do what is due daily."""
        device = self._device
        attempt = 0
        while True:
            await device._maintain_if_due(device._deadline(), CALL_DEADLINE_S)
            if not device._held:
                attempt = 0
                self._holding.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HOUSEKEEPING_S):
                        await self._holding.wait()
                continue
            await device._clock.sleep(device._policy.delay_s(attempt, device._random))
            attempt += 1
            for delivery in list(device._held.values()):
                await self._take(delivery)


# What a write raises on a call that has ended.
_CALL_ENDED: Final = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
_StreamCall = grpc.aio.StreamStreamCall[messages_pb2.StreamRequest, messages_pb2.StreamResponse]


def parse_content(plaintext: bytes) -> Content:
    """The content in a plaintext. Of a higher version only class, title and body are kept. Raises EnvelopeRefused."""
    try:
        content = Content.FromString(plaintext)
    except DecodeError:
        raise EnvelopeRefused from None
    if content.version > 1:
        return Content(version=content.version, content_class=content.content_class, title=content.title, body=content.body)
    return content


def _check_times(header: Header, now_ms: int) -> TimeCheck:
    """As `check_times()`, with the bound that fits each side: how late a clock can be, and how early a sealer's."""
    if check_times(header, now_ms, FUTURE_SKEW_MS) is TimeCheck.FROM_THE_FUTURE:
        return TimeCheck.FROM_THE_FUTURE
    if check_times(header, now_ms, EXPIRY_SKEW_MS) is TimeCheck.EXPIRED:
        return TimeCheck.EXPIRED
    return TimeCheck.OK


def _out_of_time(blob: bytes, now_ms: int) -> bool:
    """Whether a refused entry says of itself that it is not in force. Read before any signature: good for waiting only."""
    try:
        entry = SenderEntry.decode(blob[:-64])
    except ValueError:
        return False
    return not entry.not_before_ms <= now_ms < entry.not_after_ms


def _sign_prekey(identity: IdentityKey, device_id: DeviceId, prekey: PrekeyPrivate) -> SignedPrekey:
    """The public half of a stored prekey; signing is deterministic, so a repeated upload has the same bytes."""
    unsigned = SignedPrekey(prekey.suite, prekey.prekey_id, prekey.kind, prekey.public_key, prekey.created_at_ms, prekey.expires_at_ms, b"")
    return replace(unsigned, signature=identity.sign(prekey_proof(unsigned, device_id, SUITE_X25519)))


def _wire_prekey(prekey: SignedPrekey) -> keys_pb2.Prekey:
    return keys_pb2.Prekey(
        suite=prekey.suite,
        prekey_id=prekey.prekey_id,
        kind=keys_pb2.PrekeyKind.ValueType(prekey.kind),
        public_key=prekey.public_key,
        created_at_ms=prekey.created_at_ms,
        expires_at_ms=prekey.expires_at_ms,
        signature=prekey.signature,
    )


_FINAL_VERDICTS: Final = frozenset(
    {
        messages_pb2.ACK_VERDICT_ACCEPTED,
        messages_pb2.ACK_VERDICT_LATE,
        messages_pb2.ACK_VERDICT_UNKNOWN,
        messages_pb2.ACK_VERDICT_REFUSED,
    }
)


def _is_final(result: messages_pb2.AckResult) -> bool:
    return result.verdict in _FINAL_VERDICTS


def _name_fact(sender_id: SenderId) -> str:
    return f"name.{sender_id.hex()}"


def _wake_up_id(given: bytes | str | None) -> bytes | None:
    """The 16 bytes of a wake-up id as pushed (base64url without padding), or None for anything else: then draining does."""
    if isinstance(given, str):
        try:
            given = parse_uuid(given) if len(given) == 36 else base64.urlsafe_b64decode(given + "=" * (-len(given) % 4))
        except ValueError:
            return None
    return given if given is not None and len(given) == 16 else None
