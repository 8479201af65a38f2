"""How the library logs: with Python's ``logging``, with fields, and without ever raising.

Every record has the attributes of :class:`Fields`, None where there is nothing to say: what a
program filters by, and a formatter may name in any line (docs/operations.md).

Logging runs the application's code: handlers, filters, formatters, and ``__repr__`` of what is
shown. A thread that has workers, peers or connections to serve must survive all of it, and a line
that cannot be written must not hide what it was to tell of.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypedDict, Unpack

from pipeline.locks import lock_of
from pipeline.reasons import explanation_of

__all__ = [
    "FIELDS",
    "About",
    "Counter",
    "Fields",
    "Logger",
    "Throttle",
    "get_logger",
    "is_for_caller",
    "lost_lines",
    "show",
]

#: Between two warnings of one text: what a peer does a thousand times a second is told once.
INTERVAL_S = 1.0

#: Characters of an object that ``show`` shows: the ``__repr__`` of a message may be megabytes.
SHOWN_MAX = 200


class About(TypedDict, total=False):
    """Whom and what a record is about; attributes of it, by these names."""

    #: Whose log it is: our member ID, as the headers have it.
    local: str
    #: The member that it is about, likewise.
    peer: str
    #: Where that member was dialled, or is to be.
    url: str
    #: What carries the messages: "pipeline", "msgapp", "message", or "snapshot".
    channel: str
    #: Who has called us, ``ip:port``.
    address: str


class Fields(About, total=False):
    """All that is attributes of a record."""

    #: Why, in the words of the line.
    reason: str
    #: What ``raft-pipeline explain`` makes of the reason, in one word; made of it if not given.
    verdict: str


class _How(TypedDict):
    """What ``logging`` is told besides."""

    exc_info: bool | BaseException | None
    stacklevel: int


FIELDS = tuple(Fields.__annotations__)
_NOTHING: dict[str, object] = dict.fromkeys(FIELDS)


class Counter:
    """A number that only goes up. Thread-safe; a signal handler may come in between."""

    def __init__(self) -> None:
        self._lock = lock_of(self)  # guards the one below
        self.value = 0

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            self.value += 1


_lost = Counter()


def get_logger(name: str) -> Logger:
    """Return the library's face of ``logging.getLogger(name)``."""
    return Logger(logging.getLogger(name))


def lost_lines() -> int:
    """How many lines of this process' logs were lost because logging raised."""
    return _lost.value


def is_for_caller(error: BaseException) -> bool:
    """Tell whether what the application's code raised is to be raised on.

    So it is in the main thread with what ends a program: there it may come from a signal handler,
    as ``KeyboardInterrupt`` does, and the thread is not ours.
    """
    is_main = threading.get_ident() == threading.main_thread().ident
    return is_main and not isinstance(error, Exception)


def show(value: object, how: Callable[[object], str] = repr) -> str:
    """Return ``repr(value)``, cut short; that the application's ``__repr__`` raises is told.

    ``how`` may be ``str``, for what is an error of the application's.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            value = value[:SHOWN_MAX]  # all of it may be a gigabyte
        text = how(value)
    except BaseException as error:
        if is_for_caller(error):
            raise
        return f"<{type(value).__name__} that raises {type(error).__name__} when it is shown>"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


class Logger:
    """Logs as ``logging.Logger`` does, and raises nothing; a line that is lost is counted.

    Parameters
    ----------
    logger : logging.Logger
        Where the lines go.
    fields : Fields, optional
        What all of them are about.

    Notes
    -----
    Thread-safe. In the main thread what ``is_for_caller`` is raised on. A line of a level that is
    not logged costs what it costs with ``logging``.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: Fields | None = None) -> None:
        self._logger = logger
        self._fields = {**_NOTHING, **(fields or {})}

    def about(self, **fields: Unpack[Fields]) -> Logger:
        """Return one whose lines are about something more."""
        return Logger(self._logger, Fields(**{**self._fields, **fields}))  # type: ignore[typeddict-item]

    def debug(self, text: str, *args: object, **fields: Unpack[Fields]) -> None:
        """Log what only the library's own people want to know."""
        self.log(logging.DEBUG, text, *args, stacklevel=2, **fields)

    def info(self, text: str, *args: object, **fields: Unpack[Fields]) -> None:
        """Log a change that was to be expected."""
        self.log(logging.INFO, text, *args, stacklevel=2, **fields)

    def warning(
        self,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Log what somebody should look at one day."""
        self.log(logging.WARNING, text, *args, exc_info=exc_info, stacklevel=2, **fields)

    def error(
        self,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Log what somebody should look at."""
        self.log(logging.ERROR, text, *args, exc_info=exc_info, stacklevel=2, **fields)

    def exception(self, text: str, *args: object, **fields: Unpack[Fields]) -> None:
        """Log an error with the exception that is being handled."""
        self.log(logging.ERROR, text, *args, exc_info=True, stacklevel=2, **fields)

    def log(
        self,
        level: int,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        stacklevel: int = 1,
        **fields: Unpack[Fields],
    ) -> None:
        """Log at a level; ``stacklevel`` frames above is where it is said to come from."""
        try:
            if self._logger.isEnabledFor(level):
                about = {**self._fields, **fields}
                how: _How = {"exc_info": exc_info, "stacklevel": stacklevel + 2}
                self._log(level, text, args, about, how)
        except BaseException as error:
            if is_for_caller(error):
                raise
            _lost.add()

    def _log(
        self,
        level: int,
        text: str,
        args: tuple[object, ...],
        fields: dict[str, object],
        how: _How,
    ) -> None:
        if (reason := fields["reason"]) is not None and fields["verdict"] is None:
            fields["verdict"] = explanation_of(show(reason, str)).verdict
        try:
            self._logger.log(level, text, *args, extra=fields, **how)
        except KeyError as error:
            if "overwrite" not in str(error):
                raise
            # The records of this program have one of our names already: they keep theirs.
            self._logger.log(level, text, *args, **how)

    def survive(self, what: str, work: Callable[..., object], *args: object) -> bool:
        """Do a thread's own work, so that the thread goes on whatever it raises.

        What the application raises is caught where it is called (``Callbacks``); what comes here
        is a fault of ours. ``what`` tells in the log what did not happen. False if it raised.
        """
        try:
            work(*args)
        except BaseException as error:
            if is_for_caller(error):
                raise
            self.log(logging.ERROR, f"internal error, please report: {what}", exc_info=error)
            return False
        return True


class Throttle:
    """Lets a text pass at its level once a second; in between it is logged at debug.

    Parameters
    ----------
    logger : Logger
        Where the lines go.

    Notes
    -----
    Thread-safe, without a lock: a signal handler may log, and none is found held in a forked
    child. Of two threads that come with one text at one instant both may be let pass. A text is
    counted before its arguments are put in, so there are no more of them than the library has.
    """

    __slots__ = ("_logger", "_next")

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._next: dict[str, float] = {}  # by text, time.monotonic()

    def warning(
        self,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Log a warning, if it is due."""
        self._log(logging.WARNING, text, args, exc_info, fields)

    def error(
        self,
        text: str,
        *args: object,
        exc_info: bool | BaseException | None = None,
        **fields: Unpack[Fields],
    ) -> None:
        """Log an error, if it is due."""
        self._log(logging.ERROR, text, args, exc_info, fields)

    def _log(
        self,
        level: int,
        text: str,
        args: tuple[object, ...],
        exc_info: bool | BaseException | None,
        fields: Fields,
    ) -> None:
        now = time.monotonic()
        if now < self._next.get(text, 0.0):
            level = logging.DEBUG
        else:
            self._next[text] = now + INTERVAL_S
        self._logger.log(level, text, *args, exc_info=exc_info, stacklevel=3, **fields)
