"""Bounds on what is queued (design R5), and what a refusal tells Raft (spec 4.2)."""

from __future__ import annotations

import threading

from pipeline import (
    EncodedMessage,
    MessageType,
    Pipeline,
    PipelineConfig,
    SendResult,
    SnapshotStatus,
    Transport,
    TransportConfig,
)
from pipeline.config import COPY_LIMIT
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, assert_balanced, message, pipeline_to, settle
from tests.support.server import ScriptedServer

ACCEPTED, QUEUE_FULL = SendResult.ACCEPTED, SendResult.QUEUE_FULL
KIB = 1024


def sized(size: int, to: int = PEER, type_: int = MessageType.APP) -> EncodedMessage:
    return EncodedMessage(bytes(size), type=type_, to=to)


def block_workers(server: ScriptedServer, pipeline: Pipeline, count: int) -> None:
    """Have every worker hold a message, so that what follows stays in msgc."""
    server.script = server.hold
    for _ in range(count):
        assert pipeline.send(message()) is ACCEPTED
    server.wait_requests(count)


def test_queue_length_counts_messages() -> None:
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, queue_length=3) as pipeline,
    ):
        block_workers(server, pipeline, 1)
        assert [pipeline.send(message()) for _ in range(5)] == [ACCEPTED] * 3 + [QUEUE_FULL] * 2
        server.release.set()
        books = settle(pipeline)
        assert (books.offered, books.sent, books.refused) == (6, 4, 2)


def test_queue_bytes_counts_bytes_and_a_refusal_takes_none() -> None:
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, queue_bytes=100) as pipeline,
    ):
        block_workers(server, pipeline, 1)
        assert pipeline.send(sized(60)) is ACCEPTED
        assert pipeline.send(sized(41)) is QUEUE_FULL
        assert pipeline.send(sized(40)) is ACCEPTED
        assert pipeline.send(sized(1)) is QUEUE_FULL
        assert pipeline.send(sized(0)) is ACCEPTED
        assert pipeline.stats().queued_bytes == 100
        server.release.set()
        books = settle(pipeline)
        assert books.queued_bytes == 0
        assert_balanced(books)


def test_one_message_larger_than_the_budget_is_let_through_when_nothing_waits() -> None:
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, queue_bytes=100) as pipeline,
    ):
        block_workers(server, pipeline, 1)
        assert pipeline.send(sized(1000)) is ACCEPTED
        assert pipeline.send(sized(1)) is QUEUE_FULL
        server.release.set()
        settle(pipeline)
        assert pipeline.stats().sent == 2
        assert pipeline.send(sized(1000)) is ACCEPTED
        assert settle(pipeline).sent == 3


def test_the_transport_s_budget_is_shared_and_never_silences_a_peer_with_nothing_queued() -> None:
    config = TransportConfig(queue_bytes=100 * KIB, pipeline=PipelineConfig(connections=1))
    with (
        ScriptedServer() as one,
        ScriptedServer() as two,
        Transport(1, 1, FakeRaft(), config=config) as transport,
    ):
        for peer_id, server in ((2, one), (3, two)):
            transport.add_peer(peer_id, [server.url])
            server.script = server.hold
            transport.send([sized(1, peer_id)])
            server.wait_requests(1)
        transport.send([sized(60 * KIB, 2), sized(60 * KIB, 2)])  # the second is too much
        assert [transport.stats()[2].queued, transport.stats()[2].refused] == [1, 1]
        transport.send([sized(60 * KIB, 3), sized(1, 3)])
        # The first was alone in its queue; with it the transport is over its budget.
        assert [transport.stats()[3].queued, transport.stats()[3].refused] == [1, 1]
        one.release.set()
        two.release.set()
        one.wait_requests(2)
        two.wait_requests(2)


def test_bytes_are_given_back_when_a_peer_is_removed() -> None:
    config = TransportConfig(queue_bytes=100 * KIB, pipeline=PipelineConfig(connections=1))
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=config) as transport:
        server.script = server.hold
        for count in range(1, 4):
            transport.add_peer(2, [server.url])
            transport.send([sized(1, 2)])
            server.wait_requests(count)
            transport.send([sized(60 * KIB, 2), sized(40 * KIB, 2)])
            assert transport.stats()[2].queued == 2
            assert transport.remove_peer(2) == 2


def test_a_full_queue_is_reported_from_a_library_thread() -> None:
    class WhoCalls(FakeRaft):
        def __init__(self) -> None:
            super().__init__()
            self.threads: set[str] = set()

        def report_unreachable(self, member_id: int) -> None:
            self.threads.add(threading.current_thread().name)
            super().report_unreachable(member_id)

        def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
            self.threads.add(threading.current_thread().name)
            super().report_snapshot(member_id, status)

    raft = WhoCalls()
    config = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=1))
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        server.script = server.hold
        transport.send([message()])
        server.wait_requests(1)
        transport.send([message(), message(), message(MessageType.SNAP)])
        raft.wait_unreachable(1)
        assert raft.wait_snapshots(1) == [(PEER, SnapshotStatus.FAILURE)]
        assert set(raft.unreachable) == {PEER}
        assert all(name.startswith("pipeline-dispatch-") for name in raft.threads)
        # The peer's status is not touched by a full buffer (spec 4.2).
        assert transport.stats()[PEER].refused == 2
        server.release.set()


def test_a_raft_that_sends_under_its_own_lock_is_not_called_back_in_the_same_call() -> None:
    lock = threading.Lock()

    class Locked(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            with lock:
                super().report_unreachable(member_id)

    raft = Locked()
    config = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=1))
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        server.script = server.hold
        with lock:
            transport.send([message()] * 100)
            assert raft.unreachable == []
        # The worker may have taken the first one meanwhile. They are told as one, or as some.
        assert transport.stats()[PEER].refused in (98, 99)
        assert set(raft.wait_unreachable(1)) == {PEER}
        server.release.set()


def test_the_copy_limit_of_the_core_is_the_documented_one() -> None:
    for size, is_borrowed in ((COPY_LIMIT, False), (COPY_LIMIT + 1, True)):
        with (
            ScriptedServer() as server,
            pipeline_to(server, connections=1) as pipeline,
        ):
            server.script = server.hold
            buffer = bytearray(size)
            encoded = EncodedMessage(buffer, type=MessageType.APP, to=PEER)
            pipeline.send(encoded)
            del encoded
            server.wait_requests(1)
            try:
                buffer.append(0)
            except BufferError:
                was_borrowed = True
            else:
                was_borrowed = False
            assert was_borrowed == is_borrowed
            server.release.set()
            settle(pipeline)
