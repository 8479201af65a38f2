# cython: auto_pickle=False
"""Jobs: messages made into what the loop writes, and given back with what they borrow.

A job is a ``job_t`` (``_channel.pxd``). The functions hold the GIL: a job counts references.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.uio cimport iovec

from pipeline.send._channel cimport job_t
from pipeline.wire._guard cimport guard_read, guard_read_end
from pipeline.wire._messages cimport (
    EncodedMessage, Message, as_int32, as_uint64, gather_plan_t, message_facts, message_gather,
    message_gather_plan, message_hold, message_let_go, message_size, message_write,
)
from pipeline.wire._raftpb cimport WIRE_MAX_BYTES

from pipeline.errors import MarshalError, UsageError
from pipeline.logs import show

cdef enum:
    # Below this a payload is copied into the framing: a page costs less to copy than an iovec,
    # a reference and its return to Python.
    BORROW_MIN = 4096

cdef size_t COPY_LIMIT = 16 * 1024      # config.COPY_LIMIT, checked by a test


cdef job_t* job_new(size_t size, size_t framing, int n_body, int n_owners) except NULL:
    """Allocate a job with room for ``framing`` bytes behind its segments and owners.

    Of its body there are ``n_body`` segments.
    """
    cdef job_t* job
    cdef int n_segments = 1 + n_body
    if size > WIRE_MAX_BYTES:
        raise MarshalError(f"message: {size} bytes encoded is not in 0..{WIRE_MAX_BYTES}")
    job = <job_t*>malloc(sizeof(job_t) + n_segments * sizeof(iovec) + n_owners * sizeof(void*)
                         + framing)
    if job is NULL:
        raise MemoryError
    job.size_bytes = size
    job.has_facts = False
    job.retried = False
    job.n_segments = n_segments
    job.n_owners = n_owners
    job.segments = <iovec*>(job + 1)
    job.owners = <void**>(job.segments + n_segments)
    return job


cdef inline uint8_t* job_bytes(job_t* job) noexcept:
    return <uint8_t*>(job.owners + job.n_owners)


cdef void job_free(job_t* job) noexcept:
    """Free a job and drop what it borrows."""
    cdef int i
    for i in range(job.n_owners):
        Py_DECREF(<object><PyObject*>job.owners[i])
    free(job)


cdef void jobs_free(job_t* first) noexcept:
    """Free a list of jobs."""
    cdef job_t* job
    while first is not NULL:
        job = first
        first = job.next
        job_free(job)


cdef job_t* job_copy(const void* data, size_t size) except NULL:
    cdef job_t* job = job_new(size, size, 1, 0)
    job.segments[1].iov_base = job_bytes(job)
    job.segments[1].iov_len = size
    memcpy(job_bytes(job), data, size)
    return job


cdef job_t* job_borrow(const void* data, size_t size, object owner) except NULL:
    cdef job_t* job = job_new(size, 0, 1, 1)
    job.segments[1].iov_base = <void*>data
    job.segments[1].iov_len = size
    Py_INCREF(owner)
    job.owners[0] = <void*>owner
    return job


cdef job_t* job_from_message(Message message, int profile, bint is_framed) except NULL:
    """Encode up to COPY_LIMIT; above it encode the framing and borrow the payloads (R3)."""
    cdef gather_plan_t plan
    cdef job_t* job
    cdef size_t size
    message_hold(message)
    try:
        size = message_size(message, profile)
        if size <= COPY_LIMIT:
            job = job_new(size, size, 1, 0)
            job.segments[1].iov_base = job_bytes(job)
            job.segments[1].iov_len = size
            message_write(message, profile, job_bytes(job))
        else:
            message_gather_plan(message, profile, BORROW_MIN, &plan)
            job = job_new(size, plan.framing_bytes, plan.segments, plan.owners)
            message_gather(message, profile, BORROW_MIN, job_bytes(job), job.segments + 1,
                           <PyObject**>job.owners)
        if is_framed:
            message_facts(message, profile, &job.facts)
            job.has_facts = True
        job.type = message.c.type
        job.to = message.c.to
    finally:
        message_let_go(message)
    return job


cdef job_t* job_from_encoded(EncodedMessage message) except NULL:
    cdef job_t* job
    guard_read(&message.guard)
    try:
        if message.size <= COPY_LIMIT:
            job = job_copy(message.payload, message.size)
        else:
            job = job_borrow(message.payload, message.size, message.owner)
        job.type = message._type
        job.to = message._to
    finally:
        guard_read_end(&message.guard)
    return job


cdef job_t* job_from_protobuf(object message) except NULL:
    """Take a protobuf object of any raftpb schema: what counts is SerializeToString, type, to."""
    cdef job_t* job
    cdef int32_t type_
    cdef uint64_t to
    try:
        serialize, kind, member = message.SerializeToString, message.type, message.to
    except AttributeError:
        raise UsageError(f"message: {show(message)} is not a Message, an EncodedMessage "
                         "or a raftpb protobuf object") from None
    type_ = as_int32(kind, "message.type")
    to = as_uint64(member, "message.to")
    data = serialize()
    if type(data) is not bytes:
        raise UsageError(f"message: its SerializeToString returned {type(data).__name__}, "
                         "not bytes")
    if PyBytes_GET_SIZE(data) <= <Py_ssize_t>COPY_LIMIT:
        job = job_copy(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    else:
        job = job_borrow(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
    job.type = type_
    job.to = to
    return job
