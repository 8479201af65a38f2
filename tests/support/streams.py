"""A peer with streams that does byte by byte what the test says: it serves them, and dials.

All of it runs in the thread of the test, so that two ends of a stream are never looked at from two
threads, and what a peer does not read it does not read.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from pipeline import Entry, Message, MessageType, PeerStats, Transport, TransportConfig
from pipeline.stats import StreamStats
from pipeline.wire._frames import FrameReader, FrameWriter
from pipeline.wire._messages import EncodedMessage
from tests.support import LONG_TIMEOUT
from tests.support.frames import LINK_HEARTBEAT, plain
from tests.support.raft import FakeRaft
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: The Transport under test, and the peer.
MEMBER, PEER, CLUSTER = 1, 2, 1
KINDS = ("msgapp", "message")
VERSION = "X-Server-Version: 3.5.1"


def head(status: str = "200 OK", *lines: str, is_chunked: bool = True) -> bytes:
    """Return the head of an answer to a dial; ``lines`` instead of the version and the cluster."""
    lines = lines or (VERSION, "X-Etcd-Cluster-Id: 1")
    framing = ("Transfer-Encoding: chunked",) if is_chunked else ()
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, *framing, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


class Chunks:
    """Takes the framing off a chunked body, however it is cut."""

    def __init__(self) -> None:
        self._left = b""
        self.sizes: list[int] = []  # of the chunks that are whole
        self.has_ended = False

    def feed(self, data: bytes) -> bytes:
        """Return what is in the chunks that have come whole since the last call."""
        self._left += data
        found = b""
        while not self.has_ended and b"\r\n" in self._left:
            line, _, rest = self._left.partition(b"\r\n")
            size = int(line, 16)
            if len(rest) < size + 2:
                break
            assert rest[size : size + 2] == b"\r\n", rest[:64]
            found += rest[:size]
            self._left = rest[size + 2 :]
            self.has_ended = size == 0
            if size:
                self.sizes.append(size)
        return found


class Link:
    """A connection to the node under test, plain or TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(LONG_TIMEOUT)

    def read_head(self) -> bytes:
        """Read up to and with the empty line, and no more; b"" when the connection ends before."""
        received = bytearray()
        while not received.endswith(b"\r\n\r\n"):
            byte = self.sock.recv(1)
            if not byte:
                return b""
            received += byte
        return bytes(received)

    def is_ended(self) -> bool:
        """Wait for the end of the connection, whatever is received before it."""
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):
            while self.sock.recv(65536):
                pass
        return True

    def has_more(self) -> bool:
        """Tell whether something has come, or the end has."""
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return True
        return bool(select.select([self.sock], [], [], 0)[0])

    def reset(self) -> None:
        """End the connection with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.sock.close()


class Dialled(Link):
    """A dial of the node under test: what the peer sends on goes to its reader."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.head = self.read_head().decode()
        self.line = self.head.partition("\r\n")[0]
        self.kind = self.line.split("/")[3] if "/raft/stream/" in self.line else "post"
        stream = "msgapp" if self.kind == "msgapp" else "message"
        self._frames = FrameWriter(stream, from_=PEER, to=MEMBER)

    def accept(self, *, is_chunked: bool = True) -> Self:
        """Answer 200; what follows are frames."""
        self.is_chunked = is_chunked
        self.write(head(is_chunked=is_chunked))
        return self

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def frames(self, messages: Iterable[Message]) -> bytes:
        """Return the frames of messages, one after another."""
        return b"".join(self._frames.write(message) for message in messages)

    def heartbeat(self) -> bytes:
        return self._frames.heartbeat()

    def send_bytes(self, data: bytes) -> None:
        """Send a piece of the stream, as a chunk if it is chunked."""
        self.write(chunk(data) if self.is_chunked else data)

    def send(self, *messages: Message) -> None:
        self.send_bytes(self.frames(messages))

    def end(self) -> None:
        """End the stream in good order; the connection stays."""
        self.write(LAST_CHUNK)


class Attached(Link):
    """A dial of the peer: what the node under test sends comes here."""

    def __init__(self, sock: socket.socket, kind: str) -> None:
        super().__init__(sock)
        self.kind = kind
        self.heartbeats = 0
        self._chunks = Chunks()
        self._frames = FrameReader(kind, from_=MEMBER, to=PEER)

    @property
    def chunk_sizes(self) -> list[int]:
        return self._chunks.sizes

    def accepted(self) -> Self:
        """Read the head of the answer, which has to be a stream's."""
        self.head = self.read_head().decode()
        assert self.head.startswith("HTTP/1.1 200 OK\r\n"), self.head
        return self

    def read(self, count: int) -> list[Message]:
        """Read so many messages, and whatever came with the last."""
        found: list[Message] = []
        while len(found) < count:
            data = self.sock.recv(1 << 18)
            assert data, f"the connection ended after {len(found)} messages"
            found += self._take(data)
        return found

    def read_heartbeat(self) -> None:
        """Read until one more heartbeat of the link has come, and nothing else."""
        before = self.heartbeats
        while self.heartbeats == before:
            data = self.sock.recv(1 << 18)
            assert data, "the connection ended"
            assert self._take(data) == []

    def read_rest(self) -> list[Message]:
        """Read the rest of the stream: up to its last chunk, which has to come."""
        found: list[Message] = []
        while not self._chunks.has_ended:
            data = self.sock.recv(1 << 18)
            assert data, "the connection ended without the last chunk"
            found += self._take(data)
        return found

    def _take(self, data: bytes) -> list[Message]:
        self._frames.feed(self._chunks.feed(data))
        found = []
        while (message := self._frames.read()) is not None:
            message = plain(message)
            if message == LINK_HEARTBEAT:
                self.heartbeats += 1
            else:
                found.append(message)
        return found


@dataclass
class FakePeer:
    """Member 2: a server, and what it dials with.

    Parameters
    ----------
    server, client : ssl.SSLContext, optional
        For https.
    """

    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    _early: list[Dialled] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._listening = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._listening.listen(128)
        self._listening.settimeout(LONG_TIMEOUT)
        scheme = "http" if self.server is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def next_dial(self, kind: str = "") -> Dialled:
        """Wait for a dial, of one kind if it is said; others stay for later. A kind is "post"."""
        for early in self._early:
            if kind in ("", early.kind):
                self._early.remove(early)
                return early
        while True:
            dialled = self._accept()
            if kind in ("", dialled.kind):
                return dialled
            self._early.append(dialled)

    def is_dialled(self) -> bool:
        """Tell whether a dial waits."""
        return bool(self._early) or bool(select.select([self._listening], [], [], 0)[0])

    def close_listener(self) -> None:
        """Refuse dials from now on; those that have not been looked at end."""
        self._listening.close()

    def _accept(self) -> Dialled:
        while True:
            sock, _ = self._listening.accept()
            self._stack.callback(sock.close)
            sock.settimeout(LONG_TIMEOUT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.server is not None:
                # Those that were given up meanwhile are not looked at.
                try:
                    sock = self.server.wrap_socket(
                        sock, server_side=True, suppress_ragged_eofs=False
                    )
                except OSError:
                    continue
                self._stack.callback(sock.close)
            dialled = Dialled(sock)
            if dialled.head:
                return dialled

    def connect(self, url: str, receive_buffer: int | None = None) -> socket.socket:
        """Connect to the node under test."""
        host, _, port = url.partition("://")[2].rpartition(":")
        sock = self._stack.enter_context(socket.socket())
        sock.settimeout(LONG_TIMEOUT)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect((host, int(port)))
        if self.client is None:
            return sock
        return self._stack.enter_context(
            self.client.wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)
        )

    def ask(
        self, url: str, kind: str, *, from_: int = PEER, to: str = f"{MEMBER:x}", **settings: int
    ) -> Attached:
        """Dial the node under test; the answer is not read."""
        attached = Attached(self.connect(url, **settings), kind)
        lines = [
            f"GET /raft/stream/{kind}/{from_:x} HTTP/1.1",
            "Host: test",
            f"X-Etcd-Cluster-Id: {CLUSTER:x}",
            "X-Min-Cluster-Version: 3.0.0",
            f"X-Raft-To: {to}",
            f"X-Server-From: {from_:x}",
            VERSION,
        ]
        attached.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        return attached

    def attach(self, url: str, kind: str, **settings: int) -> Attached:
        """Dial the node under test, which takes it for its writer."""
        return self.ask(url, kind, **settings).accepted()


# -- what the node under test tells


def stream_of(node: Transport, kind: str, direction: str, peer_id: int = PEER) -> StreamStats:
    """Return what is told of one end of a stream."""
    (found,) = [
        stream
        for stream in node.peer_stats()[peer_id].streams
        if (stream.kind, stream.direction) == (kind, direction)
    ]
    return found


def wait_up(node: Transport, kind: str, direction: str, peer_id: int = PEER) -> None:
    """Wait until a stream is up."""
    eventually(
        lambda: stream_of(node, kind, direction, peer_id).since is not None,
        lambda: f"{kind}, {direction}, is up: {stats_of(node, peer_id)}",
    )


def wait_down(node: Transport, kind: str, direction: str, peer_id: int = PEER) -> None:
    """Wait until a stream is down."""
    eventually(
        lambda: stream_of(node, kind, direction, peer_id).since is None,
        lambda: f"{kind}, {direction}, is down: {stats_of(node, peer_id)}",
    )


def wait_all_up(*nodes: tuple[Transport, int]) -> None:
    """Wait until all four streams with a peer are up, at each node."""
    for node, peer_id in nodes:
        for kind in KINDS:
            for direction in ("in", "out"):
                wait_up(node, kind, direction, peer_id)


def stats_of(node: Transport, peer_id: int = PEER) -> PeerStats:
    return node.peer_stats()[peer_id]


# -- messages


def heartbeat(index: int = 0, *, from_: int = PEER, to: int = MEMBER) -> Message:
    """One that goes by the message stream, told from others by its index."""
    return Message(type=MessageType.HEARTBEAT, from_=from_, to=to, term=1, index=index)


def append(index: int, data: bytes = b"", *, from_: int = PEER, to: int = MEMBER) -> Message:
    """One that goes by the msgapp stream: the entry behind ``index``."""
    return Message(
        type=MessageType.APP, from_=from_, to=to, term=1, log_term=1, index=index, commit=index,
        entries=[Entry(term=1, index=index + 1, data=data)],
    )  # fmt: skip


def of_kind(kind: str, index: int, data: bytes = b"", **ends: int) -> Message:
    """A message that goes by a stream of a kind."""
    return append(index, data, **ends) if kind == "msgapp" else heartbeat(index, **ends)


def indexes(messages: Iterable[Message | EncodedMessage]) -> Iterator[int]:
    """The numbers of messages that ``of_kind`` has made."""
    return (plain(message).index for message in messages)


# -- the node under test


class Lab:
    """A peer, and the node under test, which has not been started.

    Parameters
    ----------
    authority : Authority, optional
        For https; plain without.
    **defaults
        Of TransportConfig, for what ``start`` is not told.
    """

    def __init__(self, authority: Authority | None = None, **defaults: Any) -> None:
        self.defaults = {"probe_interval_s": 0, **defaults}
        self.raft = FakeRaft()
        self.critical: list[Exception] = []
        self.info = None
        contexts: dict[str, ssl.SSLContext] = {}
        if authority is not None:
            self.info = authority.info()
            files = authority.issue("peer")
            contexts = {"server": authority.server(), "client": authority.client(*files)}
        self._stack = contextlib.ExitStack()
        self.peer = self._stack.enter_context(FakePeer(**contexts))

    def start(self, raft: FakeRaft | None = None, **settings: Any) -> Transport:
        """Start it, with the peer; settings are TransportConfig's, and ``inbox``."""
        inbox = settings.pop("inbox", None)
        self.node = self._stack.enter_context(
            Transport(
                MEMBER,
                CLUSTER,
                raft or self.raft,
                config=TransportConfig(**{**self.defaults, **settings}),
                tls=self.info,
                on_critical_error=self.critical.append,
                **({} if inbox is None else {"inbox": inbox}),
            )
        )
        self.listener = self.node.listen(f"{self.peer.url.partition(':')[0]}://127.0.0.1:0")
        self.url = self.listener.url
        self.node.add_peer(PEER, [self.peer.url])
        return self.node

    def close(self) -> None:
        self._stack.close()
