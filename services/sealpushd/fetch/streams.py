"""Live streams of devices: who is connected here, what each was sent, and what came for it meanwhile.

A stream learns of new deliveries at once from the store in its own process and by Valkey from the others; a sweep over the open
deliveries finds what both missed. Nothing depends on a message arriving here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from sealpush.ids import DeviceId, MessageId, uuid7
from sealpushd.fetch.rules import AckAnswer
from sealpushd.fetch.store import MailboxStore
from sealpushd.platform.errors import Aborted, Overloaded, ServiceError, Unauthenticated, Unavailable
from sealpushd.platform.metrics import STREAMS_OPEN
from sealpushd.platform.outage import Outage
from sealpushd.platform.valkey import CHANNEL_DEVICES, CHANNEL_DISMISSED, CHANNEL_STREAMS, PRESENCE_TTL_S, Valkey

log = structlog.get_logger()

# Deliveries a device may hold without having acknowledged them.
UNACKNOWLEDGED_MAX: Final = 256
# Ids that wait behind a full stream; more than that the sweep finds again later.
WAITING_MAX: Final = 1_024
# Answers to acknowledgements that a device does not read: sixteen frames of them. One that goes on writing without reading is cut off.
ANSWERS_MAX: Final = 16 * UNACKNOWLEDGED_MAX
# How long a stream that was ended may take to say so; a device that does not read would keep it for ever.
END_GRACE_S: Final = 5.0
# How often the sweep looks for what a notice was lost of. The long stop when Valkey is away.
SWEEP_PERIOD_S: Final = 5.0
SWEEP_DEVICES_MAX: Final = 512


class LiveStream:
    """One device's stream: what it holds, what waits, and what is to be told."""

    def __init__(self, device_id: DeviceId, end_grace_s: float = END_GRACE_S) -> None:
        self._end_grace_s = end_grace_s
        self.device_id = device_id
        self.stream_id = uuid7()
        self._held: set[MessageId] = set()
        self._waiting: deque[MessageId] = deque()
        self._answers: list[AckAnswer] = []
        self._changed = asyncio.Event()
        self._ended: Exception | None = None
        # The call that serves the stream; it may hang in a write to a device that does not read.
        self._call = asyncio.current_task()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def room(self) -> int:
        """Deliveries that may still be sent before an acknowledgement comes."""
        return UNACKNOWLEDGED_MAX - len(self._held)

    def offer(self, message_ids: Iterable[MessageId]) -> None:
        """There are deliveries for this device; those it holds or that wait already are passed over."""
        for message_id in message_ids:
            if message_id not in self._held and message_id not in self._waiting and len(self._waiting) < WAITING_MAX:
                self._waiting.append(message_id)
        self._changed.set()

    def sent(self, message_ids: Iterable[MessageId]) -> None:
        self._held.update(message_ids)

    def gone(self, message_ids: Iterable[MessageId]) -> None:
        """What `next` gave had ended meanwhile: it was not sent."""
        self._held.difference_update(message_ids)

    def answered(self, answers: Sequence[AckAnswer]) -> None:
        """Acknowledgements were judged: the device is told, and where a delivery has ended there is room again.

        Raises Overloaded when the device does not take its answers.
        """
        if len(self._answers) + len(answers) > ANSWERS_MAX:
            raise Overloaded("the answers to acknowledgements are not read; read the stream while writing to it")
        self._held.difference_update(answer.message_id for answer in answers if answer.state is not None and answer.state.terminal)
        self._answers.extend(answers)
        self._changed.set()

    def end(self, error: Exception) -> None:
        """End the stream with this error; a call that does not get to tell it within the grace is cut off."""
        self._ended = error
        self._changed.set()
        if self._call is not None and self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(self._end_grace_s, self._call.cancel)

    def closed(self) -> None:
        """Its call has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._call = None

    async def next(self) -> tuple[list[AckAnswer], list[MessageId]]:
        """Wait for something to tell: answers, and ids to take and send as far as there is room; those count as held from now on.

        Raises what ended the stream, after the last answers.
        """
        while True:
            answers = self.take_answers()
            if self._ended is not None:
                if answers:
                    return answers, []
                raise self._ended
            ids = []
            while self._waiting and self.room:
                message_id = self._waiting.popleft()
                # The backlog may have brought it meanwhile.
                if message_id not in self._held:
                    self._held.add(message_id)
                    ids.append(message_id)
            if answers or ids:
                return answers, ids
            self._changed.clear()
            await self._changed.wait()

    def take_answers(self) -> list[AckAnswer]:
        """What the device is to be told of its acknowledgements."""
        answers, self._answers = self._answers, []
        return answers

    async def room_again(self) -> list[AckAnswer]:
        """Wait for answers, which may have made room. Raises what ended the stream, after the last answers."""
        while not self._answers:
            if self._ended is not None:
                raise self._ended
            self._changed.clear()
            await self._changed.wait()
        return self.take_answers()


class StreamHub:
    """The live streams of this process."""

    def __init__(self, valkey: Valkey, store: MailboxStore, *, sweep_period_s: float = SWEEP_PERIOD_S) -> None:
        self._sweep_period_s = sweep_period_s
        self._valkey = valkey
        self._store = store
        self._worker_id = uuid7()
        self._streams: dict[DeviceId, LiveStream] = {}
        self._outage = Outage(
            "sweep of streams", gone="the sweep of live streams failed and goes on later", back="the sweep of live streams works again"
        )

    async def open(self, device_id: DeviceId) -> LiveStream:
        """A stream for a device; one it had before ends with ABORTED, wherever it is."""
        stream = LiveStream(device_id)
        before = self._streams.get(device_id)
        self._streams[device_id] = stream
        if before is not None:
            before.end(_taken_over())
        STREAMS_OPEN.set(len(self._streams))
        try:
            await self._valkey.set_present([device_id], stream.stream_id)
            await self._valkey.publish(CHANNEL_STREAMS, device_id + stream.stream_id)
        except BaseException:
            # The device left meanwhile: nobody else would forget the stream.
            await self.close(stream)
            raise
        return stream

    async def close(self, stream: LiveStream) -> None:
        """Forget a stream that ended, unless a newer one took its place."""
        stream.closed()
        if self._streams.get(stream.device_id) is stream:
            del self._streams[stream.device_id]
            STREAMS_OPEN.set(len(self._streams))
            await self._valkey.clear_present(stream.device_id)

    async def dismiss(self, device_ids: Sequence[DeviceId]) -> None:
        """These installations have ended: so do their streams, wherever they are. Their tokens would last some minutes more."""
        for device_id in device_ids:
            self._dismiss(device_id)
        await self._valkey.publish(CHANNEL_DISMISSED, b"".join(device_ids))

    def _dismiss(self, device_id: DeviceId) -> None:
        stream = self._streams.get(device_id)
        if stream is not None:
            stream.end(Unauthenticated("this installation has ended; register again"))

    async def drain(self) -> None:
        for stream in list(self._streams.values()):
            stream.end(Unavailable("this server is going away; connect again"))

    async def live(self, device_ids: Sequence[DeviceId]) -> set[DeviceId]:
        """Which of the devices are on a stream, here or in another process as far as is known."""
        here = {device_id for device_id in device_ids if device_id in self._streams}
        others = [device_id for device_id in device_ids if device_id not in here]
        if not others:
            return here
        present = await self._valkey.present(others)
        return here | {device_id for device_id, there in zip(others, present, strict=True) if there}

    async def announce(self, keys: Sequence[tuple[DeviceId, MessageId]], live: set[DeviceId]) -> None:
        """New deliveries were stored: tell their streams."""
        elsewhere = bytearray(self._worker_id)
        for device_id, message_id in keys:
            stream = self._streams.get(device_id)
            if stream is not None:
                stream.offer((message_id,))
            elif device_id in live:
                elsewhere += device_id + message_id
        if len(elsewhere) > len(self._worker_id):
            await self._valkey.publish(CHANNEL_DEVICES, bytes(elsewhere))

    async def listen(self) -> None:
        """Take notices of other processes, for ever."""
        async for channel, data in self._valkey.listen(CHANNEL_DEVICES, CHANNEL_STREAMS, CHANNEL_DISMISSED):
            if channel == CHANNEL_DISMISSED:
                for start in range(0, len(data), 16):
                    self._dismiss(DeviceId(data[start : start + 16]))
            if channel == CHANNEL_STREAMS and len(data) == 32:
                stream = self._streams.get(DeviceId(data[:16]))
                # Ids are made in the order of time: a notice of an older stream than ours changes nothing.
                if stream is not None and stream.stream_id < data[16:]:
                    stream.end(_taken_over())
            elif channel == CHANNEL_DEVICES and data[:16] != self._worker_id:
                for start in range(16, len(data) - 31, 32):
                    stream = self._streams.get(DeviceId(data[start : start + 16]))
                    if stream is not None:
                        stream.offer((MessageId(data[start + 16 : start + 32]),))

    async def sweep(self) -> None:
        """Find what a notice was lost of, and renew presence, for ever."""
        since_presence = 0.0
        while True:
            await asyncio.sleep(self._sweep_period_s)
            since_presence += self._sweep_period_s
            streams = list(self._streams.values())
            if since_presence >= PRESENCE_TTL_S / 3:
                since_presence = 0.0
                for stream in streams:
                    await self._valkey.set_present([stream.device_id], stream.stream_id)
            for start in range(0, len(streams), SWEEP_DEVICES_MAX):
                part = {stream.device_id: stream for stream in streams[start : start + SWEEP_DEVICES_MAX]}
                try:
                    waiting = await self._store.waiting_ids(list(part), UNACKNOWLEDGED_MAX * 2)
                except ServiceError as e:
                    self._outage.failed(e)
                    break
                for device_id, message_ids in waiting.items():
                    part[device_id].offer(message_ids)
            else:
                self._outage.worked()


def _taken_over() -> ServiceError:
    return Aborted("another stream of this device took over; keep one stream a device", metadata={"cause": "SECOND_STREAM"})
