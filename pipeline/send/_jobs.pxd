"""What sending's extension makes its jobs with. All of it needs the GIL."""

from pipeline.send._channel cimport job_t
from pipeline.wire._messages cimport EncodedMessage, Message


cdef job_t* job_from_message(Message message, int profile, bint is_framed) except NULL
cdef job_t* job_from_encoded(EncodedMessage message) except NULL
cdef job_t* job_from_protobuf(object message) except NULL
cdef void job_free(job_t* job) noexcept
cdef void jobs_free(job_t* first) noexcept
