"""The core of streams without what is built on it: a loop, its ends, and what the peer's end does.

What ``stream/writer.py`` and ``stream/reader.py`` do of themselves is left to the test.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from types import TracebackType
from typing import Any, Self

from pipeline import Entry, Inbox, Message, MessageType, PipelineConfig
from pipeline._core import ActiveFlag, Sender
from pipeline.net._budget import BodyBudget
from pipeline.net._sockets import OwnSocket, open_socket
from pipeline.net.pool import PooledConnection
from pipeline.send.dispatcher import Dispatcher
from pipeline.stream._streams import Channels, Reader, StreamEvent, Streams, Writer, error_text
from tests.support import LONG_TIMEOUT, MIB
from tests.support.senders import assert_balanced
from tests.support.waiting import eventually

MEMBER, PEER = 1, 2
HEAD = b"HTTP/1.1 200 OK\r\nX-Server-Version: 3.5.1\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def append(index: int, data: bytes = b"") -> Message:
    """A MsgApp from the peer, or to it: told from others by its index."""
    return Message(
        type=MessageType.APP, from_=PEER, to=MEMBER, term=1, log_term=1, index=index, commit=index,
        entries=[Entry(term=1, index=index + 1, data=data)],
    )  # fmt: skip


def outgoing(index: int, data: bytes = b"") -> Message:
    message = append(index, data)
    message.from_, message.to = MEMBER, PEER
    return message


class Lines:
    """Two connected TCP sockets: one is ours, for an end, the other is the peer's."""

    def __init__(self, receive_buffer: int = 0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            if receive_buffer:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.ours: OwnSocket = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)
            self.ours.setblocking(True)
            self.ours.connect(listening.getsockname())
            self.ours.setblocking(False)
            self.peer, _ = listening.accept()
        self.peer.settimeout(LONG_TIMEOUT)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self.ours.close()
        self.peer.close()

    def read_to_end(self) -> bytes:
        """Read all that comes until the connection ends."""
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := self.peer.recv(1 << 18):
                received += data
        return received


class OurWriter(Writer):
    """Notes what it hears of: ``lost`` holds (error's text, messages that failed)."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.lost: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

    def on_event(self, event: StreamEvent, error: int) -> None:
        assert event is StreamEvent.LOST
        self.lost.put((error_text(error), self.take_lost()))


class OurReader(Reader):
    """Notes what it hears of."""

    def __init__(self, *args: Any) -> None:
        self.dials: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.heads: queue.SimpleQueue[tuple[bytes, str]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_connect(self) -> None:
        self.dials.put(time.monotonic())

    def on_event(self, event: StreamEvent, error: int) -> None:
        if event is StreamEvent.HEAD:
            self.heads.put((self.head(), error_text(error)))
        else:
            self.lost.put(error_text(error))


class OurSender(Sender):
    """What a pipeline is to a loop."""

    def forget_after_fork(self) -> None:
        """Nothing else is to be forgotten."""


class Node:
    """A loop with streams, and the ends that a test makes there."""

    def __init__(
        self, *, drops_proposals: bool = False, budget: int = 64 * MIB, max_messages: int = 4096
    ) -> None:
        self.dispatcher = Dispatcher("core", queue_bytes=64 * MIB, max_threads=2)
        self.inbox = Inbox(max_messages=max_messages)
        self.source = self.inbox.open_source(lambda *_: None)
        self.streams = Streams(
            self.dispatcher.loop, BodyBudget(budget, MIB), self.source, self.source,
            delivered_types=(1 << 64) - 1, max_bytes=512 * MIB, drops_proposals=drops_proposals,
        )  # fmt: skip
        self.streams.open()
        self.ends: list[Writer | Reader] = []
        self.lines: list[Lines] = []  # kept open as long as the node

    def __enter__(self) -> Self:
        self.dispatcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it as a node does: first its ends, then the loop."""
        for end in self.ends:
            end.begin_stop()
        for end in self.ends:
            assert end.wait_stopped(LONG_TIMEOUT)
        assert self.dispatcher.stop(time.monotonic() + LONG_TIMEOUT)
        self.streams.close()
        self.inbox.close_source(self.source)
        assert self.dispatcher.loop.streams == set()
        for end in self.ends:
            if isinstance(end, Writer):
                books = end.stats()
                assert_balanced(books)
                assert (books.queued, books.in_flight) == (0, 0)
        for line in self.lines:
            line.close()

    def writer(self, kind: str = "msgapp", **settings: Any) -> OurWriter:
        limits = {"queue_length": 4096, "queue_bytes": 64 * MIB, **settings}
        writer = OurWriter(self.streams, kind, MEMBER, PEER, profile="3.5", **limits)
        self.ends.append(writer)
        return writer

    def attached(self, kind: str = "msgapp", **settings: Any) -> tuple[OurWriter, Lines]:
        """Return a writer that is up, and where it writes; the head has been read."""
        lines = Lines(settings.pop("receive_buffer", 0))
        self.lines.append(lines)
        writer = self.writer(kind, **settings)
        assert writer.attach(lines.ours, HEAD, is_chunked=True)
        assert _exactly(lines.peer, len(HEAD)) == HEAD
        eventually(lambda: writer.working)
        return writer, lines

    def reader(self, kind: str = "msgapp") -> OurReader:
        reader = OurReader(self.streams, kind, MEMBER, PEER)
        self.ends.append(reader)
        return reader

    def asking(self, kind: str = "msgapp") -> tuple[OurReader, Lines]:
        """Return a reader that has asked for its stream, and the line to answer it on."""
        reader, lines = self.reader(kind), Lines()
        self.lines.append(lines)
        reader.dial_after(0)
        reader.dials.get(timeout=LONG_TIMEOUT)
        request = b"GET /raft/stream HTTP/1.1\r\n\r\n"
        assert reader.connect(lines.ours, request)
        assert _exactly(lines.peer, len(request)) == request
        return reader, lines

    def up(
        self, kind: str = "msgapp", *, is_chunked: bool = True, behind: bytes = b""
    ) -> tuple[OurReader, Lines]:
        """Return a reader that is up, with what came right ``behind`` the head of its answer."""
        reader, lines = self.asking(kind)
        lines.peer.sendall(HEAD + behind)
        assert reader.heads.get(timeout=LONG_TIMEOUT)[1] == error_text(0)
        reader.accept(len(HEAD), is_chunked=is_chunked)
        eventually(lambda: reader.state != "judged")
        return reader, lines

    def taken(self, count: int) -> list[Message]:
        """Wait for so many messages; they are all that there are."""
        found: list[Message] = []
        while len(found) < count:
            more = self.inbox.take(count - len(found), LONG_TIMEOUT)
            assert more, f"{len(found)} of {count} messages came"
            found += more
        return found

    def channels(self, msgapp: Writer | None, message: Writer | None = None) -> Channels:
        """Return what chooses between streams and a pipeline without workers to speak of."""
        sender = OurSender()
        connections = [PooledConnection(1)]
        self.dispatcher.open(sender, ActiveFlag(), PipelineConfig(connections=1), connections)
        return Channels(sender, msgapp, message, lambda message: None)


def _exactly(sock: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        data = sock.recv(count - len(received))
        assert data, received
        received += data
    return received
