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
from pipeline.net._sync cimport (
    SOCK_CLOEXEC, SOCK_NONBLOCK, errno, pthread_atfork, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, socket as c_socket,
)

import os
import socket
import weakref

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

    To close it ends the connection, or listening, whoever has a copy of the descriptor.
    """

    __slots__ = ()

    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        super().__init__(family, type, proto, fileno)
        own_sockets.add(self)

    def close(self):
        """Shut the socket and close its descriptor."""
        cdef int fd = self.detach()
        if fd >= 0:
            with nogil:
                # A fork may be under way. Only C state is touched.
                descriptors_shut(&descriptors, fd)

    def reset(self):
        """Reset the connection and close its descriptor: the peer hears of an error, of no end."""
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
