"""Requests as a peer sends them, and ways to have them answered."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import ReceiverConfig
from pipeline.identity import Identity
from pipeline.raft import Raft
from pipeline.receive.handlers import Handlers
from pipeline.snapshot.receiver import SnapshotReceiver
from pipeline.types import MessageType
from pipeline.wire._messages import Message
from pipeline.wire.answers import Request
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


def handlers_of(raft: Raft, config: ReceiverConfig | None = None, **settings: Any) -> Handlers:
    """Return handlers and what takes snapshots, as Transport has them; settings are theirs."""
    config = config or ReceiverConfig()
    handlers = Handlers(raft, Identity(1, CLUSTER_ID, (), "3.5.1"), config=config, **settings)
    handlers.snapshots = SnapshotReceiver(raft, handlers, config)
    return handlers


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
            # An answer that does not end is not waited for.
            response.read1() if response.chunked and response.status == 404 else response.read(),
            response.getheader("connection") == "close",
        )
    finally:
        connection.close()


def post_heartbeat(url: str, *, from_: int = 1, index: int = 0) -> Reply:
    """Send a good message."""
    body = Message(type=MessageType.HEARTBEAT, from_=from_, to=2, term=1, index=index).marshal()
    return reply_of_socket(url, "POST", "/raft", peer_headers(), body)
