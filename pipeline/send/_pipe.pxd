"""A pipe: the channel and the workers of one peer, and what it shares with the loop.

Source: etcd rafthttp/pipeline.go. There the four workers of a pipeline are goroutines on the
runtime's netpoller; here a worker is a connection slot with a state (``_worker.pxd``), and the loop
(``_sending.pxd``) is the netpoller.

    who                 may touch                                           guarded by
    producers           channel, idle stack: pipe_offer                     pipe.lock
    the loop's thread   the same; workers not in WORKER_PYTHON; fds         pipe.lock; one thread
    dispatcher threads  workers in WORKER_PYTHON; books: pipe_count         pipe.lock; the hand-over
    the poller          the same workers, while they are without connection the hand-over

A worker belongs to the loop, to a dispatcher thread or to the poller, never to two of them. It goes
over through a queue of events, of which the poller has one of its own, and comes back through
``returned``. Lock order: pipe.lock, then event_lock.

Life: a pipe is freed by its Python owner when it is detached and no worker is live. The loop
forgets a pipe (its fds, its place in every list) while it holds the pipe's lock, before the last
worker is counted out.
"""

from libc.stdint cimport int64_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pipeline.send._books cimport OUTCOME_SENT, follower_success, follower_t
from pipeline.send._channel cimport (
    OFFER_ACCEPTED, channel_drop_all, channel_expire, channel_expires_at, channel_free,
    channel_init, channel_limits_t, channel_offer, channel_settle, channel_t, job_t, queue_budget_t,
)
from pipeline.net._cursor cimport cursor_t
from pipeline.wire._http cimport HTTP_ANSWER_MAX
from pipeline.wire._types cimport TYPE_APP
from pipeline.net._conn cimport conn_t
from pipeline.net._loop cimport loop_look_at, loop_t, loop_wake
from pipeline._system cimport (
    add_i64, add_int, cond_init_monotonic, invariant, list_push, load_i64, load_int,
    pthread_cond_destroy, pthread_cond_signal, pthread_cond_t, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t,
    store_int, swap_int, write,
)

cdef enum:
    # Bytes a worker writes per turn. Steps of 256 KiB cost a third more CPU than steps of 1 MiB on
    # loopback; one step of 1 MiB delays the other workers by about 0.2 ms.
    WORKER_STEP_BYTES = 1 << 20
    # A peer whose TCP handshake took at most so long gets a send buffer of one step's size.
    NEAR_RTT_US = 100
    SEND_BUFFER_NEAR = 1 << 20
    # Up to this a body is copied behind the head and both are sent as one piece, which costs the
    # kernel less than to gather two.
    WORKER_JOINED_MAX = 2048
    # Borrowed payloads go back to Python in batches of this many jobs, bytes, or after this long.
    RELEASE_JOBS = 64
    RELEASE_BYTES = 1 << 20
    RELEASE_DELAY_NS = 100000000
    ANSWER_KNOWN_MAX = 512
    # Larger messages never take a pipe's first worker: a snapshot, or a run of large appends,
    # must not delay heartbeats and votes.
    LARGE_MIN = 64 * 1024

# Changed by worker_set_state alone.
cdef enum:
    WORKER_IDLE = 0         # on the idle stack; may hold a connection
    WORKER_WRITING
    WORKER_READING          # written; waits for the answer
    WORKER_PYTHON           # an event is queued or being handled: hands off
    WORKER_RETIRED          # stopped; never used again

# What Python is wanted for. Those of streams are ``stream/_streams.pxd``'s.
cdef enum:
    EVENT_NONE = 0
    EVENT_CONNECT           # a job needs a connection; one still held must be closed first
    EVENT_NOT_DIALLED       # Python's own: there is no connection for the job
    EVENT_ANSWER            # an answer that http.client has to judge
    EVENT_FAILED            # error says why
    EVENT_SUCCEEDED         # 204, and Python has to hear of it
    EVENT_CLOSED            # no job; the idle connection was closed by the peer
    EVENT_TASKS             # nobody's; there are tasks for Python, releasing payloads among them
    EVENT_HEAD              # a stream: the answer to its dial has come
    EVENT_LOST              # a stream has ended

# Causes of failure that have no errno.
cdef enum:
    ERROR_CLOSED = -1       # end of stream where an answer was due
    ERROR_RESPONSE_TIMEOUT = -2
    ERROR_STALLED = -3
    ERROR_STOPPED = -4
    ERROR_DEAD_LINK = -5    # what was sent is not acknowledged

cdef enum:
    GIVEN_TO_LOOP = 0
    GIVEN_RETIRED = 1       # nobody touches it again
    GIVEN_NOT = 2           # it has a job and no loop any more: fail the job first

cdef struct event_t:
    event_t* next
    # Borrowed PyObject*: whose it is, a Worker or one end of a stream, kept alive by the loop's
    # registry; NULL for EVENT_TASKS.
    void* subject
    int kind
    int error

cdef struct worker_t:
    # First. Descriptor and TLS are borrowed from the Python connection, which outlives their use
    # here.
    conn_t conn
    pipe_t* pipe            # borrowed; outlives its workers
    worker_t* next          # on the idle stack
    event_t event           # at most one is under way
    job_t* job              # owned
    int index
    int state
    bint is_reused          # the connection has carried a request that was answered
    bint is_ended           # the peer has ended its stream
    int64_t last_used_ns
    int64_t deadline_ns     # of the present state; 0 is none
    int64_t link_check_ns   # when to look whether the peer still acknowledges
    int generation          # of the pipe when the connection was dialled
    int64_t answer_deadline_ns      # of the whole answer, however often Python looks at it
    int64_t text_deadline_ns        # of the text of an answer whose head has come; 0 is none
    int is_odd              # http.client reads the answer: whatever comes goes to Python
    # Owned: the request head up to and with "Content-Length: ", and room for its end and for
    # WORKER_JOINED_MAX bytes of a body.
    uint8_t* head
    size_t head_fixed       # bytes of it that never change
    size_t head_len
    size_t head_for         # the length now written at its end
    size_t written          # bytes of head and body; with TLS those of whole records
    cursor_t cursor         # in the job's segments: what is next to write
    int answer_len
    int known_len
    uint8_t answer[HTTP_ANSWER_MAX]
    uint8_t known[ANSWER_KNOWN_MAX]     # the answer recognised last: a repeat needs no scan

cdef struct limits_t:
    int64_t response_timeout_ns
    int64_t stall_timeout_ns
    int64_t idle_timeout_ns
    int64_t dead_link_timeout_ns

cdef struct pipe_t:
    pthread_mutex_t lock    # guards what follows, down to the blank line
    pthread_cond_t retired  # broadcast when live falls
    channel_t channel
    follower_t follower
    worker_t* idle          # stack: the warmest connection is used first
    int live                # workers not retired
    bint is_detached        # the loop has forgotten this pipe
    bint is_scheduled       # on sending.ready
    bint is_retiring        # idle connections of an earlier generation are to be closed

    pipe_t* next_ready
    pipe_t* next_detached
    pipe_t* next_attached   # the loop's own list of pipes it has seen
    bint is_attached
    worker_t* workers       # owned array
    int n_workers
    limits_t limits
    int generation          # atomic: raised when another URL is to be used
    int* active             # owned by Python's ActiveFlag, which outlives the pipe
    sending_t* sending      # outlives the pipe
    void* owner             # borrowed PyObject*: the Sender; held by the loop's registry while live

# What else a sending loop runs: the streams of its node.
cdef struct guest_t:
    # Called once a turn, after what has happened was seen to.
    void (*turn)(guest_t* guest) noexcept nogil
    # Asked once the loop has said that it sleeps: whether it has not been told anything before.
    bint (*may_sleep)(guest_t* guest) noexcept nogil
    bint is_busy            # the loop is not to sleep, but to look for what has come

# A node's sending loop: whose it is to run, and the lists it goes through between two waits.
cdef struct sending_t:
    loop_t loop
    guest_t* guest          # borrowed, set before the thread starts; NULL is none
    char name[16]
    pthread_t thread
    int is_stopping         # atomic
    pipe_t* ready           # atomic lists, pushed by anyone, taken whole by the loop
    pipe_t* detached
    job_t* finished         # atomic: jobs whose owners Python must drop
    int64_t finished_jobs   # atomic
    int64_t finished_bytes  # atomic
    int tasks_queued        # atomic: the event is in the queue
    int has_expired         # atomic: some pipe has expired jobs
    queue_budget_t budget   # of all pipes' channels
    bint has_near_buffer    # the kernel grants SEND_BUFFER_NEAR; never changes

    pthread_mutex_t event_lock      # guards what follows, down to the blank line
    pthread_cond_t event_cond
    event_t* event_head
    event_t* event_tail
    int event_waiters       # dispatcher threads that wait for an event
    bint events_closed      # the dispatcher is to end
    event_t* connect_head   # for the poller: EVENT_CONNECT and EVENT_CLOSED
    event_t* connect_tail

    # Borrowed while the thread runs: the eventfd that the poller waits for.
    int poller_fd
    event_t tasks_event
    pipe_t* attached        # the loop's own from here on
    int64_t release_due_ns          # 0 is none


# -- events: from the loop to the dispatcher, and to the poller

cdef inline void sending_queue_event(sending_t* sending, event_t* event) noexcept nogil:
    event.next = NULL
    pthread_mutex_lock(&sending.event_lock)
    if sending.event_tail is NULL:
        sending.event_head = event
    else:
        sending.event_tail.next = event
    sending.event_tail = event
    pthread_cond_signal(&sending.event_cond)
    pthread_mutex_unlock(&sending.event_lock)


cdef inline void sending_queue_connect(sending_t* sending, event_t* event) noexcept nogil:
    """Leave a connection to the poller, to be dialled or closed. By the loop's thread."""
    cdef uint64_t one = 1
    cdef bint is_first
    event.next = NULL
    pthread_mutex_lock(&sending.event_lock)
    is_first = sending.connect_head is NULL
    if is_first:
        sending.connect_head = event
    else:
        sending.connect_tail.next = event
    sending.connect_tail = event
    pthread_mutex_unlock(&sending.event_lock)
    if is_first:        # the poller takes all there are
        write(sending.poller_fd, &one, sizeof(one))


# -- the pipe: what is offered, and whoever is idle

cdef inline int pipe_init(pipe_t* pipe, sending_t* sending, int n_workers,
                          channel_limits_t* channel_limits, const limits_t* limits, int* active,
                          void* owner) noexcept nogil:
    """Make a pipe with idle workers and no connections; 0, or -1 without memory.

    ``channel_limits.large_min`` is the pipe's to say: its only worker takes whatever there is.
    """
    cdef int i
    memset(pipe, 0, sizeof(pipe_t))
    pipe.sending = sending
    pipe.limits = limits[0]
    pipe.active = active
    pipe.owner = owner
    channel_limits.large_min = LARGE_MIN if n_workers > 1 else <size_t>-1
    pipe.workers = <worker_t*>calloc(n_workers, sizeof(worker_t))
    if pipe.workers is NULL or channel_init(&pipe.channel, channel_limits, &sending.budget) != 0:
        free(pipe.workers)
        return -1
    pthread_mutex_init(&pipe.lock, NULL)
    cond_init_monotonic(&pipe.retired)
    pipe.n_workers = pipe.live = n_workers
    for i in range(n_workers):      # the first worker ends up last on the stack
        pipe.workers[i].pipe = pipe
        pipe.workers[i].index = i
        pipe.workers[i].conn.io.fd = -1
        pipe.workers[i].next = pipe.idle
        pipe.idle = &pipe.workers[i]
    return 0


cdef inline void pipe_free(pipe_t* pipe) noexcept nogil:
    """Free a pipe that was never used, or is detached with no worker live and no job left."""
    cdef int i
    for i in range(pipe.n_workers):
        invariant(pipe.workers[i].job is NULL)
        free(pipe.workers[i].head)
    free(pipe.workers)
    channel_free(&pipe.channel)
    pthread_cond_destroy(&pipe.retired)
    pthread_mutex_destroy(&pipe.lock)


cdef inline int pipe_offer(pipe_t* pipe, job_t* job) noexcept nogil:
    """Accept or refuse a job, and let go of the lock, which the caller has taken; OFFER_*.

    The caller owns a refused job.
    """
    cdef bint is_needed = False
    cdef int rc = channel_offer(&pipe.channel, job)
    # Busy workers look at msgc themselves when they finish; only an idle one needs the loop.
    if rc == OFFER_ACCEPTED and pipe.idle is not NULL and not pipe.is_scheduled:
        pipe.is_scheduled = is_needed = True
        list_push(&pipe.sending.ready, &pipe.next_ready, pipe)
    pthread_mutex_unlock(&pipe.lock)
    if is_needed:       # not under the lock, which the loop is about to want
        loop_wake(&pipe.sending.loop)
    return rc


cdef inline void pipe_expire(pipe_t* pipe, int64_t now_ns) noexcept nogil:
    """Leave jobs that waited too long to Python, which fails them. The caller holds the lock."""
    if channel_expire(&pipe.channel, now_ns):
        store_int(&pipe.sending.has_expired, 1)
        sending_queue_tasks(pipe.sending)


cdef inline void pipe_check_age(pipe_t* pipe, int64_t now_ns) noexcept nogil:
    """Expire what waits for busy workers, and note when to look again."""
    cdef int64_t age_ns = pipe.channel.limits.max_age_ns
    cdef int i
    if age_ns == 0:
        return
    pthread_mutex_lock(&pipe.lock)
    pipe_expire(pipe, now_ns)
    loop_look_at(&pipe.sending.loop, channel_expires_at(&pipe.channel))
    pthread_mutex_unlock(&pipe.lock)
    for i in range(pipe.n_workers):     # what is offered from now on may have to wait for it
        if load_int(&pipe.workers[i].state) != WORKER_IDLE:
            loop_look_at(&pipe.sending.loop, now_ns + age_ns)
            return


cdef inline void pipe_count(pipe_t* pipe, const job_t* job, int outcome,
                            int64_t latency_ns) noexcept nogil:
    """Write a job's one outcome into the books. The caller holds the lock."""
    if outcome == OUTCOME_SENT and job.type == TYPE_APP:
        follower_success(&pipe.follower, latency_ns)
    channel_settle(&pipe.channel, job, outcome)


cdef inline job_t* pipe_begin_stop(pipe_t* pipe) noexcept nogil:
    """Refuse offers, have the loop forget the pipe, drop what is queued: a list, for the caller.

    NULL, and nothing done, when the pipe is stopping already.
    """
    cdef job_t* first = NULL
    pthread_mutex_lock(&pipe.lock)
    if not pipe.channel.is_stopping:
        first = channel_drop_all(&pipe.channel)
        list_push(&pipe.sending.detached, &pipe.next_detached, pipe)
    pthread_mutex_unlock(&pipe.lock)
    loop_wake(&pipe.sending.loop)
    return first


cdef inline void pipe_retire_connections(pipe_t* pipe) noexcept nogil:
    """Have workers dial anew before their next job, and idle ones close what they have."""
    cdef bint is_needed = False
    add_int(&pipe.generation, 1)
    pthread_mutex_lock(&pipe.lock)
    if not pipe.channel.is_stopping:
        pipe.is_retiring = True
        if not pipe.is_scheduled:
            pipe.is_scheduled = is_needed = True
            list_push(&pipe.sending.ready, &pipe.next_ready, pipe)
    pthread_mutex_unlock(&pipe.lock)
    if is_needed:
        loop_wake(&pipe.sending.loop)


# -- what pipe and workers want of the loop

cdef inline void sending_job_done(sending_t* sending, job_t* job) noexcept nogil:
    """Free a job; one that borrows is left for Python, in batches."""
    if job.n_owners == 0:
        free(job)
        return
    add_i64(&sending.finished_bytes, <int64_t>job.size_bytes)
    add_i64(&sending.finished_jobs, 1)
    list_push(&sending.finished, &job.next, job)
    if sending.release_due_ns == 0:
        sending.release_due_ns = sending.loop.now_ns + RELEASE_DELAY_NS
    if load_i64(&sending.finished_jobs) >= RELEASE_JOBS \
            or load_i64(&sending.finished_bytes) >= RELEASE_BYTES:
        sending.release_due_ns = 0
        sending_queue_tasks(sending)


cdef inline void sending_queue_tasks(sending_t* sending) noexcept nogil:
    """Have a dispatcher thread do what tasks there are, if none is about to."""
    if not swap_int(&sending.tasks_queued, 1):
        sending.tasks_event.kind = EVENT_TASKS
        sending_queue_event(sending, &sending.tasks_event)
