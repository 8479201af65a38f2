"""Frames of etcd's streams, rule by rule (docs/wire.md)."""

from __future__ import annotations

import pytest

from pipeline.errors import MarshalError, UnmarshalError, UsageError
from pipeline.types import EntryType, MessageType
from pipeline.wire._frames import FrameReader, FrameWriter, _write_changed
from pipeline.wire._messages import (
    ConfState,
    EncodedMessage,
    Entry,
    Message,
    Snapshot,
    SnapshotMetadata,
)
from tests.support.frames import LINK_HEARTBEAT, ModelWriter, u64
from tests.support.memory import rss
from tests.support.wire import span

STREAMS = ["message", "msgapp"]
PROFILES = ["3.5", "3.6", "3.7"]
LIMIT = 512 << 20
MAX_ENTRIES = 1 << 17
U64_MAX = 2**64 - 1

each_stream = pytest.mark.parametrize("stream", STREAMS)
each_profile = pytest.mark.parametrize("profile", PROFILES)


def app(index: int, *data: bytes | None, term: int = 1, log_term: int = 1, **more: int) -> Message:
    """Make a MsgApp of entries with these data, from 1 to 2."""
    entries = [
        Entry(term=term, index=index + number, data=one) for number, one in enumerate(data, 1)
    ]
    return Message(
        type=MessageType.APP,
        from_=1,
        to=2,
        term=term,
        log_term=log_term,
        index=index,
        entries=entries,
        **more,
    )


def reader(stream: str = "msgapp", data: bytes = b"", limit: int = LIMIT) -> FrameReader:
    made = FrameReader(stream, from_=1, to=2, limit=limit)
    made.feed(data)
    return made


def writer(stream: str = "msgapp", profile: str = "3.5") -> FrameWriter:
    return FrameWriter(stream, from_=1, to=2, profile=profile)


def refusal(stream: str, data: bytes, limit: int = LIMIT) -> tuple[str, int, str]:
    """Read one frame and hear of the field, the place in the frame, and the reason."""
    frames = reader(stream, data, limit)
    with pytest.raises(UnmarshalError) as caught:
        frames.read()
    return caught.value.field, caught.value.offset, caught.value.reason


# etcd's own tests.


@each_profile
def test_message(profile: str) -> None:
    """TestMessage of rafthttp."""
    messages = [
        Message(
            type=MessageType.APP,
            from_=1,
            to=2,
            term=1,
            log_term=1,
            index=3,
            entries=[Entry(term=1, index=4)],
        ),
        Message(
            type=MessageType.PROP,
            from_=1,
            to=2,
            entries=[Entry(data=b"some data"), Entry(data=b"some data"), Entry(data=b"some data")],
        ),
    ]
    frames = writer("message", profile)
    for message in messages:
        assert reader("message", frames.write(message)).read() == message


def test_message_above_the_limit() -> None:
    """TestMessage's third case: it is written, and not read."""
    message = Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=bytes(1010))])
    frame = writer("message").write(message)
    assert refusal("message", frame, limit=1000) == ("Message", 0, "a frame above the limit")
    assert reader("message", frame, limit=len(frame) - 8).read() == message


@each_profile
def test_msg_app_v2(profile: str) -> None:
    """TestMsgAppV2 of rafthttp; the kinds of its frames besides."""
    some = b"some data"
    sequence = [
        (0, LINK_HEARTBEAT),
        (2, app(0, some, some, some)),
        (1, app(3, some)),
        (0, LINK_HEARTBEAT),
        (1, app(4, some)),
        (2, app(5, some, term=3)),
        (0, LINK_HEARTBEAT),
        (2, app(6, some, term=3, log_term=2)),
        (2, app(7, term=3, log_term=2)),
        (0, LINK_HEARTBEAT),
    ]
    # Upstream's writer is member 1 and its reader member 2, too.
    read, written = reader(), writer(profile=profile)
    kinds = []
    for _, message in sequence:
        frame = written.heartbeat() if message is LINK_HEARTBEAT else written.write(message)
        kinds.append(frame[0])
        read.feed(frame)
        assert read.read() == message
        assert (read.term, read.index) == (written.term, written.index)
    assert kinds == [kind for kind, _ in sequence]


@each_profile
@pytest.mark.parametrize(
    "entry",
    [
        Entry(),
        Entry(term=1, index=1),
        Entry(term=1, index=1, data=b"some data"),
        Entry(type=EntryType.CONF_CHANGE, data=b""),
    ],
    ids=["empty", "term-and-index", "with-data", "present-and-empty-data"],
)
def test_entry(profile: str, entry: Entry) -> None:
    """TestEntry of rafthttp: an entry behind its length."""
    message = app(0, term=0, log_term=0)
    message.entries = (entry,)
    frame = writer(profile=profile).write(message)
    assert frame[0] == 1
    read = reader(data=frame).read()
    assert isinstance(read, Message)
    assert read.entries == (entry,)


# What is written.


def test_the_example_of_etcd_3_4() -> None:
    frames = writer()
    first = frames.write(app(0, b"a"))
    assert (first[:9], len(first)) == (b"\2" + u64(41), 50)
    assert frames.write(app(1, b"b", commit=1)) == bytes.fromhex(
        "01 0000000000000001 0000000000000009 080010011802220162 0000000000000001"
    )


@pytest.mark.parametrize(
    ("profile", "frame"),
    [
        (
            "3.5",
            "000000000000001e 080810001800200028003000 4000 4a0a12080a02280010001800 5000 5800",
        ),
        ("3.6", "0000000000000014 080810001800200028003000 4000 5000 5800 6800"),
        ("3.7", "0000000000000002 0808"),
    ],
)
def test_a_heartbeat_of_each_generation(profile: str, frame: str) -> None:
    assert writer("message", profile).heartbeat() == bytes.fromhex(frame)
    assert writer("msgapp", profile).heartbeat() == b"\0"
    read = reader("message", bytes.fromhex(frame))
    assert (read.read(), read.pending) == (LINK_HEARTBEAT, 0)


def test_a_message_that_carries_the_commit_alone_takes_17_bytes() -> None:
    frames = writer()
    frames.write(app(0, b"a"))
    assert frames.write(app(1, commit=1)) == b"\1" + u64(0) + u64(1)


MORE_THAN_AN_APP = {
    "type": MessageType.APP_RESP,
    "from_": 3,
    "to": 1,
    "term": 2,
    "log_term": 0,
    "index": 2,
    "reject": True,
    "reject_hint": 1,
    "context": b"",
    "snapshot": Snapshot(data=b""),
}


@each_profile
@pytest.mark.parametrize("field", MORE_THAN_AN_APP)
@pytest.mark.parametrize("borrow_min", [0, 1], ids=["copied", "borrowed"])
def test_nothing_that_a_message_says_is_lost(profile: str, field: str, borrow_min: int) -> None:
    """etcd looks at term and index alone, and loses the rest."""
    frames, read = writer(profile=profile), reader()
    read.feed(frames.write(app(0, b"a")))
    read.read()
    message = app(1, b"b", commit=1)
    setattr(message, field, MORE_THAN_AN_APP[field])
    frame = frames.write(message, borrow_min=borrow_min)
    read.feed(frame)
    assert frame[0] == 2
    assert read.read() == message
    assert (read.term, read.index) == (frames.term, frames.index)


@pytest.mark.parametrize(
    "metadata",
    [
        SnapshotMetadata(index=1),
        SnapshotMetadata(term=1),
        SnapshotMetadata(conf_state=ConfState(auto_leave=True)),
        SnapshotMetadata(conf_state=ConfState(learners=[3])),
    ],
    ids=["index", "term", "auto-leave", "ids"],
)
@pytest.mark.parametrize("borrow_min", [0, 1], ids=["copied", "borrowed"])
@each_profile
def test_a_snapshot_that_says_anything_goes_with_its_message(
    profile: str, metadata: SnapshotMetadata, borrow_min: int
) -> None:
    message = app(0, b"a", term=0, log_term=0)
    assert writer(profile=profile).write(message, borrow_min=borrow_min)[0] == 1
    message.snapshot = Snapshot(metadata=metadata)
    frame = writer(profile=profile).write(message, borrow_min=borrow_min)
    assert frame[0] == 2
    assert reader(data=frame).read() == message


def test_what_is_unknown_in_a_message_goes_with_it() -> None:
    data = app(0, b"a", term=0, log_term=0).marshal("3.7") + bytes.fromhex("9a 01 01 2a")
    message = EncodedMessage(data, type=MessageType.APP, to=2)
    assert writer().write(message) == b"\2" + u64(len(data)) + data


@each_stream
@pytest.mark.parametrize("data", [b"\x08", b"malformed garbage", b"\x3a\x02\x08\x80"])
def test_what_is_no_message_is_not_written(stream: str, data: bytes) -> None:
    frames = writer(stream)
    with pytest.raises(UnmarshalError):
        frames.write(EncodedMessage(data, type=MessageType.APP, to=2))
    assert (frames.term, frames.index) == (0, 0)
    assert reader(stream, frames.write(app(0, b"a"))).read() == app(0, b"a")


def test_entries_are_found_wherever_they_stand_in_a_message() -> None:
    """As encoders other than etcd's may write it: with a context, or a commit, between entries."""
    entry = bytes.fromhex("18 01 22 01 61")
    data = bytes.fromhex("40 01") + span(0x3A, entry) + bytes.fromhex("40 02 08 03 18 01 10 02")
    data += span(0x3A, b"") + bytes.fromhex("4a 00")
    frame = writer().write(EncodedMessage(data, type=MessageType.APP, to=2))
    assert frame == b"\1" + u64(2) + u64(len(entry)) + entry + u64(0) + u64(2)
    read = reader(data=frame).read()
    assert read == Message.unmarshal(data)


@each_profile
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_000])
def test_a_payload_that_is_left_where_it_is_makes_the_same_frame(profile: str, size: int) -> None:
    frames = [writer(profile=profile) for _ in range(3)]
    model = ModelWriter("msgapp", 1, 2, profile)
    for message in (
        app(0, b"x" * size, b"a"),
        app(2, b"b", b"y" * size, None, b"z" * size, commit=2),
        app(6, b"y" * size, term=2, commit=2),
    ):
        expected = model.write(message)
        assert frames[0].write(message) == expected
        assert frames[1].write(message, borrow_min=4096) == expected
        assert frames[2].write(message, borrow_min=1) == expected


def spoiled(message: bytes, at: int, piece: str) -> bytes:
    new = bytes.fromhex(piece)
    return message[:at] + new + message[at + len(new) :]


@pytest.mark.parametrize("borrow_min", [1, 20, 1000])
def test_a_message_that_changes_while_it_is_written_writes_nothing_beyond_its_room(
    borrow_min: int,
) -> None:
    """Somebody has given us bytes and not kept his word. A sanitizer looks on."""
    message = app(0, b"a" * 30, b"b" * 5, b"c" * 12, term=0, log_term=0).marshal()
    assert _write_changed(writer(), message, message, borrow_min) == (True, True)
    entries = message.index(b"\x3a")
    for piece in ("3aff", "3a00", "3a7f", "00", "ff" * 12, "3affffffffffffffffff01", "4a"):
        frames = writer()
        after = spoiled(message, entries, piece)
        assert _write_changed(frames, message, after, borrow_min) == (False, False)
        assert (frames.term, frames.index) == (0, 0)
    for at in range(entries, len(message)):
        for piece in ("00", "01", "3a", "7f", "ff"):
            _write_changed(writer(), message, spoiled(message, at, piece), borrow_min)


@each_profile
def test_an_index_that_overflows_wraps_on_both_sides(profile: str) -> None:
    frames, read = writer(profile=profile), reader()
    read.feed(frames.write(app(U64_MAX - 2, b"a")))
    assert read.read() == app(U64_MAX - 2, b"a")
    message = app(U64_MAX - 1)
    message.entries = tuple(Entry(term=1, index=n) for n in (U64_MAX, 0, 1))
    frame = frames.write(message)
    read.feed(frame)
    assert (frame[0], read.read()) == (1, message)
    assert (read.index, frames.index) == (1, 1)
    read.feed(frames.write(app(1, b"b")))
    assert read.read() == app(1, b"b")


def test_messages_of_a_batch_in_reverse_are_read_as_they_come() -> None:
    frames, read = writer(), reader()
    batch = [app(index, b"x") for index in (9, 8, 7, 1, 2)]
    for message in batch:
        read.feed(frames.write(message))
    assert [read.read() for _ in batch] == batch
    assert read.read() is None


def test_a_message_above_the_limit_is_not_written() -> None:
    big = memoryview(bytes(LIMIT))
    message = EncodedMessage(big, type=MessageType.APP, to=2)
    with pytest.raises(UnmarshalError):  # its size is allowed; that it is no message is seen
        writer("message").write(message)
    over = EncodedMessage(memoryview(bytes(LIMIT + 1)), type=MessageType.APP, to=2)
    with pytest.raises(MarshalError):
        writer("message").write(over)


def test_a_stream_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError):
        FrameReader("msgappv2")


# What is read, and how hostile it may be.


@each_stream
def test_a_frame_may_end_anywhere(stream: str) -> None:
    frames = writer(stream)
    messages = [app(0, b"a", b"b"), app(2, b"c", None, b"d", commit=2), app(5, commit=5)]
    data = b"".join(frames.heartbeat() + frames.write(message) for message in messages)
    expected = [part for message in messages for part in (LINK_HEARTBEAT, message)]
    for cut in range(len(data)):
        read = reader(stream, data[:cut])
        found = [message for _ in expected if (message := read.read()) is not None]
        assert read.pending <= cut
        read.feed(data[cut:])
        found += [message for _ in expected if (message := read.read()) is not None]
        assert found == expected
        assert read.pending == 0


@each_stream
def test_how_much_is_needed_is_never_more_than_comes(stream: str) -> None:
    """A loop reads as much without looking at it."""
    frames = writer(stream)
    frames.write(app(0, b"a"))
    frame = frames.write(app(1, b"x" * 300, None, b"y" * 70))
    read = reader(stream)
    needed = 1
    steps = 0
    while read.read() is None:
        assert read.pending < read.needed <= len(frame)
        needed, steps = read.needed, steps + 1
        read.feed(frame[read.pending : needed])
    assert steps <= 2 + 2 * 4
    assert read.pending == 0


@pytest.mark.parametrize(
    ("frame", "needed"),
    [
        ("", 1),
        ("01", 9),
        ("01 0000000000000000", 17),
        ("01 0000000000020000", 25),
        ("01 0000000000000001 00000000 20000000", 17 + LIMIT + 8),
        ("02 00000000 20000000", 9 + LIMIT),
    ],
)
def test_what_is_announced_takes_no_memory(frame: str, needed: int) -> None:
    before = rss()
    readers = [reader(data=bytes.fromhex(frame)) for _ in range(64)]
    assert [one.read() for one in readers] == [None] * 64
    assert {one.needed for one in readers} == {needed}
    assert rss() - before < 32 << 20


@pytest.mark.parametrize(
    ("stream", "frame", "refused"),
    [
        ("message", "0000000020000001", ("Message", 0, "a frame above the limit")),
        ("message", "8000000000000000", ("Message", 0, "a frame above the limit")),
        ("message", "ffffffffffffffff", ("Message", 0, "a frame above the limit")),
        ("message", "0000000000000001 08", ("Message.type", 9, "the input ends inside a value")),
        (
            "message",
            "0000000000000002 0e00",
            ("Message.type", 9, "a wire type that does not exist"),
        ),
        ("msgapp", "03", ("Message", 0, "a kind of frame that does not exist")),
        ("msgapp", "ff", ("Message", 0, "a kind of frame that does not exist")),
        ("msgapp", "02 0000000020000001", ("Message", 1, "a frame above the limit")),
        ("msgapp", "02 ffffffffffffffff", ("Message", 1, "a frame above the limit")),
        ("msgapp", "02 0000000000000002 6205", ("Message.context", 10, "a length past the end")),
        ("msgapp", "01 0000000000020001", ("Message", 1, "more than 131072 entries")),
        ("msgapp", "01 ffffffffffffffff", ("Message", 1, "more than 131072 entries")),
        (
            "msgapp",
            "01 0000000000000001 0000000020000001",
            ("Message", 9, "a frame above the limit"),
        ),
        (
            "msgapp",
            "01 0000000000000001 ffffffffffffffff",
            ("Message", 9, "a frame above the limit"),
        ),
        (
            "msgapp",
            "01 0000000000000001 fffffffffffffff8",
            ("Message", 9, "a frame above the limit"),
        ),
        (
            "msgapp",
            "01 0000000000000001 0000000000000002 2205",
            ("Message.entries.data", 18, "a length past the end"),
        ),
        # The entry that is no entry is seen before the one that is still to come.
        (
            "msgapp",
            "01 0000000000000003 0000000000000000 0000000000000001 08",
            ("Message.entries.type", 26, "the input ends inside a value"),
        ),
        (
            "msgapp",
            "01 0000000000000001 0000000000000001 2c",
            ("Message.entries.5", 18, "an end-group tag that closes no open group"),
        ),
        (
            "msgapp",
            "01 0000000000000001 0000000000000065" + "2b" * 101,
            ("Message.entries.5", 118, "more than 100 nested groups"),
        ),
    ],
)
def test_what_is_no_frame_is_refused_as_soon_as_it_is_seen(
    stream: str, frame: str, refused: tuple[str, int, str]
) -> None:
    data = bytes.fromhex(frame)
    assert refusal(stream, data) == refused
    by_bytes = reader(stream)
    for byte in data[:-1]:
        by_bytes.feed(bytes((byte,)))
        assert by_bytes.read() is None
    by_bytes.feed(data[-1:])
    with pytest.raises(UnmarshalError) as caught:
        by_bytes.read()
    assert (caught.value.field, caught.value.offset, caught.value.reason) == refused


def test_the_entries_of_a_frame_together_have_the_limit() -> None:
    frame = b"\1" + u64(3) + (u64(40) + span(0x22, bytes(38))) * 3
    assert reader(data=frame + u64(0), limit=144 - 8).read() is not None
    assert refusal("msgapp", frame, limit=135) == ("Message", 105, "a frame above the limit")


def test_as_many_entries_as_a_message_may_have_are_read() -> None:
    read = reader(data=b"\1" + u64(MAX_ENTRIES))
    read.feed(u64(0) * MAX_ENTRIES)
    assert read.read() is None
    read.feed(u64(7))
    message = read.read()
    assert isinstance(message, Message)
    assert (len(message.entries), message.commit, read.index) == (MAX_ENTRIES, 7, MAX_ENTRIES)


@each_stream
@pytest.mark.parametrize("encoded", [False, True], ids=["message", "encoded message"])
def test_a_large_payload_is_a_view_of_the_body_it_came_in(stream: str, encoded: bool) -> None:
    """Wherever in it that is: of a frame, not at its beginning."""
    frames = writer(stream)
    read = FrameReader(stream, from_=1, to=2, encoded=encoded)
    large = bytes(range(256)) * 400
    for message in (app(0, b"a", large), app(2, large, b"b", None, commit=2)):
        read.feed(frames.write(message))
        found = read.read()
        if isinstance(found, EncodedMessage):
            assert found.data == message.marshal() or stream == "msgapp"
            assert Message.unmarshal(found.data) == message
        else:
            assert found == message
            views = [entry.data for entry in found.entries if isinstance(entry.data, memoryview)]
            assert views == [large]


def test_what_is_unknown_in_an_entry_is_kept_in_an_encoded_message() -> None:
    entry = bytes.fromhex("18 01 2a 01 61")
    frame = b"\1" + u64(1) + u64(len(entry)) + entry + u64(5)
    frames = FrameReader("msgapp", from_=1, to=2, encoded=True)
    for byte in frame:
        frames.feed(bytes((byte,)))
        message = frames.read()
    assert isinstance(message, EncodedMessage)
    assert message.data == bytes.fromhex("08 03 10 02 18 01") + span(0x3A, entry) + b"\x40\x05"
    assert (message.type, message.from_, message.to) == (MessageType.APP, 1, 2)


@each_profile
def test_the_messages_own_heartbeats_are_not_the_links(profile: str) -> None:
    heartbeat = Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=4)
    frames = writer("message", profile)
    assert reader("message", frames.write(heartbeat)).read() == heartbeat
