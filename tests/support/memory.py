"""How much memory the process has."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

import pytest

#: Sanitizers keep freed memory, and shadow the rest: no bound holds under them.
IS_SANITIZED = "san.so" in os.environ.get("LD_PRELOAD", "")

#: Without a GIL an object that another thread was the last to use is freed by the thread that made
#: it, when that runs Python again, which is at its next request for a handler thread.
frees_at_once = pytest.mark.skipif(
    sysconfig.get_config_var("Py_GIL_DISABLED") == 1,
    reason="without a GIL a large body stays until the thread that made its message runs again",
)


def rss() -> int:
    """Return the resident memory that is not a file's, in bytes; 0 under a sanitizer.

    Pages of files, code above all, come and go as the system has need of memory.
    """
    if IS_SANITIZED:
        return 0
    with open("/proc/self/statm") as statm:
        _, resident, shared, *_ = map(int, statm.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the most resident memory there has been, in bytes; 0 under a sanitizer.

    Not ``ru_maxrss``: that of a program begins with the peak of the process that has started it.
    """
    if IS_SANITIZED:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
