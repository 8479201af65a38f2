"""Poller: what wakes it is seen to, whatever a client of it does.

How it dials: tests/functional/test_dialling.py.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.net.poller import Poller
from tests.support import LONG_TIMEOUT


class Client:
    """Sets ``seen`` when it is woken, but raises the first ``faults`` times."""

    def __init__(self, *, faults: int = 0) -> None:
        self.faults = faults
        self.seen = threading.Event()

    def next_due(self) -> float:
        return math.inf

    def check_time(self, now: float) -> None:
        if self.faults:
            self.faults -= 1
            raise ValueError("a fault of ours")
        self.seen.set()

    def end(self) -> None: ...


@contextmanager
def polling(*clients: Client) -> Iterator[Poller]:
    poller = Poller("test")
    for client in clients:
        poller.attach(client)
    poller.start()
    try:
        yield poller
    finally:
        poller.stop(time.monotonic() + LONG_TIMEOUT)


def test_after_a_fault_it_sees_to_what_it_was_woken_for(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Client(faults=1), Client()
    with polling(broken, sound) as poller:
        os.eventfd_write(poller.wake_fd, 1)
        assert sound.seen.wait(LONG_TIMEOUT)
    assert broken.seen.is_set()
    assert "the poller fails" in caplog.text
