"""How one-time codes reach people. One shape for every channel; the settings choose."""

from __future__ import annotations

import secrets
from typing import Final, Protocol

import grpc

from sealpushd.platform.clients import NO_PROXY
from sealpushd.platform.errors import FailedPrecondition, Unavailable
from sealpushd.platform.settings import Settings
from sealpushd.registration.phones import PhoneNumber
from sealpushd.v1 import simulator_pb2, simulator_pb2_grpc

CODE_LENGTH: Final = 6
# Longer than a gateway needs, well within the caller's own deadline.
SEND_TIMEOUT_S: Final = 5.0
SENDER_NAME: Final = "Sealpush"

# What a gateway answers that took nothing, or that nobody reached.
_NOTHING_SENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)

_TEXTS: Final = {
    "en": "{app}: {code} is your code. Tell it to nobody.",
    "ru": "{app}: {code} — ваш код. Никому его не сообщайте.",
    "uk": "{app}: {code} — ваш код. Нікому його не повідомляйте.",
}


class Code:
    """A one-time code. Never prints itself."""

    __slots__ = ("digits",)

    def __init__(self, digits: str) -> None:
        self.digits = digits

    def __repr__(self) -> str:
        return "Code(…)"

    @classmethod
    def fresh(cls) -> Code:
        return cls(f"{secrets.randbelow(10**CODE_LENGTH):0{CODE_LENGTH}d}")

    def text(self, app_name: str, locale: str) -> str:
        """What the person reads, in the language of a BCP 47 tag as far as it is spoken here."""
        language = locale.partition("-")[0].lower()
        return _TEXTS.get(language, _TEXTS["en"]).format(app=app_name, code=self.digits)


class CodeUnconfirmed(Unavailable):
    """The gateway did not say whether it sent the code."""


class CodeChannel(Protocol):
    """Something that brings a text to a number."""

    async def send(self, phone: PhoneNumber, text: str) -> None:
        """Returns when the channel took it. Raises CodeUnconfirmed (it may be on its way), and where nothing was sent Unavailable, or
        FailedPrecondition (set up first)."""
        ...

    async def aclose(self) -> None: ...


class NoCodeChannel:
    """Refuses: an installation must choose how codes reach people."""

    async def send(self, phone: PhoneNumber, text: str) -> None:
        raise FailedPrecondition("no channel for one-time codes is configured: set SEALPUSH_CODE_CHANNEL")

    async def aclose(self) -> None:
        pass


class SimulatedSms:
    """Hands codes to the simulated SMS inbox, by its gRPC interface."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[NO_PROXY])
        self._stub = simulator_pb2_grpc.SimulatedSmsStub(self._channel)

    async def send(self, phone: PhoneNumber, text: str) -> None:
        request = simulator_pb2.DeliverRequest(phone=phone.e164, text=text, sender_name=SENDER_NAME)
        try:
            await self._stub.Deliver(request, timeout=SEND_TIMEOUT_S)
        except grpc.aio.AioRpcError as e:
            kind = Unavailable if e.code() in _NOTHING_SENT else CodeUnconfirmed
            # Not the message: a gateway's may repeat number or text.
            raise kind(f"the code could not be sent ({e.code().name}); ask for another in a moment") from None

    async def aclose(self) -> None:
        await self._channel.close()


def code_channel(settings: Settings) -> CodeChannel:
    if settings.code_channel == "simulated":
        return SimulatedSms(settings.code_channel_address)
    return NoCodeChannel()
