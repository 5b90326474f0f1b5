"""Who may call what: one table for every RPC of the suite. A server refuses to start with a method that has no rule."""

from __future__ import annotations

import ipaddress
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from sealpushd.platform.errors import PermissionDenied, Unauthenticated
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller, TokenVerifier


@dataclass(frozen=True, slots=True)
class Anyone:
    """No token needed: the call proves what it must by itself."""


@dataclass(frozen=True, slots=True)
class AnyDevice:
    """A device with a current token."""


@dataclass(frozen=True, slots=True)
class SenderWith:
    """A sender whose token has the scope, from one of its organisation's networks."""

    scope: str


@dataclass(frozen=True, slots=True)
class Services:
    """These services of the mesh; `operator` is whoever holds the operator's key."""

    names: Set[str]


Rule = Anyone | AnyDevice | SenderWith | Services

OPERATOR: Final = "operator"
SCOPES: Final = frozenset({"publish", "status", "cancel", "keys"})


def _services(*names: str) -> Services:
    return Services(frozenset(names))


ACCESS: Final[dict[str, Rule]] = {
    "/sealpush.v1.Accounts/SignIn": Anyone(),
    "/sealpush.v1.Accounts/GetSenderProfile": Anyone(),
    "/sealpush.v1.Accounts/GetRevocations": Anyone(),
    "/sealpush.v1.Registration/StartRegistration": Anyone(),
    "/sealpush.v1.Registration/ConfirmRegistration": Anyone(),
    "/sealpush.v1.Registration/GetChallenge": Anyone(),
    "/sealpush.v1.Registration/Authenticate": Anyone(),
    "/sealpush.v1.Registration/UpdateInstallation": AnyDevice(),
    "/sealpush.v1.Registration/Unregister": AnyDevice(),
    "/sealpush.v1.Registration/RemoveDevice": AnyDevice(),
    "/sealpush.v1.Registration/ListPreferences": AnyDevice(),
    "/sealpush.v1.Registration/SetPreference": AnyDevice(),
    "/sealpush.v1.Registration/SetRegistrationLock": AnyDevice(),
    "/sealpush.v1.Keys/UploadPrekeys": AnyDevice(),
    "/sealpush.v1.Keys/GetPrekeyState": AnyDevice(),
    "/sealpush.v1.Keys/GetRecipientKeys": SenderWith("keys"),
    "/sealpush.v1.Keys/GetDeviceLog": AnyDevice(),
    "/sealpush.v1.Keys/VouchDevice": AnyDevice(),
    "/sealpush.v1.Publishing/Publish": SenderWith("publish"),
    "/sealpush.v1.Publishing/PublishBatch": SenderWith("publish"),
    "/sealpush.v1.Publishing/PublishStream": SenderWith("publish"),
    "/sealpush.v1.Publishing/GetStatus": SenderWith("status"),
    "/sealpush.v1.Publishing/GetStatuses": SenderWith("status"),
    "/sealpush.v1.Publishing/WatchStatus": SenderWith("status"),
    "/sealpush.v1.Publishing/Cancel": SenderWith("cancel"),
    "/sealpush.v1.Publishing/GetReceipt": SenderWith("status"),
    "/sealpush.v1.Messages/Fetch": AnyDevice(),
    "/sealpush.v1.Messages/Drain": AnyDevice(),
    "/sealpush.v1.Messages/Acknowledge": AnyDevice(),
    "/sealpush.v1.Messages/Stream": AnyDevice(),
    "/sealpushd.v1.Administration/PutOrganisation": _services(OPERATOR),
    "/sealpushd.v1.Administration/PutSender": _services(OPERATOR),
    "/sealpushd.v1.Administration/PutApp": _services(OPERATOR),
    "/sealpushd.v1.Administration/PutPlatformEntry": _services(OPERATOR),
    "/sealpushd.v1.Administration/PutRevocations": _services(OPERATOR),
    "/sealpushd.v1.Administration/GetRevocationList": _services(OPERATOR),
    "/sealpushd.v1.Administration/GetEndingEntries": _services(OPERATOR),
    "/sealpushd.v1.Administration/GetSenders": _services(OPERATOR, "publishing", "keys", "registration", "fetch"),
    "/sealpushd.v1.Administration/FindEntries": _services("publishing"),
    "/sealpushd.v1.Administration/GetApps": _services(OPERATOR, "registration", "dispatch"),
    "/sealpushd.v1.Directory/Resolve": _services("publishing", "keys"),
    "/sealpushd.v1.Directory/GetPushTargets": _services("dispatch"),
    "/sealpushd.v1.Directory/ReportDeadTokens": _services("dispatch"),
    "/sealpushd.v1.Sealing/PutDevices": _services("registration"),
    "/sealpushd.v1.Sealing/RemoveDevices": _services("registration"),
    "/sealpushd.v1.Sealing/GetListedDevices": _services("registration"),
    "/sealpushd.v1.Sealing/Seal": _services("publishing"),
    "/sealpushd.v1.Sealing/CheckStanzas": _services("publishing"),
    "/sealpushd.v1.Sealing/GetIdentities": _services("publishing"),
    "/sealpushd.v1.Sealing/GetPlatformKey": _services(OPERATOR),
    "/sealpushd.v1.Mailbox/LookupAccepted": _services("publishing"),
    "/sealpushd.v1.Mailbox/Store": _services("publishing"),
    "/sealpushd.v1.Mailbox/WakeUpSession": _services("dispatch"),
    "/sealpushd.v1.Mailbox/ReadEvents": _services(OPERATOR, "publishing"),
    "/sealpushd.v1.Mailbox/GetStatuses": _services("publishing"),
    "/sealpushd.v1.Mailbox/GetReceipts": _services("publishing"),
    "/sealpushd.v1.Mailbox/Cancel": _services("publishing"),
    "/sealpushd.v1.Mailbox/Block": _services("registration"),
    "/sealpushd.v1.Mailbox/CloseDevices": _services("registration"),
    "/sealpushd.v1.Mailbox/GetQueues": _services(OPERATOR, "dispatch"),
    "/sealpushd.v1.Mailbox/Requeue": _services(OPERATOR, "dispatch"),
    "/sealpushd.v1.Lanes/ListLanes": _services(OPERATOR),
    "/sealpushd.v1.Lanes/PauseLane": _services(OPERATOR),
    "/sealpushd.v1.Lanes/ResumeLane": _services(OPERATOR),
    "/sealpushd.v1.Lanes/RequeueLane": _services(OPERATOR),
    "/sealpushd.v1.Providers/PutProvider": _services(OPERATOR),
    "/sealpushd.v1.Providers/TestProvider": _services(OPERATOR),
    "/sealpushd.v1.Providers/ListProviders": _services(OPERATOR),
    "/sealpushd.v1.Providers/RemoveProvider": _services(OPERATOR),
}
# Methods of others' protos.
OTHERS: Final[dict[str, Rule]] = {
    # For load balancers and supervisors.
    "/grpc.health.v1.Health/Check": Anyone(),
}


@lru_cache(maxsize=4096)
def address_allowed(address: str, networks: tuple[str, ...]) -> bool:
    """Whether an IP address lies in one of the CIDR networks; an empty list allows every address."""
    if not networks:
        return True
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        # How a listener on all addresses sees a caller over IPv4.
        parsed = parsed.ipv4_mapped
    return any(parsed in ipaddress.ip_network(network) for network in networks)


def admit(rule: Rule, authorization: str, address: str, verifier: TokenVerifier) -> tuple[Caller | None, float | None]:
    """Who makes a call under this rule, by its header `authorization`, and the epoch second at which the token ends. Raises as `check`, and
    Unauthenticated for a token that is not valid.

    Where anyone may call, a token is not looked at: a phone or a sender whose token has ended calls to get another one.
    """
    if isinstance(rule, Anyone):
        return None, None
    caller, ends_at = verifier.verify_until(authorization[7:]) if authorization[:7].lower() == "bearer " else (None, None)
    check(rule, caller, address)
    return caller, ends_at


def check(rule: Rule, caller: Caller | None, address: str) -> None:
    """Raises Unauthenticated without a token where one is needed, PermissionDenied with one that is not enough."""
    match rule, caller:
        case Anyone(), _:
            return
        case _, None:
            raise Unauthenticated("this call needs an access token: metadata `authorization: Bearer <token>`")
        case AnyDevice(), DeviceCaller():
            return
        case SenderWith(scope), SenderCaller(scopes=scopes, networks=networks):
            if scope not in scopes:
                raise PermissionDenied(f"the sender's token lacks the scope {scope!r}")
            if not address_allowed(address, networks):
                raise PermissionDenied(f"the address {address} is not one of the organisation's networks")
            return
        case Services(names), ServiceCaller(name):
            if name in names:
                return
            raise PermissionDenied(f"the service {name} may not make this call")
    raise PermissionDenied("this kind of token may not make this call")
