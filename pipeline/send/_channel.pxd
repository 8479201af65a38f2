"""A channel: msgc, what may wait in it and for how long, and the books of what became of it.

Source: etcd rafthttp/pipeline.go, ``msgc chan raftpb.Message``. A channel knows nobody who takes
from it, and has no lock of its own: whether a message is accepted, what the books say, and whether
somebody idle is to be told are one decision. The lock of its owner (``_pipe.pxd``) guards all of
it; the caller of each function here holds that lock.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.uio cimport iovec

from pipeline.send._books cimport (
    books_accept, books_drop, books_offer, books_refuse, books_settle, books_t, books_take,
    books_take_run,
)
from pipeline.send._ring cimport (
    RING_OK, ring_free, ring_init, ring_len, ring_peek, ring_t, ring_try_pop, ring_try_push,
)
from pipeline.wire._facts cimport facts_t
from pipeline._system cimport add_i64, clock_ns, load_i64

cdef enum:
    OFFER_ACCEPTED = 0
    OFFER_FULL = 1
    OFFER_STOPPED = 2

# One message on its way. A single allocation: the struct, its segments, its owners, its bytes.
cdef struct job_t:
    job_t* next             # on loop.finished, or on channel.expired
    uint64_t to
    size_t size_bytes       # of the protobuf message: Content-Length
    uint64_t number         # order of offers, over both rings of a channel
    int64_t offered_ns      # only with limits.max_age_ns
    int64_t taken_ns        # when a worker took it; latency counts from here
    int32_t type
    bint has_facts          # ``facts`` are told
    facts_t facts           # for its frame, if it goes by a stream
    bint retried            # already moved once to a fresh connection
    int n_segments
    int n_owners
    # The request in order. The first is for the head of whoever sends it; the others are the body,
    # in this allocation or in an owner's memory.
    iovec* segments
    void** owners           # owned PyObject*; only a thread with the GIL may drop them

# What the channels of a node may hold together.
cdef struct queue_budget_t:
    int64_t bytes           # atomic: queued in all channels
    int64_t large_bytes     # atomic: of large messages among them
    int64_t limit           # for ``bytes``

cdef struct channel_limits_t:
    uint32_t messages       # 1 to 2**16
    int64_t bytes
    size_t large_min        # a larger message is in the ring of the large ones
    int64_t max_age_ns      # 0 is none

cdef struct channel_t:
    ring_t msgc             # small messages
    ring_t large            # large ones; both together hold msgc.cap
    int64_t large_bytes     # in the latter
    books_t books
    job_t* expired          # out of the rings, still queued: for Python to fail, newest first
    bint is_stopping        # offers are refused
    channel_limits_t limits
    queue_budget_t* budget  # the node's; outlives the channel


cdef inline int channel_init(channel_t* channel, const channel_limits_t* limits,
                             queue_budget_t* budget) noexcept nogil:
    """Make an empty channel; 0, or -1 without memory."""
    memset(channel, 0, sizeof(channel_t))
    channel.limits = limits[0]
    channel.budget = budget
    if ring_init(&channel.msgc, limits.messages) != RING_OK \
            or ring_init(&channel.large, limits.messages) != RING_OK:
        channel_free(channel)
        return -1
    return 0


cdef inline void channel_free(channel_t* channel) noexcept nogil:
    """Free a channel that no job is in."""
    ring_free(&channel.msgc)
    ring_free(&channel.large)


cdef inline bint channel_is_large(const channel_t* channel, const job_t* job) noexcept nogil:
    return job.size_bytes > channel.limits.large_min


cdef inline int channel_offer(channel_t* channel, job_t* job) noexcept nogil:
    """Accept or refuse a job; OFFER_*. The caller owns a refused job."""
    cdef books_t* books = &channel.books
    cdef queue_budget_t* budget = channel.budget
    cdef int64_t size = <int64_t>job.size_bytes
    cdef int64_t held, held_by_all
    cdef bint is_large = channel_is_large(channel, job)
    cdef ring_t* ring
    books_offer(books)
    if channel.is_stopping:
        books_refuse(books)
        return OFFER_STOPPED
    # An empty queue takes one message of any size, whatever the other peers hold: a large
    # snapshot must be sendable, and a dead peer's backlog must not silence a healthy one. Small
    # messages are not refused for the bytes of large ones, which must not silence them either.
    ring = &channel.large if is_large else &channel.msgc
    held = <int64_t>books.queued_bytes
    held_by_all = add_i64(&budget.bytes, size)
    if not is_large:
        held -= channel.large_bytes
        held_by_all -= load_i64(&budget.large_bytes)
    if (held_by_all > budget.limit or held + size > channel.limits.bytes) \
            and (ring_len(ring) > 0 or channel.expired is not NULL) \
            or books.queued >= channel.msgc.cap:
        add_i64(&budget.bytes, -size)
        books_refuse(books)
        return OFFER_FULL
    ring_try_push(ring, job)
    if is_large:
        channel.large_bytes += size
        add_i64(&budget.large_bytes, size)
    job.number = books.accepted
    if channel.limits.max_age_ns:
        job.offered_ns = clock_ns()
    books_accept(books, job.size_bytes)
    return OFFER_ACCEPTED


cdef inline job_t* channel_pop(channel_t* channel, bint with_large) noexcept nogil:
    """Take the oldest job out of the rings, or NULL; the books are the caller's."""
    cdef job_t* job = <job_t*>ring_peek(&channel.msgc)
    cdef job_t* large = <job_t*>ring_peek(&channel.large) if with_large else NULL
    if large is not NULL and (job is NULL or large.number < job.number):
        return <job_t*>ring_try_pop(&channel.large)
    return <job_t*>ring_try_pop(&channel.msgc)


cdef inline void channel_count_taken(channel_t* channel, const job_t* job) noexcept nogil:
    """Write into the books that a queued job is in flight."""
    cdef int64_t size = <int64_t>job.size_bytes
    add_i64(&channel.budget.bytes, -size)
    if channel_is_large(channel, job):
        channel.large_bytes -= size
        add_i64(&channel.budget.large_bytes, -size)
    books_take(&channel.books, job.size_bytes)


cdef inline job_t* channel_take(channel_t* channel, bint with_large) noexcept nogil:
    """Move the oldest queued job into flight, or NULL."""
    cdef job_t* job = channel_pop(channel, with_large)
    if job is not NULL:
        channel_count_taken(channel, job)
    return job


cdef inline job_t* channel_take_run(
        channel_t* channel, uint32_t n_max, size_t bytes_max, job_t** last) noexcept nogil:
    """Move the oldest small jobs into flight: a list, the oldest first, or NULL.

    So many at most, and no more than it takes to have so many bytes. Producers want the lock
    meanwhile, so what can be done once is.
    """
    cdef ring_t* ring = &channel.msgc
    cdef job_t* first = NULL
    cdef job_t* job
    cdef uint32_t n = 0
    cdef size_t size = 0
    while n < n_max and size < bytes_max:
        job = <job_t*>ring_try_pop(ring)
        if job is NULL:
            break
        if first is NULL:
            first = job
        else:
            last[0].next = job
        last[0] = job
        n += 1
        size += job.size_bytes
    if first is not NULL:
        last[0].next = NULL
        add_i64(&channel.budget.bytes, -<int64_t>size)
        books_take_run(&channel.books, n, size)
    return first


cdef inline bint channel_expire(channel_t* channel, int64_t now_ns) noexcept nogil:
    """Put aside jobs that waited too long, for Python to fail; True when there were some.

    Differs from etcd: if asked for; etcd sends a message however old.
    They need no worker: a backlog goes even while all workers are busy with a peer that is dead.
    Until Python has them they count as queued, so that what is held keeps its bounds.
    """
    cdef int64_t oldest_ns = now_ns - channel.limits.max_age_ns
    cdef bint is_some = False
    cdef job_t* small
    cdef job_t* large
    cdef job_t* job
    if channel.limits.max_age_ns == 0:
        return False
    while True:
        small = <job_t*>ring_peek(&channel.msgc)
        large = <job_t*>ring_peek(&channel.large)
        if (small is NULL or small.offered_ns > oldest_ns) \
                and (large is NULL or large.offered_ns > oldest_ns):
            return is_some
        job = channel_pop(channel, True)        # the older one of the two
        job.next = channel.expired
        channel.expired = job
        is_some = True


cdef inline int64_t channel_expires_at(const channel_t* channel) noexcept nogil:
    """When the oldest job will have waited too long; 0 for never. With limits.max_age_ns only."""
    cdef const job_t* job = <const job_t*>ring_peek(&channel.msgc)
    cdef const job_t* large = <const job_t*>ring_peek(&channel.large)
    if job is NULL or (large is not NULL and large.offered_ns < job.offered_ns):
        job = large
    return 0 if job is NULL else job.offered_ns + channel.limits.max_age_ns


cdef inline job_t* channel_take_expired(channel_t* channel) noexcept nogil:
    """Move what ``channel_expire`` has put aside into flight: a list, newest first."""
    cdef job_t* first = channel.expired
    cdef job_t* job = first
    channel.expired = NULL
    while job is not NULL:
        channel_count_taken(channel, job)
        job = job.next
    return first


cdef inline void channel_settle(channel_t* channel, const job_t* job, int outcome) noexcept nogil:
    """Write a job's one outcome into the books; OUTCOME_*."""
    books_settle(&channel.books, job.size_bytes, outcome)


cdef inline job_t* channel_drop_all(channel_t* channel) noexcept nogil:
    """Refuse offers from now on and drop what is queued: a list, for the caller to free."""
    # Raft will not hear any more of those that have waited too long.
    cdef job_t* first = channel_take_expired(channel)
    cdef job_t* job = first
    channel.is_stopping = True
    while job is not NULL:
        books_drop(&channel.books)
        job = job.next
    job = channel_take(channel, True)
    while job is not NULL:
        books_drop(&channel.books)
        job.next = first
        first = job
        job = channel_take(channel, True)
    return first
