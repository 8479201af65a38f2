"""What other extensions see of a message: its C fields, its size, and two ways to write it.

A message must not change between being measured and being written: the caller holds it meanwhile
(``message_hold``), and runs no Python code until it lets go. All of the functions need the GIL.
"""

from cpython.buffer cimport Py_buffer
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint64_t
from posix.uio cimport iovec

from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE

from pipeline.wire._facts cimport facts_t
from pipeline.wire._guard cimport GUARD_IS_NEEDED, guard_read, guard_read_end, guard_t
from pipeline.wire._raftpb cimport (
    wire_conf_state_t,
    wire_decoded_t,
    wire_entry_t,
    wire_message_t,
)


cdef class HeldBuffer:
    """A buffer that is not bytes, held so that its memory neither moves nor goes."""

    cdef Py_buffer view         # owned; view.obj is NULL until it is filled
    cdef const uint8_t* data    # the payload, within the view
    cdef size_t size
    cdef object source          # what the user passed
    cdef int n_views            # atomic: of this object's own buffer
    cdef bint is_lent           # to the last of them, which gives the view back
    cdef int is_given_back      # atomic


# Of each of those that follow the guard guards all that can be assigned to. What is reached through
# them has guards of its own.

cdef class ConfState:
    cdef guard_t guard
    cdef wire_conf_state_t c    # arrays owned


cdef class SnapshotMetadata:
    cdef guard_t guard
    cdef ConfState _conf_state  # never None
    cdef uint64_t _index
    cdef uint64_t _term


cdef class Snapshot:
    cdef guard_t guard
    cdef const uint8_t* payload     # borrowed from owner; NULL when absent
    cdef size_t payload_len
    cdef object owner               # None, bytes or HeldBuffer
    cdef SnapshotMetadata _metadata     # never None

    cdef object payload_owner(self)


cdef class Entry:
    cdef guard_t guard
    cdef wire_entry_t c         # c.data borrowed from owner
    cdef object owner           # None, bytes or HeldBuffer


cdef class Message:
    cdef guard_t guard
    cdef wire_message_t c       # c.context borrowed from owner
    cdef object owner           # of the context: None, bytes or HeldBuffer
    cdef tuple _entries         # of Entry
    cdef Snapshot _snapshot     # or None


cdef class EncodedMessage:
    cdef guard_t guard              # nothing is assigned to but by a second __init__
    cdef const uint8_t* payload     # borrowed from owner
    cdef size_t size
    cdef object owner               # bytes or HeldBuffer
    cdef int32_t _type
    cdef uint64_t _to
    cdef uint64_t _from
    cdef uint64_t _term
    cdef int is_plain               # the bytes, which do not change, were read and all was known

    cdef object payload_owner(self)


# Hold a message, and everything in it, to read; where there is a GIL that is nothing.

cdef inline void metadata_hold(SnapshotMetadata metadata) noexcept:
    guard_read(&metadata.guard)
    if GUARD_IS_NEEDED:
        guard_read(&metadata._conf_state.guard)


cdef inline void metadata_let_go(SnapshotMetadata metadata) noexcept:
    if GUARD_IS_NEEDED:
        guard_read_end(&metadata._conf_state.guard)
    guard_read_end(&metadata.guard)


cdef inline void snapshot_hold(Snapshot snapshot) noexcept:
    guard_read(&snapshot.guard)
    if GUARD_IS_NEEDED:
        metadata_hold(snapshot._metadata)


cdef inline void snapshot_let_go(Snapshot snapshot) noexcept:
    if GUARD_IS_NEEDED:
        metadata_let_go(snapshot._metadata)
    guard_read_end(&snapshot.guard)


cdef inline void message_hold(Message m) noexcept:
    cdef Py_ssize_t i
    guard_read(&m.guard)
    if GUARD_IS_NEEDED:
        for i in range(PyTuple_GET_SIZE(m._entries)):
            guard_read(&(<Entry>PyTuple_GET_ITEM(m._entries, i)).guard)
        if m._snapshot is not None:
            snapshot_hold(m._snapshot)


cdef inline void message_let_go(Message m) noexcept:
    cdef Py_ssize_t i
    if GUARD_IS_NEEDED:
        if m._snapshot is not None:
            snapshot_let_go(m._snapshot)
        for i in range(PyTuple_GET_SIZE(m._entries)):
            guard_read_end(&(<Entry>PyTuple_GET_ITEM(m._entries, i)).guard)
    guard_read_end(&m.guard)


# How many framing bytes, segments and owners message_gather will produce.
cdef struct gather_plan_t:
    size_t framing_bytes
    int segments
    int owners


# Checks of what a field may hold; MarshalError, with the field's dotted name, for anything else.
cdef uint64_t as_uint64(object value, str field) except? 0xFFFFFFFFFFFFFFFF
cdef int32_t as_int32(object value, str field) except? -1

# What keeps the bytes of a payload alive and in place, and where they are. None, an absent payload,
# has a NULL address; an empty one has not.
cdef object as_owner(object value, str field, const uint8_t** data, size_t* size)

# What the user passed to as_owner.
cdef object owner_source(object owner)

# Index into ("3.5", "3.6", "3.7"); UsageError for anything else.
cdef int profile_index(object profile) except -1

# Encode a message, which is held meanwhile.
cdef bytes message_encode(Message m, int profile)

# What follows is for who holds the message.

# What a frame of the message is chosen by; see _frames.pxd.
cdef void message_facts(Message m, int profile, facts_t* facts) noexcept

# Length of the encoded message in bytes.
cdef Py_ssize_t message_size(Message m, int profile) noexcept

# Write exactly message_size bytes; returns the byte after the last one.
cdef uint8_t* message_write(Message m, int profile, uint8_t* out) noexcept

cdef void message_gather_plan(
    Message m, int profile, size_t borrow_min, gather_plan_t* plan
) noexcept

# Encode without copying payloads of borrow_min bytes or more. Everything else goes to `framing`;
# `segments` name ranges of framing and payloads in the order of the wire, none of them empty.
# owners[i] becomes a new reference to what keeps the i-th borrowed payload alive.
cdef void message_gather(
    Message m,
    int profile,
    size_t borrow_min,
    uint8_t* framing,
    iovec* segments,
    PyObject** owners,
) noexcept

# Make the Message of what wire_decode or frames_read read, once. Payloads are copied out of the
# input; with a `body`, an object whose buffer the input is in, large ones are views of it instead.
# The GIL is let go of now and then when there are many entries.
cdef Message message_from_decoded(wire_decoded_t* decoded, object body)

# The same without a look at what is in it: its bytes as they came, copied out of the input or, when
# they are many, a view of ``body``. Of a frame that stands for a message they are made, for nobody
# has sent them.
cdef EncodedMessage encoded_from_decoded(wire_decoded_t* decoded, object body)

# Make the exception for what stopped wire_decode.
cdef object decode_error(const wire_decoded_t* decoded)
