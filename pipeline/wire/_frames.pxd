"""Frames, of which etcd's streams are made: found in what has been read, and written.

A stream has one writer and one reader. On a *message* stream each frame is a message:

    0   8   length, and after it the raftpb Message

On a *msgapp* stream (etcd's msgappv2) the first byte is the frame's kind. Integers are big-endian:

    00  the link's heartbeat, and nothing after it
    01  entries, of the MsgApp that everybody expects next: 8 count,
        then for each 8 length, and after it the raftpb Entry; at last 8 commit
    02  any message: 8 length, and after it the raftpb Message

Both ends keep a term and an index, 0 when the stream begins. Kind 01 is a MsgApp of that term,
whose ``log_term`` is that, too, and whose ``index`` is that one; it adds the count to the index.
Kind 02 sets them: to the message's term, and to the index of its last entry, or its own without
entries.

Nothing here waits or takes memory, and what a frame announces decides about neither: a frame lies
in the memory of whoever reads it, from its first byte on, and grows there with what arrives. When
it is whole, what has been read of it points into that memory; ``wire_move`` follows it elsewhere.

Source: etcd rafthttp/msg_codec.go, msgappv2_codec.go.
"""

from libc.stdint cimport INT32_MAX, int32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset
from posix.uio cimport iovec

from pipeline.wire._facts cimport facts_t
from pipeline.wire._raftpb cimport (
    WIRE_FRAME_KIND, WIRE_FRAME_LIMIT, WIRE_MAX_ENTRIES, WIRE_MESSAGE, WIRE_OK, WIRE_PROFILE_35,
    WIRE_PROFILE_36, WIRE_PROFILE_37, WIRE_TOO_MANY_ENTRIES, wire_decode, wire_decoded_t,
    wire_entry_t, wire_fail, wire_get_entry, wire_get_u64, wire_has_ids, wire_message_t,
    wire_put_empty_snapshot, wire_put_field, wire_put_head, wire_put_reject, wire_put_u64,
)

# Kinds of streams.
cdef enum:
    STREAM_MESSAGE = 0
    STREAM_MSGAPP = 1

# Kinds of frames. On a message stream all are FRAME_MESSAGE, and none says so.
cdef enum:
    FRAME_HEARTBEAT = 0
    FRAME_ENTRIES = 1
    FRAME_MESSAGE = 2

cdef enum:
    # What etcd's readers of a message stream take at most, of one message. Its readers of a msgapp
    # stream take anything; ours are held to this there, too.
    FRAME_LIMIT = 512 << 20
    # Room for the head of any frame, and for the link's heartbeat on any stream.
    FRAME_HEAD_MAX = 9
    FRAME_HEARTBEAT_MAX = 38

# What has been read.
cdef enum:
    FRAMES_MORE = 0         # a frame that is not whole
    FRAMES_MESSAGE = 1
    FRAMES_HEARTBEAT = 2    # the link's: a message, but not for Raft
    FRAMES_BAD = -1         # no frame, or no message in it: the stream is over

cdef enum:
    FRAMES_TYPE_APP = 3
    FRAMES_TYPE_HEARTBEAT = 8

# One stream, at either of its ends.
cdef struct frames_t:
    int stream              # STREAM_
    uint64_t from_          # the member that writes
    uint64_t to             # the member that reads
    uint64_t limit          # bytes of a message, on either side
    # Of a msgapp stream: what both ends know, and kind 01 does not say.
    uint64_t term
    uint64_t index
    # Reading: of a frame that is not whole.
    size_t seen             # bytes of it that need not be looked at again
    uint64_t entries_left   # behind them
    bint has_unknown        # among them is a field that is in none of our structs
    size_t need             # bytes that the frame has at the least, told with FRAMES_MORE

# A frame that is about to be written.
cdef struct frame_t:
    int kind                # FRAME_
    size_t size             # of all of it
    const iovec* segments   # the message: borrowed
    int n_segments
    size_t message_bytes
    const facts_t* facts    # borrowed
    uint64_t term           # what the stream's will be, and its index
    uint64_t index


cdef inline void frames_init(
    frames_t* frames, int stream, uint64_t from_, uint64_t to
) noexcept nogil:
    """Begin a stream. It has no memory to be freed."""
    memset(frames, 0, sizeof(frames_t))
    frames.stream = stream
    frames.from_ = from_
    frames.to = to
    frames.limit = FRAME_LIMIT
    frames.need = 1


# Reading.

cdef inline int frames_more(frames_t* frames, size_t need) noexcept nogil:
    frames.need = need
    return FRAMES_MORE


cdef inline int frames_fail(
    wire_decoded_t* decoded, int code, const uint8_t* data, size_t offset
) noexcept nogil:
    decoded.input = data
    wire_fail(decoded, code, WIRE_MESSAGE, 0, data + offset)
    return FRAMES_BAD


cdef inline bint frames_is_heartbeat(const wire_message_t* message) noexcept nogil:
    """Tell whether a message is the link's. etcd: isLinkHeartbeatMessage."""
    return message.type == FRAMES_TYPE_HEARTBEAT and message.from_ == 0 and message.to == 0


cdef inline int frames_read_message(
    frames_t* frames, const uint8_t* data, size_t n, size_t head, size_t* used,
    wire_decoded_t* decoded
) noexcept nogil:
    """Read a length, which ends the first ``head`` bytes, and the message of that length."""
    cdef uint64_t length
    if n < head:
        return frames_more(frames, head)
    length = wire_get_u64(data + head - 8)
    if length > frames.limit:
        return frames_fail(decoded, WIRE_FRAME_LIMIT, data, head - 8)
    if n - head < length:
        return frames_more(frames, head + <size_t>length)
    if wire_decode(data + head, <size_t>length, decoded) != WIRE_OK:
        decoded.error.offset += head
        return FRAMES_BAD
    if frames.stream == STREAM_MSGAPP:
        frames.term = decoded.message.term
        frames.index = decoded.message.index
        if decoded.entries_len > 0:
            frames.index = decoded.last_index
    used[0] = head + <size_t>length
    return FRAMES_HEARTBEAT if frames_is_heartbeat(&decoded.message) else FRAMES_MESSAGE


cdef inline int frames_read_entries(
    frames_t* frames, const uint8_t* data, size_t n, size_t* used, wire_decoded_t* decoded
) noexcept nogil:
    """Read the entries of a MsgApp one by one, each when all of it is there, and the commit."""
    cdef size_t at = frames.seen
    cdef uint64_t length
    cdef wire_entry_t entry
    if at == 0:
        if n < 9:
            return frames_more(frames, 9)
        length = wire_get_u64(data + 1)
        if length > WIRE_MAX_ENTRIES:
            return frames_fail(decoded, WIRE_TOO_MANY_ENTRIES, data, 1)
        at = 9
        frames.entries_left = length
        frames.has_unknown = False
    memset(decoded, 0, sizeof(wire_decoded_t))
    decoded.input = data
    while frames.entries_left > 0:
        frames.seen = at
        if n - at < 8:
            return frames_more(frames, at + 16)
        length = wire_get_u64(data + at)
        if length > frames.limit or at - 9 + length > frames.limit:
            return frames_fail(decoded, WIRE_FRAME_LIMIT, data, at)
        if n - at - 8 < length:
            return frames_more(frames, at + <size_t>length + 16)
        at += 8
        if wire_get_entry(decoded, data + at, data + at + length, &entry) != WIRE_OK:
            return FRAMES_BAD
        at += <size_t>length
        decoded.last_index = entry.index
        frames.has_unknown |= decoded.has_unknown
        frames.entries_left -= 1
    frames.seen = at
    if n - at < 8:
        return frames_more(frames, at + 8)
    decoded.is_frame = True
    decoded.has_unknown = frames.has_unknown
    decoded.end = data + at + 8
    decoded.entries_len = <size_t>wire_get_u64(data + 1)
    decoded.entries_bytes = at - 9 - 8 * decoded.entries_len
    if decoded.entries_len > 0:
        decoded.entries = data + 9
    decoded.message.type = FRAMES_TYPE_APP
    decoded.message.from_ = frames.from_
    decoded.message.to = frames.to
    decoded.message.term = decoded.message.log_term = frames.term
    decoded.message.index = frames.index
    decoded.message.commit = wire_get_u64(data + at)
    frames.index += decoded.entries_len
    frames.seen = 0
    used[0] = at + 8
    return FRAMES_MESSAGE


cdef inline int frames_read(
    frames_t* frames, const uint8_t* data, size_t n, size_t* used, wire_decoded_t* decoded
) noexcept nogil:
    """Read the frame that begins at ``data``, where ``n`` bytes of it and of the next ones are.

    FRAMES_MORE until the frame is whole: call again when more of it is there, wherever it is then;
    what has been looked at is not looked at again. Then ``used`` bytes were the frame, and
    ``decoded`` points into them. It may be uninitialised memory, and after FRAMES_BAD says what is
    wrong, at which offset in the frame.
    """
    if frames.stream == STREAM_MESSAGE:
        return frames_read_message(frames, data, n, 8, used, decoded)
    if n == 0:
        return frames_more(frames, 1)
    if data[0] == FRAME_ENTRIES:
        return frames_read_entries(frames, data, n, used, decoded)
    if data[0] == FRAME_MESSAGE:
        return frames_read_message(frames, data, n, 9, used, decoded)
    if data[0] != FRAME_HEARTBEAT:
        return frames_fail(decoded, WIRE_FRAME_KIND, data, 0)
    memset(decoded, 0, sizeof(wire_decoded_t))
    decoded.input = decoded.end = data + 1
    decoded.is_frame = True
    decoded.message.type = FRAMES_TYPE_HEARTBEAT
    used[0] = 1
    return FRAMES_HEARTBEAT


# Writing. A message comes encoded, in as many segments as whoever encoded it has made of it.

# A place in a row of segments.
cdef struct pieces_t:
    const iovec* segment
    const iovec* end
    const uint8_t* at
    size_t left             # in this segment


cdef inline void pieces_init(pieces_t* pieces, const iovec* segments, int n) noexcept nogil:
    pieces.segment = segments
    pieces.end = segments + n
    pieces.at = NULL
    pieces.left = 0
    if n > 0:
        pieces.at = <const uint8_t*>segments[0].iov_base
        pieces.left = segments[0].iov_len


cdef inline bint pieces_more(pieces_t* pieces) noexcept nogil:
    """Go on to where the next byte is; False at the end."""
    while pieces.left == 0:
        if pieces.end - pieces.segment <= 1:
            return False
        pieces.segment += 1
        pieces.at = <const uint8_t*>pieces.segment.iov_base
        pieces.left = pieces.segment.iov_len
    return True


cdef inline size_t pieces_take(pieces_t* pieces, size_t most) noexcept nogil:
    """Go on by what is left of the segment, but not by more than ``most``; returns by how much."""
    cdef size_t taken = min(pieces.left, most)
    pieces.at += taken
    pieces.left -= taken
    return taken


cdef inline bint pieces_skip(pieces_t* pieces, uint64_t length) noexcept nogil:
    while length > 0:
        if not pieces_more(pieces):
            return False
        length -= pieces_take(pieces, <size_t>length)
    return True


cdef inline size_t pieces_varint(pieces_t* pieces, uint64_t* value) noexcept nogil:
    """Read a varint; returns how many bytes it has, 0 if it is none."""
    cdef size_t n = 0
    cdef uint8_t byte = 0x80
    value[0] = 0
    while byte >= 0x80:
        if n == 10 or not pieces_more(pieces):
            return 0
        byte = pieces.at[0]
        value[0] |= <uint64_t>(byte & 0x7F) << 7 * n
        pieces_take(pieces, 1)
        n += 1
    return n


cdef inline void facts_of(const wire_decoded_t* decoded, facts_t* facts) noexcept nogil:
    """What there is to tell of a message that was read."""
    cdef const wire_message_t* message = &decoded.message
    facts.is_bare = (
        message.type == FRAMES_TYPE_APP
        and not message.reject and message.reject_hint == 0 and message.context is NULL
        and decoded.snapshot.data is NULL and decoded.snapshot.index == 0
        and decoded.snapshot.term == 0 and not decoded.snapshot.conf_state.auto_leave
        and not wire_has_ids(&decoded.snapshot.conf_state) and not decoded.has_unknown
    )
    facts.from_ = message.from_
    facts.to = message.to
    facts.term = message.term
    facts.log_term = message.log_term
    facts.index = message.index
    facts.last_index = decoded.last_index if decoded.entries_len > 0 else message.index
    facts.commit = message.commit
    facts.count = decoded.entries_len
    facts.entries_bytes = decoded.entries_bytes
    facts.entries_at = 0
    if decoded.entries is not NULL:
        facts.entries_at = <size_t>(decoded.entries - decoded.input)


cdef inline bint frame_is_entries(const frames_t* frames, const facts_t* facts) noexcept nogil:
    """Tell whether a message is the MsgApp that is expected next, and nothing besides it.

    Differs from etcd: it looks at term, log_term and index only, and what else the message says is
    lost. Of what a Raft makes this is all there is.
    """
    return (
        facts.is_bare and facts.index == frames.index and facts.log_term == frames.term
        and facts.term == frames.term and facts.from_ == frames.from_ and facts.to == frames.to
    )


cdef inline bint frame_of(
    const frames_t* frames, const iovec* segments, int n_segments, const facts_t* facts,
    frame_t* frame
) noexcept nogil:
    """Choose the frame that carries a message; False if it is above what a frame may have.

    It has to be a message: an etcd that reads none in a frame of a msgapp stream ends itself, and
    to older ones a field that has not the type we know is none either (``has_unknown``). So what
    others have encoded was read. ``facts`` are borrowed until the frame is written.
    """
    cdef size_t size = 0
    cdef int i
    for i in range(n_segments):
        size += segments[i].iov_len
    if size > frames.limit:
        return False
    frame.segments = segments
    frame.n_segments = n_segments
    frame.message_bytes = size
    frame.facts = facts
    frame.term = frames.term
    frame.index = frames.index
    if frames.stream == STREAM_MSGAPP and frame_is_entries(frames, facts):
        frame.kind = FRAME_ENTRIES
        frame.size = 17 + 8 * facts.count + facts.entries_bytes
        frame.index += facts.count
        return True
    frame.kind = FRAME_MESSAGE
    frame.size = 8 + size
    if frames.stream == STREAM_MSGAPP:
        frame.size += 1
        frame.term = facts.term
        frame.index = facts.last_index
    return True


# What is written of a frame: a large piece of the message stays where it is and becomes a segment,
# all else is copied.
cdef struct frame_plan_t:
    size_t borrow_min       # from this size on a piece is large; not 0
    size_t copied           # bytes
    int n_segments

# Where it goes. What a message says changes under us only if somebody breaks his word; then nothing
# is written beyond what was planned.
cdef struct frame_sink_t:
    frame_plan_t done
    frame_plan_t room
    uint8_t* out            # NULL while it is planned
    size_t run              # of what was copied: bytes that are in a segment
    iovec* segments         # NULL without, and while it is planned
    bint is_over            # there was no room


cdef inline void frame_end_run(frame_sink_t* sink) noexcept nogil:
    if sink.done.copied > sink.run and sink.done.n_segments < sink.room.n_segments:
        if sink.segments is not NULL:
            sink.segments[sink.done.n_segments].iov_base = sink.out + sink.run
            sink.segments[sink.done.n_segments].iov_len = sink.done.copied - sink.run
        sink.done.n_segments += 1
        sink.run = sink.done.copied


cdef inline void frame_put_piece(
    frame_sink_t* sink, const uint8_t* data, size_t size
) noexcept nogil:
    if size < sink.room.borrow_min:
        if size > sink.room.copied - sink.done.copied:
            sink.is_over = True
            return
        if sink.out is not NULL and size > 0:
            memcpy(sink.out + sink.done.copied, data, size)
        sink.done.copied += size
        return
    frame_end_run(sink)
    if sink.done.n_segments == sink.room.n_segments:
        sink.is_over = True
        return
    if sink.segments is not NULL:
        sink.segments[sink.done.n_segments].iov_base = <void*>data
        sink.segments[sink.done.n_segments].iov_len = size
    sink.done.n_segments += 1


cdef inline void frame_put_u64(frame_sink_t* sink, uint64_t value) noexcept nogil:
    if sink.room.copied - sink.done.copied < 8:
        sink.is_over = True
        return
    if sink.out is not NULL:
        wire_put_u64(sink.out + sink.done.copied, value)
    sink.done.copied += 8


cdef inline void frame_put_entries(frame_sink_t* sink, const frame_t* frame) noexcept nogil:
    """Put the entries of a message that has been read already, each behind its length."""
    cdef pieces_t pieces
    cdef uint64_t tag = 0, value = 0
    cdef size_t count = frame.facts.count
    cdef const uint8_t* at
    pieces_init(&pieces, frame.segments, frame.n_segments)
    pieces_skip(&pieces, frame.facts.entries_at)
    frame_put_u64(sink, count)
    while count > 0:
        if pieces_varint(&pieces, &tag) == 0 or pieces_varint(&pieces, &value) == 0:
            sink.is_over = True
            return
        if tag != 0x3A:
            if tag & 7 == 2:
                pieces_skip(&pieces, value)
            continue
        frame_put_u64(sink, value)
        while value > 0 and pieces_more(&pieces):
            at = pieces.at
            frame_put_piece(sink, at, pieces_take(&pieces, <size_t>value))
            value -= <size_t>(pieces.at - at)
        count -= 1
    frame_put_u64(sink, frame.facts.commit)


cdef inline void frame_put(
    const frames_t* frames, const frame_t* frame, frame_sink_t* sink
) noexcept nogil:
    cdef int i
    if frames.stream == STREAM_MSGAPP:
        if sink.out is not NULL:
            sink.out[0] = <uint8_t>frame.kind
        sink.done.copied += 1
    if frame.kind == FRAME_ENTRIES:
        frame_put_entries(sink, frame)
    else:
        frame_put_u64(sink, frame.message_bytes)
        for i in range(frame.n_segments):
            frame_put_piece(sink, <const uint8_t*>frame.segments[i].iov_base,
                            frame.segments[i].iov_len)


cdef inline void frame_plan(
    const frames_t* frames, const frame_t* frame, size_t borrow_min, frame_plan_t* plan
) noexcept nogil:
    """Tell how much room frame_gather needs."""
    cdef frame_sink_t sink
    memset(&sink, 0, sizeof(frame_sink_t))
    sink.room.borrow_min = borrow_min
    sink.room.copied = <size_t>-1
    sink.room.n_segments = INT32_MAX
    frame_put(frames, frame, &sink)
    frame_end_run(&sink)
    plan[0] = sink.done
    plan.borrow_min = borrow_min


cdef inline bint frame_gather(
    frames_t* frames, const frame_t* frame, const frame_plan_t* plan, uint8_t* out, iovec* segments
) noexcept nogil:
    """Write a frame into segments, as planned. It is the stream's next one from now on.

    False if the message has changed since it was looked at: there is no frame then, and what has
    been written of it must not be sent.
    """
    cdef frame_sink_t sink
    memset(&sink, 0, sizeof(frame_sink_t))
    sink.room = plan[0]
    sink.out = out
    sink.segments = segments
    frame_put(frames, frame, &sink)
    frame_end_run(&sink)
    if sink.is_over or sink.run != plan.copied or sink.done.n_segments != plan.n_segments:
        return False
    frames.term = frame.term
    frames.index = frame.index
    return True


cdef inline bint frame_write(
    frames_t* frames, const frame_t* frame, uint8_t* out
) noexcept nogil:
    """Write a frame, ``frame.size`` bytes, in one piece; otherwise as ``frame_gather``."""
    cdef frame_sink_t sink
    memset(&sink, 0, sizeof(frame_sink_t))
    sink.room.borrow_min = <size_t>-1
    sink.room.copied = frame.size
    sink.out = out
    frame_put(frames, frame, &sink)
    if sink.is_over or sink.done.copied != frame.size:
        return False
    frames.term = frame.term
    frames.index = frame.index
    return True


cdef inline uint8_t* frame_write_heartbeat(
    const frames_t* frames, int profile, uint8_t* out
) noexcept nogil:
    """Write the link's heartbeat, FRAME_HEARTBEAT_MAX bytes at most; returns where the next goes.

    On a message stream it is a message as the profile's etcd encodes it.
    """
    cdef wire_message_t message
    cdef bint sparse = profile == WIRE_PROFILE_37
    cdef uint8_t* end
    if frames.stream == STREAM_MSGAPP:
        out[0] = FRAME_HEARTBEAT
        return out + 1
    memset(&message, 0, sizeof(wire_message_t))
    message.type = FRAMES_TYPE_HEARTBEAT
    end = wire_put_head(out + 8, &message, sparse)
    end = wire_put_field(end, 0x40, message.commit, sparse)
    if profile == WIRE_PROFILE_35:
        end = wire_put_empty_snapshot(end)
    end = wire_put_reject(end, &message, sparse)
    if profile == WIRE_PROFILE_36:
        end = wire_put_field(end, 0x68, 0, sparse)
    wire_put_u64(out, <uint64_t>(end - out - 8))
    return end
