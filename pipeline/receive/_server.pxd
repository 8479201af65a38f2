"""The receiving loop: accepts, waits, and has connections read and answered, without the GIL.

Source: etcd rafthttp/http.go ``pipelineHandler``, on net/http. What is done with one connection is
in ``_requests.pxd``, who runs the loop in ``_lead.pxd``, and what it waits with in ``_loop.pxd``.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pipeline.net._budget cimport budget_leave, budget_left, budget_t, budget_wait
from pipeline.receive._caller cimport (
    ACCEPT_RETRY_NS, ACCEPT_STEP, CALLER_BODY, CALLER_HANDLED, CALLER_HEAD, CALLER_LINGERING,
    CALLER_ENDLESS, CALLER_ODD, CALLER_SHAKING, CALLER_WRITING, QUEUES, SERVER_TURN_BYTES,
    THEN_READ_BODY, caller_add_runnable, caller_append, caller_is_old, caller_of_turn,
    caller_set_deadline, caller_set_state, caller_t, listening_t, server_check_spare,
    server_limits_t, server_t,
)
from pipeline.net._descriptors cimport (
    descriptors_add, descriptors_close, descriptors_shut, descriptors_t,
)
from pipeline.receive._heads cimport heads_free
from pipeline.receive._inbox cimport reader_is_due, reader_leave, reader_show
from pipeline.net._memory cimport SPARE_NEW, SPARE_NONE, body_free, body_t, spares_take
from pipeline.net._loop cimport (
    IO_TURN, LOOP_EDGES, io_t, loop_add, loop_close, loop_init, loop_is_due, loop_look_at,
    loop_may_sleep, loop_open, loop_remove, loop_run_events, loop_run_runnable, loop_take_returned,
    loop_timeout_ms, loop_wait, loop_wake, runnable_pop,
)
from pipeline.receive._queues cimport caller_free, queue_take, server_signal_handlers
from pipeline.receive._requests cimport (
    caller_broken, caller_close, caller_is_idle, caller_ready, caller_returned, caller_send_byte,
    server_admit,
)
from pipeline._system cimport (
    CLOCK_MONOTONIC, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPOLLIN, MSG_DONTWAIT, MSG_NOSIGNAL,
    SHUT_RDWR, SOCK_CLOEXEC, SOCK_NONBLOCK, TFD_CLOEXEC, accept4, add_int, clock_ns,
    cond_init_monotonic, count_add, count_set, errno, invariant, list_is_empty, load_i64, load_int,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock, send, shutdown, sockaddr, socklen_t, store_int,
    swap_int, timerfd_create,
)
from pipeline.receive._turns cimport LANES, turns_join, turns_take


cdef inline bint server_make_room(server_t* server) noexcept nogil:
    """Close the connection that can be spared best; False when none can.

    That is the oldest one in a TLS handshake, or else the one idle longest: whoever only says hello
    must not put those out who are through. While Python is at work on handshakes, one of which will
    be spared next, nobody else is.
    """
    cdef caller_t* caller = server.oldest
    cdef caller_t* spared = NULL
    cdef bint is_shaking = False
    while caller is not NULL:
        # What another thread has is not looked into.
        if caller.state == CALLER_HANDLED:
            is_shaking = is_shaking or caller.is_shaking
        elif caller.state == CALLER_SHAKING:
            spared = caller
            break
        elif spared is NULL and caller_is_idle(caller):
            spared = caller
        caller = caller.next
    if spared is NULL or (caller is NULL and is_shaking):
        return False
    count_add(&server.counts.closed_for_room, 1)
    caller_close(spared)
    return True


cdef inline void server_pause_accept(server_t* server, int64_t until_ns) noexcept nogil:
    cdef int i
    for i in range(server.n_listening):
        loop_remove(&server.loop, &server.listening[i].io)
    server.accept_at_ns = until_ns
    count_add(&server.counts.accept_pauses, 1)
    if until_ns > 0:
        loop_look_at(&server.loop, until_ns)


cdef inline void server_resume_accept(server_t* server) noexcept nogil:
    cdef int i
    server.accept_at_ns = 0
    for i in range(server.n_listening):
        loop_add(&server.loop, &server.listening[i].io, EPOLLIN, listening_ready)


cdef inline void listening_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Accept who waits, within the limit of connections."""
    cdef listening_t* listening = <listening_t*>io
    cdef server_t* server = listening.server
    cdef caller_t* caller
    cdef socklen_t size
    cdef int step, error
    for step in range(ACCEPT_STEP):
        if server.counts.connections >= <uint64_t>server.limits.max_connections:
            if step > 0:
                return          # is there another? epoll will say so
            if not server_make_room(server):
                server_pause_accept(server, -1)     # until one closes or is idle
                return
        caller = <caller_t*>calloc(1, sizeof(caller_t))
        if caller is NULL:
            server_pause_accept(server, server.loop.now_ns + ACCEPT_RETRY_NS)
            return
        size = sizeof(caller.address)
        pthread_mutex_lock(&server.descriptors.lock)
        caller.conn.io.fd = descriptors_add(server.descriptors, accept4(
            listening.io.fd, <sockaddr*>&caller.address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC))
        error = errno
        pthread_mutex_unlock(&server.descriptors.lock)
        if caller.conn.io.fd < 0:
            free(caller)
            if error == EAGAIN:
                return
            if error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM:
                if not server_make_room(server):
                    # The listener stays, and looks again in a while.
                    server_pause_accept(server, server.loop.now_ns + ACCEPT_RETRY_NS)
                return
            continue    # anything else was the end of the one connection (accept(2))
        caller.server = server
        server.next_id += 1
        caller.id = server.next_id
        caller.is_new = True
        pthread_mutex_lock(&server.lock)
        caller.member = turns_join(&server.turns, &caller.address)
        server.live += caller.member is not NULL
        pthread_mutex_unlock(&server.lock)
        if caller.member is NULL:
            descriptors_shut(server.descriptors, caller.conn.io.fd)
            free(caller)
            continue
        count_add(&server.counts.accepted, 1)
        count_add(&server.counts.connections, 1)
        caller_append(caller)
        if listening.has_tls:
            caller.has_tls = True
            caller_set_state(caller, CALLER_SHAKING)
            caller.head_deadline_ns = server.loop.now_ns + server.limits.handshake_timeout_ns
            caller_set_deadline(caller, caller.head_deadline_ns)
        else:
            # A connection that says nothing at all has no more time than a head.
            caller_set_deadline(caller, server.loop.now_ns + server.limits.head_timeout_ns)
        if loop_add(&server.loop, &caller.conn.io, LOOP_EDGES, caller_ready) != 0:
            caller_close(caller)


cdef inline void server_free_buried(server_t* server) noexcept nogil:
    """Free what was closed in this turn, but for what is still listed as runnable.

    No event is pending.
    """
    cdef caller_t* caller = server.buried
    cdef caller_t* following
    server.buried = NULL
    if caller is NULL:
        return
    pthread_mutex_lock(&server.lock)
    while caller is not NULL:
        following = caller.next
        if caller.conn.io.is_runnable:
            caller.next = server.buried
            server.buried = caller
        else:
            caller_free(caller)
        caller = following
    pthread_mutex_unlock(&server.lock)


cdef inline void server_run_bulk(server_t* server) noexcept nogil:
    """Read where there is much to read, until it was SERVER_TURN_BYTES.

    Connections left, and those that become so meanwhile, are for the next turn.
    """
    cdef io_t* io
    cdef io_t* last = server.bulk.tail
    server.bulk_bytes = 0
    while server.bulk.head is not NULL and server.bulk_bytes < SERVER_TURN_BYTES:
        io = runnable_pop(&server.bulk)
        io.ready(io, IO_TURN)
        if io is last:
            return


cdef inline void server_resume(server_t* server) noexcept nogil:
    """A handler is free, or memory is: let the bodies that wait try again."""
    cdef caller_t* caller = server.oldest
    server.has_paused = False
    budget_wait(server.budget, &server.in_budget, False)
    while caller is not NULL:
        if caller.is_paused and caller.state == CALLER_BODY:
            caller.is_paused = False
            caller_set_deadline(caller, server.loop.now_ns + server.limits.stall_timeout_ns)
            caller_add_runnable(caller)
        caller = caller.next


cdef inline void server_run_returned(server_t* server) noexcept nogil:
    cdef io_t* io = loop_take_returned(&server.loop)
    cdef io_t* following
    cdef bint is_some = io is not NULL
    while io is not NULL:
        following = io.next_returned
        caller_returned(<caller_t*>io)
        io = following
    if load_int(&server.is_retiring) and swap_int(&server.is_retiring, 0):
        server_retire(server)
    if is_some and server.has_paused:
        server_resume(server)


cdef inline void server_check_deadlines(server_t* server) noexcept nogil:
    """End what is overdue and find the next deadline. Runs when one may have passed."""
    cdef caller_t* caller = server.oldest
    cdef caller_t* following
    server.loop.next_deadline_ns = 0
    if server.queue_check_ns:
        if server.loop.now_ns >= server.queue_check_ns:
            server_signal_handlers(server, True)
        else:
            server.loop.next_deadline_ns = server.queue_check_ns
    if load_int(&server.spares.state) != SPARE_NONE:
        server_check_spare(server, False)
    if server.accept_at_ns > 0:
        if server.loop.now_ns >= server.accept_at_ns:
            server_resume_accept(server)
        else:
            loop_look_at(&server.loop, server.accept_at_ns)
    while caller is not NULL:
        following = caller.next
        if caller.state == CALLER_HANDLED or caller.deadline_ns == 0:
            pass
        elif server.loop.now_ns < caller.deadline_ns:
            loop_look_at(&server.loop, caller.deadline_ns)
        elif caller.state == CALLER_LINGERING:
            caller_close(caller)
        elif caller.state == CALLER_ENDLESS:
            caller_send_byte(caller)
        elif caller.state == CALLER_BODY \
                or (caller.state == CALLER_ODD and caller.then == THEN_READ_BODY):
            count_add(&server.counts.body_timeouts, 1)
            caller_broken(caller)
        elif caller.state == CALLER_SHAKING:
            count_add(&server.counts.handshake_timeouts, 1)
            caller_close(caller)
        else:
            # Also what does not read its answer counts as idle.
            if caller.state == CALLER_WRITING or caller_is_idle(caller) and not caller.is_new:
                count_add(&server.counts.idle_timeouts, 1)
            else:
                count_add(&server.counts.head_timeouts, 1)
            caller_close(caller)
        caller = following


cdef inline void server_retire(server_t* server) noexcept nogil:
    """Have connections of earlier credentials end that are idle, once they are read to the end.

    The others end with the request they are at.
    """
    cdef caller_t* caller = server.oldest
    cdef caller_t* following
    while caller is not NULL:
        following = caller.next
        if caller_is_old(caller):
            if caller.state == CALLER_HEAD:
                caller_add_runnable(caller)
            elif caller.state == CALLER_ENDLESS:
                caller_close(caller)
        caller = following


cdef inline void server_begin_stop(server_t* server) noexcept nogil:
    """Free the ports and close every connection that has no request with a handler."""
    cdef caller_t* caller
    cdef caller_t* following
    cdef int i
    for i in range(server.n_listening):
        loop_remove(&server.loop, &server.listening[i].io)
        descriptors_shut(server.descriptors, server.listening[i].io.fd)
    server.n_listening = 0
    if server.inbox is not NULL:
        # What there is no room for is refused, and its connection closed.
        server_admit(server)
    caller = server.oldest
    while caller is not NULL:
        following = caller.next
        if caller.state != CALLER_HANDLED and caller.state != CALLER_WRITING:
            caller_close(caller)
        caller = following


cdef inline bint server_turn(server_t* server) noexcept nogil:
    """One turn of the loop, by the thread that leads; False once it has ended.

    Does not wait while requests for handlers are queued, but looks for what has come: a caller who
    sends ahead would otherwise be the only one read.
    """
    cdef int timeout_ms
    if not list_is_empty(&server.loop.returned):
        server.loop.now_ns = clock_ns()
        server_run_returned(server)
    loop_run_runnable(&server.loop)
    # Small requests come first: what has much to read waits until others have been looked at.
    server_run_bulk(server)
    server_free_buried(server)
    if load_int(&server.spares.state) == SPARE_NEW:
        server_check_spare(server, False)
    if load_int(&server.in_budget.has_news) and swap_int(&server.in_budget.has_news, 0):
        server_check_spare(server, budget_left(server.budget) < load_i64(&server.budget.spare))
        if server.has_paused:
            server_resume(server)
    if load_int(&server.reader.has_news) and swap_int(&server.reader.has_news, 0):
        server_admit(server)
    if server.in_budget.is_waiting and budget_left(server.budget) > 0:
        server_resume(server)
    if server.accept_at_ns > 0 and server.loop.now_ns >= server.accept_at_ns \
            and not server.has_begun_stop:
        server_resume_accept(server)
    if load_int(&server.is_stopping):
        if not server.has_begun_stop:
            server.has_begun_stop = True
            server_begin_stop(server)
            return True
        if server.oldest is NULL or load_int(&server.is_stopping) == 2:
            return False
    if server.handled > 0:
        # What is answered without waking us is to be idle from some time on.
        loop_look_at(&server.loop, server.loop.now_ns + server.limits.idle_timeout_ns)
    timeout_ms = 0
    # Consumers of the inbox are told when nothing more is there to be put in with it.
    if server.bulk.head is NULL and not server.has_queued and not server.reader.has_put:
        timeout_ms = loop_timeout_ms(&server.loop, 0)
    if timeout_ms != 0:
        # Who is to stop waits for nothing else.
        store_int(&server.wants_returned, server.has_paused or server.accept_at_ns != 0
                  or server.has_begun_stop)
        if not loop_may_sleep(&server.loop) \
                or load_int(&server.spares.state) == SPARE_NEW \
                or load_int(&server.in_budget.has_news) \
                or load_int(&server.reader.has_news) \
                or load_int(&server.is_retiring) \
                or (load_int(&server.is_stopping) and not server.has_begun_stop) \
                or load_int(&server.is_stopping) == 2:
            timeout_ms = 0
    loop_wait(&server.loop, timeout_ms)
    # Before the events: what was answered is idle again, and can make room for a caller.
    server_run_returned(server)
    loop_run_events(&server.loop)
    if server.loop.n_events <= 0 or reader_is_due(&server.reader):
        reader_show(server.inbox, &server.reader)
    if loop_is_due(&server.loop):
        server_check_deadlines(server)
    return True


cdef inline void server_end(server_t* server) noexcept nogil:
    """Let go of every connection; those a handler is at work on are freed when it gives them back.

    Their sockets are closed no sooner: a thread on its way to write an answer would write it to
    whoever has the descriptor by then.
    """
    cdef caller_t* caller = server.oldest
    cdef caller_t* following
    cdef io_t* io
    cdef io_t* next_io
    cdef body_t body
    cdef int i
    reader_show(server.inbox, &server.reader)
    pthread_mutex_lock(&server.lock)
    server.is_ended = True
    while caller is not NULL:
        following = caller.next
        if caller.conn.io.fd >= 0 and caller.state == CALLER_HANDLED:
            if not caller.has_tls:
                send(caller.conn.io.fd, server.answer_503, server.answer_503_len,
                     MSG_DONTWAIT | MSG_NOSIGNAL)
            shutdown(caller.conn.io.fd, SHUT_RDWR)
        caller.conn.io.is_runnable = False
        if caller.state != CALLER_HANDLED:
            caller_free(caller)
        caller = following
    caller = server.buried
    while caller is not NULL:
        following = caller.next
        caller.conn.io.is_runnable = False
        caller_free(caller)
        caller = following
    # Queued, and given back, but nobody will look at them any more.
    for i in range(QUEUES):
        caller = queue_take(&server.queues[i])
        while caller is not NULL:
            caller_free(caller)
            caller = queue_take(&server.queues[i])
    for i in range(LANES):
        caller = caller_of_turn(turns_take(&server.turns, i))
        while caller is not NULL:
            if server.inbox is not NULL:
                add_int(&server.inbox.waiting, -1)
            caller_free(caller)
            caller = caller_of_turn(turns_take(&server.turns, i))
    io = loop_take_returned(&server.loop)
    while io is not NULL:
        next_io = io.next_returned
        caller_free(<caller_t*>io)
        io = next_io
    while server.spares.n > 0:
        body = spares_take(&server.spares, server.budget, 0)
        body_free(&body)
    count_set(&server.counts.connections, 0)
    server.is_closed = True
    pthread_cond_broadcast(&server.handlers_queued)
    pthread_cond_broadcast(&server.odd_queued)
    pthread_cond_broadcast(&server.ended)
    pthread_mutex_unlock(&server.lock)


# -- making and ending, called from Python

cdef inline int server_init(server_t* server, const server_limits_t* limits,
                            descriptors_t* descriptors, budget_t* budget) noexcept nogil:
    """Make a server that neither listens nor runs yet; 0 or an errno."""
    cdef int error
    memset(server, 0, sizeof(server_t))
    server.limits = limits[0]
    server.descriptors = descriptors
    server.budget = budget
    loop_init(&server.loop)
    server.timerfd = -1
    if pthread_mutex_init(&server.lock, NULL) != 0 \
            or cond_init_monotonic(&server.handlers_queued) != 0 \
            or cond_init_monotonic(&server.odd_queued) != 0 \
            or cond_init_monotonic(&server.ended) != 0:
        return EAGAIN
    error = loop_open(&server.loop, descriptors)
    if error == 0:
        pthread_mutex_lock(&descriptors.lock)
        server.timerfd = descriptors_add(
            descriptors, timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC))
        if server.timerfd < 0:
            error = errno
        pthread_mutex_unlock(&descriptors.lock)
    if error != 0:
        server_free(server)
    return error


cdef inline void server_free(server_t* server) noexcept nogil:
    """Free a server whose thread has ended and whose connections are all given back."""
    cdef int i
    invariant(server.live == 0)
    for i in range(server.n_listening):
        descriptors_shut(server.descriptors, server.listening[i].io.fd)
    free(server.listening)
    heads_free(&server.heads)
    server_close_descriptors(server)
    free(server.answer_503)
    pthread_cond_destroy(&server.handlers_queued)
    pthread_cond_destroy(&server.odd_queued)
    pthread_cond_destroy(&server.ended)
    pthread_mutex_destroy(&server.lock)


cdef inline void server_listen(server_t* server, int fd, bint has_tls) noexcept nogil:
    """Take over a listening socket, before the start. There is room for it in ``listening``."""
    cdef listening_t* listening = &server.listening[server.n_listening]
    listening.io.fd = fd
    listening.server = server
    listening.has_tls = has_tls
    server.n_listening += 1


cdef inline void server_close_descriptors(server_t* server) noexcept nogil:
    budget_leave(server.budget, &server.in_budget)
    if server.inbox is not NULL:
        reader_leave(server.inbox, &server.reader)
    loop_close(&server.loop)
    if server.timerfd >= 0:
        descriptors_close(server.descriptors, server.timerfd)
    server.timerfd = -1


cdef inline void server_stop(server_t* server, int how) noexcept nogil:
    """Have the loop stop: 1 lets requests with handlers end, 2 does not wait for them."""
    store_int(&server.is_stopping, how)
    loop_wake(&server.loop)


cdef inline void server_retire_soon(server_t* server) noexcept nogil:
    """Have the loop, if it runs, end what was begun with the credentials there were."""
    add_int(&server.generation, 1)
    store_int(&server.is_retiring, 1)
    loop_wake(&server.loop)
