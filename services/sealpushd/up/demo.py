"""The demo's organisation, app, senders and push credentials: their keys on disk, their rows through the operators' APIs.

demo/root.key               the platform's root, which apps pin; here beside everything else, in earnest kept offline
demo/<sender>.key           what the sender signs contents with when it seals by itself
demo/<sender>.id            the sender's id
demo/<sender>.entry         what the root certified of it
demo/platform-<key>.entry   what the root certified of the platform's sealing key
demo/password               of the demo organisation's login
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets as randomness
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sealpush.ids import SenderId, uuid7
from sealpush.keys import ContentSigningKey, RootKey, SenderMode
from sealpush.v1 import common_pb2
from sealpushd.certify import certify_platform, certify_sender
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.errors import AlreadyExists
from sealpushd.platform.tls import write_secret
from sealpushd.platform.tokens import ServiceKey
from sealpushd.up.ports import HOST, Ports
from sealpushd.up.secrets import Secrets, load_root
from sealpushd.up.stack import APP_ID
from sealpushd.up.vendors import VENDORS, Vendor
from sealpushd.v1 import administration_pb2 as administration
from sealpushd.v1 import providers_pb2
from sealpushd.v1 import sealing_pb2 as sealing
from sealpushd.v1.administration_pb2_grpc import AdministrationStub
from sealpushd.v1.providers_pb2_grpc import ProvidersStub
from sealpushd.v1.sealing_pb2_grpc import SealingStub

LOGIN: Final = "demo"
BANK: Final = "demo-bank"
SHOP: Final = "demo-shop"
_DISPLAY: Final = {BANK: ("Demo Bank", "#0a7c4a"), SHOP: ("Demo Shop", "#b3261e")}
# From the plan for numbers that are written in examples; registered nowhere but here.
PHONE: Final = "+380501234567"
NOBODYS_PHONE: Final = "+380501234568"
OFFLINE_PHONE: Final = "+380501234569"
_ENTRY_DAYS: Final = 5 * 365


@dataclass(frozen=True, slots=True)
class Demo:
    """What the show needs to know."""

    root_public_key: bytes
    password: str = field(repr=False)
    sender_ids: dict[str, SenderId]
    content_keys: dict[str, ContentSigningKey] = field(repr=False)
    entries: dict[str, bytes] = field(repr=False)


async def set_up(ports: Ports, secrets: Secrets) -> Demo:
    """The demo's organisation, ready to send. Repeating it changes nothing. Raises ServiceError."""
    folder = secrets.folder / "demo"
    root = load_root(folder / "root.key")
    operator = ServiceKey.load("operator", secrets.service_key("operator"))
    accounts = MeshChannel("accounts", f"{HOST}:{ports.of('accounts', 'mesh')}", operator)
    keys = MeshChannel("keys", f"{HOST}:{ports.of('keys', 'mesh')}", operator)
    dispatch = MeshChannel("dispatch", f"{HOST}:{ports.of('dispatch', 'mesh')}", operator)
    try:
        made, _ = await asyncio.gather(
            _set_up(folder, root, AdministrationStub(accounts.channel), SealingStub(keys.channel), accounts, keys),
            asyncio.gather(*(_add_credential(vendor, dispatch) for vendor in VENDORS)),
        )
        return made
    finally:
        await asyncio.gather(accounts.aclose(), keys.aclose(), dispatch.aclose())


async def _add_credential(vendor: Vendor, dispatch: MeshChannel) -> None:
    """What `sealpush providers add --mounted` does. One that somebody put is left alone."""
    request = providers_pb2.PutProviderRequest(
        app_id=APP_ID,
        platform=common_pb2.Platform.ValueType(vendor.platform),
        push_service=vendor.kind,
        settings=vendor.settings,
        secret_file=vendor.file,
    )
    with contextlib.suppress(AlreadyExists):
        await dispatch.call(ProvidersStub(dispatch.channel).PutProvider, request)


async def _set_up(
    folder: Path, root: RootKey, admin: AdministrationStub, sealer: SealingStub, accounts: MeshChannel, keys: MeshChannel
) -> Demo:
    password = _kept(folder / "password", lambda: randomness.token_urlsafe(24).encode()).decode()
    organisation, _, platform = await asyncio.gather(
        accounts.call(admin.PutOrganisation, administration.PutOrganisationRequest(login=LOGIN, password=password, name="Demo")),
        accounts.call(
            admin.PutApp,
            administration.PutAppRequest(app_id=APP_ID, name="Demo Bank", root_public_key=root.public_key),
        ),
        keys.call(sealer.GetPlatformKey, sealing.GetPlatformKeyRequest()),
    )
    platform_entry = _kept(
        folder / f"platform-{platform.public_key.hex()[:16]}.entry",
        lambda: certify_platform(root, platform.public_key, days=_ENTRY_DAYS),
    )
    demo = Demo(root.public_key, password, {}, {}, {})
    puts = [
        accounts.call(
            admin.PutPlatformEntry,
            administration.PutPlatformEntryRequest(platform_entry=platform_entry, root_public_key=root.public_key),
        )
    ]
    for name, (display_name, colour) in _DISPLAY.items():
        sender_id = SenderId(_kept(folder / f"{name}.id", uuid7))
        key = ContentSigningKey.from_seed(_kept(folder / f"{name}.key", lambda: randomness.token_bytes(32)))
        entry = _kept(
            folder / f"{name}.entry",
            functools.partial(
                certify_sender,
                root,
                sender_id,
                display_name,
                SenderMode.SERVER | SenderMode.END_TO_END,
                [key.public_key],
                days=_ENTRY_DAYS,
            ),
        )
        demo.sender_ids[name], demo.content_keys[name], demo.entries[name] = sender_id, key, entry
        puts.append(
            accounts.call(
                admin.PutSender,
                administration.PutSenderRequest(
                    organisation_id=organisation.organisation_id,
                    sender_id=sender_id,
                    name=name,
                    sender_entry=entry,
                    app_ids=[APP_ID],
                    brand_colour=colour,
                    brand_text_colour="#ffffff",
                    is_default=name == BANK,
                ),
            )
        )
    await asyncio.gather(*puts)
    return demo


def _kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file that is made at its first use."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(path, make())
    return path.read_bytes()
