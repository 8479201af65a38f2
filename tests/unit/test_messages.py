"""Message and its parts as Python objects: fields, checks, payloads, comparison."""

import array
import copy
import ctypes
import gc
import mmap
import pickle
import sys
import threading
import time
import weakref
from typing import Any

import pytest

from pipeline import EncodedMessage
from pipeline.errors import MarshalError, UnmarshalError, UsageError
from pipeline.types import EntryType, MessageType
from pipeline.wire._messages import (
    ConfState,
    Entry,
    Message,
    Snapshot,
    SnapshotMetadata,
    _gather,
    byte_view,
    decode,
)

UINT64_MAX = 2**64 - 1
MESSAGE_SCALARS = ["to", "from_", "term", "log_term", "index", "commit", "reject_hint"]


def full_message() -> Message:
    """Every field set to something of its own."""
    return Message(
        type=MessageType.SNAP,
        to=1,
        from_=2,
        term=3,
        log_term=4,
        index=5,
        entries=[
            Entry(term=6, index=7, type=EntryType.CONF_CHANGE, data=b"entry"),
            Entry(index=8, data=b""),
        ],
        commit=9,
        snapshot=Snapshot(
            data=b"state",
            metadata=SnapshotMetadata(
                index=10,
                term=11,
                conf_state=ConfState(
                    voters=[12],
                    learners=[13],
                    voters_outgoing=[14],
                    learners_next=[15],
                    auto_leave=True,
                ),
            ),
        ),
        reject=True,
        reject_hint=16,
        context=b"context",
    )


#: One change each; every one must make a difference.
CHANGES: dict[str, Any] = {
    "type": lambda m: setattr(m, "type", MessageType.APP),
    **{name: lambda m, name=name: setattr(m, name, 99) for name in MESSAGE_SCALARS},
    "reject": lambda m: setattr(m, "reject", False),
    "context": lambda m: setattr(m, "context", b"contexT"),
    "no context": lambda m: setattr(m, "context", None),
    "empty context": lambda m: setattr(m, "context", b""),
    "no snapshot": lambda m: setattr(m, "snapshot", None),
    "fewer entries": lambda m: setattr(m, "entries", m.entries[:1]),
    "entry term": lambda m: setattr(m.entries[0], "term", 99),
    "entry index": lambda m: setattr(m.entries[0], "index", 99),
    "entry type": lambda m: setattr(m.entries[0], "type", EntryType.NORMAL),
    "entry data": lambda m: setattr(m.entries[0], "data", b"entrY"),
    "entry data absent": lambda m: setattr(m.entries[1], "data", None),
    "snapshot data": lambda m: setattr(m.snapshot, "data", b"statE"),
    "metadata index": lambda m: setattr(m.snapshot.metadata, "index", 99),
    "metadata term": lambda m: setattr(m.snapshot.metadata, "term", 99),
    "voters": lambda m: setattr(m.snapshot.metadata.conf_state, "voters", [99]),
    "learners": lambda m: setattr(m.snapshot.metadata.conf_state, "learners", []),
    "outgoing": lambda m: setattr(m.snapshot.metadata.conf_state, "voters_outgoing", [1, 2]),
    "next": lambda m: setattr(m.snapshot.metadata.conf_state, "learners_next", [99]),
    "auto_leave": lambda m: setattr(m.snapshot.metadata.conf_state, "auto_leave", False),
}


def test_fields_have_their_defaults() -> None:
    message = Message(type=MessageType.HUP)
    assert [getattr(message, name) for name in MESSAGE_SCALARS] == [0] * 7
    assert (message.entries, message.snapshot, message.reject, message.context) == (
        (),
        None,
        False,
        None,
    )
    entry = Entry()
    assert (entry.term, entry.index, entry.type, entry.data) == (0, 0, EntryType.NORMAL, None)
    snapshot = Snapshot()
    assert (snapshot.data, snapshot.metadata) == (None, SnapshotMetadata())
    assert snapshot.metadata.conf_state == ConfState()
    state = ConfState()
    assert (state.voters, state.learners, state.voters_outgoing, state.learners_next) == ((),) * 4
    assert state.auto_leave is False


def test_default_parts_are_not_shared() -> None:
    first, second = Snapshot(), Snapshot()
    first.metadata.conf_state.voters = [1]
    first.metadata.index = 2
    assert second == Snapshot()


@pytest.mark.parametrize("build", [Message, Entry, Snapshot, SnapshotMetadata, ConfState])
def test_fields_are_given_by_keyword_only(build: Any) -> None:
    with pytest.raises(TypeError):
        build(1)
    with pytest.raises(TypeError):
        build(type=1, no_such_field=1)


def test_a_message_needs_a_type() -> None:
    with pytest.raises(TypeError, match="type"):
        Message()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", MESSAGE_SCALARS)
@pytest.mark.parametrize("value", [0, 1, 2**63, UINT64_MAX])
def test_scalars_hold_64_unsigned_bits(name: str, value: int) -> None:
    message = Message(type=MessageType.APP, **{name: value})
    assert getattr(message, name) == value
    assert getattr(Message.unmarshal(message.marshal()), name) == value
    setattr(message, name, 7)
    assert getattr(message, name) == 7


def test_a_number_is_what_has_an_index() -> None:
    class Id:
        def __index__(self) -> int:
            return 42

    message = Message(type=Id(), to=Id())  # type: ignore[arg-type]
    assert (message.type, message.to) == (42, 42)


def test_a_known_type_is_its_enum_member_and_an_unknown_one_an_int() -> None:
    for member in MessageType:
        assert Message(type=int(member)).type is member
    for kind in EntryType:
        assert Entry(type=int(kind)).type is kind
    for number in (24, -1, 2**31 - 1, -(2**31)):
        assert Message(type=number).type == number
        assert type(Message(type=number).type) is int
        assert Entry(type=number).type == number
        assert Message.unmarshal(Message(type=number).marshal()).type == number


def test_entries_become_a_tuple() -> None:
    entries = [Entry(index=1), Entry(index=2)]
    message = Message(type=MessageType.APP, entries=iter(entries))
    assert type(message.entries) is tuple
    assert message.entries[0] is entries[0]
    message.entries = entries
    entries.append(Entry(index=3))
    assert len(message.entries) == 2


UINT64_RULE = r"is not (an int )?in 0\.\.2\*\*64-1"
BAD_VALUES = [
    *[
        (Message, name, value, UINT64_RULE)
        for name in MESSAGE_SCALARS
        for value in (-1, 2**64, "1", 1.0, None, True)
    ],
    (Message, "type", "APP", r"is not an int in -2\*\*31\.\.2\*\*31-1"),
    (Message, "type", True, r"is not an int in -2\*\*31\.\.2\*\*31-1"),
    (Message, "type", 2**31, r"2147483648 is not in -2\*\*31\.\.2\*\*31-1"),
    (Message, "type", -(2**31) - 1, r"is not in -2\*\*31\.\.2\*\*31-1"),
    (Message, "reject", 1, "1 is not True or False"),
    (Message, "entries", 5, "5 is not an iterable of Entry"),
    (Message, "entries", [Entry(), None], "None is not an Entry"),
    (Message, "snapshot", Entry(), r"Entry\(\) is not a Snapshot or None"),
    (Message, "context", "text", "'text' is not None, bytes or a C-contiguous buffer"),
    (Message, "context", 3, "3 is not None, bytes or a C-contiguous buffer"),
    (Entry, "term", -1, UINT64_RULE),
    (Entry, "index", 2**64, UINT64_RULE),
    (Entry, "type", 2**40, r"is not in -2\*\*31\.\.2\*\*31-1"),
    (Entry, "data", memoryview(b"abcd")[::2], "is not None, bytes or a C-contiguous buffer"),
    (Entry, "data", "text", "'text' is not None, bytes or a C-contiguous buffer"),
    (Snapshot, "data", [1], r"\[1\] is not None, bytes or a C-contiguous buffer"),
    (Snapshot, "metadata", ConfState(), r"ConfState\(\) is not a SnapshotMetadata"),
    (SnapshotMetadata, "conf_state", {}, r"\{\} is not a ConfState"),
    (SnapshotMetadata, "index", -1, UINT64_RULE),
    (SnapshotMetadata, "term", "x", UINT64_RULE),
    *[
        (ConfState, name, value, rule)
        for name in ("voters", "learners", "voters_outgoing", "learners_next")
        for value, rule in (
            (1, "1 is not an iterable of ints"),
            ([1, -1], UINT64_RULE),
            (["1"], UINT64_RULE),
            (range(65537), "65537 items, more than 65536"),
        )
    ],
    (ConfState, "auto_leave", None, "None is not True or False"),
]


@pytest.mark.parametrize(("build", "name", "value", "rule"), BAD_VALUES)
def test_a_bad_value_is_refused_with_field_value_and_rule(
    build: Any, name: str, value: object, rule: str
) -> None:
    needed = {"type": MessageType.APP} if build is Message else {}
    with pytest.raises(MarshalError, match=rf"^{build.__name__}\.{name}: .*{rule}"):
        build(**{**needed, name: value})
    good = build(**needed)
    with pytest.raises(MarshalError, match=rule):
        setattr(good, name, value)
    assert good == build(**needed)


def test_more_entries_than_a_receiver_takes_are_refused() -> None:
    entries = (Entry(),) * ((1 << 17) + 1)
    with pytest.raises(MarshalError, match=r"^Message\.entries: 131073 items, more than 131072"):
        Message(type=MessageType.APP, entries=entries)
    assert len(Message(type=MessageType.APP, entries=entries[1:]).entries) == 1 << 17


def test_a_number_too_long_to_be_printed_is_refused_all_the_same() -> None:
    with pytest.raises(MarshalError, match=UINT64_RULE):
        Message(type=MessageType.APP, to=10**5000)


def test_a_value_whose_repr_raises_is_refused_all_the_same() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(MarshalError, match="<Rude that raises RuntimeError when it is shown"):
        Message(type=MessageType.APP, to=Rude())  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["3.4", "3.8", "", 3.5, None])
def test_an_unknown_profile_is_refused(profile: Any) -> None:
    message = Message(type=MessageType.APP)
    with pytest.raises(UsageError, match=r"^profile: .* is not one of 3\.5, 3\.6, 3\.7$"):
        message.marshal(profile)
    with pytest.raises(UsageError, match="profile"):
        message.byte_size(profile)


@pytest.mark.parametrize("data", ["text", 5, None, memoryview(b"abcd")[::2]])
def test_unmarshal_refuses_what_is_not_a_buffer(data: Any) -> None:
    with pytest.raises(UsageError, match=r"^data: .* is not a C-contiguous buffer"):
        Message.unmarshal(data)


@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
def test_a_full_message_comes_back_whole(profile: str) -> None:
    message = full_message()
    data = message.marshal(profile)
    assert message.byte_size(profile) == len(data)
    assert Message.unmarshal(data) == message


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_field_counts_in_comparison_and_on_the_wire(change: Any) -> None:
    message = full_message()
    change(message)
    assert message != full_message()
    for profile in ("3.5", "3.6", "3.7"):
        assert message.marshal(profile) != full_message().marshal(profile)
        assert Message.unmarshal(message.marshal(profile)) == message
    assert repr(message) != repr(full_message())


def test_an_empty_snapshot_says_the_same_as_none() -> None:
    without = Message(type=MessageType.APP)
    with_empty = Message(type=MessageType.APP, snapshot=Snapshot())
    assert without == with_empty
    assert with_empty == without
    for profile in ("3.5", "3.6", "3.7"):
        assert without.marshal(profile) == with_empty.marshal(profile)
        assert Message.unmarshal(with_empty.marshal(profile)).snapshot is None
    assert Message(type=MessageType.APP, snapshot=Snapshot(data=b"")) != without


@pytest.mark.parametrize("part", [full_message(), Entry(), Snapshot(), SnapshotMetadata()])
def test_nothing_equals_an_object_of_another_class(part: Any) -> None:
    assert part != "something else"
    assert (part == object()) is False


@pytest.mark.parametrize("build", [Entry, Snapshot, SnapshotMetadata, ConfState])
def test_the_parts_cannot_be_hashed(build: Any) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(build())


def test_a_message_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(full_message())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_message_can_be_pickled(protocol: int) -> None:
    message = full_message()
    assert pickle.loads(pickle.dumps(message, protocol)) == message


def test_a_held_buffer_is_pickled_as_its_bytes() -> None:
    entry = Entry(data=memoryview(b"payload"))
    assert pickle.loads(pickle.dumps(entry)).data == b"payload"
    words = Entry(data=array.array("I", [1, 2]))
    assert len(copy.copy(words).data) == 2 * array.array("I").itemsize  # type: ignore[arg-type]


def test_a_copy_shares_the_parts_and_a_deep_copy_does_not() -> None:
    message = full_message()
    shallow, deep = copy.copy(message), copy.deepcopy(message)
    assert shallow == deep == message
    assert shallow.entries[0] is message.entries[0]
    message.entries[0].index = 99
    message.snapshot.metadata.conf_state.voters = [99]  # type: ignore[union-attr]
    assert shallow == message
    assert deep == full_message()


def test_repr_shows_what_is_set() -> None:
    assert repr(Message(type=MessageType.HUP)) == "Message(type=MessageType.HUP)"
    assert repr(Message(type=99)) == "Message(type=99)"
    text = repr(full_message())
    names = {"Message", "Entry", "Snapshot", "SnapshotMetadata", "ConfState"}
    scope = {name: globals()[name] for name in names | {"MessageType", "EntryType"}}
    assert eval(text, scope) == full_message()  # repr is a program that makes the message


def test_repr_cuts_what_is_long() -> None:
    data = b"x" * 1_000_000  # shared: 1 GB otherwise
    message = Message(type=MessageType.APP, entries=[Entry(data=data) for _ in range(1000)])
    assert len(repr(message)) < 1000
    assert "<1000 items" in repr(message)
    assert "<1000000 bytes b'xxx" in repr(message)
    assert len(repr(ConfState(voters=range(10_000)))) < 200


PAYLOAD_OWNERS = [
    ("Entry.data", lambda data: Entry(data=data), "data"),
    ("Snapshot.data", lambda data: Snapshot(data=data), "data"),
    ("Message.context", lambda data: Message(type=3, context=data), "context"),
]
each_payload = pytest.mark.parametrize(
    ("build", "name"), [owner[1:] for owner in PAYLOAD_OWNERS], ids=[o[0] for o in PAYLOAD_OWNERS]
)
HOLDERS = [
    *PAYLOAD_OWNERS,
    ("EncodedMessage.data", lambda data: EncodedMessage(data, type=3, to=2), "data"),
]
each_holder = pytest.mark.parametrize(
    ("build", "name"), [holder[1:] for holder in HOLDERS], ids=[holder[0] for holder in HOLDERS]
)


def mapped(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


def encode(part: Any) -> bytes:
    """Encode the message that ``part`` is, or the one around it."""
    if isinstance(part, Entry):
        part = Message(type=3, entries=[part])
    elif isinstance(part, Snapshot):
        part = Message(type=3, snapshot=part)
    encoded: bytes = part.marshal()
    return encoded


@each_payload
@pytest.mark.parametrize(
    "payload",
    [
        b"payload",
        bytearray(b"payload"),
        memoryview(b"payload"),
        memoryview(b"--payload--")[2:9],
        array.array("B", b"payload"),
        memoryview(b"payload!").cast("B", (2, 4)),
        memoryview(array.array("I", range(5000))),
        array.array("d", [1.0, -0.0]),
        (ctypes.c_int16.__ctype_be__ * 3)(1, 2, 3),
        ((ctypes.c_double * 3) * 2)(),
        (ctypes.c_int * 0)(),
        mapped(b"payload"),
        b"",
        bytearray(),
        None,
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_a_payload_is_given_back_as_it_was_passed(build: Any, name: str, payload: Any) -> None:
    part = build(payload)
    assert getattr(part, name) is payload
    assert part == build(None if payload is None else bytes(payload))
    assert encode(part) == encode(build(None if payload is None else bytes(payload)))


def released() -> memoryview:
    view = memoryview(b"payload")
    view.release()
    return view


def closed() -> mmap.mmap:
    memory = mapped(b"payload")
    memory.close()
    return memory


@each_holder
@pytest.mark.parametrize(
    "payload",
    [
        memoryview(b"payload")[::2],
        memoryview(b"payload")[::-1],
        memoryview(array.array("I", [1, 2, 3]))[::2],
        released(),
        closed(),
        "text",
        7,
        [1, 2],
    ],
    ids=["strided", "reversed", "strided ints", "released", "closed", "str", "int", "list"],
)
def test_what_is_no_contiguous_buffer_is_no_payload(build: Any, name: str, payload: Any) -> None:
    with pytest.raises(MarshalError, match=rf"{name}: .* is not None, bytes or a C-contiguous"):
        build(payload)


@each_holder
def test_the_collector_may_break_a_cycle_with_a_memoryview(build: Any, name: str) -> None:
    """It crashed: CPython before 3.12.7 clears a memoryview that somebody exports from."""

    class Node:
        part: object
        itself: object

    view = memoryview(bytearray(b"--payload--"))[2:9]
    node = Node()  # younger than the view, and so cleared after it
    node.part, node.itself = build(view), node
    alive = weakref.ref(node)
    del node, view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("size", [100, 100_000], ids=["copied", "borrowed"])
def test_an_encoded_message_is_the_bytes_of_any_contiguous_buffer(size: int) -> None:
    payload = memoryview(array.array("i", range(size)))
    message = EncodedMessage(payload, type=3, to=2)
    assert (len(message), message.type, message.to) == (payload.nbytes, 3, 2)
    assert message.data is payload


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_an_encoded_message_says_whose_it_is_as_its_bytes_do(size: int) -> None:
    message = Message(type=MessageType.SNAP, to=2**64 - 1, from_=7, term=9, context=bytes(size))
    encoded = EncodedMessage.unmarshal(message.marshal())
    assert (encoded.type, encoded.to, encoded.from_, encoded.term) == (7, 2**64 - 1, 7, 9)
    assert encoded.type is MessageType.SNAP
    assert Message.unmarshal(encoded.data) == message


def test_an_encoded_message_keeps_the_number_of_a_type_that_nobody_knows() -> None:
    assert EncodedMessage.unmarshal(Message(type=99).marshal()).type == 99
    assert EncodedMessage(b"", type=-3, to=2).type == -3
    assert repr(EncodedMessage(b"abc", type=99, to=2)) == "EncodedMessage(<3 bytes>, type=99, to=2)"
    told = EncodedMessage(b"", type=3, to=2, from_=1, term=5)
    assert repr(told) == "EncodedMessage(<0 bytes>, type=MessageType.APP, to=2, from_=1, term=5)"


@pytest.mark.parametrize("bad", [b"\x08", b"malformed garbage"])
def test_what_is_no_message_is_no_encoded_message_either(bad: bytes) -> None:
    with pytest.raises(UnmarshalError):
        EncodedMessage.unmarshal(bad)


def test_an_encoded_message_survives_pickle_and_copy() -> None:
    message = EncodedMessage(bytearray(b"payload"), type=3, to=2, from_=1, term=5)
    for same in (pickle.loads(pickle.dumps(message)), copy.copy(message)):
        assert (same.data, same.type, same.to, same.from_, same.term) == (b"payload", 3, 2, 1, 5)


@pytest.mark.parametrize("size", [100, 100_000], ids=["copied", "viewed"])
def test_a_body_read_as_the_receiving_core_does_is_kept_and_cannot_be_changed(size: int) -> None:
    body = bytearray(Message(type=3, to=2, context=bytes(size)).marshal())
    whole = bytes(body)
    for form in (body, whole, memoryview(body)):
        message = decode(form, encoded=True).message
        assert isinstance(message, EncodedMessage)
        assert message.data == whole
        assert memoryview(message.data).readonly


def test_an_encoded_message_that_was_never_filled_is_empty() -> None:
    message = EncodedMessage.__new__(EncodedMessage)
    assert (message.data, len(message), message.type, message.to) == (b"", 0, MessageType.HUP, 0)


def test_a_view_of_bytes_is_of_any_contiguous_buffer_and_holds_it() -> None:
    words = (ctypes.c_int16.__ctype_be__ * 3)(1, 2, 3)
    view = byte_view(words)
    assert (view.format, view.itemsize, view.readonly, bytes(view)) == ("B", 1, True, bytes(words))
    assert bytes(byte_view((ctypes.c_int * 0)())) == b""
    memory = mapped(b"payload")
    view = byte_view(memory)
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    memory.close()
    for bad in (memoryview(b"payload")[::2], released(), closed(), "text", None):
        with pytest.raises((TypeError, BufferError, ValueError)):
            byte_view(bad)  # type: ignore[arg-type]


@each_payload
def test_a_held_bytearray_cannot_be_resized_until_it_is_let_go(build: Any, name: str) -> None:
    data = bytearray(b"payload")
    part = build(data)
    with pytest.raises(BufferError):
        data.extend(b"more")
    data[:3] = b"PAY"
    assert b"PAYload" in encode(part)
    setattr(part, name, b"other")
    data.extend(b"more")
    assert b"other" in encode(part)


@each_payload
def test_bytes_are_kept_by_reference_and_let_go(build: Any, name: str) -> None:
    data = bytes(bytearray(b"a payload of its own"))
    before = sys.getrefcount(data)
    part = build(data)
    assert sys.getrefcount(data) == before + 1
    setattr(part, name, None)
    assert sys.getrefcount(data) == before
    setattr(part, name, data)
    del part
    assert sys.getrefcount(data) == before


def test_a_refused_payload_changes_nothing() -> None:
    entry = Entry(data=b"before")
    with pytest.raises(MarshalError):
        entry.data = "text"  # type: ignore[assignment]
    assert entry.data == b"before"


def test_a_cycle_through_a_payload_is_collected() -> None:
    class Box(bytearray):
        entry: Entry

    box = Box(b"payload")
    box.entry = Entry(data=box)
    gone = weakref.ref(box)
    del box
    gc.collect()
    assert gone() is None


def test_the_sent_bytes_are_those_at_the_time_of_marshal() -> None:
    message = full_message()
    first = message.marshal()
    message.entries[0].data = b"another"
    assert first == full_message().marshal()
    assert message.marshal() != first


# message_gather, which the sending core writes large messages with (design R3).


def test_gather_leaves_payloads_of_the_size_and_above_where_they_are() -> None:
    small, large, state, context = b"s" * 9, b"l" * 10, bytearray(b"t" * 11), b"c" * 12
    message = Message(
        type=MessageType.SNAP,
        entries=[Entry(data=small), Entry(data=large)],
        snapshot=Snapshot(data=state),
        context=context,
    )
    segments, owners = _gather(message, "3.5", 10)
    assert b"".join(segments) == message.marshal()
    assert segments[1::2] == [large, bytes(state), context]
    assert small in segments[0]
    assert [id(owner) for owner in owners] == [id(large), id(state), id(context)]


@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
@pytest.mark.parametrize("borrow_min", [0, 1, 6, 7, 8, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"entries": [Entry(data=b"payload")]},
        {"entries": [Entry(data=b"payload")], "commit": 1},
        {"entries": [Entry(data=b"payload"), Entry(data=b"")]},
        {"entries": [Entry(data=b"payload"), Entry(index=1)]},
        {"entries": [Entry(data=b"payload")], "snapshot": Snapshot()},
        {"snapshot": Snapshot(data=b"payload")},
        {"snapshot": Snapshot(data=b"payload", metadata=SnapshotMetadata(term=1))},
        {"snapshot": Snapshot(data=b"")},
        {"entries": [Entry(data=b"payload")], "reject": True},
        {"entries": [Entry(data=b"payload")], "context": b""},
        {"entries": [Entry(data=b"payload")], "context": b"payload"},
        {"entries": [Entry(data=b"payload")], "context": b"short"},
    ],
    ids=str,
)
def test_gathered_segments_are_the_marshalled_message_and_never_empty(
    fields: dict[str, Any], borrow_min: int, profile: str
) -> None:
    # Each of these ends differently: with a payload, framing, or a payload too small to borrow.
    message = Message(type=MessageType.HUP, **fields)
    segments, owners = _gather(message, profile, borrow_min)
    assert b"".join(segments) == message.marshal(profile)
    assert all(segments)
    assert len(segments) in (2 * len(owners), 2 * len(owners) + 1)


def test_gather_takes_one_reference_to_each_owner() -> None:
    data = bytes(bytearray(b"a payload of its own"))
    message = Message(type=MessageType.APP, entries=[Entry(data=data)] * 3)
    before = sys.getrefcount(data)
    _, owners = _gather(message, "3.5", 1)
    assert len(owners) == 3
    assert sys.getrefcount(data) == before + 3
    del owners
    assert sys.getrefcount(data) == before


def test_others_run_while_many_entries_are_made() -> None:
    body = b"\x08\x03" + b"\x3a\x00" * 131072
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # so that a thread runs only when another lets it
    try:
        thread = threading.Thread(target=lambda: made.append(Message.unmarshal(body)))
        made: list[Message] = []
        turns = 0
        thread.start()
        while not made:
            turns += 1
            time.sleep(0)
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert turns >= 10


def test_the_collector_knows_of_an_entry_that_is_given_other_data() -> None:
    """Of one that was decoded it need not know: it has bytes, or nothing."""
    message = Message(type=MessageType.APP, entries=[Entry(data=b"x")])
    entry = Message.unmarshal(message.marshal()).entries[0]
    assert not gc.is_tracked(entry)
    entry.data = memoryview(bytearray(3))
    assert gc.is_tracked(entry)
    assert entry.data == bytes(3)
