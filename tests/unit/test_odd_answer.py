"""Answers read by http.client from the pieces they come in."""

from __future__ import annotations

import http.client
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wire import odd_answer
from pipeline.wire.odd_answer import ANSWER_MAX, OddAnswer, PeerAnswer

MISMATCH = b"cluster ID mismatch\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\nX-Etcd-Cluster-Id: 1\r\n\r\n"
PRECONDITION = b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 20\r\n\r\n" + MISMATCH
CHUNKED = (
    b"HTTP/1.1 412 Precondition Failed\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"8\r\ncluster \r\nc\r\nID mismatch\n\r\n0\r\n\r\n"
)
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"


def read(
    *pieces: bytes, telling: int = 412, is_ended: bool = False, is_written: bool = True
) -> PeerAnswer | None:
    """Feed pieces, the last one with the end of the stream if told so; the answer to the last."""
    odd = OddAnswer(telling)
    for piece in pieces[:-1]:
        assert odd.feed(piece, is_ended=False, is_written=is_written) is None
    return odd.feed(pieces[-1], is_ended=is_ended, is_written=is_written)


def bytes_of(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize(
    ("data", "status", "body"),
    [
        pytest.param(NO_CONTENT, 204, b"", id="204"),
        pytest.param(NO_CONTENT.replace(b"\r", b""), 204, b"", id="bare LF"),
        pytest.param(INTERIM * 3 + NO_CONTENT, 204, b"", id="102 before"),
        pytest.param(b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" * 2 + NO_CONTENT, 204, b"", id="100"),
        pytest.param(PRECONDITION, 412, MISMATCH, id="412"),
        pytest.param(INTERIM + PRECONDITION, 412, MISMATCH, id="102 and 412"),
        pytest.param(CHUNKED, 412, MISMATCH, id="412 in chunks"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", 101, b"", id="101"),
    ],
)
def test_an_answer_may_be_cut_anywhere(data: bytes, status: int, body: bytes) -> None:
    whole = read(data)
    assert whole is not None
    assert (whole.status, whole.body) == (status, body)
    for at in range(1, len(data)):
        assert read(data[:at], data[at:]) == whole, at
    assert read(*bytes_of(data)) == whole


@pytest.mark.parametrize("status", [200, 301, 403, 404, 500, 503])
@pytest.mark.parametrize(
    "framing",
    [
        pytest.param(b"Content-Length: 10", id="length"),
        pytest.param(b"Transfer-Encoding: chunked", id="chunked"),
        pytest.param(b"X: to the end of the stream", id="to the end"),
    ],
)
@pytest.mark.parametrize("came", [b"", b"4\r\nabc"])
def test_the_status_decides_without_the_body(status: int, framing: bytes, came: bytes) -> None:
    head = b"HTTP/1.1 %d Oops\r\n%b\r\n\r\n" % (status, framing)
    found = read(*bytes_of(head))
    assert found is not None
    assert (found.status, found.keep) == (status, False)
    # Nor does it matter how a body that came is broken off.
    cut = read(head + came, is_ended=True)
    assert cut is not None
    assert (cut.status, cut.keep) == (status, False)


def test_a_whole_body_that_came_with_its_head_leaves_the_connection_fit_for_another() -> None:
    data = b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops"
    found = read(data)
    assert found is not None
    assert (found.body, found.keep) == (b"oops", True)
    for unfit in (
        read(data + b"x"),
        read(data, is_ended=True),
        read(data, is_written=False),
        read(data.replace(b"Content", b"Connection: close\r\nContent")),
    ):
        assert unfit is not None
        assert not unfit.keep


@pytest.mark.parametrize(
    "head",
    [PRECONDITION[:-20], CHUNKED[: CHUNKED.find(b"8\r\n")], b"HTTP/1.1 412 Oops\r\n\r\n"],
    ids=["length", "chunked", "to the end"],
)
def test_the_text_of_a_412_is_waited_for_and_given_up_with_what_came(head: bytes) -> None:
    for came in (b"", b"8\r\ncluster "):
        odd = OddAnswer(412)
        assert odd.feed(head[:20], is_ended=False, is_written=True) is None
        assert not odd.is_text_due
        assert odd.feed(head[20:], is_ended=False, is_written=True) is None
        assert odd.is_text_due
        if came:
            assert odd.feed(came, is_ended=False, is_written=True) is None
        given_up = odd.feed(b"", is_ended=True, is_written=True)
        assert given_up is not None
        assert (given_up.status, given_up.keep) == (412, False)
        assert not odd.has_begun
        assert not odd.is_text_due


def test_what_is_told_of_an_answer_on_its_way() -> None:
    odd = OddAnswer(412)
    assert (odd.has_begun, odd.is_final) == (False, False)
    odd.feed(INTERIM + b"HTTP/1.1 1", is_ended=False, is_written=True)
    assert (odd.has_begun, odd.is_final) == (True, False)
    odd.feed(b"00 Continue\r\n\r\nHTTP/1.1 2", is_ended=False, is_written=True)
    assert (odd.has_begun, odd.is_final) == (True, True)


def test_after_an_answer_comes_the_next() -> None:
    odd = OddAnswer(412)
    for data in (PRECONDITION, NO_CONTENT, CHUNKED, INTERIM + PRECONDITION):
        for piece in bytes_of(data)[:-1]:
            assert odd.feed(piece, is_ended=False, is_written=True) is None
        assert odd.feed(data[-1:], is_ended=False, is_written=True) is not None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="another protocol"),
        pytest.param(b"\r\nHTTP/1.1 204 No Content\r\n\r\n", id="an empty line first"),
        pytest.param(b"HTTP/1.1 junk\r\n", id="no status"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_first_line(data: bytes) -> None:
    with pytest.raises(http.client.HTTPException):
        read(*bytes_of(data))


@pytest.mark.parametrize("size", [0, 5, 30, len(NO_CONTENT) - 1])
def test_a_connection_that_ends_within_the_head_is_an_error(size: int) -> None:
    with pytest.raises(http.client.HTTPException):
        read(NO_CONTENT[:size], is_ended=True)


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        pytest.param(b"", b"x" * 100, id="a line"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n", b"X: y\r\n" * 50, id="headers"),
        pytest.param(b"", INTERIM * 20, id="interim answers"),
        pytest.param(CHUNKED[:-5], b"1\r\nx\r\n" * 50, id="chunks"),
    ],
)
def test_an_answer_without_end_is_given_up(begin: bytes, endless: bytes) -> None:
    odd = OddAnswer(412)
    assert odd.feed(begin, is_ended=False, is_written=True) is None

    def feed_on() -> None:
        while odd.total <= 2 * ANSWER_MAX:
            assert odd.feed(endless, is_ended=False, is_written=True) is None

    with pytest.raises(http.client.HTTPException):
        feed_on()
    assert odd.total <= ANSWER_MAX + len(endless)


class Work:
    """Counts what http.client is asked, and of how many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.bytes = 0
        counter = self

        class Counting(odd_answer._Received):
            def __init__(self, data: bytes, *, is_ended: bool) -> None:
                counter.calls += 1
                counter.bytes += len(data)
                super().__init__(data, is_ended=is_ended)

            def append(self, data: bytes) -> None:
                counter.bytes += len(data)
                super().append(data)

        monkeypatch.setattr(odd_answer, "_Received", Counting)


LONG_HEAD = b"HTTP/1.1 412 Oops\r\n" + b"X-Y: z\r\n" * 50 + b"Content-Length: 20\r\n\r\n"
LINES_IN_CHUNKS = (
    b"HTTP/1.1 412 Oops\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2\r\n\n\n\r\n" * 200
)


@pytest.mark.parametrize(
    ("data", "heads"),
    [
        pytest.param(INTERIM * 400 + NO_CONTENT, 401, id="interim answers"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 400 + NO_CONTENT, 401, id="100 Continue"),
        pytest.param(LONG_HEAD + MISMATCH, 1, id="a long head"),
        pytest.param(b"HTTP/1.1 204 x" + b"x" * 20_000 + b"\r\n\r\n", 1, id="a long line"),
        pytest.param(
            b"HTTP/1.1 412 Oops\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000, 1, id="a text"
        ),
        pytest.param(LINES_IN_CHUNKS, 1, id="empty lines in chunks"),
    ],
)
def test_pieces_cost_in_proportion_to_their_bytes(
    monkeypatch: pytest.MonkeyPatch, data: bytes, heads: int
) -> None:
    work = Work(monkeypatch)
    if data is LINES_IN_CHUNKS:
        with pytest.raises(http.client.HTTPException, match="too many pieces"):
            read(*bytes_of(data))
    else:
        assert read(*bytes_of(data)) is not None
    # Once with its first line, once with its end; a text, or chunks that may have ended, again.
    assert work.calls <= 2 * heads + odd_answer.LOOKS_MAX + 1
    assert work.bytes <= 4 * len(data)


@given(
    data=st.sampled_from([NO_CONTENT, PRECONDITION, CHUNKED])
    | st.builds(lambda n: INTERIM * n + CHUNKED, st.integers(0, 3)),
    junk=st.binary(max_size=3),
    at=st.integers(0, 200),
    cuts=st.lists(st.integers(0, 250), max_size=6),
    is_ended=st.booleans(),
)
def test_pieces_are_read_as_the_whole_is(
    data: bytes, junk: bytes, at: int, cuts: list[int], *, is_ended: bool
) -> None:
    data = data[:at] + junk + data[at:]

    def outcome(pieces: list[bytes]) -> tuple[int, bytes] | str | None:
        odd = OddAnswer(412)
        answer = None
        try:
            for n, piece in enumerate(pieces):
                is_last = n == len(pieces) - 1
                answer = odd.feed(piece, is_ended=is_last and is_ended, is_written=True)
                if answer is not None:
                    # Of what is behind an answer the connection hears no more.
                    return answer.status, answer.body if answer.status == 412 else b""
        except http.client.HTTPException:
            return "refused"
        return None

    borders = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    pieces = [data[a:b] for a, b in itertools.pairwise(borders)]
    assert outcome(pieces or [data]) == outcome([data])


def test_http_client_reads_what_is_fed_at_once_in_the_same_way() -> None:
    class Source:
        def makefile(self, _mode: str) -> io.BytesIO:
            return io.BytesIO(CHUNKED)

    response = http.client.HTTPResponse(Source(), method="POST")  # type: ignore[arg-type]
    response.begin()
    expected = response.read()
    found = read(CHUNKED)
    assert found is not None
    assert (found.status, found.body) == (response.status, expected)
