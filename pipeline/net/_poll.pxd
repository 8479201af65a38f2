"""What a loop waits with: an epoll instance, an eventfd that wakes it, the time, the next deadline.

There are two loops, the one that sends (``_loop.pxd``) and the one that receives (``_server.pxd``).
Before a loop sleeps it says so, and then looks at its lists once more; whoever pushes onto one of
them does so first and then looks whether the loop sleeps. So either the loop sees the push or the
pusher sees the sleep, and a push to a loop that is awake costs one load.

What they rely on in epoll:

- A connection is registered once, for reading, writing and the peer's end, edge-triggered: an event
  says that something has changed, not that something is there. Nothing is said again. So whoever
  stops before EAGAIN, for others are to have a turn, puts itself on the list of the runnable.
- To register a socket reports what is there already. A worker that comes back from Python misses
  nothing that arrived meanwhile.
- Listening sockets are level-triggered: a caller who is not accepted in this turn is told of again,
  and accepting is paused by taking the socket out.
- The eventfd is edge-triggered and never read. Each write is an edge, whatever the sum; the sum of
  ones does not overflow. To read it would be a system call per wake-up, for nothing.
- The set holds open files, not descriptors. A socket stays in it until its last copy is closed, and
  a forked child has copies. So a socket leaves the set by EPOLL_CTL_DEL before it is closed or is
  Python's; otherwise events would come for memory that is gone.
- The peer's end is told once, maybe long before what was sent ahead of it is read. It is noted
  (``is_ended``, ``has_ended``), or ``recv`` comes upon it.
- EPOLL_CTL_DEL takes back no event that ``epoll_wait`` has returned already. A turn may close a
  connection that a later event of the same turn points to. So a conn is *buried* and freed after
  the turn; a worker outlives the loop's interest, and flags of an earlier socket do it no harm:
  they only have it call ``recv``, which says EAGAIN.
- Another thread may change the set while the loop waits (``server_detach``).
- A wait is in milliseconds and rounded up, so no deadline is looked at before it has passed.
"""

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
