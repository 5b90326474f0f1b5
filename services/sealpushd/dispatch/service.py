"""gRPC of dispatch: the lanes, for operators."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.v1 import common_pb2
from sealpushd.dispatch.lanes import Lane, LaneSet
from sealpushd.dispatch.store import LaneStore
from sealpushd.platform import rpc
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import NotFound, StoreUnavailable
from sealpushd.v1 import lanes_pb2, lanes_pb2_grpc

log = structlog.get_logger()

# How soon a pause by another dispatch process is seen here; the process that was asked pauses at once.
FOLLOW_PERIOD_S: Final = 2.0


def to_lane(lane: Lane) -> lanes_pb2.Lane:
    next_try_at = None
    if lane.closed_until is not None:
        next_try_at = Timestamp()
        next_try_at.FromDatetime(lane.closed_until)
    return lanes_pb2.Lane(
        app_id=lane.app_id,
        platform=common_pb2.Platform.ValueType(lane.platform),
        state=lanes_pb2.LaneState.ValueType(lane.state.value),
        detail=lane.detail,
        in_flight=lane.held,
        accepted=lane.counts.accepted,
        retried=lane.counts.retried,
        dead_tokens=lane.counts.dead_tokens,
        quarantined=lane.counts.quarantined,
        next_try_at=next_try_at,
    )


class LanesService(lanes_pb2_grpc.LanesServicer):
    """What operators call."""

    def __init__(self, lanes: LaneSet, store: LaneStore, clock: Clock) -> None:
        self._lanes = lanes
        self._store = store
        self._clock = clock

    async def ListLanes(self, request: lanes_pb2.ListLanesRequest, context: Any) -> lanes_pb2.ListLanesResponse:
        return lanes_pb2.ListLanesResponse(lanes=[to_lane(lane) for lane in self._lanes])

    async def PauseLane(self, request: lanes_pb2.PauseLaneRequest, context: Any) -> lanes_pb2.PauseLaneResponse:
        lane, now = self._need(request.app_id, request.platform), self._clock.now()
        detail = f"paused by {rpc.require_service().name} at {now:%Y-%m-%d %H:%M:%S} UTC"
        await self._store.pause(lane.app_id, lane.platform, detail, now)
        await self.refresh()
        return lanes_pb2.PauseLaneResponse()

    async def ResumeLane(self, request: lanes_pb2.ResumeLaneRequest, context: Any) -> lanes_pb2.ResumeLaneResponse:
        lane, now = self._need(request.app_id, request.platform), self._clock.now()
        detail = f"resumed by {rpc.require_service().name} at {now:%Y-%m-%d %H:%M:%S} UTC"
        await self._store.resume(lane.app_id, lane.platform, detail, now)
        await self.refresh()
        return lanes_pb2.ResumeLaneResponse()

    async def refresh(self) -> None:
        """Take over what operators decided, here or elsewhere. Raises StoreUnavailable."""
        self._lanes.apply(await self._store.lane_states())

    async def follow(self) -> None:
        """Take over what operators decide elsewhere, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_PERIOD_S)
            try:
                await self.refresh()
            except StoreUnavailable as e:
                log.warning("the lanes' states could not be read; they stay as they are", error=e.message)

    def _need(self, app_id: str, platform: int) -> Lane:
        lane = self._lanes.get(app_id, platform)
        if lane is None:
            raise NotFound("no such lane; ListLanes shows those there are")
        return lane
