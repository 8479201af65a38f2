"""Calls that the library's threads have made on the event loop, and wait for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from pipeline.callbacks import Callbacks, require_no_awaitable
from pipeline.errors import UsageError
from pipeline.logs import get_logger
from pipeline.wire.protocol import format_id

__all__ = ["Call", "Deliveries", "Refused"]

logger = get_logger(__name__)

#: How often a waiting thread looks whether the loop still runs: a loop that ends tells nobody.
LOOP_CHECK_S = 0.5

#: What ``stop`` gives cancelled callbacks to end. They need one turn of the loop, unless they
#: suppress the cancellation or clean up.
CANCEL_TIMEOUT_S = 0.1


#: The member, and which of its calls wait for one another.
_Key: TypeAlias = tuple[int, str]


class Refused(Exception):
    """The call was not made, or not waited for: the loop ended, or the transport stopped."""


class Call:
    """One callback to be made on the loop, and the thread that waits for its outcome."""

    __slots__ = ("callbacks", "function", "has_let_go", "is_given_up", "is_report", "outcome")

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
        #: Set when it waits for the library's threads: none of them waits for it, or behind it.
        self.has_let_go = False
        # Completed on the loop only.
        self.outcome: concurrent.futures.Future[object] = concurrent.futures.Future()

    def refuse(self) -> None:
        self.is_given_up = True
        if not self.outcome.done():
            self.outcome.set_exception(Refused())

    def succeed(self, result: object) -> None:
        if not self.outcome.done():
            self.outcome.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
        else:  # let go before it ended
            self.callbacks.failed("a callback that is not waited for any more", "nobody", error)


class Deliveries:
    """Calls by member and lane: a queue each, emptied by a task each.

    Used on the loop, but for ``call``.
    """

    def __init__(self) -> None:
        #: Counts what is raised when no thread waits any more; the transport's, once there is one.
        self.callbacks = Callbacks(logger)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._is_closed = False
        self._queues: dict[_Key, deque[Call]] = {}  # the call being made stays at the left end
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
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
        lane: str = "",
    ) -> object:
        """Have ``function`` called on the loop; its result or what it raises. Blocks.

        It waits for the member's calls before it in the same ``lane``, and for no others.
        Raises ``Refused`` when it will not be called, and ``UsageError`` on the loop's thread,
        which would wait for itself.
        """
        loop = self._loop
        if loop is None or self._is_closed:
            raise Refused
        if threading.get_ident() == self._thread_id:
            raise UsageError("called on the event loop: it would wait for itself")
        call = Call(function, self.callbacks, is_report=is_report)
        try:
            loop.call_soon_threadsafe(self._take, (member_id, lane), call)
        except RuntimeError:  # closed
            raise Refused from None
        while not call.outcome.done():
            concurrent.futures.wait((call.outcome,), LOOP_CHECK_S)
            if not loop.is_running() and not call.outcome.done():
                call.is_given_up = True
                raise Refused
        try:
            return call.outcome.result()
        finally:
            del call  # its outcome's traceback has this frame: no cycle for what is raised

    def let_go(self, *, is_stop: bool) -> None:
        """Have no thread wait for the callback that the current task runs, if it runs one.

        Called before something that waits for the library's threads: those that wait for this
        callback, or for their turn after it, now or later, could not end first. Only a stop also
        waits for those in ``process``; it has no use for those that wait for their turn.
        """
        for key, task in self._tasks.items():
            if task is asyncio.current_task():
                if is_stop:
                    self._stopping.add(task)
                self._queues[key][0].has_let_go = True
                for call in self._queues[key]:
                    self._let_go_of(call, task)

    def _let_go_of(self, call: Call, task: asyncio.Task[None]) -> None:
        if call.is_report:
            call.succeed(None)
        elif task in self._stopping:
            call.refuse()

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

    def _take(self, key: _Key, call: Call) -> None:
        if self._is_closed:
            call.refuse()
            return
        queue = self._queues.setdefault(key, deque())
        queue.append(call)
        if queue[0].has_let_go:
            self._let_go_of(call, self._tasks[key])
        if len(queue) == 1:
            member_id, lane = key
            name = f"pipeline-member-{format_id(member_id)}{lane and '-'}{lane}"
            calls = self._make_calls(key, queue)
            try:
                task = asyncio.get_running_loop().create_task(calls, name=name)
            except BaseException as error:  # the application's task factory, or what it has run
                calls.close()
                self._tasks.pop(key, None)
                for waiting in self._queues.pop(key, ()):
                    waiting.fail(error)
                if not isinstance(error, Exception):
                    raise  # ends the program, as anywhere on the loop
                return
            if not task.done():
                self._tasks[key] = task
            task.add_done_callback(partial(self._clear, key))

    async def _make_calls(self, key: _Key, queue: deque[Call]) -> None:
        # A task factory that is eager runs this before create_task has returned.
        task = asyncio.current_task()
        assert task is not None
        self._tasks[key] = task
        while queue:
            # Not by a name of its own: what it raises may hold this frame.
            if not queue[0].is_given_up and not self._is_closed:
                await self._make_call(queue[0])
            queue.popleft()
        # In the same turn that found the queue empty: what is taken next makes a task anew.
        del self._queues[key], self._tasks[key]

    def _clear(self, key: _Key, task: asyncio.Task[None]) -> None:
        """Refuse what a task left that was cancelled, perhaps before it began, or that broke."""
        if self._tasks.get(key) is task:
            for call in self._queues[key]:
                call.refuse()
            del self._queues[key], self._tasks[key]

    async def _make_call(self, call: Call) -> None:
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
