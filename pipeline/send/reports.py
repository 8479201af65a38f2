"""Who has to know what became of what was sent to a peer, in etcd's order (spec section 2.4).

Source: etcd rafthttp/pipeline.go ``handle`` and ``post``, snapshot_sender.go ``send``, peer.go
``send``. The two channels differ in one step: a pipeline turns to another URL before the critical
error is told, a snapshot after it.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.callbacks import Callbacks
from pipeline.errors import MemberRemovedError, PipelineError, PostError
from pipeline.raft import AnyRaft
from pipeline.send.picker import URLPicker
from pipeline.send.status import PeerStatus
from pipeline.threads import Once
from pipeline.types import MessageType, SnapshotStatus
from pipeline.wire.protocol import format_id

__all__ = ["Reports"]


class Reports:
    """Tells the outcomes of what was sent to one peer.

    Parameters
    ----------
    peer_id : int
    raft : Raft
        Hears that messages were not delivered, and how snapshots ended.
    picker : URLPicker
        Turns to another URL after a failure.
    status : PeerStatus
        Hears whether the peer can be reached.
    callbacks : Callbacks
        How the application is called on behalf of this peer.
    is_every_told : bool
        Whether Raft hears of every message that was not delivered
        (``PipelineConfig.unreachable_reports``), or only of a peer that was reachable before.
    on_critical_error : callable or None
        Called with a ``MemberRemovedError`` when the peer answers 403.

    Notes
    -----
    Called by the thread that has the outcome: a dispatcher's or a transfer's, never by one that
    sends. It calls the application, so it takes as long as that does.
    """

    def __init__(
        self,
        peer_id: int,
        raft: AnyRaft,
        *,
        picker: URLPicker,
        status: PeerStatus,
        callbacks: Callbacks,
        is_every_told: bool,
        on_critical_error: Callable[[MemberRemovedError], None] | None,
    ) -> None:
        self.callbacks = callbacks
        self._peer_id = peer_id
        self._peer = format_id(peer_id)
        self._raft = raft
        self._picker = picker
        self._status = status
        self._is_every_told = is_every_told
        self._on_critical_error = on_critical_error
        self._removal = Once()  # told by a stream: both are refused for the same reason

    # -- a message by the pipeline

    def delivered(self, kind: int, to: int) -> None:
        """Tell of a message that was answered 204."""
        if not self._status.is_active:
            self._status.activate()
            self.tell_changes()
        if kind == MessageType.SNAP:
            self._tell_snapshot(to, SnapshotStatus.FINISH)

    def failed(
        self, kind: int, to: int, error: PostError, url: str, count: Callable[[], object]
    ) -> None:
        """Tell of a message that was posted to ``url`` and not answered 204.

        ``count`` writes it into the follower's statistics, which comes before Raft hears of it.
        """
        self._picker.unreachable(url)
        self._tell_critical(error)
        is_news = self._status.deactivate("pipeline", "write", error.reason, url=url)
        self.tell_changes()
        count()
        self._tell_unreachable(to, is_news=is_news)
        if kind == MessageType.SNAP:
            self._tell_snapshot(to, SnapshotStatus.FAILURE)

    def not_tried(self, to: int, *, snapshots: int) -> None:
        """Tell of messages that never reached the network: the queue was full, or too slow.

        A success in between need not reach Python, so this is no change by itself: with
        ``unreachable_reports="change"`` it is told unless Raft has heard already that the peer
        cannot be reached. ``snapshots`` of the messages were MsgSnaps.
        """
        self._tell_unreachable(to, is_news=not self._status.is_unreachable)
        for _ in range(snapshots):
            self._tell_snapshot(to, SnapshotStatus.FAILURE)

    # -- a stream

    def stream_up(self) -> None:
        """Note that a stream comes up, in either direction, before anybody may tell of its end.

        Calls nothing of the application's: :meth:`tell_changes` is to follow.
        """
        self._status.activate()

    def stream_refused(self, error: PostError, *, source: str) -> None:
        """Tell of a member that cannot be dialled for its stream, or does not give it."""
        self._picker.unreachable(error.url)
        if not isinstance(error, MemberRemovedError) or self._removal.take():
            self._tell_critical(error)
        self.stream_down("dial", error.reason, source=source, url=error.url)

    def stream_down(
        self, action: str, reason: str, *, source: str, url: str | None = None, messages: int = 0
    ) -> None:
        """Tell that there is no stream, or not any more; ``url`` is that of a dial of ours.

        Of the ``messages`` that failed with it Raft hears as of one, as in etcd.
        """
        is_news = self._status.deactivate(source, action, reason, url=url)
        self.tell_changes()
        if messages:
            self._tell_unreachable(self._peer_id, is_news=is_news)

    # -- a snapshot with its database

    def snapshot_delivered(self) -> None:
        """Tell of a snapshot that was answered 204."""
        self._status.activate()
        self.tell_changes()
        self._tell_snapshot(self._peer_id, SnapshotStatus.FINISH)

    def snapshot_failed(self, error: PipelineError, url: str) -> None:
        """Tell of a snapshot that the peer, or the network, did not take at ``url``."""
        self._tell_critical(error)
        self._picker.unreachable(url)
        is_news = self._status.deactivate("sendMsgSnap", "post", str(error), url=url)
        self.tell_changes()
        self._tell_unreachable(self._peer_id, is_news=is_news)
        self.snapshot_given_up()

    def snapshot_given_up(self) -> None:
        """Tell of a snapshot that ended for reasons of ours, which say nothing of the peer."""
        self._tell_snapshot(self._peer_id, SnapshotStatus.FAILURE)

    # -- single steps

    def _tell_critical(self, error: PipelineError) -> None:
        if isinstance(error, MemberRemovedError) and self._on_critical_error is not None:
            self.callbacks.call("on_critical_error", self._peer, self._on_critical_error, error)

    def tell_changes(self) -> None:
        """Have the application hear of what was noted of the peer."""
        if self._status.changes is not None:
            self._status.changes.tell()

    def _tell_unreachable(self, to: int, *, is_news: bool) -> None:
        if is_news or self._is_every_told:
            self.callbacks.tell(self._raft, "report_unreachable", self._peer, to)

    def _tell_snapshot(self, to: int, status: SnapshotStatus) -> None:
        self.callbacks.tell(self._raft, "report_snapshot", self._peer, to, status)
