"""Receiving: one load from ``bin/bare_sender``, taken by the compiled listener, which calls
``process``, from an inbox, or by uvicorn.

The time measured is the load's; CPU and memory are those of the receiving process
(``receive.py``), which is fresh for each round.
"""

from __future__ import annotations

import statistics

import pytest
from harness import BIN, Load, receive
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 2


@pytest.mark.parametrize("load", Load, ids=lambda load: load.value)
@pytest.mark.parametrize("subject", ["core", "inbox", "uvicorn"])
def test_messages_are_received(benchmark: BenchmarkFixture, subject: str, load: Load) -> None:
    if not (BIN / "bare_sender").exists():
        pytest.skip("benchmarks/bin/bare_sender is not built; run make bench")
    results = []
    benchmark.pedantic(lambda: results.append(receive(subject, load, seconds=1.0)), rounds=ROUNDS)
    for key in ("cpu_us_per_message", "messages_per_s", "peak_mib"):
        benchmark.extra_info[key] = statistics.median(result[key] for result in results)
