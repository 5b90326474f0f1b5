"""What the SDK needs to know of a running `up`."""

from __future__ import annotations

from pathlib import Path

from sealpush.keys import ContentSigningKey
from sealpush.transport import Endpoints as PublicEndpoints
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError


def public_endpoints(endpoints: Endpoints) -> PublicEndpoints:
    """Raises UpError when the authority's certificate has gone."""
    try:
        ca_pem = Path(endpoints.ca).read_bytes()
    except OSError as e:
        raise UpError(f"{endpoints.ca} cannot be read ({e.strerror}): start `sealpush up` anew") from e
    public = endpoints.public
    return PublicEndpoints(
        accounts=public["accounts"],
        registration=public["registration"],
        keys=public["keys"],
        publishing=public["publishing"],
        messages=public["fetch"],
        ca_pem=ca_pem,
    )


def content_key(endpoints: Endpoints, sender_name: str) -> ContentSigningKey:
    """The key that a demo sender seals with; the first sender's for the empty name."""
    path = Path(endpoints.demo_folder) / f"{sender_name or next(iter(endpoints.senders))}.key"
    try:
        return ContentSigningKey.from_seed(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UpError(f"{path} holds no signing key ({e}): restore it from a back-up of the data directory") from e
