"""The requests of one connection: how they are read, recognised and answered, by the loop.

Called by whoever runs the loop (``_server.pxd``), but for ``caller_answer_here``, which a handler
thread calls for the connection it has.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from pipeline.net._budget cimport BODY_SMALL, budget_add, budget_left, budget_wait
from pipeline.receive._caller cimport (
    ANSWER_204_MAX, CALLER_BODY, CALLER_CLOSED, CALLER_HANDLED, CALLER_HEAD, CALLER_LINGERING,
    CALLER_ENDLESS, CALLER_ODD, CALLER_SHAKING, CALLER_WRITING, ENDLESS_NS, ENDLESS_TICK_NS,
    LINGER_NS, REQUEST_BROKEN, REQUEST_GONE, REQUEST_CHECK, REQUEST_HANDSHAKE, REQUEST_LARGE,
    REQUEST_MALFORMED, REQUEST_MESSAGE, REQUEST_ODD, REQUEST_PROPOSAL, REQUEST_REFUSED,
    REQUEST_TAKEN, SERVER_SCRATCH, SERVER_STEP_BYTES, THEN_CLOSE, THEN_DELIVER, THEN_DETACH,
    THEN_ENDLESS, THEN_FREE, THEN_NEXT, THEN_OFFER, THEN_READ_BODY, THEN_REFUSED, THEN_SHAKE,
    THEN_SHAKEN, THEN_TAKEN, THEN_TURN, answer_204_t, caller_add_runnable, caller_append,
    caller_is_bulk, caller_is_old, caller_of_turn, caller_save, caller_set_deadline,
    caller_set_state, caller_t, caller_unlink, request_t, server_knows, server_limits_t,
    server_reuse_body, server_t,
)
from pipeline.net._conn cimport (
    conn_end, conn_has_more, conn_has_part, conn_is_unread, conn_recv, conn_send,
)
from pipeline.tls._engine cimport tls_free
from pipeline.tls._tls cimport tls_end
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.wire._http cimport (
    HTTP_ODD, HTTP_POST, http_post_t, http_recognise_post, http_same_post,
)
from pipeline.wire._types cimport TYPE_PROP
from pipeline.net._memory cimport body_free, body_grown, body_init, body_resident, body_t
from pipeline.net._loop cimport IO_TURN, io_t, loop_remove
from pipeline.receive._inbox cimport INBOX_CLOSED, INBOX_FULL, INBOX_TAKEN_IN, inbox_put
from pipeline.receive._queues cimport (
    caller_decode, caller_leave_loop, caller_to_handler, caller_to_lane, caller_told,
    message_is_held, request_lane,
)
from pipeline.receive._turns cimport LANES, turns_next, turns_take, turns_wait
from pipeline._system cimport (
    EAGAIN, EINTR, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, MSG_DONTWAIT, MSG_PEEK,
    MSG_TRUNC, add_int, count_add, errno, format_http_date, invariant, load_int, pthread_mutex_lock,
    pthread_mutex_unlock, recv, store_int, time, time_t,
)


cdef inline void caller_count(caller_t* caller) noexcept nogil:
    """Count a body with what of it is memory now, unless it is a small one."""
    cdef int64_t more
    if caller.request.body.size > BODY_SMALL:
        more = body_resident(&caller.request.body) - caller.counted
        caller.counted += more
        if caller.state == CALLER_BODY:
            caller.server.reading += more
        budget_add(caller.server.budget, more)


cdef inline void caller_discount(caller_t* caller) noexcept nogil:
    """Count its body no more."""
    if caller.counted > 0:
        budget_add(caller.server.budget, -caller.counted)
        caller.counted = 0


cdef inline void caller_leave_body(caller_t* caller) noexcept nogil:
    """A body is not being read any more, whatever becomes of it."""
    if caller.state == CALLER_BODY:
        caller.server.reading -= caller.counted


cdef inline void caller_count_closed(caller_t* caller) noexcept nogil:
    """There is a connection less: another one can be accepted."""
    cdef server_t* server = caller.server
    count_add(&server.counts.connections, -1)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns


cdef inline void caller_close(caller_t* caller) noexcept nogil:
    """End a connection that the loop has. If Python keeps something of it, it goes there once more.

    TLS says goodbye, unless it is in the middle of an answer.
    """
    cdef server_t* server = caller.server
    if caller.conn.io.fd >= 0:
        loop_remove(&server.loop, &caller.conn.io)
        if caller.conn.tls is not NULL and caller.answer is NULL:
            tls_end(caller.conn.tls)
        descriptors_shut(server.descriptors, caller.conn.io.fd)
        caller.conn.io.fd = -1
        tls_free(caller.conn.tls)       # which knows the descriptor
        caller.conn.tls = NULL
        caller_leave_body(caller)
        caller_count_closed(caller)
    if caller.is_odd or caller.is_bound:
        caller_to_handler(caller, REQUEST_GONE)
        return
    caller_unlink(caller)
    caller_set_state(caller, CALLER_CLOSED)
    caller.next = server.buried
    server.buried = caller


cdef inline void caller_broken(caller_t* caller) noexcept nogil:
    """The body of a request will not come: Python counts it and answers 400."""
    caller_leave_body(caller)
    caller_to_handler(caller, REQUEST_BROKEN)


cdef inline void caller_hand_over(caller_t* caller, const uint8_t* data, size_t n) noexcept nogil:
    """Give bytes to Python; from here on the connection is odd."""
    cdef request_t* request = &caller.request
    if not body_init(&request.body, n):
        caller_close(caller)
        return
    memcpy(request.body.data, data, n)
    request.body.len = n
    if not caller.is_odd:
        caller.is_odd = True
        count_add(&caller.server.counts.general_requests, 1)
    caller_save(caller, NULL, 0)
    caller_to_handler(caller, REQUEST_ODD)


cdef inline void caller_deliver(caller_t* caller) noexcept nogil:
    """A message is complete: hand it on, decoded if that is done in no time."""
    cdef request_t* request = &caller.request
    if request.body.len > BODY_SMALL:
        request.kind = REQUEST_LARGE
    else:
        caller_decode(caller)
        if caller.server.inbox is not NULL:
            caller_offer(caller)
            return
    caller_to_handler(caller, request.kind)


# -- with an inbox

cdef inline void caller_offer(caller_t* caller) noexcept nogil:
    """Put a decoded message into the inbox, or let it wait for room there.

    What is no message for the node is Python's, and so is whether a sender is let past that has
    shown a certificate.
    """
    cdef server_t* server = caller.server
    cdef request_t* request = &caller.request
    cdef int32_t type = request.decoded.message.type
    cdef int result = INBOX_FULL
    if request.kind == REQUEST_MALFORMED or type < 0 \
            or not server.delivered >> min(type, 63) & 1:
        caller_to_handler(caller, request.kind)
        return
    if caller.is_bound and not caller.is_checked and not caller.is_odd:
        caller_to_handler(caller, REQUEST_CHECK)
        return
    caller.is_checked = False
    request.kind = REQUEST_PROPOSAL if type == TYPE_PROP else REQUEST_MESSAGE
    request.lane = request_lane(request)
    caller_leave_loop(caller)
    # Who came before it goes in before it.
    if not turns_wait(&server.turns, request.lane):
        result = caller_put(caller)
    if result == INBOX_FULL:
        add_int(&server.inbox.waiting, 1)
        caller_to_lane(caller)
    else:
        caller_settle(caller, result)


cdef inline int caller_put(caller_t* caller) noexcept nogil:
    """Put a message that nobody else has into the inbox: INBOX_FULL, or something to settle.

    From here on others may have told what became of it, but it is the loop that hears of that.
    """
    cdef server_t* server = caller.server
    cdef request_t* request = &caller.request
    cdef int result
    caller.holder.tell = caller_told
    result = inbox_put(server.inbox, server.source, &server.reader, request.lane, &request.body,
                       &request.decoded,
                       &caller.holder if message_is_held(&request.decoded) else NULL)
    if result == INBOX_FULL and load_int(&server.is_stopping):
        return INBOX_CLOSED             # it is not waited for
    return result


cdef inline void caller_settle(caller_t* caller, int result) noexcept nogil:
    """Answer a message by what ``caller_put`` has returned, unless it is held."""
    caller_discount(caller)
    if result == INBOX_TAKEN_IN and message_is_held(&caller.request.decoded):
        return
    caller.server.handled -= 1
    if result == INBOX_TAKEN_IN:
        caller_taken(caller)
    else:
        body_free(&caller.request.body)
        caller_refuse(caller)


cdef inline void server_admit(server_t* server) noexcept nogil:
    """There may be room in the inbox: let in what waits, as long as there is.

    What there is no room for keeps its turn. If it went to the end, whoever is next each time that
    there is none would never be let in.
    """
    cdef caller_t* caller
    cdef int lane, result
    for lane in range(LANES):
        while turns_wait(&server.turns, lane):
            # With an inbox the turns are the loop's own, but for who comes and goes.
            caller = caller_of_turn(turns_next(&server.turns, lane))
            result = caller_put(caller)
            if result == INBOX_FULL:
                break
            pthread_mutex_lock(&server.lock)
            turns_take(&server.turns, lane)
            pthread_mutex_unlock(&server.lock)
            add_int(&server.inbox.waiting, -1)
            caller_settle(caller, result)


cdef inline void caller_taken(caller_t* caller) noexcept nogil:
    """Answer a message that is in the inbox, or that the node has taken from there."""
    if caller.is_odd or caller_is_old(caller):
        caller_to_handler(caller, REQUEST_TAKEN)
        return
    caller.then = THEN_NEXT
    caller_answer(caller)


cdef inline void caller_refuse(caller_t* caller) noexcept nogil:
    """Answer a message that will not be taken."""
    cdef server_t* server = caller.server
    if caller.is_odd:
        caller_to_handler(caller, REQUEST_REFUSED)
        return
    caller.then = THEN_CLOSE
    caller.answer = <uint8_t*>malloc(server.answer_503_len)
    if caller.answer is NULL:
        caller_close(caller)
        return
    memcpy(caller.answer, server.answer_503, server.answer_503_len)
    caller.answer_len = server.answer_503_len
    caller.answer_at = 0
    caller_write(caller)


cdef inline void caller_parse(caller_t* caller, const uint8_t* data, size_t n) noexcept nogil:
    """Look at the bytes of a head, and what may follow it."""
    cdef server_t* server = caller.server
    cdef http_post_t post
    cdef size_t size, have
    cdef int verdict
    if caller.head_deadline_ns == 0:      # the head's time starts with its first byte
        caller.head_deadline_ns = server.loop.now_ns + server.limits.head_timeout_ns
    if caller.known is NULL \
            or not http_same_post(data, n, caller.known, &caller.known_post, &post):
        verdict = http_recognise_post(data, n, &post)
        if verdict == HTTP_ODD or (verdict != HTTP_POST and n > server.limits.max_head_bytes):
            caller_hand_over(caller, data, n)
            return
        if verdict != HTTP_POST:
            caller_set_deadline(caller, caller.head_deadline_ns)
            if not caller_save(caller, data, n):
                caller_close(caller)
            return
        if not server_knows(server, caller, data, n, &post):
            caller_hand_over(caller, data, n)
            return
    if post.head_len > server.limits.max_head_bytes \
            or post.content_length > server.limits.max_body_bytes:
        caller_hand_over(caller, data, n)
        return
    size = <size_t>post.content_length
    have = n - post.head_len
    if not server_reuse_body(server, &caller.request.body, size) \
            and not body_init(&caller.request.body, size):
        caller_close(caller)
        return
    if have >= size:
        memcpy(caller.request.body.data, data + post.head_len, size)
        caller.request.body.len = size
        if not caller_save(caller, data + post.head_len + size, have - size):
            caller_close(caller)
            return
        count_add(&server.counts.fast_requests, 1)
        caller_deliver(caller)
        return
    memcpy(caller.request.body.data, data + post.head_len, have)
    caller.request.body.len = have
    caller_save(caller, NULL, 0)
    caller_set_state(caller, CALLER_BODY)
    caller_unlink(caller)           # in the order of their beginnings, for caller_must_wait
    caller_append(caller)
    caller_count(caller)
    caller_set_deadline(caller, server.loop.now_ns + server.limits.stall_timeout_ns)
    if caller_is_bulk(caller):
        caller_add_runnable(caller)
    else:
        caller_read_body(caller)


cdef inline bint caller_must_wait(caller_t* caller) noexcept nogil:
    """Tell whether a body is not to be read now: no handler is free, or too much is held.

    Small ones do not wait: they are heartbeats and votes, and as few as connections.
    However much is being read, the body that was begun first is read on, so that one always ends;
    but when as much waits for Raft, in proposals without a leader, or is held by others than this
    loop's reading, only they make room.
    """
    cdef server_t* server = caller.server
    cdef int64_t left
    cdef caller_t* first
    if caller.request.body.size <= BODY_SMALL:
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
    while first.state != CALLER_BODY or first.request.body.size <= BODY_SMALL:
        first = first.next
    return first is not caller


cdef inline int64_t caller_body_time(const caller_t* caller, int64_t left_ns,
                                     int64_t n) noexcept nogil:
    """Return for how long more of a body is waited for, ``n`` bytes having come in time.

    That is what was left and what ``n`` bytes may take at the least rate, at most a stall; without
    a least rate, whatever comes is worth a whole stall. So a body may stop for a while and may be
    slow, but one that drips is ended.
    """
    cdef const server_limits_t* limits = &caller.server.limits
    left_ns += n * limits.byte_ns
    if left_ns > limits.stall_timeout_ns or (limits.byte_ns == 0 and n > 0):
        return limits.stall_timeout_ns
    return left_ns


cdef inline void caller_body_arrived(caller_t* caller, ssize_t n) noexcept nogil:
    """Put off the deadline of a body of which ``n`` bytes have come."""
    cdef server_t* server = caller.server
    cdef int64_t left_ns = server.limits.stall_timeout_ns
    if caller.deadline_ns != 0:
        left_ns = caller.deadline_ns - server.loop.now_ns
    caller_set_deadline(caller, server.loop.now_ns + caller_body_time(caller, left_ns, n))


cdef inline void caller_credit_body(caller_t* caller) noexcept nogil:
    """Do the same for a body that Python reads, when it gives the connection back."""
    cdef int64_t left_ns = caller.server.limits.stall_timeout_ns
    if caller.body_left_ns != 0:
        left_ns = caller.body_left_ns
    caller.body_left_ns = caller_body_time(caller, left_ns, caller.arrived)
    caller.arrived = 0


cdef inline void caller_read_body(caller_t* caller) noexcept nogil:
    """Read a body into its memory: what there is, or one step."""
    cdef server_t* server = caller.server
    cdef body_t* body = &caller.request.body
    cdef size_t budget = SERVER_STEP_BYTES, room
    cdef ssize_t n
    cdef bint is_turn_over
    while body.len < body.size:
        if caller_must_wait(caller):
            caller.is_paused = True
            caller.deadline_ns = 0        # it is we who wait
            server.has_paused = True
            count_add(&server.counts.body_pauses, 1)
            return
        room = body.size - body.len
        if room > budget:
            room = budget
        n = conn_recv(&caller.conn, body.data + body.len, room)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                if conn_is_unread(&caller.conn):
                    caller_add_runnable(caller)
                return
            n = 0
        if n == 0:
            caller_broken(caller)
            return
        body.len += <size_t>n
        server.bulk_bytes += n
        budget -= <size_t>n
        caller_body_arrived(caller, n)
        body_grown(body)
        caller_count(caller)
        # TLS gives less than was asked for when it comes in small pieces, each of which takes time.
        is_turn_over = <size_t>n < room and conn_has_more(&caller.conn, <size_t>n, room)
        if (budget == 0 or is_turn_over) and body.len < body.size:
            caller_add_runnable(caller)
            return
    # What comes behind the body may have arrived with it, and epoll will not say so again.
    store_int(&caller.has_event, True)
    caller_leave_body(caller)
    count_add(&server.counts.fast_requests, 1)
    caller_deliver(caller)


cdef inline void caller_skip(caller_t* caller, size_t n) noexcept nogil:
    """Throw away what is left of a refused request, of ``n`` bytes in the scratch."""
    cdef server_t* server = caller.server
    if n < caller.skip:
        caller.skip -= n
        return
    n -= <size_t>caller.skip
    if n > 0:
        memmove(server.scratch, server.scratch + caller.skip, n)
    caller.skip = 0
    caller_set_deadline(caller, server.loop.now_ns + server.limits.idle_timeout_ns)
    if n > 0:
        caller_parse(caller, server.scratch, n)


cdef inline void caller_read_nothing(caller_t* caller) noexcept nogil:
    """Nothing has come that can be read: what TLS has to say of that."""
    cdef server_t* server = caller.server
    if conn_is_unread(&caller.conn):
        caller_add_runnable(caller)
    if caller.state != CALLER_HEAD or caller.buffer_len > 0 or caller.skip > 0:
        return
    if conn_has_part(&caller.conn):         # of a record, and so of a head
        if caller.head_deadline_ns == 0:
            caller.head_deadline_ns = server.loop.now_ns + server.limits.head_timeout_ns
            caller_set_deadline(caller, caller.head_deadline_ns)
    elif caller_is_old(caller):
        caller_close(caller)
    elif caller.head_deadline_ns != 0:      # the record was TLS's own: it is idle as before
        caller.head_deadline_ns = 0
        caller_set_deadline(caller, caller.idle_deadline_ns)


cdef inline void caller_read(caller_t* caller) noexcept nogil:
    """Read a head, or bytes for Python."""
    cdef server_t* server = caller.server
    cdef size_t kept = caller.buffer_len
    cdef ssize_t n
    if kept > 0:
        memcpy(server.scratch, caller.buffer, kept)
    while True:
        n = conn_recv(&caller.conn, server.scratch + kept, SERVER_SCRATCH - kept)
        if n >= 0 or errno != EINTR:
            break
    if n < 0 and errno == EAGAIN:
        caller_read_nothing(caller)
        return
    if n <= 0:
        if caller.state == CALLER_ODD and caller.then == THEN_READ_BODY:
            caller_broken(caller)
        else:
            caller_close(caller)
        return
    if conn_has_more(&caller.conn, <size_t>n, SERVER_SCRATCH - kept):
        caller_add_runnable(caller)         # there may be more, and epoll will not say so again
    if caller.state == CALLER_ODD:
        if caller.then == THEN_READ_BODY:
            # The time Python takes is not the sender's. What of it was body, Python says.
            caller.body_left_ns = max(caller.deadline_ns - server.loop.now_ns, 1)
        caller_hand_over(caller, server.scratch, kept + <size_t>n)
    elif caller.skip > 0:
        caller_skip(caller, <size_t>n)
    else:
        caller_parse(caller, server.scratch, kept + <size_t>n)


cdef inline void caller_next(caller_t* caller) noexcept nogil:
    """A request is answered: be idle, or go on with what has been read in the next turn."""
    cdef server_t* server = caller.server
    cdef size_t kept = caller.buffer_len
    invariant(kept <= SERVER_SCRATCH)
    caller_unlink(caller)
    caller_append(caller)
    if load_int(&server.is_stopping):
        caller_close(caller)
        return
    caller_set_state(caller, CALLER_HEAD)
    caller.is_new = False
    caller.head_deadline_ns = 0
    caller.body_left_ns = 0
    caller.idle_deadline_ns = server.loop.now_ns + server.limits.idle_timeout_ns
    caller_set_deadline(caller, caller.idle_deadline_ns)
    if caller.skip > 0:           # as long as a head may take
        caller_set_deadline(caller, server.loop.now_ns + server.limits.head_timeout_ns)
    if kept == 0 and server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns     # an idle connection can make room
    if caller_is_old(caller):
        store_int(&caller.has_event, True)   # to be read until there is nothing
    # Not here: it may be answered at once, and so may what comes behind it.
    caller.has_ahead = kept > 0
    if caller.has_event or caller.has_ahead:
        caller_add_runnable(caller)


cdef inline void caller_read_ahead(caller_t* caller) noexcept nogil:
    """Look at what has been read already, behind the last request."""
    cdef server_t* server = caller.server
    cdef size_t kept = caller.buffer_len
    caller.has_ahead = False
    memcpy(server.scratch, caller.buffer, kept)
    caller.buffer_len = 0
    store_int(&caller.has_event, True)      # there may be more to read
    caller_parse(caller, server.scratch, kept)


# -- handshakes

cdef inline void caller_shake(caller_t* caller) noexcept nogil:
    """Have a handshake begun, or gone on with, if something has come for it or there is room."""
    cdef uint8_t byte
    # TLS reads the socket itself.
    cdef ssize_t n = recv(caller.conn.io.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
    if n < 0 and (errno == EAGAIN or errno == EINTR):
        if caller.conn.tls is not NULL and caller.conn.tls.wants_to_write:
            caller_to_handler(caller, REQUEST_HANDSHAKE)
        return
    if n > 0:
        caller_to_handler(caller, REQUEST_HANDSHAKE)
        return
    # As a load balancer does to see whether we are there, if nothing has come at all.
    if caller.conn.tls is not NULL:
        count_add(&caller.server.counts.handshake_failures, 1)
    caller_close(caller)


cdef inline void caller_shake_on(caller_t* caller) noexcept nogil:
    """Wait for what the handshake goes on with."""
    cdef server_t* server = caller.server
    caller_set_state(caller, CALLER_SHAKING)
    caller_set_deadline(caller, caller.head_deadline_ns)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns     # it can be spared
    if caller.has_event:
        caller_add_runnable(caller)


cdef inline void caller_shaken(caller_t* caller) noexcept nogil:
    """The handshake is over: what has come behind it may have been read with it."""
    count_add(&caller.server.counts.handshakes, 1)
    store_int(&caller.has_event, True)
    caller_next(caller)


# -- answers

cdef inline void caller_linger(caller_t* caller) noexcept nogil:
    """End our side, and wait a moment for the other to do so."""
    caller_set_state(caller, CALLER_LINGERING)
    if load_int(&caller.server.is_stopping) or not conn_end(&caller.conn):
        caller_close(caller)
        return
    caller_set_deadline(caller, caller.server.loop.now_ns + LINGER_NS)
    caller_add_runnable(caller)


cdef inline void caller_await_byte(caller_t* caller) noexcept nogil:
    """Set the time of the next byte of an answer that does not end."""
    cdef int64_t at_ns = caller.server.loop.now_ns + ENDLESS_NS
    caller_set_deadline(caller, at_ns - at_ns % ENDLESS_TICK_NS)


cdef inline void caller_answer_on(caller_t* caller) noexcept nogil:
    """What there is of an answer that does not end is out: wait, while the caller does.

    The connection is spared as an idle one is, and closed when its credentials are replaced.
    """
    cdef server_t* server = caller.server
    if caller_is_old(caller) or caller.buffer_len > 0 or caller.has_ended:
        caller_close(caller)
        return
    caller_set_state(caller, CALLER_ENDLESS)
    caller_unlink(caller)
    caller_append(caller)
    caller_await_byte(caller)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.loop.now_ns     # it can make room
    if caller.has_event:
        caller_add_runnable(caller)


cdef inline void caller_send_byte(caller_t* caller) noexcept nogil:
    """Send one more byte of an answer that does not end: a chunk of a blank line."""
    cdef const char* chunk = b"1\r\n\n\r\n"
    if conn_send(&caller.conn, chunk, 6) != 6:      # whoever has no room for that reads nothing
        caller_close(caller)
        return
    caller_await_byte(caller)


cdef inline void caller_hear(caller_t* caller) noexcept nogil:
    """See whether a caller has gone whose answer does not end. It has nothing more to say."""
    cdef server_t* server = caller.server
    cdef ssize_t n = conn_recv(&caller.conn, server.scratch, SERVER_SCRATCH)
    if n < 0 and (errno == EAGAIN or errno == EINTR) and not caller.has_ended:
        if conn_is_unread(&caller.conn):
            caller_add_runnable(caller)
        return
    caller_close(caller)


cdef inline void caller_discard(caller_t* caller) noexcept nogil:
    """Throw away one step of what a refused peer still sends, which is neither copied nor
    decrypted.
    """
    cdef server_t* server = caller.server
    cdef ssize_t n
    cdef int _step
    for _step in range(SERVER_STEP_BYTES // SERVER_SCRATCH):
        n = recv(caller.conn.io.fd, server.scratch, SERVER_SCRATCH, MSG_DONTWAIT | MSG_TRUNC)
        if n <= 0:
            if n == 0 or (errno != EAGAIN and errno != EINTR):
                caller_close(caller)
            return
        server.bulk_bytes += n
    caller_add_runnable(caller)


cdef inline void caller_written(caller_t* caller) noexcept nogil:
    """The answer is out: do what Python wanted next."""
    free(caller.answer)
    caller.answer = NULL
    caller.answer_len = caller.answer_at = 0
    if caller.then == THEN_CLOSE:
        caller.is_odd = False
        caller_linger(caller)
    elif caller.then == THEN_NEXT:
        caller.is_odd = False
        caller_next(caller)
    elif load_int(&caller.server.is_stopping):
        caller_close(caller)
    elif caller.then == THEN_ENDLESS:
        caller.is_odd = False
        caller_answer_on(caller)
    elif caller.then == THEN_TURN:
        caller_credit_body(caller)
        caller_to_handler(caller, REQUEST_ODD)
    elif caller.then == THEN_SHAKE:
        caller_shake_on(caller)
    elif caller.then == THEN_SHAKEN:
        caller_shaken(caller)
    else:
        caller_set_state(caller, CALLER_ODD)
        if caller.then == THEN_READ_BODY:
            caller_credit_body(caller)
            caller_set_deadline(caller, caller.server.loop.now_ns + caller.body_left_ns)
        else:
            if caller.head_deadline_ns == 0:
                caller.head_deadline_ns = \
                    caller.server.loop.now_ns + caller.server.limits.head_timeout_ns
            caller_set_deadline(caller, caller.head_deadline_ns)
        if caller.has_event:
            caller_add_runnable(caller)


cdef inline void caller_write(caller_t* caller) noexcept nogil:
    """Write the answer, or what is left of it."""
    cdef ssize_t n
    cdef uint8_t* data = caller.answer
    while caller.answer_at < caller.answer_len:
        n = conn_send(&caller.conn, data + caller.answer_at, caller.answer_len - caller.answer_at)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                caller_set_state(caller, CALLER_WRITING)
                caller_set_deadline(
                    caller, caller.server.loop.now_ns + caller.server.limits.stall_timeout_ns)
                return
            caller_close(caller)
            return
        caller.answer_at += <size_t>n
    caller_written(caller)


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


cdef inline bint caller_send_204(caller_t* caller, answer_204_t* answer) noexcept nogil:
    """Write a 204, and keep what the socket does not take; False when the connection is lost."""
    cdef ssize_t n
    answer_204_date(answer)
    n = conn_send(&caller.conn, answer.data, answer.len)
    if n == <ssize_t>answer.len:
        caller.is_answered = True
        return True
    if n < 0 and errno != EAGAIN and errno != EINTR:
        return False
    caller.answer = <uint8_t*>malloc(answer.len)
    if caller.answer is NULL:
        return False
    memcpy(caller.answer, answer.data, answer.len)
    caller.answer_len = answer.len
    caller.answer_at = <size_t>n if n > 0 else 0
    return True


cdef inline void caller_answer_here(caller_t* caller, answer_204_t* answer) noexcept nogil:
    """Answer in the handler thread, unless the loop is awake: to wake it would cost as much."""
    cdef server_t* server = caller.server
    if caller.answer is NULL and caller.then == THEN_NEXT and not caller.is_odd \
            and (load_int(&server.loop.is_sleeping) or not load_int(&server.is_led)) \
            and not caller_send_204(caller, answer):
        caller.then = THEN_CLOSE


cdef inline void caller_returned(caller_t* caller) noexcept nogil:
    """Go on with a connection a handler thread gives back."""
    caller.server.handled -= 1
    if caller.request.kind == REQUEST_HANDSHAKE and caller.then == THEN_CLOSE:
        count_add(&caller.server.counts.handshake_failures, 1)
    if caller.then == THEN_DELIVER:
        caller.head_deadline_ns = 0
        caller_count(caller)
        caller_deliver(caller)
        return
    if caller.then == THEN_OFFER:
        caller_offer(caller)
        return
    body_free(&caller.request.body)
    caller_discount(caller)
    if caller.then == THEN_TAKEN:
        caller_taken(caller)
        return
    if caller.then == THEN_REFUSED:
        caller_refuse(caller)
        return
    if caller.then == THEN_FREE:
        caller.is_odd = caller.is_bound = False
        caller_close(caller)
        return
    elif caller.then == THEN_DETACH:
        caller_count_closed(caller)
        caller.is_odd = False
        caller_close(caller)
        return
    caller_answer(caller)


cdef inline void caller_answer(caller_t* caller) noexcept nogil:
    """Write what a request is answered with: a 204, if Python has left nothing else."""
    if caller.answer is NULL and caller.then == THEN_NEXT and not caller.is_odd \
            and not caller.is_answered:
        if not caller_send_204(caller, &caller.server.answer_204):
            caller_close(caller)
            return
    caller.is_answered = False
    caller_write(caller)


cdef inline void caller_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Act on what epoll says, or, when the connection was runnable, as if there were bytes.

    What there may be much of waits for its turn.
    """
    cdef caller_t* caller = <caller_t*>io
    cdef bint is_its_turn = flags == IO_TURN
    if is_its_turn:
        flags = EPOLLIN
    if caller.state == CALLER_CLOSED:
        return
    # Told of once, maybe long before all that was sent ahead of it is read.
    if flags & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        caller.has_ended = True
    if caller.state == CALLER_HANDLED or caller.state == CALLER_WRITING:
        if flags & ~EPOLLOUT or caller.is_shaking:
            store_int(&caller.has_event, True)    # a handler thread may be reading it
        if caller.state == CALLER_WRITING and flags & EPOLLOUT:
            caller_write(caller)
        return
    if caller.state == CALLER_SHAKING:      # also when there is room: it may have much to write
        store_int(&caller.has_event, False)
        caller_shake(caller)
        return
    if not flags & ~EPOLLOUT:
        return
    if not is_its_turn and caller_is_bulk(caller):
        caller_add_runnable(caller)
        return
    store_int(&caller.has_event, caller.has_ended)  # a thread that has given it back may still look
    if caller.state == CALLER_BODY:
        caller_read_body(caller)
    elif caller.state == CALLER_LINGERING:
        caller_discard(caller)
    elif caller.state == CALLER_ENDLESS:
        caller_hear(caller)
    elif caller.has_ahead:
        caller_read_ahead(caller)
        if caller.state == CALLER_BODY:
            caller_add_runnable(caller)
    else:
        caller_read(caller)
    if caller.has_event and (caller.state == CALLER_HEAD or caller.state == CALLER_ODD):
        caller_add_runnable(caller)


cdef inline bint caller_is_idle(const caller_t* caller) noexcept nogil:
    """Tell whether nothing of a request has come, or all there ever will."""
    if caller.state == CALLER_ENDLESS:
        return True
    return caller.state == CALLER_HEAD and caller.head_deadline_ns == 0 \
        and not caller.has_ahead and caller.conn.io.fd >= 0
