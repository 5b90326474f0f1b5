"""Sealed push messages: `Device` receives them in an app, `Sender` publishes them.

Names are loaded when first used, so that a program that needs one part (a tool that only opens envelopes, say) does not
pay for gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sealpush.device import (
        Device,
        Diagnosis,
        Installation,
        Message,
        MessageStream,
        Preference,
        RegistrationStarted,
        SealedBy,
        SenderProfile,
    )
    from sealpush.errors import (
        CallFailed,
        KeyRefused,
        KeystoreError,
        NotRegisteredHere,
        SealpushError,
        StreamTakenOver,
        SuiteUnsupported,
        Unauthenticated,
        WrongCode,
    )
    from sealpush.failover import AlternativeChannel, ClientMemory, Delivered, FailoverPolicy, FallbackReason, Push
    from sealpush.keys import ContentSigningKey
    from sealpush.keystore import DeviceRegistration, Keystore, MemoryKeystore, SqliteKeystore
    from sealpush.model import (
        Channel,
        ContentClass,
        Platform,
        Priority,
        PushEnvironment,
        Reason,
        Recipient,
        State,
        StoppedDelivery,
        StopPoint,
        TrafficType,
    )
    from sealpush.retry import Clock, RetryPolicy, SystemClock
    from sealpush.sender import (
        Accepted,
        Attempt,
        Cancelled,
        DeliveryStatus,
        MessageStatus,
        NotRegistered,
        Publication,
        PublishOutcome,
        Refused,
        SealedPublication,
        Sender,
        Unanswered,
    )
    from sealpush.transport import Channels, Endpoints
    from sealpush.v1.content_pb2 import Action, Content

__all__ = [
    "Accepted",
    "Action",
    "AlternativeChannel",
    "Attempt",
    "CallFailed",
    "Cancelled",
    "Channel",
    "Channels",
    "ClientMemory",
    "Clock",
    "Content",
    "ContentClass",
    "ContentSigningKey",
    "Delivered",
    "DeliveryStatus",
    "Device",
    "DeviceRegistration",
    "Diagnosis",
    "Endpoints",
    "FailoverPolicy",
    "FallbackReason",
    "Installation",
    "KeyRefused",
    "Keystore",
    "KeystoreError",
    "MemoryKeystore",
    "Message",
    "MessageStatus",
    "MessageStream",
    "NotRegistered",
    "NotRegisteredHere",
    "Platform",
    "Preference",
    "Priority",
    "Publication",
    "PublishOutcome",
    "Push",
    "PushEnvironment",
    "Reason",
    "Recipient",
    "Refused",
    "RegistrationStarted",
    "RetryPolicy",
    "SealedBy",
    "SealedPublication",
    "SealpushError",
    "Sender",
    "SenderProfile",
    "SqliteKeystore",
    "State",
    "StopPoint",
    "StoppedDelivery",
    "StreamTakenOver",
    "SuiteUnsupported",
    "SystemClock",
    "TrafficType",
    "Unanswered",
    "Unauthenticated",
    "WrongCode",
]

_HOMES: Final = {
    "device": (
        "Device",
        "Diagnosis",
        "Installation",
        "Message",
        "MessageStream",
        "Preference",
        "RegistrationStarted",
        "SealedBy",
        "SenderProfile",
    ),
    "errors": (
        "CallFailed",
        "KeyRefused",
        "KeystoreError",
        "NotRegisteredHere",
        "SealpushError",
        "StreamTakenOver",
        "SuiteUnsupported",
        "Unauthenticated",
        "WrongCode",
    ),
    "failover": (
        "AlternativeChannel",
        "ClientMemory",
        "Delivered",
        "FailoverPolicy",
        "FallbackReason",
        "Push",
    ),
    "keys": ("ContentSigningKey",),
    "keystore": (
        "DeviceRegistration",
        "Keystore",
        "MemoryKeystore",
        "SqliteKeystore",
    ),
    "model": (
        "Channel",
        "ContentClass",
        "Platform",
        "Priority",
        "PushEnvironment",
        "Reason",
        "Recipient",
        "State",
        "StopPoint",
        "StoppedDelivery",
        "TrafficType",
    ),
    "retry": (
        "Clock",
        "RetryPolicy",
        "SystemClock",
    ),
    "sender": (
        "Accepted",
        "Attempt",
        "Cancelled",
        "DeliveryStatus",
        "MessageStatus",
        "NotRegistered",
        "Publication",
        "PublishOutcome",
        "Refused",
        "SealedPublication",
        "Sender",
        "Unanswered",
    ),
    "transport": (
        "Channels",
        "Endpoints",
    ),
    "v1.content_pb2": (
        "Action",
        "Content",
    ),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
