"""Kinds and outcomes, as numbers: of messages, entries, offers and snapshots."""

from __future__ import annotations

import enum

__all__ = ["ACCEPTED", "APP", "EntryType", "MessageType", "SendResult", "SnapshotStatus"]


class MessageType(enum.IntEnum):
    """raftpb ``MessageType``, etcd 3.4 to 3.7; numbers are the wire's."""

    HUP = 0
    BEAT = 1
    PROP = 2
    APP = 3
    APP_RESP = 4
    VOTE = 5
    VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    UNREACHABLE = 10
    SNAP_STATUS = 11
    CHECK_QUORUM = 12
    TRANSFER_LEADER = 13
    TIMEOUT_NOW = 14
    READ_INDEX = 15
    READ_INDEX_RESP = 16
    PRE_VOTE = 17
    PRE_VOTE_RESP = 18
    STORAGE_APPEND = 19
    STORAGE_APPEND_RESP = 20
    STORAGE_APPLY = 21
    STORAGE_APPLY_RESP = 22
    FORGET_LEADER = 23


#: Compared with the type of every message; the member of the enumeration would take longer.
APP = int(MessageType.APP)


class EntryType(enum.IntEnum):
    """raftpb ``EntryType``."""

    NORMAL = 0
    CONF_CHANGE = 1
    CONF_CHANGE_V2 = 2


class SendResult(enum.IntEnum):
    """What became of an offered message at the door. Refusals are counted and reported."""

    ACCEPTED = 0
    QUEUE_FULL = 1
    STOPPED = 2


#: What became of every offer is compared with it; to look the member up takes longer.
ACCEPTED = SendResult.ACCEPTED


class SnapshotStatus(enum.IntEnum):
    """How a MsgSnap ended (raft ``SnapshotStatus``)."""

    FINISH = 1
    FAILURE = 2
