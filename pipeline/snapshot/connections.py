"""Connections on which snapshots arrive, each with a thread of its own.

A connection leaves the receiving loop (``Then.DETACH``) when the head of its request is accepted:
its body is as long as a database, and the disk blocks. It never comes back. Differs from etcd: it
ends with the answer.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import h11

from pipeline.config import MIB, ReceiverConfig
from pipeline.errors import without_frames
from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.net.pace import PIECE_S, Pace
from pipeline.receive._receiver import LINGER_S
from pipeline.receive.body_time import BodyTime
from pipeline.receive.detached import BegunRequest, Connection
from pipeline.receive.places import Place
from pipeline.snapshot.body import BodyError, ClosingError, SnapshotBody
from pipeline.snapshot.store import Saving
from pipeline.threads import LibraryThread
from pipeline.wire.answers import Answer, Request, render

__all__ = ["SnapshotConnections"]

logger = get_logger("pipeline.receive.listener")

# A chunked body is parsed from so much at once; etcd's chunks are of 32 KiB.
_PARSE_BYTES = MIB

#: Rest for each event of h11, which takes the interpreter so much longer than a small piece.
EVENT_S = 4 * PIECE_S


class SnapshotConnections:
    """The connections of one listener on which snapshots arrive.

    Parameters
    ----------
    receive : callable
        Makes an Answer of a Request and its ``SnapshotBody``; blocks as long as that takes.
    config : ReceiverConfig
        ``stall_timeout_s`` and ``min_body_rate`` bound how slowly a body may come; there is no
        limit to the whole.

    Attributes
    ----------
    name : str
        Of the threads, which are daemons, before ``-<n>``; set before the first connection.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        receive: Callable[[Request, SnapshotBody], Answer],
        config: ReceiverConfig,
    ) -> None:
        self._receive = receive
        self._config = config
        self.name = "pipeline-snapshot"
        self._numbers = itertools.count()
        self._lock = lock_of(self)  # guards the two below
        self._is_closing = False
        self._threads: dict[threading.Thread, _Receiving] = {}

    def take(self, connection: Connection, begun: BegunRequest) -> None:
        """Receive on a connection that has left the loop, which is ours now. Does not block."""
        place = begun.move_place()
        is_started = False
        try:
            is_started = self._start(connection, begun, place)
        finally:
            if not is_started:
                connection.close()
                place.give_back()

    def begin_close(self) -> None:
        """End what is still being read; what is being stored or processed may go on."""
        with self._lock:
            self._is_closing = True
            for receiving in self._threads.values():
                receiving.stop_reading()

    def wait_closed(self, deadline: float) -> bool:
        """Wait for the threads until ``deadline`` (monotonic seconds).

        Returns whether all have ended; of the others the connections are ended and the files
        removed, if they are not stored yet. Does not wait for the calling thread.
        """
        with self._lock:
            threads = dict(self._threads)
        is_whole = threading.current_thread() not in threads
        for thread, receiving in threads.items():
            assert isinstance(thread, LibraryThread)
            if not thread.wait_ended(deadline):
                receiving.abandon()
                is_whole = False
        return is_whole

    def forget_after_fork(self) -> None:
        """In a forked child, which has none of the threads: let go of what is the parent's."""
        self._is_closing = True
        receives, self._threads = self._threads, {}
        for receiving in receives.values():
            receiving.forget_after_fork()

    def _start(self, connection: Connection, begun: BegunRequest, place: Place) -> bool:
        try:
            receiving = _Receiving(connection, begun, place, self._config)
            name = f"{self.name}-{next(self._numbers)}"
            thread = LibraryThread(self._serve, name, (receiving,))
            # Started under the lock: what is in the dictionary can be joined. It is there first:
            # a child that is forked meanwhile looks there for what it has to close.
            with self._lock:
                if self._is_closing:
                    return False
                self._threads[thread] = receiving
                try:
                    thread.start()
                except BaseException:
                    del self._threads[thread]
                    raise
        except (RuntimeError, MemoryError, OSError) as error:
            address, reason = str(begun.request.remote), str(error)
            text = "no thread for a snapshot from %s: %s"
            logger.warning(text, address, reason, address=address, reason=reason)
            return False
        return True

    def _serve(self, receiving: _Receiving) -> None:
        logger.survive("a connection is closed", self._answer, receiving)
        logger.survive("a connection is not closed", receiving.close)
        receiving.place.give_back()
        with self._lock:
            self._threads.pop(threading.current_thread(), None)  # a forked child has none

    def _answer(self, receiving: _Receiving) -> None:
        receiving.answer(self._receive(receiving.request, receiving))


class _Receiving:
    """A request whose body is read from its connection: the ``SnapshotBody`` of a snapshot.

    Attributes
    ----------
    left : int or None
        Bytes of the body that have not been read; None when it is chunked.
    place : Place
        Given back when the connection is closed.
    """

    def __init__(
        self,
        connection: Connection,
        begun: BegunRequest,
        place: Place,
        config: ReceiverConfig,
    ) -> None:
        assert begun.framing is not None
        self.request: Request = begun.request
        self.place = place
        self.left = begun.framing.left
        self.saving: Saving | None = None
        self._connection = connection
        self._framing = begun.framing
        self._early = begun.early
        self._lock = lock_of(self)  # guards the end of the connection
        self._is_closed = False
        self._is_stopped = False
        self._data = memoryview(b"")  # of the body, read and not asked for yet
        self._buffer = memoryview(bytearray(_PARSE_BYTES if self.left is None else 0))
        self._pace = Pace()
        self._time = BodyTime(config)
        self._waited_s = 0.0  # since the last bytes of the body
        connection.settimeout(config.stall_timeout_s)

    def readinto(self, view: memoryview) -> int:
        """Read some bytes of the body, at most ``len(view)``; 0 at the end."""
        if self._is_stopped:
            raise ClosingError("shutting down")
        try:
            n = self._read(view)
        except h11.RemoteProtocolError as error:
            without_frames(error)  # h11 raises it from a frame that holds it
            raise BodyError(str(error)) from None
        except TimeoutError:
            raise BodyError("i/o timeout") from None
        except OSError as error:
            raise BodyError(error.strerror or str(error)) from error
        if self.left is not None:
            self.left -= n
        return n

    def answer(self, answer: Answer) -> None:
        """Write the answer. If the sender is gone or does not read, so be it."""
        with contextlib.suppress(OSError):
            self._connection.sendall(render(replace(answer, close=True)), socket.MSG_NOSIGNAL)
            if not self._is_whole() and not self._is_stopped:
                self._linger()

    def stop_reading(self) -> None:
        """Have ``readinto`` raise ``ClosingError``, now and for ever. From another thread."""
        self._is_stopped = True
        self._shutdown(socket.SHUT_RD)

    def abandon(self) -> None:
        """Drop connection and file whatever their thread is doing. From another thread."""
        self._shutdown(socket.SHUT_RDWR)
        saving = self.saving
        if saving is not None:
            saving.discard()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._is_closed = True
            self._connection.close()

    def forget_after_fork(self) -> None:
        """In a forked child: the connection and the file are the parent's."""
        self._is_closed = self._is_stopped = True
        if self.saving is not None:
            self.saving.forget_after_fork()

    def _shutdown(self, how: int) -> None:
        with self._lock, contextlib.suppress(OSError):
            if not self._is_closed:  # else its descriptor may be another's by now
                self._connection.shutdown(how)

    def _read(self, view: memoryview) -> int:
        while not self._data and not self._is_whole():
            if self._early:
                came, self._early = memoryview(self._early), b""
            elif self._framing.is_busy:
                came = memoryview(b"")
            elif self.left is not None:  # there is no framing
                n = self._recv_into(view[: self.left])
                self._count_arrived(n)
                return n
            else:
                came = self._buffer[: self._recv_into(self._buffer)]
            events = self._framing.events
            self._data = memoryview(self._framing.read(came))
            self._pace.took(self._framing.events - events, len(self._data), EVENT_S)
            self._count_arrived(len(self._data))
        n = min(len(view), len(self._data))
        view[:n] = self._data[:n]
        self._data = self._data[n:]
        return n

    def _is_whole(self) -> bool:
        """Tell whether all of the body has come."""
        return self._framing.is_whole or self.left == 0

    def _recv_into(self, view: memoryview) -> int:
        go_on = self._framing.go_on()
        if go_on:
            self._connection.sendall(go_on, socket.MSG_NOSIGNAL)
        begin = time.monotonic()
        n = self._connection.recv_into(view)
        # What the disk takes is not the sender's fault.
        self._waited_s += time.monotonic() - begin
        if self._is_stopped:
            raise ClosingError("shutting down")
        if n == 0:
            raise BodyError("unexpected EOF")
        self._pace.took(1, n)
        return n

    def _count_arrived(self, n: int) -> None:
        """Count bytes of the body; those of its framing put nothing off."""
        self._time.arrived(n, self._waited_s)
        self._waited_s = 0.0
        if self._time.left_s < 0:
            raise TimeoutError

    def _linger(self) -> None:
        """End our side, and wait as long as the loop does for the other to do so."""
        buffer = memoryview(bytearray(64 * 1024))
        deadline = time.monotonic() + LINGER_S
        self._connection.shutdown(socket.SHUT_WR)
        while (left_s := deadline - time.monotonic()) > 0 and not self._is_stopped:
            self._connection.settimeout(left_s)
            n = self._connection.recv_into(buffer)
            if n == 0:
                break
            self._pace.took(1, n)
