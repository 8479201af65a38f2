"""What the streams of a node share, and what both ends of a stream are made of.

Every stream has a writer at one node and a reader at the other; the reader's node dials. Both run
in the sending loop of their node, as its *guest*, whatever listener the connection came from:

    who                 may touch                                           guarded by
    producers           a writer's channel: writer_offer                    its lock
                        a writer that is lent: writer_write_alone           that; one thread
    Python              what is wanted of an end: another connection, an end   its lock
    the loop's thread   the same; everything else                           its lock; one thread

An end is looked at when something is wanted of it (``end_wake``): that goes through the loop's
``returned``, so it happens before the loop waits. There an end may also be let go of, for good: no
event of an earlier wait can point to it then. Descriptor and TLS of a connection are its own, and
are closed by the loop.

Python hears of what becomes of it through two events, of which each is under way at most once. What
happens meanwhile is counted to the one that is.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t

from pipeline.net._budget cimport budget_loop_t, budget_t
from pipeline.net._conn cimport conn_end, conn_t
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.net._loop cimport (
    LOOP_EDGES, due_t, io_t, loop_add, loop_join, loop_leave, loop_remove, loop_return, loop_wake,
    runnable_remove,
)
from pipeline.receive._inbox cimport inbox_t, reader_t, source_t
from pipeline.send._pipe cimport (
    EVENT_CONNECT, event_t, guest_t, sending_queue_connect, sending_queue_event, sending_t,
)
from pipeline.tls._engine cimport tls_free
from pipeline.tls._tls cimport tls_t
from pipeline._system cimport (
    pthread_cond_broadcast, pthread_cond_t, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, store_int,
)
from pipeline.wire._frames cimport frames_t

cdef enum:
    # Read at once.
    STREAM_SCRATCH = 128 * 1024
    # Read or written for one stream before others have their turn.
    STREAM_STEP_BYTES = 1 << 20
    # etcd: ConnReadTimeout, ConnWriteTimeout; a third of it is between two heartbeats of the link.
    STREAM_TIMEOUT_NS = 5000000000
    STREAM_HEARTBEAT_NS = STREAM_TIMEOUT_NS // 3

# Causes of an end that have no errno; the next ones after those of ``send/_pipe.pxd``.
cdef enum:
    ERROR_FRAME = -16       # what was read is no frame, or no message is in it
    ERROR_CHUNKS = -17      # what was read is no chunk
    ERROR_SILENT = -18      # nothing has come for STREAM_TIMEOUT_NS
    ERROR_HEAD = -19        # the answer's head does not end

# Rows of readers, in the order in which they came.
cdef enum:
    ROW_WAITING = 0         # for room or memory
    ROW_FILLING             # with a large frame that has not come whole
    N_ROWS

# What the streams of a node share. The loop's thread has it, from its start to its end.
cdef struct streams_t:
    guest_t guest           # first
    sending_t* sending
    inbox_t* inbox          # where what has come goes
    source_t* source
    inbox_t* proposals      # where MsgProp goes: the same, or one of its own
    source_t* proposals_source
    reader_t reader         # the loop, as these two know it; the second only if they are two
    reader_t proposals_reader
    bint drops_proposals    # for which there is no room; otherwise they wait
    uint64_t delivered      # the types of messages, as bits, that go there; the last is for later
    uint64_t max_bytes      # of a message
    budget_t* budget
    budget_loop_t in_budget
    end_t* rows[N_ROWS]     # the first of each
    int64_t reading         # bytes in the budget, of frames that are being read
    uint8_t scratch[STREAM_SCRATCH]

# One end of a stream, up or down. It comes first in its struct.
cdef struct end_t:
    conn_t conn             # first; descriptor and TLS are owned
    due_t due
    streams_t* streams      # outlives it
    frames_t frames
    pthread_mutex_t lock    # guards what follows, down to the blank line
    pthread_cond_t ended    # the loop has let go of it
    bint is_open            # the loop has it, or had
    bint is_scheduled       # on loop.returned
    int is_stopping
    bint is_ended
    bint is_told            # an event is under way, or being handled
    bint is_asked           # the same of one for the poller
    bint has_next           # a connection waits to be taken over
    int next_fd
    tls_t* next_tls
    uint8_t* next_head      # owned: what is written first
    size_t next_head_len
    bint next_is_chunked
    bint is_renewing        # it is to be ended in good order
    int error               # of what Python is told of last

    bint is_joined          # the loop has seen it
    bint is_up
    bint is_chunked         # frames come in chunks (RFC 9112 section 7.1)
    bint is_in[N_ROWS]      # streams.rows
    end_t* next_in[N_ROWS]
    event_t event
    event_t connect_event


cdef inline end_t* end_of_due(due_t* due) noexcept nogil:
    cdef end_t* end = <end_t*>due
    return <end_t*>(<char*>due - (<char*>&end.due - <char*>end))


cdef inline bint end_schedule(end_t* end) noexcept nogil:
    """Have the loop look at an end. The caller holds the lock, and wakes the loop if told to."""
    if end.is_scheduled or end.is_ended:
        return False
    end.is_scheduled = True
    loop_return(&end.streams.sending.loop, &end.conn.io)
    return True


cdef inline void end_wake(end_t* end) noexcept nogil:
    """Do that, and let go of the lock."""
    cdef sending_t* sending = end.streams.sending
    cdef bint is_needed = end_schedule(end)
    pthread_mutex_unlock(&end.lock)
    if is_needed:
        loop_wake(&sending.loop)


cdef inline void end_tell(end_t* end, int kind, int error) noexcept nogil:
    """Have Python hear of something, in a dispatcher thread. By the loop, which has the lock."""
    end.error = error
    if not end.is_told:
        end.is_told = True
        end.event.kind = kind
        end.event.error = error
        sending_queue_event(end.streams.sending, &end.event)


cdef inline void end_ask(end_t* end) noexcept nogil:
    """Have the poller dial. By the loop, which has the lock."""
    if not end.is_asked:
        end.is_asked = True
        end.connect_event.kind = EVENT_CONNECT
        sending_queue_connect(end.streams.sending, &end.connect_event)


cdef inline void end_close(end_t* end) noexcept nogil:
    """End the connection, if there is one, and close it. By the loop."""
    cdef sending_t* sending = end.streams.sending
    runnable_remove(&sending.loop.runnable, &end.conn.io)
    if end.conn.io.fd < 0:
        return
    loop_remove(&sending.loop, &end.conn.io)
    conn_end(&end.conn)
    descriptors_shut(sending.loop.descriptors, end.conn.io.fd)
    end.conn.io.fd = -1
    tls_free(end.conn.tls)          # which knows the descriptor
    end.conn.tls = NULL
    end.is_up = False


cdef inline void end_close_next(end_t* end) noexcept nogil:
    """Close a connection that was not taken over. The caller holds the lock."""
    if end.has_next:
        end.has_next = False
        descriptors_shut(end.streams.sending.loop.descriptors, end.next_fd)
        tls_free(end.next_tls)


cdef inline void end_line_up(end_t* end, int row) noexcept nogil:
    """Put it at the end of a row, ROW_*, unless it is in it. By the loop."""
    cdef end_t** link = &end.streams.rows[row]
    if not end.is_in[row]:
        end.is_in[row] = True
        end.next_in[row] = NULL
        while link[0] is not NULL:
            link = &link[0].next_in[row]
        link[0] = end


cdef inline bint end_step_out(end_t* end, int row) noexcept nogil:
    """Take it out of a row; whether it was in it. By the loop."""
    cdef end_t** link = &end.streams.rows[row]
    if not end.is_in[row]:
        return False
    end.is_in[row] = False
    while link[0] is not end:
        link = &link[0].next_in[row]
    link[0] = end.next_in[row]
    return True


cdef inline int end_adopt(
        end_t* end, void (*ready)(io_t* io, uint32_t flags) noexcept nogil) noexcept nogil:
    """Take over the connection that waits, and watch it; 0 or an errno. The loop has the lock."""
    end.has_next = False
    end.conn.io.fd = end.next_fd
    end.conn.tls = end.next_tls
    end.is_chunked = end.next_is_chunked
    return loop_add(&end.streams.sending.loop, &end.conn.io, LOOP_EDGES, ready)


cdef inline bint end_begin_stop(end_t* end) noexcept nogil:
    """Have the loop let go of an end. The caller holds the lock, and wakes the loop if told to."""
    store_int(&end.is_stopping, True)
    if not end.is_open:         # it never had it, and never will
        end.is_ended = True
    return end_schedule(end)


cdef inline bint end_look(end_t* end, bint* is_renewing, bint* has_next) noexcept nogil:
    """Look at an end that is wanted for something: whether that is to let go of it.

    By the loop, which has the lock.
    """
    end.is_scheduled = False
    is_renewing[0], has_next[0] = end.is_renewing, end.has_next
    end.is_renewing = False
    if end.is_stopping:
        end_close_next(end)
    if not end.is_joined:
        end.is_joined = True
        loop_join(&end.streams.sending.loop, &end.due)
    return end.is_stopping


cdef inline void end_let_go(end_t* end) noexcept nogil:
    """Be done with it: nobody of ours touches it again. By the loop, which has closed it."""
    loop_leave(&end.streams.sending.loop, &end.due)
    pthread_mutex_lock(&end.lock)
    end.is_ended = True
    pthread_cond_broadcast(&end.ended)
    pthread_mutex_unlock(&end.lock)
