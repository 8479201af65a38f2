"""Snapshots as a peer posts them, by hand."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable

from pipeline import Message, MessageType, Snapshot, SnapshotMetadata
from pipeline.config import ReceiverConfig
from pipeline.handlers import Handlers
from pipeline.listener import Listener
from pipeline.snapshot_receiver import SnapshotReceiver
from pipeline.types import Raft
from tests.support.http import CLUSTER_ID, Reply, dial, raw_head

LINE = "POST /raft/snapshot HTTP/1.1"
INDEX = 1000
FILE = "00000000000003e8.snap.db"


def snapshot(index: int = INDEX, from_: int = 1) -> Message:
    """Return a MsgSnap, as it comes with a database."""
    metadata = SnapshotMetadata(index=index, term=2)
    return Message(
        type=MessageType.SNAP, from_=from_, to=2, snapshot=Snapshot(data=b"", metadata=metadata)
    )


def framed(message: Message | bytes, database: bytes = b"") -> bytes:
    """Return a body: length, message, database."""
    data = message if isinstance(message, bytes) else message.marshal()
    return len(data).to_bytes(8, "big") + data + database


def chunked(parts: Iterable[bytes]) -> bytes:
    """Return a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"


def post(body: bytes, *extra: str, is_chunked: bool = False) -> bytes:
    """Return a whole request."""
    if is_chunked:
        pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
        return raw_head("transfer-encoding: chunked", *extra, line=LINE) + chunked(pieces)
    return raw_head(f"content-length: {len(body)}", *extra, line=LINE) + body


def read_reply(sock: socket.socket) -> Reply:
    """Read one answer."""
    response = http.client.HTTPResponse(sock, method="POST")
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, response.read(), headers.get("connection") == "close")


def ask(url: str, request: bytes) -> Reply:
    """Send bytes and read one answer."""
    with dial(url) as sock:
        sock.sendall(request)
        return read_reply(sock)


def listen(raft: Raft, config: ReceiverConfig) -> Listener:
    """Listen on loopback; the handlers are ``handlers_of`` it."""
    handlers = Handlers(raft, cluster_id=CLUSTER_ID, server_version="3.5.1", config=config)
    handlers.snapshots = SnapshotReceiver(raft, handlers, config)
    return Listener(handlers, "http://127.0.0.1:0", config)
