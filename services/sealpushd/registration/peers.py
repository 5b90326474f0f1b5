"""The other services as registration sees them: apps from accounts, the device log of keys."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sealpush.ids import AppId, DeviceId, SubscriberId
from sealpush.keys import SignedPrekey
from sealpush.wire import wire_prekey
from sealpushd.platform.clients import BatchedCall, MeshChannel
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import Unavailable
from sealpushd.registration.rules import Listed
from sealpushd.v1 import administration_pb2, administration_pb2_grpc, sealing_pb2, sealing_pb2_grpc

# Apps change a few times a year; a new one is there at the latest after the second time.
KNOWN_FOR: Final = timedelta(seconds=60)
UNKNOWN_FOR: Final = timedelta(seconds=5)
# Bounds what made-up app ids can fill.
APPS_CACHED_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class App:
    app_id: AppId
    name: str


class Apps:
    """Apps by id, remembered. While accounts is away, what was known stays known."""

    def __init__(self, accounts: MeshChannel, clock: Clock) -> None:
        stub = administration_pb2_grpc.AdministrationStub(accounts.channel)
        self._clock = clock
        # Until when, by the steady clock.
        self._cache: dict[AppId, tuple[App | None, float]] = {}
        self._accounts = accounts
        self._get_apps = stub.GetApps

    async def get(self, app_id: AppId) -> App | None:
        """Raises Unavailable when accounts is away and the app was never seen."""
        now = self._clock.monotonic()
        app, until = self._cache.get(app_id, (None, now))
        if now < until:
            return app
        try:
            request = administration_pb2.GetAppsRequest(app_ids=[app_id])
            response: administration_pb2.GetAppsResponse = await self._accounts.call(self._get_apps, request)
        except Unavailable:
            if app is None:
                raise
            return app
        found = [App(AppId(one.app_id), one.name) for one in response.apps]
        app = found[0] if found else None
        if len(self._cache) >= APPS_CACHED_MAX and app_id not in self._cache:
            del self._cache[next(iter(self._cache))]
        self._cache[app_id] = app, now + (UNKNOWN_FOR if app is None else KNOWN_FOR).total_seconds()
        return app


@dataclass(frozen=True, slots=True)
class LoggedDevice:
    """A device to be entered into its subscriber's log."""

    subscriber_id: SubscriberId
    device_id: DeviceId
    identity_public_key: bytes
    signed_prekey: SignedPrekey
    min_suite: int


class DeviceLog:
    """The device log that keys holds."""

    def __init__(self, keys: MeshChannel) -> None:
        stub = sealing_pb2_grpc.SealingStub(keys.channel)
        self._keys = keys
        self._get_listed = stub.GetListedDevices
        self._put: BatchedCall[LoggedDevice, str] = BatchedCall(
            keys,
            stub.PutDevices,
            lambda devices: sealing_pb2.PutDevicesRequest(devices=map(_new_device, devices)),
            lambda response: response.refusals,
        )

    async def put(self, device: LoggedDevice) -> str:
        """Empty: entered. Else why not. Idempotent; a device that stands in another subscriber's log moves."""
        return await self._put.submit(device)

    async def listed(self, *device_ids: DeviceId) -> dict[DeviceId, Listed]:
        """Those that are in a list now. Raises Unavailable when keys is away."""
        request = sealing_pb2.GetListedDevicesRequest(device_ids=device_ids)
        response: sealing_pb2.GetListedDevicesResponse = await self._keys.call(self._get_listed, request)
        return {DeviceId(one.device_id): Listed(SubscriberId(one.subscriber_id), one.vouched) for one in response.devices}


def _new_device(device: LoggedDevice) -> sealing_pb2.NewDevice:
    return sealing_pb2.NewDevice(
        subscriber_id=device.subscriber_id,
        device_id=device.device_id,
        identity_public_key=device.identity_public_key,
        signed_prekey=wire_prekey(device.signed_prekey),
        min_suite=device.min_suite,
    )
