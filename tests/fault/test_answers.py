"""Answers no well-behaved peer gives, and well-formed ones that are not the usual 204.

By a real socket, to a pipeline; what http.client makes of the pieces is in unit/test_odd_answer.py.
"""

from __future__ import annotations

import logging
import time

import pytest

from pipeline import EncodedMessage, MessageType
from tests.support.raft import FakeRaft
from tests.support.senders import (
    FRAMINGS,
    INTERIMS,
    PEER,
    ParsedHeads,
    many_interims,
    message,
    pipeline_to,
    settle,
    unfinished,
)
from tests.support.server import (
    OK,
    Connection,
    Request,
    Script,
    ScriptedServer,
    always,
    answer,
    in_turn,
    once_idle,
    then_close,
)
from tests.support.waiting import eventually, until_read

CLOSING = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
PADDED = b"HTTP/1.1 204 No Content\r\nX-Pad: " + b"p" * 4096 + b"\r\n\r\n"
CHUNKED_412 = (
    b"HTTP/1.1 412 Precondition Failed\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"14\r\ncluster ID mismatch\n\r\n0\r\n\r\n"
)
CHUNKED_500 = (
    b"HTTP/1.1 500 Internal Server Error\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\noops\r\n0\r\n\r\n"
)
MANY_HEADERS = (
    b"HTTP/1.1 204 No Content\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(80)) + b"\r\n"
)

# (answers, one per message, the last for all following; sent; failed; connections used for 4)
CASES = {
    "plain": ([OK], 4, 1),
    "no reason phrase": ([b"HTTP/1.1 204 \r\n\r\n"], 4, 1),
    "no reason phrase, no space": ([b"HTTP/1.1 204\r\n\r\n"], 4, 1),
    "content-length 0": ([answer("204 No Content")], 4, 1),
    "keep-alive": ([b"HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n"], 4, 1),
    "connection: close": ([then_close(CLOSING)], 4, 4),
    "connection: close, and left open": ([CLOSING], 4, 4),
    "http/1.0": ([then_close(b"HTTP/1.0 204 No Content\r\n\r\n")], 4, 4),
    "longer than 2 KiB": ([PADDED], 4, 1),
    "80 headers": ([MANY_HEADERS], 4, 1),
    "non-ASCII header": ([b"HTTP/1.1 204 No Content\r\nX-A: \xe4\r\n\r\n"], 4, 1),
    "bare LF": ([b"HTTP/1.1 204 No Content\nX-A: b\n\n"], 4, 1),
    "100 before 204": ([b"HTTP/1.1 100 Continue\r\n\r\n" + OK], 4, 1),
    "stray bytes after 204": ([OK + b"HTTP/1.1 500 Oops\r\n\r\n"], 4, 4),
    "two answers": ([OK + OK], 4, 4),
    "200 with a body": ([answer("200 OK", b"fine")], 0, 1),
    "500, chunked": ([CHUNKED_500], 0, 1),
    "500, body to the end of the stream": (
        [then_close(b"HTTP/1.1 500 Internal Server Error\r\n\r\nlong story")],
        0,
        4,
    ),
    "a body longer than we read": ([answer("500 Oops", b"x" * 100_000)], 0, 4),
    "301 is not followed": ([answer("301 Moved", b"", "Location: http://127.0.0.1:1/")], 0, 1),
    "garbage": ([then_close(b"SSH-2.0-OpenSSH_9.2\r\n")], 0, 4),
    "binary": ([then_close(bytes(range(256)) * 20)], 0, 4),
    "cut in the head": ([then_close(OK[:20])], 0, 4),
    "cut in the body": ([then_close(answer("500 Oops", b"x" * 50)[:-10])], 0, 4),
    "nothing": ([then_close(b"")], 0, 4),
}


@pytest.mark.parametrize(("steps", "sent", "connections"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("type_", [MessageType.HEARTBEAT, MessageType.PROP, MessageType.SNAP])
def test_every_answer_has_one_outcome(
    steps: list[bytes | Script], sent: int, connections: int, type_: MessageType
) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(*steps)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for _ in range(4):
            pipeline.send(message(type_))
            settle(pipeline)
        books = pipeline.stats()
        assert (books.sent, books.failed) == (sent, 4 - sent)
        assert len(server.requests) == 4
        assert len(server.connections) == connections
        assert len(raft.unreachable) == 4 - sent
        assert len(raft.snapshots) == (4 if type_ is MessageType.SNAP else 0)


@pytest.mark.parametrize(
    "data",
    [
        OK,
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED_412,
    ],
    ids=["204", "100 and a chunked 412"],
)
def test_an_answer_may_come_in_two_parts_cut_anywhere(data: bytes) -> None:
    cuts = iter(range(1, len(data)))

    def cut(connection: Connection, request: Request) -> None:
        at = next(cuts)
        connection.send(data[:at])
        until_read(connection.sock)
        connection.send(data[at:])

    with ScriptedServer(cut) as server, pipeline_to(server, connections=1) as pipeline:
        for _ in range(1, len(data)):
            pipeline.send(message())
            settle(pipeline)
        books = pipeline.stats()
        expected = len(data) - 1
        assert (books.sent, books.failed) == ((expected, 0) if data is OK else (0, expected))
        assert len(server.connections) == 1


def test_an_answer_may_come_byte_by_byte() -> None:
    def drip(connection: Connection, request: Request) -> None:
        for byte in OK:
            connection.send(bytes([byte]))

    with ScriptedServer(drip) as server, pipeline_to(server, connections=1) as pipeline:
        for _ in range(3):
            pipeline.send(message())
        assert settle(pipeline).sent == 3


def test_a_refusal_before_the_body_is_complete_is_heard() -> None:
    """413 and close while 64 MiB are under way."""
    raft = FakeRaft()

    def refuse(connection: Connection, head: bytes) -> bool:
        connection.send(answer("413 Request Entity Too Large", b"too large\n"))
        connection.close()
        return False

    with ScriptedServer(on_head=refuse) as server, pipeline_to(server, raft) as pipeline:
        body = memoryview(bytearray(64 << 20))
        pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        raft.wait_unreachable(1)
        assert settle(pipeline).failed == 1
        assert len(server.connections) == 1


def test_an_early_answer_ends_the_connection() -> None:
    """What was not written of the request must not become the start of the next one."""

    def early(connection: Connection, head: bytes) -> bool:
        if connection.number == 0:
            connection.send(answer("412 Precondition Failed", b"cluster ID mismatch\n"))
            connection.server.release.wait()
            return False
        return True

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=early) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        body = memoryview(bytearray(64 << 20))
        pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        raft.wait_unreachable(1)
        pipeline.send(message())
        assert [request.connection for request in server.wait_requests(1)] == [1]
        assert settle(pipeline).sent == 1


@pytest.mark.parametrize("code", [102, 103])
def test_an_interim_answer_is_never_taken_for_the_next_message(code: int) -> None:
    """A late 204 to one message must not be counted for another that nobody answered."""

    def interim(connection: Connection, request: Request) -> None:
        if connection.number == 0:
            connection.send(b"HTTP/1.1 %d Interim\r\n\r\n" % code)
            # The connection ends, or the next request comes on it: then the 204 comes too late.
            if connection.sock.recv(1):
                connection.send(OK)
        connection.server.release.wait()

    raft = FakeRaft()
    with (
        ScriptedServer(interim) as server,
        pipeline_to(server, raft, connections=1, response_timeout_s=0.3) as pipeline,
    ):
        for _ in range(2):
            pipeline.send(message())
            settle(pipeline)
        books = pipeline.stats()
        assert (books.sent, books.failed) == (0, 2)


def test_204_with_chunked_encoding_has_no_body_to_wait_for() -> None:
    """RFC 9112 6.3: a 204 ends with its head, whatever its fields say. Go reads it so."""
    strange = b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        ScriptedServer(always(strange)) as server,
        pipeline_to(server, connections=1) as pipeline,
    ):
        pipeline.send(message())
        assert settle(pipeline).sent == 1


def test_stray_bytes_on_an_idle_connection_end_it() -> None:
    stray = once_idle(lambda connection: connection.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n"))
    with (
        ScriptedServer(in_turn(stray, OK)) as server,
        pipeline_to(server, connections=1) as pipeline,
    ):
        pipeline.send(message())
        settle(pipeline)
        server.is_idle.release()
        server.wait_for(lambda: server.ended == 1)
        pipeline.send(message(MessageType.PROP))
        assert settle(pipeline).sent == 2
        assert [request.connection for request in server.requests] == [0, 1]


@pytest.mark.parametrize("type_", [MessageType.HEARTBEAT, MessageType.PROP])
def test_no_answer_within_the_response_timeout_is_a_failure(type_: MessageType) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=1, response_timeout_s=0.1) as pipeline,
    ):
        server.script = in_turn(server.hold, OK)
        pipeline.send(message(type_))
        raft.wait_unreachable(1)

        def is_answered() -> bool:
            """On a busy machine the timeout may strike the next one as well."""
            pipeline.send(message())
            return settle(pipeline).sent == 1

        eventually(is_answered)
        assert pipeline.stats().failed == len(server.requests) - 1
        # The late answer must not meet the next message.
        connections = [request.connection for request in server.requests]
        assert connections == list(range(len(connections)))


def test_a_snapshot_is_waited_for_without_a_timeout() -> None:
    with (
        ScriptedServer() as server,
        pipeline_to(server, connections=1, response_timeout_s=0.05) as pipeline,
    ):
        server.script = server.hold
        pipeline.send(message(MessageType.SNAP))
        server.wait_requests(1)
        time.sleep(0.3)  # six times the response timeout
        assert pipeline.stats().in_flight == 1
        server.release.set()
        assert settle(pipeline).sent == 1


def test_an_odd_answer_that_never_ends_fails_at_the_response_timeout() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(always(b"HTTP/1.1 500 Oops\r\nContent-Length")) as server,
        pipeline_to(server, raft, connections=1, response_timeout_s=0.2) as pipeline,
    ):
        pipeline.send(message())
        assert raft.wait_unreachable(1) == [PEER]
        assert settle(pipeline).failed == 1
        server.wait_for(lambda: server.ended == 1)


@pytest.mark.parametrize("type_", [MessageType.HEARTBEAT, MessageType.SNAP])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("500 Internal Server Error", "500: the member could not process it"),
        ("503 Service Unavailable", "unexpected http status Service Unavailable"),
        ("403 Forbidden", "the member has been permanently removed from the cluster"),
        ("200 OK", "unexpected http status OK"),
        ("412 Precondition Failed", 'unhandled error "" when precondition failed'),
    ],
)
def test_the_status_line_decides_and_the_worker_is_free_at_once(
    *,
    status: str,
    text: str,
    framing: str,
    type_: MessageType,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "pipeline")
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(unfinished(status, framing), OK)) as server,
        # Nothing here ends by this one.
        pipeline_to(server, raft, connections=1, response_timeout_s=86400.0) as pipeline,
    ):
        pipeline.send(message(type_))
        raft.wait_unreachable(1)
        pipeline.send(message())
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 1)
        # Who answers so has the rest of its answer to itself.
        assert [request.connection for request in server.requests] == [0, 1]
    assert text in caplog.text
    assert "IncompleteRead" not in caplog.text


def test_the_text_of_a_412_may_come_after_its_head(caplog: pytest.LogCaptureFixture) -> None:
    def in_two_parts(connection: Connection, request: Request) -> None:
        connection.send(CHUNKED_412[:-20])
        until_read(connection.sock)
        connection.send(CHUNKED_412[-20:])

    caplog.set_level(logging.DEBUG, "pipeline")
    with ScriptedServer(in_two_parts) as server, pipeline_to(server, connections=1) as pipeline:
        for _ in range(2):
            pipeline.send(message())
            assert settle(pipeline).sent == 0
        assert len(server.connections) == 1
    assert "cluster ID mismatch" in caplog.text


@pytest.mark.parametrize("type_", [MessageType.HEARTBEAT, MessageType.SNAP])
def test_interim_answers_are_read_once(type_: MessageType, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, the last one costs no more than the first."""
    parsed = ParsedHeads(monkeypatch)
    with (
        ScriptedServer(many_interims(OK)) as server,
        pipeline_to(server, connections=1) as pipeline,
    ):
        pipeline.send(message(type_))
        assert settle(pipeline).sent == 1
    assert INTERIMS < parsed.count <= 2 * (INTERIMS + 1)
