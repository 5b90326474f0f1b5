"""What all simulated push services share: faults in their order, tokens of devices, access tokens, the record."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from sealpushd.simulators import core as simulated
from sealpushd.simulators.apns import ApnsSimulator
from sealpushd.simulators.core import FAULTS_MAX, FaultScope, PushSimulator, parse_json
from sealpushd.simulators.exchange import Exchange, HttpRequest
from sealpushd.simulators.fcm import FcmSimulator
from sealpushd.simulators.hms import HmsSimulator
from sealpushd.simulators.oauth import ACCESS_TOKENS_MAX, AccessTokens, TokenState
from tests.unit.simulators.wire import Ask, Clock, Wire

APP = "104000001"
SEND, TOKEN = f"/v1/{APP}/messages:send", "/oauth2/v3/token"
FORM = f"grant_type=client_credentials&client_id={APP}&client_secret=secret"


@pytest.fixture
def hms(clock: Clock) -> HmsSimulator:
    hms = HmsSimulator(now=clock.now)
    hms.register_client(APP, "secret")
    return hms


TOKENS = {
    "apns": (ApnsSimulator, "ua.bank.app", r"[0-9a-f]{64}"),
    "fcm": (FcmSimulator, "demo-bank", r"[A-Za-z0-9_-]{22}:APA91b[A-Za-z0-9_-]{134}"),
    "hms": (HmsSimulator, APP, r"[A-Za-z0-9_-]{130}"),
}


@pytest.mark.parametrize(("make", "topic", "shape"), TOKENS.values(), ids=list(TOKENS))
def test_device_tokens_look_like_the_vendors(make: type[PushSimulator], topic: str, shape: str, clock: Clock) -> None:
    service = make(now=clock.now)
    tokens = {service.create_device(topic) for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch(shape, token) for token in tokens)
    for bad in ("", "no spaces", "a/b"):
        with pytest.raises(ValueError, match=r"app|topic"):
            service.create_device(bad)


@pytest.mark.parametrize(("make", "topic", "shape"), TOKENS.values(), ids=list(TOKENS))
def test_full_house_takes_no_more_devices(
    make: type[PushSimulator], topic: str, shape: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "DEVICES_MAX", 2)
    service = make(now=clock.now)
    service.create_device(topic)
    service.create_device(topic)
    with pytest.raises(OverflowError):
        service.create_device(topic)


@pytest.mark.parametrize(("make", "topic", "shape"), TOKENS.values(), ids=list(TOKENS))
def test_phone_moves_to_the_line_that_names_it_last(make: type[PushSimulator], topic: str, shape: str, clock: Clock) -> None:
    service = make(now=clock.now)
    token = service.create_device(topic)
    first, second = service.connect(), service.connect()
    assert first.online([token, "nobody"]) == ["nobody"]
    assert second.online([token]) == []
    assert (len(first), len(second)) == (0, 1)
    service.uninstall(token)
    assert len(second) == 0
    assert second.online([token]) == [token]
    assert not service.uninstall("nobody")


def test_faults_play_in_the_order_in_which_they_were_set(hms: HmsSimulator, ask: Ask) -> None:
    token = hms.create_device(APP)
    _, granted = ask(hms, TOKEN, FORM)
    body = {"message": {"token": [token], "data": "x"}}

    def code() -> str:
        _, answer = ask(hms, SEND, body, authorization=f"Bearer {granted['access_token']}")
        return str(answer["code"])

    hms.set_fault(simulated.Answer(200, "1"), requests=2)
    hms.set_fault(simulated.Answer(200, "2"), requests=1)
    hms.set_fault(simulated.Answer(200, "3"), requests=9, device_token="another")
    assert [code() for _ in range(4)] == ["1", "1", "2", "80000000"]


def test_fault_lasts_for_its_time_and_no_longer(hms: HmsSimulator, ask: Ask, clock: Clock) -> None:
    hms.set_fault(simulated.Answer(500, "1"), scope=FaultScope.TOKENS, duration=timedelta(seconds=10))
    assert ask(hms, TOKEN, FORM)[0] == 500
    clock.advance(timedelta(seconds=9))
    assert ask(hms, TOKEN, FORM)[0] == 500
    clock.advance(timedelta(seconds=1))
    assert ask(hms, TOKEN, FORM)[0] == 200
    hms.set_fault(simulated.BlackHole(), scope=FaultScope.TOKENS, duration=timedelta(seconds=10))
    assert ask(hms, TOKEN, FORM)[0] == 0
    hms.clear_faults()
    assert ask(hms, TOKEN, FORM)[0] == 200


def test_goaway_names_the_stream_before_the_request(hms: HmsSimulator) -> None:
    hms.set_fault(simulated.GoAway("Shutdown"), scope=FaultScope.TOKENS, requests=1)
    wire = Wire()
    hms.request_received(Exchange(wire, 7, HttpRequest("POST", "https", TOKEN, (), b"", 0)))
    assert wire.said == ["goaway Shutdown 5"]


def test_faults_that_make_no_sense_are_refused(hms: HmsSimulator, clock: Clock) -> None:
    answer = simulated.Answer(500)
    for extent in ({}, {"requests": 1, "duration": timedelta(1)}, {"requests": 0}, {"duration": timedelta(0)}):
        with pytest.raises(ValueError, match="lasts for"):
            hms.set_fault(answer, **extent)
    with pytest.raises(ValueError, match="no devices"):
        hms.set_fault(answer, scope=FaultScope.TOKENS, requests=1, device_token="x")
    with pytest.raises(ValueError, match="no token endpoint"):
        ApnsSimulator(now=clock.now).set_fault(answer, scope=FaultScope.TOKENS, requests=1)
    for _ in range(FAULTS_MAX):
        hms.set_fault(answer, requests=1)
    with pytest.raises(ValueError, match="clear them first"):
        hms.set_fault(answer, requests=1)


def test_access_token_is_good_for_an_hour_and_no_longer_than_its_owner(clock: Clock) -> None:
    tokens = AccessTokens()
    first, second, other = (tokens.issue(owner, clock.now()) for owner in ("a", "a", "b"))
    assert tokens.look("nobody's", clock.now()) == (TokenState.UNKNOWN, "")
    tokens.expire(first, clock.now())
    assert tokens.look(first, clock.now()) == (TokenState.EXPIRED, "a")
    assert tokens.look(second, clock.now()) == (TokenState.GOOD, "a")
    tokens.revoke("a")
    assert tokens.look(second, clock.now()) == (TokenState.REVOKED, "a")
    clock.advance(timedelta(minutes=59, seconds=59))
    assert tokens.look(other, clock.now()) == (TokenState.GOOD, "b")
    clock.advance(timedelta(seconds=1))
    assert tokens.look(other, clock.now()) == (TokenState.EXPIRED, "b")


def test_the_oldest_access_tokens_give_way(clock: Clock) -> None:
    tokens = AccessTokens()
    first = tokens.issue("a", clock.now())
    last = [tokens.issue("a", clock.now()) for _ in range(ACCESS_TOKENS_MAX)][-1]
    assert tokens.look(first, clock.now())[0] is TokenState.UNKNOWN
    assert tokens.look(last, clock.now())[0] is TokenState.GOOD


def test_record_tells_status_and_word_and_keeps_no_secret(hms: HmsSimulator, ask: Ask) -> None:
    ask(hms, TOKEN, FORM.replace("secret=secret", "secret=hidden"))
    ask(hms, SEND, {}, authorization="Bearer hidden")
    assert [(one.sequence, one.status, one.reason) for one in hms.received] == [(1, 400, "1101"), (2, 200, "80200001")]
    assert "hidden" not in repr(hms.received)
    assert (hms.counters.token_requests, hms.counters.requests, hms.counters.refused) == (1, 1, 1)


@pytest.mark.parametrize("body", [b"{", b'{"a":1,"a":2}', b'"\\ud800"', b"\xff", b"[" * 100_000, b""])
def test_json_that_a_strict_reader_stumbles_over_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(body)
