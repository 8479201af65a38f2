"""The descriptors of this process that a forked child has to close.

A child inherits a copy of each descriptor, and a connection does not end before the last copy is
closed: the peers of a node that was killed would wait for a worker that it had forked. The child
has none of our threads, and their lists may be in the middle of a change, so what we have open is
kept here, as one bit for each descriptor. A fork takes the lock, and whoever opens or closes one of
them holds it: what a child finds here is what it has.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from pipeline._system cimport (
    SHUT_RDWR, close, connect, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, shutdown,
    sockaddr, sockaddr_storage,
)


cdef struct descriptors_t:
    pthread_mutex_t lock    # guards what follows; held while the process forks
    uint64_t* bits          # owned; grows to the highest descriptor there was
    size_t words


cdef inline int descriptors_add(descriptors_t* open, int fd) noexcept nogil:
    """Note a descriptor that was just made; returns it. The caller holds the lock.

    Negative ones are passed on. Without memory it is closed: -1, and ``errno`` says so.
    """
    cdef size_t words, word = <size_t>fd >> 6
    cdef uint64_t* grown
    if fd < 0:
        return fd
    if word >= open.words:
        words = max(2 * open.words, word + 1)
        grown = <uint64_t*>realloc(open.bits, words * sizeof(uint64_t))
        if grown is NULL:
            close(fd)
            return -1
        memset(grown + open.words, 0, (words - open.words) * sizeof(uint64_t))
        open.bits = grown
        open.words = words
    open.bits[word] |= <uint64_t>1 << (fd & 63)
    return fd


cdef inline void descriptors_close(descriptors_t* open, int fd) noexcept nogil:
    """Close a descriptor that was added; a socket is to be shut first."""
    pthread_mutex_lock(&open.lock)
    open.bits[fd >> 6] &= ~(<uint64_t>1 << (fd & 63))
    close(fd)
    pthread_mutex_unlock(&open.lock)


cdef inline void descriptors_shut(descriptors_t* open, int fd) noexcept nogil:
    """End a connection, or listening, and close its descriptor.

    Shut, it ends at once, whoever has a copy of the descriptor.
    """
    shutdown(fd, SHUT_RDWR)
    descriptors_close(open, fd)


cdef inline void descriptors_reset(descriptors_t* open, int fd) noexcept nogil:
    """Reset a connection, whoever has a copy of the descriptor, and close it.

    What is on its way in either direction is lost.
    """
    cdef sockaddr_storage nowhere
    memset(&nowhere, 0, sizeof(nowhere))    # of the family AF_UNSPEC, which dissolves a connection
    if connect(fd, <const sockaddr*>&nowhere, sizeof(nowhere)) != 0:
        shutdown(fd, SHUT_RDWR)     # a system that cannot: then it ends, at least
    descriptors_close(open, fd)


cdef inline void descriptors_forked(descriptors_t* open) noexcept nogil:
    """In the child, which has one thread: close them all. The parent's are not shut by this."""
    cdef size_t word
    cdef int bit
    for word in range(open.words):
        for bit in range(64):
            if open.bits[word] >> bit & 1:
                close(<int>(64 * word) + bit)
        open.bits[word] = 0
    pthread_mutex_unlock(&open.lock)        # taken for the fork, by this very thread
