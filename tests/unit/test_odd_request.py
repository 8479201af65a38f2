"""What an odd request makes of pieces: no call does much, and no byte is looked at often.

Without a socket. What it answers is in functional/test_http.py, what bad input costs a listener in
fault/test_receiver_attacks.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.config import ReceiverConfig
from pipeline.receive import odd_request, request_body
from pipeline.receive.odd_request import OddRequest, Then
from tests.support.events import Events
from tests.support.http import HEARTBEAT, handlers_of, peer_headers
from tests.support.listening import raw_head
from tests.support.raft import FakeRaft

HEAD = raw_head(line="GET /raft/probing HTTP/1.1")


class Counting:
    """A pattern that counts the bytes it looks at."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self.seen = 0

    def search(self, data: bytes, at: int = 0) -> re.Match[bytes] | None:
        self.seen += len(data) - at
        return self._pattern.search(data, at)


def make(**settings: Any) -> OddRequest:
    config = ReceiverConfig(**settings)
    handlers = handlers_of(FakeRaft(), config)
    return OddRequest(handlers, config, "127.0.0.1:1", lambda _head, _sender: False)


def feed(data: bytes) -> bytes:
    """Feed bytes one by one until there is an answer."""
    connection = make()
    for at in range(len(data)):
        out, then = connection.feed(data[at : at + 1])
        if out:
            return out
        assert then is Then.READ_HEAD
    return b""


def test_no_byte_is_looked_at_again_for_each_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Counting(odd_request._BARE)
    monkeypatch.setattr(odd_request, "_BARE", bare)
    assert feed(HEAD).startswith(b"HTTP/1.1 200 ")
    assert bare.seen <= 2 * len(HEAD)


@pytest.mark.parametrize("bad", [b"\n", b"\r", b"\x00", b"\r\r\n"])
def test_what_is_refused_is_refused_wherever_it_comes(bad: bytes) -> None:
    for at in range(len(HEAD) - 4):
        assert feed(HEAD[:at] + bad + HEAD[at:]).startswith(b"HTTP/1.1 400 ")


CHUNKED = raw_head("transfer-encoding: chunked")
STRANGER = peer_headers(x_etcd_cluster_id="1")
MESSAGE = HEARTBEAT.marshal()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    return Events(monkeypatch)


@pytest.mark.parametrize("line", ["POST /raft HTTP/1.1", "PUT /raft HTTP/1.1", "POST /x HTTP/1.1"])
@pytest.mark.parametrize("chunk", [b"1\r\nx\r\n", b"1;a\r\nx\r\n", b"zz\r\n"])
def test_the_chunks_of_a_refused_request_are_not_looked_at(
    events: Events, line: str, chunk: bytes
) -> None:
    connection = make()
    head = raw_head("transfer-encoding: chunked", line=line, headers=STRANGER)
    out, then = connection.feed(head + chunk * 10_000)
    assert out.startswith(b"HTTP/1.1 4")
    assert b"Connection: close\r\n" in out
    assert then is Then.CLOSE
    assert events.count == 1
    assert connection.is_member is False


@pytest.mark.parametrize(
    ("length", "came", "then", "skip"),
    [
        (10, 10, Then.NEXT, 0),
        (10, 13, Then.NEXT, 0),
        (10, 0, Then.NEXT, 10),
        (odd_request.SKIP_MAX, 5, Then.NEXT, odd_request.SKIP_MAX - 5),
        (odd_request.SKIP_MAX + 6, 5, Then.CLOSE, 0),
    ],
)
def test_what_is_left_of_a_refused_body_is_for_the_loop_to_skip(
    length: int, came: int, then: Then, skip: int
) -> None:
    connection = make()
    head = raw_head(f"content-length: {length}", headers=STRANGER)
    out, found = connection.feed(head + b"x" * came)
    assert out.startswith(b"HTTP/1.1 412 ")
    assert (found, connection.skip) == (then, skip)
    assert connection.rest == b"x" * (came - length)


def test_small_chunks_are_no_events_and_only_what_is_body_has_arrived(events: Events) -> None:
    connection = make()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in MESSAGE)
    assert connection.feed(CHUNKED + chunks)[1] is Then.READ_BODY
    assert connection.arrived == len(MESSAGE)
    assert connection.is_member is True
    assert connection.feed(b"0\r\n\r\nnext") == (b"", Then.DELIVER)
    assert connection.body == MESSAGE
    assert events.count == 1
    assert connection.answer(None)[1] is Then.NEXT
    assert connection.rest == b"next"


def test_framing_alone_is_nothing_that_has_arrived() -> None:
    connection = make()
    connection.feed(CHUNKED + b"5;")
    for _ in range(10):
        connection.feed(b"extension" * 10)
    assert connection.arrived == 0


def test_chunks_that_are_left_to_h11_are_read_so_many_a_turn(events: Events) -> None:
    count = 10 * request_body.EVENTS_MAX
    connection = make()
    out, then = connection.feed(CHUNKED + b"1;a=b\r\nx\r\n" * count + b"0\r\nt: u\r\n\r\nnext")
    turns = 0
    while then is Then.TURN:
        turns += 1
        before = events.count
        out, then = connection.feed(b"")
        assert events.count - before <= request_body.EVENTS_MAX
        assert out == b""
    assert then is Then.DELIVER
    assert connection.body == b"x" * count
    assert turns >= 10
    connection.answer(None)
    assert connection.rest == b"next"


def test_a_turn_ends_with_a_body_that_is_too_large_or_malformed() -> None:
    for rest, status in ((b"1;a\r\nx\r\n" * 2000, b"413"), (b"1;a\r\nx" * 2000, b"400")):
        connection = make(max_body_bytes=1000)
        out, then = connection.feed(CHUNKED + rest)
        while then is Then.TURN:
            out, then = connection.feed(b"")
        assert out.startswith(b"HTTP/1.1 " + status)
        assert then is Then.CLOSE


def test_a_caller_is_told_to_go_on_once() -> None:
    connection = make()
    out, _ = connection.feed(raw_head("transfer-encoding: chunked", "expect: 100-continue"))
    assert out == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert connection.feed(b"2\r\n") == (b"", Then.READ_BODY)
    unasked = make()
    out, _ = unasked.feed(raw_head("transfer-encoding: chunked", "expect: 100-continue") + b"2")
    assert out == b""
