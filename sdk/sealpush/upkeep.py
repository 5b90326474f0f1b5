"""A device's keys over time: making and signing prekeys, and what is due daily; and the look at the device log, hourly.

A signed prekey serves 7 days; one-time prekeys are topped up when few are left at the service. Private halves are stored
before anybody hears of the public ones. The root's revocation list is asked for as often.

A store out of a back-up lacks what was made since, and would give ids a second time. The service knows ids that such a store never gave:
then the device leaps above them, makes new prekeys, and has the service forget those from before.
"""

import logging
from dataclasses import replace
from typing import Final

from sealpush.devices import Devices
from sealpush.entries import Revocations
from sealpush.errors import SealpushError
from sealpush.floor import confirm, floor, raise_to
from sealpush.ids import DeviceId
from sealpush.keys import (
    DAY_MS,
    ONE_TIME_PREKEYS_REFILL_BELOW,
    SIGNED_PREKEY_ROTATION_MS,
    IdentityKey,
    PrekeyKind,
    PrekeyPrivate,
    SignedPrekey,
    generate_prekey,
    prekey_proof,
    verify_ed25519,
)
from sealpush.keystore import Keystore
from sealpush.local import FUTURE_SKEW_MS, ServerTime, Store, Trouble, Who
from sealpush.retry import Deadline
from sealpush.session import Session
from sealpush.suites import SUITE_X25519, SUITES
from sealpush.v1 import keys_pb2
from sealpush.wire import read_prekey, wire_prekey

log = logging.getLogger("sealpush")

MAINTENANCE_S_MIN: Final = 2.0  # not begun with less time than this
MAINTENANCE_PERIOD_MS: Final = DAY_MS
# Stop making more when uploads keep failing. Of those that were handed out and never used, which stay 90 + 35 days, each sender
# can leave 10 a day here: enough for four that do nothing else, in 1 MB; in suite 2, whose public halves are kept too, in 7 MB.
ONE_TIME_PRIVATE_MAX: Final = 5000

HASTENED_PAUSE_S: Final = 3600.0  # a sender that names prekeys that never were costs a call an hour

_UPLOADED_PREKEY: Final = "prekey.uploaded"  # a fact in the store: the id of the signed prekey that the service has
_LOST_PREKEYS: Final = "prekey.lost"  # ids up to this one, 4 bytes, are those of a store that is gone; until the service has forgotten them
_MAINTAINED_AT: Final = "maintained.at"


class Upkeep:
    """What is due daily. `suite` is what new prekeys are of, `one_time_prekeys` how many to keep at the service."""

    def __init__(
        self,
        session: Session,
        store: Store,
        who: Who,
        time: ServerTime,
        devices: Devices,
        revocations: Revocations,
        trouble: Trouble,
        *,
        suite: int,
        one_time_prekeys: int,
    ) -> None:
        self._session = session
        self._store = store
        self._who = who
        self._time = time
        self._devices = devices
        self._trouble = trouble
        self._suite = suite
        self._revocations = revocations
        self._one_time_prekeys = one_time_prekeys
        self._done_at_ms = 0
        self._hastened = False
        self._began_at: float | None = None

    async def load(self) -> None:
        """Read when it was done last."""
        done_at, kept = await self._store(lambda keystore: (keystore.fact(_MAINTAINED_AT), floor(keystore)))
        if self._suite < kept.suite:
            log.warning("this device was raised to suite %d, which it keeps: suite %d is lower", kept.suite, self._suite)
        self._done_at_ms = int.from_bytes(done_at or b"", "big")
        await self._devices.load()

    async def do(self, deadline: Deadline) -> None:
        """Learn what was revoked, rotate, top up, forget what has run out. Repeating it is harmless. Raises CallFailed, KeystoreError."""
        self._began_at = self._time.steady_s()
        # Before what may fail: who keeps a revocation from a phone must not be anybody who can make the phone's uploads fail.
        await self._revocations.refresh(Deadline.after(deadline.clock, deadline.remaining_s() / 2))
        await self._session.know_time(deadline)
        state = await self._session.call(self._session.channels.keys.GetPrekeyState, keys_pb2.GetPrekeyStateRequest(), deadline)
        lost = await self._lost_prekeys(state)
        self._hastened = False  # only now: what failed before is tried again
        signed, is_noted, rising = await self._signed_prekey(lost)
        # A service whose database came out of a back-up has another one than it once said it took, and perhaps a lower suite.
        rotated = not is_noted or state.signed_prekey_id != signed.prekey_id
        begins_anew = rising or (lost and rotated) or 0 < state.min_suite < signed.suite
        left = 0 if begins_anew else state.one_time_prekeys_left
        upload = keys_pb2.PrekeyUpload(prekeys=map(wire_prekey, await self._one_time(signed.suite, left)))
        if rotated:
            upload.prekeys.insert(0, wire_prekey(signed))
            upload.min_suite = signed.suite
            upload.forget_former = lost > 0
        if upload.prekeys:
            change = upload.SerializeToString()
            await self._session.change(
                "/sealpush.v1.Keys/UploadPrekeys",
                self._session.channels.keys.UploadPrekeys,
                lambda proof: keys_pb2.UploadPrekeysRequest(change=change, proof=proof),
                change,
                deadline,
            )
        now_ms = self._time.now_ms()
        # What is forgotten does not come back when a clock is set right: only what has run out by both clocks goes.
        run_out_ms = min(now_ms, self._time.local_ms())

        def finish(keystore: Keystore) -> None:
            if rotated:
                set_uploaded(keystore, signed, now_ms)
                keystore.retire_signed_prekeys(signed.prekey_id, self._time.bounded_ms())
            if lost:
                keystore.set_fact(_LOST_PREKEYS, None)
            keystore.purge(run_out_ms)
            keystore.set_fact(_MAINTAINED_AT, now_ms.to_bytes(8, "big"))

        await self._store(finish)
        self._done_at_ms = now_ms

    async def do_if_due(self, deadline: Deadline, longest_s: float) -> None:
        """Messages matter more: what fails here is noted, and tried again the next time."""
        await self._devices.check_if_due(deadline, longest_s)
        remaining_s = min(deadline.remaining_s(), longest_s)
        is_due = abs(self._time.now_ms() - self._done_at_ms) >= MAINTENANCE_PERIOD_MS or self.is_hastened
        if not is_due or remaining_s < MAINTENANCE_S_MIN:
            return
        try:
            await self.do(Deadline.after(deadline.clock, remaining_s))
        except SealpushError as error:
            self._trouble.note(error)

    def hasten(self) -> None:
        """A prekey is missing here: this may be a store out of a back-up, and should not wait for the next day."""
        self._hastened = True

    @property
    def is_hastened(self) -> bool:
        """Whether it is due before its day has passed."""
        return self._hastened and (self._began_at is None or self._time.steady_s() - self._began_at >= HASTENED_PAUSE_S)

    async def _lost_prekeys(self, state: keys_pb2.GetPrekeyStateResponse) -> int:
        """Up to which id the prekeys are those of a store that is gone, by what the service knows; 0: none are."""
        known = self._own(state)
        noted, given = await self._store(lambda keystore: (keystore.fact(_LOST_PREKEYS), keystore.highest_prekey_id()))
        if noted is not None:
            lost = int.from_bytes(noted, "big")
        elif known is not None and known.prekey_id > given:
            lost = known.prekey_id
            log.warning("the service knows prekeys of this device that are not here: its store came out of a back-up; making new ones")
            await self._devices.tell_restored()  # first: once the ids have leaped, nothing shows any more
        else:
            return 0

        def leap(keystore: Keystore) -> None:
            # Each again and again until the service has forgotten the lost ones: whoever was interrupted here goes on.
            keystore.set_fact(_LOST_PREKEYS, lost.to_bytes(4, "big"))
            keystore.raise_prekey_id(lost)
            if known is not None:
                raise_to(keystore, min(state.min_suite, max(SUITES)))  # it may be a copy from before a rise

        await self._store(leap)
        return lost

    def _own(self, state: keys_pb2.GetPrekeyStateResponse) -> SignedPrekey | None:
        """The prekey with the highest id that the service knows, if this device signed it, and with it the lowest suite. No server can make
        one, and so none can use up the ids, or raise the suite."""
        identity, registration = self._who.registered()
        try:
            known = read_prekey(state.highest_prekey, PrekeyKind(state.highest_prekey.kind))
            proof = prekey_proof(known, registration.device_id, state.min_suite)
        except ValueError:
            return None
        return known if verify_ed25519(identity.public_key, proof, known.signature) else None

    async def _signed_prekey(self, lost: int) -> tuple[SignedPrekey, bool, bool]:
        """The signed prekey to use from now on, whether it is noted that the service has it, and whether its suite is new to the service.

        None of those with an id up to `lost`.
        """
        identity, registration = self._who.registered()
        now_ms = self._time.bounded_ms()

        def current(keystore: Keystore) -> tuple[PrekeyPrivate, bytes | None, bool]:
            suite = raise_to(keystore, self._suite)
            newest = keystore.newest_signed_prekey()
            if newest is not None and newest.prekey_id <= lost:
                newest = None
            if newest is None or newest.suite != suite or not -FUTURE_SKEW_MS <= now_ms - newest.created_at_ms < SIGNED_PREKEY_ROTATION_MS:
                newest = _make_signed_prekey(keystore, identity, registration.device_id, now_ms, suite)
            return newest, keystore.fact(_UPLOADED_PREKEY), suite > SUITE_X25519 and floor(keystore).raised_at_ms is None

        prekey, uploaded, rising = await self._store(current)
        signed = _sign_prekey(identity, registration.device_id, prekey)
        return signed, _prekey_id_bytes(signed) == uploaded, rising

    async def _one_time(self, suite: int, left: int) -> list[SignedPrekey]:
        """New one-time prekeys, if the service has few left."""
        identity, registration = self._who.registered()
        wanted = self._one_time_prekeys
        if left >= min(ONE_TIME_PREKEYS_REFILL_BELOW, wanted):
            return []
        if await self._store(lambda keystore: keystore.prekey_count(PrekeyKind.ONE_TIME)) >= ONE_TIME_PRIVATE_MAX:
            return []
        now_ms = self._time.bounded_ms()
        return await self._store(lambda keystore: _make_one_time_prekeys(keystore, identity, registration.device_id, now_ms, suite, wanted))


def first_signed_prekey(keystore: Keystore, identity: IdentityKey, device_id: DeviceId, now_ms: int, suite: int) -> SignedPrekey:
    """The one that an earlier attempt made, so that a repeated registration is the same; a new one if that is old, was made by a
    clock that ran ahead, or is of a lower suite."""
    suite = raise_to(keystore, suite)
    known = keystore.newest_signed_prekey()
    if known is None or known.suite != suite or not 0 <= now_ms - known.created_at_ms < SIGNED_PREKEY_ROTATION_MS:
        known = _make_signed_prekey(keystore, identity, device_id, now_ms, suite)
    return _sign_prekey(identity, device_id, known)


def _sign_prekey(identity: IdentityKey, device_id: DeviceId, prekey: PrekeyPrivate) -> SignedPrekey:
    """The public half of a stored prekey, whose suite is the lowest that its device accepts; signing is deterministic, so a repeated
    upload has the same bytes."""
    unsigned = SignedPrekey(prekey.suite, prekey.prekey_id, prekey.kind, prekey.public_key, prekey.created_at_ms, prekey.expires_at_ms, b"")
    return replace(unsigned, signature=identity.sign(prekey_proof(unsigned, device_id, min_suite=prekey.suite)))


def set_uploaded(keystore: Keystore, prekey: SignedPrekey, now_ms: int) -> None:
    """Note that the service has this signed prekey, and with it the lowest suite."""
    keystore.set_fact(_UPLOADED_PREKEY, _prekey_id_bytes(prekey))
    confirm(keystore, prekey.suite, now_ms)


def _prekey_id_bytes(prekey: SignedPrekey) -> bytes:
    return prekey.prekey_id.to_bytes(4, "big")


def _make_signed_prekey(keystore: Keystore, identity: IdentityKey, device_id: DeviceId, now_ms: int, suite: int) -> PrekeyPrivate:
    prekey_id = keystore.reserve_prekey_ids(1)
    private, _ = generate_prekey(
        identity, device_id, prekey_id=prekey_id, kind=PrekeyKind.SIGNED, now_ms=now_ms, suite=suite, min_suite=suite
    )
    keystore.add_prekeys([private])
    return private


def _make_one_time_prekeys(
    keystore: Keystore, identity: IdentityKey, device_id: DeviceId, now_ms: int, suite: int, count: int
) -> list[SignedPrekey]:
    first = keystore.reserve_prekey_ids(count)
    pairs = [
        generate_prekey(identity, device_id, prekey_id=prekey_id, kind=PrekeyKind.ONE_TIME, now_ms=now_ms, suite=suite, min_suite=suite)
        for prekey_id in range(first, first + count)
    ]
    keystore.add_prekeys([private for private, _ in pairs])
    return [public for _, public in pairs]
