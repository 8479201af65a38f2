"""``POST /raft/snapshot`` (spec 7.4, 7.5): what is answered, stored, counted, and left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import select
import socket
import stat
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import (
    Message,
    MessageType,
    ReceiverConfig,
    RequestRejected,
    Snapshot,
    Transport,
    TransportConfig,
    UsageError,
)
from pipeline.net import pace
from pipeline.receive.listener import Listener
from pipeline.snapshot.connections import EVENT_S
from pipeline.snapshot.receiver import SnapshotCounts
from tests.support import LONG_TIMEOUT, MIB, SHORT_TIMEOUT
from tests.support.callbacks import Unawaited
from tests.support.descriptors import assert_all_closed, open_descriptors
from tests.support.events import Events
from tests.support.http import CLUSTER_ID, HEARTBEAT, handlers_of, peer_headers
from tests.support.listening import ask, chunked, dial, raw_head, read_reply, read_status
from tests.support.logs import handler_that_raises
from tests.support.raft import FakeRaft
from tests.support.snapshots import FILE, INDEX, LINE, framed, post_snapshot, snapshot
from tests.support.waiting import eventually

DATABASE = os.urandom(100_003)
BODY = framed(snapshot(), DATABASE)
UNKNOWN = "UNKNOWN_SNAPSHOT_SENDER"


class Node:
    """Handlers with a snapshot directory, and a listener."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.directory = directory
        self.config = ReceiverConfig(snapshot_dir=directory, **settings)  # type: ignore[arg-type]
        self.raft = FakeRaft()
        self.handlers = handlers_of(self.raft, self.config)
        self.snapshots = self.handlers.snapshots
        self.listener = Listener(self.handlers, "http://127.0.0.1:0", self.config)
        self.url = self.listener.url

    def files(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.directory.iterdir()}

    def counts(self, sender: str = "1") -> SnapshotCounts:
        return self.snapshots.counts()[sender]

    def results(self) -> dict[str, tuple[int, int]]:
        """Success and failures by sender; nothing must be in flight."""
        counts = self.snapshots.counts()
        assert all(count.in_flight == 0 for count in counts.values())
        return {name: (count.success, count.failures) for name, count in counts.items()}


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Node:
            node = Node(tmp_path / "snap", **settings)
            stack.callback(node.listener.close)
            return node

        yield make


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    return make_node()


# -- what is taken


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("size", [0, 1, 100_003, 3 * MIB + 7])
def test_a_snapshot_is_stored_and_its_message_processed(
    node: Node, is_chunked: bool, size: int
) -> None:
    database = os.urandom(size)
    reply = ask(node.url, post_snapshot(framed(snapshot(), database), is_chunked=is_chunked))
    assert (reply.status, reply.body, reply.close) == (204, b"", True)
    assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert node.raft.processed == [snapshot()]
    assert node.files() == {FILE: size}
    path = node.directory / FILE
    assert path.read_bytes() == database
    assert path.stat().st_mode & 0o777 == 0o600
    assert node.directory.stat().st_mode & 0o777 == 0o700
    assert node.results() == {"1": (1, 0)}
    duration = node.counts().duration
    assert sum(duration.counts) == 1
    assert duration.sum > 0
    assert node.handlers.received.bytes_by_sender == {1: len(snapshot().marshal()) + size}
    assert node.snapshots.store is not None
    saves, fsyncs = node.snapshots.store.histograms()
    assert (sum(saves.counts), sum(fsyncs.counts)) == (1, 1)


def test_the_file_is_in_place_when_process_is_called(node: Node) -> None:
    seen: list[dict[str, int]] = []
    node.raft.process = lambda _message: seen.append(node.files())  # type: ignore[method-assign]
    assert ask(node.url, post_snapshot(BODY)).status == 204
    assert seen == [{FILE: len(DATABASE)}]


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_bytes_that_drip_are_taken(node: Node, is_chunked: bool) -> None:
    with dial(node.url) as sock:
        body = framed(snapshot(), b"database")
        for byte in post_snapshot(body, is_chunked=is_chunked):
            sock.sendall(bytes([byte]))
        assert read_reply(sock).status == 204
    assert (node.directory / FILE).read_bytes() == b"database"


@pytest.mark.parametrize(
    "message",
    [
        Message(type=MessageType.SNAP, from_=1),
        Message(type=MessageType.SNAP, from_=1, snapshot=Snapshot(data=b"x")),
    ],
    ids=["no snapshot", "no metadata"],
)
def test_a_snapshot_without_metadata_has_index_0(node: Node, message: Message) -> None:
    assert ask(node.url, post_snapshot(framed(message, b"x"))).status == 204
    assert node.files() == {f"{0:016x}.snap.db": 1}


def test_the_largest_index_has_a_name(node: Node) -> None:
    assert ask(node.url, post_snapshot(framed(snapshot(2**64 - 1), b"x"))).status == 204
    assert node.files() == {"ffffffffffffffff.snap.db": 1}


def test_a_file_that_is_there_stays_and_that_is_a_success(node: Node) -> None:
    (node.directory / FILE).write_bytes(b"the first")
    assert ask(node.url, post_snapshot(BODY)).status == 204
    assert node.files() == {FILE: len(b"the first")}
    assert node.raft.processed == [snapshot()]
    assert node.results() == {"1": (1, 0)}


@pytest.mark.parametrize("body", [BODY, framed(snapshot(), bytes(MIB))], ids=["small", "large"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_expect_100_continue_is_honoured(node: Node, body: bytes, is_chunked: bool) -> None:
    request = post_snapshot(body, "expect: 100-continue", is_chunked=is_chunked)
    end = request.index(b"\r\n\r\n") + 4
    with dial(node.url) as sock:
        sock.sendall(request[:end])
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += sock.recv(1)
        assert received == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(request[end:])
        assert read_reply(sock).status == 204


@pytest.mark.parametrize("indexes", [(INDEX, INDEX), (INDEX, INDEX + 1)], ids=["same", "other"])
def test_two_that_arrive_together_do_not_disturb_each_other(
    node: Node, indexes: tuple[int, int]
) -> None:
    databases = [os.urandom(50_000), os.urandom(60_000)]
    requests = [
        post_snapshot(framed(snapshot(index), database))
        for index, database in zip(indexes, databases, strict=True)
    ]
    with dial(node.url) as one, dial(node.url) as two:
        one.sendall(requests[0][:-1])
        two.sendall(requests[1][:-1])
        eventually(
            lambda: sorted(node.files().values()) == [49_999, 59_999], "both are being stored"
        )
        assert node.counts().in_flight == 2
        assert all(name.startswith("tmp") for name in node.files())
        one.sendall(requests[0][-1:])
        assert read_reply(one).status == 204
        two.sendall(requests[1][-1:])
        assert read_reply(two).status == 204
    sizes = [50_000, 60_000][: len(set(indexes))]  # of the same index the first stays
    assert node.files() == {f"{INDEX + n:016x}.snap.db": size for n, size in enumerate(sizes)}
    assert [message.snapshot.metadata.index for message in node.raft.processed] == [*indexes]  # type: ignore[union-attr]
    assert node.results() == {"1": (2, 0)}


def test_the_transport_says_where_the_database_is(tmp_path: Path) -> None:
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path / "a" / "snap"))
    with Transport(2, CLUSTER_ID, FakeRaft(), config=config) as transport:
        url = transport.listen("http://127.0.0.1:0").url
        assert transport.snapshot_path(INDEX) is None
        assert ask(url, post_snapshot(BODY)).status == 204
        path = transport.snapshot_path(INDEX)
        assert path == tmp_path / "a" / "snap" / FILE
        assert path.read_bytes() == DATABASE
        with pytest.raises(UsageError, match="index: -1"):
            transport.snapshot_path(-1)


@pytest.mark.parametrize(
    "setting",
    [
        {"snapshot_dir": ""},
        {"snapshot_dir": b""},
        {"snapshot_receives": 0},
        {"snapshot_max_bytes": 0},
        {"snapshot_dir_max_bytes": 1.5},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(setting))}: "):
        ReceiverConfig(**setting)  # type: ignore[arg-type]


def test_there_is_no_path_without_a_directory() -> None:
    with pytest.raises(UsageError, match="snapshot_dir is not set"):
        Transport(2, CLUSTER_ID, FakeRaft()).snapshot_path(1)


# -- what is refused: the table of spec 7.4


def head(**changes: str | None) -> bytes:
    length = f"content-length: {len(BODY)}"
    return raw_head(length, line=LINE, headers=peer_headers(**changes)) + BODY


def without_cluster_header(request: bytes) -> bytes:
    return request.replace(b"POST", b"GET", 1)


LONGER = (64 * MIB + 1).to_bytes(8, "big")
REFUSED = {
    "not POST": (
        without_cluster_header(head()),
        (405, "Method Not Allowed", UNKNOWN, 0, 0),
    ),
    "no version": (head(x_server_version=None), (412, "incompatible version", UNKNOWN, 0, 0)),
    "old version": (head(x_server_version="2.3.0"), (412, "incompatible version", UNKNOWN, 0, 0)),
    "other cluster": (head(x_etcd_cluster_id="1"), (412, "cluster ID mismatch", UNKNOWN, 0, 0)),
    "compressed": (
        head(content_encoding="gzip"),
        (415, "unsupported content encoding", UNKNOWN, 1, 0),
    ),
    "no body": (post_snapshot(b""), (400, "failed to decode raft message (EOF)", "0", 1, 0)),
    "half a length": (
        post_snapshot(b"\0\0\0"),
        (400, "failed to decode raft message (unexpected EOF)", "0", 1, 0),
    ),
    "no message": (
        post_snapshot(framed(bytes(9))[:8]),
        (400, "failed to decode raft message (EOF)", "0", 1, 0),
    ),
    "half a message": (
        post_snapshot(BODY[:20]),
        (400, "failed to decode raft message (unexpected EOF)", "0", 1, 0),
    ),
    "64 MiB and a byte": (
        post_snapshot(LONGER),
        (400, "failed to decode raft message (rafthttp: error limit exceeded)", "0", 1, 0),
    ),
    "2^63": (
        post_snapshot((1 << 63).to_bytes(8, "big") + BODY),
        (400, "failed to decode raft message (rafthttp: error limit exceeded)", "0", 1, 0),
    ),
    "2^64-1": (
        post_snapshot(b"\xff" * 8 + BODY, is_chunked=True),
        (400, "failed to decode raft message (rafthttp: error limit exceeded)", "0", 1, 0),
    ),
    "no protobuf": (
        post_snapshot(framed(b"\xff" * 10)),
        (400, "failed to decode raft message (", "0", 1, 0),
    ),
    "not MsgSnap": (
        post_snapshot(framed(HEARTBEAT, DATABASE)),
        (400, "wrong raft message type", "1", 0, len(HEARTBEAT.marshal())),
    ),
    "an empty message": (post_snapshot(framed(b"")), (400, "wrong raft message type", "0", 0, 0)),
}


@pytest.mark.parametrize(("request_", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_as_etcd_does_and_leaves_nothing(
    node: Node, request_: bytes, expected: tuple[int, str, str, int, int]
) -> None:
    status, text, sender, received_failures, received_bytes = expected
    reply = ask(node.url, request_)
    assert reply.status == status
    assert reply.body.decode().startswith(text)
    assert reply.body.endswith(b"\n")
    if not text.endswith("("):
        assert reply.body.decode() == f"{text}\n"
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    if status == 405:
        assert reply.headers["allow"] == "POST"
        assert "x-etcd-cluster-id" not in reply.headers
    else:
        assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert node.results() == {sender: (0, 1)}
    assert node.handlers.received.failures == received_failures
    assert sum(node.handlers.received.bytes_by_sender.values()) == received_bytes
    assert node.files() == {}
    assert node.raft.processed == []


def test_who_sends_is_shown_to_who_wants_to_know(tmp_path: Path) -> None:
    """etcd's addRemoteFromRequest, before the body is read."""
    seen: list[tuple[int, tuple[str, ...]]] = []

    class Seen:
        def note(
            self, sender: int, urls: tuple[str, ...], _caller: object, *, is_authenticated: bool
        ) -> None:
            assert not is_authenticated
            seen.append((sender, urls))

        def is_watched(self, _sender: int, *, is_authenticated: bool) -> bool:
            return False

    config = ReceiverConfig(snapshot_dir=tmp_path)
    handlers = handlers_of(FakeRaft(), config, senders=Seen())
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        assert ask(listener.url, post_snapshot(b"")).status == 400
        assert ask(listener.url, head(x_server_version=None)).status == 412
    assert seen == [(1, ("http://10.0.0.1:2380",))]


def test_a_rejection_by_the_node_is_its_own_answer_and_no_failure(node: Node) -> None:
    node.raft.process_error = RequestRejected(403, b"gone", "application/json")
    reply = ask(node.url, post_snapshot(BODY))
    assert (reply.status, reply.body) == (403, b"gone")
    assert reply.headers["content-type"] == "application/json"
    assert node.results() == {"1": (0, 0)}
    assert node.files() == {FILE: len(DATABASE)}


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no \udc80"), "no ?"),
        (SystemExit("out"), "out"),
        (Unprintable(), "<Unprintable that raises ValueError when it is shown>"),
    ],
)
def test_a_raising_process_is_answered_500(node: Node, error: BaseException, text: str) -> None:
    node.raft.process_error = error
    reply = ask(node.url, post_snapshot(BODY))
    assert (reply.status, reply.body.decode()) == (
        500,
        f"failed to process raft message ({text})\n",
    )
    assert node.results() == {"1": (0, 1)}
    assert node.handlers.received.process_failures == 1
    node.raft.process_error = None
    assert ask(node.url, post_snapshot(BODY)).status == 204


def test_a_process_that_only_makes_a_coroutine_is_answered_500(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node.raft, "process", Unawaited())
    for _ in range(2):
        assert ask(node.url, post_snapshot(BODY)).status == 500
    assert node.handlers.received.process_failures == 2
    assert node.results() == {"1": (0, 2)}
    assert caplog.text.count("which is not awaited here") >= 1


@pytest.mark.parametrize("log_error", [SystemExit, RecursionError])
def test_a_snapshot_s_thread_survives_a_log_handler_that_raises(
    node: Node, log_error: type[BaseException]
) -> None:
    node.raft.process_error = Unprintable()
    with handler_that_raises("", log_error) as handler:
        assert ask(node.url, post_snapshot(BODY)).status == 500
        node.raft.process_error = None
        for _ in range(node.handlers.config.snapshot_receives + 1):
            assert ask(node.url, post_snapshot(BODY)).status == 204
    assert handler.raised > 0


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_without_a_directory_it_is_501_at_once(is_chunked: bool) -> None:
    raft = FakeRaft()
    handlers = handlers_of(raft)
    snapshots = handlers.snapshots
    framing = "transfer-encoding: chunked" if is_chunked else f"content-length: {1 << 40}"
    with Listener(handlers, "http://127.0.0.1:0", handlers.config) as listener:
        with dial(listener.url) as sock:
            sock.sendall(raw_head(framing, line=LINE))
            reply = read_reply(sock)  # while the body is still to come
            assert (reply.status, reply.body) == (501, b"Not Implemented\n")
            chunk = chunked([bytes(MIB)])[:-5] if is_chunked else bytes(MIB)
            with pytest.raises(ConnectionError):
                send_for_ever(sock, chunk)
        assert snapshots.counts()[UNKNOWN].failures == 1
    assert raft.processed == []


def test_a_snapshot_too_many_is_answered_503_and_others_go_on(make_node: MakeNode) -> None:
    node = make_node(snapshot_receives=2)
    with dial(node.url) as one, dial(node.url) as two:
        for sock in (one, two):
            sock.sendall(post_snapshot(BODY)[:-1])
        eventually(lambda: len(node.files()) == 2, "both are being stored")
        reply = ask(node.url, post_snapshot(BODY))
        assert (reply.status, reply.body) == (503, b"too many snapshots at once\n")
        for sock in (one, two):
            sock.sendall(BODY[-1:])
            assert read_reply(sock).status == 204
    # The places are free again when the connections have ended.
    eventually(lambda: ask(node.url, post_snapshot(BODY)).status == 204, "there is room again")
    assert node.counts(UNKNOWN).failures >= 1


def send_for_ever(sock: socket.socket, data: bytes) -> None:
    while True:
        sock.sendall(data)


# -- what breaks off


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("is_reset", [False, True], ids=["end", "reset"])
def test_an_aborted_body_leaves_nothing_wherever_it_ends(
    node: Node, is_chunked: bool, is_reset: bool
) -> None:
    request = post_snapshot(BODY, is_chunked=is_chunked)
    start = request.index(b"\r\n\r\n") + 4
    cuts = [start, start + 5, start + 30, start + 2000, len(request) - 1]
    for cut in cuts:
        with dial(node.url) as sock:
            sock.sendall(request[:cut])
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                sock.shutdown(socket.SHUT_WR)
                assert read_status(sock) in (400, 500)
    eventually(
        lambda: sum(c.failures for c in node.snapshots.counts().values()) == len(cuts),
        "all have failed",
    )
    assert node.files() == {}
    assert node.raft.processed == []
    assert ask(node.url, request).status == 204


def test_a_body_cut_short_is_answered_as_etcd_does(node: Node) -> None:
    with dial(node.url) as sock:
        sock.sendall(post_snapshot(BODY)[:-1])
        sock.shutdown(socket.SHUT_WR)
        reply = read_reply(sock)
    assert (reply.status, reply.body) == (500, b"failed to save KV snapshot (unexpected EOF)\n")
    assert node.results() == {"1": (0, 1)}


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\nabcdeXX", b"-1\r\n", b"f" * 30 + b"\r\n"])
def test_malformed_chunks_are_refused(node: Node, chunk: bytes) -> None:
    whole = raw_head("transfer-encoding: chunked", line=LINE) + chunked([BODY])[:-5]
    reply = ask(node.url, whole + chunk)
    assert reply.status == 500
    assert reply.body.startswith(b"failed to save KV snapshot (")
    assert node.files() == {}


@pytest.mark.parametrize(("sent", "status"), [(3, 400), (len(BODY) - 1, 500)])
def test_a_body_that_stalls_is_given_up(make_node: MakeNode, sent: int, status: int) -> None:
    node = make_node(stall_timeout_s=SHORT_TIMEOUT)
    with dial(node.url) as sock:
        sock.sendall(raw_head(f"content-length: {len(BODY)}", line=LINE) + BODY[:sent])
        reply = read_reply(sock)
    assert reply.status == status
    assert reply.body.endswith(b"(i/o timeout)\n")
    assert node.files() == {}


@pytest.mark.parametrize(
    ("sent", "rate"), [(50, 1_000_000), (len(BODY) // 2, 1000)], ids=["drips", "began quickly"]
)
def test_a_body_that_drips_is_given_up(make_node: MakeNode, sent: int, rate: int) -> None:
    """However quickly it began: what came then is no store to drip from for hours."""
    node = make_node(stall_timeout_s=0.5, min_body_rate=rate)  # no drip is as late as a stall
    with dial(node.url) as sock:
        sock.sendall(raw_head(f"content-length: {len(BODY)}", line=LINE) + BODY[:sent])
        give_up = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not give_up.wait(SHORT_TIMEOUT / 10):
                    sock.sendall(b"x")

        dripper = threading.Thread(target=drip)
        dripper.start()
        reply = read_reply(sock)
        give_up.set()
        dripper.join(LONG_TIMEOUT)
    assert (reply.status, reply.body) == (500, b"failed to save KV snapshot (i/o timeout)\n")
    assert node.files() == {}


@pytest.mark.parametrize("is_rated", [False, True], ids=["drips", "drips with much framing"])
def test_chunks_that_drip_are_given_up(make_node: MakeNode, is_rated: bool) -> None:
    """What is framing does not make up for what is missing of the body."""
    node = make_node(stall_timeout_s=0.2, min_body_rate=20_000)
    chunk = b"1;" + b"a" * 4000 * is_rated + b"\r\nx\r\n"
    with dial(node.url) as sock:
        # In one: what comes late is a message that has not come.
        sock.sendall(raw_head("transfer-encoding: chunked", line=LINE) + chunked([BODY[:50]])[:-5])
        while not select.select([sock], [], [], 0.02)[0]:
            sock.sendall(chunk)
        reply = read_reply(sock)
    assert (reply.status, reply.body) == (500, b"failed to save KV snapshot (i/o timeout)\n")
    assert node.files() == {}


def test_tiny_chunks_are_no_events(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    request = raw_head("transfer-encoding: chunked", line=LINE)
    request += chunked(b"%c" % byte for byte in BODY[:20_000])
    assert ask(node.url, request).status == 204
    assert node.files() == {FILE: 20_000 - len(framed(snapshot()))}
    assert events.count == 1


def test_of_chunks_that_are_left_to_h11_its_thread_rests(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or four of them would take the interpreter from everybody else."""
    rests: list[float] = []
    monkeypatch.setattr(pace, "time", SimpleNamespace(sleep=rests.append))
    events = Events(monkeypatch)
    body = BODY[:2000]
    request = raw_head("transfer-encoding: chunked", line=LINE)
    request += b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert ask(node.url, request).status == 204
    assert events.count >= 2000
    assert sum(rests) >= 1900 * EVENT_S


def test_small_pieces_are_rested_of_and_large_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(pace, "time", SimpleNamespace(sleep=rests.append))
    it = pace.Pace()
    for _ in range(1000):
        it.took(1, pace.SMALL_BYTES)
        it.took(64, 64 * pace.SMALL_BYTES)
    assert rests == []
    for _ in range(1000):
        it.took(1, pace.SMALL_BYTES - 1)
    assert sum(rests) == pytest.approx(1000 * pace.PIECE_S, rel=0.1)
    assert min(rests) >= pace.REST_S * 0.99


def test_a_large_body_is_answered_although_it_is_not_read(node: Node) -> None:
    """A refused sender that goes on writing reads the answer before the end."""
    with dial(node.url) as sock:
        body = framed(HEARTBEAT, bytes(4 * MIB))
        sock.sendall(raw_head(f"content-length: {1 << 40}", line=LINE) + body)
        assert read_reply(sock).body == b"wrong raft message type\n"


# -- the disk


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("snapshot_max_bytes", "larger than snapshot_max_bytes"),
        ("snapshot_dir_max_bytes", "no room within snapshot_dir_max_bytes"),
    ],
)
def test_a_database_above_a_limit_is_answered_500(
    make_node: MakeNode, setting: str, text: str, is_chunked: bool
) -> None:
    node = make_node(**{setting: 3 * MIB})
    largest, larger = bytes(3 * MIB), bytes(3 * MIB + 1)
    reply = ask(node.url, post_snapshot(framed(snapshot(), larger), is_chunked=is_chunked))
    assert (reply.status, reply.body.decode()) == (500, f"failed to save KV snapshot ({text})\n")
    assert node.files() == {}
    assert node.raft.processed == []
    assert (
        ask(node.url, post_snapshot(framed(snapshot(), largest), is_chunked=is_chunked)).status
        == 204
    )
    # The limit of the directory is that of all of them; other files there do not count.
    (node.directory / "0000000000000001-0000000000000001.snap").write_bytes(bytes(MIB))
    status = ask(
        node.url, post_snapshot(framed(snapshot(INDEX + 1), b"x"), is_chunked=is_chunked)
    ).status
    assert status == (204 if setting == "snapshot_max_bytes" else 500)


def test_an_announced_size_is_refused_before_it_has_come(make_node: MakeNode) -> None:
    node = make_node(snapshot_max_bytes=MIB)
    with dial(node.url) as sock:
        sock.sendall(raw_head(f"content-length: {1 << 40}", line=LINE) + BODY)
        assert read_reply(sock).status == 500


def test_an_announced_size_that_the_disk_has_no_room_for_is_refused(node: Node) -> None:
    with dial(node.url) as sock:
        sock.sendall(raw_head(f"content-length: {1 << 59}", line=LINE) + BODY)
        reply = read_reply(sock)
    text = f"failed to save KV snapshot ({os.strerror(errno.ENOSPC)})\n"
    assert (reply.status, reply.body.decode()) == (500, text)


@pytest.mark.parametrize("name", ["write", "fsync", "rename", "open"])
def test_an_error_of_the_disk_is_answered_500_and_leaves_nothing(
    node: Node, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/path/that/is/ours")

    monkeypatch.setattr(f"pipeline.snapshot.store.os.{name}", fail)
    reply = ask(node.url, post_snapshot(BODY))
    text = f"failed to save KV snapshot ({os.strerror(errno.ENOSPC)})\n"
    assert (reply.status, reply.body.decode()) == (500, text)
    monkeypatch.undo()
    assert node.files() == {}
    assert node.results() == {"1": (0, 1)}
    assert ask(node.url, post_snapshot(BODY)).status == 204


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_in_the_middle_leaves_nothing(
    node: Node, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.write, itertools.count(3, -1)

    def fail(fd: int, data: memoryview) -> int:
        if next(left) <= 0:
            raise OSError(number, os.strerror(number))
        return write(fd, data[:1000])  # and a disk may take less than it is given

    monkeypatch.setattr("pipeline.snapshot.store.os.write", fail)
    reply = ask(node.url, post_snapshot(BODY))
    assert (reply.status, reply.body.decode()) == (
        500,
        f"failed to save KV snapshot ({os.strerror(number)})\n",
    )
    monkeypatch.undo()
    assert node.files() == {}
    assert node.raft.processed == []
    assert ask(node.url, post_snapshot(BODY)).status == 204


def test_a_machine_without_memory_is_answered_503(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise MemoryError

    monkeypatch.setattr("pipeline.snapshot.receiver._read_message", fail)
    assert ask(node.url, post_snapshot(BODY)).status == 503
    assert "internal error" not in caplog.text
    monkeypatch.undo()
    assert node.files() == {}
    assert ask(node.url, post_snapshot(BODY)).status == 204


NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NOT_OF_A_DIRECTORY = (*NOT_SUPPORTED, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)


@pytest.mark.parametrize(
    ("is_directory", "number"),
    [
        *((False, number) for number in NOT_SUPPORTED),
        *((True, number) for number in NOT_OF_A_DIRECTORY),
    ],
    ids=lambda value: errno.errorcode[value] if value > 1 else ("directory" if value else "file"),
)
def test_a_file_system_that_cannot_sync_is_gone_on_with(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_directory: bool,
    number: int,
) -> None:
    """As CIFS and some of FUSE answer for a directory."""
    fsync = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == is_directory:
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr("pipeline.snapshot.store.os.fsync", fail)
    before = open_descriptors()
    for index in (INDEX, INDEX + 1):
        assert ask(node.url, post_snapshot(framed(snapshot(index), DATABASE))).status == 204
    assert_all_closed(before)
    assert set(node.files().values()) == {len(DATABASE)}
    assert len(node.files()) == len(node.raft.processed) == 2
    what = "directory" if is_directory else "file"
    told = [r for r in caplog.records if "cannot be made durable" in r.getMessage()]
    assert [record.args[0] for record in told if record.args] == [what]  # once


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_directory_that_could_not_be_synced_is_an_error(
    node: Node, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr("pipeline.snapshot.store.os.fsync", fail)
    assert ask(node.url, post_snapshot(BODY)).status == 500
    assert node.raft.processed == []
    monkeypatch.undo()
    assert ask(node.url, post_snapshot(BODY)).status == 204


def statvfs_of(**values: int) -> Callable[[object], Any]:
    zeros = dict.fromkeys(("f_bsize", "f_frsize", "f_blocks", "f_bavail"), 0)
    return lambda path: types.SimpleNamespace(**{**zeros, **values})


def no_statvfs(path: object) -> Any:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize(
    ("statvfs", "status"),
    [
        (no_statvfs, 204),
        (statvfs_of(), 204),
        (statvfs_of(f_bsize=4096), 204),
        (statvfs_of(f_bsize=4096, f_blocks=1 << 20, f_bavail=1 << 20), 204),
        (statvfs_of(f_bsize=4096, f_frsize=512, f_blocks=1 << 20, f_bavail=1), 500),
        (statvfs_of(f_bsize=4096, f_frsize=4096, f_blocks=1 << 20), 500),
    ],
    ids=["unsupported", "0 of 0", "only a size", "without f_frsize", "little", "full"],
)
def test_a_file_system_that_does_not_tell_what_it_has_free_is_tried(
    node: Node, monkeypatch: pytest.MonkeyPatch, statvfs: Callable[[object], Any], status: int
) -> None:
    monkeypatch.setattr("pipeline.snapshot.store.os.statvfs", statvfs)
    assert ask(node.url, post_snapshot(BODY)).status == status


def test_a_temporary_file_that_cannot_be_removed_hides_no_error(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = open_descriptors()
    monkeypatch.setattr("pipeline.snapshot.store.os.write", fail)
    monkeypatch.setattr("pipeline.snapshot.store.os.unlink", fail)
    reply = ask(node.url, post_snapshot(BODY))
    assert reply.status == 500
    assert os.strerror(errno.EROFS).encode() in reply.body
    assert_all_closed(before)
    assert "cannot remove" in caplog.text


def test_leftovers_of_a_crash_are_removed_and_nothing_else(make_node: MakeNode) -> None:
    node = make_node()
    ours = "tmp-pipeline-00000000000003e8-0123456789abcdef"
    kept = {"tmp123456", "tmp-pipeline-x", FILE, f"{ours}.bak"}
    for name in kept | {ours}:
        (node.directory / name).write_bytes(b"x")
    with dial(node.url) as sock:
        sock.sendall(post_snapshot(framed(snapshot(7), DATABASE))[:-1])
        eventually(lambda: len(node.files()) == 6, "one is arriving")
        again = make_node()  # another listener over the same directory
        assert ours not in again.files()
        # A file that had no lock yet was removed, and another takes its place.
        eventually(lambda: kept < set(again.files()), "one is arriving still")
        sock.sendall(DATABASE[-1:])
        assert read_reply(sock).status == 204
    assert set(node.files()) == kept | {f"{7:016x}.snap.db"}


def test_a_file_that_was_taken_for_a_leftover_is_made_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another listener over the directory starts between the file's making and its lock."""
    flock = fcntl.flock
    removed: list[Path] = []

    def take_away(fd: int, how: int) -> None:
        if not removed:
            (file,) = node.directory.iterdir()
            file.unlink()
            removed.append(file)
        flock(fd, how)

    monkeypatch.setattr("pipeline.snapshot.store.fcntl.flock", take_away)
    with dial(node.url) as sock:
        sock.sendall(post_snapshot(framed(snapshot(7), DATABASE)))
        assert read_reply(sock).status == 204
    assert len(removed) == 1
    assert (node.directory / f"{7:016x}.snap.db").read_bytes() == DATABASE
    assert len(node.files()) == 1


def test_a_directory_that_cannot_be_made_is_an_error_of_listen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        Node(tmp_path / "file" / "snap")


# -- closing


@pytest.mark.parametrize("sent", [0, 5, 30, 50_000])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_a_close_ends_what_is_being_received(node: Node, sent: int, is_chunked: bool) -> None:
    request = post_snapshot(BODY, is_chunked=is_chunked)
    start = request.index(b"\r\n\r\n") + 4
    with dial(node.url) as sock:
        sock.sendall(request[: start + sent])
        eventually(lambda: node.listener.stats().connections == 0, "it has left the loop")
        if sent > 1000:
            eventually(lambda: node.files() != {}, "it is being stored")
        began = time.monotonic()
        node.listener.close(deadline_s=LONG_TIMEOUT)
        assert time.monotonic() - began < LONG_TIMEOUT / 2
        with contextlib.suppress(ConnectionError):
            assert read_status(sock) in (503, None)
    assert node.files() == {}
    assert node.raft.processed == []


def test_a_close_waits_for_process_within_its_deadline(node: Node) -> None:
    node.raft.gate = threading.Event()
    with dial(node.url) as sock:
        sock.sendall(post_snapshot(BODY))
        node.raft.wait_processed(1)
        closer = threading.Thread(target=node.listener.close, kwargs={"deadline_s": LONG_TIMEOUT})
        closer.start()
        node.raft.gate.set()
        assert read_reply(sock).status == 204
        closer.join(LONG_TIMEOUT)
        assert not closer.is_alive()
    assert node.files() == {FILE: len(DATABASE)}


def test_a_close_does_not_wait_for_ever_for_the_disk(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, gate, fsync = threading.Event(), threading.Event(), os.fsync

    def stuck(fd: int) -> None:
        reached.set()
        assert gate.wait(LONG_TIMEOUT)
        fsync(fd)

    monkeypatch.setattr("pipeline.snapshot.store.os.fsync", stuck)
    with dial(node.url) as sock:
        sock.sendall(post_snapshot(BODY))
        assert reached.wait(LONG_TIMEOUT)
        node.listener.close(deadline_s=SHORT_TIMEOUT)
        assert node.files() == {}
        gate.set()
        assert sock.recv(1) == b""
    eventually(lambda: "snapshot" not in names_of_threads(), "its thread has ended")
    assert node.results() == {"1": (0, 1)}
    assert node.files() == {}
    assert node.raft.processed == []


def test_a_transport_stopped_from_process_stops(tmp_path: Path) -> None:
    class Stopping(FakeRaft):
        def process(self, message: Message) -> None:
            transport.stop()
            super().process(message)

    raft = Stopping()
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    with Transport(2, CLUSTER_ID, raft, config=config) as transport:
        assert ask(transport.listen("http://127.0.0.1:0").url, post_snapshot(BODY)).status == 204
        raft.wait_processed(1)


# -- what it costs


def test_made_up_senders_cost_a_bounded_number_of_series(node: Node) -> None:
    for sender in range(130):
        assert ask(node.url, post_snapshot(framed(snapshot(from_=sender + 1), b""))).status == 204
    results = node.results()
    assert len(results) == 129
    assert results[""] == (2, 0)
    node.handlers.forget(1)
    assert "1" not in node.results()


def test_no_descriptor_and_no_thread_is_left(node: Node) -> None:
    def all_ended(failures: int) -> bool:
        counts = node.snapshots.counts()["1"]
        return counts.failures == failures and "snapshot" not in names_of_threads()

    ask(node.url, post_snapshot(BODY))
    eventually(lambda: all_ended(0), "its thread has ended")
    before = open_descriptors()
    for n in range(20):
        assert ask(node.url, post_snapshot(BODY)).status == 204
        assert ask(node.url, post_snapshot(framed(HEARTBEAT))).status == 400
        with dial(node.url) as sock:
            sock.sendall(post_snapshot(BODY)[:-1])
        eventually(lambda n=n: all_ended(2 * n + 2), "its threads have ended")  # type: ignore[misc]
    eventually(lambda: node.listener.stats().connections == 0)
    assert_all_closed(before)


def names_of_threads() -> str:
    return " ".join(thread.name for thread in threading.enumerate())


def test_a_connection_that_left_the_loop_makes_room_for_another(make_node: MakeNode) -> None:
    node = make_node(max_connections=1)
    with dial(node.url) as one:
        one.sendall(post_snapshot(BODY)[:-1])
        eventually(lambda: node.files() != {}, "it has left the loop")
        assert ask(node.url, post_snapshot(BODY)).status == 204
        one.sendall(BODY[-1:])
        assert read_reply(one).status == 204
