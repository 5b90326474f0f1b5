"""The gRPC side of accounts: parse, decide, answer. Protobuf stops here."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import ID_BYTES, SenderId, is_app_id
from sealpush.keys import EntryRole, is_usable_ed25519
from sealpush.model import moment
from sealpush.v1 import accounts_pb2, accounts_pb2_grpc
from sealpushd.accounts import rules
from sealpushd.accounts.store import PLATFORM, AccountStore, EntryQuery, NewOrganisation, NewSender, SignInAddress
from sealpushd.platform import fields, rpc
from sealpushd.platform.access import address_allowed
from sealpushd.platform.addresses import address_subject
from sealpushd.platform.batching import NaturalBatcher
from sealpushd.platform.clock import Clock, to_ms
from sealpushd.platform.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from sealpushd.platform.limits import Limiter
from sealpushd.platform.passwords import Argon2, hash_password
from sealpushd.platform.tokens import SenderCaller, ServiceKey
from sealpushd.v1 import administration_pb2, administration_pb2_grpc

# Phones ask for a profile at the first message of a sender; a campaign makes millions ask at once.
PROFILE_CACHED: Final = timedelta(seconds=5)
# With logos of 1 MiB each, 64 MiB at the most.
PROFILES_CACHED_MAX: Final = 64
# Lists of 132 KiB at the most, 8 MiB. There are as many as roots; more are asked for only by somebody who makes them up.
LISTS_CACHED: Final = timedelta(seconds=5)
LISTS_CACHED_MAX: Final = 64

# Under which no organisation stands.
NOBODY: Final = bytes(ID_BYTES)
ADDRESS_CONTEXT: Final = "address of a sign-in"

# Envelopes whose entries one call asks for: each may cost a hundred signatures to check, of 60 µs, before the one that fits is found.
HEADERS_MAX: Final = 16


class PasswordChecker(Argon2):
    """Checks passwords with the same work whether or not there is anything to check against."""

    def __init__(self) -> None:
        super().__init__()
        # Made before the first sign-in: on the way its time would show, and a caller that left meanwhile would take the turn along.
        self._decoy = hash_password(b"nobody's password")

    async def is_password_of(self, account: rules.Account | None, password: str) -> bool:
        """Whether it is; without an account the answer is False after the same time."""
        right = await self.is_password(self._decoy if account is None else account.password_hash, password.encode())
        return right and account is not None


class AccountsService(accounts_pb2_grpc.AccountsServicer):
    """Public: sign-in, sender profiles."""

    def __init__(self, store: AccountStore, limiter: Limiter, passwords: PasswordChecker, key: ServiceKey, clock: Clock) -> None:
        self._store = store
        self._limiter = limiter
        self._passwords = passwords
        self._key = key
        self._clock = clock
        # Batched, so that callers who leave take no statement with them.
        self._accounts: NaturalBatcher[str, rules.Account | None] = NaturalBatcher(store.accounts)
        self._signed_in_at: NaturalBatcher[SignInAddress, datetime | None] = NaturalBatcher(store.signed_in_at)
        # Until when, by the steady clock.
        self._profiles: dict[SenderId, tuple[accounts_pb2.GetSenderProfileResponse, float]] = {}
        self._profile_batcher = NaturalBatcher(store.profiles)
        # Root → its list's serial and bytes, 0 and nothing without one, and until when, by the steady clock, that is believed.
        self._lists: dict[bytes, tuple[int, bytes, float]] = {}
        self._list_batcher = NaturalBatcher(store.signed_revocations)

    async def SignIn(self, request: accounts_pb2.SignInRequest, context: rpc.Context) -> accounts_pb2.SignInResponse:
        address = rpc.caller_address()
        account = await self._authenticated(request.login, request.password, address)
        sender = rules.choose_sender(account, request.sender_name)
        caller = SenderCaller(sender.sender_id, account.organisation_id, sender.app_ids, sender.scopes, account.networks)
        token, ends_at = self._key.sender_token(caller)
        return accounts_pb2.SignInResponse(access_token=token, expires_at=Timestamp(seconds=ends_at), sender_id=sender.sender_id)

    async def _authenticated(self, login: str, password: str, address: str) -> rules.Account:
        """The organisation that login, password and address prove together."""
        possible = rules.is_login(login) and len(password.encode()) <= rules.PASSWORD_BYTES_MAX
        account = await self._accounts.submit(login) if possible else None
        origin = address_subject(address)
        # Looked for without an account as well: the time says nothing.
        address_hmac = self._key.keyed_hash(rules.address_bytes(account, origin), ADDRESS_CONTEXT)
        from_there = SignInAddress(NOBODY if account is None else account.organisation_id, address_hmac)
        signed_in_at = await self._signed_in_at.submit(from_there)
        now = self._clock.now()
        standing = rules.standing(account, address, signed_in_at, now=now)
        failures = rules.failures_counted(login, origin, standing)
        # Before a turn, so that who is over a limit takes none; in it once more, for what others that waited have counted meanwhile.
        await self._limiter.check(*failures)
        async with self._passwords.turn(origin, known=standing.is_known):
            await self._limiter.check(*failures)
            right = await self._passwords.is_password_of(account, password if possible else "")
            if account is None or not right:
                await self._limiter.add(*failures)
                raise Unauthenticated("login or password is wrong")
        if not address_allowed(address, account.networks):
            raise PermissionDenied(f"the address {address} is not one of the organisation's networks")
        if rules.is_worth_noting(signed_in_at, now=now):
            await self._store.put_sign_in_address(from_there, now)
        return account

    async def GetSenderProfile(
        self, request: accounts_pb2.GetSenderProfileRequest, context: rpc.Context
    ) -> accounts_pb2.GetSenderProfileResponse:
        sender_id = SenderId(fields.id16(request.sender_id, "sender_id"))
        now = self._clock.monotonic()
        cached = self._profiles.get(sender_id)
        if cached is not None and now < cached[1]:
            return cached[0]
        profile = await self._profile_batcher.submit(sender_id)
        self._profiles.pop(sender_id, None)
        if profile is None:
            raise NotFound("no such sender")
        response = accounts_pb2.GetSenderProfileResponse(
            sender_entry=profile.sender_entry,
            platform_entry=profile.platform_entry,
            display_name=profile.display_name,
            brand_colour=profile.brand_colour,
            brand_text_colour=profile.brand_text_colour,
            logo_png=profile.logo_png,
        )
        if len(self._profiles) >= PROFILES_CACHED_MAX:
            del self._profiles[next(iter(self._profiles))]
        self._profiles[sender_id] = response, now + PROFILE_CACHED.total_seconds()
        return response

    async def GetRevocations(
        self, request: accounts_pb2.GetRevocationsRequest, context: rpc.Context
    ) -> accounts_pb2.GetRevocationsResponse:
        root_public_key = _root_public_key(request.root_public_key)
        now = self._clock.monotonic()
        cached = self._lists.pop(root_public_key, None)
        if cached is None or cached[2] <= now:
            signed = await self._list_batcher.submit(root_public_key)
            serial = rules.stored_revocations(root_public_key, signed).serial if signed is not None else 0
            cached = serial, signed or b"", now + LISTS_CACHED.total_seconds()
        if len(self._lists) >= LISTS_CACHED_MAX:
            del self._lists[next(iter(self._lists))]
        self._lists[root_public_key] = cached
        return accounts_pb2.GetRevocationsResponse(revocations=cached[1] if cached[0] > request.known_serial else b"")


class AdministrationService(administration_pb2_grpc.AdministrationServicer):
    """Mesh: operators set up, services look up."""

    def __init__(self, store: AccountStore, passwords: PasswordChecker, clock: Clock) -> None:
        self._store = store
        self._passwords = passwords
        self._clock = clock

    async def PutOrganisation(
        self, request: administration_pb2.PutOrganisationRequest, context: rpc.Context
    ) -> administration_pb2.PutOrganisationResponse:
        actor = rpc.require_service().name
        login = rules.check_login(request.login)
        name = rules.check_name(request.name, rules.ORGANISATION_NAME_CHARACTERS_MAX)
        networks = rules.check_networks(request.networks)
        password = rules.check_new_password(request.password)
        password_hash = None if password is None else await self._hash(actor, password)
        new = NewOrganisation(login, password_hash, name, networks)
        organisation_id = await self._store.put_organisation(new, actor=actor, now=self._clock.now())
        return administration_pb2.PutOrganisationResponse(organisation_id=organisation_id)

    async def _hash(self, actor: str, password: str) -> bytes:
        async with self._passwords.turn(actor, known=True):
            return await self._passwords.hash(password.encode())

    async def PutSender(self, request: administration_pb2.PutSenderRequest, context: rpc.Context) -> administration_pb2.PutSenderResponse:
        actor = rpc.require_service().name
        now = self._clock.now()
        sender_id = SenderId(fields.id16(request.sender_id, "sender_id"))
        organisation_id = fields.id16(request.organisation_id, "organisation_id")
        app_ids = rules.check_app_ids(request.app_ids)
        brand = rules.Brand(
            rules.check_colour(request.brand_colour, "brand_colour"),
            rules.check_colour(request.brand_text_colour, "brand_text_colour"),
            rules.check_logo(request.logo_png),
        )
        root = rules.common_root(app_ids, await self._store.apps(app_ids))
        entry = rules.check_entry(request.sender_entry, root, EntryRole.SENDER, now, "sender_entry")
        rules.check_not_revoked(entry, (await self._store.revocations([root])).get(root), "sender_entry")
        new = NewSender(
            sender_id=sender_id,
            organisation_id=organisation_id,
            name=rules.check_name(request.name, rules.SENDER_NAME_CHARACTERS_MAX),
            signed_entry=request.sender_entry,
            entry=rules.check_entry_of(sender_id, entry),
            root_public_key=root,
            app_ids=app_ids,
            brand=brand,
            scopes=rules.check_scopes(request.scopes),
            is_default=request.is_default,
        )
        await self._store.put_sender(new, actor=actor, now=now)
        return administration_pb2.PutSenderResponse()

    async def PutApp(self, request: administration_pb2.PutAppRequest, context: rpc.Context) -> administration_pb2.PutAppResponse:
        actor = rpc.require_service().name
        if not is_usable_ed25519(request.root_public_key):
            raise InvalidRequest("root_public_key must be an Ed25519 public key of 32 bytes", field="root_public_key")
        app = rules.App(
            app_id=fields.app_id(request.app_id),
            name=rules.check_name(request.name, rules.APP_NAME_CHARACTERS_MAX),
            root_public_key=request.root_public_key,
        )
        await self._store.put_app(app, actor=actor, now=self._clock.now())
        return administration_pb2.PutAppResponse()

    async def PutPlatformEntry(
        self, request: administration_pb2.PutPlatformEntryRequest, context: rpc.Context
    ) -> administration_pb2.PutPlatformEntryResponse:
        actor = rpc.require_service().name
        now = self._clock.now()
        root = await self._pinned(request.root_public_key)
        entry = rules.check_entry(request.platform_entry, root, EntryRole.PLATFORM, now, "platform_entry")
        rules.check_not_revoked(entry, (await self._store.revocations([root])).get(root), "platform_entry")
        await self._store.put_platform_entry(request.platform_entry, entry, root, actor=actor, now=now)
        return administration_pb2.PutPlatformEntryResponse()

    async def PutRevocations(
        self, request: administration_pb2.PutRevocationsRequest, context: rpc.Context
    ) -> administration_pb2.PutRevocationsResponse:
        actor = rpc.require_service().name
        root = await self._pinned(request.root_public_key)
        revocations = rules.check_revocations(request.revocations, root)
        await self._store.put_revocations(request.revocations, revocations, root, actor=actor, now=self._clock.now())
        revoked = rules.revoked_entries(await self._store.entries_in_use(), root, revocations)
        return administration_pb2.PutRevocationsResponse(revoked=map(_to_entry_in_use, revoked))

    async def GetRevocationList(
        self, request: administration_pb2.GetRevocationListRequest, context: rpc.Context
    ) -> administration_pb2.GetRevocationListResponse:
        found = await self._store.signed_revocations([_root_public_key(request.root_public_key)])
        return administration_pb2.GetRevocationListResponse(revocations=found[0] or b"")

    async def _pinned(self, root_public_key: bytes) -> bytes:
        """The root, if an app pins it."""
        if not await self._store.root_in_use(_root_public_key(root_public_key)):
            raise InvalidRequest("this root is not pinned by any app; put the app first", field="root_public_key")
        return root_public_key

    async def GetEndingEntries(
        self, request: administration_pb2.GetEndingEntriesRequest, context: rpc.Context
    ) -> administration_pb2.GetEndingEntriesResponse:
        before = fields.moment(request.before, "before")
        ending = rules.ending_entries(await self._store.entries_in_use(), to_ms(before))
        return administration_pb2.GetEndingEntriesResponse(entries=map(_to_entry_in_use, ending))

    async def GetSenders(
        self, request: administration_pb2.GetSendersRequest, context: rpc.Context
    ) -> administration_pb2.GetSendersResponse:
        senders = await self._store.senders(list(map(SenderId, fields.ids(request.sender_ids, "sender_ids"))))
        revocations = await self._store.revocations([sender.root_public_key for sender in senders])
        return administration_pb2.GetSendersResponse(
            senders=[_to_sender(sender, rules.revoked_of(sender, revocations.get(sender.root_public_key))) for sender in senders]
        )

    async def FindEntries(
        self, request: administration_pb2.FindEntriesRequest, context: rpc.Context
    ) -> administration_pb2.FindEntriesResponse:
        headers = [rules.check_header(each) for each in fields.bounded(request.headers, "headers", HEADERS_MAX)]
        senders = await self._store.entries(
            [EntryQuery(EntryRole.SENDER, each.sender_id, None, moment(each.created_at_ms)) for each in headers]
        )
        # Under the roots that certified the sender: another root's platform is nobody to it.
        wanted = [
            (n, root)
            for n, (header, found) in enumerate(zip(headers, senders, strict=True))
            if header.server_sealed
            for root in dict.fromkeys(each.root_public_key for each in found)
        ]
        platforms: list[list[rules.SignedEntry]] = [[] for _ in headers]
        queries = [EntryQuery(EntryRole.PLATFORM, PLATFORM, root, moment(headers[n].created_at_ms)) for n, root in wanted]
        for (n, _), found in zip(wanted, await self._store.entries(queries), strict=True):
            platforms[n] += found
        response = administration_pb2.FindEntriesResponse()
        for header, of_sender, of_platform in zip(headers, senders, platforms, strict=True):
            sender_entry, platform_entry = rules.certifying(header, of_sender, of_platform) or (b"", b"")
            response.results.add(sender_entry=sender_entry, platform_entry=platform_entry)
        return response

    async def GetApps(self, request: administration_pb2.GetAppsRequest, context: rpc.Context) -> administration_pb2.GetAppsResponse:
        app_ids = fields.bounded(request.app_ids, "app_ids")
        apps = await self._store.apps([app_id for app_id in app_ids if is_app_id(app_id)])
        return administration_pb2.GetAppsResponse(apps=[administration_pb2.App(app_id=app.app_id, name=app.name) for app in apps])


def _to_entry_in_use(stored: rules.StoredEntry) -> administration_pb2.EntryInUse:
    told = administration_pb2.EntryInUse(
        sender_id=stored.sender_id or b"", display_name=stored.entry.display_name, root_public_key=stored.root_public_key
    )
    told.ends_at.FromDatetime(moment(stored.entry.not_after_ms))
    return told


def _to_sender(sender: rules.Sender, revoked: rules.Revoked) -> administration_pb2.Sender:
    return administration_pb2.Sender(
        sender_id=sender.sender_id,
        organisation_id=sender.organisation_id,
        name=sender.name,
        sender_entry=sender.sender_entry,
        app_ids=sender.app_ids,
        is_entry_revoked=revoked.is_entry_revoked,
        revoked_keys=revoked.keys,
        is_platform_revoked=revoked.is_platform_revoked,
        platform_entry=sender.platform_entry,
    )


def _root_public_key(value: bytes) -> bytes:
    return fields.octets(value, "root_public_key", rules.ROOT_KEY_BYTES)
