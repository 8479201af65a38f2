"""Sending: settings, a Transport and its peers, a Pipeline on its own, statistics, errors."""

import array
import mmap
from pathlib import Path
from typing import assert_type

from pipeline import (
    EncodedMessage,
    FollowerStats,
    MemberRemovedError,
    Message,
    MessageType,
    PeerChange,
    PeerState,
    Pipeline,
    PipelineConfig,
    PipelineStats,
    Raft,
    SendResult,
    SnapshotProgress,
    SnapshotTransfer,
    Transport,
    TransportConfig,
    format_id,
    parse_id,
)
from pipeline.raftpb import raft_pb2


def on_peer_change(change: PeerChange) -> None:
    member_id, state, reason = change
    assert_type(member_id, int)
    assert_type(state, PeerState)
    assert_type(reason, str)


def on_critical_error(error: MemberRemovedError) -> None:
    assert_type(error.peer_id, int)
    assert_type(error.url, str)
    assert_type(error.status, int | None)


def through_a_transport(raft: Raft, message: Message) -> int:
    config = TransportConfig(
        pipeline=PipelineConfig(connections=2, profile="3.6", dial_timeout_s=1),
        queue_bytes=1 << 20,
    )
    with Transport(
        1,
        0x77,
        raft,
        peer_urls=["http://127.0.0.1:2380"],
        config=config,
        on_critical_error=on_critical_error,
        on_peer_change=on_peer_change,
    ) as transport:
        assert_type(transport, Transport)
        transport.add_peer(2, ("http://127.0.0.1:2381",))
        transport.update_peer(2, {"http://127.0.0.1:2382"})
        assert_type(transport.send([message]), int)
        transport.send([message, EncodedMessage(b"", type=MessageType.APP, to=2)])
        transport.send([raft_pb2.Message(type=raft_pb2.MsgApp, to=2)])
        transport.send(message)  # type: ignore[arg-type]
        transport.send([b"bytes"])  # type: ignore[list-item]
        assert_type(format_id(parse_id("2")), str)
        assert_type(transport.stats(), dict[int, PipelineStats])
        assert_type(transport.peer_stats()[2].server_version, str | None)
        assert_type(transport.follower_stats(), dict[int, FollowerStats])
        assert_type(transport.active_since(2), float | None)
        assert_type(transport.active_peers(), int)
        assert_type(transport.remove_peer(2), int)
        assert_type(transport.remove_all_peers(), int)
        return transport.stop()


def a_snapshot(transport: Transport, message: Message, path: Path) -> None:
    def on_progress(progress: SnapshotProgress) -> None:
        assert_type(progress.sent_bytes, int)

    transfer = transport.send_snapshot(message, path, on_progress=on_progress)
    assert_type(transfer, SnapshotTransfer)
    assert_type(transfer.progress.rate_bytes_per_s, float)
    transfer.add_done_callback(lambda ended: ended.cancel())
    transfer.result(1.5)
    with path.open("rb") as file:
        transport.send_snapshot(message, file)
    transport.send_snapshot(message, (bytes(10) for _ in range(3)), size=30)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0) as mapping:
        transport.send_snapshot(message, mapping)
    transport.send_snapshot(message, array.array("d", [1.0]))
    transport.send_snapshot(message, 5)  # type: ignore[arg-type]
    transport.set_snapshot_rate_limit(None)


def through_a_pipeline(raft: Raft, message: Message) -> SendResult:
    with Pipeline(2, ["http://127.0.0.1:2380"], raft, member_id=1, cluster_id=0x77) as pipeline:
        assert_type(pipeline, Pipeline)
        encoded = EncodedMessage(message.marshal(), type=MessageType.APP, to=2)
        assert_type(encoded.data is not None, bool)
        pipeline.send(encoded)
        pipeline.send(raft_pb2.Message(type=raft_pb2.MsgApp, to=2))
        pipeline.send(b"bytes")  # type: ignore[arg-type]
        books = pipeline.stats()
        assert_type(books.offered - books.accepted - books.refused, int)
        assert_type(pipeline.follower_stats().latency_stddev_ms, float)
        return pipeline.send(message)


PipelineConfig(4)  # type: ignore[call-arg]
PipelineConfig(connections="4")  # type: ignore[arg-type]
EncodedMessage(b"", to=2)  # type: ignore[call-arg]
