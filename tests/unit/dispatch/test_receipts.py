from __future__ import annotations

import base64
import hmac
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.dispatch.receipts import (
    BODY_BYTES_MAX,
    STATUSES_MAX,
    WORDS,
    BadSignature,
    MalformedReceipts,
    Receipt,
    ReceiptKey,
    Signatures,
    parse_receipts,
)
from sealpushd.platform.clock import Reading

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
KEY = ReceiptKey("bank", "swordfish, not base64!")
NONCE = "a07bfa17-6d82-4b53-a9a2-07cfef5ceef1"
ID = bytes(range(16))
TAG = "AAECAwQFBgcICQoLDA0ODw"
# A narrow alphabet: the whole of Unicode costs a second to set up and finds nothing more.
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=100)


def value(timestamp: str, nonce: str = NONCE, user: str = "bank", secret: bytes = KEY.key.encode()) -> str:
    return base64.b64encode(hmac.digest(secret, f"{timestamp}{nonce}{user}".encode(), "sha256")).decode()


def reading(now: datetime) -> Reading:
    """Of two clocks that go together."""
    return Reading(now, now.timestamp())


def milliseconds(at: datetime) -> str:
    return str(int(at.timestamp() * 1000))


def header(at: datetime = NOW, nonce: str = NONCE, separator: str = "; ") -> str:
    timestamp = milliseconds(at)
    return separator.join([f"timestamp={timestamp}", f"nonce={nonce}", f"value={value(timestamp, nonce)}"])


# Signatures


@pytest.mark.parametrize("separator", ["; ", ";", " ;  "])
def test_signature_is_taken_however_it_is_spaced_and_ordered(separator: str) -> None:
    assert Signatures().verify(header(separator=separator), [KEY], reading(NOW)) is KEY
    backwards = separator.join(reversed(header().split("; "))) + ";"
    assert Signatures().verify(backwards, [KEY], reading(NOW)) is KEY


def test_time_in_seconds_is_taken_too() -> None:
    timestamp = str(int(NOW.timestamp()))
    assert Signatures().verify(f"timestamp={timestamp}; nonce={NONCE}; value={value(timestamp)}", [KEY], reading(NOW)) is KEY


def test_key_is_text_or_base64() -> None:
    secret = bytes(range(32))
    newer = ReceiptKey("bank", base64.b64encode(secret).decode())
    timestamp = milliseconds(NOW)
    as_bytes = f"timestamp={timestamp}; nonce={NONCE}; value={value(timestamp, secret=secret)}"
    as_text = f"timestamp={timestamp}; nonce={NONCE}; value={value(timestamp, secret=newer.key.encode())}"
    assert Signatures().verify(as_bytes, [newer], reading(NOW)) is newer
    assert Signatures().verify(as_text, [newer], reading(NOW)) is newer


def test_the_credential_that_signed_is_found_among_many() -> None:
    others = [ReceiptKey("other", KEY.key), ReceiptKey("bank", "other"), ReceiptKey("bank", "c3dvcmRmaXNo")]
    assert Signatures().verify(header(), [*others, KEY], reading(NOW)) is KEY
    with pytest.raises(BadSignature, match="does not fit"):
        Signatures().verify(header(), others, reading(NOW))
    with pytest.raises(BadSignature, match="does not fit"):
        Signatures().verify(header(), [], reading(NOW))


def test_empty_key_signs_nothing() -> None:
    timestamp = milliseconds(NOW)
    forged = f"timestamp={timestamp}; nonce={NONCE}; value={value(timestamp, secret=b'')}"
    with pytest.raises(BadSignature, match="does not fit"):
        Signatures().verify(forged, [ReceiptKey("bank", "")], reading(NOW))


@pytest.mark.parametrize("minutes", [-5, 5])
def test_signature_may_be_five_minutes_off_and_no_more(minutes: int) -> None:
    at = NOW + timedelta(minutes=minutes)
    assert Signatures().verify(header(at), [KEY], reading(NOW)) is KEY
    beyond = at + timedelta(seconds=1 if minutes > 0 else -1)
    with pytest.raises(BadSignature, match="5 minutes"):
        Signatures().verify(header(beyond), [KEY], reading(NOW))


def test_callback_that_was_seen_is_refused() -> None:
    signatures = Signatures()
    signatures.verify(header(), [KEY], reading(NOW))
    with pytest.raises(BadSignature, match="seen"):
        signatures.verify(header(separator=";"), [KEY], reading(NOW + timedelta(minutes=4)))
    signatures.verify(header(nonce="another"), [KEY], reading(NOW))


def test_replay_with_the_time_split_differently_is_refused() -> None:
    signatures = Signatures()
    timestamp = milliseconds(NOW)
    signatures.verify(header(), [KEY], reading(NOW))
    replay = f"timestamp={timestamp[:10]}; nonce={timestamp[10:]}{NONCE}; value={value(timestamp)}"
    with pytest.raises(BadSignature, match="seen"):
        signatures.verify(replay, [KEY], reading(NOW))


def test_signature_from_the_future_is_remembered_until_it_has_aged() -> None:
    signatures = Signatures()
    early = header(NOW + timedelta(minutes=5))
    signatures.verify(early, [KEY], reading(NOW))
    for minutes in (1, 5, 9, 10):
        with pytest.raises(BadSignature, match="seen"):
            signatures.verify(early, [KEY], reading(NOW + timedelta(minutes=minutes)))
    with pytest.raises(BadSignature, match="5 minutes"):
        signatures.verify(early, [KEY], reading(NOW + timedelta(minutes=11)))


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    signatures = Signatures(remembered_max=3)
    for number in range(10):
        signatures.verify(header(nonce=f"n{number}"), [KEY], reading(NOW))
    with pytest.raises(BadSignature, match="seen"):
        signatures.verify(header(nonce="n9"), [KEY], reading(NOW))
    assert signatures.verify(header(nonce="n0"), [KEY], reading(NOW)) is KEY


def test_unsigned_callback_is_refused() -> None:
    with pytest.raises(BadSignature, match="not signed"):
        Signatures().verify(None, [KEY], reading(NOW))


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "timestamp=1",
        header().replace("nonce", "once"),
        header() + "; value=x",
        header() + "; more=x",
        header().replace("timestamp=", "timestamp=-"),
        header().replace("timestamp=", "timestamp=９"),
        header().replace(NONCE, ""),
        header().replace(NONCE, "x" * 2000),
        header() + "\n",
    ],
)
def test_header_of_another_form_is_refused(odd: str) -> None:
    with pytest.raises(BadSignature, match="form"):
        Signatures().verify(odd, [KEY], reading(NOW))


@given(texts | st.tuples(texts, texts, texts).map(lambda parts: f"timestamp={parts[0]}; nonce={parts[1]}; value={parts[2]}"))
def test_no_header_does_more_than_be_refused(odd: str) -> None:
    with pytest.raises(BadSignature) as refusal:
        Signatures().verify(odd, [KEY], reading(NOW))
    assert KEY.key not in str(refusal.value)


@given(changed=st.integers(0, len(value(milliseconds(NOW))) - 1), character=st.sampled_from("AZaz09+/="))
def test_signature_that_differs_anywhere_is_refused(changed: int, character: str) -> None:
    good = value(milliseconds(NOW))
    forged = good[:changed] + character + good[changed + 1 :]
    signed = f"timestamp={milliseconds(NOW)}; nonce={NONCE}; value={forged}"
    if forged == good:
        assert Signatures().verify(signed, [KEY], reading(NOW)) is KEY
    else:
        with pytest.raises(BadSignature, match="does not fit"):
            Signatures().verify(signed, [KEY], reading(NOW))


def test_key_is_never_printed() -> None:
    assert "swordfish" not in repr(KEY)


# Bodies


def body(*statuses: object) -> bytes:
    return json.dumps({"statuses": list(statuses)}).encode()


V1 = {"biTag": TAG, "appid": "101234567", "token": "secret", "status": 0, "timestamp": 1489993883189, "requestId": "1"}
V2 = {
    "biTag": TAG,
    "appPackageName": "ua.bank.app",
    "pushType": 0,
    "token": "secret",
    "deliveryStatus": {"result": 2, "timestamp": 1489993883189},
    "requestId": "1",
}


def test_both_versions_are_read() -> None:
    assert parse_receipts(body(V1, V2, V1 | {"status": 15})) == [
        Receipt(ID, 0, "delivered", "101234567"),
        Receipt(ID, 2, "app-absent", "ua.bank.app"),
        Receipt(ID, 15, "replaced", "101234567"),
    ]


@pytest.mark.parametrize(("status", "word"), [*WORDS.items(), (1, "other"), (144, "other")])
def test_every_status_has_a_word(status: int, word: str) -> None:
    assert parse_receipts(body(V1 | {"status": status})) == [Receipt(ID, status, word, "101234567")]


@pytest.mark.parametrize(
    ("fields", "receipt"),
    [
        ({"status": "6"}, Receipt(None, 6, "not-displayed")),
        ({"status": 0, "biTag": ""}, Receipt(None, 0, "delivered")),
        ({"status": 0, "biTag": None}, Receipt(None, 0, "delivered")),
        ({"status": 0, "biTag": "campaign-2024"}, Receipt(None, 0, "delivered")),
        ({"status": 0, "biTag": "AAECAwQFBgcICQoLDA0ODx"}, Receipt(None, 0, "delivered")),
        ({"status": 0, "biTag": TAG + "="}, Receipt(None, 0, "delivered")),
        ({"status": 0, "clientId": "7"}, Receipt(None, 0, "delivered", "7")),
        ({"status": 0, "appid": "x y"}, Receipt(None, 0, "delivered", "unreadable")),
        ({"status": 0, "appid": 7}, Receipt(None, 0, "delivered")),
    ],
)
def test_what_is_missing_or_odd_is_borne(fields: dict[str, object], receipt: Receipt) -> None:
    assert parse_receipts(body(fields)) == [receipt]


def test_what_has_no_status_is_left_out() -> None:
    odd = [{}, 5, None, [], "x", {"status": None}, {"status": True}, {"status": -1}, {"status": 10**9}, {"status": "x"}]
    odd += [{"status": 1.5}, {"deliveryStatus": {}}, {"deliveryStatus": {"result": "12345678901"}}, {"formStatus": {"result": 0}}]
    assert parse_receipts(body(*odd, V1)) == [Receipt(ID, 0, "delivered", "101234567")]


def test_device_tokens_are_not_kept() -> None:
    assert "secret" not in repr(parse_receipts(body(V1, V2)))


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"<html>",
        b"\xff",
        b"[]",
        b"{}",
        b'{"statuses":{}}',
        b"[" * 100_000,
        body(*[V1] * (STATUSES_MAX + 1)),
        b" " * (BODY_BYTES_MAX + 1),
    ],
    ids=lambda odd: str(len(odd)),
)
def test_body_that_is_none_of_a_receipt_is_refused(odd: bytes) -> None:
    with pytest.raises(MalformedReceipts):
        parse_receipts(odd)


def test_as_many_receipts_as_huawei_ever_sends_are_read() -> None:
    assert len(parse_receipts(body(*[V1] * STATUSES_MAX))) == STATUSES_MAX


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*V1, *V2, "result"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5))
def test_reading_receipts_never_raises(statuses: list[object]) -> None:
    for receipt in parse_receipts(body(*statuses)):
        assert receipt.word in {*WORDS.values(), "other"}
        assert receipt.wake_up_id is None or len(receipt.wake_up_id) == 16
