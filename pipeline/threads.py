"""Threads of the library, and what may be asked of them in the middle of anything.

A signal's handler runs in the main thread between any two instructions, and may call every public
method. So nothing here waits for a lock that the interrupted call may hold.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from pipeline.errors import UsageError

__all__ = ["LibraryThread", "Once", "require_real_threads"]

# What these replace with their own, and a function or class of each that they replace.
_KITS = ("gevent", "eventlet")
_REPLACED = {
    "thread": ("_thread", "start_new_thread"),
    "socket": ("socket", "socket"),
    "select": ("select", "select"),
    "queue": ("queue", "SimpleQueue"),
    "time": ("time", "sleep"),
}

# To join a thread CPython 3.11 and 3.12 take its lock and give it back. Who is interrupted between
# the two has it; a handler that joins then waits in vain, but no longer than this.
_JOIN_STEP_S = 0.05


def require_real_threads() -> None:
    """Raise ``UsageError`` if gevent or eventlet has replaced what our threads live on.

    A thread of theirs runs when another one of them waits in their way. Ours wait in the system's,
    many in C, and the program would stand still without a word.
    """
    found: dict[str, list[str]] = {}
    for what, (module, name) in _REPLACED.items():
        maker = getattr(getattr(sys.modules.get(module), name, None), "__module__", None)
        kit = str(maker).partition(".")[0]
        if kit in _KITS:
            found.setdefault(kit, []).append(what)
    for kit, replaced in found.items():
        raise UsageError(
            f"{kit} has replaced {', '.join(replaced)}, and raft-pipeline needs the system's: "
            "run the node in a process of its own, that patches nothing, or leave these out of the "
            "patching"
        )


class Once:
    """What can be taken once, until it is given back. Takes no lock that is waited for."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take it; False if it is taken. Of callers at the same time one gets it."""
        return self._lock.acquire(blocking=False)

    def is_taken(self) -> bool:
        """Tell whether it is taken."""
        return self._lock.locked()

    def give_back(self) -> None:
        """Let it be taken again; only who has taken it may."""
        self._lock.release()


class LibraryThread(threading.Thread):
    """A daemon: nothing of ours holds up the interpreter's exit.

    Parameters
    ----------
    target : callable
    name : str
    args : tuple
    """

    def __init__(
        self, target: Callable[..., object], name: str, args: tuple[object, ...] = ()
    ) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self.has_ended = False

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.has_ended = True

    def wait_ended(self, deadline: float) -> bool:
        """Wait for its end until ``deadline`` (``time.monotonic()``); whether it runs no more.

        Of the calling thread, and of one that has not begun, the answer is yes: neither could end
        before this call returns.
        """
        if self is threading.current_thread():
            return True
        while self.ident is not None and self.is_alive():
            left_s = deadline - time.monotonic()
            if self.has_ended:
                left_s = _JOIN_STEP_S  # what is left to do is Python's own
            elif left_s <= 0:
                return False
            try:
                self.join(min(left_s, _JOIN_STEP_S))
            except RuntimeError:  # it has an ident and has not told Python that it runs
                time.sleep(0.001)
            if self.has_ended:
                break
        return True
