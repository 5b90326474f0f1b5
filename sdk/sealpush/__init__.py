"""Sealed push messages: `Device` receives them in an app, `Sender` publishes them.

Names are loaded when first used, so that a program that needs one part (a tool that only opens envelopes, say) does not
pay for gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sealpush.device import (
        Device as Device,
        Diagnosis as Diagnosis,
        Installation as Installation,
        Message as Message,
        MessageStream as MessageStream,
        Preference as Preference,
        RegistrationStarted as RegistrationStarted,
        SealedBy as SealedBy,
    )
    from sealpush.errors import (
        CallFailed as CallFailed,
        KeyRefused as KeyRefused,
        KeystoreError as KeystoreError,
        NotRegisteredHere as NotRegisteredHere,
        SealpushError as SealpushError,
        StreamTakenOver as StreamTakenOver,
        SuiteUnsupported as SuiteUnsupported,
        Unauthenticated as Unauthenticated,
        WrongCode as WrongCode,
    )
    from sealpush.failover import (
        AlternativeChannel as AlternativeChannel,
        ClientMemory as ClientMemory,
        Delivered as Delivered,
        FailoverPolicy as FailoverPolicy,
        FallbackReason as FallbackReason,
        Push as Push,
    )
    from sealpush.keys import ContentSigningKey as ContentSigningKey
    from sealpush.keystore import (
        DeviceRegistration as DeviceRegistration,
        Keystore as Keystore,
        MemoryKeystore as MemoryKeystore,
        SqliteKeystore as SqliteKeystore,
    )
    from sealpush.model import (
        Channel as Channel,
        ContentClass as ContentClass,
        Platform as Platform,
        Priority as Priority,
        PushEnvironment as PushEnvironment,
        Reason as Reason,
        Recipient as Recipient,
        State as State,
        StopPoint as StopPoint,
        StoppedDelivery as StoppedDelivery,
        TrafficType as TrafficType,
    )
    from sealpush.retry import Clock as Clock, RetryPolicy as RetryPolicy, SystemClock as SystemClock
    from sealpush.sender import (
        Accepted as Accepted,
        Attempt as Attempt,
        Cancelled as Cancelled,
        DeliveryStatus as DeliveryStatus,
        MessageStatus as MessageStatus,
        NotRegistered as NotRegistered,
        Publication as Publication,
        PublishOutcome as PublishOutcome,
        Refused as Refused,
        SealedPublication as SealedPublication,
        Sender as Sender,
        Unanswered as Unanswered,
    )
    from sealpush.transport import Channels as Channels, Endpoints as Endpoints
    from sealpush.v1.content_pb2 import Action as Action, Content as Content

_HOMES: Final = {
    "device": "Device Diagnosis Installation Message MessageStream Preference RegistrationStarted SealedBy",
    "errors": "CallFailed KeyRefused KeystoreError NotRegisteredHere SealpushError StreamTakenOver SuiteUnsupported Unauthenticated WrongCode",
    "failover": "AlternativeChannel ClientMemory Delivered FailoverPolicy FallbackReason Push",
    "keys": "ContentSigningKey",
    "keystore": "DeviceRegistration Keystore MemoryKeystore SqliteKeystore",
    "model": "Channel ContentClass Platform Priority PushEnvironment Reason Recipient State StopPoint StoppedDelivery TrafficType",
    "retry": "Clock RetryPolicy SystemClock",
    "sender": "Accepted Attempt Cancelled DeliveryStatus MessageStatus NotRegistered Publication PublishOutcome Refused SealedPublication Sender Unanswered",
    "transport": "Channels Endpoints",
    "v1.content_pb2": "Action Content",
}
_HOME_OF: Final = {name: home for home, listed in _HOMES.items() for name in listed.split()}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
