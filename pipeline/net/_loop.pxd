"""A loop: it waits for what it watches, and has each be seen to when something has happened to it.

What it watches is an ``io_t``, the first part of whatever has the descriptor: a worker, a
connection, a listening socket. The loop knows no more of it. Nor does it know who runs it: a node's
sending loop has a thread of its own (``send/_sending.pxd``), a receiving one is run by whoever
leads (``receive/_lead.pxd``). The *owner* of a loop is the struct that holds it; between two waits
the owner goes through lists of its own.

Before a loop sleeps it says so, and then looks at its lists once more; whoever pushes onto one of
them does so first and then looks whether the loop sleeps. So either the loop sees the push or the
pusher sees the sleep, and a push to a loop that is awake costs one load.

What we rely on in epoll:

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
  a forked child has copies. So a socket leaves the set by EPOLL_CTL_DEL (``loop_remove``) before it
  is closed or is Python's; otherwise events would come for memory that is gone.
- The peer's end is told once, maybe long before what was sent ahead of it is read. It is noted
  (``is_ended``, ``has_ended``), or ``recv`` comes upon it.
- EPOLL_CTL_DEL takes back no event that ``epoll_wait`` has returned already. A turn may close a
  connection that a later event of the same turn points to. So an ``io_t`` outlives the turn in
  which it was removed: a caller is *buried* and freed after the turn, a worker outlives the loop's
  interest, and flags of an earlier socket do it no harm: they only have it call ``recv``, which
  says EAGAIN.
- Another thread may change the set while the loop waits (``server_detach``).
- A wait is in milliseconds and rounded up, so no deadline is looked at before it has passed.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from pipeline.net._descriptors cimport descriptors_add, descriptors_close, descriptors_t
from pipeline._system cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CLOEXEC, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, add_int, clock_ns, epoll_create1, epoll_ctl, epoll_event, epoll_wait, errno,
    eventfd, list_is_empty, list_push, list_take, load_int, pthread_mutex_lock,
    pthread_mutex_unlock, sched_yield, store_int, swap_int, write,
)

cdef enum:
    LOOP_EVENTS = 256
    # What ``ready`` is given, in place of epoll's flags, when it is the turn of what was runnable.
    IO_TURN = 0

# How a connection is watched. A listening socket is watched for EPOLLIN alone.
cdef extern from *:
    """
    #define LOOP_EDGES (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
    """
    const uint32_t LOOP_EDGES


# What a loop watches. It is the first part of the struct that has the descriptor, so that a pointer
# to one is a pointer to the other. The descriptor and is_registered are changed by whoever has that
# struct at the moment, what concerns the runnable by whoever runs the loop alone: a caller may
# still be on a list of them when a handler thread has it.
cdef struct io_t:
    int fd                  # its owner's; -1 when there is none
    bint is_registered      # fd is in the loop's epoll set
    bint is_runnable        # on a list of the runnable
    io_t* next_runnable
    io_t* next_returned
    # Called by whoever runs the loop, with flags of epoll's or with IO_TURN. It may remove its io,
    # and any other, but frees none.
    void (*ready)(io_t* io, uint32_t flags) noexcept nogil
    # Called when it was handed over, where a loop has several kinds (``loop_run_returned``).
    void (*returned)(io_t* io) noexcept nogil

# What is to be looked at again in the next turn, or when there is time, in this order.
cdef struct runnable_t:
    io_t* head
    io_t* tail              # of no meaning without a head

# What has a deadline of its own: the first part of a struct, or a part that leads to it.
cdef struct due_t:
    due_t* next
    due_t* previous
    int64_t at_ns           # 0 is none
    # Called by whoever runs the loop, once ``at_ns`` has passed, with that cleared. It may have
    # itself taken out, but no other.
    void (*due)(due_t* due) noexcept nogil

cdef struct loop_t:
    int epfd
    io_t wake               # an eventfd
    descriptors_t* descriptors      # the process's: what a forked child closes
    int wakers              # atomic: threads about to write to the eventfd
    int is_sleeping         # atomic: the loop is in, or about to enter, a wait
    io_t* returned          # atomic list: handed over by other threads, taken whole by the owner
    # Of whoever runs the loop, from here on.
    runnable_t runnable
    int64_t now_ns          # when it last woke
    int64_t next_deadline_ns        # no deadline is earlier; 0 is none
    due_t* dues             # borrowed: all that have deadlines of their own
    int n_events            # that were waited for, and not seen to yet
    epoll_event events[LOOP_EVENTS]


# -- what is looked at again although nothing happened to it

cdef inline void runnable_add(runnable_t* runnable, io_t* io) noexcept nogil:
    if io.is_runnable:
        return
    io.is_runnable = True
    io.next_runnable = NULL
    if runnable.head is NULL:
        runnable.head = io
    else:
        runnable.tail.next_runnable = io
    runnable.tail = io


cdef inline io_t* runnable_pop(runnable_t* runnable) noexcept nogil:
    """Take the first of a list that is not empty."""
    cdef io_t* io = runnable.head
    runnable.head = io.next_runnable
    io.is_runnable = False
    return io


cdef inline void runnable_remove(runnable_t* runnable, io_t* io) noexcept nogil:
    """Take one out wherever it is, if it is on the list at all."""
    cdef io_t* before = NULL
    cdef io_t* at = runnable.head
    if not io.is_runnable:
        return
    while at is not io:
        before = at
        at = at.next_runnable
    if before is NULL:
        runnable.head = io.next_runnable
    else:
        before.next_runnable = io.next_runnable
    if runnable.tail is io:
        runnable.tail = before
    io.is_runnable = False


# -- deadlines

cdef inline void loop_look_at(loop_t* loop, int64_t at_ns) noexcept nogil:
    """See to it that deadlines are checked at ``at_ns`` at the latest; 0 is never."""
    if at_ns and (loop.next_deadline_ns == 0 or at_ns < loop.next_deadline_ns):
        loop.next_deadline_ns = at_ns


cdef inline bint loop_is_due(const loop_t* loop) noexcept nogil:
    """Tell whether a deadline may have passed."""
    return loop.next_deadline_ns != 0 and loop.now_ns >= loop.next_deadline_ns


cdef inline int loop_timeout_ms(const loop_t* loop, int64_t due_ns) noexcept nogil:
    """How long the loop may sleep: not when something is runnable, else to its next deadline or
    ``due_ns``, rounded up; -1 for ever.
    """
    if loop.runnable.head is not NULL:
        return 0
    if due_ns == 0 or (loop.next_deadline_ns and loop.next_deadline_ns < due_ns):
        due_ns = loop.next_deadline_ns
    if due_ns == 0:
        return -1
    if due_ns <= loop.now_ns:
        return 0
    due_ns = (due_ns - loop.now_ns + 999999) // 1000000
    return <int>due_ns if due_ns < 3600000 else 3600000


cdef inline void loop_join(loop_t* loop, due_t* due) noexcept nogil:
    """Look at a deadline from now on."""
    due.previous = NULL
    due.next = loop.dues
    if due.next is not NULL:
        due.next.previous = due
    loop.dues = due
    loop_look_at(loop, due.at_ns)


cdef inline void loop_leave(loop_t* loop, due_t* due) noexcept nogil:
    """Look at it no more."""
    if due.previous is not NULL:
        due.previous.next = due.next
    else:
        loop.dues = due.next
    if due.next is not NULL:
        due.next.previous = due.previous


cdef inline void loop_set_due(loop_t* loop, due_t* due, int64_t at_ns) noexcept nogil:
    """Set the deadline of what is looked at; 0 is none."""
    due.at_ns = at_ns
    loop_look_at(loop, at_ns)


cdef inline void loop_check_dues(loop_t* loop) noexcept nogil:
    """Call what is overdue, and see to it that the next deadline is looked at."""
    cdef due_t* due = loop.dues
    cdef due_t* following
    while due is not NULL:
        following = due.next
        if due.at_ns and due.at_ns <= loop.now_ns:
            due.at_ns = 0
            due.due(due)
        else:
            loop_look_at(loop, due.at_ns)
        due = following


# -- what is watched

cdef inline int loop_add(loop_t* loop, io_t* io, uint32_t events,
                         void (*ready)(io_t* io, uint32_t flags) noexcept nogil) noexcept nogil:
    """Watch a descriptor, and have ``ready`` called for it; 0 or an errno."""
    cdef epoll_event event
    io.ready = ready
    event.events = events
    event.data.ptr = io
    if epoll_ctl(loop.epfd, EPOLL_CTL_ADD, io.fd, &event) != 0:
        return errno
    io.is_registered = True
    return 0


cdef inline void loop_remove(loop_t* loop, io_t* io) noexcept nogil:
    """Watch it no more. By whoever has ``io``, before its descriptor is closed or goes elsewhere.
    """
    if io.is_registered:
        epoll_ctl(loop.epfd, EPOLL_CTL_DEL, io.fd, NULL)
        io.is_registered = False


# -- a turn: what is runnable, the wait, what has happened

cdef inline void loop_run_runnable(loop_t* loop) noexcept nogil:
    """Give a turn to what is runnable now; what becomes so meanwhile has the next one."""
    cdef io_t* io
    cdef io_t* last = loop.runnable.tail
    while loop.runnable.head is not NULL:
        io = runnable_pop(&loop.runnable)
        io.ready(io, IO_TURN)
        if io is last:
            return


cdef inline bint loop_may_sleep(loop_t* loop) noexcept nogil:
    """Announce a sleep. False when something was handed over before: whoever did saw us awake.

    The owner looks at its other lists after this as well.
    """
    store_int(&loop.is_sleeping, 1)
    return list_is_empty(&loop.returned)


cdef inline void loop_wait(loop_t* loop, int timeout_ms) noexcept nogil:
    """Wait until something happens, and note the time."""
    loop.n_events = epoll_wait(loop.epfd, loop.events, LOOP_EVENTS, timeout_ms)
    store_int(&loop.is_sleeping, 0)
    loop.now_ns = clock_ns()


cdef inline void loop_run_events(loop_t* loop) noexcept nogil:
    """Have what happened seen to."""
    cdef io_t* io
    cdef int i
    for i in range(loop.n_events):      # none, or -1, when the wait was cut short
        io = <io_t*>loop.events[i].data.ptr
        io.ready(io, loop.events[i].events)


# -- from other threads

cdef inline void loop_return(loop_t* loop, io_t* io) noexcept nogil:
    """Hand over to the loop what the calling thread has. It does not wake the loop."""
    list_push(&loop.returned, &io.next_returned, io)


cdef inline io_t* loop_take_returned(loop_t* loop) noexcept nogil:
    """Take what was handed over, linked by ``next_returned``, the last first."""
    return <io_t*>list_take(&loop.returned)


cdef inline void loop_run_returned(loop_t* loop) noexcept nogil:
    """Have what was handed over seen to."""
    cdef io_t* io = loop_take_returned(loop)
    cdef io_t* following
    while io is not NULL:
        following = io.next_returned
        io.returned(io)
        io = following


cdef inline void loop_wake(loop_t* loop) noexcept nogil:
    """Make a sleeping loop look at its lists. Costs one load while it is awake."""
    cdef uint64_t one = 1
    if load_int(&loop.is_sleeping):
        add_int(&loop.wakers, 1)        # loop_close does not close the eventfd meanwhile
        if swap_int(&loop.is_sleeping, 0):
            write(loop.wake.fd, &one, sizeof(one))
        add_int(&loop.wakers, -1)


# -- making and ending

cdef inline void loop_woken(io_t* io, uint32_t flags) noexcept nogil:
    """Do nothing: that the wait is over was all that was wanted."""


cdef inline void loop_init(loop_t* loop) noexcept nogil:
    """Make a loop that is not open, or forget what it has open: in a forked child."""
    memset(loop, 0, sizeof(loop_t))
    loop.epfd = loop.wake.fd = -1


cdef inline int loop_open(loop_t* loop, descriptors_t* descriptors) noexcept nogil:
    """Make what the loop waits with; 0 or an errno."""
    cdef int error = 0
    loop.descriptors = descriptors
    loop.now_ns = clock_ns()
    pthread_mutex_lock(&descriptors.lock)
    loop.epfd = descriptors_add(descriptors, epoll_create1(EPOLL_CLOEXEC))
    if loop.epfd >= 0:
        loop.wake.fd = descriptors_add(descriptors, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
    if loop.wake.fd < 0:
        error = errno
    pthread_mutex_unlock(&descriptors.lock)
    if error == 0:
        error = loop_add(loop, &loop.wake, EPOLLIN | EPOLLET, loop_woken)
    if error != 0:
        loop_close(loop)
    return error


cdef inline void loop_close(loop_t* loop) noexcept nogil:
    """Close what the loop waited with, if it is open. Nobody runs the loop any more."""
    if loop.wake.fd >= 0:
        # is_sleeping stays 0, so nobody new writes; who was about to has nearly done so.
        while load_int(&loop.wakers) > 0:
            sched_yield()
        descriptors_close(loop.descriptors, loop.wake.fd)
    if loop.epfd >= 0:
        descriptors_close(loop.descriptors, loop.epfd)
    loop.epfd = loop.wake.fd = -1
    loop.wake.is_registered = False
