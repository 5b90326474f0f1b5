"""Which attempts are not worth sending: who sends far more than a service accepts makes it refuse in the time in which it could work. Pure.

Adaptive throttling by the client (Beyer and others, "Site Reliability Engineering", chapter 21): what is sent follows what was accepted
lately. There it is a fixed multiple of that. Here it is a larger one that refusals make smaller: while some are refused the service is sent
two fifths more than it accepts, and once none are the load is back within seconds.
"""

import math
from typing import Final

from sealpush.retry import Random

# What was heard counts less by a factor e after so long. Short, so that whoever was held back is let go within seconds.
MEMORY_S: Final = 1.0
# Each accepted attempt lets so many go out, and each refused one takes so many of these back. Together: two refusals for five accepted. A
# refusal costs a service about a sixth of what an accepted call does, so refusing takes a fifteenth of its time.
SENT_PER_ACCEPTED: Final = 3.0
HELD_PER_REFUSED: Final = 4.0
# Attempts that may be refused before any is held back: who calls seldom overloads nobody, and waits after each refusal anyhow.
PADDING: Final = 8.0


class Throttle:
    """What one caller heard from one service lately. `now` is any clock's seconds that only go forward."""

    __slots__ = ("_accepted", "_at", "_held_back", "_refused")

    def __init__(self) -> None:
        self._at = 0.0
        self._accepted = 0.0
        self._refused = 0.0
        self._held_back = 0.0

    def holds_back(self, now: float, random: Random) -> bool:
        """Whether not to send an attempt."""
        self._fade(now)
        attempts = self._accepted + self._refused + self._held_back
        allowed = max(0.0, SENT_PER_ACCEPTED * self._accepted - HELD_PER_REFUSED * self._refused)
        # Never all of them: only an attempt that goes out can hear that the service accepts again.
        is_held_back = attempts > allowed and random() < (attempts - allowed) / (attempts + PADDING)
        self._held_back += is_held_back
        return is_held_back

    def answered(self, now: float, *, accepted: bool) -> None:
        """An attempt that was sent has its answer: accepted, or refused as overloaded."""
        self._fade(now)
        if accepted:
            self._accepted += 1
        else:
            self._refused += 1

    def _fade(self, now: float) -> None:
        fading = math.exp(min(0.0, self._at - now) / MEMORY_S)
        self._accepted *= fading
        self._refused *= fading
        self._held_back *= fading
        self._at = max(self._at, now)
