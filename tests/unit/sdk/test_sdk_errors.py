"""sealpush.errors: what callers branch on."""

from datetime import UTC, datetime

from sealpush import errors
from sealpush.errors import (
    CallFailed,
    DeadlineExceeded,
    EnvelopeRefused,
    KeystoreBusy,
    KeystoreError,
    Overloaded,
    RegistrationLocked,
    SealpushError,
    Unavailable,
    WrongCode,
)


def all_errors() -> list[type[SealpushError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SealpushError)]


def test_every_error_has_a_reason_of_its_own() -> None:
    reasons = [each.reason for each in all_errors()]
    assert len(set(reasons)) == len(reasons) > 5
    assert all(reason.isupper() for reason in reasons)


def test_only_what_passes_by_itself_is_worth_the_same_call_again() -> None:
    assert {each for each in all_errors() if each.retryable} == {KeystoreBusy, Overloaded, Unavailable, DeadlineExceeded}
    assert issubclass(KeystoreBusy, KeystoreError)


def test_a_failed_call_carries_what_the_service_said() -> None:
    failure = CallFailed("text", code="NOT_FOUND", server_reason="NO_SUCH", field="a.b", retry_after_s=2.5, metadata={"k": "v"})
    assert (str(failure), failure.code, failure.server_reason, failure.field) == ("text", "NOT_FOUND", "NO_SUCH", "a.b")
    assert (failure.retry_after_s, failure.metadata) == (2.5, {"k": "v"})


def test_a_wrong_code_counts_tries_also_when_the_service_counts_strangely() -> None:
    assert WrongCode("no", metadata={"attempts_left": "3"}).attempts_left == 3
    assert WrongCode("no", metadata={"attempts_left": "many"}).attempts_left == 0
    assert WrongCode("no").attempts_left == 0


def test_a_lock_tells_its_attempts_and_its_end_also_when_the_service_speaks_strangely() -> None:
    locked = RegistrationLocked("no", metadata={"attempts_left": "4", "lock_lapses_at": "2026-12-22T00:00:00Z"})
    assert (locked.attempts_left, locked.lapses_at) == (4, datetime(2026, 12, 22, tzinfo=UTC))
    for strange in ("", "soon", "2026-12-22", "2026-12-22T00:00:00", "9" * 99):
        assert RegistrationLocked("no", metadata={"lock_lapses_at": strange}).lapses_at is None
    assert (RegistrationLocked("no").attempts_left, RegistrationLocked("no").lapses_at) == (0, None)


def test_a_refused_envelope_says_what_to_do_and_not_why() -> None:
    assert str(EnvelopeRefused()) == str(EnvelopeRefused())
    assert "acknowledge" in str(EnvelopeRefused())
