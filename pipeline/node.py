"""A node: what it is, and what it does without waiting; both faces stand on it.

``transport.Transport`` and ``aio.Transport`` are this, and what waits besides: in the caller's
thread, or awaited. Source: etcd rafthttp/transport.go.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, Unpack, overload

from pipeline.arguments import require_bool, require_id, require_instance
from pipeline.callbacks import Callbacks, require_callable, require_raft
from pipeline.config import TransportConfig
from pipeline.errors import MemberNotFoundError, MemberRemovedError, UsageError
from pipeline.forks import disown, nothing_to_stop, public_names
from pipeline.identity import Identity
from pipeline.logs import get_logger, lost_lines, show
from pipeline.node_snapshot import NodeSnapshot
from pipeline.peer import Peer, PeerStats
from pipeline.raft import AnyRaft, ProcessingRaft, RaftReports
from pipeline.receive.handlers import Handlers
from pipeline.receive.inbox import Inbox
from pipeline.remote import RemotePolicy, Remotes, RemoteStats
from pipeline.send.changes import PeerChange
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.send.probing import Prober, ProbeStats
from pipeline.send.sendable import Sendable
from pipeline.snapshot.receiver import SnapshotReceiver
from pipeline.snapshot.sender import (
    RateLimiter,
    SnapshotProgress,
    SnapshotSender,
    SnapshotTransfer,
    is_transfer_thread,
)
from pipeline.snapshot.source import SnapshotSource, close_quietly
from pipeline.stats import (
    FollowerStats,
    PipelineStats,
    ServerStats,
    TransportStats,
    leader_stats,
)
from pipeline.stream._streams import Appends, send_all
from pipeline.stream.streams import NodeStreams, PeerStreams
from pipeline.threads import Once, require_real_threads
from pipeline.tls import TLSInfo
from pipeline.tls.credentials import Credentials
from pipeline.types import ACCEPTED
from pipeline.wire.protocol import format_id
from pipeline.wire.urls import parse_peer_urls
from pipeline.wire.versions import Versions

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from pipeline.metrics import MetricsCollector
    from pipeline.receive.asgi import App, ASGIApp
    from pipeline.receive.listener import Listener

__all__ = ["Node"]

logger = get_logger(__name__)


_all: weakref.WeakSet[Node] = weakref.WeakSet()


class NodeSettings(TypedDict, total=False):
    """What a node of either face may be given, however it receives. For type checkers."""

    peer_urls: Iterable[str]
    tls: TLSInfo | None
    config: TransportConfig | None
    remote_policy: RemotePolicy | None
    allow_loopback_remotes: bool


class Node:
    """One member of a cluster: its peers, its remotes, what it answers, and its statistics.

    Parameters are those of :class:`pipeline.Transport`; ``raft`` and the callbacks are plain.

    Attributes
    ----------
    member_id, cluster_id : int
    config : TransportConfig
    peer_urls : tuple of str
    credentials : Credentials or None
        What ``tls`` is made of; handed to everything that speaks TLS.
    callbacks : Callbacks
        How the application is called on behalf of all of it.
    handlers : Handlers
        What peers are answered.

    Notes
    -----
    Thread-safe, also for a signal's handler at any instant. Public methods never wait; those that
    do have an underscore here, and a face of their own in the subclasses.
    """

    #: What ``stop`` is, in a forked child, of a node that is its parent's.
    _stop_of_foreign: ClassVar[Callable[..., object]] = staticmethod(nothing_to_stop)

    @overload
    def __init__(
        self,
        member_id: int,
        cluster_id: int,
        raft: ProcessingRaft,
        *,
        inbox: None = None,
        on_critical_error: Callable[[MemberRemovedError], None] | None = ...,
        on_peer_change: Callable[[PeerChange], None] | None = ...,
        **settings: Unpack[NodeSettings],
    ) -> None: ...
    @overload
    def __init__(
        self,
        member_id: int,
        cluster_id: int,
        raft: RaftReports,
        *,
        inbox: Inbox[Any],
        on_critical_error: Callable[[MemberRemovedError], None] | None = ...,
        on_peer_change: Callable[[PeerChange], None] | None = ...,
        **settings: Unpack[NodeSettings],
    ) -> None: ...
    def __init__(
        self,
        member_id: int,
        cluster_id: int,
        raft: AnyRaft,
        *,
        peer_urls: Iterable[str] = (),
        tls: TLSInfo | None = None,
        config: TransportConfig | None = None,
        on_critical_error: Callable[[MemberRemovedError], None] | None = None,
        on_peer_change: Callable[[PeerChange], None] | None = None,
        remote_policy: RemotePolicy | None = None,
        allow_loopback_remotes: bool = False,
        inbox: Inbox[Any] | None = None,
    ) -> None:
        require_real_threads()
        require_id("member_id", member_id)
        require_id("cluster_id", cluster_id)
        require_bool("allow_loopback_remotes", allow_loopback_remotes)
        if inbox is not None:
            require_instance("inbox", inbox, Inbox, "pipeline.Inbox")
        require_raft(raft, has_inbox=inbox is not None)
        require_callable("on_critical_error", on_critical_error)
        require_callable("on_peer_change", on_peer_change)
        require_callable("remote_policy", remote_policy)
        self.member_id = member_id
        self.cluster_id = cluster_id
        self.config = TransportConfig()
        if config is not None:
            self.config = require_instance("config", config, TransportConfig)
        self.peer_urls = parse_peer_urls(peer_urls, "peer_urls", may_be_empty=True)
        #: What ``tls`` is made of; handed to everything that speaks TLS.
        self.credentials = None if tls is None else Credentials(tls)
        self._appends = Appends()
        self._server_stats = ServerStats(member_id, self._appends)
        self._identity = Identity(
            member_id,
            cluster_id,
            self.peer_urls,
            self.config.server_version,
            self.config.min_cluster_version,
        )
        self._raft = raft
        self._on_critical_error = on_critical_error
        self._on_peer_change = on_peer_change
        #: How the application is called on behalf of all of it.
        self._log = logger.about(local=format_id(member_id))
        self.callbacks = Callbacks(self._log)
        self._versions = Versions(self.config.server_version, lambda: self._peers)
        self._dispatcher = Dispatcher(
            format_id(member_id),
            queue_bytes=self.config.queue_bytes,
            max_threads=self.config.dispatchers,
        )
        self._limiter = RateLimiter(self.config.snapshot_rate_limit)
        self._remotes = Remotes(
            member_id,
            self._make_pipeline,
            is_peer=lambda peer_id: peer_id in self._peers,
            call_soon=self._dispatcher.call_soon,
            policy=remote_policy,
            allow_loopback=allow_loopback_remotes,
            callbacks=self.callbacks,
        )
        self._inbox = inbox
        self.handlers = Handlers(
            raft,
            self._identity,
            config=self.config.receiver,
            # Who has shown a certificate is learned without a policy.
            senders=None if remote_policy is None and tls is None else self._remotes,
            on_append=self._server_stats.received_append,
            allow_member=None if tls is None else tls.allow_member,
            callbacks=self.callbacks,
            versions=self._versions,
            inbox=inbox,
        )
        self.handlers.streams = self._streams = (
            NodeStreams(self.handlers, self._dispatcher, self.config, self._find_streams)
            if self.config.streams
            else None
        )
        self._snapshots = SnapshotReceiver(raft, self.handlers, self.config.receiver)
        self.handlers.snapshots = self._snapshots
        self._prober: Prober | None = None
        if self.config.probe_interval_s:
            self._prober = Prober(
                self._dispatcher.poller,
                self._dispatcher.dialer,
                interval_s=self.config.probe_interval_s,
                member_id=member_id,
                credentials=self.credentials,
                versions=self._versions,
            )
        # No lock guards what follows: a signal's handler may come between any two lines, and other
        # threads. Each is changed by single operations of dict, set and list.
        self._peers: dict[int, Peer] = {}
        # Those that are not seen to their end: a stop finds also what an interrupted call left.
        self._live_peers: set[Peer] = set()
        self._listeners: list[Listener] = []
        self._asgi_apps: list[App] = []  # the first one is what is given; more came at one instant
        self._beginning = Once()
        self._ending = Once()
        self._is_started = False
        self._is_stopped = False
        # Why nothing can be sent; None while it can, and while a stop is going on.
        self._refusal: str | None = "the transport was not started"
        if self.credentials is not None:
            self.credentials.subscribe(self._retire_connections)
        _all.add(self)

    def __repr__(self) -> str:
        """Say whose it is, what it is at, and whom it reaches; never raises, calls nobody."""
        kind = f"{type(self).__module__.removesuffix('.transport')}.{type(self).__qualname__}"
        try:
            us = f"{format_id(self.member_id)} of cluster {format_id(self.cluster_id)}"
            peers = f"{self.active_peers()} of {len(self._peers)} peers active"
            urls = [url for it in tuple(self._listeners) if not it.is_closed for url in it.urls]
        except AttributeError:  # its making has failed
            return f"<{kind}, half made>"
        if self._is_stopped:
            state = "stopped" if self._refusal is not None else "stopping"
        else:
            state = "running" if self._is_started else "not started"
        listening = f", listening at {', '.join(urls)}" if urls else ""
        return f"<{kind} {us}: {state}, {peers}{listening}>"

    # -- life

    def _start(self) -> None:
        """Start the threads. Once; ``UsageError`` otherwise."""
        require_real_threads()
        if self._is_stopped or not self._beginning.take():
            raise UsageError("start: a transport can be started once")
        try:
            if self._streams is not None:
                self._streams.start()
            self._dispatcher.start()
            self._remotes.open()
            if self.credentials is not None:
                self.credentials.watch(format_id(self.member_id))
            atexit.register(self._stop)
            self._is_started = True
            self._refusal = None
        except BaseException:
            self._stop()
            raise
        if self._ending.is_taken():  # meanwhile: what was begun after it was not ended
            self._stop()

    def _stop(self) -> int:
        """Do what ``stop`` of the faces says: end everything, within ``config.stop_timeout_s``."""
        deadline = time.monotonic() + self.config.stop_timeout_s
        self._is_stopped = True
        is_first = self._ending.take()
        if self._streams is not None:
            self._streams.stop_begin()  # who dials from now on is not told that he is no peer
        peers = list(self._live_peers)
        self._peers.clear()
        if self._prober is not None:
            self._prober.stop()
        # As in etcd, remotes first.
        remotes = self._remotes.close()
        dropped = sum(remote.pipeline.stop_begin() for remote in remotes)
        dropped += sum(peer.stop_begin() for peer in peers)
        if self._inbox is not None and self.handlers.source is not None:
            self._inbox.close_source(self.handlers.source)
        if not is_first and (self._dispatcher.is_current_thread() or is_transfer_thread()):
            return dropped  # the first call may be waiting for the callback we are in
        for listener in tuple(self._listeners):
            listener.close(deadline_s=max(0.0, deadline - time.monotonic()))
        self.handlers.stop()
        for app in tuple(self._asgi_apps):
            app.close()
        for remote in remotes:
            remote.pipeline.stop_end(deadline)
            self._remotes.forget(remote)
        for peer in peers:
            peer.stop_end(deadline)
            self._live_peers.discard(peer)
        if self.credentials is not None:
            self.credentials.stop(deadline)
        self._dispatcher.stop(deadline)
        if self._streams is not None:
            self._streams.stop_end(deadline)
        for app in tuple(self._asgi_apps):
            app.wait_closed(deadline)
        atexit.unregister(self._stop)
        self._refusal = "transport stopped"
        return dropped

    # -- sending

    def send(self, messages: Iterable[Sendable]) -> int:
        """Hand each message to the peer, or else the remote, it is for.

        Parameters
        ----------
        messages : iterable of Message, EncodedMessage or raftpb protobuf objects
            One to 0 is left out: so a Raft marks what is not to be sent.

        Returns
        -------
        int
            How many were not queued, here and now; 0 when all were. Each of them was refused by its
            peer's full queue (``PipelineConfig.queue_length``, ``queue_bytes``, or the node's
            ``TransportConfig.queue_bytes``), or dropped: it is for a member that is neither peer
            nor remote (we ourselves are neither), or whose removal has begun; it is for one that is
            paused or cut off; or a :meth:`stop` goes on. What is left out is not counted. What
            becomes of the queued ones is told later: ``Raft.report_unreachable``, :meth:`stats`.

        Raises
        ------
        UsageError, MarshalError
            If one of them is not a message or is too large; the ones before it were handed on, and
            how many of these were not queued is not told. Also if the transport was not started or
            has been stopped.

        Notes
        -----
        Never waits, and raises nothing for the network's reasons. A small message that comes alone
        to a stream at rest is written in the calling thread; all others by the loop. Source: etcd
        ``Transport.Send``.
        """
        if self._refusal is not None:
            raise UsageError(f"send: {self._refusal}")
        try:
            given = iter(messages)
        except TypeError:
            raise UsageError(f"messages: {show(messages)} is not a list of messages") from None
        return send_all(
            self._peers, given, self._send_other, self._appends, self._server_stats.lead
        )

    def _send_other(self, message: Sendable) -> bool:
        """Hand a message to the remote it is for; whether it was queued, or is not to be sent."""
        try:
            to = message.to
            remote = self._remotes.get(to) if to else None
        except (AttributeError, TypeError):  # an ID can be looked up
            raise UsageError(f"messages: {show(message)} is not a message") from None
        if remote is not None:
            return remote.send(message) is ACCEPTED
        if not isinstance(to, int):
            raise UsageError(f"messages: {show(message)} is not a message")
        if to:
            self._log.debug(
                "ignored message to unknown member %s", format_id(to), peer=format_id(to)
            )
        return not to

    def _send_snapshot(
        self,
        message: Sendable,
        source: SnapshotSource,
        *,
        size: int | None = None,
        on_progress: Callable[[SnapshotProgress], object] | None = None,
    ) -> SnapshotTransfer:
        """Do what ``send_snapshot`` of the faces says, but return when it has begun."""
        if self._refusal is not None:
            close_quietly(source)
            raise UsageError(f"send_snapshot: {self._refusal}")
        transfer = SnapshotTransfer(
            message,
            source,
            size=size,
            on_progress=on_progress,
            profile=self.config.pipeline.profile,
            callbacks=self.callbacks,
        )
        peer = self._peers.get(transfer.peer_id)
        if peer is None or not peer.snapshots.send(transfer):
            transfer.finish(MemberNotFoundError("member not found"))
        return transfer

    def set_snapshot_rate_limit(self, rate: float | None) -> None:
        """Limit all snapshots together to ``rate`` bytes a second, None for no limit, from now on.

        Counts for running transfers, too. However low the limit, each moves a byte a second:
        etcd's listener gives up a connection that is silent for 5 s. ``UsageError`` below 1.
        """
        self._limiter.set_rate(rate)

    # -- peers

    def add_peer(self, peer_id: int, urls: Iterable[str]) -> None:
        """Start to send to a member. Ignored when it is a peer already; its URLs stay.

        Parameters
        ----------
        peer_id : int
            The member's, 64 bits.
        urls : iterable of str
            Where it is reached: at least one ``http://host:port`` or ``https://host:port``, with
            nothing after the port. One of them is used until it fails, then the next.

        Raises
        ------
        UsageError
            If a URL or the ID is not valid, or the transport is not running.
        """
        require_id("peer_id", peer_id)
        checked = parse_peer_urls(urls)
        self._require_running("add_peer")
        if peer_id in self._peers:
            return
        peer = self._make_peer(peer_id, checked)
        self._live_peers.add(peer)
        try:
            peer.start()
            is_added = self._peers.setdefault(peer_id, peer) is peer
        except BaseException:
            self._end_peers((peer,))
            self._require_running("add_peer")
            raise
        if not is_added:  # another was, meanwhile
            self._end_peers((peer,))
            return
        self._probe(peer)
        if self._ending.is_taken():  # meanwhile, perhaps before it could see the peer
            self._peers.pop(peer_id, None)
            self._end_peers((peer,))
            raise UsageError("add_peer: transport stopped")
        self._log.info("added remote peer %s", format_id(peer_id), peer=format_id(peer_id))

    def add_remote(self, member_id: int, urls: Iterable[str]) -> None:
        """Be able to answer a node that is not a peer, until :meth:`stop`.

        Ignored when the ID is a peer's or a remote's already, and after :meth:`stop`. If the
        member becomes a peer later, messages go to the peer. A full buffer drops a message
        without telling Raft. Source: etcd ``Transport.AddRemote``.

        Parameters
        ----------
        member_id, urls
            As :meth:`add_peer` has them.

        Raises
        ------
        UsageError
            If a URL or the ID is not valid, or the transport was not started.
        """
        require_id("member_id", member_id)
        if not self._is_started:
            raise UsageError("add_remote: the transport was not started")
        checked = parse_peer_urls(urls)
        if member_id not in self._peers:
            self._remotes.add(member_id, checked)

    def update_peer(self, peer_id: int, urls: Iterable[str]) -> None:
        """Replace a peer's URLs; ignored for an unknown member. ``UsageError`` for a bad URL."""
        require_id("peer_id", peer_id)
        checked = parse_peer_urls(urls)
        peer = self._peers.get(peer_id)
        if peer is not None:
            peer.update(checked)
            self._probe(peer)
            self._log.info("updated remote peer %s", format_id(peer_id), peer=format_id(peer_id))

    def _remove_peer(self, peer_id: int) -> int:
        """Stop to send to a member; the number of messages dropped."""
        require_id("peer_id", peer_id)
        removed = self._peers.pop(peer_id, None)
        # Also what a removal that was interrupted has not seen to its end.
        peers = [
            peer
            for peer in list(self._live_peers)
            if peer.peer_id == peer_id and (peer is removed or peer.is_stopping)
        ]
        if not peers:
            peer = format_id(peer_id)
            text = "ignored the removal of unknown peer %s"
            self._log.warning(text, peer, peer=peer, reason="no such peer")
            return 0
        self._forget(peer_id)
        dropped = self._end_peers(peers)
        self._log.info("removed remote peer %s", format_id(peer_id), peer=format_id(peer_id))
        return dropped

    def _remove_all_peers(self) -> int:
        """Remove every peer; the number of messages dropped."""
        peers = [
            peer
            for peer_id in list(self._peers)
            if (peer := self._peers.pop(peer_id, None)) is not None
        ]
        for peer in peers:
            self._forget(peer.peer_id)
        return self._end_peers(peers)

    # -- testing aids: a network that loses everything

    def pause(self) -> None:
        """Drop what is sent to the peers there are now, and what comes by their streams, until
        :meth:`resume`.

        Raft is not told, as if the network lost it; ``peer_stats`` counts it. What was queued
        before still goes, and what is posted to us is delivered. A peer added later is not paused;
        remotes are not.
        Source: etcd ``Transport.Pause``, a testing aid.
        """
        for peer in list(self._peers.values()):
            peer.pause()

    def resume(self) -> None:
        """Send to all peers again, those cut off by :meth:`cut_peer` included."""
        for peer in list(self._peers.values()):
            peer.resume()

    def cut_peer(self, peer_id: int) -> None:
        """Do what :meth:`pause` does, for one peer or remote; nothing for an unknown one."""
        require_id("peer_id", peer_id)
        for node in (self._peers.get(peer_id), self._remotes.get(peer_id)):
            if node is not None:
                node.pause()

    def mend_peer(self, peer_id: int) -> None:
        """Undo :meth:`cut_peer` and :meth:`pause` for one peer or remote, if there is one."""
        require_id("peer_id", peer_id)
        for node in (self._peers.get(peer_id), self._remotes.get(peer_id)):
            if node is not None:
                node.resume()

    # -- what there is to tell

    def active_since(self, peer_id: int) -> float | None:
        """When the peer last became active, seconds since the epoch; None if it is not."""
        require_id("peer_id", peer_id)
        peer = self._peers.get(peer_id)
        return None if peer is None else peer.status.active_since

    def active_peers(self) -> int:
        """How many peers are active."""
        return sum(peer.status.is_active for peer in list(self._peers.values()))

    def stats(self) -> dict[int, PipelineStats]:
        """The books of every peer, by member ID; each balances in itself.

        Of its pipeline and its streams together; ``peer_stats`` has those of the streams alone.
        """
        return {peer_id: peer.books() for peer_id, peer in list(self._peers.items())}

    def transport_stats(self) -> TransportStats:
        """What there is to tell of the whole: callbacks that raised, what was not delivered."""
        counts = self.handlers.received.counts()
        return TransportStats(
            self.callbacks.errors,
            counts.process_failures,
            sum(counts.received_failures.values()),
            counts.ignored,
            counts.unknown,
            counts.unknown_fields,
            self._dispatcher.loop.queued_bytes,
            lost_lines(),
        )

    def peer_stats(self) -> dict[int, PeerStats]:
        """Whether each peer is active or paused, by member ID, what that cost, and its version."""
        return {
            peer_id: peer.stats()._replace(server_version=self._versions.get(peer_id))
            for peer_id, peer in list(self._peers.items())
        }

    def probe_stats(self) -> dict[int, ProbeStats]:
        """What probing found out, by member ID; empty when ``probe_interval_s`` is 0."""
        return {} if self._prober is None else self._prober.stats()

    def remote_stats(self) -> dict[int, RemoteStats]:
        """Where each remote is, how it came to be, and its books, by member ID."""
        return self._remotes.stats()

    def follower_stats(self) -> dict[int, FollowerStats]:
        """What became of MsgApp messages, by member ID."""
        return {peer_id: peer.follower_stats() for peer_id, peer in list(self._peers.items())}

    def snapshot(self) -> NodeSnapshot:
        """Return everything that is counted, for metrics. Calls nothing of the application."""
        peers = list(self._peers.values())
        prober, store = self._prober, self._snapshots.store
        return NodeSnapshot(
            self.member_id,
            self.callbacks.errors,
            tuple(peer.snapshot() for peer in peers),
            self._dispatcher.loop.queued_bytes,
            self.config.queue_bytes,
            {} if prober is None else prober.round_trips(),
            {peer_id: it.is_healthy for peer_id, it in self.probe_stats().items() if it.total},
            self.handlers.received.counts(),
            self._snapshots.counts(),
            self._snapshots.stored_bytes,
            self._snapshots.left_bytes(),
            None if store is None else store.histograms(),
            self.certificate_expires_at,
            tuple((it.url, it.stats()) for it in tuple(self._listeners) if not it.is_closed),
            None if self._inbox is None else self._inbox.stats(),
        )

    def metrics_collector(self, *, received_failures_by_address: bool = False) -> MetricsCollector:
        """Return a prometheus_client collector with etcd's names; ``docs/metrics.md``.

        Parameters
        ----------
        received_failures_by_address : bool
            True labels failures to receive with the caller's ``ip:port``, as etcd does.

        Raises
        ------
        ImportError
            Without prometheus-client, which the extra ``metrics`` installs.

        Notes
        -----
        Several transports in one registry share one :class:`pipeline.metrics.MetricsCollector`.
        """
        require_bool("received_failures_by_address", received_failures_by_address)
        from pipeline.metrics import MetricsCollector

        return MetricsCollector((self,), received_failures_by_address=received_failures_by_address)

    def leader_stats(self) -> dict[str, object]:
        """``follower_stats`` in the shape of etcd's ``/v2/stats/leader``.

        ``leader`` is our ID: whether we lead is for the node to know. etcd answers only when it
        does. A follower that nothing was delivered to has a minimum of 0, not 2**63.
        """
        followers = {format_id(k): stats for k, stats in self.follower_stats().items()}
        return leader_stats(format_id(self.member_id), followers)

    def server_stats(self) -> dict[str, object]:
        """MsgApp sent and received, in the shape of etcd's ``/v2/stats/self``.

        ``state`` and ``leaderInfo`` are concluded from who sent the last MsgApp, as in etcd.
        ``leaderInfo`` is left out until there was one, ``name`` because we do not know it, and
        ``sendBandwidthRate`` because ``send`` does not measure messages. As in etcd, a rate is
        left out when it is zero.
        """
        return self._server_stats.to_dict()

    # -- TLS

    def _reload_tls(self) -> bool:
        """Load the TLS files again; whether a new set is in force. Blocks while they are read."""
        return self.credentials is not None and self.credentials.reload()

    @property
    def certificate_expires_at(self) -> float | None:
        """When our certificate expires, seconds since the epoch; None without ``tls``."""
        return None if self.credentials is None else self.credentials.not_after

    # -- receiving

    def _listen(self, url: str | Iterable[str] | None = None) -> Listener:
        """Receive at a URL, or several; names are resolved meanwhile."""
        if url is None:
            if not self.peer_urls:
                raise UsageError("listen: url is needed, for there are no peer_urls")
            url = self.peer_urls
        self._require_running("listen")
        from pipeline.receive.listener import Listener

        listener = Listener(
            self.handlers,
            url,
            self.config.receiver,
            self.credentials,
            listeners=self._listeners,
        )
        if self._ending.is_taken():  # meanwhile, perhaps before it could see the listener
            listener.close()
            raise UsageError("listen: transport stopped")
        return listener

    def snapshot_path(self, index: int) -> Path | None:
        """Where the database of a received snapshot is, by its index; None if there is none.

        It is there when ``Raft.process`` is called with the MsgSnap of this index
        (``message.snapshot.metadata.index``), and stays: moving it away when it is applied, and
        removing what is not needed any more, is for the node. Source: etcd ``DBFilePath``.

        Raises
        ------
        UsageError
            If ``config.receiver.snapshot_dir`` is not set, or the index is not one.
        """
        require_id("index", index)
        store = self._snapshots.store
        if store is None:
            raise UsageError("snapshot_path: config.receiver.snapshot_dir is not set")
        path = store.path(index)
        return path if path.exists() else None

    @property
    def asgi_app(self) -> ASGIApp:
        """An ASGI application that does what :meth:`listen` does, for a server of your own.

        But for snapshots, which it answers 501. It may be mounted under a prefix. Every call gives
        the same one; its threads end with :meth:`stop`, after which it answers 503.
        """
        from pipeline.receive.asgi import App

        if not self._asgi_apps:
            self._asgi_apps.append(App(self.handlers, self.config.receiver))
        return self._asgi_apps[0]

    @property
    def wsgi_app(self) -> WSGIApplication:
        """A WSGI application that does what :meth:`listen` does, for a server of your own.

        But for snapshots, which it answers 501. It may be mounted under a prefix. After
        :meth:`stop` it answers 503.
        """
        from pipeline.receive.wsgi import wsgi_app

        return wsgi_app(self.handlers, self.config.receiver)

    # -- parts

    def _make_peer(self, peer_id: int, urls: Iterable[str]) -> Peer:
        pipeline = self._make_pipeline(peer_id, urls, on_peer_change=self._on_peer_change)
        snapshots = SnapshotSender(
            pipeline,
            dispatcher=self._dispatcher,
            config=self.config.pipeline,
            answer_timeout_s=self.config.snapshot_answer_timeout_s,
            limiter=self._limiter,
        )
        streams = None if self._streams is None else self._streams.make_peer(pipeline)
        return Peer(pipeline, snapshots, self._dispatcher, streams)

    def _find_streams(self, peer_id: int) -> PeerStreams | None:
        peer = self._peers.get(peer_id)
        return None if peer is None else peer.streams

    def _make_pipeline(
        self,
        peer_id: int,
        urls: Iterable[str],
        *,
        on_peer_change: Callable[[PeerChange], None] | None = None,
    ) -> PeerPipeline:
        return PeerPipeline(
            peer_id,
            urls,
            self._raft,
            self._identity,
            dispatcher=self._dispatcher,
            config=self.config.pipeline,
            on_critical_error=self._on_critical_error,
            on_peer_change=on_peer_change,
            credentials=self.credentials,
            callbacks=self.callbacks,
            versions=self._versions,
        )

    def _end_peers(self, peers: Sequence[Peer]) -> int:
        """See those that are peers no more to their end; the number of messages dropped."""
        deadline = time.monotonic() + self.config.stop_timeout_s
        dropped = 0
        for peer in peers:
            if self._prober is not None:
                self._prober.remove(peer.picker)
            dropped += peer.stop_begin()
        for peer in peers:
            peer.stop_end(deadline)
            self._live_peers.discard(peer)
        return dropped

    def _forget(self, peer_id: int) -> None:
        self.handlers.forget(peer_id)
        self._versions.forget(peer_id)

    def _probe(self, peer: Peer) -> None:
        if self._prober is not None:
            self._prober.set(peer.peer_id, peer.picker)
            if self._peers.get(peer.peer_id) is not peer:  # it was removed meanwhile
                self._prober.remove(peer.picker)

    def _retire_connections(self) -> None:
        """Follow a rotation: what was made with the old set is replaced."""
        for peer in list(self._peers.values()):
            peer.retire_connections()
        self._remotes.retire_connections()
        if self._prober is not None:
            self._prober.retire_connections()

    def _forget_after_fork(self) -> None:
        is_running = self._is_started and self._refusal is None
        for peer in self._live_peers:
            peer.forget_after_fork()
        if self._prober is not None:
            self._prober.forget_after_fork()
        if self.credentials is not None:
            self.credentials.forget_after_fork()
        self.handlers.forget_after_fork(is_foreign=is_running)
        self._appends.forget_after_fork()
        if self._streams is not None:
            self._streams.forget_after_fork()
        if is_running:
            atexit.unregister(self._stop)
            if self._inbox is not None:
                self._inbox.disown_after_fork()
            disown(self, "transport", public_names(type(self)), stop=self._stop_of_foreign)

    def _require_running(self, what: str) -> None:
        if not self._is_started:
            raise UsageError(f"{what}: the transport was not started")
        if self._is_stopped:
            raise UsageError(f"{what}: transport stopped")


def _after_fork_in_child() -> None:
    for node in list(_all):
        node._forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
