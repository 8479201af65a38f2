"""What our parsers are held to: protobuf, http.client and h11 on the same bytes.

For the tests of hypothesis and for libFuzzer (README.md). Each check raises when the two differ.
"""

from __future__ import annotations

import contextlib
import http.client
import io
from array import array
from typing import Any

import h11
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from pipeline._core import recognise_204, says_close
from pipeline.config import ReceiverConfig
from pipeline.errors import UnmarshalError
from pipeline.raftpb import raft_pb2
from pipeline.receive._receiver import recognise_post
from pipeline.receive.odd_request import OddRequest, Then
from pipeline.wire._frames import FrameReader, FrameWriter
from pipeline.wire._messages import (
    ConfState,
    EncodedMessage,
    Entry,
    Message,
    Snapshot,
    SnapshotMetadata,
    decode,
)
from tests.support.frames import ModelReader, ModelWriter, plain
from tests.support.http import handlers_of
from tests.support.raft import FakeRaft

PROFILES = ["3.5", "3.6", "3.7"]
SCALARS = {
    "to": "to",
    "from_": "from",
    "term": "term",
    "log_term": "logTerm",
    "index": "index",
    "commit": "commit",
    "reject": "reject",
    "reject_hint": "rejectHint",
}
ID_LISTS = ["voters", "learners", "voters_outgoing", "learners_next"]


def exact(data: bytes) -> array[int]:
    """Copy to memory that ends with the last byte, so that a sanitizer sees one read too many.

    A bytes object has a zero behind its last byte.
    """
    return array("B", data)


def from_protobuf(parsed: raft_pb2.Message) -> Message:
    """What our decoder should make of it."""

    def payload(part: Any, name: str) -> bytes | None:
        value: bytes = getattr(part, name)
        return value if part.HasField(name) else None

    metadata = parsed.snapshot.metadata
    state = metadata.conf_state
    return Message(
        type=parsed.type,
        **{ours: getattr(parsed, theirs) for ours, theirs in SCALARS.items()},
        entries=[
            Entry(type=entry.Type, term=entry.Term, index=entry.Index, data=payload(entry, "Data"))
            for entry in parsed.entries
        ],
        snapshot=Snapshot(
            data=payload(parsed.snapshot, "data"),
            metadata=SnapshotMetadata(
                index=metadata.index,
                term=metadata.term,
                conf_state=ConfState(
                    **{name: getattr(state, name) for name in ID_LISTS},
                    auto_leave=state.auto_leave,
                ),
            ),
        ),
        context=payload(parsed, "context"),
    )


def unmarshal(data: bytes) -> tuple[Message | None, UnmarshalError | None]:
    """Read a message as the core does, or hear why it cannot."""
    try:
        return Message.unmarshal(exact(data)), None
    except UnmarshalError as error:
        return None, error


def explained(data: bytes, error: UnmarshalError | None) -> bool:
    """Tell whether one of the two may refuse what the other reads.

    We refuse a varint whose tenth byte has bits beyond the 64th, as Go does; protobuf drops
    them. We refuse field number 0 wherever it is, as Go does; protobuf lets it pass in a group
    it does not know. The other way round: ``is_beyond_protobuf``.
    """
    if error is not None:
        return error.reason in (
            "a varint of more than 64 bits",
            "a field number outside 1..2**29-1",
        )
    return is_beyond_protobuf(data)


#: Fields that hold messages, and which: of Message, Entry, Snapshot, SnapshotMetadata, ConfState.
_NESTED: dict[str, dict[int, str]] = {
    "message": {7: "entry", 9: "snapshot"},
    "entry": {},
    "snapshot": {2: "metadata"},
    "metadata": {1: "conf_state"},
    "conf_state": {},
}


def is_beyond_protobuf(data: bytes, scope: str = "message", depth: int = 0) -> bool:
    """Tell whether what we can read has something that protobuf may not.

    We read a tag and a length of up to ten bytes, as Go does; protobuf reads up to five. We take
    100 groups in each other wherever they are; protobuf counts the messages around them, too. We
    skip field 14, ``responses``, without looking into it; protobuf looks.
    """

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if data[at - 1] < 0x80:
                return value, at

    at = groups = 0
    while at < len(data):
        tag, begin = varint(at)
        if begin - at > 5:
            return True
        at = begin
        match tag & 7:
            case 0:
                _, at = varint(at)
            case 1 | 5 as kind:
                at += 8 if kind == 1 else 4
            case 2:
                begin = at
                length, at = varint(at)
                if at - begin > 5:
                    return True
                field = tag >> 3
                if groups == 0 and scope == "message" and field == 14:
                    return True
                nested = None if groups else _NESTED[scope].get(field)
                span = data[at : at + length]
                if nested is not None and is_beyond_protobuf(span, nested, depth + 1):
                    return True
                at += length
            case 3:
                groups += 1
                if depth + groups > 100:
                    return True
            case 4:
                groups -= 1
    return False


def _kept_fields() -> type[ProtobufMessage]:
    """Make the class of a message that has the fields which our Message keeps, and no others."""
    schema = FileDescriptorProto()
    raft_pb2.DESCRIPTOR.CopyToProto(schema)
    (message,) = (kind for kind in schema.message_type if kind.name == "Message")
    for field in [field for field in message.field if field.name in ("vote", "responses")]:
        message.field.remove(field)
    del message.oneof_decl[-1]  # what makes ``vote`` optional
    pool = DescriptorPool()
    pool.Add(schema)
    return GetMessageClass(pool.FindMessageTypeByName(raft_pb2.Message.DESCRIPTOR.full_name))


_Kept = _kept_fields()


def has_unknown_fields(data: bytes) -> bool:
    """Tell whether protobuf finds fields in a message, at any depth, that a Message does not keep.

    A ``vote`` of 0, which etcd 3.6 sends with every message, says nothing.
    """
    message: Any = _Kept.FromString(data)
    snapshot = message.snapshot
    metadata = snapshot.metadata
    parts = (*message.entries, snapshot, metadata, metadata.conf_state)
    return any(len(UnknownFieldSet(part)) for part in parts) or any(
        (field.field_number, field.wire_type, field.data) != (13, 0, 0)
        for field in UnknownFieldSet(message)
    )


def check_message(data: bytes) -> None:
    """Check that protobuf reads what we read, and as the same message, and refuses what we refuse,
    but for what is ``explained``; that both see the same unknown fields; that an error says where;
    and that we read what we write.
    """
    ours, error = unmarshal(data)
    theirs = None
    with contextlib.suppress(DecodeError):
        theirs = raft_pb2.Message.FromString(data)
    if ours is not None and theirs is not None:
        assert ours == from_protobuf(theirs)
        assert decode(exact(data)).has_unknown_fields == has_unknown_fields(data)
    elif ours is not None or theirs is not None:
        assert explained(data, error)
    if error is not None:
        assert 0 <= error.offset <= len(data)
        assert error.field.split(".")[0] == "Message"
    if ours is not None:
        for profile in PROFILES:
            assert Message.unmarshal(ours.marshal(profile)) == ours


class Source:
    """As much of a socket as HTTPResponse asks for."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return self.file


def check_answer(data: bytes) -> int:
    """Check that http.client reads what the core recognises as the core does: a 204 that ends at
    the same byte, has no body and keeps the connection, unless the core says that it does not.
    Returns what the core says of it.
    """
    end = recognise_204(exact(data))
    assert -1 <= end <= len(data)
    if end <= 0:
        return end
    source = Source(data)
    response = http.client.HTTPResponse(source, method="POST")  # type: ignore[arg-type]
    response.begin()
    assert response.status == 204
    assert response.version == 11
    assert source.file.tell() == end
    assert says_close(exact(data[:end])) or not response.will_close
    assert response.read() == b""
    assert not response.chunked
    # What comes behind it changes nothing about it, and without its last byte it is not whole.
    assert recognise_204(exact(data[:end])) == end
    assert recognise_204(exact(data[: end - 1])) == 0
    return end


def check_request(data: bytes) -> bool:
    """Check that h11, as a server, reads what the core recognises as the core does: a POST to /raft
    of HTTP/1.1 that ends at the same byte, announces the same length in one Content-Length, is not
    chunked, expects nothing, and leaves the connection open. Returns whether the core recognises
    it.
    """
    result = recognise_post(exact(data))
    if result is None:
        return False
    head_len, length = result
    assert data[head_len - 4 : head_len] == b"\r\n\r\n"
    assert recognise_post(exact(data[:head_len])) == result
    assert recognise_post(exact(data[: head_len - 1])) is None

    body = b"x" * min(length, 3)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data[:head_len] + body)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (b"POST", b"/raft")
    assert request.http_version == b"1.1"
    headers = [(name.lower(), value) for name, value in request.headers]
    assert [int(value) for name, value in headers if name == b"content-length"] == [length]
    assert len([name for name, _ in headers if name == b"host"]) == 1
    names = {name for name, _ in headers}
    assert not names & {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"}
    assert not connection.they_are_waiting_for_100_continue
    if length > 3:
        assert connection.their_state is h11.SEND_BODY
        received = connection.next_event()
        assert isinstance(received, h11.Data)
        assert bytes(received.data) == body
        assert connection.next_event() is h11.NEED_DATA
    else:
        if length:
            received = connection.next_event()
            assert isinstance(received, h11.Data)
            assert bytes(received.data) == body
        assert isinstance(connection.next_event(), h11.EndOfMessage)
        # Not MUST_CLOSE: the connection is kept.
        assert connection.their_state is h11.DONE
    return True


def is_let_through(data: bytes) -> bool:
    """Tell whether the checks ahead of h11 in odd_request.py let a head through to the handlers."""
    config = ReceiverConfig(max_head_bytes=32 * 1024, max_body_bytes=1 << 40)
    handlers = handlers_of(FakeRaft(), config)
    heads: list[bytes] = []

    def learn(head: bytes, sender: int) -> bool:
        heads.append(head)
        return True

    odd = OddRequest(handlers, config, "test", learn)
    out, then = odd.feed(data)
    return bool(heads and then is Then.NEXT) or out.startswith((b"HTTP/1.1 412", b"HTTP/1.1 413"))


def _read_frames(
    reader: FrameReader, data: bytes, piece: int
) -> tuple[list[Message | EncodedMessage], str | None, int]:
    """Read all there is in pieces of so many bytes; why it went no further, and what is left."""
    found: list[Message | EncodedMessage] = []
    for at in range(0, len(data), piece):
        reader.feed(exact(data[at : at + piece]))
        try:
            while (message := reader.read()) is not None:
                found.append(message)
        except UnmarshalError as error:
            return found, error.reason, reader.pending + len(data[at + piece :])
        assert reader.needed > reader.pending
    return found, None, reader.pending


def check_frames(stream: str, data: bytes, piece: int) -> None:
    """Read a stream's bytes in pieces, as messages and as bytes, and write again what was read.

    Held to the model of ``support/frames.py``.
    """
    ends = {"from_": 1, "to": 2}
    expected = ModelReader(stream, 1, 2).read_all(data)
    messages, _, _ = expected
    assert _read_frames(FrameReader(stream, **ends), data, piece) == expected
    encoded, *rest = _read_frames(FrameReader(stream, **ends, encoded=True), data, piece)
    assert [plain(message) for message in encoded] == messages
    assert rest == list(expected[1:])
    # Each frame that was read is written so that the same is read; of our encoders' as the model
    # writes it, of anybody's so that no byte of a message is lost.
    for profile in PROFILES:
        writer = FrameWriter(stream, **ends, profile=profile)
        model = ModelWriter(stream, 1, 2, profile)
        written = [writer.write(message) for message in messages]
        assert written == [model.write(message) for message in messages]
        assert ModelReader(stream, 1, 2).read_all(b"".join(written)) == (messages, None, 0)
    writer = FrameWriter(stream, **ends)
    again = b"".join(writer.write(message) for message in encoded)
    back, reason, left = _read_frames(
        FrameReader(stream, **ends, encoded=True), again, len(again) or 1
    )
    assert (reason, left) == (None, 0)
    for one, other in zip(encoded, back, strict=True):
        assert plain(one) == plain(other)
    # As a message, wherever it is from: written if it is one, and then it is in the frame.
    message, error = unmarshal(data)
    try:
        frame = FrameWriter(stream, **ends).write(EncodedMessage(data, type=0, to=0))
    except UnmarshalError:
        assert error is not None
    else:
        assert ModelReader(stream, 1, 2).read_all(frame) == ([message], None, 0)
