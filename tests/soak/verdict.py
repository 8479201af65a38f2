"""Whether what a process holds at its quiet moments stays the same."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tests.support import MIB

KIB = 1024


class _MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


_libc = ctypes.CDLL(None)


def _allocated_bytes() -> int:
    """Return what malloc has given out and not got back; 0 if this C library does not say."""
    mallinfo = getattr(_libc, "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


#: <malloc.h>: from how many bytes on a piece is mapped by itself, and unmapped when it is freed.
_M_MMAP_THRESHOLD = -3


def fix_malloc() -> None:
    """Keep malloc from keeping more and more.

    glibc raises the size from which a piece is mapped by itself to that of the largest one freed so
    far, and keeps twice as much at the end of each of its arenas, of which there are eight a core:
    resident memory would rise for an hour. To set the size, to what it is at first, ends that.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, 128 * KIB)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process holds at one moment. Bytes, or counts."""

    resident: int
    #: Given out by malloc: without what lies between such pieces.
    allocated: int
    #: Blocks of Python's own allocator, which every leaked object has some of.
    blocks: int
    threads: int
    descriptors: int

    @classmethod
    def take(cls) -> Sample:
        """Look at this process, after a collection of its garbage."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
            allocated=_allocated_bytes(),
            blocks=sys.getallocatedblocks(),
            threads=len(os.listdir("/proc/self/task")),
            # The one that lists them is not counted.
            descriptors=len(os.listdir("/proc/self/fd")) - 1,
        )


#: By how much each may grow, of what it was: bytes or counts, and a part of it.
TOLERANCE: dict[str, tuple[int, float]] = {
    "resident": (4 * MIB, 0.03),
    "allocated": (1 * MIB, 0.03),
    "blocks": (500, 0.005),
    # A node that has just been started again has not needed all of its threads yet.
    "threads": (4, 0.05),
    "descriptors": (4, 0.05),
}


@dataclass(frozen=True, slots=True)
class Growth:
    """How one figure went: medians of an early and of the last part of the run."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def is_flat(self) -> bool:
        """Whether it has not grown by more than it may."""
        return self.after - self.before <= self.allowed

    def __str__(self) -> str:
        def shown(value: float) -> str:
            if self.name in ("resident", "allocated"):
                return f"{value / MIB:.2f} MiB"
            return f"{value:,.0f}"

        grown = shown(self.after - self.before)
        verdict = "flat" if self.is_flat else "GROWS"
        return (
            f"{self.name}: {shown(self.before)} -> {shown(self.after)} "
            f"({grown} more; {shown(self.allowed)} allowed): {verdict}"
        )


#: Samples of which nothing can be said: caches and pools fill, threads start as they are needed.
WARM_UP = 0.2
#: Fewer tell nothing.
MIN_SAMPLES = 10


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Compare the last quarter of what follows the warm-up with its first quarter."""
    if len(samples) < MIN_SAMPLES:
        raise ValueError(f"{len(samples)} samples tell nothing: {MIN_SAMPLES} at least")
    warm = samples[int(len(samples) * WARM_UP) :]
    quarter = max(2, len(warm) // 4)

    def growth(name: str) -> Growth:
        value: Callable[[Sample], int] = lambda sample: getattr(sample, name)  # noqa: E731
        before = statistics.median(map(value, warm[:quarter]))
        after = statistics.median(map(value, warm[-quarter:]))
        absolute, relative = TOLERANCE[name]
        return Growth(name, before, after, max(absolute, relative * before))

    return [growth(field.name) for field in fields(Sample)]
