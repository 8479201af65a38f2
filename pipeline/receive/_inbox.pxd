"""What has arrived, decoded, and waits until the node takes it: the inbox, without the GIL.

Receiving loops put messages in and answer them at once; the node takes them in batches. An inbox
never drops what it has no room for: it is told that it is full, its connection waits for its answer
and is not read, and when there is room the loop tries again.

Each lane of ``_turns.pxd`` has room of its own, for as many messages and bytes; what is taken comes
in the order in which it arrived, whatever lane it counts in. Some of what arrives is answered only
when it is taken: then there is a ``holder_t`` that waits for that.

``inbox.lock`` may be taken with the GIL held or not, and before a server's lock, never after it.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pipeline._system cimport (
    add_int, load_int, pthread_cond_broadcast, pthread_cond_t, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, read, store_int, write,
)
from pipeline.net._loop cimport loop_t, loop_wake
from pipeline.net._memory cimport body_free, body_resident, body_t
from pipeline.receive._turns cimport LANES
from pipeline.wire._raftpb cimport wire_decoded_t

cdef enum:
    # The memory of so many arrivals is kept for further ones.
    ARRIVAL_SPARES = 256
    # How long a loop that is kept busy waits with telling consumers, which costs a thread switch.
    SHOW_NS = 100000

# What became of something offered.
cdef enum:
    INBOX_TAKEN_IN = 0
    INBOX_FULL              # the loop is told when there may be room
    INBOX_CLOSED            # to what it came from
    INBOX_NO_MEMORY

# A receiving loop, as the inbox knows it: from reader_join to reader_leave.
cdef struct reader_t:
    reader_t* next
    loop_t* loop            # borrowed
    int has_news            # atomic: there may be room
    bint is_waiting         # for room
    bint has_put            # of the loop: something of which consumers are not told yet
    int64_t put_ns          # then: since when
    bint has_left           # it has ended, and its connections are to be freed, not answered
    # Takes back the memory of a large body.
    void (*recycle)(reader_t* reader, body_t* body) noexcept nogil

# One node, as what arrives there is told apart from what does at another.
cdef struct source_t:
    bint is_closed

# Who is answered when a message is taken, or dropped: a connection, or a thread of Python's.
cdef struct holder_t:
    # Called once, with the inbox's lock held.
    void (*tell)(holder_t* holder, bint is_taken) noexcept nogil

# A message in the inbox.
cdef struct arrival_t:
    arrival_t* next
    source_t* source        # borrowed: it goes when all that came from it has
    reader_t* reader        # whose memory the body is; NULL when nobody wants it back
    holder_t* holder        # NULL when it was answered at once
    int lane
    int64_t bytes           # counted
    body_t body             # owned
    wire_decoded_t decoded  # points into it

cdef struct inbox_t:
    size_t max_messages     # in each lane
    int64_t max_bytes       # in each lane; one message is let in, however large, when it is empty
    pthread_mutex_t lock    # guards what follows
    pthread_cond_t changed  # there may be room, or something was taken: for threads of Python's
    arrival_t* first
    arrival_t* last         # of no meaning without a first
    size_t in_lane[LANES]
    int64_t bytes_in_lane[LANES]
    uint64_t received
    uint64_t taken
    uint64_t dropped
    uint64_t queued
    int64_t queued_bytes
    int waiting             # atomic: connections and threads held up, for room or until it is taken
    int n_threads           # of Python's, that wait for ``changed``
    int threads_in_lane[LANES]      # those of them that wait for room
    reader_t* readers
    arrival_t* spare
    int n_spare
    # Atomic: readable while something is queued, and when closed; -1 until it is wanted.
    int eventfd
    bint is_readable
    int is_closed


cdef inline bint inbox_has_room(const inbox_t* inbox, int lane, int64_t bytes) noexcept nogil:
    """Tell whether a lane takes so many bytes more. The caller holds the lock."""
    return inbox.in_lane[lane] == 0 or (
        inbox.in_lane[lane] < inbox.max_messages
        and inbox.bytes_in_lane[lane] + bytes <= inbox.max_bytes)


cdef inline void inbox_show(inbox_t* inbox) noexcept nogil:
    """Have the descriptor say whether there is something to take. The caller holds the lock."""
    cdef uint64_t count = 1
    cdef int fd = load_int(&inbox.eventfd)
    cdef bint is_readable = inbox.first is not NULL or inbox.is_closed
    if fd < 0 or is_readable == inbox.is_readable:
        return
    inbox.is_readable = is_readable
    if is_readable:
        write(fd, &count, sizeof(count))
    else:
        read(fd, &count, sizeof(count))


cdef inline void inbox_tell_room(inbox_t* inbox) noexcept nogil:
    """Tell whoever waits that there may be room, or is none to wait for. The caller holds the lock.
    """
    cdef reader_t* reader = inbox.readers
    while reader is not NULL:
        if reader.is_waiting:
            reader.is_waiting = False
            store_int(&reader.has_news, True)
            loop_wake(reader.loop)
        reader = reader.next
    if inbox.n_threads > 0:
        pthread_cond_broadcast(&inbox.changed)


# -- what comes in

cdef inline int inbox_put_locked(
        inbox_t* inbox, source_t* source, reader_t* reader, int lane, body_t* body,
        const wire_decoded_t* decoded, holder_t* holder) noexcept nogil:
    """Do what ``inbox_put`` says, but the caller holds the lock and calls ``inbox_show``."""
    cdef arrival_t* arrival = inbox.spare
    cdef int64_t bytes = body_resident(body)
    if source.is_closed:
        return INBOX_CLOSED
    if not inbox_has_room(inbox, lane, bytes):
        if reader is not NULL:
            reader.is_waiting = True
        return INBOX_FULL
    if arrival is not NULL:
        inbox.spare = arrival.next
        inbox.n_spare -= 1
    else:
        arrival = <arrival_t*>malloc(sizeof(arrival_t))
        if arrival is NULL:
            return INBOX_NO_MEMORY
    arrival.next = NULL
    arrival.source = source
    arrival.reader = reader
    arrival.holder = holder
    arrival.lane = lane
    arrival.bytes = bytes
    arrival.body = body[0]
    arrival.decoded = decoded[0]
    memset(body, 0, sizeof(body_t))
    if inbox.first is NULL:
        inbox.first = arrival
    else:
        inbox.last.next = arrival
    inbox.last = arrival
    inbox.received += 1
    inbox_count(inbox, arrival, 1)
    if holder is not NULL and reader is not NULL:
        add_int(&inbox.waiting, 1)
    return INBOX_TAKEN_IN


cdef inline int inbox_put(
        inbox_t* inbox, source_t* source, reader_t* reader, int lane, body_t* body,
        const wire_decoded_t* decoded, holder_t* holder) noexcept nogil:
    """Put a message in for a loop; it has the body then, and nobody else.

    If it is full, the loop is told once when there may be room. Consumers that wait are told by
    ``reader_show``, once for all that comes in SHOW_NS without a pause.
    """
    cdef int result
    pthread_mutex_lock(&inbox.lock)
    result = inbox_put_locked(inbox, source, reader, lane, body, decoded, holder)
    pthread_mutex_unlock(&inbox.lock)
    if not reader.has_put:
        reader.has_put = True
        reader.put_ns = reader.loop.now_ns
    return result


cdef inline bint reader_is_due(const reader_t* reader) noexcept nogil:
    """Tell whether consumers are to be told although more is coming."""
    return reader.has_put and reader.loop.now_ns - reader.put_ns >= SHOW_NS


cdef inline void reader_show(inbox_t* inbox, reader_t* reader) noexcept nogil:
    """Tell consumers of what a loop has put in. The loop does so before it sleeps."""
    if reader.has_put:
        reader.has_put = False
        pthread_mutex_lock(&inbox.lock)
        inbox_show(inbox)
        pthread_mutex_unlock(&inbox.lock)


cdef inline void inbox_count(inbox_t* inbox, const arrival_t* arrival, int sign) noexcept nogil:
    """Count an arrival as queued, or no more."""
    inbox.queued += sign
    inbox.queued_bytes += sign * arrival.bytes
    inbox.in_lane[arrival.lane] += sign
    inbox.bytes_in_lane[arrival.lane] += sign * arrival.bytes


# -- what is taken. The caller holds the lock in all of these.

cdef inline arrival_t* inbox_take(inbox_t* inbox, size_t max_messages) noexcept nogil:
    """Take so many at most, the oldest first; NULL when there is none. They are the caller's."""
    cdef arrival_t* taken = inbox.first
    cdef arrival_t* last = NULL
    while inbox.first is not NULL and max_messages > 0:
        max_messages -= 1
        last = inbox.first
        inbox.first = last.next
        inbox.taken += 1
        inbox_count(inbox, last, -1)
    if last is NULL:
        return NULL
    last.next = NULL
    inbox_show(inbox)
    inbox_tell_room(inbox)
    return taken


cdef inline void inbox_end(inbox_t* inbox, arrival_t* arrival, bint is_taken) noexcept nogil:
    """Answer who waits for an arrival that is not queued any more, and free it."""
    if arrival.holder is not NULL:
        if arrival.reader is not NULL:
            add_int(&inbox.waiting, -1)
        arrival.holder.tell(arrival.holder, is_taken)
    body_free(&arrival.body)
    if inbox.n_spare < ARRIVAL_SPARES:
        arrival.next = inbox.spare
        inbox.spare = arrival
        inbox.n_spare += 1
    else:
        free(arrival)


cdef inline void inbox_end_all(inbox_t* inbox, arrival_t* taken) noexcept nogil:
    """Do so with all of what was taken."""
    cdef arrival_t* following
    while taken is not NULL:
        following = taken.next
        inbox_end(inbox, taken, True)
        taken = following
    if inbox.n_threads > 0:
        pthread_cond_broadcast(&inbox.changed)


cdef inline bint arrival_is_late(arrival_t* arrival) noexcept nogil:
    """Tell whether what an arrival came from has ended while it was not in the inbox."""
    if arrival.source.is_closed:
        return True
    if arrival.reader is not NULL and arrival.reader.has_left:
        if arrival.holder is not NULL:
            return True
        arrival.reader = NULL
    return False


cdef inline void inbox_put_back(inbox_t* inbox, arrival_t* taken) noexcept nogil:
    """Undo ``inbox_take``: they are the oldest again, but for what was to be dropped meanwhile."""
    cdef arrival_t* first = inbox.first
    cdef arrival_t** link = &inbox.first
    cdef arrival_t* arrival
    while taken is not NULL:
        arrival = taken
        taken = arrival.next
        inbox.taken -= 1
        if arrival_is_late(arrival):
            inbox.dropped += 1
            inbox_end(inbox, arrival, False)
            continue
        inbox_count(inbox, arrival, 1)
        link[0] = arrival
        link = &arrival.next
        if first is NULL:
            inbox.last = arrival
    link[0] = first
    inbox_show(inbox)
    inbox_tell_room(inbox)


cdef inline bint arrival_is_lost(
        const arrival_t* arrival, const source_t* source, const reader_t* reader) noexcept nogil:
    """Tell whether an arrival goes with what it came from, or with its connection's loop."""
    return arrival.source is source or (reader is not NULL and arrival.reader is reader
                                        and arrival.holder is not NULL)


cdef inline void inbox_drop(
        inbox_t* inbox, const source_t* source, const reader_t* reader) noexcept nogil:
    """Drop what came from a source, or whose connection is of a loop that has ended."""
    cdef arrival_t** link = &inbox.first
    cdef arrival_t* arrival
    inbox.last = NULL
    while link[0] is not NULL:
        arrival = link[0]
        if arrival_is_lost(arrival, source, reader):
            link[0] = arrival.next
            inbox.dropped += 1
            inbox_count(inbox, arrival, -1)
            inbox_end(inbox, arrival, False)
            continue
        if reader is not NULL and arrival.reader is reader:
            arrival.reader = NULL
        inbox.last = arrival
        link = &arrival.next
    inbox_show(inbox)
    inbox_tell_room(inbox)


# -- loops

cdef inline void reader_join(inbox_t* inbox, reader_t* reader) noexcept nogil:
    pthread_mutex_lock(&inbox.lock)
    reader.next = inbox.readers
    inbox.readers = reader
    pthread_mutex_unlock(&inbox.lock)


cdef inline void reader_leave(inbox_t* inbox, reader_t* reader) noexcept nogil:
    """Let nobody wake the loop any more, which has ended; drop what its connections wait for."""
    cdef reader_t** link = &inbox.readers
    pthread_mutex_lock(&inbox.lock)
    while link[0] is not NULL and link[0] is not reader:
        link = &link[0].next
    if link[0] is reader:
        link[0] = reader.next
        reader.has_left = True
        inbox_drop(inbox, NULL, reader)
    pthread_mutex_unlock(&inbox.lock)
