"""``benchmarks/quiet.py``: which runs are taken, and what is known of the others."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOGETHER_NS, APART_NS = 60.0, 340.0

Row = dict[str, Any]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quiet")


class Machine:
    """Says what ``quiet`` measures: a handover for each look, and what others used for each run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quiet: ModuleType) -> None:
        self.handovers: Iterator[float] = iter(())
        self.foreign: Iterator[float] = iter(())
        self.runs = 0
        self.all_s = 0.0
        monkeypatch.setattr(quiet, "handover_ns", lambda: next(self.handovers, TOGETHER_NS))
        monkeypatch.setattr(quiet, "busy_s", lambda: (self.all_s, 0.0, 0.0))
        clocks = SimpleNamespace(
            perf_counter=lambda: float(self.runs), monotonic=time.monotonic, sleep=lambda _: None
        )
        monkeypatch.setattr(quiet, "time", clocks)

    def run(self) -> Row:
        """A run of a second. Its figure says which it is."""
        self.runs += 1
        self.all_s += next(self.foreign, 0.0)
        return {"figure": self.runs, "rounds": [1, 2]}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, quiet: ModuleType) -> Machine:
    return Machine(monkeypatch, quiet)


def test_an_undisturbed_run_is_taken(quiet: ModuleType, machine: Machine) -> None:
    result = quiet.Watch(100.0).run(machine.run)
    assert (result["figure"], result["discarded"]) == (1, [])
    assert (result["foreign_cores"], result["handover_ns"]) == (0.0, TOGETHER_NS)
    assert quiet.remark([result]) == ""


def test_a_run_beside_others_is_made_again(quiet: ModuleType, machine: Machine) -> None:
    machine.foreign = iter((0.5, 0.2, 0.05))
    result = quiet.Watch(100.0).run(machine.run)
    assert result["figure"] == 3
    assert [(each["figure"], each["foreign_cores"]) for each in result["discarded"]] == [
        (1, pytest.approx(0.5)),
        (2, pytest.approx(0.2)),
    ]
    assert quiet.remark([result]) == "runs made again because they were disturbed: 2."


def test_what_is_so_each_time_is_taken_and_told(quiet: ModuleType, machine: Machine) -> None:
    machine.foreign = iter([0.5] * 9)
    result = quiet.Watch(100.0).run(machine.run)
    assert result["figure"] == quiet.TRIES_MAX
    assert "others used up to 0.50 cores in 1 of the 1 taken" in quiet.remark([result])


@pytest.mark.parametrize("handovers", [(APART_NS, 60.0), (60.0, APART_NS), (APART_NS, APART_NS)])
def test_a_run_with_the_cpus_apart_is_made_again_once_they_share(
    quiet: ModuleType, machine: Machine, handovers: tuple[float, ...]
) -> None:
    meanwhile: list[int] = []
    machine.handovers = iter((*handovers, APART_NS, APART_NS, TOGETHER_NS))
    watch = quiet.Watch(100.0, lambda: meanwhile.append(machine.runs))
    result = watch.run(machine.run)
    assert result["figure"] == 2
    assert meanwhile == [1, 1]
    (discarded,) = result["discarded"]
    assert quiet.was_apart(discarded) is (min(handovers) == APART_NS)


@pytest.mark.parametrize(("patience_s", "never_s"), [(0.0, 120.0), (100.0, 0.0)])
def test_without_patience_or_where_they_never_share_runs_are_taken_as_they_are(
    quiet: ModuleType,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    patience_s: float,
    never_s: float,
) -> None:
    monkeypatch.setattr(quiet, "NEVER_S", never_s)
    machine.handovers = iter([APART_NS] * 99)
    watch = quiet.Watch(patience_s)
    results = [watch.run(machine.run) for _ in range(3)]
    assert machine.runs <= 4
    assert "did not share a cache all the time in 3 of the 3 taken" in quiet.remark(results)
