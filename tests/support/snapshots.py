"""Snapshots as a peer posts them, by hand."""

from __future__ import annotations

import functools

from pipeline import Message, MessageType, Snapshot, SnapshotMetadata
from tests.support.listening import post

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


#: Returns a whole request.
post_snapshot = functools.partial(post, line=LINE)
