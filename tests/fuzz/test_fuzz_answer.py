"""Invariant: what the recogniser accepts, http.client reads as a 204 that ends at the same byte,
has no body and keeps the connection, unless it says that it does not (design R1)."""

from __future__ import annotations

from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.fuzz.oracles import check_answer

ANSWERS = [
    b"HTTP/1.1 204 No Content\r\nX-Etcd-Cluster-Id: cdf818194e3a8c32\r\n"
    b"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n",
    b"HTTP/1.1 204 \r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
]

#: What changes a framing, and what confuses parsers.
PIECES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\n\n",
    b"\r\n ",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b"\x0b",
    b"\x0c",
    b"\x1c",
    b"\x85",
    b"\xa0",
    b"Content-Length: 0\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: +0\r\n",
    b"Content-Length:0\r\n",
    b"content-length : 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: keep-alive, close\r\n",
    b"Connection:\r\n",
    b"From me\r\n",
    b"From : me\r\n",
    b"X-A: \r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 204 No Content\r\n",
    b"1",
    b"204",
    b"5\r\nhello\r\n0\r\n\r\n",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid answer with some bytes taken out, put in or repeated."""
    data = bytearray(draw(st.sampled_from(ANSWERS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 3))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)))
        data[at : at + cut] = piece
    return bytes(data)


#: A head of well-formed lines at line borders: most of these are accepted.
LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"Content-Length: 0",
                b"Connection: keep-alive",
                b"connection:\tClose ",
                b"Date: x",
                b"From: me",
                b"A:b",
            ]
        ),
        st.tuples(
            st.text("!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=12),
            st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
        ).map(lambda field: f"{field[0]}:{field[1]}".encode()),
    ),
    max_size=8,
).map(lambda lines: b"HTTP/1.1 204 No Content\r\n" + b"".join(x + b"\r\n" for x in lines) + b"\r\n")


def check(data: bytes) -> None:
    end = check_answer(data)
    event("accepted" if end > 0 else "more" if end == 0 else "odd")


@given(mutated())
@example(ANSWERS[0])
@example(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n")
def test_mutated_answers(data: bytes) -> None:
    check(data)


@given(LINES)
def test_answers_of_well_formed_lines(data: bytes) -> None:
    check(data)


@given(st.binary(max_size=64), st.integers(0, 120))
def test_anything_behind_the_beginning_of_an_answer(data: bytes, kept: int) -> None:
    check(ANSWERS[0][:kept] + data)
