"""The I/O loop: one native thread that runs the workers of all pipes, and never takes the GIL.

Source: etcd rafthttp/pipeline.go. There the four workers of a pipeline are goroutines on the
runtime's netpoller; here a worker is a connection slot with a state, and the loop is the netpoller.

    who                 may touch                                           guarded by
    producers           ring, books, idle stack: pipe_offer                 pipe.lock
    the loop's thread   the same; workers not in WORKER_PYTHON; fds         pipe.lock; one thread
    dispatcher threads  workers in WORKER_PYTHON; books: pipe_finish        pipe.lock; the hand-over

A worker belongs to the loop or to the dispatcher, never to both. It goes over through the event
queue and comes back through ``returned``. Lock order: pipe.lock, then event_lock.

Life: a pipe is freed by its Python owner when it is detached and no worker is live. The loop
forgets a pipe (its fds, its place in every list) while it holds the pipe's lock, before the last
worker is counted out.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from posix.uio cimport iovec

from pipeline._counters cimport books_check, books_t, follower_success, follower_t
from pipeline._http cimport (
    HTTP_ANSWER_MAX, HTTP_LENGTH_MAX, HTTP_MORE, HTTP_ODD, http_end_head, http_recognise_204,
)
from pipeline._ring cimport (
    RING_OK, ring_free, ring_init, ring_len, ring_peek, ring_t, ring_try_pop, ring_try_push,
)
from pipeline._sync cimport (
    EAGAIN, ECONNRESET, EFD_CLOEXEC, EFD_NONBLOCK, EINTR, ENOTCONN, EPIPE, EPOLLERR, EPOLLET,
    EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SOL_SOCKET, SO_ERROR, TCP_INFO, add_i64,
    add_int, cas_ptr, clock_ns, close, cond_init_monotonic, epoll_create1, epoll_ctl, epoll_event,
    epoll_wait, errno, eventfd, getsockopt, invariant, load_i64, load_int, load_ptr, msghdr,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_cond_t, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, pthread_t, recv, sched_yield, send, sendmsg, socklen_t, store_int,
    swap_int, swap_ptr, tcp_info, thread_start, write,
)

cdef enum:
    # Bytes a worker writes per turn. Steps of 256 KiB cost twice the CPU of 1 MiB steps on
    # loopback; one step of 1 MiB delays the other workers by about 0.2 ms (design section 3).
    LOOP_STEP_BYTES = 1 << 20
    LOOP_STEP_SEGMENTS = 64
    # Up to this a body is copied behind the head and both are sent as one piece, which costs the
    # kernel less than to gather two.
    LOOP_JOINED_MAX = 2048
    LOOP_EVENTS = 256
    # Borrowed payloads go back to Python in batches of this many jobs, bytes, or after this long.
    RELEASE_JOBS = 64
    RELEASE_BYTES = 1 << 20
    RELEASE_DELAY_NS = 100000000
    ANSWER_KNOWN_MAX = 512
    # What is sent on a live link is acknowledged within this: a round trip, a delayed ACK.
    LINK_ANSWER_MS = 500
    # Larger messages never take a pipe's first worker: a snapshot, or a run of large appends,
    # must not delay heartbeats and votes (design section 5).
    LARGE_MIN = 64 * 1024
    # raftpb MessageType, the three that this file treats specially (spec section 1.1).
    TYPE_PROP = 2
    TYPE_APP = 3
    TYPE_SNAP = 7

cdef enum:
    WORKER_IDLE = 0         # on the idle stack; may hold a connection
    WORKER_CONNECTING       # a connect() is under way
    WORKER_WRITING
    WORKER_READING          # written; waits for the answer
    WORKER_PYTHON           # an event is queued or being handled: hands off
    WORKER_RETIRED          # stopped; never used again

cdef enum:
    EVENT_NONE = 0
    EVENT_CONNECT           # a job needs a connection; one still held must be closed first
    EVENT_CONNECT_FAILED    # error says why; there may be another address
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
    ERROR_DIAL_TIMEOUT = -4
    ERROR_STOPPED = -5
    ERROR_DEAD_LINK = -6    # what was sent is not acknowledged
    ERROR_HANDSHAKE_TIMEOUT = -7

# How far a connection that carries TLS has come. The loop does its I/O and keeps its deadlines;
# Python turns plaintext into ciphertext and back, one visit per piece written or read.
cdef enum:
    SEAL_NONE = 0           # it carries plain HTTP
    SEAL_CONNECTING
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


# -- lists that anyone pushes and one thread takes whole, so that there is no ABA

cdef inline void push_ready(loop_t* loop, pipe_t* pipe) noexcept nogil:
    cdef void* head = load_ptr(<void**>&loop.ready)
    while True:
        pipe.next_ready = <pipe_t*>head
        if cas_ptr(<void**>&loop.ready, &head, <void*>pipe):
            return


cdef inline void push_detached(loop_t* loop, pipe_t* pipe) noexcept nogil:
    cdef void* head = load_ptr(<void**>&loop.detached)
    while True:
        pipe.next_detached = <pipe_t*>head
        if cas_ptr(<void**>&loop.detached, &head, <void*>pipe):
            return


cdef inline void push_returned(loop_t* loop, worker_t* worker) noexcept nogil:
    cdef void* head = load_ptr(<void**>&loop.returned)
    while True:
        worker.next = <worker_t*>head
        if cas_ptr(<void**>&loop.returned, &head, <void*>worker):
            return


cdef inline void push_finished(loop_t* loop, job_t* job) noexcept nogil:
    cdef void* head = load_ptr(<void**>&loop.finished)
    while True:
        job.next = <job_t*>head
        if cas_ptr(<void**>&loop.finished, &head, <void*>job):
            return


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
        push_ready(loop, pipe)
        is_needed[0] = True
    books_check(books)
    return OFFER_ACCEPTED


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
        push_detached(pipe.loop, pipe)
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
            push_ready(pipe.loop, pipe)
    pthread_mutex_unlock(&pipe.lock)
    if is_needed:
        loop_wake(pipe.loop)


cdef inline void worker_retire(worker_t* worker) noexcept nogil:
    """Count a worker out for good. The caller holds the lock."""
    worker.state = WORKER_RETIRED
    worker.pipe.live -= 1
    pthread_cond_broadcast(&worker.pipe.retired)


# -- the worker: connect, write, read

cdef inline void loop_look_at(loop_t* loop, int64_t at_ns) noexcept nogil:
    """See to it that deadlines are checked at ``at_ns`` at the latest; 0 is never."""
    if at_ns and (loop.next_deadline_ns == 0 or at_ns < loop.next_deadline_ns):
        loop.next_deadline_ns = at_ns


cdef inline void worker_set_deadline(worker_t* worker, int64_t deadline_ns) noexcept nogil:
    """Set the deadline of the present state; the link is watched in every state with a job."""
    worker.deadline_ns = deadline_ns
    loop_look_at(worker.pipe.loop, deadline_ns)
    loop_look_at(worker.pipe.loop, worker.link_check_ns)


cdef inline bint worker_link_is_dead(worker_t* worker) noexcept nogil:
    """Tell whether the peer has not acknowledged anything for too long although it should have.

    Not TCP_USER_TIMEOUT, which also ends a connection whose live peer does not read for a while:
    that is for the stall timeout. A peer that owes no acknowledgement is probed by keepalive.
    """
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    if getsockopt(worker.fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0:
        return False
    if <int64_t>info.tcpi_last_ack_recv * 1000000 < worker.pipe.limits.dead_link_timeout_ns:
        return False
    # A live peer with a closed window answers each retransmission, and each probe, however far
    # apart back-off puts them.
    return info.tcpi_probes >= 2 or (
        info.tcpi_unacked > 0
        and info.tcpi_last_ack_recv > info.tcpi_last_data_sent + LINK_ANSWER_MS)


cdef inline bint worker_may_retry(worker_t* worker, int error) noexcept nogil:
    """Tell whether the job goes once more, on a fresh connection; if so, it is the last time.

    Differs from etcd: Go repeats a request only if none of its bytes were written. etcd closes
    connections it has not read from for 5 s, and a request may just be on its way: when a reused
    connection ends before the first byte of an answer, the request is made once more. Never a
    MsgProp of which a byte may have left: proposals are not idempotent.
    """
    cdef job_t* job = worker.job
    if error != ERROR_CLOSED and error != EPIPE and error != ECONNRESET and error != ENOTCONN:
        return False
    if not worker.is_reused or worker.is_odd or job.retried \
            or (job.type == TYPE_PROP and worker.written > 0):
        return False
    job.retried = True
    return True


cdef inline void worker_fail(worker_t* worker, int error) noexcept nogil:
    """Give a worker whose I/O failed to Python: once more on a fresh connection, or for good."""
    if worker.state == WORKER_CONNECTING:
        worker_to_python(worker, EVENT_CONNECT_FAILED, error)
    elif worker.answer_len == 0 and worker_may_retry(worker, error):
        worker_to_python(worker, EVENT_CONNECT, error)
    else:
        worker_to_python(worker, EVENT_FAILED, error)


cdef inline void worker_write(worker_t* worker) noexcept nogil:
    """Write head and body until done, until the socket is full, or for one step."""
    cdef loop_t* loop = worker.pipe.loop
    cdef job_t* job = worker.job
    cdef iovec iov[LOOP_STEP_SEGMENTS]
    cdef msghdr message
    cdef int n, segment
    cdef size_t offset, step, room, left
    cdef ssize_t written
    cdef size_t budget = LOOP_STEP_BYTES
    memset(&message, 0, sizeof(message))
    message.msg_iov = iov
    worker.state = WORKER_WRITING
    while worker.segment <= job.n_segments:
        n = 0
        step = 0
        segment = worker.segment
        offset = worker.offset
        while segment <= job.n_segments and n < LOOP_STEP_SEGMENTS and step < budget:
            if segment == 0:
                iov[n].iov_base = worker.head + offset
                room = worker.head_len - offset
            else:
                iov[n].iov_base = <uint8_t*>job.segments[segment - 1].iov_base + offset
                room = job.segments[segment - 1].iov_len - offset
            if room > budget - step:
                room = budget - step
            iov[n].iov_len = room
            step += room
            n += 1
            segment += 1
            offset = 0
        if worker.written == 0 and job.n_segments == 1 and job.size_bytes <= LOOP_JOINED_MAX:
            memcpy(worker.head + worker.head_len, job.segments[0].iov_base, job.size_bytes)
            written = send(worker.fd, worker.head, step, MSG_NOSIGNAL | MSG_DONTWAIT)
        else:
            message.msg_iovlen = n
            written = sendmsg(worker.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if written < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                if budget != LOOP_STEP_BYTES or worker.deadline_ns == 0:
                    worker_set_deadline(worker, loop.now_ns + worker.pipe.limits.stall_timeout_ns)
                return
            worker_write_failed(worker, errno)
            return
        worker.written += written
        left = written
        budget -= left
        while left > 0:
            if worker.segment == 0:
                room = worker.head_len - worker.offset
            else:
                room = job.segments[worker.segment - 1].iov_len - worker.offset
            if left < room:
                worker.offset += left
                break
            left -= room
            worker.segment += 1
            worker.offset = 0
        # Empty segments (an empty body) are passed over by the byte count alone.
        while 0 < worker.segment <= job.n_segments \
                and job.segments[worker.segment - 1].iov_len == worker.offset:
            worker.segment += 1
            worker.offset = 0
        if budget == 0 and worker.segment <= job.n_segments:
            worker_set_deadline(worker, loop.now_ns + worker.pipe.limits.stall_timeout_ns)
            loop_add_runnable(loop, worker)
            return
    worker.state = WORKER_READING
    # Differs from etcd: it waits for ever, and a black hole keeps its worker.
    worker.answer_deadline_ns = loop.now_ns + worker.pipe.limits.response_timeout_ns
    # The peer may take its time over a snapshot.
    worker_set_deadline(worker, 0 if job.type == TYPE_SNAP else worker.answer_deadline_ns)


cdef inline void worker_write_failed(worker_t* worker, int error) noexcept nogil:
    """A write failed; the peer may have said why (413, 412) before it closed."""
    cdef ssize_t n = recv(worker.fd, worker.answer, HTTP_ANSWER_MAX, MSG_DONTWAIT)
    if n > 0:
        worker.answer_len = <int>n
        worker.answer_deadline_ns = \
            worker.pipe.loop.now_ns + worker.pipe.limits.response_timeout_ns
        if worker.seal == SEAL_NONE:
            worker_to_python(worker, EVENT_ANSWER, 0)
            return
        if worker.seal == SEAL_WRITING:     # it may be session tickets, and the answer behind them
            worker.seal = SEAL_READING
            worker.sealed_deadline_ns = worker.answer_deadline_ns
        worker_to_python(worker, EVENT_UNSEAL, 0)
    else:
        worker_fail(worker, error)


cdef inline void worker_flush(worker_t* worker) noexcept nogil:
    """Write what Python has encrypted; then have it encrypt more, or wait for the peer.

    A deadline outlasts the visits to Python: what the peer sends meanwhile, such as session
    tickets, does not put it off.
    """
    cdef int64_t now_ns = worker.pipe.loop.now_ns
    cdef ssize_t written
    cdef bint has_moved = False
    worker.state = WORKER_WRITING
    while worker.seal != SEAL_READING and worker.sealed_written < worker.sealed_len:
        written = send(worker.fd, worker.sealed + worker.sealed_written,
                       worker.sealed_len - worker.sealed_written, MSG_NOSIGNAL | MSG_DONTWAIT)
        if written < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                if worker.seal == SEAL_WRITING and (has_moved or worker.sealed_deadline_ns == 0):
                    worker.sealed_deadline_ns = now_ns + worker.pipe.limits.stall_timeout_ns
                worker_set_deadline(worker, worker.sealed_deadline_ns)
                return
            worker_write_failed(worker, errno)
            return
        has_moved = True
        worker.sealed_written += written
        if worker.seal == SEAL_WRITING:
            worker.written += written
    if worker.seal == SEAL_WRITING:
        worker.sealed_deadline_ns = 0
        if worker.segment <= worker.job.n_segments:
            worker_to_python(worker, EVENT_SEAL, 0)
            return
        worker.seal = SEAL_READING
        worker.sealed_deadline_ns = now_ns + worker.pipe.limits.response_timeout_ns
    worker.state = WORKER_READING
    if worker.seal == SEAL_READING and worker.job.type == TYPE_SNAP:
        worker_set_deadline(worker, 0)
    else:
        worker_set_deadline(worker, worker.sealed_deadline_ns)


cdef inline void worker_begin_sealed(worker_t* worker) noexcept nogil:
    """Have Python begin with the handshake, or with the job when there has been one."""
    cdef ssize_t n
    if worker.seal == SEAL_CONNECTING:
        worker.seal = SEAL_HANDSHAKE
        worker_to_python(worker, EVENT_HANDSHAKE, 0)
        return
    # Session tickets may have come while it was idle; what else it may be, Python finds out.
    n = recv(worker.fd, worker.answer, HTTP_ANSWER_MAX, MSG_DONTWAIT)
    if n == 0 or (n < 0 and errno != EAGAIN):
        worker_to_python(worker, EVENT_CONNECT, 0)
        return
    worker.answer_len = <int>n if n > 0 else 0
    worker.seal = SEAL_WRITING
    worker.sealed_deadline_ns = 0
    worker_to_python(worker, EVENT_SEAL, 0)


cdef inline void worker_prepare(worker_t* worker, int64_t now_ns) noexcept nogil:
    """Make head and position those of the worker's job, of which nothing is written."""
    cdef size_t size = worker.job.size_bytes
    if worker.head_for != size:
        worker.head_len = worker.head_fixed + http_end_head(worker.head + worker.head_fixed, size)
        worker.head_for = size
    worker.segment = 0
    worker.offset = 0
    worker.written = 0
    worker.answer_len = 0
    worker.is_odd = False
    worker.deadline_ns = 0
    worker.link_check_ns = now_ns + worker.pipe.limits.dead_link_timeout_ns


cdef inline void worker_begin(worker_t* worker) noexcept nogil:
    """Start writing the worker's job on its connection."""
    worker_prepare(worker, worker.pipe.loop.now_ns)
    if worker.seal != SEAL_NONE:
        worker_begin_sealed(worker)
    else:
        worker_write(worker)


cdef inline void worker_start(worker_t* worker, job_t* job, bint was_idle) noexcept nogil:
    """Give an idle worker a job; without a connection fit for use it goes to Python first."""
    cdef loop_t* loop = worker.pipe.loop
    cdef uint8_t byte
    job.taken_ns = loop.now_ns
    worker.job = job
    if worker.pipe.limits.max_queue_age_ns:
        loop_look_at(loop, loop.now_ns + worker.pipe.limits.max_queue_age_ns)
    if worker.fd < 0 or worker.is_ended \
            or worker.generation != load_int(&worker.pipe.generation) \
            or loop.now_ns - worker.last_used_ns > worker.pipe.limits.idle_timeout_ns:
        worker_to_python(worker, EVENT_CONNECT, 0)
        return
    # An idle connection must be silent: an end of stream or stray bytes make it unfit.
    if was_idle and worker.seal == SEAL_NONE \
            and (recv(worker.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0
                 or errno != EAGAIN):
        worker_to_python(worker, EVENT_CONNECT, 0)
        return
    worker_begin(worker)


cdef inline bint worker_take_sealed(worker_t* worker) noexcept nogil:
    """Take the next job, if the connection is fit for it; for the thread that holds the worker.

    It saves a way through the loop and back: the thread is about to encrypt. What it has called
    meanwhile may have taken long, so the connection is looked at as if it had been idle.
    """
    cdef pipe_t* pipe = worker.pipe
    cdef int64_t now_ns = clock_ns()
    cdef uint8_t byte
    if worker.fd < 0 or worker.is_ended \
            or worker.generation != load_int(&pipe.generation) \
            or now_ns - worker.last_used_ns > pipe.limits.idle_timeout_ns:
        return False
    if recv(worker.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 or errno != EAGAIN:
        return False
    pthread_mutex_lock(&pipe.lock)
    pipe_expire(pipe, now_ns)
    worker.job = pipe_take(pipe, worker.index > 0)      # none, when the pipe is stopping
    pthread_mutex_unlock(&pipe.lock)
    if worker.job is NULL:
        return False
    worker.job.taken_ns = now_ns
    worker_prepare(worker, now_ns)
    worker.seal = SEAL_WRITING
    worker.sealed_deadline_ns = 0
    return True


cdef inline void worker_next(worker_t* worker, job_t* done, int outcome) noexcept nogil:
    """Write ``done``'s outcome into the books, if there is one, and go on with msgc or be idle.

    Without one the worker comes from Python: its connection may have ended meanwhile.
    """
    cdef pipe_t* pipe = worker.pipe
    cdef job_t* job
    cdef bint is_closed = worker.fd >= 0 and (
        worker.is_ended or worker.generation != load_int(&pipe.generation))
    pthread_mutex_lock(&pipe.lock)
    if done is not NULL:
        pipe_count(pipe, done, outcome, pipe.loop.now_ns - done.taken_ns)
    pipe_expire(pipe, pipe.loop.now_ns)
    job = pipe_take(pipe, worker.index > 0)
    worker.job = job
    if job is NULL and not is_closed:
        worker.state = WORKER_IDLE
        worker.next = pipe.idle
        pipe.idle = worker
    pthread_mutex_unlock(&pipe.lock)
    if done is not NULL:
        loop_job_done(pipe.loop, done)
    if job is not NULL:
        worker_start(worker, job, done is NULL)
    elif is_closed:
        worker_to_python(worker, EVENT_CLOSED, 0)


cdef inline void worker_succeeded(worker_t* worker) noexcept nogil:
    """204: count it here, unless Python has to hear of it (spec section 2.4)."""
    cdef job_t* job = worker.job
    worker.is_reused = True
    worker.last_used_ns = worker.pipe.loop.now_ns
    worker.deadline_ns = 0
    if job.type == TYPE_SNAP or not load_int(worker.pipe.active):
        worker_to_python(worker, EVENT_SUCCEEDED, 0)
    else:
        worker_next(worker, job, OUTCOME_SENT)


cdef inline void worker_read(worker_t* worker, uint32_t flags) noexcept nogil:
    """Read what there is of an answer; the connection is written, or being written."""
    cdef int verdict
    cdef ssize_t n
    while True:
        n = recv(worker.fd, worker.answer + worker.answer_len,
                 HTTP_ANSWER_MAX - worker.answer_len, MSG_DONTWAIT)
        if n >= 0 or errno != EINTR:
            break
    if n < 0:
        if errno != EAGAIN:
            worker_fail(worker, errno)
        return
    if n == 0:
        if worker.answer_len > 0 or worker.is_odd:
            worker_to_python(worker, EVENT_ANSWER if worker.seal == SEAL_NONE else EVENT_UNSEAL,
                             ERROR_CLOSED)
        else:
            worker_fail(worker, ERROR_CLOSED)
        return
    worker.answer_len += <int>n
    if flags & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        worker.is_ended = True
    if worker.seal != SEAL_NONE:
        worker_to_python(worker, EVENT_UNSEAL, 0)
        return
    if worker.state == WORKER_WRITING:
        worker.answer_deadline_ns = \
            worker.pipe.loop.now_ns + worker.pipe.limits.response_timeout_ns
    if worker.state == WORKER_WRITING or worker.is_odd:
        # An answer to a request that is not complete is rare, and never a plain success.
        worker_to_python(worker, EVENT_ANSWER, 0)
        return
    if worker.answer_len == worker.known_len \
            and memcmp(worker.answer, worker.known, worker.known_len) == 0:
        worker_succeeded(worker)
        return
    verdict = http_recognise_204(worker.answer, worker.answer_len)
    if verdict == worker.answer_len:
        if worker.answer_len <= ANSWER_KNOWN_MAX:
            memcpy(worker.known, worker.answer, worker.answer_len)
            worker.known_len = worker.answer_len
        worker_succeeded(worker)
    elif verdict != HTTP_MORE or worker.answer_len == HTTP_ANSWER_MAX or worker.is_ended:
        worker_to_python(worker, EVENT_ANSWER, 0)


cdef inline void worker_connected(worker_t* worker) noexcept nogil:
    """The connect() under way has an outcome, if the socket says so."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    if getsockopt(worker.fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0:
        error = errno
    if error != 0:
        worker_fail(worker, error)
    else:
        worker_begin(worker)


cdef inline void worker_idle_closed(worker_t* worker) noexcept nogil:
    """Take a worker whose idle connection has ended off the stack, for Python to close it."""
    cdef pipe_t* pipe = worker.pipe
    cdef worker_t** link
    cdef uint8_t byte
    cdef ssize_t n
    if worker.seal == SEAL_NONE:
        n = recv(worker.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
    else:
        n = recv(worker.fd, worker.answer, HTTP_ANSWER_MAX, MSG_DONTWAIT)
    if n < 0 and errno == EAGAIN:
        return
    pthread_mutex_lock(&pipe.lock)
    link = &pipe.idle
    while link[0] is not worker:
        link = &link[0].next
    link[0] = worker.next
    pthread_mutex_unlock(&pipe.lock)
    if worker.seal != SEAL_NONE and n > 0:      # a session ticket does not end a connection
        worker.answer_len = <int>n
        worker_to_python(worker, EVENT_UNSEAL, 0)
    else:
        worker_to_python(worker, EVENT_CLOSED, 0)


cdef inline void worker_ready(worker_t* worker, uint32_t flags) noexcept nogil:
    """Act on what epoll says. Flags of an earlier socket may come late: the calls decide."""
    if worker.state == WORKER_READING:
        if flags & ~EPOLLOUT:
            worker_read(worker, flags)
    elif worker.state == WORKER_WRITING:
        if flags & ~EPOLLOUT:
            worker_read(worker, flags)
        if worker.state == WORKER_WRITING and flags & EPOLLOUT:
            if worker.seal != SEAL_NONE:
                worker_flush(worker)
            else:
                worker_write(worker)
    elif worker.state == WORKER_CONNECTING:
        if flags & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            worker_connected(worker)
    elif worker.state == WORKER_IDLE and worker.fd >= 0:
        if flags & ~EPOLLOUT:
            worker_idle_closed(worker)


cdef inline void worker_returned(worker_t* worker) noexcept nogil:
    """Go on with a worker that Python gives back: with a job to send, or with the next one."""
    cdef pipe_t* pipe = worker.pipe
    cdef epoll_event event
    if pipe.is_detached:
        if worker.job is not NULL:
            worker_to_python(worker, EVENT_FAILED, ERROR_STOPPED)
            return
        pthread_mutex_lock(&pipe.lock)
        worker_retire(worker)
        pthread_mutex_unlock(&pipe.lock)
        return
    if worker.fd >= 0:
        event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
        event.data.ptr = worker
        if epoll_ctl(pipe.loop.epfd, EPOLL_CTL_ADD, worker.fd, &event) == 0:
            worker.is_registered = True
        elif worker.job is NULL:
            worker.is_ended = True
        else:
            worker.state = WORKER_CONNECTING if worker.seal <= SEAL_CONNECTING \
                and not worker.is_odd else WORKER_READING
            worker_fail(worker, errno)
            return
    if worker.job is NULL:
        worker_next(worker, NULL, OUTCOME_SENT)
    elif worker.seal > SEAL_CONNECTING:
        worker.answer_len = 0
        worker_flush(worker)
    elif worker.is_odd:
        worker.state = WORKER_READING
        worker.answer_len = 0
        if worker.job.type != TYPE_SNAP:
            worker_set_deadline(worker, worker.answer_deadline_ns)
    else:
        worker.state = WORKER_CONNECTING
        worker.link_check_ns = 0
        worker_set_deadline(worker, worker.deadline_ns)


# -- the loop

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


cdef inline void loop_run_runnable(loop_t* loop) noexcept nogil:
    cdef worker_t* worker = loop.runnable
    cdef worker_t* following
    loop.runnable = loop.runnable_tail = NULL
    while worker is not NULL:
        following = worker.next_runnable
        worker.is_runnable = False
        if worker.state == WORKER_WRITING:
            worker_write(worker)
        worker = following


cdef inline void loop_forget_runnable(loop_t* loop, pipe_t* pipe) noexcept nogil:
    cdef worker_t* worker = loop.runnable
    cdef worker_t* following
    loop.runnable = loop.runnable_tail = NULL
    while worker is not NULL:
        following = worker.next_runnable
        worker.is_runnable = False
        if worker.pipe is not pipe:
            loop_add_runnable(loop, worker)
        worker = following


cdef inline void loop_job_done(loop_t* loop, job_t* job) noexcept nogil:
    """Free a job; one that borrows is left for Python, in batches."""
    if job.n_owners == 0:
        free(job)
        return
    add_i64(&loop.finished_bytes, <int64_t>job.size_bytes)
    add_i64(&loop.finished_jobs, 1)
    push_finished(loop, job)
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


cdef inline void loop_close_idle(pipe_t* pipe) noexcept nogil:
    """Have idle connections of an earlier generation closed. The caller holds the lock."""
    cdef worker_t** link = &pipe.idle
    cdef worker_t* worker
    while link[0] is not NULL:
        worker = link[0]
        if worker.fd >= 0 and worker.generation != load_int(&pipe.generation):
            link[0] = worker.next
            worker_to_python(worker, EVENT_CLOSED, 0)
        else:
            link = &worker.next


cdef inline void loop_run_ready(loop_t* loop, pipe_t* pipe) noexcept nogil:
    """Start idle workers of pipes that were offered something."""
    cdef pipe_t* following
    cdef worker_t* worker
    cdef worker_t** link
    cdef job_t* job
    while pipe is not NULL:
        following = pipe.next_ready
        if not pipe.is_attached:
            pipe.is_attached = True
            pipe.next_attached = loop.attached
            loop.attached = pipe
        pthread_mutex_lock(&pipe.lock)
        pipe.is_scheduled = False
        pipe_expire(pipe, loop.now_ns)
        link = &pipe.idle
        while link[0] is not NULL:
            worker = link[0]
            job = pipe_take(pipe, worker.index > 0)
            if job is NULL:         # the first worker may find nothing where another does
                link = &worker.next
                continue
            link[0] = worker.next
            pthread_mutex_unlock(&pipe.lock)
            worker_start(worker, job, True)
            pthread_mutex_lock(&pipe.lock)
            link = &pipe.idle
        if pipe.is_retiring:
            pipe.is_retiring = False
            loop_close_idle(pipe)
        pthread_mutex_unlock(&pipe.lock)
        pipe = following


cdef inline void loop_run_returned(loop_t* loop) noexcept nogil:
    cdef worker_t* worker = <worker_t*>swap_ptr(<void**>&loop.returned, NULL)
    cdef worker_t* following
    while worker is not NULL:
        following = worker.next
        worker_returned(worker)
        worker = following


cdef inline void loop_detach(loop_t* loop, pipe_t* pipe) noexcept nogil:
    """Forget a pipe that stops: idle workers retire, busy ones fail with ERROR_STOPPED."""
    cdef pipe_t** link = &loop.attached
    cdef worker_t* worker
    cdef int i
    if pipe.is_attached:
        while link[0] is not pipe:
            link = &link[0].next_attached
        link[0] = pipe.next_attached
    loop_forget_runnable(loop, pipe)
    pthread_mutex_lock(&pipe.lock)
    pipe.is_detached = True
    pipe.idle = NULL
    for i in range(pipe.n_workers):
        worker = &pipe.workers[i]
        if worker.state == WORKER_PYTHON:
            continue        # it comes back to be retired: worker_give_back
        if worker.state == WORKER_IDLE:
            if worker.is_registered:
                epoll_ctl(loop.epfd, EPOLL_CTL_DEL, worker.fd, NULL)
                worker.is_registered = False
            worker_retire(worker)
        else:
            worker_to_python(worker, EVENT_FAILED, ERROR_STOPPED)
    pthread_mutex_unlock(&pipe.lock)


cdef inline void worker_check_deadline(worker_t* worker, int64_t now_ns) noexcept nogil:
    """Fail a worker that is overdue, and note its next deadline."""
    if worker.state == WORKER_CONNECTING:
        if now_ns >= worker.deadline_ns:
            worker_fail(worker, ERROR_DIAL_TIMEOUT)
            return
    elif worker.state == WORKER_WRITING or worker.state == WORKER_READING:
        if worker.deadline_ns and now_ns >= worker.deadline_ns:
            if worker.seal == SEAL_HANDSHAKE:
                worker_fail(worker, ERROR_HANDSHAKE_TIMEOUT)
            else:
                worker_fail(worker, ERROR_STALLED if worker.state == WORKER_WRITING
                            else ERROR_RESPONSE_TIMEOUT)
            return
        if now_ns >= worker.link_check_ns:
            if worker_link_is_dead(worker):
                worker_fail(worker, ERROR_DEAD_LINK)
                return
            worker.link_check_ns = now_ns + worker.pipe.limits.dead_link_timeout_ns // 4
    else:
        return
    worker_set_deadline(worker, worker.deadline_ns)


cdef inline void loop_check_deadlines(loop_t* loop) noexcept nogil:
    """Fail what is overdue and find the next deadline. Runs when one may have passed."""
    cdef pipe_t* pipe = loop.attached
    cdef int i
    loop.next_deadline_ns = 0
    while pipe is not NULL:
        for i in range(pipe.n_workers):
            worker_check_deadline(&pipe.workers[i], loop.now_ns)
        pipe_check_age(pipe, loop.now_ns)
        pipe = pipe.next_attached


cdef inline int loop_timeout_ms(loop_t* loop) noexcept nogil:
    """How long the loop may sleep: to its next deadline, rounded up, or for ever (-1)."""
    cdef int64_t due = loop.next_deadline_ns
    if loop.release_due_ns and (due == 0 or loop.release_due_ns < due):
        due = loop.release_due_ns
    if due == 0:
        return -1
    if due <= loop.now_ns:
        return 0
    due = (due - loop.now_ns + 999999) // 1000000
    return <int>due if due < 3600000 else 3600000


cdef inline void* loop_main(void* argument) noexcept nogil:
    """The thread. Ends when it is told to and no pipe is attached any more."""
    cdef loop_t* loop = <loop_t*>argument
    cdef epoll_event events[LOOP_EVENTS]
    cdef pipe_t* detached
    cdef pipe_t* following
    cdef int n, i, timeout_ms
    while True:
        # Detached is taken before ready and returned: what a pipe's owner pushed there before
        # it stopped the pipe is then seen before the pipe is forgotten.
        detached = <pipe_t*>swap_ptr(<void**>&loop.detached, NULL)
        loop_run_returned(loop)
        loop_run_ready(loop, <pipe_t*>swap_ptr(<void**>&loop.ready, NULL))
        while detached is not NULL:
            following = detached.next_detached
            loop_detach(loop, detached)
            detached = following
        if loop.runnable is not NULL:
            loop_run_runnable(loop)

        timeout_ms = 0 if loop.runnable is not NULL else loop_timeout_ms(loop)
        if timeout_ms != 0:
            # Announce the sleep, then look once more: whoever pushed before saw us awake.
            store_int(&loop.is_sleeping, 1)
            if load_ptr(<void**>&loop.ready) is not NULL \
                    or load_ptr(<void**>&loop.returned) is not NULL \
                    or load_ptr(<void**>&loop.detached) is not NULL \
                    or load_int(&loop.is_stopping):
                timeout_ms = 0
        n = epoll_wait(loop.epfd, events, LOOP_EVENTS, timeout_ms)
        store_int(&loop.is_sleeping, 0)
        loop.now_ns = clock_ns()
        for i in range(n):
            if events[i].data.ptr is not NULL:
                worker_ready(<worker_t*>events[i].data.ptr, events[i].events)
        if loop.next_deadline_ns and loop.now_ns >= loop.next_deadline_ns:
            loop_check_deadlines(loop)
        if loop.release_due_ns and loop.now_ns >= loop.release_due_ns:
            loop.release_due_ns = 0
            if load_i64(&loop.finished_jobs) > 0:       # a send may have been quicker
                loop_queue_chores(loop)
        if load_int(&loop.is_stopping) and loop.attached is NULL \
                and load_ptr(<void**>&loop.detached) is NULL \
                and load_ptr(<void**>&loop.returned) is NULL:
            return NULL


# -- making and ending, called from Python

cdef inline int loop_init(loop_t* loop, int64_t queue_bytes) noexcept nogil:
    """Make a loop that is not running yet; 0 or an errno."""
    cdef epoll_event event
    cdef int error
    memset(loop, 0, sizeof(loop_t))
    loop.queue_bytes = queue_bytes
    loop.epfd = loop.wakefd = -1
    if pthread_mutex_init(&loop.event_lock, NULL) != 0 \
            or cond_init_monotonic(&loop.event_cond) != 0:
        return EAGAIN
    loop.epfd = epoll_create1(EPOLL_CLOEXEC)
    if loop.epfd >= 0:
        loop.wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = NULL
    if loop.wakefd < 0 or epoll_ctl(loop.epfd, EPOLL_CTL_ADD, loop.wakefd, &event) != 0:
        error = errno
        loop_free(loop)
        return error
    return 0


cdef inline void loop_close_descriptors(loop_t* loop) noexcept nogil:
    if loop.epfd >= 0:
        close(loop.epfd)
    if loop.wakefd >= 0:
        close(loop.wakefd)
    loop.epfd = loop.wakefd = -1


cdef inline void loop_free(loop_t* loop) noexcept nogil:
    """Free what ``loop_init`` made; the thread has ended."""
    loop_close_descriptors(loop)
    pthread_cond_destroy(&loop.event_cond)
    pthread_mutex_destroy(&loop.event_lock)


cdef inline int loop_start(loop_t* loop) noexcept nogil:
    """Start the thread; 0 or an errno."""
    loop.now_ns = clock_ns()
    return thread_start(&loop.thread, loop_main, loop, loop.name)


cdef inline void loop_stop(loop_t* loop) noexcept nogil:
    """End the thread and wait for it; every pipe has been detached, or will be, by now."""
    store_int(&loop.is_stopping, 1)
    loop_wake(loop)
    pthread_join(loop.thread, NULL)
    # From here on is_sleeping is 0 and nobody new writes; who was about to has nearly done so.
    while load_int(&loop.wakers) > 0:
        sched_yield()
    loop_close_descriptors(loop)


cdef inline int pipe_init(pipe_t* pipe, loop_t* loop, int n_workers, uint32_t queue_length,
                          const limits_t* limits, int* active, void* owner) noexcept nogil:
    """Make a pipe with idle workers and no connections; 0, or -1 without memory."""
    cdef int i
    memset(pipe, 0, sizeof(pipe_t))
    pipe.loop = loop
    pipe.limits = limits[0]
    pipe.active = active
    pipe.owner = owner
    pipe.workers = <worker_t*>calloc(n_workers, sizeof(worker_t))
    if pipe.workers is NULL or ring_init(&pipe.msgc, queue_length) != RING_OK \
            or ring_init(&pipe.large, queue_length) != RING_OK:
        ring_free(&pipe.msgc)
        free(pipe.workers)
        return -1
    pthread_mutex_init(&pipe.lock, NULL)
    cond_init_monotonic(&pipe.retired)
    pipe.n_workers = pipe.live = n_workers
    for i in range(n_workers):      # the first worker ends up last on the stack
        pipe.workers[i].pipe = pipe
        pipe.workers[i].index = i
        pipe.workers[i].fd = -1
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
    ring_free(&pipe.msgc)
    ring_free(&pipe.large)
    pthread_cond_destroy(&pipe.retired)
    pthread_mutex_destroy(&pipe.lock)


cdef inline int worker_give_back(worker_t* worker) noexcept nogil:
    """Return a worker from Python to the loop, or retire it when the pipe is detached; GIVEN_*."""
    cdef pipe_t* pipe = worker.pipe
    cdef loop_t* loop = pipe.loop
    cdef int given = GIVEN_TO_LOOP
    pthread_mutex_lock(&pipe.lock)
    if not pipe.is_detached:
        push_returned(pipe.loop, worker)
    elif worker.job is NULL:
        worker_retire(worker)
        given = GIVEN_RETIRED
    else:
        given = GIVEN_NOT
    pthread_mutex_unlock(&pipe.lock)
    if given == GIVEN_TO_LOOP:
        # The caller keeps the loop's owner alive, though the pipe may be on its way out.
        loop_wake(loop)
    return given
