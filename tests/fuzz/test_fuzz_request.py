"""Whatever the core takes for a plain POST, h11 reads as the very same request.

Invariant: ``check_request``. Also: what the core accepts, the checks ahead of h11 in
``odd_request.py`` accept. A chunked body, in whatever pieces it comes, is read as h11 reads the
whole: the same bytes and the same end, or refused.
"""

from __future__ import annotations

import itertools

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.receive._receiver import match_post, recognise_post
from pipeline.receive.request_body import RequestBody
from tests.fuzz.oracles import check_request, is_let_through
from tests.support.listening import raw_head

GO = (
    b"POST /raft HTTP/1.1\r\nHost: 127.0.0.1:2380\r\nUser-Agent: Go-http-client/1.1\r\n"
    b"Content-Length: 170\r\nContent-Type: application/protobuf\r\n"
    b"X-Etcd-Cluster-Id: cdf818194e3a8c32\r\nX-Server-Version: 3.5.1\r\n"
    b"Accept-Encoding: gzip\r\n\r\n"
)
SEEDS = [
    GO,
    raw_head("content-length: 0"),
    raw_head("content-length: 007"),
    raw_head("content-length:\t12 \t", "connection: keep-alive"),
    raw_head("Content-Length: 999999999999999", "CONNECTION: Keep-Alive"),
]
# Bytes that have been the start of many a smuggled request.
PIECES = [
    b"\r\n", b"\r", b"\n", b" ", b"\t", b":", b",", b"\x00", b"\x0b", b"\x7f", b"\x80", b"\xff",
    b"+", b"-", b"_", b"0", b"1", b"0x1", b"\xd9\xa1", b"Content-Length: 1\r\n", b"Host: b\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Transfer_Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: keep-alive, close",
    b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Content-Encoding: gzip\r\n", b" folded\r\n",
    b"HTTP/1.0", b"HTTP/1.1", b"/raft", b"POST ", b"GET ",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid head with a few bytes replaced, removed or put in."""
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(0, 4)))
        put = draw(st.sampled_from(PIECES) | st.binary(max_size=3))
        data = data[:at] + put + data[until:]
    return data + draw(st.binary(max_size=8))


NAMES = [
    "Host", "hOST", "Content-Length", "content-length", "Connection", "Transfer-Encoding", "Expect",
    "Content-Encoding", "Upgrade", "X", "X-Etcd-Cluster-Id", "Keep-Alive", "Content-Length ",
    "", "Proxy-Connection", "Trailer", "TE", "Content_Length", "a\x7f", "\xe9",
]  # fmt: skip
VALUES = [
    "", "a", "1", "17", "+1", "-1", "1_0", "0x1", "1,1", "1, 2", "1 1", "٣", "00", "9" * 15,
    "9" * 16, "keep-alive", "KEEP-ALIVE", "close", "keep-alive, close", "keep-alive, upgrade",
    "chunked", "identity", "gzip", "100-continue", "h2c", "\x00", "\x1f", "\x7f", "\x80", "a\rb",
    "a\nb", "a\r\n b", "a\tb",
]  # fmt: skip
SPACE = st.sampled_from(["", " ", "\t", "  \t "])


@st.composite
def generated(draw: st.DrawFn) -> bytes:
    """Lines that may make a head, framed with two thirds of the luck it takes."""
    line = draw(st.sampled_from(["POST /raft HTTP/1.1"] * 6 + ["POST /raft HTTP/1.0", "GET / x"]))
    fields = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), SPACE, st.sampled_from(VALUES), SPACE))
    )
    if draw(st.integers(0, 2)):
        fields.append(("Host", " ", "a", ""))
    if draw(st.integers(0, 2)):
        fields.append(("Content-Length", draw(SPACE), draw(st.sampled_from(["0", "5"])), ""))
    lines = [line] + [
        f"{name}:{a}{value}{b}" for name, a, value, b in draw(st.permutations(fields))
    ]
    end = draw(st.sampled_from(["\r\n"] * 8 + ["\n", "\r"]))
    return "".join(part + end for part in [*lines, ""]).encode("utf-8")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds_are_accepted(seed: bytes) -> None:
    assert check_request(seed)
    assert is_let_through(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_single_byte_makes_the_core_and_h11_differ(seed: bytes) -> None:
    end = len(seed)
    accepted = 0
    for at in range(end):
        for byte in b"\x00\t\n\r :,+-_019aZ\x7f\x80\xff":
            accepted += check_request(seed[:at] + bytes([byte]) + seed[at + 1 :])
            accepted += check_request(seed[:at] + bytes([byte]) + seed[at:])
        accepted += check_request(seed[:at] + seed[at + 1 :])
    assert accepted > 100  # in the values of headers that do not matter


@given(mutated() | generated())
@example(raw_head("content-length: 5", "transfer-encoding: chunked"))
@example(raw_head("content-length: 5", "content-length: 5"))
@example(raw_head("content-length: 5,5"))
@example(raw_head("content-length: 5\x0b"))
@example(raw_head("content-length: 5", "connection: keep-alive, close"))
@example(raw_head("content-length: 5", "x: a\rb"))
@example(raw_head("content-length: 5", "x: a\r\n\tb"))
@example(raw_head("content-length : 5"))
def test_what_the_core_accepts_h11_reads_the_same_way(data: bytes) -> None:
    if data and check_request(data):
        assert is_let_through(data)


@given(mutated() | st.sampled_from(SEEDS), st.sampled_from(SEEDS), st.integers(0, 400))
def test_what_is_like_a_known_head_the_core_reads_the_same_way(
    data: bytes, seed: bytes, cut: int
) -> None:
    """A known head is compared byte by byte but for its length, and never beyond what has come."""
    for candidate in (data, data[:cut], seed[: len(seed) - cut % 5] + data):
        found = match_post(candidate, seed)
        if found is not None:
            assert found == recognise_post(candidate)
            head_len, length = found
            digits = b"%d" % length
            at = candidate.lower().index(b"content-length:")
            assert candidate[:at] == seed[:at]
            assert digits in candidate[at:head_len]
    assert match_post(seed, seed) == recognise_post(seed)
    assert match_post(seed[:-1], seed) is None


def begun(head: bytes) -> h11.Connection:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    assert isinstance(connection.next_event(), h11.Request)
    return connection


CHUNKED = raw_head("transfer-encoding: chunked")
Outcome = tuple[str, bytes, bytes]


def as_h11_reads(data: bytes) -> Outcome:
    connection = begun(CHUNKED)
    if data:  # to h11 nothing is the end of the stream
        connection.receive_data(data)
    body = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.EndOfMessage):
                return "whole", body, connection.trailing_data[0]
            if not isinstance(event, h11.Data):
                return "more", body, b""
            body += event.data
    except h11.RemoteProtocolError:
        return "refused", b"", b""


def as_we_read(pieces: list[bytes]) -> Outcome:
    framing = RequestBody(begun(CHUNKED), {"transfer-encoding": "chunked"})
    body = b""
    try:
        for piece in pieces:
            body += framing.read(piece)
            while framing.is_busy:
                body += framing.read(b"")
    except h11.RemoteProtocolError:
        return "refused", b"", b""
    return ("whole", body, framing.rest) if framing.is_whole else ("more", body, b"")


LINES = [
    b"1\r\na\r\n", b"03\r\nabc\r\n", b"A\r\n0123456789\r\n", b"2\r\n\r\n\r\n", b"1\r\nab",
    b"1\na\n", b"0\r\n\r\n", b"000\r\n\r\n", b"0;x\r\n\r\n", b"0\r\nt: u\r\n\r\n",
    b"1;x=y\r\na\r\n", b"1 \r\na\r\n", b"000000001\r\na\r\n", b"100000001\r\na",
    b"0x1\r\na\r\n", b"-1\r\na\r\n", b"\r\n", b"\r", b"\n", b"0", b"g",
]  # fmt: skip


@given(
    lines=st.lists(st.sampled_from(LINES) | st.binary(max_size=3), max_size=8),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
@example(lines=[b"1\r\na\r\n", b"0\r\nt: u\r\n\r\n"], cuts=[7, 8, 9])
@example(lines=[b"1\r\na\r\n", b"1;x=y\r\na\r\n"], cuts=[7])
def test_chunks_in_pieces_are_read_as_h11_reads_the_whole(
    lines: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(lines)
    borders = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    pieces = [data[a:b] for a, b in itertools.pairwise(borders)]
    assert as_we_read(pieces) == as_h11_reads(data)
    assert as_we_read([data[at : at + 1] for at in range(len(data))]) == as_h11_reads(data)
