"""Connections: urllib3's pools, dialled without blocking, and the general path for answers.

urllib3 owns the connections; a worker has one checked out for as long as it lives. What is ours
is the dial (so that waiting for a connect costs no thread and ``stop`` can end it), TLS on top of
it as a ``Tunnel``, for the same reason, and reading an answer the core did not recognise (parsed by
``http.client``, waited for together with ``stop``).
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import NO_CONTENT, SWITCHING_PROTOCOLS
from typing import Any, NamedTuple, Self, cast

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError
from urllib3.util import connection as urllib3_connection
from urllib3.util import parse_url

from pipeline.errors import UsageError
from pipeline.tls import Credentials
from pipeline.tunnel import Tunnel

__all__ = ["Answer", "DialConnection", "Line", "Pool", "parse_answer", "socket_options"]

#: What is read of an answer's body; the texts that mean something are under 30 bytes.
ANSWER_BODY_MAX = 64 * 1024
#: What is received before an answer that is not complete is given up.
ANSWER_MAX = 128 * 1024


class DialConnection(HTTPConnection):
    """A urllib3 connection whose socket is still connecting when ``connect`` returns."""

    _addresses: Iterator[Any] = iter(())

    def _new_conn(self) -> socket.socket:
        host = self._dns_host.strip("[]")
        try:
            found = socket.getaddrinfo(
                host, self.port, urllib3_connection.allowed_gai_family(), socket.SOCK_STREAM
            )
        except (socket.gaierror, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
            raise NameResolutionError(self.host, self, reason) from error
        # Resolved anew at each dial: addresses change.
        self._addresses = iter(found)
        return self._connect_next(None)

    def dial_next(self, error: OSError) -> None:
        """Go on with the next address; raise ``NewConnectionError`` when there is none."""
        self.close()
        self.sock = self._connect_next(error)

    def _connect_next(self, error: OSError | None) -> socket.socket:
        for family, kind, proto, _, address in self._addresses:
            sock = None
            try:
                sock = socket.socket(family, kind, proto)
                sock.setblocking(False)
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                with contextlib.suppress(BlockingIOError):  # EINPROGRESS
                    sock.connect(address)
            except OSError as failure:
                error = failure
                if sock is not None:
                    sock.close()
            else:
                return sock
        reason = error or "name resolved to no address"
        raise NewConnectionError(self, f"Failed to establish a new connection: {reason}") from error


def socket_options(dead_link_timeout_s: float) -> list[tuple[int, int, int | bytes]]:
    """What every connection we make has set: urllib3's own, and keepalive for a silent peer."""
    probe_s = max(1, round(dead_link_timeout_s / 4))
    return [
        *HTTPConnection.default_socket_options,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


class Pool(HTTPConnectionPool):
    """The connections to one URL of one peer.

    Parameters
    ----------
    url : str
        ``http://host:port`` or ``https://host:port``.
    head : bytes
        What every request to this URL starts with (``protocol.request_head``).
    size : int
        Connections kept.
    dead_link_timeout_s : float
        A silent peer is probed, and given up after this long (keepalive).
    credentials : Credentials, optional
        For ``https``, which needs them.
    """

    ConnectionCls = DialConnection

    def __init__(
        self,
        url: str,
        head: bytes,
        *,
        size: int,
        dead_link_timeout_s: float,
        credentials: Credentials | None = None,
    ) -> None:
        parsed = parse_url(url)
        if parsed.scheme not in ("http", "https"):
            raise UsageError(f"url: {url!r}: only http and https peers can be sent to")
        self.credentials = credentials if parsed.scheme == "https" else None
        if parsed.scheme == "https" and credentials is None:
            raise UsageError(f"url: {url!r}: https needs tls")
        super().__init__(
            cast(str, parsed.host),
            parsed.port,
            maxsize=size,
            block=False,
            retries=False,
            socket_options=socket_options(dead_link_timeout_s),
        )
        self.url = url
        self.head = head
        # As an address: without brackets and zone.
        self._proven_host = cast(str, parsed.host).strip("[]").partition("%")[0]

    def tunnel(self) -> Tunnel:
        """Make the TLS of a new connection."""
        assert self.credentials is not None
        self.credentials.poll()
        host = self.credentials.info.server_name or self._proven_host
        return Tunnel(self.credentials, host)


class Line:
    """What a worker sends through: one connection checked out of a pool, or none.

    Used by the dispatcher thread that holds the worker; ``close`` by ``stop`` as well, after the
    worker ended.
    """

    __slots__ = (
        "_connection",
        "_lock",
        "_pool",
        "deadline",
        "outgoing",
        "received",
        "tunnel",
        "url",
    )

    def __init__(self) -> None:
        self.url = ""
        #: What has been received of an answer that ``http.client`` reads.
        self.received = b""
        #: The TLS of the connection, once it is connected.
        self.tunnel: Tunnel | None = None
        #: What the loop is writing of it, and so must not go away.
        self.outgoing = b""
        self._lock = threading.Lock()  # one close at a time
        self.deadline = 0.0
        self._pool: Pool | None = None
        self._connection: DialConnection | None = None

    def dial(self, pool: Pool, timeout_s: float) -> int:
        """Start to connect to the pool's host; return the descriptor.

        Blocks while the name is resolved. Raises ``urllib3.exceptions.HTTPError``.
        """
        self.close()
        self.url = pool.url
        self.deadline = time.monotonic() + timeout_s
        self._pool = pool
        self._connection = cast(DialConnection, pool._get_conn())
        try:
            self._connection.connect()
        except BaseException:
            self.close()
            raise
        return self.fileno()

    def dial_next(self, error: OSError) -> int:
        """Try the next address the name resolved to; raises as :meth:`dial`."""
        if self._connection is None:
            raise error
        try:
            self._connection.dial_next(error)
        except BaseException:
            self.close()
            raise
        return self.fileno()

    @property
    def sock(self) -> socket.socket:
        """The socket of the open connection."""
        assert self._connection is not None
        assert isinstance(self._connection.sock, socket.socket)
        return self._connection.sock

    @property
    def head(self) -> bytes:
        """What a request on the open connection starts with."""
        assert self._pool is not None
        return self._pool.head

    @property
    def is_sealed(self) -> bool:
        """Whether the open connection is to carry TLS."""
        assert self._pool is not None
        return self._pool.credentials is not None

    def begin_tls(self) -> Tunnel:
        """Put TLS on the connection, which is connected."""
        assert self._pool is not None
        self.tunnel = self._pool.tunnel()
        return self.tunnel

    def take_outgoing(self) -> bytes:
        """Return what the tunnel has to send, and keep it until the next call."""
        assert self.tunnel is not None
        self.outgoing = self.tunnel.outgoing()
        return self.outgoing

    def say_why(self) -> None:
        """Send the tunnel's last words, an alert: to the peer they are what went wrong."""
        if self.tunnel is not None:
            with contextlib.suppress(OSError):
                self.sock.send(self.tunnel.outgoing())

    def fileno(self) -> int:
        return self.sock.fileno()

    def forget_after_fork(self) -> None:
        """Close this process's copy of the connection; the pool is not ours to touch."""
        self._lock = threading.Lock()
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        """Close the connection, if there is one, and give it back to its pool for a later dial."""
        with self._lock:
            connection, self._connection = self._connection, None
            self.tunnel = None
            self.outgoing = b""
        if connection is not None and self._pool is not None:
            connection.close()
            self._pool._put_conn(connection)


class Answer(NamedTuple):
    """An answer read by the general path; ``keep`` says that the connection is fit for another."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    keep: bool


class _MoreNeededError(Exception):
    """The bytes end within the answer, and the connection has not ended."""


class _Received(io.BytesIO):
    """What has been received of an answer, as the file ``http.client`` reads from."""

    def __init__(self, data: bytes, *, is_ended: bool) -> None:
        super().__init__(data)
        self.is_cut = False  # the connection ended where http.client wanted more
        self._is_ended = is_ended

    def makefile(self, _mode: str) -> Self:
        return self

    def close(self) -> None:
        """Stay open for the answer that follows an interim one."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            self._end()
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is None or size < 0 or len(data) < size:
            self._end()
        return data

    def _end(self) -> None:
        if not self._is_ended:
            raise _MoreNeededError
        self.is_cut = True


def parse_answer(data: bytes, *, is_ended: bool, is_written: bool) -> Answer | None:
    """Have ``http.client`` read an answer that the core did not recognise.

    Parameters
    ----------
    data : bytes
        What has been received, from the first byte of the answer on.
    is_ended : bool
        Whether the peer has ended the stream behind ``data``.
    is_written : bool
        Whether the request was written whole; otherwise the connection is not fit for another.

    Returns
    -------
    Answer or None
        None when more has to be read first. Interim answers (1xx) are passed over.

    Raises
    ------
    http.client.HTTPException
        If it is malformed, cut off or too long.
    """
    received = _Received(data, is_ended=is_ended)
    try:
        response = _read_final_head(received)
        # A 204 has no body, whatever its headers say (RFC 9112 6.3).
        body = b"" if response.status == NO_CONTENT else response.read(ANSWER_BODY_MAX)
    except _MoreNeededError:
        if len(data) > ANSWER_MAX:
            raise http.client.HTTPException("answer too long") from None
        return None
    is_plain = response.status != NO_CONTENT or not (
        response.chunked or response.getheader("Content-Length", "0") != "0"
    )
    is_whole = response.status == NO_CONTENT or response.isclosed()
    keep = (
        is_written
        and is_plain
        and is_whole
        and not is_ended
        and not response.will_close
        and received.tell() == len(data)
    )
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, body, keep)


def _read_final_head(received: _Received) -> http.client.HTTPResponse:
    while True:
        # HTTPResponse wants a socket only to call makefile on it.
        response = http.client.HTTPResponse(cast(socket.socket, received), method="POST")
        response.begin()
        if received.is_cut:
            raise http.client.HTTPException("the connection ended within the head of the answer")
        if response.status >= 200 or response.status == SWITCHING_PROTOCOLS:
            return response
