"""Wires the service keys."""

from __future__ import annotations

from pathlib import Path

from sealpush.keys import ContentSigningKey
from sealpush.v1 import keys_pb2_grpc
from sealpushd.keys.service import KeysService, SealingService
from sealpushd.keys.store import KeyStore
from sealpushd.platform.clients import BatchedCall
from sealpushd.platform.limits import ONE_TIME_PREKEYS_PER_SENDER
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.platform.settings import SettingsError
from sealpushd.v1 import directory_pb2, directory_pb2_grpc, sealing_pb2_grpc


def load_platform_key(path: Path) -> ContentSigningKey:
    """The platform's sealing key in a file of 32 bytes as hex; raises SettingsError that names the file."""
    try:
        return ContentSigningKey.from_seed(bytes.fromhex(path.read_text().strip()))
    except (OSError, ValueError) as e:
        # Never the content: what is in a file that was named by mistake may be another secret.
        raise SettingsError(f"{path} holds no platform key (64 hex digits); set SEALPUSH_PLATFORM_KEY to the file that does") from e


async def build(runtime: Runtime) -> ServiceApp:
    """The service, wired. Raises SettingsError, SchemaError, StoreUnavailable, VaultError."""
    runtime.settings.need("platform_key")
    assert runtime.settings.platform_key is not None  # noqa: S101 - need() has just made sure
    platform_key = load_platform_key(runtime.settings.platform_key)
    db = await runtime.database()
    vault = await runtime.vault(db)
    store = KeyStore(db, ONE_TIME_PREKEYS_PER_SENDER.allowed(runtime.settings))
    registration = runtime.channel("registration")
    directory = directory_pb2_grpc.DirectoryStub(registration.channel)
    resolve: BatchedCall[directory_pb2.ResolveQuery, directory_pb2.ResolveResult] = BatchedCall(
        registration,
        directory.Resolve,
        lambda queries: directory_pb2.ResolveRequest(queries=queries),
        lambda response: response.results,
    )
    keys = KeysService(store, resolve, vault, runtime.clock)
    sealing = SealingService(store, platform_key, vault, runtime.clock)
    return ServiceApp(
        public=[(keys_pb2_grpc.add_KeysServicer_to_server, keys)],
        mesh=[(sealing_pb2_grpc.add_SealingServicer_to_server, sealing)],
        closes=[resolve.aclose],
    )
