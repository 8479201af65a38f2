# cython: auto_pickle=False
"""The receiving core: where the receiving loop meets Python on the way in.

``_requests``, ``_queues`` and ``_server`` hold what runs without the GIL. Handler threads run
``Receiver.serve``: they take requests, make messages of them, have ``handlers.py`` answer, and give
the connection back. A thread goes on from request to request without letting go of the GIL, as long
as there are any; each request is taken singly, so that one that blocks holds up nothing but its own
connection. When there are none, one of them runs the loop.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcpy, memset

from pipeline.net._budget cimport BodyShare
from pipeline.net._descriptors cimport descriptors_shut
from pipeline.net._gil cimport lock_with_gil
from pipeline.net._loop cimport loop_init
from pipeline.wire._http cimport HTTP_POST, http_post_t, http_recognise_post, http_same_post
from pipeline.wire._messages cimport decode_error, encoded_from_decoded, message_from_decoded
from pipeline.receive._caller cimport (
    ANSWER_204_MAX, LINGER_NS, REQUEST_BROKEN, REQUEST_CHECK, REQUEST_GONE, REQUEST_HANDSHAKE,
    REQUEST_LARGE, REQUEST_MALFORMED, REQUEST_ODD, REQUEST_REFUSED, REQUEST_TAKEN, THEN_CLOSE,
    THEN_DELIVER, THEN_DETACH, THEN_ENDLESS, THEN_FREE, THEN_NEXT, THEN_OFFER, THEN_SHAKE,
    THEN_SHAKEN, answer_204_t, caller_is_old, caller_learn, caller_save, caller_set_member,
    caller_t, handler_t, listening_t, reader_recycle, request_t, server_counts_t, server_learn,
    server_limits_t, server_tell,
)
from pipeline.receive._arrivals cimport Body
from pipeline.receive._inbox cimport reader_leave
from pipeline.receive._lead cimport server_start, server_wait
from pipeline.net._memory cimport BODY_MAPPED_MIN, body_free, body_init, body_t
from pipeline.receive._queues cimport (
    caller_decode, caller_give_back, caller_give_back_locked, server_add_handler, server_decode,
    server_detach, server_remove_handler, server_take,
)
from pipeline.receive._requests cimport caller_answer_here
from pipeline.receive._server cimport (
    server_close_descriptors, server_free, server_init, server_listen, server_retire_soon,
    server_stop,
)
from pipeline.tls._engine cimport Context, Session, certificate_of, reason_of, tls_free
from pipeline.tls._tls cimport tls_shake, tls_t
from pipeline.net._sockets cimport fork_count, own_descriptors
from pipeline._system cimport (
    EAGAIN, MSG_DONTWAIT, MSG_NOSIGNAL, add_int, clock_ns, count_get, deadline_timespec, errno,
    load_int, pthread_cond_timedwait, pthread_join, pthread_mutex_lock, pthread_mutex_trylock,
    pthread_mutex_unlock, send, store_int, timespec,
)

import _socket
import os
import socket
from dataclasses import replace

from pipeline.net._sockets import OwnSocket
from pipeline.wire.answers import render
from pipeline.receive.odd_request import OddRequest
from pipeline.logs import get_logger
from pipeline.names import show_address
from pipeline.stats import ReceiverStats
from pipeline.tls._engine import TLSError

__all__ = ["LINGER_S", "Receiver", "match_post", "recognise_post"]

logger = get_logger("pipeline.receive.listener")

#: The loop's ``LINGER_NS``, for a connection that has left it.
LINGER_S = LINGER_NS / 1e9

# What Go's server says to a caller that speaks plain HTTP.
cdef bytes NOT_TLS = (
    b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")


def recognise_post(const uint8_t[::1] data not None):
    """Read the head at the start of ``data`` as the core does: (head length, content length).

    None when the core would leave it to h11, or needs more. For tests.
    """
    cdef http_post_t post
    if data.shape[0] == 0 or http_recognise_post(&data[0], data.shape[0], &post) != HTTP_POST:
        return None
    return post.head_len, post.content_length


def match_post(bytes data not None, bytes known not None):
    """Read a head that is like ``known`` but for its length, as the core does: see above.

    None when it is not. ``known`` is a head that the core recognises. For tests.
    """
    cdef http_post_t known_post, post
    cdef const uint8_t* head = <const uint8_t*>PyBytes_AS_STRING(known)
    if http_recognise_post(head, len(known), &known_post) != HTTP_POST:
        raise ValueError("known: not a head that the core recognises")
    if not http_same_post(
            <const uint8_t*>PyBytes_AS_STRING(data), len(data), head, &known_post, &post):
        return None
    return post.head_len, post.content_length


cdef class CallerAddress:
    """A caller's address; made into text only when it is shown."""

    def __str__(self):
        cdef const uint8_t* raw = <const uint8_t*>&self.address
        # sockaddr_in and sockaddr_in6: port at 2, address at 4 and at 8, in network order.
        # PySyncObj replaces socket.inet_ntop by one that fails on Linux.
        cdef int family = (<const unsigned short*>raw)[0]
        port = raw[2] << 8 | raw[3]
        if family == socket.AF_INET:
            return show_address(_socket.inet_ntop(family, raw[4:8]), port)
        return show_address(_socket.inet_ntop(family, raw[8:24]), port)


@cython.no_gc_clear             # bodies that are collected with it need the budget
cdef class Receiver:
    """Serves a node's peer ports.

    Parameters
    ----------
    handlers : Handlers
        Answers the requests; its ``source`` is where messages go that no thread is to process.
    config : ReceiverConfig
    cluster_header : bytes
        The header lines every 204 carries, each with its CRLF.
    take : callable or None
        Called with a non-blocking socket, which it owns from then on, and the ``OddRequest`` that
        has read the head, when a connection leaves the loop for a snapshot or a stream. It must not
        block. None where nobody takes them: then no connection leaves.
    credentials : Credentials or None
        What https listening sockets are served with. Each connection takes those in force.

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
        self.server.reader.recycle = reader_recycle
        self.source = handlers.source
        if self.source is not None:
            self.server.inbox = &self.source.arrivals.c
            self.server.source = &self.source.c
            self.server.delivered = handlers.delivered_types
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
        self.is_encoded = handlers.is_encoded
        self.odd_requests = {}
        self.take = take
        self.credentials = credentials
        self.bound = {}

    def __dealloc__(self):
        # A running receiver is kept alive by its listener's threads.
        if self.is_made and not load_int(&self.is_running) and self.server.live == 0:
            server_free(&self.server)

    def start(self, list plain not None, list encrypted not None):
        """Serve on listening sockets, http and https, of ``open_socket``; it takes them over.

        None of them was taken if it raises ``MemoryError``; with ``OSError`` all were.
        """
        cdef int i, error
        cdef list sockets = [*plain, *encrypted]
        self.server.listening = <listening_t*>calloc(len(sockets), sizeof(listening_t))
        if self.server.listening is NULL:
            raise MemoryError
        if self.source is not None:
            self.source.open()
            self.source.arrivals.add(&self.server.reader, self)
        for i in range(len(sockets)):
            # Not the method of their class, which is Python's: Ctrl-C could come between two.
            server_listen(&self.server, _socket.socket.detach(sockets[i]), i >= len(plain))
        error = server_start(&self.server)
        if error != 0:
            if self.source is not None:     # which would keep this, and the ports
                reader_leave(self.server.inbox, &self.server.reader)
                self.source.arrivals.remove(&self.server.reader)
            raise OSError(error, os.strerror(error))
        store_int(&self.is_running, True)

    def retire(self):
        """End the https connections of credentials that others have taken the place of.

        Those that are idle; the others end with their request.
        """
        server_retire_soon(&self.server)

    def begin_close(self):
        """Free the ports, close idle connections, let requests with handlers end."""
        if load_int(&self.is_running):
            server_stop(&self.server, 1)

    def wait_closed(self, double timeout_s):
        """Wait until every request is answered, or for so long; then end. Without the GIL.

        Returns whether every request was answered. Once.
        """
        cdef int64_t deadline_ns = clock_ns() + <int64_t>(timeout_s * 1e9)
        cdef timespec at = deadline_timespec(deadline_ns)
        cdef bint is_whole
        if not load_int(&self.is_running):
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
        store_int(&self.is_running, False)
        if self.source is not None:
            self.source.arrivals.remove(&self.server.reader)
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
                self.bound.clear()
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
        cdef bint is_taken = True, is_offered = False
        if handler is not NULL:
            add_int(&self.server.busy, 1)
        if caller.request.kind == REQUEST_LARGE and self.server.inbox is not NULL:
            with nogil:
                # As below.
                caller_decode(caller)
            caller.then = THEN_OFFER
            is_offered = True
        elif caller.request.kind == REQUEST_LARGE:
            with nogil:
                # This may take a while, in which others read and process. Only C state is touched.
                is_taken = server_decode(&self.server, caller)
            if not is_taken:
                add_int(&self.server.busy, -1)
                server_tell(&self.server)
                return True
        try:
            if not is_offered:
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
        self.bound.pop(id, None)
        odd = self.odd_requests.pop(id, None)
        if odd is not None:
            odd.close()
        return 0

    cdef int handle(self, caller_t* caller) except -1:
        """Answer the request of a connection that this thread holds, or go on with it."""
        cdef CallerAddress remote = CallerAddress.__new__(CallerAddress)
        remote.address = caller.address
        if caller.request.kind == REQUEST_HANDSHAKE:
            return self.shake(caller, remote)
        if caller.request.kind == REQUEST_GONE:
            self.bound.pop(caller.id, None)
            caller.then = THEN_FREE
        elif not caller.is_odd:
            return self.answer(caller, remote)
        # As long as this thread has the connection it has this, too.
        odd = self.odd_requests.pop(caller.id, None)
        if odd is None and caller.request.kind == REQUEST_ODD:
            certificate = None
            if caller.conn.tls is not NULL:
                certificate = certificate_of(caller.conn.tls)
            odd = OddRequest(
                self.handlers, self.config, remote, recognises, certificate=certificate)
        if odd is None:         # it has failed before, or there was none
            if caller.request.kind != REQUEST_GONE:
                caller.then = THEN_CLOSE
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
            out, then = odd.feed(
                PyBytes_FromStringAndSize(<char*>request.body.data, request.body.len))
        elif request.kind == REQUEST_GONE:
            odd.broken()
            odd.close()
            return 0
        elif request.kind == REQUEST_BROKEN:
            out, then = odd.broken()
        else:
            out, then = odd.answer(self.last_answer(caller, self.taken(caller, remote)))
        return self.go_on(caller, odd, out, then)

    cdef int answer(self, caller_t* caller, CallerAddress remote) except -1:
        """Answer a request that the core has recognised."""
        answer = None
        cdef int kind = caller.request.kind
        if caller.is_bound and kind < REQUEST_BROKEN or kind == REQUEST_CHECK:
            request = self.bound.get(caller.id)
            if request is None:     # the loop has ended, and all of this was let go of
                answer = self.handlers.shutting_down()
            else:
                answer = self.handlers.check_member(request)
            caller.is_member = answer is None
        if answer is None and kind == REQUEST_CHECK:
            caller.is_checked = True
            caller.then = THEN_OFFER
            return 0
        if answer is None:
            answer = self.taken(caller, remote)
        answer = self.last_answer(caller, answer)
        caller.then = THEN_NEXT
        if answer is not None:
            caller_set_answer(caller, render(answer))
            if answer.close:
                caller.then = THEN_CLOSE
        return 0

    cdef object last_answer(self, caller_t* caller, object answer):
        """Have the connection end with this answer if its credentials are not in force any more."""
        if caller_is_old(caller):
            return replace(answer or self.handlers.no_content(), close=True)
        return answer

    cdef int shake(self, caller_t* caller, CallerAddress remote) except -1:
        """Go on with a handshake. When it is over, see whether the caller may stay.

        The rules are applied after the handshake, for TLS refuses no certificate that is valid:
        the caller sees the end of the connection where etcd's sees an alert.
        """
        cdef Context context
        cdef tls_t* tls = caller.conn.tls
        cdef int result, error
        cdef str reason = ""
        caller.then = THEN_CLOSE
        if tls is NULL:
            # Before the context: if that is replaced in between, the connection is an old one.
            caller.generation = load_int(&self.server.generation)
            context = self.credentials.server_context
            tls = caller.conn.tls = context.open(caller.conn.io.fd, None)
        with nogil:
            # Takes about a millisecond. This thread alone has the connection.
            result = tls_shake(tls)
            error = errno
        if result == 0:         # the caller has gone
            return 0
        if result < 0 and error == EAGAIN:
            caller.then = THEN_SHAKE
            return 0
        if result < 0:
            reason = reason_of(tls)
        else:
            try:
                certificate = certificate_of(tls)
                if certificate is not None:
                    reason = self.credentials.refusal(certificate)
            except TLSError as failure:
                reason = str(failure)
            if not reason:
                caller.is_member = certificate is not None
                caller.then = THEN_SHAKEN
                return 0
        if reason == "http request":
            # Not by TLS, of which the caller knows nothing.
            send(caller.conn.io.fd, PyBytes_AS_STRING(NOT_TLS), len(NOT_TLS),
                 MSG_DONTWAIT | MSG_NOSIGNAL)
        self.handlers.handshake_failed(remote, reason)
        return 0

    cdef object taken(self, caller_t* caller, CallerAddress remote):
        """What to answer a message with; an Answer, or None for 204."""
        if caller.request.kind == REQUEST_TAKEN:
            return None
        if caller.request.kind == REQUEST_REFUSED:
            return self.handlers.shutting_down()
        return self.message(caller, remote)

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
            body.reader = &self.server.reader
            body.c = request.body
            body.is_owner = True
            memset(&request.body, 0, sizeof(body_t))
        if self.is_encoded:
            message = encoded_from_decoded(&request.decoded, body)
        else:
            message = message_from_decoded(&request.decoded, body)
            if request.decoded.has_unknown:
                self.handlers.lost_fields(request.decoded.message.from_, remote)
        # The message keeps what it needs of the body; what it does not is not held while it waits.
        body_free(&request.body)
        del body
        return self.handlers.process(message, size, remote)

    cdef int go_on(self, caller_t* caller, object odd, bytes out, int then) except -1:
        """Do with a connection what its OddRequest has decided."""
        cdef request_t* request = &caller.request
        cdef bytes rest
        cdef BodyShare share
        cdef uint64_t sender = odd.sender
        caller_set_answer(caller, out)
        caller.then = then
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
            if odd.is_learnt:
                self.learn(caller, rest, odd)
        if then == THEN_DETACH:
            self.detach(caller, odd)
        if then == THEN_NEXT or then == THEN_CLOSE or then == THEN_DETACH or then == THEN_ENDLESS:
            odd.close()
        else:
            self.odd_requests[caller.id] = odd
        return 0

    cdef int learn(self, caller_t* caller, bytes head, object odd) except -1:
        """Let the core recognise heads like the one that ``head`` begins with; all are of the same
        sender.
        """
        cdef http_post_t post
        cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(head)
        cdef uint64_t sender = odd.sender
        if http_recognise_post(data, len(head), &post) != HTTP_POST:
            raise ValueError("head: not one that the core recognises")
        if not caller.has_tls:
            server_learn(&self.server, data, &post, sender)
            return 0
        caller_learn(caller, data, &post)
        lock_with_gil(&self.server.lock)
        caller_set_member(caller, sender)
        pthread_mutex_unlock(&self.server.lock)
        if self.handlers.binds_members and odd.request.certificate is not None:
            self.bound[caller.id] = odd.request
            caller.is_bound = True
        return 0

    cdef int detach(self, caller_t* caller, object odd) except -1:
        """Move a connection's socket out of the loop. The loop forgets it, whatever happens here.
        """
        cdef tls_t* tls
        cdef int fd = server_detach(caller, &tls)
        connection = session = None
        try:
            if tls is not NULL:
                session = Session.adopt(tls)
                tls = NULL
            if fd >= 0:
                connection = OwnSocket(fileno=fd)
                fd = -1
                connection.tls = session
                self.take(connection, odd)
        except BaseException:
            logger.exception("internal error, please report: a connection is closed")
            tls_free(tls)
            if fd >= 0:
                descriptors_shut(own_descriptors(), fd)
            if connection is not None:
                connection.close()
        return 0


def recognises(bytes head not None, uint64_t sender):
    """Tell whether the core recognises heads that are like this one but for their length.

    It leaves chunked bodies and the like to h11.
    """
    cdef http_post_t post
    return http_recognise_post(
        <const uint8_t*>PyBytes_AS_STRING(head), len(head), &post) == HTTP_POST


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
