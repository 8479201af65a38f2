"""Messages of raftpb as Python sees them, and their encoding: thin classes over ``_raftpb``.

Everything a field may hold is checked when it is assigned, so encoding cannot fail. Each may be
assigned to in one thread while others read, or encode, what it is a field of: they see the one
value or the other.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_Check,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_Check
from cpython.memoryview cimport PyMemoryView_Check
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport SIZE_MAX, int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from posix.uio cimport iovec
from posix.unistd cimport usleep

cdef extern from "Python.h":
    int PyObject_GC_IsTracked(object)
    void PyObject_GC_Track(void*)
    void PyObject_GC_UnTrack(void*)
    unsigned long long unsigned_of "PyLong_AsUnsignedLongLong"(object) noexcept

from pipeline._system cimport (
    add_int, count_get, count_set, get_int, load_int, note_int, store_int,
)
from pipeline.wire._guard cimport (
    GUARD_IS_NEEDED, guard_change, guard_change_end, guard_read, guard_read_end, guard_t,
)
from pipeline.wire._raftpb cimport (
    WIRE_EMPTY_SNAPSHOT_SIZE,
    WIRE_END_GROUP,
    WIRE_FIELD_NUMBER,
    WIRE_FRAME_KIND,
    WIRE_FRAME_LIMIT,
    WIRE_GROUP_DEPTH,
    WIRE_MAX_BYTES,
    WIRE_MAX_ENTRIES,
    WIRE_MAX_GROUP_DEPTH,
    WIRE_MAX_IDS,
    WIRE_NEGATIVE_LENGTH,
    WIRE_NO_MEMORY,
    WIRE_OK,
    WIRE_OVERRUN,
    WIRE_PROFILE_35,
    WIRE_PROFILE_36,
    WIRE_PROFILE_37,
    WIRE_TOO_MANY_ENTRIES,
    WIRE_TOO_MANY_IDS,
    WIRE_TRUNCATED,
    WIRE_VARINT_TOO_LONG,
    WIRE_WIRE_TYPE,
    wire_conf_state_free,
    wire_conf_state_size,
    wire_decode,
    wire_decoded_t,
    wire_entry_size,
    wire_field_size,
    wire_frame_size,
    wire_has_ids,
    wire_head_size,
    wire_ids_free,
    wire_ids_reserve,
    wire_ids_t,
    wire_next_entry,
    wire_put_empty_snapshot,
    wire_put_entry,
    wire_put_field,
    wire_put_frame,
    wire_put_head,
    wire_put_length,
    wire_put_metadata,
    wire_put_reject,
    wire_read_ids,
    wire_reject_size,
    wire_snapshot_measure,
    wire_snapshot_sizes_t,
    wire_snapshot_t,
    wire_span_size,
)
from pipeline.wire._types cimport TYPE_APP

import operator
from typing import NamedTuple

from pipeline.errors import MarshalError, UnmarshalError, UsageError
from pipeline.logs import show
from pipeline.types import EntryType, MessageType

__all__ = [
    "ConfState", "Decoded", "EncodedMessage", "Entry", "Message", "Snapshot", "SnapshotMetadata",
    "byte_view", "decode",
]

# Position is the profile's number in C. config.PROFILES names them for settings.
cdef tuple PROFILE_NAMES = ("3.5", "3.6", "3.7")
cdef object DEFAULT_PROFILE = PROFILE_NAMES[WIRE_PROFILE_35]

# Enum members by number, to find one without calling the enum class.
cdef tuple MESSAGE_TYPES = tuple(MessageType)
cdef tuple ENTRY_TYPES = tuple(EntryType)
assert all(member == number for number, member in enumerate(MESSAGE_TYPES))
assert all(member == number for number, member in enumerate(ENTRY_TYPES))

# By wire_scope: what the dotted name starts with, and the fields by number.
cdef tuple FIELD_NAMES = (
    ("Message", ("type", "to", "from_", "term", "log_term", "index", "entries", "commit",
                 "snapshot", "reject", "reject_hint", "context", "vote", "responses")),
    ("Message.entries", ("type", "term", "index", "data")),
    ("Message.snapshot", ("data", "metadata")),
    ("Message.snapshot.metadata", ("conf_state", "index", "term")),
    ("Message.snapshot.metadata.conf_state",
     ("voters", "learners", "voters_outgoing", "learners_next", "auto_leave")),
)

cdef dict REASONS = {
    WIRE_TRUNCATED: "the input ends inside a value",
    WIRE_VARINT_TOO_LONG: "a varint of more than 64 bits",
    WIRE_FIELD_NUMBER: "a field number outside 1..2**29-1",
    WIRE_WIRE_TYPE: "a wire type that does not exist",
    WIRE_NEGATIVE_LENGTH: "a negative length",
    WIRE_OVERRUN: "a length past the end",
    WIRE_END_GROUP: "an end-group tag that closes no open group",
    WIRE_GROUP_DEPTH: f"more than {WIRE_MAX_GROUP_DEPTH} nested groups",
    WIRE_TOO_MANY_ENTRIES: f"more than {WIRE_MAX_ENTRIES} entries",
    WIRE_TOO_MANY_IDS: f"more than {WIRE_MAX_IDS} ids",
    WIRE_FRAME_KIND: "a kind of frame that does not exist",
    WIRE_FRAME_LIMIT: "a frame above the limit",
}

# repr shows this many bytes of a payload, and this many entries and ids.
cdef enum:
    REPR_BYTES = 32
    REPR_ITEMS = 8


cdef int profile_index(object profile) except -1:
    if profile is DEFAULT_PROFILE or profile == "3.5":
        return WIRE_PROFILE_35
    if profile == "3.6":
        return WIRE_PROFILE_36
    if profile == "3.7":
        return WIRE_PROFILE_37
    raise UsageError(f"profile: {show(profile)} is not one of {', '.join(PROFILE_NAMES)}")


# Checks. Each takes the field's dotted name for the error.

cdef object as_int(object value, str field, str rule):
    # True is an int in Python, but never an ID or a term.
    if isinstance(value, bool):
        raise MarshalError(f"{field}: {show(value)} is not {rule}")
    try:
        return operator.index(value)
    except Exception:       # also whatever an object's own __index__ raises
        raise MarshalError(f"{field}: {show(value)} is not {rule}") from None


cdef uint64_t as_uint64(object value, str field) except? 0xFFFFFFFFFFFFFFFF:
    if type(value) is not int:
        value = as_int(value, field, "an int in 0..2**64-1")
    cdef uint64_t number = unsigned_of(value)
    if number == <uint64_t>-1 and PyErr_Occurred() is not NULL:
        PyErr_Clear()
        raise MarshalError(f"{field}: {show(value)} is not in 0..2**64-1")
    return number


cdef int32_t as_int32(object value, str field) except? -1:
    # Enum members are the usual value and ints already.
    if not PyLong_Check(value) or isinstance(value, bool):
        value = as_int(value, field, "an int in -2**31..2**31-1")
    try:
        return <int32_t>value
    except OverflowError:
        raise MarshalError(f"{field}: {show(value)} is not in -2**31..2**31-1") from None


cdef bint as_bool(object value, str field) except -1:
    if value is True:
        return True
    if value is False:
        return False
    raise MarshalError(f"{field}: {show(value)} is not True or False")


cdef tuple as_tuple(object value, str field, str what, Py_ssize_t limit):
    if type(value) is not tuple:
        try:
            value = tuple(value)
        except TypeError:
            raise MarshalError(f"{field}: {show(value)} is not an iterable of {what}") from None
    if PyTuple_GET_SIZE(value) > limit:
        raise MarshalError(f"{field}: {PyTuple_GET_SIZE(value)} items, more than {limit}")
    return value


# Payloads: bytes are kept as they are, any other buffer is held through a HeldBuffer.

cdef enum:
    # A received payload of this size is worth a view: copying 64 KiB costs several microseconds,
    # making the objects of a view less than one.
    VIEW_MIN = 64 * 1024
    # From here on a message is checked without the GIL, which takes longer than to take it again.
    NOGIL_MIN = 64 * 1024
    # After so many entries have been made of a message, which takes a millisecond, the GIL is let
    # go of for so long: whoever waits for it is awake by then.
    ENTRIES_STEP = 4096
    TURN_US = 50


@cython.final
@cython.no_gc_clear     # the memory may be in use until the very end
cdef class HeldBuffer:
    def __getbuffer__(self, Py_buffer* view, int flags):
        if load_int(&self.is_given_back):
            raise BufferError("what is viewed was given back")
        PyBuffer_FillInfo(view, self, <void*>self.data, <Py_ssize_t>self.size, 1, flags)
        add_int(&self.n_views, 1)

    def __releasebuffer__(self, Py_buffer* view):
        if add_int(&self.n_views, -1) == 0 and self.is_lent:
            store_int(&self.is_given_back, True)
            PyBuffer_Release(&self.view)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef HeldBuffer hold_buffer(object value):
    """Hold the buffer of ``value``; TypeError, BufferError or ValueError if it has none."""
    cdef HeldBuffer held = HeldBuffer.__new__(HeldBuffer)
    PyObject_GetBuffer(value, &held.view, PyBUF_SIMPLE)
    held.source = value
    held.data = <const uint8_t*>held.view.buf
    if held.data == NULL:   # an exporter of nothing need not have an address
        held.data = <const uint8_t*><const char*>b""
    held.size = <size_t>held.view.len
    if PyMemoryView_Check(value):
        hold_exporter(held, value.obj)
    return held


def byte_view(value):
    """Return a read-only memoryview of the bytes of any C-contiguous buffer.

    Whatever its items are: ``memoryview.cast`` takes no big-endian numbers, no structures, and
    nothing of which a dimension is 0. ``value`` is held as long as the view is.

    Raises
    ------
    TypeError, BufferError, ValueError
        If ``value`` is not such a buffer, or not any more.
    """
    cdef HeldBuffer held = hold_buffer(value)
    # At once: without a GIL an object is freed when the thread that made it next runs Python.
    held.is_lent = True
    return memoryview(held)


cdef object as_owner(object value, str field, const uint8_t** data, size_t* size):
    """Return what keeps ``value``'s bytes alive and in place, and where they are.

    None, an absent payload, has a NULL address; an empty one has not.
    """
    cdef HeldBuffer held
    if value is None:
        data[0] = NULL
        size[0] = 0
        return None
    if PyBytes_Check(value):
        data[0] = <const uint8_t*>PyBytes_AS_STRING(value)
        size[0] = <size_t>PyBytes_GET_SIZE(value)
        return value
    try:
        held = hold_buffer(value)
    except (TypeError, BufferError, ValueError) as error:
        raise MarshalError(
            f"{field}: {show(value)} is not None, bytes or a C-contiguous buffer: {error}"
        ) from None
    data[0] = held.data
    size[0] = held.size
    return held


cdef int hold_exporter(HeldBuffer held, object exporter) except -1:
    """Hold the buffer that a memoryview shows instead of the memoryview, if it is all there.

    Before 3.12.7 the garbage collector breaks a memoryview that it finds in a cycle although its
    buffer is held, and crashes when the holder lets go of it (python/cpython#77894).
    """
    cdef Py_buffer whole
    if exporter is None:        # of memory that has none
        return 0
    try:
        PyObject_GetBuffer(exporter, &whole, PyBUF_SIMPLE)
    except (TypeError, BufferError, ValueError):    # what it shows is a part that is contiguous
        return 0
    if <const uint8_t*>whole.buf <= held.data \
            and held.data + held.size <= <const uint8_t*>whole.buf + whole.len:
        held.view, whole = whole, held.view
    PyBuffer_Release(&whole)
    return 0


cdef object owner_source(object owner):
    """What the user passed."""
    return (<HeldBuffer>owner).source if type(owner) is HeldBuffer else owner


cdef object owner_bytes(object owner):
    """The payload as something that can be pickled."""
    cdef HeldBuffer held
    if type(owner) is not HeldBuffer:
        return owner
    held = <HeldBuffer>owner
    return PyBytes_FromStringAndSize(<const char*>held.data, <Py_ssize_t>held.size)


cdef bint same_payload(
    const uint8_t* a, size_t a_len, const uint8_t* b, size_t b_len
) noexcept:
    if a == NULL or b == NULL:
        return a == b
    return a_len == b_len and memcmp(a, b, a_len) == 0


# Fields that are numbers.

cdef inline void set_uint64(guard_t* guard, uint64_t* field, uint64_t value) noexcept:
    guard_change(guard)
    count_set(field, value)
    guard_change_end(guard)


cdef inline void set_int(guard_t* guard, int* field, int value) noexcept:
    guard_change(guard)
    note_int(field, value)
    guard_change_end(guard)


# repr. Only what differs from the default is shown; long payloads and lists are cut.

cdef str payload_text(object owner):
    cdef HeldBuffer held
    cdef const char* data
    cdef size_t size
    if type(owner) is HeldBuffer:
        held = <HeldBuffer>owner
        data, size = <const char*>held.data, held.size
    else:
        data, size = PyBytes_AS_STRING(owner), PyBytes_GET_SIZE(owner)
    if size <= REPR_BYTES:
        return repr(<bytes>data[:size])
    return f"<{size} bytes {<bytes>data[:REPR_BYTES]!r}...>"


cdef str items_text(tuple items):
    cdef Py_ssize_t size = PyTuple_GET_SIZE(items)
    if size <= REPR_ITEMS:
        return repr(items)
    return f"<{size} items {items[:REPR_ITEMS]!r}...>"


cdef str enum_text(object member):
    # str() of an IntEnum is its number.
    return f"{type(member).__name__}.{member.name}" if type(member) is not int else repr(member)


def _rebuild(cls, fields):
    """Make the object that pickle and copy took apart."""
    return cls(**fields)


# ConfState. The lists are C arrays, so that encoding and decoding them needs no Python object.

cdef int set_ids(guard_t* guard, wire_ids_t* ids, object value, str field) except -1:
    cdef tuple items = as_tuple(value, field, "ints", WIRE_MAX_IDS)
    cdef wire_ids_t fresh, old
    cdef size_t i
    memset(&fresh, 0, sizeof(fresh))
    if not wire_ids_reserve(&fresh, len(items)):
        raise MemoryError
    try:
        for i in range(<size_t>len(items)):
            fresh.ids[i] = as_uint64(items[i], field)
    except BaseException:
        wire_ids_free(&fresh)
        raise
    fresh.len = len(items)
    guard_change(guard)
    old = ids[0]
    ids[0] = fresh
    guard_change_end(guard)
    wire_ids_free(&old)
    return 0


cdef tuple ids_tuple(guard_t* guard, const wire_ids_t* ids):
    guard_read(guard)
    try:
        return tuple([ids.ids[i] for i in range(ids.len)])
    finally:
        guard_read_end(guard)


cdef bint same_ids(const wire_ids_t* a, const wire_ids_t* b) noexcept:
    return a.len == b.len and (a.len == 0 or memcmp(a.ids, b.ids, a.len * sizeof(uint64_t)) == 0)


@cython.final
cdef class ConfState:
    """ConfState(*, voters=(), learners=(), voters_outgoing=(), learners_next=(), \
    auto_leave=False)\n--\n
    The members of a cluster: raftpb ``ConfState``.

    Parameters
    ----------
    voters, learners, voters_outgoing, learners_next : iterable of int, optional
        Member IDs, 0..2**64-1, at most 65,536 in each; kept in order, read back as tuples.
    auto_leave : bool, optional
        Whether a joint configuration is left without being asked.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """

    def __init__(self, *, voters=(), learners=(), voters_outgoing=(), learners_next=(),
                 auto_leave=False):
        """Take the fields by keyword; see the class."""
        self.voters = voters
        self.learners = learners
        self.voters_outgoing = voters_outgoing
        self.learners_next = learners_next
        self.auto_leave = auto_leave

    def __dealloc__(self):
        wire_conf_state_free(&self.c)

    @property
    def voters(self):
        """tuple of int: members that vote."""
        return ids_tuple(&self.guard, &self.c.voters)

    @voters.setter
    def voters(self, value):
        set_ids(&self.guard, &self.c.voters, value, "ConfState.voters")

    @property
    def learners(self):
        """tuple of int: members that only receive."""
        return ids_tuple(&self.guard, &self.c.learners)

    @learners.setter
    def learners(self, value):
        set_ids(&self.guard, &self.c.learners, value, "ConfState.learners")

    @property
    def voters_outgoing(self):
        """tuple of int: voters of the configuration that is being left."""
        return ids_tuple(&self.guard, &self.c.voters_outgoing)

    @voters_outgoing.setter
    def voters_outgoing(self, value):
        set_ids(&self.guard, &self.c.voters_outgoing, value, "ConfState.voters_outgoing")

    @property
    def learners_next(self):
        """tuple of int: voters that become learners when the joint configuration is left."""
        return ids_tuple(&self.guard, &self.c.learners_next)

    @learners_next.setter
    def learners_next(self, value):
        set_ids(&self.guard, &self.c.learners_next, value, "ConfState.learners_next")

    @property
    def auto_leave(self):
        """bool: whether the joint configuration is left without being asked."""
        return bool(get_int(&self.c.auto_leave))

    @auto_leave.setter
    def auto_leave(self, value):
        set_int(&self.guard, &self.c.auto_leave, as_bool(value, "ConfState.auto_leave"))

    def __eq__(self, other):
        cdef ConfState b
        cdef bint is_same
        if type(other) is not ConfState:
            return NotImplemented
        b = <ConfState>other
        guard_read(&self.guard)
        guard_read(&b.guard)
        is_same = same_conf_state(self, b)
        guard_read_end(&b.guard)
        guard_read_end(&self.guard)
        return is_same

    __hash__ = None

    def __repr__(self):
        cdef list parts = [
            f"{name}={items_text(ids)}"
            for name, ids in (
                ("voters", self.voters),
                ("learners", self.learners),
                ("voters_outgoing", self.voters_outgoing),
                ("learners_next", self.learners_next),
            )
            if ids
        ]
        if self.auto_leave:
            parts.append("auto_leave=True")
        return f"ConfState({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (ConfState, {
            "voters": self.voters,
            "learners": self.learners,
            "voters_outgoing": self.voters_outgoing,
            "learners_next": self.learners_next,
            "auto_leave": self.auto_leave,
        })


cdef bint same_conf_state(ConfState a, ConfState b) noexcept:
    return (
        same_ids(&a.c.voters, &b.c.voters)
        and same_ids(&a.c.learners, &b.c.learners)
        and same_ids(&a.c.voters_outgoing, &b.c.voters_outgoing)
        and same_ids(&a.c.learners_next, &b.c.learners_next)
        and a.c.auto_leave == b.c.auto_leave
    )


@cython.final
cdef class SnapshotMetadata:
    """SnapshotMetadata(*, conf_state=None, index=0, term=0)\n--\n
    Where in the log a snapshot stands: raftpb ``SnapshotMetadata``.

    Parameters
    ----------
    conf_state : ConfState, optional
        Kept by reference; a new empty one when left out.
    index, term : int, optional
        Of the last entry the snapshot covers, 0..2**64-1.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """

    def __cinit__(self):
        self._conf_state = ConfState.__new__(ConfState)

    def __init__(self, *, conf_state=None, index=0, term=0):
        """Take the fields by keyword; see the class."""
        if conf_state is not None:
            self.conf_state = conf_state
        self.index = index
        self.term = term

    @property
    def conf_state(self):
        """ConfState: the members at that index."""
        guard_read(&self.guard)
        conf_state = self._conf_state
        guard_read_end(&self.guard)
        return conf_state

    @conf_state.setter
    def conf_state(self, value):
        if type(value) is not ConfState:
            raise MarshalError(f"SnapshotMetadata.conf_state: {show(value)} is not a ConfState")
        guard_change(&self.guard)
        _old = self._conf_state     # dropped when the guard is not held any more
        self._conf_state = <ConfState>value
        guard_change_end(&self.guard)

    @property
    def index(self):
        """int: index of the last entry the snapshot covers."""
        return count_get(&self._index)

    @index.setter
    def index(self, value):
        set_uint64(&self.guard, &self._index, as_uint64(value, "SnapshotMetadata.index"))

    @property
    def term(self):
        """int: term of the last entry the snapshot covers."""
        return count_get(&self._term)

    @term.setter
    def term(self, value):
        set_uint64(&self.guard, &self._term, as_uint64(value, "SnapshotMetadata.term"))

    def __eq__(self, other):
        cdef SnapshotMetadata b
        cdef bint is_same
        if type(other) is not SnapshotMetadata:
            return NotImplemented
        b = <SnapshotMetadata>other
        metadata_hold(self)
        metadata_hold(b)
        is_same = same_metadata(self, b)
        metadata_let_go(b)
        metadata_let_go(self)
        return is_same

    __hash__ = None

    def __repr__(self):
        cdef list parts = []
        cdef bint has_conf_state
        metadata_hold(self)
        has_conf_state = wire_conf_state_size(&self._conf_state.c, True) > 0
        metadata_let_go(self)
        if has_conf_state:
            parts.append(f"conf_state={self.conf_state!r}")
        if self.index:
            parts.append(f"index={self.index}")
        if self.term:
            parts.append(f"term={self.term}")
        return f"SnapshotMetadata({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (SnapshotMetadata, {
            "conf_state": self.conf_state, "index": self.index, "term": self.term,
        })


cdef bint same_metadata(SnapshotMetadata a, SnapshotMetadata b) noexcept:
    return (
        a._index == b._index
        and a._term == b._term
        and same_conf_state(a._conf_state, b._conf_state)
    )


@cython.final
@cython.no_gc_clear     # payload points into owner
cdef class Snapshot:
    """Snapshot(*, data=None, metadata=None)\n--\n
    A state machine's snapshot: raftpb ``Snapshot``.

    Parameters
    ----------
    data : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.
    metadata : SnapshotMetadata, optional
        Kept by reference; a new empty one when left out.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type.
    """

    def __cinit__(self):
        self._metadata = SnapshotMetadata.__new__(SnapshotMetadata)

    def __init__(self, *, data=None, metadata=None):
        """Take the fields by keyword; see the class."""
        self.data = data
        if metadata is not None:
            self.metadata = metadata

    @property
    def data(self):
        """bytes-like or None: the object that was passed, or bytes when received."""
        return owner_source(self.payload_owner())

    @data.setter
    def data(self, value):
        cdef const uint8_t* payload
        cdef size_t size
        cdef object owner = as_owner(value, "Snapshot.data", &payload, &size)
        guard_change(&self.guard)
        _old = self.owner       # dropped when the guard is not held any more
        self.payload = payload
        self.payload_len = size
        self.owner = owner
        guard_change_end(&self.guard)

    cdef object payload_owner(self):
        guard_read(&self.guard)
        owner = self.owner
        guard_read_end(&self.guard)
        return owner

    @property
    def metadata(self):
        """SnapshotMetadata: where in the log the snapshot stands."""
        guard_read(&self.guard)
        metadata = self._metadata
        guard_read_end(&self.guard)
        return metadata

    @metadata.setter
    def metadata(self, value):
        if type(value) is not SnapshotMetadata:
            raise MarshalError(f"Snapshot.metadata: {show(value)} is not a SnapshotMetadata")
        guard_change(&self.guard)
        _old = self._metadata
        self._metadata = <SnapshotMetadata>value
        guard_change_end(&self.guard)

    def __eq__(self, other):
        cdef Snapshot b
        cdef bint is_same
        if type(other) is not Snapshot:
            return NotImplemented
        b = <Snapshot>other
        snapshot_hold(self)
        snapshot_hold(b)
        is_same = same_snapshot(self, b)
        snapshot_let_go(b)
        snapshot_let_go(self)
        return is_same

    __hash__ = None

    def __repr__(self):
        cdef list parts = []
        owner = self.payload_owner()
        if owner is not None:
            parts.append(f"data={payload_text(owner)}")
        parts.append(f"metadata={self.metadata!r}")
        return f"Snapshot({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (Snapshot, {
            "data": owner_bytes(self.payload_owner()), "metadata": self.metadata,
        })


cdef wire_snapshot_t snapshot_view(Snapshot snapshot) noexcept:
    """The snapshot as the encoder takes it; borrowed until the snapshot is changed."""
    cdef wire_snapshot_t view
    cdef SnapshotMetadata metadata = snapshot._metadata
    view.data = snapshot.payload
    view.data_len = snapshot.payload_len
    view.index = metadata._index
    view.term = metadata._term
    view.conf_state = metadata._conf_state.c
    return view


cdef bint is_empty_snapshot(Snapshot snapshot) noexcept:
    """Tell whether it says no more than None does."""
    cdef wire_snapshot_t view
    cdef wire_snapshot_sizes_t sizes
    if snapshot is None:
        return True
    view = snapshot_view(snapshot)
    wire_snapshot_measure(&view, True, &sizes)
    return sizes.snapshot == 0


cdef bint same_snapshot(Snapshot a, Snapshot b) noexcept:
    if a is None or b is None:
        return is_empty_snapshot(a) and is_empty_snapshot(b)
    return (
        same_payload(a.payload, a.payload_len, b.payload, b.payload_len)
        and same_metadata(a._metadata, b._metadata)
    )


cdef int entry_set_data(Entry entry, object value) except -1:
    cdef const uint8_t* payload
    cdef size_t size
    cdef object owner = as_owner(value, "Entry.data", &payload, &size)
    guard_change(&entry.guard)
    _old = entry.owner      # dropped when the guard is not held any more
    entry.c.data = payload
    entry.c.data_len = size
    entry.owner = owner
    if not PyObject_GC_IsTracked(entry):    # see entries_from_decoded
        PyObject_GC_Track(<void*>entry)
    guard_change_end(&entry.guard)
    return 0


cdef object entry_owner(Entry entry):
    guard_read(&entry.guard)
    owner = entry.owner
    guard_read_end(&entry.guard)
    return owner


@cython.final
@cython.freelist(256)
@cython.no_gc_clear     # c.data points into owner
cdef class Entry:
    """Entry(*, term=0, index=0, type=EntryType.NORMAL, data=None)\n--\n
    One entry of the log: raftpb ``Entry``.

    Parameters
    ----------
    term, index : int, optional
        0..2**64-1.
    type : EntryType or int, optional
        An int of 32 bits; unknown numbers are carried as they are.
    data : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """

    def __init__(self, *, term=0, index=0, type=EntryType.NORMAL, data=None):
        """Take the fields by keyword; see the class."""
        set_uint64(&self.guard, &self.c.term, as_uint64(term, "Entry.term"))
        set_uint64(&self.guard, &self.c.index, as_uint64(index, "Entry.index"))
        set_int(&self.guard, <int*>&self.c.type, as_int32(type, "Entry.type"))
        entry_set_data(self, data)

    @property
    def type(self):
        """EntryType, or int where the number is unknown."""
        return enum_member(ENTRY_TYPES, get_int(<int*>&self.c.type))

    @type.setter
    def type(self, value):
        set_int(&self.guard, <int*>&self.c.type, as_int32(value, "Entry.type"))

    @property
    def term(self):
        """int: term in which the entry was proposed."""
        return count_get(&self.c.term)

    @term.setter
    def term(self, value):
        set_uint64(&self.guard, &self.c.term, as_uint64(value, "Entry.term"))

    @property
    def index(self):
        """int: position in the log."""
        return count_get(&self.c.index)

    @index.setter
    def index(self, value):
        set_uint64(&self.guard, &self.c.index, as_uint64(value, "Entry.index"))

    @property
    def data(self):
        """bytes-like or None: the object that was passed, or bytes when received."""
        return owner_source(entry_owner(self))

    @data.setter
    def data(self, value):
        entry_set_data(self, value)

    def __eq__(self, other):
        cdef Entry b
        cdef bint is_same
        if type(other) is not Entry:
            return NotImplemented
        b = <Entry>other
        guard_read(&self.guard)
        guard_read(&b.guard)
        is_same = same_entry(self, b)
        guard_read_end(&b.guard)
        guard_read_end(&self.guard)
        return is_same

    __hash__ = None

    def __repr__(self):
        cdef list parts = []
        owner = entry_owner(self)
        if self.term:
            parts.append(f"term={self.term}")
        if self.index:
            parts.append(f"index={self.index}")
        if self.type:
            parts.append(f"type={enum_text(self.type)}")
        if owner is not None:
            parts.append(f"data={payload_text(owner)}")
        return f"Entry({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (Entry, {
            "term": self.term, "index": self.index, "type": self.type,
            "data": owner_bytes(entry_owner(self)),
        })


cdef object enum_member(tuple members, int32_t number):
    if 0 <= number < PyTuple_GET_SIZE(members):
        return members[number]
    return number


cdef bint same_entry(Entry a, Entry b) noexcept:
    return (
        a.c.type == b.c.type
        and a.c.term == b.c.term
        and a.c.index == b.c.index
        and same_payload(a.c.data, a.c.data_len, b.c.data, b.c.data_len)
    )


cdef bint same_entries(tuple a, tuple b) noexcept:
    cdef Py_ssize_t i
    if PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b):
        return False
    for i in range(PyTuple_GET_SIZE(a)):
        if not same_entry(<Entry>PyTuple_GET_ITEM(a, i), <Entry>PyTuple_GET_ITEM(b, i)):
            return False
    return True


cdef tuple as_entries(object value):
    cdef tuple entries = as_tuple(value, "Message.entries", "Entry", WIRE_MAX_ENTRIES)
    for entry in entries:
        if type(entry) is not Entry:
            raise MarshalError(f"Message.entries: {show(entry)} is not an Entry")
    return entries


cdef Snapshot as_snapshot(object value):
    if value is not None and type(value) is not Snapshot:
        raise MarshalError(f"Message.snapshot: {show(value)} is not a Snapshot or None")
    return <Snapshot>value


cdef int message_set_context(Message message, object value) except -1:
    cdef const uint8_t* payload
    cdef size_t size
    cdef object owner = as_owner(value, "Message.context", &payload, &size)
    guard_change(&message.guard)
    _old = message.owner        # dropped when the guard is not held any more
    message.c.context = payload
    message.c.context_len = size
    message.owner = owner
    guard_change_end(&message.guard)
    return 0


cdef object message_owner(Message message):
    guard_read(&message.guard)
    owner = message.owner
    guard_read_end(&message.guard)
    return owner


cdef int message_set_entries(Message message, object value) except -1:
    cdef tuple entries = as_entries(value)
    guard_change(&message.guard)
    _old = message._entries
    message._entries = entries
    guard_change_end(&message.guard)
    return 0


cdef int message_set_snapshot(Message message, object value) except -1:
    cdef Snapshot snapshot = as_snapshot(value)
    guard_change(&message.guard)
    _old = message._snapshot
    message._snapshot = snapshot
    guard_change_end(&message.guard)
    return 0


@cython.final
@cython.freelist(64)
@cython.no_gc_clear     # c.context points into owner
cdef class Message:
    """Message(*, type, to=0, from_=0, term=0, log_term=0, index=0, entries=(), \
    commit=0, snapshot=None, reject=False, reject_hint=0, context=None)\n--\n
    A message between members: raftpb ``Message``.

    Parameters
    ----------
    type : MessageType or int
        An int of 32 bits; unknown numbers are carried as they are.
    to, from_ : int, optional
        Member IDs, 0..2**64-1.
    term, log_term, index, commit, reject_hint : int, optional
        0..2**64-1.
    entries : iterable of Entry, optional
        Turned into a tuple; at most 131,072.
    snapshot : Snapshot or None, optional
        Kept by reference. A wholly empty one says the same as None: equal, and equal bytes.
    reject : bool, optional
        Whether the sender refuses.
    context : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.

    Notes
    -----
    Thread-safe, field by field: whoever reads, sends or encodes a message that another thread
    assigns to sees the one value or the other of each field. The same holds for what is in it.
    Source: raft ``raftpb/raft.proto``. Its fields ``vote`` and ``responses`` never leave a node
    and are not here; the decoder skips them.
    """

    def __cinit__(self):
        self._entries = ()

    def __init__(self, *, type, to=0, from_=0, term=0, log_term=0, index=0, entries=(), commit=0,
                 snapshot=None, reject=False, reject_hint=0, context=None):
        """Take the fields by keyword; see the class."""
        cdef wire_message_t c
        c.type = as_int32(type, "Message.type")
        c.to = as_uint64(to, "Message.to")
        c.from_ = as_uint64(from_, "Message.from_")
        c.term = as_uint64(term, "Message.term")
        c.log_term = as_uint64(log_term, "Message.log_term")
        c.index = as_uint64(index, "Message.index")
        given_entries = as_entries(entries)
        c.commit = as_uint64(commit, "Message.commit")
        given_snapshot = as_snapshot(snapshot)
        c.reject = as_bool(reject, "Message.reject")
        c.reject_hint = as_uint64(reject_hint, "Message.reject_hint")
        owner = as_owner(context, "Message.context", &c.context, &c.context_len)
        guard_change(&self.guard)
        if GUARD_IS_NEEDED:     # dropped when the guard is not held any more
            _old_owner, _old_entries, _old_snapshot = self.owner, self._entries, self._snapshot
        self.c = c
        self.owner = owner
        self._entries = given_entries
        self._snapshot = given_snapshot
        guard_change_end(&self.guard)

    @property
    def type(self):
        """MessageType, or int where the number is unknown."""
        return enum_member(MESSAGE_TYPES, get_int(<int*>&self.c.type))

    @type.setter
    def type(self, value):
        set_int(&self.guard, <int*>&self.c.type, as_int32(value, "Message.type"))

    @property
    def to(self):
        """int: ID of the member the message is for."""
        return count_get(&self.c.to)

    @to.setter
    def to(self, value):
        set_uint64(&self.guard, &self.c.to, as_uint64(value, "Message.to"))

    @property
    def from_(self):
        """int: ID of the member that sends it."""
        return count_get(&self.c.from_)

    @from_.setter
    def from_(self, value):
        set_uint64(&self.guard, &self.c.from_, as_uint64(value, "Message.from_"))

    @property
    def term(self):
        """int: the sender's term; 0 on MsgProp and MsgReadIndex."""
        return count_get(&self.c.term)

    @term.setter
    def term(self, value):
        set_uint64(&self.guard, &self.c.term, as_uint64(value, "Message.term"))

    @property
    def log_term(self):
        """int: term of the entry at ``index``."""
        return count_get(&self.c.log_term)

    @log_term.setter
    def log_term(self, value):
        set_uint64(&self.guard, &self.c.log_term, as_uint64(value, "Message.log_term"))

    @property
    def index(self):
        """int: index of the entry before ``entries``, or the one an answer is about."""
        return count_get(&self.c.index)

    @index.setter
    def index(self, value):
        set_uint64(&self.guard, &self.c.index, as_uint64(value, "Message.index"))

    @property
    def entries(self):
        """tuple of Entry."""
        guard_read(&self.guard)
        entries = self._entries
        guard_read_end(&self.guard)
        return entries

    @entries.setter
    def entries(self, value):
        message_set_entries(self, value)

    @property
    def commit(self):
        """int: index up to which the sender has committed."""
        return count_get(&self.c.commit)

    @commit.setter
    def commit(self, value):
        set_uint64(&self.guard, &self.c.commit, as_uint64(value, "Message.commit"))

    @property
    def snapshot(self):
        """Snapshot or None."""
        guard_read(&self.guard)
        snapshot = self._snapshot
        guard_read_end(&self.guard)
        return snapshot

    @snapshot.setter
    def snapshot(self, value):
        message_set_snapshot(self, value)

    @property
    def reject(self):
        """bool: whether the sender refuses."""
        return bool(get_int(&self.c.reject))

    @reject.setter
    def reject(self, value):
        set_int(&self.guard, &self.c.reject, as_bool(value, "Message.reject"))

    @property
    def reject_hint(self):
        """int: where the sender of a refusal suggests to go on."""
        return count_get(&self.c.reject_hint)

    @reject_hint.setter
    def reject_hint(self, value):
        set_uint64(&self.guard, &self.c.reject_hint, as_uint64(value, "Message.reject_hint"))

    @property
    def context(self):
        """bytes-like or None: the object that was passed, or bytes when received."""
        return owner_source(message_owner(self))

    @context.setter
    def context(self, value):
        message_set_context(self, value)

    def marshal(self, profile="3.5"):
        """Encode the message.

        Parameters
        ----------
        profile : str, optional
            Whose encoder to repeat byte for byte: ``"3.5"`` (etcd 3.4 and 3.5), ``"3.6"`` or
            ``"3.7"``. Every etcd reads all three.

        Returns
        -------
        bytes
            Exactly ``byte_size(profile)`` of them.

        Raises
        ------
        UsageError
            If the profile is none of the three.
        """
        return message_encode(self, profile_index(profile))

    def byte_size(self, profile="3.5"):
        """Return the length of the encoded message in bytes, without encoding it.

        Parameters
        ----------
        profile : str, optional
            As for ``marshal``.

        Returns
        -------
        int
            What etcd's metrics count: no framing of any transport is in it.

        Raises
        ------
        UsageError
            If the profile is none of the three.
        """
        cdef int number = profile_index(profile)
        cdef Py_ssize_t size
        message_hold(self)
        size = message_size(self, number)
        message_let_go(self)
        return size

    @staticmethod
    def unmarshal(data):
        """Decode a message that any etcd since 3.4 has encoded.

        Parameters
        ----------
        data : bytes-like
            The whole message and nothing else. Payloads are copied out of it.

        Returns
        -------
        Message
            Its payloads are bytes. A wholly empty snapshot, which etcd 3.4 and 3.5 attach to
            every message, is None.

        Raises
        ------
        UnmarshalError
            If the data is not a message; says which field, at which offset, and why.
        UsageError
            If ``data`` is not a C-contiguous buffer.
        """
        cdef wire_decoded_t decoded
        _held = decode_buffer(data, &decoded)
        return message_from_decoded(&decoded, None)

    def __eq__(self, other):
        cdef Message b
        cdef bint is_same
        if type(other) is not Message:
            return NotImplemented
        b = <Message>other
        message_hold(self)
        message_hold(b)
        is_same = same_message(self, b)
        message_let_go(b)
        message_let_go(self)
        return is_same

    __hash__ = None

    def __repr__(self):
        cdef list parts = [f"type={enum_text(self.type)}"]
        for name in ("to", "from_", "term", "log_term", "index"):
            value = getattr(self, name)
            if value:
                parts.append(f"{name}={value}")
        entries, snapshot, owner = self.entries, self.snapshot, message_owner(self)
        if entries:
            parts.append(f"entries={items_text(entries)}")
        if self.commit:
            parts.append(f"commit={self.commit}")
        if snapshot is not None:
            parts.append(f"snapshot={snapshot!r}")
        if self.reject:
            parts.append("reject=True")
        if self.reject_hint:
            parts.append(f"reject_hint={self.reject_hint}")
        if owner is not None:
            parts.append(f"context={payload_text(owner)}")
        return f"Message({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (Message, {
            "type": self.type, "to": self.to, "from_": self.from_, "term": self.term,
            "log_term": self.log_term, "index": self.index, "entries": self.entries,
            "commit": self.commit, "snapshot": self.snapshot, "reject": self.reject,
            "reject_hint": self.reject_hint, "context": owner_bytes(message_owner(self)),
        })


cdef bint same_message(Message a, Message b) noexcept:
    return (
        a.c.type == b.c.type
        and a.c.to == b.c.to
        and a.c.from_ == b.c.from_
        and a.c.term == b.c.term
        and a.c.log_term == b.c.log_term
        and a.c.index == b.c.index
        and a.c.commit == b.c.commit
        and a.c.reject == b.c.reject
        and a.c.reject_hint == b.c.reject_hint
        and same_payload(a.c.context, a.c.context_len, b.c.context, b.c.context_len)
        and same_entries(a._entries, b._entries)
        and same_snapshot(a._snapshot, b._snapshot)
    )


@cython.final
@cython.freelist(64)
@cython.no_gc_clear     # payload points into owner
cdef class EncodedMessage:
    """EncodedMessage(data, *, type, to, from_=0, term=0)\n--\n
    A message as its bytes: sent as it is, never looked into, and received whole.

    One that was received can be given to ``send`` as it is, and goes out byte for byte.

    Parameters
    ----------
    data : bytes-like
        The raftpb encoding, at most 2**31 - 1 bytes. Up to 16 KiB are copied at ``send``; more
        is borrowed until the message has its outcome, so do not change a mutable buffer.
    type : MessageType or int
        An int of 32 bits, as of a ``Message``; decides what is reported and counted.
    to : int
        The member it is for; unsigned 64-bit.
    from_, term : int, optional
        The member that sends it and its term, unsigned 64-bit. To send it they are not needed.

    Raises
    ------
    MarshalError
        If a field is out of range or ``data`` is no C-contiguous buffer.
    """

    def __cinit__(self):
        self.owner = b""
        self.payload = <const uint8_t*>PyBytes_AS_STRING(self.owner)

    def __init__(self, data, *, type, to, from_=0, term=0):
        """Take the bytes and what is said of them; see the class."""
        cdef const uint8_t* payload
        cdef size_t size
        if data is None:
            raise MarshalError("EncodedMessage.data: None is not a C-contiguous buffer")
        owner = as_owner(data, "EncodedMessage.data", &payload, &size)
        if size > WIRE_MAX_BYTES:
            raise MarshalError(f"EncodedMessage.data: {size} bytes is not in 0..{WIRE_MAX_BYTES}")
        set_int(&self.guard, <int*>&self._type, as_int32(type, "EncodedMessage.type"))
        set_uint64(&self.guard, &self._to, as_uint64(to, "EncodedMessage.to"))
        set_uint64(&self.guard, &self._from, as_uint64(from_, "EncodedMessage.from_"))
        set_uint64(&self.guard, &self._term, as_uint64(term, "EncodedMessage.term"))
        guard_change(&self.guard)
        _old = self.owner       # dropped when the guard is not held any more
        self.payload = payload
        self.size = size
        self.owner = owner
        self.is_plain = False
        guard_change_end(&self.guard)

    cdef object payload_owner(self):
        guard_read(&self.guard)
        owner = self.owner
        guard_read_end(&self.guard)
        return owner

    @property
    def data(self):
        """bytes-like: the object that was passed; when received, bytes or a read-only view."""
        return owner_source(self.payload_owner())

    @property
    def type(self):
        """MessageType, or int where the number is unknown."""
        return enum_member(MESSAGE_TYPES, get_int(<int*>&self._type))

    @property
    def to(self):
        """int: ID of the member the message is for."""
        return count_get(&self._to)

    @property
    def from_(self):
        """int: ID of the member that sends it; 0 when not told."""
        return count_get(&self._from)

    @property
    def term(self):
        """int: the sender's term; 0 when not told."""
        return count_get(&self._term)

    @staticmethod
    def unmarshal(data):
        """Check a message that is encoded and read whose it is and for whom.

        Parameters
        ----------
        data : bytes-like
            The whole message and nothing else. Kept by reference, as by the constructor.

        Returns
        -------
        EncodedMessage
            Of these bytes, with the type, members and term that they say.

        Raises
        ------
        UnmarshalError
            If the data is not a message; says which field, at which offset, and why.
        UsageError
            If ``data`` is not a C-contiguous buffer.
        """
        cdef wire_decoded_t decoded
        owner = decode_buffer(data, &decoded)
        return encoded_of(
            &decoded, owner, decoded.input, <size_t>(decoded.end - decoded.input))

    def __len__(self):
        cdef size_t size
        guard_read(&self.guard)
        size = self.size
        guard_read_end(&self.guard)
        return size

    def __repr__(self):
        cdef list parts = [f"<{len(self)} bytes>", f"type={enum_text(self.type)}", f"to={self.to}"]
        if self.from_:
            parts.append(f"from_={self.from_}")
        if self.term:
            parts.append(f"term={self.term}")
        return f"EncodedMessage({', '.join(parts)})"

    def __reduce__(self):
        return _rebuild, (EncodedMessage, {
            "data": owner_bytes(self.payload_owner()), "type": self.type, "to": self.to,
            "from_": self.from_, "term": self.term,
        })


cdef EncodedMessage encoded_of(
    const wire_decoded_t* decoded, object owner, const uint8_t* payload, size_t size
):
    """Make the EncodedMessage of what was read, whose bytes ``owner`` keeps at ``payload``."""
    cdef EncodedMessage message = EncodedMessage.__new__(EncodedMessage)
    message._type = decoded.message.type
    message._to = decoded.message.to
    message._from = decoded.message.from_
    message._term = decoded.message.term
    message.payload = payload
    message.size = size
    message.owner = owner
    message.is_plain = PyBytes_CheckExact(owner) and not decoded.has_unknown
    return message


# Encoding. One walk over the fields serves both ways of writing: message_write copies every
# payload, message_gather leaves the large ones where they are.

cdef struct sink_t:
    uint8_t* out            # where the next byte of framing goes
    uint8_t* run            # start of the framing that is in no segment yet
    size_t borrow_min       # payloads from this size on are not copied
    iovec* segments
    PyObject** owners


cdef inline void sink_end_run(sink_t* sink) noexcept:
    if sink.out > sink.run:
        sink.segments.iov_base = sink.run
        sink.segments.iov_len = <size_t>(sink.out - sink.run)
        sink.segments += 1
        sink.run = sink.out


cdef inline void sink_payload(
    sink_t* sink, const uint8_t* data, size_t size, object owner
) noexcept:
    if size == 0:
        return
    if size < sink.borrow_min:
        memcpy(sink.out, data, size)
        sink.out += size
        return
    sink_end_run(sink)
    sink.segments.iov_base = <void*>data
    sink.segments.iov_len = size
    sink.segments += 1
    Py_INCREF(owner)
    sink.owners[0] = <PyObject*>owner
    sink.owners += 1


cdef void sink_snapshot(sink_t* sink, Snapshot snapshot, int profile) noexcept:
    cdef wire_snapshot_t view
    cdef wire_snapshot_sizes_t sizes
    cdef bint sparse = profile == WIRE_PROFILE_37
    if is_empty_snapshot(snapshot):
        if profile == WIRE_PROFILE_35:
            sink.out = wire_put_empty_snapshot(sink.out)
        return
    view = snapshot_view(snapshot)
    wire_snapshot_measure(&view, sparse, &sizes)
    sink.out = wire_put_length(sink.out, 0x4A, sizes.snapshot)
    if view.data != NULL:
        sink.out = wire_put_length(sink.out, 0x0A, view.data_len)
        sink_payload(sink, view.data, view.data_len, snapshot.owner)
    sink.out = wire_put_metadata(sink.out, &view, &sizes, sparse)


cdef inline void sink_message(sink_t* sink, Message m, int profile) noexcept:
    cdef bint sparse = profile == WIRE_PROFILE_37
    cdef Entry entry
    cdef Py_ssize_t i
    sink.out = wire_put_head(sink.out, &m.c, sparse)
    for i in range(PyTuple_GET_SIZE(m._entries)):
        entry = <Entry>PyTuple_GET_ITEM(m._entries, i)
        sink.out = wire_put_entry(sink.out, &entry.c, sparse)
        sink_payload(sink, entry.c.data, entry.c.data_len, entry.owner)
    sink.out = wire_put_field(sink.out, 0x40, m.c.commit, sparse)
    sink_snapshot(sink, m._snapshot, profile)
    sink.out = wire_put_reject(sink.out, &m.c, sparse)
    if m.c.context != NULL:
        sink.out = wire_put_length(sink.out, 0x62, m.c.context_len)
        sink_payload(sink, m.c.context, m.c.context_len, m.owner)
    if profile == WIRE_PROFILE_36:
        # Field 13, vote: a node's own, but 3.6 sends it with every message.
        sink.out = wire_put_field(sink.out, 0x68, 0, sparse)


cdef size_t snapshot_size(Snapshot snapshot, int profile) noexcept:
    """Size of field 9 with its tag."""
    cdef wire_snapshot_t view
    cdef wire_snapshot_sizes_t sizes
    if is_empty_snapshot(snapshot):
        return WIRE_EMPTY_SNAPSHOT_SIZE if profile == WIRE_PROFILE_35 else 0
    view = snapshot_view(snapshot)
    wire_snapshot_measure(&view, profile == WIRE_PROFILE_37, &sizes)
    return wire_span_size(sizes.snapshot)


cdef void message_facts(Message m, int profile, facts_t* facts) noexcept:
    cdef bint sparse = profile == WIRE_PROFILE_37
    cdef Entry entry
    cdef Py_ssize_t i
    facts.is_bare = (
        m.c.type == TYPE_APP and not m.c.reject and m.c.reject_hint == 0 and m.c.context is NULL
        and is_empty_snapshot(m._snapshot)
    )
    facts.from_ = m.c.from_
    facts.to = m.c.to
    facts.term = m.c.term
    facts.log_term = m.c.log_term
    facts.index = facts.last_index = m.c.index
    facts.commit = m.c.commit
    facts.entries_at = wire_head_size(&m.c, sparse)
    facts.count = <size_t>PyTuple_GET_SIZE(m._entries)
    facts.entries_bytes = 0
    for i in range(PyTuple_GET_SIZE(m._entries)):
        entry = <Entry>PyTuple_GET_ITEM(m._entries, i)
        facts.entries_bytes += wire_entry_size(&entry.c, sparse)
        facts.last_index = entry.c.index


cdef Py_ssize_t message_size(Message m, int profile) noexcept:
    cdef bint sparse = profile == WIRE_PROFILE_37
    cdef size_t size = wire_head_size(&m.c, sparse)
    cdef Entry entry
    cdef Py_ssize_t i
    for i in range(PyTuple_GET_SIZE(m._entries)):
        entry = <Entry>PyTuple_GET_ITEM(m._entries, i)
        size += wire_span_size(wire_entry_size(&entry.c, sparse))
    size += wire_field_size(m.c.commit, sparse)
    size += snapshot_size(m._snapshot, profile)
    size += wire_reject_size(&m.c, sparse)
    if m.c.context != NULL:
        size += wire_span_size(m.c.context_len)
    if profile == WIRE_PROFILE_36:
        size += wire_field_size(0, sparse)
    return <Py_ssize_t>size


cdef uint8_t* message_write(Message m, int profile, uint8_t* out) noexcept:
    cdef sink_t sink
    sink.out = sink.run = out
    sink.borrow_min = SIZE_MAX
    sink.segments = NULL
    sink.owners = NULL
    sink_message(&sink, m, profile)
    return sink.out


cdef bytes message_encode(Message m, int profile):
    cdef bytes encoded
    cdef uint8_t* end
    cdef Py_ssize_t size
    message_hold(m)
    try:
        size = message_size(m, profile)
        encoded = PyBytes_FromStringAndSize(NULL, size)
        end = message_write(m, profile, <uint8_t*>PyBytes_AS_STRING(encoded))
    finally:
        message_let_go(m)
    assert end == <uint8_t*>PyBytes_AS_STRING(encoded) + size
    return encoded


cdef inline void plan_payload(
    gather_plan_t* plan, size_t size, size_t borrow_min, size_t* borrowed
) noexcept:
    if size and size >= borrow_min:
        # A payload never comes without tag and length before it: two segments.
        plan.segments += 2
        plan.owners += 1
        borrowed[0] += size


cdef bint ends_in_payload(Message m, int profile, size_t borrow_min) noexcept:
    """Tell whether the last byte of the message is one of a payload that is borrowed."""
    cdef Py_ssize_t count = PyTuple_GET_SIZE(m._entries)
    cdef Entry last
    cdef Snapshot snapshot = m._snapshot
    cdef wire_snapshot_t view
    cdef wire_snapshot_sizes_t sizes
    if profile == WIRE_PROFILE_36:
        return False
    if m.c.context != NULL:
        return 0 < m.c.context_len >= borrow_min
    # Only a sparse message can end before field 11.
    if profile != WIRE_PROFILE_37 or wire_reject_size(&m.c, True):
        return False
    if not is_empty_snapshot(snapshot):
        view = snapshot_view(snapshot)
        wire_snapshot_measure(&view, True, &sizes)
        return sizes.metadata == 0 and 0 < view.data_len >= borrow_min
    if count == 0 or m.c.commit:
        return False
    last = <Entry>PyTuple_GET_ITEM(m._entries, count - 1)
    return 0 < last.c.data_len >= borrow_min


cdef void message_gather_plan(
    Message m, int profile, size_t borrow_min, gather_plan_t* plan
) noexcept:
    cdef size_t size = <size_t>message_size(m, profile)
    cdef size_t borrowed = 0
    cdef Entry entry
    cdef Py_ssize_t i
    plan.segments = plan.owners = 0
    for i in range(PyTuple_GET_SIZE(m._entries)):
        entry = <Entry>PyTuple_GET_ITEM(m._entries, i)
        plan_payload(plan, entry.c.data_len, borrow_min, &borrowed)
    if m._snapshot is not None:
        plan_payload(plan, m._snapshot.payload_len, borrow_min, &borrowed)
    plan_payload(plan, m.c.context_len, borrow_min, &borrowed)
    plan.framing_bytes = size - borrowed
    # And the framing after the last payload, or all there is.
    if size and not ends_in_payload(m, profile, borrow_min):
        plan.segments += 1


cdef void message_gather(
    Message m,
    int profile,
    size_t borrow_min,
    uint8_t* framing,
    iovec* segments,
    PyObject** owners,
) noexcept:
    cdef sink_t sink
    sink.out = sink.run = framing
    sink.borrow_min = borrow_min
    sink.segments = segments
    sink.owners = owners
    sink_message(&sink, m, profile)
    sink_end_run(&sink)


def _gather(Message message, profile, size_t borrow_min):
    """Run message_gather for a test: the bytes of each segment, and the owners.

    The memory is exactly what was planned and starts as zeros: a segment or an owner that was
    planned and not made is seen, and a sanitizer sees what was made and not planned.
    """
    cdef int number = profile_index(profile)
    cdef gather_plan_t plan
    cdef uint8_t* framing
    cdef iovec* segments
    cdef PyObject** owners
    message_hold(message)
    message_gather_plan(message, number, borrow_min, &plan)
    framing = <uint8_t*>calloc(plan.framing_bytes, 1)
    segments = <iovec*>calloc(plan.segments, sizeof(iovec))
    owners = <PyObject**>calloc(plan.owners, sizeof(PyObject*))
    message_gather(message, number, borrow_min, framing, segments, owners)
    message_let_go(message)
    try:
        pieces = [
            PyBytes_FromStringAndSize(<char*>segments[i].iov_base, segments[i].iov_len)
            for i in range(plan.segments)
        ]
        kept = []
        for i in range(plan.owners):
            kept.append(owner_source(<object>owners[i]))
            Py_DECREF(<object>owners[i])
        return pieces, kept
    finally:
        free(framing)
        free(segments)
        free(owners)


# Decoding: wire_decode needs no GIL and fills C structs; what follows makes objects of them, and
# reads the entries once more as it does so.

cdef object payload_bytes(const uint8_t* data, size_t size):
    if data == NULL:
        return None
    return PyBytes_FromStringAndSize(<const char*>data, <Py_ssize_t>size)


cdef const uint8_t* bytes_address(object payload) noexcept:
    if payload is None:
        return NULL
    return <const uint8_t*>PyBytes_AS_STRING(payload)


cdef object payload_of(
    const uint8_t* data, size_t size, object body, const uint8_t** address
):
    """Make the owner of a decoded payload: a copy, or a view of ``body`` for a large one."""
    cdef Py_ssize_t start
    if body is None or data == NULL or size < VIEW_MIN:
        owner = payload_bytes(data, size)
        address[0] = bytes_address(owner)
        return owner
    start = data - hold_buffer(body).data
    return as_owner(memoryview(body)[start:start + <Py_ssize_t>size], "data", address, &size)


cdef tuple entries_from_decoded(wire_decoded_t* decoded, object body):
    cdef tuple entries = PyTuple_New(<Py_ssize_t>decoded.entries_len)
    cdef const uint8_t* at = decoded.entries
    cdef Entry entry
    cdef Py_ssize_t i
    for i in range(<Py_ssize_t>decoded.entries_len):
        if i % ENTRIES_STEP == ENTRIES_STEP - 1:
            with nogil:
                # Others have their turn: of the most entries there may be this takes 30 ms.
                usleep(TURN_US)
        entry = Entry.__new__(Entry)
        if wire_next_entry(decoded, &at, &entry.c) != WIRE_OK:
            entry.c.data = NULL
            raise decode_error(decoded)
        entry.owner = payload_of(entry.c.data, entry.c.data_len, body, &entry.c.data)
        if entry.owner is None or type(entry.owner) is bytes:
            # It refers to nothing that could refer to it: the collector, which would look at it
            # again and again while others are made, need not know of it.
            PyObject_GC_UnTrack(<void*>entry)
        Py_INCREF(entry)    # PyTuple_SET_ITEM takes a reference over
        PyTuple_SET_ITEM(entries, i, entry)
    return entries


cdef Snapshot snapshot_from_decoded(wire_decoded_t* decoded, object body):
    cdef Snapshot snapshot = Snapshot.__new__(Snapshot)
    cdef SnapshotMetadata metadata = snapshot._metadata
    cdef wire_snapshot_t* read = &decoded.snapshot
    cdef int code = WIRE_OK
    if wire_has_ids(&read.conf_state):
        code = wire_read_ids(decoded)
    metadata._conf_state.c = read.conf_state
    memset(&read.conf_state, 0, sizeof(read.conf_state))
    if code != WIRE_OK:
        raise decode_error(decoded)
    snapshot.owner = payload_of(read.data, read.data_len, body, &snapshot.payload)
    snapshot.payload_len = read.data_len
    metadata._index = read.index
    metadata._term = read.term
    return snapshot


cdef Message message_from_decoded(wire_decoded_t* decoded, object body):
    cdef Message message = Message.__new__(Message)
    cdef wire_snapshot_t* snapshot = &decoded.snapshot
    message.owner = payload_bytes(decoded.message.context, decoded.message.context_len)
    message.c = decoded.message
    message.c.context = bytes_address(message.owner)
    if decoded.entries_len:
        message._entries = entries_from_decoded(decoded, body)
    if snapshot.data is not NULL or snapshot.index or snapshot.term \
            or snapshot.conf_state.auto_leave or wire_has_ids(&snapshot.conf_state):
        message._snapshot = snapshot_from_decoded(decoded, body)
    return message


cdef bytes frame_bytes(wire_decoded_t* decoded):
    """Encode the message that a stream's frame stands for."""
    cdef size_t size = 0
    if wire_frame_size(decoded, &size) != WIRE_OK:
        raise decode_error(decoded)
    encoded = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
    wire_put_frame(decoded, <uint8_t*>PyBytes_AS_STRING(encoded))
    return encoded


cdef EncodedMessage encoded_from_decoded(wire_decoded_t* decoded, object body):
    cdef size_t size = <size_t>(decoded.end - decoded.input)
    cdef const uint8_t* payload = decoded.input
    if decoded.is_frame:
        owner = frame_bytes(decoded)
        return encoded_of(decoded, owner, bytes_address(owner), <size_t>len(owner))
    if payload == NULL:     # a body of nothing need not have an address
        payload = <const uint8_t*><const char*>b""
    owner = payload_of(payload, size, body, &payload)
    return encoded_of(decoded, owner, payload, size)


cdef object decode_buffer(object data, wire_decoded_t* decoded):
    """Have wire_decode read any buffer; what holds it, for as long as ``decoded`` is looked at.

    UnmarshalError if it is no message, UsageError if it is no buffer.
    """
    cdef const uint8_t* input
    cdef size_t size
    cdef object owner = data
    cdef int code
    if PyBytes_Check(data):
        input = <const uint8_t*>PyBytes_AS_STRING(data)
        size = <size_t>PyBytes_GET_SIZE(data)
    else:
        try:
            owner = hold_buffer(data)
        except (TypeError, BufferError, ValueError) as error:
            raise UsageError(f"data: {show(data)} is not a C-contiguous buffer: {error}") from None
        input = (<HeldBuffer>owner).data
        size = (<HeldBuffer>owner).size
    if size < NOGIL_MIN:
        code = wire_decode(input, size, decoded)
    else:
        with nogil:
            # Others go on meanwhile. The buffer is held, but its bytes may be changed by now:
            # whatever is read of them, then and later, is compared with its end.
            code = wire_decode(input, size, decoded)
    if code != WIRE_OK:
        raise decode_error(decoded)
    return owner


class Decoded(NamedTuple):
    """A body that ``decode`` has read."""

    #: Message or EncodedMessage.
    message: object
    #: Whether it has fields, at whatever depth, of which a Message knows nothing.
    has_unknown_fields: bool
    #: ``snapshot.metadata.index``; 0 without a snapshot.
    snapshot_index: int


def decode(data, *, encoded=False):
    """Read a body that was not received by the core, but as the core does.

    Parameters
    ----------
    data : bytes-like
        The whole message and nothing else.
    encoded : bool, optional
        Whether an EncodedMessage is made of it instead of a Message. It keeps ``data`` when that
        is large, so nobody may change it any more.

    Returns
    -------
    Decoded

    Raises
    ------
    UnmarshalError
        If the data is not a message.
    """
    cdef wire_decoded_t decoded
    owner = decode_buffer(data, &decoded)
    index = decoded.snapshot.index
    if encoded and PyBytes_Check(owner):
        message = encoded_of(
            &decoded, owner, decoded.input, <size_t>(decoded.end - decoded.input))
    elif encoded:
        message = encoded_from_decoded(&decoded, owner)
    else:
        message = message_from_decoded(&decoded, None)
    return Decoded(message, bool(decoded.has_unknown), index)


cdef object decode_error(const wire_decoded_t* decoded):
    """Make the exception for what stopped wire_decode."""
    cdef uint32_t number = decoded.error.field
    if decoded.error.code == WIRE_NO_MEMORY:
        return MemoryError()
    scope, names = FIELD_NAMES[decoded.error.scope]
    if number == 0:
        field = scope
    elif number <= len(names):
        field = f"{scope}.{names[number - 1]}"
    else:
        field = f"{scope}.{number}"
    return UnmarshalError(field, decoded.error.offset, REASONS[decoded.error.code])
