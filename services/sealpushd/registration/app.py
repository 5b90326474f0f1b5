"""Wires registration."""

from __future__ import annotations

from datetime import timedelta

from sealpush.v1.registration_pb2_grpc import add_RegistrationServicer_to_server
from sealpushd.platform.limits import Limiter, PostgresCounter
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.platform.settings import SettingsError
from sealpushd.registration.codes import code_channel
from sealpushd.registration.outbox import Outbox
from sealpushd.registration.peers import Apps, DeviceLog
from sealpushd.registration.phones import Numbers
from sealpushd.registration.service import DirectoryService, RegistrationService
from sealpushd.registration.store import RegistrationStore
from sealpushd.v1.directory_pb2_grpc import add_DirectoryServicer_to_server


async def build(runtime: Runtime) -> ServiceApp:
    settings, clock = runtime.settings, runtime.clock
    try:
        numbers = Numbers.read_as(settings.default_country, settings.test_numbers)
    except ValueError as e:
        raise SettingsError(f"SEALPUSH_DEFAULT_COUNTRY, SEALPUSH_TEST_NUMBERS: {e}") from e
    db = await runtime.database()
    store = RegistrationStore(db, await runtime.vault(db))
    keys = runtime.channel("keys")
    outbox = Outbox(store, runtime.channel("fetch"), keys, clock)
    codes = code_channel(settings)
    registration = RegistrationService(
        store=store,
        numbers=numbers,
        limiter=Limiter(runtime.valkey(), PostgresCounter(db, clock), settings, clock),
        codes=codes,
        apps=Apps(runtime.channel("accounts"), clock),
        devices=DeviceLog(keys),
        outbox=outbox,
        key=runtime.key,
        clock=clock,
        code_lifetime=timedelta(seconds=settings.code_lifetime_seconds),
    )
    return ServiceApp(
        public=[(add_RegistrationServicer_to_server, registration)],
        mesh=[(add_DirectoryServicer_to_server, DirectoryService(store, numbers, clock))],
        tasks=[outbox.run],
        closes=[codes.aclose],
    )
