"""The frames of etcd's streams in plain Python: what ``_frames.pxd`` is held to.

Written from docs/wire.md. Protobuf is left to ``Message``, which has tests of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from pipeline.errors import UnmarshalError
from pipeline.types import MessageType
from pipeline.wire._messages import EncodedMessage, Entry, Message
from tests.support.wire import span

LIMIT = 512 << 20
MAX_ENTRIES = 1 << 17

LINK_HEARTBEAT = Message(type=MessageType.HEARTBEAT)

#: Of a frame that is refused for its framing; UnmarshalError says the same.
FRAMING_REASONS = {
    "kind": "a kind of frame that does not exist",
    "limit": "a frame above the limit",
    "count": f"more than {MAX_ENTRIES} entries",
}


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def as_link_heartbeat(message: Message) -> Message | None:
    if (message.type, message.from_, message.to) == (MessageType.HEARTBEAT, 0, 0):
        return message
    return None


class Incomplete(Exception):
    """The frame is not whole."""


class Refused(Exception):
    """It is no frame; the reason is the argument."""


@dataclass
class State:
    """What both ends of a msgapp stream know."""

    term: int = 0
    index: int = 0

    def after(self, message: Message) -> None:
        self.term = message.term
        self.index = message.entries[-1].index if message.entries else message.index


@dataclass
class ModelReader:
    """Reads frames from the first byte on, each time it is asked."""

    stream: str
    from_: int = 0
    to: int = 0
    limit: int = LIMIT
    state: State = field(default_factory=State)

    def read_all(self, data: bytes) -> tuple[list[Message], str | None, int]:
        """Return the messages, why it went no further if that was a fault, and the bytes left."""
        messages = []
        while data:
            try:
                message, used = self._read(data)
            except Incomplete:
                return messages, None, len(data)
            except Refused as refused:
                return messages, str(refused), len(data)
            messages.append(message)
            data = data[used:]
        return messages, None, 0

    def _read(self, data: bytes) -> tuple[Message, int]:
        at = 0

        def take(n: int) -> bytes:
            nonlocal at
            if len(data) - at < n:
                raise Incomplete
            at += n
            return data[at - n : at]

        def number() -> int:
            return int(struct.unpack(">Q", take(8))[0])

        kind = take(1)[0] if self.stream == "msgapp" else 2
        if kind == 0:
            return LINK_HEARTBEAT, at
        if kind == 2:
            length = number()
            if length > self.limit:
                raise Refused(FRAMING_REASONS["limit"])
            message = self._unmarshal(take(length))
            self.state.after(message)
            return message, at
        if kind != 1:
            raise Refused(FRAMING_REASONS["kind"])
        count = number()
        if count > MAX_ENTRIES:
            raise Refused(FRAMING_REASONS["count"])
        entries: list[Entry] = []
        for _ in range(count):
            length = number()
            if at - 17 + length > self.limit:
                raise Refused(FRAMING_REASONS["limit"])
            entries += self._unmarshal(span(0x3A, take(length))).entries
        message = Message(
            type=MessageType.APP,
            from_=self.from_,
            to=self.to,
            term=self.state.term,
            log_term=self.state.term,
            index=self.state.index,
            entries=entries,
            commit=number(),
        )
        self.state.index = (self.state.index + count) % 2**64
        return message, at

    @staticmethod
    def _unmarshal(data: bytes) -> Message:
        try:
            return Message.unmarshal(data)
        except UnmarshalError as error:
            raise Refused(error.reason) from None


@dataclass
class ModelWriter:
    """Writes frames."""

    stream: str
    from_: int = 0
    to: int = 0
    profile: str = "3.5"
    state: State = field(default_factory=State)

    def write(self, message: Message, encoded: bytes | None = None) -> bytes:
        """Return the frame of a message, whose bytes are these if they are not our encoder's."""
        if encoded is None:
            encoded = message.marshal(self.profile)
        if self.stream == "message":
            return u64(len(encoded)) + encoded
        expected = Message(
            type=MessageType.APP,
            from_=self.from_,
            to=self.to,
            term=self.state.term,
            log_term=self.state.term,
            index=self.state.index,
            entries=message.entries,
            commit=message.commit,
        )
        if message != expected:
            self.state.after(message)
            return b"\2" + u64(len(encoded)) + encoded
        self.state.index = (self.state.index + len(message.entries)) % 2**64
        entries = [self._entry(entry) for entry in message.entries]
        return b"".join(
            [b"\1", u64(len(entries))]
            + [u64(len(entry)) + entry for entry in entries]
            + [u64(message.commit)]
        )

    def _entry(self, entry: Entry) -> bytes:
        """Encode an entry: what a message of it alone has more than one of nothing."""
        holder = Message(type=0, entries=[entry]).marshal(self.profile)
        bare = Message(type=0).marshal(self.profile)
        if self.profile == "3.7":
            field_7 = holder
        else:
            head = len(bytes.fromhex("080010001800200028003000"))
            field_7 = holder[head : head + len(holder) - len(bare)]
        size, shift, at = 0, 0, 1
        while True:
            size |= (field_7[at] & 0x7F) << shift
            shift += 7
            at += 1
            if field_7[at - 1] < 0x80:
                break
        assert len(field_7) == at + size
        return field_7[at:]


def plain(message: Message | EncodedMessage) -> Message:
    """Return a message as fields, however it was read."""
    return Message.unmarshal(message.data) if isinstance(message, EncodedMessage) else message
