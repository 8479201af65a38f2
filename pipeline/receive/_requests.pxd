"""The requests of one connection: how they are read, recognised and answered, by the loop.

Called by whoever runs the loop (``_server.pxd``), but for ``conn_answer_here``, which a handler
thread calls for the connection it has.
"""

from libc.stdint cimport int64_t, uint32_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

from pipeline.net._budget cimport BODY_SMALL, budget_add, budget_left, budget_wait
from pipeline.receive._conn cimport (
    ANSWER_204_MAX, CONN_BODY, CONN_CLOSED, CONN_HANDLED, CONN_HEAD, CONN_LINGERING, CONN_ODD,
    CONN_WRITING, LINGER_NS, REQUEST_BROKEN, REQUEST_END, REQUEST_GONE, REQUEST_LARGE, REQUEST_ODD,
    SERVER_SCRATCH, SERVER_STEP_BYTES, THEN_AGAIN, THEN_CLOSE, THEN_DELIVER, THEN_DETACH, THEN_FREE,
    THEN_HANDSHAKE, THEN_IDLE, THEN_NEXT, THEN_READ_BODY, THEN_TURN, answer_204_t,
    conn_add_runnable, conn_append, conn_is_bulk, conn_save, conn_set_deadline, conn_set_state,
    conn_t, conn_unlink, request_t, sealed_news_t, server_counts_t, server_knows, server_limits_t,
    server_reuse_body, server_t,
)
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.wire._http cimport (
    HTTP_ODD, HTTP_POST, http_post_t, http_recognise_post, http_same_post,
)
from pipeline.net._memory cimport body_free, body_grown, body_init, body_resident, body_t
from pipeline.net._loop cimport IO_TURN, io_t, loop_remove
from pipeline.receive._queues cimport conn_decode, conn_to_handler
from pipeline.net._sync cimport (
    EAGAIN, EINTR, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, MSG_DONTWAIT, MSG_NOSIGNAL,
    MSG_TRUNC, SHUT_WR, count_add, errno, format_http_date, invariant, load_int, recv, send,
    shutdown, store_int, time, time_t,
)


cdef inline void conn_count(conn_t* conn) noexcept nogil:
    """Count a body with what of it is memory now, unless it is a small one."""
    cdef int64_t more
    if conn.request.body.size > BODY_SMALL:
        more = body_resident(&conn.request.body) - conn.counted
        conn.counted += more
        if conn.state == CONN_BODY:
            conn.server.reading += more
        budget_add(conn.server.budget, more)


cdef inline void conn_leave_body(conn_t* conn) noexcept nogil:
    """A body is not being read any more, whatever becomes of it."""
    if conn.state == CONN_BODY:
        conn.server.reading -= conn.counted


cdef inline void conn_count_closed(conn_t* conn) noexcept nogil:
    """There is a connection less: another one can be accepted."""
    cdef server_t* server = conn.server
    count_add(&server.counts.connections, -1)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns


cdef inline void conn_close(conn_t* conn) noexcept nogil:
    """End a connection that the loop has. An odd one goes to Python once more."""
    cdef server_t* server = conn.server
    if conn.io.fd >= 0:
        loop_remove(&server.loop, &conn.io)
        descriptors_shut(server.descriptors, conn.io.fd)
        conn.io.fd = -1
        conn_leave_body(conn)
        conn_count_closed(conn)
    if conn.is_odd:
        conn_to_handler(conn, REQUEST_GONE)
        return
    conn_unlink(conn)
    conn_set_state(conn, CONN_CLOSED)
    conn.next = server.buried
    server.buried = conn


cdef inline void conn_end(conn_t* conn) noexcept nogil:
    """End a connection that the loop has; one that Python has deciphered says so to its peer."""
    if conn.is_sealed and conn.is_odd and conn.then != THEN_HANDSHAKE:
        conn_to_handler(conn, REQUEST_END)
    else:
        conn_close(conn)


cdef inline void conn_broken(conn_t* conn) noexcept nogil:
    """The body of a request will not come: Python counts it and answers 400."""
    conn_leave_body(conn)
    conn_to_handler(conn, REQUEST_BROKEN)


cdef inline void conn_hand_over(conn_t* conn, const uint8_t* data, size_t n) noexcept nogil:
    """Give bytes to Python; from here on the connection is odd."""
    cdef request_t* request = &conn.request
    if not body_init(&request.body, n):
        conn_close(conn)
        return
    memcpy(request.body.data, data, n)
    request.body.len = n
    if not conn.is_odd:
        conn.is_odd = True
        if not conn.is_sealed:
            count_add(&conn.server.counts.general_requests, 1)
    conn_save(conn, NULL, 0)
    conn_to_handler(conn, REQUEST_ODD)


cdef inline void conn_deliver(conn_t* conn) noexcept nogil:
    """A message is complete: queue it, decoded if that is done in no time."""
    cdef request_t* request = &conn.request
    if request.body.len > BODY_SMALL:
        request.kind = REQUEST_LARGE
    else:
        conn_decode(conn)
    conn_to_handler(conn, request.kind)


cdef inline void conn_parse(conn_t* conn, const uint8_t* data, size_t n) noexcept nogil:
    """Look at the bytes of a head, and what may follow it."""
    cdef server_t* server = conn.server
    cdef http_post_t post
    cdef size_t size, have
    cdef int verdict
    if conn.head_deadline_ns == 0:      # the head's time starts with its first byte
        conn.head_deadline_ns = server.loop.now_ns + server.limits.head_timeout_ns
    if conn.known is NULL \
            or not http_same_post(data, n, conn.known, &conn.known_post, &post):
        verdict = http_recognise_post(data, n, &post)
        if verdict == HTTP_ODD or (verdict != HTTP_POST and n > server.limits.max_head_bytes):
            conn_hand_over(conn, data, n)
            return
        if verdict != HTTP_POST:
            conn_set_deadline(conn, conn.head_deadline_ns)
            if not conn_save(conn, data, n):
                conn_close(conn)
            return
        if not server_knows(server, conn, data, n, &post):
            conn_hand_over(conn, data, n)
            return
    if post.head_len > server.limits.max_head_bytes \
            or post.content_length > server.limits.max_body_bytes:
        conn_hand_over(conn, data, n)
        return
    size = <size_t>post.content_length
    have = n - post.head_len
    if not server_reuse_body(server, &conn.request.body, size) \
            and not body_init(&conn.request.body, size):
        conn_close(conn)
        return
    if have >= size:
        memcpy(conn.request.body.data, data + post.head_len, size)
        conn.request.body.len = size
        if not conn_save(conn, data + post.head_len + size, have - size):
            conn_close(conn)
            return
        count_add(&server.counts.fast_requests, 1)
        conn_deliver(conn)
        return
    memcpy(conn.request.body.data, data + post.head_len, have)
    conn.request.body.len = have
    conn_save(conn, NULL, 0)
    conn_set_state(conn, CONN_BODY)
    conn_unlink(conn)           # in the order of their beginnings, for conn_must_wait
    conn_append(conn)
    conn_count(conn)
    conn_set_deadline(conn, server.loop.now_ns + server.limits.stall_timeout_ns)
    if conn_is_bulk(conn):
        conn_add_runnable(conn)
    else:
        conn_read_body(conn)


cdef inline bint conn_must_wait(conn_t* conn) noexcept nogil:
    """Tell whether a body is not to be read now: no handler is free, or too much is held.

    Small ones do not wait: they are heartbeats and votes, and as few as connections.
    However much is being read, the body that was begun first is read on, so that one always ends;
    but when as much waits for Raft, in proposals without a leader, or is held by others than this
    loop's reading, only they make room.
    """
    cdef server_t* server = conn.server
    cdef int64_t left
    cdef conn_t* first
    if conn.request.body.size <= BODY_SMALL:
        return False
    if load_int(&server.busy) >= server.limits.handlers:
        return True
    left = budget_left(server.budget)
    if left > 0:
        return False
    budget_wait(server.budget, &server.in_budget, True)
    if left + server.reading <= 0:
        return True
    first = server.oldest
    while first.state != CONN_BODY or first.request.body.size <= BODY_SMALL:
        first = first.next
    return first is not conn


cdef inline int64_t conn_body_time(const conn_t* conn, int64_t left_ns,
                                   int64_t n) noexcept nogil:
    """Return for how long more of a body is waited for, ``n`` bytes having come in time.

    That is what was left and what ``n`` bytes may take at the least rate, at most a stall; without
    a least rate, whatever comes is worth a whole stall. So a body may stop for a while and may be
    slow, but one that drips is ended.
    """
    cdef const server_limits_t* limits = &conn.server.limits
    left_ns += n * limits.byte_ns
    if left_ns > limits.stall_timeout_ns or (limits.byte_ns == 0 and n > 0):
        return limits.stall_timeout_ns
    return left_ns


cdef inline void conn_body_arrived(conn_t* conn, ssize_t n) noexcept nogil:
    """Put off the deadline of a body of which ``n`` bytes have come."""
    cdef server_t* server = conn.server
    cdef int64_t left_ns = server.limits.stall_timeout_ns
    if conn.deadline_ns != 0:
        left_ns = conn.deadline_ns - server.loop.now_ns
    conn_set_deadline(conn, server.loop.now_ns + conn_body_time(conn, left_ns, n))


cdef inline void conn_credit_body(conn_t* conn) noexcept nogil:
    """Do the same for a body that Python reads, when it gives the connection back."""
    cdef int64_t left_ns = conn.server.limits.stall_timeout_ns
    if conn.body_left_ns != 0:
        left_ns = conn.body_left_ns
    conn.body_left_ns = conn_body_time(conn, left_ns, conn.arrived)
    conn.arrived = 0


cdef inline void conn_read_body(conn_t* conn) noexcept nogil:
    """Read a body into its memory: what there is, or one step."""
    cdef server_t* server = conn.server
    cdef body_t* body = &conn.request.body
    cdef size_t budget = SERVER_STEP_BYTES, room
    cdef ssize_t n
    while body.len < body.size:
        if conn_must_wait(conn):
            conn.is_paused = True
            conn.deadline_ns = 0        # it is we who wait
            server.has_paused = True
            count_add(&server.counts.body_pauses, 1)
            return
        room = body.size - body.len
        if room > budget:
            room = budget
        n = recv(conn.io.fd, body.data + body.len, room, MSG_DONTWAIT)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                return
            n = 0
        if n == 0:
            conn_broken(conn)
            return
        body.len += <size_t>n
        server.bulk_bytes += n
        budget -= <size_t>n
        conn_body_arrived(conn, n)
        body_grown(body)
        conn_count(conn)
        if budget == 0 and body.len < body.size:
            conn_add_runnable(conn)
            return
    # What comes behind the body may have arrived with it, and epoll will not say so again.
    store_int(&conn.has_event, True)
    conn_leave_body(conn)
    count_add(&server.counts.fast_requests, 1)
    conn_deliver(conn)


cdef inline void conn_skip(conn_t* conn, size_t n) noexcept nogil:
    """Throw away what is left of a refused request, of ``n`` bytes in the scratch."""
    cdef server_t* server = conn.server
    if n < conn.skip:
        conn.skip -= n
        return
    n -= <size_t>conn.skip
    if n > 0:
        memmove(server.scratch, server.scratch + conn.skip, n)
    conn.skip = 0
    conn_set_deadline(conn, server.loop.now_ns + server.limits.idle_timeout_ns)
    if n > 0:
        conn_parse(conn, server.scratch, n)


cdef inline void conn_read(conn_t* conn) noexcept nogil:
    """Read a head, or bytes for Python."""
    cdef server_t* server = conn.server
    cdef size_t kept = conn.buffer_len
    cdef ssize_t n
    if kept > 0:
        memcpy(server.scratch, conn.buffer, kept)
    while True:
        n = recv(conn.io.fd, server.scratch + kept, SERVER_SCRATCH - kept, MSG_DONTWAIT)
        if n >= 0 or errno != EINTR:
            break
    if n < 0 and errno == EAGAIN:
        return
    if n <= 0:
        if conn.state == CONN_ODD and conn.then == THEN_READ_BODY:
            conn_broken(conn)
        else:
            if conn.is_sealed and conn.is_odd and conn.then == THEN_HANDSHAKE:
                count_add(&server.counts.handshake_failures, 1)
            conn_close(conn)
        return
    if conn.is_sealed and conn.head_deadline_ns == 0:
        conn.head_deadline_ns = server.loop.now_ns + server.limits.head_timeout_ns
    if kept + <size_t>n == SERVER_SCRATCH:
        conn_add_runnable(conn)         # there may be more, and epoll will not say so again
    if conn.state == CONN_ODD:
        if conn.then == THEN_READ_BODY:
            # The time Python takes is not the sender's. What of it was body, Python says.
            conn.body_left_ns = max(conn.deadline_ns - server.loop.now_ns, 1)
        conn_hand_over(conn, server.scratch, kept + <size_t>n)
    elif conn.skip > 0:
        conn_skip(conn, <size_t>n)
    else:
        conn_parse(conn, server.scratch, kept + <size_t>n)


cdef inline void conn_next(conn_t* conn) noexcept nogil:
    """A request is answered: go on with what has been read, or be idle."""
    cdef server_t* server = conn.server
    cdef size_t kept = conn.buffer_len
    invariant(kept <= SERVER_SCRATCH)
    conn_unlink(conn)
    conn_append(conn)
    if load_int(&server.is_stopping):
        conn_close(conn)
        return
    conn_set_state(conn, CONN_HEAD)
    conn.is_new = False
    conn.head_deadline_ns = 0
    conn.body_left_ns = 0
    conn_set_deadline(conn, server.loop.now_ns + server.limits.idle_timeout_ns)
    if conn.skip > 0:           # as long as a head may take
        conn_set_deadline(conn, server.loop.now_ns + server.limits.head_timeout_ns)
    if kept == 0 and server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns     # an idle connection can make room
    if kept > 0:
        memcpy(server.scratch, conn.buffer, kept)
        conn.buffer_len = 0
        conn_parse(conn, server.scratch, kept)
    if conn.has_event and (conn.state == CONN_HEAD or conn.state == CONN_BODY):
        conn_add_runnable(conn)


cdef inline void conn_idle(conn_t* conn) noexcept nogil:
    """A sealed connection has answered and waits for the next request."""
    cdef server_t* server = conn.server
    conn_unlink(conn)
    conn_append(conn)
    conn_set_state(conn, CONN_ODD)
    conn.is_new = False
    conn.head_deadline_ns = 0
    conn.body_left_ns = 0
    conn_set_deadline(conn, server.loop.now_ns + server.limits.idle_timeout_ns)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns     # an idle connection can make room
    if conn.has_event:
        conn_add_runnable(conn)


cdef inline void conn_linger(conn_t* conn) noexcept nogil:
    """End our side, and wait a moment for the other to do so."""
    conn_set_state(conn, CONN_LINGERING)
    if load_int(&conn.server.is_stopping) or shutdown(conn.io.fd, SHUT_WR) != 0:
        conn_close(conn)
        return
    conn_set_deadline(conn, conn.server.loop.now_ns + LINGER_NS)
    conn_add_runnable(conn)


cdef inline void conn_discard(conn_t* conn) noexcept nogil:
    """Throw away one step of what a refused peer still sends; of TCP it is not even copied."""
    cdef server_t* server = conn.server
    cdef ssize_t n
    cdef int _step
    for _step in range(SERVER_STEP_BYTES // SERVER_SCRATCH):
        n = recv(conn.io.fd, server.scratch, SERVER_SCRATCH, MSG_DONTWAIT | MSG_TRUNC)
        if n <= 0:
            if n == 0 or (errno != EAGAIN and errno != EINTR):
                conn_close(conn)
            return
        server.bulk_bytes += n
    conn_add_runnable(conn)


cdef inline void conn_written(conn_t* conn) noexcept nogil:
    """The answer is out: do what Python wanted next."""
    free(conn.answer)
    conn.answer = NULL
    conn.answer_len = conn.answer_at = 0
    if conn.then == THEN_CLOSE:
        conn.is_odd = False
        conn_linger(conn)
    elif conn.then == THEN_NEXT:
        conn.is_odd = False
        conn_next(conn)
    elif load_int(&conn.server.is_stopping):
        conn_end(conn)
    elif conn.then == THEN_TURN:
        conn_credit_body(conn)
        conn_to_handler(conn, REQUEST_ODD)
    elif conn.then == THEN_AGAIN:
        conn.head_deadline_ns = 0
        conn.body_left_ns = 0
        conn_to_handler(conn, REQUEST_ODD)
    elif conn.then == THEN_IDLE:
        conn_idle(conn)
    else:
        conn_set_state(conn, CONN_ODD)
        if conn.then == THEN_READ_BODY:
            conn_credit_body(conn)
            conn_set_deadline(conn, conn.server.loop.now_ns + conn.body_left_ns)
        else:
            if conn.head_deadline_ns == 0:
                conn.head_deadline_ns = conn.server.loop.now_ns + conn.server.limits.head_timeout_ns
            conn_set_deadline(conn, conn.head_deadline_ns)
            if conn.then == THEN_HANDSHAKE and conn.server.accept_at_ns < 0:
                conn.server.accept_at_ns = conn.server.loop.now_ns   # it can be spared
        if conn.has_event:
            conn_add_runnable(conn)


cdef inline void conn_write(conn_t* conn) noexcept nogil:
    """Write the answer, or what is left of it."""
    cdef ssize_t n
    cdef uint8_t* data = conn.answer
    while conn.answer_at < conn.answer_len:
        n = send(conn.io.fd, data + conn.answer_at, conn.answer_len - conn.answer_at,
                 MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                conn_set_state(conn, CONN_WRITING)
                conn_set_deadline(
                    conn, conn.server.loop.now_ns + conn.server.limits.stall_timeout_ns)
                return
            conn_close(conn)
            return
        conn.answer_at += <size_t>n
    conn_written(conn)


cdef inline void answer_204_date(answer_204_t* answer) noexcept nogil:
    """Keep the Date of a 204 up to date (RFC 9110 6.6.1)."""
    cdef time_t now = time(NULL)
    cdef size_t at = answer.fixed
    if now == answer.second:
        return
    answer.second = now
    at += format_http_date(<char*>answer.data + at, ANSWER_204_MAX - at, now)
    memcpy(answer.data + at, b"\r\n\r\n", 4)
    answer.len = at + 4


cdef inline bint conn_send_204(conn_t* conn, answer_204_t* answer) noexcept nogil:
    """Write a 204, and keep what the socket does not take; False when the connection is lost."""
    cdef ssize_t n
    answer_204_date(answer)
    n = send(conn.io.fd, answer.data, answer.len, MSG_DONTWAIT | MSG_NOSIGNAL)
    if n == <ssize_t>answer.len:
        conn.is_answered = True
        return True
    if n < 0 and errno != EAGAIN and errno != EINTR:
        return False
    conn.answer = <uint8_t*>malloc(answer.len)
    if conn.answer is NULL:
        return False
    memcpy(conn.answer, answer.data, answer.len)
    conn.answer_len = answer.len
    conn.answer_at = <size_t>n if n > 0 else 0
    return True


cdef inline void conn_answer_here(conn_t* conn, answer_204_t* answer) noexcept nogil:
    """Answer in the handler thread, unless the loop is awake: to wake it would cost as much."""
    cdef server_t* server = conn.server
    if conn.answer is NULL and conn.then == THEN_NEXT and not conn.is_odd \
            and (load_int(&server.loop.is_sleeping) or not load_int(&server.is_led)) \
            and not conn_send_204(conn, answer):
        conn.then = THEN_CLOSE


cdef inline void conn_hear_news(conn_t* conn) noexcept nogil:
    """Count what Python has done on a sealed connection."""
    cdef server_counts_t* counts = &conn.server.counts
    count_add(&counts.fast_requests, conn.news.fast_requests)
    count_add(&counts.general_requests, conn.news.general_requests)
    count_add(&counts.handshakes, conn.news.handshakes)
    count_add(&counts.handshake_failures, conn.news.handshake_failures)
    memset(&conn.news, 0, sizeof(sealed_news_t))


cdef inline void conn_returned(conn_t* conn) noexcept nogil:
    """Go on with a connection a handler thread gives back."""
    conn.server.handled -= 1
    if conn.is_sealed:
        conn_hear_news(conn)
    if conn.then == THEN_DELIVER:
        conn.head_deadline_ns = 0
        conn_count(conn)
        conn_deliver(conn)
        return
    body_free(&conn.request.body)
    if conn.counted > 0:
        budget_add(conn.server.budget, -conn.counted)
        conn.counted = 0
    if conn.is_answered:
        conn.is_answered = False
    elif conn.then == THEN_FREE:
        conn.is_odd = False
        conn_close(conn)
        return
    elif conn.then == THEN_DETACH:
        conn_count_closed(conn)
        conn.is_odd = False
        conn_close(conn)
        return
    elif conn.answer is NULL and conn.then == THEN_NEXT and not conn.is_odd:
        if not conn_send_204(conn, &conn.server.answer_204):
            conn_close(conn)
            return
        conn.is_answered = False
    conn_write(conn)


cdef inline void conn_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Act on what epoll says, or, when the connection was runnable, as if there were bytes.

    What there may be much of waits for its turn.
    """
    cdef conn_t* conn = <conn_t*>io
    cdef bint is_its_turn = flags == IO_TURN
    if is_its_turn:
        flags = EPOLLIN
    if conn.state == CONN_CLOSED:
        return
    # Told of once, maybe long before all that was sent ahead of it is read.
    if flags & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        conn.has_ended = True
    if conn.state == CONN_HANDLED or conn.state == CONN_WRITING:
        if flags & ~EPOLLOUT:
            store_int(&conn.has_event, True)    # a handler thread may be reading it
        if conn.state == CONN_WRITING and flags & EPOLLOUT:
            conn_write(conn)
        return
    if not flags & ~EPOLLOUT:
        return
    if not is_its_turn and conn_is_bulk(conn):
        conn_add_runnable(conn)
        return
    store_int(&conn.has_event, conn.has_ended)  # a thread that has given it back may still look
    if conn.state == CONN_BODY:
        conn_read_body(conn)
    elif conn.state == CONN_LINGERING:
        conn_discard(conn)
    else:
        conn_read(conn)
    if conn.has_event and (conn.state == CONN_HEAD or conn.state == CONN_ODD):
        conn_add_runnable(conn)


cdef inline bint conn_is_idle(const conn_t* conn) noexcept nogil:
    """Tell whether nothing of a request has come. A TLS handshake that has begun is one."""
    if conn.state == CONN_ODD:
        return conn.is_sealed and (conn.then == THEN_IDLE or not conn.is_odd)
    return conn.state == CONN_HEAD and conn.buffer_len == 0 and conn.io.fd >= 0
