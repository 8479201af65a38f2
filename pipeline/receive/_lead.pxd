"""Who runs the receiving loop.

The loop is run by one thread at a time, the *leader*. To wake another for each request would cost
more than the request. So a handler thread with nothing to do leads, until it has read a request;
then it gives up the lead, has the request processed, answers it, and leads again. Meanwhile others
may be waited for in vain: ``process`` may block, and so may the GIL. Then the native thread, the
*stand-in*, leads. A timer tells it that nobody has for STAND_IN_NS; nobody leads without that
timer running. It gives the lead to the next handler thread it has to wake for a request anyway. It
also leads first, and alone once the loop is to stop.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from pipeline.net._budget cimport budget_join
from pipeline.receive._caller cimport QUEUE_STRANGERS, caller_t, handler_t, server_t
from pipeline.receive._inbox cimport reader_join
from pipeline.receive._queues cimport server_signal_handlers, server_take, server_take_beside
from pipeline.receive._server cimport server_end, server_resume_accept, server_turn
from pipeline._system cimport (
    clock_ns, deadline_timespec, itimerspec, load_int, pthread_cond_timedwait, pthread_cond_wait,
    pthread_mutex_lock, pthread_mutex_unlock, read, store_int, thread_start, timerfd_settime,
    timespec,
)

cdef enum:
    # How long nobody leads before the stand-in does. Longer than a small message takes; under load
    # its timer goes off once in this time, and finds that somebody leads.
    STAND_IN_NS = 500000


cdef inline void server_arm(server_t* server, int64_t after_ns) noexcept nogil:
    """Have the stand-in look after so long. The caller holds the lock."""
    cdef itimerspec at
    memset(&at, 0, sizeof(at))
    at.it_value.tv_nsec = <long>after_ns
    server.is_armed = True
    timerfd_settime(server.timerfd, 0, &at, NULL)


cdef inline void server_leave(server_t* server) noexcept nogil:
    """Give up the lead. The caller holds the lock.

    The timer is not disarmed when somebody leads again: that would be a system call per message.
    """
    store_int(&server.is_led, False)
    server.left_ns = server.loop.now_ns
    if not server.is_armed:
        server_arm(server, STAND_IN_NS)


cdef inline caller_t* server_lead(server_t* server) noexcept nogil:
    """Lead until there is a request for this handler thread, or the loop is to stop: NULL.

    The caller holds the lock, which is let go of meanwhile, and nobody leads.
    """
    cdef caller_t* caller = NULL
    store_int(&server.is_led, True)
    server.queue_check_ns = 0       # we come to what is queued ourselves
    while caller is NULL and not load_int(&server.is_stopping):
        pthread_mutex_unlock(&server.lock)
        while not server.has_queued and not load_int(&server.is_stopping):
            server_turn(server)
        pthread_mutex_lock(&server.lock)
        server.has_queued = False
        caller = server_take(server, False)
    server_leave(server)
    return caller


cdef inline caller_t* server_wait(server_t* server, handler_t* handler) noexcept nogil:
    """Wait for a request; NULL when there will be none any more. No handler: something odd."""
    cdef bint is_odd = handler is NULL
    cdef timespec at
    cdef caller_t* caller
    pthread_mutex_lock(&server.lock)
    caller = server_take_beside(server) if is_odd else server_take(server, False)
    while caller is NULL and not server.is_closed:
        if is_odd and server.queues[QUEUE_STRANGERS].head is not NULL:
            at = deadline_timespec(server.strangers_at_ns)
            pthread_cond_timedwait(&server.odd_queued, &server.lock, &at)
        elif is_odd:
            pthread_cond_wait(&server.odd_queued, &server.lock)
        elif load_int(&server.is_led) or load_int(&server.is_stopping):
            handler.is_waiting = True
            pthread_cond_wait(&server.handlers_queued, &server.lock)
            handler.is_waiting = False
        else:
            caller = server_lead(server)
            continue
        caller = server_take_beside(server) if is_odd else server_take(server, False)
    pthread_mutex_unlock(&server.lock)
    return caller


cdef inline void server_stand_by(server_t* server) noexcept nogil:
    """Give up the lead, and take it again when nobody has had it for STAND_IN_NS."""
    cdef uint64_t expirations
    cdef int64_t left_ns
    server.has_signalled = False
    pthread_mutex_lock(&server.lock)
    server_leave(server)
    while True:
        pthread_mutex_unlock(&server.lock)
        read(server.timerfd, &expirations, sizeof(expirations))
        pthread_mutex_lock(&server.lock)
        server.is_armed = False
        if load_int(&server.is_led):
            continue
        left_ns = server.left_ns + STAND_IN_NS - clock_ns()
        if left_ns <= 0:
            break
        server_arm(server, left_ns)
    store_int(&server.is_led, True)
    pthread_mutex_unlock(&server.lock)
    # Assume that requests are queued: the thread that was to take them may be blocked.
    server.has_queued = True


cdef inline void* server_main(void* argument) noexcept nogil:
    """The native thread: leads at first, and whenever no handler thread is there to.

    Ends when told to, once no connection is left or the deadline is over.
    """
    cdef server_t* server = <server_t*>argument
    cdef bint has_stood_by = False
    while server_turn(server):
        if server.has_queued:
            server_signal_handlers(server, has_stood_by)
            has_stood_by = False
        if server.has_signalled and not server.has_begun_stop:
            server_stand_by(server)
            has_stood_by = True
    server_end(server)
    return NULL


cdef inline int server_start(server_t* server) noexcept nogil:
    """Start the thread; 0 or an errno."""
    server.loop.now_ns = clock_ns()
    server_resume_accept(server)
    server.is_led = True            # by the thread to be started
    server.in_budget.loop = &server.loop
    budget_join(server.budget, &server.in_budget)
    if server.inbox is not NULL:
        server.reader.loop = &server.loop
        reader_join(server.inbox, &server.reader)
    return thread_start(&server.thread, server_main, server, b"pipeline-serve")
