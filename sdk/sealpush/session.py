"""Calls as this device: the token, the proof on a change, the pause between attempts, and asking for the server's time."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

from sealpush import errors
from sealpush.errors import CallFailed, RegistrationEnded
from sealpush.local import ServerTime, Store, Trouble, Who
from sealpush.model import timestamp_ms
from sealpush.proofs import body_digest, challenge_proof, change_proof, sign_proof
from sealpush.retry import Attempts, Deadline
from sealpush.transport import Calls, Channels, Token, TokenHolder, UnaryMethod
from sealpush.v1 import common_pb2, registration_pb2

CALL_DEADLINE_S: Final = 30.0
CHANGE_ATTEMPTS_MAX: Final = 6
RESYNC_PAUSE_S: Final = 10.0  # between two questions for the server's time

Answer = TypeVar("Answer")


class Session:
    """What a registered device calls the service with. Every method that calls raises CallFailed, or NotRegisteredHere."""

    def __init__(self, calls: Calls, channels: Channels, store: Store, who: Who, time: ServerTime, trouble: Trouble) -> None:
        self.channels = channels
        self._calls = calls
        self._store = store
        self._who = who
        self._time = time
        self._trouble = trouble
        self._token = TokenHolder(self._authenticate, calls.clock)
        self._changing = asyncio.Lock()
        self._asked_time_at: float | None = None
        # The service did not know this device when it was asked for a token last.
        self.ended = False

    def deadline(self) -> Deadline:
        """For a call that nobody gave a deadline."""
        return Deadline.after(self._calls.clock, CALL_DEADLINE_S)

    async def pause(self, attempt: int, retry_after_s: float | None = None) -> None:
        """Wait after the attempt with this number, counted from 0, with full jitter."""
        await self._calls.clock.sleep(self._calls.policy.delay_s(attempt, self._calls.random, retry_after_s))

    async def bearer(self, deadline: Deadline) -> str:
        """A token good for a while."""
        return await self._token.get(deadline)

    def drop(self, bearer: str) -> None:
        """Forget a token that the service refused."""
        self._token.drop(bearer)

    def forget(self) -> None:
        """Forget the token, whatever it is: the installation has ended."""
        self._token = TokenHolder(self._authenticate, self._calls.clock)
        self.ended = False

    async def call(self, method: UnaryMethod[Answer], request: Any, deadline: Deadline) -> Answer:
        """The answer; repeats while errors are retryable and the deadline allows."""
        return await self._calls.call(method, request, deadline=deadline, token=self._token)

    async def change(
        self,
        name: str,
        method: UnaryMethod[Answer],
        request: Callable[[common_pb2.DeviceProof], Any],
        change: bytes,
        deadline: Deadline,
    ) -> Answer:
        """The answer to a change that must come from this device, once. Each attempt has a counter of its own, since one whose
        answer was lost may have used its counter; all changes may be repeated.

        ABORTED says that the counter was used: another process was faster, or the store is an old copy and lags behind by an
        unknown number. So the counter leaps, further each time.
        """
        identity, registration = self._who.registered()
        digest = body_digest(change)
        aborted = 0
        attempts = Attempts(deadline, self._calls.policy, self._calls.random)
        async with self._changing:
            while True:
                counter = await self._store(lambda keystore: keystore.next_counter())
                proof = common_pb2.DeviceProof(
                    counter=counter, signature=sign_proof(identity, change_proof(registration.device_id, counter, name, digest))
                )
                try:
                    return await self._calls.once(method, request(proof), deadline=deadline, token=self._token)
                except errors.Aborted:
                    aborted += 1
                    if aborted == CHANGE_ATTEMPTS_MAX:
                        raise
                    if aborted > 1:
                        await self._raise_counter(counter + 16**aborted)
                except CallFailed as error:
                    await attempts.failed(error)

    async def _raise_counter(self, used: int) -> None:
        await self._store(lambda keystore: keystore.raise_counter(used))

    async def resync(self, deadline: Deadline) -> bool:
        """Ask for the server's time, by a new token; whether it is known now.

        Not more often than every few seconds, unless there was an answer and the local clock has jumped since.
        """
        now = self._calls.clock.monotonic()
        asked_at = self._asked_time_at
        if asked_at is None or now - asked_at >= RESYNC_PAUSE_S or (self._learned_since(asked_at) and self._time.jumped()):
            self._asked_time_at = asked_at = now
            try:
                await self._token.renew(deadline)
            except CallFailed as error:
                self._trouble.note(error)
        return self._learned_since(asked_at) and not self._time.jumped()

    def _learned_since(self, moment: float) -> bool:
        return self._time.learned_at is not None and self._time.learned_at >= moment

    async def know_time(self, deadline: Deadline) -> None:
        """Return with the server's time known, as it comes with a token. Raises CallFailed."""
        await self._token.get(deadline)
        if self._time.jumped():
            await self._token.renew(deadline)

    async def _authenticate(self, deadline: Deadline) -> Token:
        """A token for an answered challenge. Raises RegistrationEnded where the service refuses every answer of this device."""
        try:
            # Refused once, another process of this device may have answered a newer challenge meanwhile. Twice, the device is not known.
            with contextlib.suppress(errors.Unauthenticated):
                return await self._answer_challenge(deadline)
            return await self._answer_challenge(deadline)
        except errors.Unauthenticated as error:
            self.ended = True
            raise RegistrationEnded(
                "this registration has ended: another phone of the person removed it, or the number passed on; register again",
                code=error.code,
                server_reason=error.server_reason,
            ) from error

    async def _answer_challenge(self, deadline: Deadline) -> Token:
        """One attempt. A lost answer costs nothing: the next attempt takes a new challenge."""
        identity, registration = self._who.registered()
        device_id = registration.device_id
        stub = self.channels.registration
        challenge = (
            await self._calls.once(stub.GetChallenge, registration_pb2.GetChallengeRequest(device_id=device_id), deadline=deadline)
        ).challenge
        signature = sign_proof(identity, challenge_proof(challenge, device_id))
        request = registration_pb2.AuthenticateRequest(device_id=device_id, challenge=challenge, signature=signature)
        sent_at = self._time.steady_s()
        answer = await self._calls.once(stub.Authenticate, request, deadline=deadline)
        await self._time.learn(answer.server_time, sent_at)
        self.ended = False
        return Token(answer.access_token, (timestamp_ms(answer.expires_at) - self._time.now_ms()) / 1000)
