"""Requests to one peer, one after the other, in the caller's thread.

Dialling, TLS and the reading of answers are the library's own, so what fails here fails with the
words that a node's log has.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Any, Self

import urllib3

from pipeline import TLSInfo
from pipeline.net._sockets import OwnSocket
from pipeline.net.dialling import Dial, Dialer
from pipeline.net.poller import Poller
from pipeline.net.pool import Pool
from pipeline.tls.credentials import Credentials
from pipeline.wire.odd_answer import OddAnswer, PeerAnswer

__all__ = ["Exchange", "ExchangeError"]

READ_BYTES = 64 * 1024
#: Who speaks TLS answers a hello at once.
HELLO_TIMEOUT_S = 0.5
#: OpenSSL's ``X509_V_FLAG_NO_CHECK_TIME``, for which ``ssl`` has no name.
NO_CHECK_TIME = 0x200000


class ExchangeError(Exception):
    """No answer; the text is the reason that a node would log."""


class _NoAnswerError(ExchangeError):
    """The connection ended before anything of an answer came."""


class Exchange:
    """One connection at a time to a peer.

    Parameters
    ----------
    url : str
        Checked, ``http`` or ``https``.
    tls : TLSInfo, optional
        For ``https``.
    timeout_s : float
        To dial, again to shake hands, and again for each answer.

    Raises
    ------
    UsageError
        If a file of ``tls`` cannot be loaded.
    """

    def __init__(self, url: str, *, tls: TLSInfo | None, timeout_s: float) -> None:
        self.credentials = None if tls is None else Credentials(tls)
        self._url = url
        self._timeout_s = timeout_s
        self._pool = Pool(
            url,
            b"",
            size=1,
            dead_link_timeout_s=timeout_s,
            credentials=self.credentials,
            handshake_timeout_s=timeout_s,
        )
        self._poller = Poller("cli")
        self._dialer = Dialer(self._poller)
        #: The open connection; None before it is dialled, and once it cannot be used again.
        self.sock: OwnSocket | None = None
        self._is_used = False  # something was asked on it

    def __enter__(self) -> Self:
        self._poller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self._poller.stop(time.monotonic())

    def close(self) -> None:
        """Close the connection, if it is open."""
        sock, self.sock = self.sock, None
        if sock is not None:
            sock.close()

    def dial(self) -> Dial:
        """Connect anew, TLS included. Raises ``ExchangeError``."""
        self.close()
        self._is_used = False
        is_done = threading.Event()
        dial = self._pool.dial(self._timeout_s, lambda _: is_done.set())
        self._dialer.begin(dial)
        try:
            is_done.wait()  # which the dialer ends in time
            self.sock = dial.take()
        except OSError as error:
            raise ExchangeError(str(error)) from error
        except BaseException:
            self._dialer.cancel(dial)
            dial.discard()
            raise
        self.sock.settimeout(self._timeout_s)
        return dial

    def ask(self, request: bytes, *, telling: int = 200) -> PeerAnswer:
        """Send a whole request; the answer, of whose status ``telling`` the text is waited for.

        Raises ``ExchangeError``. A connection that is not fit for another request is closed, and
        the next one is made when it is needed. A request is sent once more if the connection is a
        kept one, which the peer may have closed meanwhile: nothing that is asked changes anything.
        """
        if self.sock is not None and self._is_used:
            with contextlib.suppress(_NoAnswerError):
                return self._ask(request, telling)
        if self.sock is None:
            self.dial()
        return self._ask(request, telling)

    def time(self, request: bytes) -> tuple[float, PeerAnswer]:
        """Ask on a connection that is there; the seconds it took, without connecting."""
        if self.sock is None:
            self.dial()
        began = time.perf_counter()
        answer = self.ask(request)
        return time.perf_counter() - began, answer

    def refused_certificate(self) -> dict[str, Any] | None:
        """Return the peer's certificate, as ``getpeercert`` has it, whatever its dates and names.

        For one that a handshake was refused for: it is looked at on a connection of its own, and
        nothing is sent there. None unless it is signed by whom we trust: what another says of
        itself is not worth showing.
        """
        if self.credentials is None:
            return None
        info, url = self.credentials.info, urllib3.util.parse_url(self._url)
        host = (url.host or "").strip("[]")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
            context.load_cert_chain(info.cert_file, info.key_file)
            if info.trusted_ca_file is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(info.trusted_ca_file)
            with (
                socket.create_connection((host, url.port or 443), self._timeout_s) as plain,
                context.wrap_socket(plain, server_hostname=info.server_name or host) as shaken,
            ):
                return dict(shaken.getpeercert() or {}) or None
        except (OSError, ValueError):
            return None

    def _ask(self, request: bytes, telling: int) -> PeerAnswer:
        assert self.sock is not None
        self._is_used = True
        odd = OddAnswer(telling)
        deadline = time.monotonic() + self._timeout_s
        answer = None
        try:
            self.sock.sendall(request)
            while answer is None:
                if time.monotonic() >= deadline:
                    raise TimeoutError  # noqa: TRY301 - as recv does, of an answer that drips
                data = self.sock.recv(READ_BYTES)
                if not data and not odd.has_begun:
                    raise ConnectionResetError("the connection ended before an answer")
                answer = odd.feed(data, is_ended=not data, is_written=True)
        except TimeoutError as error:
            self.close()
            raise ExchangeError("no answer within the response timeout") from error
        except OSError as error:
            self.close()
            kind = ExchangeError if odd.has_begun else _NoAnswerError
            raise kind(error.strerror or str(error)) from error
        except (http.client.HTTPException, ValueError) as error:
            self.close()
            raise ExchangeError(f"malformed or incomplete answer: {error!r}") from error
        if not answer.keep:
            self.close()
        return answer

    def speaks_tls(self) -> bool:
        """Tell whether whoever listens at an ``http`` URL answers a hello of TLS."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context()
        hello = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            hello.do_handshake()
        try:
            self.dial()
            assert self.sock is not None
            self.sock.settimeout(min(HELLO_TIMEOUT_S, self._timeout_s))
            self.sock.sendall(outgoing.read())
            # A handshake record or an alert, of any version (RFC 8446 section 5.1).
            return self.sock.recv(3)[:2] in (b"\x16\x03", b"\x15\x03")
        except (OSError, ExchangeError):
            return False
        finally:
            self.close()
