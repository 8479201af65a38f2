"""A listener on loopback, and what a raw peer of it sends and reads."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config import ReceiverConfig
from pipeline.raft import Raft
from pipeline.receive.listener import Listener
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.http import HEARTBEAT, Reply, handlers_of, peer_headers, reply_of_socket
from tests.support.waiting import eventually

ANY = "http://127.0.0.1:0"

# A limit that must not strike: long enough to send one request in, however busy the machine is.
A_SECOND = 1.0


def listen(
    raft: Raft,
    url: str = ANY,
    config: ReceiverConfig | None = None,
    credentials: Credentials | None = None,
) -> Listener:
    """Listen, with handlers of its own."""
    handlers = handlers_of(raft, config)
    return Listener(handlers, url, handlers.config, credentials)


def catch_up(listener: Listener) -> None:
    """Wait until the loop has seen what was sent before."""
    assert reply_of_socket(listener.url, "GET", "/raft/probing", {}, b"").status == 200


def listener_threads(*, expected: int = 0) -> list[str]:
    """Of any listener, once no more than expected are left: handlers, odd and native threads.

    A thread that has ended may be seen for a moment, one told to end needs a moment to.
    """
    names: list[str] = []

    def are_few() -> bool:
        names[:] = [t.name for t in threading.enumerate() if t.name.startswith("pipeline-")]
        names.extend(["pipeline-serve"] * has_native_thread())
        return len(names) <= expected

    eventually(are_few, lambda: f"{expected} threads are left of {names}")
    return names


def has_native_thread() -> bool:
    """Tell whether a loop's own thread lives, which Python does not know of."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            if (task / "comm").read_text().strip() == "pipeline-serve":
                return True
    return False


# What a peer sends


def dial(url: str, *, source: str = "") -> socket.socket:
    """Connect to a listener, from the address ``source`` if there is one."""
    parts = urlsplit(url)
    sock = socket.create_connection(
        (parts.hostname, parts.port), LONG_TIMEOUT, (source, 0) if source else None
    )
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def raw_head(
    *extra: str, line: str = "POST /raft HTTP/1.1", headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a request head as bytes, ``extra`` lines before the empty one."""
    lines = [line, "host: test"]
    lines += [f"{name}: {value}" for name, value in (headers or peer_headers()).items()]
    return "\r\n".join([*lines, *extra, "", ""]).encode("latin-1")


def post(
    body: bytes, *extra: str, line: str = "POST /raft HTTP/1.1", is_chunked: bool = False
) -> bytes:
    """Return a whole request; chunks are of 1,000 bytes."""
    if is_chunked:
        pieces = (body[at : at + 1000] for at in range(0, len(body), 1000))
        return raw_head("transfer-encoding: chunked", *extra, line=line) + chunked(pieces)
    return raw_head(f"content-length: {len(body)}", *extra, line=line) + body


def chunked(parts: Iterable[bytes]) -> bytes:
    """Return a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"


#: A request that is answered 204.
GOOD = post(HEARTBEAT.marshal())


# What it reads


def read_status(sock: socket.socket) -> int | None:
    """Read the status of an answer; None if the connection ends without one."""
    received = b""
    while b"\r\n" not in received:
        chunk = sock.recv(4096)
        if not chunk:
            return None
        received += chunk
    return int(received.split()[1])


def read_reply(sock: socket.socket) -> Reply:
    """Read one answer."""
    response = http.client.HTTPResponse(sock, method="POST")
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, response.read(), headers.get("connection") == "close")


def read_answers(sock: socket.socket, count: int) -> list[bytes]:
    """Read so many answers; each without its Date."""
    answers = []
    with sock.makefile("rb") as received:
        for _ in range(count):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = received.readline()
                assert line, f"the connection ended after {answers}"
                head += b"" if line.lower().startswith(b"date:") else line
            length = re.search(rb"content-length: ([0-9]+)", head.lower())
            answers.append(head + received.read(int(length[1]) if length else 0))
    return answers


def ask(url: str, request: bytes) -> Reply:
    """Send a request over a connection of its own, and read the answer."""
    with dial(url) as sock:
        sock.sendall(request)
        return read_reply(sock)


def is_closed(sock: socket.socket) -> bool:
    """Wait for the end of the connection, whatever is received before it."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True
