"""Who sent a call, for fairness between clients."""

from __future__ import annotations

import ipaddress

import fastapi

#: Addresses of IPv6 that count as one client: a user usually has all addresses of such a network.
_IPV6_PREFIX = 64


def client_of(request: fastapi.Request) -> str:
    """The client of a call: its IP address, or its network of 64 bits if the address is IPv6.

    uvicorn takes the address from `X-Forwarded-For` if the connection comes from one of
    `ServeOptions.trusted_proxies`. A server has one API key at most, so keys do not tell clients
    apart.
    """
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
