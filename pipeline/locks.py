"""Locks that are free in a forked child, whoever held them in its parent.

A thread that holds one at the moment of a fork does not exist in the child and would never give it
back. So whoever has a lock takes it from here, and nobody else need think of it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock_of"]

_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def lock_of(owner: object) -> threading.RLock:
    """Make the lock that ``owner`` keeps as ``_lock``; a forked child has another there.

    It is reentrant: a signal's handler runs in the middle of what holds it.
    """
    _owners.add(owner)
    return threading.RLock()


def _after_fork_in_child() -> None:
    for owner in list(_owners):
        owner._lock = threading.RLock()


# Before all others of the library, for this module is imported first: they find their locks free.
os.register_at_fork(after_in_child=_after_fork_in_child)
