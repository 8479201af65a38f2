"""A worker: one connection at a time, on which it writes a request and reads the answer.

Called by the loop, in its thread; but for ``worker_give_back``, which is for the dispatcher thread
that holds the worker. What a worker cannot do without Python (dial, judge an answer that is not a
plain 204, tell Raft) it leaves to the dispatcher, with an event. Whether its connection is plain or
has TLS it need not know (``net/_conn.pxd``).
"""

from libc.stdint cimport int64_t, uint32_t, uint8_t
from libc.string cimport memcmp, memcpy

from pipeline.send._books cimport OUTCOME_SENT
from pipeline.send._channel cimport channel_take, job_t
from pipeline.net._conn cimport (
    conn_begin_message, conn_has_ended, conn_has_left, conn_has_more, conn_has_moved, conn_is_dead,
    conn_is_silent,
    conn_is_unread, conn_reads_ahead, conn_recv, conn_send, conn_send_next, conn_wants_to_write,
)
from pipeline.net._cursor cimport cursor_advance, cursor_begin, cursor_is_at_end
from pipeline.wire._http cimport (
    HTTP_ANSWER_MAX, HTTP_MORE, http_end_head, http_recognise_204, http_says_close,
    http_says_version,
)
from pipeline.wire._types cimport TYPE_PROP, TYPE_SNAP
from pipeline.send._pipe cimport (
    ANSWER_KNOWN_MAX, ERROR_CLOSED, ERROR_DEAD_LINK, ERROR_RESPONSE_TIMEOUT, ERROR_STALLED,
    ERROR_STOPPED, EVENT_ANSWER, EVENT_CLOSED, EVENT_CONNECT, EVENT_FAILED, EVENT_SUCCEEDED,
    GIVEN_NOT, GIVEN_RETIRED, GIVEN_TO_LOOP, NEAR_RTT_US, SEND_BUFFER_NEAR, WORKER_IDLE,
    WORKER_JOINED_MAX, WORKER_PYTHON, WORKER_READING, WORKER_RETIRED,
    WORKER_STEP_BYTES, WORKER_WRITING, pipe_count, pipe_expire, pipe_t, sending_job_done,
    sending_queue_connect, sending_queue_event, sending_t, worker_t,
)
from pipeline.net._loop cimport (
    IO_TURN, LOOP_EDGES, io_t, loop_add, loop_look_at, loop_remove, loop_return, loop_wake,
    runnable_add,
)
from pipeline._system cimport (
    EAGAIN, ECONNRESET, EINTR, ENOTCONN, EPIPE, EPOLLERR, EPOLLHUP, EPOLLOUT, EPOLLRDHUP, EPROTO,
    IPPROTO_TCP, SOL_SOCKET, SO_SNDBUF, TCP_INFO, errno, getsockopt, invariant, load_int, note_int,
    pthread_cond_broadcast, pthread_mutex_lock, pthread_mutex_unlock, setsockopt, socklen_t,
    tcp_info,
)

# -- a worker's states

cdef inline int worker_next_states(int state) noexcept nogil:
    """Return the states that may follow one, as bits."""
    if state == WORKER_IDLE:        # a job; the peer has ended the connection; the pipe stops
        return 1 << WORKER_WRITING | 1 << WORKER_PYTHON | 1 << WORKER_RETIRED
    if state == WORKER_WRITING:     # the request is written; it failed
        return 1 << WORKER_WRITING | 1 << WORKER_READING | 1 << WORKER_PYTHON
    if state == WORKER_READING:     # 204, with nothing or something queued; anything else
        return 1 << WORKER_IDLE | 1 << WORKER_WRITING | 1 << WORKER_PYTHON
    if state == WORKER_PYTHON:      # given back; its dial has ended; the pipe has stopped
        return 1 << WORKER_IDLE | 1 << WORKER_WRITING | 1 << WORKER_READING \
            | 1 << WORKER_PYTHON | 1 << WORKER_RETIRED
    return 0


cdef inline void worker_set_state(worker_t* worker, int state) noexcept nogil:
    """Change a worker's state, by whoever has the worker."""
    invariant(worker_next_states(worker.state) >> state & 1)
    note_int(&worker.state, state)


cdef inline int worker_look_at_state(worker_t* worker) noexcept nogil:
    """Return a worker's state, for the loop, which may not have the worker at the moment.

    Whether it has it is certain: only the loop hands a worker over, and takes it back.
    """
    return load_int(&worker.state)


cdef inline void worker_to_python(worker_t* worker, int kind, int error) noexcept nogil:
    """Hand the worker over, to the poller for a connection to be dialled or closed, else to the
    dispatcher; the loop does not touch it again until it is returned.

    Its socket leaves the epoll set first. That Python closes it would not do: a forked child may
    hold the connection open, and events would come for a worker that is gone.
    """
    loop_remove(&worker.pipe.sending.loop, &worker.conn.io)
    worker_set_state(worker, WORKER_PYTHON)
    worker.deadline_ns = 0
    worker.event.kind = kind
    worker.event.error = error
    if kind == EVENT_CONNECT or kind == EVENT_CLOSED:
        sending_queue_connect(worker.pipe.sending, &worker.event)
    else:
        sending_queue_event(worker.pipe.sending, &worker.event)


cdef inline void worker_retire(worker_t* worker) noexcept nogil:
    """Count a worker out for good. The caller holds the lock."""
    worker_set_state(worker, WORKER_RETIRED)
    worker.pipe.live -= 1
    pthread_cond_broadcast(&worker.pipe.retired)


# -- its work

cdef inline void worker_set_deadline(worker_t* worker, int64_t deadline_ns) noexcept nogil:
    """Set the deadline of the present state; the link is watched in every state with a job."""
    worker.deadline_ns = deadline_ns
    loop_look_at(&worker.pipe.sending.loop, deadline_ns)
    loop_look_at(&worker.pipe.sending.loop, worker.link_check_ns)


cdef inline void worker_await_answer(worker_t* worker, int64_t answer_deadline_ns) noexcept nogil:
    """Set the deadline of an answer. The peer may take its time over a snapshot's."""
    cdef int64_t deadline_ns = 0 if worker.job.type == TYPE_SNAP else answer_deadline_ns
    if worker.text_deadline_ns and (deadline_ns == 0 or worker.text_deadline_ns < deadline_ns):
        deadline_ns = worker.text_deadline_ns
    worker_set_deadline(worker, deadline_ns)


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
            or (job.type == TYPE_PROP
                and (worker.written > 0 or conn_has_left(&worker.conn))):
        return False
    job.retried = True
    return True


cdef inline void worker_fail(worker_t* worker, int error) noexcept nogil:
    """Give a worker whose I/O failed to Python: once more on a fresh connection, or for good."""
    if worker.answer_len == 0 and worker_may_retry(worker, error):
        worker_to_python(worker, EVENT_CONNECT, error)
    else:
        worker_to_python(worker, EVENT_FAILED, error)


cdef inline void worker_write(worker_t* worker) noexcept nogil:
    """Write head and body until done, until the socket is full, or for one step."""
    cdef sending_t* sending = worker.pipe.sending
    cdef job_t* job = worker.job
    cdef ssize_t written
    cdef size_t budget = WORKER_STEP_BYTES
    worker_set_state(worker, WORKER_WRITING)
    while not cursor_is_at_end(&worker.cursor):
        if worker.written == 0 and job.n_segments == 2 and job.size_bytes <= WORKER_JOINED_MAX:
            memcpy(worker.head + worker.head_len, job.segments[1].iov_base, job.size_bytes)
            written = conn_send(&worker.conn, worker.head, worker.head_len + job.size_bytes)
            if written > 0:
                cursor_advance(&worker.cursor, <size_t>written)
        else:
            written = conn_send_next(&worker.conn, &worker.cursor, budget)
        if written < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                if budget != WORKER_STEP_BYTES or worker.deadline_ns == 0 \
                        or conn_has_moved(&worker.conn):
                    worker_set_deadline(
                        worker, sending.loop.now_ns + worker.pipe.limits.stall_timeout_ns)
                return
            worker_write_failed(worker, errno)
            return
        worker.written += written
        budget -= min(budget, <size_t>written)
        if budget == 0 and not cursor_is_at_end(&worker.cursor):
            worker_set_deadline(worker, sending.loop.now_ns + worker.pipe.limits.stall_timeout_ns)
            runnable_add(&sending.loop.runnable, &worker.conn.io)
            return
    worker_set_state(worker, WORKER_READING)
    # Differs from etcd: it waits for ever, and a black hole keeps its worker.
    worker.answer_deadline_ns = sending.loop.now_ns + worker.pipe.limits.response_timeout_ns
    worker_await_answer(worker, worker.answer_deadline_ns)
    if conn_is_unread(&worker.conn):
        runnable_add(&sending.loop.runnable, &worker.conn.io)


cdef inline void worker_write_failed(worker_t* worker, int error) noexcept nogil:
    """A write failed; the peer may have said why (413, 412, an alert) before it closed."""
    cdef ssize_t n = conn_recv(&worker.conn, worker.answer, HTTP_ANSWER_MAX)
    if n > 0:
        worker.answer_len = <int>n
        worker.answer_deadline_ns = \
            worker.pipe.sending.loop.now_ns + worker.pipe.limits.response_timeout_ns
        worker_to_python(worker, EVENT_ANSWER, 0)
    else:
        worker_fail(worker, EPROTO if n < 0 and errno == EPROTO else error)


cdef inline void worker_begin(worker_t* worker) noexcept nogil:
    """Start writing the worker's job on its connection."""
    cdef size_t size = worker.job.size_bytes
    if worker.head_for != size:
        worker.head_len = worker.head_fixed + http_end_head(worker.head + worker.head_fixed, size)
        worker.head_for = size
    worker.job.segments[0].iov_base = worker.head
    worker.job.segments[0].iov_len = worker.head_len
    cursor_begin(&worker.cursor, worker.job.segments, worker.job.n_segments)
    worker.written = 0
    conn_begin_message(&worker.conn)
    worker.answer_len = 0
    note_int(&worker.is_odd, False)
    worker.text_deadline_ns = 0
    worker.deadline_ns = 0
    worker.link_check_ns = \
        worker.pipe.sending.loop.now_ns + worker.pipe.limits.dead_link_timeout_ns
    worker_write(worker)


cdef inline void worker_start(worker_t* worker, job_t* job, bint was_idle) noexcept nogil:
    """Give an idle worker a job; without a connection fit for use it goes to Python first."""
    cdef sending_t* sending = worker.pipe.sending
    job.taken_ns = sending.loop.now_ns
    worker.job = job
    if worker.pipe.channel.limits.max_age_ns:
        loop_look_at(&sending.loop, sending.loop.now_ns + worker.pipe.channel.limits.max_age_ns)
    if worker.conn.io.fd < 0 or worker.is_ended \
            or worker.generation != load_int(&worker.pipe.generation) \
            or sending.loop.now_ns - worker.last_used_ns > worker.pipe.limits.idle_timeout_ns:
        worker_to_python(worker, EVENT_CONNECT, 0)
        return
    # An idle connection must be silent: an end of stream or stray bytes make it unfit.
    if was_idle and not conn_is_silent(&worker.conn):
        worker_to_python(worker, EVENT_CONNECT, 0)
        return
    worker_begin(worker)


cdef inline void worker_next(worker_t* worker, job_t* done, int outcome) noexcept nogil:
    """Write ``done``'s outcome into the books, if there is one, and go on with msgc or be idle.

    Without one the worker comes from Python: its connection may have ended meanwhile.
    """
    cdef pipe_t* pipe = worker.pipe
    cdef job_t* job
    cdef bint is_closed = worker.conn.io.fd >= 0 and (
        worker.is_ended or worker.generation != load_int(&pipe.generation))
    pthread_mutex_lock(&pipe.lock)
    if done is not NULL:
        pipe_count(pipe, done, outcome, pipe.sending.loop.now_ns - done.taken_ns)
    pipe_expire(pipe, pipe.sending.loop.now_ns)
    job = channel_take(&pipe.channel, worker.index > 0)
    worker.job = job
    if job is NULL and not is_closed:
        worker_set_state(worker, WORKER_IDLE)
        worker.next = pipe.idle
        pipe.idle = worker
    pthread_mutex_unlock(&pipe.lock)
    if done is not NULL:
        sending_job_done(pipe.sending, done)
    if job is not NULL:
        worker_start(worker, job, done is NULL)
    elif is_closed:
        worker_to_python(worker, EVENT_CLOSED, 0)


cdef inline void worker_succeeded(worker_t* worker) noexcept nogil:
    """204: count it here, unless Python has to hear of it (spec section 2.4)."""
    cdef job_t* job = worker.job
    worker.is_reused = True
    worker.last_used_ns = worker.pipe.sending.loop.now_ns
    worker.deadline_ns = 0
    if job.type == TYPE_SNAP or not load_int(worker.pipe.active):
        worker_to_python(worker, EVENT_SUCCEEDED, 0)
    else:
        worker_next(worker, job, OUTCOME_SENT)


cdef inline void worker_read(worker_t* worker, uint32_t flags) noexcept nogil:
    """Read what there is of an answer; the connection is written, or being written."""
    cdef int verdict
    cdef bint is_first, has_more
    cdef size_t asked = HTTP_ANSWER_MAX - worker.answer_len
    cdef ssize_t n
    while True:
        n = conn_recv(&worker.conn, worker.answer + worker.answer_len, asked)
        if n >= 0 or errno != EINTR:
            break
    if n < 0:
        if errno != EAGAIN:
            worker_fail(worker, errno)
        elif conn_is_unread(&worker.conn):
            runnable_add(&worker.pipe.sending.loop.runnable, &worker.conn.io)
        return
    if n == 0:
        if worker.answer_len > 0 or worker.is_odd:
            worker_to_python(worker, EVENT_ANSWER, ERROR_CLOSED)
        else:
            worker_fail(worker, ERROR_CLOSED)
        return
    worker.answer_len += <int>n
    has_more = conn_has_more(&worker.conn, <size_t>n, asked)
    if flags & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) or conn_has_ended(&worker.conn):
        worker.is_ended = True
    if worker.state == WORKER_WRITING:
        worker.answer_deadline_ns = \
            worker.pipe.sending.loop.now_ns + worker.pipe.limits.response_timeout_ns
    if worker.state == WORKER_WRITING or worker.is_odd:
        # An answer to a request that is not complete is rare, and never a plain success.
        worker_to_python(worker, EVENT_ANSWER, 0)
        return
    if has_more and http_recognise_204(worker.answer, worker.answer_len) == worker.answer_len \
            and not conn_is_silent(&worker.conn):
        worker.is_ended = True      # what follows an answer is none: the connection is not used
    if worker.answer_len == worker.known_len \
            and memcmp(worker.answer, worker.known, worker.known_len) == 0:
        worker_succeeded(worker)
        return
    verdict = http_recognise_204(worker.answer, worker.answer_len)
    if verdict == worker.answer_len:
        is_first = worker.known_len == 0
        if http_says_close(worker.answer, worker.answer_len):
            worker.is_ended = True
        elif worker.answer_len <= ANSWER_KNOWN_MAX:
            memcpy(worker.known, worker.answer, worker.answer_len)
            worker.known_len = worker.answer_len
        if is_first and http_says_version(worker.answer, worker.answer_len):
            # Python notes it, once for this connection; it is a success there as well.
            worker_to_python(worker, EVENT_ANSWER, 0)
        else:
            worker_succeeded(worker)
    elif verdict != HTTP_MORE or worker.answer_len == HTTP_ANSWER_MAX or worker.is_ended:
        worker_to_python(worker, EVENT_ANSWER, 0)
    elif has_more:
        runnable_add(&worker.pipe.sending.loop.runnable, &worker.conn.io)


cdef inline void worker_bound_send_buffer(worker_t* worker) noexcept nogil:
    """Keep the send buffer to a near peer small, where the kernel lets us.

    The kernel lets it grow to 4 MiB, which a fast far link needs. At a round trip of NEAR_RTT_US
    1 MiB is 80 Gbit/s, and the copy into it costs less, at least on loopback: most likely because
    its pages are still in the core's cache from the last time (benchmarks/NOTES.md).
    """
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    cdef int half = SEND_BUFFER_NEAR // 2       # the kernel doubles it, for its own overhead
    if worker.pipe.sending.has_near_buffer \
            and getsockopt(worker.conn.io.fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 \
            and 0 < info.tcpi_rtt <= NEAR_RTT_US:       # 0: not known
        setsockopt(worker.conn.io.fd, SOL_SOCKET, SO_SNDBUF, &half, sizeof(half))


cdef inline void worker_idle_closed(worker_t* worker) noexcept nogil:
    """Take a worker whose idle connection has ended off the stack, for Python to close it."""
    cdef pipe_t* pipe = worker.pipe
    cdef worker_t** link
    if conn_is_silent(&worker.conn):
        return
    pthread_mutex_lock(&pipe.lock)
    link = &pipe.idle
    while link[0] is not worker:
        link = &link[0].next
    link[0] = worker.next
    pthread_mutex_unlock(&pipe.lock)
    worker_to_python(worker, EVENT_CLOSED, 0)


cdef inline void worker_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Act on what epoll says, or write on when the worker was runnable.

    Flags of an earlier socket may come late: the calls decide.
    """
    cdef worker_t* worker = <worker_t*>io
    cdef int state = worker_look_at_state(worker)
    if state == WORKER_READING:
        if flags != EPOLLOUT or conn_wants_to_write(&worker.conn):
            worker_read(worker, flags)
    elif state == WORKER_WRITING:
        if flags & ~EPOLLOUT or conn_is_unread(&worker.conn):
            worker_read(worker, flags)
        if worker_look_at_state(worker) == WORKER_WRITING \
                and (flags & EPOLLOUT or flags == IO_TURN):
            worker_write(worker)
    elif state == WORKER_IDLE and worker.conn.io.fd >= 0:
        if flags & ~EPOLLOUT:
            worker_idle_closed(worker)


cdef inline void worker_returned(io_t* io) noexcept nogil:
    """Go on with a worker that Python gives back: with a job to send, or with the next one."""
    cdef worker_t* worker = <worker_t*>io
    cdef pipe_t* pipe = worker.pipe
    cdef int error
    if pipe.is_detached:
        if worker.job is not NULL:
            worker_to_python(worker, EVENT_FAILED, ERROR_STOPPED)
            return
        pthread_mutex_lock(&pipe.lock)
        worker_retire(worker)
        pthread_mutex_unlock(&pipe.lock)
        return
    if worker.conn.io.fd >= 0:
        error = loop_add(&pipe.sending.loop, &worker.conn.io, LOOP_EDGES, worker_ready)
        if error != 0 and worker.job is not NULL:
            worker_fail(worker, error)
            return
        if error != 0:
            worker.is_ended = True
    if worker.job is NULL:
        worker_next(worker, NULL, OUTCOME_SENT)
    elif worker.is_odd:
        worker_set_state(worker, WORKER_READING)
        worker.answer_len = 0
        worker_await_answer(worker, worker.answer_deadline_ns)
        if conn_reads_ahead(&worker.conn):
            worker_read(worker, 0)
    else:
        worker_bound_send_buffer(worker)
        worker_begin(worker)


cdef inline void worker_check_deadline(worker_t* worker, int64_t now_ns) noexcept nogil:
    """Fail a worker that is overdue, and note its next deadline."""
    cdef int state = worker_look_at_state(worker)
    if state == WORKER_WRITING or state == WORKER_READING:
        if worker.deadline_ns and now_ns >= worker.deadline_ns:
            worker_fail(worker, ERROR_STALLED if state == WORKER_WRITING
                        else ERROR_RESPONSE_TIMEOUT)
            return
        if now_ns >= worker.link_check_ns:
            if conn_is_dead(&worker.conn, worker.pipe.limits.dead_link_timeout_ns):
                worker_fail(worker, ERROR_DEAD_LINK)
                return
            worker.link_check_ns = now_ns + worker.pipe.limits.dead_link_timeout_ns // 4
    else:
        return
    worker_set_deadline(worker, worker.deadline_ns)


cdef inline int worker_give_back(worker_t* worker) noexcept nogil:
    """Return a worker from Python to the loop, or retire it when the pipe is detached; GIVEN_*."""
    cdef pipe_t* pipe = worker.pipe
    cdef sending_t* sending = pipe.sending
    cdef int given = GIVEN_TO_LOOP
    pthread_mutex_lock(&pipe.lock)
    if not pipe.is_detached:
        worker.conn.io.returned = worker_returned
        loop_return(&sending.loop, &worker.conn.io)
    elif worker.job is NULL:
        worker_retire(worker)
        given = GIVEN_RETIRED
    else:
        given = GIVEN_NOT
    pthread_mutex_unlock(&pipe.lock)
    if given == GIVEN_TO_LOOP:
        # The caller keeps the loop's owner alive, though the pipe may be on its way out.
        loop_wake(&sending.loop)
    return given
