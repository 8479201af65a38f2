# cython: auto_pickle=False
"""The classes over ``_frames.pxd``, for tests: a stream's two ends, without the stream."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport uint64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.uio cimport iovec

from pipeline.wire._guard cimport guard_read, guard_read_end
from pipeline.wire._messages cimport (
    EncodedMessage, Message, decode_error, encoded_from_decoded, gather_plan_t, message_encode,
    message_facts, message_from_decoded, message_gather, message_gather_plan, message_hold,
    message_let_go, profile_index,
)
from pipeline.wire._raftpb cimport WIRE_OK, wire_decode, wire_decoded_t, wire_move

from pipeline.errors import MarshalError, UsageError

__all__ = ["FrameReader", "FrameWriter"]

cdef enum:
    # Of a frame of this size there may be payloads that a message has views of.
    BODY_MIN = 64 * 1024


cdef int stream_of(str stream) except -1:
    if stream == "message":
        return STREAM_MESSAGE
    if stream == "msgapp":
        return STREAM_MSGAPP
    raise UsageError(f"stream: {stream!r} is neither 'message' nor 'msgapp'")


cdef int read_facts(const iovec* message, facts_t* facts) except -1:
    cdef wire_decoded_t decoded
    if wire_decode(<const uint8_t*>message.iov_base, message.iov_len, &decoded) != WIRE_OK:
        raise decode_error(&decoded)
    facts_of(&decoded, facts)
    return 0


cdef class FrameReader:
    """The end of a stream that is read: bytes in pieces of any size, messages out.

    Parameters
    ----------
    stream : str
        ``"message"`` or ``"msgapp"``.
    from_, to : int, optional
        The member that writes and the member that reads: of a frame of entries, whose MsgApp it is.
    limit : int, optional
        Bytes of a message at most.
    encoded : bool, optional
        Whether EncodedMessages are made instead of Messages.

    Notes
    -----
    Used by one thread at a time. Its memory is exactly what has arrived of a frame, so that a
    sanitizer sees one byte too many that is read.
    """

    cdef frames_t c
    cdef uint8_t* data      # owned: the frame that is not whole, and what has come behind it
    cdef size_t len
    cdef bint is_encoded

    def __cinit__(self, str stream, *, uint64_t from_=0, uint64_t to=0,
                  uint64_t limit=FRAME_LIMIT, bint encoded=False):
        frames_init(&self.c, stream_of(stream), from_, to)
        self.c.limit = limit
        self.is_encoded = encoded

    def __dealloc__(self):
        free(self.data)

    @property
    def term(self):
        """int: of a msgapp stream."""
        return self.c.term

    @property
    def index(self):
        """int: of a msgapp stream."""
        return self.c.index

    @property
    def pending(self):
        """int: bytes that are in no frame that was returned."""
        return self.len

    @property
    def needed(self):
        """int: bytes that the frame has at the least; told by ``read`` when it is not whole."""
        return self.c.need

    cdef int hold(self, const uint8_t* data, size_t size, const uint8_t* more, size_t n) except -1:
        """Have ``size`` bytes and ``n`` further ones in memory of that size, in place of ours."""
        cdef uint8_t* held = <uint8_t*>malloc(size + n if size + n > 0 else 1)
        if held is NULL:
            raise MemoryError
        if size > 0:
            memcpy(held, data, size)
        if n > 0:
            memcpy(held + size, more, n)
        free(self.data)
        self.data = held
        self.len = size + n
        return 0

    def feed(self, const uint8_t[::1] data not None):
        """Take what has arrived."""
        if data.shape[0] > 0:
            self.hold(self.data, self.len, &data[0], <size_t>data.shape[0])

    def read(self):
        """Return the next message, or None until its frame is whole.

        The link's heartbeat is a Message, too: of type HEARTBEAT, from nobody to nobody.

        Raises
        ------
        UnmarshalError
            If this is no frame, or no message is in it: the stream is over.
        """
        cdef wire_decoded_t decoded
        cdef size_t used = 0
        cdef int result
        result = frames_read(&self.c, self.data, self.len, &used, &decoded)
        if result == FRAMES_MORE:
            return None
        if result == FRAMES_BAD:
            raise decode_error(&decoded)
        if used < BODY_MIN:
            return self.moved(&decoded, used)
        # As of a large frame that was read into a body of its own.
        body = PyBytes_FromStringAndSize(<char*>self.data, <Py_ssize_t>used)
        wire_move(&decoded, <uint8_t*>PyBytes_AS_STRING(body) + (decoded.input - self.data))
        self.hold(self.data + used, self.len - used, NULL, 0)
        return self.made(&decoded, body)

    cdef object moved(self, wire_decoded_t* decoded, size_t used):
        """Make the message in memory of its own, as if the next frames were read over this one."""
        cdef size_t size = <size_t>(decoded.end - decoded.input)
        cdef uint8_t* own = <uint8_t*>malloc(size if size > 0 else 1)
        if own is NULL:
            raise MemoryError
        try:
            memcpy(own, decoded.input, size)
            wire_move(decoded, own)
            self.hold(self.data + used, self.len - used, NULL, 0)
            return self.made(decoded, None)
        finally:
            free(own)

    cdef object made(self, wire_decoded_t* decoded, object body):
        if self.is_encoded:
            return encoded_from_decoded(decoded, body)
        return message_from_decoded(decoded, body)


cdef class FrameWriter:
    """The end of a stream that is written: messages in, frames out.

    Parameters
    ----------
    stream : str
        ``"message"`` or ``"msgapp"``.
    from_, to : int, optional
        The member that writes and the member that reads.
    profile : str, optional
        Which generation of etcd encodes the messages.

    Notes
    -----
    Used by one thread at a time.
    """

    cdef frames_t c
    cdef int profile

    def __cinit__(self, str stream, *, uint64_t from_=0, uint64_t to=0, profile="3.5"):
        frames_init(&self.c, stream_of(stream), from_, to)
        self.profile = profile_index(profile)

    @property
    def term(self):
        """int: of a msgapp stream."""
        return self.c.term

    @property
    def index(self):
        """int: of a msgapp stream."""
        return self.c.index

    def heartbeat(self):
        """Return the link's heartbeat."""
        cdef uint8_t out[FRAME_HEARTBEAT_MAX]
        return PyBytes_FromStringAndSize(
            <char*>out, frame_write_heartbeat(&self.c, self.profile, out) - out)

    def write(self, message, *, size_t borrow_min=0):
        """Return the frame of a message.

        Parameters
        ----------
        message : Message or EncodedMessage
        borrow_min : int, optional
            From which size on a payload is left where it is, by the encoding and by the frame, as
            those of large messages are. 0 copies all.

        Raises
        ------
        UnmarshalError
            If an EncodedMessage is none.
        MarshalError
            If it is above what a frame may have.
        """
        cdef facts_t facts
        cdef iovec whole
        if type(message) is EncodedMessage:
            guard_read(&(<EncodedMessage>message).guard)
            _owner = (<EncodedMessage>message).owner
            whole.iov_base = <void*>(<EncodedMessage>message).payload
            whole.iov_len = (<EncodedMessage>message).size
            guard_read_end(&(<EncodedMessage>message).guard)
            if whole.iov_len <= self.c.limit:       # otherwise it is refused for that
                read_facts(&whole, &facts)
            return self.frame(&whole, 1, &facts, borrow_min)
        if borrow_min > 0:
            return self.write_gathered(<Message?>message, borrow_min)
        encoded = message_encode(<Message?>message, self.profile)
        whole.iov_base = PyBytes_AS_STRING(encoded)
        whole.iov_len = <size_t>len(encoded)
        message_hold(<Message>message)
        message_facts(<Message>message, self.profile, &facts)
        message_let_go(<Message>message)
        return self.frame(&whole, 1, &facts, 0)

    cdef bytes write_gathered(self, Message message, size_t borrow_min):
        cdef facts_t facts
        cdef gather_plan_t plan
        cdef uint8_t* framing
        cdef iovec* segments
        cdef PyObject** owners
        cdef int i
        message_hold(message)
        message_facts(message, self.profile, &facts)
        message_gather_plan(message, self.profile, borrow_min, &plan)
        framing = <uint8_t*>calloc(plan.framing_bytes, 1)
        segments = <iovec*>calloc(plan.segments, sizeof(iovec))
        owners = <PyObject**>calloc(plan.owners, sizeof(PyObject*))
        message_gather(message, self.profile, borrow_min, framing, segments, owners)
        message_let_go(message)
        try:
            return self.frame(segments, plan.segments, &facts, borrow_min)
        finally:
            for i in range(plan.owners):
                Py_DECREF(<object>owners[i])
            free(framing)
            free(segments)
            free(owners)

    def write_segments(self, list pieces not None):
        """Return the frame of a message that comes encoded, in these pieces of bytes."""
        cdef iovec* segments = <iovec*>calloc(len(pieces), sizeof(iovec))
        cdef bytes joined = b"".join(pieces)
        cdef facts_t facts
        cdef iovec whole
        cdef int i
        whole.iov_base = PyBytes_AS_STRING(joined)
        whole.iov_len = <size_t>len(joined)
        try:
            read_facts(&whole, &facts)
            for i in range(<int>len(pieces)):
                segments[i].iov_base = PyBytes_AS_STRING(<bytes?>pieces[i])
                segments[i].iov_len = <size_t>len(<bytes>pieces[i])
            return self.frame(segments, <int>len(pieces), &facts, 0)
        finally:
            free(segments)

    cdef bytes frame(
            self, const iovec* message, int n, const facts_t* facts, size_t borrow_min):
        cdef frame_t frame
        cdef bytes written
        cdef bint is_whole
        if not frame_of(&self.c, message, n, facts, &frame):
            raise MarshalError("message: above what a frame may have")
        if borrow_min > 0:
            return self.gather(&frame, borrow_min)
        written = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>frame.size)
        is_whole = frame_write(&self.c, &frame, <uint8_t*>PyBytes_AS_STRING(written))
        assert is_whole
        return written

    cdef bytes gather(self, const frame_t* frame, size_t borrow_min):
        cdef frame_plan_t plan
        cdef uint8_t* copied
        cdef iovec* segments
        cdef bint is_whole
        cdef int i
        frame_plan(&self.c, frame, borrow_min, &plan)
        copied = <uint8_t*>calloc(plan.copied, 1)
        segments = <iovec*>calloc(plan.n_segments, sizeof(iovec))
        try:
            is_whole = frame_gather(&self.c, frame, &plan, copied, segments)
            assert is_whole
            written = b"".join([
                PyBytes_FromStringAndSize(<char*>segments[i].iov_base, segments[i].iov_len)
                for i in range(plan.n_segments)
            ])
            assert <size_t>len(written) == frame.size
            return written
        finally:
            free(copied)
            free(segments)


def _write_changed(FrameWriter writer not None, bytes message not None, bytes after not None,
                   size_t borrow_min):
    """Write a message that becomes ``after``, of the same length, once its frame is planned.

    For a test: whether the frame was written, in one piece and in segments. The memory is exactly
    what was planned, so that a sanitizer sees one byte more.
    """
    cdef facts_t facts
    cdef frame_t frame
    cdef frame_plan_t plan
    cdef frames_t again = writer.c
    cdef iovec whole
    cdef uint8_t* own = <uint8_t*>malloc(len(message))
    cdef uint8_t* out = NULL
    cdef iovec* segments = NULL
    try:
        memcpy(own, PyBytes_AS_STRING(message), len(message))
        whole.iov_base = own
        whole.iov_len = len(message)
        read_facts(&whole, &facts)
        frame_of(&writer.c, &whole, 1, &facts, &frame)
        frame_plan(&writer.c, &frame, borrow_min, &plan)
        memcpy(own, PyBytes_AS_STRING(after), len(after))
        out = <uint8_t*>malloc(frame.size)
        is_written = bool(frame_write(&writer.c, &frame, out))
        free(out)
        out = <uint8_t*>malloc(plan.copied)
        segments = <iovec*>malloc(plan.n_segments * sizeof(iovec))
        return is_written, bool(frame_gather(&again, &frame, &plan, out, segments))
    finally:
        free(own)
        free(out)
        free(segments)
