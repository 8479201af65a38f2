"""A receiver without threads: whoever holds the machine takes each of their steps, on its clock.

The machine runs a receiver's loop turn by turn and serves its requests one by one, in any order
that threads might come to. Its clock can be put forward, and the loop never waits. It is compiled
by ``build.py``, with the headers of the package that is installed: tests only.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc

from pipeline.net._memory cimport body_resident
from pipeline.receive._caller cimport (
    CALLER_BODY, CALLER_CLOSED, CALLER_HANDLED, QUEUE_STRANGERS, answer_204_t, caller_of_turn,
    caller_t, handler_t, listening_t, server_t,
)
from pipeline.receive._inbox cimport (
    arrival_t, inbox_has_room, inbox_t, reader_join, reader_leave,
)
from pipeline.receive._queues cimport (
    server_add_handler, server_remove_handler, server_signal_handlers, server_take,
    server_take_beside,
)
from pipeline.receive._server cimport server_end, server_listen, server_resume_accept, server_turn
from pipeline.receive._receiver cimport Receiver
from pipeline._system cimport (
    clock_ns, load_int, pthread_mutex_lock, pthread_mutex_unlock, store_int,
)
from pipeline.receive._turns cimport LANES, turn_t, turns_next, turns_wait

cdef extern from * nogil:
    """
    #include <netinet/in.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>

    /* The linker leads this module's calls here (--wrap, see build.py): of what the loop uses of
       the system, the clock, the wait and the address of a caller are the machine's. */
    static long long machine_ahead_ns;

    int __real_clock_gettime(clockid_t, struct timespec *);

    int __real_accept4(int, struct sockaddr *, socklen_t *, int);
    int __real_epoll_wait(int, struct epoll_event *, int, int);

    int __wrap_clock_gettime(clockid_t clock, struct timespec *now) {
        int result = __real_clock_gettime(clock, now);
        long long ns = now->tv_nsec + machine_ahead_ns % 1000000000;
        now->tv_sec += machine_ahead_ns / 1000000000 + ns / 1000000000;
        now->tv_nsec = ns % 1000000000;
        return result;
    }

    int __wrap_epoll_wait(int fd, struct epoll_event *events, int n, int timeout_ms) {
        (void)timeout_ms;
        return __real_epoll_wait(fd, events, n, 0);
    }

    int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
        struct sockaddr_in *caller = (struct sockaddr_in *)address;
        socklen_t room = *size;
        /* A few answers that nobody reads are to fill it. */
        int few = 1;
        int accepted = __real_accept4(fd, address, size, flags);
        if (accepted >= 0 && room >= sizeof(*caller)) {
            setsockopt(accepted, SOL_SOCKET, SO_SNDBUF, &few, sizeof(few));
            *caller = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(40000)};
            caller->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            *size = sizeof(*caller);
        }
        return accepted;
    }
    """
    int64_t machine_ahead_ns        # of the clock of the extensions, which cannot be put forward

cdef enum:
    MAX_DEPTH = 8


cdef class Machine:
    """A receiver that listens on ``listening``, which becomes its own, and does nothing by itself.

    Its owner calls ``end`` before it lets go of it.
    """

    cdef Receiver receiver
    cdef handler_t handlers[MAX_DEPTH]
    cdef int n_handlers
    cdef int depth              # handler threads that are in ``serve``
    cdef bint is_odd_busy
    cdef answer_204_t answer
    cdef public bint is_taking  # what the application takes from the inbox is not with it yet
    cdef public bint has_put_back       # a take was interrupted

    def __init__(self, Receiver receiver not None, int listening, int handlers):
        cdef server_t* server = &receiver.server
        cdef int i
        global machine_ahead_ns
        machine_ahead_ns = 0
        self.receiver = receiver
        server.listening = <listening_t*>calloc(1, sizeof(listening_t))
        if server.listening is NULL:
            raise MemoryError
        server_listen(server, listening, False)
        server.loop.now_ns = clock_ns()
        server.is_led = True
        self.n_handlers = min(handlers, <int>MAX_DEPTH)
        for i in range(self.n_handlers):
            server_add_handler(server, &self.handlers[i])
            self.handlers[i].is_waiting = True
        self.answer = server.answer_204
        self.answer.second = 0
        if server.inbox is not NULL:
            receiver.source.open()
            receiver.source.arrivals.add(&server.reader, receiver)
            server.reader.loop = &server.loop
            reader_join(server.inbox, &server.reader)
        server_resume_accept(server)

    def turn(self):
        """Take a turn of the loop, as its native thread does; False once the loop has ended."""
        cdef server_t* server = &self.receiver.server
        if server.is_ended:
            return False
        if not server_turn(server):
            server_end(server)
            return False
        if server.has_queued:
            server_signal_handlers(server, False)
        server.has_signalled = False
        return True

    def advance(self, int64_t ns):
        """Let time pass."""
        global machine_ahead_ns
        machine_ahead_ns += ns

    def lead(self, bint is_led):
        """Tell whether a thread is in the loop: if not, a handler thread answers by itself."""
        store_int(&self.receiver.server.is_led, is_led)

    def serve(self, bint is_odd):
        """Serve one request, as a thread of this kind does; False when none waits.

        May be called from within ``process``, as another handler thread.
        """
        cdef server_t* server = &self.receiver.server
        cdef handler_t* handler = NULL
        cdef caller_t* caller
        if self.is_odd_busy if is_odd else self.depth == self.n_handlers:
            return False
        if is_odd and server.inbox is not NULL:
            pthread_mutex_lock(&server.lock)
            caller = server_take_beside(server)
            pthread_mutex_unlock(&server.lock)
        else:
            caller = server_take(server, is_odd)
        if caller is NULL and is_odd and server.queues[QUEUE_STRANGERS].head is not NULL:
            self.advance(max(server.strangers_at_ns - clock_ns(), 0))   # as their thread waits
            caller = server_take(server, is_odd)
        if caller is NULL:
            return False
        if is_odd:
            self.is_odd_busy = True
        else:
            handler = &self.handlers[self.depth]
            handler.is_waiting = False
            self.depth += 1
        try:
            self.receiver.serve_request(caller, handler, NULL if is_odd else &self.answer)
        finally:
            if is_odd:
                self.is_odd_busy = False
            else:
                self.depth -= 1
                handler.is_waiting = True
        return True

    def stop(self, int how):
        """Have the loop stop: 1 lets requests end, 2 does not wait for them."""
        store_int(&self.receiver.server.is_stopping, how)

    def end(self):
        """End the loop, whatever it is at, and see that nothing is left of any connection."""
        cdef server_t* server = &self.receiver.server
        cdef int i
        self.stop(2)
        while self.turn():
            pass
        if server.inbox is not NULL:
            reader_leave(server.inbox, &server.reader)
            self.receiver.source.arrivals.remove(&server.reader)
        for i in range(self.n_handlers):
            server_remove_handler(server, &self.handlers[i])
        for connection in list(self.receiver.odd_requests):     # as ``serve`` does at its end
            self.receiver.forget(connection)
        assert server.live == 0, f"{server.live} connections were never freed"
        assert server.busy == 0
        for i in range(LANES):
            assert server.at_work[i] == 0

    def check(self):
        """See that the loop's books are right, between two steps of it."""
        cdef server_t* server = &self.receiver.server
        cdef caller_t* caller = server.oldest
        cdef caller_t* previous = NULL
        cdef int64_t reading = 0, handled = 0
        cdef int listed = 0, connected = 0
        if server.inbox is not NULL:
            self.check_inbox()
        if server.is_ended:
            return
        while caller is not NULL:
            assert caller.previous is previous
            assert caller.server is server
            assert caller.state != CALLER_CLOSED
            listed += 1
            connected += caller.conn.io.fd >= 0
            assert caller.conn.io.is_registered == (caller.conn.io.fd >= 0)
            handled += caller.state == CALLER_HANDLED
            if caller.state == CALLER_BODY:
                reading += caller.counted
                assert caller.request.body.len < caller.request.body.size
            previous = caller
            caller = caller.next
        assert server.newest is previous
        assert connected <= <int>server.counts.connections <= listed
        assert listed <= server.live
        assert handled == server.handled
        assert reading == server.reading, (reading, server.reading)
        assert <int>server.counts.connections <= server.limits.max_connections

    def check_inbox(self):
        """See that the books of the inbox are right, and that nobody waits who need not."""
        cdef server_t* server = &self.receiver.server
        cdef inbox_t* inbox = server.inbox
        cdef arrival_t* arrival = inbox.first
        cdef int64_t bytes_in_lane[LANES]
        cdef size_t in_lane[LANES]
        cdef int64_t queued = 0, waiting = 0
        cdef turn_t* host
        cdef turn_t* member
        cdef turn_t* request
        cdef caller_t* caller
        cdef int lane
        for lane in range(LANES):
            in_lane[lane] = bytes_in_lane[lane] = 0
        while arrival is not NULL:
            assert arrival.source is server.source and not server.source.is_closed
            queued += 1
            in_lane[arrival.lane] += 1
            bytes_in_lane[arrival.lane] += arrival.bytes
            if arrival.holder is not NULL:
                waiting += 1
                assert arrival.reader is &server.reader and not arrival.reader.has_left
            assert arrival.next is not NULL or arrival is inbox.last
            arrival = arrival.next
        for lane in range(LANES):
            assert in_lane[lane] == inbox.in_lane[lane]
            assert bytes_in_lane[lane] == inbox.bytes_in_lane[lane]
            if not self.has_put_back:   # others may have come in its place
                assert in_lane[lane] <= inbox.max_messages
                assert in_lane[lane] <= 1 or bytes_in_lane[lane] <= inbox.max_bytes
            host = server.turns.lanes[lane].head
            while host is not NULL:
                member = host.head
                while member is not NULL:
                    request = member.head
                    while request is not NULL:
                        waiting += 1
                        request = request.next
                    member = member.next
                host = host.next
            if not server.is_ended and not load_int(&server.reader.has_news) \
                    and turns_wait(&server.turns, lane):
                caller = caller_of_turn(turns_next(&server.turns, lane))
                assert caller.request.lane == lane
                assert server.reader.is_waiting
                assert not inbox_has_room(inbox, lane, body_resident(&caller.request.body))
        assert queued == <int64_t>inbox.queued
        assert inbox.received == inbox.taken + inbox.queued + inbox.dropped
        if self.is_taking:          # the holders of what is being taken are told behind it
            assert waiting <= load_int(&inbox.waiting)
        else:
            assert waiting == load_int(&inbox.waiting), (waiting, load_int(&inbox.waiting))

    @property
    def is_quiet(self):
        """Whether nothing is left to do until bytes come or time passes."""
        cdef server_t* server = &self.receiver.server
        return server.loop.runnable.head is NULL and server.bulk.head is NULL \
            and server.loop.returned is NULL and server.handled == 0

    def describe(self):
        """Return of each connection its state, then, has_event and bytes to write, for people."""
        cdef caller_t* caller = self.receiver.server.oldest
        found = []
        while caller is not NULL:
            left = caller.answer_len - caller.answer_at
            found.append((caller.state, caller.then, caller.has_event, left))
            caller = caller.next
        return found
