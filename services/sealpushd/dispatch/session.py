"""The session with the mailbox: takes wake-ups as far as the lanes have room, pushes them, reports what became of each.

One session a process. Every wake-up that was received is reported exactly once while its session lives; when the session ends
first, the mailbox has taken its leases back and hands the wake-ups out again, with the same wake-up ids.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import Counter

from sealpush.keys import MESSAGE_LIFETIME_MS_MAX
from sealpush.v1 import common_pb2
from sealpushd.dispatch.lanes import PAUSED_RETRY, Lane, LaneSet, Release, Send
from sealpushd.dispatch.providers.base import PushEnvironment, PushTarget, PushToken, WakeUp, WakeUpPriority
from sealpushd.dispatch.rules import (
    ATTEMPTS_MAX,
    Pushed,
    Quarantine,
    Retry,
    StopLane,
    TokenDead,
    backoff,
    decide,
    excuse_lane,
    excuse_new_credential,
)
from sealpushd.platform.clients import BatchedCall, MeshChannel
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import ServiceError
from sealpushd.platform.outage import Outage
from sealpushd.v1 import directory_pb2, directory_pb2_grpc, mailbox_pb2, mailbox_pb2_grpc

log = structlog.get_logger()

# Reports in one frame, as everywhere in the mesh.
REPORTS_MAX: Final = 512
# The first report after a quiet moment goes at once, then what gathers goes so often: a frame costs as much as ten reports.
WRITE_PAUSE_S: Final = 0.01
# Full jitter between 0 and 0.2 s · 2^n before the mailbox is asked for another session.
RECONNECT_BASE_S: Final = 0.2
RECONNECT_MIN_S: Final = 0.02
RECONNECT_MAX_S: Final = 5.0
# A session that lived for so long, or brought something, was a good one: the next follows soon.
SESSION_STABLE_S: Final = 5.0
# While a lane waits for its time to try again, it is looked at so often at the least.
LOOK_PERIOD_S: Final = 0.25
# When registration does not answer, what is held goes back to the queue for one to two of these.
DIRECTORY_PAUSE: Final = timedelta(seconds=2)
# After an error of our own an untried wake-up waits this long, so that a bug cannot turn into a storm.
BUG_PAUSE: Final = timedelta(seconds=30)
# How long the mailbox may take to end a session after the last report of a drain.
LAST_WORD_S: Final = 1.0
DETAIL_CHARACTERS_MAX: Final = 100
# No message lives longer.
LIFETIME_MAX: Final = timedelta(milliseconds=MESSAGE_LIFETIME_MS_MAX)

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_SANDBOX: Final = common_pb2.PUSH_ENVIRONMENT_SANDBOX

Outcome = mailbox_pb2.WakeUpOutcome
_WORDS: Final = {
    Outcome.WAKE_UP_OUTCOME_PUSHED: "pushed",
    Outcome.WAKE_UP_OUTCOME_RETRY: "retry",
    Outcome.WAKE_UP_OUTCOME_TOKEN_GONE: "token_gone",
    Outcome.WAKE_UP_OUTCOME_QUARANTINED: "quarantined",
    Outcome.WAKE_UP_OUTCOME_RELEASED: "released",
}

_RECONNECTS: Final = Counter("sealpush_wake_up_sessions", "Sessions with the mailbox that were opened.")


class _Session:
    """What one session owes the mailbox. `live` ends with it: nothing that it handed out is ours any more.

    `changed` is shared by all sessions: what an earlier one still has under way takes room, and gives it back to the present one.
    """

    def __init__(self, changed: asyncio.Event) -> None:
        self.live = True
        self.held = 0
        self.brought_something = False
        self.reports: deque[mailbox_pb2.WakeUpReport] = deque()
        self.changed = changed


class _Held:
    """One wake-up in our hands, until it is settled."""

    __slots__ = ("_clock", "_expires_at", "_session", "_settled", "lane", "wake_up")

    def __init__(self, session: _Session, lane: Lane, wake_up: mailbox_pb2.WakeUp, clock: Clock) -> None:
        self.lane = lane
        self.wake_up = wake_up
        self._clock = clock
        # Of the steady clock.
        self._expires_at = clock.monotonic() + lifetime_left(wake_up, clock.now()).total_seconds()
        self._session = session
        self._settled = False
        session.held += 1
        lane.took()

    @property
    def live(self) -> bool:
        """Whether the lease is still ours."""
        return self._session.live

    @property
    def expires_at(self) -> datetime:
        """The end of its lifetime as our own clock will show it: who subtracts `now` has what is left, however wrong that clock is."""
        return self._clock.now() + timedelta(seconds=max(self._expires_at - self._clock.monotonic(), 0))

    @property
    def attempt(self) -> int:
        """The number of the send that would be next; the first is 1."""
        return self.wake_up.attempts + 1

    def report(
        self,
        outcome: mailbox_pb2.WakeUpOutcome.ValueType,
        *,
        delay: timedelta | None = None,
        reason: common_pb2.ReasonCode.ValueType = common_pb2.REASON_CODE_UNSPECIFIED,
        detail: str = "",
    ) -> None:
        """Tell the mailbox, with the next frame. `delay`: until it is tried again, by whatever clock the mailbox has."""
        if self._settled:
            return
        self.settle()
        if not self._session.live:
            return
        report = mailbox_pb2.WakeUpReport(
            message_id=self.wake_up.message_id,
            device_id=self.wake_up.device_id,
            fence=self.wake_up.fence,
            outcome=outcome,
            reason_code=reason,
            detail=detail[:DETAIL_CHARACTERS_MAX],
        )
        if delay is not None:
            report.retry_in.FromTimedelta(delay)
            # For a mailbox of the release before, which knows moments only.
            report.retry_at.FromDatetime(self._clock.now() + delay)
        self._session.reports.append(report)
        self.lane.reported(_WORDS[outcome])

    def release(self, release: Release) -> None:
        self.report(Outcome.WAKE_UP_OUTCOME_RELEASED, delay=release.delay, detail=release.reason)

    def settle(self) -> None:
        """Let go of it, without a word if there was none."""
        if not self._settled:
            self._settled = True
            self._session.held -= 1
            self._session.changed.set()
            self.lane.settled()


class Dispatcher:
    """Keeps one session with the mailbox. `run` for ever; `drain` once, before the end."""

    def __init__(
        self,
        lanes: LaneSet,
        mailbox: MeshChannel,
        registration: MeshChannel,
        clock: Clock,
        random: Callable[[], float],
        *,
        drain_limit: timedelta,
    ) -> None:
        self._lanes = lanes
        self._mailbox = mailbox
        self._stub = mailbox_pb2_grpc.MailboxStub(mailbox.channel)
        self._clock = clock
        self._random = random
        self._drain_limit = drain_limit
        self._holding = Outage(
            "session",
            gone="the session with the mailbox ended and begins anew",
            back="the session with the mailbox holds again",
            steady_s=SESSION_STABLE_S,
        )
        self._resolving = Outage(
            "directory", gone="registration does not answer: wake-ups go back to the queue", back="registration tells push tokens again"
        )
        self._reporting = Outage(
            "dead tokens", gone="a dead token could not be reported; the next try will", back="dead tokens are reported again"
        )
        directory = directory_pb2_grpc.DirectoryStub(registration.channel)
        self._targets: BatchedCall[bytes, directory_pb2.PushTarget] = BatchedCall(
            registration,
            directory.GetPushTargets,
            lambda device_ids: directory_pb2.GetPushTargetsRequest(device_ids=device_ids),
            lambda answer: answer.targets,
        )
        self._dead_tokens: BatchedCall[directory_pb2.DeadToken, bool] = BatchedCall(
            registration,
            directory.ReportDeadTokens,
            lambda tokens: directory_pb2.ReportDeadTokensRequest(dead_tokens=tokens),
            lambda answer: answer.forgotten,
        )
        self._session: _Session | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._draining = asyncio.Event()
        self._drain_is_over = False
        self._ended = asyncio.Event()
        self._ended.set()
        lanes.on_change = self._changed.set

    # The session

    async def run(self) -> None:
        """Hold a session, again and again; returns after a drain."""
        self._ended.clear()
        failures = 0
        try:
            while not self._draining.is_set():
                if not len(self._lanes):
                    log.info("there is no credential: nothing is pushed until `sealpush providers add`")
                    while not len(self._lanes) and not self._draining.is_set():
                        self._changed.clear()
                        await self._changed.wait()
                    continue
                started_at = asyncio.get_running_loop().time()
                session = _Session(self._changed)
                try:
                    await self._hold(session)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as e:
                    self._holding.failed(e, held=session.held)
                if session.brought_something or asyncio.get_running_loop().time() - started_at > SESSION_STABLE_S:
                    failures = 0
                pause = max(self._random() * min(RECONNECT_BASE_S * 2 ** min(failures, 10), RECONNECT_MAX_S), RECONNECT_MIN_S)
                failures += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._draining.wait()
        finally:
            for task in self._work:
                task.cancel()
            await asyncio.gather(*self._work, return_exceptions=True)
            self._ended.set()

    async def drain(self) -> None:
        """Take nothing more, let sends end within the limit, report them, end the session. The mailbox releases the rest."""
        self._draining.set()
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_limit.total_seconds()):
                await self._ended.wait()
                return
        log.warning("sends did not end within the time for draining", held=self._session.held if self._session else 0)
        self._drain_is_over = True
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * LAST_WORD_S):
                await self._ended.wait()

    async def _hold(self, session: _Session) -> None:
        """One session until it ends; raises what ended it."""
        self._lanes.session_began()
        # It is back when it has held for as long as a session does that is stable.
        self._holding.worked()
        call = self._stub.WakeUpSession(metadata=self._mailbox.metadata())
        _RECONNECTS.inc()
        self._session = session
        reader = asyncio.create_task(self._read(call, session))
        writer = asyncio.create_task(self._write(call, session))
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader not in done and writer.exception() is None:
                # Drained: the mailbox ends the stream once it has read our last word.
                await asyncio.wait((reader,), timeout=LAST_WORD_S)
            for task in done:
                task.result()
        finally:
            session.live = False
            self._session = None
            reader.cancel()
            writer.cancel()
            call.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, call: Any, session: _Session) -> None:
        async for response in call:
            session.brought_something = True
            if not self._draining.is_set():
                self._accept(session, response.wake_ups)

    async def _write(self, call: Any, session: _Session) -> None:
        """Reports and credit, together. What gathers during one write goes with the next."""
        while True:
            session.changed.clear()
            reports = [session.reports.popleft() for _ in range(min(len(session.reports), REPORTS_MAX))]
            credit = [] if self._draining.is_set() else self._credits()
            if reports or credit:
                await call.write(mailbox_pb2.WakeUpSessionRequest(reports=reports, credits=credit))
                if not self._draining.is_set():
                    await asyncio.sleep(WRITE_PAUSE_S)
                continue
            if self._draining.is_set() and not session.reports and (session.held == 0 or self._drain_is_over):
                await call.done_writing()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await session.changed.wait()

    def _credits(self) -> list[mailbox_pb2.LaneCredit]:
        return [
            mailbox_pb2.LaneCredit(app_id=lane.app_id, platform=common_pb2.Platform.ValueType(lane.platform), credit=credit)
            for lane in self._lanes
            if (credit := lane.take_credit())
        ]

    def _next_look_s(self) -> float | None:
        """Seconds until a broken lane may try again, at most `LOOK_PERIOD_S`; None: nothing waits for a time."""
        waits = [closed_for for lane in self._lanes if (closed_for := lane.closed_for) is not None]
        return min(max(min(waits).total_seconds(), LOOK_PERIOD_S / 10), LOOK_PERIOD_S) if waits else None

    # A frame

    def _accept(self, session: _Session, wake_ups: Iterable[mailbox_pb2.WakeUp]) -> None:
        to_push: list[_Held] = []
        # The mailbox chooses by priority and hands out in any order.
        for wake_up in sorted(wake_ups, key=lambda each: -each.priority):
            lane = self._lanes.for_wake_up(wake_up.app_id, wake_up.platform)
            if lane is None:
                log.error("the mailbox sent a wake-up for a lane that got no credit", app=wake_up.app_id, platform=wake_up.platform)
                continue
            held = _Held(session, lane, wake_up, self._clock)
            refusal = lane.refusal()
            if refusal is not None:
                held.release(refusal)
            else:
                # Whether it is over its time is the mailbox's to say, by its own clock: it hands out nothing that is.
                to_push.append(held)
        if to_push:
            self._start(self._push(to_push))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _push(self, frame: Sequence[_Held]) -> None:
        """Learn the tokens of a whole frame at once, then send all concurrently."""
        handed_on = 0
        try:
            device_ids = list(dict.fromkeys(held.wake_up.device_id for held in frame))
            targets = dict(zip(device_ids, await self._targets.submit_many(device_ids), strict=True))
            self._resolving.worked()
            for held in frame:
                self._push_one(held, targets[held.wake_up.device_id])
                handed_on += 1
        except ServiceError as e:
            self._resolving.failed(e, count=len(frame))
            delay = DIRECTORY_PAUSE * (1 + self._random())
            for held in frame:
                held.release(Release(delay, "directory-unavailable"))
        except Exception as e:
            log.error("a frame of wake-ups failed by a bug", exc_info=e)
            for held in frame[handed_on:]:
                held.release(Release(BUG_PAUSE, "internal-error"))
        except asyncio.CancelledError:
            for held in frame[handed_on:]:
                held.settle()
            raise

    def _push_one(self, held: _Held, found: directory_pb2.PushTarget) -> None:
        if not held.live:
            held.settle()
            return
        wake_up, lane = held.wake_up, held.lane
        if not found.push_token or found.platform not in (common_pb2.PLATFORM_UNSPECIFIED, wake_up.platform):
            self._without_token(held, found)
            return
        try:
            target = to_target(found, lane.topic)
        except ValueError:
            # Without its text: it might quote the token.
            held.report(Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_PUSH_QUARANTINED, detail="unreadable-token")
            return
        suspect = lane.set_aside_for(wake_up.device_id, target.registered_at)
        if suspect is not None:
            held.report(Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_PUSH_QUARANTINED, detail=suspect)
            return
        admission = lane.admit()
        if isinstance(admission, Release):
            held.release(admission)
            return
        self._start(self._send(held, target, admission))

    # One send

    async def _send(self, held: _Held, target: PushTarget, send: Send) -> None:
        lane = held.lane
        observed = False
        try:
            ours = target.topic == send.provider.topic or not send.provider.topic
            outcome = await send.provider.send(target, to_wake_up(held.wake_up, held.expires_at))
            decision = decide(excuse_lane(outcome, topic_of_lane=ours), held.attempt, self._random)
            if send.provider is not lane.provider:
                decision = excuse_new_credential(decision, held.attempt)
            observed = True
            lane.observe(send, outcome, decision)
            match decision:
                case Pushed():
                    held.report(Outcome.WAKE_UP_OUTCOME_PUSHED)
                case Retry(delay=delay, reason=reason):
                    held.report(Outcome.WAKE_UP_OUTCOME_RETRY, delay=delay, reason=common_pb2.REASON_CODE_PROVIDER_ERROR, detail=reason)
                case StopLane(reason=reason):
                    # It waits for the lane and not for a time.
                    held.report(
                        Outcome.WAKE_UP_OUTCOME_RETRY, delay=PAUSED_RETRY, reason=common_pb2.REASON_CODE_PROVIDER_ERROR, detail=reason
                    )
                case TokenDead(certain=True):
                    await self._forget(held, target, decision)
                case TokenDead(reason=reason):
                    # Forget with care: the token may be good in the other environment, so it stays stored and the delivery stays
                    # fetchable; nothing more is sent to this registration.
                    lane.set_aside(held.wake_up.device_id, target.registered_at, reason, asked=outcome.asked)
                    held.report(Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_PUSH_QUARANTINED, detail=reason)
                case Quarantine(reason=reason):
                    held.report(Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_PUSH_QUARANTINED, detail=reason)
        except Exception as e:
            log.error("a send failed by a bug", app=lane.app_id, platform=lane.platform, error=type(e).__name__)
            self._retry(held, "internal-error")
        finally:
            if not observed:
                lane.abandon(send)
            held.settle()

    async def _forget(self, held: _Held, target: PushTarget, dead: TokenDead) -> None:
        """Compare-and-clear, and what follows for this delivery."""
        token = directory_pb2.DeadToken(device_id=held.wake_up.device_id, push_token=target.token.reveal())
        if dead.gone_at is not None:
            token.dead_at.CopyFrom(_timestamp(dead.gone_at))
        try:
            gone = await self._dead_tokens.submit(token)
            self._reporting.worked()
            if not gone:
                present = await self._targets.submit(held.wake_up.device_id)
                if not present.push_token:
                    # Somebody else told it before, or the app took its token back.
                    self._without_token(held, present)
                    return
                if present.push_token != target.token.reveal():
                    # The device registered a newer one meanwhile: try that at once.
                    self._retry(held, "new-token", timedelta(0))
                    return
                # The same token, still there: the device's word is newer than the push service's.
        except ServiceError as e:
            self._reporting.failed(e)
            gone = False
        if gone:
            held.report(Outcome.WAKE_UP_OUTCOME_TOKEN_GONE, reason=common_pb2.REASON_CODE_TOKEN_GONE, detail=dead.reason)
        else:
            self._retry(held, dead.reason)

    def _without_token(self, held: _Held, found: directory_pb2.PushTarget) -> None:
        """Nothing to push to: what becomes of the delivery depends on why."""
        if found.token_gone:
            held.report(Outcome.WAKE_UP_OUTCOME_TOKEN_GONE, reason=common_pb2.REASON_CODE_TOKEN_GONE, detail="the token died before")
        else:
            # Only the push is given up: a device that merely has no token keeps its mailbox.
            held.report(
                Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_NO_PUSH_TOKEN, detail="the device has no push token"
            )

    def _retry(self, held: _Held, reason: str, delay: timedelta | None = None) -> None:
        if held.attempt >= ATTEMPTS_MAX:
            held.report(Outcome.WAKE_UP_OUTCOME_QUARANTINED, reason=common_pb2.REASON_CODE_PUSH_QUARANTINED, detail=reason)
            return
        if delay is None:
            delay = backoff(held.attempt, self._random)
        held.report(Outcome.WAKE_UP_OUTCOME_RETRY, delay=delay, reason=common_pb2.REASON_CODE_PROVIDER_ERROR, detail=reason)


def to_target(found: directory_pb2.PushTarget, lane_topic: str) -> PushTarget:
    """Raises ValueError when the token cannot be one."""
    environment = PushEnvironment.SANDBOX if found.environment == _SANDBOX else PushEnvironment.PRODUCTION
    return PushTarget(PushToken(found.push_token), environment, found.topic or lane_topic, _moment(found.registered_at))


def lifetime_left(wake_up: mailbox_pb2.WakeUp, now: datetime) -> timedelta:
    """What is left of its lifetime, as the mailbox says. One of the release before names the end only, and `now` has to do."""
    left = wake_up.expires_in.ToTimedelta() if wake_up.HasField("expires_in") else _moment(wake_up.expires_at) - now
    return min(max(left, timedelta(0)), LIFETIME_MAX)


def to_wake_up(wake_up: mailbox_pb2.WakeUp, expires_at: datetime) -> WakeUp:
    """Only what is marked as low may wait until the phone is awake for another reason."""
    priority = WakeUpPriority.NORMAL if wake_up.priority == common_pb2.PRIORITY_LOW else WakeUpPriority.HIGH
    return WakeUp(wake_up.wake_up_id, wake_up.muted, priority, expires_at)


def _moment(stamp: Timestamp) -> datetime:
    return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
