"""A connection that was accepted, and the server it belongs to: what they are made of.

A connection belongs to the loop (``_server.pxd``), or, with a request, to a handler thread or the
odd thread (``_queues.pxd``). What the loop does with one is in ``_requests.pxd``.

What the loop knows is one kind of request (``http_recognise_post``) whose head, but for its length,
Python has accepted before. Everything else is *odd*: the loop reads bytes and hands them over,
Python makes sense of them (``odd_request.py``) and says what to write and how to go on.

A connection of an https listener begins with a handshake, which is the odd thread's: the loop only
waits until it can go on. From then on it is like any other, but for its heads: what was accepted of
one caller says nothing of another, who has shown another certificate or none.
"""

from libc.stdint cimport int64_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from pipeline.net._budget cimport BODY_SMALL, budget_loop_t, budget_t
from pipeline.net._descriptors cimport descriptors_t
from pipeline.receive._heads cimport head_t, heads_add, heads_find, heads_t
from pipeline.net._conn cimport conn_t
from pipeline.wire._http cimport http_post_t
from pipeline.receive._inbox cimport holder_t, inbox_t, reader_t, source_t
from pipeline.net._loop cimport io_t, loop_look_at, loop_t, loop_wake, runnable_add, runnable_t
from pipeline.net._memory cimport (
    BODY_MAPPED_MIN, SPARES, SPARE_NEW, SPARE_NONE, body_free, body_t, spares_expire, spares_find,
    spares_keep, spares_t, spares_want,
)
from pipeline._system cimport (
    invariant, load_int, pthread_cond_t, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock,
    pthread_mutex_unlock, pthread_t, sockaddr_storage, store_int, time_t,
)
from pipeline.receive._turns cimport LANES, host_join, member_t, turn_t, turns_leave, turns_t
from pipeline.wire._raftpb cimport wire_decoded_t

cdef enum:
    # Read at once; a request that fits is decoded from a copy of its own size.
    SERVER_SCRATCH = 64 * 1024
    # Bytes of a large body read per connection and turn; see WORKER_STEP_BYTES.
    SERVER_STEP_BYTES = 1 << 20
    # Bytes of all large bodies read, or thrown away, before others are looked at again: a
    # millisecond.
    SERVER_TURN_BYTES = 4 << 20
    # A message with more entries takes a handler thread longer than it takes the loop to read one:
    # about as long as 64 KiB of entries that are not empty.
    ENTRIES_LARGE = 1024
    ACCEPT_STEP = 64
    ACCEPT_RETRY_NS = 100000000
    # How long a queued request may wait for a handler thread that is awake already.
    QUEUE_CHECK_NS = 1000000
    # How long what a refused peer still sends is read and thrown away, so that it reads the
    # answer before it hears of the end (RFC 9112 9.6).
    LINGER_NS = 1000000000
    # Between two bytes of an answer that does not end, at most. etcd 3.4 gives up after 5 s of
    # silence.
    ENDLESS_NS = 3000000000
    # Those that come within one of these are sent together: to find them takes a look at every
    # connection, which a thousand callers are not to have us take a thousand times.
    ENDLESS_TICK_NS = 250000000
    # A turn of strangers that took longer is followed by no longer a pause than this.
    STRANGERS_PAUSE_NS = 5000000
    ANSWER_204_MAX = 256

# Changed by caller_set_state alone.
cdef enum:
    CALLER_HEAD = 0         # reads a head; idle while nothing of one has arrived
    CALLER_SHAKING          # waits for what its TLS handshake goes on with
    CALLER_BODY             # reads the body of a recognised request
    CALLER_ODD              # reads for Python
    CALLER_HANDLED          # a handler thread has it, or the odd thread: hands off
    CALLER_WRITING          # writes an answer
    CALLER_LINGERING        # has answered and ended; reads to throw away
    CALLER_ENDLESS          # is answered a byte now and then, and has nothing more to say
    CALLER_CLOSED           # buried: freed at the end of the turn

# The first four may block and go to the handler threads; the others to the odd thread. With an
# inbox there are no handler threads, and all that is not simply put there goes to the odd thread.
cdef enum:
    REQUEST_MESSAGE = 0     # decoded
    REQUEST_PROPOSAL        # the same, a MsgProp, which waits for a leader
    REQUEST_LARGE           # a whole body, which the handler thread decodes
    REQUEST_MALFORMED       # a whole body that is no message; decoded.error says why
    REQUEST_BROKEN          # the body of a request did not come
    REQUEST_ODD             # bytes for Python
    REQUEST_GONE            # a connection of which Python keeps something has ended
    REQUEST_HANDSHAKE       # a TLS handshake can go on
    REQUEST_CHECK           # a message for the inbox, once Python has let its sender past
    REQUEST_TAKEN           # for Python to answer: it is in the inbox, or was taken from there
    REQUEST_REFUSED         # for Python to answer: it will not be taken

# Of the odd thread. What handler threads do waits in the lanes of ``_turns.pxd``.
cdef enum:
    # Who was let past last time has every second turn, and whoever asks for
    # nothing else is given it; the others, of whom a flood may come, share the rest.
    QUEUE_MEMBERS = 0       # of members: a certificate was shown, or the last request let past
    QUEUE_PROBES            # of others, that begin as a probe does
    QUEUE_STRANGERS         # of all others, and of those whose bytes take more than a turn
    QUEUE_HANDSHAKES
    QUEUES

# How Python wants a connection to go on.
cdef enum:
    THEN_NEXT = 0           # the request is answered: read the next one
    THEN_CLOSE
    THEN_READ_HEAD          # odd: read on, within the time of a head
    THEN_READ_BODY          # odd: read on, as long as bytes come
    THEN_DELIVER            # odd: a whole body to be decoded and processed
    THEN_DETACH             # odd: Python has the socket now (server_detach)
    THEN_FREE               # forgotten
    THEN_TURN               # odd: call again for what is left; strangers have a turn before
    THEN_SHAKE              # the handshake is not over
    THEN_SHAKEN             # it is: read the first request
    THEN_OFFER              # put the decoded message into the inbox
    THEN_TAKEN              # the node has taken it: answer
    THEN_REFUSED            # it is not waited for: answer 503
    THEN_ENDLESS            # odd: the answer does not end

# What a handler thread is given: the one request of its connection.
cdef struct request_t:
    caller_t* next
    int kind
    int lane                # for a handler thread: where it waited
    body_t body
    wire_decoded_t decoded  # points into body.data

cdef struct caller_t:
    conn_t conn             # first; its descriptor is owned, -1 when closed
    turn_t turn             # of its request
    holder_t holder         # while its message is in the inbox, and it is not answered yet
    member_t* member        # whose turns it takes; changed under the lock by who has it
    server_t* server
    caller_t* previous      # of all connections, the one idle longest first
    caller_t* next
    uint64_t id             # never used twice
    int state
    bint is_odd             # h11 reads it
    bint has_tls            # of an https listener; conn.tls is made when its handshake begins
    bint is_new             # has not been answered yet
    bint is_member          # Python let its last request past, or it has shown a certificate
    bint is_bound           # Python looks whether it is still let past, at each recognised request
    bint is_checked         # Python has let the message of its request past
    bint is_shaking         # while Python has it: for its handshake
    int generation          # of the credentials that its handshake began with
    int has_event           # there may be something to read that epoll will not speak of again
    bint has_ahead          # in its buffer is what came behind a request that is answered
    bint has_ended          # the other side's end, or an error, is to be read behind what is left
    bint is_paused          # a body waits until handlers or memory are free
    int64_t deadline_ns     # 0 is none
    # Of the head being read, whoever reads it, or of the handshake; 0 is none.
    int64_t head_deadline_ns
    int64_t idle_deadline_ns        # since the last request
    # Nanoseconds left until the body's deadline at the moment it was handed to Python.
    int64_t body_left_ns
    int64_t arrived         # bytes of that body, since the deadline was put off for the last ones
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

# A listening socket.
cdef struct listening_t:
    io_t io                 # first; its descriptor is owned
    server_t* server
    bint has_tls            # https: so have the connections it accepts

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
    caller_t* head
    caller_t* tail

cdef struct server_t:
    descriptors_t* descriptors  # the process's: what a forked child closes
    budget_t* budget        # borrowed: the node's
    budget_loop_t in_budget
    inbox_t* inbox          # borrowed; NULL where handler threads call the application
    source_t* source        # borrowed: the node, for the inbox
    uint64_t delivered      # the types of messages, as bits, that go there; the last is for later
    reader_t reader         # for the inbox
    loop_t loop             # run by the leader
    int timerfd             # wakes the stand-in
    listening_t* listening  # owned array
    int n_listening
    pthread_t thread
    int is_stopping         # atomic: stop accepting, close what has no handler
    int generation          # atomic: of the credentials; connections of earlier ones are to end
    int is_retiring         # atomic: it has changed
    int busy                # atomic: handler threads at work
    server_limits_t limits
    server_counts_t counts

    pthread_mutex_t lock    # guards what follows
    spares_t spares         # but for their state, which is atomic
    int is_led              # somebody leads; written under the lock, and atomic
    bint is_armed           # the stand-in's timer runs; it does whenever nobody leads
    int64_t left_ns         # when the lead was last given up
    pthread_cond_t ended    # the loop has ended
    turns_t turns           # requests for handler threads
    int at_work[LANES]      # handler threads, by the lane of what they do
    int next_lane
    queue_t queues[QUEUES]
    pthread_cond_t handlers_queued      # a message or a proposal, or the end
    pthread_cond_t odd_queued           # something odd, or the end
    handler_t* handlers     # on their threads' stacks
    bint is_turn_of_members  # in the odd thread
    int next_other          # which of the other queues has the next of their turns
    bint is_strangers_turn  # what the odd thread is at was in QUEUE_STRANGERS
    int64_t turn_began_ns   # when the odd thread took it
    int64_t strangers_at_ns  # when strangers may have a turn again
    bint is_closed          # no request will come any more
    bint is_ended           # the loop will not look at what is given back any more
    int live                # connections not freed
    heads_t heads

    int wants_returned      # atomic: the loop is to be woken for every connection given back
    caller_t* oldest    # the leader's own from here on; the lock hands it over
    caller_t* newest
    runnable_t bulk         # runnable when there is time: with much to read
    int64_t bulk_bytes      # read of that in this turn
    caller_t* buried    # closed in this turn, when events may still point to them
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


cdef inline caller_t* caller_of_turn(turn_t* turn) noexcept nogil:
    """Return the connection whose turn it is; NULL for NULL."""
    cdef caller_t* caller = <caller_t*>turn
    if turn is NULL:
        return NULL
    return <caller_t*>(<char*>turn - (<char*>&caller.turn - <char*>caller))


cdef inline caller_t* caller_of_holder(holder_t* holder) noexcept nogil:
    """Return the connection that waits for what becomes of its message."""
    cdef caller_t* caller = <caller_t*>holder
    return <caller_t*>(<char*>holder - (<char*>&caller.holder - <char*>caller))


cdef inline server_t* server_of_reader(reader_t* reader) noexcept nogil:
    """Return the server that an inbox knows as ``reader``."""
    cdef server_t* server = <server_t*>reader
    return <server_t*>(<char*>reader - (<char*>&server.reader - <char*>server))


# -- a connection's states

cdef inline int caller_next_states(int state) noexcept nogil:
    """Return the states that may follow one, as bits."""
    if state == CALLER_HEAD:        # its head has come; TLS is to begin; something is for a thread
        return 1 << CALLER_BODY | 1 << CALLER_SHAKING | 1 << CALLER_HANDLED | 1 << CALLER_CLOSED
    if state == CALLER_SHAKING:     # something has come, or its deadline
        return 1 << CALLER_HANDLED | 1 << CALLER_CLOSED
    if state == CALLER_BODY:        # it is whole, or will not be
        return 1 << CALLER_HANDLED | 1 << CALLER_CLOSED
    if state == CALLER_ODD:         # bytes have come, or a deadline
        return 1 << CALLER_HANDLED | 1 << CALLER_CLOSED
    if state == CALLER_HANDLED or state == CALLER_WRITING:      # given back; the answer is out
        return 1 << CALLER_HEAD | 1 << CALLER_SHAKING | 1 << CALLER_ODD | 1 << CALLER_HANDLED \
            | 1 << CALLER_WRITING | 1 << CALLER_LINGERING | 1 << CALLER_ENDLESS \
            | 1 << CALLER_CLOSED
    if state == CALLER_LINGERING or state == CALLER_ENDLESS:
        return 1 << CALLER_HANDLED | 1 << CALLER_CLOSED
    return 0


cdef inline void caller_set_state(caller_t* caller, int state) noexcept nogil:
    """Change the state of a connection that the loop has."""
    invariant(caller_next_states(caller.state) >> state & 1)
    caller.state = state


# -- the connections in the order of their last request, so that the one idle longest is at hand

cdef inline void caller_unlink(caller_t* caller) noexcept nogil:
    cdef server_t* server = caller.server
    if caller.previous is NULL:
        server.oldest = caller.next
    else:
        caller.previous.next = caller.next
    if caller.next is NULL:
        server.newest = caller.previous
    else:
        caller.next.previous = caller.previous


cdef inline void caller_append(caller_t* caller) noexcept nogil:
    cdef server_t* server = caller.server
    caller.previous = server.newest
    caller.next = NULL
    if server.newest is NULL:
        server.oldest = caller
    else:
        server.newest.next = caller
    server.newest = caller


cdef inline void caller_set_deadline(caller_t* caller, int64_t deadline_ns) noexcept nogil:
    caller.deadline_ns = deadline_ns
    loop_look_at(&caller.server.loop, deadline_ns)


cdef inline bint caller_is_bulk(const caller_t* caller) noexcept nogil:
    """Tell whether what comes on a connection is read by and by, for there may be much of it."""
    return caller.state == CALLER_LINGERING \
        or (caller.state == CALLER_BODY and caller.request.body.size > BODY_SMALL)


cdef inline void caller_add_runnable(caller_t* caller) noexcept nogil:
    """Let the loop look at the connection again in its next turn, or when there is time."""
    cdef server_t* server = caller.server
    runnable_add(&server.bulk if caller_is_bulk(caller) else &server.loop.runnable, &caller.conn.io)


# -- the loop, told from outside

cdef inline void server_tell(server_t* server) noexcept nogil:
    """Have the loop look at what waits for a thread, or for memory."""
    store_int(&server.in_budget.has_news, True)
    loop_wake(&server.loop)


# -- memory

cdef inline bint caller_save(caller_t* caller, const uint8_t* data, size_t n) noexcept nogil:
    """Keep bytes for later; ``data`` may lie within the buffer."""
    cdef uint8_t* copy = NULL
    if n > 0:
        copy = <uint8_t*>malloc(n)
        if copy is NULL:
            return False
        memcpy(copy, data, n)
    free(caller.buffer)
    caller.buffer = copy
    caller.buffer_len = n
    return True


cdef inline void server_recycle(server_t* server, body_t* body) noexcept nogil:
    """Free a body, but keep its memory for a while if it is large. Never waits."""
    cdef body_t older[SPARES]
    cdef int i, n_older = 0
    if spares_want(body, server.budget) and pthread_mutex_trylock(&server.lock) == 0:
        if not load_int(&server.is_stopping):       # then nobody would free it
            n_older = spares_keep(&server.spares, server.budget, body, older)
            if load_int(&server.spares.state) == SPARE_NONE:
                store_int(&server.spares.state, SPARE_NEW)
                loop_wake(&server.loop)
        pthread_mutex_unlock(&server.lock)
    body_free(body)
    for i in range(n_older):        # not under the lock: it takes a while
        body_free(&older[i])


cdef inline void reader_recycle(reader_t* reader, body_t* body) noexcept nogil:
    """Take back the memory of a body that went into the inbox."""
    server_recycle(server_of_reader(reader), body)


cdef inline bint server_reuse_body(server_t* server, body_t* body, size_t size) noexcept nogil:
    """Make room in memory that was kept; False when there is none that fits."""
    cdef bint is_fit
    if size < BODY_MAPPED_MIN or load_int(&server.spares.state) == SPARE_NONE:
        return False
    pthread_mutex_lock(&server.lock)
    is_fit = spares_find(&server.spares, server.budget, body, size)
    pthread_mutex_unlock(&server.lock)
    return is_fit


cdef inline void server_check_spare(server_t* server, bint is_scarce) noexcept nogil:
    """Free what was kept and not used in time, and see to it that the rest will be.

    When memory is scarce nothing is kept.
    """
    cdef body_t older[SPARES]
    cdef int i, n_older
    pthread_mutex_lock(&server.lock)
    n_older = spares_expire(&server.spares, server.budget, server.loop.now_ns, is_scarce, older)
    if server.spares.n > 0:
        loop_look_at(&server.loop, server.spares.kept[0].until_ns)
    pthread_mutex_unlock(&server.lock)
    for i in range(n_older):
        body_free(&older[i])


# -- TLS

cdef inline bint caller_is_old(caller_t* caller) noexcept nogil:
    """Tell whether others have taken the place of the credentials that a connection is of."""
    return caller.has_tls and caller.generation != load_int(&caller.server.generation)


# -- accepted heads

cdef inline void caller_learn(caller_t* caller, const uint8_t* data,
                              const http_post_t* post) noexcept nogil:
    """Accept heads of this connection that are like this one but for their length."""
    cdef uint8_t* copy = <uint8_t*>realloc(caller.known, post.head_len)
    if copy is not NULL:
        memcpy(copy, data, post.head_len)
        caller.known = copy
        caller.known_post = post[0]


cdef inline void caller_set_member(caller_t* caller, uint64_t sender) noexcept nogil:
    """Have a connection that the caller has take the turns of a member from now on.

    The caller holds the lock.
    """
    cdef member_t* member = NULL
    if caller.member.id != sender:
        member = host_join(caller.member.host, sender)
    if member is not NULL:
        turns_leave(&caller.server.turns, caller.member)
        caller.member = member


cdef inline bint server_knows(server_t* server, caller_t* caller, const uint8_t* data, size_t n,
                              http_post_t* post) noexcept nogil:
    """Tell whether Python has accepted such a head before; remember it on the connection."""
    cdef const head_t* head
    if caller.has_tls:
        return False
    pthread_mutex_lock(&server.lock)
    head = heads_find(&server.heads, data, n, post)
    if head is not NULL:
        caller_learn(caller, head.data, &head.post)
        caller_set_member(caller, head.sender)
    pthread_mutex_unlock(&server.lock)
    return head is not NULL


cdef inline void server_learn(server_t* server, const uint8_t* data, const http_post_t* post,
                              uint64_t sender) noexcept nogil:
    """Accept heads that are like this one but for their length; the oldest makes room.

    Of callers without TLS.
    """
    cdef uint8_t* copy = <uint8_t*>malloc(post.head_len)
    if copy is NULL:
        return
    memcpy(copy, data, post.head_len)
    pthread_mutex_lock(&server.lock)
    heads_add(&server.heads, copy, post, sender)
    pthread_mutex_unlock(&server.lock)
