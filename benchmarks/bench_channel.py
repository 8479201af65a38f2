"""The channel: msgc's ring beside ``queue.Queue``, and what offering costs the caller.

In the group of offers the core encodes and copies each message in ``send``; the queue only keeps
a reference, and its messages have yet to be encoded by a worker. All start empty, with messages
made before.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
from harness import builder, running
from pytest_benchmark.fixture import BenchmarkFixture

from pipeline._core import Channel

QUEUE_LENGTH = 64
ROUNDS = 500


def offer_all(benchmark: BenchmarkFixture, offer: Callable[[], None], setup: Any) -> None:
    benchmark.extra_info["messages"] = QUEUE_LENGTH
    benchmark.pedantic(offer, setup=setup, rounds=ROUNDS, warmup_rounds=10)


@pytest.mark.benchmark(group=f"{QUEUE_LENGTH} items in and out, one thread")
def test_ring_passes_items(benchmark: BenchmarkFixture) -> None:
    channel = Channel(QUEUE_LENGTH)
    items = list(range(QUEUE_LENGTH))

    def pass_all() -> None:
        push, pop = channel.try_push, channel.try_pop
        for item in items:
            push(item)
        for _ in items:
            pop()

    benchmark(pass_all)
    assert len(channel) == 0


@pytest.mark.benchmark(group=f"{QUEUE_LENGTH} items in and out, one thread")
def test_queue_queue_passes_items(benchmark: BenchmarkFixture) -> None:
    msgc: queue.Queue[int] = queue.Queue(QUEUE_LENGTH)
    items = list(range(QUEUE_LENGTH))

    def pass_all() -> None:
        push, pop = msgc.put_nowait, msgc.get_nowait
        for item in items:
            push(item)
        for _ in items:
            pop()

    benchmark(pass_all)
    assert msgc.empty()


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
