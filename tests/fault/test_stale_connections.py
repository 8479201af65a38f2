"""Connections that end between, or under, requests (spec 2.7)."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import EncodedMessage, MessageType
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, message, pipeline_to, settle
from tests.support.server import (
    ERROR,
    OK,
    Connection,
    Request,
    Script,
    ScriptedServer,
    close,
    in_turn,
    reset,
    then_close,
)
from tests.support.waiting import eventually

HEARTBEAT, PROP, SNAP = MessageType.HEARTBEAT, MessageType.PROP, MessageType.SNAP


@pytest.mark.parametrize("type_", [HEARTBEAT, PROP, SNAP])
@pytest.mark.parametrize("end", [Connection.end, Connection.reset])
def test_an_idle_connection_the_peer_closed_costs_no_message(
    type_: MessageType, end: object
) -> None:
    raft = FakeRaft()
    with ScriptedServer() as server, pipeline_to(server, raft, connections=1) as pipeline:
        for count in range(1, 4):
            pipeline.send(message(type_))
            settle(pipeline)
            connection = server.wait_connections(count)[-1]
            end(connection)  # type: ignore[operator]
            server.wait_for(lambda ended=count: server.ended == ended)
        assert pipeline.stats().sent == 3
        assert raft.unreachable == []
        assert [request.connection for request in server.requests] == [0, 1, 2]


@pytest.mark.parametrize("type_", [HEARTBEAT, SNAP])
@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
def test_a_reused_connection_that_dies_without_an_answer_is_retried_once(
    type_: MessageType, end: Script
) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, end, OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for _ in range(2):
            pipeline.send(message(type_))
            settle(pipeline)
        books = pipeline.stats()
        assert (books.offered, books.sent, books.failed) == (2, 2, 0)
        assert [request.connection for request in server.requests] == [0, 0, 1]
        assert raft.unreachable == []


def test_the_second_attempt_is_the_last() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, close, close, OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for _ in range(3):
            pipeline.send(message(HEARTBEAT))
            settle(pipeline)
        books = pipeline.stats()
        assert (books.offered, books.sent, books.failed) == (3, 2, 1)
        assert len(server.requests) == 4
        assert raft.unreachable == [PEER]


@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
def test_a_fresh_connection_that_dies_is_not_retried(end: Script) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(end, OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        pipeline.send(message(HEARTBEAT))
        settle(pipeline)
        assert len(server.requests) == 1
        assert raft.unreachable == [PEER]


@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
def test_a_proposal_that_left_is_never_sent_twice(end: Script) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, end, OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        pipeline.send(message(PROP, b"one"))
        settle(pipeline)
        pipeline.send(message(PROP, b"two"))
        settle(pipeline)
        pipeline.send(message(PROP, b"three"))
        books = settle(pipeline)
        assert (books.sent, books.failed) == (2, 1)
        bodies = [request.body for request in server.requests]
        assert bodies == [message(PROP, data).marshal() for data in (b"one", b"two", b"three")]


def test_a_proposal_cut_off_in_its_body_is_not_sent_again() -> None:
    """Only a part has left, and still the peer may have acted on it, for all we know."""
    heads: list[bytes] = []

    def cut_second(connection: Connection, head: bytes) -> bool:
        heads.append(head)
        if len(heads) == 2:
            connection.read_body(1 << 20)
            connection.reset()
            return False
        return True

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=cut_second) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        pipeline.send(message(PROP))
        settle(pipeline)
        body = memoryview(bytearray(32 << 20))
        pipeline.send(EncodedMessage(body, type=PROP, to=PEER))
        raft.wait_unreachable(1)
        settle(pipeline)
        assert len(heads) == 2


def test_an_answer_that_began_is_not_retried() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, then_close(b"HTTP/1.1 2"), OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for _ in range(2):
            pipeline.send(message(HEARTBEAT))
            settle(pipeline)
        assert len(server.requests) == 2
        assert raft.unreachable == [PEER]


@pytest.mark.parametrize("type_", [HEARTBEAT, PROP])
def test_a_server_that_closes_after_every_204_gets_every_message(type_: MessageType) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(then_close(OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for count in range(1, 20):
            pipeline.send(message(type_))
            settle(pipeline)
            # A proposal on its way when the connection ends is lost, so let it end first.
            server.wait_for(lambda ended=count: server.ended >= ended)
        assert pipeline.stats().sent == 19
        assert raft.unreachable == []
        assert len(server.requests) == 19


def test_a_connection_that_ended_during_a_callback_is_not_written_to() -> None:
    """Checked at checkout, also when the worker comes back from Python with a message waiting."""
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    with (
        ScriptedServer(in_turn(then_close(ERROR), OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        pipeline.send(message(HEARTBEAT))
        raft.wait_unreachable(1)
        server.wait_for(lambda: server.ended == 1)
        pipeline.send(message(PROP))
        gate.set()
        assert settle(pipeline).sent == 1
        assert len(raft.unreachable) == 1


def test_a_connection_that_ended_during_a_snapshot_report_is_not_written_to() -> None:
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    with ScriptedServer() as server, pipeline_to(server, raft, connections=1) as pipeline:
        pipeline.send(message(SNAP))
        raft.wait_snapshots(1)
        server.connections[0].end()
        server.wait_for(lambda: server.ended == 1)
        pipeline.send(message(PROP))
        gate.set()
        assert settle(pipeline).sent == 2
        assert raft.unreachable == []


def test_a_connection_idle_for_too_long_is_not_used_again() -> None:
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, idle_timeout_s=0.05) as pipeline,
    ):
        pipeline.send(message(PROP))
        settle(pipeline)
        pipeline.send(message(PROP))
        settle(pipeline)
        time.sleep(0.1)
        pipeline.send(message(PROP))
        assert settle(pipeline).sent == 3
        assert server.requests[-1].connection > server.requests[0].connection


def test_a_server_that_restarts_on_its_port_is_found_again() -> None:
    raft = FakeRaft()
    with ScriptedServer() as server:
        pipeline = pipeline_to(server, raft, connections=2)
        with pipeline:
            for _ in range(8):
                pipeline.send(message(HEARTBEAT))
            settle(pipeline)
            server.stop()
            with ScriptedServer(port=server.port) as again:

                def arrived() -> bool:
                    pipeline.send(message(PROP))
                    settle(pipeline)
                    return len(again.requests) > 0

                eventually(arrived)
            assert raft.unreachable == []


def test_every_retry_is_counted_once() -> None:
    """Half of the requests on reused connections are cut; the books show none of it."""

    def sometimes(connection: Connection, request: Request) -> bytes | None:
        if connection.requests == 2:
            connection.close()
            return None
        return OK

    raft = FakeRaft()
    with ScriptedServer(sometimes) as server, pipeline_to(server, raft) as pipeline:
        for _ in range(60):
            pipeline.send(message(HEARTBEAT))
        books = settle(pipeline)
        assert (books.offered, books.sent, books.failed) == (60, 60, 0)
        assert raft.unreachable == []
        assert len(server.requests) > 60
