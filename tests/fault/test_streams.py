"""Hostile and broken peers, and a stop at any time: what streams make of them.

What a dial may be answered: test_stream_answers.py.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import Inbox
from pipeline.stream.reader import RETRY_S
from tests.fault.test_stop import PATIENT, assert_waited_for_nobody, nothing_left
from tests.support import MIB, SHORT_TIMEOUT
from tests.support.frames import u64
from tests.support.memory import rss
from tests.support.senders import assert_balanced
from tests.support.streams import (
    KINDS,
    PEER,
    VERSION,
    Dialled,
    Lab,
    append,
    chunk,
    head,
    heartbeat,
    indexes,
    of_kind,
    stats_of,
    stream_of,
    wait_down,
    wait_up,
)
from tests.support.tls import Authority
from tests.support.waiting import connections_to, eventually

__all__ = ["nothing_left"]

pytestmark = pytest.mark.streams


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


def serves_still(lab: Lab, kind: str) -> None:
    """Have a message arrive by the next dial."""
    last = of_kind(kind, 99)
    lab.peer.next_dial(kind).accept().send(last)
    lab.raft.wait_for(lambda: last in lab.raft.processed)


# -- what comes as a stream and is none

GARBAGE = b"\xff" * 40
FRAMES = {
    "message": {
        "a length above the limit": u64((512 << 20) + 1),
        "a length without end": u64(2**64 - 1),
        "a negative length": u64(1 << 63),
        "no message": u64(len(GARBAGE)) + GARBAGE,
    },
    "msgapp": {
        "an unknown kind": b"\x03",
        "the last kind there could be": b"\xff",
        "too many entries": b"\x01" + u64((1 << 17) + 1),
        "entries without end": b"\x01" + u64(2**64 - 1),
        "an entry above the limit": b"\x01" + u64(1) + u64((512 << 20) + 1),
        "an entry without end": b"\x01" + u64(1) + u64(2**64 - 1),
        "no entry": b"\x01" + u64(1) + u64(len(GARBAGE)) + GARBAGE + u64(0),
        "a message above the limit": b"\x02" + u64((512 << 20) + 1),
        "no message": b"\x02" + u64(len(GARBAGE)) + GARBAGE,
    },
}


@pytest.mark.parametrize(
    ("kind", "what"), [(kind, what) for kind, frames in FRAMES.items() for what in frames]
)
def test_a_frame_that_is_none_ends_the_stream(plain_lab: Lab, kind: str, what: str) -> None:
    """What came before it is delivered; what comes behind it is not looked at."""
    node = plain_lab.start()
    dialled = plain_lab.peer.next_dial(kind).accept()
    before = dialled.frames([of_kind(kind, 1)])
    dialled.send_bytes(before + FRAMES[kind][what] + before)
    assert dialled.is_ended()
    eventually(lambda: stats_of(node).last_error is not None)
    serves_still(plain_lab, kind)
    assert list(indexes(plain_lab.raft.processed)) == [1, 99]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"5\r\nab",
        b"ffffffffffffffffff\r\n",
        b"1" * 70000,
        b"1\r\nxyz",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_chunk_that_is_none_ends_the_stream(plain_lab: Lab, data: bytes) -> None:
    plain_lab.start()
    dialled = plain_lab.peer.next_dial("message").accept()
    dialled.write(data)
    dialled.sock.shutdown(socket.SHUT_WR)
    assert dialled.is_ended()
    serves_still(plain_lab, "message")
    assert list(indexes(plain_lab.raft.processed)) == [99]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunks", "no chunks"])
def test_a_stream_that_is_cut_anywhere_delivers_what_is_whole(
    plain_lab: Lab, kind: str, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stream.reader.REFUSED_RETRY_S", RETRY_S)
    plain_lab.start()
    delivered = 0
    at = size = 0
    while at <= size:
        dialled = plain_lab.peer.next_dial(kind).accept(is_chunked=is_chunked)
        whole, other = (dialled.frames([of_kind(kind, index)]) for index in (7, 20))
        dialled.send_bytes(whole + other[:at])
        dialled.close()
        size = len(other)
        delivered += 1 if at < size else 2
        assert len(plain_lab.raft.wait_processed(delivered)) == delivered
        at = at + 7 if at + 7 < size or at == size else size


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_may_end_anywhere(lab: Lab, kind: str) -> None:
    """In the middle of an integer too; and so may what is read at once."""
    lab.start()
    dialled = lab.peer.next_dial(kind).accept()
    numbers = itertools.count(1, 2)  # none follows on another, so that all frames are of a size
    size = len(dialled.frames([of_kind(kind, next(numbers), b"data")]))
    sent = []
    for at in range(1, 2 * size):
        pair = [of_kind(kind, next(numbers), b"data") for _ in range(2)]
        data = dialled.frames(pair)
        dialled.write(chunk(data[:at]) + chunk(data[at:]))
        sent += pair
    for cut in (bytes, chunk):
        message = of_kind(kind, next(numbers), b"data")
        data = dialled.frames([message])
        for byte in chunk(data) if cut is bytes else data:
            dialled.write(cut(bytes([byte])))
        sent.append(message)
    assert lab.raft.wait_processed(len(sent)) == sent


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_announced_takes_no_memory_until_it_is_there(plain_lab: Lab, kind: str) -> None:
    plain_lab.start()
    dialled = plain_lab.peer.next_dial(kind).accept(is_chunked=False)
    dialled.send(of_kind(kind, 1))
    plain_lab.raft.wait_processed(1)
    before = rss()
    dialled.write((b"\x02" if kind == "msgapp" else b"") + u64(512 << 20) + bytes(MIB))
    eventually(lambda: not dialled.has_more())
    time.sleep(SHORT_TIMEOUT)
    assert rss() - before < 32 * MIB
    plain_lab.node.stop()
    assert dialled.is_ended()


# -- who dials us


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dialler_says_is_not_listened_to(lab: Lab, kind: str) -> None:
    node = lab.start()
    attached = lab.peer.attach(lab.url, kind)
    wait_up(node, kind, "out")
    attached.sock.sendall(bytes(MIB))
    node.send([of_kind(kind, 1, from_=1, to=2)])
    assert list(indexes(attached.read(1))) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dialler_that_comes_again_and_again_leaves_one_stream(
    lab: Lab, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = lab.start()
    began = time.monotonic()
    asked = [lab.peer.ask(lab.url, kind) for _ in range(20)]
    eventually(lambda: connections_to(lab.url) == 1, "of all connections one is left")
    node.send([of_kind(kind, 1, from_=1, to=2)])
    eventually(lambda: stream_of(node, kind, "out").messages == 1, "which is the stream")
    warned = [r for r in caplog.records if r.name == "pipeline.stream.writer" and r.levelno >= 30]
    assert (
        1 <= len(warned) <= 2 + 2 * (time.monotonic() - began)
    )  # of two texts, each once a second
    node.stop()
    for one in asked:
        assert one.is_ended()


# -- the books


@pytest.mark.parametrize("kind", KINDS)
def test_the_books_balance_whatever_becomes_of_streams(lab: Lab, kind: str) -> None:
    node = lab.start()
    is_over = threading.Event()
    unbalanced: list[Exception] = []

    def send() -> None:
        for index in itertools.count():
            if is_over.is_set():
                return
            node.send([of_kind(kind, index, b"x" * (index % 5000), from_=1, to=2)] * 20)

    def look() -> None:
        while not is_over.is_set():
            try:
                for stream in stats_of(node).streams:
                    if stream.books is not None:
                        assert_balanced(stream.books)
            except AssertionError as error:
                unbalanced.append(error)
                return

    threads = [threading.Thread(target=target) for target in (send, send, look)]
    for thread in threads:
        thread.start()
    attached = []
    try:
        for turn in range(12):
            attached.append(lab.peer.attach(lab.url, kind))
            wait_up(node, kind, "out")
            if turn % 4 == 1:
                attached[-1].reset()
            elif turn % 4 == 2:
                attached[-1].read(5)
                attached[-1].close()
            elif turn % 4 == 3:
                attached[-1].read(50)  # and is replaced
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not unbalanced
    books = stream_of(node, kind, "out").books
    assert books is not None
    assert books.sent > 0


# -- stop, in every state


def just_started(lab: Lab) -> None:
    lab.start()


def asking(lab: Lab) -> None:
    lab.start()
    lab.peer.next_dial("msgapp")


def half_a_head(lab: Lab) -> None:
    lab.start()
    lab.peer.next_dial("msgapp").write(b"HTTP/1.1 200 OK\r\nX-Ser")
    lab.peer.next_dial("message")


def refused_endlessly(lab: Lab) -> None:
    lab.start()
    for kind in KINDS:
        lab.peer.next_dial(kind).write(head("404 Not Found", "X-A: b") + chunk(b"x"))


def idle(lab: Lab) -> None:
    lab.start()
    for kind in KINDS:
        lab.peer.next_dial(kind).accept()
        lab.peer.attach(lab.url, kind)
        wait_up(lab.node, kind, "in")
        wait_up(lab.node, kind, "out")


def not_read(lab: Lab) -> None:
    lab.start()
    lab.peer.attach(lab.url, "msgapp", receive_buffer=4096)
    wait_up(lab.node, "msgapp", "out")
    data = bytes(MIB)
    for index in range(32):
        lab.node.send([append(index, data, from_=1, to=2)])


def full(lab: Lab) -> None:
    lab.start(stream_queue_length=2)
    lab.peer.attach(lab.url, "msgapp", receive_buffer=4096)
    wait_up(lab.node, "msgapp", "out")
    data = bytes(MIB)

    def is_full() -> bool:
        lab.node.send([append(1, data, from_=1, to=2)])
        books = stream_of(lab.node, "msgapp", "out").books
        assert books is not None
        return books.refused > 0

    eventually(is_full)


def half_a_large_frame(lab: Lab) -> None:
    lab.start()
    dialled = lab.peer.next_dial("message").accept()
    dialled.send_bytes(u64(64 * MIB) + bytes(MIB))


def full_inbox(lab: Lab) -> None:
    lab.start(inbox=Inbox(max_messages=4))
    dialled = lab.peer.next_dial("message").accept()
    dialled.send(*[heartbeat(index) for index in range(200)])


STATES: list[Callable[[Lab], None]] = [
    just_started, asking, half_a_head, refused_endlessly, idle, not_read, full, half_a_large_frame,
    full_inbox,
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.usefixtures("nothing_left")
def test_stop_waits_for_nobody(tmp_path: Path, state: Callable[[Lab], None]) -> None:
    for authority in (None, Authority(tmp_path)):
        lab = Lab(authority, stop_timeout_s=PATIENT.stop_timeout_s)
        try:
            state(lab)
            begin = time.monotonic()
            lab.node.stop()
            assert_waited_for_nobody(time.monotonic() - begin)
        finally:
            lab.close()


# -- who says nothing, or does not listen


def test_a_peer_that_says_nothing_is_dialled_again(plain_lab: Lab) -> None:
    """Each stream is looked at by itself: what comes on one is no life of the other."""
    node = plain_lab.start()
    silent = plain_lab.peer.next_dial("msgapp").accept()
    other = plain_lab.peer.next_dial("message").accept()
    begin = time.monotonic()
    while not silent.has_more():
        other.send_bytes(other.heartbeat())
        time.sleep(SHORT_TIMEOUT)
    assert time.monotonic() - begin > 4.9
    assert silent.is_ended()
    assert stream_of(node, "message", "in").since is not None
    serves_still(plain_lab, "msgapp")


def test_a_peer_that_does_not_read_loses_its_stream(plain_lab: Lab) -> None:
    """What it has not read fails, all at once, and Raft hears of it."""
    node = plain_lab.start()
    plain_lab.peer.attach(plain_lab.url, "msgapp", receive_buffer=4096)
    wait_up(node, "msgapp", "out")
    data = bytes(MIB)
    node.send([append(index, data, from_=1, to=2) for index in range(16)])
    wait_down(node, "msgapp", "out")
    books = stream_of(node, "msgapp", "out").books
    assert books is not None
    assert_balanced(books)
    assert books.failed > 0
    assert books.sent + books.failed == books.accepted == 16
    assert plain_lab.raft.wait_unreachable(1)[0] == PEER


# -- who is slow on our side


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 70_000], ids=["small", "large"])
def test_a_full_inbox_loses_nothing_and_keeps_the_order(lab: Lab, kind: str, size: int) -> None:
    """The stream is not read meanwhile, and is not taken for silent."""
    inbox = Inbox(max_messages=8)
    node = lab.start(inbox=inbox)
    dialled = lab.peer.next_dial(kind).accept()
    data = bytes(size)
    sent = [
        append(index, data) if size else of_kind(kind, index)
        for index in range(60 if size else 900)
    ]
    sending = threading.Thread(target=lambda: [dialled.send(message) for message in sent])
    sending.start()
    taken: list[int] = []
    while len(taken) < len(sent):
        taken += indexes(inbox.take(7, 30.0))
        assert inbox.stats().queued <= 8
    sending.join()
    assert taken == list(range(len(sent)))
    assert stream_of(node, kind, "in").messages == len(sent)


def test_a_callback_that_hangs_keeps_nobody_from_stopping(
    plain_lab: Lab, gate: threading.Event
) -> None:
    plain_lab.raft.gate = gate
    node = plain_lab.start(stop_timeout_s=0.1)
    plain_lab.peer.next_dial("message").accept().send(heartbeat(1))
    plain_lab.raft.wait_for(lambda: bool(plain_lab.raft.processed))
    begin = time.monotonic()
    node.stop()
    assert_waited_for_nobody(time.monotonic() - begin)


def refuses(dialled: Dialled) -> None:
    dialled.write(head("404 Not Found", VERSION, "Content-Length: 0", is_chunked=False))


def test_a_peer_that_is_removed_and_added_again_has_new_streams(lab: Lab) -> None:
    node = lab.start()
    for index in range(3):
        dialled = lab.peer.next_dial("message").accept()
        dialled.send(heartbeat(index))
        lab.raft.wait_processed(index + 1)
        node.remove_peer(PEER)
        assert dialled.is_ended()
        node.add_peer(PEER, [lab.peer.url])
    refuses(lab.peer.next_dial("message"))
