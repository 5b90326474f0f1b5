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
    from sealpush.devicelog import DeviceNotice, KnownDevice, NoticeKind, fingerprint
    from sealpush.errors import (
        CallFailed,
        EntryRefused,
        KeyRefused,
        KeystoreError,
        NotRegisteredHere,
        ReceiptRefused,
        RegistrationLocked,
        SealpushError,
        StreamTakenOver,
        SuiteUnsupported,
        Unauthenticated,
        WrongCode,
    )
    from sealpush.failover import AlternativeChannel, ClientMemory, Delivered, FailoverPolicy, FallbackReason, HoldBack, Push
    from sealpush.keys import ContentSigningKey
    from sealpush.keystore import DeviceRegistration, Keystore
    from sealpush.memory_keystore import MemoryKeystore
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
    from sealpush.publication import (
        Accepted,
        Attempt,
        Cancelled,
        DeliveryStatus,
        IdentityChanged,
        MessageStatus,
        NotRegistered,
        Publication,
        PublishOutcome,
        RecipientDevices,
        Refused,
        SealedPublication,
        Unanswered,
    )
    from sealpush.receipts import Claim, Finding, Receipt, ReceiptDelivery, ReceiptVerdict, SignedAcknowledgement, verify_receipt
    from sealpush.retry import Clock, RetryPolicy, SystemClock
    from sealpush.sender import Sender
    from sealpush.sqlite_keystore import SqliteKeystore
    from sealpush.suites import SUITE_HYBRID, SUITE_X25519
    from sealpush.transport import Channels, Endpoints
    from sealpush.v1.content_pb2 import Action, Content

__all__ = [
    "SUITE_HYBRID",
    "SUITE_X25519",
    "Accepted",
    "Action",
    "AlternativeChannel",
    "Attempt",
    "CallFailed",
    "Cancelled",
    "Channel",
    "Channels",
    "Claim",
    "ClientMemory",
    "Clock",
    "Content",
    "ContentClass",
    "ContentSigningKey",
    "Delivered",
    "DeliveryStatus",
    "Device",
    "DeviceNotice",
    "DeviceRegistration",
    "Diagnosis",
    "Endpoints",
    "EntryRefused",
    "FailoverPolicy",
    "FallbackReason",
    "Finding",
    "HoldBack",
    "IdentityChanged",
    "Installation",
    "KeyRefused",
    "Keystore",
    "KeystoreError",
    "KnownDevice",
    "MemoryKeystore",
    "Message",
    "MessageStatus",
    "MessageStream",
    "NotRegistered",
    "NotRegisteredHere",
    "NoticeKind",
    "Platform",
    "Preference",
    "Priority",
    "Publication",
    "PublishOutcome",
    "Push",
    "PushEnvironment",
    "Reason",
    "Receipt",
    "ReceiptDelivery",
    "ReceiptRefused",
    "ReceiptVerdict",
    "Recipient",
    "RecipientDevices",
    "Refused",
    "RegistrationEnded",
    "RegistrationLocked",
    "RegistrationStarted",
    "RetryPolicy",
    "SealedBy",
    "SealedPublication",
    "SealpushError",
    "Sender",
    "SenderProfile",
    "SignedAcknowledgement",
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
    "fingerprint",
    "verify_receipt",
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
    "devicelog": (
        "DeviceNotice",
        "KnownDevice",
        "NoticeKind",
        "fingerprint",
    ),
    "errors": (
        "CallFailed",
        "EntryRefused",
        "KeyRefused",
        "KeystoreError",
        "NotRegisteredHere",
        "ReceiptRefused",
        "RegistrationEnded",
        "RegistrationLocked",
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
        "HoldBack",
        "Push",
    ),
    "keys": ("ContentSigningKey",),
    "keystore": (
        "DeviceRegistration",
        "Keystore",
    ),
    "memory_keystore": ("MemoryKeystore",),
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
    "publication": (
        "Accepted",
        "Attempt",
        "Cancelled",
        "DeliveryStatus",
        "IdentityChanged",
        "MessageStatus",
        "NotRegistered",
        "Publication",
        "PublishOutcome",
        "RecipientDevices",
        "Refused",
        "SealedPublication",
        "Unanswered",
    ),
    "receipts": (
        "Claim",
        "Finding",
        "Receipt",
        "ReceiptDelivery",
        "ReceiptVerdict",
        "SignedAcknowledgement",
        "verify_receipt",
    ),
    "retry": (
        "Clock",
        "RetryPolicy",
        "SystemClock",
    ),
    "sender": ("Sender",),
    "sqlite_keystore": ("SqliteKeystore",),
    "suites": (
        "SUITE_HYBRID",
        "SUITE_X25519",
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
