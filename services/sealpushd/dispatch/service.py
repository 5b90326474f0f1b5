"""gRPC of dispatch: lanes and credentials, for operators."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from sealpush.ids import AppId
from sealpush.v1 import common_pb2
from sealpushd.dispatch.credentials import Credentials, NewCredential, Shown
from sealpushd.dispatch.lanes import Lane, LaneSet, LaneState
from sealpushd.dispatch.providers.base import Probed, Provider, accepts
from sealpushd.dispatch.store import LaneStore
from sealpushd.platform import fields, rpc
from sealpushd.platform.clients import MeshChannel
from sealpushd.platform.clock import Clock, Reading
from sealpushd.platform.errors import InvalidRequest, NotFound, StoreUnavailable
from sealpushd.platform.outage import Outage
from sealpushd.v1 import lanes_pb2, lanes_pb2_grpc, mailbox_pb2, mailbox_pb2_grpc, providers_pb2, providers_pb2_grpc

log = structlog.get_logger()

# How soon a pause by another dispatch process is seen here; the process that was asked pauses at once.
FOLLOW_PERIOD_S: Final = 2.0
# Within this every dispatch process has followed.
FOLLOWED_S: Final = FOLLOW_PERIOD_S + 0.5


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def to_lane(lane: Lane, now: Reading) -> lanes_pb2.Lane:
    closed_for = lane.closed_for
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
        next_try_at=_timestamp(now.wall + closed_for) if closed_for is not None else None,
        push_service=lane.provider.name if lane.provider is not None else "",
        rate_per_second=lane.counts.rate.per_second(now.steady),
        errors=[
            lanes_pb2.LaneError(reason=reason, count=seen.count, advice=lane.advise(reason), last_at=_timestamp(seen.last_at))
            for reason, seen in lane.counts.by_frequency()
        ],
        window=lane.window,
        failures_in_a_row=lane.failures_in_a_row,
        receipts=lane.counts.receipts,
        is_suspicious=lane.is_suspicious,
    )


class LanesService(lanes_pb2_grpc.LanesServicer):
    """What operators call."""

    def __init__(self, lanes: LaneSet, store: LaneStore, credentials: Credentials, mailbox: MeshChannel, clock: Clock) -> None:
        self._lanes = lanes
        self._store = store
        self._credentials = credentials
        self._mailbox = mailbox
        self._mailbox_stub = mailbox_pb2_grpc.MailboxStub(mailbox.channel)
        self._clock = clock
        self._outage = Outage(
            "lanes", gone="lanes and credentials could not be read; they stay as they are", back="lanes and credentials are read again"
        )

    async def ListLanes(self, request: lanes_pb2.ListLanesRequest, context: Any) -> lanes_pb2.ListLanesResponse:
        now = Reading.of(self._clock)
        return lanes_pb2.ListLanesResponse(lanes=[to_lane(lane, now) for lane in self._lanes])

    async def PauseLane(self, request: lanes_pb2.PauseLaneRequest, context: Any) -> lanes_pb2.PauseLaneResponse:
        lane, now = self._need(request.app_id, request.platform), self._clock.now()
        detail = f"paused by {rpc.require_service().name} at {now:%Y-%m-%d %H:%M:%S} UTC"
        await self._store.pause(lane.app_id, lane.platform, detail, now)
        await self.refresh()
        return lanes_pb2.PauseLaneResponse()

    async def ResumeLane(self, request: lanes_pb2.ResumeLaneRequest, context: Any) -> lanes_pb2.ResumeLaneResponse:
        await self._resume(self._need(request.app_id, request.platform))
        return lanes_pb2.ResumeLaneResponse()

    async def RequeueLane(self, request: lanes_pb2.RequeueLaneRequest, context: Any) -> lanes_pb2.RequeueLaneResponse:
        lane = self._need(request.app_id, request.platform)
        # First everywhere the tokens that were set aside, else what is pushed again is given up again at once.
        if lane.state is not LaneState.PAUSED:
            await self._resume(lane)
            await asyncio.sleep(FOLLOWED_S)
        requeue = mailbox_pb2.RequeueRequest(app_id=lane.app_id, platform=common_pb2.Platform.ValueType(lane.platform))
        answer = await self._mailbox.call(self._mailbox_stub.Requeue, requeue)
        return lanes_pb2.RequeueLaneResponse(requeued=answer.requeued, more=answer.more)

    async def _resume(self, lane: Lane) -> None:
        now = self._clock.now()
        detail = f"resumed by {rpc.require_service().name} at {now:%Y-%m-%d %H:%M:%S} UTC"
        await self._store.resume(lane.app_id, lane.platform, detail, now)
        await self.refresh()

    async def refresh(self) -> None:
        """Take over what operators decided, here or elsewhere. Raises StoreUnavailable."""
        await self._credentials.refresh()

    async def follow(self) -> None:
        """Take over what operators decide elsewhere, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_PERIOD_S)
            try:
                await self.refresh()
                self._outage.worked()
            except StoreUnavailable as e:
                self._outage.failed(e)

    def _need(self, app_id: str, platform: int) -> Lane:
        lane = self._lanes.get(app_id, platform)
        if lane is None:
            raise NotFound("no such lane; `sealpush lanes` shows those there are")
        return lane


def to_verdict(provider: Provider, probed: Probed) -> providers_pb2.ProviderVerdict:
    good = probed.is_good
    verdict = providers_pb2.VERDICT_UNKNOWN if good is None else providers_pb2.VERDICT_GOOD if good else providers_pb2.VERDICT_REFUSED
    # That a token of nobody is refused is no news.
    reason = "" if good else probed.outcome.reason
    return providers_pb2.ProviderVerdict(what=probed.what, verdict=verdict, reason=reason, advice=provider.advise(reason) if reason else "")


def to_stored(shown: Shown) -> providers_pb2.StoredProvider:
    row = shown.stored
    return providers_pb2.StoredProvider(
        app_id=row.app_id,
        platform=common_pb2.Platform.ValueType(row.platform),
        push_service=row.kind,
        settings=row.settings,
        secret_file=row.secret_file,
        fingerprint=shown.fingerprint,
        expires_at=_timestamp(row.expires_at) if row.expires_at is not None else None,
        version=row.version,
        created_at=_timestamp(row.created_at),
        updated_at=_timestamp(row.updated_at),
        problem=shown.problem,
    )


class ProvidersService(providers_pb2_grpc.ProvidersServicer):
    """What operators call."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def PutProvider(self, request: providers_pb2.PutProviderRequest, context: Any) -> providers_pb2.PutProviderResponse:
        provider, probes = await self._credentials.put(parse_new(request), replace_present=request.replace, untested=request.untested)
        log.info("a credential was put", app=request.app_id, platform=request.platform, by=rpc.require_service().name)
        return providers_pb2.PutProviderResponse(verdicts=[to_verdict(provider, probed) for probed in probes])

    async def TestProvider(self, request: providers_pb2.TestProviderRequest, context: Any) -> providers_pb2.TestProviderResponse:
        provider, probes = await self._credentials.test(request.app_id, request.platform)
        return providers_pb2.TestProviderResponse(verdicts=[to_verdict(provider, probed) for probed in probes], works=accepts(probes))

    async def ListProviders(self, request: providers_pb2.ListProvidersRequest, context: Any) -> providers_pb2.ListProvidersResponse:
        return providers_pb2.ListProvidersResponse(providers=[to_stored(shown) for shown in await self._credentials.list()])

    async def RemoveProvider(self, request: providers_pb2.RemoveProviderRequest, context: Any) -> providers_pb2.RemoveProviderResponse:
        await self._credentials.remove(request.app_id, request.platform)
        log.info("a credential was taken away", app=request.app_id, platform=request.platform, by=rpc.require_service().name)
        return providers_pb2.RemoveProviderResponse()


def parse_lane(app_id: str, platform: int) -> tuple[AppId, int]:
    """A lane by its name; platforms newer than this program knows are welcome."""
    if platform == common_pb2.PLATFORM_UNSPECIFIED:
        raise InvalidRequest("platform is required", field="platform")
    return fields.app_id(app_id), fields.enum(platform, "platform")


def parse_new(request: providers_pb2.PutProviderRequest) -> NewCredential:
    """Raises InvalidRequest that names the field."""
    app_id, platform = parse_lane(request.app_id, request.platform)
    return NewCredential(
        app_id=app_id,
        platform=platform,
        kind=request.push_service,
        values=dict(request.settings),
        secret=request.secret if request.HasField("secret") else None,
        secret_file=request.secret_file,
        expires_at=fields.moment(request.expires_at, "expires_at") if request.HasField("expires_at") else None,
    )
