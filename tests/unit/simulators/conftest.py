"""Fixtures of the simulators' unit tests."""

from __future__ import annotations

import pytest

from tests.unit.simulators import wire
from tests.unit.simulators.wire import Ask, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ask() -> Ask:
    return wire.ask
