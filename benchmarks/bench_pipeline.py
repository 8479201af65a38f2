"""Delivery over real sockets: from the first offer to the last 204."""

from __future__ import annotations

import resource

import pytest
from harness import Pacer, running
from pytest_benchmark.fixture import BenchmarkFixture

from pipeline import SendResult

MESSAGES = 2000
ROUNDS = 5


@pytest.mark.parametrize("subject", ["core", "baseline"], ids=lambda name: f"4w-{name}")
@pytest.mark.parametrize("size", [128, 4096, 65536], ids=lambda n: f"MsgApp-{n}B")
def test_messages_are_delivered(
    benchmark: BenchmarkFixture, sink_port: int, subject: str, size: int
) -> None:
    with running(subject, sink_port, size) as running_subject:
        pipe, build, pacer = running_subject.pipe, running_subject.build, Pacer()

        def deliver() -> None:
            accepted, burst = 0, 0
            while accepted < MESSAGES:
                if pipe.send(build(accepted)) is SendResult.ACCEPTED:
                    accepted += 1
                    burst += 1
                else:
                    pacer(burst)
                    burst = 0
            running_subject.drain(poll_s=50e-6)

        deliver()  # dials, and lets the pacer find its length
        before = resource.getrusage(resource.RUSAGE_SELF)
        benchmark.pedantic(deliver, rounds=ROUNDS)
        after = resource.getrusage(resource.RUSAGE_SELF)
        stats = pipe.stats()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.extra_info["messages"] = MESSAGES
    benchmark.extra_info["messages_per_s"] = MESSAGES / benchmark.stats.stats.median
    benchmark.extra_info["cpu_us_per_message"] = cpu_s * 1e6 / (ROUNDS * MESSAGES)
    assert stats.sent == stats.accepted == (ROUNDS + 1) * MESSAGES
