"""Which channel carries a message (spec 4.1), and what a full one does (spec 4.2).

Of one Peer; what a Transport does with its peers is in test_transport.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline import MessageType, PipelineConfig, SnapshotStatus, UsageError
from pipeline.peer import Peer
from pipeline.send.dispatcher import Dispatcher
from pipeline.types import SendResult
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, message, peer_to
from tests.support.server import ScriptedServer


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    import time

    dispatcher = Dispatcher("1", queue_bytes=1 << 20, max_threads=4)
    dispatcher.start()
    yield dispatcher
    dispatcher.stop(time.monotonic() + LONG_TIMEOUT)


def start_peer(
    url: str, dispatcher: Dispatcher, raft: FakeRaft, config: PipelineConfig | None = None
) -> Peer:
    peer = peer_to(url, dispatcher, raft, config)
    peer.start()
    return peer


def stop(peer: Peer) -> None:
    import time

    peer.stop_begin()
    peer.stop_end(time.monotonic() + LONG_TIMEOUT)


@pytest.mark.parametrize(
    "type_", [MessageType.APP, MessageType.PROP, MessageType.SNAP, MessageType.HEARTBEAT]
)
def test_peer_pick(type_: MessageType, dispatcher: Dispatcher) -> None:
    """The four cases of TestPeerPick in which no stream is working."""
    with ScriptedServer() as server:
        peer = start_peer(server.url, dispatcher, FakeRaft())
        assert peer.streams is None
        assert peer.send(message(type_)) is SendResult.ACCEPTED
        server.wait_requests(1)
        stop(peer)


def test_a_full_channel_is_told_to_raft_once_per_burst_and_leaves_the_status_alone(
    dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    raft = FakeRaft()
    with ScriptedServer() as server:
        peer = start_peer(
            server.url, dispatcher, raft, PipelineConfig(connections=1, queue_length=1)
        )
        peer.send(message())
        server.wait_requests(1)
        peer.pipeline.status.activate()
        server.script = server.hold
        peer.send(message())
        server.wait_requests(2)
        peer.send(message())
        results = [peer.send(message(MessageType.SNAP)) for _ in range(5)]
        assert results == [SendResult.QUEUE_FULL] * 5
        assert raft.wait_snapshots(5) == [(PEER, SnapshotStatus.FAILURE)] * 5
        assert set(raft.unreachable) == {PEER}
        assert peer.status.is_active
        full = [r for r in caplog.records if "sending buffer is full" in r.getMessage()]
        assert len(full) == 1  # not one a message
        server.release.set()
        stop(peer)


def test_a_stopped_peer_refuses_and_reports_nothing(dispatcher: Dispatcher) -> None:
    raft = FakeRaft()
    peer = start_peer("http://127.0.0.1:1", dispatcher, raft)
    stop(peer)
    assert peer.send(message()) is SendResult.STOPPED
    assert raft.unreachable == []


def test_a_bad_url_is_a_usage_error(dispatcher: Dispatcher) -> None:
    with pytest.raises(UsageError):
        start_peer("http://127.0.0.1:1/path", dispatcher, FakeRaft())
