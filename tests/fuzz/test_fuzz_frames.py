"""Frames of streams against a plain model of them (support/frames.py).

Invariant: whatever bytes come, in whatever pieces, are read as the model reads them, and refused
where it does; what is written is what the model writes, is read as what was written, and leaves
both ends with the same term and index.
"""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.types import MessageType
from pipeline.wire._frames import FrameReader, FrameWriter
from pipeline.wire._messages import EncodedMessage, Entry, Message
from tests.fuzz import oracles
from tests.fuzz.test_fuzz_wire import entries, messages, uint64s
from tests.support.frames import ModelReader, ModelWriter, u64

streams = st.sampled_from(["message", "msgapp"])
profiles = st.sampled_from(oracles.PROFILES)
ids = st.sampled_from([0, 1, 2**64 - 1])


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Messages of a stream from 1 to 2, of which many are the MsgApps that are expected next."""
    made = []
    term = index = 0
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.integers(0, 3)) == 0:
            message = draw(messages)
            term = message.term
            index = message.entries[-1].index if message.entries else message.index
        else:
            data = draw(st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=3))
            message = Message(
                type=MessageType.APP,
                from_=1,
                to=2,
                term=term,
                log_term=term,
                index=index,
                commit=draw(uint64s),
                entries=[
                    Entry(term=term, index=(index + n) % 2**64, data=one)
                    for n, one in enumerate(data, 1)
                ],
            )
            index = (index + len(data)) % 2**64
        made.append(message)
    return made


@given(streams, profiles, conversations(), st.sampled_from([0, 1, 20]))
def test_what_is_written_is_the_models_and_is_read(
    stream: str, profile: str, conversation: list[Message], borrow_min: int
) -> None:
    writer = FrameWriter(stream, from_=1, to=2, profile=profile)
    model = ModelWriter(stream, 1, 2, profile)
    reader = FrameReader(stream, from_=1, to=2)
    for message in conversation:
        frame = writer.write(message, borrow_min=borrow_min)
        assert frame == model.write(message)
        reader.feed(frame)
        assert reader.read() == message
        assert (reader.term, reader.index) == (writer.term, writer.index)
        if stream == "msgapp":
            assert (writer.term, writer.index) == (model.state.term, model.state.index)
    assert (reader.read(), reader.pending) == (None, 0)


@given(streams, conversations(), profiles, st.lists(st.integers(0, 400), max_size=6))
def test_a_message_in_pieces_makes_the_same_frame(
    stream: str, conversation: list[Message], profile: str, cuts: list[int]
) -> None:
    """Wherever it was cut."""
    whole = FrameWriter(stream, from_=1, to=2)
    cut = FrameWriter(stream, from_=1, to=2)
    for message in conversation:
        data = message.marshal(profile)
        places = sorted({0, len(data), *(place for place in cuts if place < len(data))})
        pieces = [data[begin:end] for begin, end in itertools.pairwise(places)]
        encoded = EncodedMessage(data, type=0, to=0)
        assert cut.write_segments([*pieces, b""]) == whole.write(encoded)


fragments = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"\0", b"\1", b"\2", b"\3", u64(0), u64(1), u64(3), u64(1 << 63)]),
    st.integers(0, 40).map(u64),
    st.builds(lambda data: u64(len(data)) + data, st.binary(max_size=20)),
    messages.map(lambda message: message.marshal("3.7")).map(lambda data: u64(len(data)) + data),
    entries.map(lambda entry: b"\1" + u64(1) + u64(entry_size(entry)) + entry_bytes(entry)),
)


def entry_bytes(entry: Entry) -> bytes:
    return ModelWriter("msgapp", profile="3.7")._entry(entry)


def entry_size(entry: Entry) -> int:
    return len(entry_bytes(entry))


@given(streams, st.lists(fragments, max_size=8).map(b"".join), st.integers(1, 40))
@example("msgapp", b"\1" + u64(1 << 17), 3)
@example("msgapp", b"\1" + u64((1 << 17) + 1), 3)
def test_bytes_that_nobody_would_send_are_read_as_the_model_reads_them(
    stream: str, data: bytes, piece: int
) -> None:
    oracles.check_frames(stream, data, piece)


@given(st.tuples(ids, ids), st.tuples(ids, ids), uint64s, st.booleans())
def test_kind_01_is_for_those_whom_the_stream_is_between(
    stream: tuple[int, int], members: tuple[int, int], commit: int, encoded: bool
) -> None:
    writes, reads = stream
    from_, to = members
    writer = FrameWriter("msgapp", from_=writes, to=reads, profile="3.7")
    reader = FrameReader("msgapp", from_=writes, to=reads, encoded=encoded)
    message = Message(type=MessageType.APP, from_=from_, to=to, commit=commit)
    frame = writer.write(message)
    reader.feed(frame)
    read = reader.read()
    assert (frame[0] == 1) == (stream == members)
    if isinstance(read, EncodedMessage):
        assert (read.data, read.from_, read.to) == (message.marshal("3.7"), from_, to)
    else:
        assert read == message


def test_the_model_reads_what_it_writes() -> None:
    model, reader = ModelWriter("msgapp", 1, 2), ModelReader("msgapp", 1, 2)
    message = Message(type=MessageType.APP, from_=1, to=2, entries=[Entry(index=1, data=b"a")])
    frame = model.write(message)
    assert reader.read_all(frame + frame[:-1]) == ([message], None, len(frame) - 1)
