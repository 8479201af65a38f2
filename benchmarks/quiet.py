"""What the machine does beside a run, and which runs are made again because of it.

Two things bend a figure and are none of the subject's doing, and both can be measured without
looking at the figure:

foreign cores   CPU that other processes used meanwhile
handover        how long the CPUs take to hand a cache line over and back (``c/handover.c``). A host
                moves a virtual machine's CPUs between cores that share a last-level cache and cores
                that do not, for seconds or minutes. What passes between two processes costs up to
                three times as much in the second state: 64 MiB through loopback 13 ms of CPU or
                38 ms, in C as in Python.

A run that either of them disturbed is made again. One made with the CPUs apart from beginning to
end is no worse a measurement, only of another machine: it is kept beside the other.
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

from harness import BIN

#: What others may use of the machine beside a run; more disturbs it.
FOREIGN_CORES_MAX = 0.1
#: A handover above this leaves the last-level cache: 55 to 90 ns within one of this machine, 330
#: to 360 ns between two; up to 130 ns across the mesh of a large Intel processor.
APART_NS = 150.0
PAUSE_S = 2.0
#: Beside which others were busy: what is so each time is the run's own doing.
TRIES_MAX = 4
PATIENCE_HELP = "seconds for making disturbed runs again, in all"

Row = dict[str, Any]


TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def busy_s() -> tuple[float, float]:
    """CPU time used so far: by the whole machine (stolen time included), and for our runs.

    The latter is our children's and that of the kernel's softirq threads, which carry what the
    children send each other when there is much of it.
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
    ours_s = children.ru_utime + children.ru_stime + softirqd / TICKS_PER_S
    return ticks / TICKS_PER_S, ours_s


def handover_ns() -> float:
    """Round trip of a cache line between two CPUs, in ns; 0 where there is one."""
    return float(subprocess.run([BIN / "handover"], check=True, stdout=subprocess.PIPE).stdout)


class Watch:
    """Makes runs, and makes those again that were disturbed, until ``patience_s`` of time has gone
    into that, for all runs together. Then they are taken as they are, and ``remark`` says so.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s

    def run(self, run: Callable[[], Row]) -> tuple[Row, Row | None]:
        """The result of ``run`` with ``foreign_cores`` and ``handover_ns``, the worse of before and
        after, in it; and the last one made with the CPUs apart, if there was one.
        """
        while_apart = None
        tries = 0
        while True:
            start, before_ns = time.monotonic(), handover_ns()
            result = with_foreign_cores(run)
            after_ns = handover_ns()
            result["handover_ns"] = max(before_ns, after_ns)
            is_alone = result["foreign_cores"] <= FOREIGN_CORES_MAX
            tries += not is_alone
            if is_alone and min(before_ns, after_ns) > APART_NS:
                while_apart = result
            is_good = is_alone and result["handover_ns"] <= APART_NS
            if is_good or tries == TRIES_MAX or self._patience_s <= 0:
                return result, while_apart
            time.sleep(0 if is_alone else PAUSE_S)
            while handover_ns() > APART_NS and time.monotonic() < start + self._patience_s:
                time.sleep(PAUSE_S)
            self._patience_s -= time.monotonic() - start


def with_foreign_cores(run: Callable[[], Row]) -> Row:
    """The result of ``run``, and in ``foreign_cores`` the CPU that others used meanwhile."""
    start, all_before, ours_before = time.perf_counter(), *busy_s()
    result = run()
    took, all_after, ours_after = time.perf_counter() - start, *busy_s()
    foreign_s = (all_after - all_before) - (ours_after - ours_before)
    return {**result, "foreign_cores": max(foreign_s / took, 0.0)}


def remark(runs: Sequence[Row]) -> str:
    """What disturbed the ``runs`` that were taken as they are; empty if nothing did."""
    foreign = max(run["foreign_cores"] for run in runs)
    busy = sum(run["foreign_cores"] > FOREIGN_CORES_MAX for run in runs)
    apart = sum(run["handover_ns"] > APART_NS for run in runs)
    lines = []
    if busy:
        lines.append(f"others used up to {foreign:.2f} cores beside {busy} of {len(runs)} runs")
    if apart:
        lines.append(f"the CPUs did not share a cache all the time in {apart} of {len(runs)} runs")
    if not lines:
        return ""
    return f"Not a quiet machine: {', and '.join(lines)}. Ratios with those may be wrong."
