"""Receiving: a listener, its settings and counts, and the ASGI application."""

from pathlib import Path
from typing import assert_type

from pipeline import (
    EncodedMessage,
    Inbox,
    Listener,
    Message,
    Raft,
    ReceiverConfig,
    Transport,
    TransportConfig,
)
from pipeline.receive.asgi import ASGIApp


def serve(raft: Raft) -> ASGIApp:
    receiver = ReceiverConfig(handlers=8, max_body_bytes=8 << 20, snapshot_dir=Path("snap"))
    ReceiverConfig(snapshot_dir=b"snap")
    ReceiverConfig(snapshot_dir=5)  # type: ignore[arg-type]
    config = TransportConfig(receiver=receiver)
    transport = Transport(1, 0x77, raft, config=config)
    transport.start()
    with transport.listen(["http://127.0.0.1:0", "http://[::1]:0"]) as listener:
        assert_type(listener, Listener)
        assert_type(listener.url, str)
        assert_type(listener.urls, tuple[str, ...])
        assert_type(listener.stats().fast_requests, int)
        listener.close(deadline_s=0.5)
    assert_type(transport.snapshot_path(1), Path | None)
    transport.listen(2380)  # type: ignore[arg-type]
    return transport.asgi_app


ReceiverConfig(idle_timeout_s="60")  # type: ignore[arg-type]
assert_type(Inbox().take(timeout=None), list[Message])
assert_type(Inbox(encoded=True).take(max_messages=1), list[EncodedMessage])
assert_type(Inbox(max_messages=8, encoded=False).take(), list[Message])
Inbox(encoded=1)  # type: ignore[call-overload]
