"""A stream is refused with an answer that does not end, so that an etcd does not dial again.

How an etcd takes it: tests/interop/test_etcd.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import ReceiverConfig
from pipeline.receive.handlers import Handlers
from pipeline.receive.listener import Listener
from pipeline.wire.answers import Answer, Request
from pipeline.wire.protocol import STREAM_PREFIX
from tests.support.http import peer_headers
from tests.support.listening import (
    GOOD,
    catch_up,
    dial,
    is_closed,
    listen,
    raw_head,
    read_answers,
    read_reply,
    read_status,
)
from tests.support.raft import FakeRaft
from tests.support.tls_listening import Node
from tests.support.waiting import eventually

DIAL = raw_head(line="GET /raft/stream/msgapp/1 HTTP/1.1", headers=peer_headers(x_raft_to="2"))
LINE = b"13\r\n404 page not found\n\r\n"
BYTE = b"1\r\n\n\r\n"  # one more, as a chunk


def read_refusal(sock: socket.socket) -> bytes:
    """Read the head of the answer, and the line that its body begins with."""
    received = b""
    while b"\r\n\r\n" + LINE not in received:
        more = sock.recv(4096)
        assert more, f"the answer ended: {received!r}"
        received += more
    return received


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read what may come in any number of pieces, and together if we are late."""
    received = b""
    while len(received) < size:
        more = sock.recv(size - len(received))
        assert more, f"the answer ended: {received!r}"
        received += more
    return received


def refused(listener: Listener) -> socket.socket:
    sock = dial(listener.url)
    sock.sendall(DIAL)
    read_refusal(sock)
    return sock


@pytest.mark.parametrize("kind", ["msgapp", "message"])
def test_the_answer_has_no_version_and_no_end(kind: str) -> None:
    line = f"GET /raft/stream/{kind}/1 HTTP/1.1"
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        sock.sendall(raw_head(line=line, headers=peer_headers(x_raft_to="2")))
        head = read_refusal(sock)
        assert head.startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert b"\r\nTransfer-Encoding: chunked\r\n" in head
        assert b"Content-Length" not in head
        assert b"Connection" not in head
        assert b"X-Server-Version" not in head


def test_a_byte_comes_now_and_then_however_long_it_is_idle() -> None:
    config = ReceiverConfig(idle_timeout_s=0.05, stall_timeout_s=0.05)
    with listen(FakeRaft(), config=config) as listener, refused(listener) as sock:
        assert read_exactly(sock, 2 * len(BYTE)) == 2 * BYTE
        assert listener.stats().connections == 1


def sleeps() -> int:
    """Count how often the threads of this process, but for the main one, have gone to sleep."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    text = "".join((task / "status").read_text() for task in tasks)
    return sum(map(int, re.findall(r"^voluntary_ctxt_switches:\t(\d+)$", text, re.MULTILINE)))


def test_the_loop_is_woken_for_many_bytes_at_once() -> None:
    """To look for whose time has come takes a look at all connections."""
    with listen(FakeRaft()) as listener, contextlib.ExitStack() as stack:
        held = [stack.enter_context(refused(listener)) for _ in range(300)]
        before = sleeps()
        for sock in held:
            assert read_exactly(sock, len(BYTE)) == BYTE
        # Once for each quarter of a second that it took to dial them all; never for each of them.
        assert sleeps() - before < len(held) / 2


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(
            raw_head(
                line="GET /raft/stream/msgapp/1 HTTP/1.1",
                headers=peer_headers(x_etcd_cluster_id="1"),
            ),
            id="another cluster",
        ),
        pytest.param(raw_head(line="GET /raft/stream/strange/1 HTTP/1.1"), id="strange kind"),
        pytest.param(raw_head(line="GET /raft/stream/msgapp/ HTTP/1.1"), id="no member"),
    ],
)
def test_who_is_no_member_is_answered_to_the_end(request_bytes: bytes) -> None:
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        sock.sendall(request_bytes)
        reply = read_reply(sock)
        assert (reply.status, reply.body, reply.close) == (404, b"404 page not found\n", False)
        sock.sendall(GOOD)
        assert read_status(sock) == 204


def test_who_speaks_http_1_0_is_answered_to_the_end() -> None:
    line = "GET /raft/stream/msgapp/1 HTTP/1.0"
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        sock.sendall(raw_head(line=line))
        assert read_reply(sock).body == b"404 page not found\n"
        assert is_closed(sock)


def test_who_wants_the_connection_closed_is_answered_to_the_end() -> None:
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        sock.sendall(DIAL[:-2] + b"Connection: close\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert read_reply(sock).body == b"404 page not found\n"
            assert is_closed(sock)


@pytest.mark.parametrize(
    "go",
    [
        pytest.param(socket.socket.close, id="closes"),
        pytest.param(lambda sock: sock.shutdown(socket.SHUT_WR), id="ends its side"),
        pytest.param(lambda sock: sock.sendall(b"x"), id="says something"),
        pytest.param(lambda sock: sock.sendall(GOOD), id="asks something else"),
    ],
)
def test_the_connection_ends_when_the_caller(go: Callable[[socket.socket], None]) -> None:
    with listen(FakeRaft()) as listener, refused(listener) as sock:
        assert listener.stats().connections == 1
        go(sock)
        eventually(lambda: listener.stats().connections == 0)


@pytest.mark.parametrize(
    "go",
    [
        pytest.param(lambda sock: sock.shutdown(socket.SHUT_WR), id="ends its side"),
        pytest.param(lambda sock: sock.sendall(b"x"), id="says something"),
    ],
)
def test_what_the_loop_hears_while_it_is_refused_ends_it(
    monkeypatch: pytest.MonkeyPatch, go: Callable[[socket.socket], None]
) -> None:
    check = Handlers.check
    with (
        listen(FakeRaft()) as listener,
        dial(listener.url) as other,
        dial(listener.url) as sock,
    ):

        def check_late(self: Handlers, request: Request, **settings: bool) -> Answer | None:
            if request.path.startswith(STREAM_PREFIX):
                go(sock)
                other.sendall(GOOD)
                assert read_status(other) == 204  # so the loop has looked at the other as well
            return check(self, request, **settings)

        monkeypatch.setattr(Handlers, "check", check_late)
        other.sendall(GOOD)
        assert read_status(other) == 204
        sock.sendall(DIAL)
        eventually(lambda: listener.stats().connections == 1)


def test_who_sends_ahead_is_answered_to_the_end() -> None:
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        sock.sendall(DIAL + GOOD)
        assert [answer.split()[1] for answer in read_answers(sock, 2)] == [b"404", b"204"]


def test_it_makes_room_for_others() -> None:
    with listen(FakeRaft(), config=ReceiverConfig(max_connections=2)) as listener:
        held = [refused(listener) for _ in range(2)]
        with dial(listener.url) as sock:
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        assert listener.stats().closed_for_room >= 1
        assert is_closed(held[0])
        for one in held:
            one.close()


def test_closing_the_listener_ends_it_at_once() -> None:
    listener = listen(FakeRaft())
    with refused(listener) as sock:
        listener.close(deadline_s=60.0)
        assert is_closed(sock)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with contextlib.closing(Node(tmp_path)) as node:
        yield node


def test_over_tls_it_goes_on_and_ends_with_its_credentials(node: Node) -> None:
    listener = node.listen()
    with node.call() as sock:
        sock.sendall(DIAL)
        read_refusal(sock)
        assert read_exactly(sock, len(BYTE)) == BYTE
        node.credentials.reload()
        eventually(lambda: listener.stats().connections == 0)
        assert sock.recv(4096).replace(BYTE, b"") == b""
        catch_up_over_tls(node)


def catch_up_over_tls(node: Node) -> None:
    """See that the listener still answers."""
    with node.call() as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 204


def test_callers_that_are_refused_keep_nobody_from_being_served() -> None:
    with listen(FakeRaft()) as listener:
        held = [refused(listener) for _ in range(50)]
        catch_up(listener)
        with dial(listener.url) as sock:
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        for one in held:
            one.close()
