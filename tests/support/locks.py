"""Locks as another thread holds them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def held_elsewhere(locks: Iterable[Any]) -> Iterator[None]:
    """Have another thread hold all of them meanwhile: who holds one itself may take it again.

    A child forked meanwhile finds them held for ever.
    """
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            done.wait()

    thread = threading.Thread(target=hold, name="holder", daemon=True)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
