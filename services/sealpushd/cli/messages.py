"""Commands of a sender beside a running `sealpush up`: send, status, cancel, explain, receipt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from sealpushd.cli import files
from sealpushd.cli.errors import CommandFailed, WronglyCalled
from sealpushd.cli.options import data_dir_option
from sealpushd.cli.types import DURATION

if TYPE_CHECKING:
    from sealpush.ids import MessageId
    from sealpush.publication import MessageStatus, PublishOptions
    from sealpush.receipts import Receipt
    from sealpush.sender import Sender

Answer = TypeVar("Answer")

_PRIORITIES: Final = ("low", "normal", "high")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of a table.")
_from = click.option(
    "--from", "sender_name", help="Name of the sender. Default: to send, the organisation's default; otherwise whichever sent the message."
)
_message_id = click.argument("message_id")


@click.command(short_help="Send a text to a phone number.")
@click.argument("phone")
@click.argument("text")
@click.option("--title", default="", help="Title of the message.")
@_from
@click.option("--advertising", is_flag=True, help="It is advertising: who blocks this sender's does not get it.")
@click.option("--priority", type=click.Choice(_PRIORITIES), default="normal", show_default=True, help="High: one-time codes and alike.")
@click.option("--lifetime", type=DURATION, help="How long it is worth delivering: 90s, 1h; 1s to 28d. Default: 14 days.")
@click.option("--sealed", is_flag=True, help="Seal it here, so that the server cannot read it.")
@click.option("--replace-key", default="", help="Take the place of the message with the same key.")
@click.option("--tag", default="", help="A word of your own, given back in statuses.")
@click.option("--request-id", help="Idempotency key: sending again with the same one sends nothing twice. Default: a new one.")
@click.option("--wait", type=DURATION, help="Wait this long for the message to end: 10s. Exit code 0 only if it was delivered.")
@_json
@data_dir_option
def send(
    phone: str,
    text: str,
    title: str,
    sender_name: str | None,
    advertising: bool,
    priority: str,
    lifetime: timedelta | None,
    sealed: bool,
    replace_key: str,
    tag: str,
    request_id: str | None,
    wait: timedelta | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Send TEXT to PHONE (+380501234567) through a running `sealpush up`.

    Exit code 0: accepted, and with --wait delivered. 1: anything else; the output says what.
    """
    from sealpush.model import ContentClass, Priority
    from sealpush.publication import Accepted, NotRegistered, Publication, Unanswered
    from sealpush.v1 import common_pb2
    from sealpush.v1.content_pb2 import Content
    from sealpushd.cli.reasons import explanation

    if not title and not text:
        # Once it is sealed the server cannot tell.
        raise WronglyCalled("the message is empty: give a text or a --title")
    content_class = ContentClass.ADVERTISING if advertising else ContentClass.INFORMATIONAL
    options: PublishOptions = {"request_id": request_id, "priority": Priority[priority.upper()], "lifetime": lifetime, "tag": tag}
    try:
        content = Content(title=title, body=text, content_class=common_pb2.ContentClass.ValueType(content_class), replace_key=replace_key)
        # Judged before anybody is called; and the id is known whatever happens.
        options["request_id"] = Publication.of(phone, content, **options).request_id
    except ValueError as e:
        raise WronglyCalled(str(e)) from e

    async def work() -> int:
        async with _senders(data_dir) as open_sender:
            sender = open_sender(sender_name or "", sealed)
            publish = sender.publish_sealed if sealed else sender.publish
            outcome = await publish(phone, content, **options)
            if isinstance(outcome, NotRegistered):
                known = explanation(outcome.reason)
                if as_json:
                    _print_json({"request_id": outcome.request_id, "state": "NOT_REGISTERED", "reason": outcome.reason.name})
                else:
                    click.echo(f"NOT_REGISTERED  {known.happened} {known.advice}")
                return 1
            if isinstance(outcome, Unanswered):
                raise CommandFailed(f"{outcome.message} ({outcome.reason}); {_unanswered(outcome.request_id, sealed)}")
            if not isinstance(outcome, Accepted):
                raise CommandFailed(f"{outcome.message} ({outcome.reason})")
            if wait is None:
                if as_json:
                    _print_json({"request_id": outcome.request_id, "message_id": _text(outcome.message_id), "devices": outcome.devices})
                else:
                    devices = "1 device" if outcome.devices == 1 else f"{outcome.devices} devices"
                    click.echo(f"accepted {_text(outcome.message_id)} for {devices}")
                return 0
            status = await _wait(sender, outcome.message_id, wait)
            _show(status, as_json)
            return 0 if status.state.name == "DELIVERED" else 1

    _exit(_run(work()))


def _unanswered(request_id: str, sealed: bool) -> str:
    """What to do when nobody knows whether a message was accepted."""
    advice = f"it may have been accepted: send it again with --request-id {request_id}, which sends nothing twice"
    # Sealing anew makes other bytes, so the same id cannot give the first answer.
    return f"{advice}; ALREADY_EXISTS then says that it was" if sealed else advice


@click.command(short_help="Show how far a message has come.")
@_message_id
@click.option("--watch", is_flag=True, help="Go on until the message has ended.")
@_from
@_json
@data_dir_option
def status(message_id: str, watch: bool, sender_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Show how far MESSAGE_ID has come."""

    async def work() -> None:
        wanted = _parse(message_id)
        async with _senders(data_dir) as open_sender:
            sender, found = await _find(open_sender, data_dir, sender_name, wanted)
            _show(found, as_json)
            if watch and not found.state.terminal:
                async for changed in sender.watch([wanted]):
                    if changed != found:
                        _show(changed, as_json)

    _run(work())


@click.command(short_help="Stop a message where it has not arrived.")
@_message_id
@_from
@_json
@data_dir_option
def cancel(message_id: str, sender_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Stop MESSAGE_ID where it has not arrived, and say whether a push may have left. Exit code 0 if it is cancelled."""

    async def work() -> int:
        wanted = _parse(message_id)
        async with _senders(data_dir) as open_sender:
            sender, _ = await _find(open_sender, data_dir, sender_name, wanted)
            cancelled = await sender.cancel(wanted)
        deliveries = [
            {"device_id": _text(each.device_id), "stop_point": each.stop_point.name, "state": each.state.name}
            for each in cancelled.deliveries
        ]
        if as_json:
            _print_json({"message_id": message_id, "state": cancelled.state.name, "deliveries": deliveries})
        else:
            click.echo(f"{message_id}  {cancelled.state.name}")
            for each in deliveries:
                click.echo(f"  device {each['device_id'][-8:]}  {each['state']:<12} {each['stop_point']}")
        return 0 if cancelled.state.name == "CANCELLED" else 1

    _exit(_run(work()))


@click.command(short_help="Say in words what happened to a message.")
@_message_id
@_from
@data_dir_option
def explain(message_id: str, sender_name: str | None, data_dir: Path) -> None:
    """Say in words what happened to MESSAGE_ID, which precondition failed, and what to do."""

    async def work() -> MessageStatus:
        async with _senders(data_dir) as open_sender:
            return (await _find(open_sender, data_dir, sender_name, _parse(message_id)))[1]

    for line in explained(_run(work())):
        click.echo(line)


def explained(status: MessageStatus) -> list[str]:
    """A status in words: pure."""
    from sealpushd.cli.reasons import STATES, explanation

    lines = [f"Message {_text(status.message_id)} {STATES.get(status.state, 'is in a state that this version does not know')}."]
    if status.reason:
        known = explanation(status.reason)
        lines += [f"  {known.happened}", f"  What to do: {known.advice}"]
    for number, each in enumerate(status.deliveries, 1):
        lines.append(f"Device {number} ({_text(each.device_id)[-8:]}): the message {STATES.get(each.state, 'is in an unknown state')}.")
        reasons = [reason for reason in (each.reason, each.push_reason) if reason and reason != status.reason]
        for reason in dict.fromkeys(reasons):
            known = explanation(reason)
            lines.append(f"  {known.happened}")
            # What was in the push's way needs nothing any more once the delivery has ended.
            if reason == each.reason or not each.state.terminal:
                lines.append(f"  What to do: {known.advice}")
        if each.late_ack_at is not None:
            lines.append(f"  It acknowledged later, at {each.late_ack_at:%Y-%m-%d %H:%M:%S} UTC: it may have been shown after all.")
    if not status.state.terminal:
        lines.append(f"It is tried until {status.expires_at:%Y-%m-%d %H:%M:%S} UTC.")
    return lines


@click.command(short_help="Show what is proven about a message, or verify a receipt.")
@click.argument("message_id", required=False)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the receipt to this file, for whoever verifies it later."
)
@click.option("--verify", "given", type=files.EXISTING, metavar="FILE", help="Verify the receipt in this file, without any installation.")
@click.option(
    "--root-public-key", metavar="HEX", help="The root that the app pins, from a source of its own. Default: that of the running `up`."
)
@click.option("--envelope", type=files.EXISTING, help="The envelope, if the sender kept it: compare it with what was signed.")
@click.option(
    "--revocations", type=files.EXISTING, metavar="LIST", help="The root's newest revocation list: see whether it takes back the key."
)
@_from
@_json
@data_dir_option
def receipt(
    message_id: str | None,
    out: Path | None,
    given: Path | None,
    root_public_key: str | None,
    envelope: Path | None,
    revocations: Path | None,
    sender_name: str | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Show what is proven about MESSAGE_ID and what is not: who sealed and signed it, and what its devices signed.

    With --verify FILE the same for a receipt that somebody else has, offline, by the root's public key alone.
    Exit code 0 only if the sender's part is proven and nothing in the receipt fails to verify.
    """
    from sealpush.envelope import ENVELOPE_BYTES_MAX
    from sealpush.receipts import verify_receipt
    from sealpushd.cli import receipts
    from sealpushd.up.endpoints import Endpoints

    if (message_id is None) == (given is None):
        raise WronglyCalled("give either a message id or --verify FILE")
    if given is not None and (out is not None or root_public_key is None):
        raise WronglyCalled("--verify needs --root-public-key, and no --out: the file is there already")
    root = files.parse_key(Endpoints.load(data_dir).root_public_key if root_public_key is None else root_public_key, "--root-public-key")
    kept = None if envelope is None else files.read(envelope, ENVELOPE_BYTES_MAX)
    revoked = None if revocations is None else receipts.read_revocations(revocations, root)

    async def fetch(wanted: MessageId) -> Receipt:
        async with _senders(data_dir) as open_sender:
            sender, _ = await _find(open_sender, data_dir, sender_name, wanted)
            return await sender.receipt(wanted)

    found = receipts.read_receipt(given) if given is not None else _run(fetch(_parse(message_id or "")))
    if out is not None:
        try:
            out.write_text(found.to_json(), encoding="ascii")
        except OSError as e:
            raise WronglyCalled(f"{out} cannot be written: {e.strerror}") from e
    verdict = verify_receipt(found, root, envelope=kept, revocations=revoked)
    if as_json:
        _print_json(receipts.as_document(found, verdict, root))
    else:
        click.echo("\n".join(receipts.as_lines(found, verdict, root)))
    _exit(0 if verdict.sender_proven else 1)


# Finding the sender


@asynccontextmanager
async def _senders(data_dir: Path) -> AsyncIterator[Callable[[str, bool], Sender]]:
    """What opens a sender of the running demo by name, all over the same connections."""
    from sealpush.sender import Sender
    from sealpush.transport import Channels
    from sealpushd.up.endpoints import Endpoints
    from sealpushd.up.sdk import content_key, public_endpoints

    endpoints = Endpoints.load(data_dir)

    def open_sender(name: str, sealed: bool) -> Sender:
        if name and name not in endpoints.senders:
            raise WronglyCalled(f"there is no sender {name!r}; there are: {', '.join(endpoints.senders)}")
        key = content_key(endpoints, name) if sealed else None
        return Sender(channels, endpoints.login, endpoints.password, sender_name=name, signing_key=key)

    async with Channels(public_endpoints(endpoints)) as channels:
        yield open_sender


async def _find(
    open_sender: Callable[[str, bool], Sender], data_dir: Path, name: str | None, message_id: MessageId
) -> tuple[Sender, MessageStatus]:
    """The sender that a message is of, and its status."""
    from sealpush.errors import NotFound
    from sealpushd.up.endpoints import Endpoints

    for candidate in [name] if name else Endpoints.load(data_dir).senders:
        sender = open_sender(candidate, False)
        try:
            return sender, await sender.status(message_id)
        except NotFound:
            continue
    raise CommandFailed(f"no sender here has a message {_text(message_id)}: check the id, or it is older than its retention")


async def _wait(sender: Sender, message_id: MessageId, longest: timedelta) -> MessageStatus:
    """The status once it is terminal, or as it is when the time is over."""
    latest = None
    try:
        async with asyncio.timeout(longest.total_seconds()):
            async for latest in sender.watch([message_id]):  # noqa: B007 - the last one is used below
                pass
    except TimeoutError:
        pass
    return latest or await sender.status(message_id)


# Showing


def _parse(message_id: str) -> MessageId:
    from sealpush.ids import MessageId, parse_uuid

    try:
        return MessageId(parse_uuid(message_id))
    except ValueError as e:
        raise WronglyCalled(
            f"{message_id!r} is no message id: it looks like 0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b, as `send` printed it"
        ) from e


def _text(value: bytes) -> str:
    from sealpush.ids import uuid_text

    return uuid_text(value)


def as_document(status: MessageStatus) -> dict[str, Any]:
    """A status as JSON: states and reasons by name, times as ISO 8601."""

    def at(moment: datetime | None) -> str | None:
        return None if moment is None else moment.isoformat()

    return {
        "message_id": _text(status.message_id),
        "state": status.state.name,
        "reason": status.reason.name if status.reason else None,
        "created_at": at(status.created_at),
        "at": at(status.at),
        "expires_at": at(status.expires_at),
        "tag": status.tag,
        "deliveries": [
            {
                "device_id": _text(each.device_id),
                "state": each.state.name,
                "reason": each.reason.name if each.reason else None,
                "push_reason": each.push_reason.name if each.push_reason else None,
                "pushed_at": at(each.pushed_at),
                "fetched_at": at(each.fetched_at),
                "at": at(each.at),
                "read_at": at(each.read_at),
                "late_ack_at": at(each.late_ack_at),
            }
            for each in status.deliveries
        ],
    }


def _show(status: MessageStatus, as_json: bool) -> None:
    if as_json:
        _print_json(as_document(status))
        return
    reason = f" ({status.reason.name})" if status.reason else ""
    click.echo(f"{_text(status.message_id)}  {status.state.name}{reason}  after {_ms(status.created_at, status.at)}")
    for each in status.deliveries:
        steps = [
            f"{word} {_ms(status.created_at, moment)}"
            for word, moment in (("pushed", each.pushed_at), ("fetched", each.fetched_at))
            if moment
        ]
        last = f"{each.state.name.lower()} {_ms(status.created_at, each.at)}"
        if last not in steps:
            steps.append(last)
        why = next((f"  {reason.name}" for reason in (each.reason, each.push_reason) if reason and reason != status.reason), "")
        click.echo(f"  device {_text(each.device_id)[-8:]}  {each.state.name:<12} {', '.join(steps)}{why}")


def _ms(since: datetime, moment: datetime) -> str:
    return f"{max(0, round((moment - since) / timedelta(milliseconds=1)))} ms"


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document))


def _run(work: Coroutine[Any, Any, Answer]) -> Answer:
    return asyncio.run(work)


def _exit(code: int) -> None:
    if code:
        raise click.exceptions.Exit(code)
