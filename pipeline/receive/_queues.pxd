"""Requests that wait for a thread, and how a connection goes over to one and comes back.

A whole message waits in a lane of ``_turns.pxd`` for a handler thread; everything else in a queue
of the odd thread. The thread that takes a request has its connection, and gives it back through
``loop_return``; after the loop's end it frees the connection instead.
"""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memset

from pipeline.net._budget cimport BODY_SMALL, budget_add
from pipeline.receive._caller cimport (
    CALLER_HANDLED, ENTRIES_LARGE, REQUEST_CHECK, QUEUES, QUEUE_CHECK_NS, QUEUE_HANDSHAKES,
    QUEUE_MEMBERS, QUEUE_PROBES, QUEUE_STRANGERS, REQUEST_HANDSHAKE, REQUEST_LARGE,
    REQUEST_MALFORMED, REQUEST_MESSAGE, REQUEST_ODD, REQUEST_PROPOSAL, STRANGERS_PAUSE_NS,
    THEN_OFFER, THEN_REFUSED, THEN_TAKEN, THEN_TURN, caller_of_holder, caller_of_turn,
    caller_set_state, caller_t, handler_t, queue_t, request_t, server_t,
)
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.net._memory cimport body_free
from pipeline.net._loop cimport loop_look_at, loop_remove, loop_return, loop_wake
from pipeline._system cimport (
    clock_ns, invariant, load_int, pthread_cond_signal, pthread_mutex_lock, pthread_mutex_unlock,
)
from pipeline.receive._turns cimport (
    LANES, LANE_APPENDS, LANE_CONTROL, LANE_LARGE, LANE_PROPOSALS, turns_leave, turns_push,
    turns_take, turns_wait,
)
from pipeline.receive._inbox cimport holder_t
from pipeline.tls._engine cimport tls_free
from pipeline.tls._tls cimport tls_t
from pipeline.wire._raftpb cimport WIRE_OK, wire_decode, wire_decoded_t
from pipeline.wire._types cimport TYPE_APP, TYPE_PROP, TYPE_SNAP


cdef inline bint caller_is_probe(const caller_t* caller) noexcept nogil:
    """Tell whether what is for Python begins as a probe does: it is answered with next to nothing.

    Members probe over connections of their own, on which they say nothing else.
    """
    return caller.request.body.len >= 18 \
        and memcmp(caller.request.body.data, b"GET /raft/probing ", 18) == 0


cdef inline int message_lane(const wire_decoded_t* decoded) noexcept nogil:
    """Tell which lane a decoded message is of."""
    cdef int32_t type = decoded.message.type
    if type == TYPE_PROP:
        return LANE_PROPOSALS
    if decoded.end - decoded.input > BODY_SMALL or decoded.entries_len > ENTRIES_LARGE:
        return LANE_LARGE
    return LANE_APPENDS if type == TYPE_APP or type == TYPE_SNAP else LANE_CONTROL


cdef inline bint message_is_held(const wire_decoded_t* decoded) noexcept nogil:
    """Tell whether a message is answered only when the node has taken it from the inbox.

    The sender of a MsgProp is to know that it was not lost, and if a MsgSnap was, its follower
    would be left waiting. Whatever else is lost Raft sends again.
    """
    return decoded.message.type == TYPE_PROP or decoded.message.type == TYPE_SNAP


cdef inline int request_lane(const request_t* request) noexcept nogil:
    """Tell which lane a request waits in, for a handler thread or for room in the inbox."""
    if request.kind == REQUEST_LARGE:       # not decoded yet
        return LANE_LARGE
    return LANE_CONTROL if request.kind == REQUEST_MALFORMED else message_lane(&request.decoded)


cdef inline void caller_to_lane(caller_t* caller) noexcept nogil:
    """Let a whole message wait in its lane; nobody else looks at its connection meanwhile."""
    cdef server_t* server = caller.server
    pthread_mutex_lock(&server.lock)
    turns_push(&server.turns, caller.request.lane, caller.member, &caller.turn)
    pthread_mutex_unlock(&server.lock)


cdef inline void caller_leave_loop(caller_t* caller) noexcept nogil:
    """Somebody else has the connection from here on."""
    caller_set_state(caller, CALLER_HANDLED)
    caller.deadline_ns = 0
    caller.server.handled += 1


cdef inline void caller_to_handler(caller_t* caller, int kind) noexcept nogil:
    """Queue the connection's request; its thread has the connection from here on."""
    cdef server_t* server = caller.server
    cdef int which = QUEUE_MEMBERS
    cdef queue_t* queue
    caller_leave_loop(caller)
    caller.request.kind = kind
    caller.is_shaking = kind == REQUEST_HANDSHAKE
    if kind <= REQUEST_MALFORMED and server.inbox is NULL:
        caller.request.lane = request_lane(&caller.request)
        caller_to_lane(caller)
        server.has_queued = True    # server_signal_handlers, once for all of this turn
        return
    if kind == REQUEST_HANDSHAKE:
        which = QUEUE_HANDSHAKES
    elif kind <= REQUEST_MALFORMED or kind >= REQUEST_CHECK:
        pass                    # its head was accepted
    elif caller.is_odd and caller.then == THEN_TURN:
        which = QUEUE_STRANGERS
    elif not caller.is_member:
        which = QUEUE_PROBES if caller_is_probe(caller) else QUEUE_STRANGERS
    queue = &server.queues[which]
    caller.request.next = NULL
    pthread_mutex_lock(&server.lock)
    if queue.tail is NULL:
        queue.head = caller
    else:
        queue.tail.request.next = caller
    queue.tail = caller
    pthread_cond_signal(&server.odd_queued)
    pthread_mutex_unlock(&server.lock)


cdef inline caller_t* queue_take(queue_t* queue) noexcept nogil:
    """Take the oldest request, or NULL. The caller holds the lock."""
    cdef caller_t* caller = queue.head
    if caller is not NULL:
        queue.head = caller.request.next
        if queue.head is NULL:
            queue.tail = NULL
    return caller


cdef inline caller_t* server_take_odd(server_t* server) noexcept nogil:
    """Take what the odd thread does next, or NULL. The caller holds the lock.

    Between two turns of strangers it rests for as long as the first one took, if nobody else is to
    be served: it needs the GIL for each, and messages of members would wait for that.
    """
    cdef caller_t* caller = NULL
    cdef int i, which
    server.is_strangers_turn = False
    server.is_turn_of_members = not server.is_turn_of_members
    if server.is_turn_of_members:
        caller = queue_take(&server.queues[QUEUE_MEMBERS])
    for i in range(QUEUES - QUEUE_PROBES):
        if caller is not NULL:
            break
        which = QUEUE_PROBES + (server.next_other + i) % (QUEUES - QUEUE_PROBES)
        if which == QUEUE_STRANGERS and server.queues[which].head is not NULL:
            server.turn_began_ns = clock_ns()
            if server.turn_began_ns < server.strangers_at_ns:
                continue
            server.is_strangers_turn = True
        caller = queue_take(&server.queues[which])
        if caller is not NULL:
            server.next_other = (which - QUEUE_PROBES + 1) % (QUEUES - QUEUE_PROBES)
    return caller if caller is not NULL else queue_take(&server.queues[QUEUE_MEMBERS])


cdef inline bint server_may_take(const server_t* server, int lane) noexcept nogil:
    """Tell whether one more handler thread may be at work for a lane. The caller holds the lock.

    Proposals wait for a leader, and a leader is made of messages: one handler thread, if there is
    more than one, never takes a proposal (etcd has a queue of its own for them, spec section 4.3).
    Nor does one take what is large, lest heartbeats wait for it; while proposals wait, it may be
    the same one.
    """
    return lane <= LANE_APPENDS or server.limits.handlers == 1 \
        or server.at_work[lane] + 1 < server.limits.handlers


cdef inline caller_t* server_take(server_t* server, bint is_odd) noexcept nogil:
    """Take the next request for a thread of this kind, or NULL. The caller holds the lock."""
    cdef int lane, _step
    if is_odd:
        return server_take_odd(server)
    # In turn: no lane keeps another waiting.
    lane = server.next_lane
    for _step in range(LANES):
        if turns_wait(&server.turns, lane) and server_may_take(server, lane):
            server.at_work[lane] += 1
            server.next_lane = lane + 1 if lane + 1 < LANES else 0
            return caller_of_turn(turns_take(&server.turns, lane))
        lane = lane + 1 if lane + 1 < LANES else 0
    return NULL


cdef inline void server_leave_lane(server_t* server, int lane) noexcept nogil:
    """A handler thread is at work for a lane no more. The caller holds the lock."""
    server.at_work[lane] -= 1
    if lane > LANE_APPENDS and turns_wait(&server.turns, lane):
        pthread_cond_signal(&server.handlers_queued)


cdef inline void caller_decode(caller_t* caller) noexcept nogil:
    """Decode a whole body, and see what kind of request it is."""
    cdef request_t* request = &caller.request
    if wire_decode(request.body.data, request.body.len, &request.decoded) != WIRE_OK:
        request.kind = REQUEST_MALFORMED
    elif request.decoded.message.type == TYPE_PROP:
        request.kind = REQUEST_PROPOSAL
    else:
        request.kind = REQUEST_MESSAGE


cdef inline bint server_decode(server_t* server, caller_t* caller) noexcept nogil:
    """Decode what the calling handler thread has taken undecoded.

    False when that is a proposal, and as many threads as may be are at work on proposals: it waits
    in their lane, and the thread has it no more.
    """
    cdef bint is_taken
    caller_decode(caller)
    if caller.request.kind != REQUEST_PROPOSAL:
        return True
    pthread_mutex_lock(&server.lock)
    server_leave_lane(server, LANE_LARGE)
    caller.request.lane = LANE_PROPOSALS
    is_taken = server_may_take(server, LANE_PROPOSALS)
    if is_taken:
        server.at_work[LANE_PROPOSALS] += 1
    else:
        turns_push(&server.turns, LANE_PROPOSALS, caller.member, &caller.turn)
    pthread_mutex_unlock(&server.lock)
    return is_taken


cdef inline void server_add_handler(server_t* server, handler_t* handler) noexcept nogil:
    memset(handler, 0, sizeof(handler_t))
    pthread_mutex_lock(&server.lock)
    handler.next = server.handlers
    server.handlers = handler
    pthread_mutex_unlock(&server.lock)


cdef inline void server_remove_handler(server_t* server, handler_t* handler) noexcept nogil:
    cdef handler_t** link
    pthread_mutex_lock(&server.lock)
    link = &server.handlers
    while link[0] is not handler:
        link = &link[0].next
    link[0] = handler.next
    pthread_mutex_unlock(&server.lock)


cdef inline void server_signal_handlers(server_t* server, bint is_check) noexcept nogil:
    """Wake a handler thread for what is queued, unless one is awake to come to it.

    A wake-up and a hand-over of the GIL cost more than a small message, so one thread goes on
    from message to message. But ``process`` may block: while something is queued we look again
    every QUEUE_CHECK_NS, and count no more on a thread that has been on one request since. For the
    stand-in: a handler thread that leads takes what it has queued itself.
    """
    cdef handler_t* handler
    cdef bint is_queued = False, is_cared_for = False, is_any_waiting = False
    cdef int lane
    server.has_queued = False
    pthread_mutex_lock(&server.lock)
    for lane in range(LANES):
        if turns_wait(&server.turns, lane) and server_may_take(server, lane):
            is_queued = True
    handler = server.handlers
    while handler is not NULL:
        if handler.is_waiting:
            is_any_waiting = True
        else:
            if is_check:
                handler.is_stuck = handler.was_seen
                handler.was_seen = True
            if not handler.is_stuck:
                is_cared_for = True
        handler = handler.next
    if is_queued and is_any_waiting and not is_cared_for:
        pthread_cond_signal(&server.handlers_queued)
        server.has_signalled = True
    pthread_mutex_unlock(&server.lock)
    if not is_queued or not is_any_waiting:
        server.queue_check_ns = 0
    elif is_check or server.queue_check_ns == 0:
        server.queue_check_ns = server.loop.now_ns + QUEUE_CHECK_NS
        loop_look_at(&server.loop, server.queue_check_ns)


# -- back to the loop

cdef inline void caller_free(caller_t* caller) noexcept nogil:
    """Free a connection nobody refers to. The caller holds the lock."""
    cdef server_t* server = caller.server
    invariant((caller.conn.io.fd < 0 or server.is_ended) and not caller.conn.io.is_runnable)
    if caller.conn.io.fd >= 0:
        descriptors_shut(server.descriptors, caller.conn.io.fd)
    budget_add(server.budget, -caller.counted)
    body_free(&caller.request.body)
    free(caller.buffer)
    free(caller.known)
    free(caller.answer)
    tls_free(caller.conn.tls)
    turns_leave(&server.turns, caller.member)
    free(caller)
    server.live -= 1


cdef inline bint caller_give_back_locked(caller_t* caller, handler_t* handler) noexcept nogil:
    """Return a connection from a handler thread; when the loop has ended, free it here: False.

    The caller holds the lock.
    """
    cdef server_t* server = caller.server
    cdef bint is_urgent = not caller.is_answered or caller.buffer_len > 0
    if handler is not NULL:
        handler.was_seen = False
        handler.is_stuck = False
    elif server.is_strangers_turn:
        server.is_strangers_turn = False
        server.strangers_at_ns = clock_ns()
        server.strangers_at_ns += min(server.strangers_at_ns - server.turn_began_ns,
                                      <int64_t>STRANGERS_PAUSE_NS)
    if handler is not NULL:
        server_leave_lane(server, caller.request.lane)
    if server.is_ended:
        caller_free(caller)
        return False
    loop_return(&server.loop, &caller.conn.io)
    # An answered connection can wait until the loop wakes by itself, at the latest for its next
    # request. If that came while the connection was ours, the loop has noted so before it slept.
    if is_urgent or load_int(&server.wants_returned) or load_int(&caller.has_event):
        loop_wake(&server.loop)
    return True


cdef inline bint caller_give_back(caller_t* caller, handler_t* handler) noexcept nogil:
    cdef server_t* server = caller.server
    cdef bint is_taken
    pthread_mutex_lock(&server.lock)
    is_taken = caller_give_back_locked(caller, handler)
    pthread_mutex_unlock(&server.lock)
    return is_taken


cdef inline int server_detach(caller_t* caller, tls_t** tls) noexcept nogil:
    """Take socket and TLS of a connection that the calling thread holds; they are its own then.

    -1 and NULL when the loop has ended and shut it. The connection is still to be given back, with
    THEN_DETACH. An event for it may be under way to the loop, which only notes it.
    """
    cdef server_t* server = caller.server
    cdef int fd = -1
    tls[0] = NULL
    pthread_mutex_lock(&server.lock)    # server_end shuts the sockets of handled connections
    if not server.is_ended:
        fd = caller.conn.io.fd
        loop_remove(&server.loop, &caller.conn.io)
        caller.conn.io.fd = -1
        tls[0] = caller.conn.tls
        caller.conn.tls = NULL
    pthread_mutex_unlock(&server.lock)
    return fd


# -- with an inbox

cdef inline caller_t* server_take_beside(server_t* server) noexcept nogil:
    """Take what the odd thread does next, but what takes no GIL is done here; NULL when nothing is.

    The caller holds the lock, which is let go of meanwhile. To decode what is large takes as long
    as the loop may not.
    """
    cdef caller_t* caller = server_take(server, True)
    while caller is not NULL and caller.request.kind == REQUEST_LARGE \
            and server.inbox is not NULL:
        pthread_mutex_unlock(&server.lock)
        caller_decode(caller)
        caller.then = THEN_OFFER
        pthread_mutex_lock(&server.lock)
        caller_give_back_locked(caller, NULL)
        caller = server_take(server, True)
    return caller


cdef inline void caller_told(holder_t* holder, bint is_taken) noexcept nogil:
    """Have a connection answered whose message the node has taken, or which was dropped.

    Whoever calls has the inbox's lock, and the connection: the loop has left it to the inbox.
    """
    cdef caller_t* caller = caller_of_holder(holder)
    cdef server_t* server = caller.server
    caller.then = THEN_TAKEN if is_taken else THEN_REFUSED
    pthread_mutex_lock(&server.lock)
    if server.is_ended:
        caller_free(caller)
    else:
        loop_return(&server.loop, &caller.conn.io)
        loop_wake(&server.loop)
    pthread_mutex_unlock(&server.lock)
