"""Descriptors: which are open, and copies of them, as a forked child has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests.support.waiting import eventually


def open_descriptors() -> list[str]:
    """Return the numbers of the descriptors this process has open, and of the one it looks with."""
    return sorted(os.listdir("/proc/self/fd"))


def assert_all_closed(before: list[str]) -> None:
    """Wait until no more are open than ``before``: some may have been closed since, or moved."""
    eventually(
        lambda: len(open_descriptors()) <= len(before),
        lambda: f"open are {open_descriptors()}; before there were {before}",
    )


@contextlib.contextmanager
def copies_of_sockets() -> Iterator[None]:
    """Hold a copy of every socket this process has open at the beginning."""
    copies = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                copies.append(os.dup(int(name)))
    try:
        yield
    finally:
        for copy in copies:
            os.close(copy)
