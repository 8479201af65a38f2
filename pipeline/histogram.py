"""Histogram: how long something took, in buckets that double."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

__all__ = ["Histogram", "HistogramCounts"]


class HistogramCounts(NamedTuple):
    """A histogram at one instant, as prometheus_client takes it."""

    #: Upper bound in seconds and the observations up to it; the last bound is ``+Inf``.
    buckets: list[tuple[str, int]]
    #: Of all observations, in seconds.
    sum_s: float


class Histogram:
    """Counts durations of up to ``first_s``, twice that, four times that...

    Parameters
    ----------
    first_s : float
        Upper bound of the first of ``count`` buckets.

    Notes
    -----
    Not thread-safe: its owner has a lock. Source: prometheus ``ExponentialBuckets``.
    """

    def __init__(self, first_s: float, count: int) -> None:
        self._bounds = [first_s * 2**i for i in range(count)]
        self._counts = [0] * (count + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def counts(self) -> HistogramCounts:
        """Return what was observed."""
        names = [f"{bound:g}" for bound in self._bounds] + ["+Inf"]
        buckets, total = [], 0
        for name, count in zip(names, self._counts, strict=True):
            total += count
            buckets.append((name, total))
        return HistogramCounts(buckets, self._sum_s)
