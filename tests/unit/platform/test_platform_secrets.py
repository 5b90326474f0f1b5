"""No secret in a log line, a repr or an exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sealpush.ids import SenderId
from sealpush.v1 import common_pb2, content_pb2, publish_pb2
from sealpushd.platform import logging
from sealpushd.platform.tokens import ServiceKey
from sealpushd.platform.vault import Vault, VaultError
from sealpushd.publishing.acceptance import _Candidate
from sealpushd.publishing.rules import parse_publish

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_a_log_line_is_one_json_object_with_the_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("fetch", "info")
    logging.request_ids.set(("r1",))
    structlog.get_logger().info("stored", message_id="m", text="ключ\nзначення")
    structlog.get_logger().debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["service"], entry["request_id"], entry["level"]) == ("stored", "fetch", "r1", "info")
    logging.request_ids.set(())


def test_a_logged_failure_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    for human in (False, True):
        logging.configure("fetch", "info", human=human)
        push_token = SECRET
        try:
            raise RuntimeError(f"{len(push_token)} characters")
        except RuntimeError as e:
            structlog.get_logger("one").error("failed", exc_info=e)
        shown = capsys.readouterr().err
        assert "7 characters" in shown
        assert SECRET not in shown


def test_keys_and_vaults_do_not_print() -> None:
    private = Ed25519PrivateKey.generate()
    key = ServiceKey("fetch", private)
    assert repr(key) == f"{key}" == "ServiceKey(fetch, …)"
    vault = Vault(b"d" * 32, b"l" * 32)
    assert repr(vault) == f"{vault}" == "Vault(…)"
    assert "d" * 32 not in repr(VaultError("a stored secret cannot be opened"))


def test_what_a_sender_publishes_does_not_print() -> None:
    request = publish_pb2.PublishRequest(
        request_id="r",
        recipient=common_pb2.Recipient(phone="+380501234567"),
        content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL,
        plain=content_pb2.Content(body=SECRET),
    )
    publication = parse_publish(request, SenderId(bytes(16)), ["app"], datetime.now(UTC))
    for shown in (repr(publication), repr(_Candidate(request, publication=publication))):
        assert SECRET not in shown
        assert "380501234567" not in shown
