"""A pipe: msgc, the books and the workers of one peer, and what it shares with the loop.

Source: etcd rafthttp/pipeline.go. There the four workers of a pipeline are goroutines on the
runtime's netpoller; here a worker is a connection slot with a state (``_worker.pxd``), and the loop
(``_loop.pxd``) is the netpoller.

    who                 may touch                                           guarded by
    producers           ring, books, idle stack: pipe_offer                 pipe.lock
    the loop's thread   the same; workers not in WORKER_PYTHON; fds         pipe.lock; one thread
    dispatcher threads  workers in WORKER_PYTHON; books: pipe_count         pipe.lock; the hand-over

A worker belongs to the loop or to the dispatcher, never to both. It goes over through the event
queue and comes back through ``returned``. Lock order: pipe.lock, then event_lock.

Life: a pipe is freed by its Python owner when it is detached and no worker is live. The loop
forgets a pipe (its fds, its place in every list) while it holds the pipe's lock, before the last
worker is counted out.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t, uint8_t
from libc.stdlib cimport free
from posix.uio cimport iovec

from pipeline._counters cimport books_check, books_t, follower_success, follower_t
from pipeline._http cimport HTTP_ANSWER_MAX
from pipeline._ring cimport ring_len, ring_peek, ring_t, ring_try_pop, ring_try_push
from pipeline._sync cimport (
    EPOLL_CTL_DEL, add_i64, add_int, clock_ns, epoll_ctl, list_push, load_i64, load_int,
    pthread_cond_broadcast, pthread_cond_signal, pthread_cond_t, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, pthread_t, store_int, swap_int, write,
)

cdef enum:
    # Bytes a worker writes per turn. Steps of 256 KiB cost a third more CPU than steps of 1 MiB on
    # loopback; one step of 1 MiB delays the other workers by about 0.2 ms (design section 3).
    LOOP_STEP_BYTES = 1 << 20
    LOOP_STEP_SEGMENTS = 64
    # The send buffer to a peer whose handshake took no longer: one step of the loop fills it.
    NEAR_RTT_US = 100
    SEND_BUFFER_NEAR = 1 << 20
    # Up to this a body is copied behind the head and both are sent as one piece, which costs the
    # kernel less than to gather two.
    LOOP_JOINED_MAX = 2048
    LOOP_EVENTS = 256
    # Borrowed payloads go back to Python in batches of this many jobs, bytes, or after this long.
    RELEASE_JOBS = 64
    RELEASE_BYTES = 1 << 20
    RELEASE_DELAY_NS = 100000000
    ANSWER_KNOWN_MAX = 512
    # Larger messages never take a pipe's first worker: a snapshot, or a run of large appends,
    # must not delay heartbeats and votes (design section 5).
    LARGE_MIN = 64 * 1024
    # raftpb MessageType, the three that this file treats specially (spec section 1.1).
    TYPE_PROP = 2
    TYPE_APP = 3
    TYPE_SNAP = 7

cdef enum:
    WORKER_IDLE = 0         # on the idle stack; may hold a connection
    WORKER_WRITING
    WORKER_READING          # written; waits for the answer
    WORKER_PYTHON           # an event is queued or being handled: hands off
    WORKER_RETIRED          # stopped; never used again

cdef enum:
    EVENT_NONE = 0
    EVENT_CONNECT           # a job needs a connection; one still held must be closed first
    EVENT_DIALLED           # Python's own: the dial it was asked for has ended
    EVENT_ANSWER            # an answer that http.client has to judge
    EVENT_FAILED            # error says why
    EVENT_SUCCEEDED         # 204, and Python has to hear of it
    EVENT_CLOSED            # no job; the idle connection was closed by the peer
    EVENT_HANDSHAKE         # connected; TLS is to begin
    EVENT_SEAL              # the job, or more of it, is to be encrypted
    EVENT_UNSEAL            # ciphertext has been read; without a job from an idle connection
    EVENT_CHORES            # no worker; borrowed payloads to release, Python's own tasks to run

# Causes of failure that have no errno.
cdef enum:
    ERROR_CLOSED = -1       # end of stream where an answer was due
    ERROR_RESPONSE_TIMEOUT = -2
    ERROR_STALLED = -3
    ERROR_STOPPED = -4
    ERROR_DEAD_LINK = -5    # what was sent is not acknowledged
    ERROR_HANDSHAKE_TIMEOUT = -6

# How far a connection that carries TLS has come. The loop does its I/O and keeps its deadlines;
# Python turns plaintext into ciphertext and back, one visit per piece written or read.
cdef enum:
    SEAL_NONE = 0           # it carries plain HTTP
    SEAL_CONNECTED          # the handshake is to begin
    SEAL_HANDSHAKE
    SEAL_WRITING            # a request
    SEAL_READING            # the answer; also between two requests

cdef enum:
    OFFER_ACCEPTED = 0
    OFFER_FULL = 1
    OFFER_STOPPED = 2

cdef enum:
    GIVEN_TO_LOOP = 0
    GIVEN_RETIRED = 1       # nobody touches it again
    GIVEN_NOT = 2           # it has a job and no loop any more: fail the job first

cdef enum:
    OUTCOME_SENT
    OUTCOME_FAILED

# One message on its way. A single allocation: the struct, its segments, its owners, its bytes.
cdef struct job_t:
    job_t* next             # on loop.finished
    uint64_t to
    size_t size_bytes       # of the protobuf message: Content-Length
    uint64_t number         # order of offers, over both rings of a pipe
    int64_t offered_ns      # only with limits.max_queue_age_ns
    int64_t taken_ns        # when a worker took it; latency counts from here
    int32_t type
    bint retried            # already moved once to a fresh connection
    int n_segments
    int n_owners
    iovec* segments         # the body in order; into this allocation or into an owner's memory
    void** owners           # owned PyObject*; only a thread with the GIL may drop them

cdef struct event_t:
    event_t* next
    worker_t* worker        # NULL for EVENT_CHORES
    int kind
    int error

cdef struct worker_t:
    pipe_t* pipe            # borrowed; outlives its workers
    worker_t* next          # on the idle stack, or on loop.returned
    worker_t* next_runnable
    event_t event           # at most one is under way
    job_t* job              # owned
    int index
    int state
    int fd                  # borrowed from the Python connection, which outlives its use here; -1
    bint is_registered      # fd is in the loop's epoll set
    bint is_runnable        # on loop.runnable
    bint is_reused          # fd has carried a request that was answered
    bint is_ended           # the peer has ended fd's stream
    int64_t last_used_ns
    int64_t deadline_ns     # of the present state; 0 is none
    int64_t link_check_ns   # when to look whether the peer still acknowledges
    int generation          # of the pipe when the connection was dialled
    int64_t answer_deadline_ns      # of the whole answer, however often Python looks at it
    int64_t text_deadline_ns        # of the text of an answer whose head has come; 0 is none
    bint is_odd             # http.client reads the answer: whatever comes goes to Python
    int seal                # SEAL_*
    const uint8_t* sealed   # ciphertext to write; borrowed from the Line until it gives more
    size_t sealed_len
    size_t sealed_written
    int64_t sealed_deadline_ns      # of handshake, stall or answer, however often Python is asked
    # Owned: the request head up to and with "Content-Length: ", and room for its end and for
    # LOOP_JOINED_MAX bytes of a body.
    uint8_t* head
    size_t head_fixed       # bytes of it that never change
    size_t head_len
    size_t head_for         # the length now written at its end
    size_t written          # bytes of head and body, or of their ciphertext
    int segment             # next to write, or to encrypt; 0 is the head
    size_t offset           # within it
    int answer_len
    int known_len
    uint8_t answer[HTTP_ANSWER_MAX]
    uint8_t known[ANSWER_KNOWN_MAX]     # the answer recognised last: a repeat needs no scan

cdef struct limits_t:
    int64_t queue_bytes
    int64_t response_timeout_ns
    int64_t stall_timeout_ns
    int64_t idle_timeout_ns
    int64_t dead_link_timeout_ns
    int64_t max_queue_age_ns        # 0 is none

cdef struct pipe_t:
    pthread_mutex_t lock    # guards what follows, down to the blank line
    pthread_cond_t retired  # broadcast when live falls
    ring_t msgc             # small messages
    ring_t large            # those above LARGE_MIN; both together hold msgc.cap
    int64_t large_bytes     # in the latter
    books_t books
    follower_t follower
    job_t* expired          # out of msgc, queued in the books: for Python to fail, newest first
    worker_t* idle          # stack: the warmest connection is used first
    int live                # workers not retired
    bint is_stopping        # offers are refused
    bint is_detached        # the loop has forgotten this pipe
    bint is_scheduled       # on loop.ready
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
    loop_t* loop            # outlives the pipe
    void* owner             # borrowed PyObject*: the Sender; held by the loop's registry while live

cdef struct loop_t:
    int epfd
    int wakefd
    char name[16]
    pthread_t thread
    int is_sleeping         # atomic: the loop is in, or about to enter, a wait
    int is_stopping         # atomic
    int wakers              # atomic: threads about to write to wakefd
    pipe_t* ready           # atomic lists, pushed by anyone, taken whole by the loop
    pipe_t* detached
    worker_t* returned
    job_t* finished         # atomic: jobs whose owners Python must drop
    int64_t finished_jobs   # atomic
    int64_t finished_bytes  # atomic
    int chores_queued       # atomic: the event is in the queue
    int has_expired         # atomic: some pipe has expired jobs
    int64_t queued_bytes    # atomic: of all pipes
    int64_t large_bytes     # atomic: of large messages among them
    int64_t queue_bytes     # budget for queued_bytes
    bint has_near_buffer    # the kernel grants SEND_BUFFER_NEAR; never changes

    pthread_mutex_t event_lock      # guards what follows, down to the blank line
    pthread_cond_t event_cond
    event_t* event_head
    event_t* event_tail
    int event_waiters       # dispatcher threads that wait for an event
    bint events_closed      # the dispatcher is to end

    event_t chores_event
    pipe_t* attached        # the loop's own from here on
    worker_t* runnable
    worker_t* runnable_tail
    int64_t now_ns
    int64_t next_deadline_ns        # no deadline is earlier; 0 is none
    int64_t release_due_ns          # 0 is none


cdef inline void loop_wake(loop_t* loop) noexcept nogil:
    """Make a sleeping loop look at its lists. Costs one load while it is awake."""
    cdef uint64_t one = 1
    if load_int(&loop.is_sleeping):
        add_int(&loop.wakers, 1)        # loop_stop does not close wakefd meanwhile
        if swap_int(&loop.is_sleeping, 0):
            # Edge-triggered and never read: each write is an edge, the sum cannot overflow.
            write(loop.wakefd, &one, sizeof(one))
        add_int(&loop.wakers, -1)


# -- events: from the loop to the dispatcher

cdef inline void loop_queue_event(loop_t* loop, event_t* event) noexcept nogil:
    event.next = NULL
    pthread_mutex_lock(&loop.event_lock)
    if loop.event_tail is NULL:
        loop.event_head = event
    else:
        loop.event_tail.next = event
    loop.event_tail = event
    pthread_cond_signal(&loop.event_cond)
    pthread_mutex_unlock(&loop.event_lock)


cdef inline void worker_to_python(worker_t* worker, int kind, int error) noexcept nogil:
    """Hand the worker over; the loop does not touch it again until it is returned.

    Its socket leaves the epoll set first. That Python closes it would not do: a forked child may
    hold the connection open, and events would come for a worker that is gone.
    """
    if worker.is_registered:
        epoll_ctl(worker.pipe.loop.epfd, EPOLL_CTL_DEL, worker.fd, NULL)
        worker.is_registered = False
    worker.state = WORKER_PYTHON
    worker.deadline_ns = 0
    worker.event.kind = kind
    worker.event.error = error
    worker.event.worker = worker
    loop_queue_event(worker.pipe.loop, &worker.event)


# -- the pipe: msgc and the books

cdef inline bint pipe_is_large(const pipe_t* pipe, const job_t* job) noexcept nogil:
    """Tell whether the first worker is kept from the job; a pipe's only worker is not."""
    return job.size_bytes > LARGE_MIN and pipe.n_workers > 1


cdef inline int pipe_offer(pipe_t* pipe, job_t* job, bint* is_needed) noexcept nogil:
    """Accept or refuse a job; OFFER_*. The caller holds the lock, and owns a refused job.

    ``is_needed`` is set when the loop has to look at this pipe: ``loop_wake`` is then to follow.
    """
    cdef loop_t* loop = pipe.loop
    cdef books_t* books = &pipe.books
    cdef int64_t size = <int64_t>job.size_bytes
    cdef int64_t held, held_by_all
    cdef bint is_large = pipe_is_large(pipe, job)
    cdef ring_t* ring
    books.offered += 1
    if pipe.is_stopping:
        books.refused += 1
        return OFFER_STOPPED
    # An empty queue takes one message of any size, whatever the other peers hold: a large
    # snapshot must be sendable, and a dead peer's backlog must not silence a healthy one. Small
    # messages are not refused for the bytes of large ones, which must not silence them either.
    ring = &pipe.large if is_large else &pipe.msgc
    held = <int64_t>books.queued_bytes
    held_by_all = add_i64(&loop.queued_bytes, size)
    if not is_large:
        held -= pipe.large_bytes
        held_by_all -= load_i64(&loop.large_bytes)
    if (held_by_all > loop.queue_bytes or held + size > pipe.limits.queue_bytes) \
            and (ring_len(ring) > 0 or pipe.expired is not NULL) \
            or books.queued >= pipe.msgc.cap:
        add_i64(&loop.queued_bytes, -size)
        books.refused += 1
        return OFFER_FULL
    ring_try_push(ring, job)
    if is_large:
        pipe.large_bytes += size
        add_i64(&loop.large_bytes, size)
    job.number = books.accepted
    if pipe.limits.max_queue_age_ns:
        job.offered_ns = clock_ns()
    books.accepted += 1
    books.queued += 1
    books.queued_bytes += job.size_bytes
    # Busy workers look at msgc themselves when they finish; only an idle one needs the loop.
    if pipe.idle is not NULL and not pipe.is_scheduled:
        pipe.is_scheduled = True
        list_push(&loop.ready, &pipe.next_ready, pipe)
        is_needed[0] = True
    books_check(books)
    return OFFER_ACCEPTED


cdef inline int pipe_offer_locked(pipe_t* pipe, job_t* job) noexcept nogil:
    """Offer a job and let go of the lock, which the caller has taken; OFFER_*."""
    cdef bint is_needed = False
    cdef int rc = pipe_offer(pipe, job, &is_needed)
    pthread_mutex_unlock(&pipe.lock)
    if is_needed:       # not under the lock, which the loop is about to want
        loop_wake(pipe.loop)
    return rc


cdef inline job_t* pipe_pop(pipe_t* pipe, bint with_large) noexcept nogil:
    """Take the oldest job out of msgc, or NULL; the books are the caller's, who holds the lock."""
    cdef job_t* job = <job_t*>ring_peek(&pipe.msgc)
    cdef job_t* large = <job_t*>ring_peek(&pipe.large) if with_large else NULL
    if large is not NULL and (job is NULL or large.number < job.number):
        return <job_t*>ring_try_pop(&pipe.large)
    return <job_t*>ring_try_pop(&pipe.msgc)


cdef inline void pipe_count_taken(pipe_t* pipe, const job_t* job) noexcept nogil:
    """Write into the books that a queued job is in flight. The caller holds the lock."""
    pipe.books.queued -= 1
    pipe.books.queued_bytes -= job.size_bytes
    add_i64(&pipe.loop.queued_bytes, -<int64_t>job.size_bytes)
    if pipe_is_large(pipe, job):
        pipe.large_bytes -= <int64_t>job.size_bytes
        add_i64(&pipe.loop.large_bytes, -<int64_t>job.size_bytes)
    pipe.books.in_flight += 1


cdef inline job_t* pipe_take(pipe_t* pipe, bint with_large) noexcept nogil:
    """Move the oldest queued job into flight, or NULL. The caller holds the lock."""
    cdef job_t* job = pipe_pop(pipe, with_large)
    if job is not NULL:
        pipe_count_taken(pipe, job)
    return job


cdef inline void pipe_expire(pipe_t* pipe, int64_t now_ns) noexcept nogil:
    """Leave jobs that waited too long to Python, which fails them. The caller holds the lock.

    Differs from etcd: if asked for; etcd sends a message however old.
    They need no worker: a backlog goes even while all workers are busy with a peer that is dead.
    Until Python has them they count as queued, so that what is held keeps its bounds.
    """
    cdef int64_t oldest_ns = now_ns - pipe.limits.max_queue_age_ns
    cdef job_t* small
    cdef job_t* large
    cdef job_t* job
    if pipe.limits.max_queue_age_ns == 0:
        return
    while True:
        small = <job_t*>ring_peek(&pipe.msgc)
        large = <job_t*>ring_peek(&pipe.large)
        if (small is NULL or small.offered_ns > oldest_ns) \
                and (large is NULL or large.offered_ns > oldest_ns):
            return
        job = pipe_pop(pipe, True)      # the older one of the two
        job.next = pipe.expired
        pipe.expired = job
        store_int(&pipe.loop.has_expired, 1)
        loop_queue_chores(pipe.loop)


cdef inline void pipe_check_age(pipe_t* pipe, int64_t now_ns) noexcept nogil:
    """Expire what waits for busy workers, and note when to look again."""
    cdef int64_t age_ns = pipe.limits.max_queue_age_ns
    cdef job_t* job
    cdef int i
    if age_ns == 0:
        return
    pthread_mutex_lock(&pipe.lock)
    pipe_expire(pipe, now_ns)
    job = <job_t*>ring_peek(&pipe.msgc)
    if job is not NULL:
        loop_look_at(pipe.loop, job.offered_ns + age_ns)
    job = <job_t*>ring_peek(&pipe.large)
    if job is not NULL:
        loop_look_at(pipe.loop, job.offered_ns + age_ns)
    pthread_mutex_unlock(&pipe.lock)
    for i in range(pipe.n_workers):     # what is offered from now on may have to wait for it
        if pipe.workers[i].state != WORKER_IDLE:
            loop_look_at(pipe.loop, now_ns + age_ns)
            return


cdef inline void pipe_count(pipe_t* pipe, const job_t* job, int outcome,
                            int64_t latency_ns) noexcept nogil:
    """Write a job's one outcome into the books. The caller holds the lock."""
    pipe.books.in_flight -= 1
    if outcome == OUTCOME_SENT:
        if job.type == TYPE_APP:
            follower_success(&pipe.follower, latency_ns)
        pipe.books.sent += 1
        pipe.books.sent_bytes += job.size_bytes
    else:
        pipe.books.failed += 1
    books_check(&pipe.books)


cdef inline job_t* pipe_begin_stop(pipe_t* pipe) noexcept nogil:
    """Refuse offers, have the loop forget the pipe, drop what is queued: a list, for the caller.

    NULL, and nothing done, when the pipe is stopping already.
    """
    cdef job_t* job
    cdef job_t* first = NULL
    pthread_mutex_lock(&pipe.lock)
    if not pipe.is_stopping:
        pipe.is_stopping = True
        job = pipe_take(pipe, True)
        while job is not NULL:
            pipe.books.in_flight -= 1
            pipe.books.dropped += 1
            job.next = first
            first = job
            job = pipe_take(pipe, True)
        while pipe.expired is not NULL:     # Raft will not hear of these any more
            job = pipe.expired
            pipe.expired = job.next
            pipe_count_taken(pipe, job)
            pipe.books.in_flight -= 1
            pipe.books.dropped += 1
            job.next = first
            first = job
        books_check(&pipe.books)
        list_push(&pipe.loop.detached, &pipe.next_detached, pipe)
    pthread_mutex_unlock(&pipe.lock)
    loop_wake(pipe.loop)
    return first


cdef inline void pipe_retire_connections(pipe_t* pipe) noexcept nogil:
    """Have workers dial anew before their next job, and idle ones close what they have."""
    cdef bint is_needed = False
    add_int(&pipe.generation, 1)
    pthread_mutex_lock(&pipe.lock)
    if not pipe.is_stopping:
        pipe.is_retiring = True
        if not pipe.is_scheduled:
            pipe.is_scheduled = is_needed = True
            list_push(&pipe.loop.ready, &pipe.next_ready, pipe)
    pthread_mutex_unlock(&pipe.lock)
    if is_needed:
        loop_wake(pipe.loop)


cdef inline void worker_retire(worker_t* worker) noexcept nogil:
    """Count a worker out for good. The caller holds the lock."""
    worker.state = WORKER_RETIRED
    worker.pipe.live -= 1
    pthread_cond_broadcast(&worker.pipe.retired)


# -- what pipe and workers want of the loop

cdef inline void loop_look_at(loop_t* loop, int64_t at_ns) noexcept nogil:
    """See to it that deadlines are checked at ``at_ns`` at the latest; 0 is never."""
    if at_ns and (loop.next_deadline_ns == 0 or at_ns < loop.next_deadline_ns):
        loop.next_deadline_ns = at_ns


cdef inline void loop_add_runnable(loop_t* loop, worker_t* worker) noexcept nogil:
    """Let a worker write on in the next turn."""
    if worker.is_runnable:
        return
    worker.is_runnable = True
    worker.next_runnable = NULL
    if loop.runnable is NULL:
        loop.runnable = worker
    else:
        loop.runnable_tail.next_runnable = worker
    loop.runnable_tail = worker


cdef inline void loop_job_done(loop_t* loop, job_t* job) noexcept nogil:
    """Free a job; one that borrows is left for Python, in batches."""
    if job.n_owners == 0:
        free(job)
        return
    add_i64(&loop.finished_bytes, <int64_t>job.size_bytes)
    add_i64(&loop.finished_jobs, 1)
    list_push(&loop.finished, &job.next, job)
    if loop.release_due_ns == 0:
        loop.release_due_ns = loop.now_ns + RELEASE_DELAY_NS
    if load_i64(&loop.finished_jobs) >= RELEASE_JOBS \
            or load_i64(&loop.finished_bytes) >= RELEASE_BYTES:
        loop.release_due_ns = 0
        loop_queue_chores(loop)


cdef inline void loop_queue_chores(loop_t* loop) noexcept nogil:
    """Have a dispatcher thread see to the chores, if none is about to."""
    if not swap_int(&loop.chores_queued, 1):
        loop.chores_event.kind = EVENT_CHORES
        loop_queue_event(loop, &loop.chores_event)
