"""What a node has counted, at one instant: what metrics are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pipeline.receive.received import ReceivedCounts
    from pipeline.send.status import LastError
    from pipeline.snapshot.receiver import SnapshotCounts
    from pipeline.snapshot.sender import SnapshotSendCounts
    from pipeline.stats import Histogram, InboxStats, PipelineStats, ReceiverStats, StreamStats

__all__ = ["ChannelSnapshot", "NodeSnapshot", "PeerSnapshot"]


class ChannelSnapshot(NamedTuple):
    """What there is of one way to a peer."""

    #: "pipeline", or the kind of a stream: "msgapp" or "message".
    name: str
    books: PipelineStats
    #: Messages that may wait for it.
    queue_length: int
    #: Bytes that may wait for it.
    queue_bytes: int


class PeerSnapshot(NamedTuple):
    """What there is of one peer."""

    #: The member; 64 bits.
    peer_id: int
    #: Whether the last thing heard of it was a success.
    is_active: bool
    #: Changes from active to inactive.
    disconnects: int
    #: Its books, of all channels together.
    books: PipelineStats
    #: Each of its channels.
    channels: tuple[ChannelSnapshot, ...]
    #: How many failures there were, by verdict.
    errors: dict[str, int]
    #: The last of them; None before the first.
    last_error: LastError | None
    #: What its transfers of snapshots came to.
    snapshots: SnapshotSendCounts
    #: Calls of the application on its behalf that raised.
    callback_errors: int
    #: Its streams; empty without any.
    streams: tuple[StreamStats, ...]


class NodeSnapshot(NamedTuple):
    """What there is of a node. Each part balances in itself; they are read one after the other."""

    #: Ours; 64 bits.
    member_id: int
    #: Calls of the application that raised, those on behalf of peers included.
    callback_errors: int
    #: Its peers; remotes are none.
    peers: tuple[PeerSnapshot, ...]
    #: Bytes queued for all peers and remotes, and how many may be.
    queued_bytes: int
    queue_bytes: int
    #: Round trips of probes in seconds, by member ID; empty without probing.
    round_trips: dict[int, Histogram]
    #: Whether the last probe was answered, by member ID; without those not probed yet.
    answers_probes: dict[int, bool]
    #: What came in, by posts and by streams.
    received: ReceivedCounts
    #: What became of snapshots, by From.
    received_snapshots: dict[str, SnapshotCounts]
    #: Bytes of databases that have been written to the disk, those given up included.
    received_snapshot_bytes: int
    #: Of databases that are arriving: still to come; None if one does not say how long it is.
    received_snapshot_left_bytes: int | None
    #: Seconds to store a database, and those of its fsync; None without a ``snapshot_dir``.
    stores: tuple[Histogram, Histogram] | None
    #: Seconds since the epoch; None without TLS.
    certificate_expires_at: float | None
    #: By URL, of each listener that is open.
    listeners: tuple[tuple[str, ReceiverStats], ...]
    #: Of the inbox, which other nodes may use as well; None without one.
    inbox: InboxStats | None
