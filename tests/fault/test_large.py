"""Large messages: borrowed, gathered, given back; slow readers and stuck ones."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import stat
import threading
import time

import pytest
from urllib3.util import parse_url

from pipeline import EncodedMessage, Message, MessageType, SendResult, Snapshot
from tests.support import MIB
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, message, pipeline_to, settle
from tests.support.server import (
    ERROR,
    OK,
    Connection,
    Request,
    Script,
    ScriptedServer,
    always,
    in_turn,
    reset,
)
from tests.support.waiting import eventually


def is_free(buffer: bytearray) -> bool:
    """Tell whether nobody holds the buffer any more."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True


@pytest.mark.parametrize("make", ["encoded", "snapshot"])
@pytest.mark.parametrize(
    "script", [always(OK), always(ERROR), reset], ids=["sent", "refused", "reset"]
)
def test_a_borrowed_payload_is_given_back_after_its_outcome(script: Script, make: str) -> None:
    """In time and without another send to trigger it."""
    buffer = bytearray(100_000)

    def build() -> Message | EncodedMessage:
        if make == "encoded":
            return EncodedMessage(buffer, type=MessageType.APP, to=PEER)
        return Message(type=MessageType.SNAP, to=PEER, snapshot=Snapshot(data=buffer))

    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        hold = threading.Event()

        def held(connection: Connection, request: Request) -> bytes | None:
            hold.wait()
            return script(connection, request)

        server.script = held
        assert pipeline.send(build()) is SendResult.ACCEPTED
        server.wait_requests(1)
        gc.collect()
        assert not is_free(buffer)
        hold.set()
        eventually(lambda: is_free(buffer))


def test_an_encoded_message_made_anew_is_sent_with_the_bytes_it_had() -> None:
    """A job holds what has the bytes, not the message that showed it to them."""
    buffer = bytearray(b"first" * MIB)
    encoded = EncodedMessage(buffer, type=MessageType.APP, to=PEER)
    with ScriptedServer() as server, pipeline_to(server, connections=1) as pipeline:
        server.script = server.hold
        pipeline.send(message())
        server.wait_requests(1)
        assert pipeline.send(encoded) is SendResult.ACCEPTED
        encoded.__init__(bytearray(b"second"), type=MessageType.APP, to=PEER)  # type: ignore[misc]
        assert encoded.data == b"second"
        assert not is_free(buffer)
        server.release.set()
        _, request = server.wait_requests(2)
        assert request.body == b"first" * MIB
        settle(pipeline)
        eventually(lambda: is_free(buffer))


def test_a_refused_payload_is_given_back_at_once() -> None:
    buffer = bytearray(100_000)
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, queue_length=1) as pipeline,
    ):
        server.script = server.hold
        for count in (1, 1):
            pipeline.send(message())
            server.wait_requests(count)
        refused = pipeline.send(EncodedMessage(buffer, type=MessageType.APP, to=PEER))
        assert refused is SendResult.QUEUE_FULL
        assert is_free(buffer)
        server.release.set()


def test_queued_payloads_are_given_back_at_stop() -> None:
    buffers = [bytearray(100_000) for _ in range(12)]
    with ScriptedServer() as server:
        server.script = server.hold
        pipeline = pipeline_to(server)
        pipeline.start()
        for buffer in buffers:
            pipeline.send(EncodedMessage(buffer, type=MessageType.APP, to=PEER))
        server.wait_requests(3)  # the fourth worker is kept for small messages
        assert pipeline.stop() == 9
        assert all(is_free(buffer) for buffer in buffers)


def test_payloads_are_given_back_however_many_end_together() -> None:
    """The batches of 64, of 1 MiB, of 100 ms: none leaves one behind."""
    buffers = [bytearray(20_000) for _ in range(500)]
    with ScriptedServer() as server, pipeline_to(server, queue_length=512) as pipeline:
        for buffer in buffers:
            encoded = EncodedMessage(buffer, type=MessageType.APP, to=PEER)
            assert pipeline.send(encoded) is SendResult.ACCEPTED
        del encoded
        settle(pipeline)
        eventually(lambda: all(is_free(buffer) for buffer in buffers))


def test_lone_payloads_are_given_back_one_by_one() -> None:
    buffer = bytearray(20_000)
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        for _ in range(20):
            pipeline.send(EncodedMessage(buffer, type=MessageType.APP, to=PEER))
            settle(pipeline)
            eventually(lambda: is_free(buffer))


def test_64_mib_arrive_byte_for_byte() -> None:
    data = (bytes(range(256)) * (64 * MIB // 256 + 1))[3 : 64 * MIB]
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        sent = Message(type=MessageType.SNAP, to=PEER, snapshot=Snapshot(data=data))
        pipeline.send(sent)
        (request,) = server.wait_requests(1)
        assert Message.unmarshal(request.body).snapshot.data == data
        settle(pipeline)


def test_a_retried_large_message_starts_from_its_first_byte() -> None:
    """The reused connection dies in the middle of the body; the second attempt is whole."""
    heads: list[bytes] = []

    def cut_second(connection: Connection, head: bytes) -> bool:
        heads.append(head)
        if len(heads) == 2:
            connection.read_body(3 * MIB + 5)
            connection.reset()
            return False
        return True

    data = bytes(range(256)) * (32 * MIB // 256)
    with (
        ScriptedServer(on_head=cut_second) as server,
        pipeline_to(server, connections=1) as pipeline,
    ):
        pipeline.send(message())
        settle(pipeline)
        sent = Message(type=MessageType.SNAP, to=PEER, snapshot=Snapshot(data=data))
        pipeline.send(sent)
        books = settle(pipeline)
        assert (books.sent, books.failed) == (2, 0)
        assert len(heads) == 3
        assert server.requests[-1].body == sent.marshal()


def slow(connection: Connection, head: bytes) -> bool:
    """Read a little at a time, for longer than either timeout of the test."""
    for _ in range(24):
        connection.read_body(MIB // 4)
        time.sleep(0.2)
    connection.read_body(10 * MIB)
    connection.send(OK)
    return False


def test_a_slow_reader_is_left_alone() -> None:
    """Bytes move, if slowly: neither timeout applies while they do."""
    with (
        ScriptedServer(on_head=slow) as server,
        pipeline_to(server, stall_timeout_s=4.0, response_timeout_s=4.0) as pipeline,
    ):
        body = memoryview(bytearray(16 * MIB))
        pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 0)


def stuck(connection: Connection, head: bytes) -> bool:
    connection.server.release.wait()
    return False


def test_a_stuck_reader_is_a_failure() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(on_head=stuck) as server,
        pipeline_to(server, raft, stall_timeout_s=0.3) as pipeline,
    ):
        body = memoryview(bytearray(64 * MIB))
        begin = time.monotonic()
        pipeline.send(EncodedMessage(body, type=MessageType.SNAP, to=PEER))
        raft.wait_snapshots(1)
        assert time.monotonic() - begin >= 0.3
        assert settle(pipeline).failed == 1
        server.release.set()


def test_a_reader_that_pauses_for_less_than_the_stall_timeout_is_left_alone() -> None:
    """Its kernel answers, so the link is not dead, however short dead_link_timeout_s is."""

    def pause(connection: Connection, head: bytes) -> bool:
        connection.server.release.wait(4.0)
        return True

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=pause) as server,
        pipeline_to(server, raft, stall_timeout_s=30.0, dead_link_timeout_s=1.0) as pipeline,
    ):
        body = memoryview(bytearray(64 * MIB))
        pipeline.send(EncodedMessage(body, type=MessageType.SNAP, to=PEER))
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 0)
        assert raft.unreachable == []


def test_a_large_message_does_not_hold_up_small_ones() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        server.on_head = lambda connection, head: (
            stuck(connection, head) if b"Content-Length: 67108864" in head else True
        )
        body = memoryview(bytearray(64 * MIB))
        pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        server.wait_connections(1)
        for _ in range(20):
            pipeline.send(message())
        eventually(lambda: pipeline.stats().sent == 20)
        assert pipeline.stats().in_flight == 1
        server.release.set()


def test_one_worker_is_kept_for_small_messages() -> None:
    """Design section 5: a run of large appends must not delay heartbeats and votes."""
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        server.on_head = lambda connection, head: (
            stuck(connection, head) if b"Content-Length: 16777216" in head else True
        )
        body = memoryview(bytearray(16 * MIB))
        for _ in range(6):
            pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        pipeline.send(message(MessageType.HEARTBEAT))
        eventually(lambda: pipeline.stats().sent == 1)
        eventually(lambda: pipeline.states() == ["idle", "writing", "writing", "writing"])
        assert pipeline.stats().queued == 3
        server.release.set()


def test_messages_in_turn_of_every_size_keep_their_bounds() -> None:
    """Small after large on one connection: no byte of the one is taken for the other's."""
    with ScriptedServer(in_turn(OK)) as server, pipeline_to(server, connections=1) as pipeline:
        expected = []
        for size in (5 * MIB, 0, 100, 17_000, 3, MIB, 1):
            body = bytes([size % 251]) * size
            expected.append(body)
            pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        requests = server.wait_requests(len(expected))
        assert [request.body for request in requests] == expected


def send_buffers_to(port: int) -> list[int]:
    """SO_SNDBUF of every connection of this process to ``port``."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as sock:
                    if sock.getpeername()[1:2] == (port,):
                        found.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
    return found


def largest_send_buffer() -> int:
    """What the kernel grants who asks for a lot: twice net.core.wmem_max."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.skipif(largest_send_buffer() < MIB, reason="net.core.wmem_max is below 512 KiB")
def test_the_send_buffer_to_a_near_peer_does_not_grow() -> None:
    with ScriptedServer() as server:
        port = parse_url(server.url).port
        assert port is not None

        def is_bounded() -> bool:
            # Without us it grows to net.ipv4.tcp_wmem, 4 MiB.
            with pipeline_to(server, connections=1) as pipeline:
                for _ in range(4):
                    pipeline.send(EncodedMessage(bytes(32 * MIB), type=MessageType.APP, to=PEER))
                assert settle(pipeline).sent == 4
                (size,) = send_buffers_to(port)
            return size == MIB

        # A handshake may be slow on a busy machine, many times over; not always.
        assert any(is_bounded() for _ in range(50))
