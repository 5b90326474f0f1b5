"""sealpush.transport, sealpush.model and the package's front: addresses, errors off the wire, open enumerations."""

import json
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
from sealpush.model import Recipient, State, moment
from sealpush.retry import Deadline, SystemClock
from sealpush.transport import Channels, Endpoints, Token, TokenHolder, call_failed
from sealpush.v1 import common_pb2


def rpc_error(code: grpc.StatusCode, details: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if details is None else grpc.aio.Metadata(("grpc-status-details-bin", details))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, "what happened")


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
