"""raftpb on the wire: sizes, writers and the decoder. Header only; no Python object, no GIL.

A tag is ``field number << 3 | wire type`` and fits one byte for every field we know:

    Message     1 type 08    2 to 10       3 from 18     4 term 20      5 logTerm 28   6 index 30
                7 entries 3a 8 commit 40   9 snapshot 4a 10 reject 50   11 rejectHint 58
                12 context 62              13 vote 68    14 responses 72 (13, 14: local to a node)
    Entry       1 type 08    2 term 10     3 index 18    4 data 22
    Snapshot    1 data 0a    2 metadata 12
    Metadata    1 conf_state 0a            2 index 10    3 term 18
    ConfState   1 voters 08  2 learners 10 3 voters_outgoing 18         4 learners_next 20
                5 auto_leave 28

Writers trust their input: whoever fills a struct has checked it, and has measured the space.
The decoder trusts nothing. Rules and bounds are those of docs/wire.md (spec sections 1.2 to 1.5).
"""

from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset


cdef extern from * nogil:
    int __builtin_clzll(unsigned long long value)


cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t value)
    uint64_t htobe64(uint64_t value)


# Which generation of etcd reads what we write. The decoder takes all of them.
cdef enum wire_profile:
    WIRE_PROFILE_35 = 0     # etcd 3.4, 3.5: every scalar and the snapshot always
    WIRE_PROFILE_36 = 1     # etcd 3.6: no empty snapshot, `vote` always
    WIRE_PROFILE_37 = 2     # only what is set


cdef enum wire_code:
    WIRE_OK = 0
    WIRE_TRUNCATED          # the input ends inside a value or a group
    WIRE_VARINT_TOO_LONG    # more than 64 bits
    WIRE_FIELD_NUMBER       # 0, or above 2**29 - 1
    WIRE_WIRE_TYPE          # 6 and 7 mean nothing
    WIRE_NEGATIVE_LENGTH    # 2**63 or more: negative in Go's int
    WIRE_OVERRUN            # a length past the end of what holds it
    WIRE_END_GROUP          # one that closes nothing, or another group
    WIRE_GROUP_DEPTH        # more than WIRE_MAX_GROUP_DEPTH groups in each other
    WIRE_TOO_MANY_ENTRIES
    WIRE_TOO_MANY_IDS
    WIRE_NO_MEMORY
    WIRE_FRAME_KIND         # of a stream's frame: its first byte is none that etcd knows
    WIRE_FRAME_LIMIT        # a stream's frame is, or says that it is, longer than it may be


# Where an error was found; with a field number it makes the dotted name in UnmarshalError.
cdef enum wire_scope:
    WIRE_MESSAGE = 0
    WIRE_ENTRY = 1
    WIRE_SNAPSHOT = 2
    WIRE_METADATA = 3
    WIRE_CONF_STATE = 4


cdef enum wire_limits:
    # An entry takes 2 bytes or more on the wire and 96 as an object. etcd's own messages hold 1 MiB
    # of entries (raft MaxSizePerMsg), and of 3.4's and 3.5's no more than this fit into that.
    WIRE_MAX_ENTRIES = 131072
    # Of each of the four lists. A cluster has seven members, not sixty thousand.
    WIRE_MAX_IDS = 65536
    # Groups are skipped with a stack of this many numbers. protobuf's own limit is 100.
    WIRE_MAX_GROUP_DEPTH = 100
    # Of a message that is sent: protobuf cannot encode more.
    WIRE_MAX_BYTES = 0x7fffffff
    # An absent snapshot as 3.4 and 3.5 send it.
    WIRE_EMPTY_SNAPSHOT_SIZE = 12


cdef struct wire_message_t:
    int32_t type
    int reject
    uint64_t to
    uint64_t from_
    uint64_t term
    uint64_t log_term
    uint64_t index
    uint64_t commit
    uint64_t reject_hint
    const uint8_t* context      # borrowed; NULL when absent, not NULL when present and empty
    size_t context_len


cdef struct wire_entry_t:
    int32_t type
    uint64_t term
    uint64_t index
    const uint8_t* data         # borrowed; NULL when absent, not NULL when present and empty
    size_t data_len


cdef struct wire_ids_t:
    uint64_t* ids               # owned, malloc'ed; NULL while empty, or counted only
    size_t len
    size_t cap


cdef struct wire_conf_state_t:
    wire_ids_t voters
    wire_ids_t learners
    wire_ids_t voters_outgoing
    wire_ids_t learners_next
    int auto_leave


cdef struct wire_snapshot_t:
    const uint8_t* data         # borrowed; NULL when absent, not NULL when present and empty
    size_t data_len
    uint64_t index
    uint64_t term
    wire_conf_state_t conf_state


# Body lengths of a snapshot and of what is nested in it, without tags and length prefixes.
cdef struct wire_snapshot_sizes_t:
    size_t conf_state
    size_t metadata
    size_t snapshot


cdef struct wire_error_t:
    int code
    int scope
    uint32_t field              # field number; 0 when the tag itself could not be read
    size_t offset               # of the tag when that is wrong, else of the value after it


# A whole message, checked and read but for its lists, of which only the lengths are known: while it
# waits it holds nothing but its bytes, of which the lists may be forty times as much. They are read
# from the input when they are needed, entry by entry. Its pointers live as long as the input does.
#
# The input is a message as it is encoded, or a frame of a msgapp stream that stands for one
# (``_frames.pxd``), in which each entry comes after its length in eight bytes instead of a tag.
cdef struct wire_decoded_t:
    const uint8_t* input        # borrowed
    const uint8_t* end          # of the input
    wire_message_t message
    const uint8_t* entries      # the tag, or the length, of the first; NULL while there is none
    size_t entries_len
    size_t entries_bytes        # of them all, without what tells their lengths
    uint64_t last_index         # of the last of them
    bint is_frame               # the input is such a frame
    wire_snapshot_t snapshot    # all zero when there was none
    const uint8_t* snapshots    # the tag of its first piece; NULL while there is none
    bint keeps_ids              # the lists of the ConfState are filled, not counted only
    bint has_unknown            # at some depth it has a field that is in none of the structs
    wire_error_t error


# Sizes.

cdef inline size_t wire_varint_size(uint64_t value) noexcept nogil:
    # ceil(bits / 7) without a division: (9 * bits + 64) / 64 is the same for 1..64 bits.
    return <size_t>((9 * (64 - __builtin_clzll(value | 1)) + 64) >> 6)


cdef inline size_t wire_field_size(uint64_t value, bint sparse) noexcept nogil:
    return 0 if sparse and value == 0 else 1 + wire_varint_size(value)


cdef inline size_t wire_span_size(size_t length) noexcept nogil:
    return 1 + wire_varint_size(length) + length


cdef inline uint64_t wire_enum_value(int32_t value) noexcept nogil:
    # An enum travels as a 64-bit varint: a negative one takes ten bytes.
    return <uint64_t><int64_t>value


cdef inline size_t wire_entry_size(const wire_entry_t* entry, bint sparse) noexcept nogil:
    return (
        wire_field_size(wire_enum_value(entry.type), sparse)
        + wire_field_size(entry.term, sparse)
        + wire_field_size(entry.index, sparse)
        + (wire_span_size(entry.data_len) if entry.data != NULL else 0)
    )


cdef inline size_t wire_ids_size(const wire_ids_t* ids) noexcept nogil:
    cdef size_t size = ids.len
    cdef size_t i
    for i in range(ids.len):
        size += wire_varint_size(ids.ids[i])
    return size


cdef inline size_t wire_conf_state_size(const wire_conf_state_t* state, bint sparse) noexcept nogil:
    return (
        wire_ids_size(&state.voters)
        + wire_ids_size(&state.learners)
        + wire_ids_size(&state.voters_outgoing)
        + wire_ids_size(&state.learners_next)
        + wire_field_size(state.auto_leave, sparse)
    )


cdef inline void wire_snapshot_measure(
    const wire_snapshot_t* snapshot, bint sparse, wire_snapshot_sizes_t* sizes
) noexcept nogil:
    """Measure from the inside out. Sparse, a size of 0 says "wholly empty, leave it out"."""
    sizes.conf_state = wire_conf_state_size(&snapshot.conf_state, sparse)
    sizes.metadata = (
        wire_field_size(snapshot.index, sparse) + wire_field_size(snapshot.term, sparse)
    )
    if sizes.conf_state or not sparse:
        sizes.metadata += wire_span_size(sizes.conf_state)
    sizes.snapshot = wire_span_size(snapshot.data_len) if snapshot.data != NULL else 0
    if sizes.metadata or not sparse:
        sizes.snapshot += wire_span_size(sizes.metadata)


cdef inline size_t wire_head_size(const wire_message_t* message, bint sparse) noexcept nogil:
    """Fields 1 to 6, what comes before the entries."""
    return (
        wire_field_size(wire_enum_value(message.type), sparse)
        + wire_field_size(message.to, sparse)
        + wire_field_size(message.from_, sparse)
        + wire_field_size(message.term, sparse)
        + wire_field_size(message.log_term, sparse)
        + wire_field_size(message.index, sparse)
    )


cdef inline size_t wire_reject_size(const wire_message_t* message, bint sparse) noexcept nogil:
    """Fields 10 and 11, what comes between snapshot and context."""
    return (
        wire_field_size(message.reject, sparse) + wire_field_size(message.reject_hint, sparse)
    )


# Writers. Each returns where the next byte goes.

cdef inline uint8_t* wire_put_varint(uint8_t* out, uint64_t value) noexcept nogil:
    while value >= 0x80:
        out[0] = <uint8_t>(value | 0x80)
        out += 1
        value >>= 7
    out[0] = <uint8_t>value
    return out + 1


cdef inline uint8_t* wire_put_field(
    uint8_t* out, uint8_t tag, uint64_t value, bint sparse
) noexcept nogil:
    if sparse and value == 0:
        return out
    out[0] = tag
    return wire_put_varint(out + 1, value)


cdef inline uint8_t* wire_put_length(uint8_t* out, uint8_t tag, size_t length) noexcept nogil:
    out[0] = tag
    return wire_put_varint(out + 1, length)


cdef inline uint8_t* wire_put_head(
    uint8_t* out, const wire_message_t* message, bint sparse
) noexcept nogil:
    out = wire_put_field(out, 0x08, wire_enum_value(message.type), sparse)
    out = wire_put_field(out, 0x10, message.to, sparse)
    out = wire_put_field(out, 0x18, message.from_, sparse)
    out = wire_put_field(out, 0x20, message.term, sparse)
    out = wire_put_field(out, 0x28, message.log_term, sparse)
    return wire_put_field(out, 0x30, message.index, sparse)


cdef inline uint8_t* wire_put_reject(
    uint8_t* out, const wire_message_t* message, bint sparse
) noexcept nogil:
    out = wire_put_field(out, 0x50, message.reject, sparse)
    return wire_put_field(out, 0x58, message.reject_hint, sparse)


cdef inline uint8_t* wire_put_entry(
    uint8_t* out, const wire_entry_t* entry, bint sparse
) noexcept nogil:
    """Write the entry with its own tag and length, up to but without the bytes of ``data``."""
    out = wire_put_length(out, 0x3A, wire_entry_size(entry, sparse))
    out = wire_put_field(out, 0x08, wire_enum_value(entry.type), sparse)
    out = wire_put_field(out, 0x10, entry.term, sparse)
    out = wire_put_field(out, 0x18, entry.index, sparse)
    if entry.data != NULL:
        out = wire_put_length(out, 0x22, entry.data_len)
    return out


cdef inline uint8_t* wire_put_ids(
    uint8_t* out, uint8_t tag, const wire_ids_t* ids
) noexcept nogil:
    # Unpacked, one tag each: the lists are proto2's.
    cdef size_t i
    for i in range(ids.len):
        out = wire_put_field(out, tag, ids.ids[i], False)
    return out


cdef inline uint8_t* wire_put_metadata(
    uint8_t* out,
    const wire_snapshot_t* snapshot,
    const wire_snapshot_sizes_t* sizes,
    bint sparse,
) noexcept nogil:
    """Write what follows ``data`` in a snapshot."""
    cdef const wire_conf_state_t* state = &snapshot.conf_state
    if sparse and sizes.metadata == 0:
        return out
    out = wire_put_length(out, 0x12, sizes.metadata)
    if sizes.conf_state or not sparse:
        out = wire_put_length(out, 0x0A, sizes.conf_state)
        out = wire_put_ids(out, 0x08, &state.voters)
        out = wire_put_ids(out, 0x10, &state.learners)
        out = wire_put_ids(out, 0x18, &state.voters_outgoing)
        out = wire_put_ids(out, 0x20, &state.learners_next)
        out = wire_put_field(out, 0x28, state.auto_leave, sparse)
    out = wire_put_field(out, 0x10, snapshot.index, sparse)
    return wire_put_field(out, 0x18, snapshot.term, sparse)


cdef inline uint8_t* wire_put_empty_snapshot(uint8_t* out) noexcept nogil:
    """Write field 9 with empty metadata and an empty ConfState inside."""
    memcpy(out, b"\x4a\x0a\x12\x08\x0a\x02\x28\x00\x10\x00\x18\x00",
           WIRE_EMPTY_SNAPSHOT_SIZE)
    return out + WIRE_EMPTY_SNAPSHOT_SIZE


# The integers of a stream's frames: eight bytes, big-endian.

cdef inline uint64_t wire_get_u64(const uint8_t* at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, sizeof(value))
    return be64toh(value)


cdef inline uint8_t* wire_put_u64(uint8_t* out, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(out, &value, sizeof(value))
    return out + sizeof(value)


# Arrays that grow with what has arrived, never with a number that was read.

cdef inline bint wire_ids_reserve(wire_ids_t* ids, size_t cap) noexcept nogil:
    cdef void* grown
    if cap <= ids.cap:
        return True
    grown = realloc(ids.ids, cap * sizeof(uint64_t))
    if grown == NULL:
        return False
    ids.ids = <uint64_t*>grown
    ids.cap = cap
    return True


cdef inline void wire_ids_free(wire_ids_t* ids) noexcept nogil:
    free(ids.ids)
    memset(ids, 0, sizeof(wire_ids_t))


cdef inline void wire_conf_state_free(wire_conf_state_t* state) noexcept nogil:
    wire_ids_free(&state.voters)
    wire_ids_free(&state.learners)
    wire_ids_free(&state.voters_outgoing)
    wire_ids_free(&state.learners_next)


# The decoder. Every reader advances `at`, never past `end`, and returns a wire_code; the first
# that is not WIRE_OK is described in `decoded.error` and ends the decoding.

cdef inline int wire_fail(
    wire_decoded_t* decoded, int code, int scope, uint32_t field, const uint8_t* where
) noexcept nogil:
    decoded.error.code = code
    decoded.error.scope = scope
    decoded.error.field = field
    decoded.error.offset = <size_t>(where - decoded.input)
    return code


cdef inline int wire_get_varint(
    const uint8_t** at, const uint8_t* end, uint64_t* value
) noexcept nogil:
    cdef const uint8_t* byte = at[0]
    cdef uint64_t result = 0
    cdef int shift = 0
    if byte < end and byte[0] < 0x80:   # nearly every tag and most values
        at[0] = byte + 1
        value[0] = byte[0]
        return WIRE_OK
    while byte < end:
        # The tenth byte has one bit left to give.
        if shift == 63 and byte[0] > 1:
            return WIRE_VARINT_TOO_LONG
        result |= <uint64_t>(byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            at[0] = byte + 1
            value[0] = result
            return WIRE_OK
        byte += 1
        shift += 7
    return WIRE_TRUNCATED


cdef inline int wire_get_tag(
    wire_decoded_t* decoded, int scope, const uint8_t** at, const uint8_t* end, uint32_t* tag
) noexcept nogil:
    cdef const uint8_t* start = at[0]
    cdef uint64_t value
    cdef int code = wire_get_varint(at, end, &value)
    if code != WIRE_OK:
        return wire_fail(decoded, code, scope, 0, start)
    if value > UINT32_MAX or value < 8:
        return wire_fail(decoded, WIRE_FIELD_NUMBER, scope, 0, start)
    tag[0] = <uint32_t>value
    return WIRE_OK


cdef inline int wire_get_value(
    wire_decoded_t* decoded,
    int scope,
    uint32_t tag,
    const uint8_t** at,
    const uint8_t* end,
    uint64_t* value,
) noexcept nogil:
    cdef int code = wire_get_varint(at, end, value)
    if code != WIRE_OK:
        return wire_fail(decoded, code, scope, tag >> 3, at[0])
    return WIRE_OK


cdef inline int wire_get_span(
    wire_decoded_t* decoded,
    int scope,
    uint32_t tag,
    const uint8_t** at,
    const uint8_t* end,
    const uint8_t** data,
    size_t* length,
) noexcept nogil:
    cdef const uint8_t* start = at[0]
    cdef uint64_t value
    cdef int code = wire_get_varint(at, end, &value)
    if code == WIRE_OK and value > <uint64_t>(end - at[0]):
        code = WIRE_NEGATIVE_LENGTH if value >> 63 else WIRE_OVERRUN
    if code != WIRE_OK:
        return wire_fail(decoded, code, scope, tag >> 3, start)
    data[0] = at[0]
    length[0] = <size_t>value
    at[0] += value
    return WIRE_OK


cdef inline int wire_skip(
    wire_decoded_t* decoded, int scope, uint32_t tag, const uint8_t** at, const uint8_t* end
) noexcept nogil:
    """Skip the value after ``tag``, a group with all that is in it."""
    cdef uint32_t groups[WIRE_MAX_GROUP_DEPTH]
    cdef int depth = 0
    cdef uint32_t field = tag >> 3
    cdef uint32_t kind
    cdef uint64_t value
    cdef const uint8_t* data
    cdef const uint8_t* start
    cdef size_t length
    cdef int code
    while True:
        start = at[0]
        kind = tag & 7
        code = WIRE_OK
        if kind == 0:
            code = wire_get_varint(at, end, &value)
        elif kind == 2:
            if wire_get_span(decoded, scope, field << 3, at, end, &data, &length) != WIRE_OK:
                return decoded.error.code
        elif kind == 1 or kind == 5:
            length = 8 if kind == 1 else 4
            if <size_t>(end - start) < length:
                code = WIRE_TRUNCATED
            else:
                at[0] += length
        elif kind == 3:
            if depth == WIRE_MAX_GROUP_DEPTH:
                code = WIRE_GROUP_DEPTH
            else:
                groups[depth] = tag >> 3
                depth += 1
        elif kind == 4:
            depth -= 1
            if depth < 0 or groups[depth] != tag >> 3:
                code = WIRE_END_GROUP
        else:
            code = WIRE_WIRE_TYPE
        if code != WIRE_OK:
            return wire_fail(decoded, code, scope, field, start)
        if depth == 0:
            return WIRE_OK
        code = wire_get_tag(decoded, scope, at, end, &tag)
        if code != WIRE_OK:
            return code


cdef inline int wire_skip_unknown(
    wire_decoded_t* decoded, int scope, uint32_t tag, const uint8_t** at, const uint8_t* end
) noexcept nogil:
    """Skip the value of a field that is not ours, and note that there is something we do not keep.
    """
    decoded.has_unknown = True
    return wire_skip(decoded, scope, tag, at, end)


cdef inline int wire_get_ids(
    wire_decoded_t* decoded,
    uint32_t tag,
    const uint8_t** at,
    const uint8_t* end,
    wire_ids_t* ids,
) noexcept nogil:
    """Append one id, or a packed run of them; a list may come in any mixture."""
    cdef const uint8_t* start = at[0]
    cdef const uint8_t* run_end
    cdef size_t length
    cdef uint64_t value
    if tag & 7 == 2:
        if wire_get_span(decoded, WIRE_CONF_STATE, tag, at, end, &start, &length) != WIRE_OK:
            return decoded.error.code
        run_end = start + length
    else:
        if wire_get_value(decoded, WIRE_CONF_STATE, tag, at, end, &value) != WIRE_OK:
            return decoded.error.code
        run_end = at[0]
    while start < run_end:
        if ids.len == WIRE_MAX_IDS:
            return wire_fail(decoded, WIRE_TOO_MANY_IDS, WIRE_CONF_STATE, tag >> 3, start)
        if wire_get_value(decoded, WIRE_CONF_STATE, tag, &start, run_end, &value) != WIRE_OK:
            return decoded.error.code
        if decoded.keeps_ids:
            if ids.len == ids.cap and not wire_ids_reserve(ids, 2 * ids.cap if ids.cap else 8):
                return wire_fail(decoded, WIRE_NO_MEMORY, WIRE_CONF_STATE, tag >> 3, start)
            ids.ids[ids.len] = value
        ids.len += 1
    return WIRE_OK


cdef inline int wire_get_conf_state(
    wire_decoded_t* decoded, const uint8_t* at, const uint8_t* end
) noexcept nogil:
    cdef wire_conf_state_t* state = &decoded.snapshot.conf_state
    cdef uint32_t tag = 0
    cdef uint64_t value = 0
    cdef int code
    while at < end:
        code = wire_get_tag(decoded, WIRE_CONF_STATE, &at, end, &tag)
        if code != WIRE_OK:
            return code
        if tag == 0x08 or tag == 0x0A:
            code = wire_get_ids(decoded, tag, &at, end, &state.voters)
        elif tag == 0x10 or tag == 0x12:
            code = wire_get_ids(decoded, tag, &at, end, &state.learners)
        elif tag == 0x18 or tag == 0x1A:
            code = wire_get_ids(decoded, tag, &at, end, &state.voters_outgoing)
        elif tag == 0x20 or tag == 0x22:
            code = wire_get_ids(decoded, tag, &at, end, &state.learners_next)
        elif tag == 0x28:
            code = wire_get_value(decoded, WIRE_CONF_STATE, tag, &at, end, &value)
            state.auto_leave = value != 0
        else:
            code = wire_skip_unknown(decoded, WIRE_CONF_STATE, tag, &at, end)
        if code != WIRE_OK:
            return code
    return WIRE_OK


cdef inline int wire_get_metadata(
    wire_decoded_t* decoded, const uint8_t* at, const uint8_t* end
) noexcept nogil:
    cdef wire_snapshot_t* snapshot = &decoded.snapshot
    cdef uint32_t tag = 0
    cdef const uint8_t* data = NULL
    cdef size_t length = 0
    cdef int code
    while at < end:
        code = wire_get_tag(decoded, WIRE_METADATA, &at, end, &tag)
        if code != WIRE_OK:
            return code
        if tag == 0x0A:
            code = wire_get_span(decoded, WIRE_METADATA, tag, &at, end, &data, &length)
            if code == WIRE_OK:
                code = wire_get_conf_state(decoded, data, data + length)
        elif tag == 0x10:
            code = wire_get_value(decoded, WIRE_METADATA, tag, &at, end, &snapshot.index)
        elif tag == 0x18:
            code = wire_get_value(decoded, WIRE_METADATA, tag, &at, end, &snapshot.term)
        else:
            code = wire_skip_unknown(decoded, WIRE_METADATA, tag, &at, end)
        if code != WIRE_OK:
            return code
    return WIRE_OK


cdef inline int wire_get_snapshot(
    wire_decoded_t* decoded, const uint8_t* at, const uint8_t* end
) noexcept nogil:
    """Read a snapshot into what is there already: one sent in pieces is merged."""
    cdef wire_snapshot_t* snapshot = &decoded.snapshot
    cdef uint32_t tag = 0
    cdef const uint8_t* data = NULL
    cdef size_t length = 0
    cdef int code
    while at < end:
        code = wire_get_tag(decoded, WIRE_SNAPSHOT, &at, end, &tag)
        if code != WIRE_OK:
            return code
        if tag == 0x0A:
            code = wire_get_span(
                decoded, WIRE_SNAPSHOT, tag, &at, end, &snapshot.data, &snapshot.data_len
            )
        elif tag == 0x12:
            code = wire_get_span(decoded, WIRE_SNAPSHOT, tag, &at, end, &data, &length)
            if code == WIRE_OK:
                code = wire_get_metadata(decoded, data, data + length)
        else:
            code = wire_skip_unknown(decoded, WIRE_SNAPSHOT, tag, &at, end)
        if code != WIRE_OK:
            return code
    return WIRE_OK


cdef inline int wire_get_entry(
    wire_decoded_t* decoded, const uint8_t* at, const uint8_t* end, wire_entry_t* entry
) noexcept nogil:
    cdef uint32_t tag = 0
    cdef uint64_t value = 0
    cdef int code
    memset(entry, 0, sizeof(wire_entry_t))
    while at < end:
        code = wire_get_tag(decoded, WIRE_ENTRY, &at, end, &tag)
        if code != WIRE_OK:
            return code
        if tag == 0x08:
            code = wire_get_value(decoded, WIRE_ENTRY, tag, &at, end, &value)
            entry.type = <int32_t>value
        elif tag == 0x10:
            code = wire_get_value(decoded, WIRE_ENTRY, tag, &at, end, &entry.term)
        elif tag == 0x18:
            code = wire_get_value(decoded, WIRE_ENTRY, tag, &at, end, &entry.index)
        elif tag == 0x22:
            code = wire_get_span(
                decoded, WIRE_ENTRY, tag, &at, end, &entry.data, &entry.data_len
            )
        else:
            code = wire_skip_unknown(decoded, WIRE_ENTRY, tag, &at, end)
        if code != WIRE_OK:
            return code
    return WIRE_OK


cdef inline int wire_decode(
    const uint8_t* data, size_t size, wire_decoded_t* decoded
) noexcept nogil:
    """Check a whole message and read it, its lists excepted. It takes no memory.

    ``decoded`` may be uninitialised memory.
    The depth of calls is fixed by the schema: nothing recurses on what arrives.
    """
    cdef wire_message_t* message = &decoded.message
    cdef const uint8_t* at = data
    cdef const uint8_t* end = data + size
    cdef const uint8_t* start
    cdef const uint8_t* span = NULL
    cdef wire_entry_t entry
    cdef size_t length = 0
    cdef uint32_t tag = 0
    cdef uint64_t value = 0
    cdef int code
    memset(decoded, 0, sizeof(wire_decoded_t))
    decoded.input = data
    decoded.end = end
    while at < end:
        start = at
        code = wire_get_tag(decoded, WIRE_MESSAGE, &at, end, &tag)
        if code != WIRE_OK:
            return code
        if tag == 0x08:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &value)
            # Enums are open: the low 32 bits are kept, known or not.
            message.type = <int32_t>value
        elif tag == 0x10:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.to)
        elif tag == 0x18:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.from_)
        elif tag == 0x20:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.term)
        elif tag == 0x28:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.log_term)
        elif tag == 0x30:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.index)
        elif tag == 0x3A:
            code = wire_get_span(decoded, WIRE_MESSAGE, tag, &at, end, &span, &length)
            if code == WIRE_OK and decoded.entries_len == WIRE_MAX_ENTRIES:
                code = wire_fail(decoded, WIRE_TOO_MANY_ENTRIES, WIRE_MESSAGE, 7, span)
            if code == WIRE_OK:
                code = wire_get_entry(decoded, span, span + length, &entry)
            if decoded.entries is NULL:
                decoded.entries = start
            decoded.entries_len += 1
            decoded.entries_bytes += length
            decoded.last_index = entry.index
        elif tag == 0x40:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.commit)
        elif tag == 0x4A:
            code = wire_get_span(decoded, WIRE_MESSAGE, tag, &at, end, &span, &length)
            if code == WIRE_OK:
                code = wire_get_snapshot(decoded, span, span + length)
            if decoded.snapshots is NULL:
                decoded.snapshots = start
        elif tag == 0x50:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &value)
            message.reject = value != 0
        elif tag == 0x58:
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &message.reject_hint)
        elif tag == 0x62:
            code = wire_get_span(
                decoded, WIRE_MESSAGE, tag, &at, end, &message.context, &message.context_len
            )
        elif tag == 0x68:
            # `vote` never leaves a node, but etcd 3.6 sends a zero with every message.
            code = wire_get_value(decoded, WIRE_MESSAGE, tag, &at, end, &value)
            if value != 0:
                decoded.has_unknown = True
        else:
            # Also `responses`, which never leave a node, and a field we know under a wire type
            # we do not: newest etcd skips it, 3.4 refuses the message.
            code = wire_skip_unknown(decoded, WIRE_MESSAGE, tag, &at, end)
        if code != WIRE_OK:
            return code
    return WIRE_OK


cdef inline int wire_find(
    wire_decoded_t* decoded, uint32_t tag, const uint8_t** at, const uint8_t** data, size_t* length
) noexcept nogil:
    """Go on from ``at`` to the value of the next ``tag`` of the message.

    What wire_decode has checked fails only if somebody has changed the input since; it is not
    read past its end for that.
    """
    cdef uint32_t found = 0
    cdef int code
    while True:
        if at[0] >= decoded.end:
            return wire_fail(decoded, WIRE_TRUNCATED, WIRE_MESSAGE, tag >> 3, at[0])
        code = wire_get_tag(decoded, WIRE_MESSAGE, at, decoded.end, &found)
        if code == WIRE_OK and found == tag:
            return wire_get_span(decoded, WIRE_MESSAGE, tag, at, decoded.end, data, length)
        if code == WIRE_OK:
            code = wire_skip(decoded, WIRE_MESSAGE, found, at, decoded.end)
        if code != WIRE_OK:
            return code


cdef inline int wire_find_entry(
    wire_decoded_t* decoded, const uint8_t** at, const uint8_t** data, size_t* length
) noexcept nogil:
    """Go on from ``at`` to the bytes of the next entry, behind what tells their length."""
    cdef uint64_t size
    if not decoded.is_frame:
        return wire_find(decoded, 0x3A, at, data, length)
    # As in wire_find: this fails only if somebody has changed the input.
    if decoded.end - at[0] < 8:
        return wire_fail(decoded, WIRE_TRUNCATED, WIRE_MESSAGE, 7, at[0])
    size = wire_get_u64(at[0])
    at[0] += 8
    if size > <uint64_t>(decoded.end - at[0]):
        return wire_fail(decoded, WIRE_OVERRUN, WIRE_MESSAGE, 7, at[0] - 8)
    data[0] = at[0]
    length[0] = <size_t>size
    at[0] += size
    return WIRE_OK


cdef inline int wire_next_entry(
    wire_decoded_t* decoded, const uint8_t** at, wire_entry_t* entry
) noexcept nogil:
    """Read the next entry, ``entries_len`` times in all; ``at`` begins at ``decoded.entries``."""
    cdef const uint8_t* data = NULL
    cdef size_t length = 0
    cdef int code = wire_find_entry(decoded, at, &data, &length)
    if code == WIRE_OK:
        code = wire_get_entry(decoded, data, data + length, entry)
    return code


cdef inline void wire_move(wire_decoded_t* decoded, const uint8_t* to) noexcept nogil:
    """The input has been copied to ``to``: point there."""
    cdef const uint8_t* input = decoded.input
    decoded.input = to
    decoded.end = to + (decoded.end - input)
    if decoded.message.context is not NULL:
        decoded.message.context = to + (decoded.message.context - input)
    if decoded.entries is not NULL:
        decoded.entries = to + (decoded.entries - input)
    if decoded.snapshot.data is not NULL:
        decoded.snapshot.data = to + (decoded.snapshot.data - input)
    if decoded.snapshots is not NULL:
        decoded.snapshots = to + (decoded.snapshots - input)


cdef inline bint wire_has_ids(const wire_conf_state_t* state) noexcept nogil:
    return (state.voters.len | state.learners.len | state.voters_outgoing.len
            | state.learners_next.len) != 0


cdef inline int wire_read_ids(wire_decoded_t* decoded) noexcept nogil:
    """Fill the lists of the ConfState, whose lengths are known. Once.

    Whatever the result, they are the caller's: wire_conf_state_free.
    """
    cdef wire_snapshot_t* snapshot = &decoded.snapshot
    cdef wire_snapshot_t read = snapshot[0]     # which its first pieces are not to undo
    cdef wire_ids_t* lists[4]
    cdef const uint8_t* at = decoded.snapshots
    cdef const uint8_t* data = NULL
    cdef size_t length = 0, left = 0
    cdef int code = WIRE_OK, i
    lists[0] = &snapshot.conf_state.voters
    lists[1] = &snapshot.conf_state.learners
    lists[2] = &snapshot.conf_state.voters_outgoing
    lists[3] = &snapshot.conf_state.learners_next
    decoded.keeps_ids = True
    for i in range(4):
        length, lists[i].len = lists[i].len, 0
        left += length
        if length > 0 and not wire_ids_reserve(lists[i], length):
            code = WIRE_NO_MEMORY
    if code != WIRE_OK:
        return wire_fail(decoded, code, WIRE_CONF_STATE, 0, decoded.input)
    while code == WIRE_OK \
            and lists[0].len + lists[1].len + lists[2].len + lists[3].len < left:
        code = wire_find(decoded, 0x4A, &at, &data, &length)
        if code == WIRE_OK:
            code = wire_get_snapshot(decoded, data, data + length)
    snapshot.data = read.data
    snapshot.data_len = read.data_len
    snapshot.index = read.index
    snapshot.term = read.term
    snapshot.conf_state.auto_leave = read.conf_state.auto_leave
    return code


# A frame as the message that it stands for, which nobody has encoded: each entry as it came, and
# besides them only what is not zero, which every etcd reads.

cdef inline int wire_frame_size(wire_decoded_t* decoded, size_t* size) noexcept nogil:
    """Measure that message."""
    cdef const uint8_t* at = decoded.entries
    cdef const uint8_t* data = NULL
    cdef size_t length = 0, left = decoded.entries_len
    size[0] = wire_head_size(&decoded.message, True) \
        + wire_field_size(decoded.message.commit, True)
    while left > 0:
        if wire_find_entry(decoded, &at, &data, &length) != WIRE_OK:
            return decoded.error.code
        size[0] += wire_span_size(length)
        left -= 1
    return WIRE_OK


cdef inline uint8_t* wire_put_frame(wire_decoded_t* decoded, uint8_t* out) noexcept nogil:
    """Encode it, once it has been measured, of an input that nobody else may change."""
    cdef const uint8_t* at = decoded.entries
    cdef const uint8_t* data = NULL
    cdef size_t length = 0, left = decoded.entries_len
    out = wire_put_head(out, &decoded.message, True)
    while left > 0:
        wire_find_entry(decoded, &at, &data, &length)
        out = wire_put_length(out, 0x3A, length)
        memcpy(out, data, length)
        out += length
        left -= 1
    return wire_put_field(out, 0x40, decoded.message.commit, True)
