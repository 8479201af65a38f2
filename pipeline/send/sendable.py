"""What can be sent: messages of ours, encoded ones, and those of any protobuf schema."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from pipeline.wire._messages import EncodedMessage, Message

__all__ = ["ProtobufMessage", "Sendable"]


class ProtobufMessage(Protocol):
    """A protobuf object of any raftpb schema."""

    @property
    def type(self) -> int:
        """Which kind of message it is; its numbers are ``MessageType``'s."""

    @property
    def to(self) -> int:
        """The member it is for, 64 bits."""

    def SerializeToString(self) -> bytes:
        """Encode it."""


#: What can be sent.
Sendable: TypeAlias = Message | EncodedMessage | ProtobufMessage
