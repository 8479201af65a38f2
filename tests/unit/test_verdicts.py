"""``benchmarks/verdicts.py``: what the runs of ``make bench-peers`` are said to amount to."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE = ("tls-send", 128)

Row = dict[str, Any]


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("verdicts")


def run(cpu_us: float = 10.0, rate: float = 50_000.0, memory_mb: float = 1.0) -> Row:
    """One round of one subject, undisturbed."""
    return {
        "msgs_per_s": rate,
        "cpu_us_per_msg": cpu_us,
        "p50_us": 50.0,
        "p99_us": 90.0,
        "rss_above_payload_mb": memory_mb,
    }


def judged(verdicts: ModuleType, runs: dict[str, list[Row]]) -> dict[str, Row]:
    """The verdicts on T1, by figure, of these rounds of each subject."""
    side, size = CASE
    rounds = {(side, subject, size): done for subject, done in runs.items()}
    return {each["figure"]: each for each in verdicts.judge(verdicts.summary(rounds, {}))}


def test_a_verdict_is_the_median_of_the_ratios_within_the_rounds(verdicts: ModuleType) -> None:
    # The machine is twice as slow in the last round, for both; the medians' ratio would be 1.5.
    runs = {
        "ours": [run(cpu_us=12.0), run(cpu_us=15.0), run(cpu_us=24.0)],
        "bare-c": [run(cpu_us=10.0), run(cpu_us=10.0), run(cpu_us=20.0)],
    }
    cpu = judged(verdicts, runs)["cpu_us_per_msg"]
    assert cpu["ours"] == 15.0
    assert cpu["bare-c"] == {"rounds": [1.2, 1.5, 1.2], "median": 1.2, "bound": 1.4, "met": True}
    assert "etcd" not in cpu


def test_a_cost_must_stay_below_its_bound_and_a_rate_must_reach_it(verdicts: ModuleType) -> None:
    etcd = [run(cpu_us=20.0, rate=40_000.0)]
    good = judged(verdicts, {"ours": [run(cpu_us=9.0, rate=90_000.0)], "etcd": etcd})
    bad = judged(verdicts, {"ours": [run(cpu_us=11.0, rate=70_000.0)], "etcd": etcd})
    for figure in ("cpu_us_per_msg", "msgs_per_s"):
        assert good[figure]["etcd"]["met"]
        assert not bad[figure]["etcd"]["met"]


def test_a_missed_target_is_said_to_be_missed(verdicts: ModuleType) -> None:
    runs = {
        "ours": [run(cpu_us=9.0, rate=60_000.0)],
        "etcd": [run(cpu_us=20.0, rate=40_000.0)],
        "bare-c": [run(cpu_us=5.0, rate=100_000.0)],
    }
    cpu, rate = verdicts.verdict_table(judged(verdicts, runs).values()).splitlines()[2:]
    assert "| 1.80 (1.80) | <= 1.4 **no** | 0.45 (0.45) | <= 0.5 yes |" in cpu
    assert "| 0.60 (0.60) |  | 1.50 (1.50) | >= 2 **no** |" in rate


def test_a_bound_of_the_figure_itself_needs_nobody_beside_it(verdicts: ModuleType) -> None:
    large = 64 << 20
    for memory_mb, met in ((16.0, True), (17.0, False)):
        rounds = {("tls-send", "ours", large): [run(memory_mb=memory_mb)]}
        (memory,) = (
            each
            for each in verdicts.judge(verdicts.summary(rounds, {}))
            if each["figure"] == "rss_above_payload_mb"
        )
        assert memory["itself"]["met"] is met


def test_a_target_of_the_inbox_is_not_judged_by_callbacks(verdicts: ModuleType) -> None:
    runs = {
        "ours": [run(cpu_us=6.0)],
        "inbox": [run(cpu_us=9.0)],
        "inbox-uvloop": [run(cpu_us=13.0)],
        "etcd": [run(cpu_us=20.0)],
        "bare-c": [run(cpu_us=5.0)],
    }
    rounds = {("receive", subject, 128): done for subject, done in runs.items()}
    judged = verdicts.judge(verdicts.summary(rounds, {}))
    names = {each["subject"]: each["target"] for each in judged}
    assert names == {"inbox": "I2", "inbox-uvloop": "I3", "ours": "P6"}
    inbox, uvloop, _ = verdicts.verdict_table(judged).splitlines()[2:]
    assert inbox.startswith("| I2 receive, 128 B, inbox: CPU, us | 9 | 1.80 (1.80) | <= 1.6 **no**")
    assert "| I3 receive, 128 B, inbox-uvloop: CPU, us | 13 |" in uvloop
    assert "0.65 (0.65) | <= 0.6 **no**" in uvloop


def test_what_was_not_measured_gets_no_verdict_and_no_table(verdicts: ModuleType) -> None:
    rounds = {("tls-send", "ours", 128): [], ("tls-send", "bare-c", 128): [run()]}
    results = verdicts.summary(rounds, {})
    assert verdicts.judge(results) == []
    assert "ours" not in verdicts.table(results)


def test_a_table_leaves_out_the_columns_that_say_nothing_there(verdicts: ModuleType) -> None:
    rounds = {
        ("tls-send-spinning", subject, 128): [{"msgs_per_s": rate}]
        for subject, rate in (("ours", 80.0), ("bare-c", 100.0))
    }
    results = verdicts.summary(rounds, {})
    header, _, ours, _ = verdicts.table(results).splitlines()
    assert header.endswith("| subject | messages/s | of bare C's rate |")
    assert ours == "| 128 B | ours | 80 | 0.80 |"


def test_what_a_target_is_held_to_is_measured_on_its_side(verdicts: ModuleType) -> None:
    for target in verdicts.TARGETS:
        side = verdicts.SIDES[target.side]
        assert target.size in side.sizes
        assert target.figure in verdicts.FIGURE_NAMES
        assert target.subject in side.subjects
        # "plain" is the same subject without TLS.
        plain = verdicts.SIDES.get(target.side.removeprefix("tls-"), side)
        held_to = plain.subjects if side.reference == "plain" else side.subjects
        reference = target.subject if side.reference == "plain" else side.reference
        assert target.reference is None or reference in held_to
        assert target.etcd is None or "etcd" in side.subjects
