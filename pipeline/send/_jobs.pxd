"""What sending's extension makes its jobs with. All of it needs the GIL."""

from libc.stdint cimport int32_t, uint64_t, uint8_t

from pipeline.send._channel cimport job_t
from pipeline.wire._messages cimport Message


cdef class EncodedMessage:
    cdef const uint8_t* payload     # borrowed from owner
    cdef size_t size
    cdef object owner               # bytes or HeldBuffer
    cdef int32_t _type
    cdef uint64_t _to


cdef job_t* job_from_message(Message message, int profile) except NULL
cdef job_t* job_from_encoded(EncodedMessage message) except NULL
cdef job_t* job_from_protobuf(object message) except NULL
cdef void job_free(job_t* job) noexcept
cdef void jobs_free(job_t* first) noexcept
