"""An authority of the tests' own, and the files and servers it makes."""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import datetime
import socket
import ssl
from pathlib import Path
from typing import Any, Self

import pytest

from pipeline import TLSInfo
from pipeline.tls._engine import Session

try:
    import trustme
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
except ImportError:
    from tests.support import openssl_ca as trustme  # type: ignore[no-redef]

    x509 = None  # type: ignore[assignment]

DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority that writes what it makes to files.

    Parameters
    ----------
    directory : Path
        Where they go; made if need be.
    identities : tuple of str
        The names and addresses a certificate is for by default.
    """

    def __init__(self, directory: Path, identities: tuple[str, ...] = ("127.0.0.1",)) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.identities = identities
        self.ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)

    def issue(
        self,
        name: str,
        *identities: str,
        common_name: str | None = None,
        not_after: datetime.datetime | None = None,
        uri: str | None = None,
    ) -> tuple[Path, Path]:
        """Write a certificate and its key; return both files."""
        issued = self.ca.issue_cert(
            *(identities or self.identities), common_name=common_name, not_after=not_after
        )
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        if uri is not None:
            cert.write_bytes(self._with_uri(cert.read_bytes(), uri))
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def info(self, name: str = "node", **settings: object) -> TLSInfo:
        """Issue a certificate and say what a node with it is configured with."""
        cert, key = self.issue(name)
        files = {"cert_file": cert, "key_file": key, "trusted_ca_file": self.ca_file}
        return TLSInfo(**{**files, **settings})  # type: ignore[arg-type]

    def server(
        self,
        name: str = "server",
        *identities: str,
        not_after: datetime.datetime | None = None,
        maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
    ) -> ssl.SSLContext:
        """Return what a server that asks its clients for certificates works with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(name, *identities, not_after=not_after))
        context.load_verify_locations(self.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = maximum
        return context

    def client(self, *files: Path, version: str = "1.3") -> ssl.SSLContext:
        """Return what a client works with that speaks ``version``; ``files`` as ``issue`` gives."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.maximum_version = ssl.TLSVersion[f"TLSv{version.replace('.', '_')}"]
        if files:
            context.load_cert_chain(*files)
        return context

    def revoke(self, *certs: Path, next_update: datetime.timedelta = DAY) -> Path:
        """Write the list of these certificates as revoked."""
        _require_cryptography()
        today = now()
        issuer = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        builder = x509.CertificateRevocationListBuilder(
            issuer.subject, last_update=today - 2 * DAY, next_update=today + next_update
        )
        for cert in certs:
            serial = x509.load_pem_x509_certificate(cert.read_bytes()).serial_number
            revoked = x509.RevokedCertificateBuilder(serial, today - DAY)
            builder = builder.add_revoked_certificate(revoked.build())
        path = self.directory / "crl.pem"
        signed = builder.sign(self._key(), hashes.SHA256())
        path.write_bytes(signed.public_bytes(Encoding.PEM))
        return path

    def _with_uri(self, pem: bytes, uri: str) -> bytes:
        """Sign a certificate once more, with a URI among its names: trustme knows none."""
        _require_cryptography()
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
                value = x509.SubjectAlternativeName([*value, x509.UniformResourceIdentifier(uri)])
            builder = builder.add_extension(value, extension.critical)
        return builder.sign(self._key(), hashes.SHA256()).public_bytes(Encoding.PEM)

    def rename(self, cert: Path, old: bytes, new: bytes) -> None:
        """Sign a certificate once more, with other bytes of the same length: no text, maybe."""
        _require_cryptography()
        given = x509.load_pem_x509_certificate(cert.read_bytes())
        signed = given.tbs_certificate_bytes
        assert old in signed
        assert len(old) == len(new)
        signed = signed.replace(old, new)
        signature = self._key().sign(signed, ec.ECDSA(hashes.SHA256()))
        algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
        der = _der(0x30, signed + algorithm + _der(0x03, b"\0" + signature))
        cert.write_text(ssl.DER_cert_to_PEM_cert(der))

    def _key(self) -> ec.EllipticCurvePrivateKey:
        key = load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def _require_cryptography() -> None:
    """Skip a test for which the ``openssl`` command does not do."""
    if x509 is None:
        pytest.skip("cryptography cannot be installed for this Python")


def _der(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(digits))) + digits + value


def serial_of(cert: Path) -> str:
    """Return a certificate's number as ``getpeercert`` shows it."""
    number = f"{x509.load_pem_x509_certificate(cert.read_bytes()).serial_number:X}"
    return number.zfill(len(number) + len(number) % 2)


def now() -> datetime.datetime:
    """Return the time."""
    return datetime.datetime.now(datetime.UTC)


class Pair:
    """Two connected sockets that do not block, one for a session of ours."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        for sock in (self.ours, self.theirs):
            sock.setblocking(False)
        self._python: ssl.SSLSocket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in (self.ours, self.theirs, self._python):
            if sock is not None:
                sock.close()

    def python(self, context: ssl.SSLContext, **settings: Any) -> ssl.SSLSocket:
        """Put Python's TLS on the other end, for a handshake that is still to come."""
        self._python = context.wrap_socket(
            self.theirs, do_handshake_on_connect=False, suppress_ragged_eofs=False, **settings
        )
        return self._python


def shake(*ends: Session | ssl.SSLSocket) -> None:
    """Have both ends of a connection shake hands; raises what one of them refuses with."""
    pending = list(ends)
    while pending:
        for end in list(pending):
            if isinstance(end, Session):
                if end.shake():
                    pending.remove(end)
                continue
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                pending.remove(end)


class Onlooker:
    """Somebody who uses Python's ``ssl``, and OpenSSL with it, in the same thread as we do."""

    def __init__(self, authority: Authority) -> None:
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        certificate = authority.issue("onlooker", "onlooker.test")
        self._client = authority.client(*certificate).wrap_bio(
            to_client, to_server, server_hostname="onlooker.test"
        )
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(*certificate)
        # Kept for as long as it is looked: its end would be one of the connection.
        self._server = server.wrap_bio(to_server, to_client, server_side=True)
        for end in (self._client, self._server, self._client, self._server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()

    def look(self) -> None:
        """Fail if OpenSSL has errors for this thread that are somebody else's."""
        assert ctypes.CDLL("libcrypto.so.3").ERR_peek_error() == 0
        # To wait for the other side's goodbye would fail with them.
        with pytest.raises(ssl.SSLWantReadError):
            self._client.unwrap()


class PostHandshake:
    """What OpenSSL says after a handshake, and ``ssl`` has no words for, by a server of the tests.

    Parameters
    ----------
    sock : ssl.SSLSocket
        Of the server; TLS 1.3.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        # What the module was linked with, found from the module itself.
        self._library = ctypes.CDLL(_ssl.__file__)
        # PyObject_HEAD, a weak reference to the socket, then the SSL*.
        held = id(sock._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)  # type: ignore[attr-defined]
        self._ssl = ctypes.c_void_p.from_address(held)

    def update_keys(self, *, asks_for_update: bool) -> None:
        """Take new keys for what follows, and maybe have the other side do so as well."""
        assert self._library.SSL_key_update(self._ssl, int(asks_for_update)) == 1
        self._sock.do_handshake()  # sends it

    def send_ticket(self) -> None:
        """Send a session ticket."""
        assert self._library.SSL_new_session_ticket(self._ssl) == 1
        self._sock.do_handshake()  # sends it
