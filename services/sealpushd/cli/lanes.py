"""`sealpush lanes`: how pushes go, by platform of an app, and an operator's hand on them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from sealpushd.cli.errors import WronglyCalled
from sealpushd.cli.installation import Installation, installation_of
from sealpushd.cli.providers import app_argument, platform_argument, platform_name, platform_number
from sealpushd.cli.tables import table

if TYPE_CHECKING:
    from sealpushd.v1 import lanes_pb2, mailbox_pb2

_ERRORS_SHOWN: Final = 5
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(invoke_without_command=True, short_help="Show and steer the lanes of the push services.")
@_json
@installation_of("dispatch", "fetch")
def lanes(installation: Installation, as_json: bool) -> None:
    """Show the lanes: one a platform of an app, each on its own.

    QUEUED wait for their push, OLDEST for how long; SENT/S is the rate of the last minute; WINDOW is how many may be on the
    way at once now. Rates and errors are those of the dispatch process that is asked, the queues are everybody's.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        # They would be lost, and the command would go to another installation.
        given = [name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if given:
            raise WronglyCalled(f"write the options behind `{context.invoked_subcommand}`: `sealpush lanes {context.invoked_subcommand} …`")
        return
    from sealpushd.v1 import lanes_pb2, mailbox_pb2
    from sealpushd.v1.lanes_pb2_grpc import LanesStub
    from sealpushd.v1.mailbox_pb2_grpc import MailboxStub

    listed = installation.service("dispatch").call(LanesStub, "ListLanes", lanes_pb2.ListLanesRequest()).lanes
    found = installation.service("fetch").call(MailboxStub, "GetQueues", mailbox_pb2.GetQueuesRequest()).queues
    queues = {(queue.app_id, queue.platform): queue for queue in found}
    now = datetime.now(UTC)
    if as_json:
        told = [_to_json(lane, queues.pop((lane.app_id, lane.platform), None), now) for lane in listed]
        # What waits and has no lane is what an operator must see most.
        told += [
            {"app_id": one.app_id, "platform": platform_name(one.platform), "state": "no lane", **_queue_json(one, now)}
            for one in queues.values()
        ]
        click.echo(json.dumps(told, indent=1))
        return
    rows = [_row(lane, queues.pop((lane.app_id, lane.platform), None), now) for lane in listed]
    rows += [
        (app_id, platform_name(platform), "-", "NO LANE", *_queue(queue, now), *("-",) * 4) for (app_id, platform), queue in queues.items()
    ]
    if not rows:
        click.echo("there are no lanes: put a credential with `sealpush providers add`")
        return
    head = ("APP", "PLATFORM", "SERVICE", "STATE", "QUEUED", "OLDEST", "QUARANTINED", "IN FLIGHT", "WINDOW", "SENT/S", "SENT")
    click.echo(table(head, rows))
    for lane in listed:
        _tell(lane, now)
    for app_id, platform in queues:
        name = platform_name(platform)
        click.echo(f"\n{app_id} {name}: nothing pushes it; put a credential with `sealpush providers add {app_id} {name}`")


@lanes.command(short_help="Push nothing until it is resumed.")
@app_argument
@platform_argument
@installation_of("dispatch")
def pause(installation: Installation, app_id: str, platform: str) -> None:
    """Push nothing for APP_ID on PLATFORM until it is resumed. What waits stays queued; phones can still fetch it."""
    from sealpushd.v1 import lanes_pb2
    from sealpushd.v1.lanes_pb2_grpc import LanesStub

    request = lanes_pb2.PauseLaneRequest(
        app_id=app_id,
        platform=platform_number(platform),
    )
    installation.service("dispatch").call(LanesStub, "PauseLane", request)
    click.echo(f"paused: {app_id} on {platform}")


@lanes.command(short_help="Push again, and forget what broke it.")
@app_argument
@platform_argument
@installation_of("dispatch")
def resume(installation: Installation, app_id: str, platform: str) -> None:
    """Push again for APP_ID on PLATFORM, at once: its circuit breaker closes, and tokens that were set aside are tried again."""
    from sealpushd.v1 import lanes_pb2
    from sealpushd.v1.lanes_pb2_grpc import LanesStub

    request = lanes_pb2.ResumeLaneRequest(
        app_id=app_id,
        platform=platform_number(platform),
    )
    installation.service("dispatch").call(LanesStub, "ResumeLane", request)
    click.echo(f"resumed: {app_id} on {platform}")


@lanes.command(short_help="Push again what was given up.")
@app_argument
@platform_argument
@installation_of("dispatch")
def requeue(installation: Installation, app_id: str, platform: str) -> None:
    """Push again what was given up for APP_ID on PLATFORM (QUARANTINED), with eight new tries each.

    Resumes the lane as well, unless it is paused: then they wait for `resume`.
    """
    from sealpushd.v1 import lanes_pb2
    from sealpushd.v1.lanes_pb2_grpc import LanesStub

    request = lanes_pb2.RequeueLaneRequest(
        app_id=app_id,
        platform=platform_number(platform),
    )
    dispatch = installation.service("dispatch")
    requeued, more = 0, True
    while more:
        answer = dispatch.call(LanesStub, "RequeueLane", request)
        requeued, more = requeued + answer.requeued, answer.more
    click.echo(f"requeued: {requeued} of {app_id} on {platform}")


def _state(lane: lanes_pb2.Lane) -> str:
    from sealpushd.v1 import lanes_pb2

    return lanes_pb2.LaneState.Name(lane.state).removeprefix("LANE_STATE_").lower()


def _queue(queue: mailbox_pb2.Queue | None, now: datetime) -> tuple[str, str, str]:
    if queue is None:
        return "0", "-", "0"
    return str(queue.waiting), _age(queue, now), str(queue.quarantined)


def _row(lane: lanes_pb2.Lane, queue: mailbox_pb2.Queue | None, now: datetime) -> tuple[str, ...]:
    state = _state(lane)
    return (
        lane.app_id,
        platform_name(lane.platform),
        lane.push_service or "-",
        state if state == "open" else state.upper(),
        *_queue(queue, now),
        str(lane.in_flight),
        str(lane.window),
        f"{lane.rate_per_second:.1f}",
        str(lane.accepted),
    )


def _tell(lane: lanes_pb2.Lane, now: datetime) -> None:
    """What there is to say about a lane that a table cannot hold: why it is not well, its errors, its receipts."""
    lines = []
    if _state(lane) != "open" or lane.detail != "takes wake-ups":
        again = f" (tries again in {_seconds(lane.next_try_at.ToDatetime(UTC) - now)})" if lane.HasField("next_try_at") else ""
        lines.append(f"{lane.detail}{again}")
    for error in lane.errors[:_ERRORS_SHOWN]:
        last = _seconds(now - error.last_at.ToDatetime(UTC))
        lines.append(f"{error.count} × {error.reason}, last {last} ago: {error.advice}")
    if len(lane.errors) > _ERRORS_SHOWN:
        lines.append(f"and {len(lane.errors) - _ERRORS_SHOWN} more reasons, see --json")
    if lane.receipts:
        lines.append("receipts: " + ", ".join(f"{count} {word}" for word, count in sorted(lane.receipts.items())))
    if lines:
        click.echo(f"\n{lane.app_id} {platform_name(lane.platform)}: " + "\n  ".join(lines))


def _age(queue: mailbox_pb2.Queue, now: datetime) -> str:
    return _seconds(now - queue.oldest_at.ToDatetime(UTC)) if queue.HasField("oldest_at") else "-"


def _seconds(duration: Any) -> str:
    seconds = max(duration.total_seconds(), 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _to_json(lane: lanes_pb2.Lane, queue: mailbox_pb2.Queue | None, now: datetime) -> dict[str, Any]:
    return {
        "app_id": lane.app_id,
        "platform": platform_name(lane.platform),
        "push_service": lane.push_service or None,
        "state": _state(lane),
        "suspicious": lane.is_suspicious,
        "detail": lane.detail,
        **_queue_json(queue, now),
        "in_flight": lane.in_flight,
        "window": lane.window,
        "rate_per_second": lane.rate_per_second,
        "accepted": lane.accepted,
        "retried": lane.retried,
        "dead_tokens": lane.dead_tokens,
        "failures_in_a_row": lane.failures_in_a_row,
        "next_try_at": lane.next_try_at.ToJsonString() if lane.HasField("next_try_at") else None,
        "errors": [
            {"reason": each.reason, "count": each.count, "advice": each.advice, "last_at": each.last_at.ToJsonString()}
            for each in lane.errors
        ],
        "receipts": dict(lane.receipts),
    }


def _queue_json(queue: mailbox_pb2.Queue | None, now: datetime) -> dict[str, Any]:
    if queue is None:
        return {"queued": 0, "due": 0, "oldest_seconds": None, "quarantined": 0}
    oldest = (now - queue.oldest_at.ToDatetime(UTC)).total_seconds() if queue.HasField("oldest_at") else None
    return {"queued": queue.waiting, "due": queue.due, "oldest_seconds": oldest, "quarantined": queue.quarantined}
