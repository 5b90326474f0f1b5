import socket

import pytest


@pytest.fixture
def free_base_port() -> int:
    """A base whose ports nobody listens on right now."""
    from sealpushd.up.errors import UpError
    from sealpushd.up.ports import Ports

    for base in range(21_000, 31_000, 300):
        try:
            Ports(base).check_free(patience_s=0)
        except UpError:
            continue
        return base
    raise AssertionError(f"no free ports on {socket.gethostname()}")
