"""Order: what ``PipelineConfig(connections=1)`` promises, and what of it when a connection breaks.

Upstream promises none: its pipeline has four connections."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import (
    Entry,
    Inbox,
    Message,
    MessageType,
    PipelineConfig,
    SnapshotStatus,
    TLSInfo,
    Transport,
    TransportConfig,
)
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import OK, ScriptedServer, close, in_turn, reset
from tests.support.tls import Authority
from tests.support.waiting import eventually

APP, PROP, HEARTBEAT = MessageType.APP, MessageType.PROP, MessageType.HEARTBEAT
SMALL, LARGE = Entry(data=b"small"), Entry(data=bytes(100_000))


class Node:
    """Writes down which messages came, as (index, term); ``on_process`` is called after that."""

    def __init__(self, on_process: Callable[[Message], None] = lambda message: None) -> None:
        self.came: list[tuple[int, int]] = []
        self.on_process = on_process

    def process(self, message: Message) -> None:
        self.came.append((message.index, message.term))
        self.on_process(message)

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


class Link:
    """A Transport that sends to another one, over ``connections``; both are in this process."""

    def __init__(
        self,
        node: Node,
        raft: FakeRaft,
        tls: TLSInfo | None,
        connections: int,
        inbox: Inbox | None,
    ) -> None:
        config = TransportConfig(
            pipeline=PipelineConfig(connections=connections, queue_length=20_000),
            probe_interval_s=0,
        )
        self.raft = raft
        self.sender = Transport(1, 1, raft, config=config, tls=tls)
        self.receiver = Transport(2, 1, node, config=config, tls=tls, inbox=inbox)

    @contextmanager
    def up(self) -> Iterator[Link]:
        with self.sender, self.receiver:
            scheme = "http" if self.sender.credentials is None else "https"
            self.listener = self.receiver.listen(f"{scheme}://127.0.0.1:0")
            self.sender.add_peer(2, [self.listener.url])
            yield self

    def cut(self) -> None:
        """Break the connection, as a network does: neither end has said anything of it."""
        worker = self.sender._peers[2].pipeline.workers[0]
        with socket.socket(fileno=os.dup(worker.connection.sock.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)

    def settle(self) -> None:
        books = self.sender.stats
        eventually(lambda: books()[2].queued + books()[2].in_flight == 0, timeout=LONG_TIMEOUT * 4)


@pytest.fixture(params=["plain", "TLS"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Link]]:
    tls = Authority(tmp_path).info() if request.param == "TLS" else None
    with ExitStack() as stack:

        def make(node: Node, *, connections: int = 1, inbox: Inbox | None = None) -> Link:
            return stack.enter_context(Link(node, FakeRaft(), tls, connections, inbox).up())

        yield make


def numbered(count: int, thread: int = 0) -> Iterator[Message]:
    """Messages of three types, one after the other; every fiftieth has 100 kB."""
    for index in range(count):
        type_, entry = (APP, HEARTBEAT, PROP)[index % 3], SMALL if index % 50 else LARGE
        yield Message(type=type_, to=2, from_=1, term=thread, index=index, entries=[entry])


@pytest.mark.parametrize("threads", [1, 4])
def test_20_000_messages_come_over_one_connection_as_each_thread_sent_them(
    link: Callable[..., Link], threads: int
) -> None:
    """Four handler threads receive."""
    node = Node()
    it = link(node)
    each = 20_000 // threads

    def send(thread: int) -> int:
        return it.sender.send(numbered(each, thread))

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(send, range(threads))) == 0
    it.settle()
    books = it.sender.stats()[2]
    assert (books.sent, books.failed) == (20_000, 0)
    assert it.listener.stats().accepted == 1
    for thread in range(threads):
        assert [index for index, term in node.came if term == thread] == list(range(each))


def test_20_000_messages_are_taken_from_an_inbox_as_they_were_sent(
    link: Callable[..., Link],
) -> None:
    """Its lanes change nothing about that, nor that it is full most of the time."""
    inbox: Inbox = Inbox(max_messages=10)
    it = link(Node(), inbox=inbox)
    assert it.sender.send(numbered(20_000)) == 0
    taken: list[int] = []
    while len(taken) < 20_000:
        batch = inbox.take(timeout=LONG_TIMEOUT)
        assert batch
        taken += [message.index for message in batch]
    assert taken == list(range(20_000))
    assert it.listener.stats().accepted == 1


def test_the_next_message_leaves_when_the_one_before_has_its_outcome(
    link: Callable[..., Link],
) -> None:
    begun, release = threading.Event(), threading.Event()

    def hold(message: Message) -> None:
        if message.index == 0:
            begun.set()
            assert release.wait(LONG_TIMEOUT)

    node = Node(hold)
    it = link(node)
    assert it.sender.send(message() for _ in range(3)) == 0
    assert begun.wait(LONG_TIMEOUT)
    books = it.sender.stats()[2]
    assert (books.in_flight, books.queued) == (1, 2)
    release.set()
    it.settle()
    assert len(node.came) == 3


def test_over_several_connections_a_message_may_overtake_another(
    link: Callable[..., Link],
) -> None:
    """Why one is promised nothing: the first is not answered until the second was processed."""
    second = threading.Event()
    waited = []

    def hold(message: Message) -> None:
        if message.index == 1:
            second.set()
        else:
            waited.append(second.wait(LONG_TIMEOUT))

    it = link(Node(hold), connections=2)
    messages = [Message(type=APP, to=2, from_=1, index=index) for index in range(2)]
    assert it.sender.send(messages) == 0
    it.settle()
    assert waited == [True]
    assert it.sender.stats()[2].sent == 2


def test_what_is_sent_again_over_a_new_connection_does_not_fall_behind(
    link: Callable[..., Link],
) -> None:
    """The connection breaks after a message was processed and before it is answered.

    A MsgApp comes once more, next; a MsgProp is not sent twice, and fails.
    """
    count = 2_001  # one comes after the last cut
    cuts = {index for index in range(count) if index % 100 == 99}
    seen: set[int] = set()

    def cut_once(message: Message) -> None:
        if message.index in cuts - seen:
            seen.add(message.index)
            it.cut()

    node = Node(cut_once)
    it = link(node)
    sent = [
        Message(type=(APP, PROP)[index % 200 == 199], to=2, from_=1, index=index)
        for index in range(count)
    ]
    assert it.sender.send(sent) == 0
    it.settle()
    again = {index for index in cuts if index % 200 == 99}
    expected = [index for index in range(count) for _ in range(1 + (index in again))]
    assert [index for index, _ in node.came] == expected
    books = it.sender.stats()[2]
    assert (books.sent, books.failed) == (count - 10, 10)
    assert it.raft.unreachable == [2] * 10
    assert it.listener.stats().accepted == 1 + len(cuts)


@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
def test_what_breaks_is_sent_again_or_fails_before_the_next_is_sent(end: object) -> None:
    config = TransportConfig(pipeline=PipelineConfig(connections=1), probe_interval_s=0)
    script = in_turn(OK, end, OK, OK, end, end, OK)  # type: ignore[arg-type]
    raft = FakeRaft()
    with ScriptedServer(script) as server, Transport(1, 1, raft, config=config) as transport:
        transport.add_peer(2, [server.url])
        bodies = [message(HEARTBEAT, bytes([index])) for index in range(5)]
        assert transport.send(bodies) == 0
        requests = server.wait_requests(7)
        order = [bodies.index(Message.unmarshal(request.body)) for request in requests]
        assert order == [0, 1, 1, 2, 3, 3, 4]
        eventually(lambda: transport.stats()[2].sent == 4)
        assert transport.stats()[2].failed == 1
        assert raft.unreachable == [2]
        assert all(a.connection <= b.connection for a, b in pairwise(requests))
