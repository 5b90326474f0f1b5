"""The gRPC side of registration: who, parse, decide, answer. Protobuf stops here and in `parsing`."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from prometheus_client import Counter

from sealpush.ids import ID_BYTES, AppId, DeviceId, RegistrationId, SubscriberId, is_app_id, uuid7
from sealpush.keys import SignedPrekey
from sealpush.model import Reason
from sealpush.proofs import challenge_proof, registration_proof, verify_proof
from sealpush.suites import SUITE_X25519
from sealpush.v1 import common_pb2, registration_pb2, registration_pb2_grpc
from sealpushd.platform import fields, rpc
from sealpushd.platform.addresses import address_subject
from sealpushd.platform.batching import NaturalBatcher
from sealpushd.platform.clock import Clock, to_ms
from sealpushd.platform.errors import (
    Aborted,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    ServiceError,
    Unauthenticated,
    wait_in_words,
)
from sealpushd.platform.limits import (
    CODES_PER_ADDRESS,
    CODES_PER_NUMBER,
    CODES_PER_NUMBER_DAY,
    CODES_PER_PREFIX,
    LOCK_CHANGES_PER_DEVICE,
    RIGHT_PINS_PER_LOCK,
    Counted,
    Limiter,
    Taken,
)
from sealpushd.platform.passwords import Argon2
from sealpushd.platform.tokens import DeviceCaller, ServiceKey
from sealpushd.registration import parsing, rules
from sealpushd.registration.codes import CODE_LENGTH, Code, CodeChannel, CodeUnconfirmed
from sealpushd.registration.outbox import Outbox
from sealpushd.registration.peers import App, Apps, DeviceLog, LoggedDevice
from sealpushd.registration.phones import Numbers, PhoneNumber
from sealpushd.registration.rules import Lock, NewDevice, Pin, Query, Resolved
from sealpushd.registration.store import Answered, PendingRegistration, RegistrationStore, StartedRegistration
from sealpushd.v1 import directory_pb2, directory_pb2_grpc

# Another registration of the same number may change the facts between decision and commit; more than twice is no accident.
BIND_ATTEMPTS: Final = 3
PREFERENCES_PAGE_DEFAULT: Final = 100
PREFERENCES_PAGE_MAX: Final = 500
# As the proto promises.
STOPPED_MAX: Final = 1000
NO_ID: Final = bytes(ID_BYTES)

_METHOD: Final = "/sealpush.v1.Registration/"

LOCKED = Counter("sealpush_registration_locked", "Registrations with the right code that the lock refused, by cause.", ["cause"])
# From the beginning, so that an alert on it does not miss the first.
for _cause in ("no_pin", "wrong_pin", "too_many"):
    LOCKED.labels(_cause)


class RegistrationService(registration_pb2_grpc.RegistrationServicer):
    """Public: how an app instance becomes a recipient and says what changes."""

    def __init__(
        self,
        store: RegistrationStore,
        numbers: Numbers,
        limiter: Limiter,
        codes: CodeChannel,
        apps: Apps,
        devices: DeviceLog,
        outbox: Outbox,
        key: ServiceKey,
        clock: Clock,
        code_lifetime: timedelta,
    ) -> None:
        self._store = store
        self._numbers = numbers
        self._limiter = limiter
        self._codes = codes
        self._apps = apps
        self._devices = devices
        self._outbox = outbox
        self._key = key
        self._clock = clock
        self._code_lifetime = code_lifetime
        self._argon2 = Argon2()
        self._identities: NaturalBatcher[DeviceId, bytes | None] = NaturalBatcher(store.identities)
        self._challenges: NaturalBatcher[Answered, DeviceCaller | None] = NaturalBatcher(self._take_challenges)

    # --- registering ---

    async def StartRegistration(
        self, request: registration_pb2.StartRegistrationRequest, context: rpc.Context
    ) -> registration_pb2.StartRegistrationResponse:
        phone = self._numbers.parse(request.phone)
        if phone is None:
            raise InvalidRequest(parsing.PHONE_HELP, field="phone")
        locale = rules.check_locale(request.locale)
        app = await self._known_app(request.app_id)
        counted = self._codes_counted(phone)
        # First, and counting nothing: who is over a limit costs no row.
        await self._limiter.check(*counted)
        started, code = self._new_registration(app, phone)
        wait = await self._store.start(started)
        if wait is not None:
            message = f"a code was sent to this number a moment ago; ask for another in {wait_in_words(wait)}"
            raise LimitExceeded(message, retry_after=wait)
        await self._send(started, code.text(app.name, locale), counted)
        response = registration_pb2.StartRegistrationResponse(registration_id=started.registration_id, code_length=CODE_LENGTH)
        response.expires_at.FromDatetime(started.expires_at)
        response.resend_at.FromDatetime(started.created_at + rules.RESEND_AFTER)
        response.server_time.FromDatetime(self._clock.now())
        return response

    async def _known_app(self, app_id: str) -> App:
        app = await self._apps.get(AppId(app_id)) if is_app_id(app_id) else None
        if app is None:
            raise InvalidRequest("no such app", field="app_id")
        return app

    def _codes_counted(self, phone: PhoneNumber) -> tuple[Counted, ...]:
        """What a code counts for, once it was sent."""
        # Keyed hashes: numbers are few enough to be guessed from a plain hash.
        number, prefix = self._store.phone_lookup(phone).hex(), self._store.identifier_lookup(phone.prefix, "phone prefix").hex()
        return (
            Counted(CODES_PER_ADDRESS, address_subject(rpc.caller_address())),
            Counted(CODES_PER_NUMBER, number),
            Counted(CODES_PER_NUMBER_DAY, number),
            Counted(CODES_PER_PREFIX, prefix),
        )

    async def _send(self, started: StartedRegistration, text: str, counted: Sequence[Counted]) -> None:
        """Count the code and send it. Where none is on its way, the number need not wait for another; where certainly none is, nothing was
        counted. A code of which nobody knows counts: else a gateway that answers too late would let a number be flooded."""
        taken: list[Taken] = []
        try:
            taken = await self._limiter.take(*counted)
            await self._codes.send(started.phone, text)
        except ServiceError as e:
            await self._store.drop_registration(started.registration_id)
            if not isinstance(e, CodeUnconfirmed):
                await self._limiter.give_back(taken)
            raise

    def _new_registration(self, app: App, phone: PhoneNumber) -> tuple[StartedRegistration, Code]:
        code, now = Code.fresh(), self._clock.now()
        registration_id = RegistrationId(uuid7())
        started = StartedRegistration(
            registration_id=registration_id,
            app_id=app.app_id,
            phone=phone,
            code_hash=self._store.code_hash(registration_id, code.digits),
            new_subscriber_id=SubscriberId(uuid7()),
            created_at=now,
            expires_at=now + self._code_lifetime,
        )
        return started, code

    async def ConfirmRegistration(
        self, request: registration_pb2.ConfirmRegistrationRequest, context: rpc.Context
    ) -> registration_pb2.ConfirmRegistrationResponse:
        now = self._clock.now()
        registration_id = RegistrationId(fields.id16(request.registration_id, "registration_id"))
        device_id = DeviceId(fields.id16(request.device_id, "device_id"))
        identity = parsing.identity_key(request.identity_public_key)
        min_suite = request.min_suite or SUITE_X25519
        prekey = parsing.signed_prekey(request.signed_prekey, device_id, identity, min_suite, to_ms(now))
        device = NewDevice(device_id, identity, parsing.new_installation(request.installation))
        pin = rules.typed_pin(request.pin)

        pending = await self._proven(registration_id, request.code, now)
        if not verify_proof(identity, registration_proof(registration_id, identity, pending.app_id), request.proof):
            raise InvalidRequest("the registration is not signed by the identity key", field="proof")
        subscriber_id = await self._bind(registration_id, pending, device, prekey, min_suite, pin, now)

        response = registration_pb2.ConfirmRegistrationResponse(subscriber_id=subscriber_id)
        response.server_time.FromDatetime(self._clock.now())
        return response

    async def _proven(self, registration_id: RegistrationId, digits: str, now: datetime) -> PendingRegistration:
        """The registration whose code this is."""
        pending = await self._store.take_attempt(registration_id, now, now + self._code_lifetime)
        if pending is None:
            raise FailedPrecondition("the code has expired or was tried too often; start again")
        if not hmac.compare_digest(self._store.code_hash(registration_id, digits), pending.code_hash):
            left = {"attempts_left": str(pending.attempts_left)}
            raise InvalidRequest("the code is wrong", field="code", metadata=left)
        await self._store.return_attempt(registration_id)
        return pending

    async def _bind(
        self,
        registration_id: RegistrationId,
        pending: PendingRegistration,
        device: NewDevice,
        prekey: SignedPrekey,
        min_suite: int,
        pin: Pin | None,
        now: datetime,
    ) -> SubscriberId:
        """The subscriber the device belongs to from now on: in its device log, then here, then told to whom it concerns."""
        opened: Lock | None = None
        for _ in range(BIND_ATTEMPTS):
            facts = await self._store.facts(pending.phone_lookup, device.device_id, now)
            rules.check_identity(facts.own, device.identity_public_key, pending.app_id)
            repeated = rules.bound_before(facts.own, registration_id)
            if repeated is not None:
                return repeated
            if pending.is_used:
                raise FailedPrecondition("the code was used; start again")
            lock, until = facts.lock, rules.locked_until(facts, now=now)
            if lock is not None and until is not None and lock != opened:
                await self._open(lock, until, pin, now)
                opened = lock
            await self._outbox.settle(device.device_id)
            binding = rules.decide_binding(facts, device.device_id, pending.new_subscriber_id, now=now)
            # The log keeps what is entered even if the caller leaves before it is bound: else one code would fill it with devices.
            if not await self._store.claim_registration(registration_id, device.device_id):
                facts = await self._store.facts(pending.phone_lookup, device.device_id, now)
                repeated = rules.bound_before(facts.own, registration_id)
                if repeated is not None:
                    return repeated
                raise FailedPrecondition("the code was used, or another device gave it first; start again")
            logged = LoggedDevice(binding.subscriber_id, device.device_id, device.identity_public_key, prekey, min_suite)
            refusal = await self._devices.put(logged)
            if refusal:
                raise InvalidRequest(refusal, field="signed_prekey")
            closures = await self._store.bind(registration_id, pending, device, facts, binding, now=now)
            if closures is not None:
                await self._outbox.tell(closures)
                return binding.subscriber_id
        raise Aborted("other registrations of this number or device are going on; try again")

    async def _open(self, lock: Lock, until: datetime, pin: Pin | None, now: datetime) -> None:
        """Returns when the PIN opens the lock, which is in force until then. Raises RegistrationLocked, LimitExceeded."""
        if pin is None:
            LOCKED.labels("no_pin").inc()
            raise rules.locked(lock, until, pin_given=False, now=now)
        right_pins = Counted(RIGHT_PINS_PER_LOCK, lock.subscriber_id.hex())
        # Who has none left takes no turn; then the turn, so that who waits for one in vain has lost no attempt.
        await self._limiter.check(right_pins)
        self._check_pin_attempts(lock, now)
        async with self._argon2.turn(address_subject(rpc.caller_address())):
            await self._limiter.check(right_pins)
            try:
                taken = await self._store.take_pin_attempt(lock, now)
            except LimitExceeded:
                LOCKED.labels("too_many").inc()
                raise
            if taken is None:
                raise Aborted("the registration lock was changed just now; try again")
            if await self._argon2.is_password(lock.pin_hash, self._store.pin_secret(pin)):
                await self._limiter.add(right_pins)
                await self._store.forget_pin_attempts(lock)
                return
        LOCKED.labels("wrong_pin").inc()
        raise rules.locked(taken, until, pin_given=True, now=now)

    @staticmethod
    def _check_pin_attempts(lock: Lock, now: datetime) -> None:
        try:
            rules.take_pin_attempt(lock, now=now)
        except LimitExceeded:
            LOCKED.labels("too_many").inc()
            raise

    # --- authenticating ---

    async def GetChallenge(
        self, request: registration_pb2.GetChallengeRequest, context: rpc.Context
    ) -> registration_pb2.GetChallengeResponse:
        device_id = DeviceId(fields.id16(request.device_id, "device_id"))
        random = secrets.token_bytes(rules.CHALLENGE_RANDOM_BYTES)
        challenge = rules.make_challenge(device_id, random, self._store.challenge_mac, now=self._clock.now())
        return registration_pb2.GetChallengeResponse(challenge=challenge)

    async def Authenticate(
        self, request: registration_pb2.AuthenticateRequest, context: rpc.Context
    ) -> registration_pb2.AuthenticateResponse:
        device_id = DeviceId(fields.id16(request.device_id, "device_id"))
        caller = await self._answered(device_id, request.challenge, request.signature)
        if caller is None:
            # One answer for every cause: an unknown device, a foreign or an old answer.
            raise Unauthenticated("the answer does not prove this device; ask for a new challenge, or register again")
        token, ends_at = self._key.device_token(caller)
        response = registration_pb2.AuthenticateResponse(access_token=token)
        response.expires_at.seconds = ends_at
        response.server_time.FromDatetime(self._clock.now())
        return response

    async def _answered(self, device_id: DeviceId, challenge: bytes, signature: bytes) -> DeviceCaller | None:
        issued_us = rules.challenge_issued_us(challenge, device_id, self._store.challenge_mac, now=self._clock.now())
        if issued_us is None:
            return None
        identity = await self._identities.submit(device_id)
        if identity is None or not verify_proof(identity, challenge_proof(challenge, device_id), signature):
            return None
        return await self._challenges.submit(Answered(device_id, issued_us))

    async def _take_challenges(self, answered: Sequence[Answered]) -> list[DeviceCaller | None]:
        now = self._clock.now()
        return await self._store.take_challenges(answered, now, rules.latest_challenge_us(now))

    # --- changing ---

    async def UpdateInstallation(
        self, request: registration_pb2.UpdateInstallationRequest, context: rpc.Context
    ) -> registration_pb2.UpdateInstallationResponse:
        caller = rpc.require_device()
        counter = parsing.checked_counter(caller, request.proof, _METHOD + "UpdateInstallation", request.change)
        change = parsing.installation_change(parsing.signed_change(registration_pb2.Installation, request.change))
        await self._store.change_installation(caller.device_id, counter, change, self._clock.now())
        return registration_pb2.UpdateInstallationResponse()

    async def Unregister(self, request: registration_pb2.UnregisterRequest, context: rpc.Context) -> registration_pb2.UnregisterResponse:
        caller = rpc.require_device()
        counter = parsing.checked_counter(caller, request.proof, _METHOD + "Unregister", b"")
        await self._outbox.tell(await self._store.end_installation(caller.device_id, counter, self._clock.now()))
        return registration_pb2.UnregisterResponse()

    async def RemoveDevice(
        self, request: registration_pb2.RemoveDeviceRequest, context: rpc.Context
    ) -> registration_pb2.RemoveDeviceResponse:
        caller = rpc.require_device()
        counter = parsing.checked_counter(caller, request.proof, _METHOD + "RemoveDevice", request.change)
        device_id = DeviceId(fields.id16(parsing.signed_change(registration_pb2.DeviceRemoval, request.change).device_id, "device_id"))
        rules.check_removal(caller.device_id, device_id)
        listed = await self._devices.listed(caller.device_id, device_id)
        closures = await self._store.remove_installation(caller.device_id, counter, device_id, listed, self._clock.now())
        await self._outbox.tell(closures)
        return registration_pb2.RemoveDeviceResponse()

    async def ListPreferences(
        self, request: registration_pb2.ListPreferencesRequest, context: rpc.Context
    ) -> registration_pb2.ListPreferencesResponse:
        caller = rpc.require_device()
        size = fields.number(request.page_size, "page_size", PREFERENCES_PAGE_MAX) or PREFERENCES_PAGE_DEFAULT
        after = fields.id16(request.page_token, "page_token") if request.page_token else NO_ID
        found = await self._store.preferences(caller.device_id, after, size + 1)
        page = found[:size]
        return registration_pb2.ListPreferencesResponse(
            preferences=[
                registration_pb2.Preference(
                    sender_id=one.sender_id, block_all=one.block_all, block_advertising=one.block_advertising, mute=one.mute
                )
                for one in page
            ],
            next_page_token=page[-1].sender_id if len(found) > size else b"",
            registration_lock=await self._store.has_lock(caller.device_id),
        )

    async def SetPreference(
        self, request: registration_pb2.SetPreferenceRequest, context: rpc.Context
    ) -> registration_pb2.SetPreferenceResponse:
        caller = rpc.require_device()
        counter = parsing.checked_counter(caller, request.proof, _METHOD + "SetPreference", request.change)
        preference = parsing.preference(parsing.signed_change(registration_pb2.Preference, request.change))
        closures = await self._store.set_preference(caller.device_id, counter, preference, self._clock.now())
        # While the mailbox is away nothing is listed as stopped; it is stopped when the mailbox is back.
        stopped = await self._outbox.tell(closures)
        return registration_pb2.SetPreferenceResponse(
            stopped=[
                common_pb2.StoppedDelivery(
                    message_id=one.message_id,
                    device_id=one.device_id,
                    stop_point=common_pb2.StopPoint.ValueType(one.stop_point),
                    state=common_pb2.State.ValueType(one.state),
                )
                for one in stopped[:STOPPED_MAX]
            ]
        )

    async def SetRegistrationLock(
        self, request: registration_pb2.SetRegistrationLockRequest, context: rpc.Context
    ) -> registration_pb2.SetRegistrationLockResponse:
        caller = rpc.require_device()
        counter = parsing.checked_counter(caller, request.proof, _METHOD + "SetRegistrationLock", request.change)
        pin = parsing.new_pin(parsing.signed_change(registration_pb2.RegistrationLock, request.change))
        pin_hash = None
        if pin is not None:
            changes = Counted(LOCK_CHANGES_PER_DEVICE, caller.device_id.hex())
            await self._limiter.check(changes)
            # A device that has proven itself waits for no stranger's PINs.
            async with self._argon2.turn(address_subject(rpc.caller_address()), known=True):
                await self._limiter.take(changes)
                pin_hash = await self._argon2.hash(self._store.pin_secret(pin))
        await self._store.set_lock(caller.device_id, counter, pin_hash, self._clock.now())
        return registration_pb2.SetRegistrationLockResponse()


class DirectoryService(directory_pb2_grpc.DirectoryServicer):
    """Mesh: recipients to devices, devices to push tokens. The hottest calls of the suite: one statement a batch."""

    def __init__(self, store: RegistrationStore, numbers: Numbers, clock: Clock) -> None:
        self._store = store
        self._numbers = numbers
        self._clock = clock
        # Two in flight: one is parsed and answered here while PostgreSQL works on the other.
        self._resolving: NaturalBatcher[Query, Resolved | Reason] = NaturalBatcher(store.resolve, in_flight_max=2)

    async def Resolve(self, request: directory_pb2.ResolveRequest, context: rpc.Context) -> directory_pb2.ResolveResponse:
        parsed = fields.each_alone(request.queries, "queries", lambda query: parsing.query(query, self._store, self._numbers))
        answers = iter(await self._resolving.submit_many([query for query in parsed if not isinstance(query, InvalidRequest)]))
        response = directory_pb2.ResolveResponse()
        for query in parsed:
            _add_result(response.results.add(), query if isinstance(query, InvalidRequest) else next(answers))
        return response

    async def GetPushTargets(
        self, request: directory_pb2.GetPushTargetsRequest, context: rpc.Context
    ) -> directory_pb2.GetPushTargetsResponse:
        response = directory_pb2.GetPushTargetsResponse()
        for target in await self._store.push_targets(fields.ids(request.device_ids, "device_ids")):
            entry = response.targets.add(
                device_id=target.device_id,
                push_token=target.push_token.value,
                environment=target.environment,
                topic=target.topic,
                platform=target.platform,
                app_id=target.app_id,
                token_gone=target.token_gone,
            )
            if target.registered_at is not None:
                entry.registered_at.CopyFrom(parsing.timestamp(target.registered_at))
        return response

    async def ReportDeadTokens(
        self, request: directory_pb2.ReportDeadTokensRequest, context: rpc.Context
    ) -> directory_pb2.ReportDeadTokensResponse:
        now = self._clock.now()
        dead = fields.each(request.dead_tokens, "dead_tokens", lambda said: parsing.dead_token(said, now))
        return directory_pb2.ReportDeadTokensResponse(forgotten=await self._store.forget_tokens(dead, now))


def _add_result(result: directory_pb2.ResolveResult, answer: Resolved | Reason | InvalidRequest) -> None:
    if isinstance(answer, InvalidRequest):
        result.invalid = answer.message
    elif isinstance(answer, Reason):
        result.not_registered = common_pb2.ReasonCode.ValueType(answer)
    else:
        resolved = result.resolved
        resolved.subscriber_id = answer.subscriber_id
        if answer.block_all:
            resolved.block_all = True
        if answer.block_advertising:
            resolved.block_advertising = True
        if answer.mute:
            resolved.mute = True
        add = resolved.devices.add
        for device_id, platform, push_reason in answer.devices:
            add(device_id=device_id, platform=platform, push_reason=push_reason)
