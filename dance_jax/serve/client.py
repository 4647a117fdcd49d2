"""Who sent a call, for fairness between clients."""

from __future__ import annotations

import ipaddress

import fastapi

#: Name in ASGI's scope of the number of the key that a request carries.
KEY_NUMBER = "dance_jax.key"
#: Addresses of IPv6 that count as one client: a user usually has all addresses of such a network.
_IPV6_PREFIX = 64


def client_of(request: fastapi.Request) -> str:
    """The client of a call: its key if there are several, else its IP address, or the network of 64
    bits of an IPv6 address.

    uvicorn takes the address from `X-Forwarded-For` if the connection comes from one of
    `ServeOptions.trusted_proxies`.
    """
    number = request.scope.get(KEY_NUMBER, -1)
    return _address(request) if number < 0 else f"key {number}"


def _address(request: fastapi.Request) -> str:
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
