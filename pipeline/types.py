"""What users implement, send and are told: the Raft protocol, messages, outcomes."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from pipeline.send._jobs import EncodedMessage
    from pipeline.wire._messages import Message

__all__ = [
    "APP",
    "EntryType",
    "MessageType",
    "ProtobufMessage",
    "Raft",
    "SendResult",
    "Sendable",
    "SnapshotStatus",
]


class MessageType(enum.IntEnum):
    """raftpb ``MessageType``, etcd 3.4 to 3.7; numbers are the wire's (spec section 1.1)."""

    HUP = 0
    BEAT = 1
    PROP = 2
    APP = 3
    APP_RESP = 4
    VOTE = 5
    VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    UNREACHABLE = 10
    SNAP_STATUS = 11
    CHECK_QUORUM = 12
    TRANSFER_LEADER = 13
    TIMEOUT_NOW = 14
    READ_INDEX = 15
    READ_INDEX_RESP = 16
    PRE_VOTE = 17
    PRE_VOTE_RESP = 18
    STORAGE_APPEND = 19
    STORAGE_APPEND_RESP = 20
    STORAGE_APPLY = 21
    STORAGE_APPLY_RESP = 22
    FORGET_LEADER = 23


#: Compared with the type of every message; the member of the enumeration would take longer.
APP = int(MessageType.APP)


class EntryType(enum.IntEnum):
    """raftpb ``EntryType``."""

    NORMAL = 0
    CONF_CHANGE = 1
    CONF_CHANGE_V2 = 2


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
Sendable: TypeAlias = "Message | EncodedMessage | ProtobufMessage"


class SendResult(enum.IntEnum):
    """What became of an offered message at the door. Refusals are counted and reported."""

    ACCEPTED = 0
    QUEUE_FULL = 1
    STOPPED = 2


class SnapshotStatus(enum.IntEnum):
    """How a MsgSnap ended (raft ``SnapshotStatus``)."""

    FINISH = 1
    FAILURE = 2


@runtime_checkable
class Raft(Protocol):
    """What the node implements; called from the library's threads, concurrently.

    Its methods are plain: ``async`` ones are for ``pipeline.aio``. One that raises is logged and
    counted and kills no thread; one that blocks holds up the worker or the connection it was
    called for, nothing else. Source: etcd ``rafthttp.Raft``.
    """

    def process(self, message: Message) -> None:
        """Take a message a peer sent. The peer is answered 204 when this returns.

        Raise ``RequestRejected`` to choose the answer; anything else is answered 500.
        """

    def is_id_removed(self, member_id: int) -> bool:
        """Tell whether the member was removed from the cluster for good.

        Nothing calls it yet. etcd asks when a member dials a stream, and this node refuses
        streams to all alike; a POST is not checked. What a removed member sends is for
        ``process`` to reject.
        """

    def report_unreachable(self, member_id: int) -> None:
        """Learn that a message to the member was not delivered.

        Called for every such message, or less often (``PipelineConfig.unreachable_reports``).
        """

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        """Learn how a MsgSnap to the member ended."""
