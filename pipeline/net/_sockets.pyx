# cython: auto_pickle=False
"""The sockets of this process that a forked child closes.

``_descriptors`` keeps them. Both directions make theirs here: the receiving loop in C, with the
lock held, everything else by ``open_socket``.
"""

from libc.stdint cimport int64_t

from pipeline.net._descriptors cimport (
    descriptors_add, descriptors_forked, descriptors_reset, descriptors_shut, descriptors_t,
)
from pipeline.net._link cimport link_is_dead as c_link_is_dead
from pipeline._system cimport (
    SOCK_CLOEXEC, SOCK_NONBLOCK, errno, pthread_atfork, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, socket as c_socket,
)

import os
import select
import socket
import time
import weakref
from select import POLLIN, POLLOUT

__all__ = ["OwnSocket", "link_is_dead", "open_socket"]

cdef descriptors_t descriptors
pthread_mutex_init(&descriptors.lock, NULL)


cdef descriptors_t* own_descriptors() noexcept:
    """What this process has open, and its forked children close."""
    return &descriptors


# How many forks lie between the process that loaded the library and this one.
cdef int n_forks = 0


cdef int fork_count() noexcept:
    """Return a number that a forked child has another one of than its parent.

    A thread that came into the child in the middle of its work sees by it that the work, and what
    it works on, is the parent's.
    """
    return n_forks


# In a forked child they are not to close descriptors that are others' by then.
own_sockets = weakref.WeakSet()


cdef void fork_begins() noexcept nogil:
    # A descriptor may be being made or closed. Who does so needs no GIL for it.
    pthread_mutex_lock(&descriptors.lock)


cdef void fork_ends() noexcept nogil:
    pthread_mutex_unlock(&descriptors.lock)


cdef void forked() noexcept nogil:
    global n_forks
    n_forks += 1
    descriptors_forked(&descriptors)


def _after_fork_in_child():
    for sock in list(own_sockets):
        sock.detach()


# The system's, not Python's: between Python's hooks and the fork others' hooks run, and signals'
# handlers, which may close something of ours and would wait for the lock.
if pthread_atfork(fork_begins, fork_ends, forked) != 0:
    raise MemoryError
# Before all others of the library: they find their descriptors closed.
os.register_at_fork(after_in_child=_after_fork_in_child)


class OwnSocket(socket.socket):
    """A socket of ours, of either direction, whose descriptor a forked child closes.

    To close it ends the connection, or listening, whoever has a copy of the descriptor. Once it has
    TLS, what is sent and received is the plain text of it, by the methods that are here.

    Attributes
    ----------
    tls : Session or None
    """

    __slots__ = ("tls",)

    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        super().__init__(family, type, proto, fileno)
        self.tls = None
        own_sockets.add(self)

    def recv(self, bufsize, flags=0, /):
        """As ``socket.recv``."""
        if self.tls is None:
            return super().recv(bufsize, flags)
        buffer = bytearray(bufsize)
        n = self.recv_into(buffer)
        return bytes(memoryview(buffer)[:n])

    def recv_into(self, buffer, nbytes=0, flags=0):
        """As ``socket.recv_into``; with TLS there are no flags."""
        if self.tls is None:
            return super().recv_into(buffer, nbytes, flags)
        with memoryview(buffer) as view, view.cast("B") as into:
            if nbytes < 0 or nbytes > len(into):
                raise ValueError(f"recv_into: nbytes {nbytes} is not in 0..{len(into)}")
            with into[:nbytes or None] as part:
                return self._wait_for(POLLIN, self.tls.recv_into, part)

    def send(self, data, flags=0, /):
        """As ``socket.send``; with TLS what was not taken has to come first the next time."""
        if self.tls is None:
            return super().send(data, flags)
        return self._wait_for(POLLOUT, self.tls.send, data)

    def sendall(self, data, flags=0, /):
        """As ``socket.sendall``; with TLS the timeout is for each part."""
        if self.tls is None:
            return super().sendall(data, flags)
        with memoryview(data) as view, view.cast("B") as left:
            at = 0
            while at < len(left):
                at += self.send(left[at:])

    def shutdown(self, how, /):
        """As ``socket.shutdown``; ``SHUT_WR`` tells the peer by TLS first.

        So the latter is for whoever has the connection; the others may come from any thread.
        """
        if how == socket.SHUT_WR and self.tls is not None:
            self.tls.end()
        super().shutdown(how)

    def _wait_for(self, events, attempt, data):
        """Make an attempt again and again until the socket is ready for it, or too late.

        TLS may have to write before it reads, and to read before it writes.
        """
        timeout_s = self.gettimeout()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                return attempt(data)
            except BlockingIOError:
                if timeout_s == 0.0:
                    raise
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0.0:
                raise TimeoutError("timed out")
            poll = select.poll()
            poll.register(
                self.fileno(), events | POLLOUT if self.tls.wants_to_write else POLLIN)
            poll.poll(None if left_s is None else left_s * 1000)

    def close(self):
        """End the connection in good order, as far as that needs no wait; close the descriptor."""
        tls, self.tls = self.tls, None
        if tls is not None and self.fileno() >= 0 and not tls.end():
            self.reset()
            return
        cdef int fd = self.detach()
        if fd >= 0:
            with nogil:
                # A fork may be under way. Only C state is touched.
                descriptors_shut(&descriptors, fd)

    def reset(self):
        """Reset the connection and close its descriptor: the peer hears of an error, of no end."""
        self.tls = None
        cdef int fd = self.detach()
        if fd >= 0:
            with nogil:
                # A fork may be under way. Only C state is touched.
                descriptors_reset(&descriptors, fd)


def link_is_dead(sock not None, double timeout_s):
    """Tell whether a socket's peer has acknowledged nothing for ``timeout_s`` although it should.

    The rule of the sending loop (``_link.pxd``). False where the system does not tell.
    """
    return c_link_is_dead(sock.fileno(), <int64_t>(timeout_s * 1e9))


def open_socket(int family, int kind, int protocol):
    """Make a socket that does not block: an OwnSocket. Raises ``OSError``."""
    cdef int fd, error
    with nogil:
        # A fork may be under way. Only C state is touched.
        pthread_mutex_lock(&descriptors.lock)
        fd = descriptors_add(
            &descriptors, c_socket(family, kind | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol))
        error = errno
        pthread_mutex_unlock(&descriptors.lock)
    if fd < 0:
        raise OSError(error, os.strerror(error))
    sock = OwnSocket(family, kind, protocol, fileno=fd)
    sock.setblocking(False)     # whatever socket.setdefaulttimeout was told
    return sock
