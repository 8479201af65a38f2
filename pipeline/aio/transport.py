"""The transport: what waits is awaited, and done in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack, overload

from pipeline.aio.blocking import in_thread
from pipeline.aio.inbox import Inbox
from pipeline.aio.listener import Listener
from pipeline.aio.raft import AnyRaft, Bridge, ProcessingRaft, RaftReports
from pipeline.aio.transfer import SnapshotTransfer
from pipeline.arguments import require_instance
from pipeline.callbacks import require_callable, require_raft
from pipeline.config import TransportConfig
from pipeline.errors import MemberRemovedError, UsageError
from pipeline.logs import get_logger
from pipeline.node import Node, NodeSettings
from pipeline.peer import Peer
from pipeline.remote import RemotePolicy
from pipeline.send.changes import PeerChange
from pipeline.send.sendable import Sendable
from pipeline.snapshot.sender import SnapshotProgress
from pipeline.snapshot.sender import SnapshotTransfer as ThreadedTransfer
from pipeline.snapshot.source import SnapshotSource, close_quietly
from pipeline.tls import TLSInfo

__all__ = ["Transport"]

logger = get_logger(__name__)


async def _nothing_to_stop(_: object) -> int:
    """Be the ``stop`` of what another process runs: no message is dropped by it."""
    return 0


class Transport(Node):
    """The network half of a Raft node, for asyncio. ``pipeline.Transport`` says what it does.

    Parameters
    ----------
    member_id, cluster_id : int
        Ours, 64 bits.
    raft : pipeline.aio.Raft
        Called on the loop; its methods are plain or ``async``.
    peer_urls : iterable of str
        Where peers reach us; sent as X-PeerURLs.
    tls : TLSInfo, optional
        As ``pipeline.Transport`` has it; ``allow_member`` is plain, and not called on the loop.
    config : TransportConfig, optional
        The settings; the defaults when left out.
    on_critical_error : callable, optional
        Called on the loop, plain or ``async``, in order with the other callbacks of that peer.
    on_peer_change : callable, optional
        As ``pipeline.Transport`` has it, but called as ``on_critical_error`` is.
    remote_policy : callable, optional
        As ``pipeline.Transport`` has it: plain, called from the library's threads, not on the loop.
    allow_loopback_remotes : bool
        As ``pipeline.Transport`` has it.
    inbox : pipeline.aio.Inbox, optional
        Where messages go that peers send; the node takes them from there, and ``raft`` needs no
        ``process``.

    Raises
    ------
    UsageError
        As ``pipeline.Transport`` raises it, but for what may be ``async`` here.

    Notes
    -----
    An async context manager: starts and stops. It belongs to the loop that runs ``start``.
    What is plain here never blocks: ``send``, ``add_peer``, ``update_peer`` and what reads
    counters may be called on the loop, from callbacks and from any thread. What may wait is
    ``async`` and waits in a thread of its own: ``stop``, ``listen``, ``remove_peer``,
    ``remove_all_peers``, ``send_snapshot``, ``begin_snapshot`` and ``reload_tls``; call these, and
    ``start``, on the loop. A handler of ``signal.signal`` may call what is plain; what is ``async``
    it has the loop run, as with ``loop.add_signal_handler``.

    ``asgi_app`` may run on the same loop. ``wsgi_app`` is for threads off it: on the loop it would
    wait for itself.

    While a callback has not returned, the thread that delivers it waits: a message's sender has no
    answer, and no more than ``config.receiver.handlers`` messages of each listener and
    ``config.dispatchers`` reports are pending. If the loop ends without ``stop``, messages are
    answered 503 and reports are dropped.
    """

    _stop_of_foreign = staticmethod(_nothing_to_stop)

    @overload
    def __init__(
        self,
        member_id: int,
        cluster_id: int,
        raft: ProcessingRaft,
        *,
        inbox: None = None,
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None = ...,
        on_peer_change: Callable[[PeerChange], Awaitable[None] | None] | None = ...,
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
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None = ...,
        on_peer_change: Callable[[PeerChange], Awaitable[None] | None] | None = ...,
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
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None = None,
        on_peer_change: Callable[[PeerChange], Awaitable[None] | None] | None = None,
        remote_policy: RemotePolicy | None = None,
        allow_loopback_remotes: bool = False,
        inbox: Inbox[Any] | None = None,
    ) -> None:
        if inbox is not None:
            require_instance("inbox", inbox, Inbox, "pipeline.aio.Inbox")
        require_raft(raft, has_inbox=inbox is not None, is_async_taken=True)
        require_callable("on_critical_error", on_critical_error, is_async_taken=True)
        require_callable("on_peer_change", on_peer_change, is_async_taken=True)
        bridge = Bridge(raft, on_critical_error, on_peer_change)
        self._deliveries = bridge.deliveries
        threaded: Any = None if inbox is None else inbox.threaded  # the bridge suits either
        super().__init__(
            member_id,
            cluster_id,
            bridge,
            peer_urls=peer_urls,
            tls=tls,
            config=config,
            on_critical_error=None if on_critical_error is None else bridge.critical_error,
            on_peer_change=None if on_peer_change is None else bridge.peer_change,
            remote_policy=remote_policy,
            allow_loopback_remotes=allow_loopback_remotes,
            inbox=threaded,
        )
        self._deliveries.callbacks = self.callbacks
        self._stopping: asyncio.Task[int] | None = None
        self._has_stopped = False

    async def start(self) -> None:
        """Start the I/O thread; callbacks come to the loop that runs. Once, else ``UsageError``."""
        # Not in a thread: it starts two threads, as getting off the loop would start one.
        self._start()
        self._deliveries.open()

    async def stop(self) -> int:
        """Close the listeners, stop all peers, end all threads.

        Callbacks that run have ``config.stop_timeout_s`` to end, then they are cancelled; those
        that wait for their turn are not made. Called from a callback, it does not wait for that
        callback. A second call waits for the first; one that is cancelled leaves it running. If the
        loop's end has cancelled the first itself, the second does what is left.

        Returns
        -------
        int
            How many queued messages were dropped.
        """
        self._deliveries.let_go(is_stop=True)
        # One that Ctrl-C ended, with the loop's other tasks, has perhaps not seen to everything.
        if self._stopping is None or (self._stopping.done() and not self._has_stopped):
            stopping = self._stop_once()
            try:
                self._stopping = asyncio.get_running_loop().create_task(stopping)
            except Exception:  # the application's task factory; it keeps nobody from stopping
                stopping.close()
                logger.warning("stopping without a task of its own", exc_info=True)
                return await self._stop_once()
        return await asyncio.shield(self._stopping)

    async def _stop_once(self) -> int:
        try:
            dropped = await in_thread(self._stop)
        finally:
            await self._deliveries.close()
        self._has_stopped = True
        return dropped

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def send_snapshot(
        self,
        message: Sendable,
        source: SnapshotSource,
        *,
        size: int | None = None,
        on_progress: Callable[[SnapshotProgress], object] | None = None,
    ) -> None:
        """Send a MsgSnap with the database behind it; returns when the peer has answered 204.

        Takes and raises what ``pipeline.Transport.send_snapshot`` and its transfer's ``result``
        do. ``source`` is opened and read off the loop; an asynchronous iterable is none.
        ``on_progress`` is called on the loop, and must not block. A task that is cancelled while
        it waits here cancels the transfer.
        """
        transfer = await self.begin_snapshot(message, source, size=size, on_progress=on_progress)
        try:
            await transfer.result()
        except asyncio.CancelledError:
            transfer.cancel()
            raise

    async def begin_snapshot(
        self,
        message: Sendable,
        source: SnapshotSource,
        *,
        size: int | None = None,
        on_progress: Callable[[SnapshotProgress], object] | None = None,
    ) -> SnapshotTransfer:
        """Do what :meth:`send_snapshot` does, but return when the source is open."""
        report: Callable[[SnapshotProgress], object] | None = None
        if on_progress is not None:
            try:
                require_callable("on_progress", on_progress)
            except UsageError:
                close_quietly(source)
                raise
            # Called on the loop, where nobody else takes care of what it raises or returns.
            call = partial(self.callbacks.call, "on_progress", "a snapshot", on_progress)
            report = partial(asyncio.get_running_loop().call_soon_threadsafe, call)
        begin = partial(self._send_snapshot, message, source, size=size, on_progress=report)
        begun = asyncio.ensure_future(in_thread(begin))
        try:
            return SnapshotTransfer(await asyncio.shield(begun))
        except asyncio.CancelledError:
            begun.add_done_callback(_cancel_begun)  # nobody else will
            raise

    async def remove_peer(self, peer_id: int) -> int:
        """Stop to send to a member; the number of messages dropped.

        Waits for reports that run, at most ``config.stop_timeout_s``; not for the one it is
        called from.
        """
        self._let_go_of(peer for peer in list(self._peers.values()) if peer.peer_id == peer_id)
        return await in_thread(self._remove_peer, peer_id)

    async def remove_all_peers(self) -> int:
        """Remove every peer, as :meth:`remove_peer`; the number of messages dropped."""
        self._let_go_of(list(self._peers.values()))
        return await in_thread(self._remove_all_peers)

    def _let_go_of(self, peers: Iterable[Peer]) -> None:
        """Have the threads of peers that are to be removed wait for no callback that does it.

        The one that tells of changes would go on to the next, to be told after the removal.
        """
        for peer in peers:
            peer.pipeline.tell_no_change()
        self._deliveries.let_go(is_stop=False)

    async def reload_tls(self) -> bool:
        """Load the TLS files again, off the loop. As ``pipeline.Transport.reload_tls``."""
        return await in_thread(self._reload_tls)

    async def listen(self, url: str | Iterable[str] | None = None) -> Listener:
        """Receive at ``url``, by default at all of ``peer_urls``; names are resolved off the loop.

        ``UsageError`` if there is no URL or the transport is not running, ``OSError`` if the
        address cannot be bound. :meth:`stop` closes it.
        """
        return Listener(await in_thread(self._listen, url))


def _cancel_begun(begun: asyncio.Task[ThreadedTransfer]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().cancel()
