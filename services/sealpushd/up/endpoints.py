"""`<data-dir>/run/endpoints.json`: where a running `sealpush up` can be reached, for commands in other terminals.

Mode 0600: it holds the demo's password and the engines' URLs. There while `up` runs, removed at its end; one that a killed run
left behind names a process that is gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from sealpushd.platform.tls import write_secret
from sealpushd.up.errors import UpError

_FORMAT: Final = 3
_FILE: Final = Path("run") / "endpoints.json"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Addresses are `host:port`; paths are absolute."""

    pid: int
    ca: str
    public: Mapping[str, str]
    mesh: Mapping[str, str]
    metrics: Mapping[str, str]
    simulators: str
    push_services: Mapping[str, str]
    """The simulated ones, by name."""
    postgres_url: str = field(repr=False)
    valkey_url: str = field(repr=False)
    operator_key: str
    app_id: str
    login: str
    password: str = field(repr=False)
    senders: Mapping[str, str]
    """Name to id, as hex."""
    phone: str
    root_public_key: str
    demo_folder: str

    def write(self, data_dir: Path) -> None:
        write_secret(data_dir / _FILE, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode())

    @classmethod
    def load(cls, data_dir: Path) -> Self:
        """Raises UpError when nothing runs there, or no longer."""
        path = data_dir / _FILE
        try:
            document: dict[str, Any] = json.loads(path.read_text())
            if document.pop("format") != _FORMAT:
                raise UpError(f"{path} was written by another version of sealpush: use the one that runs `sealpush up`")
            endpoints = cls(**document)
            running = _is_running(endpoints.pid)
        except FileNotFoundError as e:
            raise UpError(
                f"no `sealpush up` runs on {data_dir}: start it in another terminal and wait until it says that it is ready, "
                "or name its directory with --data-dir"
            ) from e
        except PermissionError as e:
            raise UpError(f"{path} belongs to another user: run this as the user that runs `sealpush up`") from e
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UpError(f"{path} cannot be read ({e}): start `sealpush up` anew") from e
        if not running:
            raise UpError(
                f"the `sealpush up` on {data_dir}, process {endpoints.pid}, was killed: start it again, it goes on where that one ended"
            )
        return endpoints

    @staticmethod
    def remove(data_dir: Path) -> None:
        (data_dir / _FILE).unlink(missing_ok=True)

    def listeners(self) -> dict[str, str]:
        """What listens besides the mesh: public listeners and simulators."""
        public = {
            name if number == 0 else f"{name}-{number + 1}": address
            for name, target in self.public.items()
            for number, address in enumerate(target.removeprefix("ipv4:").split(","))
        }
        return {**public, "simulators": self.simulators, **self.push_services}


def _is_running(pid: int) -> bool:
    """Whether there is such a process; it may be another one that got the same number, which connecting finds out."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
