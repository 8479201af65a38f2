"""A prometheus_client collector: etcd's series under etcd's names, and our own.

Names, types and labels are those of etcd's rafthttp/metrics.go (spec section 5.5); docs/metrics.md
has the table. Nothing is counted here: at each scrape the counters of the peers, the handlers and
the listeners are read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from pipeline.arguments import require_bool, require_iterable
from pipeline.errors import UsageError
from pipeline.forks import is_foreign
from pipeline.logs import lost_lines, show
from pipeline.wire.protocol import format_id

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
        UnknownMetricFamily,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "metrics need prometheus-client: pip install 'raft-pipeline[metrics]'"
    ) from error

if TYPE_CHECKING:
    from pipeline.node_snapshot import NodeSnapshot, PeerSnapshot
    from pipeline.receive.handlers import Handlers
    from pipeline.receive.received import ReceivedCounts
    from pipeline.stats import Histogram, InboxStats, ReceiverStats

__all__ = ["MetricsCollector"]

DAY_S = 86400.0

_LISTENER = ("Local", "Listener")
_PEER = ("Local", "To")
_STREAM = (*_PEER, "Kind", "Direction")
_CHANNEL = (*_PEER, "Channel")
#: Verdicts are those of ``reasons``, and a dozen of the handlers': so many series at most.
_VERDICT = (*_PEER, "Verdict")

# Name: type, labels, help. To a counter's name prometheus_client adds _total where it is missing;
# etcd's counters that do not end so are "unknown", which is exposed as untyped.
_FAMILIES: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "etcd_network_active_peers": ("gauge", ("Local", "Remote"), "Whether a peer is active."),
    "etcd_network_disconnected_peers_total": (
        "counter",
        ("Local", "Remote"),
        "How often a peer became inactive.",
    ),
    "etcd_network_peer_sent_bytes_total": ("counter", ("To",), "Bytes of messages sent to a peer."),
    "etcd_network_peer_received_bytes_total": (
        "counter",
        ("From",),
        "Bytes of messages received from a member; From is empty for senders past the first 128.",
    ),
    "etcd_network_peer_sent_failures_total": (
        "counter",
        ("To",),
        "Messages to a peer that were not delivered, or refused because its queue was full.",
    ),
    "etcd_network_peer_round_trip_time_seconds": (
        "histogram",
        ("To",),
        "Round trips of probes, in seconds, without connecting.",
    ),
    "etcd_network_peer_received_failures_total": (
        "counter",
        ("From",),
        "Messages that could not be read or decoded; From is empty unless addresses are asked for.",
    ),
    "etcd_network_snapshot_send_success": ("unknown", ("To",), "Snapshots answered 204."),
    "etcd_network_snapshot_send_failures": (
        "unknown",
        ("To",),
        "Snapshots that were not delivered; those that a newer one replaced are not among them.",
    ),
    "etcd_network_snapshot_send_inflights_total": ("gauge", ("To",), "Snapshots being sent."),
    "etcd_network_snapshot_send_total_duration_seconds": (
        "histogram",
        ("To",),
        "How long snapshots that were delivered took, from the dial to the answer.",
    ),
    "etcd_network_snapshot_receive_success": (
        "unknown",
        ("From",),
        "Snapshots stored and processed; From is empty for senders past the first 128.",
    ),
    "etcd_network_snapshot_receive_failures": (
        "unknown",
        ("From",),
        "Snapshots refused, broken off, not stored or not processed.",
    ),
    "etcd_network_snapshot_receive_inflights_total": (
        "gauge",
        ("From",),
        "Snapshots being stored or processed.",
    ),
    "etcd_network_snapshot_receive_total_duration_seconds": (
        "histogram",
        ("From",),
        "How long snapshots that were taken took, from the first byte to the answer.",
    ),
    "etcd_snap_db_fsync_duration_seconds": (
        "histogram",
        (),
        "How long the fsync of a received database took.",
    ),
    "etcd_snap_db_save_total_duration_seconds": (
        "histogram",
        (),
        "How long a received database took to store, the network included.",
    ),
    "raft_pipeline_offered_messages_total": ("counter", _PEER, "Messages given to send."),
    "raft_pipeline_accepted_messages_total": ("counter", _PEER, "Messages taken."),
    "raft_pipeline_refused_messages_total": ("counter", _PEER, "Messages turned away by send."),
    "raft_pipeline_sent_messages_total": (
        "counter",
        _PEER,
        "Messages answered 204, or written whole to a stream.",
    ),
    "raft_pipeline_failed_messages_total": (
        "counter",
        _PEER,
        "Messages not answered 204, or lost with a stream.",
    ),
    "raft_pipeline_dropped_messages_total": ("counter", _PEER, "Messages queued at a stop."),
    "raft_pipeline_queued_messages": (
        "gauge",
        _PEER,
        "Messages that wait for a worker, or a stream.",
    ),
    "raft_pipeline_in_flight_messages": ("gauge", _PEER, "Messages that are being sent."),
    "raft_pipeline_queued_bytes": ("gauge", _PEER, "Bytes that wait for a worker, or a stream."),
    "raft_pipeline_peer_errors_total": (
        "counter",
        _VERDICT,
        "Failures to send to a peer or to have a stream of it, and messages that were too old, by "
        "what raft-pipeline explain makes of the reason.",
    ),
    "raft_pipeline_peer_last_error_timestamp_seconds": (
        "gauge",
        _VERDICT,
        "When the last failure was, in seconds since the epoch; only with its verdict.",
    ),
    "raft_pipeline_probe_healthy": ("gauge", _PEER, "Whether the last probe was answered."),
    "raft_pipeline_channel_sent_messages_total": (
        "counter",
        _CHANNEL,
        "Messages sent by the pipeline, or by a stream.",
    ),
    "raft_pipeline_channel_sent_bytes_total": (
        "counter",
        _CHANNEL,
        "Bytes of messages sent by the pipeline, or by a stream.",
    ),
    "raft_pipeline_channel_queued_messages": (
        "gauge",
        _CHANNEL,
        "Messages that wait for the pipeline, or for a stream.",
    ),
    "raft_pipeline_channel_queue_length": ("gauge", _CHANNEL, "Messages that may wait."),
    "raft_pipeline_channel_queued_bytes": (
        "gauge",
        _CHANNEL,
        "Bytes that wait for the pipeline, or for a stream.",
    ),
    "raft_pipeline_channel_queue_bytes": ("gauge", _CHANNEL, "Bytes that may wait."),
    "raft_pipeline_node_queued_bytes": (
        "gauge",
        ("Local",),
        "Bytes queued for all peers and remotes.",
    ),
    "raft_pipeline_node_queue_bytes": (
        "gauge",
        ("Local",),
        "Bytes that may be queued for all peers and remotes.",
    ),
    "raft_pipeline_snapshot_sent_bytes_total": (
        "counter",
        _PEER,
        "Bytes of databases written to connections, whatever became of them.",
    ),
    "raft_pipeline_snapshot_left_bytes": (
        "gauge",
        _PEER,
        "Bytes of databases being sent, or waiting for it, that are not written yet.",
    ),
    "raft_pipeline_snapshot_received_bytes_total": (
        "counter",
        ("Local",),
        "Bytes of databases received and written to the disk, those given up included.",
    ),
    "raft_pipeline_stream_up": (
        "gauge",
        _STREAM,
        "Whether a stream is up: out, on which we send, or in, on which we receive.",
    ),
    "raft_pipeline_stream_messages_total": (
        "counter",
        _STREAM,
        "Messages that have gone, or come, over a stream.",
    ),
    "raft_pipeline_stream_dropped_messages_total": (
        "counter",
        _STREAM,
        "Messages that have come over a stream and were dropped: paused, or MsgProp without room.",
    ),
    "raft_pipeline_stream_ignored_messages_total": (
        "counter",
        _STREAM,
        "Messages of types that are not for Raft, come over a stream and not delivered.",
    ),
    "raft_pipeline_callback_errors_total": (
        "counter",
        _PEER,
        "Calls of the application that raised; To is empty for what concerns no peer of now.",
    ),
    "raft_pipeline_ignored_messages_total": (
        "counter",
        ("Local",),
        "Messages of process-local types, answered 204 and not delivered.",
    ),
    "raft_pipeline_unknown_messages_total": (
        "counter",
        ("Local",),
        "Messages of types past the last we know, answered 204 and not delivered.",
    ),
    "raft_pipeline_unknown_fields_total": (
        "counter",
        ("Local",),
        "Messages delivered without fields of theirs that raftpb does not have.",
    ),
    "raft_pipeline_refused_requests_total": (
        "counter",
        ("Local", "Verdict"),
        "Requests that were not taken, by why.",
    ),
    "raft_pipeline_process_failures_total": (
        "counter",
        ("Local",),
        "Calls of process that raised.",
    ),
    "raft_pipeline_inbox_received_messages_total": (
        "counter",
        ("Local",),
        "Messages put into the inbox.",
    ),
    "raft_pipeline_inbox_taken_messages_total": (
        "counter",
        ("Local",),
        "Messages taken from the inbox.",
    ),
    "raft_pipeline_inbox_dropped_messages_total": (
        "counter",
        ("Local",),
        "Messages in the inbox when their Transport was stopped.",
    ),
    "raft_pipeline_inbox_queued_messages": (
        "gauge",
        ("Local",),
        "Messages in the inbox.",
    ),
    "raft_pipeline_inbox_queued_bytes": ("gauge", ("Local",), "Bytes in the inbox."),
    "raft_pipeline_inbox_waiting_requests": (
        "gauge",
        ("Local",),
        "Requests not answered until the node takes messages from the inbox.",
    ),
    "raft_pipeline_lost_log_lines_total": (
        "counter",
        (),
        "Lines of the log of the process that were lost because logging raised.",
    ),
    "raft_pipeline_certificate_expiry_days": (
        "gauge",
        ("Local",),
        "Days until our TLS certificate expires; negative when it has.",
    ),
    "raft_pipeline_listener_connections": ("gauge", _LISTENER, "Connections open."),
    "raft_pipeline_listener_accepted_connections_total": (
        "counter",
        _LISTENER,
        "Connections taken.",
    ),
    "raft_pipeline_listener_fast_requests_total": (
        "counter",
        _LISTENER,
        "Requests recognised by the core.",
    ),
    "raft_pipeline_listener_general_requests_total": (
        "counter",
        _LISTENER,
        "Requests read by h11.",
    ),
    "raft_pipeline_listener_closed_for_room_total": (
        "counter",
        _LISTENER,
        "Idle connections closed to make room.",
    ),
    "raft_pipeline_listener_head_timeouts_total": (
        "counter",
        _LISTENER,
        "Connections closed because a head did not come in time.",
    ),
    "raft_pipeline_listener_body_timeouts_total": (
        "counter",
        _LISTENER,
        "Connections closed because a body stalled or dripped.",
    ),
    "raft_pipeline_listener_idle_timeouts_total": (
        "counter",
        _LISTENER,
        "Connections closed because they were idle.",
    ),
    "raft_pipeline_listener_accept_pauses_total": (
        "counter",
        _LISTENER,
        "Times accepting was paused.",
    ),
    "raft_pipeline_listener_body_pauses_total": (
        "counter",
        _LISTENER,
        "Times a body had to wait for a handler or for memory.",
    ),
    "raft_pipeline_listener_handshakes_total": (
        "counter",
        _LISTENER,
        "TLS handshakes with callers that were let in.",
    ),
    "raft_pipeline_listener_handshake_failures_total": (
        "counter",
        _LISTENER,
        "TLS handshakes that failed, or were with callers that are not let in.",
    ),
    "raft_pipeline_listener_handshake_timeouts_total": (
        "counter",
        _LISTENER,
        "Connections closed because a TLS handshake did not end in time.",
    ),
}


@runtime_checkable
class Node(Protocol):
    """What a transport is to metrics; ``isinstance`` looks for the names only."""

    @property
    def handlers(self) -> Handlers:
        """What counts failures to receive by address, once asked."""

    def snapshot(self) -> NodeSnapshot:
        """Return everything that is counted."""


Sample = tuple[str, tuple[str, ...], "float | Histogram"]


class MetricsCollector(Collector):
    """The metrics of one or more transports, for ``CollectorRegistry.register``.

    Parameters
    ----------
    transports : iterable of Transport or pipeline.aio.Transport
        At least one. etcd's series name no local member but for two, so transports that share a
        registry share a collector, which adds up what has the same labels, as etcd's
        process-wide counters do. A second collector in the same registry is refused by
        ``register`` (``ValueError``).
    received_failures_by_address : bool
        True gives ``etcd_network_peer_received_failures_total`` the caller's ``ip:port`` as From,
        as etcd does, counted from now on for the first 128 addresses. Every connection of a caller
        is another address, so by default all failures are one series with an empty From.

    Raises
    ------
    ImportError
        When the module is imported without prometheus-client (extra ``metrics``).
    UsageError
        If there is no transport, or something else among them.

    Notes
    -----
    Thread-safe; a scrape takes each peer's and the handlers' lock for microseconds, one after the
    other, and calls nothing of the application. Differs from etcd: a removed peer's series
    disappear, To and From, and begin at 0 when it is added again; a peer's series are there from
    ``add_peer`` on. The transports are kept alive: unregister the collector after a stop.
    """

    def __init__(
        self,
        transports: Iterable[Node],
        *,
        received_failures_by_address: bool = False,
    ) -> None:
        given = require_iterable("transports", transports, "Transports")
        self._transports = tuple(given)
        if not self._transports:
            raise UsageError("transports: none given")
        for transport in self._transports:
            if not isinstance(transport, Node):
                raise UsageError(f"transports: {show(transport)} is not a Transport")
        require_bool("received_failures_by_address", received_failures_by_address)
        if received_failures_by_address:
            for transport in self._transports:
                transport.handlers.received.count_failures_by_address()

    def describe(self) -> Iterable[Metric]:
        """Yield the families without samples, so that ``register`` can refuse duplicates."""
        for name, (kind, labels, text) in _FAMILIES.items():
            if kind == "gauge":
                yield GaugeMetricFamily(name, text, labels=labels)
            elif kind == "counter":
                yield CounterMetricFamily(name, text, labels=labels)
            elif kind == "histogram":
                yield HistogramMetricFamily(name, text, labels=labels)
            else:
                yield UnknownMetricFamily(name, text, labels=labels)

    def collect(self) -> Iterable[Metric]:
        """Yield all families with what is counted at this moment."""
        sums: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in _FAMILIES}
        sums["raft_pipeline_lost_log_lines_total"][()] = lost_lines()
        for transport in self._transports:
            for name, labels, value in _samples(transport):
                family = sums[name]
                family[labels] = family[labels] + value if labels in family else value
        for metric, samples in zip(self.describe(), sums.values(), strict=True):
            for labels, value in samples.items():
                if isinstance(metric, HistogramMetricFamily):
                    metric.add_metric(labels, _buckets(value), value.sum)
                else:
                    assert isinstance(
                        metric, (GaugeMetricFamily, CounterMetricFamily, UnknownMetricFamily)
                    )
                    metric.add_metric(labels, value)
            yield metric


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return what prometheus_client wants: each bound, and what is up to it."""
    names = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(names, itertools.accumulate(histogram.counts), strict=True))


def _samples(node: Node) -> Iterator[Sample]:
    if is_foreign(node):
        return  # in a forked child: the numbers are those of another process
    snapshot = node.snapshot()
    local = format_id(snapshot.member_id)
    errors = snapshot.callback_errors
    for peer in snapshot.peers:
        yield from _peer_samples(local, peer)
        errors -= peer.callback_errors
    yield "raft_pipeline_callback_errors_total", (local, ""), max(0, errors)
    yield "raft_pipeline_node_queued_bytes", (local,), snapshot.queued_bytes
    yield "raft_pipeline_node_queue_bytes", (local,), snapshot.queue_bytes
    for peer_id, is_healthy in snapshot.answers_probes.items():
        yield "raft_pipeline_probe_healthy", (local, format_id(peer_id)), is_healthy
    for peer_id, round_trips in snapshot.round_trips.items():
        yield "etcd_network_peer_round_trip_time_seconds", (format_id(peer_id),), round_trips
    yield from _received_samples(local, snapshot.received)
    yield from _snapshot_samples(snapshot)
    if snapshot.certificate_expires_at is not None:
        days = (snapshot.certificate_expires_at - time.time()) / DAY_S
        yield "raft_pipeline_certificate_expiry_days", (local,), days
    if snapshot.inbox is not None:
        yield from _inbox_samples(local, snapshot.inbox)
    for url, counts in snapshot.listeners:
        yield from _listener_samples((local, url), counts)


def _peer_samples(local: str, peer: PeerSnapshot) -> Iterator[Sample]:
    to, books, snapshots = format_id(peer.peer_id), peer.books, peer.snapshots
    labels: tuple[str, ...]
    for stream in peer.streams:
        labels = (local, to, stream.kind, stream.direction)
        yield "raft_pipeline_stream_up", labels, stream.since is not None
        yield "raft_pipeline_stream_messages_total", labels, stream.messages
        if stream.direction == "in":
            yield "raft_pipeline_stream_dropped_messages_total", labels, stream.dropped
            yield "raft_pipeline_stream_ignored_messages_total", labels, stream.ignored
    yield "etcd_network_active_peers", (local, to), peer.is_active
    yield "etcd_network_disconnected_peers_total", (local, to), peer.disconnects
    yield "etcd_network_peer_sent_bytes_total", (to,), books.sent_bytes + snapshots.sent_bytes
    failures = books.failed + books.refused + snapshots.failures
    yield "etcd_network_peer_sent_failures_total", (to,), failures
    prefix = "etcd_network_snapshot_send"
    yield f"{prefix}_success", (to,), snapshots.success
    yield f"{prefix}_failures", (to,), snapshots.failures
    yield f"{prefix}_inflights_total", (to,), snapshots.in_flight
    yield f"{prefix}_total_duration_seconds", (to,), snapshots.durations
    for field in ("offered", "accepted", "refused", "sent", "failed", "dropped"):
        yield f"raft_pipeline_{field}_messages_total", (local, to), getattr(books, field)
    for field in ("queued", "in_flight"):
        yield f"raft_pipeline_{field}_messages", (local, to), getattr(books, field)
    yield "raft_pipeline_queued_bytes", (local, to), books.queued_bytes
    for channel in peer.channels:
        labels, way = (local, to, channel.name), channel.books
        yield "raft_pipeline_channel_sent_messages_total", labels, way.sent
        yield "raft_pipeline_channel_sent_bytes_total", labels, way.sent_bytes
        yield "raft_pipeline_channel_queued_messages", labels, way.queued
        yield "raft_pipeline_channel_queue_length", labels, channel.queue_length
        yield "raft_pipeline_channel_queued_bytes", labels, way.queued_bytes
        yield "raft_pipeline_channel_queue_bytes", labels, channel.queue_bytes
    for verdict, count in peer.errors.items():
        yield "raft_pipeline_peer_errors_total", (local, to, verdict), count
    if (error := peer.last_error) is not None:
        labels = (local, to, error.verdict)
        yield "raft_pipeline_peer_last_error_timestamp_seconds", labels, error.at
    yield "raft_pipeline_snapshot_sent_bytes_total", (local, to), snapshots.written_bytes
    yield "raft_pipeline_snapshot_left_bytes", (local, to), snapshots.left_bytes
    yield "raft_pipeline_callback_errors_total", (local, to), peer.callback_errors


def _received_samples(local: str, counts: ReceivedCounts) -> Iterator[Sample]:
    for sender, size_bytes in counts.received_bytes.items():
        name = "" if sender is None else format_id(sender)
        yield "etcd_network_peer_received_bytes_total", (name,), size_bytes
    for address, failures in counts.received_failures.items():
        yield "etcd_network_peer_received_failures_total", (address,), failures
    yield "raft_pipeline_ignored_messages_total", (local,), counts.ignored
    yield "raft_pipeline_unknown_messages_total", (local,), counts.unknown
    yield "raft_pipeline_unknown_fields_total", (local,), counts.unknown_fields
    yield "raft_pipeline_process_failures_total", (local,), counts.process_failures
    for verdict, refused in counts.refusals.items():
        yield "raft_pipeline_refused_requests_total", (local, verdict), refused


def _snapshot_samples(snapshot: NodeSnapshot) -> Iterator[Sample]:
    local = format_id(snapshot.member_id)
    received_bytes = snapshot.received_snapshot_bytes
    yield "raft_pipeline_snapshot_received_bytes_total", (local,), received_bytes
    prefix = "etcd_network_snapshot_receive"
    for sender, counts in snapshot.received_snapshots.items():
        yield f"{prefix}_success", (sender,), counts.success
        yield f"{prefix}_failures", (sender,), counts.failures
        yield f"{prefix}_inflights_total", (sender,), counts.in_flight
        yield f"{prefix}_total_duration_seconds", (sender,), counts.duration
    if snapshot.stores is not None:
        saves, fsyncs = snapshot.stores
        yield "etcd_snap_db_fsync_duration_seconds", (), fsyncs
        yield "etcd_snap_db_save_total_duration_seconds", (), saves


def _inbox_samples(local: str, books: InboxStats) -> Iterator[Sample]:
    for field in ("received", "taken", "dropped"):
        yield f"raft_pipeline_inbox_{field}_messages_total", (local,), getattr(books, field)
    yield "raft_pipeline_inbox_queued_messages", (local,), books.queued
    yield "raft_pipeline_inbox_queued_bytes", (local,), books.queued_bytes
    yield "raft_pipeline_inbox_waiting_requests", (local,), books.waiting


def _listener_samples(labels: tuple[str, str], counts: ReceiverStats) -> Iterator[Sample]:
    yield "raft_pipeline_listener_connections", labels, counts.connections
    yield "raft_pipeline_listener_accepted_connections_total", labels, counts.accepted
    for field in (
        "fast_requests",
        "general_requests",
        "closed_for_room",
        "head_timeouts",
        "body_timeouts",
        "idle_timeouts",
        "accept_pauses",
        "body_pauses",
        "handshakes",
        "handshake_failures",
        "handshake_timeouts",
    ):
        yield f"raft_pipeline_listener_{field}_total", labels, getattr(counts, field)
