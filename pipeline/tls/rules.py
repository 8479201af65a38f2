"""The rules of names: what a certificate proves, and whether that is enough.

Source: etcd client/pkg/transport/listener.go ``TLSInfo.baseConfig``, ``VerifyPeerCertificate``; Go
``x509.Certificate.VerifyHostname``.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tls.info import TLSInfo

__all__ = ["can_be_proven", "refusal"]

#: The longest host name (RFC 1035 section 2.3.4). SNI holds no longer one either.
NAME_MAX = 253


def can_be_proven(name: str) -> bool:
    """Tell whether a name is one that a certificate can have, and SNI can carry."""
    try:
        length = len(name.encode("idna"))
    except UnicodeError:
        return False
    return 0 < length <= NAME_MAX and not name.startswith(".") and "\0" not in name


def refusal(info: TLSInfo, certificate: Mapping[str, Any]) -> str:
    """Tell why the rules refuse a verified certificate; empty if they do not.

    ``certificate`` is as ``ssl.SSLSocket.getpeercert`` describes it.
    """
    names = tuple(certificate.get("subjectAltName", ()))
    if info.allowed_cn and (cn := _common_name(certificate)) not in info.allowed_cn:
        return f"certificate refused: its common name {cn!r} is not allowed"
    if info.allowed_hostnames and not any(
        _is_valid_for(host, names) for host in info.allowed_hostnames
    ):
        return "certificate refused: it is valid for none of the allowed host names"
    if info.allowed_uris and not any(("URI", uri) in names for uri in info.allowed_uris):
        return "certificate refused: it has none of the allowed URIs"
    return ""


def _common_name(certificate: Mapping[str, Any]) -> str:
    """Return the subject's common name, the last one as in Go; empty if there is none."""
    found = ""
    for part in certificate.get("subject", ()):
        for kind, value in part:
            if kind == "commonName":
                found = value
    return found


def _is_valid_for(host: str, names: Iterable[tuple[str, str]]) -> bool:
    """Tell whether a certificate with these alternative names is valid for a host.

    Source: Go ``x509.Certificate.VerifyHostname``: a wildcard stands for the whole first label
    and no more; IP addresses have names of their own kind; the common name does not count.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        wanted = host.lower().removesuffix(".").split(".")
        return any(kind == "DNS" and _matches(name, wanted) for kind, name in names)
    for kind, name in names:
        with contextlib.suppress(ValueError):
            if kind == "IP Address" and ipaddress.ip_address(name.strip()) == address:
                return True
    return False


def _matches(pattern: str, wanted: list[str]) -> bool:
    labels = pattern.lower().removesuffix(".").split(".")
    if len(labels) != len(wanted) or not all(wanted):
        return False
    return labels[1:] == wanted[1:] and labels[0] in ("*", wanted[0])
