"""Every RPC with every field of its request at its worst, by a caller who may make the call: answered, or refused by the name of a field.

No value of a request is a bug of the service, nor taken for trouble with the database: not in the answer, not in the result of one item,
and not in the log. One field is wrong at a time; everything else is as a request that is good, with ids of its own, so that the value
gets as far as it can.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import pkgutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
import structlog
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

import sealpush.v1
import sealpushd.v1
from sealpush import MemoryKeystore
from sealpush.envelope import Header
from sealpush.ids import ContentId, DeviceId, RecipientRef, SenderId, uuid7
from sealpush.keys import EntryRole, IdentityKey, PrekeyKind, SenderMode, generate_prekey
from sealpush.proofs import body_digest, change_proof, sign_proof
from sealpush.v1 import keys_pb2, publish_pb2, registration_pb2
from sealpush.wire import wire_prekey
from sealpushd.engines import Engines
from sealpushd.platform import access
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated, read_refusal
from tests.contract.phones import APP, CONTENT_KEY, PASSWORD, PLATFORM_KEY, ROOT, SENDER_ID, World, WrongClock, make_entry, whole_world

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("cheap_passwords")]

for _package in (sealpush.v1, sealpushd.v1):
    for _module in pkgutil.iter_modules(_package.__path__):
        if _module.name.endswith("_pb2"):
            importlib.import_module(f"{_package.__name__}.{_module.name}")

# Which service answers for a proto service, and where.
SERVED_BY: Final = {
    "Accounts": "accounts",
    "Administration": "accounts",
    "Registration": "registration",
    "Directory": "registration",
    "Keys": "keys",
    "Sealing": "keys",
    "Publishing": "publishing",
    "Messages": "fetch",
    "Mailbox": "fetch",
    "Lanes": "dispatch",
    "Providers": "dispatch",
}
# What a device signs as bytes, by method: the fields of these are walked too, each time signed anew.
SIGNED: Final[dict[str, type[Message]]] = {
    "UpdateInstallation": registration_pb2.Installation,
    "RemoveDevice": registration_pb2.DeviceRemoval,
    "SetPreference": registration_pb2.Preference,
    "SetRegistrationLock": registration_pb2.RegistrationLock,
    "UploadPrekeys": keys_pb2.PrekeyUpload,
}
# Fields that a good request of these methods does without, or that would keep out everything else.
LEFT_OUT: Final = ("subscriptions", "networks", "primary_only", "identity_unchanged_for")
DURATIONS_S: Final = {"wait": 1}
# What a service stores once, or answers from memory when it comes again.
FRESH: Final = ("message_id", "request_id")
# A stream that goes on is left after this; what a value breaks, it breaks at once.
LISTEN_S: Final = 0.1
FORBIDDEN: Final = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.DATA_LOSS,
}

INTEGERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (0, -1, -(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (0, -1, -(2**63), 2**63 - 1, 253_402_300_800_000),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 253_402_300_800_000, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, -1, 99, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_DOUBLE: (float("nan"), float("inf"), float("-inf"), -1.0, 1e308),
    FieldDescriptor.CPPTYPE_FLOAT: (float("nan"), float("inf"), float("-inf"), -1.0),
}
TEXTS: Final = (
    "",
    "\0",
    "a\0b",
    "\x1b[31m",
    "\u202e",
    "\ufffe",
    "\U0010ffff",
    " ",
    "a" * 65,
    "a" * 20_000,
    "999999999999999999999999",
    "%s';--",
)
BYTES: Final = (b"", b"\0", bytes(15), bytes(17), bytes(16), b"\xff" * 16, b"\xff" * 32, b"\xff" * 64, b"\0" * 5_000, b"\xff" * 200_000)
MOMENTS: Final = (
    (0, 0),
    (253_402_300_800, 0),
    (253_402_300_799, 999_999_999),
    (-62_135_596_801, 0),
    (-62_135_596_800, 0),
    (2**63 - 1, 0),
    (-(2**63), 0),
    (1, -1),
    (1, 2**31 - 1),
    (315_576_000_001, 0),
    (-1, 1),
)


def methods() -> list[MethodDescriptor]:
    pool = descriptor_pool.Default()
    return [pool.FindMethodByName(name[1:].replace("/", ".")) for name in access.ACCESS]


def is_repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def is_time(kind: Any) -> bool:
    return kind is not None and kind.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration")


def is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


@dataclass
class Hostile:
    world: World
    phone: str
    device_id: DeviceId
    subscriber_id: bytes
    identity: IdentityKey
    keystore: MemoryKeystore
    bearers: dict[str, str]

    def plausible(self, made: Message, depth: int = 0) -> Message:
        """Fill a message with values that could be right."""
        for field in made.DESCRIPTOR.fields:
            if field.containing_oneof is not None and made.WhichOneof(field.containing_oneof.name) is not None:
                continue
            if is_map(field) or field.name in LEFT_OUT:
                continue
            kind = field.message_type
            if kind is not None:
                if depth > 3:
                    continue
                inner = getattr(made, field.name).add() if is_repeated(field) else getattr(made, field.name)
                inner.SetInParent()
                if is_time(kind):
                    now_s = int(self.world.services.clock.now().timestamp())
                    inner.seconds = now_s + 3600 if kind.name == "Timestamp" else DURATIONS_S.get(field.name, 60)
                elif kind is keys_pb2.Prekey.DESCRIPTOR:
                    _, prekey = generate_prekey(
                        self.identity,
                        self.device_id,
                        prekey_id=2,
                        kind=PrekeyKind.SIGNED,
                        now_ms=int(self.world.services.clock.now().timestamp() * 1000),
                    )
                    inner.CopyFrom(wire_prekey(prekey))
                else:
                    self.plausible(inner, depth + 1)
                continue
            value = self.value(field)
            if is_repeated(field):
                getattr(made, field.name).append(value)
            else:
                setattr(made, field.name, value)
        return made

    def value(self, field: Any) -> Any:
        name = field.name
        now_ms = int(self.world.services.clock.now().timestamp() * 1000)
        known: dict[str, Any] = {
            "app_id": APP,
            "app_ids": APP,
            "phone": self.phone,
            "login": "bank",
            "password": PASSWORD,
            "organisation_id": self.world.organisation_id,
            "sender_id": SENDER_ID,
            "sender_entry": make_entry(SENDER_ID, SenderMode.SERVER | SenderMode.END_TO_END, CONTENT_KEY),
            "root_public_key": ROOT.public_key,
            "platform_entry": make_entry(SenderId(uuid7()), SenderMode.SERVER, PLATFORM_KEY, role=EntryRole.PLATFORM),
            "sender_name": "bank",
            "push_token": "ab" * 32,
            "brand_colour": "#112233",
            "brand_text_colour": "#ffffff",
            "scopes": "publish",
            "image_url": "https://bank.example/image",
            "content_url": "https://bank.example/content",
            "headers": Header(ContentId(uuid7()), SENDER_ID, CONTENT_KEY.key_id, RecipientRef(bytes(32)), now_ms, now_ms + 60_000).encode(),
            "push_service": "fcm",
            "device_id": self.device_id,
            "device_ids": self.device_id,
            "subscriber_id": self.subscriber_id,
            "request_id": uuid7().hex(),
            "message_id": uuid7(now_ms),
            "created_at_ms": now_ms,
            "expires_at_ms": now_ms + 60_000,
            "request_mac": bytes(32),
            "page_token": b"",
            "position": b"",
            "stanza": b"s" * 100,
            "head": b"h" * 126,
            "tail": b"t" * 200,
            "page_size": 1,
            "counter": self.keystore.next_counter(),
            "replace_hash": b"",
            "logo_png": b"",
            "identity_public_key": self.identity.public_key,
        }
        if name in known:
            return known[name]
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return b"i" * 16 if field.type == FieldDescriptor.TYPE_BYTES else "a"
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return field.enum_type.values[min(1, len(field.enum_type.values) - 1)].number
        return 0 if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else 1

    def requests(self, method: MethodDescriptor) -> Iterator[tuple[str, Message]]:
        """A request for each field and each hostile value, and what is wrong with it."""
        kind = message_factory.GetMessageClass(method.input_type)
        signed = SIGNED.get(method.name)
        base = self.plausible(kind())
        yield "nothing", base
        for what, request in hostile(base):
            if signed is None:
                self.make_fresh(request, base)
            yield what, request
        if signed is not None:
            for what, change in hostile(self.plausible(signed())):
                request = kind()
                request.CopyFrom(base)
                body = change.SerializeToString()
                counter = self.keystore.next_counter()
                request.change = body  # type: ignore[attr-defined]
                proof = change_proof(self.device_id, counter, f"/{method.containing_service.full_name}/{method.name}", body_digest(body))
                request.proof.counter, request.proof.signature = counter, sign_proof(self.identity, proof)  # type: ignore[attr-defined]
                yield f"change.{what}", request

    def make_fresh(self, made: Message, base: Message) -> None:
        """Ids of its own instead of the base's, which are stored already: else the value behind them is never looked at."""
        for field in made.DESCRIPTOR.fields:
            if field.message_type is not None and not is_map(field) and not is_time(field.message_type):
                one, other = getattr(made, field.name), getattr(base, field.name)
                pairs = zip(one, other, strict=False) if is_repeated(field) else [(one, other)] if made.HasField(field.name) else []
                for inner, of_base in pairs:
                    self.make_fresh(inner, of_base)
            elif field.name in FRESH and not is_repeated(field) and getattr(made, field.name) == getattr(base, field.name):
                setattr(made, field.name, self.value(field))

    async def call(self, method: MethodDescriptor, request: Message) -> grpc.aio.AioRpcError | list[Message]:
        """The error, or what was answered."""
        path = f"/{method.containing_service.full_name}/{method.name}"
        services, service = self.world.services, SERVED_BY[method.containing_service.name]
        rule = access.ACCESS[path]
        metadata: Any = ()
        if isinstance(rule, access.Services):
            caller = self.callers[service, sorted(rule.names)[0]]
            channel, metadata = caller.channel, caller.metadata()
        else:
            channel = services[service].public
            if not isinstance(rule, access.Anyone):
                metadata = (("authorization", f"Bearer {self.bearers['sender' if isinstance(rule, access.SenderWith) else 'device']}"),)
        serialise: Callable[[Any], bytes] = type(request).SerializeToString
        read: Callable[[bytes], Message] = message_factory.GetMessageClass(method.output_type).FromString
        try:
            if not method.server_streaming and not method.client_streaming:
                return [await channel.unary_unary(path, serialise, read)(request, metadata=metadata, timeout=LIMIT_S)]
            call: Any
            if method.client_streaming:
                call = channel.stream_stream(path, serialise, read)(metadata=metadata)
                await call.write(request)
                await call.done_writing()
            else:
                call = channel.unary_stream(path, serialise, read)(request, metadata=metadata)
            answers: list[Message] = []
            try:
                async with asyncio.timeout(LIMIT_S if method.client_streaming else LISTEN_S):
                    async for answer in call:
                        answers.append(answer)  # noqa: PERF401 - what came before the time is over is looked at
            except TimeoutError:
                if method.client_streaming:
                    raise
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            return error
        return answers

    def __post_init__(self) -> None:
        pairs = {
            (SERVED_BY[path.split("/")[1].rpartition(".")[2]], sorted(rule.names)[0])
            for path, rule in access.ACCESS.items()
            if isinstance(rule, access.Services)
        }
        self.callers = {pair: self.world.services.channel(*pair) for pair in pairs}


def hostile(base: Message, depth: int = 0) -> Iterator[tuple[str, Message]]:
    """Copies of a message, each with one thing wrong."""

    def copy() -> Any:
        made = type(base)()
        made.CopyFrom(base)
        return made

    for field in base.DESCRIPTOR.fields:
        if is_map(field):
            for key in TEXTS:
                made = copy()
                getattr(made, field.name)[key] = key
                yield f"{field.name}[{key[:20]!r}]", made
            continue
        kind = field.message_type
        if kind is not None:
            if is_time(kind):
                for seconds, nanos in MOMENTS:
                    made = copy()
                    inner = getattr(made, field.name).add() if is_repeated(field) else getattr(made, field.name)
                    inner.seconds, inner.nanos = seconds, nanos
                    yield f"{field.name}={seconds}s{nanos}ns", made
                continue
            made = copy()
            made.ClearField(field.name)
            yield f"no {field.name}", made
            if is_repeated(field):
                present = list(getattr(base, field.name))
                for count in (2, 600):
                    if present:
                        made = copy()
                        for _ in range(count - 1):
                            getattr(made, field.name).add().CopyFrom(present[0])
                        yield f"{count} {field.name}", made
                made = copy()
                getattr(made, field.name).add()
                yield f"an empty one of {field.name}", made
            else:
                made = copy()
                getattr(made, field.name).Clear()
                getattr(made, field.name).SetInParent()
                yield f"empty {field.name}", made
                # An arm of a oneof that was not chosen is walked in its own form.
                present = [getattr(base, field.name)]
            if depth < 4 and present:
                for what, inner in hostile(present[0], depth + 1):
                    made = copy()
                    if is_repeated(field):
                        getattr(made, field.name)[0].CopyFrom(inner)
                    else:
                        getattr(made, field.name).CopyFrom(inner)
                    yield f"{field.name}.{what}", made
            continue
        values: tuple[Any, ...]
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            values = BYTES if field.type == FieldDescriptor.TYPE_BYTES else TEXTS
        else:
            values = INTEGERS[field.cpp_type]
        for value in values:
            made = copy()
            if is_repeated(field):
                del getattr(made, field.name)[:]
                getattr(made, field.name).append(value)
            else:
                setattr(made, field.name, value)
            yield f"{field.name}={value!r:.40}", made
        if is_repeated(field) and getattr(base, field.name):
            first = getattr(base, field.name)[0]
            for count in (0, 2, 600, 5_000):
                made = copy()
                del getattr(made, field.name)[:]
                getattr(made, field.name).extend([first] * count)
                yield f"{count} {field.name}", made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def urls(migrated: Migrated) -> dict[str, str]:
    return await migrated("accounts", "registration", "keys", "publishing", "dispatch", "fetch")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hostile_caller(engines: Engines, mesh: Mesh, urls: dict[str, str]) -> AsyncIterator[Hostile]:
    async with whole_world(engines, mesh, urls, FakeClock()) as world:
        keystore = MemoryKeystore()
        device, phone = await world.registered(WrongClock(), keystore)
        await device.drain()
        identity, registration = keystore.identity(), keystore.registration()
        assert identity is not None
        assert registration is not None
        bearers = {"device": await device._session.bearer(device._session.deadline())}
        claims = {
            "org": world.organisation_id.hex(),
            "apps": [APP],
            "scopes": sorted(access.SCOPES),
            "networks": [],
        }
        bearers["sender"], _ = mesh.keys["accounts"].sign("sender", SENDER_ID.hex(), 900, claims)
        yield Hostile(world, phone, registration.device_id, registration.subscriber_id, identity, keystore, bearers)


@pytest.mark.parametrize("method", methods(), ids=lambda method: f"{method.containing_service.name}.{method.name}")
async def test_no_value_of_a_request_is_a_bug_of_the_service(hostile_caller: Hostile, method: MethodDescriptor) -> None:
    wrong: list[str] = []
    with structlog.testing.capture_logs() as logs:
        for what, request in hostile_caller.requests(method):
            del logs[:]
            answer = await hostile_caller.call(method, request)
            wrong += [f"{what}: {problem}" for problem in problems(answer)]
            wrong += [f"{what}: the log says: {entry['event']} {entry.get('exc_info', '')!r}" for entry in logs if "exc_info" in entry]
    assert not wrong, f"{len(wrong)} values, such as\n" + "\n".join(wrong[:40])


def problems(answer: grpc.aio.AioRpcError | list[Message]) -> Iterator[str]:
    if isinstance(answer, grpc.aio.AioRpcError):
        refusal = read_refusal(answer)
        if refusal.code in FORBIDDEN:
            yield f"{refusal.code.name} {refusal.message}"
        elif refusal.code is grpc.StatusCode.INVALID_ARGUMENT and not refusal.field:
            yield f"names no field: {refusal.message}"
        return
    for item in itertools.chain.from_iterable(map(refusals, answer)):
        if item.code in {code.value[0] for code in FORBIDDEN}:
            yield f"the result says {item.code} {item.message}"
        elif item.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] and not item.field:
            yield f"the result names no field: {item.message}"


def refusals(answer: Message) -> Iterator[publish_pb2.Refusal]:
    """Those anywhere inside an answer."""
    if isinstance(answer, publish_pb2.Refusal):
        yield answer
    for field, value in answer.ListFields():
        if field.message_type is not None and not is_map(field):
            for inner in value if is_repeated(field) else (value,):
                yield from refusals(inner)
