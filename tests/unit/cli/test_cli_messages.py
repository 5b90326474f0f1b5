from datetime import UTC, datetime, timedelta

import pytest

from sealpush.ids import DeviceId, GroupId, MessageId, OrderId
from sealpush.model import Reason, State
from sealpush.publication import DeliveryStatus, MessageStatus
from sealpushd.cli.messages import _show, _unanswered, explained

AT = datetime(2026, 11, 18, 12, tzinfo=UTC)


def status(state: State, reason: Reason, push_reason: Reason, pushed_at: datetime | None = None) -> MessageStatus:
    """A message to one device, all of whose last changes were a second after it was accepted."""
    at = AT + timedelta(seconds=1)
    delivery = DeliveryStatus(DeviceId(bytes(16)), state, reason, at, pushed_at, None, None, None, push_reason)
    return MessageStatus(
        message_id=MessageId(bytes(16)),
        state=state,
        reason=reason,
        assumed=False,
        created_at=AT,
        expires_at=AT + timedelta(days=1),
        at=at,
        attempts=(),
        deliveries=(delivery,),
        order_id=OrderId(b""),
        group_id=GroupId(b""),
        tag="",
    )


def test_what_waits_is_explained_with_what_is_in_the_way_and_until_when() -> None:
    lines = explained(status(State.QUEUED, Reason.UNSPECIFIED, Reason.PUSH_OS_DISABLED))
    assert "  What to do: The message waits to be fetched when the app is opened; if it is urgent, use another channel." in lines
    assert lines[-1] == "It is tried until 2026-11-19 12:00:00 UTC."


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.EXPIRED, Reason.LIFETIME_OVER),
        (State.CANCELLED, Reason.CANCELLED_BY_SENDER),
        (State.REPLACED, Reason.REPLACED_BY_NEWER),
    ],
)
def test_what_has_ended_is_not_said_to_wait(state: State, reason: Reason) -> None:
    text = "\n".join(explained(status(state, reason, Reason.PUSH_OS_DISABLED)))
    assert "switched pushes off" in text
    assert "waits to be fetched" not in text
    assert text.count("What to do") == 1


def test_a_step_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    _show(status(State.PUSHED, Reason.UNSPECIFIED, Reason.UNSPECIFIED, pushed_at=AT + timedelta(seconds=1)), as_json=False)
    assert capsys.readouterr().out.count("pushed 1000 ms") == 1


def test_without_an_answer_one_is_told_how_to_ask_again() -> None:
    assert "--request-id r-1" in _unanswered("r-1", sealed=False)
    assert "ALREADY_EXISTS" in _unanswered("r-1", sealed=True)
