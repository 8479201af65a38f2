"""msgc: the bounded ring of messages that wait for a worker.

Source: etcd rafthttp/pipeline.go, ``msgc chan raftpb.Message`` with pipelineBufSize 64.

The ring has no lock of its own. Whether a message fits and what the books say must be one
decision, so the pipe's lock guards both (``_pipe.pxd``); two locks would let them disagree.
"""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free


cdef enum:
    RING_OK = 0
    RING_FULL = 1
    RING_NO_MEMORY = -1


# Invariant: tail - head <= cap; slot i & mask holds the pointer for head <= i < tail.
# The counters run freely and wrap at 2**32, a multiple of every power-of-two slot count.
cdef struct ring_t:
    void** slots        # owned
    uint32_t mask       # number of slots - 1; the number is a power of two >= cap
    uint32_t cap        # messages that fit
    uint32_t head       # next to pop
    uint32_t tail       # next to push


cdef inline int ring_init(ring_t* ring, uint32_t cap) noexcept nogil:
    """Make an empty ring of ``cap`` (1 to 2**16) pointers."""
    cdef uint32_t slots = 1
    while slots < cap:
        slots <<= 1
    ring.slots = <void**>calloc(slots, sizeof(void*))
    if ring.slots is NULL:
        return RING_NO_MEMORY
    ring.mask = slots - 1
    ring.cap = cap
    ring.head = ring.tail = 0
    return RING_OK


cdef inline void ring_free(ring_t* ring) noexcept nogil:
    """Give the slots back; what they point to is the caller's."""
    free(ring.slots)
    ring.slots = NULL


cdef inline uint32_t ring_len(const ring_t* ring) noexcept nogil:
    return ring.tail - ring.head


cdef inline int ring_try_push(ring_t* ring, void* item) noexcept nogil:
    """RING_OK, or RING_FULL and nothing changed. Never waits."""
    if ring_len(ring) >= ring.cap:
        return RING_FULL
    ring.slots[ring.tail & ring.mask] = item
    ring.tail += 1
    return RING_OK


cdef inline void* ring_peek(const ring_t* ring) noexcept nogil:
    """The oldest pointer, which stays, or NULL."""
    return NULL if ring.head == ring.tail else ring.slots[ring.head & ring.mask]


cdef inline void* ring_try_pop(ring_t* ring) noexcept nogil:
    """The oldest pointer, or NULL. Never waits."""
    cdef void* item
    if ring.head == ring.tail:
        return NULL
    item = ring.slots[ring.head & ring.mask]
    ring.head += 1
    return item
