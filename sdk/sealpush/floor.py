"""The lowest suite that a device accepts: it rises and never falls.

A device says with each prekey's signature which suite it accepts at least, so that senders notice when somebody in between holds back the
stronger keys. Old prekeys stay true, though: whoever kept one can hand it to a sender that never saw a newer one. Therefore the
device itself refuses content of a lower suite, unless it was created before the service knew of the rise: that may be on its way.

Kept as one fact: lowest suite 1 byte, then 8 bytes with the server's time of the rise, 0 while the service has not confirmed it.
"""

from dataclasses import dataclass
from typing import Final

from sealpush.keystore import Keystore
from sealpush.local import FUTURE_SKEW_MS
from sealpush.suites import SUITE_X25519

_LOWEST_SUITE: Final = "suite.lowest"


@dataclass(frozen=True, slots=True)
class Floor:
    """The lowest suite, and when the service confirmed it (Unix milliseconds by its clock; None: not yet)."""

    suite: int = SUITE_X25519
    raised_at_ms: int | None = None

    def min_suite(self, created_at_ms: int) -> int:
        """The lowest suite that is accepted for content created at this time."""
        # A sealer's clock may be ahead: what the service took before the rise can bear a time shortly after it.
        if self.raised_at_ms is None or created_at_ms <= self.raised_at_ms + FUTURE_SKEW_MS:
            return SUITE_X25519
        return self.suite


def floor(keystore: Keystore) -> Floor:
    """As kept."""
    kept = keystore.fact(_LOWEST_SUITE)
    return Floor() if kept is None else Floor(kept[0], int.from_bytes(kept[1:], "big") or None)


def raise_to(keystore: Keystore, suite: int) -> int:
    """The suite that prekeys are of from now on: `suite`, or the higher one that was decided before."""
    kept = floor(keystore)
    if suite > kept.suite:
        _keep(keystore, suite, 0)
    return max(suite, kept.suite)


def confirm(keystore: Keystore, suite: int, now_ms: int) -> None:
    """The service knows of this suite by `now_ms`, the server's time. Repeating it keeps the earliest time: a clock that ran ahead at the
    rise, by mistake or on purpose, would otherwise hold the floor down until that time has come."""
    kept = floor(keystore)
    if kept.suite == suite and (kept.raised_at_ms is None or now_ms < kept.raised_at_ms):
        _keep(keystore, suite, now_ms)


def _keep(keystore: Keystore, suite: int, raised_at_ms: int) -> None:
    keystore.set_fact(_LOWEST_SUITE, bytes((suite,)) + raised_at_ms.to_bytes(8, "big"))
