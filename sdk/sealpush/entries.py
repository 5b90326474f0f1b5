"""Who may have signed a message: sender entries and what was revoked of them, signed by the pinned root, kept and asked for.

An entry binds a sender's keys, name and mode. It is verified with the root whenever it comes from the service or from the
store, kept by rising serial, and used within its time only, and only while the newest revocation list known here leaves it.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Final

from sealpush import errors
from sealpush.envelope import Header, content_public_key
from sealpush.errors import CallFailed, EntryRefused, EnvelopeRefused, RevocationsRefused
from sealpush.ids import SenderId
from sealpush.keys import EntryRole, SenderEntry, SenderMode, verify_sender_entry
from sealpush.local import Held, ServerTime, Store, Trouble
from sealpush.retry import Deadline
from sealpush.revocations import RevocationList, verify_revocations
from sealpush.transport import Calls, Channels
from sealpush.v1 import accounts_pb2

PROFILE_PAUSE_S: Final = 60.0  # between two questions about one sender whose present entry does not fit
PROFILE_DEADLINE_S: Final = 5.0  # messages of other senders wait behind it
PROFILE_FAILED_PAUSE_S: Final = 2.0  # after no answer about a sender: a page of messages must not wait for each
ENTRIES_KEPT_MAX: Final = 256  # senders whose entry is kept parsed; more start over
REVOCATIONS_PAUSE_S: Final = 60.0  # between two questions for the list: a page may hold messages of many new senders

PLATFORM_ENTRY: Final = SenderId(bytes(16))  # there is one platform: its entry is cached under this name


@dataclass(frozen=True, slots=True)
class SenderProfile:
    """Who a sender is. Name and modes are certified by the platform's root; colours and logo are not.

    The brand comes from the server alone, which could show another one: let it decorate the name, never replace it. Colours
    are "#rrggbb" or "", the logo is a PNG of 512 x 512 or empty.
    """

    sender_id: SenderId
    name: str
    modes: SenderMode
    brand_colour: str
    brand_text_colour: str
    logo_png: bytes = field(repr=False)


class Revocations:
    """The newest revocation list that this device has seen. The list is public: asking for it takes no token."""

    def __init__(self, root_public_key: bytes, calls: Calls, channels: Channels, store: Store, time: ServerTime, trouble: Trouble) -> None:
        self._root_public_key = root_public_key
        self._calls = calls
        self._channels = channels
        self._store = store
        self._time = time
        self._trouble = trouble
        self._list: RevocationList | None = None
        self._is_read = False
        self._asked_at: float | None = None

    def forget(self) -> None:
        """Forget what the store has forgotten."""
        self._list, self._is_read, self._asked_at = None, False, None

    async def newest(self) -> RevocationList | None:
        """The list, None before there was one."""
        if not self._is_read:
            await self._read()
            self._is_read = True
        return self._list

    async def refresh(self, deadline: Deadline) -> None:
        """Ask for a newer list. What cannot be had, or cannot be trusted, is noted and the kept list stays: whoever withholds a
        list could as well give the old one, so waiting for an answer would stop messages and nobody else. Raises KeystoreError."""
        self._asked_at = self._calls.clock.monotonic()
        known = await self.newest()
        request = accounts_pb2.GetRevocationsRequest(root_public_key=self._root_public_key, known_serial=known.serial if known else 0)
        limit = Deadline.after(self._calls.clock, min(deadline.remaining_s(), PROFILE_DEADLINE_S))
        try:
            blob = (await self._calls.call(self._channels.accounts.GetRevocations, request, deadline=limit)).revocations
        except CallFailed as error:
            self._trouble.note(error)
            return
        fresh = self._verified(blob) if blob else None
        if fresh is None or (known is not None and fresh.serial <= known.serial):
            return
        if await self._store(lambda keystore: keystore.put_revocations(fresh.serial, blob)):
            await self._go_by(fresh)
        else:
            await self._read()  # another process of this device was faster, with a newer one

    async def refresh_if_old(self, deadline: Deadline) -> None:
        """As `refresh()`, unless that was a moment ago."""
        if self._asked_at is None or self._calls.clock.monotonic() - self._asked_at >= REVOCATIONS_PAUSE_S:
            await self.refresh(deadline)

    async def _read(self) -> None:
        blob = await self._store(lambda keystore: keystore.revocations())
        kept = None if blob is None else self._verified(blob)
        if kept is not None:
            await self._go_by(kept)

    async def _go_by(self, verified: RevocationList) -> None:
        """From now on, unless somebody who asked at the same time came here with a newer one."""
        if self._list is None or verified.serial > self._list.serial:
            self._list = verified
            await self._store(lambda keystore: self._time.prove(keystore, verified.issued_ms))

    def _verified(self, blob: bytes) -> RevocationList | None:
        try:
            return verify_revocations(self._root_public_key, blob)
        except RevocationsRefused as refused:
            self._trouble.note(refused)
            return None


class SenderEntries:
    """The entries this device goes by, and the names in them. Entries are public: asking for one takes no token."""

    def __init__(
        self,
        root_public_key: bytes,
        calls: Calls,
        channels: Channels,
        store: Store,
        time: ServerTime,
        trouble: Trouble,
        revocations: Revocations,
    ) -> None:
        self._root_public_key = root_public_key
        self._calls = calls
        self._channels = channels
        self._store = store
        self._time = time
        self._trouble = trouble
        self._revocations = revocations
        self._entries: dict[tuple[SenderId, EntryRole], SenderEntry] = {}
        self._names: dict[SenderId, str] = {}
        self._asked_at: dict[SenderId, float] = {}
        self._failed_at: float | None = None

    def forget(self) -> None:
        """Forget what the store has forgotten."""
        self._entries.clear()
        self._names.clear()
        self._asked_at.clear()
        self._revocations.forget()

    async def content_public_key(self, header: Header, deadline: Deadline) -> bytes:
        """The key that must have signed: by the entries kept here, else by the present ones.

        Raises EnvelopeRefused when the present entries do not allow it, Held when they cannot be had.
        """
        sender_id = header.sender_id
        sender = await self._kept(sender_id, EntryRole.SENDER)
        platform = await self._kept(PLATFORM_ENTRY, EntryRole.PLATFORM) if header.server_sealed else None
        if sender is not None and (platform is not None or not header.server_sealed):
            with contextlib.suppress(EnvelopeRefused):
                return await self._allowed(header, sender, platform)
            if self._since(self._asked_at.get(sender_id)) < PROFILE_PAUSE_S:
                raise EnvelopeRefused  # these are the present ones
        if self._since(self._failed_at) < PROFILE_FAILED_PAUSE_S:
            raise Held("nobody answered just now who a sender is; the message waits")
        profile = await self._ask(sender_id, deadline)
        sender = await self._new(sender_id, EntryRole.SENDER, profile.sender_entry, deadline)
        if header.server_sealed:
            platform = await self._new(PLATFORM_ENTRY, EntryRole.PLATFORM, profile.platform_entry, deadline)
        if len(self._asked_at) >= ENTRIES_KEPT_MAX:
            self._asked_at.clear()
        self._asked_at[sender_id] = self._calls.clock.monotonic()
        return await self._allowed(header, sender, platform)

    async def profile(self, sender_id: SenderId, deadline: Deadline) -> SenderProfile:
        """Who a sender is by its present entry. Raises CallFailed, EntryRefused where that cannot be trusted or is revoked."""
        profile = await self._calls.call(
            self._channels.accounts.GetSenderProfile, accounts_pb2.GetSenderProfileRequest(sender_id=sender_id), deadline=deadline
        )
        entry = await self._take(sender_id, EntryRole.SENDER, profile.sender_entry, deadline)
        await self._check_entry(entry)
        return SenderProfile(
            sender_id=sender_id,
            name=entry.display_name,
            modes=entry.modes,
            brand_colour=profile.brand_colour,
            brand_text_colour=profile.brand_text_colour,
            logo_png=profile.logo_png,
        )

    async def name(self, sender_id: SenderId) -> str:
        """The sender's name as its last entry said; "" before there was one."""
        name = self._names.get(sender_id)
        if name is None:
            kept = await self._store(lambda keystore: keystore.fact(_name_fact(sender_id)))
            name = (kept or b"").decode()
            self._remember_name(sender_id, name)
        return name

    async def _allowed(self, header: Header, sender: SenderEntry, platform: SenderEntry | None) -> bytes:
        """The key that must have signed. Raises EnvelopeRefused; why is noted for this device's own eyes."""
        try:
            await self._check_entry(sender)
            mode = SenderMode.SERVER if header.server_sealed else SenderMode.END_TO_END
            if mode not in sender.modes:
                raise EntryRefused(f"the sender's entry does not allow the mode {mode.name}: who sealed this may not speak for the sender")
            if header.server_sealed and platform is not None:
                await self._check_entry(platform)
            public_key = content_public_key(header, sender, platform)
            revoked = await self._revocations.newest()
            if revoked is not None and revoked.revokes_key(public_key):
                raise EntryRefused("the root revoked the key that signed this message; the sender must seal with another one")
        except EntryRefused as refused:
            self._trouble.note(refused)
            raise EnvelopeRefused from None
        return public_key

    async def _check_entry(self, entry: SenderEntry) -> None:
        """Raises EntryRefused for a revoked one."""
        revoked = await self._revocations.newest()
        if revoked is not None and revoked.revokes_entry(entry):
            raise EntryRefused(f"the root revoked the entry of {entry.display_name}; its operator must certify a new one")

    def _since(self, moment: float | None) -> float:
        """Seconds since a moment; endless if there was none."""
        return float("inf") if moment is None else self._calls.clock.monotonic() - moment

    async def _ask(self, sender_id: SenderId, deadline: Deadline) -> accounts_pb2.GetSenderProfileResponse:
        try:
            return await self._calls.call(
                self._channels.accounts.GetSenderProfile,
                accounts_pb2.GetSenderProfileRequest(sender_id=sender_id),
                deadline=Deadline.after(self._calls.clock, min(deadline.remaining_s(), PROFILE_DEADLINE_S)),
            )
        except errors.NotFound:
            raise EnvelopeRefused from None
        except CallFailed as error:
            self._trouble.note(error)
            self._failed_at = self._calls.clock.monotonic()
            raise Held("nobody answers who the sender is; the message waits") from error

    async def _kept(self, name: SenderId, role: EntryRole) -> SenderEntry | None:
        """A cached entry that holds now, verified."""
        now_ms = self._time.bounded_ms()
        entry = self._entries.get((name, role))
        if entry is None:
            blob = await self._store(lambda keystore: keystore.sender_entry(name, role))
            if blob is None:
                return None
            with contextlib.suppress(EntryRefused):
                entry = verify_sender_entry(self._root_public_key, blob, now_ms, role=role)
                self._remember(name, entry)
        return entry if entry is not None and entry.is_in_force(now_ms) else None

    async def _new(self, name: SenderId, role: EntryRole, blob: bytes, deadline: Deadline) -> SenderEntry:
        """An entry as the service gave it just now, for a message: Held where a later answer may differ, else EnvelopeRefused."""
        try:
            return await self._take(name, role, blob, deadline)
        except _OlderEntry as older:
            raise Held(str(older)) from older
        except EntryRefused as refused:
            self._trouble.note(refused)
            if _out_of_time(blob, self._time.bounded_ms()):
                raise Held("the sender's entry is outside its time; the message waits for a new one") from refused
            raise EnvelopeRefused from None

    async def _take(self, name: SenderId, role: EntryRole, blob: bytes, deadline: Deadline) -> SenderEntry:
        """An entry as the service gave it just now, verified and cached. Raises EntryRefused."""
        entry = verify_sender_entry(self._root_public_key, blob, self._time.bounded_ms(), role=role)
        if role is EntryRole.SENDER and entry.sender_id != name:
            raise EntryRefused("the service gave the entry of another sender; do not trust this server")
        if await self._store(lambda keystore: keystore.sender_entry(name, role)) != blob:
            await self._revocations.refresh_if_old(deadline)
        if not await self._store(lambda keystore: keystore.put_sender_entry(name, role, entry.serial, entry.not_after_ms, blob)):
            raise _OlderEntry("the service gave an older entry of the sender than is known here; it must give the present one")
        self._remember(name, entry)
        # Names outlive entries, so that an old message still says who sent it.
        if role is EntryRole.SENDER and await self.name(name) != entry.display_name:
            self._remember_name(name, entry.display_name)
            await self._store(lambda keystore: keystore.set_fact(_name_fact(name), entry.display_name.encode()))
        return entry

    def _remember(self, name: SenderId, entry: SenderEntry) -> None:
        if len(self._entries) >= ENTRIES_KEPT_MAX:
            self._entries.clear()
        self._entries[name, entry.role] = entry

    def _remember_name(self, sender_id: SenderId, display_name: str) -> None:
        if len(self._names) >= ENTRIES_KEPT_MAX:
            self._names.clear()
        self._names[sender_id] = display_name


class _OlderEntry(EntryRefused):
    """A service that lags behind another one, or would go back on purpose."""


def _out_of_time(blob: bytes, now_ms: int) -> bool:
    """Whether a refused entry says of itself that it is not in force. Read before any signature: good for waiting only."""
    try:
        entry = SenderEntry.decode_signed(blob)
    except ValueError:
        return False
    return not entry.is_in_force(now_ms)


def _name_fact(sender_id: SenderId) -> str:
    return f"name.{sender_id.hex()}"
