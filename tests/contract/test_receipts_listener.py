"""Huawei's delivery receipts over real HTTPS: counted when they are signed, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hmac
import json
import ssl
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog
from prometheus_client import REGISTRY

from sealpushd.dispatch import listener
from sealpushd.dispatch.receipts import BODY_BYTES_MAX, STATUSES_MAX
from sealpushd.platform import logging
from sealpushd.platform.db import connect
from sealpushd.platform.logging import LINES_MAX
from sealpushd.platform.settings import Settings, SettingsError
from sealpushd.simulators.hms import DELIVERED, ReceiptStatus
from sealpushd.simulators.receipts import ReceiptSender, ReceiptSettings
from tests.contract.dispatching import (
    BANK,
    HMS_APP,
    HUAWEI,
    IOS,
    RECEIPT_KEY,
    RECEIPT_USER,
    Dispatch,
    Vendors,
    dispatch_settings,
    start_dispatch,
    vendors,
)
from tests.contract.harness import LIMIT_S, FakeClock, Mesh, Migrated
from tests.contract.push_simulators import Certificates, raw_client

pytestmark = pytest.mark.asyncio(loop_scope="session")

CALLBACK = "X-HUAWEI-CALLBACK-ID"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def databases(migrated: Migrated) -> dict[str, str]:
    return await migrated("dispatch")


@dataclass
class Receiver:
    """A dispatch process that takes receipts for one app, and somebody who sends them."""

    clock: FakeClock
    dispatch: Dispatch
    settings: Settings
    vendors: Vendors
    port: int
    client: httpx.AsyncClient

    def header(
        self, *, key: bytes = RECEIPT_KEY.encode(), user: str = RECEIPT_USER, at: datetime | None = None, nonce: str = ""
    ) -> dict[str, str]:
        timestamp, nonce = str(int((at or self.clock.now()).timestamp() * 1000)), nonce or str(uuid.uuid4())
        value = base64.b64encode(hmac.digest(key, f"{timestamp}{nonce}{user}".encode(), "sha256")).decode()
        return {CALLBACK: f"timestamp={timestamp}; nonce={nonce}; value={value}"}

    async def post(self, headers: dict[str, str], body: bytes | None = None, app_id: str = BANK) -> tuple[int, str]:
        """Status of the answer, and the code in its body."""
        answer = await self.client.post(f"/hms/{app_id}", headers=headers, content=statuses(0) if body is None else body)
        return answer.status_code, answer.json()["code"]

    async def counted(self) -> dict[str, int]:
        return dict((await self.dispatch.lane(HUAWEI)).receipts)


def statuses(*given: int) -> bytes:
    return json.dumps({"statuses": [{"biTag": "AAECAwQFBgcICQoLDA0ODw", "status": each, "token": "t" * 130} for each in given]}).encode()


def metric(word: str) -> float:
    return REGISTRY.get_sample_value("sealpush_push_receipts_total", {"app": BANK, "platform": "huawei", "word": word}) or 0


@pytest_asyncio.fixture(loop_scope="session")
async def receiver(
    databases: dict[str, str], mesh: Mesh, certificates: Certificates, clock: FakeClock, tmp_path: Path
) -> AsyncIterator[Receiver]:
    rows = await connect(databases["admin"])
    await rows.execute("TRUNCATE dispatch.lane_states, dispatch.providers")
    await rows.close()
    async with vendors(certificates, clock) as running:
        tls = {"tls_certificate": certificates.certificate, "tls_private_key": certificates.private_key}
        settings = dispatch_settings(running, databases["dispatch"], tmp_path, receipts_port=0, **tls)
        with structlog.testing.capture_logs() as logs:
            dispatch = await start_dispatch(settings, mesh, clock, work=False)
        [port] = [entry["port"] for entry in logs if entry["event"] == "takes delivery receipts"]
        try:
            await dispatch.put(running.credential(HUAWEI).request())
            async with raw_client(certificates, port, http2=False) as client:
                yield Receiver(clock, dispatch, settings, running, port, client)
        finally:
            await dispatch.stop()


async def test_signed_receipts_are_counted_by_their_word(receiver: Receiver) -> None:
    before = metric("delivered")
    assert await receiver.post(receiver.header(), statuses(0, 0, 2, 15, 102, 999)) == (200, "0")
    assert await receiver.post(receiver.header(), statuses(0)) == (200, "0")
    assert await receiver.counted() == {"delivered": 3, "app-absent": 1, "replaced": 1, "too-frequent": 1, "other": 1}
    assert metric("delivered") - before == 3


async def test_newer_form_and_no_receipts_at_all_are_taken(receiver: Receiver) -> None:
    newer = {"statuses": [{"deliveryStatus": {"result": 0, "timestamp": 1}, "appPackageName": "ua.bank", "biTag": "x"}]}
    assert await receiver.post(receiver.header(), json.dumps(newer).encode()) == (200, "0")
    assert await receiver.post(receiver.header(), b'{"statuses": []}') == (200, "0")
    assert await receiver.counted() == {"delivered": 1}


async def test_what_is_not_signed_by_huawei_for_this_app_now_is_refused_and_not_counted(receiver: Receiver) -> None:
    now, minute = receiver.clock.now(), timedelta(minutes=1)
    once = receiver.header()
    assert await receiver.post(once) == (200, "0")
    refused = {
        "unsigned": {},
        "empty": {CALLBACK: ""},
        "no form": {CALLBACK: "value=x"},
        "replayed": once,
        "another key": receiver.header(key=b"another"),
        "an empty key": receiver.header(key=b""),
        "another user": receiver.header(user="somebody"),
        "old": receiver.header(at=now - 6 * minute),
        "young": receiver.header(at=now + 6 * minute),
        "long": {CALLBACK: receiver.header()[CALLBACK] + ";" * 2000},
    }
    for name, headers in refused.items():
        assert (name, await receiver.post(headers)) == (name, (401, "401"))
    for at in (now - 4 * minute, now + 4 * minute):
        assert await receiver.post(receiver.header(at=at)) == (200, "0")
    # Replayed when it is almost too old.
    receiver.clock.advance(4 * minute)
    assert await receiver.post(once) == (401, "401")
    assert await receiver.counted() == {"delivered": 3}


async def test_malformed_receipts_are_refused_and_not_counted(receiver: Receiver) -> None:
    too_many = json.dumps({"statuses": [{"status": 0}] * (STATUSES_MAX + 1)}).encode()
    for body in (b"", b"[]", b"{", b'{"statuses": 1}', b"\xff", b"[" * 100_000, too_many):
        assert await receiver.post(receiver.header(), body) == (400, "400")
    # What cannot be read of a list is left out.
    some = json.dumps({"statuses": [1, None, {}, {"status": True}, {"status": "0"}, {"status": 0, "biTag": {"a": 1}}]}).encode()
    assert await receiver.post(receiver.header(), some) == (200, "0")
    assert await receiver.counted() == {"delivered": 2}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_huge_bodies_are_refused(receiver: Receiver, packed: bool) -> None:
    huge = b" " * (BODY_BYTES_MAX + 1)
    headers = receiver.header() | ({"content-encoding": "gzip"} if packed else {})
    answer = await receiver.client.post("/hms/bank", headers=headers, content=gzip.compress(huge) if packed else huge)
    assert answer.status_code == 413
    assert await receiver.counted() == {}
    assert await receiver.post(receiver.header()) == (200, "0")


async def test_who_asks_learns_not_which_apps_there_are(receiver: Receiver) -> None:
    wrong = await receiver.client.post("/hms/bank", headers=receiver.header(key=b"another"), content=statuses(0))
    for app_id in ("nobody", "bank%00", "b" * 3000):
        answer = await receiver.client.post(f"/hms/{app_id}", headers=receiver.header(), content=statuses(0))
        assert (answer.status_code, answer.content, answer.headers["server"]) == (401, wrong.content, "sealpush")
    assert (await receiver.client.post("/hms/..", content=b"")).status_code == 404
    assert (await receiver.client.post("/", content=b"")).status_code == 404
    assert (await receiver.client.get("/hms/bank")).status_code == 405
    # Only Huawei signs receipts.
    await receiver.dispatch.put(receiver.vendors.credential(IOS).request("shop"))
    assert await receiver.post(receiver.header(), app_id="shop") == (401, "401")
    assert await receiver.counted() == {}
    # No labels of strangers' making.
    assert not [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.labels.get("app") in ("nobody", "..")]


async def test_rotated_key_counts_at_once_and_the_old_one_no_more(receiver: Receiver) -> None:
    new_key = base64.b64encode(b"a key of thirty-two bytes, newer").decode()
    content = {"app_id": HMS_APP, "client_secret": "another", "receipt_user": RECEIPT_USER, "receipt_key": new_key}
    receiver.vendors.running.hms.register_client(HMS_APP, "another")
    await receiver.dispatch.put(
        receiver.vendors.credential(HUAWEI, trusted=False).request(secret=json.dumps(content).encode(), replace=True)
    )
    assert await receiver.post(receiver.header()) == (401, "401")
    # The key as text, and as what its Base64 stands for.
    assert await receiver.post(receiver.header(key=new_key.encode())) == (200, "0")
    assert await receiver.post(receiver.header(key=base64.b64decode(new_key))) == (200, "0")
    # A credential that names no key expects no receipts.
    del content["receipt_user"], content["receipt_key"]
    await receiver.dispatch.put(
        receiver.vendors.credential(HUAWEI, trusted=False).request(secret=json.dumps(content).encode(), replace=True)
    )
    assert await receiver.post(receiver.header(key=new_key.encode())) == (401, "401")
    assert await receiver.counted() == {"delivered": 2}


async def test_removed_credential_takes_its_key_along(receiver: Receiver) -> None:
    await receiver.dispatch.remove(HUAWEI)
    assert await receiver.post(receiver.header()) == (401, "401")
    await receiver.dispatch.put(receiver.vendors.credential(HUAWEI).request())
    assert await receiver.post(receiver.header()) == (200, "0")


async def test_what_broke_on_the_way_may_come_again_as_it_was(receiver: Receiver, certificates: Certificates) -> None:
    headers, body = receiver.header(), statuses(0)
    head = f"POST /hms/bank HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{CALLBACK}: {headers[CALLBACK]}\r\n\r\n"
    _, writer = await asyncio.open_connection("localhost", receiver.port, ssl=certificates.trust())
    writer.write(head.encode() + body[:20])
    await writer.drain()
    # It is being read: what is asked after it on another connection has been answered.
    assert await receiver.post(receiver.header()) == (200, "0")
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    assert await receiver.post(headers) == (200, "0")
    assert await receiver.counted() == {"delivered": 2}


async def test_noise_on_the_port_harms_nobody(receiver: Receiver) -> None:
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
        reader, writer = await asyncio.open_connection("localhost", receiver.port)
        writer.write(noise)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
    assert await receiver.post(receiver.header()) == (200, "0")


async def test_simulated_push_kit_reports_to_it(receiver: Receiver, certificates: Certificates) -> None:
    hms = receiver.vendors.running.hms
    settings = ReceiptSettings(url=f"https://localhost:{receiver.port}/hms/{BANK}", ca=certificates.ca)
    async with ReceiptSender.sending(settings, hms, receiver.clock.now) as sender, asyncio.timeout(LIMIT_S):
        for n in range(120):
            sender.put(ReceiptStatus(HMS_APP, "", f"t{n}", DELIVERED, 1, "r"))
        while hms.counters.receipts < 120:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
    assert await receiver.counted() == {"delivered": 120}


async def test_nothing_secret_and_no_flood_is_logged(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("dispatch", "debug")
    headers = receiver.header(key=b"another")
    for _ in range(30):
        await receiver.post(headers)
    await receiver.post(receiver.header(), b"hunter2")
    await receiver.post(receiver.header(), app_id="nobody")
    await receiver.post(receiver.header())
    text = capsys.readouterr().err
    logs = [json.loads(line) for line in text.splitlines()]
    # Nothing of apps that are none.
    warned = [(entry["event"], entry["app"]) for entry in logs if entry["level"] == "warning"]
    assert warned == [("a receipt was refused", BANK)] * LINES_MAX
    for secret in (RECEIPT_KEY, RECEIPT_USER, "hunter2", headers[CALLBACK].rpartition("value=")[2], "t" * 130):
        assert secret not in text


async def test_settings_that_cannot_be_listened_with_are_named(receiver: Receiver, mesh: Mesh, clock: FakeClock, tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"receipts_port": receiver.port}, "SEALPUSH_RECEIPTS_PORT"),
        ({"tls_certificate": None}, "SEALPUSH_TLS_CERTIFICATE"),
        ({"tls_private_key": None}, "SEALPUSH_TLS_PRIVATE_KEY"),
        ({"tls_certificate": tmp_path / "nowhere.pem"}, "SEALPUSH_TLS_CERTIFICATE"),
        ({"tls_private_key": tmp_path / "junk.pem"}, "SEALPUSH_TLS_PRIVATE_KEY"),
    ]
    for change, variable in wrong:
        with pytest.raises(SettingsError, match=variable):
            await start_dispatch(receiver.settings.model_copy(update=change), mesh, clock, work=False)


async def test_connections_are_few_and_end_by_themselves(
    receiver: Receiver, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))

    async def slow() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("localhost", receiver.port, ssl=context)
        writer.write(b"POST /hms/bank HTTP/1.1\r\nx-never-ends: ")
        return reader, writer

    with monkeypatch.context() as few:
        few.setattr(listener, "CONNECTION_S", 2 * LIMIT_S)
        few.setattr(listener, "CONNECTIONS_MAX", 3)
        patient = [await slow() for _ in range(3)]
        with pytest.raises((httpx.TransportError, OSError)):
            await receiver.post(receiver.header())
        for _, writer in patient:
            writer.close()
    with monkeypatch.context() as brief:
        brief.setattr(listener, "CONNECTION_S", 0.2)
        reader, writer = await slow()
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
    assert await receiver.post(receiver.header()) == (200, "0")
