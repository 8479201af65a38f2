"""Requests as a peer sends them, and ways to have them answered."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline._messages import Message
from pipeline.answers import Request
from pipeline.handlers import Handlers
from pipeline.types import MessageType
from tests.support import LONG_TIMEOUT

CLUSTER_ID = 0xCDF818194E3A8C32

HEARTBEAT = Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=1)


def peer_headers(**changes: str | None) -> dict[str, str]:
    """Return a peer's headers, changed: ``x_server_version="2.0.0"``, None to leave one out."""
    headers: dict[str, str | None] = {
        "content-type": "application/protobuf",
        "x-etcd-cluster-id": f"{CLUSTER_ID:x}",
        "x-min-cluster-version": "3.0.0",
        "x-peerurls": "http://10.0.0.1:2380",
        "x-server-from": "1",
        "x-server-version": "3.5.1",
    }
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    return {name: value for name, value in headers.items() if value is not None}


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    close: bool


def reply_of_handlers(
    handlers: Handlers, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> Reply:
    """Ask the pure functions as a listener does."""
    request = Request(
        method, path, {**headers, "content-length": str(len(body))}, "127.0.0.1:54321"
    )
    answer = handlers.check(request)
    if answer is None:
        answer = handlers.deliver(request, body)
    names = [name for name, _ in answer.headers]
    assert len(set(names)) == len(names)
    return Reply(
        answer.status,
        {name.lower(): value for name, value in answer.headers},
        answer.body,
        answer.close,
    )


def reply_of_socket(
    url: str, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> Reply:
    """Ask a listener, with an HTTP client that is not ours."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LONG_TIMEOUT)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return Reply(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
            response.getheader("connection") == "close",
        )
    finally:
        connection.close()


def post_heartbeat(url: str) -> Reply:
    """Send a good message."""
    return reply_of_socket(url, "POST", "/raft", peer_headers(), HEARTBEAT.marshal())


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


def read_status(sock: socket.socket) -> int | None:
    """Read the status of an answer; None if the connection ends without one."""
    received = b""
    while b"\r\n" not in received:
        chunk = sock.recv(4096)
        if not chunk:
            return None
        received += chunk
    return int(received.split()[1])
