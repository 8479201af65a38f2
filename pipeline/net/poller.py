"""The poller: one Python thread per node that waits for sockets and for times.

What it runs is short and waits for nothing. It dials and it probes; messages have the I/O loop,
which needs no GIL, and each snapshot has a thread.

The eventfd that wakes it is edge-triggered and never read, as in the loops: each write is an edge,
and whoever writes has left before what the thread is to look at.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.net._sockets import OwnSocket
from pipeline.threads import LibraryThread

__all__ = ["READABLE", "WRITABLE", "Client", "Poller"]

logger = get_logger(__name__)

READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT

#: After a fault of ours the thread pauses, so that the fault does not become a busy loop.
FAULT_PAUSE_S = 0.25
#: ``stop`` waits at least this long for the thread, even when its deadline has passed.
END_S = 0.1


class Client(Protocol):
    """Who has something done at certain times. Called in the poller's thread."""

    def next_due(self) -> float:
        """When ``check_time`` is to be called, ``time.monotonic()``; ``math.inf`` for never."""

    def check_time(self, now: float) -> None:
        """Do what is due at ``now``; called at other times as well.

        All that had come at ``now`` has been read: what came in time was in time, however late
        the thread is.
        """

    def end(self) -> None:
        """Let go of everything: nothing more will be called."""


class Poller:
    """Waits, in a thread, for all of a node.

    Parameters
    ----------
    name : str
        Goes into the thread's name, ``pipeline-poll-<name>``; it is a daemon.

    Notes
    -----
    ``ask`` is thread-safe, also for a signal handler: what is asked for is put on a list. The rest
    is for the thread itself, but for ``attach``, ``start`` and ``stop``.

    Attributes
    ----------
    wake_fd : int
        An eventfd, once started. Whoever writes to it has the clients' ``check_time`` called.
    """

    def __init__(self, name: str) -> None:
        self._clients: list[Client] = []
        self._asked: deque[Callable[[], object]] = deque()
        self._lock = lock_of(self)  # guards the descriptor
        self.wake_fd = -1
        self._is_stopping = False
        self._has_ended = False  # the thread has: who asks from then on does it himself
        self._name = name
        # Both are made by ``start``, for a process may be forked before it. Two that share an epoll
        # would be told of each other's connections, and from 3.13 on a child cannot start a thread
        # that its parent made.
        self._epoll: select.epoll | None = None
        self._thread: LibraryThread | None = None
        self._ident = 0  # of the thread, once it runs
        self._watched: dict[OwnSocket, int] = {}  # their descriptors
        self._works: dict[int, Callable[[], object]] = {}  # by descriptor

    @property
    def is_started(self) -> bool:
        """Whether ``start`` was called."""
        return self._epoll is not None

    def attach(self, client: Client) -> None:
        """Call a client from ``start`` on."""
        self._clients.append(client)

    def start(self) -> None:
        """Start the thread. Once. Raises ``OSError`` and ``RuntimeError`` for want of resources."""
        try:
            self._epoll = select.epoll()
            self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._epoll.register(self.wake_fd, READABLE | select.EPOLLET)
            self._thread = LibraryThread(self._run, f"pipeline-poll-{self._name}")
            self._thread.start()
        except BaseException:
            self._has_ended = True
            self._close()
            raise

    def stop(self, deadline: float) -> None:
        """Have the clients end, and the thread; wait for it until ``deadline`` (monotonic)."""
        self._is_stopping = True
        self._wake_up()
        if self._thread is not None:
            self._thread.wait_ended(max(deadline, time.monotonic() + END_S))

    def ask(self, work: Callable[[], object]) -> None:
        """Have ``work`` done in the thread, soon and in order; here, once the thread has ended."""
        self._asked.append(work)
        if threading.get_ident() != self._ident:  # it looks before it waits
            self._wake_up()
        if self._has_ended:
            self._do_what_is_asked()

    def watch(self, sock: OwnSocket, events: int, work: Callable[[], object]) -> None:
        """Have ``work`` done whenever the socket is ready. Raises ``OSError``."""
        assert self._epoll is not None
        fd = sock.fileno()
        self._epoll.register(fd, events)
        self._watched[sock] = fd
        self._works[fd] = work

    def rewatch(self, sock: OwnSocket, events: int, work: Callable[[], object]) -> None:
        """Wait for other events of a socket that is watched, and have other work done for them.

        Raises ``OSError``: it is watched no more.
        """
        assert self._epoll is not None
        fd = self._watched[sock]
        try:
            self._epoll.modify(fd, events)
        except OSError:
            del self._watched[sock], self._works[fd]
            raise
        self._works[fd] = work

    def unwatch(self, sock: OwnSocket) -> None:
        """Undo :meth:`watch`, before the socket is closed; nothing if it is not watched."""
        assert self._epoll is not None
        fd = self._watched.pop(sock, None)
        if fd is not None:
            del self._works[fd]
            with contextlib.suppress(OSError):  # somebody has closed it all the same
                self._epoll.unregister(fd)

    def forget_after_fork(self) -> None:
        """In a forked child, which has no thread: close its copies of the descriptors."""
        if not self.is_started:
            return  # it may yet be started here
        self._is_stopping = self._has_ended = True
        self._asked.clear()
        self._close()

    def _wake_up(self) -> None:
        with self._lock:
            if self.wake_fd >= 0:
                os.eventfd_write(self.wake_fd, 1)

    def _close(self) -> None:
        with self._lock:
            if self.wake_fd >= 0:
                os.close(self.wake_fd)
                self.wake_fd = -1
        if self._epoll is not None:
            self._epoll.close()

    # What follows runs in the thread.

    def _run(self) -> None:
        self._ident = threading.get_ident()
        while not self._is_stopping:
            if not logger.survive("the poller fails", self._turn):
                time.sleep(FAULT_PAUSE_S)
                self._wake_up()  # what woke it may not have been seen to, and is not told again
        self._do_what_is_asked()
        for client in self._clients:
            logger.survive("a client of the poller did not end", client.end)
        self._has_ended = True
        self._do_what_is_asked()
        self._close()

    def _turn(self) -> None:
        assert self._epoll is not None
        self._do_what_is_asked()
        due = min((client.next_due() for client in self._clients), default=math.inf)
        now = time.monotonic()
        timeout_s = None if due == math.inf else max(0.0, due - now)
        works = [(fd, self._works.get(fd)) for fd, _ in self._epoll.poll(timeout_s)]
        for fd, work in works:
            # Or it was closed in this very turn, and another has its number.
            if work is not None and self._works.get(fd) is work:
                logger.survive("what is ready was not seen to", work)
        for client in self._clients:
            client.check_time(now)  # of before: what was waited for is due in the next turn

    def _do_what_is_asked(self) -> None:
        while self._asked:
            try:
                work = self._asked.popleft()
            except IndexError:  # once the thread has ended there may be several at it
                return
            logger.survive("what was asked for was not done", work)
