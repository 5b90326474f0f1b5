"""The demo's accounts at the simulated push services: their credentials as files, as Apple, Google and Huawei would hand them out.

push/apns.p8, apns.pem     the key that dispatch signs its provider tokens with, and its public half for the simulated APNs
push/fcm.json              a service account of the simulated Google
push/hms.json              a client of the simulated Push Kit

They open nothing but the simulators, so one that is missing or damaged is made anew.
"""

from __future__ import annotations

import json
import secrets as randomness
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key

from sealpush.model import Platform
from sealpushd.platform.tls import write_secret

APNS_TEAM_ID: Final = "SEALPUSH01"
APNS_KEY_ID: Final = "SEALKEY001"
APNS_TOPIC: Final = "ua.demo.bank"
FCM_PROJECT: Final = "demo-bank-push"
HMS_APP_ID: Final = "101234567"
# Google's keys have as many.
_RSA_BITS: Final = 2048


@dataclass(frozen=True, slots=True)
class Vendor:
    """A push service as the demo uses it: which phones it reaches, and the credential that is put for them."""

    platform: Platform
    kind: str
    # As people call the service, and a phone of its.
    name: str
    model: str
    # Name of the credential's file in the folder `push`.
    file: str
    # Bundle id, project or app id.
    topic: str
    settings: Mapping[str, str] = field(default_factory=dict)


APNS: Final = Vendor(
    Platform.IOS, "apns", "APNs", "iPhone", "apns.p8", APNS_TOPIC, {"key_id": APNS_KEY_ID, "team_id": APNS_TEAM_ID, "topic": APNS_TOPIC}
)
FCM: Final = Vendor(Platform.ANDROID, "fcm", "FCM", "Android", "fcm.json", FCM_PROJECT)
HMS: Final = Vendor(Platform.HUAWEI, "hms", "HMS", "Huawei", "hms.json", HMS_APP_ID)
VENDORS: Final = (APNS, FCM, HMS)


@dataclass(frozen=True, slots=True)
class Accounts:
    """Where the credentials are."""

    folder: Path

    @property
    def apns_public_key(self) -> Path:
        return self.folder / "apns.pem"

    def of(self, vendor: Vendor) -> Path:
        return self.folder / vendor.file


def prepare(folder: Path, fcm_token_url: str) -> Accounts:
    """The accounts in a folder, made where they are missing. `fcm_token_url`: the simulated Google's token endpoint."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    accounts = Accounts(folder)
    p8 = _kept(accounts.of(APNS), _new_p256, _is_p256)
    public = load_pem_private_key(p8, None).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_secret(accounts.apns_public_key, public)
    # Another base port is another token endpoint.
    _kept(accounts.of(FCM), lambda: _new_service_account(fcm_token_url), lambda content: _token_uri(content) == fcm_token_url)
    _kept(accounts.of(HMS), _new_client, lambda content: json.loads(content)["app_id"] == HMS_APP_ID)
    return accounts


def _kept(path: Path, make: Callable[[], bytes], is_good: Callable[[bytes], bool]) -> bytes:
    try:
        content = path.read_bytes()
        if is_good(content):
            return content
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    content = make()
    write_secret(path, content)
    return content


def _pem(private_key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _new_p256() -> bytes:
    return _pem(ec.generate_private_key(ec.SECP256R1()))


def _is_p256(content: bytes) -> bool:
    return isinstance(load_pem_private_key(content, None), ec.EllipticCurvePrivateKey)


def _new_service_account(token_url: str) -> bytes:
    private_key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    account = {
        "type": "service_account",
        "project_id": FCM_PROJECT,
        "private_key_id": randomness.token_hex(20),
        "private_key": _pem(private_key).decode(),
        "client_email": f"pusher@{FCM_PROJECT}.iam.gserviceaccount.com",
        "token_uri": token_url,
    }
    return json.dumps(account, indent=1).encode()


def _token_uri(content: bytes) -> object:
    return json.loads(content)["token_uri"]


def _new_client() -> bytes:
    client = {"app_id": HMS_APP_ID, "client_secret": randomness.token_hex(32)}
    client |= {"receipt_user": "demo-bank", "receipt_key": randomness.token_hex(32)}
    return json.dumps(client, indent=1).encode()
