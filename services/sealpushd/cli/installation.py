"""Which installation an operator's command is for: the services it calls, and the key it calls them with."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sealpushd.cli.errors import WronglyCalled
from sealpushd.cli.options import data_dir_option

if TYPE_CHECKING:
    from sealpushd.platform.tokens import ServiceKey

_file: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Service:
    """A service that the operator calls."""

    name: str
    address: str
    key: ServiceKey

    def call(self, stub: Callable[[Any], Any], method: str, request: Any) -> Any:
        """The answer of one call. Raises ServiceError as the service refuses."""
        from sealpushd.platform.clients import MeshChannel

        async def work() -> Any:
            channel = MeshChannel(self.name, self.address, self.key, logs_outages=False)
            try:
                return await channel.call(getattr(stub(channel.channel), method), request)
            finally:
                await channel.aclose()

        return asyncio.run(work())


@dataclass(frozen=True, slots=True)
class Installation:
    """Whom to call, and as whom. What is None comes from a running `up`, or from the settings."""

    operator_key: Path | None
    addresses: Mapping[str, str | None]
    data_dir: Path

    def service(self, name: str) -> Service:
        """Raises WronglyCalled without a key of the operator."""
        from sealpushd.platform import settings
        from sealpushd.platform.access import OPERATOR
        from sealpushd.platform.tokens import ServiceKey
        from sealpushd.up.endpoints import Endpoints
        from sealpushd.up.errors import UpError

        key_path, address = self.operator_key, self.addresses[name]
        if key_path is None or address is None:
            try:
                up = Endpoints.load(self.data_dir)
                key_path, address = key_path or Path(up.operator_key), address or up.mesh[name]
            except UpError as e:
                if key_path is None:
                    raise WronglyCalled(f"give --operator-key: {e}") from e
                address = address or getattr(settings.load(), f"{name}_mesh")
        try:
            return Service(name, address, ServiceKey.load(OPERATOR, key_path))
        except ValueError as e:
            raise WronglyCalled(str(e)) from e


def installation_of(*services: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options that say which installation is meant; the command gets them as one `Installation`, first."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*, operator_key: Path | None, data_dir: Path, **rest: Any) -> None:
            addresses = {name: rest.pop(f"{name}_address") for name in services}
            command(Installation(operator_key, addresses, data_dir), **rest)

        options = [
            click.option("--operator-key", type=_file, help="File with the operator's key. Default: that of a running `up`."),
            *(
                click.option(
                    f"--{name}", f"{name}_address", help=f"Mesh address of {name}. Default: that of a running `up`, else the settings'."
                )
                for name in services
            ),
            data_dir_option,
        ]
        decorated: Callable[..., None] = wrapped
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
