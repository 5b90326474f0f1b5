"""What each reason code means for the sender and what to do about it: pure, complete for every code of common.proto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sealpush.v1 import common_pb2 as common


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which precondition failed, as a sentence, and what to do."""

    happened: str
    advice: str


_ANOTHER_CHANNEL: Final = "Use another channel for this recipient."

REASONS: Final[dict[int, Explanation]] = {
    common.REASON_CODE_UNSPECIFIED: Explanation("Nothing is wrong: no reason was recorded.", "Nothing to do."),
    common.REASON_CODE_UNKNOWN: Explanation("The channel named no reason.", "Try again later, or use another channel."),
    common.REASON_CODE_ABSENT_SUBSCRIBER: Explanation("The phone was off or out of coverage for the whole lifetime.", _ANOTHER_CHANNEL),
    common.REASON_CODE_CALL_BARRED: Explanation("The phone is blocked, or its reception is barred.", _ANOTHER_CHANNEL),
    common.REASON_CODE_FAILURE: Explanation("Signalling failed on the way to the phone.", "Try again later."),
    common.REASON_CODE_MEMORY_CAPACITY_EXCEEDED: Explanation("The phone's memory is full.", "Try again later, or use another channel."),
    common.REASON_CODE_TELESERVICE_NOT_PROVISIONED: Explanation("The subscriber does not have this service.", _ANOTHER_CHANNEL),
    common.REASON_CODE_TIMEOUT: Explanation("The other side did not answer in time.", "Try again later."),
    common.REASON_CODE_UNKNOWN_SUBSCRIBER: Explanation(
        "Nobody is known by this number, or its phone has been off for very long.", "Check the number; " + _ANOTHER_CHANNEL.lower()
    ),
    common.REASON_CODE_DUPLICATED: Explanation("Duplicate control dropped it: the same was sent a moment ago.", "Nothing to do."),
    common.REASON_CODE_FILTERED: Explanation("A filter of the platform dropped it.", "Ask the platform's operator which filter, and why."),
    common.REASON_CODE_UNROUTED: Explanation("The platform has no route for it.", "Ask the platform's operator to configure one."),
    common.REASON_CODE_OPERATOR_BLACKLISTED: Explanation("The number is in the operator's black list.", _ANOTHER_CHANNEL),
    common.REASON_CODE_OPERATOR_INVALID_SOURCE: Explanation(
        "The sender name is not registered with the operator.", "Register the name, or send under a registered one."
    ),
    common.REASON_CODE_OPERATOR_SPAM_FILTERED: Explanation(
        "The operator's spam filter dropped it.", "Change the text, or ask the operator."
    ),
    common.REASON_CODE_VERIFICATION: Explanation("The recipient cannot receive on this channel.", _ANOTHER_CHANNEL),
    common.REASON_CODE_BUSY: Explanation("The number was busy.", "Try again later."),
    common.REASON_CODE_BAD_PARAMETERS: Explanation("A parameter is missing or wrong.", "Correct the request and send it anew."),
    common.REASON_CODE_CONSUMER_ID_NOT_FOUND: Explanation(
        "No customer has this user id in the app.", "Check the id; " + _ANOTHER_CHANNEL.lower()
    ),
    common.REASON_CODE_CONSUMER_PHONE_NOT_FOUND: Explanation(
        "Nobody registered this phone number in the app.", "Use another channel; it works once the person signs in to the app."
    ),
    common.REASON_CODE_NO_PRIMARY_DEVICES: Explanation(
        "Only the primary installation was asked for, and the recipient has none.",
        "Send without the restriction to the primary installation.",
    ),
    common.REASON_CODE_NO_ACTIVE_INSTALLATIONS: Explanation(
        "The recipient has no installation of the app that can receive.", "Use another channel; it works again once the app is opened."
    ),
    common.REASON_CODE_PUSH_DISABLED: Explanation(
        "The recipient switched pushes off in the app.",
        "The message waits to be fetched when the app is opened; if it is urgent, use another channel.",
    ),
    common.REASON_CODE_PUSH_OS_DISABLED: Explanation(
        "The recipient switched pushes off in the phone's settings.",
        "The message waits to be fetched when the app is opened; if it is urgent, use another channel.",
    ),
    common.REASON_CODE_SUBSCRIPTION_FAILED: Explanation(
        "The recipient's installations do not have the subscriptions that were asked for.", "Send without them, or respect the choice."
    ),
    common.REASON_CODE_NO_APPLICATION: Explanation("The app is not installed any more.", _ANOTHER_CHANNEL),
    common.REASON_CODE_BELOW_MINIMUM_VERSION: Explanation(
        "The installed app is too old for what was asked.", "Send without the new feature, or use another channel."
    ),
    common.REASON_CODE_PROVIDER_ERROR: Explanation(
        "The push service answered with an error.",
        "The message can still be fetched; operators see what the push service answers with `sealpush lanes`.",
    ),
    common.REASON_CODE_UNROUTED_ACCOUNT: Explanation(
        "The outside account has no configuration.", "Ask the platform's operator to configure it."
    ),
    common.REASON_CODE_UNKNOWN_LAYOUT: Explanation(
        "The channel does not know the layout of the content.", "Use a layout that the channel knows."
    ),
    common.REASON_CODE_PLATFORM_NOT_FOUND: Explanation(
        "The recipient has no installation on the platforms that were asked for.", "Send to all platforms, or use another channel."
    ),
    common.REASON_CODE_SENDER_BLOCKED: Explanation(
        "The recipient blocks everything of this sender.", "Respect it; the law may ask for another channel."
    ),
    common.REASON_CODE_ADVERTISING_BLOCKED: Explanation(
        "The recipient blocks this sender's advertising.", "Respect it: do not send advertising to this recipient on any channel."
    ),
    common.REASON_CODE_LIFETIME_OVER: Explanation(
        "The lifetime ended before the phone acknowledged: it was off, offline, or did not open the app.",
        "Use another channel, or a longer lifetime next time.",
    ),
    common.REASON_CODE_CANCELLED_BY_SENDER: Explanation("The sender cancelled it.", "Nothing to do."),
    common.REASON_CODE_REPLACED_BY_NEWER: Explanation(
        "A newer message with the same replace key took its place.", "Look at the newer message."
    ),
    common.REASON_CODE_TOKEN_GONE: Explanation(
        "The push service says that the app was removed from this phone.",
        "Use another channel; it works again once the app is installed and opened.",
    ),
    common.REASON_CODE_UNREGISTERED: Explanation("The user signed this installation out.", _ANOTHER_CHANNEL),
    common.REASON_CODE_NUMBER_REBOUND: Explanation(
        "The number belongs to somebody else now.", "Check with your customer which number is theirs; do not send to this one."
    ),
    common.REASON_CODE_DEVICE_CANNOT_OPEN: Explanation(
        "The phone received it and could not open it.",
        "Send it again; if that fails as well, the app must be registered anew on the phone.",
    ),
    common.REASON_CODE_NO_PREKEY: Explanation(
        "The phone has no usable key, so nothing could be sealed for it: the app was not opened for three months.", _ANOTHER_CHANNEL
    ),
    common.REASON_CODE_PUSH_QUARANTINED: Explanation(
        "The push was given up after too many tries, or the push service does not know the phone's token.",
        "The message can still be fetched; operators see why with `sealpush lanes`, and may put it into the queue again.",
    ),
    common.REASON_CODE_NO_PUSH_TOKEN: Explanation(
        "The installation has no push token, so it must ask by itself.", "The message waits to be fetched when the app is opened."
    ),
    common.REASON_CODE_NO_LANE: Explanation(
        "No push service is configured for the app on this platform.",
        "Ask the platform's operator to configure one; the message can still be fetched.",
    ),
}


def explanation(reason_code: int) -> Explanation:
    """The explanation of a code; one that a newer server knows and this program does not is explained as such."""
    known = REASONS.get(reason_code)
    if known is not None:
        return known
    return Explanation(f"The server gives reason {reason_code}, which this version does not know.", "Upgrade `sealpush`.")


STATES: Final[dict[int, str]] = {
    common.STATE_UNSPECIFIED: "has no state",
    common.STATE_QUEUED: "is stored and waits for its push, or for the phone to ask",
    common.STATE_PUSHED: "was announced to the phone by the push service; the phone has not fetched it yet",
    common.STATE_FETCHED: "was fetched by the phone, which has not acknowledged it yet",
    common.STATE_DELIVERED: "was delivered: the phone opened it and signed that it did",
    common.STATE_UNDELIVERED: "cannot be delivered",
    common.STATE_BLOCKED: "was blocked by the recipient",
    common.STATE_EXPIRED: "expired",
    common.STATE_CANCELLED: "was cancelled",
    common.STATE_REPLACED: "was replaced",
    common.STATE_NOT_REGISTERED: "was not stored: nobody is registered",
}
