"""Raw receive: the bytes as they came, whichever way they came in, and what is lost without it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import pipeline.aio
from pipeline import (
    EncodedMessage,
    Entry,
    Inbox,
    Message,
    MessageType,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    Transport,
    TransportConfig,
)
from pipeline.receive.asgi import App
from pipeline.receive.handlers import Handlers
from pipeline.receive.listener import Listener
from pipeline.receive.wsgi import wsgi_app
from tests.support import LONG_TIMEOUT, MIB
from tests.support.fronts import AsgiFront, WsgiFront, running
from tests.support.http import (
    CLUSTER_ID,
    handlers_of,
    peer_headers,
    reply_of_handlers,
    reply_of_socket,
)
from tests.support.listening import ask, dial, post, read_status
from tests.support.raft import FakeRaft
from tests.support.snapshots import FILE, INDEX, framed, post_snapshot, snapshot
from tests.support.tls_listening import Node as TLSNode
from tests.support.wire import span, varint

# What raft-rs has and raftpb has not: Entry.sync_log and context; Message.request_snapshot,
# commit_term and priority.
ENTRY = span(0x3A, b"\x10\x05\x18\x07" + span(0x22, b"data") + b"\x28\x01" + span(0x32, b"context"))
FIELDS = ENTRY + b"\x68\x09" + b"\x78\x04" + varint(16 << 3) + b"\x03"


def strange(
    size: int = 0,
    *,
    kind: int = MessageType.APP,
    from_: int = 1,
    to: int = 2,
    fields: bytes = FIELDS,
) -> bytes:
    """Encode a message with fields of another schema, and ``size`` bytes of context."""
    head = b"\x08" + varint(kind) + b"\x10" + varint(to) + b"\x18" + varint(from_) + b"\x20\x05"
    return head + fields + span(0x62, bytes(size))


Way = Callable[[Handlers, ReceiverConfig, bytes], None]


def by_listener(handlers: Handlers, config: ReceiverConfig, body: bytes) -> None:
    """Twice: the head is odd the first time, and known the second."""
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        with dial(listener.url) as sock:
            for _ in range(2):
                sock.sendall(post(body))
                assert read_status(sock) == 204
        assert listener.stats().fast_requests > 0


def by_h11(handlers: Handlers, config: ReceiverConfig, body: bytes) -> None:
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        assert ask(listener.url, post(body, is_chunked=True)).status == 204
        assert listener.stats().general_requests == 1


def by_asgi(handlers: Handlers, config: ReceiverConfig, body: bytes) -> None:
    app = App(handlers, config)
    with running(AsgiFront) as front, contextlib.closing(app):
        front.app = app
        reply = reply_of_socket(front.url, "POST", "/raft", peer_headers(), body)
        assert reply.status == 204


def by_wsgi(handlers: Handlers, config: ReceiverConfig, body: bytes) -> None:
    with running(WsgiFront) as front:
        front.app = wsgi_app(handlers, config)
        reply = reply_of_socket(front.url, "POST", "/raft", peer_headers(), body)
        assert reply.status == 204


each_way = pytest.mark.parametrize(
    "way", [by_listener, by_h11, by_asgi, by_wsgi], ids=["listener", "h11", "asgi", "wsgi"]
)


def received(raft: FakeRaft) -> list[Any]:
    return list(raft.processed)


@contextlib.contextmanager
def taking(inbox: Inbox[Any]) -> Iterator[SimpleQueue[Any]]:
    """Take what is in an inbox, on a thread of its own; a MsgSnap is answered only then."""
    taken: SimpleQueue[Any] = SimpleQueue()
    is_over = threading.Event()

    def take() -> None:
        while not is_over.is_set():
            for message in inbox.take(timeout=0.01):
                taken.put(message)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield taken
    finally:
        is_over.set()
        thread.join()


@each_way
@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB], ids=["small", "100 kB", "3 MiB"])
def test_a_message_comes_whole_whichever_way_it_comes(way: Way, size: int) -> None:
    raft, body = FakeRaft(), strange(size)
    config = ReceiverConfig(encoded=True)
    handlers = handlers_of(raft, config)
    way(handlers, config, body)
    for message in received(raft):
        assert type(message) is EncodedMessage
        assert message.data == body
        assert memoryview(message.data).readonly
        assert (message.type, message.to, message.from_, message.term) == (3, 2, 1, 5)
        assert message.type is MessageType.APP
    assert len(raft.processed) == (2 if way is by_listener else 1)
    assert handlers.received.bytes_by_sender == {1: len(raft.processed) * len(body)}


@each_way
@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB], ids=["small", "100 kB", "3 MiB"])
def test_an_inbox_has_what_came_whole(way: Way, size: int) -> None:
    """It says itself whether messages are taken so; ``ReceiverConfig`` is not asked."""
    inbox, body, config = Inbox(encoded=True), strange(size), ReceiverConfig()
    handlers = handlers_of(FakeRaft(), config, inbox=inbox)
    with taking(inbox) as taken:
        way(handlers, config, body)
        messages = 2 if way is by_listener else 1
        for _ in range(messages):
            message = taken.get(timeout=LONG_TIMEOUT)
            assert (type(message), message.data) == (EncodedMessage, body)
            assert memoryview(message.data).readonly
            assert (message.type, message.to, message.from_, message.term) == (3, 2, 1, 5)
    assert handlers.received.bytes_by_sender == {1: messages * len(body)}
    assert handlers.received.unknown_fields == 0


@pytest.mark.parametrize("size", [0, 3 * MIB], ids=["small", "3 MiB"])
def test_a_message_comes_whole_over_tls(tmp_path: Path, size: int) -> None:
    node = TLSNode(tmp_path)
    try:
        node.listen(ReceiverConfig(encoded=True))
        sock = node.call()
        for body in (strange(size), strange(size, from_=7)):
            sock.sendall(post(body))
            assert read_status(sock) == 204
            message = received(node.raft)[-1]
            assert (type(message), message.data) == (EncodedMessage, body)
    finally:
        node.close()


def test_many_entries_are_not_made_into_objects() -> None:
    body = Message(type=MessageType.APP, entries=[Entry(index=1)] * 50_000).marshal()
    raft, config = FakeRaft(), ReceiverConfig(encoded=True)
    by_listener(handlers_of(raft, config), config, body)
    assert [message.data == body for message in received(raft)] == [True, True]


@each_way
def test_what_is_no_message_is_refused_all_the_same(way: Way) -> None:
    raft, config = FakeRaft(), ReceiverConfig(encoded=True)
    handlers = handlers_of(raft, config)
    with pytest.raises(AssertionError):
        way(handlers, config, strange() + b"\x0a")
    assert raft.processed == []
    assert handlers.received.failures == 1


def test_a_snapshot_comes_whole_with_its_database_at_the_index_it_names(tmp_path: Path) -> None:
    raft, config = FakeRaft(), ReceiverConfig(encoded=True, snapshot_dir=tmp_path / "snap")
    handlers = handlers_of(raft, config)
    body = snapshot().marshal() + FIELDS
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        assert ask(listener.url, post_snapshot(framed(body, b"database"))).status == 204
        broken = ask(listener.url, post_snapshot(framed(b"\x08", b"database")))
        assert (broken.status, broken.body[:29]) == (400, b"failed to decode raft message")
    (message,) = received(raft)
    assert (type(message), message.data, message.type) == (EncodedMessage, body, 7)
    assert (tmp_path / "snap" / FILE).read_bytes() == b"database"
    assert handlers.received.bytes_by_sender == {1: len(body) + len(b"database")}


def test_a_snapshot_without_database_and_the_next_index_come_whole(tmp_path: Path) -> None:
    raft, config = FakeRaft(), ReceiverConfig(encoded=True, snapshot_dir=tmp_path)
    metadata = SnapshotMetadata(index=INDEX + 1)
    body = Message(type=7, from_=1, snapshot=Snapshot(metadata=metadata)).marshal()
    with Listener(handlers_of(raft, config), "http://127.0.0.1:0", config) as listener:
        assert ask(listener.url, post_snapshot(framed(body))).status == 204
    assert received(raft)[0].data == body
    assert [path.name for path in tmp_path.iterdir()] == ["00000000000003e9.snap.db"]


@pytest.mark.parametrize("kind", [24, 2**31 - 1])
def test_a_type_that_only_a_later_raft_knows_is_the_nodes_to_read(kind: int) -> None:
    raft, config = FakeRaft(), ReceiverConfig(encoded=True)
    handlers = handlers_of(raft, config)
    body = strange(kind=kind)
    by_listener(handlers, config, body)
    assert [(type(m.type), m.type, m.data) for m in received(raft)] == [(int, kind, body)] * 2
    assert handlers.received.unknown == 0


@pytest.mark.parametrize("kind", [MessageType.HUP, MessageType.STORAGE_APPLY_RESP])
def test_process_local_types_are_not_delivered_encoded_either(kind: int) -> None:
    raft, config = FakeRaft(), ReceiverConfig(encoded=True)
    handlers = handlers_of(raft, config)
    by_listener(handlers, config, strange(kind=kind))
    assert (raft.processed, handlers.received.ignored) == ([], 2)


@pytest.fixture
def chain() -> Iterator[tuple[Transport, Transport, FakeRaft]]:
    """Member 1, which sends to 2, which has what it receives sent on, and what 3 has received."""

    class Forwarder(FakeRaft):
        def process(self, message: Any) -> None:
            middle.send([EncodedMessage(message.data, type=message.type, to=3)])

    config = TransportConfig(receiver=ReceiverConfig(encoded=True))
    last_raft = FakeRaft()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Transport(1, CLUSTER_ID, FakeRaft()))
        middle = stack.enter_context(Transport(2, CLUSTER_ID, Forwarder(), config=config))
        last = stack.enter_context(Transport(3, CLUSTER_ID, last_raft, config=config))
        first.add_peer(2, [middle.listen("http://127.0.0.1:0").url])
        middle.add_peer(3, [last.listen("http://127.0.0.1:0").url])
        yield first, middle, last_raft


@pytest.mark.parametrize("size", [0, 20_000, 100_000, 3 * MIB])
def test_what_was_received_is_sent_on_byte_for_byte(
    chain: tuple[Transport, Transport, FakeRaft], size: int
) -> None:
    first, middle, last_raft = chain
    body = strange(size)
    first.send([EncodedMessage(body, type=MessageType.APP, to=2)])
    (message,) = last_raft.wait_processed(1)
    assert message.data == body  # type: ignore[attr-defined]
    assert middle.stats()[3].failed == 0


@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB])
def test_a_received_message_itself_can_be_sent_by_another_transport(size: int) -> None:
    config = TransportConfig(receiver=ReceiverConfig(encoded=True))
    raft, other_raft = FakeRaft(), FakeRaft()
    body = strange(size)
    with (
        Transport(1, CLUSTER_ID, FakeRaft()) as sender,
        Transport(2, CLUSTER_ID, raft, config=config) as receiver,
    ):
        sender.add_peer(2, [receiver.listen("http://127.0.0.1:0").url])
        sender.send([EncodedMessage(body, type=MessageType.APP, to=2)])
        (message,) = raft.wait_processed(1)
    # Its transport has ended; the bytes are the message's.
    with (
        Transport(1, 0x99, FakeRaft()) as sender,
        Transport(2, 0x99, other_raft, config=config) as receiver,
    ):
        sender.add_peer(2, [receiver.listen("http://127.0.0.1:0").url])
        assert sender.send([message]) == 0
        (again,) = other_raft.wait_processed(1)
    assert again.data == body  # type: ignore[attr-defined]


def test_asyncio_is_given_encoded_messages_too() -> None:
    config = TransportConfig(receiver=ReceiverConfig(encoded=True))
    body = strange()

    class Node:
        def __init__(self) -> None:
            self.came: asyncio.Queue[EncodedMessage] = asyncio.Queue()

        async def process(self, message: EncodedMessage) -> None:
            await self.came.put(message)

        def is_id_removed(self, member_id: int) -> bool:
            return False

        def report_unreachable(self, member_id: int) -> None: ...
        def report_snapshot(self, member_id: int, status: Any) -> None: ...

    async def main() -> bytes:
        one, two = Node(), Node()
        async with (
            pipeline.aio.Transport(1, CLUSTER_ID, one) as sender,
            pipeline.aio.Transport(2, CLUSTER_ID, two, config=config) as receiver,
        ):
            sender.add_peer(2, [(await receiver.listen("http://127.0.0.1:0")).url])
            sender.send([EncodedMessage(body, type=MessageType.APP, to=2)])
            async with asyncio.timeout(LONG_TIMEOUT):
                return bytes((await two.came.get()).data)

    assert asyncio.run(main()) == body


# What is lost without it


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "pipeline.receive.handlers" and record.levelname == "WARNING"
    ]


@each_way
@pytest.mark.parametrize("size", [0, 3 * MIB], ids=["small", "3 MiB"])
def test_lost_fields_are_counted_and_told_of_once(
    way: Way, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    raft, config = FakeRaft(), ReceiverConfig()
    handlers = handlers_of(raft, config)
    for _ in range(2):
        way(handlers, config, strange(size, from_=7))
    messages = 4 if way is by_listener else 2
    assert handlers.received.counts().unknown_fields == messages
    expected = Message(
        type=MessageType.APP,
        to=2,
        from_=7,
        term=5,
        entries=[Entry(term=5, index=7, data=b"data")],
        context=bytes(size),
    )
    assert raft.processed == [expected] * messages
    (text,) = told(caplog)
    assert text.startswith("Raft message from member 7 at 127.0.0.1:")
    assert text.endswith("encoded=True, of ReceiverConfig or of the Inbox, would keep them")


@each_way
def test_nothing_is_counted_that_is_not_lost(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """What etcds of any version send, and anything at all where it is kept."""
    message = Message(
        type=MessageType.APP,
        from_=1,
        entries=[Entry(data=b"x")],
        snapshot=Snapshot(data=b"x", metadata=SnapshotMetadata(index=1, term=1)),
    )
    for profile in ("3.5", "3.6", "3.7"):
        config = ReceiverConfig()
        handlers = handlers_of(FakeRaft(), config)
        way(handlers, config, message.marshal(profile))
        assert handlers.received.unknown_fields == 0
    config = ReceiverConfig(encoded=True)
    handlers = handlers_of(FakeRaft(), config)
    way(handlers, config, strange())
    assert handlers.received.unknown_fields == 0
    assert told(caplog) == []


@each_way
def test_an_inbox_tells_of_fields_that_are_lost_as_they_are_taken(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    inbox, config = Inbox(), ReceiverConfig(encoded=True)  # of which the inbox knows better
    handlers = handlers_of(FakeRaft(), config, inbox=inbox)
    with taking(inbox) as taken:
        way(handlers, config, strange(from_=7))
        messages = 2 if way is by_listener else 1
        for _ in range(messages):
            entry = Entry(term=5, index=7, data=b"data")
            assert taken.get(timeout=LONG_TIMEOUT).entries == (entry,)
    assert handlers.received.unknown_fields == messages
    (text,) = told(caplog)
    assert text.startswith("Raft message from member 7 at an address that the inbox does not keep")


@pytest.mark.parametrize("encoded", [False, True])
def test_a_snapshot_in_an_inbox_is_whole_or_its_loss_is_counted_once(
    tmp_path: Path, encoded: bool
) -> None:
    inbox: Inbox[Any] = Inbox(encoded=True) if encoded else Inbox()
    config = ReceiverConfig(snapshot_dir=tmp_path)
    handlers = handlers_of(FakeRaft(), config, inbox=inbox)
    body = snapshot().marshal() + FIELDS
    with taking(inbox) as taken, Listener(handlers, "http://127.0.0.1:0", config) as listener:
        assert ask(listener.url, post_snapshot(framed(body, b"database"))).status == 204
        message = taken.get(timeout=LONG_TIMEOUT)
    assert message.type == MessageType.SNAP
    assert (type(message) is EncodedMessage and message.data == body) == encoded
    assert handlers.received.unknown_fields == (0 if encoded else 1)
    assert (tmp_path / FILE).read_bytes() == b"database"


@pytest.mark.parametrize("encoded", [False, True])
def test_the_fields_of_a_snapshot_are_counted_if_they_are_lost(
    tmp_path: Path, encoded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    raft, config = FakeRaft(), ReceiverConfig(snapshot_dir=tmp_path, encoded=encoded)
    handlers = handlers_of(raft, config)
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        for body in (snapshot().marshal(), snapshot().marshal() + b"\x78\x01"):
            assert ask(listener.url, post_snapshot(framed(body, b"database"))).status == 204
    assert len(raft.processed) == 2
    assert handlers.received.unknown_fields == (0 if encoded else 1)
    assert len(told(caplog)) == (0 if encoded else 1)


def test_the_log_hears_of_so_many_made_up_members_and_of_one_that_comes_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handlers = handlers_of(FakeRaft())
    for sender in range(1, 300):
        reply = reply_of_handlers(handlers, "POST", "/raft", peer_headers(), strange(from_=sender))
        assert reply.status == 204
    assert handlers.received.unknown_fields == 299
    assert len(told(caplog)) == 128
    handlers.forget(5)
    for _ in range(2):
        reply_of_handlers(handlers, "POST", "/raft", peer_headers(), strange(from_=5))
    assert len(told(caplog)) == 129
