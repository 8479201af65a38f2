"""The classes of sending's core, for what stands on it: the streams share its loop and its jobs."""

from pipeline.send._books cimport books_t, follower_t
from pipeline.send._channel cimport job_t
from pipeline.send._pipe cimport pipe_t, sending_t


cdef class ActiveFlag:
    cdef int value


cdef class IOLoop:
    cdef sending_t sending
    cdef bint is_made
    cdef int is_running         # atomic
    # Senders with a live worker, and ends of streams that the loop has. Events carry borrowed
    # pointers to them: this keeps them alive.
    cdef readonly set senders
    cdef readonly set streams

    cdef void drop_finished(self) noexcept


cdef class Sender:
    cdef pipe_t pipe
    cdef tuple opened           # the workers
    cdef IOLoop loop
    cdef ActiveFlag active      # pipe.active points into it
    cdef int profile
    cdef bint has_streams       # a message may go by a stream instead; set before the first
    cdef int is_open            # atomic; the last that ``open`` sets

    cdef job_t* make_job(self, object message) except NULL
    cdef int offer(self, job_t* job) noexcept


# What books, and a follower's statistics, look like to Python.
cdef object books_seen(const books_t* books)
cdef object follower_seen(const follower_t* follower)

# SendResult, by OFFER_*.
cdef tuple RESULTS

# Make the job of a message, in a profile's encoding, with what its frame is chosen by if it
# ``is_framed``. ``loop`` lets go of what is finished.
cdef job_t* job_of(IOLoop loop, object message, int profile, bint is_framed) except NULL
