"""What a pipeline counts: its books, and the follower it feeds; and etcd's v2 statistics."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from pipeline.locks import lock_of

__all__ = [
    "SNAPSHOT_BOUNDS_S",
    "FollowerStats",
    "Histogram",
    "InboxStats",
    "PipelineStats",
    "ReceiverStats",
    "ServerStats",
    "StreamStats",
    "TransportStats",
    "leader_stats",
]

#: A rate is that of the last so many MsgApp; etcd ``queueCapacity``.
RATE_SAMPLES = 200
#: Without a MsgApp for this long a rate is zero.
RATE_STALE_S = 1.0


class PipelineStats(NamedTuple):
    """The books of one pipeline, or of one stream, at one instant.

    ``offered == accepted + refused`` and ``accepted == sent + failed + dropped + queued +
    in_flight`` hold in every value.
    """

    #: Messages given to ``send``.
    offered: int
    #: Messages taken; each ends as sent, failed or dropped.
    accepted: int
    #: Messages turned away at ``send``: no room in the queue, or stopped.
    refused: int
    #: Answered 204; of a stream: written whole.
    sent: int
    #: Not answered 204, or too old to be sent (``max_queue_age``), or lost with its stream; Raft
    #: was told.
    failed: int
    #: Still queued when the pipeline was stopped.
    dropped: int
    #: Waiting for a worker, or for their stream.
    queued: int
    #: With a worker, or being failed for its age.
    in_flight: int
    #: Protobuf bytes of what was sent (etcd ``peer_sent_bytes_total``).
    sent_bytes: int
    #: Protobuf bytes of those that wait.
    queued_bytes: int

    def merged(self, other: PipelineStats) -> PipelineStats:
        """Return the books of two channels as those of one."""
        return PipelineStats(*map(sum, zip(self, other, strict=True)))


class StreamStats(NamedTuple):
    """One end of a stream of a peer."""

    #: "msgapp" or "message".
    kind: str
    #: "out": we send on it, and the peer has dialled; "in": we have dialled, and receive.
    direction: str
    #: When it came up, seconds since the epoch; None while it is down.
    since: float | None
    #: Messages that have gone, or come, over it ever.
    messages: int
    #: Their bytes; of those that have come with what is around them in their frames.
    bytes: int
    #: The books of what was offered to it; None of one that we receive on.
    books: PipelineStats | None
    #: Messages that have come and were of types that are not for Raft; not among ``messages``.
    ignored: int = 0
    #: Of the messages that have come, those that went nowhere: all while the peer is paused, and
    #: MsgProp for which a node without an inbox had no room.
    dropped: int = 0


class InboxStats(NamedTuple):
    """The books of an inbox at one instant.

    ``received == taken + queued + dropped`` holds in every value.
    """

    #: Messages put in.
    received: int
    #: Messages that ``take`` has returned.
    taken: int
    #: Messages that were there when the transport they had come through was stopped, and those
    #: whose sender had not been answered when their listener was closed.
    dropped: int
    #: Messages there now.
    queued: int
    #: Bytes they hold.
    queued_bytes: int
    #: Requests that are not answered yet: there is no room for their message, or it is a MsgProp
    #: or MsgSnap, which is answered when it is taken.
    waiting: int


class ReceiverStats(NamedTuple):
    """What a listener has seen and what it has had to limit; counts since its start."""

    #: Connections taken.
    accepted: int
    #: Connections open now.
    connections: int
    #: Requests recognised by the core.
    fast_requests: int
    #: Requests read by h11.
    general_requests: int
    #: Idle connections closed because ``max_connections`` were open, or no descriptor was left.
    closed_for_room: int
    #: Connections closed because a head, or the first byte, did not come in ``head_timeout_s``.
    head_timeouts: int
    #: Connections closed because a body stalled for ``stall_timeout_s`` or dripped.
    body_timeouts: int
    #: Connections closed after ``idle_timeout_s``.
    idle_timeouts: int
    #: Times accepting was paused: nothing idle to close, or no descriptor.
    accept_pauses: int
    #: Times a body had to wait for a handler or for memory.
    body_pauses: int
    #: TLS handshakes that came to an end with a caller that may speak.
    handshakes: int
    #: TLS handshakes that failed: no TLS, no certificate, one that is not taken, a broken-off one.
    handshake_failures: int
    #: Connections closed because a TLS handshake did not end in ``handshake_timeout_s``.
    handshake_timeouts: int


class TransportStats(NamedTuple):
    """What there is to tell of a transport as a whole; counts since it was made."""

    #: Calls of the application that raised, or returned a coroutine that nothing awaits: of Raft's
    #: methods, of the callbacks given to a transport and to a transfer. The log has each.
    callback_errors: int
    #: Those of them that were calls of ``process``: its messages were answered 500.
    process_failures: int
    #: Requests whose body could not be read, was refused or could not be decoded.
    received_failures: int
    #: Messages of process-local types, answered 204 and not delivered.
    ignored: int
    #: Messages of types that only a later raft knows, answered 204 and not delivered.
    unknown: int
    #: Messages delivered without some of their fields: raftpb does not have them, and
    #: ``ReceiverConfig.encoded`` is not set.
    unknown_fields: int
    #: Bytes queued for all peers and remotes, of at most ``TransportConfig.queue_bytes``.
    queued_bytes: int
    #: Lines of the log, of all of this process, that were lost because logging raised.
    lost_log_lines: int


#: etcd rafthttp/metrics.go and api/snap/metrics.go: snapshots take 0.1 s to 51.2 s.
SNAPSHOT_BOUNDS_S = tuple(0.1 * 2**i for i in range(10))


class Histogram:
    """Durations by size, as Prometheus counts them. Not thread-safe.

    Parameters
    ----------
    bounds : tuple of float
        Upper bounds, ascending; what is above the last one is counted all the same.

    Attributes
    ----------
    counts : list of int
        How many values are at most as large as each bound and larger than the one before it; the
        last number is that of the values above all bounds.
    sum : float
        All values together.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return what is counted now."""
        return self + Histogram(self.bounds)

    def __add__(self, other: Histogram) -> Histogram:
        """Return both together; their bounds are the same."""
        both = Histogram(self.bounds)
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        both.sum = self.sum + other.sum
        return both


class FollowerStats(NamedTuple):
    """MsgApp deliveries to one follower (etcd ``v2stats.FollowerStats``); times in milliseconds.

    Latency runs from a worker taking the message to its answer.
    """

    #: MsgApp that were delivered.
    success: int
    #: MsgApp that were not.
    fail: int
    #: Of the last one that was delivered.
    latency_current_ms: float
    #: Of all that were.
    latency_average_ms: float
    #: Standard deviation.
    latency_stddev_ms: float
    #: The shortest; 0 before the first.
    latency_minimum_ms: float
    #: The longest.
    latency_maximum_ms: float

    def merged(self, other: FollowerStats) -> FollowerStats:
        """Return both together; of the two current latencies the other one's, if it has any."""
        if not other.success or not self.success:
            counted = other if other.success else self
            return counted._replace(
                success=self.success + other.success, fail=self.fail + other.fail
            )
        success = self.success + other.success
        share = other.success / success
        distance = other.latency_average_ms - self.latency_average_ms
        variance = (
            (1 - share) * self.latency_stddev_ms**2
            + share * other.latency_stddev_ms**2
            + share * (1 - share) * distance**2
        )
        return FollowerStats(
            success,
            self.fail + other.fail,
            other.latency_current_ms,
            self.latency_average_ms + share * distance,
            variance**0.5,
            min(self.latency_minimum_ms, other.latency_minimum_ms),
            max(self.latency_maximum_ms, other.latency_maximum_ms),
        )


def leader_stats(leader: str, followers: Mapping[str, FollowerStats]) -> dict[str, object]:
    """Put follower statistics into the shape of etcd's ``/v2/stats/leader``; IDs in hex."""
    return {
        "leader": leader,
        "followers": {
            follower: {
                "latency": {
                    "current": stats.latency_current_ms,
                    "average": stats.latency_average_ms,
                    "standardDeviation": stats.latency_stddev_ms,
                    "minimum": stats.latency_minimum_ms,
                    "maximum": stats.latency_maximum_ms,
                },
                "counts": {"fail": stats.fail, "success": stats.success},
            }
            for follower, stats in followers.items()
        },
    }


class SentAppends(Protocol):
    """How many MsgApp were sent, and when the last ones were (``stream._streams.Appends``)."""

    #: Whether it is known that we lead.
    is_leading: bool

    def read(self) -> tuple[int, list[float]]:
        """Return how many there were, and when the last ones were, in monotonic seconds."""


class ServerStats:
    """MsgApp sent and received by a node, and what they say about who leads.

    Parameters
    ----------
    member_id : int
        Ours.
    sent : SentAppends
        Counts the MsgApp that are sent; ``sent`` as an attribute as well.

    Notes
    -----
    Thread-safe. Source: etcd ``v2stats.ServerStats``, which concludes state and leader from
    nothing but MsgApp, too: who sends one leads.
    """

    def __init__(self, member_id: int, sent: SentAppends) -> None:
        self._id = member_id
        self.sent = sent
        self._start_time = datetime.now(UTC)
        self._lock = lock_of(self)  # guards what follows
        self._leader: int | None = None
        self._leader_since = self._start_time
        self._received = 0
        # Monotonic seconds, and bytes.
        self._received_last: deque[tuple[float, int]] = deque(maxlen=RATE_SAMPLES)

    def lead(self) -> None:
        """Hear that we have sent a MsgApp, although it was not known that we lead."""
        with self._lock:
            self._lead(self._id)
            self.sent.is_leading = True

    def received_append(self, leader: int, size_bytes: int, messages: int = 1) -> None:
        """Count a MsgApp that ``leader`` sent us, or several, of so many bytes together."""
        now_s = time.monotonic()
        with self._lock:
            if self._leader != leader:
                self._lead(leader)
                self.sent.is_leading = leader == self._id
            self._received += messages
            for _ in range(min(messages, RATE_SAMPLES)):
                self._received_last.append((now_s, size_bytes // messages))

    def to_dict(self) -> dict[str, object]:
        """Return the shape of etcd's ``/v2/stats/self``."""
        now, now_s = datetime.now(UTC), time.monotonic()
        sent, sent_last = self.sent.read()
        with self._lock:
            stats: dict[str, object] = {
                "id": f"{self._id:x}",
                "state": "StateLeader" if self._leader == self._id else "StateFollower",
                "startTime": _format_time(self._start_time),
                "recvAppendRequestCnt": self._received,
                "sendAppendRequestCnt": sent,
            }
            if self._leader is not None:
                stats["leaderInfo"] = {
                    "leader": f"{self._leader:x}",
                    "uptime": _format_duration((now - self._leader_since).total_seconds()),
                    "startTime": _format_time(self._leader_since),
                }
            received = tuple(self._received_last)
        received_rate, received_bytes_rate = _rates(received, now_s)
        sent_rate, _ = _rates([(at_s, 0) for at_s in sent_last], now_s)
        # As etcd: a rate of zero is left out.
        if received_rate:
            stats["recvPkgRate"] = received_rate
            stats["recvBandwidthRate"] = received_bytes_rate
        if sent_rate:
            stats["sendPkgRate"] = sent_rate
        return stats

    def _lead(self, leader: int) -> None:
        self._leader = leader
        self._leader_since = datetime.now(UTC)


def _rates(samples: Sequence[tuple[float, int]], now_s: float) -> tuple[float, float]:
    """Messages and bytes per second over the last messages; source: etcd ``statsQueue.Rate``."""
    first, next_s = len(samples), now_s
    while first > 0 and next_s - samples[first - 1][0] <= RATE_STALE_S:
        first -= 1
        next_s = samples[first][0]
    samples = samples[first:]  # those since the last that was followed by none for so long
    if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
        return 0.0, 0.0
    duration_s = samples[-1][0] - samples[0][0]
    return len(samples) / duration_s, sum(size for _, size in samples) / duration_s


def _format_time(time: datetime) -> str:
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _format_duration(duration_s: float) -> str:
    """Write a duration as Go's ``time.ParseDuration`` reads it: ``1h2m3.5s``."""
    minutes, seconds = divmod(max(0.0, duration_s), 60.0)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
