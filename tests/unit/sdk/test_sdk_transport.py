"""sealpush.transport, sealpush.model and the package's front: addresses, errors off the wire, open enumerations."""

import json
import random
import subprocess
import sys
from typing import cast

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

import sealpush
from sealpush import errors, model
from sealpush.doubt import Said, said_by_batch_failure, said_by_failure
from sealpush.model import Recipient, State, moment
from sealpush.retry import Deadline, RetryPolicy, SystemClock
from sealpush.transport import Calls, Channels, Endpoints, Token, TokenHolder, call_failed
from sealpush.v1 import accounts_pb2, common_pb2, keys_pb2, messages_pb2, publish_pb2, registration_pb2


def rpc_error(code: grpc.StatusCode, details: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if details is None else grpc.aio.Metadata(("grpc-status-details-bin", details))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, "what happened")


def refusal(reason: str) -> grpc.aio.AioRpcError:
    info, pause = AnyMessage(), AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="sealpush"))
    pause.Pack(error_details_pb2.RetryInfo())
    return rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, status_pb2.Status(details=[info, pause]).SerializeToString())


class Refusing:
    """A method that refuses every attempt for one reason."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.error = error
        self.sent = 0

    async def __call__(self, request: object, /, *, timeout: float | None = None, metadata: object = None) -> common_pb2.Recipient:
        self.sent += 1
        raise self.error


async def failures(calls: Calls, method: Refusing, attempts: int) -> list[errors.CallFailed]:
    found = []
    for _ in range(attempts):
        with pytest.raises(errors.CallFailed) as caught:
            await calls.once(method, publish_pb2.PublishRequest(), deadline=Deadline.after(calls.clock, 10))
        found.append(caught.value)
    return found


async def test_a_service_that_refuses_everything_is_spared_most_attempts_and_they_say_so() -> None:
    calls = Calls(SystemClock(), random.Random(1).random, RetryPolicy())  # noqa: S311 - dice of a test
    method = Refusing(refusal("OVERLOADED"))
    found = await failures(calls, method, 500)
    assert 8 <= method.sent < 150
    for failure in found:
        assert isinstance(failure, errors.Overloaded)
        assert (failure.code, failure.server_reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        # This attempt is not stored, and about those before it nothing is said.
        assert said_by_failure(failure) is said_by_batch_failure(failure) is Said.ATTEMPT
    held_back = [each for each in found if "not sent" in str(each)]
    assert len(held_back) == 500 - method.sent
    assert all(each.retry_after_s is not None and 1 <= each.retry_after_s < 2 for each in held_back)


async def test_only_the_overloaded_service_is_spared() -> None:
    calls = Calls(SystemClock(), lambda: 0.0, RetryPolicy())
    await failures(calls, Refusing(refusal("OVERLOADED")), 20)

    async def answers(request: object, /, *, timeout: float | None = None, metadata: object = None) -> str:
        return "answer"

    assert await calls.once(answers, keys_pb2.GetRecipientKeysRequest(), deadline=Deadline.after(calls.clock, 10)) == "answer"


@pytest.mark.parametrize("error", [refusal("LIMIT_EXCEEDED"), rpc_error(grpc.StatusCode.UNAVAILABLE), rpc_error(grpc.StatusCode.NOT_FOUND)])
async def test_what_is_no_overload_holds_nothing_back(error: grpc.aio.AioRpcError) -> None:
    calls = Calls(SystemClock(), lambda: 0.0, RetryPolicy())
    method = Refusing(error)
    await failures(calls, method, 100)
    assert method.sent == 100


def test_the_requests_of_a_service_stand_in_its_own_file() -> None:
    """By which the SDK knows what a request is to."""
    files = [each.DESCRIPTOR for each in (accounts_pb2, keys_pb2, messages_pb2, publish_pb2, registration_pb2)]
    assert {
        (file.name, method.input_type.file.name)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    } == {(file.name, file.name) for file in files}


def test_endpoints_are_read_from_json() -> None:
    text = json.dumps({"gateway": "g:443", "keys": "k:1", "ca_pem": "PEM", "later": 5, "insecure": True})
    assert Endpoints.parse(text) == Endpoints("g:443", "g:443", "k:1", "g:443", "g:443", b"PEM")
    assert Endpoints.single("g:443") == Endpoints("g:443", "g:443", "g:443", "g:443", "g:443")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gateway": 5}', '{"gateway": "a:1", "ca_pem": 3}', '{"keys": "a:1"}'])
def test_endpoints_that_lack_something_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="endpoints"):
        Endpoints.parse(text)


async def test_equal_addresses_share_a_connection_and_closed_ones_say_so() -> None:
    channels = Channels(Endpoints.single("127.0.0.1:1", insecure=True))
    assert channels.keys is channels.keys
    assert channels.messages is not None
    assert len(channels._channels) == 1
    await channels.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = channels.keys


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_code_has_an_error(code: grpc.StatusCode) -> None:
    failure = call_failed(rpc_error(code))
    assert failure.code == code.name
    assert failure.retryable == (code.name in {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})


@given(st.binary(max_size=200))
def test_details_that_make_no_sense_are_left_out(details: bytes) -> None:
    assert isinstance(call_failed(rpc_error(grpc.StatusCode.NOT_FOUND, details)), errors.NotFound)


def test_details_of_another_domain_say_nothing() -> None:
    info = AnyMessage()
    info.Pack(error_details_pb2.ErrorInfo(reason="X", domain="elsewhere", metadata={"attempts_left": "1"}))
    status = status_pb2.Status(details=[info]).SerializeToString()
    failure = call_failed(rpc_error(grpc.StatusCode.INVALID_ARGUMENT, status))
    assert type(failure) is errors.InvalidRequest
    assert failure.server_reason == ""


async def test_a_token_whose_life_looks_spent_is_tried_all_the_same() -> None:
    got: list[int] = []

    async def obtain(deadline: Deadline) -> Token:
        got.append(1)
        return Token("token", -3600)

    clock = SystemClock()
    holder = TokenHolder(obtain, clock)
    assert not holder.held
    for _ in range(3):
        assert await holder.get(Deadline.after(clock, 1)) == "token"
    assert len(got) == 1
    holder.drop("another")
    assert holder.held
    holder.drop("token")
    assert not holder.held
    assert "token" not in repr(Token("token", 1))[6:]


@pytest.mark.parametrize(
    ("ours", "wire"),
    [
        (model.State, common_pb2.State),
        (model.Reason, common_pb2.ReasonCode),
        (model.ContentClass, common_pb2.ContentClass),
        (model.Priority, common_pb2.Priority),
        (model.TrafficType, common_pb2.TrafficType),
        (model.Channel, common_pb2.Channel),
        (model.Platform, common_pb2.Platform),
        (model.PushEnvironment, common_pb2.PushEnvironment),
        (model.StopPoint, common_pb2.StopPoint),
    ],
)
def test_words_are_those_of_the_protocol(ours: type[model.OpenEnum], wire: type[common_pb2.State]) -> None:
    """A name is the protocol's without the prefix, and the numbers agree."""
    names = {number: name for name, number in wire.items()}
    assert {each.value for each in ours} == set(names)
    assert all(names[common_pb2.State.ValueType(each.value)].endswith(f"_{each.name}") for each in ours)


def test_a_number_that_is_not_known_is_kept() -> None:
    state = State(77)
    assert (state, state.name, state.terminal) == (77, "UNKNOWN_77", False)
    with pytest.raises(ValueError, match="x"):
        State(cast(int, "x"))


def test_a_recipient_is_one_thing_and_not_in_a_repr() -> None:
    assert Recipient.of("+380501234567").to_wire().phone == "+380501234567"
    assert Recipient(external_user_id="u").to_wire().external_user_id == "u"
    assert "+380" not in repr(Recipient.of("+380501234567"))
    for wrong in ({}, {"phone": "1", "rnokpp": "2"}):
        with pytest.raises(ValueError, match="exactly one"):
            Recipient(**wrong)


@given(st.integers(-(1 << 63), 1 << 63))
def test_any_time_is_a_moment(unix_ms: int) -> None:
    assert moment(unix_ms).tzinfo is not None


def test_the_front_offers_what_it_lists() -> None:
    assert sealpush.Device.__name__ == "Device"
    assert set(sealpush.__all__) <= set(dir(sealpush))
    assert all(getattr(sealpush, name) is not None for name in sealpush.__all__)
    with pytest.raises(AttributeError):
        _ = sealpush.nothing


def test_opening_envelopes_does_not_load_grpc_and_the_sdk_never_loads_the_server() -> None:
    code = (
        "import sys, sealpush.envelope; assert 'grpc' not in sys.modules; import sealpush; "
        "[getattr(sealpush, name) for name in sealpush.__all__]; assert not [m for m in sys.modules if m.startswith('sealpushd')]"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
