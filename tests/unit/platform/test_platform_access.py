"""The access table against the generated services, and who passes a rule."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import sealpush.v1
import sealpushd.v1
from sealpush.ids import DeviceId, SenderId, SubscriberId
from sealpushd.platform.access import (
    ACCESS,
    SCOPES,
    AnyDevice,
    Anyone,
    Rule,
    SenderWith,
    Services,
    address_allowed,
    admit,
    check,
)
from sealpushd.platform.errors import PermissionDenied, Unauthenticated
from sealpushd.platform.migrate import SERVICES
from sealpushd.platform.tokens import Caller, DeviceCaller, SenderCaller, ServiceCaller, TokenVerifier

# The simulators are no service of the suite: they stand for the outside world and know no tokens.
OUTSIDE = "simulator_pb2"

SENDER = SenderCaller(SenderId(bytes(16)), bytes(16), ("app",), frozenset({"publish"}), ("10.0.0.0/8",))
DEVICE = DeviceCaller(DeviceId(bytes(16)), SubscriberId(bytes(16)), "app", bytes(32))


def generated_methods() -> Iterator[str]:
    for package in (sealpush.v1, sealpushd.v1):
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.endswith("_pb2") or module.name == OUTSIDE:
                continue
            descriptor = importlib.import_module(f"{package.__name__}.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def test_the_table_has_a_rule_for_every_generated_method_and_for_nothing_else() -> None:
    assert set(ACCESS) == set(generated_methods())


def test_the_table_names_only_scopes_and_services_that_exist() -> None:
    for method, rule in ACCESS.items():
        if isinstance(rule, SenderWith):
            assert rule.scope in SCOPES, method
        if isinstance(rule, Services):
            assert rule.names <= {*SERVICES, "operator"}, method


def test_inside_methods_are_for_services_only_and_public_ones_never() -> None:
    for method, rule in ACCESS.items():
        assert isinstance(rule, Services) == method.startswith("/sealpushd."), method


@pytest.mark.parametrize(
    ("rule", "caller", "error"),
    [
        (Anyone(), None, None),
        (AnyDevice(), None, Unauthenticated),
        (AnyDevice(), DEVICE, None),
        (AnyDevice(), SENDER, PermissionDenied),
        (AnyDevice(), ServiceCaller("fetch"), PermissionDenied),
        (SenderWith("publish"), SENDER, None),
        (SenderWith("cancel"), SENDER, PermissionDenied),
        (SenderWith("publish"), DEVICE, PermissionDenied),
        (SenderWith("publish"), None, Unauthenticated),
        (Services(frozenset({"fetch"})), ServiceCaller("fetch"), None),
        (Services(frozenset({"fetch"})), ServiceCaller("keys"), PermissionDenied),
        (Services(frozenset({"fetch"})), DEVICE, PermissionDenied),
        (Services(frozenset({"fetch"})), SENDER, PermissionDenied),
        (Services(frozenset({"fetch"})), None, Unauthenticated),
    ],
)
def test_only_the_kind_of_caller_a_rule_names_passes_it(rule: Rule, caller: Caller | None, error: type[Exception] | None) -> None:
    if error is None:
        check(rule, caller, "10.1.2.3")
    else:
        with pytest.raises(error):
            check(rule, caller, "10.1.2.3")


def test_a_sender_from_outside_its_networks_is_refused() -> None:
    with pytest.raises(PermissionDenied, match="networks"):
        check(SenderWith("publish"), SENDER, "11.0.0.1")


@pytest.mark.parametrize(
    ("address", "networks", "allowed"),
    [
        ("192.0.2.1", (), True),
        ("192.0.2.1", ("192.0.2.0/24",), True),
        ("192.0.3.1", ("192.0.2.0/24", "2001:db8::/32"), False),
        ("2001:db8::7", ("192.0.2.0/24", "2001:db8::/32"), True),
        ("::ffff:192.0.2.1", ("192.0.2.0/24",), True),
        ("::ffff:192.0.3.1", ("192.0.2.0/24",), False),
        ("", ("192.0.2.0/24",), False),
        ("no address", ("0.0.0.0/0",), False),
    ],
)
def test_an_address_is_allowed_if_it_lies_in_a_network(address: str, networks: tuple[str, ...], allowed: bool) -> None:
    assert address_allowed(address, networks) is allowed


@pytest.mark.parametrize("method", ACCESS)
@pytest.mark.parametrize("authorization", ["Bearer nonsense", "bearer ", "Basic dTpw", ""])
def test_a_token_that_is_none_fails_the_calls_that_need_one_and_no_other(method: str, authorization: str) -> None:
    if isinstance(ACCESS[method], Anyone):
        assert admit(ACCESS[method], authorization, "192.0.2.7", TokenVerifier({})) == (None, None)
    else:
        with pytest.raises(Unauthenticated):
            admit(ACCESS[method], authorization, "192.0.2.7", TokenVerifier({}))
