"""The classes of the inbox's core and who owns what they hold, for the receiver."""

from pipeline.net._memory cimport body_t
from pipeline.receive._inbox cimport arrival_t, inbox_t, reader_t, source_t


cdef class Body:
    cdef body_t c
    cdef bint is_owner          # of that memory
    cdef object receiver        # keeps the reader
    cdef reader_t* reader       # takes the memory back; NULL when nobody wants it


cdef class Arrivals:
    cdef inbox_t c
    # Addresses of readers and of sources -> the Receiver, the Source that they are part of.
    cdef dict parts
    cdef bint is_encoded

    cdef int add(self, void* address, object part) except -1
    cdef int remove(self, void* address) except -1
    cdef list take_now(self, size_t max_messages)
    cdef object message_of(self, arrival_t* arrival, dict parts, list bodies)
    cdef int count(self, arrival_t* taken, dict parts) except -1


cdef class Source:
    cdef object __weakref__
    cdef source_t c
    cdef Arrivals arrivals
    cdef object on_taken

    cdef int open(self) except -1
    cdef void wait_locked(self) noexcept
    cdef int look_for_signals_locked(self) except -1
