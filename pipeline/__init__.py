"""The network half of a Raft node: etcd's rafthttp for Python, around a Cython core.

A node gives a :class:`Transport` messages; it carries them to the right peer, reports what could
not be delivered, receives what peers send and hands it to the node's :class:`Raft`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

try:
    from pipeline.wire._messages import (
        ConfState,
        EncodedMessage,
        Entry,
        Message,
        Snapshot,
        SnapshotMetadata,
    )
except ImportError as error:
    from pipeline._unbuilt import reason

    raise ImportError(reason(error), name=error.name, path=error.path) from error

from pipeline._version import __version__
from pipeline.config import PipelineConfig, ReceiverConfig, TransportConfig
from pipeline.errors import (
    ClusterIDMismatchError,
    IncompatibleVersionError,
    InternalError,
    MarshalError,
    MemberNotFoundError,
    MemberRemovedError,
    PeerUnreachableError,
    PipelineError,
    PostError,
    RequestRejected,
    SnapshotCancelledError,
    SnapshotSourceError,
    UnexpectedStatusError,
    UnmarshalError,
    UsageError,
)
from pipeline.raft import Raft, RaftReports
from pipeline.stats import (
    FollowerStats,
    InboxStats,
    PipelineStats,
    ReceiverStats,
    StreamStats,
    TransportStats,
)
from pipeline.types import EntryType, MessageType, SendResult, SnapshotStatus

if TYPE_CHECKING:
    from pipeline.peer import PeerStats
    from pipeline.receive.inbox import Inbox
    from pipeline.receive.listener import Listener
    from pipeline.remote import RemotePolicy, RemoteStats
    from pipeline.send.changes import PeerChange, PeerState
    from pipeline.send.picker import URLPicker
    from pipeline.send.pipeline import Pipeline
    from pipeline.send.probing import ProbeStats
    from pipeline.send.status import LastError, PeerStatus
    from pipeline.snapshot.sender import SnapshotProgress, SnapshotTransfer
    from pipeline.snapshot.source import SnapshotSource
    from pipeline.tls import TLSInfo
    from pipeline.transport import Transport
    from pipeline.wire.protocol import format_id, parse_id

__all__ = [
    "ClusterIDMismatchError",
    "ConfState",
    "EncodedMessage",
    "Entry",
    "EntryType",
    "FollowerStats",
    "Inbox",
    "InboxStats",
    "IncompatibleVersionError",
    "InternalError",
    "LastError",
    "Listener",
    "MarshalError",
    "MemberNotFoundError",
    "MemberRemovedError",
    "Message",
    "MessageType",
    "PeerChange",
    "PeerState",
    "PeerStats",
    "PeerStatus",
    "PeerUnreachableError",
    "Pipeline",
    "PipelineConfig",
    "PipelineError",
    "PipelineStats",
    "PostError",
    "ProbeStats",
    "Raft",
    "RaftReports",
    "ReceiverConfig",
    "ReceiverStats",
    "RemotePolicy",
    "RemoteStats",
    "RequestRejected",
    "SendResult",
    "Snapshot",
    "SnapshotCancelledError",
    "SnapshotMetadata",
    "SnapshotProgress",
    "SnapshotSource",
    "SnapshotSourceError",
    "SnapshotStatus",
    "SnapshotTransfer",
    "StreamStats",
    "TLSInfo",
    "Transport",
    "TransportConfig",
    "TransportStats",
    "URLPicker",
    "UnexpectedStatusError",
    "UnmarshalError",
    "UsageError",
    "__version__",
    "format_id",
    "parse_id",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

# What a node is made of imports urllib3, which imports ssl, and h11, and that takes longer than all
# of Python's own start. A program that has only messages to encode, or is asked for its version,
# does without.
_MODULES = {
    "Inbox": "receive.inbox",
    "LastError": "send.status",
    "Listener": "receive.listener",
    "PeerChange": "send.changes",
    "PeerState": "send.changes",
    "PeerStats": "peer",
    "PeerStatus": "send.status",
    "Pipeline": "send.pipeline",
    "ProbeStats": "send.probing",
    "RemotePolicy": "remote",
    "RemoteStats": "remote",
    "SnapshotProgress": "snapshot.sender",
    "SnapshotSource": "snapshot.source",
    "SnapshotTransfer": "snapshot.sender",
    "TLSInfo": "tls",
    "Transport": "transport",
    "URLPicker": "send.picker",
    "format_id": "wire.protocol",
    "parse_id": "wire.protocol",
}


def __getattr__(name: str) -> object:
    """Import what a name stands for when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pipeline.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
