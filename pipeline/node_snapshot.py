"""What a node has counted, at one instant: what metrics are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pipeline.receive.received import ReceivedCounts
    from pipeline.snapshot.receiver import SnapshotCounts
    from pipeline.snapshot.sender import SnapshotSendCounts
    from pipeline.stats import Histogram, InboxStats, PipelineStats, ReceiverStats, StreamStats

__all__ = ["NodeSnapshot", "PeerSnapshot"]


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
    #: Round trips of probes in seconds, by member ID; empty without probing.
    round_trips: dict[int, Histogram]
    #: What came in, by posts and by streams.
    received: ReceivedCounts
    #: What became of snapshots, by From.
    received_snapshots: dict[str, SnapshotCounts]
    #: Seconds to store a database, and those of its fsync; None without a ``snapshot_dir``.
    stores: tuple[Histogram, Histogram] | None
    #: Seconds since the epoch; None without TLS.
    certificate_expires_at: float | None
    #: By URL, of each listener that is open.
    listeners: tuple[tuple[str, ReceiverStats], ...]
    #: Of the inbox, which other nodes may use as well; None without one.
    inbox: InboxStats | None
