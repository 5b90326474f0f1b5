"""What may be stored about organisations, senders and apps, and who may sign in. Pure: values in, values or a refusal out."""

from __future__ import annotations

import contextlib
import enum
import functools
import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sealpush.envelope import HEADER_BYTES, Header, content_public_key
from sealpush.errors import EntryRefused, EnvelopeRefused, RevocationsRefused
from sealpush.ids import AppId, SenderId
from sealpush.keys import TAG_ENTRY, EntryRole, SenderEntry, signed_body, verify_sender_entry
from sealpush.receipts import verify_entry_then
from sealpush.revocations import RevocationList, verify_revocations
from sealpushd.platform import fields
from sealpushd.platform.access import SCOPES, address_allowed
from sealpushd.platform.clock import MOMENT_AHEAD_MAX, to_ms
from sealpushd.platform.errors import InvalidRequest
from sealpushd.platform.limits import (
    SIGN_IN_FAILURES_PER_ADDRESS,
    SIGN_IN_FAILURES_PER_LOGIN,
    SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS,
    Counted,
)

PASSWORD_BYTES_MIN: Final = 12
PASSWORD_BYTES_MAX: Final = 256
ORGANISATION_NAME_CHARACTERS_MAX: Final = 128
SENDER_NAME_CHARACTERS_MAX: Final = 64
APP_NAME_CHARACTERS_MAX: Final = 128
# They travel in every token of the organisation.
NETWORKS_MAX: Final = 64
SENDER_APPS_MAX: Final = 64
# Anybody may ask for it: small enough that many who ask and do not read hold up nobody.
LOGO_BYTES_MAX: Final = 128 * 1024
LOGO_SIDE_PIXELS: Final = 512
ROOT_KEY_BYTES: Final = 32
# PostgreSQL's bigint; a serial is a counter or a time, never near it.
SERIAL_MAX: Final = 2**63 - 1
# What an operator is told at once: more than anybody reads.
ENTRIES_TOLD_MAX: Final = 512

_NAME = re.compile(r"[a-z0-9.-]{1,64}", re.ASCII)
_COLOUR = re.compile(r"#[0-9a-f]{6}", re.ASCII)
_PNG_START: Final = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


@dataclass(frozen=True, slots=True)
class App:
    app_id: AppId
    name: str
    root_public_key: bytes


@dataclass(frozen=True, slots=True)
class Sender:
    """What another service may know of a sender."""

    sender_id: SenderId
    organisation_id: bytes
    name: str
    sender_entry: bytes
    app_ids: tuple[AppId, ...]
    root_public_key: bytes
    # Empty: the root has certified no key of the platform yet.
    platform_entry: bytes


@dataclass(frozen=True, slots=True)
class Revoked:
    """What the root took back of a sender."""

    is_entry_revoked: bool
    # Of its entry and of the platform's.
    keys: tuple[bytes, ...]
    is_platform_revoked: bool


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """An entry in use; without a sender it is the platform's."""

    sender_id: SenderId | None
    root_public_key: bytes
    entry: SenderEntry


@dataclass(frozen=True, slots=True)
class AccountSender:
    """A sender as far as signing in needs it."""

    sender_id: SenderId
    name: str
    app_ids: tuple[AppId, ...]
    scopes: frozenset[str]
    is_default: bool


@dataclass(frozen=True, slots=True)
class Account:
    """An organisation as far as signing in needs it."""

    organisation_id: bytes
    password_hash: bytes
    networks: tuple[str, ...]
    senders: tuple[AccountSender, ...]

    def __repr__(self) -> str:
        return f"Account({self.organisation_id.hex()})"


@dataclass(frozen=True, slots=True)
class Profile:
    """What phones may know of a sender."""

    sender_entry: bytes
    platform_entry: bytes
    display_name: str
    brand_colour: str
    brand_text_colour: str
    logo_png: bytes


@dataclass(frozen=True, slots=True)
class SignedEntry:
    """An entry as it was put; accounts verified the root's signature then."""

    root_public_key: bytes
    signed_entry: bytes


@dataclass(frozen=True, slots=True)
class Brand:
    """Colours as "#rrggbb" or empty; a logo or None for the one there is."""

    colour: str
    text_colour: str
    logo_png: bytes | None


def is_login(text: str) -> bool:
    """Whether the text can be a login at all."""
    return _NAME.fullmatch(text) is not None


def check_login(text: str) -> str:
    if not is_login(text):
        raise InvalidRequest("a login is 1 to 64 characters of a-z 0-9 - .", field="login")
    return text


def check_name(text: str, characters_max: int, field: str = "name") -> str:
    if not 1 <= len(text) <= characters_max or not text.isprintable() or text != text.strip():
        raise InvalidRequest(f"write 1 to {characters_max} printable characters, without spaces around them", field=field)
    return text


def check_new_password(password: str) -> str | None:
    """The password to set, None for the one there is."""
    if not password:
        return None
    if not PASSWORD_BYTES_MIN <= len(password.encode()) <= PASSWORD_BYTES_MAX:
        raise InvalidRequest(f"a password is {PASSWORD_BYTES_MIN} to {PASSWORD_BYTES_MAX} bytes", field="password")
    return password


def check_networks(networks: Sequence[str]) -> tuple[str, ...]:
    """The networks in their one spelling, each once."""
    if len(networks) > NETWORKS_MAX:
        raise InvalidRequest(f"at most {NETWORKS_MAX} networks", field="networks")
    try:
        return tuple(dict.fromkeys(str(ipaddress.ip_network(network.strip())) for network in networks))
    except ValueError as e:
        raise InvalidRequest(f"not a CIDR network such as 192.0.2.0/24: {e}", field="networks") from e


def check_colour(colour: str, field: str) -> str:
    lower = colour.lower()
    if lower and _COLOUR.fullmatch(lower) is None:
        raise InvalidRequest('write a colour as "#rrggbb", or leave it empty', field=field)
    return lower


def check_logo(png: bytes) -> bytes | None:
    """The logo, None for an empty one. Reads only the header (PNG, 5.2 and 11.2.1): phones decode it with care of their own."""
    if not png:
        return None
    if len(png) > LOGO_BYTES_MAX:
        raise InvalidRequest(f"the logo is larger than {LOGO_BYTES_MAX} bytes", field="logo_png")
    if not png.startswith(_PNG_START) or len(png) < len(_PNG_START) + 17:
        raise InvalidRequest("the logo is not a PNG", field="logo_png")
    width = int.from_bytes(png[16:20], "big")
    height = int.from_bytes(png[20:24], "big")
    if (width, height) != (LOGO_SIDE_PIXELS, LOGO_SIDE_PIXELS):
        side = LOGO_SIDE_PIXELS
        raise InvalidRequest(f"the logo is {width} x {height}; it must be exactly {side} x {side} pixels", field="logo_png")
    return png


def check_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    """The scopes, all of them for an empty list."""
    unknown = sorted(set(scopes) - SCOPES)
    if unknown:
        raise InvalidRequest(f"no such scope: {', '.join(unknown)}; there are {', '.join(sorted(SCOPES))}", field="scopes")
    return tuple(sorted(set(scopes) or SCOPES))


def check_app_ids(app_ids: Sequence[str]) -> tuple[AppId, ...]:
    distinct = tuple(dict.fromkeys(AppId(app_id) for app_id in app_ids))
    if not 1 <= len(distinct) <= SENDER_APPS_MAX:
        raise InvalidRequest(f"name 1 to {SENDER_APPS_MAX} apps; the first is the sender's default", field="app_ids")
    for app_id in distinct:
        fields.app_id(app_id, "app_ids")
    return distinct


def common_root(app_ids: Sequence[AppId], apps: Sequence[App]) -> bytes:
    """The root that all these apps pin: one signature certifies a sender, so its apps must share the root."""
    known = {app.app_id: app for app in apps}
    missing = [app_id for app_id in app_ids if app_id not in known]
    if missing:
        raise InvalidRequest(f"no such app: {', '.join(missing)}; put it first", field="app_ids")
    roots = {known[app_id].root_public_key for app_id in app_ids}
    if len(roots) != 1:
        raise InvalidRequest("these apps pin different roots; make a sender for each root", field="app_ids")
    return roots.pop()


def check_entry(entry: bytes, root_public_key: bytes, role: EntryRole, now: datetime, field: str) -> SenderEntry:
    """The entry, if this root signed it, it is in time and of this role."""
    # Said apart, in words for who signs: what a phone says of it is about a server that nobody should trust.
    if signed_body(root_public_key, TAG_ENTRY, entry) is None:
        raise InvalidRequest(
            f"the entry is not signed by the root that the apps pin, {root_public_key.hex()}; sign it with that one, or name other apps",
            field=field,
        )
    try:
        checked = verify_sender_entry(root_public_key, entry, to_ms(now), role=role)
    except EntryRefused as e:
        raise InvalidRequest(str(e), field=field) from e
    if checked.serial > SERIAL_MAX:
        raise InvalidRequest("the entry's serial must fit 63 bits", field=field)
    return checked


def stored_entry(signed_entry: bytes) -> SenderEntry:
    """An entry out of the store, which holds only what `check_entry()` let in."""
    return SenderEntry.decode_signed(signed_entry)


def check_not_revoked(entry: SenderEntry, revocations: RevocationList | None, field: str) -> None:
    """Raises InvalidRequest for an entry that nobody would trust: revoked itself, or with a revoked key."""
    if revocations is None:
        return
    if revocations.revokes_entry(entry):
        raise InvalidRequest("the root revoked this entry; certify a new one", field=field)
    revoked = revocations.revoked_keys(entry)
    if revoked:
        raise InvalidRequest(f"the root revoked a key of this entry ({revoked[0].hex()}); certify a new one without it", field=field)


def check_revocations(revocations: bytes, root_public_key: bytes) -> RevocationList:
    """The list, if this root signed it."""
    try:
        checked = verify_revocations(root_public_key, revocations)
    except RevocationsRefused as e:
        raise InvalidRequest(str(e), field="revocations") from e
    if checked.serial > SERIAL_MAX:
        raise InvalidRequest("the list's serial must fit 63 bits", field="revocations")
    return checked


# A list is decoded for every look-up of senders; there are as many as roots.
@functools.lru_cache(maxsize=16)
def stored_revocations(root_public_key: bytes, revocations: bytes) -> RevocationList:
    """A list out of the store, which holds only what `check_revocations()` let in."""
    return verify_revocations(root_public_key, revocations)


def revoked_of(sender: Sender, revocations: RevocationList | None) -> Revoked:
    """What of a sender, and of the platform that may seal for it, the root took back."""
    if revocations is None:
        return Revoked(False, (), False)
    entry = stored_entry(sender.sender_entry)
    platform = stored_entry(sender.platform_entry) if sender.platform_entry else None
    return Revoked(
        is_entry_revoked=revocations.revokes_entry(entry),
        keys=tuple(key for each in (entry, platform) if each is not None for key in revocations.revoked_keys(each)),
        is_platform_revoked=platform is not None and _is_useless(platform, revocations),
    )


def _is_useless(entry: SenderEntry, revocations: RevocationList) -> bool:
    """Whether no key of the entry counts any more."""
    return revocations.revokes_entry(entry) or len(revocations.revoked_keys(entry)) == len(entry.keys)


def ending_entries(entries: Sequence[StoredEntry], before_ms: int) -> list[StoredEntry]:
    """Those that end before a time, soonest first, as many as are told."""
    ending = sorted((each for each in entries if each.entry.not_after_ms < before_ms), key=lambda each: each.entry.not_after_ms)
    return ending[:ENTRIES_TOLD_MAX]


def revoked_entries(entries: Sequence[StoredEntry], root_public_key: bytes, revocations: RevocationList) -> list[StoredEntry]:
    """Those of this root that the list revokes, or keys of which, as many as are told."""
    revoked = [
        each
        for each in entries
        if each.root_public_key == root_public_key and (revocations.revokes_entry(each.entry) or revocations.revoked_keys(each.entry))
    ]
    return revoked[:ENTRIES_TOLD_MAX]


def check_entry_of(sender_id: SenderId, entry: SenderEntry) -> SenderEntry:
    if entry.sender_id != sender_id:
        raise InvalidRequest("the entry certifies another sender id", field="sender_entry")
    return entry


def check_header(header: bytes) -> Header:
    """The header of an envelope in these bytes."""
    try:
        return Header.decode(header)
    except EnvelopeRefused as e:
        raise InvalidRequest(f"a header is the first {HEADER_BYTES} bytes of an envelope", field="headers") from e


def certifying(header: Header, senders: Sequence[SignedEntry], platforms: Sequence[SignedEntry]) -> tuple[bytes, bytes] | None:
    """The sender's entry, and if the server sealed it the platform's by the same root, that allow what this header says; the first of
    each that do. None: none does. The second is empty where it is not needed."""
    holders = list(_in_force(platforms, EntryRole.PLATFORM, header)) if header.server_sealed else [None]
    for sender, sender_entry in _in_force(senders, EntryRole.SENDER, header):
        for holder in holders:
            if holder is not None and holder[0].root_public_key != sender.root_public_key:
                continue
            with contextlib.suppress(EnvelopeRefused):
                content_public_key(header, sender_entry, None if holder is None else holder[1])
                return sender.signed_entry, b"" if holder is None else holder[0].signed_entry
    return None


def _in_force(entries: Sequence[SignedEntry], role: EntryRole, header: Header) -> Iterator[tuple[SignedEntry, SenderEntry]]:
    for each in entries:
        with contextlib.suppress(EntryRefused):
            yield each, verify_entry_then(each.root_public_key, each.signed_entry, header.created_at_ms, role)


def choose_sender(account: Account, name: str) -> AccountSender:
    """Who of the organisation will speak: the sender of that name; without a name its default, or its only one."""
    if name:
        found = [sender for sender in account.senders if sender.name == name]
        if not found:
            raise InvalidRequest("the organisation has no sender of this name", field="sender_name")
        return found[0]
    default = [sender for sender in account.senders if sender.is_default]
    if not default and len(account.senders) == 1:
        default = list(account.senders)
    if not default:
        raise InvalidRequest("the organisation has no default sender; name one", field="sender_name")
    return default[0]


# Longer than any holidays: an application that signs in every two hours keeps its address known for good.
ADDRESS_KNOWN_FOR: Final = timedelta(days=30)
# A known address that signs in again is not written down each time.
ADDRESS_RENEWED_AFTER: Final = timedelta(hours=1)
# Of an organisation: more than applications have. Whoever changes addresses at will pushes out only their own.
ADDRESSES_MAX: Final = 256


class Standing(enum.Enum):
    """What an address is to the organisation that somebody signs in as."""

    # It signed in from there lately, with the password of today.
    PROVEN = "proven"
    # One of its networks.
    INSIDE = "inside"
    STRANGE = "strange"

    @property
    def is_known(self) -> bool:
        return self is not Standing.STRANGE


def address_bytes(account: Account | None, origin: str) -> bytes:
    """What is hashed to remember an address by. With the password's hash: who had an old password is known by no address."""
    return origin.encode() + b"\0" + (b"" if account is None else account.organisation_id + account.password_hash)


def standing(account: Account | None, address: str, signed_in_at: datetime | None, *, now: datetime) -> Standing:
    """`signed_in_at`: when the organisation last signed in from this address, as far as is remembered."""
    if account is None or not address_allowed(address, account.networks):
        return Standing.STRANGE
    # What a clock ahead has noted is not believed: it would be known for longer than anybody said.
    if signed_in_at is not None and -MOMENT_AHEAD_MAX <= now - signed_in_at <= ADDRESS_KNOWN_FOR:
        return Standing.PROVEN
    return Standing.INSIDE if account.networks else Standing.STRANGE


def is_worth_noting(signed_in_at: datetime | None, *, now: datetime) -> bool:
    """Whether a sign-in is to be written down. A moment that has not come is none: a clock was ahead."""
    return signed_in_at is None or not timedelta(0) <= now - signed_in_at <= ADDRESS_RENEWED_AFTER


def failures_counted(login: str, origin: str, standing: Standing) -> tuple[Counted, ...]:
    """What a wrong password counts for; before a password is looked at none of these may be used up.

    Where somebody is proven, only what was tried for this login from there counts: nobody else locks them out. Failures from outside the
    organisation's networks are counted apart from those inside: together they would let anybody lock it out by its login alone.
    """
    own = Counted(SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS, f"{login} {origin}")
    match standing:
        case Standing.PROVEN:
            return (own,)
        case Standing.INSIDE:
            return own, Counted(SIGN_IN_FAILURES_PER_LOGIN, f"{login} inside")
        case Standing.STRANGE:
            per_login = Counted(SIGN_IN_FAILURES_PER_LOGIN, f"{login} outside")
            return Counted(SIGN_IN_FAILURES_PER_ADDRESS, origin), own, per_login
