"""What the sending loop waits with. What it relies on in epoll is told in ``_loop.pxd``."""

from libc.stdint cimport int64_t, uint64_t

from pipeline.net._sync cimport (
    clock_ns, epoll_event, epoll_wait, load_int, store_int, swap_int, write,
)


cdef struct poll_t:
    int epfd
    int wakefd
    int is_sleeping         # atomic: the loop is in, or about to enter, a wait
    int64_t now_ns          # when it last woke; the loop's own, as the next one
    int64_t next_deadline_ns        # no deadline is earlier; 0 is none


cdef inline void poll_look_at(poll_t* poll, int64_t at_ns) noexcept nogil:
    """See to it that deadlines are checked at ``at_ns`` at the latest; 0 is never."""
    if at_ns and (poll.next_deadline_ns == 0 or at_ns < poll.next_deadline_ns):
        poll.next_deadline_ns = at_ns


cdef inline bint poll_is_due(const poll_t* poll) noexcept nogil:
    """Tell whether a deadline may have passed."""
    return poll.next_deadline_ns != 0 and poll.now_ns >= poll.next_deadline_ns


cdef inline int poll_timeout_ms(const poll_t* poll, int64_t due_ns) noexcept nogil:
    """How long the loop may sleep: to its next deadline or ``due_ns``, rounded up; -1 for ever."""
    if due_ns == 0 or (poll.next_deadline_ns and poll.next_deadline_ns < due_ns):
        due_ns = poll.next_deadline_ns
    if due_ns == 0:
        return -1
    if due_ns <= poll.now_ns:
        return 0
    due_ns = (due_ns - poll.now_ns + 999999) // 1000000
    return <int>due_ns if due_ns < 3600000 else 3600000


cdef inline int poll_wait(poll_t* poll, epoll_event* events, int n, int timeout_ms) noexcept nogil:
    """Wait for up to ``n`` events, and note the time; how many there are."""
    n = epoll_wait(poll.epfd, events, n, timeout_ms)
    store_int(&poll.is_sleeping, 0)
    poll.now_ns = clock_ns()
    return n


cdef inline void poll_wake(poll_t* poll) noexcept nogil:
    """Wake the loop if it sleeps. The caller sees to it that nobody closes ``wakefd`` meanwhile."""
    cdef uint64_t one = 1
    if load_int(&poll.is_sleeping) and swap_int(&poll.is_sleeping, 0):
        write(poll.wakefd, &one, sizeof(one))
