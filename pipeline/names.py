"""Hosts: what the host of a URL stands for, and how an address is shown.

Nothing here asks a resolver.
"""

from __future__ import annotations

import ipaddress
import re
import socket

__all__ = ["Address", "is_wildcard", "literal_address", "proven_name", "show_address", "zoneless"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ZONED = re.compile(r"(https?://\[[0-9A-Fa-f:.]+)%[^\]]*(?=\])")


def literal_address(host: str) -> Address | None:
    """Return the address that ``host`` is; None if it is a name.

    Parameters
    ----------
    host : str
        Of a URL: an IPv6 address in brackets or not, with a zone or not. IPv4 addresses are those
        that ``getaddrinfo`` takes for one, such as ``127.1`` and ``0x7f000001``.

    Returns
    -------
    IPv4Address, IPv6Address or None
        Without the zone. An IPv4 address that is written as IPv6 (``::ffff:10.0.0.1``) is IPv4.
    """
    host = host.strip("[]").partition("%")[0]
    try:
        if ":" not in host:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        address = ipaddress.IPv6Address(host)
    except (OSError, ValueError):
        return None
    return address.ipv4_mapped or address


def is_wildcard(host: str) -> bool:
    """Tell whether ``host`` is the address that stands for all of a machine's."""
    address = literal_address(host)
    return address is not None and address.is_unspecified


def zoneless(url: str) -> str:
    """Return a URL without the zone of its IPv6 address, which means something on one host only.

    RFC 6874 section 4 and RFC 4007 section 11.2: it must not leave that host.
    """
    return _ZONED.sub(r"\1", url)


def proven_name(host: str) -> str:
    """Return the name that the server at ``host`` must prove, and that SNI carries.

    Certificates have no brackets, no zones and no dot at the end of an absolute name (RFC 6066
    section 3).
    """
    address = literal_address(host)
    return host.removesuffix(".") if address is None else str(address)


def show_address(host: str, port: object) -> str:
    """Return ``host:port``, an IPv6 address in brackets.

    IPv4 callers of a socket that takes both are IPv6 addresses to the kernel: here they are IPv4.
    """
    if ":" not in host:
        return f"{host}:{port}"
    address = literal_address(host)
    if address is None or address.version == 6:  # without its own way of writing it
        return f"[{host}]:{port}"
    return f"{address}:{port}"
