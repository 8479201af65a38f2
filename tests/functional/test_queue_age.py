"""max_queue_age: what waits too long for a worker is not sent, and Raft hears of it."""

from __future__ import annotations

import threading

import pytest

from pipeline import (
    MessageType,
    Pipeline,
    PipelineConfig,
    SendResult,
    SnapshotStatus,
    Transport,
    TransportConfig,
    UsageError,
)
from tests.support.logs import handler_that_raises
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, assert_balanced, message, pipeline_to, settle
from tests.support.server import OK, ScriptedServer, black_hole
from tests.support.waiting import eventually

# Long enough for a worker that is free, however busy the machine is.
AGE_S = 0.5


def occupy(server: ScriptedServer, pipeline: Pipeline) -> None:
    """Have the only worker wait for an answer that comes with ``server.release``."""
    server.script = server.hold
    pipeline.send(message(MessageType.HEARTBEAT))
    server.wait_requests(1)


def test_a_message_that_waited_too_long_fails_while_the_worker_is_busy() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=1, max_queue_age=AGE_S) as pipeline,
    ):
        occupy(server, pipeline)
        for _ in range(3):
            assert pipeline.send(message()) is SendResult.ACCEPTED
        assert raft.wait_unreachable(3) == [PEER] * 3
        eventually(lambda: pipeline.stats().failed == 3)
        books = pipeline.stats()
        assert (books.queued, books.queued_bytes, books.in_flight) == (0, 0, 1)
        assert_balanced(books)
        assert pipeline.follower_stats().fail == 3
        assert raft.snapshots == []
        server.release.set()
        assert settle(pipeline).sent == 1
        assert len(server.requests) == 1
        # The peer did nothing wrong.
        assert pipeline.status.is_active
        assert pipeline.status.disconnects == 0


def test_a_log_handler_that_raises_costs_an_expired_message_no_outcome() -> None:
    raft = FakeRaft()
    with (
        handler_that_raises("waited longer") as handler,
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=1, max_queue_age=AGE_S) as pipeline,
    ):
        occupy(server, pipeline)
        pipeline.send(message())
        assert raft.wait_unreachable(1) == [PEER]
        eventually(lambda: pipeline.stats().failed == 1)
        eventually(lambda: handler.raised == 1)
        pipeline.send(message())  # there is a thread for it still
        assert raft.wait_unreachable(2) == [PEER] * 2
        server.release.set()
        assert settle(pipeline).sent == 1


def test_the_first_message_after_an_expiry_is_sent_as_ever() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=1, max_queue_age=AGE_S) as pipeline,
    ):
        occupy(server, pipeline)
        pipeline.send(message(data=b"old"))
        raft.wait_unreachable(1)
        pipeline.send(message(MessageType.HEARTBEAT, b"new"))
        server.release.set()
        assert server.wait_requests(2)[1].body == message(MessageType.HEARTBEAT, b"new").marshal()
        books = settle(pipeline)
        assert (books.sent, books.failed) == (2, 1)


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large and borrowed"])
def test_a_snapshot_that_waited_too_long_is_a_failed_one(size: int) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=2, max_queue_age=AGE_S) as pipeline,
    ):
        server.script = server.hold
        for _ in range(2):  # the second goes to the worker that takes any size
            pipeline.send(message(MessageType.APP, bytes(size)))
        server.wait_requests(1 if size > 65536 else 2)
        pipeline.send(message(MessageType.SNAP, bytes(size)))
        assert raft.wait_snapshots(1) == [(PEER, SnapshotStatus.FAILURE)]
        server.release.set()
        assert_balanced(settle(pipeline))


def test_an_expired_message_makes_room() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=1, queue_length=1, max_queue_age=AGE_S) as pipeline,
    ):
        occupy(server, pipeline)
        assert pipeline.send(message()) is SendResult.ACCEPTED
        eventually(lambda: pipeline.send(message()) is SendResult.ACCEPTED)
        server.release.set()
        assert_balanced(settle(pipeline))


def test_a_dead_peer_s_backlog_does_not_outlive_the_limit() -> None:
    raft = FakeRaft()
    with (
        black_hole() as port,
        pipeline_to(
            f"http://127.0.0.1:{port}", raft, dial_timeout_s=600.0, max_queue_age=AGE_S
        ) as pipeline,
    ):
        for _ in range(4 + 60):
            pipeline.send(message())
        raft.wait_unreachable(60)
        eventually(lambda: pipeline.stats().failed == 60)
        assert pipeline.stats().in_flight == 4  # they wait for their connections


def test_what_expired_and_was_not_told_keeps_its_place_and_is_dropped_at_a_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    config = TransportConfig(
        dispatchers=1,
        probe_interval_s=0,
        stop_timeout_s=0.05,
        pipeline=PipelineConfig(connections=1, queue_length=2, max_queue_age=AGE_S),
    )
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        pipeline = transport._peers[PEER].pipeline
        occupy(server, pipeline)
        transport.send([message()])
        raft.wait_unreachable(1)  # and the only thread stays in there
        transport.send([message(), message()])
        # Watch what must not happen: that room is made by what nobody has taken yet.
        assert not gate.wait(2 * AGE_S)
        assert pipeline.send(message()) is SendResult.QUEUE_FULL
        books = pipeline.stats()
        assert (books.in_flight, books.queued) == (2, 2)  # the worker's, and the one being told
        assert transport.stop() == 2
        gate.set()
        eventually(lambda: pipeline.stats().in_flight == 0)
        books = pipeline.stats()
        assert (books.failed, books.dropped) == (2, 2)  # the busy worker's is one of the former
        assert_balanced(books)
    told = [r for r in caplog.records if "waited longer than" in r.getMessage()]
    assert len(told) == 1


def test_without_a_limit_nothing_expires() -> None:
    raft = FakeRaft()
    with ScriptedServer() as server, pipeline_to(server, raft, connections=1) as pipeline:
        occupy(server, pipeline)
        pipeline.send(message())
        assert not server.release.wait(2 * AGE_S)
        server.script = lambda connection, request: OK
        server.release.set()
        assert settle(pipeline).sent == 2
        assert raft.unreachable == []


@pytest.mark.parametrize("age", [-1, 0.0001, 1e9, True, "1"])
def test_a_limit_out_of_range_is_a_usage_error(age: float) -> None:
    with pytest.raises(UsageError, match="max_queue_age"):
        PipelineConfig(max_queue_age=age)
    assert PipelineConfig(max_queue_age=0).max_queue_age == 0
