"""A connection that was accepted: its memory, its requests, and how it is read and answered.

What runs all connections is in ``_server.pxd``. A connection belongs to the loop, or, with a
request, to a handler thread; it goes over through the request queue and comes back through
``returned``.

What the loop knows is one kind of request (``http_recognise_post``) whose head, but for its length,
Python has accepted before. Everything else is *general*: the loop reads bytes and hands them over,
Python makes sense of them (``general.py``) and says what to write and how to go on. A connection
of an https listener is *sealed*: general from its first byte to its last, for the bytes that the
loop reads and writes mean nothing to it (``sealed.py``).

Memory grows with the bytes that arrived. A large body is read into address space reserved for it
(an untouched page is no memory), which then becomes the message's own; nothing is copied again.
The last ones that were freed are kept for a moment and used again.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from pipeline._budget cimport (
    BODY_SMALL, budget_add, budget_left, budget_loop_t, budget_t, budget_wait,
)
from pipeline._descriptors cimport descriptors_shut, descriptors_t
from pipeline._http cimport HTTP_ODD, HTTP_POST, http_post_t, http_recognise_post, http_same_post
from pipeline._sync cimport (
    EAGAIN, EINTR, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CTL_DEL, MADV_HUGEPAGE,
    MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MSG_DONTWAIT,
    MSG_NOSIGNAL, MSG_TRUNC, PROT_READ, PROT_WRITE, SHUT_WR, add_i64, clock_ns, count_add,
    epoll_ctl, errno, format_http_date, invariant, list_push, load_i64, load_int, madvise, mmap,
    munmap, pthread_cond_signal, pthread_cond_t, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_trylock, pthread_mutex_unlock, pthread_t, recv, send, shutdown, sockaddr_storage,
    store_int, swap_int, time, time_t, write,
)
from pipeline._turns cimport (
    LANES, LANE_LARGE, LANE_MESSAGES, LANE_PROPOSALS, host_join, member_t, turn_t, turns_leave,
    turns_push, turns_t, turns_take, turns_wait,
)
from pipeline._wire cimport WIRE_OK, wire_decode, wire_decoded_t

cdef enum:
    SERVER_EVENTS = 256
    # Read at once; a request that fits is decoded from a copy of its own size.
    SERVER_SCRATCH = 64 * 1024
    # Bytes of a large body read per connection and turn; see LOOP_STEP_BYTES.
    SERVER_STEP_BYTES = 1 << 20
    # Bytes of all large bodies read, or thrown away, before others are looked at again: a
    # millisecond.
    SERVER_TURN_BYTES = 4 << 20
    # A message with more entries takes a handler thread longer than it takes the loop to read one:
    # about as long as 64 KiB of entries that are not empty.
    ENTRIES_LARGE = 1024
    # From here on a body is mapped, so that its memory can be handed on and given back whole.
    BODY_MAPPED_MIN = 1 << 20
    # Once this much of a body has arrived, its pages are asked for in large pieces: 64 MiB is
    # 32 faults instead of 16,384. A body costs at most one such piece more than has arrived.
    BODY_HUGE_MIN = 2 << 20
    BODY_HUGE_PAGE = 2 << 20
    # The memory of the last large bodies is kept this long, to be used again: the kernel clears
    # each fresh page, which costs as much as to read what goes into it. As many as a peer has
    # connections for them, and 64 MiB and their framing in all.
    SPARES = 4
    SPARE_MAX = 65 << 20
    SPARE_NS = 2000000000
    HEADS_MAX = 64
    ACCEPT_STEP = 64
    ACCEPT_RETRY_NS = 100000000
    # How long a queued request may wait for a handler thread that is awake already.
    QUEUE_CHECK_NS = 1000000
    # How long what a refused peer still sends is read and thrown away, so that it reads the
    # answer before it hears of the end (RFC 9112 9.6).
    LINGER_NS = 1000000000
    # A turn of strangers that took longer is followed by no longer a pause than this.
    STRANGERS_PAUSE_NS = 5000000
    ANSWER_204_MAX = 256

cdef enum:
    CONN_HEAD = 0           # reads a head; idle while nothing of one has arrived
    CONN_BODY               # reads the body of a recognised request
    CONN_GENERAL            # reads for Python
    CONN_HANDLED            # a handler thread has it: hands off
    CONN_WRITING            # writes an answer
    CONN_LINGERING          # has answered and ended; reads to throw away
    CONN_CLOSED             # buried: freed at the end of the turn

# The first four may block and go to the handler threads; the others to the general thread.
cdef enum:
    REQUEST_MESSAGE = 0     # decoded
    REQUEST_PROPOSAL        # the same, a MsgProp, which waits for a leader
    REQUEST_LARGE           # a whole body, which the handler thread decodes
    REQUEST_MALFORMED       # a whole body that is no message; decoded.error says why
    REQUEST_BROKEN          # the body of a request did not come
    REQUEST_GENERAL         # bytes for Python
    REQUEST_GONE            # a general connection has ended; Python forgets it
    REQUEST_END             # a sealed connection is to be ended in good order

# Of the general thread. What handler threads do waits in the lanes of ``_turns.pxd``.
cdef enum:
    # Who was let past last time has every second turn, and whoever asks for
    # nothing else is given it; the others, of whom a flood may come, share the rest.
    QUEUE_GENERAL = 0       # of members: a certificate was shown, or the last request let past
    QUEUE_PROBES            # of others, that begin as a probe does
    QUEUE_STRANGERS         # of all others, and of those whose bytes take more than a turn
    QUEUE_HANDSHAKES
    QUEUES
    TYPE_PROP = 2

cdef enum:
    SPARE_NONE = 0
    SPARE_NEW               # the leader does not know of it yet
    SPARE_KNOWN             # the leader will look at it in time

# How Python wants a connection to go on.
cdef enum:
    THEN_NEXT = 0           # the request is answered: read the next one
    THEN_CLOSE
    THEN_READ_HEAD          # general: read on, within the time of a head
    THEN_READ_BODY          # general: read on, as long as bytes come
    THEN_DELIVER            # general: a whole body to be decoded and processed
    THEN_DETACH             # general: Python has the socket now (server_detach)
    THEN_FREE               # forgotten
    THEN_HANDSHAKE          # sealed: read on, within the time of a handshake
    THEN_IDLE               # sealed: answered, nothing is left; read the next request
    THEN_AGAIN              # sealed: write this, then call again for what is left
    THEN_TURN               # general: as AGAIN, of the same request; strangers have a turn before

# The memory of one body. Handed on to Python when a message keeps views of it.
cdef struct body_t:
    uint8_t* data           # owned; NULL when handed on
    size_t len              # arrived
    size_t size             # announced
    size_t mapped           # bytes of address space; 0: allocated
    bint is_huge            # memory comes in pages of BODY_HUGE_PAGE
    bint is_reused          # all of it was memory before its first byte came

# Memory that is kept for another body.
cdef struct spare_t:
    body_t body             # owned
    int64_t until_ns

# What Python has done on a sealed connection since the loop had it last.
cdef struct sealed_news_t:
    int fast_requests
    int general_requests
    int handshakes
    int handshake_failures

# What a handler thread is given: the one request of its connection.
cdef struct request_t:
    conn_t* next
    int kind
    int lane                # for a handler thread: where it waited
    body_t body
    wire_decoded_t decoded  # points into body.data

cdef struct conn_t:
    turn_t turn             # of its request; first, so that it is the connection as well
    member_t* member        # whose turns it takes; changed under the lock by who has it
    server_t* server
    conn_t* previous        # of all connections, the one idle longest first
    conn_t* next
    conn_t* next_returned
    conn_t* next_runnable
    uint64_t id             # never used twice
    int fd                  # owned; -1 when closed
    int state
    bint is_general         # h11 reads it
    bint is_sealed          # bytes are for Python only, of one request after the other
    bint is_new             # has not been answered yet
    bint is_member          # Python let its last request past, or it has shown a certificate
    bint is_shaking         # while Python has it: with bytes of a TLS handshake
    bint is_runnable
    int has_event           # there may be something to read that epoll will not speak of again
    bint has_ended          # the other side's end, or an error, is to be read behind what is left
    bint is_paused          # a body waits until handlers or memory are free
    int64_t deadline_ns     # 0 is none
    # Of the head being read, whoever reads it, or of the handshake; 0 is none.
    int64_t head_deadline_ns
    int64_t body_left_ns    # of a body that Python reads: to its deadline, when it was handed over
    int64_t arrived         # bytes of that body, since the deadline was put off for the last ones
    sealed_news_t news
    uint8_t* buffer         # owned: bytes read and not used yet; NULL when there are none
    size_t buffer_len
    uint64_t skip           # bytes of a refused request to throw away before the next head
    uint8_t* known          # owned: the last accepted head
    http_post_t known_post
    request_t request
    int64_t counted         # of its body in the budget, until it is answered
    uint8_t* answer         # owned: what is left to write; NULL when nothing is
    size_t answer_len
    size_t answer_at
    int then                # what to do when it is written
    bint is_answered        # the handler thread has written the 204 itself
    sockaddr_storage address

cdef struct head_t:
    uint8_t* data           # owned
    http_post_t post
    uint64_t sender         # X-Server-From; 0 for none

# Connections that the loop looks at again in its next turn.
cdef struct runnable_t:
    conn_t* head
    conn_t* tail

cdef struct server_limits_t:
    size_t max_head_bytes
    uint64_t max_body_bytes
    int max_connections
    int handlers
    int64_t head_timeout_ns
    int64_t stall_timeout_ns
    int64_t byte_ns         # what a byte of a body may take at the least rate; 0 is no least rate
    int64_t idle_timeout_ns
    int64_t handshake_timeout_ns

# Counted by the loop alone; read without a lock, so each is right and the set may be a moment old.
cdef struct server_counts_t:
    uint64_t accepted
    uint64_t connections    # open now
    uint64_t fast_requests
    uint64_t general_requests
    uint64_t closed_for_room
    uint64_t head_timeouts
    uint64_t body_timeouts
    uint64_t idle_timeouts
    uint64_t accept_pauses
    uint64_t body_pauses
    uint64_t handshakes
    uint64_t handshake_failures
    uint64_t handshake_timeouts

# The answer most requests get. Each thread that writes it has its own.
cdef struct answer_204_t:
    time_t second           # of its Date
    size_t fixed            # bytes before the date
    size_t len
    uint8_t data[ANSWER_204_MAX]

# A handler thread. Under the server's lock.
cdef struct handler_t:
    handler_t* next
    bint is_waiting         # for a request
    bint was_seen           # at work on its request when the queue was last looked at
    bint is_stuck           # so long at work on it that others must not count on this thread

cdef struct queue_t:
    conn_t* head
    conn_t* tail

cdef struct server_t:
    descriptors_t* descriptors  # the process's: what a forked child closes
    budget_t* budget        # borrowed: the node's
    budget_loop_t in_budget
    int epfd
    int wakefd
    int timerfd             # wakes the stand-in
    int* listening          # owned array of owned descriptors
    int n_listening
    int n_plain             # the first of them; the others' connections are sealed
    pthread_t thread
    int is_sleeping         # atomic
    int is_stopping         # atomic: stop accepting, close what has no handler
    int is_retiring         # atomic: idle sealed connections are to end
    int busy                # atomic: handler threads at work
    conn_t* returned        # atomic list
    server_limits_t limits
    server_counts_t counts

    pthread_mutex_t lock    # guards what follows
    spare_t spares[SPARES]  # the oldest first
    int n_spares
    size_t spare_bytes      # of address space
    int is_led              # somebody leads; written under the lock, and atomic
    bint is_armed           # the stand-in will look whether somebody leads; always when nobody does
    int64_t left_ns         # when the lead was last given up
    pthread_cond_t ended    # the loop has ended
    turns_t turns           # requests for handler threads
    int at_work[LANES]      # handler threads, by the lane of what they do
    int next_lane
    queue_t queues[QUEUES]
    pthread_cond_t handlers_queued      # a message or a proposal, or the end
    pthread_cond_t general_queued       # something general, or the end
    handler_t* handlers     # on their threads' stacks
    bint is_turn_of_members  # in the general thread
    int next_other          # which of the other queues has the next of their turns
    bint is_strangers_turn  # what the general thread is at was in QUEUE_STRANGERS
    int64_t turn_began_ns   # when the general thread took it
    int64_t strangers_at_ns  # when strangers may have a turn again
    bint is_closed          # no request will come any more
    bint is_ended           # the loop will not look at returned any more
    int live                # connections not freed
    head_t heads[HEADS_MAX]
    int n_heads
    int next_head

    int has_spare           # SPARE_, atomic
    int wants_returned      # atomic: the loop is to be woken for every connection given back
    conn_t* oldest          # the leader's own from here on; the lock hands it over
    conn_t* newest
    runnable_t runnable
    runnable_t bulk         # the same, with much to read
    int64_t bulk_bytes      # read of that in this turn
    conn_t* buried          # closed in this turn, when events may still point to them
    int64_t now_ns
    int64_t next_deadline_ns
    int64_t accept_at_ns    # 0: accepting; else when to try again; -1: when one closes or is idle
    int64_t reading         # bytes in the budget, of bodies that are being read
    int64_t queue_check_ns  # when to see whether the queue moves; 0 is never
    int64_t handled         # connections that are not ours at the moment
    bint has_queued         # requests for handlers since they were last signalled
    bint has_signalled      # a handler thread, which is to have the lead next
    bint has_begun_stop
    bint has_paused
    uint64_t next_id
    uint8_t* answer_503     # owned: for requests that are not waited for
    size_t answer_503_len
    answer_204_t answer_204     # the loop's copy
    uint8_t scratch[SERVER_SCRATCH]


# -- memory

cdef inline void body_free(body_t* body) noexcept nogil:
    if body.data is not NULL:
        if body.mapped > 0:
            munmap(body.data, body.mapped)
        else:
            free(body.data)
    memset(body, 0, sizeof(body_t))


cdef inline bint body_init(body_t* body, size_t size) noexcept nogil:
    """Make room for ``size`` bytes without making them memory; False without address space."""
    memset(body, 0, sizeof(body_t))
    body.size = size
    if size >= BODY_MAPPED_MIN:
        body.mapped = size
        body.data = <uint8_t*>mmap(NULL, size, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if body.data is <uint8_t*>MAP_FAILED:
            body.data = NULL
        else:
            # Where huge pages are the default, the first byte would cost 2 MiB.
            madvise(body.data, size, MADV_NOHUGEPAGE)
    else:
        body.data = <uint8_t*>malloc(size if size > 0 else 1)
    return body.data is not NULL


cdef inline int64_t body_resident(const body_t* body) noexcept nogil:
    """Tell how much of a body is memory."""
    cdef size_t resident = body.len
    if body.is_reused:
        return <int64_t>body.mapped
    if body.is_huge:
        resident = (resident + BODY_HUGE_PAGE - 1) & ~<size_t>(BODY_HUGE_PAGE - 1)
    return <int64_t>min(resident, max(body.mapped, body.len))


cdef inline void body_grown(body_t* body) noexcept nogil:
    """Ask for large pages once it is worth it."""
    if body.mapped > 0 and not body.is_huge and body.len >= BODY_HUGE_MIN:
        body.is_huge = True
        madvise(body.data, body.size, MADV_HUGEPAGE)


cdef inline bint conn_save(conn_t* conn, const uint8_t* data, size_t n) noexcept nogil:
    """Keep bytes for later; ``data`` may lie within the buffer."""
    cdef uint8_t* copy = NULL
    if n > 0:
        copy = <uint8_t*>malloc(n)
        if copy is NULL:
            return False
        memcpy(copy, data, n)
    free(conn.buffer)
    conn.buffer = copy
    conn.buffer_len = n
    return True


# -- the connections in the order of their last request, so that the one idle longest is at hand

cdef inline void conn_unlink(conn_t* conn) noexcept nogil:
    cdef server_t* server = conn.server
    if conn.previous is NULL:
        server.oldest = conn.next
    else:
        conn.previous.next = conn.next
    if conn.next is NULL:
        server.newest = conn.previous
    else:
        conn.next.previous = conn.previous


cdef inline void conn_append(conn_t* conn) noexcept nogil:
    cdef server_t* server = conn.server
    conn.previous = server.newest
    conn.next = NULL
    if server.newest is NULL:
        server.oldest = conn
    else:
        server.newest.next = conn
    server.newest = conn


cdef inline void server_look_at(server_t* server, int64_t at_ns) noexcept nogil:
    """See to it that deadlines are checked at ``at_ns`` at the latest."""
    if server.next_deadline_ns == 0 or at_ns < server.next_deadline_ns:
        server.next_deadline_ns = at_ns


cdef inline void conn_set_deadline(conn_t* conn, int64_t deadline_ns) noexcept nogil:
    conn.deadline_ns = deadline_ns
    server_look_at(conn.server, deadline_ns)


cdef inline bint conn_is_bulk(const conn_t* conn) noexcept nogil:
    """Tell whether what comes on a connection is read by and by, for there may be much of it."""
    return conn.state == CONN_LINGERING \
        or (conn.state == CONN_BODY and conn.request.body.size > SERVER_SCRATCH)


cdef inline void conn_add_runnable(conn_t* conn) noexcept nogil:
    """Let the loop look at the connection again in its next turn, or when there is time."""
    cdef server_t* server = conn.server
    cdef runnable_t* runnable = &server.bulk if conn_is_bulk(conn) else &server.runnable
    if conn.is_runnable:
        return
    conn.is_runnable = True
    conn.next_runnable = NULL
    if runnable.head is NULL:
        runnable.head = conn
    else:
        runnable.tail.next_runnable = conn
    runnable.tail = conn


# -- to the handler threads and back

cdef inline void server_wake(server_t* server) noexcept nogil:
    cdef uint64_t one = 1
    if load_int(&server.is_sleeping) and swap_int(&server.is_sleeping, 0):
        write(server.wakefd, &one, sizeof(one))


cdef inline void server_tell(server_t* server) noexcept nogil:
    """Have the loop look at what waits for a thread, or for memory."""
    pthread_mutex_lock(&server.lock)
    store_int(&server.in_budget.has_news, True)
    if not server.is_ended:     # or the descriptor may be another's
        server_wake(server)
    pthread_mutex_unlock(&server.lock)


cdef inline body_t server_take_spare(server_t* server, int i) noexcept nogil:
    """Take one of the spares. The caller holds the lock."""
    cdef body_t taken = server.spares[i].body
    server.n_spares -= 1
    server.spare_bytes -= taken.mapped
    add_i64(&server.budget.spare, -<int64_t>taken.mapped)
    memmove(&server.spares[i], &server.spares[i + 1], (server.n_spares - i) * sizeof(spare_t))
    return taken


cdef inline void server_recycle(server_t* server, body_t* body) noexcept nogil:
    """Free a body, but keep its memory for a while if it is large. Never waits."""
    cdef body_t older[SPARES]
    cdef int i, n_older = 0
    if body.mapped > 0 and body.mapped <= SPARE_MAX and body.len == body.size \
            and budget_left(server.budget) - load_i64(&server.budget.spare) \
            >= <int64_t>body.mapped and pthread_mutex_trylock(&server.lock) == 0:
        if not load_int(&server.is_stopping):       # then nobody would free it
            while server.n_spares == SPARES or server.spare_bytes + body.mapped > SPARE_MAX:
                older[n_older] = server_take_spare(server, 0)
                n_older += 1
            server.spares[server.n_spares].body = body[0]
            server.spares[server.n_spares].body.is_reused = True
            add_i64(&server.budget.spare, <int64_t>body.mapped)
            server.spares[server.n_spares].until_ns = clock_ns() + SPARE_NS
            server.n_spares += 1
            server.spare_bytes += body.mapped
            memset(body, 0, sizeof(body_t))
            if load_int(&server.has_spare) == SPARE_NONE:
                store_int(&server.has_spare, SPARE_NEW)
                server_wake(server)
        pthread_mutex_unlock(&server.lock)
    body_free(body)
    for i in range(n_older):        # not under the lock: it takes a while
        body_free(&older[i])


cdef inline bint server_reuse_body(server_t* server, body_t* body, size_t size) noexcept nogil:
    """Make room in what was kept, if that is neither too small nor more than twice as large.

    All of it counts from now on, whatever arrives, so there has to be room for that.
    """
    cdef bint is_fit = False
    cdef int i
    if size < BODY_MAPPED_MIN or load_int(&server.has_spare) == SPARE_NONE:
        return False
    pthread_mutex_lock(&server.lock)
    i = server.n_spares - 1
    while i >= 0 and not is_fit:        # the last one first: more of it is in the caches
        is_fit = size <= server.spares[i].body.mapped <= 2 * size \
            and <int64_t>server.spares[i].body.mapped <= budget_left(server.budget)
        if is_fit:
            body[0] = server_take_spare(server, i)
            body.size = size
            body.len = 0
            if server.n_spares == 0:
                store_int(&server.has_spare, SPARE_NONE)
        i -= 1
    pthread_mutex_unlock(&server.lock)
    return is_fit


cdef inline bint conn_is_probe(const conn_t* conn) noexcept nogil:
    """Tell whether what is for Python begins as a probe does: it is answered with next to nothing.

    Members probe over connections of their own, on which they say nothing else.
    """
    return not conn.is_sealed and conn.request.body.len >= 18 \
        and memcmp(conn.request.body.data, b"GET /raft/probing ", 18) == 0


cdef inline int request_lane(const request_t* request) noexcept nogil:
    """Tell which lane a request waits in for a handler thread."""
    if request.kind == REQUEST_PROPOSAL:
        return LANE_PROPOSALS
    if request.kind == REQUEST_LARGE or request.decoded.entries_len > ENTRIES_LARGE:
        return LANE_LARGE
    return LANE_MESSAGES


cdef inline void conn_to_handler(conn_t* conn, int kind) noexcept nogil:
    """Queue the connection's request; its thread has the connection from here on."""
    cdef server_t* server = conn.server
    cdef int which = QUEUE_GENERAL
    cdef queue_t* queue
    conn.state = CONN_HANDLED
    conn.deadline_ns = 0
    server.handled += 1
    conn.request.kind = kind
    if kind <= REQUEST_MALFORMED:
        pthread_mutex_lock(&server.lock)
        conn.request.lane = request_lane(&conn.request)
        turns_push(&server.turns, conn.request.lane, conn.member, &conn.turn)
        server.has_queued = True    # server_signal_handlers, once for all of this turn
        pthread_mutex_unlock(&server.lock)
        return
    conn.is_shaking = False
    if conn.is_sealed and conn.then == THEN_HANDSHAKE:
        which = QUEUE_HANDSHAKES
        conn.is_shaking = kind == REQUEST_GENERAL
    elif conn.is_general and conn.then == THEN_TURN:
        which = QUEUE_STRANGERS
    elif not conn.is_member:
        which = QUEUE_PROBES if conn_is_probe(conn) else QUEUE_STRANGERS
    queue = &server.queues[which]
    conn.request.next = NULL
    pthread_mutex_lock(&server.lock)
    if queue.tail is NULL:
        queue.head = conn
    else:
        queue.tail.request.next = conn
    queue.tail = conn
    pthread_cond_signal(&server.general_queued)
    pthread_mutex_unlock(&server.lock)


cdef inline conn_t* queue_take(queue_t* queue) noexcept nogil:
    """Take the oldest request, or NULL. The caller holds the lock."""
    cdef conn_t* conn = queue.head
    if conn is not NULL:
        queue.head = conn.request.next
        if queue.head is NULL:
            queue.tail = NULL
    return conn


cdef inline conn_t* server_take_general(server_t* server) noexcept nogil:
    """Take what the general thread does next, or NULL. The caller holds the lock.

    Between two turns of strangers it rests for as long as the first one took, if nobody else is to
    be served: it needs the GIL for each, and messages of members would wait for that.
    """
    cdef conn_t* conn = NULL
    cdef int i, which
    server.is_strangers_turn = False
    server.is_turn_of_members = not server.is_turn_of_members
    if server.is_turn_of_members:
        conn = queue_take(&server.queues[QUEUE_GENERAL])
    for i in range(QUEUES - QUEUE_PROBES):
        if conn is not NULL:
            break
        which = QUEUE_PROBES + (server.next_other + i) % (QUEUES - QUEUE_PROBES)
        if which == QUEUE_STRANGERS and server.queues[which].head is not NULL:
            server.turn_began_ns = clock_ns()
            if server.turn_began_ns < server.strangers_at_ns:
                continue
            server.is_strangers_turn = True
        conn = queue_take(&server.queues[which])
        if conn is not NULL:
            server.next_other = (which - QUEUE_PROBES + 1) % (QUEUES - QUEUE_PROBES)
    return conn if conn is not NULL else queue_take(&server.queues[QUEUE_GENERAL])


cdef inline bint server_may_take(const server_t* server, int lane) noexcept nogil:
    """Tell whether one more handler thread may be at work for a lane. The caller holds the lock.

    Proposals wait for a leader, and a leader is made of messages: one handler thread, if there is
    more than one, never takes a proposal (etcd has a queue of its own for them, spec section 4.3).
    Nor does one take what is large, lest heartbeats wait for it; while proposals wait, it may be
    the same one.
    """
    return lane == LANE_MESSAGES or server.limits.handlers == 1 \
        or server.at_work[lane] + 1 < server.limits.handlers


cdef inline conn_t* server_take(server_t* server, bint is_general) noexcept nogil:
    """Take the next request for a thread of this kind, or NULL. The caller holds the lock."""
    cdef int lane, _step
    if is_general:
        return server_take_general(server)
    # In turn: no lane keeps another waiting.
    lane = server.next_lane
    for _step in range(LANES):
        if turns_wait(&server.turns, lane) and server_may_take(server, lane):
            server.at_work[lane] += 1
            server.next_lane = lane + 1 if lane + 1 < LANES else 0
            return <conn_t*>turns_take(&server.turns, lane)
        lane = lane + 1 if lane + 1 < LANES else 0
    return NULL


cdef inline void server_leave_lane(server_t* server, int lane) noexcept nogil:
    """A handler thread is at work for a lane no more. The caller holds the lock."""
    server.at_work[lane] -= 1
    if lane != LANE_MESSAGES and turns_wait(&server.turns, lane):
        pthread_cond_signal(&server.handlers_queued)


cdef inline void conn_decode(conn_t* conn) noexcept nogil:
    """Decode a whole body, and see what kind of request it is."""
    cdef request_t* request = &conn.request
    if wire_decode(request.body.data, request.body.len, &request.decoded) != WIRE_OK:
        request.kind = REQUEST_MALFORMED
    elif request.decoded.message.type == TYPE_PROP:
        request.kind = REQUEST_PROPOSAL
    else:
        request.kind = REQUEST_MESSAGE


cdef inline bint server_decode(server_t* server, conn_t* conn) noexcept nogil:
    """Decode what the calling handler thread has taken undecoded.

    False when that is a proposal, and as many threads as may be are at work on proposals: it waits
    in their lane, and the thread has it no more.
    """
    cdef bint is_taken
    conn_decode(conn)
    if conn.request.kind != REQUEST_PROPOSAL:
        return True
    pthread_mutex_lock(&server.lock)
    server_leave_lane(server, LANE_LARGE)
    conn.request.lane = LANE_PROPOSALS
    is_taken = server_may_take(server, LANE_PROPOSALS)
    if is_taken:
        server.at_work[LANE_PROPOSALS] += 1
    else:
        turns_push(&server.turns, LANE_PROPOSALS, conn.member, &conn.turn)
    pthread_mutex_unlock(&server.lock)
    return is_taken


cdef inline void conn_free(conn_t* conn) noexcept nogil:
    """Free a connection nobody refers to. The caller holds the lock."""
    cdef server_t* server = conn.server
    invariant((conn.fd < 0 or server.is_ended) and not conn.is_runnable)
    if conn.fd >= 0:
        descriptors_shut(server.descriptors, conn.fd)
    budget_add(server.budget, -conn.counted)
    body_free(&conn.request.body)
    free(conn.buffer)
    free(conn.known)
    free(conn.answer)
    turns_leave(&server.turns, conn.member)
    free(conn)
    server.live -= 1


cdef inline bint conn_give_back_locked(conn_t* conn, handler_t* handler) noexcept nogil:
    """Return a connection from a handler thread; when the loop has ended, free it here: False.

    The caller holds the lock.
    """
    cdef server_t* server = conn.server
    cdef bint is_urgent = not conn.is_answered or conn.buffer_len > 0
    if handler is not NULL:
        handler.was_seen = False
        handler.is_stuck = False
    elif server.is_strangers_turn:
        server.is_strangers_turn = False
        server.strangers_at_ns = clock_ns()
        server.strangers_at_ns += min(server.strangers_at_ns - server.turn_began_ns,
                                      <int64_t>STRANGERS_PAUSE_NS)
    if conn.request.kind <= REQUEST_MALFORMED:
        server_leave_lane(server, conn.request.lane)
    if server.is_ended:
        conn_free(conn)
        return False
    list_push(&server.returned, &conn.next_returned, conn)
    # An answered connection can wait until the loop wakes by itself, at the latest for its next
    # request. If that came while the connection was ours, the loop has noted so before it slept.
    if is_urgent or load_int(&server.wants_returned) or load_int(&conn.has_event):
        server_wake(server)     # under the lock: the loop cannot have ended
    return True


cdef inline bint conn_give_back(conn_t* conn, handler_t* handler) noexcept nogil:
    cdef server_t* server = conn.server
    cdef bint is_taken
    pthread_mutex_lock(&server.lock)
    is_taken = conn_give_back_locked(conn, handler)
    pthread_mutex_unlock(&server.lock)
    return is_taken


cdef inline int server_detach(conn_t* conn) noexcept nogil:
    """Take the socket of a connection that the calling thread holds; the caller owns it then.

    -1 when the loop has ended and shut it. The connection is still to be given back, with
    THEN_DETACH. An event for it may be under way to the loop, which only notes it.
    """
    cdef server_t* server = conn.server
    cdef int fd = -1
    pthread_mutex_lock(&server.lock)    # server_end shuts the sockets of handled connections
    if not server.is_ended:
        fd = conn.fd
        epoll_ctl(server.epfd, EPOLL_CTL_DEL, fd, NULL)
        conn.fd = -1
    pthread_mutex_unlock(&server.lock)
    return fd


# -- accepted heads

cdef inline void conn_set_member(conn_t* conn, uint64_t sender) noexcept nogil:
    """Have a connection that the caller has take the turns of a member from now on.

    The caller holds the lock.
    """
    cdef member_t* member = NULL
    if conn.member.id != sender:
        member = host_join(conn.member.host, sender)
    if member is not NULL:
        turns_leave(&conn.server.turns, conn.member)
        conn.member = member


cdef inline bint server_knows(server_t* server, conn_t* conn, const uint8_t* data, size_t n,
                              http_post_t* post) noexcept nogil:
    """Tell whether Python has accepted such a head before; remember it on the connection."""
    cdef int i
    cdef head_t* head
    cdef uint8_t* copy
    cdef bint found = False
    pthread_mutex_lock(&server.lock)
    for i in range(server.n_heads):
        head = &server.heads[i]
        if http_same_post(data, n, head.data, &head.post, post):
            copy = <uint8_t*>realloc(conn.known, head.post.head_len)
            if copy is not NULL:
                memcpy(copy, head.data, head.post.head_len)
                conn.known = copy
                conn.known_post = head.post
            conn_set_member(conn, head.sender)
            found = True
            break
    pthread_mutex_unlock(&server.lock)
    return found


cdef inline void server_learn(server_t* server, const uint8_t* data, const http_post_t* post,
                              uint64_t sender) noexcept nogil:
    """Accept heads that are like this one but for their length; the oldest makes room."""
    cdef head_t* head
    cdef uint8_t* copy = <uint8_t*>malloc(post.head_len)
    if copy is NULL:
        return
    memcpy(copy, data, post.head_len)
    pthread_mutex_lock(&server.lock)
    head = &server.heads[server.next_head]
    free(head.data)
    head.data = copy
    head.post = post[0]
    head.sender = sender
    server.next_head = (server.next_head + 1) % HEADS_MAX
    if server.n_heads < HEADS_MAX:
        server.n_heads += 1
    pthread_mutex_unlock(&server.lock)


# -- a connection: read, recognise, write

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
        server.accept_at_ns = server.now_ns


cdef inline void conn_close(conn_t* conn) noexcept nogil:
    """End a connection that the loop has. A general one goes to Python once more."""
    cdef server_t* server = conn.server
    if conn.fd >= 0:
        # Told to, for a forked child's copy of the descriptor would keep it in the epoll set.
        epoll_ctl(server.epfd, EPOLL_CTL_DEL, conn.fd, NULL)
        descriptors_shut(server.descriptors, conn.fd)
        conn.fd = -1
        conn_leave_body(conn)
        conn_count_closed(conn)
    if conn.is_general:
        conn_to_handler(conn, REQUEST_GONE)
        return
    conn_unlink(conn)
    conn.state = CONN_CLOSED
    conn.next = server.buried
    server.buried = conn


cdef inline void conn_end(conn_t* conn) noexcept nogil:
    """End a connection that the loop has; one that Python has deciphered says so to its peer."""
    if conn.is_sealed and conn.is_general and conn.then != THEN_HANDSHAKE:
        conn_to_handler(conn, REQUEST_END)
    else:
        conn_close(conn)


cdef inline void conn_broken(conn_t* conn) noexcept nogil:
    """The body of a request will not come: Python counts it and answers 400."""
    conn_leave_body(conn)
    conn_to_handler(conn, REQUEST_BROKEN)


cdef inline void conn_hand_over(conn_t* conn, const uint8_t* data, size_t n) noexcept nogil:
    """Give bytes to Python; from here on the connection is general."""
    cdef request_t* request = &conn.request
    if not body_init(&request.body, n):
        conn_close(conn)
        return
    memcpy(request.body.data, data, n)
    request.body.len = n
    if not conn.is_general:
        conn.is_general = True
        if not conn.is_sealed:
            count_add(&conn.server.counts.general_requests, 1)
    conn_save(conn, NULL, 0)
    conn_to_handler(conn, REQUEST_GENERAL)


cdef inline void conn_deliver(conn_t* conn) noexcept nogil:
    """A message is complete: queue it, decoded if that is done in no time."""
    cdef request_t* request = &conn.request
    if request.body.len > SERVER_SCRATCH:
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
        conn.head_deadline_ns = server.now_ns + server.limits.head_timeout_ns
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
    conn.state = CONN_BODY
    conn_unlink(conn)           # in the order of their beginnings, for conn_must_wait
    conn_append(conn)
    conn_count(conn)
    conn_set_deadline(conn, server.now_ns + server.limits.stall_timeout_ns)
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
    if conn.request.body.size <= SERVER_SCRATCH:
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
    while first.state != CONN_BODY or first.request.body.size <= SERVER_SCRATCH:
        first = first.next
    return first is not conn


cdef inline void conn_body_arrived(conn_t* conn, ssize_t n) noexcept nogil:
    """Put off the deadline of a body: by what ``n`` bytes may take, to a stall from now at most.

    So a body may stop for a while and may be slow, but one that drips is ended.
    """
    cdef server_t* server = conn.server
    cdef int64_t stalled_ns = server.now_ns + server.limits.stall_timeout_ns
    cdef int64_t slow_ns = conn.deadline_ns + n * server.limits.byte_ns
    if conn.deadline_ns == 0 or server.limits.byte_ns == 0 or slow_ns > stalled_ns:
        slow_ns = stalled_ns
    conn_set_deadline(conn, slow_ns)


cdef inline void conn_credit_body(conn_t* conn) noexcept nogil:
    """Do the same for a body that Python reads, when it gives the connection back."""
    cdef server_t* server = conn.server
    cdef int64_t stalled_ns = server.limits.stall_timeout_ns
    cdef int64_t slow_ns = conn.body_left_ns + conn.arrived * server.limits.byte_ns
    if conn.body_left_ns == 0 or slow_ns > stalled_ns \
            or (server.limits.byte_ns == 0 and conn.arrived > 0):
        slow_ns = stalled_ns
    conn.body_left_ns = slow_ns
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
        n = recv(conn.fd, body.data + body.len, room, MSG_DONTWAIT)
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
    conn_set_deadline(conn, server.now_ns + server.limits.idle_timeout_ns)
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
        n = recv(conn.fd, server.scratch + kept, SERVER_SCRATCH - kept, MSG_DONTWAIT)
        if n >= 0 or errno != EINTR:
            break
    if n < 0 and errno == EAGAIN:
        return
    if n <= 0:
        if conn.state == CONN_GENERAL and conn.then == THEN_READ_BODY:
            conn_broken(conn)
        else:
            if conn.is_sealed and conn.is_general and conn.then == THEN_HANDSHAKE:
                count_add(&server.counts.handshake_failures, 1)
            conn_close(conn)
        return
    if conn.is_sealed and conn.head_deadline_ns == 0:
        conn.head_deadline_ns = server.now_ns + server.limits.head_timeout_ns
    if kept + <size_t>n == SERVER_SCRATCH:
        conn_add_runnable(conn)         # there may be more, and epoll will not say so again
    if conn.state == CONN_GENERAL:
        if conn.then == THEN_READ_BODY:
            # The time Python takes is not the sender's. What of it was body, Python says.
            conn.body_left_ns = max(conn.deadline_ns - server.now_ns, 1)
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
    conn.state = CONN_HEAD
    conn.is_new = False
    conn.head_deadline_ns = 0
    conn.body_left_ns = 0
    conn_set_deadline(conn, server.now_ns + server.limits.idle_timeout_ns)
    if conn.skip > 0:           # as long as a head may take
        conn_set_deadline(conn, server.now_ns + server.limits.head_timeout_ns)
    if kept == 0 and server.accept_at_ns < 0:
        server.accept_at_ns = server.now_ns     # an idle connection can make room
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
    conn.state = CONN_GENERAL
    conn.is_new = False
    conn.head_deadline_ns = 0
    conn.body_left_ns = 0
    conn_set_deadline(conn, server.now_ns + server.limits.idle_timeout_ns)
    if server.accept_at_ns < 0:
        server.accept_at_ns = server.now_ns     # an idle connection can make room
    if conn.has_event:
        conn_add_runnable(conn)


cdef inline void conn_linger(conn_t* conn) noexcept nogil:
    """End our side, and wait a moment for the other to do so."""
    conn.state = CONN_LINGERING
    if load_int(&conn.server.is_stopping) or shutdown(conn.fd, SHUT_WR) != 0:
        conn_close(conn)
        return
    conn_set_deadline(conn, conn.server.now_ns + LINGER_NS)
    conn_add_runnable(conn)


cdef inline void conn_discard(conn_t* conn) noexcept nogil:
    """Throw away one step of what a refused peer still sends; of TCP it is not even copied."""
    cdef server_t* server = conn.server
    cdef ssize_t n
    cdef int _step
    for _step in range(SERVER_STEP_BYTES // SERVER_SCRATCH):
        n = recv(conn.fd, server.scratch, SERVER_SCRATCH, MSG_DONTWAIT | MSG_TRUNC)
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
        conn.is_general = False
        conn_linger(conn)
    elif conn.then == THEN_NEXT:
        conn.is_general = False
        conn_next(conn)
    elif load_int(&conn.server.is_stopping):
        conn_end(conn)
    elif conn.then == THEN_TURN:
        conn_credit_body(conn)
        conn_to_handler(conn, REQUEST_GENERAL)
    elif conn.then == THEN_AGAIN:
        conn.head_deadline_ns = 0
        conn.body_left_ns = 0
        conn_to_handler(conn, REQUEST_GENERAL)
    elif conn.then == THEN_IDLE:
        conn_idle(conn)
    else:
        conn.state = CONN_GENERAL
        if conn.then == THEN_READ_BODY:
            conn_credit_body(conn)
            conn_set_deadline(conn, conn.server.now_ns + conn.body_left_ns)
        else:
            if conn.head_deadline_ns == 0:
                conn.head_deadline_ns = conn.server.now_ns + conn.server.limits.head_timeout_ns
            conn_set_deadline(conn, conn.head_deadline_ns)
            if conn.then == THEN_HANDSHAKE and conn.server.accept_at_ns < 0:
                conn.server.accept_at_ns = conn.server.now_ns   # it can be spared
        if conn.has_event:
            conn_add_runnable(conn)


cdef inline void conn_write(conn_t* conn) noexcept nogil:
    """Write the answer, or what is left of it."""
    cdef ssize_t n
    cdef uint8_t* data = conn.answer
    while conn.answer_at < conn.answer_len:
        n = send(conn.fd, data + conn.answer_at, conn.answer_len - conn.answer_at,
                 MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                conn.state = CONN_WRITING
                conn_set_deadline(conn, conn.server.now_ns + conn.server.limits.stall_timeout_ns)
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
    n = send(conn.fd, answer.data, answer.len, MSG_DONTWAIT | MSG_NOSIGNAL)
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
    if conn.answer is NULL and conn.then == THEN_NEXT and not conn.is_general \
            and (load_int(&server.is_sleeping) or not load_int(&server.is_led)) \
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
        conn.is_general = False
        conn_close(conn)
        return
    elif conn.then == THEN_DETACH:
        conn_count_closed(conn)
        conn.is_general = False
        conn_close(conn)
        return
    elif conn.answer is NULL and conn.then == THEN_NEXT and not conn.is_general:
        if not conn_send_204(conn, &conn.server.answer_204):
            conn_close(conn)
            return
        conn.is_answered = False
    conn_write(conn)


cdef inline void conn_ready(conn_t* conn, uint32_t flags, bint is_its_turn) noexcept nogil:
    """Act on what epoll says, or on EPOLLIN when the connection was runnable.

    What there may be much of waits for ``is_its_turn``.
    """
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
    if conn.has_event and (conn.state == CONN_HEAD or conn.state == CONN_GENERAL):
        conn_add_runnable(conn)


cdef inline bint conn_is_idle(const conn_t* conn) noexcept nogil:
    """Tell whether nothing of a request has come. A TLS handshake that has begun is one."""
    if conn.state == CONN_GENERAL:
        return conn.is_sealed and (conn.then == THEN_IDLE or not conn.is_general)
    return conn.state == CONN_HEAD and conn.buffer_len == 0 and conn.fd >= 0
