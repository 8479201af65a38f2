"""Connections: urllib3's pools, dialled without blocking, and the general path for answers.

urllib3 owns the connections; a worker has one checked out for as long as it lives. What is ours
is the dial (so that waiting for a connect costs no thread and ``stop`` can end it) and reading an
answer the core did not recognise (parsed by ``http.client``, waited for together with ``stop``).
"""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError
from urllib3.util import connection as urllib3_connection
from urllib3.util import parse_url

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Answer", "Line", "Pool", "StoppedError", "read_answer"]

#: What is read of an answer's body; the texts that mean something are under 30 bytes.
ANSWER_BODY_MAX = 64 * 1024


class StoppedError(Exception):
    """``stop`` was called during a wait."""


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


class Pool(HTTPConnectionPool):
    """The connections to one URL of one peer.

    Parameters
    ----------
    url : str
        ``http://host:port``.
    head : bytes
        What every request to this URL starts with (``protocol.request_head``).
    size : int
        Connections kept.
    dead_link_timeout_s : float
        A connection whose peer does not acknowledge for this long is ended by the kernel.
    """

    ConnectionCls = DialConnection

    def __init__(self, url: str, head: bytes, *, size: int, dead_link_timeout_s: float) -> None:
        parsed = parse_url(url)
        if parsed.scheme != "http":
            raise UsageError(f"url: {url!r}: only http:// peers can be sent to")
        probe_s = max(1, round(dead_link_timeout_s / 4))
        super().__init__(
            cast(str, parsed.host),
            parsed.port,
            maxsize=size,
            block=False,
            retries=False,
            socket_options=[
                *HTTPConnection.default_socket_options,
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(dead_link_timeout_s * 1000)),
            ],
        )
        self.url = url
        self.head = head


class Line:
    """What a worker sends through: one connection checked out of a pool, or none.

    Used by the dispatcher thread that holds the worker, and by ``stop`` after the worker ended.
    """

    __slots__ = ("_connection", "_pool", "deadline", "url")

    def __init__(self) -> None:
        self.url = ""
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

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        """Close the connection, if there is one, and give it back to its pool for a later dial."""
        if self._connection is not None and self._pool is not None:
            self._connection.close()
            self._pool._put_conn(self._connection)
        self._connection = None


class Answer(NamedTuple):
    """An answer read by the general path; ``keep`` says that the connection is fit for another."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    keep: bool


class _AnswerStream(io.RawIOBase):
    """The bytes read so far, then the socket, each wait ended by ``stop`` or the deadline."""

    def __init__(self, prefix: bytes, sock: socket.socket, stop_fd: int, deadline: float) -> None:
        self.rest = memoryview(prefix)
        self._sock = sock
        self._deadline = deadline
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(stop_fd, select.POLLIN)
        self._stop_fd = stop_fd

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        if self.rest:
            n = min(len(view), len(self.rest))
            view[:n] = self.rest[:n]
            self.rest = self.rest[n:]
            return n
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no whole answer within the response timeout")
            if any(fd == self._stop_fd for fd, _ in self._poll.poll(left * 1000)):
                raise StoppedError
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                continue


class _AnswerSource:
    """As much of a socket as ``http.client.HTTPResponse`` asks for."""

    def __init__(self, stream: _AnswerStream) -> None:
        self._stream = stream

    def makefile(self, _mode: str) -> io.BufferedReader:
        # A buffer of one byte reads nothing ahead, so that what follows the answer is noticed.
        return io.BufferedReader(self._stream, buffer_size=1)


def read_answer(
    prefix: bytes, sock: socket.socket, stop_fd: int, deadline: float, *, is_written: bool
) -> Answer:
    """Read and parse an answer that was not recognised, ``prefix`` first.

    Parameters
    ----------
    prefix : bytes
        What has been read of it.
    sock : socket
        Non-blocking.
    stop_fd : int
        Readable once the pipeline is being stopped.
    deadline : float
        ``time.monotonic()`` by which the answer must be complete.
    is_written : bool
        Whether the request was written whole; otherwise the connection is not fit for another.

    Raises
    ------
    http.client.HTTPException, OSError
        If it is malformed or does not come (``TimeoutError``).
    StoppedError
        If the pipeline is stopped meanwhile.
    """
    stream = _AnswerStream(prefix, sock, stop_fd, deadline)
    # HTTPResponse wants a socket only to call makefile on it.
    response = http.client.HTTPResponse(cast(socket.socket, _AnswerSource(stream)), method="POST")
    try:
        response.begin()
        body = response.read(ANSWER_BODY_MAX)
        keep = (
            is_written
            and not response.will_close
            and response.isclosed()  # to the end of its body
            and not stream.rest
            and _is_silent(sock)
        )
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, body, keep)
    finally:
        response.close()


def _is_silent(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
