"""sealpush.errors: what callers branch on."""

from sealpush import errors
from sealpush.errors import EnvelopeRefused, KeystoreBusy, KeystoreError, SealpushError


def all_errors() -> list[type[SealpushError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SealpushError)]


def test_every_error_has_a_reason_of_its_own() -> None:
    reasons = [each.reason for each in all_errors()]
    assert len(set(reasons)) == len(reasons) > 5
    assert all(reason.isupper() for reason in reasons)


def test_only_a_busy_store_is_worth_the_same_call_again() -> None:
    assert [each for each in all_errors() if each.retryable] == [KeystoreBusy]
    assert issubclass(KeystoreBusy, KeystoreError)


def test_a_refused_envelope_says_what_to_do_and_not_why() -> None:
    assert str(EnvelopeRefused()) == str(EnvelopeRefused())
    assert "acknowledge" in str(EnvelopeRefused())
