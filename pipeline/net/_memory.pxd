"""The memory of request bodies: how a body gets it, grows in it, and leaves it to the next one.

Memory grows with the bytes that arrived. A large body is read into address space reserved for it
(an untouched page is no memory), which then becomes the message's own; nothing is copied again.
The last ones that were freed are kept for a moment and used again.
"""

from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset

from pipeline.net._budget cimport budget_left, budget_t
from pipeline._system cimport (
    MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, add_i64, clock_ns, load_i64, madvise, mmap, munmap, store_int,
)

cdef enum:
    # From here on a body is mapped, so that its memory can be handed on and given back whole.
    BODY_MAPPED_MIN = 1 << 20
    # Once this much of a body has arrived, its pages are asked for in large pieces: 64 MiB is
    # 32 faults instead of 16,384. A body costs at most one such piece more than has arrived.
    BODY_HUGE_MIN = 2 << 20
    BODY_HUGE_PAGE = 2 << 20
    # The memory of the last large bodies is kept this long, to be used again: the kernel clears
    # each fresh page, which costs as much as to read what goes into it. As many as a peer has
    # connections for them, and 64 MiB and their framing in all.
    SPARES = 4
    SPARE_MAX = 65 << 20
    SPARE_NS = 2000000000

cdef enum:
    SPARE_NONE = 0
    SPARE_NEW               # the leader does not know of it yet
    SPARE_KNOWN             # the leader will look at it in time

# The memory of one body. Handed on to Python when a message keeps views of it.
cdef struct body_t:
    uint8_t* data           # owned; NULL when handed on
    size_t len              # arrived
    size_t size             # announced
    size_t mapped           # bytes of address space; 0: allocated
    bint is_huge            # memory comes in pages of BODY_HUGE_PAGE
    bint is_reused          # all of it was memory before its first byte came

# Memory that is kept for another body.
cdef struct spare_t:
    body_t body             # owned
    int64_t until_ns

# What is kept. Whoever has a ``spares_t`` guards it with a lock; the caller of each function that
# takes one holds it.
cdef struct spares_t:
    spare_t kept[SPARES]    # the oldest first
    int n
    size_t bytes            # of address space
    int state               # SPARE_, atomic


cdef inline void body_free(body_t* body) noexcept nogil:
    if body.data is not NULL:
        if body.mapped > 0:
            munmap(body.data, body.mapped)
        else:
            free(body.data)
    memset(body, 0, sizeof(body_t))


cdef inline bint body_init(body_t* body, size_t size) noexcept nogil:
    """Make room for ``size`` bytes without making them memory; False without address space."""
    memset(body, 0, sizeof(body_t))
    body.size = size
    if size >= BODY_MAPPED_MIN:
        body.mapped = size
        body.data = <uint8_t*>mmap(NULL, size, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if body.data is <uint8_t*>MAP_FAILED:
            body.data = NULL
        else:
            # Where huge pages are the default, the first byte would cost 2 MiB.
            madvise(body.data, size, MADV_NOHUGEPAGE)
    else:
        body.data = <uint8_t*>malloc(size if size > 0 else 1)
    return body.data is not NULL


cdef inline int64_t body_resident(const body_t* body) noexcept nogil:
    """Tell how much of a body is memory."""
    cdef size_t resident = body.len
    if body.is_reused:
        return <int64_t>body.mapped
    if body.is_huge:
        resident = (resident + BODY_HUGE_PAGE - 1) & ~<size_t>(BODY_HUGE_PAGE - 1)
    return <int64_t>min(resident, max(body.mapped, body.len))


cdef inline void body_grown(body_t* body) noexcept nogil:
    """Ask for large pages once it is worth it."""
    if body.mapped > 0 and not body.is_huge and body.len >= BODY_HUGE_MIN:
        body.is_huge = True
        madvise(body.data, body.size, MADV_HUGEPAGE)


cdef inline body_t spares_take(spares_t* spares, budget_t* budget, int i) noexcept nogil:
    """Take one of the spares."""
    cdef body_t taken = spares.kept[i].body
    spares.n -= 1
    spares.bytes -= taken.mapped
    add_i64(&budget.spare, -<int64_t>taken.mapped)
    memmove(&spares.kept[i], &spares.kept[i + 1], (spares.n - i) * sizeof(spare_t))
    return taken


cdef inline bint spares_want(const body_t* body, budget_t* budget) noexcept nogil:
    """Tell whether the memory of a body that is done with is worth keeping, and may be kept."""
    return body.mapped > 0 and body.mapped <= SPARE_MAX and body.len == body.size \
        and budget_left(budget) - load_i64(&budget.spare) >= <int64_t>body.mapped


cdef inline int spares_keep(spares_t* spares, budget_t* budget, body_t* body,
                            body_t* older) noexcept nogil:
    """Keep the memory of a body, which has none any more.

    Returns how many of ``older``, of which there are SPARES, are to be freed for it: not under the
    lock, for that takes a while.
    """
    cdef int n_older = 0
    while spares.n == SPARES or spares.bytes + body.mapped > SPARE_MAX:
        older[n_older] = spares_take(spares, budget, 0)
        n_older += 1
    spares.kept[spares.n].body = body[0]
    spares.kept[spares.n].body.is_reused = True
    add_i64(&budget.spare, <int64_t>body.mapped)
    spares.kept[spares.n].until_ns = clock_ns() + SPARE_NS
    spares.n += 1
    spares.bytes += body.mapped
    memset(body, 0, sizeof(body_t))
    return n_older


cdef inline bint spares_find(spares_t* spares, budget_t* budget, body_t* body,
                             size_t size) noexcept nogil:
    """Make room in what is kept, if that is neither too small nor more than twice as large.

    All of it counts from now on, whatever arrives, so there has to be room for that.
    """
    cdef bint is_fit = False
    cdef int i = spares.n - 1
    while i >= 0 and not is_fit:        # the last one first: more of it is in the caches
        is_fit = size <= spares.kept[i].body.mapped <= 2 * size \
            and <int64_t>spares.kept[i].body.mapped <= budget_left(budget)
        if is_fit:
            body[0] = spares_take(spares, budget, i)
            body.size = size
            body.len = 0
            if spares.n == 0:
                store_int(&spares.state, SPARE_NONE)
        i -= 1
    return is_fit


cdef inline int spares_expire(spares_t* spares, budget_t* budget, int64_t now_ns,
                              bint is_scarce, body_t* older) noexcept nogil:
    """Give up what was not used in time, or all of it when memory is scarce; as ``spares_keep``."""
    cdef int n_older = 0
    while spares.n > 0 and (is_scarce or spares.kept[0].until_ns <= now_ns):
        older[n_older] = spares_take(spares, budget, 0)
        n_older += 1
    store_int(&spares.state, SPARE_KNOWN if spares.n > 0 else SPARE_NONE)
    return n_older
