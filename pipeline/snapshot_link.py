"""The connection of one snapshot transfer: dial, TLS, writes, the answer, and an end to each wait.

The socket does not block. Whatever has to be waited for is waited for by ``poll`` together with
an eventfd, by which ``Ending.end`` ends the wait at once, from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import cast

from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from pipeline.errors import PeerUnreachableError, SnapshotCancelledError, SnapshotSourceError
from pipeline.odd_answer import TEXT_TIMEOUT_S, Answer, OddAnswer
from pipeline.pool import DialConnection, socket_options
from pipeline.protocol import TELLING_STATUS
from pipeline.snapshot_source import FileSource
from pipeline.tls import HANDSHAKE_TIMEOUT_S, Credentials
from pipeline.tunnel import Tunnel, tls_reason

__all__ = ["AnsweredError", "Ending", "SnapshotLink"]

#: How often a wait looks whether the peer still acknowledges.
LINK_CHECK_S = 1.0
#: What is sent on a live link is acknowledged within this: a round trip, a delayed ACK.
LINK_ANSWER_MS = 500
#: Enciphered at once: four records.
TLS_BYTES = 64 * 1024
#: For the rest of the head of an answer that has begun.
ANSWER_REST_S = 5.0

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR

# struct tcp_info, as far as it is looked at: probes; unacked; last_data_sent and last_ack_recv,
# milliseconds ago.
_TCP_INFO = struct.Struct("@3xB20xI16xI8xI")


class Ending:
    """A request to end a transfer, and what tells its thread of it. Thread-safe."""

    def __init__(self) -> None:
        self._reasons: list[str] = []  # the first one counts
        self._lock = threading.RLock()  # guards the one below
        self._fd = -1

    def end(self, reason: str) -> None:
        """End the transfer; the first reason stays."""
        self._reasons.append(reason)
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def open(self) -> int:
        """Return a descriptor that is readable once the transfer is to end. Once."""
        with self._lock:
            self._fd = os.eventfd(1 if self._reasons else 0, os.EFD_CLOEXEC)
            return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def check(self) -> None:
        """Raise ``SnapshotCancelledError`` if the transfer is to end."""
        if self._reasons:
            raise self.error()

    def error(self) -> SnapshotCancelledError:
        """Return what tells why it is to end."""
        return SnapshotCancelledError(self._reasons[0] if self._reasons else "stopped")

    def forget_after_fork(self) -> None:
        """In a forked child: make the lock anew and close the copy of the descriptor."""
        self._lock = threading.RLock()
        self.close()


class AnsweredError(Exception):
    """The peer answered before it had everything."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class SnapshotLink:
    """A connection for one POST. Used by one thread, but for ``close`` in a forked child.

    Parameters
    ----------
    url : str
        The peer's, ``http`` or ``https``.
    ending : Ending
        Ends every wait, with ``SnapshotCancelledError``.
    peer_id : int
        For errors.
    credentials : Credentials or None
        Needed for ``https``.
    stall_timeout_s : float
        Writing without a byte moving.
    dead_link_timeout_s : float
        Nothing acknowledged although it should have been; keepalive.

    Notes
    -----
    Everything the network does to us is raised as ``PeerUnreachableError``.
    """

    def __init__(
        self,
        url: str,
        ending: Ending,
        *,
        peer_id: int,
        credentials: Credentials | None,
        stall_timeout_s: float,
        dead_link_timeout_s: float,
    ) -> None:
        parsed = parse_url(url)
        assert parsed.scheme == "http" or credentials is not None, url  # Pool has refused it
        self._url = url
        self._ending = ending
        self._peer_id = peer_id
        self._credentials = credentials if parsed.scheme == "https" else None
        self._stall_timeout_s = stall_timeout_s
        self._dead_link_timeout_s = dead_link_timeout_s
        self._connection = DialConnection(
            cast(str, parsed.host),
            parsed.port,
            socket_options=socket_options(dead_link_timeout_s),
        )
        self._sock: socket.socket | None = None
        self._tunnel: Tunnel | None = None
        self._odd = OddAnswer(TELLING_STATUS)
        self._is_written = False
        self._wake = ending.open()

    def close(self) -> None:
        """Close what is open."""
        self._connection.close()
        if self._sock is not None:
            self._sock.close()
        self._ending.close()

    @property
    def is_plain(self) -> bool:
        """Whether the kernel may write to the socket by itself."""
        return self._credentials is None

    def dial(self, timeout_s: float) -> None:
        """Connect, to one address of the name after the other; TLS included for ``https``.

        Blocks while the name is resolved, which nothing can end.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._connection.connect()
            while not self._is_connected(deadline):
                pass
        except HTTPError as error:
            raise self._unreachable(str(error), error) from error
        assert isinstance(self._connection.sock, socket.socket)
        self._sock = self._connection.sock
        if self._credentials is not None:
            self._secure(self._credentials)

    def _is_connected(self, deadline: float) -> bool:
        sock = self._connection.sock
        assert isinstance(sock, socket.socket)
        if not self._wait(select.POLLOUT, deadline, sock):
            raise self._unreachable("dial timeout")
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._connection.dial_next(OSError(error, os.strerror(error)))
        return not error

    def _secure(self, credentials: Credentials) -> None:
        sock = self._sock
        assert sock is not None
        credentials.poll()
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        tunnel: Tunnel | None = None
        data = b""
        try:
            tunnel = Tunnel(credentials, self._connection.host)
            while True:
                is_done = tunnel.shake(data)
                # A few KB, and nothing was left unsent before: they fit.
                sock.send(tunnel.outgoing(), socket.MSG_NOSIGNAL)
                if is_done:
                    break
                if not self._wait(select.POLLIN, deadline):
                    raise self._unreachable("TLS: handshake timeout")
                data = sock.recv(65536)
                if not data:
                    raise self._unreachable("TLS: the connection ended during the handshake")
        except OSError as error:
            if tunnel is not None and isinstance(error, ssl.SSLError):
                with contextlib.suppress(OSError):
                    # An alert: to the peer it is what went wrong.
                    sock.send(tunnel.outgoing(), socket.MSG_NOSIGNAL)
            raise self._unreachable(_text(error), error) from error
        self._tunnel = tunnel

    def write(self, data: memoryview) -> int:
        """Write some of ``data``; how many bytes. Waits until there is room.

        Raises ``AnsweredError`` when the peer answers instead of reading.
        """
        if self._tunnel is None:
            return self._send(data)
        with data[:TLS_BYTES] as record:
            self._tunnel.seal(record)
            count = len(record)
        sealed = memoryview(self._tunnel.outgoing())
        while sealed:
            sealed = sealed[self._send(sealed) :]
        return count

    def write_file(self, file: FileSource, done: int, count: int) -> int:
        """As :meth:`write`, ``count`` bytes of a file from byte ``done`` on, by ``sendfile``.

        Raises ``UnsendableError`` where there is none for this file.
        """
        assert self._sock is not None
        fd = self._sock.fileno()
        return self._write(lambda: file.send(fd, done, count))

    def pause(self, seconds: float) -> None:
        """Wait, and see meanwhile whether the peer answers."""
        deadline = time.monotonic() + seconds
        while self._wait(select.POLLIN, deadline):
            self._read_early()

    def read_answer(self, timeout_s: float) -> Answer:
        """Wait for the answer; everything has been written."""
        self._is_written = True
        return self._await_answer(timeout_s)

    def _await_answer(self, timeout_s: float) -> Answer:
        deadline = time.monotonic() + timeout_s
        has_begun = has_text_begun = False
        while (answer := self._receive()) is None:
            if not has_begun and self._odd.is_final:
                has_begun = True
                deadline = min(deadline, time.monotonic() + ANSWER_REST_S)
            if not has_text_begun and self._odd.is_text_due:
                has_text_begun = True
                deadline = min(deadline, time.monotonic() + TEXT_TIMEOUT_S)
            if not self._wait(select.POLLIN, deadline):
                if has_text_begun:
                    answer = self._odd.feed(b"", is_ended=True, is_written=False)
                    assert answer is not None
                    return answer
                reason = "answer not complete in time" if has_begun else "no answer in time"
                raise self._unreachable(reason)
        return answer

    def _send(self, data: memoryview) -> int:
        """Write some bytes as they are; how many."""
        sock = self._sock
        assert sock is not None
        return self._write(lambda: sock.send(data, socket.MSG_NOSIGNAL))

    def _write(self, write: Callable[[], int]) -> int:
        self._ending.check()
        deadline = 0.0
        while True:
            try:
                return write()
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno == errno.EFAULT:  # a mapped file is shorter now, or cannot be read
                    raise SnapshotSourceError(
                        f"the memory of the source cannot be read: {error.strerror}"
                    ) from error
                self._last_words(error)
            if not deadline:
                deadline = time.monotonic() + self._stall_timeout_s
            found = self._wait(select.POLLOUT | select.POLLIN, deadline)
            if not found:
                raise self._unreachable("stalled")
            if found & _READABLE:
                self._read_early()

    def _read_early(self) -> None:
        """Take what the peer says before it has everything, most likely that it wants none."""
        answer = self._receive()
        if answer is None and self._odd.is_text_due:
            answer = self._await_answer(TEXT_TIMEOUT_S)
        if answer is not None:
            raise AnsweredError(answer)

    def _last_words(self, error: OSError) -> None:
        """Raise what the peer answered before it closed, or else what writing failed with."""
        try:
            while True:
                before = self._odd.total
                self._read_early()
                if self._odd.total == before:
                    break
        except PeerUnreachableError as failure:
            if isinstance(failure.__cause__, ssl.SSLError):
                raise  # an alert: it says more than that the connection is gone
        raise self._unreachable(_text(error), error) from error

    def _receive(self) -> Answer | None:
        """Receive what there is, without waiting; the answer, when it is complete."""
        assert self._sock is not None
        data: bytes | None = None
        is_ended = False
        try:
            with contextlib.suppress(BlockingIOError):
                data = self._sock.recv(65536)
                is_ended = not data
                if data and self._tunnel is not None:
                    data = self._tunnel.open(data)
                    is_ended = self._tunnel.is_ended
        except OSError as error:
            raise self._unreachable(_text(error), error) from error
        # Also of an answer that is there: who cancels before it was read has cancelled.
        self._ending.check()
        if not data and not is_ended:
            return None
        if not data and not self._odd.has_begun:
            raise self._unreachable("the connection ended before an answer")
        try:
            return self._odd.feed(data or b"", is_ended=is_ended, is_written=self._is_written)
        except (http.client.HTTPException, ValueError) as error:
            reason = f"malformed or incomplete answer: {error!r}"
            raise self._unreachable(reason, error) from error

    def _wait(self, events: int, deadline: float, sock: socket.socket | None = None) -> int:
        """Wait for events of the socket until ``deadline``; those that are there, or 0."""
        sock = sock or self._sock
        assert sock is not None
        poll = select.poll()
        poll.register(sock, events)
        poll.register(self._wake, select.POLLIN)
        while True:
            left_s = deadline - time.monotonic()
            found = dict(poll.poll(max(0.0, min(left_s, LINK_CHECK_S)) * 1000))
            self._ending.check()
            if sock.fileno() in found:
                return found[sock.fileno()]
            if left_s <= 0:
                return 0
            if self._is_dead(sock):
                raise self._unreachable("dead link")

    def _is_dead(self, sock: socket.socket) -> bool:
        """Tell whether the peer acknowledges nothing although it should: see ``_worker.pxd``."""
        info = b""
        with contextlib.suppress(OSError):  # a system that does not tell
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return False
        probes, unacked, sent_ms, acked_ms = _TCP_INFO.unpack(info)
        if acked_ms < self._dead_link_timeout_s * 1000:
            return False
        return bool(probes >= 2 or (unacked > 0 and acked_ms > sent_ms + LINK_ANSWER_MS))

    def _unreachable(self, reason: str, cause: BaseException | None = None) -> PeerUnreachableError:
        # Of a transfer that is to end the peer has done nothing worth a report.
        self._ending.check()
        error = PeerUnreachableError(reason, peer_id=self._peer_id, url=self._url)
        error.__cause__ = cause
        return error


def _text(error: OSError) -> str:
    return tls_reason(error) if isinstance(error, ssl.SSLError) else error.strerror or str(error)
