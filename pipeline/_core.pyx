# cython: auto_pickle=False
"""The sending core: where Python meets the I/O loop on the way out.

``_pipe``, ``_worker`` and ``_sending`` hold what runs without the GIL, ``_jobs`` what makes jobs of
messages. Here are the calls a dispatcher thread makes for a worker, and the Python owners of the C
structs:

    IOLoop      owns a sending_t; keeps every Sender alive that has a live worker, and every stream
    Sender      owns a pipe_t; the base of ``pipeline.Pipeline``
    ActiveFlag  "is the peer active", read by the loop, written by ``PeerStatus``
"""

from cython cimport critical_section
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from pipeline.send._books cimport (
    OUTCOME_FAILED, OUTCOME_SENT, books_check, books_t, follower_stddev_ms, follower_t,
)
from pipeline.send._channel cimport OFFER_ACCEPTED, channel_limits_t, channel_take_expired, job_t
from pipeline.net._cursor cimport cursor_is_at_end
from pipeline.net._gil cimport lock_with_gil, try_lock
from pipeline.net._loop cimport loop_init
from pipeline.wire._http cimport HTTP_LENGTH_MAX, http_recognise_204, http_says_close
from pipeline.send._jobs cimport (
    job_free, job_from_encoded, job_from_message, job_from_protobuf, jobs_free,
)
from pipeline.send._pipe cimport (
    ERROR_CLOSED, ERROR_DEAD_LINK, ERROR_RESPONSE_TIMEOUT, ERROR_STALLED, ERROR_STOPPED,
    EVENT_ANSWER, EVENT_CLOSED, EVENT_CONNECT, EVENT_FAILED, EVENT_NOT_DIALLED, EVENT_SUCCEEDED,
    EVENT_TASKS, GIVEN_NOT, GIVEN_RETIRED, GIVEN_TO_LOOP, WORKER_IDLE, WORKER_JOINED_MAX,
    WORKER_PYTHON, WORKER_READING, WORKER_RETIRED, WORKER_WRITING, event_t, limits_t,
    pipe_begin_stop, pipe_count, pipe_free, pipe_init, pipe_offer, pipe_retire_connections,
    sending_queue_tasks, sending_t, worker_t,
)
from pipeline.send._sending cimport sending_free, sending_init, sending_start, sending_stop
from pipeline.send._worker cimport worker_give_back, worker_to_python
from pipeline.tls._engine cimport Session
from pipeline.wire._messages cimport EncodedMessage, Message, profile_index
from pipeline.wire._types cimport TYPE_APP
from pipeline.send._ring cimport (
    RING_OK, ring_free, ring_init, ring_len, ring_t, ring_try_pop, ring_try_push,
)
from pipeline.net._sockets cimport own_descriptors
from pipeline._system cimport (
    add_i64, add_int, clock_ns, cond_init_monotonic, deadline_timespec, list_is_empty, list_take,
    load_i64, load_int, note_int, pthread_cond_broadcast, pthread_cond_timedwait, pthread_cond_wait,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, store_int, swap_int, timespec,
)

import enum
import os

from pipeline.errors import InternalError, UsageError
from pipeline.stats import FollowerStats, PipelineStats
from pipeline.types import SendResult

__all__ = [
    "ActiveFlag", "Channel", "Event", "GiveBack", "IOLoop", "Sender",
    "error_text", "recognise_204", "says_close",
]

# What a worker is at, in the words of ``Sender.states``.
cdef dict STATES = {
    WORKER_IDLE: "idle",
    WORKER_WRITING: "writing",
    WORKER_READING: "reading",
    WORKER_PYTHON: "in Python",
    WORKER_RETIRED: "retired",
}

RESULTS = (SendResult.ACCEPTED, SendResult.QUEUE_FULL, SendResult.STOPPED)


class Event(enum.IntEnum):
    """Why the loop hands a worker to Python (``_pipe.pxd``, EVENT_*)."""

    CONNECT = EVENT_CONNECT
    NOT_DIALLED = EVENT_NOT_DIALLED
    ANSWER = EVENT_ANSWER
    FAILED = EVENT_FAILED
    SUCCEEDED = EVENT_SUCCEEDED
    CLOSED = EVENT_CLOSED


cdef tuple EVENTS = (None, *Event)


class GiveBack(enum.IntEnum):
    """What became of a worker given back (``_pipe.pxd``, GIVEN_*)."""

    TO_LOOP = GIVEN_TO_LOOP
    RETIRED = GIVEN_RETIRED
    HAS_JOB = GIVEN_NOT


cdef tuple GIVE_BACKS = tuple(GiveBack)

cdef dict REASONS = {
    ERROR_CLOSED: "connection closed by the peer before it answered",
    ERROR_RESPONSE_TIMEOUT: "no answer within the response timeout",
    ERROR_STALLED: "stalled: no byte could be written within the stall timeout",
    ERROR_STOPPED: "stopped",
    ERROR_DEAD_LINK: "dead link: the peer acknowledges nothing",
}


def error_text(int error):
    """Tell a cause of failure in words: one of the loop's own, or an errno."""
    if error in REASONS:
        return REASONS[error]
    return os.strerror(error)


def recognise_204(const uint8_t[::1] data not None):
    """Return the length of the 204 answer at the start of ``data``, 0 for more, -1 for odd.

    The recogniser the loop uses (``_http.pxd``), for tests. Looks at 2,048 bytes at most.
    """
    if data.shape[0] == 0:
        return 0
    return http_recognise_204(&data[0], min(data.shape[0], 2048))


def says_close(const uint8_t[::1] data not None):
    """Tell whether a 204 that was recognised is the last on its connection; for tests."""
    return http_says_close(&data[0], data.shape[0])


cdef class ActiveFlag:
    """Whether a peer is active: one C int, so that the loop can read it without the GIL.

    Thread-safe; never waits.
    """

    def get(self):
        """Tell whether the flag is set."""
        return load_int(&self.value) != 0

    def set(self, bint value):
        """Set or clear the flag."""
        store_int(&self.value, value)


cdef object books_seen(const books_t* books):
    """Return a copy of books as PipelineStats."""
    return PipelineStats(
        books.offered, books.accepted, books.refused, books.sent, books.failed, books.dropped,
        books.queued, books.in_flight, books.sent_bytes, books.queued_bytes)


cdef object follower_seen(const follower_t* follower):
    """Return a copy of a follower's statistics as FollowerStats."""
    return FollowerStats(
        follower.success, follower.fail, follower.current_ms, follower.mean_ms,
        follower_stddev_ms(follower), follower.minimum_ms, follower.maximum_ms)


cdef job_t* job_of(IOLoop loop, object message, int profile, bint is_framed) except NULL:
    """Make the job of a message; see ``_core.pxd``."""
    if not list_is_empty(&loop.sending.finished):
        loop.drop_finished()
    if isinstance(message, Message):
        return job_from_message(<Message>message, profile, is_framed)
    if isinstance(message, EncodedMessage):
        return job_from_encoded(<EncodedMessage>message)
    return job_from_protobuf(message)


cdef class Channel:
    """msgc on its own: the ring of ``_ring.pxd`` holding Python objects, for tests and benchmarks.

    Parameters
    ----------
    cap : int
        Objects it holds, 1 to 65536.

    Notes
    -----
    Not thread-safe without the GIL: in a Sender the pipe's lock guards the ring.
    """

    cdef ring_t ring

    def __cinit__(self, uint32_t cap):
        if not 1 <= cap <= 65536:
            raise UsageError(f"cap: {cap} is not in 1..65536")
        if ring_init(&self.ring, cap) != RING_OK:
            raise MemoryError

    def __dealloc__(self):
        if self.ring.slots is not NULL:
            while self.try_pop() is not None:
                pass
            ring_free(&self.ring)

    def __len__(self):
        return ring_len(&self.ring)

    def try_push(self, item not None):
        """Append ``item``; False, and nothing done, when full."""
        if ring_try_push(&self.ring, <void*>item) != RING_OK:
            return False
        Py_INCREF(item)
        return True

    def try_pop(self):
        """Take the oldest item, or None."""
        cdef void* pointer = ring_try_pop(&self.ring)
        if pointer is NULL:
            return None
        item = <object><PyObject*>pointer
        Py_DECREF(item)
        return item


# -- the loop's owner

cdef class IOLoop:
    """One native I/O thread and the queue of events it has for Python.

    Parameters
    ----------
    queue_bytes : int
        Budget for the bytes queued by all its senders together.
    name : str
        Of the thread, as ``top`` shows it; at most 15 bytes count.

    Notes
    -----
    Thread-safe. The thread takes no GIL and handles no signals.
    """

    def __cinit__(self, int64_t queue_bytes, str name="pipeline-io"):
        cdef bytes comm = name.encode()[:15]
        cdef int error = sending_init(&self.sending, queue_bytes)
        memcpy(self.sending.name, PyBytes_AS_STRING(comm), len(comm))
        if error != 0:
            raise OSError(error, error_text(error))
        self.is_made = True
        self.senders = set()
        self.streams = set()

    def __dealloc__(self):
        # Running loops are kept alive by dispatcher.py; a stopped one has no thread and no pipe.
        if self.is_made and not load_int(&self.is_running):
            self.drop_finished()
            sending_free(&self.sending)

    def start(self, int poller_fd):
        """Start the thread.

        Parameters
        ----------
        poller_fd : int
            The eventfd that is written to when ``take_connects`` has something to return; it is to
            stay open until ``stop`` has returned.
        """
        cdef int error = sending_start(&self.sending, own_descriptors(), poller_fd)
        if error != 0:
            raise OSError(error, error_text(error))
        store_int(&self.is_running, True)

    def stop(self):
        """End the streams and the thread. Every sender must have been told to stop.

        Waits for the thread only. Not to be called by two threads at a time.
        """
        if not swap_int(&self.is_running, False):   # first: from now on nothing is opened
            return
        for stream in list(self.streams):
            stream.begin_stop()
        with nogil:
            # Wait for the loop to detach what it was told to; it never waits for Python.
            sending_stop(&self.sending)
        self.drop_finished()

    @property
    def queued_bytes(self):
        """Bytes queued by all senders."""
        return load_i64(&self.sending.budget.bytes)

    cdef void drop_finished(self) noexcept:
        """Free finished jobs and drop what they borrowed."""
        cdef job_t* job = <job_t*>list_take(&self.sending.finished)
        cdef job_t* following
        cdef int64_t jobs = 0, size = 0
        cdef job_t* first = job
        while job is not NULL:
            jobs += 1
            size += <int64_t>job.size_bytes
            job = job.next
        add_i64(&self.sending.finished_jobs, -jobs)
        add_i64(&self.sending.finished_bytes, -size)
        job = first
        while job is not NULL:
            following = job.next
            job_free(job)
            job = following

    def next_event(self):
        """Wait for an event without the GIL.

        Returns
        -------
        (subject, kind, error) or None
            A Worker or one end of a stream, whose ``handle`` is to be called with the other two.
            The subject is None when there are only tasks to run or payloads to release; None when
            the queue is closed and empty.
        """
        cdef sending_t* sending = &self.sending
        cdef event_t* event
        cdef event_t taken
        with nogil:
            # Wait until there is an event or the queue is closed. Only C state is touched.
            pthread_mutex_lock(&sending.event_lock)
            sending.event_waiters += 1
            while sending.event_head is NULL and not sending.events_closed:
                pthread_cond_wait(&sending.event_cond, &sending.event_lock)
            sending.event_waiters -= 1
            event = sending.event_head
            if event is not NULL:
                taken = event[0]
                sending.event_head = event.next
                if sending.event_head is NULL:
                    sending.event_tail = NULL
            pthread_mutex_unlock(&sending.event_lock)
        if event is NULL:
            return None
        if taken.kind == EVENT_TASKS:
            store_int(&sending.tasks_queued, 0)
            self.drop_finished()
            return (None, None, 0)
        return (<object>taken.subject, taken.kind, taken.error)

    def take_connects(self):
        """Return, for the poller, who needs a connection dialled or closed.

        Returns
        -------
        list of (subject, kind)
            Workers and ends of streams, whose ``dial`` is to be called with the kind of event.
        """
        cdef event_t* event
        cdef list taken = []
        lock_with_gil(&self.sending.event_lock)
        event = self.sending.connect_head
        self.sending.connect_head = self.sending.connect_tail = NULL
        pthread_mutex_unlock(&self.sending.event_lock)
        while event is not NULL:
            taken.append((<object>event.subject, event.kind))
            event = event.next
        return taken

    def take_expired(self):
        """Return the senders that may have messages to be failed for their age; often none."""
        return list(self.senders) if swap_int(&self.sending.has_expired, 0) else []

    def queue_tasks(self):
        """Have ``next_event`` return for Python's own tasks in some dispatcher thread, soon."""
        with nogil:
            sending_queue_tasks(&self.sending)

    def has_waiter(self):
        """Tell whether a dispatcher thread is waiting for an event."""
        cdef int waiters
        lock_with_gil(&self.sending.event_lock)
        waiters = self.sending.event_waiters
        pthread_mutex_unlock(&self.sending.event_lock)
        return waiters > 0

    def close_events(self):
        """Let ``next_event`` return None in every dispatcher thread, once the queue is empty."""
        lock_with_gil(&self.sending.event_lock)
        self.sending.events_closed = True
        pthread_cond_broadcast(&self.sending.event_cond)
        pthread_mutex_unlock(&self.sending.event_lock)

    def forget_after_fork(self):
        """Cut loose in a forked child, which has none of our threads: everything is stopped.

        Locks may have been held by threads that do not exist here, so they are made anew.
        """
        cdef Sender sender
        for stream in self.streams:
            stream.forget_after_fork()
        self.streams.clear()
        pthread_mutex_init(&self.sending.event_lock, NULL)
        cond_init_monotonic(&self.sending.event_cond)
        self.sending.events_closed = True
        self.sending.connect_head = self.sending.connect_tail = NULL
        loop_init(&self.sending.loop)           # its descriptors are closed already
        store_int(&self.is_running, False)
        for sender in self.senders:
            sender.forget_after_fork()
            pthread_mutex_init(&sender.pipe.lock, NULL)
            cond_init_monotonic(&sender.pipe.retired)
            sender.pipe.channel.is_stopping = True
            sender.pipe.is_detached = True
            sender.pipe.live = 0
        self.senders.clear()


cdef class Sender:
    """msgc, the books and the workers of one peer: what ``Pipeline`` is made of in C.

    Between ``open`` and ``begin_stop`` the loop runs the workers.

    Attributes
    ----------
    workers : tuple of Worker
        Empty before ``open``.
    """

    def __dealloc__(self):
        cdef int i
        if not load_int(&self.is_open):
            return
        for i in range(self.pipe.n_workers):    # left behind by a fork
            if self.pipe.workers[i].job is not NULL:
                job_free(self.pipe.workers[i].job)
                self.pipe.workers[i].job = NULL
        jobs_free(self.pipe.channel.expired)    # the same
        pipe_free(&self.pipe)

    def __cinit__(self, *args, **kwargs):
        self.opened = ()

    @property
    def workers(self):
        """The workers; empty before ``open``."""
        with critical_section(self):
            return self.opened

    def open(self, IOLoop loop not None, ActiveFlag active not None, config not None,
             list connections not None):
        """Let the loop run this sender's workers. Once.

        Parameters
        ----------
        loop : IOLoop
        active : ActiveFlag
            Whether the peer is active, which a 204 of an inactive one tells Python.
        config : PipelineConfig
        connections : list of pool.PooledConnection
            A connection for each worker: ``config.connections``.
        """
        cdef channel_limits_t channel_limits
        cdef limits_t limits
        cdef Worker worker
        cdef list workers = []
        cdef tuple made
        cdef int i
        if load_int(&self.is_open):
            raise UsageError("start: a pipeline can be started once")
        channel_limits.messages = config.queue_length
        channel_limits.bytes = config.queue_bytes
        channel_limits.max_age_ns = <int64_t>((config.max_queue_age or 0.0) * 1e9)
        limits.response_timeout_ns = <int64_t>(config.response_timeout_s * 1e9)
        limits.stall_timeout_ns = <int64_t>(config.stall_timeout_s * 1e9)
        limits.idle_timeout_ns = <int64_t>(config.idle_timeout_s * 1e9)
        limits.dead_link_timeout_ns = <int64_t>(config.dead_link_timeout_s * 1e9)
        self.profile = profile_index(config.profile)
        self.loop = loop
        self.active = active
        for connection in connections:
            worker = Worker.__new__(Worker)
            worker.sender = self
            worker.connection = connection
            workers.append(worker)
        made = tuple(workers)
        # From here on nothing is allocated that the collector looks at: a finalizer would let a
        # signal's handler in, which may stop the loop.
        if not load_int(&loop.is_running):
            raise UsageError("start: it was stopped")
        if pipe_init(&self.pipe, &loop.sending, len(made), &channel_limits, &limits,
                     &active.value, <void*>self) != 0:
            raise MemoryError
        for i in range(self.pipe.n_workers):
            worker = made[i]
            worker.c = &self.pipe.workers[i]
            worker.c.event.subject = <void*>worker
        with critical_section(self):
            self.opened = made
        store_int(&self.is_open, True)
        loop.senders.add(self)

    def send(self, message):
        """Offer ``message`` to the peer without waiting.

        Delivery is not promised; failures reach ``Raft.report_unreachable``.

        Parameters
        ----------
        message : Message, EncodedMessage or a raftpb protobuf object
            Up to 16 KiB encoded is copied before return. Of a larger one payloads of 4 KiB and
            more are borrowed until it has its outcome: do not change a mutable buffer.

        Returns
        -------
        SendResult
            ``ACCEPTED``, ``QUEUE_FULL`` (64 messages or 128 MiB wait, by default) or ``STOPPED``;
            refusals are counted, and a caller that wants Raft to hear of them tells it
            (``Peer.send`` does).

        Raises
        ------
        MarshalError
            If the message encodes to more than 2**31 - 1 bytes.
        UsageError
            If it is not a message, or the pipeline was not started.

        Notes
        -----
        Thread-safe; never waits. Source: etcd rafthttp/peer.go ``send``, pipeline.go ``msgc``.
        """
        cdef job_t* job = self.make_job(message)
        return <object>RESULTS[self.offer(job)]

    cdef job_t* make_job(self, object message) except NULL:
        """Make the job of a message; UsageError if nothing can be offered yet."""
        if not load_int(&self.is_open):
            raise UsageError("send: the pipeline was not started")
        return job_of(self.loop, message, self.profile, self.has_streams)

    cdef int offer(self, job_t* job) noexcept:
        """Offer a job, which is not the caller's any more; OFFER_*."""
        cdef int rc
        if try_lock(&self.pipe.lock):
            rc = pipe_offer(&self.pipe, job)
        else:
            with nogil:
                # The lock's owner was preempted. The job is offered before the GIL is had again,
                # which may be long in coming. Only C state is touched.
                pthread_mutex_lock(&self.pipe.lock)
                rc = pipe_offer(&self.pipe, job)
        if rc != OFFER_ACCEPTED:
            job_free(job)
        return rc

    def stats(self):
        """Return the books at one instant: PipelineStats. Thread-safe."""
        cdef books_t books
        if not load_int(&self.is_open):
            return PipelineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        lock_with_gil(&self.pipe.lock)
        books = self.pipe.channel.books
        pthread_mutex_unlock(&self.pipe.lock)
        return books_seen(&books)

    def states(self):
        """Return what each worker is at, for tests: a list of words. Thread-safe.

        "reading odd" is a worker that waits for more of an answer which Python has begun to read.
        A worker may have gone on by the time its word is looked at.
        """
        cdef worker_t* worker
        cdef int i, state, is_odd
        states = []
        if not load_int(&self.is_open):
            return states
        for i in range(self.pipe.n_workers):
            worker = &self.pipe.workers[i]
            with nogil:
                # The lock counts workers out; the loop changes what else they are at without it.
                pthread_mutex_lock(&self.pipe.lock)
                state = load_int(&worker.state)
                is_odd = load_int(&worker.is_odd)
                pthread_mutex_unlock(&self.pipe.lock)
            states.append("reading odd" if state == WORKER_READING and is_odd else STATES[state])
        return states

    def follower_stats(self):
        """Return what became of MsgApp messages: FollowerStats. Thread-safe."""
        cdef follower_t follower
        if not load_int(&self.is_open):
            return FollowerStats(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        lock_with_gil(&self.pipe.lock)
        follower = self.pipe.follower
        pthread_mutex_unlock(&self.pipe.lock)
        return follower_seen(&follower)

    # -- stopping

    def begin_stop(self):
        """Refuse offers, drop what is queued, and let the loop forget the workers.

        Returns the number of messages dropped; 0 when stopped before.
        """
        cdef int dropped = 0
        cdef job_t* job
        cdef job_t* first
        if not load_int(&self.is_open):
            return 0
        with nogil:
            # Only C state is touched.
            first = pipe_begin_stop(&self.pipe)
        while first is not NULL:
            job = first
            first = job.next
            job_free(job)
            dropped += 1
        return dropped

    def wait_stopped(self, double timeout_s, int mine=0):
        """Wait until at most ``mine`` workers are live; the number live. Without the GIL."""
        cdef int live
        cdef int64_t deadline_ns = clock_ns() + <int64_t>(timeout_s * 1e9)
        cdef timespec at = deadline_timespec(deadline_ns)
        if not load_int(&self.is_open):
            return 0
        with nogil:
            # Wait for the workers' last callbacks. Only C state is touched.
            pthread_mutex_lock(&self.pipe.lock)
            while self.pipe.live > mine and clock_ns() < deadline_ns:
                pthread_cond_timedwait(&self.pipe.retired, &self.pipe.lock, &at)
            live = self.pipe.live
            pthread_mutex_unlock(&self.pipe.lock)
        if live == 0:
            self.loop.senders.discard(self)
        return live

    def on_event(self, Worker worker not None, event, int error):
        """Handle an event of one of the workers; the subclass does, in a dispatcher thread."""
        raise NotImplementedError

    def on_connect(self, Worker worker not None, event):
        """Handle what ``take_connects`` returns; the subclass does, in the poller's thread."""
        raise NotImplementedError

    def on_expired(self):
        """Handle what ``take_expired`` returns; the subclass does, in a dispatcher thread."""
        raise NotImplementedError

    def forget_after_fork(self):
        """Let go, in a forked child, of what the workers use; the subclass does."""
        raise NotImplementedError

    def take_expired(self):
        """Take the messages that waited too long: a list of (type, to), oldest first.

        They are in flight until ``finish_expired``. Thread-safe.
        """
        cdef job_t* first
        cdef job_t* job
        cdef list expired = []
        if not load_int(&self.is_open):
            return expired
        lock_with_gil(&self.pipe.lock)
        first = job = channel_take_expired(&self.pipe.channel)
        while job is not NULL:
            if job.type == TYPE_APP:
                self.pipe.follower.fail += 1
            job = job.next
        pthread_mutex_unlock(&self.pipe.lock)
        job = first
        while job is not NULL:
            expired.append((job.type, job.to))
            job = job.next
        jobs_free(first)
        expired.reverse()
        return expired

    def finish_expired(self, uint64_t count):
        """Write the outcome of ``count`` messages taken by ``take_expired`` into the books."""
        lock_with_gil(&self.pipe.lock)
        self.pipe.channel.books.in_flight -= count
        self.pipe.channel.books.failed += count
        books_check(&self.pipe.channel.books)
        pthread_mutex_unlock(&self.pipe.lock)

    def renew(self):
        """Have every worker dial anew before its next message. Thread-safe; never waits."""
        if load_int(&self.is_open):
            add_int(&self.pipe.generation, 1)

    def retire_connections(self):
        """Do as ``renew``, and have idle connections closed. Thread-safe; never waits."""
        if load_int(&self.is_open):
            with nogil:
                # Only C state is touched.
                pipe_retire_connections(&self.pipe)


cdef class Worker:
    """One sending slot of a Sender, and what it sends through.

    It comes to Python with an event, to a dispatcher thread or to the poller, and is that thread's
    until ``give_back``; the calls below are for that thread only, unless they say otherwise.

    Attributes
    ----------
    sender : Sender
        Whose it is.
    connection : pool.PooledConnection
        Its connection.
    """

    cdef readonly Sender sender
    cdef readonly object connection
    cdef worker_t* c            # in sender.pipe, and so as long there as the sender is

    def __init__(self):
        raise TypeError("a Worker is its Sender's: Sender.open makes it")

    def handle(self, int kind, int error):
        """Have the sender handle an event of this worker, in a dispatcher thread."""
        self.sender.on_event(self, EVENTS[kind], error)

    def dial(self, int kind):
        """Have the sender dial for this worker, or close what it has, in the poller's thread."""
        self.sender.on_connect(self, EVENTS[kind])

    def job(self):
        """Return (type, to, encoded size in bytes) of the worker's message."""
        cdef worker_t* worker = self.c
        if worker.job is NULL:
            raise InternalError("a worker has no message")
        return worker.job.type, worker.job.to, worker.job.size_bytes

    def answer(self):
        """Return (bytes of the answer read so far, whether the request is written whole)."""
        cdef worker_t* worker = self.c
        return (PyBytes_FromStringAndSize(<char*>worker.answer, worker.answer_len),
                worker.job is not NULL and cursor_is_at_end(&worker.cursor))

    def has_job(self):
        """Tell whether the worker has a message; it comes without one from an idle connection."""
        return self.c.job is not NULL

    def not_dialled(self):
        """Have a dispatcher thread fail the worker's message, for there is no connection for it."""
        cdef worker_t* worker = self.c
        with nogil:
            # The loop may hold the events' lock for a moment. Only C state is touched.
            worker_to_python(worker, EVENT_NOT_DIALLED, 0)

    def connect(self, sock not None, bytes head not None):
        """Give the worker a connected socket and the request head for it.

        Parameters
        ----------
        sock : OwnSocket
            One that does not block, and has shaken hands if it has TLS. Borrowed: it stays open
            until the worker comes back to Python.
        head : bytes
            The request head up to and with ``Content-Length: ``.
        """
        cdef int fd = sock.fileno()
        cdef Session tls = sock.tls
        cdef worker_t* worker = self.c
        cdef size_t n = PyBytes_GET_SIZE(head)
        cdef uint8_t* copy = <uint8_t*>malloc(n + HTTP_LENGTH_MAX + WORKER_JOINED_MAX)
        if copy is NULL:
            raise MemoryError
        memcpy(copy, PyBytes_AS_STRING(head), n)
        free(worker.head)
        worker.head = copy
        worker.head_fixed = n
        worker.head_for = <size_t>-1
        worker.known_len = 0
        worker.conn.io.fd = fd
        worker.conn.tls = NULL if tls is None else tls.c
        note_int(&worker.is_odd, False)
        worker.text_deadline_ns = 0
        worker.is_reused = False
        worker.is_ended = False
        worker.last_used_ns = clock_ns()

    def disconnect(self):
        """Take the worker's socket away; the caller closes it, and may go on to dial another.

        What is dialled now is for the URL that is picked after this call.
        """
        cdef worker_t* worker = self.c
        worker.conn.io.fd = -1
        worker.conn.tls = NULL
        worker.generation = load_int(&self.c.pipe.generation)

    def read_on(self, double text_timeout_s=0.0):
        """Have the loop read more of an answer, for Python, when the worker is given back.

        With ``text_timeout_s`` only its text is missing, and waited for no longer than so. What
        comes of it meanwhile does not put that off.
        """
        cdef worker_t* worker = self.c
        note_int(&worker.is_odd, True)
        if text_timeout_s > 0 and worker.text_deadline_ns == 0:
            worker.text_deadline_ns = clock_ns() + <int64_t>(text_timeout_s * 1e9)

    def count_failed_append(self):
        """Count the worker's message as failed for the follower, if it is a MsgApp."""
        cdef worker_t* worker = self.c
        if worker.job.type == TYPE_APP:
            with nogil:
                pthread_mutex_lock(&self.c.pipe.lock)
                self.c.pipe.follower.fail += 1
                pthread_mutex_unlock(&self.c.pipe.lock)

    def keep(self):
        """Note that the worker's connection has carried an answered request and stays open."""
        cdef worker_t* worker = self.c
        worker.is_reused = True
        worker.last_used_ns = clock_ns()

    def finish(self, bint is_sent):
        """Write the outcome of the worker's message into the books and let go of it."""
        cdef worker_t* worker = self.c
        cdef job_t* job = worker.job
        if job is NULL:
            raise InternalError("a worker has no message to finish")
        with nogil:
            pthread_mutex_lock(&self.c.pipe.lock)
            pipe_count(self.c.pipe, job, OUTCOME_SENT if is_sent else OUTCOME_FAILED,
                       clock_ns() - job.taken_ns)
            worker.job = NULL
            pthread_mutex_unlock(&self.c.pipe.lock)
        job_free(job)

    def give_back(self):
        """Return the worker to the loop.

        Returns
        -------
        GiveBack
            TO_LOOP; RETIRED when stopped, its socket is then the caller's to close; HAS_JOB when
            stopped with a message that is to be failed first.
        """
        cdef worker_t* worker = self.c
        cdef int given
        cdef bint is_last
        with nogil:
            # The loop may hold the pipe's lock for a moment. Only C state is touched.
            given = worker_give_back(worker)
        if given == GIVEN_RETIRED:
            # After a stop that timed out nobody waits any more; the last one out unregisters.
            with nogil:
                pthread_mutex_lock(&self.c.pipe.lock)
                is_last = self.c.pipe.live == 0
                pthread_mutex_unlock(&self.c.pipe.lock)
            if is_last:
                self.sender.loop.senders.discard(self.sender)
        return GIVE_BACKS[given]

    def is_retired(self):
        """Tell whether the worker has ended, so that its socket is nobody's. Any thread."""
        cdef bint retired
        with nogil:
            pthread_mutex_lock(&self.c.pipe.lock)
            retired = self.c.state == WORKER_RETIRED
            pthread_mutex_unlock(&self.c.pipe.lock)
        return retired
