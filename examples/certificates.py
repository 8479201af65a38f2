"""Certificates made on the fly, for the demo and the examples over TLS."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline import TLSInfo

__all__ = ["Certificates", "CertificatesError"]


class CertificatesError(Exception):
    """No certificates can be made here."""


class Certificates:
    """The files of TLS: an authority of our own, and a certificate for each node.

    Parameters
    ----------
    directory : Path
        Existing; gets the files.

    Raises
    ------
    CertificatesError
        Without trustme, which the extra ``demo`` brings.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import trustme
        except ModuleNotFoundError:
            raise CertificatesError(
                "no trustme: pip install 'raft-pipeline[demo]' brings it"
            ) from None
        self.authority = trustme.CA()
        self.directory = directory
        self.ca_file = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(os.fspath(self.ca_file))

    def issue(self, name: str, *, days: int) -> TLSInfo:
        """Write a node's key and certificate (ECDSA P-256), in place of those it has.

        Both are in one file, which a rename replaces: nobody ever reads one without the other.
        """
        issued = self.authority.issue_cert(
            "127.0.0.1", not_after=datetime.now(UTC) + timedelta(days=days)
        )
        path, new = self.directory / f"{name}.pem", self.directory / f"{name}.new"
        issued.private_key_and_cert_chain_pem.write_to_path(os.fspath(new))
        new.replace(path)
        return TLSInfo(cert_file=path, key_file=path, trusted_ca_file=self.ca_file)
