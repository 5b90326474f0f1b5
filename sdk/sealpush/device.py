"""A device: register, get messages, decide about senders, keep fresh. What an app calls stands here.

How it is done stands beside it, from what every part knows to what uses all of it:

    local          the store, who this device is, the server's time
    session        calls as this device: token, proof on a change
    entries        whose signature counts: sender entries under the pinned root, and what it revoked
    inbox          messages for the app, each handed over once
    receiving      the checks on a delivery, in their order: the security argument
    acknowledging  what is owed to the service
    devices        the person's other devices: following their log, telling, vouching
    upkeep         prekeys, and what is due daily
    draining       everything that waits, page by page
    live           the stream
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from sealpush import errors
from sealpush.acknowledging import Acknowledgements
from sealpush.devicelog import DeviceNotice, KnownDevice, fingerprint
from sealpush.devices import Devices
from sealpush.draining import Drainer, parse_wake_up_id
from sealpush.entries import PLATFORM_ENTRY, Revocations, SenderEntries, SenderProfile
from sealpush.errors import CallFailed, KeystoreBusy, NotRegisteredHere
from sealpush.ids import AppId, DeviceId, MessageId, RegistrationId, SenderId, SubscriberId, check_id, uuid7
from sealpush.inbox import Inbox, Message, SealedBy
from sealpush.keys import ONE_TIME_PREKEYS_BATCH, IdentityKey, PrekeyKind, SignedPrekey
from sealpush.keystore import PAGE_MAX, DeviceRegistration, Keystore
from sealpush.live import Live, MessageStream
from sealpush.local import ServerTime, Store, Trouble, Who
from sealpush.model import Platform, PushEnvironment, StoppedDelivery, wire_time
from sealpush.proofs import registration_proof, sign_proof
from sealpush.receiving import Receiver
from sealpush.retry import Clock, Deadline, Random, RetryPolicy, SystemClock, jitter
from sealpush.session import CALL_DEADLINE_S, Session
from sealpush.suites import SUITE_X25519, SUITES
from sealpush.transport import Calls, Channels, Endpoints, UnaryMethod
from sealpush.upkeep import Upkeep, first_signed_prekey, set_uploaded
from sealpush.v1 import accounts_pb2, common_pb2, keys_pb2, messages_pb2, registration_pb2
from sealpush.wire import wire_prekey

__all__ = [
    "Device",
    "Diagnosis",
    "Installation",
    "Message",
    "MessageStream",
    "OnMessage",
    "OnNotice",
    "Preference",
    "RegistrationStarted",
    "SealedBy",
    "SenderProfile",
]

log = logging.getLogger("sealpush")

WAKE_UP_DEADLINE_S: Final = 25.0  # a notification extension has about 30 s
# Kept for collecting and marking what is handed over, half each, once the time for fetching is over.
HAND_OVER_S: Final = 1.0
MAINTENANCE_ON_WAKE_S: Final = 3.0  # new messages wait for it, once a day

_REGISTRATION_ID: Final = "registration.id"
_DEVICE_ID: Final = "device.id"

Handed = TypeVar("Handed")

OnMessage = Callable[[Message], Awaitable[None] | None]
OnNotice = Callable[[DeviceNotice], Awaitable[None] | None]


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

    `ended` says that the service did not know this device when it was asked last. `reach` says per service "ok" or why not.
    `acknowledgements_waiting` stops counting at 500. `registration_lock` says whether the recipient has one; None: the service could not
    be asked.
    """

    registered: bool
    device_id: DeviceId | None
    app_id: AppId
    authenticated: bool
    ended: bool
    registration_lock: bool | None
    reach: Mapping[str, str]
    clock_offset_ms: int | None
    acknowledgements_waiting: int
    deliveries_held: int
    signed_prekey_age_ms: int | None
    one_time_prekeys: int
    last_error: str


class Device:
    """One registered app instance. Safe for many tasks of one event loop, and for two processes over one SqliteKeystore.

    `endpoints` may be a `Channels` shared by many devices; then whoever made it closes it. `root_public_key` is the
    platform's root that the app ships; it is pinned in the keystore. `on_message` gets each message that `run_stream()`
    brings; `on_notice` gets each notice about the person's devices as it is found, and `notices()` keeps it until it is dismissed.
    `one_time_prekeys` is how many to bring to the service at a time; 0: none.
    Without one, content is sealed to the signed prekey, without forward secrecy within its week. `suite` is what prekeys are of
    from now on, SUITE_HYBRID for those that hold against a quantum computer too; a device that had a higher one keeps it.
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
        on_notice: OnNotice | None = None,
        one_time_prekeys: int = ONE_TIME_PREKEYS_BATCH,
        suite: int = SUITE_X25519,
        clock: Clock | None = None,
        random: Random = jitter,
        policy: RetryPolicy | None = None,
    ) -> None:
        if not 0 <= one_time_prekeys <= ONE_TIME_PREKEYS_BATCH:
            raise ValueError(f"one_time_prekeys must be 0 to {ONE_TIME_PREKEYS_BATCH}")
        if suite not in SUITES:
            raise ValueError(f"suite must be one of {sorted(SUITES)}; upgrade this SDK for a newer one")
        self.app_id = AppId(app_id)
        self._root_public_key = root_public_key
        self._platform = platform
        self._suite = suite
        self._on_message = on_message
        self._on_notice = on_notice
        self._clock = clock or SystemClock()
        self._own_channels = isinstance(endpoints, Endpoints)
        self._channels = channels = Channels(endpoints) if isinstance(endpoints, Endpoints) else endpoints
        self._calls = calls = Calls(self._clock, random, policy or RetryPolicy())
        self._store = store = Store(keystore)
        self._who = who = Who()
        self._time = time = ServerTime(self._clock, store)
        self._trouble = trouble = Trouble()
        self._session = session = Session(calls, channels, store, who, time, trouble)
        self._devices = devices = Devices(session, store, who, time, trouble, self._tell_notice)
        revocations = Revocations(root_public_key, calls, channels, store, time, trouble)
        self._upkeep = upkeep = Upkeep(
            session, store, who, time, devices, revocations, trouble, suite=suite, one_time_prekeys=one_time_prekeys
        )
        self._entries = entries = SenderEntries(root_public_key, calls, channels, store, time, trouble, revocations)
        self._inbox = inbox = Inbox(store, time, entries)
        self._receiver = receiver = Receiver(session, store, who, time, entries, inbox, trouble, upkeep.hasten)
        acknowledgements = Acknowledgements(session, store, who, trouble)
        self._drainer = Drainer(session, receiver, acknowledgements, time)
        self._live = Live(session, receiver, acknowledgements, inbox, upkeep, time, trouble)
        self._prepared = False
        self._preparing = asyncio.Lock()

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
        return self._who.registration

    async def start_registration(self, phone: str, *, locale: str = "") -> RegistrationStarted:
        """Have a one-time code sent to the number. Raises Overloaded when another one may be asked for later only."""
        await self._prepare()
        request = registration_pb2.StartRegistrationRequest(app_id=self.app_id, phone=phone, locale=locale)
        sent_at = self._time.steady_s()
        # Each call sends a code: a lost answer is for the person to repeat, who sees whether one came.
        answer = await self._calls.once(self._channels.registration.StartRegistration, request, deadline=self._session.deadline())
        await self._time.learn(answer.server_time, sent_at)
        registration_id = check_id(answer.registration_id, "registration_id")
        await self._store(lambda keystore: keystore.set_fact(_REGISTRATION_ID, registration_id))
        return RegistrationStarted(answer.code_length, wire_time(answer.expires_at), wire_time(answer.resend_at))

    async def confirm(self, code: str, installation: Installation | None = None, *, pin: str = "") -> DeviceRegistration:
        """Prove the number by the code, and its registration lock by the PIN if it has one, and become a recipient.

        Call it again after a lost answer, also in a new process: identity, device id and prekey are stored before the
        first call and stay the same. Raises WrongCode, RegistrationLocked (ask for the PIN, then call again with the same code),
        Overloaded (too many wrong PINs; `retry_after_s`), FailedPrecondition (start again), NotRegisteredHere (never started).
        """
        await self._prepare()
        registration_id = await self._store(lambda keystore: keystore.fact(_REGISTRATION_ID))
        if registration_id is None:
            raise NotRegisteredHere("no registration was started here; call start_registration() first")
        identity = self._who.identity = await self._store(lambda keystore: keystore.create_identity())
        wire_installation = (installation or Installation()).to_wire(self._platform)
        try:
            registration = await self._confirm(RegistrationId(registration_id), code, pin, identity, wire_installation)
        except errors.AlreadyExists:
            # The id belongs to an identity that is not here any more (a store that was partly restored).
            await self._store(lambda keystore: keystore.set_fact(_DEVICE_ID, None))
            registration = await self._confirm(RegistrationId(registration_id), code, pin, identity, wire_installation)
        self._who.registration = registration
        return registration

    async def _confirm(
        self, registration_id: RegistrationId, code: str, pin: str, identity: IdentityKey, installation: registration_pb2.Installation
    ) -> DeviceRegistration:
        """One attempt with the device id that is kept. Raises AlreadyExists when that is another identity's."""

        def prepare(keystore: Keystore) -> tuple[DeviceId, SignedPrekey]:
            kept = keystore.fact(_DEVICE_ID)
            device_id = DeviceId(kept or uuid7(self._clock.now_ms()))
            if kept is None:
                keystore.set_fact(_DEVICE_ID, device_id)
            return device_id, first_signed_prekey(keystore, identity, device_id, self._time.now_ms(), self._suite)

        device_id, prekey = await self._store(prepare)
        request = registration_pb2.ConfirmRegistrationRequest(
            registration_id=registration_id,
            code=code,
            device_id=device_id,
            identity_public_key=identity.public_key,
            signed_prekey=wire_prekey(prekey),
            min_suite=prekey.suite,
            installation=installation,
            proof=sign_proof(identity, registration_proof(registration_id, identity.public_key, self.app_id)),
            pin=pin,
        )
        sent_at = self._time.steady_s()
        answer = await self._calls.call(self._channels.registration.ConfirmRegistration, request, deadline=self._session.deadline())
        await self._time.learn(answer.server_time, sent_at)
        subscriber_id = SubscriberId(check_id(answer.subscriber_id, "subscriber_id"))
        registration = DeviceRegistration(device_id, subscriber_id, self.app_id, self._time.now_ms())

        def keep(keystore: Keystore) -> None:
            set_uploaded(keystore, prekey, registration.registered_at_ms)
            keystore.set_registration(registration)
            keystore.set_fact(_REGISTRATION_ID, None)

        await self._store(keep)
        return registration

    async def update_installation(self, installation: Installation) -> None:
        """Tell the service what changed: a new push token, a permission, and the like. Repeating it is safe."""
        await self._registered()
        change = installation.to_wire(self._platform).SerializeToString()
        await self._session.change(
            "/sealpush.v1.Registration/UpdateInstallation",
            self._channels.registration.UpdateInstallation,
            lambda proof: registration_pb2.UpdateInstallationRequest(change=change, proof=proof),
            change,
            self._session.deadline(),
        )

    async def unregister(self) -> None:
        """End this installation and forget everything that is kept here, also if it had ended already."""
        await self._registered()
        try:
            await self._session.change(
                "/sealpush.v1.Registration/Unregister",
                self._channels.registration.Unregister,
                lambda proof: registration_pb2.UnregisterRequest(proof=proof),
                b"",
                self._session.deadline(),
            )
        except errors.Unauthenticated:
            log.info("the installation had ended before")
        async with self._receiver.deciding:
            await self._store(lambda keystore: keystore.erase())
            self._prepared = False
            self._who.identity = self._who.registration = None
            self._entries.forget()
            self._live.held.clear()
            self._session.forget()
            await self._inbox.forget()

    async def preferences(self) -> list[Preference]:
        """What the recipient decided about senders."""
        await self._registered()
        found: list[Preference] = []
        request = registration_pb2.ListPreferencesRequest()
        while True:
            answer = await self._session.call(self._channels.registration.ListPreferences, request, self._session.deadline())
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
        await self._registered()
        known = Preference(sender_id)
        if None in (block_all, block_advertising, mute):
            known = next((each for each in await self.preferences() if each.sender_id == sender_id), known)
        change = registration_pb2.Preference(
            sender_id=sender_id,
            block_all=known.block_all if block_all is None else block_all,
            block_advertising=known.block_advertising if block_advertising is None else block_advertising,
            mute=known.mute if mute is None else mute,
        ).SerializeToString()
        answer = await self._session.change(
            "/sealpush.v1.Registration/SetPreference",
            self._channels.registration.SetPreference,
            lambda proof: registration_pb2.SetPreferenceRequest(change=change, proof=proof),
            change,
            self._session.deadline(),
        )
        return [StoppedDelivery.from_wire(each) for each in answer.stopped]

    async def set_registration_lock(self, pin: str) -> None:
        """Lock the recipient's number: from now on a further device gives this PIN beside the code, whatever its app.

        4 to 32 characters, digits or a phrase; changes the PIN if there is one. The lock ends by itself when none of the recipient's
        devices was used for 30 days. Nothing is kept here: the person must remember the PIN. Raises InvalidRequest for a PIN that is
        too easy, Overloaded when it is changed too often.
        """
        if not pin.strip():
            raise ValueError("a PIN has 4 to 32 characters; to have no lock call remove_registration_lock()")
        await self._set_registration_lock(pin)

    async def remove_registration_lock(self) -> None:
        """Have no lock on the number any more. Harmless without one."""
        await self._set_registration_lock("")

    async def _set_registration_lock(self, pin: str) -> None:
        await self._registered()
        change = registration_pb2.RegistrationLock(pin=pin).SerializeToString()
        await self._session.change(
            "/sealpush.v1.Registration/SetRegistrationLock",
            self._channels.registration.SetRegistrationLock,
            lambda proof: registration_pb2.SetRegistrationLockRequest(change=change, proof=proof),
            change,
            self._session.deadline(),
        )

    async def registration_lock(self) -> bool:
        """Whether the recipient has a registration lock, set by whichever of its devices."""
        await self._registered()
        return await self._registration_lock(self._session.deadline())

    async def _registration_lock(self, deadline: Deadline) -> bool:
        request = registration_pb2.ListPreferencesRequest(page_size=1)
        return bool((await self._session.call(self._channels.registration.ListPreferences, request, deadline)).registration_lock)

    async def sender_profile(self, sender_id: SenderId) -> SenderProfile:
        """Who a sender is: name and modes out of its entry, which the pinned root certified, and its brand.

        The brand (colours, logo) is not signed: it is what the server says. Raises NotFound, EntryRefused for an entry that
        the root did not sign, revoked, or that is out of its time, and CallFailed.
        """
        check_id(sender_id, "sender_id")
        await self._prepare()
        return await self._entries.profile(sender_id, self._session.deadline())

    # --- messages ---

    async def on_wake(self, wake_up_id: bytes | str | None = None, deadline: float = WAKE_UP_DEADLINE_S) -> list[Message]:
        """What a push woke the app for, and everything else that waits. New messages only.

        `wake_up_id` is as pushed: 16 bytes, their base64url text, or None; what it names does not wait behind a long
        backlog. Wake-ups that come while one is worked on share the drain after it: a message is returned by one of them.
        Returns within `deadline` seconds with what it has by then; the rest comes with the next call. An unreachable
        service is no error here (`diagnose()` tells); a device that is not registered is.
        """
        whole = Deadline.after(self._clock, deadline)
        hand_over_s = min(HAND_OVER_S, deadline / 5)
        fetching = Deadline(self._clock, whole.at - hand_over_s)
        collecting = Deadline(self._clock, whole.at - hand_over_s / 2)
        try:
            async with asyncio.timeout(fetching.remaining_s()):
                await self._registered()
                await self._drainer.drain_for_wake_up(parse_wake_up_id(wake_up_id), fetching)
                await self._upkeep.do_if_due(fetching, MAINTENANCE_ON_WAKE_S)
        except (TimeoutError, errors.Unavailable, errors.Overloaded, errors.DeadlineExceeded, errors.ServerFault, KeystoreBusy) as error:
            self._trouble.note(error)
        new: list[Message] = []
        try:
            async with asyncio.timeout(whole.remaining_s()):
                new = await self._inbox.hand_over(collecting=collecting)
        except (TimeoutError, KeystoreBusy) as error:
            self._trouble.note(error)
        return new

    async def drain(self, deadline: float = 60.0) -> list[Message]:
        """Everything that waits, and what earlier calls and processes left; returns the new messages, oldest first.

        Raises CallFailed and KeystoreError; what came by then comes next time. Beside a wake-up or a stream, either may give a message
        that the other one fetched; each is given once.
        """
        await self._registered()
        limit = Deadline.after(self._clock, deadline)
        await self._drainer.drain(limit)
        await self._upkeep.do_if_due(limit, CALL_DEADLINE_S)
        return await self._inbox.hand_over()

    @contextlib.asynccontextmanager
    async def stream(self, *, retake: bool = False) -> AsyncIterator[MessageStream]:
        """Messages as they come, while the block lasts: `async with device.stream() as messages: async for message in messages`.

        Reconnects by itself. With `retake` it takes over from another stream of this device instead of giving way.
        """
        await self._registered()
        async with self._live.messages(retake=retake) as messages:
            yield messages

    async def run_stream(self, *, retake: bool = False) -> None:
        """Hand each message to `on_message` as it comes, until cancelled. Reconnects by itself.

        Raises StreamTakenOver when another stream of this device took over, unless `retake`; RegistrationEnded when the
        installation has ended. What `on_message` raises is logged, without content, and does not end the stream.
        """
        await self._registered()
        async with self._live.messages(retake=retake) as messages:
            async for message in messages:
                await self._tell(message)

    async def inbox(self, *, before: int | None = None, limit: int = PAGE_MAX) -> list[Message]:
        """Messages kept here, newest first, without those whose lifetime is over: a page of at most `limit`, 500 unless told.

        For the next page give the `position` of the last message as `before`. Fewer than `limit` are the last page. Listing a message
        does not hand it over: one with `is_new` still comes by draining, a wake-up or a stream.
        """
        if limit < 1:
            raise ValueError("limit must be 1 or more")
        await self._prepare()
        return await self._inbox.messages(before, limit)

    async def mark_read(self, message_id: MessageId) -> bool:
        """Note that the user read a message; the sender learns it with the next acknowledgements. False if it was before."""
        await self._prepare()
        now_ms = self._time.now_ms()
        return await self._store(lambda keystore: keystore.mark_read(message_id, now_ms, acknowledge=True))

    async def delete(self, message_id: MessageId) -> bool:
        """Delete a message from the inbox; it does not come back."""
        await self._prepare()
        return await self._store(lambda keystore: keystore.delete_message(message_id))

    # --- the person's devices ---

    async def devices(self) -> list[KnownDevice]:
        """The person's devices in all apps, oldest first, this one among them. Raises CallFailed."""
        await self._registered()
        return await self._devices.listed(self._session.deadline())

    async def fingerprint(self) -> str:
        """60 digits that stand for this device and its identity key, for a person to compare. Raises NotRegisteredHere."""
        await self._registered()
        identity, registration = self._who.registered()
        return fingerprint([(registration.device_id, identity.public_key)])

    async def vouch_for(self, device_id: DeviceId, fingerprint: str) -> None:
        """Tell everybody who reads the device log that this device is the person's own, once they have compared its fingerprint.

        `fingerprint` is what was compared, as the other device shows it; spaces do not matter. Call it again after a lost answer. Raises
        KeyRefused when the device has another one, NotFound when it is not in the list, FailedPrecondition when nobody vouches for
        this device itself.
        """
        await self._registered()
        await self._devices.vouch_for(device_id, fingerprint, self._session.deadline())

    async def remove_device(self, device_id: DeviceId) -> None:
        """Take another phone of the person's away: lost, stolen, or a stranger's. It ends as if it had called `unregister()`.

        Call it again after a lost answer. The list and the other phones' notices follow within moments. Raises PermissionDenied when nobody
        vouches for this device, NotFound when the person has no such device, InvalidRequest for this device itself.
        """
        await self._registered()
        change = registration_pb2.DeviceRemoval(device_id=check_id(device_id, "device_id")).SerializeToString()
        await self._session.change(
            "/sealpush.v1.Registration/RemoveDevice",
            self._channels.registration.RemoveDevice,
            lambda proof: registration_pb2.RemoveDeviceRequest(change=change, proof=proof),
            change,
            self._session.deadline(),
        )

    async def notices(self) -> list[DeviceNotice]:
        """What the person was not told, or has not dismissed, about their devices; oldest first."""
        await self._prepare()
        return await self._store(lambda keystore: keystore.notices())

    async def dismiss_notices(self, notices: Iterable[DeviceNotice]) -> None:
        """Forget notices that the person has seen."""
        numbers = [each.number for each in notices]
        await self._prepare()
        await self._store(lambda keystore: keystore.dismiss_notices(numbers))

    # --- upkeep ---

    async def maintain(self) -> None:
        """What is due daily: a new signed prekey every 7 days, more one-time prekeys, the root's revocation list, forgetting what has run
        out, and the device log.

        `drain()`, `on_wake()` and streams do it by themselves when it is due; calling it more often is harmless.
        """
        await self._registered()
        await self._upkeep.do(self._session.deadline())
        await self._devices.check(self._session.deadline())

    async def diagnose(self, deadline: float = 5.0) -> Diagnosis:
        """What works and what does not, found out by harmless calls within `deadline` seconds. Raises KeystoreError only."""
        await self._prepare()
        limit = Deadline.after(self._clock, deadline)
        registration = self._who.registration
        challenge = registration_pb2.GetChallengeRequest(device_id=registration.device_id if registration else bytes(16))
        profile = accounts_pb2.GetSenderProfileRequest(sender_id=PLATFORM_ENTRY)
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
        authenticated, registration_lock = False, None
        if registration is not None:
            with contextlib.suppress(CallFailed):
                authenticated = bool(await self._session.bearer(limit))
                registration_lock = await self._registration_lock(limit)
        signed = await self._store(lambda keystore: keystore.newest_signed_prekey())
        return Diagnosis(
            registered=registration is not None,
            device_id=registration.device_id if registration else None,
            app_id=self.app_id,
            authenticated=authenticated,
            ended=self._session.ended,
            registration_lock=registration_lock,
            reach=reach,
            clock_offset_ms=self._time.offset_ms,
            acknowledgements_waiting=len(await self._store(lambda keystore: keystore.pending_acknowledgements())),
            deliveries_held=len(self._live.held),
            signed_prekey_age_ms=None if signed is None else self._time.now_ms() - signed.created_at_ms,
            one_time_prekeys=await self._store(lambda keystore: keystore.prekey_count(PrekeyKind.ONE_TIME)),
            last_error=self._trouble.last,
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

    async def _prepare(self) -> None:
        """Pin the root and read what is kept, once."""
        if self._prepared:
            return

        def read(keystore: Keystore) -> tuple[IdentityKey | None, DeviceRegistration | None, int | None, int]:
            keystore.pin_root(self._root_public_key)
            return keystore.identity(), keystore.registration(), keystore.clock_offset_ms(), keystore.proven_time_ms()

        async with self._preparing:
            if not self._prepared:
                self._who.identity, self._who.registration, self._time.offset_ms, self._time.proven_ms = await self._store(read)
                await self._upkeep.load()
                self._prepared = True

    async def _registered(self) -> None:
        """Raises NotRegisteredHere."""
        await self._prepare()
        self._who.registered()

    async def _tell(self, message: Message) -> None:
        await _hand_to(self._on_message, message, "on_message", "the message is in the inbox")

    async def _tell_notice(self, notice: DeviceNotice) -> None:
        await _hand_to(self._on_notice, notice, "on_notice", "the notice stands in notices()")


async def _hand_to(callback: Callable[[Handed], Awaitable[None] | None] | None, what: Handed, name: str, kept: str) -> None:
    """Call what the app gave; its failure is the app's own."""
    if callback is None:
        return
    try:
        done = callback(what)
        if inspect.isawaitable(done):
            await done
    except Exception as error:
        # The kind only: an exception of the app may quote the content.
        log.error("%s failed with %s; %s", name, type(error).__name__, kept)
