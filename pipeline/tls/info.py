"""TLSInfo: which files a node proves itself with, and whom it believes.

Source: etcd client/pkg/transport/listener.go ``TLSInfo``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.arguments import absolute_path, require_bool, require_one_of
from pipeline.callbacks import require_callable
from pipeline.config import AnyPath
from pipeline.errors import UsageError
from pipeline.logs import show
from pipeline.names import proven_name
from pipeline.tls.rules import can_be_proven

__all__ = ["VERSIONS", "TLSInfo"]

#: What ``min_version`` may be.
VERSIONS = ("1.2", "1.3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSInfo:
    """The files and rules of mutual TLS, for both directions.

    One certificate serves both: if it has an extended key usage, that must name client and
    server authentication. All files are PEM; they are loaded again when they change.

    Parameters
    ----------
    cert_file, key_file : path
        Our certificate, followed by its intermediates, and its key, which must not be encrypted.
        Each path may be ``str``, ``bytes`` or ``os.PathLike``. A relative one is made absolute
        here, so it is read back as an absolute ``str``.
    trusted_ca_file : path, optional
        Who may sign the others' certificates. Without it servers are checked against the
        system's authorities, and no client can be.
    client_cert_auth : bool
        Whether the listener requires a certificate of its clients; needs ``trusted_ca_file``.
    allowed_cn : tuple of str
        If not empty: the common names a verified certificate may have. Excludes
        ``allowed_hostnames``.
    allowed_hostnames : tuple of str
        If not empty: the certificate must be valid for one of these names or IP addresses, by its
        subject alternative names.
    allowed_uris : tuple of str
        If not empty: the certificate must have one of these as a URI alternative name.
    crl_file : path, optional
        Revoked certificates. Every issuer of a leaf must have a list in it that has not expired;
        needs ``trusted_ca_file``.
    server_name : str, optional
        The name that servers must prove, instead of the host of the URL dialled.
    min_version : str
        "1.2" or "1.3".
    allow_member : callable, optional
        ``(certificate, member ID) -> bool``: whether the holder of a certificate, as
        ``ssl.SSLSocket.getpeercert`` describes it (with subject, issuer, version, serialNumber,
        notBefore, notAfter and subjectAltName), may say in X-Server-From that it is this
        member. Called from receiving threads; it must not block.

    Raises
    ------
    UsageError
        If settings contradict each other. Files are first opened by ``Transport``.
    """

    cert_file: AnyPath
    key_file: AnyPath
    trusted_ca_file: AnyPath | None = None
    client_cert_auth: bool = True
    allowed_cn: tuple[str, ...] = ()
    allowed_hostnames: tuple[str, ...] = ()
    allowed_uris: tuple[str, ...] = ()
    crl_file: AnyPath | None = None
    server_name: str | None = None
    min_version: str = "1.2"
    allow_member: Callable[[Mapping[str, Any], int], bool] | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.client_cert_auth and self.trusted_ca_file is None:
            raise UsageError("trusted_ca_file: is needed for client_cert_auth")
        if self.crl_file is not None and self.trusted_ca_file is None:
            raise UsageError("trusted_ca_file: is needed for crl_file")
        if self.allowed_cn and self.allowed_hostnames:
            raise UsageError("allowed_cn: cannot be given together with allowed_hostnames")
        for name in ("allowed_cn", "allowed_hostnames", "allowed_uris", "allow_member"):
            # The listener would let in whom the rule means to keep out.
            if getattr(self, name) and not self.client_cert_auth:
                raise UsageError(f"{name}: needs client_cert_auth")

    def _check_kinds(self) -> None:
        for name in ("cert_file", "key_file", "trusted_ca_file", "crl_file"):
            path = getattr(self, name)
            if path is not None or name in ("cert_file", "key_file"):
                # The class is frozen; nobody has seen it yet.
                object.__setattr__(self, name, absolute_path(name, path))
        require_bool("client_cert_auth", self.client_cert_auth)
        for name in ("allowed_cn", "allowed_hostnames", "allowed_uris"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or not all(isinstance(v, str) and v for v in names):
                raise UsageError(f"{name}: {show(names)} is not a tuple of names")
        if self.server_name is not None and not (
            isinstance(self.server_name, str) and self.server_name
        ):
            raise UsageError(f"server_name: {show(self.server_name)} is not a name")
        if self.server_name is not None and not can_be_proven(proven_name(self.server_name)):
            raise UsageError(f"server_name: {show(self.server_name)} is not a host name")
        require_one_of("min_version", self.min_version, VERSIONS)
        require_callable("allow_member", self.allow_member)
