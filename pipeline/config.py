"""Settings, with etcd's defaults where the wire is concerned and bounds where our process is.

Every class is frozen and validates itself: a value out of range raises ``UsageError`` naming
field, value and rule. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from pipeline.arguments import (
    absolute_path,
    require_bool,
    require_instance,
    require_number,
    require_one_of,
    require_whole,
)
from pipeline.errors import UsageError
from pipeline.identity import require_versions
from pipeline.logs import show

__all__ = ["PipelineConfig", "ReceiverConfig", "TransportConfig", "require_rate"]

MIB = 1 << 20

#: A path as Python's own functions take it.
AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Messages up to this size are copied at ``send``; larger payloads are borrowed (design R3).
#: Copying 16 KiB costs about 1 us, less than keeping and giving back a reference.
COPY_LIMIT = 16 * 1024

PROFILES = ("3.5", "3.6", "3.7")
UNREACHABLE_REPORTS = ("every", "change")


def require_rate(name: str, value: object) -> None:
    """Raise ``UsageError`` unless ``value`` is None or a rate in bytes a second."""
    if value is not None:
        require_number(name, value, 1.0, 1e15)


def _require_time_or_zero(name: str, value: object) -> None:
    """Raise ``UsageError`` unless ``value`` is a time in seconds, or 0 for none."""
    require_number(name, value, 0.0, 86400.0)
    if 0 < cast(float, value) < 0.001:
        raise UsageError(f"{name}: {show(value)} is neither 0 nor at least 0.001")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """How one peer's pipeline sends."""

    #: Workers, each with one connection; etcd ``connPerPipeline``. With 1 a message is sent when
    #: the one before it has been answered, or has failed: they arrive in order, but one that failed
    #: or was sent again because its connection broke may arrive late, or twice.
    connections: int = 4
    #: Messages that may wait for a worker; etcd ``pipelineBufSize``, its ``msgc``. A short pause of
    #: the network loses nothing.
    queue_length: int = 64
    #: Bytes that may wait for a worker. One message is let through, however large, when none of its
    #: kind waits; messages up to 64 KiB are not refused for the bytes of larger ones.
    queue_bytes: int = 128 * MIB
    #: Encoding on the wire: "3.5" (etcd 3.4 and 3.5), "3.6" or "3.7".
    profile: str = "3.5"
    #: To look a name up and connect; etcd's peer dial timeout with default election settings.
    dial_timeout_s: float = 2.0
    #: From the last byte written to the first of the answer; none applies to MsgSnap.
    response_timeout_s: float = 30.0
    #: Writing without a byte moving. A slow link is not an error, a stuck one is.
    stall_timeout_s: float = 30.0
    #: A connection unused for this long is not used again: etcd closes it at 5 s.
    idle_timeout_s: float = 4.0
    #: A peer that acknowledges nothing for this long is given up (TCP_INFO, keepalive).
    dead_link_timeout_s: float = 10.0
    #: Seconds. A message that waited longer for a worker is not sent: it fails, and Raft is told.
    #: None, or 0, lets it wait for ever, as etcd does.
    max_queue_age: float | None = None
    #: "every": Raft hears ``report_unreachable`` for every message that fails, as in etcd.
    #: "change": for the first one after a success or the start; of a message refused or expired
    #: only while it has not heard so since. ``report_snapshot`` is never left out.
    unreachable_reports: Literal["every", "change"] = "every"

    def __post_init__(self) -> None:
        require_whole("connections", self.connections, 1, 64)
        require_whole("queue_length", self.queue_length, 1, 1 << 16)
        require_whole("queue_bytes", self.queue_bytes, 1, 1 << 50)
        require_one_of("profile", self.profile, PROFILES)
        for name in ("dial_timeout_s", "response_timeout_s", "stall_timeout_s", "idle_timeout_s"):
            require_number(name, getattr(self, name), 0.001, 86400.0)
        require_number("dead_link_timeout_s", self.dead_link_timeout_s, 1.0, 86400.0)
        if self.max_queue_age is not None:
            _require_time_or_zero("max_queue_age", self.max_queue_age)
        require_one_of("unreachable_reports", self.unreachable_reports, UNREACHABLE_REPORTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverConfig:
    """What a listener accepts, and for how long it waits."""

    #: Body of ``POST /raft``. etcd sets no limit; we do (docs/divergence.md).
    max_body_bytes: int = 512 * MIB
    #: Request line and headers together.
    max_head_bytes: int = 16 * 1024
    #: Calls of ``raft.process`` that may run at once; of no meaning for listeners with an inbox.
    handlers: int = 4
    #: Whether ``raft.process`` is given an ``EncodedMessage``, the bytes as they came, instead of a
    #: ``Message``, which has no room for fields that raftpb does not have (docs/wire.md). Then the
    #: node is also given messages of types that only a later raft knows.
    encoded: bool = False
    #: Open connections. At the limit one in its TLS handshake, or the one idle longest, makes room.
    #: Streams do not count: a peer has two at most, for another one takes the place of the first.
    max_connections: int = 1024
    #: Bytes that bodies above 64 KiB hold in memory while they are read and wait for Raft: of all
    #: listeners of a node, its ASGI and WSGI applications, and the messages of snapshots together.
    #: Above it a listener reads on only the body begun first; chunked bodies, those of ASGI and
    #: WSGI applications and the messages of snapshots are refused with 503. Up to 64 KiB, as many
    #: as connections have a room of their own.
    max_buffered_bytes: int = 1024 * MIB
    #: Without a request, a connection is closed after this long, but for a refused stream's.
    idle_timeout_s: float = 60.0
    #: From the first byte of a request, or the connection, to the end of its head.
    head_timeout_s: float = 5.0
    #: Reading a body without a byte arriving.
    stall_timeout_s: float = 30.0
    #: Bytes per second; 0 for none. A body that falls behind this by what takes
    #: ``stall_timeout_s`` is ended. Four connections over a link of 64 kbit/s have 2 KiB/s each, of
    #: which this is half. To hold all 1,024 by dripping, a caller must send 1 MiB/s.
    min_body_rate: int = 1024
    #: From the connection to the end of its TLS handshake, on an https listener.
    handshake_timeout_s: float = 10.0
    #: Where the databases of received snapshots are stored; None takes no snapshots. A relative
    #: path is made absolute here, so it is read back as an absolute ``str``.
    snapshot_dir: AnyPath | None = None
    #: Snapshots received at once, each on a thread of its own; 503 above it.
    snapshot_receives: int = 4
    #: Bytes of one database; None is no limit.
    snapshot_max_bytes: int | None = None
    #: Bytes of all databases in ``snapshot_dir``, the one arriving included; None is no limit.
    snapshot_dir_max_bytes: int | None = None

    def __post_init__(self) -> None:
        require_whole("max_body_bytes", self.max_body_bytes, 1, 1 << 40)
        require_whole("max_head_bytes", self.max_head_bytes, 256, 32 * 1024)
        require_whole("handlers", self.handlers, 1, 256)
        require_bool("encoded", self.encoded)
        require_whole("max_connections", self.max_connections, 1, 1 << 20)
        require_whole("max_buffered_bytes", self.max_buffered_bytes, 1, 1 << 50)
        require_whole("min_body_rate", self.min_body_rate, 0, 1_000_000_000)
        require_whole("snapshot_receives", self.snapshot_receives, 1, 64)
        for name in ("snapshot_max_bytes", "snapshot_dir_max_bytes"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1, 1 << 62)
        if self.snapshot_dir is not None:
            # The class is frozen; nobody has seen it yet.
            directory = absolute_path("snapshot_dir", self.snapshot_dir)
            object.__setattr__(self, "snapshot_dir", directory)
        for name in ("idle_timeout_s", "head_timeout_s", "stall_timeout_s", "handshake_timeout_s"):
            require_number(name, getattr(self, name), 0.001, 86400.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """A whole node: every peer's pipeline, the receiver, and what they share."""

    #: Of each peer.
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    #: Of every listener.
    receiver: ReceiverConfig = field(default_factory=ReceiverConfig)
    #: Whether small and frequent messages go over streams, as between etcd's members: two
    #: connections in each direction, for as long as they last. False is posts only; who dials us
    #: for a stream is refused so that it stays quiet.
    streams: bool = True
    #: Messages that wait for one stream, of ``PipelineConfig.queue_bytes`` at most; etcd
    #: ``streamBufSize``.
    stream_queue_length: int = 4096
    #: Bytes queued for all peers together.
    queue_bytes: int = 512 * MIB
    #: The etcd version we claim, in X-Server-Version and to ``GET /version``: ``X.Y.0`` of the
    #: etcd members beside us, of the lowest while they differ. It has nothing to do with
    #: ``profile``: members of every version read all three encodings.
    server_version: str = "3.5.0"
    #: X-Min-Cluster-Version; etcd's own value in every 3.x.
    min_cluster_version: str = "3.0.0"
    #: Python threads for odd answers and callbacks, started as they are needed.
    dispatchers: int = 8
    #: Between two probes of a peer; 0 for none. etcd's is its read timeout of 5 s less 1 s.
    probe_interval_s: float = 4.0
    #: Bytes a second of all snapshots together; None for no limit.
    snapshot_rate_limit: float | None = None
    #: From a snapshot's last byte to the answer: the receiver writes gigabytes to its disk first.
    snapshot_answer_timeout_s: float = 600.0
    #: ``stop()`` returns within this, whatever its workers and callbacks do.
    stop_timeout_s: float = 1.0

    def __post_init__(self) -> None:
        require_instance("pipeline", self.pipeline, PipelineConfig)
        require_instance("receiver", self.receiver, ReceiverConfig)
        require_whole("queue_bytes", self.queue_bytes, 1, 1 << 50)
        require_bool("streams", self.streams)
        require_whole("stream_queue_length", self.stream_queue_length, 1, 1 << 16)
        require_whole("dispatchers", self.dispatchers, 1, 256)
        require_versions(self.server_version, self.min_cluster_version)
        _require_time_or_zero("probe_interval_s", self.probe_interval_s)
        require_rate("snapshot_rate_limit", self.snapshot_rate_limit)
        require_number("snapshot_answer_timeout_s", self.snapshot_answer_timeout_s, 0.001, 86400.0)
        require_number("stop_timeout_s", self.stop_timeout_s, 0.01, 3600.0)
