"""Offering: what a full msgc of messages costs the caller, beside ``queue.Queue``.

The core encodes and copies each message in ``send``; the queue only keeps a reference, and its
messages have yet to be encoded by a worker. Both start empty, and the messages are made before.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
from harness import builder, running
from pytest_benchmark.fixture import BenchmarkFixture

QUEUE_LENGTH = 64
ROUNDS = 500


def offer_all(benchmark: BenchmarkFixture, offer: Callable[[Any], Any], setup: Any) -> None:
    benchmark.extra_info["messages"] = QUEUE_LENGTH
    benchmark.pedantic(offer, setup=setup, rounds=ROUNDS, warmup_rounds=10)


@pytest.mark.benchmark(group=f"offer {QUEUE_LENGTH} messages of 128 B")
@pytest.mark.parametrize("subject", ["core", "baseline"])
def test_pipeline_takes_a_full_queue(
    benchmark: BenchmarkFixture, sink_port: int, subject: str
) -> None:
    with running(subject, sink_port) as running_subject:
        send = running_subject.pipe.send
        messages = [running_subject.build(index) for index in range(QUEUE_LENGTH)]

        def offer() -> None:
            for message in messages:
                send(message)

        offer_all(benchmark, offer, lambda: running_subject.drain(poll_s=50e-6))
        stats = running_subject.pipe.stats()
    assert stats.refused == 0


@pytest.mark.benchmark(group=f"offer {QUEUE_LENGTH} messages of 128 B")
def test_queue_queue_takes_a_full_queue(benchmark: BenchmarkFixture) -> None:
    msgc: queue.Queue[Any] = queue.Queue(QUEUE_LENGTH)
    build = builder("baseline", 128)
    messages = [build(index) for index in range(QUEUE_LENGTH)]

    def offer() -> None:
        for message in messages:
            msgc.put_nowait(message)

    offer_all(benchmark, offer, msgc.queue.clear)
    assert len(msgc.queue) == QUEUE_LENGTH
