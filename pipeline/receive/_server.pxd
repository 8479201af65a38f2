"""The receiving loop: accepts, waits, and has connections read and answered, without the GIL.

Source: etcd rafthttp/http.go ``pipelineHandler``, on net/http. The mirror image of ``_loop.pxd``;
what both wait with is in ``_poll.pxd``, what is done with one connection in ``_requests.pxd``, and
who runs the loop in ``_lead.pxd``.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pipeline.net._budget cimport budget_leave, budget_left, budget_t, budget_wait
from pipeline.receive._conn cimport (
    ACCEPT_RETRY_NS, ACCEPT_STEP, CONN_BODY, CONN_HANDLED, CONN_LINGERING, CONN_ODD, CONN_WRITING,
    QUEUES, SERVER_EVENTS, SERVER_TURN_BYTES, THEN_HANDSHAKE, THEN_IDLE, THEN_READ_BODY,
    conn_add_runnable, conn_append, conn_set_deadline, conn_set_state, conn_t, runnable_t,
    server_check_spare, server_limits_t, server_t,
)
from pipeline.net._descriptors cimport (
    descriptors_add, descriptors_close, descriptors_shut, descriptors_t,
)
from pipeline.receive._heads cimport heads_free
from pipeline.net._memory cimport SPARE_NEW, SPARE_NONE, body_free, body_t, spares_take
from pipeline.net._poll cimport poll_is_due, poll_look_at, poll_timeout_ms, poll_wait
from pipeline.receive._queues cimport conn_free, queue_take, server_signal_handlers
from pipeline.receive._requests cimport (
    conn_broken, conn_close, conn_end, conn_is_idle, conn_ready, conn_returned,
)
from pipeline.net._sync cimport (
    CLOCK_MONOTONIC, EAGAIN, EFD_CLOEXEC, EFD_NONBLOCK, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPOLLET,
    EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, MSG_DONTWAIT,
    MSG_NOSIGNAL, SHUT_RDWR, SOCK_CLOEXEC, SOCK_NONBLOCK, TFD_CLOEXEC, accept4, clock_ns,
    cond_init_monotonic, count_add, count_set, epoll_create1, epoll_ctl, epoll_event, errno,
    eventfd, invariant, list_is_empty, list_take, load_i64, load_int, pthread_cond_broadcast,
    pthread_cond_destroy, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, send, shutdown, sockaddr, socklen_t, store_int, swap_int, timerfd_create,
    write,
)
from pipeline.receive._turns cimport LANES, turns_join, turns_take


cdef inline bint server_make_room(server_t* server) noexcept nogil:
    """Close the connection that can be spared best; False when none can.

    That is the oldest one in a TLS handshake, or else the one idle longest: whoever only says hello
    must not put those out who are through. While Python is at work on handshakes, one of which will
    be spared next, nobody else is.
    """
    cdef conn_t* conn = server.oldest
    cdef conn_t* spared = NULL
    cdef bint is_shaking = False
    while conn is not NULL:
        # What another thread has is not looked into.
        if conn.state == CONN_HANDLED:
            is_shaking = is_shaking or conn.is_shaking
        elif conn.is_sealed and conn.then == THEN_HANDSHAKE:
            if conn.state == CONN_ODD:
                spared = conn
                break
            is_shaking = True
        elif spared is NULL and conn_is_idle(conn):
            spared = conn
        conn = conn.next
    if spared is NULL or (conn is NULL and is_shaking):
        return False
    count_add(&server.counts.closed_for_room, 1)
    conn_close(spared)
    return True


cdef inline void server_pause_accept(server_t* server, int64_t until_ns) noexcept nogil:
    cdef int i
    for i in range(server.n_listening):
        epoll_ctl(server.poll.epfd, EPOLL_CTL_DEL, server.listening[i], NULL)
    server.accept_at_ns = until_ns
    count_add(&server.counts.accept_pauses, 1)
    if until_ns > 0:
        poll_look_at(&server.poll, until_ns)


cdef inline void server_resume_accept(server_t* server) noexcept nogil:
    cdef epoll_event event
    cdef int i
    server.accept_at_ns = 0
    event.events = EPOLLIN
    for i in range(server.n_listening):
        event.data.ptr = &server.listening[i]
        epoll_ctl(server.poll.epfd, EPOLL_CTL_ADD, server.listening[i], &event)


cdef inline void server_accept(server_t* server, int listening) noexcept nogil:
    """Accept what waits, within the limit of connections."""
    cdef conn_t* conn
    cdef epoll_event event
    cdef socklen_t size
    cdef int step, i, error
    cdef bint is_sealed = True
    for i in range(server.n_plain):
        if listening == server.listening[i]:
            is_sealed = False
    for step in range(ACCEPT_STEP):
        if server.counts.connections >= <uint64_t>server.limits.max_connections:
            if step > 0:
                return          # is there another? epoll will say so
            if not server_make_room(server):
                server_pause_accept(server, -1)     # until one closes or is idle
                return
        conn = <conn_t*>calloc(1, sizeof(conn_t))
        if conn is NULL:
            server_pause_accept(server, server.poll.now_ns + ACCEPT_RETRY_NS)
            return
        size = sizeof(conn.address)
        pthread_mutex_lock(&server.descriptors.lock)
        conn.fd = descriptors_add(server.descriptors, accept4(
            listening, <sockaddr*>&conn.address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC))
        error = errno
        pthread_mutex_unlock(&server.descriptors.lock)
        if conn.fd < 0:
            free(conn)
            if error == EAGAIN:
                return
            if error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM:
                if not server_make_room(server):
                    # The listener stays, and looks again in a while.
                    server_pause_accept(server, server.poll.now_ns + ACCEPT_RETRY_NS)
                return
            continue    # anything else was the end of the one connection (accept(2))
        conn.server = server
        server.next_id += 1
        conn.id = server.next_id
        conn.is_new = True
        pthread_mutex_lock(&server.lock)
        conn.member = turns_join(&server.turns, &conn.address)
        server.live += conn.member is not NULL
        pthread_mutex_unlock(&server.lock)
        if conn.member is NULL:
            descriptors_shut(server.descriptors, conn.fd)
            free(conn)
            continue
        count_add(&server.counts.accepted, 1)
        count_add(&server.counts.connections, 1)
        conn_append(conn)
        if is_sealed:
            conn.is_sealed = True
            conn_set_state(conn, CONN_ODD)
            conn.then = THEN_HANDSHAKE
            conn.head_deadline_ns = server.poll.now_ns + server.limits.handshake_timeout_ns
            conn_set_deadline(conn, conn.head_deadline_ns)
        else:
            # A connection that says nothing at all has no more time than a head.
            conn_set_deadline(conn, server.poll.now_ns + server.limits.head_timeout_ns)
        event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
        event.data.ptr = conn
        if epoll_ctl(server.poll.epfd, EPOLL_CTL_ADD, conn.fd, &event) != 0:
            conn_close(conn)


cdef inline void server_free_buried(server_t* server) noexcept nogil:
    """Free what was closed in this turn, but for what is still listed as runnable.

    No event is pending.
    """
    cdef conn_t* conn = server.buried
    cdef conn_t* following
    server.buried = NULL
    if conn is NULL:
        return
    pthread_mutex_lock(&server.lock)
    while conn is not NULL:
        following = conn.next
        if conn.is_runnable:
            conn.next = server.buried
            server.buried = conn
        else:
            conn_free(conn)
        conn = following
    pthread_mutex_unlock(&server.lock)


cdef inline void server_run(server_t* server, runnable_t* runnable, int64_t bulk) noexcept nogil:
    """Look at the connections that are runnable now, until ``bulk`` bytes have been read of them.

    Those left, and those that become so meanwhile, are for the next turn.
    """
    cdef conn_t* conn
    cdef conn_t* last = runnable.tail
    server.bulk_bytes = 0
    while runnable.head is not NULL and server.bulk_bytes < bulk:
        conn = runnable.head
        runnable.head = conn.next_runnable
        conn.is_runnable = False
        conn_ready(conn, EPOLLIN, True)
        if conn is last:
            return


cdef inline void server_resume(server_t* server) noexcept nogil:
    """A handler is free, or memory is: let the bodies that wait try again."""
    cdef conn_t* conn = server.oldest
    server.has_paused = False
    budget_wait(server.budget, &server.in_budget, False)
    while conn is not NULL:
        if conn.is_paused and conn.state == CONN_BODY:
            conn.is_paused = False
            conn_set_deadline(conn, server.poll.now_ns + server.limits.stall_timeout_ns)
            conn_add_runnable(conn)
        conn = conn.next


cdef inline void server_run_returned(server_t* server) noexcept nogil:
    cdef conn_t* conn = <conn_t*>list_take(&server.returned)
    cdef conn_t* following
    cdef bint is_some = conn is not NULL
    while conn is not NULL:
        following = conn.next_returned
        conn_returned(conn)
        conn = following
    if load_int(&server.is_retiring) and swap_int(&server.is_retiring, 0):
        server_retire(server)
    if is_some and server.has_paused:
        server_resume(server)


cdef inline void server_check_deadlines(server_t* server) noexcept nogil:
    """End what is overdue and find the next deadline. Runs when one may have passed."""
    cdef conn_t* conn = server.oldest
    cdef conn_t* following
    server.poll.next_deadline_ns = 0
    if server.queue_check_ns:
        if server.poll.now_ns >= server.queue_check_ns:
            server_signal_handlers(server, True)
        else:
            server.poll.next_deadline_ns = server.queue_check_ns
    if load_int(&server.spares.state) != SPARE_NONE:
        server_check_spare(server, False)
    if server.accept_at_ns > 0:
        if server.poll.now_ns >= server.accept_at_ns:
            server_resume_accept(server)
        else:
            poll_look_at(&server.poll, server.accept_at_ns)
    while conn is not NULL:
        following = conn.next
        if conn.state == CONN_HANDLED or conn.deadline_ns == 0:
            pass
        elif server.poll.now_ns < conn.deadline_ns:
            poll_look_at(&server.poll, conn.deadline_ns)
        elif conn.state == CONN_LINGERING:
            conn_close(conn)
        elif conn.state == CONN_BODY \
                or (conn.state == CONN_ODD and conn.then == THEN_READ_BODY):
            count_add(&server.counts.body_timeouts, 1)
            conn_broken(conn)
        elif conn.state == CONN_ODD and conn.then == THEN_HANDSHAKE:
            count_add(&server.counts.handshake_timeouts, 1)
            conn_close(conn)
        else:
            # Also what does not read its answer counts as idle.
            if conn.state == CONN_WRITING or conn_is_idle(conn) and not conn.is_new:
                count_add(&server.counts.idle_timeouts, 1)
            else:
                count_add(&server.counts.head_timeouts, 1)
            if conn.state == CONN_WRITING:
                conn_close(conn)
            else:
                conn_end(conn)
        conn = following


cdef inline void server_retire(server_t* server) noexcept nogil:
    """End the sealed connections that are idle; the others end with the request they are at."""
    cdef conn_t* conn = server.oldest
    cdef conn_t* following
    while conn is not NULL:
        following = conn.next
        if conn.state == CONN_ODD and conn.then == THEN_IDLE:
            conn_end(conn)
        conn = following


cdef inline void server_begin_stop(server_t* server) noexcept nogil:
    """Free the ports and close every connection that has no request with a handler."""
    cdef conn_t* conn = server.oldest
    cdef conn_t* following
    cdef int i
    for i in range(server.n_listening):
        epoll_ctl(server.poll.epfd, EPOLL_CTL_DEL, server.listening[i], NULL)    # see conn_close
        descriptors_shut(server.descriptors, server.listening[i])
    server.n_listening = 0
    while conn is not NULL:
        following = conn.next
        if conn.state != CONN_HANDLED and conn.state != CONN_WRITING:
            conn_end(conn)
        conn = following


cdef inline bint server_turn(server_t* server) noexcept nogil:
    """One turn of the loop, by the thread that leads; False once it has ended.

    Does not wait while requests for handlers are queued, but looks for what has come: a caller who
    sends ahead would otherwise be the only one read.
    """
    cdef epoll_event events[SERVER_EVENTS]
    cdef void* pointer
    cdef int n, i, timeout_ms
    if not list_is_empty(&server.returned):
        server.poll.now_ns = clock_ns()
        server_run_returned(server)
    server_run(server, &server.runnable, INT64_MAX)
    # Small requests come first: what has much to read waits until others have been looked at.
    server_run(server, &server.bulk, SERVER_TURN_BYTES)
    server_free_buried(server)
    if load_int(&server.spares.state) == SPARE_NEW:
        server_check_spare(server, False)
    if load_int(&server.in_budget.has_news) and swap_int(&server.in_budget.has_news, 0):
        server_check_spare(server, budget_left(server.budget) < load_i64(&server.budget.spare))
        if server.has_paused:
            server_resume(server)
    if server.in_budget.is_waiting and budget_left(server.budget) > 0:
        server_resume(server)
    if server.accept_at_ns > 0 and server.poll.now_ns >= server.accept_at_ns \
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
        poll_look_at(&server.poll, server.poll.now_ns + server.limits.idle_timeout_ns)
    timeout_ms = 0
    if server.runnable.head is NULL and server.bulk.head is NULL and not server.has_queued:
        timeout_ms = poll_timeout_ms(&server.poll, 0)
    if timeout_ms != 0:
        store_int(&server.wants_returned, server.has_paused or server.accept_at_ns != 0)
        store_int(&server.poll.is_sleeping, 1)
        if not list_is_empty(&server.returned) \
                or load_int(&server.spares.state) == SPARE_NEW \
                or load_int(&server.in_budget.has_news) \
                or (load_int(&server.is_stopping) and not server.has_begun_stop) \
                or load_int(&server.is_stopping) == 2:
            timeout_ms = 0
    n = poll_wait(&server.poll, events, SERVER_EVENTS, timeout_ms)
    # Before the events: what was answered is idle again, and can make room for a caller.
    server_run_returned(server)
    for i in range(n):
        pointer = events[i].data.ptr
        if pointer is NULL:
            continue
        if <void*>server.listening <= pointer \
                < <void*>(server.listening + server.n_listening):
            server_accept(server, (<int*>pointer)[0])
        else:
            conn_ready(<conn_t*>pointer, events[i].events, False)
    if poll_is_due(&server.poll):
        server_check_deadlines(server)
    return True


cdef inline void server_end(server_t* server) noexcept nogil:
    """Let go of every connection; those a handler is at work on are freed when it gives them back.

    Their sockets are closed no sooner: a thread on its way to write an answer would write it to
    whoever has the descriptor by then.
    """
    cdef conn_t* conn = server.oldest
    cdef conn_t* following
    cdef body_t body
    cdef int i
    pthread_mutex_lock(&server.lock)
    server.is_ended = True
    while conn is not NULL:
        following = conn.next
        if conn.fd >= 0 and conn.state == CONN_HANDLED:
            if not conn.is_sealed:
                send(conn.fd, server.answer_503, server.answer_503_len,
                     MSG_DONTWAIT | MSG_NOSIGNAL)
            shutdown(conn.fd, SHUT_RDWR)
        conn.is_runnable = False
        if conn.state != CONN_HANDLED:
            conn_free(conn)
        conn = following
    conn = server.buried
    while conn is not NULL:
        following = conn.next
        conn.is_runnable = False
        conn_free(conn)
        conn = following
    # Queued, and given back, but nobody will look at them any more.
    for i in range(QUEUES):
        conn = queue_take(&server.queues[i])
        while conn is not NULL:
            conn_free(conn)
            conn = queue_take(&server.queues[i])
    for i in range(LANES):
        conn = <conn_t*>turns_take(&server.turns, i)
        while conn is not NULL:
            conn_free(conn)
            conn = <conn_t*>turns_take(&server.turns, i)
    conn = <conn_t*>list_take(&server.returned)
    while conn is not NULL:
        following = conn.next_returned
        conn_free(conn)
        conn = following
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
    cdef epoll_event event
    cdef int error
    memset(server, 0, sizeof(server_t))
    server.limits = limits[0]
    server.descriptors = descriptors
    server.budget = budget
    server.poll.epfd = server.poll.wakefd = server.timerfd = -1
    if pthread_mutex_init(&server.lock, NULL) != 0 \
            or cond_init_monotonic(&server.handlers_queued) != 0 \
            or cond_init_monotonic(&server.odd_queued) != 0 \
            or cond_init_monotonic(&server.ended) != 0:
        return EAGAIN
    pthread_mutex_lock(&descriptors.lock)
    server.poll.epfd = descriptors_add(descriptors, epoll_create1(EPOLL_CLOEXEC))
    if server.poll.epfd >= 0:
        server.poll.wakefd = descriptors_add(descriptors, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
    if server.poll.wakefd >= 0:
        server.timerfd = descriptors_add(
            descriptors, timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC))
    error = errno
    pthread_mutex_unlock(&descriptors.lock)
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = NULL
    if server.timerfd >= 0:
        error = epoll_ctl(server.poll.epfd, EPOLL_CTL_ADD, server.poll.wakefd, &event)
        if error != 0:
            error = errno
    if error != 0:
        server_free(server)
    return error


cdef inline void server_free(server_t* server) noexcept nogil:
    """Free a server whose thread has ended and whose connections are all given back."""
    cdef int i
    invariant(server.live == 0)
    for i in range(server.n_listening):
        descriptors_shut(server.descriptors, server.listening[i])
    free(server.listening)
    heads_free(&server.heads)
    server_close_descriptors(server)
    free(server.answer_503)
    pthread_cond_destroy(&server.handlers_queued)
    pthread_cond_destroy(&server.odd_queued)
    pthread_cond_destroy(&server.ended)
    pthread_mutex_destroy(&server.lock)


cdef inline void server_close_descriptors(server_t* server) noexcept nogil:
    budget_leave(server.budget, &server.in_budget)
    if server.poll.epfd >= 0:
        descriptors_close(server.descriptors, server.poll.epfd)
    if server.poll.wakefd >= 0:
        descriptors_close(server.descriptors, server.poll.wakefd)
    if server.timerfd >= 0:
        descriptors_close(server.descriptors, server.timerfd)
    server.poll.epfd = server.poll.wakefd = server.timerfd = -1


cdef inline void server_stop(server_t* server, int how) noexcept nogil:
    """Have the loop stop: 1 lets requests with handlers end, 2 does not wait for them."""
    cdef uint64_t one = 1
    store_int(&server.is_stopping, how)
    write(server.poll.wakefd, &one, sizeof(one))


cdef inline void server_retire_soon(server_t* server) noexcept nogil:
    """Have the loop, if it runs, end the sealed connections that are idle."""
    cdef uint64_t one = 1
    pthread_mutex_lock(&server.lock)
    if not server.is_ended:         # or the descriptor may be another's
        store_int(&server.is_retiring, 1)
        write(server.poll.wakefd, &one, sizeof(one))
    pthread_mutex_unlock(&server.lock)
