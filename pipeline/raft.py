"""The node, as the library calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from pipeline.types import SnapshotStatus

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from pipeline.wire._messages import EncodedMessage, Message

    #: What ``process`` takes.
    Received_contra = TypeVar("Received_contra", contravariant=True, default=Message)
else:
    from typing import TypeVar  # which takes a default from Python 3.13 on

    Received_contra = TypeVar("Received_contra", contravariant=True)

__all__ = ["AnyRaft", "ProcessingRaft", "Raft", "RaftReports", "Received_contra"]


@runtime_checkable
class RaftReports(Protocol):
    """What a node implements that takes its messages from an ``Inbox``.

    Called from the library's threads, concurrently. Its methods are plain: ``async`` ones are for
    ``pipeline.aio``. One that raises is logged and counted and kills no thread; one that blocks
    holds up the worker or the connection it was called for, nothing else. Source: etcd
    ``rafthttp.Raft``.
    """

    def is_id_removed(self, member_id: int) -> bool:
        """Tell whether the member was removed from the cluster for good.

        Asked when a member dials a stream: one that was removed is answered 410, which tells it
        so, and ends it if it is an etcd. The thread that asks lets callers in, so be quick. A POST
        is not checked. What a removed member sends is for ``process`` to reject.
        """

    def report_unreachable(self, member_id: int) -> None:
        """Learn that a message to the member was not delivered.

        Called for every such message, or less often (``PipelineConfig.unreachable_reports``).
        """

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        """Learn how a MsgSnap to the member ended."""


@runtime_checkable
class Raft(RaftReports, Protocol[Received_contra]):
    """What a node implements that has no inbox: it is called with each message.

    But for ``process`` it is what ``RaftReports`` is.

    ``Raft[EncodedMessage]`` is what one implements that has set ``ReceiverConfig.encoded``.
    """

    def process(self, message: Received_contra) -> None:
        """Take a message a peer sent. The peer is answered 204 when this returns.

        Raise ``RequestRejected`` to choose the answer; anything else is answered 500.
        """


#: A node without an inbox. That it takes what ``ReceiverConfig.encoded`` says is its business.
ProcessingRaft: TypeAlias = "Raft[Message] | Raft[EncodedMessage]"
#: A node of any kind.
AnyRaft: TypeAlias = "ProcessingRaft | RaftReports"
