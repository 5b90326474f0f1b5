from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import SecretStr

from sealpushd.dispatch.makers import KINDS, Config, CredentialError, PushServices, make, receipt_key_of
from sealpushd.dispatch.receipts import ReceiptKey
from sealpushd.platform.settings import SettingsError, load
from sealpushd.platform.tls import LocalAuthority
from tests.clocks import FakeClock

PEM = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
APNS = {"key_id": "KEY1234567", "team_id": "TEAM123456", "topic": "ua.bank.app"}
HMS = {"app_id": "104000001", "client_secret": "hunter2"}


def services(**changes: Any) -> PushServices:
    return PushServices.of(load().model_copy(update=changes))


def hms(**changes: Any) -> Config:
    return Config("hms", {}, json.dumps(HMS | changes).encode())


async def test_each_kind_makes_its_provider() -> None:
    for config, topic in ((Config("apns", APNS, PEM), "ua.bank.app"), (hms(), "104000001")):
        provider = make(config, services(), FakeClock(datetime(2026, 3, 1, tzinfo=UTC)))
        assert (provider.name, provider.topic) == (config.kind, topic)
        await provider.aclose()
    assert set(KINDS) == {"apns", "fcm", "hms"}


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        (Config("", APNS, PEM), "push_service", "known are apns, fcm, hms"),
        (Config("wns", APNS, PEM), "push_service", "'wns'"),
        (Config("apns", {}, PEM), "settings", "needs key_id, team_id, topic"),
        (Config("apns", APNS | {"topic": ""}, PEM), "settings", "needs topic"),
        (Config("apns", APNS | {"project": "p", "bundle": "b"}, PEM), "settings", "has no bundle, project"),
        (Config("hms", {"project": "p"}, hms().secret), "settings", "has no project"),
        (Config("apns", APNS | {"topic": "t\x00"}, PEM), "settings", "topic must be"),
        (Config("apns", APNS | {"topic": "б"}, PEM), "settings", "topic must be"),
        (Config("apns", APNS | {"topic": "t" * 257}, PEM), "settings", "topic must be"),
        (Config("apns", APNS, b""), "credential", "P-256"),
        (Config("apns", APNS, b"\xff\xfe"), "credential", "P-256"),
        (Config("fcm", {}, b"[" * 100_000), "credential", "JSON file"),
        (Config("fcm", {}, b'{"type": "service_account"}'), "credential", '"project_id"'),
        (Config("hms", {}, b"9" * 5000), "credential", "JSON object"),
        (hms(client_secret="hunter2\n"), "credential", "client_secret"),
        (hms(client_secret=""), "credential", "client_secret"),
        (hms(hunter2="x"), "credential", "fields that are none of"),
        (hms(app_id="../../104"), "credential", "digits"),
        (hms(receipt_key="hunter2"), "credential", "come together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_used_says_why_and_never_the_secret(config: Config, field: str, words: str) -> None:
    with pytest.raises(CredentialError) as caught:
        make(config, services(), FakeClock(datetime(2026, 3, 1, tzinfo=UTC)))
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_credential_does_not_print_its_secret() -> None:
    assert "hunter2" not in repr(hms())
    assert "hunter2" not in repr(services(proxy=SecretStr("http://user:hunter2@proxy:3128")))


def test_receipts_have_a_key_where_the_credential_names_one() -> None:
    assert receipt_key_of(hms(receipt_user="bank", receipt_key="k")) == ReceiptKey("bank", "k")
    assert receipt_key_of(hms()) is None
    assert receipt_key_of(Config("apns", APNS, PEM)) is None


@pytest.mark.parametrize(
    ("change", "variable"),
    [
        ({"apns_production_url": "http://api.push.apple.com"}, "SEALPUSH_APNS_PRODUCTION_URL"),
        ({"apns_sandbox_url": "https://"}, "SEALPUSH_APNS_SANDBOX_URL"),
        ({"fcm_url": "https://fcm.googleapis.com/v1"}, "SEALPUSH_FCM_URL"),
        ({"hms_url": "https://[::1"}, "SEALPUSH_HMS_URL"),
        ({"hms_url": "https://host:port"}, "SEALPUSH_HMS_URL"),
        ({"hms_token_url": "https://user:hunter2@host/token"}, "SEALPUSH_HMS_TOKEN_URL"),
        ({"hms_token_url": "https://:hunter2@host/token"}, "SEALPUSH_HMS_TOKEN_URL"),
        ({"hms_token_url": "https://host/token?secret=hunter2"}, "SEALPUSH_HMS_TOKEN_URL"),
        ({"push_ca": Path("nowhere.pem")}, "SEALPUSH_PUSH_CA"),
        ({"proxy": SecretStr("")}, "SEALPUSH_PROXY"),
        ({"proxy": SecretStr("user:hunter2@proxy:3128")}, "SEALPUSH_PROXY"),
        ({"proxy": SecretStr("socks5://user:hunter2@proxy:1080")}, "SEALPUSH_PROXY"),
        ({"proxy": SecretStr("http://user:hunter2@[::1:3128")}, "SEALPUSH_PROXY"),
        ({"proxy": SecretStr("http://user:hunter2@proxy:99999")}, "SEALPUSH_PROXY"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_without_what_it_hides(change: dict[str, Any], variable: str) -> None:
    with pytest.raises(SettingsError, match=variable) as caught:
        services(**change)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_an_authority_without_a_certificate_is_refused_at_the_start(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"SEALPUSH_PUSH_CA: .* holds no certificate"):
        services(push_ca=path)


async def test_proxy_and_authority_reach_the_provider(tmp_path: Path) -> None:
    authority = LocalAuthority(tmp_path).certificate_path
    found = services(push_ca=authority, proxy=SecretStr("http://user:hunter2@proxy:3128"), push_concurrency=7)
    assert (found.http.private_ca_file, found.http.proxy_url, found.http.streams_max) == (
        authority,
        "http://user:hunter2@proxy:3128",
        7,
    )
    assert services(fcm_url="https://localhost:8443/").fcm_url == "https://localhost:8443"
    provider = make(hms(), found, FakeClock(datetime(2026, 3, 1, tzinfo=UTC)))
    await provider.aclose()
