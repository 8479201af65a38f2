"""What a pipeline counts: its books, and the follower it feeds."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FollowerStats", "PipelineStats"]


class PipelineStats(NamedTuple):
    """The books of one pipeline at one instant.

    ``offered == accepted + refused`` and ``accepted == sent + failed + dropped + queued +
    in_flight`` hold in every value.
    """

    #: Messages given to ``send``.
    offered: int
    #: Messages taken; each ends as sent, failed or dropped.
    accepted: int
    #: Messages turned away at ``send``: msgc full, or stopped.
    refused: int
    #: Answered 204.
    sent: int
    #: Not answered 204; Raft was told.
    failed: int
    #: Still queued when the pipeline was stopped.
    dropped: int
    #: Waiting in msgc.
    queued: int
    #: With a worker.
    in_flight: int
    #: Protobuf bytes of what was sent (etcd ``peer_sent_bytes_total``).
    sent_bytes: int
    #: Protobuf bytes waiting in msgc.
    queued_bytes: int


class FollowerStats(NamedTuple):
    """MsgApp deliveries to one follower (etcd ``v2stats.FollowerStats``); times in milliseconds.

    Latency runs from a worker taking the message to its answer.
    """

    success: int
    fail: int
    latency_current_ms: float
    latency_average_ms: float
    latency_stddev_ms: float
    latency_minimum_ms: float
    latency_maximum_ms: float
