"""A peer: a remote member, and which channel carries a message to it.

Source: etcd rafthttp/peer.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.locks import lock_of
from pipeline.logs import Throttle, get_logger
from pipeline.node_snapshot import ChannelSnapshot, PeerSnapshot
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.send.sendable import Sendable
from pipeline.send.status import LastError
from pipeline.snapshot.sender import SnapshotSender
from pipeline.stats import FollowerStats, PipelineStats, StreamStats
from pipeline.stream._streams import Channels
from pipeline.stream.streams import PeerStreams
from pipeline.stream.writer import StreamWriter
from pipeline.types import MessageType, SendResult
from pipeline.wire.protocol import format_id

__all__ = ["Peer", "PeerStats"]

logger = get_logger(__name__)


class PeerStats(NamedTuple):
    """What there is to tell of a peer besides its books."""

    #: When it last became active, seconds since the epoch; None while it is inactive.
    active_since: float | None
    #: Changes from active to inactive (etcd ``disconnected_peers_total``).
    disconnects: int
    #: Whether messages to it, and what comes by its streams, are dropped (``Transport.pause``,
    #: ``cut_peer``).
    is_paused: bool
    #: Messages dropped because it was paused. They are not in the books, for they were never
    #: offered.
    paused_drops: int
    #: The last failure to send to it: why, when, and how often in a row. None before the first.
    last_error: LastError | None
    #: The etcd version it claims, with what it sends or answers; None before it has said so.
    server_version: str | None = None
    #: Its streams, in both directions, up or down; empty with ``TransportConfig(streams=False)``.
    streams: tuple[StreamStats, ...] = ()


class Peer:
    """One remote member: its URLs, its status, its channels.

    Parameters
    ----------
    pipeline : PeerPipeline
        Carries its messages; its picker and status are the peer's.
    snapshots : SnapshotSender
        Carries its databases.
    dispatcher : Dispatcher
        Tells Raft of what was refused.
    streams : PeerStreams or None
        Its streams; without them the pipeline carries everything.

    Notes
    -----
    Thread-safe, also for a signal's handler that interrupts one of its methods.

    Attributes
    ----------
    is_stopping : bool
        Whether ``stop_begin`` was called.
    """

    def __init__(
        self,
        pipeline: PeerPipeline,
        snapshots: SnapshotSender,
        dispatcher: Dispatcher,
        streams: PeerStreams | None = None,
    ) -> None:
        self.peer_id = pipeline.peer_id
        self.picker = pipeline.picker
        self.status = pipeline.status
        self.pipeline = pipeline
        self.snapshots = snapshots
        self.streams = streams
        writers = {} if streams is None else streams.writers
        #: Takes a message to what carries it: a stream, or the pipeline.
        self.channels = Channels(
            pipeline, writers.get("msgapp"), writers.get("message"), self._note_full
        )
        self._dispatcher = dispatcher
        self._throttle = Throttle(
            logger.about(
                local=format_id(pipeline.identity.member_id), peer=format_id(pipeline.peer_id)
            )
        )
        self._lock = lock_of(self)  # guards what follows
        self._refused = 0  # messages, not told to Raft yet
        self._refused_snapshots = 0
        self.is_stopping = False

    def start(self) -> None:
        """Start the channels. Once."""
        self.pipeline.start()
        if self.streams is not None:
            self.streams.start()

    def send(self, message: Sendable) -> SendResult | None:
        """Offer a message to its channel without waiting; None if it was dropped while paused.

        A full channel refuses it, and Raft is told, soon, from a dispatcher thread: a Raft that
        sends while it holds a lock must not be called back in the same call. Raft is not told of
        what is dropped while paused: to it, as in etcd, such a message is lost on the network.
        Source: etcd ``peer.send``.
        """
        return self.channels.send(message)

    def pause(self) -> None:
        """Drop what is sent, and what comes by streams, from now on. Twice is once.

        What was queued before still goes.
        """
        self._set_paused(is_paused=True)

    def resume(self) -> None:
        """Undo :meth:`pause`, however often it was called."""
        self._set_paused(is_paused=False)

    def _set_paused(self, *, is_paused: bool) -> None:
        self.channels.is_paused = is_paused
        if self.streams is not None:
            self.streams.pause(is_paused=is_paused)

    def update(self, urls: Iterable[str]) -> None:
        """Go to other URLs from now on; ``UsageError`` for a bad one."""
        self.pipeline.update(urls)
        if self.streams is not None:
            self.streams.retry()

    def stats(self) -> PeerStats:
        """Return what there is to tell besides ``books()``."""
        status = self.status
        return PeerStats(
            status.active_since,
            status.disconnects,
            self.channels.is_paused,
            self.channels.paused_drops,
            status.last_error,
            streams=() if self.streams is None else self.streams.stats(),
        )

    def snapshot(self) -> PeerSnapshot:
        """Return what is counted of it, for metrics."""
        writers = {} if self.streams is None else self.streams.writers
        carriers: dict[str, PeerPipeline | StreamWriter] = {"pipeline": self.pipeline, **writers}
        channels = tuple(
            ChannelSnapshot(name, carrier.stats(), carrier.queue_length, carrier.queue_bytes)
            for name, carrier in carriers.items()
        )
        books = channels[0].books
        for channel in channels[1:]:
            books = books.merged(channel.books)
        return PeerSnapshot(
            self.peer_id,
            self.status.is_active,
            self.status.disconnects,
            books,
            channels,
            self.status.errors(),
            self.status.last_error,
            self.snapshots.counts(),
            self.pipeline.callback_errors,
            () if self.streams is None else self.streams.stats(),
        )

    def books(self) -> PipelineStats:
        """Return the books of all its channels together; they balance, as those of each do."""
        books = self.pipeline.stats()
        for writer in () if self.streams is None else self.streams.writers.values():
            books = books.merged(writer.stats())
        return books

    def follower_stats(self) -> FollowerStats:
        """Return what became of MsgApp messages, whatever carried them."""
        stats = self.pipeline.follower_stats()
        for other in () if self.streams is None else self.streams.follower_stats():
            stats = stats.merged(other)
        return stats

    def retire_connections(self) -> None:
        """Replace connections that were made with credentials that are replaced."""
        self.pipeline.retire_connections()
        if self.streams is not None:
            self.streams.renew()

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the snapshots that the parent sends."""
        self.snapshots.forget_after_fork()

    def stop_begin(self) -> int:
        """Stop all channels without waiting; the number of messages dropped."""
        self.is_stopping = True
        # First, for from then on no change of the peer is told: a snapshot that is ended fails.
        dropped = self.pipeline.stop_begin()
        if self.streams is not None:
            dropped += self.streams.stop_begin()
        self.snapshots.stop_begin()
        return dropped

    def stop_end(self, deadline: float) -> None:
        """Wait until ``deadline`` (``time.monotonic()``) for what :meth:`stop_begin` ended."""
        if self.streams is not None:
            self.streams.stop_end(deadline)
        self.pipeline.stop_end(deadline)
        self.snapshots.stop_end(deadline)

    def _note_full(self, message: Sendable) -> None:
        with self._lock:
            is_first = self._refused == 0
            self._refused += 1
            self._refused_snapshots += message.type == MessageType.SNAP
        if is_first:
            self._dispatcher.call_soon(self._report_full)
        channel = self.channels.name_for(message)
        self._throttle.warning(
            "dropped internal Raft message since sending buffer is full "
            "(overloaded network): type %s, to %s, channel %s",
            message.type,
            format_id(self.peer_id),
            channel,
            channel=channel,
            reason="sending buffer is full",
        )

    def _report_full(self) -> None:
        # Differs from etcd: refusals while a report waits for its thread are told as one.
        with self._lock:
            self._refused = 0
            snapshots, self._refused_snapshots = self._refused_snapshots, 0
        self.pipeline.reports.not_tried(self.peer_id, snapshots=snapshots)
