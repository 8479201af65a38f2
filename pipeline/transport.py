"""The transport: a node for threads that wait.

Source: etcd rafthttp/transport.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.node import Node
from pipeline.send.sendable import Sendable
from pipeline.snapshot.sender import SnapshotProgress, SnapshotTransfer
from pipeline.snapshot.source import SnapshotSource

if TYPE_CHECKING:
    from pipeline.receive.listener import Listener

__all__ = ["Transport"]


class Transport(Node):
    """The network half of a Raft node.

    Parameters
    ----------
    member_id, cluster_id : int
        Ours, 64 bits.
    raft : Raft
        Takes what peers send and hears what could not be delivered, from our threads. With an
        ``inbox`` a ``RaftReports``, which has no ``process``.
    peer_urls : iterable of str
        Where peers reach us, so no wildcard addresses; sent as X-PeerURLs.
    tls : TLSInfo, optional
        Our certificate and whom we trust; ``https`` URLs need it. The files are looked at once a
        second, and connections made with an old set are replaced.
    config : TransportConfig, optional
        The settings; the defaults when left out.
    on_critical_error : callable, optional
        Called with a ``MemberRemovedError`` when a peer answers 403 to a post, or 410 to the dial
        of a stream; of the two streams of a peer once. Stopping the node is the application's
        decision.
    on_peer_change : callable, optional
        Called with a ``PeerChange`` when a peer becomes active, inactive, mismatched or removed
        (``PeerState``), from a thread of ours. Each change is told once, those of a peer one after
        the other and in order, however many workers have news of it; the first one is the outcome
        of the first message or snapshot that has one. It comes before the reports of the message
        that brought it, unless the callback is still at an earlier change; then it is told when
        that returns, and of more than 64 that wait some are left out in pairs, so that the last
        one told is what holds. Nothing is told of remotes, nor of what ``remove_peer`` and
        :meth:`stop` end, nor of a peer once these have returned. While it blocks it holds up one
        worker, or one snapshot, of that peer; what it raises is logged and counted.
    remote_policy : callable, optional
        ``(member ID, URLs, caller's ip:port) -> bool``: whether a sender that is not a peer is
        remembered as a remote at the URLs its request names, so that it can be answered. Asked at
        every request of such a sender, from a receiving thread; it must not block. By default
        those are who have shown a certificate that ``tls`` trusts, and nobody else: what a
        stranger writes into a request must not choose where we connect to. It is not asked about
        link-local, multicast, unspecified and malformed addresses, which are never learned; what
        a host *name* stands for is its business.
    allow_loopback_remotes : bool
        Whether the policy is asked about loopback addresses.
    inbox : Inbox, optional
        Where messages go that peers send; the node takes them from there.

    Attributes
    ----------
    member_id, cluster_id : int
    config : TransportConfig
        As given, or the defaults.
    peer_urls : tuple of str

    Raises
    ------
    UsageError
        If an ID, a URL or a setting is not valid, a TLS file cannot be loaded, ``raft`` lacks a
        method of ``Raft``, or a callback is not callable or ``async``.

    Notes
    -----
    Thread-safe; every method may be called from a callback, and from a signal's handler at any
    instant. A context manager: starts and stops. One I/O thread serves all peers, and one, the
    poller, dials and probes them.
    """

    def start(self) -> None:
        """Start the threads. Once; ``UsageError`` otherwise."""
        self._start()

    def stop(self) -> int:
        """Close the listeners, stop all peers, end all threads.

        Returns within ``config.stop_timeout_s`` (1 s), whatever the peers and callbacks do; what
        is still in a callback then is told in the log and ends after it. Called from a callback,
        it does not wait for that callback. A second call does what the first has not done yet, and
        waits for the rest: the first may have been interrupted, or run in another thread.

        Returns
        -------
        int
            How many queued messages this call dropped.
        """
        return self._stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def send_snapshot(
        self,
        message: Sendable,
        source: SnapshotSource,
        *,
        size: int | None = None,
        on_progress: Callable[[SnapshotProgress], object] | None = None,
    ) -> SnapshotTransfer:
        """Send a MsgSnap with the database behind it, to ``POST /raft/snapshot`` of its peer.

        Parameters
        ----------
        message : Message, EncodedMessage or raftpb protobuf object
            A MsgSnap with ``to`` and the snapshot's metadata. Encoded before return.
        source : path, binary file, buffer or iterable of buffers
            The database. A file is sent from its position on, its own position is not moved if it
            is a regular one; a path is opened before return. A buffer is anything C-contiguous,
            whatever its items are: bytes, an mmap, an array; ``bytes`` are never a path. Ours
            until the transfer has ended, and closed then, whatever became of it, if it can be
            closed.
        size : int, optional
            Bytes of ``source``. Needed for an iterable and for a file that cannot seek. A source
            that turns out shorter or longer fails, and the peer publishes nothing.
        on_progress : callable, optional
            Called with a ``SnapshotProgress`` at each phase and while bytes move, at most ten
            times a second, by the transfer's thread, which it must not have wait for the transfer;
            for a member that is no peer once, before return.
            What it raises is logged and counted.

        Returns
        -------
        SnapshotTransfer
            Its ``result`` waits, ``cancel`` ends it. For a member that is no peer (remotes are
            none) it has ended with ``MemberNotFoundError``, and Raft is not told.

        Raises
        ------
        UsageError, MarshalError
            If message, source or size are not as above, or the transport was not started or has
            been stopped. ``source`` is closed.
        OSError
            If the path cannot be opened, or what was written to the file not be flushed.
        RuntimeError
            If the system gives no thread. ``source`` is closed.

        Notes
        -----
        Does not wait. Each transfer that begins ends with one ``report_snapshot``, as a MsgSnap
        does, and with ``report_unreachable`` if it failed, but not if it was cancelled or its
        source failed: that says nothing of the peer. One
        transfer to a peer runs at a time and one waits; a newer one takes the place of the one that
        waits, whose outcome for Raft is then the newer one's. ``pause`` and ``cut_peer`` do not
        concern snapshots. Source: etcd
        ``Transport.SendSnapshot``.
        """
        return self._send_snapshot(message, source, size=size, on_progress=on_progress)

    def remove_peer(self, peer_id: int) -> int:
        """Stop to send to a member, as :meth:`stop` does for all.

        Returns
        -------
        int
            How many queued messages were dropped; 0 for an unknown member, with a warning.
        """
        return self._remove_peer(peer_id)

    def remove_all_peers(self) -> int:
        """Remove every peer; the number of messages dropped."""
        return self._remove_all_peers()

    def reload_tls(self) -> bool:
        """Load the TLS files again, changed or not, and have connections made anew.

        Happens by itself within a second or so of a change. Blocks while the files are read.

        Returns
        -------
        bool
            Whether a new set is in force. False if one of the files is broken, which is logged;
            the last good set stays. Also False without ``tls``.
        """
        return self._reload_tls()

    def listen(self, url: str | Iterable[str] | None = None) -> Listener:
        """Receive at ``url``.

        Parameters
        ----------
        url : str or iterable of str, optional
            ``http://host:port``, or ``https://host:port``, which needs ``tls``; port 0 takes a
            free one. By default all of ``peer_urls``. All addresses of a name are listened at;
            ``0.0.0.0`` and ``[::]`` are all of the machine's, the latter with IPv4.

        Returns
        -------
        Listener
            Its ``url`` has the real port. Closed by :meth:`stop`.

        Raises
        ------
        UsageError
            If there is no URL, or the transport is not running.
        OSError
            If a name cannot be resolved or an address bound, which the text names, or
            ``snapshot_dir`` cannot be made.
        """
        return self._listen(url)
