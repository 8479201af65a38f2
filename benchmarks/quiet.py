"""What the machine does beside a run, and which runs are made again because of it.

Two things bend a figure and are none of the subject's doing, and both can be measured without
looking at the figure:

foreign cores   CPU that other processes used meanwhile
handover        how long the CPUs take to hand a cache line over and back (``c/handover.c``). A host
                moves a virtual machine's CPUs between cores that share a last-level cache and cores
                that do not, for seconds or minutes. What passes between two processes costs up to
                three times as much in the second state, in C as in Python (NOTES.md).

A run that either of them disturbed is made again, and what is known of it kept beside the one that
was taken (``discarded``).
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import BIN, say

#: What others may use of the machine beside a run; more disturbs it.
FOREIGN_CORES_MAX = 0.1
#: What the kernel's softirq threads may: it is the runs' doing and in no subject's CPU.
SOFTIRQD_CORES_MAX = 0.05
#: A handover above this leaves the last-level cache: 50 to 90 ns within one of this machine, 330
#: to 360 ns between two; up to 130 ns across the mesh of a large Intel processor.
APART_NS = 150.0
PAUSE_S = 2.0
#: Beside which others were busy: what is so each time is the run's own doing.
TRIES_MAX = 4
#: CPUs that have not shared a cache for so long never do.
NEVER_S = 120.0
PATIENCE_HELP = "seconds for making disturbed runs again, in all"

Row = dict[str, Any]


TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def busy_s() -> tuple[float, float, float]:
    """CPU time used so far: by the whole machine (stolen time included), by our children, and by
    the kernel's softirq threads, which carry what the children send each other when it is much.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(word) for word in Path("/proc/stat").read_text().split()[1:9]
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    softirqd = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().partition(") ")
            if "(ksoftirqd/" in name:
                softirqd += sum(int(word) for word in rest.split()[11:13])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / TICKS_PER_S, children.ru_utime + children.ru_stime, softirqd / TICKS_PER_S


def handover_ns() -> float:
    """Round trip of a cache line between two CPUs, in ns; 0 where there is one."""
    return float(subprocess.run([BIN / "handover"], check=True, stdout=subprocess.PIPE).stdout)


def watched(run: Callable[[], Row]) -> Row:
    """The result of ``run``, and in it what the machine did meanwhile.

    ``foreign_cores`` is the CPU that others used, ``softirqd_cores`` that of the kernel's softirq
    threads; ``handover_ns`` and ``handover_least_ns`` are the worse and the better of before and
    after.
    """
    before_ns = handover_ns()
    start, (all_0, children_0, softirqd_0) = time.perf_counter(), busy_s()
    result = run()
    took, (all_1, children_1, softirqd_1) = time.perf_counter() - start, busy_s()
    after_ns = handover_ns()
    softirqd_s = softirqd_1 - softirqd_0
    foreign_s = (all_1 - all_0) - (children_1 - children_0) - softirqd_s
    return {
        **result,
        "foreign_cores": max(foreign_s / took, 0.0),
        "softirqd_cores": softirqd_s / took,
        "handover_ns": max(before_ns, after_ns),
        "handover_least_ns": min(before_ns, after_ns),
    }


def was_alone(result: Row) -> bool:
    return bool(result["foreign_cores"] <= FOREIGN_CORES_MAX)


def was_apart(result: Row) -> bool:
    """Whether the CPUs shared no cache from beginning to end: as good a run, on other hardware."""
    return bool(result["handover_least_ns"] > APART_NS)


class Watch:
    """Makes runs, and makes those again that were disturbed.

    Parameters
    ----------
    patience_s : float
        Time for that, for all runs together. Then they are taken as they are, and ``remark`` says
        so; as is one beside which others were busy ``TRIES_MAX`` times.
    while_apart : callable, optional
        Called instead of a pause while the CPUs share no cache.
    """

    def __init__(self, patience_s: float, while_apart: Callable[[], object] | None = None) -> None:
        self._patience_s = patience_s
        self._while_apart = while_apart or self._pause
        self._have_shared = False

    def run(self, run: Callable[[], Row]) -> Row:
        """The result of ``run``, with what ``watched`` adds, and ``discarded``: the figures of
        those made before it.
        """
        discarded: list[Row] = []
        tries = 0
        while True:
            start = time.monotonic()
            result = watched(run)
            tries += not was_alone(result)
            is_good = was_alone(result) and result["handover_ns"] <= APART_NS
            if is_good or tries == TRIES_MAX or self._patience_s <= 0:
                return {**result, "discarded": discarded}
            discarded.append({k: v for k, v in result.items() if isinstance(v, int | float)})
            if not was_alone(result):
                self._pause()
            self._wait_until_shared(start)
            self._patience_s -= time.monotonic() - start

    def _wait_until_shared(self, start: float) -> None:
        while handover_ns() > APART_NS:
            waited_s = time.monotonic() - start
            if not self._have_shared and waited_s > NEVER_S:
                self._patience_s = 0.0
            if waited_s > self._patience_s:
                return
            say(f"the CPUs share no cache; waiting for {waited_s:.0f} s")
            self._while_apart()
        self._have_shared = True

    def _pause(self) -> None:
        time.sleep(PAUSE_S)


def remark(runs: Sequence[Row]) -> str:
    """What disturbed the ``runs`` that were taken, and how many were not; empty if nothing did."""
    if not runs:
        return ""
    discarded = sum(len(run["discarded"]) for run in runs)
    lines = []
    if discarded:
        lines.append(f"runs made again because they were disturbed: {discarded}")
    for key, bound, text in (
        ("foreign_cores", FOREIGN_CORES_MAX, "others used up to {:.2f} cores"),
        ("softirqd_cores", SOFTIRQD_CORES_MAX, "softirq threads used up to {:.2f} cores"),
        ("handover_ns", APART_NS, "the CPUs did not share a cache all the time"),
    ):
        above = [run[key] for run in runs if run[key] > bound]
        if above:
            lines.append(f"{text.format(max(above))} in {len(above)} of the {len(runs)} taken")
    return f"{'; '.join(lines)}." if lines else ""
