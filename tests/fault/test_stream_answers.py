"""Whatever a dial of a stream is answered, the reader dials again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.stream.reader import RETRY_S
from tests.support.streams import KINDS, LAST_CHUNK, VERSION, Lab, chunk, head, of_kind

OK = f"HTTP/1.1 200 OK\r\n{VERSION}\r\n".encode()

ANSWERS = {
    "nothing": b"",
    "half a line": b"HTTP/1.1 2",
    "no HTTP": b"220 mail.example.org ESMTP\r\n\r\n",
    "a status that is no number": b"HTTP/1.1 OK OK\r\n\r\n",
    "bytes": bytes(range(256)),
    "a head that does not end": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 4096,
    "a stream whose lines end otherwise": OK.replace(b"\r", b"") + b"\n",
    "a stream of 5 bytes": OK + b"Content-Length: 5\r\n\r\nhello",
    "a stream whose head is followed by its end": head(),
    "a stream of nothing": head() + LAST_CHUNK,
    "a stream of no chunk": head() + b"zz\r\n",
    "a stream of no frame": head() + chunk(b"\xff" * 40),
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n" + head(),
    "no version": head("200 OK", "X-Etcd-Cluster-Id: 1") + chunk(b"\0"),
    "a version that is none": head("200 OK", "X-Server-Version: \xff.x"),
    "a version without end": head("200 OK", f"X-Server-Version: {'9' * 5000}.1.0"),
    "a version that is empty": head("200 OK", "X-Server-Version:"),
    "no text": head("204 No Content", VERSION, is_chunked=False),
    "a refusal in chunks": head("404 Not Found", VERSION) + chunk(b"x" * 100) + LAST_CHUNK,
    "a refusal without an end": head("500 Internal Server Error", VERSION, is_chunked=False),
    "a refusal of a negative length": head(
        "404 Not Found", VERSION, "Content-Length: -1", is_chunked=False
    ),
    "half a reason": head(
        "412 Precondition Failed", VERSION, "Content-Length: 20", is_chunked=False
    )
    + b"cluster ID",
    "a redirection": head("301 Moved", VERSION, "Location: http://127.0.0.1:1/", is_chunked=False),
    "another protocol": head("101 Switching Protocols", "Upgrade: h2c", is_chunked=False),
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.close()


@pytest.mark.streams
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_answered_the_reader_dials_again(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither a refusal nor a stream that ends at once makes it wait.
    monkeypatch.setattr("pipeline.stream.reader.REFUSED_RETRY_S", RETRY_S)
    lab.start()
    for what, answer in ANSWERS.items():
        dialled = lab.peer.next_dial(kind)
        dialled.write(answer)
        dialled.sock.shutdown(1)
        assert dialled.is_ended(), what
        dialled = lab.peer.next_dial(kind).accept()
        before = len(lab.raft.processed)
        dialled.send(of_kind(kind, 1))
        lab.raft.wait_processed(before + 1)
        dialled.end()
        assert dialled.is_ended()
    assert not lab.critical
