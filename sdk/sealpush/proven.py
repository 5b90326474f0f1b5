"""The latest time that is proven: a lower bound of the present that no server can take back.

A phone goes by the service's clock, because its own may be wrong. A service that tells a time in the past would bring back what has
ended since: a stolen key whose entry is over, an old prekey. So the phone keeps the latest time that somebody signed whose key leads
to the pinned root:

    the creation of a content, signed by a key in force of a verified entry
    the issue of a revocation list, signed by the root itself

and judges entries and its own prekeys by no earlier time. `not_before` of an entry proves nothing: a root may sign that ahead. Nor
does the time in a server's answer or in the device log, which nobody signs.

Who signs may lie too, or have a wrong clock, the offline root's machine included. A time in the future, once believed, would end every
entry for as long; so no signature moves the bound beyond the phone's own clock. Harm takes both a signer's lie and a phone whose
clock is ahead, and reaches no further than that clock. Even then nothing is refused or deleted: a message waits where its sender's
entry seems to have ended, new prekeys wait for the service to take them, and the lifetime of messages is not judged by this bound.
"""


def proven(known_ms: int, signed_ms: int, own_ms: int) -> int:
    """The bound after a time that somebody signed, given the bound before and the phone's own clock. Unix milliseconds."""
    return max(known_ms, min(signed_ms, own_ms))
