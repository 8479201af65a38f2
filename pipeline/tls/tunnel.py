"""Tunnel: one TLS connection without a socket, bytes in and bytes out.

Who owns the socket does the I/O and keeps the deadlines: the I/O loop for messages, the prober
for its own.
"""

from __future__ import annotations

import contextlib
import ssl

from pipeline.tls import Credentials

__all__ = ["Tunnel", "tls_reason"]

_READ_BYTES = 64 * 1024


class Tunnel:
    """The client's end of a TLS connection.

    Parameters
    ----------
    credentials : Credentials
        The set in force now is used for as long as the tunnel lives.
    host : str
        The host dialled, as in the URL.

    Notes
    -----
    Not thread-safe. Nothing here waits. Its errors, also when it is made, are ``ssl.SSLError``.
    """

    def __init__(self, credentials: Credentials, host: str) -> None:
        self.is_established = False
        #: Something has come since the handshake, session tickets for one.
        self.has_heard = False
        #: The connection has been answered before. The pipeline, which reads answers, sets it.
        self.has_answered = False
        #: The peer has ended the stream in order.
        self.is_ended = False
        self._has_failed = False
        self._is_record_due = False  # of what was encrypted something has not been taken
        self._credentials = credentials
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = credentials.client_context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=credentials.name_of(host)
        )

    def shake(self, data: bytes) -> bool:
        """Go on with the handshake, given what came; True when it is done.

        Raises
        ------
        ssl.SSLError
            If it fails, or the rules refuse the server's certificate.
        """
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
            self._credentials.check_server(self._tls)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self._has_failed = True
            raise
        self.is_established = True
        return True

    def open(self, data: bytes) -> bytes:
        """Return the plaintext that ``data`` completes; none, for session tickets and the like."""
        self.has_heard = True
        self._incoming.write(data)
        opened = b""
        try:
            while piece := self._tls.read(_READ_BYTES):
                opened += piece
        except ssl.SSLWantReadError:
            return opened
        self.is_ended = True
        return opened

    def is_silent(self, data: bytes) -> bool:
        """Tell whether ``data`` says nothing: the connection is fit for another request."""
        try:
            return not self.open(data) and not self.is_ended
        except ssl.SSLError:
            return False

    def seal(self, data: bytes | memoryview) -> None:
        """Encrypt; what it becomes is added to what :meth:`outgoing` returns next."""
        self._is_record_due = True
        written = self._tls.write(data)
        while written < len(data):
            written += self._tls.write(memoryview(data)[written:])

    def outgoing(self) -> bytes:
        """Take what is to be sent."""
        self._is_record_due = False
        return self._outgoing.read()

    def last_words(self) -> bytes | None:
        """Return what is to be sent before the connection is closed: that nothing follows
        (close_notify), or with an alert what went wrong. None in the middle of a handshake, and
        where a message would go with it.
        """
        if self._is_record_due or not (self.is_established or self._has_failed):
            return None
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's close_notify, too
            self._tls.unwrap()
        return self._outgoing.read()


def tls_reason(error: ssl.SSLError) -> str:
    """Put an error of ``ssl`` into words."""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return f"certificate verify failed: {error.verify_message}"
    if getattr(error, "reason", None):  # OpenSSL's; an error of ours has none
        return error.reason.lower().replace("_", " ")
    return str(error.args[-1])
