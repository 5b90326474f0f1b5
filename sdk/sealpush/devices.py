"""The person's devices, as one of them knows them: following the device log, telling what changed, vouching.

What is kept is the log itself as far as it was followed. What comes must go on from there; what the service says instead is told to
the person as a broken log, and followed from then on, so that whoever breaks a log once does not add devices unseen ever after. None
of this stops a message: what fails is noted and tried again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from sealpush import errors
from sealpush.devicelog import (
    ENTRIES_MAX,
    DeviceLog,
    DeviceNotice,
    KnownDevice,
    NoticeKind,
    fingerprint,
    new_to,
    notices_of,
    notices_of_another,
)
from sealpush.errors import CallFailed, DeviceLogBroken, KeyRefused, KeystoreBusy, SealpushError
from sealpush.ids import DeviceId, SubscriberId
from sealpush.keys import DAY_MS
from sealpush.keystore import DeviceRegistration, KeptLog, Keystore
from sealpush.local import ServerTime, Store, Trouble, Who
from sealpush.model import moment
from sealpush.proofs import sign_proof, vouch_proof
from sealpush.retry import Deadline
from sealpush.session import Session
from sealpush.v1 import keys_pb2

# A device that is added to read messages wakes the others with the first of them: within this time they have looked.
CHECK_PERIOD_MS: Final = 60 * 60 * 1000
CHECK_FAILED_PAUSE_MS: Final = 5 * 60 * 1000
# A server that has something to hide need not answer. No fault that is repaired lasts so long.
WITHHELD_AFTER_MS: Final = 3 * DAY_MS
CHECK_S_MIN: Final = 1.0  # not begun with less time than this
CHECK_S_MAX: Final = 3.0  # new messages wait for it, once an hour
ROUNDS_MAX: Final = 3  # another process of this device may be as fast; not more often than that

_CHECKED_AT: Final = "devices.checked-at"  # facts in the store
_FAILING_SINCE: Final = "devices.failing-since"

Tell = Callable[[DeviceNotice], Awaitable[None]]
Followed = tuple[DeviceLog, list[DeviceNotice]]  # and what is new to tell


class Devices:
    """Follows the log. `tell` gets what is new, once, after it was stored; it raises nothing."""

    def __init__(self, session: Session, store: Store, who: Who, time: ServerTime, trouble: Trouble, tell: Tell) -> None:
        self._session = session
        self._store = store
        self._who = who
        self._time = time
        self._trouble = trouble
        self._tell = tell
        self._checking = asyncio.Lock()
        self._check_at_ms = 0

    async def load(self) -> None:
        """Read when it was done last."""
        checked_at = await self._store(lambda keystore: keystore.fact(_CHECKED_AT))
        self._check_at_ms = int.from_bytes(checked_at, "big") + CHECK_PERIOD_MS if checked_at else 0

    async def check_if_due(self, deadline: Deadline, longest_s: float) -> None:
        """Messages matter more: what fails here is noted, and tried again after a while."""
        remaining_s = min(deadline.remaining_s(), longest_s, CHECK_S_MAX)
        # By the local clock: the server's is the server's to tell. One that was far ahead must not put it off for long.
        now_ms = self._time.local_ms()
        if 0 < self._check_at_ms - now_ms <= CHECK_PERIOD_MS or remaining_s < CHECK_S_MIN:
            return
        self._check_at_ms = now_ms + CHECK_FAILED_PAUSE_MS
        try:
            try:
                await self.check(Deadline.after(deadline.clock, remaining_s))
            except CallFailed as error:
                self._trouble.note(error)
                await self._withheld(now_ms)
        except SealpushError as error:
            self._trouble.note(error)

    async def _withheld(self, now_ms: int) -> None:
        """Messages came and the log did not: once that has been so for days, the person is told, and again after as long."""

        def note(keystore: Keystore) -> list[DeviceNotice]:
            since = keystore.fact(_FAILING_SINCE)
            passed_ms = 0 if since is None else now_ms - int.from_bytes(since, "big")
            if since is not None and 0 <= passed_ms < WITHHELD_AFTER_MS:
                return []
            keystore.set_fact(_FAILING_SINCE, now_ms.to_bytes(8, "big"))
            if passed_ms < WITHHELD_AFTER_MS:
                return []
            kept = keystore.device_log()
            return keystore.put_device_log(kept, kept, [DeviceNotice(NoticeKind.LOG_WITHHELD, now_ms)]) or []

        for notice in await self._store(note):
            await self._tell(notice)

    async def tell_restored(self) -> None:
        """Tell that this device works with a store out of a back-up; once, until that is dismissed. Raises KeystoreError."""
        notice = DeviceNotice(NoticeKind.RESTORED, self._time.now_ms())

        def note(keystore: Keystore) -> list[DeviceNotice]:
            told = None
            while told is None:  # until no other process followed the log meanwhile
                kept = keystore.device_log()
                told = keystore.put_device_log(kept, kept, [notice])
            return told

        for each in await self._store(note):
            await self._tell(each)

    async def check(self, deadline: Deadline) -> DeviceLog:
        """The log as it is now, kept, and told where it has changed. Raises CallFailed, KeystoreError."""
        async with self._checking:
            log, told = await self._follow_up(deadline)
        # Only now: what is told may ask for the devices.
        for notice in told:
            await self._tell(notice)
        return log

    async def _follow_up(self, deadline: Deadline) -> Followed:
        for _ in range(ROUNDS_MAX):
            followed = await self._follow(deadline)
            if followed is not None:
                await self._checked(self._time.local_ms())
                return followed
        raise KeystoreBusy("another process of this device follows the device log at the same time; try again")

    async def _checked(self, now_ms: int) -> None:
        def note(keystore: Keystore) -> None:
            keystore.set_fact(_CHECKED_AT, now_ms.to_bytes(8, "big"))
            if keystore.fact(_FAILING_SINCE) is not None:
                keystore.set_fact(_FAILING_SINCE, None)

        # First: an app that goes away meanwhile has looked all the same.
        self._check_at_ms = now_ms + CHECK_PERIOD_MS
        await self._store(note)

    async def listed(self, deadline: Deadline) -> list[KnownDevice]:
        """The person's devices now, oldest first. Raises CallFailed, KeystoreError."""
        identity, registration = self._who.registered()
        own = (registration.device_id, identity.public_key)
        log = await self.check(deadline)
        return [
            KnownDevice(
                each.device_id,
                each.identity_public_key,
                moment(each.added_at_ms),
                each.vouched,
                (each.device_id, each.identity_public_key) == own,
            )
            for each in log.devices.values()
        ]

    async def vouch_for(self, device_id: DeviceId, compared: str, deadline: Deadline) -> None:
        """Vouch for the device with the fingerprint that the person compared, and no other. Repeating it is harmless."""
        identity, registration = self._who.registered()
        log = await self.check(deadline)
        listed, own = log.devices.get(device_id), log.devices.get(registration.device_id)
        if listed is None:
            raise errors.NotFound("the person has no such device (any more); read devices() again")
        if "".join(fingerprint([(listed.device_id, listed.identity_public_key)]).split()) != "".join(compared.split()):
            raise KeyRefused("the device has another fingerprint than the one that was compared; do not vouch for it")
        if listed.vouched:
            return
        if own is None or not own.vouched or own.identity_public_key != identity.public_key:
            raise errors.FailedPrecondition("nobody vouches for this device, so it cannot vouch for others; use one that is vouched for")
        proof = vouch_proof(listed.device_id, listed.identity_public_key, own.device_id, listed.added_head)
        request = keys_pb2.VouchDeviceRequest(device_id=device_id, signature=sign_proof(identity, proof))
        await self._session.call(self._session.channels.keys.VouchDevice, request, deadline)
        await self.check(deadline)

    async def _follow(self, deadline: Deadline) -> Followed | None:
        """Read on from what is kept, and keep what comes; None: another process kept something else meanwhile."""
        identity, registration = self._who.registered()
        own, own_key, subscriber_id = registration.device_id, identity.public_key, registration.subscriber_id
        kept = await self._store(lambda keystore: keystore.device_log())
        known = _known(subscriber_id, kept)
        try:
            log, entries = await self._read(subscriber_id, known or DeviceLog.start(subscriber_id), deadline)
            if known is None:
                # The first look at this person's log: what was there before this device, it did not see come.
                new, notices = KeptLog(entries, log.head), notices_of(new_to(own, own_key, entries), own, own_key)
            else:
                new, notices = KeptLog(kept.entries + entries, log.head), notices_of(entries, own, own_key)
        except DeviceLogBroken as error:
            self._trouble.note(error)
            log, new, notices = await self._read_anew(registration, own_key, known, kept, deadline)
        if new == kept and not notices:
            return log, []
        told = await self._store(lambda keystore: keystore.put_device_log(kept, new, notices))
        return None if told is None else (log, told)

    async def _read_anew(
        self, registration: DeviceRegistration, own_key: bytes, known: DeviceLog | None, kept: KeptLog, deadline: Deadline
    ) -> tuple[DeviceLog, KeptLog, list[DeviceNotice]]:
        """What to go on with where the service did not go on from what was known."""
        start, own, now_ms = DeviceLog.start(registration.subscriber_id), registration.device_id, self._time.now_ms()
        if known is not None:
            try:
                log, entries = await self._read(registration.subscriber_id, start, deadline)
            except DeviceLogBroken:
                pass
            else:
                new = KeptLog(entries, log.head)
                if entries[: len(kept.entries)] == kept.entries:  # it does go on from there: only the first answer was wrong
                    return log, new, notices_of(entries[len(kept.entries) :], own, own_key)
                return log, new, notices_of_another(known, log, own, own_key, now_ms)
        return known or start, kept, [DeviceNotice(NoticeKind.LOG_BROKEN, now_ms)]

    async def _read(self, subscriber_id: SubscriberId, log: DeviceLog, deadline: Deadline) -> tuple[DeviceLog, tuple[bytes, ...]]:
        """The log up to its end as the service has it, and the entries that were read. Raises DeviceLogBroken, CallFailed."""
        entries: list[bytes] = []
        while True:
            request = keys_pb2.GetDeviceLogRequest(subscriber_id=subscriber_id, after_seq=log.seq)
            answer = await self._session.call(self._session.channels.keys.GetDeviceLog, request, deadline)
            if log.seq + len(answer.entries) > ENTRIES_MAX:  # before any of them costs anything
                raise DeviceLogBroken(f"the log has more than {ENTRIES_MAX} entries; nobody has so many devices")
            for entry in answer.entries:
                log = log.then(entry)
            entries.extend(answer.entries)
            if log.seq == answer.seq:
                if log.head != answer.head:
                    raise DeviceLogBroken("the service has another history of this person's devices than before")
                return log, tuple(entries)
            if log.seq > answer.seq or not answer.entries:
                raise DeviceLogBroken("the log ends before the end that the service names, or before what was known")


def _known(subscriber_id: SubscriberId, kept: KeptLog) -> DeviceLog | None:
    """The log that is kept; None where none is, or one of the subscriber that this device belonged to before."""
    try:
        log = DeviceLog.read(subscriber_id, kept.entries)
    except DeviceLogBroken:
        return None
    return log if log.head == kept.head else None
