"""How much memory the process has."""

from __future__ import annotations

import os

#: Sanitizers keep freed memory, and shadow the rest: no bound holds under them.
IS_SANITIZED = "san.so" in os.environ.get("LD_PRELOAD", "")


def rss() -> int:
    """Return the resident memory, in bytes; 0 under a sanitizer."""
    if IS_SANITIZED:
        return 0
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
