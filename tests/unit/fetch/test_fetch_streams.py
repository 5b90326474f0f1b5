"""A device's stream without its device: what it holds, and how it ends."""

from __future__ import annotations

import asyncio

import pytest

from sealpush.ids import DeviceId, MessageId
from sealpushd.fetch.streams import UNACKNOWLEDGED_MAX, LiveStream
from sealpushd.platform.errors import Aborted

DEVICE = DeviceId(b"d" * 16)


async def test_a_call_that_hangs_in_a_write_is_cut_off_after_the_grace() -> None:
    streams: list[LiveStream] = []

    async def serve() -> None:
        streams.append(LiveStream(DEVICE, end_grace_s=0.01))
        await asyncio.Event().wait()

    call = asyncio.create_task(serve())
    await asyncio.sleep(0)
    streams[0].end(Aborted("another stream took over"))
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_call_that_ends_by_itself_is_not_cut_off() -> None:
    stream = LiveStream(DEVICE, end_grace_s=0.0)
    stream.end(Aborted("another stream took over"))
    with pytest.raises(Aborted):
        await stream.next()
    stream.closed()
    # The timer would strike in the next turn of the loop.
    for _ in range(3):
        await asyncio.sleep(0)


async def test_no_more_than_the_bound_is_given_out_before_acknowledgements() -> None:
    stream = LiveStream(DEVICE)
    stream.offer(MessageId(n.to_bytes(16, "big")) for n in range(UNACKNOWLEDGED_MAX + 10))
    _, ids = await stream.next()
    assert len(ids) == UNACKNOWLEDGED_MAX
    assert stream.room == 0
