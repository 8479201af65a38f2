"""The sending loop over TLS: what it makes of pieces, and what a peer may say besides answers."""

from __future__ import annotations

import array
import contextlib
import fcntl
import random
import socket
import ssl
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import EncodedMessage, Entry, Message, MessageType
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT, MIB
from tests.support.raft import FakeRaft
from tests.support.senders import MEMBER, PEER, assert_balanced, message, pipeline_to, settle
from tests.support.server import OK, Connection, Request, ScriptedServer
from tests.support.tls import Authority, PostHandshake
from tests.support.waiting import eventually

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls_of(connection: Connection) -> ssl.SSLSocket:
    assert isinstance(connection.sock, ssl.SSLSocket)
    return connection.sock


# What is written


def mixed(seed: int) -> Message:
    """A message whose pieces are smaller and larger than a record, in no order; some 12 MB."""
    chance = random.Random(seed)
    sizes = [0, 1, 10, 100, 16_384, 16_385, 20_000, 1_000_000] * 12
    chance.shuffle(sizes)
    entries = (Entry(index=i, data=chance.randbytes(size)) for i, size in enumerate(sizes))
    return Message(type=MessageType.APP, to=PEER, from_=MEMBER, term=1, entries=tuple(entries))


@pytest.mark.parametrize("version", VERSIONS)
def test_pieces_of_all_sizes_reach_a_slow_reader_as_they_are(
    authority: Authority, version: ssl.TLSVersion
) -> None:
    """The socket is full again and again, in the middle of records."""
    is_stuck = threading.Event()

    def wait_until_it_is_stuck(connection: Connection, head: bytes) -> bool:
        return is_stuck.wait(LONG_TIMEOUT)

    messages = [mixed(seed) for seed in range(3)]
    with (
        ScriptedServer(
            tls=authority.server(maximum=version), on_head=wait_until_it_is_stuck
        ) as server,
        pipeline_to(server, connections=1, credentials=Credentials(authority.info())) as pipeline,
    ):
        for sent in messages:
            is_stuck.clear()
            pipeline.send(sent)
            eventually(lambda: pipeline.states() == ["writing"])
            is_stuck.set()
            settle(pipeline)
        books = pipeline.stats()
        assert (books.sent, books.failed) == (3, 0)
        assert [request.body for request in server.requests] == [
            sent.marshal() for sent in messages
        ]
        assert {request.connection for request in server.requests} == {0}


def test_small_and_large_messages_take_turns_on_a_connection(authority: Authority) -> None:
    """A record that is left over would be the next message's first bytes."""
    chance = random.Random(0)
    bodies = [
        chance.randbytes(chance.choice([0, 1, 100, 2048, 2049, 16_000, MIB])) for _ in range(200)
    ]
    with (
        ScriptedServer(tls=authority.server()) as server,
        pipeline_to(
            server, connections=1, queue_length=200, credentials=Credentials(authority.info())
        ) as pipeline,
    ):
        for body in bodies:
            pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
        assert settle(pipeline).sent == 200
        assert [request.body for request in server.requests] == bodies


@pytest.mark.parametrize(
    ("kind", "sent"), [(MessageType.PROP, 1), (MessageType.APP, 2)], ids=["MsgProp", "MsgApp"]
)
def test_a_proposal_of_which_half_a_record_has_left_is_not_sent_again(
    authority: Authority, kind: MessageType, sent: int
) -> None:
    """No byte of it is told as written; still the peer may have acted on it, for all we know."""
    is_answered, is_stuck = threading.Event(), threading.Event()

    def answer(connection: Connection, request: Request) -> bytes | None:
        if len(server.requests) == 1:
            connection.send(OK)
            is_answered.set()
            is_stuck.wait(LONG_TIMEOUT)
            connection.reset()
            return None
        return OK

    raft = FakeRaft()
    with (
        ScriptedServer(answer, tls=authority.server()) as server,
        pipeline_to(
            server, raft, connections=1, credentials=Credentials(authority.info())
        ) as pipeline,
    ):
        # The kernel fills segments of half a window, and has room for a few of them.
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        pipeline.send(message(kind))
        assert is_answered.wait(LONG_TIMEOUT)
        settle(pipeline)
        mine, theirs = pipeline.workers[0].connection.sock, server.connections[0].sock
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        pipeline.send(EncodedMessage(bytes(15_000), type=kind, to=PEER))  # with its head, a record
        eventually(lambda: waiting_bytes(theirs) > 0)
        eventually(lambda: pipeline.states() == ["writing"])
        assert waiting_bytes(theirs) + unsent_bytes(mine) < 15_000
        is_stuck.set()
        books = settle(pipeline)
        assert (books.sent, books.failed) == (sent, 2 - sent)
        assert len(server.requests) == sent
        assert raft.unreachable == [PEER] * (2 - sent)


def waiting_bytes(sock: socket.socket) -> int:
    """What the kernel has for a reader, still encrypted."""
    return _count(sock, termios.FIONREAD)


def unsent_bytes(sock: socket.socket) -> int:
    """What the kernel has been given and the peer has not acknowledged."""
    return _count(sock, termios.TIOCOUTQ)


def _count(sock: socket.socket, what: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), what, count)
    return count[0]


# What comes besides answers


def many_key_updates(tls: ssl.SSLSocket) -> None:
    said = PostHandshake(tls)
    for _ in range(2000):
        said.update_keys(asks_for_update=False)


def key_updates_to_be_answered(tls: ssl.SSLSocket) -> None:
    said = PostHandshake(tls)
    for _ in range(100):
        said.update_keys(asks_for_update=True)


def tickets(tls: ssl.SSLSocket) -> None:
    said = PostHandshake(tls)
    for _ in range(100):
        said.send_ticket()


@pytest.mark.parametrize("say", [many_key_updates, key_updates_to_be_answered, tickets])
@pytest.mark.parametrize("moment", ["before the answer", "after it", "while it is written to"])
def test_what_tls_itself_says_costs_no_message_and_no_connection(
    authority: Authority, say: Callable[[ssl.SSLSocket], None], moment: str
) -> None:
    is_said = threading.Semaphore(0)

    def before_the_body(connection: Connection, head: bytes) -> bool:
        if moment == "while it is written to":
            say(tls_of(connection))
        return True

    def around_the_answer(connection: Connection, request: Request) -> None:
        if moment == "before the answer":
            say(tls_of(connection))
        connection.send(OK)
        if moment == "after it":
            say(tls_of(connection))
        is_said.release()

    with (
        ScriptedServer(
            around_the_answer, tls=authority.server(), on_head=before_the_body
        ) as server,
        pipeline_to(server, connections=1, credentials=Credentials(authority.info())) as pipeline,
    ):
        for size in (100, 8 * MIB, 100, MIB):
            pipeline.send(message(data=bytes(size)))
            settle(pipeline)
        for _ in range(4):
            assert is_said.acquire(timeout=LONG_TIMEOUT)
        assert pipeline.stats().sent == 4
        assert [len(request.body) for request in server.requests] > [100, 8 * MIB, 100, MIB]
        assert {request.connection for request in server.requests} == {0}


def padded(size: int) -> bytes:
    """An answer of so many bytes."""
    return OK.replace(b"\r\n\r\n", b"\r\nx: %b\r\n\r\n" % (b"y" * (size - len(OK) - 5)))


def in_tiny_records(connection: Connection, data: bytes) -> None:
    """Write a record for each byte, and let all of them go at once."""
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for byte in data:
        connection.send(bytes([byte]))
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def test_an_answer_of_many_tiny_records_is_read_to_its_end(authority: Authority) -> None:
    """More of them than are read in one turn, and the socket has told of them once."""
    with (
        ScriptedServer(
            lambda connection, _: in_tiny_records(connection, padded(1000)), tls=authority.server()
        ) as server,
        pipeline_to(server, connections=1, credentials=Credentials(authority.info())) as pipeline,
    ):
        for _ in range(3):
            pipeline.send(message())
            settle(pipeline)
        assert pipeline.stats().sent == 3
        assert {request.connection for request in server.requests} == {0}


@pytest.mark.parametrize("size", range(126, 131))
def test_what_follows_an_answer_is_no_answer_to_the_next_request(
    authority: Authority, size: int
) -> None:
    """Around the number of records that are read in one turn."""
    with (
        ScriptedServer(
            lambda connection, _: in_tiny_records(connection, padded(size) + OK),
            tls=authority.server(),
        ) as server,
        pipeline_to(server, connections=1, credentials=Credentials(authority.info())) as pipeline,
    ):
        for _ in range(3):
            pipeline.send(message())
            settle(pipeline)
        assert pipeline.stats().sent == 3
        assert [request.connection for request in server.requests] == [0, 1, 2]


# A peer that ends in the middle


def close_notify(connection: Connection) -> None:
    with contextlib.suppress(OSError):
        tls_of(connection).unwrap()  # and waits for ours, or for the reset


def half_close(connection: Connection) -> None:
    """End the TCP stream and not TLS's; and go on reading nothing."""
    with socket.socket(fileno=socket.dup(connection.sock.fileno())) as below:
        below.shutdown(socket.SHUT_WR)
    connection.server.release.wait(LONG_TIMEOUT)


@pytest.mark.parametrize("end", [close_notify, half_close, Connection.close, Connection.reset])
def test_a_peer_that_ends_in_the_middle_of_a_request_is_a_failure(
    authority: Authority, end: Callable[[Connection], None]
) -> None:
    def refuse(connection: Connection, head: bytes) -> bool:
        end(connection)
        return False

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=refuse, tls=authority.server()) as server,
        pipeline_to(
            server, raft, connections=1, credentials=Credentials(authority.info())
        ) as pipeline,
    ):
        pipeline.send(message(data=bytes(64 * MIB)))
        assert raft.wait_unreachable(1) == [PEER]
        server.release.set()
        books = settle(pipeline)
        assert (books.sent, books.failed) == (0, 1)
        assert_balanced(books)
        assert server.requests == []
        server.on_head = None
        pipeline.send(message())
        assert settle(pipeline).sent == 1
