"""The decoder, rule by rule (spec section 1.4, docs/wire.md)."""

import threading

import pytest

from pipeline.errors import UnmarshalError
from pipeline.types import EntryType, MessageType
from pipeline.wire._messages import (
    ConfState,
    Entry,
    Message,
    Snapshot,
    SnapshotMetadata,
    decode,
)
from tests.support.wire import span, varint

MAX_ENTRIES = 1 << 17
MAX_IDS = 1 << 16
MAX_GROUP_DEPTH = 100


def in_conf_state(body: bytes) -> bytes:
    """Nest a ConfState's body in the message around it."""
    return span(0x4A, span(0x12, span(0x0A, body)))


def conf_state_of(data: bytes) -> ConfState:
    snapshot = Message.unmarshal(data).snapshot
    assert snapshot is not None
    return snapshot.metadata.conf_state


def refusal(data: bytes) -> UnmarshalError:
    with pytest.raises(UnmarshalError) as caught:
        Message.unmarshal(data)
    return caught.value


def test_an_empty_body_is_a_message_of_zeros() -> None:
    assert Message.unmarshal(b"") == Message(type=MessageType.HUP)


def test_any_buffer_is_read() -> None:
    message = Message(type=MessageType.APP, entries=[Entry(data=b"payload")])
    data = message.marshal()
    for form in (bytearray(data), memoryview(data), memoryview(b"??" + data)[2:]):
        assert Message.unmarshal(form) == message


def test_what_was_read_does_not_depend_on_the_buffer() -> None:
    data = bytearray(Message(type=3, entries=[Entry(data=b"payload")], context=b"abc").marshal())
    message = Message.unmarshal(data)
    data[:] = bytes(len(data))
    assert (message.entries[0].data, message.context) == (b"payload", b"abc")


@pytest.mark.parametrize(
    ("text", "field", "offset", "reason"),
    [
        ("08", "Message.type", 1, "the input ends inside a value"),
        ("10 01 80", "Message", 2, "the input ends inside a value"),
        ("10 80 80", "Message.to", 1, "the input ends inside a value"),
        ("18 ff ff ff ff ff ff ff ff ff 02", "Message.from_", 1, "a varint of more than 64 bits"),
        (
            "18 80 80 80 80 80 80 80 80 80 80 00",
            "Message.from_",
            1,
            "a varint of more than 64 bits",
        ),
        ("00 00", "Message", 0, "a field number outside 1..2**29-1"),
        ("07 00", "Message", 0, "a field number outside 1..2**29-1"),
        ("80 80 80 80 10 00", "Message", 0, "a field number outside 1..2**29-1"),
        ("0e 00", "Message.type", 1, "a wire type that does not exist"),
        ("0f 00", "Message.type", 1, "a wire type that does not exist"),
        ("62 02 00", "Message.context", 1, "a length past the end"),
        ("62 ff ff ff ff 0f", "Message.context", 1, "a length past the end"),
        ("62 ff ff ff ff ff ff ff ff 7f", "Message.context", 1, "a length past the end"),
        ("62 ff ff ff ff ff ff ff ff ff 01", "Message.context", 1, "a negative length"),
        ("08 03 3a 02 22 01", "Message.entries.data", 5, "a length past the end"),
        ("3a 02 18 80", "Message.entries.index", 3, "the input ends inside a value"),
        ("4a 03 0a 02 00", "Message.snapshot.data", 3, "a length past the end"),
        ("4a 02 12 01", "Message.snapshot.metadata", 3, "a length past the end"),
        ("4a 03 12 01 10", "Message.snapshot.metadata.index", 5, "the input ends inside a value"),
        (
            "4a 05 12 03 0a 01 28",
            "Message.snapshot.metadata.conf_state.auto_leave",
            7,
            "the input ends inside a value",
        ),
        (
            "4a 07 12 05 0a 03 0a 01 80",
            "Message.snapshot.metadata.conf_state.voters",
            8,
            "the input ends inside a value",
        ),
        ("0c", "Message.type", 1, "an end-group tag that closes no open group"),
        ("7b 74", "Message.15", 2, "an end-group tag that closes no open group"),
        ("7b", "Message", 1, "the input ends inside a value"),
        ("79 00 00 00 00 00 00 00", "Message.15", 1, "the input ends inside a value"),
        ("7d 00 00 00", "Message.15", 1, "the input ends inside a value"),
        ("7a 01", "Message.15", 1, "a length past the end"),
        ("78 80", "Message.15", 1, "the input ends inside a value"),
        ("68 80", "Message.vote", 1, "the input ends inside a value"),
    ],
)
def test_what_is_not_a_message_is_refused_with_field_and_offset(
    text: str, field: str, offset: int, reason: str
) -> None:
    error = refusal(bytes.fromhex(text))
    assert (error.field, error.offset, error.reason) == (field, offset, reason)


def test_etcds_malformed_garbage_is_refused() -> None:
    # The body upstream's TestServeRaftPrefix posts: a lenient decoder would take it.
    error = refusal(b"malformed garbage")
    assert (error.field, error.offset) == ("Message.responses", 6)


def test_every_prefix_of_a_message_is_refused_or_a_shorter_message() -> None:
    data = Message(
        type=MessageType.APP,
        entries=[Entry(index=300, data=b"payload")],
        snapshot=Snapshot(
            data=b"state", metadata=SnapshotMetadata(conf_state=ConfState(voters=[1, 500]))
        ),
        context=b"context",
    ).marshal()
    taken = [end for end in range(len(data)) if not _is_refused(data[:end])]
    # The ends of the fields of Message itself, and nothing else.
    assert taken == [0, 2, 4, 6, 8, 10, 12, 30, 32, 56, 58, 60]


def _is_refused(data: bytes) -> bool:
    try:
        Message.unmarshal(data)
    except UnmarshalError:
        return True
    return False


def test_a_varint_may_be_longer_than_it_needs_to_be() -> None:
    assert Message.unmarshal(bytes.fromhex("10 85 80 80 80 00")).to == 5
    assert Message.unmarshal(bytes.fromhex("90 80 00 05")).to == 5


def test_the_largest_varint_has_ten_bytes() -> None:
    assert Message.unmarshal(bytes.fromhex("10 ff ff ff ff ff ff ff ff ff 01")).to == 2**64 - 1


def test_the_last_of_several_scalars_wins() -> None:
    message = Message.unmarshal(bytes.fromhex("08 03 10 01 62 01 61 10 02 08 04 62 00 50 01 50 00"))
    assert message == Message(type=MessageType.APP_RESP, to=2, context=b"")


def test_the_last_of_several_scalars_of_an_entry_wins() -> None:
    data = span(0x3A, bytes.fromhex("10 01 22 01 61 08 01 10 02 22 02 62 62 08 02"))
    assert Message.unmarshal(data).entries == (
        Entry(term=2, type=EntryType.CONF_CHANGE_V2, data=b"bb"),
    )


def test_entries_are_appended_wherever_they_stand() -> None:
    data = span(0x3A, b"\x18\x01") + b"\x10\x07" + span(0x3A, b"") + span(0x3A, b"\x18\x02")
    message = Message.unmarshal(data)
    assert message == Message(type=0, to=7, entries=[Entry(index=1), Entry(), Entry(index=2)])


def test_a_snapshot_in_pieces_is_merged() -> None:
    pieces = (
        span(0x0A, b"old"),
        span(0x12, b"\x10\x05" + span(0x0A, b"\x08\x01\x28\x01")),
        span(0x12, b"\x18\x06" + span(0x0A, b"\x08\x02\x10\x03")),
        span(0x0A, b"new"),
    )
    expected = Snapshot(
        data=b"new",
        metadata=SnapshotMetadata(
            index=5, term=6, conf_state=ConfState(voters=[1, 2], learners=[3], auto_leave=True)
        ),
    )
    assert Message.unmarshal(span(0x4A, b"".join(pieces))).snapshot == expected
    assert Message.unmarshal(b"".join(span(0x4A, piece) for piece in pieces)).snapshot == expected


def test_of_a_snapshot_in_pieces_the_last_value_counts_wherever_its_lists_were() -> None:
    """The lists are read later than the rest, from all pieces up to the last that has some."""
    state = span(0x12, span(0x0A, b"\x08\x01\x0a\x02\x02\x03" + b"\x28\x01") + b"\x10\x05\x18\x01")
    later = span(0x0A, b"data") + span(0x12, span(0x0A, b"\x28\x00") + b"\x10\x06\x18\x02")
    first = span(0x0A, b"no") + state
    message = Message.unmarshal(span(0x4A, first) + b"\x10\x07" + span(0x4A, later))
    assert message.to == 7
    assert message.snapshot == Snapshot(
        data=b"data",
        metadata=SnapshotMetadata(
            index=6, term=2, conf_state=ConfState(voters=[1, 2, 3], auto_leave=False)
        ),
    )


def test_entries_may_come_between_all_else() -> None:
    unknown = b"\xa8\x01\x05" + span(0xB2, b"\x3a\x00") + b"\xbb\x01\x3a\x00\xbc\x01"
    entries = [span(0x3A, b"\x18" + bytes([index])) for index in (1, 2, 3)]
    data = unknown + b"\x08\x03" + unknown.join([*entries, b"\x10\x02"]) + unknown
    message = Message.unmarshal(data)
    assert [entry.index for entry in message.entries] == [1, 2, 3]
    assert (message.type, message.to) == (MessageType.APP, 2)


def test_a_buffer_that_is_changed_meanwhile_is_read_within_its_bounds() -> None:
    """A large one is checked without the GIL, and its entries are read once more."""
    good = Message(type=MessageType.APP, entries=[Entry(data=b"x" * 8)] * 10_000).marshal()
    data = bytearray(good)
    is_over = threading.Event()

    def scribble() -> None:
        at = 0
        while not is_over.is_set():
            at = (at + 4099) % len(data)
            data[at] ^= 0x7F
            data[at] = good[at]

    thread = threading.Thread(target=scribble)
    thread.start()
    outcomes = set()
    for _ in range(100):
        try:
            outcomes.add(len(Message.unmarshal(data).entries) <= 10_000)
        except UnmarshalError:
            outcomes.add(True)
    is_over.set()
    thread.join()
    assert outcomes == {True}


def test_conf_state_ids_may_be_packed_unpacked_or_both() -> None:
    unpacked = b"\x08\x01\x08\xac\x02"
    packed = span(0x0A, b"\x03" + varint(2**64 - 1))
    assert conf_state_of(in_conf_state(unpacked)).voters == (1, 300)
    assert conf_state_of(in_conf_state(packed)).voters == (3, 2**64 - 1)
    assert conf_state_of(in_conf_state(unpacked + packed + b"\x08\x04")).voters == (
        1,
        300,
        3,
        2**64 - 1,
        4,
    )


def test_every_list_of_a_conf_state_is_read() -> None:
    data = in_conf_state(b"\x12\x02\x01\x02\x18\x03\x22\x01\x04\x0a\x00\x08\x05")
    assert conf_state_of(data) == ConfState(
        voters=[5], learners=[1, 2], voters_outgoing=[3], learners_next=[4]
    )


def test_an_empty_packed_list_adds_nothing() -> None:
    assert Message.unmarshal(in_conf_state(b"\x0a\x00")).snapshot is None


@pytest.mark.parametrize(
    "value", ["01", "02", "80 02", "80 80 80 80 10", "ff ff ff ff ff ff ff ff ff 01"]
)
def test_any_varint_but_zero_is_true(value: str) -> None:
    assert Message.unmarshal(bytes.fromhex("50" + value)).reject is True
    assert conf_state_of(in_conf_state(bytes.fromhex("28" + value))).auto_leave is True


@pytest.mark.parametrize(
    ("value", "number"),
    [(24, 24), (2**31 - 1, 2**31 - 1), (2**64 - 1, -1), (2**64 - 2**31, -(2**31)), (2**32 + 3, 3)],
)
def test_enums_are_open_and_keep_32_bits(value: int, number: int) -> None:
    data = b"\x08" + varint(value) + span(0x3A, b"\x08" + varint(value))
    message = Message.unmarshal(data)
    assert (message.type, message.entries[0].type) == (number, number)
    if -(2**31) <= number < 0 or number == value:
        assert message.marshal("3.7") == data


def test_the_etcd_3_4_empty_snapshot_is_none() -> None:
    assert Message.unmarshal(in_conf_state(b"\x28\x00")).snapshot is None
    assert Message.unmarshal(span(0x4A, b"")).snapshot is None


def test_a_snapshot_with_empty_data_is_not_none() -> None:
    snapshot = Message.unmarshal(span(0x4A, b"\x0a\x00")).snapshot
    assert snapshot is not None
    assert snapshot.data == b""


def test_absent_and_empty_bytes_are_told_apart() -> None:
    absent = Message.unmarshal(span(0x3A, b""))
    empty = Message.unmarshal(span(0x3A, b"\x22\x00") + b"\x62\x00")
    assert (absent.entries[0].data, absent.context) == (None, None)
    assert (empty.entries[0].data, empty.context) == (b"", b"")


WRONG_WIRE_TYPES = {
    "fixed64 for to": "11 01 02 03 04 05 06 07 08",
    "fixed32 for term": "25 01 02 03 04",
    "bytes for index": "32 02 08 01",
    "varint for entries": "38 05",
    "varint for snapshot": "48 05",
    "varint for context": "60 05",
    "group for type": "0b 10 09 0c",
    "varint for entry data": "3a 02 20 05",
    "varint for snapshot data": "4a 02 08 05",
    "varint for metadata": "4a 02 10 05",
    "bytes for metadata index": "4a 05 12 03 12 01 05",
    "varint for conf state": "4a 04 12 02 08 05",
    "fixed32 for voters": "4a 09 12 07 0a 05 0d 01 02 03 04",
    "bytes for auto_leave": "4a 07 12 05 0a 03 2a 01 01",
}


@pytest.mark.parametrize("text", WRONG_WIRE_TYPES.values(), ids=WRONG_WIRE_TYPES)
def test_a_known_field_of_another_wire_type_is_skipped(text: str) -> None:
    # As newest etcd does; 3.4 refuses the message.
    message, has_unknown, _ = decode(b"\x10\x07" + bytes.fromhex(text) + b"\x18\x08")
    assert isinstance(message, Message)
    assert has_unknown
    assert message.snapshot is None
    assert (message.type, message.to, message.from_) == (0, 7, 8)
    assert all(entry == Entry() for entry in message.entries)


UNKNOWN = {
    "varint": "78 ff 01",
    "fixed64": "79 01 02 03 04 05 06 07 08",
    "bytes": "7a 03 01 02 03",
    "fixed32": "7d 01 02 03 04",
    "empty group": "7b 7c",
    "group": "7b 08 05 12 01 61 7c",
    "groups in a group": "7b 7b 83 01 84 01 7c 0b 0c 7c",
    "largest field number": "f8 ff ff ff 0f 01",
    "vote": "68 05",
    "responses": "72 02 08 04",
}


@pytest.mark.parametrize("text", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("wrap", ["message", "entry", "snapshot", "metadata", "conf_state"])
def test_an_unknown_field_is_skipped_at_every_level(text: str, wrap: str) -> None:
    unknown = bytes.fromhex(text)
    message = Message(
        type=3,
        entries=[Entry(index=1, data=b"x")],
        snapshot=Snapshot(
            data=b"y",
            metadata=SnapshotMetadata(index=2, term=3, conf_state=ConfState(voters=[4])),
        ),
    )

    def insert(level: str, body: bytes) -> bytes:
        # Field 14 is ours to skip everywhere; 13 to 15 are known nowhere else.
        return unknown + body + unknown if level == wrap else body

    state = insert("conf_state", b"\x08\x04")
    metadata = insert("metadata", span(0x0A, state) + b"\x10\x02\x18\x03")
    snapshot = insert("snapshot", span(0x0A, b"y") + span(0x12, metadata))
    entry = insert("entry", b"\x18\x01" + span(0x22, b"x"))
    data = insert("message", b"\x08\x03" + span(0x3A, entry) + span(0x4A, snapshot))
    assert decode(data) == (message, True, 2)


@pytest.mark.parametrize(
    ("text", "has_unknown"),
    [("68 00", False), ("68 80 00", False), ("68 01", True), ("68 01 68 00", True)],
)
def test_a_vote_is_told_of_unless_it_is_zero_as_etcd_3_6_always_sends_it(
    text: str, has_unknown: bool
) -> None:
    assert decode(bytes.fromhex("08 03" + text)) == (Message(type=3), has_unknown, 0)


def test_groups_nest_up_to_the_bound_and_no_deeper() -> None:
    depth = MAX_GROUP_DEPTH
    assert Message.unmarshal(b"\x7b" * depth + b"\x7c" * depth) == Message(type=0)
    error = refusal(b"\x7b" * (depth + 1) + b"\x7c" * (depth + 1))
    assert error.reason == "more than 100 nested groups"
    assert error.field == "Message.15"


def test_a_million_open_groups_do_not_exhaust_the_stack() -> None:
    assert refusal(b"\x7b" * 1_000_000).reason == "more than 100 nested groups"


def test_entries_are_bounded() -> None:
    full = b"\x3a\x00" * MAX_ENTRIES
    assert len(Message.unmarshal(full).entries) == MAX_ENTRIES
    error = refusal(full + b"\x3a\x00")
    assert (error.field, error.offset) == ("Message.entries", len(full) + 2)
    assert error.reason == "more than 131072 entries"


@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_ids_are_bounded_in_each_list(form: str) -> None:
    def ids(count: int) -> bytes:
        return span(0x0A, b"\x01" * count) if form == "packed" else b"\x08\x01" * count

    others = span(0x12, b"\x02" * MAX_IDS)
    state = conf_state_of(in_conf_state(ids(MAX_IDS) + others))
    assert (len(state.voters), len(state.learners)) == (MAX_IDS, MAX_IDS)
    error = refusal(in_conf_state(ids(MAX_IDS + 1)))
    assert error.field == "Message.snapshot.metadata.conf_state.voters"
    assert error.reason == "more than 65536 ids"


@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
@pytest.mark.parametrize(
    "entry",
    [
        Entry(),
        Entry(term=1, index=1),
        Entry(term=1, index=1, data=b"some data"),
        Entry(term=1, index=1, type=EntryType.CONF_CHANGE_V2, data=b""),
    ],
    ids=["empty", "no data", "data", "empty data"],
)
def test_entry(entry: Entry, profile: str) -> None:
    """Upstream writes an entry on its own for a stream; here it only comes in a message."""
    message = Message(type=MessageType.APP, entries=[entry])
    assert Message.unmarshal(message.marshal(profile)).entries == (entry,)
