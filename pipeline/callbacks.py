"""The application's code that the library calls: what it must be, and that it ends nothing of ours.

A callback may raise whatever there is, ``SystemExit`` and ``KeyboardInterrupt`` included, and may
be one that was meant for an event loop. Its thread has other workers, peers and connections to
serve, so what it raises is counted and logged, and what it returns is believed only if it is an
answer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import TypeVar

from pipeline.errors import UsageError
from pipeline.logs import About, Counter, Logger, Throttle, is_for_caller, show

__all__ = [
    "Callbacks",
    "NotAwaitedError",
    "require_callable",
    "require_no_awaitable",
    "require_raft",
]

T = TypeVar("T")

_RAFT_METHODS = ("process", "is_id_removed", "report_unreachable", "report_snapshot")


def require_raft(raft: object, *, has_inbox: bool = False, is_async_taken: bool = False) -> None:
    """Raise ``UsageError`` unless ``raft`` has the methods of ``Raft``, and plain ones.

    Parameters
    ----------
    raft : object
    has_inbox : bool
        Whether messages go to an inbox, and ``process`` is not called.
    is_async_taken : bool
        Whether ``async`` methods are taken, which ``pipeline.aio`` awaits.
    """
    for name in _RAFT_METHODS:
        if name == "process" and has_inbox:
            continue
        try:
            method = getattr(raft, name)
        except AttributeError:
            method = None
        if not callable(method):
            raise UsageError(f"raft: {show(raft)} has no method {name}")
        if not is_async_taken and _is_async(method):
            raise UsageError(
                f"raft: {name} is async, and would be called by a thread that awaits nothing; "
                "pipeline.aio.Transport takes it"
            )


def require_callable(argument: str, callback: object, *, is_async_taken: bool = False) -> None:
    """Raise ``UsageError`` unless ``callback`` is None, or can be called and is plain."""
    if callback is None:
        return
    if not callable(callback):
        raise UsageError(f"{argument}: {show(callback)} is not callable")
    if not is_async_taken and _is_async(callback):
        raise UsageError(f"{argument}: {show(callback)} is async, and would not be awaited")


class NotAwaitedError(UsageError):
    """A callback returned what has yet to be run, to a caller that awaits nothing."""


def require_no_awaitable(name: str, result: object) -> None:
    """Raise ``NotAwaitedError`` if a callback returned what has yet to be run; it is closed.

    It answers nothing and has done nothing, and yet it is true.
    """
    if not isinstance(result, (Awaitable, AsyncIterator, Generator)):
        return
    shown = show(result)
    if isinstance(result, (Coroutine, Generator)):
        result.close()  # or Python would warn that it was never awaited
    raise NotAwaitedError(f"{name}: returned {shown}, which is not awaited here")


class Callbacks:
    """Calls the application. Whatever it raises is logged and counted, and goes no further.

    Parameters
    ----------
    logger : Logger
        Told of each kind of failure once a second, with the traceback; of a callback that is
        async once.
    whole : Callbacks, optional
        Counts them, too: those of the whole transport.

    Notes
    -----
    Thread-safe. In the main thread, which is the application's, what ends a program is raised on.
    """

    def __init__(self, logger: Logger, whole: Callbacks | None = None) -> None:
        self._logger = logger
        self._throttle = Throttle(logger)
        self._whole = whole
        self._count = Counter()
        self._told: set[str] = set()  # of these it was logged that they are async

    @property
    def errors(self) -> int:
        """How many calls raised, or returned what has yet to be awaited."""
        return self._count.value

    def call(self, name: str, about: str, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback``, known as ``name`` in the log; ``about`` tells whom it is about."""
        try:
            result = callback(*args)
            if result is not None:
                require_no_awaitable(name, result)
        except BaseException as error:
            self.failed(name, about, error)

    def tell(self, raft: object, name: str, about: str, *args: object) -> None:
        """Call a method of ``raft``; that it is not to be had any more is a failure like others."""
        self.call(name, about, lambda: getattr(raft, name)(*args))

    def ask(
        self,
        name: str,
        about: str,
        callback: Callable[..., object],
        *args: object,
        fields: About | None = None,
    ) -> bool:
        """Call a callback that decides; False is also what it says that raises.

        ``fields`` are those of what is logged then.
        """
        try:
            result = callback(*args)
            if not isinstance(result, bool):
                require_no_awaitable(name, result)
            return bool(result)
        except BaseException as error:
            self.failed(name, about, error, fields)
            return False

    def failed(
        self, name: str, about: str, error: BaseException, fields: About | None = None
    ) -> None:
        """Count and log what a callback raised."""
        self.count(name, error)
        if not isinstance(error, NotAwaitedError):
            whose = fields or About()
            text, reason = f"{name} raised for %s", f"{name} raised"
            self._throttle.error(text, about, exc_info=error, reason=reason, **whose)

    def count(self, name: str, error: BaseException) -> None:
        """Count what a callback raised, and is logged elsewhere; tell of one that is async."""
        self._add()
        if isinstance(error, NotAwaitedError) and name not in self._told:
            self._told.add(name)
            self._logger.error("%s", error, reason=str(error))
        if is_for_caller(error):
            raise error

    def _add(self) -> None:
        self._count.add()
        if self._whole is not None:
            self._whole._add()


def _is_async(callback: object) -> bool:
    """Tell whether calling it only makes a coroutine."""
    while isinstance(callback, functools.partial):
        callback = callback.func
    return any(
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        for function in (callback, getattr(type(callback), "__call__", None))  # noqa: B004
    )
