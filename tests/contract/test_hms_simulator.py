"""The simulated Push Kit over real sockets, from Huawei's documentation: no maintained client of it could be found to hold against it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import grpc
import httpx
import pytest
import structlog

from sealpushd.simulators import core as simulated
from sealpushd.simulators.exchange import Connection, Exchange
from sealpushd.simulators.listener import HttpListener
from sealpushd.simulators.receipts import ReceiptSettings
from sealpushd.simulators.server import HmsClient, RunningSimulators, SimulatedHms, SimulatorSettings, simulators
from sealpushd.v1 import simulator_pb2 as pb
from sealpushd.v1.simulator_pb2_grpc import SimulatedPushStub
from tests.contract.harness import LIMIT_S, FakeClock
from tests.contract.push_simulators import Certificates, raw_client

APP, OTHER_APP, SECRET = "104000001", "104000002", "a secret of a test"
USER, KEY = "receipts", "key of receipts"
CLIENTS = (HmsClient(APP, SECRET, USER, KEY), HmsClient(OTHER_APP, SECRET))
SEND = f"/v1/{APP}/messages:send"
HMS = pb.SIMULATED_PUSH_SERVICE_HMS


@pytest.fixture
async def running(certificates: Certificates, clock: FakeClock) -> AsyncIterator[RunningSimulators]:
    settings = SimulatorSettings(certificates.certificate, certificates.private_key, hms=SimulatedHms(clients=CLIENTS))
    async with simulators(settings, now=clock.now) as running:
        yield running


@dataclass
class Raw:
    """Sends whatever it is told to."""

    client: httpx.AsyncClient
    token: str
    access_token: str = ""

    async def ask_token(self, **fields: str) -> httpx.Response:
        form = {"grant_type": "client_credentials", "client_id": APP, "client_secret": SECRET} | fields
        return await self.client.post("/oauth2/v3/token", data=form)

    async def authorize(self, **fields: str) -> None:
        self.access_token = (await self.ask_token(**fields)).json()["access_token"]

    async def post(
        self,
        body: Any = None,
        *,
        path: str = SEND,
        method: str = "POST",
        authorization: str | None = "",
        content_type: str = "application/json; charset=UTF-8",
    ) -> httpx.Response:
        """Send a good message, or this; `authorization` is the access token's, another, or, as None, left out."""
        headers = {"content-type": content_type}
        if authorization is not None:
            headers["authorization"] = authorization or f"Bearer {self.access_token}"
        content = body if isinstance(body, bytes) else json.dumps(self.body() if body is None else body).encode()
        return await self.client.request(method, path, content=content, headers=headers)

    async def code(self, body: Any = None, **how: Any) -> str:
        """The code of the answer, which is HTTP 200."""
        answer = await self.post(body, **how)
        assert answer.status_code == 200
        assert answer.json().keys() == {"code", "msg", "requestId"}
        code: str = answer.json()["code"]
        return code

    def body(self, **message: Any) -> dict[str, Any]:
        """A good message with some fields changed or, as None, left out."""
        merged = {"data": '{"id":"1"}', "token": [self.token]} | message
        return {"validate_only": False, "message": {name: value for name, value in merged.items() if value is not None}}


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
async def raw(request: pytest.FixtureRequest, running: RunningSimulators, certificates: Certificates) -> AsyncIterator[Raw]:
    async with raw_client(certificates, running.hms_port, http2=request.param) as client:
        raw = Raw(client, running.hms.create_device(APP))
        await raw.authorize()
        yield raw


async def test_client_of_another_make_delivers(running: RunningSimulators, certificates: Certificates) -> None:
    """The two calls of Huawei's guide, with the standard library."""
    token = running.hms.create_device(APP)
    line = running.hms.connect()
    line.online([token])

    def send() -> tuple[Any, Any]:
        connection = http.client.HTTPSConnection("localhost", running.hms_port, context=certificates.trust(), timeout=LIMIT_S)
        form = f"grant_type=client_credentials&client_secret={SECRET.replace(' ', '+')}&client_id={APP}"
        connection.request("POST", "/oauth2/v3/token", form, {"Content-Type": "application/x-www-form-urlencoded"})
        granted = json.load(connection.getresponse())
        android = {"urgency": "HIGH", "ttl": "3600s", "collapse_key": -1, "bi_tag": "tag"}
        message = {"data": '{"id":"1"}', "android": android, "token": [token]}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {granted['access_token']}"}
        connection.request("POST", SEND, json.dumps({"validate_only": False, "message": message}), headers)
        sent = json.load(connection.getresponse())
        connection.close()
        return granted, sent

    granted, sent = await asyncio.to_thread(send)
    assert (granted["expires_in"], granted["token_type"]) == (3600, "Bearer")
    assert (sent["code"], sent["msg"]) == ("80000000", "Success")
    [notification] = await line.next_batch()
    assert notification.payload == b'{"id":"1"}'
    assert notification.headers == {
        "request_id": sent["requestId"],
        "urgency": "HIGH",
        "ttl": "3600",
        "collapse_key": "-1",
        "bi_tag": "tag",
    }
    assert running.hms.counters.connections == 1, "the connection is kept alive"


BAD_CLIENTS = {
    "other grant": ({"grant_type": "password"}, 20182),
    "no digits": ({"client_id": "app"}, 20002),
    "unknown client": ({"client_id": "999"}, 20003),
    "no secret": ({"client_secret": ""}, 20171),
    "wrong secret": ({"client_secret": SECRET + "!"}, 12304),
    "not ascii": ({"client_secret": "ключ"}, 12304),
}


@pytest.mark.parametrize(("fields", "sub_error"), BAD_CLIENTS.values(), ids=list(BAD_CLIENTS))
async def test_clients_that_are_not_known_get_no_access_token(raw: Raw, fields: dict[str, str], sub_error: int) -> None:
    answer = await raw.ask_token(**fields)
    assert answer.status_code == 400
    assert (answer.json()["error"], answer.json()["sub_error"]) == (1101, sub_error)
    assert answer.json()["error_description"]


async def test_requests_for_a_token_that_are_no_form_are_refused(raw: Raw, running: RunningSimulators) -> None:
    assert (await raw.client.post("/oauth2/v3/token", json={"client_id": APP})).json()["sub_error"] == 20001
    twice = f"grant_type=client_credentials&client_id={APP}&client_id={APP}&client_secret=x".encode()
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert (await raw.client.post("/oauth2/v3/token", content=twice, headers=form)).json()["sub_error"] == 20001
    assert (await raw.client.get("/oauth2/v3/token")).status_code == 405
    assert running.hms.counters.access_tokens == 1


async def test_the_token_endpoint_of_version_2_answers_the_same(raw: Raw) -> None:
    form = {"grant_type": "client_credentials", "client_id": APP, "client_secret": SECRET}
    answer = await raw.client.post("/oauth2/v2/token", data=form)
    assert answer.status_code == 200
    assert answer.json().keys() == (await raw.ask_token()).json().keys()


async def test_answers_have_the_simulators_time(raw: Raw, clock: FakeClock) -> None:
    for answer in (await raw.ask_token(), await raw.post()):
        assert parsedate_to_datetime(answer.headers["date"]) == clock.now().replace(microsecond=0)


async def test_access_tokens_missing_unknown_of_another_app_expired_and_revoked(
    raw: Raw, running: RunningSimulators, clock: FakeClock
) -> None:
    assert await raw.code(authorization=None) == "80200001"
    assert await raw.code(authorization="Bearer abc") == "80200001"
    assert await raw.code(path=f"/v1/{OTHER_APP}/messages:send") == "80200001"
    assert await raw.code(path="/v1/999/messages:send") == "80300002"
    assert (await raw.post(path=f"/v2/{APP}/messages:send")).status_code == 404
    assert (await raw.post(method="GET")).status_code == 405
    clock.advance(timedelta(seconds=3600))
    assert await raw.code() == "80200003"
    await raw.authorize()
    assert await raw.code() == "80000000"
    assert running.hms.revoke_credential(APP)
    assert await raw.code() == "80200001"
    assert (await raw.ask_token()).json()["sub_error"] == 20003


BAD_MESSAGES: dict[str, tuple[Callable[[Raw], Any], str]] = {
    "no json": (lambda raw: b"{", "80100001"),
    "half a character": (lambda raw: b'{"message":{"data":"\\ud800"}}', "80100001"),
    "abyss": (lambda raw: b"[" * 60_000, "80100001"),
    "array": (lambda raw: [], "80100001"),
    "validate_only no boolean": (lambda raw: raw.body() | {"validate_only": "no"}, "80100001"),
    "no message": (lambda raw: {}, "80300010"),
    "misspelt message": (lambda raw: {"messager": raw.body()["message"]}, "80300010"),
    "no token": (lambda raw: raw.body(token=[]), "80300010"),
    "token at another place": (lambda raw: {"token": [raw.token], "message": {"data": "x"}}, "80300010"),
    "token no list": (lambda raw: raw.body(token=raw.token), "80300010"),
    "1001 tokens": (lambda raw: raw.body(token=["x" * 130] * 1001), "80300010"),
    "token no string": (lambda raw: raw.body(token=[1]), "80100003"),
    "topic": (lambda raw: raw.body(token=None, topic="news"), "80100003"),
    "data an object": (lambda raw: raw.body(data={"id": "1"}), "80100003"),
    "nothing to say": (lambda raw: raw.body(data=None), "80100003"),
    "unknown at the top": (lambda raw: raw.body() | {"priority": 1}, "80100003"),
    "unknown in the message": (lambda raw: raw.body(ttl="1s"), "80100003"),
    "unknown for android": (lambda raw: raw.body(android={"priority": "HIGH"}), "80100003"),
    "android no object": (lambda raw: raw.body(android=[]), "80100003"),
    "odd urgency": (lambda raw: raw.body(android={"urgency": "high"}), "80100003"),
    "bi_tag no string": (lambda raw: raw.body(android={"bi_tag": 1}), "80100003"),
    "ttl without unit": (lambda raw: raw.body(android={"ttl": "3600"}), "80100004"),
    "ttl a number": (lambda raw: raw.body(android={"ttl": 3600}), "80100004"),
    "ttl negative": (lambda raw: raw.body(android={"ttl": "-1s"}), "80100004"),
    "ttl too long": (lambda raw: raw.body(android={"ttl": "1296001s"}), "80100004"),
    "collapse_key too small": (lambda raw: raw.body(android={"collapse_key": -2}), "80100013"),
    "collapse_key too large": (lambda raw: raw.body(android={"collapse_key": 101}), "80100013"),
    "collapse_key no number": (lambda raw: raw.body(android={"collapse_key": "1"}), "80100013"),
    "collapse_key a boolean": (lambda raw: raw.body(android={"collapse_key": True}), "80100013"),
    "too large": (lambda raw: raw.body(data="x" * 4096), "80300008"),
    "much too large": (lambda raw: b" " * 500_000, "80300008"),
}


@pytest.mark.parametrize(("body", "code"), BAD_MESSAGES.values(), ids=list(BAD_MESSAGES))
async def test_bad_messages_get_their_code(raw: Raw, running: RunningSimulators, body: Callable[[Raw], Any], code: str) -> None:
    assert await raw.code(body(raw)) == code
    assert running.hms.received[-1].reason == code
    assert await raw.code() == "80000000"


async def test_body_that_is_not_said_to_be_json_is_refused(raw: Raw) -> None:
    assert await raw.code(content_type="text/plain") == "80100001"


GOOD_MESSAGES: dict[str, Callable[[Raw], Any]] = {
    "plain": lambda raw: raw.body(),
    "all of android": lambda raw: raw.body(
        android={"urgency": "HIGH", "ttl": "86400s", "collapse_key": 100, "bi_tag": "x", "category": "IM"}
    ),
    "longest": lambda raw: raw.body(android={"ttl": "1296000s"}),
    "without validate_only": lambda raw: {"message": raw.body()["message"]},
    "all the data there may be": lambda raw: raw.body(data="x" * 4050),
    "only shown": lambda raw: raw.body(data=None, android={"notification": {"title": "hello"}}),
}


@pytest.mark.parametrize("body", GOOD_MESSAGES.values(), ids=list(GOOD_MESSAGES))
async def test_what_push_kit_takes_is_taken(raw: Raw, body: Callable[[Raw], Any]) -> None:
    assert await raw.code(body(raw)) == "80000000"


async def test_a_thousand_tokens_with_some_illegal_are_a_partial_success(raw: Raw, running: RunningSimulators) -> None:
    good = [running.hms.create_device(APP) for _ in range(997)]
    foreign, gone = running.hms.create_device(OTHER_APP), running.hms.create_device(APP)
    running.hms.uninstall(gone)
    line = running.hms.connect()
    line.online(good)
    answer = (await raw.post(raw.body(token=[*good, "mangled", foreign, gone]))).json()
    assert answer["code"] == "80100000"
    assert json.loads(answer["msg"]) == {"success": 997, "failure": 3, "illegal_tokens": ["mangled", foreign, gone]}
    delivered = [*await line.next_batch(), *await line.next_batch()]
    assert {one.device_token for one in delivered} == set(good)
    assert {one.headers["request_id"] for one in delivered} == {answer["requestId"]}
    assert await raw.code(raw.body(token=["mangled", foreign, gone])) == "80300007"
    assert (running.hms.counters.accepted, running.hms.counters.refused) == (1, 1)


async def test_validate_only_checks_everything_and_delivers_nothing(raw: Raw, running: RunningSimulators) -> None:
    assert await raw.code(raw.body() | {"validate_only": True}) == "80000000"
    assert await raw.code(raw.body(token=["x"]) | {"validate_only": True}) == "80300007"
    line = running.hms.connect()
    line.online([raw.token])
    assert running.hms.counters.delivered == 0


async def test_scripted_codes_and_flow_control(raw: Raw, running: RunningSimulators) -> None:
    for code in ("80600003", "81000001", "89999999"):
        running.hms.set_fault(simulated.Answer(200, code), requests=1)
        assert await raw.code() == code
    running.hms.set_fault(simulated.Answer(503, retry_after=timedelta(seconds=3)), requests=1)
    busy = await raw.post()
    assert (busy.status_code, busy.content, busy.headers["retry-after"]) == (503, b"", "3")
    assert running.hms.counters.refused == 4
    tokens = simulated.FaultScope.TOKENS
    running.hms.set_fault(simulated.Answer(500, "1203"), scope=tokens, requests=1)
    refused = await raw.ask_token()
    assert (refused.status_code, refused.json()["error"]) == (500, 1203)
    assert await raw.code() == "80000000"


async def test_expired_access_token_stays_expired_and_a_new_one_is_welcome(raw: Raw, running: RunningSimulators) -> None:
    running.hms.set_fault(simulated.ExpiredProviderToken(), requests=1)
    assert await raw.code() == "80200003"
    assert await raw.code() == "80200003"
    await raw.authorize()
    assert await raw.code() == "80000000"


async def test_dead_token_fault_makes_one_token_of_many_illegal(raw: Raw, running: RunningSimulators) -> None:
    other = running.hms.create_device(APP)
    running.hms.set_fault(simulated.DeadToken(), requests=1, device_token=other)
    assert await raw.code() == "80000000"
    answer = (await raw.post(raw.body(token=[raw.token, other]))).json()
    assert json.loads(answer["msg"])["illegal_tokens"] == [other]
    running.hms.set_fault(simulated.DeadToken(), requests=1)
    assert await raw.code() == "80300007"


async def test_nothing_that_authenticates_is_kept(raw: Raw, running: RunningSimulators) -> None:
    await raw.post()
    kept = repr(running.hms.received)
    assert raw.access_token not in kept
    assert SECRET not in kept
    assert SECRET.replace(" ", "+") not in kept
    assert SECRET not in repr(CLIENTS)


# Receipts


@dataclass
class Receiver:
    """The provider's server for receipts: answers with the next status, 200 when there is none."""

    streams_max: int = 100
    body_bytes_max: int = 1024 * 1024
    speaks_http1: bool = True
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_opened(self, connection: Connection) -> None:
        self.changed.set()

    def stream_refused(self, connection: Connection) -> None: ...

    def request_received(self, exchange: Exchange) -> None:
        self.requests.append((dict(exchange.request.headers), json.loads(exchange.request.body)))
        exchange.answer(self.statuses.pop(0) if self.statuses else 200, [], b'{"code":"0","message":"success"}')
        self.changed.set()

    @property
    def receipts(self) -> list[Any]:
        return [status for _, body in self.requests for status in body["statuses"]]

    async def has(self, count: int) -> None:
        """Returns when so many receipts have come."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.receipts) < count:
                self.changed.clear()
                await self.changed.wait()

    @asynccontextmanager
    async def listening(self, certificates: Certificates, port: int = 0) -> AsyncIterator[int]:
        listener = HttpListener(self)
        yield await listener.start(host="127.0.0.1", port=port, certificate=certificates.certificate, private_key=certificates.private_key)
        await listener.close()


@asynccontextmanager
async def with_receipts(
    certificates: Certificates, clock: FakeClock, port: int, **settings: Any
) -> AsyncIterator[tuple[RunningSimulators, Raw]]:
    receipts = ReceiptSettings(f"https://localhost:{port}/receipts", certificates.ca, pause_first=timedelta(milliseconds=1), **settings)
    hms = SimulatedHms(clients=CLIENTS, receipts=receipts)
    wanted = SimulatorSettings(certificates.certificate, certificates.private_key, hms=hms)
    async with simulators(wanted, now=clock.now) as running, raw_client(certificates, running.hms_port, http2=False) as client:
        raw = Raw(client, running.hms.create_device(APP))
        await raw.authorize()
        yield running, raw


async def test_receipt_of_a_delivery_is_signed_and_names_tag_token_and_request(certificates: Certificates, clock: FakeClock) -> None:
    receiver = Receiver()
    async with receiver.listening(certificates) as port, with_receipts(certificates, clock, port) as (running, raw):
        running.hms.connect().online([raw.token])
        answer = (await raw.post(raw.body(android={"bi_tag": "wake-up 1"}))).json()
        await receiver.has(1)
        [(headers, body)] = receiver.requests
        at = int(clock.now().timestamp() * 1000)
        expected = {"biTag": "wake-up 1", "appid": APP, "token": raw.token, "status": 0, "timestamp": at, "requestId": answer["requestId"]}
        assert body == {"statuses": [expected]}
        signed = re.fullmatch(r"timestamp=([0-9]+); nonce=([0-9a-f-]{36}); value=(\S+)", headers["x-huawei-callback-id"])
        assert signed is not None
        assert int(signed[1]) == at
        assert uuid.UUID(signed[2]).version == 4
        digest = hmac.new(KEY.encode(), (signed[1] + signed[2] + USER).encode(), hashlib.sha256).digest()
        assert base64.b64decode(signed[3]) == digest
        assert headers["content-type"] == "application/json"


async def test_a_listener_that_closes_admits_nobody_whose_handshake_ends_meanwhile(certificates: Certificates) -> None:
    """It waits for the end of its connections: one that came too late to be dropped would keep it until its client leaves."""
    receiver = Receiver()
    listener = HttpListener(receiver)
    files = {"certificate": certificates.certificate, "private_key": certificates.private_key}
    port = await listener.start(host="127.0.0.1", port=0, **files)
    _, writer = await asyncio.open_connection("localhost", port, ssl=certificates.trust())
    async with asyncio.timeout(LIMIT_S):
        await receiver.changed.wait()
        closing = asyncio.create_task(listener.close())
        await asyncio.sleep(0)
        assert listener.admit("http/1.1") is None
        await closing
    writer.transport.abort()


async def test_what_is_replaced_or_loses_its_app_is_told(certificates: Certificates, clock: FakeClock) -> None:
    receiver = Receiver()
    async with receiver.listening(certificates) as port, with_receipts(certificates, clock, port) as (running, raw):
        for tag in ("first", "second"):
            await raw.post(raw.body(android={"bi_tag": tag, "collapse_key": 7}))
        await receiver.has(1)
        running.hms.uninstall(raw.token)
        await receiver.has(2)
        assert [(one["biTag"], one["status"]) for one in receiver.receipts] == [("first", 15), ("second", 2)]


async def test_receipts_come_in_batches_of_a_hundred(certificates: Certificates, clock: FakeClock) -> None:
    receiver = Receiver()
    async with receiver.listening(certificates) as port, with_receipts(certificates, clock, port) as (running, raw):
        tokens = [running.hms.create_device(APP) for _ in range(250)]
        running.hms.connect().online(tokens)
        assert await raw.code(raw.body(token=tokens)) == "80000000"
        await receiver.has(250)
        assert [len(body["statuses"]) for _, body in receiver.requests] == [100, 100, 50]
        assert [one["token"] for one in receiver.receipts] == tokens


async def test_client_without_user_and_key_gets_unsigned_receipts_of_its_own(certificates: Certificates, clock: FakeClock) -> None:
    receiver = Receiver()
    async with receiver.listening(certificates) as port, with_receipts(certificates, clock, port) as (running, raw):
        other = running.hms.create_device(OTHER_APP)
        running.hms.connect().online([raw.token, other])
        await raw.post()
        await raw.authorize(client_id=OTHER_APP)
        assert await raw.code(raw.body(token=[other]), path=f"/v1/{OTHER_APP}/messages:send") == "80000000"
        await receiver.has(2)
        apps = {body["statuses"][0]["appid"]: "x-huawei-callback-id" in headers for headers, body in receiver.requests}
        assert apps == {APP: True, OTHER_APP: False}


async def test_receiver_that_is_away_or_busy_gets_its_receipts_later(
    certificates: Certificates, clock: FakeClock, unused_tcp_port: int
) -> None:
    receiver = Receiver(statuses=[500, 302])
    async with with_receipts(certificates, clock, unused_tcp_port, tries=10_000, pause_max=timedelta(milliseconds=2)) as (running, raw):
        running.hms.connect().online([raw.token])
        assert await raw.code(raw.body(android={"bi_tag": "early"})) == "80000000"
        async with receiver.listening(certificates, unused_tcp_port):
            await receiver.has(3)
            assert await raw.code(raw.body(android={"bi_tag": "late"})) == "80000000"
            async with asyncio.timeout(LIMIT_S):
                while running.hms.counters.receipts < 2:  # noqa: ASYNC110 - the sender counts when it has the answer
                    await asyncio.sleep(0)
    assert [one["biTag"] for one in receiver.receipts] == ["early", "early", "early", "late"]


async def test_receipts_are_given_up_after_the_last_try(certificates: Certificates, clock: FakeClock) -> None:
    receiver = Receiver(statuses=[500, 500])
    async with receiver.listening(certificates) as port, with_receipts(certificates, clock, port, tries=2) as (running, raw):
        running.hms.connect().online([raw.token])
        for tag in ("lost", "kept"):
            await raw.post(raw.body(android={"bi_tag": tag}))
            await receiver.has({"lost": 2, "kept": 3}[tag])
        assert [one["biTag"] for one in receiver.receipts] == ["lost", "lost", "kept"]


async def test_receiver_of_another_authority_gets_nothing(
    certificates: Certificates, clock: FakeClock, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = Certificates.make(tmp_path_factory.mktemp("stranger"), ["localhost"])
    receiver = Receiver()
    with structlog.testing.capture_logs() as logs:
        async with receiver.listening(stranger) as port, with_receipts(certificates, clock, port, tries=1) as (running, raw):
            running.hms.connect().online([raw.token])
            assert await raw.code() == "80000000"
            async with asyncio.timeout(LIMIT_S):
                while not any(entry["event"] == "receipts were given up" for entry in logs):  # noqa: ASYNC110 - only the log tells
                    await asyncio.sleep(0)
    assert receiver.requests == []


# The control listener


async def test_huawei_phones_over_the_control_listener(running: RunningSimulators, raw: Raw) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.control_port}") as channel:
        stub: Any = SimulatedPushStub(channel)
        client = pb.SimulatedHmsClient(app_id="777", client_secret="another")
        await stub.RegisterCredential(pb.RegisterCredentialRequest(push_service=HMS, hms_client=client))
        token = (await stub.CreateDevice(pb.CreateDeviceRequest(push_service=HMS, topic="777"))).device_token
        stream = stub.Connect()
        await stream.write(pb.ConnectRequest(push_service=HMS, online_device_tokens=[token]))
        frames = aiter(stream)
        assert (await anext(frames)).presence.online == 1
        await raw.authorize(client_id="777", client_secret="another")
        assert await raw.code(raw.body(token=[token]), path="/v1/777/messages:send") == "80000000"
        [notification] = (await anext(frames)).batch.notifications
        assert (notification.device_token, notification.payload) == (token, b'{"id":"1"}')
        assert notification.headers["urgency"] == "NORMAL"
        await stub.RevokeCredential(pb.RevokeCredentialRequest(push_service=HMS, credential_id="777"))
        assert await raw.code(raw.body(token=[token]), path="/v1/777/messages:send") == "80200001"
        await stream.done_writing()
