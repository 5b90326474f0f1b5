"""What waits for a phone that is offline: each vendor's own rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sealpushd.simulators.core import Notification, PhoneLine
from sealpushd.simulators.fcm import GRANT_TYPE, SCOPES, FcmSimulator
from sealpushd.simulators.hms import WAITING_MAX, HmsSimulator, ReceiptStatus
from tests.unit.simulators.wire import Ask, Clock

PROJECT, EMAIL, APP = "demo-bank", "push@demo-bank.example", "104000001"
Send = Callable[..., None]


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def fcm(key: rsa.RSAPrivateKey, clock: Clock) -> FcmSimulator:
    fcm = FcmSimulator(now=clock.now)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    fcm.register_service_account(PROJECT, EMAIL, "key", pem)
    return fcm


@pytest.fixture
def hms(clock: Clock) -> HmsSimulator:
    hms = HmsSimulator(now=clock.now, receipts=Kept())
    hms.register_client(APP, "secret")
    return hms


class Kept(list[ReceiptStatus]):
    """Receipts in memory."""

    def put(self, receipt: ReceiptStatus) -> None:
        self.append(receipt)


@pytest.fixture
def send_fcm(fcm: FcmSimulator, key: rsa.RSAPrivateKey, clock: Clock, ask: Ask) -> Send:
    """Sends `{"id": …}` and must succeed."""

    def send(token: str, n: int, **android: Any) -> None:
        now = int(clock.now().timestamp())
        claims = {"iss": EMAIL, "scope": " ".join(SCOPES), "aud": "https://here/token", "iat": now, "exp": now + 60}
        assertion = jwt.encode(claims, key, algorithm="RS256")
        _, granted = ask(fcm, "/token", f"grant_type={GRANT_TYPE}&assertion={assertion}")
        body = {"message": {"token": token, "data": {"id": str(n)}, "android": android}}
        status, _ = ask(fcm, f"/v1/projects/{PROJECT}/messages:send", body, authorization=f"Bearer {granted['access_token']}")
        assert status == 200

    return send


@pytest.fixture
def send_hms(hms: HmsSimulator, ask: Ask) -> Send:
    """Sends the number and must succeed."""
    _, granted = ask(hms, "/oauth2/v3/token", f"grant_type=client_credentials&client_id={APP}&client_secret=secret")

    def send(token: str, n: int, **android: Any) -> None:
        body = {"message": {"token": [token], "data": str(n), "android": android}}
        _, answer = ask(hms, f"/v1/{APP}/messages:send", body, authorization=f"Bearer {granted['access_token']}")
        assert answer["code"] == "80000000"

    return send


async def taken(line: PhoneLine) -> list[Notification]:
    """What has come on a line so far."""
    line.close()
    return await line.next_batch()


def ids(notifications: list[Notification]) -> list[int]:
    return [int(json.loads(one.payload)["id"]) for one in notifications]


async def test_fcm_keeps_a_hundred_messages_in_order(fcm: FcmSimulator, send_fcm: Send) -> None:
    token = fcm.create_device(PROJECT)
    for n in range(100):
        send_fcm(token, n)
    line = fcm.connect()
    line.online([token])
    assert ids(await taken(line)) == list(range(100))


async def test_fcm_throws_all_away_at_the_hundred_and_first_and_says_so_once(fcm: FcmSimulator, send_fcm: Send) -> None:
    token = fcm.create_device(PROJECT)
    for n in range(101):
        send_fcm(token, n)
    send_fcm(token, 101)
    line = fcm.connect()
    line.online([token])
    notice, *rest = await taken(line)
    assert notice.headers == {"message_type": "deleted_messages", "total_deleted": "101"}
    assert ids(rest) == [101]
    again = fcm.connect()
    again.online([token])
    assert await taken(again) == []
    assert (fcm.counters.delivered, fcm.counters.dropped) == (1, 101)


async def test_fcm_keeps_the_newest_of_four_collapse_keys_beside_the_rest(fcm: FcmSimulator, send_fcm: Send) -> None:
    token = fcm.create_device(PROJECT)
    send_fcm(token, 0)
    for n, collapse_key in enumerate("aabcdae", start=1):
        send_fcm(token, n, collapse_key=collapse_key)
    line = fcm.connect()
    line.online([token])
    # a: 1, 2, 6 and the fifth key puts out b, which waits longest.
    assert ids(await taken(line)) == [0, 4, 5, 6, 7]
    assert fcm.counters.dropped == 3


async def test_fcm_keeps_nothing_beyond_its_ttl_and_nothing_with_ttl_0(fcm: FcmSimulator, send_fcm: Send, clock: Clock) -> None:
    token = fcm.create_device(PROJECT)
    send_fcm(token, 0, ttl="0s")
    send_fcm(token, 1, ttl="0.9s")
    send_fcm(token, 2, ttl="10s")
    send_fcm(token, 3, ttl="11s")
    send_fcm(token, 4)
    clock.advance(timedelta(seconds=10))
    line = fcm.connect()
    line.online([token])
    send_fcm(token, 5, ttl="0s")
    assert ids(await taken(line)) == [3, 4, 5]
    assert fcm.counters.dropped == 3


async def test_fcm_forgets_what_waited_for_an_app_that_is_gone(fcm: FcmSimulator, send_fcm: Send) -> None:
    token = fcm.create_device(PROJECT)
    send_fcm(token, 0)
    assert fcm.uninstall(token)
    assert fcm.connect().online([token]) == [token]
    assert fcm.counters.dropped == 1


async def test_hms_keeps_all_at_minus_one_up_to_its_bound(hms: HmsSimulator, send_hms: Send) -> None:
    token = hms.create_device(APP)
    for n in range(WAITING_MAX + 5):
        send_hms(token, n)
    line = hms.connect()
    line.online([token])
    assert [int(one.payload) for one in await taken(line)] == list(range(5, WAITING_MAX + 5))
    assert hms.counters.dropped == 5


async def test_hms_keeps_the_newest_of_each_group_and_at_zero_the_newest_of_all(hms: HmsSimulator, send_hms: Send) -> None:
    token = hms.create_device(APP)
    for n, group in enumerate([1, 2, 1, -1, 2]):
        send_hms(token, n, collapse_key=group, bi_tag=str(n))
    line = hms.connect()
    line.online([token])
    assert [int(one.payload) for one in await taken(line)] == [2, 3, 4]
    for n, group in enumerate([1, -1, 0], start=5):
        send_hms(token, n, collapse_key=group, bi_tag=str(n))
    line = hms.connect()
    line.online([token])
    assert [int(one.payload) for one in await taken(line)] == [7]
    receipts = hms.receipts
    assert isinstance(receipts, Kept)
    assert [(int(one.bi_tag), one.status) for one in receipts] == [(0, 15), (1, 15), (2, 0), (3, 0), (4, 0), (5, 15), (6, 15), (7, 0)]


async def test_hms_keeps_nothing_beyond_its_ttl(hms: HmsSimulator, send_hms: Send, clock: Clock) -> None:
    token = hms.create_device(APP)
    send_hms(token, 0, ttl="0s")
    send_hms(token, 1, ttl="60s")
    send_hms(token, 2)
    clock.advance(timedelta(seconds=60))
    line = hms.connect()
    line.online([token])
    assert [int(one.payload) for one in await taken(line)] == [2]
    clock.advance(timedelta(days=1))
    assert hms.counters.dropped == 2
