"""One budget for bodies, whatever way they come in: plain, TLS, chunked, ASGI, WSGI, a snapshot.

Each way is tried against a budget of which the test itself has taken the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from pipeline import Entry, Message, MessageType, ReceiverConfig, Snapshot, SnapshotMetadata
from pipeline.receive.asgi import asgi_app
from pipeline.receive.listener import Listener
from pipeline.receive.wsgi import wsgi_app
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT, MIB
from tests.support.http import HEARTBEAT, handlers_of, peer_headers
from tests.support.listening import GOOD, dial, raw_head, read_status
from tests.support.memory import frees_at_once, rss
from tests.support.raft import FakeRaft
from tests.support.snapshots import LINE, framed
from tests.support.tls import Authority
from tests.support.waiting import eventually

LIMIT = 16 * MIB
SIZE = 3 * MIB
SMALL = HEARTBEAT.marshal()


def append_of(size: int) -> bytes:
    return Message(type=MessageType.APP, from_=1, entries=[Entry(data=bytes(size))]).marshal()


LARGE = append_of(SIZE)


class Gated(FakeRaft):
    """``process`` waits for ``open`` with all but heartbeats."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def process(self, message: Message) -> None:
        super().process(message)
        if message.type is not MessageType.HEARTBEAT:
            assert self.open.wait(LONG_TIMEOUT)


class Node:
    """What a node has to be reached by."""

    def __init__(self, directory: Path) -> None:
        self.raft = Gated()
        self.config = ReceiverConfig(
            max_buffered_bytes=LIMIT,
            snapshot_dir=directory / "snapshots",
            stall_timeout_s=LONG_TIMEOUT,
        )
        self.handlers = handlers_of(self.raft, self.config)
        authority = Authority(directory)
        self.credentials = Credentials(authority.info())
        self.context = authority.client(*authority.issue("caller"))
        self.plain = Listener(self.handlers, "http://127.0.0.1:0", self.config)
        self.encrypted = Listener(
            self.handlers, "https://127.0.0.1:0", self.config, credentials=self.credentials
        )
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.encrypted.close)
        self._stack.callback(self.plain.close)

    def call(self, *, has_tls: bool = False) -> socket.socket:
        sock = self._stack.enter_context(dial((self.encrypted if has_tls else self.plain).url))
        if has_tls:
            sock = self.context.wrap_socket(sock, server_hostname="127.0.0.1")
            self._stack.enter_context(sock)
        return sock

    def close(self) -> None:
        self._stack.close()

    @property
    def used(self) -> int:
        return self.handlers.budget.used

    def post(self, body: bytes, *, has_tls: bool = False, is_chunked: bool = False) -> int | None:
        sock = self.call(has_tls=has_tls)
        head = raw_head(
            "transfer-encoding: chunked" if is_chunked else f"content-length: {len(body)}"
        )
        if not is_chunked:
            # Over TLS the core reads the second request of a connection.
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # refused before it was sent
            sock.sendall(head)
            if is_chunked:
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            for at in range(0, len(body), MIB):
                sock.sendall(body[at : at + MIB])
        return read_status(sock)

    def post_snapshot(self, body: bytes) -> int | None:
        metadata = SnapshotMetadata(index=1, term=1)
        snapshot = Snapshot(data=bytes(len(body)), metadata=metadata)
        message = Message(type=MessageType.SNAP, from_=1, snapshot=snapshot)
        data = framed(message, b"database")
        sock = self.call()
        with contextlib.suppress(ConnectionError):
            sock.sendall(raw_head(f"content-length: {len(data)}", line=LINE) + data)
        return read_status(sock)

    def post_asgi(self, body: bytes) -> int | None:
        statuses = []
        parts = [body[at : at + MIB] for at in range(0, len(body), MIB)]

        async def receive() -> Any:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(event: Any) -> None:
            statuses.append(event.get("status"))

        async def run() -> None:
            app = asgi_app(self.handlers, self.config)
            headers = [(name.encode(), value.encode()) for name, value in peer_headers().items()]
            scope = {"type": "http", "method": "POST", "path": "/raft", "headers": headers}
            await app(scope, receive, send)
            app.close()  # type: ignore[attr-defined]
            app.wait_closed(1e9)  # type: ignore[attr-defined]

        asyncio.run(run())
        return statuses[0]

    def post_wsgi(self, body: bytes) -> int | None:
        environ: dict[str, Any] = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        environ |= {"REQUEST_METHOD": "POST", "PATH_INFO": "/raft"}
        for name, value in peer_headers().items():
            environ["HTTP_" + name.upper().replace("-", "_")] = value
        setup_testing_defaults(environ)
        statuses = []
        app = wsgi_app(self.handlers, self.config)
        app(environ, lambda status, headers, error=None: statuses.append(status))  # type: ignore[arg-type]
        return int(statuses[0].split()[0])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()
    eventually(lambda: node.used == 0)


Post = Callable[[Node, bytes], int | None]

WAYS: dict[str, Post] = {
    "plain": lambda node, body: node.post(body),
    "chunked": lambda node, body: node.post(body, is_chunked=True),
    "TLS": lambda node, body: node.post(body, has_tls=True),
    "TLS, chunked": lambda node, body: node.post(body, has_tls=True, is_chunked=True),
    "a snapshot's message": lambda node, body: node.post_snapshot(body),
    "ASGI": lambda node, body: node.post_asgi(body),
    "WSGI": lambda node, body: node.post_wsgi(body),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_body_counts_until_its_message_is_answered(node: Node, way: str) -> None:
    node.raft.open.clear()
    answers: list[int | None] = []
    caller = threading.Thread(target=lambda: answers.append(WAYS[way](node, LARGE)))
    caller.start()
    kinds = (MessageType.APP, MessageType.SNAP)
    node.raft.wait_for(lambda: any(message.type in kinds for message in node.raft.processed))
    assert SIZE <= node.used <= SIZE + 2 * MIB
    node.raft.open.set()
    caller.join(LONG_TIMEOUT)
    assert answers == [204]
    eventually(lambda: node.used == 0)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("plain", "TLS")])
def test_a_body_without_room_is_refused_and_a_small_one_is_not(node: Node, way: str) -> None:
    rest = node.handlers.budget.share()
    assert rest.set(LIMIT - MIB)
    assert WAYS[way](node, LARGE) == 503
    eventually(lambda: node.used == LIMIT - MIB)
    assert WAYS[way](node, SMALL) == 204
    rest.close()
    assert WAYS[way](node, LARGE) == 204


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_body_of_the_core_without_room_waits_for_whoever_gives_it_back(
    node: Node, has_tls: bool
) -> None:
    listener = node.encrypted if has_tls else node.plain
    rest = node.handlers.budget.share()
    assert rest.set(LIMIT)
    answers: list[int | None] = []
    caller = threading.Thread(target=lambda: answers.append(node.post(LARGE, has_tls=has_tls)))
    caller.start()
    eventually(lambda: listener.stats().body_pauses > 0)
    assert node.post(SMALL, has_tls=has_tls) == 204
    assert answers == []
    rest.close()
    caller.join(LONG_TIMEOUT)
    assert answers == [204]


@frees_at_once
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_memory_that_is_used_again_counts_from_its_first_byte(node: Node, has_tls: bool) -> None:
    size = 8 * MIB
    sock = node.call(has_tls=has_tls)
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    body = append_of(size)
    for _ in range(20):  # kept for two seconds; this may be a busy machine, but not each time
        sock.sendall(raw_head(f"content-length: {len(body)}"))
        sock.sendall(body)
        assert read_status(sock) == 204
        node.raft.processed.clear()
        eventually(lambda: node.used == 0)
        sock.sendall(raw_head(f"content-length: {len(body)}") + body[:1])
        eventually(lambda: node.used > 0)
        used = node.used
        sock.sendall(body[1:])
        assert read_status(sock) == 204
        node.raft.processed.clear()
        if used > MIB:
            break
    assert used >= size


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_large_page_counts_as_a_whole(node: Node, has_tls: bool) -> None:
    sock = node.call(has_tls=has_tls)
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    sock.sendall(raw_head(f"content-length: {8 * MIB}") + bytes(2 * MIB + 1))
    eventually(lambda: node.used == 4 * MIB)


@frees_at_once
def test_memory_that_is_kept_is_freed_when_others_need_it(node: Node) -> None:
    size = 12 * MIB
    sock = node.call()
    body = append_of(size)
    before = rss()
    sock.sendall(raw_head(f"content-length: {len(body)}"))
    sock.sendall(body)
    assert read_status(sock) == 204
    node.raft.processed.clear()
    eventually(lambda: node.used == 0)
    rest = node.handlers.budget.share()
    assert rest.set(LIMIT - MIB), "what is kept is in nobody's way"
    eventually(lambda: rss() < before + size // 2)
    sock.sendall(raw_head(f"content-length: {len(body)}") + body[:1])
    eventually(lambda: node.used > LIMIT - MIB)
    assert node.used < LIMIT, "it was used again"


def test_a_listener_that_closes_gives_back_what_it_has_begun(node: Node) -> None:
    for has_tls in (False, True):
        for framing in ("transfer-encoding: chunked", f"content-length: {8 * MIB}"):
            sock = node.call(has_tls=has_tls)
            sock.sendall(GOOD)
            assert read_status(sock) == 204
            part = bytes(MIB)
            sock.sendall(raw_head(framing) + (b"%x\r\n" % (8 * MIB) if "chunk" in framing else b""))
            sock.sendall(part)
    eventually(lambda: node.used == 4 * MIB)
    node.plain.close()
    eventually(lambda: node.used == 2 * MIB)
    node.encrypted.close()
    eventually(lambda: node.used == 0)


def test_listeners_of_one_node_share_the_budget(node: Node) -> None:
    other = Listener(node.handlers, "http://127.0.0.1:0", node.config)
    with other, dial(other.url) as first:
        first.sendall(raw_head(f"content-length: {LIMIT + MIB}"))
        first.sendall(bytes(LIMIT))
        eventually(lambda: node.used >= LIMIT)
        answers: list[int | None] = []
        caller = threading.Thread(target=lambda: answers.append(node.post(LARGE)))
        caller.start()
        eventually(lambda: node.plain.stats().body_pauses > 0)
        first.close()
        caller.join(LONG_TIMEOUT)
        assert answers == [204]
