"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from sealpushd.platform import logging

# How long an example takes, and how long making it, says more about the machine and its other work than about what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A test that configures logging, as services do, writes to a stream that ends with it."""
    yield
    logging.close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
