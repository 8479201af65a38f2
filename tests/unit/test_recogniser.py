"""The recogniser of the one answer that needs no Python (``_http.pxd``)."""

from __future__ import annotations

import pytest

from pipeline._core import recognise_204, says_close

MORE, ODD = 0, -1

ETCD = (
    b"HTTP/1.1 204 No Content\r\n"
    b"X-Etcd-Cluster-Id: cdf818194e3a8c32\r\n"
    b"Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n"
)

ACCEPTED = {
    "etcd": ETCD,
    "bare": b"HTTP/1.1 204 \r\n\r\n",
    "reason": b"HTTP/1.1 204 Anything goes: here!\r\n\r\n",
    "length 0": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "length 0, spelt oddly": b"HTTP/1.1 204 No Content\r\ncOnTeNt-LeNgTh: \t 0 \t\r\n\r\n",
    "keep-alive": b"HTTP/1.1 204 No Content\r\nConnection: Keep-Alive\r\n\r\n",
    "close": b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    "close, spelt oddly": b"HTTP/1.1 204 A\r\nA: b\r\ncOnNeCtIoN:\t CLOSE \r\n\r\n",
    "close, and not": b"HTTP/1.1 204 A\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n",
    "empty value": b"HTTP/1.1 204 No Content\r\nX-A:\r\n\r\n",
    "tab in a value": b"HTTP/1.1 204 No Content\r\nX-A: a\tb\r\n\r\n",
    "colon in a value": b"HTTP/1.1 204 No Content\r\nX-A: a:b\r\n\r\n",
    "every token character": b"HTTP/1.1 204 No Content\r\n!#$%&'*+-.^_`|~09AZaz: b\r\n\r\n",
    "64 headers": b"HTTP/1.1 204 No Content\r\n" + b"A: b\r\n" * 64 + b"\r\n",
}

REFUSED = {
    "200": b"HTTP/1.1 200 OK\r\n\r\n",
    "2040": b"HTTP/1.1 2040 No Content\r\n\r\n",
    "no space": b"HTTP/1.1 204\r\n\r\n",
    "http/1.0": b"HTTP/1.0 204 No Content\r\n\r\n",
    "http/2": b"HTTP/2 204 No Content\r\n\r\n",
    "lower case": b"http/1.1 204 No Content\r\n\r\n",
    "leading blank line": b"\r\nHTTP/1.1 204 No Content\r\n\r\n",
    "leading space": b" HTTP/1.1 204 No Content\r\n\r\n",
    "bare LF": b"HTTP/1.1 204 No Content\n\n",
    "bare LF after a header": b"HTTP/1.1 204 No Content\r\nA: b\n\r\n",
    "bare CR": b"HTTP/1.1 204 No\rContent\r\n\r\n",
    "bare CR in a value": b"HTTP/1.1 204 No Content\r\nA: b\rc\r\n\r\n",
    "CR CR LF": b"HTTP/1.1 204 No Content\r\r\n\r\n",
    "NUL in the reason": b"HTTP/1.1 204 No\0Content\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 204 No Content\r\nA: b\0\r\n\r\n",
    "non-ASCII reason": b"HTTP/1.1 204 \xc3\xa4\r\n\r\n",
    "non-ASCII value": b"HTTP/1.1 204 No Content\r\nA: \xe4\r\n\r\n",
    "non-ASCII name": b"HTTP/1.1 204 No Content\r\n\xe4: b\r\n\r\n",
    "DEL": b"HTTP/1.1 204 No Content\r\nA: \x7f\r\n\r\n",
    "no colon": b"HTTP/1.1 204 No Content\r\nA\r\n\r\n",
    "no name": b"HTTP/1.1 204 No Content\r\n: b\r\n\r\n",
    "space before the colon": b"HTTP/1.1 204 No Content\r\nA : b\r\n\r\n",
    "folded": b"HTTP/1.1 204 No Content\r\nA: b\r\n c\r\n\r\n",
    "65 headers": b"HTTP/1.1 204 No Content\r\n" + b"A: b\r\n" * 65 + b"\r\n",
    "length 1": b"HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\n",
    "length 00": b"HTTP/1.1 204 No Content\r\nContent-Length: 00\r\n\r\n",
    "length empty": b"HTTP/1.1 204 No Content\r\nContent-Length:\r\n\r\n",
    "length 0, 0": b"HTTP/1.1 204 No Content\r\nContent-Length: 0, 0\r\n\r\n",
    "a second length": b"HTTP/1.1 204 A\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "chunked": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
    "identity": b"HTTP/1.1 204 No Content\r\ntransfer-ENCODING: identity\r\n\r\n",
    "close and more": b"HTTP/1.1 204 No Content\r\nConnection: closed\r\n\r\n",
    "close among others": b"HTTP/1.1 204 A\r\nConnection: keep-alive, close\r\n\r\n",
    "upgrade": b"HTTP/1.1 204 A\r\nConnection: upgrade\r\n\r\n",
    "100": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts(data: bytes) -> None:
    assert recognise_204(data) == len(data)


def test_tells_the_answers_that_are_the_last_on_their_connection() -> None:
    last = {name for name, data in ACCEPTED.items() if says_close(data)}
    assert last == {"close", "close, spelt oddly", "close, and not"}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_every_proper_prefix_needs_more(data: bytes) -> None:
    assert {recognise_204(data[:n]) for n in range(len(data))} == {MORE}


@pytest.mark.parametrize("rest", [b"x", b"\r\n", ETCD, b"\0" * 3000])
def test_tells_where_the_answer_ends(rest: bytes) -> None:
    assert recognise_204(ETCD + rest) == len(ETCD)


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_leaves_the_rest_to_http_client(data: bytes) -> None:
    assert recognise_204(data) == ODD


def test_looks_at_2048_bytes_only() -> None:
    def padded(n: int) -> bytes:
        head = b"HTTP/1.1 204 No Content\r\nA: "
        return head + b"x" * (n - len(head) - 4) + b"\r\n\r\n"

    assert recognise_204(padded(2048)) == 2048
    assert recognise_204(padded(2049)) == MORE


def test_takes_any_buffer() -> None:
    assert recognise_204(bytearray(ETCD)) == recognise_204(memoryview(ETCD)) == len(ETCD)
