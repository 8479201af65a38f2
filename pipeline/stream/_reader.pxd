"""A reader: the end of a stream at which messages arrive, in the loop.

Source: etcd rafthttp/stream.go, streamReader. Its node dials: the poller and Python, when the loop
says that it is time. The loop asks for the stream and reads the head of the answer, which Python
judges; from then on it reads frames, decodes them and puts the messages where they go.

It is read only while there is room for what comes: a full inbox, or one without memory for a large
frame, leaves bytes in the socket, and the peer's writer waits. A frame that has not come whole is
kept in memory of its own, which grows with what arrives.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pipeline.net._budget cimport BODY_SMALL, budget_add, budget_left, budget_wait
from pipeline.net._conn cimport (
    conn_has_ended, conn_has_more, conn_is_unread, conn_recv, conn_send,
)
from pipeline.net._loop cimport due_t, io_t, loop_set_due, runnable_add
from pipeline.net._memory cimport body_free, body_grown, body_init, body_resident, body_t
from pipeline.receive._inbox cimport (
    INBOX_FULL, INBOX_NO_MEMORY, inbox_put, reader_is_due, reader_show,
)
from pipeline.receive._queues cimport message_lane
from pipeline.send._pipe cimport (
    ERROR_CLOSED, ERROR_RESPONSE_TIMEOUT, EVENT_HEAD, EVENT_LOST, guest_t,
)
from pipeline.stream._stream cimport (
    ERROR_CHUNKS, ERROR_FRAME, ERROR_HEAD, ERROR_SILENT, ROW_FILLING, ROW_WAITING, STREAM_SCRATCH,
    STREAM_STEP_BYTES, STREAM_TIMEOUT_NS, end_adopt, end_ask, end_close, end_let_go,
    end_line_up, end_look, end_of_due, end_step_out, end_t, end_tell, streams_t,
)
from pipeline.wire._chunks cimport CHUNKS_END, CHUNKS_MORE, chunks_read, chunks_t
from pipeline.wire._frames cimport (
    FRAMES_BAD, FRAMES_HEARTBEAT, FRAMES_MORE, frames_init, frames_read,
)
from pipeline.wire._raftpb cimport wire_decoded_t, wire_move
from pipeline.wire._types cimport TYPE_PROP
from pipeline._system cimport (
    EAGAIN, EINTR, ENOMEM, EPOLLERR, EPOLLHUP, EPOLLOUT, EPOLLRDHUP, count_add, count_set, errno,
    load_int, note_int, pthread_mutex_lock, pthread_mutex_unlock, store_int, swap_int,
)

cdef enum:
    # Of an answer's head; and of what may have come behind it before it was judged.
    READER_HEAD_MAX = 16 * 1024
    # The first memory of a frame that has not come whole.
    READER_BODY_MIN = 512
    # Of a refusal, behind its head; those that do not end are a few bytes now and then.
    READER_REFUSAL_MAX = 1 << 20

# Changed by the loop alone.
cdef enum:
    READER_DOWN = 0         # nothing is wanted of it, or its dial is due some time
    READER_DIALLING         # Python's: it comes back with a connection, or with another time
    READER_ASKING           # writes the request and reads the answer's head
    READER_JUDGED           # Python looks at the head
    READER_UP
    READER_REFUSED          # reads to throw away, until the refusal ends

# What Python has made of an answer's head.
cdef enum:
    VERDICT_NONE = 0
    VERDICT_ACCEPT
    VERDICT_REFUSE

# How far reading has come.
cdef enum:
    READ_ON = 0
    READ_WAIT               # for room, or memory: what is not used is kept
    READ_OVER               # the stream has ended

cdef struct stream_reader_t:
    end_t end               # first
    bint wants_dial         # guarded by end.lock, as what follows, down to the blank line
    int64_t dial_ns
    int verdict             # VERDICT_
    size_t head_len
    int64_t wait_ns         # for the end of a refusal

    int state               # note_int; read by others for tests
    int is_paused           # atomic: what comes is thrown away
    int64_t refused_until_ns
    size_t refused_left     # bytes that may come behind the head of a refusal
    uint8_t* request        # owned
    size_t request_len
    size_t request_at
    bint has_ended          # the other side's end, or an error, is to be read behind what is left
    chunks_t chunks
    int chunk               # CHUNKS_END, or what is wrong with the chunks, behind what is kept
    # Owned: the answer's head and what came with it; then bytes of frames not looked at yet.
    uint8_t* kept
    size_t kept_len
    body_t body             # of a frame that is not whole
    int64_t counted         # of that in the budget
    body_t held             # a message for which there is no room
    wire_decoded_t held_decoded
    int64_t heard_ns
    uint64_t messages       # count_add
    uint64_t bytes
    uint64_t ignored        # of types that are not for Raft
    uint64_t dropped        # while paused; proposals there was no room for
    uint64_t since_ns       # when it came up; 0 while it is down


cdef inline void reader_set_state(stream_reader_t* reader, int state) noexcept nogil:
    note_int(&reader.state, state)


# -- memory

cdef inline void reader_count(stream_reader_t* reader) noexcept nogil:
    """Count a frame that is not whole with what of it is memory now, unless it is a small one."""
    cdef streams_t* streams = reader.end.streams
    cdef int64_t more
    if reader.body.size > BODY_SMALL:
        more = body_resident(&reader.body) - reader.counted
        reader.counted += more
        streams.reading += more
        budget_add(streams.budget, more)


cdef inline void reader_discount(stream_reader_t* reader) noexcept nogil:
    """It is whole, or will not be."""
    cdef streams_t* streams = reader.end.streams
    streams.reading -= reader.counted
    budget_add(streams.budget, -reader.counted)
    reader.counted = 0
    if end_step_out(&reader.end, ROW_FILLING):
        store_int(&streams.in_budget.has_news, True)    # another one is the first now


cdef inline void reader_wait(stream_reader_t* reader) noexcept nogil:
    """Be told when there may be room."""
    # The budget is looked at once more in the turn that follows, and that is not to be waited for.
    reader.end.streams.guest.is_busy = True
    end_line_up(&reader.end, ROW_WAITING)


cdef inline bint reader_must_wait(stream_reader_t* reader) noexcept nogil:
    """Tell whether no more of a large frame is to be read now, for too much is held.

    The one that was begun first is read on, so that one always ends; but when as much is held by
    others than this loop's reading, only they make room.
    """
    cdef streams_t* streams = reader.end.streams
    cdef int64_t left
    if reader.body.size <= BODY_SMALL:
        return False
    end_line_up(&reader.end, ROW_FILLING)
    left = budget_left(streams.budget)
    if left > 0:
        return False
    budget_wait(streams.budget, &streams.in_budget, True)
    return left + streams.reading <= 0 or streams.rows[ROW_FILLING] is not &reader.end


cdef inline bint reader_make_room(stream_reader_t* reader, size_t need) noexcept nogil:
    """Have room for so many bytes of a frame, without making them memory; False if there is none.
    """
    cdef body_t larger
    cdef size_t size = max(need, <size_t>READER_BODY_MIN)
    if reader.body.data is not NULL:
        if need <= reader.body.size:
            return True
        size = max(size, 2 * reader.body.size)
    if not body_init(&larger, size):
        return False
    if reader.body.len > 0:
        memcpy(larger.data, reader.body.data, reader.body.len)
        larger.len = reader.body.len
    body_free(&reader.body)
    reader.body = larger
    return True


cdef inline bint reader_keep(stream_reader_t* reader, const uint8_t* data, size_t n) noexcept nogil:
    """Keep bytes for later; False without memory."""
    cdef uint8_t* kept
    if n == 0:
        free(reader.kept)
        reader.kept = NULL
    elif data is reader.kept:
        pass
    else:
        kept = <uint8_t*>malloc(n)
        if kept is NULL:
            return False
        memcpy(kept, data, n)       # which may be in what was kept before
        free(reader.kept)
        reader.kept = kept
    reader.kept_len = n
    return True


# -- the connection

cdef inline void reader_close(stream_reader_t* reader) noexcept nogil:
    """End the connection, if there is one, and let go of what was read on it."""
    end_close(&reader.end)
    end_step_out(&reader.end, ROW_WAITING)
    reader_discount(reader)
    body_free(&reader.body)
    body_free(&reader.held)
    free(reader.kept)
    free(reader.request)
    reader.kept = reader.request = NULL
    reader.kept_len = reader.request_len = reader.request_at = 0
    reader.has_ended = False
    reader.chunk = CHUNKS_MORE
    count_set(&reader.since_ns, 0)
    loop_set_due(&reader.end.streams.sending.loop, &reader.end.due, 0)
    reader_set_state(reader, READER_DOWN)


cdef inline void reader_lost(stream_reader_t* reader, int error) noexcept nogil:
    """The stream is over: 0 in good order."""
    reader_close(reader)
    pthread_mutex_lock(&reader.end.lock)
    end_tell(&reader.end, EVENT_LOST, error)
    pthread_mutex_unlock(&reader.end.lock)


cdef inline void reader_dial(stream_reader_t* reader) noexcept nogil:
    """Have Python dial."""
    reader_set_state(reader, READER_DIALLING)
    pthread_mutex_lock(&reader.end.lock)
    end_ask(&reader.end)
    pthread_mutex_unlock(&reader.end.lock)


cdef inline void reader_judge(stream_reader_t* reader, int error) noexcept nogil:
    """Have Python look at the head of an answer, or at why there is none."""
    reader_set_state(reader, READER_JUDGED)
    loop_set_due(&reader.end.streams.sending.loop, &reader.end.due, 0)
    pthread_mutex_lock(&reader.end.lock)
    end_tell(&reader.end, EVENT_HEAD, error)
    pthread_mutex_unlock(&reader.end.lock)


cdef inline void reader_ask(stream_reader_t* reader) noexcept nogil:
    """Take over the connection that was dialled, and ask for the stream."""
    cdef end_t* end = &reader.end
    cdef int error
    pthread_mutex_lock(&end.lock)
    error = end_adopt(end, reader_ready)
    reader.request = end.next_head
    reader.request_len = end.next_head_len
    end.next_head = NULL
    pthread_mutex_unlock(&end.lock)
    reader.request_at = reader.kept_len = 0
    reader.kept = <uint8_t*>malloc(READER_HEAD_MAX)
    if error == 0 and reader.kept is NULL:
        error = ENOMEM
    reader_set_state(reader, READER_ASKING)
    if error != 0:
        reader_judge(reader, error)
        return
    loop_set_due(&end.streams.sending.loop, &end.due,
                 end.streams.sending.loop.now_ns + STREAM_TIMEOUT_NS)
    reader_write_request(reader)


cdef inline void reader_write_request(stream_reader_t* reader) noexcept nogil:
    cdef ssize_t n
    while reader.request_at < reader.request_len:
        n = conn_send(&reader.end.conn, reader.request + reader.request_at,
                      reader.request_len - reader.request_at)
        if n >= 0:
            reader.request_at += <size_t>n
        elif errno == EAGAIN:
            return
        elif errno != EINTR:
            reader_judge(reader, errno)
            return
    if conn_is_unread(&reader.end.conn):
        runnable_add(&reader.end.streams.sending.loop.runnable, &reader.end.conn.io)


cdef inline bint head_is_whole(const uint8_t* data, size_t seen, size_t n) noexcept nogil:
    """Tell whether an empty line is among the bytes; among those ``seen`` there was none."""
    cdef size_t i
    for i in range(max(seen, <size_t>3), n):
        if data[i] == 10 and data[i - 1] == 13 and data[i - 2] == 10 and data[i - 3] == 13:
            return True
    return False


cdef inline void reader_read_head(stream_reader_t* reader) noexcept nogil:
    cdef ssize_t n
    cdef size_t asked
    while True:
        asked = READER_HEAD_MAX - reader.kept_len
        n = conn_recv(&reader.end.conn, reader.kept + reader.kept_len, asked)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            if conn_is_unread(&reader.end.conn):
                runnable_add(&reader.end.streams.sending.loop.runnable, &reader.end.conn.io)
            return
        if n <= 0:
            reader_judge(reader, errno if n < 0 else ERROR_CLOSED)
            return
        reader.kept_len += <size_t>n
        if head_is_whole(reader.kept, reader.kept_len - <size_t>n, reader.kept_len):
            reader_judge(reader, 0)
            return
        if reader.kept_len == READER_HEAD_MAX:
            reader_judge(reader, ERROR_HEAD)
            return
        if not conn_has_more(&reader.end.conn, <size_t>n, asked) and not reader.has_ended:
            return


cdef inline void reader_accept(stream_reader_t* reader) noexcept nogil:
    """The answer is a stream: what follows its head are frames."""
    cdef end_t* end = &reader.end
    cdef streams_t* streams = end.streams
    cdef size_t n
    reader.head_len = min(reader.head_len, reader.kept_len)
    n = reader.kept_len - reader.head_len
    pthread_mutex_lock(&end.lock)
    end.is_chunked = end.next_is_chunked
    pthread_mutex_unlock(&end.lock)
    frames_init(&end.frames, end.frames.stream, end.frames.from_, end.frames.to)
    end.frames.limit = streams.max_bytes
    memset(&reader.chunks, 0, sizeof(chunks_t))
    end.is_up = True
    reader_set_state(reader, READER_UP)
    reader.heard_ns = streams.sending.loop.now_ns
    count_set(&reader.since_ns, <uint64_t>reader.heard_ns)
    loop_set_due(&streams.sending.loop, &end.due, reader.heard_ns + STREAM_TIMEOUT_NS)
    memcpy(streams.scratch, reader.kept + reader.head_len, n)
    reader_keep(reader, NULL, 0)
    # Whatever has come since the head was whole is not told of again.
    runnable_add(&streams.sending.loop.runnable, &end.conn.io)
    reader_unwrap(reader, n)


# -- what has come

cdef inline int reader_deliver(
        stream_reader_t* reader, body_t* body, wire_decoded_t* decoded) noexcept nogil:
    """Put a message where it goes; READ_WAIT if it is held, for there is no room."""
    cdef streams_t* streams = reader.end.streams
    cdef int32_t type = decoded.message.type
    cdef int lane, result
    cdef uint64_t size = <uint64_t>(decoded.end - decoded.input)
    if type < 0 or not streams.delivered >> min(type, 63) & 1:
        count_add(&reader.ignored, 1)
        body_free(body)
        return READ_ON
    if load_int(&reader.is_paused):
        count_add(&reader.dropped, 1)
        count_add(&reader.messages, 1)
        count_add(&reader.bytes, size)
        body_free(body)
        return READ_ON
    lane = message_lane(decoded)
    if type == TYPE_PROP and streams.proposals is not streams.inbox:
        result = inbox_put(streams.proposals, streams.proposals_source, &streams.proposals_reader,
                           lane, body, decoded, NULL)
    else:
        result = inbox_put(streams.inbox, streams.source, &streams.reader, lane, body, decoded,
                           NULL)
    # Before the loop sleeps consumers hear of it, wherever in a turn it was read.
    streams.guest.is_busy = True
    if result == INBOX_FULL and not (type == TYPE_PROP and streams.drops_proposals):
        if body is not &reader.held:
            reader.held = body[0]
            reader.held_decoded = decoded[0]
            memset(body, 0, sizeof(body_t))
        reader_wait(reader)
        return READ_WAIT
    if result == INBOX_FULL:
        count_add(&reader.dropped, 1)
    elif result == INBOX_NO_MEMORY:
        body_free(body)
        reader_lost(reader, ENOMEM)
        return READ_OVER
    count_add(&reader.messages, 1)
    count_add(&reader.bytes, size)
    body_free(body)                 # whoever has taken it in has its memory
    return READ_ON


cdef inline int reader_grow(
        stream_reader_t* reader, const uint8_t** data, size_t* n,
        wire_decoded_t* decoded) noexcept nogil:
    """Go on with a frame that has not come whole; what was used of the data is passed over."""
    cdef body_t* body = &reader.body
    cdef body_t whole
    cdef size_t take, used = 0
    cdef int found = FRAMES_MORE
    while found == FRAMES_MORE:
        if not reader_make_room(reader, reader.end.frames.need):
            reader_lost(reader, ENOMEM)
            return READ_OVER
        if n[0] > 0 and reader_must_wait(reader):
            reader_wait(reader)
            return READ_WAIT
        take = min(n[0], reader.end.frames.need - body.len)
        memcpy(body.data + body.len, data[0], take)
        body.len += take
        data[0] += take
        n[0] -= take
        body_grown(body)
        reader_count(reader)
        if body.len < reader.end.frames.need:
            return READ_ON
        found = frames_read(&reader.end.frames, body.data, body.len, &used, decoded)
    reader_discount(reader)
    if found == FRAMES_BAD:
        reader_lost(reader, ERROR_FRAME)
        return READ_OVER
    whole = body[0]
    memset(body, 0, sizeof(body_t))
    if found == FRAMES_HEARTBEAT:
        body_free(&whole)
        return READ_ON
    return reader_deliver(reader, &whole, decoded)


cdef inline int reader_frames(
        stream_reader_t* reader, const uint8_t* data, size_t n) noexcept nogil:
    """Take the frames out of some bytes of the stream; READ_WAIT when the rest is kept."""
    cdef wire_decoded_t decoded
    cdef body_t body
    cdef size_t used = 0, size
    cdef int found
    cdef int verdict = READ_ON
    while n > 0 and verdict == READ_ON:
        if reader.body.data is not NULL:
            verdict = reader_grow(reader, &data, &n, &decoded)
            continue
        found = frames_read(&reader.end.frames, data, n, &used, &decoded)
        if found == FRAMES_MORE:
            verdict = reader_grow(reader, &data, &n, &decoded)
            continue
        if found == FRAMES_BAD:
            reader_lost(reader, ERROR_FRAME)
            return READ_OVER
        if found != FRAMES_HEARTBEAT:
            size = <size_t>(decoded.end - decoded.input)
            if not body_init(&body, size):
                reader_lost(reader, ENOMEM)
                return READ_OVER
            memcpy(body.data, decoded.input, size)
            body.len = size
            wire_move(&decoded, body.data)
            verdict = reader_deliver(reader, &body, &decoded)
        data += used
        n -= used
    if verdict == READ_WAIT and not reader_keep(reader, data, n):
        reader_lost(reader, ENOMEM)
        return READ_OVER
    return verdict


cdef inline void reader_end_chunks(stream_reader_t* reader) noexcept nogil:
    """All before the last chunk, or before what is none, was taken; nothing behind is looked at."""
    reader_lost(
        reader, 0 if reader.chunk == CHUNKS_END and reader.body.data is NULL else ERROR_CHUNKS)


cdef inline int reader_unwrap(stream_reader_t* reader, size_t n) noexcept nogil:
    """Take the framing off what has been read into the scratch, and the frames out of it."""
    cdef uint8_t* data = reader.end.streams.scratch
    cdef size_t used = 0, made = n
    cdef int verdict
    if reader.end.is_chunked:
        reader.chunk = chunks_read(&reader.chunks, data, n, data, &used, &made)
    verdict = reader_frames(reader, data, made)
    if verdict == READ_ON and reader.chunk != CHUNKS_MORE:
        reader_end_chunks(reader)
        return READ_OVER
    return verdict


cdef inline void reader_read(stream_reader_t* reader) noexcept nogil:
    """Read what there is, or one step."""
    cdef end_t* end = &reader.end
    cdef streams_t* streams = end.streams
    cdef size_t budget = STREAM_STEP_BYTES
    cdef ssize_t n
    cdef bint has_more
    while True:
        n = conn_recv(&end.conn, streams.scratch, STREAM_SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            if conn_is_unread(&end.conn):
                runnable_add(&streams.sending.loop.runnable, &end.conn.io)
            return
        if n < 0:
            reader_lost(reader, errno)
            return
        if n == 0:
            # Without chunks, the end of the connection is the end of the stream.
            reader_lost(reader, 0 if not end.is_chunked and reader.body.data is NULL
                        else ERROR_CLOSED)
            return
        reader.heard_ns = streams.sending.loop.now_ns
        has_more = conn_has_more(&end.conn, <size_t>n, STREAM_SCRATCH) or reader.has_ended \
            or conn_has_ended(&end.conn)
        if reader_unwrap(reader, <size_t>n) != READ_ON or not has_more:
            return
        budget -= min(budget, <size_t>n)
        if budget == 0:
            runnable_add(&streams.sending.loop.runnable, &end.conn.io)
            return


cdef inline void reader_set_refused_due(stream_reader_t* reader) noexcept nogil:
    loop_set_due(&reader.end.streams.sending.loop, &reader.end.due,
                 min(reader.heard_ns + STREAM_TIMEOUT_NS, reader.refused_until_ns))


cdef inline void reader_refuse(stream_reader_t* reader) noexcept nogil:
    """Wait for the end of a refusal, of which some may have come behind its head."""
    cdef end_t* end = &reader.end
    cdef streams_t* streams = end.streams
    cdef size_t head_len = min(reader.head_len, reader.kept_len)
    cdef size_t n = reader.kept_len - head_len
    pthread_mutex_lock(&end.lock)
    end.is_chunked = end.next_is_chunked
    pthread_mutex_unlock(&end.lock)
    memset(&reader.chunks, 0, sizeof(chunks_t))
    reader.heard_ns = streams.sending.loop.now_ns
    reader.refused_until_ns = reader.heard_ns + reader.wait_ns
    reader.refused_left = READER_REFUSAL_MAX
    reader_set_state(reader, READER_REFUSED)
    memcpy(streams.scratch, reader.kept + head_len, n)
    reader_keep(reader, NULL, 0)
    if reader_discard(reader, n):
        reader_set_refused_due(reader)
        # Whatever has come since the head was whole is not told of again.
        runnable_add(&streams.sending.loop.runnable, &end.conn.io)


cdef inline bint reader_discard(stream_reader_t* reader, size_t n) noexcept nogil:
    """Throw away what of a refusal is in the scratch; False if that was its end: a dial follows."""
    cdef uint8_t* data = reader.end.streams.scratch
    cdef size_t used = 0, made = 0
    reader.refused_left -= min(n, reader.refused_left)
    if reader.refused_left > 0 and (
            not reader.end.is_chunked
            or chunks_read(&reader.chunks, data, n, data, &used, &made) == CHUNKS_MORE):
        return True
    reader_close(reader)
    reader_dial(reader)
    return False


cdef inline void reader_read_refused(stream_reader_t* reader) noexcept nogil:
    """Throw away a step of what comes behind a refusal; dial again when it has ended."""
    cdef end_t* end = &reader.end
    cdef ssize_t n
    cdef int _step
    for _step in range(STREAM_STEP_BYTES // STREAM_SCRATCH):
        n = conn_recv(&end.conn, end.streams.scratch, STREAM_SCRATCH)
        if n < 0 and errno == EINTR:
            continue
        if n < 0 and errno == EAGAIN:
            if conn_is_unread(&end.conn):
                break
            return
        if n <= 0:
            reader_close(reader)
            reader_dial(reader)
            return
        reader.heard_ns = end.streams.sending.loop.now_ns
        if not reader_discard(reader, <size_t>n):
            return
    runnable_add(&end.streams.sending.loop.runnable, &end.conn.io)


cdef inline void reader_go_on(stream_reader_t* reader) noexcept nogil:
    """There may be room: put in what is held, then what is kept, then read on."""
    cdef int verdict = READ_ON
    if reader.held.data is not NULL:
        verdict = reader_deliver(reader, &reader.held, &reader.held_decoded)
    if verdict == READ_ON and reader.kept_len > 0:
        verdict = reader_frames(reader, reader.kept, reader.kept_len)
        if verdict == READ_ON:
            reader_keep(reader, NULL, 0)
    if verdict == READ_ON and reader.chunk != CHUNKS_MORE:
        reader_end_chunks(reader)
    elif verdict == READ_ON:
        reader.heard_ns = reader.end.streams.sending.loop.now_ns
        loop_set_due(&reader.end.streams.sending.loop, &reader.end.due,
                     reader.heard_ns + STREAM_TIMEOUT_NS)
        runnable_add(&reader.end.streams.sending.loop.runnable, &reader.end.conn.io)


cdef inline void reader_ready(io_t* io, uint32_t flags) noexcept nogil:
    """Act on what epoll says, or go on when it was runnable."""
    cdef stream_reader_t* reader = <stream_reader_t*>io
    if flags & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        reader.has_ended = True
    if reader.end.conn.io.fd < 0 or reader.end.is_in[ROW_WAITING]:
        return
    if reader.state == READER_UP:
        if flags != EPOLLOUT:
            reader_read(reader)
    elif reader.state == READER_ASKING:
        if reader.request_at < reader.request_len:
            reader_write_request(reader)
        if reader.state == READER_ASKING and flags != EPOLLOUT:
            reader_read_head(reader)
    elif reader.state == READER_REFUSED:
        reader_read_refused(reader)


cdef inline void reader_due(due_t* due) noexcept nogil:
    """Dial, or give up what is waited for."""
    cdef stream_reader_t* reader = <stream_reader_t*>end_of_due(due)
    cdef int64_t now_ns = reader.end.streams.sending.loop.now_ns
    if reader.state == READER_DOWN:
        reader_dial(reader)
    elif reader.state == READER_ASKING:
        reader_judge(reader, ERROR_RESPONSE_TIMEOUT)
    elif reader.state == READER_REFUSED:
        if now_ns >= min(reader.heard_ns + STREAM_TIMEOUT_NS, reader.refused_until_ns):
            reader_close(reader)
            reader_dial(reader)
        else:
            reader_set_refused_due(reader)
    elif reader.state == READER_UP and not reader.end.is_in[ROW_WAITING]:
        if now_ns - reader.heard_ns >= STREAM_TIMEOUT_NS:
            reader_lost(reader, ERROR_SILENT)
        else:
            loop_set_due(&reader.end.streams.sending.loop, due,
                         reader.heard_ns + STREAM_TIMEOUT_NS)


# -- what is wanted of it

cdef inline void reader_returned(io_t* io) noexcept nogil:
    """See to what is wanted of a reader: a dial, its connection, a verdict, an end."""
    cdef stream_reader_t* reader = <stream_reader_t*>io
    cdef end_t* end = &reader.end
    cdef bint is_stopping, wants_dial
    cdef bint is_renewing = False, has_next = False
    cdef int verdict
    cdef int64_t dial_ns
    pthread_mutex_lock(&end.lock)
    is_stopping = end_look(end, &is_renewing, &has_next)
    wants_dial, dial_ns, verdict = reader.wants_dial, reader.dial_ns, reader.verdict
    reader.wants_dial = False
    reader.verdict = VERDICT_NONE
    pthread_mutex_unlock(&end.lock)
    if is_stopping:
        reader_close(reader)
        end_let_go(end)
        return
    if is_renewing and reader.state == READER_UP:
        reader_lost(reader, 0)
    elif is_renewing and reader.state == READER_REFUSED:
        reader_close(reader)
        reader_dial(reader)
    if has_next:
        reader_ask(reader)
    elif verdict == VERDICT_ACCEPT and reader.state == READER_JUDGED:
        reader_accept(reader)
    elif verdict == VERDICT_REFUSE and reader.state == READER_JUDGED:
        if reader.wait_ns == 0 or end.conn.io.fd < 0:
            reader_close(reader)
        else:
            reader_refuse(reader)
    if wants_dial and (reader.state == READER_DOWN or reader.state == READER_DIALLING):
        reader_set_state(reader, READER_DOWN)
        loop_set_due(&end.streams.sending.loop, &end.due, max(dial_ns, <int64_t>1))


# -- of all streams of a node

cdef inline void streams_admit(streams_t* streams) noexcept nogil:
    """There may be room: let in what waits, as long as there is."""
    cdef end_t* end = streams.rows[ROW_WAITING]
    cdef end_t* following
    streams.rows[ROW_WAITING] = NULL
    while end is not NULL:
        following = end.next_in[ROW_WAITING]
        end.is_in[ROW_WAITING] = False
        reader_go_on(<stream_reader_t*>end)
        end = following


cdef inline void streams_turn(guest_t* guest) noexcept nogil:
    """See to what others have told the loop, and tell consumers of what has come."""
    cdef streams_t* streams = <streams_t*>guest
    cdef bint is_quiet = streams.sending.loop.n_events <= 0
    if streams.in_budget.is_waiting and budget_left(streams.budget) > 0:
        budget_wait(streams.budget, &streams.in_budget, False)
        streams_admit(streams)
    elif streams_have_news(streams):
        streams_admit(streams)
    if is_quiet or reader_is_due(&streams.reader):
        reader_show(streams.inbox, &streams.reader)
    if is_quiet or reader_is_due(&streams.proposals_reader):
        reader_show(streams.proposals, &streams.proposals_reader)
    guest.is_busy = streams.reader.has_put or streams.proposals_reader.has_put


cdef inline bint streams_have_news(streams_t* streams) noexcept nogil:
    """Tell, once, whether there may be room."""
    cdef bint has_news = False
    if load_int(&streams.reader.has_news) and swap_int(&streams.reader.has_news, 0):
        has_news = True
    if load_int(&streams.proposals_reader.has_news) \
            and swap_int(&streams.proposals_reader.has_news, 0):
        has_news = True
    if load_int(&streams.in_budget.has_news) and swap_int(&streams.in_budget.has_news, 0):
        has_news = True
    return has_news


cdef inline bint streams_may_sleep(guest_t* guest) noexcept nogil:
    """Tell whether nothing has been told since the last turn."""
    cdef streams_t* streams = <streams_t*>guest
    return not (load_int(&streams.reader.has_news) or load_int(&streams.proposals_reader.has_news)
                or load_int(&streams.in_budget.has_news))
