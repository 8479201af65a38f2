"""Connections: urllib3's pools, of sockets that we dial.

urllib3 owns the connections; a worker has one checked out for as long as it lives. What is ours
is the dial (so that waiting for a connect costs no thread and ``stop`` can end it), and TLS on top
of it as a ``Tunnel``, for the same reason.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import cast

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.util import parse_url

from pipeline.errors import UsageError
from pipeline.locks import lock_of
from pipeline.net._sockets import OwnSocket
from pipeline.net.dialling import Dial
from pipeline.tls import Credentials
from pipeline.tls.tunnel import Tunnel
from pipeline.wire.odd_answer import OddAnswer

__all__ = ["Pool", "PooledConnection", "end_tls"]


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


def end_tls(sock: OwnSocket, tunnel: Tunnel, *, is_cut: bool) -> None:
    """Close a connection in TLS's order, without waiting. Differs from etcd: Go never resets one.

    In the middle of a handshake or of a record, which ``is_cut`` says, the peer cannot be told
    anything, and the connection is reset. Were it merely closed, an OpenSSL at the other end would
    answer with an alert, and would be sent SIGPIPE for it.
    """
    words = None if is_cut else tunnel.last_words()
    if words is None:
        sock.reset()
        return
    with contextlib.suppress(OSError):
        sock.send(words, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    sock.close()


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
        )
        self.url = url
        self.head = head
        self._url_host = cast(str, parsed.host)
        self._url_port = cast(int, parsed.port)
        self._socket_options = socket_options(dead_link_timeout_s)

    def dial(self, timeout_s: float, on_done: Callable[[Dial], object]) -> Dial:
        """Make a dial to the URL's host, to be given to :meth:`Dialer.begin`."""
        return Dial(self._url_host, self._url_port, timeout_s, self._socket_options, on_done)

    def tunnel(self) -> Tunnel:
        """Make the TLS of a new connection; ``ssl.SSLError`` if the host cannot prove itself."""
        assert self.credentials is not None
        self.credentials.poll()
        return Tunnel(self.credentials, self._url_host)


class PooledConnection:
    """What a worker sends through: one connection checked out of a pool, or none.

    Used by the dispatcher thread that holds the worker; ``close`` by ``stop`` as well, after the
    worker ended. ``telling``: see :class:`OddAnswer`.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_lock",
        "_pool",
        "dial",
        "odd",
        "outgoing",
        "tunnel",
        "url",
    )

    def __init__(self, telling: int) -> None:
        self.url = ""
        #: The dial that is to open it, or has.
        self.dial: Dial | None = None
        #: The answer, where the core does not recognise it.
        self.odd = OddAnswer(telling)
        #: The TLS of the connection, once it is connected.
        self.tunnel: Tunnel | None = None
        #: Ciphertext that the loop is writing. The worker points into it, so it must stay alive.
        self.outgoing = b""
        self._lock = lock_of(self)  # one close at a time
        self._pool: Pool | None = None
        self._connection: HTTPConnection | None = None

    def prepare(self, pool: Pool, timeout_s: float, on_done: Callable[[Dial], object]) -> Dial:
        """Make a dial to the pool's host, to be begun, and to be followed by :meth:`open`."""
        self.close()
        self.url = pool.url
        self._pool = pool
        self.dial = pool.dial(timeout_s, on_done)
        return self.dial

    def open(self) -> int:
        """Take what the dial came to; return the descriptor. Raises ``DialError``."""
        assert self._pool is not None
        assert self.dial is not None
        sock = self.dial.take()
        self._connection = cast(HTTPConnection, self._pool._get_conn())
        self._connection.sock = sock
        return sock.fileno()

    @property
    def sock(self) -> OwnSocket:
        """The socket of the open connection."""
        assert self._connection is not None
        assert isinstance(self._connection.sock, OwnSocket)
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

    def close(self, *, is_cut: bool = False) -> None:
        """Close the connection, if there is one, and give it back to its pool for a later dial.

        ``is_cut``: some of ``outgoing`` was not written.
        """
        connection = self.end(is_cut=is_cut)
        if connection is not None and self._pool is not None:
            self._pool._put_conn(connection)

    def end(self, *, is_cut: bool = False) -> HTTPConnection | None:
        """Close the connection, if there is one, and return it.

        ``stop`` leaves the pool alone: its queue has a lock that a signal's handler, come while
        another connection of the pool is given back, must not wait for.
        """
        with self._lock:
            connection, self._connection = self._connection, None
            dial, self.dial = self.dial, None
            tunnel, self.tunnel = self.tunnel, None
            self.outgoing = b""
        if dial is not None:
            dial.discard()
        if connection is not None:
            if tunnel is not None and isinstance(connection.sock, OwnSocket):
                end_tls(connection.sock, tunnel, is_cut=is_cut)
            connection.close()
        return connection
