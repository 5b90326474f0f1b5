"""Words that devices and senders share: states, reasons, classes, recipients. No protobuf, no I/O.

Enumerations are open: a number that this release does not know becomes a member named `UNKNOWN_<number>`, equal to its number.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final, Self

from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import DeviceId, MessageId
from sealpush.v1 import common_pb2


class OpenEnum(IntEnum):
    """An enumeration of the protocol that may know more members tomorrow."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int):
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN_{value}"
        member._value_ = value
        return member


class State(OpenEnum):
    """How far a delivery or a whole message has come."""

    UNSPECIFIED = 0
    QUEUED = 1
    PUSHED = 2
    FETCHED = 3
    DELIVERED = 4
    UNDELIVERED = 5
    BLOCKED = 6
    EXPIRED = 7
    CANCELLED = 8
    REPLACED = 9
    NOT_REGISTERED = 10

    @property
    def terminal(self) -> bool:
        """Whether it never changes again."""
        return self.DELIVERED <= self <= self.NOT_REGISTERED


class Reason(OpenEnum):
    """Why a state is not a success; 0 is none. Up to 31 shared by all channels, from 100 on Sealpush's own."""

    UNSPECIFIED = 0
    UNKNOWN = 1
    ABSENT_SUBSCRIBER = 2
    CALL_BARRED = 3
    FAILURE = 4
    MEMORY_CAPACITY_EXCEEDED = 5
    TELESERVICE_NOT_PROVISIONED = 6
    TIMEOUT = 7
    UNKNOWN_SUBSCRIBER = 8
    DUPLICATED = 9
    FILTERED = 10
    UNROUTED = 11
    OPERATOR_BLACKLISTED = 12
    OPERATOR_INVALID_SOURCE = 13
    OPERATOR_SPAM_FILTERED = 14
    VERIFICATION = 15
    BUSY = 16
    BAD_PARAMETERS = 18
    CONSUMER_ID_NOT_FOUND = 19
    CONSUMER_PHONE_NOT_FOUND = 20
    NO_PRIMARY_DEVICES = 21
    NO_ACTIVE_INSTALLATIONS = 22
    PUSH_DISABLED = 23
    PUSH_OS_DISABLED = 24
    SUBSCRIPTION_FAILED = 25
    NO_APPLICATION = 26
    BELOW_MINIMUM_VERSION = 27
    PROVIDER_ERROR = 28
    UNROUTED_ACCOUNT = 29
    UNKNOWN_LAYOUT = 30
    PLATFORM_NOT_FOUND = 31
    SENDER_BLOCKED = 100
    ADVERTISING_BLOCKED = 101
    LIFETIME_OVER = 102
    CANCELLED_BY_SENDER = 103
    REPLACED_BY_NEWER = 104
    TOKEN_GONE = 105
    UNREGISTERED = 106
    NUMBER_REBOUND = 107
    DEVICE_CANNOT_OPEN = 108
    NO_PREKEY = 109
    PUSH_QUARANTINED = 110
    NO_PUSH_TOKEN = 111
    NO_LANE = 112


class ContentClass(OpenEnum):
    """Decides which block of the recipient applies."""

    UNSPECIFIED = 0
    INFORMATIONAL = 1
    ADVERTISING = 2


class Priority(OpenEnum):
    """Order in the queues, and the priority towards the push service."""

    UNSPECIFIED = 0
    LOW = 1
    NORMAL = 2
    HIGH = 3


class TrafficType(OpenEnum):
    """Commercial kind of the traffic."""

    UNSPECIFIED = 0
    ADVERTISING = 1
    TRANSACTIONAL = 2
    SERVICE = 3
    INFORMATIONAL = 4
    AUTHORIZATION = 5
    TEMPLATED_ADVERTISING = 6


class Channel(OpenEnum):
    """How a leg of an order reaches the person."""

    UNSPECIFIED = 0
    PUSH = 1
    SMS = 2
    VIBER = 3
    WHATSAPP = 4
    VK = 5
    TELEGRAM = 6
    MAX = 7
    FLASHING_CALL = 8
    VOICE = 9


class Platform(OpenEnum):
    """Operating system family, which decides the push service."""

    UNSPECIFIED = 0
    IOS = 1
    ANDROID = 2
    HUAWEI = 3
    RUSTORE = 4
    WEB = 5


class PushEnvironment(OpenEnum):
    """Which of a vendor's environments issued a push token."""

    UNSPECIFIED = 0
    PRODUCTION = 1
    SANDBOX = 2


class StopPoint(OpenEnum):
    """Whether a push can have left when a message was cancelled or its sender blocked."""

    UNSPECIFIED = 0
    BEFORE_PUSH = 1
    PUSH_MAY_HAVE_LEFT = 2
    TOO_LATE = 3


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom a message is for; exactly one of the three is set. A repr shows which, not whom."""

    phone: str = field(default="", repr=False)
    rnokpp: str = field(default="", repr=False)
    external_user_id: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.phone, self.rnokpp, self.external_user_id))) != 1:
            raise ValueError("a recipient is named by exactly one of phone, rnokpp and external_user_id")

    @classmethod
    def of(cls, recipient: "Recipient | str") -> "Recipient":
        """The recipient itself, or the one with this phone number."""
        return recipient if isinstance(recipient, Recipient) else cls(phone=recipient)

    def to_wire(self) -> common_pb2.Recipient:
        """As protobuf."""
        if self.phone:
            return common_pb2.Recipient(phone=self.phone)
        if self.rnokpp:
            return common_pb2.Recipient(rnokpp=self.rnokpp)
        return common_pb2.Recipient(external_user_id=self.external_user_id)


@dataclass(frozen=True, slots=True)
class StoppedDelivery:
    """What happened to one delivery of a message that was cancelled or whose sender was blocked."""

    message_id: MessageId
    device_id: DeviceId
    stop_point: StopPoint
    state: State

    @classmethod
    def from_wire(cls, stopped: common_pb2.StoppedDelivery) -> Self:
        """Of protobuf."""
        return cls(MessageId(stopped.message_id), DeviceId(stopped.device_id), StopPoint(stopped.stop_point), State(stopped.state))


_UNIX_MS_MAX: Final = 253_402_300_799_999  # the end of the year 9999, the last that datetime and Timestamp know


def moment(unix_ms: int) -> datetime:
    """Unix milliseconds as an aware datetime in UTC; what lies beyond the year 9999 is that year's end."""
    return datetime.fromtimestamp(max(0, min(unix_ms, _UNIX_MS_MAX)) / 1000, UTC)


def timestamp_ms(timestamp: Timestamp) -> int:
    """A protobuf time as Unix milliseconds."""
    return timestamp.seconds * 1000 + timestamp.nanos // 1_000_000


def wire_time(timestamp: Timestamp) -> datetime:
    """A protobuf time as an aware datetime in UTC."""
    return moment(timestamp_ms(timestamp))
