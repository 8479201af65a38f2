"""A writer: the end of a stream at which messages are sent.

Source: etcd rafthttp/stream.go, streamWriter. What is offered goes through a channel of its own, as
to a pipeline; what has gathered there by the time the last is written goes out together, as one
chunk, in frames (``wire/_frames.pxd``). A message is sent when all of its frame is written.

The loop writes. But to wake it for a message that comes alone takes longer than to write it: where
nothing is queued or under way, and nothing was for a while, the writer is *lent* to the caller, who
writes the one message and gives it back (``writer_write_alone``). What the socket does not take is
the loop's, as is all that it wanted meanwhile. Callers who send one message after the other find
that there is no rest, and the loop gathers.

A frame that borrows is written from where its payloads lie, as a chunk of its own; all others are
copied. When a stream breaks, what it has not written fails, all at once; Raft hears of that as of
one failure, as in etcd.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.uio cimport iovec

from pipeline.net._conn cimport (
    conn_has_moved, conn_is_unread, conn_recv, conn_send, conn_send_next,
)
from pipeline.net._cursor cimport cursor_begin, cursor_is_at_end, cursor_t
from pipeline.net._loop cimport IO_TURN, due_t, io_t, loop_set_due, loop_t, runnable_add
from pipeline.send._books cimport (
    OUTCOME_DROPPED, OUTCOME_FAILED, OUTCOME_SENT, books_settle_run, follower_success, follower_t,
)
from pipeline.send._channel cimport (
    OFFER_ACCEPTED, channel_drop_all, channel_offer, channel_t, channel_take_run, job_t,
)
from pipeline.send._pipe cimport ERROR_CLOSED, ERROR_STALLED, EVENT_LOST, sending_job_done
from pipeline.stream._stream cimport (
    ERROR_FRAME, STREAM_HEARTBEAT_NS, STREAM_SCRATCH, STREAM_STEP_BYTES, STREAM_TIMEOUT_NS,
    end_adopt, end_begin_stop, end_close, end_let_go, end_look, end_of_due, end_schedule, end_t,
    end_tell,
)
from pipeline.wire._frames cimport (
    facts_of, frame_gather, frame_of, frame_plan, frame_plan_t, frame_t, frame_write,
    frame_write_heartbeat, frames_init,
)
from pipeline.wire._raftpb cimport WIRE_OK, wire_decode, wire_decoded_t
from pipeline.wire._types cimport TYPE_APP
from pipeline._system cimport (
    EAGAIN, EINTR, EPOLLOUT, clock_ns, errno, pthread_mutex_lock, pthread_mutex_unlock, store_int,
)

cdef enum:
    # What is gathered before it is written; four records of TLS.
    WRITER_OUT_BYTES = 64 * 1024
    # etcd: streamBufSize; half of it is what its writer gathers.
    WRITER_GATHERED = 2048
    # From here on a piece of a message is written from where it lies.
    WRITER_BORROW_MIN = 4096
    # A larger message is a chunk of its own.
    WRITER_COPIED_MAX = 16 * 1024
    # A caller writes no larger message himself.
    WRITER_ALONE_MAX = 4096
    # Nor before the last one was taken so long ago: 20,000 a second are the loop's to gather.
    WRITER_REST_NS = 50000
    # Room for the longest "<size> CR LF", and for the CR LF behind the data.
    CHUNK_HEAD_MAX = 10
    CHUNK_TAIL = 2

cdef enum:
    OFFER_NOT_WORKING = -1  # to those of the channel: nobody is at the other end

cdef struct writer_t:
    end_t end               # first
    channel_t channel       # guarded by end.lock, as what follows, down to the blank line
    follower_t follower
    int working             # atomic: an end is attached; changed under the lock
    bint is_idle            # nothing is offered, and all is written
    bint is_used            # the loop is at work on what follows the blank line
    bint is_lent            # a caller is; never both
    bint is_missed          # the loop wanted it meanwhile, or is to write what is left
    uint64_t n_lost         # messages that failed with the stream, of which Python is to hear

    int64_t now_ns          # when whoever is at work came to it
    int64_t took_ns         # when messages were taken last
    int profile             # of the link's heartbeat
    follower_t counted      # what ``follower`` is a copy of
    job_t* taken            # in flight, no frame of them is written yet; the oldest first
    job_t* taken_last       # of no meaning without one
    job_t* framed           # those whose frames are in ``out``, or on the cursor
    job_t* framed_last
    uint8_t* out            # owned: what is being written, while a connection is there
    size_t out_at
    size_t out_len
    uint8_t* framing        # owned: of a large frame, with its segments
    cursor_t cursor         # at what of it is next; at its end when there is none
    bint is_large           # the cursor is not at its end
    int64_t heartbeat_ns    # when the next is due
    int64_t stall_ns        # until when some of what is written has to move; 0 is none


# -- from other threads

cdef inline int writer_offer(
        writer_t* writer, job_t* job, bint is_alone, bint* is_needed) noexcept nogil:
    """Accept or refuse a job, and let go of the lock, which the caller has taken; OFFER_*.

    The caller owns a job that is not accepted. He wakes the loop if ``is_needed``. A job that
    ``is_alone`` may have been written when this returns.
    """
    cdef int rc = OFFER_NOT_WORKING
    is_needed[0] = False
    if writer.working:
        rc = channel_offer(&writer.channel, job)
        if rc == OFFER_ACCEPTED and writer.is_idle:
            writer.is_idle = False
            if is_alone and writer_lend(writer, job):
                pthread_mutex_unlock(&writer.end.lock)
                is_needed[0] = writer_write_alone(writer)
                return rc
            is_needed[0] = end_schedule(&writer.end)
    pthread_mutex_unlock(&writer.end.lock)
    return rc


cdef inline bint writer_lend(writer_t* writer, const job_t* job) noexcept nogil:
    """Lend the writer to who has offered the only job there is, and take that; False if it cannot.

    The caller holds the lock.
    """
    cdef int64_t now_ns
    if writer.is_used or writer.end.is_scheduled or job.n_owners > 0 \
            or job.size_bytes > WRITER_ALONE_MAX:
        return False
    if writer.is_large or writer.out_at < writer.out_len:   # of a heartbeat, for want of room
        return False
    now_ns = clock_ns()
    if now_ns - writer.took_ns < WRITER_REST_NS:
        return False
    writer.is_lent = True
    writer.now_ns = writer.took_ns = now_ns
    writer.taken = channel_take_run(&writer.channel, 1, <size_t>-1, &writer.taken_last)
    writer.taken.taken_ns = now_ns
    return True


cdef inline bint writer_write_alone(writer_t* writer) noexcept nogil:
    """Write the job that was taken, in its caller's thread, and give the writer back.

    What comes of it is the loop's business, but for all being well. Whether to wake the loop.
    """
    cdef end_t* end = &writer.end
    cdef bint is_written = False
    cdef bint is_needed
    cdef ssize_t n
    if writer_fill(writer):
        n = conn_send(&end.conn, writer.out + writer.out_at, writer.out_len - writer.out_at)
        if n > 0:
            writer.out_at += <size_t>n
        is_written = writer.out_at == writer.out_len
    if is_written:
        writer_settle(writer, writer.framed, OUTCOME_SENT)
        writer_free(writer, writer.framed)
        writer.framed = NULL
    pthread_mutex_lock(&end.lock)
    writer.is_lent = False
    writer.is_idle = is_written and writer.channel.books.queued == 0
    if not is_written:
        writer.is_missed = True
    is_needed = (not writer.is_idle or writer.is_missed) and end_schedule(end)
    pthread_mutex_unlock(&end.lock)
    return is_needed


# -- by the loop: to have it, and to have had it

cdef inline bint writer_enter(writer_t* writer) noexcept nogil:
    """Let nobody else have the writer. False while a caller has it, who then hands it over."""
    pthread_mutex_lock(&writer.end.lock)
    writer.is_used = not writer.is_lent
    if writer.is_lent:
        writer.is_missed = True
    pthread_mutex_unlock(&writer.end.lock)
    if writer.is_used:
        writer.now_ns = writer.end.streams.sending.loop.now_ns
    return writer.is_used


cdef inline void writer_leave(writer_t* writer) noexcept nogil:
    pthread_mutex_lock(&writer.end.lock)
    writer.is_used = False
    pthread_mutex_unlock(&writer.end.lock)


# -- what has become of messages

cdef inline void writer_settle(writer_t* writer, const job_t* job, int outcome) noexcept nogil:
    """Write the outcome of some jobs in flight, OUTCOME_*, into the books.

    Producers want the lock, so it is held for the sums alone.
    """
    cdef uint64_t n = 0
    cdef size_t size = 0
    while job is not NULL:
        n += 1
        size += job.size_bytes
        if job.type == TYPE_APP and outcome == OUTCOME_SENT:
            follower_success(&writer.counted, writer.now_ns - job.taken_ns)
        elif job.type == TYPE_APP and outcome == OUTCOME_FAILED:
            writer.counted.fail += 1
        job = job.next
    if n > 0:
        pthread_mutex_lock(&writer.end.lock)
        books_settle_run(&writer.channel.books, n, size, outcome)
        writer.follower = writer.counted
        if outcome == OUTCOME_FAILED:
            writer.n_lost += n
        pthread_mutex_unlock(&writer.end.lock)


cdef inline void writer_free(writer_t* writer, job_t* job) noexcept nogil:
    """Let go of jobs that have their outcome."""
    cdef job_t* following
    while job is not NULL:
        following = job.next
        sending_job_done(writer.end.streams.sending, job)
        job = following


cdef inline void writer_let_go(writer_t* writer, int outcome) noexcept nogil:
    """Give all that is in flight, and all that is queued, the same outcome: OUTCOME_*."""
    cdef job_t* queued
    cdef job_t* last = NULL
    pthread_mutex_lock(&writer.end.lock)
    store_int(&writer.working, 0)
    writer.is_idle = False
    queued = channel_take_run(&writer.channel, <uint32_t>-1, <size_t>-1, &last)
    pthread_mutex_unlock(&writer.end.lock)
    writer_settle(writer, writer.framed, outcome)
    writer_settle(writer, writer.taken, outcome)
    writer_settle(writer, queued, outcome)
    writer_free(writer, writer.framed)
    writer_free(writer, writer.taken)
    writer_free(writer, queued)
    writer.framed = writer.taken = NULL


# -- the connection

cdef inline void writer_close(writer_t* writer) noexcept nogil:
    """End the connection: in good order, unless it is in the middle of a chunk."""
    if writer.end.is_up and writer.out_at == writer.out_len and not writer.is_large \
            and writer.end.is_chunked:
        conn_send(&writer.end.conn, b"0\r\n\r\n", 5)
    end_close(&writer.end)
    free(writer.out)
    free(writer.framing)
    writer.out = writer.framing = NULL
    writer.out_at = writer.out_len = 0
    writer.is_large = False
    writer.stall_ns = 0


cdef inline void writer_lost(writer_t* writer, int error) noexcept nogil:
    """The stream is over: what it has not written fails, and Python hears of it."""
    writer_close(writer)
    writer_let_go(writer, OUTCOME_FAILED)
    pthread_mutex_lock(&writer.end.lock)
    end_tell(&writer.end, EVENT_LOST, error)
    pthread_mutex_unlock(&writer.end.lock)


cdef inline void writer_attach(writer_t* writer) noexcept nogil:
    """Take over the connection that waits. The first to be written is what Python has for it."""
    cdef end_t* end = &writer.end
    cdef int error
    cdef uint8_t* head
    pthread_mutex_lock(&end.lock)
    error = end_adopt(end, writer_ready)
    head = end.next_head
    end.next_head = NULL
    writer.out_len = end.next_head_len
    pthread_mutex_unlock(&end.lock)
    writer.out = <uint8_t*>malloc(WRITER_OUT_BYTES)
    end.is_up = True
    if writer.out is NULL or error != 0:
        free(head)
        writer.out_len = 0
        writer_lost(writer, error if error != 0 else ERROR_CLOSED)
        return
    memcpy(writer.out, head, writer.out_len)
    free(head)
    frames_init(&end.frames, end.frames.stream, end.frames.from_, end.frames.to)
    writer.heartbeat_ns = writer.now_ns
    pthread_mutex_lock(&end.lock)
    store_int(&writer.working, not end.is_stopping)     # which it may do by now
    writer.is_idle = False
    pthread_mutex_unlock(&end.lock)
    writer_write(writer)


# -- writing

cdef inline size_t chunk_head(uint8_t* end, size_t size) noexcept nogil:
    """Write the head of a chunk so that it ends there; the number of its bytes."""
    cdef const char* digits = b"0123456789abcdef"
    cdef size_t n = 2
    (end - 2)[0] = 13
    (end - 1)[0] = 10
    while size > 0:
        n += 1
        (end - n)[0] = digits[size & 15]
        size >>= 4
    return n


cdef inline void writer_take(writer_t* writer) noexcept nogil:
    """Settle what is written, and take what has been offered meanwhile, if none is left."""
    cdef job_t* job
    writer_settle(writer, writer.framed, OUTCOME_SENT)
    writer_free(writer, writer.framed)
    writer.framed = NULL
    if writer.taken is not NULL:
        return
    pthread_mutex_lock(&writer.end.lock)
    writer.taken = channel_take_run(
        &writer.channel, WRITER_GATHERED, WRITER_OUT_BYTES, &writer.taken_last)
    writer.is_idle = writer.taken is NULL
    pthread_mutex_unlock(&writer.end.lock)
    job = writer.taken
    if job is not NULL:
        writer.took_ns = writer.now_ns
    while job is not NULL:
        job.taken_ns = writer.now_ns
        job = job.next


cdef inline void writer_move_to_framed(writer_t* writer) noexcept nogil:
    """The oldest job taken has its frame."""
    cdef job_t* job = writer.taken
    writer.taken = job.next
    job.next = NULL
    if writer.framed is NULL:
        writer.framed = job
    else:
        writer.framed_last.next = job
    writer.framed_last = job


cdef inline bint writer_frame_large(
        writer_t* writer, const job_t* job, const frame_t* frame) noexcept nogil:
    """Make a large frame ready to be written as a chunk of its own; False if that fails."""
    cdef frame_plan_t plan
    cdef iovec* segments
    cdef uint8_t* bytes_
    cdef size_t n
    frame_plan(&writer.end.frames, frame, WRITER_BORROW_MIN, &plan)
    free(writer.framing)
    writer.framing = <uint8_t*>malloc(
        (plan.n_segments + 2) * sizeof(iovec) + CHUNK_HEAD_MAX + CHUNK_TAIL + plan.copied)
    if writer.framing is NULL:
        return False
    segments = <iovec*>writer.framing
    bytes_ = <uint8_t*>(segments + plan.n_segments + 2)
    n = chunk_head(bytes_ + CHUNK_HEAD_MAX, frame.size)
    segments[0].iov_base = bytes_ + CHUNK_HEAD_MAX - n
    segments[0].iov_len = n
    bytes_ += CHUNK_HEAD_MAX
    memcpy(bytes_, b"\r\n", CHUNK_TAIL)
    segments[plan.n_segments + 1].iov_base = bytes_
    segments[plan.n_segments + 1].iov_len = CHUNK_TAIL
    if not frame_gather(
            &writer.end.frames, frame, &plan, bytes_ + CHUNK_TAIL, segments + 1):
        return False
    if writer.end.is_chunked:
        cursor_begin(&writer.cursor, segments, plan.n_segments + 2)
    else:
        cursor_begin(&writer.cursor, segments + 1, plan.n_segments)
    writer.is_large = True
    return True


cdef inline bint writer_fill(writer_t* writer) noexcept nogil:
    """Make what is written next, once all is written; False when a message is none.

    Nothing is in ``out`` afterwards, and the cursor at its end, if there is nothing to say.
    """
    cdef end_t* end = &writer.end
    cdef uint8_t* begin = writer.out + CHUNK_HEAD_MAX
    cdef uint8_t* at = begin
    cdef uint8_t* limit = writer.out + WRITER_OUT_BYTES - CHUNK_TAIL
    cdef wire_decoded_t decoded
    cdef frame_t frame
    cdef job_t* job
    writer.out_at = writer.out_len = 0
    if writer.now_ns >= writer.heartbeat_ns:
        at = frame_write_heartbeat(&end.frames, writer.profile, at)
        # On its tick, whenever that was looked at.
        writer.heartbeat_ns += STREAM_HEARTBEAT_NS
        if writer.heartbeat_ns <= writer.now_ns:
            writer.heartbeat_ns = writer.now_ns + STREAM_HEARTBEAT_NS
    writer_take(writer)
    while writer.taken is not NULL:
        job = writer.taken
        if not job.has_facts:
            if wire_decode(<const uint8_t*>job.segments[1].iov_base, job.segments[1].iov_len,
                           &decoded) != WIRE_OK:
                return False
            facts_of(&decoded, &job.facts)
            job.has_facts = True        # for when its turn comes again
        if not frame_of(
                &end.frames, job.segments + 1, job.n_segments - 1, &job.facts, &frame):
            return False
        if job.n_owners > 0 or frame.size > WRITER_COPIED_MAX:
            if at != begin:
                break               # what comes before it first
            if not writer_frame_large(writer, job, &frame):
                return False
            writer_move_to_framed(writer)
            return True
        if <size_t>(limit - at) < frame.size:
            break
        if not frame_write(&end.frames, &frame, at):
            return False
        at += frame.size
        writer_move_to_framed(writer)
    if at == begin:
        return True
    writer.out_at = CHUNK_HEAD_MAX
    if end.is_chunked:
        writer.out_at -= chunk_head(begin, <size_t>(at - begin))
        memcpy(at, b"\r\n", CHUNK_TAIL)
        at += CHUNK_TAIL
    writer.out_len = <size_t>(at - writer.out)
    return True


cdef inline void writer_set_due(writer_t* writer) noexcept nogil:
    cdef int64_t at_ns = writer.heartbeat_ns
    if writer.stall_ns:
        at_ns = writer.stall_ns     # a heartbeat has to wait
    loop_set_due(&writer.end.streams.sending.loop, &writer.end.due, at_ns)


cdef inline void writer_write(writer_t* writer) noexcept nogil:
    """Write until there is nothing more to say, until the socket is full, or for one step."""
    cdef end_t* end = &writer.end
    cdef loop_t* loop = &end.streams.sending.loop
    cdef size_t budget = STREAM_STEP_BYTES
    cdef ssize_t n
    cdef bint has_moved = False
    while True:
        if writer.out_at < writer.out_len:
            n = conn_send(&end.conn, writer.out + writer.out_at, writer.out_len - writer.out_at)
            if n > 0:
                writer.out_at += <size_t>n
        elif writer.is_large:
            n = conn_send_next(&end.conn, &writer.cursor, budget)
            writer.is_large = not cursor_is_at_end(&writer.cursor)
        else:
            if budget == 0:
                writer.stall_ns = 0         # all is written
                runnable_add(&loop.runnable, &end.conn.io)
                break
            if not writer_fill(writer):
                writer_lost(writer, ERROR_FRAME)
                return
            if writer.out_at == writer.out_len and not writer.is_large:
                writer.stall_ns = 0
                break
            continue
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                writer_lost(writer, errno)
                return
            if has_moved or writer.stall_ns == 0 or conn_has_moved(&end.conn):
                writer.stall_ns = writer.now_ns + STREAM_TIMEOUT_NS
            break
        has_moved = True
        budget -= min(budget, <size_t>n)
        if budget == 0 and (writer.is_large or writer.out_at < writer.out_len):
            writer.stall_ns = writer.now_ns + STREAM_TIMEOUT_NS
            runnable_add(&loop.runnable, &end.conn.io)
            break
    writer_set_due(writer)


cdef inline void writer_hear(writer_t* writer) noexcept nogil:
    """Throw away what the dialler says, which has nothing to say; notice that it has gone.

    Differs from etcd: it finds out with the next message, which is lost.
    """
    cdef end_t* end = &writer.end
    cdef ssize_t n
    cdef bint is_idle
    cdef int _step
    for _step in range(STREAM_STEP_BYTES // STREAM_SCRATCH):
        n = conn_recv(&end.conn, end.streams.scratch, STREAM_SCRATCH)
        if n == 0:
            # The dialler leaves, and for all it knows in good order; if it has missed nothing.
            pthread_mutex_lock(&end.lock)
            is_idle = writer.is_idle
            pthread_mutex_unlock(&end.lock)
            writer_lost(writer, 0 if is_idle else ERROR_CLOSED)
            return
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                writer_lost(writer, errno)
            elif conn_is_unread(&end.conn):
                runnable_add(&end.streams.sending.loop.runnable, &end.conn.io)
            return
    runnable_add(&end.streams.sending.loop.runnable, &end.conn.io)


cdef inline void writer_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Act on what epoll says, or go on when it was runnable."""
    cdef writer_t* writer = <writer_t*>io
    if not writer_enter(writer):
        return
    if writer.end.is_up and (flags & ~EPOLLOUT or flags == IO_TURN):
        writer_hear(writer)
    if writer.end.is_up and (flags & EPOLLOUT or flags == IO_TURN) \
            and (writer.is_large or writer.out_at < writer.out_len or flags == IO_TURN):
        writer_write(writer)
    writer_leave(writer)


cdef inline void writer_due(due_t* due) noexcept nogil:
    """Send a heartbeat, or end what does not move."""
    cdef writer_t* writer = <writer_t*>end_of_due(due)
    if not writer_enter(writer):
        return
    if not writer.end.is_up:
        pass
    elif writer.stall_ns and writer.now_ns >= writer.stall_ns:
        writer_lost(writer, ERROR_STALLED)
    elif not writer.is_large and writer.out_at == writer.out_len:
        writer_write(writer)
    else:
        writer_set_due(writer)
    writer_leave(writer)


# -- what is wanted of it

cdef inline void writer_returned(io_t* io) noexcept nogil:
    """See to what is wanted of a writer: what was offered, another connection, an end."""
    cdef writer_t* writer = <writer_t*>io
    cdef end_t* end = &writer.end
    cdef loop_t* loop = &end.streams.sending.loop
    cdef bint is_stopping, is_missed
    cdef bint is_renewing = False, has_next = False
    pthread_mutex_lock(&end.lock)
    if writer.is_lent:
        end.is_scheduled = False
        writer.is_missed = True     # who has it hands it over
        pthread_mutex_unlock(&end.lock)
        return
    is_stopping = end_look(end, &is_renewing, &has_next)
    is_missed = writer.is_missed
    writer.is_missed = False
    writer.is_used = True
    pthread_mutex_unlock(&end.lock)
    writer.now_ns = loop.now_ns
    if is_stopping:
        writer_close(writer)
        writer_let_go(writer, OUTCOME_DROPPED)
        end_let_go(end)
        return
    if end.is_up and (is_renewing or has_next):
        writer_lost(writer, 0)
    if has_next:
        writer_attach(writer)
    elif end.is_up and is_missed:
        runnable_add(&loop.runnable, io)
    elif end.is_up and not writer.is_large and writer.out_at == writer.out_len:
        writer_write(writer)
    writer_leave(writer)


cdef inline job_t* writer_begin_stop(writer_t* writer, bint* is_needed) noexcept nogil:
    """Have the loop let go of a writer, and drop what is queued: a list, for the caller to free.

    The caller holds the lock, and wakes the loop if ``is_needed``.
    """
    cdef job_t* dropped = channel_drop_all(&writer.channel)
    store_int(&writer.working, 0)
    is_needed[0] = end_begin_stop(&writer.end)
    return dropped
