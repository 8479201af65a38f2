"""The node: as the loop calls it, and as the library's threads do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

from pipeline.aio.deliveries import Deliveries, Refused
from pipeline.errors import MemberRemovedError, RequestRejected
from pipeline.logs import get_logger
from pipeline.raft import Received_contra
from pipeline.send.changes import PeerChange
from pipeline.types import MessageType, SnapshotStatus
from pipeline.wire._messages import EncodedMessage, Message
from pipeline.wire.protocol import format_id

__all__ = ["AnyRaft", "Bridge", "ProcessingRaft", "Raft", "RaftReports"]

logger = get_logger(__name__)


class RaftReports(Protocol):
    """What the node implements that has an inbox: as ``pipeline.RaftReports``, plain or ``async``.

    Called on the event loop: one call at a time for one member, in the order in which they came;
    calls for different members run concurrently where they await. A plain method must not block.
    One that waits holds up its member's further calls and a thread of the library. MsgProp and
    ``is_id_removed`` have an order of their own: they wait for no other call of their member, nor
    does any for them.
    """

    def is_id_removed(self, member_id: int) -> Awaitable[bool] | bool:
        """Tell whether the member was removed from the cluster for good.

        Nobody else is let in by a listener until it has answered.
        """

    def report_unreachable(self, member_id: int) -> Awaitable[None] | None:
        """Learn that a message to the member was not delivered."""

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> Awaitable[None] | None:
        """Learn how a MsgSnap to the member ended."""


class Raft(RaftReports, Protocol[Received_contra]):
    """What a node implements that has no inbox, as ``pipeline.Raft``, plain or ``async``.

    ``process`` should not wait for what the same member's next message brings.
    """

    def process(self, message: Received_contra) -> Awaitable[None] | None:
        """Take a message from a peer, which is answered 204 when this has returned.

        ``RequestRejected`` chooses the answer; anything else raised is answered 500. The calls
        are ordered by ``message.from_``, those with a MsgProp apart: it may wait for a leader,
        which the member's other messages bring.
        """


#: A node without an inbox, and one of any kind, as ``pipeline.raft`` has them.
ProcessingRaft: TypeAlias = Raft[Message] | Raft[EncodedMessage]
AnyRaft: TypeAlias = ProcessingRaft | RaftReports


class Bridge:
    """The node as the library's threads know it: ``pipeline.Raft``."""

    def __init__(
        self,
        raft: AnyRaft,
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None,
        on_peer_change: Callable[[PeerChange], Awaitable[None] | None] | None,
    ) -> None:
        self.deliveries = Deliveries()
        self._raft: Any = raft  # its process is called only where it has one
        self._on_critical_error = on_critical_error
        self._on_peer_change = on_peer_change

    def process(self, message: Message | EncodedMessage) -> None:
        try:
            self.deliveries.call(
                message.from_,
                lambda: self._raft.process(message),
                lane="proposals" if message.type == MessageType.PROP else "",
            )
        except Refused:
            # What a listener answers that closes; the message may have been processed.
            raise RequestRejected(503, b"shutting down\n") from None

    def is_id_removed(self, member_id: int) -> bool:
        try:
            return bool(
                self.deliveries.call(
                    member_id, lambda: self._raft.is_id_removed(member_id), lane="questions"
                )
            )
        except Refused:
            return False

    def report_unreachable(self, member_id: int) -> None:
        self._report(member_id, lambda: self._raft.report_unreachable(member_id))

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self._report(member_id, lambda: self._raft.report_snapshot(member_id, status))

    def critical_error(self, error: MemberRemovedError) -> None:
        callback = self._on_critical_error
        assert callback is not None
        self._report(error.peer_id, lambda: callback(error))

    def peer_change(self, change: PeerChange) -> None:
        callback = self._on_peer_change
        assert callback is not None
        self._report(change.member_id, lambda: callback(change))

    def _report(self, member_id: int, function: Callable[[], Awaitable[None] | None]) -> None:
        try:
            self.deliveries.call(member_id, function, is_report=True)
        except Refused:
            peer = format_id(member_id)
            text = "nobody is told of peer %s: the loop has ended"
            logger.debug(text, peer, peer=peer, reason="the loop has ended")
