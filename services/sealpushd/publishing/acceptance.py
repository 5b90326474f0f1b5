"""Accepting messages: looked up, resolved, sealed and stored in batches, whatever way they came in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sealpush.ids import MessageId, uuid7
from sealpush.v1 import common_pb2, keys_pb2, publish_pb2
from sealpushd.platform import errors
from sealpushd.platform.clients import BatchedCall
from sealpushd.platform.clock import Clock, to_ms
from sealpushd.platform.errors import AlreadyExists, FailedPrecondition, InvalidRequest, ServiceError
from sealpushd.platform.tokens import SenderCaller
from sealpushd.platform.vault import Vault
from sealpushd.publishing import rules
from sealpushd.publishing.peers import Peers
from sealpushd.publishing.rules import Publication, Standing
from sealpushd.v1 import directory_pb2, mailbox_pb2, sealing_pb2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Candidate:
    """A message on its way through the steps; `outcome` is set as soon as it is decided."""

    request: publish_pb2.PublishRequest = field(repr=False)
    outcome: publish_pb2.PublishResult | ServiceError | None = None
    publication: Publication | None = None
    standing: Standing | None = None
    key: mailbox_pb2.AcceptedKey | None = None
    resolved: directory_pb2.Resolved | None = None
    blocked: int = 0
    content_id: bytes = b""
    head: bytes = b""
    tail: bytes = b""
    stanzas: dict[bytes, bytes] = field(default_factory=dict)


class Acceptance:
    """Takes requests of one sender and answers each: with a result, or with the error that refuses it."""

    def __init__(self, peers: Peers, vault: Vault, clock: Clock) -> None:
        self._peers = peers
        self._vault = vault
        self._clock = clock

    async def accept(
        self, caller: SenderCaller, requests: Sequence[publish_pb2.PublishRequest]
    ) -> list[publish_pb2.PublishResult | ServiceError]:
        """An outcome for each request, in their order. Raises ServiceError only where no request could be decided."""
        candidates = [_Candidate(request) for request in requests]
        self._identify(caller, candidates)
        await self._look_up_and_resolve(caller, _open(candidates))
        await self._check_sealed(_open(candidates))
        await self._check_blocked(_open(candidates))
        await self._seal(caller, _open(candidates))
        await self._store(caller, _open(candidates))
        return [_decided(candidate) for candidate in candidates]

    def _identify(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        for candidate in candidates:
            try:
                rules.check_request_id(candidate.request.request_id)
            except ServiceError as e:
                candidate.outcome = e
                continue
            # The MAC covers what was received, so it is made before anything is filled in.
            mac = self._vault.lookup(candidate.request.SerializeToString(deterministic=True), "request")
            candidate.key = mailbox_pb2.AcceptedKey(sender_id=caller.sender_id, request_id=candidate.request.request_id, request_mac=mac)

    async def _look_up_and_resolve(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        """What was accepted once gets the first answer again, whatever has passed meanwhile: the time of an envelope, the sender's
        entry, the recipient's registration. So the look-up has the last word; the recipient is asked for at the same time."""
        if not candidates:
            return
        keys = [_key(candidate) for candidate in candidates]
        looking_up = asyncio.ensure_future(_ask(self._peers.lookup_accepted, candidates, keys))
        failure: ServiceError | None = None
        try:
            await self._parse(caller, candidates)
            await self._resolve(caller, _open(candidates))
        except ServiceError as e:
            failure = e
        except BaseException:
            looking_up.cancel()
            raise
        for candidate, accepted in await looking_up:
            if accepted.message_id:
                candidate.outcome = _repeated(candidate, accepted)
        if failure is not None and _open(candidates):
            raise failure

    async def _parse(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        now = self._clock.now()
        try:
            standing = await self._peers.standing(caller.sender_id)
        except FailedPrecondition as e:
            # Only what is new: what was accepted before has its answer already.
            for candidate in candidates:
                candidate.outcome = e
            return
        for candidate in candidates:
            try:
                candidate.publication = rules.parse_publish(candidate.request, caller.sender_id, caller.app_ids, now)
                rules.check_standing(candidate.publication, standing, now)
                candidate.standing = standing
            except ServiceError as e:
                candidate.outcome = e

    async def _resolve(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        queries = [
            directory_pb2.ResolveQuery(
                recipient=candidate.request.recipient,
                app_id=_publication(candidate).app_id,
                sender_id=caller.sender_id,
                primary_only=candidate.request.primary_only,
                subscriptions=candidate.request.subscriptions,
                platforms=candidate.request.platforms,
            )
            for candidate in candidates
        ]
        for candidate, result in await _ask(self._peers.resolve, candidates, queries):
            match result.WhichOneof("outcome"):
                case "resolved":
                    candidate.resolved = result.resolved
                    candidate.blocked = rules.blocked_reason(
                        candidate.request.content_class,
                        block_all=result.resolved.block_all,
                        block_advertising=result.resolved.block_advertising,
                    )
                case "invalid":
                    candidate.outcome = InvalidRequest(result.invalid, field="recipient")
                case _:
                    candidate.outcome = publish_pb2.PublishResult(
                        request_id=candidate.request.request_id,
                        not_registered=publish_pb2.NotRegistered(reason_code=result.not_registered),
                    )

    async def _check_sealed(self, candidates: Sequence[_Candidate]) -> None:
        sealed = [candidate for candidate in candidates if _publication(candidate).envelope is not None]
        checks = []
        for candidate in sealed:
            envelope, resolved = _publication(candidate).envelope, _resolved(candidate)
            assert envelope is not None  # noqa: S101 - by the choice above
            checks.append(
                sealing_pb2.StanzaCheck(
                    sender_id=envelope.header.sender_id,
                    subscriber_id=resolved.subscriber_id,
                    device_ids=[device.device_id for device in resolved.devices],
                    stanzas=[
                        sealing_pb2.StanzaKey(
                            device_id=stanza.device_id,
                            suite=stanza.suite,
                            prekey_id=stanza.prekey_id,
                            kind=keys_pb2.PrekeyKind.ValueType(stanza.kind),
                        )
                        for stanza in envelope.stanzas
                    ],
                    recipient_ref=envelope.header.recipient_ref,
                    added_until_ms=_added_until_ms(candidate),
                )
            )
            candidate.content_id = envelope.header.content_id
            candidate.head, candidate.tail = envelope.head, envelope.tail
            candidate.stanzas = {stanza.device_id: stanza.encode() for stanza in envelope.stanzas}
        for candidate, verdict in await _ask(self._peers.check_stanzas, sealed, checks):
            if verdict.foreign_recipient_ref:
                candidate.outcome = InvalidRequest(
                    "the envelope's recipient_ref is not this sender's for this recipient; ask for the recipient's keys",
                    field="sealed.envelope",
                )
            elif verdict.HasField("identity_changed"):
                candidate.outcome = _identity_changed(candidate, verdict.identity_changed)
            elif verdict.missing_device_ids or verdict.surplus_device_ids or verdict.stale_device_ids:
                candidate.outcome = publish_pb2.PublishResult(
                    request_id=candidate.request.request_id,
                    outdated_devices=publish_pb2.OutdatedDevices(
                        missing_device_ids=verdict.missing_device_ids,
                        surplus_device_ids=verdict.surplus_device_ids,
                        stale_device_ids=verdict.stale_device_ids,
                        device_list_version=verdict.device_list_version,
                    ),
                )

    async def _check_blocked(self, candidates: Sequence[_Candidate]) -> None:
        """Nothing is sealed for who blocks the sender, so that nothing looks at how new the devices are: whoever took a number over could
        block, and the sender would turn to another channel that the number leads to."""
        blocked = [each for each in candidates if each.blocked and _publication(each).envelope is None and _added_until_ms(each)]
        checks = [
            sealing_pb2.StanzaCheck(
                sender_id=_key(candidate).sender_id,
                subscriber_id=_resolved(candidate).subscriber_id,
                device_ids=[device.device_id for device in _resolved(candidate).devices],
                added_until_ms=_added_until_ms(candidate),
            )
            for candidate in blocked
        ]
        for candidate, verdict in await _ask(self._peers.check_stanzas, blocked, checks):
            if verdict.HasField("identity_changed"):
                candidate.outcome = _identity_changed(candidate, verdict.identity_changed)

    async def _seal(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        plain = []
        items = []
        for candidate in candidates:
            publication, resolved = _publication(candidate), _resolved(candidate)
            if publication.plain is None:
                continue
            if candidate.blocked:
                # Nobody will read it: it is not even sealed.
                candidate.content_id = uuid7()
                continue
            plain.append(candidate)
            items.append(
                sealing_pb2.SealItem(
                    sender_id=caller.sender_id,
                    subscriber_id=resolved.subscriber_id,
                    device_ids=[device.device_id for device in resolved.devices],
                    content=publication.plain,
                    created_at_ms=to_ms(publication.created_at),
                    expires_at_ms=to_ms(publication.expires_at),
                    added_until_ms=_added_until_ms(candidate),
                )
            )
        for candidate, result in await _ask(self._peers.seal, plain, items):
            if result.HasField("identity_changed"):
                candidate.outcome = _identity_changed(candidate, result.identity_changed)
                continue
            try:
                rules.check_sealing_key(result.parts.head, _standing(candidate))
            except FailedPrecondition as e:
                candidate.outcome = e
                continue
            candidate.content_id = result.parts.content_id or uuid7()
            candidate.head, candidate.tail = result.parts.head, result.parts.tail
            candidate.stanzas = {stanza.device_id: stanza.stanza for stanza in result.parts.stanzas}

    async def _store(self, caller: SenderCaller, candidates: Sequence[_Candidate]) -> None:
        messages = [self._message(caller, candidate) for candidate in candidates]
        # Each for itself: what one part stored is not refused because another part was.
        for candidate, result in zip(candidates, await self._peers.store.submit_each(messages), strict=True):
            if isinstance(result, ServiceError):
                candidate.outcome = result
            elif isinstance(result, Exception):
                raise result
            elif not result.stored_now:
                candidate.outcome = _repeated(candidate, result.accepted)
            else:
                candidate.outcome = _accepted(candidate, result.accepted, repeated=False)

    def _message(self, caller: SenderCaller, candidate: _Candidate) -> mailbox_pb2.NewMessage:
        request, publication, resolved = candidate.request, _publication(candidate), _resolved(candidate)
        message_id = MessageId(uuid7())
        return mailbox_pb2.NewMessage(
            key=candidate.key,
            message_id=message_id,
            subscriber_id=resolved.subscriber_id,
            app_id=publication.app_id,
            content_class=request.content_class,
            priority=request.priority or common_pb2.PRIORITY_NORMAL,
            created_at_ms=to_ms(publication.created_at),
            expires_at_ms=to_ms(publication.expires_at),
            replace_hash=(
                self._vault.lookup(caller.sender_id + request.replace_key.encode(), "replace key") if request.replace_key else b""
            ),
            order_id=request.order_id,
            leg_no=request.leg_no,
            channel=request.channel or common_pb2.CHANNEL_PUSH,
            group_id=request.group_id,
            traffic_type=common_pb2.TrafficType.ValueType(rules.traffic_type(request)),
            tag=request.tag,
            originator_requested=request.originator,
            originator_effective=request.originator,
            muted=resolved.mute,
            blocked=common_pb2.ReasonCode.ValueType(candidate.blocked),
            deliveries=[
                mailbox_pb2.NewDelivery(
                    device_id=device.device_id,
                    stanza=b"" if candidate.blocked else candidate.stanzas.get(device.device_id, b""),
                    platform=device.platform,
                    push_reason=_push_reason(candidate, device),
                )
                for device in resolved.devices
            ],
            content_id=candidate.content_id,
            head=b"" if candidate.blocked else candidate.head,
            tail=b"" if candidate.blocked else candidate.tail,
        )


async def _ask(call: BatchedCall[Item, Result], candidates: Sequence[_Candidate], items: Sequence[Item]) -> list[tuple[_Candidate, Result]]:
    """What a peer answers about each candidate's item. A candidate whose item it refuses is decided by that, and left out. Raises what
    failed for any other reason."""
    answers: list[tuple[_Candidate, Result]] = []
    for candidate, result in zip(candidates, await call.submit_each(items), strict=True):
        if isinstance(result, InvalidRequest):
            candidate.outcome = result
        elif isinstance(result, Exception):
            raise result
        else:
            answers.append((candidate, result))
    return answers


def _open(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [candidate for candidate in candidates if candidate.outcome is None]


def _decided(candidate: _Candidate) -> publish_pb2.PublishResult | ServiceError:
    if candidate.outcome is None:
        raise AssertionError("the last step decides")
    return candidate.outcome


def _publication(candidate: _Candidate) -> Publication:
    if candidate.publication is None:
        raise AssertionError("what could not be parsed goes no further")
    return candidate.publication


def _standing(candidate: _Candidate) -> Standing:
    if candidate.standing is None:
        raise AssertionError("what the root does not allow goes no further")
    return candidate.standing


def _resolved(candidate: _Candidate) -> directory_pb2.Resolved:
    if candidate.resolved is None:
        raise AssertionError("what could not be resolved goes no further")
    return candidate.resolved


def _key(candidate: _Candidate) -> mailbox_pb2.AcceptedKey:
    if candidate.key is None:
        raise AssertionError("what could not be parsed goes no further")
    return candidate.key


def _added_until_ms(candidate: _Candidate) -> int:
    added_until = _publication(candidate).added_until
    return 0 if added_until is None else to_ms(added_until)


def _identity_changed(candidate: _Candidate, changed: publish_pb2.IdentityChanged) -> publish_pb2.PublishResult:
    return publish_pb2.PublishResult(request_id=candidate.request.request_id, identity_changed=changed)


def _push_reason(candidate: _Candidate, device: directory_pb2.ResolvedDevice) -> common_pb2.ReasonCode.ValueType:
    if not candidate.blocked and device.device_id not in candidate.stanzas:
        return common_pb2.REASON_CODE_NO_PREKEY
    return device.push_reason


def _accepted(candidate: _Candidate, accepted: mailbox_pb2.AcceptedResult, *, repeated: bool) -> publish_pb2.PublishResult:
    return publish_pb2.PublishResult(
        request_id=candidate.request.request_id,
        accepted=publish_pb2.Accepted(
            message_id=accepted.message_id, expires_at=accepted.expires_at, devices=accepted.devices, repeated_request=repeated
        ),
    )


def _repeated(candidate: _Candidate, accepted: mailbox_pb2.AcceptedResult) -> publish_pb2.PublishResult | ServiceError:
    if accepted.other_request:
        return AlreadyExists(
            "this request_id was used for another request in the last 28 days; take a new one for a new message", field="request_id"
        )
    return _accepted(candidate, accepted, repeated=True)


def to_refusal(request: publish_pb2.PublishRequest, error: ServiceError) -> publish_pb2.PublishResult:
    """How an error looks inside a batch."""
    return publish_pb2.PublishResult(request_id=request.request_id, refusal=errors.to_refusal(error))
