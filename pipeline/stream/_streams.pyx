# cython: auto_pickle=False
"""The core of streams: where Python meets both ends of them.

``_writer`` and ``_reader`` hold what runs in the sending loop without the GIL. Here are their
Python owners, and the one call that takes a message to the channel it is for:

    Streams     owns a streams_t: what the streams of a node share
    Writer      owns a writer_t; the base of ``writer.StreamWriter``
    Reader      owns a stream_reader_t; the base of ``reader.StreamReader``
    Channels    picks: a stream, or the pipeline

An end is the loop's from its first use on. The loop's registry keeps it alive until it has been let
go of and no event points to it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pipeline._core cimport RESULTS, IOLoop, Sender, books_seen, follower_seen
from pipeline._system cimport (
    add_i64, clock_ns, cond_init_monotonic, count_get, deadline_timespec, get_int, load_i64,
    load_int, pthread_cond_destroy, pthread_cond_timedwait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_int,
    swap_int, timespec,
)
from pipeline.net._budget cimport BodyBudget, budget_join, budget_leave
from pipeline.net._descriptors cimport descriptors_shut, descriptors_t
from pipeline.net._gil cimport lock_with_gil, try_lock
from pipeline.net._loop cimport loop_wake
from pipeline.net._memory cimport body_free, body_t
from pipeline.net._sockets cimport own_descriptors
from pipeline.receive._arrivals cimport Source
from pipeline.receive._inbox cimport reader_join, reader_leave, reader_t
from pipeline.send._books cimport books_t, follower_t
from pipeline.send._channel cimport (
    OFFER_ACCEPTED, OFFER_FULL, channel_free, channel_init, channel_limits_t, job_t,
)
from pipeline.send._jobs cimport job_free, jobs_free
from pipeline.send._pipe cimport ERROR_CLOSED, EVENT_HEAD, EVENT_LOST
from pipeline.stream._reader cimport (
    READER_ASKING, READER_DIALLING, READER_DOWN, READER_JUDGED, READER_REFUSED, READER_UP,
    VERDICT_ACCEPT, VERDICT_REFUSE, reader_due, reader_returned, stream_reader_t, streams_may_sleep,
    streams_turn,
)
from pipeline.stream._stream cimport (
    ERROR_CHUNKS, ERROR_FRAME, ERROR_HEAD, ERROR_SILENT, end_begin_stop, end_t, end_wake,
    streams_t,
)
from pipeline.stream._writer cimport (
    OFFER_NOT_WORKING, writer_begin_stop, writer_due, writer_offer, writer_returned, writer_t,
)
from pipeline.tls._engine cimport Session, tls_free
from pipeline.tls._tls cimport tls_t
from pipeline.wire._frames cimport (
    FRAME_LIMIT, STREAM_MESSAGE, STREAM_MSGAPP, facts_of, frames_init,
)
from pipeline.wire._messages cimport EncodedMessage, Message, profile_index
from pipeline.wire._raftpb cimport WIRE_OK, wire_decode, wire_decoded_t
from pipeline.wire._types cimport TYPE_APP, TYPE_SNAP

import enum
import socket

from pipeline._core import error_text as sending_error_text
from pipeline.errors import UsageError

__all__ = [
    "Appends", "Channels", "Reader", "StreamEvent", "Streams", "Writer", "error_text", "send_all",
]

cdef extern from "Python.h":
    Py_ssize_t PyObject_LengthHint(object o, Py_ssize_t default) except -1

cdef enum:
    # A larger message never goes on a message stream: heartbeats would have to wait for it.
    MESSAGE_STREAM_MAX = 64 * 1024
    # Of so many the rate is told; etcd ``queueCapacity``.
    APPEND_SAMPLES = 200

cdef dict KINDS = {"message": STREAM_MESSAGE, "msgapp": STREAM_MSGAPP}

cdef dict REASONS = {
    ERROR_CHUNKS: "what was read is no chunk",
    ERROR_CLOSED: "unexpected EOF",
    ERROR_FRAME: "a frame that is none",
    ERROR_HEAD: "the head of the answer does not end",
    ERROR_SILENT: "i/o timeout",
}

# What a reader is at, in the words of ``Reader.state``.
cdef dict STATES = {
    READER_DOWN: "down",
    READER_DIALLING: "dialling",
    READER_ASKING: "asking",
    READER_JUDGED: "judged",
    READER_UP: "up",
    READER_REFUSED: "refused",
}


class StreamEvent(enum.IntEnum):
    """What Python hears of one end of a stream (``send/_pipe.pxd``, EVENT_*)."""

    HEAD = EVENT_HEAD
    LOST = EVENT_LOST


def error_text(int error):
    """Tell in words why a stream has ended, or its answer did not come; 0 is in good order."""
    if error == 0:
        return "EOF"
    return REASONS[error] if error in REASONS else sending_error_text(error)


cdef void recycle(reader_t* reader, body_t* body) noexcept nogil:
    """Take back the memory of a large frame, of which none is kept."""
    body_free(body)


cdef class Streams:
    """What the streams of a node share; the guest of its sending loop.

    Parameters
    ----------
    loop : IOLoop
        One that has not been started.
    budget : BodyBudget
        What frames that are being read count in.
    source : Source
        What messages are put into an inbox with.
    proposals : Source
        The same for MsgProp: of the same inbox, or of another.
    delivered_types : int
        The types of messages that are for Raft, as bits; the last of 64 is for all from there on.
    max_bytes : int
        Of a received message.
    drops_proposals : bool
        Whether a MsgProp for which there is no room is dropped, as by etcd, or waits.
    """

    cdef streams_t* c
    cdef IOLoop loop
    cdef BodyBudget budget
    cdef Source source
    cdef Source proposals
    cdef int is_joined      # atomic: of stops at the same time one leaves

    def __cinit__(self, IOLoop loop not None, BodyBudget budget not None, Source source not None,
                  Source proposals not None, *, uint64_t delivered_types, uint64_t max_bytes,
                  bint drops_proposals):
        cdef streams_t* streams
        self.c = streams = <streams_t*>malloc(sizeof(streams_t))
        if streams is NULL:
            raise MemoryError
        memset(streams, 0, sizeof(streams_t))
        self.loop = loop
        self.budget = budget
        self.source = source
        self.proposals = proposals
        streams.sending = &loop.sending
        streams.inbox = &source.arrivals.c
        streams.source = &source.c
        streams.proposals = &proposals.arrivals.c
        streams.proposals_source = &proposals.c
        streams.reader.loop = streams.proposals_reader.loop = &loop.sending.loop
        streams.reader.recycle = streams.proposals_reader.recycle = recycle
        streams.delivered = delivered_types
        streams.max_bytes = min(max_bytes, <uint64_t>FRAME_LIMIT)
        streams.drops_proposals = drops_proposals
        streams.budget = &budget.c
        streams.in_budget.loop = &loop.sending.loop
        streams.guest.turn = streams_turn
        streams.guest.may_sleep = streams_may_sleep

    def open(self):
        """Let the loop, which has not been started, have streams. Once."""
        store_int(&self.is_joined, True)
        self.source.open()
        self.source.arrivals.add(&self.c.reader, self)
        reader_join(self.c.inbox, &self.c.reader)
        if self.c.proposals is not self.c.inbox:
            self.proposals.open()
            self.proposals.arrivals.add(&self.c.proposals_reader, self)
            reader_join(self.c.proposals, &self.c.proposals_reader)
        budget_join(self.c.budget, &self.c.in_budget)
        self.loop.sending.guest = &self.c.guest

    def close(self):
        """Let nobody tell the loop any more, which has ended. Any number of times."""
        if not swap_int(&self.is_joined, False):
            return
        with nogil:
            # Only C state is touched.
            budget_leave(self.c.budget, &self.c.in_budget)
            reader_leave(self.c.inbox, &self.c.reader)
            if self.c.proposals is not self.c.inbox:
                reader_leave(self.c.proposals, &self.c.proposals_reader)
        self.source.arrivals.remove(&self.c.reader)
        if self.c.proposals is not self.c.inbox:
            self.proposals.arrivals.remove(&self.c.proposals_reader)

    def forget_after_fork(self):
        """In a forked child, which has no loop of ours: touch nothing that is the parent's."""
        store_int(&self.is_joined, False)
        self.budget.forget_after_fork()

    def __dealloc__(self):
        free(self.c)


cdef tls_t* tls_of(object sock) except? NULL:
    """Take the TLS out of a socket, if it has any; the caller's."""
    cdef Session session = sock.tls
    cdef tls_t* tls
    if session is None:
        return NULL
    tls = session.c
    session.c = NULL
    sock.tls = None
    return tls


cdef class End:
    """One end of a stream: what Python may want of it, and how Python hears of it.

    Attributes
    ----------
    kind : str
        "msgapp" or "message".
    """

    cdef object __weakref__
    cdef end_t* c           # owned by the subclass; NULL when it could not be made
    cdef Streams streams
    cdef readonly str kind
    cdef bint is_made       # so are its lock and its condition
    cdef bint is_foreign    # of the parent of this process

    def __dealloc__(self):
        if self.is_made and not self.is_foreign:
            free(self.c.next_head)
            pthread_cond_destroy(&self.c.ended)
            pthread_mutex_destroy(&self.c.lock)

    cdef int init(self, Streams streams, str kind, uint64_t writes, uint64_t reads) except -1:
        self.streams = streams
        self.kind = kind
        if kind not in KINDS:
            raise UsageError(f"kind: {kind!r} is not one of {sorted(KINDS)}")
        self.c.streams = streams.c
        self.c.conn.io.fd = -1
        self.c.event.subject = self.c.connect_event.subject = <void*>self
        frames_init(&self.c.frames, KINDS[kind], writes, reads)
        if pthread_mutex_init(&self.c.lock, NULL) != 0 \
                or cond_init_monotonic(&self.c.ended) != 0:
            raise MemoryError
        self.is_made = True
        return 0

    cdef int open(self) except -1:
        """See to it that this is there as long as the loop has it."""
        cdef IOLoop loop = self.streams.loop
        cdef bint is_open, was_open
        loop.streams.add(self)          # first: from there on the loop may tell of it
        lock_with_gil(&self.c.lock)
        was_open = self.c.is_open
        if load_int(&loop.is_running) and not self.c.is_stopping:
            self.c.is_open = True
        is_open = self.c.is_open
        pthread_mutex_unlock(&self.c.lock)
        if not is_open:
            loop.streams.discard(self)
            raise UsageError(f"a stream of a node that is not running: {self.kind}")
        if was_open:
            self.forget()               # if it has ended meanwhile
        return 0

    cdef bint hand_over(self, object sock, bytes first, bint is_chunked) except -1:
        """Have the loop take over a connection, and write ``first`` on it; False when stopping.

        The connection is not the caller's any more, whatever comes of it.
        """
        cdef size_t n = PyBytes_GET_SIZE(first)
        cdef uint8_t* copy
        cdef tls_t* tls
        cdef int fd
        try:
            self.open()
            copy = <uint8_t*>malloc(n if n > 0 else 1)
            if copy is NULL:
                raise MemoryError
        except BaseException:
            sock.close()
            if load_int(&self.c.is_stopping):
                return False
            raise
        memcpy(copy, PyBytes_AS_STRING(first), n)
        tls = tls_of(sock)
        fd = socket.socket.detach(sock)
        with nogil:
            # The loop may hold the lock for a moment. Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            if self.c.is_stopping or self.c.has_next:
                # Of two that come at once the later one counts.
                end_close_connection(self.c, fd if self.c.is_stopping else self.c.next_fd,
                                     tls if self.c.is_stopping else self.c.next_tls)
            if self.c.is_stopping:
                pthread_mutex_unlock(&self.c.lock)
                free(copy)
                fd = -1
            else:
                free(self.c.next_head)
                self.c.has_next = True
                self.c.next_fd = fd
                self.c.next_tls = tls
                self.c.next_head = copy
                self.c.next_head_len = n
                self.c.next_is_chunked = is_chunked
                end_wake(self.c)
        return fd >= 0

    def renew(self):
        """Have the stream, if it is up, end in good order. Thread-safe; never waits.

        A refusal whose end is waited for is waited for no longer: ``on_connect`` is called.
        """
        if not self.is_foreign:
            with nogil:
                # Only C state is touched.
                pthread_mutex_lock(&self.c.lock)
                if self.c.is_open:
                    self.c.is_renewing = True
                    end_wake(self.c)
                else:
                    pthread_mutex_unlock(&self.c.lock)

    def wait_stopped(self, double timeout_s):
        """Wait, after ``begin_stop``, until the loop has let go of it; whether it has."""
        cdef int64_t deadline_ns = clock_ns() + <int64_t>(timeout_s * 1e9)
        cdef timespec at = deadline_timespec(deadline_ns)
        cdef bint is_ended = True
        if not self.is_foreign:
            with nogil:
                # Only C state is touched.
                pthread_mutex_lock(&self.c.lock)
                while not self.c.is_ended and clock_ns() < deadline_ns:
                    pthread_cond_timedwait(&self.c.ended, &self.c.lock, &at)
                is_ended = self.c.is_ended
                pthread_mutex_unlock(&self.c.lock)
            self.forget()
        return is_ended

    cdef int forget(self) except -1:
        """Keep it alive no longer than it is needed."""
        cdef bint is_needed
        lock_with_gil(&self.c.lock)
        is_needed = not self.c.is_ended or self.c.is_told or self.c.is_asked
        pthread_mutex_unlock(&self.c.lock)
        if not is_needed:
            self.streams.loop.streams.discard(self)
        return 0

    def handle(self, int kind, int error):
        """Have the subclass hear of an event, in a dispatcher thread."""
        lock_with_gil(&self.c.lock)
        error = self.c.error
        kind = self.c.event.kind
        self.c.is_told = False
        self.note_event()
        pthread_mutex_unlock(&self.c.lock)
        self.forget()
        self.on_event(StreamEvent(kind), error)

    cdef void note_event(self) noexcept:
        """Keep what the event is about. The caller holds the lock."""

    def dial(self, int kind):
        """Have the subclass dial, in the poller's thread."""
        lock_with_gil(&self.c.lock)
        self.c.is_asked = False
        pthread_mutex_unlock(&self.c.lock)
        self.forget()
        self.on_connect()

    def on_event(self, event, int error):
        """Hear of what has become of it; the subclass does, in a dispatcher thread."""
        raise NotImplementedError

    def on_connect(self):
        """Dial, and ``connect`` or ``dial_after``; the subclass does, in the poller's thread."""
        raise NotImplementedError

    def forget_after_fork(self):
        """In a forked child, which has no loop of ours: touch nothing that is the parent's."""
        self.is_foreign = True
        self.c.is_stopping = self.c.is_ended = True
        pthread_mutex_init(&self.c.lock, NULL)
        cond_init_monotonic(&self.c.ended)


cdef descriptors_t* descriptors = own_descriptors()


cdef void end_close_connection(end_t* end, int fd, tls_t* tls) noexcept nogil:
    """Close a connection that the loop never had."""
    descriptors_shut(descriptors, fd)
    tls_free(tls)


cdef class Writer(End):
    """The end at which messages to a peer are sent; the peer has dialled.

    Parameters
    ----------
    streams : Streams
    kind : str
        "msgapp" or "message".
    member_id, peer_id : int
    profile : str
        Encoding on the wire; see ``PipelineConfig``.
    queue_length, queue_bytes : int
        What its channel holds.

    Notes
    -----
    Thread-safe. Nothing here waits but ``wait_stopped``.
    Source: etcd rafthttp/stream.go, streamWriter.
    """

    cdef writer_t w
    cdef uint64_t n_lost    # not told yet; guarded by the end's lock
    cdef bint is_whole      # so is its channel

    def __cinit__(self, Streams streams not None, str kind not None, uint64_t member_id,
                  uint64_t peer_id, *, profile, uint32_t queue_length, int64_t queue_bytes):
        cdef channel_limits_t limits
        self.c = &self.w.end
        self.init(streams, kind, member_id, peer_id)
        limits.messages = queue_length
        limits.bytes = queue_bytes
        limits.large_min = <size_t>-1       # in the order in which they came
        limits.max_age_ns = 0
        self.w.profile = profile_index(profile)
        if channel_init(&self.w.channel, &limits, &streams.loop.sending.budget) != 0:
            raise MemoryError
        self.is_whole = True
        self.c.conn.io.returned = writer_returned
        self.c.due.due = writer_due

    def __dealloc__(self):
        if self.is_whole and not self.is_foreign:
            channel_free(&self.w.channel)

    @property
    def working(self):
        """Whether it takes messages: a connection is attached, and was not seen to break."""
        return load_int(&self.w.working) != 0

    def attach(self, sock not None, bytes head not None, *, bint is_chunked):
        """Send on a connection on which the peer has asked for the stream.

        Parameters
        ----------
        sock : OwnSocket
            It and its TLS are the loop's from here on.
        head : bytes
            The head of the answer.
        is_chunked : bool
            Whether what follows is in chunks; otherwise it ends with the connection.

        Returns
        -------
        bool
            False when it is being stopped; the connection is closed then. A stream that is up is
            ended for it, in good order.
        """
        return self.hand_over(sock, head, is_chunked)

    cdef int offer_job(self, job_t* job, bint is_alone) noexcept:
        """Offer a job, which is the caller's unless it is accepted; OFFER_*."""
        cdef bint is_needed = False
        cdef int rc
        if try_lock(&self.c.lock):
            rc = writer_offer(&self.w, job, is_alone, &is_needed)
        else:
            with nogil:
                # The lock's owner was preempted. Only C state is touched.
                pthread_mutex_lock(&self.c.lock)
                rc = writer_offer(&self.w, job, False, &is_needed)
        if is_needed:
            loop_wake(&self.streams.loop.sending.loop)
        return rc

    def stats(self):
        """Return the books at one instant: PipelineStats."""
        cdef books_t books
        lock_with_gil(&self.c.lock)
        books = self.w.channel.books
        pthread_mutex_unlock(&self.c.lock)
        return books_seen(&books)

    def follower_stats(self):
        """Return what became of MsgApp messages: FollowerStats."""
        cdef follower_t follower
        lock_with_gil(&self.c.lock)
        follower = self.w.follower
        pthread_mutex_unlock(&self.c.lock)
        return follower_seen(&follower)

    def forget_after_fork(self):
        """In a forked child, where nobody would send what it takes."""
        super().forget_after_fork()
        store_int(&self.w.working, 0)
        self.w.channel.is_stopping = True

    cdef void note_event(self) noexcept:
        self.n_lost += self.w.n_lost
        self.w.n_lost = 0

    def take_lost(self):
        """Return how many messages have failed with the stream since the last call: when LOST."""
        cdef uint64_t lost
        lock_with_gil(&self.c.lock)
        lost, self.n_lost = self.n_lost, 0
        pthread_mutex_unlock(&self.c.lock)
        return lost

    def begin_stop(self):
        """Take nothing any more and end the stream; how many queued messages were dropped."""
        cdef job_t* job
        cdef job_t* first
        cdef bint is_needed = False
        cdef int dropped = 0
        if self.is_foreign:
            return 0
        with nogil:
            # Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            first = writer_begin_stop(&self.w, &is_needed)
            pthread_mutex_unlock(&self.c.lock)
            if is_needed:
                loop_wake(&self.streams.loop.sending.loop)
        job = first
        while job is not NULL:
            dropped += 1
            job = job.next
        jobs_free(first)
        return dropped


cdef class Reader(End):
    """The end at which messages of a peer arrive; we dial.

    Parameters
    ----------
    streams : Streams
    kind : str
        "msgapp" or "message".
    member_id, peer_id : int

    Notes
    -----
    Thread-safe. Nothing here waits but ``wait_stopped``.
    Source: etcd rafthttp/stream.go, streamReader.
    """

    cdef stream_reader_t r

    def __cinit__(self, Streams streams not None, str kind not None, uint64_t member_id,
                  uint64_t peer_id):
        self.c = &self.r.end
        self.init(streams, kind, peer_id, member_id)
        self.c.conn.io.returned = reader_returned
        self.c.due.due = reader_due

    @property
    def state(self):
        """What it is at: down, dialling, asking, judged, up or refused."""
        return STATES[load_int(&self.r.state)]

    def pause(self, *, bint is_paused):
        """Throw away what comes, as if the network lost it, from now on or not any more."""
        store_int(&self.r.is_paused, is_paused)

    def dial_after(self, double seconds):
        """Have ``on_connect`` called in so many seconds, unless the stream is up or stops."""
        cdef int64_t at_ns = clock_ns() + <int64_t>(seconds * 1e9)
        if load_int(&self.c.is_stopping):
            return
        self.open()
        with nogil:
            # Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            self.r.wants_dial = True
            self.r.dial_ns = at_ns
            end_wake(self.c)

    def connect(self, sock not None, bytes request not None):
        """Ask for the stream on a connection that was dialled; the event HEAD follows.

        ``sock``, an OwnSocket, and its TLS are the loop's from here on. False when it stops.
        """
        return self.hand_over(sock, request, False)

    def head(self):
        """Return what has come in answer, up to 16 KiB: bytes. Between HEAD and the verdict."""
        cdef bytes head = b""
        lock_with_gil(&self.c.lock)
        try:        # the loop lets go of it when it stops, for which it takes the lock before
            if not self.c.is_stopping and self.r.kept is not NULL:
                head = PyBytes_FromStringAndSize(<char*>self.r.kept, self.r.kept_len)
        finally:
            pthread_mutex_unlock(&self.c.lock)
        return head

    def accept(self, size_t head_len, *, bint is_chunked):
        """Take what follows the first ``head_len`` bytes of the answer for the stream."""
        self.give_verdict(VERDICT_ACCEPT, head_len, is_chunked, 0.0)

    def refuse(self):
        """Do without the stream: close the connection, and nothing follows."""
        self.give_verdict(VERDICT_REFUSE, 0, False, 0.0)

    def wait_refused(self, size_t head_len, *, bint is_chunked, double wait_s):
        """Do without the stream, and have ``on_connect`` called when the refusal has ended.

        Throw away what follows the first ``head_len`` bytes of the answer: to the last chunk or the
        end of the connection, until nothing has come for 5 s, for ``wait_s`` or 1 MiB at most.
        """
        self.give_verdict(VERDICT_REFUSE, head_len, is_chunked, wait_s)

    cdef int give_verdict(
            self, int verdict, size_t head_len, bint is_chunked, double wait_s) except -1:
        if self.is_foreign:
            return 0
        with nogil:
            # Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            self.r.verdict = verdict
            self.r.head_len = head_len
            self.c.next_is_chunked = is_chunked
            self.r.wait_ns = <int64_t>(wait_s * 1e9)
            end_wake(self.c)
        return 0

    def stats(self):
        """Return (messages, bytes, since, ignored, dropped).

        What has come by it ever, among it what went nowhere (dropped), while it is paused or for
        want of room; besides that what was of types that are not for Raft (ignored); and when it
        came up, in seconds of ``time.monotonic``, 0.0 while it is down.
        """
        return (count_get(&self.r.messages), count_get(&self.r.bytes),
                <double>count_get(&self.r.since_ns) / 1e9, count_get(&self.r.ignored),
                count_get(&self.r.dropped))

    def begin_stop(self):
        """End the stream and do not dial any more; 0, as the number of messages dropped."""
        cdef bint is_needed
        if self.is_foreign:
            return 0
        with nogil:
            # Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            is_needed = end_begin_stop(self.c)
            pthread_mutex_unlock(&self.c.lock)
            if is_needed:
                loop_wake(&self.streams.loop.sending.loop)
        return 0


cdef class Channels:
    """Takes each message to the channel that carries it; etcd rafthttp/peer.go ``pick``, ``send``.

    Parameters
    ----------
    pipeline : Sender
    msgapp, message : Writer or None
    on_full : callable
        Called with a message that its full channel has refused. It must not block.

    Notes
    -----
    Thread-safe; never waits. A MsgApp goes by the first of msgapp, message and the pipeline that is
    working; a MsgSnap by the pipeline; all others by message, or the pipeline. Differs from etcd:
    what is larger than 64 KiB is never on a message stream, for heartbeats would wait for it.
    """

    cdef Sender pipeline
    cdef Writer msgapp
    cdef Writer message
    cdef object on_full
    cdef int64_t n_paused       # atomic
    cdef int paused             # atomic

    def __cinit__(self, Sender pipeline not None, Writer msgapp, Writer message, on_full not None):
        self.pipeline = pipeline
        pipeline.has_streams = msgapp is not None or message is not None
        self.msgapp = msgapp
        self.message = message
        self.on_full = on_full

    @property
    def is_paused(self):
        """Whether messages are dropped instead, as if the network lost them."""
        return load_int(&self.paused) != 0

    @is_paused.setter
    def is_paused(self, bint value):
        store_int(&self.paused, value)

    @property
    def paused_drops(self):
        """Messages dropped while paused."""
        return load_i64(&self.n_paused)

    cdef Writer pick(self, int type, size_t size):
        """Return the stream for a message of a type and an encoded size; None is the pipeline."""
        if type == TYPE_SNAP:
            return None
        if type == TYPE_APP and self.msgapp is not None and load_int(&self.msgapp.w.working) \
                and size <= FRAME_LIMIT:
            return self.msgapp
        if self.message is not None and load_int(&self.message.w.working) \
                and size <= MESSAGE_STREAM_MAX:
            return self.message
        return None

    cdef int offer(self, object message, bint is_alone, int32_t* type) except -2:
        """Offer a message, which others follow at once unless it ``is_alone``; OFFER_*."""
        cdef job_t* job = self.pipeline.make_job(message)
        cdef Writer writer = self.pick(job.type, job.size_bytes)
        cdef int rc = OFFER_NOT_WORKING
        type[0] = job.type
        if writer is not None and is_plain(message, job):
            rc = writer.offer_job(job, is_alone)
        if rc == OFFER_FULL:
            job_free(job)
        elif rc != OFFER_ACCEPTED:
            rc = self.pipeline.offer(job)
        if rc == OFFER_FULL:
            self.on_full(message)
        return rc

    def send(self, message):
        """Offer a message: SendResult, as ``Sender.send``; None if it was dropped while paused."""
        cdef int32_t type
        if load_int(&self.paused):
            add_i64(&self.n_paused, 1)
            return None
        return <object>RESULTS[self.offer(message, True, &type)]

    def name_for(self, message):
        """Return which would carry a message now: "msgapp", "message" or "pipeline"."""
        cdef job_t* job = self.pipeline.make_job(message)
        cdef Writer writer = self.pick(job.type, job.size_bytes)
        if writer is not None and not is_plain(message, job):
            writer = None
        job_free(job)
        return "pipeline" if writer is None else writer.kind


cdef class Appends:
    """How many MsgApp were handed to peers, and when the last of them were: for ``ServerStats``.

    Attributes
    ----------
    is_leading : bool
        Whether whoever hears of it knows that we lead; cleared by him when he does not any more.
    """

    cdef pthread_mutex_t lock   # guards what follows
    cdef uint64_t n
    cdef int64_t at_ns[APPEND_SAMPLES]
    cdef int leading            # atomic

    def __cinit__(self):
        if pthread_mutex_init(&self.lock, NULL) != 0:
            raise MemoryError

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    @property
    def is_leading(self):
        """Whether whoever hears of it knows that we lead."""
        return load_int(&self.leading) != 0

    @is_leading.setter
    def is_leading(self, bint value):
        store_int(&self.leading, value)

    cpdef add(self, Py_ssize_t messages=1):
        """Count some. Thread-safe."""
        cdef int64_t now_ns = clock_ns()
        cdef Py_ssize_t i
        lock_with_gil(&self.lock)
        self.n += messages
        for i in range(min(messages, <Py_ssize_t>APPEND_SAMPLES)):
            self.at_ns[(self.n - 1 - i) % APPEND_SAMPLES] = now_ns
        pthread_mutex_unlock(&self.lock)

    def read(self):
        """Return how many there were, and when the last ones: (int, list of monotonic seconds)."""
        cdef list last = []
        cdef uint64_t i
        lock_with_gil(&self.lock)
        try:
            for i in range(self.n - min(self.n, <uint64_t>APPEND_SAMPLES), self.n):
                last.append(<double>self.at_ns[i % APPEND_SAMPLES] / 1e9)
            return self.n, last
        finally:
            pthread_mutex_unlock(&self.lock)

    def forget_after_fork(self):
        """In a forked child: the lock may have been held."""
        pthread_mutex_init(&self.lock, NULL)


def send_all(dict peers not None, messages, send_other not None, Appends appends not None,
             on_lead not None):
    """Hand messages to the peers they are for; how many were not queued.

    Parameters
    ----------
    peers : dict of int to Peer
        By member ID; each has its ``channels``.
    messages : iterable
    send_other : callable
        Called with a message that is for none of them, or is none; returns whether it was queued.
    appends : Appends
        Counts the MsgApp among those for peers.
    on_lead : callable
        Called after the first of them, if it is not known that we lead.

    Notes
    -----
    Raises what ``Sender.send`` does, and what ``messages`` does; those before were handed on.
    """
    cdef Channels channels
    cdef int32_t type
    cdef uint64_t to
    cdef Py_ssize_t not_queued = 0, n_appends = 0
    cdef bint is_alone = PyObject_LengthHint(messages, 2) == 1
    try:
        for message in messages:
            if isinstance(message, Message):
                to = count_get(&(<Message>message).c.to)
                peer = peers.get(to)
            elif isinstance(message, EncodedMessage):
                to = count_get(&(<EncodedMessage>message)._to)
                peer = peers.get(to)
            else:
                try:
                    peer = peers.get(message.to)
                except (AttributeError, TypeError):     # an ID can be looked up
                    peer = None
            if peer is None:
                not_queued += not send_other(message)
                continue
            channels = peer.channels
            if load_int(&channels.paused):
                add_i64(&channels.n_paused, 1)
                not_queued += 1
                n_appends += message.type == TYPE_APP
                continue
            not_queued += channels.offer(message, is_alone, &type) != OFFER_ACCEPTED
            n_appends += type == TYPE_APP
    finally:
        if n_appends > 0:
            appends.add(n_appends)
            if not load_int(&appends.leading):
                on_lead()
    return not_queued


cdef bint is_plain(object message, job_t* job) noexcept:
    """Tell whether a message is one that a frame may carry.

    An etcd ends itself at a frame of a msgapp stream with no message in it; to an older one a field
    that has not the type we know is none either. A post of either is only refused. What others have
    encoded is read for it, unless it was when the message was made.
    """
    cdef wire_decoded_t decoded
    if job.has_facts:
        return True
    if isinstance(message, EncodedMessage) and get_int(&(<EncodedMessage>message).is_plain):
        return True
    if wire_decode(<const uint8_t*>job.segments[1].iov_base, job.segments[1].iov_len,
                   &decoded) != WIRE_OK or decoded.has_unknown:
        return False
    if job.n_owners == 0:
        # What is borrowed is read again before it is written: that it does not change is not ours.
        facts_of(&decoded, &job.facts)
        job.has_facts = True
    return True
