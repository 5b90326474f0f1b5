"""Decisions of the mailbox, against an oracle written from the delivery semantics."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpush.ids import DeviceId, MessageId
from sealpush.model import Reason, State, StopPoint
from sealpush.proofs import AckOutcome
from sealpush.v1 import common_pb2, messages_pb2
from sealpushd.fetch import rules
from sealpushd.fetch.rules import AckAnswer, NewDelivery, Position, Verdict
from sealpushd.fetch.streams import UNACKNOWLEDGED_MAX, WAITING_MAX, LiveStream
from sealpushd.fetch.wire import parse_report
from sealpushd.platform.errors import Aborted, InvalidRequest
from sealpushd.v1 import mailbox_pb2

TERMINAL = {State.DELIVERED, State.UNDELIVERED, State.BLOCKED, State.EXPIRED, State.CANCELLED, State.REPLACED}
DELIVERIES = st.lists(
    st.tuples(st.sampled_from(sorted(set(State) - {State.UNSPECIFIED, State.NOT_REGISTERED})), st.sampled_from([0, 2, 28, 105, 109])),
    min_size=1,
    max_size=8,
)


def oracle(states: set[State]) -> State:
    """Any DELIVERED wins; else, when all are terminal, BLOCKED > UNDELIVERED > EXPIRED > REPLACED > CANCELLED; else the most advanced."""
    if State.DELIVERED in states:
        return State.DELIVERED
    if states <= TERMINAL:
        ranks = {State.BLOCKED: 0, State.UNDELIVERED: 1, State.EXPIRED: 2, State.REPLACED: 3, State.CANCELLED: 4}
        return min(states, key=lambda state: ranks[state])
    return max(states - TERMINAL)


@given(DELIVERIES)
def test_the_state_of_a_message_is_that_of_the_oracle(deliveries: list[tuple[State, int]]) -> None:
    state, reason = rules.message_state(deliveries)
    assert state is oracle({each for each, _ in deliveries})
    if state is State.DELIVERED:
        assert reason == 0
    else:
        assert (state, reason) in deliveries


@given(DELIVERIES, st.randoms())
def test_the_order_of_the_deliveries_does_not_change_the_state(deliveries: list[tuple[State, int]], random: object) -> None:
    shuffled = list(deliveries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' random has no public type
    assert rules.message_state(shuffled)[0] is rules.message_state(deliveries)[0]


def test_a_message_without_deliveries_has_no_state() -> None:
    with pytest.raises(ValueError, match="at least one"):
        rules.message_state([])


def test_terminal_states_are_those_of_the_semantics_and_lead_nowhere() -> None:
    of_deliveries = set(State) - {State.UNSPECIFIED, State.NOT_REGISTERED}
    assert {state for state in of_deliveries if state.terminal} == TERMINAL
    assert set(rules.LEGAL) == of_deliveries - TERMINAL


def test_the_legal_changes_are_those_of_the_semantics() -> None:
    any_open = {State.EXPIRED, State.CANCELLED, State.REPLACED}
    assert rules.LEGAL[State.QUEUED] == any_open | {State.PUSHED, State.FETCHED, State.UNDELIVERED, State.BLOCKED}
    # A block also ends what was pushed, with the answer that a push may have left.
    assert rules.LEGAL[State.PUSHED] == any_open | {State.QUEUED, State.FETCHED, State.UNDELIVERED, State.BLOCKED}
    assert rules.LEGAL[State.FETCHED] == any_open | {State.DELIVERED, State.UNDELIVERED, State.BLOCKED}


def test_numbers_are_those_of_the_protos() -> None:
    for state in State:
        assert common_pb2.State.Name(common_pb2.State.ValueType(state)) == f"STATE_{state.name}"
    for reason in Reason:
        if reason:
            assert common_pb2.ReasonCode.Name(common_pb2.ReasonCode.ValueType(reason)) == f"REASON_CODE_{reason.name}"
    for point in StopPoint:
        assert common_pb2.StopPoint.Name(common_pb2.StopPoint.ValueType(point)) == f"STOP_POINT_{point.name}"
    for verdict in Verdict:
        assert messages_pb2.AckVerdict.Name(messages_pb2.AckVerdict.ValueType(verdict)) == f"ACK_VERDICT_{verdict.name}"
    assert rules.OUTCOME_TOKEN_GONE == mailbox_pb2.WAKE_UP_OUTCOME_TOKEN_GONE
    for outcome in AckOutcome:
        assert messages_pb2.AckOutcome.Name(messages_pb2.AckOutcome.ValueType(outcome)) == f"ACK_OUTCOME_{outcome.name}"


OPEN = st.sampled_from([State.QUEUED, State.PUSHED, State.FETCHED])


@given(DELIVERIES, OPEN)
def test_what_a_delivery_reached_before_it_ended_still_counts_while_others_are_open(
    deliveries: list[tuple[State, int]], reached: State
) -> None:
    states = {state for state, _ in deliveries}
    state, _ = rules.message_state(deliveries, reached)
    if State.DELIVERED in states or states <= TERMINAL:
        assert state is oracle(states)
    else:
        assert state is max(oracle(states), reached)


@given(OPEN, OPEN, st.sampled_from(sorted(TERMINAL - {State.DELIVERED})))
def test_a_message_does_not_go_back_when_its_farthest_delivery_ends(farthest: State, other: State, end: State) -> None:
    before, _ = rules.message_state([(farthest, 0), (other, 0)])
    after, _ = rules.message_state([(end, 1), (other, 0)], max(farthest, other))
    assert after >= before


@given(st.sampled_from([0, 100, 101]), st.binary(max_size=2), st.sampled_from([0, 111, 109, 105]), st.booleans())
def test_a_delivery_starts_where_the_semantics_say(blocked: int, stanza: bytes, push_reason: int, live: bool) -> None:
    new = NewDelivery(DeviceId(bytes(16)), stanza, 1, push_reason)
    state, reason = rules.initial_state(blocked, new)
    if blocked:
        assert (state, reason) == (State.BLOCKED, blocked)
    elif not stanza:
        assert (state, reason) == (State.UNDELIVERED, push_reason or Reason.NO_PREKEY)
    else:
        assert (state, reason) == (State.QUEUED, 0)
    push = rules.push_in(state, new, on_live_stream=live)
    assert (push is None) == (state is not State.QUEUED or push_reason != 0)
    assert push in (None, 2.0 if live else 0.0)
    assert rules.grace(new) == (60.0 if push_reason == Reason.TOKEN_GONE else None)


def test_reading_asks_for_no_state() -> None:
    assert [rules.ack_state(outcome) for outcome in list(AckOutcome)[:3]] == [State.DELIVERED, State.UNDELIVERED, State.BLOCKED]
    with pytest.raises(ValueError, match="no state"):
        rules.ack_state(AckOutcome.READ)


def test_bounds_are_those_of_the_semantics() -> None:
    assert timedelta(seconds=2) == rules.LIVE_STREAM_HEAD_START
    assert UNACKNOWLEDGED_MAX == 256


def snapshots() -> st.SearchStrategy[str]:
    numbers = st.lists(st.integers(1, 2**63 - 1), min_size=2, max_size=6, unique=True).map(sorted)
    return numbers.map(lambda each: f"{each[0]}:{each[-1]}:{','.join(map(str, each[:-1]))}") | st.just(rules.NOTHING_READ)


BIGINTS = st.integers(0, 2**63 - 1)
POSITIONS = st.builds(
    Position,
    epoch=st.binary(min_size=16, max_size=16),
    done=snapshots(),
    floor=BIGINTS,
    next_floor=BIGINTS,
    dropped=BIGINTS,
    up_to=st.just("") | snapshots(),
    after=BIGINTS,
    until=BIGINTS,
)


@given(POSITIONS)
def test_a_position_reads_back_as_it_was_written(position: Position) -> None:
    assert Position.decode(position.encode()) == position


@given(POSITIONS, st.integers(0, 200), st.integers(0, 255))
def test_what_is_changed_in_a_position_is_refused_or_another_position_that_postgres_takes(position: Position, at: int, byte: int) -> None:
    data = bytearray(position.encode())
    data[at % len(data)] = byte
    try:
        changed = Position.decode(bytes(data))
    except ValueError:
        return
    for snapshot in (changed.done, changed.up_to or rules.NOTHING_READ):
        oldest, unknown = rules.snapshot_bounds(snapshot)
        assert 0 < oldest <= unknown < 2**63


@pytest.mark.parametrize("data", [b"short", bytes(64), b"\xff" * 90, b"\x02" + bytes(56) + b"1:1: 5:4:", b"\x02" + bytes(56) + b"1:9:3,2 "])
def test_what_is_no_position_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="as it came with the events"):
        Position.decode(data)


def test_a_position_of_the_version_before_is_refused_with_what_its_reader_does() -> None:
    with pytest.raises(ValueError, match=r"version before.*begin with an empty position or from_now"):
        Position.decode(bytes(16))


def test_entries_past_their_retention_are_missed_by_whoever_had_not_read_them() -> None:
    position = Position(bytes(16), "50:60:50,55", 0, 0, dropped=10)
    assert [position.misses(dropped) for dropped in (0, 10, 49, 50, 70)] == [False, False, False, True, True]
    beginning = replace(position, done=rules.NOTHING_READ)
    assert [beginning.misses(dropped) for dropped in (10, 11)] == [False, True], "what was gone when it began is not missed"


@pytest.mark.parametrize("outcome", [0, 6, -1])
def test_a_report_with_an_outcome_nobody_knows_is_refused(outcome: int) -> None:
    report = mailbox_pb2.WakeUpReport(message_id=bytes(16), device_id=bytes(16), outcome=mailbox_pb2.WakeUpOutcome.ValueType(outcome))
    with pytest.raises(InvalidRequest) as caught:
        parse_report(report)
    assert caught.value.field == "outcome"


def test_a_report_with_a_time_or_reason_that_is_none_is_refused() -> None:
    report = mailbox_pb2.WakeUpReport(message_id=bytes(16), device_id=bytes(16), outcome=mailbox_pb2.WAKE_UP_OUTCOME_RETRY)
    report.retry_at.seconds = 2**60
    with pytest.raises(InvalidRequest, match="retry_at"):
        parse_report(report)
    report.ClearField("retry_at")
    report.reason_code = common_pb2.ReasonCode.ValueType(70_000)
    with pytest.raises(InvalidRequest, match="reason_code"):
        parse_report(report)


# What a live stream holds


def ids(count: int, start: int = 0) -> list[MessageId]:
    return [MessageId(n.to_bytes(16, "big")) for n in range(start, start + count)]


def answer(message_id: MessageId, verdict: Verdict, state: State | None) -> AckAnswer:
    return AckAnswer(message_id, verdict, state)


async def test_a_stream_gives_no_more_than_there_is_room_for_and_nothing_twice() -> None:
    stream = LiveStream(DeviceId(bytes(16)))
    stream.offer(ids(300))
    stream.offer(ids(300))
    _, first = await stream.next()
    assert first == ids(256)
    stream.offer(ids(256))
    stream.answered([answer(first[0], Verdict.ACCEPTED, State.DELIVERED)])
    answers, more = await stream.next()
    assert (len(answers), more) == (1, ids(1, 256))
    assert stream.room == 0


@pytest.mark.parametrize(
    ("verdict", "state", "room"),
    [
        (Verdict.ACCEPTED, State.DELIVERED, 1),
        (Verdict.LATE, State.EXPIRED, 1),
        (Verdict.LATE, State.FETCHED, 0),
        (Verdict.UNKNOWN, None, 0),
        (Verdict.REFUSED, None, 0),
    ],
)
async def test_only_an_acknowledgement_of_what_has_ended_makes_room(verdict: Verdict, state: State | None, room: int) -> None:
    stream = LiveStream(DeviceId(bytes(16)))
    stream.sent(ids(256))
    stream.answered([answer(ids(1)[0], verdict, state)])
    assert stream.room == room


async def test_what_the_backlog_brought_is_not_given_again_and_what_was_gone_makes_room() -> None:
    stream = LiveStream(DeviceId(bytes(16)))
    stream.offer(ids(3))
    stream.sent(ids(2))
    _, given_ids = await stream.next()
    assert given_ids == ids(1, 2)
    stream.gone(given_ids)
    assert stream.room == 254
    stream.offer(given_ids)
    assert (await stream.next())[1] == given_ids


async def test_a_stream_that_ended_gives_its_last_answers_first() -> None:
    stream = LiveStream(DeviceId(bytes(16)))
    stream.sent(ids(256))
    stream.answered([answer(ids(1)[0], Verdict.REFUSED, None)])
    stream.end(Aborted("another took over"))
    assert len(await stream.room_again()) == 1
    with pytest.raises(Aborted):
        await stream.room_again()
    stream.answered([answer(ids(1)[0], Verdict.ACCEPTED, State.DELIVERED)])
    stream.offer(ids(1, 999))
    answers, given_ids = await stream.next()
    assert (len(answers), given_ids) == (1, [])
    with pytest.raises(Aborted):
        await stream.next()


async def test_a_stream_waits_until_there_is_something_and_keeps_a_bounded_queue() -> None:
    stream = LiveStream(DeviceId(bytes(16)))
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.offer(ids(1))
    assert (await waiting)[1] == ids(1)
    stream.offer(ids(5_000, 1))
    assert len(stream._waiting) == WAITING_MAX
