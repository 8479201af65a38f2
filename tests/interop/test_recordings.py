"""The streams that real etcds wrote (data/streams): read to what was in them, written again."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.types import MessageType
from pipeline.wire._chunks import Chunks
from pipeline.wire._frames import FrameReader, FrameWriter
from pipeline.wire._messages import EncodedMessage, Entry, Message
from tests.support.frames import as_link_heartbeat, plain
from tests.support.recordings import Recording, recordings

RECORDINGS = recordings()
each_recording = pytest.mark.parametrize("recording", RECORDINGS, ids=str)


def summary(message: Message | EncodedMessage | None) -> dict[str, Any]:
    """What a recording's description says of a message."""
    assert message is not None
    message = plain(message)
    said: dict[str, Any] = {"type": MessageType(message.type).name}
    for name in ("to", "from_"):
        if getattr(message, name):
            said[name] = f"{getattr(message, name):x}"
    for name in ("term", "log_term", "index", "commit", "reject", "reject_hint"):
        if getattr(message, name):
            said[name] = getattr(message, name)
    if message.context is not None:
        context = message.context
        said["context"] = f"{len(context)} bytes" if len(context) > 64 else context.hex()
    if message.entries:
        said["entries"] = [entry_summary(entry) for entry in message.entries]
    if message.snapshot is not None:
        snapshot, metadata = message.snapshot, message.snapshot.metadata
        state = metadata.conf_state
        said["snapshot"] = {
            "data": None if snapshot.data is None else len(snapshot.data),
            "index": metadata.index,
            "term": metadata.term,
            **{
                name: list(getattr(state, name))
                for name in ("voters", "learners", "voters_outgoing", "learners_next")
            },
            "auto_leave": state.auto_leave,
        }
    return said


def entry_summary(entry: Entry) -> list[int | None]:
    return [entry.type, entry.term, entry.index, None if entry.data is None else len(entry.data)]


def frames_of(recording: Recording) -> list[bytes]:
    """Return the bytes of each frame."""
    body = bytes(Chunks().decode(recording.chunked))
    ends = [frame["end"] for frame in recording.about["frames"]]
    assert ends[-1] == len(body)
    return [body[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def pieces_of(recording: Recording, how: str) -> list[bytes]:
    """Return what is read from the connection, and how: at once, by chunks, by bytes."""
    if how == "at once":
        return [recording.chunked]
    if how == "by bytes":
        return [bytes((byte,)) for byte in recording.chunked]
    pieces, at = [], 0
    for size in recording.about["chunk_sizes"]:
        end = at + len(f"{size:x}\r\n") + size + len("\r\n")
        pieces.append(recording.chunked[at:end])
        at = end
    return [*pieces, recording.chunked[at:]]


def test_there_are_recordings_of_both_streams_of_every_generation() -> None:
    assert {(recording.stream, recording.version[:3]) for recording in RECORDINGS} == {
        (stream, version)
        for stream in ("message", "msgapp")
        for version in ("3.4", "3.5", "3.6", "3.7", "3.8")
    }


@each_recording
@pytest.mark.parametrize("encoded", [False, True], ids=["messages", "encoded messages"])
@pytest.mark.parametrize("how", ["at once", "by chunks", "by bytes"])
def test_what_etcd_wrote_is_read(recording: Recording, how: str, encoded: bool) -> None:
    reader = FrameReader(recording.stream, **recording.members, encoded=encoded)
    chunks = Chunks()
    read = []
    for piece in pieces_of(recording, how):
        reader.feed(chunks.decode(piece))
        while (message := reader.read()) is not None:
            read.append(summary(message))
    assert read == [frame["message"] for frame in recording.about["frames"]]
    assert reader.pending == 0


def is_at_index_0(recording: Recording, frame: bytes) -> bool:
    """Tell of the frames that we write otherwise: of raft 3.7 (docs/wire.md)."""
    return recording.profile == "3.7" and frame[0] == 2 and b"\x28\x00\x30\x00" in frame[:40]


@each_recording
@pytest.mark.parametrize("borrow_min", [0, 1, 100], ids="borrow-min-{}".format)
def test_what_etcd_wrote_is_written_again_byte_for_byte(
    recording: Recording, borrow_min: int
) -> None:
    reader = FrameReader(recording.stream, **recording.members)
    writer = FrameWriter(recording.stream, **recording.members, profile=recording.profile)
    differ = []
    for frame in frames_of(recording):
        reader.feed(frame)
        message = reader.read()
        assert isinstance(message, Message)
        if as_link_heartbeat(message):
            written = writer.heartbeat()
        else:
            written = writer.write(message, borrow_min=borrow_min)
        if written != frame:
            differ.append(frame)
        assert (writer.term, writer.index) == (reader.term, reader.index)
    # Of a message at index 0 raft 3.7 writes two zeros that it has set.
    assert len(differ) <= 1
    assert all(is_at_index_0(recording, frame) for frame in differ)


@each_recording
def test_what_was_read_as_bytes_is_written_as_them(recording: Recording) -> None:
    reader = FrameReader(recording.stream, **recording.members, encoded=True)
    writer = FrameWriter(recording.stream, **recording.members)
    for frame in frames_of(recording):
        reader.feed(frame)
        message = reader.read()
        assert isinstance(message, EncodedMessage)
        if not as_link_heartbeat(plain(message)):
            assert writer.write(message) == frame
