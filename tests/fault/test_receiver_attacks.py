"""Every bad input the receiver knows, one row each, and what it must not cost.

After each: the status, whether the connection is closed, that the same listener serves a good
request, that nothing reached Raft, and that memory and threads are as they were.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import ReceiverConfig
from pipeline.receive.handlers import Handlers
from pipeline.receive.listener import Listener
from pipeline.types import MessageType
from pipeline.wire._messages import Message
from tests.support import LONG_TIMEOUT, MIB
from tests.support.http import HEARTBEAT, handlers_of, peer_headers, post_heartbeat
from tests.support.listening import GOOD, dial, raw_head, read_answers, read_status
from tests.support.memory import rss
from tests.support.processes import run
from tests.support.raft import FakeRaft
from tests.support.snapshots import FILE as SNAPSHOT_FILE
from tests.support.waiting import eventually

MESSAGE = HEARTBEAT.marshal()
SIZE = len(MESSAGE)
LENGTH = f"content-length: {SIZE}"
CHUNKED = "transfer-encoding: chunked"
STRANGER = peer_headers(x_etcd_cluster_id="1")
CONFIG = ReceiverConfig(max_body_bytes=MIB, max_head_bytes=16 * 1024, handlers=2)


@dataclass
class Server:
    """A listener that has served, with what it had before the attack."""

    listener: Listener
    raft: FakeRaft
    handlers: Handlers


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    raft = FakeRaft()
    handlers = handlers_of(raft, CONFIG)
    with Listener(handlers, "http://127.0.0.1:0", CONFIG) as listener:
        for _ in range(2):
            with dial(listener.url) as sock:
                sock.sendall(GOOD)
                assert read_status(sock) == 204
        yield Server(listener, raft, handlers)


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The one listener all rows share: what one of them breaks, the next one sees."""
    shared.raft.processed.clear()
    threads, memory = threading.active_count(), rss()
    yield shared
    eventually(lambda: threading.active_count() == threads)
    assert rss() - memory < 32 * MIB  # what malloc keeps of the largest row
    assert post_heartbeat(shared.listener.url).status == 204
    with dial(shared.listener.url) as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 204


def stays_open(sock: socket.socket) -> bool:
    """Tell whether another request is answered on a connection."""
    try:
        sock.sendall(b"GET /raft/probing HTTP/1.1\r\nhost: a\r\n\r\n")
        return read_status(sock) == 200
    except ConnectionError:
        return False


def line(text: str) -> bytes:
    return raw_head(LENGTH, line=text) + MESSAGE


def with_header(*extra: str) -> bytes:
    return raw_head(*extra, LENGTH) + MESSAGE


def framed(*framing: str, body: bytes = MESSAGE) -> bytes:
    return raw_head(*framing) + body


CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, MESSAGE)

CLOSED, OPEN = True, False

ROWS = {
    # Two ways to read the framing.
    "length and chunked": (framed(LENGTH, CHUNKED, body=CHUNKS), 400, CLOSED),
    "chunked and length": (framed(CHUNKED, LENGTH, body=CHUNKS), 400, CLOSED),
    "two lengths that differ": (framed(LENGTH, "content-length: 1"), 400, CLOSED),
    "two lengths that agree": (framed(LENGTH, LENGTH), 400, CLOSED),
    "two lengths in one line": (framed(f"{LENGTH}, {SIZE}"), 400, CLOSED),
    "two codings": (framed(CHUNKED, CHUNKED, body=CHUNKS), 400, CLOSED),
    "chunked twice": (framed(f"{CHUNKED}, chunked", body=CHUNKS), 400, CLOSED),
    "gzip, chunked": (framed("transfer-encoding: gzip, chunked", body=CHUNKS), 400, CLOSED),
    "identity coding": (framed("transfer-encoding: identity"), 400, CLOSED),
    "coding with a vertical tab": (framed("transfer-encoding: \x0bchunked"), 400, CLOSED),
    "folded coding": (framed("transfer-encoding:\r\n chunked", body=CHUNKS), 400, CLOSED),
    "space before the colon of a coding": (framed("transfer-encoding : chunked"), 400, CLOSED),
    "space before the colon of a length": (framed(f"content-length : {SIZE}"), 400, CLOSED),
    # Numbers that are none.
    "length with plus": (framed(f"content-length: +{SIZE}"), 400, CLOSED),
    "length with minus": (framed(f"content-length: -{SIZE}"), 400, CLOSED),
    "length with underscore": (framed("content-length: 1_0"), 400, CLOSED),
    "length in hex": (framed("content-length: 0x10"), 400, CLOSED),
    "length in Arabic digits": (
        raw_head("content-length: @").replace(b"@", "٣".encode()) + MESSAGE, 400, CLOSED),
    "length in superscript": (framed("content-length: \xb2"), 400, CLOSED),
    "length with a space inside": (framed("content-length: 1 0"), 400, CLOSED),
    "length with a point": (framed("content-length: 10.0"), 400, CLOSED),
    "empty length": (framed("content-length:"), 400, CLOSED),
    "length of 17 digits": (framed("content-length: " + "9" * 17), 413, CLOSED),
    "length of 19 digits": (framed("content-length: " + "9" * 19), 413, CLOSED),
    "length of 5,000 digits": (framed("content-length: " + "9" * 5000), 413, CLOSED),
    "length of 5,000 zeros": (framed("content-length: " + "0" * 5000), 413, CLOSED),
    "one byte too long": (framed(f"content-length: {MIB + 1}"), 413, CLOSED),
    # Lines.
    "bare LF": (GOOD.replace(b"\r\n", b"\n"), 400, CLOSED),
    "one bare LF": (with_header("x: y\nz: a"), 400, CLOSED),
    "bare CR": (with_header("x: y\rz: a"), 400, CLOSED),
    "LF CR": (with_header("x: y\n\rz: a"), 400, CLOSED),
    "CR CR LF": (with_header("x: y\r"), 400, CLOSED),
    "obs-fold": (with_header("x: y\r\n z"), 400, CLOSED),
    "obs-fold with a tab": (with_header("x: y\r\n\tz"), 400, CLOSED),
    "first header folded": (GOOD.replace(b"host:", b" host:", 1), 400, CLOSED),
    "no colon": (with_header("xy"), 400, CLOSED),
    "no name": (with_header(": y"), 400, CLOSED),
    "space before colon": (with_header("x : y"), 400, CLOSED),
    "tab before colon": (with_header("x\t: y"), 400, CLOSED),
    "space in name": (with_header("x y: z"), 400, CLOSED),
    "bracket in name": (with_header("x(y): z"), 400, CLOSED),
    "umlaut in name": (with_header("\xfc: z"), 400, CLOSED),
    "NUL in name": (with_header("x\x00y: z"), 400, CLOSED),
    "NUL in value": (with_header("x: y\x00z"), 400, CLOSED),
    "bell in value": (with_header("x: \x07"), 400, CLOSED),
    "DEL in value": (with_header("x: \x7f"), 400, CLOSED),
    "empty line first": (b"\r\n" + GOOD, 400, CLOSED),
    "no host": (GOOD.replace(b"host: test\r\n", b""), 400, CLOSED),
    "two hosts": (with_header("host: other"), 400, CLOSED),
    # The request line.
    "no version": (line("POST /raft"), 400, CLOSED),
    "HTTP/2.0": (line("POST /raft HTTP/2.0"), 400, CLOSED),
    "HTTP/1.2": (line("POST /raft HTTP/1.2"), 400, CLOSED),
    "HTTP/1.10": (line("POST /raft HTTP/1.10"), 400, CLOSED),
    "http/1.1": (line("POST /raft http/1.1"), 400, CLOSED),
    "HTTP/0.9": (b"GET /raft\r\n\r\n", 400, CLOSED),
    "two spaces": (line("POST  /raft HTTP/1.1"), 400, CLOSED),
    "space first": (line(" POST /raft HTTP/1.1"), 400, CLOSED),
    "tab for space": (line("POST\t/raft\tHTTP/1.1"), 400, CLOSED),
    "space in path": (line("POST /ra ft HTTP/1.1"), 400, CLOSED),
    "umlaut in path": (line("POST /r\xe4ft HTTP/1.1"), 400, CLOSED),
    "NUL in path": (line("POST /raft\x00 HTTP/1.1"), 400, CLOSED),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, CLOSED),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, CLOSED),
    # Well-formed, and not for us.
    "absolute form": (line("POST http://test/raft HTTP/1.1"), 404, OPEN),
    "encoded letter": (line("POST /%72aft HTTP/1.1"), 404, OPEN),
    "encoded slash": (line("POST /raft%2f HTTP/1.1"), 404, OPEN),
    "dot segments": (line("POST /x/../raft HTTP/1.1"), 404, OPEN),
    "double slash": (line("POST //raft HTTP/1.1"), 404, OPEN),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 404, OPEN),
    "CONNECT": (b"CONNECT test:80 HTTP/1.1\r\nhost: a\r\n\r\n", 404, OPEN),
    "lower-case method": (line("post /raft HTTP/1.1"), 405, OPEN),
    "HTTP/1.0": (line("GET /raft/x HTTP/1.0"), 404, CLOSED),
    "HTTP/1.0 that would be kept": (
        raw_head("connection: keep-alive", line="GET /x HTTP/1.0"), 404, CLOSED),
    "connection to be closed": (raw_head("connection: close", line="GET /x HTTP/1.1"), 404, CLOSED),
    "gzip": (with_header("content-encoding: gzip"), 415, CLOSED),
    "gzip, chunked body": (framed("content-encoding: gzip", CHUNKED, body=CHUNKS), 415, CLOSED),
    "version that is none": (
        raw_head(LENGTH, headers=peer_headers(x_server_version="v")) + MESSAGE, 412, OPEN),
    "version of 10,000 digits": (
        raw_head(LENGTH, headers=peer_headers(x_server_version="9" * 10000)) + MESSAGE, 412, OPEN),
    "stranger": (raw_head(LENGTH, headers=STRANGER) + MESSAGE, 412, OPEN),
    "stranger with a long body": (
        raw_head("content-length: 999999", headers=STRANGER) + MESSAGE, 412, CLOSED),
    "stranger with a chunk, and no more": (
        raw_head(CHUNKED, headers=STRANGER) + b"1\r\nx\r\n", 412, CLOSED),
    "stranger with chunks that are whole": (
        raw_head(CHUNKED, headers=STRANGER) + b"1\r\nx\r\n0\r\n\r\n", 412, OPEN),
    "stranger with endless chunks": (
        raw_head(CHUNKED, headers=STRANGER) + b"10000\r\n%b\r\n" % bytes(65536) * 5, 412, CLOSED),
    # Sizes.
    "101 headers": (
        raw_head(*(f"x{n}: y" for n in range(101 - 8)), LENGTH) + MESSAGE, 431, CLOSED),
    "a line without end": (b"POST /" + b"r" * 20000, 431, CLOSED),
    "a header without end": (raw_head("x: ")[:-4] + b"y" * 20000, 431, CLOSED),
    "a head one byte too large": (
        with_header("x: " + "y" * (16 * 1024 + 1 - len(raw_head("x: ", LENGTH)))), 431, CLOSED),
    # Bodies.
    "no message": (framed("content-length: 7", body=b"garbage"), 400, OPEN),
    "cut message": (framed(f"content-length: {SIZE - 1}", body=MESSAGE[:-1]), 400, OPEN),
    "type of a later raft": (framed("content-length: 2", body=b"\x08\x18"), 204, OPEN),
    "negative type": (
        framed("content-length: 11", body=b"\x08" + b"\xff" * 9 + b"\x01"), 400, OPEN),
    "half a million entries": (
        framed("content-length: 1000000", body=b"\x3a\x00" * 500_000), 400, OPEN),
    "chunk size not hex": (framed(CHUNKED, body=b"x\r\n"), 400, CLOSED),
    "chunk size with sign": (framed(CHUNKED, body=b"+1\r\na\r\n"), 400, CLOSED),
    "chunk size with 0x": (framed(CHUNKED, body=b"0x1\r\na\r\n"), 400, CLOSED),
    "chunk size of 30 digits": (framed(CHUNKED, body=b"f" * 30 + b"\r\n"), 400, CLOSED),
    "chunk longer than it says": (framed(CHUNKED, body=b"1\r\nabc\r\n"), 400, CLOSED),
    "chunk extension without end": (framed(CHUNKED, body=b"1;" + b"x" * 99999), 400, CLOSED),
    "chunks too large": (
        framed(CHUNKED, body=b"100001\r\n" + bytes(MIB + 1)), 413, CLOSED),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_and_costs_nothing(server: Server, row: str) -> None:
    sent, status, closed = ROWS[row]
    with dial(server.listener.url) as sock:
        sock.sendall(sent)
        assert read_status(sock) == status
        assert stays_open(sock) is not closed
    assert server.raft.processed == []


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(raw_head(*(f"x{n}: y" for n in range(100 - 8)), LENGTH) + MESSAGE,
                     id="100 headers"),
        pytest.param(with_header("x: " + "y" * (16 * 1024 - len(raw_head("x: ", LENGTH)))),
                     id="a head of 16 KiB"),
        pytest.param(framed("content-length: 000" + str(SIZE)), id="zeros before the length"),
        pytest.param(with_header("x: \xfc"), id="umlaut in value"),
        pytest.param(with_header("connection: KEEP-ALIVE"), id="connection in capitals"),
        pytest.param(with_header("upgrade: h2c", "connection: upgrade"), id="upgrade ignored"),
        pytest.param(line("POST /raft?a=b HTTP/1.1"), id="query"),
        pytest.param(framed(CHUNKED, body=CHUNKS), id="chunked"),
        pytest.param(framed(CHUNKED, body=CHUNKS[:-2] + b"trailer: x\r\n\r\n"), id="trailer"),
        pytest.param(framed(CHUNKED, body=CHUNKS.replace(b"\r\n", b";ext=1\r\n", 1)),
                     id="chunk extension"),
    ],
)  # fmt: skip
def test_odd_but_legal_forms_are_taken_again_and_again(server: Server, sent: bytes) -> None:
    with dial(server.listener.url) as sock:
        for _ in range(3):
            sock.sendall(sent)
            assert read_status(sock) == 204
    assert server.raft.processed == [HEARTBEAT] * 3


def test_http_1_0_is_answered_and_closed(server: Server) -> None:
    with dial(server.listener.url) as sock:
        sock.sendall(line("POST /raft HTTP/1.0"))
        assert read_status(sock) == 204
        assert not stays_open(sock)
    assert server.raft.processed == [HEARTBEAT]


def test_expect_continue_is_told_to_go_on_and_a_stranger_is_not(server: Server) -> None:
    expecting = ("expect: 100-continue", LENGTH)
    with dial(server.listener.url) as sock:
        for _ in range(2):
            sock.sendall(raw_head(*expecting))
            assert read_answers(sock, 1) == [b"HTTP/1.1 100 Continue\r\n\r\n"]
            sock.sendall(MESSAGE)
            assert read_status(sock) == 204
        # Who does not wait is not told.
        sock.sendall(raw_head(*expecting) + MESSAGE)
        assert read_answers(sock, 1)[0].startswith(b"HTTP/1.1 204 ")
        sock.sendall(raw_head(*expecting, headers=STRANGER))
        assert read_status(sock) == 412
        assert not stays_open(sock)
    assert server.raft.processed == [HEARTBEAT] * 3


PIPELINED = [
    (GOOD, 204),
    (framed(CHUNKED, body=CHUNKS), 204),
    (b"GET /raft/probing HTTP/1.1\r\nhost: a\r\n\r\n", 200),
    (framed("content-length: 1", body=b"\x08"), 400),
    (raw_head(LENGTH, headers=STRANGER) + MESSAGE, 412),
    (line("PUT /raft HTTP/1.1"), 405),
    (framed(f"content-length: {SIZE}"), 204),
    (line("POST /nowhere HTTP/1.1"), 404),
]


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20], ids=lambda n: f"{n} bytes at once")
def test_requests_sent_ahead_are_answered_in_order_whoever_reads_them(
    server: Server, piece: int
) -> None:
    requests = PIPELINED * 3
    sent = b"".join(request for request, _ in requests)
    with dial(server.listener.url) as sock:
        for at in range(0, len(sent), piece):
            sock.sendall(sent[at : at + piece])
        answers = read_answers(sock, len(requests))
    assert [int(answer.split()[1]) for answer in answers] == [status for _, status in requests]
    assert server.raft.processed == [HEARTBEAT] * 9


def test_a_chunked_message_may_be_cut_anywhere(server: Server) -> None:
    request = framed(CHUNKED, body=b"3;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nt: u\r\n\r\n" % (
        MESSAGE[:3], SIZE - 3, MESSAGE[3:]))  # fmt: skip
    with dial(server.listener.url) as sock:
        for cut in range(1, len(request)):
            sock.sendall(request[:cut])
            sock.sendall(request[cut:])
            assert read_status(sock) == 204, f"cut at {cut}"
    assert server.raft.processed == [HEARTBEAT] * (len(request) - 1)


def test_an_odd_head_may_be_cut_anywhere(server: Server) -> None:
    requests = [line("PUT /raft HTTP/1.1"), line("POST /raft HTTP/1.1"), framed("x : y")]
    for request, status in zip(requests, (405, 204, 400), strict=True):
        for cut in range(1, len(request), 3):
            with dial(server.listener.url) as sock:
                sock.sendall(request[:cut])
                sock.sendall(request[cut:])
                assert read_status(sock) == status, f"cut at {cut}"


def test_refusals_and_failures_are_counted(server: Server) -> None:
    before = server.handlers.received.failures
    for row in ("gzip", "one byte too long", "chunks too large", "no message", "negative type"):
        with dial(server.listener.url) as sock:
            sock.sendall(ROWS[row][0])
            read_status(sock)
    assert server.handlers.received.failures == before + 5


def test_chunked_bodies_together_stay_within_the_budget() -> None:
    config = ReceiverConfig(max_buffered_bytes=MIB)
    raft = FakeRaft()
    handlers = handlers_of(raft, config)
    part = raw_head(CHUNKED) + b"%x\r\n" % (2 * MIB) + bytes(MIB * 3 // 4)
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        for round_ in (1, 2):  # what they held is given back
            with dial(listener.url) as first, dial(listener.url) as second:
                first.sendall(part)
                second.sendall(part)
                (refused,), _, _ = select.select([first, second], [], [], LONG_TIMEOUT)
                assert read_status(refused) == 503
            # One was refused, the other broke off.
            eventually(lambda n=2 * round_: handlers.received.failures == n)  # type: ignore[misc]
        body = Message(type=MessageType.APP, context=bytes(MIB * 3 // 4)).marshal()
        with dial(listener.url) as sock:
            sock.sendall(raw_head(CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            assert read_status(sock) == 204


def drip(sock: socket.socket, parts: list[bytes], every_s: float) -> bool:
    """Send ``parts`` one by one until there is an answer; False if there was none."""
    for part in parts:
        sock.sendall(part)
        if select.select([sock], [], [], every_s)[0]:
            return True
    return False


DRIPS = {
    "length": (raw_head(f"content-length: {MIB}"), b"x"),
    "chunked": (raw_head(CHUNKED), b"1\r\nx\r\n"),
}


@pytest.mark.parametrize("framing", [*DRIPS, "nearly all framing"])
def test_a_body_that_drips_is_ended(framing: str) -> None:
    # Some 20 ms between two bytes, far from a stall; but a byte is worth 10 us.
    config = ReceiverConfig(stall_timeout_s=0.3, min_body_rate=100_000)
    raft = FakeRaft()
    handlers = handlers_of(raft, config)
    # The framing comes at four times the least rate; only what is body counts.
    much = (raw_head(CHUNKED), b"1;" + b"x" * 8000 + b"\r\nx\r\n")
    head, part = DRIPS.get(framing, much)
    with (
        Listener(handlers, "http://127.0.0.1:0", config) as listener,
        dial(listener.url) as sock,
    ):
        sock.sendall(head)
        assert drip(sock, [part] * int(LONG_TIMEOUT / 0.02), every_s=0.02)
        assert read_status(sock) == 400
        assert listener.stats().body_timeouts == 1
    assert (raft.processed, handlers.received.failures) == ([], 1)


def test_thousands_of_odd_chunks_are_a_message_all_the_same(server: Server) -> None:
    """It takes many turns of the thread that reads them."""
    body = Message(type=MessageType.HEARTBEAT, context=bytes(5000)).marshal()
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with dial(server.listener.url) as sock:
        for _ in range(2):
            sock.sendall(raw_head(CHUNKED) + chunks)
            assert read_status(sock) == 204
    assert [message.marshal() for message in server.raft.processed] == [body] * 2


def test_a_listener_that_closes_does_not_wait_for_odd_chunks() -> None:
    raft = FakeRaft()
    config = ReceiverConfig()
    handlers = handlers_of(raft, config)
    with (
        Listener(handlers, "http://127.0.0.1:0", config) as listener,
        dial(listener.url) as sock,
    ):
        sock.sendall(raw_head(CHUNKED) + b"1;a=b\r\nx\r\n" * 1000)
        eventually(lambda: listener.stats().general_requests == 1)
        begin = time.monotonic()
        listener.close(LONG_TIMEOUT)
        assert time.monotonic() - begin < LONG_TIMEOUT / 2
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    assert raft.processed == []


@pytest.mark.parametrize("rate", [0, 1], ids=["no least rate", "above it"])
@pytest.mark.parametrize("framing", DRIPS)
def test_a_body_that_is_slow_arrives(framing: str, rate: int) -> None:
    config = ReceiverConfig(stall_timeout_s=2.0, min_body_rate=rate)
    handlers = handlers_of(FakeRaft(), config)
    body = Message(type=MessageType.HEARTBEAT, context=bytes(20)).marshal()
    parts = [b"%c" % byte for byte in body]
    if framing == "chunked":
        head = raw_head(CHUNKED)
        parts = [b"1\r\n%b\r\n" % part for part in parts] + [b"0\r\n\r\n"]
    else:
        head = raw_head(f"content-length: {len(body)}")
    with (
        Listener(handlers, "http://127.0.0.1:0", config) as listener,
        dial(listener.url) as sock,
    ):
        sock.sendall(head)
        drip(sock, parts, every_s=3.0 / len(parts))  # longer than a stall may last
        assert read_status(sock) == 204


@pytest.mark.parametrize(
    "case",
    ["no descriptors", "announced", "entries", "forks", "blocked memory", "idle", "held GIL"],
)
def test_in_a_process_of_its_own(case: str) -> None:
    result = run("receiver.py", case)
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


@pytest.mark.parametrize("case", ["forks", "idle, TLS"])
def test_in_a_process_of_its_own_with_tls(case: str, tmp_path: Path) -> None:
    result = run("receiver.py", case, str(tmp_path))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


STATES = ["idle", "head", "body", "processing", "writing", "busy"]


@pytest.mark.parametrize(
    ("scheme", "state"),
    [
        *(("http", state) for state in STATES),
        *(("https", state) for state in ["handshake", *STATES]),
    ],
)
def test_the_interpreter_exits_with_a_listener_open(
    scheme: str, state: str, tmp_path: Path
) -> None:
    """OpenSSL clears itself away then, and no thread of ours may be inside it."""
    arguments = [str(tmp_path)] if scheme == "https" else []
    result = run("receiver.py", "exits", state, *arguments)
    errors = re.sub(r"(?m)^listener at .* closed with requests unanswered\n", "", result.stderr)
    assert (result.stdout, errors, result.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize(
    ("case", "left"),
    [
        ("memory", []),
        ("file limit", [SNAPSHOT_FILE]),
        ("forks", [SNAPSHOT_FILE]),
        ("exits", []),
        ("exits in process", [SNAPSHOT_FILE]),
    ],
)
def test_a_snapshot_survives_what_befalls_the_process(
    case: str, left: list[str], tmp_path: Path
) -> None:
    result = run("snapshots.py", case, str(tmp_path))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == left
