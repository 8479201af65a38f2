"""The codec against protobuf's own, over messages and over bytes nobody would send.

Invariant: what one of the two reads, the other reads, and as the same message, but for the
differences listed at ``explained``; what we write is what protobuf writes when it is given the
fields of the profile.
"""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.raftpb import raft_pb2
from pipeline.wire._messages import (
    ConfState,
    EncodedMessage,
    Entry,
    Message,
    Snapshot,
    SnapshotMetadata,
    _gather,
    decode,
)
from tests.fuzz.oracles import (
    ID_LISTS,
    PROFILES,
    SCALARS,
    check_message,
    from_protobuf,
    has_unknown_fields,
)

uint64s = st.one_of(
    st.just(0),
    st.integers(0, 300),
    st.integers(0, 2**64 - 1),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(1, 64).map(lambda bits: 2**bits - 1),
)
int32s = st.one_of(st.integers(0, 30), st.integers(-(2**31), 2**31 - 1))
payloads = st.one_of(st.none(), st.binary(max_size=300))
id_lists = st.lists(uint64s, max_size=4)
conf_states = st.builds(ConfState, **dict.fromkeys(ID_LISTS, id_lists), auto_leave=st.booleans())
snapshots = st.builds(
    Snapshot,
    data=payloads,
    metadata=st.builds(SnapshotMetadata, conf_state=conf_states, index=uint64s, term=uint64s),
)
entries = st.builds(Entry, term=uint64s, index=uint64s, type=int32s, data=payloads)
messages = st.builds(
    Message,
    type=int32s,
    **{name: st.booleans() if name == "reject" else uint64s for name in SCALARS},
    entries=st.lists(entries, max_size=5),
    snapshot=st.one_of(st.none(), snapshots),
    context=payloads,
)


def put(target: Any, name: str, value: Any, sparse: bool) -> None:
    if value is not None and (value or not sparse or isinstance(value, bytes)):
        setattr(target, name, value)


def as_protobuf(message: Message, profile: str) -> raft_pb2.Message:
    """Set exactly the fields that the profile's encoder emits."""
    sparse = profile == "3.7"
    made = raft_pb2.Message()
    put(made, "type", int(message.type), sparse)
    for ours, theirs in SCALARS.items():
        put(made, theirs, getattr(message, ours), sparse)
    put(made, "context", message.context, sparse)
    for entry in message.entries:
        target = made.entries.add()
        put(target, "Type", int(entry.type), sparse)
        put(target, "Term", entry.term, sparse)
        put(target, "Index", entry.index, sparse)
        put(target, "Data", entry.data, sparse)
    if profile == "3.6":
        made.vote = 0
    snapshot = message.snapshot
    if snapshot is None or snapshot == Snapshot():
        if profile != "3.5":
            return made
        snapshot = Snapshot()
    metadata, state = snapshot.metadata, snapshot.metadata.conf_state
    put(made.snapshot, "data", snapshot.data, sparse)
    if not sparse or metadata != SnapshotMetadata():
        made.snapshot.metadata.SetInParent()
        put(made.snapshot.metadata, "index", metadata.index, sparse)
        put(made.snapshot.metadata, "term", metadata.term, sparse)
    if not sparse or state != ConfState():
        target = made.snapshot.metadata.conf_state
        for name in ID_LISTS:
            getattr(target, name).extend(getattr(state, name))
        put(target, "auto_leave", state.auto_leave, sparse)
    return made


@given(messages, st.sampled_from(PROFILES))
def test_we_write_the_bytes_protobuf_writes(message: Message, profile: str) -> None:
    encoded = message.marshal(profile)
    assert encoded == as_protobuf(message, profile).SerializeToString()
    assert message.byte_size(profile) == len(encoded)


@given(messages, st.sampled_from(PROFILES))
def test_every_profile_is_read_back_as_the_same_message(message: Message, profile: str) -> None:
    index = message.snapshot.metadata.index if message.snapshot is not None else 0
    assert decode(message.marshal(profile)) == (message, False, index)


@given(messages, st.sampled_from(PROFILES), st.integers(0, 320))
def test_gathered_segments_are_the_encoded_message(
    message: Message, profile: str, borrow_min: int
) -> None:
    segments, owners = _gather(message, profile, borrow_min)
    assert b"".join(segments) == message.marshal(profile)
    assert all(segments)
    assert all(len(owner) >= borrow_min for owner in owners)


# Bytes of a message's shape that no encoder makes: known and unknown fields, right and wrong wire
# types, in any order and number, at every level.


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def spanned(body: bytes) -> bytes:
    return varint(len(body)) + body


varints = st.one_of(uint64s, int32s.map(lambda value: value % 2**64)).map(varint)
spans = st.binary(max_size=8).map(spanned)
packed = st.lists(varints, max_size=4).map(b"".join).map(spanned)


def tagged(
    numbers: st.SearchStrategy[int], wire_type: int, values: st.SearchStrategy[bytes]
) -> st.SearchStrategy[bytes]:
    return st.builds(lambda number, value: varint(number << 3 | wire_type) + value, numbers, values)


def soup(
    known: dict[int, st.SearchStrategy[bytes]], scalars: list[int]
) -> st.SearchStrategy[bytes]:
    """Mix fields of a message: ``known`` values by tag, ``scalars`` under wrong wire types too."""
    any_number = st.one_of(st.integers(1, 16), st.integers(1, 2**29 - 1))
    strays = [
        tagged(any_number, 0, varints),
        tagged(any_number, 1, st.binary(min_size=8, max_size=8)),
        # Not any number: a message would have to be in the fields that hold one.
        tagged(st.one_of(st.integers(16, 2**29 - 1), st.sampled_from([15, *scalars])), 2, spans),
        tagged(any_number, 5, st.binary(min_size=4, max_size=4)),
        st.builds(
            lambda number, body: varint(number << 3 | 3) + body + varint(number << 3 | 4),
            any_number,
            st.one_of(st.just(b""), tagged(any_number, 0, varints)),
        ),
    ]
    right = [
        st.builds(lambda value, tag=tag: varint(tag) + value, values)
        for tag, values in known.items()
    ]
    return st.lists(st.one_of(*right, *strays), max_size=8).map(b"".join)


conf_state_soup = soup(
    {
        0x08: varints,
        0x0A: packed,
        0x10: varints,
        0x12: packed,
        0x18: varints,
        0x1A: packed,
        0x20: varints,
        0x22: packed,
        0x28: varints,
    },
    [5],
)
metadata_soup = soup(
    {0x0A: conf_state_soup.map(spanned), 0x10: varints, 0x18: varints}, scalars=[2, 3]
)
snapshot_soup = soup({0x0A: spans, 0x12: metadata_soup.map(spanned)}, scalars=[])
entry_soup = soup({0x08: varints, 0x10: varints, 0x18: varints, 0x22: spans}, scalars=[1, 2, 3])
message_soup = soup(
    {
        **dict.fromkeys((0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x40, 0x50, 0x58, 0x68), varints),
        0x3A: entry_soup.map(spanned),
        0x4A: snapshot_soup.map(spanned),
        0x62: spans,
    },
    scalars=[1, 2, 3, 4, 5, 6, 8, 10, 11, 13],
)


@given(message_soup)
def test_a_soup_of_fields_is_read_as_protobuf_reads_it(data: bytes) -> None:
    message, has_unknown, _ = decode(data)
    assert message == from_protobuf(raft_pb2.Message.FromString(data))
    assert has_unknown == has_unknown_fields(data)
    assert Message.unmarshal(message.marshal()) == message


@given(message_soup)
def test_an_encoded_message_is_every_byte_of_the_soup_and_its_head(data: bytes) -> None:
    encoded = EncodedMessage.unmarshal(data)
    read = Message.unmarshal(data)
    assert encoded.data is data
    for name in ("type", "to", "from_", "term"):
        assert getattr(encoded, name) == getattr(read, name)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Bytes that were a message until some were changed, put in, or cut off."""
    whole = st.one_of(message_soup, messages.map(Message.marshal))
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "insert", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=3))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
    return bytes(data)


@given(damaged())
@example(b"malformed garbage")
@example(b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x0b\x00\x00\x0c")
@example(b"\x72\x01\x08")
@example(b"\x90\x80\x80\x80\x80\x00\x05")
def test_damaged_bytes_are_read_or_refused_as_protobuf_does(data: bytes) -> None:
    check_message(data)


@given(st.binary(max_size=64))
def test_any_bytes_at_all_are_read_or_refused(data: bytes) -> None:
    check_message(data)
