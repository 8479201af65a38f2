"""What the bodies of requests may hold in memory, all of a node's together.

One budget for every way in: each listener of a node, plain and TLS, and its ASGI and WSGI
applications take from it. A body counts with what of it is resident, from its first byte until its
message is answered. Bodies of up to BODY_SMALL bytes have a room of their own, lest heartbeats wait
behind what is large; the receiving loop does not count them at all, for it has no more of them than
connections.

Counting takes no lock. A loop that has something to do when memory becomes scarce, or is to be had
again, is told so and woken.
"""

from libc.stdint cimport int64_t

from pipeline.net._loop cimport loop_t, loop_wake
from pipeline._system cimport (
    add_i64, add_int, load_i64, load_int, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
    store_int,
)

cdef enum:
    # The largest body that is never in the way of another, nor behind one: a heartbeat, a vote, an
    # append of a few entries.
    BODY_SMALL = 64 * 1024


# A receiving loop. Its own, from budget_join to budget_leave.
cdef struct budget_loop_t:
    budget_loop_t* next
    loop_t* loop            # borrowed
    int has_news            # atomic: there may be memory, or need of it
    bint is_waiting         # the loop's own: for memory


cdef struct budget_t:
    int64_t limit
    int64_t small_limit
    int64_t used            # atomic: bytes of bodies above BODY_SMALL
    int64_t small           # atomic: of the others
    int64_t spare           # atomic: bytes the loops keep for further bodies; freed when needed
    int waiting             # atomic: loops that wait for memory
    pthread_mutex_t lock    # guards what follows
    budget_loop_t* loops


# What one body counts with. To be ended by who has it.
cdef struct share_t:
    int64_t large
    int64_t small


cdef inline void budget_tell(budget_t* budget) noexcept nogil:
    """Have every loop look at its spare memory, and at what waits for memory."""
    cdef budget_loop_t* loop
    pthread_mutex_lock(&budget.lock)
    loop = budget.loops
    while loop is not NULL:
        store_int(&loop.has_news, True)
        loop_wake(loop.loop)
        loop = loop.next
    pthread_mutex_unlock(&budget.lock)


cdef inline int64_t budget_left(budget_t* budget) noexcept nogil:
    """How much more there is room for; negative when more is used."""
    return budget.limit - load_i64(&budget.used)


cdef inline void budget_add(budget_t* budget, int64_t n) noexcept nogil:
    """Count ``n`` bytes more, or less. Who takes has seen that there is room."""
    cdef int64_t used = add_i64(&budget.used, n)
    if n < 0:
        if load_int(&budget.waiting) > 0 and used < budget.limit:
            budget_tell(budget)
    elif load_i64(&budget.spare) > 0 and used + load_i64(&budget.spare) > budget.limit:
        budget_tell(budget)


cdef inline bint budget_take(budget_t* budget, int64_t n) noexcept nogil:
    """Count ``n`` bytes more if there is room for them."""
    if add_i64(&budget.used, n) > budget.limit and n > 0:
        add_i64(&budget.used, -n)
        return False
    budget_add(budget, 0)
    return True


cdef inline bint share_set(share_t* share, budget_t* budget, int64_t size) noexcept nogil:
    """Have a body count with ``size`` bytes; False, and as before, without room for that."""
    cdef int64_t more
    if size <= BODY_SMALL and share.large == 0:
        more = size - share.small
        if add_i64(&budget.small, more) > budget.small_limit and more > 0:
            add_i64(&budget.small, -more)
            return False
        share.small = size
        return True
    if not budget_take(budget, size - share.large):
        return False
    share.large = size
    add_i64(&budget.small, -share.small)
    share.small = 0
    return True


cdef inline void share_end(share_t* share, budget_t* budget) noexcept nogil:
    """Count a body no more; may be called again."""
    add_i64(&budget.small, -share.small)
    if share.large > 0:
        budget_add(budget, -share.large)
    share.large = share.small = 0


cdef inline void budget_join(budget_t* budget, budget_loop_t* loop) noexcept nogil:
    pthread_mutex_lock(&budget.lock)
    loop.next = budget.loops
    budget.loops = loop
    pthread_mutex_unlock(&budget.lock)


cdef inline void budget_leave(budget_t* budget, budget_loop_t* loop) noexcept nogil:
    """Let nobody write to the loop's eventfd any more."""
    cdef budget_loop_t** link
    budget_wait(budget, loop, False)
    pthread_mutex_lock(&budget.lock)
    link = &budget.loops
    while link[0] is not NULL and link[0] is not loop:
        link = &link[0].next
    if link[0] is loop:
        link[0] = loop.next
    pthread_mutex_unlock(&budget.lock)


cdef inline void budget_wait(budget_t* budget, budget_loop_t* loop, bint is_waiting) noexcept nogil:
    """Tell that a loop waits for memory, or does not any more.

    It looks at the budget once more after it has said so: what is given back before it has is not
    told.
    """
    if loop.is_waiting != is_waiting:
        loop.is_waiting = is_waiting
        add_int(&budget.waiting, 1 if is_waiting else -1)


cdef class BodyBudget:
    cdef budget_t c


cdef class BodyShare:
    cdef share_t c
    cdef BodyBudget budget
