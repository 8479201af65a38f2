# cython: auto_pickle=False
"""The core of an inbox: where what the receiving loops put there becomes messages.

``_inbox.pxd`` holds what runs without the GIL; ``inbox.py`` is what applications see.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from pipeline._system cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, POLLIN, add_int, clock_ns, cond_init_monotonic,
    deadline_timespec, errno, eventfd, load_int, poll, pollfd, pthread_cond_destroy,
    pthread_cond_timedwait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, store_int, timespec,
)
from pipeline.net._descriptors cimport descriptors_add, descriptors_close, descriptors_t
from pipeline.net._gil cimport lock_with_gil
from pipeline.net._memory cimport BODY_MAPPED_MIN, body_free, body_init, body_t
from pipeline.net._sockets cimport own_descriptors
from pipeline.receive._inbox cimport (
    INBOX_FULL, INBOX_TAKEN_IN, arrival_t, holder_t, inbox_drop, inbox_end_all, inbox_put_back,
    inbox_put_locked, inbox_show, inbox_take, inbox_t, reader_t, source_t,
)
from pipeline.receive._queues cimport message_is_held, message_lane
from pipeline.wire._messages cimport decode_error, encoded_from_decoded, message_from_decoded
from pipeline.wire._raftpb cimport WIRE_OK, wire_decode, wire_decoded_t
from pipeline.wire._types cimport TYPE_APP

import os

__all__ = ["Arrivals", "Source"]

cdef enum:
    # How often a thread of Python's that waits for room looks for signals.
    SIGNALS_NS = 100000000

# A thread that waits until its message is taken.
cdef struct thread_t:
    holder_t holder         # first
    bint is_told
    bint is_taken


cdef void thread_told(holder_t* holder, bint is_taken) noexcept nogil:
    """Note what became of a message; its thread is woken by whoever took or dropped it."""
    cdef thread_t* thread = <thread_t*>holder
    thread.is_told = True
    thread.is_taken = is_taken


@cython.no_gc_clear             # __dealloc__ needs the receiver
cdef class Body:
    """The memory of a received body, which the large payloads of its message are views of."""

    def __dealloc__(self):
        if not self.is_owner:
            return
        if self.reader is not NULL:
            self.reader.recycle(self.reader, &self.c)
        else:
            body_free(&self.c)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.c.data, self.c.len, 1, flags)


cdef class Arrivals:
    """What has arrived for the nodes that use an inbox.

    Parameters
    ----------
    max_messages, max_bytes : int
        Of each lane.
    is_encoded : bool
        Whether messages are taken as they were received.

    Notes
    -----
    Thread-safe.
    """

    def __cinit__(self, size_t max_messages, int64_t max_bytes, bint is_encoded):
        self.c.max_messages = max_messages
        self.c.max_bytes = max_bytes
        self.c.eventfd = -1
        self.is_encoded = is_encoded
        self.parts = {}
        if pthread_mutex_init(&self.c.lock, NULL) != 0 \
                or cond_init_monotonic(&self.c.changed) != 0:
            raise MemoryError

    def __dealloc__(self):
        cdef arrival_t* arrival = self.c.first
        cdef arrival_t* following
        cdef int _list
        # None is of a loop or has a holder: these keep this alive.
        for _list in range(2):
            while arrival is not NULL:
                following = arrival.next
                body_free(&arrival.body)
                free(arrival)
                arrival = following
            arrival = self.c.spare
        if self.c.eventfd >= 0:
            descriptors_close(own_descriptors(), self.c.eventfd)
        pthread_cond_destroy(&self.c.changed)
        pthread_mutex_destroy(&self.c.lock)

    def fileno(self):
        """Return a descriptor that is readable while there is something to take, and when closed.

        The same one each time, and nobody else's to read or to close. ``OSError`` if there are no
        descriptors left.
        """
        cdef descriptors_t* descriptors = own_descriptors()
        cdef int error = 0
        cdef int fd = load_int(&self.c.eventfd)
        if fd >= 0:
            return fd
        with nogil:
            # Only C state is touched.
            pthread_mutex_lock(&self.c.lock)
            fd = load_int(&self.c.eventfd)
            if fd < 0:
                pthread_mutex_lock(&descriptors.lock)
                fd = descriptors_add(descriptors, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
                error = errno
                pthread_mutex_unlock(&descriptors.lock)
                store_int(&self.c.eventfd, fd)
                inbox_show(&self.c)
            pthread_mutex_unlock(&self.c.lock)
        if fd < 0:
            raise OSError(error, os.strerror(error))
        return fd

    @property
    def closed(self):
        """Whether nothing will come any more."""
        return load_int(&self.c.is_closed) != 0

    def __len__(self):
        lock_with_gil(&self.c.lock)
        queued = self.c.queued
        pthread_mutex_unlock(&self.c.lock)
        return queued

    def stats(self):
        """Return received, taken, dropped, queued, queued_bytes and waiting, at one instant."""
        cdef uint64_t received, taken, dropped, queued
        cdef int64_t queued_bytes
        lock_with_gil(&self.c.lock)
        received, taken, dropped = self.c.received, self.c.taken, self.c.dropped
        queued, queued_bytes = self.c.queued, self.c.queued_bytes
        pthread_mutex_unlock(&self.c.lock)
        return received, taken, dropped, queued, queued_bytes, load_int(&self.c.waiting)

    def close(self):
        """Let nothing come any more; what was here is dropped by its source."""
        lock_with_gil(&self.c.lock)
        store_int(&self.c.is_closed, True)
        inbox_show(&self.c)
        pthread_mutex_unlock(&self.c.lock)

    def take(self, size_t max_messages, double timeout_s):
        """Take up to so many messages, the oldest first: list.

        Waits for the first for ``timeout_s`` at most, without the GIL; negative is for ever.
        """
        cdef int64_t deadline_ns = 0, left_ns
        cdef pollfd waited
        cdef int timeout_ms, done
        cdef list messages = self.take_now(max_messages)
        if messages or timeout_s == 0 or load_int(&self.c.is_closed):
            return messages
        if timeout_s > 0:
            deadline_ns = clock_ns() + <int64_t>(timeout_s * 1e9)
        waited.fd = self.fileno()
        waited.events = POLLIN
        while not messages and not load_int(&self.c.is_closed):
            timeout_ms = -1
            if timeout_s > 0:
                left_ns = deadline_ns - clock_ns()
                if left_ns <= 0:
                    break
                timeout_ms = <int>min((left_ns + 999999) // 1000000, 3600000)
            with nogil:
                # Only the descriptor is used, which is there as long as this object.
                done = poll(&waited, 1, timeout_ms)
            if done < 0:        # a signal
                PyErr_CheckSignals()
            messages = self.take_now(max_messages)
        return messages

    cdef list take_now(self, size_t max_messages):
        """Take what there is, without waiting for it."""
        cdef arrival_t* taken
        cdef arrival_t* arrival
        cdef source_t* source = NULL
        cdef reader_t* reader = NULL
        cdef dict parts = {}
        cdef list messages = []
        cdef list bodies = []
        cdef Body body
        cdef bint is_held = False
        lock_with_gil(&self.c.lock)
        taken = arrival = inbox_take(&self.c, max_messages)
        try:
            # Of what is here no more its source and its receiver may go any time.
            while arrival is not NULL:
                is_held = is_held or arrival.holder is not NULL
                # Those of one reader mostly follow one another.
                if arrival.source is not source:
                    source = arrival.source
                    parts[<size_t>source] = self.parts[<size_t>source]
                if arrival.reader is not reader:
                    reader = arrival.reader
                    if reader is not NULL:
                        parts[<size_t>reader] = self.parts[<size_t>reader]
                arrival = arrival.next
        except BaseException:   # nothing has ended meanwhile, for we have the lock
            inbox_put_back(&self.c, taken)
            raise
        finally:
            pthread_mutex_unlock(&self.c.lock)
        if taken is NULL:
            return messages
        try:
            arrival = taken
            while arrival is not NULL:
                messages.append(self.message_of(arrival, parts, bodies))
                arrival = arrival.next
            self.count(taken, parts)
        except BaseException:
            messages.clear()
            bodies.clear()      # nobody has views of their memory any more
            with nogil:
                # What has ended meanwhile has connections to be given back, as below.
                pthread_mutex_lock(&self.c.lock)
                inbox_put_back(&self.c, taken)
                pthread_mutex_unlock(&self.c.lock)
            raise
        # From here on nothing can fail.
        arrival = taken
        while arrival is not NULL:
            if arrival.body.size < BODY_MAPPED_MIN:
                body_free(&arrival.body)
            memset(&arrival.body, 0, sizeof(body_t))
            arrival = arrival.next
        for body in bodies:
            body.is_owner = True
        if is_held:
            with nogil:
                # Connections are given back to their loops, whose locks are taken. Only C state.
                pthread_mutex_lock(&self.c.lock)
                inbox_end_all(&self.c, taken)
                pthread_mutex_unlock(&self.c.lock)
        else:
            lock_with_gil(&self.c.lock)
            inbox_end_all(&self.c, taken)
            pthread_mutex_unlock(&self.c.lock)
        return messages

    cdef object message_of(self, arrival_t* arrival, dict parts, list bodies):
        """Make the message of an arrival, which keeps its memory until all are made."""
        cdef Body body = None
        if arrival.body.size >= BODY_MAPPED_MIN:
            body = Body.__new__(Body)
            body.c = arrival.body
            if arrival.reader is not NULL:
                body.receiver = parts[<size_t>arrival.reader]
                body.reader = arrival.reader
            bodies.append(body)
        if self.is_encoded:
            return encoded_from_decoded(&arrival.decoded, body)
        return message_from_decoded(&arrival.decoded, body)

    cdef int count(self, arrival_t* taken, dict parts) except -1:
        """Count what was taken: once for each run of messages of one member and kind."""
        cdef arrival_t* run = taken
        cdef arrival_t* arrival
        cdef int64_t n, size, lossy
        cdef bint is_append
        while run is not NULL:
            n = size = lossy = 0
            is_append = run.decoded.message.type == TYPE_APP
            arrival = run
            while arrival is not NULL and arrival.source is run.source \
                    and arrival.decoded.message.from_ == run.decoded.message.from_ \
                    and (arrival.decoded.message.type == TYPE_APP) == is_append:
                n += 1
                size += arrival.body.len
                lossy += arrival.decoded.has_unknown and not self.is_encoded
                arrival = arrival.next
            (<Source>parts[<size_t>run.source]).on_taken(
                run.decoded.message.from_, n, size, is_append, lossy)
            run = arrival
        return 0

    cdef int add(self, void* address, object part) except -1:
        """Keep what arrivals point into."""
        lock_with_gil(&self.c.lock)
        try:
            self.parts[<size_t>address] = part
        finally:
            pthread_mutex_unlock(&self.c.lock)
        return 0

    cdef int remove(self, void* address) except -1:
        """Keep it no more: no arrival that is queued points into it."""
        lock_with_gil(&self.c.lock)
        part = self.parts.pop(<size_t>address, None)    # which ends without the lock
        pthread_mutex_unlock(&self.c.lock)
        del part
        return 0

    def forget_after_fork(self):
        """In a forked child, which has no loop of ours: touch nothing that is the parent's.

        It begins empty: the lists may be in the middle of a change, and what is in them is not
        freed either.
        """
        cdef inbox_t empty
        memset(&empty, 0, sizeof(inbox_t))
        empty.max_messages = self.c.max_messages
        empty.max_bytes = self.c.max_bytes
        empty.is_closed = self.c.is_closed
        empty.eventfd = -1
        self.c = empty
        pthread_mutex_init(&self.c.lock, NULL)
        cond_init_monotonic(&self.c.changed)


@cython.no_gc_clear             # close needs the arrivals
cdef class Source:
    """One node, as an inbox tells what comes from it from what comes from others.

    Parameters
    ----------
    arrivals : Arrivals
    on_taken : callable
        ``(sender, messages, bytes, is_append, lossy)``: told what was taken, by the thread that
        takes it, and of how many messages some fields were lost.

    Notes
    -----
    Thread-safe.
    """

    def __cinit__(self, Arrivals arrivals not None, on_taken):
        self.arrivals = arrivals
        self.on_taken = on_taken

    cdef int open(self) except -1:
        """See to it that this is there as long as arrivals point to it. Before the first one."""
        lock_with_gil(&self.arrivals.c.lock)
        try:
            if not self.c.is_closed:
                self.arrivals.parts[<size_t>&self.c] = self
        finally:
            pthread_mutex_unlock(&self.arrivals.c.lock)
        return 0

    def close(self):
        """Take nothing in any more, and drop what is there. A second call does nothing."""
        with nogil:
            # Connections are given back to their loops, whose locks are taken. Only C state.
            pthread_mutex_lock(&self.arrivals.c.lock)
            self.c.is_closed = True
            inbox_drop(&self.arrivals.c, &self.c, NULL)
            pthread_mutex_unlock(&self.arrivals.c.lock)
        self.arrivals.remove(&self.c)

    def deliver(self, const uint8_t[::1] data not None, bint may_wait=True):
        """Put a message in, in a thread of Python's: whether it is there, or was taken.

        Waits while there is no room, and a MsgProp and a MsgSnap until they are taken; if it may
        not, it does nothing with these and returns None. False when it was dropped, or is not taken
        in any more. Raises ``UnmarshalError`` if it is none.
        """
        cdef body_t body
        cdef wire_decoded_t decoded
        cdef thread_t thread
        cdef holder_t* holder = NULL
        cdef int result = INBOX_FULL
        cdef bint is_taken_in = False
        cdef int lane
        cdef inbox_t* inbox = &self.arrivals.c
        self.open()
        if not body_init(&body, data.shape[0]):
            raise MemoryError
        try:
            if data.shape[0] > 0:
                memcpy(body.data, &data[0], data.shape[0])
            body.len = data.shape[0]
            with nogil:
                # Only C state is touched.
                result = wire_decode(body.data, body.len, &decoded)
            if result != WIRE_OK:
                raise decode_error(&decoded)
            result = INBOX_FULL
            thread.holder.tell = thread_told
            thread.is_told = thread.is_taken = False
            if message_is_held(&decoded):
                holder = &thread.holder
                if not may_wait:
                    return None
            lane = message_lane(&decoded)
            lock_with_gil(&inbox.lock)
            try:
                while True:
                    if may_wait or inbox.threads_in_lane[lane] == 0:
                        result = inbox_put_locked(
                            inbox, &self.c, NULL, lane, &body, &decoded, holder)
                    if result != INBOX_FULL:
                        inbox_show(inbox)
                        break
                    if not may_wait:
                        return None
                    inbox.threads_in_lane[lane] += 1
                    try:
                        self.wait_locked()
                        self.look_for_signals_locked()
                    finally:
                        inbox.threads_in_lane[lane] -= 1
                is_taken_in = result == INBOX_TAKEN_IN
                while is_taken_in and holder is not NULL and not thread.is_told:
                    self.wait_locked()
                    self.look_for_signals_locked()
            except BaseException:       # Ctrl-C: what is in stays there, and nobody waits for it
                while is_taken_in and not thread.is_told and not inbox_let_go(inbox, holder):
                    self.wait_locked()  # it is with who takes it
                raise
            finally:
                pthread_mutex_unlock(&inbox.lock)
        finally:
            body_free(&body)
        return is_taken_in and (holder is NULL or thread.is_taken)

    cdef void wait_locked(self) noexcept:
        """Wait until something has changed, or a moment. The caller holds the lock, and the GIL."""
        cdef inbox_t* inbox = &self.arrivals.c
        cdef timespec at = deadline_timespec(clock_ns() + SIGNALS_NS)
        inbox.n_threads += 1
        add_int(&inbox.waiting, 1)
        with nogil:
            # Only C state is touched. The lock is not kept over the wait for the GIL.
            pthread_cond_timedwait(&inbox.changed, &inbox.lock, &at)
            inbox.n_threads -= 1
            pthread_mutex_unlock(&inbox.lock)
        lock_with_gil(&inbox.lock)
        add_int(&inbox.waiting, -1)

    cdef int look_for_signals_locked(self) except -1:
        """Let handlers of signals run, without the lock: one of them may stop the node."""
        pthread_mutex_unlock(&self.arrivals.c.lock)
        try:
            PyErr_CheckSignals()
        finally:
            lock_with_gil(&self.arrivals.c.lock)
        return 0


cdef bint inbox_let_go(inbox_t* inbox, holder_t* holder) noexcept nogil:
    """Have nobody told of a message any more; False when it is not queued. The caller has the lock.
    """
    cdef arrival_t* arrival = inbox.first
    while arrival is not NULL and arrival.holder is not holder:
        arrival = arrival.next
    if arrival is NULL:
        return False
    arrival.holder = NULL
    return True
