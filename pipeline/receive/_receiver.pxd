"""The classes of the receiving core and who owns what they hold. For the core, and for the fuzz
targets in tests/fuzz, which run a receiver's loop and its requests in one thread.
"""

from pipeline.net._budget cimport BodyBudget
from pipeline.receive._caller cimport answer_204_t, caller_t, handler_t, server_t
from pipeline.receive._arrivals cimport Source
from pipeline._system cimport sockaddr_storage

from libc.stdint cimport uint64_t


cdef class CallerAddress:
    cdef sockaddr_storage address


cdef class Receiver:
    cdef server_t server
    cdef bint is_made
    cdef int is_running         # atomic
    cdef object handlers
    cdef object config
    cdef bint is_encoded        # Raft is given EncodedMessages
    # Id of a connection that no thread has at the moment -> OddRequest.
    cdef dict odd_requests
    cdef BodyBudget budget
    cdef object take
    cdef Source source          # of what goes to the inbox; None where the application is called
    cdef object credentials     # Credentials; None without TLS
    # Id of a connection -> the Request whose head it has accepted, to be checked each time.
    cdef dict bound

    # Needs the GIL. ``handler`` and ``answer`` are NULL for the thread of odd requests.
    cdef int run(self, handler_t* handler, answer_204_t* answer) except -1
    cdef int forget(self, uint64_t id) except -1
    # These need the GIL and a connection that the calling thread has taken from the queue.
    cdef bint serve_request(self, caller_t* caller, handler_t* handler,
                            answer_204_t* answer) except -1
    cdef int handle(self, caller_t* caller) except -1
    cdef int handle_odd(self, caller_t* caller, object odd, CallerAddress remote) except -1
    cdef int answer(self, caller_t* caller, CallerAddress remote) except -1
    cdef object last_answer(self, caller_t* caller, object answer)
    cdef int shake(self, caller_t* caller, CallerAddress remote) except -1
    cdef object taken(self, caller_t* caller, CallerAddress remote)
    cdef object message(self, caller_t* caller, CallerAddress remote)
    cdef int go_on(self, caller_t* caller, object odd, bytes out, int then) except -1
    cdef int learn(self, caller_t* caller, bytes head, object odd) except -1
    cdef int detach(self, caller_t* caller, object odd) except -1
