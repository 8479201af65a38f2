"""The dispatcher: a few Python threads for what the I/O loop cannot do without the GIL.

Answers that are not a plain 204, and calls of Raft come here as events, but for those that call
nothing of the application's: connections are dialled and closed in the poller's thread. Events
of one worker come one at a time; of different workers they run in parallel, so a callback that
blocks holds up its own worker only, until all threads (``TransportConfig.dispatchers``) are
blocked.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

from pipeline._core import ActiveFlag, IOLoop, Sender
from pipeline.config import PipelineConfig
from pipeline.errors import UsageError
from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.net.dialling import Dialer
from pipeline.net.poller import Poller
from pipeline.net.pool import PooledConnection
from pipeline.threads import LibraryThread

__all__ = ["Dispatcher"]

logger = get_logger(__name__)

_all: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


class Dispatcher:
    """An I/O loop, the threads that serve it, and the poller, which dials for it.

    Parameters
    ----------
    name : str
        Goes into the threads' names: ``pipeline-io-<name>``, of which Linux shows 15
        characters, ``pipeline-dispatch-<name>-<n>`` and ``pipeline-poll-<name>``.
    queue_bytes : int
        Budget for the bytes queued by all pipelines on this loop.
    max_threads : int
        Threads are started one by one, when an event waits and no thread does.

    Notes
    -----
    Thread-safe. Threads are daemons: nothing here can hold up the interpreter's exit.
    """

    def __init__(self, name: str, *, queue_bytes: int, max_threads: int) -> None:
        self.name = name
        self.loop = IOLoop(queue_bytes, f"pipeline-io-{name}")
        self.poller = Poller(name)
        self.dialer = Dialer(self.poller)
        self.poller.attach(_Connects(self.loop))
        self._max_threads = max_threads
        # One at a time: senders are opened, threads added and the loop ended. Nothing is waited for
        # under it but the loop's end.
        self._lock = lock_of(self)
        self._threads: list[LibraryThread] = []
        self._is_stopped = False
        self._tasks: deque[Callable[[], None]] = deque()

    def start(self) -> None:
        """Start the I/O thread, the poller and the first dispatcher thread.

        ``UsageError`` once stopped.
        """
        with self._lock:
            if self._is_stopped:
                raise UsageError("start: it was stopped")
            self.poller.start()
            try:
                self.loop.start(self.poller.wake_fd)
            except BaseException:
                self.poller.stop(0.0)
                raise
        _all.add(self)
        try:
            self._add_thread()
        except BaseException:
            self.loop.stop()  # first, for it wakes the poller
            self.poller.stop(0.0)
            raise

    def open(
        self,
        sender: Sender,
        active: ActiveFlag,
        config: PipelineConfig,
        connections: list[PooledConnection],
    ) -> None:
        """Have the loop run a sender's workers (``Sender.open``); ``UsageError`` once stopped."""
        with self._lock:
            # The loop looks as well: a signal's handler may stop us on the way there.
            sender.open(self.loop, active, config, connections)

    def stop(self, deadline: float) -> bool:
        """End all threads; every pipeline has been told to stop before. Any number of times.

        Parameters
        ----------
        deadline : float
            ``time.monotonic()`` until which running callbacks are waited for.

        Returns
        -------
        bool
            Whether all threads ended. One that is still in a callback ends by itself after it.
        """
        with self._lock:
            self._is_stopped = True
            # One that is being removed at this moment may not have got to it.
            for sender in list(self.loop.senders):
                sender.begin_stop()
            self.loop.stop()
            # After the loop, which wakes it, and before the events are closed, for each dial that
            # fails is one.
            self.poller.stop(deadline)
            self.loop.close_events()
            threads = list(self._threads)
        return False not in [thread.wait_ended(deadline) for thread in threads]

    def is_current_thread(self) -> bool:
        """Tell whether the caller runs in one of our threads, that is, in a callback."""
        return threading.current_thread() in self._threads

    def call_soon(self, task: Callable[[], None]) -> None:
        """Run ``task`` in a dispatcher thread. Never waits."""
        self._tasks.append(task)
        self.loop.queue_tasks()
        if self._is_stopped:
            # A peer may be removed while everything is being stopped: our threads may be gone.
            name = f"pipeline-dispatch-{self.name}-late"
            LibraryThread(self._run_tasks, name).start()

    def _add_thread(self) -> None:
        with self._lock:
            count = len(self._threads)
            if self._is_stopped or count >= self._max_threads:
                return
            thread = LibraryThread(self._run, f"pipeline-dispatch-{self.name}-{count}")
            self._threads.append(thread)  # before it runs: whoever stops us is to wait for it
        try:
            thread.start()
        except RuntimeError:  # there are no more threads to be had
            self._threads.remove(thread)
            raise

    def _try_add_thread(self) -> None:
        try:
            self._add_thread()
        except Exception:
            # No more threads to be had: the ones there are go on, one event after another.
            logger.warning("cannot start another dispatcher thread", exc_info=True)

    def _run(self) -> None:
        while (event := self.loop.next_event()) is not None:
            # Before an event that may block: let another thread wait for the next one.
            if len(self._threads) < self._max_threads and not self.loop.has_waiter():
                self._try_add_thread()
            subject, kind, error = event
            if subject is None:
                self._run_tasks()
            else:
                handle = subject.handle
                logger.survive("an event was not handled", handle, kind, error)
                del handle
            del event, subject  # keep nothing alive while waiting
        self._run_tasks()

    def _run_tasks(self) -> None:
        for sender in self.loop.take_expired():
            self._tasks.append(sender.on_expired)
        while True:
            try:
                task = self._tasks.popleft()
            except IndexError:
                return
            logger.survive("a task failed", task)

    def _forget_after_fork(self) -> None:
        self.loop.forget_after_fork()
        self.poller.forget_after_fork()
        self._threads = []
        self._is_stopped = True


class _Connects:
    """Has the loop's workers and streams dialled for: a client of the poller."""

    def __init__(self, loop: IOLoop) -> None:
        self._loop = loop

    def next_due(self) -> float:
        """Never: the loop wakes the poller."""
        return math.inf

    def check_time(self, now: float) -> None:
        """See to those that need it."""
        for subject, kind in self._loop.take_connects():
            subject.dial(kind)

    def end(self) -> None:
        """See to them once more: the dialler, which has ended, fails the dials."""
        self.check_time(math.inf)


def _after_fork_in_child() -> None:
    for dispatcher in list(_all):
        dispatcher._forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
