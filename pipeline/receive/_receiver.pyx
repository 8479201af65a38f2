# cython: auto_pickle=False
"""The receiving core: where the receiving loop meets Python on the way in.

``_requests``, ``_queues`` and ``_server`` hold what runs without the GIL. Handler threads run
``Receiver.serve``: they take requests, make messages of them, have ``handlers.py`` answer, and give
the connection back. A thread goes on from request to request without letting go of the GIL, as long
as there are any; each request is taken singly, so that one that blocks holds up nothing but its own
connection. When there are none, one of them runs the loop.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int64_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcpy, memset

from pipeline.net._budget cimport BODY_SMALL, BodyShare, share_end, share_set
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.net._gil cimport lock_with_gil
from pipeline.net._loop cimport loop_init
from pipeline.wire._http cimport HTTP_POST, http_post_t, http_recognise_post, http_same_post
from pipeline.wire._messages cimport decode_error, message_from_decoded
from pipeline.receive._caller cimport (
    ANSWER_204_MAX, LINGER_NS, REQUEST_BROKEN, REQUEST_END, REQUEST_GONE, REQUEST_LARGE,
    REQUEST_MALFORMED, REQUEST_ODD, THEN_CLOSE, THEN_DELIVER, THEN_DETACH, THEN_FREE, THEN_NEXT,
    answer_204_t, caller_save, caller_set_member, caller_t, handler_t, listening_t, request_t,
    server_counts_t, server_learn, server_limits_t, server_recycle, server_reuse_body, server_tell,
)
from pipeline.receive._lead cimport server_start, server_wait
from pipeline.net._memory cimport (
    BODY_MAPPED_MIN, body_free, body_grown, body_init, body_resident, body_t,
)
from pipeline.receive._queues cimport (
    caller_give_back, caller_give_back_locked, server_add_handler, server_decode, server_detach,
    server_remove_handler, server_take,
)
from pipeline.receive._requests cimport caller_answer_here
from pipeline.receive._server cimport (
    server_close_descriptors, server_free, server_init, server_listen, server_retire_soon,
    server_stop,
)
from pipeline.net._sockets cimport fork_count, own_descriptors
from pipeline.net._sync cimport (
    add_int, clock_ns, count_get, deadline_timespec, pthread_cond_timedwait, pthread_join,
    pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock, store_int, timespec,
)

import _socket
import os
import socket
from typing import NamedTuple

from pipeline.net._sockets import OwnSocket
from pipeline.wire.answers import render
from pipeline.receive.odd_request import OddRequest
from pipeline.logs import get_logger
from pipeline.names import show_address
from pipeline.receive.sealed import Sealed, SealedServer

__all__ = ["LINGER_S", "Receiver", "ReceiverStats", "recognise_post"]

logger = get_logger("pipeline.receive.listener")

#: The loop's ``LINGER_NS``, for a connection that has left it.
LINGER_S = LINGER_NS / 1e9

cdef enum:
    # One read asks for no more. ssl takes an int, and gives one record of at most 16 KiB.
    BODY_STEP_BYTES = 1 << 20


class ReceiverStats(NamedTuple):
    """What a receiver has seen and what it has had to limit; counts since its start."""

    #: Connections taken.
    accepted: int
    #: Connections open now.
    connections: int
    #: Requests recognised by the core.
    fast_requests: int
    #: Requests read by h11.
    general_requests: int
    #: Idle connections closed because ``max_connections`` were open, or no descriptor was left.
    closed_for_room: int
    #: Connections closed because a head, or the first byte, did not come in ``head_timeout_s``.
    head_timeouts: int
    #: Connections closed because a body stalled for ``stall_timeout_s`` or dripped.
    body_timeouts: int
    #: Connections closed after ``idle_timeout_s``.
    idle_timeouts: int
    #: Times accepting was paused: nothing idle to close, or no descriptor.
    accept_pauses: int
    #: Times a body had to wait for a handler or for memory.
    body_pauses: int
    #: TLS handshakes that came to an end with a caller that may speak.
    handshakes: int
    #: TLS handshakes that failed: no TLS, no certificate, one that is not taken, a broken-off one.
    handshake_failures: int
    #: Connections closed because a TLS handshake did not end in ``handshake_timeout_s``.
    handshake_timeouts: int


def recognise_post(const uint8_t[::1] data not None):
    """Read the head at the start of ``data`` as the core does: (head length, content length).

    None when the core would leave it to h11, or needs more. For tests.
    """
    cdef http_post_t post
    if data.shape[0] == 0 or http_recognise_post(&data[0], data.shape[0], &post) != HTTP_POST:
        return None
    return post.head_len, post.content_length


cdef class KnownHead:
    """A head that Python has accepted; recognises those that differ from it in the length only."""

    def __init__(self, bytes head not None):
        if http_recognise_post(<const uint8_t*>PyBytes_AS_STRING(head), len(head),
                               &self.post) != HTTP_POST:
            raise ValueError("head: not one the core recognises")
        self.head = head

    def match(self, bytes data not None):
        """Return (head length, content length) if ``data`` starts with such a head, else None."""
        cdef http_post_t post
        if not http_same_post(<const uint8_t*>PyBytes_AS_STRING(data), len(data),
                              <const uint8_t*>PyBytes_AS_STRING(self.head), &self.post, &post):
            return None
        return post.head_len, post.content_length


@cython.no_gc_clear             # __dealloc__ needs the receiver
cdef class Body:
    """The memory of a received body, which the large payloads of its message are views of."""

    def __dealloc__(self):
        if self.is_message:
            server_recycle(self.server, &self.c)
        else:
            body_free(&self.c)
        if self.server is not NULL:
            with nogil:
                # A loop may be told that there is room. Only C state is touched.
                share_end(&self.share, self.server.budget)

    def __len__(self):
        return self.c.len

    @property
    def missing(self):
        """How many bytes have not arrived."""
        return self.c.size - self.c.len

    def append(self, bytes data not None):
        """Add what has arrived; no more than is missing."""
        cdef size_t n = len(data)
        if n > self.c.size - self.c.len:
            raise ValueError("data: more than is missing")
        memcpy(self.c.data + self.c.len, PyBytes_AS_STRING(data), n)
        self.c.len += n

    def read_from(self, read):
        """Call ``read(n, buffer)``, as of an ``SSLObject``, for what is missing; how much it was.
        """
        cdef size_t room = self.c.size - self.c.len, n
        if room > BODY_STEP_BYTES:
            room = BODY_STEP_BYTES
        # The view lives for this call, in which nobody else has the body.
        n = read(room, PyMemoryView_FromMemory(<char*>self.c.data + self.c.len, room, PyBUF_WRITE))
        self.c.len += n
        body_grown(&self.c)
        return n

    def count(self):
        """Count what has arrived in the budget; False when there is no room for it."""
        cdef bint is_counted = True
        if self.c.size > BODY_SMALL:
            with nogil:
                # A loop may be told that there is none. Only C state is touched.
                is_counted = share_set(&self.share, self.server.budget, body_resident(&self.c))
        return is_counted

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.c.data, self.c.len, 1, flags)


cdef class CallerAddress:
    """A caller's address; made into text only when it is shown."""

    def __str__(self):
        cdef const uint8_t* raw = <const uint8_t*>&self.address
        # sockaddr_in and sockaddr_in6: port at 2, address at 4 and at 8, in network order.
        cdef int family = (<const unsigned short*>raw)[0]
        port = raw[2] << 8 | raw[3]
        if family == socket.AF_INET:
            return show_address(socket.inet_ntop(family, raw[4:8]), port)
        return show_address(socket.inet_ntop(family, raw[8:24]), port)


cdef class Receiver:
    """Serves a node's peer ports.

    Parameters
    ----------
    handlers : Handlers
        Answers the requests.
    config : ReceiverConfig
    cluster_header : bytes
        The header lines every 204 carries, each with its CRLF.
    take : callable or None
        Called with a non-blocking socket, which it owns from then on, and the ``OddRequest`` that
        has read the head, when a connection leaves the loop. It must not block. None where nobody
        receives snapshots: then no connection leaves.
    credentials : Credentials or None
        What https listening sockets are served with.

    Notes
    -----
    Thread-safe. ``start``, ``serve`` in as many threads as ``config.handlers``, ``begin_close``,
    ``wait_closed``, in this order. ``start`` makes a native thread, which runs the loop while no
    handler thread does.
    """

    def __cinit__(self, handlers, config, bytes cluster_header not None, take, credentials=None):
        cdef server_limits_t limits
        cdef bytes fixed = b"HTTP/1.1 204 No Content\r\n" + cluster_header + b"Date: "
        cdef int error
        limits.max_head_bytes = config.max_head_bytes
        limits.max_body_bytes = config.max_body_bytes
        limits.max_connections = config.max_connections
        limits.handlers = config.handlers
        limits.head_timeout_ns = <int64_t>(config.head_timeout_s * 1e9)
        limits.stall_timeout_ns = <int64_t>(config.stall_timeout_s * 1e9)
        limits.byte_ns = 1000000000 // config.min_body_rate if config.min_body_rate else 0
        limits.idle_timeout_ns = <int64_t>(config.idle_timeout_s * 1e9)
        limits.handshake_timeout_ns = <int64_t>(config.handshake_timeout_s * 1e9)
        if len(fixed) + 64 > ANSWER_204_MAX:
            raise ValueError("cluster_header: too long")
        self.budget = handlers.budget
        error = server_init(&self.server, &limits, own_descriptors(), &self.budget.c)
        if error != 0:
            raise OSError(error, os.strerror(error))
        self.is_made = True
        memcpy(self.server.answer_204.data, PyBytes_AS_STRING(fixed), len(fixed))
        self.server.answer_204.fixed = len(fixed)
        unavailable = render(handlers.shutting_down())
        self.server.answer_503 = <uint8_t*>malloc(len(unavailable))
        if self.server.answer_503 is NULL:
            raise MemoryError
        memcpy(self.server.answer_503, PyBytes_AS_STRING(unavailable), len(unavailable))
        self.server.answer_503_len = len(unavailable)
        self.handlers = handlers
        self.config = config
        self.odd_requests = {}
        self.take = take
        if credentials is not None:
            self.sealed = SealedServer(
                handlers, config, credentials, make_head=KnownHead)

    def __dealloc__(self):
        # A running receiver is kept alive by its listener's threads.
        if self.is_made and not self.is_running and self.server.live == 0:
            server_free(&self.server)

    def start(self, list plain not None, list sealed not None):
        """Serve on listening sockets, http and https, of ``open_socket``; it takes them over.

        None of them was taken if it raises ``MemoryError``; with ``OSError`` all were.
        """
        cdef int i, error
        cdef list sockets = [*plain, *sealed]
        self.server.listening = <listening_t*>calloc(len(sockets), sizeof(listening_t))
        if self.server.listening is NULL:
            raise MemoryError
        for i in range(len(sockets)):
            # Not the method of their class, which is Python's: Ctrl-C could come between two.
            server_listen(&self.server, _socket.socket.detach(sockets[i]), i >= len(plain))
        error = server_start(&self.server)
        if error != 0:
            raise OSError(error, os.strerror(error))
        self.is_running = True

    def retire(self):
        """End the idle https connections. Those at a request see to it themselves."""
        server_retire_soon(&self.server)

    def begin_close(self):
        """Free the ports, close idle connections, let requests with handlers end."""
        if self.is_running:
            server_stop(&self.server, 1)

    def wait_closed(self, double timeout_s):
        """Wait until every request is answered, or for so long; then end. Without the GIL.

        Returns whether every request was answered. Once.
        """
        cdef int64_t deadline_ns = clock_ns() + <int64_t>(timeout_s * 1e9)
        cdef timespec at = deadline_timespec(deadline_ns)
        cdef bint is_whole
        if not self.is_running:
            return True
        with nogil:
            # Wait for the last answers. Only C state is touched.
            pthread_mutex_lock(&self.server.lock)
            while not self.server.is_ended and clock_ns() < deadline_ns:
                pthread_cond_timedwait(&self.server.ended, &self.server.lock, &at)
            is_whole = self.server.is_ended
            pthread_mutex_unlock(&self.server.lock)
            server_stop(&self.server, 2)
            pthread_join(self.server.thread, NULL)
            server_close_descriptors(&self.server)
        self.is_running = False
        return is_whole

    def forget_after_fork(self):
        """In a forked child, which has no thread of ours: end nothing.

        All descriptors are closed already, those of connections that a handler has included.
        """
        self.budget.forget_after_fork()
        self.server.n_listening = 0
        loop_init(&self.server.loop)
        self.server.timerfd = -1
        store_int(&self.server.is_stopping, 1)  # nothing is kept to be used again
        # is_running stays: what the parent's thread was at work on when it was copied is not
        # touched, nor freed.

    def stats(self):
        """Return the counts: ReceiverStats."""
        cdef server_counts_t* counts = &self.server.counts
        return ReceiverStats(
            count_get(&counts.accepted), count_get(&counts.connections),
            count_get(&counts.fast_requests), count_get(&counts.general_requests),
            count_get(&counts.closed_for_room), count_get(&counts.head_timeouts),
            count_get(&counts.body_timeouts), count_get(&counts.idle_timeouts),
            count_get(&counts.accept_pauses), count_get(&counts.body_pauses),
            count_get(&counts.handshakes), count_get(&counts.handshake_failures),
            count_get(&counts.handshake_timeouts))

    def serve(self, bint is_odd=False):
        """Handle requests until the receiver has ended. The body of a handler thread.

        With ``is_odd`` the body of the one thread for whatever is not a complete message: it
        never calls Raft, so that callers are refused, probed and read however Raft may block.
        """
        cdef handler_t handler
        cdef answer_204_t answer = self.server.answer_204
        cdef int forks = fork_count()
        answer.second = 0
        if is_odd:
            self.run(NULL, NULL)
            if forks == fork_count():
                for connection in list(self.odd_requests):
                    self.forget(connection)
            return
        server_add_handler(&self.server, &handler)
        try:
            self.run(&handler, &answer)
        finally:
            if forks == fork_count():
                server_remove_handler(&self.server, &handler)

    cdef int run(self, handler_t* handler, answer_204_t* answer) except -1:
        cdef caller_t* caller
        while True:
            # The GIL is let go of only where there is nothing to do, or where the lock's owner was
            # preempted: each time it goes round costs more than a small message.
            caller = NULL
            if pthread_mutex_trylock(&self.server.lock) == 0:
                caller = server_take(&self.server, handler is NULL)
                pthread_mutex_unlock(&self.server.lock)
            if caller is NULL:
                with nogil:
                    # Wait for a request, or run the loop until there is one. Only C state.
                    caller = server_wait(&self.server, handler)
                if caller is NULL:
                    return 0
            if not self.serve_request(caller, handler, answer):
                return 0

    cdef bint serve_request(self, caller_t* caller, handler_t* handler,
                            answer_204_t* answer) except -1:
        """Answer one request, whatever happens, and give its connection back to the loop.

        False in a child that was forked meanwhile, in a callback: the connection is the parent's.
        """
        cdef int forks = fork_count()
        cdef uint64_t id = caller.id
        cdef bint is_taken = True
        if handler is not NULL:
            add_int(&self.server.busy, 1)
        if caller.request.kind == REQUEST_LARGE:
            with nogil:
                # This may take a while, in which others read and process. Only C state is touched.
                is_taken = server_decode(&self.server, caller)
            if not is_taken:
                add_int(&self.server.busy, -1)
                server_tell(&self.server)
                return True
        try:
            self.handle(caller)
        except BaseException:
            logger.exception("internal error, please report: a connection is closed")
            caller.then = THEN_CLOSE
        if forks != fork_count():
            return False
        if handler is not NULL:
            add_int(&self.server.busy, -1)
            caller_answer_here(caller, answer)
        if pthread_mutex_trylock(&self.server.lock) == 0:
            is_taken = caller_give_back_locked(caller, handler)
            pthread_mutex_unlock(&self.server.lock)
        else:
            with nogil:
                # The lock's owner is at work. Only C state is touched.
                is_taken = caller_give_back(caller, handler)
        if not is_taken:
            self.forget(id)
        return True

    cdef int forget(self, uint64_t id) except -1:
        """Let go of what is left of a connection when the loop has ended."""
        odd = self.odd_requests.pop(id, None)
        if odd is not None:
            odd.close()
        return 0

    cdef int handle(self, caller_t* caller) except -1:
        """Answer the request of a connection that this thread holds, or go on with it."""
        cdef CallerAddress remote = CallerAddress.__new__(CallerAddress)
        remote.address = caller.address
        if not caller.is_odd:
            return self.answer(caller, remote)
        # As long as this thread has the connection it has this, too.
        odd = self.odd_requests.pop(caller.id, None)
        if odd is None and caller.request.kind == REQUEST_ODD:
            if caller.is_sealed:
                odd = Sealed(self.sealed, remote, self.make_body)
            else:
                odd = OddRequest(self.handlers, self.config, remote, self.learn)
        if odd is None:         # it has failed before
            caller.then = THEN_FREE if caller.request.kind == REQUEST_GONE else THEN_CLOSE
            return 0
        try:
            self.handle_odd(caller, odd, remote)
        except BaseException:
            logger.survive("what a connection held is not counted back", odd.close)
            raise
        return 0

    cdef int handle_odd(self, caller_t* caller, object odd, CallerAddress remote) except -1:
        cdef request_t* request = &caller.request
        if request.kind == REQUEST_ODD:
            data = b""
            if not caller.is_sealed:
                data = PyBytes_FromStringAndSize(<char*>request.body.data, request.body.len)
            elif request.body.len > 0:      # copied by feed before it returns
                data = PyMemoryView_FromMemory(<char*>request.body.data, request.body.len,
                                               PyBUF_READ)
            out, then = odd.feed(data)
        elif request.kind == REQUEST_END:
            out, then = odd.end()
        elif request.kind == REQUEST_GONE:
            odd.broken()
            odd.close()
            caller.then = THEN_FREE
            return 0
        elif request.kind == REQUEST_BROKEN:
            out, then = odd.broken()
        else:
            out, then = odd.answer(self.message(caller, remote))
        return self.go_on(caller, odd, out, then)

    cdef int answer(self, caller_t* caller, CallerAddress remote) except -1:
        """Answer a request that the core has recognised."""
        answer = self.message(caller, remote)
        caller.then = THEN_NEXT
        if answer is not None:
            caller_set_answer(caller, render(answer))
            if answer.close:
                caller.then = THEN_CLOSE
        return 0

    cdef object message(self, caller_t* caller, CallerAddress remote):
        """Have a message processed; the Answer, or None for 204."""
        cdef request_t* request = &caller.request
        cdef Body body = None
        cdef size_t size = request.body.len
        if request.kind == REQUEST_BROKEN:
            with nogil:
                # To give large memory back takes a while. Only C state is touched.
                body_free(&request.body)
            return self.handlers.read_failed(remote)
        if request.kind == REQUEST_MALFORMED:
            error = decode_error(&request.decoded)
            with nogil:
                # To give large memory back takes a while. Only C state is touched.
                body_free(&request.body)
            return self.handlers.undecodable(remote, error)
        if request.body.size >= BODY_MAPPED_MIN:
            body = Body.__new__(Body)
            body.receiver = self
            body.server = &self.server
            body.is_message = True
            body.c = request.body
            memset(&request.body, 0, sizeof(body_t))
        message = message_from_decoded(&request.decoded, body)
        # The message keeps what it needs of the body; what it does not is not held while it waits.
        body_free(&request.body)
        del body
        return self.handlers.process(message, size, remote)

    cdef int go_on(self, caller_t* caller, object odd, bytes out, int then) except -1:
        """Do with a connection what its OddRequest, or Sealed, has decided."""
        cdef request_t* request = &caller.request
        cdef bytes rest
        cdef Body whole
        cdef BodyShare share
        cdef uint64_t sender = odd.sender
        caller_set_answer(caller, out)
        caller.then = then
        if caller.is_sealed:
            caller.arrived, caller.news.fast_requests, caller.news.general_requests, \
                caller.news.handshakes, caller.news.handshake_failures = odd.take_news()
        else:
            caller.arrived = odd.arrived
            odd.arrived = 0
        if odd.is_member is not None:
            caller.is_member = odd.is_member
        if then == THEN_DELIVER:
            lock_with_gil(&self.server.lock)
            caller_set_member(caller, sender)
            pthread_mutex_unlock(&self.server.lock)
            body_free(&request.body)
            body = odd.take_body()
            if isinstance(body, Body):
                whole = body
                request.body = whole.c
                memset(&whole.c, 0, sizeof(body_t))
                caller.counted = whole.share.large
                whole.share.large = 0
            else:
                share = odd.share
                caller.counted = share.c.large
                share.c.large = 0
                if not body_init(&request.body, len(body)):
                    raise MemoryError
                memcpy(request.body.data, PyByteArray_AS_STRING(body), len(body))
                request.body.len = len(body)
        elif then == THEN_NEXT:
            rest = odd.rest
            if not caller_save(caller, <const uint8_t*>PyBytes_AS_STRING(rest), len(rest)):
                raise MemoryError
            caller.skip = odd.skip
        if then == THEN_DETACH:
            self.detach(caller, odd)
        if then == THEN_NEXT or then == THEN_CLOSE or then == THEN_DETACH:
            odd.close()
        else:
            self.odd_requests[caller.id] = odd
        return 0

    cdef int detach(self, caller_t* caller, object odd) except -1:
        """Move a connection's socket out of the loop. The loop forgets it, whatever happens here.
        """
        cdef int fd = server_detach(caller)
        connection = None
        try:
            if fd >= 0:
                connection = OwnSocket(fileno=fd)
                fd = -1
                if caller.is_sealed:
                    connection, odd = odd.detach(connection)
                self.take(connection, odd)
        except BaseException:
            logger.exception("internal error, please report: a connection is closed")
            if fd >= 0:
                descriptors_shut(own_descriptors(), fd)
            if connection is not None:
                connection.close()
        return 0

    def make_body(self, size_t size):
        """Make room for a body that is deciphered: in memory that was a body's before, or in
        address space that is no memory yet. ``MemoryError`` without any.
        """
        cdef Body body = Body.__new__(Body)
        cdef bint is_made
        body.receiver = self
        body.server = &self.server
        with nogil:
            # The lock's owner may be at work. Only C state is touched.
            is_made = server_reuse_body(&self.server, &body.c, size) or body_init(&body.c, size)
        if not is_made:
            raise MemoryError
        return body

    def learn(self, bytes head not None, uint64_t sender):
        """Let the core recognise heads that are like this one but for their length; all are of
        the same sender.

        Returns whether it can; it leaves chunked bodies and the like to h11.
        """
        cdef http_post_t post
        cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(head)
        if http_recognise_post(data, len(head), &post) != HTTP_POST:
            return False
        server_learn(&self.server, data, &post, sender)
        return True


cdef int caller_set_answer(caller_t* caller, bytes data) except -1:
    """Leave bytes for the loop to write."""
    cdef size_t n = PyBytes_GET_SIZE(data)
    if n == 0:
        return 0
    caller.answer = <uint8_t*>malloc(n)
    if caller.answer is NULL:
        raise MemoryError
    memcpy(caller.answer, PyBytes_AS_STRING(data), n)
    caller.answer_len = n
    caller.answer_at = 0
    return 0
