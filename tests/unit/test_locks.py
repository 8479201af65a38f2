"""Locks that a forked child finds free."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pipeline
from tests.support.processes import TIMEOUT_S

HELD_AT_A_FORK = """
import os, threading
from pipeline.locks import lock_of

class Owner:
    def __init__(self):
        self._lock = lock_of(self)

owner, is_held, may_end = Owner(), threading.Event(), threading.Event()

def hold():
    with owner._lock:
        is_held.set()
        may_end.wait()

threading.Thread(target=hold, daemon=True).start()
is_held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if owner._lock.acquire(blocking=False) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), owner._lock.acquire(blocking=False))
may_end.set()
"""


def test_a_lock_that_a_thread_holds_at_a_fork_is_free_in_the_child_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELD_AT_A_FORK],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    assert result.stdout == "0 False\n", result.stderr


def test_every_lock_that_is_waited_for_is_such_a_one() -> None:
    folder = Path(pipeline.__file__).parent
    # In an installed package the examples lie beside them: programs, whose locks are their own.
    makers = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if path.parent != folder / "examples"
        if "threading.RLock()" in path.read_text() or "threading.Lock()" in path.read_text()
    }
    assert makers == {"locks.py", "threads.py"}  # of ``Once``, which nobody waits for
