"""Streams of a Transport: upstream's tests by name, beside a peer that is made of sockets.

What hostile and broken peers do to them: tests/fault/test_streams.py.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import (
    EncodedMessage,
    Entry,
    MemberRemovedError,
    Message,
    MessageType,
    Snapshot,
    SnapshotStatus,
    Transport,
    TransportConfig,
)
from pipeline.stream.reader import StreamReader
from tests.functional.test_send_message import MESSAGES
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import assert_balanced
from tests.support.streams import (
    KINDS,
    MEMBER,
    PEER,
    VERSION,
    Dialled,
    FakePeer,
    Lab,
    append,
    head,
    heartbeat,
    indexes,
    of_kind,
    stats_of,
    stream_of,
    wait_all_up,
    wait_down,
    wait_up,
)
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = pytest.mark.streams

CLAIMED = TransportConfig().server_version


@pytest.fixture(params=["plain", "tls"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(Authority(tmp_path) if request.param == "tls" else None)
    yield lab
    lab.close()


@pytest.fixture
def plain_lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.close()


def working(node: Transport, kind: str) -> bool:
    return stream_of(node, kind, "out").since is not None


def posted(node: Transport, peer_id: int = PEER) -> int:
    """How many messages went to the pipeline: all but those that went to a stream."""
    books = [stream.books for stream in stats_of(node, peer_id).streams]
    return node.stats()[peer_id].offered - sum(one.offered for one in books if one is not None)


# -- who serves: upstream's http_test.go


@pytest.mark.parametrize("kind", KINDS)
def test_serve_raft_stream_prefix(lab: Lab, kind: str) -> None:
    lab.start()
    attached = lab.peer.attach(lab.url, kind)
    assert f"\r\nX-Server-Version: {CLAIMED}\r\n" in attached.head
    assert "\r\nX-Etcd-Cluster-Id: 1\r\n" in attached.head
    assert "\r\nTransfer-Encoding: chunked\r\n" in attached.head
    wait_up(lab.node, kind, "out")
    lab.node.send([of_kind(kind, 7, from_=1, to=2)])
    assert list(indexes(attached.read(1))) == [7]


@pytest.mark.parametrize(
    ("line", "changed", "status"),
    [
        ("PUT /raft/stream/message/2", {}, 405),
        ("POST /raft/stream/message/2", {}, 405),
        ("DELETE /raft/stream/message/2", {}, 405),
        ("GET /raft/stream/strange/2", {}, 404),
        ("GET /raft/stream/strange", {}, 404),
        ("GET /raft/stream/message/", {}, 404),
        ("GET /raft/stream/message/3", {}, 404),
        ("GET /raft/stream/message/5", {}, 410),
        ("GET /raft/stream/message/5", {"X-Raft-To": "3"}, 410),
        ("GET /raft/stream/message/2", {"X-Etcd-Cluster-Id": "2"}, 412),
        ("GET /raft/stream/message/2", {"X-Raft-To": "3"}, 412),
        ("GET /raft/stream/message/2", {"X-Raft-To": "01"}, 412),
        ("GET /raft/stream/message/2", {"X-Server-Version": "2.0.0"}, 412),
    ],
)
def test_serve_raft_stream_prefix_bad(
    plain_lab: Lab, line: str, changed: dict[str, str], status: int
) -> None:
    plain_lab.raft.removed = {5}
    plain_lab.start()
    headers = {
        "Host": "test",
        "X-Etcd-Cluster-Id": "1",
        "X-Min-Cluster-Version": "3.0.0",
        "X-Raft-To": "1",
        "X-Server-Version": "3.5.1",
        **changed,
    }
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    sock = plain_lab.peer.connect(plain_lab.url)
    sock.sendall("\r\n".join(lines).encode())
    response = Dialled(sock)
    assert response.head.split()[1] == str(status), response.head
    assert not working(plain_lab.node, "message")
    assert ("X-Server-Version" in response.head) == (status != 405)


def test_close_notifier(lab: Lab) -> None:
    """A connection with a stream is held until its writer ends, and no longer."""
    lab.start()
    attached = lab.peer.attach(lab.url, "message")
    attached.read_heartbeat()
    assert not attached.has_more()
    lab.node.stop()
    assert attached.read_rest() == []
    assert attached.is_ended()


# -- who sends: upstream's stream_test.go


@pytest.mark.parametrize("kind", KINDS)
def test_stream_writer_attach_outgoing_conn(lab: Lab, kind: str) -> None:
    lab.start()
    assert not working(lab.node, kind)
    before = None
    for index in range(3):
        attached = lab.peer.attach(lab.url, kind)
        if before is not None:
            assert before.read_rest() == []
            assert before.is_ended()
        wait_up(lab.node, kind, "out")
        lab.node.send([of_kind(kind, index, from_=1, to=2)])
        assert list(indexes(attached.read(1))) == [index]
        assert working(lab.node, kind)
        before = attached
    lab.node.remove_peer(PEER)
    assert attached.read_rest() == []
    assert attached.is_ended()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_stream_writer_attach_bad_outgoing_conn(lab: Lab, kind: str, ending: str) -> None:
    lab.start()
    attached = lab.peer.attach(lab.url, kind)
    wait_up(lab.node, kind, "out")
    getattr(attached, ending)()
    wait_down(lab.node, kind, "out")
    assert stream_of(lab.node, kind, "out").books is not None


# -- who dials: upstream's stream_test.go


@pytest.mark.parametrize("kind", KINDS)
def test_stream_reader_dial_request(lab: Lab, kind: str) -> None:
    lab.start()
    dialled = lab.peer.next_dial(kind)
    lines = dialled.head.split("\r\n")
    assert lines[0] == f"GET /raft/stream/{kind}/1 HTTP/1.1"
    for line in (
        "X-Etcd-Cluster-ID: 1",
        "X-Raft-To: 2",
        "X-Server-From: 1",
        f"X-Server-Version: {CLAIMED}",
    ):
        assert line.lower() in [other.lower() for other in lines]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "is_up", "is_critical"),
    [
        ("404 Not Found", False, False),
        ("405 Method Not Allowed", False, False),
        ("412 Precondition Failed", False, False),
        ("403 Forbidden", False, False),
        ("200 OK", True, False),
        ("410 Gone", False, True),
    ],
)
def test_stream_reader_dial_result(
    plain_lab: Lab, kind: str, status: str, is_up: bool, is_critical: bool
) -> None:
    node = plain_lab.start()
    dialled = plain_lab.peer.next_dial(kind)
    if is_up:
        dialled.accept()
        wait_up(node, kind, "in")
    else:
        dialled.write(head(status, VERSION, "Content-Length: 0", is_chunked=False))
        assert dialled.is_ended()
    if is_critical:
        eventually(lambda: plain_lab.critical)
        assert isinstance(plain_lab.critical[0], MemberRemovedError)
    elif not is_up:
        plain_lab.peer.next_dial(kind)  # and so it is judged
        assert not plain_lab.critical
    assert (stream_of(node, kind, "in").since is not None) == is_up


def test_transport_errorc(plain_lab: Lab) -> None:
    """That a dial is forbidden tells nobody that we were removed: only a post that is does."""
    node = plain_lab.start()
    for _ in range(2):
        plain_lab.peer.next_dial("message").write(
            head("403 Forbidden", VERSION, "Content-Length: 0", is_chunked=False)
        )
    plain_lab.peer.next_dial("message")
    assert not plain_lab.critical
    node.send([Message(type=MessageType.HEARTBEAT, from_=1, to=2)])
    plain_lab.peer.next_dial("post").write(
        head("403 Forbidden", VERSION, "Content-Length: 0", is_chunked=False)
    )
    eventually(lambda: plain_lab.critical)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_reader_stop_on_dial(lab: Lab, kind: str) -> None:
    """Nothing is left of a dial whose answer comes as we stop."""
    node = lab.start()
    dialled = lab.peer.next_dial(kind)
    stopping = threading.Thread(target=node.stop)
    stopping.start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
        dialled.accept()
    assert dialled.is_ended()
    stopping.join()


@pytest.mark.parametrize("kind", KINDS)
def test_stream_reader_dial_detect_unsupport(plain_lab: Lab, kind: str) -> None:
    """A member that says no version is from before streams, and as reachable as it was."""
    node = plain_lab.start()
    plain_lab.peer.attach(plain_lab.url, "message")
    eventually(lambda: stats_of(node).active_since is not None)
    for _ in range(3):
        refused = plain_lab.peer.next_dial(kind)
        refused.write(head("404 Not Found", "Content-Length: 0", is_chunked=False))
        assert refused.is_ended()
    plain_lab.peer.next_dial(kind)
    assert stats_of(node).active_since is not None
    assert stats_of(node).last_error is None


@pytest.fixture
def pair() -> Iterator[tuple[Transport, Transport, FakeRaft, FakeRaft]]:
    """Members 1 and 2, with all streams up."""
    rafts = FakeRaft(), FakeRaft()
    with Transport(1, 1, rafts[0]) as one, Transport(2, 1, rafts[1]) as two:
        urls = [node.listen("http://127.0.0.1:0").url for node in (one, two)]
        one.add_peer(2, [urls[1]])
        two.add_peer(1, [urls[0]])
        wait_all_up((one, 2), (two, 1))
        yield one, two, *rafts


Pair = tuple[Transport, Transport, FakeRaft, FakeRaft]


def test_stream(lab: Lab) -> None:
    """A proposal and an append by message, and an append by msgapp, arrive as they were sent."""
    node = lab.start()
    proposal = Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=b"a proposal")])
    message = lab.peer.attach(lab.url, "message")
    wait_up(node, "message", "out")
    node.send([proposal, append(3, b"x", from_=1, to=2)])
    assert message.read(2) == [proposal, append(3, b"x", from_=1, to=2)]
    msgapp = lab.peer.attach(lab.url, "msgapp")
    wait_up(node, "msgapp", "out")
    appends = [append(index, b"x", from_=1, to=2) for index in range(3, 6)]
    node.send(appends)
    assert msgapp.read(3) == appends
    assert not message.has_more()

    for kind, sent in (("message", proposal), ("msgapp", append(9))):
        dialled = lab.peer.next_dial(kind).accept()
        dialled.send(sent)
        lab.raft.wait_for(lambda sent=sent: sent in lab.raft.processed)


@pytest.mark.parametrize("version", ["2.1.0", "2.1.9", "2.1.0-alpha.0", "3.5.1", "3.99.0"])
def test_check_stream_support(plain_lab: Lab, version: str) -> None:
    plain_lab.start()
    dialled = plain_lab.peer.next_dial("msgapp")
    dialled.write(head("200 OK", f"X-Server-Version: {version}"))
    wait_up(plain_lab.node, "msgapp", "in")


def test_stream_support_current_version(pair: Pair) -> None:
    """Nodes of the version that we claim by default give each other all streams."""
    for node, peer_id in ((pair[0], 2), (pair[1], 1)):
        assert len(stats_of(node, peer_id).streams) == 4
        assert stats_of(node, peer_id).active_since is not None


# -- the choice: upstream's peer_test.go


@pytest.mark.parametrize(
    ("up", "type_", "expected"),
    [
        (("msgapp", "message"), MessageType.SNAP, "pipeline"),
        (("msgapp", "message"), MessageType.APP, "msgapp"),
        (("msgapp", "message"), MessageType.PROP, "message"),
        (("msgapp", "message"), MessageType.HEARTBEAT, "message"),
        (("message",), MessageType.APP, "message"),
        ((), MessageType.APP, "pipeline"),
        ((), MessageType.PROP, "pipeline"),
        ((), MessageType.SNAP, "pipeline"),
        ((), MessageType.HEARTBEAT, "pipeline"),
        (("msgapp",), MessageType.HEARTBEAT, "pipeline"),
    ],
)
def test_peer_pick(plain_lab: Lab, up: tuple[str, ...], type_: MessageType, expected: str) -> None:
    node = plain_lab.start()
    attached = [plain_lab.peer.attach(plain_lab.url, kind) for kind in up]
    for kind in up:
        wait_up(node, kind, "out")
    snapshot = Snapshot(data=b"x") if type_ is MessageType.SNAP else None
    node.send([Message(type=type_, from_=1, to=2, term=1, snapshot=snapshot)])
    offered = {"pipeline": posted(node)}
    for kind in KINDS:
        books = stream_of(node, kind, "out").books
        assert books is not None
        offered[kind] = books.offered
    assert offered == {"pipeline": 0, "msgapp": 0, "message": 0} | {expected: 1}
    assert len(attached) == len(up)


def test_a_large_message_does_not_hold_up_heartbeats(plain_lab: Lab) -> None:
    """It goes by a post unless it is an append, which has a stream of its own."""
    node = plain_lab.start()
    message = plain_lab.peer.attach(plain_lab.url, "message")
    wait_up(node, "message", "out")
    data = bytes(65 * 1024)
    proposal = Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=data)])
    node.send([proposal, append(1, data, from_=1, to=2), heartbeat(5, from_=1, to=2)])
    assert list(indexes(message.read(1))) == [5]
    assert posted(node) == 2


@pytest.mark.parametrize("is_kept", [True, False], ids=["bytes", "bytearray"])
@pytest.mark.parametrize("is_read", [True, False], ids=["unmarshal", "constructor"])
def test_what_others_have_encoded_goes_by_a_stream_if_all_of_it_is_known(
    plain_lab: Lab, is_read: bool, is_kept: bool
) -> None:
    """Whether it was read when it was made, or is when it is offered."""
    node = plain_lab.start()
    message = plain_lab.peer.attach(plain_lab.url, "message")
    wait_up(node, "message", "out")
    known = heartbeat(5, from_=1, to=2).marshal()
    for data in (known, known + b"\xf8\x01\x01", known + b"\x12\x00"):
        kept = data if is_kept else bytearray(data)
        if is_read:
            node.send([EncodedMessage.unmarshal(kept)])
        else:
            node.send([EncodedMessage(kept, type=MessageType.HEARTBEAT, to=2, from_=1)])
    assert list(indexes(message.read(1))) == [5]
    assert posted(node) == 2


def test_what_has_changed_since_it_was_read_is_read_again(plain_lab: Lab) -> None:
    node = plain_lab.start()
    plain_lab.peer.attach(plain_lab.url, "message")
    wait_up(node, "message", "out")
    data = bytearray(heartbeat(5, from_=1, to=2).marshal() + b"\x40\x05")
    encoded = EncodedMessage.unmarshal(data)
    data[-2:] = b"\xff\xff"
    node.send([encoded])
    assert posted(node) == 1


# -- two Transports: upstream's functional tests


@pytest.mark.parametrize("sent", MESSAGES, ids=lambda message: message.type.name)
def test_send_message(pair: Pair, sent: Message) -> None:
    one, _, raft, received = pair
    one.send([sent])
    assert received.wait_processed(1) == [sent]
    if sent.type is MessageType.SNAP:
        assert raft.wait_snapshots(1) == [(2, SnapshotStatus.FINISH)]
    assert raft.unreachable == []
    assert posted(one) == (1 if sent.type is MessageType.SNAP else 0)


def test_send_message_when_stream_is_broken(lab: Lab) -> None:
    """What is sent behind a connection that was cut arrives by the next one, or by a post."""
    node = lab.start()
    lab.peer.attach(lab.url, "message").reset()
    wait_down(node, "message", "out")
    attached = lab.peer.attach(lab.url, "message")
    wait_up(node, "message", "out")
    node.send([heartbeat(1, from_=1, to=2)])
    assert list(indexes(attached.read(1))) == [1]


# -- what upstream does not test


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunks", "no chunks"])
def test_what_comes_is_delivered_in_order(lab: Lab, kind: str, is_chunked: bool) -> None:
    lab.start()
    dialled = lab.peer.next_dial(kind).accept(is_chunked=is_chunked)
    sent = [of_kind(kind, index, b"d" * (index % 97)) for index in range(3000)]
    for at in range(0, 3000, 250):
        dialled.send(*sent[at : at + 250])
    assert lab.raft.wait_processed(3000) == sent
    wait_up(lab.node, kind, "in")
    assert stream_of(lab.node, kind, "in").messages == 3000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_arrives_in_order(lab: Lab, kind: str) -> None:
    node = lab.start()
    attached = lab.peer.attach(lab.url, kind)
    wait_up(node, kind, "out")
    sent = [of_kind(kind, index, b"d" * (index % 97), from_=1, to=2) for index in range(3000)]
    assert node.send(sent) == 0
    assert attached.read(3000) == sent
    eventually(lambda: stream_of(node, kind, "out").messages == 3000)
    books = stream_of(node, kind, "out").books
    assert books is not None
    assert_balanced(books)
    assert books.sent == 3000


def test_twenty_thousand_messages_between_two_nodes_stay_in_order(pair: Pair) -> None:
    one, _, raft, received = pair
    sent = 0
    while sent < 20_000:  # of a window, so that the channel does not overflow
        one.send([append(sent + n, b"x" * 64, from_=1, to=2) for n in range(1000)])
        sent += 1000
        received.wait_processed(sent - 2000)
    assert list(indexes(received.wait_processed(20_000))) == list(range(20_000))
    assert raft.unreachable == []
    assert posted(one) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_heartbeats_of_the_link_come_though_nothing_is_sent(lab: Lab, kind: str) -> None:
    lab.start()
    attached = lab.peer.attach(lab.url, kind)
    attached.read_heartbeat()  # at once, as usually from an etcd
    attached.read_heartbeat()  # on the tick


@pytest.mark.parametrize("kind", KINDS)
def test_heartbeats_of_the_link_are_for_nobody(lab: Lab, kind: str) -> None:
    lab.start()
    dialled = lab.peer.next_dial(kind).accept()
    for index in range(5):
        dialled.send_bytes(dialled.heartbeat())
        dialled.send(of_kind(kind, index))
        dialled.send_bytes(dialled.heartbeat() * 3)
    assert list(indexes(lab.raft.wait_processed(5))) == list(range(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_has_ended_is_dialled_again(lab: Lab, kind: str) -> None:
    """The last chunk is the end, though the connection stays."""
    lab.start()
    for index in range(3):
        dialled = lab.peer.next_dial(kind).accept()
        dialled.send(of_kind(kind, index))
        lab.raft.wait_processed(index + 1)
        dialled.end()
        assert dialled.is_ended()
    lab.peer.next_dial(kind)
    assert stats_of(lab.node).last_error is None


def test_a_member_that_was_removed_is_told_once_and_dials_no_more(plain_lab: Lab) -> None:
    node = plain_lab.start()
    dialled = plain_lab.peer.next_dial("message")
    gone = head("410 Gone", VERSION, "Content-Length: 16", is_chunked=False)
    dialled.write(gone + b"removed member\r\n")
    eventually(lambda: plain_lab.critical)
    msgapp = plain_lab.peer.next_dial("msgapp").accept()
    wait_up(node, "msgapp", "in")
    msgapp.end()
    plain_lab.peer.next_dial("msgapp").accept()  # 100 ms behind the first
    plain_lab.peer._listening.settimeout(4 * SHORT_TIMEOUT)
    with pytest.raises(TimeoutError):
        plain_lab.peer.next_dial("message")
    assert len(plain_lab.critical) == 1


def test_a_refused_dial_is_no_storm(plain_lab: Lab) -> None:
    """Dials to who refuses with a version come ever later: each is a line of an etcd's log."""
    started = time.monotonic()
    plain_lab.start()
    for _ in range(4):
        refused = plain_lab.peer.next_dial("message")
        refused.write(head("404 Not Found", VERSION, "Content-Length: 0", is_chunked=False))
    assert time.monotonic() - started >= 0.1 + 0.2 + 0.4 - 0.01


def test_a_stream_is_told_as_up_before_it_is_told_as_lost(plain_lab: Lab) -> None:
    """However soon it ends, and however long it takes to say that it is up."""
    lost = threading.Event()
    order: list[str] = []

    def slow(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("established"):
            lost.wait(10 * SHORT_TIMEOUT)
            order.append("established")
        elif text.startswith("lost"):
            order.append("lost")
            lost.set()
        return True

    logger = logging.getLogger("pipeline.stream.reader")
    logger.addFilter(slow)
    logger.setLevel(logging.INFO)
    try:
        plain_lab.start()
        plain_lab.peer.next_dial("message").accept().close()
        eventually(lambda: len(order) >= 2)
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeFilter(slow)
    assert order[:2] == ["established", "lost"]


def test_a_paused_peer_is_sent_nothing_and_not_heard_by_its_streams(plain_lab: Lab) -> None:
    node = plain_lab.start()
    attached = plain_lab.peer.attach(plain_lab.url, "message")
    dialled = plain_lab.peer.next_dial("message").accept()
    wait_up(node, "message", "out")
    node.cut_peer(PEER)
    node.send([heartbeat(1, from_=1, to=2)])
    dialled.send(heartbeat(1), heartbeat(2))
    eventually(lambda: stream_of(node, "message", "in").dropped == 2)
    node.mend_peer(PEER)
    node.send([heartbeat(2, from_=1, to=2)])
    dialled.send(heartbeat(3))
    assert list(indexes(attached.read(1))) == [2]
    assert list(indexes(plain_lab.raft.wait_processed(1))) == [3]
    assert stream_of(node, "message", "in").messages == 3


def test_a_listener_that_is_closed_leaves_streams_to_the_node(lab: Lab) -> None:
    """They carry what the node sends; whoever dials now finds nobody."""
    node = lab.start()
    attached = lab.peer.attach(lab.url, "message")
    wait_up(node, "message", "out")
    lab.listener.close()
    with pytest.raises(ConnectionRefusedError):
        lab.peer.connect(lab.url)
    node.send([heartbeat(1, from_=1, to=2)])
    assert list(indexes(attached.read(1))) == [1]
    attached.close()
    wait_down(node, "message", "out")


def test_a_full_channel_refuses_and_is_told(plain_lab: Lab) -> None:
    node = plain_lab.start(stream_queue_length=4)
    attached = plain_lab.peer.attach(plain_lab.url, "msgapp", receive_buffer=4096)
    wait_up(node, "msgapp", "out")
    data = bytes(1 << 20)
    for index in range(64):
        node.send([append(index, data, from_=1, to=2)])
        books = stream_of(node, "msgapp", "out").books
        assert books is not None
        assert_balanced(books)
    assert books.refused > 0
    assert plain_lab.raft.wait_unreachable(1)[0] == PEER
    arrived = attached.read(books.accepted)
    assert len(arrived) == books.accepted


# -- a node without an inbox: its own two queues


def proposal(index: int) -> Message:
    return Message(
        type=MessageType.PROP, from_=PEER, to=MEMBER, index=index, entries=[Entry(data=b"x")]
    )


def stream_threads() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if thread.name.startswith("pipeline-stream-")
    ]


def test_raft_is_called_no_more_once_the_node_was_stopped(
    plain_lab: Lab, gate: threading.Event
) -> None:
    """Of what has been received: the call that is under way ends, and none follows it."""
    before = set(stream_threads())
    raft = FakeRaft(gate=gate)
    node = plain_lab.start(raft)
    threads = set(stream_threads()) - before
    assert len(threads) == 2
    plain_lab.peer.next_dial("message").accept().send(*map(heartbeat, range(100)))
    raft.wait_processed(1)
    eventually(lambda: stream_of(node, "message", "in").messages == 100)
    node.stop()
    gate.set()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
        assert not thread.is_alive()
    assert list(indexes(raft.processed)) == [0]


def test_a_proposal_waits_for_raft_and_holds_nothing_else_up(
    plain_lab: Lab, gate: threading.Event
) -> None:
    class Leaderless(FakeRaft):
        def process(self, message: Message) -> None:
            if message.type == MessageType.PROP:
                assert gate.wait(LONG_TIMEOUT)
            super().process(message)

    raft = Leaderless()
    plain_lab.start(raft)
    plain_lab.peer.next_dial("message").accept().send(proposal(1), heartbeat(2), heartbeat(3))
    assert list(indexes(raft.wait_processed(2))) == [2, 3]
    gate.set()
    assert list(indexes(raft.wait_processed(3))) == [2, 3, 1]


def test_a_proposal_without_room_is_dropped_and_counted(
    plain_lab: Lab, gate: threading.Event
) -> None:
    sent = 4096 + 256 + 100  # a queue of them, what is taken from it at once, and more
    raft = FakeRaft(gate=gate)
    node = plain_lab.start(raft)
    dialled = plain_lab.peer.next_dial("message").accept()
    dialled.send(*map(proposal, range(sent)))
    eventually(lambda: stream_of(node, "message", "in").messages == sent)
    dropped = stream_of(node, "message", "in").dropped
    assert dropped >= 100
    gate.set()
    processed = raft.wait_processed(sent - dropped)
    assert list(indexes(processed)) == list(range(sent - dropped))
    assert stream_of(node, "message", "in").since is not None


def test_a_message_that_is_not_for_raft_is_counted_and_not_delivered(plain_lab: Lab) -> None:
    node = plain_lab.start()
    dialled = plain_lab.peer.next_dial("message").accept()
    dialled.send(Message(type=MessageType.BEAT, from_=PEER, to=MEMBER, index=1), heartbeat(2))
    assert list(indexes(plain_lab.raft.wait_processed(1))) == [2]
    stats = stream_of(node, "message", "in")
    assert (stats.messages, stats.ignored, stats.dropped) == (1, 1, 0)


# -- where a peer is


def test_a_refusal_is_waited_for_no_longer_once_the_peer_has_other_urls(plain_lab: Lab) -> None:
    node = plain_lab.start()
    endless = head("404 Not Found") + b"1\r\n4\r\n"
    refused = [plain_lab.peer.next_dial(kind) for kind in KINDS]
    for dialled in refused:
        dialled.write(endless)
    with FakePeer() as elsewhere:
        eventually(lambda: all(reader.state == "refused" for reader in readers(node)))
        node.update_peer(PEER, [elsewhere.url])
        for kind in KINDS:
            elsewhere.next_dial(kind).accept()
            wait_up(node, kind, "in")
    for dialled in refused:
        assert dialled.is_ended()


def test_other_urls_leave_a_stream_that_is_up_alone(plain_lab: Lab) -> None:
    node = plain_lab.start()
    attached = [plain_lab.peer.next_dial(kind).accept() for kind in KINDS]
    for kind in KINDS:
        wait_up(node, kind, "in")
    with FakePeer() as elsewhere:
        node.update_peer(PEER, [elsewhere.url])
        for dialled in attached:
            dialled.send(of_kind(dialled.kind, 7))
        plain_lab.raft.wait_processed(2)
        assert not elsewhere.is_dialled()


def readers(node: Transport) -> list[StreamReader]:
    streams = node._peers[PEER].streams
    assert streams is not None
    return list(streams.readers.values())
