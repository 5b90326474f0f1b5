"""Wires accounts."""

from __future__ import annotations

from sealpush.v1.accounts_pb2_grpc import add_AccountsServicer_to_server
from sealpushd.accounts.service import AccountsService, AdministrationService, PasswordChecker
from sealpushd.accounts.store import AccountStore
from sealpushd.platform.limits import Limiter, PostgresCounter
from sealpushd.platform.server import Runtime, ServiceApp
from sealpushd.v1.administration_pb2_grpc import add_AdministrationServicer_to_server


async def build(runtime: Runtime) -> ServiceApp:
    db = await runtime.database()
    limiter = Limiter(runtime.valkey(), PostgresCounter(db, runtime.clock), runtime.settings, runtime.clock)
    store = AccountStore(db)
    # One for both: what hashing takes is this process's.
    passwords = PasswordChecker()
    return ServiceApp(
        public=[(add_AccountsServicer_to_server, AccountsService(store, limiter, passwords, runtime.key, runtime.clock))],
        mesh=[(add_AdministrationServicer_to_server, AdministrationService(store, passwords, runtime.clock))],
    )
