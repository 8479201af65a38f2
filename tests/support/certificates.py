"""Authority: certificates as a cluster has them, made by trustme, and lists of revoked ones."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.tls import TLSInfo

#: In ``issue``: what follows is a URI.
URI = "uri:"


class Files(NamedTuple):
    """A certificate and its key, in files."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority, and what it has issued, as files in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self._directory = directory
        self._name = name
        self._count = 0
        self.ca = self._path("ca.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, *names: str, common_name: str = "member") -> Files:
        """Issue a certificate for loopback and ``names``: host names, or ``URI`` and a URI."""
        self._count += 1
        files = Files(self._path(f"{self._count}.pem"), self._path(f"{self._count}.key"))
        hosts = [name for name in names if not name.startswith(URI)]
        uris = [name.removeprefix(URI) for name in names if name.startswith(URI)]
        leaf = self._ca.issue_cert("127.0.0.1", *hosts, common_name=common_name)
        leaf.private_key_pem.write_to_path(files.key)
        pem = leaf.cert_chain_pems[0].bytes()
        files.cert.write_bytes(self._with_uris(pem, uris) if uris else pem)
        return files

    def revoke(self, *revoked: Files) -> Path:
        """Write a list of these certificates, which may be none."""
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        issuer = x509.load_pem_x509_certificate(self.ca.read_bytes()).subject
        builder = x509.CertificateRevocationListBuilder(issuer, now - day, now + day)
        for files in revoked:
            serial = x509.load_pem_x509_certificate(files.cert.read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder(serial, now - day).build()
            builder = builder.add_revoked_certificate(entry)
        path = self._path("crl.pem")
        path.write_bytes(
            builder.sign(self._key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        return path

    def info(self, files: Files, **settings: Any) -> TLSInfo:
        """Settings of a node that has this certificate and trusts this authority."""
        return TLSInfo(
            cert_file=files.cert, key_file=files.key, trusted_ca_file=self.ca, **settings
        )

    def client(self, files: Files | None, *, version: str = "1.3") -> ssl.SSLContext:
        """Make a caller's context: Python's own, that trusts this authority."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.maximum_version = ssl.TLSVersion[f"TLSv{version.replace('.', '_')}"]
        if files is not None:
            context.load_cert_chain(files.cert, files.key)
        return context

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._name}-{name}"

    def _key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def _with_uris(self, pem: bytes, uris: list[str]) -> bytes:
        """Sign a certificate once more, with URIs as alternative names: trustme knows none."""
        given = x509.load_pem_x509_certificate(pem)
        builder = x509.CertificateBuilder(
            given.issuer,
            given.subject,
            given.public_key(),
            given.serial_number,
            given.not_valid_before_utc,
            given.not_valid_after_utc,
        )
        for extension in given.extensions:
            value = extension.value
            if isinstance(value, x509.SubjectAlternativeName):
                named = map(x509.UniformResourceIdentifier, uris)
                value = x509.SubjectAlternativeName([*value, *named])
            builder = builder.add_extension(value, extension.critical)
        signed = builder.sign(self._key(), hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)
