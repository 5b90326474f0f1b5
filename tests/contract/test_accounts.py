"""accounts over real gRPC with real PostgreSQL and Valkey."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc import StatusCode

from sealpush.envelope import Header
from sealpush.ids import ContentId, RecipientRef, SenderId, uuid7
from sealpush.keys import ContentSigningKey, EntryKey, EntryRole, RootKey, SenderEntry, SenderMode, sign_sender_entry
from sealpush.revocations import RevocationList, Revoked, RevokedEntries, RevokedKey, sign_revocations
from sealpush.v1 import accounts_pb2, accounts_pb2_grpc
from sealpushd.accounts import rules, store
from sealpushd.engines import Engines
from sealpushd.platform import passwords, rpc
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import to_ms
from sealpushd.platform.db import Database, connect
from sealpushd.platform.errors import InvalidRequest, LimitExceeded, Unavailable
from sealpushd.platform.limits import (
    CODES_PER_NUMBER,
    SIGN_IN_FAILURES_PER_LOGIN,
    SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS,
    Counted,
    Limit,
    Limiter,
    PostgresCounter,
)
from sealpushd.platform.passwords import HASHES_AT_ONCE, HASHES_WAITING_MAX
from sealpushd.platform.settings import load
from sealpushd.platform.tokens import SenderCaller
from sealpushd.platform.valkey import Valkey
from sealpushd.v1 import administration_pb2, administration_pb2_grpc
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, Services, calling_from, refusal, running_services

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

PASSWORD = "correct horse battery"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@dataclass
class World:
    """A served accounts service and the operator's tools."""

    services: Services
    operator: MeshChannel
    clock: FakeClock
    urls: dict[str, str]
    root: RootKey = field(default_factory=RootKey.generate)

    @property
    def accounts(self) -> Any:
        return accounts_pb2_grpc.AccountsStub(self.services["accounts"].public)

    async def administer(self, method: str, request: Any, channel: MeshChannel | None = None) -> Any:
        channel = channel or self.operator
        return await channel.call(getattr(administration_pb2_grpc.AdministrationStub(channel.channel), method), request)

    async def put_organisation(self, login: str, **fields: Any) -> bytes:
        request = administration_pb2.PutOrganisationRequest(login=login, **{"name": "A bank", "password": PASSWORD, **fields})
        organisation_id: bytes = (await self.administer("PutOrganisation", request)).organisation_id
        return organisation_id

    async def put_app(self, app_id: str, root: RootKey | None = None) -> None:
        root_public_key = (root or self.root).public_key
        await self.administer("PutApp", administration_pb2.PutAppRequest(app_id=app_id, name="An app", root_public_key=root_public_key))

    async def put_platform_entry(self, signed: bytes, root: RootKey | None = None) -> None:
        root_public_key = (root or self.root).public_key
        request = administration_pb2.PutPlatformEntryRequest(platform_entry=signed, root_public_key=root_public_key)
        await self.administer("PutPlatformEntry", request)

    def revocations(self, *items: Revoked, serial: int = 1) -> bytes:
        in_order = tuple(sorted(items, key=lambda item: item.encode()))
        return sign_revocations(self.root, RevocationList(serial, to_ms(self.clock.now()), in_order))

    async def put_revocations(self, signed: bytes, root: RootKey | None = None) -> list[tuple[bytes, str]]:
        """What of that is in use: ids and names."""
        root_public_key = (root or self.root).public_key
        request = administration_pb2.PutRevocationsRequest(revocations=signed, root_public_key=root_public_key)
        answer = await self.administer("PutRevocations", request)
        return [(each.sender_id, each.display_name) for each in answer.revoked]

    async def get_revocations(self, root_public_key: bytes | None = None, known_serial: int = 0) -> bytes:
        root_public_key = self.root.public_key if root_public_key is None else root_public_key
        request = accounts_pb2.GetRevocationsRequest(root_public_key=root_public_key, known_serial=known_serial)
        revocations: bytes = (await self.accounts.GetRevocations(request)).revocations
        return revocations

    async def sender(self, sender_id: bytes) -> administration_pb2.Sender:
        answer = await self.administer("GetSenders", administration_pb2.GetSendersRequest(sender_ids=[sender_id]))
        sender: administration_pb2.Sender = answer.senders[0]
        return sender

    def entry(
        self,
        sender_id: bytes,
        *,
        serial: int = 1,
        root: RootKey | None = None,
        role: EntryRole = EntryRole.SENDER,
        name: str = "A Bank",
        keys: Sequence[bytes] = (),
        days: int = 1,
    ) -> bytes:
        now_ms = to_ms(self.clock.now())
        window = now_ms - 1000, now_ms + days * 86_400_000
        entry = SenderEntry(
            sender_id=SenderId(sender_id),
            display_name=name,
            modes=SenderMode.SERVER if role is EntryRole.PLATFORM else SenderMode.SERVER | SenderMode.END_TO_END,
            keys=tuple(EntryKey(key, *window) for key in keys or [ContentSigningKey.generate().public_key]),
            not_before_ms=window[0],
            not_after_ms=window[1],
            serial=serial,
            role=role,
        )
        return sign_sender_entry(root or self.root, entry)

    async def put_sender(self, organisation_id: bytes, sender_id: bytes, **fields: Any) -> None:
        request = administration_pb2.PutSenderRequest(
            **{
                "organisation_id": organisation_id,
                "sender_id": sender_id,
                "name": "cards",
                "sender_entry": self.entry(sender_id),
                "app_ids": ["bank-app"],
                **fields,
            }
        )
        await self.administer("PutSender", request)

    def sign_in(self, login: str, password: str = PASSWORD, sender_name: str = "") -> Any:
        return self.accounts.SignIn(accounts_pb2.SignInRequest(login=login, password=password, sender_name=sender_name))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts")


@pytest_asyncio.fixture(loop_scope="session")
async def world(engines: Engines, mesh: Mesh, urls: dict[str, str], clock: FakeClock) -> AsyncIterator[World]:
    async with running_services(engines, mesh, urls, clock) as services:
        made = World(services, services.channel("accounts", "operator"), clock, urls)
        admin = await connect(urls["admin"])
        await admin.execute(
            "TRUNCATE accounts.organisations, accounts.apps, accounts.platform_entries, accounts.revocations, accounts.journal CASCADE"
        )
        await admin.close()
        await made.put_app("bank-app")
        yield made


async def test_sign_in_gives_a_token_that_speaks_for_the_default_sender(world: World, mesh: Mesh) -> None:
    organisation_id = await world.put_organisation("bank", networks=["127.0.0.0/8"])
    cards, loans = uuid7(), uuid7()
    await world.put_sender(organisation_id, cards, scopes=["publish", "status"], is_default=True)
    await world.put_sender(organisation_id, loans, name="loans")
    response = await world.sign_in("bank")
    expected = SenderCaller(SenderId(cards), organisation_id, ("bank-app",), frozenset({"publish", "status"}), ("127.0.0.0/8",))
    assert mesh.verifier.verify(response.access_token) == expected
    assert response.sender_id == cards
    assert (await world.sign_in("bank", sender_name="loans")).sender_id == loans


async def test_a_new_default_sender_takes_the_place_of_the_old_one(world: World) -> None:
    organisation_id = await world.put_organisation("bank")
    first, second = uuid7(), uuid7()
    await world.put_sender(organisation_id, first, is_default=True)
    await world.put_sender(organisation_id, second, name="loans", is_default=True)
    assert (await world.sign_in("bank")).sender_id == second


async def test_an_only_sender_is_the_default_and_two_are_not(world: World) -> None:
    organisation_id = await world.put_organisation("bank")
    assert (await refusal(world.sign_in("bank"))).field == "sender_name"
    only = uuid7()
    await world.put_sender(organisation_id, only)
    assert (await world.sign_in("bank")).sender_id == only
    await world.put_sender(organisation_id, uuid7(), name="loans")
    assert (await refusal(world.sign_in("bank"))).field == "sender_name"
    assert (await refusal(world.sign_in("bank", sender_name="nobody"))).field == "sender_name"


async def test_a_token_that_has_ended_does_not_keep_a_sender_from_signing_in_again(world: World, mesh: Mesh) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    ended, _ = mesh.keys["accounts"].sign("sender", bytes(16).hex(), -3600, {"org": "", "apps": [], "scopes": [], "networks": []})
    for token in (ended, "nonsense"):
        request = accounts_pb2.SignInRequest(login="bank", password=PASSWORD)
        await world.accounts.SignIn(request, metadata=(("authorization", f"Bearer {token}"),))


async def test_wrong_password_and_unknown_login_are_refused_alike(world: World) -> None:
    await world.put_organisation("bank")
    wrong = await refusal(world.sign_in("bank", "not the password"))
    unknown = await refusal(world.sign_in("nobody-there", PASSWORD))
    impossible = await refusal(world.sign_in("NOT A LOGIN\0", PASSWORD))
    assert wrong.code is StatusCode.UNAUTHENTICATED
    assert wrong == unknown == impossible


async def test_a_changed_password_replaces_the_old_one_and_an_empty_one_stays(world: World) -> None:
    organisation_id = await world.put_organisation("bank")
    await world.put_sender(organisation_id, uuid7())
    assert await world.put_organisation("bank", password="") == organisation_id
    await world.sign_in("bank")
    await world.put_organisation("bank", password="another long password")
    assert (await refusal(world.sign_in("bank"))).code is StatusCode.UNAUTHENTICATED
    await world.sign_in("bank", "another long password")


async def test_sign_in_from_another_network_is_denied_only_with_the_right_password(world: World) -> None:
    await world.put_organisation("bank", networks=["192.0.2.0/24"])
    assert (await refusal(world.sign_in("bank", "wrong password"))).code is StatusCode.UNAUTHENTICATED
    denied = await refusal(world.sign_in("bank"))
    assert denied.code is StatusCode.PERMISSION_DENIED
    assert "127.0.0.1" in denied.message


async def test_after_too_many_failures_even_the_right_password_has_to_wait(world: World) -> None:
    organisation_id = await world.put_organisation("bank")
    await world.put_sender(organisation_id, uuid7())
    await fail(world.sign_in, "bank", SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS)
    limited = await refusal(world.sign_in("bank"))
    assert limited.code is StatusCode.RESOURCE_EXHAUSTED
    assert limited.retry_after_s is not None
    assert 0 < limited.retry_after_s <= 900
    assert re.search(r"try again in \d+ (minutes|seconds?)$", limited.message)
    world.clock.advance(timedelta(seconds=limited.retry_after_s + 1))
    await world.sign_in("bank")


# --- a stranger who guesses -----------------------------------------------------------------------------------------------

BANK, STRANGER, NEW = "127.0.0.2", "127.0.0.3", "127.0.0.4"
SignIn = Callable[..., Awaitable[Any]]


async def fail(sign_in: SignIn, login: str, limit: Limit) -> None:
    """As many wrong passwords as the limit takes."""
    for _ in range(limit.allowed(load())):
        assert (await refusal(sign_in(login, "wrong password"))).code is StatusCode.UNAUTHENTICATED


@asynccontextmanager
async def sign_ins_from(world: World, *addresses: str) -> AsyncIterator[list[SignIn]]:
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(calling_from(each, world.services["accounts"].public_address)) for each in addresses]
        stubs: list[Any] = [accounts_pb2_grpc.AccountsStub(channel) for channel in channels]

        def from_stub(stub: Any) -> SignIn:
            def sign_in(login: str, password: str = PASSWORD, *, timeout: float | None = None) -> Awaitable[Any]:
                answer: Awaitable[Any] = stub.SignIn(accounts_pb2.SignInRequest(login=login, password=password), timeout=timeout)
                return answer

            return sign_in

        yield [from_stub(stub) for stub in stubs]


@pytest.mark.parametrize("networks", [[], [f"{BANK}/32"]], ids=["signed in lately", "its networks"])
async def test_who_fails_at_another_address_does_not_lock_the_bank_out(world: World, networks: list[str]) -> None:
    await world.put_sender(await world.put_organisation("bank", networks=networks), uuid7())
    async with sign_ins_from(world, BANK, STRANGER) as (bank, stranger):
        if not networks:
            await bank("bank")
        await fail(stranger, "bank", SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS)
        assert (await refusal(stranger("bank", "wrong password"))).code is StatusCode.RESOURCE_EXHAUSTED
        await bank("bank")


async def test_many_strangers_who_fail_lock_out_new_addresses_and_none_that_is_known(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of all strangers together keeps a password from being guessed by many machines."""
    few = replace(SIGN_IN_FAILURES_PER_LOGIN, allowed=lambda _: 30)
    monkeypatch.setattr(rules, "SIGN_IN_FAILURES_PER_LOGIN", few)
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    async with sign_ins_from(world, BANK, NEW, STRANGER, "127.0.0.5") as (bank, new, *strangers):
        await bank("bank")
        for n in range(30):
            assert (await refusal(strangers[n % 2]("bank", "wrong password"))).code is StatusCode.UNAUTHENTICATED
        limited = await refusal(new("bank"))
        assert dict(limited.metadata) == {"limit": few.name}
        await bank("bank")
        world.clock.advance(timedelta(minutes=15))
        await new("bank")


async def test_a_known_address_is_known_to_every_process_and_its_own_failures_count(world: World) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    async with sign_ins_from(world, BANK) as (bank,):
        await bank("bank")
    await world.services.serve("accounts")
    async with sign_ins_from(world, BANK, STRANGER) as (bank, stranger):
        await fail(stranger, "bank", SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS)
        await fail(bank, "bank", SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS)
        assert (await refusal(bank("bank"))).code is StatusCode.RESOURCE_EXHAUSTED


async def test_an_address_is_remembered_by_a_keyed_hash_with_an_end_and_never_written_twice_an_hour(world: World) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    sql = await world.services.sql("accounts")

    async def stored() -> list[tuple[bytes, datetime]]:
        return [tuple(row) for row in await sql.fetch("SELECT address_hmac, signed_in_at FROM sign_in_addresses")]

    async with sign_ins_from(world, BANK, NEW) as (bank, new):
        await bank("bank")
        ((digest, first),) = await stored()
        assert BANK.encode() not in digest
        world.clock.advance(timedelta(minutes=59))
        await bank("bank")
        assert await stored() == [(digest, first)]
        world.clock.advance(timedelta(minutes=2))
        await bank("bank")
        assert await stored() == [(digest, world.clock.now())]
        world.clock.advance(rules.ADDRESS_KNOWN_FOR + timedelta(seconds=1))
        await new("bank")
        assert [at for _, at in await stored()] == [world.clock.now()], "what ended goes"


async def test_another_password_knows_no_address_of_the_old_one(world: World) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    async with sign_ins_from(world, BANK) as (bank,):
        await bank("bank")
        await world.put_organisation("bank", password="another long password")
        await bank("bank", "another long password")
    sql = await world.services.sql("accounts")
    assert await sql.fetchval("SELECT count(DISTINCT address_hmac) FROM sign_in_addresses") == 2


async def test_an_address_that_signed_in_while_a_clock_was_ahead_is_known_from_the_present_on(world: World) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    async with sign_ins_from(world, BANK) as (bank,):
        world.clock.advance(timedelta(days=400))
        await bank("bank")
        world.clock.advance(timedelta(days=-400))
        await bank("bank")
    sql = await world.services.sql("accounts")
    assert await sql.fetchval("SELECT signed_in_at FROM sign_in_addresses") == world.clock.now()


async def test_an_organisation_has_so_many_known_addresses_and_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ADDRESSES_MAX", 3)
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    async with sign_ins_from(world, *(f"127.0.0.{n}" for n in range(10, 15))) as addresses:
        for sign_in in addresses:
            world.clock.advance(timedelta(seconds=1))
            await sign_in("bank")
    sql = await world.services.sql("accounts")
    kept = [row[0] for row in await sql.fetch("SELECT signed_in_at FROM sign_in_addresses ORDER BY 1 DESC")]
    assert kept == [world.clock.now() - timedelta(seconds=n) for n in range(3)]


async def answered(call: Awaitable[Any]) -> Any:
    return await call


@pytest.mark.parametrize("patience_s", [None, 0.5], ids=["who wait", "who leave"])
async def test_the_bank_signs_in_while_more_strangers_guess_than_may_wait(
    world: World, monkeypatch: pytest.MonkeyPatch, patience_s: float | None
) -> None:
    """At once, from several addresses, while no hash ends; also strangers that do not wait for the answer."""
    await world.put_sender(await world.put_organisation("bank", networks=[f"{BANK}/32"]), uuid7())
    await world.put_sender(await world.put_organisation("shop"), uuid7(), name="shop")
    hashing = threading.Event()
    is_password = passwords.is_password

    def slow(of: bytes, password: bytes) -> bool:
        hashing.wait(LIMIT_S)
        return is_password(of, password)

    monkeypatch.setattr(passwords, "is_password", slow)
    # A busy machine takes a while to bring so many in.
    monkeypatch.setattr(rpc, "DEADLINE_S_MAX", 2 * LIMIT_S)
    strangers = [f"127.0.1.{n}" for n in range(1, 13)]
    async with sign_ins_from(world, BANK, *strangers) as (bank, *others), asyncio.timeout(2 * LIMIT_S):
        refused = asyncio.Semaphore(0)

        async def guess(sign_in: SignIn, n: int) -> StatusCode:
            answer = await refusal(sign_in(("bank", "shop", "nobody")[n % 3], "wrong password", timeout=patience_s))
            if answer.code is StatusCode.RESOURCE_EXHAUSTED:
                refused.release()
            return answer.code

        guessing = [asyncio.create_task(guess(sign_in, n)) for n, sign_in in enumerate(others) for _ in range(12)]
        signing_in: list[asyncio.Task[Any]] = []
        try:
            if patience_s is None:
                # All but two that hash and those that may wait.
                for _ in range(len(guessing) - HASHES_AT_ONCE - HASHES_WAITING_MAX):
                    await refused.acquire()
            else:
                await asyncio.gather(*guessing)
            signing_in = [asyncio.create_task(answered(bank("bank"))) for _ in range(4)]
            ended, _ = await asyncio.wait(signing_in, timeout=0.2)
            assert not ended, "none is refused"
        finally:
            hashing.set()
        assert all(answer.access_token for answer in await asyncio.gather(*signing_in))
        codes = Counter(await asyncio.gather(*guessing))
    if patience_s is None:
        expected = {StatusCode.UNAUTHENTICATED: HASHES_AT_ONCE + HASHES_WAITING_MAX}
        assert codes == expected | {StatusCode.RESOURCE_EXHAUSTED: len(guessing) - HASHES_AT_ONCE - HASHES_WAITING_MAX}


async def test_who_is_over_a_limit_takes_no_turn_at_hashing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    await fail(world.sign_in, "bank", SIGN_IN_FAILURES_PER_LOGIN_AND_ADDRESS)
    hashed = 0

    def count(of: bytes, password: bytes) -> bool:
        nonlocal hashed
        hashed += 1
        return False

    monkeypatch.setattr(passwords, "is_password", count)
    assert (await refusal(world.sign_in("bank"))).code is StatusCode.RESOURCE_EXHAUSTED
    assert hashed == 0
    await refusal(world.sign_in("nobody"))
    assert hashed == 1


async def test_limits_are_kept_in_postgres_while_valkey_is_away(migrated: Migrated, clock: FakeClock) -> None:
    urls = await migrated("accounts")
    db = Database(urls["accounts"], "accounts", 1)
    await db.open()
    valkey = Valkey("unix:///nowhere/valkey.sock")
    limiter = Limiter(valkey, PostgresCounter(db, clock), load(codes_per_number_hour=3), clock)
    one, another = Counted(CODES_PER_NUMBER, "one"), Counted(CODES_PER_NUMBER, "another")
    try:
        for _ in range(3):
            await limiter.take(one)
        with pytest.raises(LimitExceeded) as caught:
            await limiter.take(one)
        assert caught.value.retry_after is not None
        await limiter.take(another)
        clock.advance(caught.value.retry_after + timedelta(seconds=1))
        await limiter.check(one)
        await limiter.take(one)
        clock.advance(timedelta(hours=3))
        await limiter.take(another)
        rows = await db.fetch("test", "SELECT counted FROM limit_counts WHERE ends_at < $1", clock.now())
        assert rows == [], "windows that ended are deleted"
    finally:
        await db.aclose()
        await valkey.aclose()


async def test_profile_shows_what_the_root_certified(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    logo, signed = png(512, 512), world.entry(sender_id, name="Банк")
    await world.put_sender(
        organisation_id, sender_id, sender_entry=signed, logo_png=logo, brand_colour="#A0B1C2", brand_text_colour="#ffffff"
    )
    platform_entry = world.entry(uuid7(), role=EntryRole.PLATFORM)
    await world.administer(
        "PutPlatformEntry",
        administration_pb2.PutPlatformEntryRequest(platform_entry=platform_entry, root_public_key=world.root.public_key),
    )
    profile = await world.accounts.GetSenderProfile(accounts_pb2.GetSenderProfileRequest(sender_id=sender_id))
    assert profile == accounts_pb2.GetSenderProfileResponse(
        sender_entry=signed,
        platform_entry=platform_entry,
        display_name="Банк",
        brand_colour="#a0b1c2",
        brand_text_colour="#ffffff",
        logo_png=logo,
    )


async def test_profile_is_remembered_for_seconds_only_and_a_logo_stays(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    ask = accounts_pb2.GetSenderProfileRequest(sender_id=sender_id)
    assert (await refusal(world.accounts.GetSenderProfile(ask))).code is StatusCode.NOT_FOUND
    await world.put_sender(organisation_id, sender_id, logo_png=png(512, 512))
    await world.accounts.GetSenderProfile(ask)
    await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=2, name="Renamed"))
    assert (await world.accounts.GetSenderProfile(ask)).display_name == "A Bank"
    world.clock.advance(timedelta(seconds=6))
    renamed = await world.accounts.GetSenderProfile(ask)
    assert renamed.display_name == "Renamed"
    assert renamed.logo_png


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"logo_png": png(511, 512)}, "logo_png"),
        ({"logo_png": b"GIF89a"}, "logo_png"),
        ({"brand_colour": "red"}, "brand_colour"),
        ({"scopes": ["publish", "everything"]}, "scopes"),
        ({"app_ids": ["unknown-app"]}, "app_ids"),
        ({"app_ids": []}, "app_ids"),
        ({"name": " cards"}, "name"),
    ],
)
async def test_a_sender_that_does_not_fit_is_refused_by_field(world: World, fields: dict[str, Any], wrong: str) -> None:
    organisation_id = await world.put_organisation("bank")
    with pytest.raises(InvalidRequest) as caught:
        await world.put_sender(organisation_id, uuid7(), **fields)
    assert caught.value.field == wrong


async def test_an_entry_must_be_signed_by_the_root_and_name_the_sender(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    for entry in (
        world.entry(sender_id, root=RootKey.generate()),
        world.entry(uuid7()),
        world.entry(sender_id, role=EntryRole.PLATFORM),
        world.entry(sender_id)[:-1],
        b"",
    ):
        with pytest.raises(InvalidRequest) as caught:
            await world.put_sender(organisation_id, sender_id, sender_entry=entry)
        assert caught.value.field == "sender_entry"
    # Whoever signed with the wrong root, or named the wrong app, is told which root it must be.
    with pytest.raises(InvalidRequest, match=world.root.public_key.hex()):
        await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, root=RootKey.generate()))


async def test_an_entry_never_goes_back_to_a_lower_serial(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    newest = world.entry(sender_id, serial=5)
    await world.put_sender(organisation_id, sender_id, sender_entry=newest)
    await world.put_sender(organisation_id, sender_id, sender_entry=newest)
    for serial in (4, 5):
        with pytest.raises(InvalidRequest) as caught:
            await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=serial))
        assert caught.value.field == "sender_entry"


async def test_a_sender_stays_with_its_organisation_and_names_are_unique_in_it(world: World) -> None:
    bank, other, sender_id = await world.put_organisation("bank"), await world.put_organisation("other"), uuid7()
    await world.put_sender(bank, sender_id)
    for organisation_id, wanted_id, wrong in (
        (other, sender_id, "organisation_id"),
        (uuid7(), uuid7(), "organisation_id"),
        (bank, uuid7(), "name"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await world.put_sender(organisation_id, wanted_id, name="cards")
        assert caught.value.field == wrong


async def test_apps_of_different_roots_cannot_share_a_sender_and_a_root_in_use_stays(world: World) -> None:
    organisation_id, other_root = await world.put_organisation("bank"), RootKey.generate()
    await world.put_app("other-app", other_root)
    with pytest.raises(InvalidRequest, match="different roots"):
        await world.put_sender(organisation_id, uuid7(), app_ids=["bank-app", "other-app"])
    await world.put_sender(organisation_id, uuid7())
    with pytest.raises(InvalidRequest, match="new app id"):
        await world.put_app("bank-app", other_root)
    await world.put_app("other-app", world.root)
    for unusable in (b"r" * 31, bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(InvalidRequest, match="Ed25519"):
            await world.administer("PutApp", administration_pb2.PutAppRequest(app_id="new-app", name="An app", root_public_key=unusable))


async def test_platform_entry_needs_the_root_of_an_app(world: World) -> None:
    stranger = RootKey.generate()
    for root, signer, wrong in ((stranger, stranger, "root_public_key"), (world.root, stranger, "platform_entry")):
        request = administration_pb2.PutPlatformEntryRequest(
            platform_entry=world.entry(uuid7(), role=EntryRole.PLATFORM, root=signer), root_public_key=root.public_key
        )
        with pytest.raises(InvalidRequest) as caught:
            await world.administer("PutPlatformEntry", request)
        assert caught.value.field == wrong


async def test_a_revocation_list_is_given_to_anybody_as_the_root_signed_it(world: World) -> None:
    assert await world.get_revocations() == b""
    signed = world.revocations(RevokedKey(b"k" * 32))
    await world.put_revocations(signed)
    assert await world.get_revocations() == b"", "an answer is good for five seconds"
    world.clock.advance(timedelta(seconds=5))
    assert await world.get_revocations() == signed
    assert await world.get_revocations(known_serial=1) == b""
    assert await world.get_revocations(RootKey.generate().public_key) == b""
    wrong = await refusal(world.accounts.GetRevocations(accounts_pb2.GetRevocationsRequest(root_public_key=b"short")))
    assert (wrong.code, wrong.field) == (StatusCode.INVALID_ARGUMENT, "root_public_key")


async def test_an_operator_gets_a_lost_list_back(world: World) -> None:
    request = administration_pb2.GetRevocationListRequest(root_public_key=world.root.public_key)
    assert (await world.administer("GetRevocationList", request)).revocations == b""
    await world.put_app("bank-app")
    newest = world.revocations(RevokedKey(b"\x07" * 32), serial=2)
    await world.put_revocations(newest)
    assert (await world.administer("GetRevocationList", request)).revocations == newest
    with pytest.raises(InvalidRequest, match="32 bytes"):
        await world.administer("GetRevocationList", administration_pb2.GetRevocationListRequest())


async def test_roots_that_somebody_makes_up_do_not_push_out_the_one_that_is_pinned(world: World) -> None:
    signed = world.revocations(RevokedKey(b"k" * 32))
    await world.put_revocations(signed)
    for n in range(100):
        assert await world.get_revocations(n.to_bytes(32, "big")) == b""
    assert await world.get_revocations() == signed


async def test_a_revocation_list_never_goes_back_and_the_same_may_be_put_again(world: World) -> None:
    newest = world.revocations(RevokedKey(b"k" * 32), serial=5)
    await world.put_revocations(newest)
    await world.put_revocations(newest)
    for older in (world.revocations(serial=4), world.revocations(RevokedKey(b"q" * 32), serial=5)):
        with pytest.raises(InvalidRequest, match="root revoke --list") as caught:
            await world.put_revocations(older)
        assert caught.value.field == "revocations"
    assert await world.get_revocations() == newest
    longest = world.revocations(*(RevokedKey(n.to_bytes(32, "big")) for n in range(4096)), serial=2**63 - 1)
    await world.put_revocations(longest)
    world.clock.advance(timedelta(seconds=5))
    assert await world.get_revocations() == longest


async def test_of_two_lists_put_at_once_the_newer_one_stays(world: World) -> None:
    lists = [world.revocations(RevokedKey(bytes([serial]) * 32), serial=serial) for serial in range(1, 9)]
    await asyncio.gather(*(world.put_revocations(each) for each in lists), return_exceptions=True)
    assert await world.get_revocations() == lists[-1]


async def test_a_revocation_list_must_be_signed_by_the_root_of_an_app(world: World) -> None:
    stranger = RootKey.generate()
    signed = world.revocations(RevokedKey(b"k" * 32))
    too_high = world.revocations(serial=2**63)
    for root, blob, wrong in (
        (stranger, signed, "root_public_key"),
        (world.root, sign_revocations(stranger, RevocationList(1, 0)), "revocations"),
        (world.root, signed[:-1], "revocations"),
        (world.root, b"", "revocations"),
        (world.root, too_high, "revocations"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await world.put_revocations(blob, root)
        assert caught.value.field == wrong
    assert await world.get_revocations() == b""


async def test_what_is_revoked_cannot_be_put(world: World) -> None:
    organisation_id, sender_id, platform_id = await world.put_organisation("bank"), uuid7(), uuid7()
    revoked_key, good_key = (ContentSigningKey.generate().public_key for _ in range(2))
    await world.put_revocations(
        world.revocations(RevokedEntries(SenderId(sender_id), 5), RevokedEntries(SenderId(platform_id), 5), RevokedKey(revoked_key))
    )
    for entry, words in (
        (world.entry(sender_id, serial=5, keys=[good_key]), "revoked this entry"),
        (world.entry(sender_id, serial=6, keys=[good_key, revoked_key]), revoked_key.hex()),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            await world.put_sender(organisation_id, sender_id, sender_entry=entry)
        assert caught.value.field == "sender_entry"
    for entry, words in (
        (world.entry(platform_id, serial=5, role=EntryRole.PLATFORM, keys=[good_key]), "revoked this entry"),
        (world.entry(platform_id, serial=6, role=EntryRole.PLATFORM, keys=[revoked_key]), revoked_key.hex()),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            await world.put_platform_entry(entry)
        assert caught.value.field == "platform_entry"
    await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=6, keys=[good_key]))
    await world.put_platform_entry(world.entry(platform_id, serial=6, role=EntryRole.PLATFORM, keys=[good_key]))


async def test_services_are_told_what_of_a_sender_is_revoked(world: World) -> None:
    organisation_id, sender_id, platform_id = await world.put_organisation("bank"), uuid7(), uuid7()
    old, new, platform_key, other_platform_key, good_platform_key = (ContentSigningKey.generate().public_key for _ in range(5))
    await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=5, keys=[old, new]))

    async def told() -> tuple[bool, list[bytes], bool]:
        sender = await world.sender(sender_id)
        return sender.is_entry_revoked, list(sender.revoked_keys), sender.is_platform_revoked

    assert await world.put_revocations(world.revocations(RevokedKey(platform_key), serial=1)) == []
    assert await told() == (False, [], False), "there is no key of the platform yet"
    await world.put_platform_entry(world.entry(platform_id, role=EntryRole.PLATFORM, keys=[other_platform_key, good_platform_key]))
    assert await told() == (False, [], False)
    hit = await world.put_revocations(world.revocations(RevokedKey(other_platform_key), RevokedKey(old), serial=2))
    assert sorted(hit) == [(b"", "A Bank"), (sender_id, "A Bank")]
    assert await told() == (False, [old, other_platform_key], False), "the platform may seal with its other key"
    by_entry = [RevokedEntries(SenderId(each), 5) for each in (sender_id, platform_id)]
    assert len(await world.put_revocations(world.revocations(*by_entry, serial=3))) == 2
    assert await told() == (True, [], True)
    await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=6, keys=[new]))
    assert await told() == (False, [], True)


async def test_entries_that_end_are_told_soonest_first(world: World) -> None:
    organisation_id, soon, late, platform_id = await world.put_organisation("bank"), uuid7(), uuid7(), uuid7()
    await world.put_sender(organisation_id, late, name="late", sender_entry=world.entry(late, days=30))
    await world.put_sender(organisation_id, soon, name="soon", sender_entry=world.entry(soon, days=2, name="Soon"))
    await world.put_platform_entry(world.entry(platform_id, role=EntryRole.PLATFORM, days=1))

    async def ending(days: int) -> list[tuple[bytes, str, bytes]]:
        request = administration_pb2.GetEndingEntriesRequest()
        request.before.FromDatetime(world.clock.now() + timedelta(days=days))
        answer = await world.administer("GetEndingEntries", request)
        return [(each.sender_id, each.display_name, each.root_public_key) for each in answer.entries]

    assert await ending(1) == []
    assert await ending(14) == [(b"", "A Bank", world.root.public_key), (soon, "Soon", world.root.public_key)]
    assert [each[0] for each in await ending(60)] == [b"", soon, late]
    world.clock.advance(timedelta(days=31))
    assert [each[0] for each in await ending(0)] == [b"", soon, late]


async def test_an_organisation_needs_a_password_at_first_and_proper_networks(world: World) -> None:
    for fields, wrong in (
        ({"password": ""}, "password"),
        ({"password": "short"}, "password"),
        ({"networks": ["10.0.0.1/8"]}, "networks"),
        ({"name": ""}, "name"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await world.put_organisation("bank", **fields)
        assert caught.value.field == wrong


async def test_look_ups_leave_out_what_is_unknown(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    await world.put_app("another-app")
    await world.put_sender(organisation_id, sender_id, app_ids=["bank-app", "another-app"])
    senders = await world.administer("GetSenders", administration_pb2.GetSendersRequest(sender_ids=[uuid7(), sender_id]))
    assert [(one.sender_id, one.organisation_id, list(one.app_ids)) for one in senders.senders] == [
        (sender_id, organisation_id, ["bank-app", "another-app"])
    ]
    apps = await world.administer("GetApps", administration_pb2.GetAppsRequest(app_ids=["bank-app", "nothing", "\0"]))
    assert [(app.app_id, app.name) for app in apps.apps] == [("bank-app", "An app")]


async def test_every_change_is_in_the_journal_without_its_secrets(world: World) -> None:
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    await world.put_sender(organisation_id, sender_id)
    await world.put_revocations(world.revocations(RevokedKey(b"k" * 32), RevokedEntries(SenderId(sender_id), 0), serial=3))
    admin = await connect(world.urls["admin"])
    rows = await admin.fetch("SELECT actor, action, subject, detail::text FROM accounts.journal ORDER BY entry_id")
    await admin.close()
    assert [(row["actor"], row["action"], row["subject"]) for row in rows] == [
        ("operator", "PutApp", "bank-app"),
        ("operator", "PutOrganisation", organisation_id.hex()),
        ("operator", "PutSender", sender_id.hex()),
        ("operator", "PutRevocations", world.root.public_key.hex()),
    ]
    assert json.loads(rows[3]["detail"]) == {"serial": 3, "senders": 1, "keys": 1}
    assert json.loads(rows[1]["detail"])["password_changed"] is True
    assert PASSWORD not in rows[1]["detail"]


async def test_only_the_operator_administers(world: World) -> None:
    publishing = world.services.channel("accounts", "publishing")
    request = administration_pb2.PutOrganisationRequest(login="bank", name="A bank", password=PASSWORD)
    with pytest.raises(Unavailable, match="PERMISSION_DENIED"):
        await world.administer("PutOrganisation", request, publishing)
    stranger = administration_pb2_grpc.AdministrationStub(world.services["accounts"].public)
    with pytest.raises(grpc.aio.AioRpcError):
        await stranger.PutOrganisation(request)


# Entries of the past


async def certified(world: World, publishing: MeshChannel, sender_id: bytes, key: ContentSigningKey) -> bytes:
    """The sender's entry that allowed what this key signed just now."""
    now_ms = to_ms(world.clock.now()) + 1
    header = Header(ContentId(uuid7()), SenderId(sender_id), key.key_id, RecipientRef(bytes(32)), now_ms, now_ms + 1000)
    request = administration_pb2.FindEntriesRequest(headers=[header.encode()])
    (result,) = (await world.administer("FindEntries", request, publishing)).results
    assert result.platform_entry == b""
    found: bytes = result.sender_entry
    return found


async def test_the_entry_of_a_time_is_found_after_others_and_a_refused_one_is_not_kept(world: World) -> None:
    publishing = world.services.channel("accounts", "publishing")
    organisation_id, sender_id = await world.put_organisation("bank"), uuid7()
    key, next_key = ContentSigningKey.generate(), ContentSigningKey.generate()
    first, renewed = world.entry(sender_id, serial=1, keys=[key.public_key]), world.entry(sender_id, serial=2, keys=[key.public_key])
    await world.put_sender(organisation_id, sender_id, sender_entry=first)
    assert await certified(world, publishing, sender_id, key) == first
    world.clock.advance(timedelta(seconds=1))
    await world.put_sender(organisation_id, sender_id, sender_entry=renewed)
    await world.put_sender(organisation_id, sender_id, sender_entry=renewed, name="renamed")
    # The newest of those that were put by then.
    assert await certified(world, publishing, sender_id, key) == renewed
    world.clock.advance(timedelta(seconds=-1))
    assert await certified(world, publishing, sender_id, key) == first
    replaced = world.entry(sender_id, serial=3, keys=[next_key.public_key])
    await world.put_sender(organisation_id, sender_id, sender_entry=replaced)
    assert await certified(world, publishing, sender_id, next_key) == replaced
    assert await certified(world, publishing, sender_id, key) == first
    with pytest.raises(InvalidRequest):
        await world.put_sender(organisation_id, sender_id, sender_entry=world.entry(sender_id, serial=2, keys=[next_key.public_key]))
    admin = await connect(world.urls["admin"])
    kept = await admin.fetch("SELECT serial FROM accounts.entries WHERE sender_id = $1 ORDER BY serial", sender_id)
    await admin.close()
    assert [row["serial"] for row in kept] == [1, 2, 3]


async def test_an_entry_that_was_put_after_the_content_serves_where_there_is_no_other(world: World) -> None:
    publishing = world.services.channel("accounts", "publishing")
    organisation_id, sender_id, key = await world.put_organisation("bank"), uuid7(), ContentSigningKey.generate()
    entry = world.entry(sender_id, keys=[key.public_key])
    world.clock.advance(timedelta(seconds=1))
    await world.put_sender(organisation_id, sender_id, sender_entry=entry)
    world.clock.advance(timedelta(seconds=-1))
    assert await certified(world, publishing, sender_id, key) == entry


async def test_a_sender_that_was_put_by_another_organisation_leaves_no_entry(world: World) -> None:
    publishing = world.services.channel("accounts", "publishing")
    bank, shop, sender_id = await world.put_organisation("bank"), await world.put_organisation("shop"), uuid7()
    key = ContentSigningKey.generate()
    await world.put_sender(bank, sender_id)
    with pytest.raises(InvalidRequest):
        await world.put_sender(shop, sender_id, sender_entry=world.entry(sender_id, serial=9, keys=[key.public_key]))
    assert await certified(world, publishing, sender_id, key) == b""


async def test_strangers_who_give_up_after_moments_end_no_call_but_their_own(world: World) -> None:
    await world.put_sender(await world.put_organisation("bank"), uuid7())
    address = world.services["accounts"].public_address
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.impatient", address, "bank", PASSWORD), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(LIMIT_S):
        said, _ = await process.communicate()
    ended = json.loads(said)
    assert sum(ended["strangers"].values()) > 100
    # On a machine that is too busy for it, a bank may be asked to come back: never cut off.
    assert set(ended["bank"]) <= {"OK", StatusCode.RESOURCE_EXHAUSTED.name}
    assert ended["bank"]["OK"]
