"""Messages: fields, payloads of any buffer, encoding and decoding."""

from typing import assert_type

from pipeline import (
    ConfState,
    EncodedMessage,
    Entry,
    EntryType,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    UnmarshalError,
)

metadata = SnapshotMetadata(conf_state=ConfState(voters=[1, 2], learners=(3,)), index=9, term=2)
message = Message(
    type=MessageType.SNAP,
    to=2,
    from_=1,
    entries=[Entry(term=1, index=1, type=EntryType.NORMAL, data=bytearray(b"x"))],
    snapshot=Snapshot(data=memoryview(b"y"), metadata=metadata),
    context=b"",
)
assert_type(message.entries, tuple[Entry, ...])
assert_type(message.snapshot, Snapshot | None)
assert_type(message.type, MessageType | int)
assert_type(metadata.conf_state.voters, tuple[int, ...])
assert_type(message.marshal("3.7"), bytes)
assert_type(message.byte_size(profile="3.6"), int)
assert_type(Message.unmarshal(bytearray()), Message)

try:
    Message.unmarshal(memoryview(b"\x08"))
except UnmarshalError as error:
    assert_type(error.field, str)
    assert_type(error.offset, int)

Message()  # type: ignore[call-arg]
Message(MessageType.APP)  # type: ignore[call-arg]
Message(type=MessageType.APP, entries=[b"x"])  # type: ignore[list-item]
Entry(data="text")  # type: ignore[arg-type]
Message.unmarshal("text")  # type: ignore[arg-type]
message.entries = (Entry(),)
message.snapshot = None
message.term = "1"  # type: ignore[assignment]

encoded = EncodedMessage.unmarshal(message.marshal())
assert_type(encoded, EncodedMessage)
assert_type(encoded.type, MessageType | int)
assert_type((encoded.to, encoded.from_, encoded.term, len(encoded)), tuple[int, int, int, int])
EncodedMessage(encoded.data, type=encoded.type, to=3, from_=encoded.from_, term=encoded.term)
EncodedMessage("text", type=3, to=2)  # type: ignore[arg-type]
encoded.to = 3  # type: ignore[misc]
