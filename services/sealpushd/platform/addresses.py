"""IP addresses of callers: whom one stands for. Pure."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

# What a customer of a network gets at the least, and can change within at will (RFC 6177): as many addresses as anybody likes.
_IPV6_PREFIX: Final = 64


# Every call asks, most of them from an address that called before.
@lru_cache(maxsize=65_536)
def address_subject(address: str) -> str:
    """Whom to count an IP address for: itself, of IPv6 its /64 network."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed), _IPV6_PREFIX), strict=False))
