"""A live stream's own bounds."""

from __future__ import annotations

import pytest

from sealpush.ids import DeviceId, MessageId
from sealpushd.fetch.rules import AckAnswer, Verdict
from sealpushd.fetch.streams import ANSWERS_MAX, UNACKNOWLEDGED_MAX, LiveStream
from sealpushd.platform.errors import Overloaded

FRAME = [AckAnswer(MessageId(bytes(16)), Verdict.REFUSED, None)] * UNACKNOWLEDGED_MAX


def test_a_device_that_writes_and_does_not_read_is_cut_off() -> None:
    stream = LiveStream(DeviceId(b"d" * 16))
    for _ in range(ANSWERS_MAX // UNACKNOWLEDGED_MAX):
        stream.answered(FRAME)
    with pytest.raises(Overloaded):
        stream.answered(FRAME[:1])
    assert len(stream.take_answers()) == ANSWERS_MAX


def test_a_device_that_reads_may_write_for_ever() -> None:
    stream = LiveStream(DeviceId(b"d" * 16))
    for _ in range(3 * ANSWERS_MAX // UNACKNOWLEDGED_MAX):
        stream.answered(FRAME)
        assert len(stream.take_answers()) == UNACKNOWLEDGED_MAX
