"""The asyncio face: the same Transport, its callbacks delivered on the event loop.

A thread of the library that has something for the node leaves it on the loop and waits for the
outcome, as it would wait in a blocking callback. So nothing queues up that is not held by a
waiting thread: a loop that is stuck makes peers wait and grows nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import ParamSpec, Protocol, Self, TypeVar

from pipeline.callbacks import Callbacks, require_callable, require_no_awaitable, require_raft
from pipeline.config import TransportConfig
from pipeline.errors import MemberRemovedError, RequestRejected, UsageError, without_frames
from pipeline.logs import get_logger
from pipeline.node import Node
from pipeline.receive._receiver import ReceiverStats
from pipeline.receive.listener import Listener as ThreadedListener
from pipeline.remote import RemotePolicy
from pipeline.snapshot.sender import SnapshotProgress
from pipeline.snapshot.sender import SnapshotTransfer as ThreadedTransfer
from pipeline.snapshot.source import SnapshotSource, close_quietly
from pipeline.threads import LibraryThread
from pipeline.tls import TLSInfo
from pipeline.types import Sendable, SnapshotStatus
from pipeline.wire._messages import Message
from pipeline.wire.protocol import format_id

__all__ = ["Listener", "Raft", "SnapshotTransfer", "Transport"]

logger = get_logger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

#: How often a waiting thread looks whether the loop still runs: a loop that ends tells nobody.
LOOP_CHECK_S = 0.5

#: What ``stop`` gives cancelled callbacks to end. They need one turn of the loop, unless they
#: suppress the cancellation or clean up.
CANCEL_TIMEOUT_S = 0.1


class Raft(Protocol):
    """What the node implements: ``pipeline.Raft``, each method plain or ``async``.

    Called on the event loop: one call at a time for one member, in the order in which they came;
    calls for different members run concurrently where they await. A plain method must not block.
    One that waits holds up its member's further calls and a thread of the library, so ``process``
    should not wait for what the same member's next message brings.
    """

    def process(self, message: Message) -> Awaitable[None] | None:
        """Take a message from a peer, which is answered 204 when this has returned.

        ``RequestRejected`` chooses the answer; anything else raised is answered 500. The calls
        are ordered by ``message.from_``.
        """

    def is_id_removed(self, member_id: int) -> Awaitable[bool] | bool:
        """Tell whether the member was removed from the cluster for good."""

    def report_unreachable(self, member_id: int) -> Awaitable[None] | None:
        """Learn that a message to the member was not delivered."""

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> Awaitable[None] | None:
        """Learn how a MsgSnap to the member ended."""


class _Refused(Exception):
    """The call was not made, or not waited for: the loop ended, or the transport stopped."""


class _Call:
    """One callback to be made on the loop, and the thread that waits for its outcome."""

    __slots__ = ("callbacks", "function", "is_given_up", "is_report", "outcome")

    def __init__(
        self,
        function: Callable[[], Awaitable[object] | object],
        callbacks: Callbacks,
        *,
        is_report: bool,
    ) -> None:
        self.function = function
        self.callbacks = callbacks
        #: It is a report, whose outcome nobody needs.
        self.is_report = is_report
        #: Set when nobody waits for it and it was not begun: it is not made any more.
        self.is_given_up = False
        # Completed on the loop only.
        self.outcome: concurrent.futures.Future[object] = concurrent.futures.Future()

    def refuse(self) -> None:
        self.is_given_up = True
        if not self.outcome.done():
            self.outcome.set_exception(_Refused())

    def succeed(self, result: object) -> None:
        if not self.outcome.done():
            self.outcome.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
        else:  # let go before it ended
            self.callbacks.failed("a callback that is not waited for any more", "nobody", error)


class _Deliveries:
    """Calls by member: a queue each, emptied by a task each. Used on the loop, but for ``call``."""

    def __init__(self) -> None:
        #: Counts what is raised when no thread waits any more; the transport's, once there is one.
        self.callbacks = Callbacks(logger)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._is_closed = False
        self._queues: dict[int, deque[_Call]] = {}  # the call being made stays at the left end
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()  # those whose callback called stop

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()

    def call(
        self,
        member_id: int,
        function: Callable[[], Awaitable[object] | object],
        *,
        is_report: bool = False,
    ) -> object:
        """Have ``function`` called on the loop; its result or what it raises. Blocks.

        Raises ``_Refused`` when it will not be called, and ``UsageError`` on the loop's thread,
        which would wait for itself.
        """
        loop = self._loop
        if loop is None or self._is_closed:
            raise _Refused
        if threading.get_ident() == self._thread_id:
            raise UsageError("called on the event loop: it would wait for itself")
        call = _Call(function, self.callbacks, is_report=is_report)
        try:
            loop.call_soon_threadsafe(self._take, member_id, call)
        except RuntimeError:  # closed
            raise _Refused from None
        while not call.outcome.done():
            concurrent.futures.wait((call.outcome,), LOOP_CHECK_S)
            if not loop.is_running() and not call.outcome.done():
                call.is_given_up = True
                raise _Refused
        try:
            return call.outcome.result()
        finally:
            del call  # its outcome's traceback has this frame: no cycle for what is raised

    def let_go(self, *, is_stop: bool) -> None:
        """Have no thread wait for the callback that the current task runs, if it runs one.

        Called before something that waits for the library's threads: those that wait for this
        callback, or for their turn after it, could not end first. Only a stop also waits for
        those in ``process``; it has no use for those that wait for their turn.
        """
        for member_id, task in self._tasks.items():
            if task is asyncio.current_task():
                for call in self._queues[member_id]:
                    if call.is_report:
                        call.succeed(None)
                    elif is_stop:
                        call.refuse()
                if is_stop:
                    self._stopping.add(task)

    async def close(self) -> None:
        """Refuse what waits and what comes, cancel the callbacks that run but those that stop."""
        self._is_closed = True
        for queue in self._queues.values():
            for call in queue:
                call.refuse()
        tasks = [task for task in self._tasks.values() if task not in self._stopping]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT_S)

    def _take(self, member_id: int, call: _Call) -> None:
        if self._is_closed:
            call.refuse()
            return
        queue = self._queues.setdefault(member_id, deque())
        queue.append(call)
        if len(queue) == 1:
            name = f"pipeline-member-{format_id(member_id)}"
            calls = self._make_calls(member_id, queue)
            try:
                task = asyncio.get_running_loop().create_task(calls, name=name)
            except BaseException as error:  # the application's task factory, or what it has run
                calls.close()
                self._tasks.pop(member_id, None)
                for waiting in self._queues.pop(member_id, ()):
                    waiting.fail(error)
                if not isinstance(error, Exception):
                    raise  # ends the program, as anywhere on the loop
                return
            if not task.done():
                self._tasks[member_id] = task
            task.add_done_callback(partial(self._clear, member_id))

    async def _make_calls(self, member_id: int, queue: deque[_Call]) -> None:
        # A task factory that is eager runs this before create_task has returned.
        task = asyncio.current_task()
        assert task is not None
        self._tasks[member_id] = task
        while queue:
            # Not by a name of its own: what it raises may hold this frame.
            if not queue[0].is_given_up and not self._is_closed:
                await self._make_call(queue[0])
            queue.popleft()
        # In the same turn that found the queue empty: what is taken next makes a task anew.
        del self._queues[member_id], self._tasks[member_id]

    def _clear(self, member_id: int, task: asyncio.Task[None]) -> None:
        """Refuse what a task left that was cancelled, perhaps before it began, or that broke."""
        if self._tasks.get(member_id) is task:
            for call in self._queues[member_id]:
                call.refuse()
            del self._queues[member_id], self._tasks[member_id]

    async def _make_call(self, call: _Call) -> None:
        try:
            result = call.function()
            if inspect.isawaitable(result):
                result = await result
            require_no_awaitable("a callback", result)  # one that was wrapped in another
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            assert task is not None
            if task.cancelling():
                raise
            call.fail(error)  # of something it awaited: a failure like another
        except (KeyboardInterrupt, SystemExit) as error:
            call.fail(error)
            raise  # ends the program, as anywhere on the loop
        except BaseException as error:
            call.fail(error)
        else:
            call.succeed(result)
        finally:
            del call  # or its outcome and this frame would hold one another


class _Bridge:
    """The node as the library's threads know it: ``pipeline.Raft``."""

    def __init__(
        self,
        raft: Raft,
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None,
    ) -> None:
        self.deliveries = _Deliveries()
        self._raft = raft
        self._on_critical_error = on_critical_error

    def process(self, message: Message) -> None:
        try:
            self.deliveries.call(message.from_, lambda: self._raft.process(message))
        except _Refused:
            # What a listener answers that closes; the message may have been processed.
            raise RequestRejected(503, b"shutting down\n") from None

    def is_id_removed(self, member_id: int) -> bool:
        try:
            return bool(
                self.deliveries.call(member_id, lambda: self._raft.is_id_removed(member_id))
            )
        except _Refused:
            return False

    def report_unreachable(self, member_id: int) -> None:
        self._report(member_id, lambda: self._raft.report_unreachable(member_id))

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self._report(member_id, lambda: self._raft.report_snapshot(member_id, status))

    def critical_error(self, error: MemberRemovedError) -> None:
        callback = self._on_critical_error
        assert callback is not None
        self._report(error.peer_id, lambda: callback(error))

    def _report(self, member_id: int, function: Callable[[], Awaitable[None] | None]) -> None:
        try:
            self.deliveries.call(member_id, function, is_report=True)
        except _Refused:
            logger.debug("nobody is told of peer %s: the loop has ended", format_id(member_id))


class Listener:
    """A listener of :meth:`Transport.listen`. Also an async context manager.

    Attributes
    ----------
    url : str
        Where it is served, with the real port; of several the first one given.
    urls : tuple of str
        All of them, in the order given.
    """

    def __init__(self, listener: ThreadedListener) -> None:
        self._listener = listener
        self.url = listener.url
        self.urls = listener.urls

    def stats(self) -> ReceiverStats:
        """Return what was received and what had to be limited."""
        return self._listener.stats()

    async def close(self, deadline_s: float = 1.0) -> None:
        """Close as :meth:`pipeline.Listener.close` does, off the loop."""
        await _in_thread(self._listener.close, deadline_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SnapshotTransfer:
    """A snapshot on its way: what ``Transport.begin_snapshot`` returns. Used on the loop.

    Attributes
    ----------
    peer_id : int
        The member it is for.
    """

    def __init__(self, transfer: ThreadedTransfer) -> None:
        self._transfer = transfer
        self.peer_id = transfer.peer_id

    @property
    def progress(self) -> SnapshotProgress:
        """How far it is at this moment."""
        return self._transfer.progress

    def cancel(self) -> None:
        """End it, in whatever phase; nothing if it has ended."""
        self._transfer.cancel()

    def done(self) -> bool:
        """Tell whether it has ended, and Raft has been told."""
        return self._transfer.done()

    async def result(self) -> None:
        """Wait until it has ended; raises what ``pipeline.SnapshotTransfer.result`` does.

        A task that is cancelled while it waits leaves it running: :meth:`cancel` ends it.
        """
        waiting = asyncio.wrap_future(self._transfer.future)
        try:
            await asyncio.wait((waiting,))
        finally:
            waiting.cancel()  # nothing, unless we were
        if not waiting.cancelled():
            waiting.exception()  # it is seen to
        self._transfer.result()


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
    on_critical_error : callable, optional
        Called on the loop, plain or ``async``, in order with the other callbacks of that peer.
    remote_policy : callable, optional
        As ``pipeline.Transport`` has it: plain, called from the library's threads, not on the loop.
    allow_loopback_remotes : bool

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

    def __init__(
        self,
        member_id: int,
        cluster_id: int,
        raft: Raft,
        *,
        peer_urls: Iterable[str] = (),
        tls: TLSInfo | None = None,
        config: TransportConfig | None = None,
        on_critical_error: Callable[[MemberRemovedError], Awaitable[None] | None] | None = None,
        remote_policy: RemotePolicy | None = None,
        allow_loopback_remotes: bool = False,
    ) -> None:
        require_raft(raft, is_async_taken=True)
        require_callable("on_critical_error", on_critical_error, is_async_taken=True)
        bridge = _Bridge(raft, on_critical_error)
        self._deliveries = bridge.deliveries
        super().__init__(
            member_id,
            cluster_id,
            bridge,
            peer_urls=peer_urls,
            tls=tls,
            config=config,
            on_critical_error=None if on_critical_error is None else bridge.critical_error,
            remote_policy=remote_policy,
            allow_loopback_remotes=allow_loopback_remotes,
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
            dropped = await _in_thread(self._stop)
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
        begun = asyncio.ensure_future(_in_thread(begin))
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
        self._deliveries.let_go(is_stop=False)
        return await _in_thread(self._remove_peer, peer_id)

    async def remove_all_peers(self) -> int:
        """Remove every peer, as :meth:`remove_peer`; the number of messages dropped."""
        self._deliveries.let_go(is_stop=False)
        return await _in_thread(self._remove_all_peers)

    async def reload_tls(self) -> bool:
        """Load the TLS files again, off the loop. As ``pipeline.Transport.reload_tls``."""
        return await _in_thread(self._reload_tls)

    async def listen(self, url: str | Iterable[str] | None = None) -> Listener:
        """Receive at ``url``, by default at all of ``peer_urls``; names are resolved off the loop.

        ``UsageError`` if there is no URL or the transport is not running, ``OSError`` if the
        address cannot be bound. :meth:`stop` closes it.
        """
        return Listener(await _in_thread(self._listen, url))


def _cancel_begun(begun: asyncio.Task[ThreadedTransfer]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().cancel()


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks in a thread of its own.

    Not in the loop's executor: that may be full of what waits for us, and closing the loop waits
    for it.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # it cannot be cancelled, only not be waited for
    LibraryThread(_run, "pipeline-aio", (done, partial(function, *args, **kwargs))).start()
    waiting = asyncio.wrap_future(done)
    try:
        return await waiting
    finally:
        del done, waiting  # they hold what is raised, which holds this frame


def _run(done: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        without_frames(error)  # this one holds where it is kept
        done.set_exception(error)
