"""Connections: urllib3's pools, dialled without blocking.

urllib3 owns the connections; a worker has one checked out for as long as it lives. What is ours
is the dial (so that waiting for a connect costs no thread and ``stop`` can end it), and TLS on top
of it as a ``Tunnel``, for the same reason.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError
from urllib3.util import connection as urllib3_connection
from urllib3.util import parse_url

from pipeline.errors import UsageError
from pipeline.odd_answer import OddAnswer
from pipeline.tls import Credentials
from pipeline.tunnel import Tunnel

__all__ = ["DialConnection", "Line", "Pool", "socket_options"]


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
        self._url_host = cast(str, parsed.host)

    def tunnel(self) -> Tunnel:
        """Make the TLS of a new connection; ``ssl.SSLError`` if the host cannot prove itself."""
        assert self.credentials is not None
        self.credentials.poll()
        return Tunnel(self.credentials, self._url_host)


class Line:
    """What a worker sends through: one connection checked out of a pool, or none.

    Used by the dispatcher thread that holds the worker; ``close`` by ``stop`` as well, after the
    worker ended. ``telling``: see :class:`OddAnswer`.
    """

    __slots__ = (
        "_connection",
        "_lock",
        "_pool",
        "deadline",
        "odd",
        "outgoing",
        "tunnel",
        "url",
    )

    def __init__(self, telling: int) -> None:
        self.url = ""
        #: The answer, where the core does not recognise it.
        self.odd = OddAnswer(telling)
        #: The TLS of the connection, once it is connected.
        self.tunnel: Tunnel | None = None
        #: What the loop is writing of it, and so must not go away.
        self.outgoing = b""
        self._lock = threading.RLock()  # one close at a time
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
                self.sock.send(self.tunnel.outgoing(), socket.MSG_NOSIGNAL)

    def fileno(self) -> int:
        return self.sock.fileno()

    def forget_after_fork(self) -> None:
        """Close this process's copy of the connection; the pool is not ours to touch."""
        self._lock = threading.RLock()
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        """Close the connection, if there is one, and give it back to its pool for a later dial."""
        connection = self.end()
        if connection is not None and self._pool is not None:
            self._pool._put_conn(connection)

    def end(self) -> DialConnection | None:
        """Close the connection, if there is one, and return it.

        ``stop`` leaves the pool alone: its queue has a lock that a signal's handler, come while
        another line of the pool is given back, must not wait for.
        """
        with self._lock:
            connection, self._connection = self._connection, None
            self.tunnel = None
            self.outgoing = b""
        if connection is not None:
            connection.close()
        return connection
