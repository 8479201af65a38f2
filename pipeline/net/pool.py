"""Connections: urllib3's pools, of sockets that we dial.

urllib3 owns the connections; a worker has one checked out for as long as it lives. What is ours
is the dial, TLS included, so that waiting for it costs no thread and ``stop`` can end it.
"""

from __future__ import annotations

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
from pipeline.tls.credentials import Credentials
from pipeline.wire.odd_answer import OddAnswer

__all__ = ["Pool", "PooledConnection"]


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
    handshake_timeout_s : float, optional
        As of :class:`Dial`.
    """

    def __init__(
        self,
        url: str,
        head: bytes,
        *,
        size: int,
        dead_link_timeout_s: float,
        credentials: Credentials | None = None,
        handshake_timeout_s: float | None = None,
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
        self._handshake_timeout_s = handshake_timeout_s

    def dial(self, timeout_s: float, on_done: Callable[[Dial], object]) -> Dial:
        """Make a dial to the URL's host, to be given to :meth:`Dialer.begin`."""
        return Dial(
            self._url_host,
            self._url_port,
            timeout_s,
            self._socket_options,
            on_done,
            credentials=self.credentials,
            handshake_timeout_s=self._handshake_timeout_s,
        )


class PooledConnection:
    """What a worker sends through: one connection checked out of a pool, or none.

    It is kept, open or not, until another pool's is dialled, and given back then. Used by whoever
    holds the worker, a dispatcher thread or the poller; ``close`` by ``stop`` as well, after the
    worker ended. ``telling``: see :class:`OddAnswer`.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_lock",
        "_pool",
        "dial",
        "failure",
        "odd",
        "url",
    )

    def __init__(self, telling: int) -> None:
        self.url = ""
        #: The dial that is to open it, or has.
        self.dial: Dial | None = None
        #: Why it could not be opened, for who is to tell; empty if it was not tried in vain.
        self.failure = ""
        #: The answer, where the core does not recognise it.
        self.odd = OddAnswer(telling)
        self._lock = lock_of(self)  # one close at a time
        self._pool: Pool | None = None
        self._connection: HTTPConnection | None = None

    def prepare(self, pool: Pool, timeout_s: float, on_done: Callable[[Dial], object]) -> Dial:
        """Make a dial to the pool's host, to be begun, and to be followed by :meth:`open`."""
        self.close()
        if pool is not self._pool:
            self._give_back()
        self.url = pool.url
        self.failure = ""
        self._pool = pool
        self.dial = pool.dial(timeout_s, on_done)
        return self.dial

    def open(self) -> OwnSocket:
        """Take what the dial came to. Raises ``DialError``."""
        assert self._pool is not None
        assert self.dial is not None
        sock = self.dial.take()
        if self._connection is None:
            self._connection = cast(HTTPConnection, self._pool._get_conn())
        self._connection.sock = sock
        return sock

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

    def close(self) -> None:
        """Close the connection, if it is open; a later dial may be for the same one."""
        sock = None
        with self._lock:
            dial, self.dial = self.dial, None
            if self._connection is not None:
                sock, self._connection.sock = self._connection.sock, None
        if dial is not None:
            dial.discard()
        if sock is not None:
            sock.close()

    def _give_back(self) -> None:
        """Give the connection, which is closed, back to its pool."""
        connection, self._connection = self._connection, None
        if connection is not None and self._pool is not None:
            self._pool._put_conn(connection)
