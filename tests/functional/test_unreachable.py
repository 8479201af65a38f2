"""unreachable_reports: how often Raft hears that a peer cannot be reached."""

from __future__ import annotations

import time

import pytest

from pipeline import MessageType, Pipeline, PipelineConfig, SendResult, SnapshotStatus, UsageError
from pipeline.send.dispatcher import Dispatcher
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, message, peer_to, pipeline_to, settle
from tests.support.server import ERROR, OK, Connection, Request, ScriptedServer, always, in_turn
from tests.support.waiting import eventually


def send_one_by_one(pipeline: Pipeline, count: int, type_: MessageType = MessageType.APP) -> None:
    for _ in range(count):
        pipeline.send(message(type_))
        settle(pipeline)


@pytest.mark.parametrize(("reports", "told"), [("every", 5), ("change", 2)])
def test_raft_hears_of_every_failure_or_of_the_change(reports: str, told: int) -> None:
    raft = FakeRaft()
    script = in_turn(ERROR, ERROR, OK, OK, ERROR, ERROR, ERROR)
    with (
        ScriptedServer(script) as server,
        pipeline_to(server, raft, unreachable_reports=reports) as pipeline,
    ):
        send_one_by_one(pipeline, 7)
        assert raft.unreachable == [PEER] * told
        assert pipeline.stats().failed == 5


def test_a_failed_snapshot_is_always_told() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(always(ERROR)) as server,
        pipeline_to(server, raft, unreachable_reports="change") as pipeline,
    ):
        send_one_by_one(pipeline, 3, MessageType.SNAP)
        assert raft.unreachable == [PEER]
        assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)] * 3


def test_of_failures_at_the_same_time_one_is_the_change() -> None:
    raft = FakeRaft()

    def hold_and_fail(connection: Connection, request: Request) -> bytes:
        server.hold(connection, request)
        return ERROR

    with (
        ScriptedServer(hold_and_fail) as server,
        pipeline_to(server, raft, unreachable_reports="change") as pipeline,
    ):
        for _ in range(4):
            pipeline.send(message())
        server.wait_requests(4)
        server.release.set()
        assert settle(pipeline).failed == 4
        assert raft.unreachable == [PEER]


def test_an_expired_message_is_told_while_the_peer_can_be_reached() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(
            server, raft, connections=1, max_queue_age=0.5, unreachable_reports="change"
        ) as pipeline,
    ):
        server.script = server.hold
        pipeline.send(message())
        server.wait_requests(1)
        for count in (1, 2):
            pipeline.send(message())
            raft.wait_unreachable(count)
        pipeline.status.deactivate("pipeline", "write", "as another channel does", url="http://a")
        pipeline.send(message(MessageType.SNAP))
        assert raft.wait_snapshots(1) == [(PEER, SnapshotStatus.FAILURE)]
        assert raft.unreachable == [PEER] * 2
        server.release.set()
        settle(pipeline)


@pytest.mark.parametrize("is_unreachable", [False, True])
def test_a_refusal_is_told_unless_raft_knows(is_unreachable: bool) -> None:
    raft = FakeRaft()
    dispatcher = Dispatcher("1", queue_bytes=1 << 20, max_threads=4)
    dispatcher.start()
    with ScriptedServer() as server:
        server.script = server.hold
        config = PipelineConfig(connections=1, queue_length=1, unreachable_reports="change")
        peer = peer_to(server.url, dispatcher, raft, config)
        peer.start()
        if is_unreachable:
            peer.status.deactivate("sendMsgSnap", "post", "as another channel does", url="http://a")
        for _ in range(2):
            peer.send(message())
            server.wait_requests(1)
        assert peer.send(message(MessageType.SNAP)) is SendResult.QUEUE_FULL
        assert raft.wait_snapshots(1) == [(PEER, SnapshotStatus.FAILURE)]
        assert raft.unreachable == ([] if is_unreachable else [PEER])
        server.release.set()
        eventually(lambda: peer.pipeline.stats().sent == 2)
        deadline = time.monotonic() + LONG_TIMEOUT
        peer.stop_begin()
        peer.stop_end(deadline)
        dispatcher.stop(deadline)


def test_another_word_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unreachable_reports"):
        PipelineConfig(unreachable_reports="never")  # type: ignore[arg-type]
