"""Fixtures of the pytest-benchmark files; ``make bench`` builds the sink they need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import BIN, Sink, machine
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture
def sink_port() -> Iterator[int]:
    """The port of a sink that must not meet a single bad request."""
    if not (BIN / "sink").exists():
        pytest.skip("benchmarks/bin/sink is not built; run make bench")
    with Sink() as sink:
        yield sink.port
    assert sink.counters["bad"] == 0


@pytest.fixture(autouse=True)
def _where(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info.update(machine())
