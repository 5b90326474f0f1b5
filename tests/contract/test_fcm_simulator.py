"""The simulated FCM over real sockets: what Google refuses it refuses, and Google's own library finds nothing amiss."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import firebase_admin
import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from firebase_admin import credentials, exceptions, messaging
from google.protobuf.duration_pb2 import Duration

from sealpushd.simulators import core as simulated
from sealpushd.simulators.fcm import BAD_REQUEST, ERROR_INFO, FCM_ERROR, GRANT_TYPE
from sealpushd.simulators.server import RunningSimulators, ServiceAccount, SimulatedFcm, SimulatorSettings, simulators
from sealpushd.v1 import simulator_pb2 as pb
from sealpushd.v1.simulator_pb2_grpc import SimulatedPushStub
from tests.contract.harness import LIMIT_S, FakeClock
from tests.contract.push_simulators import Certificates, connect_proxy, raw_client

PROJECT, OTHER_PROJECT = "demo-bank", "demo-post"
EMAIL, OTHER_EMAIL, KEY_ID = "push@demo-bank.example", "push@demo-post.example", "0123456789abcdef"
SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
AUDIENCE = "https://oauth2.googleapis.com/token"
GOOGLES_HOSTS = ("fcm.googleapis.com", "oauth2.googleapis.com")
# Here google-auth asks, in a thread and again and again, where an account may be used. It is content with a 404.
ELSEWHERE = "iamcredentials.googleapis.com"
SEND = f"/v1/projects/{PROJECT}/messages:send"
FCM = pb.SIMULATED_PUSH_SERVICE_FCM


@dataclass(frozen=True)
class Keys:
    """The signing key of both service accounts, and one that nobody trusts."""

    account: rsa.RSAPrivateKey
    stranger: rsa.RSAPrivateKey

    @property
    def private_pem(self) -> str:
        return self.account.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    @property
    def public_pem(self) -> bytes:
        return self.account.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys(*(rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("tls"), ["localhost", *GOOGLES_HOSTS, ELSEWHERE])


@pytest.fixture
async def running(certificates: Certificates, keys: Keys, clock: FakeClock) -> AsyncIterator[RunningSimulators]:
    accounts = [
        ServiceAccount(PROJECT, EMAIL, KEY_ID, keys.public_pem),
        ServiceAccount(OTHER_PROJECT, OTHER_EMAIL, KEY_ID, keys.public_pem),
    ]
    settings = SimulatorSettings(certificates.certificate, certificates.private_key, fcm=SimulatedFcm(service_accounts=accounts))
    async with simulators(settings, now=clock.now) as running:
        yield running


# Google's library

# A provider addresses the registration tokens that apps have today. The library would like installation ids instead.
takes_tokens = pytest.mark.filterwarnings("ignore:Message.token is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class Google:
    """firebase-admin as it is, in a thread, because it waits for its answers."""

    app: firebase_admin.App

    async def send(self, message: messaging.Message, *, dry_run: bool = False) -> str:
        name: str = await asyncio.to_thread(messaging.send, message, dry_run=dry_run, app=self.app)
        return name

    async def refusal(self, message: messaging.Message) -> exceptions.FirebaseError:
        with pytest.raises(exceptions.FirebaseError) as caught:
            await self.send(message)
        return caught.value


@pytest.fixture
async def google(
    running: RunningSimulators, certificates: Certificates, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Google]:
    """The library finds the simulator through the proxy and the authority that the environment names, as behind a company's proxy."""
    account = {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": KEY_ID,
        "private_key": keys.private_pem,
        "client_email": EMAIL,
        "token_uri": AUDIENCE,
    }
    nowhere = SimulatorSettings(certificates.certificate, certificates.private_key, fcm=SimulatedFcm())
    async with (
        simulators(nowhere) as elsewhere,
        connect_proxy(dict.fromkeys(GOOGLES_HOSTS, running.fcm_port) | {ELSEWHERE: elsewhere.fcm_port}) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.ca))
        app = firebase_admin.initialize_app(credentials.Certificate(account), name="test", options={"httpTimeout": 5})
        service = messaging._get_messaging_service(app)
        yield Google(app)
        # It runs a loop of its own to close its other client; this one it leaves to the garbage collector, which warns.
        await asyncio.to_thread(firebase_admin.delete_app, app)
        service._client.close()


@takes_tokens
async def test_googles_library_delivers_and_gets_one_access_token(running: RunningSimulators, google: Google) -> None:
    token = running.fcm.create_device(PROJECT)
    line = running.fcm.connect()
    line.online([token])
    android = messaging.AndroidConfig(priority="high", ttl=timedelta(hours=1), collapse_key="wake")
    names = [await google.send(messaging.Message(data={"id": str(n)}, android=android, token=token)) for n in range(3)]
    assert all(name.startswith(f"projects/{PROJECT}/messages/") for name in names)
    notifications = await line.next_batch()
    assert [json.loads(one.payload) for one in notifications] == [{"id": "0"}, {"id": "1"}, {"id": "2"}]
    for name, one in zip(names, notifications, strict=True):
        message_id = name.rpartition("/")[2]
        assert one.headers == {"message_id": message_id, "priority": "HIGH", "ttl": "3600", "collapse_key": "wake"}
    counters = running.fcm.counters
    assert (counters.requests, counters.accepted, counters.delivered) == (3, 3, 3)
    assert (counters.token_requests, counters.access_tokens) == (1, 1)


@takes_tokens
async def test_googles_library_understands_every_refusal(running: RunningSimulators, google: Google) -> None:
    gone, foreign, good = (running.fcm.create_device(project) for project in (PROJECT, OTHER_PROJECT, PROJECT))
    running.fcm.uninstall(gone)
    data = {"id": "1"}
    assert isinstance(await google.refusal(messaging.Message(data=data, token=gone)), messaging.UnregisteredError)
    assert isinstance(await google.refusal(messaging.Message(data=data, token=foreign)), messaging.SenderIdMismatchError)
    assert isinstance(await google.refusal(messaging.Message(data=data, token="mangled")), exceptions.InvalidArgumentError)
    too_big = await google.refusal(messaging.Message(data={"id": "x" * 4096}, token=good))
    assert isinstance(too_big, exceptions.InvalidArgumentError)
    assert str(too_big) == "Android message is too big"
    running.fcm.set_fault(simulated.Answer(429, "QUOTA_EXCEEDED"), requests=1)
    assert isinstance(await google.refusal(messaging.Message(data=data, token=good)), messaging.QuotaExceededError)
    running.fcm.set_fault(simulated.Answer(401, "THIRD_PARTY_AUTH_ERROR"), duration=timedelta(minutes=1))
    assert isinstance(await google.refusal(messaging.Message(data=data, token=good)), messaging.ThirdPartyAuthError)


@takes_tokens
async def test_googles_library_repeats_after_expired_access_tokens_503_and_429(running: RunningSimulators, google: Google) -> None:
    token = running.fcm.create_device(PROJECT)
    running.fcm.set_fault(simulated.ExpiredProviderToken(), requests=1)
    await google.send(messaging.Message(data={"id": "1"}, token=token))
    assert running.fcm.counters.access_tokens == 2
    running.fcm.set_fault(simulated.Answer(503, "UNAVAILABLE"), requests=1)
    await google.send(messaging.Message(data={"id": "2"}, token=token))
    running.fcm.set_fault(simulated.Answer(429, "QUOTA_EXCEEDED", retry_after=timedelta(0)), requests=1)
    await google.send(messaging.Message(data={"id": "3"}, token=token))
    statuses = [one.status for one in running.fcm.received if one.request.path != "/token"]
    assert statuses == [401, 200, 503, 200, 429, 200]


@takes_tokens
async def test_dry_run_checks_everything_and_delivers_nothing(running: RunningSimulators, google: Google) -> None:
    token = running.fcm.create_device(PROJECT)
    assert await google.send(messaging.Message(data={"id": "1"}, token=token), dry_run=True)
    running.fcm.uninstall(token)
    with pytest.raises(messaging.UnregisteredError):
        await google.send(messaging.Message(data={"id": "1"}, token=token), dry_run=True)
    assert running.fcm.counters.delivered == 0
    device = running.fcm.device(token)
    assert device is not None
    assert device.waiting == []


@takes_tokens
async def test_googles_library_is_told_that_its_account_is_revoked(running: RunningSimulators, google: Google) -> None:
    token = running.fcm.create_device(PROJECT)
    await google.send(messaging.Message(data={"id": "1"}, token=token))
    assert running.fcm.revoke_credential(EMAIL)
    with pytest.raises(Exception, match="account not found"):
        await google.send(messaging.Message(data={"id": "1"}, token=token))


# The rules, asked by a plain client over both kinds of HTTP


@dataclass
class Raw:
    """Sends whatever it is told to."""

    client: httpx.AsyncClient
    keys: Keys
    clock: FakeClock
    token: str
    access_token: str = ""

    def assertion(self, key: rsa.RSAPrivateKey | None = None, kid: str | None = KEY_ID, **changes: Any) -> str:
        """A good assertion with some claims changed or, as None, left out."""
        now = int(self.clock.now().timestamp())
        claims = {"iss": EMAIL, "scope": SCOPE, "aud": AUDIENCE, "iat": now, "exp": now + 3600} | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode(claims, key or self.keys.account, algorithm="RS256", headers=headers)

    async def ask_token(self, **fields: str) -> httpx.Response:
        form = {"grant_type": GRANT_TYPE, "assertion": self.assertion()} | fields
        return await self.client.post("/token", data=form)

    async def authorize(self, **claims: Any) -> str:
        answer = await self.ask_token(assertion=self.assertion(**claims))
        token: str = answer.json()["access_token"]
        return token

    async def post(self, body: Any = None, *, path: str = SEND, method: str = "POST", authorization: str | None = "") -> httpx.Response:
        """Send a good message, or this; `authorization` is the access token's, another, or, as None, left out."""
        headers = {"content-type": "application/json"}
        if authorization is not None:
            headers["authorization"] = authorization or f"Bearer {self.access_token}"
        content = body if isinstance(body, bytes) else json.dumps(self.body() if body is None else body).encode()
        return await self.client.request(method, path, content=content, headers=headers)

    def body(self, **message: Any) -> dict[str, Any]:
        """A good message with some fields changed or, as None, left out."""
        merged = {"token": self.token, "data": {"id": "1"}} | message
        return {"message": {name: value for name, value in merged.items() if value is not None}}


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
async def raw(
    request: pytest.FixtureRequest, running: RunningSimulators, certificates: Certificates, keys: Keys, clock: FakeClock
) -> AsyncIterator[Raw]:
    async with raw_client(certificates, running.fcm_port, http2=request.param) as client:
        raw = Raw(client, keys, clock, running.fcm.create_device(PROJECT))
        raw.access_token = await raw.authorize()
        yield raw


def error_code(answer: httpx.Response) -> str | None:
    """The errorCode that a provider decides by."""
    details = answer.json()["error"].get("details", [])
    return next((detail["errorCode"] for detail in details if detail["@type"] == FCM_ERROR), None)


def kinds(answer: httpx.Response) -> list[str]:
    return [detail["@type"] for detail in answer.json()["error"].get("details", [])]


async def test_access_token_is_handed_out_with_the_simulators_time(raw: Raw, clock: FakeClock) -> None:
    answer = await raw.ask_token()
    assert answer.status_code == 200
    assert answer.json().keys() == {"access_token", "expires_in", "token_type"}
    assert (answer.json()["expires_in"], answer.json()["token_type"]) == (3599, "Bearer")
    assert parsedate_to_datetime(answer.headers["date"]) == clock.now().replace(microsecond=0)
    sent = await raw.post()
    assert sent.status_code == 200
    assert parsedate_to_datetime(sent.headers["date"]) == clock.now().replace(microsecond=0)


async def test_system_parameters_of_google_apis_are_taken(raw: Raw) -> None:
    assert (await raw.post(path=SEND + "?prettyPrint=false&alt=json")).status_code == 200
    assert (await raw.client.post("/token?prettyPrint=false", data={"grant_type": "x"})).json()["error"] == "unsupported_grant_type"


async def test_both_kinds_of_http_are_chosen_by_the_client(raw: Raw, request: pytest.FixtureRequest) -> None:
    answer = await raw.post()
    assert answer.http_version == ("HTTP/2" if "http2" in request.node.name else "HTTP/1.1")


NOW_S = "now"
BAD_ASSERTIONS: dict[str, tuple[Callable[[Raw], str], str, str]] = {
    "stranger's key": (lambda raw: raw.assertion(raw.keys.stranger), "invalid_grant", "Invalid JWT Signature."),
    "unknown kid": (lambda raw: raw.assertion(kid="other"), "invalid_grant", "Invalid JWT Signature."),
    "no jwt": (lambda raw: "abc", "invalid_grant", "Invalid JWT Signature."),
    "other algorithm": (
        lambda raw: jwt.encode({"iss": EMAIL}, "x" * 32, algorithm="HS256", headers={"kid": KEY_ID}),
        "invalid_grant",
        "Invalid JWT Signature.",
    ),
    "unknown account": (lambda raw: raw.assertion(iss="who@example"), "invalid_grant", "account not found"),
    "no account": (lambda raw: raw.assertion(iss=None), "invalid_grant", "account not found"),
    "long-lived": (lambda raw: raw.assertion(exp=int(raw.clock.now().timestamp()) + 3601), "invalid_grant", "short-lived token"),
    "expired": (
        lambda raw: raw.assertion(iat=int(raw.clock.now().timestamp()) - 3600, exp=int(raw.clock.now().timestamp())),
        "invalid_grant",
        "short-lived token",
    ),
    "of the future": (
        lambda raw: raw.assertion(iat=int(raw.clock.now().timestamp()) + 302, exp=int(raw.clock.now().timestamp()) + 900),
        "invalid_grant",
        "short-lived token",
    ),
    "no exp": (lambda raw: raw.assertion(exp=None), "invalid_grant", "short-lived token"),
    "no iat": (lambda raw: raw.assertion(iat=None), "invalid_grant", "short-lived token"),
    "times as text": (lambda raw: raw.assertion(iat=None, exp="soon"), "invalid_grant", "short-lived token"),
    "other audience": (lambda raw: raw.assertion(aud="https://example.com/other"), "invalid_grant", "audience"),
    "no https": (lambda raw: raw.assertion(aud="http://oauth2.googleapis.com/token"), "invalid_grant", "audience"),
    "no scope": (lambda raw: raw.assertion(scope=None), "invalid_scope", "Invalid OAuth scope"),
    "other scope": (lambda raw: raw.assertion(scope="https://www.googleapis.com/auth/drive"), "invalid_scope", "Invalid OAuth scope"),
}


@pytest.mark.parametrize(("assertion", "error", "description"), BAD_ASSERTIONS.values(), ids=list(BAD_ASSERTIONS))
async def test_bad_assertions_are_refused(raw: Raw, assertion: Callable[[Raw], str], error: str, description: str) -> None:
    answer = await raw.ask_token(assertion=assertion(raw))
    assert (answer.status_code, answer.json()["error"]) == (400, error)
    assert description in answer.json()["error_description"]


async def test_requests_for_a_token_that_are_none_are_refused(raw: Raw) -> None:
    assert (await raw.ask_token(grant_type="password")).json()["error"] == "unsupported_grant_type"
    assert (await raw.ask_token(assertion="")).json()["error"] == "invalid_request"
    assert (await raw.client.post("/token", json={"grant_type": GRANT_TYPE})).json()["error"] == "invalid_request"
    assert (await raw.client.post("/token", content=b"\xff", headers={"content-type": "text/plain"})).status_code == 400
    assert (await raw.client.get("/token")).status_code == 405


@pytest.mark.parametrize("kid", [KEY_ID, None])
async def test_cloud_platform_scope_and_an_assertion_without_kid_will_do(raw: Raw, kid: str | None) -> None:
    scope = f"https://www.googleapis.com/auth/cloud-platform {SCOPE}x"
    assert (await raw.ask_token(assertion=raw.assertion(kid=kid, scope=scope))).status_code == 200


async def test_configured_audience_is_the_only_one(certificates: Certificates, keys: Keys, clock: FakeClock) -> None:
    fcm = SimulatedFcm(service_accounts=[ServiceAccount(PROJECT, EMAIL, KEY_ID, keys.public_pem)], token_audience="https://here/token")
    settings = SimulatorSettings(certificates.certificate, certificates.private_key, fcm=fcm)
    async with simulators(settings, now=clock.now) as running, raw_client(certificates, running.fcm_port, http2=False) as client:
        raw = Raw(client, keys, clock, "")
        assert (await raw.ask_token()).status_code == 400
        assert (await raw.ask_token(assertion=raw.assertion(aud="https://here/token"))).status_code == 200


async def test_access_tokens_missing_unknown_expired_and_revoked_are_401(raw: Raw, running: RunningSimulators, clock: FakeClock) -> None:
    async def refused(reason: str, authorization: str | None = "") -> None:
        answer = await raw.post(authorization=authorization)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["status"]) == (401, 401, "UNAUTHENTICATED")
        assert error["details"][0]["@type"] == ERROR_INFO
        assert error["details"][0]["reason"] == reason
        assert answer.headers["www-authenticate"].startswith("Bearer ")

    await refused("CREDENTIALS_MISSING", authorization=None)
    await refused("CREDENTIALS_MISSING", authorization="Basic abc")
    await refused("ACCESS_TOKEN_TYPE_UNSUPPORTED", authorization="Bearer abc")
    clock.advance(timedelta(seconds=3599))
    assert (await raw.post()).status_code == 200
    clock.advance(timedelta(seconds=1))
    await refused("ACCESS_TOKEN_EXPIRED")
    raw.access_token = await raw.authorize()
    assert (await raw.post()).status_code == 200
    running.fcm.revoke_credential(EMAIL)
    await refused("ACCESS_TOKEN_TYPE_UNSUPPORTED")


async def test_account_of_another_project_is_403(raw: Raw) -> None:
    raw.access_token = await raw.authorize(iss=OTHER_EMAIL)
    answer = await raw.post()
    assert (answer.status_code, answer.json()["error"]["status"], error_code(answer)) == (403, "PERMISSION_DENIED", None)
    assert "cloudmessaging.messages.create" in answer.json()["error"]["message"]


async def test_path_and_method_are_those_of_the_api(raw: Raw) -> None:
    assert (await raw.post(path=f"/v1/projects/{PROJECT}/messages:Send")).status_code == 404
    assert (await raw.post(path=f"/v2/projects/{PROJECT}/messages:send")).status_code == 404
    assert (await raw.post(method="PUT")).status_code == 404


BAD_MESSAGES: dict[str, tuple[Callable[[Raw], Any], str]] = {
    "no json": (lambda raw: b"{", "Invalid JSON payload received."),
    "key twice": (lambda raw: b'{"message":{},"message":{}}', "Invalid JSON payload received."),
    "half a character": (lambda raw: b'{"message":{"data":{"id":"\\ud800"}}}', "Invalid JSON payload received."),
    "abyss": (lambda raw: b"[" * 60_000, "Invalid JSON payload received."),
    "giant": (lambda raw: b" " * 100_000, "too large"),
    "array": (lambda raw: [], "Root element must be a message"),
    "unknown at the top": (lambda raw: raw.body() | {"priority": "HIGH"}, 'Unknown name "priority": Cannot find field.'),
    "unknown in the message": (lambda raw: raw.body(ttl="1s"), "Unknown name \"ttl\" at 'message': Cannot find field."),
    "unknown for android": (lambda raw: raw.body(android={"urgency": "HIGH"}), "Unknown name \"urgency\" at 'message.android'"),
    "same field twice": (lambda raw: raw.body(android={"collapse_key": "a", "collapseKey": "b"}), "already set"),
    "number in the data": (lambda raw: raw.body(data={"id": 12}), "Invalid value at 'message.data[0].value' (TYPE_STRING), 12"),
    "data no object": (lambda raw: raw.body(data="x"), "Invalid value at 'message.data'"),
    "token no string": (lambda raw: raw.body(token=["x"]), "Invalid value at 'message.token' (TYPE_STRING)"),
    "two targets": (lambda raw: raw.body(topic="news"), "oneof field 'target' is already set"),
    "validate_only no boolean": (lambda raw: raw.body() | {"validate_only": "yes"}, "TYPE_BOOL"),
    "ttl without unit": (lambda raw: raw.body(android={"ttl": "3600"}), "google.protobuf.Duration"),
    "ttl a number": (lambda raw: raw.body(android={"ttl": 3600}), "Invalid value at 'message.android.ttl'"),
    "odd priority": (lambda raw: raw.body(android={"priority": "URGENT"}), "Invalid value at 'message.android.priority'"),
}


@pytest.mark.parametrize(("body", "problem"), BAD_MESSAGES.values(), ids=list(BAD_MESSAGES))
async def test_what_is_no_message_is_refused_with_bad_request_alone(raw: Raw, body: Callable[[Raw], Any], problem: str) -> None:
    answer = await raw.post(body(raw))
    assert (answer.status_code, answer.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert problem in answer.json()["error"]["message"]
    assert kinds(answer) == [BAD_REQUEST]
    assert (await raw.post()).status_code == 200


UNWANTED_MESSAGES: dict[str, Callable[[Raw], Any]] = {
    "no message": lambda raw: {},
    "no target": lambda raw: raw.body(token=None),
    "topic": lambda raw: raw.body(token=None, topic="news"),
    "installation id": lambda raw: raw.body(token=None, fid="abc"),
    "ttl too long": lambda raw: raw.body(android={"ttl": "2419201s"}),
    "ttl much too long": lambda raw: raw.body(android={"ttl": "999999999999s"}),
    "ttl negative": lambda raw: raw.body(android={"ttl": "-1s"}),
    "too much data": lambda raw: raw.body(data={"id": "x" * 4095}),
    "reserved key from": lambda raw: raw.body(data={"from": "x"}),
    "reserved key gcm": lambda raw: raw.body(data={"gcm.n": "x"}),
    "reserved key google": lambda raw: raw.body(data={"googleId": "x"}),
    "reserved key message_type": lambda raw: raw.body(data={"message_type": "x"}),
    "reserved key collapse_key": lambda raw: raw.body(data={"collapse_key": "x"}),
    "reserved key for android": lambda raw: raw.body(android={"data": {"google.x": "x"}}),
}


@pytest.mark.parametrize("body", UNWANTED_MESSAGES.values(), ids=list(UNWANTED_MESSAGES))
async def test_what_fcm_does_not_take_names_the_field(raw: Raw, body: Callable[[Raw], Any]) -> None:
    answer = await raw.post(body(raw))
    assert (answer.status_code, error_code(answer)) == (400, "INVALID_ARGUMENT")
    assert kinds(answer) == [FCM_ERROR, BAD_REQUEST]


GOOD_MESSAGES: dict[str, Callable[[Raw], Any]] = {
    "camel case": lambda raw: {"validateOnly": False, **raw.body(android={"collapseKey": "a", "restrictedPackageName": "ua.bank"})},
    "snake case": lambda raw: {"validate_only": False, **raw.body(android={"collapse_key": "a", "direct_boot_ok": True})},
    "lower-case priority": lambda raw: raw.body(android={"priority": "high"}),
    "parts of seconds": lambda raw: raw.body(android={"ttl": "1.5s"}),
    "longest": lambda raw: raw.body(android={"ttl": "2419200s"}),
    "shortest": lambda raw: raw.body(android={"ttl": "0s"}),
    "all the data there may be": lambda raw: raw.body(data={"id": "ї" * 2047}),
    "null is absent": lambda raw: {"message": {"token": raw.token, "data": {"id": "1"}, "topic": None}},
    "no data": lambda raw: raw.body(data=None, notification={"title": "hello"}),
}


@pytest.mark.parametrize("body", GOOD_MESSAGES.values(), ids=list(GOOD_MESSAGES))
async def test_what_fcm_takes_is_taken(raw: Raw, body: Callable[[Raw], Any]) -> None:
    answer = await raw.post(body(raw))
    assert answer.status_code == 200, answer.text
    assert answer.json()["name"].startswith(f"projects/{PROJECT}/messages/")


async def test_tokens_malformed_unknown_and_of_another_project_are_told_apart(raw: Raw, running: RunningSimulators) -> None:
    malformed = await raw.post(raw.body(token="abc"))
    assert (malformed.status_code, error_code(malformed), kinds(malformed)) == (400, "INVALID_ARGUMENT", [FCM_ERROR])
    unknown = await raw.post(raw.body(token=raw.token[:-3] + "abc"))
    assert (unknown.status_code, error_code(unknown), unknown.json()["error"]["status"]) == (404, "UNREGISTERED", "NOT_FOUND")
    foreign = await raw.post(raw.body(token=running.fcm.create_device(OTHER_PROJECT)))
    assert (foreign.status_code, error_code(foreign)) == (403, "SENDER_ID_MISMATCH")
    running.fcm.uninstall(raw.token)
    gone = await raw.post()
    assert (gone.status_code, error_code(gone)) == (404, "UNREGISTERED")
    assert running.fcm.counters.refused == 4


async def test_quotas_of_project_and_device(raw: Raw, running: RunningSimulators, clock: FakeClock) -> None:
    start = clock.now()
    clock.advance(timedelta(seconds=60 - start.second % 60, microseconds=-start.microsecond))
    raw.access_token = await raw.authorize()
    answers = [await raw.post() for _ in range(241)]
    assert {answer.status_code for answer in answers[:240]} == {200}
    last = answers[240]
    assert (last.status_code, error_code(last), last.headers["retry-after"]) == (429, "QUOTA_EXCEEDED", "60")
    other = raw.body(token=running.fcm.create_device(PROJECT))
    assert (await raw.post(other)).status_code == 200
    running.fcm.messages_per_minute_max = 241
    clock.advance(timedelta(seconds=20))
    full = await raw.post(other)
    assert (full.status_code, full.headers["retry-after"]) == (429, "40")
    clock.advance(timedelta(seconds=40))
    assert (await raw.post()).status_code == 200


SCRIPTED = {
    "UNREGISTERED": (404, "NOT_FOUND"),
    "SENDER_ID_MISMATCH": (403, "PERMISSION_DENIED"),
    "QUOTA_EXCEEDED": (429, "RESOURCE_EXHAUSTED"),
    "UNAVAILABLE": (503, "UNAVAILABLE"),
    "INTERNAL": (500, "INTERNAL"),
    "THIRD_PARTY_AUTH_ERROR": (401, "UNAUTHENTICATED"),
    "NEW_ONE_DAY": (400, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize(("reason", "shape"), SCRIPTED.items(), ids=list(SCRIPTED))
async def test_scripted_error_codes_have_googles_shape(raw: Raw, running: RunningSimulators, reason: str, shape: tuple[int, str]) -> None:
    running.fcm.set_fault(simulated.Answer(shape[0], reason, retry_after=timedelta(seconds=7)), requests=1)
    answer = await raw.post()
    assert (answer.status_code, answer.json()["error"]["status"], error_code(answer)) == (*shape, reason)
    assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == (shape[0], "7")
    assert running.fcm.received[-1].reason == reason


async def test_faults_of_the_token_endpoint_leave_sends_alone(raw: Raw, running: RunningSimulators) -> None:
    tokens = simulated.FaultScope.TOKENS
    running.fcm.set_fault(simulated.Answer(503, "temporarily_unavailable"), scope=tokens, requests=1)
    assert (await raw.post()).status_code == 200
    refused = await raw.ask_token()
    assert (refused.status_code, refused.json()["error"]) == (503, "temporarily_unavailable")
    assert (await raw.ask_token()).status_code == 200
    running.fcm.set_fault(simulated.LostAnswer(), scope=tokens, requests=1)
    issued = running.fcm.counters.access_tokens
    with pytest.raises(httpx.TransportError):
        await raw.ask_token()
    assert running.fcm.counters.access_tokens == issued + 1
    for fault in (simulated.DeadToken(), simulated.ExpiredProviderToken()):
        with pytest.raises(ValueError, match="token endpoint"):
            running.fcm.set_fault(fault, scope=tokens, requests=1)


async def test_expired_access_token_stays_expired_and_a_new_one_is_welcome(raw: Raw, running: RunningSimulators) -> None:
    running.fcm.set_fault(simulated.ExpiredProviderToken(), requests=1)
    for _ in range(2):
        answer = await raw.post()
        assert answer.json()["error"]["details"][0]["reason"] == "ACCESS_TOKEN_EXPIRED"
    raw.access_token = await raw.authorize()
    assert (await raw.post()).status_code == 200


async def test_dead_token_fault_kills_the_addressed_device_for_good(raw: Raw, running: RunningSimulators) -> None:
    other = running.fcm.create_device(PROJECT)
    running.fcm.set_fault(simulated.DeadToken(), requests=1, device_token=other)
    assert (await raw.post()).status_code == 200
    for _ in range(2):
        assert error_code(await raw.post(raw.body(token=other))) == "UNREGISTERED"


BREAKS = {
    "lost answer": simulated.LostAnswer(),
    "truncated": simulated.Answer(503, "UNAVAILABLE", truncated=True),
    "giant truncated": simulated.Answer(200, raw_body=b"x" * 1_000_000, truncated=True),
}


@pytest.mark.parametrize("fault", BREAKS.values(), ids=list(BREAKS))
async def test_broken_answers_break_only_themselves(raw: Raw, running: RunningSimulators, fault: simulated.Fault) -> None:
    running.fcm.set_fault(fault, requests=1)
    with pytest.raises(httpx.TransportError):
        await raw.post()
    assert (await raw.post()).status_code == 200


async def test_goaway_closes_the_connection_before_anything_is_processed(raw: Raw, running: RunningSimulators) -> None:
    running.fcm.set_fault(simulated.GoAway("Shutdown"), requests=1)
    # Over HTTP/2 the client knows that it may repeat, and does.
    with suppress(httpx.TransportError):
        await raw.post()
    assert (await raw.post()).status_code == 200
    assert running.fcm.counters.connections == 2
    assert running.fcm.received[1].status == 0


async def test_black_hole_and_delay(raw: Raw, running: RunningSimulators) -> None:
    running.fcm.set_fault(simulated.BlackHole(), requests=1)
    running.fcm.set_fault(simulated.Delay(timedelta(milliseconds=10)), requests=1)
    lost = asyncio.create_task(raw.post())
    while running.fcm.counters.requests < 1:  # noqa: ASYNC110 - nothing tells of a request in a black hole
        await asyncio.sleep(0)
    assert (await raw.post()).status_code == 200
    assert not lost.done()
    lost.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lost


async def test_nothing_that_authenticates_is_kept(raw: Raw, running: RunningSimulators) -> None:
    await raw.post()
    kept = repr(running.fcm.received)
    assert raw.access_token not in kept
    assert raw.assertion() not in kept
    assert "grant_type" in kept


# HTTP/1.1 itself


@pytest.fixture
def talk(running: RunningSimulators, certificates: Certificates) -> Callable[[bytes], Awaitable[bytes]]:
    """Sends bytes over TLS without ALPN and reads until the other side closes."""

    async def exchange(data: bytes) -> bytes:
        context = ssl.create_default_context(cafile=str(certificates.ca))
        reader, writer = await asyncio.open_connection("localhost", running.fcm_port, ssl=context)
        writer.write(data)
        async with asyncio.timeout(LIMIT_S):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    return exchange


CLOSE = b"GET /last HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


async def test_requests_sent_ahead_are_answered_in_order(talk: Callable[[bytes], Awaitable[bytes]], running: RunningSimulators) -> None:
    ahead = b"".join(b"GET /%d HTTP/1.1\r\nhost: localhost\r\n\r\n" % n for n in range(50))
    answer = await talk(ahead + CLOSE)
    assert answer.count(b"HTTP/1.1 404") == 51
    assert [one.request.path for one in running.fcm.received] == [*(f"/{n}" for n in range(50)), "/last"]
    assert running.fcm.counters.connections == 1


async def test_chunked_bodies_and_continue_are_understood(talk: Callable[[bytes], Awaitable[bytes]], running: RunningSimulators) -> None:
    head = b"POST /token HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-www-form-urlencoded\r\n"
    chunked = head + b"transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n6\r\ngrant_\r\n6\r\ntype=x\r\n0\r\n\r\n"
    answer = await talk(chunked + CLOSE)
    assert answer.count(b"HTTP/1.1 400") == 1
    assert b"unsupported_grant_type" in answer
    assert running.fcm.received[0].request.body == b"grant_type=x"


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 300 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000,
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    ],
    ids=["noise", "no host", "many headers", "long header", "bad chunk", "bad length"],
)
async def test_what_is_no_http_is_refused_and_the_connection_closed(
    talk: Callable[[bytes], Awaitable[bytes]], running: RunningSimulators, data: bytes
) -> None:
    assert (await talk(data)).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert not running.fcm.received


async def test_client_that_does_not_wait_is_cut_off(running: RunningSimulators, certificates: Certificates) -> None:
    running.fcm.set_fault(simulated.BlackHole(), scope=simulated.FaultScope.TOKENS, requests=1)
    reader, writer = await asyncio.open_connection("localhost", running.fcm_port, ssl=certificates.trust())
    writer.write(b"POST /token HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n" + CLOSE * 10_000)
    async with asyncio.timeout(LIMIT_S):
        with suppress(ConnectionError):
            assert await reader.read() == b""
    assert len(running.fcm.received) == 1
    writer.close()


# The control listener


@pytest.fixture
async def stub(running: RunningSimulators) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.control_port}") as channel:
        yield SimulatedPushStub(channel)


async def test_phones_and_faults_over_the_control_listener(stub: Any, raw: Raw) -> None:
    token = (await stub.CreateDevice(pb.CreateDeviceRequest(push_service=FCM, topic=PROJECT))).device_token
    stream = stub.Connect()
    await stream.write(pb.ConnectRequest(push_service=FCM, online_device_tokens=[token, "nobody"]))
    frames = aiter(stream)
    assert (await anext(frames)).presence == pb.SimulatedPresence(online=1, unknown_device_tokens=["nobody"])
    assert (await raw.post(raw.body(token=token, android={"priority": "HIGH", "ttl": "60s"}))).status_code == 200
    [notification] = (await anext(frames)).batch.notifications
    assert json.loads(notification.payload) == {"id": "1"}
    assert (notification.headers["priority"], notification.headers["ttl"]) == ("HIGH", "60")
    busy = pb.SimulatedFault(answer=pb.SimulatedAnswer(status=503, reason="UNAVAILABLE", retry_after=Duration(seconds=9)))
    await stub.SetFault(pb.SetFaultRequest(push_service=FCM, fault=busy, scope=pb.SIMULATED_FAULT_SCOPE_TOKENS, next_requests=1))
    assert (await raw.post()).status_code == 200
    assert (await raw.ask_token()).headers["retry-after"] == "9"
    await stub.UninstallApp(pb.UninstallAppRequest(push_service=FCM, device_token=token))
    assert error_code(await raw.post(raw.body(token=token))) == "UNREGISTERED"
    received = (await stub.ListReceived(pb.ListReceivedRequest(push_service=FCM))).requests
    assert [one.status for one in received] == [200, 200, 200, 503, 404]
    counters = await stub.Counters(pb.CountersRequest(push_service=FCM))
    assert (counters.accepted, counters.refused, counters.token_requests, counters.access_tokens) == (2, 1, 2, 1)
    await stream.done_writing()


async def test_credentials_are_registered_and_revoked_over_the_control_listener(stub: Any, raw: Raw, keys: Keys) -> None:
    await stub.RevokeCredential(pb.RevokeCredentialRequest(push_service=FCM, credential_id=EMAIL))
    assert (await raw.post()).status_code == 401
    assert (await raw.ask_token()).json()["error_description"] == "Invalid grant: account not found"
    pem = keys.public_pem.decode()
    account = pb.SimulatedServiceAccount(project_id=PROJECT, client_email=EMAIL, private_key_id=KEY_ID, public_key_pem=pem)
    await stub.RegisterCredential(pb.RegisterCredentialRequest(push_service=FCM, fcm_service_account=account))
    raw.access_token = await raw.authorize()
    assert (await raw.post()).status_code == 200


async def test_control_refuses_what_it_cannot_do(stub: Any, keys: Keys) -> None:
    async def code(call: Awaitable[Any]) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call
        return refusal.value.code()

    nobody = pb.SIMULATED_PUSH_SERVICE_UNSPECIFIED
    invalid, apns = grpc.StatusCode.INVALID_ARGUMENT, pb.SIMULATED_PUSH_SERVICE_APNS
    assert await code(stub.CreateDevice(pb.CreateDeviceRequest(push_service=nobody, topic=PROJECT))) is invalid
    assert await code(stub.CreateDevice(pb.CreateDeviceRequest(push_service=FCM, topic="Not A Project"))) is invalid
    absent = pb.CreateDeviceRequest(push_service=apns, topic="ua.bank")
    assert await code(stub.CreateDevice(absent)) is grpc.StatusCode.FAILED_PRECONDITION
    unknown = pb.RevokeCredentialRequest(push_service=FCM, credential_id="who@example")
    assert await code(stub.RevokeCredential(unknown)) is grpc.StatusCode.NOT_FOUND
    foreign = pb.RegisterCredentialRequest(push_service=FCM, hms_client=pb.SimulatedHmsClient(app_id="1", client_secret="x"))
    assert await code(stub.RegisterCredential(foreign)) is invalid
    account = pb.SimulatedServiceAccount(project_id=PROJECT, client_email=EMAIL, private_key_id="k", public_key_pem="no")
    assert await code(stub.RegisterCredential(pb.RegisterCredentialRequest(push_service=FCM, fcm_service_account=account))) is invalid
    dead = pb.SimulatedFault(dead_token=pb.SimulatedDeadToken())
    wrong = pb.SetFaultRequest(push_service=FCM, fault=dead, scope=pb.SIMULATED_FAULT_SCOPE_TOKENS, next_requests=1)
    assert await code(stub.SetFault(wrong)) is invalid
    stream = stub.Connect()
    await stream.write(pb.ConnectRequest(push_service=FCM))
    await stream.write(pb.ConnectRequest(push_service=apns))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for _ in stream:
            pass
    assert refusal.value.code() is invalid
