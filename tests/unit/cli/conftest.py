import pytest

from bench.suite import free_base


@pytest.fixture
def free_base_port() -> int:
    """A base whose ports nobody listens on."""
    return free_base()
