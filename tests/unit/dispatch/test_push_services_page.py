"""docs/push-services.md names every answer that the providers know, with what becomes of it, and every setting it mentions exists."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sealpushd.dispatch.providers import apns, base, fcm, hms
from sealpushd.dispatch.providers.base import Bug, HttpAnswer, Misconfigured, Outcome, RefreshAuth, RetryAt, Row, TokenGone, TokenSuspect
from sealpushd.dispatch.receipts import WORDS
from sealpushd.platform.settings import Settings

PAGE = (Path(__file__).parents[3] / "docs" / "push-services.md").read_text()
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def section(title: str) -> list[str]:
    """The lines of the tables below a heading."""
    [text] = re.findall(rf"^### {title}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if line.startswith("|")]


def word_for(outcome: Outcome) -> str:
    match outcome:
        case TokenGone():
            return "forget"
        case TokenSuspect():
            return "set aside"
        case RefreshAuth():
            return "renew"
        case Misconfigured():
            return "stop"
        case Bug():
            return "quarantine"
        case RetryAt(of_device=of_device):
            return "wait" if of_device else "retry"
    raise AssertionError(outcome)


def played(row: Row, reason: str, status: int) -> Outcome:
    return row(reason, HttpAnswer(status), NOW)


@pytest.mark.parametrize(("status", "reason"), [key for key in apns.ERRORS if key[1] != "*"])
def test_every_answer_of_apns_stands_on_the_page_with_what_becomes_of_it(status: int, reason: str) -> None:
    word = word_for(played(apns.ERRORS[status, reason], reason, status))
    assert any(f"`{reason}`" in line and str(status) in line and line.endswith(f"{word} |") for line in section("APNs"))


@pytest.mark.parametrize("code", [code for code in hms.ERRORS if code != "*"])
def test_every_code_of_hms_stands_on_the_page_with_what_becomes_of_it(code: str) -> None:
    word = word_for(played(hms.ERRORS[code], code, 200))
    assert any(f"`{code}`" in line and line.split("|")[3].strip().startswith(word) for line in section("HMS"))


@pytest.mark.parametrize("reason", sorted({word for _, word in fcm.ERRORS if word != "*"} | fcm.DENIALS))
def test_every_word_of_fcm_stands_on_the_page(reason: str) -> None:
    assert any(f"`{reason}`" in line for line in section("FCM"))


@pytest.mark.parametrize(
    ("title", "advice"), [("APNs", apns.ADVICE), ("FCM", fcm.ADVICE), ("HMS", hms.ADVICE), ("Everywhere", base.COMMON_ADVICE)]
)
def test_every_reason_that_there_is_advice_for_stands_on_the_page(title: str, advice: dict[str, str]) -> None:
    # What says of itself that it is harmless or ours needs no line of its own.
    lines = "\n".join(section(title) + section("Everywhere"))
    known = re.findall(r"`([^`]+)`", lines)
    missing = [reason for reason in advice if reason.removeprefix("oauth-") not in known and not _told_otherwise(reason)]
    assert not missing


def _told_otherwise(reason: str) -> bool:
    in_words = {
        "InternalServerError", "ServiceUnavailable", "Shutdown", "BadCertificateEnvironment", "BadRequest", "accepted-without-echo",
        "accepted-without-request-id", "gone-before-registration", "closed",
    }  # fmt: skip
    return reason in in_words or reason.startswith("status-")


def test_every_receipt_stands_on_the_page() -> None:
    for status, word in WORDS.items():
        assert re.search(rf"\| `{word}` \([0-9, ]*\b{status}\b", PAGE)


def test_settings_that_the_page_names_exist() -> None:
    for name in re.findall(r"`(SEALPUSH_[A-Z_]+)`", PAGE):
        if name != "SEALPUSH_NEW_MESSAGE":
            assert name.removeprefix("SEALPUSH_").lower() in Settings.model_fields
