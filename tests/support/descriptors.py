"""Descriptors: which are open, and copies of them, as a forked child has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def open_descriptors() -> list[str]:
    """Return the numbers of the descriptors this process has open, and of the one it looks with."""
    return sorted(os.listdir("/proc/self/fd"))


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
