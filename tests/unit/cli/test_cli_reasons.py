import pytest

from sealpush.v1 import common_pb2 as common
from sealpushd.cli.reasons import REASONS, STATES, explanation


def test_every_reason_code_of_the_protocol_is_explained_and_nothing_else() -> None:
    assert set(REASONS) == set(common.ReasonCode.values())


def test_every_state_of_the_protocol_has_a_sentence() -> None:
    assert set(STATES) == set(common.State.values())


@pytest.mark.parametrize("code", sorted(REASONS))
def test_an_explanation_is_two_sentences_for_people(code: int) -> None:
    one = explanation(code)
    for text in (one.happened, one.advice):
        assert text[0].isupper()
        assert text.endswith(".")
        assert "_" not in text


def test_a_code_of_a_newer_server_is_explained_as_such() -> None:
    assert "does not know" in explanation(9999).happened
