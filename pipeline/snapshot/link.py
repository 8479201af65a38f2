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
import time
from collections.abc import Callable

from pipeline.errors import PeerUnreachableError, SnapshotCancelledError, SnapshotSourceError
from pipeline.locks import lock_of
from pipeline.net._sockets import OwnSocket, link_is_dead
from pipeline.net.dialling import Dial, Dialer, DialError
from pipeline.net.pool import Pool
from pipeline.snapshot.source import FileSource
from pipeline.tls._engine import TLSError
from pipeline.wire.odd_answer import TEXT_TIMEOUT_S, OddAnswer, PeerAnswer
from pipeline.wire.protocol import TELLING_STATUS

__all__ = ["AnsweredError", "Ending", "SnapshotLink"]

#: How often a wait looks whether the peer still acknowledges.
LINK_CHECK_S = 1.0
#: An answer that has begun must have the rest of its head within this.
ANSWER_REST_S = 5.0

#: One call reads no more.
READ_BYTES = 64 * 1024

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class Ending:
    """A request to end a transfer, and what tells its thread of it. Thread-safe."""

    def __init__(self) -> None:
        self._reasons: list[str] = []  # the first one counts
        self._lock = lock_of(self)  # guards the one below
        self._fd = -1

    def end(self, reason: str) -> None:
        """End the transfer; the first reason stays."""
        self._reasons.append(reason)
        with self._lock:
            self._signal()

    def wake(self) -> None:
        """End the wait for a dial."""
        with self._lock:
            self._signal()

    def _signal(self) -> None:
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


class AnsweredError(Exception):
    """The peer answered before it had everything."""

    def __init__(self, answer: PeerAnswer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class SnapshotLink:
    """A connection for one POST. Used by one thread, but for ``close`` in a forked child.

    Parameters
    ----------
    pool : Pool
        Of the peer's URL. The connection is none of the pool's: it ends with the transfer.
    dialer : Dialer
    ending : Ending
        Ends every wait, with ``SnapshotCancelledError``.
    peer_id : int
        For errors.
    stall_timeout_s : float
        Writing without a byte moving.
    dead_link_timeout_s : float
        Nothing acknowledged although it should have been; keepalive.

    Notes
    -----
    Everything the network does to us is raised as ``PeerUnreachableError``, also when it is made
    and there is no descriptor left.
    """

    def __init__(
        self,
        pool: Pool,
        dialer: Dialer,
        ending: Ending,
        *,
        peer_id: int,
        stall_timeout_s: float,
        dead_link_timeout_s: float,
    ) -> None:
        self._url = pool.url
        self._pool = pool
        self._dialer = dialer
        self._ending = ending
        self._peer_id = peer_id
        self._stall_timeout_s = stall_timeout_s
        self._dead_link_timeout_s = dead_link_timeout_s
        self._dial: Dial | None = None
        self._sock: OwnSocket | None = None
        self._odd = OddAnswer(TELLING_STATUS)
        self._is_written = False
        try:
            self._wake = ending.open()
        except OSError as error:
            raise self._unreachable(f"no descriptor: {_text(error)}", error) from error

    def close(self) -> None:
        """Close what is open."""
        if self._dial is not None:
            self._dialer.cancel(self._dial)
            self._dial.discard()
        if self._sock is not None:
            self._sock.close()
        self._ending.close()

    @property
    def is_plain(self) -> bool:
        """Whether the kernel may write to the socket by itself."""
        return self._pool.credentials is None

    def dial(self, timeout_s: float) -> None:
        """Connect, TLS included for ``https``."""
        dial = self._dial = self._pool.dial(timeout_s, lambda _: self._ending.wake())
        self._dialer.begin(dial)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not dial.is_done:
            poll.poll()  # which the dialer ends in time
            self._ending.check()
            os.eventfd_read(self._wake)
        self._ending.check()
        try:
            self._sock = dial.take()
        except DialError as error:
            raise self._unreachable(str(error), error) from error

    def write(self, data: memoryview) -> int:
        """Write some of ``data``; how many bytes. Waits until there is room.

        Raises ``AnsweredError`` when the peer answers instead of reading.
        """
        sock = self._sock
        assert sock is not None
        return self._write(lambda: sock.send(data, socket.MSG_NOSIGNAL))

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

    def read_answer(self, timeout_s: float) -> PeerAnswer:
        """Wait for the answer; everything has been written."""
        self._is_written = True
        return self._await_answer(timeout_s)

    def _await_answer(self, timeout_s: float) -> PeerAnswer:
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

    def _write(self, write: Callable[[], int]) -> int:
        assert self._sock is not None
        self._ending.check()
        tls = self._sock.tls
        deadline = 0.0
        while True:
            try:
                return write()
            except BlockingIOError:
                if tls is not None and tls.has_moved:  # a part of a record
                    deadline = 0.0
            except OSError as error:
                if error.errno == errno.EFAULT:  # a mapped file is shorter now, or cannot be read
                    raise SnapshotSourceError(
                        f"the memory of the source cannot be read: {error.strerror}"
                    ) from error
                self._last_words(error)
            if not deadline:
                deadline = time.monotonic() + self._stall_timeout_s
            # TLS may have to read before it writes, and then it does not help that there is room.
            is_room_wanted = tls is None or tls.wants_to_write
            found = self._wait(select.POLLIN | (select.POLLOUT if is_room_wanted else 0), deadline)
            if not found or time.monotonic() >= deadline:
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
            if isinstance(failure.__cause__, TLSError):
                raise  # an alert: it says more than that the connection is gone
        raise self._unreachable(_text(error), error) from error

    def _receive(self) -> PeerAnswer | None:
        """Receive what there is, without waiting; the answer, when it is complete."""
        assert self._sock is not None
        while True:
            data: bytes | None = None
            try:
                with contextlib.suppress(BlockingIOError):
                    data = self._sock.recv(READ_BYTES)
            except OSError as error:
                raise self._unreachable(_text(error), error) from error
            # A cancel wins even when the answer has already arrived, as long as we have not read
            # it.
            self._ending.check()
            if data is None:
                return None
            if not data and not self._odd.has_begun:
                raise self._unreachable("the connection ended before an answer")
            try:
                answer = self._odd.feed(data, is_ended=not data, is_written=self._is_written)
            except (http.client.HTTPException, ValueError) as error:
                reason = f"malformed or incomplete answer: {error!r}"
                raise self._unreachable(reason, error) from error
            # TLS may have taken more from the socket than one call returns, and poll does not see
            # that: there is no more when it says so.
            if answer is not None or not data:
                return answer

    def _wait(self, events: int, deadline: float) -> int:
        """Wait for events of the socket until ``deadline``; those that are there, or 0."""
        sock = self._sock
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
            if link_is_dead(sock, self._dead_link_timeout_s):
                raise self._unreachable("dead link")

    def _unreachable(self, reason: str, cause: BaseException | None = None) -> PeerUnreachableError:
        # If we are ending the transfer ourselves, the error is our own doing: cancelled.
        self._ending.check()
        error = PeerUnreachableError(reason, peer_id=self._peer_id, url=self._url)
        error.__cause__ = cause
        return error


def _text(error: OSError) -> str:
    return error.strerror or str(error)
